//! Giving unused blocks back. See [`crate::formats::compact`] for which go where.
//!
//! # Order
//!
//! Entries change by way of the log (see [`logged`](super::logged)), of blocks that are given up before
//! anything else uses their places, of blocks that move when their copies are durable. A BAT that lies
//! behind free space moves there: its copy is durable before both region tables lead to it, in one log
//! entry. The file is cut off when no log is in force any more, for entries state its length. What a
//! guest reads stays, so `DataWriteGuid` does; sector bitmaps stay where they are.

use std::ops::Range;
use std::sync::Arc;

use super::bat::{self, ENTRY_BYTES, Entry, Slot, State};
use super::blocks::Shape;
use super::layout::{LOG_SECTOR, MAX_FILE, MIB};
use super::logged::{Logged, Pages};
use super::open::Parts;
use super::resize::{copy_table, region_pages};
use super::settled::Settled;
use crate::codec::read_array;
use crate::error::{Error, Result};
use crate::formats::OpenContext;
use crate::formats::compact::{Block, Blocks, Move, Part};
use crate::formats::plan::Steps;
use crate::formats::zeroes::is_zero;
use crate::storage::Storage;

/// The parts of the image in `file`.
pub(super) fn parts(file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<Vec<Part>> {
    let Settled { parts, space } = Settled::read(&file, ctx)?;
    let shape = parts.shape();
    let mut found = Found::default();
    bat::scan(&*parts.file, &parts.regions.bat, &parts.layout, |index, slot, entry| {
        found.take(&shape, index, slot, entry);
    })?;
    if shape.fixed && !shape.has_parent {
        // All blocks stay, and what they hold may be holes of the host.
        let len = shape.layout.block_size;
        let flat = |block: Block| {
            let at = u64::from(block.at) * MIB;
            Part::Flat(file.clone(), at..(at + len).min(parts.file_len))
        };
        return Ok(found.blocks.into_iter().map(flat).collect());
    }
    let used_end = space.used_end();
    Ok(vec![Part::Blocks(Box::new(Dynamic { parts, shape, found, log: None, used_end }))])
}

/// What the BAT says.
#[derive(Default)]
struct Found {
    blocks: Vec<Block>,
    /// Places of sector bitmaps.
    bitmaps: Vec<Range<u64>>,
    /// Entries that name places of blocks that are not stored.
    anchors: Vec<u64>,
}

impl Found {
    fn take(&mut self, shape: &Shape, index: u64, slot: Slot, entry: Entry) {
        let at = entry.offset();
        match (slot, entry.state()) {
            (Slot::Block(number), State::Present | State::Partial) => {
                // Both numbers fit: files and disks have at most 2^27 MiB.
                self.blocks.push(Block { at: (at / MIB) as u32, number: number as u32 });
            }
            (Slot::Bitmap(_), State::Present | State::Partial) if shape.has_parent => {
                self.bitmaps.push(at..at + MIB);
            }
            (Slot::Unused, _) => {}
            _ if at > 0 => self.anchors.push(index),
            _ => {}
        }
    }
}

/// An image whose blocks come and go.
struct Dynamic {
    parts: Parts,
    shape: Shape,
    found: Found,
    /// From the first change on.
    log: Option<Logged>,
    /// Where everything in use ended at first.
    used_end: u64,
}

impl Dynamic {
    fn entry(&self, number: u32) -> Result<Entry> {
        let at = self.entry_at(number.into());
        Ok(Entry(u64::from_le_bytes(read_array(&*self.parts.file, at, "BAT")?)))
    }

    /// Byte of the file where the entry of a block is.
    fn entry_at(&self, number: u64) -> u64 {
        self.parts.regions.bat.offset + self.shape.layout.block_entry(number) * ENTRY_BYTES
    }

    /// Plans changes of entries, by their byte offsets, after everything planned before.
    fn put(&mut self, entries: &[(u64, Entry)], what: &str, plan: &mut Steps) -> Result<()> {
        let file = self.parts.file.clone();
        let mut pages = Pages::new(&*file);
        for (at, entry) in entries {
            pages.put(*at, &entry.0.to_le_bytes())?;
        }
        let mut pages: Vec<_> = pages.into_pages().collect();
        let log = self.log(plan)?;
        while !pages.is_empty() {
            let rest = pages.split_off(pages.len().min(log.max_pages()));
            log.commit(std::mem::replace(&mut pages, rest), what, plan)?;
        }
        plan.sync(&file);
        Ok(())
    }

    /// The log, begun if it was not.
    fn log(&mut self, plan: &mut Steps) -> Result<&mut Logged> {
        if self.log.is_none() {
            let own = self.parts.headers.header().data_write;
            // What was planned before the log is in force waits for it.
            let mut begun = Steps::new();
            self.log = Some(Logged::begin(&self.parts, own, self.used_end, &mut begun)?);
            begun.append(std::mem::take(plan));
            *plan = begun;
        }
        self.log.as_mut().ok_or_else(|| Error::invalid("the log is not in use"))
    }
}

impl Blocks for Dynamic {
    fn file(&self) -> &Arc<dyn Storage> {
        &self.parts.file
    }

    fn stored(&self) -> Vec<Block> {
        self.found.blocks.clone()
    }

    fn unit(&self) -> u64 {
        MIB
    }

    fn stride(&self) -> u64 {
        self.shape.layout.block_size
    }

    fn pinned(&self) -> Vec<Range<u64>> {
        self.parts.shape().reserved.into_iter().chain(self.found.bitmaps.iter().cloned()).collect()
    }

    fn place(&self, from: u64, to: u64) -> Option<u64> {
        let at = from.checked_next_multiple_of(MIB)?;
        let end = at.checked_add(self.stride())?;
        (end <= to && end <= MAX_FILE).then_some(at)
    }

    fn needed_for(&self, block: Block) -> Result<Option<Range<u64>>> {
        // Of a partial block the parent shows, too.
        if self.shape.has_parent && self.entry(block.number)?.state() != State::Present {
            return Ok(None);
        }
        let at = u64::from(block.at) * MIB;
        let range = self.shape.block_range(block.number.into());
        let len = range.end.min(self.shape.geometry.size) - range.start;
        Ok(Some(at..at + len))
    }

    fn prepare(&mut self, free: &[Range<u64>], plan: &mut Steps) -> Result<()> {
        let anchors = std::mem::take(&mut self.found.anchors);
        let mut cleared = Vec::new();
        for index in anchors {
            let at = self.parts.regions.bat.offset + index * ENTRY_BYTES;
            let entry: [u8; 8] = read_array(&*self.parts.file, at, "BAT")?;
            cleared.push((at, Entry(u64::from_le_bytes(entry) & 7)));
        }
        if !cleared.is_empty() {
            self.put(&cleared, "BAT entries of blocks that are not stored", plan)?;
        }
        let old = self.parts.regions.bat.clone();
        let lower = |range: &&Range<u64>| {
            let at = range.start.next_multiple_of(MIB);
            at + old.length <= range.end && at < old.offset
        };
        let Some(hole) = free.iter().find(lower) else { return Ok(()) };
        let mut table = old.clone();
        table.offset = hole.start.next_multiple_of(MIB);
        // The entries above are in their places when the copy is made.
        plan.punch(&self.parts.file, table.range(), "the BAT's new place");
        copy_table(&self.parts, &old, &table, plan)?;
        let pages = region_pages(&self.parts, &table);
        let file = self.parts.file.clone();
        self.log(plan)?.commit(pages, "the place of the BAT", plan)?;
        plan.sync(&file);
        for region in self.parts.regions.all.iter_mut().filter(|region| **region == old) {
            *region = table.clone();
        }
        self.parts.regions.bat = table;
        Ok(())
    }

    fn give_up(&mut self, numbers: &[u32], plan: &mut Steps) -> Result<()> {
        let entries: Vec<_> =
            numbers.iter().map(|number| (self.entry_at((*number).into()), Entry::ZERO)).collect();
        self.put(&entries, "BAT entries of blocks that are given up", plan)
    }

    fn relocate(&mut self, moves: &[Move], plan: &mut Steps) -> Result<()> {
        let len = self.stride();
        let end = moves.iter().map(|moved| moved.to + len).max().unwrap_or(0);
        // The log comes first: its headers say that the file changes.
        self.log(plan)?.extend(end, plan);
        let mut entries = Vec::new();
        for moved in moves {
            let what = format!("block {}, in its new place", moved.number);
            plan.copy(&self.parts.file, moved.from..moved.from + len, moved.to, what);
            let state = self.entry(moved.number)?.0 & (LOG_SECTOR - 1);
            entries.push((self.entry_at(moved.number.into()), Entry(state | moved.to)));
        }
        self.put(&entries, "BAT entries of moved blocks", plan)
    }

    fn finish(&mut self, end: u64, free: &[Range<u64>], plan: &mut Steps) -> Result<()> {
        let file = self.parts.file.clone();
        let mut needed = Vec::new();
        for range in free {
            if !is_zero(&*file, range.clone())? {
                needed.push(range.clone());
            }
        }
        let len = file.len().map_err(|e| Error::io("asking for the size", &e))?;
        if !needed.is_empty() || end < len {
            self.log(plan)?;
        }
        if let Some(log) = self.log.take() {
            log.end(plan)?;
        }
        for range in needed {
            plan.punch(&file, range, "nothing uses this space");
        }
        if end < len {
            plan.set_len(&file, end, "nothing uses the end of the file");
        }
        Ok(())
    }
}
