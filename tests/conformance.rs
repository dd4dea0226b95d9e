//! What every disk promises, whatever its format and geometry.

// The helpers here serve tests only.
#![allow(clippy::unwrap_used)]

mod common;

use std::ops::Range;
use std::sync::Arc;

use common::images::{Image, large, small};
use common::pattern;
use flatdisk::disk::Disk;
use flatdisk::disk::map::Source;
use flatdisk::disk::tables::MAX_DIRTY;
use flatdisk::error::ErrorKind;
use flatdisk::formats::{self, OpenOptions};
use flatdisk::storage::faulty::{Faults, FaultyHost};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::recording::RecordingHost;
use flatdisk::storage::{Access, Host};

const SECTOR: u64 = 512;

fn images() -> Vec<Image> {
    small().into_iter().chain(large()).collect()
}

/// A new image of every kind, opened for writing.
fn every_disk(test: impl Fn(&Image, &Arc<dyn Host>, &Disk)) {
    for image in images() {
        println!("{}", common::images::Kind::name(&image));
        let host: Arc<dyn Host> = MemoryHost::new();
        image.create_at(&*host, &image.path()).unwrap();
        let disk = open(&image, &host, Access::Write);
        test(&image, &host, &disk);
    }
}

fn open(image: &Image, host: &Arc<dyn Host>, access: Access) -> Arc<Disk> {
    formats::open(host, &image.path(), &OpenOptions::new(access)).unwrap().disk
}

fn read(disk: &Disk, range: Range<u64>) -> Vec<u8> {
    let mut buf = vec![0xee; (range.end - range.start) as usize];
    disk.read_at(range.start, &mut buf).unwrap();
    buf
}

fn all_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

#[test]
fn every_subformat_that_can_be_created_is_tested() {
    // A stream is written once, by tests/convert.rs; the other two are vmfs disks that take their space
    // at once.
    let elsewhere = ["streamOptimized", "vmfsPreallocated", "vmfsEagerZeroedThick"];
    let images = images();
    for format in formats::FORMATS {
        let subformats = format.subformats().iter().filter(|name| !elsewhere.contains(name));
        for subformat in subformats {
            let tested = images.iter().any(|image| {
                image.format == format.name() && image.spec.subformat.as_deref() == Some(subformat)
            });
            assert!(tested, "no test makes {} {subformat}", format.name());
        }
    }
}

#[test]
fn a_new_disk_has_the_size_asked_for_and_reads_as_zeroes() {
    every_disk(|image, host, disk| {
        let geometry = disk.geometry();
        assert_eq!(geometry.size, image.spec.size);
        assert_eq!(u64::from(geometry.logical_sector) % SECTOR, 0);
        if let Some(sector) = image.spec.logical_sector {
            assert_eq!(geometry.logical_sector, sector);
        }
        if let Some(block) = image.spec.block_size.filter(|_| !image.fixed()) {
            assert_eq!(geometry.block_size, block);
        }
        let size = disk.size();
        let step = geometry.block_size.clamp(SECTOR, 64 << 20);
        for start in (0..size).step_by(step as usize) {
            assert!(all_zero(&read(disk, start..(start + 5000).min(size))));
        }
        assert!(all_zero(&read(disk, size - 5000..size)));
        let image = formats::open(host, &image.path(), &OpenOptions::new(Access::Read)).unwrap();
        assert_eq!(image.info.virtual_size, size);
        assert!(!image.info.dirty && image.damage.is_empty() && image.info.warnings.is_empty());
    });
}

#[test]
fn ranges_outside_the_disk_are_refused_and_change_nothing() {
    every_disk(|_, _, disk| {
        let size = disk.size();
        for (offset, len) in [
            (size, 1),
            (size - 1, 2),
            (size + 1, 0),
            (size - SECTOR, SECTOR + 1),
            (u64::MAX, 1),
            (u64::MAX - 1, 4),
            (u64::MAX, 0),
            (1 << 63, 512),
        ] {
            let mut buf = vec![1; len as usize];
            let results = [
                disk.read_at(offset, &mut buf),
                disk.write_at(offset, &buf),
                disk.discard(offset, len),
            ];
            for result in results {
                let kind = result.map_err(|e| e.kind());
                assert_eq!(kind, Err(ErrorKind::OutOfRange), "{offset:#x}+{len}");
            }
        }
        assert_eq!(disk.discard(512, u64::MAX).unwrap_err().kind(), ErrorKind::OutOfRange);
        assert!(all_zero(&read(disk, size - SECTOR..size)));
        assert!(!disk.needs_flush());
    });
}

#[test]
fn nothing_is_a_range_too() {
    every_disk(|_, host, disk| {
        for offset in [0, 1, disk.size()] {
            disk.read_at(offset, &mut []).unwrap();
            disk.write_at(offset, &[]).unwrap();
            disk.discard(offset, 0).unwrap();
        }
        disk.flush().unwrap();
        let _ = host;
        assert!(all_zero(&read(disk, 0..SECTOR)));
    });
}

#[test]
fn the_last_sector_is_one_like_any_other() {
    every_disk(|image, host, disk| {
        let size = disk.size();
        let data = pattern::bytes(1, size - 700, 700);
        disk.write_at(size - 700, &data).unwrap();
        assert_eq!(read(disk, size - 700..size), data);
        disk.write_at(size - 1, &[0xaa]).unwrap();
        disk.close().unwrap();
        let disk = open(image, host, Access::Read);
        assert_eq!(read(&disk, size - 700..size - 1), data[..699]);
        assert_eq!(read(&disk, size - 1..size), [0xaa]);
        assert!(all_zero(&read(&disk, size - 3000..size - 700)));
    });
}

#[test]
fn odd_ranges_around_block_borders_keep_their_neighbours() {
    every_disk(|image, host, disk| {
        // Blocks may be as small as a sector; their borders are also those of larger ones.
        let block = disk.geometry().block_size.max(4096);
        let block = block.min(disk.size() / 2).next_multiple_of(SECTOR);
        // Around one border, then around the next, which meets what the first left.
        for (round, border) in [block, block * 2].into_iter().enumerate() {
            if border + 2000 > disk.size() {
                continue;
            }
            let start = border - 2000;
            let mut expected = read(disk, start..border + 2000);
            let cuts = [0, 1, 511, 512, 513, 1488, 1999, 2000, 2001, 2511, 2512, 3999, 4000];
            for (i, &from) in cuts.iter().enumerate() {
                for (j, &to) in cuts.iter().enumerate().skip(i + 1) {
                    let stamp = (round * 1000 + i * 20 + j) as u32;
                    let data = pattern::bytes(stamp, start + from as u64, (to - from) as u64);
                    disk.write_at(start + from as u64, &data).unwrap();
                    expected[from..to].copy_from_slice(&data);
                    if (i + j) % 5 == 0 {
                        disk.discard(start + from as u64, (to - from) as u64).unwrap();
                        expected[from..to].fill(0);
                    }
                    assert_eq!(read(disk, start..border + 2000), expected, "{from}..{to}");
                }
            }
            disk.flush().unwrap();
            let again = open(image, host, Access::Read);
            assert_eq!(read(&again, start..border + 2000), expected);
        }
    });
}

#[test]
fn a_discard_of_everything_leaves_zeroes_and_gives_space_back() {
    every_disk(|image, host, disk| {
        let size = disk.size();
        let places = [0, size / 3 / SECTOR * SECTOR, size - 100_000];
        for at in places {
            disk.write_at(at, &pattern::bytes(1, at, 100_000)).unwrap();
        }
        disk.flush().unwrap();
        let before = disk.allocated().unwrap();
        disk.discard(0, size).unwrap();
        for at in places {
            assert!(all_zero(&read(disk, at..at + 100_000)));
        }
        disk.flush().unwrap();
        disk.close().unwrap();
        let disk = open(image, host, Access::Read);
        for at in places {
            assert!(all_zero(&read(&disk, at..at + 100_000)));
        }
        let after = disk.allocated().unwrap();
        assert!(after + 200_000 < before, "{before} bytes before, {after} after");
    });
}

#[test]
fn extents_and_holes_tell_where_data_is() {
    every_disk(|_, _, disk| {
        let size = disk.size();
        let at = size / 2 / SECTOR * SECTOR;
        disk.write_at(at, &pattern::bytes(1, at, SECTOR)).unwrap();
        let list = disk.extents(0..size).unwrap();
        assert_eq!(list[0].start, 0);
        assert_eq!(list.last().map(|extent| extent.end()), Some(size));
        assert!(list.windows(2).all(|pair| pair[0].end() == pair[1].start));
        let stored = |extent: &&flatdisk::disk::map::Extent| {
            (extent.start..extent.end()).contains(&at)
                && matches!(extent.source, Source::File { .. })
        };
        assert!(list.iter().find(stored).is_some());
        let data = disk.next_data(at).unwrap().expect("there is data");
        assert_eq!(data.start, at);
        assert!(disk.next_data(0).unwrap().expect("there is data").start <= at);
        assert_eq!(disk.next_data(size).unwrap(), None);
        let hole = disk.next_hole(at).unwrap();
        assert!(hole > at && hole <= size);
        assert_eq!(disk.next_hole(size).unwrap(), size);
    });
}

#[test]
fn a_disk_opened_to_read_cannot_be_written_and_changes_nothing() {
    for image in images() {
        let memory = MemoryHost::new();
        image.create_at(&*memory, &image.path()).unwrap();
        let recorder = RecordingHost::over(&memory);
        let host: Arc<dyn Host> = recorder.clone();
        for access in [Access::Read, Access::Peek] {
            let disk = open(&image, &host, access);
            assert!(disk.read_only().is_some());
            assert_eq!(disk.write_at(0, &[1]).unwrap_err().kind(), ErrorKind::ReadOnly);
            assert_eq!(disk.discard(0, 512).unwrap_err().kind(), ErrorKind::ReadOnly);
            assert!(all_zero(&read(&disk, 0..SECTOR)));
            disk.flush().unwrap();
            disk.close().unwrap();
        }
        assert_eq!(recorder.position(), 0, "{image:?}");
    }
}

#[test]
fn opening_and_closing_without_a_write_changes_nothing() {
    for image in images() {
        let memory = MemoryHost::new();
        image.create_at(&*memory, &image.path()).unwrap();
        let recorder = RecordingHost::over(&memory);
        let host: Arc<dyn Host> = recorder.clone();
        let disk = open(&image, &host, Access::Write);
        assert!(all_zero(&read(&disk, disk.size() - 10_000..disk.size())));
        disk.flush().unwrap();
        disk.close().unwrap();
        assert_eq!(recorder.position(), 0, "{image:?}");
    }
}

#[test]
fn creating_is_durable_and_never_replaces_a_file() {
    for image in images() {
        let recorder = RecordingHost::over(&MemoryHost::new());
        let host: Arc<dyn Host> = recorder.clone();
        image.create_at(&*host, &image.path()).unwrap();
        let recording = recorder.recording();
        let mut point = flatdisk::storage::crash::CrashPoint::start(&recording);
        while point.advance() {}
        // Whatever is still pending may be lost.
        let fates = point.fates(flatdisk::storage::crash::Choice::None);
        let state: Arc<dyn Host> = point.state(&fates);
        let disk = open(&image, &state, Access::Write);
        assert_eq!(disk.size(), image.spec.size);

        let before = recorder.position();
        let error = image.create_at(&*host, &image.path()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Exists, "{error}");
        assert_eq!(recorder.position(), before);
        open(&image, &host, Access::Write);
    }
}

#[test]
fn a_new_image_has_nothing_for_a_check_to_find() {
    every_disk(|image, host, disk| {
        let check =
            || formats::check(host, &image.path(), &OpenOptions::new(Access::Read)).unwrap();
        let report = check();
        assert_eq!((report.errors, report.leaks), (0, 0), "{:?}", report.findings);
        let block = disk.geometry().block_size.min(1 << 20);
        for index in [3, 0, 1] {
            let at = (block * index).min(disk.size() - 600);
            disk.write_at(at, &pattern::bytes(1, at, 600)).unwrap();
        }
        disk.close().unwrap();
        let report = check();
        assert_eq!((report.errors, report.leaks), (0, 0), "{:?}", report.findings);
    });
}

/// Changes more pages of tables than may wait in memory: a sector in each of 5,000 places.
#[test]
fn changed_tables_in_memory_are_bounded() {
    const PLACES: u64 = 5000;
    let dir = common::folder();
    let host = flatdisk::storage::file::HostFs::shared();
    for (format, subformat, block, apart, page) in [
        ("vhd", "dynamic", Some(16 << 20), 16 << 20, 4096),
        ("vhdx", "dynamic", Some(1 << 20), 16 << 20, 4096),
        ("vmdk", "monolithicSparse", None, 32 << 20, 2048),
    ] {
        let mut image = Image::new(format, subformat, PLACES * apart);
        image.spec.block_size = block;
        let [base, child] = ["base", "child"].map(|n| dir.path().join(n).with_extension(format));
        image.create_at(&*host, &base).unwrap();
        let parent = formats::open(&host, &base, &OpenOptions::new(Access::Read)).unwrap();
        let driver = formats::by_name(format).unwrap();
        driver.create_child(&*host, &child, &parent, &image.spec).unwrap();
        drop(parent);
        let disk = formats::open(&host, &child, &OpenOptions::new(Access::Write)).unwrap().disk;
        let mut most = 0;
        for index in 0..PLACES {
            disk.write_at(index * apart, &pattern::bytes(1, index * apart, 512)).unwrap();
            most = most.max(disk.cache_stats().dirty);
        }
        let (most, bound) = (most * page, MAX_DIRTY as u64);
        let legal = bound / 2..=bound + 4 * page;
        assert!(legal.contains(&most), "{format}: {most} bytes of changed tables");
        disk.close().unwrap();
        drop(disk);
        let disk = formats::open(&host, &child, &OpenOptions::new(Access::Read)).unwrap().disk;
        for index in (0..PLACES).step_by(7) {
            let at = index * apart;
            assert_eq!(read(&disk, at..at + 512), pattern::bytes(1, at, 512), "{format}");
        }
    }
}

#[test]
fn a_limit_of_the_host_is_reached_and_not_before() {
    const LIMIT: u64 = 100 << 20;
    for (format, subformat) in
        [("vhd", "dynamic"), ("vhdx", "dynamic"), ("vmdk", "monolithicSparse")]
    {
        let image = Image::new(format, subformat, 200 << 20);
        let faults = Arc::new(Faults::default());
        let host: Arc<dyn Host> = FaultyHost::over(MemoryHost::new(), &faults);
        image.create_at(&*host, &image.path()).unwrap();
        faults.set_limit(LIMIT);
        let disk = open(&image, &host, Access::Write);
        let mut written = 0;
        let error = loop {
            match disk.write_at(written, &pattern::bytes(1, written, 1 << 20)) {
                Ok(()) => written += 1 << 20,
                Err(e) => break e,
            }
        };
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{format}: {error}");
        assert!(written >= LIMIT - (6 << 20), "{format} gives up at {} MiB", written >> 20);
        // What was written stays, and once there is room the disk takes more.
        disk.flush().unwrap();
        assert_eq!(read(&disk, 0..512), pattern::bytes(1, 0, 512));
        faults.clear();
        disk.write_at(written, &pattern::bytes(1, written, 1 << 20)).unwrap();
        disk.close().unwrap();
        let disk = open(&image, &host, Access::Read);
        for at in (0..=written).step_by(1 << 20) {
            assert_eq!(read(&disk, at..at + 512), pattern::bytes(1, at, 512), "{format}");
        }
        let report = formats::check(&host, &image.path(), &OpenOptions::new(Access::Read)).unwrap();
        assert_eq!(report.exit_status(), 0, "{format}: {:?}", report.findings);
    }
}
