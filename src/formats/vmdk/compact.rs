//! Giving unused grains back. See [`crate::formats::compact`] for which go where.
//!
//! # Order
//!
//! An extent that changes carries the mark of one that is not closed, from before the first change of a
//! table until all of them are durable: its redundant tables may lag behind. Entries of grains that are
//! given up change, durably, before anything else uses their places; a grain is copied, durably, and
//! then its entries change, durably. At last one sector, the header's, takes the mark away, and the file
//! is cut off. Tables stay where they are. The header of a copy-on-write extent says where free space
//! begins: it says so before anything lies behind that, and less only at the end.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::codec;
use crate::error::{Error, Result};
use crate::formats::OpenContext;
use crate::formats::compact::{Block, Blocks, Move, Part};
use crate::formats::plan::Steps;
use crate::formats::zeroes::is_zero;
use crate::storage::Storage;

use super::cowd;
use super::grains::{Dialect, Grain};
use super::layout::{Header, SECTOR};
use super::map::{Backing, SparseExtent};
use super::settled::settle;
use super::tables;
use super::walk;

/// The parts of the disk whose descriptor is in `file`.
pub fn parts(file: &Arc<dyn Storage>, ctx: &OpenContext) -> Result<Vec<Part>> {
    let link = settle(file, ctx)?;
    let has_parent = link.descriptor.descriptor.parent_cid()?.is_some();
    let mut parts = Vec::new();
    for slot in &link.slots {
        if let Backing::Flat { file, at, present } = slot.backing
            && !link.files[file].protected()
        {
            parts.push(Part::Flat(link.files[file].clone(), at..at + present));
        }
    }
    for extent in link.sparse.into_iter().filter(|extent| extent.writable) {
        parts.push(Part::Blocks(Box::new(Sparse::new(extent, has_parent)?)));
    }
    Ok(parts)
}

/// A sparse extent.
struct Sparse {
    extent: SparseExtent,
    file: Arc<dyn Storage>,
    blocks: Vec<Block>,
    pinned: Vec<Range<u64>>,
    /// What the entry of a grain says that reads as zeroes, if the format can say so.
    zeroes: Option<u32>,
    /// Where free space begins, for extents that say so.
    free_sector: u64,
    marked: bool,
}

impl Sparse {
    fn new(extent: SparseExtent, has_parent: bool) -> Result<Self> {
        let tables = &extent.tables;
        walk::verify(tables, false, extent.overhead)?;
        let mut blocks = Vec::new();
        let grains = tables.grains();
        tables::changed(tables, |number, raw| {
            if let Grain::At(at) = tables.decode(raw)
                && number < grains
                && let (Ok(at), Ok(number)) = (u32::try_from(at / SECTOR), u32::try_from(number))
            {
                blocks.push(Block { at, number });
            }
            None
        })?;
        let mut pinned = tables::places(tables)?;
        pinned.push(0..extent.overhead * SECTOR);
        let zeroes = match (has_parent, tables.zeroed_grains) {
            (false, _) => Some(0),
            (true, zeroed) => zeroed.then_some(1),
        };
        let free_sector = extent.free_sector.unwrap_or(0);
        let file: Arc<dyn Storage> = extent.file.clone();
        Ok(Self { extent, file, blocks, pinned, zeroes, free_sector, marked: false })
    }

    fn hosted(&self) -> bool {
        self.extent.tables.dialect == Dialect::Hosted
    }

    /// Plans the mark of an extent that is not closed, durably.
    fn mark(&mut self, plan: &mut Steps) {
        if !self.marked {
            self.marked = true;
            let len = if self.hosted() { 1 } else { 4 };
            let mark = [1, 0, 0, 0][..len].to_vec();
            plan.write(
                &self.file,
                self.extent.unclean_at,
                mark,
                "the mark of an extent not closed",
            );
            plan.sync(&self.file);
        }
    }

    /// Plans new values for entries of grains, durably.
    fn put(&self, values: &[(u32, u32)], what: &str, plan: &mut Steps) -> Result<()> {
        let tables = &self.extent.tables;
        let mut by_table: BTreeMap<u64, Vec<(u64, u32)>> = BTreeMap::new();
        for (grain, value) in values {
            let grain = u64::from(*grain);
            let entry = (grain % tables.entries_per_table, *value);
            by_table.entry(grain / tables.entries_per_table).or_default().push(entry);
        }
        let mut new = Vec::new();
        for (number, entries) in by_table {
            let mut table = tables::read(tables, number)?;
            for (index, value) in entries {
                let at = index as usize * 4;
                table.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
            new.push(table);
        }
        tables::write(&self.file, &new, what, plan);
        Ok(())
    }

    /// Plans that a copy-on-write extent's header says that free space begins behind byte `end`.
    fn put_free_sector(&mut self, end: u64, plan: &mut Steps) {
        self.free_sector = end.div_ceil(SECTOR);
        let (at, value) = cowd::free_sector(self.free_sector);
        plan.write(&self.file, at, value.to_vec(), "where free space begins");
        plan.sync(&self.file);
    }
}

impl Blocks for Sparse {
    fn file(&self) -> &Arc<dyn Storage> {
        &self.file
    }

    fn stored(&self) -> Vec<Block> {
        self.blocks.clone()
    }

    fn unit(&self) -> u64 {
        SECTOR
    }

    fn stride(&self) -> u64 {
        self.extent.tables.grain
    }

    fn pinned(&self) -> Vec<Range<u64>> {
        self.pinned.clone()
    }

    fn place(&self, from: u64, to: u64) -> Option<u64> {
        let at = from.checked_next_multiple_of(self.stride())?;
        let end = at.checked_add(self.stride())?;
        (end <= to && end / SECTOR < u64::from(u32::MAX)).then_some(at)
    }

    fn needed_for(&self, block: Block) -> Result<Option<Range<u64>>> {
        if self.zeroes.is_none() {
            return Ok(None);
        }
        let (at, grain) = (u64::from(block.at) * SECTOR, self.stride());
        let start = u64::from(block.number) * grain;
        Ok(Some(at..at + grain.min(self.extent.tables.len.saturating_sub(start))))
    }

    fn give_up(&mut self, numbers: &[u32], plan: &mut Steps) -> Result<()> {
        self.mark(plan);
        let value = self.zeroes.unwrap_or(0);
        let values: Vec<_> = numbers.iter().map(|number| (*number, value)).collect();
        self.put(&values, "tables of grains that are given up", plan)
    }

    fn relocate(&mut self, moves: &[Move], plan: &mut Steps) -> Result<()> {
        self.mark(plan);
        let len = self.stride();
        let end = moves.iter().map(|moved| moved.to + len).max().unwrap_or(0);
        if !self.hosted() && end > self.free_sector * SECTOR {
            self.put_free_sector(end, plan);
        }
        let file_len =
            self.file.len().map_err(|e| Error::io("stat", &e).in_file(self.file.path()))?;
        if end > file_len {
            plan.set_len(&self.file, end, "room for grains that move");
        }
        let mut values = Vec::new();
        for moved in moves {
            let what = format!("grain {}, in its new place", moved.number);
            plan.copy(&self.file, moved.from..moved.from + len, moved.to, what);
            let sector = u32::try_from(moved.to / SECTOR)
                .map_err(|_| Error::unsupported("grains end at 2 TiB of an extent's file"))?;
            values.push((moved.number, sector));
        }
        plan.sync(&self.file);
        self.put(&values, "tables of moved grains", plan)
    }

    fn finish(&mut self, end: u64, free: &[Range<u64>], plan: &mut Steps) -> Result<()> {
        let mut needed = Vec::new();
        for range in free {
            if !is_zero(&*self.file, range.clone())? {
                needed.push(range.clone());
            }
        }
        let len = self.file.len().map_err(|e| Error::io("stat", &e).in_file(self.file.path()))?;
        if !self.hosted() && end.div_ceil(SECTOR) < self.free_sector {
            self.put_free_sector(end, plan);
        }
        if self.marked {
            if self.hosted() {
                let mut bytes = codec::read_array(&*self.file, 0, "the sparse header")?;
                Header { unclean: false, ..Header::read(&*self.file, 0)? }.patch(&mut bytes);
                plan.write(&self.file, 0, bytes.to_vec(), "the sparse header");
            } else {
                let clear = vec![0; 4];
                plan.write(&self.file, self.extent.unclean_at, clear, "the extent is closed");
            }
            plan.sync(&self.file);
            self.marked = false;
        }
        for range in needed {
            plan.punch(&self.file, range, "nothing uses this space");
        }
        if end < len {
            plan.set_len(&self.file, end, "nothing uses the end of the file");
        }
        Ok(())
    }
}
