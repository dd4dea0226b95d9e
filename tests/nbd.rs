//! Flat files over the network: the NBD servers that exist serve them as they are.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use live::{Mount, create, flatdisk, have, scratch, sha256, succeed, wait_until};

const MIB: u64 = 1 << 20;

/// A mount of a folder with `disk.vhdx`, which has data at its beginning and behind its middle.
fn mounted() -> (Mount, tempfile::TempDir) {
    let folder = scratch();
    create(&folder.path().join("disk.vhdx"), "64M", &["--block-size", "1M"]);
    let mount = Mount::new(folder.path(), &[]);
    let flat = File::options().write(true).open(mount.flat("disk.vhdx")).unwrap();
    flat.write_all_at(&vec![1; MIB as usize], 0).unwrap();
    flat.write_all_at(&vec![2; 3 << 20], 40 * MIB).unwrap();
    (mount, folder)
}

/// What everybody sees of the disk that is served at `address`: sizes, holes, all bytes.
fn read_and_write(address: &str, flat: &Path, folder: &Path) {
    let json = succeed(Command::new("nbdinfo").args(["--json", address]));
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["exports"][0]["export-size"], 64 * MIB);
    assert_eq!(json["exports"][0]["is_read_only"], false);
    let map = succeed(Command::new("nbdinfo").args(["--map", "--json", address]));
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let data = map.as_array().unwrap().iter().filter(|run| run["type"] == 0);
    let data: u64 = data.map(|run| run["length"].as_u64().unwrap()).sum();
    assert!((4 * MIB..8 * MIB).contains(&data), "{map}");
    let copy = folder.join("copy");
    succeed(Command::new("nbdcopy").arg(address).arg(&copy));
    assert_eq!(sha256(&copy), sha256(flat));
    // Back, with holes: what they cover is given back to the image.
    let file = File::create(&copy).unwrap();
    file.set_len(64 * MIB).unwrap();
    file.write_all_at(&vec![3; MIB as usize], 20 * MIB).unwrap();
    drop(file);
    succeed(Command::new("nbdcopy").args(["--flush"]).arg(&copy).arg(address));
    assert_eq!(sha256(&copy), sha256(flat));
}

fn close(mount: Mount, folder: &Path) {
    assert!(mount.unmount().success());
    succeed(flatdisk().arg("check").arg(folder.join("disk.vhdx")));
    let hash = succeed(flatdisk().arg("hash").arg(folder.join("disk.vhdx")));
    assert!(hash.contains(&sha256(&folder.join("copy"))), "{hash}");
}

#[test]
fn nbdkit_serves_a_flat_file() {
    if !live::can_mount() || !have(&["nbdkit", "nbdinfo", "nbdcopy"]) {
        return;
    }
    let (mount, folder) = mounted();
    let (socket, pid) = (folder.path().join("socket"), folder.path().join("pid"));
    let mut nbdkit = Command::new("nbdkit");
    nbdkit.arg("-U").arg(&socket).arg("-P").arg(&pid).arg("file").arg(mount.flat("disk.vhdx"));
    succeed(&mut nbdkit);
    let address = format!("nbd+unix:///?socket={}", socket.display());
    read_and_write(&address, &mount.flat("disk.vhdx"), folder.path());
    let pid = fs::read_to_string(pid).unwrap();
    succeed(Command::new("kill").arg(pid.trim()));
    wait_until("nbdkit ends", || !Path::new("/proc").join(pid.trim()).exists());
    close(mount, folder.path());
}

#[test]
fn qemu_nbd_serves_a_flat_file() {
    if !live::can_mount() || !have(&["qemu-nbd", "nbdinfo", "nbdcopy"]) {
        return;
    }
    let (mount, folder) = mounted();
    let socket = folder.path().join("socket");
    let mut qemu = Command::new("qemu-nbd");
    qemu.args(["-f", "raw", "--discard=unmap", "--detect-zeroes=unmap", "--persistent", "-k"]);
    let mut server = qemu.arg(&socket).arg(mount.flat("disk.vhdx")).spawn().unwrap();
    wait_until("qemu-nbd listens", || socket.exists());
    let address = format!("nbd+unix:///?socket={}", socket.display());
    read_and_write(&address, &mount.flat("disk.vhdx"), folder.path());
    succeed(Command::new("kill").arg(server.id().to_string()));
    server.wait().unwrap();
    close(mount, folder.path());
}
