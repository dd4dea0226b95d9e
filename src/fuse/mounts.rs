//! The host's mount table: finding, clearing and undoing mounts of ours.
//!
//! Nothing here looks *into* a mount: a daemon that died or hangs would make that fail or wait.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, LazyLock, mpsc};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::makedev;
use nix::sys::statvfs::statvfs;
use parking_lot::Mutex;

use super::crew::Crew;
use super::source::normalise;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::reach::Gate;
use crate::storage::user;

/// The type of our mounts in mount tables.
pub const FS_TYPE: &str = "fuse.flatdisk";

/// How long a look at a mount may take.
const LOOK: Duration = Duration::from_secs(1);

/// How long a search through all processes may take.
const SEARCH: Duration = Duration::from_secs(2);

/// A mount, as `/proc/self/mountinfo` has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Device number of the mounted file system, `major:minor`; one per mount of ours.
    pub device: String,
    /// Where it is mounted.
    pub target: PathBuf,
    /// File system type.
    pub fs_type: String,
    /// What is mounted.
    pub source: OsString,
    /// The user who mounted it (FUSE).
    pub user: Option<u32>,
}

impl MountEntry {
    /// The device number as stat(2) has it.
    pub fn number(&self) -> Option<u64> {
        let (major, minor) = self.device.split_once(':')?;
        Some(makedev(major.parse().ok()?, minor.parse().ok()?))
    }

    /// Whether it is FUSE's.
    pub fn is_fuse(&self) -> bool {
        self.fs_type == "fuse" || self.fs_type == "fuseblk" || self.fs_type.starts_with("fuse.")
    }

    /// Whether a flatdisk serves it.
    pub fn is_ours(&self) -> bool {
        self.fs_type == FS_TYPE
    }
}

/// The mount table, in order of mounting.
pub fn mount_table() -> Result<Vec<MountEntry>> {
    let path = Path::new("/proc/self/mountinfo");
    table_in(path).map_err(|e| Error::io("read", &e).in_file(path))
}

fn table_in(path: &Path) -> io::Result<Vec<MountEntry>> {
    Ok(fs::read(path)?.split(|b| *b == b'\n').filter_map(parse_line).collect())
}

/// Where the file system `device` is mounted, for people: here, or in the mount namespaces of other
/// processes as far as this user may look into them, and they let themselves be looked into within
/// [`SEARCH`].
pub fn elsewhere(device: &str) -> Result<Option<String>> {
    let here = mount_table()?.into_iter().find(|entry| entry.device == device);
    if let Some(entry) = here {
        return Ok(Some(format!("on {}", entry.target.display())));
    }
    // A process that hangs may make whoever looks at it hang.
    let crew = Crew::start(vec![device.to_owned()], |device| in_other_namespaces(device));
    crew.wait(SEARCH);
    Ok(crew.end().into_iter().find_map(|(_, found)| found.flatten()))
}

fn in_other_namespaces(device: &str) -> Option<String> {
    let mut seen = BTreeSet::from([fs::read_link("/proc/self/ns/mnt").unwrap_or_default()]);
    for process in processes() {
        let namespace = fs::read_link(process.join("ns/mnt"));
        if namespace.is_ok_and(|namespace| seen.insert(namespace))
            && let Ok(table) = table_in(&process.join("mountinfo"))
            && let Some(entry) = table.into_iter().find(|entry| entry.device == device)
        {
            let id = process.file_name().unwrap_or_default().display();
            let target = entry.target.display();
            return Some(format!("on {target} in the mount namespace of process {id}"));
        }
    }
    None
}

/// Which mounts a daemon enters: not flatdisk's, whose daemon may be itself or wait for it, and not FUSE
/// mounts of users who are strangers to it, who may let it wait for ever.
#[derive(Debug, Default)]
struct Entered {
    table: Mutex<Option<Watched>>,
}

/// The mount table, as long as it stays as it is.
#[derive(Debug)]
struct Watched {
    file: File,
    entries: Vec<MountEntry>,
}

/// The gate to mounts below the directories that this process serves.
pub fn gate() -> Arc<dyn Gate> {
    static GATE: LazyLock<Arc<Entered>> = LazyLock::new(Arc::default);
    GATE.clone()
}

impl Gate for Entered {
    fn lets_in(&self, device: u64) -> bool {
        let mut table = self.table.lock();
        if table.as_ref().is_none_or(Watched::changed) {
            *table = Watched::now().inspect_err(|e| log::warn!("the mount table: {e}")).ok();
        }
        let Some(table) = &*table else { return false };
        let barred = |entry: &MountEntry| {
            let stranger = entry.user.is_some_and(|user| !user::is_own(user));
            entry.number() == Some(device) && (entry.is_ours() || entry.is_fuse() && stranger)
        };
        !table.entries.iter().any(barred)
    }
}

impl Watched {
    fn now() -> io::Result<Self> {
        let mut file = File::open("/proc/self/mountinfo")?;
        let mut table = Vec::new();
        file.read_to_end(&mut table)?;
        let entries = table.split(|b| *b == b'\n').filter_map(parse_line).collect();
        Ok(Self { file, entries })
    }

    /// Whether anything was mounted or unmounted since.
    fn changed(&self) -> bool {
        let mut asked = [PollFd::new(self.file.as_fd(), PollFlags::POLLPRI)];
        !poll(&mut asked, PollTimeout::ZERO).is_ok_and(|changed| changed == 0)
    }
}

/// The directories of all processes in `/proc`.
fn processes() -> impl Iterator<Item = PathBuf> {
    entries(Path::new("/proc")).map(|entry| entry.path()).filter(|path| {
        let name = path.file_name().and_then(OsStr::to_str);
        name.is_some_and(|name| name.bytes().all(|b| b.is_ascii_digit()))
    })
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|b| *b == b' ');
    let device = String::from_utf8(fields.nth(2)?.to_vec()).ok()?;
    let target = unescape(fields.nth(1)?);
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let fs_type = String::from_utf8_lossy(fields.next()?).into_owned();
    let source = unescape(fields.next()?);
    let user = fields.next().unwrap_or_default().split(|b| *b == b',').find_map(|option| {
        std::str::from_utf8(option.strip_prefix(b"user_id=")?).ok()?.parse().ok()
    });
    Some(MountEntry { device, target: target.into(), fs_type, source, user })
}

/// Undoes the kernel's octal escapes of blanks and backslashes.
fn unescape(field: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = after
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(byte) => {
                plain.push(byte);
                rest = &after[3..];
            }
            None => {
                plain.push(*first);
                rest = after;
            }
        }
    }
    OsString::from_vec(plain)
}

/// What is mounted at `target` (uppermost), if anything is.
pub fn mounted_at(target: &Path) -> Result<Option<MountEntry>> {
    Ok(mount_table()?.into_iter().rev().find(|entry| entry.target == target))
}

/// Absolute path of a directory that may be a dead mount point: symlinks are followed up to its
/// parent, the last component is taken as it is when it does not answer.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    let failed = |e: io::Error| Error::io("find", &e).in_file(path);
    let absolute = std::path::absolute(path).map_err(failed)?;
    if let Ok(real) = fs::canonicalize(&absolute) {
        return Ok(real);
    }
    let absolute = normalise(&absolute).ok_or_else(|| Error::invalid("not a path"))?;
    match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => Ok(fs::canonicalize(parent).map_err(failed)?.join(name)),
        _ => Ok(absolute),
    }
}

/// Whether somebody serves a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// A daemon answers.
    Answers,
    /// Nobody has answered yet.
    Silent,
    /// Nobody will.
    Dead,
}

/// Whether somebody answers at `path`.
pub fn life(path: &Path) -> Life {
    let path = path.to_owned();
    let (sender, answer) = mpsc::channel();
    // The kernel waits for an answer without an end.
    let asked = thread::Builder::new().name("look".into()).spawn(move || {
        // It remembers attributes for a while, also when nobody is left who could know them.
        let gone = [Errno::ENOTCONN, Errno::ECONNABORTED];
        sender.send(match statvfs(&path) {
            Err(e) if gone.contains(&e) => Life::Dead,
            _ => Life::Answers,
        })
    });
    match asked {
        Ok(_) => answer.recv_timeout(LOOK).unwrap_or(Life::Silent),
        Err(_) => Life::Silent,
    }
}

/// Whether nobody answers at `path` any more. A daemon that takes its time is not dead.
pub fn is_dead(path: &Path) -> bool {
    life(path) == Life::Dead
}

/// Unmounts `target`, as root directly, else through fusermount3. `Busy` if it is in use.
pub fn unmount(target: &Path, lazy: bool) -> Result<()> {
    let flags = if lazy { MntFlags::MNT_DETACH } else { MntFlags::empty() };
    match umount2(target, flags | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(Errno::EPERM) => unmount_as_user(target, lazy),
        Err(Errno::EBUSY) => Err(busy(target)),
        Err(e) => Err(Error::io("unmount", &e.into()).in_file(target)),
    }
}

fn unmount_as_user(target: &Path, lazy: bool) -> Result<()> {
    let mut command = Command::new("fusermount3");
    command.arg("-u").args(lazy.then_some("-z")).arg("--").arg(target).stdin(Stdio::null());
    let output = command.env("LC_ALL", "C").output().map_err(|e| {
        Error::io("running fusermount3", &e).hint("it is in the package fuse3").in_file(target)
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("busy") {
        return Err(busy(target));
    }
    Err(Error::new(ErrorKind::Io, format!("unmount: {}", said.trim())).in_file(target))
}

fn busy(target: &Path) -> Error {
    let users = users_of(target);
    let what = match users.is_empty() {
        true => "in use".to_owned(),
        false => format!("in use by {}", users.join(", ")),
    };
    Error::new(ErrorKind::Busy, what).in_file(target).hint("or unmount with --lazy")
}

/// Who has something open below `target`, as far as this user may see, and those who do not hang: processes
/// and loop devices.
pub fn users_of(target: &Path) -> Vec<String> {
    let found = processes_using(target).into_iter();
    let mut users: BTreeSet<_> =
        found.map(|user| format!("{} (process {})", user.program, user.process)).collect();
    for device in entries(Path::new("/sys/block")) {
        let Ok(file) = fs::read(device.path().join("loop/backing_file")) else { continue };
        if Path::new(OsStr::from_bytes(file.trim_ascii_end())).starts_with(target) {
            users.insert(format!("/dev/{}", device.file_name().display()));
        }
    }
    users.into_iter().collect()
}

/// A process that uses a file.
pub struct User {
    /// Its number.
    pub process: String,
    /// What it runs.
    pub program: String,
}

/// The other processes that have `target`, or something below it, open, as far as this user may see, and
/// those that do not hang. Names alone are read, which waits for no other file system.
pub fn processes_using(target: &Path) -> Vec<User> {
    let below = target.to_owned();
    let crew = Crew::start(processes().collect(), move |path: &PathBuf| user_of(path, &below));
    crew.wait(SEARCH);
    crew.end().into_iter().filter_map(|(_, user)| user.flatten()).collect()
}

/// The process with this directory in `/proc`, if it has something open below `target`.
fn user_of(path: &Path, target: &Path) -> Option<User> {
    let below = |link: io::Result<PathBuf>| link.is_ok_and(|path| path.starts_with(target));
    let id = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    let uses = ["cwd", "root", "exe"].iter().any(|link| below(fs::read_link(path.join(link))))
        || entries(&path.join("fd")).any(|fd| below(fs::read_link(fd.path())));
    let other = uses && id != std::process::id().to_string();
    other.then(|| {
        let program = fs::read_to_string(path.join("comm")).unwrap_or_default();
        User { process: id.to_owned(), program: program.trim().to_owned() }
    })
}

fn entries(dir: &Path) -> impl Iterator<Item = fs::DirEntry> {
    fs::read_dir(dir).into_iter().flatten().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_table_lines_are_taken_apart() {
        let line = br"97 27 0:53 / /mnt/my\040images rw,nosuid - fuse.flatdisk /srv/a\054b rw,user_id=1000,group_id=1000";
        assert_eq!(
            parse_line(line).unwrap(),
            MountEntry {
                device: "0:53".into(),
                target: "/mnt/my images".into(),
                fs_type: FS_TYPE.into(),
                source: "/srv/a,b".into(),
                user: Some(1000),
            }
        );
        let shared = b"28 1 8:1 / / rw shared:1 master:2 - ext4 /dev/root rw,discard";
        assert_eq!(parse_line(shared).unwrap().fs_type, "ext4");
        assert_eq!(parse_line(b""), None);
    }

    #[test]
    fn only_whole_octal_escapes_count() {
        assert_eq!(unescape(br"a\134b\04"), r"a\b\04");
    }

    #[test]
    fn the_root_is_mounted() {
        assert!(mounted_at(Path::new("/")).unwrap().is_some());
        assert_eq!(mounted_at(Path::new("/does/not/exist")).unwrap(), None);
    }
}
