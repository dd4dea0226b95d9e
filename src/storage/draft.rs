//! Trying out changes: a [`Draft`] is a host whose files can be written while those below are only
//! read. What was written is kept in a scratch file that has no name, and goes with the draft.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;

use super::runs::{Held, Runs};
use super::{Access, Entry, FileIdentity, Host, Namer, Storage, file};
use crate::error::{Error, ErrorKind, Result};

/// See the module's documentation. Names are as they are below: no file is made, removed or replaced.
#[derive(Debug)]
pub struct Draft {
    below: Arc<dyn Host>,
    scratch: Arc<Scratch>,
    /// What was written, by file: however often a file is opened, it has one contents.
    layers: Arc<Mutex<Layers>>,
}

type Layers = HashMap<FileIdentity, Arc<Mutex<Layer>>>;

/// Where written bytes are, one write behind the other.
#[derive(Debug)]
struct Scratch {
    file: Arc<dyn Storage>,
    used: Mutex<u64>,
}

/// What was written to one file.
#[derive(Debug)]
struct Layer {
    /// Bytes of the file. What it has beyond the file below is held as zeroes, if as nothing else.
    len: u64,
    /// By byte.
    runs: Runs,
}

impl Layer {
    fn extend(&mut self, len: u64) {
        if len > self.len {
            self.runs.put(self.len..len, Held::Zeroes);
            self.len = len;
        }
    }
}

impl Draft {
    /// A draft over the files of `below`. Scratch space is in the directory for temporary files.
    pub fn over(below: &Arc<dyn Host>) -> Result<Arc<Self>> {
        let file = file::scratch(&std::env::temp_dir())?;
        Ok(Arc::new(Self {
            below: below.clone(),
            scratch: Arc::new(Scratch { file, used: Mutex::new(0) }),
            layers: Arc::default(),
        }))
    }

    fn wrap(&self, below: Arc<dyn Storage>) -> Result<Arc<dyn Storage>> {
        let failed = |e| Error::io("stat", &e).in_file(below.path());
        let identity = below.identity().map_err(failed)?;
        let len = below.len().map_err(failed)?;
        let new = || Arc::new(Mutex::new(Layer { len, runs: Runs::default() }));
        let layer = self.layers.lock().entry(identity).or_insert_with(new).clone();
        Ok(Arc::new(DraftFile { below, layer, scratch: self.scratch.clone() }))
    }

    fn refuse<T>(path: &Path) -> Result<T> {
        Err(Error::new(ErrorKind::Denied, "a draft changes no names of files").in_file(path))
    }
}

/// The access to the file below.
fn reading(access: Access) -> Access {
    if access == Access::Write { Access::Read } else { access }
}

impl Host for Draft {
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        self.wrap(self.below.open(path, reading(access))?)
    }

    fn open_beneath(&self, root: &Path, name: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        self.wrap(self.below.open_beneath(root, name, reading(access))?)
    }

    fn named_in(&self, file: &dyn Storage) -> Option<Arc<dyn Host>> {
        let below = self.below.named_in(file)?;
        let (scratch, layers) = (self.scratch.clone(), self.layers.clone());
        Some(Arc::new(Self { below, scratch, layers }))
    }

    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        Self::refuse(path)
    }

    fn replace(&self, path: &Path, _contents: &[u8]) -> Result<()> {
        Self::refuse(path)
    }

    fn remove(&self, path: &Path) -> Result<()> {
        Self::refuse(path)
    }

    fn sync_dir(&self, _dir: &Path) -> Result<()> {
        Ok(())
    }

    fn list(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        self.below.list(dir)
    }

    fn list_beneath(&self, root: &Path, dir: &Path, limit: usize) -> Result<Vec<Entry>> {
        self.below.list_beneath(root, dir, limit)
    }
}

/// A file of a [`Draft`].
#[derive(Debug)]
struct DraftFile {
    below: Arc<dyn Storage>,
    layer: Arc<Mutex<Layer>>,
    scratch: Arc<Scratch>,
}

impl Storage for DraftFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.layer.lock().len)
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        let layer = self.layer.lock();
        let end = at.checked_add(buf.len() as u64).filter(|end| *end <= layer.len);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        let mut pos = at;
        while pos < end {
            let (held, run_end) = layer.runs.at(pos);
            let part = pos..end.min(run_end);
            let buf = &mut buf[(part.start - at) as usize..(part.end - at) as usize];
            match held {
                Some(Held::Slots(slot)) => self.scratch.file.read_at(slot, buf)?,
                Some(Held::Zeroes) => buf.fill(0),
                None => self.below.read_at(pos, buf)?,
            }
            pos = part.end;
        }
        Ok(())
    }

    fn write_at(&self, at: u64, data: &[u8]) -> io::Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let end = at.checked_add(data.len() as u64).ok_or(io::ErrorKind::FileTooLarge)?;
        let slot = {
            let mut used = self.scratch.used.lock();
            let slot = *used;
            *used += data.len() as u64;
            slot
        };
        self.scratch.file.write_at(slot, data)?;
        let mut layer = self.layer.lock();
        layer.extend(end);
        layer.runs.put(at..end, Held::Slots(slot));
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut layer = self.layer.lock();
        layer.extend(len);
        layer.len = len;
        Ok(())
    }

    fn punch_hole(&self, at: u64, len: u64) -> io::Result<()> {
        let mut layer = self.layer.lock();
        let end = at.saturating_add(len).min(layer.len);
        if at < end {
            layer.runs.put(at..end, Held::Zeroes);
        }
        Ok(())
    }

    fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        let end = at.checked_add(len).ok_or(io::ErrorKind::FileTooLarge)?;
        self.layer.lock().extend(end);
        Ok(())
    }

    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        let layer = self.layer.lock();
        let mut pos = at;
        while pos < layer.len {
            let (held, run_end) = layer.runs.at(pos);
            let end = run_end.min(layer.len);
            match held {
                Some(Held::Slots(_)) => return Ok(Some(pos..end)),
                Some(Held::Zeroes) => {}
                None => {
                    let data = self.below.next_data(pos)?;
                    let data = data.map(|data| data.start.max(pos)..data.end.min(end));
                    if let Some(data) = data.filter(|data| data.start < data.end) {
                        return Ok(Some(data));
                    }
                }
            }
            pos = end;
        }
        Ok(None)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn allocated(&self) -> io::Result<u64> {
        self.below.allocated()
    }

    fn path(&self) -> &Path {
        self.below.path()
    }

    fn writable(&self) -> bool {
        true
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        self.below.identity()
    }

    fn namer(&self) -> Option<&Namer> {
        self.below.namer()
    }

    fn modified(&self) -> Option<SystemTime> {
        self.below.modified()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryHost;

    #[test]
    fn a_draft_is_as_a_copy_would_be_and_the_file_below_stays() {
        let host = MemoryHost::new();
        let original: Vec<u8> = (0..40_000u32).map(|i| (i / 7) as u8).collect();
        let path = Path::new("/a");
        let below = host.create(path).unwrap();
        below.write_at(0, &original).unwrap();
        drop(below);
        let copy = host.create(Path::new("/b")).unwrap();
        copy.write_at(0, &original).unwrap();
        let below: Arc<dyn Host> = host.clone();
        let draft = Draft::over(&below).unwrap();
        let one = draft.open(path, Access::Write).unwrap();
        let other = draft.open(path, Access::Peek).unwrap();
        let mut random = fastrand::Rng::with_seed(11);
        for _ in 0..2000 {
            let at = random.u64(0..60_000);
            let len = random.u64(0..5000);
            let data = vec![random.u8(..); len as usize];
            for file in [&one, &copy] {
                match data.first().map_or(0, |byte| byte % 5) {
                    0 => file.punch_hole(at, len).unwrap(),
                    1 => file.set_len(at).unwrap(),
                    2 => file.allocate(at, len).unwrap(),
                    _ => file.write_at(at, &data).unwrap(),
                }
            }
            let len = copy.len().unwrap();
            assert_eq!(other.len().unwrap(), len);
            let mut bytes = [vec![0; len as usize], vec![0; len as usize]];
            copy.read_at(0, &mut bytes[0]).unwrap();
            other.read_at(0, &mut bytes[1]).unwrap();
            assert!(bytes[0] == bytes[1]);
            // What counts as a hole is zero, and every search comes to an end.
            let mut pos = 0;
            while let Some(data) = other.next_data(pos).unwrap() {
                assert!(pos <= data.start && data.start < data.end && data.end <= len);
                assert!(bytes[1][pos as usize..data.start as usize].iter().all(|b| *b == 0));
                pos = data.end;
            }
            assert!(bytes[1][pos.min(len) as usize..].iter().all(|b| *b == 0));
            assert!(other.read_at(len, &mut [0]).is_err());
        }
        drop((one, other));
        let below = host.open(path, Access::Read).unwrap();
        let mut bytes = vec![0; original.len()];
        below.read_at(0, &mut bytes).unwrap();
        assert!(bytes == original);
    }
}
