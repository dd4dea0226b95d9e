//! Free space of one file of an image that is being written.
//!
//! Space is free, in use, or *freed*: nothing in memory leads to it any more, while tables in the file
//! may. What is freed is with the [`Writer`](super::writer::Writer) until no crash can bring such tables
//! back; here it counts as in use until then.
//!
//! # Invariants
//!
//! 1. What is handed out lies inside the file: it grows first. A file that may not grow as far as would be
//!    convenient grows as far as needed.
//! 2. Space counts as zeroes only if it was gained by extending the file and never handed out, or given back
//!    as zeroes.
//! 3. Memory is bounded by [`MAX_RUNS`]: what is free beyond that stays unused.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::map::Contents;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;

/// Bytes by which a file grows at least and at most, where the host lets it.
const MIN_STEP: u64 = 1 << 20;
const MAX_STEP: u64 = 64 << 20;
/// Most runs of free space that are kept in mind.
const MAX_RUNS: usize = 1 << 20;

/// What is allocated: `len` bytes, of which those behind the first `lead` begin at a multiple of `align`
/// where there is a choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unit {
    /// Bytes.
    pub len: u64,
    /// Bytes, not 0.
    pub align: u64,
    /// Bytes in front of what is aligned.
    pub lead: u64,
}

impl Unit {
    /// `len` bytes at a multiple of `align`.
    pub fn new(len: u64, align: u64) -> Self {
        Self { len, align, lead: 0 }
    }

    /// The first aligned place at or behind byte `from`.
    fn place(&self, from: u64) -> u64 {
        from.saturating_add(self.lead).next_multiple_of(self.align) - self.lead
    }

    /// How many of up to `most` units follow one another directly from an aligned place on.
    fn row(&self, most: u64) -> u64 {
        if self.len.is_multiple_of(self.align) { most } else { most.min(1) }
    }

    /// Where the first of as many units as possible goes in a free run.
    fn fit(&self, run: &Range<u64>) -> Option<u64> {
        let count = |from: u64| run.end.saturating_sub(from) / self.len;
        let aligned = self.place(run.start);
        let at = if count(aligned) == count(run.start) { aligned } else { run.start };
        (count(at) > 0).then_some(at)
    }
}

/// Space handed out, in one piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Bytes of the file.
    pub range: Range<u64>,
    /// What it holds.
    pub contents: Contents,
}

/// How the file's space is made larger.
pub trait Tail: Debug + Send {
    /// The first byte at or behind `end` at which space may end.
    fn round(&self, end: u64) -> u64;

    /// Makes the space of `file`, which ends at byte `from`, end at byte `to`. Returns a byte behind
    /// `from`, or 0, from which on what was gained reads as zeroes. After an error the file is as before.
    ///
    /// # Errors
    ///
    /// Those of the host.
    fn extend(&mut self, file: &dyn Storage, from: u64, to: u64) -> Result<u64>;
}

/// The file ends where its space does, at a multiple of this many bytes.
#[derive(Debug)]
pub struct MultipleOf(pub u64);

impl Tail for MultipleOf {
    fn round(&self, end: u64) -> u64 {
        end.next_multiple_of(self.0)
    }

    fn extend(&mut self, file: &dyn Storage, _from: u64, to: u64) -> Result<u64> {
        let failed = |e| Error::io("extending the file", &e).in_file(file.path()).at(to);
        file.set_len(to).map(|()| 0).map_err(failed)
    }
}

#[derive(Debug, Clone, Copy)]
struct Free {
    end: u64,
    contents: Contents,
}

/// What a format says of the space of a file.
#[derive(Debug)]
pub struct Limits {
    /// No unit ends behind this byte.
    pub end: u64,
    /// Why, for people.
    pub full: &'static str,
    /// Shorter free runs are of no use.
    pub least: u64,
    /// A gap shorter than this, behind a free run, holds nothing: alignment left it.
    pub align: u64,
    /// Below this byte nothing is taken for the unused end of the file.
    pub floor: u64,
}

/// See the module's documentation. All places are bytes of the file.
#[derive(Debug)]
pub struct Space {
    file: Arc<dyn Storage>,
    tail: Box<dyn Tail>,
    limits: Limits,
    /// Free runs below `next`, by their first byte.
    free: BTreeMap<u64, Free>,
    /// No free run is as long as this.
    no_run_of: u64,
    /// Nothing from here on was ever handed out.
    next: u64,
    /// From here on, what was never handed out reads as zeroes.
    zero_from: u64,
    /// Where the space of the file ends.
    len: u64,
    /// The same for those who judge what lies inside the file. Only grows.
    shown_len: Arc<AtomicU64>,
}

impl Space {
    /// The space of `file` from byte `next` on, behind all that is in use; it ends at byte `len`, and the
    /// file itself at `file_len`. How it grows is told to `shown_len`.
    pub fn new(
        file: Arc<dyn Storage>,
        tail: impl Tail + 'static,
        limits: Limits,
        next: u64,
        [len, file_len]: [u64; 2],
        shown_len: &Arc<AtomicU64>,
    ) -> Self {
        Self {
            file,
            tail: Box::new(tail),
            limits,
            free: BTreeMap::new(),
            no_run_of: u64::MAX,
            next,
            zero_from: file_len,
            len,
            shown_len: shown_len.clone(),
        }
    }

    /// Tells those who judge what lies inside the file where its space ends.
    pub fn show_len(&self) {
        self.shown_len.fetch_max(self.len, Ordering::Release);
    }

    /// The file.
    pub fn file(&self) -> &Arc<dyn Storage> {
        &self.file
    }

    /// Where the space of the file ends.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Takes up to `most` units, at least one, in one run.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NoSpace`] where format or host are full.
    pub fn take(&mut self, unit: Unit, most: u64) -> Result<Run> {
        match self.take_free(unit, most) {
            Some(run) => Ok(run),
            None => self.take_next(unit, most),
        }
    }

    /// As [`Self::take`], of space that reads as zeroes and goes on doing so after a crash.
    pub fn take_fresh(&mut self, unit: Unit, most: u64) -> Result<Run> {
        if self.next < self.zero_from {
            let used_before = self.next..self.zero_from;
            self.next = self.zero_from;
            self.release(used_before, Contents::Stale);
        }
        self.take_next(unit, most)
    }

    fn take_free(&mut self, unit: Unit, most: u64) -> Option<Run> {
        if unit.len >= self.no_run_of {
            return None;
        }
        let fit =
            |(start, free): (&u64, &Free)| Some((*start, *free, unit.fit(&(*start..free.end))?));
        let Some((start, free, at)) = self.free.iter().find_map(fit) else {
            self.no_run_of = unit.len;
            return None;
        };
        let count = unit.row(most).min((free.end - at) / unit.len);
        let range = at..at + count * unit.len;
        self.free.remove(&start);
        self.keep(start..range.start, free.contents);
        self.keep(range.end..free.end, free.contents);
        Some(Run { range, contents: free.contents })
    }

    fn take_next(&mut self, unit: Unit, most: u64) -> Result<Run> {
        let at = unit.place(self.next);
        let room = self.limits.end.saturating_sub(at) / unit.len;
        if room == 0 {
            let full = Error::new(ErrorKind::NoSpace, self.limits.full);
            return Err(full.in_file(self.file.path()));
        }
        let mut end = at + unit.row(most).min(room) * unit.len;
        if end > self.len {
            self.grow(end, at + unit.len)?;
            // The host may have room for less.
            end = at + (self.len - at).min(end - at) / unit.len * unit.len;
        }
        let zeroes = at >= self.zero_from;
        self.next = end;
        Ok(Run {
            range: at..end,
            contents: if zeroes { Contents::Zeroes } else { Contents::Stale },
        })
    }

    /// Makes the file longer: by a step, else to `wanted`, else to `needed`.
    fn grow(&mut self, wanted: u64, needed: u64) -> Result<()> {
        let step = self.len.clamp(MIN_STEP, MAX_STEP);
        let roomy = self.len.saturating_add(step).min(self.limits.end).max(wanted);
        let mut result = Ok(0);
        for end in [roomy, wanted, needed] {
            let end = self.tail.round(end);
            result = self.tail.extend(&*self.file, self.len, end);
            if let Ok(zero_from) = result {
                self.zero_from = self.zero_from.max(zero_from);
                self.len = end;
                self.show_len();
                break;
            }
        }
        result.map(drop)
    }

    /// Makes the file as long as what is in use, should it be cut short.
    ///
    /// # Errors
    ///
    /// Those of the host.
    pub fn complete(&mut self) -> Result<()> {
        let end = self.used_end();
        if end > self.len { self.grow(end, end) } else { Ok(()) }
    }

    /// Gives space back that nothing leads to, and that holds `contents`.
    pub fn release(&mut self, range: Range<u64>, contents: Contents) {
        let Range { mut start, mut end } = range;
        if let Some((&before, free)) = self.free.range(..start).next_back()
            && free.end == start
            && free.contents == contents
        {
            start = before;
        }
        if let Some(free) = self.free.get(&end).copied()
            && free.contents == contents
        {
            self.free.remove(&end);
            end = free.end;
        }
        self.keep(start..end, contents);
        self.no_run_of = u64::MAX;
    }

    fn keep(&mut self, range: Range<u64>, contents: Contents) {
        let len = range.end - range.start;
        if len >= self.limits.least.max(1)
            && (self.free.len() < MAX_RUNS || self.free.contains_key(&range.start))
        {
            self.free.insert(range.start, Free { end: range.end, contents });
        }
    }

    /// One past the last byte in use.
    pub fn used_end(&self) -> u64 {
        let mut end = self.next;
        for (&start, free) in self.free.iter().rev() {
            if free.end.saturating_add(self.limits.align) <= end || start < self.limits.floor {
                break;
            }
            end = start;
        }
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryFile;

    const K: u64 = 1024;

    fn space(next: u64, len: u64, end: u64) -> (Arc<MemoryFile>, Space) {
        let file = MemoryFile::new("x", &[]);
        file.set_len(len).unwrap();
        let limits = Limits { end, full: "full", least: 512, align: 1, floor: 0 };
        let shown = Arc::new(AtomicU64::new(0));
        let space = Space::new(file.clone(), MultipleOf(512), limits, next, [len, len], &shown);
        (file, space)
    }

    fn take(space: &mut Space, most: u64) -> (Range<u64>, Contents) {
        let run = space.take(Unit::new(4 * K, 4 * K), most).unwrap();
        (run.range, run.contents)
    }

    #[test]
    fn new_space_follows_the_end_aligned_and_only_what_was_gained_is_zero() {
        let (file, mut space) = space(10 * K, 18 * K, 1 << 40);
        assert_eq!(take(&mut space, 1), (12 * K..16 * K, Contents::Stale));
        assert_eq!(take(&mut space, 2), (16 * K..24 * K, Contents::Stale));
        assert_eq!(take(&mut space, 2), (24 * K..32 * K, Contents::Zeroes));
        assert_eq!(file.len().unwrap(), 18 * K + MIN_STEP);
        assert_eq!((space.len(), space.used_end()), (18 * K + MIN_STEP, 32 * K));
    }

    #[test]
    fn fresh_space_is_zero_and_leaves_what_lies_before_it_free() {
        let (_, mut space) = space(8 * K, 20 * K, 1 << 40);
        let run = space.take_fresh(Unit::new(512, 512), 3).unwrap();
        assert_eq!((run.range, run.contents), (20 * K..20 * K + 1536, Contents::Zeroes));
        assert_eq!(take(&mut space, 9), (8 * K..20 * K, Contents::Stale));
    }

    #[test]
    fn released_space_is_merged_and_used_first() {
        let (_, mut space) = space(64 * K, 64 * K, 1 << 40);
        space.release(4 * K..8 * K, Contents::Stale);
        space.release(12 * K..16 * K, Contents::Stale);
        space.release(8 * K..12 * K, Contents::Stale);
        space.release(16 * K..20 * K, Contents::Zeroes);
        assert_eq!(take(&mut space, 1), (4 * K..8 * K, Contents::Stale));
        assert_eq!(take(&mut space, 10), (8 * K..16 * K, Contents::Stale));
        assert_eq!(take(&mut space, 10), (16 * K..20 * K, Contents::Zeroes));
        assert_eq!(take(&mut space, 1), (64 * K..68 * K, Contents::Zeroes));
    }

    #[test]
    fn alignment_gives_way_where_it_would_cost_a_unit() {
        let unit = Unit { len: 4 * K + 512, align: 4 * K, lead: 512 };
        let (_, mut space) = space(64 * K, 64 * K, 1 << 40);
        space.release(512..512 + 2 * unit.len, Contents::Stale);
        assert_eq!(space.take(unit, 5).unwrap().range, 512..5 * K);
        assert_eq!(space.take(unit, 5).unwrap().range, 5 * K..9 * K + 512);
        assert_eq!(space.take(unit, 5).unwrap().range, 68 * K - 512..72 * K);
    }

    #[test]
    fn runs_too_short_for_a_unit_are_left_to_others() {
        let (_, mut space) = space(64 * K, 64 * K, 1 << 40);
        space.release(K..4 * K, Contents::Stale);
        assert_eq!(take(&mut space, 1).0, 64 * K..68 * K);
        assert_eq!(space.take(Unit::new(512, 512), 1).unwrap().range, K..K + 512);
    }

    #[test]
    fn free_space_at_the_end_is_not_in_use() {
        let (_, mut space) = space(64 * K, 64 * K, 1 << 40);
        space.release(56 * K..64 * K, Contents::Stale);
        space.release(48 * K..56 * K, Contents::Zeroes);
        space.release(8 * K..16 * K, Contents::Zeroes);
        assert_eq!(space.used_end(), 48 * K);
    }

    #[test]
    fn a_format_is_full_where_its_entries_end() {
        let (_, mut space) = space(8 * K, 8 * K, 17 * K);
        assert_eq!(take(&mut space, 9).0, 8 * K..16 * K);
        let error = space.take(Unit::new(4 * K, 4 * K), 1).unwrap_err();
        assert_eq!((error.kind(), error.what()), (ErrorKind::NoSpace, "full"));
    }

    #[test]
    fn a_file_grows_as_far_as_its_host_lets_it() {
        use crate::storage::faulty::{Faults, FaultyHost};
        use crate::storage::memory::MemoryHost;
        use crate::storage::{Access, Host};
        let (memory, faults) = (MemoryHost::new(), Arc::new(Faults::default()));
        memory.insert(MemoryFile::new("/x", &[]));
        let host = FaultyHost::over(memory, &faults);
        let file = host.open(std::path::Path::new("/x"), Access::Write).unwrap();
        faults.set_limit(9 * K);
        let limits = Limits { end: 1 << 40, full: "full", least: 512, align: 1, floor: 0 };
        let shown = Arc::new(AtomicU64::new(0));
        let mut space = Space::new(file, MultipleOf(512), limits, 0, [0, 0], &shown);
        assert_eq!(take(&mut space, 2).0, 0..8 * K);
        assert_eq!(space.take(Unit::new(512, 512), 9).unwrap().range, 8 * K..8 * K + 512);
        let error = space.take(Unit::new(4 * K, 4 * K), 1).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert_eq!(shown.load(Ordering::Relaxed), 8 * K + 512);
    }

    #[test]
    fn random_use_never_hands_out_a_byte_twice() {
        let mut random = fastrand::Rng::with_seed(5);
        let (file, mut space) = space(K, K, 1 << 40);
        let mut live: Vec<Range<u64>> = Vec::new();
        for _ in 0..2000 {
            if random.bool() || live.is_empty() {
                let unit = Unit::new(random.u64(1..5) * 512, 512);
                let new = space.take(unit, random.u64(1..5)).unwrap().range;
                assert!(live.iter().all(|l| l.end <= new.start || new.end <= l.start));
                assert!(new.start >= K && new.end <= file.len().unwrap());
                live.push(new);
            } else {
                let gone = live.swap_remove(random.usize(..live.len()));
                space.release(gone, Contents::Stale);
            }
        }
        let end = live.iter().map(|l| l.end).max().unwrap();
        assert_eq!(space.used_end(), end);
        let free: u64 = space.free.iter().map(|(start, free)| free.end - start).sum();
        let used: u64 = live.iter().map(|l| l.end - l.start).sum();
        assert_eq!(used + free + K, space.next);
    }
}
