//! Proof that crash tests see every sync and every order of writes that the drivers rely on: each is
//! taken away in turn, and a crash must show it.
//!
//! Workloads, first writes after crashes, creations and changes of parents are recorded together with
//! the place in the driver that each operation came from. Nothing is run anew for the rest:
//!
//! - *Without a sync*: all syncs of one place are taken to have done nothing.
//! - *Swapped*: of two kinds of writes that a sync keeps apart, the later is taken to have been made
//!   before the sync, which a crash then interrupts: it may leave the later write without the earlier.
//!   All other writes before the sync are there, none of the others behind it are.
//!
//! Either must leave a state that is wrong, or stand in [`HARMLESS`] with the reason.

// The helpers here serve tests only.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "ordering/harmless.rs"]
mod harmless;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::crash::{compare, contents, each_state, record, recover, run_steps, workload};
use common::history::{History, Legal, Sectors};
use common::images::{Image, Kind, all_small, errors, small};
use common::workload::Step;
use common::{in_parallel, pattern};
use fastrand::Rng;
use flatdisk::formats::{self, CreateSpec, OpenOptions, chain};
use flatdisk::storage::crash::{CrashPoint, Fate};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::recording::{Change, Op, Recording, RecordingHost};
use flatdisk::storage::{Access, Host, Storage};
use harmless::HARMLESS;

/// Functions that others call for what they do.
const HELPERS: [&str; 5] = ["append", "apply", "each", "update", "sync_written"];
/// Functions that stand before a file.
const WRAPPERS: [&str; 7] =
    ["allocate", "change", "punch_hole", "set_len", "sync", "sync_changes", "write_at"];

/// The same run every time, so that what is found does not depend on chance.
const SEED: u64 = 1;

/// Where each fault is looked for at most: syncs, and crashes until the next sync of the same file.
const SYNCS_PER_FAULT: usize = 100;
const POINTS_PER_SYNC: usize = 4;
/// States times operations of their recordings after which a search is given up.
const EFFORT: usize = 60_000;

/// Judges a state: what was promised before the first position must be there, what began before the
/// second may be.
type Judge<'a> =
    Box<dyn Fn(usize, usize, &Arc<MemoryHost>, u64) -> Result<(), String> + Send + Sync + 'a>;

/// Something that was recorded, and what its crashes may leave.
struct Trace<'a> {
    name: String,
    recording: Recording,
    judge: Judge<'a>,
}

/// The place in a driver that an operation came from. Two syncs of one function differ in their lines.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Place {
    name: String,
    line: u32,
}

impl Place {
    fn of(op: &Op) -> Self {
        let mut callers = op.origin.iter().filter(|c| !WRAPPERS.contains(&&*c.function));
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
            None => Self { name: "payload".to_owned(), line: 0 },
            Some(own) => Self {
                name: format!("{} {}{by}", own.file, own.function),
                line: if is_sync(op) { own.line } else { 0 },
            },
        }
    }
}

/// Names for places: which sync of its function it is takes the place of the line.
struct Names(BTreeMap<String, BTreeSet<u32>>);

impl Names {
    fn of(traces: &[Trace<'_>]) -> Self {
        let mut lines: BTreeMap<String, BTreeSet<u32>> = BTreeMap::new();
        for op in traces.iter().flat_map(|trace| trace.recording.ops()) {
            let place = Place::of(op);
            if place.line > 0 {
                lines.entry(place.name).or_default().insert(place.line);
            }
        }
        Self(lines)
    }

    fn name(&self, place: &Place) -> String {
        match self.0.get(&place.name) {
            Some(lines) if lines.len() > 1 && place.line > 0 => {
                format!("{} {}", place.name, lines.range(..=place.line).count())
            }
            _ => place.name.clone(),
        }
    }
}

/// Something that is taken away.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// All syncs of a place.
    Without(Place),
    /// What the sync does to the order of these two writes.
    Swapped { sync: Place, earlier: Place, later: Place },
}

impl Fault {
    /// Sync, earlier and later write.
    fn names(&self, names: &Names) -> [String; 3] {
        match self {
            Self::Without(sync) => [names.name(sync), String::new(), String::new()],
            Self::Swapped { sync, earlier, later } => [sync, earlier, later].map(|p| names.name(p)),
        }
    }
}

/// What became of it.
enum Outcome {
    Found(String),
    Unseen { states: usize },
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Found(how) => f.write_str(how),
            Self::Unseen { states } => write!(f, "nothing wrong in {states} states"),
        }
    }
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
fn record_kind<'a>(kind: &'a dyn Kind, random: &mut Rng) -> Vec<Trace<'a>> {
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
        traces.push(Trace { name: format!("{name} of {}", kind.name()), recording, judge });
    };
    let created = MemoryHost::new();
    kind.create(&created).unwrap();
    let traced = |files: &MemoryHost| {
        let recorder = RecordingHost::over(files);
        recorder.trace();
        recorder
    };
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
fn record_creation(image: &Image) -> Trace<'_> {
    let recorder = RecordingHost::over(&MemoryHost::new());
    recorder.trace();
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
    Trace { name: format!("creation of {}", image.name()), recording, judge }
}

/// Records a child's change to another parent, which holds the same.
fn record_relink(image: &Image, footer_copy: bool) -> Trace<'_> {
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
    let recorder = RecordingHost::over(&files);
    recorder.trace();
    let recorded: Arc<dyn Host> = recorder.clone();
    let options = OpenOptions::new(Access::Read);
    chain::rebase(&recorded, &child, &other, &options, true, &mut |_| ()).unwrap();
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
    Trace { name: format!("relinking of a child of {}", image.name()), recording, judge }
}

fn is_sync(op: &Op) -> bool {
    matches!(op.change, Change::Sync | Change::SyncDir(_))
}

/// The position of the next sync of a file after `at`, or the end.
fn next_sync(recording: &Recording, at: usize) -> usize {
    let ops = recording.ops();
    let same = |op: &Op| matches!(op.change, Change::Sync) && op.file == ops[at].file;
    (at + 1..ops.len()).find(|next| same(&ops[*next])).unwrap_or(ops.len())
}

/// The position of the sync of the same file before `at`, or the beginning.
fn sync_before(recording: &Recording, at: usize) -> usize {
    let ops = recording.ops();
    let same = |op: &Op| matches!(op.change, Change::Sync) && op.file == ops[at].file;
    ops[..at].iter().rposition(same).map_or(0, |before| before + 1)
}

/// Places of the changes of one file.
fn changes(recording: &Recording, range: std::ops::Range<usize>, file: usize) -> BTreeSet<Place> {
    let own = |op: &&Op| op.file == file && !matches!(op.change, Change::Sync);
    recording.ops()[range].iter().filter(own).map(Place::of).collect()
}

/// Everything that can be taken away, and at which syncs: the number of the trace, and the position.
fn faults(traces: &[Trace<'_>]) -> BTreeMap<Fault, Vec<(usize, usize)>> {
    let mut faults: BTreeMap<Fault, Vec<(usize, usize)>> = BTreeMap::new();
    for (number, trace) in traces.iter().enumerate() {
        let recording = &trace.recording;
        for (at, op) in recording.ops().iter().enumerate().filter(|(_, op)| is_sync(op)) {
            let sync = Place::of(op);
            faults.entry(Fault::Without(sync.clone())).or_default().push((number, at));
            if matches!(op.change, Change::SyncDir(_)) {
                continue;
            }
            let before = changes(recording, sync_before(recording, at)..at, op.file);
            let after = changes(recording, at..next_sync(recording, at), op.file);
            for earlier in &before {
                for later in &after {
                    let (sync, earlier, later) = (sync.clone(), earlier.clone(), later.clone());
                    let fault = Fault::Swapped { sync, earlier, later };
                    faults.entry(fault).or_default().push((number, at));
                }
            }
        }
    }
    faults
}

/// Looks for a state that is wrong because of `fault`, at some of the `syncs` that have it.
fn search(traces: &[Trace<'_>], fault: &Fault, syncs: &[(usize, usize)]) -> Outcome {
    let random = &mut Rng::with_seed(SEED);
    let mut syncs = syncs.to_vec();
    random.shuffle(&mut syncs);
    let effort = |(number, _): &(usize, usize)| traces[*number].recording.ops().len();
    // Long recordings take long: only what no other shows is worth looking for in them.
    syncs.sort_by_key(|sync| effort(sync) > 500);
    syncs.truncate(SYNCS_PER_FAULT);
    // Where there are few, each is looked at more closely.
    let draws = SYNCS_PER_FAULT / syncs.len();
    let mut seen = HashSet::new();
    let mut spent = 0;
    for (number, sync) in syncs {
        if spent > EFFORT {
            break;
        }
        let (trace, before) = (&traces[number], seen.len());
        if let Err(e) = search_at(trace, fault, sync, draws, random, &mut seen) {
            return Outcome::Found(format!(
                "{}: {}",
                trace.name,
                e.lines().next().unwrap_or_default()
            ));
        }
        spent += (seen.len() - before) * trace.recording.ops().len();
    }
    Outcome::Unseen { states: seen.len() }
}

fn search_at(
    trace: &Trace<'_>,
    fault: &Fault,
    sync: usize,
    draws: usize,
    random: &mut Rng,
    seen: &mut HashSet<(usize, u64)>,
) -> Result<(), String> {
    let ops = trace.recording.ops();
    let file = ops[sync].file;
    let from = |place: &Place, at: usize| {
        ops[at].file == file && !is_sync(&ops[at]) && Place::of(&ops[at]) == *place
    };
    let (ignored, mut points) = match fault {
        Fault::Without(place) => {
            let all =
                (0..ops.len()).filter(|at| is_sync(&ops[*at]) && Place::of(&ops[*at]) == *place);
            (all.collect(), (sync + 1..=next_sync(&trace.recording, sync)).collect::<Vec<_>>())
        }
        Fault::Swapped { later, .. } => {
            let behind = sync + 1..next_sync(&trace.recording, sync);
            let points = behind.filter(|at| from(later, *at)).map(|at| at + 1);
            (BTreeSet::from([sync]), points.collect())
        }
    };
    let recording = trace.recording.without(ignored);
    while points.len() > POINTS_PER_SYNC {
        points.remove(random.usize(..points.len()));
    }
    let fixed = [(true, true), (true, false), (false, true)];
    let draws: Vec<_> =
        fixed.into_iter().chain(std::iter::repeat_n((false, false), draws)).collect();
    let mut point = CrashPoint::start(&recording);
    for at in points {
        while point.at() < at && point.advance() {}
        for &(lost, kept) in &draws {
            let before = |random: &mut Rng| if lost { Fate::Lost } else { torn(random) };
            let behind = |random: &mut Rng| if kept { Fate::Kept } else { torn(random) };
            let fate = |index: &usize| match fault {
                Fault::Without(_) if *index < sync => before(random),
                Fault::Without(_) => behind(random),
                Fault::Swapped { earlier, .. } if *index < sync => match from(earlier, *index) {
                    true => before(random),
                    false => Fate::Kept,
                },
                Fault::Swapped { later, .. } => match from(later, *index) {
                    true => behind(random),
                    false => Fate::Lost,
                },
            };
            let fates: Vec<_> = point.pending().iter().map(fate).collect();
            let state = point.state(&fates);
            if !seen.insert((at, state.digest())) {
                continue;
            }
            // A sync that is under way has promised nothing yet.
            let promised = if matches!(fault, Fault::Without(_)) { at } else { sync };
            (trace.judge)(promised, at, &state, random.u64(..))?;
        }
    }
    Ok(())
}

fn torn(random: &mut Rng) -> Fate {
    match random.u8(..3) {
        0 => Fate::Lost,
        1 => Fate::Kept,
        _ => Fate::Torn { runs: random.u64(..), grown: random.bool() },
    }
}

#[test]
fn every_sync_and_every_order_is_one_that_a_crash_can_show() {
    let began = std::time::Instant::now();
    let kinds = all_small();
    let mut images = small();
    images.retain(|image| image.tweak.is_none() && image.share == 1);
    let recorded = in_parallel(&kinds, |kind| record_kind(&**kind, &mut Rng::with_seed(SEED)));
    let mut traces: Vec<_> = recorded.into_iter().flatten().collect();
    traces.extend(images.iter().map(record_creation));
    let sparse = |image: &&Image| !image.fixed();
    traces.extend(images.iter().filter(sparse).map(|image| record_relink(image, true)));
    let vhd = |image: &&Image| sparse(image) && image.format == "vhd";
    traces.extend(images.iter().filter(vhd).map(|image| record_relink(image, false)));
    let names = Names::of(&traces);
    let faults: Vec<_> = faults(&traces).into_iter().collect();
    println!("{} recordings, {} faults, {:?}", traces.len(), faults.len(), began.elapsed());

    let outcomes = in_parallel(&faults, |(fault, syncs)| search(&traces, fault, syncs));
    println!("searched after {:?}", began.elapsed());
    let mut wrong = Vec::new();
    let mut excused = BTreeSet::new();
    for ((fault, _), outcome) in faults.iter().zip(&outcomes) {
        let [sync, earlier, later] = fault.names(&names);
        let line = match fault {
            Fault::Without(_) => format!("without {sync}"),
            Fault::Swapped { .. } => format!("{sync}: {later} before {earlier}"),
        };
        let matches = |pattern: &str, name: &String| match pattern.strip_suffix('*') {
            Some(start) => !name.is_empty() && name.starts_with(start),
            None => pattern == name,
        };
        let excuse = HARMLESS.iter().position(|(s, a, b, _)| {
            matches(s, &sync) && matches(a, &earlier) && matches(b, &later)
        });
        match (outcome, excuse) {
            (Outcome::Found(_), _) => println!("{line}\n    {outcome}"),
            (Outcome::Unseen { .. }, Some(index)) => {
                excused.insert(index);
                println!("{line}\n    {outcome}: {}", HARMLESS[index].3);
            }
            (Outcome::Unseen { .. }, None) => {
                println!("{line}\n    {outcome}: UNEXPLAINED");
                wrong.push(line);
            }
        }
    }
    for (index, (sync, earlier, later, _)) in HARMLESS.iter().enumerate() {
        if !excused.contains(&index) {
            wrong.push(format!("no longer harmless, or gone: {sync}: {later} before {earlier}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
