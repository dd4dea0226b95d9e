//! A host in memory that notices writes where only reading is allowed, and that has little room.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flatdisk::error::{Error, ErrorKind, Result};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::{Access, FileIdentity, Host, Storage};
use parking_lot::Mutex;

use super::meter::uncounted;

/// What a driver may do, and what it did.
#[derive(Debug)]
struct Rules {
    writes_allowed: bool,
    /// Bytes that can still be written before the host is full.
    room: AtomicU64,
    trespass: Mutex<Option<String>>,
}

impl Rules {
    fn change(&self, what: &str, path: &Path) -> io::Result<()> {
        if self.writes_allowed {
            return Ok(());
        }
        self.trespass.lock().get_or_insert_with(|| format!("{what} of {}", path.display()));
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn take(&self, bytes: u64) -> io::Result<()> {
        let taken = self
            .room
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |room| room.checked_sub(bytes));
        taken.map(drop).map_err(|_| io::ErrorKind::StorageFull.into())
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Guarded {
    host: Arc<MemoryHost>,
    rules: Arc<Rules>,
}

impl Guarded {
    /// `host` for somebody who only reads.
    pub fn reading(host: &Arc<MemoryHost>) -> Arc<Self> {
        Self::new(host, false, 0)
    }

    /// `host` for somebody who may write `room` bytes.
    pub fn writing(host: &Arc<MemoryHost>, room: u64) -> Arc<Self> {
        Self::new(host, true, room)
    }

    fn new(host: &Arc<MemoryHost>, writes_allowed: bool, room: u64) -> Arc<Self> {
        let rules = Rules { writes_allowed, room: room.into(), trespass: Mutex::new(None) };
        Arc::new(Self { host: host.clone(), rules: Arc::new(rules) })
    }

    /// The first change that was not allowed.
    pub fn trespass(&self) -> Option<String> {
        self.rules.trespass.lock().clone()
    }

    fn wrap(&self, file: Arc<dyn Storage>) -> Arc<dyn Storage> {
        Arc::new(GuardedFile { file, rules: self.rules.clone() })
    }

    fn change(&self, what: &str, path: &Path) -> Result<()> {
        self.rules.change(what, path).map_err(|e| Error::io("change", &e))
    }
}

impl Host for Guarded {
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        Ok(self.wrap(self.host.open(path, access)?))
    }

    fn open_beneath(&self, root: &Path, name: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        if name.is_absolute() || name.components().any(|part| part.as_os_str() == "..") {
            let what = format!("opening of {} beneath {}", name.display(), root.display());
            self.rules.trespass.lock().get_or_insert(what);
            return Err(Error::new(ErrorKind::Denied, "outside of the folder"));
        }
        Ok(self.wrap(self.host.open_beneath(root, name, access)?))
    }

    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        self.change("creation", path)?;
        Ok(self.wrap(self.host.create(path)?))
    }

    fn replace(&self, path: &Path, contents: &[u8]) -> Result<()> {
        self.change("replacement", path)?;
        uncounted(|| self.host.replace(path, contents))
    }

    fn remove(&self, path: &Path) -> Result<()> {
        self.change("removal", path)?;
        self.host.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> Result<()> {
        self.host.sync_dir(dir)
    }

    fn list(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        self.host.list(dir)
    }
}

#[derive(Debug)]
struct GuardedFile {
    file: Arc<dyn Storage>,
    rules: Arc<Rules>,
}

impl Storage for GuardedFile {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_at(at, buf)
    }

    fn write_at(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.rules.change("write", self.path())?;
        self.rules.take(data.len() as u64)?;
        // As a host refuses offsets that its file system does not have.
        if at.checked_add(data.len() as u64).is_none_or(|end| end > i64::MAX as u64) {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        uncounted(|| self.file.write_at(at, data))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.rules.change("change of length", self.path())?;
        if len > i64::MAX as u64 {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        uncounted(|| self.file.set_len(len))
    }

    fn punch_hole(&self, at: u64, len: u64) -> io::Result<()> {
        self.rules.change("hole", self.path())?;
        uncounted(|| self.file.punch_hole(at, len))
    }

    fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        self.rules.change("allocation", self.path())?;
        self.rules.take(len)?;
        self.file.allocate(at, len)
    }

    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        self.file.next_data(at)
    }

    fn sync(&self) -> io::Result<()> {
        self.rules.change("sync", self.path())?;
        self.file.sync()
    }

    fn allocated(&self) -> io::Result<u64> {
        self.file.allocated()
    }

    fn path(&self) -> &Path {
        self.file.path()
    }

    fn writable(&self) -> bool {
        self.rules.writes_allowed
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        self.file.identity()
    }
}
