//! Free space of one extent file while it is being written.
//!
//! All places are sectors of the file. Space is free, in use, or *pending*: freed in memory while
//! the tables on disk may still lead to it. The caller keeps pending space to itself until a flush
//! made the tables durable, and only then gives it back with [`Space::release`].

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;

use super::layout::SECTOR;

/// Extent files stay below this many sectors: a table entry has 32 bits.
const MAX_SECTORS: u64 = 1 << 32;
/// Steps in which a file grows, in sectors.
const FIRST_STEP: u64 = (1 << 20) / SECTOR;
const LAST_STEP: u64 = (64 << 20) / SECTOR;

/// A run of free sectors up to `end`.
#[derive(Debug, Clone, Copy)]
struct Free {
    end: u64,
    zeroed: bool,
}

/// Space handed out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Sectors of the file.
    pub place: Range<u64>,
    /// It reads as zeroes.
    pub zeroed: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Space {
    /// Free runs below `next`, by first sector.
    free: BTreeMap<u64, Free>,
    /// First sector that was never used; everything from here to `len` was added by this open and
    /// reads as zeroes.
    next: u64,
    /// Length of the file, in sectors.
    len: u64,
    step: u64,
}

impl Space {
    /// The space of a file of `len` sectors; new grains go behind its end, and not before sector
    /// `first`.
    pub fn new(len: u64, first: u64) -> Self {
        Self { free: BTreeMap::new(), next: len.max(first.min(MAX_SECTORS)), len, step: FIRST_STEP }
    }

    /// Takes up to `wanted` sectors in one run, a multiple of `unit` and at least one unit, aligned
    /// to it. `file_len` is told how long the file became.
    pub fn take(
        &mut self,
        wanted: u64,
        unit: u64,
        file: &dyn Storage,
        file_len: &AtomicU64,
    ) -> Result<Run> {
        let fits = |(start, run): &(&u64, &Free)| run.end - **start >= unit;
        if let Some((&start, &run)) = self.free.iter().find(fits) {
            self.free.remove(&start);
            let end = start + (run.end - start).min(wanted) / unit * unit;
            if end < run.end {
                self.free.insert(end, run);
            }
            return Ok(Run { place: start..end, zeroed: run.zeroed });
        }
        let place = self.take_new(wanted, unit, file, file_len)?;
        Ok(Run { place, zeroed: true })
    }

    /// As [`Self::take`], from space that no image ever used, which reads as zeroes, and goes on
    /// doing so after a crash.
    pub fn take_new(
        &mut self,
        wanted: u64,
        unit: u64,
        file: &dyn Storage,
        file_len: &AtomicU64,
    ) -> Result<Range<u64>> {
        let start = self.next.next_multiple_of(unit);
        let room = MAX_SECTORS.saturating_sub(start + 1) / unit * unit;
        let end = start + wanted.min(room);
        if room < unit {
            let what = "the extent is full: grain tables reach no further than 2 TiB";
            return Err(Error::new(ErrorKind::NoSpace, what).in_file(file.path()));
        }
        if end > self.len {
            self.grow(end, file)?;
            file_len.store(self.len * SECTOR, Ordering::Release);
        }
        self.next = end;
        Ok(start..end)
    }

    /// First sector that was never used.
    pub fn unused_from(&self) -> u64 {
        self.next
    }

    fn grow(&mut self, needed: u64, file: &dyn Storage) -> Result<()> {
        let generous = needed.max(self.len + self.step).min(MAX_SECTORS - 1);
        // A host limit may lie between what is needed and what would be convenient.
        for len in [generous, needed] {
            match file.set_len(len * SECTOR) {
                Ok(()) => {
                    self.len = len;
                    self.step = (self.step * 2).min(LAST_STEP);
                    return Ok(());
                }
                Err(e) if len == needed => {
                    return Err(Error::io("extend", &e).in_file(file.path()).at(len * SECTOR));
                }
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// Gives space back. `zeroed` promises that it reads as zeroes.
    pub fn release(&mut self, place: Range<u64>, zeroed: bool) {
        let (mut start, mut end) = (place.start, place.end);
        if let Some((&before, run)) = self.free.range(..start).next_back()
            && run.end == start
            && run.zeroed == zeroed
        {
            start = before;
        }
        if let Some(run) = self.free.get(&end).copied()
            && run.zeroed == zeroed
        {
            self.free.remove(&end);
            end = run.end;
        }
        self.free.insert(start, Free { end, zeroed });
    }

    /// The length the file needs, in sectors, once unused space at its end is dropped.
    pub fn trimmed(&mut self) -> u64 {
        while let Some((&start, run)) = self.free.last_key_value()
            && run.end == self.next
        {
            self.next = start;
            self.free.remove(&start);
        }
        self.next
    }

    /// Length of the file, in sectors.
    pub fn len(&self) -> u64 {
        self.len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_first_sector_beyond_every_grain_leaves_no_space() {
        let file = MemoryFile::new("x", &[0; 512]);
        for first in [MAX_SECTORS, u64::MAX] {
            let taken = Space::new(1, first).take(128, 128, &*file, &AtomicU64::new(512));
            assert_eq!(taken.unwrap_err().kind(), ErrorKind::NoSpace);
        }
    }
    use crate::storage::memory::MemoryFile;

    fn take(space: &mut Space, wanted: u64, file: &MemoryFile) -> (Range<u64>, bool) {
        let run = space.take(wanted, 8, file, &AtomicU64::new(0)).unwrap();
        (run.place, run.zeroed)
    }

    #[test]
    fn new_space_follows_the_end_aligned_and_zeroed() {
        let file = MemoryFile::new("x", &[1; 512 * 21]);
        let mut space = Space::new(21, 0);
        assert_eq!(take(&mut space, 16, &file), (24..40, true));
        assert_eq!(take(&mut space, 8, &file), (40..48, true));
        assert_eq!(file.len().unwrap(), (21 + FIRST_STEP) * SECTOR);
        assert_eq!((space.len(), space.trimmed()), (21 + FIRST_STEP, 48));
    }

    #[test]
    fn released_space_is_merged_and_used_first() {
        let file = MemoryFile::new("x", &[]);
        let mut space = Space::new(64, 0);
        space.release(8..16, false);
        space.release(24..32, false);
        space.release(16..24, false);
        space.release(32..40, true);
        assert_eq!(take(&mut space, 8, &file), (8..16, false));
        assert_eq!(take(&mut space, 80, &file), (16..32, false));
        assert_eq!(take(&mut space, 80, &file), (32..40, true));
        assert_eq!(take(&mut space, 8, &file), (64..72, true));
    }

    #[test]
    fn runs_too_short_for_a_unit_are_left_alone() {
        let file = MemoryFile::new("x", &[]);
        let mut space = Space::new(64, 0);
        space.release(5..12, true);
        space.release(20..39, true);
        assert_eq!(take(&mut space, 80, &file), (20..36, true));
        assert_eq!(take(&mut space, 8, &file), (64..72, true));
    }

    #[test]
    fn free_space_at_the_end_is_trimmed() {
        let mut space = Space::new(64, 0);
        space.release(56..64, false);
        space.release(48..56, true);
        space.release(8..16, true);
        assert_eq!(space.trimmed(), 48);
    }

    #[test]
    fn an_extent_ends_where_entries_end() {
        let file = MemoryFile::new("x", &[]);
        let mut space = Space::new(MAX_SECTORS - 24, 0);
        assert_eq!(take(&mut space, 64, &file).0, MAX_SECTORS - 24..MAX_SECTORS - 8);
        let error = space.take(8, 8, &*file, &AtomicU64::new(0)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
    }
}
