//! Disks become larger and smaller in place: every byte that fits is there, whatever a crash or a fault
//! leaves, and asking again completes what was interrupted.

// The helpers here serve tests only.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashSet;
use std::sync::Arc;

use common::crash::each_state;
use common::sizes::{Case, grown, shrunk};
use common::{in_parallel, number, seed};
use flatdisk::error::ErrorKind;
use flatdisk::formats::resize::resize;
use flatdisk::formats::{self, CreateSpec, OpenOptions};
use flatdisk::storage::faulty::{Call, Fault, Faults, FaultyHost};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::recording::RecordingHost;
use flatdisk::storage::{Access, Host};

/// Distinct crash states to look at for each change.
fn budget() -> usize {
    number("FLATDISK_RESIZE_STATES", 300) as usize
}

/// Calls that change something, and all others.
const CALLS: [&[Call]; 2] = [&Call::CHANGES, &[Call::Read, Call::Look, Call::Open]];

/// Fails unless all went well for every case.
fn all_of(cases: &[Case], run: impl Fn(&Case) -> Result<usize, String> + Sync) {
    let results = in_parallel(cases, |case| {
        let began = std::time::Instant::now();
        (run(case).map_err(|e| format!("{}: {e}", case.name())), began.elapsed())
    });
    let mut failures = Vec::new();
    for (case, (result, time)) in cases.iter().zip(results) {
        match result {
            Ok(count) => println!("{}: {count}, {:.1} s", case.name(), time.as_secs_f32()),
            Err(e) => failures.push(e),
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

fn completes(case: &Case) -> Result<usize, String> {
    let made = case.made();
    let host: Arc<dyn Host> = made.host.clone();
    let before = made.host.digest();
    let options = OpenOptions::new(Access::Write);
    let dry =
        resize(&host, &case.path(), &options, case.size, true, &()).map_err(|e| e.to_string())?;
    if before != made.host.digest() {
        return Err("a dry run changes files".to_owned());
    }
    let done = case.run(&host).map_err(|e| e.to_string())?;
    if done.changes.len() != dry.changes.len()
        || (done.before, done.after) != (made.size, case.size)
    {
        return Err(format!("a dry run tells {:?}, done is {:?}", dry.changes, done.changes));
    }
    made.judge_end(&host)?;
    Ok(done.changes.len())
}

#[test]
fn every_kind_of_image_becomes_larger() {
    all_of(&grown(), completes);
}

#[test]
fn every_kind_of_image_becomes_smaller() {
    all_of(&shrunk(), completes);
}

fn survives(case: &Case) -> Result<usize, String> {
    let made = case.made();
    let recorder = RecordingHost::over(&made.host);
    let recorded: Arc<dyn Host> = recorder.clone();
    case.run(&recorded).map_err(|e| e.to_string())?;
    let recording = recorder.recording();
    let done = recording.ops().len();
    let mut states = HashSet::new();
    let mut random = fastrand::Rng::with_seed(seed());
    let epoch = |at| usize::from(at == done);
    each_state(&recording, &mut random, budget(), &mut states, epoch, &mut |at, state, _| {
        made.judge(state, at == done)
    })?;
    Ok(states.len())
}

#[test]
fn growing_survives_every_crash() {
    all_of(&grown(), survives);
}

#[test]
fn shrinking_survives_every_crash() {
    all_of(&shrunk(), survives);
}

fn tells_of_faults(case: &Case) -> Result<usize, String> {
    let made = case.made();
    let run = |fault: Option<(&'static [Call], u64, Fault)>| {
        let faults = Arc::new(Faults::default());
        if let Some((calls, skip, fault)) = fault {
            faults.inject(calls, skip, fault, false);
        }
        let state = made.host.fork();
        let host: Arc<dyn Host> = FaultyHost::over(state.clone(), &faults);
        let result = case.run(&host);
        (state, result, faults)
    };
    let counts = CALLS.map(|calls| run(None).2.count(calls));
    let mut cases = Vec::new();
    for (calls, count) in CALLS.into_iter().zip(counts) {
        cases.extend((0..count).map(|skip| (calls, skip, Fault::Errno(libc::EIO))));
        if calls == Call::CHANGES {
            cases.extend((0..count).map(|skip| (calls, skip, Fault::Half(libc::ENOSPC))));
        }
    }
    fastrand::Rng::with_seed(seed()).shuffle(&mut cases);
    cases.truncate(number("FLATDISK_RESIZE_FAULTS", 60) as usize);
    for fault in &cases {
        let (state, result, faults) = run(Some(*fault));
        let failed = |e: String| format!("{fault:?}: {e}");
        if faults.fired() != 1 {
            return Err(failed(format!("{} calls failed", faults.fired())));
        }
        if let Err(e) = &result
            && e.path().is_none()
        {
            return Err(failed(format!("{e} names no file")));
        }
        made.judge(&state, result.is_ok()).map_err(failed)?;
    }
    Ok(cases.len())
}

#[test]
fn every_fault_is_told_and_leaves_a_good_image() {
    let cases: Vec<_> = grown().into_iter().chain(shrunk()).collect();
    all_of(&cases, tells_of_faults);
}

#[test]
fn an_image_that_others_stand_on_keeps_its_size() {
    for format in ["vhd", "vhdx", "vmdk"] {
        let files = MemoryHost::new();
        let host: Arc<dyn Host> = files.clone();
        let path = |name: &str| std::path::PathBuf::from(format!("/t/{name}.{format}"));
        let spec = CreateSpec { size: 8 << 20, ..CreateSpec::default() };
        let driver = formats::by_name(format).unwrap();
        formats::create(driver, &*files, &path("base"), &spec).unwrap();
        let read = OpenOptions::new(Access::Read);
        let base = formats::open(&host, &path("base"), &read).unwrap();
        formats::create_child(driver, &*files, &path("child"), &base, &CreateSpec::default())
            .unwrap();
        drop(base);
        let to = |name: &str, size| resize(&host, &path(name), &read, size, false, &());
        let e = to("base", 9 << 20).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidInput);
        assert!(e.to_string().contains(&format!("child.{format}")), "{e}");
        // The child itself: smaller than its parent never, larger where the format has that.
        assert_eq!(to("child", 7 << 20).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(to("child", 9 << 20).is_ok(), format != "vmdk", "{format}");
        assert_eq!(to("base", 8 << 20).unwrap().changes, [], "{format}");
    }
}
