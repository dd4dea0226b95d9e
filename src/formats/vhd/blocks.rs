//! The disk with a BAT: blocks of data, each behind its sector bitmap.
//!
//! Dynamic disks ignore the bitmaps when reading: what programs that never set a bit have written
//! counts as data. Blocks are allocated whole, with all bits set and zeroes where nothing was
//! written. What differs for differencing disks is in [`super::differencing`].
//!
//! # Invariants
//!
//! - `data_end` is raised before an entry of a block beyond the old value is set.
//! - Once writing has begun, every entry was checked: none leads outside the file, into a structure
//!   or into another block.
//! - A block in `freed` may still be pointed at by the BAT in the file and is not touched.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use smallvec::SmallVec;
use zerocopy::IntoBytes;

use super::bat::{Bat, entry, set_entry};
use super::batmap::Bits;
use super::bitmaps::SectorBitmaps;
use super::footers::Footers;
use super::layout::{DiskType, FOOTER, SECTOR, UNUSED};
use super::space::{Slot, Space};
use super::structure::{Structure, overlap};
use super::survey::Survey;
use crate::codec;
use crate::disk::map::{BlockMap, DiskRange, ExtentList, Geometry, Piece, Source, WritePlan};
use crate::disk::room::TableRoom;
use crate::disk::sync_file;
use crate::disk::tables::{CacheBudget, CacheStats, PageImage};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::Severity;
use crate::storage::Storage;

/// Most blocks that one plan allocates.
const MAX_PLAN: u64 = 64;
/// Changed pages of BAT and bitmaps that may wait in memory for a flush, at most 8 MiB.
const MAX_DIRTY_PAGES: usize = 2048;

/// The mapping of a dynamic or differencing disk.
#[derive(Debug)]
pub(super) struct SparseMap {
    files: [Arc<dyn Storage>; 1],
    geometry: Geometry,
    pub(super) structure: Structure,
    footers: Footers,
    pub(super) bat: Bat,
    /// Which sectors are the disk's own, if it is a differencing one.
    pub(super) bitmaps: Option<SectorBitmaps>,
    /// Which bitmaps have space of the host.
    pub(super) room: TableRoom,
    /// Where the trailing footer begins: no data lies beyond.
    data_end: AtomicU64,
    /// One flush at a time: who finds that another one has taken the changes waits until they are
    /// durable. Holds why one failed for good: what it should have made durable is lost, whatever later
    /// ones achieve. Taken before `writing`.
    flushing: Mutex<Option<Error>>,
    /// What writing needs, from its beginning on.
    writing: Mutex<Option<Writing>>,
}

/// State of an image that is being written.
#[derive(Debug)]
struct Writing {
    space: Space,
    /// Blocks unmapped since the last flush.
    freed: Vec<u64>,
    batmap: Option<Bits>,
}

/// What a BAT entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Not stored.
    Unused,
    /// Data at `data`, of which `available` bytes lie inside the file.
    Stored { data: u64, available: u64 },
    /// The entry contradicts the file.
    Bad,
}

/// What a plan holds until it is committed.
pub(super) enum Reserved {
    /// Room for whole blocks: `slots[i]` for block `first + i`.
    Blocks { first: u64, slots: SmallVec<[Slot; 4]> },
    /// Sectors of one block, `bytes` counted from the block's beginning; the block itself is new
    /// if there is a slot for it.
    Sectors { block: u64, bytes: Range<u64>, bitmap_at: u64, slot: Option<Slot> },
}

/// What a flush has taken out of memory to write it.
struct Taken {
    bat: Vec<PageImage>,
    bitmaps: Vec<PageImage>,
    freed: Vec<u64>,
    batmap: Option<Vec<u8>>,
}

impl SparseMap {
    /// Maps the disk described by `structure`.
    pub(super) fn new(
        file: Arc<dyn Storage>,
        footers: Footers,
        structure: Structure,
        budget: &Arc<CacheBudget>,
    ) -> Self {
        let geometry = Geometry {
            size: structure.size,
            logical_sector: SECTOR as u32,
            physical_sector: SECTOR as u32,
            block_size: structure.block_size,
        };
        let differencing = footers.disk_type == DiskType::Differencing;
        let bitmaps =
            differencing.then(|| SectorBitmaps::new(file.clone(), structure.bitmap_size, budget));
        Self {
            bat: Bat::new(file.clone(), &structure, budget),
            bitmaps,
            room: TableRoom::default(),
            data_end: AtomicU64::new(footers.data_end),
            flushing: Mutex::new(None),
            writing: Mutex::new(None),
            files: [file],
            geometry,
            structure,
            footers,
        }
    }

    pub(super) fn file(&self) -> &dyn Storage {
        &*self.files[0]
    }

    /// Where the block is that `entry` points at.
    pub(super) fn place(&self, entry: u32) -> Place {
        if entry == UNUSED {
            return Place::Unused;
        }
        let at = u64::from(entry) * SECTOR;
        let whole = at..at + self.structure.stride();
        if self.structure.reserved.iter().any(|range| overlap(range, &whole)) {
            return Place::Bad;
        }
        let data = at + self.structure.bitmap_size;
        let inside = self.data_end.load(Ordering::Relaxed).saturating_sub(data);
        let available = inside.min(self.structure.block_size) / SECTOR * SECTOR;
        if available == 0 { Place::Bad } else { Place::Stored { data, available } }
    }

    /// Checks the whole BAT; its first error is why the image is not written.
    fn survey(&self) -> Result<Survey> {
        let mut first = None;
        let survey = Survey::run(self.file(), &self.structure, self.footers.data_end, &mut |p| {
            if p.severity == Severity::Error {
                first.get_or_insert(p);
            }
        })?;
        match first {
            None => Ok(survey),
            Some(p) => Err(Error::corrupt(format!("not written, the BAT is damaged: {}", p.what))
                .at(p.at)
                .in_file(self.file().path())
                .hint("flatdisk check lists the damage")),
        }
    }

    /// Makes the footer's copy at the beginning what it should be, durably.
    fn repair_head(&self, footer: &[u8; FOOTER as usize]) -> Result<()> {
        let head = codec::read_array::<{ FOOTER as usize }>(self.file(), 0, "the footer copy")?;
        if head == *footer {
            return Ok(());
        }
        codec::write_all(self.file(), 0, footer, "the footer copy")?;
        sync_file(self.file())
    }

    /// The batmap's bits. All of them are taken back where the checksum says they are not to be
    /// trusted.
    fn load_batmap(&self) -> Result<Option<Bits>> {
        let Some(batmap) = &self.structure.batmap else { return Ok(None) };
        let (mut bits, intact) = batmap.load(self.file(), self.structure.blocks)?;
        if !intact {
            bits.clear_all();
        }
        Ok(Some(bits))
    }

    /// Takes room for up to `count` blocks, at least one.
    pub(super) fn reserve(&self, count: u64) -> Result<SmallVec<[Slot; 4]>> {
        let mut writing = self.writing.lock();
        let Some(writing) = &mut *writing else { return Err(not_writing()) };
        let mut slots = SmallVec::new();
        while (slots.len() as u64) < count {
            match writing.space.take() {
                Ok(slot) => slots.push(slot),
                Err(e) if slots.is_empty() => return Err(e),
                Err(_) => break,
            }
        }
        self.data_end.store(writing.space.footer_at(), Ordering::Relaxed);
        Ok(slots)
    }

    /// Gives room back that may have been written to.
    pub(super) fn give_back<'a>(&self, slots: impl IntoIterator<Item = &'a Slot>) {
        if let Some(writing) = &mut *self.writing.lock() {
            for slot in slots {
                writing.space.give_back(Slot { zeroed: false, ..*slot });
            }
        }
    }

    /// Points the entries of new blocks at `slots`, from block `first` on and within a page of the
    /// BAT, then runs `also`, as one step for a flush.
    pub(super) fn point_at(
        &self,
        first: u64,
        slots: &[Slot],
        also: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let mut writing = self.writing.lock();
        let Some(writing) = &mut *writing else { return Err(not_writing()) };
        if !slots.is_empty() {
            // The page was in memory for the lookup just before. If it has left since, it is read
            // here, and this is the only reading under the lock.
            self.bat.update(first, |entries| {
                for (slot, block) in slots.iter().zip(first..) {
                    set_entry(entries, block, (slot.at / SECTOR) as u32);
                }
            })?;
        }
        also()?;
        if let Some(bits) = &mut writing.batmap {
            (first..).take(slots.len()).for_each(|block| bits.clear(block));
        }
        Ok(())
    }

    /// Plans whole blocks. Nothing points at their bitmaps yet, so these are written right away.
    fn plan_blocks(&self, want: &DiskRange) -> Result<WritePlan> {
        let size = self.structure.block_size;
        let first = want.start / size;
        let count = want.end.div_ceil(size).min(Bat::same_page(first).end) - first;
        let slots = self.reserve(count.min(MAX_PLAN))?;
        let full = vec![0xff; self.structure.bitmap_size as usize];
        slots
            .iter()
            .try_for_each(|slot| codec::write_all(self.file(), slot.at, &full, "a sector bitmap"))
            .inspect_err(|_| self.give_back(&slots))?;
        let pieces = slots.iter().zip(first..).map(|(slot, block)| Piece {
            start: block * size,
            len: size,
            file: 0,
            at: slot.at + self.structure.bitmap_size,
            zeroed: slot.zeroed,
        });
        Ok(WritePlan {
            pieces: pieces.collect(),
            token: Box::new(Reserved::Blocks { first, slots }),
        })
    }

    /// Clears the entries of `blocks`, all in one page of the BAT.
    pub(super) fn unmap_in_page(&self, blocks: Range<u64>) -> Result<()> {
        let any = |entries: &[u8]| blocks.clone().any(|block| entry(entries, block) != UNUSED);
        if !self.bat.read(blocks.start, any)? {
            return Ok(());
        }
        let mut writing = self.writing.lock();
        let Some(Writing { freed, batmap, .. }) = &mut *writing else { return Err(not_writing()) };
        self.bat.update(blocks.start, |entries| {
            for block in blocks.clone() {
                let sector = entry(entries, block);
                if sector != UNUSED {
                    set_entry(entries, block, UNUSED);
                    freed.push(u64::from(sector) * SECTOR);
                    batmap.iter_mut().for_each(|bits| bits.clear(block));
                }
            }
        })
    }

    /// Takes what has to be written out of memory.
    fn take(&self) -> Taken {
        let mut writing = self.writing.lock();
        let bitmaps = self.bitmaps.as_ref().map(|bitmaps| bitmaps.cache().snapshot());
        let mut taken = Taken {
            bat: self.bat.cache().snapshot(),
            bitmaps: bitmaps.unwrap_or_default(),
            freed: Vec::new(),
            batmap: None,
        };
        if let Some(writing) = &mut *writing {
            taken.freed = std::mem::take(&mut writing.freed);
            if let Some(bits) = writing.batmap.as_mut().filter(|bits| bits.changed) {
                bits.changed = false;
                taken.batmap = Some(bits.bytes().to_vec());
            }
        }
        taken
    }

    /// Writes the tables, in the order that the module [`super`] gives the reasons for.
    fn write_out(&self, taken: &Taken) -> Result<()> {
        if let (Some(batmap), Some(bytes)) = (&self.structure.batmap, &taken.batmap) {
            batmap.write(self.file(), bytes)?;
        }
        sync_file(self.file())?;
        if let Some(bitmaps) = &self.bitmaps {
            bitmaps.write(&taken.bitmaps, |block| self.bitmap_of(block))?;
        }
        self.bat.write(&taken.bat)?;
        sync_file(self.file())
    }

    /// Flushes when very much waits in memory.
    pub(super) fn bound_dirty_pages(&self) -> Result<()> {
        if self.dirty_pages() < MAX_DIRTY_PAGES { Ok(()) } else { self.flush_tables() }
    }

    fn dirty_pages(&self) -> usize {
        let bitmaps = self.bitmaps.as_ref().map_or(0, |bitmaps| bitmaps.cache().dirty_pages());
        self.bat.cache().dirty_pages() + bitmaps
    }

    /// Makes payload and tables durable.
    fn flush_tables(&self) -> Result<()> {
        let mut failure = self.flushing.lock();
        if let Some(failure) = &*failure {
            return Err(failure.clone());
        }
        let taken = self.take();
        if taken.bat.is_empty() && taken.bitmaps.is_empty() && taken.batmap.is_none() {
            return sync_file(self.file()).inspect_err(|e| *failure = Some(e.clone()));
        }
        if let Err(e) = self.write_out(&taken) {
            self.put_back(taken);
            if e.kind() != ErrorKind::NoSpace {
                *failure = Some(e.clone());
            }
            return Err(e);
        }
        self.bat.cache().retire(&taken.bat);
        if let Some(bitmaps) = &self.bitmaps {
            bitmaps.cache().retire(&taken.bitmaps);
        }
        self.release(taken.freed);
        Ok(())
    }

    /// Puts back what could not be written.
    fn put_back(&self, mut taken: Taken) {
        let mut writing = self.writing.lock();
        self.bat.cache().restore(&taken.bat);
        if let Some(bitmaps) = &self.bitmaps {
            bitmaps.cache().restore(&taken.bitmaps);
        }
        if let Some(writing) = &mut *writing {
            writing.freed.append(&mut taken.freed);
            if let Some(bits) = writing.batmap.as_mut().filter(|_| taken.batmap.is_some()) {
                bits.changed = true;
            }
        }
    }

    /// Makes freed blocks reusable and gives their space back to the host. The BAT in the file
    /// points at them no more.
    fn release(&self, freed: Vec<u64>) {
        let stride = self.structure.stride();
        let punched = |at| self.file().punch_hole(at, stride).is_ok();
        let slots: Vec<_> = freed.into_iter().map(|at| Slot { at, zeroed: punched(at) }).collect();
        if let Some(writing) = &mut *self.writing.lock() {
            slots.into_iter().for_each(|slot| writing.space.give_back(slot));
        }
    }
}

impl BlockMap for SparseMap {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn files(&self) -> &[Arc<dyn Storage>] {
        &self.files
    }

    fn lookup(&self, want: DiskRange, out: &mut ExtentList) -> Result<()> {
        let size = self.structure.block_size;
        let covered = want.end.min(self.structure.blocks * size);
        if let Some(bitmaps) = &self.bitmaps {
            self.lookup_sectors(bitmaps, want.start..covered, out)?;
        } else {
            let mut pos = want.start;
            while pos < covered {
                let first = pos / size;
                let until = covered.min(Bat::same_page(first).end * size);
                pos = self.bat.read(first, |entries| {
                    while pos < until {
                        let block = pos / size;
                        let skip = pos % size;
                        let len = (size - skip).min(until - pos);
                        match self.place(entry(entries, block)) {
                            Place::Unused => out.push(pos, len, Source::Zero),
                            Place::Stored { data, available } => {
                                push_stored(out, pos, len, data, skip, available);
                            }
                            Place::Bad => out.push(pos, len, Source::Bad),
                        }
                        pos += len;
                    }
                    pos
                })?;
            }
        }
        let rest = want.start.max(covered);
        if rest < want.end {
            out.push(rest, want.end - rest, Source::Bad);
        }
        Ok(())
    }

    fn begin_writes(&self) -> Result<()> {
        let mut writing = self.writing.lock();
        let survey = self.survey()?;
        let mut footer = [0; FOOTER as usize];
        footer.copy_from_slice(self.footers.footer.as_bytes());
        if self.footers.renewed && self.footers.trailing.intact() {
            codec::write_all(self.file(), self.footers.data_end, &footer, "the footer")?;
            sync_file(self.file())?;
        }
        // From here on the copy stands in whenever the trailing footer is on the move.
        self.repair_head(&footer)?;
        let batmap = self.load_batmap()?;
        let footer_at = self.footers.trailing.intact().then_some(self.footers.data_end);
        let file = self.files[0].clone();
        let file_len = self.footers.file_len;
        let space = Space::new(file, &self.structure, &survey, footer, footer_at, file_len)?;
        self.data_end.store(space.footer_at(), Ordering::Relaxed);
        *writing = Some(Writing { space, freed: Vec::new(), batmap });
        Ok(())
    }

    fn prepare_write(&self, want: DiskRange) -> Result<WritePlan> {
        self.bound_dirty_pages()?;
        match &self.bitmaps {
            Some(bitmaps) => self.plan_sectors(bitmaps, &want),
            None => self.plan_blocks(&want),
        }
    }

    fn commit_write(&self, plan: WritePlan) -> Result<()> {
        let reserved = plan.token.downcast::<Reserved>().map_err(|_| foreign_plan())?;
        match *reserved {
            Reserved::Blocks { first, slots } => {
                self.point_at(first, &slots, || Ok(())).inspect_err(|_| self.give_back(&slots))
            }
            Reserved::Sectors { block, bytes, bitmap_at, slot } => {
                self.commit_sectors(block, bytes, bitmap_at, slot)
            }
        }
    }

    fn abort_write(&self, plan: WritePlan) {
        match plan.token.downcast::<Reserved>().map(|reserved| *reserved) {
            Ok(Reserved::Blocks { slots, .. }) => self.give_back(&slots),
            Ok(Reserved::Sectors { slot, .. }) => self.give_back(&slot),
            Err(_) => {}
        }
    }

    fn unmap(&self, want: DiskRange, rest: &mut Vec<DiskRange>) -> Result<()> {
        let size = self.structure.block_size;
        // The last block ends with the disk.
        let at_end = want.end == self.structure.size;
        let past = if at_end { self.structure.blocks } else { want.end / size };
        let first = want.start.div_ceil(size);
        if first >= past || self.bitmaps.is_some() {
            rest.push(want);
            return Ok(());
        }
        let whole = first * size..want.end.min(past * size);
        if want.start < whole.start {
            rest.push(want.start..whole.start);
        }
        let mut block = first;
        while block < past {
            self.bound_dirty_pages()?;
            let until = past.min(Bat::same_page(block).end);
            self.unmap_in_page(block..until)?;
            block = until;
        }
        if whole.end < want.end {
            rest.push(whole.end..want.end);
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.flush_tables()
    }

    fn dirty(&self) -> bool {
        self.dirty_pages() > 0
    }

    fn close(&self) -> Result<()> {
        if let Some(failure) = &*self.flushing.lock() {
            return Err(failure.clone());
        }
        if self.dirty() {
            self.flush_tables()?;
        }
        let mut writing = self.writing.lock();
        let Some(Writing { space, .. }) = &mut *writing else { return Ok(()) };
        let (place, file) = (space.trim(), self.file());
        let failed = |e| Error::io("truncating", &e).in_file(file.path()).at(place);
        // The length may differ where extending the file failed half way.
        if place == space.footer_at() && file.len().map_err(failed)? == place + FOOTER {
            return Ok(());
        }
        match codec::write_all(file, place, self.footers.bytes(), "the footer") {
            // On a full host the footer stays where it is, and with it the space before it.
            Err(e) if e.kind() == ErrorKind::NoSpace => return sync_file(file),
            written => written?,
        }
        sync_file(file)?;
        file.set_len(place + FOOTER).map_err(failed)
    }

    fn cache_stats(&self) -> CacheStats {
        let mut stats = self.bat.cache().stats();
        if let Some(bitmaps) = &self.bitmaps {
            let more = bitmaps.cache().stats();
            stats.hits += more.hits;
            stats.misses += more.misses;
            stats.pages += more.pages;
            stats.dirty += more.dirty;
        }
        stats
    }
}

fn not_writing() -> Error {
    Error::new(ErrorKind::Failed, "the image was changed before writing had begun")
}

fn foreign_plan() -> Error {
    Error::new(ErrorKind::Failed, "a plan that this driver did not make")
}

/// Adds `len` bytes from `skip` of a stored block; what lies past the end of the file is lost.
pub(super) fn push_stored(
    out: &mut ExtentList,
    pos: u64,
    len: u64,
    data: u64,
    skip: u64,
    available: u64,
) {
    let here = len.min(available.saturating_sub(skip));
    if here > 0 {
        out.push(pos, here, Source::File { file: 0, at: data + skip });
    }
    if here < len {
        out.push(pos + here, len - here, Source::Bad);
    }
}
