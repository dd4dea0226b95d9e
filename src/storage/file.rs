//! The host's file system: [`HostFs`] and its files.
//!
//! # Locks
//!
//! Files opened to read or write carry open-file-description locks in the scheme that QEMU uses for
//! its images, so that the two programs exclude each other. A *permission* is held by a shared lock
//! on byte 100 + p, a permission denied to others by one on byte 200 + p. Who opens takes its locks
//! first and then looks whether anybody else holds the opposite ones.
//!
//! VMware keeps a directory `<image>.lck` while it uses an image; one that is not empty forbids
//! writing.
//!
//! # Files cut short
//!
//! Locks do not hold back a program that knows nothing of them. A file that another program cut
//! short is written no more: the next write behind its end would make zeroes of what was lost, and
//! zeroes read like contents. So a writable file knows how long it must at least be.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{
    AT_FDCWD, FallocateFlags, FcntlArg, OFlag, RenameFlags, fallocate, fcntl, openat, renameat2,
};
use nix::sys::stat::{Mode, fstat};
use nix::sys::statfs::{XFS_SUPER_MAGIC, fstatfs};
use nix::unistd::{Whence, geteuid, lseek64};

use super::archive;
use super::reach::{Reach, Root, vmware_lock_of};
use super::{Access, Entry, FileIdentity, Host, Namer, Storage, replace, share, write_back};
use crate::error::{Error, ErrorKind, Result};

/// The host's file system.
#[derive(Debug, Default, Clone, Copy)]
pub struct HostFs;

impl HostFs {
    /// The host as drivers take it.
    pub fn shared() -> Arc<dyn Host> {
        Arc::new(Self)
    }
}

/// A regular file of the host.
#[derive(Debug)]
pub struct HostFile {
    file: File,
    path: PathBuf,
    writable: bool,
    /// Bytes that the file has unless another program cut it; 0 while it is only read.
    least_len: AtomicU64,
    namer: Namer,
}

impl HostFile {
    /// Wraps an open file, which must be a regular one. `dir` is the directory it was opened from, if
    /// nobody else keeps that; `locked` says whether VMware has locked it.
    pub(super) fn new(
        file: File,
        path: &Path,
        access: Access,
        dir: Option<Arc<OwnedFd>>,
        locked: impl FnOnce() -> bool,
    ) -> Result<Self> {
        let meta = file.metadata().map_err(|e| Error::io("stat", &e).in_file(path))?;
        if meta.is_dir() {
            return Err(
                Error::new(ErrorKind::Denied, "this is a directory, not an image").in_file(path)
            );
        }
        if !meta.is_file() {
            return Err(Error::new(ErrorKind::Denied, "not a regular file").in_file(path));
        }
        let writable = access == Access::Write;
        let least_len = AtomicU64::new(if writable { meta.len() } else { 0 });
        let namer = Namer { uid: meta.uid(), dir };
        let file = Self { file, path: path.to_owned(), writable, least_len, namer };
        match access {
            Access::Peek => {}
            Access::Read => file.lock(READER)?,
            Access::Write => {
                file.lock(WRITER)?;
                if locked() {
                    return Err(locked_by_vmware(path));
                }
            }
        }
        Ok(file)
    }

    /// Takes QEMU's locks for `mine` and checks them against everybody else's.
    fn lock(&self, mine: LockSet) -> Result<()> {
        for (base, bits) in [(PERMISSION_BASE, mine.holds), (DENIAL_BASE, mine.denies)] {
            for bit in (0..4).filter(|bit| bits & (1 << bit) != 0) {
                let lock = byte_lock(libc::F_RDLCK, base + bit);
                match fcntl(&self.file, FcntlArg::F_OFD_SETLK(&lock)) {
                    Ok(_) => {}
                    Err(Errno::EAGAIN | Errno::EACCES) => return Err(self.in_use()),
                    // A file system without locks: nothing to exclude anybody with.
                    Err(Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::EINVAL) => return Ok(()),
                    Err(e) => return Err(Error::io("lock", &e.into()).in_file(&self.path)),
                }
            }
        }
        for (base, bits) in [(DENIAL_BASE, mine.holds), (PERMISSION_BASE, mine.denies)] {
            for bit in (0..4).filter(|bit| bits & (1 << bit) != 0) {
                let mut lock = byte_lock(libc::F_WRLCK, base + bit);
                fcntl(&self.file, FcntlArg::F_OFD_GETLK(&mut lock))
                    .map_err(|e| Error::io("lock", &e.into()).in_file(&self.path))?;
                if i32::from(lock.l_type) != libc::F_UNLCK {
                    return Err(self.in_use());
                }
            }
        }
        Ok(())
    }

    /// Fails if another program cut the file short.
    fn whole(&self) -> io::Result<()> {
        // Other threads change the length meanwhile. When the file grows, what is known of it comes
        // last, when it shrinks, first: so what was known before the look counts, if it still does.
        let mut least = self.least_len.load(Ordering::Acquire);
        loop {
            let len = fstat(&self.file)?.st_size as u64;
            if len >= least {
                return Ok(());
            }
            let known = least;
            least = self.least_len.load(Ordering::Acquire);
            if least == known {
                let what = format!("another program cut the file short, to {len:#x} bytes");
                return Err(io::Error::other(what));
            }
        }
    }

    fn in_use(&self) -> Error {
        let what = match self.writable {
            true => "in use by another program, cannot be opened for writing",
            false => "in use by another program that writes to it, cannot be opened",
        };
        Error::new(ErrorKind::Busy, what)
            .in_file(&self.path)
            .hint("flatdisk, qemu or a virtual machine has it open; `lslocks` shows who")
    }
}

/// A new file without a name in `dir`, gone when it is closed.
///
/// # Errors
///
/// Those of the host.
pub fn scratch(dir: &Path) -> Result<Arc<dyn Storage>> {
    let file = tempfile::tempfile_in(dir)
        .map_err(|e| Error::io("create a scratch file", &e).in_file(dir))?;
    let least_len = AtomicU64::new(0);
    let namer = Namer { uid: geteuid().as_raw(), dir: None };
    Ok(Arc::new(HostFile { file, path: dir.join("(scratch)"), writable: true, least_len, namer }))
}

impl Drop for HostFile {
    /// Lets go of the locks for good: a process that is being started at this moment holds a copy
    /// of the descriptor, and with it the locks, until it executes its program.
    fn drop(&mut self) {
        let all = libc::flock {
            l_len: DENIAL_BASE - PERMISSION_BASE + 4,
            ..byte_lock(libc::F_UNLCK, PERMISSION_BASE)
        };
        let _ = fcntl(&self.file, FcntlArg::F_OFD_SETLK(&all));
    }
}

/// Lock bytes held and denied, a bit per permission: 0 consistent read, 1 write, 2 write unchanged,
/// 3 resize.
#[derive(Clone, Copy)]
struct LockSet {
    holds: u8,
    denies: u8,
}

const PERMISSION_BASE: i64 = 100;
const DENIAL_BASE: i64 = 200;
const READER: LockSet = LockSet { holds: 0b0001, denies: 0b1010 };
const WRITER: LockSet = LockSet { holds: 0b1011, denies: 0b1010 };

fn byte_lock(kind: i32, at: i64) -> libc::flock {
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: at,
        l_len: 1,
        l_pid: 0,
    }
}

fn locked_by_vmware(path: &Path) -> Error {
    let name = path.file_name().unwrap_or_default().display();
    Error::new(ErrorKind::Busy, format!("locked by VMware ({name}.lck is not empty)"))
        .in_file(path)
        .hint("remove it if no virtual machine uses the disk")
}

impl Storage for HostFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, at)
    }

    fn write_at(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.whole()?;
        self.file.write_all_at(data, at)?;
        self.least_len.fetch_max(at + data.len() as u64, Ordering::AcqRel);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.whole()?;
        self.least_len.fetch_min(len, Ordering::AcqRel);
        self.file.set_len(len)?;
        self.least_len.fetch_max(len, Ordering::AcqRel);
        Ok(())
    }

    fn punch_hole(&self, at: u64, len: u64) -> io::Result<()> {
        let end = at.saturating_add(len).min(self.len()?);
        if at >= end {
            return Ok(());
        }
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(&self.file, mode, at as i64, (end - at) as i64) {
            Ok(()) => Ok(()),
            // The host file system has no holes: write the zeroes.
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENODEV) => {
                let zeroes = vec![0; (end - at).min(1 << 20) as usize];
                let mut pos = at;
                while pos < end {
                    let part = (end - pos).min(zeroes.len() as u64) as usize;
                    self.write_at(pos, &zeroes[..part])?;
                    pos += part as u64;
                }
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }

    fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        self.whole()?;
        match fallocate(&self.file, FallocateFlags::empty(), at as i64, len as i64) {
            Ok(()) => {
                self.least_len.fetch_max(at + len, Ordering::AcqRel);
                Ok(())
            }
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => {
                let end = at + len;
                if self.len()? < end { self.set_len(end) } else { Ok(()) }
            }
            Err(e) => Err(e.into()),
        }
    }

    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        let Some(start) = self.first_data(at)? else { return Ok(None) };
        let end = match lseek64(&self.file, start as i64, Whence::SeekHole) {
            Ok(end) => end as u64,
            Err(_) => self.len()?,
        };
        Ok(Some(start..end.max(start + 1)))
    }

    fn first_data(&self, at: u64) -> io::Result<Option<u64>> {
        if at >= self.len()? {
            return Ok(None);
        }
        // The cursor that lseek moves is used by nothing else, and its answer is in the result.
        match lseek64(&self.file, at as i64, Whence::SeekData) {
            Ok(start) => Ok(Some(at.max(start as u64))),
            Err(Errno::ENXIO) => Ok(None),
            // The host knows no holes.
            Err(Errno::EINVAL) => Ok(Some(at)),
            Err(e) => Err(e.into()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.whole()?;
        self.file.sync_data()
    }

    fn write_back(&self) {
        write_back::begin(&self.file);
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn share_from(&self, at: u64, from: &dyn Storage, from_at: u64, len: u64) -> io::Result<bool> {
        let Some(source) = from.blocks() else { return Ok(false) };
        self.whole()?;
        let shared = share::share(&self.file, at, source, from_at, len)?;
        if shared {
            self.least_len.fetch_max(at + len, Ordering::AcqRel);
        }
        Ok(shared)
    }

    fn frees_moved_blocks(&self) -> bool {
        // btrfs shares blocks too, but keeps whole extents.
        fstatfs(&self.file).is_ok_and(|fs| fs.filesystem_type() == XFS_SUPER_MAGIC)
    }

    fn blocks(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn writable(&self) -> bool {
        self.writable
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        let meta = self.file.metadata()?;
        Ok(FileIdentity { device: meta.dev(), inode: meta.ino(), part: 0 })
    }

    fn modified(&self) -> Option<SystemTime> {
        self.file.metadata().ok()?.modified().ok()
    }

    fn changed(&self) -> Option<SystemTime> {
        let meta = self.file.metadata().ok()?;
        let (seconds, nanos) = (meta.ctime(), meta.ctime_nsec());
        let since = Duration::new(u64::try_from(seconds).ok()?, u32::try_from(nanos).ok()?);
        UNIX_EPOCH.checked_add(since)
    }

    fn namer(&self) -> Option<&Namer> {
        Some(&self.namer)
    }

    fn host_file(&self) -> Option<&File> {
        Some(&self.file)
    }
}

/// Opening must not wait for a FIFO's other end or a lease's holder, or make a terminal ours.
pub(super) const SAFE_OPEN: OFlag =
    OFlag::O_NONBLOCK.union(OFlag::O_NOCTTY).union(OFlag::O_CLOEXEC);

/// Flags to open a file with.
pub(super) fn flags(access: Access) -> OFlag {
    SAFE_OPEN | if access == Access::Write { OFlag::O_RDWR } else { OFlag::O_RDONLY }
}

/// What it means that a file could not be opened.
pub(super) fn not_opened(e: &io::Error) -> Error {
    match Errno::from_raw(e.raw_os_error().unwrap_or(0)) {
        Errno::EISDIR => Error::new(ErrorKind::Denied, "this is a directory, not an image"),
        // What opening a socket gives.
        Errno::ENXIO => Error::new(ErrorKind::Denied, "not a regular file"),
        _ => Error::io("open", e),
    }
}

/// Opens a file of the host itself.
fn open_file(path: &Path, access: Access) -> Result<Arc<dyn Storage>> {
    let failed = |e: io::Error| not_opened(&e).in_file(path);
    let Some(name) = path.file_name() else {
        return Err(failed(Errno::EISDIR.into()));
    };
    let root = Root::open(&directory_of(path)).map_err(failed)?;
    let dir = root.descriptor();
    let file = openat(dir, name, flags(access), Mode::empty()).map_err(|e| failed(e.into()))?;
    let locked = || vmware_lock_of(&root, Path::new(name), &[]);
    let file = HostFile::new(File::from(file), path, access, Some(dir.clone()), locked)?;
    Ok(Arc::new(file))
}

impl Host for HostFs {
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        match open_file(path, access) {
            Err(e) if e.errno() == Some(libc::ENOTDIR) => {
                archive::open_member(path, access, open_file).unwrap_or(Err(e))
            }
            opened => opened,
        }
    }

    fn open_beneath(&self, root: &Path, name: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        Reach::default().open_beneath(root, name, access)
    }

    fn named_in(&self, file: &dyn Storage) -> Option<Arc<dyn Host>> {
        Reach::default().named_in(file)
    }

    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .custom_flags(SAFE_OPEN.bits())
            .open(path)
            .map_err(|e| Error::io("create", &e).in_file(path))?;
        Ok(Arc::new(HostFile::new(file, path, Access::Write, None, || false)?))
    }

    fn replace(&self, path: &Path, contents: &[u8]) -> Result<()> {
        self.sync_dir(&replace::replace(path, contents)?)
    }

    fn remove(&self, path: &Path) -> Result<()> {
        std::fs::remove_file(path).map_err(|e| Error::io("remove", &e).in_file(path))
    }

    fn rename(&self, from: &Path, to: &Path, replace: bool) -> Result<()> {
        let failed = |e: io::Error| Error::io("rename", &e).in_file(to);
        if replace {
            return std::fs::rename(from, to).map_err(failed);
        }
        match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
            // The file system does not know the flag.
            Err(Errno::EINVAL | Errno::ENOSYS) if to.symlink_metadata().is_err() => {
                std::fs::rename(from, to).map_err(failed)
            }
            Err(Errno::EINVAL | Errno::ENOSYS) => Err(failed(Errno::EEXIST.into())),
            other => other.map_err(|e| failed(e.into())),
        }
    }

    fn link(&self, from: &Path, to: &Path) -> Result<()> {
        std::fs::hard_link(from, to).map_err(|e| {
            match Errno::from_raw(e.raw_os_error().unwrap_or(0)) {
                Errno::EPERM | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EMLINK => {
                    let what =
                        "the file cannot have a second name (a hard link) on its file system";
                    Error::new(ErrorKind::Unsupported, what).in_file(from)
                }
                _ => Error::io("link", &e).in_file(to),
            }
        })
    }

    fn dress(&self, path: &Path, like: &Path) -> Result<()> {
        replace::dress(path, like)
    }

    fn sync_dir(&self, dir: &Path) -> Result<()> {
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        File::open(dir)
            .and_then(|d| d.sync_all())
            .map_err(|e| Error::io("flush directory", &e).in_file(dir))
    }

    fn list(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        let failed = |e: io::Error| Error::io("list", &e).in_file(dir);
        let entries = match std::fs::read_dir(dir) {
            Err(e) if e.raw_os_error() == Some(libc::ENOTDIR) => {
                return archive::list_at(dir, open_file).unwrap_or(Err(failed(e)));
            }
            entries => entries.map_err(failed)?,
        };
        entries.map(|entry| Ok(entry.map_err(failed)?.path())).collect()
    }

    fn list_beneath(&self, root: &Path, dir: &Path, limit: usize) -> Result<Vec<Entry>> {
        Reach::default().list_beneath(root, dir, limit)
    }
}

/// The directory in which a file lies.
pub(super) fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
        _ => PathBuf::from("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_grows_beside_a_write_is_not_taken_for_cut_short() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let file = HostFs.create(&path).unwrap();
        file.set_len(1).unwrap();
        std::thread::scope(|scope| {
            let writers = [(); 3].map(|()| {
                scope.spawn(|| {
                    (0..20_000).try_for_each(|_| file.write_at(0, &[1])).and_then(|()| file.sync())
                })
            });
            for len in 1..20_000 {
                file.set_len(len).unwrap();
            }
            file.set_len(10).unwrap();
            for writer in writers {
                writer.join().unwrap().unwrap();
            }
        });
        // Another program's cut is noticed all the same.
        File::options().write(true).open(&path).unwrap().set_len(5).unwrap();
        let refusal = file.write_at(0, &[1]).unwrap_err().to_string();
        assert!(refusal.contains("cut the file short"), "{refusal}");
    }
}
