//! Flat files that a program writes anew: `cp`, `dd`, `qemu-img convert` onto a disk.
//!
//! Such programs truncate the file first. Its size is the disk's and cannot change, so that what it holds
//! stays, as on a block device, until they write over it. But they take it for granted that what they
//! leave out reads as zeroes: for `cp` the holes of a sparse file, for qemu-img all zeroes. So for whoever
//! truncated the file it is noted how far it has got. What is skipped up to the next byte that is
//! written, or by an extension of the file, becomes zero at that moment; what lies behind the last byte
//! stays. A stray `>` in a shell changes nothing.
//!
//! - After open(2) with `O_TRUNC` all writes come here directly, past the kernel's pages, and not by
//!   `passthrough`, for which no other program may have the file open that way. The kernel drops its
//!   pages of the file, and takes the size for 0 until it asks again, which it does at the next read. With
//!   the kernel's write-back cache it would never ask, and such an open(2) is refused.
//! - ftruncate(2) to 0 is accepted of who reads and writes, as qemu-img does before it gives the file
//!   its size back. truncate(1) only writes, and is refused as any other size is.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::{READS_TOO, Tree, What};
use crate::error::Result;

/// Who writes which file anew.
#[derive(Debug, Default)]
pub(super) struct Anew {
    /// Spares all others the look into `reached`.
    count: AtomicUsize,
    /// By handle, up to which byte the file has its new contents.
    reached: Mutex<HashMap<u64, Arc<Mutex<u64>>>>,
}

impl Anew {
    /// From here on `handle` writes its file anew.
    pub(super) fn begin(&self, handle: u64) {
        let mut reached = self.reached.lock();
        reached.insert(handle, Arc::default());
        self.count.store(reached.len(), Ordering::Relaxed);
    }

    /// `handle` is closed.
    pub(super) fn end(&self, handle: u64) {
        if self.count.load(Ordering::Relaxed) > 0 {
            let mut reached = self.reached.lock();
            reached.remove(&handle);
            self.count.store(reached.len(), Ordering::Relaxed);
        }
    }

    fn of(&self, handle: u64) -> Option<Arc<Mutex<u64>>> {
        match self.count.load(Ordering::Relaxed) {
            0 => None,
            _ => self.reached.lock().get(&handle).cloned(),
        }
    }
}

impl Tree {
    /// Comes before a write of `len` bytes at `offset` by `handle`: what that skips becomes zero, if the
    /// file is written anew. A write under way holds off those that come later until then.
    pub fn reach(&self, ino: u64, handle: u64, offset: u64, len: u64) -> Result<()> {
        let Some(reached) = self.anew.of(handle) else { return Ok(()) };
        let mut reached = reached.lock();
        if offset > *reached {
            self.clear(ino, *reached, offset)?;
        }
        *reached = reached.max(offset.saturating_add(len));
        Ok(())
    }

    /// Takes part in truncate(2) and ftruncate(2), where `handle` is known, to `size`. Whether that is
    /// done; what is not is a change of attributes like any other.
    pub fn truncate(&self, ino: u64, handle: Option<u64>, size: u64) -> Result<bool> {
        let Some(handle) = handle else { return Ok(false) };
        if size == 0 && handle & READS_TOO != 0 {
            match &self.node(ino)?.what {
                // The kernel's own writes do not come here.
                What::Image(image) if image.lent_for_writing() => self.clear(ino, 0, u64::MAX)?,
                _ => self.anew.begin(handle),
            }
            return Ok(true);
        }
        if size == self.attributes(ino)?.size {
            self.reach(ino, handle, size, 0)?;
        }
        Ok(false)
    }

    /// Makes zeroes of the bytes from `start` to `end`, as far as the disk has them.
    fn clear(&self, ino: u64, start: u64, end: u64) -> Result<()> {
        self.change_disk(ino, start, end.saturating_sub(start), |disk| {
            let end = end.min(disk.size());
            if start < end { disk.discard(start, end - start) } else { Ok(()) }
        })?;
        self.pages_changed(ino);
        Ok(())
    }

    /// The kernel's pages of the file may be old: it is told, and will not keep them at the next open(2).
    fn pages_changed(&self, ino: u64) {
        if let Ok(node) = self.node(ino)
            && let Some((_, view)) = node.image()
        {
            view.old_pages.store(true, Ordering::Relaxed);
        }
        if let Some(tell) = self.old_pages.get() {
            tell(ino, false);
        }
    }
}
