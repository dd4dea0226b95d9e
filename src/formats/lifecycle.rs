//! Another name for an image, and its end.
//!
//! # Renaming, in order
//!
//! 1. The image gets its new name beside the old one ([`naming`](super::naming), steps 1 to 3).
//! 2. The children that are to follow it name it by the new one, one after the other.
//! 3. The old name goes, at last of all (steps 4 to 6).
//!
//! What fails in 1 or 2 is undone. Killed anywhere, the disk is complete under one of the names, its
//! children find it, and the same request does the rest.
//!
//! # Deleting, in order
//!
//! The disk's own other files go first and the named file last, so that what a crash leaves of it can be
//! named, and deleted, still.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::chain::{Child, opening, relink};
use super::naming::{Renaming, children_beside, files_of, is_listed, listed, paths, refuse_link};
use super::open::open_alone;
use super::places::directory_of;
use super::{NewLink, OpenContext, OpenOptions, open, recognise};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Access, Host};

/// Gives the image at `old` the name of `new`, in the same directory, with all its own files. Its ids stay.
/// `follow` lets the images beside it that stand on it name it by the new name; they are returned.
///
/// # Errors
/// The image is in use, other images stand on it and are not to follow, the new name is taken, or either
/// name is a symlink. Nothing has changed then.
pub fn rename(
    host: &Arc<dyn Host>,
    old: &Path,
    new: &Path,
    follow: bool,
    options: &OpenOptions,
) -> Result<Vec<PathBuf>> {
    if directory_of(old) != directory_of(new) {
        let what = "an image gets another name in its own directory only";
        let hint = "mv moves it, with all its files; `flatdisk rebase --unsafe` tells its children";
        return Err(Error::invalid(what).in_file(new).hint(hint));
    }
    if old.file_name() == new.file_name() {
        return Err(Error::invalid("that is its name already").in_file(old));
    }
    refuse_link(old)?;
    refuse_link(new)?;
    let peek = opening(options, Access::Peek, None);
    let image = open_alone(host, old, &peek)?;
    refuse_taken(host, old, new, &peek)?;
    let children = children_of(host, old, &peek)?;
    if !follow && !children.is_empty() {
        let what = format!("other images stand on this one: {}", listed(&paths(&children)));
        return Err(Error::invalid(what).in_file(old).hint("--children lets them follow"));
    }
    drop(image);
    let mut renaming = Renaming::new(host, old, new, options, Access::Write)?;
    match renaming.add() {
        // The file system has no second names.
        Err(e) if e.kind() == ErrorKind::Unsupported && renaming.is_one_file() => {
            return if children.is_empty() {
                renaming.move_at_once().map(|()| Vec::new())
            } else {
                Err(e)
            };
        }
        added => added?,
    }
    for (index, child) in children.iter().enumerate() {
        if let Err(e) = point(host, child, new, options) {
            for child in &children[..index] {
                if let Err(e) = point(host, child, old, options) {
                    log::warn!("{e}");
                }
            }
            renaming.undo();
            return Err(e);
        }
    }
    renaming.leave()?;
    renaming.remove_old()?;
    Ok(paths(&children))
}

/// Refuses a name that another image has.
fn refuse_taken(host: &Arc<dyn Host>, old: &Path, new: &Path, options: &OpenOptions) -> Result<()> {
    if host.open(new, Access::Peek).is_err() {
        return Ok(());
    }
    // A request that was interrupted.
    let own = files_of(host, old, options);
    if !own.is_empty() && own == files_of(host, new, options) && is_listed(host, new) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Exists, "the file exists").in_file(new))
}

/// The images beside the one at `path` that stand on it.
pub(super) fn children_of(
    host: &Arc<dyn Host>,
    path: &Path,
    options: &OpenOptions,
) -> Result<Vec<Child>> {
    match open(host, path, options) {
        Ok(image) => children_beside(host, &image, options),
        // Whoever stands on it cannot be opened either.
        Err(e) if matches!(e.kind(), ErrorKind::ParentMissing | ErrorKind::ParentMismatch) => {
            Ok(Vec::new())
        }
        Err(e) => Err(e),
    }
}

/// Makes `child` name its parent by the path `parent`.
fn point(host: &Arc<dyn Host>, child: &Child, parent: &Path, options: &OpenOptions) -> Result<()> {
    let link = NewLink { identity: &child.link.identity, parent };
    relink(host, &child.path, &link, &opening(options, Access::Write, None))
}

/// Removes the image at `path` with all files that are its own; what it stands on stays. Returns the files,
/// in the order in which they go; a `dry_run` only tells them. `force` takes an image on which others
/// stand, and one that does not open.
///
/// # Errors
/// The image is in use, a symlink or a device, or others stand on it. Nothing has changed then.
pub fn delete(
    host: &Arc<dyn Host>,
    path: &Path,
    force: bool,
    dry_run: bool,
    options: &OpenOptions,
) -> Result<Vec<PathBuf>> {
    refuse_link(path)?;
    let peek = opening(options, Access::Peek, None);
    if !force {
        let children = children_of(host, path, &peek).or_else(|e| match e.kind() {
            // A part of it is gone already.
            ErrorKind::NotFound if host.open(path, Access::Peek).is_ok() => Ok(Vec::new()),
            _ => Err(e),
        })?;
        if !children.is_empty() {
            let what = format!("other images stand on this one: {}", listed(&paths(&children)));
            let hint = "flatten or delete them first, or use --force";
            return Err(Error::invalid(what).in_file(path).hint(hint));
        }
    }
    // Held until all is gone.
    let access = if dry_run { Access::Peek } else { Access::Write };
    let file = host.open(path, access)?;
    let format = match recognise(&*file) {
        Ok(format) => format,
        Err(e) => return Err(e.hint("only images are deleted here")),
    };
    let ctx = OpenContext::new(host, &*file, &opening(options, access, None));
    let opened = format.open(file.clone(), &ctx);
    match &opened {
        Err(e) if e.kind() == ErrorKind::Busy => return Err(e.clone().in_file(path)),
        Err(e) if !force && e.kind() != ErrorKind::NotFound => {
            return Err(e.clone().in_file(path).hint("--force deletes it all the same"));
        }
        _ => {}
    }
    let parts = match format.naming(&file, path) {
        Ok(naming) => [naming.parts, naming.notes].concat(),
        Err(_) if force => Vec::new(),
        Err(e) => return Err(e.in_file(path)),
    };
    let there = |part: &PathBuf| host.open(part, Access::Peek).is_ok();
    let parts = parts.into_iter().map(|(part, _)| part).filter(there);
    let unique: BTreeSet<PathBuf> = parts.collect();
    let files: Vec<_> = unique.into_iter().chain([path.to_owned()]).collect();
    if !dry_run {
        for file in &files {
            if file == path && files.len() > 1 {
                host.sync_dir(&directory_of(path))?;
            }
            host.remove(file)?;
        }
        host.sync_dir(&directory_of(path))?;
    }
    Ok(files)
}
