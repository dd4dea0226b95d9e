//! Images with arbitrary bytes changed, and hosts that fail: nothing may panic, loop or take memory
//! without bound, and what fails must say so.

use std::ops::Range;

use super::*;
use crate::error::ErrorKind;
use crate::storage::Storage;
use crate::storage::faulty::{Call, Fault, Faults, FaultyHost};

/// How often each image is changed; more with `FLATDISK_ROUNDS`.
fn rounds() -> u64 {
    std::env::var("FLATDISK_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(300)
}

/// Small images of every kind, with data in them.
fn images() -> Vec<Arc<MemoryHost>> {
    let mut images = Vec::new();
    for subformat in
        ["monolithicSparse", "twoGbMaxExtentSparse", "monolithicFlat", "vmfs", "vmfsSparse"]
    {
        images.push(created("d.vmdk", &spec(subformat, 600_064)));
    }
    for host in &images {
        let image = open_rw(host, "d.vmdk");
        image.disk.write_at(100_000, &[5; 300_000]).unwrap();
        image.disk.close().unwrap();
    }
    images
}

/// Changes some bytes, mostly where structures are.
fn damage(host: &Arc<MemoryHost>, rng: &mut fastrand::Rng) {
    for _ in 0..rng.u32(1..4) {
        let files = host.files();
        let file = &files[rng.usize(..files.len())];
        let len = file.len().unwrap().max(1);
        let at = match rng.u8(..4) {
            0 => rng.u64(..len),
            1 => rng.u64(..len.min(80)),
            2 => rng.u64(..len.min(4096)),
            _ => rng.u64(..len.min(20_000)) / 4 * 4,
        };
        match rng.u8(..8) {
            0 => file.set_len(rng.u64(..len)).unwrap(),
            1 => file.write_at(at, &[0xff; 4]).unwrap(),
            2 => file.write_at(at, &[0; 4]).unwrap(),
            3 => file.write_at(at, &rng.u64(..).to_le_bytes()).unwrap(),
            4 => file.write_at(at, &rng.u32(..3000).to_le_bytes()).unwrap(),
            _ => file.write_at(at, &[rng.u8(..)]).unwrap(),
        }
    }
}

#[test]
fn damaged_images_never_do_more_than_fail() {
    let mut opened = 0;
    for sound in images() {
        for seed in 0..rounds() {
            let mut rng = fastrand::Rng::with_seed(seed);
            let host = copy(&sound);
            damage(&host, &mut rng);
            let shared: Arc<dyn Host> = host.clone();
            let _ = formats::check(&shared, &at("d.vmdk"), &OpenOptions::new(Access::Read));
            let Ok(image) = open_with(&host, "d.vmdk", Access::Write) else { continue };
            opened += 1;
            let size = image.disk.size();
            let mut buf = vec![0; 70_000.min(size as usize)];
            for _ in 0..10 {
                let _ = image.disk.read_at(rng.u64(..=size - buf.len() as u64), &mut buf);
            }
            let part = 300_000.min(size);
            let _ = image.disk.write_at(rng.u64(..=size - part), &vec![1; part as usize]);
            let _ = image.disk.discard(rng.u64(..=size - part), part);
            let _ = image.disk.flush();
            let _ = image.disk.close();
        }
    }
    assert!(opened > 100, "{opened}");
}

/// The files of `host`, of which one change fails: the one after `skip` others.
fn failing(host: &Arc<MemoryHost>, skip: u64, errno: i32) -> (Arc<dyn Host>, Arc<Faults>) {
    let faults = Arc::new(Faults::default());
    faults.inject(&Call::CHANGES, skip, Fault::Errno(errno), false);
    (FaultyHost::over(host.clone(), &faults), faults)
}

/// Writes, frees and flushes; the sectors that a failed call may have left either way are `None`
/// in the model.
fn work(disk: &Disk, model: &mut [Option<u8>]) -> Vec<Error> {
    let mut errors = Vec::new();
    let mut put = |range: Range<usize>, byte: u8, result: Result<()>| match result {
        Ok(()) => model[range].fill(Some(byte)),
        Err(e) => {
            model[range].fill(None);
            errors.push(e);
        }
    };
    let sector = |n: usize| n as u64 * 512;
    for round in 0..4_u8 {
        for (start, len) in [(0, 130), (500, 3), (700, 260), (1171, 1)] {
            let byte = round * 16 + len as u8 % 16;
            let result = disk.write_at(sector(start), &vec![byte; len * 512]);
            put(start..start + len, byte, result);
        }
        put(128..384, 0, disk.discard(sector(128), sector(256)));
        put(0..0, 0, disk.flush());
    }
    errors
}

fn assert_holds(disk: &Disk, model: &[Option<u8>], context: &str) {
    let now = contents(disk);
    for (number, sector) in now.chunks(512).enumerate() {
        if let Some(byte) = model[number] {
            assert!(sector.iter().all(|b| *b == byte), "{context}: sector {number}");
        }
    }
}

#[test]
fn every_failing_call_surfaces_and_leaves_a_sound_image() {
    for (errno, error) in [(libc::EIO, ErrorKind::Io), (libc::ENOSPC, ErrorKind::NoSpace)] {
        for sound in images() {
            for skip in 0.. {
                let host = copy(&sound);
                let (shared, faults) = failing(&host, skip, errno);
                let image = formats::open(&shared, &at("d.vmdk"), &OpenOptions::new(Access::Write))
                    .unwrap();
                let before = contents(&image.disk);
                let mut model: Vec<_> = before
                    .chunks(512)
                    .map(|s| Some(s[0]).filter(|first| s.iter().all(|b| b == first)))
                    .collect();
                let mut errors = work(&image.disk, &mut model);
                let context = format!("{error:?} at change {skip}");
                assert_holds(&image.disk, &model, &context);
                let flushed = image.disk.close();
                let closed = flushed.is_ok();
                errors.extend(flushed.err());
                drop(image);
                let report = check(&host, "d.vmdk");
                assert_eq!(report.errors, 0, "{context}: {:#?}", report.findings);
                let image = open_rw(&host, "d.vmdk");
                if closed {
                    assert_holds(&image.disk, &model, &context);
                }
                if faults.fired() == 0 {
                    assert!(errors.is_empty() && closed);
                    break;
                }
                // Giving freed space back to the host is the one thing that may fail in silence.
                let allowed = [error, ErrorKind::Io, ErrorKind::Failed];
                assert!(
                    errors.iter().all(|e| allowed.contains(&e.kind())),
                    "{context}: {errors:?}"
                );
            }
        }
    }
}

#[test]
fn a_creation_that_fails_leaves_no_file() {
    for subformat in create::SUBFORMATS {
        // One kind is written to its last byte.
        let size = if subformat == "vmfsEagerZeroedThick" { 4 << 20 } else { 5 << 30 };
        for skip in 0.. {
            let files = MemoryHost::new();
            let (host, _) = failing(&files, skip, libc::EIO);
            if formats::create(&Vmdk, &*host, &at("d.vmdk"), &spec(subformat, size)).is_ok() {
                break;
            }
            assert!(files.files().is_empty(), "{subformat}, change {skip}");
        }
    }
}
