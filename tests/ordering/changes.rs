//! Changes of size, of layout and of chains, from which each sync is taken away.

use std::sync::Arc;

use fastrand::Rng;
use flatdisk::storage::Host;
use flatdisk::storage::recording::RecordingHost;

use super::SEED;
use super::common::chains::{self, ChangeOfChain};
use super::common::commands::{self, Command};
use super::common::drawn::{What, case, made};
use super::common::in_parallel;
use super::common::without::Findings;

/// Changes recorded of each kind, of each format.
const ROUNDS: u64 = 25;

const PROMISE: &str = "space that is given back is no promise";
const FOOTER_HOLE: &str = "a hole where the footer was, behind which there is another one";
const OTHER_HEADER: &str = "the other header is good, and a change between them is none";
const LOGGED: &str = "the log holds the table until it ends";
const DRIVER: &str = "the driver's own, which is taken away with its workloads";
const ANOTHER: &str = "another sync of the directory comes before anything relies on it";
const ONE_SECTOR: &str = "old and new text of our disks mix to a text";

/// Syncs that no crash misses (`*` for anything), and why.
const HARMLESS: &[(&str, &str)] = &[
    (
        "vhd: dynamic header | footer",
        "first the footers' copy changes, and the sync behind that covers both",
    ),
    ("vhd: footer | table", "what is cleared lies behind the end that was asked for"),
    ("vhd: hole | data", FOOTER_HOLE),
    ("vhd: hole | length", FOOTER_HOLE),
    ("vhd: hole | table", FOOTER_HOLE),
    ("vhd: hole | nothing", PROMISE),
    ("vhd: length | nothing", PROMISE),
    ("vhd: table | hole", "before the end only blocks of zeroes are punched"),
    ("vhd: table | length", "the file only grows there"),
    ("vhd flatten: footer | dynamic header", "nothing leads to the new header yet"),
    ("vhd flatten: footer | footer", "either footer opens the image"),
    ("vhd flatten: table | footer", DRIVER),
    ("vhdx: header | *", OTHER_HEADER),
    ("vhdx: hole | header", PROMISE),
    ("vhdx: hole | log entry", "behind the end of a disk of ours there are zeroes anyway"),
    ("vhdx: hole | nothing", PROMISE),
    ("vhdx: length | nothing", PROMISE),
    ("vhdx: table | data", LOGGED),
    ("vhdx: table | hole", LOGGED),
    ("vhdx: table | length", LOGGED),
    ("vhdx flatten: header | *", OTHER_HEADER),
    ("vhdx flatten: hole | header", PROMISE),
    ("vhdx flatten: log entry | table", DRIVER),
    ("vhdx flatten: nothing | *", DRIVER),
    ("vmdk: hole | nothing", PROMISE),
    ("vmdk: length | sparse header", "the mark comes before all that needs it"),
    (
        "vmdk: sparse header | data",
        "without the mark the next writer takes copies of tables for damaged",
    ),
    ("vmdk: sparse header | descriptor", ONE_SECTOR),
    ("vmdk: sparse header | hole", "the tables name nothing of what is given back"),
    ("vmdk: sparse header | length", "the tables name nothing of what is given back"),
    ("vmdk: table | nothing", "entries that mean nothing any more"),
    ("vmdk: table | table", "each entry is right by itself, old or new"),
    ("vmdk flatten: descriptor | nothing", PROMISE),
    ("vmdk flatten: sparse header | descriptor", ONE_SECTOR),
    ("vmdk flatten: table | *", DRIVER),
    // Of commands; all syncs of directories before a name goes are taken away together in tests/lifecycle.rs.
    ("*: directory, created | *", "a temporary name, durable with the one that takes its place"),
    ("*: directory, linked | *", ANOTHER),
    ("*: directory, nothing | *", "no name has changed since the sync before"),
    ("*: directory, removed | *", ANOTHER),
    ("*: directory, renamed | *", ANOTHER),
    ("vhd *: data | *", DRIVER),
    ("vhd *: footer | *", DRIVER),
    ("vhd *: table | *", DRIVER),
    ("vhdx *: data | *", DRIVER),
    ("vhdx *: header | *", OTHER_HEADER),
    ("vhdx *: log entry | *", DRIVER),
    ("vhdx *: nothing | *", DRIVER),
    ("vhdx *: table | *", DRIVER),
    ("vmdk *: data | *", DRIVER),
    ("vmdk *: descriptor | *", DRIVER),
    ("vmdk *: hole | *", DRIVER),
    ("vmdk *: sparse header | *", DRIVER),
    ("vmdk *: table | *", DRIVER),
];

/// Whether a name is like a pattern, in which `*` stands for anything.
fn like(name: &str, pattern: &str) -> bool {
    let (first, rest) = pattern.split_once('*').unwrap_or((pattern, ""));
    let Some(left) = name.strip_prefix(first) else { return false };
    match pattern.len() == first.len() {
        true => left.is_empty(),
        false => (0..=left.len()).any(|at| left.get(at..).is_some_and(|left| like(left, rest))),
    }
}

#[test]
fn every_sync_of_changes_of_size_layout_and_chains_is_one_that_a_crash_can_show() {
    let formats = ["vhd", "vhdx", "vmdk"];
    let kinds: [fn(&'static str) -> Findings; 4] = [changes, flattening, lives, merges_and_deltas];
    let work: Vec<_> =
        formats.iter().flat_map(|format| kinds.map(|kind| (*format, kind))).collect();
    let all = in_parallel(&work, |(format, kind)| kind(format));
    let mut wrong = Vec::new();
    let mut excused = std::collections::BTreeSet::new();
    for (name, outcome) in all.into_iter().flat_map(|findings| findings.0) {
        let excuse = HARMLESS.iter().position(|(harmless, _)| like(&name, harmless));
        println!("without {name}");
        match (&outcome, excuse) {
            (Ok(how), _) => println!("    {}", how.lines().next().unwrap_or_default()),
            (Err(states), Some(index)) => {
                println!("    nothing wrong in {states} states: {}", HARMLESS[index].1);
                excused.insert(index);
            }
            (Err(states), None) => wrong.push(format!("{name}: nothing wrong in {states} states")),
        }
    }
    for (index, (name, _)) in HARMLESS.iter().enumerate() {
        if !excused.contains(&index) {
            wrong.push(format!("{name}: no longer harmless, or gone"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn changes(format: &'static str) -> Findings {
    let mut findings = Findings::default();
    for round in 0..ROUNDS {
        for what in What::ALL {
            let random = &mut Rng::with_seed(SEED + round);
            let case = case(format, what, random);
            let made = made(&case, random);
            let recorder = RecordingHost::over(&made.host);
            let host: Arc<dyn Host> = recorder.clone();
            case.run(&host).unwrap();
            let judge = |state: &Arc<_>, done| made.judge_lightly(state, done, 1);
            findings.look(format, &recorder.recording(), random, &judge);
        }
    }
    findings
}

fn flattening(format: &'static str) -> Findings {
    let mut findings = Findings::default();
    for (base, _) in chains::bases().into_iter().filter(|(base, _)| base.format == format) {
        let random = &mut Rng::with_seed(SEED);
        let mut change = ChangeOfChain::new(&base, "flatten", random);
        let recorder = RecordingHost::over(&change.host);
        change.run(&recorder).unwrap();
        let judge = |state: &Arc<_>, done| change.judge(state, done);
        findings.look(&format!("{format} flatten"), &recorder.recording(), random, &judge);
    }
    findings
}

/// Snapshots, other names and the end of images; what they say about themselves.
fn lives(format: &'static str) -> Findings {
    let mut findings = Findings::default();
    for (base, _) in chains::bases().into_iter().filter(|(base, _)| base.format == format) {
        let one_file = commands::files(&base) == 1;
        let alone = commands::WITH_ONE_NAME.into_iter().filter(|_| one_file);
        for what in commands::LIFE.into_iter().chain(alone) {
            let command = commands::life(&base, what, &mut Rng::with_seed(SEED));
            look(&mut findings, &format!("{format} {what}"), &command);
        }
        let meta = commands::set_meta(&base, &mut Rng::with_seed(SEED));
        look(&mut findings, &format!("{format} meta"), &meta);
    }
    findings
}

/// Several generations made one, one taken out of the middle, and deltas.
fn merges_and_deltas(format: &'static str) -> Findings {
    let mut findings = Findings::default();
    for (base, blocks) in chains::bases().into_iter().filter(|(base, _)| base.format == format) {
        let random = &mut Rng::with_seed(SEED);
        let levels = commands::merge_levels(&base, blocks, random);
        look(&mut findings, &format!("{format} levels"), &levels);
        let middle = commands::merge_middle(&base, blocks, random);
        look(&mut findings, &format!("{format} middle"), &middle);
        let delta = commands::apply_delta(&base, blocks, random);
        look(&mut findings, &format!("{format} delta"), &delta);
    }
    findings
}

fn look(findings: &mut Findings, whose: &str, command: &Command<'_>) {
    let judge = |state: &Arc<_>, done| command.judge(state, done);
    let recording = command.record().unwrap();
    findings.look(whose, &recording, &mut Rng::with_seed(SEED), &judge);
}
