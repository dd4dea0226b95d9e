//! Another size of a virtual disk, in place.
//!
//! The format plans, by [`Format::resize`](super::Format::resize); here is what all of them refuse, and
//! what becomes of the plan. What the guest has on the disk is not looked at: partition tables and file
//! systems are their own affair.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::open::open_alone;
use super::places::directory_of;
use super::plan::{Change, Steps};
use super::{Image, OpenContext, OpenOptions, chain, open, recognise};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::progress::Progress;
use crate::storage::draft::Draft;
use crate::storage::{Access, Host};

/// What became of a disk's size, or would.
#[derive(Debug)]
#[non_exhaustive]
pub struct Resized {
    /// Bytes of the disk before.
    pub before: u64,
    /// Bytes of the disk now.
    pub after: u64,
    /// The changes of files, in order.
    pub changes: Vec<Change>,
}

/// Makes the disk of the image at `path` `size` bytes large. Whoever makes it smaller must know that
/// nothing is wanted of what lies behind. A `dry_run` only tells the changes. Images that others stand
/// on keep their size. `progress` is told what is copied; once begun, the change is completed.
///
/// # Errors
///
/// [`ErrorKind::InvalidInput`] for sizes that the image cannot have and for images with
/// children, [`ErrorKind::Busy`] while somebody has the image open, [`ErrorKind::Corrupt`] for damaged
/// ones.
pub fn resize(
    host: &Arc<dyn Host>,
    path: &Path,
    options: &OpenOptions,
    size: u64,
    dry_run: bool,
    progress: &dyn Progress,
) -> Result<Resized> {
    let peek = OpenOptions { access: Access::Peek, next_identity: None, ..options.clone() };
    let image = open(host, path, &peek)?;
    let before = image.disk.size();
    let sector = u64::from(image.disk.geometry().logical_sector);
    if size == 0 || !size.is_multiple_of(sector) {
        let what = format!("{size} bytes are no whole number of sectors of {sector}");
        return Err(Error::invalid(what).in_file(path));
    }
    if size != before {
        refuse_relatives(host, &image, size, &peek)?;
    }
    drop(image);
    let host: &Arc<dyn Host> = &match dry_run {
        true => Draft::over(host)?,
        false => host.clone(),
    };
    let options = OpenOptions { next_identity: None, ..options.clone() };
    change(host, path, &options, before..size, dry_run, progress)
}

/// Changes the disk of an image from one size to another. `options` name the identity that the image
/// then has, where that goes with the size.
pub(crate) fn change(
    host: &Arc<dyn Host>,
    path: &Path,
    options: &OpenOptions,
    sizes: Range<u64>,
    dry_run: bool,
    progress: &dyn Progress,
) -> Result<Resized> {
    let options = OpenOptions { access: Access::Write, ..options.clone() };
    let file = host.open(path, Access::Write)?;
    // From here on nobody else changes it.
    let peek = OpenOptions { access: Access::Peek, next_identity: None, ..options.clone() };
    if open_alone(host, path, &peek)?.info.virtual_size != sizes.start {
        let what = "the image was changed by another program just now";
        return Err(Error::new(ErrorKind::Busy, what).in_file(path));
    }
    let ctx = OpenContext::new(host, &*file, &options);
    let mut plan = Steps::new();
    recognise(&*file)?.resize(file, &ctx, sizes.end, &mut plan).in_file(path)?;
    let changes = plan.changes();
    if !dry_run {
        progress.go_on()?;
        progress.total(plan.copied());
        plan.carry_out(progress).in_file(path)?;
    }
    Ok(Resized { before: sizes.start, after: sizes.end, changes })
}

/// Refuses because of images that count on the size.
fn refuse_relatives(
    host: &Arc<dyn Host>,
    image: &Image,
    size: u64,
    options: &OpenOptions,
) -> Result<()> {
    let refuse = |what: String, hint| Err(Error::invalid(what).in_file(&image.path).hint(hint));
    let children = chain::children(host, image, &[directory_of(&image.path)], options)?;
    if !children.is_empty() {
        let names: Vec<_> = children.iter().map(|child| name(&child.path)).collect();
        let what = format!("other images stand on this one: {}", names.join(", "));
        return refuse(what, "commit them first, or resize the last of them");
    }
    let Some(parent) = &image.parent else { return Ok(()) };
    let below = parent.disk.size();
    if size < below || image.disk.size() < below {
        let what = format!("its parent has {below} bytes, and would show through a smaller child");
        return refuse(what, "commit the image first");
    }
    Ok(())
}

fn name(path: &Path) -> String {
    let name = path.file_name().map_or_else(|| path.to_owned(), PathBuf::from);
    name.display().to_string()
}
