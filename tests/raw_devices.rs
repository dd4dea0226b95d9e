//! VMDKs whose data is on a block device: refused, unless the user names the device.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs;
use std::os::unix::fs::FileExt;

use live::{Loop, flatdisk, have, outcome, scratch, sha256, succeed};

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
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"fullDevice\"\nRW 2048 FLAT \"{name}\" 0\n"
    );
    fs::write(&image, text).unwrap();
    let refused = |options: &[&str]| {
        let output = outcome(flatdisk().arg("hash").args(options).arg(&image));
        assert!(!output.status.success(), "{options:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let told = refused(&[]);
    assert!(told.contains("a raw device") && told.contains("--allow-device"), "{told}");
    refused(&["--allow-device", "/dev/null"]);
    let hash = succeed(flatdisk().args(["hash", "--allow-device", name]).arg(&image));
    assert!(hash.starts_with(&sha256(&raw)), "{hash}");
    let mut write = flatdisk();
    write
        .args([
            "write",
            "--allow-device",
            name,
            "--offset",
            "4096",
            "--fill",
            "0",
            "--length",
            "512",
        ])
        .arg(&image);
    let output = outcome(&mut write);
    assert!(!output.status.success());
    assert!(fs::read(&raw).unwrap()[4096..].starts_with(b"on the device"));
}
