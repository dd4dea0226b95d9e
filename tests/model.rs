//! Random operations on every kind of image against a plain buffer.

mod common;

use std::sync::Arc;

use common::buffer::{Buffer, PAGE};
use common::crash::{compare, contents};
use common::history::History;
use common::images::{Kind, all_small, large};
use common::toy::{Flaw, Toy};
use common::workload::{Runner, Step, script};
use common::{in_parallel, number, pattern, seed};
use flatdisk::disk::Disk;
use flatdisk::disk::map::Source;
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::recording::RecordingHost;
use flatdisk::storage::{Access, Host};

/// How many operations each kind of image gets.
fn operations() -> usize {
    number("FLATDISK_MODEL_OPS", 250) as usize
}

fn same(disk: &Disk, buffer: &Buffer, at: u64, len: u64) -> Result<(), String> {
    let mut found = vec![0; len as usize];
    disk.read_at(at, &mut found).map_err(|e| format!("reading {len} at {at:#x}: {e}"))?;
    let expected = buffer.read(at, len);
    let Some(wrong) = (0..found.len()).find(|&index| found[index] != expected[index]) else {
        return Ok(());
    };
    // Describe from a place where stamps can be read.
    let skip = (16 - at % 16) as usize % 16;
    let near = (wrong.saturating_sub(skip) / 16 * 16 + skip).min(wrong);
    let end = (near + 64).min(found.len());
    Err(format!(
        "byte {:#x}, seen by a read of {len} at {at:#x}, holds {}\n  expected {}",
        at + wrong as u64,
        pattern::describe(&found[near..end]),
        pattern::describe(&expected[near..end]),
    ))
}

/// Extents are in order, without gaps, and end with the range; what they call zero reads as zero.
fn extents_are_true(disk: &Disk, buffer: &Buffer, at: u64, len: u64) -> Result<(), String> {
    let list = disk.extents(at..at + len).map_err(|e| format!("extents: {e}"))?;
    let mut pos = at / 512 * 512;
    for extent in list.iter() {
        if extent.start != pos || extent.len == 0 {
            return Err(format!("extent {extent:?} does not continue at {pos:#x}"));
        }
        pos = extent.end();
        if extent.source == Source::Zero {
            let inside = extent.start.max(at)..extent.end().min(at + len);
            if buffer.read(inside.start, inside.end - inside.start).iter().any(|b| *b != 0) {
                return Err(format!("{extent:?} holds data"));
            }
        }
    }
    match pos == (at + len).next_multiple_of(512) {
        true => Ok(()),
        false => Err(format!("extents of {at:#x}+{len:#x} end at {pos:#x}")),
    }
}

/// What lies outside the data that the disk reports is zero.
fn holes_are_true(disk: &Disk, buffer: &Buffer) -> Result<(), String> {
    let mut pos = 0;
    while pos < disk.size() {
        let data = disk.next_data(pos).map_err(|e| format!("next data: {e}"))?;
        let hole_end = data.as_ref().map_or(disk.size(), |data| data.start);
        if data.as_ref().is_some_and(|data| data.start < pos || data.end <= data.start) {
            return Err(format!("next data from {pos:#x} is {data:?}"));
        }
        for (page, bytes) in buffer.pages().range(pos / PAGE..hole_end.div_ceil(PAGE)) {
            for (index, _) in (page * PAGE..).zip(bytes).filter(|(_, byte)| **byte != 0) {
                if (pos..hole_end).contains(&index) {
                    return Err(format!("data at {index:#x} in the hole {pos:#x}..{hole_end:#x}"));
                }
            }
        }
        pos = data.map_or(disk.size(), |data| data.end);
    }
    Ok(())
}

fn run(kind: &dyn Kind, seed: u64, count: usize) -> Result<(), String> {
    let memory = MemoryHost::new();
    kind.create(&memory).map_err(|e| format!("create: {e}"))?;
    let host: Arc<dyn Host> = memory;
    let open = |access| kind.open(&host, access).map_err(|e| format!("open: {e}"));
    let mut disk = open(Access::Write)?;
    let mut buffer = Buffer::default();
    for (number, bytes) in contents(&disk)? {
        buffer.write(number * 512, &bytes.unwrap_or_default());
    }
    let mut random = fastrand::Rng::with_seed(seed);
    let (size, block) = (disk.size(), disk.geometry().block_size);
    for (index, step) in script(&mut random, size, block, count).into_iter().enumerate() {
        let failed = |e: String| format!("operation {index}, {step:?}: {e}");
        let (at, len) = match step {
            Step::Write { at, len } => {
                let data = pattern::bytes(index as u32 + 1, at, len);
                disk.write_at(at, &data).map_err(|e| failed(e.to_string()))?;
                buffer.write(at, &data);
                (at, len)
            }
            Step::Zeroes { at, len } => {
                disk.write_at(at, &vec![0; len as usize]).map_err(|e| failed(e.to_string()))?;
                buffer.zero(at, len);
                (at, len)
            }
            Step::Discard { at, len } => {
                disk.discard(at, len).map_err(|e| failed(e.to_string()))?;
                buffer.zero(at, len);
                (at, len.min(1 << 20))
            }
            Step::Flush => {
                disk.flush().map_err(|e| failed(e.to_string()))?;
                continue;
            }
            Step::Reopen => {
                disk.close().map_err(|e| failed(e.to_string()))?;
                disk = open(Access::Write).map_err(failed)?;
                holes_are_true(&disk, &buffer).map_err(failed)?;
                continue;
            }
        };
        // A little more than was touched, at odd borders.
        let from = at.saturating_sub(random.u64(..5000));
        let to = (at + len + random.u64(..5000)).min(size);
        same(&disk, &buffer, from, to - from).map_err(failed)?;
        extents_are_true(&disk, &buffer, from, to - from).map_err(failed)?;
    }
    holes_are_true(&disk, &buffer)?;
    disk.close().map_err(|e| format!("close: {e}"))?;
    let disk = open(Access::Read)?;
    holes_are_true(&disk, &buffer).map_err(|e| format!("opened to read: {e}"))?;
    for page in buffer.pages().keys() {
        let at = page * PAGE;
        same(&disk, &buffer, at, PAGE.min(size - at)).map_err(|e| format!("in the end: {e}"))?;
    }
    let errors = kind.errors(&host).map_err(|e| format!("check: {e}"))?;
    match errors.is_empty() {
        true => Ok(()),
        false => Err(format!("the check finds {}", errors.join("; "))),
    }
}

fn all() -> Vec<Box<dyn Kind>> {
    let mut kinds = all_small();
    kinds.extend(large().into_iter().map(|image| Box::new(image) as Box<dyn Kind>));
    kinds.push(Box::new(Toy { flaw: Flaw::None }));
    kinds.extend(common::corpus::kinds());
    kinds
}

fn every_kind(test: impl Fn(&dyn Kind) -> Result<(), String> + Sync) {
    let kinds = all();
    let results = in_parallel(&kinds, |kind| {
        test(&**kind).map_err(|e| format!("{}, seed {}: {e}", kind.name(), seed()))
    });
    let failures: Vec<_> = results.into_iter().filter_map(Result::err).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

#[test]
fn random_operations_leave_what_they_leave_in_a_buffer() {
    every_kind(|kind| {
        // Short runs begin anew, with an image that is still small.
        let runs = operations().div_ceil(100) as u64;
        (0..runs).try_for_each(|run_number| run(kind, seed() ^ run_number << 40, 100))
    });
}

#[test]
fn threads_with_a_flush_beside_them_leave_what_each_wrote() {
    every_kind(|kind| {
        let memory = MemoryHost::new();
        kind.create(&memory).map_err(|e| format!("create: {e}"))?;
        for (round, by_block) in [(0, false), (1, true)] {
            let recorder = RecordingHost::over(&memory);
            let host: Arc<dyn Host> = recorder.clone();
            let initial = contents(&*kind.open(&host, Access::Read).map_err(|e| e.to_string())?)?;
            let runner = Runner::open(kind, host.clone(), recorder, History::new(initial))
                .map_err(|e| format!("open: {e}"))?;
            runner
                .run_threads(seed() + round, 4, operations() / 4, by_block)
                .map_err(|e| format!("threads: {e}"))?;
            let expected = runner.history.lock().expected();
            compare(&runner.disk, &expected)?;
            runner.close().map_err(|e| format!("close: {e}"))?;
            let disk = kind.open(&host, Access::Read).map_err(|e| format!("reopen: {e}"))?;
            compare(&disk, &expected).map_err(|e| format!("after close: {e}"))?;
        }
        Ok(())
    });
}
