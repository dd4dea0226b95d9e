//! The same disks through QEMU's tools, in both directions.

use std::path::PathBuf;
use std::process::Command;

use super::corpus::tools_required;
use super::*;
use crate::error::ErrorKind;
use crate::storage::file::HostFs;

const MIB: u64 = 1 << 20;

/// Whether QEMU's tools are here.
fn available() -> bool {
    let found = ["qemu-img", "qemu-io"]
        .iter()
        .all(|tool| Command::new(tool).arg("--version").output().is_ok_and(|o| o.status.success()));
    assert!(found || !tools_required(), "qemu-img or qemu-io is missing");
    if !found {
        println!("SKIPPED: qemu-img or qemu-io is missing");
    }
    found
}

/// Runs a tool, which must succeed.
fn run(tool: &str, args: &[&str]) -> String {
    let output = Command::new(tool).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} {args:?}: {text}{errors}");
    text
}

/// Opens an image. A program that another test is just starting holds this one's files for a moment,
/// and with them their locks.
fn open(path: &Path, access: Access) -> Image {
    let attempt = |_| match formats::open(&HostFs::shared(), path, &OpenOptions::new(access)) {
        Err(e) if e.kind() == ErrorKind::Busy => {
            std::thread::sleep(std::time::Duration::from_millis(50));
            None
        }
        opened => Some(opened.unwrap()),
    };
    (0..100).find_map(attempt).expect("the image is unlocked after a moment")
}

/// What both sides write: `(offset, length, byte)`.
const WRITES: [(u64, u64, u8); 6] = [
    (0, 512, 0x11),
    (100 << 10, 300 << 10, 0x22),
    (MIB - 512, 1024, 0x33),
    (7 * MIB, 65_536, 0x44),
    (33 * MIB + 512, 1536, 0x55),
    (40 * MIB - 4096, 4096, 0x66),
];
const SIZE: u64 = 40 * MIB;

fn expected() -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    for (at, len, byte) in WRITES {
        bytes[at as usize..(at + len) as usize].fill(byte);
    }
    bytes
}

/// QEMU's view of the whole disk.
fn read_by_qemu(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("raw");
    run("qemu-img", &["convert", "-f", "vmdk", "-O", "raw", text(path), text(&raw)]);
    std::fs::read(&raw).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn write_by_qemu(path: &Path) {
    let mut args: Vec<String> = vec!["-f".into(), "vmdk".into()];
    for (at, len, byte) in WRITES {
        args.extend(["-c".into(), format!("write -P {byte} {at} {len}")]);
    }
    args.push(text(path).to_owned());
    run("qemu-io", &args.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn qemu_reads_what_we_write_into_what_we_create() {
    if !available() {
        return;
    }
    for subformat in writable_subformats() {
        for adapter in ["ide", "buslogic", "lsilogic", "legacyESX"] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("d.vmdk");
            let spec = CreateSpec { adapter: Some(adapter.into()), ..spec(subformat, SIZE) };
            formats::create(&Vmdk, &HostFs, &path, &spec).unwrap();
            let image = open(&path, Access::Write);
            for (at, len, byte) in WRITES {
                image.disk.write_at(at, &vec![byte; len as usize]).unwrap();
            }
            image.disk.close().unwrap();
            drop(image);
            assert!(read_by_qemu(&path) == expected(), "{subformat}");
            if subformat.contains("Sparse") && subformat != "vmfsSparse" {
                run("qemu-img", &["check", "-f", "vmdk", text(&path)]);
            }
        }
    }
}

#[test]
fn we_read_and_continue_what_qemu_writes() {
    if !available() {
        return;
    }
    let subformats =
        ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"];
    let options = [
        "adapter_type=ide",
        "adapter_type=lsilogic",
        "adapter_type=buslogic",
        "adapter_type=legacyESX",
        "compat6=on",
        "hwversion=13",
        "zeroed_grain=on",
    ];
    for subformat in subformats {
        for option in options {
            let sparse = subformat.contains("Sparse");
            if option == "zeroed_grain=on" && !sparse {
                continue;
            }
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("d.vmdk");
            let all = format!("subformat={subformat},{option}");
            let size = SIZE.to_string();
            run("qemu-img", &["create", "-q", "-f", "vmdk", "-o", &all, text(&path), &size]);
            write_by_qemu(&path);
            let mut model = expected();
            let image = open(&path, Access::Write);
            assert!(contents(&image.disk) == model, "{all}");

            // Continue: overwrite, allocate, free, and let QEMU read, check and continue that.
            image.disk.write_at(200_000, &[0x77; 100_000]).unwrap();
            image.disk.write_at(20 * MIB + 5, &[0x78; 100]).unwrap();
            image.disk.discard(7 * MIB, 65_536).unwrap();
            image.disk.close().unwrap();
            drop(image);
            model[200_000..300_000].fill(0x77);
            model[20 * MIB as usize + 5..][..100].fill(0x78);
            model[7 * MIB as usize..][..65_536].fill(0);
            assert!(read_by_qemu(&path) == model, "{all}");
            if sparse {
                run("qemu-img", &["check", "-f", "vmdk", text(&path)]);
            }
            write_by_qemu(&path);
            for (at, len, byte) in WRITES {
                model[at as usize..(at + len) as usize].fill(byte);
            }
            assert!(contents(&open(&path, Access::Read).disk) == model, "{all}");
            let report =
                formats::check(&HostFs::shared(), &path, &OpenOptions::new(Access::Read)).unwrap();
            assert_eq!(report.errors, 0, "{:?}", report.findings);
        }
    }
}

#[test]
fn grains_that_qemu_marks_zeroed_read_as_zeroes() {
    if !available() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.vmdk");
    run("qemu-img", &["create", "-q", "-f", "vmdk", "-o", "zeroed_grain=on", text(&path), "40M"]);
    write_by_qemu(&path);
    run("qemu-io", &["-f", "vmdk", "-c", "write -z 7M 64k", text(&path)]);
    let mut model = expected();
    model[7 * MIB as usize..][..65_536].fill(0);
    let image = open(&path, Access::Write);
    assert!(contents(&image.disk) == model);
    // Writing into a zeroed grain fills the rest with zeroes.
    image.disk.write_at(7 * MIB + 1000, &[9; 5]).unwrap();
    image.disk.close().unwrap();
    drop(image);
    model[7 * MIB as usize + 1000..][..5].fill(9);
    assert!(read_by_qemu(&path) == model);
}

#[test]
fn our_layout_is_byte_for_byte_that_of_qemu() {
    if !available() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (dir.path().join("a.vmdk"), dir.path().join("b.vmdk"));
    for size in [512, 10 * MIB, 100 * MIB, 5 << 30, 300 << 30] {
        for path in [&ours, &theirs] {
            let _ = std::fs::remove_file(path);
        }
        formats::create(&Vmdk, &HostFs, &ours, &spec("monolithicSparse", size)).unwrap();
        run("qemu-img", &["create", "-q", "-f", "vmdk", text(&theirs), &size.to_string()]);
        let without_text = |path: &PathBuf| {
            let mut bytes = std::fs::read(path).unwrap();
            bytes[512..21 * 512].fill(0);
            bytes
        };
        assert!(without_text(&ours) == without_text(&theirs), "{size}");
    }
}

#[test]
fn our_children_are_those_of_qemu() {
    if !available() {
        return;
    }
    // QEMU cannot check ESX extents, and writes over the header of those that lack a grain table.
    for (subformat, hosted) in [
        ("monolithicSparse", true),
        ("monolithicFlat", true),
        ("twoGbMaxExtentSparse", true),
        ("vmfs", false),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (base, path) = (dir.path().join("base.vmdk"), dir.path().join("d.vmdk"));
        formats::create(&Vmdk, &HostFs, &base, &spec(subformat, SIZE)).unwrap();
        write_by_qemu(&base);
        super::super::create_child(
            &HostFs,
            &path,
            &open(&base, Access::Read),
            &crate::formats::CreateSpec::default(),
        )
        .unwrap();
        let mut model = expected();
        assert!(read_by_qemu(&path) == model, "{subformat}");

        let image = open(&path, Access::Write);
        image.disk.write_at(200_000, &[0x77; 100_000]).unwrap();
        image.disk.discard(7 * MIB, 65_536).unwrap();
        image.disk.close().unwrap();
        drop(image);
        model[200_000..300_000].fill(0x77);
        model[7 * MIB as usize..][..65_536].fill(0);
        assert!(read_by_qemu(&path) == model, "{subformat}");
        if !hosted {
            continue;
        }
        run("qemu-img", &["check", "-f", "vmdk", text(&path)]);
        run("qemu-io", &["-f", "vmdk", "-c", "write -P 0x78 35M 70000", text(&path)]);
        model[35 * MIB as usize..][..70_000].fill(0x78);
        assert!(contents(&open(&path, Access::Read).disk) == model, "{subformat}");
        let report =
            formats::check(&HostFs::shared(), &path, &OpenOptions::new(Access::Read)).unwrap();
        assert_eq!(report.errors, 0, "{:?}", report.findings);
    }
}

#[test]
fn children_that_qemu_makes_are_read_and_written() {
    if !available() {
        return;
    }
    for options in ["subformat=monolithicSparse", "subformat=monolithicSparse,zeroed_grain=on"] {
        let dir = tempfile::tempdir().unwrap();
        let (base, path) = (dir.path().join("base.vmdk"), dir.path().join("d.vmdk"));
        formats::create(&Vmdk, &HostFs, &base, &spec("monolithicFlat", SIZE)).unwrap();
        write_by_qemu(&base);
        let args = ["create", "-q", "-f", "vmdk", "-o", options, "-F", "vmdk"];
        run("qemu-img", &[&args[..], &["-b", text(&base), text(&path)]].concat());
        // QEMU writes the parent's name as it was given; a descriptor's own folder is the way to it.
        let image = open(&path, Access::Write);
        let mut model = expected();
        assert!(contents(&image.disk) == model, "{options}");
        image.disk.write_at(50_000, &[0x79; 100]).unwrap();
        image.disk.discard(7 * MIB - 100, 70_000).unwrap();
        image.disk.close().unwrap();
        drop(image);
        model[50_000..50_100].fill(0x79);
        model[7 * MIB as usize - 100..][..70_000].fill(0);
        assert!(read_by_qemu(&path) == model, "{options}");
        run("qemu-img", &["check", "-f", "vmdk", text(&path)]);
    }
}

#[test]
fn streams_that_qemu_makes_are_read() {
    if !available() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (raw, path) = (dir.path().join("raw"), dir.path().join("d.vmdk"));
    let mut model = expected();
    fastrand::Rng::with_seed(3).fill(&mut model[20 * MIB as usize..21 * MIB as usize]);
    model.extend([0x21; 1536]);
    std::fs::write(&raw, &model).unwrap();
    let options = ["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized"];
    run("qemu-img", &[&options[..], &[text(&raw), text(&path)]].concat());
    let image = open(&path, Access::Read);
    assert!(contents(&image.disk) == model);
    let report = formats::check(&HostFs::shared(), &path, &OpenOptions::new(Access::Read)).unwrap();
    assert_eq!(report.errors, 0, "{:?}", report.findings);
}
