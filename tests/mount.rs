//! The mount as programs and people meet it: files, commands, signals, exit statuses.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use flatdisk::fuse::control::{Answer, Connection, Request};
use flatdisk::fuse::mounts;
use live::{
    Mount, create, flatdisk, have, is_mounted, names, outcome, scratch, succeed, unlink, wait_until,
};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Whence, lseek64};

/// A mount in the background, unmounted when dropped.
struct Background {
    point: tempfile::TempDir,
    _mounting: live::Mounting,
}

impl Background {
    fn new(source: &Path, options: &[&str]) -> Self {
        let (point, mounting) = (scratch(), live::mounting());
        let output = outcome(flatdisk().arg("mount").args(options).arg(source).arg(point.path()));
        assert!(output.status.success(), "{}", stderr(&output));
        // Live at once: the command waits for it.
        assert!(is_mounted(point.path()));
        Self { point, _mounting: mounting }
    }

    fn path(&self) -> &Path {
        self.point.path()
    }

    fn pid(&self) -> Pid {
        let status = succeed(flatdisk().args(["status", "--json"]).arg(self.path()));
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        Pid::from_raw(status["mounts"][0]["pid"].as_i64().unwrap() as i32)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if is_mounted(self.path()) {
            let _ = outcome(flatdisk().args(["umount", "--lazy"]).arg(self.path()));
        }
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A folder with a dynamic VHD of 64 MiB called `a.vhd`.
fn folder() -> tempfile::TempDir {
    let folder = scratch();
    create(&folder.path().join("a.vhd"), "64M", &[]);
    folder
}

fn writer(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

/// Asks the daemon from this very process: starting another one closes inherited files, which
/// flushes them.
fn ask(point: &Path, request: &Request) -> Answer {
    let mount = mounts::mounted_at(point).unwrap().unwrap();
    let answer = Connection::to(&mount).unwrap().ask(request).unwrap();
    assert_eq!(answer.errors, Vec::<String>::new());
    answer
}

/// Whether the one image in use holds writes that wait for a flush.
fn unflushed(point: &Path) -> bool {
    let status = ask(point, &Request::Status).status.unwrap();
    assert_eq!((status.images.len(), status.images[0].writers), (1, 1));
    status.images[0].unflushed
}

fn alive(pid: Pid) -> bool {
    kill(pid, None).is_ok()
}

fn mode_of(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o777
}

#[test]
fn a_flat_file_behaves_like_the_disk_it_is() {
    if !live::can_mount() {
        return;
    }
    let folder = folder();
    let image = folder.path().join("a.vhd");
    let mount = Mount::new(folder.path(), &[]);
    let flat = mount.flat("a.vhd");
    let before = fs::metadata(&flat).unwrap();
    assert_eq!((before.len(), before.is_file()), (64 << 20, true));
    assert_eq!(before.blocks(), fs::metadata(&image).unwrap().blocks());
    assert_eq!(before.mode(), fs::metadata(&image).unwrap().mode());

    let file = writer(&flat);
    let data: Vec<u8> = (0..5 << 20).map(|i: u32| (i / 7) as u8).collect();
    file.write_all_at(&data, 3_000_001).unwrap();
    file.sync_all().unwrap();
    let mut read = vec![1; data.len()];
    file.read_exact_at(&mut read, 3_000_001).unwrap();
    assert!(read == data);
    let hole = lseek64(&file, 0, Whence::SeekData).unwrap();
    assert!(hole > 0 && hole <= 3_000_001, "{hole}");
    assert_eq!(lseek64(&file, 0, Whence::SeekHole), Ok(0));
    assert!(lseek64(&file, 3_000_001, Whence::SeekHole).unwrap() >= 3_000_001 + (5 << 20));
    assert_eq!(lseek64(&file, 64 << 20, Whence::SeekData), Err(Errno::ENXIO));

    let full = file.metadata().unwrap().blocks();
    let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, FallocateFlags::FALLOC_FL_PUNCH_HOLE | keep, 0, 64 << 20).unwrap();
    file.sync_all().unwrap();
    assert!(file.metadata().unwrap().blocks() + 8192 < full);
    file.read_exact_at(&mut read, 3_000_001).unwrap();
    assert!(read.iter().all(|b| *b == 0));
    fallocate(&file, FallocateFlags::FALLOC_FL_ZERO_RANGE | keep, 0, 1 << 20).unwrap();
    fallocate(&file, FallocateFlags::empty(), 0, 1 << 20).unwrap();
    let too_far = fallocate(&file, FallocateFlags::empty(), 0, 65 << 20);
    assert_eq!(too_far, Err(Errno::EPERM));

    assert_eq!(file.set_len(1).unwrap_err().raw_os_error(), Some(libc::EPERM));
    // Truncating at open(2) is ignored, as by a block device.
    drop(File::options().write(true).truncate(true).open(&flat).unwrap());
    assert_eq!(fs::metadata(&flat).unwrap().len(), 64 << 20);
    fs::write(&flat, "boot").unwrap();
    read.truncate(6);
    file.read_exact_at(&mut read, 1 << 20).unwrap();
    assert_eq!(read, [0; 6]);
    file.read_exact_at(&mut read, 0).unwrap();
    assert_eq!(&read, b"boot\0\0");
    let shortened = nix::unistd::truncate(&flat, 0);
    assert_eq!(shortened, Err(Errno::EPERM));
    let past_end = file.write_at(b"x", 64 << 20).unwrap_err();
    assert_eq!(past_end.raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(file.read_at(&mut read, 64 << 20).unwrap(), 0);
    drop(file);
    assert!(mount.unmount().success());
}

#[test]
fn what_was_written_is_in_the_image_after_umount() {
    if !live::can_mount() {
        return;
    }
    let folder = folder();
    let mount = Background::new(folder.path(), &[]);
    let pid = mount.pid();
    writer(&mount.path().join("a.vhd.img")).write_all_at(b"kept", 40_000_000).unwrap();
    succeed(flatdisk().arg("umount").arg(mount.path()));
    assert!(!is_mounted(mount.path()));
    // umount(2) alone would not wait for this.
    let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let open = files.filter_map(|fd| fs::read_link(fd.path()).ok());
    let open: Vec<_> = open.filter(|file| file.starts_with(folder.path())).collect();
    // The folder itself, from which images are opened, is the daemon's to the end.
    let images: Vec<_> = open.into_iter().filter(|file| file != folder.path()).collect();
    assert!(images.is_empty(), "{images:?}");
    wait_until("the daemon is gone", || !alive(pid));
    let mount = Background::new(&folder.path().join("a.vhd"), &["--ro"]);
    let mut read = [0; 4];
    let flat = File::open(mount.path().join("a.vhd.img")).unwrap();
    flat.read_exact_at(&mut read, 40_000_000).unwrap();
    assert_eq!(&read, b"kept");
    assert_eq!(mode_of(&mount.path().join("a.vhd.img")) & 0o222, 0);
}

/// The kernel gives the device number of a mount that is gone to the next one at once.
#[test]
fn a_daemon_that_ends_leaves_the_mount_alone_that_has_its_device_number_now() {
    if !live::can_mount() {
        return;
    }
    let round = |folder: &Path| {
        let mount = Background::new(folder, &[]);
        // Not opened here: a process that another thread starts would hold it for a moment, too.
        let mut dd = Command::new("dd");
        dd.args(["if=/dev/zero", "bs=4096", "count=1", "conv=notrunc", "status=none"]);
        succeed(dd.arg(format!("of={}", mount.path().join("a.vhd.img").display())));
        succeed(flatdisk().arg("umount").arg(mount.path()));
    };
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let folder = folder();
                (0..50).for_each(|_| round(folder.path()));
            });
        }
    });
}

#[test]
fn names_are_read_only_and_refusals_are_those_of_a_read_only_directory() {
    if !live::can_mount() {
        return;
    }
    let folder = folder();
    fs::create_dir(folder.path().join("sub")).unwrap();
    let mount = Mount::new(folder.path(), &[]);
    let inside = |name: &str| mount.path().join(name);
    let errno = |result: std::io::Result<()>| result.unwrap_err().raw_os_error();
    assert_eq!(errno(File::create(inside("new")).map(drop)), Some(libc::EROFS));
    assert_eq!(errno(fs::create_dir(inside("new"))), Some(libc::EROFS));
    assert_eq!(errno(fs::rename(inside("a.vhd.img"), inside("b"))), Some(libc::EROFS));
    assert_eq!(errno(fs::hard_link(inside("a.vhd.img"), inside("b"))), Some(libc::EROFS));
    assert_eq!(errno(fs::remove_file(inside("a.vhd.img"))), Some(libc::EROFS));
    assert_eq!(errno(fs::remove_dir(inside("sub"))), Some(libc::EROFS));
    assert_eq!(errno(symlink("/x/y.vhd", inside("sub/b"))), Some(libc::EROFS));
    assert_eq!(errno(symlink("/absent.vhd", inside("b"))), Some(libc::ENOENT));
    assert!(folder.path().join("a.vhd").exists());
    assert!(mount.unmount().success());
}

#[test]
fn extended_attributes_and_space_are_shown() {
    if !live::can_mount() || !have(&["getfattr"]) {
        return;
    }
    let folder = folder();
    let mount = Mount::new(folder.path(), &[]);
    let shown =
        succeed(Command::new("getfattr").args(["-d", "--absolute-names"]).arg(mount.flat("a.vhd")));
    for line in [
        "user.flatdisk.format=\"vhd\"",
        "user.flatdisk.virtual-size=\"67108864\"",
        "user.flatdisk.sector-size=\"512\"",
    ] {
        assert!(shown.contains(line), "{shown}");
    }
    let (here, host) = (
        nix::sys::statvfs::statvfs(mount.path()).unwrap(),
        nix::sys::statvfs::statvfs(folder.path()).unwrap(),
    );
    assert_eq!((here.blocks(), here.fragment_size()), (host.blocks(), host.fragment_size()));
    assert!(mount.unmount().success());
}

#[test]
fn looking_and_reading_change_nothing_and_leave_nothing_open() {
    if !live::can_mount() {
        return;
    }
    let folder = folder();
    let image = folder.path().join("a.vhd");
    let before = (live::sha256(&image), fs::metadata(&image).unwrap().mtime_nsec());
    let mount = Mount::new(folder.path(), &[]);
    fs::read(mount.flat("a.vhd")).unwrap();
    // Opening to write is no change either.
    drop(writer(&mount.flat("a.vhd")));
    wait_until("the image is closed", || mount.open_files(folder.path()).is_empty());
    assert!(mount.unmount().success());
    assert_eq!(before, (live::sha256(&image), fs::metadata(&image).unwrap().mtime_nsec()));
}

#[test]
fn new_renamed_and_deleted_images_show_without_a_remount() {
    if !live::can_mount() {
        return;
    }
    let folder = folder();
    let mount = Mount::new(folder.path(), &[]);
    assert_eq!(names(mount.path()), ["a.vhd.img"]);
    fs::copy(folder.path().join("a.vhd"), folder.path().join("b.vhd")).unwrap();
    assert!(mount.flat("b.vhd").exists());
    fs::rename(folder.path().join("a.vhd"), folder.path().join("c.vhd")).unwrap();
    assert_eq!(names(mount.path()), ["b.vhd.img", "c.vhd.img"]);
    fs::remove_file(folder.path().join("b.vhd")).unwrap();
    wait_until("the deleted image is gone", || !mount.flat("b.vhd").exists());
    let old = fs::metadata(mount.flat("c.vhd")).unwrap().ino();
    create(&folder.path().join("new"), "32M", &["--format", "vhd"]);
    fs::rename(folder.path().join("new"), folder.path().join("c.vhd")).unwrap();
    wait_until("the new image shows", || {
        fs::metadata(mount.flat("c.vhd")).is_ok_and(|m| m.len() == 32 << 20 && m.ino() != old)
    });
    assert!(mount.unmount().success());
}

#[test]
fn a_changed_image_is_read_anew_and_an_unchanged_one_from_the_cache() {
    if !live::can_mount() || !have(&["qemu-io"]) {
        return;
    }
    let folder = folder();
    let image = folder.path().join("a.vhd");
    let mount = Mount::new(folder.path(), &[]);
    let first_byte = || {
        let mut byte = [0xff];
        File::open(mount.flat("a.vhd")).unwrap().read_exact_at(&mut byte, 0).unwrap();
        byte[0]
    };
    assert_eq!(first_byte(), 0);
    for pattern in [1, 2, 3] {
        wait_until("the image is closed", || mount.open_files(folder.path()).is_empty());
        let write = format!("write -P {pattern} 0 4096");
        succeed(Command::new("qemu-io").args(["-f", "vpc", "-c", &write]).arg(&image));
        assert_eq!(first_byte(), pattern);
    }
    assert!(mount.unmount().success());
}

#[test]
fn throw_away_writing_lasts_until_unmount_and_leaves_the_image_alone() {
    if !live::can_mount() || !have(&["mkfs.ext4"]) {
        return;
    }
    let (folder, scratch) = (folder(), live::scratch());
    let image = folder.path().join("a.vhd");
    let before = live::sha256(&image);
    let option = format!("--nonpersistent={}", scratch.path().display());
    let mount = Mount::new(folder.path(), &[&option]);
    let flat = mount.flat("a.vhd");
    // Two programs, one after the other, that must find the same disk.
    succeed(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&flat));
    let device = live::Loop::new(&flat, &[]);
    let files = live::MountedFs::new(&device.device, &[]);
    fs::write(files.path().join("x"), "kept for now").unwrap();
    files.unmount();
    drop(device);
    // The kernel forgets the file; what was written to it must not be forgotten with it.
    fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
    assert!(fs::read(&flat).unwrap().windows(12).any(|text| text == b"kept for now"));
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0, "scratch files have no names");
    let status = ask(mount.path(), &Request::Status).status.unwrap();
    assert!(status.images[0].throw_away.is_some_and(|bytes| bytes > 0), "{status:?}");
    assert!(mount.unmount().success());
    assert_eq!(live::sha256(&image), before);

    // Taken out of the mount, an image starts anew.
    let mount = Mount::new(&image, &[&option]);
    let flat = mount.flat("a.vhd");
    for _ in 0..2 {
        assert_eq!(fs::read(&flat).unwrap()[1 << 20], 0);
        writer(&flat).write_all_at(b"gone", 1 << 20).unwrap();
        assert_eq!(fs::read(&flat).unwrap()[1 << 20], b'g');
        unlink(&flat);
        symlink(&image, &flat).unwrap();
    }
    assert!(mount.unmount().success());
    assert_eq!(live::sha256(&image), before);
}

#[test]
fn a_throw_away_write_does_not_reach_a_flat_extent_that_is_being_read() {
    if !live::can_mount() {
        return;
    }
    let folder = scratch();
    create(&folder.path().join("a.vmdk"), "8M", &["--subformat", "monolithicFlat"]);
    let extent = folder.path().join("a-flat.vmdk");
    let before = live::sha256(&extent);
    let mount = Mount::new(folder.path(), &["--nonpersistent"]);
    let reader = File::open(mount.flat("a.vmdk")).unwrap();
    let mut read = [0; 4];
    reader.read_exact_at(&mut read, 4096).unwrap();
    let file = writer(&mount.flat("a.vmdk"));
    file.write_all_at(b"gone", 1 << 20).unwrap();
    file.sync_all().unwrap();
    reader.read_exact_at(&mut read, 1 << 20).unwrap();
    assert_eq!(&read, b"gone");
    drop((reader, file));
    assert!(mount.unmount().success());
    assert_eq!(live::sha256(&extent), before);
}

#[test]
fn a_child_is_made_and_written_while_its_parent_is_read() {
    if !live::can_mount() || !have(&["getfattr"]) {
        return;
    }
    let folder = folder();
    let mount = Mount::new(folder.path(), &[]);
    let (parent, child) = (mount.flat("a.vhd"), mount.flat("b.vhd"));
    let make = || {
        let (a, b) = (folder.path().join("a.vhd"), folder.path().join("b.vhd"));
        outcome(flatdisk().args(["create", "-q", "--parent"]).arg(a).arg(b))
    };
    let base = writer(&parent);
    base.write_all_at(b"base", 4096).unwrap();
    let refused = make();
    assert!(!refused.status.success() && stderr(&refused).contains("in use"), "{refused:?}");
    drop(base);
    wait_until("the image is closed", || mount.open_files(folder.path()).is_empty());

    let reader = File::open(&parent).unwrap();
    let read = |file: &File| {
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, 4096).unwrap();
        bytes
    };
    assert_eq!(&read(&reader), b"base");
    assert!(make().status.success());
    wait_until("the child shows", || child.exists());
    let written = writer(&child);
    assert_eq!(&read(&written), b"base");
    written.write_all_at(b"next", 4096).unwrap();
    written.sync_all().unwrap();
    assert_eq!((&read(&written), &read(&reader)), (b"next", b"base"));

    // What is a parent now is not written, and says why.
    let refused = File::options().write(true).open(&parent).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS), "{refused}");
    let mut xattr = Command::new("getfattr");
    xattr.args(["-n", "user.flatdisk.readonly", "--only-values", "--absolute-names"]);
    let why = succeed(xattr.arg(&parent));
    assert!(why.contains("b.vhd is made from it"), "{why}");
    let status = ask(mount.path(), &Request::Status).status.unwrap();
    let status = |name: &str| {
        let mut images = status.images.iter();
        images.find(|image| image.image.ends_with(name)).unwrap()
    };
    assert_eq!(status("a.vhd").read_only.as_deref(), Some(&*why));
    let parent = flatdisk::names::Name(folder.path().join("a.vhd").canonicalize().unwrap());
    assert_eq!(status("b.vhd").parents, [parent]);
    drop((reader, written));
    assert!(mount.unmount().success());
}

#[test]
fn an_image_is_mounted_over_the_parent_that_the_user_names() {
    if !live::can_mount() {
        return;
    }
    let (folder, elsewhere) = (folder(), scratch());
    let image = |name: &str| folder.path().join(name);
    succeed(flatdisk().args(["create", "-q", "--parent"]).arg(image("a.vhd")).arg(image("b.vhd")));
    let moved = elsewhere.path().join("base of b");
    fs::rename(image("a.vhd"), &moved).unwrap();
    let given = format!("parent={}", moved.display());
    let point = scratch();
    let refused = |source: &Path, options: &[&str]| {
        let output = outcome(flatdisk().arg("mount").args(options).arg(source).arg(point.path()));
        assert!(!output.status.success());
        stderr(&output)
    };
    assert!(refused(&image("b.vhd"), &[]).contains("parent=FILE"));
    assert!(refused(folder.path(), &["-o", &given]).contains("exactly one image"));
    let mount = Mount::new(&image("b.vhd"), &["-o", &given]);
    writer(&mount.flat("b.vhd")).write_all_at(b"x", 0).unwrap();
    assert!(mount.unmount().success());
}

#[test]
fn writes_reach_the_image_within_five_seconds() {
    if !live::can_mount() {
        return;
    }
    let folder = folder();
    let mount = Mount::new(folder.path(), &[]);
    let file = writer(&mount.flat("a.vhd"));
    let begun = std::time::Instant::now();
    file.write_all_at(b"soon", 0).unwrap();
    wait_until("the flush", || !unflushed(mount.path()));
    assert!(begun.elapsed().as_secs() < 5, "{:?}", begun.elapsed());
    // Again, should a program that another test starts flush by closing copies of our files.
    wait_until("a write to be flushed", || {
        file.write_all_at(b"now", 0).unwrap();
        unflushed(mount.path())
    });
    ask(mount.path(), &Request::Sync { patience: std::time::Duration::from_secs(60) });
    assert!(!unflushed(mount.path()));
    drop(file);
    assert!(mount.unmount().success());
}

#[test]
fn umount_of_a_mount_in_use_fails_and_says_who() {
    if !live::can_mount() {
        return;
    }
    let folder = folder();
    let mount = Mount::new(folder.path(), &[]);
    let file = writer(&mount.flat("a.vhd"));
    let output = outcome(flatdisk().arg("umount").arg(mount.path()));
    assert_eq!(output.status.code(), Some(32));
    let said = stderr(&output);
    assert!(said.contains(&format!("process {}", std::process::id())), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    file.write_all_at(b"still served", 0).unwrap();
    drop(file);
    assert!(mount.unmount().success());
}

#[test]
fn every_signal_to_stop_flushes_unmounts_and_ends_with_success() {
    if !live::can_mount() {
        return;
    }
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let folder = folder();
        let mount = Background::new(folder.path(), &[]);
        let pid = mount.pid();
        // By another program: of files open here, one that another test starts holds copies for a
        // moment, and the mount would be in use.
        let write = ["if=/dev/zero", "bs=4k", "count=1", "conv=notrunc", "status=none"];
        let flat = format!("of={}", mount.path().join("a.vhd.img").display());
        succeed(Command::new("dd").args(write).arg(flat));
        kill(pid, signal).unwrap();
        wait_until("the daemon is gone", || !alive(pid));
        assert!(!is_mounted(mount.path()));
        succeed(flatdisk().arg("check").arg(folder.path().join("a.vhd")));
    }
}

#[test]
fn a_busy_mount_survives_the_first_signal_and_not_the_second() {
    if !live::can_mount() {
        return;
    }
    let folder = folder();
    let mount = Background::new(folder.path(), &[]);
    let pid = mount.pid();
    let file = writer(&mount.path().join("a.vhd.img"));
    file.write_all_at(b"first", 0).unwrap();
    kill(pid, Signal::SIGTERM).unwrap();
    wait_until("the signal's flush", || !unflushed(mount.path()));
    file.write_all_at(b"again", 0).unwrap();
    assert!(is_mounted(mount.path()));
    wait_until("the second signal detaches", || {
        let _ = kill(pid, Signal::SIGTERM);
        !is_mounted(mount.path())
    });
    file.write_all_at(b"third", 0).unwrap();
    assert!(alive(pid));
    drop(file);
    wait_until("the daemon is gone", || !alive(pid));
    succeed(flatdisk().arg("check").arg(folder.path().join("a.vhd")));
}

#[test]
fn images_open_and_close_at_run_time() {
    if !live::can_mount() {
        return;
    }
    let (first, second) = (folder(), scratch());
    let extra = second.path().join("e.vhd");
    create(&extra, "8M", &[]);
    fs::write(second.path().join("bad.vhd"), "junk").unwrap();
    let mount = Mount::new(first.path(), &[]);
    symlink(&extra, mount.path().join("linked.img")).unwrap();
    let linked = mount.path().join("linked.img");
    let meta = fs::symlink_metadata(&linked).unwrap();
    assert_eq!((meta.len(), meta.is_file()), (8 << 20, true));
    let file = writer(&linked);
    assert_eq!(fs::remove_file(&linked).unwrap_err().raw_os_error(), Some(libc::EBUSY));
    drop(file);
    wait_until("the link is free", || fs::remove_file(&linked).is_ok());
    assert!(!linked.exists() && extra.exists());

    let opened = succeed(flatdisk().arg("open").arg(&extra).arg(mount.path()));
    let flat = mount.flat("e.vhd");
    assert_eq!(Path::new(opened.trim()), flat);
    assert!(flat.exists());
    let output =
        outcome(flatdisk().arg("open").arg(second.path().join("bad.vhd")).arg(mount.path()));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("bad.vhd"), "{}", stderr(&output));
    let file = File::open(&flat).unwrap();
    let output = outcome(flatdisk().arg("close").arg(&flat));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("is open"), "{}", stderr(&output));
    drop(file);
    wait_until("the image closes", || outcome(flatdisk().arg("close").arg(&flat)).status.success());
    assert!(!flat.exists());
    assert!(mount.unmount().success());
}

#[test]
fn mount_reports_readiness_to_systemd() {
    if !live::can_mount() {
        return;
    }
    let _mounting = live::mounting();
    let folder = folder();
    let socket = folder.path().join("notify");
    let listener = UnixDatagram::bind(&socket).unwrap();
    listener.set_read_timeout(Some(std::time::Duration::from_secs(30))).unwrap();
    let point = scratch();
    let mut daemon = flatdisk()
        .args(["mount", "-f"])
        .arg(folder.path())
        .arg(point.path())
        .env("NOTIFY_SOCKET", &socket)
        .spawn()
        .unwrap();
    let mut said = [0; 1024];
    let mut hear = || {
        let len = listener.recv(&mut said).unwrap();
        String::from_utf8_lossy(&said[..len]).into_owned()
    };
    assert!(hear().starts_with("READY=1"));
    assert!(is_mounted(point.path()));
    kill(Pid::from_raw(daemon.id() as i32), Signal::SIGTERM).unwrap();
    assert!(hear().starts_with("STOPPING=1"));
    assert!(daemon.wait().unwrap().success());
}

/// Runs a helper of mount(8) by the name it has there.
fn helper(name: &str, arguments: &[&dyn AsRef<OsStr>]) -> Output {
    let dir = scratch();
    let link = dir.path().join(name);
    symlink(env!("CARGO_BIN_EXE_flatdisk"), &link).unwrap();
    outcome(Command::new(link).args(arguments.iter().map(|a| a.as_ref())))
}

#[test]
fn helpers_of_mount_and_umount_work_by_their_names() {
    if !live::can_mount() {
        return;
    }
    let _mounting = live::mounting();
    let folder = folder();
    let point = scratch();
    let (from, to) = (folder.path(), point.path());
    for (mount, umount) in [
        ("mount.flatdisk", "umount.flatdisk"),
        ("mount.fuse.flatdisk", "umount.fuse.flatdisk"),
        ("mount.flatdisk", "umount.fuse.flatdisk"),
    ] {
        let output = helper(mount, &[&from, &to, &"-n", &"-v", &"-o", &"ro,nosuid,user"]);
        assert!(output.status.success(), "{}", stderr(&output));
        // Listed by another program, of which nothing is open when it has ended.
        assert_eq!(succeed(Command::new("ls").arg(to)).trim(), "a.vhd.img");
        assert_eq!(mode_of(&to.join("a.vhd.img")) & 0o222, 0);
        let output = helper(umount, &[&to, &"-n", &"-t", &"fuse.flatdisk"]);
        assert!(output.status.success() && !is_mounted(to), "{}", stderr(&output));
    }
    // Everything but mounting.
    assert!(helper("mount.flatdisk", &[&from, &to, &"-f", &"-o", &"rw"]).status.success());
    assert!(!is_mounted(to));
    // As mount.fuse3 calls it.
    succeed(flatdisk().arg(from).arg(to).args(["-o", "rw,dev,suid"]));
    assert!(is_mounted(to));
    succeed(flatdisk().arg("umount").arg(to));
    for (arguments, status) in [
        (&[&from as &dyn AsRef<OsStr>, &to, &"-o", &"nonsense"][..], 1),
        (&[&from, &to, &"-o", &"remount"], 1),
        (&[&from], 1),
        (&[&"/absent", &to], 32),
        (&[&from, &"/absent"], 32),
    ] {
        let output = helper("mount.flatdisk", arguments);
        assert_eq!(output.status.code(), Some(status), "{}", stderr(&output));
    }
    assert!(helper("mount.flatdisk", &[&from, &to, &"-s", &"-o", &"nonsense"]).status.success());
    assert!(helper("umount.flatdisk", &[&to]).status.success());
    assert_eq!(helper("umount.flatdisk", &[&to]).status.code(), Some(32));
}

#[test]
fn the_daemon_leaves_terminal_directory_and_files_behind() {
    if !live::can_mount() {
        return;
    }
    let folder = folder();
    let mount = Background::new(folder.path(), &[]);
    let process = PathBuf::from(format!("/proc/{}", mount.pid()));
    assert_eq!(fs::read_link(process.join("cwd")).unwrap(), Path::new("/"));
    for fd in ["0", "1", "2"] {
        assert_eq!(fs::read_link(process.join("fd").join(fd)).unwrap(), Path::new("/dev/null"));
    }
    let stat = fs::read_to_string(process.join("stat")).unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    // Its own session: process group and session are the process.
    assert_eq!((fields[2], fields[3]), (&*mount.pid().to_string(), &*mount.pid().to_string()));
}

#[test]
fn umount_does_not_wait_for_another_mount_of_the_same() {
    if !live::can_mount() {
        return;
    }
    let folder = folder();
    let mount = Background::new(folder.path(), &[]);
    let pid = mount.pid();
    let other = scratch();
    succeed(Command::new("mount").arg("--bind").arg(mount.path()).arg(other.path()));
    let output = outcome(flatdisk().arg("umount").arg(mount.path()));
    assert!(output.status.success());
    let place = format!("still mounted on {}", other.path().display());
    assert!(stderr(&output).contains(&place), "{}", stderr(&output));
    assert!(!is_mounted(mount.path()) && other.path().join("a.vhd.img").exists());
    let output = outcome(flatdisk().arg("umount").arg(other.path()));
    assert!(output.status.success() && output.stderr.is_empty(), "{}", stderr(&output));
    wait_until("the daemon is gone", || !alive(pid));
}

#[test]
fn umount_does_not_wait_for_another_mount_namespace() {
    if !live::can_mount() || !have(&["unshare"]) {
        return;
    }
    let (folder, point, scratch) = (folder(), scratch(), scratch());
    let script = r#"
        set -eu
        "$FLATDISK" mount "$FROM" "$TO"
        trap 'umount -il "$TO" 2>/dev/null || true' EXIT
        mkfifo "$T/ready" "$T/end"
        # A copy of the mount, as long as nobody writes to the pipe.
        unshare -m sh -c 'echo > "$T/ready"; read line < "$T/end"' &
        read line < "$T/ready"
        "$FLATDISK" umount "$TO" 2> "$T/said"
        grep -q "still mounted on $TO in the mount namespace of process" "$T/said"
        grep -q "$TO" "/proc/$!/mountinfo"
        echo > "$T/end"
        wait
    "#;
    live::succeed_in_namespace(
        script,
        &[("FROM", &folder.path()), ("TO", &point.path()), ("T", &scratch.path())],
    );
}

#[test]
fn users_other_than_root_mount_and_are_kept_apart() {
    if !live::can_mount() || !have(&["setpriv", "fusermount3", "unshare"]) {
        return;
    }
    let (folder, point, scratch) = (folder(), scratch(), scratch());
    // In a mount namespace whose /dev/fuse is for everybody, as on most machines.
    let script = r#"
        set -eu
        mknod "$T/fuse" c 10 229; chmod 666 "$T/fuse"
        mount --bind "$T/fuse" /dev/fuse
        printf '' > "$T/fuse.conf"; mount --bind "$T/fuse.conf" /etc/fuse.conf
        cp "$FLATDISK" "$T/flatdisk"; chmod 755 "$T"
        chown -R 65534:65534 "$FROM" "$TO"
        nobody() { setpriv --reuid=65534 --regid=65534 --clear-groups -- "$T/flatdisk" "$@"; }
        refused() { if "$@" >/dev/null 2>&1; then echo "succeeds: $*" >&2; exit 9; fi; }
        trap 'umount -il "$TO" 2>/dev/null || true' EXIT
        set -x

        status=0; nobody mount --allow-other "$FROM" "$TO" 2>"$T/err" || status=$?
        [ $status = 32 ]; grep -q user_allow_other "$T/err"

        nobody mount "$FROM" "$TO"
        [ "$(findmnt -no FSTYPE,SOURCE "$TO" | tr -s ' ')" = "fuse.flatdisk $FROM" ]
        nobody status --json "$TO" | grep -q '"mountpoint"'
        setpriv --reuid=65534 --regid=65534 --clear-groups -- \
            dd if=/dev/zero of="$TO/a.vhd.img" bs=4k count=1 conv=notrunc,fsync 2>/dev/null
        refused cat "$TO/a.vhd.img"
        nobody umount "$TO"
        refused mountpoint -q "$TO"

        nobody mount -o "fsname=a\,b" "$FROM" "$TO"
        [ "$(findmnt -no SOURCE "$TO")" = "a,b" ]
        "$FLATDISK" umount "$TO"
        refused mountpoint -q "$TO"

        "$FLATDISK" mount "$FROM" "$TO"
        for command in umount sync status; do refused nobody $command "$TO"; done
        mountpoint -q "$TO"
        "$FLATDISK" umount "$TO"
    "#;
    live::succeed_in_namespace(
        script,
        &[("FROM", &folder.path()), ("TO", &point.path()), ("T", &scratch.path())],
    );
}

#[test]
fn a_flush_that_fails_is_reported_by_close_and_by_umount() {
    if !live::can_mount() {
        return;
    }
    if !live::have(&["mkfs.ext4"]) {
        return;
    }
    // A disk that takes writes and loses them: a loop device over a file that finds no room.
    let full = live::MountedFs::new(Path::new("none"), &["-t", "tmpfs", "-o", "size=16m"]);
    let device = full.path().join("device");
    File::create(&device).unwrap().set_len(128 << 20).unwrap();
    live::run("mkfs.ext4", &[&"-qF", &"-O^has_journal", &device]);
    let losing = live::MountedFs::new(&device, &["-o", "loop"]);
    create(&losing.path().join("a.vhdx"), "64M", &["--block-size", "1M"]);
    let mount = Background::new(losing.path(), &[]);
    let file = writer(&mount.path().join("a.vhdx.img"));
    // What a first write makes durable finds its room yet.
    file.write_all_at(&[1; 512], 0).unwrap();
    file.sync_all().unwrap();
    let fill = File::create(full.path().join("fill")).unwrap();
    let mut end = 0;
    for chunk in [1 << 20, 1 << 12] {
        while fill.write_all_at(&vec![1; chunk], end).is_ok() {
            end += chunk as u64;
        }
    }
    // The daemon's own flush may come in between, and fail.
    if let Err(e) = file.write_all_at(&[1; 2_000_000], 10 << 20) {
        assert_eq!(e.raw_os_error(), Some(libc::EIO));
    }
    assert_eq!(nix::unistd::close(file), Err(Errno::EIO));
    let output = outcome(flatdisk().arg("umount").arg(mount.path()));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("a.vhdx: "), "{}", stderr(&output));
    assert!(!is_mounted(mount.path()));
}
