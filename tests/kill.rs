//! SIGKILL of the daemon: what fsync confirmed is there, and the image is consistent.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use live::{Mount, create, scratch, wait_until};

const IMAGES: [(&str, &[&str]); 8] = [
    ("fixed.vhd", &["--subformat", "fixed"]),
    ("dynamic.vhd", &[]),
    ("dynamic.vhdx", &["--block-size", "1M"]),
    ("fixed.vhdx", &["--subformat", "fixed"]),
    ("sparse.vmdk", &[]),
    ("flat.vmdk", &["--subformat", "monolithicFlat"]),
    ("split.vmdk", &["--subformat", "twoGbMaxExtentSparse"]),
    ("small.vhd", &["--block-size", "512K"]),
];

const SIZE: u64 = 64 << 20;

/// Rounds of writing, fsync and killing per image.
fn rounds() -> u64 {
    std::env::var("FLATDISK_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(3)
}

/// `flatdisk check` finds no error; leaked space is allowed.
fn check(image: &Path) {
    let output = live::outcome(live::flatdisk().arg("check").arg(image));
    let status = output.status.code();
    assert!(
        status == Some(0) || status == Some(3),
        "check of {}: {status:?}\n{}",
        image.display(),
        String::from_utf8_lossy(&output.stdout)
    );
}

#[test]
fn what_fsync_confirmed_survives_the_daemon() {
    if !live::can_mount() {
        return;
    }
    let folder = scratch();
    for (name, options) in IMAGES {
        let path = folder.path().join(name);
        create(&path, "64M", options);
        let mut model = vec![0u8; SIZE as usize];
        let mut random = fastrand::Rng::with_seed(7);
        for round in 0..rounds() {
            let mount = Mount::new(folder.path(), &[]);
            let flat = OpenOptions::new().read(true).write(true).open(mount.flat(name)).unwrap();
            let mut found = vec![0; SIZE as usize];
            flat.read_exact_at(&mut found, 0).unwrap();
            let differs = found.iter().zip(&model).position(|(a, b)| a != b);
            assert_eq!(differs, None, "{name}, round {round}: confirmed bytes are gone");
            for _ in 0..40 {
                let at = random.u64(0..SIZE - 200_000);
                let mut bytes = vec![0; random.usize(1..200_000)];
                random.fill(&mut bytes);
                flat.write_all_at(&bytes, at).unwrap();
                model[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
            }
            flat.sync_all().unwrap();
            mount.kill();
            drop(flat);
            check(&path);
        }
    }
}

#[test]
fn a_dead_daemons_mount_point_is_cleared_by_umount_and_by_mount() {
    if !live::can_mount() {
        return;
    }
    let folder = scratch();
    create(&folder.path().join("a.vhd"), "8M", &[]);
    let point = scratch();
    for clear_by_mounting in [false, true] {
        live::succeed(live::flatdisk().arg("mount").arg(folder.path()).arg(point.path()));
        let pid = daemon_of(point.path());
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL).unwrap();
        wait_until("the daemon is gone", || {
            std::fs::metadata(point.path()).is_err_and(|e| e.raw_os_error() == Some(libc::ENOTCONN))
        });
        if clear_by_mounting {
            live::succeed(live::flatdisk().arg("mount").arg(folder.path()).arg(point.path()));
            assert!(point.path().join("a.vhd.img").exists());
        }
        live::succeed(live::flatdisk().arg("umount").arg(point.path()));
        assert!(!live::is_mounted(point.path()));
    }
}

/// The process serving a mount point, found by its command line.
fn daemon_of(point: &Path) -> i32 {
    let wanted = point.to_str().unwrap();
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .find(|pid: &i32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|b| *b == 0).any(|word| word == wanted.as_bytes())
        })
        .expect("the daemon runs")
}
