//! Creating disks. The layout is the one that VMware's own tools and QEMU write, so that every
//! program takes the result for its own. Grain tables stay holes of the host file: a new disk takes
//! a few KiB for each TiB.

use std::path::{Path, PathBuf};

use crate::codec;
use crate::error::{Error, Result};
use crate::formats::places::directory_of;
use crate::formats::{CreateSpec, Footprint, Preallocation, preallocate, references};
use crate::storage::{Appender, Host, Storage};

use super::cowd;
use super::descriptor::NEVER_WRITTEN;
use super::layout::{
    DEFAULT_GRAIN, DESCRIPTOR_SECTORS, ENTRIES_PER_TABLE, FLAG_NEWLINES, FLAG_REDUNDANT,
    FLAG_ZEROED_GRAINS, Header, MAX_GRAIN, NewLayout, SECTOR,
};
use super::stream::write::StreamWriter;

/// What can be created, the default first.
pub const SUBFORMATS: [&str; 10] = [
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "vmfs",
    "vmfsThin",
    "vmfsSparse",
    "vmfsPreallocated",
    "vmfsEagerZeroedThick",
    "streamOptimized",
];

/// Adapters that a disk can be for.
pub const ADAPTERS: [&str; 4] = ["ide", "buslogic", "lsilogic", "legacyESX"];
const DEFAULT_ADAPTER: &str = "lsilogic";
const DEFAULT_HW_VERSION: u32 = 10;

/// Sectors of each extent of a split disk but the last: 2047 MiB, for hosts whose files end at 2 GiB.
pub const SPLIT: u64 = 4_192_256;
/// Bytes that the size of a part must be a multiple of, so that it holds whole grains.
const SPLIT_UNIT: u64 = 1 << 20;
/// Largest disk made, in sectors: 64 TiB, beyond what any VMware product takes.
pub const MAX_SECTORS: u64 = (64 << 40) / SECTOR;
/// Most extents of a disk made; readers have limits.
pub const MAX_EXTENTS: u64 = 4096;
/// Cylinders beyond which old IDE geometries do not count.
const MAX_IDE_CYLINDERS: u64 = 16_383;

/// What holds the data of a new disk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// One sparse file with the descriptor inside.
    Embedded,
    /// One raw file, of this type.
    Flat(&'static str),
    /// Sparse files of limited size.
    SplitSparse,
    /// Raw files of limited size.
    SplitFlat,
    /// One copy-on-write file of ESX.
    Cowd,
    /// One compressed file with the descriptor inside, written once.
    Stream,
}

impl Shape {
    fn of(subformat: &str) -> Self {
        match subformat {
            "monolithicSparse" => Self::Embedded,
            "twoGbMaxExtentSparse" => Self::SplitSparse,
            "twoGbMaxExtentFlat" => Self::SplitFlat,
            "monolithicFlat" => Self::Flat("FLAT"),
            "vmfsSparse" => Self::Cowd,
            "streamOptimized" => Self::Stream,
            _ => Self::Flat("VMFS"),
        }
    }

    /// Whether the disk is divided into extents of limited size.
    fn in_parts(self) -> bool {
        matches!(self, Self::SplitSparse | Self::SplitFlat)
    }

    /// Whether its extents are raw.
    fn flat(self) -> bool {
        matches!(self, Self::Flat(_) | Self::SplitFlat)
    }
}

/// The settings of a new descriptor.
pub struct NewDescriptor<'a> {
    /// `createType`.
    pub create_type: &'a str,
    /// Content id and its long form.
    pub cid: u32,
    /// The long form of the content id.
    pub long_cid: String,
    /// `parentCID` and `parentFileNameHint`.
    pub parent: Option<(u32, &'a str)>,
    /// The extent lines.
    pub extents: &'a [String],
    /// Further `ddb` keys with their values.
    pub ddb: Vec<(String, String)>,
}

impl NewDescriptor<'_> {
    /// The descriptor's text.
    pub fn text(&self) -> String {
        let (parent, hint) = match self.parent {
            None => (super::descriptor::NO_PARENT, String::new()),
            Some((cid, hint)) => (cid, format!("parentFileNameHint=\"{hint}\"\n")),
        };
        let mut text = format!(
            "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID={:08x}\n\
             parentCID={parent:08x}\ncreateType=\"{}\"\n{hint}\n# Extent description\n",
            self.cid, self.create_type
        );
        for line in self.extents {
            text.push_str(line);
            text.push('\n');
        }
        text.push_str("\n# The Disk Data Base\n#DDB\n\n");
        let mut ddb = self.ddb.clone();
        ddb.push(("longContentID".to_owned(), self.long_cid.clone()));
        ddb.sort();
        for (key, value) in ddb {
            text.push_str(&format!("ddb.{key} = \"{value}\"\n"));
        }
        text
    }
}

/// A disk to be made.
struct NewDisk {
    shape: Shape,
    /// Sectors and file name of each extent.
    extents: Vec<(u64, String)>,
    grain: u64,
    zeroed_grains: bool,
    preallocation: Preallocation,
    text: String,
}

impl NewDisk {
    /// What `spec` asks for, for an image at `path`.
    fn new(path: &Path, spec: &CreateSpec) -> Result<Self> {
        let wanted = spec.subformat.as_deref().unwrap_or(SUBFORMATS[0]);
        let Some(subformat) = SUBFORMATS.into_iter().find(|s| s.eq_ignore_ascii_case(wanted))
        else {
            return Err(Error::invalid(format!("vmdk has no subformat `{wanted}`")));
        };
        let shape = Shape::of(subformat);
        let sectors = spec.size / SECTOR;
        let split_size = split_size(spec, shape.in_parts())?;
        let in_parts = shape.in_parts();
        if sectors > MAX_SECTORS || (in_parts && sectors.div_ceil(split_size) > MAX_EXTENTS) {
            let what = format!("{} bytes are more than a {subformat} disk can have", spec.size);
            return Err(Error::invalid(what));
        }
        let sparse = matches!(shape, Shape::Embedded | Shape::SplitSparse);
        let zeroed_grains = spec.zeroed_grains.unwrap_or(false);
        if zeroed_grains && !sparse {
            return Err(Error::invalid(format!("a {subformat} disk has no zeroed grains")));
        }
        let preallocation = match (subformat, spec.preallocation) {
            ("vmfsPreallocated", Preallocation::Off) => Preallocation::Falloc,
            ("vmfsEagerZeroedThick", _) => Preallocation::Full,
            (_, asked) => asked,
        };
        if preallocation != Preallocation::Off && !shape.flat() {
            return Err(Error::invalid(format!("a {subformat} disk grows as it is filled"))
                .hint("only fixed and flat disks are allocated beforehand"));
        }
        let grain = grain(spec, sparse)?;
        let extents = extents(path, shape, sectors, split_size)?;
        let lines: Vec<_> = extents.iter().map(|(size, name)| line(shape, *size, name)).collect();
        let mut ddb = hardware(spec, sectors)?;
        if subformat == "vmfsThin" {
            ddb.push(("thinProvisioned".to_owned(), "1".to_owned()));
        }
        let text = NewDescriptor {
            // What ESX writes for all of its flat disks: the other names are in documents, not in files,
            // and QEMU refuses them.
            create_type: if shape == Shape::Flat("VMFS") { "vmfs" } else { subformat },
            cid: NEVER_WRITTEN,
            long_cid: format!("{:024x}{NEVER_WRITTEN:08x}", fastrand::u128(..) >> 32),
            parent: None,
            extents: &lines,
            ddb,
        }
        .text();
        Ok(Self { shape, extents, grain, zeroed_grains, preallocation, text })
    }
}

/// Makes the disk that `spec` asks for.
pub fn create(host: &dyn Host, path: &Path, spec: &CreateSpec) -> Result<()> {
    let disk = NewDisk::new(path, spec)?;
    let mut made = MadeFiles::new(host);
    match disk.shape {
        Shape::Embedded => {
            let file = made.create(path)?;
            let sectors = spec.size / SECTOR;
            write_sparse(&*file, sectors, disk.grain, disk.zeroed_grains, Some(&disk.text))?;
            return made.keep(path);
        }
        Shape::Stream => {
            let file = made.create(path)?;
            let out = Appender::new(&*file);
            StreamWriter::begin(out, spec.size / SECTOR, &disk.text)?.finish()?;
            sync(&*file)?;
            return made.keep(path);
        }
        _ => {}
    }
    for (size, name) in &disk.extents {
        let file = made.create(&path.with_file_name(name))?;
        match disk.shape {
            Shape::SplitSparse => {
                write_sparse(&*file, *size, disk.grain, disk.zeroed_grains, None)?;
            }
            Shape::Cowd => cowd::write_new(&*file, *size, name, Some(chs(*size, false)))?,
            _ => write_flat(&*file, *size, disk.preallocation)?,
        }
    }
    let file = made.create(path)?;
    write_text(&*file, &disk.text)?;
    made.keep(path)
}

/// How the files of what `spec` asks for grow.
pub fn footprint(spec: &CreateSpec) -> Result<Footprint> {
    let disk = NewDisk::new(Path::new("disk.vmdk"), spec)?;
    let text = DESCRIPTOR_SECTORS * SECTOR;
    let grain = disk.grain * SECTOR;
    Ok(match disk.shape {
        Shape::Flat(_) | Shape::SplitFlat => Footprint::flat(text),
        Shape::Cowd => {
            // Grains of a sector, each with an entry in a table.
            let empty = text + cowd::new_len(spec.size / SECTOR);
            Footprint { empty, unit: SECTOR, stored: SECTOR + 4 }
        }
        Shape::Stream => Footprint { empty: DEFAULT_GRAIN * SECTOR, unit: grain, stored: grain },
        Shape::Embedded | Shape::SplitSparse => {
            let area = if disk.shape == Shape::Embedded { DESCRIPTOR_SECTORS } else { 0 };
            let overhead = |size: u64| NewLayout::new(size, disk.grain, area).overhead * SECTOR;
            let empty: u64 = disk.extents.iter().map(|(size, _)| overhead(*size)).sum();
            let text = if disk.shape == Shape::Embedded { 0 } else { text };
            Footprint { empty: empty + text, unit: grain, stored: grain }
        }
    })
}

/// Makes a descriptor at `path` for the raw disk in the file at `raw`, which lies in the same folder.
pub fn wrap(host: &dyn Host, path: &Path, raw: &Path, spec: &CreateSpec) -> Result<()> {
    if directory_of(path) != directory_of(raw) {
        let what = "the descriptor and the raw disk must lie in one folder";
        return Err(Error::invalid(what).in_file(path));
    }
    let sectors = spec.size / SECTOR;
    let extent = line(Shape::Flat("FLAT"), sectors, &file_name(raw)?);
    let text = NewDescriptor {
        create_type: "monolithicFlat",
        cid: NEVER_WRITTEN,
        long_cid: format!("{:024x}{NEVER_WRITTEN:08x}", fastrand::u128(..) >> 32),
        parent: None,
        extents: &[extent],
        ddb: hardware(spec, sectors)?,
    }
    .text();
    let mut made = MadeFiles::new(host);
    write_text(&*made.create(path)?, &text)?;
    made.keep(path)
}

/// Begins the stream-optimised image that `spec` asks for, which calls itself `path`.
pub fn begin_stream<W: std::io::Write>(
    out: W,
    path: &Path,
    spec: &CreateSpec,
) -> Result<StreamWriter<W>> {
    let spec = CreateSpec { subformat: Some("streamOptimized".to_owned()), ..spec.clone() };
    StreamWriter::begin(out, spec.size / SECTOR, &NewDisk::new(path, &spec)?.text)
}

/// Size in sectors and file name of each extent.
fn extents(path: &Path, shape: Shape, sectors: u64, limit: u64) -> Result<Vec<(u64, String)>> {
    let stem = base_name(path)?;
    let sizes: Vec<u64> =
        if shape.in_parts() { split(sectors, limit).collect() } else { vec![sectors] };
    let named = |(number, size): (usize, u64)| {
        let name = match shape {
            Shape::Embedded | Shape::Stream => file_name(path)?,
            Shape::Flat(_) => format!("{stem}-flat.vmdk"),
            Shape::SplitSparse => format!("{stem}-s{number:03}.vmdk"),
            Shape::SplitFlat => format!("{stem}-f{number:03}.vmdk"),
            Shape::Cowd => format!("{stem}-delta.vmdk"),
        };
        Ok((size, name))
    };
    (1..).zip(sizes).map(named).collect()
}

/// The line of an extent in a descriptor.
fn line(shape: Shape, size: u64, name: &str) -> String {
    match shape {
        Shape::Embedded | Shape::SplitSparse | Shape::Stream => {
            format!("RW {size} SPARSE \"{name}\"")
        }
        Shape::Flat("VMFS") => format!("RW {size} VMFS \"{name}\""),
        Shape::Cowd => format!("RW {size} VMFSSPARSE \"{name}\""),
        Shape::Flat(_) | Shape::SplitFlat => format!("RW {size} FLAT \"{name}\" 0"),
    }
}

/// Sectors of each extent of a split disk but the last.
pub fn split_size(spec: &CreateSpec, in_parts: bool) -> Result<u64> {
    match spec.split_size {
        None => Ok(SPLIT),
        Some(_) if !in_parts => Err(Error::invalid("only disks in parts have a size of the parts")),
        Some(bytes) if bytes > 0 && bytes.is_multiple_of(SPLIT_UNIT) => Ok(bytes / SECTOR),
        Some(bytes) => {
            Err(Error::invalid(format!("parts of {bytes} bytes")).hint("a multiple of 1 MiB"))
        }
    }
}

/// The sizes, in sectors, of the extents of a split disk.
pub fn split(sectors: u64, limit: u64) -> impl Iterator<Item = u64> {
    (0..sectors.div_ceil(limit)).map(move |i| limit.min(sectors - i * limit))
}

/// The files made so far, removed again unless they are kept.
pub struct MadeFiles<'a> {
    host: &'a dyn Host,
    paths: Vec<PathBuf>,
}

impl<'a> MadeFiles<'a> {
    /// No files yet.
    pub fn new(host: &'a dyn Host) -> Self {
        Self { host, paths: Vec::new() }
    }

    /// Makes a file that does not exist yet.
    pub fn create(&mut self, path: &Path) -> Result<std::sync::Arc<dyn Storage>> {
        let file = self.host.create(path)?;
        self.paths.push(path.to_owned());
        Ok(file)
    }

    /// Makes the existence of the files in the directory of `path` durable, and keeps them.
    pub fn keep(mut self, path: &Path) -> Result<()> {
        self.host.sync_dir(path.parent().unwrap_or(Path::new(".")))?;
        self.paths.clear();
        Ok(())
    }
}

impl Drop for MadeFiles<'_> {
    fn drop(&mut self) {
        for path in &self.paths {
            if let Err(e) = self.host.remove(path) {
                log::warn!("{e}");
            }
        }
    }
}

/// Sectors per grain.
pub fn grain(spec: &CreateSpec, sparse: bool) -> Result<u64> {
    if spec.log_size.is_some() {
        return Err(Error::invalid("a VMDK has no log"));
    }
    for (what, sector) in [("logical", spec.logical_sector), ("physical", spec.physical_sector)] {
        if sector.is_some_and(|s| u64::from(s) != SECTOR) {
            return Err(Error::invalid(format!("a VMDK has {what} sectors of 512 bytes")));
        }
    }
    match spec.block_size {
        None => Ok(DEFAULT_GRAIN),
        Some(_) if !sparse => Err(Error::invalid("flat extents have no grains")),
        Some(bytes) if bytes.is_power_of_two() && (8..=MAX_GRAIN).contains(&(bytes / SECTOR)) => {
            Ok(bytes / SECTOR)
        }
        Some(bytes) => Err(Error::invalid(format!("grains of {bytes} bytes"))
            .hint("a power of two from 4096 to 33554432")),
    }
}

/// The `ddb` keys that describe the virtual hardware.
fn hardware(spec: &CreateSpec, sectors: u64) -> Result<Vec<(String, String)>> {
    let wanted = spec.adapter.as_deref().unwrap_or(DEFAULT_ADAPTER);
    let Some(adapter) = ADAPTERS.into_iter().find(|a| a.eq_ignore_ascii_case(wanted)) else {
        let what = format!("unknown adapter `{wanted}`");
        return Err(Error::invalid(what).hint(ADAPTERS.join(", ")));
    };
    let [cylinders, heads, per_track] = chs(sectors, adapter == "ide");
    let hw_version = spec.hw_version.unwrap_or(DEFAULT_HW_VERSION);
    let tools = spec.tools_version.map(|version| ("toolsVersion", version.to_string()));
    let entries = [
        ("adapterType", adapter.to_owned()),
        ("geometry.cylinders", cylinders.to_string()),
        ("geometry.heads", heads.to_string()),
        ("geometry.sectors", per_track.to_string()),
        ("uuid", spec.uuid.clone().unwrap_or_else(new_uuid)),
        ("virtualHWVersion", hw_version.to_string()),
    ];
    Ok(entries.into_iter().chain(tools).map(|(key, value)| (key.to_owned(), value)).collect())
}

/// A new number for a disk. VMware's own begin like this: a network address authority, and VMware's
/// place in it.
pub fn new_uuid() -> String {
    let mut uuid = format!("60 00 C2 9{:x}", fastrand::u8(..16));
    for index in 4..16 {
        uuid.push(if index == 8 { '-' } else { ' ' });
        uuid.push_str(&format!("{:02x}", fastrand::u8(..)));
    }
    uuid
}

/// Cylinders, heads and sectors per track of a disk. Guests address by sector; this is for firmware
/// that asks.
pub fn chs(sectors: u64, ide: bool) -> [u64; 3] {
    const GIB: u64 = (1 << 30) / SECTOR;
    let (heads, per_track) = match sectors.div_ceil(GIB) {
        _ if ide => (16, 63),
        _ if sectors < GIB => (64, 32),
        ..=2 => (128, 32),
        _ => (255, 63),
    };
    let cylinders = sectors / (heads * per_track);
    [if ide { cylinders.min(MAX_IDE_CYLINDERS) } else { cylinders }, heads, per_track]
}

/// The file's own name, checked for what a descriptor can hold.
pub fn file_name(path: &Path) -> Result<String> {
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .ok_or_else(|| Error::invalid("the file's name is not UTF-8"))?;
    let plain = references::beneath(name).is_ok_and(|beneath| beneath == Path::new(name));
    if name.contains('"') || !plain {
        let what = format!("a descriptor cannot hold the file name `{name}`");
        return Err(Error::invalid(what).hint("quotes, backslashes and control characters"));
    }
    Ok(name.to_owned())
}

/// The name from which those of the extents are made.
pub fn base_name(path: &Path) -> Result<String> {
    let name = file_name(path)?;
    Ok(match name.rsplit_once('.') {
        Some((stem, extension)) if extension.eq_ignore_ascii_case("vmdk") && !stem.is_empty() => {
            stem.to_owned()
        }
        _ => name,
    })
}

/// Fills a new sparse extent, durably.
pub fn write_sparse(
    file: &dyn Storage,
    capacity: u64,
    grain: u64,
    zeroed_grains: bool,
    descriptor: Option<&str>,
) -> Result<()> {
    let new = NewSparse::new(capacity, grain, zeroed_grains, descriptor)?;
    file.set_len(new.len).map_err(|e| Error::io("extend", &e).in_file(file.path()))?;
    for (at, bytes, what) in &new.parts {
        codec::write_all(file, *at, bytes, what)?;
    }
    sync(file)
}

fn sync(file: &dyn Storage) -> Result<()> {
    file.sync().map_err(|e| Error::io("flush", &e).in_file(file.path()))
}

/// What a new sparse extent holds.
pub struct NewSparse {
    /// Bytes of the file.
    pub len: u64,
    /// What is not zero: byte offset, bytes, and what it is.
    pub parts: Vec<(u64, Vec<u8>, &'static str)>,
}

impl NewSparse {
    /// An extent of `capacity` sectors in grains of `grain`, which can be marked as zero if
    /// `zeroed_grains` says so, with the text of an embedded descriptor.
    pub fn new(
        capacity: u64,
        grain: u64,
        zeroed_grains: bool,
        descriptor: Option<&str>,
    ) -> Result<Self> {
        let area = if descriptor.is_some() { DESCRIPTOR_SECTORS } else { 0 };
        let layout = NewLayout::new(capacity, grain, area);
        if layout.overhead >= u64::from(u32::MAX) {
            let what = format!("grains of {} bytes are too small for this disk", grain * SECTOR);
            return Err(Error::invalid(what));
        }
        let (version, zeroed) = if zeroed_grains { (2, FLAG_ZEROED_GRAINS) } else { (1, 0) };
        let header = Header {
            version,
            flags: FLAG_REDUNDANT | FLAG_NEWLINES | zeroed,
            capacity,
            grain,
            descriptor_at: area.min(1),
            descriptor_len: area,
            entries_per_table: ENTRIES_PER_TABLE,
            rgd: layout.rgd,
            gd: layout.gd,
            overhead: layout.overhead,
            unclean: false,
        };
        let mut parts: Vec<_> = [layout.rgd, layout.gd]
            .map(|at| (at * SECTOR, layout.directory(at), "a grain directory"))
            .into();
        if let Some(text) = descriptor {
            if text.len() as u64 > area * SECTOR {
                return Err(Error::invalid("the descriptor does not fit into the image"));
            }
            parts.push((SECTOR, text.as_bytes().to_vec(), "the descriptor"));
        }
        parts.push((0, header.encode().to_vec(), "the sparse header"));
        Ok(Self { len: layout.overhead * SECTOR, parts })
    }
}

/// Gives a raw extent its length, durably.
fn write_flat(file: &dyn Storage, sectors: u64, preallocation: Preallocation) -> Result<()> {
    preallocate(file, 0..sectors * SECTOR, preallocation)?;
    sync(file)
}

/// Fills a new descriptor file, durably.
pub fn write_text(file: &dyn Storage, text: &str) -> Result<()> {
    codec::write_all(file, 0, text.as_bytes(), "the descriptor")?;
    sync(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometry_follows_size_and_adapter() {
        const MIB: u64 = 2048;
        assert_eq!(chs(2 * MIB, false), [2, 64, 32]);
        assert_eq!(chs(1024 * MIB, false), [512, 128, 32]);
        assert_eq!(chs(4 * 1024 * MIB, false), [522, 255, 63]);
        assert_eq!(chs(60 * 1024 * MIB, false), [7832, 255, 63]);
        assert_eq!(chs(10 * MIB, true), [20, 16, 63]);
        assert_eq!(chs(200 * 1024 * MIB, true), [16_383, 16, 63]);
    }

    #[test]
    fn names_lose_their_extension_whatever_its_case() {
        let base = |name: &str| base_name(Path::new(name)).unwrap();
        assert_eq!(base("/x/a.b.vmdk"), "a.b");
        assert_eq!(base("a.VMDK"), "a");
        assert_eq!((base("disk"), base(".vmdk")), ("disk".into(), ".vmdk".into()));
        for name in ["a\"b.vmdk", "a\\b.vmdk", "a\nb.vmdk"] {
            assert!(file_name(Path::new(name)).is_err(), "{name:?}");
        }
    }
}
