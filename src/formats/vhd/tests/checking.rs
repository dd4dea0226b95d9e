//! What a check finds, and where.

use super::*;
use crate::formats::Severity;

const MIB: u64 = 1 << 20;

/// A dynamic image of 8 MiB with blocks 0 to 2 written.
fn sample() -> Vec<u8> {
    let host = dynamic(8 * MIB);
    let image = open(&host);
    image.disk.write_at(0, &vec![9; 6 << 20]).unwrap();
    image.disk.close().unwrap();
    bytes(&host)
}

fn findings(bytes: &[u8]) -> Vec<(Severity, Option<u64>, String)> {
    let report = check(&holding(bytes));
    report.findings.into_iter().map(|f| (f.severity, f.offset, f.what)).collect()
}

#[test]
fn a_new_image_and_a_written_one_are_clean() {
    assert!(findings(&bytes(&dynamic(8 * MIB))).is_empty());
    assert!(findings(&bytes(&made("fixed", MIB, None))).is_empty());
    assert!(findings(&sample()).is_empty());
}

#[test]
fn a_block_that_nothing_points_at_is_a_leak_of_its_size() {
    let mut image = sample();
    let at = u64::from(bat(&image, 1)) * 512;
    set_bat(&mut image, 1, u32::MAX);
    let report = check(&holding(&image));
    assert_eq!((report.errors, report.leaks, report.exit_status()), (0, 1, 3));
    assert_eq!(report.leaked_bytes, 2 * MIB + 4096);
    assert_eq!(report.findings[0].offset, Some(at - 3584));
}

#[test]
fn every_bad_entry_is_named_with_its_place() {
    let mut image = sample();
    let first = bat(&image, 0);
    set_bat(&mut image, 1, first + 8);
    set_bat(&mut image, 2, 2);
    set_bat(&mut image, 3, 0x00ff_ffff);
    let found = findings(&image);
    let errors: Vec<_> = found.iter().filter(|f| f.0 == Severity::Error).collect();
    assert_eq!(errors.len(), 3, "{found:?}");
    assert_eq!(errors[0].1, Some(1536 + 8));
    assert!(errors[0].2.contains("block 2"), "{found:?}");
    assert_eq!(errors[1].1, Some(1536 + 12));
    assert!(errors[2].2.contains("blocks 0 and 1 overlap"), "{found:?}");
}

#[test]
fn data_that_a_bitmap_hides_is_a_notice() {
    let mut image = sample();
    let at = bat(&image, 1) as usize * 512;
    image[at + 2] = 0xfd;
    let found = findings(&image);
    let data = (at + 512 + 22 * 512) as u64;
    assert_eq!((found.len(), found[0].0, found[0].1), (1, Severity::Notice, Some(data)));
}

#[test]
fn a_table_full_of_one_entry_is_found_without_collecting_it() {
    let host = made("dynamic", 64 * MIB, Some(4096));
    let image = open(&host);
    image.disk.write_at(0, &[1; 512]).unwrap();
    image.disk.close().unwrap();
    let mut image = bytes(&host);
    let sector = bat(&image, 0);
    (0..16384).for_each(|block| set_bat(&mut image, block, sector));
    let found = findings(&image);
    assert!(found.iter().any(|f| f.2.contains("more blocks than the file")), "{found:?}");
}

#[test]
fn a_stored_block_past_the_disks_end_is_a_notice() {
    let mut image = sample();
    edit_footers(&mut image, |f| {
        f.current_size = (4 * MIB).into();
        f.original_size = (4 * MIB).into();
        f.cylinders = 0.into();
    });
    let found = findings(&image);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!((found[0].0, found[0].1), (Severity::Notice, Some(1536 + 8)));
}

#[test]
fn a_missing_footer_a_missing_copy_and_garbage_are_errors() {
    let image = sample();
    let end = image.len() - 512;
    assert_eq!(findings(&image[..end])[0].2, "the footer is missing");
    let mut headless = image.clone();
    headless[..512].fill(0);
    assert_eq!(findings(&headless)[0].2, "the footer copy is missing");
    let mut longer = image.clone();
    longer.extend([1; 700]);
    let found = findings(&longer);
    assert_eq!(found[1].1, Some(image.len() as u64), "{found:?}");
}
