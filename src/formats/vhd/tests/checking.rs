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
fn the_loss_of_one_footer_is_an_error_that_a_repair_mends() {
    let image = sample();
    let end = image.len() - 512;
    let what = |image: &[u8]| {
        let host = holding(image);
        let mut errors =
            check(&host).findings.into_iter().filter(|f| f.severity == Severity::Error);
        let error = errors.next().unwrap();
        assert_eq!(errors.next().map(|f| f.what), None);
        let dynamic: Arc<dyn Host> = host.clone();
        let (options, all) = (OpenOptions::new(Access::Write), formats::Scope::All);
        let repair = formats::repair(&dynamic, Path::new(PATH), &options, all, false).unwrap();
        assert_eq!(repair.after.exit_status(), 0, "{:?}", repair.after.findings);
        assert_eq!(check(&host).notices, 0);
        (error.offset, error.what)
    };
    // Cut before the footer, and inside it.
    assert_eq!(what(&image[..end]).0, Some(end as u64));
    assert!(what(&image[..end + 300]).1.contains("footer is missing"));
    let mut headless = image.clone();
    headless[..512].fill(0);
    let (at, told) = what(&headless);
    assert_eq!((at, told.contains("footer copy is missing")), (Some(0), true), "{told}");
    let mut longer = image.clone();
    longer.extend([1; 700]);
    assert_eq!(what(&longer).0, Some(image.len() as u64));
    let mut torn = image.clone();
    edit_footer(&mut torn, 0, |f| f.original_size = 0.into());
    assert_eq!(findings(&torn)[0].0, Severity::Error);
}

/// A dynamic image of 2 MiB whose BAT has room for `entries` blocks, all of it a hole but the first.
fn with_hole_for_a_bat(block: u32, entries: u32) -> Arc<MemoryHost> {
    let image = bytes(&dynamic(2 * MIB));
    let file = MemoryFile::new(PATH, &[]);
    let len = 4096 + u64::from(entries) * 4;
    file.write_at(0, &image[..1536]).unwrap();
    let mut header = DynamicHeader::read_from_bytes(&image[512..1536]).unwrap();
    header.table_offset = 4096.into();
    header.max_table_entries = entries.into();
    header.block_size = block.into();
    header.seal();
    file.write_at(512, header.as_bytes()).unwrap();
    file.write_at(4096, &[0xff; 4]).unwrap();
    file.write_at(len.next_multiple_of(512), &image[..512]).unwrap();
    let host = MemoryHost::new();
    host.insert(file);
    host
}

#[test]
fn a_bat_that_is_a_huge_hole_takes_no_time() {
    // 4 TiB of entries would take minutes to look at one by one.
    for (block, entries) in [(512, u32::MAX), (2 << 20, u32::MAX), (4096, 600_000_000)] {
        let host = with_hole_for_a_bat(block, entries);
        let report = check(&host);
        assert_eq!(report.errors > 0, block != 2 << 20, "blocks of {block} bytes");
        let image = open(&host);
        let written = image.disk.write_at(0, &[1; 512]);
        let _ = image.disk.close();
        assert_eq!(written.is_ok(), block == 2 << 20, "blocks of {block} bytes: {written:?}");
    }
}

#[test]
fn a_repair_does_not_bring_back_an_old_footer_before_garbage() {
    let mut image = sample();
    let end = image.len() - 512;
    edit_footer(&mut image, end, |f| f.data_offset = (4 * MIB).into());
    image.extend([1; 700]);
    let host = holding(&image);
    let dynamic: Arc<dyn Host> = host.clone();
    let options = OpenOptions::new(Access::Write);
    let all = formats::Scope::All;
    let repair = formats::repair(&dynamic, Path::new(PATH), &options, all, false).unwrap();
    assert_eq!((repair.after.errors, repair.after.notices), (0, 0), "{:?}", repair.after.findings);
    assert_eq!(read(&open(&host), 5 * MIB, 2), [9; 2]);
}
