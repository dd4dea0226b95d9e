//! Attaching and detaching one image, step by step.
//!
//! ```text
//! attach:         record -> daemon -> flat file, or the host's -> loop device -> nodes -> mount
//! attach --fuse:  record -> daemon -> flat file -> mount by a program
//! detach:         umount -> loop device gone -> nodes -> flat unmount, daemon gone -> record
//! ```
//!
//! An attach that fails takes apart what it built by the same steps as detach, and so does a detach
//! after an attach that was killed: each step looks for what it undoes and does nothing if that is not
//! there.
//!
//! # Devices on the host's file
//!
//! Where the disk lies in one piece in a host file for good (fixed VHD, flat VMDK, fixed VHDX with its blocks
//! in order), the loop device is bound to that part of the file itself, and neither the daemon nor FUSE stand
//! between. The daemon has the image open all the while: it has renewed the image's identifiers, durably,
//! before the device comes, since nobody sees the first write, and it marks the image clean when the
//! device is gone. The device cannot reach what lies around the disk. The descriptor that it is bound to
//! carries the locks, so that they last as long as the device, whatever becomes of the daemon.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::unistd::geteuid;

use super::file_system::{self, How};
use super::loop_device::{Binding, LoopDevice};
use super::programs;
use super::slot::{LockedSlot, Record, Slot};
use crate::cli::mount::DAEMON;
use crate::cli::output::complain;
use crate::cli::running;
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::control::{Connection, Request};
use crate::fuse::daemon::users_may_allow_others;
use crate::fuse::mounts::{self, MountEntry};
use crate::names::printable;

/// How long to wait for those who only look at a device that changed: udev, the kernel, file
/// systems that are programs and end after their unmount.
const PATIENCE: Duration = Duration::from_secs(3);

/// How long the image may take to be flushed, and then to be closed.
const CLOSING: Duration = Duration::from_secs(60);

/// How often to look whether they are done.
const POLL: Duration = Duration::from_millis(10);

/// What is asked of `attach`.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// Options for the flat mount, as of `flatdisk mount`.
    pub options: &'a [OsString],
    /// What they make the flat file's name end with.
    pub suffix: OsString,
    /// The file system to mount: where, which partition, how.
    pub file_system: Option<(PathBuf, Option<u32>, How<'a>)>,
    /// Whether a program mounts it, without a loop device.
    pub by_program: bool,
    /// Whether the device may be bound to the host's file by itself.
    pub direct: bool,
}

/// An image being attached or detached.
pub struct Attachment {
    slot: LockedSlot,
    record: Record,
}

impl Attachment {
    /// What `record` says of a slot.
    pub fn new(slot: LockedSlot, record: Record) -> Self {
        Self { slot, record }
    }

    /// Attaches the image. If that fails, nothing is left behind.
    pub fn build(mut self, wanted: &Wanted<'_>) -> Result<(Slot, Record)> {
        let built = match wanted.by_program {
            true => self.mount_by_program(wanted),
            false => self.try_build(wanted),
        };
        match built {
            Ok(()) => Ok((self.slot.unlock(), self.record)),
            Err(e) => {
                let image = self.record.image.clone();
                if let Err(left) = self.take_apart() {
                    complain(format_args!(
                        "{left}; `flatdisk detach {}` tries again",
                        image.display()
                    ));
                }
                Err(e.in_file(&image))
            }
        }
    }

    fn try_build(&mut self, wanted: &Wanted<'_>) -> Result<()> {
        self.slot.save(&self.record)?;
        self.start_daemon(wanted)?;
        let device = match self.bind_host_file(wanted)? {
            Some(device) => device,
            None => self.bind_flat_file(wanted)?,
        };
        device.add_partitions();
        self.record.binding_id = device.binding_id();
        self.record.nodes = device.missing_nodes();
        self.slot.save(&self.record)?;
        device.make_nodes()?;
        if let Some((dir, number, how)) = &wanted.file_system {
            let node = file_system::choose(device, *number)?;
            self.record.mountpoint = Some(dir.clone());
            self.slot.save(&self.record)?;
            let read_only = how.read_only || self.record.read_only;
            file_system::mount(&node, dir, &How { read_only, ..*how })?;
        }
        self.record.complete = true;
        self.slot.save(&self.record)
    }

    /// Binds the host's file, if the disk lies in it in one piece and nobody else uses the image.
    fn bind_host_file(&mut self, wanted: &Wanted<'_>) -> Result<Option<LoopDevice>> {
        if !wanted.direct || self.record.nonpersistent {
            return Ok(None);
        }
        let flat = self.flat_file("", &wanted.suffix);
        let read_only = self.record.read_only;
        // Open until the device is bound.
        let mut daemon = Connection::to(&self.flat_mount()?)?;
        let name = flat.file_name().unwrap_or_default();
        let Some((file, run)) = daemon.borrow_file(name, !read_only)? else { return Ok(None) };
        let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
        self.record.direct = Some(path.map_err(|e| Error::io("open", &e))?);
        let binding = Binding {
            sector_size: run.sector_size,
            read_only,
            offset: run.at,
            size_limit: run.len,
        };
        self.bind(&file, binding).map(Some)
    }

    fn bind_flat_file(&mut self, wanted: &Wanted<'_>) -> Result<LoopDevice> {
        let flat = self.open_flat(&self.flat_file("", &wanted.suffix))?;
        let (sector_size, read_only) = (self.sector_size()?, self.record.read_only);
        let binding = Binding { sector_size, read_only, offset: 0, size_limit: 0 };
        self.bind(&flat, binding)
    }

    fn flat_mount(&self) -> Result<MountEntry> {
        self.slot.mounted()?.ok_or_else(|| Error::invalid("the flat mount is gone"))
    }

    fn mount_by_program(&mut self, wanted: &Wanted<'_>) -> Result<()> {
        let Some((dir, number, how)) = &wanted.file_system else {
            return Err(Error::invalid("a directory to mount on is needed"));
        };
        if programs::mounted(dir)?.is_some() {
            let what = "a file system of a program is mounted there already";
            return Err(Error::new(ErrorKind::Busy, what).in_file(dir));
        }
        self.slot.save(&self.record)?;
        self.start_daemon(wanted)?;
        let whole = self.flat_file("", &wanted.suffix);
        let mode = fs::metadata(&whole).map_err(|e| Error::io("open the flat file", &e))?.mode();
        if !self.record.read_only && mode & 0o222 == 0 {
            self.note_read_only();
        }
        let part = |number| self.flat_file(&format!(".p{number}"), &wanted.suffix);
        let fs_type = how.fs_type.and_then(OsStr::to_str);
        let choice = programs::choose(&whole, part, *number, fs_type)?;
        self.record.program = Some(choice.program().to_owned());
        self.record.mountpoint = Some(dir.clone());
        self.slot.save(&self.record)?;
        let read_only = how.read_only || self.record.read_only;
        let mounted = choice.mount(dir, &How { read_only, ..*how })?;
        self.record.program_mount = Some(mounted.device);
        self.record.complete = true;
        self.slot.save(&self.record)
    }

    /// The flat file of the image, or with `.pN` as `part` of a partition.
    fn flat_file(&self, part: &str, suffix: &OsStr) -> PathBuf {
        let name = self.record.image.file_name().unwrap_or_default();
        let name: OsString = [name, OsStr::new(part), suffix].into_iter().collect();
        self.slot.mount_dir().join(name)
    }

    fn note_read_only(&mut self) {
        let image = self.record.image.display();
        complain(format_args!("{image}: cannot be written, attaching it read-only"));
        self.record.read_only = true;
    }

    /// Starts `flatdisk mount` for the image, which returns when the mount is live.
    fn start_daemon(&self, wanted: &Wanted<'_>) -> Result<()> {
        let mut command = Command::new("/proc/self/exe");
        command.arg0("flatdisk").arg("mount").env_remove(DAEMON).stdin(Stdio::null());
        let words = [
            ("ro", self.record.read_only),
            ("nonpersistent", self.record.nonpersistent),
            ("partitions", wanted.by_program),
            // Some of the programs run as root.
            ("allow_root", wanted.by_program && !geteuid().is_root() && users_may_allow_others()),
        ];
        for (word, _) in words.iter().filter(|(_, given)| *given) {
            command.args(["-o", word]);
        }
        // Behind the words, since `nonpersistent=DIR` says more than the word alone.
        for list in wanted.options {
            command.arg("-o").arg(list);
        }
        command.arg("--").arg(&self.record.image).arg(self.slot.mount_dir());
        let output =
            command.output().map_err(|e| Error::io("starting the background process", &e))?;
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            let own = |line: &str| line.strip_prefix("flatdisk: ").unwrap_or(line).to_owned();
            said.lines().map(own).for_each(complain);
            return Ok(());
        }
        // Its own words, which name the image already.
        let said = said.trim_end().lines().last().unwrap_or_default();
        let said = said.strip_prefix("flatdisk: ").unwrap_or(said);
        let image = format!("{}: ", printable(self.record.image.display()));
        Err(Error::new(ErrorKind::Failed, said.strip_prefix(&image).unwrap_or(said).to_owned()))
    }

    /// Opens the flat file `path`: for writing if that is possible.
    fn open_flat(&mut self, path: &Path) -> Result<File> {
        let failed = |e: io::Error| Error::io("open the flat file", &e);
        if !self.record.read_only {
            match File::options().read(true).write(true).open(path) {
                Err(e) if read_only(&e) => self.note_read_only(),
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                    return Err(failed(e).hint("another program has the image open"));
                }
                opened => return opened.map_err(failed),
            }
        }
        File::open(path).map_err(failed)
    }

    /// Bytes per sector of the disk, by the daemon that has it open.
    fn sector_size(&self) -> Result<u32> {
        let status = Connection::to(&self.flat_mount()?)?.ask(&Request::Status)?.status;
        let image = status.and_then(|status| status.images.into_iter().next());
        image.map(|image| image.sector_size).ok_or_else(|| Error::invalid("the image is not open"))
    }

    /// Binds a file to a free loop device.
    fn bind(&mut self, file: &File, binding: Binding) -> Result<LoopDevice> {
        let begun = Instant::now();
        loop {
            let device = LoopDevice::free()?;
            self.record.device = Some(device.node());
            self.slot.save(&self.record)?;
            match device.bind(file, binding) {
                // Somebody else was faster.
                Err(e) if e.kind() == ErrorKind::Busy && begun.elapsed() < PATIENCE => {}
                bound => return bound.map(|()| device),
            }
        }
    }

    /// Detaches the image. `Busy`, and nothing is changed, while a mount that attach did not make,
    /// swap space or another block device uses it. Returns what failed to reach the image.
    pub fn detach(self) -> Result<Vec<String>> {
        if let Some(device) = self.slot.device(&self.record) {
            let users = file_system::other_users(device, self.record.mountpoint.as_deref())?;
            if !users.is_empty() {
                return Err(in_use(device, &users));
            }
        }
        self.take_apart()
    }

    fn take_apart(mut self) -> Result<Vec<String>> {
        if let Some(device) = self.slot.device(&self.record) {
            self.unbind(device)?;
        }
        let by_program = self.record.program.is_some();
        if let (Some(_), Some(dir)) = (self.record.own_mount()?, &self.record.mountpoint) {
            mounts::unmount(dir, false)?;
        }
        remove_nodes(&self.record.nodes);
        let mut failures = Vec::new();
        if self.record.binding_id.is_some() && self.slot.mounted()?.is_none() {
            let elsewhere =
                "its flat mount is gone already; not waiting for the image to be closed";
            complain(format_args!("{}: {elsewhere}", self.record.image.display()));
        }
        // A program writes what it has in memory before it lets go.
        retry_while_busy(if by_program { CLOSING } else { PATIENCE }, || {
            while self.slot.mounted()?.is_some() {
                failures.extend(running::try_umount(&self.slot.mount_dir(), false, CLOSING)?);
            }
            Ok(())
        })?;
        self.slot.remove()?;
        Ok(failures)
    }

    fn unmount_file_system(&mut self, device: LoopDevice) -> Result<()> {
        let Some(dir) = &self.record.mountpoint else { return Ok(()) };
        self.record.complete = false;
        loop {
            let own = file_system::mounts_of(device)?;
            if own.iter().all(|entry| entry.target != *dir) {
                return Ok(());
            }
            if mounts::mounted_at(dir)?.is_some_and(|uppermost| !own.contains(&uppermost)) {
                let what = "something else is mounted over the file system";
                return Err(Error::new(ErrorKind::Busy, what).in_file(dir));
            }
            file_system::unmount(dir)?;
            self.slot.save(&self.record)?;
        }
    }

    /// Unmounts the file system, unbinds the device, and waits until it has let go of the flat file.
    fn unbind(&mut self, device: LoopDevice) -> Result<()> {
        let begun = Instant::now();
        loop {
            // Each time: a mount(8) that outlived its attach may mount only now.
            self.unmount_file_system(device)?;
            if !device.claimed() && file_system::openers(device).is_empty() {
                break;
            }
            if begun.elapsed() > PATIENCE {
                let mut users = file_system::other_users(device, None)?;
                users.extend(file_system::openers(device));
                return Err(in_use(device, &users));
            }
            thread::sleep(POLL);
        }
        if self.record.direct.is_some() && !self.record.read_only {
            // The daemon does it once more, if it still lives.
            device.sync()?;
        }
        device.clear()?;
        while self.slot.device(&self.record).is_some() {
            if begun.elapsed() > PATIENCE {
                return Err(in_use(device, &file_system::openers(device)));
            }
            thread::sleep(POLL);
        }
        Ok(())
    }
}

/// Removes nodes made by hand; their numbers may mean something else soon.
pub fn remove_nodes(nodes: &[PathBuf]) {
    for node in nodes {
        if let Err(e) = fs::remove_file(node)
            && e.kind() != io::ErrorKind::NotFound
        {
            complain(format_args!("{}: {e}", node.display()));
        }
    }
}

fn read_only(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EROFS | libc::EACCES))
}

fn in_use(device: LoopDevice, users: &[String]) -> Error {
    let what = match users {
        [] => "in use, perhaps in another mount namespace".to_owned(),
        users => format!("in use by {}", users.join(", ")),
    };
    Error::new(ErrorKind::Busy, what).in_file(&device.node())
}

/// A device lets go of its file a moment after it is unbound.
fn retry_while_busy(patience: Duration, mut step: impl FnMut() -> Result<()>) -> Result<()> {
    let begun = Instant::now();
    loop {
        match step() {
            Err(e) if e.kind() == ErrorKind::Busy && begun.elapsed() < patience => {
                thread::sleep(POLL);
            }
            done => return done,
        }
    }
}

/// Absolute path of an existing directory, for a mount point.
pub fn directory(path: &Path) -> Result<PathBuf> {
    let failed = |e: io::Error| Error::io("mount point", &e).in_file(path);
    let real = fs::canonicalize(path).map_err(failed)?;
    match real.is_dir() {
        true => Ok(real),
        false => Err(Error::invalid("the mount point is not a directory").in_file(path)),
    }
}
