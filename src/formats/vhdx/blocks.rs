//! [`Blocks`]: the disk's blocks as [`BlockMap`], and the answering half of it. What changes blocks
//! is in [`writes`](super::writes), what makes changes durable in [`session`](super::session).

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use smallvec::SmallVec;
use uuid::Uuid;

use super::bat::{BatLayout, ENTRIES_PER_PAGE, Entry, State};
use super::bitmap;
use super::headers::HeaderWriter;
use super::layout::{LOG_SECTOR, MIB};
use super::log::ring::Ring;
use super::overlay::ReplayedFile;
use super::regions::Region;
use crate::codec::read_exact;
use crate::disk::map::{BlockMap, DiskRange, ExtentList, Geometry, Source, WritePlan};
use crate::disk::tables::{PageImage, TableCache};
use crate::disk::writer::{self, Writer};
use crate::error::Result;
use crate::storage::Storage;

/// What is known about an opened file that never changes.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    /// The disk's sizes.
    pub geometry: Geometry,
    /// Division into blocks.
    pub layout: BatLayout,
    /// The BAT.
    pub bat: Region,
    /// Entries of the BAT that the file has.
    pub bat_entries: u64,
    /// Blocks are never given back.
    pub fixed: bool,
    /// Blocks that are not present are the parent's.
    pub has_parent: bool,
    /// What blocks must keep off: header section, log and regions, as byte ranges.
    pub reserved: Vec<Range<u64>>,
}

impl Shape {
    /// Whether `len` bytes at `at` may be a block in a file of `file_len` bytes. The end of the file
    /// may cut it short.
    pub fn may_hold(&self, at: u64, len: u64, file_len: u64) -> bool {
        at.checked_add(len).is_some_and(|end| {
            at < file_len && self.reserved.iter().all(|r| end <= r.start || r.end <= at)
        })
    }

    /// Bytes of the disk in `block`.
    pub fn block_range(&self, block: u64) -> DiskRange {
        let start = block * self.layout.block_size;
        start..start + self.layout.block_size
    }

    /// Where in the file the page is that holds entry `index`, and which entry of the page it is.
    pub fn entry_place(&self, index: u64) -> (u64, u64) {
        let page = self.bat.offset / LOG_SECTOR + index / ENTRIES_PER_PAGE;
        (page, index % ENTRIES_PER_PAGE)
    }

    /// Whether the table has an entry `index`.
    pub fn has_entry(&self, index: u64) -> bool {
        index < self.bat_entries
    }

    /// Bytes of `block` that hold something of the disk: of the last one what is not behind its end.
    pub fn needed(&self, block: u64) -> u64 {
        let start = block * self.layout.block_size;
        self.geometry.size.saturating_sub(start).min(self.layout.block_size)
    }

    /// Whether a file of `file_len` bytes has all bits of `block` of the sector bitmap at byte `at`.
    pub fn has_bits(&self, block: u64, at: u64, file_len: u64) -> bool {
        let (first, _) = self.block_bits(block);
        let sectors = self.needed(block).div_ceil(u64::from(self.geometry.logical_sector));
        self.may_hold(at, MIB, file_len) && at + (first + sectors).div_ceil(8) <= file_len
    }

    /// Index of the first bit of `block` in its sector bitmap, and how many bits it has.
    pub fn block_bits(&self, block: u64) -> (u64, u64) {
        let sectors = self.layout.block_size / u64::from(self.geometry.logical_sector);
        (block % self.layout.chunk_ratio * sectors, sectors)
    }
}

/// The mapping of one opened file.
///
/// Table pages, of the BAT and of sector bitmaps alike, are cached by their place in the file,
/// counted in 4 KiB. A bitmap block never moves and is never given up: a place keeps its meaning.
pub(super) struct Blocks {
    pub shape: Shape,
    pub files: [Arc<dyn Storage>; 1],
    pub cache: TableCache,
    /// Bytes of the file, for judging what lies in it. Grows only.
    pub file_len: Arc<AtomicU64>,
    /// `DataWriteGuid` from the first write on, if it is not to be a new one.
    pub next_data_write: Option<Uuid>,
    pub writer: Writer,
    /// Header and log. Taken before changes.
    pub session: Mutex<LogState>,
}

/// Header, log, and what is between the log and its place in the file.
#[derive(Debug)]
pub(super) struct LogState {
    pub headers: HeaderWriter,
    /// The file as its log makes it, if it needs replaying.
    pub replayed: Option<Arc<ReplayedFile>>,
    /// The log, while it is in use.
    pub ring: Option<Ring>,
    /// The log's place was a hole of the host's file, and is to be one again.
    pub sparse_log: bool,
    /// Pages that the log holds durably and that could not be written to their place. Nothing more goes
    /// into the log before they are there.
    pub unapplied: Vec<PageImage>,
}

/// How far [`Blocks::lookup_page`] came.
enum Step {
    /// To this byte of the disk.
    To(u64),
    /// To this block, at this byte of the file, whose bitmap must be asked.
    Bitmap(u64, u64),
}

impl Blocks {
    pub fn file(&self) -> &dyn Storage {
        &*self.files[0]
    }

    /// Loads what the file has of a page of a table. Nobody asks for the rest but to mark it, which
    /// happens in a session, where the file has all of it.
    pub fn load(&self, page: u64) -> impl FnMut(&mut [u8]) -> Result<()> {
        move |buf| {
            let at = page * LOG_SECTOR;
            let stored = self.file_len.load(Ordering::Acquire).saturating_sub(at).min(LOG_SECTOR);
            read_exact(self.file(), at, &mut buf[..stored as usize], "table page")
        }
    }

    /// The entry at `index` of the BAT.
    pub fn entry(&self, index: u64) -> Result<Entry> {
        if !self.shape.has_entry(index) {
            return Ok(Entry(u64::MAX));
        }
        let (page, slot) = self.shape.entry_place(index);
        self.cache.read(page, self.load(page), |bytes| Entry::get(bytes, slot))
    }

    /// Where the sector bitmap of a block's chunk lies, if there is one. The end of the file may cut it
    /// short.
    pub fn bitmap_at(&self, block: u64) -> Result<Option<u64>> {
        let entry = self.entry(self.shape.layout.bitmap_entry(block))?;
        let file_len = self.file_len.load(Ordering::Acquire);
        // Bitmap entries know no state but 6; another program has been seen to read 7 as that.
        let present = matches!(entry.state(), State::Present | State::Partial)
            && self.shape.may_hold(entry.offset(), MIB, file_len);
        Ok(present.then(|| entry.offset()))
    }

    /// Answers for blocks whose entries are in one page of the BAT.
    fn lookup_page(&self, want: DiskRange, out: &mut ExtentList) -> Result<Step> {
        let layout = &self.shape.layout;
        let first = layout.block_entry(want.start / layout.block_size);
        if !self.shape.has_entry(first) {
            out.push(want.start, want.end - want.start, Source::Bad);
            return Ok(Step::To(want.end));
        }
        let file_len = self.file_len.load(Ordering::Acquire);
        let (page, _) = self.shape.entry_place(first);
        self.cache.read(page, self.load(page), |bytes| {
            let mut pos = want.start;
            while pos < want.end {
                let block = pos / layout.block_size;
                let index = layout.block_entry(block);
                let (its_page, slot) = self.shape.entry_place(index);
                if its_page != page || !self.shape.has_entry(index) {
                    break;
                }
                let entry = Entry::get(bytes, slot);
                let part = pos..want.end.min((block + 1) * layout.block_size);
                let len = part.end - part.start;
                match entry.state() {
                    State::NotPresent if self.shape.has_parent => {
                        out.push(pos, len, Source::Parent);
                    }
                    State::NotPresent | State::Undefined | State::Zero | State::Unmapped => {
                        out.push(pos, len, Source::Zero);
                    }
                    State::Partial if self.shape.has_parent => {
                        return Step::Bitmap(block, entry.offset());
                    }
                    State::Present | State::Partial => {
                        self.push_stored(part.clone(), entry.offset(), file_len, out);
                    }
                    State::Invalid => out.push(pos, len, Source::Bad),
                }
                pos = part.end;
            }
            Step::To(pos)
        })
    }

    /// Appends a part of one block that is stored in the block at byte `at` of the file.
    fn push_stored(&self, part: DiskRange, at: u64, file_len: u64, out: &mut ExtentList) {
        let block_size = self.shape.layout.block_size;
        let len = part.end - part.start;
        if !self.shape.may_hold(at, block_size, file_len) {
            out.push(part.start, len, Source::Bad);
            return;
        }
        let at = at + part.start % block_size;
        let stored = file_len.saturating_sub(at).min(len) / Geometry::SECTOR * Geometry::SECTOR;
        if stored > 0 {
            out.push(part.start, stored, Source::File { file: 0, at });
        }
        if stored < len {
            // Lost with the end of the file.
            out.push(part.start + stored, len - stored, Source::Bad);
        }
    }

    /// Answers for a part of one block, stored at byte `at` of the file, sector by sector.
    fn lookup_bitmap(&self, part: DiskRange, at: u64, out: &mut ExtentList) -> Result<()> {
        let block = part.start / self.shape.layout.block_size;
        let Some(bitmap_at) = self.bitmap_at(block)? else {
            out.push(part.start, part.end - part.start, Source::Bad);
            return Ok(());
        };
        let file_len = self.file_len.load(Ordering::Acquire);
        let sector = u64::from(self.shape.geometry.logical_sector);
        let block_start = self.shape.block_range(block).start;
        let (first_bit, _) = self.shape.block_bits(block);
        let bits = first_bit + (part.start - block_start) / sector
            ..first_bit + (part.end - block_start).div_ceil(sector);
        for (page, in_page) in bitmap::pages(bitmap_at, &bits) {
            let page_bit = bitmap::first_bit(bitmap_at, page);
            // Where on the disk a run of the page's bits is.
            let on_disk = |run: Range<u64>| {
                let start = block_start + (page_bit + run.start - first_bit) * sector;
                let end = block_start + (page_bit + run.end - first_bit) * sector;
                start.max(part.start)..end.min(part.end)
            };
            // Bits that the end of the file cuts off are unknown.
            let known = in_page.end.min(bitmap::bits_before(file_len, page)).max(in_page.start);
            self.cache.read(page, self.load(page), |bytes| {
                bitmap::runs(bytes, in_page.start..known, |run, set| {
                    let run = on_disk(run);
                    if set {
                        self.push_stored(run, at, file_len, out);
                    } else {
                        out.push(run.start, run.end - run.start, Source::Parent);
                    }
                });
            })?;
            let unknown = on_disk(known..in_page.end);
            if !unknown.is_empty() {
                out.push(unknown.start, unknown.end - unknown.start, Source::Bad);
            }
        }
        Ok(())
    }
}

impl BlockMap for Blocks {
    fn geometry(&self) -> &Geometry {
        &self.shape.geometry
    }

    fn files(&self) -> &[Arc<dyn Storage>] {
        &self.files
    }

    fn lookup(&self, want: DiskRange, out: &mut ExtentList) -> Result<()> {
        let mut pos = want.start;
        while pos < want.end {
            pos = match self.lookup_page(pos..want.end, out)? {
                Step::To(pos) => pos,
                Step::Bitmap(block, at) => {
                    let block = self.shape.block_range(block);
                    let part = block.start.max(pos)..want.end.min(block.end);
                    let end = part.end;
                    self.lookup_bitmap(part, at, out)?;
                    end
                }
            };
        }
        Ok(())
    }

    fn fixed(&self) -> bool {
        self.shape.fixed
    }

    fn begin_writes(&self) -> Result<()> {
        self.begin_session()
    }

    fn prepare_write(&self, want: DiskRange) -> Result<WritePlan<'_>> {
        self.plan(want)
    }

    fn unmap(&self, want: DiskRange, rest: &mut Vec<DiskRange>) -> Result<()> {
        self.unmap_blocks(want, rest)
    }

    fn flush(&self) -> Result<()> {
        writer::flush(self)
    }

    fn caches(&self) -> SmallVec<[&TableCache; 2]> {
        SmallVec::from_slice(&[&self.cache])
    }

    fn close(&self) -> Result<()> {
        self.end_session()
    }
}
