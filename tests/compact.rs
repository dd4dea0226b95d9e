//! Images get smaller in place: nothing that a guest sees changes, whatever a crash or a fault leaves.

// The helpers here serve tests only.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::sizes::{Case, Work, all_of, compacted, read, survives, tells_of_faults};
use common::tools;
use flatdisk::error::ErrorKind;
use flatdisk::formats::compact::{Compacting, compact};
use flatdisk::formats::{self, CreateSpec, OpenOptions};
use flatdisk::progress::Progress;
use flatdisk::storage::file::HostFs;
use flatdisk::storage::{Access, Host};
use serde_json::Value;

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

/// Makes an image whose blocks hold zeroes, then a block of data.
fn make(path: &Path) {
    let host = HostFs::shared();
    let spec = CreateSpec { size: 16 << 20, ..CreateSpec::default() };
    formats::create(formats::by_extension(path).unwrap(), &*host, path, &spec).unwrap();
    let disk = formats::open(&host, path, &OpenOptions::new(Access::Write)).unwrap().disk;
    disk.write_at(0, &vec![1; 10 << 20]).unwrap();
    disk.write_at(10 << 20, &[7; 4096]).unwrap();
    disk.write_at(0, &vec![0; 10 << 20]).unwrap();
    disk.close().unwrap();
}

/// Runs the program on arguments and a path; its exit status and its answer.
fn ask(args: &[&str], path: &Path) -> (Option<i32>, Value) {
    let program = env!("CARGO_BIN_EXE_flatdisk");
    let output = tools::output(std::process::Command::new(program).args(args).arg(path));
    let answer = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (output.status.code(), answer)
}

#[test]
fn of_a_folder_all_images_are_compacted_but_children() {
    let folder = common::folder();
    let dir = folder.path();
    let host = HostFs::shared();
    for name in ["a.vhd", "b.vhdx", "c.vmdk"] {
        make(&dir.join(name));
    }
    let base = formats::open(&host, &dir.join("a.vhd"), &OpenOptions::new(Access::Read)).unwrap();
    let format = formats::by_name("vhd").unwrap();
    formats::create_child(format, &*host, &dir.join("child.vhd"), &base, &CreateSpec::default())
        .unwrap();
    drop(base);
    std::fs::write(dir.join("notes.txt"), "no image").unwrap();
    std::fs::create_dir(dir.join("folder.vhd")).unwrap();
    let names = |answer: &Value, key: &str| -> Vec<String> {
        let entries = answer[key].as_array().unwrap().iter();
        let name = |entry: &Value| entry["filename"].as_str().unwrap().to_owned();
        entries.map(|e| name(e).rsplit_once('/').unwrap().1.to_owned()).collect()
    };
    let len = |name: &str| std::fs::metadata(dir.join(name)).unwrap().len();
    let before = ["a.vhd", "b.vhdx", "c.vmdk"].map(len);
    for (args, changes) in
        [(&["compact", "--json", "--dry-run"][..], false), (&["compact", "--json"], true)]
    {
        let (status, answer) = ask(args, dir);
        assert_eq!(status, Some(0), "{answer}");
        assert_eq!(names(&answer, "images"), ["a.vhd", "b.vhdx", "c.vmdk"]);
        assert_eq!(names(&answer, "skipped"), ["child.vhd", "notes.txt"]);
        for (name, before) in ["a.vhd", "b.vhdx", "c.vmdk"].into_iter().zip(before) {
            assert_eq!(len(name) < before, changes, "{name}: {answer}");
        }
    }
    // One that is damaged keeps none of the others from being compacted.
    std::fs::remove_file(dir.join("b.vhdx")).unwrap();
    make(&dir.join("b.vhdx"));
    // Two of its blocks lead to one place.
    let file = host.open(&dir.join("a.vhd"), Access::Write).unwrap();
    file.write_at(1536, &[0, 0, 0, 8, 0, 0, 0, 8]).unwrap();
    drop(file);
    let (status, answer) = ask(&["compact", "--json"], dir);
    assert_eq!(status, Some(1), "{answer}");
    assert_eq!(names(&answer, "images"), ["b.vhdx", "c.vmdk"]);
}

#[test]
fn info_tells_how_blocks_lie_and_what_is_to_be_won() {
    let folder = common::folder();
    for name in ["a.vhd", "b.vhdx", "c.vmdk"] {
        let path = folder.path().join(name);
        make(&path);
        let layout = |path: &Path| {
            let (status, answer) = ask(&["info", "--layout", "--json"], path);
            assert_eq!(status, Some(0), "{answer}");
            answer["images"][0]["layout"].clone()
        };
        let told = layout(&path);
        assert_eq!(told["minimum_size"], Value::Null, "{name}: {told}");
        assert!(told["minimum_size_unknown"].is_string(), "{name}: {told}");
        assert!(told["blocks"].as_u64().unwrap() > 0, "{name}: {told}");
        assert_eq!(told["aligned_blocks"], told["blocks"], "{name}: {told}");
        assert_eq!(told["fragmentation"], 0, "{name}: {told}");
        assert!(told["compact_quick_wins"].is_u64(), "{name}: {told}");
        // What cannot be found out while others write is said, and is no error.
        let host = HostFs::shared();
        let open = formats::open(&host, &path, &OpenOptions::new(Access::Write)).unwrap();
        open.disk.write_at(0, &[1; 512]).unwrap();
        assert!(layout(&path)["blocks_unknown"].is_string(), "{name}");
    }
}

/// Windows puts the next block where the footer was; its data is aligned if the file ends on 4 KiB.
#[test]
fn a_compacted_vhd_ends_on_a_multiple_of_4_kib() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.vhd");
    make(&path);
    let (status, _) = ask(&["compact", "--json"], &path);
    assert_eq!(status, Some(0));
    let len = path.metadata().unwrap().len();
    assert!(len < 4 << 20 && len.is_multiple_of(4096), "{len}");
    let (_, answer) = ask(&["compact", "--json"], &path);
    assert_eq!(path.metadata().unwrap().len(), len, "{answer}");
}
