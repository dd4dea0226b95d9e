//! Creating images.
//!
//! Everything but the identifier is written and synced first, the identifier last: a creation that
//! is interrupted leaves a file that is no VHDX at all.

use std::path::Path;

use uuid::Uuid;

use super::bat::{BatLayout, ENTRIES_PER_PAGE, Entry};
use super::headers::Header;
use super::layout::{
    BAT_REGION, BLOCK_SIZES, FILE_SIGNATURE, HEADER_OFFSETS, LOG_SECTOR, MAX_DISK, MAX_LOG,
    METADATA_REGION, MIB, REGION_TABLE_OFFSETS, RawFileParameters,
};
use super::locator::{
    ABSOLUTE_WIN32_PATH, Locator, PARENT_LINKAGE, PARENT_LINKAGE2, RELATIVE_PATH, braced,
};
use super::metadata::NewMetadata;
use super::regions::{self, Region};
use crate::codec::{to_utf16, write_all};
use crate::disk::sync_file;
use crate::error::{Error, Result};
use crate::formats::references::{backslashed, rooted, way};
use crate::formats::{CreateSpec, Footprint, Identity, Image, Preallocation, preallocate};
use crate::storage::{Host, Storage};

const DEFAULT_LOG: u64 = MIB;
/// Disks above this size get larger blocks, which keep the BAT small.
const LARGE_DISK: u64 = 1 << 40;

/// A new file, ready to be written.
struct NewFile {
    metadata: NewMetadata,
    layout: BatLayout,
    log: u64,
    fixed: bool,
    preallocation: Preallocation,
}

/// Creates a disk without parent.
pub(super) fn create(host: &dyn Host, path: &Path, spec: &CreateSpec) -> Result<()> {
    new_file(spec)?.write(host, path)
}

/// How the file of what `spec` asks for grows.
pub(super) fn footprint(spec: &CreateSpec) -> Result<Footprint> {
    let file = new_file(spec)?;
    let empty = 2 * MIB + file.log + file.layout.region_length();
    let block_size = file.layout.block_size;
    Ok(match file.fixed {
        true => Footprint::flat(empty),
        false => Footprint { empty, unit: block_size, stored: block_size },
    })
}

/// A new file for a disk without parent.
fn new_file(spec: &CreateSpec) -> Result<NewFile> {
    let fixed = spec.subformat.as_deref().is_some_and(|s| s.eq_ignore_ascii_case("fixed"));
    let default_block = if spec.size > LARGE_DISK { 32 * MIB } else { 2 * MIB };
    let flags = if fixed { RawFileParameters::LEAVE_BLOCKS_ALLOCATED } else { 0 };
    let metadata = NewMetadata {
        block_size: block_size(spec.block_size.unwrap_or(default_block))?,
        flags,
        size: spec.size,
        disk_id: match &spec.uuid {
            None => Uuid::new_v4(),
            Some(id) => Uuid::try_parse(id).map_err(|_| Error::invalid("this is no disk id"))?,
        },
        logical_sector: sector("logical", spec.logical_sector.unwrap_or(512))?,
        physical_sector: sector("physical", spec.physical_sector.unwrap_or(4096))?,
        locator: None,
    };
    NewFile::new(metadata, spec)
}

/// Creates a child of `parent` at `path`: a disk that reads like its parent until it is written. Of
/// `spec` only block and log size count; the sizes that a guest sees are the parent's. The child
/// knows its parent by the parent's contents, so these must not change any more.
pub fn create_child(host: &dyn Host, path: &Path, parent: &Image, spec: &CreateSpec) -> Result<()> {
    let Identity::VhdxDataWrite(linkage) = &parent.identity else {
        let what = format!("a VHDX disk cannot be the child of a {} disk", parent.info.format);
        return Err(Error::invalid(what));
    };
    if parent.disk.read_only().is_none() {
        // Writing changes the identity that the child records.
        let what = "a parent must be open for reading only while a child is made";
        return Err(Error::invalid(what).in_file(&parent.path));
    }
    let linkage = linkage.first().copied().unwrap_or_default();
    let locator = parent_locator(path, &parent.path, &[linkage])?.encode()?;
    let geometry = parent.disk.geometry();
    let disk_id = parent.info.uuid.as_deref().and_then(|id| Uuid::try_parse(id).ok());
    let metadata = NewMetadata {
        block_size: block_size(spec.block_size.unwrap_or(geometry.block_size))?,
        flags: RawFileParameters::HAS_PARENT,
        size: geometry.size,
        disk_id: disk_id.unwrap_or_default(),
        logical_sector: geometry.logical_sector,
        physical_sector: geometry.physical_sector,
        locator: Some(locator),
    };
    NewFile::new(metadata, spec)?.write(host, path)
}

/// The locator of a child at `path` whose parent must have one of `accepted`, which are one or two
/// data-write GUIDs.
pub(super) fn parent_locator(path: &Path, parent: &Path, accepted: &[Uuid]) -> Result<Locator> {
    let (relative, absolute) = parent_names(path, parent)?;
    let mut keys = vec![(RELATIVE_PATH, relative), (ABSOLUTE_WIN32_PATH, absolute)];
    let linkages = [PARENT_LINKAGE, PARENT_LINKAGE2].into_iter().zip(accepted);
    keys.extend(linkages.map(|(key, id)| (key, braced(*id))));
    Ok(Locator(keys.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()))
}

/// How the parent is named in a child at `path`, as Windows writes it: from the child's directory,
/// and as an absolute path. The latter leads nowhere on Windows, where there is no root of all
/// paths, but some programs insist on one for the file name in it.
fn parent_names(path: &Path, parent: &Path) -> Result<(String, String)> {
    let (child, parent) = (rooted(path), rooted(parent));
    let relative = backslashed(&way(&child, &parent))?;
    Ok((relative, format!("\\\\?\\C:{}", backslashed(&parent)?)))
}

fn block_size(size: u64) -> Result<u32> {
    if !size.is_power_of_two() || !BLOCK_SIZES.contains(&size) {
        let what = format!("block size {size} is not a power of two from 1 to 256 MiB");
        return Err(Error::invalid(what));
    }
    Ok(size as u32)
}

fn sector(which: &str, size: u32) -> Result<u32> {
    match size {
        512 | 4096 => Ok(size),
        _ => Err(Error::invalid(format!("{which} sector {size} is neither 512 nor 4096"))),
    }
}

impl NewFile {
    fn new(metadata: NewMetadata, spec: &CreateSpec) -> Result<Self> {
        let size = metadata.size;
        if size == 0 || size > MAX_DISK {
            let what = format!("a VHDX disk of {size} bytes is not possible");
            return Err(Error::invalid(what).hint("64 TiB at most"));
        }
        if !size.is_multiple_of(metadata.logical_sector.into()) {
            let what = format!("size {size} is no multiple of the logical sector");
            return Err(Error::invalid(what));
        }
        let log = spec.log_size.unwrap_or(DEFAULT_LOG);
        if log == 0 || !log.is_multiple_of(MIB) || log > u64::from(MAX_LOG) {
            return Err(Error::invalid(format!(
                "log size {log} is no multiple of 1 MiB up to 1 GiB"
            )));
        }
        let has_parent = metadata.flags & RawFileParameters::HAS_PARENT != 0;
        let layout =
            BatLayout::new(size, metadata.block_size.into(), metadata.logical_sector, has_parent);
        let fixed = metadata.flags & RawFileParameters::LEAVE_BLOCKS_ALLOCATED != 0;
        if !fixed && spec.preallocation != Preallocation::Off {
            return Err(Error::invalid("a dynamic disk grows as it is filled")
                .hint("only fixed and flat disks are allocated beforehand"));
        }
        Ok(Self { metadata, layout, log, fixed, preallocation: spec.preallocation })
    }

    fn write(&self, host: &dyn Host, path: &Path) -> Result<()> {
        let log_at = MIB;
        let metadata = Region {
            guid: METADATA_REGION,
            offset: log_at + self.log,
            length: MIB,
            required: true,
        };
        let bat = Region {
            guid: BAT_REGION,
            offset: metadata.range().end,
            length: self.layout.region_length(),
            required: true,
        };
        let data_at = bat.range().end;
        let stored = if self.fixed { self.layout.blocks * self.layout.block_size } else { 0 };

        let file = host.create(path)?;
        let file = &*file;
        preallocate(file, data_at..data_at + stored, self.preallocation)?;
        write_all(file, metadata.offset, &self.metadata.encode(), "metadata")?;
        if self.fixed {
            self.write_bat(file, &bat, data_at)?;
        }
        let table = regions::encode(&[bat, metadata]);
        for at in REGION_TABLE_OFFSETS {
            write_all(file, at, &table, "region table")?;
        }
        let mut header = Header {
            sequence: 0,
            file_write: Uuid::new_v4(),
            data_write: Uuid::new_v4(),
            log: Uuid::nil(),
            log_version: 0,
            version: 1,
            log_length: self.log as u32,
            log_offset: log_at,
        };
        for at in HEADER_OFFSETS {
            write_all(file, at, &header.encode(), "header")?;
            header.sequence += 1;
        }
        sync_file(file)?;
        let creator = to_utf16(concat!("flatdisk ", env!("CARGO_PKG_VERSION")), false);
        write_all(file, 0, &[&FILE_SIGNATURE[..], &creator].concat(), "file type identifier")?;
        sync_file(file)?;
        host.sync_dir(path.parent().unwrap_or(Path::new("")))
    }

    /// Writes the table of a disk whose blocks are all present, in order from `data_at`.
    fn write_bat(&self, file: &dyn Storage, bat: &Region, data_at: u64) -> Result<()> {
        let mut page = vec![0; LOG_SECTOR as usize];
        let mut block = 0;
        let mut number = 0;
        while block < self.layout.blocks {
            page.fill(0);
            while block < self.layout.blocks
                && self.layout.block_entry(block) / ENTRIES_PER_PAGE == number
            {
                let entry = Entry::present(data_at + block * self.layout.block_size);
                entry.put(&mut page, self.layout.block_entry(block) % ENTRIES_PER_PAGE);
                block += 1;
            }
            write_all(file, bat.offset + number * LOG_SECTOR, &page, "BAT")?;
            number += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::storage::memory::MemoryHost;

    fn made(spec: &CreateSpec) -> Result<Vec<u8>> {
        let host = MemoryHost::new();
        create(&*host, Path::new("/x.vhdx"), spec)?;
        Ok(host.file(Path::new("/x.vhdx")).unwrap().to_vec())
    }

    fn spec(size: u64) -> CreateSpec {
        CreateSpec { size, ..CreateSpec::default() }
    }

    #[test]
    fn what_the_format_cannot_hold_is_refused_before_a_file_is_made() {
        let cases = [
            spec((64 << 40) + 512),
            CreateSpec { block_size: Some(3 * MIB), ..spec(MIB) },
            CreateSpec { block_size: Some(MIB / 2), ..spec(MIB) },
            CreateSpec { block_size: Some(512 * MIB), ..spec(MIB) },
            CreateSpec { logical_sector: Some(1024), ..spec(MIB) },
            CreateSpec { physical_sector: Some(8192), ..spec(MIB) },
            CreateSpec { logical_sector: Some(4096), ..spec(MIB + 512) },
            CreateSpec { log_size: Some(0), ..spec(MIB) },
            CreateSpec { log_size: Some(MIB + 4096), ..spec(MIB) },
            CreateSpec { log_size: Some(2 << 30), ..spec(MIB) },
        ];
        for case in cases {
            let host = MemoryHost::new();
            let e = create(&*host, Path::new("/x.vhdx"), &case).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidInput, "{case:?}");
            assert!(host.files().is_empty(), "{case:?}");
        }
    }

    #[test]
    fn sizes_of_the_file_follow_from_the_options() {
        assert_eq!(made(&spec(MIB)).unwrap().len() as u64, 4 * MIB);
        let log = CreateSpec { log_size: Some(4 * MIB), ..spec(MIB) };
        assert_eq!(made(&log).unwrap().len() as u64, 7 * MIB);
        let fixed = CreateSpec { subformat: Some("fixed".to_owned()), ..spec(5 * MIB) };
        assert_eq!(made(&fixed).unwrap().len() as u64, 10 * MIB);
    }

    #[test]
    fn large_disks_get_large_blocks() {
        let block_size = |size| {
            let bytes = made(&spec(size)).unwrap();
            let at = 2 * MIB as usize + (64 << 10);
            u64::from(u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()))
        };
        assert_eq!((block_size(1 << 40), block_size((1 << 40) + 512)), (2 * MIB, 32 * MIB));
    }

    #[test]
    fn a_parent_is_named_from_the_directory_of_the_child() {
        let names = |child, parent| parent_names(Path::new(child), Path::new(parent)).unwrap();
        assert_eq!(
            names("/a/b/x.vhdx", "/a/b/y.vhdx"),
            (".\\y.vhdx".to_owned(), "\\\\?\\C:\\a\\b\\y.vhdx".to_owned())
        );
        assert_eq!(names("/a/b/x.vhdx", "/a/c/y.vhdx").0, "..\\c\\y.vhdx");
        assert_eq!(names("/x.vhdx", "/a/y.vhdx").0, ".\\a\\y.vhdx");
        assert_eq!(names("/a/b/x.vhdx", "/y.vhdx").0, "..\\..\\y.vhdx");
        let e = parent_names(Path::new("/x"), Path::new("/a\\b")).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidInput);
    }
}
