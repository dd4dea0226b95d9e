//! What tests on a live mount share: the daemon, loop devices and file systems, each undone when
//! dropped, also when a test fails half way.
#![allow(dead_code)] // Every test program uses its own part.

pub mod hanging;
pub mod installed;
pub mod kinds;
#[allow(clippy::duplicate_mod)] // Some programs have both modules.
#[path = "../common/skip.rs"]
mod skipped;

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

/// How long a condition may take to come true before a test gives up.
const DEADLINE: Duration = Duration::from_secs(30);

/// Polls until `condition` holds; panics naming `what` when it never does.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "{what}: still not so after {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Says aloud that a test is skipped, or fails where nothing may be missing.
pub fn skip(why: &str) -> bool {
    skipped::skip(why);
    false
}

/// Whether all `tools` are installed; says SKIPPED if not.
pub fn have(tools: &[&str]) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = |tool: &str| std::env::split_paths(&path).any(|dir| dir.join(tool).is_file());
    match tools.iter().find(|tool| !found(tool)) {
        None => true,
        Some(tool) => skip(&format!("{tool} is not installed")),
    }
}

/// Whether file systems can be mounted here; says SKIPPED if not.
pub fn can_mount() -> bool {
    if !Path::new("/dev/fuse").exists() {
        return skip("there is no /dev/fuse");
    }
    if !nix::unistd::geteuid().is_root() {
        return skip("not root");
    }
    true
}

/// The folder of real images, if there is one.
pub fn corpus() -> Option<PathBuf> {
    match std::env::var_os("FLATDISK_CORPUS") {
        Some(dir) => Some(dir.into()),
        None => {
            skip("FLATDISK_CORPUS is not set");
            None
        }
    }
}

/// The program under test.
pub fn flatdisk() -> Command {
    Command::new(env!("CARGO_BIN_EXE_flatdisk"))
}

/// Runs a command that must succeed and returns what it printed.
pub fn run(program: impl AsRef<OsStr>, arguments: &[&dyn AsRef<OsStr>]) -> String {
    let mut command = Command::new(program);
    command.args(arguments.iter().map(|a| a.as_ref()));
    succeed(&mut command)
}

/// Runs a command that must succeed and returns what it printed.
pub fn succeed(command: &mut Command) -> String {
    let output = outcome(command);
    assert!(output.status.success(), "{command:?}: {}", told(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The end of a command, for messages.
fn told(output: &Output) -> String {
    let text = |bytes| String::from_utf8_lossy(bytes);
    format!("{}\n{}{}", output.status, text(&output.stdout), text(&output.stderr))
}

/// Runs a command to its end.
pub fn outcome(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

/// Makes an image with `flatdisk create`.
pub fn create(path: &Path, size: &str, options: &[&str]) {
    succeed(flatdisk().args(["create", "-q", "--size", size]).args(options).arg(path));
}

/// Held shared by everything mounted, in any test program. A mount namespace that is made while
/// something is mounted holds copies of it, and so keeps file systems alive that are unmounted here.
pub struct Mounting(#[allow(dead_code, reason = "held")] Flock<fs::File>);

/// To be held by everything mounted.
pub fn mounting() -> Mounting {
    lock(FlockArg::LockShared)
}

fn lock(how: FlockArg) -> Mounting {
    let path = std::env::temp_dir().join("flatdisk-tests-mounted");
    let file = fs::File::options().create(true).append(true).open(path).expect("the lock's file");
    Mounting(Flock::lock(file, how).map_err(|(_, e)| e).expect("lock"))
}

/// Runs a shell script in a mount namespace of its own.
pub fn in_namespace(script: &str, environment: &[(&str, &dyn AsRef<OsStr>)]) -> Output {
    let _alone = lock(FlockArg::LockExclusive);
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script]);
    command.envs(environment.iter().map(|(name, value)| (name, value.as_ref())));
    outcome(command.env("FLATDISK", env!("CARGO_BIN_EXE_flatdisk")).env_remove("XDG_RUNTIME_DIR"))
}

/// Runs a shell script in a mount namespace of its own, where it must succeed. With status 77 it says
/// why it cannot run here.
pub fn succeed_in_namespace(script: &str, environment: &[(&str, &dyn AsRef<OsStr>)]) {
    let output = in_namespace(script, environment);
    if output.status.code() == Some(77) {
        skip(&told(&output));
        return;
    }
    assert!(output.status.success(), "{}", told(&output));
}

/// Runs a script on a new file system of a loop device, in a namespace of its own.
pub fn on_file_system(make: &str, script: &str) {
    let dir = scratch();
    let device = dir.path().join("device");
    fs::File::create(&device).unwrap().set_len(600 << 20).unwrap();
    succeed(Command::new(format!("mkfs.{make}")).arg(&device));
    let at = dir.path().join("at");
    fs::create_dir(&at).unwrap();
    let script =
        format!("mount -o loop \"$DEVICE\" \"$AT\" || exit 77; set -e; cd \"$AT\"\n{script}");
    succeed_in_namespace(&script, &[("DEVICE", &device), ("AT", &at)]);
}

/// A live mount of a folder or image, with the daemon as a child in the foreground.
pub struct Mount {
    daemon: Child,
    dir: Arc<tempfile::TempDir>,
    mounted: bool,
    _mounting: Mounting,
}

impl Mount {
    /// Mounts `source` on a new mount point and waits until it is live.
    pub fn new(source: &Path, options: &[&str]) -> Self {
        Self::start(flatdisk().args(["mount", "-f"]).args(options).arg(source))
    }

    /// As [`Self::new`] with a command that lacks only the mount point.
    pub fn start(command: &mut Command) -> Self {
        let dir = tempfile::Builder::new().prefix("flatdisk-mnt-").tempdir().expect("tempdir");
        Self::start_at(command, Arc::new(dir))
    }

    fn start_at(command: &mut Command, dir: Arc<tempfile::TempDir>) -> Self {
        let mounting = mounting();
        let daemon =
            command.arg(dir.path()).stdin(Stdio::null()).spawn().expect("start the daemon");
        let mut mount = Self { daemon, dir, mounted: true, _mounting: mounting };
        wait_until("the mount is live", || {
            if let Some(status) = mount.daemon.try_wait().expect("wait for the daemon") {
                mount.mounted = false;
                panic!("the daemon ended with {status}");
            }
            // In this order: the mount may still be that of a dead daemon, and cleared meanwhile.
            nix::sys::statvfs::statvfs(mount.dir.path()).is_ok() && is_mounted(mount.dir.path())
        });
        mount
    }

    /// Kills the daemon without warning; the dead mount stays.
    pub fn kill_daemon(&mut self) {
        self.daemon.kill().expect("kill");
        self.daemon.wait().expect("wait for the daemon");
    }

    /// Mounts anew where a killed daemon left its mount.
    pub fn again(mut self, source: &Path, options: &[&str]) -> Self {
        let mut command = flatdisk();
        command.args(["mount", "-f"]).args(options).arg(source);
        self.mounted = false;
        Self::start_at(&mut command, self.dir.clone())
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The flat file of image `name`.
    pub fn flat(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.img"))
    }

    /// The daemon's process id.
    pub fn pid(&self) -> u32 {
        self.daemon.id()
    }

    /// Resident memory of the daemon that is not file pages, in bytes.
    pub fn memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("status");
        let line = status.lines().find(|l| l.starts_with("RssAnon:")).expect("RssAnon");
        let kib: u64 = line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("KiB");
        kib << 10
    }

    /// Files that the daemon holds open beneath `folder`.
    pub fn open_files(&self, folder: &Path) -> Vec<PathBuf> {
        fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .expect("the daemon's descriptors")
            .filter_map(|fd| fs::read_link(fd.ok()?.path()).ok())
            .filter(|target| target.starts_with(folder) && target.is_file())
            .collect()
    }

    /// Unmounts as a user does, waits for the daemon and returns its exit status.
    pub fn unmount(mut self) -> ExitStatus {
        // A program that another test starts at this moment holds copies of our files until exec.
        let umount = || outcome(flatdisk().arg("umount").arg(self.dir.path()));
        wait_until("the mount is not in use", || umount().status.code() != Some(32));
        assert!(!is_mounted(self.dir.path()), "umount did not unmount");
        self.mounted = false;
        self.daemon.wait().expect("wait for the daemon")
    }

    /// Kills the daemon without warning and clears its mount point.
    pub fn kill(mut self) {
        self.kill_daemon();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.mounted {
            let _ = self.daemon.kill();
            let _ = self.daemon.wait();
            let _ = outcome(Command::new("umount").arg("-il").arg(self.dir.path()));
        }
    }
}

/// Whether something is mounted at exactly this path.
pub fn is_mounted(path: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    mounts.lines().any(|l| l.split(' ').nth(4).is_some_and(|at| Path::new(at) == path))
}

/// A loop device over a file.
pub struct Loop {
    /// The device node.
    pub device: PathBuf,
}

impl Loop {
    /// Attaches `file` with direct I/O.
    pub fn new(file: &Path, options: &[&str]) -> Self {
        let mut command = Command::new("losetup");
        command.args(["-f", "--show", "--direct-io=on"]).args(options).arg(file);
        Self { device: succeed(&mut command).trim().into() }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = outcome(Command::new("losetup").arg("-d").arg(&self.device));
    }
}

/// A mounted file system.
pub struct MountedFs {
    dir: tempfile::TempDir,
    _mounting: Mounting,
}

impl MountedFs {
    /// Mounts a device.
    pub fn new(device: &Path, options: &[&str]) -> Self {
        let dir = tempfile::Builder::new().prefix("flatdisk-fs-").tempdir().expect("tempdir");
        let mounting = mounting();
        succeed(Command::new("mount").args(options).arg(device).arg(dir.path()));
        Self { dir, _mounting: mounting }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Unmounts it; failing to is the test's failure.
    pub fn unmount(self) {
        succeed(Command::new("umount").arg(self.dir.path()));
    }
}

impl Drop for MountedFs {
    fn drop(&mut self) {
        if is_mounted(self.dir.path()) {
            let _ = outcome(Command::new("umount").arg("-l").arg(self.dir.path()));
        }
    }
}

/// The names in a folder, sorted.
pub fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let name = |entry: fs::DirEntry| entry.file_name().into_string().expect("a name of ours");
    let mut names: Vec<_> = entries.map(|entry| name(entry.expect("readdir"))).collect();
    names.sort();
    names
}

/// Removes the name of an image that a program may just be closing.
pub fn unlink(name: &Path) {
    wait_until("the image can be closed", || match fs::remove_file(name) {
        Ok(()) => true,
        Err(e) => {
            assert_eq!(e.raw_os_error(), Some(libc::EBUSY), "{}", name.display());
            false
        }
    });
}

/// SHA-256 of a file, in hex.
pub fn sha256(path: &Path) -> String {
    use sha2::Digest;
    use std::io::Read;
    let mut file = fs::File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut hash = sha2::Sha256::new();
    let mut buf = vec![0; 1 << 20];
    loop {
        match file.read(&mut buf).unwrap_or_else(|e| panic!("{}: {e}", path.display())) {
            0 => return hash.finalize().iter().map(|b| format!("{b:02x}")).collect(),
            n => hash.update(&buf[..n]),
        }
    }
}

/// A folder for images, on the file system that temporary files are on.
pub fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("flatdisk-test-").tempdir().expect("tempdir")
}
