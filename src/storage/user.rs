//! Opening files in another user's name.
//!
//! What an image names is opened only if the image's owner could open it. Who can tell is the kernel:
//! for the time of the opening the calling thread has that user's file-system ids and groups, and no
//! capability. That takes `CAP_SETUID` and `CAP_SETGID`. Without them nobody can be another user;
//! then the file is opened with our own rights, and handed out only if its permission bits, and those
//! of every folder on the way, let that user do the same.
//!
//! What root's images name is root's own matter, as is ours what our images name.
#![allow(unsafe_code, reason = "setgroups(2) of one thread: the C library's changes all threads")]

use std::collections::HashMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use caps::{CapSet, Capability, CapsHashSet};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, openat2};
use nix::sys::stat::fstat;
use nix::unistd::{Gid, Uid, getegid, geteuid, getgrouplist, getgroups, setfsgid, setfsuid};
use parking_lot::Mutex;

use super::permissions::{self, Wish};

/// How long the groups of a user are remembered.
const GROUPS_LIFE: Duration = Duration::from_secs(60);

/// Users remembered at most.
const MAX_KNOWN: usize = 1024;

/// The group of users that the host does not know, and of nothing else.
const NO_GROUP: u32 = 65534;

/// Folders between a file and the root at most.
const MAX_DEPTH: usize = 4096;

/// A user, as far as access to files depends on it.
#[derive(Debug)]
pub(super) struct User {
    pub uid: u32,
    gid: Gid,
    groups: Vec<Gid>,
}

/// Users, and when they were looked up.
type Users = HashMap<u32, (Instant, Arc<User>)>;

impl User {
    /// The user `uid` with the groups that the host's user database gives.
    fn known(uid: u32) -> Arc<Self> {
        static KNOWN: LazyLock<Mutex<Users>> = LazyLock::new(Mutex::default);
        if let Some((looked, user)) = KNOWN.lock().get(&uid)
            && looked.elapsed() < GROUPS_LIFE
        {
            return user.clone();
        }
        // The database may be far away: nobody waits for it but who asked.
        let user = Arc::new(Self::look_up(uid));
        let mut known = KNOWN.lock();
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        known.insert(uid, (Instant::now(), user.clone()));
        user
    }

    fn look_up(uid: u32) -> Self {
        let entry = nix::unistd::User::from_uid(Uid::from_raw(uid)).ok().flatten();
        let Some(entry) = entry else {
            return Self { uid, gid: Gid::from_raw(NO_GROUP), groups: Vec::new() };
        };
        let name = CString::new(entry.name).unwrap_or_default();
        let groups = getgrouplist(&name, entry.gid).unwrap_or_default();
        Self { uid, gid: entry.gid, groups }
    }

    /// Whether the user is in the group `gid`.
    pub fn has_group(&self, gid: u32) -> bool {
        self.gid.as_raw() == gid || self.groups.iter().any(|group| group.as_raw() == gid)
    }
}

/// Whether the user `uid` is in the group `gid`.
pub fn in_group(uid: u32, gid: u32) -> bool {
    User::known(uid).has_group(gid)
}

/// Whether what this user's images name is opened with our own rights.
pub fn is_own(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

/// Runs `open` in the name of the user `uid`, who is not [`is_own`]. `open` is called with a judge,
/// which it must ask about every folder and file that it goes through.
pub(super) fn acting<T>(
    uid: u32,
    open: impl FnOnce(&dyn Fn(BorrowedFd<'_>, Wish) -> io::Result<()>) -> io::Result<T>,
) -> io::Result<T> {
    let user = User::known(uid);
    if can_switch() {
        switched(&user, || open(&|_, _| Ok(())))?
    } else {
        open(&|fd, wish| match permissions::of(fd)?.allow(&user, wish) {
            true => Ok(()),
            false => Err(io::ErrorKind::PermissionDenied.into()),
        })
    }
}

/// Fails unless the user could come to the open directory `dir` from the root.
pub(super) fn reaches(uid: u32, dir: BorrowedFd<'_>) -> io::Result<()> {
    acting(uid, |judge| above(dir, |at| judge(at.as_fd(), Wish::Search)))
}

/// Calls `each` with the directory and all above it, up to the root. Each step takes the permission to
/// search the directory that is left.
pub(super) fn above(
    dir: BorrowedFd<'_>,
    mut each: impl FnMut(&OwnedFd) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = dir.try_clone_to_owned()?;
    for _ in 0..MAX_DEPTH {
        each(&at)?;
        let above = openat2(&at, "..", OpenHow::new().flags(PATH | OFlag::O_DIRECTORY))?;
        if identity(&above)? == identity(&at)? {
            return Ok(());
        }
        at = above;
    }
    Err(Errno::ELOOP.into())
}

/// Flags for a descriptor that only stands for a place.
pub(super) const PATH: OFlag = OFlag::O_PATH.union(OFlag::O_CLOEXEC);

fn identity(fd: &OwnedFd) -> io::Result<(u64, u64)> {
    let stat = fstat(fd)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Whether this process may be other users.
fn can_switch() -> bool {
    let has = |capability| caps::has_cap(None, CapSet::Permitted, capability).unwrap_or(false);
    has(Capability::CAP_SETUID) && has(Capability::CAP_SETGID)
}

/// What a thread has of its own while it acts for somebody else; given back on drop.
struct Own {
    effective: CapsHashSet,
    groups: Vec<Gid>,
}

impl Own {
    /// Makes the thread able to change its ids.
    fn raise(&self) -> io::Result<()> {
        let mut raised = self.effective.clone();
        raised.extend([Capability::CAP_SETUID, Capability::CAP_SETGID]);
        caps::set(None, CapSet::Effective, &raised).map_err(io::Error::other)
    }

    fn give_back(&self) -> io::Result<()> {
        self.raise()?;
        setfsuid(geteuid());
        setfsgid(getegid());
        set_groups(&self.groups)?;
        caps::set(None, CapSet::Effective, &self.effective).map_err(io::Error::other)
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        if let Err(e) = self.give_back() {
            log::error!("a thread keeps the rights of another user: {e}");
        }
    }
}

/// Runs `act` with the calling thread's access to files being that of `user`.
fn switched<T>(user: &User, act: impl FnOnce() -> T) -> io::Result<T> {
    let effective = caps::read(None, CapSet::Effective).map_err(io::Error::other)?;
    let own = Own { effective, groups: getgroups()? };
    own.raise()?;
    set_groups(&user.groups)?;
    let (uid, gid) = (Uid::from_raw(user.uid), user.gid);
    setfsgid(gid);
    setfsuid(uid);
    // These calls do not fail; they answer with what was set before, and no user has this number.
    let nobody = u32::MAX;
    if setfsuid(Uid::from_raw(nobody)) != uid || setfsgid(Gid::from_raw(nobody)) != gid {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    caps::clear(None, CapSet::Effective).map_err(io::Error::other)?;
    Ok(act())
}

/// Sets the supplementary groups of the calling thread alone.
fn set_groups(groups: &[Gid]) -> io::Result<()> {
    #[cfg(any(target_arch = "x86", target_arch = "arm"))]
    const SETGROUPS: libc::c_long = libc::SYS_setgroups32;
    #[cfg(not(any(target_arch = "x86", target_arch = "arm")))]
    const SETGROUPS: libc::c_long = libc::SYS_setgroups;
    // SAFETY: `Gid` is a transparent `gid_t`, and the kernel reads `len` of them.
    let set = unsafe { libc::syscall(SETGROUPS, groups.len(), groups.as_ptr()) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
