//! Every crash of a workload, at every moment: what was flushed is there, every other sector is old
//! or new, the tables are whole, and the image can be written again.

use std::path::Path;
use std::sync::Arc;

use fastrand::Rng;
use uuid::Uuid;

use super::super::headers::Header;
use super::super::layout::{HEADER_BYTES, HEADER_OFFSETS};
use super::recorder::{Op, RecordingHost, crash};
use super::{MIB, PATH, Vhdx, contents, spec};
use crate::disk::Disk;
use crate::formats::{self, CreateSpec, OpenOptions, vhdx};
use crate::storage::memory::MemoryHost;
use crate::storage::{Access, Host};

const SECTOR: usize = 512;
const BASE: &str = "/d/base.vhdx";

/// What a test does to a disk, in units of sectors; each write has its own value.
#[derive(Debug, Clone)]
enum Step {
    Write(usize, usize, u32),
    Discard(usize, usize),
    Flush,
}

/// What the sectors of the disk may hold: the first value is the flushed one.
type Allowed = Vec<Vec<u32>>;

impl Step {
    fn run(&self, disk: &Disk) {
        match *self {
            Step::Write(at, count, value) => {
                let data: Vec<u8> =
                    value.to_le_bytes().into_iter().cycle().take(count * SECTOR).collect();
                disk.write_at((at * SECTOR) as u64, &data).unwrap();
            }
            Step::Discard(at, count) => {
                disk.discard((at * SECTOR) as u64, (count * SECTOR) as u64).unwrap();
            }
            Step::Flush => disk.flush().unwrap(),
        }
    }

    /// What may be seen once the step has begun, and, with `done`, once it is over.
    fn allow(&self, allowed: &mut Allowed, done: bool) {
        let (at, count, value) = match *self {
            Step::Write(at, count, value) => (at, count, value),
            Step::Discard(at, count) => (at, count, 0),
            Step::Flush => {
                if done {
                    allowed.iter_mut().for_each(|values| {
                        values.drain(..values.len() - 1);
                    });
                }
                return;
            }
        };
        if !done {
            allowed[at..at + count].iter_mut().for_each(|values| values.push(value));
        }
    }
}

fn workload(rng: &mut Rng, sectors: usize, steps: usize) -> Vec<Step> {
    (0..steps)
        .map(|i| {
            let at = rng.usize(..sectors);
            let longest = if rng.u8(..4) == 0 { 5000 } else { 100 };
            let count = rng.usize(1..longest).min(sectors - at);
            match rng.u8(..10) {
                0..6 => Step::Write(at, count, 0x0101_0101 * (i as u32 % 200 + 1) + i as u32),
                6 => Step::Discard(at, rng.usize(1..5000).min(sectors - at)),
                7 => {
                    let block = MIB as usize / SECTOR;
                    let at = at / block * block;
                    Step::Discard(at, block.min(sectors - at))
                }
                _ => Step::Flush,
            }
        })
        .chain([Step::Flush])
        .collect()
}

/// Sectors as the values they are filled with.
fn values(disk: &Disk) -> Vec<u32> {
    let bytes = contents(disk);
    let value = |sector: &[u8]| {
        let mut words = sector.chunks_exact(4).map(|w| u32::from_le_bytes(w.try_into().unwrap()));
        let first = words.next().unwrap();
        assert!(words.all(|w| w == first), "a torn sector");
        first
    };
    bytes.chunks_exact(SECTOR).map(value).collect()
}

fn open(host: &Arc<RecordingHost>, access: Access) -> formats::Image {
    let host: Arc<dyn Host> = host.clone();
    formats::open(&host, Path::new(PATH), &OpenOptions::new(access)).unwrap()
}

fn verify(host: &Arc<RecordingHost>, access: Access, allowed: &Allowed, context: &str) {
    let image = open(host, access);
    for (i, (value, allowed)) in values(&image.disk).iter().zip(allowed).enumerate() {
        assert!(allowed.contains(value), "{context}: sector {i} is {value:#x}, not {allowed:x?}");
    }
    let host: Arc<dyn Host> = host.clone();
    let report = formats::check(&host, Path::new(PATH), &OpenOptions::new(Access::Read)).unwrap();
    assert_eq!(report.errors, 0, "{context}: {:?}", report.findings);
}

/// Runs `steps` on an image, then plays crashes; `depth` more crashes hit each recovery.
fn play(
    start: &[u8],
    others: &Arc<MemoryHost>,
    first: &Allowed,
    steps: &[Step],
    rng: &mut Rng,
    depth: u32,
) {
    let host = RecordingHost::new(start, others.clone());
    let image = open(&host, Access::Write);
    for (i, step) in steps.iter().enumerate() {
        host.file.mark(2 * i);
        step.run(&image.disk);
        host.file.mark(2 * i + 1);
    }
    image.disk.close().unwrap();
    let ops = host.file.ops();

    let mut allowed = first.clone();
    for count in 0..=ops.len() {
        if let Some(Op::Mark(mark)) = count.checked_sub(1).map(|last| &ops[last]) {
            steps[mark / 2].allow(&mut allowed, mark % 2 == 1);
        }
        if depth == 0 && rng.u8(..6) != 0 {
            continue;
        }
        let context = format!("crash after {count} of {} operations", ops.len());
        let state = crash(start, &ops, count, rng);
        let crashed = RecordingHost::new(&state, others.clone());
        verify(&crashed, Access::Read, &allowed, &context);
        if depth > 0 && rng.u8(..8) == 0 {
            let now = {
                let image = open(&crashed, Access::Read);
                values(&image.disk).into_iter().map(|value| vec![value]).collect()
            };
            let more = workload(rng, allowed.len(), 5);
            play(&state, others, &now, &more, rng, depth - 1);
        }
    }
    let after =
        RecordingHost::new(&crash(start, &ops, ops.len(), &mut Rng::with_seed(0)), others.clone());
    assert!(!open(&after, Access::Read).info.dirty);
}

fn image(others: &MemoryHost, path: &str) -> Vec<u8> {
    others.file(Path::new(path)).unwrap().to_vec()
}

#[test]
fn dynamic_disks_survive_every_crash() {
    for seed in 0..3 {
        println!("seed {seed}");
        let mut rng = Rng::with_seed(seed);
        let others = MemoryHost::new();
        let spec = CreateSpec { block_size: Some(MIB), ..spec(5 * MIB + 4096) };
        formats::create(&Vhdx, &*others, Path::new(PATH), &spec).unwrap();
        let sectors = spec.size as usize / SECTOR;
        let steps = workload(&mut rng, sectors, 25);
        let mut start = image(&others, PATH);
        // A length that is no multiple of 1 MiB is made one.
        start.resize(start.len() + 100 * seed as usize, 0xee);
        play(&start, &others, &vec![vec![0]; sectors], &steps, &mut rng, 1);
    }
}

#[test]
fn repairs_of_the_first_write_survive_every_crash() {
    type Damage<'a> = &'a dyn Fn(&mut Vec<u8>);
    let headers = |change: fn(&mut Header)| {
        move |bytes: &mut Vec<u8>| {
            for at in HEADER_OFFSETS {
                let slot = at as usize..at as usize + HEADER_BYTES;
                let old: [u8; HEADER_BYTES] = bytes[slot.clone()].try_into().unwrap();
                let mut header = Header::decode(&old).unwrap();
                change(&mut header);
                bytes[slot].copy_from_slice(&header.encode());
            }
        }
    };
    let no_log = headers(|h| (h.log_length, h.log_offset) = (0, 0));
    let identical = headers(|h| (h.sequence, h.file_write) = (7, Uuid::nil()));
    let cases: [(&str, Damage<'_>); 6] = [
        ("first header", &|b| b[70 << 10 | 5] ^= 1),
        ("second header", &|b| b[130 << 10 | 5] ^= 1),
        ("first region table", &|b| b[195 << 10] ^= 1),
        ("second region table", &|b| b[260 << 10] ^= 1),
        ("no log", &no_log),
        ("identical headers", &identical),
    ];
    for (seed, (what, damage)) in (20..).zip(cases) {
        println!("{what}");
        let mut rng = Rng::with_seed(seed);
        let others = MemoryHost::new();
        let spec = CreateSpec { block_size: Some(MIB), ..spec(2 * MIB) };
        formats::create(&Vhdx, &*others, Path::new(PATH), &spec).unwrap();
        let sectors = spec.size as usize / SECTOR;
        let steps = workload(&mut rng, sectors, 4);
        let mut start = image(&others, PATH);
        damage(&mut start);
        play(&start, &others, &vec![vec![0]; sectors], &steps, &mut rng, 1);
    }
}

#[test]
fn a_flush_of_several_entries_never_shows_a_block_without_its_bitmap() {
    let others = MemoryHost::new();
    let host: Arc<dyn Host> = others.clone();
    let spec = CreateSpec { block_size: Some(MIB), ..spec(40 << 30) };
    formats::create(&Vhdx, &*others, Path::new(BASE), &spec).unwrap();
    let base = super::open_with(&host, BASE, Access::Read).unwrap();
    vhdx::create_child(&*others, Path::new(PATH), &base, &CreateSpec::default()).unwrap();
    let start = image(&others, PATH);
    let recorded = RecordingHost::new(&start, others.clone());
    let child = open(&recorded, Access::Write);
    // A page of the BAT covers 512 MiB, the bitmap's entry is behind those of its 4 GiB.
    for i in 0..80 {
        child.disk.write_at(i * (512 << 20), &[1; SECTOR]).unwrap();
    }
    child.disk.flush().unwrap();
    let ops = recorded.file.ops();
    let entries =
        ops.iter().filter(|op| matches!(op, Op::Write(at, _) if (MIB..2 * MIB).contains(at)));
    assert!(entries.count() > 2);
    let mut rng = Rng::with_seed(0);
    for count in (0..=ops.len()).filter(|n| *n == ops.len() || matches!(ops[*n], Op::Sync)) {
        let crashed = RecordingHost::new(&crash(&start, &ops, count, &mut rng), others.clone());
        let host: Arc<dyn Host> = crashed;
        let options = OpenOptions::new(Access::Read);
        let report = formats::check(&host, Path::new(PATH), &options).unwrap();
        assert_eq!(report.errors, 0, "crash after {count}: {:?}", report.findings);
    }
}

#[test]
fn children_survive_every_crash() {
    for (seed, sector) in [(10, 512), (11, 512)] {
        println!("seed {seed}");
        let mut rng = Rng::with_seed(seed);
        let others = MemoryHost::new();
        let host: Arc<dyn Host> = others.clone();
        let spec = CreateSpec {
            block_size: Some(MIB),
            logical_sector: Some(sector),
            ..spec(5 * MIB + 4096)
        };
        let sectors = spec.size as usize / SECTOR;
        formats::create(&Vhdx, &*others, Path::new(BASE), &spec).unwrap();
        let base = super::open_with(&host, BASE, Access::Write).unwrap();
        let mut allowed = vec![vec![0]; sectors];
        for step in workload(&mut rng, sectors, 12) {
            step.run(&base.disk);
            step.allow(&mut allowed, false);
        }
        base.disk.close().unwrap();
        Step::Flush.allow(&mut allowed, true);

        let base = super::open_with(&host, BASE, Access::Read).unwrap();
        vhdx::create_child(&*others, Path::new(PATH), &base, &CreateSpec::default()).unwrap();
        let steps = workload(&mut rng, sectors, 25);
        play(&image(&others, PATH), &others, &allowed, &steps, &mut rng, 1);
    }
}
