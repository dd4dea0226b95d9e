//! Damaged images: whatever bytes a file holds, opening, reading, writing, checking and repairing it
//! end soon, in little memory, without a panic; nothing is written unless somebody writes, what was
//! written is there afterwards, and a repair changes nothing that could be read. Archives and partition
//! tables likewise.
//!
//! `FLATDISK_DAMAGE_CASES` is the number of cases; `FLATDISK_SEED` and `FLATDISK_DAMAGE_CASE` repeat
//! one of them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
mod hostile;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{number, pattern, seed};
use fastrand::Rng;
use flatdisk::disk::Disk;
use flatdisk::error::{ErrorKind, Result};
use flatdisk::formats::{self, OpenOptions, Scope};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::{Access, Host};
use hostile::bases::{self, Base};
use hostile::guard::Guarded;
use hostile::meter::{self, Watch};
use hostile::mutate::damaged;
use parking_lot::Mutex;

#[global_allocator]
static MEMORY: meter::Counting = meter::Counting;

/// Most memory that one case may hold, in bytes.
const MAX_MEMORY: usize = 64 << 20;
/// Longest that one case may take.
const MAX_TIME: Duration = Duration::from_secs(1);
/// After this a case is taken for one that never ends.
const STUCK: Duration = Duration::from_secs(30);
/// Disks up to this size are looked up as a whole, in bytes.
const SMALL: u64 = 64 << 20;
/// Room on the host for what a case writes, in bytes.
const ROOM: u64 = 8 << 20;

/// What became of the cases of one format.
#[derive(Debug, Default, Clone)]
struct Tally {
    opened: u64,
    refused: u64,
    read_only: u64,
    written: u64,
    checked: u64,
    repaired: u64,
    peak: usize,
}

/// How an image was opened, if it was.
fn open(host: Arc<dyn Host>, image: &Path, access: Access, force: bool) -> Result<formats::Image> {
    formats::open(&host, image, &OpenOptions { force, ..OpenOptions::new(access) })
}

/// Some bytes of a disk, or why there are none.
type Sample = (u64, Result<Vec<u8>>);

fn sample(disk: &Disk, rng: &mut Rng) -> Vec<Sample> {
    let size = disk.size();
    let mut samples = Vec::new();
    for place in [0, size / 2, size.saturating_sub(600), rng.u64(..size.max(1)), size / 4 * 3] {
        let len = (size - place.min(size)).min(1 + rng.u64(..8192)) as usize;
        let mut bytes = vec![0; len];
        let read = disk.read_at(place.min(size), &mut bytes);
        samples.push((place, read.map(|()| bytes)));
    }
    samples
}

/// Reads a little everywhere, and looks up everything if that is not much.
fn read(disk: &Disk, rng: &mut Rng) {
    let size = disk.size();
    sample(disk, rng);
    let mut bytes = [0; 16];
    for (at, len) in [(size, 1), (u64::MAX, 16), (size.saturating_sub(8), 16)] {
        let outcome = disk.read_at(at, &mut bytes[..len]);
        let inside = at.checked_add(len as u64).is_some_and(|end| end <= size);
        let refused = outcome.is_err_and(|e| e.kind() == ErrorKind::OutOfRange);
        assert!(inside || refused, "a read past the disk's end");
    }
    if size <= SMALL {
        if let Ok(extents) = disk.extents(0..size) {
            let mut pos = 0;
            for extent in extents.iter() {
                assert!(extent.start == pos && extent.len > 0, "a gap in the extents at {pos:#x}");
                pos = extent.end();
            }
            assert_eq!(pos, size, "the extents end with the disk");
        }
        let _ = disk.next_hole(0);
    }
    let _ = disk.next_data(rng.u64(..size.max(1)));
    let _ = disk.allocated();
}

/// Writes a little, closes, and holds the disk against what it was and what was written.
fn write(base: &Base, host: &Arc<MemoryHost>, rng: &mut Rng, before: &[Sample]) -> Result<bool> {
    let room = if rng.u32(..6) == 0 { rng.u64(..ROOM) } else { ROOM };
    let session = Guarded::writing(host, room);
    let image = open(session.clone(), &base.image, Access::Write, false)?;
    let disk = image.disk;
    let size = disk.size();
    let mut written: Vec<(u64, Vec<u8>)> = Vec::new();
    let mut touched: Vec<std::ops::Range<u64>> = Vec::new();
    let mut fine = true;
    for stamp in 0..1 + rng.u32(..4) {
        let at = [0, size / 2, rng.u64(..size.max(1)), size][rng.usize(..4)];
        let len = (1 + rng.u64(..5000)).min(size);
        let at = at.min(size - len);
        touched.push(at..at + len);
        written.retain(|(old, bytes)| at + len <= *old || *old + bytes.len() as u64 <= at);
        if rng.u32(..5) == 0 {
            if disk.discard(at, len).is_ok() {
                written.push((at, vec![0; len as usize]));
            }
        } else {
            let bytes = pattern::bytes(0x00d0_0000 + stamp, at, len);
            match disk.write_at(at, &bytes) {
                Ok(()) => written.push((at, bytes)),
                Err(_) => fine = false,
            }
        }
        if rng.bool() {
            fine &= disk.flush().is_ok();
        }
    }
    for (at, bytes) in &written {
        let mut now = vec![0; bytes.len()];
        disk.read_at(*at, &mut now).expect("what was written can be read");
        assert!(now == *bytes, "written at {at:#x}, reads {}", pattern::describe(&now));
    }
    let closed = disk.close();
    drop(disk);
    let reader = Guarded::reading(host);
    let again = match open(reader, &base.image, Access::Read, false) {
        Ok(image) => image.disk,
        Err(e) => panic!("after a session the image does not open: {e}"),
    };
    if closed.is_ok() {
        for (at, bytes) in &written {
            let mut now = vec![0; bytes.len()];
            again.read_at(*at, &mut now).expect("what was written can be read later");
            assert!(
                now == *bytes,
                "closed with {at:#x} written, reads {}",
                pattern::describe(&now)
            );
        }
    }
    for (at, bytes) in before {
        let Ok(bytes) = bytes else { continue };
        let end = at + bytes.len() as u64;
        if touched.iter().any(|range| range.start < end && *at < range.end) {
            continue;
        }
        let mut now = vec![0; bytes.len()];
        again.read_at(*at, &mut now).expect("what could be read can be read later");
        assert!(now == *bytes, "a write elsewhere changed what is at {at:#x}");
    }
    Ok(fine && closed.is_ok() && !written.is_empty())
}

/// Plans a repair, carries it out, and holds the disk against what could be read `before`. Whether
/// the image was changed and is without errors now.
fn repair(base: &Base, host: &Arc<MemoryHost>, rng: &mut Rng, before: &[Sample]) -> bool {
    let scope = match rng.u32(..4) {
        0 => Scope::Leaks,
        1 => Scope::Lossy,
        _ => Scope::All,
    };
    let reader = Guarded::reading(host);
    let plan = |host: Arc<dyn Host>, access, dry_run| {
        formats::repair(&host, &base.image, &OpenOptions::new(access), scope, dry_run)
    };
    let dry = plan(reader.clone(), Access::Read, true);
    assert_eq!(reader.trespass(), None, "a dry run wrote");
    let room = if rng.u32(..6) == 0 { rng.u64(..ROOM) } else { ROOM };
    let repaired = plan(Guarded::writing(host, room), Access::Write, false);
    if std::env::var_os("FLATDISK_DAMAGE_CASE").is_some() {
        eprintln!("{scope:?}: {repaired:#?}");
    }
    if let (Ok(dry), Ok(repaired)) = (&dry, &repaired) {
        let shown = dry.changes.iter().map(|c| c.to_string()).collect::<Vec<_>>();
        let made = repaired.changes.iter().map(|c| c.to_string()).collect::<Vec<_>>();
        assert!(made.starts_with(&shown), "the dry run showed {shown:?}, made was {made:?}");
    }
    let reader = Guarded::reading(host);
    let again = open(reader, &base.image, Access::Read, false);
    for (at, bytes) in before {
        let Ok(bytes) = bytes else { continue };
        let disk = &again.as_ref().expect("what could be opened can be opened later").disk;
        let mut now = vec![0; bytes.len()];
        disk.read_at(*at, &mut now).expect("what could be read can be read after a repair");
        // A grain table of a VMDK that lacks a grain gets it from its copy.
        let rebuilt = |old: &[u8]| base.format == "vmdk" && old.iter().all(|byte| *byte == 0);
        let mut from = 0;
        while from < bytes.len() {
            let to = bytes.len().min(from + 512 - (*at as usize + from) % 512);
            let (old, new) = (&bytes[from..to], &now[from..to]);
            assert!(old == new || rebuilt(old), "a repair changed what is at {at:#x}+{from:#x}");
            from = to;
        }
    }
    repaired.is_ok_and(|r| !r.changes.is_empty() && r.after.errors == 0)
}

/// One damaged image, from opening to closing. What the image must not do panics.
fn case(base: &Base, rng: &mut Rng, tally: &mut Tally) {
    let host = meter::uncounted(|| damaged(base, rng));
    let force = rng.u32(..4) == 0;
    let access = if rng.bool() { Access::Read } else { Access::Peek };
    let reader = Guarded::reading(&host);
    let mut samples = Vec::new();
    match open(reader.clone(), &base.image, access, force) {
        Ok(image) => {
            tally.opened += 1;
            tally.read_only += u64::from(image.read_only.is_some());
            if !force {
                samples = sample(&image.disk, rng);
            }
            read(&image.disk, rng);
        }
        Err(e) => {
            tally.refused += 1;
            let text = e.to_string();
            assert!(!text.contains(char::is_control), "an error of several lines: {text:?}");
        }
    }
    if rng.u32(..4) == 0 {
        tally.checked += 1;
        let dynamic: Arc<dyn Host> = reader.clone();
        let _ = formats::check(&dynamic, &base.image, &OpenOptions::new(access));
    }
    assert_eq!(reader.trespass(), None, "something was written by reading");
    if rng.u32(..4) == 0 {
        tally.repaired += u64::from(repair(base, &meter::uncounted(|| host.fork()), rng, &samples));
    }
    if rng.u32(..3) == 0 {
        tally.written += u64::from(write(base, &host, rng, &samples).unwrap_or(false));
    }
    meter::uncounted(|| drop(host));
}

thread_local! {
    /// Where the last panic of this thread was.
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs one case; what it did wrong, if anything.
fn attempt(base: &Base, number: u64, tally: &mut Tally) -> Option<String> {
    let mut rng = Rng::with_seed(seed().wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(number));
    let began = Instant::now();
    let (outcome, peak) =
        meter::peak(|| catch_unwind(AssertUnwindSafe(|| case(base, &mut rng, tally))));
    tally.peak = tally.peak.max(peak);
    if outcome.is_err() {
        return Some(PANIC.take());
    }
    if peak > MAX_MEMORY {
        return Some(format!("holds {} MiB", peak >> 20));
    }
    let time = began.elapsed();
    (time > MAX_TIME).then(|| format!("takes {} ms", time.as_millis()))
}

/// Ends the process with the name of a case that never ends.
fn watch_over(watch: &Watch, done: &AtomicBool) {
    while !done.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(100));
        if let Some(case) = watch.stuck(STUCK) {
            eprintln!("FLATDISK_SEED={} FLATDISK_DAMAGE_CASE={case} does not end", seed());
            std::process::abort();
        }
    }
}

#[test]
fn damaged_images_neither_panic_nor_hang_nor_fill_the_memory() {
    let bases = bases::all();
    let only = std::env::var_os("FLATDISK_DAMAGE_CASE").map(|_| number("FLATDISK_DAMAGE_CASE", 0));
    let cases = number("FLATDISK_DAMAGE_CASES", 1_000_000);
    let numbers = only.map_or(0..cases, |only| only..only + 1);
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(|l| format!("{}:{}", l.file(), l.line()));
        let what = info.payload_as_str().unwrap_or("a panic without words");
        PANIC.set(format!("{what} ({})", place.unwrap_or_default()));
        if std::env::var_os("FLATDISK_DAMAGE_CASE").is_some() {
            eprintln!("{info}\n{}", std::backtrace::Backtrace::force_capture());
        }
    }));
    let began = Instant::now();
    let next = AtomicU64::new(numbers.start);
    let (watch, done) = (Watch::default(), AtomicBool::new(false));
    let tallies: Mutex<BTreeMap<&str, Tally>> = Mutex::default();
    let failures: Mutex<Vec<String>> = Mutex::default();
    let work = || {
        let place = watch.join();
        let mut own: BTreeMap<&str, Tally> = BTreeMap::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= numbers.end {
                break;
            }
            let base = &bases[number as usize % bases.len()];
            watch.set(place, Some(number));
            let tally = own.entry(base.format).or_default();
            let mut failure = attempt(base, number, tally);
            // A busy machine makes anything slow once.
            for _ in 0..2 {
                if failure.as_ref().is_some_and(|what| what.starts_with("takes ")) {
                    failure = attempt(base, number, &mut Tally::default());
                }
            }
            watch.set(place, None);
            if let Some(what) = failure {
                failures
                    .lock()
                    .push(format!("FLATDISK_DAMAGE_CASE={number}: {}: {what}", base.name));
            }
        }
        for (format, tally) in own {
            tallies.lock().entry(format).or_default().add(&tally);
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| watch_over(&watch, &done));
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            worker.join().expect("a worker catches panics");
        }
        done.store(true, Ordering::Relaxed);
    });
    let _ = std::panic::take_hook();
    println!(
        "{} cases from {} images in {:?}",
        numbers.end - numbers.start,
        bases.len(),
        began.elapsed()
    );
    for (format, tally) in tallies.lock().iter() {
        println!("{format}: {tally:?}");
    }
    let failures = failures.into_inner();
    let shown = failures.iter().take(30).cloned().collect::<Vec<_>>().join("\n");
    assert!(failures.is_empty(), "FLATDISK_SEED={}: {} fail\n{shown}", seed(), failures.len());
}

/// One case of these for every hundred images.
#[test]
fn damaged_archives_and_partition_tables_end_soon_and_in_little_memory() {
    let cases = number("FLATDISK_DAMAGE_CASES", 1_000_000) / 100;
    let good = hostile::disks::archive();
    for case in 0..cases {
        let seed = seed().wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(case);
        let attempt = || {
            let began = Instant::now();
            let (outcome, peak) = meter::peak(|| {
                catch_unwind(AssertUnwindSafe(|| {
                    let mut rng = Rng::with_seed(seed);
                    hostile::disks::try_archive(&good, &mut rng);
                    hostile::disks::try_disk(&mut rng);
                }))
            });
            assert!(outcome.is_ok(), "FLATDISK_SEED={}, case {case}", common::seed());
            assert!(peak < MAX_MEMORY, "case {case} holds {} MiB", peak >> 20);
            began.elapsed()
        };
        // A busy machine makes anything slow once.
        let slow = (0..3).all(|_| attempt() > MAX_TIME);
        assert!(!slow, "FLATDISK_SEED={}, case {case} is slow", common::seed());
    }
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.opened += other.opened;
        self.refused += other.refused;
        self.read_only += other.read_only;
        self.written += other.written;
        self.checked += other.checked;
        self.repaired += other.repaired;
        self.peak = self.peak.max(other.peak);
    }
}
