//! Random operations against a plain array of bytes.

use std::ops::Range;

use super::*;
use crate::disk::Disk;

/// What the disk should hold, and what of it a crash may not change.
struct Model {
    now: Vec<u8>,
    /// Sectors written since the last flush.
    unflushed: Vec<bool>,
}

impl Model {
    /// A model of what the image holds now.
    fn of(image: &Image) -> Self {
        let size = image.disk.size() as usize;
        Self { now: read(image, 0, size), unflushed: vec![false; size / 512] }
    }

    fn change(&mut self, range: Range<usize>, with: impl FnOnce(&mut [u8])) {
        if !range.is_empty() {
            self.unflushed[range.start / 512..=(range.end - 1) / 512].fill(true);
            with(&mut self.now[range]);
        }
    }

    /// Compares what a reopened image holds with what was flushed.
    fn assert_survives(&self, image: &Image, what: &str) {
        let found = read(image, 0, self.now.len());
        for (sector, unflushed) in self.unflushed.iter().enumerate() {
            let range = sector * 512..(sector + 1) * 512;
            assert!(*unflushed || found[range.clone()] == self.now[range], "{what}: {sector}");
        }
    }
}

/// A range inside `within`, its length mostly small and sometimes large.
fn some_range(rng: &mut fastrand::Rng, within: &Range<usize>) -> Range<usize> {
    let start = rng.usize(within.clone());
    let most = within.end - start;
    let len = match rng.u8(..10) {
        0..5 => rng.usize(..=most.min(5000)),
        5..8 => rng.usize(..=most.min(700_000)),
        _ => rng.usize(..=most),
    };
    if rng.bool() {
        // Aligned as a guest would write.
        let start = start / 4096 * 4096;
        let start = start.max(within.start);
        return start..(start + len.next_multiple_of(4096)).min(within.end);
    }
    start..start + len
}

/// One operation inside `within`, on the disk and on `bytes`, the model of that part.
fn step(rng: &mut fastrand::Rng, disk: &Disk, within: &Range<usize>, model: &mut Model) {
    let range = some_range(rng, within);
    match rng.u8(..10) {
        0..5 => {
            let byte = rng.u8(..);
            let data: Vec<u8> = (0..range.len()).map(|i| byte ^ (i / 7) as u8).collect();
            disk.write_at(range.start as u64, &data).unwrap();
            model.change(range, |bytes| bytes.copy_from_slice(&data));
        }
        5..8 => {
            let mut found = vec![0; range.len()];
            disk.read_at(range.start as u64, &mut found).unwrap();
            assert!(found == model.now[range.clone()], "read of {range:?}");
        }
        _ => {
            disk.discard(range.start as u64, range.len() as u64).unwrap();
            model.change(range, |bytes| bytes.fill(0));
        }
    }
}

fn run(seed: u64, host: &Arc<MemoryHost>, steps: usize) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut image = open(host);
    let mut model = Model::of(&image);
    let size = image.disk.size();
    for number in 0..steps {
        step(&mut rng, &image.disk, &(0..size as usize), &mut model);
        match rng.u8(..40) {
            0..4 => {
                image.disk.flush().unwrap();
                model.unflushed.fill(false);
            }
            4 => {
                image.disk.close().unwrap();
                model.unflushed.fill(false);
                let report = check(host);
                assert_eq!(report.errors, 0, "{:?}", report.findings);
                image = open(host);
            }
            5 => {
                // What would be left if the process died here.
                let killed = copy(host);
                let left = open(&killed);
                model.assert_survives(&left, &format!("seed {seed}, step {number}"));
                left.disk.write_at(0, &read(&left, 0, 1)).unwrap();
                left.disk.close().unwrap();
                assert_eq!(check(&killed).errors, 0);
                model.assert_survives(&open(&killed), "after writing again");
            }
            _ => {}
        }
    }
    image.disk.close().unwrap();
    model.unflushed.fill(false);
    model.assert_survives(&open(host), "at the end");
}

#[test]
fn random_operations_on_fixed_disks_match_a_plain_array() {
    for seed in 0..4 {
        let size = (1 << 20) + 512;
        run(seed, &made("fixed", size, None), 300);
    }
}

#[test]
fn random_operations_on_blocks_of_4_kib_match_a_plain_array() {
    for seed in 0..8 {
        let size = (200 << 10) + 512;
        run(seed, &made("dynamic", size, Some(4096)), 500);
    }
}

#[test]
fn random_operations_on_blocks_of_512_kib_match_a_plain_array() {
    for seed in 0..4 {
        let size = (5 << 20) + 1024;
        run(seed, &made("dynamic", size, Some(512 << 10)), 200);
    }
}

#[test]
fn random_operations_on_blocks_of_2_mib_match_a_plain_array() {
    for seed in 0..3 {
        let size = 7 << 20;
        run(seed, &made("dynamic", size, None), 150);
    }
}

/// A child of a parent that holds random data in places.
fn child(seed: u64, size: u64, block_size: Option<u64>) -> Arc<MemoryHost> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let host = made(if rng.bool() { "fixed" } else { "dynamic" }, size, None);
    let image = open(&host);
    let mut model = Model::of(&image);
    for _ in 0..20 {
        step(&mut rng, &image.disk, &(0..size as usize), &mut model);
    }
    image.disk.close().unwrap();
    add_child(&host, block_size);
    model.assert_survives(&open(&host), "before the first write");
    host
}

#[test]
fn random_operations_on_children_match_a_plain_array() {
    for seed in 0..4 {
        run(seed, &child(seed, (100 << 10) + 512, Some(4096)), 400);
        run(seed, &child(seed, (3 << 20) + 1024, Some(512 << 10)), 200);
        run(seed, &child(seed, 5 << 20, None), 150);
    }
    // A bitmap of two pages.
    run(9, &child(9, 33 << 20, Some(32 << 20)), 100);
}

#[test]
fn threads_on_neighbouring_ranges_do_not_disturb_each_other() {
    let size = (6 << 20) + 1536;
    for (seed, (subformat, block_size)) in
        [("fixed", None), ("dynamic", Some(4096)), ("dynamic", Some(512 << 10)), ("dynamic", None)]
            .into_iter()
            .enumerate()
    {
        run_threads(seed as u64, &made(subformat, size, block_size));
    }
    for (seed, block_size) in [4096, 512 << 10, 2 << 20].into_iter().enumerate() {
        run_threads(seed as u64, &child(seed as u64, size, Some(block_size)));
    }
}

fn run_threads(seed: u64, host: &Arc<MemoryHost>) {
    let image = open(host);
    let size = image.disk.size() as usize;
    let models: Vec<_> = std::thread::scope(|scope| {
        let image = &image;
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                // Neighbours share blocks, and even a sector.
                let part = (size * thread / 4 + 100)..(size * (thread + 1) / 4 + 100).min(size);
                let mut model = Model::of(image);
                scope.spawn(move || {
                    let mut rng = fastrand::Rng::with_seed(seed * 10 + thread as u64);
                    for _ in 0..120 {
                        step(&mut rng, &image.disk, &part, &mut model);
                        if rng.u8(..20) == 0 {
                            image.disk.flush().unwrap();
                        }
                    }
                    (part, model)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    image.disk.close().unwrap();
    assert_eq!(check(host).errors, 0);
    let image = open(host);
    for (part, model) in models {
        assert!(read(&image, part.start as u64, part.len()) == model.now[part.clone()], "{part:?}");
    }
}
