//! Files in memory, for tests: a [`MemoryHost`] is a flat set of named files.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use super::{Access, FileIdentity, Host, Storage};
use crate::error::{Error, ErrorKind, Result};

/// Stored in chunks so that a huge sparse file costs only what was written to it.
const CHUNK: u64 = 16 << 10;

/// The bytes of one file. Clones share their chunks until one of them writes.
#[derive(Debug, Default, Clone)]
pub(super) struct Contents {
    chunks: BTreeMap<u64, Arc<[u8]>>,
    len: u64,
}

/// One file in memory. Cloning the `Arc` shares it.
#[derive(Debug)]
pub struct MemoryFile {
    contents: RwLock<Contents>,
    path: PathBuf,
    inode: u64,
}

impl MemoryFile {
    /// A file called `path` with the given contents.
    pub fn new(path: impl Into<PathBuf>, bytes: &[u8]) -> Arc<Self> {
        let mut contents = Contents::default();
        contents.write(0, bytes);
        Self::with_contents(path, contents)
    }

    pub(super) fn with_contents(path: impl Into<PathBuf>, contents: Contents) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Arc::new(Self {
            contents: RwLock::new(contents),
            path: path.into(),
            inode: NEXT.fetch_add(1, Ordering::Relaxed),
        })
    }

    /// A file of its own with the same name and bytes; costs little until one of the two changes.
    pub fn fork(&self) -> Arc<Self> {
        Self::with_contents(self.path.clone(), self.contents())
    }

    /// Fills `buf` from `at`, with zeroes past the end.
    pub(super) fn read_padded(&self, at: u64, buf: &mut [u8]) {
        self.contents.read().read(at, buf);
    }

    pub(super) fn contents(&self) -> Contents {
        self.contents.read().clone()
    }

    /// All bytes of the file.
    pub fn to_vec(&self) -> Vec<u8> {
        let contents = self.contents.read();
        let mut bytes = vec![0; contents.len as usize];
        contents.read(0, &mut bytes);
        bytes
    }
}

impl Contents {
    /// Length in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    fn write(&mut self, at: u64, data: &[u8]) {
        self.poke(at, data);
        self.len = self.len.max(at + data.len() as u64);
    }

    /// Writes without growing the file: bytes past its end are there once the length covers them.
    pub(super) fn poke(&mut self, at: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let pos = at + done as u64;
            let (index, skip) = (pos / CHUNK, (pos % CHUNK) as usize);
            let part = (data.len() - done).min(CHUNK as usize - skip);
            let chunk = self.chunks.entry(index).or_insert_with(|| [0; CHUNK as usize].into());
            Arc::make_mut(chunk)[skip..skip + part].copy_from_slice(&data[done..done + part]);
            done += part;
        }
    }

    /// Undoes what [`Self::poke`] left past the end.
    pub(super) fn forget_past_end(&mut self) {
        self.zero(self.len..u64::MAX);
    }

    /// Cuts or extends the file. Cutting forgets every byte past the new end.
    pub(super) fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len..u64::MAX);
        }
        self.len = len;
    }

    /// Fills `buf` from `at`, with zeroes past the end.
    pub(super) fn read(&self, at: u64, buf: &mut [u8]) {
        let mut done = 0;
        while done < buf.len() {
            let pos = at + done as u64;
            let (index, skip) = (pos / CHUNK, (pos % CHUNK) as usize);
            let part = (buf.len() - done).min(CHUNK as usize - skip);
            match self.chunks.get(&index) {
                Some(chunk) => {
                    buf[done..done + part].copy_from_slice(&chunk[skip..skip + part]);
                }
                None => buf[done..done + part].fill(0),
            }
            done += part;
        }
    }

    /// Makes a range read as zeroes.
    pub(super) fn zero(&mut self, range: Range<u64>) {
        let indices: Vec<u64> = self
            .chunks
            .range(range.start / CHUNK..range.end.div_ceil(CHUNK))
            .map(|c| *c.0)
            .collect();
        for index in indices {
            let base = index * CHUNK;
            let from = range.start.saturating_sub(base).min(CHUNK) as usize;
            let to = range.end.saturating_sub(base).min(CHUNK) as usize;
            if from == 0 && to == CHUNK as usize {
                self.chunks.remove(&index);
            } else if let Some(chunk) = self.chunks.get_mut(&index) {
                Arc::make_mut(chunk)[from..to].fill(0);
            }
        }
    }
}

impl Storage for MemoryFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.contents.read().len)
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        let contents = self.contents.read();
        if at.checked_add(buf.len() as u64).is_none_or(|end| end > contents.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        contents.read(at, buf);
        Ok(())
    }

    fn write_at(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.contents.write().write(at, data);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.contents.write().set_len(len);
        Ok(())
    }

    fn punch_hole(&self, at: u64, len: u64) -> io::Result<()> {
        let mut contents = self.contents.write();
        let end = at.saturating_add(len).min(contents.len);
        if at < end {
            contents.zero(at..end);
        }
        Ok(())
    }

    fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        let mut contents = self.contents.write();
        contents.len = contents.len.max(at + len);
        Ok(())
    }

    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        let contents = self.contents.read();
        let found = contents
            .chunks
            .range(at / CHUNK..)
            .next()
            .map(|(index, _)| (index * CHUNK).max(at)..((index + 1) * CHUNK).min(contents.len));
        Ok(found.filter(|r| r.start < r.end))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.contents.read().chunks.len() as u64 * CHUNK)
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn writable(&self) -> bool {
        true
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        Ok(FileIdentity { device: 0, inode: self.inode })
    }
}

/// A set of files in memory. Paths are compared as text; there are no directories.
#[derive(Debug, Default)]
pub struct MemoryHost {
    files: Mutex<BTreeMap<PathBuf, Arc<MemoryFile>>>,
}

impl MemoryHost {
    /// A host without files.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Adds a file, replacing one of the same name.
    pub fn insert(&self, file: Arc<MemoryFile>) {
        self.files.lock().insert(file.path().to_owned(), file);
    }

    /// The file called `path`.
    pub fn file(&self, path: &Path) -> Option<Arc<MemoryFile>> {
        self.files.lock().get(path).cloned()
    }

    /// A host of its own with the same files; see [`MemoryFile::fork`].
    pub fn fork(&self) -> Arc<Self> {
        let files = self.files.lock();
        let forked = files.iter().map(|(path, file)| (path.clone(), file.fork())).collect();
        Arc::new(Self { files: Mutex::new(forked) })
    }

    /// All files.
    pub fn files(&self) -> Vec<Arc<MemoryFile>> {
        self.files.lock().values().cloned().collect()
    }
}

impl Host for MemoryHost {
    fn open(&self, path: &Path, _access: Access) -> Result<Arc<dyn Storage>> {
        match self.file(path) {
            Some(file) => Ok(file),
            None => Err(Error::new(ErrorKind::NotFound, "no such file").in_file(path)),
        }
    }

    fn open_beneath(&self, root: &Path, name: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        self.open(&root.join(name), access)
    }

    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        if self.file(path).is_some() {
            return Err(Error::new(ErrorKind::Exists, "the file exists").in_file(path));
        }
        let file = MemoryFile::new(path, &[]);
        self.insert(file.clone());
        Ok(file)
    }

    fn replace(&self, path: &Path, contents: &[u8]) -> Result<()> {
        self.insert(MemoryFile::new(path, contents));
        Ok(())
    }

    fn remove(&self, path: &Path) -> Result<()> {
        self.files.lock().remove(path);
        Ok(())
    }

    fn sync_dir(&self, _dir: &Path) -> Result<()> {
        Ok(())
    }

    fn list(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        let files = self.files.lock();
        Ok(files.keys().filter(|p| p.parent() == Some(dir)).cloned().collect())
    }
}
