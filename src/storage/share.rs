//! Sharing blocks between two host files: FICLONERANGE, which XFS, btrfs, bcachefs, OCFS2 and, where
//! the server can, NFS and SMB have.
//!
//! # What hosts do
//!
//! - Both offsets, and the length, must be multiples of the host's block, or the call fails with EINVAL;
//!   callers keep to 4096 bytes and copy what is left at the ends. A host with larger blocks answers
//!   EINVAL as well.
//! - Files of two file systems: EXDEV. No such operation: EOPNOTSUPP or ENOTTY. A file that is used as
//!   swap space: ETXTBSY. One marked as without copy on write (btrfs) while the other is not: EINVAL.
//! - Pages of the source that are dirty in memory are written back first; the call takes as long as that.
//! - Nothing of it is durable before the file is synced, as after any write.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

/// Makes `len` bytes of `to` from `at` the blocks that `from` has from `from_at`. `false` where the host
/// cannot do that.
pub(super) fn share(to: &File, at: u64, from: &File, from_at: u64, len: u64) -> io::Result<bool> {
    let range = libc::file_clone_range {
        src_fd: from.as_raw_fd().into(),
        src_offset: from_at,
        src_length: len,
        dest_offset: at,
    };
    // Neither std nor nix has this request; it reads `range`, which lives until it returns.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONERANGE, &raw const range) };
    match Errno::result(result) {
        Ok(_) => Ok(true),
        Err(
            Errno::EINVAL
            | Errno::EXDEV
            | Errno::EOPNOTSUPP
            | Errno::ENOTTY
            | Errno::ENOSYS
            | Errno::ETXTBSY
            | Errno::EPERM
            | Errno::EBADF,
        ) => Ok(false),
        Err(e) => Err(e.into()),
    }
}
