//! Images as commands are given them.
//!
//! Whoever looks into a mount sees flat files and hardly remembers where the images lie. A flat file of
//! a live mount therefore stands for its image, wherever a command takes one.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::formats::ova;
use crate::fuse::mounts;
use crate::fuse::tree::{IMAGE, PARTITION};
use crate::storage::file::HostFs;
use crate::storage::{Access, Host};

/// The image that `path` stands for: the file that [`file_of`] finds, or the only disk of an archive.
pub fn image_of(path: &Path) -> Result<PathBuf> {
    let file = file_of(path)?;
    let host = HostFs::shared();
    if ova::is_ova(&*host, &file) { ova::only_disk(&host, &file) } else { Ok(file) }
}

/// The image or archive that `path` stands for: that of a flat file if it lies in a live mount of flatdisk;
/// a disk in an archive for `ARCHIVE:DISK`; and itself otherwise, also if it does not exist or does not
/// answer. Anybody can give a file the attribute, so that it counts only in a mount of ours.
pub fn file_of(path: &Path) -> Result<PathBuf> {
    let Ok(meta) = std::fs::metadata(path) else {
        return Ok(in_archive(path).unwrap_or_else(|| path.to_owned()));
    };
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

/// The images that each of `paths` stands for: of an archive all its disks.
pub fn images_of(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let host = HostFs::shared();
    let mut images = Vec::new();
    for path in paths {
        let file = file_of(path)?;
        if ova::is_ova(&*host, &file) {
            images.extend(ova::disks(&host, &file)?);
        } else {
            images.push(file);
        }
    }
    Ok(images)
}

/// The path of a disk that is named `ARCHIVE:DISK`.
fn in_archive(path: &Path) -> Option<PathBuf> {
    let bytes = path.as_os_str().as_bytes();
    let colons = (1..bytes.len()).filter(|at| bytes[*at] == b':');
    let mut parts = colons.map(|at| (bytes[..at].as_ref(), bytes[at + 1..].as_ref()));
    parts.find_map(|(archive, disk)| {
        let [archive, disk] = [archive, disk].map(|part: &[u8]| Path::new(OsStr::from_bytes(part)));
        let found = !disk.as_os_str().is_empty() && disk.is_relative();
        (found && ova::is_ova(&HostFs, archive)).then(|| archive.join(disk))
    })
}

/// The contents of `path` if that is a description, manifest or certificate in an archive.
pub fn text_of(path: &Path) -> Result<Option<Vec<u8>>> {
    const MAX_LEN: u64 = 16 << 20;
    let extension = path.extension().and_then(OsStr::to_str).unwrap_or_default();
    let text = ["ovf", "mf", "cert"].iter().any(|known| known.eq_ignore_ascii_case(extension));
    if !text || path.is_file() {
        return Ok(None);
    }
    let file = HostFs.open(path, Access::Peek)?;
    let failed = |e: std::io::Error| Error::io("read", &e).in_file(path);
    let len = file.len().map_err(failed)?;
    if len > MAX_LEN {
        return Err(Error::unsupported(format!("a text of {len} bytes")).in_file(path));
    }
    let mut text = vec![0; len as usize];
    file.read_at(0, &mut text).map_err(failed)?;
    Ok(Some(text))
}

/// The image and the number of its partition that `IMAGE:N` stands for; `None` for anything else, and where a file
/// has that very name.
pub fn partition_of(path: &Path) -> Option<(PathBuf, u32)> {
    let (image, number) = path.to_str()?.rsplit_once(':')?;
    let number = number.parse().ok()?;
    (!exists(path) && exists(Path::new(image))).then(|| (image.into(), number))
}

/// Whether there is an image or archive that `path` stands for.
pub fn exists(path: &Path) -> bool {
    path.is_file() || in_archive(path).is_some_and(|disk| HostFs.open(&disk, Access::Peek).is_ok())
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
