//! Who has a file open, for messages that say "in use".

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind};
use crate::fuse::control::Connection;
use crate::fuse::mounts::{self, MountEntry, processes_using};

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

/// A process that has the file at `path` open.
fn holder(path: &Path) -> Option<String> {
    let users = processes_using(&fs::canonicalize(path).ok()?);
    let user = users.first()?;
    let place = place_of(&user.process).map(|place| format!(" at {}", place.display()));
    Some(format!("process {} ({}{})", user.process, user.program, place.unwrap_or_default()))
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
