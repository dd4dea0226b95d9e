//! Image formats: recognising, opening, creating and checking them.
//!
//! Each format is one [`Format`] object in [`FORMATS`]. [`open()`] turns a path into an [`Image`]; the
//! drivers below implement [`BlockMap`] and know nothing of what is
//! above them.
//!
//! # Files
//!
//! - `chain`: merging a child into its parent, and another parent;
//! - `compact`: giving unused blocks back to the host, in place, and laying blocks in the order of
//!   the disk;
//! - `flatten`: making a child a disk that stands alone;
//! - `folders`: what lies in the folders where files named by images may be;
//! - `foreign`: what a file is that is no VHD, VHDX or VMDK, and what opens it;
//! - `levels`: merging several generations at once, and one from the middle of a chain;
//! - `lifecycle`: another name for an image, and its end;
//! - `meta`: what an image says about itself beside what its disk holds, for looking at and for
//!   changing;
//! - `moving`: copying inside a file;
//! - `naming`: an image under another name in its directory;
//! - `open`: opening an image;
//! - `ova`: disks in OVA archives;
//! - `parents`: finding a child's parent;
//! - `places`: where the files that an image names may be;
//! - `plan`: changes to an image's files that nobody has open;
//! - `profile`: what a program or cloud wants of an image;
//! - `raw`: raw disks as images;
//! - `references`: the gate for files that an image names;
//! - `repair`: planning repairs, and carrying them out;
//! - `report`: what a check finds, and how bad it is;
//! - `resize`: another size of a virtual disk, in place;
//! - `snapshot`: freezing an image, and going back;
//! - `structures`: every structure of an image as it lies in its files;
//! - `tree`: which images of a folder stand on which;
//! - `vhd`: the VHD driver;
//! - `vhdx`: the VHDX driver;
//! - `vmdk`: the VMDK driver;
//! - `whole`: making images that appear under their names only when they are complete;
//! - `zeroes`: looking for zeroes in files of the host.

pub mod chain;
pub mod compact;
pub mod flatten;
#[doc(hidden)]
pub mod folders;
mod foreign;
pub mod levels;
pub mod lifecycle;
pub mod meta;
mod moving;
mod naming;
#[doc(hidden)]
pub mod open;
pub mod ova;
mod parents;
#[doc(hidden)]
pub mod places;
#[doc(hidden)]
pub mod plan;
pub mod profile;
#[doc(hidden)]
pub mod raw;
#[doc(hidden)]
pub mod references;
pub mod repair;
pub mod report;
pub mod resize;
pub mod snapshot;
pub mod structures;
pub mod tree;
#[doc(hidden)]
pub mod vhd;
#[doc(hidden)]
pub mod vhdx;
#[doc(hidden)]
pub mod vmdk;
pub mod whole;
mod zeroes;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use serde::Serialize;

use crate::disk::LOOKUP_STEP;
use crate::disk::map::{BlockMap, DiskRange, ExtentList, Geometry, Source};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Access, Host, Storage};
use compact::Part;
pub use folders::Label;
use meta::{Changes, Entry};
use open::open_alone;
pub use open::{Image, OpenContext, OpenOptions, Spelling, open};
use plan::Steps;
pub use repair::{Plan, Repair, Scope, repair};
pub use report::{Finding, Lost, Report, Severity};
pub use structures::Listing;

/// Every format, in the order of probing.
pub static FORMATS: [&dyn Format; 3] = [&vhdx::Vhdx, &vmdk::Vmdk, &vhd::Vhd];

/// The beginning and the end of a file, enough to recognise every format.
#[derive(Debug)]
pub struct Probe {
    /// The first 4096 bytes, or fewer when the file is shorter.
    pub head: Vec<u8>,
    /// The last 2048 bytes, or fewer when the file is shorter; of a file that ends with zeroes those
    /// before them.
    pub tail: Vec<u8>,
    /// Length of the file.
    pub len: u64,
}

impl Probe {
    /// Bytes of [`Self::head`].
    pub const HEAD: u64 = 4096;
    /// Bytes of [`Self::tail`].
    pub const TAIL: u64 = 2048;

    /// Whether any format claims the file, intact or not.
    pub fn claimed(&self) -> bool {
        FORMATS.into_iter().any(|format| format.probe(self))
    }

    /// Reads what probing needs.
    ///
    /// # Errors
    ///
    /// Those of reading the file.
    pub fn read(file: &dyn Storage) -> Result<Self> {
        let failed = |e| Error::io("read", &e).in_file(file.path());
        let len = file.len().map_err(failed)?;
        let mut head = vec![0; len.min(Self::HEAD) as usize];
        file.read_at(0, &mut head).map_err(failed)?;
        let mut tail = vec![0; len.min(Self::TAIL) as usize];
        file.read_at(len - tail.len() as u64, &mut tail).map_err(failed)?;
        // Less than a sector of zeroes may be the end of a footer.
        if tail.iter().rev().take(512).all(|byte| *byte == 0) {
            let end = end_of_data(file, len)?;
            tail.truncate(end.min(Self::TAIL) as usize);
            file.read_at(end - tail.len() as u64, &mut tail).map_err(failed)?;
        }
        Ok(Self { head, tail, len })
    }
}

/// Where the zeroes begin that a file of `len` bytes ends with, rounded up to 512 bytes: behind the last
/// data, as far as the host tells what are holes, with a look at 64 KiB before that.
///
/// # Errors
///
/// Those of the host.
pub fn end_of_data(file: &dyn Storage, len: u64) -> Result<u64> {
    const LOOK: u64 = 64 << 10;
    const MAX_RANGES: usize = 1 << 16;
    let failed = |e| Error::io("read", &e).in_file(file.path());
    let (mut last, mut at) = (0..0, 0);
    for _ in 0..MAX_RANGES {
        let Some(data) = file.next_data(at).map_err(failed)?.filter(|data| data.end > at) else {
            break;
        };
        at = data.end;
        last = data;
    }
    let end = last.end.min(len);
    let start = last.start.max(end.saturating_sub(LOOK)) / 512 * 512;
    let mut bytes = vec![0; end.saturating_sub(start) as usize];
    file.read_at(start, &mut bytes).map_err(failed)?;
    let sectors = bytes.chunks(512).rposition(|sector| sector.iter().any(|byte| *byte != 0));
    Ok(sectors.map_or(start, |index| start + (index as u64 + 1) * 512).min(len))
}

/// A disk image format.
///
/// # Errors
///
/// Those of the host; [`ErrorKind::Corrupt`] for damage, [`ErrorKind::Unsupported`] for legal images of a kind that
/// the driver does not know.
#[allow(clippy::missing_errors_doc)] // They are the trait's, above.
pub trait Format: Sync {
    /// Short lower-case name: `vhd`, `vhdx`, `vmdk`.
    fn name(&self) -> &'static str;

    /// File name extensions, lower case, the usual one first.
    fn extensions(&self) -> &'static [&'static str];

    /// Subformats that [`Self::create`] makes, the default first.
    fn subformats(&self) -> &'static [&'static str];

    /// Whether the file claims to be of this format, intact or not. Looks at nothing else.
    fn probe(&self, probe: &Probe) -> bool;

    /// Opens an image in time that does not depend on its size. Never writes, whatever the access:
    /// changes begin with [`BlockMap::begin_writes`].
    fn open(&self, file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<Opened>;

    /// What the headers of the image in `file` say, without opening any other file that it is made of.
    fn label(&self, file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<Label> {
        self.open(file, ctx).map(Label::of)
    }

    /// Makes a new image at `path`, whose directory exists and which itself does not. What a failed
    /// creation leaves is removed by the caller of [`create`].
    fn create(&self, host: &dyn Host, path: &Path, spec: &CreateSpec) -> Result<()>;

    /// How the files of what `spec` asks for grow with what is stored in them.
    fn footprint(&self, spec: &CreateSpec) -> Result<Footprint>;

    /// Makes a child of `parent` at `path`, as [`Self::create`] does. The guest's sizes are the
    /// parent's; of `spec` only the block and log size count.
    fn create_child(
        &self,
        host: &dyn Host,
        path: &Path,
        parent: &Image,
        spec: &CreateSpec,
    ) -> Result<()>;

    /// Other files that hold parts of the image and are nobody else's: they go with it. What the image
    /// only names, and files under names of another's parts, are not.
    fn own_files(&self, _file: Arc<dyn Storage>, _ctx: &OpenContext) -> Result<Vec<PathBuf>> {
        Ok(Vec::new())
    }

    /// What takes part when the image in `file` gets the name of `new`, a path in the same directory. Opens
    /// no other file.
    fn naming(&self, _file: &Arc<dyn Storage>, _new: &Path) -> Result<Naming> {
        Ok(Naming::default())
    }

    /// Makes the image in `file`, open for writing, call itself `new` where its own name is inside it
    /// ([`Naming::inside`]). Durable on return; a crash before leaves the old name or the new one, which
    /// makes no difference to what the disk holds.
    fn call_itself(&self, _file: Arc<dyn Storage>, _ctx: &OpenContext, _new: &Path) -> Result<()> {
        Ok(())
    }

    /// What the image in `file` says about itself, and what of it can be set.
    fn meta(&self, file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<Vec<Entry>>;

    /// Changes what the image in `file`, open for writing, says about itself: keys that [`Self::meta`] has as
    /// such that can be set. All of it, durably, or nothing; values that cannot be are refused before that.
    fn set_meta(&self, file: Arc<dyn Storage>, ctx: &OpenContext, changes: &Changes) -> Result<()>;

    /// Points the child in `file`, open for writing, at another parent, or at the same one by another
    /// identity. Durable on return; a crash before leaves a child with the old link or the new one.
    /// The child's own identity stays.
    fn relink(&self, file: Arc<dyn Storage>, ctx: &OpenContext, link: &NewLink<'_>) -> Result<()>;

    /// Takes the parent away from the child in `file`, open for writing, which holds everything that it
    /// shows of it: no block is partly the parent's. Durable on return; a crash before leaves a child
    /// or a disk without parent, and both show the same. The disk's own identity stays.
    fn unlink(&self, file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<()>;

    /// Takes everything out of the child in `file`, open for writing, so that it shows nothing but
    /// its parent. Durable on return; a crash before leaves a part in it.
    fn empty(&self, file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<()>;

    /// Plans the change of the disk in `file`, open for writing, to `size` bytes, a multiple of its
    /// logical sector. A crash anywhere in it leaves the old size or the new one, every byte that both
    /// have, and at worst space that nothing uses. What is behind the end of a smaller disk is given
    /// up. Planned again for the size that the disk has, it finishes what a crash interrupted. Before
    /// it plans, it may put right what every writer would, such as replaying a log.
    fn resize(
        &self,
        file: Arc<dyn Storage>,
        ctx: &OpenContext,
        size: u64,
        plan: &mut Steps,
    ) -> Result<()>;

    /// The parts of the sound image in `file`, open for writing, that can be compacted. Damage is
    /// refused. What every writer would put right, such as replaying a log, is put right.
    fn compact(&self, file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<Vec<Part>>;

    /// Lists every structure of the image's files, damaged or not, as far as `list` has room. An error
    /// only means that not even the file's length can be told.
    fn structures(
        &self,
        file: Arc<dyn Storage>,
        ctx: &OpenContext,
        list: &mut Listing,
    ) -> Result<()>;

    /// Walks every structure of the image, adding what it finds to `report`. An error only means
    /// that checking could not go on; damage is a finding. Time is linear in the file's tables.
    fn check(&self, file: Arc<dyn Storage>, ctx: &OpenContext, report: &mut Report) -> Result<()>;

    /// Plans how to put right what a check finds wrong, as far as that can be rebuilt. Writes
    /// nothing itself. Repairs that depend on others are planned when those were carried out.
    fn repair(&self, file: Arc<dyn Storage>, ctx: &OpenContext, plan: &mut Plan) -> Result<()>;
}

/// What takes part when an image gets another name.
#[derive(Debug, Clone, Default)]
pub struct Naming {
    /// The image's own other files: the name that each has, and the one that it is to get.
    pub parts: Vec<(PathBuf, PathBuf)>,
    /// Files that go with it where they are there, such as notes of what has changed.
    pub notes: Vec<(PathBuf, PathBuf)>,
    /// What the image's named file says from then on, if it is a text that names the others.
    pub text: Option<Vec<u8>>,
    /// The named file has its own name inside it.
    pub inside: bool,
}

/// What a format driver answers for one opened file.
pub struct Opened {
    /// The mapping.
    pub map: Box<dyn BlockMap>,
    /// What `info` shows.
    pub info: ImageInfo,
    /// Its own identity, as its children know it.
    pub identity: Identity,
    /// The parent it needs.
    pub parent: Option<ParentLink>,
    /// Why it cannot be written, if it cannot.
    pub read_only: Option<String>,
    /// Parts of the disk known to be lost, as far as opening could tell.
    pub damage: Vec<DiskRange>,
}

/// How a child names its parent.
#[derive(Debug, Clone)]
pub struct ParentLink {
    /// What the parent must be.
    pub identity: Identity,
    /// Where it may be, best guess first, as written in the child (any slash, any form).
    pub candidates: Vec<String>,
    /// When the parent's file was last changed, as far as the child says.
    pub modified: Option<SystemTime>,
}

/// How a child is to name its parent from now on.
#[derive(Debug, Clone, Copy)]
pub struct NewLink<'a> {
    /// What the parent must be.
    pub identity: &'a Identity,
    /// Where it is.
    pub parent: &'a Path,
}

/// What identifies the contents that a child was made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// VHD: the footer's unique id; all zero for a raw disk, which has none.
    VhdUniqueId([u8; 16]),
    /// VHDX: the data-write GUID; a child may accept two values.
    VhdxDataWrite(Vec<uuid::Uuid>),
    /// VMDK: the content id.
    VmdkCid(u32),
}

impl Identity {
    /// What children of a raw disk know it by. Only Xen makes such children, of the VHD format.
    pub const RAW: Self = Self::VhdUniqueId([0; 16]);

    /// Whether a parent with identity `self` is what a child asks for with `wanted`.
    pub fn satisfies(&self, wanted: &Self) -> bool {
        match (self, wanted) {
            (Self::VhdxDataWrite(own), Self::VhdxDataWrite(wanted)) => {
                own.iter().any(|id| wanted.contains(id))
            }
            _ => self == wanted,
        }
    }
}

/// One value by which a disk is known to its children.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Id {
    /// [`Identity::VhdUniqueId`]
    Vhd([u8; 16]),
    /// One of [`Identity::VhdxDataWrite`].
    Vhdx(uuid::Uuid),
    /// [`Identity::VmdkCid`]
    Vmdk(u32),
}

impl Identity {
    /// The values that it has: one identity satisfies another if they have one in common.
    pub fn keys(&self) -> Vec<Id> {
        match self {
            Self::VhdUniqueId(id) => vec![Id::Vhd(*id)],
            Self::VhdxDataWrite(ids) => ids.iter().map(|id| Id::Vhdx(*id)).collect(),
            Self::VmdkCid(cid) => vec![Id::Vmdk(*cid)],
        }
    }

    /// Whether it is one that disks have before they are written, which tells none from another.
    pub fn anonymous(&self) -> bool {
        const NEVER_WRITTEN: u32 = 0xffff_fffe;
        matches!(self, Self::VmdkCid(0 | NEVER_WRITTEN))
    }
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::VhdUniqueId(id) => write!(f, "unique id {}", uuid::Uuid::from_bytes(*id)),
            Self::VhdxDataWrite(ids) => {
                f.write_str("data-write GUID ")?;
                for (i, id) in ids.iter().enumerate() {
                    write!(f, "{}{id}", if i == 0 { "" } else { " or " })?;
                }
                Ok(())
            }
            Self::VmdkCid(cid) => write!(f, "CID {cid:08x}"),
        }
    }
}

/// What an image says about itself. Field names are the stable names of the JSON form; sizes are
/// in bytes.
#[derive(Debug, Clone, Default, Serialize)]
#[non_exhaustive]
pub struct ImageInfo {
    /// `vhd`, `vhdx`, `vmdk`.
    pub format: &'static str,
    /// `fixed`, `dynamic`, `differencing`, or VMDK's createType.
    pub subformat: String,
    /// Size of the virtual disk.
    pub virtual_size: u64,
    /// The guest's logical sector.
    pub logical_sector_size: u32,
    /// The guest's physical sector.
    pub physical_sector_size: u32,
    /// Allocation unit; absent where nothing is allocated.
    pub block_size: Option<u64>,
    /// The image's own id, in its format's usual text form.
    pub uuid: Option<String>,
    /// The program that made it, as far as it says.
    pub creator: Option<String>,
    /// The parent as written in the image.
    pub parent: Option<String>,
    /// Files other than the image itself that hold parts of it.
    pub extents: Vec<PathBuf>,
    /// Whether the image was not closed cleanly (VHDX: a log to replay; VMDK: the unclean flag).
    pub dirty: bool,
    /// Fields that only this format has, by name.
    pub details: serde_json::Map<String, serde_json::Value>,
    /// What is odd about the image without making it unusable.
    pub warnings: Vec<String>,
}

/// What to create. Fields left `None` take the format's default.
#[derive(Debug, Clone, Default)]
pub struct CreateSpec {
    /// One of [`Format::subformats`].
    pub subformat: Option<String>,
    /// Virtual size in bytes; drivers reject what they cannot represent exactly.
    pub size: u64,
    /// Allocation unit in bytes.
    pub block_size: Option<u64>,
    /// Logical sector in bytes.
    pub logical_sector: Option<u32>,
    /// Physical sector in bytes.
    pub physical_sector: Option<u32>,
    /// VHDX log in bytes.
    pub log_size: Option<u64>,
    /// VMDK adapter type.
    pub adapter: Option<String>,
    /// What is allocated of a fixed or flat disk.
    pub preallocation: Preallocation,
    /// VMDK: version of the virtual hardware.
    pub hw_version: Option<u32>,
    /// VMDK: version of VMware's tools in the guest.
    pub tools_version: Option<u32>,
    /// VMDK: bytes in each part of a disk in parts.
    pub split_size: Option<u64>,
    /// VMDK: whether grains can be marked as zero. Children can by default.
    pub zeroed_grains: Option<bool>,
    /// The image's own id, as [`ImageInfo::uuid`] shows it, instead of a new one.
    pub uuid: Option<String>,
}

/// How the files of an image grow with what is stored in it, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    /// Before anything is stored.
    pub empty: u64,
    /// Bytes of the disk that are stored as one: a block, a grain.
    pub unit: u64,
    /// What storing one of them takes.
    pub stored: u64,
}

impl Footprint {
    /// That of `units` stored units.
    pub fn with(&self, units: u64) -> u64 {
        self.empty.saturating_add(units.saturating_mul(self.stored))
    }

    /// Of a disk whose bytes lie in the file as they are, with `empty` bytes beside them: what is not
    /// written is a hole of the host file.
    fn flat(empty: u64) -> Self {
        const PAGE: u64 = 4096;
        Self { empty, unit: PAGE, stored: PAGE }
    }
}

/// What is allocated of a fixed or flat disk when it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing: the host gives space as the disk is written, and may run out of it then.
    #[default]
    Off,
    /// All of it, where the host can without writing; elsewhere nothing.
    Falloc,
    /// All of it, by writing zeroes.
    Full,
}

/// Gives a new file the length that `range` ends with, and allocates `range`.
///
/// # Errors
///
/// [`ErrorKind::NoSpace`] where the host has no room for it.
pub fn preallocate(
    file: &dyn Storage,
    range: std::ops::Range<u64>,
    how: Preallocation,
) -> Result<()> {
    const ZEROES: u64 = 1 << 20;
    let failed = |e: &std::io::Error| Error::io("allocating", e).in_file(file.path());
    file.set_len(range.end).map_err(|e| failed(&e))?;
    match how {
        Preallocation::Off => Ok(()),
        Preallocation::Falloc if range.is_empty() => Ok(()),
        Preallocation::Falloc => {
            file.allocate(range.start, range.end - range.start).map_err(|e| failed(&e))
        }
        Preallocation::Full => {
            let zeroes = vec![0; ZEROES.min(range.end - range.start) as usize];
            let mut at = range.start;
            while at < range.end {
                let part = ZEROES.min(range.end - at) as usize;
                file.write_at(at, &zeroes[..part]).map_err(|e| failed(&e))?;
                at += part as u64;
            }
            Ok(())
        }
    }
}

/// The format called `name`.
///
/// # Errors
///
/// [`ErrorKind::InvalidInput`] for a name that is none, with those that are.
pub fn by_name(name: &str) -> Result<&'static dyn Format> {
    FORMATS.into_iter().find(|f| f.name().eq_ignore_ascii_case(name)).ok_or_else(|| {
        let known: Vec<_> = FORMATS.iter().map(|f| f.name()).collect();
        Error::invalid(format!("unknown format `{name}`")).hint(known.join(", "))
    })
}

/// The format that a file name's extension stands for.
pub fn by_extension(path: &Path) -> Option<&'static dyn Format> {
    let extension = path.extension()?.to_str()?.to_ascii_lowercase();
    FORMATS.into_iter().find(|f| f.extensions().contains(&extension.as_str()))
}

/// The format that a file's contents show.
///
/// A guest chooses the first sectors of a fixed VHD and the last ones of a sparse VMDK, so contents
/// alone may claim two formats. Then the file's extension decides, which no guest can change.
///
/// # Errors
///
/// [`ErrorKind::NotThisFormat`], saying what the file is where that can be told.
pub fn recognise(file: &dyn Storage) -> Result<&'static dyn Format> {
    let probe = Probe::read(file)?;
    let claims: Vec<_> = FORMATS.into_iter().filter(|f| f.probe(&probe)).collect();
    let by_extension = by_extension(file.path()).map(Format::name);
    match claims[..] {
        [] => Err(foreign::refuse(file, &probe)),
        [only] => Ok(only),
        _ => claims.iter().find(|f| Some(f.name()) == by_extension).copied().ok_or_else(|| {
            let names: Vec<_> = claims.iter().map(|f| f.name()).collect();
            Error::new(ErrorKind::NotThisFormat, format!("may be {}", names.join(" or ")))
                .in_file(file.path())
                .hint("give the file the extension of the format it has")
        }),
    }
}

/// Creates an image of `format` at `path`, removing what a failed attempt left.
///
/// # Errors
///
/// [`ErrorKind::InvalidInput`] for what the format cannot be, [`ErrorKind::Exists`] if there is a file,
/// [`ErrorKind::NoSpace`] on a full host.
pub fn create(format: &dyn Format, host: &dyn Host, path: &Path, spec: &CreateSpec) -> Result<()> {
    if let Some(subformat) = &spec.subformat
        && !format.subformats().iter().any(|s| s.eq_ignore_ascii_case(subformat))
    {
        let what = format!("{} has no subformat `{subformat}`", format.name());
        return Err(Error::invalid(what).hint(format.subformats().join(", ")));
    }
    if spec.size == 0 || !spec.size.is_multiple_of(512) {
        return Err(Error::invalid(format!("size {} is not a multiple of 512", spec.size)));
    }
    clean_up(host, path, || format.create(host, path, spec))
}

/// Creates a child of `parent` at `path`, removing what a failed attempt left. `spec.size` does not
/// count.
///
/// # Errors
///
/// Those of [`create`].
pub fn create_child(
    format: &dyn Format,
    host: &dyn Host,
    path: &Path,
    parent: &Image,
    spec: &CreateSpec,
) -> Result<()> {
    clean_up(host, path, || format.create_child(host, path, parent, spec))
}

/// Runs a creation at `path`; if it fails, no file is there that was not there before.
fn clean_up(host: &dyn Host, path: &Path, create: impl FnOnce() -> Result<()>) -> Result<()> {
    let existed = host.open(path, Access::Peek).is_ok();
    create().map_err(|e| {
        if !existed && e.kind() != ErrorKind::Exists {
            // What is not there needs no removing.
            let _ = host.remove(path);
        }
        e.in_file(path)
    })
}

/// Checks the image at `path`, and whether its parents are what they should be.
///
/// # Errors
///
/// Those of opening the file; damage is no error but a finding.
pub fn check(host: &Arc<dyn Host>, path: &Path, options: &OpenOptions) -> Result<Report> {
    let file = vhd::whole(host, host.open(path, options.access)?, options.access)?;
    let ctx = OpenContext::new(host, &*file, options);
    let format = recognise(&*file)?;
    check_with(format, &file, &ctx, host, path, options)
}

/// Checks the opened `file` and its link to its parent.
fn check_with(
    format: &dyn Format,
    file: &Arc<dyn Storage>,
    ctx: &OpenContext,
    host: &Arc<dyn Host>,
    path: &Path,
    options: &OpenOptions,
) -> Result<Report> {
    let mut report = Report::new(format.name());
    format.check(file.clone(), ctx, &mut report).map_err(|e| e.in_file(path))?;
    let options = OpenOptions { access: Access::Peek, ..options.clone() };
    // What does not open by itself was judged already.
    let Ok(alone) = open_alone(host, path, &options) else { return Ok(report) };
    if report.errors > 0 {
        list_damage(&*alone.map, &mut report).map_err(|e| e.in_file(path))?;
    }
    if alone.parent.is_some() {
        check_parents(host, path, &options, &alone, &mut report);
    }
    Ok(report)
}

/// Lists the parts of the disk that its own tables lead nowhere for. Disks larger than any format
/// has them are looked at as far as that.
fn list_damage(map: &dyn BlockMap, report: &mut Report) -> Result<()> {
    const MAX_SIZE: u64 = 64 << 40;
    let Geometry { size, block_size, .. } = *map.geometry();
    let coarse = LOOKUP_STEP.max(block_size);
    let size = size.min(MAX_SIZE.max(coarse));
    let mut extents = ExtentList::new();
    let (mut pos, mut step) = (0, coarse);
    while pos < size {
        if let Ok(Some(run)) = map.unstored(pos..size) {
            pos += run.len;
            continue;
        }
        let end = size.min(pos.saturating_add(step));
        extents.clear();
        match map.lookup(pos..end, &mut extents) {
            Ok(()) => step = coarse,
            // Some table in there cannot be read: which block is it for?
            Err(e) if e.kind() == ErrorKind::Corrupt && step > block_size => {
                step = block_size;
                continue;
            }
            Err(e) if e.kind() == ErrorKind::Corrupt => {
                extents.clear();
                extents.push(pos, end - pos, Source::Bad);
            }
            Err(e) => return Err(e),
        }
        for extent in extents.iter().filter(|extent| extent.source == Source::Bad) {
            if !report.lose(extent.start, extent.len) {
                return Ok(());
            }
        }
        pos = end;
    }
    Ok(())
}

/// Adds what is wrong between an image, which opened `alone`, and its parents.
fn check_parents(
    host: &Arc<dyn Host>,
    path: &Path,
    options: &OpenOptions,
    alone: &Opened,
    report: &mut Report,
) {
    match open(host, path, options) {
        // Opening adds its remarks to those of the image by itself.
        Ok(image) => {
            for warning in image.info.warnings.iter().skip(alone.info.warnings.len()) {
                report.add(Severity::Notice, None, warning.clone());
            }
        }
        Err(e) => {
            let severity = match e.kind() {
                ErrorKind::ParentMismatch | ErrorKind::Corrupt => Severity::Error,
                // The image may be sound; it is not where its parents are.
                _ => Severity::Notice,
            };
            report.add(severity, None, e.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryHost;

    #[test]
    fn a_guest_cannot_turn_a_fixed_vhd_into_another_format() {
        let host = MemoryHost::new();
        let spec =
            CreateSpec { subformat: Some("fixed".into()), size: 1 << 20, ..CreateSpec::default() };
        for (name, expected) in [("/d.vhd", Ok("vhd")), ("/d", Err(ErrorKind::NotThisFormat))] {
            let path = Path::new(name);
            create(&vhd::Vhd, &*host, path, &spec).unwrap();
            let file = host.open(path, Access::Write).unwrap();
            file.write_at(0, b"vhdxfile").unwrap();
            let found = recognise(&*file).map(|f| f.name()).map_err(|e| e.kind());
            assert_eq!(found, expected, "{name}");
        }
    }
}
