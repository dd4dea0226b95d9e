//! Images that show by what is in them, whatever they are called.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use live::{Mount, create, have, names, scratch, wait_until};

/// Bytes that the daemon has read, by whatever call.
fn read_by(mount: &Mount) -> u64 {
    let io = fs::read_to_string(format!("/proc/{}/io", mount.pid())).unwrap();
    let line = io.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap();
    line.parse().unwrap()
}

/// Waits until later changes show in the times of files written now.
fn settle(dir: &Path) {
    let newer = dir.join("newer");
    let changed = fs::metadata(dir).unwrap().modified().unwrap();
    wait_until("the clock moves", || {
        fs::write(&newer, "").unwrap();
        let now = fs::metadata(&newer).unwrap().modified().unwrap();
        now.duration_since(changed).is_ok_and(|age| age.as_millis() > 100)
    });
    fs::remove_file(&newer).unwrap();
}

#[test]
fn images_show_whatever_they_are_called_and_nothing_else_does() {
    if !live::can_mount() {
        return;
    }
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    for (name, made, kind) in [
        ("disk.img", "a.vmdk", &[][..]),
        ("backup.vhd.1", "b.vhd", &["--subformat", "fixed"]),
        ("noext", "c.vhdx", &[]),
        ("old.bak", "d.vhd", &[]),
    ] {
        create(&path(made), "8M", kind);
        fs::rename(path(made), path(name)).unwrap();
    }
    fs::write(path("notes.txt"), "a VHDX begins with vhdxfile").unwrap();
    fs::write(path("empty"), "").unwrap();
    fs::File::create(path("raw.img")).unwrap().set_len(8 << 20).unwrap();
    fs::write(path("short"), [0; 100]).unwrap();
    let mount = Mount::new(dir.path(), &[]);
    let shown = ["backup.vhd.1.img", "disk.img.img", "noext.img", "old.bak.img"];
    assert_eq!(names(mount.path()), shown);
    for name in shown {
        assert_eq!(fs::metadata(mount.path().join(name)).unwrap().len(), 8 << 20);
    }
    let disk = fs::File::options().read(true).write(true).open(mount.path().join("noext.img"));
    disk.unwrap().write_all_at(b"written", 1 << 20).unwrap();
    // What becomes an image shows, and what is none any more goes.
    create(&path("late.vhdx"), "8M", &[]);
    let image = fs::read(path("late.vhdx")).unwrap();
    fs::remove_file(path("late.vhdx")).unwrap();
    fs::write(path("short"), image).unwrap();
    fs::write(path("old.bak"), "nothing").unwrap();
    let now = ["backup.vhd.1.img", "disk.img.img", "noext.img", "short.img"];
    wait_until("the change shows", || names(mount.path()) == now);
    assert!(mount.unmount().success());
}

#[test]
fn a_child_without_extension_keeps_its_parent_from_being_written() {
    if !live::can_mount() {
        return;
    }
    let dir = scratch();
    create(&dir.path().join("base.vhdx"), "8M", &[]);
    let parent = ["--parent".to_owned(), dir.path().join("base.vhdx").display().to_string()];
    let child = dir.path().join("child.avhdx");
    live::succeed(live::flatdisk().args(["create", "-q"]).args(parent).arg(&child));
    fs::rename(&child, dir.path().join("child")).unwrap();
    let mount = Mount::new(dir.path(), &[]);
    let opened = fs::File::options().write(true).open(mount.flat("base.vhdx"));
    assert_eq!(opened.unwrap_err().raw_os_error(), Some(libc::EROFS));
    assert!(mount.unmount().success());
}

#[test]
fn ten_thousand_files_are_looked_at_once_and_as_fast_as_file_does() {
    const FILES: usize = 10_000;
    if !live::can_mount() || !have(&["file"]) {
        return;
    }
    // In memory where there is such a place: nobody's disk is measured.
    let memory = Path::new("/dev/shm");
    let dir = match memory.is_dir() {
        true => tempfile::tempdir_in(memory).unwrap(),
        false => scratch(),
    };
    let shown = dir.path().join("shown");
    fs::create_dir(&shown).unwrap();
    for n in 0..FILES {
        // file(1) thinks long about texts.
        let contents = [(n % 251) as u8 + 1, 2, 3, 0].repeat(1500);
        fs::write(shown.join(format!("{n}")), contents).unwrap();
    }
    create(&shown.join("a.vhd"), "8M", &[]);
    fs::rename(shown.join("a.vhd"), shown.join("image")).unwrap();
    settle(&shown);
    let mount = Mount::new(&shown, &[]);
    let begun = Instant::now();
    assert_eq!(names(mount.path()), ["image.img"]);
    let ours = begun.elapsed();
    let list = dir.path().join("list");
    let all: String = names(&shown).iter().map(|name| format!("{name}\n")).collect();
    fs::write(&list, all).unwrap();
    let begun = Instant::now();
    live::succeed(Command::new("file").arg("-f").arg(&list).current_dir(&shown));
    let theirs = begun.elapsed();
    println!("listed in {ours:?}, file takes {theirs:?}");
    assert!(ours.as_secs_f64() <= 1.2 * theirs.as_secs_f64(), "{ours:?}, file takes {theirs:?}");
    let before = read_by(&mount);
    assert_eq!(names(mount.path()), ["image.img"]);
    let again = read_by(&mount) - before;
    assert!(again < 64 << 10, "{again} bytes were read again");
    assert!(mount.unmount().success());
}

#[test]
fn descriptors_above_are_read_once() {
    if !live::can_mount() {
        return;
    }
    let dir = scratch();
    let below = dir.path().join("below");
    fs::create_dir(&below).unwrap();
    for n in 0..200 {
        let text = format!("version=1\nCID=1\nRW 8 FLAT \"below/x{n}-flat.vmdk\" 0\n");
        fs::write(dir.path().join(format!("x{n}.vmdk")), text.repeat(100)).unwrap();
        fs::write(below.join(format!("x{n}-flat.vmdk")), [0; 4096]).unwrap();
    }
    settle(dir.path());
    let mount = Mount::new(dir.path(), &[]);
    assert_eq!(names(&mount.path().join("below")), [""; 0]);
    let before = read_by(&mount);
    // The folder has changed and is read again; what lies above has not.
    fs::write(below.join("new"), "").unwrap();
    assert_eq!(names(&mount.path().join("below")), [""; 0]);
    let again = read_by(&mount) - before;
    assert!(again < 256 << 10, "{again} bytes were read again");
    assert!(mount.unmount().success());
}
