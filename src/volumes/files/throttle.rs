//! A volume as crates want it, with a limit to what one operation may read of it: a file system that
//! leads in circles comes to an end.

use std::cell::Cell;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::rc::Rc;
use std::sync::Arc;

use crate::disk::Disk;
use crate::disk::cursor::Cursor;
use crate::disk::window::Window;

/// Bytes that finding and listing may read.
pub(super) const METADATA: u64 = 256 << 20;

/// How much may be read yet.
#[derive(Debug, Clone, Default)]
pub(super) struct Budget(Rc<Cell<u64>>);

impl Budget {
    /// Begins an operation that may read `bytes`.
    pub fn renew(&self, bytes: u64) {
        self.0.set(bytes);
    }
}

/// A volume that is read, within a budget. Writing is an error.
#[derive(Debug)]
pub(super) struct Throttled {
    cursor: Cursor<Arc<Disk>>,
    budget: Budget,
}

impl Throttled {
    pub fn new(volume: Window<Arc<Disk>>, budget: &Budget) -> Self {
        budget.renew(METADATA);
        Self { cursor: Cursor::new(volume), budget: budget.clone() }
    }
}

impl Read for Throttled {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.budget.0.get().checked_sub(buf.len() as u64).ok_or_else(|| {
            io::Error::other("the file system leads in circles, or is too large to be read here")
        })?;
        self.budget.0.set(left);
        self.cursor.read(buf)
    }
}

impl Write for Throttled {
    fn write(&mut self, _data: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Throttled {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.cursor.seek(to)
    }
}
