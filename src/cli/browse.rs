//! `browse`: what a file manager runs for an image.
//!
//! The mount point lies in the home directory and not in a hidden or runtime directory, because only
//! there do file managers offer to eject it. It exists as long as the mount does.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::Args;

use super::log_sink;
use super::mount::{MOUNT_FAILURE, SYSTEM_ERROR};
use super::output;
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::daemon::{MountRequest, Prepared};
use crate::fuse::mounts;
use crate::fuse::options::{Allowed, MountOptions};

/// Folder of all mount points, in the home directory.
const FOLDER: &str = "flatdisk";

/// Images of one name, from different folders, that can show at a time.
const MOST: u32 = 99;

/// Arguments of `flatdisk browse`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
The image appears in ~/flatdisk/NAME, which is opened with xdg-open. The command
ends when that is unmounted: by the file manager's eject button, or with
`flatdisk umount`. Errors are also shown with notify-send.

Exit status:
  0   unmounted again, or shown already
  2   unmounted, but not everything written reached the image
  32  the mount failed")]
pub struct BrowseArgs {
    /// The image.
    image: PathBuf,
    /// Mount read-only.
    #[arg(long, short)]
    read_only: bool,
}

/// `flatdisk browse`.
pub fn browse(args: &BrowseArgs) -> u8 {
    log_sink::start(0);
    match try_browse(args) {
        Ok(failures) if failures.is_empty() => 0,
        Ok(failures) => {
            failures.iter().for_each(|failure| complain(failure));
            SYSTEM_ERROR
        }
        Err(e) => {
            complain(&e.to_string());
            MOUNT_FAILURE
        }
    }
}

/// Tells a person who looks at a desktop, where standard error leads into a log.
fn complain(what: &str) {
    output::complain(what);
    let mut notify = Command::new("notify-send");
    notify.args(["--icon=dialog-error", "--", "flatdisk", what]);
    // Not everybody has it.
    let _ = notify.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
}

fn try_browse(args: &BrowseArgs) -> Result<Vec<String>> {
    let opening = |e| Error::io("open", &e).in_file(&args.image);
    let image = fs::canonicalize(&args.image).map_err(opening)?;
    let home = std::env::home_dir().filter(|home| home.is_absolute());
    let home = home.ok_or_else(|| Error::new(ErrorKind::NotFound, "there is no home directory"))?;
    let folder = home.join(FOLDER);
    let made = fs::create_dir_all(&folder);
    made.map_err(|e| Error::io("create", &e).in_file(&folder))?;
    let Some(point) = mount_point(&folder, &image)? else { return Ok(Vec::new()) };
    let options = MountOptions { read_only: args.read_only, ..MountOptions::default() };
    let served = prepare(image, &point, options).and_then(|prepared| {
        prepared.serve(|| {
            show(&point);
            Ok(())
        })
    });
    // Either goes only if it is empty.
    let _ = fs::remove_dir(&point);
    let _ = fs::remove_dir(&folder);
    served
}

/// Makes a mount point named after the image; `None` if the image shows already, and is shown again.
fn mount_point(folder: &Path, image: &Path) -> Result<Option<PathBuf>> {
    let name = image.file_name().unwrap_or_default();
    for number in 1..=MOST {
        let mut name = name.to_owned();
        if number > 1 {
            name.push(format!(" {number}"));
        }
        let point = folder.join(name);
        match mounts::mounted_at(&point)? {
            Some(mount) if mount.is_ours() && !mounts::is_dead(&point) => {
                if Path::new(&mount.source) == image {
                    show(&point);
                    return Ok(None);
                }
            }
            _ => match fs::create_dir(&point) {
                Err(e) if !point.is_dir() && !mounts::is_dead(&point) => {
                    return Err(Error::io("create", &e).in_file(&point));
                }
                _ => return Ok(Some(point)),
            },
        }
    }
    let what = format!("{MOST} images of this name are shown already");
    Err(Error::new(ErrorKind::Busy, what).in_file(image))
}

/// Lets root look in where users may allow that: a loop device needs it.
fn prepare(image: PathBuf, point: &Path, options: MountOptions) -> Result<Prepared> {
    let shared = MountOptions { allowed: Some(Allowed::Root), ..options.clone() };
    let request = |options| MountRequest {
        sources: vec![image.clone()],
        mountpoint: point.to_owned(),
        options,
    };
    match Prepared::new(&request(shared)) {
        Err(e) if e.kind() == ErrorKind::Denied => Prepared::new(&request(options)),
        prepared => prepared,
    }
}

/// Opens the folder in the file manager, if there is one.
fn show(point: &Path) {
    let opened = Command::new("xdg-open")
        .arg(point)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    match opened {
        Ok(mut child) => _ = std::thread::spawn(move || child.wait()),
        Err(e) => {
            output::complain(format_args!("the disk is in {}; xdg-open: {e}", point.display()))
        }
    }
}
