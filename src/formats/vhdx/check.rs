//! Checking: every structure in the order in which they depend on one another, in time linear in
//! the BAT. A log that waits to be replayed is taken as replayed.

use std::sync::Arc;

use super::bat::{self, ENTRY_BYTES, Entry, Slot, State};
use super::bitmap;
use super::blocks::Shape;
use super::headers::Header;
use super::layout::{HEADER_OFFSETS, LOG_SECTOR, REGION_TABLE_OFFSETS};
use super::open::Parts;
use super::regions::{Region, read_copy};
use super::space::Space;
use super::stock::Stock;
use crate::codec::{read_array, read_exact};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::repair::stored;
use crate::formats::{Report, Severity};
use crate::storage::Storage;

/// Checks a file, see [`Format::check`](crate::formats::Format::check).
pub(super) fn check(file: Arc<dyn Storage>, report: &mut Report) -> Result<()> {
    for (i, at) in HEADER_OFFSETS.into_iter().enumerate() {
        if Header::decode(&read_array(&*file, at, "header")?).is_none() {
            // A crash while a header is replaced leaves this; the other one is good then.
            report.notice(at, format!("header {} is invalid", i + 1));
        }
    }
    let parts = match Parts::read(file, true) {
        Ok(parts) => parts,
        Err(e) => return finding(report, e),
    };
    for fault in &parts.faults {
        report.add(Severity::Error, fault.offset(), fault.what().to_owned());
    }
    for warning in &parts.warnings {
        report.add(Severity::Notice, None, warning.clone());
    }
    check_log(&parts, report);
    check_region_tables(&parts, report)?;
    check_blocks(&parts, report)?;
    check_parent(&parts, report)
}

/// Turns damage into a finding; what kept the check from seeing anything stays an error.
fn finding(report: &mut Report, e: Error) -> Result<()> {
    match e.kind() {
        ErrorKind::Corrupt | ErrorKind::Unsupported => {
            report.add(Severity::Error, e.offset(), e.what().to_owned());
            Ok(())
        }
        _ => Err(e),
    }
}

fn check_log(parts: &Parts, report: &mut Report) {
    let header = parts.headers.header();
    if header.dirty() && parts.log_entries > 0 {
        let what = format!(
            "the image was not closed: {} log entries are to be replayed",
            parts.log_entries
        );
        report.notice(header.log_offset, what);
    }
    if header.log_length == 0 {
        report.add(Severity::Notice, None, "the image has no log");
    }
}

fn check_region_tables(parts: &Parts, report: &mut Report) -> Result<()> {
    let copies = [read_copy(&*parts.file, 0)?, read_copy(&*parts.file, 1)?];
    for (i, copy) in copies.iter().enumerate() {
        if copy.is_none() {
            let what = format!("region table {} is invalid: other programs may refuse it", i + 1);
            report.error(REGION_TABLE_OFFSETS[i], what);
        }
    }
    if let [Some(first), Some(second)] = &copies
        && first != second
    {
        report.error(REGION_TABLE_OFFSETS[1], "the two region tables differ");
    }
    for region in parts.regions.all.iter().filter(|r| r.range().end > parts.file_len) {
        let what = format!("the file ends in the middle of region {}", region.guid);
        report.notice(region.offset, what);
    }
    Ok(())
}

fn check_blocks(parts: &Parts, report: &mut Report) -> Result<()> {
    let shape = parts.shape();
    let layout = shape.layout;
    let region = &parts.regions.bat;
    report.blocks = layout.blocks;
    if shape.bat_entries < layout.entries {
        let what = format!("the BAT has {} of {} entries", shape.bat_entries, layout.entries);
        report.error(region.offset, what);
    }
    let mut stock = match Stock::new(&shape, parts.file_len) {
        Ok(stock) => stock,
        Err(e) => return finding(report, e),
    };
    let mut partial = PartialBlocks::default();
    let mut complete = 0;
    let mut failed = None;
    let (mut stale, mut draft) = (0u64, 0u64);
    let mut before = (0, Entry(0));
    bat::scan(&*parts.file, region, &layout, |index, slot, entry| {
        let at = region.offset + index * ENTRY_BYTES;
        if let Err(misfit) = stock.take(slot, entry) {
            let shifted = before == (index.wrapping_sub(1), entry);
            let note = if shifted {
                ", as the entry before it; old QEMU versions shift entries"
            } else {
                ""
            };
            report.error(at, format!("{}{note}", misfit.error.what()));
        }
        before = (index, entry);
        let stored = matches!(entry.state(), State::Present | State::Partial);
        match slot {
            Slot::Block(block) if stored => {
                report.allocated_blocks += 1;
                let missing = entry.offset().saturating_add(layout.block_size) > parts.file_len;
                if missing && entry.offset().saturating_add(shape.needed(block)) <= parts.file_len {
                    report.notice(at, "the file lacks the part of the block behind the disk's end");
                }
            }
            Slot::Block(_) if entry.is_draft() => draft += 1,
            Slot::Block(_) if matches!(entry.state(), State::NotPresent | State::Zero) => {
                stale += 1 - u64::from(entry.offset() == 0);
            }
            Slot::Bitmap(chunk) if !shape.has_parent => {
                report.notice(at, format!("chunk {chunk} has a sector bitmap, but no parent"));
            }
            _ => {}
        }
        if !shape.has_parent {
            return;
        }
        for (block, index) in partial.begin(index / (layout.chunk_ratio + 1)) {
            no_bitmap(report, region, block, index);
        }
        match (slot, entry.state()) {
            (Slot::Block(block), State::Partial) => partial.blocks.push((block, index)),
            (Slot::Bitmap(_), State::Present | State::Partial) => {
                for (block, index) in partial.blocks.drain(..) {
                    if !shape.has_bits(block, entry.offset(), parts.file_len) {
                        no_bitmap(report, region, block, index);
                        continue;
                    }
                    match complete_bitmap(parts, &shape, block, entry.offset()) {
                        Ok(full) => complete += u64::from(full),
                        Err(e) => failed = Some(e),
                    }
                }
            }
            _ => {}
        }
    })?;
    for (block, index) in partial.blocks {
        no_bitmap(report, region, block, index);
    }
    failed.map_or(Ok(()), |e| finding(report, e))?;
    if complete > 0 {
        let what = format!("{complete} blocks hide all of the parent, but are marked as partial");
        report.notice(region.offset, what);
    }
    if draft > 0 {
        let what = format!(
            "{draft} blocks are in state 5, unmapped as of a draft of the format: they read as zeroes"
        );
        report.notice(region.offset, what);
    }
    if stale > 0 {
        let what = format!("{stale} blocks that are not stored name a place in the file");
        report.notice(region.offset, what);
    }
    report_leaks(parts, &stock.finish(), report)
}

/// Space that holds something and that nothing leads to. Space ahead of the next block, which every
/// writer reserves, holds nothing.
fn report_leaks(parts: &Parts, space: &Space, report: &mut Report) -> Result<()> {
    for range in space.unused(parts.file_len) {
        let stored = stored(&*parts.file, range.clone())?;
        if stored > 0 {
            report.leak(range.start, stored, format!("{stored} bytes are used by nothing"));
        }
    }
    Ok(())
}

/// The partially present blocks of one chunk. The entry of its sector bitmap comes after theirs.
#[derive(Default)]
pub(super) struct PartialBlocks {
    chunk: u64,
    /// Blocks, and the indices of their entries.
    pub blocks: Vec<(u64, u64)>,
}

impl PartialBlocks {
    /// Comes to an entry of `chunk`. Says which blocks of the chunk before have no bitmap.
    pub fn begin(&mut self, chunk: u64) -> Vec<(u64, u64)> {
        let left = if chunk == self.chunk { Vec::new() } else { std::mem::take(&mut self.blocks) };
        self.chunk = chunk;
        left
    }
}

fn no_bitmap(report: &mut Report, bat: &Region, block: u64, index: u64) {
    let what = format!("block {block} is partially present, but has no bits in a sector bitmap");
    report.error(bat.offset + index * ENTRY_BYTES, what);
}

/// Whether the bitmap at byte `at` of the file says that all sectors of `block` are in the file.
fn complete_bitmap(parts: &Parts, shape: &Shape, block: u64, at: u64) -> Result<bool> {
    let (first, count) = shape.block_bits(block);
    for (page, bits) in bitmap::pages(at, &(first..first + count)) {
        let mut bytes = [0; LOG_SECTOR as usize];
        // Bits that count are there; the file may end behind them.
        let stored = parts.file_len.saturating_sub(page * LOG_SECTOR).min(LOG_SECTOR);
        let stored = &mut bytes[..stored as usize];
        read_exact(&*parts.file, page * LOG_SECTOR, stored, "sector bitmap")?;
        if !bitmap::full(&bytes, bits) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether the image names its parent. Whether that is there is for opening the chain to find out.
fn check_parent(parts: &Parts, report: &mut Report) -> Result<()> {
    parts.parent().map(drop).or_else(|e| finding(report, e))
}
