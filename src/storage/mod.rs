//! Positioned I/O on the files that make up an image.
//!
//! [`Storage`] is one host file; [`Host`] is where files come from. Everything above works on these
//! two traits only, so that the same drivers run on real files ([`mod@file`]), in memory ([`memory`]),
//! on a recorder ([`recording`]) whose every crash can be built ([`crash`]), on storage that fails on
//! demand ([`faulty`]), and on a [`draft`] that changes nothing.
//!
//! # Contract of [`Storage`]
//!
//! - Reads and writes are whole or an error; interruptions and short transfers stay inside.
//! - Reading past the end is an error, writing past the end extends; the gap reads as zeroes.
//! - Nothing is durable until [`Storage::sync`] returned; before that any subset of the writes,
//!   each torn at 512-byte sectors, may survive a crash, in any order.
//! - A failed `sync` is final: the caller must not take a later success as covering its writes.

#[doc(hidden)]
pub mod crash;
pub mod device;
pub mod draft;
#[doc(hidden)]
pub mod faulty;
pub mod file;
pub mod memory;
#[doc(hidden)]
pub mod recording;
pub mod runs;
mod share;
pub mod staged;

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crate::error::{Error, ErrorKind, Result};

/// Bytes in whose multiples [`Storage::share_from`] shares.
pub const SHARED_BLOCK: u64 = 4096;

/// One open file. All methods may be called from any thread at once.
pub trait Storage: Send + Sync + fmt::Debug {
    /// Length of the file in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Whether the file is empty.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills `buf` from byte `at`; `UnexpectedEof` if the file ends before.
    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes all of `data` at byte `at`, extending the file if needed.
    fn write_at(&self, at: u64, data: &[u8]) -> io::Result<()>;

    /// Cuts or extends the file; new bytes read as zeroes.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Makes `len` bytes from `at` read as zeroes, giving their space back to the host where the
    /// host file system can do that. Never changes the file's length; the part past the end is
    /// ignored.
    fn punch_hole(&self, at: u64, len: u64) -> io::Result<()>;

    /// Reserves host space for `len` bytes from `at`, extending the file if needed.
    fn allocate(&self, at: u64, len: u64) -> io::Result<()>;

    /// The first range at or after `at` that holds data (as opposed to a hole of the host file);
    /// `None` when only holes follow. Hosts that cannot tell answer with everything to the end.
    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>>;

    /// Makes everything written so far durable, length included.
    fn sync(&self) -> io::Result<()>;

    /// Bytes of host space the file takes.
    fn allocated(&self) -> io::Result<u64>;

    /// The file's path, for messages and for locating neighbours.
    fn path(&self) -> &Path;

    /// Whether [`Self::write_at`] can work.
    fn writable(&self) -> bool;

    /// Which file this is, equal for two names of one file.
    fn identity(&self) -> io::Result<FileIdentity>;

    /// When the file was last changed, where the host says.
    fn modified(&self) -> Option<SystemTime> {
        None
    }

    /// Makes `len` bytes from `at` the same blocks of the host as `len` bytes of `from` from
    /// `from_at`, extending the file if needed: either file changes without the other. `false`, with
    /// nothing changed, where the host cannot do that. All three numbers are multiples of
    /// [`SHARED_BLOCK`].
    fn share_from(&self, at: u64, from: &dyn Storage, from_at: u64, len: u64) -> io::Result<bool> {
        let _ = (at, from, from_at, len);
        Ok(false)
    }

    /// The open host file, where there is one, for [`Self::share_from`] of another to take blocks of.
    fn blocks(&self) -> Option<&std::fs::File> {
        None
    }

    /// The open host file itself, where there is one, for the kernel to use without us: from then on
    /// the file may change at any time.
    fn host_file(&self) -> Option<&std::fs::File> {
        None
    }
}

/// Writes to a file from its beginning on.
#[derive(Debug)]
pub struct Appender<'a> {
    file: &'a dyn Storage,
    at: u64,
}

impl<'a> Appender<'a> {
    /// Begins at byte 0.
    pub fn new(file: &'a dyn Storage) -> Self {
        Self { file, at: 0 }
    }
}

impl io::Write for Appender<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.file.write_at(self.at, data)?;
        self.at += data.len() as u64;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What makes a file the same file whatever its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileIdentity {
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
}

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// For looking at headers only: no lock is taken.
    Peek,
    /// For reading; other readers may join, a writer may not.
    Read,
    /// For reading and writing; nobody else may open the file except to peek.
    Write,
}

/// Where files come from: the host's file system, or a test's memory.
pub trait Host: Send + Sync + fmt::Debug {
    /// Opens an existing regular file named by the user.
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn Storage>>;

    /// Opens a file that an image names: `name` is relative to `root`, no component may leave it or
    /// be a symlink, and only regular files open.
    fn open_beneath(&self, root: &Path, name: &Path, access: Access) -> Result<Arc<dyn Storage>>;

    /// Makes a new, empty file, locked for writing; an existing one is an error.
    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>>;

    /// Replaces the contents of a small file as one step: after a crash it holds either the old or
    /// the new bytes. Durable on return.
    fn replace(&self, path: &Path, contents: &[u8]) -> Result<()>;

    /// Removes a file.
    fn remove(&self, path: &Path) -> Result<()>;

    /// Gives a file another name in the same directory, in one step; with `replace` a file that has
    /// that name is replaced, else it is an error. Durable after [`Self::sync_dir`].
    fn rename(&self, from: &Path, to: &Path, replace: bool) -> Result<()> {
        let _ = (from, replace);
        Err(Error::new(ErrorKind::Denied, "names of files do not change here").in_file(to))
    }

    /// Makes the creation, renaming and removal of files in `dir` durable.
    fn sync_dir(&self, dir: &Path) -> Result<()>;

    /// The files of a directory, by name. Used to find neighbours of an image.
    fn list(&self, dir: &Path) -> Result<Vec<PathBuf>>;
}
