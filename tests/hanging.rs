//! One image on a file system that does not answer, and daemons that do not: nobody else waits.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use flatdisk::fuse::control::{Connection, Request};
use flatdisk::fuse::mounts::MountEntry;
use live::hanging::{HangingDisk, Kind};
use live::{Mount, create, flatdisk, outcome, scratch, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The images that do not hang.
const OTHERS: [&str; 3] = ["a.vhd", "b.vhdx", "c.vmdk"];
/// More than the daemon has threads that read requests.
const MANY: usize = 24;

fn writer(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn said(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8(both).unwrap()
}

fn image_status(point: &Path, image: &str) -> serde_json::Value {
    let output = outcome(flatdisk().args(["status", "--json"]).arg(point));
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let images = status["mounts"][0]["images"].as_array().unwrap().clone();
    let named = |entry: &&serde_json::Value| entry["image"].as_str().unwrap().ends_with(image);
    images.iter().find(named).unwrap_or_else(|| panic!("{image} is not in {status}")).clone()
}

/// Programs that wait for an image, each a process of its own: when a test fails, nothing of theirs keeps
/// the file system from going away that they wait for.
struct Waiting(Vec<Child>);

impl Waiting {
    fn begin(kind: Kind, flat: &Path) -> Self {
        let program = |number: usize| {
            let mut dd = Command::new("dd");
            match kind {
                Kind::Stat => unreachable!("nobody waits for it in this way"),
                Kind::Sync => dd.args(["if=/dev/zero", "conv=notrunc,fsync"]).arg(of(flat)),
                Kind::Read => dd.args(["of=/dev/null", "iflag=direct"]).arg(source(flat)),
            };
            dd.args(["bs=4096", "count=1", "status=none"]);
            dd.arg(format!(
                "{}={}",
                if kind == Kind::Sync { "seek" } else { "skip" },
                number * 256
            ));
            dd.stdin(Stdio::null()).spawn().unwrap()
        };
        Self((0..MANY).map(program).collect())
    }

    /// Waits until all have what they wait for.
    fn end(mut self) {
        for child in &mut self.0 {
            assert!(child.wait().unwrap().success());
        }
        self.0.clear();
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.iter_mut().for_each(|child| _ = child.kill());
    }
}

fn of(path: &Path) -> String {
    format!("of={}", path.display())
}

fn source(path: &Path) -> String {
    format!("if={}", path.display())
}

/// Three images, and a fourth of which `MANY` requests hang for as long as `test` runs.
fn beside_one_that_hangs(held: Kind, test: impl FnOnce(&Mount, &Path, [File; 3])) {
    if !live::can_mount() {
        return;
    }
    let folder = scratch();
    let path = |name: &str| folder.path().join(name);
    for name in OTHERS {
        create(&path(name), "64M", &[]);
    }
    create(&path("hung.vhd"), "64M", &["--subformat", "fixed"]);
    let disk = HangingDisk::new("hung.vhd", fs::read(path("hung.vhd")).unwrap());
    let mut command = flatdisk();
    command.args(["mount", "-f", "-o", "threads=4"]);
    command.args(OTHERS.map(path)).arg(disk.file());
    let mount = Mount::start(&mut command);
    let flat = mount.flat("hung.vhd");
    // Looked at before it hangs, and never open in this process: those that it starts would close it.
    assert_eq!(fs::metadata(&flat).unwrap().len(), 64 << 20);
    let files = OTHERS.map(|name| writer(&mount.flat(name)));
    let hangs = disk.hold(held);
    let waiting = Waiting::begin(held, &flat);
    wait_until("a request hangs", || hangs.hangs());
    test(&mount, &disk.file(), files);
    drop(hangs);
    waiting.end();
    if live::is_mounted(mount.path()) {
        assert!(mount.unmount().success());
    }
}

#[test]
fn opening_for_writing_gives_up_on_what_may_be_a_child_and_does_not_answer() {
    if !live::can_mount() {
        return;
    }
    let folder = scratch();
    let path = |name: &str| folder.path().join(name);
    create(&path("a.vhd"), "8M", &[]);
    create(&path("hung.vhd"), "8M", &["--subformat", "fixed"]);
    let disk = HangingDisk::new("hung.vhd", fs::read(path("hung.vhd")).unwrap());
    let log = path("log");
    let mut command = flatdisk();
    command.args(["mount", "-f"]).arg(path("a.vhd")).arg(disk.file());
    let mount = Mount::start(command.stderr(File::create(&log).unwrap()));
    let flat = mount.flat("a.vhd");
    let hangs = disk.hold(Kind::Read);
    let open = || File::options().read(true).write(true).open(&flat);
    let begun = std::time::Instant::now();
    let refused = open().unwrap_err();
    assert!(begun.elapsed() < std::time::Duration::from_secs(8), "{:?}", begun.elapsed());
    assert_eq!(refused.raw_os_error(), Some(libc::ETIMEDOUT));
    let said = fs::read_to_string(&log).unwrap();
    let named =
        format!("`{}`, which may need it as it is, has not answered", disk.file().display());
    assert!(said.contains(&named), "{said}");
    // Readers do not care.
    File::open(&flat).unwrap();
    drop(hangs);
    wait_until("the image can be written again", || open().is_ok());
    assert!(mount.unmount().success());
}

#[test]
fn an_image_whose_flush_hangs_holds_up_nothing_of_the_others() {
    beside_one_that_hangs(Kind::Sync, |mount, hung, files| {
        for file in &files {
            file.write_all_at(&[3; 70_000], 1 << 20).unwrap();
            file.sync_all().unwrap();
            file.write_all_at(&[4; 70_000], 8 << 20).unwrap();
        }
        // The daemon's own flushes.
        for name in OTHERS {
            wait_until("tables are flushed in time", || {
                image_status(mount.path(), name)["dirty_tables"] == 0
            });
        }
        assert_eq!(live::names(mount.path()).len(), 4);
        for name in OTHERS {
            fs::metadata(mount.flat(name)).unwrap();
        }
        wait_until("status names it", || {
            image_status(mount.path(), "hung.vhd")["silent_seconds"].is_u64()
        });
        assert!(image_status(mount.path(), "a.vhd")["silent_seconds"].is_null());
        let shown = said(&outcome(flatdisk().arg("status").arg(mount.path())));
        assert!(shown.contains("has not answered for"), "{shown}");

        let sync = outcome(flatdisk().args(["sync", "--timeout", "1"]).arg(mount.path()));
        assert_eq!(sync.status.code(), Some(1));
        assert!(said(&sync).contains(&*hung.to_string_lossy()), "{}", said(&sync));
        drop(files);
        let umount =
            |options: &[&str]| outcome(flatdisk().arg("umount").args(options).arg(mount.path()));
        // It is in use by those who wait for it.
        let busy = umount(&["--timeout", "1"]);
        assert_eq!(busy.status.code(), Some(32), "{}", said(&busy));
        let lazy = umount(&["--lazy", "--timeout", "1"]);
        assert_eq!(lazy.status.code(), Some(2), "{}", said(&lazy));
        assert!(said(&lazy).contains(&*hung.to_string_lossy()), "{}", said(&lazy));
    });
}

#[test]
fn an_image_whose_reads_hang_holds_up_nothing_of_the_others() {
    beside_one_that_hangs(Kind::Read, |mount, _, files| {
        for file in &files {
            file.write_all_at(&[3; 70_000], 1 << 20).unwrap();
            file.sync_all().unwrap();
            let mut found = [0; 70_000];
            file.read_exact_at(&mut found, 1 << 20).unwrap();
            assert!(found == [3; 70_000]);
        }
        assert_eq!(live::names(mount.path()).len(), 4);
        let sync = outcome(flatdisk().arg("sync").arg(mount.path()));
        assert!(sync.status.success(), "{}", said(&sync));
    });
}

/// The kernel holds a directory while a name in it is looked up; who opens with O_CREAT waits for that.
#[test]
fn a_source_that_hangs_does_not_hold_the_root() {
    if !live::can_mount() {
        return;
    }
    let folder = scratch();
    let path = |name: &str| folder.path().join(name);
    create(&path("a.vhd"), "8M", &[]);
    create(&path("hung.vhd"), "8M", &["--subformat", "fixed"]);
    let disk = HangingDisk::new("hung.vhd", fs::read(path("hung.vhd")).unwrap());
    let hung = disk.file().parent().unwrap().to_owned();
    let mut command = flatdisk();
    command.args(["mount", "-f"]).arg(path("a.vhd")).arg(&hung).arg(disk.file());
    let mount = Mount::start(&mut command);
    let shown = mount.path().join(hung.file_name().unwrap());
    let flats = [shown.join("hung.vhd.img"), mount.flat("hung.vhd"), shown];
    flats.iter().for_each(|flat| _ = fs::metadata(flat).unwrap());
    let names = live::names(mount.path());
    assert_eq!(names.len(), 3, "{names:?}");

    let hangs = disk.hold(Kind::Stat);
    let stat = |flat: &PathBuf| {
        Command::new("stat").arg(flat).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    // The kernel knows the names for a while.
    let mut waiting = Waiting(Vec::new());
    wait_until("names are looked up", || {
        waiting.0.retain_mut(|stat| stat.try_wait().unwrap().is_none());
        if waiting.0.len() < flats.len() {
            waiting.0.extend(flats.iter().map(stat));
        }
        hangs.hangs() && waiting.0.len() >= flats.len()
    });
    let own = mount.flat("a.vhd");
    let begun = std::time::Instant::now();
    // Whether the image that hangs needs this one as it is, only who writes has to know.
    File::options().read(true).custom_flags(libc::O_CREAT).open(&own).unwrap();
    assert!(fs::create_dir(mount.path().join("new")).is_err());
    assert_eq!(live::names(mount.path()), names);
    assert!(begun.elapsed() < std::time::Duration::from_secs(20), "{:?}", begun.elapsed());
    let status = outcome(flatdisk().args(["status", "--json"]).arg(mount.path()));
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    for path in [hung, disk.file()] {
        let images = status["mounts"][0]["images"].as_array().unwrap();
        let named = |entry: &serde_json::Value| {
            entry["image"] == *path.to_string_lossy() && entry["silent_seconds"].is_u64()
        };
        assert!(images.iter().any(named), "{}: {status}", path.display());
    }
    drop(hangs);
    drop(waiting);
    wait_until("all is as it was", || flats.iter().all(|flat| fs::metadata(flat).is_ok()));
    assert!(mount.unmount().success());
}

#[test]
fn a_daemon_that_was_stopped_is_named_and_its_mount_goes_lazily() {
    if !live::can_mount() {
        return;
    }
    let folder = scratch();
    create(&folder.path().join("a.vhd"), "8M", &[]);
    let mount = Mount::new(folder.path(), &[]);
    let pid = Pid::from_raw(mount.pid() as i32);
    kill(pid, Signal::SIGSTOP).unwrap();
    for arguments in [&["status"][..], &["status", "--json"], &["sync"], &["umount"]] {
        let output = outcome(flatdisk().args(arguments).arg(mount.path().join("sub/folder")));
        assert!(!output.status.success(), "{arguments:?}");
        if arguments[0] != "umount" {
            assert!(said(&output).contains("is stopped"), "{arguments:?}: {}", said(&output));
        }
    }
    let lazy = outcome(flatdisk().args(["umount", "--lazy"]).arg(mount.path()));
    assert_eq!(lazy.status.code(), Some(2), "{}", said(&lazy));
    assert!(said(&lazy).contains("is stopped"), "{}", said(&lazy));
    assert!(!live::is_mounted(mount.path()));
    kill(pid, Signal::SIGCONT).unwrap();
    wait_until("the daemon ends", || {
        fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
    });
}

/// The directory of sockets of a user who does not exist, gone when dropped.
struct Sockets(PathBuf);

impl Drop for Sockets {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_socket_that_accepts_and_never_answers_keeps_root_for_a_moment_only() {
    if !live::can_mount() {
        return;
    }
    let user = 54_321;
    let sockets = Sockets(format!("/tmp/flatdisk-{user}").into());
    let _ = fs::remove_dir_all(&sockets.0);
    fs::DirBuilder::new().mode(0o700).create(&sockets.0).unwrap();
    chown(&sockets.0, Some(user), None).unwrap();
    let socket = sockets.0.join("0-7777.sock");
    let mount = MountEntry {
        device: "0:7777".into(),
        target: "/nowhere".into(),
        fs_type: "fuse.flatdisk".into(),
        source: "x".into(),
        user: Some(user),
    };
    // Taken by the kernel for a listener that never looks at it.
    let listener = UnixListener::bind(&socket).unwrap();
    let refusal = Connection::to(&mount).unwrap().ask(&Request::Status).unwrap_err();
    assert!(refusal.to_string().contains("did not answer"), "{refusal}");
    // Nor does a queue of callers that is full.
    let queue: Vec<_> = std::iter::from_fn(|| Connection::to(&mount).ok()).take(5000).collect();
    let refusal = Connection::to(&mount).err().unwrap();
    assert!(refusal.to_string().contains("taken no call"), "{refusal}");
    drop((queue, listener));
    // What a symlink leads to is none of the user's.
    fs::remove_file(&socket).unwrap();
    let elsewhere = scratch();
    let _other = UnixListener::bind(elsewhere.path().join("s")).unwrap();
    std::os::unix::fs::symlink(elsewhere.path().join("s"), &socket).unwrap();
    assert!(Connection::to(&mount).is_err());
    fs::remove_file(&socket).unwrap();
}
