//! Beginning early to write to the device what is to be durable at the end.
//!
//! The kernel keeps written pages in memory for many seconds, so that a long copy leaves its device idle
//! and then waits for it. Errors of the device are not told here: a later sync tells them.

use std::fs::File;
use std::os::fd::AsRawFd;

/// Begins writing all dirty pages of a file; a host that cannot is none the worse.
pub(super) fn begin(file: &File) {
    // Neither std nor nix has this call; it takes numbers only. A length of 0 means to the end.
    #[allow(unsafe_code)]
    unsafe {
        libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE);
    }
}
