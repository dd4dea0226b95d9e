//! The host directories behind a mount: confined access.
//!
//! A [`Source`] is a directory that the user named. Everything in it is reached from its open
//! descriptor, component by component and through no symlink, so that nothing that changes inside it
//! leads out, nor back into the mount (whose daemon would wait for itself). A symlink that stands
//! for an image is resolved here by text, only to a regular file of the same source, and only if the
//! symlink's owner may read that.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::fcntl::{OFlag, readlinkat};
use nix::sys::statvfs::{FsFlags, fstatvfs};

use super::listing::ImageEntry;
use super::mounts;
use crate::error::{Error, Result};
use crate::storage::permissions::{self, Permissions};
use crate::storage::reach::{Reach, Root, or_of_archive};
use crate::storage::{FileIdentity, user};

/// Longest chain of symlinks from a name to an image.
const MAX_LINKS: usize = 16;

/// File times move in steps of up to ten milliseconds: a change shortly after a stamp was taken may
/// leave the same stamp.
pub const CLOCK_STEP: Duration = Duration::from_millis(50);

/// The steps of file systems that keep whole seconds, or even ones, and a little more.
const COARSE_STEP: Duration = Duration::from_millis(2500);

/// How long anything is believed that may have changed without a sign. The kernel believes names and
/// attributes for as long.
pub const BELIEVED: Duration = Duration::from_secs(1);

/// What tells a file's contents from other contents without reading them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Which file.
    pub identity: FileIdentity,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Default for Stamp {
    fn default() -> Self {
        let identity = FileIdentity { device: 0, inode: 0, part: 0 };
        Self { identity, size: 0, mtime: (0, 0), ctime: (0, 0) }
    }
}

impl Stamp {
    /// The stamp in a file's metadata.
    pub fn of(meta: &Metadata) -> Self {
        Self {
            identity: identity(meta),
            size: meta.size(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            ctime: (meta.ctime(), meta.ctime_nsec()),
        }
    }

    /// Whether the host keeps whole seconds only, or even ones, as some file systems and network
    /// protocols do: a later change need not show in such a stamp.
    pub fn coarse(&self) -> bool {
        // Programs can set the other time to whole seconds.
        self.ctime.1 == 0
    }

    /// Whether the last change is old enough for every later one to show in the stamp. With coarse times
    /// never: how old a change is, only the clock that told its time knows, and that may be another
    /// machine's.
    pub fn settled(&self) -> bool {
        !self.coarse() && self.older_than(CLOCK_STEP)
    }

    /// How long what was read just now may be believed while the stamp stays this one.
    pub fn life(&self) -> Duration {
        match self.settled() {
            true => Duration::MAX,
            false if self.coarse() && self.older_than(COARSE_STEP) => BELIEVED,
            false => Duration::ZERO,
        }
    }

    fn older_than(&self, step: Duration) -> bool {
        let (seconds, nanos) = self.ctime.max(self.mtime);
        let Ok(seconds) = u64::try_from(seconds) else { return true };
        let changed = UNIX_EPOCH + Duration::new(seconds, nanos as u32);
        SystemTime::now().duration_since(changed).is_ok_and(|age| age > step)
    }
}

/// Device and inode in a file's metadata.
pub fn identity(meta: &Metadata) -> FileIdentity {
    FileIdentity { device: meta.dev(), inode: meta.ino(), part: 0 }
}

/// A host directory that the user named.
#[derive(Debug)]
pub struct Source {
    root: Root,
}

/// A file or directory in a source.
#[derive(Debug, Clone)]
pub struct Place {
    /// The source.
    pub source: Arc<Source>,
    /// Path from the source's root; empty for the root itself.
    pub relative: PathBuf,
    /// Who must be able to open it: the owners of symlinks that lead here, where these are not ours.
    pub users: Vec<u32>,
}

impl Source {
    /// Opens the directory `root`.
    pub fn open(root: &Path) -> Result<Arc<Self>> {
        let root = Root::open_real(root).map_err(|e| Error::io("open", &e).in_file(root))?;
        Ok(Arc::new(Self { root: root.served().gated(mounts::gate()) }))
    }

    /// Absolute path of the directory when it was opened.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// The open directory.
    pub fn directory(&self) -> &Root {
        &self.root
    }

    fn open_at(&self, users: &[u32], relative: &Path, flags: OFlag) -> io::Result<OwnedFd> {
        self.root.open_beneath(users, relative, flags)
    }

    /// Where the symlink chain that begins at `relative` ends, if that is a regular file inside the
    /// source and outside `skip`, which the owners of all symlinks may read.
    pub(super) fn follow(&self, relative: &Path, skip: &Path) -> Option<ImageEntry> {
        let mut path = self.root().join(relative);
        let mut users = Vec::new();
        for _ in 0..MAX_LINKS {
            let inside = path.strip_prefix(self.root()).ok()?.to_owned();
            if path.starts_with(skip) {
                return None;
            }
            let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW;
            let file = File::from(self.open_at(&users, &inside, flags).ok()?);
            let meta = file.metadata().ok()?;
            if meta.is_file() {
                if !users.is_empty() {
                    self.open_at(&users, &inside, OFlag::O_RDONLY | OFlag::O_NONBLOCK).ok()?;
                }
                // The file's own owner is no limit to it.
                users.retain(|user| *user != meta.uid());
                return Some(ImageEntry { relative: inside, identity: identity(&meta), users });
            }
            if !meta.is_symlink() {
                return None;
            }
            if !user::is_own(meta.uid()) && !users.contains(&meta.uid()) {
                users.push(meta.uid());
            }
            let target = readlinkat(file.as_fd(), "").ok()?;
            path.pop();
            path = normalise(&path.join(target))?;
        }
        None
    }
}

/// Takes `.` and `..` out of an absolute path by text.
pub fn normalise(path: &Path) -> Option<PathBuf> {
    let mut plain = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir => {
                plain.pop();
            }
            Component::Normal(part) => plain.push(part),
            Component::Prefix(_) => return None,
        }
    }
    Some(plain)
}

impl Place {
    /// The directory of a source itself.
    pub fn top(source: Arc<Source>) -> Self {
        Self { source, relative: PathBuf::new(), users: Vec::new() }
    }

    /// Absolute path.
    pub fn path(&self) -> PathBuf {
        if self.relative.as_os_str().is_empty() {
            self.source.root().to_owned()
        } else {
            self.source.root().join(&self.relative)
        }
    }

    /// The place called `relative` (from the source's root) in the same source.
    pub fn elsewhere(&self, relative: PathBuf) -> Self {
        Self { source: self.source.clone(), relative, users: Vec::new() }
    }

    /// The place of an image that is listed in the same source.
    pub fn image(&self, entry: &ImageEntry) -> Self {
        Self { users: entry.users.clone(), ..self.elsewhere(entry.relative.clone()) }
    }

    /// Whether both are one file's, and the same must be able to open it.
    pub fn is(&self, other: &Self) -> bool {
        self.path() == other.path() && self.users == other.users
    }

    /// Opens what has the path `relative` from the source's root.
    pub(super) fn open_at(
        &self,
        users: &[u32],
        relative: &Path,
        flags: OFlag,
    ) -> io::Result<OwnedFd> {
        self.source.open_at(users, relative, flags)
    }

    /// The host as everything in this source is reached.
    pub(super) fn reach(&self) -> Reach {
        Reach::new(vec![self.source.directory().clone()], self.users.clone())
    }

    /// A descriptor that stands for the file or directory; for what lies in an archive, for that.
    fn standing(&self) -> io::Result<OwnedFd> {
        or_of_archive(&self.relative, |path| self.source.open_at(&self.users, path, OFlag::O_PATH))
    }

    /// Metadata of the file or directory, or of the archive it lies in; symlinks on the way or at the end
    /// are an error.
    pub fn stat(&self) -> io::Result<Metadata> {
        File::from(self.standing()?).metadata()
    }

    /// The permissions of the file or directory.
    pub fn permissions(&self) -> io::Result<Permissions> {
        permissions::of(self.standing()?.as_fd())
    }

    /// Whether the host lets nobody write here: a file system or mount that is read-only.
    pub fn host_read_only(&self) -> bool {
        let host = self.standing().and_then(|file| Ok(fstatvfs(&file)?));
        host.is_ok_and(|host| host.flags().contains(FsFlags::ST_RDONLY))
    }
}
