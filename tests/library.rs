//! The crate as another program uses it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "its main")]
#[path = "../examples/redo.rs"]
mod redo;
#[allow(dead_code, reason = "its main")]
#[path = "../examples/scan.rs"]
mod scan;
#[allow(dead_code, reason = "its main")]
#[path = "../examples/sectors.rs"]
mod sectors;

use flatdisk::disk::layers::Content;
use flatdisk::formats::{self, CreateSpec};
use flatdisk::storage::file::HostFs;
use flatdisk::{ErrorKind, OpenOptions};

#[test]
fn the_examples_do_what_they_say() {
    sectors::demonstrate().unwrap();
    scan::demonstrate().unwrap();
    redo::demonstrate().unwrap();
}

#[test]
fn zeroes_are_written_in_place_and_maps_are_of_ranges() {
    let dir = tempfile::tempdir().unwrap();
    for (format, name) in [("vhd", "a.vhd"), ("vhdx", "a.vhdx"), ("vmdk", "a.vmdk")] {
        let path = dir.path().join(name);
        let spec = CreateSpec { size: 16 << 20, ..CreateSpec::default() };
        formats::create(formats::by_name(format).unwrap(), &HostFs, &path, &spec).unwrap();
        let disk = OpenOptions::default().write(true).open(&path).unwrap().disk;
        disk.write_at(4 << 20, &vec![7; 1 << 20]).unwrap();
        disk.flush().unwrap();
        let taken = disk.allocated().unwrap();
        disk.write_zeroes((4 << 20) + 1000, 10_000).unwrap();
        disk.write_zeroes(12 << 20, 1 << 20).unwrap();
        let mut bytes = vec![1; 1 << 20];
        disk.read_at(4 << 20, &mut bytes).unwrap();
        assert!(bytes[1000..11_000].iter().all(|b| *b == 0), "{format}");
        assert!(bytes[..1000].iter().chain(&bytes[11_000..]).all(|b| *b == 7), "{format}");
        assert!(disk.allocated().unwrap() <= taken, "{format}");
        let mut runs = Vec::new();
        disk.map(4 << 20..12 << 20, |run| {
            runs.push((run.start, run.content));
            Ok(())
        })
        .unwrap();
        assert_eq!(runs[0], (4 << 20, Content::Data), "{format}");
        assert_eq!(runs.last().unwrap().1, Content::Unallocated, "{format}");
        let outside = disk.map(0..17 << 20, |_| Ok(())).unwrap_err();
        assert_eq!(outside.kind(), ErrorKind::OutOfRange);
        disk.close().unwrap();
    }
    let absent = flatdisk::open(dir.path().join("absent.vhd")).unwrap_err();
    assert_eq!(absent.kind(), ErrorKind::NotFound);
}
