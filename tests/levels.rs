//! Chains that get shorter: several generations merged at once, and one taken out of the middle.

// The helpers here serve tests only.
#![allow(clippy::unwrap_used)]

mod common;
mod live;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::chains::{bases, make_child, scribble, try_open};
use common::commands::{self, Chain};
use common::images::Image as Base;
use common::{in_parallel, number, seed, tools};
use fastrand::Rng;
use flatdisk::error::ErrorKind;
use flatdisk::formats::{OpenOptions, flatten, levels, resize};
use flatdisk::storage::Access;

const MIB: u64 = 1 << 20;

fn options() -> OpenOptions {
    OpenOptions::new(Access::Read)
}

#[test]
fn every_generation_equals_its_model_while_the_chain_gets_shorter() {
    in_parallel(&bases(), |(base, blocks)| {
        for round in 0..3 {
            let mut random = Rng::with_seed(seed() + round);
            let links = random.usize(1..=6);
            let mut chain = Chain::new(base, blocks, links, &mut random);
            let context = format!("{} {:?}", base.format, base.spec.subformat);
            while chain.members.len() > 1 {
                let top = chain.members.len() - 1;
                match random.u8(..4) {
                    0 => {
                        let into = random.usize(..top);
                        chain.merge(top, into).unwrap_or_else(|e| panic!("{context}: {e}"));
                        chain.verify(&format!("{context}: merged {top} into {into}"));
                        let last = chain.members.len() - 1;
                        let (path, model) = &mut chain.members[last];
                        scribble(&chain.host, path, model, &mut random, 3);
                    }
                    1 | 2 if top > 1 => {
                        let middle = random.usize(1..top);
                        let path = chain.members[middle].0.clone();
                        let done = levels::merge_middle(&chain.host, &path, &options(), &());
                        let done = done.unwrap_or_else(|e| panic!("{context}: {e}"));
                        assert_eq!(done.relinked, [chain.members[middle + 1].0.clone()]);
                        chain.members[middle - 1].1 = chain.members[middle].1.clone();
                        chain.members.remove(middle);
                        chain.verify(&format!("{context}: {middle} of {top} is out"));
                    }
                    _ => {
                        let lone = random.usize(1..=top);
                        let path = &chain.members[lone].0;
                        flatten::flatten(&chain.host, path, &options(), &()).unwrap();
                        chain.verify(&format!("{context}: {lone} of {top} is flat"));
                        chain.members.drain(..lone);
                    }
                }
            }
        }
    });
}

#[test]
fn what_others_need_is_not_merged() {
    for (base, blocks) in bases() {
        let mut random = Rng::with_seed(seed());
        let mut chain = Chain::new(&base, blocks, 3, &mut random);
        let path = |index: usize| chain.members[index].0.clone();
        let other = PathBuf::from(format!("/t/other.{}", base.format));
        // Somebody stands on one between, on the base, or on the top.
        for on in [1, 2, 3, 0] {
            make_child(&chain.host, &other, &path(on), None);
            let e = levels::merge_to(&chain.host, &path(3), &path(0), &options(), false, &());
            let e = e.expect_err("somebody needs it");
            assert!(e.to_string().contains("other."), "{on}: {e}");
            chain.host.remove(&other).unwrap();
            for part in chain.host.list(Path::new("/t")).unwrap() {
                if part.to_str().unwrap().contains("other-") {
                    chain.host.remove(&part).unwrap();
                }
            }
        }
        make_child(&chain.host, &other, &path(0), None);
        let e = levels::merge_middle(&chain.host, &path(1), &options(), &()).unwrap_err();
        assert!(e.what().contains("its parent has other children: other."), "{e}");
        let e =
            levels::merge_to(&chain.host, &path(1), &path(2), &options(), false, &()).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidInput);
        assert!(e.what().contains("is not among its ancestors"), "{e}");
        chain.verify("after refusals");
        // With force the other one learns that it does not fit any more.
        let (top, into) = (path(3), path(0));
        let done = levels::merge_to(&chain.host, &top, &into, &options(), true, &()).unwrap();
        assert_eq!(done.merged.siblings, std::slice::from_ref(&other));
        assert_eq!(done.removed.len(), 3);
        let e = try_open(&chain.host, &other, Access::Read).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::ParentMismatch, "{e}");
        chain.members[0].1 = chain.members[3].1.clone();
        chain.members.truncate(1);
        chain.verify("after force");
    }
}

#[test]
fn a_top_that_is_larger_makes_its_ancestor_as_large() {
    for (base, blocks) in bases() {
        let growing = base.format != "vmdk" && base.spec.subformat.as_deref() != Some("fixed");
        if !growing {
            continue;
        }
        let mut random = Rng::with_seed(seed());
        let mut chain = Chain::new(&base, blocks, 2, &mut random);
        let (path, model) = &mut chain.members[2];
        let size = model.len() as u64 + 2 * MIB;
        resize::resize(&chain.host, path, &OpenOptions::new(Access::Write), size, false, &())
            .unwrap();
        model.resize(size as usize, 0);
        scribble(&chain.host, path, model, &mut random, 6);
        chain.verify("a larger top");
        chain.merge(2, 0).unwrap_or_else(|e| panic!("{}: {e}", base.format));
        chain.verify("merged");
    }
}

/// Judges what crashes leave of a command on every kind of chain.
fn crashes(command: fn(&Base, &[Option<u64>], &mut Rng) -> commands::Command<'static>) {
    let budget = number("FLATDISK_CRASH_STATES", 80) as usize;
    let failures = in_parallel(&bases(), |(base, blocks)| {
        let command = command(base, blocks, &mut Rng::with_seed(seed()));
        let judged = command.crash(budget).and_then(|_| command.crash_sharing(budget));
        judged.err().map(|e| format!("{} {:?}: {e}", base.format, base.spec.subformat))
    });
    let failures: Vec<_> = failures.into_iter().flatten().collect();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

#[test]
fn killed_while_levels_are_merged_nothing_is_lost() {
    crashes(commands::merge_levels);
}

#[test]
fn killed_while_one_is_taken_out_of_the_middle_all_children_read_the_same() {
    crashes(commands::merge_middle);
}

#[test]
fn the_command_line_makes_chains_shorter() {
    for format in ["vhd", "vhdx", "vmdk"] {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path();
        let run = |arguments: &[&str]| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_flatdisk"));
            tools::run(command.current_dir(dir).args(arguments))
        };
        let names = ["0", "1", "2", "3", "4"].map(|name| format!("{name}.{format}"));
        run(&["create", "-q", &names[0], "8M"]);
        for pair in names.windows(2) {
            run(&["create", "-q", "--parent", &pair[0], &pair[1]]);
        }
        let said = run(&["commit", "--relink", &names[2]]);
        assert!(said.contains(&format!("{} is a child of", names[3])), "{said}");
        let said = run(&["commit", "--to", &names[0], &names[4]]);
        assert!(said.contains(&format!("into ./{}", names[0])), "{said}");
        let left: Vec<_> =
            std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, [names[0].as_str()]);
    }
}

#[test]
fn flattened_and_merged_blocks_are_shared_and_take_no_new_space() {
    // A chain of three in which everything is data.
    let script = "used() { sync -f .; df --output=used -k . | tail -1; }\n\
        sum() { \"$FLATDISK\" hash \"$1\" | cut -c1-64; }\n\
        for kind in vhd vhdx vmdk; do\n\
          \"$FLATDISK\" create -q a.$kind 64M\n\
          head -c 48M /dev/urandom | \"$FLATDISK\" write a.$kind > /dev/null\n\
          \"$FLATDISK\" create -q --parent a.$kind b.$kind\n\
          head -c 24M /dev/urandom | \"$FLATDISK\" write --offset 20M b.$kind > /dev/null\n\
          \"$FLATDISK\" create -q --parent b.$kind c.$kind\n\
          head -c 9M /dev/urandom | \"$FLATDISK\" write --offset 30M c.$kind > /dev/null\n\
          b=$(sum b.$kind); c=$(sum c.$kind); before=$(used)\n\
          \"$FLATDISK\" flatten -q b.$kind; test $(sum b.$kind) = $b; test $(sum c.$kind) = $c\n\
          test $(($(used) - before)) -lt 4096\n\
          \"$FLATDISK\" commit -q c.$kind; test $(sum b.$kind) = $c; \"$FLATDISK\" check -q b.$kind\n\
          test $(($(used) - before)) -lt 4096\n\
          rm [ab].$kind\n\
        done";
    for make in ["xfs", "btrfs"] {
        if live::have(&[&format!("mkfs.{make}")]) && live::can_mount() {
            live::on_file_system(make, script);
        }
    }
}
