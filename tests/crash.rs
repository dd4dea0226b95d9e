//! No crash loses what a flush promised or shows what was never there.

mod common;

use std::sync::Arc;

use common::images::{Image, Kind, all_small};
use common::toy::{Flaw, Toy};
use common::{corpus, crash, in_parallel, number, pattern, seed};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::{Access, Host, Storage};

/// Distinct crash states to look at for each format that can be written.
fn budget() -> usize {
    number("FLATDISK_CRASH_STATES", 20_000) as usize
}

#[test]
fn a_toy_in_the_safe_order_survives_every_crash() {
    let tally = crash::run(&Toy { flaw: Flaw::None }, seed(), budget()).unwrap();
    let (states, recoveries) = (tally.states.len(), tally.recoveries.len());
    println!("toy: {states} states, {recoveries} recoveries");
    assert!(states >= budget());
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
            Ok(tally) => panic!("{flaw:?} went unnoticed in {} states", tally.states.len()),
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
            Ok(tally) => {
                let (states, wanted) = (tally.states.len(), budget() / kind.share());
                println!(
                    "{}: {states} distinct states, {} of recoveries, {:.1} s",
                    kind.name(),
                    tally.recoveries.len(),
                    time.as_secs_f32()
                );
                if states < wanted {
                    failures.push(format!("{}: only {states} states of {wanted}", kind.name()));
                }
            }
            Err(report) => failures.push(report),
        }
    }
    println!("seed {}", seed());
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

#[test]
fn a_vmdk_that_ends_inside_a_sector_gets_the_rest_before_a_grain_goes_there() {
    for subformat in ["monolithicSparse", "twoGbMaxExtentSparse", "vmfsSparse"] {
        let image = Image::new("vmdk", subformat, 40 << 20);
        let files = MemoryHost::new();
        image.create(&files).unwrap();
        for file in files.files().iter().filter(|file| file.len().unwrap() > 8192) {
            // The length of a grain that a crash left behind without what came after it.
            let grain_end = file.len().unwrap().next_multiple_of(64 << 10) + (64 << 10);
            file.set_len(grain_end - 42).unwrap();
        }
        let host: Arc<dyn Host> = files;
        let data = pattern::bytes(1, 0, 256 << 10);
        let disk = image.open(&host, Access::Write).unwrap();
        disk.write_at(0, &data).unwrap();
        disk.close().unwrap();
        let mut found = vec![0; data.len()];
        image.open(&host, Access::Read).unwrap().read_at(0, &mut found).unwrap();
        assert!(found == data, "{subformat}");
        assert_eq!(image.errors(&host).unwrap(), Vec::<String>::new(), "{subformat}");
    }
}
