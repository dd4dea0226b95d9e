//! The files that a conversion must leave alone, and those that it removes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::convert::From;
use super::source::Source;
use crate::error::{Error, Result};
use crate::formats::chain::{file_identity, own_files};
use crate::formats::places::directory_of;
use crate::formats::{Image, OpenOptions};
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

/// The files of the image at `path` that go with it, itself not among them; none of one that does not open.
pub(super) fn own_extents(host: &Arc<dyn Host>, path: &Path) -> Vec<PathBuf> {
    own_files(host, path, &OpenOptions::new(Access::Peek)).unwrap_or_default()
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
