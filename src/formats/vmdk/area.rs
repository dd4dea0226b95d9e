//! Changing a descriptor that is embedded in a sparse file.
//!
//! It is several sectors, so it is not overwritten. The new one goes to the end of the descriptor's
//! area, and the header, one sector, leads to the old or the new. Then, the same way, it moves to the
//! front, where other programs look.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::storage::Storage;

use super::layout::{FLAG_COMPRESSED, Header, SECTOR};

/// Byte of the sparse header where the descriptor's first sector and number of sectors stand.
const DESCRIPTOR_PLACE: usize = 28;

/// The part of a sparse file that belongs to its descriptor. All numbers are sectors.
pub struct Area {
    /// All of it.
    all: Range<u64>,
    /// What the present text takes.
    used: Range<u64>,
}

/// A stage of a change, to be durable before the next one begins.
pub enum Stage {
    /// This text is written at the beginning of these sectors, zeroes behind it.
    Place(Vec<u8>, Range<u64>),
    /// The header leads to a descriptor in these sectors.
    LeadTo(Range<u64>),
}

impl Stage {
    /// The bytes of `sectors` that hold `text`.
    pub fn padded(text: &[u8], sectors: &Range<u64>) -> Vec<u8> {
        let mut bytes = text.to_vec();
        bytes.resize(((sectors.end - sectors.start) * SECTOR) as usize, 0);
        bytes
    }

    /// Makes a header lead to a descriptor in `sectors`.
    pub fn lead(header: &mut [u8; SECTOR as usize], sectors: &Range<u64>) {
        let place = [sectors.start, sectors.end - sectors.start].map(u64::to_le_bytes).concat();
        header[DESCRIPTOR_PLACE..DESCRIPTOR_PLACE + place.len()].copy_from_slice(&place);
    }
}

impl Area {
    /// The area of a file whose present descriptor has `text` bytes.
    pub fn read(file: &dyn Storage, text: usize) -> Result<Self> {
        let header = Header::read(file, 0)?;
        if header.flags & FLAG_COMPRESSED != 0 {
            return Err(Error::unsupported("a stream-optimised image cannot be changed"));
        }
        let tables = [header.rgd, header.gd, header.overhead].into_iter().filter(|at| *at > 0);
        let end =
            (header.descriptor_at + header.descriptor_len).min(tables.min().unwrap_or(u64::MAX));
        let len = (text as u64).div_ceil(SECTOR);
        Ok(Self { all: 1..end, used: header.descriptor_at..header.descriptor_at + len })
    }

    /// The stages that replace the present text by `text`.
    pub fn change(&self, text: &[u8]) -> Result<Vec<Stage>> {
        let len = (text.len() as u64).div_ceil(SECTOR);
        let mut used = self.used.clone();
        let mut stages = Vec::new();
        if used.start < 1 + len {
            let start = self.all.end.saturating_sub(len);
            if start < used.end.max(1 + len) {
                let what = "the descriptor has no room to be changed without risk";
                return Err(Error::unsupported(what));
            }
            used = start..self.all.end;
            stages.push(Stage::Place(text.to_vec(), used.clone()));
            stages.push(Stage::LeadTo(used.clone()));
        }
        stages.push(Stage::Place(text.to_vec(), 1..used.start));
        stages.push(Stage::LeadTo(self.all.clone()));
        stages.push(Stage::Place(Vec::new(), used));
        Ok(stages)
    }
}
