//! Making new images.

use std::path::Path;
use std::time::SystemTime;

use uuid::Uuid;
use zerocopy::IntoBytes;

use super::layout::{
    BLOCK_SIZES, DiskType, DynamicHeader, FOOTER, Footer, HEADER, MAX_SPARSE_SIZE, SECTOR, UNUSED,
    bitmap_size, footer_place, since_epoch, table_size,
};
use super::locators::{W2KU, W2RU};
use crate::codec;
use crate::disk::sync_file;
use crate::error::{Error, Result};
use crate::formats::references::{backslashed, rooted, way};
use crate::formats::{CreateSpec, Footprint, Identity, Image, Preallocation, preallocate};
use crate::storage::{Access, Host, Storage};

const DEFAULT_BLOCK_SIZE: u64 = 2 << 20;
/// Smallest block that is made, in bytes.
const MIN_BLOCK_SIZE: u64 = 4096;
/// Bytes of the BAT written at once.
const CHUNK: u64 = 1 << 20;

/// Makes the image that `spec` asks for. Until the first sync has returned the file holds neither
/// footer nor copy, so that what a crash leaves is no image rather than half a one.
pub(super) fn create(host: &dyn Host, path: &Path, spec: &CreateSpec) -> Result<()> {
    let sector = |size: Option<u32>| size.is_none_or(|size| u64::from(size) == SECTOR);
    if !sector(spec.logical_sector) || !sector(spec.physical_sector) {
        return Err(Error::invalid("a VHD has sectors of 512 bytes"));
    }
    if spec.subformat.as_deref().is_some_and(|s| s.eq_ignore_ascii_case("fixed")) {
        return create_fixed(host, path, spec);
    }
    let header = new_header(spec.size, spec.block_size)?;
    if spec.preallocation != Preallocation::Off {
        return Err(Error::invalid("a dynamic disk grows as it is filled")
            .hint("only fixed and flat disks are allocated beforehand"));
    }
    let footer = new_footer(DiskType::Dynamic, spec.size, spec)?;
    create_sparse(host, path, &footer, header, &[])
}

/// Makes a differencing disk at `path` over `parent`, which must be a VHD that nobody writes to.
/// Both paths are written into it as they are given, and relative to each other.
pub fn create_child(
    host: &dyn Host,
    path: &Path,
    parent: &Image,
    block_size: Option<u64>,
) -> Result<()> {
    let Identity::VhdUniqueId(parent_id) = parent.identity else {
        return Err(Error::invalid("the parent of a VHD must be a VHD").in_file(&parent.path));
    };
    let names = ParentNames::new(host, path, &parent.path)?;
    let size = parent.disk.size();
    let mut header = new_header(size, block_size)?;
    header.parent_unique_id = parent_id;
    names.put(&mut header);
    let footer = new_footer(DiskType::Differencing, size, &CreateSpec::default())?;
    create_sparse(host, path, &footer, header, &names.locators)
}

/// How a child names its parent.
pub(super) struct ParentNames {
    /// Platform code and data of each locator.
    pub locators: [([u8; 4], Vec<u8>); 2],
    name: Vec<u8>,
    timestamp: u32,
}

impl ParentNames {
    /// The names of `parent` for a child at `child`: from the child's directory, from the root, and
    /// without directory.
    pub(super) fn new(host: &dyn Host, child: &Path, parent: &Path) -> Result<Self> {
        let (child, parent) = (rooted(child), rooted(parent));
        let name = backslashed(Path::new(parent.file_name().unwrap_or_default()))?;
        let utf16 = |path: &Path| Ok(codec::to_utf16(&backslashed(path)?, false));
        Ok(Self {
            locators: [(W2RU, utf16(&way(&child, &parent))?), (W2KU, utf16(&parent)?)],
            name: codec::to_utf16(&name, true),
            timestamp: modified(host, &parent),
        })
    }

    /// Puts name and time into a header.
    pub(super) fn put(&self, header: &mut DynamicHeader) {
        header.parent_timestamp = self.timestamp.into();
        header.parent_unicode_name = [0; 512];
        let len = self.name.len().min(header.parent_unicode_name.len());
        header.parent_unicode_name[..len].copy_from_slice(&self.name[..len]);
    }

    /// Places the locators in the file from byte `at` on; where they end.
    pub(super) fn place(
        locators: &[([u8; 4], Vec<u8>)],
        header: &mut DynamicHeader,
        mut at: u64,
    ) -> u64 {
        for ((code, data), locator) in locators.iter().zip(&mut header.parent_locators) {
            let space = (data.len() as u64).next_multiple_of(SECTOR);
            locator.platform_code = *code;
            // A path is far shorter than 4 GiB.
            locator.data_space = (space as u32).into();
            locator.data_length = (data.len() as u32).into();
            locator.data_offset = at.into();
            at += space;
        }
        header.seal();
        at
    }
}

/// How the file of what `spec` asks for grows.
pub(super) fn footprint(spec: &CreateSpec) -> Result<Footprint> {
    if spec.subformat.as_deref().is_some_and(|s| s.eq_ignore_ascii_case("fixed")) {
        return Ok(Footprint::flat(FOOTER));
    }
    let header = new_header(spec.size, spec.block_size)?;
    let block_size = u64::from(header.block_size.get());
    let table_end = header.table_offset.get() + table_size(header.max_table_entries.get().into());
    // Data is aligned to what the host has as a block.
    let stored = (block_size + bitmap_size(block_size)).next_multiple_of(4096);
    Ok(Footprint { empty: table_end.next_multiple_of(4096) + FOOTER, unit: block_size, stored })
}

fn create_fixed(host: &dyn Host, path: &Path, spec: &CreateSpec) -> Result<()> {
    if spec.block_size.is_some() {
        return Err(Error::invalid("a fixed disk has no blocks"));
    }
    let footer = new_footer(DiskType::Fixed, spec.size, spec)?;
    let file = host.create(path)?;
    preallocate(&*file, 0..spec.size, spec.preallocation)?;
    finish(host, path, &*file, &footer, spec.size)
}

fn new_footer(disk_type: DiskType, size: u64, spec: &CreateSpec) -> Result<Footer> {
    let id = match &spec.uuid {
        None => Uuid::new_v4(),
        Some(id) => Uuid::try_parse(id).map_err(|_| Error::invalid(format!("`{id}` is no id")))?,
    };
    Ok(Footer::new(disk_type, size, *id.as_bytes(), since_epoch(SystemTime::now())))
}

/// What follows the data of a fixed disk of `size` bytes.
pub fn fixed_footer(size: u64, spec: &CreateSpec) -> Result<Vec<u8>> {
    Ok(new_footer(DiskType::Fixed, size, spec)?.as_bytes().to_vec())
}

/// A header for a disk of `size` bytes, without parent, the BAT right behind it.
fn new_header(size: u64, block_size: Option<u64>) -> Result<DynamicHeader> {
    let block_size = block_size.unwrap_or(DEFAULT_BLOCK_SIZE);
    let max = u64::from(*BLOCK_SIZES.end());
    if !block_size.is_power_of_two() || !(MIN_BLOCK_SIZE..=max).contains(&block_size) {
        let what = format!("block size {block_size}");
        return Err(Error::invalid(what).hint("a power of two from 4 KiB to 256 MiB"));
    }
    if size > MAX_SPARSE_SIZE {
        return Err(Error::invalid("a VHD with a BAT holds at most 2040 GiB")
            .hint("a fixed VHD or a VHDX holds more"));
    }
    let blocks = size.div_ceil(block_size);
    let table_at = FOOTER + HEADER;
    let full = blocks * (bitmap_size(block_size) + block_size);
    if table_at + table_size(blocks) + full > u64::from(UNUSED) * SECTOR {
        let what =
            format!("with blocks of {block_size} bytes a full disk would not fit the BAT's reach");
        return Err(Error::invalid(what).hint("take larger blocks"));
    }
    let entries = u32::try_from(blocks).map_err(|_| Error::invalid("too many blocks"))?;
    // At most 256 MiB by the check above.
    Ok(DynamicHeader::new(table_at, entries, block_size as u32))
}

/// Writes an image without blocks. `locators` are the parent's names: platform code and data.
fn create_sparse(
    host: &dyn Host,
    path: &Path,
    footer: &Footer,
    mut header: DynamicHeader,
    locators: &[([u8; 4], Vec<u8>)],
) -> Result<()> {
    let table_at = header.table_offset.get();
    let table_end = table_at + table_size(header.max_table_entries.get().into());
    let end = ParentNames::place(locators, &mut header, table_end);

    let file = host.create(path)?;
    let file = &*file;
    codec::write_all(file, FOOTER, header.as_bytes(), "the dynamic header")?;
    write_empty_table(file, table_at, table_end)?;
    for ((_, data), locator) in locators.iter().zip(&header.parent_locators) {
        codec::write_all(file, locator.data_offset.get(), data, "a parent locator")?;
    }
    sync_file(file)?;
    codec::write_all(file, 0, footer.as_bytes(), "the footer copy")?;
    finish(host, path, file, footer, footer_place(end))
}

/// Fills a BAT, padding included, with unused entries.
fn write_empty_table(file: &dyn Storage, start: u64, end: u64) -> Result<()> {
    let unused = vec![0xff; CHUNK.min(end - start) as usize];
    let mut at = start;
    while at < end {
        let len = CHUNK.min(end - at);
        codec::write_all(file, at, &unused[..len as usize], "the BAT")?;
        at += len;
    }
    Ok(())
}

/// Writes the trailing footer and makes the image and its name durable.
fn finish(
    host: &dyn Host,
    path: &Path,
    file: &dyn Storage,
    footer: &Footer,
    at: u64,
) -> Result<()> {
    codec::write_all(file, at, footer.as_bytes(), "the footer")?;
    sync_file(file)?;
    host.sync_dir(path.parent().unwrap_or(Path::new(".")))
}

/// When the parent's file was last changed: what other programs compare. Zero where the host does
/// not say.
fn modified(host: &dyn Host, path: &Path) -> u32 {
    let file = host.open(path, Access::Peek).ok();
    file.and_then(|file| file.modified()).map_or(0, since_epoch)
}
