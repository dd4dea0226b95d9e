//! OVA: the disks of a machine and their description in one archive (DSP0243, "Open Virtualization Format",
//! section 5).
//!
//! ```text
//! x.ovf   the description, first
//! x.mf    digests of all other files but the certificate
//! x.cert  a signature of the manifest
//! …       the disks, mostly stream-optimised VMDKs
//! ```
//!
//! Disks are read where they lie ([`crate::storage::archive`]); nothing is unpacked. `descriptor` writes the
//! description of a machine with one disk.
//!
//! # Further files
//!
//! - `describe`: another description for an archive, its disks left where they are;
//! - `manifest`: the manifest.

pub mod describe;
pub mod descriptor;
mod manifest;

use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use describe::Tail;

use super::open::open_alone;
use super::{
    Image, OpenOptions, Probe, Repair, Report, Severity, by_extension, check as check_image,
};
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::storage::archive::{self, Archive, Inside};
use crate::storage::draft::Draft;
use crate::storage::{Access, Host};

/// Members of an archive whose contents are looked at because their names say nothing.
const MAX_LOOKED: usize = 256;

/// Whether the file at `path` has the name of an archive, and is one.
pub fn is_ova(host: &dyn Host, path: &Path) -> bool {
    let file = || host.open(path, Access::Peek);
    archive::has_name(path) && file().is_ok_and(|file| archive::is_archive(&*file))
}

/// Whether a member's name is that of a disk, packed once more (compressed, or the first of several chunks)
/// or not.
pub fn names_disk(name: &Path) -> bool {
    by_extension(name).is_some() || names_packed_disk(name)
}

/// Whether the name is that of a disk that was packed once more.
pub fn names_packed_disk(name: &Path) -> bool {
    let extension = name.extension().and_then(OsStr::to_str).unwrap_or_default();
    let packed = ["gz", "bz2", "xz", "zst", "000000000"];
    packed.iter().any(|known| known.eq_ignore_ascii_case(extension))
        && name.file_stem().is_some_and(|stem| by_extension(Path::new(stem)).is_some())
}

/// The paths of the disks in the archive at `path`, in its order, whether they open or not. Files that are
/// only parts of others are none.
///
/// # Errors
/// The archive cannot be read, or is none.
pub fn disks(host: &Arc<dyn Host>, path: &Path) -> Result<Vec<PathBuf>> {
    let archive = Archive::open(host.open(path, Access::Peek)?)?;
    let mut looked = 0;
    let mut known = HashSet::new();
    let mut found = Vec::new();
    for member in archive.members().iter() {
        if !known.insert(&member.name) {
            continue;
        }
        let mut by_contents = || {
            looked += 1;
            let file = (looked <= MAX_LOOKED).then(|| archive.member(&member.name).ok()).flatten();
            file.is_some_and(|file| Probe::read(&*file).is_ok_and(|probe| probe.claimed()))
        };
        if names_disk(&member.name) || by_contents() {
            found.push(path.join(&member.name));
        }
    }
    let mut parts = HashSet::new();
    for disk in &found {
        if let Ok(opened) = open_alone(host, disk, &OpenOptions::new(Access::Peek)) {
            let files = opened.map.files().iter().map(|file| file.path().to_owned());
            parts.extend(files.filter(|file| file != disk));
        }
    }
    found.retain(|disk| !parts.contains(disk));
    Ok(found)
}

/// The only disk in the archive at `path`.
///
/// # Errors
/// There is none ([`ErrorKind::NotThisFormat`]), or more than one ([`ErrorKind::InvalidInput`]).
pub fn only_disk(host: &Arc<dyn Host>, path: &Path) -> Result<PathBuf> {
    let mut disks = disks(host, path)?;
    match (disks.pop(), disks.len()) {
        (Some(disk), 0) => Ok(disk),
        (None, _) => {
            let what = "no disk is in the archive";
            Err(Error::new(ErrorKind::NotThisFormat, what).in_file(path))
        }
        (Some(last), others) => {
            disks.push(last);
            let name =
                |disk: &PathBuf| disk.strip_prefix(path).unwrap_or(disk).display().to_string();
            let names: Vec<_> = disks.iter().take(8).map(name).collect();
            let what = format!("the archive has {} disks: {}", others + 1, names.join(", "));
            let hint = format!("name one: `{}:{}`", path.display(), names[0]);
            Err(Error::invalid(what).in_file(path).hint(hint))
        }
    }
}

/// Opens the only disk of an archive, by its name.
///
/// # Errors
/// Those of [`super::open()`], and [`ErrorKind::NotThisFormat`] where there is none.
pub fn open_only(archive: &Arc<Archive>, options: &OpenOptions) -> Result<Image> {
    let host: Arc<dyn Host> = Arc::new(Inside(archive.clone()));
    let members = archive.members();
    let disk = members.iter().find(|member| by_extension(&member.name).is_some());
    let path = archive.file().path();
    let Some(disk) = disk else {
        let what = "no disk is in the archive";
        return Err(Error::new(ErrorKind::NotThisFormat, what).in_file(path));
    };
    super::open(&host, &path.join(&disk.name), options)
}

/// Checks the archive at `path`: its order, its manifest, and all disks in it.
///
/// # Errors
/// Checking could not go on; damage is in the report.
pub fn check(
    host: &Arc<dyn Host>,
    path: &Path,
    options: &OpenOptions,
    progress: &dyn Progress,
) -> Result<Report> {
    let archive = Archive::open(host.open(path, Access::Read)?)?;
    let mut report = Report::new("ova");
    let members = archive.members();
    let is_description = |name: &Path| has_extension(name, "ovf");
    match members.iter().position(|member| is_description(&member.name)) {
        None => report.add(Severity::Notice, None, "no description of a machine (.ovf) is in it"),
        Some(0) => {}
        Some(_) => {
            let what = "the description (.ovf) is not the first file: VMware's tools refuse that";
            report.add(Severity::Notice, None, what);
        }
    }
    match describe::tail(&archive)? {
        Tail::Clean => {}
        Tail::Begun(at) => {
            let len = archive.file().len().unwrap_or(at);
            report.leak(at, len.saturating_sub(at), "what an interrupted change left");
        }
        Tail::Ready(at, _) => {
            let what = "the description was being replaced: --repair brings that to its end";
            report.error(at, what);
        }
        Tail::Foreign(at) => report.notice(at, "something lies behind the end of the archive"),
    }
    manifest::check(&archive, &mut report, progress)?;
    for disk in disks(host, path)? {
        progress.go_on()?;
        match check_image(host, &disk, options) {
            Ok(found) => report.include(&disk, found),
            Err(e) => report.add_in(Some(disk), Severity::Error, e.offset(), e.what()),
        }
    }
    Ok(report)
}

/// Brings a change of the archive at `path` to its end that was interrupted. A `dry_run` does it to a draft of the
/// archive.
///
/// # Errors
/// [`ErrorKind::Busy`] while somebody has the archive open, those of [`check`], and those of writing.
pub fn repair(
    host: &Arc<dyn Host>,
    path: &Path,
    options: &OpenOptions,
    dry_run: bool,
    progress: &dyn Progress,
) -> Result<Repair> {
    let host: &Arc<dyn Host> = &match dry_run {
        true => Draft::over(host)?,
        false => host.clone(),
    };
    let before = check(host, path, options, progress)?;
    let file = host.open(path, Access::Write)?;
    let steps = describe::finishing(&file)?;
    let changes = steps.changes();
    if changes.is_empty() {
        return Ok(Repair { after: before.clone(), before, changes });
    }
    steps.carry_out(&())?;
    drop((steps, file));
    let after = check(host, path, options, progress)?;
    Ok(Repair { before, after, changes })
}

fn has_extension(name: &Path, extension: &str) -> bool {
    name.extension().is_some_and(|own| own.eq_ignore_ascii_case(extension))
}
