//! No crash loses what a flush promised or shows what was never there.

mod common;

use common::images::{Kind, all_small};
use common::toy::{Flaw, Toy};
use common::{corpus, crash, in_parallel, number, seed};

/// Distinct crash states to look at for each kind of image.
fn budget() -> usize {
    number("FLATDISK_CRASH_STATES", 240) as usize
}

#[test]
fn a_toy_in_the_safe_order_survives_every_crash() {
    let tally = crash::run(&Toy { flaw: Flaw::None }, seed(), budget() * 4).unwrap();
    println!("toy: {} states, {} recoveries", tally.states, tally.recoveries);
    assert!(tally.states >= budget() * 3, "{tally:?}");
}

#[test]
fn every_broken_rule_of_writing_order_is_noticed() {
    let flaws = [
        Flaw::NoPayloadSync,
        Flaw::NoTableSync,
        Flaw::TablesFirst,
        Flaw::EarlyReuse,
        Flaw::StaleCalledZero,
        Flaw::PayloadFlushSkipped,
        Flaw::LateSnapshot,
    ];
    // More than by default, so that chance decides nothing.
    let found = in_parallel(&flaws, |&flaw| crash::run(&Toy { flaw }, seed(), 40_000));
    for (flaw, found) in flaws.iter().zip(found) {
        match found {
            Ok(tally) => panic!("{flaw:?} went unnoticed in {tally:?}"),
            Err(report) => println!("{flaw:?}:\n{report}\n"),
        }
    }
}

#[test]
fn every_format_survives_every_crash() {
    survive(&all_small());
}

#[test]
fn images_made_by_others_survive_every_crash() {
    survive(&corpus::kinds());
}

fn survive(kinds: &[Box<dyn Kind>]) {
    let results = in_parallel(kinds, |kind| {
        let budget = budget() / kind.share();
        let began = std::time::Instant::now();
        (crash::run(&**kind, seed(), budget), began.elapsed())
    });
    let mut failures = Vec::new();
    for (kind, (result, time)) in kinds.iter().zip(results) {
        match result {
            Ok(tally) => println!(
                "{}: {} distinct states, {} of recoveries, {:.1} s",
                kind.name(),
                tally.states,
                tally.recoveries,
                time.as_secs_f32()
            ),
            Err(report) => failures.push(report),
        }
    }
    println!("seed {}", seed());
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}
