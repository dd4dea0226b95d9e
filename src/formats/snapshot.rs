//! Snapshots: an image is kept as it is under another name, and a new child of it takes its name, so that
//! whatever goes by that name goes on.
//!
//! `disk.vhdx` becomes `disk-NAME.vhdx`, in the same directory. All of a disk's own files get names of the
//! new kind (`disk-NAME-flat.vmdk`): with the old ones they would be taken for the child's, and the
//! next snapshot of an ESX disk, whose children have a second file too, would collide.
//!
//! # Freezing, in order
//!
//! 1. The image gets its new name beside the old one ([`naming`](super::naming), steps 1 to 3).
//! 2. The child is made under temporary names, complete and durable.
//! 3. Nothing but the old name is left of the old names (steps 4 and 5).
//! 4. The child takes the old name, in one step.
//!
//! At no moment is there no disk under the old name. What fails in 1 or 2 is undone. Killed, the same
//! request goes on where it was: an image beside this one that is made of the same files is what it
//! finds, and takes for the name, whatever time it is by now.
//!
//! # Where the file system has no second names
//!
//! An image in one file gets its new name in one step, and then the child is made. Killed between the two,
//! nothing is under the old name, and the disk is complete under the new one: the same request, with the
//! name, makes the child. An image in several files is refused.
//!
//! # Going back, in order
//!
//! A fresh child of the frozen image is made under temporary names, and takes the name. The files of the
//! child before that have other names go last. Of a child in several files the named one goes first:
//! killed then, only the frozen image is there, and the same request makes the child.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::chain::{file_identity, opening};
use super::naming::{Renaming, children_beside, files_of, listed, paths};
use super::places::directory_of;
use super::{CreateSpec, Format, Image, OpenOptions, by_name, open, recognise};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::staged::Staged;
use crate::storage::{Access, Host};

/// What was frozen.
#[derive(Debug)]
#[non_exhaustive]
pub struct Frozen {
    /// The image as it was, under its new name.
    pub frozen: PathBuf,
    /// What is worth a remark.
    pub remark: Option<String>,
}

/// Freezes the image at `path` as `NAME` says: `disk.vhdx` as `disk-NAME.vhdx`. Who reads it may go on.
///
/// # Errors
/// Somebody writes to the image ([`ErrorKind::Busy`]), other images stand on it, the new name is taken
/// ([`ErrorKind::Exists`]), the file system has no second names, or the format has no children of such a
/// disk. Nothing has changed then.
pub fn take(
    host: &Arc<dyn Host>,
    path: &Path,
    name: Option<&str>,
    default_name: &str,
    options: &OpenOptions,
) -> Result<Frozen> {
    let path = &real(path);
    let peek = opening(options, Access::Peek, None);
    let image = match open(host, path, &peek) {
        Err(e) if e.kind() == ErrorKind::NotFound && host.open(path, Access::Peek).is_err() => {
            return resume(host, path, name.ok_or(e)?, &peek);
        }
        other => other?,
    };
    let begun = unfinished(host, path, &peek)?;
    let frozen = match (begun, name) {
        (Some(begun), None) => begun,
        (Some(begun), Some(name)) if begun != frozen_name(path, name)? => {
            let what = format!("a snapshot that was interrupted is called {}", listed(&[begun]));
            let hint = "`flatdisk snapshot IMAGE` without a name completes it";
            return Err(Error::new(ErrorKind::Exists, what).in_file(path).hint(hint));
        }
        (_, name) => frozen_name(path, name.unwrap_or(default_name))?,
    };
    let children = children_beside(host, &image, &peek)?;
    if !children.is_empty() {
        let what = format!("other images stand on this one: {}", listed(&paths(&children)));
        return Err(Error::invalid(what).in_file(path).hint("take a snapshot of the last of them"));
    }
    drop(image);
    let mut renaming = match Renaming::new(host, path, &frozen, options, Access::Write) {
        // Who only reads may go on.
        Err(e) if matches!(e.kind(), ErrorKind::Busy | ErrorKind::Denied) => {
            Renaming::new(host, path, &frozen, options, Access::Read).map_err(|_| e)?
        }
        other => other?,
    };
    match renaming.add() {
        Err(e) if e.kind() == ErrorKind::Unsupported && renaming.is_one_file() => {
            renaming
                .move_at_once()
                .and_then(|()| child_of(host, path, &frozen, &frozen, false, &peek)?.commit())
                .inspect_err(|_| renaming.move_back())?;
            let remark = remark(&renaming);
            return Ok(Frozen { frozen, remark });
        }
        added => added?,
    }
    let staged = match child_of(host, path, &frozen, path, true, &peek) {
        Ok(staged) => staged,
        Err(e) => {
            renaming.undo();
            return Err(e);
        }
    };
    let again = |e: Error| e.hint("`flatdisk snapshot IMAGE` goes on where this ended");
    renaming.leave().map_err(again)?;
    staged.commit().map_err(again)?;
    let remark = remark(&renaming);
    Ok(Frozen { frozen, remark })
}

/// What is worth a remark about a renaming.
fn remark(renaming: &Renaming<'_>) -> Option<String> {
    renaming.keeps_old_name_inside().then(|| {
        "somebody reads the image, so that it goes on calling itself by its old name inside"
            .to_owned()
    })
}

/// Makes the child that is missing where a program was killed between the two steps that it takes where
/// files have no second names.
fn resume(host: &Arc<dyn Host>, path: &Path, name: &str, options: &OpenOptions) -> Result<Frozen> {
    let frozen = frozen_name(path, name)?;
    // The name that was asked for is what is not there.
    let missing = |e: Error| if e.kind() == ErrorKind::NotFound { e.renamed(path) } else { e };
    child_of(host, path, &frozen, &frozen, false, options).map_err(missing)?.commit()?;
    Ok(Frozen { frozen, remark: None })
}

/// Gives the name `path` to a fresh child of the frozen image that `name` stands for: what was written
/// since is gone. Returns the frozen image.
///
/// # Errors
/// The image is in use, the frozen one is of another disk, or others stand on the image. Nothing has changed then.
pub fn revert(
    host: &Arc<dyn Host>,
    path: &Path,
    name: &str,
    options: &OpenOptions,
) -> Result<PathBuf> {
    let path = &real(path);
    let peek = opening(options, Access::Peek, None);
    let frozen = find(host, path, name)?;
    let mut left = Vec::new();
    let mut locked = None;
    match open(host, path, &peek) {
        Ok(image) => {
            refuse_revert(host, &image, &frozen, &peek)?;
            let file = host.open(path, Access::Write)?;
            let format = recognise(&*file)?;
            let ctx = super::OpenContext::new(host, &*file, &opening(options, Access::Write, None));
            let opened = format.open(file.clone(), &ctx)?;
            let naming = format.naming(&file, path)?;
            left = [naming.parts, naming.notes].concat();
            locked = Some((file, opened));
        }
        // What a killed program left.
        Err(e) if e.kind() == ErrorKind::NotFound && host.open(path, Access::Peek).is_err() => {}
        Err(e) => return Err(e),
    }
    let like = if locked.is_some() { path } else { &frozen };
    let staged = child_of(host, path, &frozen, like, true, &peek)?;
    let made = staged.commit()?;
    let new = |part: &PathBuf| made.iter().any(|new| new.file_name() == part.file_name());
    for part in left.into_iter().map(|(part, _)| part).filter(|part| !new(part)) {
        match host.remove(&part) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    host.sync_dir(&directory_of(path))?;
    drop(locked);
    Ok(frozen)
}

fn refuse_revert(
    host: &Arc<dyn Host>,
    image: &Image,
    frozen: &Path,
    options: &OpenOptions,
) -> Result<()> {
    let refuse = |what, hint| Err(Error::invalid(what).in_file(&image.path).hint(hint));
    // Whoever went back may go forward again, to what stands on the same disk.
    let kept = open(host, frozen, options)?;
    let bottom = |image: &Image| {
        let last = image.chain().last().map(|image| file_identity(host, &image.path));
        last.transpose()
    };
    if bottom(image)? != bottom(&kept)? {
        let what = format!("{} is of another disk", listed(&[frozen.to_owned()]));
        return refuse(what, "`flatdisk snapshot IMAGE --list` shows what there is");
    }
    if file_identity(host, frozen)? == file_identity(host, &image.path)? {
        return refuse("it is the image itself".to_owned(), "name a snapshot");
    }
    let children = children_beside(host, image, options)?;
    match children.is_empty() {
        true => Ok(()),
        false => {
            let what = format!("other images stand on this one: {}", listed(&paths(&children)));
            refuse(what, "revert the last of them, or delete them first")
        }
    }
}

/// The path itself, and what a symlink leads to: that is what gets another name.
fn real(path: &Path) -> PathBuf {
    match path.is_symlink() {
        true => std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()),
        false => path.to_owned(),
    }
}

/// Makes a child of `frozen` that is going to be called `path`, in the place of another if `replace`, and
/// owned as the file `like`.
fn child_of(
    host: &Arc<dyn Host>,
    path: &Path,
    frozen: &Path,
    like: &Path,
    replace: bool,
    options: &OpenOptions,
) -> Result<Arc<Staged>> {
    let parent = open(host, frozen, options)?;
    let format: &dyn Format = by_name(parent.info.format)?;
    // In parts of limited size its files would have the names of the parent's.
    let in_parts = parent.info.subformat.to_ascii_lowercase().contains("gbmaxextent");
    let subformat = in_parts.then(|| "monolithicSparse".to_owned());
    let spec = CreateSpec { subformat, ..CreateSpec::default() };
    let staged = Staged::new(host.clone(), path, replace)?;
    let explain = |e: Error| staged.explain(e.in_file(path));
    format.create_child(&*staged, path, &parent, &spec).map_err(explain)?;
    for name in staged.names() {
        staged.dress(&name, like).map_err(explain)?;
    }
    Ok(staged)
}

/// Makes a child at `path` of the image at `parent`, which holds what `fill` writes to its disk. It takes its
/// name when it is complete and durable.
///
/// # Errors
/// There is a file of this name, the parent cannot have a child, or what `fill` fails with.
pub fn child_holding(
    host: &Arc<dyn Host>,
    path: &Path,
    parent: &Path,
    options: &OpenOptions,
    fill: impl FnOnce(&Disk) -> Result<()>,
) -> Result<()> {
    let staged =
        child_of(host, path, parent, parent, false, &opening(options, Access::Peek, None))?;
    let explain = |e: Error| staged.explain(e);
    let unfinished: Arc<dyn Host> = staged.clone();
    let child = open(&unfinished, path, &opening(options, Access::Write, None)).map_err(explain)?;
    fill(&child.disk).and_then(|()| child.close()).map_err(explain)?;
    staged.commit().map(drop)
}

/// What the image at `path` is called when it is frozen as `name`.
///
/// # Errors
/// `name` cannot be a part of a file's name.
pub fn frozen_name(path: &Path, name: &str) -> Result<PathBuf> {
    let plain = !name.is_empty() && !name.contains('/') && !name.chars().any(char::is_control);
    if !plain {
        let what = format!("`{name}` cannot be a part of a file's name");
        return Err(Error::invalid(what).hint("no slashes and no control characters"));
    }
    let mut frozen = path.file_stem().unwrap_or_default().to_owned();
    frozen.push("-");
    frozen.push(name);
    if let Some(extension) = path.extension() {
        frozen.push(".");
        frozen.push(extension);
    }
    Ok(path.with_file_name(frozen))
}

/// The frozen image that `name` stands for: the name that it was given, or its file's.
fn find(host: &Arc<dyn Host>, path: &Path, name: &str) -> Result<PathBuf> {
    let by_file = Path::new(name).file_name().map(|name| path.with_file_name(name));
    let named = frozen_name(path, name).ok();
    let there = |path: &PathBuf| host.open(path, Access::Peek).is_ok();
    named.into_iter().chain(by_file).find(there).ok_or_else(|| {
        let what = format!("there is no snapshot `{name}` of it");
        Error::new(ErrorKind::NotFound, what)
            .in_file(path)
            .hint("`flatdisk snapshot IMAGE --list` shows what it stands on")
    })
}

/// The name of a snapshot of `path` that was begun: an image of such a name that is made of the same
/// files. Second names that were given to files before there was one are taken away.
fn unfinished(host: &Arc<dyn Host>, path: &Path, options: &OpenOptions) -> Result<Option<PathBuf>> {
    let Some(stem) = path.file_stem() else { return Ok(None) };
    let own = files_of(host, path, options);
    let mut second = Vec::new();
    for other in host.list(&directory_of(path))? {
        let name = other.file_name().unwrap_or_default().as_encoded_bytes();
        let rest = name.strip_prefix(stem.as_encoded_bytes());
        if other.file_name() == path.file_name() || !rest.is_some_and(|r| r.starts_with(b"-")) {
            continue;
        }
        let image = !own.is_empty() && other.extension() == path.extension();
        if image && files_of(host, &other, options) == own {
            return Ok(Some(path.with_file_name(other.file_name().unwrap_or_default())));
        }
        if file_identity(host, &other).is_ok_and(|file| own.contains(&file)) {
            second.push(other);
        }
    }
    // Those that the image goes by stay.
    let opened = super::open::open_alone(host, path, options)?;
    let named =
        |file: &Path| opened.map.files().iter().any(|f| f.path().file_name() == file.file_name());
    for file in second.iter().filter(|file| !named(file)) {
        host.remove(file)?;
    }
    Ok(None)
}
