//! A part of a disk as a disk of its own: a partition.
//!
//! A [`Window`] answers what a [`Disk`] answers, with offsets from its own start, and reaches nothing
//! outside its range. It holds the disk by whatever leads to it, a reference or an `Arc`, and keeps no
//! state: any number of windows, overlapping too, may be in use at once.

use std::ops::{Deref, Range};

use super::Disk;
use super::map::DiskRange;
use crate::error::{Error, ErrorKind, Result};

/// Bytes `range` of a disk.
#[derive(Debug, Clone)]
pub struct Window<D> {
    disk: D,
    range: DiskRange,
}

impl Disk {
    /// The part `range` of the disk, in bytes, which may begin and end anywhere. [`Window::new`] makes one
    /// that owns an `Arc` of the disk.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OutOfRange`] if the range does not lie inside the disk.
    pub fn slice(&self, range: DiskRange) -> Result<Window<&Self>> {
        Window::new(self, range)
    }
}

impl<D: Deref<Target = Disk>> Window<D> {
    /// The part `range` of `disk`, in bytes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OutOfRange`] if the range does not lie inside the disk.
    pub fn new(disk: D, range: DiskRange) -> Result<Self> {
        disk.check_range(range.start, range.end.saturating_sub(range.start))?;
        let end = range.end.max(range.start);
        Ok(Self { disk, range: range.start..end })
    }

    /// All of `disk`.
    pub fn whole(disk: D) -> Self {
        let range = 0..disk.size();
        Self { disk, range }
    }

    /// The disk that this is a part of.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Which part of the disk this is, in bytes.
    pub fn range(&self) -> DiskRange {
        self.range.clone()
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Where `len` bytes at `offset` of the window are on the disk, if they lie inside the window.
    fn place(&self, offset: u64, len: u64) -> Result<u64> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size() => Ok(self.range.start + offset),
            _ => Err(Error::new(
                ErrorKind::OutOfRange,
                format!(
                    "{len} bytes at {offset:#x} lie outside the part of {:#x} bytes",
                    self.size()
                ),
            )),
        }
    }

    /// See [`Disk::read_at`].
    ///
    /// # Errors
    ///
    /// Those of the disk's function, with the part's end as that of the disk.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.disk.read_at(self.place(offset, buf.len() as u64)?, buf)
    }

    /// See [`Disk::write_at`].
    ///
    /// # Errors
    ///
    /// Those of the disk's function, with the part's end as that of the disk.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.disk.write_at(self.place(offset, data.len() as u64)?, data)
    }

    /// See [`Disk::discard`].
    ///
    /// # Errors
    ///
    /// Those of the disk's function, with the part's end as that of the disk.
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.disk.discard(self.place(offset, len)?, len)
    }

    /// See [`Disk::flush`]. Covers the whole disk.
    ///
    /// # Errors
    ///
    /// Those of the disk's function, with the part's end as that of the disk.
    pub fn flush(&self) -> Result<()> {
        self.disk.flush()
    }

    /// See [`Disk::next_data`].
    ///
    /// # Errors
    ///
    /// Those of the disk's function, with the part's end as that of the disk.
    pub fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        if from >= self.size() {
            return Ok(None);
        }
        let start = self.range.start;
        let data = self.disk.next_data_in(start + from..self.range.end)?;
        Ok(data.map(|data| data.start - start..data.end - start))
    }

    /// See [`Disk::next_hole`].
    ///
    /// # Errors
    ///
    /// Those of the disk's function, with the part's end as that of the disk.
    pub fn next_hole(&self, from: u64) -> Result<u64> {
        let start = self.range.start;
        let hole = self.disk.next_hole_in(start.saturating_add(from)..self.range.end)?;
        Ok(hole - start)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::disk::flat::raw;
    use crate::storage::memory::MemoryFile;

    fn flat(size: usize) -> Disk {
        raw(MemoryFile::new("/d", &vec![0; size]), 512).unwrap()
    }

    #[test]
    fn a_window_reads_writes_and_discards_inside_its_range_only() {
        let disk = flat(64 << 10);
        disk.write_at(0, &[1; 64 << 10]).unwrap();
        let window = disk.slice(4096..12288).unwrap();
        assert_eq!((window.size(), window.range()), (8192, 4096..12288));
        window.write_at(8190, &[2; 2]).unwrap();
        window.discard(0, 4096).unwrap();
        let mut bytes = vec![0; 64 << 10];
        disk.read_at(0, &mut bytes).unwrap();
        let expected = |at| match at {
            4096..8192 => 0,
            12286..12288 => 2,
            _ => 1,
        };
        assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == expected(at)));
        let outside = |e: Result<()>| assert_eq!(e.unwrap_err().kind(), ErrorKind::OutOfRange);
        outside(window.read_at(8191, &mut [0; 2]));
        outside(window.read_at(u64::MAX, &mut [0; 2]));
        outside(window.write_at(8192, &[0]));
        outside(window.discard(1, 8192));
        outside(disk.slice(1..disk.size() + 1).map(drop));
        assert!(window.read_at(8192, &mut []).is_ok());
    }

    #[test]
    fn data_and_holes_are_those_of_the_range() {
        let disk = Arc::new(flat(1 << 20));
        disk.discard(0, 1 << 20).unwrap();
        disk.write_at(0, &[1; 8192]).unwrap();
        disk.write_at(512 << 10, &[1; 8192]).unwrap();
        let window = Window::new(disk, 4096..(512 << 10) + 4096).unwrap();
        assert_eq!(window.next_data(0).unwrap(), Some(0..4096));
        assert_eq!(window.next_hole(0).unwrap(), 4096);
        assert_eq!(window.next_data(4096).unwrap(), Some(508 << 10..512 << 10));
        assert_eq!(window.next_hole(508 << 10).unwrap(), window.size());
        assert_eq!(window.next_data(window.size()).unwrap(), None);
    }
}
