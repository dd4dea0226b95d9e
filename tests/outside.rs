//! What happens to the host beneath a mount: full, failing, read-only, and images taken away.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "common/pattern.rs"]
#[allow(dead_code)]
mod pattern;

mod live;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use flatdisk::fuse::control::{Connection, ImageStatus, Request};
use flatdisk::fuse::mounts;
use live::kinds::{KINDS, Kind};
use live::{Loop, Mount, MountedFs, create, flatdisk, outcome, scratch, succeed, wait_until};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

const CHUNK: u64 = 64 << 10;
/// Number of the write that filled the parent of a child.
const PARENT: u32 = 1;
/// Bytes that parents hold.
const INHERITED: u64 = 1 << 20;

fn make(kind: &Kind, folder: &Path, size: &str) -> PathBuf {
    kind.make(folder, size, &pattern::bytes(PARENT, 0, INHERITED))
}

fn writer(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn errno(result: std::io::Result<()>) -> i32 {
    result.expect_err("fails").raw_os_error().unwrap()
}

/// Writes chunk `index` of the disk as write number `number`.
fn put(flat: &File, number: u32, index: u64) -> std::io::Result<()> {
    flat.write_all_at(&pattern::bytes(number, index * CHUNK, CHUNK), index * CHUNK)
}

/// Reads chunk `index` from the daemon, whatever the kernel remembers.
fn get(flat: &File, index: u64) -> std::io::Result<Vec<u8>> {
    posix_fadvise(flat, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    let mut found = vec![0; CHUNK as usize];
    flat.read_exact_at(&mut found, index * CHUNK).map(|()| found)
}

fn expect(flat: &File, number: u32, index: u64, context: &str) {
    let found = get(flat, index).unwrap();
    let right = found == pattern::bytes(number, index * CHUNK, CHUNK);
    assert!(right, "{context}, chunk {index}: {}", pattern::describe(&found));
}

/// `flatdisk check` finds at most leaks, and gives them back.
fn check_and_repair(image: &Path) {
    let check = outcome(flatdisk().arg("check").arg(image));
    assert!(matches!(check.status.code(), Some(0 | 3)), "{check:?}");
    succeed(flatdisk().args(["check", "--repair=leaks"]).arg(image));
}

/// What the daemon says of the image at `path`.
fn status(mount: &Mount, path: &Path) -> Option<ImageStatus> {
    let entry = mounts::mounted_at(mount.path()).unwrap().unwrap();
    let answer = Connection::to(&entry).unwrap().ask(&Request::Status).unwrap();
    answer.status.unwrap().images.into_iter().find(|image| image.image == path)
}

/// An ext4 file system of its own.
struct Ext4 {
    fs: MountedFs,
    _device: Loop,
    _folder: tempfile::TempDir,
}

impl Ext4 {
    fn new(size: u64) -> Self {
        let folder = scratch();
        let file = folder.path().join("ext4");
        File::create(&file).unwrap().set_len(size).unwrap();
        let (fs, device) = Self::on(&file);
        Self { fs, _device: device, _folder: folder }
    }

    fn on(file: &Path) -> (MountedFs, Loop) {
        succeed(Command::new("mkfs.ext4").args(["-q", "-F", "-m0"]).arg(file));
        let device = Loop::new(file, &[]);
        (MountedFs::new(&device.device, &[]), device)
    }
}

fn fill_and_go_on(kind: &Kind) {
    let host = Ext4::new(48 << 20);
    let folder = host.fs.path();
    let image = make(kind, folder, "64M");
    let ballast = File::create(folder.join("ballast")).unwrap();
    nix::fcntl::fallocate(&ballast, nix::fcntl::FallocateFlags::empty(), 0, 16 << 20).unwrap();
    let mount = Mount::new(folder, &[]);
    let flat = writer(&mount.flat(kind.image));
    let (mut next, mut confirmed) = (0, 0);
    let full = loop {
        if let Err(e) = put(&flat, 2, next) {
            break e;
        }
        next += 1;
        if next % 16 == 0 {
            match flat.sync_all() {
                Ok(()) => confirmed = next,
                Err(e) => break e,
            }
        }
    };
    let name = kind.image;
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC), "{name}: {full}");
    assert!(next * CHUNK > 8 << 20, "{name}: full after {next} chunks");
    // Again, and flushed while full: there is room for the tables of all that was accepted.
    assert_eq!(errno(put(&flat, 3, 63 << 4)), libc::ENOSPC, "{name}");
    flat.sync_all().unwrap_or_else(|e| panic!("{name}: a flush while the host is full: {e}"));
    (0..confirmed).for_each(|index| expect(&flat, 2, index, name));

    // With room again, the same daemon goes on with the same open file.
    drop(ballast);
    fs::remove_file(folder.join("ballast")).unwrap();
    let end = next + 64;
    // A program that another test starts may hold a copy of the file for a moment.
    wait_until("there is room", || put(&flat, 4, next).is_ok());
    for index in next + 1..end {
        put(&flat, 4, index).unwrap_or_else(|e| panic!("{name}, chunk {index}: {e}"));
    }
    put(&flat, 4, 0).unwrap();
    flat.sync_all().unwrap();
    let verify = |flat: &File| {
        for index in 0..end {
            let number = if index == 0 || index >= next { 4 } else { 2 };
            expect(flat, number, index, name);
        }
    };
    verify(&flat);
    drop(flat);
    assert!(mount.unmount().success(), "{name}");
    check_and_repair(&image);
    let mount = Mount::new(folder, &["--ro"]);
    verify(&File::open(mount.flat(name)).unwrap());
    assert!(mount.unmount().success());
}

#[test]
fn a_full_host_is_told_to_the_writer_and_room_lets_it_go_on() {
    if !live::can_mount() || !live::have(&["mkfs.ext4", "losetup"]) {
        return;
    }
    KINDS.iter().for_each(fill_and_go_on);
}

#[test]
fn a_host_that_fails_a_flush_is_never_believed_again_and_others_live() {
    if !live::can_mount() || !live::have(&["mkfs.ext4", "losetup"]) {
        return;
    }
    // The device has room for less than its file system believes, which shows only at write-back.
    let small = MountedFs::new(Path::new("none"), &["-t", "tmpfs", "-o", "size=20m"]);
    let file = small.path().join("ext4");
    File::create(&file).unwrap().set_len(96 << 20).unwrap();
    let (bad, _device) = Ext4::on(&file);
    let good = scratch();
    create(&bad.path().join("bad.vhdx"), "64M", &["--block-size", "1M"]);
    create(&good.path().join("good.vhdx"), "64M", &["--block-size", "1M"]);
    let mount = Mount::start(
        flatdisk()
            .args(["mount", "-f"])
            .args([bad.path().join("bad.vhdx"), good.path().join("good.vhdx")]),
    );
    let (bad_flat, good_flat) = (writer(&mount.flat("bad.vhdx")), writer(&mount.flat("good.vhdx")));
    let mut index = 0;
    let failure = loop {
        if let Err(e) = put(&bad_flat, 2, index % 512).and_then(|()| bad_flat.sync_all()) {
            break e;
        }
        index += 1;
        assert!(index < 512, "the device never fails");
    };
    assert_eq!(failure.raw_os_error(), Some(libc::EIO), "{failure}");
    // Not even with room again.
    assert_eq!(errno(bad_flat.sync_all()), libc::EIO);
    assert_eq!(errno(put(&bad_flat, 3, 0)), libc::EIO);
    assert_eq!(errno(bad_flat.sync_all()), libc::EIO);
    (0..64).for_each(|index| put(&good_flat, 2, index).unwrap());
    good_flat.sync_all().unwrap();
    (0..64).for_each(|index| expect(&good_flat, 2, index, "good.vhdx"));
    drop((bad_flat, good_flat));
    assert_eq!(mount.unmount().code(), Some(2));
    succeed(flatdisk().arg("check").arg(good.path().join("good.vhdx")));
}

#[test]
fn a_deleted_image_stays_with_those_who_have_it_open() {
    if !live::can_mount() {
        return;
    }
    for kind in &KINDS {
        let folder = scratch();
        let image = make(kind, folder.path(), "16M");
        let log = folder.path().join("log");
        let mount = Mount::start(
            flatdisk()
                .args(["mount", "-f"])
                .arg(folder.path())
                .stderr(Stdio::from(File::create(&log).unwrap())),
        );
        let flat = writer(&mount.flat(kind.image));
        let reader = File::open(mount.flat(kind.image)).unwrap();
        put(&flat, 2, 0).unwrap();
        assert_eq!(status(&mount, &image).unwrap().displaced, None);
        fs::remove_file(&image).unwrap();
        let gone = File::open(mount.flat(kind.image));
        assert_eq!(errno(gone.map(drop)), libc::ENOENT, "{}", kind.image);
        (1..64).for_each(|index| put(&flat, 2, index).unwrap());
        flat.sync_all().unwrap();
        (0..64).for_each(|index| expect(&flat, 2, index, kind.image));
        assert_eq!(status(&mount, &image).unwrap().displaced.as_deref(), Some("deleted"));
        // Also for a reader when the writer has left.
        drop(flat);
        wait_until("the writer has left", || status(&mount, &image).unwrap().writers == 0);
        (0..64).for_each(|index| expect(&reader, 2, index, kind.image));
        if kind.image == "dynamic.vhd" {
            wait_until("the log says so", || {
                fs::read_to_string(&log).unwrap().contains("dynamic.vhd: deleted while open")
            });
        }
        drop(reader);
        assert!(mount.unmount().success(), "{}", fs::read_to_string(&log).unwrap());
    }
}

#[test]
fn a_replaced_image_is_the_old_one_to_old_users_and_the_new_one_to_new() {
    if !live::can_mount() {
        return;
    }
    for (name, option) in [("a.vhd", "512K"), ("a.vhdx", "1M")] {
        let folder = scratch();
        let image = folder.path().join(name);
        create(&image, "16M", &["--block-size", option]);
        let mount = Mount::new(folder.path(), &[]);
        let old = writer(&mount.flat(name));
        (0..64).for_each(|index| put(&old, 2, index).unwrap());
        let format = &name[2..];
        let other = folder.path().join("other");
        create(&other, "8M", &["--block-size", option, "--format", format]);
        fs::rename(&other, &image).unwrap();

        let new = writer(&mount.flat(name));
        assert_eq!(new.metadata().unwrap().len(), 8 << 20, "{name}");
        assert!(get(&new, 0).unwrap().iter().all(|b| *b == 0));
        put(&new, 3, 0).unwrap();
        put(&old, 4, 1).unwrap();
        (&old, &new).0.sync_all().unwrap();
        new.sync_all().unwrap();
        expect(&new, 3, 0, name);
        assert!(get(&new, 1).unwrap().iter().all(|b| *b == 0));
        expect(&old, 2, 0, name);
        expect(&old, 4, 1, name);
        assert_eq!(old.metadata().unwrap().len(), 16 << 20, "{name}");
        drop((old, new));
        assert!(mount.unmount().success());
        succeed(flatdisk().arg("check").arg(&image));
    }
}

#[test]
fn an_image_cut_short_gives_errors_never_zeroes() {
    if !live::can_mount() {
        return;
    }
    for kind in &KINDS {
        let name = kind.image;
        let folder = scratch();
        make(kind, folder.path(), "16M");
        create(&folder.path().join("other.vhd"), "8M", &[]);
        // A kernel that uses a flat extent by itself treats it like any file.
        let mount = Mount::new(folder.path(), &["-o", "nopassthrough"]);
        let (flat, other) = (writer(&mount.flat(name)), writer(&mount.flat("other.vhd")));
        (0..128).for_each(|index| put(&flat, 2, index).unwrap());
        flat.sync_all().unwrap();
        let data = kind.data_file(folder.path());
        let len = 5 << 20;
        File::options().write(true).open(&data).unwrap().set_len(len).unwrap();

        let mut lost = Vec::new();
        for index in 0..128 {
            match get(&flat, index) {
                Ok(_) => expect(&flat, 2, index, name),
                Err(e) => {
                    assert_eq!(e.raw_os_error(), Some(libc::EIO), "{name}, chunk {index}: {e}");
                    lost.push(index);
                }
            }
        }
        assert!(!lost.is_empty() && lost.len() < 128, "{name}: {} chunks lost", lost.len());
        // A write would extend the file and turn what is lost into zeroes.
        for index in [*lost.last().unwrap(), 0, 200] {
            assert_eq!(errno(put(&flat, 3, index)), libc::EIO, "{name}");
        }
        assert_eq!(errno(flat.sync_all()), libc::EIO, "{name}");
        assert_eq!(fs::metadata(&data).unwrap().len(), len, "{name}");
        for index in lost {
            assert_eq!(errno(get(&flat, index).map(drop)), libc::EIO, "{name}");
        }
        put(&other, 2, 0).unwrap();
        other.sync_all().unwrap();
        expect(&other, 2, 0, "other.vhd");
        drop((flat, other));
        assert_eq!(mount.unmount().code(), Some(2), "{name}");
        succeed(flatdisk().arg("check").arg(folder.path().join("other.vhd")));
    }
}

/// A bind mount of a folder.
fn bound(folder: &Path) -> MountedFs {
    MountedFs::new(folder, &["--bind"])
}

fn remount(fs: &MountedFs, options: &str) {
    succeed(Command::new("mount").args(["-o", options]).arg(fs.path()));
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o777
}

#[test]
fn images_on_a_host_that_became_read_only_are_read_only() {
    if !live::can_mount() {
        return;
    }
    let folder = scratch();
    for kind in &KINDS {
        make(kind, folder.path(), "16M");
    }
    // Killed, so that the VHDX's log still has to be replayed.
    let mount = Mount::new(folder.path(), &[]);
    for kind in &KINDS {
        let flat = writer(&mount.flat(kind.image));
        (0..32).for_each(|index| put(&flat, 2, index).unwrap());
        flat.sync_all().unwrap();
        // Not closed when the daemon dies.
        std::mem::forget(flat);
    }
    mount.kill();
    let host = bound(folder.path());
    let mount = Mount::new(host.path(), &[]);
    let modes =
        |expected| KINDS.iter().all(|kind| mode(&mount.flat(kind.image)) & 0o777 == expected);
    let plain = mode(&folder.path().join("dynamic.vhd"));
    assert!(modes(plain));
    remount(&host, "remount,bind,ro");
    wait_until("the flat files are read-only", || modes(plain & 0o444));
    for kind in &KINDS {
        let path = mount.flat(kind.image);
        let opened = File::options().read(true).write(true).open(&path);
        assert_eq!(errno(opened.map(drop)), libc::EROFS, "{}", kind.image);
        let flat = File::open(&path).unwrap();
        (0..32).for_each(|index| expect(&flat, 2, index, kind.image));
    }
    remount(&host, "remount,bind,rw");
    wait_until("the flat files are writable", || modes(plain));
    for kind in &KINDS {
        let flat = writer(&mount.flat(kind.image));
        put(&flat, 3, 0).unwrap();
        flat.sync_all().unwrap();
    }
    assert!(mount.unmount().success());
    for kind in &KINDS {
        check_and_repair(&folder.path().join(kind.image));
    }
}
