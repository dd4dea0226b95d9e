//! Making new images.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;
use zerocopy::IntoBytes;

use super::layout::{
    BLOCK_SIZES, DiskType, DynamicHeader, EPOCH, FOOTER, Footer, HEADER, MAX_SPARSE_SIZE, SECTOR,
    UNUSED, bitmap_size, table_size,
};
use crate::codec;
use crate::disk::sync_file;
use crate::error::{Error, Result};
use crate::formats::CreateSpec;
use crate::storage::{Host, Storage};

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
    let fixed = spec.subformat.as_deref().is_some_and(|s| s.eq_ignore_ascii_case("fixed"));
    if fixed { create_fixed(host, path, spec) } else { create_dynamic(host, path, spec) }
}

fn create_fixed(host: &dyn Host, path: &Path, spec: &CreateSpec) -> Result<()> {
    if spec.block_size.is_some() {
        return Err(Error::invalid("a fixed disk has no blocks"));
    }
    let footer = Footer::new(DiskType::Fixed, spec.size, *Uuid::new_v4().as_bytes(), now());
    let file = host.create(path)?;
    file.set_len(spec.size).map_err(|e| Error::io("extending", &e))?;
    sync_file(&*file)?;
    finish(host, path, &*file, &footer, spec.size)
}

fn create_dynamic(host: &dyn Host, path: &Path, spec: &CreateSpec) -> Result<()> {
    let block_size = spec.block_size.unwrap_or(DEFAULT_BLOCK_SIZE);
    let max = u64::from(*BLOCK_SIZES.end());
    if !block_size.is_power_of_two() || !(MIN_BLOCK_SIZE..=max).contains(&block_size) {
        let what = format!("block size {block_size}");
        return Err(Error::invalid(what).hint("a power of two from 4 KiB to 256 MiB"));
    }
    if spec.size > MAX_SPARSE_SIZE {
        return Err(Error::invalid("a dynamic VHD holds at most 2040 GiB")
            .hint("a fixed VHD or a VHDX holds more"));
    }
    let blocks = spec.size.div_ceil(block_size);
    let table_at = FOOTER + HEADER;
    let end = table_at + table_size(blocks);
    if end + blocks * (bitmap_size(block_size) + block_size) > u64::from(UNUSED) * SECTOR {
        return Err(Error::invalid(format!(
            "with blocks of {block_size} bytes a full disk of this size would be out of the BAT's reach"
        ))
        .hint("take larger blocks"));
    }
    let entries = u32::try_from(blocks).map_err(|_| Error::invalid("too many blocks"))?;
    let mut header = DynamicHeader::new(table_at, entries, block_size as u32);
    header.seal();
    let footer = Footer::new(DiskType::Dynamic, spec.size, *Uuid::new_v4().as_bytes(), now());

    let file = host.create(path)?;
    codec::write_all(&*file, FOOTER, header.as_bytes(), "the dynamic header")?;
    write_empty_table(&*file, table_at, end)?;
    sync_file(&*file)?;
    codec::write_all(&*file, 0, footer.as_bytes(), "the footer copy")?;
    finish(host, path, &*file, &footer, end)
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

/// Seconds since the format's epoch.
fn now() -> u32 {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    u32::try_from(unix.saturating_sub(EPOCH)).unwrap_or(u32::MAX)
}
