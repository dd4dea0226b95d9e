//! File systems that are programs: mounting a flat file without a loop device, which takes neither root nor
//! drivers in the kernel.
//!
//! The flat mount shows partitions as files, so that no program needs to know offsets. Which one it is,
//! the flat file itself tells, as the daemon shows it.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::unistd::geteuid;

use super::file_system::How;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::raw;
use crate::fuse::daemon::users_may_allow_others;
use crate::fuse::mounts::{self, MountEntry};
use crate::storage::Access;
use crate::storage::file::HostFs;
use crate::volumes::{self, Content};

/// A program that mounts files.
#[derive(Debug)]
pub struct Program {
    name: &'static str,
    /// Where it is to be had.
    package: &'static str,
    /// File systems that it knows, by the names in [`Content::type_name`].
    types: &'static [&'static str],
    /// It only reads.
    reads_only: bool,
    /// An option with which a user may do in it what root may, as on a disk of his own.
    as_root: Option<&'static str>,
    /// It may be installed to run as root whoever calls it, and then users must let root into their mounts.
    for_others: bool,
}

/// All of them.
const PROGRAMS: [Program; 4] = [
    Program {
        name: "fuse2fs",
        package: "fuse2fs",
        types: &["ext2", "ext3", "ext4"],
        reads_only: false,
        as_root: Some("fakeroot"),
        for_others: false,
    },
    Program {
        name: "ntfs-3g",
        package: "ntfs-3g",
        types: &["ntfs"],
        reads_only: false,
        as_root: None,
        for_others: true,
    },
    Program {
        name: "squashfuse",
        package: "squashfuse",
        types: &["squashfs"],
        reads_only: true,
        as_root: None,
        for_others: false,
    },
    Program {
        name: "fusefat",
        package: "fusefat",
        types: &["vfat"],
        reads_only: true,
        as_root: None,
        for_others: false,
    },
];

/// The file to mount, and the program that does it.
#[derive(Debug)]
pub struct Choice {
    file: PathBuf,
    program: &'static Program,
}

/// The file system that a program mounted on `dir`, if one is mounted there.
pub fn mounted(dir: &Path) -> Result<Option<MountEntry>> {
    Ok(mounts::mounted_at(dir)?.filter(|mount| mount.is_fuse() && !mount.is_ours()))
}

/// Chooses partition `number`, or the only file system, of the disk that is the flat file `whole`, whose
/// partitions are named by `part`. `fs_type` names the file system where it is not to be found out.
pub fn choose(
    whole: &Path,
    part: impl Fn(u32) -> PathBuf,
    number: Option<u32>,
    fs_type: Option<&str>,
) -> Result<Choice> {
    let disk = raw::open(HostFs::shared().open(whole, Access::Peek)?)?;
    let volumes = volumes::volumes(&disk)?;
    let place = volumes.place(number)?;
    let at = |partition: &&volumes::Partition| partition.range(volumes.size) == place;
    let partition = volumes.partitions.iter().find(at);
    let content = match partition {
        Some(partition) => partition.content.as_ref(),
        None => volumes.content.as_ref(),
    };
    let found = fs_type.or(content.and_then(|content| content.type_name));
    let program = PROGRAMS.iter().find(|program| found.is_some_and(|t| program.types.contains(&t)));
    let program = program.ok_or_else(|| unknown(found, content))?;
    let file = partition.map_or(whole.to_owned(), |partition| part(partition.number));
    Ok(Choice { file, program })
}

fn unknown(found: Option<&str>, content: Option<&Content>) -> Error {
    let known = PROGRAMS.iter().flat_map(|program| program.types).copied();
    let known = known.collect::<Vec<_>>().join(", ");
    let what = match found {
        Some(found) => format!("no program is known here that mounts {found} (only {known})"),
        None if content.is_none() => "there is nothing to mount".to_owned(),
        None => format!("no file system is recognised there (known are {known})"),
    };
    Error::unsupported(what).hint("root may try `flatdisk attach --mount` without --fuse")
}

impl Choice {
    /// The program's name.
    pub fn program(&self) -> &'static str {
        self.program.name
    }

    /// Mounts it on `dir`, and returns the mount.
    pub fn mount(&self, dir: &Path, how: &How<'_>) -> Result<MountEntry> {
        let mut command = Command::new(self.program.name);
        command.arg(&self.file).arg(dir);
        let as_root = self.program.as_root.filter(|_| !geteuid().is_root());
        let read_only = (how.read_only || self.program.reads_only).then_some("ro");
        for option in [as_root, read_only].into_iter().flatten() {
            command.arg("-o").arg(option);
        }
        if let Some(options) = how.options {
            command.arg("-o").arg(options);
        }
        self.run(&mut command)?;
        match mounted(dir)? {
            Some(mount) if !mounts::is_dead(dir) => Ok(mount),
            _ => {
                let what = format!("{}: ended, and nothing is mounted", self.program.name);
                Err(Error::new(ErrorKind::Failed, what).in_file(dir))
            }
        }
    }

    fn run(&self, command: &mut Command) -> Result<()> {
        let name = self.program.name;
        let failed = |e: io::Error| match e.kind() {
            io::ErrorKind::NotFound => {
                let what = format!("{name} is not installed");
                let hint = format!("it is in the package {}", self.program.package);
                Error::new(ErrorKind::NotFound, what).hint(hint)
            }
            _ => Error::io(format!("running {name}"), &e),
        };
        // A file, because the program goes on in the background and would keep a pipe open.
        let mut said = tempfile::tempfile().map_err(failed)?;
        let output = |said: &File| said.try_clone().map_err(failed);
        command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(output(&said)?);
        let status = command.stderr(output(&said)?).status().map_err(failed)?;
        if status.success() {
            return Ok(());
        }
        let mut text = Vec::new();
        let _ = said.rewind().and_then(|()| said.read_to_end(&mut text));
        let text = String::from_utf8_lossy(&text);
        let line = complaint(&text).map_or(status.to_string(), |line| {
            line.trim_start_matches(&format!("{name}: ")).trim_end_matches('.').to_owned()
        });
        let failed = Error::new(ErrorKind::Failed, format!("{name}: {line}"));
        let hint = "users need `user_allow_other` in /etc/fuse.conf for it; `flatdisk ls` and `cp` read \
                    files of many file systems without";
        let lacks = self.program.for_others && !geteuid().is_root() && !users_may_allow_others();
        Err(if lacks { failed.hint(hint) } else { failed })
    }
}

/// The line that tells what went wrong, of those that a program says: banners and advice stand around it.
fn complaint(said: &str) -> Option<&str> {
    const WORDS: [&str; 6] = ["fail", "error", "denied", "cannot", "allowed", "not "];
    let mut lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
    let telling = |line: &&str| {
        let line = line.to_lowercase();
        WORDS.iter().any(|word| line.contains(word))
    };
    lines.clone().find(telling).or(lines.next_back())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_what_a_program_says_the_complaint_counts() {
        let said =
            "exfat 1.3.0\n\nfusermount: option allow_other only allowed if set\nSee the manual\n";
        assert_eq!(complaint(said), Some("fusermount: option allow_other only allowed if set"));
        assert_eq!(complaint("one\ntwo\n"), Some("two"));
        assert_eq!(complaint(" \n"), None);
    }
}
