//! Putting the BAT right: blocks that share their place get one each, a block that counts on a parent the
//! disk has not becomes a whole one, and with consent blocks that cannot be read are given up.
//!
//! # Order
//!
//! One round each. Blocks that are given up go first: the file grows only when no entry leads past its
//! end. Then, with consent, what the end of the file cuts short gets zeroes for the rest. A block that is copied has the same data in both places until its entry changes, which happens
//! when the copy is durable; what a crash leaves of copies is unused space.
//!
//! A block of a differencing disk becomes an undefined one, which reads as zeroes. One that is not
//! present would show what the parent has instead.

use std::ops::Range;
use std::sync::Arc;

use super::bat::{self, BatLayout, ENTRY_BYTES, Entry, Slot, State};
use super::check::PartialBlocks;
use super::layout::{MAX_FILE, MIB};
use super::open::Parts;
use super::stock::{MisfitKind, Stock};
use crate::error::Result;
use crate::formats::Plan;
use crate::formats::repair::MAX_COPIED;
use crate::storage::Storage;

/// Most entries that one round changes.
const MAX_ENTRIES: usize = 4096;
/// Undefined contents, which read as zeroes whatever a parent has.
const UNDEFINED: Entry = Entry(1);

/// What is to become of the entry at an index.
struct Change {
    index: u64,
    entry: Entry,
    what: String,
}

/// Entries that cannot stay as they are.
#[derive(Default)]
struct Wrong {
    /// Indices of those whose block or bitmap cannot be read, and what they become.
    lost: Vec<(Range<u64>, Entry)>,
    /// Blocks that the end of the file cuts short.
    cut: CutShort,
    /// Blocks that are whole ones.
    whole: Vec<Change>,
    /// Those whose place is another one's too, with it.
    shared: Vec<(Change, Range<u64>)>,
    /// Bytes of all of those.
    shared_bytes: u64,
}

/// Where the blocks end that the end of the file cuts short.
#[derive(Default)]
struct CutShort {
    /// Those of which something of the disk is missing.
    lost: Option<u64>,
    /// Those that lack only what is behind the disk's end, and bitmaps that lack bits of no use.
    harmless: Option<u64>,
}

impl Wrong {
    fn lose(&mut self, index: u64, entry: Entry) {
        match self.lost.last_mut() {
            Some((run, same)) if run.end == index && *same == entry => run.end += 1,
            _ => self.lost.push((index..index + 1, entry)),
        }
        self.lost.truncate(MAX_ENTRIES);
    }
}

/// Plans the next round for an image whose log has nothing to say.
pub(super) fn repair_entries(
    file: &Arc<dyn Storage>,
    parts: &Parts,
    work: &mut Plan,
) -> Result<()> {
    let wrong = find(parts)?;
    if !wrong.lost.is_empty() {
        if work.lossy() {
            give_up(file, parts, &wrong.lost, work);
        }
    } else if !wrong.whole.is_empty() {
        wrong.whole.iter().for_each(|change| put(file, parts, change, work));
    } else if let Some(end) = wrong.cut.lost {
        if work.lossy() {
            work.set_len(file, end, "zeroes for what the end of the file cuts off");
        }
    } else if let Some(end) = wrong.cut.harmless {
        work.set_len(file, end, "the part of the last block behind the disk's end");
    } else if wrong.shared_bytes <= MAX_COPIED {
        separate(file, parts, wrong.shared, work)?;
    }
    Ok(())
}

/// Makes entries that lead nowhere such that say so.
fn give_up(file: &Arc<dyn Storage>, parts: &Parts, lost: &[(Range<u64>, Entry)], work: &mut Plan) {
    for (run, entry) in lost {
        let what = match (parts.layout.slot(run.start), parts.layout.slot(run.end - 1)) {
            (Slot::Block(first), Slot::Block(last)) if first < last => {
                format!("blocks {first} to {last} are given up")
            }
            (Slot::Block(block), _) => format!("block {block} is given up"),
            _ => "a sector bitmap that is not there".to_owned(),
        };
        let entries = entry.0.to_le_bytes().repeat((run.end - run.start) as usize);
        if !work.is_full() {
            let at = parts.regions.bat.offset + run.start * ENTRY_BYTES;
            work.write(file, at, entries, what);
        }
    }
}

fn put(file: &Arc<dyn Storage>, parts: &Parts, change: &Change, work: &mut Plan) {
    let at = parts.regions.bat.offset + change.index * ENTRY_BYTES;
    work.write(file, at, change.entry.0.to_le_bytes().to_vec(), change.what.as_str());
}

/// Bytes of what a slot is for.
fn slot_len(layout: &BatLayout, slot: Slot) -> u64 {
    if matches!(slot, Slot::Block(_)) { layout.block_size } else { MIB }
}

/// Goes through the BAT; of each kind no more than one round changes.
fn find(parts: &Parts) -> Result<Wrong> {
    let (shape, layout) = (parts.shape(), &parts.layout);
    let mut stock = Stock::new(&shape, parts.file_len)?;
    let mut wrong = Wrong::default();
    let mut partial = PartialBlocks::default();
    let given_up = if shape.has_parent { UNDEFINED } else { Entry(0) };
    bat::scan(&*parts.file, &parts.regions.bat, layout, |index, slot, entry| {
        let (mut readable, mut whole) = (true, true);
        let end = entry.offset().checked_add(slot_len(layout, slot));
        if let Err(misfit) = stock.take(slot, entry) {
            readable = misfit.kind != MisfitKind::Nowhere;
            whole = misfit.kind == MisfitKind::Shared;
            match (misfit.kind, slot) {
                (MisfitKind::Nowhere, Slot::Block(_)) => wrong.lose(index, given_up),
                (MisfitKind::Nowhere, _) => wrong.lose(index, Entry(0)),
                (MisfitKind::CutShort, Slot::Block(_)) => wrong.cut.lost = wrong.cut.lost.max(end),
                // Blocks whose bits are missing are lost; the other bits mean nothing.
                (MisfitKind::CutShort, _) => whole = true,
                (MisfitKind::NoParent, _) => {
                    let what = "a whole block, for there is no parent".to_owned();
                    wrong.whole.push(Change { index, entry: Entry::present(entry.offset()), what });
                }
                (MisfitKind::Shared, _) => {
                    let name = match slot {
                        Slot::Block(block) => format!("block {block}"),
                        _ => "a sector bitmap".to_owned(),
                    };
                    let len = slot_len(layout, slot);
                    let change = Change { index, entry, what: name };
                    wrong.shared_bytes = wrong.shared_bytes.saturating_add(len);
                    wrong.shared.push((change, entry.offset()..entry.offset() + len));
                }
            }
        }
        let stored = matches!(entry.state(), State::Present | State::Partial);
        if whole && stored && end > Some(parts.file_len) {
            wrong.cut.harmless = wrong.cut.harmless.max(end);
        }
        if shape.has_parent {
            for (_, index) in partial.begin(index / (layout.chunk_ratio + 1)) {
                wrong.lose(index, given_up);
            }
            match (slot, entry.state()) {
                (Slot::Block(block), State::Partial) if readable => {
                    partial.blocks.push((block, index));
                }
                (Slot::Bitmap(_), State::Present | State::Partial) if readable => {
                    for (block, index) in partial.blocks.drain(..) {
                        if !shape.has_bits(block, entry.offset(), parts.file_len) {
                            wrong.lose(index, given_up);
                        }
                    }
                }
                _ => {}
            }
        }
        wrong.whole.truncate(MAX_ENTRIES);
        wrong.shared.truncate(MAX_ENTRIES);
    })?;
    partial.blocks.into_iter().for_each(|(_, index)| wrong.lose(index, given_up));
    Ok(wrong)
}

/// Copies what shares its place to the end of the file.
fn separate(
    file: &Arc<dyn Storage>,
    parts: &Parts,
    shared: Vec<(Change, Range<u64>)>,
    work: &mut Plan,
) -> Result<()> {
    let (mut copies, mut entries) = (work.part(), work.part());
    let mut place = parts.file_len.next_multiple_of(MIB);
    for (change, from) in shared {
        let len = from.end - from.start;
        if place + len > MAX_FILE {
            break;
        }
        copies.copy(file, from, place, format!("a place of its own for {}", change.what));
        let state = change.entry.0 & 7;
        let what = format!("{}, which shared its place", change.what);
        put(file, parts, &Change { entry: Entry(place | state), what, ..change }, &mut entries);
        place += len;
    }
    if !copies.is_empty() {
        work.set_len(file, place, "room for copies");
        work.append(copies);
        work.sync(file);
        work.append(entries);
    }
    Ok(())
}
