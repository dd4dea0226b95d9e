//! Positioned I/O on the files that make up an image.
//!
//! [`Storage`] is one host file; [`Host`] is where files come from. Everything above works on these
//! two traits only, so that the same drivers run on real files ([`mod@file`]), in memory ([`memory`]),
//! in an [`archive`],
//! of several files ([`joined`]),
//! on a recorder ([`recording`]) whose every crash can be built ([`crash`]), on storage that fails on
//! demand ([`faulty`]), and on a [`draft`] that changes nothing. How far the names in an image reach on
//! the host is told in [`reach`].
//!
//! # Contract of [`Storage`]
//!
//! - Reads and writes are whole or an error; interruptions and short transfers stay inside.
//! - Reading past the end is an error, writing past the end extends; the gap reads as zeroes.
//! - Nothing is durable until [`Storage::sync`] returned; before that any subset of the writes,
//!   each torn at 512-byte sectors, may survive a crash, in any order.
//! - A failed `sync` is final: the caller must not take a later success as covering its writes.
//!
//! # Further files
//!
//! - `device`: block devices, which a user names to copy from or to;
//! - `file`: the host's file system;
//! - `permissions`: permission bits, access lists included;
//! - `remembered`: what tells that a file changed, and what was read of files, kept until then;
//! - `replace`: replacing a small file in one step, so that it stays what it was in everything but
//!   its contents;
//! - `runs`: runs of units;
//! - `share`: sharing blocks between two host files;
//! - `staged`: new files that appear under their names only when all of them are complete;
//! - `user`: opening files in another user's name;
//! - `write_back`: beginning early to write to the device what is to be durable at the end.

pub mod archive;
#[doc(hidden)]
pub mod crash;
#[doc(hidden)]
pub mod device;
#[doc(hidden)]
pub mod draft;
#[doc(hidden)]
pub mod faulty;
pub mod file;
#[doc(hidden)]
pub mod joined;
pub mod memory;
#[doc(hidden)]
pub mod permissions;
#[doc(hidden)]
pub mod reach;
#[doc(hidden)]
pub mod recording;
#[doc(hidden)]
pub mod remembered;
mod replace;
#[doc(hidden)]
pub mod runs;
mod share;
#[doc(hidden)]
pub mod staged;
#[doc(hidden)]
pub mod user;
mod write_back;

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crate::error::{Error, ErrorKind, Result};
use archive::Archive;

/// Bytes in whose multiples [`Storage::share_from`] shares.
pub const SHARED_BLOCK: u64 = 4096;

/// One open file. All methods may be called from any thread at once.
///
/// # Errors
///
/// Those of the host, as it says them; `UnexpectedEof` where a file ends before what is read.
#[allow(clippy::missing_errors_doc)] // They are the trait's, above.
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

    /// Where the range begins that [`Self::next_data`] tells, without its end: some hosts look at every
    /// page up to that.
    fn first_data(&self, at: u64) -> io::Result<Option<u64>> {
        Ok(self.next_data(at)?.map(|data| data.start))
    }

    /// Makes everything written so far durable, length included.
    fn sync(&self) -> io::Result<()>;

    /// [`Self::sync`]; `what` says what for, to those who keep a record.
    fn sync_for(&self, what: &'static str) -> io::Result<()> {
        let _ = what;
        self.sync()
    }

    /// Tells the host to begin writing to its device what was written so far, without waiting: a hint,
    /// that a later [`Self::sync`] has less to wait for.
    fn write_back(&self) {}

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

    /// In whose name the files are opened that this one names; `None` where files have no owners.
    fn namer(&self) -> Option<&Namer> {
        None
    }

    /// When anything of the file was last changed, that time itself excepted (the inode's change time), where
    /// the host says.
    fn changed(&self) -> Option<SystemTime> {
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

    /// Whether the host takes back what only the old place of blocks has that got a new one by
    /// [`Self::share_from`] of the file itself. Some keep all of an extent that anything of is in use.
    fn frees_moved_blocks(&self) -> bool {
        false
    }

    /// The open host file, where there is one, for [`Self::share_from`] of another to take blocks of.
    fn blocks(&self) -> Option<&std::fs::File> {
        None
    }

    /// The files that it is made of, end to end, if these are several.
    fn parts(&self) -> &[Arc<dyn Storage>] {
        &[]
    }

    /// The archive that the file lies in, if it lies in one.
    fn archive(&self) -> Option<&Arc<Archive>> {
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
    /// Which file in that one, by its first byte; 0 for the host's file itself.
    pub part: u64,
}

impl FileIdentity {
    /// That of the host's file that it is, or lies in.
    #[must_use]
    pub fn of_host(self) -> Self {
        Self { part: 0, ..self }
    }
}

/// Who names the files that are named in a file: see [`Host::named_in`].
#[derive(Debug)]
pub struct Namer {
    /// The file's owner when it was opened.
    pub(crate) uid: u32,
    /// The directory from which it was opened, if nobody else keeps that.
    pub(crate) dir: Option<Arc<OwnedFd>>,
}

/// What a directory holds under one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name.
    pub name: OsString,
    /// A directory; otherwise a regular file.
    pub folder: bool,
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
///
/// # Errors
///
/// Those of the host, each with the path; [`ErrorKind::Busy`] for a file that somebody holds in another way.
#[allow(clippy::missing_errors_doc)] // They are the trait's, above.
pub trait Host: Send + Sync + fmt::Debug {
    /// Opens an existing regular file named by the user.
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn Storage>>;

    /// Opens a file that an image names: `name` is relative to `root`, no component may leave it or
    /// be a symlink, and only regular files open.
    fn open_beneath(&self, root: &Path, name: &Path, access: Access) -> Result<Arc<dyn Storage>>;

    /// The host as files are opened that `file` names: only if the owner of `file` may open them so.
    /// `None` where that makes no difference.
    fn named_in(&self, _file: &dyn Storage) -> Option<Arc<dyn Host>> {
        None
    }

    /// In whose names, beside ours, files are opened: what is read here is theirs to know.
    fn users(&self) -> &[u32] {
        &[]
    }

    /// Takes down that what is told next may tell of the file at `path`.
    fn note(&self, _path: &Path) {}

    /// Makes a new, empty file, locked for writing; an existing one is an error.
    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>>;

    /// Replaces the contents of a small file as one step: after a crash it holds either the old or
    /// the new bytes. Its owner, mode and extended attributes stay. Durable on return.
    fn replace(&self, path: &Path, contents: &[u8]) -> Result<()>;

    /// Removes a file.
    fn remove(&self, path: &Path) -> Result<()>;

    /// Gives a file another name in the same directory, in one step; with `replace` a file that has
    /// that name is replaced, else it is an error. Durable after [`Self::sync_dir`].
    fn rename(&self, from: &Path, to: &Path, replace: bool) -> Result<()> {
        let _ = (from, replace);
        Err(Error::new(ErrorKind::Denied, "names of files do not change here").in_file(to))
    }

    /// Gives a file another name in the same directory, beside the one that it has; a file that has that
    /// name is an error. Durable after [`Self::sync_dir`].
    fn link(&self, from: &Path, to: &Path) -> Result<()> {
        let _ = from;
        Err(Error::new(ErrorKind::Denied, "files get no second names here").in_file(to))
    }

    /// Gives the new file at `path` the owner, mode and extended attributes of the one at `like`.
    fn dress(&self, path: &Path, like: &Path) -> Result<()> {
        let _ = (path, like);
        Ok(())
    }

    /// Makes the creation, renaming and removal of files in `dir` durable.
    fn sync_dir(&self, dir: &Path) -> Result<()>;

    /// The files of a directory, by name. Used to find neighbours of an image.
    fn list(&self, dir: &Path) -> Result<Vec<PathBuf>>;

    /// Directories and regular files in the directory `dir`, which is relative to `root` and reached as
    /// in [`Self::open_beneath`], looking at no more than `limit` entries and one. Everything else, such as
    /// symlinks, is left out.
    fn list_beneath(&self, root: &Path, dir: &Path, limit: usize) -> Result<Vec<Entry>> {
        let files = self.list(&root.join(dir))?.into_iter();
        let names = files.filter_map(|path| Some(path.file_name()?.to_owned()));
        Ok(names.map(|name| Entry { name, folder: false }).take(limit.saturating_add(1)).collect())
    }
}

/// The host as files are opened that `file` names; see [`Host::named_in`].
pub fn named_in(host: &Arc<dyn Host>, file: &dyn Storage) -> Arc<dyn Host> {
    host.named_in(file).unwrap_or_else(|| host.clone())
}
