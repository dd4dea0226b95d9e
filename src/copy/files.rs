//! The files that a conversion must leave alone, and those that it removes.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::convert::From;
use super::source::Source;
use crate::error::{Error, Result};
use crate::formats::chain::file_identity;
use crate::formats::places::directory_of;
use crate::formats::{self, Image, OpenOptions};
use crate::storage::device::{DeviceFile, is_device};
use crate::storage::{Access, FileIdentity, Host, Storage};

/// Refuses a target that is a file of the source.
pub(super) fn refuse_source(host: &Arc<dyn Host>, from: &From<'_>, path: &Path) -> Result<()> {
    let Ok(target) = file_identity(host, path) else { return Ok(()) };
    let own = source_files(host, from)?;
    if !own.iter().any(|file| file.of_host() == target.of_host()) {
        return Ok(());
    }
    Err(Error::invalid("the target is the source, or a part of it").in_file(path))
}

fn identity_of(file: &dyn Storage) -> Result<FileIdentity> {
    file.identity().map_err(|e| Error::io("stat", &e).in_file(file.path()))
}

/// The files that the source's disk is in, and the devices.
pub(super) fn source_files(host: &Arc<dyn Host>, from: &From<'_>) -> Result<Vec<FileIdentity>> {
    let mut files = Vec::new();
    for image in from.image.into_iter().flat_map(Image::chain) {
        for path in std::iter::once(&image.path).chain(&image.info.extents) {
            files.push(match is_device(path) {
                true => identity_of(&DeviceFile::open(path, false)?)?,
                false => file_identity(host, path)?,
            });
        }
    }
    if let Source::Disk(disk) = from.source {
        files.extend(disk.flat_file().and_then(|file| file.identity().ok()));
    }
    Ok(files)
}

/// The extents of the image at `path` that have the names which its own parts would have, and lie beside
/// it: a disk that the image was only made to name is somebody else's.
pub(super) fn own_extents(host: &Arc<dyn Host>, path: &Path) -> Vec<PathBuf> {
    let Ok(image) = formats::open(host, path, &OpenOptions::new(Access::Read)) else {
        return Vec::new();
    };
    let stem = path.file_stem().unwrap_or_default().as_bytes();
    let own = |extent: &PathBuf| {
        let name = extent.file_stem().unwrap_or_default().as_bytes();
        let role = name.strip_prefix(stem).and_then(|rest| rest.strip_prefix(b"-"));
        extent.parent() == path.parent()
            && extent.extension() == path.extension()
            && role.is_some_and(|role| match role {
                b"flat" => true,
                [b'f' | b's', number @ ..] => {
                    number.len() >= 3 && number.iter().all(u8::is_ascii_digit)
                }
                _ => false,
            })
    };
    image.info.extents.into_iter().filter(own).collect()
}

/// Removes those parts `old` of the image that was replaced which are no parts of the new one, nor of the
/// source.
pub(super) fn remove_left(
    host: &Arc<dyn Host>,
    from: &From<'_>,
    old: &[PathBuf],
    new: &[PathBuf],
    path: &Path,
) -> Result<()> {
    let mut kept = source_files(host, from)?;
    kept.extend(new.iter().filter_map(|path| file_identity(host, path).ok()));
    let mut removed = false;
    for part in old {
        if file_identity(host, part).is_ok_and(|file| !kept.contains(&file)) {
            host.remove(part)?;
            removed = true;
        }
    }
    if removed { host.sync_dir(&directory_of(path)) } else { Ok(()) }
}
