//! The disk: the one type every front end holds, and the one place that moves payload.
//!
//! A [`Disk`] is a [`BlockMap`] plus an optional parent disk. It does once, for all formats: bounds
//! and access checks, rounding to sectors, reading through to the parent, copying up, zeroing,
//! and the life of a disk that is written, from the first write to closing ([`session`]).
//!
//! # Durability
//!
//! A write is visible when it returns and durable when a later [`Disk::flush`] returned. Between the
//! two a crash leaves each sector old or new. A failed flush latches: what it should have covered may
//! be lost, so every later write and flush returns the first failure until the image is reopened.
//!
//! [`Disk::close`] flushes, marks the image clean and says whether that worked. A written disk that
//! is dropped without it does the same, and a failure is logged: only a caller who closes learns of
//! it. A child goes before the disk below it, which it holds.
//!
//! # Locks, outermost first
//!
//! 1. block locks ([`locks`]), of the child before those of its parent;
//! 2. the flush lock;
//! 3. the driver's own state, and changes ([`writer`]: decisions only, no I/O but it says why);
//! 4. a shard of the table cache (no I/O).
//!
//! A flush takes 2–4 and never 1, so it never waits for a writer.
//!
//! # Further files
//!
//! - `cursor`: a disk, or a part of one, as `std::io` knows files;
//! - `damage`: what a disk turned out to have lost;
//! - `flat`: one file as a disk, byte for byte;
//! - `layers`: which layer of a chain holds what;
//! - `map`: what a format driver is;
//! - `overlay`: a private, throw-away layer over any disk;
//! - `picture`: a disk and its files cut into cells of equal length, to be drawn;
//! - `room`: space of the host for tables that change in memory;
//! - `search`: where data lies, and where nothing is;
//! - `session`: the life of a disk that is written: beginning, flushing, failing, closing;
//! - `share`: data that lies in other files of the host;
//! - `space`: free space of a file that is being written;
//! - `tables`: a bounded cache of table pages;
//! - `transfer`: copying from disk to disk;
//! - `window`: a part of a disk as a disk of its own;
//! - `writer`: what formats that allocate have in common: free and freed space, reservations, the flush.

pub mod cursor;
mod damage;
#[doc(hidden)]
pub mod flat;
#[doc(hidden)]
pub mod layers;
mod locks;
pub mod map;
#[doc(hidden)]
pub mod overlay;
pub mod picture;
mod room;
mod search;
mod session;
#[doc(hidden)]
pub mod share;
pub(crate) mod space;
#[doc(hidden)]
pub mod tables;
pub(crate) mod transfer;
pub mod window;
pub(crate) mod writer;

use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;
use locks::{BlockLocks, Shared};
use map::{BlockMap, Contents, DiskRange, ExtentList, Geometry, Piece, Source};
use session::Session;
use share::Foreign;

/// Largest buffer that copying up and zero filling use.
const COPY_CHUNK: u64 = 1 << 20;
/// How much of the disk one step of a discard covers.
const STEP: u64 = 1 << 30;
/// How much of the disk is looked up at once where nobody knows how finely it is divided: at most
/// 65,536 extents, each a sector, fit in a few MiB.
pub const LOOKUP_STEP: u64 = 32 << 20;

/// An open virtual disk: byte-addressed, usable from any thread.
pub struct Disk {
    map: Box<dyn BlockMap>,
    parent: Option<Arc<Disk>>,
    locks: BlockLocks,
    /// Why the disk cannot be written, if it cannot.
    read_only: Option<String>,
    session: Session,
    /// What could not be read because the image is damaged.
    damage: damage::Found,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("geometry", self.geometry()).finish_non_exhaustive()
    }
}

impl Disk {
    /// A disk over `map`; `read_only` says why it cannot be written, if it cannot.
    pub fn new(
        map: Box<dyn BlockMap>,
        parent: Option<Arc<Disk>>,
        read_only: Option<String>,
    ) -> Self {
        let locks = BlockLocks::new(map.geometry().block_size);
        Self {
            map,
            parent,
            locks,
            read_only,
            session: Session::default(),
            damage: damage::Found::default(),
        }
    }

    /// The disk's sizes.
    pub fn geometry(&self) -> &Geometry {
        self.map.geometry()
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.geometry().size
    }

    /// Why the disk cannot be written, if it cannot.
    pub fn read_only(&self) -> Option<&str> {
        self.read_only.as_deref()
    }

    /// The disk this one is a child of.
    pub fn parent(&self) -> Option<&Arc<Disk>> {
        self.parent.as_ref()
    }

    /// The path of one of the image's files.
    pub fn file_path(&self, file: map::FileIndex) -> Option<&Path> {
        self.map.files().get(file).map(|file| file.path())
    }

    /// Whether anything was written since the disk was opened.
    pub fn writing(&self) -> bool {
        self.session.begun()
    }

    /// Table cache figures.
    pub fn cache_stats(&self) -> tables::CacheStats {
        self.map.caches().into_iter().map(tables::TableCache::stats).sum()
    }

    /// Bytes of host space the image's own files take.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] where the host does not say.
    pub fn allocated(&self) -> Result<u64> {
        let mut sum = 0;
        for file in self.map.files() {
            sum += file
                .allocated()
                .map_err(|e| Error::io("asking for the size", &e).in_file(file.path()))?;
        }
        Ok(sum)
    }

    /// The host file that holds the whole disk and nothing before it, if there is one: byte `n` of
    /// the disk is byte `n` of the file, for the whole disk.
    pub fn flat_file(&self) -> Option<Arc<dyn Storage>> {
        self.fixed_run().filter(|(_, at)| *at == 0).map(|(file, _)| file)
    }

    /// The host file in which the whole disk lies in one piece, and at which byte, if it has one and stays
    /// there for as long as the disk is open.
    pub fn fixed_run(&self) -> Option<(Arc<dyn Storage>, u64)> {
        if self.size() == 0 || self.parent.is_some() || !self.map.fixed() {
            return None;
        }
        let Geometry { size, block_size, .. } = *self.geometry();
        let step = if block_size < size { LOOKUP_STEP } else { size };
        let mut list = ExtentList::new();
        for start in (0..size).step_by(step as usize) {
            // Merges into the run that it continues.
            self.map.lookup(start..size.min(start + step), &mut list).ok()?;
            if list.len() != 1 {
                return None;
            }
        }
        match list[..] {
            [map::Extent { source: Source::File { file, at }, .. }] => {
                Some((self.map.files().get(file)?.clone(), at))
            }
            _ => None,
        }
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<DiskRange> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size() => Ok(offset..end),
            _ => Err(Error::new(
                ErrorKind::OutOfRange,
                format!(
                    "{len} bytes at {offset:#x} lie outside the disk of {:#x} bytes",
                    self.size()
                ),
            )),
        }
    }

    /// Fills `buf` with the disk's bytes from `offset`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OutOfRange`] past the end of the disk; [`ErrorKind::Io`] where the host fails, and
    /// [`ErrorKind::Corrupt`] for a range that the image has lost. Other ranges still read.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let range = self.check_range(offset, buf.len() as u64)?;
        if range.is_empty() {
            return Ok(());
        }
        let _held = self.shared(&range);
        self.read_held(range, buf)
    }

    /// Holds a range against changes of its mapping; of a disk that cannot be written there are none.
    fn shared(&self, range: &DiskRange) -> Shared<'_> {
        if self.read_only.is_some() { Shared::new() } else { self.locks.shared(range) }
    }

    /// [`Self::read_at`] for a caller that holds the range's locks.
    fn read_held(&self, range: DiskRange, buf: &mut [u8]) -> Result<()> {
        let mut list = ExtentList::new();
        self.map
            .lookup(sectors_around(&range), &mut list)
            .inspect_err(|e| self.note_damage(e, &range))?;
        for extent in list.iter() {
            let (part, skip) = overlap(extent, &range);
            let buf = &mut buf[(part.start - range.start) as usize..][..len(&part)];
            let note = |e: &Error| self.note_damage(e, &part);
            match extent.source {
                Source::File { file, at } => {
                    let file = &self.map.files()[file];
                    let read = file.read_at(at + skip, buf);
                    read.map_err(|e| read_failed(&**file, at + skip, &e)).inspect_err(note)?;
                }
                Source::Zero => buf.fill(0),
                Source::Parent => self.read_parent(part.clone(), buf).inspect_err(note)?,
                Source::Packed { unit, skip: inner } => {
                    self.map.read_packed(unit, inner + skip as u32, buf).inspect_err(note)?;
                }
                Source::Bad => {
                    let what = format!("the image is damaged at disk offset {:#x}", part.start);
                    let e = Error::corrupt(what).hint("flatdisk check lists the damage");
                    note(&e);
                    return Err(e);
                }
            }
        }
        Ok(())
    }

    /// Remembers a range that could not be read, if the reason is damage.
    fn note_damage(&self, e: &Error, range: &DiskRange) {
        if e.kind() == ErrorKind::Corrupt {
            self.damage.add(range.clone());
        }
    }

    /// Ranges that reading has found damaged so far, ascending. A check finds all of them.
    pub fn damage(&self) -> Vec<DiskRange> {
        self.damage.ranges()
    }

    /// Reads from the parent; bytes past its end are zeroes.
    fn read_parent(&self, range: DiskRange, buf: &mut [u8]) -> Result<()> {
        let Some(parent) = &self.parent else {
            return Err(Error::new(ErrorKind::ParentMissing, "the data is in a missing parent"));
        };
        let inside = parent.size().clamp(range.start, range.end);
        let (below, past) = buf.split_at_mut((inside - range.start) as usize);
        past.fill(0);
        parent.read_at(range.start, below).or_else(|e| match below.is_empty() {
            true => Ok(()),
            false => Err(e),
        })
    }

    /// Checks that writing is possible now, and begins it.
    fn ready_to_write(&self) -> Result<()> {
        self.session.begin(&*self.map, self.read_only())
    }

    /// Takes note that somebody else wrote to the disk's files, as the kernel does where it was given
    /// one: the image counts as written, and the next flush covers it.
    ///
    /// # Errors
    ///
    /// Those of the first write to a disk.
    pub fn changed_from_outside(&self) -> Result<()> {
        self.ready_to_write()?;
        self.session.note_write();
        Ok(())
    }

    /// Tells the host to begin writing to its device what was written, that [`Self::flush`] has less to
    /// wait for.
    pub fn write_back(&self) {
        self.map.files().iter().for_each(|file| file.write_back());
    }

    /// Writes `data` at `offset`. Durable after [`Self::flush`].
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OutOfRange`] past the end of the disk, [`ErrorKind::ReadOnly`] if it cannot be written,
    /// [`ErrorKind::NoSpace`] where host or format are full, [`ErrorKind::Failed`] after an earlier failure that made
    /// it unknown what is durable. Part of the data may have been written.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.write(offset, data.len() as u64, Content::Bytes(data))
    }

    /// [`Self::write_at`] with any content.
    fn write(&self, offset: u64, len: u64, content: Content<'_>) -> Result<()> {
        let range = self.check_range(offset, len)?;
        self.ready_to_write()?;
        if range.is_empty() {
            return Ok(());
        }
        let written = self.write_ready(range, content);
        // Also after a failure: part of the data may be there for readers to see.
        self.session.note_write();
        written
    }

    /// [`Self::write_at`] once writing has begun.
    fn write_ready(&self, range: DiskRange, content: Content<'_>) -> Result<()> {
        {
            let _held = self.locks.shared(&range);
            let mut list = ExtentList::new();
            self.map.lookup(sectors_around(&range), &mut list)?;
            if list.iter().all(|e| matches!(e.source, Source::File { .. })) {
                return list.iter().try_for_each(|extent| self.overwrite(extent, &range, content));
            }
        }
        let _held = self.locks.exclusive(&range);
        self.write_held(range, content)
    }

    /// Writes the part of `content` (which covers `range`) that falls into a mapped extent.
    fn overwrite(
        &self,
        extent: &map::Extent,
        range: &DiskRange,
        content: Content<'_>,
    ) -> Result<()> {
        let Source::File { file, at } = extent.source else { return Ok(()) };
        let (part, skip) = overlap(extent, range);
        self.put_part(file, at + skip, content, &part, range)
    }

    /// Puts the part `part` of `content` (which covers `range`) at byte `at` of a file.
    fn put_part(
        &self,
        file: usize,
        at: u64,
        content: Content<'_>,
        part: &DiskRange,
        range: &DiskRange,
    ) -> Result<()> {
        let skip = part.start - range.start;
        match content {
            Content::Bytes(data) => self.put(file, at, &data[skip as usize..][..len(part)]),
            Content::Zeroes => self.put_zeroes(file, at, part.end - part.start),
            Content::From(foreign) => {
                foreign.put(&*self.map.files()[file], at, skip, part.end - part.start)
            }
        }
    }

    fn put(&self, file: usize, at: u64, data: &[u8]) -> Result<()> {
        let file = &self.map.files()[file];
        file.write_at(at, data).map_err(|e| write_failed(&**file, at, &e))
    }

    /// Makes a range of a file read as zeroes.
    fn put_zeroes(&self, file: usize, at: u64, len: u64) -> Result<()> {
        let file = &self.map.files()[file];
        file.punch_hole(at, len).map_err(|e| write_failed(&**file, at, &e))
    }

    /// Writes `content` over `range`, allocating where needed. The caller holds the range's locks
    /// exclusively.
    fn write_held(&self, range: DiskRange, content: Content<'_>) -> Result<()> {
        let want = sectors_around(&range);
        let mut pos = want.start;
        let mut list = ExtentList::new();
        while pos < want.end {
            list.clear();
            self.map.lookup(pos..want.end, &mut list)?;
            let unmapped_until = list
                .iter()
                .take_while(|e| !matches!(e.source, Source::File { .. }))
                .last()
                .map(map::Extent::end);
            let Some(end) = unmapped_until else {
                let first = list[0];
                self.overwrite(&first, &range, content)?;
                pos = first.end();
                continue;
            };
            if list.iter().any(|e| e.source == Source::Bad && e.start < end) {
                return Err(Error::corrupt(format!(
                    "the image is damaged at disk offset {pos:#x}"
                )));
            }
            self.session.bound_tables(&*self.map)?;
            let plan = self.map.prepare_write(pos..end)?;
            let planned = plan.pieces.last().map_or(pos, |p| p.start + p.len);
            if planned <= pos {
                return Err(Error::new(
                    ErrorKind::Failed,
                    "a write was planned that covers nothing",
                ));
            }
            self.fill(&plan.pieces, &range, content)?;
            plan.commit()?;
            pos = planned;
        }
        Ok(())
    }

    /// Fills every piece of a plan: `content` inside `range`, the disk's present contents outside.
    fn fill(&self, pieces: &[Piece], range: &DiskRange, content: Content<'_>) -> Result<()> {
        for piece in pieces {
            let whole = piece.start..piece.start + piece.len;
            let new = range.start.max(whole.start)..range.end.min(whole.end);
            if new == whole && !matches!(content, Content::Zeroes) {
                self.put_part(piece.file, piece.at, content, &new, range)?;
            } else {
                self.fill_mixed(piece, whole, new, range, content)?;
            }
        }
        Ok(())
    }

    /// Fills a piece that reaches beyond the new data `new`, or that gets zeroes.
    fn fill_mixed(
        &self,
        piece: &Piece,
        whole: DiskRange,
        new: DiskRange,
        range: &DiskRange,
        content: Content<'_>,
    ) -> Result<()> {
        let keep_before = whole.start..new.start;
        let keep_after = new.end..whole.end;
        let blank = self.reads_as_zero(&keep_before)? && self.reads_as_zero(&keep_after)?;
        let at = |disk: u64| piece.at + (disk - piece.start);
        if blank {
            // Only the new bytes count; what surrounds them is zero.
            if piece.contents != Contents::Zeroes {
                for part in [&keep_before, &keep_after] {
                    if !part.is_empty() {
                        self.put_zeroes(piece.file, at(part.start), part.end - part.start)?;
                    }
                }
            }
            return match content {
                Content::Zeroes if piece.contents == Contents::Zeroes => Ok(()),
                _ => self.put_part(piece.file, at(new.start), content, &new, range),
            };
        }
        let mut pos = whole.start;
        let mut buf = vec![0u8; piece.len.min(COPY_CHUNK) as usize];
        while pos < whole.end {
            let chunk = pos..whole.end.min(pos + COPY_CHUNK);
            let buf = &mut buf[..len(&chunk)];
            // Present contents first, then the new bytes over them.
            let on_disk = chunk.start..chunk.end.min(self.size()).max(chunk.start);
            let (kept, past_end) = buf.split_at_mut(len(&on_disk));
            past_end.fill(0);
            let covered = new.start <= on_disk.start && on_disk.end <= new.end;
            if !covered && !kept.is_empty() {
                self.read_held(on_disk, kept)?;
            }
            let over = new.start.max(chunk.start)..new.end.min(chunk.end);
            if over.start < over.end {
                let target = &mut buf[(over.start - chunk.start) as usize..][..len(&over)];
                match content {
                    Content::Bytes(data) => target.copy_from_slice(
                        &data[(over.start - range.start) as usize..][..len(&over)],
                    ),
                    Content::Zeroes => target.fill(0),
                    Content::From(foreign) => foreign.read(over.start - range.start, target)?,
                }
            }
            self.put(piece.file, at(chunk.start), buf)?;
            pos = chunk.end;
        }
        Ok(())
    }

    /// Whether the range, which may reach past the disk's end, holds nothing but unstored zeroes.
    fn reads_as_zero(&self, range: &DiskRange) -> Result<bool> {
        let inside = range.start..range.end.min(self.size());
        if inside.start >= inside.end {
            return Ok(true);
        }
        let mut list = ExtentList::new();
        self.map.lookup(sectors_around(&inside), &mut list)?;
        Ok(list.iter().all(|e| e.source == Source::Zero))
    }

    /// Makes a range read as zeroes, and gives its space back to image and host where the format
    /// can say that. On a child the parent's data does not come back.
    ///
    /// # Errors
    ///
    /// Those of [`Self::write_at`].
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let range = self.check_range(offset, len)?;
        self.ready_to_write()?;
        let mut pos = range.start;
        while pos < range.end {
            let step = pos..range.end.min((pos / STEP + 1) * STEP);
            let _held = self.locks.exclusive(&step);
            let discarded = self.discard_held(&step);
            self.session.note_write();
            discarded?;
            pos = step.end;
        }
        Ok(())
    }

    /// Makes a range read as zeroes, and keeps the blocks that the image has for it, which
    /// [`Self::discard`] gives back. It makes no new ones where the range reads as zeroes already.
    ///
    /// # Errors
    ///
    /// Those of [`Self::write_at`].
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let range = self.check_range(offset, len)?;
        self.ready_to_write()?;
        let mut pos = range.start;
        while pos < range.end {
            let step = pos..range.end.min((pos / STEP + 1) * STEP);
            let _held = self.locks.exclusive(&step);
            let zeroed = self.zero_held(step.clone());
            self.session.note_write();
            zeroed?;
            pos = step.end;
        }
        Ok(())
    }

    fn discard_held(&self, range: &DiskRange) -> Result<()> {
        let whole = range.start.next_multiple_of(Geometry::SECTOR)
            ..range.end / Geometry::SECTOR * Geometry::SECTOR;
        if whole.start >= whole.end {
            return self.zero_held(range.clone());
        }
        let mut rest = Vec::new();
        self.session.bound_tables(&*self.map)?;
        self.map.unmap(whole.clone(), &mut rest)?;
        for part in [range.start..whole.start, whole.end..range.end] {
            if !part.is_empty() {
                self.zero_held(part)?;
            }
        }
        rest.into_iter().try_for_each(|part| self.zero_held(part))
    }

    /// Writes zeroes over a range where it does not read as zeroes already.
    fn zero_held(&self, range: DiskRange) -> Result<()> {
        let mut list = ExtentList::new();
        let mut pos = range.start;
        while pos < range.end {
            let step = pos..range.end.min((pos / LOOKUP_STEP + 1) * LOOKUP_STEP);
            list.clear();
            self.map.lookup(sectors_around(&step), &mut list)?;
            for extent in list.iter().filter(|e| e.source != Source::Zero) {
                let (part, _) = overlap(extent, &step);
                self.write_held(part, Content::Zeroes)?;
            }
            pos = step.end;
        }
        Ok(())
    }

    /// Makes every write that returned before this call durable. Calls that wait for one another
    /// share one flush: a flush that began after a caller arrived covers that caller.
    ///
    /// # Errors
    ///
    /// Those of the host. After a failure other than [`ErrorKind::NoSpace`] the disk takes no more writes.
    pub fn flush(&self) -> Result<()> {
        if self.read_only.is_some() {
            return Ok(());
        }
        self.session.flush(&*self.map)
    }

    /// Whether anything was written that no flush has covered yet.
    pub fn needs_flush(&self) -> bool {
        self.session.dirty()
    }

    /// Whether tables changed in memory wait for a flush. Without such, only payload may be unsynced,
    /// which the host writes back by itself.
    pub fn tables_dirty(&self) -> bool {
        self.map.caches().into_iter().any(|cache| cache.dirty_pages() > 0)
    }

    /// Flushes and marks the image clean; from then on the disk can only be read. Whoever else holds
    /// it must have finished writing. Closing once more answers what the first time did; after a
    /// flush that failed for want of room it tries again.
    ///
    /// # Errors
    ///
    /// Those of [`Self::flush`].
    pub fn close(&self) -> Result<()> {
        if !self.session.closed() {
            self.flush()?;
        }
        if self.read_only.is_some() {
            return Ok(());
        }
        self.session.close(&*self.map)
    }

    /// The disk's own extents in a range, rounded out to sectors; parents are not looked into.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OutOfRange`] past the end of the disk; those of reading the image's tables.
    pub fn extents(&self, range: DiskRange) -> Result<ExtentList> {
        let range = self.check_range(range.start, range.end.saturating_sub(range.start))?;
        let mut list = ExtentList::new();
        if !range.is_empty() {
            let _held = self.shared(&range);
            self.map.lookup(sectors_around(&range), &mut list)?;
        }
        Ok(list)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if !self.writing() || self.session.closed() {
            return;
        }
        // A failure that latched was logged when it happened.
        if let Err(e) = self.close()
            && !self.session.failed()
        {
            log::error!("{e}; the image was dropped without being closed");
        }
    }
}

/// What a write puts into its range.
#[derive(Clone, Copy)]
enum Content<'a> {
    Bytes(&'a [u8]),
    Zeroes,
    From(&'a Foreign<'a>),
}

fn len(range: &DiskRange) -> usize {
    (range.end - range.start) as usize
}

/// The range rounded out to sectors. The disk's size is a multiple of a sector, so it stays inside.
fn sectors_around(range: &DiskRange) -> DiskRange {
    range.start / Geometry::SECTOR * Geometry::SECTOR..range.end.next_multiple_of(Geometry::SECTOR)
}

/// The part of `range` inside an extent, and how far into the extent it begins.
fn overlap(extent: &map::Extent, range: &DiskRange) -> (DiskRange, u64) {
    let start = extent.start.max(range.start);
    (start..extent.end().min(range.end), start - extent.start)
}

fn read_failed(file: &dyn Storage, at: u64, e: &io::Error) -> Error {
    let error = match e.kind() {
        io::ErrorKind::UnexpectedEof => Error::corrupt("data lies past the end of the file"),
        _ => Error::io("read", e),
    };
    error.in_file(file.path()).at(at)
}

fn write_failed(file: &dyn Storage, at: u64, e: &io::Error) -> Error {
    Error::io("write", e).in_file(file.path()).at(at)
}

/// Syncs a file for a driver's flush. The error never counts as lack of space: what a failed sync
/// should have covered is lost, and waiting for room does not bring it back.
///
/// # Errors
///
/// [`ErrorKind::Io`] where the host fails.
pub fn sync_file(file: &dyn Storage) -> Result<()> {
    synced(file, file.sync())
}

/// [`sync_file`], and for whoever keeps a record what the sync is for.
///
/// # Errors
///
/// [`ErrorKind::Io`] where the host fails.
pub fn sync_file_for(file: &dyn Storage, what: &'static str) -> Result<()> {
    synced(file, file.sync_for(what))
}

fn synced(file: &dyn Storage, result: io::Result<()>) -> Result<()> {
    result.map_err(|e| {
        let error = Error::io("flush", &e);
        let error = match error.kind() {
            ErrorKind::NoSpace => Error::new(ErrorKind::Io, error.what().to_owned()),
            _ => error,
        };
        error.in_file(file.path())
    })
}
