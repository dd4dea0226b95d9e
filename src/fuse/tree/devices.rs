//! Images whose host file a loop device uses by itself: no request for the disk comes here any more.
//!
//! The image stays open, with its locks, and so does the mount, until no loop device has the file. What
//! the device is given is the very descriptor that carries the file's locks, so that they last as long as
//! the device, even if this process is killed.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use super::{ROOT, Tree, Wanted};
use crate::error::{Error, Result};
use crate::fuse::image::FixedRun;
use crate::storage::Storage;

/// An image that was given to a loop device.
#[derive(Debug)]
pub(super) struct Given {
    ino: u64,
    handle: u64,
    file: Arc<dyn Storage>,
    /// Whoever was given it has bound a device by now, or never will.
    settled: bool,
    /// A reference to the mount, which the kernel does not unmount meanwhile.
    _mount: File,
}

impl Tree {
    /// Gives the host file of the image shown in the root as `name` to a loop device, if its disk lies there
    /// in one piece for good. The number returned is for [`Self::settle`].
    pub fn give(self: &Arc<Self>, name: &OsStr, write: bool) -> Result<Option<(u64, FixedRun)>> {
        let ino = self.lookup(ROOT, name)?.ino;
        let given = self.give_node(ino, write);
        self.forget(ino, 1);
        given
    }

    fn give_node(self: &Arc<Self>, ino: u64, write: bool) -> Result<Option<(u64, FixedRun)>> {
        let mountpoint = &self.look.mountpoint;
        let mount = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC)
            .open(mountpoint)
            .map_err(|e| Error::io("open", &e).in_file(mountpoint))?;
        let handle = self.open_as(ino, Wanted { write, read: true, truncate: false })?.handle;
        let node = self.node(ino)?;
        let run = node.image().map_or(Ok(None), |(image, _)| image.give());
        match run {
            Ok(Some(run)) => {
                let file = run.file.clone();
                let given = Given { ino, handle, file, settled: false, _mount: mount };
                self.given.lock().push(given);
                Ok(Some((ino, run)))
            }
            other => {
                self.release(ino, handle)?;
                other.map(|_| None)
            }
        }
    }

    /// Whoever was given image `ino` has bound a device by now, or never will.
    pub fn settle(&self, ino: u64) {
        self.given
            .lock()
            .iter_mut()
            .filter(|one| one.ino == ino)
            .for_each(|one| one.settled = true);
        self.take_back();
    }

    /// Ends the use of images whose loop device is gone. What fails is kept among the failures.
    pub fn take_back(&self) {
        let done: Vec<_> = {
            let mut given = self.given.lock();
            given.extract_if(.., |one| one.settled && !in_use(&*one.file)).collect()
        };
        for Given { ino, handle, file, settled: _, _mount } in done {
            // Else the file outlives the image, and with it the locks.
            drop(file);
            // It is logged, and told at the end of the mount.
            let _ = self.release(ino, handle);
        }
    }
}

/// Whether a loop device is bound to the file. In doubt it is.
fn in_use(file: &dyn Storage) -> bool {
    let Some(file) = file.host_file() else { return false };
    // The kernel says what either is called now.
    let Ok(name) = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())) else {
        return true;
    };
    let Ok(devices) = fs::read_dir("/sys/block") else { return true };
    devices.flatten().any(|device| {
        let bound = fs::read(device.path().join("loop/backing_file")).unwrap_or_default();
        bound.strip_suffix(b"\n") == Some(name.as_os_str().as_bytes())
    })
}
