//! Flat files that the kernel reads and writes by itself, without asking the daemon.
//!
//! That is right only where the flat file *is* a host file, byte for byte and to the last byte: the
//! image is one extent as long as the disk, with no layer above it. The kernel wants all opens of an
//! inode to be of this kind while one is, so the first one decides; the first refusal (it needs root
//! and Linux 6.9) ends all attempts. A file is not passed through where its file system keeps whole
//! seconds (what the kernel wrote would not show in its times), where that is a FUSE itself, or where it
//! does not take direct I/O, which a program's open(2) may ask for.
//!
//! What the daemon no longer sees, [`KernelWrites`] finds out from the file afterwards: that
//! something was written (then the image's identifiers are renewed and a flush syncs the file), and
//! that something was written past the end of the disk (then the file is cut to size again and the
//! writer's `fsync` or `close` says so). Every other request still comes to the daemon.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fuser::{BackingId, Errno, FileHandle, FopenFlags, ReplyOpen};
use nix::sys::statfs::fstatfs;
use parking_lot::{Condvar, Mutex};

use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;
use crate::storage::remembered::{CLOCK_STEP, Stamp};

/// The backing files known to the kernel.
#[derive(Debug, Default)]
pub struct Passthrough {
    refused: AtomicBool,
    opens: Mutex<HashMap<u64, Opens>>,
    released: Condvar,
}

/// The opens of one inode, all with the backing file or all without.
#[derive(Debug)]
struct Opens {
    count: usize,
    backing: Option<BackingId>,
}

impl Opens {
    /// Whether the kernel uses a file by itself.
    fn lent(&self) -> bool {
        self.backing.is_some()
    }
}

/// How long the kernel may take to tell of a release.
const RELEASE_TIME: Duration = Duration::from_secs(1);

impl Passthrough {
    /// Waits a little until the kernel uses nothing for inode `ino`: of a program that closed the file just
    /// now it tells a moment later.
    pub fn wait_for_release(&self, ino: u64) {
        let used = |opens: &mut HashMap<u64, Opens>| opens.get(&ino).is_some_and(Opens::lent);
        self.released.wait_while_for(&mut self.opens.lock(), used, RELEASE_TIME);
    }

    /// Answers an open(2) of inode `ino` whose writes must all come to the daemon. Whether that can be:
    /// it cannot while the kernel uses a file for other opens, and then the answer is that it is busy.
    pub fn reply_without(
        &self,
        reply: ReplyOpen,
        ino: u64,
        handle: u64,
        flags: FopenFlags,
    ) -> bool {
        let mut opens = self.opens.lock();
        let opens = opens.entry(ino).or_insert(Opens { count: 0, backing: None });
        if opens.lent() {
            log::info!("open: another program has the file open; nopassthrough would allow it");
            reply.error(Errno::EBUSY);
            return false;
        }
        opens.count += 1;
        reply.opened(FileHandle(handle), flags);
        true
    }

    /// Answers an open(2) of inode `ino`, letting the kernel use `file` by itself if that is possible.
    pub fn reply(
        &self,
        reply: ReplyOpen,
        ino: u64,
        handle: u64,
        flags: FopenFlags,
        file: Option<Arc<dyn Storage>>,
    ) {
        let mut opens = self.opens.lock();
        let opens = match opens.entry(ino) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(first) => {
                let backing = file.as_deref().and_then(|file| self.register(&reply, file));
                first.insert(Opens { count: 0, backing })
            }
        };
        opens.count += 1;
        // An open(2) that comes after the answer may want the image for itself: no lock may be left.
        drop(file);
        match &opens.backing {
            Some(backing) => {
                reply.opened_passthrough(FileHandle(handle), FopenFlags::empty(), backing);
            }
            None => reply.opened(FileHandle(handle), flags),
        }
    }

    fn register(&self, reply: &ReplyOpen, file: &dyn Storage) -> Option<BackingId> {
        let file = file.host_file().filter(|_| !self.refused.load(Ordering::Relaxed))?;
        let Ok(own) = reopened(file).inspect_err(|e| log::debug!("no passthrough: {e}")) else {
            return None;
        };
        let refused = |e: &io::Error| {
            log::debug!("no passthrough: {e}");
            self.refused.store(true, Ordering::Relaxed);
        };
        reply.open_backing(own).inspect_err(refused).ok()
    }

    /// Notes the release of a file.
    pub fn release(&self, ino: u64) {
        if let Entry::Occupied(mut known) = self.opens.lock().entry(ino) {
            known.get_mut().count -= 1;
            if known.get().count == 0 {
                known.remove();
                self.released.notify_all();
            }
        }
    }
}

/// The host's file once more. The kernel keeps what it is given for as long as the flat file is open,
/// so it must not be the file that carries the image's locks. It opens it again for each program with
/// that program's flags; direct I/O may be among them, so the file must take that.
fn reopened(file: &File) -> io::Result<File> {
    let own = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    // Some say that they cannot only when something is read.
    own.read_at(&mut Page([0; 4096]).0, 0)?;
    Ok(own)
}

/// Memory as direct I/O wants it.
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// What statfs(2) calls FUSE file systems.
const FUSE: u64 = 0x6573_5546;

/// Whether the file system of `file` lets the kernel's writes be found out, and is none that a program
/// serves.
pub fn suits(file: &File) -> bool {
    let told = file.metadata().is_ok_and(|meta| !Stamp::of(&meta).coarse());
    told && fstatfs(file).is_ok_and(|host| host.filesystem_type().0 as u64 != FUSE)
}

/// What the kernel wrote into an image behind the daemon's back.
#[derive(Debug)]
pub struct KernelWrites {
    file: Arc<dyn Storage>,
    before: Stamp,
    /// Something was written, as far as is known.
    seen: AtomicBool,
}

impl KernelWrites {
    /// Begins to watch `file`, before the kernel may write to it. `None` where it is no host file.
    pub fn watch(file: Arc<dyn Storage>) -> Option<Self> {
        let stamp = || Some(Stamp::of(&file.host_file()?.metadata().ok()?));
        let mut before = stamp()?;
        if !before.settled() {
            // Seldom: the file was changed this very moment.
            std::thread::sleep(CLOCK_STEP);
            before = stamp()?;
        }
        let seen = AtomicBool::new(!before.settled());
        Some(Self { file, before, seen })
    }

    fn happened(&self) -> bool {
        if !self.seen.load(Ordering::Relaxed) {
            let now = self.file.host_file().and_then(|file| file.metadata().ok());
            let changed = now.is_none_or(|now| Stamp::of(&now) != self.before);
            self.seen.fetch_or(changed, Ordering::Relaxed);
        }
        self.seen.load(Ordering::Relaxed)
    }

    /// Tells `disk` if anything was written, so that its next flush covers it.
    pub fn note(&self, disk: &Disk) -> Result<()> {
        if self.happened() { disk.changed_from_outside() } else { Ok(()) }
    }

    /// Cuts off what was written past the end of `disk`; an error if there was any.
    pub fn cut(&self, disk: &Disk) -> Result<()> {
        let io = |e: io::Error| Error::io("cut to size", &e).in_file(self.file.path());
        let len = self.file.len().map_err(io)?;
        if !self.happened() || len <= disk.size() {
            return Ok(());
        }
        self.file.set_len(disk.size()).map_err(io)?;
        let what = format!("{} bytes were written past the end of the disk", len - disk.size());
        Err(Error::new(ErrorKind::NoSpace, what))
    }
}
