//! `attach` and `detach`: images as loop devices, with what is on them mounted.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use live::{create, flatdisk, have, is_mounted, outcome, scratch, succeed, wait_until};

/// Whether loop devices can be made here.
fn can_attach() -> bool {
    live::can_mount()
        && match Path::new("/dev/loop-control").exists() {
            true => have(&["mount", "losetup", "partx", "blkid"]),
            false => live::skip("there is no /dev/loop-control"),
        }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// An image, detached when dropped, and a directory to mount on.
struct Image {
    dir: Arc<tempfile::TempDir>,
    path: PathBuf,
    /// Held unless the image is attached in another mount namespace.
    mounting: Option<live::Mounting>,
}

impl Image {
    fn new(name: &str, size: &str, options: &[&str]) -> Self {
        let dir = Arc::new(scratch());
        let path = dir.path().canonicalize().unwrap().join(name);
        create(&path, size, options);
        fs::create_dir(dir.path().join("mnt")).unwrap();
        Self { dir, path, mounting: Some(live::mounting()) }
    }

    /// A VHDX with a partition table as sfdisk(8) understands it.
    fn partitioned(table: &str) -> Self {
        let image = Self::new("a.vhdx", "64M", &["--block-size", "1M"]);
        image.partition(table);
        image
    }

    /// A VHDX with one ext4 file system and no partitions.
    fn with_ext4() -> Self {
        let image = Self::new("a.vhdx", "64M", &["--block-size", "1M"]);
        succeed(Command::new("mkfs.ext4").arg("-q").arg(image.attach(&[])));
        image.detach();
        image
    }

    fn mountpoint(&self) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join("mnt")
    }

    fn try_attach(&self, options: &[&str]) -> Output {
        outcome(flatdisk().arg("attach").args(options).arg(&self.path))
    }

    /// Attaches the image; the device.
    fn attach(&self, options: &[&str]) -> PathBuf {
        let output = self.try_attach(options);
        assert!(output.status.success(), "{}", stderr(&output));
        String::from_utf8(output.stdout).unwrap().trim().into()
    }

    /// Attaches the image with its file system mounted; the device.
    fn attach_mounted(&self, options: &[&str]) -> PathBuf {
        let output = outcome(
            flatdisk()
                .args(["attach", "--mount"])
                .arg(self.mountpoint())
                .args(options)
                .arg(&self.path),
        );
        assert!(output.status.success(), "{}", stderr(&output));
        assert!(is_mounted(&self.mountpoint()));
        String::from_utf8(output.stdout).unwrap().trim().into()
    }

    /// Writes a partition table as sfdisk(8) understands it; the kernel learns of it at the next attach.
    fn partition(&self, table: &str) {
        let mut sfdisk = Command::new("sfdisk");
        sfdisk.arg("-q").arg(self.attach(&[])).stdin(Stdio::piped());
        let mut child = sfdisk.spawn().unwrap();
        child.stdin.take().unwrap().write_all(table.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success());
        self.detach();
    }

    fn detach(&self) {
        self.detach_by(&self.path);
    }

    /// Detaches what is attached, named in any way.
    fn detach_by(&self, target: &Path) {
        // A program that another test starts at this moment holds copies of our files until exec.
        wait_until("nobody uses it", || {
            let output = outcome(flatdisk().arg("detach").arg(target));
            let busy = stderr(&output).contains("in use") || stderr(&output).contains("busy");
            assert!(output.status.success() || busy, "{}", stderr(&output));
            output.status.success()
        });
        self.assert_nothing_left();
    }

    /// The one file that holds the disk, if there is one.
    fn host_file(&self) -> PathBuf {
        let flat = self.path.with_file_name("flat-flat.vmdk");
        if flat.exists() { flat } else { self.path.clone() }
    }

    /// The image's entry in `attach --list`.
    fn listed(&self) -> Option<serde_json::Value> {
        let all = succeed(flatdisk().args(["attach", "--list", "--json"]));
        let all: serde_json::Value = serde_json::from_str(&all).unwrap();
        let mut all = all["attachments"].as_array().unwrap().iter();
        all.find(|one| one["image"] == self.path.to_str().unwrap()).cloned()
    }

    fn slot(&self) -> PathBuf {
        let meta = fs::metadata(&self.path).unwrap();
        format!("/run/flatdisk/attached/{:x}-{}", meta.dev(), meta.ino()).into()
    }

    fn daemon(&self) -> i32 {
        let status = succeed(flatdisk().args(["status", "--json"]).arg(self.slot().join("flat")));
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        status["mounts"][0]["pid"].as_i64().unwrap() as i32
    }

    /// Kills the daemon without warning.
    fn kill_daemon(&self) {
        use nix::sys::signal::{Signal, kill};
        let pid = nix::unistd::Pid::from_raw(self.daemon());
        kill(pid, Signal::SIGKILL).unwrap();
        wait_until("the daemon is dead", || kill(pid, None).is_err());
    }

    fn assert_nothing_left(&self) {
        let slot = self.slot();
        assert!(!slot.exists(), "{} is left", slot.display());
        assert_eq!(self.listed(), None);
        for device in fs::read_dir("/sys/block").unwrap() {
            let file = device.unwrap().path().join("loop/backing_file");
            let file = fs::read_to_string(file).unwrap_or_default();
            assert!(!Path::new(file.trim()).starts_with(&slot), "{file} is left");
            assert_ne!(Path::new(file.trim()), self.host_file());
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(slot.to_str().unwrap()), "{mounts}");
        assert!(!is_mounted(&self.mountpoint()));
        assert_eq!(self.holders(), Vec::<PathBuf>::new());
    }

    /// Descriptors of any process through which the image is open.
    fn holders(&self) -> Vec<PathBuf> {
        let entries = |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().flatten();
        entries("/proc".into())
            .flat_map(|process| entries(process.path().join("fd")))
            .map(|fd| fd.path())
            .filter(|fd| fs::read_link(fd).is_ok_and(|file| file == self.path))
            .collect()
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if fs::metadata(&self.path).is_ok() && self.slot().exists() {
            let _ = outcome(flatdisk().arg("detach").arg(&self.path));
        }
    }
}

#[test]
fn file_systems_in_every_kind_of_partition_table_keep_what_is_written() {
    if !can_attach() || !have(&["sfdisk", "mkfs.ext4", "qemu-img"]) {
        return;
    }
    for (name, subformat, table, node) in [
        ("mbr.vmdk", "monolithicSparse", "label: dos\nsize=20M, type=c\nsize=20M\n", "p2"),
        ("gpt.vhdx", "dynamic", "label: gpt\nsize=20M\nsize=20M\n", "p2"),
        ("none.vhd", "dynamic", "", ""),
        ("flat.vmdk", "monolithicFlat", "label: gpt\nsize=20M\nsize=20M\n", "p2"),
        ("fixed.vhd", "fixed", "", ""),
        ("fixed.vhdx", "fixed", "label: gpt\nsize=20M\nsize=20M\n", "p2"),
    ] {
        let image = Image::new(name, "64M", &["--subformat", subformat]);
        if !table.is_empty() {
            image.partition(table);
        }
        let device = image.attach(&[]);
        let node = PathBuf::from(format!("{}{node}", device.display()));
        succeed(Command::new("mkfs.ext4").arg("-q").arg(&node));
        image.detach();

        let device = image.attach_mounted(&[]);
        let text = vec![b'x'; 3_000_000];
        fs::write(image.mountpoint().join("file"), &text).unwrap();
        let listed = image.listed().unwrap();
        assert_eq!(listed["state"], "attached");
        assert_eq!(listed["device"], device.to_str().unwrap());
        assert_eq!(listed["mountpoint"], image.mountpoint().to_str().unwrap());
        let partitions = if table.is_empty() { 0 } else { 2 };
        assert_eq!(listed["partitions"].as_array().unwrap().len(), partitions);
        let status = succeed(flatdisk().arg("status"));
        assert!(status.contains(image.path.to_str().unwrap()), "{status}");
        image.detach_by(&image.mountpoint());
        succeed(flatdisk().arg("check").arg(&image.path));
        if !name.ends_with(".vhd") {
            succeed(Command::new("qemu-img").arg("check").arg(&image.path));
        }

        let device = image.attach_mounted(&["-r"]);
        assert!(fs::read(image.mountpoint().join("file")).unwrap() == text);
        image.detach_by(&device);
    }
}

#[test]
fn of_several_file_systems_one_is_chosen() {
    if !can_attach() || !have(&["sfdisk", "mkfs.ext4"]) {
        return;
    }
    let image = Image::partitioned("label: gpt\nsize=20M\nsize=20M\nsize=10M\n");
    let device = image.attach(&[]).display().to_string();
    for (partition, label) in [("p1", "first"), ("p2", "second")] {
        let node = format!("{device}{partition}");
        succeed(Command::new("mkfs.ext4").args(["-q", "-L", label, &node]));
    }
    image.detach();
    let mount = image.mountpoint();
    let mount = mount.to_str().unwrap();
    let output = image.try_attach(&["--mount", mount]);
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    for part in ["several", "1: 20 MiB, ext4 `first`", "2: 20 MiB, ext4 `second`", "3: 10 MiB"] {
        assert!(said.contains(part), "{said}");
    }
    assert_eq!(said.lines().count(), 1, "{said}");
    image.assert_nothing_left();
    let output = image.try_attach(&["--mount", mount, "--partition", "7"]);
    assert!(stderr(&output).contains("no partition 7"), "{}", stderr(&output));
    image.assert_nothing_left();
    let device = image.attach_mounted(&["--partition", "2"]);
    let source = succeed(Command::new("findmnt").args(["-no", "SOURCE", mount]));
    assert_eq!(source.trim(), format!("{}p2", device.display()));
    image.detach();
}

#[test]
fn sectors_of_4096_bytes_are_the_devices_too() {
    if !can_attach() || !have(&["sfdisk", "mkfs.ext4", "blockdev"]) {
        return;
    }
    let image = Image::new("a.vhdx", "64M", &["--block-size", "1M", "--sector-size", "4096"]);
    let device = image.attach(&[]);
    let sectors = succeed(Command::new("losetup").args(["-nO", "LOG-SEC,DIO"]).arg(&device));
    assert_eq!(sectors.split_whitespace().collect::<Vec<_>>(), ["4096", "1"]);
    let size = succeed(Command::new("blockdev").arg("--getsize64").arg(&device));
    assert_eq!(size.trim(), (64 << 20).to_string());
    image.detach();
    image.partition("label: gpt\nsize=40M\n");
    let device = image.attach(&[]);
    succeed(Command::new("mkfs.ext4").arg("-q").arg(format!("{}p1", device.display())));
    image.detach();
    image.attach_mounted(&[]);
    fs::write(image.mountpoint().join("file"), "kept").unwrap();
    image.detach();
    image.attach_mounted(&[]);
    assert_eq!(fs::read_to_string(image.mountpoint().join("file")).unwrap(), "kept");
    image.detach();
    succeed(flatdisk().arg("check").arg(&image.path));
}

#[test]
fn what_must_not_be_written_is_not() {
    if !can_attach() || !have(&["mkfs.ext4", "blockdev"]) {
        return;
    }
    let image = Image::with_ext4();
    let before = live::sha256(&image.path);
    let read_only =
        |device: &Path| succeed(Command::new("blockdev").arg("--getro").arg(device)).trim() == "1";
    for options in [&["-r"][..], &["-o", "ro"]] {
        let device = image.attach(options);
        assert!(read_only(&device));
        let writer = fs::File::options().write(true).open(&device);
        assert!(writer.and_then(|writer| writer.write_at(&[1; 512], 0)).is_err());
        image.detach();
    }
    let device = image.attach_mounted(&["--nonpersistent"]);
    assert!(!read_only(&device));
    fs::write(image.mountpoint().join("file"), vec![1; 5_000_000]).unwrap();
    assert_eq!(fs::metadata(image.mountpoint().join("file")).unwrap().len(), 5_000_000);
    image.detach();
    assert_eq!(live::sha256(&image.path), before);

    // A parent may not be written, and says so by itself.
    let child = image.dir.path().join("child.vhdx");
    succeed(flatdisk().args(["create", "-q", "--parent"]).arg(&image.path).arg(&child));
    let output = image.try_attach(&[]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("read-only"), "{}", stderr(&output));
    assert!(read_only(Path::new(String::from_utf8_lossy(&output.stdout).trim())));
    image.detach();
    assert_eq!(live::sha256(&image.path), before);
}

#[test]
fn a_child_takes_what_is_written_and_its_parent_stays() {
    if !can_attach() || !have(&["mkfs.ext4"]) {
        return;
    }
    let base = Image::with_ext4();
    let before = live::sha256(&base.path);
    let child = Image {
        path: base.path.with_file_name("child.vhdx"),
        dir: base.dir.clone(),
        mounting: Some(live::mounting()),
    };
    succeed(flatdisk().args(["create", "-q", "--parent"]).arg(&base.path).arg(&child.path));
    child.attach_mounted(&[]);
    fs::write(child.mountpoint().join("file"), "of the child").unwrap();
    child.detach();
    assert_eq!(live::sha256(&base.path), before);
    child.attach_mounted(&["-r"]);
    assert_eq!(fs::read_to_string(child.mountpoint().join("file")).unwrap(), "of the child");
    child.detach();
}

#[test]
fn ntfs_is_mounted_by_the_program_that_knows_it() {
    if !can_attach() || !have(&["mkfs.ntfs", "ntfs-3g"]) {
        return;
    }
    let image = Image::new("a.vhdx", "64M", &["--block-size", "1M"]);
    succeed(
        Command::new("mkfs.ntfs").args(["-Q", "-F"]).arg(image.attach(&[])).stderr(Stdio::null()),
    );
    image.detach();
    for contents in ["first", "second"] {
        image.attach_mounted(&["-t", "ntfs-3g", "--mount-options", "windows_names"]);
        let file = image.mountpoint().join("file");
        if contents == "second" {
            assert_eq!(fs::read_to_string(&file).unwrap(), "first");
        }
        fs::write(&file, contents).unwrap();
        image.detach();
    }
    succeed(flatdisk().arg("check").arg(&image.path));
}

#[test]
fn an_image_is_attached_once_and_says_where() {
    if !can_attach() {
        return;
    }
    let image = Image::new("a.vhd", "8M", &[]);
    let device = image.attach(&[]);
    let output = image.try_attach(&[]);
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(said.contains(&format!("attached already as {}", device.display())), "{said}");
    image.detach();
    let output = outcome(flatdisk().arg("detach").arg(&image.path));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("not attached"), "{}", stderr(&output));
}

#[test]
fn attaches_at_the_same_time_get_devices_of_their_own() {
    if !can_attach() {
        return;
    }
    let images: Vec<_> = (0..6).map(|i| Image::new(&format!("{i}.vhd"), "8M", &[])).collect();
    let mut devices: Vec<_> = std::thread::scope(|scope| {
        let attached: Vec<_> =
            images.iter().map(|image| scope.spawn(|| image.attach(&[]))).collect();
        attached.into_iter().map(|one| one.join().unwrap()).collect()
    });
    devices.sort();
    devices.dedup();
    assert_eq!(devices.len(), images.len());
    // And of one image, one wins.
    let image = &images[0];
    image.detach();
    let won: usize = std::thread::scope(|scope| {
        let tries: Vec<_> = (0..4).map(|_| scope.spawn(|| image.try_attach(&[]))).collect();
        tries.into_iter().map(|one| usize::from(one.join().unwrap().status.success())).sum()
    });
    assert_eq!(won, 1);
    images.iter().for_each(Image::detach);
}

#[test]
fn a_failed_attach_leaves_nothing() {
    if !can_attach() {
        return;
    }
    let image = Image::new("a.vhd", "8M", &[]);
    let mount = image.mountpoint();
    // Nothing on the disk to mount.
    let output = image.try_attach(&["--mount", mount.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(said.contains("mount: ") && said.lines().count() == 1, "{said}");
    image.assert_nothing_left();
    for (options, reason) in [
        (&["--mount", "/absent"][..], "mount point"),
        (&["-o", "nonsense"], "nonsense"),
        (&["--mount", "/tmp", "--partition", "1"], "no partitions"),
    ] {
        let output = image.try_attach(options);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains(reason), "{}", stderr(&output));
        image.assert_nothing_left();
    }
    let writer = live::Mount::new(image.dir.path(), &[]);
    let file = fs::File::options().write(true).open(writer.flat("a.vhd")).unwrap();
    let output = image.try_attach(&[]);
    assert!(stderr(&output).contains("another program"), "{}", stderr(&output));
    drop(file);
    assert!(writer.unmount().success());
    image.assert_nothing_left();
    fs::write(&image.path, "junk").unwrap();
    let output = image.try_attach(&[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("a.vhd: "), "{}", stderr(&output));
    assert_eq!(stderr(&output).lines().count(), 1, "{}", stderr(&output));
    image.assert_nothing_left();
}

#[test]
fn what_others_use_is_not_detached_and_they_are_named() {
    if !can_attach() || !have(&["mkfs.ext4"]) {
        return;
    }
    let image = Image::with_ext4();
    let refused = |named: &str| {
        let output = outcome(flatdisk().arg("detach").arg(&image.path));
        assert_eq!(output.status.code(), Some(1));
        let said = stderr(&output);
        assert!(said.contains(named) && said.lines().count() == 1, "{said}");
        assert_eq!(image.listed().unwrap()["state"], "attached");
    };
    let device = image.attach_mounted(&[]);
    let file = fs::File::create(image.mountpoint().join("file")).unwrap();
    refused(&format!("process {}", std::process::id()));
    drop(file);
    let other = live::MountedFs::new(&device, &[]);
    refused(other.path().to_str().unwrap());
    assert!(is_mounted(&image.mountpoint()));
    other.unmount();
    succeed(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(image.mountpoint()));
    let output = outcome(flatdisk().arg("detach").arg(&image.path));
    succeed(Command::new("umount").arg(image.mountpoint()));
    assert!(stderr(&output).contains("mounted over"), "{}", stderr(&output));
    assert!(is_mounted(&image.mountpoint()));
    image.detach();
    let device = image.attach(&[]);
    let file = fs::File::open(&device).unwrap();
    refused(&format!("process {}", std::process::id()));
    drop(file);
    image.detach();
}

#[test]
fn after_the_daemon_died_the_list_says_so_and_detach_cleans_up() {
    if !can_attach() || !have(&["mkfs.ext4"]) {
        return;
    }
    let image = Image::with_ext4();
    let device = image.attach_mounted(&[]);
    let synced = image.mountpoint().join("synced");
    let mut file = fs::File::create(&synced).unwrap();
    file.write_all(b"safe").unwrap();
    file.sync_all().unwrap();
    drop(file);
    fs::write(image.mountpoint().join("late"), vec![7; 1 << 20]).unwrap();
    image.kill_daemon();
    let listed = image.listed().unwrap();
    assert_eq!(
        (&listed["state"], &listed["device"]),
        (&"daemon-died".into(), &device.to_str().unwrap().into())
    );
    assert!(succeed(flatdisk().args(["attach", "--list"])).contains("daemon died"));
    assert!(succeed(flatdisk().arg("status")).contains("daemon died"));
    assert_eq!(image.try_attach(&[]).status.code(), Some(1));
    let output = outcome(flatdisk().arg("detach").arg(&image.path));
    // Undone, but what was written last may be lost.
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("daemon had died"), "{}", stderr(&output));
    image.assert_nothing_left();
    let check = outcome(flatdisk().arg("check").arg(&image.path));
    assert!(matches!(check.status.code(), Some(0 | 3)), "{check:?}");
    image.attach_mounted(&[]);
    assert_eq!(fs::read(&synced).unwrap(), b"safe");
    image.detach();
}

#[test]
fn an_attach_killed_at_any_moment_leaves_what_detach_cleans_up() {
    if !can_attach() || !have(&["mkfs.ext4"]) {
        return;
    }
    let image = Image::with_ext4();
    for round in 0..20 {
        let mut attach = flatdisk()
            .args(["attach", "--mount"])
            .arg(image.mountpoint())
            .arg(&image.path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Not to wait for anything: to be somewhere else in the work each time.
        std::thread::sleep(Duration::from_millis(round * 6));
        attach.kill().unwrap();
        attach.wait().unwrap();
        // A daemon or mount(8) on its way when its parent died may come after the first detach.
        wait_until("everything is detached", || {
            let _ = outcome(flatdisk().arg("detach").arg(&image.path));
            !image.slot().exists() && image.holders().is_empty()
        });
        image.assert_nothing_left();
    }
    image.attach_mounted(&[]);
    image.detach();
}

#[test]
fn a_daemon_told_to_stop_twice_is_still_detached_from() {
    if !can_attach() {
        return;
    }
    use nix::sys::signal::{Signal, kill};
    let image = Image::new("a.vhd", "8M", &[]);
    let device = image.attach(&[]);
    let daemon = nix::unistd::Pid::from_raw(image.daemon());
    // The first one finds the mount in use, the second takes it out of the name space.
    wait_until("the mount is out of sight", || {
        kill(daemon, Signal::SIGTERM).unwrap();
        !is_mounted(&image.slot().join("flat"))
    });
    assert_eq!(image.listed().unwrap()["device"], device.to_str().unwrap());
    let output = outcome(flatdisk().arg("detach").arg(&image.path));
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("not waiting"), "{}", stderr(&output));
    wait_until("the daemon is gone", || kill(daemon, None).is_err());
    image.assert_nothing_left();
}

#[test]
fn a_device_detached_by_others_is_noticed() {
    if !can_attach() {
        return;
    }
    let image = Image::new("a.vhd", "8M", &[]);
    let device = image.attach(&[]);
    succeed(Command::new("losetup").arg("-d").arg(&device));
    wait_until("the list says so", || image.listed().unwrap()["state"] == "device-gone");
    image.detach();
}

/// Images whose disk lies in one piece in a host file, and how they are made.
const IN_ONE_PIECE: [(&str, &[&str]); 4] = [
    ("a.vhd", &["--subformat", "fixed"]),
    ("flat.vmdk", &["--subformat", "monolithicFlat"]),
    ("a.vhdx", &["--subformat", "fixed", "--block-size", "1M"]),
    ("b.vhdx", &["--subformat", "fixed", "--block-size", "8M", "--sector-size", "4096"]),
];

const SIZE: u64 = 24 << 20;

/// A part of a device's numbers, by losetup(8).
fn binding(device: &Path, column: &str) -> String {
    let told = succeed(Command::new("losetup").args(["-nO", column]).arg(device));
    told.trim().to_owned()
}

/// What a host file holds around the disk.
fn around(file: &Path, at: u64) -> Vec<u8> {
    let mut bytes = fs::read(file).unwrap();
    bytes.drain(at as usize..(at + SIZE) as usize);
    bytes
}

/// Writes, and flushes it.
fn put(device: &Path, at: u64, data: &[u8]) {
    let file = fs::File::options().write(true).open(device).unwrap();
    file.write_all_at(data, at).unwrap();
    file.sync_all().unwrap();
}

fn get(file: &Path, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fs::File::open(file).unwrap().read_exact_at(&mut bytes, at).unwrap();
    bytes
}

#[test]
fn a_device_on_the_image_s_own_file_reaches_the_disk_and_nothing_else() {
    if !can_attach() || !have(&["blkdiscard", "blockdev"]) {
        return;
    }
    for (name, options) in IN_ONE_PIECE {
        let image = Image::new(name, "24M", options);
        let file = image.host_file();
        let (len, before) = (fs::metadata(&file).unwrap().len(), fs::read(&image.path).unwrap());

        // Who only reads changes nothing.
        let device = image.attach(&["-r"]);
        assert_eq!(image.listed().unwrap()["direct"], true, "{name}");
        let writer = fs::File::options().write(true).open(&device);
        assert!(writer.and_then(|writer| writer.write_at(&[1; 4096], 0)).is_err());
        image.detach();
        assert!(fs::read(&image.path).unwrap() == before, "{name}");

        let device = image.attach(&[]);
        assert!(succeed(flatdisk().args(["attach", "--list"])).contains("direct"));
        assert_eq!(Path::new(&binding(&device, "BACK-FILE")), file, "{name}");
        assert_eq!(binding(&device, "SIZELIMIT"), SIZE.to_string(), "{name}");
        let at: u64 = binding(&device, "OFFSET").parse().unwrap();
        let sector = if name == "b.vhdx" { "4096" } else { "512" };
        assert_eq!(binding(&device, "LOG-SEC"), sector);
        let size = succeed(Command::new("blockdev").arg("--getsize64").arg(&device));
        assert_eq!(size.trim(), SIZE.to_string());
        // Identifiers tell of the writing before it begins; a fixed VHD has none that would.
        assert_eq!(fs::read(&image.path).unwrap() == before, name == "a.vhd");
        let outside = around(&file, at);
        let data: Vec<u8> = (0..1_u32 << 20).map(|i| (i % 251) as u8 + 1).collect();
        for start in [0, SIZE - data.len() as u64] {
            put(&device, start, &data);
            assert!(get(&file, at + start, data.len()) == data, "{name}");
        }
        // Behind the end nothing is taken.
        let past = fs::File::options().write(true).open(&device).unwrap();
        assert!(past.write_all_at(&data, SIZE - 4096).and_then(|()| past.sync_all()).is_err());
        drop(past);
        assert!(around(&file, at) == outside, "{name}: what is around the disk changed");
        image.detach();
        assert_eq!(fs::metadata(&file).unwrap().len(), len);
        succeed(flatdisk().arg("check").arg(&image.path));

        // The old way shows the same, and its writes are seen.
        let device = image.attach(&["--no-direct"]);
        assert_eq!(image.listed().unwrap()["direct"], false, "{name}");
        assert!(Path::new(&binding(&device, "BACK-FILE")).starts_with(image.slot()));
        assert!(
            get(&device, SIZE - data.len() as u64, data.len() - 4096) == data[..data.len() - 4096]
        );
        put(&device, 0, &[7; 4096]);
        image.detach();

        let device = image.attach(&[]);
        assert_eq!(get(&device, 0, 4096), [7; 4096]);
        let outside = around(&file, at);
        let taken = fs::metadata(&file).unwrap().blocks();
        succeed(Command::new("blkdiscard").arg("-f").arg(&device));
        assert!(fs::metadata(&file).unwrap().blocks() + 2048 < taken, "{name}: no space came back");
        assert!(around(&file, at) == outside, "{name}: what is around the disk changed");
        assert!(get(&device, 0, SIZE as usize).iter().all(|byte| *byte == 0));
        image.detach();
        succeed(flatdisk().arg("check").arg(&image.path));
        assert_eq!(fs::metadata(&file).unwrap().len(), len);
    }
}

#[test]
fn only_disks_in_one_piece_for_good_are_attached_on_their_own_file() {
    if !can_attach() {
        return;
    }
    for (name, options) in [
        ("a.vhdx", &["--block-size", "1M"][..]),
        ("a.vhd", &[]),
        ("a.vmdk", &["--subformat", "monolithicSparse"]),
    ] {
        let image = Image::new(name, "24M", options);
        let device = image.attach(&[]);
        put(&device, 0, &[1; 4096]);
        assert_eq!(image.listed().unwrap()["direct"], false, "{name}");
        image.detach();
    }
    let image = Image::new("a.vhd", "24M", &["--subformat", "fixed"]);
    let before = live::sha256(&image.path);
    let device = image.attach(&["--nonpersistent"]);
    put(&device, 0, &[1; 4096]);
    assert_eq!(image.listed().unwrap()["direct"], false);
    image.detach();
    assert_eq!(live::sha256(&image.path), before);
}

#[test]
fn an_image_whose_file_a_device_uses_opens_nowhere_else() {
    if !can_attach() || !have(&["qemu-io"]) {
        return;
    }
    let busy = |path: &Path, write: bool| {
        let opened = fs::File::options().read(true).write(write).open(path);
        assert_eq!(opened.unwrap_err().raw_os_error(), Some(libc::EBUSY), "{}", path.display());
    };
    for (name, options) in IN_ONE_PIECE {
        let image = Image::new(name, "24M", options);
        let private = image.slot().join(format!("flat/{name}.img"));
        let other = live::Mount::new(image.dir.path(), &[]);
        let device = image.attach(&[]);
        for write in [false, true] {
            busy(&other.flat(name), write);
            busy(&private, write);
        }
        let resized = outcome(flatdisk().args(["resize"]).arg(&image.path).arg("+24M"));
        assert!(stderr(&resized).contains("in use"), "{}", stderr(&resized));
        let driver = if name == "a.vhd" { "vpc" } else { &name[name.len() - 4..] };
        let mut qemu = Command::new("qemu-io");
        let locked = outcome(qemu.args(["-f", driver, "-c", "write 0 512"]).arg(&image.path));
        assert!(stderr(&locked).contains("lock"), "{}", stderr(&locked));
        // Neither is its mount taken away.
        let unmounted = outcome(flatdisk().arg("umount").arg(image.slot().join("flat")));
        assert_eq!(unmounted.status.code(), Some(32), "{}", stderr(&unmounted));
        put(&device, 4096, &[3; 4096]);
        image.detach();

        // Readers share it.
        image.attach(&["-r"]);
        assert_eq!(get(&other.flat(name), 4096, 4096), [3; 4096]);
        busy(&other.flat(name), true);
        image.detach();
        // And somebody who has it open for reading keeps a writing device away.
        let reader = fs::File::open(other.flat(name)).unwrap();
        let output = image.try_attach(&[]);
        assert!(stderr(&output).contains("another program"), "{}", stderr(&output));
        drop(reader);
        assert!(other.unmount().success());
        image.assert_nothing_left();
    }
}

#[test]
fn a_device_on_the_image_s_own_file_outlives_the_daemon_with_its_locks() {
    if !can_attach() || !have(&["mkfs.ext4", "e2fsck"]) {
        return;
    }
    for (name, options) in IN_ONE_PIECE {
        let image = Image::new(name, "24M", options);
        let device = image.attach(&[]);
        succeed(Command::new("mkfs.ext4").arg("-q").arg(&device));
        image.detach();
        let device = image.attach_mounted(&[]);
        fs::write(image.mountpoint().join("before"), "one").unwrap();
        image.kill_daemon();
        assert_eq!(image.listed().unwrap()["state"], "daemon-died");
        fs::write(image.mountpoint().join("after"), "two").unwrap();
        let other = live::Mount::new(image.dir.path(), &[]);
        let busy = fs::File::options().write(true).open(other.flat(name));
        assert_eq!(busy.unwrap_err().raw_os_error(), Some(libc::EBUSY), "{name}");
        let output = outcome(flatdisk().arg("detach").arg(&device));
        assert!(output.status.success(), "{name}: {}", stderr(&output));
        image.assert_nothing_left();
        succeed(flatdisk().arg("check").arg(&image.path));
        fs::File::options().write(true).open(other.flat(name)).unwrap();
        assert!(other.unmount().success());
        let device = image.attach(&["-r"]);
        succeed(Command::new("e2fsck").args(["-fn"]).arg(&device));
        image.detach();
        image.attach_mounted(&[]);
        for (file, text) in [("before", "one"), ("after", "two")] {
            assert_eq!(fs::read_to_string(image.mountpoint().join(file)).unwrap(), text, "{name}");
        }
        image.detach();
    }
}

#[test]
fn an_image_whose_device_others_detached_is_free_again() {
    use nix::sys::signal::{Signal, kill};
    if !can_attach() {
        return;
    }
    let image = Image::new("a.vhd", "24M", &["--subformat", "fixed"]);
    let other = live::Mount::new(image.dir.path(), &[]);
    let open = || fs::File::options().write(true).open(other.flat("a.vhd"));
    let device = image.attach(&[]);
    assert!(open().is_err());
    succeed(Command::new("losetup").arg("-d").arg(&device));
    wait_until("the image is closed", || open().is_ok());
    assert_eq!(image.listed().unwrap()["state"], "device-gone");
    image.detach();

    // The daemon's end is put off until the device is gone.
    image.attach(&[]);
    let daemon = nix::unistd::Pid::from_raw(image.daemon());
    wait_until("the mount is out of sight", || {
        kill(daemon, Signal::SIGTERM).unwrap();
        !is_mounted(&image.slot().join("flat"))
    });
    assert!(open().is_err());
    let output = outcome(flatdisk().arg("detach").arg(&image.path));
    assert!(output.status.success(), "{}", stderr(&output));
    wait_until("the daemon is gone", || kill(daemon, None).is_err());
    open().unwrap();
    image.assert_nothing_left();
    assert!(other.unmount().success());
}

#[test]
fn an_attach_on_the_image_s_own_file_killed_at_any_moment_leaves_what_detach_cleans_up() {
    if !can_attach() {
        return;
    }
    let image = Image::new("a.vhdx", "24M", &["--subformat", "fixed", "--block-size", "1M"]);
    for round in 0..20 {
        let mut attach = flatdisk();
        attach.arg("attach").arg(&image.path).stdout(Stdio::null()).stderr(Stdio::null());
        let mut attach = attach.spawn().unwrap();
        // Not to wait for anything: to be somewhere else in the work each time.
        std::thread::sleep(Duration::from_millis(round * 3));
        attach.kill().unwrap();
        attach.wait().unwrap();
        wait_until("everything is detached", || {
            let _ = outcome(flatdisk().arg("detach").arg(&image.path));
            !image.slot().exists() && image.holders().is_empty()
        });
        image.assert_nothing_left();
    }
    succeed(flatdisk().arg("check").arg(&image.path));
    image.attach(&[]);
    image.detach();
}

#[test]
fn a_device_that_was_given_to_another_image_means_that_one() {
    if !can_attach() {
        return;
    }
    // Whichever record is found first.
    for [stale, other] in [["a.vhd", "b.vhd"], ["b.vhd", "a.vhd"]] {
        let [stale, other] = [stale, other].map(|name| Image::new(name, "8M", &[]));
        // Until the number that was free is given out again: other tests take devices, too.
        wait_until("the device is used again", || {
            let device = stale.attach(&[]);
            succeed(Command::new("losetup").arg("-d").arg(&device));
            wait_until("it is gone", || stale.listed().unwrap()["state"] == "device-gone");
            let again = other.attach(&[]) == device;
            if again {
                other.detach_by(&device);
                assert_eq!(stale.listed().unwrap()["state"], "device-gone");
            } else {
                other.detach();
            }
            stale.detach();
            again
        });
    }
}

#[test]
fn partitions_have_nodes_where_nobody_else_makes_them() {
    if !can_attach() || !have(&["sfdisk", "unshare"]) {
        return;
    }
    let mut image = Image::partitioned("label: dos\nsize=20M\nsize=20M\n");
    image.mounting = None;
    // As in a container: /dev is a plain directory.
    let script = r#"
        set -eu
        mount -t tmpfs none "$T"
        mknod "$T/fuse" c 10 229; mknod "$T/loop-control" c 10 237; mknod "$T/null" c 1 3
        mount --bind "$T" /dev
        device=$("$FLATDISK" attach "$IMAGE")
        trap '"$FLATDISK" detach "$IMAGE" || true' EXIT
        for n in 1 2; do
            [ -b "${device}p$n" ]
            [ "$(printf '%d:%d' 0x$(stat -c %t ${device}p$n) 0x$(stat -c %T ${device}p$n))" = \
              "$(cat /sys/block/${device#/dev/}/${device#/dev/}p$n/dev)" ]
        done
        # The table changes: partitions come, go and get other sizes.
        printf 'label: dos\nsize=10M\nsize=20M\nsize=5M\n' | sfdisk -q --no-reread --no-tell-kernel "$device"
        "$FLATDISK" attach --rescan "$device" | grep -q "${device}p3: 5 MiB"
        [ -b "${device}p3" ]; [ "$(cat /sys/block/${device#/dev/}/${device#/dev/}p1/size)" = 20480 ]
        printf 'label: dos\nsize=10M\n' | sfdisk -q --no-reread --no-tell-kernel "$device"
        "$FLATDISK" attach --json --rescan "$IMAGE" | grep -q '"number": 1'
        [ ! -e "${device}p2" ]; [ ! -e "${device}p3" ]
        "$FLATDISK" detach "${device}p1"
        trap - EXIT
        for n in 1 2 3; do [ ! -e "${device}p$n" ]; done
    "#;
    let scratch = scratch();
    live::succeed_in_namespace(script, &[("IMAGE", &image.path), ("T", &scratch.path())]);
    image.assert_nothing_left();
}

#[test]
fn udisks_makes_a_device_of_a_flat_file() {
    if !can_attach() || !have(&["unshare", "udisksctl", "dbus-daemon", "blockdev"]) {
        return;
    }
    let mut image = Image::new("a.vhdx", "64M", &["--block-size", "1M"]);
    image.mounting = None;
    // The desktop's services in a namespace with devices, udev database and bus of its own. udev has no
    // rules, so it only tells udisks what the kernel tells it.
    let script = r#"
        set -eu
        PATH="$PATH:/usr/sbin:/sbin"
        mount -t tmpfs none "$T"
        mkdir "$T/dev" "$T/mnt"
        for node in "fuse c 10 229" "loop-control c 10 237" "null c 1 3" "urandom c 1 9"; do
            mknod -m 666 "$T/dev/"$node
        done
        for n in $(seq 0 63); do mknod "$T/dev/loop$n" b 7 $n; done
        mount --bind "$T/dev" /dev
        mount -t tmpfs none /run
        mount -t tmpfs none /usr/lib/udev/rules.d
        export DBUS_SYSTEM_BUS_ADDRESS="unix:path=$T/bus"
        cat > "$T/bus.conf" <<END
            <busconfig>
              <type>system</type><listen>$DBUS_SYSTEM_BUS_ADDRESS</listen><auth>EXTERNAL</auth>
              <policy context="default">
                <allow user="*"/><allow own="*"/>
                <allow send_destination="*"/><allow receive_sender="*"/>
              </policy>
            </busconfig>
END
        services= device=
        finish() {
            [ -z "$device" ] || losetup -d "$device" || true
            kill $services 2>/dev/null; wait
            umount -il "$T/mnt" 2>/dev/null || true
        }
        trap finish EXIT
        start() { "$@" >>"$T/log" 2>&1 & services="$services $!"; }
        try() { # until it succeeds, for half a minute
            for i in $(seq 600); do "$@" >/dev/null 2>&1 && return; sleep 0.05; done
            echo "never succeeded: $*" >&2; cat "$T/log" >&2; exit 9
        }
        start /usr/lib/systemd/systemd-udevd
        start dbus-daemon --config-file="$T/bus.conf" --nofork --nopidfile
        try test -S "$T/bus" -a -S /run/udev/control
        start /usr/libexec/udisks2/udisksd
        ready() { udisksctl dump | grep -q /UDisks2/Manager; }
        try ready

        "$FLATDISK" mount "$IMAGE" "$T/mnt"
        said=$(udisksctl loop-setup --no-user-interaction -f "$T/mnt/a.vhdx.img")
        device=$(echo "$said" | sed -n 's/.* as \(.*\)\.$/\1/p')
        [ "$(blockdev --getsize64 "$device")" = 67108864 ]
        dd if=/dev/urandom of="$T/data" bs=1M count=3 2>/dev/null
        dd if="$T/data" of="$device" bs=1M conv=fsync 2>/dev/null
        cmp -n 3145728 "$T/data" "$T/mnt/a.vhdx.img"
        udisksctl loop-delete --no-user-interaction -b "$device"
        device=
        try "$FLATDISK" umount "$T/mnt"
        "$FLATDISK" check "$IMAGE"
    "#;
    let scratch = scratch();
    live::succeed_in_namespace(script, &[("IMAGE", &image.path), ("T", &scratch.path())]);
}
