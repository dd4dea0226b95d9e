//! What every format that allocates has while its image is being written: free space, space that was
//! freed, reservations, and the one flush.
//!
//! # A flush, in order
//!
//! 1. A *batch* is taken, in one step for whoever changes tables: the changed pages of all caches, the space
//!    that they free, and where files end.
//! 2. What must stand no later than the payload ([`Tables::announce`]).
//! 3. One sync of the payload, and of all that was written beside it.
//! 4. The pages ([`Tables::publish`]): when this returns, no crash brings back what they were before.
//! 5. The pages are *retired*: they may leave memory. Freed space is punched and may be used again.
//!
//! Where a step fails the batch is *restored*: its pages are dirty again and its space is freed still, so that
//! the next flush does all of it once more. Where no table changed there is step 3 alone.
//!
//! # Invariants
//!
//! 1. Nothing that a table on disk may lead to is handed out. Payload goes to its place before an entry in
//!    memory leads there (the disk fills a plan, then commits it), and is durable before an entry on disk
//!    does (3 comes before 4).
//! 2. Entries change, and what they led to becomes freed, inside one [`Writer::change`]: a batch has both or
//!    neither.
//! 3. A reservation that is not kept gives itself back.
//! 4. A page changes in memory only when its place in the file has space of the host
//!    ([`Writer::reserve_table`]), so that 4 finds room.

use std::ops::Range;

use parking_lot::Mutex;
use smallvec::SmallVec;

use super::map::{BlockMap, Contents};
use super::room::TableRoom;
use super::space::{Run, Space, Unit};
use super::sync_file_for;
use super::tables::PageImage;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;

/// What a format says about its tables.
pub trait Tables: BlockMap {
    /// Where its space is.
    fn writer(&self) -> &Writer;

    /// Writes what must be durable no later than the payload of a batch.
    ///
    /// # Errors
    ///
    /// Those of the host.
    fn announce(&self, batch: &Batch) -> Result<()> {
        let _ = batch;
        Ok(())
    }

    /// Makes everything durable that was written so far. `what` is for whoever keeps a record.
    ///
    /// # Errors
    ///
    /// Those of the host.
    fn sync(&self, what: &'static str) -> Result<()> {
        self.files().iter().try_for_each(|file| sync_file_for(&**file, what))
    }

    /// Makes the pages of a batch durable, or makes sure that a crash brings them back. May be called again
    /// with the same ones after it failed for lack of space.
    ///
    /// # Errors
    ///
    /// Those of the host.
    fn publish(&self, batch: &Batch) -> Result<()>;
}

/// What a flush writes.
#[derive(Debug)]
pub struct Batch {
    /// Changed pages, by cache in the order of [`BlockMap::caches`].
    pub pages: SmallVec<[Vec<PageImage>; 2]>,
    /// Where files ended when the batch was taken, by space.
    pub ends: Vec<Ends>,
    freed: Vec<Freed>,
}

/// Where a file ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ends {
    /// Its length.
    pub file: u64,
    /// One past the last byte in use.
    pub used: u64,
}

/// Space that nothing in memory leads to any more.
type Freed = (usize, Range<u64>);

/// Decisions about space, which every change shares. Two kinds of I/O happen while it is locked: a file is made
/// longer, so that nobody takes space that is not there; and a page that has left memory since it was looked
/// at is read again.
#[derive(Debug, Default)]
pub struct State {
    /// The space of each file, `None` where it is not written to.
    spaces: Vec<Option<Space>>,
    freed: Vec<Freed>,
}

impl State {
    /// The free space of file number `space`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ReadOnly`] where it is not written to.
    pub fn space(&mut self, space: usize) -> Result<&mut Space> {
        let found = self.spaces.get_mut(space).and_then(Option::as_mut);
        found.ok_or_else(|| Error::new(ErrorKind::ReadOnly, "the file is not open for writing"))
    }

    /// No table in memory leads to this space any more.
    pub fn free(&mut self, space: usize, range: Range<u64>) {
        match self.freed.last_mut() {
            Some((last, freed)) if *last == space && freed.end == range.start => {
                freed.end = range.end;
            }
            _ => self.freed.push((space, range)),
        }
    }
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Writer {
    /// From the first write on.
    state: Mutex<Option<State>>,
    /// Which pages of tables have space of the host.
    room: TableRoom,
}

impl Writer {
    /// Begins with the free space of each file, `None` where it is not written to.
    pub fn begin(&self, spaces: Vec<Option<Space>>) {
        spaces.iter().flatten().for_each(Space::show_len);
        *self.state.lock() = Some(State { spaces, freed: Vec::new() });
    }

    /// Nothing is written any more.
    pub fn end(&self) {
        *self.state.lock() = None;
    }

    /// Runs `change`, which a flush sees as a whole or not at all.
    ///
    /// # Errors
    ///
    /// Those of `change`; [`ErrorKind::Failed`] before writing has begun.
    pub fn change<R>(&self, change: impl FnOnce(&mut State) -> Result<R>) -> Result<R> {
        match &mut *self.state.lock() {
            Some(state) => change(state),
            None => Err(Error::new(ErrorKind::Failed, "writing has not begun")),
        }
    }

    /// Where files end now, if writing has begun.
    pub fn ends(&self) -> Option<Vec<Ends>> {
        self.state.lock().as_ref().map(ends)
    }

    /// Reserves up to `count` units, at least one, in file number `space`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NoSpace`] where format or host are full.
    pub fn reserve(&self, space: usize, unit: Unit, count: u64) -> Result<Reserved<'_>> {
        let mut reserved =
            Reserved { writer: self, space, unit, runs: SmallVec::new(), blank: false };
        let taken = self.change(|state| {
            let space = state.space(space)?;
            let mut left = count;
            while left > 0 {
                let run = match space.take(unit, left) {
                    Err(_) if !reserved.runs.is_empty() => break,
                    run => run?,
                };
                left -= (run.range.end - run.range.start) / unit.len;
                reserved.runs.push(run);
            }
            Ok(())
        });
        taken.map(|()| reserved)
    }

    /// Reserves `len` bytes of file number `space`, which read as zeroes now and after a crash and are not
    /// written to before they are kept.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NoSpace`] where format or host are full.
    pub fn reserve_blank(&self, space: usize, unit: Unit) -> Result<Reserved<'_>> {
        let run = self.change(|state| state.space(space)?.take_fresh(unit, 1))?;
        Ok(Reserved { writer: self, space, unit, runs: SmallVec::from_iter([run]), blank: true })
    }

    /// Sees to it that changing `range`, a part of a table in `file`, takes no more space of the host.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NoSpace`] where the host has none left.
    pub fn reserve_table(&self, file: &dyn Storage, space: usize, range: Range<u64>) -> Result<()> {
        self.room.reserve(file, space, range)
    }

    /// Takes what has changed out of memory.
    fn take(&self, map: &dyn BlockMap) -> Option<Batch> {
        let mut state = self.state.lock();
        let state = state.as_mut()?;
        let pages: SmallVec<_> = map.caches().into_iter().map(|cache| cache.snapshot()).collect();
        Some(Batch { pages, ends: ends(state), freed: std::mem::take(&mut state.freed) })
    }

    /// Puts back what could not be made durable.
    fn restore(&self, map: &dyn BlockMap, batch: Batch) {
        let mut state = self.state.lock();
        map.caches().into_iter().zip(&batch.pages).for_each(|(cache, pages)| cache.restore(pages));
        if let Some(state) = &mut *state {
            state.freed.extend(batch.freed);
        }
    }

    /// Gives space that no durable table leads to back to the host, and to whoever asks for some.
    fn reclaim(&self, mut freed: Vec<Freed>) {
        freed.sort_unstable_by_key(|(space, range)| (*space, range.start));
        freed.dedup_by(|next, last| {
            let continues = (last.0, last.1.end) == (next.0, next.1.start);
            if continues {
                last.1.end = next.1.end;
            }
            continues
        });
        for (space, range) in freed {
            let Ok(file) = self.change(|state| Ok(state.space(space)?.file().clone())) else {
                continue;
            };
            let punched = file.punch_hole(range.start, range.end - range.start);
            if let Err(e) = &punched {
                log::warn!("{}: giving space back: {e}", file.path().display());
            }
            self.room.forget(space, range.clone());
            let contents = if punched.is_ok() { Contents::Zeroes } else { Contents::Stale };
            self.release(space, range, contents);
        }
    }

    fn release(&self, space: usize, range: Range<u64>, contents: Contents) {
        let released = self.change(|state| {
            state.space(space)?.release(range, contents);
            Ok(())
        });
        // Whoever ended writing needs no space.
        let _ = released;
    }
}

fn ends(state: &State) -> Vec<Ends> {
    let ends = |space: &Space| Ends { file: space.len(), used: space.used_end() };
    state.spaces.iter().map(|space| space.as_ref().map(ends).unwrap_or_default()).collect()
}

/// Space that nothing leads to yet. Gives itself back unless it is kept; not to be dropped inside a
/// [`Writer::change`].
#[derive(Debug)]
pub struct Reserved<'a> {
    writer: &'a Writer,
    space: usize,
    unit: Unit,
    runs: SmallVec<[Run; 2]>,
    /// It is not written to while it is reserved.
    blank: bool,
}

impl Reserved<'_> {
    /// The pieces.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Where each unit begins, and what it holds.
    pub fn places(&self) -> impl Iterator<Item = (u64, Contents)> + '_ {
        let unit = self.unit.len;
        let places = move |run: &Run| {
            let contents = run.contents;
            run.range.clone().step_by(unit as usize).map(move |at| (at, contents))
        };
        self.runs.iter().flat_map(places)
    }

    /// Something leads to the space now.
    pub fn keep(mut self) {
        self.runs.clear();
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        for run in self.runs.drain(..) {
            let contents = if self.blank { run.contents } else { Contents::Stale };
            self.writer.release(self.space, run.range, contents);
        }
    }
}

/// Makes everything durable that was committed. One at a time; see the module's documentation.
///
/// # Errors
///
/// Those of the host. After lack of space the same may be tried again.
pub fn flush(format: &impl Tables) -> Result<()> {
    const PAYLOAD: &str = "payload";
    let writer = format.writer();
    let Some(batch) = writer.take(format) else { return Ok(()) };
    if batch.pages.iter().all(Vec::is_empty) && batch.freed.is_empty() {
        return format.sync(PAYLOAD);
    }
    let done = format
        .announce(&batch)
        .and_then(|()| format.sync(PAYLOAD))
        .and_then(|()| format.publish(&batch));
    if done.is_err() {
        writer.restore(format, batch);
        return done;
    }
    format.caches().into_iter().zip(&batch.pages).for_each(|(cache, pages)| cache.retire(pages));
    writer.reclaim(batch.freed);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;

    use super::super::map::{DiskRange, ExtentList, Geometry};
    use super::super::space::{Limits, MultipleOf};
    use super::super::tables::{CacheBudget, TableCache};
    use super::*;
    use crate::storage::memory::MemoryFile;

    const K: u64 = 1024;
    const UNIT: Unit = Unit { len: K, align: K, lead: 0 };

    /// A file whose first sector is its only table.
    struct Simple {
        files: [Arc<dyn Storage>; 1],
        cache: TableCache,
        writer: Writer,
        /// How publishing fails.
        failure: Mutex<Option<ErrorKind>>,
    }

    impl Simple {
        fn new() -> Self {
            let file: Arc<dyn Storage> = MemoryFile::new("x", &[7; 8192]);
            let limits = Limits { end: 1 << 30, full: "full", least: K, align: 1, floor: 0 };
            let shown = Arc::new(AtomicU64::new(0));
            let lens = [8 * K, 8 * K];
            let space = Space::new(file.clone(), MultipleOf(512), limits, 8 * K, lens, &shown);
            let writer = Writer::default();
            writer.begin(vec![Some(space)]);
            let cache = TableCache::new(512, &CacheBudget::new(1 << 20));
            Self { files: [file], cache, writer, failure: Mutex::new(None) }
        }

        fn set(&self, writing: &mut State, value: u8, freed: Range<u64>) -> Result<()> {
            self.cache.update(0, |_| Ok(()), |page| page[0] = value)?;
            writing.free(0, freed);
            Ok(())
        }

        fn take(&self) -> (Range<u64>, Contents) {
            let reserved = self.writer.reserve(0, UNIT, 1).unwrap();
            let run = reserved.runs()[0].clone();
            reserved.keep();
            (run.range, run.contents)
        }
    }

    impl BlockMap for Simple {
        fn geometry(&self) -> &Geometry {
            unreachable!("nobody asks")
        }

        fn files(&self) -> &[Arc<dyn Storage>] {
            &self.files
        }

        fn lookup(&self, _want: DiskRange, _out: &mut ExtentList) -> Result<()> {
            unreachable!("nobody asks")
        }

        fn caches(&self) -> SmallVec<[&TableCache; 2]> {
            SmallVec::from_slice(&[&self.cache])
        }
    }

    impl Tables for Simple {
        fn writer(&self) -> &Writer {
            &self.writer
        }

        fn publish(&self, batch: &Batch) -> Result<()> {
            if let Some(kind) = *self.failure.lock() {
                return Err(Error::new(kind, "as asked"));
            }
            self.files[0].write_at(0, &batch.pages[0][0].1).map_err(|e| Error::io("write", &e))
        }
    }

    #[test]
    fn a_reservation_that_is_not_kept_gives_itself_back() {
        let map = Simple::new();
        let reserved = map.writer.reserve(0, UNIT, 3).unwrap();
        assert_eq!(reserved.places().next(), Some((8 * K, Contents::Zeroes)));
        drop(reserved);
        drop(map.writer.reserve_blank(0, UNIT).unwrap());
        // Whoever reserved it may have written to it.
        assert_eq!(map.take(), (8 * K..9 * K, Contents::Stale));
        for at in [9, 10] {
            assert_eq!(map.take(), (at * K..(at + 1) * K, Contents::Stale));
        }
        assert_eq!(map.take(), (11 * K..12 * K, Contents::Zeroes));
    }

    #[test]
    fn freed_space_is_used_again_once_a_flush_has_succeeded_and_not_before() {
        let map = Simple::new();
        map.writer.change(|writing| map.set(writing, 1, 2 * K..3 * K)).unwrap();
        assert_eq!(map.take().0, 8 * K..9 * K);
        *map.failure.lock() = Some(ErrorKind::NoSpace);
        assert_eq!(flush(&map).unwrap_err().kind(), ErrorKind::NoSpace);
        assert_eq!((map.cache.dirty_pages(), map.take().0), (1, 9 * K..10 * K));
        *map.failure.lock() = None;
        flush(&map).unwrap();
        let mut table = [0; 1];
        map.files[0].read_at(0, &mut table).unwrap();
        assert_eq!((map.cache.dirty_pages(), table), (0, [1]));
        assert_eq!(map.take(), (2 * K..3 * K, Contents::Zeroes));
        assert_eq!(map.take().0, 10 * K..11 * K);
    }

    #[test]
    fn nothing_is_handed_out_before_writing_begins_or_after_it_ends() {
        let map = Simple::new();
        map.writer.end();
        assert_eq!(map.writer.reserve(0, UNIT, 1).unwrap_err().kind(), ErrorKind::Failed);
        assert_eq!(map.writer.ends(), None);
    }
}
