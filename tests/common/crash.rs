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
#[derive(Debug, Default, Clone, Copy)]
pub struct Tally {
    /// Distinct crash states of workloads.
    pub states: usize,
    /// Distinct crash states of recoveries from crash states.
    pub recoveries: usize,
}

/// Checks about `budget` crash states of workloads on `kind`; what is wrong with the first bad one.
pub fn run(kind: &dyn Kind, seed: u64, budget: usize) -> Result<Tally, String> {
    let created = MemoryHost::new();
    kind.create(&created).map_err(|e| format!("{}: create: {e}", kind.name()))?;
    let rounds = budget.div_ceil(300).max(2);
    let mut tally = Tally::default();
    for round in 0..rounds {
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
    let recorder = RecordingHost::over(created);
    let initial =
        contents(&*kind.open(&forked(created), Access::Read).map_err(|e| e.to_string())?)?;
    let host: Arc<dyn Host> = recorder.clone();
    let history = History::new(initial);
    let mut runner = Runner::open(kind, host, recorder.clone(), history)
        .map_err(|e| format!("open after create: {e}"))?;
    // Every fourth round is one of threads.
    if round % 4 == 3 {
        recorder.set_sync_time(Duration::from_micros(random.u64(50..300)));
        runner
            .run_threads(seed, 3, 12, random.bool())
            .map_err(|e| format!("a threaded workload failed: {e}"))?;
    } else {
        let block = runner.disk.geometry().block_size;
        let size = runner.disk.size();
        let steps = match kind.stride() {
            Some(stride) => wide_script(&mut random, size, stride),
            None => script(&mut random, size, block, 14 + round % 20),
        };
        for step in &steps {
            runner.run(step).map_err(|e| format!("{step:?} failed: {e}"))?;
        }
    }
    compare(&runner.disk, &runner.history.lock().expected())
        .map_err(|e| format!("wrong without any crash: {e}"))?;
    if random.bool() {
        runner.close().map_err(|e| format!("close failed: {e}"))?;
    }
    let history = runner.history.into_inner();
    let recording = recorder.recording();
    let mut recover = |point: &CrashPoint<'_>, fates: &[Fate], seed: u64| {
        tally.states += 1;
        let state = point.state(fates);
        let legal = history.legal_at(point.at());
        let again = if seed.is_multiple_of(8) { 6 } else { 0 };
        check_state(kind, &state, &legal, seed, again, &mut tally.recoveries)
    };
    each_state(&recording, &mut random, budget, |at| history.flushes_before(at), &mut recover)
}

/// Checks one state; the number is a seed for it.
pub type Check<'c> = dyn FnMut(&CrashPoint<'_>, &[Fate], u64) -> Result<(), String> + 'c;

/// Calls `check` for up to `budget` distinct states of a recording. States that differ only in what
/// was promised (`epoch` of a position) are distinct.
pub fn each_state(
    recording: &Recording,
    random: &mut fastrand::Rng,
    budget: usize,
    epoch: impl Fn(usize) -> usize,
    check: &mut Check<'_>,
) -> Result<(), String> {
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
    let mut seen = HashSet::new();
    let mut point = CrashPoint::start(recording);
    for (at, choice) in candidates {
        while point.at() < at && point.advance() {}
        let fates = point.fates(choice);
        if seen.len() >= budget || !seen.insert((epoch(at), point.key(&fates))) {
            continue;
        }
        let seed = random.u64(..);
        if let Err(error) = check(&point, &fates, seed) {
            let fates = simplify(&point, fates, |fates| check(&point, fates, seed).is_err());
            let error = check(&point, &fates, seed).err().unwrap_or(error);
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

fn forked(host: &Arc<MemoryHost>) -> Arc<dyn Host> {
    RecordingHost::over(host)
}

/// Opens a crash state, compares it, writes to it, closes and compares again. `again` crash states
/// of that recovery are checked in turn.
pub fn check_state(
    kind: &dyn Kind,
    state: &Arc<MemoryHost>,
    legal: &Legal,
    seed: u64,
    again: usize,
    recoveries: &mut usize,
) -> Result<(), String> {
    let checked = catch_unwind(AssertUnwindSafe(|| check_open(kind, state, legal, seed)));
    let (before, history, recording) = checked.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        Err(format!("panicked: {}", text.unwrap_or_default()))
    })?;
    drop(before);
    let mut random = fastrand::Rng::with_seed(seed);
    let mut check = |point: &CrashPoint<'_>, fates: &[Fate], seed: u64| {
        *recoveries += 1;
        let legal = history.legal_at(point.at());
        check_state(kind, &point.state(fates), &legal, seed, 0, &mut 0)
            .map_err(|e| format!("after a second crash during recovery from the first: {e}"))
    };
    each_state(&recording, &mut random, again, |at| history.flushes_before(at), &mut check)
}

/// What was found after a crash, the history of the recovery, and its recording.
type Recovered = (Sectors, History, Recording);

fn check_open(
    kind: &dyn Kind,
    state: &Arc<MemoryHost>,
    legal: &Legal,
    seed: u64,
) -> Result<Recovered, String> {
    let mut random = fastrand::Rng::with_seed(seed);
    let recorder = RecordingHost::over(state);
    let host: Arc<dyn Host> = recorder.clone();
    let disk = kind.open(&host, Access::Read).map_err(|e| format!("opening to read: {e}"))?;
    compare(&disk, legal).map_err(|e| format!("reading: {e}"))?;
    let found = read(&disk, legal)?;
    drop(disk);
    let mut errors = kind.errors(&host).map_err(|e| format!("checking: {e}"))?;
    // While a VHD's footer moves, its copy counts.
    errors.retain(|error| !error.contains("footer"));
    if !errors.is_empty() {
        return Err(format!("the check after the crash finds: {}", errors.join("; ")));
    }
    let exactly = Legal(found.iter().map(|(n, s)| (*n, vec![s.clone()])).collect());
    let history = History::new(found.clone());
    let runner = Runner::open(kind, host.clone(), recorder.clone(), history)
        .map_err(|e| format!("opening to write: {e}"))?;
    if recorder.position() != 0 {
        return Err("opening to read changed the image".into());
    }
    compare(&runner.disk, &exactly)
        .map_err(|e| format!("opened to write it reads otherwise than opened to read: {e}"))?;

    // Recovery happens with the first write.
    runner.stamp_from(RECOVERY_STAMP + random.u32(..1 << 20));
    let block = runner.disk.geometry().block_size;
    let write = script(&mut random, runner.disk.size(), block, 50)
        .into_iter()
        .find(|step| matches!(step, Step::Write { .. }))
        .unwrap_or(Step::Write { at: 0, len: SECTOR });
    runner.apply(&write).map_err(|e| format!("first {write:?} after the crash: {e}"))?;
    compare(&runner.disk, &runner.history.lock().expected())
        .map_err(|e| format!("after {write:?}: {e}"))?;
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
    Ok((found, history, recorder.recording()))
}

/// Fails unless the disk holds what it may, and zeroes elsewhere.
pub fn compare(disk: &Disk, legal: &Legal) -> Result<(), String> {
    read(disk, legal)?;
    let mut pos = 0;
    while let Some(data) = disk.next_data(pos).map_err(|e| e.to_string())? {
        check_run(disk, data.start / SECTOR..data.end.div_ceil(SECTOR), legal, &mut |_, _| ())?;
        pos = data.end;
    }
    Ok(())
}

/// The sectors that `legal` tells of, after making sure that each is what it may be.
pub fn read(disk: &Disk, legal: &Legal) -> Result<Sectors, String> {
    let mut found = Sectors::new();
    for run in legal.runs() {
        check_run(disk, run, legal, &mut |number, bytes| {
            found.insert(number, sector(bytes));
        })?;
    }
    Ok(found)
}

/// Reads sectors in pieces of 128 KiB, checks and hands on each.
fn check_run(
    disk: &Disk,
    sectors: Range<u64>,
    legal: &Legal,
    see: &mut dyn FnMut(u64, &[u8]),
) -> Result<(), String> {
    let mut pos = sectors.start;
    while pos < sectors.end {
        let end = sectors.end.min(pos + 256);
        let mut buf = vec![0; ((end - pos) * SECTOR) as usize];
        disk.read_at(pos * SECTOR, &mut buf).map_err(|e| e.to_string())?;
        for (number, bytes) in (pos..end).zip(buf.chunks(SECTOR as usize)) {
            legal.check(number, bytes)?;
            see(number, bytes);
        }
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
