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
//! - Where a [`Gate`] is set, mounts below a root are entered only if it lets them in, which is decided
//!   before anything is asked of the file system mounted there: that may never answer.
//!
//! Several users may be asked about one name; they must all get the same file, or there is none.
#![allow(unsafe_code, reason = "statx(2) that asks no server, which no crate here offers")]

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fmt;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2, readlink};
use nix::sys::stat::{Mode, SFlag, fstat, fstatat, makedev};
use parking_lot::Mutex;

use super::archive::{self, Inside};
use super::file::{HostFile, HostFs, SAFE_OPEN, directory_of, flags, not_opened};
use super::permissions::{self, Permissions, Wish};
use super::user::{self, PATH};
use super::{Access, Entry, FileIdentity, Host, Storage};
use crate::error::{Error, ErrorKind, Result};

/// Decides which mounts are entered.
pub trait Gate: Send + Sync + fmt::Debug {
    /// Whether files on the file system with this device number may be touched.
    fn lets_in(&self, device: u64) -> bool;
}

/// A directory from which names lead down.
#[derive(Debug, Clone)]
pub struct Root {
    path: Arc<Path>,
    dir: Arc<OwnedFd>,
    gate: Option<Arc<dyn Gate>>,
    /// Whoever has files in it may name others in it, however far it is from `/`.
    served: bool,
}

impl Root {
    /// Opens the directory at `path`, a symlink or not.
    pub fn open(path: &Path) -> io::Result<Self> {
        let dir = openat(AT_FDCWD, path, PATH | OFlag::O_DIRECTORY, Mode::empty())?;
        Ok(Self { path: path.into(), dir: Arc::new(dir), gate: None, served: false })
    }

    /// As [`Self::open`], known by a path without symlinks.
    pub fn open_real(path: &Path) -> io::Result<Self> {
        let root = Self::open(path)?;
        let path = readlink(&*format!("/proc/self/fd/{}", root.dir.as_raw_fd()))?;
        Ok(Self { path: Path::new(&path).into(), ..root })
    }

    /// The same directory as one that is served to everybody who has files in it.
    pub fn served(self) -> Self {
        Self { served: true, ..self }
    }

    /// The same directory with a gate to what is mounted below it.
    pub fn gated(self, gate: Arc<dyn Gate>) -> Self {
        Self { gate: Some(gate), ..self }
    }

    /// The path by which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A descriptor that stands for it.
    pub(super) fn descriptor(&self) -> &Arc<OwnedFd> {
        &self.dir
    }

    fn as_place(&self) -> Below<'_> {
        Below { dir: self.dir.as_fd(), gate: self.gate.as_deref() }
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
        beneath(self.as_place(), users, relative, flags)
    }
}

/// Where a name begins.
#[derive(Clone, Copy)]
struct Below<'a> {
    dir: BorrowedFd<'a>,
    gate: Option<&'a dyn Gate>,
}

/// Opens `relative` in the name of all `users`; with our own rights if there are none.
fn beneath(from: Below<'_>, users: &[u32], relative: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    let relative = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
    let Some((first, others)) = users.split_first() else {
        return from.open(relative, flags);
    };
    let file = beneath_as(from, *first, relative, flags)?;
    for user in others {
        if identity(&beneath_as(from, *user, relative, flags)?)? != identity(&file)? {
            return Err(Errno::ESTALE.into());
        }
    }
    Ok(file)
}

fn beneath_as(from: Below<'_>, user: u32, relative: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    user::acting(user, |judge| {
        let file = from.walk(relative, flags, |dir| judge(dir, Wish::Search))?;
        let wish = match flags.intersection(OFlag::O_ACCMODE | OFlag::O_PATH) {
            flags if flags.contains(OFlag::O_PATH) => None,
            OFlag::O_RDONLY => Some(Wish::Read),
            _ => Some(Wish::Write),
        };
        wish.map_or(Ok(()), |wish| judge(file.as_fd(), wish))?;
        Ok(file)
    })
}

impl Below<'_> {
    /// Opens `relative` with the calling thread's rights.
    fn open(self, relative: &Path, flags: OFlag) -> io::Result<OwnedFd> {
        if self.gate.is_none() {
            return openat_beneath(self.dir, relative, flags, ResolveFlag::empty());
        }
        match openat_beneath(self.dir, relative, flags, ResolveFlag::RESOLVE_NO_XDEV) {
            // Something is mounted on the way.
            Err(e) if e.raw_os_error() == Some(libc::EXDEV) => {
                self.walk(relative, flags, |_| Ok(()))
            }
            opened => opened,
        }
    }

    /// As [`Self::open`], one component after the other; `search` is asked about every directory that is
    /// gone through.
    fn walk(
        self,
        relative: &Path,
        flags: OFlag,
        search: impl Fn(BorrowedFd<'_>) -> io::Result<()>,
    ) -> io::Result<OwnedFd> {
        let mut at = None::<OwnedFd>;
        let mut components = relative.components().peekable();
        while let Some(component) = components.next() {
            let dir = at.as_ref().map_or(self.dir, AsFd::as_fd);
            let from = Below { dir, gate: self.gate };
            if component != Component::CurDir {
                search(from.dir)?;
            }
            let last = components.peek().is_none();
            let flags = if last { flags } else { PATH | OFlag::O_DIRECTORY };
            at = Some(from.step(Path::new(component.as_os_str()), flags)?);
        }
        at.ok_or_else(|| Errno::ENOENT.into())
    }

    /// Opens what has the name `name` here.
    fn step(self, name: &Path, flags: OFlag) -> io::Result<OwnedFd> {
        let Some(gate) = self.gate else {
            return openat_beneath(self.dir, name, flags, ResolveFlag::empty());
        };
        match openat_beneath(self.dir, name, flags, ResolveFlag::RESOLVE_NO_XDEV) {
            Err(e) if e.raw_os_error() == Some(libc::EXDEV) => {}
            opened => return opened,
        }
        // Standing for a mount asks nothing of what is mounted.
        let standing = PATH | flags.intersection(OFlag::O_DIRECTORY);
        let mount = openat_beneath(self.dir, name, standing, ResolveFlag::empty())?;
        if !gate.lets_in(device(&mount)?) {
            return Err(Errno::EXDEV.into());
        }
        if flags.contains(OFlag::O_PATH) {
            return Ok(mount);
        }
        // By this way it is the same file, whatever is mounted there by now.
        let same = format!("/proc/self/fd/{}", mount.as_raw_fd());
        Ok(openat(AT_FDCWD, &*same, flags | OFlag::O_CLOEXEC, Mode::empty())?)
    }
}

fn openat_beneath(
    dir: BorrowedFd<'_>,
    name: &Path,
    flags: OFlag,
    more: ResolveFlag,
) -> io::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | more);
    Ok(openat2(dir, name, how)?)
}

/// The device number of the file system on which something lies, without asking that for anything.
fn device(fd: &OwnedFd) -> io::Result<u64> {
    let mut found = std::mem::MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // SAFETY: the path is a C string, and the kernel fills the structure it is given.
    let found = unsafe {
        if libc::statx(fd.as_raw_fd(), c"".as_ptr(), flags, 0, found.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        found.assume_init()
    };
    Ok(makedev(found.stx_dev_major.into(), found.stx_dev_minor.into()))
}

fn identity(fd: &OwnedFd) -> io::Result<FileIdentity> {
    let stat = fstat(fd)?;
    Ok(FileIdentity { device: stat.st_dev, inode: stat.st_ino, part: 0 })
}

/// What `ask` says of the file at `path`, or of the archive in which that lies.
pub fn or_of_archive<T>(path: &Path, ask: impl Fn(&Path) -> io::Result<T>) -> io::Result<T> {
    let not_there = |answer: &io::Result<T>| {
        answer.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::ENOTDIR))
    };
    let answer = ask(path);
    if !not_there(&answer) {
        return answer;
    }
    let mut archives = archive::parts(path).map(|(archive, _)| ask(archive));
    archives.find(|answer| !not_there(answer)).unwrap_or(answer)
}

/// Whether VMware has locked the file `name`: a directory beside it is not empty.
pub(super) fn vmware_lock_of(root: &Root, name: &Path, users: &[u32]) -> bool {
    let mut lock = name.as_os_str().to_owned();
    lock.push(".lck");
    let flags = SAFE_OPEN | OFlag::O_RDONLY | OFlag::O_DIRECTORY;
    let entries = || {
        let lock = beneath(root.as_place(), users, Path::new(&lock), flags)?;
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
    /// Directories that are none of the roots are not opened by their paths.
    closed: bool,
    /// What was opened or listed.
    seen: Arc<Mutex<BTreeSet<PathBuf>>>,
}

impl Reach {
    /// The host for what `users` name beneath `roots`, and nothing else. By default any directory is
    /// opened, by its path.
    pub fn new(roots: Vec<Root>, users: Vec<u32>) -> Self {
        Self { roots: roots.into(), users, closed: true, seen: Arc::default() }
    }

    /// The files opened or noted, and the directories listed, by this host and those that
    /// [`Host::named_in`] made of it.
    pub fn seen(&self) -> Vec<PathBuf> {
        self.seen.lock().iter().cloned().collect()
    }

    /// The metadata of a file or directory, with our own rights; for a file in an archive that of the archive.
    pub fn stat(&self, path: &Path) -> io::Result<Metadata> {
        or_of_archive(path, |path| self.stat_one(path))
    }

    fn stat_one(&self, path: &Path) -> io::Result<Metadata> {
        let name = path.file_name().ok_or(Errno::EISDIR)?;
        let (root, way) = self.locate(&directory_of(path))?;
        File::from(root.as_place().open(&way.join(name), PATH)?).metadata()
    }

    /// The metadata of a file or directory, and what must be permitted to have it: its own permissions,
    /// and those of the directories on the way to it that are not on the way to the file `beside`. For a
    /// file in an archive they are those of the archive.
    pub fn look(&self, path: &Path, beside: &Path) -> io::Result<(Metadata, Vec<Permissions>)> {
        or_of_archive(path, |path| self.look_at(path, beside))
    }

    fn look_at(&self, path: &Path, beside: &Path) -> io::Result<(Metadata, Vec<Permissions>)> {
        let name = path.file_name().ok_or(Errno::EISDIR)?;
        let (root, way) = self.locate(&directory_of(path))?;
        let mut here = root.path.to_path_buf();
        let mut permissions = Vec::new();
        let mut note = |dir: &OwnedFd, here: &Path| {
            if !beside.starts_with(here) {
                permissions.push(permissions::of(dir.as_fd())?.searchable());
            }
            io::Result::Ok(())
        };
        if !root.served {
            user::above(root.dir.as_fd(), |dir| note(dir, &here))?;
        }
        let mut at = root.dir.clone();
        for component in way.components().filter(|part| *part != Component::CurDir) {
            let from = Below { dir: at.as_fd(), ..root.as_place() };
            let next = from.step(Path::new(component.as_os_str()), PATH | OFlag::O_DIRECTORY)?;
            here.push(component);
            note(&next, &here)?;
            at = Arc::new(next);
        }
        let file = Below { dir: at.as_fd(), ..root.as_place() }.step(Path::new(name), PATH)?;
        permissions.push(permissions::of(file.as_fd())?);
        Ok((File::from(file).metadata()?, permissions))
    }

    /// The root in which the directory `dir` lies, and the way to it.
    fn locate(&self, dir: &Path) -> io::Result<(Root, PathBuf)> {
        for root in &*self.roots {
            if let Ok(way) = dir.strip_prefix(&root.path) {
                return Ok((root.clone(), way.to_owned()));
            }
        }
        if self.closed { Err(Errno::EXDEV.into()) } else { Ok((Root::open(dir)?, PathBuf::new())) }
    }

    fn failed(&self, e: &io::Error) -> Error {
        match Errno::from_raw(e.raw_os_error().unwrap_or(0)) {
            Errno::ELOOP | Errno::EXDEV => Error::new(
                ErrorKind::Denied,
                "a symlink, or a path that leaves the folder or its mount",
            )
            .hint("files named by an image must lie beside it"),
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
        let open = |path: &Path, access| match path.file_name() {
            Some(name) => self.open_beneath(&directory_of(path), Path::new(name), access),
            None => Err(not_opened(&Errno::EISDIR.into()).in_file(path)),
        };
        match open(path, access) {
            Err(e) if e.errno() == Some(libc::ENOTDIR) => {
                archive::open_member(path, access, open).unwrap_or(Err(e))
            }
            opened => opened,
        }
    }

    fn open_beneath(&self, root: &Path, name: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        let path = root.join(name);
        let failed = |e: io::Error| self.failed(&e).in_file(&path);
        let (root, way) = self.locate(root).map_err(failed)?;
        let name = way.join(name);
        let file = root.open_beneath(&self.users, &name, flags(access)).map_err(failed)?;
        self.seen.lock().insert(path.clone());
        let locked = || vmware_lock_of(&root, &name, &self.users);
        Ok(Arc::new(HostFile::new(File::from(file), &path, access, None, locked)?))
    }

    fn named_in(&self, file: &dyn Storage) -> Option<Arc<dyn Host>> {
        if let Some(archive) = file.archive() {
            return Some(Arc::new(Inside(archive.clone())));
        }
        let namer = file.namer()?;
        let mut reach = self.clone();
        if !user::is_own(namer.uid) && !reach.users.contains(&namer.uid) {
            reach.users.push(namer.uid);
        }
        if let Some(dir) = &namer.dir {
            let (path, dir) = (directory_of(file.path()).into(), dir.clone());
            let root = Root { path, dir, gate: None, served: true };
            reach.roots = [root].into_iter().chain(self.roots.iter().cloned()).collect();
        }
        Some(Arc::new(reach))
    }

    fn note(&self, path: &Path) {
        self.seen.lock().insert(path.to_owned());
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
        self.seen.lock().insert(dir.to_owned());
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
