//! What opens, how, and what is refused.

use super::*;
use crate::error::ErrorKind;

const MIB: u64 = 1 << 20;

/// A dynamic image of 8 MiB with block 1 written.
fn sample() -> Vec<u8> {
    let host = dynamic(8 * MIB);
    let image = open(&host);
    image.disk.write_at(2 * MIB, b"second block").unwrap();
    image.disk.close().unwrap();
    bytes(&host)
}

fn assert_sample_reads(image: &Image) {
    assert_eq!(read(image, 2 * MIB, 13), b"second block\0");
    assert_eq!(read(image, 0, 512), [0; 512]);
}

fn assert_refused(bytes: &[u8], kind: ErrorKind, part: &str) {
    let error = refusal(&holding(bytes));
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(part), "{error}");
}

#[test]
fn new_images_open_with_the_exact_size() {
    for size in [512, 3 * MIB, 64 * MIB + 512, 2040 << 30] {
        let image = open(&dynamic(size));
        assert_eq!(image.disk.size(), size);
        assert_eq!(image.info.details["original_size"], size);
        assert!(image.info.warnings.is_empty(), "{:?}", image.info.warnings);
    }
    let image = open(&made("fixed", 5 * MIB + 512, None));
    assert_eq!((image.disk.size(), image.info.subformat.as_str()), (5 * MIB + 512, "fixed"));
    assert!(image.disk.flat_file().is_some());
}

#[test]
fn a_damaged_trailing_footer_is_replaced_by_the_copy_and_repaired_by_writing() {
    let mut damaged = sample();
    let at = damaged.len() - 500;
    damaged[at] ^= 1;
    let host = holding(&damaged);
    let image = open(&host);
    assert_sample_reads(&image);
    assert_eq!(image.info.details["footer"], "damaged");
    assert_eq!(bytes(&host), damaged, "opening changes nothing");
    image.disk.write_at(2 * MIB, b"x").unwrap();
    image.disk.close().unwrap();
    let repaired = bytes(&host);
    assert_eq!(repaired[repaired.len() - 512..], repaired[..512]);
    assert_eq!(check(&host).errors, 0);
}

#[test]
fn a_damaged_copy_is_replaced_by_the_trailing_footer_and_repaired_by_writing() {
    let good = sample();
    let mut damaged = good.clone();
    damaged[..512].fill(0);
    let host = holding(&damaged);
    let image = open(&host);
    assert_sample_reads(&image);
    assert_eq!(image.info.details["footer_copy"], "absent");
    image.disk.write_at(2 * MIB, b"second block").unwrap();
    image.disk.close().unwrap();
    assert_eq!(bytes(&host), good);
}

#[test]
fn a_missing_trailing_footer_is_written_again() {
    let good = sample();
    let host = holding(&good[..good.len() - 512]);
    let image = open(&host);
    assert_sample_reads(&image);
    image.disk.write_at(2 * MIB, b"second block").unwrap();
    image.disk.close().unwrap();
    assert_eq!(bytes(&host), good);
}

#[test]
fn the_trailing_footer_wins_over_a_different_copy() {
    let mut changed = sample();
    edit_footer(&mut changed, 0, |f| f.current_size = (4 * MIB).into());
    let host = holding(&changed);
    let image = open(&host);
    assert_eq!(image.disk.size(), 8 * MIB);
    assert_eq!(image.info.details["footer_copy"], "differs");
    assert_eq!(check(&host).errors, 1);
    image.disk.write_at(0, b"x").unwrap();
    image.disk.close().unwrap();
    assert_eq!(check(&host).errors, 0);
}

#[test]
fn two_damaged_footers_are_refused_and_read_by_force() {
    let mut damaged = sample();
    let at = damaged.len() - 400;
    damaged[at] ^= 1;
    damaged[112] ^= 1;
    assert_refused(&damaged, ErrorKind::Corrupt, "checksum does not match");
    let image = forced(&holding(&damaged));
    assert_sample_reads(&image);
    assert!(image.disk.read_only().unwrap().contains("by force"));
}

#[test]
fn garbage_behind_the_footer_does_not_hide_the_image() {
    for extra in [1, 511, 512, 40_000] {
        let mut bytes = sample();
        bytes.extend(vec![0x5a; extra]);
        let host = holding(&bytes);
        let image = open(&host);
        assert_sample_reads(&image);
        let expected = format!("{extra} bytes of garbage follow the footer");
        assert!(image.info.warnings.contains(&expected), "{:?}", image.info.warnings);
        image.disk.write_at(7 * MIB, b"last").unwrap();
        image.disk.close().unwrap();
        let report = check(&host);
        assert_eq!(report.errors, 0, "{:?}", report.findings);
        assert_eq!(read(&open(&host), 6 * MIB, MIB as usize), vec![0; MIB as usize]);
    }
}

#[test]
fn short_footers_open_and_become_whole_by_writing() {
    let host = made("fixed", MIB, None);
    open(&host).disk.write_at(0, b"conectix").unwrap();
    let whole = bytes(&host);
    let short = holding(&whole[..whole.len() - 1]);
    let image = open(&short);
    assert_eq!((image.disk.size(), read(&image, 0, 8)), (MIB, b"conectix".to_vec()));
    image.disk.write_at(0, b"conectix").unwrap();
    image.disk.close().unwrap();
    assert_eq!(bytes(&short), whole);

    let whole = sample();
    let short = holding(&whole[..whole.len() - 1]);
    let image = open(&short);
    assert_sample_reads(&image);
    assert_eq!(image.info.details["footer"], "511 bytes");
    image.disk.write_at(2 * MIB, b"second block").unwrap();
    image.disk.close().unwrap();
    assert_eq!(bytes(&short), whole);
}

#[test]
fn a_short_footer_needs_a_matching_checksum() {
    let whole = bytes(&made("fixed", MIB, None));
    let mut short = whole[..whole.len() - 1].to_vec();
    let at = short.len() - 300;
    short[at] = 1;
    assert_refused(&short, ErrorKind::NotThisFormat, "neither end");
}

#[test]
fn a_fixed_disk_may_begin_with_a_vhd_of_its_own() {
    let inner = sample();
    let host = made("fixed", 4 * MIB, None);
    let image = open(&host);
    image.disk.write_at(0, &inner).unwrap();
    image.disk.close().unwrap();
    let image = open(&host);
    assert_eq!((image.disk.size(), image.info.subformat.as_str()), (4 * MIB, "fixed"));
    assert_eq!(image.info.warnings, [""; 0]);
}

#[test]
fn poisoned_images_are_refused_with_the_reason() {
    let mut poisoned = sample();
    let end = poisoned.len() - 512;
    poisoned[end..end + 8].copy_from_slice(b"v_poison");
    assert_refused(&poisoned, ErrorKind::Unsupported, "v_poison");
    let mut poisoned = sample();
    poisoned.truncate(end);
    poisoned[..8].copy_from_slice(b"v_poison");
    assert_refused(&poisoned, ErrorKind::Unsupported, "v_poison");
}

#[test]
fn a_footer_without_data_is_refused() {
    let fixed = bytes(&made("fixed", MIB, None));
    assert_refused(&fixed[MIB as usize..], ErrorKind::Corrupt, "without the data");
}

#[test]
fn a_fixed_disk_cut_short_is_readable_as_far_as_it_goes() {
    let host = made("fixed", MIB, None);
    open(&host).disk.write_at(0, b"begin").unwrap();
    let whole = bytes(&host);
    let mut cut = whole[..300_000].to_vec();
    cut.extend(&whole[MIB as usize..]);
    let host = holding(&cut);
    let image = open(&host);
    assert_eq!(image.disk.size(), MIB);
    assert_eq!(image.damage.first(), Some(&(299_520..MIB)));
    assert!(image.disk.read_only().unwrap().contains("too short"));
    assert_eq!(read(&image, 0, 5), b"begin");
    let error = image.disk.read_at(299_520, &mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert_eq!(image.disk.write_at(0, b"x").unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_eq!(check(&host).errors, 1);
}

#[test]
fn a_size_between_sectors_is_rounded_down() {
    let mut odd = sample();
    edit_footers(&mut odd, |f| f.current_size = (8 * MIB - 100).into());
    let image = open(&holding(&odd));
    assert_eq!(image.disk.size(), 8 * MIB - 512);
    assert!(image.info.warnings[0].contains("not a multiple of 512"));
}

#[test]
fn sizes_that_others_see_are_warned_about() {
    let mut image = sample();
    edit_footers(&mut image, |f| {
        f.creator_application = *b"vpc ";
        (f.cylinders, f.heads, f.sectors_per_track) = (240.into(), 4, 17);
        f.original_size = MIB.into();
    });
    let info = open(&holding(&image)).info;
    assert_eq!(info.virtual_size, 8 * MIB, "the current size counts for every creator");
    assert_eq!(info.details["geometry"]["size"], 240 * 4 * 17 * 512);
    assert_eq!(info.warnings.len(), 2, "{:?}", info.warnings);
}

#[test]
fn an_empty_disk_opens_read_only() {
    for subformat in ["fixed", "dynamic"] {
        let mut empty = bytes(&made(subformat, MIB, None));
        let end = empty.len() - 512;
        edit_footer(&mut empty, end, |f| f.current_size = 0.into());
        let image = open(&holding(&empty));
        assert_eq!(image.disk.size(), 0);
        assert!(image.disk.read_only().is_some());
    }
}

#[test]
fn footer_fields_out_of_range_are_refused() {
    let edited = |change: &dyn Fn(&mut Footer)| {
        let mut bytes = sample();
        edit_footers(&mut bytes, change);
        bytes
    };
    let version = edited(&|f| f.format_version = 0x0002_0000.into());
    assert_refused(&version, ErrorKind::Unsupported, "version 2.0");
    for disk_type in [0, 1, 5, 6, 0xffff_ffff] {
        let bytes = edited(&|f| f.disk_type = disk_type.into());
        assert_refused(&bytes, ErrorKind::Unsupported, "disk type");
    }
    for offset in [0, 511, 513, 1 << 40, u64::MAX, u64::MAX - 511] {
        let bytes = edited(&|f| f.data_offset = offset.into());
        assert_refused(&bytes, ErrorKind::Corrupt, "the dynamic header cannot lie at");
    }
    let elsewhere = edited(&|f| f.data_offset = 1024.into());
    assert_refused(&elsewhere, ErrorKind::Corrupt, "cxsparse");
    let huge = edited(&|f| f.current_size = ((2040 << 30) + 512).into());
    assert_refused(&huge, ErrorKind::Corrupt, "2040 GiB");
}

#[test]
fn header_fields_out_of_range_are_refused() {
    let edited = |change: &dyn Fn(&mut DynamicHeader)| {
        let mut bytes = sample();
        edit_header(&mut bytes, change);
        bytes
    };
    let version = edited(&|h| h.header_version = 0x0002_0000.into());
    assert_refused(&version, ErrorKind::Unsupported, "dynamic header version");
    for block_size in [0, 256, 3 << 20, 512 << 20, u32::MAX] {
        let bytes = edited(&|h| h.block_size = block_size.into());
        assert_refused(&bytes, ErrorKind::Corrupt, "block size");
    }
    for entries in [u32::MAX, 4 << 20] {
        let bytes = edited(&|h| h.max_table_entries = entries.into());
        assert_refused(&bytes, ErrorKind::Corrupt, "past the end of the file");
    }
    for offset in [u64::MAX, 1 << 40] {
        let bytes = edited(&|h| h.table_offset = offset.into());
        assert_refused(&bytes, ErrorKind::Corrupt, "past the end of the file");
    }
    for offset in [0, 511, 512, 1024] {
        let bytes = edited(&|h| h.table_offset = offset.into());
        assert_refused(&bytes, ErrorKind::Corrupt, "overlaps");
    }
}

#[test]
fn a_wrong_header_checksum_is_refused_and_read_by_force() {
    let mut bytes = sample();
    bytes[512 + 800] = 1;
    assert_refused(&bytes, ErrorKind::Corrupt, "dynamic header's checksum");
    let image = forced(&holding(&bytes));
    assert_sample_reads(&image);
    assert!(image.disk.read_only().is_some());
}

#[test]
fn a_bat_too_short_for_the_disk_loses_only_the_rest() {
    let mut bytes = sample();
    edit_header(&mut bytes, |h| h.max_table_entries = 2.into());
    let image = open(&holding(&bytes));
    assert_sample_reads(&image);
    assert_eq!(image.damage.first(), Some(&(4 * MIB..8 * MIB)));
    assert!(image.disk.read_only().is_some());
    assert!(image.disk.read_at(4 * MIB, &mut [0; 512]).is_err());
    image.disk.read_at(4 * MIB - 512, &mut [0; 512]).unwrap();
}

#[test]
fn a_longer_bat_than_needed_is_fine() {
    let mut bytes = sample();
    edit_header(&mut bytes, |h| h.max_table_entries = 100.into());
    let host = holding(&bytes);
    let image = open(&host);
    image.disk.write_at(0, b"x").unwrap();
    image.disk.close().unwrap();
    assert_eq!(check(&host).errors, 0);
    assert_sample_reads(&{
        let host = host.clone();
        open(&host).disk.write_at(0, b"\0").unwrap();
        open(&host)
    });
}

#[test]
fn blocks_with_impossible_entries_are_errors_and_forbid_writing() {
    let stored = bat(&sample(), 1);
    for (sector, problem) in [
        (0, "structures"),
        (1, "structures"),
        (3, "structures"),
        (0xffff_fffe, "past the end of the data"),
        (stored + 8, "past the end of the data"),
    ] {
        let mut bytes = sample();
        set_bat(&mut bytes, 0, sector);
        if sector == stored + 8 {
            set_bat(&mut bytes, 1, UNUSED);
        }
        let host = holding(&bytes);
        let image = open(&host);
        let error = image.disk.read_at(0, &mut vec![0; 2 << 20]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{sector}");
        if sector != stored + 8 {
            assert_eq!(read(&image, 2 * MIB, 12), b"second block");
        }
        let error = image.disk.write_at(4 * MIB, b"x").unwrap_err();
        assert!(error.to_string().contains(problem), "{error}");
        assert_eq!((error.kind(), error.offset()), (ErrorKind::Corrupt, Some(1536)));
        assert_eq!(self::bytes(&host), bytes, "refused before anything was written");
        assert_eq!(check(&host).errors, 1);
    }
}

#[test]
fn overlapping_blocks_are_readable_and_forbid_writing() {
    let mut bytes = sample();
    let sector = bat(&bytes, 1);
    set_bat(&mut bytes, 3, sector);
    let host = holding(&bytes);
    let image = open(&host);
    assert_eq!(read(&image, 6 * MIB, 12), b"second block");
    let error = image.disk.write_at(0, b"x").unwrap_err();
    assert!(error.to_string().contains("blocks 1 and 3 overlap"), "{error}");
}

const UNUSED: u32 = u32::MAX;
