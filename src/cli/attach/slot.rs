//! What is known of an attached image while no process of `attach` runs.
//!
//! Each attached image has a directory in the runtime directory, named after the image's file, so
//! that an image is attached once at most. In it are the private mount point and the [`Record`]. The
//! record is written *before* each step that leaves something behind; what it names may therefore not be
//! there, and is looked for before it is undone. A lock on the directory, held while `attach` or
//! `detach` works on it, ends with the process.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::loop_device::LoopDevice;
use super::programs;
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::control::runtime_dir;
use crate::fuse::mounts::{self, MountEntry};

/// How long another `attach`, `detach` or `--list` may hold the lock before it counts as at work.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

const RECORD: &str = "record.json";

/// What `attach` did, or was about to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// The image.
    #[serde(with = "crate::names")]
    pub image: PathBuf,
    /// Node of the loop device.
    pub device: Option<PathBuf>,
    /// [`LoopDevice::binding_id`] of the device.
    pub binding_id: Option<String>,
    /// The host's file to which the device is bound by itself; `None` where it is bound to the flat file.
    #[serde(default, with = "crate::names::some")]
    pub direct: Option<PathBuf>,
    /// Nodes of partitions that had to be made by hand.
    pub nodes: Vec<PathBuf>,
    /// Where a file system of the disk is mounted.
    #[serde(with = "crate::names::some")]
    pub mountpoint: Option<PathBuf>,
    /// The program that mounts it, in place of the kernel from a loop device.
    #[serde(default)]
    pub program: Option<String>,
    /// Device number of the file system that it mounted, once it has.
    #[serde(default)]
    pub program_mount: Option<String>,
    /// Whether the device refuses writes.
    pub read_only: bool,
    /// Whether what is written vanishes.
    pub nonpersistent: bool,
    /// Whether every step was done.
    pub complete: bool,
}

impl Record {
    /// The file system that a program mounted for it, if that is still mounted.
    pub fn own_mount(&self) -> Result<Option<MountEntry>> {
        let Some(dir) = self.mountpoint.as_ref().filter(|_| self.program.is_some()) else {
            return Ok(None);
        };
        // Not recorded yet, it is what came to be mounted where nothing of the kind was.
        let own = |mount: &MountEntry| {
            self.program_mount.as_ref().is_none_or(|device| *device == mount.device)
        };
        Ok(programs::mounted(dir)?.filter(own))
    }
}

/// What has become of an attached image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// In order.
    Attached,
    /// `attach` or `detach` is at work.
    Changing,
    /// `attach` or `detach` ended half way.
    Incomplete,
    /// The daemon died: every read and write fails, unless the device uses the image's file by itself.
    DaemonDied,
    /// Somebody else detached the loop device.
    DeviceGone,
    /// Somebody else unmounted what a program had mounted.
    MountGone,
}

/// An image's directory.
#[derive(Debug)]
pub struct Slot {
    dir: PathBuf,
}

/// A slot that only this process changes.
pub struct LockedSlot {
    slot: Slot,
    lock: Flock<File>,
}

impl std::ops::Deref for LockedSlot {
    type Target = Slot;

    fn deref(&self) -> &Slot {
        &self.slot
    }
}

/// Where all slots are.
pub fn slots_dir() -> Result<PathBuf> {
    Ok(runtime_dir()?.join("attached"))
}

impl Slot {
    /// The slot of the image at `path`, whether it exists or not.
    pub fn of_image(path: &Path) -> Result<Self> {
        let meta = fs::metadata(path).map_err(|e| Error::io("open", &e).in_file(path))?;
        Ok(Self { dir: slots_dir()?.join(format!("{:x}-{}", meta.dev(), meta.ino())) })
    }

    /// Whether an attach of the image has begun.
    pub fn exists(&self) -> bool {
        self.dir.exists()
    }

    /// Every slot with a record.
    pub fn all() -> Result<Vec<(Self, Record)>> {
        let entries = fs::read_dir(slots_dir()?).into_iter().flatten().flatten();
        let slots = entries.map(|entry| Self { dir: entry.path() });
        let mut found: Vec<_> =
            slots.filter_map(|slot| slot.record().map(|record| (slot, record))).collect();
        found.sort_by(|(_, a), (_, b)| a.device.cmp(&b.device));
        Ok(found)
    }

    /// The private mount point.
    pub fn mount_dir(&self) -> PathBuf {
        self.dir.join("flat")
    }

    /// The flat mount, if it is there.
    pub fn mounted(&self) -> Result<Option<MountEntry>> {
        Ok(mounts::mounted_at(&self.mount_dir())?.filter(MountEntry::is_ours))
    }

    /// What was recorded last.
    pub fn record(&self) -> Option<Record> {
        serde_json::from_slice(&fs::read(self.dir.join(RECORD)).ok()?).ok()
    }

    /// The loop device of this slot, if it is still bound to the slot's flat file, or the image's own.
    pub fn device(&self, record: &Record) -> Option<LoopDevice> {
        let device = LoopDevice::of_node(record.device.as_deref()?)?;
        let file = device.backing_file()?;
        // The file's path is another one once the flat mount was detached from the name space; the
        // id may not have been recorded yet.
        let same = record.binding_id.is_some() && record.binding_id == device.binding_id();
        let own = file.starts_with(self.mount_dir()) || record.direct.as_ref() == Some(&file);
        (same || own).then_some(device)
    }

    /// What has become of the image.
    pub fn state(&self, record: &Record) -> State {
        let locked = File::open(&self.dir)
            .map(|dir| Flock::lock(dir, FlockArg::LockSharedNonblock).is_err());
        if !locked.is_ok_and(|locked| !locked) {
            State::Changing
        } else if mounts::is_dead(&self.mount_dir()) {
            State::DaemonDied
        } else if !record.complete {
            State::Incomplete
        } else if record.program.is_some() {
            match record.own_mount() {
                Ok(Some(_)) => State::Attached,
                _ => State::MountGone,
            }
        } else if self.device(record).is_none() {
            State::DeviceGone
        } else {
            State::Attached
        }
    }

    /// Makes the slot this process's own, empty if there is none yet. `Busy` if another process works
    /// on it.
    pub fn lock(self) -> Result<LockedSlot> {
        let failed = |e: io::Error| Error::io("create", &e).in_file(&self.dir);
        let create = |dir: &Path| fs::DirBuilder::new().mode(0o700).recursive(true).create(dir);
        let begun = Instant::now();
        loop {
            create(&self.dir).map_err(failed)?;
            // Another process may remove it at any moment before it is locked.
            let dir = match File::open(&self.dir) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.map_err(failed)?,
            };
            let inode = dir.metadata().map_err(failed)?.ino();
            match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
                Ok(lock) if fs::metadata(&self.dir).is_ok_and(|now| now.ino() == inode) => {
                    match create(&self.mount_dir()) {
                        Err(e) if !mounts::is_dead(&self.mount_dir()) => return Err(failed(e)),
                        _ => return Ok(LockedSlot { slot: self, lock }),
                    }
                }
                Ok(_) => {}
                Err((_, Errno::EWOULDBLOCK)) if begun.elapsed() < LOCK_PATIENCE => {
                    thread::sleep(Duration::from_millis(10));
                }
                Err((_, Errno::EWOULDBLOCK)) => {
                    let what = "another attach or detach of it is at work";
                    return Err(Error::new(ErrorKind::Busy, what));
                }
                Err((_, e)) => return Err(Error::io("lock", &e.into()).in_file(&self.dir)),
            }
        }
    }
}

impl LockedSlot {
    /// Lets others change it again.
    pub fn unlock(self) -> Slot {
        drop(self.lock);
        self.slot
    }

    /// Records what is about to be done.
    pub fn save(&self, record: &Record) -> Result<()> {
        let (path, new) = (self.dir.join(RECORD), self.dir.join("record.new"));
        let failed = |e: io::Error| Error::io("write", &e).in_file(&path);
        let text = serde_json::to_vec_pretty(record).map_err(|e| failed(e.into()))?;
        fs::write(&new, text).map_err(failed)?;
        fs::rename(&new, &path).map_err(failed)
    }

    /// Removes the slot, in which nothing is mounted any more.
    pub fn remove(self) -> Result<()> {
        let failed = |e: io::Error| Error::io("remove", &e).in_file(&self.dir);
        // First what fails if something was mounted at the last moment, last what makes it a slot.
        fs::remove_dir(self.mount_dir()).map_err(failed)?;
        let _ = fs::remove_file(self.dir.join("record.new"));
        let _ = fs::remove_file(self.dir.join(RECORD));
        fs::remove_dir(&self.dir).map_err(failed)?;
        drop(self.lock);
        Ok(())
    }
}
