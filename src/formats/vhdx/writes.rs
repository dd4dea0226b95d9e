//! The changing half of [`Blocks`]: planning space for writes, committing them, unmapping.
//!
//! A block that is not stored gets space of its own when it is written. Without a parent, or where
//! the parent is hidden already, the block is stored whole, what is not written being zero. Over a
//! visible parent only the written sectors are stored and marked in the chunk's sector bitmap.

use std::ops::Range;

use smallvec::SmallVec;

use super::bat::{Entry, State};
use super::bitmap;
use super::blocks::Blocks;
use super::layout::{LOG_SECTOR, MIB};
use crate::disk::map::{BlockMap, Contents, DiskRange, Piece, WritePlan};
use crate::disk::space::Unit;
use crate::disk::writer::{Reserved, State as Writing};
use crate::error::{Error, Result};

/// Bytes of disk that one plan covers, but always a block.
const MAX_PLAN: u64 = 64 << 20;

/// What a plan does to one block when it is committed.
#[derive(Debug)]
enum Change {
    /// The block becomes present at byte `at` of the file.
    Whole { block: u64, at: u64 },
    /// The block becomes partially present at byte `at`, with these of its sectors.
    Part { block: u64, at: u64, sectors: Range<u64> },
    /// The block, partially present already, gains sectors.
    More { block: u64, sectors: Range<u64> },
}

/// How a block has to be stored.
enum Need {
    Whole,
    Part,
    More { at: u64 },
}

impl Blocks {
    /// How `part` of a block would be stored.
    fn need(&self, block: u64, part: &DiskRange) -> Result<Need> {
        let range = self.shape.block_range(block);
        let whole =
            part.start == range.start && part.end == range.end.min(self.shape.geometry.size);
        let entry = self.entry(self.shape.layout.block_entry(block))?;
        Ok(match entry.state() {
            State::NotPresent if self.shape.has_parent && !whole => Need::Part,
            State::Partial if self.shape.has_parent => Need::More { at: entry.offset() },
            State::NotPresent | State::Undefined | State::Zero | State::Unmapped => Need::Whole,
            State::Present | State::Partial | State::Invalid => {
                let what = format!("block {block} cannot be allocated in its state");
                return Err(Error::corrupt(what));
            }
        })
    }

    /// Reserves space for `want`, see [`BlockMap::prepare_write`].
    pub(super) fn plan(&self, want: DiskRange) -> Result<WritePlan<'_>> {
        let block_size = self.shape.layout.block_size;
        let blocks = want.start / block_size..want.end.div_ceil(block_size);
        let blocks = blocks.start..blocks.end.min(blocks.start + (MAX_PLAN / block_size).max(1));

        let mut needs: SmallVec<[(u64, DiskRange, Need); 4]> = SmallVec::new();
        for block in blocks {
            let range = self.shape.block_range(block);
            let part = want.start.max(range.start)..want.end.min(range.end);
            let need = self.need(block, &part)?;
            needs.push((block, part, need));
        }
        let fresh = needs.iter().filter(|n| !matches!(n.2, Need::More { .. })).count() as u64;
        let unit = Unit::new(block_size, MIB);
        let reserved = (fresh > 0).then(|| self.writer.reserve(0, unit, fresh)).transpose()?;
        let mut places = reserved.iter().flat_map(Reserved::places);
        let mut changes = Vec::new();
        let mut pieces: SmallVec<[Piece; 4]> = SmallVec::new();
        for (block, part, need) in needs {
            let range = self.shape.block_range(block);
            let sector = u64::from(self.shape.geometry.logical_sector);
            let rounded = part.start / sector * sector..part.end.next_multiple_of(sector);
            let sectors =
                (rounded.start - range.start) / sector..(rounded.end - range.start) / sector;
            let skip = rounded.start - range.start;
            let (stored, at, contents) = match need {
                Need::More { at } => {
                    changes.push(Change::More { block, sectors });
                    (rounded, at + skip, Contents::Stale)
                }
                Need::Whole | Need::Part => {
                    // Where there is room for less, the plan covers less.
                    let Some((at, contents)) = places.next() else { break };
                    if matches!(need, Need::Whole) {
                        changes.push(Change::Whole { block, at });
                        (range, at, contents)
                    } else {
                        changes.push(Change::Part { block, at, sectors });
                        (rounded, at + skip, contents)
                    }
                }
            };
            let (start, len) = (stored.start, stored.end - stored.start);
            push_piece(&mut pieces, Piece { start, len, file: 0, at, contents });
        }
        drop(places);
        Ok(WritePlan::new(pieces, move || {
            self.writer.change(|writing| {
                // Everything that can fail comes first: each page that will change is marked as
                // changed as it is, which keeps it in memory, and missing bitmaps get their space.
                for change in &changes {
                    self.touch(change, writing)?;
                }
                changes.iter().try_for_each(|change| self.apply(change))
            })?;
            reserved.into_iter().for_each(Reserved::keep);
            Ok(())
        }))
    }

    fn touch(&self, change: &Change, writing: &mut Writing) -> Result<()> {
        let (block, sectors) = match change {
            Change::Whole { block, .. } => (*block, None),
            Change::Part { block, .. } => (*block, Some(0..self.shape.block_bits(*block).1)),
            Change::More { block, sectors } => (*block, Some(sectors.clone())),
        };
        self.update_entry(self.shape.layout.block_entry(block), |_| ())?;
        if let Some(sectors) = sectors {
            if self.bitmap_at(block)?.is_none() {
                self.add_bitmap(block, writing)?;
            }
            self.update_bits(block, sectors, |_, _| ())?;
        }
        Ok(())
    }

    /// Gives the chunk of `block` a sector bitmap of clear bits. Until the block itself names it by
    /// its state nobody looks at it. Growing the file and punching a hole are short enough to be
    /// done under the lock, and rare: a bitmap serves 2^23 sectors.
    fn add_bitmap(&self, block: u64, writing: &mut Writing) -> Result<()> {
        let index = self.shape.layout.bitmap_entry(block);
        if self.entry(index)? != Entry(0) {
            let what = format!("the sector bitmap of block {block} has no valid place");
            return Err(Error::corrupt(what));
        }
        self.update_entry(index, |_| ())?;
        let space = writing.space(0)?;
        let run = space.take(Unit::new(MIB, MIB), 1)?;
        let at = run.range.start;
        if run.contents != Contents::Zeroes {
            self.file().punch_hole(at, MIB).map_err(|e| {
                space.release(run.range, Contents::Stale);
                Error::io("clearing a sector bitmap", &e).in_file(self.file().path()).at(at)
            })?;
        }
        self.update_entry(index, |entry| *entry = Entry::present(at))
    }

    fn apply(&self, change: &Change) -> Result<()> {
        match change {
            Change::Whole { block, at } => {
                self.set_block(*block, Entry::present(*at))?;
            }
            Change::Part { block, at, sectors } => {
                // Bits of a block in any other state mean nothing, so they may be anything.
                let all = 0..self.shape.block_bits(*block).1;
                self.update_bits(*block, all, |page, bits| bitmap::fill(page, bits, false))?;
                self.update_bits(*block, sectors.clone(), |page, bits| {
                    bitmap::fill(page, bits, true);
                })?;
                self.set_block(*block, Entry::partial(*at))?;
            }
            Change::More { block, sectors } => {
                self.update_bits(*block, sectors.clone(), |page, bits| {
                    bitmap::fill(page, bits, true);
                })?;
                if self.complete(*block, self.shape.block_bits(*block).1)? {
                    let index = self.shape.layout.block_entry(*block);
                    self.update_entry(index, |e| *e = Entry::present(e.offset()))?;
                }
            }
        }
        Ok(())
    }

    fn set_block(&self, block: u64, entry: Entry) -> Result<()> {
        self.update_entry(self.shape.layout.block_entry(block), |e| *e = entry)
    }

    /// Whether the first `count` sectors of a partially present block are in this file.
    fn complete(&self, block: u64, count: u64) -> Result<bool> {
        let Some(bitmap_at) = self.bitmap_at(block)? else { return Ok(false) };
        let (first, _) = self.shape.block_bits(block);
        for (page, bits) in bitmap::pages(bitmap_at, &(first..first + count)) {
            if !self.cache.read(page, self.load(page), |bytes| bitmap::full(bytes, bits))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Sees to it that a page of a table that is going to change has space of the host.
    fn reserve(&self, page: u64) -> Result<()> {
        self.writer.reserve_table(self.file(), 0, page * LOG_SECTOR..(page + 1) * LOG_SECTOR)
    }

    fn update_entry(&self, index: u64, change: impl FnOnce(&mut Entry)) -> Result<()> {
        let (page, slot) = self.shape.entry_place(index);
        self.reserve(page)?;
        self.cache.update(page, self.load(page), |bytes| {
            let mut entry = Entry::get(bytes, slot);
            change(&mut entry);
            entry.put(bytes, slot);
        })
    }

    /// Runs `change` on the bits of `sectors` of a block, page by page.
    fn update_bits(
        &self,
        block: u64,
        sectors: Range<u64>,
        mut change: impl FnMut(&mut [u8], Range<u64>),
    ) -> Result<()> {
        let Some(bitmap_at) = self.bitmap_at(block)? else {
            return Err(Error::corrupt(format!("block {block} has no sector bitmap")));
        };
        let (first, _) = self.shape.block_bits(block);
        let bits = first + sectors.start..first + sectors.end;
        for (page, bits) in bitmap::pages(bitmap_at, &bits) {
            self.reserve(page)?;
            self.cache.update(page, self.load(page), |bytes| change(bytes, bits))?;
        }
        Ok(())
    }

    /// Discards whole blocks, see [`BlockMap::unmap`].
    ///
    /// A discarded block gets state ZERO: it is the only one that the format defines to read as
    /// zeroes, with and without parent, so every program agrees on what was discarded. Blocks that
    /// read as zeroes already stay as they are.
    pub(super) fn unmap_blocks(&self, want: DiskRange, rest: &mut Vec<DiskRange>) -> Result<()> {
        if self.shape.fixed {
            rest.push(want);
            return Ok(());
        }
        let block_size = self.shape.layout.block_size;
        let size = self.shape.geometry.size;
        let mut keep = |part: DiskRange| match rest.last_mut() {
            Some(last) if last.end == part.start => last.end = part.end,
            _ => rest.push(part),
        };
        let mut pos = want.start;
        while pos < want.end {
            let block = pos / block_size;
            let range = self.shape.block_range(block);
            let part = pos..want.end.min(range.end);
            pos = part.end;
            if part.start != range.start || part.end != range.end.min(size) {
                keep(part);
                continue;
            }
            let index = self.shape.layout.block_entry(block);
            let entry = self.entry(index)?;
            match entry.state() {
                State::Undefined | State::Zero | State::Unmapped => {}
                State::NotPresent if !self.shape.has_parent => {}
                State::Invalid => keep(part),
                state => {
                    self.writer.change(|writing| {
                        self.set_block(block, Entry::ZERO)?;
                        if state != State::NotPresent {
                            writing.free(0, entry.offset()..entry.offset() + block_size);
                        }
                        Ok(())
                    })?;
                }
            }
        }
        Ok(())
    }

    /// Marks the partially present blocks, of which everything is in the file, as present, durably; then
    /// gives up all sector bitmaps, durably too. Nothing must be written any more.
    pub(super) fn leave_bitmaps(&self) -> Result<()> {
        let layout = &self.shape.layout;
        for block in 0..layout.blocks {
            let index = layout.block_entry(block);
            if self.entry(index)?.state() != State::Partial {
                continue;
            }
            // Those behind the end of the disk are never written.
            let sectors = self.shape.needed(block) / u64::from(self.shape.geometry.logical_sector);
            if !self.complete(block, sectors)? {
                let what = format!("a part of block {block} is still the parent's");
                return Err(Error::corrupt(what).in_file(self.file().path()));
            }
            self.update_entry(index, |entry| *entry = Entry::present(entry.offset()))?;
            if self.tables_full() {
                self.flush()?;
            }
        }
        self.flush()?;
        for first in (0..layout.blocks).step_by(layout.chunk_ratio as usize) {
            let Some(at) = self.bitmap_at(first)? else { continue };
            self.writer.change(|writing| {
                self.update_entry(layout.bitmap_entry(first), |entry| *entry = Entry(0))?;
                writing.free(0, at..at + MIB);
                Ok(())
            })?;
        }
        self.flush()
    }

    /// Makes every block the parent's again. Sector bitmaps stay: they mean nothing without a
    /// partially present block, and begin anew with one.
    pub(super) fn forget(&self) -> Result<()> {
        for block in 0..self.shape.layout.blocks {
            let entry = self.entry(self.shape.layout.block_entry(block))?;
            if entry.state() == State::NotPresent {
                continue;
            }
            if self.tables_full() {
                self.flush()?;
            }
            self.writer.change(|writing| {
                self.set_block(block, Entry(0))?;
                if matches!(entry.state(), State::Present | State::Partial) {
                    let block_size = self.shape.layout.block_size;
                    writing.free(0, entry.offset()..entry.offset() + block_size);
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// Appends a piece, merging it with the last where it continues that on disk and in the file.
fn push_piece(pieces: &mut SmallVec<[Piece; 4]>, piece: Piece) {
    match pieces.last_mut() {
        Some(last)
            if last.start + last.len == piece.start
                && last.at + last.len == piece.at
                && last.contents == piece.contents =>
        {
            last.len += piece.len;
        }
        _ => pieces.push(piece),
    }
}
