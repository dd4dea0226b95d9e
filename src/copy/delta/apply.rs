//! Putting a delta onto a copy of the ancestor that it was made against.
//!
//! # Order
//!
//! 1. The delta is read and checked from beginning to end, and the target's identity, size and relatives are
//!    looked at. Up to here nothing is written; whatever is wrong is told now.
//! 2. A disk that is too small grows. A VHDX and a VMDK get the mark of 3 with that.
//! 3. The target gets a *mark* for its identity, durably: an id made of the delta itself. It is neither the
//!    ancestor's nor the image's any more, so that it fits no child and no other delta.
//! 4. The runs are written, and the target is closed: everything is durable.
//! 5. It gets the identity of the image that the delta was made from. From here on the next delta fits, and
//!    children of that image would.
//!
//! # What a crash leaves
//!
//! Before 3 the ancestor, after 5 the image; in between a target with the mark, onto which only this delta
//! can be put, again. It holds whole runs, so that putting them there twice changes nothing, and what is
//! there already is read and not written again. A VHD's two footers get an identity one after the other;
//! the last one counts.
//!
//! A VHD's unique id does not change when the disk is written. So of a VHD it cannot be told whether
//! somebody wrote to the target after the last delta; of the other formats it can.

use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::MAX_RUN;
use super::stream::{Header, Reader, Run, Summary};
use crate::disk::Disk;
use crate::disk::transfer::FLUSH_EVERY;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::formats::chain;
use crate::formats::places::directory_of;
use crate::formats::{self, Identity, Image, OpenOptions, resize};
use crate::progress::Progress;
use crate::storage::{Access, Host};

/// What applying has done.
#[derive(Debug)]
pub struct Applied {
    /// What the delta is about.
    pub header: Header,
    /// How much it holds.
    pub summary: Summary,
    /// The target was the image already, and nothing was done.
    pub already: bool,
    /// An earlier attempt had been interrupted.
    pub resumed: bool,
    /// Bytes of data written.
    pub written: u64,
}

/// Puts `delta` onto the image at `path`. `progress` gets the bytes of the delta's data, twice: once for
/// checking. Where it ends the work, the target has the mark, and the same delta completes it.
///
/// # Errors
/// The delta is damaged ([`ErrorKind::Corrupt`]) or no delta, the target is neither the ancestor nor
/// marked by this delta ([`ErrorKind::ParentMismatch`]), others stand on it, it cannot be written, or is
/// in use. None of these changes the target.
pub fn apply<D: Read + Seek>(
    host: &Arc<dyn Host>,
    delta: &mut D,
    path: &Path,
    options: &OpenOptions,
    progress: &dyn Progress,
) -> Result<Applied> {
    let (header, summary, id) = check(delta, progress)?;
    let mark = mark(&header, id);
    let with = |access, next: &Identity| OpenOptions {
        access,
        next_identity: Some(next.clone()),
        force: false,
        ..options.clone()
    };
    let mut target = formats::open(host, path, &with(Access::Write, &mark))?;
    let state = judge(host, &target, &header, &mark, options)?;
    let mut applied =
        Applied { header, summary, already: false, resumed: state == State::Marked, written: 0 };
    let header = &applied.header;
    if state == State::Done {
        return Ok(Applied { already: true, ..applied });
    }
    if target.disk.size() < header.size_after {
        let sizes = target.disk.size()..header.size_after;
        target.close()?;
        resize::change(host, path, &with(Access::Write, &mark), sizes, false, &())?;
        target = formats::open(host, path, &with(Access::Write, &mark))?;
        judge(host, &target, header, &mark, options)?;
    }
    // The beginning of writing is what changes the identity, durably.
    target.disk.write_at(0, &[])?;
    applied.written = put_all(delta, &target.disk, applied.resumed, progress).in_file(path)?;
    target.close()?;

    let target = formats::open(host, path, &with(Access::Write, &header.after))?;
    if target.identity != mark {
        let what = "the image was changed by another program just now";
        return Err(Error::new(ErrorKind::Busy, what).in_file(path));
    }
    target.disk.write_at(0, &[])?;
    target.close()?;
    Ok(applied)
}

/// Reads all of a delta; what it is about, how much it holds, and what tells it from others.
fn check<D: Read + Seek>(
    delta: &mut D,
    progress: &dyn Progress,
) -> Result<(Header, Summary, [u8; 16])> {
    let mut reader = from_start(delta)?;
    let mut buf = Vec::new();
    while let Some(run) = reader.next(&mut buf)? {
        progress.go_on()?;
        if !run.zero {
            progress.advance(run.len);
        }
    }
    let told = reader.told();
    progress.total(2 * told.1.data_bytes);
    Ok(told)
}

fn from_start<D: Read + Seek>(delta: &mut D) -> Result<Reader<BufReader<&mut D>>> {
    delta.seek(SeekFrom::Start(0)).map_err(|e| Error::io("reading the delta", &e))?;
    Reader::new(BufReader::with_capacity(MAX_RUN as usize, delta))
}

/// The identity of a target while the delta `id` is put onto it.
fn mark(header: &Header, id: [u8; 16]) -> Identity {
    match header.after {
        Identity::VhdUniqueId(_) => Identity::VhdUniqueId(id),
        Identity::VhdxDataWrite(_) => Identity::VhdxDataWrite(vec![Uuid::from_bytes(id)]),
        Identity::VmdkCid(_) => {
            let words = id.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word));
            let free = |cid: &u32| {
                let cid = Identity::VmdkCid(*cid);
                !cid.anonymous() && cid != Identity::VmdkCid(u32::MAX)
            };
            let other = |cid: &u32| {
                let cid = Identity::VmdkCid(*cid);
                cid != header.before && cid != header.after
            };
            Identity::VmdkCid(words.filter(free).find(other).unwrap_or(1))
        }
    }
}

/// How far a target is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// It is the ancestor.
    Before,
    /// The delta was put onto it in part.
    Marked,
    /// It is the image.
    Done,
}

/// Decides whether the delta is for this target; refuses if not.
fn judge(
    host: &Arc<dyn Host>,
    target: &Image,
    header: &Header,
    mark: &Identity,
    options: &OpenOptions,
) -> Result<State> {
    let path = &target.path;
    let refuse = |what: String| Err(Error::new(ErrorKind::ParentMismatch, what).in_file(path));
    let size = target.disk.size();
    let sizes = [header.size_before, header.size_after];
    let state = match &target.identity {
        own if own == mark => State::Marked,
        own if *own == header.before => State::Before,
        own if *own == header.after => State::Done,
        own => {
            return refuse(format!(
                "the delta is for a disk with {}, this one has {own}",
                header.before
            ));
        }
    };
    if !sizes.contains(&size) || (state == State::Done && size != header.size_after) {
        return refuse(format!(
            "the delta is for a disk of {} bytes, this one has {size}",
            header.size_before
        ));
    }
    if state == State::Done {
        return Ok(state);
    }
    if target.disk.geometry().logical_sector != header.logical_sector {
        return refuse(format!(
            "the delta is for a disk with sectors of {}",
            header.logical_sector
        ));
    }
    if let Some(why) = &target.read_only {
        return Err(Error::new(ErrorKind::ReadOnly, why.clone()).in_file(path));
    }
    let children = chain::children(host, target, &[directory_of(path)], options)?;
    if let Some(child) = children.first() {
        let what = format!("{} stands on this image, and would lose it", child.path.display());
        return Err(Error::invalid(what).in_file(path).hint("put deltas onto a copy"));
    }
    Ok(state)
}

/// Writes every run of the delta, except those that are there already if it was `begun` before. How many
/// bytes were written.
fn put_all<D: Read + Seek>(
    delta: &mut D,
    disk: &Disk,
    begun: bool,
    progress: &dyn Progress,
) -> Result<u64> {
    let mut reader = from_start(delta)?;
    let (mut buf, mut there) = (Vec::new(), Vec::new());
    let (mut written, mut flushed) = (0, 0);
    while let Some(run) = reader.next(&mut buf)? {
        progress.go_on()?;
        if run.zero {
            disk.discard(run.start, run.len)?;
            continue;
        }
        if !(begun && is_there(disk, &run, &buf, &mut there)?) {
            disk.write_at(run.start, &buf)?;
            written += run.len;
        }
        progress.advance(run.len);
        if written - flushed >= FLUSH_EVERY {
            disk.flush()?;
            flushed = written;
        }
    }
    Ok(written)
}

fn is_there(disk: &Disk, run: &Run, bytes: &[u8], there: &mut Vec<u8>) -> Result<bool> {
    there.resize(bytes.len(), 0);
    disk.read_at(run.start, there)?;
    Ok(there == bytes)
}
