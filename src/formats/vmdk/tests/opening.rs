//! Which images open, and why the others do not.

use super::*;
use crate::error::ErrorKind;
use crate::formats::vmdk::layout::{Header, SECTOR};

const MIB: u64 = 1 << 20;

/// The bytes of a new monolithic sparse disk of 1 MiB.
fn monolithic() -> Vec<u8> {
    created("d.vmdk", &spec("monolithicSparse", MIB)).file(&at("d.vmdk")).unwrap().to_vec()
}

/// Replaces the only occurrence of `from`; both have one length.
fn patch(bytes: &mut [u8], from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let places: Vec<usize> = (0..bytes.len() - from.len())
        .filter(|i| &bytes[*i..*i + from.len()] == from.as_bytes())
        .collect();
    assert_eq!(places.len(), 1, "{from}");
    bytes[places[0]..places[0] + to.len()].copy_from_slice(to.as_bytes());
}

fn put_u32(bytes: &mut [u8], at: u64, value: u32) {
    bytes[at as usize..at as usize + 4].copy_from_slice(&value.to_le_bytes());
}

fn header(bytes: &[u8]) -> Header {
    Header::decode(bytes[..512].try_into().unwrap()).unwrap()
}

#[track_caller]
fn assert_refused(host: &Arc<MemoryHost>, kind: ErrorKind, what: &str) {
    let error = refused(host, "d.vmdk");
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.what().contains(what), "{error}");
}

#[test]
fn every_subformat_opens_as_it_was_created() {
    for subformat in writable_subformats() {
        let host = created("d.vmdk", &spec(subformat, 5 * MIB));
        assert_clean(&host, "d.vmdk");
        let image = open_rw(&host, "d.vmdk");
        assert_eq!(image.disk.size(), 5 * MIB);
        let flat = subformat.starts_with("vmfs") && subformat != "vmfsSparse";
        let expected = if flat { "vmfs" } else { subformat };
        assert_eq!(image.info.subformat, expected);
        assert_eq!(image.info.details["cid"], "fffffffe");
        assert_eq!(image.info.details["adapter_type"], "lsilogic");
        assert!(image.info.uuid.as_ref().unwrap().starts_with("60 00 C2 9"));
        assert!(!image.info.dirty && image.info.warnings.is_empty());
        assert!(contents(&image.disk).iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_huge_sparse_disk_is_made_of_little_more_than_its_directories() {
    let host = created("d.vmdk", &spec("monolithicSparse", 2 << 40));
    let file = host.file(&at("d.vmdk")).unwrap();
    let stored = crate::storage::Storage::allocated(&*file).unwrap();
    assert!(stored < MIB, "{stored}");
    let image = open_rw(&host, "d.vmdk");
    image.disk.write_at((2 << 40) - 512, &[7; 512]).unwrap();
    image.disk.close().unwrap();
    assert_clean(&host, "d.vmdk");
}

#[test]
fn split_disks_are_cut_at_2047_mib() {
    let host = created("d.vmdk", &spec("twoGbMaxExtentSparse", 5 << 30));
    let image = open_with(&host, "d.vmdk", Access::Read).unwrap();
    let sizes: Vec<u64> = image.info.details["extents"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["size"].as_u64().unwrap())
        .collect();
    assert_eq!(sizes, [2047 * MIB, 2047 * MIB, 1026 * MIB]);
    assert_eq!(image.info.extents[2], at("d-s003.vmdk"));
}

#[test]
fn creation_refuses_what_it_cannot_make_and_leaves_nothing() {
    let refused = |spec: &CreateSpec| {
        let host = MemoryHost::new();
        let error = formats::create(&Vmdk, &*host, &at("d.vmdk"), spec).unwrap_err();
        assert!(host.files().is_empty());
        error.kind()
    };
    let sparse = spec("monolithicSparse", MIB);
    let invalid = [
        CreateSpec { block_size: Some(2048), ..sparse.clone() },
        CreateSpec { block_size: Some(98_304), ..sparse.clone() },
        CreateSpec { block_size: Some(65_536), ..spec("monolithicFlat", MIB) },
        CreateSpec { adapter: Some("nvme".into()), ..sparse.clone() },
        CreateSpec { logical_sector: Some(4096), ..sparse.clone() },
        CreateSpec { log_size: Some(MIB), ..sparse.clone() },
        spec("monolithicSparse", 65 << 40),
        spec("twoGbMaxExtentFlat", 9 << 40),
    ];
    for spec in &invalid {
        assert_eq!(refused(spec), ErrorKind::InvalidInput, "{spec:?}");
    }
}

#[test]
fn creation_never_replaces_a_file() {
    let host = host(&[("d-s002.vmdk", b"mine")]);
    let spec = spec("twoGbMaxExtentSparse", 3 << 30);
    let error = formats::create(&Vmdk, &*host, &at("d.vmdk"), &spec).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exists);
    let names: Vec<_> = host.files().iter().map(|f| f.to_vec()).collect();
    assert_eq!(names, [b"mine".to_vec()]);
}

#[test]
fn a_renamed_monolithic_disk_is_itself() {
    let bytes = monolithic();
    let host = host(&[("d.vmdk", b"a stranger"), ("e.vmdk", &bytes)]);
    let image = open_rw(&host, "e.vmdk");
    image.disk.write_at(0, b"hello").unwrap();
    image.disk.close().unwrap();
    assert_eq!(host.file(&at("d.vmdk")).unwrap().to_vec(), b"a stranger");
}

#[test]
fn a_header_without_capacity_holds_only_a_descriptor() {
    let mut bytes = monolithic();
    let sound = header(&bytes);
    bytes[..512].copy_from_slice(&Header { capacity: 0, ..sound }.encode());
    patch(&mut bytes, "RW 2048 SPARSE \"d.vmdk\"", "RW 2048 FLAT   \"d-flat\"");
    let host = host(&[("d.vmdk", &bytes), ("d-flat", &[3; 2048 * 512])]);
    let image = open_rw(&host, "d.vmdk");
    assert!(contents(&image.disk).iter().all(|byte| *byte == 3));
}

#[test]
fn an_embedded_descriptor_may_list_more_extents() {
    let mut bytes = monolithic();
    let text = String::from_utf8(bytes[512..1024].to_vec()).unwrap();
    let more =
        text.replace("SPARSE \"d.vmdk\"\n", "SPARSE \"d.vmdk\"\nRW 3 FLAT \"tail\" 1\nRW 2 ZERO\n");
    bytes[512..512 + 500].copy_from_slice(&more.as_bytes()[..500]);
    let host = host(&[("d.vmdk", &bytes), ("tail", &[9; 4 * 512])]);
    let image = open_rw(&host, "d.vmdk");
    assert_eq!(
        sources(&image.disk),
        [(MIB, Source::Zero), (1536, Source::File { file: 1, at: 512 }), (1024, Source::Zero)]
    );
    let error = image.disk.write_at(MIB + 1536, &[1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    assert!(error.what().contains("ZERO"), "{error}");
}

#[test]
fn extents_of_every_kind_follow_each_other() {
    let lines = "RW 10 FLAT \"a\" 2\nRDONLY 10 FLAT \"a\" 12\nNOACCESS 10 FLAT \"x\" 0\n\
                 RW 5 VMFS \"b\"\nNOACCESS 0 ZERO\nRW 300 SPARSE \"c\"\nRDONLY 300 SPARSE \"e\"";
    let host =
        host(&[("d.vmdk", custom(lines).as_bytes()), ("a", &[1; 30 * 512]), ("b", &[2; 2560])]);
    add_sparse(&host, "c", 384, 128);
    add_sparse(&host, "e", 300, 128);
    let disk = open_rw(&host, "d.vmdk").disk;
    let file = |file, at| Source::File { file, at };
    assert_eq!(
        sources(&disk),
        [
            (5120, file(0, 1024)),
            (5120, file(1, 6144)),
            (5120, Source::Bad),
            (2560, file(2, 0)),
            (600 * 512, Source::Zero),
        ]
    );
    let write = |sector: u64| disk.write_at(sector * 512, &[1]).map_err(|e| e.kind());
    assert_eq!(write(0), Ok(()));
    assert_eq!(write(10), Err(ErrorKind::ReadOnly));
    assert_eq!(write(20), Err(ErrorKind::Corrupt));
    assert_eq!(disk.read_at(20 * 512, &mut [0]).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(write(30), Ok(()));
    assert_eq!(write(35), Ok(()));
    assert_eq!(write(335), Err(ErrorKind::ReadOnly));
    disk.discard(335 * 512, 512).unwrap();
    assert_eq!(disk.discard(10 * 512, 512).map_err(|e| e.kind()), Err(ErrorKind::ReadOnly));
    disk.close().unwrap();
    assert_eq!(host.file(&at("a")).unwrap().to_vec()[12 * 512..], [1; 18 * 512]);
}

#[test]
fn extents_without_their_descriptor_are_told_apart_from_damage() {
    let host = MemoryHost::new();
    add_sparse(&host, "d.vmdk", 2048, 128);
    assert_refused(&host, ErrorKind::Unsupported, "without the disk's descriptor");
    for magic in [&b"COWD"[..], &[0xbe, 0xba, 0xfe, 0xca, 0, 0, 0, 0]] {
        add(&host, "d.vmdk", &[magic, &[0; 4096]].concat());
        assert_refused(&host, ErrorKind::Unsupported, "without the disk's descriptor");
    }
    let mut unfinished = monolithic();
    unfinished[..4].copy_from_slice(b"kdmv");
    add(&host, "d.vmdk", &unfinished);
    assert_refused(&host, ErrorKind::Corrupt, "unfinished");
}

#[test]
fn extents_are_recognised_without_opening_them() {
    let lone = |host: &Arc<MemoryHost>, name: &str| {
        let file = host.file(&at(name)).unwrap();
        super::super::is_lone_extent(&formats::Probe::read(&*file).unwrap())
    };
    let split = created("d.vmdk", &spec("twoGbMaxExtentSparse", MIB));
    assert!(lone(&split, "d-s001.vmdk") && !lone(&split, "d.vmdk"));
    let whole = created("d.vmdk", &spec("monolithicSparse", MIB));
    assert!(!lone(&whole, "d.vmdk"));
    // An empty area for a descriptor.
    let mut bytes = monolithic();
    bytes[512..21 * 512].fill(0);
    add(&whole, "d.vmdk", &bytes);
    assert!(lone(&whole, "d.vmdk"));
    assert_refused(&whole, ErrorKind::Unsupported, "without the disk's descriptor");
}

#[test]
fn what_is_not_in_files_is_refused_by_name() {
    let text = |lines: &str, more: &str| {
        let host = MemoryHost::new();
        add(&host, "d.vmdk", format!("{}{more}", custom(lines)).as_bytes());
        host
    };
    let flat = "RW 5 FLAT \"a\" 0";
    for (lines, more, what) in [
        ("RW 5 VMFSRDM \"a\"", "", "raw device mapping"),
        ("RW 5 VMFSRAW \"a\"", "", "raw device"),
        ("RW 5 VSANSPARSE \"a\"", "", "vSAN"),
        ("RW 5 FLAT \"/dev/sda\" 0", "", "raw device"),
        ("RW 5 FLAT \"\\\\.\\PhysicalDrive0\" 0", "", "raw device"),
        ("RW 5 VMFS \"vsan://x\"", "", "remote object"),
        (flat, "keyID=\"x\"\n", "encrypted by vSphere"),
        (flat, "encryption.keySafe = \"x\"\n", "encrypted by VMware"),
        (flat, "ddb.iofilters = \"vmwarevmcrypt\"\n", "encrypted by vSphere"),
        (flat, "ddb.objectParentUri = \"vsan://x\"\n", "remote object"),
        (flat, "isNativeSnapshot=\"yes\"\n", "storage array"),
    ] {
        assert_refused(&text(lines, more), ErrorKind::Unsupported, what);
    }
}

#[test]
fn names_in_a_descriptor_stay_beneath_it() {
    for name in ["../a", "/etc/passwd", "C:\\a", "\\\\host\\a", "nbd://a", "a/../../b"] {
        let host = host(&[("d.vmdk", custom(&format!("RW 1 FLAT \"{name}\" 0")).as_bytes())]);
        assert_refused(&host, ErrorKind::Denied, "names a file");
    }
    let text = "version=1\nencoding=\"KLINGON\"\nRW 1 FLAT \"\u{e4}\" 0\n";
    assert_refused(&host(&[("d.vmdk", text.as_bytes())]), ErrorKind::Unsupported, "KLINGON");
}

#[test]
fn no_part_of_a_file_is_used_twice() {
    let refuse = |lines: &str, what: &str| {
        let host = host(&[("d.vmdk", custom(lines).as_bytes()), ("a", &[0; 5120])]);
        add_sparse(&host, "s", 128, 128);
        assert_refused(&host, ErrorKind::Corrupt, what);
    };
    refuse("RW 5 FLAT \"a\" 0\nRW 5 FLAT \"./a\" 4", "two extents at once");
    refuse("RW 100 SPARSE \"s\"\nRW 100 SPARSE \"s\"", "two extents at once");
    refuse("RW 1 FLAT \"d.vmdk\" 0", "the descriptor itself");
    let host = host(&[("d.vmdk", custom("RW 5 FLAT \"a\" 5\nRW 5 FLAT \"a\" 0").as_bytes())]);
    add(&host, "a", &[0; 5120]);
    open_rw(&host, "d.vmdk");
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let refuse = |lines: &str, what: &str| {
        let host = host(&[("d.vmdk", custom(lines).as_bytes()), ("a", &[0; 512])]);
        add_sparse(&host, "s", 128, 128);
        assert_refused(&host, ErrorKind::Corrupt, what);
    };
    refuse("RW 18446744073709551615 FLAT \"a\" 0", "larger together");
    refuse("RW 9007199254740992 ZERO\nRW 9007199254740992 ZERO", "larger together");
    refuse("RW 1 FLAT \"a\" 18446744073709551615", "beyond the end");
    refuse("RW 129 SPARSE \"s\"", "sparse header has 128 sectors, the descriptor 129");
    refuse("RW 1 SPARSE \"a\"", "no KDMV signature");
    refuse("", "names no extents");
}

#[test]
fn a_short_flat_extent_is_readable_as_far_as_it_goes() {
    let host = host(&[("d.vmdk", custom("RW 10 FLAT \"a\" 1").as_bytes()), ("a", &[5; 2100])]);
    let image = open_with(&host, "d.vmdk", Access::Write).unwrap();
    assert!(image.disk.read_only().unwrap().contains("shorter"));
    assert_eq!(image.damage, std::slice::from_ref(&(1536..5120)));
    let mut bytes = [0; 1536];
    image.disk.read_at(0, &mut bytes).unwrap();
    assert_eq!(bytes, [5; 1536]);
    assert_eq!(image.disk.read_at(1536, &mut [0]).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(check(&host, "d.vmdk").errors, 1);
}

#[test]
fn what_must_not_be_written_says_why() {
    let reason = |bytes: &[u8]| {
        let host = host(&[("d.vmdk", bytes)]);
        let image = open_with(&host, "d.vmdk", Access::Write).unwrap();
        let reason = image.disk.read_only().unwrap().to_owned();
        assert!(contents(&image.disk).iter().all(|byte| *byte == 0));
        assert_eq!(image.disk.write_at(0, &[1]).unwrap_err().kind(), ErrorKind::ReadOnly);
        image.disk.close().unwrap();
        assert_eq!(host.file(&at("d.vmdk")).unwrap().to_vec(), bytes);
        reason
    };
    let edited = |edit: fn(&mut Header)| {
        let mut bytes = monolithic();
        let mut changed = header(&bytes);
        edit(&mut changed);
        bytes[..512].copy_from_slice(&changed.encode());
        bytes
    };
    assert!(reason(&edited(|h| h.version = 3)).contains("changed block tracking"));
    assert!(reason(&edited(|h| h.rgd = h.gd)).contains("overlap"));
    assert!(reason(&edited(|h| h.rgd = 1 << 40)).contains("redundant grain directory"));
    assert!(reason(&edited(|h| h.gd = 0)).contains("redundant copy is used"));
    let mut tracked = monolithic();
    patch(&mut tracked, "ddb.adapterType = \"lsilogic\"", "changeTrackPath=\"d-ctk.vmd\" ");
    assert!(reason(&tracked).contains("changed block tracking"));
    let mut twice = monolithic();
    patch(&mut twice, "ddb.adapterType = \"lsilogic\"", "CID=00000001                ");
    assert!(reason(&twice).contains("twice"));
    let mut read_only = monolithic();
    patch(&mut read_only, "encoding=\"UTF-8\"\nCID=", "                \nCID=");
    patch(&mut read_only, "RW 2048 SPARSE \"d.vmdk\"", "RDONLY 2048 SPARSE \"d\" ");
    assert!(reason(&read_only).contains("no extent"));
}

#[test]
fn directories_that_cannot_be_there_are_refused() {
    let host = MemoryHost::new();
    for place in [0, 1, 20, 1 << 30, u64::MAX - 1] {
        let mut bytes = monolithic();
        let changed = Header { gd: place, rgd: place, ..header(&bytes) };
        bytes[..512].copy_from_slice(&changed.encode());
        add(&host, "d.vmdk", &bytes);
        assert_refused(&host, ErrorKind::Corrupt, "the grain directory");
    }
}

#[test]
fn damaged_entries_cost_their_own_range_only() {
    let host = created("d.vmdk", &spec("monolithicSparse", 80 * MIB));
    let image = open_rw(&host, "d.vmdk");
    for grain in 0..4 {
        image.disk.write_at(grain * 65_536, &[grain as u8 + 1; 65_536]).unwrap();
    }
    image.disk.write_at(70 * MIB, &[9; 512]).unwrap();
    image.disk.close().unwrap();
    let sound = host.file(&at("d.vmdk")).unwrap().to_vec();
    let h = header(&sound);
    let table = (h.gd + 1) * SECTOR;
    let cases: [(u64, u32, u64, u64); 5] = [
        // Outside the file, inside the header, inside a directory: the grain.
        (table + 4, 0x00ff_ffff, 65_536, 65_536),
        (table + 4, u32::MAX, 65_536, 65_536),
        (table + 4, 2, 65_536, 65_536),
        (table + 4, h.gd as u32, 65_536, 65_536),
        // The last sector of the file: all but the first sector.
        (table + 4, (sound.len() / 512 - 1) as u32, 65_536 + 512, 65_536 - 512),
    ];
    for (at, value, from, len) in cases {
        let mut bytes = sound.clone();
        put_u32(&mut bytes, at, value);
        add(&host, "d.vmdk", &bytes);
        let image = open_with(&host, "d.vmdk", Access::Write).unwrap();
        let list = image.disk.extents(0..80 * MIB).unwrap();
        let bad: Vec<_> =
            list.iter().filter(|e| e.source == Source::Bad).map(|e| (e.start, e.len)).collect();
        assert_eq!(bad, [(from, len)]);
        let mut sector = [0; 512];
        image.disk.read_at(70 * MIB, &mut sector).unwrap();
        assert_eq!(sector, [9; 512]);
        let error = image.disk.write_at(70 * MIB, &sector).unwrap_err();
        assert!(error.what().contains("damaged"), "{error}");
        assert!(check(&host, "d.vmdk").errors > 0);
    }
}

#[test]
fn a_lost_directory_entry_is_answered_by_its_twin() {
    let host = created("d.vmdk", &spec("monolithicSparse", 80 * MIB));
    let image = open_rw(&host, "d.vmdk");
    image.disk.write_at(70 * MIB, &[9; 512]).unwrap();
    image.disk.close().unwrap();
    let sound = host.file(&at("d.vmdk")).unwrap().to_vec();
    let h = header(&sound);
    for value in [0, 1, 0x00ff_ffff] {
        let mut bytes = sound.clone();
        put_u32(&mut bytes, h.gd * SECTOR + 8, value);
        add(&host, "d.vmdk", &bytes);
        let image = open_with(&host, "d.vmdk", Access::Write).unwrap();
        let mut sector = [0; 512];
        image.disk.read_at(70 * MIB, &mut sector).unwrap();
        assert_eq!(sector, [9; 512]);
        assert!(image.disk.write_at(0, &[1]).unwrap_err().what().contains("damaged"));
        // Without the twin the range is lost, and only it.
        put_u32(&mut bytes, h.rgd * SECTOR + 8, 1);
        add(&host, "d.vmdk", &bytes);
        let image = open_with(&host, "d.vmdk", Access::Read).unwrap();
        let expected = if value == 0 { Source::Zero } else { Source::Bad };
        assert_eq!(
            sources(&image.disk).last(),
            Some(&(16 * MIB, expected)).filter(|_| value != 0).or(Some(&(80 * MIB, Source::Zero)))
        );
    }
}

#[test]
fn tables_that_share_space_are_never_written() {
    let host = created("d.vmdk", &spec("monolithicSparse", 80 * MIB));
    let image = open_rw(&host, "d.vmdk");
    image.disk.write_at(0, &[1; 200_000]).unwrap();
    image.disk.close().unwrap();
    let sound = host.file(&at("d.vmdk")).unwrap().to_vec();
    let h = header(&sound);
    let (table, redundant) = ((h.gd + 1) * SECTOR, (h.rgd + 1) * SECTOR);
    let first = u32::from_le_bytes(sound[table as usize..][..4].try_into().unwrap());
    for (value, what) in [
        (first, "another grain"),
        (first + 8, "another grain"),
        ((h.gd + 2) as u32, "shares its place"),
    ] {
        let mut bytes = sound.clone();
        put_u32(&mut bytes, table + 4, value);
        put_u32(&mut bytes, redundant + 4, value);
        add(&host, "d.vmdk", &bytes);
        let image = open_with(&host, "d.vmdk", Access::Write).unwrap();
        let error = image.disk.write_at(0, &[1]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.what().contains(what), "{error}");
        assert_eq!(host.file(&at("d.vmdk")).unwrap().to_vec(), bytes);
        let report = check(&host, "d.vmdk");
        assert!(report.findings.iter().any(|f| f.what.contains(what)), "{:#?}", report.findings);
    }
}

#[test]
fn copies_that_differ_are_repaired_only_after_an_unclean_shutdown() {
    let host = created("d.vmdk", &spec("monolithicSparse", 80 * MIB));
    let image = open_rw(&host, "d.vmdk");
    image.disk.write_at(0, &[1; 200_000]).unwrap();
    image.disk.close().unwrap();
    let mut bytes = host.file(&at("d.vmdk")).unwrap().to_vec();
    let h = header(&bytes);
    put_u32(&mut bytes, (h.rgd + 1) * SECTOR + 4, 0);
    add(&host, "d.vmdk", &bytes);
    let image = open_with(&host, "d.vmdk", Access::Write).unwrap();
    assert!(image.disk.write_at(0, &[1]).unwrap_err().what().contains("redundant copy differ"));
    assert_eq!(check(&host, "d.vmdk").errors, 1);

    bytes[super::super::layout::UNCLEAN_AT as usize] = 1;
    add(&host, "d.vmdk", &bytes);
    let image = open_rw(&host, "d.vmdk");
    assert!(image.info.dirty);
    image.disk.write_at(0, &[2]).unwrap();
    let mut byte = [0];
    image.disk.read_at(65_536, &mut byte).unwrap();
    assert_eq!(byte, [1]);
    image.disk.close().unwrap();
    assert_clean(&host, "d.vmdk");
    assert!(!open_rw(&host, "d.vmdk").info.dirty);
}

#[test]
fn opening_and_reading_never_write() {
    for subformat in writable_subformats() {
        let host = created("d.vmdk", &spec(subformat, MIB));
        let before: Vec<_> = host.files().iter().map(|f| f.to_vec()).collect();
        let image = open_rw(&host, "d.vmdk");
        contents(&image.disk);
        image.disk.flush().unwrap();
        image.disk.close().unwrap();
        let after: Vec<_> = host.files().iter().map(|f| f.to_vec()).collect();
        assert!(before == after, "{subformat}");
    }
}
