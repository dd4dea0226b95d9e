//! The files of a disk, each wrapped so that the driver knows which ones a flush must sync, and that
//! extents declared read-only stay as they are. Payload goes past the driver, so the wrapper is the
//! only place that sees it.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::disk::sync_file_for;
use crate::error::Result;
use crate::storage::{FileIdentity, Storage};

/// One file of a disk.
#[derive(Debug)]
pub struct ExtentFile {
    inner: Arc<dyn Storage>,
    /// Its extents are `RDONLY`.
    protected: bool,
    /// Something was written since the last sync began.
    unsynced: AtomicBool,
    /// The host's file was handed out: it may change unseen, so every sync counts.
    lent: AtomicBool,
}

impl ExtentFile {
    /// Wraps a file; a protected one refuses every change.
    pub fn new(inner: Arc<dyn Storage>, protected: bool) -> Arc<Self> {
        Arc::new(Self { inner, protected, unsynced: false.into(), lent: false.into() })
    }

    /// Runs a change. The mark is set after it, failed or not: a sync that began in between does not
    /// cover it.
    fn change<T>(&self, change: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self.protected {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        let result = change();
        self.unsynced.store(true, Ordering::Release);
        result
    }

    /// Whether changes may be made.
    pub fn protected(&self) -> bool {
        self.protected
    }

    /// Makes everything written so far durable, if anything was written.
    /// `what` is for whoever keeps a record.
    pub fn sync_changes(&self, what: &'static str) -> Result<()> {
        if self.unsynced.swap(false, Ordering::AcqRel) || self.lent.load(Ordering::Acquire) {
            sync_file_for(&*self.inner, what)?;
        }
        Ok(())
    }
}

impl Storage for ExtentFile {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        self.inner.read_at(at, buf)
    }

    fn write_at(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.change(|| self.inner.write_at(at, data))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(|| self.inner.set_len(len))
    }

    fn punch_hole(&self, at: u64, len: u64) -> io::Result<()> {
        self.change(|| self.inner.punch_hole(at, len))
    }

    fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        self.change(|| self.inner.allocate(at, len))
    }

    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        self.inner.next_data(at)
    }

    fn first_data(&self, at: u64) -> io::Result<Option<u64>> {
        self.inner.first_data(at)
    }

    fn sync(&self) -> io::Result<()> {
        self.unsynced.store(false, Ordering::Release);
        self.inner.sync()
    }

    fn sync_for(&self, what: &'static str) -> io::Result<()> {
        self.unsynced.store(false, Ordering::Release);
        self.inner.sync_for(what)
    }

    fn write_back(&self) {
        self.inner.write_back();
    }

    fn allocated(&self) -> io::Result<u64> {
        self.inner.allocated()
    }

    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn writable(&self) -> bool {
        !self.protected && self.inner.writable()
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        self.inner.identity()
    }

    fn share_from(&self, at: u64, from: &dyn Storage, from_at: u64, len: u64) -> io::Result<bool> {
        self.change(|| self.inner.share_from(at, from, from_at, len))
    }

    fn blocks(&self) -> Option<&std::fs::File> {
        self.inner.blocks()
    }

    fn host_file(&self) -> Option<&std::fs::File> {
        // Handing out the file of a protected extent would let changes past.
        if self.protected {
            return None;
        }
        self.lent.store(true, Ordering::Release);
        self.inner.host_file()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, ErrorKind};
    use crate::storage::memory::MemoryFile;

    #[test]
    fn a_protected_file_refuses_every_change() {
        let file = ExtentFile::new(MemoryFile::new("x", &[7; 512]), true);
        for refused in [file.write_at(0, &[1]), file.set_len(0), file.punch_hole(0, 512)] {
            let error = Error::io("write", &refused.unwrap_err());
            assert_eq!(error.kind(), ErrorKind::ReadOnly);
        }
        let mut byte = [0];
        file.read_at(0, &mut byte).unwrap();
        assert_eq!((byte, file.writable()), ([7], false));
    }
}
