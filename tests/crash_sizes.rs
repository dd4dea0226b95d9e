//! No crash of a change of size or of layout loses a byte that fits: changes by chance of small disks, each
//! stopped at many moments with any part of what was not yet durable.

// The helpers here serve tests only.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashSet;
use std::sync::Arc;

use common::crash::each_state;
use common::drawn::{What, case, made};
use common::{in_parallel, number, seed};
use fastrand::Rng;
use flatdisk::storage::Host;
use flatdisk::storage::recording::RecordingHost;

/// Crash states looked at of one change.
const STATES_PER_ROUND: usize = 250;

/// Looks at crash states of changes until there were `wanted` distinct ones; how many, and of how many
/// changes.
fn survive(format: &'static str, what: What, wanted: usize) -> Result<(usize, u64), String> {
    let mut states = HashSet::new();
    let mut round = 0;
    while states.len() < wanted {
        round += 1;
        if round > wanted as u64 {
            return Err(format!("only {} states", states.len()));
        }
        let mut random = Rng::with_seed(seed().wrapping_add(round * 0x9e37_79b9));
        let case = case(format, what, &mut random);
        let failed = |e: String| format!("{}, round {round} of the printed seed: {e}", case.name());
        let made = made(&case, &mut random);
        let recorder = RecordingHost::over(&made.host);
        let recorded: Arc<dyn Host> = recorder.clone();
        case.run(&recorded).map_err(|e| failed(e.to_string()))?;
        let recording = recorder.recording();
        let done = recording.ops().len();
        let epoch = |at| usize::from(at == done);
        let budget = STATES_PER_ROUND.min(wanted - states.len());
        each_state(&recording, &mut random, budget, &mut states, epoch, &mut |at, state, seed| {
            made.judge_lightly(state, at == done, seed)
        })
        .map_err(failed)?;
    }
    Ok((states.len(), round))
}

/// All four changes of a format.
fn all_of(format: &'static str) {
    let wanted = number("FLATDISK_CRASH_STATES", 20_000) as usize / 4;
    let results = in_parallel(&What::ALL, |what| {
        let began = std::time::Instant::now();
        (survive(format, *what, wanted), began.elapsed().as_secs_f32())
    });
    println!("seed {}", seed());
    let mut failures = Vec::new();
    for (what, (result, seconds)) in What::ALL.iter().zip(results) {
        match result {
            Ok((states, rounds)) => println!(
                "{format} {what:?}: {states} distinct states of {rounds} changes, {seconds:.1} s"
            ),
            Err(e) => failures.push(format!("{what:?}: {e}")),
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

#[test]
fn vhd_changes_survive_every_crash() {
    all_of("vhd");
}

#[test]
fn vhdx_changes_survive_every_crash() {
    all_of("vhdx");
}

#[test]
fn vmdk_changes_survive_every_crash() {
    all_of("vmdk");
}
