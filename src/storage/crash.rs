//! What a crash may leave of a [`Recording`].
//!
//! A [`CrashPoint`] stands after some operation. Of every file, what came before the file's last
//! completed sync is there; each later operation is *pending*: it may have survived, been lost, or
//! been torn at sectors, independently of all others. A [`Choice`] says which, and
//! [`CrashPoint::state`] builds the files. Building costs a copy of the chunks that pending
//! operations touch.
//!
//! Data may survive without the length that covers it, and a length without the data. Names behave
//! likewise: created and removed ones are pending until their directory was synced.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::memory::{Contents, MemoryFile, MemoryHost};
use super::recording::{Change, FileId, Op, Recording, SECTOR};

/// What became of one pending operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fate {
    /// No trace of it.
    Lost,
    /// All of it.
    Kept,
    /// Some of its sectors: they are counted in 64 equal runs, a bit each.
    Torn {
        /// Which runs survived.
        runs: u64,
        /// Whether the file grew.
        grown: bool,
    },
}

/// Which pending operations survive. Positions count pending operations from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Nothing.
    None,
    /// Everything.
    All,
    /// Only the operation at this position.
    Only(usize),
    /// All but the operation at this position.
    Without(usize),
    /// The writes, but no change of length.
    DataOnly,
    /// The changes of length, but no data.
    LengthOnly,
    /// Only what belongs to this file.
    OnlyFile(FileId),
    /// All but what belongs to this file.
    WithoutFile(FileId),
    /// The newest operation torn; the others all there or all lost.
    TornLast {
        /// Which runs of it survived.
        runs: u64,
        /// Whether the other operations did.
        rest: bool,
    },
    /// Each operation decided by chance.
    Random(u64),
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// A moment of a recording at which everything stops.
#[derive(Debug)]
pub struct CrashPoint<'a> {
    recording: &'a Recording,
    /// Operations before the crash.
    at: usize,
    durable: Vec<Contents>,
    names: BTreeMap<PathBuf, FileId>,
    pending: Vec<usize>,
}

impl<'a> CrashPoint<'a> {
    /// The moment before the first operation.
    pub fn start(recording: &'a Recording) -> Self {
        let seen = &recording.seen;
        Self {
            recording,
            at: 0,
            durable: seen.iter().map(|file| file.initial.clone()).collect(),
            names: recording.at_start.clone(),
            pending: Vec::new(),
        }
    }

    /// How many operations have happened.
    pub fn at(&self) -> usize {
        self.at
    }

    /// Indices of the pending operations, oldest first.
    pub fn pending(&self) -> &[usize] {
        &self.pending
    }

    fn op(&self, index: usize) -> &'a Op {
        &self.recording.ops[index]
    }

    /// Moves past the next operation; `false` at the end of the recording.
    pub fn advance(&mut self) -> bool {
        let Some(op) = self.recording.ops.get(self.at) else { return false };
        match &op.change {
            _ if self.recording.ignored.contains(&self.at) => {}
            Change::Sync => {
                let file = op.file;
                let recording = self.recording;
                self.settle(|op| op.file == file && name(op, recording).is_none());
            }
            Change::SyncDir(dir) => {
                let recording = self.recording;
                let inside = |op: &Op| name(op, recording).is_some_and(|n| n.parent() == Some(dir));
                self.settle(inside);
            }
            Change::Replace => {
                let path = self.recording.path(op.file);
                let recording = self.recording;
                self.settle(|op| name(op, recording) == Some(path));
                self.names.insert(path.to_owned(), op.file);
            }
            _ => self.pending.push(self.at),
        }
        self.at += 1;
        true
    }

    /// Makes the pending operations that `which` picks durable.
    fn settle(&mut self, which: impl Fn(&Op) -> bool) {
        let (settled, rest): (Vec<_>, Vec<_>) =
            self.pending.iter().partition(|&&index| which(self.op(index)));
        self.pending = rest;
        for index in settled {
            let op = self.op(index);
            apply(op, Fate::Kept, &mut self.durable[op.file]);
            rename(op, self.recording, &mut self.names);
        }
    }

    /// Every choice worth trying that is not left to chance, the plainest first. Tears of the
    /// newest operation are drawn from `random`.
    pub fn choices(&self, random: &mut fastrand::Rng) -> Vec<Choice> {
        let count = self.pending.len();
        if count == 0 {
            return vec![Choice::None];
        }
        let mut choices = vec![Choice::None, Choice::All];
        for runs in [1, u64::MAX << 1, random.u64(..)] {
            choices.extend([true, false].map(|rest| Choice::TornLast { runs, rest }));
        }
        // The newest operation is what this point has and the point before had not.
        for position in (0..count).rev() {
            choices.extend([Choice::Only(position), Choice::Without(position)]);
        }
        choices.extend([Choice::DataOnly, Choice::LengthOnly]);
        let mut files: Vec<_> = self.pending.iter().map(|&index| self.op(index).file).collect();
        files.sort_unstable();
        files.dedup();
        if files.len() > 1 {
            let each = |file| [Choice::OnlyFile(file), Choice::WithoutFile(file)];
            choices.extend(files.into_iter().flat_map(each));
        }
        choices
    }

    /// What a choice means for each pending operation.
    pub fn fates(&self, choice: Choice) -> Vec<Fate> {
        let kept = |yes| if yes { Fate::Kept } else { Fate::Lost };
        let mut random = match choice {
            Choice::Random(seed) => fastrand::Rng::with_seed(seed),
            _ => fastrand::Rng::with_seed(0),
        };
        // How much survives at all differs from crash to crash.
        let survival = [0.2, 0.5, 0.8, 0.95][random.usize(..4)];
        let fate = |(position, &index): (usize, &usize)| {
            let op = self.op(index);
            let last = position + 1 == self.pending.len();
            match choice {
                Choice::None => Fate::Lost,
                Choice::All => Fate::Kept,
                Choice::Only(one) => kept(position == one),
                Choice::Without(one) => kept(position != one),
                Choice::DataOnly => match op.change {
                    Change::Write { .. } => Fate::Torn { runs: u64::MAX, grown: false },
                    Change::SetLen(_) | Change::Grow(_) => Fate::Lost,
                    _ => Fate::Kept,
                },
                Choice::LengthOnly => match op.change {
                    Change::Write { .. } => Fate::Torn { runs: 0, grown: true },
                    Change::Punch(_) => Fate::Lost,
                    _ => Fate::Kept,
                },
                Choice::OnlyFile(file) => kept(op.file == file),
                Choice::WithoutFile(file) => kept(op.file != file),
                Choice::TornLast { runs, .. } if last => Fate::Torn { runs, grown: true },
                Choice::TornLast { rest, .. } => kept(rest),
                Choice::Random(_) => match random.f64() < survival {
                    true if random.u8(..4) == 0 => {
                        Fate::Torn { runs: random.u64(..), grown: random.bool() }
                    }
                    survived => kept(survived),
                },
            }
        };
        self.pending.iter().enumerate().map(fate).collect()
    }

    /// The files as a crash with these fates leaves them.
    pub fn state(&self, fates: &[Fate]) -> Arc<MemoryHost> {
        let mut names = self.names.clone();
        let mut changed: BTreeMap<FileId, Contents> = BTreeMap::new();
        for (&index, &fate) in self.pending.iter().zip(fates) {
            if fate == Fate::Lost {
                continue;
            }
            let op = self.op(index);
            rename(op, self.recording, &mut names);
            let contents = changed.entry(op.file).or_insert_with(|| self.durable[op.file].clone());
            apply(op, fate, contents);
        }
        let host = MemoryHost::new();
        // A file may have several names.
        let mut files: BTreeMap<FileId, Arc<MemoryFile>> = BTreeMap::new();
        for (path, file) in names {
            let found = files.entry(file).or_insert_with(|| {
                let changed = changed.remove(&file);
                let mut contents = changed.unwrap_or_else(|| self.durable[file].clone());
                contents.forget_past_end();
                MemoryFile::with_contents(path.clone(), contents)
            });
            host.insert(found.named(path));
        }
        host
    }

    /// Lines that tell a person what survived.
    pub fn describe(&self, fates: &[Fate]) -> String {
        let mut text = format!(
            "crash after {} of {} operations; what is not listed is durable:\n",
            self.at,
            self.recording.ops.len()
        );
        for (&index, fate) in self.pending.iter().zip(fates) {
            let fate = match fate {
                Fate::Lost => "lost".to_owned(),
                Fate::Kept => "kept".to_owned(),
                Fate::Torn { runs, grown } => format!("torn, runs {runs:#x}, grown: {grown}"),
            };
            text += &format!("  {}: {fate}\n", self.recording.describe(index));
        }
        text
    }
}

/// The name that an operation gives or takes, which its directory makes durable.
fn name<'a>(op: &'a Op, recording: &'a Recording) -> Option<&'a Path> {
    match &op.change {
        Change::Create => Some(recording.path(op.file)),
        Change::Link(name) | Change::Rename(_, name) | Change::Remove(name) => Some(name),
        _ => None,
    }
}

fn rename(op: &Op, recording: &Recording, names: &mut BTreeMap<PathBuf, FileId>) {
    match &op.change {
        Change::Create => {
            names.insert(recording.path(op.file).to_owned(), op.file);
        }
        Change::Link(name) => {
            names.insert(name.clone(), op.file);
        }
        Change::Rename(old, new) => {
            names.remove(old);
            names.insert(new.clone(), op.file);
        }
        Change::Remove(name) => {
            names.remove(name);
        }
        _ => {}
    }
}

/// Applies what survived of an operation to its file.
fn apply(op: &Op, fate: Fate, contents: &mut Contents) {
    let (runs, grown) = match fate {
        Fate::Lost => return,
        Fate::Kept => (u64::MAX, true),
        Fate::Torn { runs, grown } => (runs, grown),
    };
    match &op.change {
        Change::Write { at, data, end } => {
            for (skip, len) in surviving(data.len() as u64, runs) {
                contents.poke(at + skip, &data[skip as usize..][..len as usize]);
            }
            if grown && contents.len() < *end {
                contents.set_len(*end);
            }
        }
        Change::Punch(range) => {
            for (skip, len) in surviving(range.end - range.start, runs) {
                contents.zero(range.start + skip..range.start + skip + len);
            }
        }
        Change::SetLen(len) => contents.set_len(*len),
        Change::Grow(len) if contents.len() < *len => contents.set_len(*len),
        _ => {}
    }
}

/// The parts of `len` bytes whose runs survived, as offset and length.
fn surviving(len: u64, runs: u64) -> impl Iterator<Item = (u64, u64)> {
    let run = (len / SECTOR).div_ceil(64).max(1) * SECTOR;
    let all = runs == u64::MAX;
    let step = if all { len.max(1) } else { run };
    (0..len.div_ceil(step))
        .filter(move |index| all || runs & (1 << index) != 0)
        .map(move |index| (index * step, step.min(len - index * step)))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::hash::Hash;

    use super::*;
    use crate::storage::recording::RecordingHost;
    use crate::storage::{Access, Host, Storage};

    const A: &str = "/d/a";
    const B: &str = "/d/b";

    fn recorder() -> (Arc<RecordingHost>, Arc<dyn Storage>, Arc<dyn Storage>) {
        let host = MemoryHost::new();
        host.insert(MemoryFile::new(A, &[0; 2048]));
        host.insert(MemoryFile::new(B, &[0; 2048]));
        let recorder = RecordingHost::over(&host);
        let open = |path| recorder.open(Path::new(path), Access::Write).unwrap();
        let (a, b) = (open(A), open(B));
        (recorder, a, b)
    }

    /// First byte of each sector of a file.
    fn sectors(host: &MemoryHost, path: &str) -> Vec<u8> {
        let bytes = host.file(Path::new(path)).unwrap().to_vec();
        bytes.chunks(SECTOR as usize).map(|sector| sector[0]).collect()
    }

    /// What `see` finds in all states of all points from operation `from` on.
    fn all_states<T: Eq + Hash>(
        recorder: &RecordingHost,
        from: usize,
        see: impl Fn(&MemoryHost) -> T,
    ) -> HashSet<T> {
        let recording = recorder.recording();
        let mut point = CrashPoint::start(&recording);
        let mut random = fastrand::Rng::with_seed(1);
        let mut found = HashSet::new();
        loop {
            if point.at() >= from {
                let mut choices = point.choices(&mut random);
                choices.extend((0..1000).map(Choice::Random));
                for choice in choices {
                    found.insert(see(&point.state(&point.fates(choice))));
                }
            }
            if !point.advance() {
                return found;
            }
        }
    }

    #[test]
    fn every_subset_of_unsynced_writes_appears() {
        let (recorder, a, _) = recorder();
        for sector in 0..3 {
            a.write_at(sector * SECTOR, &[1; 512]).unwrap();
        }
        let found = all_states(&recorder, 3, |host| sectors(host, A)[..3].to_vec());
        assert_eq!(found.len(), 8, "{found:?}");
    }

    #[test]
    fn a_large_write_tears_at_any_sector() {
        let (recorder, a, _) = recorder();
        a.write_at(0, &[1; 2048]).unwrap();
        let found = all_states(&recorder, 1, |host| sectors(host, A));
        assert_eq!(found.len(), 16, "{found:?}");
    }

    #[test]
    fn a_sync_covers_its_own_file_only() {
        let (recorder, a, b) = recorder();
        a.write_at(0, &[1; 512]).unwrap();
        b.write_at(0, &[1; 512]).unwrap();
        a.sync().unwrap();
        let found = all_states(&recorder, 3, |host| (sectors(host, A)[0], sectors(host, B)[0]));
        assert_eq!(found, HashSet::from([(1, 0), (1, 1)]));
    }

    #[test]
    fn files_are_reordered_against_each_other() {
        let (recorder, a, b) = recorder();
        a.write_at(0, &[1; 512]).unwrap();
        b.write_at(0, &[1; 512]).unwrap();
        let found = all_states(&recorder, 2, |host| (sectors(host, A)[0], sectors(host, B)[0]));
        assert!(found.contains(&(0, 1)) && found.contains(&(1, 0)), "{found:?}");
    }

    #[test]
    fn data_and_length_survive_apart() {
        let (recorder, a, _) = recorder();
        a.write_at(2048, &[1; 512]).unwrap();
        let found = all_states(&recorder, 1, |host| sectors(host, A));
        let expected = [vec![0; 4], vec![0; 5], vec![0, 0, 0, 0, 1]];
        assert_eq!(found, HashSet::from(expected));
    }

    #[test]
    fn data_past_a_lost_length_appears_with_a_later_one() {
        let (recorder, a, _) = recorder();
        a.write_at(2048, &[1; 512]).unwrap();
        a.set_len(4096).unwrap();
        let recording = recorder.recording();
        let mut point = CrashPoint::start(&recording);
        while point.advance() {}
        let torn = Fate::Torn { runs: u64::MAX, grown: false };
        assert_eq!(sectors(&point.state(&[torn, Fate::Kept]), A), [0, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(sectors(&point.state(&[torn, Fate::Lost]), A), [0; 4]);
    }

    #[test]
    fn a_sync_that_is_ignored_makes_nothing_durable() {
        let (recorder, a, _) = recorder();
        a.write_at(0, &[1; 512]).unwrap();
        a.sync().unwrap();
        let found = |ignored: &[usize]| {
            let recording = recorder.recording().without(ignored.iter().copied().collect());
            let mut point = CrashPoint::start(&recording);
            while point.advance() {}
            sectors(&point.state(&point.fates(Choice::None)), A)[0]
        };
        assert_eq!((found(&[]), found(&[1])), (1, 0));
    }

    #[test]
    fn overlapping_writes_keep_their_order() {
        let (recorder, a, _) = recorder();
        a.write_at(0, &[1; 512]).unwrap();
        a.write_at(0, &[2; 100]).unwrap();
        let edge = |host: &MemoryHost| {
            let bytes = host.file(Path::new(A)).unwrap().to_vec();
            (bytes[0], bytes[100])
        };
        // The second never comes without what it was merged into.
        assert_eq!(all_states(&recorder, 2, edge), HashSet::from([(0, 0), (1, 1), (2, 1)]));
    }

    #[test]
    fn a_cut_that_survives_takes_the_bytes_with_it() {
        let (recorder, a, _) = recorder();
        a.write_at(1536, &[1; 512]).unwrap();
        a.sync().unwrap();
        a.set_len(512).unwrap();
        a.set_len(2048).unwrap();
        let found = all_states(&recorder, 4, |host| sectors(host, A));
        let expected = [vec![0, 0, 0, 1], vec![0], vec![0; 4]];
        assert_eq!(found, HashSet::from(expected));
    }

    #[test]
    fn names_wait_for_their_directory_and_replacing_does_not() {
        let (recorder, _, _) = recorder();
        recorder.create(Path::new("/d/new")).unwrap();
        recorder.remove(Path::new(B)).unwrap();
        recorder.replace(Path::new(A), &[9; 512]).unwrap();
        let names = |host: &MemoryHost| {
            let there = |path| host.file(Path::new(path)).is_some();
            (there("/d/new"), there(B), sectors(host, A)[0])
        };
        let found = all_states(&recorder, 3, names);
        let expected = [(false, false, 9), (false, true, 9), (true, false, 9), (true, true, 9)];
        assert_eq!(found, HashSet::from(expected));
        recorder.sync_dir(Path::new("/d")).unwrap();
        assert_eq!(all_states(&recorder, 4, names), HashSet::from([(true, false, 9)]));
    }

    #[test]
    fn second_names_are_of_one_file_and_renaming_is_one_step() {
        let (recorder, _, _) = recorder();
        let [a, b, c] = [A, B, "/d/c"].map(Path::new);
        recorder.link(a, c).unwrap();
        recorder.open(c, Access::Write).unwrap().write_at(0, &[5; 512]).unwrap();
        recorder.rename(b, a, true).unwrap();
        let seen = |host: &MemoryHost| {
            [A, B, "/d/c"].map(|path| host.file(Path::new(path)).map(|f| f.to_vec()[0]))
        };
        let found = all_states(&recorder, 3, seen);
        // Without a sync of the directory the renaming may come without the link.
        let (old, new) = ([Some(0), Some(0), None], [Some(0), None, Some(5)]);
        assert!(found.contains(&old) && found.contains(&new), "{found:?}");
        assert!(found.contains(&[Some(5), Some(0), Some(5)]), "{found:?}");
        assert!(found.contains(&[Some(0), None, None]), "{found:?}");
    }

    #[test]
    fn a_replaced_file_does_not_get_what_was_written_to_the_old_one() {
        let (recorder, a, _) = recorder();
        recorder.replace(Path::new(A), &[9; 512]).unwrap();
        a.write_at(0, &[1; 512]).unwrap();
        assert_eq!(all_states(&recorder, 2, |host| sectors(host, A)), HashSet::from([vec![9]]));
    }
}
