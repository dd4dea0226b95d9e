//! Snapshots, trees and deleting as commands, beside mounts that show the images.

// The helpers here serve tests only.
#![allow(clippy::unwrap_used)]

mod live;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use live::{Mount, can_mount, flatdisk, have, mounting, outcome, succeed, wait_until};

fn run(dir: &Path, arguments: &[&str]) -> String {
    succeed(flatdisk().current_dir(dir).args(arguments))
}

/// What a command that fails says, in one line.
fn refused(dir: &Path, arguments: &[&str]) -> String {
    let output = outcome(flatdisk().current_dir(dir).args(arguments));
    assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    said
}

fn write(dir: &Path, image: &str, text: &str) {
    let input = dir.join("input");
    fs::write(&input, text).unwrap();
    let mut command = flatdisk();
    command
        .current_dir(dir)
        .args(["write", "--offset", "0", image])
        .stdin(File::open(&input).unwrap());
    assert!(command.arg("-q").status().unwrap().success());
    fs::remove_file(input).unwrap();
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

#[test]
fn a_snapshot_of_a_huge_disk_takes_no_time_and_the_child_is_the_same_to_its_users() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path();
    for (name, size) in [("a.vhdx", "64T"), ("b.vhd", "2040G"), ("c.vmdk", "60T")] {
        run(dir, &["create", "-q", name, size]);
        let path = dir.join(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(4711), Some(4712)).unwrap();
        }
        let before = fs::metadata(&path).unwrap();
        // Other tests run beside: the fastest of some counts.
        let times = (0..5).map(|_| {
            let began = Instant::now();
            run(
                dir,
                &["snapshot", "-q", name, &format!("n{}", fs::read_dir(dir).unwrap().count())],
            );
            began.elapsed()
        });
        let fastest = times.min().unwrap();
        println!("{name}: {fastest:?}");
        assert!(fastest < Duration::from_millis(500), "{name}: {fastest:?}");
        let after = fs::metadata(&path).unwrap();
        assert_ne!(before.ino(), after.ino());
        assert_eq!(
            (before.uid(), before.gid(), before.mode()),
            (after.uid(), after.gid(), after.mode())
        );
    }
}

#[test]
fn what_a_list_shows_is_what_revert_goes_back_to() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path();
    for format in ["vhd", "vhdx", "vmdk"] {
        let name = format!("disk.{format}");
        run(dir, &["create", "-q", &name, "8M"]);
        std::os::unix::fs::symlink(&name, dir.join("link")).unwrap();
        run(dir, &["snapshot", "-q", "link", "one"]);
        assert!(dir.join("link").is_symlink() && dir.join(format!("disk-one.{format}")).is_file());
        write(dir, &name, "second");
        let taken = json(&run(dir, &["snapshot", "--json", &name]));
        assert!(taken["frozen"].as_str().unwrap().starts_with("disk-2"), "{taken}");
        write(dir, &name, "third");
        let text = run(dir, &["snapshot", &name, "--list"]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(lines[0].starts_with(&format!("disk-one.{format}")), "{text}");
        assert!(lines[2].contains(&name) && lines[2].ends_with("<- current"), "{text}");
        let list = json(&run(dir, &["snapshot", &name, "--list", "--json"]));
        assert_eq!(list["images"].as_array().unwrap().len(), 3);
        run(dir, &["snapshot", "-q", &name, "--revert", "one"]);
        let head = |name: &str| run(dir, &["cat", "--length", "6", name]);
        assert_eq!(head(&name), "\0".repeat(6));
        let frozen = format!("disk{}", &taken["frozen"].as_str().unwrap()[4..]);
        run(dir, &["snapshot", "-q", &name, "--revert", &frozen]);
        assert_eq!(head(&name), "second");
        // The rest as people do it: one image again.
        run(dir, &["commit", "-q", "--to", &format!("disk-one.{format}"), &name]);
        run(dir, &["rename", "-q", &format!("disk-one.{format}"), &name]);
        assert_eq!(head(&name), "second");
        run(dir, &["delete", "-q", &name]);
        fs::remove_file(dir.join("link")).unwrap();
        assert_eq!(fs::read_dir(dir).unwrap().count(), 0);
    }
}

#[test]
fn an_image_in_a_live_mount_is_frozen_unless_somebody_writes_to_it() {
    if !can_mount() {
        return;
    }
    let _turn = mounting();
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path();
    for (name, frozen) in
        [("a.vhdx", "a-one.vhdx"), ("b.vhd", "b-one.vhd"), ("c.vmdk", "c-one.vmdk")]
    {
        run(dir, &["create", "-q", name, "8M"]);
        write(dir, name, "before");
        let mount = Mount::new(dir, &[]);
        let flat = mount.flat(name);
        let read = |mut file: &File| {
            use std::io::{Read, Seek, SeekFrom};
            let mut text = [0; 6];
            file.seek(SeekFrom::Start(0)).unwrap();
            file.read_exact(&mut text).unwrap();
            String::from_utf8(text.to_vec()).unwrap()
        };
        let mut writer = File::options().write(true).open(&flat).unwrap();
        let said = refused(dir, &["snapshot", name, "one"]);
        let daemon = format!("process {} (flatdisk at ", mount.pid());
        assert!(said.contains("in use") && said.contains(&daemon), "{said}");
        assert!(!dir.join(frozen).exists());
        for command in
            [&["delete", name][..], &["rename", name, "z.vhdx"], &["meta", "--new-id", name]]
        {
            assert!(refused(dir, command).contains("in use"), "{command:?}");
        }
        writer.write_all(b"during").unwrap();
        drop(writer);
        let reader = File::open(&flat).unwrap();
        assert_eq!(read(&reader), "during");
        // The flat file stands for its image.
        wait_until("the writer has let go of the image", || {
            let output = outcome(flatdisk().arg("snapshot").arg(&flat).arg("one"));
            output.status.success()
        });
        assert!(dir.join(frozen).exists());
        assert_eq!(read(&reader), "during");
        drop(reader);
        // The name goes on, and is written again, through the same mount.
        wait_until("the name stands for the child", || {
            File::options()
                .write(true)
                .open(&flat)
                .is_ok_and(|mut file| file.write_all(b"after!").is_ok())
        });
        assert_eq!(read(&File::open(&flat).unwrap()), "after!");
        assert_eq!(read(&File::open(mount.flat(frozen)).unwrap()), "during");
        assert!(
            File::options().write(true).open(mount.flat(frozen)).is_err(),
            "others stand on it"
        );
        assert!(mount.unmount().success());
        assert_eq!(run(dir, &["cat", "--length", "6", name]), "after!");
        assert_eq!(run(dir, &["cat", "--length", "6", frozen]), "during");
    }
}

#[test]
fn links_devices_and_images_of_others_are_not_removed() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path();
    run(dir, &["create", "-q", "a.vhdx", "8M"]);
    std::os::unix::fs::symlink("a.vhdx", dir.join("link.vhdx")).unwrap();
    fs::write(dir.join("text"), "no image").unwrap();
    assert!(refused(dir, &["delete", "link.vhdx"]).contains("symbolic link"));
    assert!(refused(dir, &["delete", "--force", "/dev/null"]).contains("not a regular file"));
    refused(dir, &["delete", "text"]);
    refused(dir, &["delete", "--force", "text"]);
    refused(dir, &["delete", "nothing.vhdx"]);
    fs::write(dir.join("a.vhdx.rct"), "changes").unwrap();
    let told = run(dir, &["delete", "--dry-run", "a.vhdx"]);
    assert_eq!(told.lines().count(), 2, "{told}");
    run(dir, &["rename", "-q", "a.vhdx", "b.vhdx"]);
    assert!(dir.join("b.vhdx.rct").exists() && !dir.join("a.vhdx.rct").exists());
    run(dir, &["delete", "-q", "b.vhdx"]);
    let mut left: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["link.vhdx", "text"]);
}

#[test]
fn a_tree_shows_who_stands_on_whom_and_what_is_missing() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path();
    run(dir, &["create", "-q", "lone.vhd", "8M"]);
    run(dir, &["create", "-q", "--subformat", "twoGbMaxExtentSparse", "base.vmdk", "8M"]);
    // Contents tell generations of VMDK apart.
    write(dir, "base.vmdk", "base");
    run(dir, &["create", "-q", "--parent", "base.vmdk", "one.vmdk"]);
    run(dir, &["create", "-q", "--parent", "base.vmdk", "two.vmdk"]);
    write(dir, "one.vmdk", "one");
    run(dir, &["create", "-q", "--parent", "one.vmdk", "three.vmdk"]);
    run(dir, &["create", "-q", "gone.vhdx", "8M"]);
    run(dir, &["create", "-q", "--parent", "gone.vhdx", "orphan.vhdx"]);
    fs::remove_file(dir.join("gone.vhdx")).unwrap();
    fs::write(dir.join("broken.vhdx"), "no image").unwrap();

    let text = run(dir, &["tree"]);
    let starts = [
        "base.vmdk  VMDK",
        "├─ one.vmdk",
        "│  └─ three.vmdk",
        "└─ two.vmdk",
        "lone.vhd  VHD",
        "orphan.vhdx  VHDX",
    ];
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), starts.len(), "{text}");
    for (line, start) in lines.iter().zip(starts) {
        assert!(line.starts_with(start), "{line}: {start}");
    }
    assert!(lines[5].contains("PARENT NOT FOUND") && lines[0].contains("8 MiB"), "{text}");
    assert_eq!(run(dir, &["tree", "one.vmdk"]), text);

    let tree = json(&run(dir, &["tree", "--json"]));
    let of = |name: &str| {
        let images = tree["images"].as_array().unwrap().iter();
        let mut images = images
            .filter(|i| Path::new(i["filename"].as_str().unwrap()).file_name().unwrap() == name);
        images.next().unwrap_or_else(|| panic!("{name}: {tree}")).clone()
    };
    assert_eq!(
        (of("lone.vhd")["state"].as_str(), of("orphan.vhdx")["state"].as_str()),
        (Some("alone"), Some("orphan"))
    );
    assert!(of("three.vmdk")["parent"].as_str().unwrap().ends_with("one.vmdk"));
    assert_eq!(of("base.vmdk")["virtual_size"], 8 << 20);
    let files =
        ["base.vmdk", "base-s001.vmdk"].map(|f| fs::metadata(dir.join(f)).unwrap().blocks());
    assert_eq!(of("base.vmdk")["actual_size"], files.iter().sum::<u64>() * 512);
    let sub = dir.join("sub");
    fs::create_dir(&sub).unwrap();
    assert_eq!(run(dir, &["tree", "sub"]), "");
    if have(&["qemu-img"]) {
        let chain = succeed(Command::new("qemu-img").current_dir(dir).args([
            "info",
            "--backing-chain",
            "three.vmdk",
        ]));
        let images = chain.lines().filter(|line| line.starts_with("image: "));
        assert_eq!(images.count(), 3, "{chain}");
    }
}

#[test]
fn what_is_written_to_one_image_may_vanish_or_be_kept() {
    if !can_mount() {
        return;
    }
    let _turn = mounting();
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path();
    let scratch = dir.join("scratch");
    fs::create_dir(&scratch).unwrap();
    let other = dir.join("other");
    fs::create_dir(&other).unwrap();
    run(&other, &["create", "-q", "shown.vhdx", "8M"]);
    let mount = Mount::new(&other, &[]);
    let nonpersistent = format!("--nonpersistent={}", scratch.display());
    for (name, options) in [
        ("a.vhdx", &[][..]),
        ("b.vhd", &["--subformat", "fixed"]),
        ("c.vmdk", &["--subformat", "monolithicFlat"]),
        ("d.vmdk", &["--subformat", "streamOptimized"]),
    ] {
        run(dir, &[&["create", "-q", name, "8M"], options].concat());
        let path = dir.join(name);
        let flat = mount.flat(name);
        let target = mount.path().to_str().unwrap();
        let open = || run(dir, &["open", &nonpersistent, name, target]);
        let put = |text: &str| {
            let mut file = File::options().write(true).open(&flat).unwrap();
            file.write_all(text.as_bytes()).unwrap();
        };
        let close = |options: &[&str]| {
            wait_until("the file is closed", || {
                let mut command = flatdisk();
                command.current_dir(dir).arg("close").args(options).arg(&flat);
                outcome(&mut command).status.success()
            });
        };
        let head = |image: &str| run(dir, &["cat", "--length", "6", image]);
        let empty = "\0".repeat(6);
        let bytes = fs::read(&path).unwrap();
        open();
        // Nothing to keep yet.
        assert!(
            refused(dir, &["close", "--commit", flat.to_str().unwrap()])
                .contains("nothing was written")
        );
        put("thrown");
        assert_eq!(&fs::read(&flat).unwrap()[..6], b"thrown");
        close(&[]);
        assert!(fs::read(&path).unwrap() == bytes, "{name}: not touched");
        open();
        put("childs");
        let child = format!("child-{name}");
        close(&["--commit", "--child", &child]);
        assert!(fs::read(&path).unwrap() == bytes, "{name}: not touched");
        assert_eq!((head(name), head(&child)), (empty.clone(), "childs".to_owned()));
        run(dir, &["delete", "-q", &child]);
        if name != "d.vmdk" {
            open();
            put("merged");
            close(&["--commit"]);
            assert_eq!(head(name), "merged");
        }
        run(dir, &["check", name]);
        run(dir, &["delete", "-q", name]);
        let mut left: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["other", "scratch"]);
    }
    let shown = other.join("shown.vhdx");
    let target = mount.path().to_str().unwrap();
    let said = refused(dir, &["open", &nonpersistent, shown.to_str().unwrap(), target]);
    assert!(said.contains("shown already"), "{said}");
    assert!(mount.unmount().success());
}
