//! Deltas of chains: what they hold, what they do to a copy elsewhere, and what is refused.

// The helpers here serve tests only.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashSet;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use common::chains::{bases, make_child, open, scribble};
use common::commands::{self, Deltas, apply};
use common::images::Image as Base;
use common::{in_parallel, number, seed, tools};
use fastrand::Rng;
use flatdisk::copy::delta;
use flatdisk::error::ErrorKind;
use flatdisk::formats::OpenOptions;
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::recording::RecordingHost;
use flatdisk::storage::{Access, Host};

const MIB: u64 = 1 << 20;

/// One kind of each format whose children tell most.
fn one_of_each() -> Vec<(Base, &'static [Option<u64>])> {
    let mut found = bases();
    let mut known = HashSet::new();
    found.retain(|(base, _)| known.insert(base.format));
    found
}

#[test]
fn a_copy_follows_the_generations_whatever_steps_it_takes() {
    let bases = bases();
    let rounds = number("FLATDISK_MODEL_OPS", 0).div_ceil(500).max(2);
    in_parallel(&bases, |(base, blocks)| {
        for round in 0..rounds {
            let mut random = Rng::with_seed(seed() + round);
            let generations = random.usize(1..=5);
            let chain = Deltas::new(base, blocks, generations, &mut random);
            let host = chain.host();
            let context = format!("{} {:?}, round {round}", base.format, base.spec);
            let mut now = 0;
            while now < generations {
                let next = random.usize(now + 1..=generations);
                let delta = chain.delta(now, next);
                let done = apply(&host, &delta, &chain.target);
                let done = done.unwrap_or_else(|e| panic!("{context}: {now} to {next}: {e}"));
                assert!(!done.already && !done.resumed);
                chain
                    .check(&host, &chain.target, next)
                    .unwrap_or_else(|e| panic!("{context}: {e}"));
                // Again: nothing to do, and nothing is done.
                let before = chain.host.digest();
                assert!(apply(&host, &delta, &chain.target).unwrap().already, "{context}");
                assert_eq!(chain.host.digest(), before, "{context}");
                now = next;
            }
            // What the target is now fits as a parent of that generation's children.
            assert_eq!(open(&host, &chain.target, Access::Read).identity, chain.identity(now));
        }
    });
}

#[test]
fn a_larger_child_makes_the_copy_larger() {
    for (format, subformat, block) in
        [("vhd", "dynamic", MIB / 2), ("vhd", "fixed", 0), ("vhdx", "dynamic", MIB)]
    {
        let base = Base::new(format, subformat, 3 * MIB);
        let base = if block > 0 { base.block(block) } else { base };
        let mut random = Rng::with_seed(seed());
        let mut chain = Deltas::new(&base, &[None], 1, &mut random);
        let host = chain.host();
        let options = OpenOptions::new(Access::Write);
        flatdisk::formats::resize::resize(&host, &chain.paths[1], &options, 9 * MIB, false, &())
            .unwrap();
        chain.models[1].resize(9 << 20, 0);
        let mut model = std::mem::take(&mut chain.models[1]);
        scribble(&host, &chain.paths[1], &mut model, &mut random, 6);
        chain.models[1] = model;
        let delta = chain.delta(0, 1);
        apply(&host, &delta, &chain.target).unwrap();
        chain
            .check(&host, &chain.target, 1)
            .unwrap_or_else(|e| panic!("{format} {subformat}: {e}"));
    }
}

#[test]
fn what_is_cut_off_or_changed_or_for_another_disk_is_refused_before_the_first_write() {
    let bases = one_of_each();
    in_parallel(&bases, |(base, blocks)| {
        let mut random = Rng::with_seed(seed());
        let chain = Deltas::new(base, blocks, 3, &mut random);
        let good = chain.delta(0, 1);
        let refused = |delta: &[u8], path: &Path, kinds: &[ErrorKind], what: &str| {
            let recorder = RecordingHost::over(&chain.host);
            let host: Arc<dyn Host> = recorder.clone();
            let e = apply(&host, delta, path).map(drop).expect_err(what);
            assert!(kinds.contains(&e.kind()), "{}: {what}: {e}", base.format);
            assert_eq!(recorder.position(), 0, "{}: {what}: something was written", base.format);
        };
        let damaged = [ErrorKind::Corrupt, ErrorKind::NotThisFormat, ErrorKind::Unsupported];
        let lengths = [0, 1, 127, 128, 160, good.len() - 64, good.len() - 1];
        let more = (0..60).map(|_| random.usize(..good.len()));
        for len in lengths.into_iter().chain(more).collect::<Vec<_>>() {
            refused(&good[..len], &chain.target, &damaged, &format!("cut to {len}"));
        }
        let tail = good.len() - 64..good.len();
        let places = (0..192).chain(tail).chain((0..100).map(|_| random.usize(..good.len())));
        for at in places.collect::<Vec<_>>() {
            let mut bad = good.clone();
            bad[at] ^= 1 << random.u8(..8);
            refused(&bad, &chain.target, &damaged, &format!("byte {at} changed"));
        }
        refused(&[&good[..], &[0]].concat(), &chain.target, &damaged, "a byte added");
        // The runs of one delta behind the header of another.
        let other = chain.delta(1, 2);
        refused(&[&good[..128], &other[128..]].concat(), &chain.target, &damaged, "mixed");
        let foreign = [ErrorKind::ParentMismatch];
        refused(&other, &chain.target, &foreign, "a delta too early");
        refused(&good, &chain.paths[2], &foreign, "another generation");
        refused(&good, &chain.paths[0], &[ErrorKind::InvalidInput], "an image with children");
    });
}

#[test]
fn unchanged_blocks_are_left_out_and_zeroes_take_no_room() {
    for (format, subformat) in
        [("vhd", "dynamic"), ("vhdx", "dynamic"), ("vmdk", "monolithicSparse")]
    {
        let memory = MemoryHost::new();
        let host: Arc<dyn Host> = memory.clone();
        let [base, child] = ["base", "child"].map(|n| PathBuf::from(format!("/t/{n}.{format}")));
        Base::new(format, subformat, 64 * MIB).create_at(&*host, &base).unwrap();
        let image = open(&host, &base, Access::Write);
        image.disk.write_at(0, &vec![1; 8 << 20]).unwrap();
        image.disk.write_at(20 * MIB, &vec![2; 8 << 20]).unwrap();
        image.close().unwrap();
        make_child(&host, &child, &base, None);
        let image = open(&host, &child, Access::Write);
        // The same once more; one unit of it changes.
        image.disk.write_at(0, &vec![1; 8 << 20]).unwrap();
        image.disk.write_at(3 * MIB + 512, &[9; 512]).unwrap();
        // Zeroes over something, and over nothing.
        image.disk.discard(20 * MIB, 8 * MIB).unwrap();
        image.disk.discard(40 * MIB, 8 * MIB).unwrap();
        // Changes all over, in the smallest unit.
        for number in 0..500 {
            image.disk.write_at(50 * MIB + number * 8192, &[number as u8 | 1; 4096]).unwrap();
        }
        image.close().unwrap();
        let image = open(&host, &child, Access::Read);
        let mut bytes = Vec::new();
        let summary = delta::make(&image, 1, &mut bytes, &()).unwrap();
        assert_eq!(summary.data_bytes, 501 * 4096, "{format}");
        assert_eq!((summary.zero_runs, summary.zero_bytes), (1, 8 * MIB), "{format}");
        let limit = summary.data_bytes + summary.data_bytes / 100;
        assert!(bytes.len() as u64 <= limit, "{format}: {} bytes", bytes.len());
    }
}

#[test]
fn whatever_a_crash_leaves_is_the_one_or_the_other_or_completed_by_applying_again() {
    let budget = number("FLATDISK_CRASH_STATES", 4000) as usize / 8;
    let bases = bases();
    let counts = in_parallel(&bases, |(base, blocks)| {
        let name = format!("{} {:?}", base.format, base.spec.subformat);
        let command = commands::apply_delta(base, blocks, &mut Rng::with_seed(seed()));
        let found = command.crash(budget);
        (name.clone(), found.unwrap_or_else(|e| panic!("{name}: {e}")))
    });
    for (name, count) in counts {
        println!("{name}: {count} crash states of applying a delta");
    }
}

fn flatdisk() -> Command {
    Command::new(env!("CARGO_BIN_EXE_flatdisk"))
}

fn succeed(dir: &Path, arguments: &[&str]) -> String {
    let output = tools::output(flatdisk().current_dir(dir).args(arguments));
    assert!(output.status.success(), "{arguments:?}: {}", tools::both(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_commands_bring_a_copy_up_to_date_through_files_and_pipes() {
    for format in ["vhd", "vhdx", "vmdk"] {
        let dir = common::folder();
        let dir = dir.path();
        std::fs::create_dir(dir.join("backup")).unwrap();
        let [base, first, second] = ["base", "first", "second"].map(|n| format!("{n}.{format}"));
        let copy = format!("backup/copy.{format}");
        succeed(dir, &["create", "--size", "64M", &base]);
        std::fs::copy(dir.join(&base), dir.join(&copy)).unwrap();
        succeed(dir, &["create", "--parent", &base, &first]);
        let write = |name: &str, byte: u8| {
            let host = flatdisk::storage::file::HostFs::shared();
            let image = open(&host, &dir.join(name), Access::Write);
            for at in 0..40 {
                image
                    .disk
                    .write_at((at * 37 % 61) * MIB + 512 * u64::from(byte), &[byte; 9000])
                    .unwrap();
            }
            image.close().unwrap();
        };
        write(&first, 1);
        succeed(dir, &["create", "--parent", &first, &second]);
        write(&second, 2);

        let told =
            succeed(dir, &["delta", "--since", &base, &first, "-o", "first.delta", "--json"]);
        let told: serde_json::Value = serde_json::from_str(&told).unwrap();
        let length = std::fs::metadata(dir.join("first.delta")).unwrap().len();
        assert_eq!(told["delta"]["length"], length);
        let again = tools::output(flatdisk().current_dir(dir).args([
            "delta",
            "--since",
            &base,
            &first,
            "-o",
            "first.delta",
        ]));
        assert!(!again.status.success(), "a file was replaced");
        succeed(dir, &["apply", "first.delta", &copy]);
        let hash = |name: &str| succeed(dir, &["hash", "--json", name]).replace(name, "");
        assert_eq!(hash(&copy), hash(&first), "{format}");
        // A child of the first fits onto the copy, as onto the first.
        assert!(succeed(dir, &["apply", "first.delta", &copy]).contains("already"));

        let mut from = flatdisk()
            .current_dir(dir)
            .args(["delta", "--since", &first, &second])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let to = flatdisk()
            .current_dir(dir)
            .args(["apply", "-q", "-", &copy])
            .stdin(from.stdout.take().unwrap())
            .output()
            .unwrap();
        assert!(from.wait().unwrap().success() && to.status.success(), "{}", tools::both(&to));
        assert_eq!(hash(&copy), hash(&second), "{format}");
        let left: Vec<_> = std::fs::read_dir(dir.join("backup")).unwrap().collect();
        assert_eq!(left.len(), 1, "something is left beside the target");

        let foreign =
            tools::output(flatdisk().current_dir(dir).args(["apply", "first.delta", &base]));
        assert_eq!(foreign.status.code(), Some(1));
        let text = String::from_utf8(foreign.stderr).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
    }
}

#[test]
fn an_image_that_is_no_descendant_and_an_interrupted_delta_are_told() {
    let mut random = Rng::with_seed(seed());
    let chain = Deltas::new(&bases()[0].0, &[None], 1, &mut random);
    let host = chain.host();
    let image = open(&host, &chain.paths[1], Access::Read);
    for generation in [0, 2] {
        let e = delta::make(&image, generation, &mut Vec::new(), &()).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidInput);
    }
    struct Ended;
    impl flatdisk::progress::Progress for Ended {
        fn cancelled(&self) -> bool {
            true
        }
    }
    let e = delta::make(&image, 1, &mut Vec::new(), &Ended).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Cancelled);
    let bytes = chain.delta(0, 1);
    let options = OpenOptions::new(Access::Write);
    let mut input = Cursor::new(&bytes);
    let e = delta::apply(&host, &mut input, &chain.target, &options, &Ended).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Cancelled);
    chain.check(&host, &chain.target, 0).unwrap();
}
