//! Giving unused blocks back to the host, in place, and laying blocks in the order of the disk.
//!
//! A format shows its files as [`Part`]s and makes the changes; which blocks go where is decided here,
//! the same for all of them. Nothing that a guest sees changes, nor what children know an image by.
//!
//! # In order
//!
//! 1. Blocks that read as zeroes are given up, where the format can say that they do. What the host
//!    tells to be a hole is not read; several threads look.
//! 2. The highest blocks move into the lowest free places: each is copied, and only when the copy is
//!    durable its entry changes; the old place is free when that is durable.
//! 3. If asked to, blocks move until they lie in the order of the disk: those in the way of a stretch of
//!    them to any free place, then the stretch to where it belongs.
//! 4. The file is cut off behind the last block.
//!
//! All of it goes in batches, each of which leaves a good image and costs the few syncs that its format
//! needs, however many blocks it has; how they are copied is told in [`moving`](super::moving). Work that
//! is ended, or killed, leaves what is done; a second run goes on from there. Memory is 16 bytes for each
//! block that is stored.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use super::plan::Steps;
use super::{OpenContext, OpenOptions, recognise, zeroes};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::progress::Progress;
use crate::storage::draft::Draft;
use crate::storage::{Access, Host, Storage};

/// Bytes copied in one batch, but always a block.
const BATCH: u64 = 64 << 20;
/// Most blocks of one batch.
const MAX_BATCH: usize = 4096;
/// Data that begins at a multiple of this many bytes is read and written without detours.
const ALIGNMENT: u64 = 4096;

/// How to compact.
#[derive(Debug, Clone, Copy, Default)]
pub struct Compacting {
    /// Give up only what is free already: the blocks are not read.
    pub quick: bool,
    /// Lay blocks in the order of the disk, too.
    pub defragment: bool,
    /// Change nothing, only tell.
    pub dry_run: bool,
}

/// What became of an image, or would. Field names are stable; sizes are in bytes.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Compacted {
    /// Length of the image's files before.
    pub length_before: u64,
    /// Their length now.
    pub length: u64,
    /// What they took of the host before.
    pub allocated_before: u64,
    /// What they take now; not known where nothing was changed.
    pub allocated: Option<u64>,
    /// What was given up because it reads as zeroes.
    pub zeroes: u64,
    /// What was moved.
    pub moved: u64,
    /// Of a thousand blocks how many did not follow the one before them on the disk, before.
    pub fragmentation_before: u64,
    /// How many do not now.
    pub fragmentation: u64,
    /// Blocks that were stored; of what has none, ranges of a file.
    pub blocks_before: u64,
    /// Those whose data began at a multiple of 4 KiB of the file.
    pub aligned_before: u64,
}

/// A part of an image's files.
pub enum Part {
    /// Blocks that can be moved.
    Blocks(Box<dyn Blocks>),
    /// Bytes of the disk, one after the other, in a range of a file.
    Flat(Arc<dyn Storage>, Range<u64>),
}

/// A block that is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// Byte of the file, in [`Blocks::unit`]s.
    pub at: u32,
    /// Its number on the disk.
    pub number: u32,
}

/// A block that gets another place, in bytes of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    /// Its number on the disk.
    pub number: u32,
    /// Where it is.
    pub from: u64,
    /// Where it goes, which is free.
    pub to: u64,
}

/// Blocks of one length in one file, and everything else that lies there. Plans are carried out before
/// the next one is asked for.
///
/// # Errors
///
/// Those of reading the tables.
#[allow(clippy::missing_errors_doc)] // They are the trait's, above.
pub trait Blocks: Sync {
    /// The file.
    fn file(&self) -> &Arc<dyn Storage>;

    /// The blocks, in any order.
    fn stored(&self) -> Vec<Block>;

    /// Bytes that [`Block::at`] counts.
    fn unit(&self) -> u64;

    /// Bytes of the file that a block takes, whatever belongs to it included.
    fn stride(&self) -> u64;

    /// Byte of the file where the data of a block begins.
    fn data_at(&self, block: Block) -> u64 {
        u64::from(block.at) * self.unit()
    }

    /// Parts of the file that stay where they are.
    fn pinned(&self) -> Vec<Range<u64>>;

    /// The first place in free space from `from` to `to` where a block can lie.
    fn place(&self, from: u64, to: u64) -> Option<u64>;

    /// The bytes of the file for which a block is stored: if they are zeroes, the format can say so without
    /// it. `None` if it is needed whatever they are.
    fn needed_for(&self, block: Block) -> Result<Option<Range<u64>>>;

    /// Length of a file in which everything in use ends at byte `end`.
    fn length(&self, end: u64) -> u64 {
        end
    }

    /// Plans moves of what is no block and can be moved into `free` space all the same, durably.
    fn prepare(&mut self, free: &[Range<u64>], plan: &mut Steps) -> Result<()> {
        let _ = (free, plan);
        Ok(())
    }

    /// Plans that blocks are stored no more, durably.
    fn give_up(&mut self, numbers: &[u32], plan: &mut Steps) -> Result<()>;

    /// Plans moves of blocks, durably. No place is taken and given up in the same call.
    fn relocate(&mut self, moves: &[Move], plan: &mut Steps) -> Result<()>;

    /// Plans the end of the work: nothing is in use behind byte `end` of the file, nor in `free`.
    fn finish(&mut self, end: u64, free: &[Range<u64>], plan: &mut Steps) -> Result<()>;
}

/// Compacts the image at `path`. Parents of other images may be compacted, and children, too.
///
/// # Errors
///
/// [`ErrorKind::Busy`] while somebody has it open, [`ErrorKind::Corrupt`] for a damaged image,
/// [`ErrorKind::Cancelled`] where `progress` ends it: what was done until then stays.
pub fn compact(
    host: &Arc<dyn Host>,
    path: &Path,
    options: &OpenOptions,
    how: Compacting,
    progress: &dyn Progress,
) -> Result<Compacted> {
    let host: &Arc<dyn Host> = &match how.dry_run {
        true => Draft::over(host)?,
        false => host.clone(),
    };
    let options = OpenOptions { access: Access::Write, next_identity: None, ..options.clone() };
    let file = host.open(path, Access::Write)?;
    let ctx = OpenContext::new(host, &*file, &options);
    let parts = recognise(&*file)?.compact(file.clone(), &ctx).in_file(path)?;
    let files = Files::of(&file, &parts);
    let mut done = Compacted::default();
    (done.length_before, done.allocated_before) = files.sizes()?;
    let mut packings = Vec::new();
    let mut total = 0;
    for part in parts {
        let packing = Packing::new(part, how);
        packing.count(&mut done);
        total += packing.to_read();
        packings.push(packing);
    }
    progress.total(total);
    let mut length = done.length_before;
    for packing in &mut packings {
        length -= packing.run(progress, &mut done).in_file(path)?;
    }
    done.length = length;
    if !how.dry_run {
        let (length, allocated) = files.sizes()?;
        (done.length, done.allocated) = (length, Some(allocated));
    }
    Ok(done)
}

/// All files of an image.
struct Files(Vec<(PathBuf, Arc<dyn Storage>)>);

impl Files {
    fn of(file: &Arc<dyn Storage>, parts: &[Part]) -> Self {
        let mut files = vec![(file.path().to_owned(), file.clone())];
        for part in parts {
            let file = match part {
                Part::Blocks(blocks) => blocks.file().clone(),
                Part::Flat(file, _) => file.clone(),
            };
            if files.iter().all(|(path, _)| path != file.path()) {
                files.push((file.path().to_owned(), file));
            }
        }
        Self(files)
    }

    /// Length and host space of all of them.
    fn sizes(&self) -> Result<(u64, u64)> {
        let mut sizes = (0, 0);
        for (path, file) in &self.0 {
            let failed = |e| Error::io("asking for the size", &e).in_file(path);
            sizes.0 += file.len().map_err(failed)?;
            sizes.1 += file.allocated().map_err(failed)?;
        }
        Ok(sizes)
    }
}

/// Work on one part.
struct Packing {
    part: Part,
    how: Compacting,
    stored: Vec<Block>,
}

impl Packing {
    fn new(part: Part, how: Compacting) -> Self {
        let stored = match &part {
            Part::Blocks(blocks) => blocks.stored(),
            Part::Flat(..) => Vec::new(),
        };
        Self { part, how, stored }
    }

    /// Counts what is stored, and what of it is aligned.
    fn count(&self, done: &mut Compacted) {
        let mut add = |at: u64| {
            done.blocks_before += 1;
            done.aligned_before += u64::from(at.is_multiple_of(ALIGNMENT));
        };
        match &self.part {
            Part::Blocks(blocks) => self.stored.iter().for_each(|b| add(blocks.data_at(*b))),
            Part::Flat(_, range) => add(range.start),
        }
    }

    /// Bytes that are going to be looked at.
    fn to_read(&self) -> u64 {
        match &self.part {
            _ if self.how.quick => 0,
            Part::Blocks(blocks) => self.stored.len() as u64 * blocks.stride(),
            Part::Flat(_, range) => range.end - range.start,
        }
    }

    /// Does all of it; by how much the file gets shorter.
    fn run(&mut self, progress: &dyn Progress, done: &mut Compacted) -> Result<u64> {
        match &mut self.part {
            Part::Flat(file, range) => {
                let range = if self.how.quick { 0..0 } else { range.clone() };
                done.zeroes += zeroes::punch(file, range, self.how.dry_run, progress)?;
                Ok(0)
            }
            Part::Blocks(blocks) => {
                let stored = std::mem::take(&mut self.stored);
                let mut layout = Layout::new(&mut **blocks, stored, self.how.dry_run);
                done.fragmentation_before += layout.fragmentation();
                let ended = layout.change(self.how, progress, done);
                // After a failure nobody knows how far the last batch came.
                if let Err(e) = &ended
                    && e.kind() != ErrorKind::Cancelled
                {
                    return ended.map(|()| 0);
                }
                done.fragmentation += layout.fragmentation();
                let shorter = layout.finish()?;
                ended.map(|()| shorter)
            }
        }
    }
}

/// Where blocks are, while they move.
struct Layout<'a> {
    blocks: &'a mut dyn Blocks,
    stored: Vec<Block>,
    dry_run: bool,
}

impl<'a> Layout<'a> {
    fn new(blocks: &'a mut dyn Blocks, mut stored: Vec<Block>, dry_run: bool) -> Self {
        stored.sort_unstable_by_key(|block| block.at);
        Self { blocks, stored, dry_run }
    }

    fn change(
        &mut self,
        how: Compacting,
        progress: &dyn Progress,
        done: &mut Compacted,
    ) -> Result<()> {
        if !how.quick {
            done.zeroes += self.give_up(progress)?;
        }
        // What moves makes room for the rest; all of it only moves down.
        loop {
            let (free, _) = self.free();
            let mut plan = Steps::new();
            self.blocks.prepare(&free, &mut plan)?;
            if !self.dry_run {
                plan.carry_out(progress)?;
            }
            let moves = self.pack();
            if plan.is_empty() && moves.is_empty() {
                break;
            }
            progress.total(moves.len() as u64 * self.blocks.stride());
            done.moved += self.relocate_all(&moves, progress)?;
        }
        if how.defragment {
            done.moved += self.arrange(progress)?;
        }
        Ok(())
    }

    fn at(&self, block: Block) -> u64 {
        u64::from(block.at) * self.blocks.unit()
    }

    /// Gives up what reads as zeroes; how many bytes that is.
    fn give_up(&mut self, progress: &dyn Progress) -> Result<u64> {
        let len = self.blocks.stride();
        let range = |index: usize| match self.stored.get(index) {
            Some(block) => self.blocks.needed_for(*block),
            None => Ok(None),
        };
        let found = zeroes::find(&**self.blocks.file(), self.stored.len(), len, &range, progress)?;
        let mut numbers: Vec<u32> =
            found.into_iter().map(|index| self.stored[index].number).collect();
        let bytes = numbers.len() as u64 * len;
        numbers.sort_unstable();
        for batch in numbers.chunks(MAX_BATCH) {
            if !self.dry_run {
                progress.go_on()?;
                let mut plan = Steps::new();
                self.blocks.give_up(batch, &mut plan)?;
                plan.carry_out(&())?;
            }
            self.stored.retain(|block| batch.binary_search(&block.number).is_err());
        }
        Ok(bytes)
    }

    /// Free space, ascending, up to the last thing in use, where that ends.
    fn free(&self) -> (Vec<Range<u64>>, u64) {
        let len = self.blocks.stride();
        let mut pinned = self.blocks.pinned();
        pinned.sort_unstable_by_key(|range| range.start);
        let mut pinned = pinned.into_iter().peekable();
        let mut blocks =
            self.stored.iter().map(|block| self.at(*block)..self.at(*block) + len).peekable();
        let (mut free, mut end) = (Vec::new(), 0);
        loop {
            let first = match (pinned.peek(), blocks.peek()) {
                (Some(a), Some(b)) if a.start <= b.start => pinned.next(),
                (_, Some(_)) => blocks.next(),
                (_, None) => pinned.next(),
            };
            let Some(used) = first else { break };
            if used.start > end {
                free.push(end..used.start);
            }
            end = end.max(used.end);
        }
        (free, end)
    }

    /// The highest blocks, each with one of the lowest places, in the order of the disk.
    fn pack(&self) -> Vec<Move> {
        let len = self.blocks.stride();
        let (free, _) = self.free();
        let mut free = free.into_iter();
        let mut hole = 0..0;
        let mut next_place = || loop {
            if let Some(at) = self.blocks.place(hole.start, hole.end) {
                hole.start = at + len;
                return Some(at);
            }
            hole = free.next()?;
        };
        let (mut places, mut numbers) = (Vec::new(), Vec::new());
        for block in self.stored.iter().rev() {
            match next_place() {
                Some(place) if place < self.at(*block) => places.push(place),
                _ => break,
            }
            numbers.push(*block);
        }
        numbers.sort_unstable_by_key(|block| block.number);
        let moves = numbers.into_iter().zip(places);
        moves.map(|(block, to)| Move { number: block.number, from: self.at(block), to }).collect()
    }

    /// Moves blocks in batches; how many bytes.
    fn relocate_all(&mut self, moves: &[Move], progress: &dyn Progress) -> Result<u64> {
        let len = self.blocks.stride();
        let batch = ((BATCH / len) as usize).clamp(1, MAX_BATCH);
        let mut done = 0;
        let mut result = Ok(());
        while done < moves.len() && result.is_ok() {
            let next = moves.len().min(done + batch);
            result = self.relocate(&moves[done..next], progress);
            if result.is_ok() {
                done = next;
            }
        }
        self.moved(&moves[..done]);
        result.map(|()| done as u64 * len)
    }

    fn relocate(&mut self, moves: &[Move], progress: &dyn Progress) -> Result<()> {
        progress.go_on()?;
        if self.dry_run {
            return Ok(());
        }
        let mut plan = Steps::new();
        self.blocks.relocate(moves, &mut plan)?;
        plan.carry_out(progress)
    }

    /// Notes where blocks are now.
    fn moved(&mut self, moves: &[Move]) {
        let unit = self.blocks.unit();
        let to: BTreeMap<u64, u64> = moves.iter().map(|moved| (moved.from, moved.to)).collect();
        for block in &mut self.stored {
            if let Some(to) = to.get(&(u64::from(block.at) * unit)) {
                // Places are within the reach of the format's entries.
                block.at = (to / unit) as u32;
            }
        }
        self.stored.sort_unstable_by_key(|block| block.at);
    }

    /// Lays blocks in the order of the disk, in the places that they have; how many bytes moved.
    fn arrange(&mut self, progress: &dyn Progress) -> Result<u64> {
        let len = self.blocks.stride();
        let places: Vec<u64> = self.stored.iter().map(|block| self.at(*block)).collect();
        let mut order: Vec<u32> = self.stored.iter().map(|block| block.number).collect();
        order.sort_unstable();
        let stretch = ((BATCH / len) as usize).clamp(1, MAX_BATCH);
        let mut bytes = 0;
        for first in (0..order.len()).step_by(stretch) {
            let part = first..order.len().min(first + stretch);
            bytes += self.clear_places(&places[part.clone()], &order[part.clone()], progress)?;
            let belongs: BTreeMap<u32, u64> =
                part.clone().map(|index| (order[index], places[index])).collect();
            let moves: Vec<Move> = self
                .stored
                .iter()
                .filter_map(|block| {
                    let (from, to) = (self.at(*block), *belongs.get(&block.number)?);
                    (from != to).then_some(Move { number: block.number, from, to })
                })
                .collect();
            bytes += self.relocate_all(&moves, progress)?;
        }
        Ok(bytes)
    }

    /// Moves blocks out of `places` where others belong: those of `order`, one in each.
    fn clear_places(
        &mut self,
        places: &[u64],
        order: &[u32],
        progress: &dyn Progress,
    ) -> Result<u64> {
        let len = self.blocks.stride();
        let reserved: BTreeSet<u64> = places.iter().copied().collect();
        let (free, end) = self.free();
        let mut spare = free.into_iter().chain(std::iter::once(end..u64::MAX));
        let mut hole = 0..0;
        let mut next_place = || loop {
            match self.blocks.place(hole.start, hole.end) {
                Some(at) => {
                    hole.start = at + len;
                    // What belongs there comes in the next step.
                    let overlaps = reserved
                        .range(..at + len)
                        .next_back()
                        .is_some_and(|place| *place + len > at);
                    if !overlaps {
                        return Some(at);
                    }
                }
                None => hole = spare.next()?,
            }
        };
        let mut moves = Vec::new();
        for block in &self.stored {
            let from = self.at(*block);
            let Ok(index) = places.binary_search(&from) else { continue };
            if order[index] != block.number {
                let Some(to) = next_place() else {
                    return Err(Error::unsupported("the file has no room to move blocks"));
                };
                moves.push(Move { number: block.number, from, to });
            }
        }
        self.relocate_all(&moves, progress)
    }

    /// Of a thousand blocks how many are not the next in the file after the one before them on the disk.
    fn fragmentation(&self) -> u64 {
        let mut by_number: Vec<(u32, usize)> =
            self.stored.iter().enumerate().map(|(rank, block)| (block.number, rank)).collect();
        by_number.sort_unstable();
        let breaks = by_number.windows(2).filter(|pair| pair[1].1 != pair[0].1 + 1);
        let pairs = by_number.len().saturating_sub(1) as u64;
        (breaks.count() as u64 * 1000).checked_div(pairs).unwrap_or(0)
    }

    /// Ends the work; by how much the file gets shorter.
    fn finish(&mut self) -> Result<u64> {
        let (free, end) = self.free();
        let file = self.blocks.file().clone();
        let len = file.len().map_err(|e| Error::io("stat", &e).in_file(file.path()))?;
        let mut plan = Steps::new();
        self.blocks.finish(end, &free, &mut plan)?;
        if !self.dry_run {
            plan.carry_out(&())?;
        }
        Ok(len.saturating_sub(self.blocks.length(end)))
    }
}
