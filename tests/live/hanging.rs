//! A disk that hangs when it is told to.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem,
    FopenFlags, Generation, INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, Session, TimeOrNow, WriteFlags,
};
use parking_lot::{Condvar, Mutex};

use super::{Mounting, mounting, outcome};

/// More than there are requests at a time.
const THREADS: usize = 8;
const FILE: INodeNo = INodeNo(2);
/// How long a request is held at most.
const LONGEST: Duration = Duration::from_secs(120);
/// Nothing is taken for known.
const TTL: Duration = Duration::ZERO;

/// Requests that can hang.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Read,
    Sync,
    Stat,
}

#[derive(Debug, Default)]
struct Gate {
    closed: Mutex<Closed>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Closed {
    /// What is not answered at the moment.
    to: Option<Kind>,
    /// Requests that wait.
    waiting: usize,
}

impl Gate {
    /// Waits for as long as requests of this kind are held.
    fn pass(&self, kind: Kind) {
        let mut closed = self.closed.lock();
        closed.waiting += 1;
        // Not for ever: a test that was killed must leave no process behind that nobody can end.
        self.changed.wait_while_for(&mut closed, |closed| closed.to == Some(kind), LONGEST);
        closed.waiting -= 1;
    }
}

/// A file system with one file, which lies in memory.
pub struct HangingDisk {
    _session: BackgroundSession,
    gate: Arc<Gate>,
    name: &'static str,
    dir: tempfile::TempDir,
    _mounting: Mounting,
}

impl HangingDisk {
    /// Mounts it with a file of these contents.
    pub fn new(name: &'static str, contents: Vec<u8>) -> Self {
        let dir = tempfile::Builder::new().prefix("flatdisk-hang-").tempdir().expect("tempdir");
        let mounting = mounting();
        let gate = Arc::new(Gate::default());
        let files = OneFile { name, gate: gate.clone(), contents: Mutex::new(contents) };
        let mut config = Config::default();
        config.n_threads = Some(THREADS);
        config.clone_fd = true;
        let session = Session::new(files, dir.path(), &config).expect("mount");
        let session = session.spawn().expect("start a thread");
        Self { _session: session, gate, name, dir, _mounting: mounting }
    }

    /// The file.
    pub fn file(&self) -> PathBuf {
        self.dir.path().join(self.name)
    }

    /// Answers no requests of a kind while the result lives. It must be dropped before whoever asks.
    pub fn hold(&self, kind: Kind) -> Held {
        self.gate.closed.lock().to = Some(kind);
        Held(self.gate.clone())
    }
}

impl Drop for HangingDisk {
    fn drop(&mut self) {
        // Lazily: a daemon that a failed test killed may still be dying.
        let _ = outcome(Command::new("umount").arg("-l").arg(self.dir.path()));
    }
}

/// Requests are held, see [`HangingDisk::hold`].
pub struct Held(Arc<Gate>);

impl Held {
    /// Whether a request is being held.
    pub fn hangs(&self) -> bool {
        self.0.closed.lock().waiting > 0
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.closed.lock().to = None;
        self.0.changed.notify_all();
    }
}

struct OneFile {
    name: &'static str,
    gate: Arc<Gate>,
    contents: Mutex<Vec<u8>>,
}

impl OneFile {
    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let folder = ino == INodeNo::ROOT;
        let size = if folder { 0 } else { self.contents.lock().len() as u64 };
        let time = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino,
            size,
            blocks: size / 512,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: if folder { FileType::Directory } else { FileType::RegularFile },
            perm: if folder { 0o755 } else { 0o644 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for OneFile {
    fn lookup(&self, _req: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.gate.pass(Kind::Stat);
        match name == self.name {
            true => reply.entry(&TTL, &self.attributes(FILE), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.gate.pass(Kind::Stat);
        reply.attr(&TTL, &self.attributes(ino));
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if let Some(size) = size {
            self.contents.lock().resize(size as usize, 0);
        }
        reply.attr(&TTL, &self.attributes(ino));
    }

    fn readdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        if offset == 0 {
            let _full = reply.add(FILE, 1, FileType::RegularFile, self.name);
        }
        reply.ok();
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // Every read comes here.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.gate.pass(Kind::Read);
        let contents = self.contents.lock();
        let rest = contents.get(offset as usize..).unwrap_or_default();
        reply.data(&rest[..rest.len().min(size as usize)]);
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut contents = self.contents.lock();
        let range = offset as usize..offset as usize + data.len();
        let len = contents.len().max(range.end);
        contents.resize(len, 0);
        contents[range].copy_from_slice(data);
        reply.written(data.len() as u32);
    }

    fn fsync(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.gate.pass(Kind::Sync);
        reply.ok();
    }
}
