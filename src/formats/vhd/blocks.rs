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
//! - Blocks that are unmapped are free when the BAT in the file points at them no more
//!   ([`Writer`](crate::disk::writer)).

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use smallvec::SmallVec;
use zerocopy::IntoBytes;

use super::bat::{Bat, entry, set_entry};
use super::batmap::Bits;
use super::bitmaps::SectorBitmaps;
use super::footers::Footers;
use super::layout::{DiskType, FOOTER, SECTOR, UNUSED, footer_place};
use super::space::space;
use super::structure::{Structure, overlap};
use super::survey::Survey;
use crate::codec;
use crate::disk::map::{BlockMap, DiskRange, ExtentList, Geometry, Piece, Source, WritePlan};
use crate::disk::space::Unit;
use crate::disk::sync_file_for;
use crate::disk::tables::{CacheBudget, TableCache};
use crate::disk::writer::{self, Batch, Reserved, Tables, Writer};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::Severity;
use crate::storage::Storage;

/// Most blocks that one plan allocates.
const MAX_PLAN: u64 = 64;

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
    /// Where the trailing footer begins: no data lies beyond.
    data_end: Arc<AtomicU64>,
    pub(super) writer: Writer,
    /// What is allocated, from the first write on.
    unit: OnceLock<Unit>,
    /// The batmap of an image that is being written, if it has one. Taken inside changes.
    batmap: Mutex<Option<Bits>>,
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
            data_end: Arc::new(AtomicU64::new(footers.data_end)),
            writer: Writer::default(),
            unit: OnceLock::new(),
            batmap: Mutex::new(None),
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
        sync_file_for(self.file(), "footer copy")
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

    /// Room for up to `count` blocks, at least one.
    pub(super) fn reserve(&self, count: u64) -> Result<Reserved<'_>> {
        let Some(unit) = self.unit.get() else {
            return Err(Error::new(ErrorKind::Failed, "writing has not begun"));
        };
        self.writer.reserve(0, *unit, count)
    }

    /// Points the entries of new blocks at `places`, from block `first` on and within a page of the
    /// BAT, then runs `also`, as one step for a flush.
    pub(super) fn point_at(
        &self,
        first: u64,
        places: &[u64],
        also: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.writer.change(|_| {
            if !places.is_empty() {
                // The page was in memory for the lookup just before. If it has left since, it is read
                // here, and this is the only reading under the lock.
                self.bat.update(first, |entries| {
                    for (at, block) in places.iter().zip(first..) {
                        set_entry(entries, block, (at / SECTOR) as u32);
                    }
                })?;
            }
            also()?;
            if let Some(bits) = &mut *self.batmap.lock() {
                (first..).take(places.len()).for_each(|block| bits.clear(block));
            }
            Ok(())
        })
    }

    /// Plans whole blocks. Nothing points at their bitmaps yet, so these are written right away.
    fn plan_blocks(&self, want: &DiskRange) -> Result<WritePlan<'_>> {
        let size = self.structure.block_size;
        let first = want.start / size;
        let count = want.end.div_ceil(size).min(Bat::same_page(first).end) - first;
        let reserved = self.reserve(count.min(MAX_PLAN))?;
        let full = vec![0xff; self.structure.bitmap_size as usize];
        let mut places: SmallVec<[u64; 4]> = SmallVec::new();
        let mut pieces = SmallVec::new();
        for ((at, contents), block) in reserved.places().zip(first..) {
            codec::write_all(self.file(), at, &full, "a sector bitmap")?;
            let data = at + self.structure.bitmap_size;
            pieces.push(Piece { start: block * size, len: size, file: 0, at: data, contents });
            places.push(at);
        }
        Ok(WritePlan::new(pieces, move || {
            self.point_at(first, &places, || Ok(()))?;
            reserved.keep();
            Ok(())
        }))
    }

    /// Clears the entries of `blocks`, all in one page of the BAT.
    pub(super) fn unmap_in_page(&self, blocks: Range<u64>) -> Result<()> {
        let any = |entries: &[u8]| blocks.clone().any(|block| entry(entries, block) != UNUSED);
        if !self.bat.read(blocks.start, any)? {
            return Ok(());
        }
        let stride = self.structure.stride();
        self.writer.change(|state| {
            self.bat.update(blocks.start, |entries| {
                let mut batmap = self.batmap.lock();
                for block in blocks.clone() {
                    let sector = entry(entries, block);
                    if sector != UNUSED {
                        set_entry(entries, block, UNUSED);
                        let at = u64::from(sector) * SECTOR;
                        state.free(0, at..at + stride);
                        batmap.iter_mut().for_each(|bits| bits.clear(block));
                    }
                }
            })
        })
    }
}

impl Tables for SparseMap {
    fn writer(&self) -> &Writer {
        &self.writer
    }

    /// The batmap: it only loses bits, which is always true.
    fn announce(&self, _: &Batch) -> Result<()> {
        let Some(batmap) = &self.structure.batmap else { return Ok(()) };
        let mut bits = self.batmap.lock();
        let Some(bits) = bits.as_mut().filter(|bits| bits.changed) else { return Ok(()) };
        batmap.write(self.file(), bits.bytes())?;
        bits.changed = false;
        Ok(())
    }

    fn publish(&self, batch: &Batch) -> Result<()> {
        if let (Some(bitmaps), Some(pages)) = (&self.bitmaps, batch.pages.get(1)) {
            bitmaps.write(pages, |block| self.bitmap_of(block))?;
        }
        self.bat.write(&batch.pages[0])?;
        self.sync("tables")
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
        let survey = self.survey()?;
        let mut footer = [0; FOOTER as usize];
        footer.copy_from_slice(self.footers.footer.as_bytes());
        if self.footers.renewed && self.footers.trailing.intact() {
            codec::write_all(self.file(), self.footers.data_end, &footer, "the footer")?;
            sync_file_for(self.file(), "renewed footer")?;
        }
        // From here on the copy stands in whenever the trailing footer is on the move.
        self.repair_head(&footer)?;
        let batmap = self.load_batmap()?;
        let (file, file_len) = (&self.files[0], self.footers.file_len);
        let footer_at = self.footers.trailing.intact().then_some(self.footers.data_end);
        let (space, unit) =
            space(file, &self.structure, &survey, footer, footer_at, file_len, &self.data_end)?;
        *self.batmap.lock() = batmap;
        self.unit.get_or_init(|| unit);
        self.writer.begin(vec![Some(space)]);
        Ok(())
    }

    fn prepare_write(&self, want: DiskRange) -> Result<WritePlan<'_>> {
        match &self.bitmaps {
            Some(bitmaps) => self.plan_sectors(bitmaps, &want),
            None => self.plan_blocks(&want),
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
        writer::flush(self)
    }

    fn caches(&self) -> SmallVec<[&TableCache; 2]> {
        let bitmaps = self.bitmaps.as_ref().map(SectorBitmaps::cache);
        [self.bat.cache()].into_iter().chain(bitmaps).collect()
    }

    fn close(&self) -> Result<()> {
        if self.caches().into_iter().any(|cache| cache.dirty_pages() > 0) {
            self.flush()?;
        }
        let Some(ends) = self.writer.ends().and_then(|ends| ends.first().copied()) else {
            return Ok(());
        };
        // Behind everything in use, but not further out than it is.
        let (place, file) = (footer_place(ends.used).min(ends.file), self.file());
        let failed = |e| Error::io("truncating", &e).in_file(file.path()).at(place);
        // The length may differ where extending the file failed half way.
        if place == ends.file && file.len().map_err(failed)? == place + FOOTER {
            return Ok(());
        }
        match codec::write_all(file, place, self.footers.bytes(), "the footer") {
            // On a full host the footer stays where it is, and with it the space before it.
            Err(e) if e.kind() == ErrorKind::NoSpace => return sync_file_for(file, "closing"),
            written => written?,
        }
        sync_file_for(file, "closing")?;
        file.set_len(place + FOOTER).map_err(failed)
    }
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
