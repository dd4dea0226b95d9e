//! The kinds of image under test.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use flatdisk::disk::Disk;
use flatdisk::error::Result;
use flatdisk::formats::{self, CreateSpec, OpenOptions};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::{Access, Host};

/// How a test makes, opens and checks images of one kind.
pub trait Kind: Sync {
    /// For messages.
    fn name(&self) -> String;

    /// Makes the image, with whatever belongs to it.
    fn create(&self, host: &Arc<MemoryHost>) -> Result<()>;

    /// Opens the image.
    fn open(&self, host: &Arc<dyn Host>, access: Access) -> Result<Arc<Disk>>;

    /// The errors that a check of the image finds.
    fn errors(&self, host: &Arc<dyn Host>) -> Result<Vec<String>>;

    /// Whether nothing but payload is ever written: few crash states differ.
    fn flat(&self) -> bool {
        false
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
}

impl Image {
    pub fn new(format: &'static str, subformat: &str, size: u64) -> Self {
        let spec = CreateSpec { subformat: Some(subformat.into()), size, ..CreateSpec::default() };
        Self { format, spec, tweak: None }
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
        self
    }

    /// Whether all of the disk is stored from the beginning.
    pub fn fixed(&self) -> bool {
        let subformat = self.spec.subformat.as_deref().unwrap_or_default();
        matches!(subformat, "fixed" | "monolithicFlat" | "twoGbMaxExtentFlat" | "vmfs")
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

    fn flat(&self) -> bool {
        self.fixed() && self.format != "vhdx"
    }
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
        Image::new("vhd", "dynamic", 7 * MIB + 5 * SECTOR).block(2 * MIB),
        Image::new("vhdx", "dynamic", 5 * MIB + 3 * SECTOR).block(MIB).sector(512),
        Image::new("vhdx", "dynamic", 5 * MIB + 8 * SECTOR).block(MIB).sector(4096),
        Image::new("vhdx", "dynamic", 9 * MIB).block(2 * MIB).sector(512),
        Image::new("vhdx", "fixed", 4 * MIB).block(MIB).sector(512),
        Image::new("vmdk", "monolithicSparse", 40 * MIB + 5 * SECTOR),
        Image::new("vmdk", "twoGbMaxExtentSparse", 2047 * MIB + 300 * SECTOR),
        Image::new("vmdk", "vmfsSparse", 5 * MIB + 3 * SECTOR),
        Image::new("vmdk", "monolithicFlat", MIB + SECTOR),
        Image::new("vmdk", "twoGbMaxExtentFlat", 2047 * MIB + SECTOR),
        Image::new("vmdk", "vmfs", MIB),
    ];
    images.push(
        Image::new("vmdk", "monolithicSparse", 40 * MIB)
            .tweaked("zeroed grains", super::children::allow_zeroed_grains),
    );
    offered(images)
}

/// Larger geometries for the suites that need no crash states.
pub fn large() -> Vec<Image> {
    offered(vec![
        Image::new("vhdx", "dynamic", 200 * MIB).block(32 * MIB).sector(512),
        Image::new("vhdx", "dynamic", 200 * MIB).block(32 * MIB).sector(4096),
        Image::new("vhdx", "fixed", 64 * MIB).block(32 * MIB).sector(4096),
        Image::new("vhd", "dynamic", 5000 * MIB),
        Image::new("vmdk", "monolithicSparse", 5000 * MIB),
    ])
}

/// The images whose driver makes them; the others are named aloud, once.
pub fn offered(images: Vec<Image>) -> Vec<Image> {
    let (offered, missing): (Vec<_>, Vec<_>) = images.into_iter().partition(|image| {
        let format = formats::by_name(image.format).expect("a known format");
        let subformat = image.spec.subformat.as_deref().unwrap_or_default();
        format.subformats().contains(&subformat)
    });
    for image in missing {
        println!("SKIPPED: the driver does not create {}", image.name());
    }
    offered
}

/// The images of [`small`] and children of several kinds.
pub fn all_small() -> Vec<Box<dyn Kind>> {
    let mut kinds: Vec<Box<dyn Kind>> =
        small().into_iter().map(|image| Box::new(image) as Box<dyn Kind>).collect();
    kinds.extend(super::children::all());
    kinds
}
