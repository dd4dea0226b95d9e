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
const CHUNK: u64 = 64 << 10;

#[derive(Debug, Default, Clone)]
struct Contents {
    chunks: BTreeMap<u64, Box<[u8]>>,
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
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let file = Self {
            contents: RwLock::default(),
            path: path.into(),
            inode: NEXT.fetch_add(1, Ordering::Relaxed),
        };
        file.write(0, bytes);
        Arc::new(file)
    }

    /// All bytes of the file.
    pub fn to_vec(&self) -> Vec<u8> {
        let contents = self.contents.read();
        let mut bytes = vec![0; contents.len as usize];
        contents.read(0, &mut bytes);
        bytes
    }

    fn write(&self, at: u64, data: &[u8]) {
        let mut contents = self.contents.write();
        contents.len = contents.len.max(at + data.len() as u64);
        let mut done = 0;
        while done < data.len() {
            let pos = at + done as u64;
            let (index, skip) = (pos / CHUNK, (pos % CHUNK) as usize);
            let part = (data.len() - done).min(CHUNK as usize - skip);
            let chunk = contents
                .chunks
                .entry(index)
                .or_insert_with(|| vec![0; CHUNK as usize].into_boxed_slice());
            chunk[skip..skip + part].copy_from_slice(&data[done..done + part]);
            done += part;
        }
    }
}

impl Contents {
    fn read(&self, at: u64, buf: &mut [u8]) {
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

    fn zero(&mut self, range: Range<u64>) {
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
                chunk[from..to].fill(0);
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
        self.write(at, data);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut contents = self.contents.write();
        if len < contents.len {
            let old = contents.len;
            contents.zero(len..old);
        }
        contents.len = len;
        Ok(())
    }

    fn punch_hole(&self, at: u64, len: u64) -> io::Result<()> {
        let mut contents = self.contents.write();
        let end = (at + len).min(contents.len);
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
