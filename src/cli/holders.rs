//! Who has a file open, for messages that say "in use".

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind};
use crate::fuse::control::Connection;
use crate::fuse::mounts::{self, MountEntry};

/// The error with who has the file open that it is about, as far as that can be seen.
pub fn naming_them(error: Error) -> Error {
    if error.kind() != ErrorKind::Busy {
        return error;
    }
    match error.path().and_then(holder) {
        Some(who) => error.hinting(Some(format!("{who} has it open"))),
        None => error,
    }
}

/// A process that has the file at `path` open. Names alone are read, which never waits for a file system.
fn holder(path: &Path) -> Option<String> {
    let wanted = fs::canonicalize(path).ok()?;
    let own = std::process::id().to_string();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let number = process.file_name();
        let Some(number) = number.to_str().filter(|n| n.bytes().all(|b| b.is_ascii_digit())) else {
            continue;
        };
        let open = fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
        let mut open = open.filter_map(|file| fs::read_link(file.path()).ok());
        if number != own && open.any(|file| file == wanted) {
            let program = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            let place = place_of(number).map(|place| format!(" at {}", place.display()));
            let place = place.unwrap_or_default();
            return Some(format!("process {number} ({}{place})", program.trim()));
        }
    }
    None
}

/// Where the daemon with this process id shows its images, if it is one of ours.
fn place_of(process: &str) -> Option<PathBuf> {
    let answers = |mount: &MountEntry| {
        let daemon = Connection::to(mount).ok().and_then(|daemon| daemon.process());
        daemon.is_some_and(|daemon| daemon.to_string() == process)
    };
    let mut ours = mounts::mount_table().ok()?.into_iter().filter(MountEntry::is_ours);
    ours.find(answers).map(|mount| mount.target)
}
