//! Making a child a disk that stands alone.
//!
//! # Order
//!
//! 1. What the child shows of its parents becomes its own, and durable. Blocks that hold anything of the
//!    child's, or anything but zeroes, become complete: without a parent a format has no word for a part
//!    that is not there. The child reads the same all the time.
//! 2. The link goes, in one durable step of the format's ([`Format::unlink`]).
//!
//! Killed before 2, the child is still one, has a copy of a part of what it shows, and can be flattened
//! again.

use std::path::Path;
use std::sync::Arc;

use super::chain::{CHUNK, no_child, opening};
use super::open::{open_alone, open_file};
use super::{Format, OpenContext, OpenOptions, recognise};
use crate::disk::Disk;
use crate::disk::map::{DiskRange, Source};
use crate::disk::transfer::Transfer;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::progress::Progress;
use crate::storage::{Access, Host};

/// Bytes of the disk looked up at a time: at most 131,072 extents.
const UNIT: u64 = 64 << 20;

/// Copies what its parents hold into the image at `path`, which then has no parent any more. Its own
/// children go on knowing it. `progress` gets the bytes of the disk done; where it ends the work, the
/// child has a copy of a part of what it shows. Returns the bytes copied.
///
/// # Errors
/// The image is no child, cannot be written, is damaged or in use, or a parent cannot be read.
pub fn flatten(
    host: &Arc<dyn Host>,
    path: &Path,
    options: &OpenOptions,
    progress: &dyn Progress,
) -> Result<u64> {
    let with = |access, next_identity| opening(options, access, next_identity);
    let alone = open_alone(host, path, &with(Access::Peek, None))?;
    if alone.parent.is_none() {
        return Err(no_child(path));
    }
    // The contents do not change, so children of the child go on knowing it.
    let named = options.parent.clone();
    let options = OpenOptions { parent: named, ..with(Access::Write, Some(alone.identity)) };
    // Held until the end, so that nobody changes the image between the two steps.
    let file = host.open(path, Access::Write)?;
    let child = match open_file(host, file.clone(), path, &options)? {
        (child, None) => child,
        (_, Some(e)) => return Err(e),
    };
    if let Some(why) = &child.read_only {
        return Err(Error::new(ErrorKind::ReadOnly, why.clone()).in_file(path));
    }
    if !child.damage.is_empty() {
        let what = "the image is damaged, and without its parent that would be final";
        return Err(Error::corrupt(what).in_file(path));
    }
    let Some(parent) = &child.parent else { return Err(no_child(path)) };
    let block = child.info.block_size.unwrap_or(CHUNK);
    let copied = copy_all(&child.disk, &parent.disk, block, progress).in_file(path)?;
    child.disk.close()?;
    drop(child);
    let format: &dyn Format = recognise(&*file)?;
    let ctx = OpenContext::new(host, &*file, &options);
    format.unlink(file, &ctx).in_file(path)?;
    Ok(copied)
}

/// Makes everything the child's own that it shows of `below`; how many bytes that was.
fn copy_all(child: &Disk, below: &Disk, block: u64, progress: &dyn Progress) -> Result<u64> {
    let window = CHUNK.checked_next_multiple_of(block.max(1));
    let unit = window.and_then(|window| UNIT.checked_next_multiple_of(window));
    let (Some(window), Some(unit)) = (window, unit) else {
        return Err(Error::corrupt("the blocks are too large"));
    };
    let mut transfer = Transfer::new(below, child, progress);
    let (mut bytes, mut pos) = (0, 0);
    let size = child.size();
    progress.total(size);
    while pos < size {
        progress.go_on()?;
        let begun = pos;
        // A long run of the parents' is passed over as far as they hold nothing.
        let parents = match child.next_extents(pos..size, unit)?[..] {
            [run] if run.source == Source::Parent && run.end() >= size => size,
            [run] if run.source == Source::Parent => run.end() / window * window,
            _ => pos,
        };
        if pos < parents {
            let data = below.first_data_in(pos..parents)?;
            pos = data.map_or(parents, |data| pos.max(data / window * window));
        }
        let end = size.min(pos.saturating_add(unit));
        for part in parents_parts(child, pos..end)? {
            bytes += copy_part(below, &mut transfer, part, window)?;
        }
        complete(child, pos..end, block)?;
        progress.advance(end - begun);
        pos = end;
    }
    Ok(bytes)
}

/// The parts of a range that are the parents'.
fn parents_parts(child: &Disk, range: DiskRange) -> Result<Vec<DiskRange>> {
    let extents = child.extents(range)?;
    let parents = extents.iter().filter(|extent| extent.source == Source::Parent);
    Ok(parents.map(|extent| extent.start..extent.end()).collect())
}

/// Copies what `below` holds of a part, looked for by windows.
fn copy_part(
    below: &Disk,
    transfer: &mut Transfer<'_>,
    part: DiskRange,
    window: u64,
) -> Result<u64> {
    // Zeroes need not be stored, but for what `complete` looks for.
    let zeroes = &mut |_| Ok(());
    let (mut bytes, mut pos) = (0, part.start);
    while let Some(data) = below.first_data_in(pos..part.end)? {
        let start = pos.max(data / window * window);
        let mut end = part.end.min(start / window * window + window);
        while end < part.end {
            let next = end..part.end.min(end + window);
            if below.first_data_in(next.clone())?.is_none() {
                break;
            }
            end = next.end;
        }
        bytes += transfer.copy(start..end, zeroes)?;
        pos = end;
    }
    Ok(bytes)
}

/// Makes zeroes of what is still the parents' in blocks that hold anything: they hold nothing there.
fn complete(child: &Disk, range: DiskRange, block: u64) -> Result<()> {
    for part in parents_parts(child, range)? {
        let head = part.start..part.end.min(part.start.next_multiple_of(block));
        let last = if part.end == child.size() { part.end } else { part.end / block * block };
        let tail = head.end.max(last)..part.end;
        for piece in [head, tail].into_iter().filter(|piece| !piece.is_empty()) {
            child.write_zeroes(piece.start, piece.end - piece.start)?;
        }
    }
    Ok(())
}
