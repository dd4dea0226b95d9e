//! The disk with a BAT: blocks of data, each behind its sector bitmap.
//!
//! Dynamic disks ignore the bitmaps when reading: what programs that never set a bit have written
//! counts as data. Blocks are allocated whole, with all bits set and zeroes where nothing was
//! written. In differencing disks the bitmap decides for each sector whether the parent is asked.
//!
//! # Invariants
//!
//! - [`SparseMap::data_end`] is raised before an entry of a block beyond the old value is set.
//! - Once writing has begun, every entry was checked: none leads outside the file, into a structure
//!   or into another block.
//! - A slot in `freed` may still be pointed at by the BAT on disk and is not touched.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use smallvec::SmallVec;
use zerocopy::IntoBytes;

use super::batmap::Bits;
use super::footers::Footers;
use super::layout::{FOOTER, SECTOR, UNUSED};
use super::space::{Slot, Space};
use super::structure::{Structure, overlap};
use super::survey::Survey;
use crate::codec;
use crate::disk::map::{BlockMap, DiskRange, ExtentList, Geometry, Piece, Source, WritePlan};
use crate::disk::sync_file;
use crate::disk::tables::{CacheBudget, CacheStats, PageImage, TableCache};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::Severity;
use crate::storage::Storage;

/// Bytes of the BAT in one page of the cache.
const BAT_PAGE: u64 = 4096;
/// Entries in one page.
const PAGE_ENTRIES: u64 = BAT_PAGE / 4;
/// Most blocks that one plan allocates.
const MAX_PLAN: u64 = 64;

/// The mapping of a dynamic disk.
#[derive(Debug)]
pub(super) struct SparseMap {
    files: [Arc<dyn Storage>; 1],
    geometry: Geometry,
    structure: Structure,
    footers: Footers,
    bat: TableCache,
    /// Where the trailing footer begins: no data lies beyond.
    data_end: AtomicU64,
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
enum Place {
    /// Not stored.
    Unused,
    /// Data at `data`, of which `available` bytes lie inside the file.
    Stored { data: u64, available: u64 },
    /// The entry contradicts the file.
    Bad,
}

/// Blocks reserved by a plan: `slots[i]` is for block `first + i`.
struct Reserved {
    first: u64,
    slots: SmallVec<[Slot; 4]>,
}

/// What a flush has taken out of memory to write it.
struct Taken {
    bat: Vec<PageImage>,
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
        Self {
            files: [file],
            geometry,
            bat: TableCache::new(BAT_PAGE as usize, budget),
            data_end: AtomicU64::new(footers.data_end),
            writing: Mutex::new(None),
            structure,
            footers,
        }
    }

    fn file(&self) -> &dyn Storage {
        &*self.files[0]
    }

    /// Fills a page of the BAT from the file.
    fn load_bat(&self, page: u64, buf: &mut [u8]) -> Result<()> {
        let len = self.bat_page_len(page);
        codec::read_exact(
            self.file(),
            self.structure.table_at + page * BAT_PAGE,
            &mut buf[..len],
            "the BAT",
        )
    }

    /// Bytes of a page that belong to the BAT.
    fn bat_page_len(&self, page: u64) -> usize {
        (self.structure.table_entries * 4 - page * BAT_PAGE).min(BAT_PAGE) as usize
    }

    /// Where the block is that `entry` points at.
    fn place(&self, entry: u32) -> Place {
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

    /// Takes what has to be written out of memory.
    fn take(&self) -> Taken {
        let mut writing = self.writing.lock();
        let mut taken = Taken { bat: self.bat.snapshot(), freed: Vec::new(), batmap: None };
        if let Some(writing) = &mut *writing {
            taken.freed = std::mem::take(&mut writing.freed);
            if let Some(bits) = writing.batmap.as_mut().filter(|bits| bits.changed) {
                bits.changed = false;
                taken.batmap = Some(bits.bytes().to_vec());
            }
        }
        taken
    }

    /// Puts back what could not be written.
    fn put_back(&self, mut taken: Taken) {
        let mut writing = self.writing.lock();
        self.bat.restore(&taken.bat);
        if let Some(writing) = &mut *writing {
            writing.freed.append(&mut taken.freed);
            if let Some(bits) = writing.batmap.as_mut().filter(|_| taken.batmap.is_some()) {
                bits.changed = true;
            }
        }
    }

    fn write_out(&self, taken: &Taken) -> Result<()> {
        if let (Some(batmap), Some(bytes)) = (&self.structure.batmap, &taken.batmap) {
            batmap.write(self.file(), bytes)?;
        }
        sync_file(self.file())?;
        for (page, bytes) in &taken.bat {
            let at = self.structure.table_at + page * BAT_PAGE;
            codec::write_all(self.file(), at, &bytes[..self.bat_page_len(*page)], "the BAT")?;
        }
        sync_file(self.file())
    }

    /// Makes freed blocks reusable and gives their space back to the host. The BAT on disk points
    /// at them no more.
    fn release(&self, freed: Vec<u64>) {
        let slots: Vec<Slot> = freed
            .into_iter()
            .map(|at| {
                let punched = self.file().punch_hole(at, self.structure.stride());
                Slot { at, zeroed: punched.is_ok() }
            })
            .collect();
        if let Some(writing) = &mut *self.writing.lock() {
            slots.into_iter().for_each(|slot| writing.space.give_back(slot));
        }
    }

    /// Takes room for up to `count` blocks, at least one.
    fn reserve(&self, count: u64) -> Result<SmallVec<[Slot; 4]>> {
        let mut writing = self.writing.lock();
        let Some(writing) = &mut *writing else {
            return Err(Error::new(ErrorKind::Failed, "a write was planned before writing began"));
        };
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

    fn give_back(&self, slots: &[Slot]) {
        if let Some(writing) = &mut *self.writing.lock() {
            for slot in slots {
                writing.space.give_back(Slot { zeroed: false, ..*slot });
            }
        }
    }

    /// Sets all bits of new blocks' bitmaps. Nothing points at them yet, so no order matters.
    fn fill_bitmaps(&self, slots: &[Slot]) -> Result<()> {
        let ones = vec![0xff; self.structure.bitmap_size as usize];
        slots
            .iter()
            .try_for_each(|slot| codec::write_all(self.file(), slot.at, &ones, "a sector bitmap"))
    }
}

/// The entry of a block in its BAT page.
fn entry(page: &[u8], block: u64) -> u32 {
    let at = entry_at(block);
    page.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(UNUSED, u32::from_be_bytes)
}

fn set_entry(page: &mut [u8], block: u64, value: u32) {
    let at = entry_at(block);
    page[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn entry_at(block: u64) -> usize {
    (block % PAGE_ENTRIES) as usize * 4
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
        let mut pos = want.start;
        while pos < want.end {
            if pos / size >= self.structure.blocks {
                out.push(pos, want.end - pos, Source::Bad);
                break;
            }
            let page = pos / size / PAGE_ENTRIES;
            let page_blocks = ((page + 1) * PAGE_ENTRIES).min(self.structure.blocks);
            let until = want.end.min(page_blocks * size);
            let load = |buf: &mut [u8]| self.load_bat(page, buf);
            pos = self.bat.read(page, load, |entries| {
                while pos < until {
                    let block = pos / size;
                    let skip = pos % size;
                    let len = (size - skip).min(until - pos);
                    match self.place(entry(entries, block)) {
                        Place::Unused => out.push(pos, len, Source::Zero),
                        Place::Stored { data, available } => {
                            push_stored(out, pos, len, data + skip, available.saturating_sub(skip));
                        }
                        Place::Bad => out.push(pos, len, Source::Bad),
                    }
                    pos += len;
                }
                pos
            })?;
        }
        Ok(())
    }

    fn begin_writes(&self) -> Result<()> {
        let mut writing = self.writing.lock();
        let mut first = None;
        let survey = Survey::run(self.file(), &self.structure, self.footers.data_end, &mut |p| {
            if p.severity == Severity::Error {
                first.get_or_insert(p);
            }
        })?;
        if let Some(problem) = first {
            return Err(Error::corrupt(format!(
                "not written, the BAT is damaged: {}",
                problem.what
            ))
            .at(problem.at)
            .in_file(self.file().path())
            .hint("flatdisk check lists the damage"));
        }
        // From here on the copy at the beginning stands in whenever the footer is on the move.
        let footer: [u8; FOOTER as usize] =
            self.footers.footer.as_bytes().try_into().map_err(|_| {
                Error::new(ErrorKind::Failed, "the footer has another size than its layout")
            })?;
        let head = codec::read_array::<{ FOOTER as usize }>(self.file(), 0, "the footer copy")?;
        if head != footer {
            codec::write_all(self.file(), 0, &footer, "the footer copy")?;
            sync_file(self.file())?;
        }
        let batmap = match &self.structure.batmap {
            None => None,
            Some(batmap) => {
                let (mut bits, intact) = batmap.load(self.file(), self.structure.blocks)?;
                if !intact {
                    bits.clear_all();
                }
                Some(bits)
            }
        };
        let footer_at = self.footers.trailing.intact().then_some(self.footers.data_end);
        let file_len = self.footers.file_len;
        let space = Space::new(
            self.files[0].clone(),
            &self.structure,
            &survey,
            footer,
            footer_at,
            file_len,
        )?;
        self.data_end.store(space.footer_at(), Ordering::Relaxed);
        *writing = Some(Writing { space, freed: Vec::new(), batmap });
        Ok(())
    }

    fn prepare_write(&self, want: DiskRange) -> Result<WritePlan> {
        let size = self.structure.block_size;
        let first = want.start / size;
        let page_end = (first / PAGE_ENTRIES + 1) * PAGE_ENTRIES;
        let count = want.end.div_ceil(size).min(page_end) - first;
        let slots = self.reserve(count.min(MAX_PLAN))?;
        self.fill_bitmaps(&slots).inspect_err(|_| self.give_back(&slots))?;
        let pieces = slots
            .iter()
            .zip(first..)
            .map(|(slot, block)| Piece {
                start: block * size,
                len: size,
                file: 0,
                at: slot.at + self.structure.bitmap_size,
                zeroed: slot.zeroed,
            })
            .collect();
        Ok(WritePlan { pieces, token: Box::new(Reserved { first, slots }) })
    }

    fn commit_write(&self, plan: WritePlan) -> Result<()> {
        let reserved = reserved(plan.token)?;
        let page = reserved.first / PAGE_ENTRIES;
        let result = {
            let mut writing = self.writing.lock();
            // The page was in memory for the lookup before; if it left since, it is read again
            // here, which is the only reading under this lock.
            let updated = self.bat.update(
                page,
                |buf| self.load_bat(page, buf),
                |entries| {
                    for (slot, block) in reserved.slots.iter().zip(reserved.first..) {
                        set_entry(entries, block, (slot.at / SECTOR) as u32);
                    }
                },
            );
            if let (Ok(()), Some(bits)) =
                (&updated, writing.as_mut().and_then(|w| w.batmap.as_mut()))
            {
                (reserved.first..).take(reserved.slots.len()).for_each(|block| bits.clear(block));
            }
            updated
        };
        result.inspect_err(|_| self.give_back(&reserved.slots))
    }

    fn abort_write(&self, plan: WritePlan) {
        if let Ok(reserved) = reserved(plan.token) {
            self.give_back(&reserved.slots);
        }
    }

    fn unmap(&self, want: DiskRange, rest: &mut Vec<DiskRange>) -> Result<()> {
        let size = self.structure.block_size;
        let first = want.start.div_ceil(size);
        // The last block ends with the disk.
        let past =
            if want.end == self.structure.size { self.structure.blocks } else { want.end / size };
        if first >= past {
            rest.push(want);
            return Ok(());
        }
        let whole = first * size..want.end.min(past * size);
        if want.start < whole.start {
            rest.push(want.start..whole.start);
        }
        let mut block = first;
        while block < past {
            let page = block / PAGE_ENTRIES;
            let until = past.min((page + 1) * PAGE_ENTRIES);
            self.unmap_in_page(page, block..until)?;
            block = until;
        }
        if whole.end < want.end {
            rest.push(whole.end..want.end);
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        let taken = self.take();
        if taken.bat.is_empty() && taken.batmap.is_none() {
            return sync_file(self.file());
        }
        if let Err(e) = self.write_out(&taken) {
            self.put_back(taken);
            return Err(e);
        }
        self.bat.retire(&taken.bat);
        self.release(taken.freed);
        Ok(())
    }

    fn dirty(&self) -> bool {
        self.bat.dirty_pages() > 0
    }

    fn close(&self) -> Result<()> {
        if self.dirty() {
            self.flush()?;
        }
        let Some(place) = self.writing.lock().as_mut().and_then(|w| w.space.trim()) else {
            return Ok(());
        };
        codec::write_all(self.file(), place, self.footers.bytes(), "the footer")?;
        sync_file(self.file())?;
        self.file()
            .set_len(place + FOOTER)
            .map_err(|e| Error::io("truncating", &e).in_file(self.file().path()).at(place))
    }

    fn cache_stats(&self) -> CacheStats {
        self.bat.stats()
    }
}

impl SparseMap {
    /// Clears the entries of `blocks`, all in one page of the BAT.
    fn unmap_in_page(&self, page: u64, blocks: std::ops::Range<u64>) -> Result<()> {
        let load = |buf: &mut [u8]| self.load_bat(page, buf);
        let any = |entries: &[u8]| blocks.clone().any(|block| entry(entries, block) != UNUSED);
        if !self.bat.read(page, load, any)? {
            return Ok(());
        }
        let mut writing = self.writing.lock();
        let Some(writing) = &mut *writing else {
            return Err(Error::new(ErrorKind::Failed, "unmapped before writing began"));
        };
        let (freed, batmap) = (&mut writing.freed, &mut writing.batmap);
        self.bat.update(page, load, |entries| {
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
}

fn reserved(token: Box<dyn Any + Send>) -> Result<Box<Reserved>> {
    token.downcast().map_err(|_| Error::new(ErrorKind::Failed, "a plan of another driver"))
}

/// Adds a stored part of a block; what lies past the end of the file is lost.
fn push_stored(out: &mut ExtentList, pos: u64, len: u64, at: u64, available: u64) {
    let here = len.min(available);
    if here > 0 {
        out.push(pos, here, Source::File { file: 0, at });
    }
    if here < len {
        out.push(pos + here, len - here, Source::Bad);
    }
}
