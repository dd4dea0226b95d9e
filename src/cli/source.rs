//! Images as commands are given them.
//!
//! Whoever looks into a mount sees flat files and hardly remembers where the images lie. A flat file of
//! a live mount therefore stands for its image, wherever a command takes one.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::fuse::mounts;
use crate::fuse::tree::{IMAGE, PARTITION};

/// The image that `path` stands for: that of a flat file if it lies in a live mount of flatdisk, and
/// itself otherwise, also if it does not exist or does not answer. Anybody can give a file the attribute,
/// so that it counts only in a mount of ours.
pub fn image_of(path: &Path) -> Result<PathBuf> {
    let Ok(meta) = std::fs::metadata(path) else { return Ok(path.to_owned()) };
    if !meta.is_file() || !lies_in_our_mount(meta.dev())? {
        return Ok(path.to_owned());
    }
    let failed = |e: Errno| Error::io("asking for the image", &e.into()).in_file(path);
    // A partition is a disk of its own, and a raw one.
    if attribute(path, PARTITION).map_err(failed)?.is_some() {
        return Ok(path.to_owned());
    }
    Ok(attribute(path, IMAGE).map_err(failed)?.unwrap_or_else(|| path.to_owned()))
}

/// [`image_of`] each of `paths`.
pub fn images_of(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    paths.iter().map(|path| image_of(path)).collect()
}

fn lies_in_our_mount(device: u64) -> Result<bool> {
    let mut mounts = mounts::mount_table()?.into_iter();
    Ok(mounts.any(|mount| mount.is_ours() && mount.number() == Some(device)))
}

/// The value of an extended attribute, if the file has it.
fn attribute(path: &Path, name: &str) -> std::result::Result<Option<PathBuf>, Errno> {
    // No path is longer.
    let mut value = vec![0; libc::PATH_MAX as usize];
    match rustix::fs::getxattr(path, name, value.as_mut_slice()) {
        Ok(len) => {
            value.truncate(len);
            Ok(Some(OsString::from_vec(value).into()))
        }
        Err(Errno::NODATA) => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_attribute_counts_only_in_a_mount_of_ours() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.img");
        std::fs::write(&path, "x").unwrap();
        let flags = rustix::fs::XattrFlags::empty();
        // Where the file system has no attributes there is nothing to be fooled by.
        let _ = rustix::fs::setxattr(&path, IMAGE, b"/etc/passwd", flags);
        assert_eq!(image_of(&path).unwrap(), path);
        let absent = dir.path().join("absent");
        assert_eq!(image_of(&absent).unwrap(), absent);
    }
}
