//! Every storage call fails once in turn: the caller learns of it, nothing promised is lost, the
//! image reopens. And every call hangs once: nobody waits who does not have to.

mod common;

use std::collections::HashSet;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use common::crash::{check_state, compare, contents, read};
use common::history::{History, Sectors};
use common::images::{Kind, all_small};
use common::toy::{Flaw, Toy};
use common::workload::{Runner, Step, script};
use common::{in_parallel, number, seed};
use flatdisk::disk::Disk;
use flatdisk::error::{Error, ErrorKind};
use flatdisk::storage::crash::{Choice, CrashPoint};
use flatdisk::storage::faulty::{Call, Fault, Faults, FaultyHost};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::recording::RecordingHost;
use flatdisk::storage::{Access, Host};

/// How many faults to try for kinds of images that others stand for, before their share of it.
fn samples() -> usize {
    number("FLATDISK_FAULTS", 256) as usize
}

/// How many workloads have every call fail once.
fn rounds() -> u64 {
    number("FLATDISK_FAULT_ROUNDS", 3)
}

/// A workload under one fault.
struct Trial<'a> {
    runner: Runner<'a>,
    faults: Arc<Faults>,
    /// A failure made the disk unusable until it is reopened.
    latched: bool,
}

impl<'a> Trial<'a> {
    /// Opens the disk with `faults` in place. A fault while opening may fail that, once.
    fn begin(
        kind: &'a dyn Kind,
        created: &Arc<MemoryHost>,
        faults: Arc<Faults>,
    ) -> Result<Self, String> {
        let recorder = RecordingHost::over(created);
        let host = FaultyHost::over(recorder.clone(), &faults);
        let plain: Arc<dyn Host> = recorder.clone();
        let disk = kind.open(&plain, Access::Read).map_err(|e| e.to_string())?;
        let initial = contents(&disk)?;
        drop(disk);
        let open =
            || Runner::open(kind, host.clone(), recorder.clone(), History::new(initial.clone()));
        let runner = match open() {
            Err(e) if faults.fired() == 0 => return Err(format!("open failed by itself: {e}")),
            Err(_) => open().map_err(|e| format!("open fails although no call does: {e}"))?,
            Ok(runner) => runner,
        };
        Ok(Self { runner, faults, latched: false })
    }

    /// Runs a step and holds its result against what has failed so far.
    fn step(&mut self, step: &Step) -> Result<(), String> {
        let before = self.faults.fired();
        let syncs_before = self.faults.fired_in(Call::Sync);
        let result = self.runner.run(step);
        let fired = self.faults.fired() > before;
        let sync_failed = self.faults.fired_in(Call::Sync) > syncs_before;
        if self.latched {
            return match result {
                Ok(()) => Err(format!("{step:?} works after a failed flush")),
                Err(_) => self.settle(step),
            };
        }
        let Err(error) = result else {
            return match sync_failed {
                true => Err(format!("{step:?} hides that a sync failed")),
                false => Ok(()),
            };
        };
        if !fired {
            return Err(format!("{step:?} fails although no call did: {error}"));
        }
        self.latched = self.must_latch(step, &error, sync_failed);
        if *step == Step::Reopen {
            return self.reopen();
        }
        self.settle(step)
    }

    /// Whether this failure leaves it unknown what is on stable storage.
    fn must_latch(&self, step: &Step, error: &Error, sync_failed: bool) -> bool {
        let promise = matches!(step, Step::Flush | Step::Reopen);
        sync_failed || promise && error.kind() != ErrorKind::NoSpace || self.refuses()
    }

    /// Whether the disk says so itself, as it may after marking the image as written failed.
    fn refuses(&self) -> bool {
        let mut byte = [0];
        self.runner.disk.read_at(0, &mut byte).is_ok()
            && matches!(self.runner.disk.write_at(0, &[]), Err(e) if e.kind() == ErrorKind::Failed)
    }

    /// After a failed step every sector is old or new, and stays what it is.
    fn settle(&self, step: &Step) -> Result<(), String> {
        let (Step::Write { at, len } | Step::Zeroes { at, len } | Step::Discard { at, len }) =
            *step
        else {
            return Ok(());
        };
        let legal = self.runner.history.lock().candidates(at, len);
        let found = read(&self.runner.disk, &legal)
            .map_err(|e| format!("after the failed {step:?}: {e}"))?;
        self.observe(found);
        Ok(())
    }

    fn observe(&self, found: Sectors) {
        let mut history = self.runner.history.lock();
        let position = self.runner.recorder.position();
        for (number, contents) in found {
            if history.now(number) != contents {
                history.observe(number, contents, position);
            }
        }
    }

    /// Opens the disk anew, as after a crash of the program.
    fn reopen(&mut self) -> Result<(), String> {
        let runner = &mut self.runner;
        let opened = runner
            .kind
            .open(&runner.host, Access::Write)
            .map_err(|e| format!("the image does not open after the fault: {e}"))?;
        // Whoever had it open is dead and closes nothing.
        std::mem::forget(std::mem::replace(&mut runner.disk, opened));
        runner.history.lock().doubt();
        let legal = runner.history.lock().legal_at(runner.recorder.position());
        let found = read(&runner.disk, &legal).map_err(|e| format!("after reopening: {e}"))?;
        self.latched = false;
        self.observe(found);
        Ok(())
    }

    /// After the workload: what was promised is there, whatever else is lost.
    fn finish(mut self, seed: u64) -> Result<(), String> {
        self.faults.clear();
        if self.latched {
            if self.runner.apply(&Step::Flush).is_ok() {
                return Err("a flush works after a failed one".into());
            }
            self.reopen()?;
        } else {
            self.runner.apply(&Step::Flush).map_err(|e| format!("the last flush: {e}"))?;
        }
        let history = self.runner.history.lock().clone();
        compare(&self.runner.disk, &history.expected()).map_err(|e| format!("at the end: {e}"))?;
        let recording = self.runner.recorder.recording();
        let mut point = CrashPoint::start(&recording);
        while point.advance() {}
        let legal = history.legal_at(point.at());
        for choice in [Choice::All, Choice::None, Choice::Random(seed), Choice::Random(!seed)] {
            let fates = point.fates(choice);
            check_state(
                self.runner.kind,
                &point.state(&fates),
                &legal,
                seed,
                0,
                &mut HashSet::new(),
            )
            .map_err(|e| format!("{e}\n{}", point.describe(&fates)))?;
        }
        Ok(())
    }
}

/// Calls that change something, and all others.
const CALLS: [&[Call]; 2] = [&Call::CHANGES, &[Call::Read, Call::Look, Call::Open]];

/// A fault at one call of the workload.
#[derive(Debug, Clone, Copy)]
struct Case {
    calls: &'static [Call],
    /// Calls of these kinds before it.
    skip: u64,
    fault: Fault,
}

/// Runs the workload with a fault, if there is one. Returns how many of [`CALLS`] there were and how
/// many failed.
fn trial(
    kind: &dyn Kind,
    created: &Arc<MemoryHost>,
    seed: u64,
    case: Option<Case>,
) -> Result<([u64; 2], u64), String> {
    let faults = Arc::new(Faults::default());
    if let Some(Case { calls, skip, fault }) = case {
        faults.inject(calls, skip, fault, false);
    }
    let mut trial = Trial::begin(kind, created, faults.clone())?;
    let mut random = fastrand::Rng::with_seed(seed);
    let geometry = *trial.runner.disk.geometry();
    for step in script(&mut random, geometry.size, geometry.block_size, 22) {
        trial.step(&step)?;
    }
    if !trial.latched {
        trial.step(&Step::Reopen)?;
    }
    let done = (CALLS.map(|calls| faults.count(calls)), faults.fired());
    trial.finish(seed)?;
    Ok(done)
}

/// Fails every call of a workload in turn, changes in more than one way, or `budget` of them; how many.
fn run(kind: &dyn Kind, seed: u64, budget: Option<usize>) -> Result<usize, String> {
    let named = |e: String| format!("{}: {e}", kind.name());
    let created = MemoryHost::new();
    kind.create(&created).map_err(|e| named(e.to_string()))?;
    let (counts, _) = trial(kind, &created, seed, None).map_err(named)?;
    let mut cases = Vec::new();
    for (calls, count) in CALLS.into_iter().zip(counts) {
        for skip in 0..count {
            let mut add = |fault| cases.push(Case { calls, skip, fault });
            add(Fault::Errno(libc::EIO));
            if calls == Call::CHANGES {
                add(if skip % 2 == 0 {
                    Fault::Errno(libc::ENOSPC)
                } else {
                    Fault::Half(libc::ENOSPC)
                });
            }
        }
    }
    if let Some(budget) = budget {
        fastrand::Rng::with_seed(seed).shuffle(&mut cases);
        cases.truncate(budget);
    }
    for &case in &cases {
        let failed = |e: String| named(format!("{case:?}, script of seed {seed}:\n{e}"));
        let (_, fired) = trial(kind, &created, seed, Some(case)).map_err(failed)?;
        if fired != 1 {
            return Err(failed(format!("{fired} calls failed")));
        }
    }
    Ok(cases.len())
}

#[test]
fn a_toy_tells_of_every_fault_and_reopens() {
    let trials = run(&Toy { flaw: Flaw::None }, seed(), None).unwrap();
    println!("{trials} faults");
}

#[test]
fn hidden_and_forgotten_failures_are_noticed() {
    for flaw in [Flaw::SyncErrorIgnored, Flaw::PagesForgotten] {
        let found = (0..50).find_map(|round| run(&Toy { flaw }, seed() + round, None).err());
        println!("{flaw:?}:\n{}\n", found.expect("a flaw that goes unnoticed"));
    }
}

#[test]
fn every_format_tells_of_every_fault_and_reopens() {
    let mut kinds = all_small();
    kinds.extend(common::corpus::kinds());
    let results = in_parallel(&kinds, |kind| {
        // One kind of each format gets a fault at every call, the others at some.
        if kind.share() > 1 {
            return run(&**kind, seed(), Some(samples().div_ceil(kind.share())));
        }
        (0..rounds()).map(|round| run(&**kind, seed() + round, None)).sum()
    });
    let mut failures = Vec::new();
    for (kind, result) in kinds.iter().zip(results) {
        match result {
            Ok(trials) => println!("{}: {trials} faults", kind.name()),
            Err(report) => failures.push(report),
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

#[test]
fn a_failed_flush_of_one_image_leaves_the_others_alone() {
    for kind in all_small().iter().filter(|kind| kind.share() == 1) {
        let [failing, other] = [0, 1].map(|_| {
            let created = MemoryHost::new();
            kind.create(&created).unwrap();
            created
        });
        let faults = Arc::new(Faults::default());
        let host: Arc<dyn Host> = FaultyHost::over(failing, &faults);
        let failing = kind.open(&host, Access::Write).unwrap();
        let other: Arc<dyn Host> = other;
        let disk = kind.open(&other, Access::Write).unwrap();
        failing.write_at(0, &[1; 4096]).unwrap();
        disk.write_at(0, &[2; 4096]).unwrap();
        faults.inject(&[Call::Sync], 0, Fault::Errno(libc::EIO), false);
        assert!(failing.flush().is_err(), "{}", kind.name());
        disk.flush().unwrap();
        assert_eq!(failing.flush().unwrap_err().kind(), ErrorKind::Failed, "{}", kind.name());
        disk.write_at(4096, &[3; 4096]).unwrap();
        disk.close().unwrap();
        let mut found = vec![0; 8192];
        kind.open(&other, Access::Read).unwrap().read_at(0, &mut found).unwrap();
        assert!(found[..4096] == [2; 4096] && found[4096..] == [3; 4096], "{}", kind.name());
    }
}

/// The middle of a disk, where nothing is stored yet.
fn far(disk: &Disk) -> u64 {
    disk.size() / 8192 * 4096
}

/// What hangs in the test below: an allocation, an overwrite, and a flush.
fn write_and_flush(disk: &Disk) -> flatdisk::Result<()> {
    disk.write_at(far(disk), &[3; 4096])?;
    disk.write_at(4096, &[2; 4096])?;
    disk.flush()
}

#[test]
fn a_call_that_hangs_keeps_no_reader_and_no_other_image_waiting() {
    for kind in all_small().iter().filter(|kind| kind.share() == 1) {
        let written = || {
            let created = MemoryHost::new();
            kind.create(&created).unwrap();
            let host: Arc<dyn Host> = created.clone();
            let disk = kind.open(&host, Access::Write).unwrap();
            disk.write_at(0, &[1; 8192]).unwrap();
            disk.close().unwrap();
            created
        };
        let created = written();
        let other: Arc<dyn Host> = written();
        let other = kind.open(&other, Access::Write).unwrap();
        let faults = Arc::new(Faults::default());
        let open = |host: &Arc<dyn Host>| kind.open(host, Access::Write).unwrap();
        let calls = {
            let host: Arc<dyn Host> = FaultyHost::over(created.fork(), &faults);
            let disk = open(&host);
            write_and_flush(&disk).unwrap();
            // Before the drop, which closes the disk.
            faults.count(&Call::CHANGES)
        };
        assert!(calls >= 3, "{}: {calls} calls", kind.name());
        for skip in 0..calls {
            let named = format!("{}, call {skip} of {calls}", kind.name());
            let host: Arc<dyn Host> = FaultyHost::over(created.fork(), &faults);
            let disk = open(&host);
            faults.inject(&Call::CHANGES, skip, Fault::Hold, false);
            std::thread::scope(|scope| {
                let writer = scope.spawn(|| write_and_flush(&disk));
                faults.wait_until_held();
                let (done, read) = mpsc::channel();
                let (disk, other) = (&disk, &other);
                scope.spawn(move || {
                    let mut found = [0; 4096];
                    let result = disk.read_at(0, &mut found).map(|()| found);
                    other.write_at(0, &[4; 4096]).and_then(|()| other.flush()).unwrap();
                    done.send(result).unwrap();
                });
                let read = read.recv_timeout(Duration::from_secs(30));
                faults.release();
                assert!(read.expect(&named).unwrap() == [1; 4096], "{named}");
                writer.join().unwrap().unwrap();
            });
            let mut found = [0; 4096];
            let at = far(&disk);
            drop(disk);
            kind.open(&host, Access::Read).unwrap().read_at(at, &mut found).unwrap();
            assert!(found == [3; 4096], "{named}");
        }
        println!("{}: {calls} calls held", kind.name());
    }
}

/// Runs a workload on a host with little room, makes room, and goes on with the same disk.
fn fill_up(kind: &dyn Kind, created: &Arc<MemoryHost>, room: u64, seed: u64) -> Result<(), String> {
    let faults = Arc::new(Faults::default());
    let mut trial = Trial::begin(kind, created, faults.clone())?;
    let mut random = fastrand::Rng::with_seed(seed);
    let geometry = *trial.runner.disk.geometry();
    faults.set_room(room);
    for step in script(&mut random, geometry.size, geometry.block_size, 30) {
        if step == Step::Reopen {
            continue;
        }
        trial.step(&step)?;
        if trial.latched {
            return Err(format!("{step:?} without room made the disk unusable"));
        }
    }
    faults.clear();
    trial.step(&Step::Flush)?;
    for step in script(&mut random, geometry.size, geometry.block_size, 10) {
        trial.step(&step)?;
    }
    trial.finish(seed)
}

#[test]
fn a_full_host_is_no_lasting_failure() {
    let mut kinds = all_small();
    kinds.push(Box::new(Toy { flaw: Flaw::None }));
    let results = in_parallel(&kinds, |kind| -> Result<(), String> {
        let created = MemoryHost::new();
        kind.create(&created).map_err(|e| e.to_string())?;
        for (round, room) in
            [0, 512, 4096, 70_000, 1 << 20, (3 << 20) + 512, 5 << 20].into_iter().enumerate()
        {
            fill_up(&**kind, &created, room, seed() + round as u64)
                .map_err(|e| format!("{}, room for {room} bytes: {e}", kind.name()))?;
        }
        Ok(())
    });
    let failures: Vec<_> = results.into_iter().filter_map(Result::err).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

/// Fills holes until the host is full; what was accepted until then can be flushed, and is there.
fn fill_holes(
    kind: &dyn Kind,
    created: &Arc<MemoryHost>,
    space: u64,
    seed: u64,
) -> Result<(), String> {
    let mut random = fastrand::Rng::with_seed(seed);
    let faults = Arc::new(Faults::default());
    let mut trial = Trial::begin(kind, created, faults.clone())?;
    faults.set_space(space);
    let geometry = *trial.runner.disk.geometry();
    let mut full = false;
    for round in 0..400 {
        // One place in every page of the tables, and then some.
        let stride = kind.stride().unwrap_or(geometry.block_size).clamp(512, geometry.size);
        let at = random.u64(..geometry.size.div_ceil(stride)) * stride;
        let at = (at + random.u64(..4) * 512).min(geometry.size - 512);
        let step = match random.u8(..8) {
            0 => Step::Discard { at, len: stride.min(geometry.size - at) },
            _ => Step::Write { at, len: 512.min(geometry.size - at) },
        };
        let before = faults.fired();
        trial.step(&step)?;
        full |= faults.fired() > before;
        if full || round % 16 == 15 {
            let before = faults.fired();
            trial.step(&Step::Flush)?;
            if faults.fired() > before {
                return Err(format!("a flush after {step:?} finds the host full"));
            }
        }
        if full && random.u8(..4) == 0 {
            break;
        }
    }
    faults.clear();
    for step in script(&mut random, geometry.size, geometry.block_size, 6) {
        trial.step(&step)?;
    }
    trial.finish(seed)
}

#[test]
fn tables_of_what_was_accepted_find_room_on_a_full_host() {
    let kinds = all_small();
    let results = in_parallel(&kinds, |kind| -> Result<(), String> {
        let created = MemoryHost::new();
        kind.create(&created).map_err(|e| e.to_string())?;
        let spaces = [0, 4, 12, 40, 200, 1100, 1200, 1500, 3000, 9000];
        for (round, pages) in spaces.into_iter().enumerate() {
            let space = pages << 10;
            fill_holes(&**kind, &created, space, seed() + round as u64)
                .map_err(|e| format!("{}, space for {space} bytes: {e}", kind.name()))?;
        }
        Ok(())
    });
    let failures: Vec<_> = results.into_iter().filter_map(Result::err).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

#[test]
fn a_disk_is_closed_on_a_full_host() {
    let kinds = all_small();
    let results = in_parallel(&kinds, |kind| -> Result<(), String> {
        for space in [8 << 10, 40 << 10, 1200 << 10, 3000 << 10] {
            let failed = |e: Error| format!("{}, space for {space} bytes: {e}", kind.name());
            let files = MemoryHost::new();
            kind.create(&files).map_err(failed)?;
            let faults = Arc::new(Faults::default());
            let host: Arc<dyn Host> = FaultyHost::over(files.clone(), &faults);
            let disk = kind.open(&host, Access::Write).map_err(failed)?;
            faults.set_space(space);
            let block = disk.geometry().block_size.min(disk.size());
            let mut written = Vec::new();
            let places = (0..disk.size() / block).map(|number| number * block).take(400);
            for at in places {
                match disk.write_at(at, &[7; 512]) {
                    Ok(()) => written.push(at),
                    Err(e) if e.kind() == ErrorKind::NoSpace => break,
                    Err(e) => return Err(failed(e)),
                }
            }
            disk.close().map_err(failed)?;
            drop(disk);
            let host: Arc<dyn Host> = files;
            let disk = kind.open(&host, Access::Read).map_err(failed)?;
            for at in written {
                let mut found = [0; 512];
                disk.read_at(at, &mut found).map_err(failed)?;
                if found != [7; 512] {
                    return Err(format!("{}: {at:#x} is lost", kind.name()));
                }
            }
        }
        Ok(())
    });
    let failures: Vec<_> = results.into_iter().filter_map(Result::err).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}
