//! Images that contradict themselves: what is refused, and what stays readable.

use std::path::Path;
use std::sync::Arc;

use super::{MIB, PATH, Vhdx, open_with, spec};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::{self, CreateSpec, Image, OpenOptions, Report};
use crate::storage::memory::{MemoryFile, MemoryHost};
use crate::storage::{Access, Host, Storage};

/// Where the BAT of the test image begins.
const BAT: u64 = 3 * MIB;

/// An empty image.
fn new(size: u64, block_size: u64) -> (Arc<dyn Host>, Arc<MemoryFile>) {
    let host = MemoryHost::new();
    let spec = CreateSpec { block_size: Some(block_size), ..spec(size) };
    formats::create(&Vhdx, &*host, Path::new(PATH), &spec).unwrap();
    (host.clone(), host.file(Path::new(PATH)).unwrap())
}

/// An image of four blocks of 1 MiB, of which the first two hold ones and twos.
fn sample() -> (Arc<dyn Host>, Arc<MemoryFile>) {
    let memory = MemoryHost::new();
    let host: Arc<dyn Host> = memory.clone();
    let spec = CreateSpec { block_size: Some(MIB), ..spec(4 * MIB) };
    formats::create(&Vhdx, &*host, Path::new(PATH), &spec).unwrap();
    let image = open_with(&host, PATH, Access::Write).unwrap();
    image.disk.write_at(0, &[1; 1 << 20]).unwrap();
    image.disk.write_at(MIB, &[2; 1 << 20]).unwrap();
    image.disk.close().unwrap();
    (host, memory.file(Path::new(PATH)).unwrap())
}

fn forced(host: &Arc<dyn Host>) -> Result<Image> {
    let options = OpenOptions { force: true, ..OpenOptions::new(Access::Write) };
    formats::open(host, Path::new(PATH), &options)
}

fn check(host: &Arc<dyn Host>) -> Report {
    formats::check(host, Path::new(PATH), &OpenOptions::new(Access::Read)).unwrap()
}

fn read(image: &Image, block: u64) -> Result<u8> {
    let mut buf = [0; 4096];
    image.disk.read_at(block * MIB, &mut buf)?;
    Ok(buf[0])
}

fn put_entry(file: &MemoryFile, block: u64, entry: u64) {
    file.write_at(BAT + block * 8, &entry.to_le_bytes()).unwrap();
}

fn entry(file: &MemoryFile, block: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_at(BAT + block * 8, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

#[test]
fn a_good_image_has_nothing_to_report() {
    let (host, file) = sample();
    let report = check(&host);
    assert_eq!((report.errors, report.leaks, report.notices), (0, 0, 0), "{:?}", report.findings);
    assert_eq!((report.blocks, report.allocated_blocks), (4, 2));
    assert_eq!(file.len().unwrap(), 6 * MIB);
}

#[test]
fn a_bad_block_is_lost_and_the_others_are_not() {
    let (_, sample_file) = sample();
    let first = entry(&sample_file, 0);
    for (what, bad) in [
        ("past the end", (100 * MIB) | 6),
        ("on the header", 6),
        ("on the log", MIB | 6),
        ("on the metadata", (2 * MIB) | 6),
        ("on the BAT", (3 * MIB) | 6),
        ("at the end of all offsets", !0xf_ffff | 6),
        ("state 4", (first & !7) | 4),
        ("reserved bits", first | 8),
    ] {
        let (host, file) = sample();
        put_entry(&file, 1, bad);
        let before = file.to_vec();
        let image = open_with(&host, PATH, Access::Write).unwrap();
        assert_eq!(read(&image, 0).unwrap(), 1, "{what}");
        assert_eq!(read(&image, 1).unwrap_err().kind(), ErrorKind::Corrupt, "{what}");
        assert_eq!(read(&image, 2).unwrap(), 0, "{what}");
        let e = image.disk.write_at(0, &[9]).unwrap_err();
        assert_eq!((e.kind(), e.offset()), (ErrorKind::Corrupt, Some(BAT + 8)), "{what}: {e}");
        let _ = image.disk.close();
        assert!(file.to_vec() == before, "{what}: something was written");
        let report = check(&host);
        assert_eq!((report.errors, report.findings[0].offset), (1, Some(BAT + 8)), "{what}");
    }
}

#[test]
fn blocks_that_overlap_are_readable_and_never_written() {
    let (host, file) = sample();
    put_entry(&file, 1, entry(&file, 0));
    let image = open_with(&host, PATH, Access::Write).unwrap();
    assert_eq!((read(&image, 0).unwrap(), read(&image, 1).unwrap()), (1, 1));
    assert_eq!(image.disk.write_at(0, &[9]).unwrap_err().kind(), ErrorKind::Corrupt);
    let report = check(&host);
    // The second block's own place is named by nothing any more.
    assert_eq!((report.errors, report.leaks), (1, 1));
    assert!(report.findings[0].what.contains("old QEMU"), "{:?}", report.findings);
}

#[test]
fn unused_space_is_a_leak_of_so_many_bytes() {
    let (host, file) = sample();
    put_entry(&file, 0, 0);
    let report = check(&host);
    assert_eq!((report.errors, report.leaks, report.leaked_bytes), (0, 1, MIB));
    assert_eq!(report.exit_status(), 3);
}

#[test]
fn a_partial_block_without_parent_reads_whole_and_is_not_written() {
    let (host, file) = sample();
    put_entry(&file, 1, entry(&file, 1) | 7);
    let image = open_with(&host, PATH, Access::Write).unwrap();
    assert_eq!(read(&image, 1).unwrap(), 2);
    assert_eq!(image.disk.write_at(0, &[9]).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn what_the_end_of_the_file_cuts_off_a_block_is_lost_and_stays_so() {
    let (host, file) = sample();
    file.set_len(6 * MIB - 5000).unwrap();
    let before = file.to_vec();
    let image = open_with(&host, PATH, Access::Write).unwrap();
    let mut tail = [9; 8192];
    assert_eq!(
        image.disk.read_at(2 * MIB - 8192, &mut tail).unwrap_err().kind(),
        ErrorKind::Corrupt
    );
    // The last sector that is whole.
    let stored = 2 * MIB - 5000 / 512 * 512 - 512;
    image.disk.read_at(stored - 512, &mut tail[..512]).unwrap();
    assert_eq!(tail[..512], [2; 512]);
    assert!(image.disk.read_at(stored, &mut tail[..512]).is_err());
    assert_eq!(image.disk.write_at(0, &[3]).unwrap_err().kind(), ErrorKind::ReadOnly);
    image.disk.close().unwrap();
    let report = check(&host);
    assert_eq!((report.exit_status(), report.damage[0].start), (2, stored));
    assert!(file.to_vec() == before);
}

#[test]
fn a_file_cut_at_a_mebibyte_inside_a_block_is_not_written() {
    let (host, file) = new(12 * MIB, 4 * MIB);
    let image = open_with(&host, PATH, Access::Write).unwrap();
    image.disk.write_at(4 * MIB, &vec![7; 4 * MIB as usize]).unwrap();
    image.disk.close().unwrap();
    drop(image);
    let len = file.len().unwrap();
    file.set_len(len - 3 * MIB).unwrap();
    let image = open_with(&host, PATH, Access::Write).unwrap();
    let mut byte = [0];
    image.disk.read_at(5 * MIB - 1, &mut byte).unwrap();
    assert_eq!(byte, [7]);
    assert!(image.disk.read_at(5 * MIB, &mut byte).is_err());
    assert_eq!(image.disk.write_at(0, &[3]).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(check(&host).exit_status(), 2);
    assert_eq!(file.len().unwrap(), len - 3 * MIB);
}

#[test]
fn what_a_block_lacks_behind_the_end_of_the_disk_is_harmless() {
    // As QEMU makes fixed disks: the file ends with the disk.
    let (host, file) = new(6 * MIB, 4 * MIB);
    let image = open_with(&host, PATH, Access::Write).unwrap();
    image.disk.write_at(0, &vec![5; 6 * MIB as usize]).unwrap();
    image.disk.close().unwrap();
    drop(image);
    let len = file.len().unwrap();
    file.set_len(len - 2 * MIB).unwrap();
    assert_eq!((check(&host).exit_status(), check(&host).notices), (0, 1));
    let image = open_with(&host, PATH, Access::Write).unwrap();
    image.disk.write_at(6 * MIB - 1, &[9]).unwrap();
    image.disk.close().unwrap();
    assert_eq!((file.len().unwrap(), check(&host).notices), (len, 0));
    let image = open_with(&host, PATH, Access::Read).unwrap();
    let mut tail = [0; 2];
    image.disk.read_at(6 * MIB - 2, &mut tail).unwrap();
    assert_eq!(tail, [5, 9]);
}

#[test]
fn entries_that_the_end_of_the_file_cuts_off_are_unknown() {
    let (host, file) = new(2000 * MIB, MIB);
    file.set_len(BAT + 8203).unwrap();
    let image = open_with(&host, PATH, Access::Write).unwrap();
    let mut byte = [1];
    image.disk.read_at(1025 * MIB - 1, &mut byte).unwrap();
    assert_eq!(byte, [0]);
    assert!(image.disk.read_at(1025 * MIB, &mut byte).is_err());
    assert!(image.disk.write_at(0, &[1]).is_err());
    assert_eq!(image.damage, std::slice::from_ref(&(1025 * MIB..2000 * MIB)));
    assert_eq!(check(&host).exit_status(), 2);
    // Nothing is lost with entries that no block has.
    file.set_len(BAT + 16_000).unwrap();
    assert_eq!(check(&host).exit_status(), 0);
}

#[test]
fn the_unmapped_state_of_the_draft_reads_as_zeroes() {
    let (host, file) = sample();
    put_entry(&file, 1, (entry(&file, 1) & !7) | 5);
    let image = open_with(&host, PATH, Access::Write).unwrap();
    assert_eq!((read(&image, 0).unwrap(), read(&image, 1).unwrap()), (1, 0));
    let report = check(&host);
    assert_eq!((report.errors, report.notices), (0, 1), "{:?}", report.findings);
    image.disk.write_at(MIB, &[8]).unwrap();
    image.disk.close().unwrap();
    drop(image);
    assert_eq!((entry(&file, 1) & 7, check(&host).notices), (6, 0));
}

#[test]
fn one_bad_header_or_region_table_is_repaired_by_the_first_write() {
    for at in [64 << 10, 128 << 10, 192 << 10, 256 << 10] {
        let (host, file) = sample();
        file.write_at(at + 20, &[0xee; 16]).unwrap();
        let report = check(&host);
        // A crash leaves a bad header, but never a bad region table.
        let found = if at < 192 << 10 { (0, 1) } else { (1, 0) };
        assert_eq!((report.errors, report.notices), found, "{at:#x}");
        let image = open_with(&host, PATH, Access::Write).unwrap();
        image.disk.write_at(5, &[9]).unwrap();
        image.disk.flush().unwrap();
        die_with(image);
        let image = open_with(&host, PATH, Access::Write).unwrap();
        image.disk.write_at(6, &[9]).unwrap();
        image.disk.close().unwrap();
        assert_eq!((check(&host).errors, check(&host).notices), (0, 0), "{at:#x}");
    }
}

#[test]
fn both_headers_bad_is_readable_by_force_only() {
    let (host, file) = sample();
    for at in [64 << 10, 128 << 10] {
        file.write_at(at + 20, &[0xee; 16]).unwrap();
    }
    let e = open_with(&host, PATH, Access::Read).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Corrupt);
    let image = forced(&host).unwrap();
    assert_eq!(read(&image, 1).unwrap(), 2);
    assert_eq!(image.disk.write_at(0, &[1]).unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_eq!(check(&host).exit_status(), 2);
}

/// What becomes of an open image when its program is killed: nobody closes it.
fn die_with(image: Image) {
    std::mem::forget(image);
}

/// An image that was flushed, but not closed.
fn dirty() -> (Arc<dyn Host>, Arc<MemoryFile>) {
    let (host, file) = sample();
    let image = open_with(&host, PATH, Access::Write).unwrap();
    image.disk.write_at(2 * MIB, &[3; 1 << 20]).unwrap();
    image.disk.flush().unwrap();
    die_with(image);
    (host, file)
}

fn refused_but_forced(host: &Arc<dyn Host>) -> Error {
    let e = open_with(host, PATH, Access::Write).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
    let image = forced(host).unwrap();
    assert_eq!(read(&image, 1).unwrap(), 2);
    assert!(image.disk.read_only().is_some());
    assert_eq!(check(host).exit_status(), 2);
    e
}

#[test]
fn a_dirty_image_without_a_valid_log_entry_is_refused() {
    let (host, file) = dirty();
    file.punch_hole(MIB, MIB).unwrap();
    let e = refused_but_forced(&host);
    assert!(e.what().contains("no valid entry"), "{e}");
}

#[test]
fn a_dirty_image_that_lost_its_end_is_refused() {
    let (host, file) = dirty();
    file.set_len(6 * MIB).unwrap();
    let e = refused_but_forced(&host);
    assert!(e.what().contains("truncated"), "{e}");
}

#[test]
fn reading_a_dirty_image_shows_the_log_and_writes_nothing() {
    let (host, file) = dirty();
    // The page that the log holds is lost from its place.
    put_entry(&file, 2, 0);
    let before = file.to_vec();
    for access in [Access::Peek, Access::Read, Access::Write] {
        let image = open_with(&host, PATH, access).unwrap();
        assert!(image.info.dirty);
        assert_eq!(read(&image, 2).unwrap(), 3);
        image.disk.close().unwrap();
    }
    assert!(file.to_vec() == before);
    let report = check(&host);
    assert_eq!((report.errors, report.notices), (0, 1), "{:?}", report.findings);
}

#[test]
fn an_image_without_log_gets_one_when_it_is_written() {
    let (host, file) = sample();
    let mut headers = super::super::headers::Headers::read(&*file).unwrap();
    for at in [64 << 10, 128 << 10] {
        let header = headers.slots[headers.current].as_mut().unwrap();
        (header.log_length, header.log_offset) = (0, 0);
        file.write_at(at, &header.encode()).unwrap();
    }
    let image = open_with(&host, PATH, Access::Write).unwrap();
    assert_eq!(read(&image, 0).unwrap(), 1);
    image.disk.write_at(3 * MIB, &[4; 4096]).unwrap();
    image.disk.flush().unwrap();
    die_with(image);
    let image = open_with(&host, PATH, Access::Write).unwrap();
    assert!(image.info.dirty);
    assert_eq!((read(&image, 0).unwrap(), read(&image, 3).unwrap()), (1, 4));
    image.disk.write_at(0, &[5]).unwrap();
    image.disk.close().unwrap();
    let report = check(&host);
    assert_eq!((report.errors, report.notices), (0, 0), "{:?}", report.findings);
}

#[test]
fn two_different_headers_of_one_number_are_refused() {
    let (host, file) = sample();
    let mut headers = super::super::headers::Headers::read(&*file).unwrap();
    let header = headers.slots[headers.current].as_mut().unwrap();
    file.write_at(64 << 10, &header.encode()).unwrap();
    file.write_at(128 << 10, &header.encode()).unwrap();
    assert_eq!(read(&open_with(&host, PATH, Access::Read).unwrap(), 1).unwrap(), 2);
    header.data_write = uuid::Uuid::new_v4();
    file.write_at(64 << 10, &header.encode()).unwrap();
    refused_but_forced(&host);
}

#[test]
fn files_that_track_changes_are_warned_about() {
    let memory = MemoryHost::new();
    formats::create(&Vhdx, &*memory, Path::new(PATH), &spec(4 * MIB)).unwrap();
    let host: Arc<dyn Host> = memory.clone();
    assert!(open_with(&host, PATH, Access::Read).unwrap().info.warnings.is_empty());
    memory.insert(MemoryFile::new(format!("{PATH}.rct"), b"x"));
    let warnings = open_with(&host, PATH, Access::Read).unwrap().info.warnings;
    assert!(warnings.len() == 1 && warnings[0].contains(".rct"), "{warnings:?}");
}

#[test]
fn a_version_that_is_not_known_is_refused() {
    let (host, file) = sample();
    let mut headers = super::super::headers::Headers::read(&*file).unwrap();
    let header = headers.slots[headers.current].as_mut().unwrap();
    header.version = 2;
    header.sequence += 1;
    file.write_at(64 << 10, &header.encode()).unwrap();
    let e = open_with(&host, PATH, Access::Read).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported);
}

#[test]
fn a_bat_too_small_loses_the_blocks_behind_it() {
    let memory = MemoryHost::new();
    let host: Arc<dyn Host> = memory.clone();
    let spec = CreateSpec { block_size: Some(MIB), ..spec(130_000 * MIB) };
    formats::create(&Vhdx, &*host, Path::new(PATH), &spec).unwrap();
    let file = memory.file(Path::new(PATH)).unwrap();
    // The virtual disk size is the second item.
    file.write_at(2 * MIB + 65536 + 8, &(140_000 * MIB).to_le_bytes()).unwrap();
    let image = open_with(&host, PATH, Access::Write).unwrap();
    assert_eq!(read(&image, 131_000).unwrap(), 0);
    assert_eq!(read(&image, 131_040).unwrap(), 0);
    assert_eq!(read(&image, 131_041).unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(image.damage.len() == 1 && image.damage[0] == (131_041 * MIB..140_000 * MIB));
    assert_eq!(image.disk.write_at(0, &[1]).unwrap_err().kind(), ErrorKind::ReadOnly);
    assert!(check(&host).errors >= 1);
}

/// A child of the sample, with partially present blocks, that was flushed, but not closed.
fn dirty_child() -> (Arc<MemoryHost>, Vec<u8>) {
    let memory = MemoryHost::new();
    let host: Arc<dyn Host> = memory.clone();
    let spec = CreateSpec { block_size: Some(MIB), ..spec(4 * MIB) };
    formats::create(&Vhdx, &*host, Path::new("/d/base.vhdx"), &spec).unwrap();
    let base = open_with(&host, "/d/base.vhdx", Access::Read).unwrap();
    super::super::create_child(&*host, Path::new(PATH), &base, &spec).unwrap();
    let child = open_with(&host, PATH, Access::Write).unwrap();
    for at in [5, MIB + 70_000, 2 * MIB] {
        child.disk.write_at(at, &[1; 3000]).unwrap();
    }
    child.disk.flush().unwrap();
    let bytes = memory.file(Path::new(PATH)).unwrap().to_vec();
    (memory, bytes)
}

/// Changes some bytes of structures; with `sealed` their checksums are made right again.
fn damage(bytes: &mut [u8], rng: &mut fastrand::Rng, sealed: bool) {
    let tables = [64 << 10, 128 << 10, 192 << 10, 256 << 10, 1 << 20, (1 << 20) + 4096];
    let more = [2 << 20, (2 << 20) + 65536, 3 << 20, (3 << 20) + 4096 * 8, 5 << 20];
    let places: Vec<usize> = tables.into_iter().chain(more).collect();
    for _ in 0..rng.usize(1..4) {
        let at = places[rng.usize(..places.len())] + rng.usize(..130);
        match rng.u8(..4) {
            0 => bytes[at] ^= 1 << rng.u8(..8),
            1 => bytes[at..at + 8].fill(rng.u8(..)),
            2 => bytes[at..at + 4].fill(0xff),
            _ => bytes[at] = rng.u8(..9),
        }
    }
    if sealed {
        for (at, len) in tables.into_iter().zip([4096, 4096, 65536, 65536, 4096, 8192]) {
            super::super::layout::seal(&mut bytes[at..at + len]);
        }
    }
}

#[test]
fn garbage_never_panics() {
    let rounds = std::env::var("FLATDISK_ROUNDS").map_or(600, |n| n.parse().unwrap());
    let (plain, child) = (dirty().1.to_vec(), dirty_child());
    let mut rng = fastrand::Rng::with_seed(77);
    for round in 0..rounds {
        let (host, good) =
            if round % 2 == 0 { (MemoryHost::new(), &plain) } else { (child.0.clone(), &child.1) };
        let mut bytes = good.clone();
        let sealed = rng.u8(..4) != 0;
        damage(&mut bytes, &mut rng, sealed);
        host.insert(MemoryFile::new(PATH, &bytes));
        let host: Arc<dyn Host> = host;
        let options = OpenOptions { force: rng.bool(), ..OpenOptions::new(Access::Write) };
        let _ = formats::check(&host, Path::new(PATH), &options);
        if let Ok(image) = formats::open(&host, Path::new(PATH), &options) {
            let mut buf = vec![0; 1 << 20];
            let size = image.disk.size();
            for at in [0, MIB, 2 * MIB, size.saturating_sub(MIB)] {
                let part = (size.saturating_sub(at)).min(MIB) as usize;
                let _ = image.disk.read_at(at, &mut buf[..part]);
            }
            let _ = image.disk.write_at(0, &buf[..512]);
            let _ = image.disk.discard(0, size.min(3 * MIB));
            let _ = image.disk.close();
        }
    }
}
