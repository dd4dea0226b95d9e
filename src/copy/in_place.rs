//! A raw disk becomes a fixed VHD, and back, without copying: the two differ by the footer at the end.
//!
//! # Order
//!
//! To VHD: the footer is appended and synced, then the file renamed. Between the two it is a fixed VHD
//! under the old name. If renaming fails, the footer is taken off again.
//!
//! To raw: the file is renamed, then the footer cut off, and synced. Between the two it is a fixed VHD
//! under the new name.

use std::path::Path;
use std::sync::Arc;

use crate::codec;
use crate::disk::map::Geometry;
use crate::disk::sync_file;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::places::directory_of;
use crate::formats::{self, CreateSpec, OpenOptions, recognise, vhd};
use crate::storage::{Access, Host, Storage};

/// Opens the raw disk at `path`, which nobody else may have open and which is no image, and says its
/// length. With `raw` whatever it looks like is taken for what a guest wrote.
///
/// # Errors
///
/// [`ErrorKind::Busy`] if somebody has it open, [`ErrorKind::InvalidInput`] if it is an image.
pub fn open_raw(host: &Arc<dyn Host>, path: &Path, raw: bool) -> Result<(Arc<dyn Storage>, u64)> {
    let file = host.open(path, Access::Write)?;
    let len = file.len().map_err(|e| Error::io("asking for the size", &e).in_file(path))?;
    if len == 0 {
        return Err(Error::invalid("the file is empty").in_file(path));
    }
    match recognise(&*file) {
        Ok(format) if !raw => {
            let what = format!("this is a {}, no raw disk", format.name().to_uppercase());
            return Err(Error::invalid(what).in_file(path).hint("--from raw takes it for one"));
        }
        Err(e) if e.kind() != ErrorKind::NotThisFormat => return Err(e),
        _ => {}
    }
    Ok((file, len))
}

/// Makes the raw disk at `path` the fixed VHD `target`. A length that is no multiple of a sector is filled
/// up. Returns the disk's size.
///
/// # Errors
///
/// Those of [`open_raw`]; [`ErrorKind::Exists`] for a target that is there and not to be replaced. The raw disk is
/// as it was then.
pub fn wrap(
    host: &Arc<dyn Host>,
    path: &Path,
    target: &Path,
    raw: bool,
    replace: bool,
) -> Result<u64> {
    let (file, len) = open_raw(host, path, raw)?;
    let size = len.next_multiple_of(Geometry::SECTOR);
    let spec = CreateSpec { size, ..CreateSpec::default() };
    let footer = vhd::fixed_footer(size, &spec)?;
    let done = codec::write_all(&*file, size, &footer, "the footer")
        .and_then(|()| sync_file(&*file))
        .and_then(|()| rename(host, path, target, replace));
    if let Err(e) = done {
        let undone = file.set_len(len).and_then(|()| file.sync());
        if let Err(undone) = undone {
            log::warn!("{}: the footer could not be taken off again: {undone}", path.display());
        }
        return Err(e);
    }
    sync_dirs(host, path, target)?;
    Ok(size)
}

/// Makes the fixed VHD at `path` the raw disk `target`. Returns the disk's size.
///
/// # Errors
///
/// [`ErrorKind::InvalidInput`] for what is no fixed VHD, [`ErrorKind::Busy`] if somebody has it open,
/// [`ErrorKind::Exists`] for a target that is there and not to be replaced.
pub fn unwrap(host: &Arc<dyn Host>, path: &Path, target: &Path, replace: bool) -> Result<u64> {
    // The lock of this opening is held until the end, and the image only looked at beside it.
    let file = host.open(path, Access::Write)?;
    let image = formats::open(host, path, &OpenOptions::new(Access::Peek))?;
    if (image.info.format, &*image.info.subformat) != ("vhd", "fixed") {
        let what = format!(
            "a {} {} does not lie in its file as it is",
            image.info.subformat,
            image.info.format.to_uppercase()
        );
        return Err(Error::invalid(what)
            .in_file(path)
            .hint("convert without --in-place copies it"));
    }
    if let Some(why) = &image.read_only {
        return Err(Error::new(ErrorKind::ReadOnly, why.clone()).in_file(path));
    }
    let size = image.disk.size();
    rename(host, path, target, replace)?;
    sync_dirs(host, path, target)?;
    file.set_len(size).map_err(|e| Error::io("cutting the footer off", &e).in_file(target))?;
    sync_file(&*file)?;
    Ok(size)
}

fn rename(host: &Arc<dyn Host>, from: &Path, to: &Path, replace: bool) -> Result<()> {
    host.rename(from, to, replace).map_err(|e| match e.kind() {
        ErrorKind::Exists => e.hint("--force replaces it"),
        _ => e,
    })
}

fn sync_dirs(host: &Arc<dyn Host>, from: &Path, to: &Path) -> Result<()> {
    host.sync_dir(&directory_of(to))?;
    match directory_of(from) == directory_of(to) {
        true => Ok(()),
        false => host.sync_dir(&directory_of(from)),
    }
}
