//! Mounts that somebody else made: `mount.fuse3 -o drop_privileges` mounts as root, gives up every
//! privilege, and hands the open `/dev/fuse` over as mount point `/dev/fd/N`.
#![allow(unsafe_code, reason = "a descriptor that is known by its number only")]

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::mounts::{self, MountEntry};
use crate::error::{Error, Result};

/// Device number of `/dev/fuse`, the same on every Linux.
const DEV_FUSE: (u32, u32) = (10, 229);

/// The descriptor that a mount point names, if it is one.
pub fn descriptor(mountpoint: &Path) -> Option<RawFd> {
    let number = mountpoint.strip_prefix("/dev/fd").ok()?.to_str()?;
    number.parse().ok().filter(|number| *number > 2)
}

/// Takes over an open `/dev/fuse`.
pub fn take(descriptor: RawFd) -> Result<OwnedFd> {
    let failed = |e: io::Error| Error::io(format!("/dev/fd/{descriptor}"), &e);
    // SAFETY: only used to duplicate it, which fails if it is not open; numbers are not negative.
    let handed = unsafe { BorrowedFd::borrow_raw(descriptor) };
    let own = File::from(handed.try_clone_to_owned().map_err(failed)?);
    let meta = own.metadata().map_err(failed)?;
    let device = (nix::sys::stat::major(meta.rdev()), nix::sys::stat::minor(meta.rdev()));
    let is_fuse = device == (DEV_FUSE.0.into(), DEV_FUSE.1.into());
    if !meta.file_type().is_char_device() || !is_fuse {
        return Err(Error::invalid(format!("/dev/fd/{descriptor} is not an open /dev/fuse")));
    }
    Ok(own.into())
}

/// The mount that an open `/dev/fuse` serves. Kernels before 6.16 do not say; there it is taken to be
/// the last one made.
pub fn mount_of(fuse: &OwnedFd) -> Result<Option<MountEntry>> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fuse.as_raw_fd()));
    let device = info
        .unwrap_or_default()
        .lines()
        .find_map(|line| Some(format!("0:{}", line.strip_prefix("fuse_connection:")?.trim())));
    let mut entries = mounts::mount_table()?.into_iter().rev().filter(MountEntry::is_ours);
    Ok(match device {
        Some(device) => entries.find(|entry| entry.device == device),
        None => entries.next(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_numbers_of_descriptors_are_mount_points_handed_over() {
        assert_eq!(descriptor(Path::new("/dev/fd/3")), Some(3));
        for other in ["/dev/fd", "/dev/fd/x", "/dev/fd/-3", "/dev/fd/1", "/mnt/3", "3"] {
            assert_eq!(descriptor(Path::new(other)), None, "{other}");
        }
    }

    #[test]
    fn what_is_not_dev_fuse_is_refused() {
        let file = File::open("/dev/null").unwrap();
        let refused = take(file.as_raw_fd()).unwrap_err().to_string();
        assert!(refused.contains("is not an open /dev/fuse"), "{refused}");
        assert!(take(1 << 20).is_err());
    }
}
