//! Images get smaller in place: nothing that a guest sees changes, whatever a crash or a fault leaves.

// The helpers here serve tests only.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::sizes::{Case, Work, all_of, compacted, read, survives, tells_of_faults};
use flatdisk::error::ErrorKind;
use flatdisk::formats::compact::{Compacting, compact};
use flatdisk::formats::{self, OpenOptions};
use flatdisk::progress::Progress;
use flatdisk::storage::{Access, Host};

fn how(case: &Case) -> Compacting {
    match case.work {
        Work::Compact(how) => how,
        Work::Resize(_) => unreachable!("not among these cases"),
    }
}

fn completes(case: &Case) -> Result<usize, String> {
    let made = case.made();
    let host: Arc<dyn Host> = made.host.clone();
    let options = OpenOptions::new(Access::Write);
    let run = |how| compact(&host, &case.path(), &options, how, &()).map_err(|e| e.to_string());
    let before = made.host.digest();
    let dry = run(Compacting { dry_run: true, ..how(case) })?;
    if before != made.host.digest() {
        return Err("a dry run changes files".to_owned());
    }
    let done = run(how(case))?;
    if (dry.length, dry.zeroes, dry.moved) != (done.length, done.zeroes, done.moved) {
        return Err(format!("a dry run tells {dry:?}, done is {done:?}"));
    }
    if how(case).defragment && done.fragmentation > 0 {
        return Err(format!("in order, but {done:?}"));
    }
    let report = formats::check(&host, &case.path(), &options).map_err(|e| e.to_string())?;
    if report.leaks > 0 {
        return Err(format!("leaks: {:?}", report.findings));
    }
    made.judge_end(&host)?;
    Ok((done.length_before - done.length) as usize)
}

#[test]
fn every_kind_of_image_is_compacted() {
    all_of(&compacted(), completes);
}

#[test]
fn compacting_survives_every_crash() {
    all_of(&compacted(), survives);
}

#[test]
fn every_fault_is_told_and_leaves_a_good_image() {
    all_of(&compacted(), tells_of_faults);
}

/// Ends work when it was asked so often whether to go on.
struct Impatient(AtomicUsize);

impl Progress for Impatient {
    fn cancelled(&self) -> bool {
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
            .is_err()
    }
}

#[test]
fn interrupted_work_leaves_a_good_image_and_goes_on() {
    let interrupted = |case: &Case| {
        let made = case.made();
        let options = OpenOptions::new(Access::Write);
        for patience in 0..1000 {
            let host: Arc<dyn Host> = made.host.fork();
            let impatient = Impatient(patience.into());
            match compact(&host, &case.path(), &options, how(case), &impatient) {
                Ok(_) => return Ok(patience),
                Err(e) if e.kind() == ErrorKind::Cancelled => {}
                Err(e) => return Err(e.to_string()),
            }
            let (_, found) = read(&host, &case.path())?;
            let report =
                formats::check(&host, &case.path(), &options).map_err(|e| e.to_string())?;
            if found != made.whole || report.errors > 0 {
                return Err(format!("after {patience}: {:?}", report.findings));
            }
            case.run(&host).map_err(|e| e.to_string())?;
            made.judge_end(&host).map_err(|e| format!("after {patience}: {e}"))?;
        }
        Err("it never ends".to_owned())
    };
    all_of(&compacted(), interrupted);
}

#[test]
fn an_image_in_use_or_damaged_or_compressed_is_refused() {
    let case = &compacted()[1];
    let folder = common::folder();
    let path = folder.path().join("disk.vhd");
    let host = flatdisk::storage::file::HostFs::shared();
    case.image.create_at(&*host, &path).unwrap();
    let options = OpenOptions::new(Access::Write);
    let run = || compact(&host, &path, &options, Compacting::default(), &());
    let open = formats::open(&host, &path, &options).unwrap();
    assert_eq!(run().unwrap_err().kind(), ErrorKind::Busy);
    drop(open);
    assert_eq!(run().unwrap().moved, 0);
    let file = host.open(&path, Access::Write).unwrap();
    // The first two blocks lead to one place.
    file.write_at(1536, &[0, 0, 0, 4, 0, 0, 0, 4]).unwrap();
    file.set_len(1 << 20).unwrap();
    drop(file);
    let e = run().unwrap_err();
    assert!(e.to_string().contains("check --repair") || e.kind() == ErrorKind::Corrupt, "{e}");
}
