//! Files inside an archive, in place: OVA, which is an uncompressed tar.
//!
//! A member has the path of the archive and its own name behind it: `/srv/x.ova/disk1.vmdk`. Hosts that
//! find a file where such a path needs a directory open it as an [`Archive`] ([`open_member`]). To a driver a
//! member is a file of its own, that can only be read ([`MemberFile`]); what it names is looked for among
//! the other members and nowhere else ([`Inside`]).
//!
//! What is known of an archive is kept until the file changes ([`Archive::open`]).
//!
//! # Files
//!
//! - `tar`: the headers of tar archives.

pub mod tar;

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::SystemTime;

use super::remembered::{Remembered, Stamp};
use super::{Access, Entry, FileIdentity, Host, Namer, Storage};
use crate::error::{Error, ErrorKind, Result};

/// The extension that files have which are taken for archives.
const EXTENSION: &str = "ova";
/// Members of all archives that are remembered.
const MAX_REMEMBERED: usize = 1 << 17;

/// One file of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its path in the archive: no root, no `..`.
    pub name: PathBuf,
    /// Where the first of its headers begins in the archive.
    pub begins: u64,
    /// Where its first byte is in the archive.
    pub at: u64,
    /// Bytes it has.
    pub size: u64,
    /// Why it cannot be read in place.
    pub problem: Option<&'static str>,
}

impl Member {
    /// A member whose name, as it stands in the archive, leads to a place inside it.
    fn new(name: &[u8], place: Place, problem: Option<&'static str>) -> Option<Self> {
        let Place { begins, at, size } = place;
        let mut plain = PathBuf::new();
        for component in Path::new(OsStr::from_bytes(name)).components() {
            match component {
                Component::Normal(part) => plain.push(part),
                Component::CurDir => {}
                _ => return None,
            }
        }
        // DSP0243 section 7.1: `NAME.000000000` and so on are parts of NAME.
        let chunk = plain
            .extension()
            .is_some_and(|part| part.len() == 9 && part.as_bytes().iter().all(u8::is_ascii_digit));
        let chunk = chunk.then_some("it is one of the chunks of a file: unpack and join them");
        let file = !name.ends_with(b"/") && !plain.as_os_str().is_empty();
        file.then_some(Self { name: plain, begins, at, size, problem: problem.or(chunk) })
    }

    /// Where what belongs to it ends in the archive, its last block filled up.
    pub fn ends(&self) -> u64 {
        self.at + self.size.next_multiple_of(tar::BLOCK)
    }
}

/// Where a member is; see [`Member`].
#[derive(Debug, Clone, Copy)]
struct Place {
    begins: u64,
    at: u64,
    size: u64,
}

/// What is in an archive.
#[derive(Debug)]
pub struct Index {
    members: Vec<Member>,
    /// Where its last header ends with what belongs to it; empty blocks follow.
    end: u64,
}

/// An open archive.
pub struct Archive {
    file: Arc<dyn Storage>,
    index: Arc<Index>,
}

impl fmt::Debug for Archive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Archive").field("path", &self.file.path()).finish_non_exhaustive()
    }
}

/// Archives by their file.
static KNOWN: LazyLock<Remembered<Arc<Index>>> =
    LazyLock::new(|| Remembered::weighing(MAX_REMEMBERED, |index| index.members.len().max(1)));

impl Archive {
    /// The archive in `file`.
    ///
    /// # Errors
    /// The file is no tar archive ([`ErrorKind::NotThisFormat`]), or a damaged one.
    pub fn open(file: Arc<dyn Storage>) -> Result<Arc<Self>> {
        let index = KNOWN.try_get(Stamp::of_file(&*file), || {
            if !is_archive(&*file) {
                let what = "not an archive (OVA)";
                return Err(Error::new(ErrorKind::NotThisFormat, what).in_file(file.path()));
            }
            Ok(Arc::new(tar::index(&*file)?))
        })?;
        Ok(Arc::new(Self { file, index }))
    }

    /// Its files, in the order of the archive; of several of one name the last one counts.
    pub fn members(&self) -> &[Member] {
        &self.index.members
    }

    /// Where the last of its files ends; empty blocks follow.
    pub fn end(&self) -> u64 {
        self.index.end
    }

    /// The archive's own file.
    pub fn file(&self) -> &Arc<dyn Storage> {
        &self.file
    }

    /// The file of the archive called `name`.
    ///
    /// # Errors
    /// There is none ([`ErrorKind::NotFound`]), or it cannot be read in place ([`ErrorKind::Unsupported`]).
    pub fn member(self: &Arc<Self>, name: &Path) -> Result<Arc<MemberFile>> {
        let path = self.file.path().join(name);
        let members = self.members();
        let found = members.iter().rposition(|member| member.name == name);
        let Some(index) = found else {
            let what = "the archive has no such file";
            return Err(Error::new(ErrorKind::NotFound, what).in_file(&path));
        };
        let member = members[index].clone();
        match member.problem {
            Some(problem) => Err(Error::unsupported(problem).in_file(&path)),
            None => Ok(Arc::new(MemberFile { archive: self.clone(), path, member })),
        }
    }

    /// What lies in the folder `dir` of the archive.
    pub fn list(&self, dir: &Path) -> Vec<Entry> {
        let mut found: Vec<Entry> = Vec::new();
        let mut known = std::collections::HashSet::new();
        for member in self.members() {
            let Ok(below) = member.name.strip_prefix(dir) else { continue };
            let mut parts = below.components();
            let Some(first) = parts.next() else { continue };
            let name = first.as_os_str().to_owned();
            if known.insert(name.clone()) {
                found.push(Entry { name, folder: parts.next().is_some() });
            }
        }
        found
    }
}

/// Whether the name is one of an archive.
pub fn has_name(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(EXTENSION))
}

/// Whether a file begins as an archive does.
pub fn is_archive(file: &dyn Storage) -> bool {
    let mut block = [0; tar::BLOCK as usize];
    file.read_at(0, &mut block).is_ok() && tar::is_header(&block) && block[0] != 0
}

/// The ways to part `path` into that of an archive and that of a member, the longest archive first.
pub fn parts(path: &Path) -> impl Iterator<Item = (&Path, &Path)> {
    path.ancestors().skip(1).filter_map(|archive| {
        let member = path.strip_prefix(archive).ok()?;
        archive.file_name()?;
        Some((archive, member))
    })
}

/// Opens the file at `path`, which is one of an archive, with `open` for the archive itself. `None` where no
/// part of the path is a file.
pub fn open_member(
    path: &Path,
    access: Access,
    open: impl Fn(&Path, Access) -> Result<Arc<dyn Storage>>,
) -> Option<Result<Arc<dyn Storage>>> {
    for (archive, member) in parts(path) {
        let read = if access == Access::Peek { Access::Peek } else { Access::Read };
        match open(archive, read) {
            Ok(file) if access == Access::Write && is_archive(&*file) => {
                let what = "it lies in an archive, where disks are only read";
                let error = Error::new(ErrorKind::ReadOnly, what).in_file(path);
                return Some(Err(error.hint("`flatdisk convert` takes it out")));
            }
            Ok(file) => {
                return match Archive::open(file) {
                    Err(e) if e.kind() == ErrorKind::NotThisFormat => None,
                    archive => Some(archive.and_then(|archive| Ok(archive.member(member)? as _))),
                };
            }
            Err(e) if e.errno() == Some(libc::ENOTDIR) => {}
            Err(e) => return Some(Err(e)),
        }
    }
    None
}

/// The files of the archive at `dir`, or of a folder of one, with `open` for the archive itself. `None` where
/// no part of the path is an archive.
pub fn list_at(
    dir: &Path,
    open: impl Fn(&Path, Access) -> Result<Arc<dyn Storage>>,
) -> Option<Result<Vec<PathBuf>>> {
    for (archive, inside) in std::iter::once((dir, Path::new(""))).chain(parts(dir)) {
        match open(archive, Access::Peek).and_then(Archive::open) {
            Ok(archive) => {
                let entries = archive.list(inside).into_iter().filter(|entry| !entry.folder);
                return Some(Ok(entries.map(|entry| dir.join(entry.name)).collect()));
            }
            Err(e) if e.errno() == Some(libc::ENOTDIR) => {}
            Err(e) if e.kind() == ErrorKind::NotThisFormat => return None,
            Err(e) => return Some(Err(e)),
        }
    }
    None
}

/// A file of an archive: a window into it.
#[derive(Debug)]
pub struct MemberFile {
    archive: Arc<Archive>,
    path: PathBuf,
    member: Member,
}

fn read_only() -> io::Error {
    io::Error::from_raw_os_error(libc::EROFS)
}

impl Storage for MemberFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.member.size)
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = at.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.member.size) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.archive.file.read_at(self.member.at + at, buf)
    }

    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(read_only())
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn punch_hole(&self, _: u64, _: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn allocate(&self, _: u64, _: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        if at >= self.member.size {
            return Ok(None);
        }
        let Some(found) = self.archive.file.next_data(self.member.at + at)? else {
            return Ok(None);
        };
        let start = found.start.saturating_sub(self.member.at).max(at);
        let end = found.end.saturating_sub(self.member.at).min(self.member.size);
        Ok(Some(start..end).filter(|range| range.start < range.end))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.member.size.next_multiple_of(tar::BLOCK))
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn writable(&self) -> bool {
        false
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        Ok(FileIdentity { part: self.member.at, ..self.archive.file.identity()? })
    }

    fn modified(&self) -> Option<SystemTime> {
        self.archive.file.modified()
    }

    fn changed(&self) -> Option<SystemTime> {
        self.archive.file.changed()
    }

    fn namer(&self) -> Option<&Namer> {
        self.archive.file.namer()
    }

    fn archive(&self) -> Option<&Arc<Archive>> {
        Some(&self.archive)
    }
}

/// The inside of an archive as a host: nothing else is there, and nothing can be made.
#[derive(Debug)]
pub struct Inside(pub Arc<Archive>);

impl Inside {
    /// The way from the archive's root to what has this path.
    fn way(&self, path: &Path) -> Result<PathBuf> {
        let inside = path.strip_prefix(self.0.file.path()).map_err(|_| {
            let what = "what a file of an archive names must be in the archive";
            Error::new(ErrorKind::Denied, what).in_file(path)
        })?;
        Ok(inside.to_owned())
    }

    fn refuse<T>(path: &Path) -> Result<T> {
        let what = "archives are only read";
        Err(Error::new(ErrorKind::ReadOnly, what).in_file(path))
    }
}

impl Host for Inside {
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        if access == Access::Write {
            return Self::refuse(path);
        }
        Ok(self.0.member(&self.way(path)?)?)
    }

    fn open_beneath(&self, root: &Path, name: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        let outside = |part| !matches!(part, Component::Normal(_) | Component::CurDir);
        if name.components().any(outside) {
            let what = "a path that leaves the folder";
            return Err(Error::new(ErrorKind::Denied, what).in_file(&root.join(name)));
        }
        self.open(&root.join(name), access)
    }

    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        Self::refuse(path)
    }

    fn replace(&self, path: &Path, _: &[u8]) -> Result<()> {
        Self::refuse(path)
    }

    fn remove(&self, path: &Path) -> Result<()> {
        Self::refuse(path)
    }

    fn sync_dir(&self, _: &Path) -> Result<()> {
        Ok(())
    }

    fn list(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        let entries = self.0.list(&self.way(dir)?).into_iter();
        Ok(entries.map(|entry| dir.join(entry.name)).collect())
    }

    fn list_beneath(&self, root: &Path, dir: &Path, limit: usize) -> Result<Vec<Entry>> {
        let mut entries = self.0.list(&self.way(&root.join(dir))?);
        entries.truncate(limit.saturating_add(1));
        Ok(entries)
    }
}
