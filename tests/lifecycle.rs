//! Snapshots, other names and the end of images: what is in the folder, what every image holds, and what a
//! crash leaves.

// The helpers here serve tests only.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::chains::{bases, contents, make_child, open, scribble, try_open};
use common::images::{Image as Base, errors};
use common::{crash, in_parallel, number, seed};
use fastrand::Rng;
use flatdisk::error::{Error, ErrorKind};
use flatdisk::formats::{OpenOptions, lifecycle, snapshot};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::recording::{Change as Op, RecordingHost};
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

fn image(base: &Base, name: &str) -> PathBuf {
    Path::new("/t").join(format!("{name}.{}", base.format))
}

fn take(host: &Arc<dyn Host>, path: &Path, name: Option<&str>) -> Result<PathBuf, Error> {
    snapshot::take(host, path, name, "20260102-030405", &options()).map(|taken| taken.frozen)
}

/// The names in the folder.
fn names(host: &Arc<dyn Host>) -> BTreeSet<String> {
    let files = host.list(Path::new("/t")).unwrap();
    files.iter().map(|f| f.file_name().unwrap().to_str().unwrap().to_owned()).collect()
}

/// A base of this kind with some data, in memory, and what it holds.
fn filled(base: &Base, name: &str, random: &mut Rng) -> (Arc<MemoryHost>, PathBuf, Vec<u8>) {
    let memory = MemoryHost::new();
    let host: Arc<dyn Host> = memory.clone();
    let path = image(base, name);
    base.create_at(&*host, &path).unwrap();
    let mut model = vec![0; open(&host, &path, Access::Read).disk.size() as usize];
    scribble(&host, &path, &mut model, random, 6);
    (memory, path, model)
}

/// Whether the image shows this, whatever a check finds.
fn shows(host: &Arc<dyn Host>, path: &Path, model: &[u8]) -> Result<(), String> {
    let image = try_open(host, path, Access::Read).map_err(|e| e.to_string())?;
    if contents(&image) != model {
        return Err(format!("{} holds something else", path.display()));
    }
    Ok(())
}

fn holds(host: &Arc<dyn Host>, path: &Path, model: &[u8]) -> Result<(), String> {
    shows(host, path, model)?;
    match errors(host, path) {
        Ok(errors) if errors.is_empty() => Ok(()),
        other => Err(format!("{}: {other:?}", path.display())),
    }
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

/// What is done to an image, what each name may hold at any moment, and what is there in the end.
struct Change {
    what: &'static str,
    host: Arc<MemoryHost>,
    path: PathBuf,
    new: PathBuf,
    child: PathBuf,
    model: Vec<u8>,
    above: Vec<u8>,
    /// The names in the folder when all is done.
    done: BTreeSet<String>,
}

const CHANGES: [&str; 6] =
    ["snapshot", "second snapshot", "revert", "rename", "rename with children", "delete"];

impl Change {
    fn new(base: &Base, what: &'static str, random: &mut Rng) -> Self {
        let (memory, path, model) = filled(base, "disk", random);
        let host: Arc<dyn Host> = memory.clone();
        let (new, child) = (image(base, "disk-new"), image(base, "child"));
        let mut above = model.clone();
        match what {
            "second snapshot" | "revert" => {
                let name = if what == "revert" { "new" } else { "first" };
                take(&host, &path, Some(name)).unwrap();
                scribble(&host, &path, &mut above, random, 4);
            }
            "rename with children" => {
                make_child(&host, &child, &path, None);
                scribble(&host, &child, &mut above, random, 4);
            }
            _ => {}
        }
        let model = if what == "second snapshot" { above.clone() } else { model };
        Self { what, host: memory, path, new, child, model, above, done: BTreeSet::new() }
    }

    fn run(&self, host: &Arc<dyn Host>) -> Result<(), Error> {
        match self.what {
            "snapshot" => take(host, &self.path, Some("new")).map(drop),
            "second snapshot" => take(host, &self.path, None).map(drop),
            "revert" => snapshot::revert(host, &self.path, "new", &options()).map(drop),
            "delete" => lifecycle::delete(host, &self.path, false, false, &options()).map(drop),
            with => {
                let follow = with.ends_with("children");
                lifecycle::rename(host, &self.path, &self.new, follow, &options()).map(drop)
            }
        }
    }

    /// Judges what a crash left, or what is there in the end.
    fn judge(&self, state: &Arc<MemoryHost>, done: bool) -> Result<(), String> {
        let state: Arc<dyn Host> = state.fork();
        let under = |path: &Path, model: &[u8]| holds(&state, path, model);
        let there = |path: &Path| state.open(path, Access::Peek).is_ok();
        match self.what {
            "delete" => {}
            "snapshot" | "second snapshot" => under(&self.path, &self.model)?,
            "revert" => {
                under(&self.new, &self.model)?;
                if there(&self.path) {
                    under(&self.path, &self.above).or_else(|_| under(&self.path, &self.model))?;
                }
            }
            _ => {
                under(&self.path, &self.model).or_else(|_| under(&self.new, &self.model))?;
                if there(&self.child) {
                    shows(&state, &self.child, &self.above)?;
                }
            }
        }
        // The same request does the rest.
        let over = match self.what {
            "delete" => !there(&self.path),
            "revert" => done,
            "snapshot" | "second snapshot" => {
                let image =
                    try_open(&state, &self.path, Access::Read).map_err(|e| e.to_string())?;
                image.chain().count() > if self.what == "snapshot" { 1 } else { 2 }
            }
            _ => !there(&self.path),
        };
        if !over && !done {
            self.run(&state).map_err(|e| format!("again: {e}"))?;
        }
        let (found, staged): (BTreeSet<_>, BTreeSet<_>) =
            names(&state).into_iter().partition(|name| !name.starts_with(".flatdisk-part"));
        if found != self.done {
            return Err(format!("the folder has {found:?}, and should have {:?}", self.done));
        }
        if done && !staged.is_empty() {
            return Err(format!("{staged:?} are left"));
        }
        match self.what {
            "delete" => Ok(()),
            "revert" => under(&self.path, &self.model),
            "snapshot" => {
                under(&self.path, &self.model).and_then(|()| under(&self.new, &self.model))
            }
            "second snapshot" => under(&self.path, &self.model),
            _ => under(&self.new, &self.model),
        }
    }
}

#[test]
fn killed_at_any_moment_the_disk_is_there_and_the_same_request_does_the_rest() {
    let budget = number("FLATDISK_CRASH_STATES", 120) as usize;
    let failures: Vec<String> = in_parallel(&kinds(), |base| {
        let mut failures = Vec::new();
        for what in CHANGES {
            let mut random = Rng::with_seed(seed());
            let mut change = Change::new(base, what, &mut random);
            let recorder = RecordingHost::over(&change.host);
            let host: Arc<dyn Host> = recorder.clone();
            let kind = format!("{} {:?}: {what}", base.format, base.spec.subformat);
            if let Err(e) = change.run(&host) {
                failures.push(format!("{kind}: {e}"));
                continue;
            }
            change.done = names(&host);
            let recording = recorder.recording();
            let mut known = HashSet::new();
            let end = recording.ops().len();
            let judged = crash::each_state(
                &recording,
                &mut random,
                budget,
                &mut known,
                |at| usize::from(at == end),
                &mut |at, state, _| change.judge(state, at == end),
            );
            println!("{kind}: {} states", known.len());
            if let Err(e) = judged {
                failures.push(format!("{kind}: {e}"));
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
        for what in CHANGES {
            let mut change = Change::new(base, what, &mut Rng::with_seed(seed()));
            let recorder = RecordingHost::over(&change.host);
            let host: Arc<dyn Host> = recorder.clone();
            change.run(&host).unwrap();
            change.done = names(&host);
            let recording = recorder.recording();
            let ops = recording.ops();
            let end = ops.len();
            let takes = |op: &Op| matches!(op, Op::Remove(_) | Op::Rename(..));
            let last = ops.iter().rposition(|op| takes(&op.change)).unwrap();
            let syncs = |from: usize, to: usize| -> BTreeSet<usize> {
                let here = (from..to).filter(|at| matches!(ops[*at].change, Op::SyncDir(_)));
                here.collect()
            };
            // What is deleted needs nothing in its place, and what is gone back to is there.
            let replaces = !["delete", "revert"].contains(&what);
            let before = replaces.then(|| syncs(0, last));
            for taken in before.into_iter().chain([syncs(last, end)]) {
                let shown = crash::each_state(
                    &recording.without(taken.clone()),
                    &mut Rng::with_seed(1),
                    400,
                    &mut HashSet::new(),
                    |at| usize::from(at == end),
                    &mut |at, state, _| change.judge(state, at == end),
                );
                let kind = base.spec.subformat.as_deref().unwrap_or_default();
                assert!(shown.is_err(), "{kind}, {what}: no crash misses {taken:?}");
            }
        }
    });
}
