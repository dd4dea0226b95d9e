//! One file as a disk, byte for byte: a raw disk.

use std::sync::Arc;

use super::Disk;
use super::map::{BlockMap, DiskRange, ExtentList, Geometry, Source};
use crate::error::{Error, Result};
use crate::storage::Storage;

#[derive(Debug)]
struct Flat {
    files: [Arc<dyn Storage>; 1],
    geometry: Geometry,
}

/// The disk that `file` is: as long as the file, less a last part of a sector, with sectors of
/// `logical_sector` bytes. It can be written if the file can.
pub fn raw(file: Arc<dyn Storage>, logical_sector: u32) -> Result<Disk> {
    let len = file.len().map_err(|e| Error::io("asking for the size", &e).in_file(file.path()))?;
    let size = len / Geometry::SECTOR * Geometry::SECTOR;
    let read_only = (!file.writable()).then(|| "the file is open for reading".to_owned());
    let block_size = size.max(Geometry::SECTOR);
    let geometry = Geometry { size, logical_sector, physical_sector: logical_sector, block_size };
    Ok(Disk::new(Box::new(Flat { files: [file], geometry }), None, read_only))
}

impl BlockMap for Flat {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn files(&self) -> &[Arc<dyn Storage>] {
        &self.files
    }

    fn fixed(&self) -> bool {
        true
    }

    fn lookup(&self, want: DiskRange, out: &mut ExtentList) -> Result<()> {
        out.push(want.start, want.end - want.start, Source::File { file: 0, at: want.start });
        Ok(())
    }
}
