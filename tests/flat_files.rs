//! Flat files of a live mount, as people use them first.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use live::kinds::KINDS;
use live::{Mount, can_mount, create, flatdisk, have, outcome, run, scratch, sha256, succeed};
use serde_json::Value;

fn json(arguments: &[&str], path: &Path) -> Value {
    let printed = succeed(flatdisk().args(arguments).arg("--json").arg(path));
    serde_json::from_str(&printed).unwrap()
}

#[test]
fn a_flat_file_stands_for_its_image() {
    if !can_mount() {
        return;
    }
    let (images, elsewhere) = (scratch(), scratch());
    let folder = images.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    let (base, child) = (folder.join("base.vhdx"), folder.join("child.avhdx"));
    create(&base, "8M", &[]);
    let mount = Mount::new(images.path(), &[]);
    let flat = |name: &str| mount.path().join(format!("folder/{name}.img"));
    let of = |path: &Path| path.to_str().unwrap().to_owned();
    let made = succeed(
        flatdisk().args(["create", "--json", "--parent"]).arg(flat("base.vhdx")).arg(&child),
    );
    assert_eq!(serde_json::from_str::<Value>(&made).unwrap()["parent"], of(&base));
    assert_eq!(json(&["info"], &flat("base.vhdx"))["images"][0]["filename"], of(&base));
    assert_eq!(json(&["check"], &flat("child.avhdx")), json(&["check"], &child));
    let link = elsewhere.path().join("link");
    std::os::unix::fs::symlink(flat("child.avhdx"), &link).unwrap();
    assert_eq!(json(&["map"], &link), json(&["map"], &child));
    let since = flat("base.vhdx");
    assert_eq!(json(&["map", "--since", since.to_str().unwrap()], &child), Value::Array(vec![]));
    // What only looks like a flat file is no image.
    std::fs::write(images.path().join("text.vhdx"), "text").unwrap();
    let text = outcome(flatdisk().arg("info").arg(mount.path().join("text.vhdx.error.txt")));
    assert_eq!(text.status.code(), Some(1));
    assert!(mount.unmount().success());
}

const SIZE: usize = 4 << 20;

/// A raw disk with holes at its beginning, in its middle and at its end.
fn sparse_raw(path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(SIZE as u64).unwrap();
    for (at, byte) in [(1 << 20, 1), (2 << 20, 2), ((3 << 20) - 5000, 3)] {
        file.write_all_at(&[byte; 5000], at).unwrap();
    }
}

/// Programs that write a raw disk onto a flat file, `$1` and `$2`, as they are used on any other file.
const RESTORING: [&str; 6] = [
    "cp $1 $2",
    "cp --sparse=always $1 $2",
    "cat $1 >$2",
    "dd if=$1 of=$2 bs=64k status=none",
    "qemu-img convert -f raw -O raw $1 $2",
    "qemu-img convert -n -f raw -O raw $1 $2",
];

#[test]
fn raw_disks_are_written_onto_flat_files_by_the_usual_programs() {
    if !can_mount() || !have(&["qemu-img"]) {
        return;
    }
    let (images, raws) = (scratch(), scratch());
    let raw = raws.path().join("raw");
    sparse_raw(&raw);
    let want = sha256(&raw);
    let old = vec![0xaa; SIZE];
    for kind in KINDS {
        kind.make(images.path(), "4M", &old);
    }
    let mount = Mount::new(images.path(), &[]);
    for kind in KINDS {
        let flat = mount.flat(kind.image);
        for command in RESTORING {
            fs::write(&flat, &old).unwrap();
            // Whoever has the file open meanwhile must not keep what was there before.
            let reader = File::open(&flat).unwrap();
            reader.read_exact_at(&mut vec![0; SIZE], 0).unwrap();
            let lent = kind.image == "flat.vmdk";
            let reader = (!lent).then_some(reader);
            run("sh", &[&"-c", &command, &"sh", &raw, &flat]);
            assert_eq!(sha256(&flat), want, "{command} onto {}", kind.image);
            if let Some(reader) = reader {
                let mut read = vec![0; SIZE];
                live::wait_until("the reader sees what was written", || {
                    reader.read_exact_at(&mut read, 0).unwrap();
                    read == fs::read(&raw).unwrap()
                });
            }
        }
        // A stray redirection changes nothing, a boot sector only itself.
        run("sh", &[&"-c", &"> $1", &"sh", &flat]);
        assert_eq!(sha256(&flat), want);
        run("sh", &[&"-c", &"printf boot | dd of=$1 status=none", &"sh", &flat]);
        let bytes = fs::read(&flat).unwrap();
        assert_eq!(&bytes[..4], b"boot");
        assert!(bytes[4..] == fs::read(&raw).unwrap()[4..]);
        let cut = outcome(std::process::Command::new("truncate").arg("-s0").arg(&flat));
        assert!(!cut.status.success());
    }
    assert!(mount.unmount().success());
    for kind in KINDS {
        let checked = json(&["check"], &images.path().join(kind.image));
        assert_eq!(checked["errors"], 0, "{}: {checked}", kind.image);
    }
}

#[test]
fn a_mounted_image_changes_its_size_while_nobody_has_it_open() {
    if !can_mount() {
        return;
    }
    const MIB: u64 = 1 << 20;
    let images = scratch();
    for name in ["a.vhd", "a.vhdx", "a.vmdk"] {
        create(&images.path().join(name), "24M", &[]);
    }
    let mount = Mount::new(images.path(), &[]);
    for name in ["a.vhd", "a.vhdx", "a.vmdk"] {
        let (flat, image) = (mount.flat(name), images.path().join(name));
        let len = |path: &Path| fs::metadata(path).unwrap().len();
        // The first half becomes zeroes, which stay stored.
        let mut bytes = vec![7; 16 * MIB as usize];
        fs::write(&flat, &bytes).unwrap();
        bytes[..8 * MIB as usize].fill(0);
        let file = File::options().write(true).open(&flat).unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        bytes.resize(24 * MIB as usize, 0);
        // It is in use: whoever has it is named, and nothing happens.
        let before = fs::read(&image).unwrap();
        for arguments in [&["compact"][..], &["resize", "30M"]] {
            let refused = outcome(flatdisk().arg(arguments[0]).arg(&flat).args(&arguments[1..]));
            let said = String::from_utf8_lossy(&refused.stderr).into_owned();
            assert_eq!(refused.status.code(), Some(1), "{name}: {said}");
            let who = format!("process {} (flatdisk at {})", mount.pid(), mount.path().display());
            assert!(said.contains("in use") && said.contains(&who), "{name}: {said}");
        }
        assert!(fs::read(&image).unwrap() == before, "{name}");
        file.sync_all().unwrap();
        drop(file);
        // The kernel tells the daemon of the end of a file's use in its own time.
        live::wait_until("nobody has the image open", || {
            mount.open_files(images.path()).is_empty()
        });
        let stored = len(&image);
        succeed(flatdisk().arg("compact").arg(&flat));
        assert!(len(&image) < stored - 4 * MIB, "{name}: {stored} → {}", len(&image));
        assert!(fs::read(&flat).unwrap() == bytes, "{name}");
        live::wait_until("nobody has the image open", || {
            mount.open_files(images.path()).is_empty()
        });
        let answer = succeed(flatdisk().args(["resize", "--json"]).arg(&flat).arg("40M"));
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(answer["filename"], image.to_str().unwrap(), "{answer}");
        live::wait_until("the mount shows the new size", || len(&flat) == 40 * MIB);
        bytes.resize(40 * MIB as usize, 0);
        assert!(fs::read(&flat).unwrap() == bytes, "{name}");
        let file = File::options().write(true).open(&flat).unwrap();
        file.write_all_at(&[9; 512], 40 * MIB - 512).unwrap();
        file.sync_all().unwrap();
        bytes[40 * MIB as usize - 512..].fill(9);
        assert!(fs::read(&flat).unwrap() == bytes, "{name}");
    }
    assert!(mount.unmount().success());
    for name in ["a.vhd", "a.vhdx", "a.vmdk"] {
        succeed(flatdisk().arg("check").arg(images.path().join(name)));
    }
}
