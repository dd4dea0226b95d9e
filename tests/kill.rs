//! SIGKILL of the daemon: what fsync confirmed is there, and the image is consistent.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "common/pattern.rs"]
#[allow(dead_code)]
mod pattern;

mod live;

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use live::kinds::{KINDS, Kind};
use live::{Mount, create, flatdisk, outcome, scratch, succeed, wait_until};
use nix::fcntl::{FallocateFlags, fallocate};

const SECTOR: u64 = 512;
const PAGE: u64 = 4096;
/// The disk; its second half is fio's.
const SIZE: u64 = 64 << 20;
const OURS: u64 = SIZE / 2;
/// Programs that write at the same time.
const WRITERS: usize = 2;
/// Number of the write that filled the parent of a child.
const PARENT: u32 = 1;

/// How often the daemon is killed per kind of image.
fn kills() -> u64 {
    std::env::var("FLATDISK_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(5)
}

/// What is known of a sector. Numbers of writes grow.
#[derive(Debug, Clone, Copy, Default)]
struct Sector {
    /// The write that fsync confirmed last.
    confirmed: u32,
    /// The write that was begun last.
    begun: u32,
    /// The hole punched last, which has a number like a write.
    punched: u32,
}

impl Sector {
    /// Whether the sector at byte `at` may hold `found`; if so, which write that is.
    fn identify(&self, at: u64, found: &[u8]) -> Option<u32> {
        if found.iter().all(|b| *b == 0) {
            return (self.confirmed <= self.punched).then_some(self.punched);
        }
        let number = u32::from_be_bytes(found[4..8].try_into().unwrap());
        let whole = found == pattern::bytes(number, at, SECTOR);
        let known = (self.confirmed..=self.begun).contains(&number) && number != 0;
        (whole && known).then_some(number)
    }
}

/// A program that writes and notes what fsync confirmed. Its slots lie between those of the others, so
/// that blocks are shared.
struct Writer {
    slots: Vec<Range<u64>>,
    sectors: Vec<Sector>,
    next: u32,
    random: fastrand::Rng,
}

impl Writer {
    fn new(index: usize, initial: u32) -> Self {
        // Small slots share blocks and grains, large ones are blocks that can be given back.
        let small = (0..OURS / 2).step_by(64 << 10).map(|at| at..at + (64 << 10));
        let large = (OURS / 2..OURS).step_by(1 << 20).map(|at| at..at + (1 << 20));
        let sector = Sector { confirmed: initial, begun: initial, punched: 0 };
        Self {
            slots: small.chain(large).skip(index).step_by(WRITERS).collect(),
            sectors: vec![sector; (OURS / SECTOR) as usize],
            next: PARENT + 1 + index as u32,
            random: fastrand::Rng::with_seed(index as u64),
        }
    }

    fn number(&mut self) -> u32 {
        self.next += WRITERS as u32;
        self.next
    }

    fn sectors(&mut self, range: Range<u64>) -> &mut [Sector] {
        &mut self.sectors[(range.start / SECTOR) as usize..(range.end / SECTOR) as usize]
    }

    /// Writes until `stop` is set or something fails, and returns how many fsyncs succeeded.
    fn run(&mut self, flat: &File, stop: &AtomicBool, progress: &AtomicUsize) {
        while !stop.load(Ordering::Relaxed) {
            let mut touched = Vec::new();
            for _ in 0..self.random.usize(1..24) {
                let slot = self.slots[self.random.usize(..self.slots.len())].clone();
                let number = self.number();
                if self.random.u8(..16) == 0 {
                    touched.push(slot.clone());
                    for sector in self.sectors(slot.clone()) {
                        (sector.begun, sector.punched) = (number, number);
                    }
                    let mode =
                        FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                    let (at, len) = (slot.start as i64, (slot.end - slot.start) as i64);
                    if fallocate(flat, mode, at, len).is_err() {
                        return;
                    }
                    continue;
                }
                let pages = (slot.end - slot.start) / PAGE;
                let first = self.random.u64(..pages);
                let count = self.random.u64(1..=16.min(pages - first));
                let at = slot.start + first * PAGE;
                let range = at..at + count * PAGE;
                touched.push(range.clone());
                self.sectors(range).iter_mut().for_each(|sector| sector.begun = number);
                if flat.write_all_at(&pattern::bytes(number, at, count * PAGE), at).is_err() {
                    return;
                }
            }
            if flat.sync_data().is_err() {
                return;
            }
            progress.fetch_add(1, Ordering::Relaxed);
            for range in touched {
                self.sectors(range).iter_mut().for_each(|sector| sector.confirmed = sector.begun);
            }
        }
    }

    /// Compares with what is there now. That has survived, and so must survive from now on.
    fn verify(&mut self, flat: &File, context: &str) {
        for slot in self.slots.clone() {
            let mut found = vec![0; (slot.end - slot.start) as usize];
            flat.read_exact_at(&mut found, slot.start).unwrap();
            let sectors = self.sectors(slot.clone());
            for (index, (sector, found)) in
                sectors.iter_mut().zip(found.chunks(SECTOR as usize)).enumerate()
            {
                let at = slot.start + index as u64 * SECTOR;
                let Some(number) = sector.identify(at, found) else {
                    panic!(
                        "{context}: sector {} holds {}; {sector:?}",
                        at / SECTOR,
                        pattern::describe(found)
                    );
                };
                (sector.confirmed, sector.begun) = (number, number);
            }
        }
    }
}

/// fio at work on its half of the disk.
struct Load(Child);

impl Load {
    fn start(flat: &Path) -> Self {
        let half = (SIZE - OURS).to_string();
        let child = Command::new("fio")
            .args(["--name=load", "--ioengine=psync", "--rw=randwrite", "--bsrange=4k-64k"])
            .args(["--fsync=8", "--time_based", "--runtime=600", "--allow_file_create=0"])
            .args(["--thread", "--fallocate=none", "--offset", &half, "--size", &half])
            .arg("--filename")
            .arg(flat)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("start fio");
        Self(child)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `flatdisk check` finds no error; leaked space is allowed. Returns whether some leaked.
fn check(image: &Path) -> bool {
    let output = outcome(flatdisk().arg("check").arg(image));
    let status = output.status.code();
    assert!(
        status == Some(0) || status == Some(3),
        "check of {}: {status:?}\n{}",
        image.display(),
        String::from_utf8_lossy(&output.stdout)
    );
    status == Some(3)
}

fn open(mount: &Mount, kind: &Kind) -> File {
    OpenOptions::new().read(true).write(true).open(mount.flat(kind.image)).unwrap()
}

/// Kills the daemon of one image again and again; returns how many fsyncs were confirmed, and how often
/// space had leaked.
fn torment(kind: &Kind) -> (usize, usize) {
    let folder = scratch();
    let contents = pattern::bytes(PARENT, 0, OURS);
    let image = kind.make(folder.path(), "64M", &contents);
    let initial = if kind.parent.is_some() { PARENT } else { 0 };
    let mut writers: Vec<_> = (0..WRITERS).map(|index| Writer::new(index, initial)).collect();
    let mut random = fastrand::Rng::with_seed(7);
    let (mut mount, mut leaks) = (Mount::new(folder.path(), &[]), 0);
    let progress = AtomicUsize::new(0);
    for kill in 0..kills() {
        let context = format!("{}, kill {kill}", kind.image);
        let flat = open(&mount, kind);
        let stop = AtomicBool::new(false);
        let before = progress.load(Ordering::Relaxed);
        let load = Load::start(&mount.flat(kind.image));
        std::thread::scope(|scope| {
            for writer in &mut writers {
                scope.spawn(|| writer.run(&flat, &stop, &progress));
            }
            wait_until("some fsyncs", || progress.load(Ordering::Relaxed) >= before + 2);
            // The moment is what is random here.
            std::thread::sleep(Duration::from_micros(random.u64(..300_000)));
            // Every fourth time it comes while programs end and the image is being closed.
            if kill % 4 == 3 {
                stop.store(true, Ordering::Relaxed);
            } else {
                mount.kill_daemon();
            }
        });
        drop((flat, load));
        if kill % 4 == 3 {
            std::thread::sleep(Duration::from_micros(random.u64(..20_000)));
            mount.kill_daemon();
        }
        leaks += usize::from(check(&image));
        // Otherwise the next mount meets the image as the dead daemon left it.
        if random.bool() {
            succeed(flatdisk().args(["check", "--repair=leaks"]).arg(&image));
        }
        mount = mount.again(folder.path(), &[]);
        let flat = open(&mount, kind);
        writers.iter_mut().for_each(|writer| writer.verify(&flat, &context));
    }
    // Written once more and closed as it should be.
    let (flat, before, stop) = (open(&mount, kind), progress.load(Ordering::Relaxed), false.into());
    std::thread::scope(|scope| {
        for writer in &mut writers {
            scope.spawn(|| writer.run(&flat, &stop, &progress));
        }
        wait_until("some fsyncs", || progress.load(Ordering::Relaxed) >= before + 2);
        stop.store(true, Ordering::Relaxed);
    });
    drop(flat);
    assert!(mount.unmount().success());
    succeed(flatdisk().args(["check", "--repair=leaks"]).arg(&image));
    ask_qemu(kind, &image, &mut writers);
    (progress.into_inner(), leaks)
}

/// QEMU finds no error, and reads the same.
fn ask_qemu(kind: &Kind, image: &Path, writers: &mut [Writer]) {
    let Some(format) = kind.qemu.filter(|_| live::have(&["qemu-img"])) else { return };
    let checks = format != "vpc" && kind.image != "flat.vmdk";
    if checks {
        succeed(Command::new("qemu-img").args(["check", "-q", "-f", format]).arg(image));
    }
    let raw = image.with_extension("raw");
    let convert = ["convert", "-f", format, "-O", "raw"];
    succeed(Command::new("qemu-img").args(convert).arg(image).arg(&raw));
    let raw = File::open(raw).unwrap();
    writers.iter_mut().for_each(|writer| writer.verify(&raw, "as QEMU reads it"));
}

#[test]
fn what_fsync_confirmed_survives_the_daemon() {
    if !live::can_mount() || !live::have(&["fio"]) {
        return;
    }
    let only = std::env::var("FLATDISK_ONLY").unwrap_or_default();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(kind) = KINDS.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if kind.image.contains(&only) {
                        let (confirmed, leaks) = torment(kind);
                        let kills = kills();
                        println!(
                            "{}: {kills} kills, {confirmed} fsyncs, {leaks} leaks",
                            kind.image
                        );
                    }
                }
            });
        }
    });
}

#[test]
fn a_dead_daemons_mount_point_is_cleared_by_umount_and_by_mount() {
    if !live::can_mount() {
        return;
    }
    let _mounting = live::mounting();
    let folder = scratch();
    create(&folder.path().join("a.vhd"), "8M", &[]);
    let point = scratch();
    for clear_by_mounting in [false, true] {
        succeed(flatdisk().arg("mount").arg(folder.path()).arg(point.path()));
        let pid = daemon_of(point.path());
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL).unwrap();
        wait_until("the daemon is gone", || {
            std::fs::metadata(point.path()).is_err_and(|e| e.raw_os_error() == Some(libc::ENOTCONN))
        });
        if clear_by_mounting {
            succeed(flatdisk().arg("mount").arg(folder.path()).arg(point.path()));
            assert!(point.path().join("a.vhd.img").exists());
        }
        succeed(flatdisk().arg("umount").arg(point.path()));
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
