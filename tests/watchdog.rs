//! What systemd hears from a daemon that it watches.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use live::hanging::{HangingDisk, Kind};
use live::{Mount, create, flatdisk, scratch, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What systemd is said to wait for.
const PATIENCE: Duration = Duration::from_millis(400);
/// What a test waits for.
const DEADLINE: Duration = Duration::from_secs(30);

/// systemd's end of the socket. It always listens, for the kernel keeps few messages.
struct Manager {
    said: Receiver<String>,
    folder: tempfile::TempDir,
}

impl Manager {
    fn new() -> Self {
        let folder = scratch();
        let socket = UnixDatagram::bind(folder.path().join("notify")).unwrap();
        let (sender, said) = mpsc::channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(len) = socket.recv(&mut bytes) {
                if sender.send(String::from_utf8_lossy(&bytes[..len]).into_owned()).is_err() {
                    return;
                }
            }
        });
        Self { said, folder }
    }

    fn watch(&self, source: &Path) -> Command {
        let mut command = flatdisk();
        command
            .args(["mount", "-f"])
            .arg(source)
            .stdin(Stdio::null())
            .env("NOTIFY_SOCKET", self.folder.path().join("notify"))
            .env("WATCHDOG_USEC", PATIENCE.as_micros().to_string());
        command
    }

    /// What is said within `time`.
    fn hear(&self, time: Duration) -> Option<String> {
        self.said.recv_timeout(time).ok()
    }

    fn wait_for(&self, what: &str) -> String {
        let begun = Instant::now();
        loop {
            assert!(begun.elapsed() < DEADLINE, "{what} never comes");
            let said = self.hear(DEADLINE).unwrap_or_default();
            if said.lines().any(|line| line == what) {
                return said;
            }
        }
    }
}

/// Lets `work` on a writable flat file of this kind hang in a request of the daemon's to the host.
fn hang(subformat: &str, held: Kind, work: impl FnOnce(&File) + Send + 'static) {
    if !live::can_mount() {
        return;
    }
    let folder = scratch();
    let image = folder.path().join("a.vhd");
    create(&image, "8M", &["--subformat", subformat]);
    let disk = HangingDisk::new("a.vhd", fs::read(image).unwrap());
    let manager = Manager::new();
    let mount = Mount::start(&mut manager.watch(&disk.file()));
    let file = File::options().read(true).write(true).open(mount.flat("a.vhd")).unwrap();
    let file = Arc::new(file);
    file.write_all_at(&[1; 4096], 0).unwrap();
    manager.wait_for("WATCHDOG=1");

    let hangs = disk.hold(held);
    let worker = std::thread::spawn({
        let file = file.clone();
        move || work(&file)
    });
    wait_until("a request hangs", || hangs.hangs());
    let begun = Instant::now();
    while manager.hear(10 * PATIENCE).is_some() {
        assert!(begun.elapsed() < DEADLINE, "signs of life do not end");
    }
    drop(hangs);
    manager.wait_for("WATCHDOG=1");
    worker.join().unwrap();
    drop(file);
    assert!(mount.unmount().success());
}

#[test]
fn a_daemon_that_hangs_in_a_flush_gives_no_sign_of_life() {
    hang("fixed", Kind::Sync, |file| file.sync_all().unwrap());
}

#[test]
fn a_daemon_that_hangs_in_a_flush_of_its_own_gives_no_sign_of_life() {
    hang("dynamic", Kind::Sync, |file| file.write_all_at(&[1; 4096], 4 << 20).unwrap());
}

#[test]
fn a_daemon_that_hangs_in_a_read_gives_no_sign_of_life() {
    hang("fixed", Kind::Read, |file| file.read_exact_at(&mut [0; 4096], 4 << 20).unwrap());
}

#[test]
fn a_watched_daemon_is_ready_lives_and_stops() {
    if !live::can_mount() {
        return;
    }
    let folder = scratch();
    create(&folder.path().join("a.vhd"), "8M", &[]);
    let manager = Manager::new();
    let mount = Mount::start(&mut manager.watch(folder.path()));
    let ready = manager.hear(DEADLINE).unwrap();
    assert!(ready.starts_with("READY=1\nSTATUS=Serving "), "{ready}");
    for _ in 0..3 {
        manager.wait_for("WATCHDOG=1");
    }
    // A mount in use stays, and says so.
    let held = File::open(mount.flat("a.vhd")).unwrap();
    kill(Pid::from_raw(mount.pid() as i32), Signal::SIGTERM).unwrap();
    manager.wait_for("STOPPING=1");
    let busy = manager.wait_for("READY=1");
    assert!(busy.contains("STATUS=") && busy.contains("in use"), "{busy}");
    manager.wait_for("WATCHDOG=1");
    drop(held);
    assert!(mount.unmount().success());
    let stopping = manager.wait_for("STOPPING=1");
    assert!(stopping.contains("STATUS=Closing images"), "{stopping}");
}

#[test]
fn nobody_is_told_of_life_who_did_not_ask() {
    if !live::can_mount() {
        return;
    }
    let folder = scratch();
    create(&folder.path().join("a.vhd"), "8M", &[]);
    let manager = Manager::new();
    // The variables are meant for another process.
    let mount = Mount::start(manager.watch(folder.path()).env("WATCHDOG_PID", "1"));
    manager.wait_for("READY=1");
    assert!(mount.unmount().success());
    let mut said = String::new();
    while !said.contains("STOPPING=1") {
        said = manager.hear(DEADLINE).expect("it says that it stops");
        assert!(!said.contains("WATCHDOG"), "{said}");
    }
}
