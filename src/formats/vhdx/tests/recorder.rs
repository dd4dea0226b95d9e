//! A file that remembers what was done to it, so that every crash can be played.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use fastrand::Rng;
use parking_lot::Mutex;

use crate::error::Result;
use crate::storage::memory::{MemoryFile, MemoryHost};
use crate::storage::{Access, FileIdentity, Host, Storage};

/// Something done to a file.
#[derive(Debug, Clone)]
pub(super) enum Op {
    Write(u64, Vec<u8>),
    Length(u64),
    Punch(u64, u64),
    Sync,
    /// Put in by the test.
    Mark(usize),
}

#[derive(Debug)]
pub(super) struct Recorder {
    file: Arc<MemoryFile>,
    ops: Mutex<Vec<Op>>,
    /// Changes left before they fail with `errno`; negative for none.
    left: AtomicI64,
    errno: i32,
}

impl Recorder {
    pub fn new(file: Arc<MemoryFile>) -> Arc<Self> {
        Self::failing(file, -1, 0)
    }

    /// A file on which everything but the first `left` changes fails.
    pub fn failing(file: Arc<MemoryFile>, left: i64, errno: i32) -> Arc<Self> {
        Arc::new(Self { file, ops: Mutex::default(), left: AtomicI64::new(left), errno })
    }

    /// Lets changes work again.
    pub fn heal(&self) {
        self.left.store(-1, Ordering::SeqCst);
    }

    pub fn mark(&self, step: usize) {
        self.ops.lock().push(Op::Mark(step));
    }

    pub fn ops(&self) -> Vec<Op> {
        self.ops.lock().clone()
    }

    pub fn syncs(&self) -> usize {
        self.ops.lock().iter().filter(|op| matches!(op, Op::Sync)).count()
    }

    fn change(&self, op: Op) -> io::Result<()> {
        let left = self.left.load(Ordering::SeqCst);
        if left == 0 {
            return Err(io::Error::from_raw_os_error(self.errno));
        }
        self.left.store(left.saturating_sub(1).max(-1), Ordering::SeqCst);
        apply(&self.file, &op);
        self.ops.lock().push(op);
        Ok(())
    }
}

fn apply(file: &MemoryFile, op: &Op) {
    match op {
        Op::Write(at, data) => file.write_at(*at, data).unwrap(),
        Op::Length(len) => file.set_len(*len).unwrap(),
        Op::Punch(at, len) => file.punch_hole(*at, *len).unwrap(),
        Op::Sync | Op::Mark(_) => {}
    }
}

/// A state that a crash after the first `count` operations on a file may leave: everything up to
/// the last sync, and of the rest whatever `rng` picks, torn at sectors.
pub(super) fn crash(start: &[u8], ops: &[Op], count: usize, rng: &mut Rng) -> Vec<u8> {
    let file = MemoryFile::new("crash", start);
    let ops = &ops[..count];
    let synced = ops.iter().rposition(|op| matches!(op, Op::Sync)).map_or(0, |i| i + 1);
    ops[..synced].iter().for_each(|op| apply(&file, op));
    let chance = [0, 1, 2, 3, 4][rng.usize(..5)];
    for op in &ops[synced..] {
        let kept = rng.u8(..4) < chance;
        match op {
            Op::Write(at, data) if rng.bool() => {
                for (i, sector) in data.chunks(512).enumerate() {
                    if rng.u8(..4) < chance {
                        apply(&file, &Op::Write(at + i as u64 * 512, sector.to_vec()));
                    }
                }
            }
            op if kept => apply(&file, op),
            _ => {}
        }
    }
    file.to_vec()
}

impl Storage for Recorder {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_at(at, buf)
    }
    fn write_at(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.change(Op::Write(at, data.to_vec()))
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Op::Length(len))
    }
    fn punch_hole(&self, at: u64, len: u64) -> io::Result<()> {
        self.change(Op::Punch(at, len))
    }
    fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        self.file.allocate(at, len)
    }
    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        self.file.next_data(at)
    }
    fn sync(&self) -> io::Result<()> {
        self.change(Op::Sync)
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

/// A host with one recorded file, and others.
#[derive(Debug)]
pub(super) struct RecordingHost {
    pub file: Arc<Recorder>,
    pub others: Arc<MemoryHost>,
}

impl RecordingHost {
    /// A host whose file [`PATH`](super::PATH) holds `bytes`.
    pub fn new(bytes: &[u8], others: Arc<MemoryHost>) -> Arc<Self> {
        let file = Recorder::new(MemoryFile::new(super::PATH, bytes));
        Arc::new(Self { file, others })
    }
}

impl Host for RecordingHost {
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        if path == self.file.path() {
            return Ok(self.file.clone());
        }
        self.others.open(path, access)
    }
    fn open_beneath(&self, root: &Path, name: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        self.open(&root.join(name), access)
    }
    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        self.others.create(path)
    }
    fn replace(&self, path: &Path, contents: &[u8]) -> Result<()> {
        self.others.replace(path, contents)
    }
    fn remove(&self, path: &Path) -> Result<()> {
        self.others.remove(path)
    }
    fn sync_dir(&self, _dir: &Path) -> Result<()> {
        Ok(())
    }
    fn list(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        self.others.list(dir)
    }
}
