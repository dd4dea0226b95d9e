//! Opening and closing images all day long leaves nothing behind in the daemon.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use live::{Mount, create, flatdisk, have, names, outcome, scratch, succeed, unlink, wait_until};

/// Memory the daemon may have grown by: the table cache's limit is twice that.
const GROWTH: u64 = 16 << 20;

/// What a daemon holds.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    threads: usize,
}

fn held(mount: &Mount) -> Held {
    let list =
        |what: &str| fs::read_dir(format!("/proc/{}/{what}", mount.pid())).unwrap().flatten();
    // Spare threads come with the load and go some time after it.
    let lasts = |task: &fs::DirEntry| {
        fs::read_to_string(task.path().join("comm")).is_ok_and(|name| !name.starts_with("spare"))
    };
    Held { descriptors: list("fd").count(), threads: list("task").filter(lasts).count() }
}

/// A program that works on a flat file, ended when dropped.
struct Load(Child);

impl Load {
    fn on(flat: &Path) -> Self {
        let mut fio = Command::new("fio");
        fio.args(["--name=load", "--rw=randrw", "--bs=4k", "--size=32M", "--direct=1", "--thread"]);
        fio.args(["--time_based", "--runtime=600", "--fsync=64"]).arg("--filename").arg(flat);
        Self(fio.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Opens, uses and closes images by every way there is, `rounds` times.
fn open_and_close(mount: &Mount, images: &[PathBuf], rounds: usize) {
    let done = AtomicUsize::new(0);
    let next = || Some(done.fetch_add(1, Ordering::Relaxed)).filter(|n| *n < rounds);
    let by_link = |worker: usize| {
        while let Some(round) = next() {
            let name = mount.path().join(format!("{worker}-{round}.img"));
            symlink(&images[round % images.len()], &name).unwrap();
            let mut sector = [0; 512];
            let file = File::options().read(true).write(round % 3 == 0).open(&name);
            match file {
                Ok(file) => file.read_exact_at(&mut sector, 4096 * round as u64).unwrap(),
                // Another worker writes to the image under another name.
                Err(e) => assert_eq!(e.raw_os_error(), Some(libc::EBUSY), "{e}"),
            }
            unlink(&name);
        }
    };
    let by_command = |image: &Path| {
        while next().is_some() {
            let opened = succeed(flatdisk().arg("open").arg(image).arg(mount.path()));
            let flat = PathBuf::from(opened.trim());
            assert_eq!(fs::metadata(&flat).unwrap().len(), 8 << 20);
            let close = || outcome(flatdisk().arg("close").arg(&flat)).status.success();
            wait_until("the image can be closed", close);
        }
    };
    std::thread::scope(|scope| {
        for worker in 0..2 {
            scope.spawn(move || by_link(worker));
        }
        scope.spawn(|| by_command(&images[0]));
    });
}

#[test]
fn a_thousand_opens_and_closes_under_load_leave_nothing() {
    if !live::can_mount() || !have(&["fio"]) {
        return;
    }
    let (folder, other) = (scratch(), scratch());
    create(&folder.path().join("busy.vhdx"), "64M", &["--block-size", "1M"]);
    let images: Vec<PathBuf> = ["vhd", "vhdx", "vmdk"]
        .iter()
        .map(|extension| other.path().join(format!("e.{extension}")))
        .collect();
    images.iter().for_each(|image| create(image, "8M", &[]));
    let mount = Mount::new(folder.path(), &[]);
    let load = Load::on(&mount.flat("busy.vhdx"));
    wait_until("the load has begun", || !mount.open_files(folder.path()).is_empty());
    open_and_close(&mount, &images, 50);
    wait_until("images are closed", || mount.open_files(other.path()).is_empty());
    let (before, memory) = (held(&mount), mount.memory());
    open_and_close(&mount, &images, 1000);
    wait_until("images are closed", || mount.open_files(other.path()).is_empty());
    wait_until("descriptors and threads are as before", || {
        let now = held(&mount);
        now.descriptors <= before.descriptors && now.threads <= before.threads
    });
    let grown = mount.memory().saturating_sub(memory);
    assert!(grown < GROWTH, "grown by {grown} bytes");
    assert_eq!(names(mount.path()), ["busy.vhdx.img"]);
    drop(load);
    wait_until("the image is closed", || mount.open_files(folder.path()).is_empty());
    assert!(mount.unmount().success());
    for image in images.iter().chain([&folder.path().join("busy.vhdx")]) {
        let check = outcome(flatdisk().arg("check").arg(image));
        // fio was killed without a last flush.
        assert!(matches!(check.status.code(), Some(0 | 3)), "{check:?}");
    }
}

#[test]
fn a_thousand_images_that_somebody_looked_into_are_closed_again() {
    if !live::can_mount() {
        return;
    }
    let folder = scratch();
    let first = folder.path().join("0.vhd");
    create(&first, "8M", &[]);
    for i in 1..1000 {
        fs::copy(&first, folder.path().join(format!("{i}.vhd"))).unwrap();
    }
    let mount = Mount::new(folder.path(), &[]);
    let look = |name: &String| {
        // As a thumbnailer does: attributes, the beginning, and somewhere in the middle.
        let path = mount.path().join(name);
        assert_eq!(fs::metadata(&path).unwrap().len(), 8 << 20);
        let file = File::open(path).unwrap();
        for offset in [0, 4 << 20] {
            file.read_exact_at(&mut [0; 4096], offset).unwrap();
        }
    };
    let all = names(mount.path());
    assert_eq!(all.len(), 1000);
    look(&all[0]);
    wait_until("images are closed", || mount.open_files(folder.path()).is_empty());
    let (before, memory) = (held(&mount), mount.memory());
    std::thread::scope(|scope| {
        for part in all.chunks(250) {
            scope.spawn(move || part.iter().for_each(look));
        }
    });
    wait_until("images are closed", || mount.open_files(folder.path()).is_empty());
    wait_until("descriptors and threads are as before", || held(&mount) == before);
    let grown = mount.memory().saturating_sub(memory);
    assert!(grown < GROWTH, "grown by {grown} bytes");
    assert!(mount.unmount().success());
}
