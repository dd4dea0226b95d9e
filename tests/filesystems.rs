//! Real file systems on loop devices over flat files.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use flatdisk::formats::{self, OpenOptions};
use flatdisk::storage::Access;
use flatdisk::storage::file::HostFs;
use live::{Loop, Mount, MountedFs, create, have, run, scratch, succeed};

/// Images that file systems are made on: every way of allocating.
const IMAGES: [(&str, &[&str]); 6] = [
    ("dynamic.vhd", &[]),
    ("dynamic.vhdx", &[]),
    ("sector4k.vhdx", &["--sector-size", "4096"]),
    ("sparse.vmdk", &[]),
    ("split.vmdk", &["--subformat", "twoGbMaxExtentSparse"]),
    ("flat.vmdk", &["--subformat", "monolithicFlat"]),
];

const FILES: u32 = 2000;

/// Contents of file `i`: 0 to 40 KiB that differ from file to file.
fn contents(i: u32) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(u64::from(i));
    let mut bytes = vec![0; random.usize(0..40_000)];
    random.fill(&mut bytes);
    bytes
}

fn name(dir: &Path, i: u32) -> std::path::PathBuf {
    dir.join(format!("d{}", i / 100)).join(format!("f{i}"))
}

fn fill(dir: &Path) {
    for i in 0..FILES {
        if i.is_multiple_of(100) {
            fs::create_dir(dir.join(format!("d{}", i / 100))).unwrap();
        }
        fs::write(name(dir, i), contents(i)).unwrap();
    }
}

fn compare(dir: &Path) {
    for i in 0..FILES {
        let found = fs::read(name(dir, i)).unwrap();
        assert!(found == contents(i), "file {i} differs");
    }
}

/// mkfs, thousands of files, unmount, fsck, flatdisk check, mount again, compare.
fn survives(mkfs: &[&str], fsck: &[&str], options: &[&str]) {
    if !live::can_mount() || !have(&["losetup", mkfs[0], fsck[0]]) {
        return;
    }
    let folder = scratch();
    for (image, create_options) in IMAGES {
        println!("{} on {image}", mkfs[0]);
        let path = folder.path().join(image);
        create(&path, "640M", create_options);
        let sector: &[&str] = if image == "sector4k.vhdx" { &["-b", "4096"] } else { &[] };
        {
            let mount = Mount::new(folder.path(), &[]);
            let device = Loop::new(&mount.flat(image), sector);
            run(mkfs[0], &[&mkfs[1], &device.device]);
            let fs = MountedFs::new(&device.device, options);
            fill(fs.path());
            fs.unmount();
            succeed(Command::new(fsck[0]).args(&fsck[1..]).arg(&device.device));
            drop(device);
            assert!(mount.unmount().success());
        }
        succeed(live::flatdisk().arg("check").arg(&path));
        let mount = Mount::new(folder.path(), &["-o", "ro"]);
        let device = Loop::new(&mount.flat(image), &[&["-r"], sector].concat());
        let fs = MountedFs::new(&device.device, &[&["-r"], options].concat());
        compare(fs.path());
        fs.unmount();
        drop(device);
        assert!(mount.unmount().success());
        fs::remove_dir_all(folder.path()).unwrap();
        fs::create_dir(folder.path()).unwrap();
    }
}

#[test]
fn ext4_keeps_its_files() {
    survives(&["mkfs.ext4", "-q"], &["e2fsck", "-fn"], &[]);
}

#[test]
fn xfs_keeps_its_files() {
    survives(&["mkfs.xfs", "-q"], &["xfs_repair", "-n"], &["-o", "nouuid"]);
}

#[test]
fn btrfs_keeps_its_files() {
    survives(&["mkfs.btrfs", "-q"], &["btrfs", "check"], &[]);
}

/// Host space of all files of a folder, in bytes.
fn host_space(folder: &Path) -> u64 {
    fs::read_dir(folder).unwrap().map(|e| e.unwrap().metadata().unwrap().blocks() * 512).sum()
}

#[test]
fn fstrim_gives_space_back_to_the_host() {
    if !live::can_mount() || !have(&["losetup", "mkfs.ext4", "fstrim"]) {
        return;
    }
    for (image, options) in IMAGES {
        let folder = scratch();
        create(&folder.path().join(image), "640M", options);
        let mount = Mount::new(folder.path(), &[]);
        let sector: &[&str] = if image == "sector4k.vhdx" { &["-b", "4096"] } else { &[] };
        let device = Loop::new(&mount.flat(image), sector);
        run("mkfs.ext4", &[&"-q", &device.device]);
        let fs = MountedFs::new(&device.device, &[]);
        let big = fs.path().join("big");
        let mut bytes = vec![0; 256 << 20];
        fastrand::Rng::with_seed(1).fill(&mut bytes);
        fs::write(&big, bytes).unwrap();
        succeed(&mut Command::new("sync"));
        let full = host_space(folder.path());
        assert!(full > 256 << 20, "{image}: only {full} bytes after writing 256 MiB");
        fs::remove_file(&big).unwrap();
        succeed(&mut Command::new("sync"));
        run("fstrim", &[&fs.path()]);
        succeed(Command::new("sync").arg("-f").arg(fs.path()));
        let trimmed = host_space(folder.path());
        let shown = || fs::metadata(mount.flat(image)).unwrap().blocks() * 512;
        println!("{image}: {} MiB before fstrim, {} MiB after", full >> 20, trimmed >> 20);
        assert!(trimmed < 64 << 20, "{image}: {trimmed} of {full} bytes are left");
        // The kernel keeps what it knows of a file for a second.
        live::wait_until("stat shows what is left", || shown() < 80 << 20);
        fs.unmount();
        drop(device);
        assert!(mount.unmount().success());
        succeed(live::flatdisk().arg("check").arg(folder.path().join(image)));
    }
}

/// Of every MiB of the disk of the image at `path` a digest, `None` for zeroes.
fn digests(path: &Path) -> Vec<Option<u64>> {
    let host = HostFs::shared();
    let disk = formats::open(&host, path, &OpenOptions::new(Access::Read)).unwrap().disk;
    let mut bytes = vec![0; 1 << 20];
    let mut digest = |at| {
        disk.read_at(at, &mut bytes).unwrap();
        let mut hasher = DefaultHasher::new();
        hasher.write(&bytes);
        bytes.iter().any(|byte| *byte != 0).then(|| hasher.finish())
    };
    (0..disk.size()).step_by(1 << 20).map(&mut digest).collect()
}

/// A file system of a guest.
struct Guest {
    mkfs: &'static [&'static str],
    mount: &'static [&'static str],
    /// MiB of the disk.
    size: u64,
}

#[rustfmt::skip]
const GUESTS: [Guest; 4] = [
    Guest { mkfs: &["mkfs.ext4", "-q"], mount: &[], size: 192 },
    // It takes no less than 300 MiB.
    Guest { mkfs: &["mkfs.xfs", "-q"], mount: &["-o", "nouuid"], size: 320 },
    Guest { mkfs: &["mkfs.btrfs", "-q"], mount: &[], size: 256 },
    Guest { mkfs: &["mkfs.ntfs", "-q", "-f"], mount: &["-t", "ntfs-3g"], size: 192 },
];

/// Fills a file system on an image, deletes two thirds of it, trims or writes zeroes, and compacts the image.
fn becomes_short(guest: &Guest, name: &str, options: &[&str], trims: bool) {
    let folder = scratch();
    let path = folder.path().join(name);
    create(&path, &format!("{}M", guest.size), options);
    let mount = Mount::new(folder.path(), &[]);
    let device = Loop::new(&mount.flat(name), &[]);
    succeed(Command::new(guest.mkfs[0]).args(&guest.mkfs[1..]).arg(&device.device));
    let mut fs = MountedFs::new(&device.device, guest.mount);
    let mut bytes = vec![0; 4 << 20];
    let mut random = fastrand::Rng::with_seed(1);
    for number in 0..30 {
        random.fill(&mut bytes);
        fs::write(fs.path().join(format!("{number}")), &bytes).unwrap();
    }
    succeed(Command::new("sync").arg("-f").arg(fs.path()));
    for number in (0..30).filter(|number| number % 3 != 0) {
        fs::remove_file(fs.path().join(format!("{number}"))).unwrap();
    }
    if trims {
        // XFS frees what was deleted some time later, at the latest when it is unmounted.
        fs.unmount();
        fs = MountedFs::new(&device.device, guest.mount);
        run("fstrim", &[&fs.path()]);
    } else {
        let zeroes = fs.path().join("zeroes");
        let file = fs::File::create(&zeroes).unwrap();
        // Until the file system is full.
        while (&file).write_all(&[0; 1 << 20]).is_ok() {}
        let _ = file.sync_all();
        drop(file);
        fs::remove_file(zeroes).unwrap();
    }
    fs.unmount();
    drop(device);
    assert!(mount.unmount().success());
    let child = folder.path().join("child").with_extension(path.extension().unwrap());
    succeed(live::flatdisk().args(["create", "-q", "--parent"]).args([&path, &child]));
    let before = digests(&path);
    succeed(live::flatdisk().args(["compact", "-q"]).arg(&path));
    assert!(digests(&path) == before, "the disk reads otherwise");
    assert!(digests(&child) == before, "a child reads otherwise");
    succeed(live::flatdisk().arg("check").args([&path, &child]));
    // Blocks that hold anything, and 4 MiB of headers, log and tables.
    let needed = before.iter().flatten().count() as u64;
    let len = fs::metadata(&path).unwrap().len();
    let what = format!("{} on {name}, trims: {trims}", guest.mkfs[0]);
    println!("{what}: {needed} MiB are needed, {len} bytes are there");
    assert!(len <= (needed << 20) * 102 / 100 + (4 << 20), "{what}: {len} bytes for {needed} MiB");
    // Ten files are left of thirty.
    assert!((40..110).contains(&needed), "{what}: {needed} MiB");
}

#[test]
fn a_disk_that_was_full_once_is_as_short_as_what_is_left_when_compacted() {
    if !live::can_mount() || !have(&["losetup", "fstrim", "mkfs.ext4"]) {
        return;
    }
    for guest in &GUESTS {
        if !have(&guest.mkfs[..1]) {
            continue;
        }
        // Trimmed, as by a guest that tells, and filled with zeroes.
        for trims in [true, false] {
            becomes_short(guest, "disk.vhdx", &["--block-size", "1M"], trims);
        }
    }
    becomes_short(&GUESTS[0], "disk.vmdk", &[], false);
}
