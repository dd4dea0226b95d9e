//! Walking the whole BAT: what is stored where, and what contradicts what.
//!
//! Done before the first write and by a check, never at open. Time is that of reading what is stored
//! of the table and of sorting the stored blocks, memory eight bytes for each of them; of more than any
//! known program stores there is no survey. A table that is a hole of the host's file is not read.

use std::ops::Range;

use super::layout::{MAX_SPARSE_SIZE, SECTOR, UNUSED};
use super::structure::{Structure, overlap};
use crate::codec;
use crate::error::{Error, Result};
use crate::formats::Severity;
use crate::storage::Storage;

/// Most stored blocks looked after, 64 MiB of memory: the largest disk in the smallest blocks that any
/// known program makes, 512 KiB, has half as many.
const MAX_STORED: usize = 1 << 23;
/// Most runs of blocks that lead nowhere of which a survey keeps the numbers.
const MAX_LOST: usize = 1 << 16;
/// Bytes of the BAT read at once.
const CHUNK: u64 = 1 << 20;

/// What the BAT says.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// First sector and number of each stored block, ascending by sector.
    pub stored: Vec<(u32, u32)>,
    /// Blocks of the disk whose entries lead to nothing of theirs, ascending runs; not all if there are
    /// very many.
    pub lost: Vec<Range<u64>>,
    /// Where the blocks end of which the file has only a first part, if it has any such.
    pub cut_off: Option<u64>,
    /// The whole BAT was gone through.
    pub complete: bool,
}

/// Where an entry leads.
enum Place {
    Whole,
    /// The file ends in the middle of the block, which would end at this byte.
    CutOff(u64),
    Nowhere,
}

/// Something wrong with the BAT.
#[derive(Debug)]
pub(super) struct Problem {
    /// An error, or a notice.
    pub severity: Severity,
    /// Byte offset in the file of the entry.
    pub at: u64,
    /// What is wrong.
    pub what: String,
}

impl Survey {
    /// Reads all entries that a disk of any legal size can need; those behind them mean nothing.
    /// `data_end` is where the trailing footer begins.
    pub(super) fn run(
        file: &dyn Storage,
        structure: &Structure,
        data_end: u64,
        found: &mut dyn FnMut(Problem),
    ) -> Result<Self> {
        let stride = structure.stride();
        // The last block may be cut off behind the end of the disk.
        let room = data_end / stride + 1;
        let entries = structure.table_entries.min(MAX_SPARSE_SIZE / structure.block_size);
        let mut survey = Self { complete: true, ..Self::default() };
        let mut chunk = vec![0; CHUNK.min(entries * 4) as usize];
        let mut block = 0;
        while block < entries {
            let next = next_stored(file, structure, block..entries)?;
            report_hole(structure, block..next.start, found);
            survey.lose(block..next.start.min(structure.blocks));
            block = next.start;
            let at = structure.table_at + block * 4;
            let len = CHUNK.min((next.end - block) * 4) as usize;
            codec::read_exact(file, at, &mut chunk[..len], "the BAT")?;
            for entry in chunk[..len].chunks_exact(4) {
                let sector = u32::from_be_bytes([entry[0], entry[1], entry[2], entry[3]]);
                let at = structure.table_at + block * 4;
                let mut problem = |severity, what| found(Problem { severity, at, what });
                if sector != UNUSED {
                    match place(structure, data_end, block, sector, &mut problem) {
                        // Both numbers fit: the table has at most 2^32 - 1 entries.
                        Place::Whole => survey.stored.push((sector, block as u32)),
                        _ if block >= structure.blocks => {}
                        Place::CutOff(end) => survey.cut_off = survey.cut_off.max(Some(end)),
                        Place::Nowhere => survey.lose(block..block + 1),
                    }
                }
                block += 1;
            }
            if survey.stored.len() > MAX_STORED {
                let what = format!("more than {MAX_STORED} blocks are stored");
                return Err(Error::unsupported(what).in_file(file.path()));
            }
            if survey.stored.len() as u64 > room {
                let what = "more blocks than the file has room for".to_owned();
                found(Problem { severity: Severity::Error, at, what });
                survey.complete = false;
                break;
            }
        }
        survey.stored.sort_unstable();
        for pair in survey.stored.windows(2) {
            let [(first, a), (second, b)] = [pair[0], pair[1]];
            if u64::from(first) * SECTOR + stride > u64::from(second) * SECTOR {
                found(Problem {
                    severity: Severity::Error,
                    at: structure.table_at + u64::from(b) * 4,
                    what: format!(
                        "blocks {a} and {b} overlap at {:#x}",
                        u64::from(second) * SECTOR
                    ),
                });
            }
        }
        Ok(survey)
    }

    fn lose(&mut self, blocks: Range<u64>) {
        match self.lost.last_mut() {
            _ if blocks.is_empty() => {}
            Some(last) if last.end == blocks.start => last.end = blocks.end,
            _ => self.lost.push(blocks),
        }
        self.lost.truncate(MAX_LOST);
    }

    /// First sector and number of each stored block, ascending by sector, and whether it begins inside
    /// another one that does not.
    pub(super) fn places(&self, stride: u64) -> impl Iterator<Item = (u32, u32, bool)> {
        let mut end = 0;
        self.stored.iter().map(move |&(sector, block)| {
            let at = u64::from(sector) * SECTOR;
            let inside = at < end;
            if !inside {
                end = at + stride;
            }
            (sector, block, inside)
        })
    }

    /// The gaps of at least `least` bytes between everything in use, ascending, and where the last
    /// thing in use ends.
    pub(super) fn gaps(&self, structure: &Structure, least: u64) -> (Vec<Range<u64>>, u64) {
        let stride = structure.stride();
        let blocks = self.stored.iter().map(|(sector, _)| u64::from(*sector) * SECTOR);
        let mut used: Vec<Range<u64>> = blocks.map(|at| at..at + stride).collect();
        used.extend(structure.reserved.iter().cloned());
        used.sort_unstable_by_key(|range| range.start);
        let mut gaps = Vec::new();
        let mut end = 0;
        for range in used {
            if range.start > end && range.start - end >= least {
                gaps.push(end..range.start);
            }
            end = end.max(range.end);
        }
        (gaps, end)
    }
}

/// The first of `blocks` whose entries do not lie in a hole of the host's file.
fn next_stored(
    file: &dyn Storage,
    structure: &Structure,
    blocks: Range<u64>,
) -> Result<Range<u64>> {
    let at = structure.table_at + blocks.start * 4;
    let data = file
        .next_data(at)
        .map_err(|e| Error::io("looking for the BAT", &e).in_file(file.path()).at(at))?;
    let Some(data) = data else { return Ok(blocks.end..blocks.end) };
    let start = (blocks.start + data.start.saturating_sub(at) / 4).min(blocks.end);
    let end = blocks.start + data.end.saturating_sub(at).div_ceil(4);
    Ok(start..end.max(start + 1).min(blocks.end))
}

/// Entries in a hole are zeroes, and sector 0 is that of the footer copy: one problem for all of them.
fn report_hole(structure: &Structure, blocks: Range<u64>, found: &mut dyn FnMut(Problem)) {
    let of_disk = structure.blocks.clamp(blocks.start, blocks.end);
    let parts = [(Severity::Error, blocks.start..of_disk), (Severity::Notice, of_disk..blocks.end)];
    for (severity, part) in parts.into_iter().filter(|(_, part)| !part.is_empty()) {
        let at = structure.table_at + part.start * 4;
        let what = format!(
            "the entries of blocks {} to {} are a hole in the file",
            part.start,
            part.end - 1
        );
        found(Problem { severity, at, what });
    }
}

/// Where an entry in use leads; anything but a block inside the file and outside its structures is a
/// problem.
fn place(
    structure: &Structure,
    data_end: u64,
    block: u64,
    sector: u32,
    problem: &mut dyn FnMut(Severity, String),
) -> Place {
    let at = u64::from(sector) * SECTOR;
    let whole = at..at + structure.stride();
    let of_disk = block < structure.blocks;
    let severity = if of_disk { Severity::Error } else { Severity::Notice };
    if !of_disk {
        problem(severity, format!("block {block} lies past the end of the disk, yet is stored"));
    }
    if structure.reserved.iter().any(|range| overlap(range, &whole)) {
        problem(severity, format!("block {block} at {at:#x} lies over the image's own structures"));
        return Place::Nowhere;
    }
    let needed = if of_disk {
        let range = structure.block_range(block);
        range.end - range.start
    } else {
        structure.block_size
    };
    let data_at = at + structure.bitmap_size;
    if data_at + needed <= data_end {
        return Place::Whole;
    }
    let what = format!("block {block} at {at:#x} reaches past the end of the data ({data_end:#x})");
    problem(severity, what);
    if data_at < data_end { Place::CutOff(whole.end) } else { Place::Nowhere }
}
