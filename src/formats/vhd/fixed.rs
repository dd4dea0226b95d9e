//! The fixed disk: raw data, then the footer.

use std::sync::Arc;

use super::footers::{CopyState, Footers};
use super::layout::SECTOR;
use crate::codec;
use crate::disk::map::{self, BlockMap, DiskRange, ExtentList, Geometry, Source};
use crate::disk::sync_file;
use crate::error::{Error, Result};
use crate::storage::Storage;

/// The mapping of a fixed disk: byte `n` of the disk is byte `n` of the file.
#[derive(Debug)]
pub(super) struct FixedMap {
    files: [Arc<dyn Storage>; 1],
    geometry: Geometry,
    /// Bytes of the disk that the file holds, whole sectors.
    present: u64,
    footers: Footers,
}

impl FixedMap {
    /// Maps the disk. A file without any data is refused: nothing of the disk is there.
    pub(super) fn new(file: Arc<dyn Storage>, footers: Footers) -> Result<Self> {
        let size = footers.footer.size();
        let present = size.min(footers.data_end / SECTOR * SECTOR);
        if present == 0 && size > 0 {
            return Err(Error::corrupt(format!(
                "the footer of a fixed disk of {size} bytes, without the data"
            )));
        }
        let geometry = Geometry {
            size,
            logical_sector: SECTOR as u32,
            physical_sector: SECTOR as u32,
            block_size: size.max(SECTOR),
        };
        Ok(Self { files: [file], geometry, present, footers })
    }

    /// The part of the disk that the file is too short for.
    pub(super) fn missing(&self) -> Option<DiskRange> {
        (self.present < self.geometry.size).then_some(self.present..self.geometry.size)
    }
}

impl BlockMap for FixedMap {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn files(&self) -> &[Arc<dyn Storage>] {
        &self.files
    }

    fn lookup(&self, want: DiskRange, out: &mut ExtentList) -> Result<()> {
        let here = want.end.min(self.present).max(want.start);
        if here > want.start {
            out.push(want.start, here - want.start, Source::File { file: 0, at: want.start });
        }
        if want.end > here {
            out.push(here, want.end - here, Source::Bad);
        }
        Ok(())
    }

    fn fixed(&self) -> bool {
        true
    }

    fn begin_writes(&self) -> Result<()> {
        let (file, at) = (&self.files[0], self.footers.data_end);
        // The one byte that the short form lacks is zero, and so is what extending adds.
        if self.footers.trailing == CopyState::Short {
            file.set_len(at + SECTOR)
                .map_err(|e| Error::io("completing the footer", &e).in_file(file.path()).at(at))?;
        }
        if self.footers.renewed {
            codec::write_all(&**file, at, self.footers.bytes(), "the footer")?;
            sync_file(&**file)?;
        }
        Ok(())
    }

    fn unmap(&self, want: DiskRange, _rest: &mut Vec<DiskRange>) -> Result<()> {
        map::punch(&*self.files[0], want)
    }
}
