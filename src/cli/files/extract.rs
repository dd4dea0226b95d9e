//! `cp`: files and trees out of an image.
//!
//! Names and links come from a guest. Everything is made relative to the open directory it goes into,
//! as something new, and never through a symbolic link: no link that was copied before, or that somebody
//! puts there meanwhile, leads out of the target. Nothing that exists is changed.

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::Args;
use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps};

use super::{Target, last_name};
use crate::cli::chain::ParentArgs;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::volumes::files::{Entry, FileKind, FileSystem, Sink};

/// Deepest tree, and most names of one.
const MAX_DEPTH: usize = 128;
const MAX_NAMES: u64 = 1 << 24;
/// Bytes of all files together that are still believed, in disks' sizes: hard links are copied as
/// files.
const MAX_DISKS: u64 = 16;

/// Arguments of `flatdisk cp`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  A file into the current directory:
    flatdisk cp server.vhdx/etc/fstab .
  A user's files from the third partition:
    flatdisk cp -r win11.vhdx:3/Users/anna /srv/rescued

What exists is never overwritten. Symbolic links stay links; devices, sockets and the like are left out,
and counted.")]
pub struct CpArgs {
    /// The image, with the number of a partition if there are several, and a path.
    #[arg(value_name = "IMAGE[:N]/PATH")]
    source: OsString,
    /// Where to: an existing directory, or a new name.
    #[arg(value_name = "DEST")]
    target: PathBuf,
    /// Copy directories with all that is in them.
    #[arg(long, short)]
    recursive: bool,
    /// Do not say what is left out.
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    parents: ParentArgs,
}

/// Copies a file or a tree.
pub fn cp(args: &CpArgs) -> Result<u8> {
    let source = Target::parse(&args.source)?;
    let mut files = source.files(&args.parents)?;
    let top = files.stat(&source.path).in_file(&source.image)?;
    if top.kind == FileKind::Directory && !args.recursive {
        let what = format!("{}: a directory", String::from_utf8_lossy(&source.path));
        return Err(Error::invalid(what).in_file(&source.image).hint("-r copies it"));
    }
    let existing = args.target.is_dir();
    let (folder, name) = match (existing, last_name(&source.path)) {
        (true, name) => (args.target.clone(), name),
        (false, _) => {
            let name = args.target.file_name().ok_or_else(|| {
                Error::new(ErrorKind::NotFound, "no such directory").in_file(&args.target)
            })?;
            let folder = args.target.parent().filter(|folder| !folder.as_os_str().is_empty());
            (folder.unwrap_or(Path::new(".")).to_owned(), Some(name.to_owned()))
        }
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder_fd = rustix::fs::open(&folder, flags, Mode::empty())
        .map_err(|e| Error::io("opening", &e.into()).in_file(&folder))?;
    let disk = std::fs::metadata(&source.image).map_or(0, |meta| meta.len());
    let mut copy = Copy { files: &mut *files, names: 0, bytes: 0, skipped: 0, failed: 0, disk };
    match name {
        Some(name) => {
            let place =
                Place { folder: folder_fd.as_fd(), name: &name, shown: &folder.join(&name) };
            copy.entry(&source.path, &top, &place, 0).or_else(|e| copy.note(e))?;
        }
        // The root of a file system has no name of its own.
        None => copy.children(&source.path, folder_fd.as_fd(), &folder, 0)?,
    }
    if copy.skipped > 0 && !args.quiet {
        eprintln!(
            "flatdisk: {} left out, which are neither files, directories nor links",
            copy.skipped
        );
    }
    Ok(u8::from(copy.failed > 0))
}

/// Where something new goes.
struct Place<'a> {
    folder: BorrowedFd<'a>,
    name: &'a OsStr,
    /// For messages.
    shown: &'a Path,
}

impl Place<'_> {
    fn failed(&self, what: &'static str, e: rustix::io::Errno) -> Error {
        Error::io(what, &e.into()).in_file(self.shown)
    }
}

struct Copy<'a> {
    files: &'a mut dyn FileSystem,
    names: u64,
    bytes: u64,
    skipped: u64,
    failed: u64,
    disk: u64,
}

impl Copy<'_> {
    /// Says what failed, and goes on, unless nothing more can be written.
    fn note(&mut self, e: Error) -> Result<()> {
        if matches!(e.kind(), ErrorKind::NoSpace | ErrorKind::Cancelled) {
            return Err(e);
        }
        eprintln!("flatdisk: {e}");
        self.failed += 1;
        Ok(())
    }

    fn entry(&mut self, path: &[u8], entry: &Entry, place: &Place<'_>, depth: usize) -> Result<()> {
        self.names += 1;
        if self.names > MAX_NAMES {
            return Err(Error::new(ErrorKind::Cancelled, "more names than a file system has"));
        }
        match entry.kind {
            // Only what the user named may be a link.
            FileKind::File => self.file(path, entry, place, depth == 0),
            FileKind::Directory => self.directory(path, entry, place, depth),
            FileKind::Symlink => self.link(path, place),
            FileKind::Special => {
                self.skipped += 1;
                Ok(())
            }
        }
    }

    fn directory(
        &mut self,
        path: &[u8],
        entry: &Entry,
        place: &Place<'_>,
        depth: usize,
    ) -> Result<()> {
        if depth >= MAX_DEPTH {
            return Err(
                Error::corrupt("directories in directories without end").in_file(place.shown)
            );
        }
        rustix::fs::mkdirat(place.folder, place.name, Mode::RWXU)
            .map_err(|e| place.failed("creating", e))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = rustix::fs::openat(place.folder, place.name, flags, Mode::empty())
            .map_err(|e| place.failed("opening", e))?;
        self.children(path, made.as_fd(), place.shown, depth)?;
        finish(made.as_fd(), entry, 0o700).map_err(|e| place.failed("setting permissions", e))
    }

    /// Copies all that is in a directory.
    fn children(
        &mut self,
        path: &[u8],
        into: BorrowedFd<'_>,
        shown: &Path,
        depth: usize,
    ) -> Result<()> {
        let entries = match self.files.list(path) {
            Ok(entries) => entries,
            Err(e) => return self.note(e.in_file(shown)),
        };
        for entry in entries {
            let mut path = path.to_vec();
            path.push(b'/');
            path.extend(&entry.name);
            let name = OsStr::from_bytes(&entry.name);
            let place = Place { folder: into, name, shown: &shown.join(name) };
            if let Err(e) = self.entry(&path, &entry, &place, depth + 1) {
                self.note(e)?;
            }
        }
        Ok(())
    }

    fn link(&mut self, path: &[u8], place: &Place<'_>) -> Result<()> {
        let target = self.files.target(path).in_file(place.shown)?;
        let target = CString::new(target)
            .map_err(|_| Error::corrupt("a link to nowhere").in_file(place.shown))?;
        rustix::fs::symlinkat(&*target, place.folder, place.name)
            .map_err(|e| place.failed("creating", e))
    }

    fn file(&mut self, path: &[u8], entry: &Entry, place: &Place<'_>, follow: bool) -> Result<()> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = rustix::fs::openat(place.folder, place.name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|e| place.failed("creating", e))?;
        let left = self.disk.saturating_mul(MAX_DISKS).max(1 << 30).saturating_sub(self.bytes);
        let mut out = Out { file: File::from(made), len: 0, data: 0, left };
        let done = self.files.read(path, follow, &mut out).and_then(|()| out.end(entry));
        self.bytes += out.data;
        done.in_file(place.shown).inspect_err(|_| {
            // Half a file is none.
            let _ = rustix::fs::unlinkat(place.folder, place.name, AtFlags::empty());
        })
    }
}

/// A new file that is filled.
struct Out {
    file: File,
    len: u64,
    data: u64,
    left: u64,
}

impl Out {
    /// Gives the file its length, permissions and time.
    fn end(&self, entry: &Entry) -> Result<()> {
        let failed = |e: &std::io::Error| Error::io("writing", e);
        self.file.set_len(self.len).map_err(|e| failed(&e))?;
        finish(self.file.as_fd(), entry, 0o600).map_err(|e| failed(&e.into()))
    }
}

impl Sink for Out {
    fn data(&mut self, bytes: &[u8]) -> Result<()> {
        self.left = self.left.checked_sub(bytes.len() as u64).ok_or_else(|| {
            Error::new(ErrorKind::Cancelled, "the files are larger than their disk can be")
        })?;
        self.data += bytes.len() as u64;
        self.len += bytes.len() as u64;
        self.file.write_all(bytes).map_err(|e| Error::io("writing", &e))
    }

    fn hole(&mut self, len: u64) -> Result<()> {
        let failed = |e: std::io::Error| Error::io("writing", &e);
        self.len = self.len.checked_add(len).ok_or_else(|| Error::corrupt("a file without end"))?;
        self.file.seek(SeekFrom::Start(self.len)).map_err(failed)?;
        Ok(())
    }
}

/// Sets what a copy keeps: permissions of owner, group and others, and the time. Never more than the
/// user could do: no set-user-id. Owners may always read what they own.
fn finish(file: BorrowedFd<'_>, entry: &Entry, least: u32) -> rustix::io::Result<()> {
    if let Some(mode) = entry.mode {
        rustix::fs::fchmod(file, Mode::from_raw_mode(mode & 0o777 | least))?;
    }
    if let Some(seconds) = entry.modified {
        let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
        rustix::fs::futimens(file, &Timestamps { last_access: time, last_modification: time })?;
    }
    Ok(())
}
