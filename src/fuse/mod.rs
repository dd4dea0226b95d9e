//! The FUSE front end: a mount that shows images as flat files.
//!
//! ```text
//! daemon      life of a mount: checks, mount, signals, flushing, unmount
//! control     the socket through which other commands reach a running daemon
//! options     what `-o` takes
//! privileges  what root's daemon gives up
//! mounts      the host's mount table
//! handed      mounts that somebody else made for the daemon
//! filesystem  requests of the kernel -> tree -> replies          (fuser's types end here)
//! passthrough flat files that the kernel reads by itself
//! lanes       threads for requests, so that one that hangs holds up no other
//! crew        the same work on many images, of which any may hang
//! under_way   what does not end, for the watchdog and `status`
//! tree        names, inode numbers, attributes, handles
//! image       one flat file: closed, open to read, open to write
//! parts       partitions as files, and who writes which part of a disk
//! facts       what is known of images that are not open
//! listing     what a directory or an archive shows
//! source      the directories behind it, confined
//! errno       error kind -> errno
//! ```
//!
//! # Listing does not open
//!
//! The kernel can ask for names and attributes in one request (readdirplus). Attributes of a flat
//! file need a look into the image, so that capability is left off: `ls` of a large folder opens
//! nothing, `ls -l` looks at each image once.
//!
//! # Files
//!
//! - `control`: the control socket;
//! - `crew`: the same work on many things, of which any may hang;
//! - `daemon`: the life of a mount;
//! - `errno`: what a program sees of an [`Error`];
//! - `facts`: what is known of images that are not open;
//! - `filesystem`: `impl fuser::Filesystem`;
//! - `handed`: mounts that somebody else made;
//! - `image`: one flat file;
//! - `lanes`: threads for requests, so that those that hang hold up no others;
//! - `listing`: what a directory shows;
//! - `mounts`: the host's mount table;
//! - `options`: mount options;
//! - `parts`: partitions that show as files of their own, and who writes which part of a disk;
//! - `passthrough`: flat files that the kernel reads and writes by itself, without asking the
//!   daemon;
//! - `privileges`: what the daemon of root gives up before it serves anybody;
//! - `source`: the host directories behind a mount;
//! - `tree`: the mounted tree;
//! - `under_way`: what is under way, and since when.

pub mod control;
pub mod crew;
pub mod daemon;
pub mod errno;
pub mod facts;
mod filesystem;
mod handed;
pub mod image;
mod lanes;
pub mod listing;
pub mod mounts;
pub mod options;
mod parts;
mod passthrough;
mod privileges;
pub mod source;
pub mod tree;
mod under_way;

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use fuser::{BackgroundSession, Config, MountOption, Notifier, Session, SessionACL};
use nix::unistd::geteuid;

use crate::error::{Error, ErrorKind, Result};
use filesystem::Shell;
use lanes::RESERVE;
use options::{Allowed, MountOptions};
use tree::Tree;

/// Threads that are left to the daemon's other work where there are few to be had.
const OTHERS: usize = 8;

/// Whether a user may open and close images and end the mount: the daemon's own, and root.
pub fn is_master(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

/// A live mount. It is unmounted by path from outside, never on drop: by then something else may be
/// mounted there.
pub struct Mounted {
    session: std::mem::ManuallyDrop<BackgroundSession>,
}

impl Mounted {
    /// Mounts `tree` at `mountpoint`, unless the mount is there already and `handed` is its open
    /// `/dev/fuse`; `events` hears of the end.
    pub fn new(
        tree: &Arc<Tree>,
        mountpoint: &Path,
        handed: Option<OwnedFd>,
        source: &str,
        options: &MountOptions,
        events: Sender<daemon::Event>,
    ) -> Result<Self> {
        let failed = |e: io::Error| mount_failed(&e).in_file(mountpoint);
        let readers = options.threads.unwrap_or_else(default_threads);
        let all = find_threads(readers)?;
        let shell = Shell::new(tree.clone(), options, readers, all, events);
        let mut config = config(source, options);
        config.n_threads = Some(all);
        let session = match handed {
            // Whoever mounted said who may use it, and the kernel sees to that.
            Some(fuse) => Session::from_fd(shell, fuse, SessionACL::All, config),
            None => Session::new(shell, mountpoint, &config),
        };
        let session = session.map_err(failed)?;
        let session = session.spawn().map_err(failed)?;
        let notifier = session.notifier();
        tree.on_old_pages(move |ino, wait| drop_pages(notifier.clone(), ino, wait));
        Ok(Self { session: std::mem::ManuallyDrop::new(session) })
    }

    /// Makes the kernel look a name in the root up again.
    pub fn name_changed(&self, name: &std::ffi::OsStr) {
        if let Err(e) = self.session.notifier().inval_entry(fuser::INodeNo(tree::ROOT), name) {
            log::debug!("telling the kernel about `{}`: {e}", name.display());
        }
    }
}

/// How many threads a session gets of which `readers` read at a time: a reserve too, where there are so many
/// to be had and some for the daemon's other work.
///
/// Fails where not even `readers` are. Without them the session would end as soon as it has begun, and a
/// mount with nobody behind it stay.
fn find_threads(readers: usize) -> Result<usize> {
    let (held, wait) = std::sync::mpsc::channel::<()>();
    let wait = Arc::new(parking_lot::Mutex::new(wait));
    let (mut begun, mut failure) = (Vec::new(), None);
    while begun.len() < readers + RESERVE + OTHERS && failure.is_none() {
        let wait = wait.clone();
        let thread = std::thread::Builder::new().spawn(move || wait.lock().recv().is_ok());
        thread.map_or_else(|e| failure = Some(e), |thread| begun.push(thread));
    }
    drop(held);
    let found = begun.len();
    begun.into_iter().for_each(|thread| _ = thread.join());
    match failure {
        Some(e) if found < readers => {
            let what = format!("starting the {readers} threads that serve requests");
            Err(Error::io(what, &e).hint("-o threads=4 needs fewer; `ulimit -u` limits them"))
        }
        _ => Ok(readers + found.saturating_sub(readers + OTHERS)),
    }
}

/// Makes the kernel drop its pages of a file. That may wait for requests under way, which only others
/// can answer; with `wait`, it is done on return.
fn drop_pages(notifier: Notifier, ino: u64, wait: bool) {
    let drop = move || match notifier.inval_inode(fuser::INodeNo(ino), 0, 0) {
        // Long forgotten, and its pages with it.
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
        Err(e) => log::debug!("telling the kernel about old pages: {e}"),
        Ok(()) => {}
    };
    if wait {
        return drop();
    }
    if let Err(e) = std::thread::Builder::new().spawn(drop) {
        log::error!("programs that have a rewritten file open may read old data: {e}");
    }
}

fn config(source: &str, options: &MountOptions) -> Config {
    let root = geteuid().is_root();
    let mut config = Config::default();
    // fusermount3 splits its options at commas; mount(2) takes the source as it is.
    let source = match root {
        true => source.to_owned(),
        false => source.replace('\\', r"\\").replace(',', r"\,"),
    };
    config.mount_options = vec![
        MountOption::FSName(source),
        // As a plain word it reaches the kernel on both ways of mounting.
        MountOption::CUSTOM("subtype=flatdisk".into()),
        MountOption::DefaultPermissions,
        if options.read_only { MountOption::RO } else { MountOption::RW },
    ];
    config.mount_options.extend(options.kernel.iter().filter_map(|flag| kernel_flag(flag)));
    if options.auto_unmount {
        config.mount_options.push(MountOption::AutoUnmount);
    }
    config.acl = match options.allowed.unwrap_or(if root { Allowed::Other } else { Allowed::Owner })
    {
        Allowed::Owner => SessionACL::Owner,
        Allowed::Root => SessionACL::RootAndOwner,
        Allowed::Other => SessionACL::All,
    };
    config.clone_fd = true;
    config
}

/// Threads that read requests at a time: enough that a few long ones (fsync, a large discard) keep nobody
/// waiting.
fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(4, |n| n.get()).clamp(4, 16)
}

fn kernel_flag(name: &str) -> Option<MountOption> {
    Some(match name {
        "suid" => MountOption::Suid,
        "nosuid" => MountOption::NoSuid,
        "dev" => MountOption::Dev,
        "nodev" => MountOption::NoDev,
        "exec" => MountOption::Exec,
        "noexec" => MountOption::NoExec,
        "atime" => MountOption::Atime,
        "noatime" => MountOption::NoAtime,
        "sync" => MountOption::Sync,
        "async" => MountOption::Async,
        "dirsync" => MountOption::DirSync,
        _ => return None,
    })
}

fn mount_failed(e: &io::Error) -> Error {
    if e.raw_os_error().is_some() {
        return Error::io("mount", e);
    }
    // fusermount3's own words, of which the first line tells.
    let said = e.to_string();
    let said = said.lines().next().unwrap_or_default();
    let said = said.strip_prefix("fusermount3: ").unwrap_or(said);
    Error::new(ErrorKind::Io, format!("mount: {said}"))
}
