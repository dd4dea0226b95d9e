//! A disk and its files cut into cells of equal length, to be drawn: what is where, and in which order.

use super::Disk;
use super::layers::{self, Content, Run};
use crate::error::{Error, Result};

/// Bytes that a cell has at least where the disk is not divided into blocks.
const FINEST: u64 = 4096;

/// What lies in a part of the disk, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cell {
    /// Stored in the image itself.
    pub data: u64,
    /// Stored in a parent.
    pub parent: u64,
    /// Zeroes, as the image or a parent says.
    pub zero: u64,
    /// Nothing anywhere.
    pub absent: u64,
    /// Lost, or in a parent that is missing.
    pub damaged: u64,
}

/// What lies in a part of the image's files, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FileCell {
    /// Bytes of the disk, stored as they are.
    pub data: u64,
    /// Bytes that the host stores: data, tables, and what is free.
    pub stored: u64,
    /// Place on the disk of the data, in the middle.
    pub from: u64,
}

/// An image as two rows of cells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Bytes of the disk in a cell; in the last one there may be fewer.
    pub cell: u64,
    /// The disk, in the guest's order.
    pub disk: Vec<Cell>,
    /// Bytes of the files in a cell.
    pub file_cell: u64,
    /// The image's own files, one behind the other.
    pub files: Vec<FileCell>,
    /// Bytes in the files.
    pub file_len: u64,
}

impl Picture {
    /// The picture of `disk` in at most `most` cells a row, which is not 0.
    ///
    /// # Errors
    /// What looking up fails with, and the host's answers about its files.
    pub fn of(disk: &Disk, most: u64) -> Result<Self> {
        let block = disk.geometry().block_size;
        let unit = if block < disk.size() { block.max(FINEST) } else { FINEST };
        let cell = length(disk.size(), most, unit);
        let (mut starts, mut file_len) = (Vec::new(), 0_u64);
        for file in disk.map.files() {
            let failed = |e| Error::io("asking for the size", &e).in_file(file.path());
            starts.push(file_len);
            file_len = file_len.saturating_add(file.len().map_err(failed)?);
        }
        let file_cell = length(file_len, most, FINEST);
        let mut picture = Self {
            cell,
            disk: vec![Cell::default(); disk.size().div_ceil(cell) as usize],
            file_cell,
            files: vec![FileCell::default(); file_len.div_ceil(file_cell) as usize],
            file_len,
        };
        layers::runs_by_place(disk, usize::MAX, |run| {
            picture.add(&run, &starts);
            Ok(())
        })?;
        picture.add_stored(disk, &starts)?;
        Ok(picture)
    }

    fn add(&mut self, run: &Run, starts: &[u64]) {
        parts(run.start, run.len, self.cell, |index, _, len| {
            let Some(cell) = self.disk.get_mut(index) else { return };
            let place = match run.content {
                Content::Data if run.layer == 0 => &mut cell.data,
                Content::Data => &mut cell.parent,
                Content::Zero => &mut cell.zero,
                Content::Unallocated => &mut cell.absent,
                Content::Damaged => &mut cell.damaged,
            };
            *place += len;
        });
        let Some(place) = run.place.filter(|_| run.layer == 0) else { return };
        let Some(start) = starts.get(place.file).and_then(|start| start.checked_add(place.at))
        else {
            return;
        };
        parts(start, run.len, self.file_cell, |index, at, len| {
            let Some(cell) = self.files.get_mut(index) else { return };
            let middle = u128::from(run.start + (at - start) + len / 2);
            let (old, new) = (u128::from(cell.data), u128::from(len));
            // At most the larger of both.
            cell.from = ((u128::from(cell.from) * old + middle * new) / (old + new)) as u64;
            cell.data += len;
        });
    }

    /// Adds what the host stores of the files.
    fn add_stored(&mut self, disk: &Disk, starts: &[u64]) -> Result<()> {
        for (file, start) in disk.map.files().iter().zip(starts) {
            let mut at = 0;
            let failed = |e| Error::io("looking for data", &e).in_file(file.path());
            while let Some(found) = file.next_data(at).map_err(failed)? {
                parts(
                    start + found.start,
                    found.end - found.start,
                    self.file_cell,
                    |index, _, len| {
                        if let Some(cell) = self.files.get_mut(index) {
                            cell.stored += len;
                        }
                    },
                );
                at = found.end;
            }
        }
        Ok(())
    }
}

/// Bytes in a cell, a multiple of `unit`, so that `len` bytes make at most `most` cells.
fn length(len: u64, most: u64, unit: u64) -> u64 {
    len.div_ceil(most).div_ceil(unit).max(1).saturating_mul(unit)
}

/// Calls `found` with number, first byte and length of each part of a run that lies in one cell.
fn parts(start: u64, len: u64, cell: u64, mut found: impl FnMut(usize, u64, u64)) {
    let end = start.saturating_add(len);
    let mut at = start;
    while at < end {
        let index = at / cell;
        let next = end.min((index + 1).saturating_mul(cell));
        found(index as usize, at, next - at);
        at = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_length_makes_more_cells_than_asked_for() {
        for (len, most, unit) in [(1, 16, 4096), (u64::MAX, 16, 4096), (17 << 20, 16, 1 << 20)] {
            assert!(len.div_ceil(length(len, most, unit)) <= most);
        }
    }
}
