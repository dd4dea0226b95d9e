//! What the test programs share.
//!
//! - [`pattern`]: contents that say where and when they were written;
//! - [`images`]: the kinds of image under test;
//! - [`buffer`]: a plain buffer to hold disks against;
//! - [`history`]: what was written when, and so what a crash may leave;
//! - [`workload`]: seeded operations and the threads that run them;
//! - [`crash`]: crash states checked against the history;
//! - [`repairs`]: damaged images, and what a crash may leave of their repair;
//! - [`sizes`]: changes of size and layout, and what a crash may leave of them;
//! - [`drawn`]: such changes by chance;
//! - [`without`]: recordings from which one sync after the other is taken away;
//! - [`chains`]: images that stand on one another, and what a crash may leave of changing them;
//! - [`commands`]: what else is done to images, and what a crash may leave of it;
//! - [`toy`]: a format so simple that only the harness can be wrong, with flaws on request;
//! - [`partitions`]: partition tables with whatever is wanted in them;
//! - [`corpus`], [`tools`]: files and programs from outside;
//! - [`skip`]: what cannot run here.
//!
//! Environment: `FLATDISK_SEED` repeats a run; `FLATDISK_CRASH_STATES` and `FLATDISK_MODEL_OPS`
//! make it longer; `FLATDISK_ONLY` picks the kinds of image whose name has these words;
//! `FLATDISK_CORPUS` names the folder of foreign images;
//! `FLATDISK_REQUIRE_TOOLS=1` turns every SKIPPED into a failure.

// Each test program uses its own part of this, and may panic on what it made itself.
#![allow(dead_code, clippy::unwrap_used)]

pub mod buffer;
pub mod chains;
pub mod children;
pub mod commands;
pub mod corpus;
pub mod crash;
pub mod drawn;
pub mod history;
pub mod images;
pub mod partitions;
pub mod pattern;
pub mod repairs;
pub mod sizes;
pub mod skip;
pub mod tools;
pub mod toy;
pub mod without;
pub mod workload;

pub use skip::skip;

/// The number in environment variable `name`, or `default`.
pub fn number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")),
        Err(_) => default,
    }
}

/// The seed of this run: `FLATDISK_SEED`, or one that is printed for repeating.
pub fn seed() -> u64 {
    static SEED: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *SEED.get_or_init(|| {
        let seed = number("FLATDISK_SEED", fastrand::u64(..1_000_000));
        eprintln!("FLATDISK_SEED={seed}");
        seed
    })
}

/// A temporary folder, in memory where there is such a place: nothing here needs a real disk's syncs.
pub fn folder() -> tempfile::TempDir {
    let memory = std::path::Path::new("/dev/shm");
    let made = match std::env::var_os("TMPDIR").is_none() && memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    };
    made.expect("a temporary folder")
}

/// Runs `f` for every item on as many threads as there are processors; the results in order.
pub fn in_parallel<'a, T: Sync, R: Send>(items: &'a [T], f: impl Fn(&'a T) -> R + Sync) -> Vec<R> {
    let next = std::sync::atomic::AtomicUsize::new(0);
    let results: Vec<_> = items.iter().map(|_| parking_lot::Mutex::new(None)).collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads.min(items.len()) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    let Some(item) = items.get(index) else { break };
                    *results[index].lock() = Some(f(item));
                }
            });
        }
    });
    results.into_iter().map(|result| result.into_inner().expect("every item was done")).collect()
}
