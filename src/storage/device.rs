//! Block devices, which a user names to copy from or to.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};

use super::{FileIdentity, Storage, write_back};
use crate::error::{Error, ErrorKind, Result};

/// Most zeroes written at once.
const ZEROES: u64 = 1 << 20;

/// Whether `path` is a block device.
pub fn is_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device())
}

/// An open block device.
#[derive(Debug)]
pub struct DeviceFile {
    file: File,
    path: PathBuf,
    len: u64,
    writable: bool,
}

impl DeviceFile {
    /// Opens a device. For writing it must be in use by nobody: not mounted, no part of anything.
    pub fn open(path: &Path, writable: bool) -> Result<Self> {
        let failed = |e: &io::Error| {
            let error = match e.raw_os_error() {
                Some(libc::EBUSY) => Error::new(
                    ErrorKind::Busy,
                    "the device is in use: mounted, or a part of another",
                ),
                _ => Error::io("open", e),
            };
            error.in_file(path)
        };
        // With O_EXCL the kernel refuses a device that it uses itself.
        let exclusive = if writable { libc::O_EXCL } else { 0 };
        let file = OpenOptions::new()
            .read(true)
            .write(writable)
            .custom_flags(exclusive | libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)
            .map_err(|e| failed(&e))?;
        let len = (&file).seek(SeekFrom::End(0)).map_err(|e| failed(&e))?;
        Ok(Self { file, path: path.to_owned(), len, writable })
    }

    /// Whether this device is the one with identity `other`, or one of the two is a partition of the other.
    pub fn overlaps(&self, other: FileIdentity) -> bool {
        let Ok(own) = self.identity() else { return false };
        let place = |id: FileIdentity| {
            let (major, minor) = (libc::major(id.device), libc::minor(id.device));
            std::fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()
        };
        let inside = match (place(own), place(other)) {
            // The directory of a partition lies in that of its device.
            (Some(own), Some(other)) => own.starts_with(&other) || other.starts_with(&own),
            _ => false,
        };
        other.inode == 0 && (own == other || inside)
    }

    /// The file that a loop device shows, if this is one.
    pub fn backing(&self) -> Option<PathBuf> {
        let device = self.file.metadata().ok()?.rdev();
        let (major, minor) = (libc::major(device), libc::minor(device));
        let told = format!("/sys/dev/block/{major}:{minor}/loop/backing_file");
        let name = std::fs::read(told).ok()?;
        Some(PathBuf::from(OsStr::from_bytes(name.strip_suffix(b"\n")?)))
    }
}

impl Storage for DeviceFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, at)
    }

    fn write_at(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, at)
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn punch_hole(&self, at: u64, len: u64) -> io::Result<()> {
        let end = at.saturating_add(len).min(self.len);
        if at >= end {
            return Ok(());
        }
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        if fallocate(&self.file, mode, at as i64, (end - at) as i64).is_ok() {
            return Ok(());
        }
        // The device cannot, or the range is no multiple of its sectors.
        let zeroes = vec![0; ZEROES.min(end - at) as usize];
        let mut pos = at;
        while pos < end {
            let part = ZEROES.min(end - pos) as usize;
            self.write_at(pos, &zeroes[..part])?;
            pos += part as u64;
        }
        Ok(())
    }

    fn allocate(&self, _at: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        Ok((at < self.len).then_some(at..self.len))
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn write_back(&self) {
        write_back::begin(&self.file);
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn writable(&self) -> bool {
        self.writable
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        let meta = self.file.metadata()?;
        Ok(FileIdentity { device: meta.rdev(), inode: 0, part: 0 })
    }
}
