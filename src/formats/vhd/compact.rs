//! Giving unused blocks back. See [`crate::formats::compact`] for which go where.
//!
//! # Order
//!
//! Entries of blocks that are given up lead nowhere, durably, before anything else uses their places. A
//! block is copied, bitmap and data, to where nothing is, durably; then its entry changes, durably; then
//! its old place is free. The file is cut off behind a footer that is durable there; until then the
//! one at the end counts. A crash leaves blocks in the old places or the new ones, and unused space.

use std::ops::Range;
use std::sync::Arc;

use super::footers::Footers;
use super::layout::{DiskType, FOOTER, REACH, SECTOR, footer_place};
use super::resize::trim;
use super::sound::{Entries, Sound, move_footer};
use super::structure::Structure;
use crate::error::{Error, Result};
use crate::formats::OpenContext;
use crate::formats::compact::{Block, Blocks, Move, Part};
use crate::formats::plan::Steps;
use crate::formats::zeroes::is_zero;
use crate::storage::Storage;

/// Data of blocks begins at a multiple of this many bytes, where most do.
const ALIGNMENT: u64 = 4096;

/// The parts of the image in `file`.
pub(super) fn parts(file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<Vec<Part>> {
    let Sound { footers, sparse } = Sound::read(&file, ctx)?;
    let Some((structure, survey)) = sparse else {
        let size = footers.footer.size();
        return Ok(vec![Part::Flat(file, 0..size)]);
    };
    let data_at = |sector: u32| u64::from(sector) * SECTOR + structure.bitmap_size;
    let aligned = survey.stored.iter().filter(|(at, _)| data_at(*at).is_multiple_of(ALIGNMENT));
    let alignment = if aligned.count() * 2 >= survey.stored.len() { ALIGNMENT } else { SECTOR };
    let (disk, stale): (Vec<_>, Vec<_>) =
        survey.stored.into_iter().partition(|(_, block)| u64::from(*block) < structure.blocks);
    let blocks = disk.into_iter().map(|(at, number)| Block { at, number }).collect();
    // Entries behind the end of the disk mean nothing.
    let stale = stale.into_iter().map(|(_, number)| number).collect();
    let footer_at = footers.data_end;
    Ok(vec![Part::Blocks(Box::new(Sparse {
        file,
        footers,
        structure,
        blocks,
        stale,
        alignment,
        footer_at,
    }))])
}

/// An image with a BAT.
struct Sparse {
    file: Arc<dyn Storage>,
    footers: Footers,
    structure: Structure,
    blocks: Vec<Block>,
    stale: Vec<u32>,
    alignment: u64,
    /// Where the trailing footer is.
    footer_at: u64,
}

impl Sparse {
    /// Plans that entries lead nowhere, durably.
    fn clear(&self, numbers: &[u32], plan: &mut Steps) -> Result<()> {
        let mut entries = Entries::new(&self.file, self.structure.table_at);
        for number in numbers {
            entries.set((*number).into(), None)?;
        }
        entries.write(plan, "BAT entries of blocks that are given up");
        Ok(())
    }

    /// Where the footer goes behind data that ends at `end`; one that is there already does not move out.
    fn footer_behind(&self, end: u64) -> u64 {
        let place = footer_place(end);
        if end <= self.footer_at { place.min(self.footer_at) } else { place }
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
        self.structure.stride()
    }

    fn data_at(&self, block: Block) -> u64 {
        u64::from(block.at) * SECTOR + self.structure.bitmap_size
    }

    fn pinned(&self) -> Vec<Range<u64>> {
        self.structure.reserved.clone()
    }

    fn place(&self, from: u64, to: u64) -> Option<u64> {
        let (bitmap, stride) = (self.structure.bitmap_size, self.structure.stride());
        let fits = |at: &u64| *at < REACH && at.checked_add(stride).is_some_and(|end| end <= to);
        let aligned = from.checked_add(bitmap)?.checked_next_multiple_of(self.alignment)? - bitmap;
        Some(aligned).filter(fits).or_else(|| from.checked_next_multiple_of(SECTOR).filter(fits))
    }

    fn needed_for(&self, block: Block) -> Result<Option<Range<u64>>> {
        if self.footers.disk_type != DiskType::Dynamic {
            // Nothing in the format hides the parent's data but a block.
            return Ok(None);
        }
        let data = self.data_at(block);
        let range = self.structure.block_range(block.number.into());
        Ok(Some(data..data + (range.end - range.start)))
    }

    fn length(&self, end: u64) -> u64 {
        self.footer_behind(end) + FOOTER
    }

    fn prepare(&mut self, _: &[Range<u64>], plan: &mut Steps) -> Result<()> {
        let stale = std::mem::take(&mut self.stale);
        self.clear(&stale, plan)
    }

    fn give_up(&mut self, numbers: &[u32], plan: &mut Steps) -> Result<()> {
        self.clear(numbers, plan)
    }

    fn relocate(&mut self, moves: &[Move], plan: &mut Steps) -> Result<()> {
        let stride = self.structure.stride();
        let end = moves.iter().map(|moved| moved.to + stride).max().unwrap_or(0);
        let footer = self.footers.bytes();
        let place = self.footer_behind(end);
        move_footer(&self.file, footer, &mut self.footer_at, place, plan);
        let mut entries = Entries::new(&self.file, self.structure.table_at);
        for moved in moves {
            let what = format!("block {}, in its new place", moved.number);
            plan.copy(&self.file, moved.from..moved.from + stride, moved.to, what);
            let sector = u32::try_from(moved.to / SECTOR)
                .map_err(|_| Error::unsupported("a BAT cannot point beyond 2 TiB"))?;
            entries.set(moved.number.into(), Some(sector))?;
        }
        plan.sync(&self.file);
        entries.write(plan, "BAT entries of moved blocks");
        Ok(())
    }

    fn finish(&mut self, end: u64, free: &[Range<u64>], plan: &mut Steps) -> Result<()> {
        for range in free.iter().filter(|range| range.end - range.start >= ALIGNMENT) {
            if !is_zero(&*self.file, range.clone())? {
                plan.punch(&self.file, range.clone(), "nothing uses this space");
            }
        }
        trim(&self.file, &self.footers.footer, self.footer_behind(end), self.footer_at, plan);
        Ok(())
    }
}
