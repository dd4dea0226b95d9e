//! Disks of which something is gone: what that costs, and what not.

use super::*;
use crate::error::ErrorKind;
use crate::formats::{Scope, Severity};

const MIB: u64 = 1 << 20;
/// Bytes of the first extent of a split disk.
const PART: u64 = 2047 * MIB;

fn forced(host: &Arc<MemoryHost>, name: &str) -> Result<Image> {
    let host: Arc<dyn Host> = host.clone();
    let options = OpenOptions { force: true, ..OpenOptions::new(Access::Write) };
    formats::open(&host, &at(name), &options)
}

#[test]
fn a_split_disk_without_one_of_its_parts_is_read_by_force() {
    let host = created("d.vmdk", &spec("twoGbMaxExtentSparse", 3 * PART));
    let image = open_rw(&host, "d.vmdk");
    for part in 0..3 {
        image.disk.write_at(part * PART + 700, &[part as u8 + 1; 50]).unwrap();
    }
    image.disk.close().unwrap();
    drop(image);
    assert_clean(&host, "d.vmdk");
    host.remove(&at("d-s002.vmdk")).unwrap();

    let error = refused(&host, "d.vmdk");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("force"), "{error}");
    let image = forced(&host, "d.vmdk").unwrap();
    assert!(image.disk.read_only().is_some());
    assert_eq!(image.damage, std::slice::from_ref(&(PART..2 * PART)));
    let mut buf = [0; 50];
    image.disk.read_at(700, &mut buf).unwrap();
    assert_eq!(buf, [1; 50]);
    image.disk.read_at(2 * PART + 700, &mut buf).unwrap();
    assert_eq!(buf, [3; 50]);
    for at in [PART, 2 * PART - 50] {
        assert_eq!(image.disk.read_at(at, &mut buf).unwrap_err().kind(), ErrorKind::Corrupt);
    }
    let report = check(&host, "d.vmdk");
    assert_eq!(report.exit_status(), 2);
    let damage: Vec<_> = report.damage.iter().map(|lost| (lost.start, lost.length)).collect();
    assert_eq!(damage, [(PART, PART)]);
}

#[test]
fn a_split_disk_without_any_of_its_parts_is_none() {
    let host = created("d.vmdk", &spec("twoGbMaxExtentSparse", 2 * PART));
    for part in ["d-s001.vmdk", "d-s002.vmdk"] {
        host.remove(&at(part)).unwrap();
    }
    assert_eq!(forced(&host, "d.vmdk").unwrap_err().kind(), ErrorKind::NotFound);
}

/// A disk with data, and its embedded descriptor changed by `change`.
fn described(change: impl FnOnce(&mut Vec<u8>)) -> Arc<MemoryHost> {
    let host = created("d.vmdk", &spec("monolithicSparse", 8 * MIB));
    let image = open_rw(&host, "d.vmdk");
    image.disk.write_at(5 * MIB + 100, &[0x42; 300]).unwrap();
    image.disk.close().unwrap();
    let mut bytes = host.file(&at("d.vmdk")).unwrap().to_vec();
    let mut text: Vec<u8> = bytes[512..21 * 512].iter().copied().take_while(|b| *b != 0).collect();
    change(&mut text);
    bytes[512..512 + text.len()].copy_from_slice(&text);
    bytes[512 + text.len()..(21 * 512).max(512 + text.len())].fill(0);
    super::host(&[("d.vmdk", &bytes)])
}

#[track_caller]
fn assert_reads(disk: &Disk) {
    let mut expected = vec![0; 8 << 20];
    expected[(5 << 20) + 100..(5 << 20) + 400].fill(0x42);
    assert!(contents(disk) == expected);
}

#[test]
fn a_descriptor_that_outgrew_its_place_does_not_cost_the_disk() {
    // Over the end of the area, which cuts a line, and over the redundant tables behind it.
    let host = described(|text| {
        for number in 0..150 {
            text.extend(format!("ddb.remark{number} = \"{}\"\n", "y".repeat(60)).bytes());
        }
    });
    let image = open_with(&host, "d.vmdk", Access::Write).unwrap();
    assert!(image.disk.read_only().unwrap().contains("descriptor line"));
    assert_reads(&image.disk);
    let report = check(&host, "d.vmdk");
    assert_eq!(report.exit_status(), 2);
    let damaged = |f: &formats::Finding| f.what.contains("the descriptor is damaged");
    assert!(report.findings.iter().any(|f| f.severity == Severity::Error && damaged(f)));
    // A repair of the tables leaves the disk what it is.
    let dynamic: Arc<dyn Host> = host.clone();
    let options = OpenOptions::new(Access::Write);
    formats::repair(&dynamic, &at("d.vmdk"), &options, Scope::All, false).unwrap();
    assert_reads(&open_with(&host, "d.vmdk", Access::Read).unwrap().disk);
}

#[test]
fn a_descriptor_that_is_nonsense_costs_a_consent() {
    for nonsense in
        [&b"\xff\xfe nonsense\nof all \"sorts\n"[..], b"createType=\"monolithicSparse\"\nx"]
    {
        let host = described(|text| *text = nonsense.to_vec());
        let error = refused(&host, "d.vmdk");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("force"), "{error}");
        let image = forced(&host, "d.vmdk").unwrap();
        assert!(image.disk.read_only().is_some());
        assert!(image.info.warnings.iter().any(|warning| warning.contains("parent")));
        assert_reads(&image.disk);
    }
}

#[test]
fn a_broken_extent_line_costs_the_disk() {
    let host = described(|text| {
        let line = text.windows(6).position(|w| w == b"SPARSE").unwrap();
        text.insert(line, b'X');
    });
    assert_eq!(refused(&host, "d.vmdk").kind(), ErrorKind::Corrupt);
    assert!(forced(&host, "d.vmdk").is_err());
}

#[test]
fn a_search_passes_over_what_is_stored_nowhere() {
    // As large as a disk can be, in a file of some hundred bytes.
    let zero = custom(&format!("RW {} ZERO\nRW 8 FLAT \"f\" 0", (1u64 << 53) - 8));
    let zero = host(&[("d.vmdk", zero.as_bytes()), ("f", &[7; 4096])]);
    let end = 1 << 62;
    let disk = open_with(&zero, "d.vmdk", Access::Read).unwrap().disk;
    assert_eq!(disk.next_data(0).unwrap(), Some(end - 4096..end));
    assert_eq!(disk.next_hole(end - 4096).unwrap(), end);

    // Its tables do not exist, for all of the disk.
    let size = 2040 << 30;
    let host = created("d.vmdk", &spec("vmfsSparse", size));
    let image = open_rw(&host, "d.vmdk");
    assert_eq!(image.disk.next_data(1000).unwrap(), None);
    let at = size - (3 << 30);
    image.disk.write_at(at, &[9; 512]).unwrap();
    assert_eq!(image.disk.next_data(1000).unwrap(), Some(at..at + 512));
    image.disk.close().unwrap();
}
