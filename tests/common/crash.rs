//! Crash states of a workload, each reopened and compared sector by sector with what may be there.

use std::collections::HashSet;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use flatdisk::disk::Disk;
use flatdisk::storage::crash::{Choice, CrashPoint, Fate};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::recording::{Recording, RecordingHost};
use flatdisk::storage::{Access, Host};

use super::history::{History, Legal, SECTOR, Sectors, sector};
use super::images::Kind;
use super::workload::{Runner, Step, script, wide_script};

/// Stamps of what recovery writes begin here.
const RECOVERY_STAMP: u32 = 0x0100_0000;

/// What a run looked at.
#[derive(Debug, Default, Clone)]
pub struct Tally {
    /// Crash states of workloads, by the digest of all files' bytes.
    pub states: HashSet<u64>,
    /// Crash states of recoveries from crash states, likewise.
    pub recoveries: HashSet<u64>,
}

/// Crash states looked at of one workload.
const STATES_PER_ROUND: usize = 400;

/// Checks `budget` distinct crash states of workloads on `kind`, or as many as there are to be found;
/// what is wrong with the first bad one.
pub fn run(kind: &dyn Kind, seed: u64, budget: usize) -> Result<Tally, String> {
    let created = MemoryHost::new();
    kind.create(&created).map_err(|e| format!("{}: create: {e}", kind.name()))?;
    let rounds = budget.div_ceil(STATES_PER_ROUND).max(2);
    let mut tally = Tally::default();
    for round in 0..rounds * 4 + 16 {
        if tally.states.len() >= budget {
            break;
        }
        let seed = seed.wrapping_add(round as u64 * 0x9e37_79b9);
        let share = budget.div_ceil(rounds);
        run_once(kind, &created, seed, round, share, &mut tally).map_err(|e| {
            format!("{}, round {round} of a run from the printed seed:\n{e}", kind.name())
        })?;
    }
    Ok(tally)
}

fn run_once(
    kind: &dyn Kind,
    created: &Arc<MemoryHost>,
    seed: u64,
    round: usize,
    budget: usize,
    tally: &mut Tally,
) -> Result<(), String> {
    let mut random = fastrand::Rng::with_seed(seed);
    let (history, recording) = workload(kind, RecordingHost::over(created), &mut random, round)?;
    let Tally { states, recoveries } = tally;
    let mut legal = LegalHere::new(&history);
    let mut check = |at: usize, state: &Arc<MemoryHost>, seed: u64| {
        let again = if seed.is_multiple_of(16) { 6 } else { 0 };
        check_state(kind, state, legal.at(at), seed, again, recoveries)
    };
    each_state(&recording, &mut random, budget, states, |at| history.flushes_before(at), &mut check)
}

/// What a history allows, at one position after the other.
struct LegalHere<'a> {
    history: &'a History,
    here: Option<(usize, Legal)>,
}

impl<'a> LegalHere<'a> {
    fn new(history: &'a History) -> Self {
        Self { history, here: None }
    }

    fn at(&mut self, position: usize) -> &Legal {
        if self.here.as_ref().is_none_or(|(here, _)| *here != position) {
            self.here = Some((position, self.history.legal_at(position)));
        }
        &self.here.as_ref().expect("set above").1
    }
}

/// Runs a workload on a recorded image; what was written when, and the recording.
pub fn workload(
    kind: &dyn Kind,
    recorder: Arc<RecordingHost>,
    random: &mut fastrand::Rng,
    round: usize,
) -> Result<(History, Recording), String> {
    record(kind, recorder.clone(), |runner| {
        // Every fourth round is one of threads.
        if round % 4 == 3 {
            recorder.set_sync_time(Duration::from_micros(random.u64(50..300)));
            runner
                .run_threads(random.u64(..), 3, 12, random.bool())
                .map_err(|e| format!("a threaded workload failed: {e}"))?;
        } else {
            let block = runner.disk.geometry().block_size;
            let size = runner.disk.size();
            let steps = match kind.stride() {
                Some(stride) => wide_script(random, size, stride),
                None => script(random, size, block, 14 + round % 20),
            };
            run_steps(runner, &steps)?;
        }
        compare(&runner.disk, &runner.history.lock().expected())
            .map_err(|e| format!("wrong without any crash: {e}"))?;
        match random.bool() {
            true => runner.close().map_err(|e| format!("close failed: {e}")),
            false => Ok(()),
        }
    })
}

/// Records what `work` does to an image.
pub fn record(
    kind: &dyn Kind,
    recorder: Arc<RecordingHost>,
    work: impl FnOnce(&mut Runner<'_>) -> Result<(), String>,
) -> Result<(History, Recording), String> {
    let host: Arc<dyn Host> = recorder.clone();
    let disk = kind.open(&host, Access::Read).map_err(|e| e.to_string())?;
    let history = History::new(contents(&disk)?);
    drop(disk);
    let mut runner = Runner::open(kind, host, recorder.clone(), history)
        .map_err(|e| format!("open after create: {e}"))?;
    work(&mut runner)?;
    Ok((runner.history.into_inner(), recorder.recording()))
}

/// Runs operations that must succeed.
pub fn run_steps(runner: &mut Runner<'_>, steps: &[Step]) -> Result<(), String> {
    steps.iter().try_for_each(|step| runner.run(step).map_err(|e| format!("{step:?} failed: {e}")))
}

/// Checks one state of a position; the number is a seed for it.
pub type Check<'c> = dyn FnMut(usize, &Arc<MemoryHost>, u64) -> Result<(), String> + 'c;

/// Calls `check` for states of a recording until `budget` more are `known`. A known state is looked at
/// again only where something else was promised (`epoch` of a position).
pub fn each_state(
    recording: &Recording,
    random: &mut fastrand::Rng,
    budget: usize,
    known: &mut HashSet<u64>,
    epoch: impl Fn(usize) -> usize,
    check: &mut Check<'_>,
) -> Result<(), String> {
    if budget == 0 {
        return Ok(());
    }
    // Draw first, then walk: points can only be visited in order.
    let mut candidates: Vec<(usize, Choice)> = Vec::new();
    let mut point = CrashPoint::start(recording);
    loop {
        let mut choices = point.choices(random);
        let count = point.pending().len();
        if count > 1 {
            choices.extend((0..count.min(12)).map(|_| Choice::Random(random.u64(..))));
        }
        candidates.extend(choices.into_iter().map(|choice| (point.at(), choice)));
        if !point.advance() {
            break;
        }
    }
    random.shuffle(&mut candidates);
    // Some turn out to be the same state.
    candidates.truncate(budget + budget / 3);
    candidates.sort_by_key(|candidate| candidate.0);
    let enough = known.len() + budget;
    let mut seen = HashSet::new();
    let mut point = CrashPoint::start(recording);
    for (at, choice) in candidates {
        while point.at() < at && point.advance() {}
        let fates = point.fates(choice);
        let state = point.state(&fates);
        let digest = state.digest();
        if known.len() >= enough || !seen.insert((epoch(at), digest)) {
            continue;
        }
        known.insert(digest);
        let seed = random.u64(..);
        if let Err(error) = check(at, &state, seed) {
            let mut again = |fates: &[Fate]| check(at, &point.state(fates), seed).err();
            let fates = simplify(&point, fates, |fates| again(fates).is_some());
            let error = again(&fates).unwrap_or(error);
            return Err(format!("{error}\n{}drawn as {choice}", point.describe(&fates)));
        }
    }
    Ok(())
}

/// Fewest losses that still fail: what is kept explains nothing.
fn simplify(
    point: &CrashPoint<'_>,
    mut fates: Vec<Fate>,
    mut fails: impl FnMut(&[Fate]) -> bool,
) -> Vec<Fate> {
    for index in 0..point.pending().len() {
        let before = std::mem::replace(&mut fates[index], Fate::Kept);
        if before != Fate::Kept && !fails(&fates) {
            fates[index] = before;
        }
    }
    fates
}

/// Opens a crash state, compares it, writes to it, closes and compares again. `again` crash states
/// of that recovery are checked in turn.
pub fn check_state(
    kind: &dyn Kind,
    state: &Arc<MemoryHost>,
    legal: &Legal,
    seed: u64,
    again: usize,
    recoveries: &mut HashSet<u64>,
) -> Result<(), String> {
    let (history, recording) = recover(kind, RecordingHost::over(state), legal, seed)?;
    let mut random = fastrand::Rng::with_seed(seed);
    let mut check = |at: usize, state: &Arc<MemoryHost>, seed: u64| {
        recover(kind, RecordingHost::over(state), &history.legal_at(at), seed)
            .map(drop)
            .map_err(|e| format!("after a second crash during recovery from the first: {e}"))
    };
    let epoch = |at| history.flushes_before(at);
    each_state(&recording, &mut random, again, recoveries, epoch, &mut check)
}

/// Opens and checks what a crash left, writes to it, closes and checks again. Returns the history of
/// this recovery, and its recording.
pub fn recover(
    kind: &dyn Kind,
    recorder: Arc<RecordingHost>,
    legal: &Legal,
    seed: u64,
) -> Result<(History, Recording), String> {
    let checked = catch_unwind(AssertUnwindSafe(|| check_open(kind, recorder, legal, seed)));
    checked.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        Err(format!("panicked: {}", text.unwrap_or_default()))
    })
}

fn check_open(
    kind: &dyn Kind,
    recorder: Arc<RecordingHost>,
    legal: &Legal,
    seed: u64,
) -> Result<(History, Recording), String> {
    let mut random = fastrand::Rng::with_seed(seed);
    let host: Arc<dyn Host> = recorder.clone();
    let disk = kind.open(&host, Access::Read).map_err(|e| format!("opening to read: {e}"))?;
    let found = compare(&disk, legal).map_err(|e| format!("reading: {e}"))?;
    drop(disk);
    let mut errors = kind.errors(&host).map_err(|e| format!("checking: {e}"))?;
    // While a VHD's footer moves, its copy counts. A region table that was bad before stays so until the
    // first write.
    errors.retain(|error| !error.contains("footer") && !error.contains("region table"));
    if !errors.is_empty() {
        return Err(format!("the check after the crash finds: {}", errors.join("; ")));
    }
    let history = History::new(found);
    let runner = Runner::open(kind, host.clone(), recorder.clone(), history)
        .map_err(|e| format!("opening to write: {e}"))?;
    if recorder.position() != 0 {
        return Err("opening to read changed the image".into());
    }

    // Recovery happens with the first write.
    runner.stamp_from(RECOVERY_STAMP + random.u32(..1 << 20));
    let block = runner.disk.geometry().block_size;
    let write = script(&mut random, runner.disk.size(), block, 50)
        .into_iter()
        .find(|step| matches!(step, Step::Write { .. }))
        .unwrap_or(Step::Write { at: 0, len: SECTOR });
    runner.apply(&write).map_err(|e| format!("first {write:?} after the crash: {e}"))?;
    // What is read before the close is read after it, too, but not from memory.
    if random.u8(..4) == 0 {
        compare(&runner.disk, &runner.history.lock().expected())
            .map_err(|e| format!("after {write:?}: {e}"))?;
    }
    runner.apply(&Step::Flush).map_err(|e| format!("flush after {write:?}: {e}"))?;
    runner.close().map_err(|e| format!("close after {write:?}: {e}"))?;
    let history = runner.history.into_inner();
    let disk = kind.open(&host, Access::Read).map_err(|e| format!("opening once more: {e}"))?;
    compare(&disk, &history.expected())
        .map_err(|e| format!("after {write:?}, close and reopening: {e}"))?;
    drop(disk);
    let errors = kind.errors(&host).map_err(|e| format!("checking: {e}"))?;
    if !errors.is_empty() {
        return Err(format!("the check after recovery finds: {}", errors.join("; ")));
    }
    Ok((history, recorder.recording()))
}

/// Fails unless the disk holds what it may, and zeroes elsewhere; what it holds.
pub fn compare(disk: &Disk, legal: &Legal) -> Result<Sectors, String> {
    let found = read(disk, legal)?;
    let mut pos = 0;
    while let Some(data) = disk.next_data(pos).map_err(|e| e.to_string())? {
        for part in legal.untouched(data.start / SECTOR..data.end.div_ceil(SECTOR)) {
            in_pieces(disk, part, |piece, bytes| {
                let mut sectors = piece.zip(bytes.chunks(SECTOR as usize));
                sectors.try_for_each(|(number, bytes)| legal.check(number, bytes).map(drop))
            })?;
        }
        pos = data.end;
    }
    Ok(found)
}

/// The sectors that `legal` tells of, after making sure that each is what it may be.
pub fn read(disk: &Disk, legal: &Legal) -> Result<Sectors, String> {
    let mut found = Vec::with_capacity(legal.0.len());
    for run in legal.runs() {
        in_pieces(disk, run, |piece, bytes| legal.check_run(piece, bytes, &mut found))?;
    }
    Ok(found.into_iter().collect())
}

/// Reads sectors in pieces of 128 KiB.
fn in_pieces(
    disk: &Disk,
    sectors: Range<u64>,
    mut see: impl FnMut(Range<u64>, &[u8]) -> Result<(), String>,
) -> Result<(), String> {
    let mut pos = sectors.start;
    let mut buf = vec![0; (sectors.end - sectors.start).min(256) as usize * SECTOR as usize];
    while pos < sectors.end {
        let end = sectors.end.min(pos + 256);
        let buf = &mut buf[..((end - pos) * SECTOR) as usize];
        disk.read_at(pos * SECTOR, buf).map_err(|e| e.to_string())?;
        see(pos..end, buf)?;
        pos = end;
    }
    Ok(())
}

/// Bytes of a disk that are stored, as far as the files' holes tell.
pub fn stored(disk: &Disk) -> Result<u64, String> {
    let (mut pos, mut sum) = (0, 0);
    while let Some(data) = disk.next_data(pos).map_err(|e| e.to_string())? {
        sum += data.end - data.start;
        pos = data.end;
    }
    Ok(sum)
}

/// All sectors of a disk that are not zeroes.
pub fn contents(disk: &Disk) -> Result<Sectors, String> {
    let mut all = Sectors::new();
    let mut pos = 0;
    while let Some(data) = disk.next_data(pos).map_err(|e| e.to_string())? {
        let first = data.start / SECTOR;
        let mut buf = vec![0; (data.end.next_multiple_of(SECTOR) - first * SECTOR) as usize];
        disk.read_at(first * SECTOR, &mut buf).map_err(|e| e.to_string())?;
        let sectors = (first..).zip(buf.chunks(SECTOR as usize));
        all.extend(sectors.map(|(n, bytes)| (n, sector(bytes))).filter(|(_, s)| s.is_some()));
        pos = data.end;
    }
    Ok(all)
}
