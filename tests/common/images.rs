//! The kinds of image under test.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flatdisk::disk::Disk;
use flatdisk::error::Result;
use flatdisk::formats::{self, CreateSpec, OpenOptions};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::{Access, Host, Storage};

/// How a test makes, opens and checks images of one kind.
pub trait Kind: Send + Sync {
    /// For messages.
    fn name(&self) -> String;

    /// Makes the image, with whatever belongs to it.
    fn create(&self, host: &Arc<MemoryHost>) -> Result<()>;

    /// Opens the image.
    fn open(&self, host: &Arc<dyn Host>, access: Access) -> Result<Arc<Disk>>;

    /// The errors that a check of the image finds.
    fn errors(&self, host: &Arc<dyn Host>) -> Result<Vec<String>>;

    /// What children of the image know it by, if it changes whenever the disk does.
    fn identity(&self, host: &Arc<dyn Host>) -> Result<Option<String>> {
        let _ = host;
        Ok(None)
    }

    /// For disks whose tables have many pages: writes this many bytes apart change one page each.
    fn stride(&self) -> Option<u64> {
        None
    }

    /// How many times fewer states and faults than usual are worth looking at; 1 for one kind of each
    /// format that can be written.
    fn share(&self) -> usize {
        1
    }
}

/// A change by hand to a new image, and its name.
pub type Tweak = (&'static str, fn(&Arc<MemoryHost>));

/// An image that a driver makes.
#[derive(Debug, Clone)]
pub struct Image {
    pub format: &'static str,
    pub spec: CreateSpec,
    /// Changed by hand after creation, to get what [`CreateSpec`] cannot ask for.
    pub tweak: Option<Tweak>,
    /// See [`Kind::stride`].
    pub stride: Option<u64>,
    /// See [`Kind::share`].
    pub share: usize,
}

impl Image {
    pub fn new(format: &'static str, subformat: &str, size: u64) -> Self {
        let spec = CreateSpec { subformat: Some(subformat.into()), size, ..CreateSpec::default() };
        Self { format, spec, tweak: None, stride: None, share: 1 }
    }

    pub fn block(mut self, bytes: u64) -> Self {
        self.spec.block_size = Some(bytes);
        self
    }

    pub fn sector(mut self, bytes: u32) -> Self {
        self.spec.logical_sector = Some(bytes);
        self.spec.physical_sector = Some(4096);
        self
    }

    pub fn tweaked(mut self, name: &'static str, tweak: fn(&Arc<MemoryHost>)) -> Self {
        self.tweak = Some((name, tweak));
        self.variant()
    }

    /// One more layout of a format that another kind stands for.
    pub fn variant(mut self) -> Self {
        self.share = 16;
        self
    }

    /// A disk of 150 strides, written across all of it.
    pub fn wide(mut self, stride: u64) -> Self {
        self.spec.size = stride * 150;
        self.stride = Some(stride);
        self.share = 160;
        self
    }

    /// Whether all of the disk is stored from the beginning.
    pub fn fixed(&self) -> bool {
        let subformat = self.spec.subformat.as_deref().unwrap_or_default();
        matches!(subformat, "fixed" | "monolithicFlat" | "twoGbMaxExtentFlat" | "vmfs" | "vmfsThin")
    }

    /// Where the image lies on a test's host.
    pub fn path(&self) -> PathBuf {
        Path::new("/t/disk").with_extension(self.format)
    }

    /// Makes the image at a path of any host.
    pub fn create_at(&self, host: &dyn Host, path: &Path) -> Result<()> {
        formats::create(formats::by_name(self.format)?, host, path, &self.spec)
    }
}

impl Kind for Image {
    fn name(&self) -> String {
        let mut name =
            format!("{} {}", self.format, self.spec.subformat.as_deref().unwrap_or_default());
        if let Some(bytes) = self.spec.block_size {
            name += &format!(", blocks of {} KiB", bytes >> 10);
        }
        if let Some(bytes) = self.spec.logical_sector {
            name += &format!(", {bytes}-byte sectors");
        }
        if self.stride.is_some() {
            name += ", wide";
        }
        if let Some((tweak, _)) = self.tweak {
            name += &format!(", {tweak}");
        }
        name
    }

    fn create(&self, host: &Arc<MemoryHost>) -> Result<()> {
        self.create_at(&**host, &self.path())?;
        if let Some((_, tweak)) = self.tweak {
            tweak(host);
        }
        Ok(())
    }

    fn open(&self, host: &Arc<dyn Host>, access: Access) -> Result<Arc<Disk>> {
        Ok(formats::open(host, &self.path(), &OpenOptions::new(access))?.disk)
    }

    fn errors(&self, host: &Arc<dyn Host>) -> Result<Vec<String>> {
        errors(host, &self.path())
    }

    fn identity(&self, host: &Arc<dyn Host>) -> Result<Option<String>> {
        identity(host, &self.path())
    }

    fn stride(&self) -> Option<u64> {
        self.stride
    }

    fn share(&self) -> usize {
        self.share
    }
}

/// See [`Kind::identity`]; that of a VHD is for ever.
pub fn identity(host: &Arc<dyn Host>, path: &Path) -> Result<Option<String>> {
    let image = formats::open(host, path, &OpenOptions::new(Access::Read))?;
    let lasting = matches!(image.identity, formats::Identity::VhdUniqueId(_));
    Ok((!lasting).then(|| image.identity.to_string()))
}

/// The errors, leaks and notices aside, that a check finds.
pub fn errors(host: &Arc<dyn Host>, path: &Path) -> Result<Vec<String>> {
    let report = formats::check(host, path, &OpenOptions::new(Access::Read))?;
    let errors = report.findings.iter().filter(|f| f.severity == formats::Severity::Error);
    let mut errors: Vec<_> = errors.map(|f| format!("{} at {:x?}", f.what, f.offset)).collect();
    if errors.is_empty() && report.errors > 0 {
        errors.push(format!("{} errors without a finding", report.errors));
    }
    Ok(errors)
}

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;

/// Small images of every kind that can be written, one for each way of laying it out.
pub fn small() -> Vec<Image> {
    let mut images = vec![
        Image::new("vhd", "fixed", 3 * MIB + 5 * SECTOR),
        Image::new("vhd", "dynamic", 3 * MIB + 5 * SECTOR).block(MIB / 2),
        Image::new("vhd", "dynamic", 7 * MIB + 5 * SECTOR).block(2 * MIB).variant(),
        Image::new("vhd", "dynamic", 400 << 10).block(4096).variant(),
        Image::new("vhdx", "dynamic", 5 * MIB + 3 * SECTOR).block(MIB).sector(512),
        Image::new("vhdx", "dynamic", 5 * MIB + 8 * SECTOR).block(MIB).sector(4096).variant(),
        Image::new("vhdx", "dynamic", 9 * MIB).block(2 * MIB).sector(512).variant(),
        Image::new("vhdx", "fixed", 4 * MIB).block(MIB).sector(512),
        Image::new("vmdk", "monolithicSparse", 40 * MIB + 5 * SECTOR),
        Image::new("vmdk", "twoGbMaxExtentSparse", 2047 * MIB + 300 * SECTOR),
        Image::new("vmdk", "monolithicFlat", MIB + SECTOR),
        Image::new("vmdk", "twoGbMaxExtentFlat", 2047 * MIB + SECTOR).variant(),
        Image::new("vmdk", "vmfs", MIB).variant(),
        Image::new("vmdk", "vmfsThin", MIB).variant(),
        Image::new("vmdk", "vmfsSparse", 2 * MIB + 67 * SECTOR),
    ];
    let vhd = Image::new("vhd", "dynamic", 3 * MIB).block(MIB / 2);
    let vhdx = Image::new("vhdx", "dynamic", 3 * MIB).block(MIB).sector(512);
    let vmdk = Image::new("vmdk", "monolithicSparse", 40 * MIB);
    images.extend([
        vhd.clone().tweaked("footer lost", |host| ruin(host, |len| len - 512)),
        vhd.clone().tweaked("copy of the footer lost", |host| ruin(host, |_| 0)),
        vhd.tweaked("full of stale blocks", |host| forget_blocks(host, 1536..1536 + 6 * 4, 0xff)),
        vhdx.clone().tweaked("first header lost", |host| ruin(host, |_| 64 << 10)),
        vhdx.clone().tweaked("second header lost", |host| ruin(host, |_| 128 << 10)),
        vhdx.clone().tweaked("first region table lost", |host| ruin(host, |_| 192 << 10)),
        vhdx.clone().tweaked("second region table lost", |host| ruin(host, |_| 256 << 10)),
        vhdx.clone().tweaked("no log", |host| edit_headers(host, 68, &[0; 12])),
        // Sequence number and FileWriteGuid.
        vhdx.clone().tweaked("identical headers", |host| edit_headers(host, 8, &[7; 24])),
        vhdx.tweaked("full of stale blocks", |host| {
            forget_blocks(host, 3 * MIB..3 * MIB + 3 * 8, 0)
        }),
        vmdk.clone().tweaked("zeroed grains", super::children::allow_zeroed_grains),
        vmdk.tweaked("not closed cleanly", |host| super::children::poke(host, 72, &[1])),
    ]);
    images
}

/// Overwrites the sector of the test's image whose place follows from the file's length.
fn ruin(host: &Arc<MemoryHost>, place: fn(u64) -> u64) {
    let files = host.files();
    let [file] = &files[..] else { panic!("an image of one file") };
    let len = file.len().expect("memory has lengths");
    super::children::poke(host, place(len), &[0xdb; 512]);
}

/// Writes all of the disk and then takes the blocks out of the table at `table`, as crashes before
/// could have: the file is full of space that nothing leads to and that is not zero.
fn forget_blocks(host: &Arc<MemoryHost>, table: Range<u64>, unused: u8) {
    let path = host.files()[0].path().to_owned();
    let shared: Arc<dyn Host> = host.clone();
    let disk = formats::open(&shared, &path, &OpenOptions::new(Access::Write)).expect("opens").disk;
    disk.write_at(0, &vec![0xdd; disk.size() as usize]).expect("written");
    disk.close().expect("closed");
    super::children::poke(host, table.start, &vec![unused; (table.end - table.start) as usize]);
}

/// Puts `bytes` at byte `at` of both headers of a VHDX.
fn edit_headers(host: &Arc<MemoryHost>, at: usize, bytes: &[u8]) {
    for place in [64 << 10, 128 << 10] {
        let mut header = [0; 4096];
        host.files()[0].read_at(place, &mut header).expect("a header");
        header[at..at + bytes.len()].copy_from_slice(bytes);
        header[4..8].fill(0);
        let checksum = crc32c::crc32c(&header).to_le_bytes();
        header[4..8].copy_from_slice(&checksum);
        super::children::poke(host, place, &header);
    }
}

/// Larger geometries for the suites that need no crash states.
pub fn large() -> Vec<Image> {
    vec![
        Image::new("vhdx", "dynamic", 200 * MIB).block(32 * MIB).sector(512),
        Image::new("vhdx", "dynamic", 200 * MIB).block(32 * MIB).sector(4096),
        Image::new("vhdx", "fixed", 64 * MIB).block(32 * MIB).sector(4096),
        Image::new("vhd", "dynamic", 5000 * MIB),
        Image::new("vmdk", "monolithicSparse", 5000 * MIB),
    ]
}

/// Disks whose flushes change more pages than fit into one step of anything.
fn wide() -> Vec<Image> {
    vec![
        Image::new("vhd", "dynamic", 0).wide(2 << 30),
        Image::new("vhdx", "dynamic", 0).block(MIB).sector(512).wide(512 * MIB),
        Image::new("vmdk", "monolithicSparse", 0).wide(32 * MIB),
    ]
}

/// The images of [`small`], wide ones, and children of several kinds.
pub fn all_small() -> Vec<Box<dyn Kind>> {
    let images = small().into_iter().chain(wide());
    let mut kinds: Vec<Box<dyn Kind>> =
        images.map(|image| Box::new(image) as Box<dyn Kind>).collect();
    kinds.extend(super::children::all());
    if let Ok(part) = std::env::var("FLATDISK_ONLY") {
        kinds.retain(|kind| kind.name().contains(&part));
    }
    kinds
}
