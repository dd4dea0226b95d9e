//! One writer at a time: two daemons, or a daemon and QEMU.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs::File;
use std::io::Read;
use std::process::{Command, Stdio};

use live::{Mount, create, have, outcome, scratch};

fn open_for_writing(mount: &Mount, image: &str) -> std::io::Result<File> {
    File::options().read(true).write(true).open(mount.flat(image))
}

#[test]
fn two_daemons_cannot_write_one_image() {
    if !live::can_mount() {
        return;
    }
    let folder = scratch();
    for image in ["a.vhd", "a.vhdx", "a.vmdk"] {
        create(&folder.path().join(image), "8M", &[]);
    }
    let (first, second) = (Mount::new(folder.path(), &[]), Mount::new(folder.path(), &[]));
    for image in ["a.vhd", "a.vhdx", "a.vmdk"] {
        let writer = open_for_writing(&first, image).unwrap();
        let error = open_for_writing(&second, image).expect_err(image);
        assert_eq!(error.kind(), std::io::ErrorKind::ResourceBusy, "{image}: {error}");
        drop(writer);
        live::wait_until("the writer has let go", || open_for_writing(&second, image).is_ok());
    }
    assert!(first.unmount().success());
    assert!(second.unmount().success());
}

#[test]
fn qemu_and_flatdisk_exclude_each_other() {
    if !live::can_mount() || !have(&["qemu-io"]) {
        return;
    }
    let folder = scratch();
    for (image, driver) in [("a.vhd", "vpc"), ("a.vhdx", "vhdx"), ("a.vmdk", "vmdk")] {
        let path = folder.path().join(image);
        create(&path, "8M", &[]);
        let mount = Mount::new(folder.path(), &[]);
        let qemu = || {
            outcome(Command::new("qemu-io").args(["-f", driver, "-c", "write 0 512"]).arg(&path))
        };
        let writer = open_for_writing(&mount, image).unwrap();
        assert!(!qemu().status.success(), "QEMU writes {image} beside flatdisk");
        drop(writer);
        live::wait_until("QEMU may write again", || qemu().status.success());
        // The other way round: QEMU asks for commands once it has the image open.
        let mut child = Command::new("qemu-io")
            .args(["-f", driver])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut prompt = [0; 9];
        child.stdout.as_mut().unwrap().read_exact(&mut prompt).unwrap();
        assert_eq!(&prompt, b"qemu-io> ");
        let error = open_for_writing(&mount, image).expect_err(image);
        assert_eq!(error.kind(), std::io::ErrorKind::ResourceBusy, "{image}: {error}");
        drop(child.stdin.take());
        child.wait().unwrap();
        open_for_writing(&mount, image).expect("QEMU has ended");
        assert!(mount.unmount().success());
    }
}
