//! What can be rebuilt: what the log has to say, a place for a log that has none, the bad one of two
//! headers or region tables, places named by blocks that are not stored, blocks cut short and
//! entries that lead wrong (see [`lost`](super::lost)), and space that nothing uses. With consent also
//! headers of which only the checksum is wrong, a log is forgotten that has no entries, and so are entries
//! of a BAT that the file does not reach to the end of.
//!
//! # Order
//!
//! As in a writing session the headers get a new `FileWriteGuid` first, one after the other; that alone
//! replaces a bad one. A log stays in force until all it says is durably in its place. Every other
//! step means the same before and after it, so a crash leaves what is planned again. Repairs go
//! without a log: where one sector of theirs depends on another, a sync stands between.

use std::sync::Arc;

use uuid::Uuid;

use super::bat::{self, ENTRIES_PER_PAGE, Entry, Slot, State};
use super::headers::{Header, Headers};
use super::layout::{HEADER_OFFSETS, LOG_SECTOR, MIB, REGION_TABLE_OFFSETS};
use super::lost::repair_entries;
use super::open::{BadLog, Parts};
use super::overlay::Replayed;
use super::regions::read_copy;
use super::space::Space;
use super::stock::Stock;
use crate::codec::read_exact;
use crate::error::{Error, Result};
use crate::formats::Plan;
use crate::formats::plan::Steps;
use crate::formats::repair::stored;
use crate::storage::Storage;

/// Most pages of the BAT that one round changes.
const MAX_PAGES: usize = 4096;

/// Plans the next round.
pub(super) fn repair(file: &Arc<dyn Storage>, plan: &mut Plan) -> Result<()> {
    if plan.lossy()
        && let Some(mut headers) = Headers::plausible(&**file)?
    {
        let what = "a header, from one whose checksum does not match";
        return replace_headers(file, &mut headers, plan, what, |_| ());
    }
    let parts = Parts::read(file.clone(), plan.lossy())?;
    if plan.all()
        && let Some(bad) = parts.bad_log
    {
        return repair_log(file, &parts, bad, plan);
    }
    if plan.lossy() && parts.cut_bat && !parts.metadata.has_parent {
        return complete_bat(file, &parts, plan);
    }
    if parts.read_only.is_some() {
        return Ok(());
    }
    let mut headers = parts.headers.clone();
    let mut work = plan.part();
    let mut bad_header = false;
    if plan.all() {
        bad_header = headers.slots.iter().any(Option::is_none);
        replay(file, &parts, &mut work)?;
        repair_region_tables(file, &parts, &mut work)?;
        repair_blocks(file, &parts, &mut work)?;
    }
    let replays = plan.all() && headers.header().dirty();
    if plan.all() && work.is_empty() && !bad_header && !replays {
        repair_entries(file, &parts, &mut work)?;
    }
    if plan.reclaims() && work.is_empty() && !bad_header && !replays {
        reclaim(file, &parts, &mut work)?;
    }
    if work.is_empty() && !bad_header && !replays {
        return Ok(());
    }
    let id = Uuid::new_v4();
    let what = "a header that says the file was changed";
    replace_headers(file, &mut headers, plan, what, |h| h.file_write = id)?;
    if !work.is_empty() {
        plan.sync(file);
        plan.append(work);
    }
    if replays {
        let what = "a header that names no log any more";
        replace_headers(file, &mut headers, plan, what, |h| h.log = Uuid::nil())?;
    }
    Ok(())
}

/// Replaces both headers, each when all before it is durable: one of them is good at any moment.
pub(super) fn replace_headers(
    file: &Arc<dyn Storage>,
    headers: &mut Headers,
    plan: &mut Steps,
    what: &str,
    change: impl Fn(&mut Header),
) -> Result<()> {
    for _ in 0..2 {
        let mut next = headers.header().clone();
        change(&mut next);
        next.sequence = next.sequence.checked_add(1).ok_or_else(|| {
            Error::unsupported("the header's sequence number cannot grow any more")
        })?;
        let slot = 1 - headers.current;
        plan.sync(file);
        plan.write(file, HEADER_OFFSETS[slot], next.encode(), what);
        headers.slots[slot] = Some(next);
        headers.current = slot;
    }
    Ok(())
}

/// Gives a log that lies where it cannot a place at the end of the file, or makes the headers forget one
/// without entries; both only where every entry of the BAT is right.
fn repair_log(file: &Arc<dyn Storage>, parts: &Parts, bad: BadLog, plan: &mut Plan) -> Result<()> {
    let Some(space) = space(parts)? else { return Ok(()) };
    let id = Uuid::new_v4();
    let mut headers = parts.headers.clone();
    if bad == BadLog::Lost {
        let what = "a header that names no log any more";
        return replace_headers(file, &mut headers, plan, what, |h| {
            (h.file_write, h.log) = (id, Uuid::nil());
        });
    }
    // The last block may be cut short behind the end of the disk.
    let at = parts.file_len.max(space.used_end()).next_multiple_of(MIB);
    let what = "a header that says the file was changed";
    replace_headers(file, &mut headers, plan, what, |h| h.file_write = id)?;
    plan.sync(file);
    plan.set_len(file, at + MIB, "room for a log");
    replace_headers(file, &mut headers, plan, "a header that names this log", |h| {
        (h.log_offset, h.log_length) = (at, MIB as u32);
    })
}

/// Gives up the blocks whose entries the end of the file cuts off: the entries become zeroes, and so do
/// the blocks. On a child such entries would show the parent.
fn complete_bat(file: &Arc<dyn Storage>, parts: &Parts, plan: &mut Plan) -> Result<()> {
    let id = Uuid::new_v4();
    let mut headers = parts.headers.clone();
    let what = "a header that says the file was changed";
    replace_headers(file, &mut headers, plan, what, |h| h.file_write = id)?;
    plan.sync(file);
    plan.set_len(file, parts.regions.bat.range().end, "the rest of the BAT");
    Ok(())
}

/// Puts what the log says into its place.
fn replay(file: &Arc<dyn Storage>, parts: &Parts, work: &mut Plan) -> Result<()> {
    let Some(replayed) = parts.replayed.as_ref().filter(|_| parts.headers.header().dirty()) else {
        return Ok(());
    };
    let len = file.len().map_err(|e| Error::io("asking for the size", &e))?;
    if len < parts.file_len {
        work.set_len(file, parts.file_len, "the length that the log states");
    }
    replayed.each(|at, replayed| {
        if work.is_full() {
            let what = "the log is too long to be replayed by a repair";
            return Err(Error::unsupported(what).hint("writing to the disk replays it"));
        }
        match replayed {
            Replayed::Bytes(bytes) => work.write(file, at, bytes, "a page from the log"),
            Replayed::Zeroes(len) => work.punch(file, at..at + len, "zeroes from the log"),
        }
        Ok(())
    })
}

fn repair_region_tables(file: &Arc<dyn Storage>, parts: &Parts, work: &mut Plan) -> Result<()> {
    let [first, second] = [read_copy(&*parts.file, 0)?, read_copy(&*parts.file, 1)?];
    let (good, bad) = match (first, second) {
        (Some(first), second) if second.as_ref() != Some(&first) => (first, 1),
        (None, Some(second)) => (second, 0),
        _ => return Ok(()),
    };
    work.write(file, REGION_TABLE_OFFSETS[bad], good, "a region table, from the other one");
    Ok(())
}

/// Takes away the places of blocks that are not stored.
fn repair_blocks(file: &Arc<dyn Storage>, parts: &Parts, work: &mut Plan) -> Result<()> {
    let (region, layout) = (&parts.regions.bat, &parts.layout);
    let mut pages: Vec<u64> = Vec::new();
    bat::scan(&*parts.file, region, layout, |index, slot, entry| {
        if !matches!(slot, Slot::Block(_)) {
            return;
        }
        let page = index / ENTRIES_PER_PAGE;
        if is_stale(entry) && pages.last() != Some(&page) && pages.len() < MAX_PAGES {
            pages.push(page);
        }
    })?;
    for page in pages {
        let at = region.offset + page * LOG_SECTOR;
        let mut bytes = vec![0; LOG_SECTOR as usize];
        read_exact(&*parts.file, at, &mut bytes, "BAT")?;
        for i in 0..ENTRIES_PER_PAGE {
            let entry = Entry::get(&bytes, i);
            let block = layout.slot(page * ENTRIES_PER_PAGE + i);
            if matches!(block, Slot::Block(_)) && is_stale(entry) {
                Entry(entry.0 & 7).put(&mut bytes, i);
            }
        }
        work.write(file, at, bytes, "BAT entries of blocks that are not stored");
    }
    Ok(())
}

/// Whether an entry names a place although its block is nowhere.
fn is_stale(entry: Entry) -> bool {
    matches!(entry.state(), State::NotPresent | State::Zero) && entry.offset() != 0
}

/// The space in use, if every entry of the BAT is right.
fn space(parts: &Parts) -> Result<Option<Space>> {
    let shape = parts.shape();
    let mut stock = Stock::new(&shape, parts.file_len)?;
    let mut sound = true;
    bat::scan(&*parts.file, &parts.regions.bat, &parts.layout, |_, slot, entry| {
        sound &= stock.take(slot, entry).is_ok();
    })?;
    Ok(sound.then(|| stock.finish()))
}

/// Gives unused space back. While a log is in force the file is not cut off: the log states a length.
fn reclaim(file: &Arc<dyn Storage>, parts: &Parts, work: &mut Plan) -> Result<()> {
    let Some(space) = space(parts)? else { return Ok(()) };
    let used_end = space.used_end();
    for range in space.unused(parts.file_len) {
        if stored(&*parts.file, range.clone())? == 0 {
            continue;
        }
        if range.start == used_end && !parts.headers.header().dirty() {
            work.set_len(file, used_end, "nothing uses the end of the file");
        } else {
            work.punch(file, range, "nothing uses this space");
        }
    }
    Ok(())
}
