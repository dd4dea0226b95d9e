//! Files in memory that remember every change, for crash tests.
//!
//! A [`RecordingHost`] starts from a copy of the files of a [`MemoryHost`] and keeps one sequence of
//! operations for all of them. What a crash may leave of that sequence is the business of
//! [`crash`](super::crash).
//!
//! # Invariants
//!
//! - Changes happen one at a time, under the log's lock, so that the sequence is the order in which
//!   they took effect.
//! - A write is kept as whole 512-byte sectors, as they stood when it returned: the host's page cache
//!   merges a partial write into its sector, so no crash brings the new bytes without what they were
//!   written into.
//! - A sync covers what was recorded before it was called, not what others wrote until it returned.

use std::backtrace::Backtrace;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::memory::{Contents, MemoryFile, MemoryHost};
use super::{Access, FileIdentity, Host, Storage};
use crate::error::{Error, ErrorKind, Result};

/// What a crash writes whole or not at all, in bytes.
pub const SECTOR: u64 = 512;

/// Index of a file among all that a recording has seen; names may come to mean other files.
pub type FileId = usize;

/// One recorded operation.
#[derive(Debug, Clone)]
pub struct Op {
    /// The file it changes. [`Change::SyncDir`] has none.
    pub file: FileId,
    /// What it does.
    pub change: Change,
    /// What a sync is for, where it was said ([`Storage::sync_for`]).
    pub purpose: Option<&'static str>,
    /// The functions of the drivers that led to it, innermost first; empty unless
    /// [`RecordingHost::trace`] asked for it.
    pub origin: Vec<Caller>,
}

/// A function on the way to an operation, and the line in it that was being run.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Caller {
    /// Path of the source file from `formats/` on, without that; or of one of the engine's, from `disk/` on.
    pub file: String,
    /// Name of the function alone.
    pub function: String,
    /// Line number.
    pub line: u32,
}

impl Caller {
    /// The functions under `formats/`, and of the engine that formats share, on the stack.
    fn stack() -> Vec<Self> {
        let text = Backtrace::force_capture().to_string();
        let mut lines = text.lines().map(str::trim).peekable();
        let mut callers = Vec::new();
        while let Some(line) = lines.next() {
            let Some((_, symbol)) = line.split_once(": ") else { continue };
            let place = lines.next_if(|next| next.starts_with("at "));
            let own = |at: &str| {
                let (_, path) = at.split_once("/src/").or_else(|| at.split_once("at src/"))?;
                let engine = ["disk/space.rs:", "disk/writer.rs:"];
                let engine = engine.iter().any(|file| path.starts_with(file));
                path.strip_prefix("formats/").or(engine.then_some(path)).map(str::to_owned)
            };
            let Some(place) = place.and_then(own) else { continue };
            let mut place = place.split(':');
            let function = function(symbol);
            // Closures may have no name, but who made them has.
            if !function.is_empty() {
                callers.push(Self {
                    file: place.next().unwrap_or_default().to_owned(),
                    function,
                    line: place.next().and_then(|line| line.parse().ok()).unwrap_or(0),
                });
            }
        }
        callers
    }
}

/// The name of the function in a symbol, without path, types and closures in it.
fn function(symbol: &str) -> String {
    let mut depth = 0;
    let outside = |c: &char| {
        depth += i32::from(*c == '<');
        let outside = depth == 0;
        depth -= i32::from(*c == '>');
        outside
    };
    let path: String = symbol.chars().filter(outside).collect();
    let names = path.split("::").filter(|name| !name.is_empty() && !name.starts_with('{'));
    names.last().unwrap_or_default().to_owned()
}

/// What an operation does.
#[derive(Debug, Clone)]
pub enum Change {
    /// Puts whole sectors at `at`; the file reaches at least to `end` afterwards.
    Write {
        /// Byte offset, a multiple of [`SECTOR`].
        at: u64,
        /// A multiple of [`SECTOR`] bytes.
        data: Arc<[u8]>,
        /// Where the caller's own bytes ended; 0 where the file does not grow.
        end: u64,
    },
    /// Makes whole sectors read as zeroes.
    Punch(Range<u64>),
    /// Sets the length.
    SetLen(u64),
    /// Extends the file to at least this length.
    Grow(u64),
    /// Makes the file's earlier changes durable.
    Sync,
    /// Gives the file, until now empty and unknown, its name.
    Create,
    /// Gives the file this name, beside those that it has.
    Link(PathBuf),
    /// Gives the file the second name in place of the first, in one step; whatever had that loses it.
    Rename(PathBuf, PathBuf),
    /// Takes this name away from the file.
    Remove(PathBuf),
    /// Gives the file its name and contents in one durable step.
    Replace,
    /// Makes creations and removals in a directory durable.
    SyncDir(PathBuf),
}

/// One file that a recording has seen.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) path: PathBuf,
    /// Contents when first seen: at the start, or of the replacement.
    pub(super) initial: Contents,
}

/// A finished sequence of operations and what it began with.
#[derive(Debug, Clone, Default)]
pub struct Recording {
    pub(super) seen: Vec<Seen>,
    /// The names that were there at the start.
    pub(super) at_start: BTreeMap<PathBuf, FileId>,
    pub(super) ops: Vec<Op>,
    /// Syncs that make nothing durable, by position.
    pub(super) ignored: BTreeSet<usize>,
}

impl Recording {
    /// The same operations as a program would have run them that lacks these syncs, given by position.
    pub fn without(&self, syncs: BTreeSet<usize>) -> Self {
        Self { ignored: syncs, ..self.clone() }
    }

    /// The operations, oldest first.
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// The name of a file.
    pub fn path(&self, file: FileId) -> &Path {
        self.seen.get(file).map_or(Path::new("?"), |seen| &seen.path)
    }

    /// One line about operation `index`, for failure reports.
    pub fn describe(&self, index: usize) -> String {
        let Some(op) = self.ops.get(index) else { return format!("#{index}: none") };
        let what = match &op.change {
            Change::Write { at, data, end } => {
                format!("write {at:#x}+{:#x}, caller's end {end:#x}", data.len())
            }
            Change::Punch(range) => {
                format!("punch {:#x}+{:#x}", range.start, range.end - range.start)
            }
            Change::SetLen(len) => format!("set length {len:#x}"),
            Change::Grow(len) => format!("grow to {len:#x}"),
            Change::SyncDir(dir) => return format!("#{index} sync directory {}", dir.display()),
            other => format!("{other:?}").to_lowercase(),
        };
        format!("#{index} {}: {what}", self.path(op.file).display())
    }
}

/// The sequence being recorded, shared by the host and its open files.
#[derive(Debug, Default)]
struct Log {
    recording: Recording,
    /// The files as they are now, by [`FileId`].
    live: Vec<Arc<MemoryFile>>,
    names: BTreeMap<PathBuf, FileId>,
    sync_time: Duration,
    tracing: bool,
    sharing: bool,
}

impl Log {
    fn add(&mut self, file: Arc<MemoryFile>) -> FileId {
        let path = file.path().to_owned();
        self.recording.seen.push(Seen { path: path.clone(), initial: file.contents() });
        self.live.push(file);
        self.names.insert(path, self.live.len() - 1);
        self.live.len() - 1
    }

    fn named(&self, path: &Path) -> Result<FileId> {
        let file = self.names.get(path).copied();
        file.ok_or_else(|| Error::new(ErrorKind::NotFound, "no such file").in_file(path))
    }

    fn refuse_existing(&self, path: &Path) -> Result<()> {
        match self.names.contains_key(path) {
            true => Err(Error::new(ErrorKind::Exists, "the file exists").in_file(path)),
            false => Ok(()),
        }
    }

    fn push(&mut self, file: FileId, change: Change) {
        self.push_for(file, change, None);
    }

    fn push_for(&mut self, file: FileId, change: Change, purpose: Option<&'static str>) {
        let origin = if self.tracing { Caller::stack() } else { Vec::new() };
        self.recording.ops.push(Op { file, change, purpose, origin });
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub struct RecordingHost {
    log: Arc<Mutex<Log>>,
}

impl RecordingHost {
    /// A recorder that begins with copies of `host`'s files, all of them durable.
    pub fn over(host: &MemoryHost) -> Arc<Self> {
        let mut log = Log::default();
        for file in host.fork().files() {
            let known = |other: &Arc<MemoryFile>| other.identity().ok() == file.identity().ok();
            match log.live.iter().position(known) {
                None => drop(log.add(file)),
                Some(first) => drop(log.names.insert(file.path().to_owned(), first)),
            }
        }
        log.recording.at_start =
            log.names.iter().map(|(path, file)| (path.clone(), *file)).collect();
        Arc::new(Self { log: Arc::new(Mutex::new(log)) })
    }

    /// How long each sync takes from now on, for what other threads do meanwhile.
    pub fn set_sync_time(&self, time: Duration) {
        self.log.lock().sync_time = time;
    }

    /// Notes from now on where in the drivers each operation comes from, which takes its time.
    pub fn trace(&self) {
        self.log.lock().tracing = true;
    }

    /// Lets files share blocks from now on, as some hosts do.
    pub fn share_blocks(&self) {
        self.log.lock().sharing = true;
    }

    /// How many operations have been recorded.
    pub fn position(&self) -> usize {
        self.log.lock().recording.ops.len()
    }

    /// What was recorded so far.
    pub fn recording(&self) -> Recording {
        self.log.lock().recording.clone()
    }

    /// The files as they are now, as if nothing could be lost.
    pub fn now(&self) -> Arc<MemoryHost> {
        let log = self.log.lock();
        let host = MemoryHost::new();
        for (path, &file) in &log.names {
            host.insert(log.live[file].named(path));
        }
        host.fork()
    }
}

impl Host for RecordingHost {
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        let log = self.log.lock();
        let file = log.named(path)?;
        Ok(Arc::new(RecordedFile {
            live: log.live[file].named(path),
            file,
            log: self.log.clone(),
            writable: access == Access::Write,
        }))
    }

    fn open_beneath(&self, root: &Path, name: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        self.open(&root.join(name), access)
    }

    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        {
            let mut log = self.log.lock();
            log.refuse_existing(path)?;
            let file = log.add(MemoryFile::new(path, &[]));
            log.push(file, Change::Create);
        }
        self.open(path, Access::Write)
    }

    fn replace(&self, path: &Path, contents: &[u8]) -> Result<()> {
        let mut log = self.log.lock();
        let file = log.add(MemoryFile::new(path, contents));
        log.push(file, Change::Replace);
        Ok(())
    }

    fn remove(&self, path: &Path) -> Result<()> {
        let mut log = self.log.lock();
        let Some(file) = log.names.remove(path) else {
            return Err(Error::new(ErrorKind::NotFound, "no such file").in_file(path));
        };
        log.push(file, Change::Remove(path.to_owned()));
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path, replace: bool) -> Result<()> {
        let mut log = self.log.lock();
        let file = log.named(from)?;
        if !replace {
            log.refuse_existing(to)?;
        }
        log.names.remove(from);
        log.names.insert(to.to_owned(), file);
        log.push(file, Change::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn link(&self, from: &Path, to: &Path) -> Result<()> {
        let mut log = self.log.lock();
        let file = log.named(from)?;
        log.refuse_existing(to)?;
        log.names.insert(to.to_owned(), file);
        log.push(file, Change::Link(to.to_owned()));
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> Result<()> {
        self.log.lock().push(usize::MAX, Change::SyncDir(dir.to_owned()));
        Ok(())
    }

    fn list(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        let log = self.log.lock();
        Ok(log.names.keys().filter(|p| p.parent() == Some(dir)).cloned().collect())
    }
}

/// One open file of a [`RecordingHost`].
#[derive(Debug)]
struct RecordedFile {
    live: Arc<MemoryFile>,
    file: FileId,
    log: Arc<Mutex<Log>>,
    writable: bool,
}

impl RecordedFile {
    /// Runs one change under the log's lock. A file that was opened for reading refuses, as the
    /// host would.
    fn change(&self, run: impl FnOnce(&mut Log) -> io::Result<()>) -> io::Result<()> {
        if !self.writable {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
        run(&mut self.log.lock())
    }

    fn synced(&self, purpose: Option<&'static str>) -> io::Result<()> {
        let time = {
            let mut log = self.log.lock();
            log.push_for(self.file, Change::Sync, purpose);
            log.sync_time
        };
        if !time.is_zero() {
            std::thread::sleep(time);
        }
        Ok(())
    }

    /// Records the sectors around `range` as they stand now; `end` as in [`Change::Write`].
    fn record_sectors(&self, log: &mut Log, range: Range<u64>, end: u64) {
        let sectors = range.start / SECTOR * SECTOR..range.end.next_multiple_of(SECTOR);
        let mut data = vec![0; (sectors.end - sectors.start) as usize];
        self.live.read_padded(sectors.start, &mut data);
        log.push(self.file, Change::Write { at: sectors.start, data: data.into(), end });
    }
}

impl Storage for RecordedFile {
    fn len(&self) -> io::Result<u64> {
        self.live.len()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        self.live.read_at(at, buf)
    }

    fn write_at(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.change(|log| {
            self.live.write_at(at, data)?;
            if !data.is_empty() {
                let end = at + data.len() as u64;
                self.record_sectors(log, at..end, end);
            }
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(|log| {
            self.live.set_len(len)?;
            log.push(self.file, Change::SetLen(len));
            Ok(())
        })
    }

    fn punch_hole(&self, at: u64, len: u64) -> io::Result<()> {
        self.change(|log| {
            let file_end = self.live.len()?;
            let end = at.saturating_add(len).min(file_end);
            if at >= end {
                return Ok(());
            }
            self.live.punch_hole(at, len)?;
            // Sectors cut at an edge are kept as they stand, like those of a write.
            let whole_end =
                if end == file_end { end.next_multiple_of(SECTOR) } else { end / SECTOR * SECTOR };
            let whole = at.next_multiple_of(SECTOR)..whole_end;
            if whole.start >= whole.end {
                self.record_sectors(log, at..end, 0);
                return Ok(());
            }
            if at < whole.start {
                self.record_sectors(log, at..whole.start, 0);
            }
            log.push(self.file, Change::Punch(whole.clone()));
            if whole.end < end {
                self.record_sectors(log, whole.end..end, 0);
            }
            Ok(())
        })
    }

    fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        self.change(|log| {
            let longer = at + len > self.live.len()?;
            self.live.allocate(at, len)?;
            // What is reserved inside the file changes nothing that a crash could show.
            if longer {
                log.push(self.file, Change::Grow(at + len));
            }
            Ok(())
        })
    }

    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        self.live.next_data(at)
    }

    /// Shared blocks are recorded as what they read as, which a crash leaves like any other write.
    fn share_from(&self, at: u64, from: &dyn Storage, from_at: u64, len: u64) -> io::Result<bool> {
        if !self.log.lock().sharing {
            return Ok(false);
        }
        let mut data = vec![0; len as usize];
        from.read_at(from_at, &mut data)?;
        self.write_at(at, &data).map(|()| true)
    }

    fn sync(&self) -> io::Result<()> {
        self.synced(None)
    }

    fn sync_for(&self, what: &'static str) -> io::Result<()> {
        self.synced(Some(what))
    }

    fn allocated(&self) -> io::Result<u64> {
        self.live.allocated()
    }

    fn path(&self) -> &Path {
        self.live.path()
    }

    fn writable(&self) -> bool {
        self.writable
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        self.live.identity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorder(bytes: &[u8]) -> (Arc<RecordingHost>, Arc<dyn Storage>) {
        let host = MemoryHost::new();
        host.insert(MemoryFile::new("/a", bytes));
        let recorder = RecordingHost::over(&host);
        let file = recorder.open(Path::new("/a"), Access::Write).unwrap();
        (recorder, file)
    }

    #[test]
    fn a_partial_write_is_kept_as_the_sector_it_was_merged_into() {
        let (recorder, file) = recorder(&[1; 1024]);
        file.write_at(500, &[2; 20]).unwrap();
        let ops = recorder.recording();
        let [Op { change: Change::Write { at: 0, data, end: 520 }, .. }] = ops.ops() else {
            panic!("{ops:?}")
        };
        assert_eq!((data.len(), data[499], data[500], data[519], data[520]), (1024, 1, 2, 2, 1));
    }

    #[test]
    fn a_punch_with_odd_edges_is_two_writes_around_whole_sectors() {
        let (recorder, file) = recorder(&[1; 4096]);
        file.punch_hole(100, 2000).unwrap();
        let ops = recorder.recording();
        assert_eq!(ops.ops().len(), 3);
        let Change::Punch(whole) = &ops.ops()[1].change else { panic!("{ops:?}") };
        assert_eq!(*whole, 512..2048);
    }

    #[test]
    fn a_punch_reaches_past_the_end_only_in_name() {
        let (recorder, file) = recorder(&[1; 1000]);
        file.punch_hole(512, u64::MAX - 512).unwrap();
        assert_eq!(file.len().unwrap(), 1000);
        let ops = recorder.recording();
        let Change::Punch(whole) = &ops.ops()[0].change else { panic!("{ops:?}") };
        assert_eq!(*whole, 512..1024);
    }

    #[test]
    fn a_file_opened_for_reading_refuses_changes() {
        let (recorder, _) = recorder(&[1; 1024]);
        let file = recorder.open(Path::new("/a"), Access::Read).unwrap();
        assert!(!file.writable() && file.write_at(0, &[0]).is_err() && file.set_len(0).is_err());
        assert_eq!(recorder.position(), 0);
    }

    #[test]
    fn functions_are_told_from_their_symbols() {
        for symbol in [
            "flatdisk::formats::vhd::blocks::SparseMap::write_out",
            "<flatdisk::formats::vhd::Map as flatdisk::disk::map::BlockMap>::write_out",
            "flatdisk::formats::vhd::{impl#1}::write_out::{closure#0}",
            "flatdisk::formats::vhd::write_out<flatdisk::formats::vhd::take::{closure_env#0}>",
            "flatdisk::formats::write_out::{{closure}}",
        ] {
            assert_eq!(function(symbol), "write_out");
        }
    }

    #[test]
    fn the_original_host_is_left_alone() {
        let host = MemoryHost::new();
        host.insert(MemoryFile::new("/a", &[1; 512]));
        let recorder = RecordingHost::over(&host);
        recorder.open(Path::new("/a"), Access::Write).unwrap().write_at(0, &[9]).unwrap();
        assert_eq!(host.file(Path::new("/a")).unwrap().to_vec(), [1; 512]);
        assert_eq!(recorder.now().file(Path::new("/a")).unwrap().to_vec()[0], 9);
    }
}
