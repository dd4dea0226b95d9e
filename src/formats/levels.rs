//! Merging several generations at once, and one from the middle of a chain.
//!
//! # Several levels, in order
//!
//! The top of a chain hides its ancestor wherever any image between them has data, and only there the
//! ancestor is changed. So the top reads the same before, while and after, as long as it finds its parents.
//! What lies between does not, and has nobody but the top that stands on it.
//!
//! 1. VHDX: the lowest of the images that go learns the identity that the ancestor is going to have, beside
//!    the present one.
//! 2. What the images hold, of each place the newest, goes into the ancestor, which is closed: all of it is
//!    durable.
//! 3. The ancestor is known by something else, as after [merging](super::chain): VMDK by the content id of the
//!    top, VHD by a new unique id where it has other children.
//! 4. The images go, the lowest first: one without its parent does not open, while one whose child is gone
//!    would show older contents than the ancestor holds, and could be merged into it once more.
//!
//! Killed before 3, the top is what it was, and the same request can be made again; later, the ancestor holds
//! everything.
//!
//! # From the middle, in order
//!
//! 1. The image is merged into its parent, by the steps 1 and 2 above. What the parent is known by does not
//!    change beyond that: nobody else stands on it.
//! 2. Its children name the parent as their own, one after the other. Each reads the same over either.
//! 3. The image goes.
//!
//! Killed anywhere, every child opens and reads the same. Asked for again, what the parent holds already
//! is not written again, for some of the children may know it by now.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use super::chain::{
    CHUNK, Merged, announce, children, chunks, file_identity, next_identity, no_child, opening,
    own_files, read, relink,
};
use super::naming::listed;
use super::open::open_alone;
use super::places::directory_of;
use super::{Identity, Image, NewLink, OpenOptions, open, resize};
use crate::disk::Disk;
use crate::disk::layers::{self, Content, Run};
use crate::disk::transfer::copy_layers;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::progress::Progress;
use crate::storage::{self, Access, Host};

/// What was merged, and what became of the rest.
#[derive(Debug)]
#[non_exhaustive]
pub struct Levels {
    /// The image that holds everything, and what of the others is left.
    pub merged: Merged,
    /// The images that are gone.
    pub removed: Vec<PathBuf>,
    /// Images that have another parent now.
    pub relinked: Vec<PathBuf>,
}

/// Images from the one that goes first on down to the one that stays, and the hosts that they are opened
/// from: each in the name of who names it.
struct Stack {
    paths: Vec<PathBuf>,
    hosts: Vec<Arc<dyn Host>>,
}

impl Stack {
    fn of(host: &Arc<dyn Host>, images: &[&Image]) -> Result<Self> {
        let mut stack = Self { paths: Vec::new(), hosts: vec![host.clone()] };
        for image in images {
            let host = &stack.hosts[stack.hosts.len() - 1];
            let below = storage::named_in(host, &*host.open(&image.path, Access::Peek)?);
            stack.paths.push(image.path.clone());
            stack.hosts.push(below);
        }
        Ok(stack)
    }

    /// How many images go.
    fn levels(&self) -> usize {
        self.paths.len() - 1
    }
}

/// Merges the image at `path`, and all that it stands on before `ancestor`, into that. `over_siblings` goes
/// on although the ancestor has other children, which do not match it any more then. `progress` gets the
/// bytes of the disk done; where it ends the work, the ancestor has a part of what is the others', and the
/// image reads the same.
///
/// # Errors
/// As of [`merge`](super::chain::merge); also where others stand on one of the images between.
pub fn merge_to(
    host: &Arc<dyn Host>,
    path: &Path,
    ancestor: &Path,
    options: &OpenOptions,
    over_siblings: bool,
    progress: &dyn Progress,
) -> Result<Levels> {
    let peek = opening(options, Access::Peek, None);
    let top = open(host, path, &peek)?;
    let wanted = file_identity(host, ancestor)?;
    let images: Vec<&Image> = top.chain().collect();
    let place = images.iter().position(|i| file_identity(host, &i.path).ok() == Some(wanted));
    let Some(level) = place.filter(|level| *level > 0) else {
        let what = format!("{} is not among its ancestors", ancestor.display());
        return Err(Error::invalid(what).in_file(path).hint("`flatdisk info --chain` lists them"));
    };
    let images = &images[..=level];
    let mut siblings = refuse_relatives(host, images, &peek)?;
    if !over_siblings && let Some(sibling) = siblings.first() {
        let (sibling, name) = (sibling.display(), images[level].path.display());
        let what = format!("{sibling} is a child of {name} too, and would lose it");
        return Err(Error::invalid(what).in_file(path).hint("rebase it first, or use --force"));
    }
    refuse_sizes(images)?;
    let stack = Stack::of(host, images)?;
    let identity = top.identity.clone();
    let (bytes, written) = pour(&stack, images, options, progress)?;
    let (below, into) = (&stack.hosts[level], &stack.paths[level]);
    let renewed = match &identity {
        Identity::VmdkCid(_) => Some(identity),
        Identity::VhdUniqueId(_) if !siblings.is_empty() => {
            Some(Identity::VhdUniqueId(*Uuid::new_v4().as_bytes()))
        }
        _ => None,
    };
    if written && renewed.is_some() {
        let image = open(below, into, &opening(options, Access::Write, renewed))?;
        // The beginning of writing is what changes the identity.
        image.disk.write_at(0, &[])?;
        image.disk.close()?;
    }
    let extents: Vec<_> = images[..level].iter().flat_map(|i| i.info.extents.clone()).collect();
    let left = remove(&stack, &extents, &peek)?;
    siblings.sort();
    let merged = Merged { parent: into.clone(), bytes, siblings, left };
    let removed = stack.paths[..level].to_vec();
    Ok(Levels { merged, removed, relinked: Vec::new() })
}

/// Merges the image at `path` into its parent, and lets the images beside it that stand on it stand on
/// that.
///
/// # Errors
/// As of [`merge`](super::chain::merge): other children of the parent are a reason to refuse, and so is a
/// child that is in use.
pub fn merge_middle(
    host: &Arc<dyn Host>,
    path: &Path,
    options: &OpenOptions,
    progress: &dyn Progress,
) -> Result<Levels> {
    let peek = opening(options, Access::Peek, None);
    let image = open(host, path, &peek)?;
    let Some(parent) = &image.parent else { return Err(no_child(path)) };
    let images = [&image, parent];
    refuse_sizes(&images)?;
    let own = file_identity(host, path)?;
    let folders = [directory_of(&image.path), directory_of(&parent.path)];
    let followers = children(host, &image, &folders, &peek)?;
    let siblings = children(host, parent, &folders, &peek)?;
    let siblings = siblings.into_iter().filter(|sibling| sibling.identity != own);
    let siblings: Vec<_> = siblings.map(|sibling| sibling.path).collect();
    // None of them may be in use when its turn comes.
    for follower in &followers {
        host.open(&follower.path, Access::Write)?;
    }
    let stack = Stack::of(host, &images)?;
    let mut bytes = 0;
    if !holds_already(&image.disk, &parent.disk, progress)? {
        if !siblings.is_empty() {
            let what = format!("its parent has other children: {}", listed(&siblings));
            return Err(Error::invalid(what).in_file(path).hint("rebase or flatten them first"));
        }
        bytes = pour(&stack, &images, options, progress)?.0;
    }
    let identity = open_alone(&stack.hosts[1], &parent.path, &peek)?.identity;
    for follower in &followers {
        let link = NewLink { identity: &identity, parent: &parent.path };
        relink(host, &follower.path, &link, options)?;
    }
    let left = remove(&stack, &image.info.extents, &peek)?;
    let merged = Merged { parent: parent.path.clone(), bytes, siblings: Vec::new(), left };
    let relinked = followers.into_iter().map(|follower| follower.path).collect();
    Ok(Levels { merged, removed: vec![path.to_owned()], relinked })
}

/// Refuses what others need: the first of `images`, and those between it and the last. Returns the other
/// children of the last.
fn refuse_relatives(
    host: &Arc<dyn Host>,
    images: &[&Image],
    options: &OpenOptions,
) -> Result<Vec<PathBuf>> {
    let mut folders: Vec<_> = images.iter().map(|image| directory_of(&image.path)).collect();
    folders.sort();
    folders.dedup();
    let mut above = None;
    let mut others = Vec::new();
    for (level, image) in images.iter().enumerate() {
        let found = children(host, image, &folders, options)?;
        let found = found.into_iter().filter(|child| Some(child.identity) != above);
        others = found.map(|child| child.path).collect();
        if level + 1 < images.len() && !others.is_empty() {
            let what = format!("other images stand on this one: {}", listed(&others));
            return Err(Error::invalid(what)
                .in_file(&image.path)
                .hint("merge or rebase them first"));
        }
        above = Some(file_identity(host, &image.path)?);
    }
    Ok(others)
}

/// Refuses chains in which an image is smaller than its parent, and damaged ones.
fn refuse_sizes(images: &[&Image]) -> Result<()> {
    for pair in images.windows(2) {
        let (own, below) = (pair[0].disk.size(), pair[1].disk.size());
        if own < below {
            let what = format!("the image has {own} bytes, its parent {below}");
            let refused = Error::invalid(what).in_file(&pair[0].path);
            return Err(refused.hint("make the image larger first"));
        }
        if !pair[0].damage.is_empty() {
            let what = "the image is damaged, and merging would make that final";
            return Err(Error::corrupt(what).in_file(&pair[0].path));
        }
    }
    Ok(())
}

/// Writes what all images but the last hold into the last, durably; how many bytes that was, and whether
/// anything had to be written.
fn pour(
    stack: &Stack,
    images: &[&Image],
    options: &OpenOptions,
    progress: &dyn Progress,
) -> Result<(u64, bool)> {
    let level = stack.levels();
    let (host, path) = (&stack.hosts[level], &stack.paths[level]);
    let (lowest_host, lowest) = (&stack.hosts[level - 1], &stack.paths[level - 1]);
    let busy = |path: &Path| {
        let what = "the image was changed by another program just now";
        Error::new(ErrorKind::Busy, what).in_file(path)
    };
    let mut below = images[level].identity.clone();
    let sizes = images[level].disk.size()..images[0].disk.size();
    if sizes.start < sizes.end {
        if let Some(why) = &images[level].read_only {
            return Err(Error::new(ErrorKind::ReadOnly, why.clone()).in_file(path));
        }
        let next = next_identity(images[level]);
        announce(lowest_host, lowest, images[level], &next, options)?;
        let options = opening(options, Access::Write, Some(next.clone()));
        resize::change(host, path, &options, sizes, false, &())?;
        below = next;
    }
    let parent = open(host, path, &opening(options, Access::Peek, None))?;
    if !parent.identity.satisfies(&below) {
        return Err(busy(path));
    }
    let next = next_identity(&parent);
    let parent = open(host, path, &opening(options, Access::Write, Some(next.clone())))?;
    if let Some(why) = &parent.read_only {
        return Err(Error::new(ErrorKind::ReadOnly, why.clone()).in_file(path));
    }
    announce(lowest_host, lowest, &parent, &next, options)?;
    // From here on nobody writes to the images above it.
    let mut disk = parent.disk.clone();
    let mut identity = parent.identity.clone();
    for (host, path) in stack.hosts.iter().zip(&stack.paths).take(level).rev() {
        let opened = open_alone(host, path, &opening(options, Access::Read, None))?;
        if !opened.parent.is_some_and(|link| identity.satisfies(&link.identity)) {
            return Err(busy(path));
        }
        identity = opened.identity;
        disk = Arc::new(Disk::new(opened.map, Some(disk), Some("being merged".to_owned())));
    }
    let bytes = copy_layers(&disk, &parent.disk, level, progress).in_file(&stack.paths[0])?;
    let written = parent.disk.writing();
    parent.disk.close()?;
    Ok((bytes, written))
}

/// Whether `below` holds everything that `disk` has of its own.
fn holds_already(disk: &Disk, below: &Disk, progress: &dyn Progress) -> Result<bool> {
    if disk.size() != below.size() {
        return Ok(false);
    }
    let (mut own, mut other) = (vec![0; CHUNK as usize], vec![0; CHUNK as usize]);
    let mut same = true;
    layers::runs(disk, 1, |run: Run| {
        if !same || run.content == Content::Unallocated {
            return Ok(());
        }
        for part in chunks(run.start..run.start + run.len) {
            progress.go_on()?;
            let len = (part.end - part.start) as usize;
            read(disk, part.start, &mut own[..len])?;
            read(below, part.start, &mut other[..len])?;
            same &= own[..len] == other[..len];
            if !same {
                break;
            }
        }
        Ok(())
    })?;
    Ok(same)
}

/// Removes all images but the last, the lowest first, each with the files that are its own. Returns which
/// of `extents` are left.
fn remove(stack: &Stack, extents: &[PathBuf], options: &OpenOptions) -> Result<Vec<PathBuf>> {
    let mut gone = Vec::new();
    for (host, path) in stack.hosts.iter().zip(&stack.paths).take(stack.levels()).rev() {
        // Whoever names it may write to it: that is what it takes to make an end of it.
        drop(host.open(path, Access::Write)?);
        let own = own_files(host, path, options)?;
        stack.hosts[0].remove(path)?;
        stack.hosts[0].sync_dir(&directory_of(path))?;
        own.iter().try_for_each(|file| stack.hosts[0].remove(file))?;
        stack.hosts[0].sync_dir(&directory_of(path))?;
        gone.extend(own);
    }
    let mut left = extents.to_vec();
    left.retain(|file| !gone.contains(file));
    Ok(left)
}
