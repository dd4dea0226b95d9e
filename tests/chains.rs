//! Chains of every format: made, written, merged, rebased, moved, broken.

// The helpers here serve tests only.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::chains::{
    ChangeOfChain, MERGE_LARGER, OPERATIONS, bases, contents, make_child, open, scribble, three,
    try_open,
};
use common::images::{Image as Base, errors};
use common::{crash, in_parallel, number, seed, tools};
use fastrand::Rng;
use flatdisk::disk::layers::{self, Content};
use flatdisk::error::ErrorKind;
use flatdisk::formats::chain::{self, Merging};
use flatdisk::formats::{self, CreateSpec, NewLink, OpenContext, OpenOptions, flatten};
use flatdisk::storage::file::HostFs;
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::recording::RecordingHost;
use flatdisk::storage::{Access, Host, Storage};

const MIB: u64 = 1 << 20;

/// Images that stand on one another, and what each must hold.
struct Family {
    name: String,
    host: Arc<dyn Host>,
    members: Vec<Member>,
}

struct Member {
    path: PathBuf,
    /// Where its parent stands in the family.
    parent: Option<usize>,
    model: Vec<u8>,
    gone: bool,
}

impl Family {
    fn verify(&self, when: &str) {
        for member in self.members.iter().filter(|m| !m.gone) {
            let context = format!("{}: {} {when}", self.name, member.path.display());
            let image = try_open(&self.host, &member.path, Access::Read)
                .unwrap_or_else(|e| panic!("{context}: {e}"));
            if let Some(wrong) =
                contents(&image).iter().zip(&member.model).position(|(a, b)| a != b)
            {
                panic!("{context}: wrong from byte {wrong:#x} on");
            }
            let errors = errors(&self.host, &member.path).unwrap();
            assert!(errors.is_empty(), "{context}: {errors:?}");
        }
    }

    fn alive(&self) -> Vec<usize> {
        (0..self.members.len()).filter(|&m| !self.members[m].gone).collect()
    }

    fn children(&self, of: usize) -> Vec<usize> {
        self.alive().into_iter().filter(|&m| self.members[m].parent == Some(of)).collect()
    }

    fn descends(&self, member: usize, from: usize) -> bool {
        std::iter::successors(Some(member), |&m| self.members[m].parent).any(|m| m == from)
    }
}

#[test]
fn every_generation_equals_its_model_whatever_is_done_to_the_chain() {
    let bases = bases();
    let rounds = number("FLATDISK_MODEL_OPS", 0).div_ceil(500).max(1);
    in_parallel(&bases, |(base, blocks)| {
        for round in 0..rounds {
            run_model(base, blocks, seed() + round);
        }
    });
}

fn run_model(base: &Base, blocks: &[Option<u64>], seed: u64) {
    let mut random = Rng::with_seed(seed);
    let memory = MemoryHost::new();
    let host: Arc<dyn Host> = memory;
    let path = |number: usize| PathBuf::from(format!("/t/d{number}.{}", base.format));
    base.create_at(&*host, &path(0)).unwrap();
    let mut model = vec![0; base.spec.size as usize];
    scribble(&host, &path(0), &mut model, &mut random, 12);
    let name = format!("{} {:?}, seed {seed}", base.format, base.spec);
    let mut family = Family { name, host: host.clone(), members: Vec::new() };
    family.members.push(Member { path: path(0), parent: None, model: model.clone(), gone: false });
    for number in 1..=random.usize(1..=8) {
        make_child(&host, &path(number), &path(number - 1), blocks[random.usize(..blocks.len())]);
        scribble(&host, &path(number), &mut model, &mut random, 8);
        let parent = Some(number - 1);
        family.members.push(Member {
            path: path(number),
            parent,
            model: model.clone(),
            gone: false,
        });
    }
    family.verify("after it was made");

    let options = OpenOptions::new(Access::Read);
    while family.alive().len() > 1 {
        let alive = family.alive();
        let member = alive[random.usize(1..alive.len())];
        if random.u8(..3) > 0 {
            let candidates: Vec<_> =
                alive.into_iter().filter(|&m| !family.descends(m, member)).collect();
            let new = candidates[random.usize(..candidates.len())];
            let paths = [member, new].map(|m| family.members[m].path.clone());
            let [child, parent] = &paths;
            chain::rebase(&host, child, parent, &options, false, &())
                .unwrap_or_else(|e| panic!("{}: rebase: {e}", family.name));
            family.members[member].parent = Some(new);
            family.verify(&format!(
                "after {} was rebased to {}",
                child.display(),
                parent.display()
            ));
            continue;
        }
        let parent = family.members[member].parent.unwrap();
        let child = family.members[member].path.clone();
        let merged = chain::merge(&host, &child, &options, Merging::default(), &());
        if family.children(member).is_empty() && family.children(parent) == [member] {
            merged.unwrap_or_else(|e| panic!("{}: merge: {e}", family.name));
            family.members[member].gone = true;
            family.members[parent].model = family.members[member].model.clone();
            assert!(host.open(&child, Access::Peek).is_err(), "{} is gone", child.display());
            family.verify(&format!("after {} was merged", child.display()));
            // Grandparent's children and the parent itself stay writable.
            if family.children(parent).is_empty() {
                let Member { path, model, .. } = &mut family.members[parent];
                scribble(&host, path, model, &mut random, 3);
                family.verify("after writing once more");
            }
        } else {
            let e = merged.expect_err("others need the images");
            assert!(e.what().contains("is a child of"), "{e}");
            family.verify("after merging was refused");
        }
    }
}

#[test]
fn a_chain_of_two_hundred_links_opens_and_reads() {
    let bases = [
        Base::new("vhd", "dynamic", 2 * MIB).block(64 << 10),
        Base::new("vhdx", "dynamic", 2 * MIB).block(MIB),
        Base::new("vmdk", "monolithicSparse", 2 * MIB),
    ];
    in_parallel(&bases, |base| {
        let host: Arc<dyn Host> = MemoryHost::new();
        let path = |number: u64| PathBuf::from(format!("/t/{number}.{}", base.format));
        base.create_at(&*host, &path(0)).unwrap();
        for number in 1..=200 {
            make_child(&host, &path(number), &path(number - 1), None);
            let image = open(&host, &path(number), Access::Write);
            image.disk.write_at(number * 4096, &[number as u8; 4096]).unwrap();
            image.disk.close().unwrap();
        }
        let image = open(&host, &path(200), Access::Read);
        let bytes = contents(&image);
        for number in 1..=200 {
            assert_eq!(bytes[number * 4096..][..4096], [number as u8; 4096], "link {number}");
        }
        let mut deepest = 0;
        layers::runs(&image.disk, usize::MAX, |run| {
            deepest = deepest.max(run.layer);
            Ok(())
        })
        .unwrap();
        assert!(deepest >= 199, "{deepest}");

        for number in 201..=260 {
            let parent = match try_open(&host, &path(number - 1), Access::Read) {
                Ok(parent) => parent,
                Err(e) => {
                    assert!(number == 257 && e.what().contains("256 generations"), "{e}");
                    return;
                }
            };
            let format = formats::by_name(base.format).unwrap();
            formats::create_child(format, &*host, &path(number), &parent, &CreateSpec::default())
                .unwrap();
        }
        panic!("no end to the chain");
    });
}

/// Points `child` at `parent`, right or wrong.
fn force_link(host: &Arc<dyn Host>, child: &Path, parent: &Path) {
    let identity = formats::open::open_alone(host, parent, &OpenOptions::new(Access::Peek));
    let identity = identity.unwrap().identity;
    let file = host.open(child, Access::Write).unwrap();
    let ctx = OpenContext::new(host, &*file, &OpenOptions::new(Access::Write));
    let link = NewLink { identity: &identity, parent };
    formats::recognise(&*file).unwrap().relink(file, &ctx, &link).unwrap();
}

fn small_bases() -> [Base; 3] {
    [
        Base::new("vhd", "dynamic", 2 * MIB),
        Base::new("vhdx", "dynamic", 2 * MIB),
        Base::new("vmdk", "monolithicSparse", 2 * MIB),
    ]
}

#[test]
fn broken_chains_say_what_is_broken() {
    for base in small_bases() {
        let (memory, [a, b, c]) = three(&base);
        let forced = OpenOptions { force: true, ..OpenOptions::new(Access::Write) };

        // The same in a cycle and in an image that is its own parent.
        let host: Arc<dyn Host> = memory.fork();
        force_link(&host, &b, &c);
        let e = try_open(&host, &c, Access::Write).unwrap_err();
        assert!(e.what().contains("as its parent, which descends from it"), "{e}");
        assert_eq!(e.path(), Some(&*b), "{e}");
        force_link(&host, &b, &b);
        let e = try_open(&host, &b, Access::Read).unwrap_err();
        assert!(e.what().contains("names itself as its parent"), "{e}");

        // A missing link in the middle.
        let host: Arc<dyn Host> = memory.fork();
        host.remove(&b).unwrap();
        let e = try_open(&host, &c, Access::Read).unwrap_err();
        assert_eq!((e.kind(), e.path()), (ErrorKind::ParentMissing, Some(&*c)), "{e}");
        assert!(e.what().contains(b.to_str().unwrap()) && e.what().contains("tried"), "{e}");
        let image = formats::open(&host, &c, &forced).unwrap();
        let mut sector = [0; 512];
        image.disk.read_at(2 * 8192, &mut sector).unwrap();
        assert_eq!(sector, [3; 512]);
        let e =
            image.disk.read_at(MIB, &mut sector).expect_err("never a zero for a missing parent");
        assert_eq!(e.kind(), ErrorKind::ParentMissing);
        let e = image.disk.write_at(0, &[1; 512]).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::ReadOnly);

        // Another disk in the parent's place.
        let host: Arc<dyn Host> = memory.fork();
        host.remove(&a).unwrap();
        base.create_at(&*host, &a).unwrap();
        let image = open(&host, &a, Access::Write);
        image.disk.write_at(MIB, &[9; 512]).unwrap();
        image.disk.close().unwrap();
        let is = image.identity.to_string();
        let is = if base.format == "vhd" { is } else { String::new() };
        let e = try_open(&host, &c, Access::Read).unwrap_err();
        assert_eq!((e.kind(), e.path()), (ErrorKind::ParentMismatch, Some(&*b)), "{e}");
        assert!(e.what().contains(&is) && e.what().contains("was made from"), "{e}");
        let image = formats::open(&host, &c, &forced).unwrap();
        image.disk.read_at(MIB, &mut sector).unwrap();
        assert!(sector == [9; 512]);
        let e = image.disk.write_at(0, &[1; 512]).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::ReadOnly, "forced below, never written on top: {e}");
    }
}

/// Resizes a disk to `sectors` by hand, in the fields that say so.
fn set_size(memory: &MemoryHost, path: &Path, size: u64) {
    let file = memory.file(path).unwrap();
    let put = |at: u64, bytes: &[u8]| file.write_at(at, bytes).unwrap();
    match path.extension().unwrap().to_str().unwrap() {
        "vhd" => {
            let end = file.len().unwrap() - 512;
            let mut footer = [0; 512];
            file.read_at(end, &mut footer).unwrap();
            footer[48..56].copy_from_slice(&size.to_be_bytes());
            footer[64..68].fill(0);
            let sum = !footer.iter().map(|byte| u32::from(*byte)).sum::<u32>();
            footer[64..68].copy_from_slice(&sum.to_be_bytes());
            put(0, &footer);
            put(end, &footer);
        }
        // The second metadata item, behind the file parameters.
        "vhdx" => put((2 << 20) + (64 << 10) + 8, &size.to_le_bytes()),
        _ => {
            put(12, &(size / 512).to_le_bytes());
            let mut text = vec![0; 1024];
            file.read_at(512, &mut text).unwrap();
            let text = String::from_utf8(text).unwrap();
            let line = text.lines().find(|line| line.starts_with("RW ")).unwrap();
            let old = line.split(' ').nth(1).unwrap();
            let new = format!("{:0width$}", size / 512, width = old.len());
            put(512, text.replacen(&format!("RW {old} "), &format!("RW {new} "), 1).as_bytes());
        }
    }
}

#[test]
fn parents_of_another_size_are_taken_as_each_format_allows() {
    let [_, vhdx, vmdk] = small_bases();
    // A block larger than the disk leaves room to grow in the table.
    let vhd = Base::new("vhd", "dynamic", 2 * MIB).block(4 * MIB);
    for base in [vhd, vhdx, vmdk] {
        for (size, larger) in [(2 * MIB + 65536, true), (MIB, false)] {
            let (memory, [a, b, _]) = three(&base);
            let host: Arc<dyn Host> = memory.clone();
            let old = contents(&open(&host, &b, Access::Read));
            set_size(&memory, &b, size);
            let context = format!("{}, child of {size}", base.format);
            let forced = OpenOptions { force: true, ..OpenOptions::new(Access::Write) };
            let image = match try_open(&host, &b, Access::Write) {
                Err(e) => {
                    assert_eq!((base.format, e.kind()), ("vmdk", ErrorKind::ParentMismatch), "{e}");
                    assert!(e.what().contains(&format!("{} bytes, the image {size}", 2 * MIB)));
                    formats::open(&host, &b, &forced).unwrap_or_else(|e| panic!("{context}: {e}"))
                }
                Ok(image) => {
                    assert_ne!(base.format, "vmdk", "{context}");
                    assert_eq!(image.read_only.is_some(), base.format == "vhd" && !larger);
                    assert!(image.info.warnings.iter().any(|w| w.contains(&size.to_string())));
                    image
                }
            };
            assert_eq!(image.parent.as_ref().unwrap().path, a);
            let shown = contents(&image);
            let common = old.len().min(shown.len());
            assert!(shown[..common] == old[..common], "{context}");
            assert!(shown[common..].iter().all(|byte| *byte == 0), "{context}: past the parent");
            // Copying up over the parent's end.
            if image.read_only.is_none() && larger {
                image.disk.write_at(2 * MIB - 100, &[7; 200]).unwrap();
                let mut around = [0; 1024];
                image.disk.read_at(2 * MIB - 512, &mut around).unwrap();
                let expected: Vec<u8> =
                    (0..1024).map(|at| if (412..612).contains(&at) { 7 } else { 0 }).collect();
                assert!(around[..] == expected[..], "{context}");
            } else {
                let e = image.disk.write_at(0, &[1; 512]).err();
                let writable = image.read_only.is_none();
                assert_eq!(e.map(|e| e.kind()), (!writable).then_some(ErrorKind::ReadOnly));
            }
        }
    }
}

#[test]
fn a_named_parent_needs_no_place_but_must_be_the_right_one() {
    for base in small_bases() {
        let (memory, [a, b, c]) = three(&base);
        let host: Arc<dyn Host> = memory;
        let expected = contents(&open(&host, &c, Access::Read));
        let elsewhere = Path::new("/else/renamed").with_extension(base.format);
        copy(&host, &b, &elsewhere);
        host.remove(&b).unwrap();
        let named = |parent: &Path, force| {
            let parent = Some(parent.to_owned());
            formats::open(
                &host,
                &c,
                &OpenOptions { parent, force, ..OpenOptions::new(Access::Write) },
            )
        };
        // Its own parent is looked for beside it, and in the folders that are allowed.
        let e = named(&elsewhere, false).unwrap_err();
        assert_eq!((e.kind(), e.path()), (ErrorKind::ParentMissing, Some(&*elsewhere)), "{e}");
        copy(&host, &a, &Path::new("/else").join(a.file_name().unwrap()));
        let image = named(&elsewhere, false).unwrap();
        assert!(contents(&image) == expected);
        image.disk.write_at(0, &[9; 512]).unwrap();
        image.disk.close().unwrap();
        drop(image);

        let e = named(&a, false).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::ParentMismatch, "{e}");
        let e = named(Path::new("/nowhere"), false).unwrap_err();
        assert!(e.kind() == ErrorKind::ParentMissing && e.what().contains("tried /nowhere"), "{e}");
        let image = named(&a, true).unwrap();
        assert_eq!(image.parent.as_ref().unwrap().path, a);
        assert_eq!(image.disk.write_at(0, &[1; 512]).unwrap_err().kind(), ErrorKind::ReadOnly);
    }
}

/// Copies a file of one host.
fn copy(host: &Arc<dyn Host>, from: &Path, to: &Path) {
    let from = host.open(from, Access::Peek).unwrap();
    let mut bytes = vec![0; from.len().unwrap() as usize];
    from.read_at(0, &mut bytes).unwrap();
    host.create(to).unwrap().write_at(0, &bytes).unwrap();
}

#[test]
fn a_vhd_that_names_the_unique_id_of_a_descendant_is_a_cycle() {
    let base = Base::new("vhd", "dynamic", 2 * MIB);
    let (memory, [_, b, c]) = three(&base);
    let host: Arc<dyn Host> = memory;
    // The parent that `b` names is a copy of `c`: another file, but the same disk.
    let twin = Path::new("/t/twin.vhd");
    copy(&host, &c, twin);
    force_link(&host, &b, twin);
    let e = try_open(&host, &c, Access::Read).unwrap_err();
    assert_eq!((e.kind(), e.path()), (ErrorKind::Corrupt, Some(&*b)), "{e}");
    assert!(e.what().contains("as its parent, which descends from it"), "{e}");
    force_link(&host, &c, twin);
    let e = try_open(&host, &c, Access::Read).unwrap_err();
    assert!(e.what().contains("names itself as its parent"), "{e}");
}

#[test]
fn a_check_tells_what_is_wrong_between_a_child_and_its_parent() {
    for base in small_bases() {
        let (memory, [a, b, c]) = three(&base);
        let host: Arc<dyn Host> = memory;
        assert_eq!(errors(&host, &c).unwrap(), [""; 0]);
        host.remove(&a).unwrap();
        for image in [&b, &c] {
            let options = OpenOptions::new(Access::Read);
            let report = formats::check(&host, image, &options).unwrap();
            assert_eq!((report.errors, report.notices), (0, 1), "{:?}", report.findings);
            assert!(report.findings[0].what.contains("was not found"), "{:?}", report.findings);
        }
        base.create_at(&*host, &a).unwrap();
        open(&host, &a, Access::Write).disk.write_at(0, &[1; 512]).unwrap();
        let errors = errors(&host, &c).unwrap();
        assert!(errors.len() == 1 && errors[0].contains("was made from"), "{errors:?}");
    }
}

#[test]
fn a_vhd_parent_changed_at_another_time_is_worth_a_notice() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path();
    succeed(dir, &["create", "--size", "8M", "base.vhd"]);
    succeed(dir, &["create", "--parent", "base.vhd", "child.vhd"]);
    let noticed = || {
        let check = json(&succeed(dir, &["check", "--json", "child.vhd"]));
        let info = json(&succeed(dir, &["info", "--chain", "--json", "child.vhd"]));
        let warnings = info["images"][0]["warnings"].as_array().unwrap().len();
        assert_eq!(check["notices"], warnings);
        assert_eq!(check["errors"], 0);
        warnings > 0
    };
    assert!(!noticed());
    let base = std::fs::File::options().write(true).open(dir.join("base.vhd")).unwrap();
    let then = base.metadata().unwrap().modified().unwrap();
    for (seconds, expected) in [(2, false), (60, true)] {
        base.set_modified(then + std::time::Duration::from_secs(seconds)).unwrap();
        assert_eq!(noticed(), expected, "{seconds} seconds");
    }
}

#[test]
fn a_merged_child_can_be_kept_as_an_empty_one() {
    let mut all = bases();
    all.retain(|(base, _)| base.spec.subformat.as_deref() != Some("fixed"));
    in_parallel(&all, |(base, _)| {
        let (memory, [a, b, _]) = three(base);
        let host: Arc<dyn Host> = memory;
        let [c, d] =
            ["grandchild", "sibling"].map(|n| b.with_file_name(n).with_extension(base.format));
        let mut random = Rng::with_seed(seed());
        let mut below = contents(&open(&host, &b, Access::Read));
        make_child(&host, &d, &a, None);
        scribble(&host, &b, &mut below, &mut random, 12);
        make_child(&host, &c, &b, None);
        let mut above = below.clone();
        scribble(&host, &c, &mut above, &mut random, 6);

        let how = Merging { keep: true, over_siblings: true };
        let merged = chain::merge(&host, &b, &OpenOptions::new(Access::Read), how, &());
        let merged = merged.unwrap_or_else(|e| panic!("{}: {e}", base.format));
        assert_eq!(merged.siblings, std::slice::from_ref(&d));
        assert_eq!(
            try_open(&host, &d, Access::Read).unwrap_err().kind(),
            ErrorKind::ParentMismatch
        );
        let kept = open(&host, &b, Access::Read);
        layers::runs(&kept.disk, 1, |run| {
            assert_eq!(run.content, Content::Unallocated, "{}: {run:?}", base.format);
            Ok(())
        })
        .unwrap();
        drop(kept);
        // Parent, kept child and grandchild are what they were, and can go on.
        for (path, expected) in [(&a, &below), (&b, &below), (&c, &above)] {
            assert!(contents(&open(&host, path, Access::Read)) == *expected, "{}", path.display());
            assert_eq!(errors(&host, path).unwrap(), [""; 0]);
        }
        scribble(&host, &c, &mut above, &mut random, 6);
        assert!(contents(&open(&host, &c, Access::Read)) == above);
    });
}

#[test]
fn a_parent_is_found_behind_another_disk_of_the_same_name() {
    for base in small_bases() {
        let (memory, [_, b, c]) = three(&base);
        let host: Arc<dyn Host> = memory;
        let name = b.file_name().unwrap();
        let elsewhere = Path::new("/else").join(name);
        // The right parent is moved away, with all it needs, and a wrong one put in its place.
        let image = open(&host, &c, Access::Read);
        let expected = contents(&image);
        copy(&host, &b, &elsewhere);
        drop(image);
        host.remove(&b).unwrap();
        base.create_at(&*host, &b).unwrap();
        let options = OpenOptions {
            allow_parent: vec!["/else".into(), "/t".into()],
            ..OpenOptions::new(Access::Read)
        };
        let image = formats::open(&host, &c, &options).unwrap();
        assert_eq!(image.parent.as_ref().unwrap().path, elsewhere);
        assert!(contents(&image) == expected);
    }
}

#[test]
fn what_would_break_a_chain_is_refused() {
    for base in small_bases() {
        let (memory, [a, b, c]) = three(&base);
        let host: Arc<dyn Host> = memory;
        let options = OpenOptions::new(Access::Read);
        let rebase = |child: &Path, parent: &Path| {
            chain::rebase(&host, child, parent, &options, false, &()).unwrap_err()
        };
        assert!(rebase(&b, &c).what().contains("needs this image itself"));
        assert!(rebase(&b, &b).what().contains("needs this image itself"));
        assert!(rebase(&a, &b).what().contains("has no parent"));
        let merge = |child: &Path| {
            chain::merge(&host, child, &options, Merging::default(), &()).unwrap_err()
        };
        assert!(merge(&a).what().contains("has no parent"));
        assert!(merge(&b).what().contains("is a child of this image"));
        let sibling = c.with_file_name("sibling").with_extension(base.format);
        make_child(&host, &sibling, &b, None);
        assert!(merge(&c).what().contains("would lose it"));
        for image in [&a, &b, &c, &sibling] {
            open(&host, image, Access::Read);
        }

        // Merged all the same, siblings say what happened to them.
        let merged =
            chain::merge(&host, &c, &options, Merging { over_siblings: true, keep: false }, &())
                .unwrap();
        assert_eq!(merged.siblings, std::slice::from_ref(&sibling));
        let e = try_open(&host, &sibling, Access::Read).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::ParentMismatch, "{e}");
    }
}

#[test]
fn flattened_at_any_depth_an_image_holds_what_it_showed() {
    in_parallel(&bases(), |(base, blocks)| {
        let mut random = Rng::with_seed(seed());
        for links in 1..=4usize {
            let memory = MemoryHost::new();
            let host: Arc<dyn Host> = memory.clone();
            let path = |n: usize| PathBuf::from(format!("/t/{n}.{}", base.format));
            base.create_at(&*host, &path(0)).unwrap();
            let mut model = vec![0; open(&host, &path(0), Access::Read).disk.size() as usize];
            scribble(&host, &path(0), &mut model, &mut random, 8);
            for n in 1..=links {
                make_child(&host, &path(n), &path(n - 1), *random.choice(blocks.iter()).unwrap());
                scribble(&host, &path(n), &mut model, &mut random, 8);
            }
            let above = path(links + 1);
            make_child(&host, &above, &path(links), None);
            let options = OpenOptions::new(Access::Read);
            flatten::flatten(&host, &path(links), &options, &()).unwrap_or_else(|e| panic!("{e}"));
            let e = flatten::flatten(&host, &path(links), &options, &()).unwrap_err();
            assert!(e.what().contains("no parent"), "{e}");
            for n in 0..links {
                host.remove(&path(n)).unwrap();
            }
            let flat = open(&host, &path(links), Access::Read);
            assert!(flat.parent.is_none() && contents(&flat) == model);
            drop(flat);
            let report = formats::check(&host, &path(links), &options).unwrap();
            assert_eq!(report.errors + report.notices, 0, "{}: {:?}", base.format, report.findings);
            // Its child still knows it, and it can be written again.
            assert!(contents(&open(&host, &above, Access::Read)) == model);
            scribble(&host, &path(links), &mut model, &mut random, 8);
            assert!(contents(&open(&host, &path(links), Access::Read)) == model);
            assert_eq!(errors(&host, &path(links)).unwrap(), [""; 0]);
        }
    });
}

#[test]
fn killed_at_any_moment_a_merge_or_rebase_loses_nothing() {
    let mut bases = bases();
    bases.retain(|(base, _)| base.spec.subformat.as_deref() != Some("fixed"));
    let budget = number("FLATDISK_CRASH_STATES", 240) as usize;
    let failures: Vec<String> = in_parallel(&bases, |(base, _)| {
        let mut failures = Vec::new();
        let larger = (base.format != "vmdk").then_some(MERGE_LARGER);
        for operation in OPERATIONS.into_iter().chain(larger) {
            for shares in [false, true] {
                if let Err(e) = crash_while(base, operation, shares, budget / 2) {
                    let kind = format!("{} {:?}", base.format, base.spec.subformat);
                    failures.push(format!("{kind}: {operation}, shares {shares}: {e}"));
                }
            }
        }
        failures
    })
    .concat();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

fn crash_while(
    base: &Base,
    operation: &'static str,
    shares: bool,
    budget: usize,
) -> Result<(), String> {
    let mut random = Rng::with_seed(seed());
    let mut change = ChangeOfChain::new(base, operation, &mut random);
    let recorder = RecordingHost::over(&change.host);
    if shares {
        recorder.share_blocks();
    }
    change.run(&recorder).map_err(|e| e.to_string())?;
    let recording = recorder.recording();
    let mut known = HashSet::new();
    let end = recording.ops().len();
    // What is done promises more than what may be under way, of the same state too.
    let epoch = |at| usize::from(at == end);
    crash::each_state(&recording, &mut random, budget, &mut known, epoch, &mut |at, state, _| {
        change.judge(state, at == end)
    })
}

fn flatdisk(dir: &Path, arguments: &[&str]) -> std::process::Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flatdisk"));
    tools::output(command.current_dir(dir).args(arguments))
}

fn succeed(dir: &Path, arguments: &[&str]) -> String {
    let output = flatdisk(dir, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", tools::both(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn fail(dir: &Path, arguments: &[&str]) -> String {
    let output = flatdisk(dir, arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", tools::both(&output));
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

#[test]
fn a_folder_with_a_chain_can_be_moved_and_opened_by_a_relative_path() {
    for format in ["vhd", "vhdx", "vmdk"] {
        let dir = tempfile::tempdir().unwrap();
        let vm = dir.path().join("vm");
        std::fs::create_dir_all(vm.join("snapshots")).unwrap();
        std::fs::create_dir_all(dir.path().join("else/where")).unwrap();
        let (base, child) = (format!("base.{format}"), format!("child.{format}"));
        let grandchild = format!("snapshots/g.{format}");
        succeed(&vm, &["create", "--size", "8M", &base]);
        succeed(&vm, &["create", "--parent", &base, &child]);
        succeed(&vm, &["create", "--parent", &child, &grandchild]);
        let host = HostFs::shared();
        let image = open(&host, &vm.join(&child), Access::Write);
        image.disk.write_at(5000, &[7; 5000]).unwrap();
        image.disk.close().unwrap();
        drop(image);
        // The child has changed, so the grandchild made of it before does not fit any more.
        std::fs::remove_file(vm.join(&grandchild)).unwrap();
        succeed(&vm, &["create", "--parent", &child, &grandchild]);
        std::fs::rename(&vm, dir.path().join("else/moved")).unwrap();
        let from = dir.path().join("else/where");

        let info =
            json(&succeed(&from, &["info", "--chain", "--json", &format!("../moved/{child}")]));
        let names: Vec<_> =
            info["images"].as_array().unwrap().iter().map(|i| i["filename"].clone()).collect();
        assert_eq!(names, [format!("../moved/{child}"), format!("../moved/{base}")]);

        // A parent outside the child's own folder needs leave, in whatever way it is said.
        let grandchild = format!("../moved/{grandchild}");
        let e = fail(&from, &["info", "--chain", &grandchild]);
        assert!(e.contains("--parent-dir DIR"), "{e}");
        for option in ["--parent-dir", "--allow-parent"] {
            succeed(&from, &["info", "--chain", option, "../moved", &grandchild]);
        }
        let snapshots = from.join("../moved/snapshots");
        let g = format!("g.{format}");
        succeed(&snapshots, &["info", "--chain", "--parent-dir", "..", &g]);
        let named = format!("../{child}");
        for command in [&["info", "--json"][..], &["map"], &["check"]] {
            let said = succeed(&snapshots, &[command, &["--parent", &named, &g]].concat());
            assert!(command[0] != "info" || json(&said)["images"].as_array().unwrap().len() == 3);
        }
        let e = fail(&snapshots, &["info", "--parent", &format!("../{base}"), &g]);
        assert!(e.contains("but the image was made from"), "{e}");
    }
}

#[test]
fn the_command_line_makes_maps_merges_and_rebases_chains() {
    for format in ["vhd", "vhdx", "vmdk"] {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path();
        let [base, child, top] = ["base", "child", "top"].map(|n| format!("{n}.{format}"));
        succeed(dir, &["create", "--size", "8M", &base]);
        let host = HostFs::shared();
        let write = |name: &str, at: u64, byte: u8| {
            let image = open(&host, &dir.join(name), Access::Write);
            image.disk.write_at(at, &[byte; 65536]).unwrap();
            image.disk.close().unwrap();
        };
        write(&base, 0, 1);
        let e = fail(dir, &["create", "--parent", &base, "--size", "9M", &child]);
        assert!(e.contains("8388608 bytes"), "{e}");
        assert!(!dir.join(&child).exists());
        succeed(dir, &["create", "--parent", &base, "--size", "8M", &child]);
        fail(dir, &["create", "--parent", &base, &child]);
        write(&child, 4 << 20, 2);
        let block = if format == "vhdx" { "4M" } else { "64K" };
        succeed(dir, &["create", "--parent", &child, "--block-size", block, &top]);
        write(&top, 6 << 20, 3);

        let map = json(&succeed(dir, &["map", "--json", &top]));
        let runs = map.as_array().unwrap();
        let length: u64 = runs.iter().map(|run| run["length"].as_u64().unwrap()).sum();
        assert_eq!(length, 8 << 20);
        let holder = |at: u64| {
            let run = runs.iter().rfind(|run| run["start"].as_u64().unwrap() <= at).unwrap();
            (run["depth"].as_u64(), run["image"].as_str().unwrap_or_default().to_owned())
        };
        assert_eq!(holder(6 << 20), (Some(0), top.clone()));
        assert_eq!(holder(4 << 20), (Some(1), format!("./{child}")));
        assert_eq!(holder(0), (Some(2), format!("./{base}")));

        let since = json(&succeed(dir, &["map", "--json", "--since", &child, &top]));
        let since = since.as_array().unwrap();
        assert!(since.iter().all(|run| run["depth"] == 0), "{since:?}");
        assert!(!since.is_empty());
        assert!(succeed(dir, &["map", "--since", &base, &top]).contains(&child));
        fail(dir, &["map", "--since", &top, &top]);
        fail(dir, &["map", "--since", &top, &child]);

        let before = contents(&open(&host, &dir.join(&top), Access::Read));
        fail(dir, &["commit", &child]);
        succeed(dir, &["rebase", &top, "--parent", &base]);
        assert!(contents(&open(&host, &dir.join(&top), Access::Read)) == before);
        let e = fail(dir, &["commit", &child]);
        assert!(e.contains("--force"), "{e}");
        std::fs::remove_file(dir.join(&child)).unwrap();
        let report = json(&succeed(dir, &["commit", "--json", &top]));
        assert_eq!(report["parent"], format!("./{base}"));
        assert!(!dir.join(&top).exists());
        assert!(contents(&open(&host, &dir.join(&base), Access::Read)) == before);
        succeed(dir, &["check", &base]);
    }
}

#[test]
fn an_image_in_use_is_not_merged() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path();
    succeed(dir, &["create", "--size", "8M", "base.vhd"]);
    succeed(dir, &["create", "--parent", "base.vhd", "child.vhd"]);
    let held = open(&HostFs::shared(), &dir.join("child.vhd"), Access::Write);
    assert!(fail(dir, &["commit", "child.vhd"]).contains("in use"));
    assert!(fail(dir, &["rebase", "child.vhd", "--parent", "base.vhd"]).contains("in use"));
    drop(held);
    succeed(dir, &["commit", "child.vhd"]);
}

#[test]
fn maps_of_huge_empty_disks_take_no_time() {
    let host: Arc<dyn Host> = MemoryHost::new();
    for (format, size) in [("vhdx", 64u64 << 40), ("vhd", 2040 << 30), ("vmdk", 1 << 40)] {
        let began = std::time::Instant::now();
        let spec = CreateSpec { size, ..CreateSpec::default() };
        let path = PathBuf::from(format!("/t/base.{format}"));
        formats::create(formats::by_name(format).unwrap(), &*host, &path, &spec).unwrap();
        let child = path.with_file_name(format!("child.{format}"));
        make_child(&host, &child, &path, None);
        let mut runs = Vec::new();
        layers::runs(&open(&host, &child, Access::Read).disk, usize::MAX, |run| {
            runs.push(run);
            Ok(())
        })
        .unwrap();
        assert_eq!(runs.len(), 1);
        assert_eq!((runs[0].len, runs[0].content), (size, Content::Unallocated));
        println!("{format}: {:.1} s", began.elapsed().as_secs_f32());
    }
}

#[test]
fn qemu_reads_vmdk_chains_that_were_rebased_and_merged() {
    if !tools::have("qemu-img") {
        return;
    }
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path();
    let host = HostFs::shared();
    let mut random = Rng::with_seed(seed());
    succeed(dir, &["create", "--size", "8M", "0.vmdk"]);
    let mut model = vec![0; 8 << 20];
    for (child, parent) in [("1.vmdk", "0.vmdk"), ("2.vmdk", "1.vmdk"), ("3.vmdk", "2.vmdk")] {
        succeed(dir, &["create", "--parent", parent, child]);
        scribble(&host, &dir.join(child), &mut model, &mut random, 6);
    }
    let by_qemu = |name: &str| {
        let raw = dir.join("raw");
        let mut command = Command::new("qemu-img");
        tools::run(command.args(["convert", "-O", "raw"]).arg(dir.join(name)).arg(&raw));
        std::fs::read(raw).unwrap()
    };
    assert!(by_qemu("3.vmdk") == model);
    succeed(dir, &["rebase", "3.vmdk", "--parent", "1.vmdk"]);
    assert!(by_qemu("3.vmdk") == model);
    std::fs::remove_file(dir.join("2.vmdk")).unwrap();
    succeed(dir, &["commit", "3.vmdk"]);
    assert!(by_qemu("1.vmdk") == model);
}
