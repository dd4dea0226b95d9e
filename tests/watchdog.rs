//! What systemd hears from a daemon that it watches.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use flatdisk::fuse::control::{Connection, Request};
use flatdisk::fuse::mounts;
use live::{Loop, Mount, MountedFs, create, flatdisk, have, scratch, succeed};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What systemd is said to wait for.
const PATIENCE: Duration = Duration::from_millis(400);
/// What a test waits for.
const DEADLINE: Duration = Duration::from_secs(30);

/// systemd's end of the socket.
struct Manager {
    socket: UnixDatagram,
    folder: tempfile::TempDir,
}

impl Manager {
    fn new() -> Self {
        let folder = scratch();
        let socket = UnixDatagram::bind(folder.path().join("notify")).unwrap();
        Self { socket, folder }
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
        let mut said = [0; 4096];
        self.socket.set_read_timeout(Some(time)).unwrap();
        let len = self.socket.recv(&mut said).ok()?;
        Some(String::from_utf8_lossy(&said[..len]).into_owned())
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
    while let Some(said) = manager.hear(Duration::from_millis(1)) {
        assert!(!said.contains("WATCHDOG"), "{said}");
    }
}

/// Freezes and thaws a file system. A process that is there beforehand does it: starting one closes
/// copies of this one's files, which flushes them.
struct Freezer {
    shell: Child,
    answers: BufReader<ChildStdout>,
}

impl Freezer {
    fn new(path: &Path) -> Self {
        let script = r#"while read word; do fsfreeze "$word" "$0"; echo; done; fsfreeze -u "$0""#;
        let mut shell = Command::new("sh")
            .args(["-c", script])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let answers = BufReader::new(shell.stdout.take().unwrap());
        Self { shell, answers }
    }

    fn tell(&mut self, word: &str) {
        writeln!(self.shell.stdin.as_ref().unwrap(), "{word}").unwrap();
        self.answers.read_line(&mut String::new()).unwrap();
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
    }
}

#[test]
fn a_daemon_that_cannot_flush_gives_no_sign_of_life() {
    if !live::can_mount() || !have(&["mkfs.ext4", "losetup", "fsfreeze"]) {
        return;
    }
    let scratch = scratch();
    let file = scratch.path().join("ext4");
    File::create(&file).unwrap().set_len(64 << 20).unwrap();
    succeed(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&file));
    let device = Loop::new(&file, &[]);
    let host = MountedFs::new(&device.device, &[]);
    create(&host.path().join("a.vhd"), "32M", &[]);
    let manager = Manager::new();
    let mount = Mount::start(&mut manager.watch(host.path()));
    let entry = mounts::mounted_at(mount.path()).unwrap().unwrap();
    let dirty = || {
        let answer = Connection::to(&entry).unwrap().ask(&Request::Status).unwrap();
        answer.status.unwrap().images[0].dirty_tables > 0
    };
    let mut freezer = Freezer::new(host.path());
    let flat = File::options().write(true).open(mount.flat("a.vhd")).unwrap();
    for at in 0.. {
        assert!(at < 15, "every flush was faster");
        flat.write_all_at(b"changes a table", at * (2 << 20)).unwrap();
        freezer.tell("-f");
        if dirty() {
            break;
        }
        freezer.tell("-u");
    }
    // Until the round that is under way, or the next one, waits for the file system.
    while manager.hear(PATIENCE * 3).is_some() {}
    freezer.tell("-u");
    manager.wait_for("WATCHDOG=1");
    live::wait_until("the tables are flushed", || !dirty());
    drop(flat);
    assert!(mount.unmount().success());
}
