//! Which parts of the file are in use, in units of 1 MiB.
//!
//! The format has no list of free space: it is what no structure names. [`Space`] is built by
//! marking everything that is named, which also finds what is named twice. New space comes from a
//! hole among the used units if one is large enough, else from the end of the file. Only space from beyond any end that the file ever had in this session is known to be
//! zero.

use std::ops::Range;

use super::layout::{MAX_FILE, MIB};
use crate::error::{Error, ErrorKind, Result};

/// Space handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocation {
    /// Byte offset in the file, a multiple of 1 MiB.
    pub at: u64,
    /// It reads as zeroes.
    pub zeroed: bool,
}

/// The units of a file.
#[derive(Debug, Clone)]
pub struct Space {
    /// A bit per unit, set when in use.
    used: Vec<u64>,
    /// Units below which space was or may have been in use; above, the file is a hole.
    end: u64,
    /// Bytes the file has.
    file_len: u64,
    /// Units below `end` that are free.
    free: u64,
    /// No run of this many free units exists below `end`.
    no_run_of: u64,
}

impl Space {
    /// The space of a file of `file_len` bytes, all of it free but the header section.
    pub fn new(file_len: u64) -> Self {
        let end = file_len.div_ceil(MIB).max(1);
        let mut space = Self { used: Vec::new(), end, file_len, free: end, no_run_of: u64::MAX };
        space.mark(0..MIB);
        space
    }

    /// Bytes the file has.
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    fn is_used(&self, unit: u64) -> bool {
        self.used.get((unit / 64) as usize).is_some_and(|word| word >> (unit % 64) & 1 == 1)
    }

    fn set(&mut self, unit: u64, used: bool) {
        let word = (unit / 64) as usize;
        if word >= self.used.len() {
            self.used.resize(word + 1, 0);
        }
        let bit = 1 << (unit % 64);
        if used { self.used[word] |= bit } else { self.used[word] &= !bit }
    }

    /// Marks bytes of the file as used, rounded out to units. Returns whether all of it was free.
    /// Only space below [`MAX_FILE`] may be marked.
    pub fn mark(&mut self, range: Range<u64>) -> bool {
        debug_assert!(range.end <= MAX_FILE);
        let mut fresh = true;
        for unit in range.start / MIB..range.end.div_ceil(MIB) {
            if self.is_used(unit) {
                fresh = false;
                continue;
            }
            self.set(unit, true);
            if unit >= self.end {
                self.free += unit - self.end;
                self.end = unit + 1;
            } else {
                self.free -= 1;
            }
        }
        fresh
    }

    /// Marks everything that `other` has marked.
    pub fn merge(&mut self, other: &Self) {
        for (word, _) in other.used.iter().enumerate().filter(|(_, word)| **word != 0) {
            for unit in word as u64 * 64..word as u64 * 64 + 64 {
                if other.is_used(unit) {
                    self.mark(unit * MIB..(unit + 1) * MIB);
                }
            }
        }
    }

    /// Takes back bytes that were handed out or marked.
    pub fn release(&mut self, range: Range<u64>) {
        for unit in range.start / MIB..range.end.div_ceil(MIB) {
            if self.is_used(unit) {
                self.set(unit, false);
                self.free += 1;
            }
        }
        self.no_run_of = u64::MAX;
    }

    /// Hands out `len` bytes, a multiple of 1 MiB, in one piece. The file is not extended: until it is,
    /// they may lie past its end.
    pub fn reserve(&mut self, len: u64) -> Result<Allocation> {
        let found = self.find(len)?;
        self.mark(found.at..found.at + len);
        Ok(found)
    }

    fn find(&mut self, len: u64) -> Result<Allocation> {
        let units = len / MIB;
        let (first, zeroed) = match self.find_run(units) {
            Some(first) => (first, false),
            None => (self.end, true),
        };
        if (first + units) * MIB > MAX_FILE {
            return Err(Error::new(ErrorKind::NoSpace, "the file would become too large"));
        }
        Ok(Allocation { at: first * MIB, zeroed })
    }

    /// The first run of `units` free units below the end.
    fn find_run(&mut self, units: u64) -> Option<u64> {
        if units > self.free || units >= self.no_run_of {
            return None;
        }
        let mut start = 0;
        let mut unit = 0;
        while unit < self.end {
            let word = self.used.get((unit / 64) as usize).copied().unwrap_or(0);
            if unit.is_multiple_of(64) && word == u64::MAX {
                unit += 64;
                start = unit;
            } else if word >> (unit % 64) & 1 == 1 {
                unit += 1;
                start = unit;
            } else {
                unit += 1;
                if unit - start == units {
                    return Some(start);
                }
            }
        }
        self.no_run_of = units;
        None
    }

    /// Whether nothing uses any of a range of bytes inside the file.
    pub fn is_free(&self, range: &Range<u64>) -> bool {
        range.end <= self.file_len
            && (range.start / MIB..range.end.div_ceil(MIB)).all(|unit| !self.is_used(unit))
    }

    /// One past the last byte in use.
    pub fn used_end(&self) -> u64 {
        let last = self.used.iter().rposition(|word| *word != 0);
        last.map_or(MIB, |word| {
            (word as u64 * 64 + 64 - u64::from(self.used[word].leading_zeros())) * MIB
        })
    }

    /// Runs of units that nothing uses, below the last one in use, as byte ranges.
    pub fn holes(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let end = self.used_end() / MIB;
        let mut unit = 0;
        std::iter::from_fn(move || {
            let start = (unit..end).find(|unit| !self.is_used(*unit))?;
            unit = (start..end).find(|unit| self.is_used(*unit)).unwrap_or(end);
            Some(start * MIB..unit * MIB)
        })
    }

    /// All of a file of `file_len` bytes that nothing uses: [`Self::holes`] and the end.
    pub fn unused(&self, file_len: u64) -> impl Iterator<Item = Range<u64>> + '_ {
        let tail = self.used_end()..file_len;
        self.holes().chain((!tail.is_empty()).then_some(tail))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_come_first_and_are_not_zero() {
        let mut space = Space::new(10 * MIB);
        assert!(space.mark(MIB..4 * MIB) && space.mark(6 * MIB..10 * MIB));
        assert!(space.holes().eq(std::iter::once(4 * MIB..6 * MIB)));
        let first = space.reserve(2 * MIB).unwrap();
        assert_eq!(first, Allocation { at: 4 * MIB, zeroed: false });
        let second = space.reserve(2 * MIB).unwrap();
        assert_eq!(second, Allocation { at: 10 * MIB, zeroed: true });
        space.release(10 * MIB..12 * MIB);
        let third = space.reserve(MIB).unwrap();
        assert_eq!(third, Allocation { at: 10 * MIB, zeroed: false });
        assert_eq!(space.used_end(), 11 * MIB);
    }

    #[test]
    fn what_is_behind_the_last_used_unit_is_not_taken_for_zero() {
        let mut space = Space::new(20 * MIB);
        assert!(space.mark(MIB..4 * MIB));
        assert!(!space.reserve(16 * MIB).unwrap().zeroed);
        assert!(space.reserve(MIB).unwrap().zeroed);
    }

    #[test]
    fn whatever_is_marked_twice_is_noticed() {
        let mut space = Space::new(10 * MIB);
        assert!(!space.mark(0..MIB));
        assert!(space.mark(3 * MIB..5 * MIB));
        assert!(!space.mark(4 * MIB..6 * MIB));
        assert!(space.mark(30 * MIB..31 * MIB));
        assert_eq!(space.used_end(), 31 * MIB);
    }

    #[test]
    fn random_use_never_hands_out_a_unit_twice() {
        fastrand::seed(5);
        let mut space = Space::new(MIB);
        let mut live: Vec<Range<u64>> = Vec::new();
        for _ in 0..2000 {
            if fastrand::bool() || live.is_empty() {
                let len = fastrand::u64(1..5) * MIB;
                let at = space.reserve(len).unwrap().at;
                let new = at..at + len;
                assert!(live.iter().all(|l| l.end <= new.start || new.end <= l.start));
                assert!(new.start >= MIB);
                live.push(new);
            } else {
                let gone = live.swap_remove(fastrand::usize(..live.len()));
                space.release(gone);
            }
        }
        let free: u64 = space.holes().map(|h| h.end - h.start).sum();
        let used: u64 = live.iter().map(|l| l.end - l.start).sum();
        assert_eq!(used + free + MIB, space.used_end());
    }
}
