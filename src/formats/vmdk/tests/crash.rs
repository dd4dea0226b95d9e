//! Power cuts, on disks that the crash tests of all formats do not have: extents that begin and end in
//! the middle of grains, children of every kind, grains of one sector.

use super::*;
use crate::disk::map::Geometry;
use crate::formats::vmdk::create_child;
use crate::storage::crash::{Choice, CrashPoint};
use crate::storage::recording::{Change, RecordingHost};

const SECTOR: usize = Geometry::SECTOR as usize;

/// Small disks that have tables.
fn shapes() -> Vec<(&'static str, Arc<MemoryHost>)> {
    let small = CreateSpec { block_size: Some(4096), ..spec("monolithicSparse", 300 << 10) };
    let split = MemoryHost::new();
    add_sparse(&split, "a", 301, 8);
    add_sparse(&split, "b", 299, 16);
    add(&split, "d.vmdk", custom("RW 301 SPARSE \"a\"\nRW 299 SPARSE \"b\"").as_bytes());
    let mut shapes = vec![
        ("sparse", created("d.vmdk", &small)),
        ("split", split),
        ("vmfsSparse", created("d.vmdk", &spec("vmfsSparse", 300 << 10))),
    ];
    for (shape, subformat) in [("child", "monolithicFlat"), ("vmfsSparse child", "vmfs")] {
        let host = created("base.vmdk", &spec(subformat, 300 << 10));
        let base = open_rw(&host, "base.vmdk");
        base.disk.write_at(5000, &[0xba; 200_000]).unwrap();
        base.disk.close().unwrap();
        let base = open_with(&host, "base.vmdk", Access::Read).unwrap();
        create_child(&*host, &at("d.vmdk"), &base, &CreateSpec::default()).unwrap();
        shapes.push((shape, host));
    }
    shapes
}

fn open_recorded(recorder: &Arc<RecordingHost>) -> Image {
    let host: Arc<dyn Host> = recorder.clone();
    formats::open(&host, &at("d.vmdk"), &OpenOptions::new(Access::Write)).unwrap()
}

/// What the disk may hold from a position of the recording on: its contents at the last flush, and
/// after every change since then.
type Moments = Vec<(usize, Vec<Vec<u8>>)>;

/// Writes, discards and flushes by chance, and closes.
fn workload(recorder: &Arc<RecordingHost>, rng: &mut fastrand::Rng) -> Moments {
    let image = open_recorded(recorder);
    let mut model = contents(&image.disk);
    let mut possible = vec![model.clone()];
    let mut moments = Moments::new();
    for step in 0..50 {
        let before = recorder.position();
        let flush = rng.u8(..5) == 0;
        if flush {
            image.disk.flush().unwrap();
        } else {
            let start = rng.usize(..model.len()) / SECTOR * SECTOR;
            let len = (rng.usize(1..30) * SECTOR).min(model.len() - start);
            if rng.u8(..3) == 0 {
                image.disk.discard(start as u64, len as u64).unwrap();
                model[start..start + len].fill(0);
            } else {
                image.disk.write_at(start as u64, &vec![step + 1; len]).unwrap();
                model[start..start + len].fill(step + 1);
            }
            possible.push(model.clone());
        }
        // While an operation is under way its result may be there already.
        moments.push((before, possible.clone()));
        if flush {
            possible = vec![model.clone()];
        }
    }
    moments.push((recorder.position(), possible));
    image.disk.close().unwrap();
    moments
}

/// Opens what a crash left, compares, writes on, and checks.
fn assert_survived(host: &Arc<MemoryHost>, possible: &[Vec<u8>], context: &str) {
    let image = open_with(host, "d.vmdk", Access::Write).unwrap();
    let mut found = contents(&image.disk);
    for (number, sector) in found.chunks(SECTOR).enumerate() {
        let place = number * SECTOR..number * SECTOR + sector.len();
        let known = possible.iter().any(|then| &then[place.clone()] == sector);
        assert!(known, "{context}\nsector {number} holds what nobody wrote");
    }
    image.disk.write_at(700, &[0xff; 9000]).unwrap_or_else(|e| panic!("{context}\n{e}"));
    found[700..9700].fill(0xff);
    image.disk.close().unwrap();
    drop(image);
    let report = check(host, "d.vmdk");
    assert_eq!(report.errors, 0, "{context}\n{:#?}", report.findings);
    let image = open_with(host, "d.vmdk", Access::Read).unwrap();
    assert!(contents(&image.disk) == found, "{context}");
}

#[test]
fn every_crash_leaves_what_was_flushed() {
    for seed in 0..4 {
        for (shape, start) in shapes() {
            let mut rng = fastrand::Rng::with_seed(seed);
            let recorder = RecordingHost::over(&start);
            let moments = workload(&recorder, &mut rng);
            let recording = recorder.recording();
            let mut point = CrashPoint::start(&recording);
            loop {
                let moment = moments.partition_point(|(position, _)| *position <= point.at());
                let possible = &moments[moment.max(1) - 1].1;
                let mut choices = vec![Choice::None, Choice::All, Choice::Random(rng.u64(..))];
                if !point.pending().is_empty() {
                    choices.push(Choice::Without(rng.usize(..point.pending().len())));
                }
                for choice in choices {
                    let fates = point.fates(choice);
                    let context =
                        format!("{shape}, seed {seed}, {choice}: {}", point.describe(&fates));
                    assert_survived(&point.state(&fates), possible, &context);
                }
                if !point.advance() {
                    break;
                }
            }
        }
    }
}

#[test]
fn a_flush_costs_at_most_two_syncs_of_each_file() {
    for (shape, files) in shapes() {
        let recorder = RecordingHost::over(&files);
        let image = open_recorded(&recorder);
        image.disk.write_at(0, &[1; 512]).unwrap();
        image.disk.flush().unwrap();
        let most_syncs_of = |change: &dyn Fn()| {
            let before = recorder.position();
            change();
            image.disk.flush().unwrap();
            let recording = recorder.recording();
            let synced: Vec<_> = recording.ops()[before..]
                .iter()
                .filter(|op| matches!(op.change, Change::Sync))
                .map(|op| op.file)
                .collect();
            let of = |file| synced.iter().filter(|other| **other == file).count();
            synced.iter().map(|file| of(*file)).max().unwrap_or(0)
        };
        let whole = vec![2; image.disk.size() as usize];
        assert_eq!(most_syncs_of(&|| image.disk.write_at(0, &whole).unwrap()), 2, "{shape}");
        assert_eq!(most_syncs_of(&|| image.disk.write_at(3, &[3; 9]).unwrap()), 1, "{shape}");
        assert_eq!(most_syncs_of(&|| ()), 0, "{shape}");
    }
}
