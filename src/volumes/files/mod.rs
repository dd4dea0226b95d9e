//! Files of the file systems on a disk, read without a kernel and without privileges: ext2 to ext4,
//! NTFS and FAT.
//!
//! Reading changes nothing, so that a journal that waits to be replayed stays as it is, and is told of.
//! Whatever the file system says, every operation ends, and takes memory that does not depend on it:
//! directories and the lists of a file's blocks are limited, blocks lie inside the volume, and symbolic
//! links are followed a limited number of times, inside the file system.
//!
//! # Files
//!
//! - `ext`: ext2, ext3 and ext4;
//! - `fat`: FAT12, FAT16 and FAT32, by the crate `fatfs`, which is given a volume that cannot be
//!   written;
//! - `ntfs`: NTFS, by the crate `ntfs`, and what that one leaves to its callers;
//! - `ntfs_index`: directories of NTFS;
//! - `throttle`: a volume as crates want it, with a limit to what one operation may read of it.

mod ext;
mod fat;
mod ntfs;
mod ntfs_index;
mod throttle;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::content::{self, Probe};
use crate::disk::Disk;
use crate::disk::window::Window;
use crate::error::{Error, ErrorKind, Result};

/// Entries of one directory.
const MAX_ENTRIES: usize = 1 << 20;

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device, socket, FIFO or whatever else is not a file.
    Special,
}

/// One name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Entry {
    /// The name: no slash and no NUL, but whatever else a guest likes.
    pub name: Vec<u8>,
    /// What it stands for.
    pub kind: FileKind,
    /// Length in bytes.
    pub size: u64,
    /// When the file was last changed, in seconds since 1970.
    pub modified: Option<i64>,
    /// Permission bits, where the file system has them.
    pub mode: Option<u32>,
}

/// Where the bytes of a file go.
///
/// # Errors
///
/// Whatever the receiver fails with.
#[allow(clippy::missing_errors_doc)] // They are the trait's, above.
pub trait Sink {
    /// The next bytes.
    fn data(&mut self, bytes: &[u8]) -> Result<()>;
    /// The next `len` bytes are zeroes that are not stored.
    fn hole(&mut self, len: u64) -> Result<()>;
}

/// A file system that is read. Paths are bytes with `/` between names; a leading one does not matter.
///
/// # Errors
///
/// [`ErrorKind::NotFound`] for paths that are none, [`ErrorKind::Corrupt`] for what is damaged, and those of reading
/// the disk.
#[allow(clippy::missing_errors_doc)] // They are the trait's, above.
pub trait FileSystem {
    /// What is odd about it.
    fn warnings(&self) -> &[String];
    /// What `path` stands for; symbolic links are followed.
    fn stat(&mut self, path: &[u8]) -> Result<Entry>;
    /// The names in a directory, in no order, without `.` and `..`.
    fn list(&mut self, path: &[u8]) -> Result<Vec<Entry>>;
    /// Reads a regular file. `follow` says whether the last name may be a symbolic link.
    fn read(&mut self, path: &[u8], follow: bool, sink: &mut dyn Sink) -> Result<()>;
    /// Fills `buf` with bytes of a regular file from byte `at`; [`ErrorKind::OutOfRange`] where it ends before.
    fn read_at(&mut self, path: &[u8], at: u64, buf: &mut [u8]) -> Result<()> {
        let mut part = Part { at, buf, pos: 0 };
        match self.read(path, true, &mut part) {
            _ if part.full() => Ok(()),
            Ok(()) => Err(past_end(path)),
            Err(e) => Err(e),
        }
    }
    /// Where a symbolic link leads to.
    fn target(&mut self, path: &[u8]) -> Result<Vec<u8>>;
}

/// A part of a file that is read from its beginning.
struct Part<'a> {
    at: u64,
    buf: &'a mut [u8],
    pos: u64,
}

impl Part<'_> {
    fn full(&self) -> bool {
        self.pos >= self.at.saturating_add(self.buf.len() as u64)
    }

    /// The next `len` bytes, of which `copy` puts those that are wanted, from a number of them on.
    fn next(&mut self, len: u64, copy: impl FnOnce(&mut [u8], usize)) -> Result<()> {
        let (from, end) = (self.pos.max(self.at), self.pos.saturating_add(len));
        let to = end.min(self.at.saturating_add(self.buf.len() as u64));
        if from < to {
            let wanted = (from - self.at) as usize..(to - self.at) as usize;
            copy(&mut self.buf[wanted], (from - self.pos) as usize);
        }
        self.pos = end;
        if self.full() { Err(Error::new(ErrorKind::OutOfRange, "enough")) } else { Ok(()) }
    }
}

impl Sink for Part<'_> {
    fn data(&mut self, bytes: &[u8]) -> Result<()> {
        self.next(bytes.len() as u64, |to, from| to.copy_from_slice(&bytes[from..from + to.len()]))
    }

    fn hole(&mut self, len: u64) -> Result<()> {
        self.next(len, |to, _| to.fill(0))
    }
}

/// Opens the file system in a volume.
///
/// # Errors
///
/// [`ErrorKind::Unsupported`] for a file system that cannot be read here, [`ErrorKind::Corrupt`] for a damaged one.
pub fn open(volume: Window<Arc<Disk>>) -> Result<Box<dyn FileSystem>> {
    let range = volume.range();
    let uncounted = std::cell::Cell::new(0);
    let window = volume.disk().slice(range)?;
    let found = content::probe(&Probe::new(window, volume.size(), &uncounted));
    let opened: Box<dyn FileSystem> = match found.type_name {
        Some("ext2" | "ext3" | "ext4") => Box::new(ext::Ext::open(volume)?),
        Some("ntfs") => guarded(|| ntfs::Volume::open(volume).map(Box::new))?,
        Some("vfat") => guarded(|| fat::Volume::open(volume).map(Box::new))?,
        other => {
            let what = match other {
                Some(name) => format!("files of {name} are not read here"),
                None => "no file system is known here".to_owned(),
            };
            return Err(Error::unsupported(what)
                .hint("`flatdisk attach --mount` mounts what the kernel knows"));
        }
    };
    Ok(Box::new(Guarded(opened)))
}

/// A file system read by crates that may not expect what a hostile one says.
struct Guarded(Box<dyn FileSystem>);

/// Turns a panic into an error.
fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(Error::corrupt("the file system contradicts itself in a way that cannot be read"))
    })
}

impl FileSystem for Guarded {
    fn warnings(&self) -> &[String] {
        self.0.warnings()
    }

    fn stat(&mut self, path: &[u8]) -> Result<Entry> {
        guarded(|| self.0.stat(path))
    }

    fn list(&mut self, path: &[u8]) -> Result<Vec<Entry>> {
        let mut entries = guarded(|| self.0.list(path))?;
        entries.retain(|entry| is_name(&entry.name));
        Ok(entries)
    }

    fn read(&mut self, path: &[u8], follow: bool, sink: &mut dyn Sink) -> Result<()> {
        guarded(|| self.0.read(path, follow, sink))
    }

    fn read_at(&mut self, path: &[u8], at: u64, buf: &mut [u8]) -> Result<()> {
        guarded(|| self.0.read_at(path, at, buf))
    }

    fn target(&mut self, path: &[u8]) -> Result<Vec<u8>> {
        guarded(|| self.0.target(path))
    }
}

/// Whether a directory may hold such a name.
fn is_name(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..") && !name.iter().any(|byte| matches!(byte, b'/' | 0))
}

/// The names of a path, `.` taken out and `..` carried out.
fn names(path: &[u8]) -> Vec<&[u8]> {
    let mut names = Vec::new();
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => drop(names.pop()),
            name => names.push(name),
        }
    }
    names
}

fn not_found(path: &[u8]) -> Error {
    Error::new(ErrorKind::NotFound, format!("{}: no such file or directory", shown(path)))
}

fn past_end(path: &[u8]) -> Error {
    Error::new(ErrorKind::OutOfRange, format!("{}: the file ends before", shown(path)))
}

fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

/// Zeroes as data, for sinks that know no holes.
///
/// # Errors
///
/// Those of `put`.
pub fn zeroes(len: u64, mut put: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let zeroes = [0; 64 << 10];
    let mut left = len;
    while left > 0 {
        let step = left.min(zeroes.len() as u64);
        put(&zeroes[..step as usize])?;
        left -= step;
    }
    Ok(())
}
