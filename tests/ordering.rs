//! Proof that crash tests see every sync and every order of writes that the drivers, repairs and changes
//! of chains rely on: each is taken away in turn, and a crash must show it.
//!
//! Workloads, first writes after crashes, creations, changes of parents, repairs and merges are recorded
//! together with the place in the driver that each operation came from; of a repair, with what its plan
//! calls the step. Nothing is run anew for the rest:
//!
//! - *Without a sync*: all syncs of one place are taken to have done nothing.
//! - *Swapped*: of two kinds of writes that a sync keeps apart, the later is taken to have been made
//!   before the sync, which a crash then interrupts: it may leave the later write without the earlier.
//!   All other writes before the sync are there, none of the others behind it are.
//! - *Early*: a stage of a merge or rebase is taken to have gone before an earlier one of another file
//!   was durable: of that file a crash leaves what the earlier stage had made of it at some moment.
//!
//! Each must leave a state that is wrong, or stand in [`HARMLESS`] with the reason. What a merge makes a
//! driver do is needed for what the driver promises; there it is enough that a workload shows it, for
//! what the merge promises is taken away stage by stage.

// The helpers here serve tests only.
#![allow(clippy::unwrap_used)]

#[path = "ordering/changes.rs"]
mod changes;
mod common;
#[path = "ordering/harmless.rs"]
mod harmless;
#[path = "ordering/traces.rs"]
mod traces;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;

use common::images::{Image, Kind, all_small, small};
use common::{chains, in_parallel, repairs};
use fastrand::Rng;
use flatdisk::storage::crash::{CrashPoint, Fate};
use flatdisk::storage::recording::{Change, Op, Recording};
use harmless::HARMLESS;
use traces::{
    Place, Scope, Stage, Trace, is_sync, record_change, record_creation, record_kind,
    record_relink, record_repair,
};

/// The same run every time, so that what is found does not depend on chance.
const SEED: u64 = 1;

/// Where each fault is looked for at most: syncs, and crashes until the next sync of the same file.
const SYNCS_PER_FAULT: usize = 100;
const POINTS_PER_SYNC: usize = 4;
const SYNCS_PER_STAGE: usize = 12;
/// States times operations of their recordings after which a search is given up.
const EFFORT: usize = 60_000;

/// Names for places: which sync of its function it is takes the place of the line.
struct Names(BTreeMap<String, BTreeSet<u32>>);

impl Names {
    fn of(traces: &[Trace<'_>]) -> Self {
        let mut lines: BTreeMap<String, BTreeSet<u32>> = BTreeMap::new();
        for place in traces.iter().flat_map(|trace| &trace.places).filter(|p| p.line > 0) {
            lines.entry(place.name.clone()).or_default().insert(place.line);
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
    /// What lets one stage of a change of a chain, as far as it changes a file, be durable before a
    /// later one begins.
    Early { operation: String, stage: String, file: String, later: String },
}

impl Fault {
    /// Sync, earlier and later write.
    fn names(&self, names: &Names) -> [String; 3] {
        match self {
            Self::Without(sync) => [names.name(sync), String::new(), String::new()],
            Self::Swapped { sync, earlier, later } => [sync, earlier, later].map(|p| names.name(p)),
            Self::Early { operation, stage, file, later } => {
                [operation.clone(), format!("{stage} of {file}"), later.clone()]
            }
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

/// Places of the changes of one file, whose name a sync does not cover.
fn changes(trace: &Trace<'_>, range: std::ops::Range<usize>, file: usize) -> BTreeSet<Place> {
    let ops = trace.recording.ops();
    let other = |change: &Change| matches!(change, Change::Sync | Change::Remove(_));
    let own = |at: &usize| ops[*at].file == file && !other(&ops[*at].change);
    range.filter(own).map(|at| trace.places[at].clone()).collect()
}

/// Where a fault can be looked for: the number of the trace, and the position in it.
type Faults = BTreeMap<Fault, Vec<(usize, usize)>>;

/// Everything that can be taken away from recordings of that scope.
fn faults(traces: &[Trace<'_>], scope: Scope) -> Faults {
    let mut faults = Faults::new();
    for (number, trace) in traces.iter().enumerate().filter(|(_, trace)| trace.scope == scope) {
        let recording = &trace.recording;
        for (at, op) in recording.ops().iter().enumerate().filter(|(_, op)| is_sync(op)) {
            let sync = &trace.places[at];
            faults.entry(Fault::Without(sync.clone())).or_default().push((number, at));
            if matches!(op.change, Change::SyncDir(_)) || scope == Scope::Stages {
                continue;
            }
            let before = changes(trace, sync_before(recording, at)..at, op.file);
            let after = changes(trace, at..next_sync(recording, at), op.file);
            for earlier in &before {
                for later in &after {
                    let (sync, earlier, later) = (sync.clone(), earlier.clone(), later.clone());
                    let fault = Fault::Swapped { sync, earlier, later };
                    faults.entry(fault).or_default().push((number, at));
                }
            }
        }
        for (index, stage) in trace.stages.iter().enumerate() {
            for later in &trace.stages[index + 1..] {
                for (fault, at) in early(trace, stage, later) {
                    faults.entry(fault).or_default().push((number, at));
                }
            }
        }
    }
    faults
}

/// The files that one stage changes and that a later one may not overtake, because it changes others;
/// and where the stage first does so.
fn early(trace: &Trace<'_>, stage: &Stage, later: &Stage) -> BTreeMap<Fault, usize> {
    let recording = &trace.recording;
    let changed = |at: &usize| !is_sync(&recording.ops()[*at]);
    let path = |at: usize| recording.path(recording.ops()[at].file);
    let mut faults = BTreeMap::new();
    for at in stage.ops.clone().filter(changed) {
        if later.ops.clone().filter(changed).any(|other| path(other) != path(at)) {
            let file = path(at).file_name().unwrap().to_string_lossy().into_owned();
            let (operation, stage, later) =
                (trace.operation.clone(), stage.name.clone(), later.name.clone());
            faults.entry(Fault::Early { operation, stage, file, later }).or_insert(at);
        }
    }
    faults
}

/// Looks for a state that is wrong because of `fault`, at some of the `syncs` that have it.
fn search(traces: &[Trace<'_>], fault: &Fault, syncs: &[(usize, usize)], tries: usize) -> Outcome {
    let random = &mut Rng::with_seed(SEED);
    let mut syncs = syncs.to_vec();
    random.shuffle(&mut syncs);
    let effort = |(number, _): &(usize, usize)| traces[*number].recording.ops().len();
    // Long recordings take long: only what no other shows is worth looking for in them.
    syncs.sort_by_key(|sync| effort(sync) > 500);
    syncs.truncate(tries);
    // Where there are few, each is looked at more closely.
    let draws = tries / syncs.len();
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
    at: usize,
    draws: usize,
    random: &mut Rng,
    seen: &mut HashSet<(usize, u64)>,
) -> Result<(), String> {
    let ops = trace.recording.ops();
    let file = ops[at].file;
    let from = |place: &Place, at: usize| {
        ops[at].file == file && !is_sync(&ops[at]) && trace.places[at] == *place
    };
    let (ignored, mut points): (BTreeSet<usize>, Vec<usize>) = match fault {
        Fault::Without(place) => {
            let all = (0..ops.len()).filter(|at| is_sync(&ops[*at]) && trace.places[*at] == *place);
            (all.collect(), (at + 1..=next_sync(&trace.recording, at)).collect())
        }
        Fault::Swapped { later, .. } => {
            let behind = at + 1..next_sync(&trace.recording, at);
            let points = behind.filter(|at| from(later, *at)).map(|at| at + 1);
            (BTreeSet::from([at]), points.collect())
        }
        Fault::Early { later, .. } => {
            let own = (at..ops.len()).filter(|at| is_sync(&ops[*at]) && ops[*at].file == file);
            let later = trace.stages.iter().find(|stage| stage.name == *later).unwrap();
            (own.collect(), (later.ops.start + 1..=later.ops.end).collect())
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
    for here in points {
        while point.at() < here && point.advance() {}
        for &(lost, kept) in &draws {
            let before = |random: &mut Rng| if lost { Fate::Lost } else { torn(random) };
            let behind = |random: &mut Rng| if kept { Fate::Kept } else { torn(random) };
            let reached = reached(trace, at, lost, random);
            let fate = |index: &usize| match fault {
                Fault::Without(_) if *index < at => before(random),
                Fault::Without(_) => behind(random),
                Fault::Swapped { earlier, .. } if *index < at => match from(earlier, *index) {
                    true => before(random),
                    false => Fate::Kept,
                },
                Fault::Swapped { later, .. } => match from(later, *index) {
                    true => behind(random),
                    false => Fate::Lost,
                },
                Fault::Early { .. } if ops[*index].file != file => behind(random),
                Fault::Early { .. } => match *index {
                    index if index < reached.0 => Fate::Kept,
                    index if index < reached.1 => torn(random),
                    _ => Fate::Lost,
                },
            };
            let fates: Vec<_> = point.pending().iter().map(fate).collect();
            let state = point.state(&fates);
            if !seen.insert((here, state.digest())) {
                continue;
            }
            // A sync that is under way has promised nothing yet.
            let promised = if matches!(fault, Fault::Without(_)) { here } else { at };
            (trace.judge)(promised, here, &state, random.u64(..))?;
        }
    }
    Ok(())
}

/// How far the stage that has operation `at` got with its file: up to where all is durable, and up to
/// where it may be.
fn reached(trace: &Trace<'_>, at: usize, nowhere: bool, random: &mut Rng) -> (usize, usize) {
    let Some(stage) = trace.stages.iter().find(|stage| stage.ops.contains(&at)) else {
        return (at, at);
    };
    let end = if nowhere { at } else { random.usize(at..=stage.ops.end) };
    let ops = trace.recording.ops();
    let same = |op: &Op| matches!(op.change, Change::Sync) && op.file == ops[at].file;
    (ops[at..end].iter().rposition(same).map_or(at, |sync| at + sync), end)
}

fn torn(random: &mut Rng) -> Fate {
    match random.u8(..3) {
        0 => Fate::Lost,
        1 => Fate::Kept,
        _ => Fate::Torn { runs: random.u64(..), grown: random.bool() },
    }
}

/// Which of [`HARMLESS`] tells why a fault does no harm.
fn excuse([sync, earlier, later]: &[String; 3]) -> Option<usize> {
    let matches = |pattern: &str, name: &String| match pattern.strip_suffix('*') {
        Some(start) => !name.is_empty() && name.starts_with(start),
        None => pattern == name,
    };
    let fits = |(s, a, b, _): &(&str, &str, &str, &str)| {
        matches(s, sync) && matches(a, earlier) && matches(b, later)
    };
    HARMLESS.iter().position(fits)
}

/// What was recorded for the test.
fn record_all<'a>(
    kinds: &'a [Box<dyn Kind>],
    images: &'a [Image],
    cases: &'a [repairs::Case],
    bases: &'a [Image],
) -> Vec<Trace<'a>> {
    let recorded = in_parallel(kinds, |kind| record_kind(&**kind, &mut Rng::with_seed(SEED)));
    let mut traces: Vec<_> = recorded.into_iter().flatten().collect();
    traces.extend(images.iter().map(record_creation));
    let sparse = |image: &&Image| !image.fixed();
    traces.extend(images.iter().filter(sparse).map(|image| record_relink(image, true)));
    let vhd = |image: &&Image| sparse(image) && image.format == "vhd";
    traces.extend(images.iter().filter(vhd).map(|image| record_relink(image, false)));
    traces.extend(in_parallel(cases, record_repair).into_iter().flatten());
    let changes = in_parallel(bases, |base| {
        // Changing the link alone is recorded above.
        let operations =
            chains::OPERATIONS.into_iter().filter(|o| !["link", "flatten"].contains(o));
        operations.flat_map(|operation| record_change(base, operation)).collect::<Vec<_>>()
    });
    traces.extend(changes.into_iter().flatten());
    traces
}

#[test]
fn every_sync_and_every_order_is_one_that_a_crash_can_show() {
    let began = std::time::Instant::now();
    let kinds = all_small();
    let mut images = small();
    images.retain(|image| image.tweak.is_none() && image.share == 1);
    let cases = repairs::cases();
    let mut bases: Vec<_> = chains::bases().into_iter().map(|(base, _)| base).collect();
    bases.retain(|base| base.spec.subformat.as_deref() != Some("fixed"));
    let traces = record_all(&kinds, &images, &cases, &bases);
    let names = Names::of(&traces);
    let mut all = faults(&traces, Scope::All);
    // What drivers do is looked for where it takes the least time.
    for (fault, syncs) in faults(&traces, Scope::New) {
        all.entry(fault).or_insert(syncs);
    }
    let all: Vec<_> = all.into_iter().collect();
    let stages: Vec<_> = faults(&traces, Scope::Stages).into_iter().collect();
    let count = all.len() + stages.len();
    println!("{} recordings, {count} faults, {:?}", traces.len(), began.elapsed());

    let outcomes =
        in_parallel(&all, |(fault, syncs)| search(&traces, fault, syncs, SYNCS_PER_FAULT));
    println!("searched after {:?}", began.elapsed());
    let of_stages =
        in_parallel(&stages, |(fault, syncs)| search(&traces, fault, syncs, SYNCS_PER_STAGE));
    println!("searched in stages after {:?}", began.elapsed());
    let needed: BTreeMap<&Fault, &Outcome> =
        all.iter().map(|(fault, _)| fault).zip(&outcomes).collect();

    let mut wrong = Vec::new();
    let mut excused = BTreeSet::new();
    let found = all.iter().zip(&outcomes).chain(stages.iter().zip(&of_stages));
    for ((fault, syncs), outcome) in found {
        let [sync, earlier, later] = fault.names(&names);
        let line = match fault {
            Fault::Without(_) => format!("without {sync}"),
            Fault::Swapped { .. } | Fault::Early { .. } => {
                format!("{sync}: {later} before {earlier}")
            }
        };
        println!("{line}");
        if let Outcome::Found(_) = outcome {
            println!("    {outcome}");
            continue;
        }
        // What a driver does for a stage, it does for its own sake.
        let own = match fault {
            Fault::Without(_) => Fault::Without(driver_place(&traces, syncs[0])),
            _ => fault.clone(),
        };
        let index = excuse(&fault.names(&names)).or_else(|| excuse(&own.names(&names)));
        match (needed.get(&own), index) {
            (Some(Outcome::Found(how)), None) => println!("    the driver needs it: {how}"),
            (_, Some(index)) => {
                excused.insert(index);
                println!("    {outcome}: {}", HARMLESS[index].3);
            }
            (_, None) => {
                println!("    {outcome}: UNEXPLAINED");
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

/// Where in a driver an operation came from, whatever it is for.
fn driver_place(traces: &[Trace<'_>], (number, at): (usize, usize)) -> Place {
    let trace = &traces[number];
    match trace.scope {
        Scope::Stages => Place::of(&trace.recording, &trace.recording.ops()[at]),
        Scope::All | Scope::New => trace.places[at].clone(),
    }
}
