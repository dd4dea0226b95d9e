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

use super::chain::{CHUNK, FLUSH_EVERY, no_child, opening, read};
use super::open::{open_alone, open_file};
use super::{Format, OpenContext, OpenOptions, recognise};
use crate::disk::Disk;
use crate::disk::map::{DiskRange, Source};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::progress::Progress;
use crate::storage::{Access, Host};

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

/// Makes everything the child's own that it shows of `below`, block by block of the child's; how many
/// bytes that was. Memory: one block, of at most 256 MiB, or 1 MiB.
fn copy_all(child: &Disk, below: &Disk, block: u64, progress: &dyn Progress) -> Result<u64> {
    let unit = CHUNK.max(block).checked_next_multiple_of(block.max(1));
    let unit = unit.ok_or_else(|| Error::corrupt("the blocks are too large"))?;
    let mut buf = Vec::new();
    let mut ahead = Ahead { below, from: 0, data: 0..0 };
    let (mut bytes, mut flushed, mut pos) = (0, 0, 0);
    progress.total(child.size());
    while pos < child.size() {
        progress.go_on()?;
        let end = child.size().min(pos.saturating_add(unit));
        for run in wanted(child, &mut ahead, pos..end, block, &mut buf)? {
            let part = (run.start - pos) as usize..(run.end - pos) as usize;
            child.write_at(run.start, &buf[part])?;
            bytes += run.end - run.start;
        }
        if bytes - flushed >= FLUSH_EVERY {
            child.flush()?;
            flushed = bytes;
        }
        progress.advance(end - pos);
        pos = end;
    }
    Ok(bytes)
}

/// Where the parents hold data, asked once for each run of it: some hosts look at every page of a run.
struct Ahead<'a> {
    below: &'a Disk,
    /// From here on nothing lies before `data`.
    from: u64,
    data: DiskRange,
}

impl Ahead<'_> {
    /// Whether there is data in a range.
    fn holds(&mut self, range: &DiskRange) -> Result<bool> {
        if !(self.from..self.data.end).contains(&range.start) {
            self.from = range.start;
            self.data = self.below.next_data(range.start)?.unwrap_or(u64::MAX..u64::MAX);
        }
        Ok(self.data.start < range.end)
    }
}

/// The parts of `range`, whole blocks, to be written to the child, with their bytes in `buf`, whose
/// first byte is that of `range`.
fn wanted(
    child: &Disk,
    ahead: &mut Ahead<'_>,
    range: DiskRange,
    block: u64,
    buf: &mut Vec<u8>,
) -> Result<Vec<DiskRange>> {
    let extents = child.extents(range.clone())?;
    let missing: Vec<DiskRange> = extents
        .iter()
        .filter(|extent| extent.source == Source::Parent)
        .map(|extent| extent.start..extent.end())
        .collect();
    let whole = missing.first() == Some(&range);
    if missing.is_empty() || (whole && !ahead.holds(&range)?) {
        return Ok(Vec::new());
    }
    buf.resize((range.end - range.start) as usize, 0);
    let mut runs: Vec<DiskRange> = Vec::new();
    for part in missing {
        let of = |r: &DiskRange| (r.start - range.start) as usize..(r.end - range.start) as usize;
        let bytes = buf.get_mut(of(&part)).unwrap_or_default();
        read(ahead.below, part.start, bytes)?;
        let mut start = part.start;
        while start < part.end {
            let first = start / block * block;
            let last = range.end.min(first + block);
            let piece = start..part.end.min(last);
            // A block that is all the parent's, and zeroes, need not be stored.
            let own = piece.start > first || piece.end < last;
            let stored = own || buf.get(of(&piece)).is_some_and(|b| b.iter().any(|b| *b != 0));
            match runs.last_mut() {
                _ if !stored => {}
                Some(run) if run.end == piece.start => run.end = piece.end,
                _ => runs.push(piece.clone()),
            }
            start = piece.end;
        }
    }
    Ok(runs)
}
