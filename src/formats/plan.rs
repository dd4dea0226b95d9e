//! Changes to an image's files that nobody has open: planned first, then shown or carried out.
//!
//! A driver puts together [`Steps`] in the order in which they must happen, with a [`Steps::sync`]
//! wherever one must be durable before the next begins. Whoever asked for them shows them, or carries
//! them out with the code below, which is the same for all formats and all changes: repairs, other
//! sizes, compaction.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use super::moving::{Copies, Copy};
use crate::codec;
use crate::disk::sync_file;
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::storage::{Host, Storage};

/// Bytes of memory beyond which steps are better carried out before there are more.
const MAX_BYTES: usize = 32 << 20;
/// Bytes that are filled at once.
const FILLED: u64 = 1 << 20;

#[derive(Debug, Clone)]
enum Action {
    Write { at: u64, data: Vec<u8>, what: String },
    Fill { range: Range<u64>, byte: u8, what: String },
    Copy { from: Range<u64>, to: u64, what: String },
    Punch { range: Range<u64>, what: String },
    SetLen { len: u64, what: String },
    Sync,
}

/// A change of which files there are. Durable when it is done, as one step.
#[derive(Debug, Clone)]
enum Whole {
    Create { path: PathBuf, len: u64, parts: Vec<(u64, Vec<u8>)>, what: String },
    Replace { path: PathBuf, contents: Vec<u8>, what: String },
    Remove { path: PathBuf, what: String },
}

#[derive(Debug, Clone)]
enum Step {
    Inside(Arc<dyn Storage>, Action),
    Whole(Arc<dyn Host>, Whole),
}

/// Changes in order. See the module's documentation.
#[derive(Debug, Default)]
pub struct Steps {
    steps: Vec<Step>,
    /// Memory that the steps take, in bytes.
    bytes: usize,
}

impl Steps {
    /// No steps yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether nothing is to be done.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Whether what does not have to happen at once had better wait.
    pub fn is_full(&self) -> bool {
        self.bytes >= MAX_BYTES
    }

    /// Writes `data` at byte `at`; `what` names the structure.
    pub fn write(
        &mut self,
        file: &Arc<dyn Storage>,
        at: u64,
        data: Vec<u8>,
        what: impl Into<String>,
    ) {
        self.bytes += data.len();
        self.push(file, Action::Write { at, data, what: what.into() });
    }

    /// Fills a range with one value.
    pub fn fill(
        &mut self,
        file: &Arc<dyn Storage>,
        range: Range<u64>,
        byte: u8,
        what: impl Into<String>,
    ) {
        self.push(file, Action::Fill { range, byte, what: what.into() });
    }

    /// Copies the bytes of a range that lies inside the file to byte `to`. The ranges do not overlap.
    pub fn copy(
        &mut self,
        file: &Arc<dyn Storage>,
        from: Range<u64>,
        to: u64,
        what: impl Into<String>,
    ) {
        self.push(file, Action::Copy { from, to, what: what.into() });
    }

    /// Makes a range read as zeroes and gives its space back.
    pub fn punch(&mut self, file: &Arc<dyn Storage>, range: Range<u64>, what: impl Into<String>) {
        self.push(file, Action::Punch { range, what: what.into() });
    }

    /// Cuts or extends the file.
    pub fn set_len(&mut self, file: &Arc<dyn Storage>, len: u64, what: impl Into<String>) {
        self.push(file, Action::SetLen { len, what: what.into() });
    }

    /// Makes the steps so far that change this file, if there are any, durable before the next one
    /// begins. The last ones are made durable by carrying the steps out.
    pub fn sync(&mut self, file: &Arc<dyn Storage>) {
        let last = self.steps.iter().rev().find_map(|step| match step {
            Step::Inside(other, action) if Arc::ptr_eq(other, file) => Some(action),
            _ => None,
        });
        if last.is_some_and(|action| !matches!(action, Action::Sync)) {
            self.push(file, Action::Sync);
        }
    }

    /// Makes a file of `len` bytes that holds `parts`, each at its place, and zeroes elsewhere.
    pub fn create(
        &mut self,
        host: &Arc<dyn Host>,
        path: PathBuf,
        len: u64,
        parts: Vec<(u64, Vec<u8>)>,
        what: impl Into<String>,
    ) {
        self.bytes += parts.iter().map(|(_, data)| data.len()).sum::<usize>();
        self.whole(host, Whole::Create { path, len, parts, what: what.into() });
    }

    /// Replaces the contents of a small file.
    pub fn replace(
        &mut self,
        host: &Arc<dyn Host>,
        path: PathBuf,
        contents: Vec<u8>,
        what: impl Into<String>,
    ) {
        self.bytes += contents.len();
        self.whole(host, Whole::Replace { path, contents, what: what.into() });
    }

    /// Removes a file.
    pub fn remove(&mut self, host: &Arc<dyn Host>, path: PathBuf, what: impl Into<String>) {
        self.whole(host, Whole::Remove { path, what: what.into() });
    }

    fn push(&mut self, file: &Arc<dyn Storage>, action: Action) {
        self.bytes += size_of::<Step>();
        self.steps.push(Step::Inside(file.clone(), action));
    }

    fn whole(&mut self, host: &Arc<dyn Host>, whole: Whole) {
        self.bytes += size_of::<Step>();
        self.steps.push(Step::Whole(host.clone(), whole));
    }

    /// Appends other steps.
    pub fn append(&mut self, later: Self) {
        self.bytes += later.bytes;
        self.steps.extend(later.steps);
    }

    /// The changes, in order.
    pub fn changes(&self) -> Vec<Change> {
        self.steps.iter().filter_map(Step::describe).collect()
    }

    /// Bytes that are going to be copied.
    pub fn copied(&self) -> u64 {
        let copied = |step: &Step| match step {
            Step::Inside(_, Action::Copy { from, .. }) => from.end - from.start,
            _ => 0,
        };
        self.steps.iter().map(copied).sum()
    }

    /// Carries the steps out; durable on return. `progress` gets the bytes copied, and is not asked
    /// whether to go on.
    pub fn carry_out(&self, progress: &dyn Progress) -> Result<()> {
        // Copies that do not depend on one another are done together.
        let mut together: Option<(&Arc<dyn Storage>, Copies<'_>)> = None;
        for step in &self.steps {
            if let Step::Inside(file, Action::Copy { from, to, what }) = step {
                let copy = Copy { from: from.clone(), to: *to, what };
                if let Some((same, copies)) = &mut together
                    && Arc::ptr_eq(same, file)
                    && copies.add(&copy)
                {
                    continue;
                }
                if let Some((file, copies)) = together.replace((file, Copies::of(copy))) {
                    copies.carry_out(file, progress)?;
                }
                continue;
            }
            if let Some((file, copies)) = together.take() {
                copies.carry_out(file, progress)?;
            }
            step.carry_out()?;
        }
        if let Some((file, copies)) = together {
            copies.carry_out(file, progress)?;
        }
        let mut done: Vec<&Arc<dyn Storage>> = Vec::new();
        for step in self.steps.iter().rev() {
            let Step::Inside(file, action) = step else { continue };
            if !done.iter().any(|other| Arc::ptr_eq(other, file)) {
                done.push(file);
                if !matches!(action, Action::Sync) {
                    sync_file(&**file)?;
                }
            }
        }
        Ok(())
    }
}

impl Step {
    fn carry_out(&self) -> Result<()> {
        let (file, action) = match self {
            Self::Whole(host, whole) => return whole.carry_out(&**host),
            Self::Inside(file, action) => (file, action),
        };
        let failed = |doing: &'static str, at: u64| {
            move |e: std::io::Error| Error::io(doing, &e).in_file(file.path()).at(at)
        };
        match action {
            Action::Write { at, data, what } => codec::write_all(&**file, *at, data, what),
            Action::Fill { range, byte, what } => fill(&**file, range, *byte, what),
            Action::Copy { from, to, what } => {
                Copies::of(Copy { from: from.clone(), to: *to, what }).carry_out(file, &())
            }
            Action::Punch { range, .. } => file
                .punch_hole(range.start, range.end - range.start)
                .map_err(failed("giving space back", range.start)),
            Action::SetLen { len, .. } => {
                file.set_len(*len).map_err(failed("setting the file's length", *len))
            }
            Action::Sync => sync_file(&**file),
        }
    }

    fn describe(&self) -> Option<Change> {
        let (file, action) = match self {
            Self::Whole(_, whole) => return Some(whole.describe()),
            Self::Inside(file, action) => (file, action),
        };
        let (action, offset, length, what) = match action {
            Action::Write { at, data, what } => ("write", *at, data.len() as u64, what),
            Action::Fill { range, what, .. } => {
                ("write", range.start, range.end - range.start, what)
            }
            Action::Copy { from, to, what } => ("write", *to, from.end - from.start, what),
            Action::Punch { range, what } => ("punch", range.start, range.end - range.start, what),
            Action::SetLen { len, what } => ("resize", *len, 0, what),
            Action::Sync => return None,
        };
        let file = file.path().to_owned();
        Some(Change { action, file, offset, length, what: what.clone() })
    }
}

impl Whole {
    fn carry_out(&self, host: &dyn Host) -> Result<()> {
        let dir = |path: &Path| path.parent().unwrap_or(Path::new("")).to_owned();
        match self {
            Self::Create { path, len, parts, what } => {
                let file = host.create(path)?;
                file.set_len(*len)
                    .map_err(|e| Error::io("extend", &e).in_file(path))
                    .and_then(|()| {
                        parts
                            .iter()
                            .try_for_each(|(at, data)| codec::write_all(&*file, *at, data, what))?;
                        sync_file(&*file)?;
                        host.sync_dir(&dir(path))
                    })
                    .inspect_err(|_| {
                        // What is left of it would be in the way of the next attempt.
                        let _ = host.remove(path);
                    })
            }
            Self::Replace { path, contents, .. } => host.replace(path, contents),
            Self::Remove { path, .. } => match host.remove(path) {
                Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
                _ => host.sync_dir(&dir(path)),
            },
        }
    }

    fn describe(&self) -> Change {
        let (action, file, length, what) = match self {
            Self::Create { path, len, what, .. } => ("create", path, *len, what),
            Self::Replace { path, contents, what } => {
                ("replace", path, contents.len() as u64, what)
            }
            Self::Remove { path, what } => ("remove", path, 0, what),
        };
        Change { action, file: file.clone(), offset: 0, length, what: what.clone() }
    }
}

/// Fills a range, piece by piece.
fn fill(file: &dyn Storage, range: &Range<u64>, byte: u8, what: &str) -> Result<()> {
    let buf = vec![byte; FILLED.min(range.end - range.start) as usize];
    for at in range.clone().step_by(FILLED as usize) {
        codec::write_all(file, at, &buf[..FILLED.min(range.end - at) as usize], what)?;
    }
    Ok(())
}

/// One change, as it is shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// `write`, `punch`, `resize`, `create`, `replace` or `remove`.
    pub action: &'static str,
    /// The file.
    pub file: PathBuf,
    /// First byte; the new length for `resize`.
    pub offset: u64,
    /// Number of bytes; 0 for `resize` and `remove`.
    pub length: u64,
    /// Which structure, or why.
    pub what: String,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (file, offset, length) = (self.file.display(), self.offset, self.length);
        match self.action {
            "resize" => write!(f, "{file}: set the length to {offset} bytes: {}", self.what),
            "create" | "replace" => {
                write!(f, "{file}: {}, {length} bytes: {}", self.action, self.what)
            }
            "remove" => write!(f, "{file}: remove: {}", self.what),
            action => write!(f, "{file}: {action} {length} bytes at {offset:#x}: {}", self.what),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::{MemoryFile, MemoryHost};

    #[test]
    fn changes_read_as_sentences() {
        let file: Arc<dyn Storage> = MemoryFile::new("a.vhd", &[]);
        let mut steps = Steps::new();
        steps.write(&file, 512, vec![0; 4], "the footer copy");
        steps.sync(&file);
        steps.set_len(&file, 1024, "nothing uses the rest");
        let shown: Vec<_> = steps.changes().iter().map(Change::to_string).collect();
        assert_eq!(
            shown,
            [
                "a.vhd: write 4 bytes at 0x200: the footer copy",
                "a.vhd: set the length to 1024 bytes: nothing uses the rest"
            ]
        );
        steps.carry_out(&()).unwrap();
        assert_eq!(file.len().unwrap(), 1024);
    }

    #[test]
    fn a_file_that_cannot_be_completed_is_not_left_behind() {
        let files = MemoryHost::new();
        let host: Arc<dyn Host> = files.clone();
        let path = PathBuf::from("/x");
        let mut steps = Steps::new();
        steps.create(&host, path.clone(), 10, vec![(2, vec![5; 3])], "an extent");
        steps.carry_out(&()).unwrap();
        assert_eq!(files.file(&path).unwrap().to_vec(), [0, 0, 5, 5, 5, 0, 0, 0, 0, 0]);
        let mut gone = Steps::new();
        gone.remove(&host, path.clone(), "an extent");
        gone.carry_out(&()).unwrap();
        gone.carry_out(&()).unwrap();
        assert!(files.file(&path).is_none());
    }
}
