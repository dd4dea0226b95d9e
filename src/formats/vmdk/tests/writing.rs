//! What writing leaves in the files.

use super::*;
use crate::disk::map::Geometry;
use crate::formats::vmdk::layout::{Header, SECTOR};
use crate::storage::Storage;

const MIB: u64 = 1 << 20;
const GRAIN: u64 = 65_536;

fn bytes(host: &Arc<MemoryHost>) -> Vec<u8> {
    host.file(&at("d.vmdk")).unwrap().to_vec()
}

fn entries(bytes: &[u8], table_sector: u64, count: usize) -> Vec<u32> {
    bytes[(table_sector * SECTOR) as usize..]
        .chunks_exact(4)
        .take(count)
        .map(|e| u32::from_le_bytes(e.try_into().unwrap()))
        .collect()
}

#[test]
fn new_grains_follow_each_other_and_both_tables_lead_to_them() {
    let host = created("d.vmdk", &spec("monolithicSparse", 10 * MIB));
    let image = open_rw(&host, "d.vmdk");
    image.disk.write_at(3 * GRAIN + 5, &[1; 10]).unwrap();
    image.disk.write_at(0, &[2; 2 * GRAIN as usize]).unwrap();
    assert_eq!(sources(&image.disk)[0], (2 * GRAIN, Source::File { file: 0, at: 2 * GRAIN }));
    // Until the flush the tables in the file are as they were.
    assert_eq!(entries(&bytes(&host), 27, 4), [0; 4]);
    image.disk.flush().unwrap();
    for table in [22, 27] {
        assert_eq!(entries(&bytes(&host), table, 5), [256, 384, 0, 128, 0]);
    }
    image.disk.close().unwrap();
    let bytes = bytes(&host);
    assert_eq!(bytes.len() as u64, 4 * GRAIN);
    assert_eq!(bytes[(GRAIN + 4) as usize..][..12], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]);
    assert_clean(&host, "d.vmdk");
}

#[test]
fn the_first_write_marks_the_image_and_closing_unmarks_it() {
    let host = created("d.vmdk", &spec("monolithicSparse", 10 * MIB));
    let before = bytes(&host);
    let image = open_rw(&host, "d.vmdk");
    image.disk.write_at(0, &[1]).unwrap();
    let during = open_with(&copy(&host), "d.vmdk", Access::Read).unwrap();
    assert!(during.info.dirty);
    assert_ne!(during.info.details["cid"], "fffffffe");
    let long = during.info.details["ddb"]["longContentID"].as_str().unwrap();
    assert!(long.ends_with(during.info.details["cid"].as_str().unwrap()));
    image.disk.write_at(GRAIN, &[1]).unwrap();
    image.disk.close().unwrap();
    let after = open_with(&host, "d.vmdk", Access::Read).unwrap();
    assert!(!after.info.dirty);
    assert_eq!(after.info.details["cid"], during.info.details["cid"]);
    // Only the ids changed in the header and the descriptor.
    let changed = bytes(&host)[..21 * 512].iter().zip(&before).filter(|(a, b)| a != b).count();
    assert!(changed <= 40, "{changed}");
}

#[test]
fn a_text_descriptor_gets_a_new_content_id_in_place() {
    for subformat in ["monolithicFlat", "twoGbMaxExtentSparse", "vmfs"] {
        let host = created("d.vmdk", &spec(subformat, MIB));
        let before = bytes(&host);
        let image = open_rw(&host, "d.vmdk");
        image.disk.write_at(0, &[1]).unwrap();
        image.disk.close().unwrap();
        let after = bytes(&host);
        assert!(before.len() == after.len() && before != after, "{subformat}");
        assert_ne!(open_rw(&host, "d.vmdk").info.details["cid"], "fffffffe");
    }
}

/// The header may reserve more than the file has.
#[test]
fn grains_keep_off_what_the_header_reserves_behind_the_end() {
    let host = created("d.vmdk", &spec("twoGbMaxExtentSparse", MIB));
    let extent = host.file(&at("d-s001.vmdk")).unwrap();
    let end = extent.len().unwrap() / SECTOR;
    extent.write_at(28, &(end - 18).to_le_bytes()).unwrap();
    extent.write_at(36, &20u64.to_le_bytes()).unwrap();
    let image = open_rw(&host, "d.vmdk");
    image.disk.write_at(0, &[7; 4096]).unwrap();
    let mut found = [0; 4096];
    image.disk.read_at(0, &mut found).unwrap();
    assert_eq!(found, [7; 4096]);
}

#[test]
fn freed_grains_are_reused_only_after_a_flush() {
    let host = created("d.vmdk", &spec("monolithicSparse", 10 * MIB));
    let image = open_rw(&host, "d.vmdk");
    image.disk.write_at(0, &[1; 3 * GRAIN as usize]).unwrap();
    image.disk.flush().unwrap();
    image.disk.discard(GRAIN, GRAIN).unwrap();
    image.disk.write_at(8 * GRAIN, &[2]).unwrap();
    let place =
        |grain: u64| image.disk.extents(grain * GRAIN..(grain + 1) * GRAIN).unwrap()[0].source;
    assert_eq!(place(1), Source::Zero);
    assert_eq!(place(8), Source::File { file: 0, at: 4 * GRAIN });
    image.disk.flush().unwrap();
    image.disk.write_at(9 * GRAIN + 100, &[3]).unwrap();
    assert_eq!(place(9), Source::File { file: 0, at: 2 * GRAIN });
    image.disk.flush().unwrap();
    let table = entries(&bytes(&host), 27, 10);
    assert_eq!(table, [128, 0, 384, 0, 0, 0, 0, 0, 512, 256]);
    let mut bytes = vec![9; GRAIN as usize];
    image.disk.read_at(9 * GRAIN, &mut bytes).unwrap();
    assert_eq!((bytes[99], bytes[100], bytes[101]), (0, 3, 0));
    image.disk.close().unwrap();
}

#[test]
fn space_freed_at_the_end_is_cut_off() {
    let host = created("d.vmdk", &spec("monolithicSparse", 10 * MIB));
    let image = open_rw(&host, "d.vmdk");
    image.disk.write_at(0, &[1; 4 * GRAIN as usize]).unwrap();
    image.disk.discard(GRAIN, 10 * MIB - GRAIN).unwrap();
    image.disk.close().unwrap();
    assert_eq!(bytes(&host).len() as u64, 2 * GRAIN);
    assert_clean(&host, "d.vmdk");
}

#[test]
fn what_a_crash_left_behind_is_used_again() {
    let host = created("d.vmdk", &spec("monolithicSparse", 10 * MIB));
    let image = open_rw(&host, "d.vmdk");
    image.disk.write_at(0, &[1; 2 * GRAIN as usize]).unwrap();
    image.disk.flush().unwrap();
    image.disk.write_at(4 * GRAIN, &[7; GRAIN as usize]).unwrap();
    let crashed = copy(&host);
    assert_eq!((check(&crashed, "d.vmdk").errors, check(&crashed, "d.vmdk").leaks), (0, 1));
    let image = open_rw(&crashed, "d.vmdk");
    image.disk.write_at(8 * GRAIN + 512, &[2; 512]).unwrap();
    let list = image.disk.extents(8 * GRAIN..9 * GRAIN).unwrap();
    assert_eq!(list[0].source, Source::File { file: 0, at: 3 * GRAIN });
    let mut grain = vec![0; GRAIN as usize];
    image.disk.read_at(8 * GRAIN, &mut grain).unwrap();
    assert!(grain[..512] == [0; 512] && grain[512..1024] == [2; 512]);
    assert!(grain[1024..].iter().all(|byte| *byte == 0), "the lost grain shows through");
    image.disk.close().unwrap();
    assert_clean(&crashed, "d.vmdk");
}

#[test]
fn the_last_grain_is_stored_whole_and_its_tail_is_zero() {
    let host = created("d.vmdk", &spec("monolithicSparse", 10 * MIB + 1536));
    let image = open_rw(&host, "d.vmdk");
    image.disk.write_at(10 * MIB, &[1; 1536]).unwrap();
    image.disk.close().unwrap();
    let bytes = bytes(&host);
    assert_eq!(bytes.len() as u64, 2 * GRAIN);
    assert!(bytes[GRAIN as usize..][..1536] == [1; 1536]);
    assert!(bytes[GRAIN as usize + 1536..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_grain_at_the_end_of_an_extent_holds_nothing_of_the_next() {
    let host = MemoryHost::new();
    add_sparse(&host, "a", 100, 128);
    add_sparse(&host, "b", 1000, 128);
    add(&host, "d.vmdk", custom("RW 100 SPARSE \"a\"\nRW 1000 SPARSE \"b\"").as_bytes());
    let image = open_rw(&host, "d.vmdk");
    image.disk.write_at(0, &[1; 1100 * 512]).unwrap();
    image.disk.discard(0, 100 * 512).unwrap();
    image.disk.flush().unwrap();
    image.disk.write_at(50 * 512, &[2; 51 * 512]).unwrap();
    image.disk.close().unwrap();
    let a = host.file(&at("a")).unwrap().to_vec();
    let grain = &a[a.len() - GRAIN as usize..];
    assert!(grain[..50 * 512].iter().all(|b| *b == 0));
    assert!(grain[50 * 512..100 * 512].iter().all(|b| *b == 2));
    assert!(grain[100 * 512..].iter().all(|b| *b == 0));
    let mut sector = [0; 1024];
    image.disk.read_at(100 * 512, &mut sector).unwrap();
    assert!(sector[..512] == [2; 512] && sector[512..] == [1; 512]);
}

/// A grain of an extent that begins in the middle of a lock's unit belongs to two units; both
/// writers must end up in one grain.
#[test]
fn two_writers_of_one_grain_under_different_locks_share_it() {
    const UNIT: u64 = 1 << 20;
    for _ in 0..200 {
        let host = MemoryHost::new();
        add(&host, "flat", &[0; 63 * 512]);
        add_sparse(&host, "a", 8192, 128);
        add(&host, "d.vmdk", custom("RW 63 FLAT \"flat\" 0\nRW 8192 SPARSE \"a\"").as_bytes());
        let image = open_rw(&host, "d.vmdk");
        image.disk.write_at(0, &[0]).unwrap();
        std::thread::scope(|scope| {
            let disk = &image.disk;
            for unit in 1..4 {
                scope.spawn(move || disk.write_at(unit * UNIT - 512, &[1; 512]).unwrap());
                scope.spawn(move || disk.write_at(unit * UNIT, &[2; 512]).unwrap());
            }
        });
        for unit in 1..4 {
            let mut around = [0; 1024];
            image.disk.read_at(unit * UNIT - 512, &mut around).unwrap();
            assert!(around[..512] == [1; 512] && around[512..] == [2; 512]);
        }
        image.disk.close().unwrap();
        assert_clean(&host, "d.vmdk");
    }
}

#[test]
fn a_full_extent_says_so_and_keeps_what_it_has() {
    let host = created("d.vmdk", &spec("monolithicSparse", 10 * MIB));
    let file = host.file(&at("d.vmdk")).unwrap();
    crate::storage::Storage::set_len(&*file, ((1 << 32) - 128) * 512).unwrap();
    let image = open_rw(&host, "d.vmdk");
    // The space that grew is unused, and usable.
    image.disk.write_at(0, &[1; 512]).unwrap();
    image.disk.close().unwrap();
    assert_eq!(crate::storage::Storage::len(&*file).unwrap(), 2 * GRAIN);
}

#[test]
fn small_grains_and_large_ones() {
    for block_size in [4096, 1 << 20, 32 << 20] {
        let spec =
            CreateSpec { block_size: Some(block_size), ..spec("monolithicSparse", 100 * MIB) };
        let host = created("d.vmdk", &spec);
        let image = open_rw(&host, "d.vmdk");
        assert_eq!(image.disk.geometry().block_size, block_size);
        image.disk.write_at(50 * MIB + 100, &[4; 1000]).unwrap();
        image.disk.close().unwrap();
        let image = open_rw(&host, "d.vmdk");
        let mut back = [0; 1002];
        image.disk.read_at(50 * MIB + 99, &mut back).unwrap();
        assert!(back[0] == 0 && back[1..1001] == [4; 1000] && back[1001] == 0);
        let stored: u64 = sources(&image.disk)
            .iter()
            .filter(|(_, source)| *source != Source::Zero)
            .map(|(len, _)| len)
            .sum();
        assert_eq!(stored, block_size.max(Geometry::SECTOR));
        assert_clean(&host, "d.vmdk");
    }
}

#[test]
fn freed_grains_become_zero_marks_only_over_a_parent() {
    let host = created("d.vmdk", &spec("monolithicSparse", 10 * MIB));
    let file = host.file(&at("d.vmdk")).unwrap();
    let mut raw = bytes(&host);
    let header = Header::decode(raw[..512].try_into().unwrap()).unwrap();
    raw[..512].copy_from_slice(&Header { version: 2, flags: 7, ..header }.encode());
    crate::storage::Storage::write_at(&*file, 0, &raw[..512]).unwrap();
    let image = open_rw(&host, "d.vmdk");
    image.disk.write_at(0, &[1; GRAIN as usize]).unwrap();
    image.disk.discard(0, GRAIN).unwrap();
    image.disk.close().unwrap();
    assert_eq!(entries(&bytes(&host), 27, 1), [0]);
}

/// Loading a table goes by way of its directory: with room for one page neither may drive the other
/// out for ever.
#[test]
fn a_cache_with_room_for_nothing_still_answers() {
    let host = created("d.vmdk", &spec("monolithicSparse", 80 * MIB));
    let image = open_starved(&host, "d.vmdk");
    image.disk.write_at(70 * MIB, &[1; 512]).unwrap();
    image.disk.write_at(0, &[2; 512]).unwrap();
    let mut back = [0; 512];
    image.disk.read_at(70 * MIB, &mut back).unwrap();
    assert_eq!(back, [1; 512]);
    image.disk.close().unwrap();
    assert_clean(&host, "d.vmdk");
}
