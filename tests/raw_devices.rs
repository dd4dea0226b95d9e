//! VMDKs whose data is on a block device: refused, unless the user names the device, and written only if he says
//! that, too.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use live::{Loop, Mount, MountedFs, flatdisk, have, outcome, scratch, sha256, succeed};

#[test]
fn a_device_is_read_only_if_it_was_named() {
    if !live::can_mount() || !have(&["losetup"]) {
        return;
    }
    let dir = scratch();
    let raw = dir.path().join("raw");
    let file = fs::File::create(&raw).unwrap();
    file.set_len(1 << 20).unwrap();
    file.write_all_at(b"on the device", 4096).unwrap();
    file.sync_all().unwrap();
    let device = Loop::new(&raw, &[]);
    let name = device.device.to_str().unwrap();
    let image = dir.path().join("d.vmdk");
    fs::write(&image, descriptor("fullDevice", &format!("RW 2048 FLAT \"{name}\" 0"))).unwrap();
    let refused = |options: &[&str]| {
        let output = outcome(flatdisk().arg("hash").args(options).arg(&image));
        assert!(!output.status.success(), "{options:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let told = refused(&[]);
    assert!(told.contains("a raw device") && told.contains("--allow-device"), "{told}");
    refused(&["--allow-device", "/dev/null"]);
    refused(&["--rw"]);
    let hash = succeed(flatdisk().args(["hash", "--allow-device", name]).arg(&image));
    assert!(hash.starts_with(&sha256(&raw)), "{hash}");
    let refused = outcome(&mut writing(&image, name, &[]));
    assert!(!refused.status.success());
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(told.contains("only read without --rw"), "{told}");
    assert!(fs::read(&raw).unwrap()[4096..].starts_with(b"on the device"));
}

/// A command that writes zeroes to the sector at 4096.
fn writing(image: &Path, device: &str, options: &[&str]) -> Command {
    let mut write = flatdisk();
    write.args(["write", "--allow-device", device]).args(options);
    write.args(["--offset", "4096", "--fill", "0", "--length", "512"]).arg(image);
    write
}

/// A loop device over a raw file of `mib` MiB, and an image of the whole of it.
fn device(dir: &Path, name: &str, mib: u64) -> (Loop, PathBuf, PathBuf) {
    let raw = dir.join(format!("{name}.raw"));
    fs::File::create(&raw).unwrap().set_len(mib << 20).unwrap();
    let device = Loop::new(&raw, &[]);
    let image = dir.join(format!("{name}.vmdk"));
    let extent = format!("RW {} FLAT \"{}\" 0", mib << 11, device.device.display());
    fs::write(&image, descriptor("fullDevice", &extent)).unwrap();
    (device, raw, image)
}

fn descriptor(kind: &str, extents: &str) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"{kind}\"\n{extents}\n"
    )
}

fn bytes(path: &Path, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fs::File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap();
    bytes
}

#[test]
fn a_device_is_written_only_with_rw_and_while_nobody_has_it_mounted() {
    if !live::can_mount() || !have(&["losetup", "mkfs.ext4"]) {
        return;
    }
    let dir = scratch();
    let (device, raw, image) = device(dir.path(), "d", 16);
    let name = device.device.to_str().unwrap();
    succeed(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&device.device));
    fs::File::options()
        .write(true)
        .open(&device.device)
        .unwrap()
        .write_all_at(&[7; 512], 4096)
        .unwrap();
    let mounted = MountedFs::new(&device.device, &["-o", "ro"]);
    let refused = outcome(&mut writing(&image, name, &["--rw"]));
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && told.contains("in use"), "{told}");
    // It may be read.
    succeed(flatdisk().args(["hash", "--allow-device", name, "--rw"]).arg(&image));
    mounted.unmount();
    succeed(&mut writing(&image, name, &["--rw"]));
    assert_eq!(bytes(&device.device, 4096, 512), [0; 512]);
    let told =
        outcome(flatdisk().args(["resize", "--allow-device", name, "--rw"]).arg(&image).arg("+1M"));
    assert!(!told.status.success(), "{told:?}");
    assert_eq!(fs::metadata(&raw).unwrap().len(), 16 << 20);
    succeed(flatdisk().args(["check", "--allow-device", name]).arg(&image));
}

#[test]
fn a_mount_serves_the_devices_that_it_was_given() {
    if !live::can_mount() || !have(&["losetup"]) {
        return;
    }
    let dir = scratch();
    let (given, _, _) = device(dir.path(), "given", 4);
    let (_other, _, _) = device(dir.path(), "other", 4);
    let name = given.device.to_str().unwrap();
    let write = |mount: &Mount| {
        let file = fs::File::options().write(true).open(mount.flat("given.vmdk"))?;
        file.write_all_at(&[5; 4096], 1 << 20)?;
        file.sync_all()
    };
    let option = format!("allow_device={name}");
    let mount = Mount::new(dir.path(), &["-o", &option]);
    let told = fs::read_to_string(mount.path().join("other.vmdk.error.txt")).unwrap();
    assert!(told.contains("--allow-device"), "{told}");
    assert_eq!(fs::metadata(mount.flat("given.vmdk")).unwrap().len(), 4 << 20);
    assert_eq!(write(&mount).unwrap_err().raw_os_error(), Some(libc::EROFS));
    assert!(mount.unmount().success());
    let mount = Mount::new(dir.path(), &["--allow-device", name, "--rw"]);
    write(&mount).unwrap();
    assert_eq!(bytes(&given.device, 1 << 20, 4096), [5; 4096]);
    // What is written there is written here.
    assert_eq!(bytes(&mount.flat("given.vmdk"), 1 << 20, 4096), [5; 4096]);
    assert!(mount.unmount().success());
    let refused = outcome(
        flatdisk()
            .args(["mount", "-o", "allow_device=/etc/passwd"])
            .args([dir.path(), Path::new("/mnt")]),
    );
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
}

#[test]
fn images_of_others_reach_no_device() {
    if !live::can_mount() || !have(&["losetup"]) {
        return;
    }
    let dir = scratch();
    let (device, _, image) = device(dir.path(), "d", 1);
    let name = device.device.to_str().unwrap();
    std::os::unix::fs::chown(&image, Some(65534), Some(65534)).unwrap();
    fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let refused = outcome(flatdisk().args(["hash", "--allow-device", name]).arg(&image));
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && told.contains("65534"), "{told}");
    let mount = Mount::new(dir.path(), &["--allow-device", name]);
    assert!(mount.path().join("d.vmdk.error.txt").exists());
    assert!(mount.unmount().success());
}

/// Parts of a device beside files: the partition table is a file of its own, and what is not exposed is zero.
#[test]
fn a_partitioned_device_is_put_together() {
    if !live::can_mount() || !have(&["losetup"]) {
        return;
    }
    let dir = scratch();
    let (device, raw, image) = device(dir.path(), "d", 4);
    fs::File::options().write(true).open(&raw).unwrap().write_all_at(&vec![3; 4 << 20], 0).unwrap();
    let name = device.device.to_str().unwrap();
    fs::write(dir.path().join("d-pt.vmdk"), vec![1; 1 << 20]).unwrap();
    let extents = format!(
        "RW 2048 FLAT \"d-pt.vmdk\" 0\nRW 2048 FLAT \"{name}\" 2048\nRW 2048 ZERO\nRW 2048 FLAT \"{name}\" 6144"
    );
    fs::write(&image, descriptor("partitionedDevice", &extents)).unwrap();
    let out = dir.path().join("out.raw");
    succeed(flatdisk().args(["convert", "-q", "--allow-device", name]).args([&image, &out]));
    for (part, value) in [1, 3, 0, 3].into_iter().enumerate() {
        assert_eq!(bytes(&out, (part as u64) << 20, 1 << 20), vec![value; 1 << 20], "{part}");
    }
}

#[test]
fn a_raw_device_mapping_is_on_the_device_that_is_named() {
    if !live::can_mount() || !have(&["losetup"]) {
        return;
    }
    let dir = scratch();
    let (device, raw, image) = device(dir.path(), "d", 1);
    fs::File::options().write(true).open(&raw).unwrap().write_all_at(b"lun", 512).unwrap();
    let name = device.device.to_str().unwrap();
    for (kind, pointer) in [
        ("vmfsRawDeviceMap", "d-rdm.vmdk"),
        ("vmfsPassthroughRawDeviceMap", "d-rdmp.vmdk"),
        ("vmfsRDM", "d-rdm.vmdk"),
    ] {
        fs::write(dir.path().join(pointer), b"a pointer of VMFS").unwrap();
        fs::write(&image, descriptor(kind, &format!("RW 2048 VMFSRDM \"{pointer}\""))).unwrap();
        let told = outcome(flatdisk().arg("info").arg(&image));
        let told = String::from_utf8_lossy(&told.stderr).into_owned();
        assert!(told.contains("raw device mapping") && told.contains("--allow-device"), "{told}");
        let hash = succeed(flatdisk().args(["hash", "--allow-device", name]).arg(&image));
        assert!(hash.starts_with(&sha256(&raw)), "{kind}: {hash}");
        let two = outcome(
            flatdisk()
                .args(["hash", "--allow-device", name, "--allow-device", "/dev/loop-control"])
                .arg(&image),
        );
        assert!(!two.status.success(), "one of two was guessed");
    }
    succeed(&mut writing(&image, name, &["--rw"]));
}
