//! Files in memory, for tests: a [`MemoryHost`] is a flat set of named files.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock};

use super::{Access, FileIdentity, Host, Storage};
use crate::error::{Error, ErrorKind, Result};

/// Stored in chunks so that a huge sparse file costs only what was written to it.
const CHUNK: u64 = 4 << 10;
/// Most chunks that [`Storage::next_data`] joins into one answer.
const MAX_JOINED: u64 = 256;

/// The bytes of one file. Clones share their chunks until one of them writes.
#[derive(Debug, Default, Clone)]
pub(super) struct Contents {
    chunks: BTreeMap<u64, Arc<Chunk>>,
    len: u64,
}

/// A piece of a file, and its hash once somebody asked for it.
#[derive(Debug)]
struct Chunk {
    bytes: [u8; CHUNK as usize],
    hash: OnceLock<u64>,
}

impl Chunk {
    fn zeroed() -> Arc<Self> {
        Arc::new(Self { bytes: [0; CHUNK as usize], hash: OnceLock::new() })
    }

    /// The bytes of a chunk, for changing them; other holders of it keep theirs.
    fn bytes_mut(chunk: &mut Arc<Self>) -> &mut [u8] {
        let chunk = Arc::make_mut(chunk);
        chunk.hash = OnceLock::new();
        &mut chunk.bytes
    }

    /// 0 for zeroes, which are as good as no chunk.
    fn hash(&self) -> u64 {
        *self.hash.get_or_init(|| match self.bytes.iter().all(|byte| *byte == 0) {
            true => 0,
            false => {
                let mut hasher = DefaultHasher::new();
                hasher.write(&self.bytes);
                hasher.finish()
            }
        })
    }
}

impl Clone for Chunk {
    fn clone(&self) -> Self {
        Self { bytes: self.bytes, hash: OnceLock::new() }
    }
}

/// One file in memory. Cloning the `Arc` shares it.
#[derive(Debug)]
pub struct MemoryFile {
    contents: Arc<RwLock<Contents>>,
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
            contents: Arc::new(RwLock::new(contents)),
            path: path.into(),
            inode: NEXT.fetch_add(1, Ordering::Relaxed),
        })
    }

    /// The same file under another name.
    pub(super) fn named(&self, path: impl Into<PathBuf>) -> Arc<Self> {
        let (contents, inode) = (self.contents.clone(), self.inode);
        Arc::new(Self { contents, path: path.into(), inode })
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
            let chunk = self.chunks.entry(index).or_insert_with(Chunk::zeroed);
            let bytes = Chunk::bytes_mut(chunk);
            bytes[skip..skip + part].copy_from_slice(&data[done..done + part]);
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
                    buf[done..done + part].copy_from_slice(&chunk.bytes[skip..skip + part]);
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
                Chunk::bytes_mut(chunk)[from..to].fill(0);
            }
        }
    }

    /// A number that files of the same length and bytes share. What did not change since it was last
    /// asked for is not read again.
    fn digest(&self) -> u64 {
        let chunks = self.chunks.iter();
        let sum = chunks.map(|(index, chunk)| chunk.hash().wrapping_mul(2 * index + 1));
        sum.fold(self.len, u64::wrapping_add)
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
        let mut indices = contents.chunks.range(at / CHUNK..).map(|(index, _)| *index);
        let Some(first) = indices.next() else { return Ok(None) };
        let follows = |(next, index): &(u64, u64)| next == index;
        let joined = (first + 1..first + MAX_JOINED).zip(indices).take_while(follows).count();
        let end = first + 1 + joined as u64;
        let found = (first * CHUNK).max(at)..(end * CHUNK).min(contents.len);
        Ok(Some(found).filter(|r| r.start < r.end))
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
        Ok(FileIdentity { device: 0, inode: self.inode, part: 0 })
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
        let mut first: BTreeMap<u64, Arc<MemoryFile>> = BTreeMap::new();
        let mut forked = BTreeMap::new();
        for (path, file) in &*files {
            let fork = first.entry(file.inode).or_insert_with(|| file.fork());
            forked.insert(path.clone(), fork.named(path));
        }
        Arc::new(Self { files: Mutex::new(forked) })
    }

    /// A number that hosts with files of the same names and bytes share, and two others hardly ever.
    pub fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for (path, file) in &*self.files.lock() {
            (path, file.contents.read().digest()).hash(&mut hasher);
        }
        hasher.finish()
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

    fn rename(&self, from: &Path, to: &Path, replace: bool) -> Result<()> {
        if !replace && self.file(to).is_some() {
            return Err(Error::new(ErrorKind::Exists, "the file exists").in_file(to));
        }
        let file = self.files.lock().remove(from);
        let file =
            file.ok_or_else(|| Error::new(ErrorKind::NotFound, "no such file").in_file(from))?;
        self.insert(file.named(to));
        Ok(())
    }

    fn link(&self, from: &Path, to: &Path) -> Result<()> {
        if self.file(to).is_some() {
            return Err(Error::new(ErrorKind::Exists, "the file exists").in_file(to));
        }
        let file = self.file(from);
        let file =
            file.ok_or_else(|| Error::new(ErrorKind::NotFound, "no such file").in_file(from))?;
        self.insert(file.named(to));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_share_a_digest_exactly_when_they_hold_the_same_bytes() {
        let host = MemoryHost::new();
        let file = MemoryFile::new("/a", &[1; 3 * CHUNK as usize]);
        host.insert(file.clone());
        let before = host.digest();
        let forked = host.fork();
        assert_eq!(forked.digest(), before);
        file.write_at(CHUNK + 5, &[2]).unwrap();
        assert_ne!(host.digest(), before);
        assert_eq!(forked.digest(), before);
        file.write_at(CHUNK + 5, &[1]).unwrap();
        assert_eq!(host.digest(), before);
        // The same bytes in another place, at another length, under another name.
        let digest = |name: &str, len: u64, at: u64| {
            let file = MemoryFile::new(name, &[]);
            file.set_len(len).unwrap();
            file.write_at(at, &[7]).unwrap();
            let host = MemoryHost::new();
            host.insert(file);
            host.digest()
        };
        let all = [("/a", 9000, 0), ("/a", 9001, 0), ("/a", 9000, 4096), ("/b", 9000, 0)];
        let digests = all.map(|(name, len, at)| digest(name, len, at));
        for (index, digest) in digests.iter().enumerate() {
            assert!(!digests[..index].contains(digest), "{:?}", all[index]);
        }
    }

    #[test]
    fn zeroes_that_are_stored_count_as_zeroes_that_are_not() {
        let host = MemoryHost::new();
        let file = MemoryFile::new("/a", &[]);
        file.set_len(9000).unwrap();
        host.insert(file.clone());
        let before = host.digest();
        file.write_at(4096, &[0; 512]).unwrap();
        assert_eq!(host.digest(), before);
    }

    #[test]
    fn data_in_many_chunks_is_told_in_one_piece() {
        let file = MemoryFile::new("/a", &[1; 20_000]);
        file.write_at(40_000, &[1]).unwrap();
        assert_eq!(file.next_data(5).unwrap(), Some(5..20_480));
        assert_eq!(file.next_data(20_480).unwrap(), Some(36_864..40_001));
        assert_eq!(file.next_data(40_001).unwrap(), None);
    }
}
