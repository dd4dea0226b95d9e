//! VHDs in several files, as Virtual PC makes them: `x.vhd`, `x.v01`, `x.v02`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use flatdisk::{ErrorKind, OpenOptions};
use live::{Mount, flatdisk, names, outcome, scratch, sha256, succeed};

const MIB: u64 = 1 << 20;

/// A raw disk of 16 MiB and the VHD of it, cut into parts of these lengths and one with what is left.
fn split(dir: &Path, kind: &str, lens: &[u64]) -> (PathBuf, PathBuf) {
    let raw = dir.join("raw");
    let file = File::create(&raw).unwrap();
    file.set_len(16 * MIB).unwrap();
    for at in (0..14 * MIB).step_by(1 << 19) {
        file.write_all_at(format!("here is {at}").as_bytes(), at).unwrap();
    }
    let whole = dir.join("whole.vhd");
    let from = ["convert", "-q", "--from", "raw", "--subformat", kind];
    succeed(flatdisk().args(from).args([&raw, &whole]));
    let bytes = fs::read(&whole).unwrap();
    fs::remove_file(&whole).unwrap();
    let mut rest = &bytes[..];
    for (number, len) in lens.iter().map(|len| *len as usize).chain([usize::MAX]).enumerate() {
        let (part, behind) = rest.split_at(len.min(rest.len()));
        fs::write(part_of(dir, number), part).unwrap();
        rest = behind;
    }
    (raw, dir.join("x.vhd"))
}

fn part_of(dir: &Path, number: usize) -> PathBuf {
    dir.join(if number == 0 { "x.vhd".to_owned() } else { format!("x.v{number:02}") })
}

fn same(raw: &Path, image: &Path) {
    let hash = succeed(flatdisk().arg("hash").arg(image));
    assert!(hash.starts_with(&sha256(raw)), "{hash}");
}

#[test]
fn all_parts_are_read_and_checked_as_one() {
    for kind in ["dynamic", "fixed"] {
        let dir = scratch();
        let (raw, image) = split(dir.path(), kind, &[4 * MIB + 512, 5 * MIB, 512]);
        same(&raw, &image);
        succeed(flatdisk().arg("check").arg(&image));
        let told = succeed(flatdisk().args(["info", "--json"]).arg(&image));
        assert!(told.contains(kind), "{told}");
    }
}

#[test]
fn what_is_written_goes_to_the_part_it_belongs_to() {
    let dir = scratch();
    let (raw, image) = split(dir.path(), "dynamic", &[9 * MIB]);
    let first = fs::metadata(&image).unwrap().len();
    let expected = File::options().write(true).open(&raw).unwrap();
    let open = OpenOptions::default().write(true).open(&image).unwrap();
    for (at, text) in [(0, "start"), (8 * MIB - 2, "across"), (15 * MIB, "new block")] {
        open.disk.write_at(at, text.as_bytes()).unwrap();
        expected.write_all_at(text.as_bytes(), at).unwrap();
    }
    open.close().unwrap();
    same(&raw, &image);
    succeed(flatdisk().arg("check").arg(&image));
    assert_eq!(fs::metadata(&image).unwrap().len(), first);
    // The first one limits the last: here it has no room for another block.
    let (_, image) = split(dir.path(), "dynamic", &[MIB, MIB, MIB, MIB, MIB, MIB, MIB, MIB]);
    let open = OpenOptions::default().write(true).open(&image).unwrap();
    let full = (14..16)
        .map(|mib| open.disk.write_at(mib * MIB, &[1; 512]).and_then(|()| open.disk.flush()));
    let full: Vec<_> = full.filter_map(Result::err).map(|e| e.kind()).collect();
    assert!(full.iter().all(|kind| *kind == ErrorKind::NoSpace), "{full:?}");
}

#[test]
fn a_part_that_is_missing_is_named() {
    let dir = scratch();
    let (_, image) = split(dir.path(), "fixed", &[4 * MIB, 4 * MIB, 4 * MIB]);
    let refused = |words: &[&str]| {
        let output = outcome(flatdisk().arg("hash").arg(&image));
        assert!(!output.status.success());
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(words.iter().all(|word| told.contains(word)), "{told}");
    };
    fs::rename(part_of(dir.path(), 2), dir.path().join("away")).unwrap();
    refused(&["x.v02 is missing", "x.v03 is there"]);
    fs::rename(dir.path().join("away"), part_of(dir.path(), 2)).unwrap();
    fs::rename(part_of(dir.path(), 3), dir.path().join("away")).unwrap();
    refused(&["the one before x.v03 has no footer"]);
}

#[test]
fn one_part_alone_is_never_reworked() {
    let dir = scratch();
    let (raw, image) = split(dir.path(), "dynamic", &[4 * MIB]);
    for command in [&["resize"][..], &["compact"], &["check", "--repair"], &["meta", "--new-id"]] {
        let mut run = flatdisk();
        run.args(command).arg(&image);
        if command == ["resize"] {
            run.arg("32M");
        }
        // Of a sound image there is nothing to repair.
        let sound = command == ["check", "--repair"];
        assert_eq!(outcome(&mut run).status.success(), sound, "{command:?}");
        same(&raw, &image);
    }
    let new = dir.path().join("y.vhd");
    succeed(flatdisk().arg("rename").args([&image, &new]));
    same(&raw, &new);
    assert!(dir.path().join("y.v01").exists() && !dir.path().join("x.v01").exists());
    succeed(flatdisk().arg("delete").arg(&new));
    assert_eq!(names(dir.path()), ["raw"]);
}

#[test]
fn a_mount_shows_the_whole_and_no_part() {
    if !live::can_mount() {
        return;
    }
    let dir = scratch();
    let (raw, _) = split(dir.path(), "fixed", &[4 * MIB, 4 * MIB]);
    let mount = Mount::new(dir.path(), &[]);
    assert_eq!(names(mount.path()), ["x.vhd.img"]);
    assert_eq!(sha256(&mount.flat("x.vhd")), sha256(&raw));
    let flat = File::options().write(true).open(mount.flat("x.vhd")).unwrap();
    flat.write_all_at(b"written", 9 * MIB).unwrap();
    drop(flat);
    assert!(mount.unmount().success());
    let mut bytes = [0; 7];
    File::open(part_of(dir.path(), 2)).unwrap().read_exact_at(&mut bytes, MIB).unwrap();
    assert_eq!(&bytes, b"written");
}

#[test]
fn a_vhd_set_names_its_disk() {
    let dir = scratch();
    let set = dir.path().join("shared.vhds");
    fs::write(&set, [0; 4096]).unwrap();
    fs::write(dir.path().join("shared_1A2B.avhdx"), "").unwrap();
    fs::write(dir.path().join("other_1A2B.avhdx"), "").unwrap();
    let output = outcome(Command::new(env!("CARGO_BIN_EXE_flatdisk")).arg("info").arg(&set));
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.contains("VHD Set") && told.contains("its disk is shared_1A2B.avhdx"), "{told}");
}
