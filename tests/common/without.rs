//! Recordings from which one sync after the other is taken away: a crash must show each of them.
//!
//! Syncs have no names. Here one is called after what was written last before it to the same file, and what
//! is written first behind it: `data | table` keeps a table from being written before the data that it
//! leads to is durable. A sync of a directory is called after what happened to names. Syncs with one name
//! count as one, for what they are there for is the same.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use fastrand::Rng;
use flatdisk::storage::crash::{CrashPoint, Fate};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::recording::{Change, Op, Recording};

/// Judges a state; the flag says that all was done.
pub type Judge<'a> = dyn Fn(&Arc<MemoryHost>, bool) -> Result<(), String> + 'a;

/// States looked at for one sync in one recording.
const STATES: usize = 40;

/// What was found of syncs, by name: how a crash shows that it is missing, or in how many states nothing did.
#[derive(Debug, Default)]
pub struct Findings(pub BTreeMap<String, Result<String, usize>>);

impl Findings {
    /// Takes each sync of a recording away, unless one of its name was shown to be needed. `judge` is told a
    /// state and whether all was done.
    pub fn look(
        &mut self,
        whose: &str,
        recording: &Recording,
        random: &mut Rng,
        judge: &Judge<'_>,
    ) {
        let ops = recording.ops();
        for at in (0..ops.len()).filter(|at| is_sync(&ops[*at])) {
            let name = format!("{whose}: {}", name(ops, at));
            let known = self.0.entry(name).or_insert(Err(0));
            if let Err(states) = known {
                match shown(recording, at, random, judge) {
                    Ok(more) => *states += more,
                    Err(how) => *known = Ok(how),
                }
            }
        }
    }
}

/// Looks for a state that only the missing sync allows; how many there were without one.
fn shown(
    recording: &Recording,
    at: usize,
    random: &mut Rng,
    judge: &Judge<'_>,
) -> Result<usize, String> {
    let ops = recording.ops();
    let end = next_sync(ops, at);
    let without = recording.without(BTreeSet::from([at]));
    let mut point = CrashPoint::start(&without);
    while point.at() < at && point.advance() {}
    let (mut states, mut seen) = (0, BTreeSet::new());
    let steps = end - at;
    while point.advance() {
        // At the end, everything that is done is promised.
        let here = point.at();
        if here > end.max(at + 1) {
            break;
        }
        let draws = (STATES / steps.max(1)).max(6);
        for draw in 0..draws {
            let early = |random: &mut Rng| match draw % 3 {
                0 => Fate::Lost,
                _ => torn(random),
            };
            let late = |random: &mut Rng| match draw % 2 {
                0 => Fate::Kept,
                _ => torn(random),
            };
            let fate = |index: &usize| if *index < at { early(random) } else { late(random) };
            let fates: Vec<_> = point.pending().iter().map(fate).collect();
            let state = point.state(&fates);
            if seen.insert((here, state.digest())) {
                states += 1;
                judge(&state, here == ops.len())?;
            }
        }
    }
    Ok(states)
}

fn torn(random: &mut Rng) -> Fate {
    match random.u8(..3) {
        0 => Fate::Lost,
        1 => Fate::Kept,
        _ => Fate::Torn { runs: random.u64(..), grown: random.bool() },
    }
}

fn is_sync(op: &Op) -> bool {
    matches!(op.change, Change::Sync | Change::SyncDir(_))
}

fn same_sync(ops: &[Op], at: usize, other: usize) -> bool {
    match (&ops[at].change, &ops[other].change) {
        (Change::Sync, Change::Sync) => ops[other].file == ops[at].file,
        (Change::SyncDir(one), Change::SyncDir(other)) => one == other,
        _ => false,
    }
}

fn next_sync(ops: &[Op], at: usize) -> usize {
    (at + 1..ops.len()).find(|other| same_sync(ops, at, *other)).unwrap_or(ops.len())
}

/// What is written last before a sync and first behind it.
fn name(ops: &[Op], at: usize) -> String {
    let from = (0..at).rev().find(|other| same_sync(ops, at, *other)).map_or(0, |sync| sync + 1);
    let directory = matches!(ops[at].change, Change::SyncDir(_));
    let of = |index: usize| match directory {
        true => of_names(&ops[index].change),
        false => class(&ops[index].change).filter(|_| ops[index].file == ops[at].file),
    };
    let before = (from..at).rev().find_map(of).unwrap_or("nothing");
    let behind = (at + 1..next_sync(ops, at)).find_map(of).unwrap_or("nothing");
    let whose = if directory { "directory, " } else { "" };
    format!("{whose}{before} | {behind}")
}

/// What a change does to names.
fn of_names(change: &Change) -> Option<&'static str> {
    Some(match change {
        Change::Create => "created",
        Change::Link(_) => "linked",
        Change::Rename(..) => "renamed",
        Change::Remove(_) => "removed",
        _ => return None,
    })
}

/// What a change is about, as far as its bytes tell.
fn class(change: &Change) -> Option<&'static str> {
    const SIGNATURES: [(&[u8], &str); 10] = [
        (b"conectix", "footer"),
        (b"cxsparse", "dynamic header"),
        (b"tdbatmap", "batmap"),
        (b"head", "header"),
        (b"regi", "region table"),
        (b"loge", "log entry"),
        (b"metadata", "metadata"),
        (b"KDMV", "sparse header"),
        (b"COWD", "sparse header"),
        (b"# Disk", "descriptor"),
    ];
    Some(match change {
        Change::Write { data, .. } => {
            let signed = SIGNATURES.iter().find(|(start, _)| data.starts_with(start));
            let data_of_ours = || data.windows(4).step_by(4).any(|w| w == b"\xf1at\xd1");
            match signed {
                Some((_, name)) => name,
                None if data.len() < 16 => "field",
                None if data_of_ours() => "data",
                None => "table",
            }
        }
        Change::Punch(_) => "hole",
        Change::SetLen(_) | Change::Grow(_) => "length",
        _ => return None,
    })
}
