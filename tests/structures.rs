//! `info --structures`: every structure of an image with its raw values, and the readable rest of a damaged one.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use flatdisk::OpenOptions;
use flatdisk::formats::structures::{Checksum, Structure, structures};
use flatdisk::formats::{self, CreateSpec, Listing};
use flatdisk::storage::file::HostFs;
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::{Access, Host};

const LIMIT: usize = 1000;

/// An image with something in it, in memory.
fn image(name: &str, subformat: Option<&str>) -> Arc<dyn Host> {
    let host: Arc<dyn Host> = MemoryHost::new();
    let path = Path::new(name);
    let format = formats::by_extension(path).unwrap();
    let subformat = subformat.map(str::to_owned);
    let spec = CreateSpec { size: 40 << 20, subformat, ..CreateSpec::default() };
    formats::create(format, &*host, path, &spec).unwrap();
    let image = formats::open(&host, path, &OpenOptions::new(Access::Write)).unwrap();
    for at in [0, 5 << 20, 39 << 20] {
        image.disk.write_at(at, &[7; 5000]).unwrap();
    }
    image.disk.flush().unwrap();
    match format.name() {
        // Closing makes a hole of the log.
        "vhdx" => std::mem::forget(image),
        _ => image.close().unwrap(),
    }
    host
}

fn list(host: &Arc<dyn Host>, name: &str, limit: usize) -> Listing {
    structures(host, Path::new(name), &OpenOptions::default(), limit).unwrap()
}

fn named<'a>(list: &'a Listing, name: &str) -> &'a Structure {
    let found = list.structures.iter().find(|structure| structure.name == name);
    found.unwrap_or_else(|| panic!("no {name} in {:#?}", list.structures))
}

fn number(structure: &Structure, field: &str) -> u64 {
    let found = structure.fields.iter().find(|(name, _)| name == field);
    found.and_then(|(_, value)| value.as_u64()).unwrap_or_else(|| panic!("{field}: {structure:?}"))
}

/// Changes a byte of the file.
fn flip(host: &Arc<dyn Host>, name: &str, at: u64) {
    let file = host.open(Path::new(name), Access::Write).unwrap();
    let mut byte = [0];
    file.read_at(at, &mut byte).unwrap();
    file.write_at(at, &[byte[0] ^ 0x20]).unwrap();
}

#[test]
fn a_vhd_with_either_footer_broken_still_tells_all_the_rest() {
    let host = image("/d.vhd", None);
    let whole = list(&host, "/d.vhd", LIMIT);
    let names: Vec<_> = whole.structures.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["footer copy", "dynamic header", "BAT", "footer"]);
    assert!(whole.structures.iter().all(|s| s.found && s.checksum != Checksum::Wrong));
    assert_eq!(number(named(&whole, "footer"), "current_size"), 40 << 20);
    assert_eq!(number(named(&whole, "BAT"), "stored_blocks"), 3);
    for (broken, other) in [("footer", "footer copy"), ("footer copy", "footer")] {
        let at = named(&whole, broken).offset;
        // A byte of the size, then one of the cookie.
        for (byte, found) in [(50, true), (3, false)] {
            flip(&host, "/d.vhd", at + byte);
            let list = list(&host, "/d.vhd", LIMIT);
            assert_eq!(named(&list, broken).found, found, "{broken}");
            assert_ne!(named(&list, broken).checksum, Checksum::Valid, "{broken}");
            assert_eq!(named(&list, other).checksum, Checksum::Valid, "{broken}");
            assert_eq!(number(named(&list, "BAT"), "stored_blocks"), 3, "{broken}");
            flip(&host, "/d.vhd", at + byte);
        }
    }
    flip(&host, "/d.vhd", named(&whole, "dynamic header").offset + 40);
    assert_eq!(named(&list(&host, "/d.vhd", LIMIT), "dynamic header").checksum, Checksum::Wrong);
}

#[test]
fn a_vhd_whose_footer_is_not_last_and_one_without_any() {
    let host = image("/d.vhd", None);
    let file = host.open(Path::new("/d.vhd"), Access::Write).unwrap();
    let len = file.len().unwrap();
    file.write_at(len, &[1; 3000]).unwrap();
    let moved = list(&host, "/d.vhd", LIMIT);
    let footer = named(&moved, "footer");
    assert_eq!((footer.offset, footer.checksum), (len - 512, Checksum::Valid));
    assert!(footer.problem.is_some());
    file.set_len(len - 512).unwrap();
    file.write_at(0, b"nothing ").unwrap();
    let none = list(&host, "/d.vhd", LIMIT);
    assert!(!named(&none, "footer").found && !named(&none, "footer copy").found);
    // Where they would lead is where most images have it.
    assert_eq!(named(&none, "dynamic header").checksum, Checksum::Valid);
}

#[test]
fn a_vhdx_with_a_broken_header_and_table_still_tells_all_the_rest() {
    let host = image("/d.vhdx", None);
    let whole = list(&host, "/d.vhdx", LIMIT);
    for name in ["header 1", "header 2", "region table 1", "region table 2"] {
        assert_eq!(named(&whole, name).checksum, Checksum::Valid, "{name}");
    }
    assert_eq!(number(named(&whole, "metadata item virtual disk size"), "value"), 40 << 20);
    assert_eq!(number(named(&whole, "BAT"), "fully_present"), 3);
    let entries = whole.structures.iter().filter(|s| s.name == "log entry");
    assert!(entries.clone().count() > 0);
    assert!(entries.clone().all(|s| s.checksum == Checksum::Valid));
    let entry = entries.clone().next().unwrap().offset;
    for at in [(64 << 10) + 20, (192 << 10) + 100, entry + 20, 0] {
        flip(&host, "/d.vhdx", at);
    }
    let list = list(&host, "/d.vhdx", LIMIT);
    assert!(!named(&list, "file type identifier").found);
    assert_eq!(named(&list, "header 1").checksum, Checksum::Wrong);
    assert_eq!(named(&list, "header 2").checksum, Checksum::Valid);
    assert_eq!(named(&list, "region table 1").checksum, Checksum::Wrong);
    assert_eq!(named(&list, "log entry").checksum, Checksum::Wrong);
    assert_eq!(number(named(&list, "BAT"), "fully_present"), 3);
}

#[test]
fn a_vmdk_in_parts_tells_of_each_file_and_of_those_that_are_gone() {
    let host = image("/d.vmdk", Some("twoGbMaxExtentSparse"));
    let whole = list(&host, "/d.vmdk", LIMIT);
    assert!(named(&whole, "descriptor").file.is_none());
    let header = named(&whole, "sparse header");
    assert_eq!(header.file.as_deref(), Some(Path::new("/d-s001.vmdk")));
    assert_eq!(number(header, "capacity"), (40 << 20) / 512);
    assert_eq!(number(named(&whole, "grain tables"), "entries_stored"), 3);
    assert_eq!(number(named(&whole, "redundant grain tables"), "entries_stored"), 3);
    // The directory leads nowhere.
    flip(&host, "/d-s001.vmdk", named(&whole, "grain directory").offset + 3);
    let cut = list(&host, "/d.vmdk", LIMIT);
    assert_eq!(number(named(&cut, "grain directory"), "tables_past_the_end"), 1);
    assert_eq!(number(named(&cut, "redundant grain tables"), "entries_stored"), 3);
    host.remove(Path::new("/d-s001.vmdk")).unwrap();
    assert!(!named(&list(&host, "/d.vmdk", LIMIT), "extent d-s001.vmdk").found);
}

#[test]
fn a_compressed_stream_tells_its_markers_and_ends_at_the_limit() {
    let dir = common::folder();
    let (raw, path) = (dir.path().join("d.raw"), dir.path().join("d.vmdk"));
    let mut bytes = vec![0; 40 << 20];
    for grain in [0, 1, 2, 600] {
        bytes[grain * 65536 + 100] = 9;
    }
    std::fs::write(&raw, bytes).unwrap();
    let run = Command::new(env!("CARGO_BIN_EXE_flatdisk"))
        .args(["convert", "-q", "-O", "vmdk", "--subformat", "streamOptimized"])
        .args([&raw, &path])
        .status()
        .unwrap();
    assert!(run.success());
    let host = HostFs::shared();
    let list = |limit| structures(&host, &path, &OpenOptions::default(), limit).unwrap();
    let whole = list(LIMIT);
    let count = |name| whole.structures.iter().filter(|s| s.name == name).count();
    assert_eq!(count("grain marker"), 4);
    assert_eq!(count("grain table marker"), 2);
    assert_eq!(count("grain directory marker"), 1);
    assert_eq!(count("footer marker"), 1);
    assert_eq!(count("end-of-stream marker"), 1);
    assert_eq!(number(named(&whole, "grain tables"), "entries_stored"), 4);
    assert!(!whole.truncated);
    for limit in 1..whole.structures.len() {
        let part = list(limit);
        assert_eq!((part.structures.len(), part.truncated), (limit, true));
    }
    // Cut off: no footer, and still every grain that is left.
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1536).unwrap();
    let cut = list(LIMIT);
    assert!(!named(&cut, "footer").found);
    assert_eq!(cut.structures.iter().filter(|s| s.name == "grain marker").count(), 4);
}

#[test]
fn the_command_lists_what_info_refuses() {
    let dir = common::folder();
    let path = dir.path().join("d.vhdx");
    let spec = CreateSpec { size: 8 << 20, ..CreateSpec::default() };
    formats::create(&formats::vhdx::Vhdx, &HostFs, &path, &spec).unwrap();
    let host = HostFs::shared();
    for at in [64 << 10, 128 << 10] {
        flip(&host, path.to_str().unwrap(), at);
    }
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_flatdisk"))
            .arg("info")
            .args(arguments)
            .arg(&path)
            .output()
            .unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    assert!(!run(&[]).0);
    let (done, text) = run(&["--structures"]);
    assert!(done && text.contains("header 1, 4096 bytes, not there"), "{text}");
    let (done, text) = run(&["--structures", "--json", "--limit", "5"]);
    let answer: serde_json::Value = serde_json::from_str(&text).unwrap();
    let image = &answer["images"][0];
    assert!(done);
    assert_eq!((&image["format"], &image["truncated"]), (&"vhdx".into(), &true.into()));
    assert_eq!(image["structures"][3]["checksum"], "valid");
    assert_eq!(image["structures"][3]["fields"]["signature"], "regi");
    assert_eq!(image["structures"].as_array().unwrap().len(), 5);
}

#[test]
fn images_of_other_programs_and_damaged_copies_of_them_are_listed() {
    let Some(folder) = common::corpus::folder() else { return };
    let seed = common::seed();
    let rows = common::corpus::rows(&folder);
    common::in_parallel(&rows, |row| {
        let unpacked = common::corpus::unpack(&folder, row);
        let host = HostFs::shared();
        let list = || structures(&host, &unpacked.image, &OpenOptions::default(), LIMIT);
        let whole = list();
        if row.expected == "opens" {
            let whole = whole.unwrap();
            assert!(whole.structures.iter().any(|s| s.found), "{}", row.id);
            let right = |s: &&Structure| s.checksum == Checksum::Valid;
            let sealed = whole.structures.iter().filter(right).count();
            assert!(sealed > 0 || whole.format == "vmdk", "{}: {whole:#?}", row.id);
        }
        let mut random = fastrand::Rng::with_seed(seed);
        let Ok(file) = host.open(&unpacked.image, Access::Write) else { return };
        for _ in 0..20 {
            let len = file.len().unwrap();
            let span = if random.bool() { 2048.min(len) } else { len.min(4 << 20) };
            if span < 8 {
                break;
            }
            let at = random.u64(..span - 7);
            file.write_at(at, &random.u64(..).to_le_bytes()).unwrap();
            if random.u8(..) < 20 {
                file.set_len(random.u64(len / 2..=len)).unwrap();
            }
            // Whatever it is: no panic, and an answer in bounded time.
            if let Ok(list) = list() {
                assert!(list.structures.len() <= LIMIT);
            }
        }
    });
}
