//! How far the names in an image reach: [`Reach`], the host as it is for files that a file names.
//!
//! - Names lead down from open directories ([`Root`]), component by component and through no symlink.
//!   A directory is opened once; what becomes of its path after that changes nothing.
//! - A file opens only if everybody who took part in naming it could open it by himself, for what is
//!   asked: the owner of the file that names it, the owner of the file that names that one, and so
//!   on. That is the kernel's answer ([`super::user`]). Names in root's files, and in our own, add nobody.
//! - Roots that are not served themselves are no shortcut: who cannot come there from `/` cannot name
//!   what is in them.
//!
//! Several users may be asked about one name; they must all get the same file, or there is none.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2, readlink};
use nix::sys::stat::{Mode, SFlag, fstat, fstatat};

use super::file::{HostFile, HostFs, SAFE_OPEN, directory_of, flags, not_opened};
use super::permissions::Wish;
use super::user::{self, PATH};
use super::{Access, Entry, FileIdentity, Host, Storage};
use crate::error::{Error, ErrorKind, Result};

/// A directory from which names lead down.
#[derive(Debug, Clone)]
pub struct Root {
    path: PathBuf,
    dir: Arc<OwnedFd>,
    /// Whoever has files in it may name others in it, however far it is from `/`.
    served: bool,
}

impl Root {
    /// Opens the directory at `path`, a symlink or not.
    pub fn open(path: &Path) -> io::Result<Self> {
        let dir = openat(AT_FDCWD, path, PATH | OFlag::O_DIRECTORY, Mode::empty())?;
        Ok(Self { path: path.to_owned(), dir: Arc::new(dir), served: false })
    }

    /// As [`Self::open`], known by a path without symlinks.
    pub fn open_real(path: &Path) -> io::Result<Self> {
        let root = Self::open(path)?;
        let path = readlink(&*format!("/proc/self/fd/{}", root.dir.as_raw_fd()))?;
        Ok(Self { path: path.into(), ..root })
    }

    /// The same directory as one that is served to everybody who has files in it.
    pub fn served(self) -> Self {
        Self { served: true, ..self }
    }

    /// The path by which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A descriptor that stands for it.
    pub(super) fn descriptor(&self) -> &Arc<OwnedFd> {
        &self.dir
    }

    /// Opens `relative` beneath the directory in the name of all `users`, through no symlink.
    pub fn open_beneath(
        &self,
        users: &[u32],
        relative: &Path,
        flags: OFlag,
    ) -> io::Result<OwnedFd> {
        if !self.served {
            users.iter().try_for_each(|user| user::reaches(*user, self.dir.as_fd()))?;
        }
        beneath(self.dir.as_fd(), users, relative, flags)
    }
}

/// Opens `relative` beneath `dir` in the name of all `users`; with our own rights if there are none.
fn beneath(
    dir: BorrowedFd<'_>,
    users: &[u32],
    relative: &Path,
    flags: OFlag,
) -> io::Result<OwnedFd> {
    let relative = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
    let Some((first, others)) = users.split_first() else {
        return step(dir, relative, flags);
    };
    let file = beneath_as(dir, *first, relative, flags)?;
    for user in others {
        if identity(&beneath_as(dir, *user, relative, flags)?)? != identity(&file)? {
            return Err(Errno::ESTALE.into());
        }
    }
    Ok(file)
}

fn beneath_as(
    dir: BorrowedFd<'_>,
    user: u32,
    relative: &Path,
    flags: OFlag,
) -> io::Result<OwnedFd> {
    user::acting(user, |judge| {
        let mut at = None::<OwnedFd>;
        let mut components = relative.components().peekable();
        while let Some(component) = components.next() {
            let from = at.as_ref().map_or(dir, AsFd::as_fd);
            if component != Component::CurDir {
                judge(from, Wish::Search)?;
            }
            let last = components.peek().is_none();
            let how = if last { flags } else { PATH | OFlag::O_DIRECTORY };
            at = Some(step(from, Path::new(component.as_os_str()), how)?);
        }
        let file = at.ok_or(Errno::ENOENT)?;
        let wish = match flags.intersection(OFlag::O_ACCMODE | OFlag::O_PATH) {
            flags if flags.contains(OFlag::O_PATH) => None,
            OFlag::O_RDONLY => Some(Wish::Read),
            _ => Some(Wish::Write),
        };
        wish.map_or(Ok(()), |wish| judge(file.as_fd(), wish))?;
        Ok(file)
    })
}

fn step(dir: BorrowedFd<'_>, name: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    Ok(openat2(dir, name, how)?)
}

fn identity(fd: &OwnedFd) -> io::Result<FileIdentity> {
    let stat = fstat(fd)?;
    Ok(FileIdentity { device: stat.st_dev, inode: stat.st_ino })
}

/// Whether VMware has locked the file `name`: a directory beside it is not empty.
pub(super) fn vmware_lock_of(dir: &OwnedFd, name: &Path, users: &[u32]) -> bool {
    let mut lock = name.as_os_str().to_owned();
    lock.push(".lck");
    let flags = SAFE_OPEN | OFlag::O_RDONLY | OFlag::O_DIRECTORY;
    let entries = || {
        let lock = beneath(dir.as_fd(), users, Path::new(&lock), flags)?;
        Ok::<_, io::Error>(Dir::from_fd(lock)?.iter().flatten().count())
    };
    // Itself and the directory above are always there.
    entries().is_ok_and(|entries| entries > 2)
}

/// See the module's documentation.
#[derive(Debug, Clone, Default)]
pub struct Reach {
    roots: Arc<[Root]>,
    /// Who took part in naming, beside root and ourselves.
    users: Vec<u32>,
}

impl Reach {
    /// The host for what `users` name beneath `roots`. Directories that lie in none of them are opened by
    /// their paths.
    pub fn new(roots: Vec<Root>, users: Vec<u32>) -> Self {
        Self { roots: roots.into(), users }
    }

    /// The root in which the directory `dir` lies, and the way to it.
    fn locate(&self, dir: &Path) -> io::Result<(Root, PathBuf)> {
        for root in &*self.roots {
            if let Ok(way) = dir.strip_prefix(&root.path) {
                return Ok((root.clone(), way.to_owned()));
            }
        }
        Ok((Root::open(dir)?, PathBuf::new()))
    }

    fn failed(&self, e: &io::Error) -> Error {
        match Errno::from_raw(e.raw_os_error().unwrap_or(0)) {
            Errno::ELOOP | Errno::EXDEV => {
                Error::new(ErrorKind::Denied, "a symlink or a path that leaves the folder")
                    .hint("files named by an image must lie beside it")
            }
            Errno::EISDIR => Error::new(ErrorKind::Denied, "not a regular file"),
            Errno::ENAMETOOLONG => {
                Error::new(ErrorKind::NotFound, "no file has a name as long as this")
            }
            Errno::EACCES | Errno::EPERM if !self.users.is_empty() => {
                let what = "the owner of the image that names it may not open it";
                Error::new(ErrorKind::Denied, what)
            }
            _ => not_opened(e),
        }
    }
}

impl Host for Reach {
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        match path.file_name() {
            Some(name) => self.open_beneath(&directory_of(path), Path::new(name), access),
            None => Err(not_opened(&Errno::EISDIR.into()).in_file(path)),
        }
    }

    fn open_beneath(&self, root: &Path, name: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        let path = root.join(name);
        let failed = |e: io::Error| self.failed(&e).in_file(&path);
        let (root, way) = self.locate(root).map_err(failed)?;
        let name = way.join(name);
        let file = root.open_beneath(&self.users, &name, flags(access)).map_err(failed)?;
        let locked = || vmware_lock_of(&root.dir, &name, &self.users);
        Ok(Arc::new(HostFile::new(File::from(file), &path, access, None, locked)?))
    }

    fn named_in(&self, file: &dyn Storage) -> Option<Arc<dyn Host>> {
        let namer = file.namer()?;
        let mut reach = self.clone();
        if !user::is_own(namer.uid) && !reach.users.contains(&namer.uid) {
            reach.users.push(namer.uid);
        }
        if let Some(dir) = &namer.dir {
            let root = Root { path: directory_of(file.path()), dir: dir.clone(), served: true };
            reach.roots = [root].into_iter().chain(self.roots.iter().cloned()).collect();
        }
        Some(Arc::new(reach))
    }

    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        HostFs.create(path)
    }

    fn replace(&self, path: &Path, contents: &[u8]) -> Result<()> {
        HostFs.replace(path, contents)
    }

    fn remove(&self, path: &Path) -> Result<()> {
        HostFs.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> Result<()> {
        HostFs.sync_dir(dir)
    }

    fn list(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        let failed = |e: io::Error| Error::io("list", &e).in_file(dir);
        let flags = SAFE_OPEN | OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let (root, way) = self.locate(dir).map_err(failed)?;
        let open = root.open_beneath(&self.users, &way, flags).map_err(failed)?;
        let mut files = Vec::new();
        for entry in Dir::from_fd(open).map_err(|e| failed(e.into()))?.iter() {
            let entry = entry.map_err(|e| failed(e.into()))?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name != "." && name != ".." {
                files.push(dir.join(name));
            }
        }
        Ok(files)
    }

    fn list_beneath(&self, root: &Path, dir: &Path, limit: usize) -> Result<Vec<Entry>> {
        let path = root.join(dir);
        let failed = |e: io::Error| Error::io("list", &e).in_file(&path);
        let (root, way) = self.locate(root).map_err(failed)?;
        let flags = SAFE_OPEN | OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let open = root.open_beneath(&self.users, &way.join(dir), flags).map_err(failed)?;
        let mut dir = Dir::from_fd(open).map_err(|e| failed(e.into()))?;
        let place = dir.as_fd().try_clone_to_owned().map_err(failed)?;
        let mut found = Vec::new();
        // Two entries are the directory itself and the one above; one more tells that there are too many.
        for entry in dir.iter().take(limit.saturating_add(3)) {
            let entry = entry.map_err(|e| failed(e.into()))?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let folder = match entry.file_type() {
                Some(Type::Directory) => true,
                Some(Type::File) => false,
                Some(_) => continue,
                // The file system does not say in the directory itself.
                None => match fstatat(&place, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
                    Ok(stat) => match SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT {
                        SFlag::S_IFDIR => true,
                        SFlag::S_IFREG => false,
                        _ => continue,
                    },
                    Err(_) => continue,
                },
            };
            found.push(Entry { name: name.to_owned(), folder });
        }
        Ok(found)
    }

    fn users(&self) -> &[u32] {
        &self.users
    }
}
