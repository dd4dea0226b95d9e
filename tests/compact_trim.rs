//! `compact --trim`: what the file systems of an image do not use goes back to the host.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};

use live::{Loop, MountedFs, flatdisk, have, outcome, scratch, succeed};

const MIB: u64 = 1 << 20;

/// Makes partitions on a raw disk.
fn partition(disk: &std::path::Path, script: &str) {
    let mut sfdisk = Command::new("sfdisk");
    sfdisk.arg("-q").arg(disk).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut child = sfdisk.spawn().unwrap();
    child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn what_was_deleted_and_never_trimmed_is_won() {
    let tools = ["losetup", "sfdisk", "partx", "blkid", "mkfs.ext4", "mkswap", "fstrim"];
    if !live::can_mount() || !have(&tools) {
        return;
    }
    let dir = scratch();
    let [raw, image] = ["a.raw", "a.vhdx"].map(|name| dir.path().join(name));
    File::create(&raw).unwrap().set_len(128 * MIB).unwrap();
    partition(&raw, "label: gpt\nstart=2048, size=180224, type=L\nsize=16384, type=S\n");
    {
        // The first partition alone, where the kernel knows no partition tables.
        let first = Loop::new(&raw, &["--offset", "1048576", "--sizelimit", "92274688"]);
        succeed(Command::new("mkfs.ext4").arg("-q").arg(&first.device));
        let mounted = MountedFs::new(&first.device, &[]);
        fs::write(mounted.path().join("kept"), vec![7; MIB as usize]).unwrap();
        fs::write(mounted.path().join("deleted"), vec![9; 50 * MIB as usize]).unwrap();
        succeed(Command::new("sync").arg("-f").arg(mounted.path()));
        fs::remove_file(mounted.path().join("deleted")).unwrap();
        mounted.unmount();
        drop(first);
        let second = Loop::new(&raw, &["--offset", "93323264", "--sizelimit", "8388608"]);
        succeed(Command::new("mkswap").arg("-q").arg(&second.device));
    }
    succeed(flatdisk().args(["convert", "-q", "--block-size", "1M"]).args([&raw, &image]));
    let stored = || fs::metadata(&image).unwrap().blocks() * 512;

    let said = succeed(flatdisk().arg("compact").arg(&image));
    assert!(said.contains("--trim as root"), "{said}");
    assert!(stored() > 50 * MIB, "{}", stored());
    let done = outcome(flatdisk().args(["compact", "--trim"]).arg(&image));
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{said}");
    assert!(said.contains("not trimmed: 2:") && said.contains("swap"), "{said}");
    assert!(stored() < 25 * MIB, "{}", stored());
    succeed(flatdisk().arg("check").arg(&image));
    let listed = succeed(flatdisk().arg("ls").arg(format!("{}:1/", image.display())));
    assert!(listed.contains("kept") && !listed.contains("deleted"), "{listed}");
    let attached = succeed(flatdisk().args(["attach", "--list"]));
    assert!(!attached.contains("a.vhdx"), "{attached}");
}
