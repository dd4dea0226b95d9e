//! What is recorded, and how its crashes are judged.

use std::collections::HashSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fastrand::Rng;
use flatdisk::formats::plan::Change as Shown;
use flatdisk::formats::{self, CreateSpec, OpenOptions, chain};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::recording::{Caller, Change, Op, Recording, RecordingHost};
use flatdisk::storage::{Access, Host, Storage};

use super::SEED;
use super::common::chains::ChangeOfChain;
use super::common::crash::{compare, contents, each_state, record, recover, run_steps, workload};
use super::common::history::{History, Legal, Sectors};
use super::common::images::{Image, Kind, errors};
use super::common::pattern;
use super::common::repairs::{self, Case};
use super::common::workload::Step;

/// What changes chains, by what drivers do.
const CHAIN: &str = "chain.rs";
/// Functions that others call for what they do.
const HELPERS: [&str; 4] = ["append", "apply", "each", "update"];
/// Functions that stand before a file.
const WRAPPERS: [&str; 9] = [
    "allocate",
    "change",
    "extend",
    "punch_hole",
    "set_len",
    "sync",
    "sync_changes",
    "sync_for",
    "write_at",
];

/// Judges a state: what was promised before the first position must be there, what began before the
/// second may be.
pub type Judge<'a> =
    Box<dyn Fn(usize, usize, &Arc<MemoryHost>, u64) -> Result<(), String> + Send + Sync + 'a>;

/// Something that was recorded, and what its crashes may leave.
pub struct Trace<'a> {
    pub name: String,
    pub recording: Recording,
    /// Where each operation came from.
    pub places: Vec<Place>,
    /// What is to be taken away from it.
    pub scope: Scope,
    /// The operation on a chain, and what it consists of, in order.
    pub operation: String,
    pub stages: Vec<Stage>,
    pub judge: Judge<'a>,
}

/// What is to be taken away from a recording.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Syncs and orders.
    All,
    /// What no other recording has.
    New,
    /// Syncs, and the order of stages.
    Stages,
}

/// What one line of an operation on a chain does.
pub struct Stage {
    pub name: String,
    pub ops: Range<usize>,
}

impl<'a> Trace<'a> {
    fn new(name: String, recording: Recording, judge: Judge<'a>) -> Self {
        let places = recording.ops().iter().map(|op| Place::of(&recording, op)).collect();
        let (operation, stages) = (String::new(), Vec::new());
        Self { name, recording, places, scope: Scope::All, operation, stages, judge }
    }
}

/// The place in a driver that an operation came from. Two syncs of one function differ in their lines.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    pub name: String,
    pub line: u32,
}

impl Place {
    pub fn of(recording: &Recording, op: &Op) -> Self {
        // What formats share is told apart by the files.
        let file = recording.path(op.file);
        let format =
            file.extension().map_or_else(String::new, |e| e.to_string_lossy().into_owned());
        if let Some(purpose) = op.purpose {
            return Self { name: format!("{format} sync: {purpose}"), line: 0 };
        }
        let here = |c: &&Caller| !WRAPPERS.contains(&&*c.function) && c.file != CHAIN;
        let mut callers = op.origin.iter().filter(here);
        let mut by = String::new();
        let mut own = None;
        for caller in &mut callers {
            if HELPERS.contains(&&*caller.function) {
                by = format!(" by {}", caller.function);
            } else {
                own = Some(caller);
                break;
            }
        }
        match own {
            None => {
                let names = matches!(op.change, Change::Remove(_) | Change::SyncDir(_));
                Self { name: if names { "names" } else { "payload" }.to_owned(), line: 0 }
            }
            // Not every wrapper of a file passes on what a sync is for.
            Some(own) if own.file.starts_with("disk/") && is_sync(op) => {
                Self { name: format!("{format} sync: payload"), line: 0 }
            }
            Some(own) if own.file.starts_with("disk/") => {
                Self { name: format!("{format} {}", own.function), line: 0 }
            }
            Some(own) => Self {
                name: format!("{} {}{by}", own.file, own.function),
                line: if is_sync(op) { own.line } else { 0 },
            },
        }
    }
}

pub fn is_sync(op: &Op) -> bool {
    matches!(op.change, Change::Sync | Change::SyncDir(_))
}

/// A history and the recording it goes with.
type Recorded = (History, Recording);

/// What tells children whether a disk has changed, where its format has that, and what it holds.
fn identified(
    kind: &dyn Kind,
    files: &Arc<MemoryHost>,
) -> Result<(Option<String>, Sectors), String> {
    let host: Arc<dyn Host> = files.fork();
    let disk = kind.open(&host, Access::Read).map_err(|e| e.to_string())?;
    let identity = kind.identity(&host).map_err(|e| e.to_string())?;
    Ok((identity, contents(&disk)?))
}

/// Records workloads on a kind of image, and first writes after their crashes.
pub fn record_kind<'a>(kind: &'a dyn Kind, random: &mut Rng) -> Vec<Trace<'a>> {
    let mut traces = Vec::new();
    let mut keep = |name: &str, files: &Arc<MemoryHost>, (history, recording): Recorded| {
        let before = identified(kind, files).unwrap();
        let judge: Judge<'a> = Box::new(move |kept, at, state, seed| {
            let legal = history.legal_between(kept, at);
            recover(kind, RecordingHost::over(state), &legal, seed)?;
            let now = identified(kind, state)?;
            match now.0.is_some() && now.0 == before.0 && now.1 != before.1 {
                true => Err("what the disk holds has changed, its identifiers have not".to_owned()),
                false => Ok(()),
            }
        });
        traces.push(Trace::new(format!("{name} of {}", kind.name()), recording, judge));
    };
    let created = MemoryHost::new();
    kind.create(&created).unwrap();
    let rounds: &[usize] = match (kind.share(), kind.stride()) {
        (_, Some(_)) => &[0],
        (1, None) => &[0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 16, 17, 18],
        _ => &[0, 5],
    };
    for &round in rounds {
        let done = workload(kind, traced(&created), random, round).unwrap();
        let (history, recording) = done.clone();
        keep("workload", &created, done);
        // From each, some crashes are recovered from.
        let mut recoveries = Vec::new();
        let count = if kind.stride().is_some() { 2 } else { 8 };
        let mut check = |at: usize, state: &Arc<MemoryHost>, seed: u64| {
            let done = recover(kind, traced(state), &history.legal_at(at), seed)?;
            recoveries.push((state.clone(), done));
            Ok(())
        };
        each_state(&recording, random, count, &mut HashSet::new(), |_| 0, &mut check).unwrap();
        recoveries.into_iter().for_each(|(state, done)| keep("recovery", &state, done));
    }
    if kind.share() == 1 {
        let done = record(kind, traced(&created), |runner| {
            let block = runner.disk.geometry().block_size.min(runner.disk.size() / 4);
            run_steps(runner, &give_up_the_end(block))
        });
        keep("giving up the end", &created, done.unwrap());
    }
    traces
}

/// What was stored last is given up, in all ways, before the image is closed.
fn give_up_the_end(block: u64) -> Vec<Step> {
    let mut steps = Vec::new();
    for (kept, given_up) in [(0, 1), (2, 3), (1, 2)] {
        let write = |at: u64| Step::Write { at: at * block, len: 2048 };
        let discard = Step::Discard { at: given_up * block, len: block };
        steps.extend([write(kept), write(given_up), Step::Flush, discard.clone()]);
        steps.extend([Step::Reopen, write(given_up), Step::Flush, discard, Step::Flush]);
        steps.extend([write(kept + 4), Step::Reopen]);
    }
    steps.retain(|step| !matches!(step, Step::Write { at, .. } if *at >= block * 4));
    steps
}

/// Records the creation of an image. A name that leads to an image leads to a whole one.
pub fn record_creation(image: &Image) -> Trace<'_> {
    let recorder = traced(&MemoryHost::new());
    image.create_at(&*recorder, &image.path()).unwrap();
    let recording = recorder.recording();
    let done = recording.ops().len();
    let judge: Judge<'_> = Box::new(move |kept, _, state, _| {
        let host: Arc<dyn Host> = state.fork();
        let disk = match image.open(&host, Access::Read) {
            Err(e) if kept >= done => return Err(e.to_string()),
            Err(_) => return Ok(()),
            Ok(disk) => disk,
        };
        compare(&disk, &Legal::default()).map(drop)?;
        let errors = errors(&host, &image.path()).map_err(|e| e.to_string())?;
        let whole = errors.is_empty() || kept < done;
        if whole { Ok(()) } else { Err(errors.join("; ")) }
    });
    Trace::new(format!("creation of {}", image.name()), recording, judge)
}

/// Records a child's change to another parent, which holds the same.
pub fn record_relink(image: &Image, footer_copy: bool) -> Trace<'_> {
    let files = MemoryHost::new();
    let host: Arc<dyn Host> = files.clone();
    let path = |name: &str| PathBuf::from(format!("/t/{name}.{}", image.format));
    let (parent, child, other) = (path("parent"), path("child"), path("a parent with a long name"));
    let write = |at: &Path, stamp: u32, from: u64| {
        let disk = formats::open(&host, at, &OpenOptions::new(Access::Write)).unwrap().disk;
        disk.write_at(from, &pattern::bytes(stamp, from, 5000)).unwrap();
        disk.close().unwrap();
    };
    image.create_at(&*host, &parent).unwrap();
    write(&parent, 1, 0);
    let opened = formats::open(&host, &parent, &OpenOptions::new(Access::Read)).unwrap();
    let format = formats::by_name(image.format).unwrap();
    for name in [&child, &other] {
        formats::create_child(format, &*files, name, &opened, &CreateSpec::default()).unwrap();
    }
    drop(opened);
    write(&child, 2, 2048);
    if !footer_copy {
        files.file(&child).unwrap().write_at(0, &[0xdb; 512]).unwrap();
    }
    let read = |host: &Arc<dyn Host>, at: &Path| -> Result<(Sectors, Option<PathBuf>), String> {
        let image = formats::open(host, at, &OpenOptions::new(Access::Read));
        let image = image.map_err(|e| e.to_string())?;
        Ok((contents(&image.disk)?, image.parent.map(|parent| parent.path)))
    };
    let expected = read(&host, &child).unwrap().0;
    let recorder = traced(&files);
    let recorded: Arc<dyn Host> = recorder.clone();
    let options = OpenOptions::new(Access::Read);
    chain::rebase(&recorded, &child, &other, &options, true, &()).unwrap();
    let recording = recorder.recording();
    let done = recording.ops().len();
    let judge: Judge<'_> = Box::new(move |kept, _, state, _| {
        let host: Arc<dyn Host> = state.fork();
        let (found, found_parent) = read(&host, &child)?;
        if found != expected {
            return Err("the child holds something else".to_owned());
        }
        if kept >= done && found_parent.as_ref() != Some(&other) {
            return Err(format!("the parent is {found_parent:?}"));
        }
        let errors = errors(&host, &child).map_err(|e| e.to_string())?;
        let counts = |error: &String| kept >= done || !error.contains("footer");
        let errors: Vec<_> = errors.into_iter().filter(counts).collect();
        if errors.is_empty() { Ok(()) } else { Err(errors.join("; ")) }
    });
    Trace::new(format!("relinking of a child of {}", image.name()), recording, judge)
}

/// Records the repair of an image. Its operations come from what the plan calls them: once each sync
/// from what is before and behind it, and once all that are behind the same kind of change together.
pub fn record_repair(case: &Case) -> [Trace<'_>; 2] {
    let damaged = Arc::new(case.damaged());
    let recorder = traced(&damaged.host);
    let recorded: Arc<dyn Host> = recorder.clone();
    let changes = repairs::mend(case, &recorded, false).unwrap().changes;
    let recording = recorder.recording();
    let done = recording.ops().len();
    let trace = |places| {
        let damaged = damaged.clone();
        let judge: Judge<'_> =
            Box::new(move |kept, _, state, _| damaged.judge(state, kept >= done));
        let name = format!("repair of {}", case.name());
        Trace { places, ..Trace::new(name, recording.clone(), judge) }
    };
    let places = places_in_plans(case.image.format, &changes, &recording);
    let mut together = places.clone();
    for place in &mut together {
        if let Some((before, _)) = place.name.split_once(" /") {
            place.name = format!("{before}, all syncs behind");
        }
    }
    [trace(places), Trace { scope: Scope::Stages, ..trace(together) }]
}

/// Names for the operations of a repair: a change has that of the plan; a sync has those of the change
/// before and the one behind, with `/` between them inside a plan, `//` where one ends.
fn places_in_plans(format: &str, changes: &[Shown], recording: &Recording) -> Vec<Place> {
    let ops = recording.ops();
    let plain = |shown: &Shown| {
        shown
            .what
            .split(' ')
            .filter(|word| !word.starts_with(|c: char| c.is_ascii_digit()))
            .map(|word| word.trim_end_matches(','))
            .collect::<Vec<_>>()
            .join(" ")
    };
    let mut shown = changes.iter();
    let (mut name, mut left) = (String::new(), 0);
    let mut names = Vec::new();
    for op in ops {
        names.push(if is_sync(op) {
            None
        } else {
            // What is copied is written in pieces, zeroes as holes.
            if left == 0 {
                let change = shown.next().unwrap();
                (name, left) = (plain(change), change.length);
            }
            left = match &op.change {
                Change::Write { data, .. } => left.saturating_sub(data.len() as u64),
                Change::Punch(range) => left.saturating_sub(range.end - range.start),
                _ => 0,
            };
            Some(name.clone())
        });
    }
    assert!(shown.next().is_none());
    let place = |at: usize| {
        let name = match &names[at] {
            Some(name) => name.clone(),
            None => {
                let plans = ops[at].origin.iter().filter(|c| c.function == "carry_out").count();
                let same = |(index, name): (usize, &Option<String>)| {
                    name.clone().filter(|_| ops[index].file == ops[at].file)
                };
                let before = names.iter().enumerate().take(at).rev().find_map(same);
                let behind = names.iter().enumerate().skip(at).find_map(same);
                let between = if plans > 1 { "/" } else { "//" };
                let name = |name: Option<String>| name.unwrap_or_default();
                format!("{} {between} {}", name(before), name(behind)).trim_end().to_owned()
            }
        };
        Place { name: format!("{format} repair: {name}"), line: 0 }
    };
    (0..ops.len()).map(place).collect()
}

/// Records a change of a chain: once with the places in the drivers, and once with those and with what
/// they are used for.
pub fn record_change<'a>(base: &'a Image, operation: &'static str) -> [Trace<'a>; 2] {
    let mut change = ChangeOfChain::new(base, operation, &mut Rng::with_seed(SEED));
    let recorder = traced(&change.host);
    change.run(&recorder).unwrap();
    let (change, recording) = (Arc::new(change), recorder.recording());
    let done = recording.ops().len();
    let trace = || {
        let change = change.clone();
        let judge: Judge<'a> = Box::new(move |kept, _, state, _| change.judge(state, kept >= done));
        Trace::new(format!("{operation}, {}", base.name()), recording.clone(), judge)
    };
    let stages = stages(&recording);
    let name = |(at, mut place): (usize, Place)| {
        let stage = stages.iter().find(|stage| stage.ops.contains(&at)).unwrap();
        place.name = format!("{} {operation}, {}: {}", base.format, stage.name, place.name);
        place
    };
    let by_stage = format!("{} {operation}", base.format);
    let places = trace().places.into_iter().enumerate().map(name).collect();
    let by_driver = Trace { scope: Scope::New, ..trace() };
    [by_driver, Trace { places, scope: Scope::Stages, operation: by_stage, stages, ..trace() }]
}

/// The lines of the operation on a chain, named after what they call.
fn stages(recording: &Recording) -> Vec<Stage> {
    let mut stages: Vec<Stage> = Vec::new();
    let mut last = (0, String::new());
    for (at, op) in recording.ops().iter().enumerate() {
        let outermost = op.origin.iter().rposition(|caller| caller.file == CHAIN).unwrap();
        let called = match op.change {
            Change::Remove(_) => "remove",
            Change::SyncDir(_) => "sync_dir",
            // A method that only hands on may be missing on the stack.
            _ => match &*op.origin[outermost - 1].function {
                "begin" => "begin_writes",
                "finish" => "close",
                function => function,
            },
        };
        let line = if called == "remove" { 0 } else { op.origin[outermost].line };
        if last != (line, called.to_owned()) {
            last = (line, called.to_owned());
            let earlier = stages.iter().filter(|stage| stage.name.starts_with(called)).count();
            let number = if earlier > 0 { format!(" {}", earlier + 1) } else { String::new() };
            stages.push(Stage { name: format!("{called}{number}"), ops: at..at });
        }
        if let Some(stage) = stages.last_mut() {
            stage.ops.end = at + 1;
        }
    }
    stages
}

/// A recorder that notes where operations come from.
fn traced(files: &MemoryHost) -> Arc<RecordingHost> {
    let recorder = RecordingHost::over(files);
    recorder.trace();
    recorder
}
