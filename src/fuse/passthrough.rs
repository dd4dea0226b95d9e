//! Flat files that the kernel reads by itself, without asking the daemon.
//!
//! That is right only where the flat file *is* a host file, byte for byte and to the last byte (the
//! kernel reads on past the end that we state), and where nobody writes: a write that the daemon
//! never sees could not be counted, nor made durable, nor renew the image's identifiers. So it is
//! done in read-only mounts, for images that are one extent as long as the disk.
//!
//! The kernel wants all opens of an inode to be of this kind while one is. Whether they are is
//! decided at the first one; the first refusal (it needs root and Linux 6.9) ends all attempts.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use fuser::{BackingId, FileHandle, FopenFlags, ReplyOpen};
use parking_lot::Mutex;

use crate::storage::Storage;

/// The backing files known to the kernel.
#[derive(Debug, Default)]
pub struct Passthrough {
    refused: AtomicBool,
    /// By inode, with the number of opens.
    backings: Mutex<HashMap<u64, (BackingId, usize)>>,
}

impl Passthrough {
    /// Answers an open(2) of inode `ino`, letting the kernel read `file` if that is possible.
    pub fn reply(
        &self,
        reply: ReplyOpen,
        ino: u64,
        handle: u64,
        flags: FopenFlags,
        file: Option<&dyn Storage>,
    ) {
        let mut backings = self.backings.lock();
        if !backings.contains_key(&ino)
            && !self.refused.load(Ordering::Relaxed)
            && let Some(file) = file.and_then(Storage::host_file)
        {
            match reply.open_backing(file) {
                Ok(backing) => drop(backings.insert(ino, (backing, 0))),
                Err(e) => {
                    log::debug!("no passthrough: {e}");
                    self.refused.store(true, Ordering::Relaxed);
                }
            }
        }
        match backings.get_mut(&ino) {
            Some((backing, opens)) => {
                *opens += 1;
                reply.opened_passthrough(FileHandle(handle), FopenFlags::empty(), backing);
            }
            None => reply.opened(FileHandle(handle), flags),
        }
    }

    /// Notes the release of a file.
    pub fn release(&self, ino: u64) {
        let mut backings = self.backings.lock();
        if let Some((_, opens)) = backings.get_mut(&ino) {
            *opens -= 1;
            if *opens == 0 {
                backings.remove(&ino);
            }
        }
    }
}
