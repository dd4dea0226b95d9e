//! Allocation, reopening, unmapping and what is on disk in between.

use super::*;
use crate::disk::map::Source;
use crate::error::ErrorKind;

const MIB: u64 = 1 << 20;

#[test]
fn written_data_is_there_after_reopening_and_the_file_ends_with_its_footer() {
    let host = dynamic(64 * MIB);
    let image = open(&host);
    image.disk.write_at(5 * MIB - 3, b"across a block's end? no").unwrap();
    image.disk.write_at(6 * MIB - 3, b"across").unwrap();
    image.disk.close().unwrap();
    let bytes = bytes(&host);
    assert_eq!(bytes[bytes.len() - 512..], bytes[..512]);
    let image = open(&host);
    assert_eq!(read(&image, 5 * MIB - 3, 24), b"across a block's end? no");
    assert_eq!(read(&image, 6 * MIB - 5, 10), b"\0\0across\0\0");
    let report = check(&host);
    assert_eq!((report.errors, report.leaks, report.allocated_blocks), (0, 0, 2));
}

#[test]
fn new_blocks_are_aligned_in_ascending_order_with_full_bitmaps() {
    let host = dynamic(64 * MIB);
    let image = open(&host);
    image.disk.write_at(0, &vec![7; 7 << 20]).unwrap();
    image.disk.close().unwrap();
    let bytes = bytes(&host);
    let mut expected = 4096 - 512;
    for block in 0..4 {
        let at = u64::from(bat(&bytes, block)) * 512;
        assert_eq!(at, expected, "block {block}");
        assert_eq!((at + 512) % 4096, 0);
        assert!(bytes[at as usize..][..512].iter().all(|b| *b == 0xff));
        expected = at + 512 + 2 * MIB + 3584;
    }
    assert_eq!(bytes.len() as u64, expected + 512);
}

#[test]
fn new_and_grown_files_end_at_a_multiple_of_4_kib() {
    for (size, block) in [(9 * MIB, None), (5 * MIB, Some(512 << 10)), (100 << 10, Some(4096))] {
        let host = made("dynamic", size, block);
        assert_eq!(bytes(&host).len() % 4096, 0);
        for round in 0..3 {
            let image = open(&host);
            image.disk.write_at(size / 4 * round, &[7; 700]).unwrap();
            image.disk.flush().unwrap();
            assert_eq!(bytes(&host).len() % 4096, 0, "grown ahead of need");
            image.disk.close().unwrap();
            let bytes = bytes(&host);
            assert_eq!((bytes.len() % 4096, &bytes[bytes.len() - 512..]), (0, &bytes[..512]));
        }
    }
    let host = dynamic(4 * MIB);
    add_child(&host, None);
    assert_eq!(bytes(&host).len() % 4096, 0);
}

#[test]
fn a_foreign_file_that_does_not_grow_keeps_its_length() {
    // As other programs make it: bitmaps and footer are at any sector.
    let mut image = bytes(&dynamic(4 * MIB));
    image.truncate(2048);
    let footer = image[..512].to_vec();
    set_bat(&mut image, 0, 4);
    image.extend([0xff; 512]);
    image.extend(vec![0x11; 2 << 20]);
    image.extend(footer);
    let host = holding(&image);
    let opened = open(&host);
    opened.disk.write_at(100, &[0x22; 50]).unwrap();
    opened.disk.close().unwrap();
    assert_eq!(bytes(&host).len(), image.len());
}

#[test]
fn nothing_is_written_before_the_first_change() {
    let host = dynamic(64 * MIB);
    let before = bytes(&host);
    let image = open(&host);
    read(&image, 0, 1 << 20);
    image.disk.flush().unwrap();
    image.disk.close().unwrap();
    assert_eq!(bytes(&host), before);
}

#[test]
fn the_bat_is_written_by_a_flush_only() {
    let host = dynamic(64 * MIB);
    let image = open(&host);
    image.disk.write_at(0, b"x").unwrap();
    assert_eq!(bat(&bytes(&host), 0), u32::MAX);
    image.disk.flush().unwrap();
    assert_ne!(bat(&bytes(&host), 0), u32::MAX);
}

#[test]
fn the_bat_never_takes_bytes_behind_it_along() {
    // A foreign image whose first block follows the BAT within the same 4 KiB.
    let host = dynamic(64 * MIB);
    let mut image = bytes(&host);
    image.truncate(2048);
    let footer = image[..512].to_vec();
    set_bat(&mut image, 0, 4);
    image.extend([0xff; 512]);
    image.extend(vec![0x11; 2 << 20]);
    image.extend(footer);
    let host = holding(&image);
    let image = open(&host);
    image.disk.write_at(2 * MIB, b"a new entry").unwrap();
    image.disk.write_at(0, &[0x22; 4096]).unwrap();
    image.disk.flush().unwrap();
    image.disk.write_at(4 * MIB, b"another").unwrap();
    image.disk.close().unwrap();
    let image = open(&host);
    assert_eq!(read(&image, 0, 8192), [[0x22; 4096], [0x11; 4096]].concat());
    assert_eq!(read(&image, 2 * MIB, 11), b"a new entry");
}

#[test]
fn unmapped_blocks_read_as_zeroes_and_are_used_again() {
    let host = dynamic(16 * MIB);
    let image = open(&host);
    image.disk.write_at(0, &vec![1; 16 << 20]).unwrap();
    image.disk.flush().unwrap();
    let full = file(&host).len().unwrap();
    image.disk.discard(MIB, 6 * MIB).unwrap();
    assert_eq!(read(&image, MIB, 6 << 20), vec![0; 6 << 20]);
    assert_eq!(read(&image, 0, 1 << 20), vec![1; 1 << 20]);
    let extents = image.disk.extents(0..16 * MIB).unwrap();
    assert_eq!(
        extents.iter().filter(|e| e.source == Source::Zero).map(|e| e.len).sum::<u64>(),
        4 * MIB
    );
    image.disk.flush().unwrap();
    image.disk.write_at(2 * MIB + 5, b"again").unwrap();
    assert_eq!(read(&image, 2 * MIB, 12), b"\0\0\0\0\0again\0\0");
    assert_eq!(read(&image, 3 * MIB, 1 << 20), vec![0; 1 << 20]);
    image.disk.close().unwrap();
    assert!(file(&host).len().unwrap() <= full, "the freed block was taken first");
    let report = check(&host);
    assert_eq!((report.errors, report.leaked_bytes / MIB), (0, 0));
}

#[test]
fn a_freed_block_is_not_touched_before_its_entry_is_gone_from_the_file() {
    let host = dynamic(16 * MIB);
    let image = open(&host);
    image.disk.write_at(0, &[1; 512]).unwrap();
    image.disk.flush().unwrap();
    image.disk.discard(0, 2 * MIB).unwrap();
    image.disk.write_at(4 * MIB, &[2; 512]).unwrap();
    // What a crash now would leave.
    let image = open(&holding(&bytes(&host)));
    assert_eq!(read(&image, 0, 512), [1; 512]);
    assert_eq!(read(&image, 4 * MIB, 512), [0; 512]);
}

#[test]
fn closing_cuts_off_freed_blocks_at_the_end() {
    let host = dynamic(16 * MIB);
    let empty = bytes(&host);
    let image = open(&host);
    image.disk.write_at(0, &vec![1; 16 << 20]).unwrap();
    image.disk.discard(0, 16 * MIB).unwrap();
    image.disk.close().unwrap();
    let after = bytes(&host);
    assert!(after.len() <= empty.len() + 4096, "{}", after.len());
    assert_eq!(after[..2048], empty[..2048]);
    assert_eq!(check(&host).exit_status(), 0);
}

#[test]
fn a_structure_behind_freed_blocks_is_not_cut_off_with_them() {
    let host = dynamic(4 << 20);
    let image = open(&host);
    image.disk.write_at(0, &[1; 512]).unwrap();
    image.disk.close().unwrap();
    let mut bytes = bytes(&host);
    let end = bytes.len() - 512;
    let header = bytes[512..1536].to_vec();
    bytes.splice(end..end, header);
    edit_footers(&mut bytes, |footer| footer.data_offset = (end as u64).into());
    let host = holding(&bytes);
    let image = open(&host);
    image.disk.discard(0, 4 << 20).unwrap();
    image.disk.close().unwrap();
    assert_eq!(read(&open(&host), 0, 512), [0; 512]);
    assert_eq!(check(&host).exit_status(), 0, "{:?}", check(&host).findings);
}

#[test]
fn the_last_block_is_freed_although_the_disk_ends_inside_it() {
    let host = dynamic(3 * MIB);
    let image = open(&host);
    image.disk.write_at(2 * MIB, &vec![1; 1 << 20]).unwrap();
    image.disk.discard(2 * MIB, MIB).unwrap();
    image.disk.close().unwrap();
    assert_eq!(check(&host).allocated_blocks, 0);
}

#[test]
fn space_left_over_by_a_crash_is_zeroed_when_used() {
    let host = dynamic(16 * MIB);
    let image = open(&host);
    image.disk.write_at(0, &vec![1; 8 << 20]).unwrap();
    // Killed: the blocks are there, nothing points at them.
    let host = holding(&bytes(&host));
    assert_eq!(check(&host).errors, 0);
    let image = open(&host);
    image.disk.write_at(2 * MIB + 700, &[2; 10]).unwrap();
    image.disk.close().unwrap();
    let image = open(&host);
    let mut expected = vec![0; 2 << 20];
    expected[700..710].fill(2);
    assert_eq!(read(&image, 2 * MIB, 2 << 20), expected);
    assert_eq!(check(&host).exit_status(), 0);
}

#[test]
fn a_last_block_cut_off_behind_the_disk_is_completed_before_writing() {
    let host = dynamic(3 * MIB);
    let image = open(&host);
    image.disk.write_at(2 * MIB, &vec![1; 1 << 20]).unwrap();
    image.disk.close().unwrap();
    let mut cut = bytes(&host);
    let footer = cut[..512].to_vec();
    cut.truncate(cut.len() - 512 - (1 << 20));
    cut.extend(&footer);
    let host = holding(&cut);
    let image = open(&host);
    assert_eq!(read(&image, 2 * MIB, 1 << 20), vec![1; 1 << 20]);
    image.disk.write_at(0, b"first").unwrap();
    image.disk.close().unwrap();
    let image = open(&host);
    assert_eq!(read(&image, 2 * MIB, 1 << 20), vec![1; 1 << 20]);
    assert_eq!(check(&host).exit_status(), 0);
}

#[test]
fn a_fixed_disk_gives_discarded_space_back() {
    let host = made("fixed", 4 * MIB, None);
    let image = open(&host);
    image.disk.write_at(0, &vec![1; 4 << 20]).unwrap();
    let full = image.disk.allocated().unwrap();
    image.disk.discard(MIB + 1, 2 * MIB).unwrap();
    image.disk.close().unwrap();
    assert!(image.disk.allocated().unwrap() < full);
    let image = open(&host);
    assert_eq!(read(&image, MIB, 3), [1, 0, 0]);
    assert_eq!(read(&image, 3 * MIB, 3), [0, 1, 1]);
    assert_eq!(bytes(&host).len() as u64, 4 * MIB + 512);
}

#[test]
fn a_batmap_bit_is_cleared_with_the_block_it_belongs_to() {
    let host = holding(&xen_image());
    assert_eq!(check(&host).exit_status(), 0, "{:?}", check(&host).findings);
    let image = open(&host);
    assert_eq!(image.info.details["batmap"], true);
    image.disk.discard(0, 2 * MIB).unwrap();
    image.disk.close().unwrap();
    let after = bytes(&host);
    assert_eq!(after[2560], 0x40, "the other block's bit stays");
    assert_eq!(check(&host).errors, 0);
    assert_eq!(read(&open(&host), 2 * MIB, 4), [2; 4]);
}

#[test]
fn a_batmap_that_calls_a_partial_block_full_is_an_error() {
    let mut bytes = xen_image();
    let at = bat(&bytes, 1) as usize * 512;
    bytes[at + 3] = 0xfe;
    let report = check(&holding(&bytes));
    assert_eq!(report.errors, 1, "{:?}", report.findings);
    bytes[2560 + 100] = 1;
    assert_eq!(check(&holding(&bytes)).errors, 2, "and the checksum");
}

/// An image as Xen's tools lay it out: 32 MiB, blocks 0 and 1 full, both bits in the batmap.
fn xen_image() -> Vec<u8> {
    let mut image = bytes(&dynamic(32 * MIB));
    image.truncate(2048);
    edit_footer(&mut image, 0, |f| {
        f.creator_application = *b"tap\0";
        f.creator_version = 0x0001_0003.into();
    });
    let footer = image[..512].to_vec();
    let mut header = [0; 512];
    header[..8].copy_from_slice(b"tdbatmap");
    header[8..16].copy_from_slice(&2560u64.to_be_bytes());
    header[16..20].copy_from_slice(&1u32.to_be_bytes());
    header[20..24].copy_from_slice(&0x0001_0002u32.to_be_bytes());
    header[24..28].copy_from_slice(&(!0xc0u32).to_be_bytes());
    image.extend(header);
    image.push(0xc0);
    image.extend([0; 511]);
    for block in 0..2u8 {
        let sector = image.len() / 512;
        set_bat(&mut image, block.into(), sector as u32);
        image.extend([0xff; 512]);
        image.extend(vec![block + 1; 2 << 20]);
    }
    image.extend(footer);
    image
}

#[test]
fn creation_refuses_what_the_format_cannot_hold() {
    let refused = |spec: CreateSpec| {
        let host = MemoryHost::new();
        let error = formats::create(&Vhd, &*host, Path::new(PATH), &spec).unwrap_err();
        assert!(host.files().is_empty(), "{error}");
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    };
    let spec = CreateSpec { size: MIB, ..CreateSpec::default() };
    refused(CreateSpec { size: (2040 << 30) + 512, ..spec.clone() });
    refused(CreateSpec { size: 0, ..spec.clone() });
    refused(CreateSpec { size: 1000, ..spec.clone() });
    refused(CreateSpec { subformat: Some("thin".into()), ..spec.clone() });
    for block_size in [0, 512, 2048, 3 << 20, 512 << 20] {
        refused(CreateSpec { block_size: Some(block_size), ..spec.clone() });
    }
    refused(CreateSpec { size: 2040 << 30, block_size: Some(4096), ..spec.clone() });
    refused(CreateSpec { logical_sector: Some(4096), ..spec.clone() });
    refused(CreateSpec { subformat: Some("fixed".into()), block_size: Some(2 << 20), ..spec });
}

#[test]
fn creation_refuses_an_existing_file() {
    let host = dynamic(MIB);
    let spec = CreateSpec { size: MIB, ..CreateSpec::default() };
    let error = formats::create(&Vhd, &*host, Path::new(PATH), &spec).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exists);
}
