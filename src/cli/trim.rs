//! `compact --trim`: the file systems in an image say what they do not use, as `fstrim` in the guest would.
//!
//! The image is attached as a loop device of its own; each file system on it is mounted on a directory that
//! nobody else may enter, trimmed, and unmounted. Mounting writes: a journal is played back, as it would be
//! by the guest. What is mounted is believed by the kernel, so that this is for one's own images.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::{Command, Stdio};

use super::attach;
use super::attach::file_system::{self, How};
use crate::error::{Error, ErrorKind, Result};

/// Trims every file system of an image that can be mounted here. Returns what was left out, and why.
pub fn trim(image: &Path, parents: &[OsString]) -> Result<Vec<String>> {
    let dir = tempfile::Builder::new()
        .prefix("flatdisk-trim-")
        .tempdir()
        .map_err(|e| Error::io("making a directory to mount on", &e))?;
    attach::while_attached(image, parents, |device| {
        let (nodes, others) = file_system::all(device);
        let mut left: Vec<_> =
            others.into_iter().map(|what| format!("{what}: nothing to trim")).collect();
        for node in nodes {
            if let Err(e) = trim_one(&node, dir.path()) {
                left.push(format!("{}: {}", node.display(), e.what()));
            }
        }
        Ok(left)
    })
}

fn trim_one(node: &Path, dir: &Path) -> Result<()> {
    let options = Some(OsStr::new("nosuid,nodev,noexec,noatime"));
    file_system::mount(node, dir, &How { read_only: false, fs_type: None, options })?;
    let trimmed = fstrim(dir);
    file_system::unmount(dir)?;
    trimmed
}

fn fstrim(dir: &Path) -> Result<()> {
    let mut command = Command::new("fstrim");
    command.arg("--").arg(dir).env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::null());
    let said = command.output().map_err(|e| Error::io("running fstrim", &e))?;
    if said.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&said.stderr).into_owned();
    let line = text.lines().next().unwrap_or("fstrim failed").to_owned();
    Err(Error::new(ErrorKind::Unsupported, line))
}
