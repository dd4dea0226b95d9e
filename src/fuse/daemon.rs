//! The life of a mount: what is checked first, what runs beside it, how it ends.
//!
//! Besides the threads that serve requests there are: one that has tables flushed at most
//! [`FLUSH_INTERVAL`] after their data, one for signals, one for the control socket, and the caller's, which
//! waits for the end. A signal asks for an ordinary unmount, which fails while somebody uses the
//! mount; the second one detaches it from the name space. Either way every image is closed only when the
//! kernel has ended the session, and then nobody can write any more.
//!
//! systemd's watchdog is fed as long as no request and no flush takes longer than its `WatchdogSec`.

use std::fs;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use nix::unistd::{getegid, geteuid};
use signal_hook::consts::{
    SIGALRM, SIGHUP, SIGINT, SIGIO, SIGPROF, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGVTALRM, SIGXCPU,
};
use signal_hook::iterator::Signals;

use super::control::{Server, Service};
use super::facts::HostOpener;
use super::mounts::{self, Life, MountEntry};
use super::options::{Allowed, MountOptions};
use super::tree::{Look, Tree};
use super::{Mounted, control, handed, privileges};
use crate::disk::tables::CacheBudget;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::{OpenOptions, Spelling};
use crate::storage::Access;

/// How long a table stays changed in memory only when nobody asks for a flush. Five seconds are promised; the
/// rest is for the flush itself.
const FLUSH_INTERVAL: Duration = Duration::from_secs(4);

/// How long a round of flushes is waited for. Those that take longer go on beside the next one.
const ROUND: Duration = Duration::from_secs(1);

/// How long images may take to be flushed before the daemon unmounts without them.
const PARTING: Duration = Duration::from_secs(60);

/// How long requests may take that are under way when the kernel ends the session.
const LAST_REQUESTS: Duration = Duration::from_secs(2);

/// Read-ahead of the mount in KiB. The kernel's 128 KiB cost a request each.
const READ_AHEAD_KIB: u32 = 1024;

/// How long systemd may take to make room for a message.
const NOTIFY_PATIENCE: Duration = Duration::from_secs(5);

/// What asks for an orderly end. Of two limits of processor time the lower one does, and a failing
/// power supply.
const ENDING: [i32; 6] = [SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGXCPU, libc::SIGPWR];

/// Signals that would end the process, with every image in it, and that nobody sends to that end.
const MEANINGLESS: [i32; 6] = [SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF, SIGIO];

/// What is to be mounted where.
#[derive(Debug, Clone)]
pub struct MountRequest {
    /// Images and directories.
    pub sources: Vec<PathBuf>,
    /// An existing directory.
    pub mountpoint: PathBuf,
    /// Everything else.
    pub options: MountOptions,
}

/// What ends the wait of the daemon's main thread.
#[derive(Debug, Clone, Copy)]
pub enum Event {
    /// The kernel ended the session, and every request is answered.
    Unmounted,
    /// A thread that serves the session has ended; others may still be at work on a request.
    Ending,
    /// Somebody wants the daemon to stop.
    Signal(i32),
}

/// A mount about to be made: all that can be known beforehand was checked.
pub struct Prepared {
    tree: Arc<Tree>,
    mountpoint: PathBuf,
    /// The mount, where somebody else has made it.
    handed: Option<OwnedFd>,
    source: String,
    options: MountOptions,
}

impl Prepared {
    /// Checks sources, mount point and options.
    pub fn new(request: &MountRequest) -> Result<Self> {
        let options = &request.options;
        let (mountpoint, handed) = match handed::descriptor(&request.mountpoint) {
            Some(descriptor) => take_over(descriptor, request)?,
            None => {
                check_host()?;
                check_allowed(options)?;
                (check_mountpoint(&request.mountpoint)?, None)
            }
        };
        let look = Look {
            read_only: options.read_only,
            nonpersistent: options.nonpersistent.clone(),
            uid: options.uid,
            gid: options.gid,
            fmask: options.fmask,
            dmask: options.dmask,
            suffix: options.suffix.clone(),
            mountpoint: mountpoint.clone(),
            owner: (geteuid().as_raw(), getegid().as_raw()),
            writeback: options.writeback,
            partitions: options.partitions,
        };
        let mut open_options = OpenOptions::new(Access::Read);
        open_options.force = options.force;
        open_options.allow_parent.clone_from(&options.allow_parent);
        open_options.allow_device.clone_from(&options.allow_device);
        open_options.write_devices = options.rw_devices;
        for source in &request.sources {
            let real =
                fs::canonicalize(source).map_err(|e| Error::io("open", &e).in_file(source))?;
            if real.is_dir() {
                open_options.sources.push(real);
            }
        }
        let alone = request.sources.len() == 1 && open_options.sources.is_empty();
        open_options.spelling = Spelling {
            allow_parent: "-o allow_parent=DIR",
            parent: if alone { "-o parent=FILE" } else { "" },
            force: "-o force",
        };
        open_options.budget = CacheBudget::new(options.cache);
        let given = given_parent(request)?;
        let opener = Box::new(HostOpener::new(open_options, given)?);
        let tree = Arc::new(Tree::new(&request.sources, opener, look)?);
        let source = match (&options.fsname, &request.sources[..]) {
            (Some(name), _) => name.clone(),
            (None, [source]) => fs::canonicalize(source)
                .unwrap_or_else(|_| source.clone())
                .to_string_lossy()
                .into_owned(),
            (None, _) => "flatdisk".to_owned(),
        };
        Ok(Self { tree, mountpoint, handed, source, options: options.clone() })
    }

    /// Mounts, calls `ready` once the mount is live, and serves it to its end. Returns what failed
    /// to reach its image.
    pub fn serve(mut self, ready: impl FnOnce() -> Result<()>) -> Result<Vec<String>> {
        privileges::reduce(self.options.read_only);
        let (events, ended) = mpsc::channel();
        forward_signals(events.clone())?;
        let handed = self.handed.take();
        let (tree, options) = (&self.tree, &self.options);
        // Before the mount, which would stay behind if there is no thread to be had.
        let flusher = start_flusher(self.tree.clone())?;
        let mounted = Mounted::new(tree, &self.mountpoint, handed, &self.source, options, events)?;
        let entry = self.entry().inspect_err(|_| {
            let _ = mounts::unmount(&self.mountpoint, false);
        })?;
        set_read_ahead(&entry.device);
        let ending = Arc::new(AtomicBool::new(false));
        let service = Service {
            tree: self.tree.clone(),
            mounted,
            mountpoint: self.mountpoint.clone(),
            source: self.source.clone(),
            read_only: self.options.read_only,
            ending: ending.clone(),
        };
        let server = control::Server::start(&entry.device, service)
            .inspect_err(|e| log::warn!("no control socket: {e}"))
            .ok();
        let begun = ready();
        notify(&format!("READY=1\nSTATUS=Serving {}", self.mountpoint.display()));
        log::info!("{} is mounted on {}", self.source, self.mountpoint.display());
        if let Err(e) = &begun {
            log::error!("{e}");
            let _ = unmount_own(&entry.device, false);
        }
        self.wait(&ended, &entry.device);
        clear_remains(&entry);
        ending.store(true, Ordering::Relaxed);
        notify("STOPPING=1\nSTATUS=Closing images");
        drop(flusher);
        self.tree.close_all();
        let failures = self.tree.failures();
        if let Some(server) = server {
            Server::finish(server, failures.clone());
        }
        log::info!("{} is unmounted", self.mountpoint.display());
        begun.map(|()| failures)
    }

    /// The mount, as the mount table has it.
    fn entry(&self) -> Result<MountEntry> {
        let entry = mounts::mounted_at(&self.mountpoint)?.filter(MountEntry::is_ours);
        entry.ok_or_else(|| {
            Error::new(ErrorKind::Io, "mounted, but not in the mount table")
                .in_file(&self.mountpoint)
        })
    }

    /// Waits for the end of the session.
    fn wait(&self, events: &mpsc::Receiver<Event>, device: &str) {
        let mut asked = 0;
        loop {
            match events.recv() {
                Ok(Event::Signal(signal)) => {
                    asked += 1;
                    self.leave(signal, asked > 1, device);
                }
                Ok(Event::Ending) => return wait_for_requests(events),
                Ok(Event::Unmounted) | Err(_) => return,
            }
        }
    }

    /// Flushes and unmounts because a signal says so.
    fn leave(&self, signal: i32, lazy: bool, device: &str) {
        log::info!("signal {signal}: flushing and unmounting");
        notify("STOPPING=1");
        // Failures are kept, and reported at the end.
        self.tree.flush_all(PARTING);
        self.tree.take_back();
        if let Err(e) = unmount_own(device, lazy) {
            log::error!("{e}; a second signal unmounts all the same");
            notify(&format!("READY=1\nSTATUS={e}"));
        }
    }
}

/// Gives requests the time to end that are under way at the end of the session. One that hangs must not
/// keep the other images from being closed.
fn wait_for_requests(events: &mpsc::Receiver<Event>) {
    let begun = Instant::now();
    while let Some(left) = LAST_REQUESTS.checked_sub(begun.elapsed()) {
        match events.recv_timeout(left) {
            Ok(Event::Unmounted) | Err(RecvTimeoutError::Disconnected) => return,
            Ok(_) => {}
            Err(RecvTimeoutError::Timeout) => log::warn!("a request does not end"),
        }
    }
}

/// Takes over a mount that was made by somebody with the privileges for it.
fn take_over(descriptor: RawFd, request: &MountRequest) -> Result<(PathBuf, Option<OwnedFd>)> {
    let options = &request.options;
    if options.allowed == Some(Allowed::Other) && !options.default_permissions {
        let what = "with allow_other alone the kernel would check no permissions";
        return Err(Error::new(ErrorKind::Denied, what).hint("add default_permissions"));
    }
    let fuse = handed::take(descriptor)?;
    let mount = handed::mount_of(&fuse)?.ok_or_else(|| {
        Error::new(ErrorKind::NotFound, "no mount of type fuse.flatdisk belongs to it")
            .in_file(&request.mountpoint)
    })?;
    Ok((mount.target, Some(fuse)))
}

/// The image whose parent the options name, and that parent.
fn given_parent(request: &MountRequest) -> Result<Option<(PathBuf, PathBuf)>> {
    let Some(parent) = &request.options.parent else { return Ok(None) };
    match &request.sources[..] {
        [image] if !image.is_dir() => {
            let real = fs::canonicalize(image).map_err(|e| Error::io("open", &e).in_file(image))?;
            Ok(Some((real, parent.clone())))
        }
        _ => Err(Error::invalid("mount option `parent`: there is not exactly one image")
            .hint("mount the image by itself")),
    }
}

/// Unmounts the file system with this device number wherever it is mounted now.
fn unmount_own(device: &str, lazy: bool) -> Result<()> {
    let table = mounts::mount_table()?;
    let Some(own) = table.iter().rev().find(|entry| entry.device == device) else {
        return Err(Error::new(ErrorKind::Busy, "detached already, but still in use"));
    };
    let upper = table.iter().rev().find(|entry| entry.target == own.target);
    if upper.is_some_and(|upper| upper.device != device) {
        return Err(Error::new(ErrorKind::Busy, "something else is mounted over the mount")
            .in_file(&own.target));
    }
    mounts::unmount(&own.target, lazy)
}

/// Unmounts what nobody serves any more: the session may have ended by itself, for want of threads or
/// because the kernel aborted it.
fn clear_remains(own: &MountEntry) {
    // The device number is free from the moment the mount is gone: a new one may have it, and be alive.
    // Looking at it in vain could make its unmounting fail.
    let remains = |entry: &MountEntry| {
        let alike = entry.device == own.device && entry.target == own.target;
        alike && mounts::life(&entry.target) != Life::Answers
    };
    if mounts::mount_table().is_ok_and(|table| table.iter().any(remains)) {
        log::error!("the session ended before the mount did");
        if let Err(e) = unmount_own(&own.device, true) {
            log::error!("{e}");
        }
    }
}

/// Checks that this user can make FUSE mounts on this host.
pub fn check_host() -> Result<()> {
    if !Path::new("/dev/fuse").exists() {
        return Err(Error::new(ErrorKind::NotFound, "there is no /dev/fuse")
            .hint("`modprobe fuse` may bring it"));
    }
    let opened = fs::File::options().read(true).write(true).open("/dev/fuse");
    if let Err(e) = opened.as_ref()
        && e.kind() == io::ErrorKind::PermissionDenied
    {
        let hint = "its mode is 0666 as a rule; a container must be given the device, as with \
                    `docker run --device /dev/fuse --cap-add SYS_ADMIN`";
        return Err(Error::io("open", e).in_file(Path::new("/dev/fuse")).hint(hint));
    }
    // mount(8) hands its environment on to a user's helper without PATH; execvp(3) looks here then.
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/bin:/usr/bin".into());
    let helper = || std::env::split_paths(&path).any(|dir| dir.join("fusermount3").exists());
    if !geteuid().is_root() && !helper() {
        return Err(Error::new(ErrorKind::NotFound, "there is no fusermount3")
            .hint("users other than root need it; it is in the package fuse3"));
    }
    Ok(())
}

/// Checks that a mount can be made at `path` and returns its absolute form. What a dead daemon of
/// ours left there is cleared away.
fn check_mountpoint(path: &Path) -> Result<PathBuf> {
    let path = mounts::absolute(path)?;
    if mounts::is_dead(&path) {
        let entry = mounts::mounted_at(&path)?;
        if !entry.is_some_and(|entry| entry.is_ours()) {
            return Err(Error::new(ErrorKind::Busy, "a dead FUSE mount is in the way")
                .in_file(&path)
                .hint(format!("`fusermount3 -uz {}` clears it", path.display())));
        }
        log::warn!("{}: clearing the mount of a daemon that died", path.display());
        mounts::unmount(&path, true)?;
    }
    let meta = fs::metadata(&path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => {
            Error::new(ErrorKind::NotFound, "the mount point does not exist")
                .in_file(&path)
                .hint("create the directory first")
        }
        _ => Error::io("mount point", &e).in_file(&path),
    })?;
    if !meta.is_dir() {
        return Err(Error::invalid("the mount point is not a directory")
            .in_file(&path)
            .hint("the mount point comes last, after what is mounted"));
    }
    if mounts::mounted_at(&path)?.is_some_and(|entry| entry.is_ours()) {
        return Err(Error::new(ErrorKind::Busy, "already a mount of flatdisk")
            .in_file(&path)
            .hint("unmount it first, or mount somewhere else"));
    }
    Ok(path)
}

/// Whether users other than root may let others, root among them, into their mounts.
pub fn users_may_allow_others() -> bool {
    fs::read_to_string("/etc/fuse.conf")
        .is_ok_and(|conf| conf.lines().any(|line| line.trim() == "user_allow_other"))
}

/// Users other than root may let others in only if the administrator allows it.
fn check_allowed(options: &MountOptions) -> Result<()> {
    let others = matches!(options.allowed, Some(Allowed::Other | Allowed::Root));
    if geteuid().is_root() || !others {
        return Ok(());
    }
    if users_may_allow_others() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Denied, "allow_other and allow_root are not allowed to users here")
        .hint("`user_allow_other` in /etc/fuse.conf allows them"))
}

fn forward_signals(events: Sender<Event>) -> Result<()> {
    let mut signals = Signals::new(ENDING.into_iter().chain(MEANINGLESS))
        .map_err(|e| Error::io("installing signal handlers", &e))?;
    let forward = move || {
        for signal in signals.forever() {
            if MEANINGLESS.contains(&signal) {
                log::warn!("signal {signal} means nothing to this daemon");
            } else if events.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    };
    start_thread("signals", forward)
}

/// Flushes the images' tables every [`FLUSH_INTERVAL`] until the returned sender is dropped. When
/// systemd watches the daemon, each round is a sign of life, unless something hangs.
fn start_flusher(tree: Arc<Tree>) -> Result<Sender<()>> {
    let mut watchdog = Watchdog::wanted();
    let patience = watchdog.as_ref().map(|watchdog| watchdog.patience);
    let interval = patience.map_or(FLUSH_INTERVAL, |time| FLUSH_INTERVAL.min(time / 2));
    let (sender, ended) = mpsc::channel::<()>();
    start_thread("flush", move || {
        let mut round = Duration::ZERO;
        let rest = |round| interval.saturating_sub(round);
        while ended.recv_timeout(rest(round)) == Err(RecvTimeoutError::Timeout) {
            let begun = Instant::now();
            tree.look_after_images(ROUND.min(interval / 2));
            if let Some(watchdog) = &mut watchdog {
                watchdog.feed(&tree);
            }
            round = begun.elapsed();
        }
    })?;
    Ok(sender)
}

/// systemd's watchdog. A request or flush counts as hung once it has been under way for as long as
/// systemd waits for a sign of life. Slow disks may take that long; where it never ends, systemd ends the
/// daemon after twice that time or little more.
struct Watchdog {
    /// How long systemd waits for a sign of life.
    patience: Duration,
    hangs: bool,
}

impl Watchdog {
    /// What systemd wants of this process, if anything.
    fn wanted() -> Option<Self> {
        let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
        let time = number("WATCHDOG_USEC").filter(|time| *time > 0)?;
        let own = u64::from(std::process::id());
        let meant = number("WATCHDOG_PID").is_none_or(|process| process == own);
        meant.then(|| Self { patience: Duration::from_micros(time), hangs: false })
    }

    /// Gives a sign of life if there is life in all that is asked of `tree`.
    fn feed(&mut self, tree: &Tree) {
        let hangs = !tree.under_way.longer_than(self.patience).is_empty();
        if !hangs {
            notify("WATCHDOG=1");
        } else if !self.hangs {
            log::error!("a request does not end: no more signs of life for systemd's watchdog");
        }
        self.hangs = hangs;
    }
}

fn start_thread(name: &str, run: impl FnOnce() + Send + 'static) -> Result<()> {
    let started = thread::Builder::new().name(name.into()).spawn(run);
    started.map(drop).map_err(|e| Error::io("starting a thread", &e))
}

/// Only root may; without it reading is somewhat slower.
fn set_read_ahead(device: &str) {
    let path = format!("/sys/class/bdi/{device}/read_ahead_kb");
    if let Err(e) = fs::write(&path, READ_AHEAD_KIB.to_string()) {
        log::debug!("{path}: {e}");
    }
}

/// Tells systemd about the daemon's state, if systemd started it.
fn notify(state: &str) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match socket.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&socket),
    };
    let sent = address.and_then(|address| {
        let socket = UnixDatagram::unbound()?;
        // The daemon goes on without a manager that does not listen.
        socket.set_write_timeout(Some(NOTIFY_PATIENCE))?;
        socket.send_to_addr(state.as_bytes(), &address)
    });
    if let Err(e) = sent {
        log::debug!("telling systemd: {e}");
    }
}
