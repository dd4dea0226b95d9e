//! A file that remembers what was done to it, and that can fail.

use std::io;
use std::ops::Range;
use std::path::PathBuf;

use parking_lot::Mutex;

use super::*;
use crate::storage::FileIdentity;

#[derive(Debug, Clone)]
pub(super) enum Op {
    Write(u64, Vec<u8>),
    SetLen(u64),
    Punch(u64, u64),
    Sync,
}

/// A file that remembers what was done to it.
#[derive(Debug)]
pub(super) struct Recorder {
    file: Arc<MemoryFile>,
    ops: Mutex<Vec<Op>>,
    /// The operation that fails, if one is to.
    fail: Option<(usize, i32)>,
}

impl Recorder {
    pub(super) fn new(file: Arc<MemoryFile>) -> Arc<Self> {
        Arc::new(Self { file, ops: Mutex::default(), fail: None })
    }

    /// A file whose operation number `at` fails with `errno`, having done nothing.
    pub(super) fn failing(file: Arc<MemoryFile>, at: usize, errno: i32) -> Arc<Self> {
        Arc::new(Self { file, ops: Mutex::default(), fail: Some((at, errno)) })
    }

    /// `inner` with this file as its image.
    pub(super) fn host(self: &Arc<Self>, inner: &Arc<MemoryHost>) -> Arc<dyn Host> {
        Arc::new(RecordingHost { inner: inner.clone(), image: self.clone() })
    }

    /// How many operations there were so far.
    pub(super) fn count(&self) -> usize {
        self.ops.lock().len()
    }

    pub(super) fn ops(&self) -> Vec<Op> {
        self.ops.lock().clone()
    }

    /// Does `op` and remembers it as one step.
    fn record(&self, op: Op, act: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut ops = self.ops.lock();
        let number = ops.len();
        ops.push(op);
        match self.fail {
            Some((at, errno)) if at == number => Err(io::Error::from_raw_os_error(errno)),
            _ => act(),
        }
    }
}

impl Storage for Recorder {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_at(at, buf)
    }
    fn write_at(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.record(Op::Write(at, data.to_vec()), || self.file.write_at(at, data))
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.record(Op::SetLen(len), || self.file.set_len(len))
    }
    fn punch_hole(&self, at: u64, len: u64) -> io::Result<()> {
        self.record(Op::Punch(at, len), || self.file.punch_hole(at, len))
    }
    fn allocate(&self, _at: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        self.file.next_data(at)
    }
    fn sync(&self) -> io::Result<()> {
        self.record(Op::Sync, || Ok(()))
    }
    fn allocated(&self) -> io::Result<u64> {
        self.file.allocated()
    }
    fn path(&self) -> &Path {
        self.file.path()
    }
    fn writable(&self) -> bool {
        true
    }
    fn identity(&self) -> io::Result<FileIdentity> {
        self.file.identity()
    }
}

/// A host whose image is recorded; its parents are not.
#[derive(Debug)]
struct RecordingHost {
    inner: Arc<MemoryHost>,
    image: Arc<Recorder>,
}

impl Host for RecordingHost {
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        if path == Path::new(PATH) { Ok(self.image.clone()) } else { self.inner.open(path, access) }
    }
    fn open_beneath(&self, root: &Path, name: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        self.inner.open_beneath(root, name, access)
    }
    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        self.inner.create(path)
    }
    fn replace(&self, path: &Path, contents: &[u8]) -> Result<()> {
        self.inner.replace(path, contents)
    }
    fn remove(&self, path: &Path) -> Result<()> {
        self.inner.remove(path)
    }
    fn sync_dir(&self, dir: &Path) -> Result<()> {
        self.inner.sync_dir(dir)
    }
    fn list(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        self.inner.list(dir)
    }
}
