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

use nix::fcntl::{OFlag, readlinkat};
use nix::sys::statvfs::{FsFlags, fstatvfs};

use super::listing::ImageEntry;
use super::mounts;
use crate::error::{Error, Result};
use crate::storage::permissions::{self, Permissions};
use crate::storage::reach::{Reach, Root, or_of_archive};
use crate::storage::remembered::identity;
use crate::storage::user;

/// Longest chain of symlinks from a name to an image.
const MAX_LINKS: usize = 16;

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
