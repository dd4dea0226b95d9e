//! What a format driver is: [`BlockMap`], the translation from disk ranges to places in files.
//!
//! A driver never moves payload. It answers where bytes are ([`BlockMap::lookup`]) and hands out
//! places for new ones in two steps: [`BlockMap::prepare_write`] reserves space that nobody can see
//! yet, the [`Disk`](super::Disk) fills it, and [`WritePlan::commit`] makes it visible. Only the
//! driver writes tables, and it does so in [`BlockMap::flush`], in its format's safe order.
//!
//! The [`Disk`](super::Disk) calls `lookup` under shared block locks and everything that changes a
//! mapping under exclusive ones, so no range is looked up while it changes; different ranges do
//! change at the same time, and a flush may run at any time.

use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use super::sync_file;
use super::tables::{MAX_DIRTY, TableCache};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;

/// Bytes `start..end` of the virtual disk.
pub type DiskRange = Range<u64>;

/// The sizes of a disk. Fixed while it is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Virtual size in bytes, a multiple of [`Self::SECTOR`].
    pub size: u64,
    /// The guest's logical sector in bytes: 512 or 4096.
    pub logical_sector: u32,
    /// The guest's physical sector in bytes: 512 or 4096.
    pub physical_sector: u32,
    /// Allocation unit in bytes: block, grain; the whole disk's size where nothing is allocated.
    pub block_size: u64,
}

impl Geometry {
    /// Granularity in bytes of everything a driver is asked: allocation, bitmaps, unmapping.
    pub const SECTOR: u64 = 512;
}

/// Index into [`BlockMap::files`].
pub type FileIndex = usize;

/// Where the bytes of a part of the disk are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// In an image file, one after the other from byte `at`.
    File {
        /// Which of [`BlockMap::files`].
        file: FileIndex,
        /// Byte offset there of the extent's first byte.
        at: u64,
    },
    /// All zeroes, stored nowhere.
    Zero,
    /// Whatever the parent has there; zeroes past the parent's end.
    Parent,
    /// In compressed unit `unit`, starting `skip` bytes into it; see [`BlockMap::read_packed`].
    Packed {
        /// The driver's own name for the unit, a host offset as a rule.
        unit: u64,
        /// Bytes of the unit before the extent's first byte.
        skip: u32,
    },
    /// Lost: the image is damaged here, reading is an error.
    Bad,
}

/// A run of the disk that has one [`Source`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte on the disk.
    pub start: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// Where the bytes are.
    pub source: Source,
}

impl Extent {
    /// One past the last byte on the disk.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// Extents in disk order, without gaps. [`ExtentList::push`] merges what continues the last one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExtentList(SmallVec<[Extent; 4]>);

impl ExtentList {
    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends `len` bytes with `source`, merging them into the last extent where they continue it.
    pub fn push(&mut self, start: u64, len: u64, source: Source) {
        debug_assert!(len > 0 && self.0.last().is_none_or(|last| last.end() == start));
        if let Some(last) = self.0.last_mut() {
            let continues = match (last.source, source) {
                (Source::File { file: a, at: x }, Source::File { file: b, at: y }) => {
                    a == b && x.checked_add(last.len) == Some(y)
                }
                (Source::Zero, Source::Zero)
                | (Source::Parent, Source::Parent)
                | (Source::Bad, Source::Bad) => true,
                _ => false,
            };
            if continues {
                last.len += len;
                return;
            }
        }
        self.0.push(Extent { start, len, source });
    }

    /// Empties the list, keeping its memory.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

impl std::ops::Deref for ExtentList {
    type Target = [Extent];
    fn deref(&self) -> &[Extent] {
        &self.0
    }
}

/// What space holds that nothing leads to yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contents {
    /// It reads as zeroes.
    Zeroes,
    /// Whatever was there before.
    Stale,
}

/// One place that a planned write must fill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// First byte on the disk, a multiple of [`Geometry::SECTOR`].
    pub start: u64,
    /// Length in bytes, a multiple of [`Geometry::SECTOR`].
    pub len: u64,
    /// Which of [`BlockMap::files`].
    pub file: FileIndex,
    /// Byte offset there.
    pub at: u64,
    /// What is there: where it is zeroes, none need be written.
    pub contents: Contents,
}

/// Space reserved by [`BlockMap::prepare_write`]: after every piece holds the disk's new contents of
/// its range, the plan is committed; one that is dropped gives back what was reserved.
///
/// Pieces ascend and cover at least the planned range. A piece may reach further, to the borders of
/// a block that must be stored whole: the bytes there get the disk's current contents. Pieces may
/// reach past the disk's end, where they hold zeroes.
pub struct WritePlan<'a> {
    /// What to fill, in disk order, without overlap.
    pub pieces: SmallVec<[Piece; 4]>,
    /// Owns the reservations.
    commit: Box<dyn FnOnce() -> Result<()> + 'a>,
}

impl<'a> WritePlan<'a> {
    /// A plan that `commit` makes visible to [`BlockMap::lookup`]. What is reserved for it is given back
    /// when `commit` is dropped, called or not, and has not kept it.
    pub fn new(pieces: SmallVec<[Piece; 4]>, commit: impl FnOnce() -> Result<()> + 'a) -> Self {
        Self { pieces, commit: Box::new(commit) }
    }

    /// Makes the plan visible to [`BlockMap::lookup`]. Its pieces have been written, not synced.
    ///
    /// # Errors
    ///
    /// Those of reading tables. Nothing became visible then, as if the plan had been dropped.
    pub fn commit(self) -> Result<()> {
        (self.commit)()
    }
}

/// A format driver's view of one open disk.
///
/// # Errors
///
/// [`ErrorKind::Corrupt`] where the tables are damaged, and those of the host.
#[allow(clippy::missing_errors_doc)] // They are the trait's, above.
pub trait BlockMap: Send + Sync {
    /// The disk's sizes.
    fn geometry(&self) -> &Geometry;

    /// The files that [`Source::File`] and [`Piece`] refer to. Fixed while open.
    fn files(&self) -> &[Arc<dyn Storage>];

    /// Appends the extents of `want`, which is not empty, lies inside the disk and is a multiple of
    /// [`Geometry::SECTOR`] at both ends. The answer is sorted, has no gaps and ends exactly with
    /// `want`.
    fn lookup(&self, want: DiskRange, out: &mut ExtentList) -> Result<()>;

    /// What the beginning of `want` reads as, and how far, if the tables tell of a long run at once that
    /// nothing of it is stored: [`Source::Zero`] or [`Source::Parent`]. A shortcut for searches, with
    /// bounded work; the run may go on behind it.
    fn unstored(&self, want: DiskRange) -> Result<Option<Extent>> {
        let _ = want;
        Ok(None)
    }

    /// Whether every byte of the disk has its place for as long as the disk is open: nothing is allocated,
    /// given back or moved, so that whoever knows the place needs nobody to ask.
    fn fixed(&self) -> bool {
        false
    }

    /// Called once, before the first change of any kind since the disk was opened: marks the image
    /// as being written (identifiers, log, dirty flag), durably where the format needs that.
    fn begin_writes(&self) -> Result<()> {
        Ok(())
    }

    /// Reserves space for writing `want` (as for [`Self::lookup`]), no part of which `lookup` says
    /// is [`Source::File`]. A plan may cover less than `want`, but at least its first sector; the
    /// caller asks again for the rest. A disk all of which is stored is never asked.
    fn prepare_write(&self, want: DiskRange) -> Result<WritePlan<'_>> {
        let _ = want;
        Err(Error::new(ErrorKind::Failed, "this disk has nothing to allocate"))
    }

    /// Makes whole blocks inside `want` read as zeroes without storing them, where the format can
    /// say that (on a child it must hide the parent). Parts that were not unmapped are appended to
    /// `rest`, in order; the caller writes zeroes there.
    fn unmap(&self, want: DiskRange, rest: &mut Vec<DiskRange>) -> Result<()> {
        rest.push(want);
        Ok(())
    }

    /// Unpacks unit `unit` of a [`Source::Packed`] and copies its bytes from `skip` into `buf`.
    fn read_packed(&self, unit: u64, skip: u32, buf: &mut [u8]) -> Result<()> {
        let _ = (unit, skip, buf);
        Err(Error::corrupt("compressed data in a format that has none"))
    }

    /// The tables in memory. Fixed while open.
    fn caches(&self) -> SmallVec<[&TableCache; 2]> {
        SmallVec::new()
    }

    /// Whether as many changed tables wait in memory for a flush as may.
    fn tables_full(&self) -> bool {
        self.caches().into_iter().map(TableCache::dirty_bytes).sum::<usize>() >= MAX_DIRTY
    }

    /// Makes all committed writes durable: first payload, then the tables that lead to it. When
    /// nothing but payload changed, one sync of each written file is enough. Called by one thread at a
    /// time, and not again after a failure other than [`ErrorKind::NoSpace`].
    fn flush(&self) -> Result<()> {
        self.files().iter().try_for_each(|file| sync_file(&**file))
    }

    /// Flushes and marks the image clean. Called at most once, with nothing else under way; also on
    /// disks that were never written, where it must not write.
    fn close(&self) -> Result<()> {
        Ok(())
    }
}

/// What [`BlockMap::unmap`] does of a disk that lies in `file` as it is: a hole of the host.
///
/// # Errors
///
/// Those of [`Storage::punch_hole`].
pub fn punch(file: &dyn Storage, want: DiskRange) -> Result<()> {
    file.punch_hole(want.start, want.end - want.start)
        .map_err(|e| Error::io("discard", &e).in_file(file.path()).at(want.start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_merge_only_where_the_file_continues() {
        let mut list = ExtentList::new();
        list.push(0, 512, Source::File { file: 0, at: 4096 });
        list.push(512, 512, Source::File { file: 0, at: 4608 });
        list.push(1024, 512, Source::File { file: 1, at: 5120 });
        list.push(1536, 512, Source::Zero);
        list.push(2048, 512, Source::Zero);
        list.push(2560, 512, Source::Packed { unit: 1, skip: 0 });
        list.push(3072, 512, Source::Packed { unit: 1, skip: 512 });
        let lens: Vec<_> = list.iter().map(|e| e.len).collect();
        assert_eq!(lens, [1024, 512, 1024, 512, 512]);
    }
}
