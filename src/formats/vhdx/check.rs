//! Checking: every structure in the order in which they depend on one another, in time linear in
//! the BAT. A log that waits to be replayed is taken as replayed.

use std::sync::Arc;

use super::bat::{self, BatLayout, ENTRY_BYTES, Entry, Slot, State};
use super::headers::Header;
use super::layout::{HEADER_OFFSETS, REGION_TABLE_OFFSETS};
use super::open::Parts;
use super::regions::read_copy;
use super::space::Space;
use super::stock::Stock;
use crate::codec::read_array;
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
            let what = format!("region table {} is invalid", i + 1);
            report.notice(REGION_TABLE_OFFSETS[i], what);
        }
    }
    if let [Some(first), Some(second)] = &copies
        && first != second
    {
        report.notice(REGION_TABLE_OFFSETS[1], "the two region tables differ");
    }
    Ok(())
}

fn check_blocks(parts: &Parts, report: &mut Report) -> Result<()> {
    let shape = parts.shape();
    let layout = shape.layout;
    let region = &parts.regions.bat;
    report.blocks = layout.blocks;
    if region.length / ENTRY_BYTES < layout.entries {
        let what = format!(
            "the BAT has room for {} of {} entries",
            region.length / ENTRY_BYTES,
            layout.entries
        );
        report.error(region.offset, what);
    }
    let mut stock = match Stock::new(&shape, parts.file_len) {
        Ok(stock) => stock,
        Err(e) => return finding(report, e),
    };
    let mut partial = PartialBlocks::default();
    let mut stale = 0u64;
    let mut before = (0, Entry(0));
    bat::scan(&*parts.file, region, &layout, |index, slot, entry| {
        let at = region.offset + index * ENTRY_BYTES;
        if let Err(e) = stock.take(slot, entry) {
            let shifted = before == (index.wrapping_sub(1), entry);
            let note = if shifted {
                ", as the entry before it; old QEMU versions shift entries"
            } else {
                ""
            };
            report.error(at, format!("{}{note}", e.what()));
        }
        before = (index, entry);
        let stored = matches!(entry.state(), State::Present | State::Partial);
        match slot {
            Slot::Block(_) if stored => {
                report.allocated_blocks += 1;
                if entry.offset().saturating_add(layout.block_size) > parts.file_len
                    && entry.offset() < parts.file_len
                {
                    report.notice(at, "the file ends in the middle of the block");
                }
            }
            Slot::Block(_) if matches!(entry.state(), State::NotPresent | State::Zero) => {
                stale += 1 - u64::from(entry.offset() == 0);
            }
            Slot::Bitmap(chunk) if !shape.has_parent => {
                report.notice(at, format!("chunk {chunk} has a sector bitmap, but no parent"));
            }
            _ => {}
        }
        if shape.has_parent {
            partial.take(&layout, index, slot, entry, |block, index| {
                let what = format!("block {block} is partially present, but has no sector bitmap");
                report.error(region.offset + index * ENTRY_BYTES, what);
            });
        }
    })?;
    partial.finish(|block, index| {
        let what = format!("block {block} is partially present, but has no sector bitmap");
        report.error(region.offset + index * ENTRY_BYTES, what);
    });
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

/// Looks for partially present blocks whose chunk has no sector bitmap. The bitmap's entry comes
/// after those of its blocks.
#[derive(Default)]
struct PartialBlocks {
    /// A partially present block of the chunk being read: chunk, block, index of its entry.
    waiting: Option<(u64, u64, u64)>,
}

impl PartialBlocks {
    fn take(
        &mut self,
        layout: &BatLayout,
        index: u64,
        slot: Slot,
        entry: Entry,
        mut missing: impl FnMut(u64, u64),
    ) {
        let chunk = index / (layout.chunk_ratio + 1);
        if let Some((waiting, block, at)) = self.waiting
            && waiting != chunk
        {
            missing(block, at);
            self.waiting = None;
        }
        match (slot, entry.state()) {
            (Slot::Block(block), State::Partial) => {
                self.waiting.get_or_insert((chunk, block, index));
            }
            (Slot::Bitmap(_), State::Present | State::Partial) => self.waiting = None,
            _ => {}
        }
    }

    fn finish(self, mut missing: impl FnMut(u64, u64)) {
        if let Some((_, block, index)) = self.waiting {
            missing(block, index);
        }
    }
}

/// Whether the image names its parent. Whether that is there is for opening the chain to find out.
fn check_parent(parts: &Parts, report: &mut Report) -> Result<()> {
    parts.parent().map(drop).or_else(|e| finding(report, e))
}
