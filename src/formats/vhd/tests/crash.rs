//! Every state that a power cut may leave: the image opens, what was flushed is there, and every
//! other sector holds something that was written to it since.

use super::recorder::{Op, Recorder};
use super::*;

/// What the disk held at some moment.
struct Version {
    /// Operations on the file when the change began.
    from: usize,
    /// Operations on the file when a flush that covers it had returned.
    durable: Option<usize>,
    disk: Vec<u8>,
}

/// Applies an operation, or of a write or punch the sectors that `arrives` picks.
fn apply(file: &MemoryFile, op: &Op, mut arrives: impl FnMut() -> bool) {
    let sectors = |at: u64, len: u64| {
        let end = at + len;
        std::iter::successors(Some(at), move |at| Some((at / 512 + 1) * 512))
            .take_while(move |at| *at < end)
            .map(move |at| at..((at / 512 + 1) * 512).min(end))
    };
    match op {
        Op::Write(at, data) => {
            for part in sectors(*at, data.len() as u64) {
                if arrives() {
                    let data = &data[(part.start - at) as usize..(part.end - at) as usize];
                    file.write_at(part.start, data).unwrap();
                }
            }
        }
        Op::Punch(at, len) => {
            for part in sectors(*at, *len) {
                if arrives() {
                    file.punch_hole(part.start, part.end - part.start).unwrap();
                }
            }
        }
        Op::SetLen(len) => {
            if arrives() {
                file.set_len(*len).unwrap();
            }
        }
        Op::Sync => {}
    }
}

/// The file after a crash when `point` operations had been done.
fn crashed(rng: &mut fastrand::Rng, base: &[u8], ops: &[Op], point: usize) -> Vec<u8> {
    let synced = ops[..point].iter().rposition(|op| matches!(op, Op::Sync)).map_or(0, |i| i + 1);
    let file = MemoryFile::new(PATH, base);
    ops[..synced].iter().for_each(|op| apply(&file, op, || true));
    let mode = rng.u8(..6);
    let left_out = rng.usize(..(point - synced).max(1));
    for (index, op) in ops[synced..point].iter().enumerate() {
        match mode {
            0 => {}
            1 => apply(&file, op, || true),
            2 => apply(&file, op, || index != left_out),
            3 => apply(&file, op, || index == left_out),
            4 => {
                let whole = rng.bool();
                apply(&file, op, || whole);
            }
            _ => apply(&file, op, || rng.bool()),
        }
    }
    file.to_vec()
}

/// Compares each sector with the newest version that must be there and all later ones.
fn assert_possible(image: &Image, versions: &[Version], point: usize, what: &str) {
    let durable = |v: &Version| v.durable.is_some_and(|at| at <= point);
    let first = versions.iter().rposition(durable).unwrap_or(0);
    let last = versions.iter().rposition(|v| v.from <= point).unwrap_or(0);
    let found = read(image, 0, versions[0].disk.len());
    for sector in 0..found.len() / 512 {
        let range = sector * 512..(sector + 1) * 512;
        let possible =
            versions[first..=last].iter().any(|v| v.disk[range.clone()] == found[range.clone()]);
        assert!(possible, "{what}: sector {sector} holds what was never there");
    }
}

fn run(seed: u64, host: &Arc<MemoryHost>) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let base = bytes(host);
    let image = Recorder::new(file(host));
    let shared = image.host(host);
    let options = OpenOptions::new(Access::Write);
    let mut disk = formats::open(&shared, Path::new(PATH), &options).unwrap();
    let size = disk.disk.size() as usize;
    let now = || image.count();

    let mut versions = vec![Version { from: 0, durable: Some(0), disk: read(&disk, 0, size) }];
    for _ in 0..60 {
        let start = rng.usize(..size / 512) * 512;
        let most = if rng.u8(..4) == 0 { size - start } else { (size - start).min(9000) };
        let len = rng.usize(1..=most / 512) * 512;
        let mut next = versions.last().unwrap().disk.clone();
        let from = now();
        match rng.u8(..8) {
            0..5 => {
                let byte = rng.u8(1..);
                next[start..start + len].fill(byte);
                disk.disk.write_at(start as u64, &vec![byte; len]).unwrap();
            }
            5 => {
                next[start..start + len].fill(0);
                disk.disk.discard(start as u64, len as u64).unwrap();
            }
            6 => {
                disk.disk.flush().unwrap();
                versions.last_mut().unwrap().durable = Some(now());
            }
            _ if rng.u8(..4) == 0 => {
                disk.disk.close().unwrap();
                versions.last_mut().unwrap().durable = Some(now());
                disk = formats::open(&shared, Path::new(PATH), &options).unwrap();
            }
            _ => {}
        }
        if versions.last().unwrap().disk != next {
            versions.push(Version { from, durable: None, disk: next });
        }
    }
    disk.disk.close().unwrap();
    versions.last_mut().unwrap().durable = Some(now());

    let ops = image.ops();
    for point in 0..=ops.len() {
        let left = copy(host);
        left.insert(MemoryFile::new(PATH, &crashed(&mut rng, &base, &ops, point)));
        let what = format!("seed {seed}, operation {point} of {}", ops.len());
        let image = open(&left);
        assert_possible(&image, &versions, point, &what);
        // The image can be written, and nothing else changes by that.
        let held = read(&image, 0, size);
        let at = rng.usize(..size / 512) * 512;
        image.disk.write_at(at as u64, &[0xaa; 512]).unwrap();
        image.disk.close().unwrap();
        let mut after = held;
        after[at..at + 512].fill(0xaa);
        assert!(read(&open(&left), 0, size) == after, "{what}: writing changed something else");
        let report = check(&left);
        assert_eq!(report.errors, 0, "{what}: {:?}", report.findings);
    }
}

/// Fills the disk and forgets all its blocks, as crashes before could have: the file is full of
/// space that nothing points at and that is not zero.
fn leave_stale_space(host: &Arc<MemoryHost>) {
    let image = open(host);
    image.disk.write_at(0, &vec![0xdd; image.disk.size() as usize]).unwrap();
    image.disk.close().unwrap();
    let mut bytes = bytes(host);
    let blocks = image.disk.size().div_ceil(image.disk.geometry().block_size);
    (0..blocks as usize).for_each(|block| set_bat(&mut bytes, block, u32::MAX));
    host.insert(MemoryFile::new(PATH, &bytes));
}

#[test]
fn dynamic_disks_survive_a_power_cut_at_any_moment() {
    for seed in 0..6 {
        for (size, block_size) in [(96 << 10, 4096), ((200 << 10) + 512, 64 << 10)] {
            let host = made("dynamic", size, Some(block_size));
            run(seed, &host);
            let host = made("dynamic", size, Some(block_size));
            leave_stale_space(&host);
            run(seed, &host);
        }
    }
}

#[test]
fn children_survive_a_power_cut_at_any_moment() {
    for seed in 0..6 {
        for (size, block_size) in [(96 << 10, 4096), ((200 << 10) + 512, 64 << 10)] {
            for stale in [false, true] {
                let host = made("dynamic", size, Some(4096));
                let image = open(&host);
                image.disk.write_at(size / 4, &vec![0xee; size as usize / 2]).unwrap();
                image.disk.close().unwrap();
                add_child(&host, Some(block_size));
                if stale {
                    leave_stale_space(&host);
                }
                run(seed, &host);
            }
        }
    }
}
