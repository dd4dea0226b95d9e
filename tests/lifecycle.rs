//! Snapshots, other names and the end of images: what is in the folder, what every image holds, and what a
//! crash leaves.

// The helpers here serve tests only.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use common::chains::{bases, make_child, open, scribble};
use common::commands::{
    LIFE, OneName, WITH_ONE_NAME, files, filled, holds, image, life, names, take,
};
use common::images::Image as Base;
use common::{in_parallel, number, seed};
use fastrand::Rng;
use flatdisk::error::ErrorKind;
use flatdisk::formats::{OpenOptions, lifecycle, snapshot};
use flatdisk::storage::recording::Change as Op;
use flatdisk::storage::{Access, Host};

const MIB: u64 = 1 << 20;

/// Every kind that can be a base, and those that cannot be written as well.
fn kinds() -> Vec<Base> {
    let mut all: Vec<Base> = bases().into_iter().map(|(base, _)| base).collect();
    all.push(Base::new("vmdk", "twoGbMaxExtentFlat", 3 * MIB));
    all
}

fn options() -> OpenOptions {
    OpenOptions::new(Access::Read)
}

#[test]
fn snapshots_and_ways_back_keep_every_generation_as_it_was() {
    in_parallel(&kinds(), |base| {
        let mut random = Rng::with_seed(seed());
        let (memory, path, mut model) = filled(base, "disk", &mut random);
        let host: Arc<dyn Host> = memory;
        let mut frozen: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        let mut number = 0;
        for _ in 0..12 {
            let lineage = open(&host, &path, Access::Read).chain().count();
            if lineage < 6 && random.u8(..3) > 0 || frozen.is_empty() {
                number += 1;
                let name = format!("n{number}");
                let kept = take(&host, &path, Some(&name)).unwrap_or_else(|e| panic!("{e}"));
                assert_eq!(kept, image(base, &format!("disk-{name}")));
                frozen.insert(name, model.clone());
            } else {
                let among: Vec<String> = {
                    let image = open(&host, &path, Access::Read);
                    let stem = |p: &Path| p.file_stem().unwrap().to_str().unwrap()[5..].to_owned();
                    image.chain().skip(1).map(|image| stem(&image.path)).collect()
                };
                let name = random.choice(among).unwrap();
                snapshot::revert(&host, &path, &name, &options()).unwrap_or_else(|e| panic!("{e}"));
                model = frozen[&name].clone();
            }
            holds(&host, &path, &model).unwrap();
            scribble(&host, &path, &mut model, &mut random, 4);
            holds(&host, &path, &model).unwrap();
            for (name, model) in &frozen {
                holds(&host, &image(base, &format!("disk-{name}")), model).unwrap();
            }
        }
        assert!(names(&host).iter().all(|name| !name.starts_with('.')), "{:?}", names(&host));
    });
}

#[test]
fn a_snapshot_is_refused_where_it_would_do_harm() {
    for base in kinds() {
        let mut random = Rng::with_seed(seed());
        let (memory, path, model) = filled(&base, "disk", &mut random);
        let host: Arc<dyn Host> = memory;
        let e = take(&host, &path, Some("a/b")).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidInput, "{e}");
        let e = snapshot::revert(&host, &path, "nothing", &options()).unwrap_err();
        assert!(e.what().contains("no snapshot `nothing`"), "{e}");
        // The name is taken by another disk.
        base.create_at(&*host, &image(&base, "disk-there")).unwrap();
        let before = names(&host);
        let e = take(&host, &path, Some("there")).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Exists, "{e}");
        let e = snapshot::revert(&host, &path, "there", &options()).unwrap_err();
        assert!(e.what().contains("is of another disk"), "{e}");
        assert_eq!(names(&host), before);
        holds(&host, &path, &model).unwrap();
        // Others stand on the image.
        make_child(&host, &image(&base, "child"), &path, None);
        let e = take(&host, &path, Some("x")).unwrap_err();
        assert!(e.what().contains("other images stand on this one: child."), "{e}");
        holds(&host, &image(&base, "child"), &model).unwrap();
    }
}

#[test]
fn a_renamed_disk_takes_all_its_files_along_and_keeps_its_ids() {
    in_parallel(&kinds(), |base| {
        let mut random = Rng::with_seed(seed());
        let (memory, path, model) = filled(base, "disk", &mut random);
        let host: Arc<dyn Host> = memory.clone();
        let other = image(base, "disk2");
        base.create_at(&*host, &other).unwrap();
        let mut above = model.clone();
        let child = image(base, "child");
        make_child(&host, &child, &path, None);
        scribble(&host, &child, &mut above, &mut random, 4);
        let identity = open(&host, &path, Access::Read).identity;
        let before = names(&host);
        let bytes = |path: &Path| memory.file(path).unwrap().to_vec();
        let foreign = bytes(&other);

        let new = image(base, "a longer name of it");
        let rename = |to: &Path, follow| lifecycle::rename(&host, &path, to, follow, &options());
        let e = rename(&new, false).unwrap_err();
        assert!(e.to_string().contains("--children"), "{e}");
        assert_eq!(rename(&other, true).unwrap_err().kind(), ErrorKind::Exists);
        assert_eq!(rename(&path, true).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(
            rename(Path::new("/u/x.vhd"), true).unwrap_err().kind(),
            ErrorKind::InvalidInput
        );
        assert_eq!(names(&host), before);
        assert_eq!(rename(&new, true).unwrap(), std::slice::from_ref(&child));

        let renamed = |name: &String| match name.strip_prefix("disk") {
            Some(rest) if !rest.starts_with('2') => format!("a longer name of it{rest}"),
            _ => name.clone(),
        };
        assert_eq!(names(&host), before.iter().map(renamed).collect());
        holds(&host, &new, &model).unwrap();
        holds(&host, &child, &above).unwrap();
        let image = open(&host, &child, Access::Read);
        assert_eq!(image.parent.as_ref().unwrap().path.file_name(), new.file_name());
        assert!(image.info.warnings.is_empty(), "{:?}", image.info.warnings);
        assert_eq!(open(&host, &new, Access::Read).identity, identity);
        assert_eq!(bytes(&other), foreign);
        let text = names(&host).into_iter().filter(|n| n.starts_with("a longer"));
        let old = text.into_iter().any(|name| {
            let head = bytes(&Path::new("/t").join(name));
            head[..head.len().min(2048)].windows(6).any(|w| w == b"\"disk." || w == b"\"disk-")
        });
        assert!(!old, "{}: the old name is still in it", base.format);
    });
}

#[test]
fn a_deleted_disk_leaves_nothing_and_takes_nothing_else_along() {
    in_parallel(&kinds(), |base| {
        let mut random = Rng::with_seed(seed());
        let (memory, path, model) = filled(base, "disk", &mut random);
        let host: Arc<dyn Host> = memory.clone();
        base.create_at(&*host, &image(base, "disk2")).unwrap();
        let ours = names(&host).into_iter().filter(|n| !n.starts_with("disk2")).count();
        let child = image(base, "child");
        let with_it = names(&host);
        make_child(&host, &child, &path, None);
        let delete =
            |path: &Path, force, dry| lifecycle::delete(&host, path, force, dry, &options());
        let e = delete(&path, false, false).unwrap_err();
        assert!(e.what().contains("stand on this one: child."), "{e}");
        // What it stands on stays.
        let all = names(&host);
        let told = delete(&child, false, true).unwrap();
        assert_eq!(names(&host), all);
        assert_eq!(delete(&child, false, false).unwrap(), told);
        assert_eq!(names(&host), with_it);
        holds(&host, &path, &model).unwrap();
        assert_eq!(delete(&path, false, false).unwrap().len(), ours);
        assert!(names(&host).iter().all(|name| name.starts_with("disk2")), "{:?}", names(&host));
        assert_eq!(delete(&path, false, false).unwrap_err().kind(), ErrorKind::NotFound);
    });
}

#[test]
fn killed_at_any_moment_the_disk_is_there_and_the_same_request_does_the_rest() {
    let budget = number("FLATDISK_CRASH_STATES", 120) as usize;
    let failures: Vec<String> = in_parallel(&kinds(), |base| {
        let mut failures = Vec::new();
        let one_file = files(base) == 1;
        let alone = WITH_ONE_NAME.into_iter().filter(|_| one_file);
        for what in LIFE.into_iter().chain(alone) {
            let kind = format!("{} {:?}: {what}", base.format, base.spec.subformat);
            match life(base, what, &mut Rng::with_seed(seed())).crash(budget) {
                Ok(states) => println!("{kind}: {states} states"),
                Err(e) => failures.push(format!("{kind}: {e}")),
            }
        }
        failures
    })
    .concat();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

#[test]
fn names_are_durable_before_others_go_and_in_the_end() {
    let kinds = [
        Base::new("vhdx", "dynamic", 3 * MIB).block(MIB).sector(512),
        Base::new("vmdk", "monolithicSparse", 3 * MIB),
        Base::new("vmdk", "vmfs", 3 * MIB),
    ];
    in_parallel(&kinds, |base| {
        let alone = WITH_ONE_NAME.into_iter().filter(|_| files(base) == 1);
        for what in LIFE.into_iter().chain(alone) {
            let command = life(base, what, &mut Rng::with_seed(seed()));
            let recording = command.record().unwrap();
            let ops = recording.ops();
            let takes = |op: &Op| matches!(op, Op::Remove(_) | Op::Rename(..));
            let last = ops.iter().rposition(|op| takes(&op.change)).unwrap();
            let syncs = |from: usize, to: usize| -> BTreeSet<usize> {
                let here = (from..to).filter(|at| matches!(ops[*at].change, Op::SyncDir(_)));
                here.collect()
            };
            // What is deleted or moved needs nothing in its place, and what is gone back to is there.
            let replaces = !["delete", "revert", "rename without second names"].contains(&what);
            let before = replaces.then(|| syncs(0, last)).filter(|syncs| !syncs.is_empty());
            for taken in before.into_iter().chain([syncs(last, ops.len())]) {
                let without = recording.without(taken.clone());
                let shown = command.crash_of(&without, 400, &mut Rng::with_seed(1));
                let kind = base.spec.subformat.as_deref().unwrap_or_default();
                assert!(shown.is_err(), "{kind}, {what}: no crash misses {taken:?}");
            }
        }
    });
}

#[test]
fn where_files_have_no_second_names_one_file_is_renamed_and_several_are_refused() {
    in_parallel(&kinds(), |base| {
        let (memory, path, model) = filled(base, "disk", &mut Rng::with_seed(seed()));
        let host: Arc<dyn Host> = Arc::new(OneName(memory.clone()));
        let (before, several) = (memory.digest(), memory.files().len() > 1);
        let (frozen, renamed) = (image(base, "disk-kept"), image(base, "other"));
        let rename = |from: &Path| lifecycle::rename(&host, from, &renamed, false, &options());
        if several {
            let e = take(&host, &path, Some("kept")).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
            assert_eq!(rename(&path).unwrap_err().kind(), ErrorKind::Unsupported);
            assert_eq!(memory.digest(), before, "{:?}", base.spec.subformat);
            return;
        }
        assert_eq!(take(&host, &path, Some("kept")).unwrap(), frozen);
        holds(&host, &path, &model).unwrap();
        holds(&host, &frozen, &model).unwrap();
        assert_eq!(open(&host, &path, Access::Read).chain().count(), 2);
        rename(&path).unwrap();
        holds(&host, &renamed, &model).unwrap();
        // With a child on it, there would be a moment at which that finds no parent.
        let e = lifecycle::rename(&host, &frozen, &path, true, &options()).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
        holds(&host, &renamed, &model).unwrap();
    });
}
