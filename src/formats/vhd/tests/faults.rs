//! Every operation on the host file fails once: the failure is reported, and nothing else is lost.

use super::recorder::Recorder;
use super::*;
use crate::error::ErrorKind;

/// What a sector may hold: one value, or several after a failed change.
type Possible = Vec<Vec<u8>>;

/// Runs the same operations with the one numbered `at` failing; returns whether it got that far.
fn run(seed: u64, original: &Arc<MemoryHost>, at: usize, errno: i32) -> bool {
    let host = copy(original);
    let recorder = Recorder::failing(file(&host), at, errno);
    let shared = recorder.host(&host);
    let options = OpenOptions::new(Access::Write);
    let image = formats::open(&shared, Path::new(PATH), &options).unwrap();
    let size = image.disk.size() as usize;
    let mut sectors: Vec<Possible> =
        read(&image, 0, size).chunks(512).map(|s| vec![s.to_vec()]).collect();

    let mut rng = fastrand::Rng::with_seed(seed);
    let mut failures = Vec::new();
    for _ in 0..30 {
        let start = rng.usize(..size / 512) * 512;
        let len = rng.usize(1..=(size - start).min(40_000) / 512) * 512;
        let byte = if rng.u8(..4) == 0 { 0 } else { rng.u8(1..) };
        let result = match byte {
            0 => image.disk.discard(start as u64, len as u64),
            _ => image.disk.write_at(start as u64, &vec![byte; len]),
        };
        for sector in &mut sectors[start / 512..(start + len) / 512] {
            if result.is_ok() {
                sector.clear();
            }
            sector.push(vec![byte; 512]);
        }
        failures.extend(result.err());
        if rng.u8(..5) == 0 {
            failures.extend(image.disk.flush().err());
        }
    }
    let closed = image.disk.close();
    let what = format!("seed {seed}, operation {at}, errno {errno}: {failures:?}");
    let latched = failures.iter().any(|e| e.kind() == ErrorKind::Failed);
    assert!(closed.is_ok() || latched || at + 10 > recorder.count(), "{what}: {closed:?}");
    let reached = recorder.count() > at;

    let image = open(&host);
    if closed.is_ok() {
        let found = read(&image, 0, size);
        for (index, possible) in sectors.iter().enumerate() {
            let found = &found[index * 512..][..512];
            assert!(possible.iter().any(|p| p == found), "{what}: sector {index}");
        }
    }
    image.disk.write_at(0, &[1; 512]).unwrap();
    image.disk.close().unwrap();
    let report = check(&host);
    assert_eq!(report.errors, 0, "{what}: {:?}", report.findings);
    reached
}

fn run_all(seed: u64, host: &Arc<MemoryHost>) {
    for errno in [libc::ENOSPC, libc::EIO] {
        let mut at = 0;
        while run(seed, host, at, errno) {
            at += 1;
        }
        assert!(at > 50, "{at} operations");
    }
}

#[test]
fn dynamic_disks_lose_nothing_by_a_failed_operation() {
    for seed in 0..3 {
        run_all(seed, &made("dynamic", 96 << 10, Some(4096)));
        run_all(seed, &made("dynamic", (200 << 10) + 512, Some(64 << 10)));
    }
}

#[test]
fn children_lose_nothing_by_a_failed_operation() {
    for seed in 0..3 {
        let host = made("dynamic", 96 << 10, Some(4096));
        let image = open(&host);
        image.disk.write_at(0, &[0xee; 50_000]).unwrap();
        image.disk.close().unwrap();
        add_child(&host, Some(64 << 10));
        run_all(seed, &host);
    }
}
