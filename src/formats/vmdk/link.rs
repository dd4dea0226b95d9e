//! One link of a chain, put together: the descriptor, and every extent it names.
//!
//! A name in a descriptor comes from a stranger. Extents are opened beneath the descriptor's own
//! directory, or where the user permits it ([`places`](crate::formats::places)), as regular files, and
//! each file once; what refers to a device or to a key is refused by its name.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::codec;
use crate::disk::map::{DiskRange, FileIndex};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::{Identity, OpenContext, ParentLink, references};
use crate::storage::{FileIdentity, Storage};

use super::descriptor::{Descriptor, ExtentAccess, ExtentLine, ExtentType, MAX_BYTES};
use super::extent_file::ExtentFile;
use super::layout::{self, Header, SECTOR};
use super::map::{Backing, DescriptorFile, Slot, SparseExtent};
use super::{cowd, hosted, sesparse};

/// Everything that opening a descriptor and its extents brings together.
pub struct Link {
    /// The descriptor.
    pub descriptor: DescriptorFile,
    /// The extents in disk order, without gaps.
    pub slots: Vec<Slot>,
    /// The sparse ones.
    pub sparse: Vec<SparseExtent>,
    /// The files that slots refer to.
    pub files: Vec<Arc<ExtentFile>>,
    /// Bytes of the disk.
    pub size: u64,
    /// Why the disk cannot be written, if it cannot.
    pub read_only: Option<String>,
    /// Parts of the disk that no file holds although one should.
    pub damage: Vec<DiskRange>,
    /// Extents could not be opened.
    pub lost: bool,
    /// What is damaged, as far as opening could tell.
    pub problems: Vec<String>,
    /// What is odd.
    pub warnings: Vec<String>,
}

/// The descriptor that a file holds.
pub struct Found {
    /// The descriptor.
    pub file: DescriptorFile,
    /// The file holds the first extent too.
    is_extent: bool,
    /// Sectors of the extent that the file is.
    capacity: u64,
}

impl Found {
    /// Judges a descriptor of which lines are broken. Left out they cost nothing where the rest says that
    /// the file is all there is of the disk, and that it has no parent or which one.
    fn judge_broken(&mut self, force: bool) -> Result<()> {
        let descriptor = &mut self.file.descriptor;
        let Some(what) = descriptor.broken.first() else { return Ok(()) };
        let broken = Error::corrupt(what.clone()).at(self.file.at);
        let whole = ["monolithicSparse", "streamOptimized"]
            .iter()
            .any(|kind| descriptor.create_type().eq_ignore_ascii_case(kind));
        let one = matches!(&descriptor.extents[..], [line] if line.kind == ExtentType::Sparse);
        if !self.is_extent || !(force || whole && one && descriptor.get("parentCID").is_some()) {
            let hint = "`-o force` takes the file for the whole disk";
            return Err(if self.is_extent { broken.hint(hint) } else { broken });
        }
        if !one {
            descriptor.extents = vec![ExtentLine {
                access: ExtentAccess::ReadWrite,
                sectors: self.capacity,
                kind: ExtentType::Sparse,
                name: None,
                offset: None,
                line: 1,
            }];
        }
        Ok(())
    }
}

/// A sparse extent that is to be opened.
pub struct Asked<'a> {
    /// Its number among the sparse extents of the disk.
    pub number: usize,
    /// Where its file stands in the disk's list.
    pub file_index: FileIndex,
    /// The file.
    pub file: &'a Arc<ExtentFile>,
    /// Sectors that the descriptor says it has.
    pub sectors: u64,
}

impl Asked<'_> {
    /// Length of the file in bytes.
    pub fn file_len(&self) -> Result<u64> {
        self.file.len().map_err(|e| Error::io("stat", &e).in_file(self.file.path()))
    }

    /// Refuses an extent whose header has fewer sectors than the descriptor says.
    pub fn check_capacity(&self, capacity: u64) -> Result<()> {
        if capacity >= self.sectors {
            return Ok(());
        }
        let what =
            format!("the sparse header has {capacity} sectors, the descriptor {}", self.sectors);
        Err(Error::corrupt(what).in_file(self.file.path()))
    }
}

/// A sparse extent as its own file describes it.
pub struct OpenedSparse {
    /// The extent.
    pub extent: SparseExtent,
    /// Why it cannot be written, if it cannot.
    pub read_only: Option<String>,
    /// What is damaged, as far as opening could tell.
    pub problem: Option<String>,
    /// Parts of the extent, in bytes, that are lost as far as opening could tell.
    pub damage: Vec<Range<u64>>,
}

impl Link {
    /// Opens the link whose descriptor is in `file`.
    pub fn open(file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<Self> {
        Self::open_with(file, ctx, ctx.force)
    }

    /// The same; `force` goes on without extents that cannot be opened, as long as there are others.
    pub fn open_with(file: Arc<dyn Storage>, ctx: &OpenContext, force: bool) -> Result<Self> {
        let mut found = find_descriptor(&file)?;
        refuse_unsupported(&found.file.descriptor, ctx)?;
        found.judge_broken(force)?;
        let mut builder = Builder::new(&file, ctx, found)?;
        let lines = builder.link.descriptor.descriptor.extents.clone();
        if lines.is_empty() {
            return Err(Error::corrupt("the descriptor names no extents"));
        }
        let mut lost = Vec::new();
        for (index, line) in lines.iter().enumerate() {
            let Err(e) = builder.add(index, line) else { continue };
            if lines.len() == 1 {
                return Err(e);
            }
            let e = in_extent(&e, index, lines.len());
            if !force || matches!(e.kind(), ErrorKind::Busy | ErrorKind::Unsupported) {
                return Err(if is_loss(&e) { e.hint("`-o force` reads the others") } else { e });
            }
            builder.lose(line, &e)?;
            lost.push(e);
        }
        match lost.pop() {
            Some(e) if lost.len() + 1 == lines.len() => Err(e),
            _ => builder.finish(),
        }
    }
}

/// Whether an extent that cannot be opened is gone or damaged.
fn is_loss(e: &Error) -> bool {
    matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Corrupt | ErrorKind::Io)
}

/// Says which of several extents an error is about.
fn in_extent(e: &Error, index: usize, count: usize) -> Error {
    let mut error = Error::new(e.kind(), format!("extent {} of {count}: {}", index + 1, e.what()));
    if let Some(path) = e.path() {
        error = error.in_file(path);
    }
    if let Some(at) = e.offset() {
        error = error.at(at);
    }
    error
}

/// Finds the descriptor in the file that the user named.
pub fn find_descriptor(file: &Arc<dyn Storage>) -> Result<Found> {
    let failed = |e| Error::io("read", &e).in_file(file.path());
    let len = file.len().map_err(failed)?;
    let mut magic = [0; 8];
    let present = len.min(8) as usize;
    file.read_at(0, &mut magic[..present]).map_err(failed)?;
    if magic == layout::MAGIC_SESPARSE || magic[..4] == layout::MAGIC_COWD {
        return Err(lone_extent());
    }
    let magic: [u8; 4] = [magic[0], magic[1], magic[2], magic[3]];
    if magic == layout::MAGIC_ENCRYPTED {
        return Err(Error::unsupported("the disk is encrypted by VMware"));
    }
    let wrap = |at, text: &[u8]| -> Result<DescriptorFile> {
        let descriptor = Descriptor::parse(text)?;
        Ok(DescriptorFile { file: ExtentFile::new(file.clone(), false), at, descriptor })
    };
    if magic != layout::MAGIC && magic != layout::MAGIC_UNFINISHED {
        let mut text = vec![0; len.min(MAX_BYTES + 1) as usize];
        file.read_at(0, &mut text).map_err(failed)?;
        return Ok(Found { file: wrap(0, &text)?, is_extent: false, capacity: 0 });
    }
    let header = Header::read(&**file, 0)?;
    if header.descriptor_at == 0 {
        return Err(lone_extent());
    }
    let at = header.descriptor_at * SECTOR;
    let area = (header.descriptor_len * SECTOR).min(MAX_BYTES + 1);
    if at.checked_add(area).is_none_or(|end| end > len) {
        return Err(Error::corrupt("the embedded descriptor lies past the end of the file").at(at));
    }
    let mut text = vec![0; area as usize];
    codec::read_exact(&**file, at, &mut text, "the embedded descriptor")?;
    if text[0] == 0 {
        return Err(lone_extent());
    }
    let file = wrap(at, &text).map_err(|e| e.at(at))?;
    Ok(Found { file, is_extent: header.capacity != 0, capacity: header.capacity })
}

fn lone_extent() -> Error {
    Error::unsupported("this file is one extent of a disk, without the disk's descriptor")
        .hint("open the .vmdk file that lists the extents")
}

/// Refuses disks whose data is not in files, not on this machine, or not readable without a key.
fn refuse_unsupported(d: &Descriptor, ctx: &OpenContext) -> Result<()> {
    for key in ["keyID", "encryptionKeys"] {
        if let Some(value) = d.get(key) {
            let what = format!("the disk is encrypted by vSphere ({key} {value})");
            return Err(Error::unsupported(what));
        }
    }
    for (key, value) in d.settings() {
        let key = key.to_ascii_lowercase();
        if key.starts_with("encryption.") {
            return Err(Error::unsupported("the disk is encrypted by VMware"));
        }
        if key == "ddb.iofilters" && value.contains("vmwarevmcrypt") {
            return Err(Error::unsupported("the disk is encrypted by vSphere (I/O filter)"));
        }
        if key == "ddb.objectparenturi" || key.starts_with("ddb.nativeparent") {
            return Err(Error::unsupported(format!(
                "the disk's parent is a remote object ({key})"
            )));
        }
    }
    if d.get("isNativeSnapshot").is_some_and(|v| v.eq_ignore_ascii_case("yes")) {
        return Err(Error::unsupported("the disk is a snapshot inside a storage array"));
    }
    for line in &d.extents {
        let name = line.name.as_deref().unwrap_or_default();
        let device = name.starts_with("/dev/") || name.starts_with(r"\\.\");
        if device_of(line, ctx).is_some() && (d.extents.len() == 1 || !is_mapping(line)) {
            continue;
        }
        let reason = match line.kind {
            ExtentType::VmfsRdm => "a raw device mapping",
            ExtentType::VmfsRaw => "a raw device",
            ExtentType::VsanSparse => "an object of a vSAN",
            _ if name.starts_with("vsan:") || name.starts_with("vvol:") => "a remote object",
            _ if device && line.access != ExtentAccess::None => "a raw device",
            _ => continue,
        };
        let what = format!("createType {}: an extent is {reason}", d.create_type());
        let named = name.starts_with("/dev/").then_some(name);
        let device = named.or_else(|| (is_mapping(line)).then_some("DEVICE"));
        let hint = device.map(|device| {
            format!("`--allow-device {device}` lets it be read, with `--rw` written")
        });
        return Err(Error::unsupported(what).hinting(hint));
    }
    Ok(())
}

/// Whether an extent is what ESX knows a device by, which means nothing elsewhere.
fn is_mapping(line: &ExtentLine) -> bool {
    matches!(line.kind, ExtentType::VmfsRdm | ExtentType::VmfsRaw)
}

/// The device that the user permits an extent to be on.
fn device_of<'a>(line: &ExtentLine, ctx: &'a OpenContext) -> Option<&'a Path> {
    ctx.device(line.name.as_deref().unwrap_or_default(), is_mapping(line))
}

/// Collects extents line by line.
struct Builder<'a> {
    ctx: &'a OpenContext,
    link: Link,
    /// The file that the user named, if it is an extent itself.
    embedded: Option<Arc<dyn Storage>>,
    /// Files opened so far, by name as opened.
    opened: HashMap<PathBuf, Arc<dyn Storage>>,
    /// Which file is already in use, and under what name.
    identities: HashMap<FileIdentity, PathBuf>,
    /// Places of `link.files`, by name and protection.
    indices: HashMap<(PathBuf, bool), FileIndex>,
    /// What the extents take of each file: all of it for sparse ones.
    taken: HashMap<PathBuf, Vec<Range<u64>>>,
}

impl<'a> Builder<'a> {
    fn new(file: &Arc<dyn Storage>, ctx: &'a OpenContext, found: Found) -> Result<Self> {
        let identity = file.identity().map_err(|e| Error::io("stat", &e).in_file(file.path()))?;
        let warnings = found.file.descriptor.warnings.clone();
        Ok(Self {
            ctx,
            embedded: found.is_extent.then(|| file.clone()),
            opened: HashMap::new(),
            identities: HashMap::from([(identity, file.path().to_owned())]),
            indices: HashMap::new(),
            taken: HashMap::new(),
            link: Link {
                descriptor: found.file,
                slots: Vec::new(),
                sparse: Vec::new(),
                files: Vec::new(),
                size: 0,
                read_only: None,
                damage: Vec::new(),
                lost: false,
                problems: Vec::new(),
                warnings,
            },
        })
    }

    fn read_only(&mut self, why: impl FnOnce() -> String) {
        self.link.read_only.get_or_insert_with(why);
    }

    /// Adds the extent of line number `index`.
    fn add(&mut self, index: usize, line: &ExtentLine) -> Result<()> {
        let start = self.link.size;
        let len = layout::bytes(line.sectors)
            .filter(|len| start.checked_add(*len).is_some_and(|end| end <= i64::MAX as u64))
            .ok_or_else(|| Error::corrupt("the extents are larger together than any disk"))?;
        let backing = match (line.access, line.kind) {
            (_, ExtentType::Zero) => Backing::Zero,
            (ExtentAccess::None, _) => Backing::NoAccess,
            (_, ExtentType::Flat | ExtentType::Vmfs) => self.flat(line, start, len)?,
            (_, ExtentType::VmfsRdm | ExtentType::VmfsRaw) => self.flat(line, start, len)?,
            _ => self.sparse(index, line, len)?,
        };
        self.push(len, backing);
        Ok(())
    }

    fn push(&mut self, len: u64, backing: Backing) {
        let start = self.link.size;
        self.link.size = start + len;
        self.link.slots.push(Slot { start, end: start + len, backing });
    }

    /// Goes on without the extent of a line, which could not be added because of `e`.
    fn lose(&mut self, line: &ExtentLine, e: &Error) -> Result<()> {
        let start = self.link.size;
        let len = layout::bytes(line.sectors)
            .filter(|len| start.checked_add(*len).is_some_and(|end| end <= i64::MAX as u64))
            .ok_or_else(|| e.clone())?;
        self.read_only(|| e.what().to_owned());
        let name = line.name.as_deref().unwrap_or_default().escape_debug();
        self.link.problems.push(format!("`{name}` is lost: {}", e.what()));
        self.link.damage.push(start..start + len);
        self.link.lost = true;
        self.push(len, Backing::NoAccess);
        Ok(())
    }

    /// Opens the file that a line names, or finds it among those open, and reserves `take` of it.
    fn file(
        &mut self,
        line: &ExtentLine,
        take: Range<u64>,
    ) -> Result<(FileIndex, Arc<ExtentFile>)> {
        let name = line.name.as_deref().unwrap_or_default();
        if name.contains(char::REPLACEMENT_CHARACTER) {
            let encoding = self.link.descriptor.descriptor.get("encoding").unwrap_or("unknown");
            let what = format!("the extent's name is in an unsupported encoding ({encoding})");
            return Err(Error::unsupported(what));
        }
        let path = references::beneath(name).unwrap_or_else(|_| name.into());
        let taken = self.taken.entry(path.clone()).or_default();
        if taken.iter().any(|t| t.start < take.end && take.start < t.end) {
            return Err(Error::corrupt(format!("`{name}` is used by two extents at once")));
        }
        taken.push(take);
        let storage = match self.opened.get(&path) {
            Some(storage) => storage.clone(),
            None => {
                let own = self.link.descriptor.file.path();
                if own.file_name().is_some_and(|own| path.as_os_str() == own) {
                    return Err(Error::corrupt(format!("`{name}` is the descriptor itself")));
                }
                let storage = match device_of(line, self.ctx) {
                    Some(device) => self.ctx.open_device(device)?,
                    None => self.ctx.open_extent(name)?,
                };
                let identity = storage
                    .identity()
                    .map_err(|e| Error::io("stat", &e).in_file(storage.path()))?;
                if let Some(other) = self.identities.insert(identity, path.clone()) {
                    let what = format!("`{name}` and `{}` are one file", other.display());
                    return Err(Error::corrupt(what));
                }
                self.opened.insert(path.clone(), storage.clone());
                storage
            }
        };
        let protected = line.access != ExtentAccess::ReadWrite;
        let files = &mut self.link.files;
        let index = *self.indices.entry((path, protected)).or_insert_with(|| {
            files.push(ExtentFile::new(storage, protected));
            files.len() - 1
        });
        Ok((index, files[index].clone()))
    }

    fn flat(&mut self, line: &ExtentLine, start: u64, len: u64) -> Result<Backing> {
        let at = layout::bytes(line.offset.unwrap_or(0))
            .filter(|at| at.checked_add(len).is_some_and(|end| end <= i64::MAX as u64))
            .ok_or_else(|| Error::corrupt("the extent begins beyond the end of any file"))?;
        let (file, storage) = self.file(line, at..at + len)?;
        if device_of(line, self.ctx).is_some() && !self.ctx.write_devices {
            self.read_only(|| "it is on a device, which is only read without --rw".to_owned());
        }
        let file_len = storage.len().map_err(|e| Error::io("stat", &e).in_file(storage.path()))?;
        let present = file_len.saturating_sub(at).min(len) / SECTOR * SECTOR;
        if present < len {
            let name = storage.path().display().to_string();
            self.read_only(|| format!("{name} is shorter than its extent"));
            self.link.problems.push(format!("{name} is shorter than its extent"));
            self.link.damage.push(start + present..start + len);
        }
        Ok(Backing::Flat { file, at, present })
    }

    fn sparse(&mut self, index: usize, line: &ExtentLine, len: u64) -> Result<Backing> {
        let (file_index, file) = match &self.embedded {
            Some(storage) if index == 0 => {
                // Files are renamed; an embedded descriptor means the file it is in.
                let file = match line.access {
                    ExtentAccess::ReadWrite => self.link.descriptor.file.clone(),
                    _ => ExtentFile::new(storage.clone(), true),
                };
                self.link.files.push(file.clone());
                (self.link.files.len() - 1, file)
            }
            _ => self.file(line, 0..u64::MAX)?,
        };
        let number = self.link.sparse.len();
        let asked = Asked { number, file_index, file: &file, sectors: line.sectors };
        let found = match line.kind {
            ExtentType::SeSparse => sesparse::open(&asked)?,
            ExtentType::VmfsSparse => cowd::open(&asked, true)?,
            _ if is_cowd(&file)? => cowd::open(&asked, false)?,
            _ => hosted::open(&asked)?,
        };
        if let Some(problem) = found.problem {
            self.link.problems.push(format!("{}: {problem}", file.path().display()));
        }
        if let Some(reason) = found.read_only {
            self.read_only(|| reason);
        }
        let start = self.link.size;
        for lost in found.damage {
            self.link.damage.push(start + lost.start..start + lost.end.min(len));
        }
        let mut extent = found.extent;
        extent.writable &= line.access == ExtentAccess::ReadWrite;
        self.link.sparse.push(extent);
        Ok(Backing::Sparse(number))
    }

    fn finish(mut self) -> Result<Link> {
        if self.embedded.is_some()
            && !matches!(self.link.slots.first().map(|s| &s.backing), Some(Backing::Sparse(0)))
        {
            return Err(Error::corrupt("the embedded descriptor's first extent is not sparse"));
        }
        let descriptor = self.link.descriptor.descriptor.clone();
        if let Some(what) = descriptor.broken.first() {
            self.read_only(|| what.clone());
            self.link.problems.push(format!("the descriptor is damaged: {what}"));
        }
        if !descriptor.broken.is_empty() && descriptor.get("parentCID").is_none() {
            let warning = "whether the disk has a parent is lost with its descriptor: what is not stored reads as zeroes";
            self.link.warnings.push(warning.to_owned());
        }
        let reason = if descriptor.get("changeTrackPath").is_some() {
            Some(
                "changed block tracking is on, and writing would make its record wrong: without the \
                 `changeTrackPath` of its descriptor the disk can be written",
            )
        } else if descriptor.ambiguous {
            Some("the descriptor sets a key twice with different values")
        } else if !self.link.slots.iter().any(|slot| match slot.backing {
            Backing::Flat { file, .. } => !self.link.files[file].protected(),
            Backing::Sparse(number) => self.link.sparse[number].writable,
            _ => false,
        }) {
            Some("no extent of the disk may be written")
        } else {
            None
        };
        if let Some(reason) = reason {
            self.read_only(|| reason.to_owned());
        }
        let parentless = matches!(descriptor.parent_cid(), Ok(None));
        if parentless && descriptor.get("parentFileNameHint").is_some_and(|h| !h.is_empty()) {
            let warning = "a parent is named, but parentCID says that there is none";
            self.link.warnings.push(warning.to_owned());
        }
        if let Some(filters) = descriptor.get("ddb.iofilters").filter(|f| !f.is_empty()) {
            self.link.warnings.push(format!("made for I/O filters that are not here: {filters}"));
        }
        if descriptor.cid().is_none() {
            self.link.warnings.push("the descriptor has no CID".to_owned());
        }
        if self.link.sparse.iter().any(|s| s.unclean) {
            self.link.warnings.push("the disk was not closed after its last writing".to_owned());
        }
        Ok(self.link)
    }
}

/// Whether a file begins as ESX copy-on-write extents do.
fn is_cowd(file: &ExtentFile) -> Result<bool> {
    let magic: [u8; 4] = codec::read_array(file, 0, "the sparse header")?;
    Ok(magic == layout::MAGIC_COWD)
}

/// The disk's parent as its descriptor names it.
pub fn parent_link(descriptor: &Descriptor) -> Result<Option<ParentLink>> {
    let hint = descriptor.get("parentFileNameHint").filter(|hint| !hint.is_empty());
    Ok(descriptor.parent_cid()?.map(|cid| ParentLink {
        identity: Identity::VmdkCid(cid),
        candidates: hint.map(str::to_owned).into_iter().collect(),
        modified: None,
    }))
}
