//! Changing chains: merging a child into its parent, and giving a child another parent.
//!
//! # Merging, in order
//!
//! A child hides what its parent holds wherever it has data of its own, and only there the parent is
//! changed. So the child reads the same before, while and after, as long as it finds its parent:
//!
//! A parent smaller than the child gets the child's size before that, in the same way: a VHDX child first
//! learns the identity that its parent has afterwards. What it shows behind the parent's end stays zeroes.
//!
//! 1. VHDX: the child learns the identity that its parent is going to have, beside the present one.
//!    VHD and VMDK parents keep theirs while they are written.
//! 2. The child's data goes into the parent, which is closed: all of it is durable.
//! 3. VMDK: the parent takes over the child's content id, which is now its own contents'. VHD: a
//!    parent that has other children gets a new unique id, or they could not tell that it changed.
//! 4. The child is removed, with the files that are its own ([`Format::own_files`]); or its link follows what 1 and 3 did, and it is emptied.
//!
//! Killed before 4, the child is still there, and merging can be repeated. Only between 3 and 4 a VMDK
//! or VHD child no longer matches its parent, which has everything by then.
//!
//! # Another parent, in order
//!
//! 1. What the child shows of the old parent and would not of the new one becomes the child's own, and
//!    durable. The child reads the same over either parent.
//! 2. The link changes, in one durable step of the format's ([`Format::relink`]).

use std::mem::discriminant;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use super::open::open_alone;
use super::places::{self, Place, directory_of};
use super::{
    Format, Identity, Image, NewLink, OpenContext, OpenOptions, ParentLink, by_extension, open,
    recognise, resize,
};
use crate::codec;
use crate::disk::Disk;
use crate::disk::map::{DiskRange, Source};
use crate::disk::transfer::{FLUSH_EVERY, copy_layers};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::progress::Progress;
use crate::storage::staged::is_unfinished;
use crate::storage::{self, Access, FileIdentity, Host};

/// Bytes copied or compared at a time.
pub(super) const CHUNK: u64 = 1 << 20;
/// Alignment of what is compared; no disk has larger sectors.
const SECTOR: u64 = 4096;

/// What merging has done.
#[derive(Debug)]
#[non_exhaustive]
pub struct Merged {
    /// The image that now holds everything.
    pub parent: PathBuf,
    /// Bytes of the child that were its own.
    pub bytes: u64,
    /// Other children of the parent, which show wrong contents now.
    pub siblings: Vec<PathBuf>,
    /// Files that the child was made of and that are left, because they may be another's too.
    pub left: Vec<PathBuf>,
}

/// How to merge.
#[derive(Debug, Clone, Copy, Default)]
pub struct Merging {
    /// Go on although the parent has other children, which then do not match it any more.
    pub over_siblings: bool,
    /// Keep the child, as an empty one that shows its parent.
    pub keep: bool,
}

/// Merges the image at `path` into its parent and removes it. Other images that need the child, if it
/// is not kept, or the parent are a reason to refuse. `progress` gets the bytes of the disk done; where it
/// ends the work, the parent has a part of what is the child's, which still reads the same.
///
/// # Errors
///
/// [`ErrorKind::Busy`] while somebody has an image of the chain open, [`ErrorKind::InvalidInput`] for what is no
/// child and where other images stand on one of the two, [`ErrorKind::Corrupt`] for damaged ones,
/// [`ErrorKind::Cancelled`] where `progress` ends the work.
pub fn merge(
    host: &Arc<dyn Host>,
    path: &Path,
    options: &OpenOptions,
    how: Merging,
    progress: &dyn Progress,
) -> Result<Merged> {
    let with = |access, next_identity| opening(options, access, next_identity);
    let mut seen = open(host, path, &with(Access::Peek, None))?;
    let Some(seen_parent) = &seen.parent else { return Err(no_child(path)) };
    fits_into(&seen, seen_parent)?;
    let siblings = refuse_relatives(host, &seen, seen_parent, options, how)?;
    // Written, too, the parent is only in the name of who names it.
    let below = match &options.parent {
        None => &storage::named_in(host, &*host.open(path, Access::Peek)?),
        Some(_) => host,
    };
    if seen_parent.disk.size() < seen.disk.size() {
        grow_parent(host, below, &seen, seen_parent, options)?;
        seen = open(host, path, &with(Access::Peek, None))?;
    }
    let Some(seen_parent) = &seen.parent else { return Err(no_child(path)) };

    let next = next_identity(seen_parent);
    let parent = open(below, &seen_parent.path, &with(Access::Write, Some(next.clone())))?;
    if parent.identity != seen_parent.identity {
        let what = "the image was changed by another program just now";
        return Err(Error::new(ErrorKind::Busy, what).in_file(&parent.path));
    }
    if let Some(why) = &parent.read_only {
        return Err(Error::new(ErrorKind::ReadOnly, why.clone()).in_file(&parent.path));
    }
    announce(host, path, &parent, &next, options)?;
    let own_files = own_files(host, path, &with(Access::Peek, None))?;
    let opened = open_alone(host, path, &with(Access::Read, None))?;
    if !opened.parent.is_some_and(|link| parent.identity.satisfies(&link.identity)) {
        let what = "the image was changed by another program just now";
        return Err(Error::new(ErrorKind::Busy, what).in_file(path));
    }
    let child = Disk::new(opened.map, Some(parent.disk.clone()), Some("being merged".to_owned()));
    let bytes = copy_own(&child, &parent.disk, progress).in_file(path)?;
    let written = parent.disk.writing();
    parent.disk.close()?;
    let merged = parent.path.clone();
    // The child's disk holds its parent's, and with it the lock.
    drop((child, parent));

    let renewed = match &seen.identity {
        Identity::VmdkCid(_) => Some(seen.identity.clone()),
        Identity::VhdUniqueId(_) if !siblings.is_empty() => {
            Some(Identity::VhdUniqueId(*Uuid::new_v4().as_bytes()))
        }
        _ => None,
    };
    if written && renewed.is_some() {
        let parent = open(below, &merged, &with(Access::Write, renewed))?;
        // The beginning of writing is what changes the identity.
        parent.disk.write_at(0, &[])?;
        parent.disk.close()?;
    }
    let mut left = Vec::new();
    if how.keep {
        let parent = open_alone(host, &merged, &with(Access::Peek, None))?.identity;
        relink(host, path, &NewLink { identity: &parent, parent: &merged }, options)?;
        // The contents do not change, so children of the child go on knowing it.
        let file = host.open(path, Access::Write)?;
        let ctx = OpenContext::new(host, &*file, &with(Access::Write, Some(seen.identity)));
        recognise(&*file)?.empty(file, &ctx).in_file(path)?;
    } else {
        // Without its descriptor, the rest is no disk any more.
        host.remove(path)?;
        own_files.iter().try_for_each(|file| host.remove(file))?;
        host.sync_dir(&directory_of(path))?;
        left = seen.info.extents;
        left.retain(|file| !own_files.contains(file));
    }
    Ok(Merged { parent: merged, bytes, siblings, left })
}

/// The identity that a parent has once it was written.
pub(super) fn next_identity(parent: &Image) -> Identity {
    match &parent.identity {
        Identity::VhdxDataWrite(_) => Identity::VhdxDataWrite(vec![Uuid::new_v4()]),
        kept => kept.clone(),
    }
}

/// Makes the child at `path` know the identity that its parent is going to have, beside the present one.
pub(super) fn announce(
    host: &Arc<dyn Host>,
    path: &Path,
    parent: &Image,
    next: &Identity,
    options: &OpenOptions,
) -> Result<()> {
    let (Identity::VhdxDataWrite(now), Identity::VhdxDataWrite(next)) = (&parent.identity, next)
    else {
        return Ok(());
    };
    let both = Identity::VhdxDataWrite([&now[..], &next[..]].concat());
    relink(host, path, &NewLink { identity: &both, parent: &parent.path }, options)
}

/// Makes the parent of `child` as large as the child. What the child shows stays.
fn grow_parent(
    host: &Arc<dyn Host>,
    below: &Arc<dyn Host>,
    child: &Image,
    parent: &Image,
    options: &OpenOptions,
) -> Result<()> {
    if let Some(why) = &parent.read_only {
        return Err(Error::new(ErrorKind::ReadOnly, why.clone()).in_file(&parent.path));
    }
    let next = next_identity(parent);
    announce(host, &child.path, parent, &next, options)?;
    let options = opening(options, Access::Write, Some(next));
    let sizes = parent.disk.size()..child.disk.size();
    resize::change(below, &parent.path, &options, sizes, false, &()).map(drop)
}

/// Options for opening an image of the chain.
pub(super) fn opening(
    options: &OpenOptions,
    access: Access,
    next_identity: Option<Identity>,
) -> OpenOptions {
    OpenOptions { access, next_identity, force: false, parent: None, ..options.clone() }
}

/// Gives the image at `path` the parent at `new`. Unless `link_only`, whatever would look different
/// over it is copied into the child first. `progress` gets the bytes of the disk done; where it ends the
/// work, the child has a copy of a part of what it shows. Returns the bytes copied.
///
/// # Errors
///
/// [`ErrorKind::Busy`] while somebody has the child open, [`ErrorKind::InvalidInput`] for a parent that does not
/// suit it, [`ErrorKind::Cancelled`] where `progress` ends the work.
pub fn rebase(
    host: &Arc<dyn Host>,
    path: &Path,
    new: &Path,
    options: &OpenOptions,
    link_only: bool,
    progress: &dyn Progress,
) -> Result<u64> {
    let with = |access, next_identity| opening(options, access, next_identity);
    // Open until the end, so that nobody writes to it.
    let new = open(host, new, &with(Access::Read, None))?;
    let alone = open_alone(host, path, &with(Access::Peek, None))?;
    if alone.parent.is_none() {
        return Err(no_child(path));
    }
    let own = file_identity(host, path)?;
    for image in new.chain() {
        if file_identity(host, &image.path)? == own {
            let what = format!("the new parent {} needs this image itself", new.path.display());
            return Err(Error::invalid(what).in_file(path));
        }
    }
    if discriminant(&new.identity) != discriminant(&alone.identity) {
        let what =
            format!("a {} image cannot have a {} parent", alone.info.format, new.info.format);
        return Err(Error::invalid(what).in_file(path));
    }
    let (size, sector) = (alone.info.virtual_size, alone.info.logical_sector_size);
    let exact = matches!(new.identity, Identity::VmdkCid(_));
    if new.disk.size() > size || (exact && new.disk.size() != size) {
        let what = format!("the new parent has {} bytes, the image {size}", new.disk.size());
        return Err(Error::invalid(what).in_file(path));
    }
    if new.info.logical_sector_size != sector {
        let what = format!(
            "the new parent has sectors of {} bytes, the image {sector}",
            new.info.logical_sector_size
        );
        return Err(Error::invalid(what).in_file(path));
    }

    let mut copied = 0;
    if !link_only {
        // The contents do not change, so children of the child go on knowing it.
        let child = open(host, path, &with(Access::Write, Some(alone.identity.clone())))?;
        if let Some(why) = &child.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, why.clone()).in_file(path));
        }
        if let Some(old) = &child.parent {
            copied = copy_differences(&child.disk, &old.disk, &new.disk, progress).in_file(path)?;
        }
        child.disk.close()?;
    }
    relink(host, path, &NewLink { identity: &new.identity, parent: &new.path }, options)?;
    Ok(copied)
}

pub(super) fn no_child(path: &Path) -> Error {
    Error::invalid("the image has no parent").in_file(path)
}

/// Which file the one at `path` is.
///
/// # Errors
///
/// [`ErrorKind::NotFound`], [`ErrorKind::Denied`], and those of the host.
pub fn file_identity(host: &Arc<dyn Host>, path: &Path) -> Result<FileIdentity> {
    let file = host.open(path, Access::Peek)?;
    file.identity().map_err(|e| Error::io("stat", &e).in_file(path))
}

pub(super) fn relink(
    host: &Arc<dyn Host>,
    path: &Path,
    link: &NewLink<'_>,
    options: &OpenOptions,
) -> Result<()> {
    let options = OpenOptions { access: Access::Write, ..options.clone() };
    let file = host.open(path, Access::Write)?;
    let format: &dyn Format = recognise(&*file)?;
    let context = OpenContext::new(host, &*file, &options);
    format.relink(file, &context, link).in_file(path)
}

/// The files that go when the image at `path` does.
pub(crate) fn own_files(
    host: &Arc<dyn Host>,
    path: &Path,
    options: &OpenOptions,
) -> Result<Vec<PathBuf>> {
    let file = host.open(path, Access::Peek)?;
    let format: &dyn Format = recognise(&*file)?;
    let context = OpenContext::new(host, &*file, options);
    format.own_files(file, &context).in_file(path)
}

/// Whether all of a child has room in its parent.
fn fits_into(child: &Image, parent: &Image) -> Result<()> {
    if child.disk.size() < parent.disk.size() {
        let (own, below) = (child.disk.size(), parent.disk.size());
        let what = format!("the image has {own} bytes, its parent {below}");
        return Err(Error::invalid(what).in_file(&child.path).hint("make the image larger first"));
    }
    if !child.damage.is_empty() {
        let what = "the image is damaged, and merging would make that final";
        return Err(Error::corrupt(what).in_file(&child.path));
    }
    Ok(())
}

/// Refuses to merge a child that others need; returns the other children of its parent, or refuses
/// because of them.
fn refuse_relatives(
    host: &Arc<dyn Host>,
    child: &Image,
    parent: &Image,
    options: &OpenOptions,
    how: Merging,
) -> Result<Vec<PathBuf>> {
    let mut folders = vec![directory_of(&child.path), directory_of(&parent.path)];
    folders.dedup();
    let own = file_identity(host, &child.path)?;
    let grandchildren =
        if how.keep { Vec::new() } else { children(host, child, &folders, options)? };
    if let Some(grandchild) = grandchildren.first() {
        let what = format!("{} is a child of this image", grandchild.path.display());
        return Err(Error::invalid(what).in_file(&child.path).hint("merge or rebase it first"));
    }
    let mut siblings = children(host, parent, &folders, options)?;
    siblings.retain(|sibling| sibling.identity != own);
    match siblings.first() {
        Some(Child { path: sibling, .. }) if !how.over_siblings => {
            let name = parent.path.display();
            let what = format!("{} is a child of {name} too, and would lose it", sibling.display());
            Err(Error::invalid(what).in_file(&child.path).hint("rebase it first, or use --force"))
        }
        _ => Ok(siblings.into_iter().map(|sibling| sibling.path).collect()),
    }
}

/// An image that stands on another.
#[derive(Debug)]
pub struct Child {
    /// Where it is.
    pub path: PathBuf,
    /// Which file it is.
    pub identity: FileIdentity,
    /// How it names its parent.
    pub link: ParentLink,
}

/// The images in `folders` whose parent is `image`.
///
/// # Errors
///
/// Those of listing the folders.
pub fn children(
    host: &Arc<dyn Host>,
    image: &Image,
    folders: &[PathBuf],
    options: &OpenOptions,
) -> Result<Vec<Child>> {
    let wanted = file_identity(host, &image.path)?;
    let peek = OpenOptions { access: Access::Peek, next_identity: None, ..options.clone() };
    let mut found: Vec<Child> = Vec::new();
    for folder in folders {
        for path in host.list(folder)? {
            // What is not finished is nobody's.
            if by_extension(&path).is_none() || path.file_name().is_some_and(is_unfinished) {
                continue;
            }
            // What cannot be opened is nobody's child.
            let Ok(opened) = open_alone(host, &path, &peek) else { continue };
            let Some(link) = opened.parent else { continue };
            if image.identity.satisfies(&link.identity)
                && leads_to(host, &path, &link, wanted, options)
            {
                let identity = file_identity(host, &path)?;
                if found.iter().all(|known| known.identity != identity) {
                    found.push(Child { path, identity, link });
                }
            }
        }
    }
    Ok(found)
}

/// Whether the child at `path` finds the file `wanted`, which has the right id, for its parent.
pub(super) fn leads_to(
    host: &Arc<dyn Host>,
    path: &Path,
    link: &ParentLink,
    wanted: FileIdentity,
    options: &OpenOptions,
) -> bool {
    let file_at = |place: &Place| {
        place.open(&**host, Access::Peek)?.identity().map_err(|e| Error::io("stat", &e))
    };
    let places = places::of_parent(path, link, &options.permitted());
    let found: Vec<_> = places.iter().filter_map(|place| file_at(place).ok()).collect();
    if !found.is_empty() {
        return found.contains(&wanted);
    }
    // Without a file of the right name it is found by its id, where that tells it from others.
    let alike = |place: &Place| {
        let similar = place.similar(&**host, &options.folders);
        similar.iter().any(|place| file_at(place).is_ok_and(|file| file == wanted))
    };
    !link.identity.anonymous() || places.iter().any(alike)
}

/// Writes what is the child's own into its parent; how many bytes that was.
fn copy_own(child: &Disk, parent: &Disk, progress: &dyn Progress) -> Result<u64> {
    copy_layers(child, parent, 1, progress)
}

/// Writes into `child` what `old` shows through it and `new` would not; how many bytes that was.
fn copy_differences(child: &Disk, old: &Disk, new: &Disk, progress: &dyn Progress) -> Result<u64> {
    let (mut before, mut after) = (vec![0; CHUNK as usize], vec![0; CHUNK as usize]);
    let (mut bytes, mut flushed) = (0, 0);
    let mut pos = 0;
    let mut done = 0;
    progress.total(child.size());
    while let Some(data) = next_data(old, new, pos)? {
        progress.go_on()?;
        pos = data / SECTOR * SECTOR;
        let end = child.size().min(pos + CHUNK);
        if pos >= end {
            break;
        }
        for extent in child.extents(pos..end)?.iter().filter(|e| e.source == Source::Parent) {
            let len = extent.len as usize;
            let (before, after) = (&mut before[..len], &mut after[..len]);
            read(old, extent.start, before)?;
            read(new, extent.start, after)?;
            for run in differences(before, after) {
                put(child, extent.start + run.start as u64, &before[run.clone()])?;
                bytes += run.len() as u64;
            }
        }
        if bytes - flushed >= FLUSH_EVERY {
            child.flush()?;
            flushed = bytes;
        }
        pos = end;
        progress.advance(pos - done);
        done = pos;
    }
    Ok(bytes)
}

/// Where the next data of either disk begins.
fn next_data(a: &Disk, b: &Disk, from: u64) -> Result<Option<u64>> {
    let starts = [a.next_data(from)?, b.next_data(from)?];
    Ok(starts.into_iter().flatten().map(|data| data.start).min())
}

/// Reads a disk, with zeroes past its end.
pub(crate) fn read(disk: &Disk, at: u64, buf: &mut [u8]) -> Result<()> {
    let inside = disk.size().saturating_sub(at).min(buf.len() as u64) as usize;
    let (below, past) = buf.split_at_mut(inside);
    past.fill(0);
    if below.is_empty() { Ok(()) } else { disk.read_at(at, below) }
}

/// Writes bytes, unstored where they are zeroes and the format can say that.
fn put(disk: &Disk, at: u64, bytes: &[u8]) -> Result<()> {
    if codec::is_zero(bytes) {
        disk.discard(at, bytes.len() as u64)
    } else {
        disk.write_at(at, bytes)
    }
}

/// The runs of sectors in which two equally long buffers differ.
fn differences(a: &[u8], b: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    let sector = SECTOR as usize;
    for (index, (x, y)) in a.chunks(sector).zip(b.chunks(sector)).enumerate() {
        if x != y {
            let start = index * sector;
            match runs.last_mut() {
                Some(last) if last.end == start => last.end = start + x.len(),
                _ => runs.push(start..start + x.len()),
            }
        }
    }
    runs
}

pub(super) fn chunks(range: DiskRange) -> impl Iterator<Item = DiskRange> {
    let end = range.end;
    range.step_by(CHUNK as usize).map(move |start| start..end.min(start + CHUNK))
}
