//! Commands that talk to running daemons: `umount`, `sync`, `status`, `open`, `close`.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::{Args, Parser};
use serde::Serialize;

use super::attach::{self, AttachmentStatus};
use super::mount::{MOUNT_FAILURE, SYSTEM_ERROR, USAGE};
use super::output::{OutputArgs, complain, iec, print_json, print_line};
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::control::{Answer, Connection, MountStatus, Request};
use crate::fuse::mounts::{self, MountEntry};
use crate::names::Name;

/// How long after unmounting to wait before looking whether the file system is mounted elsewhere.
const GLANCE: Duration = Duration::from_millis(20);
/// How long after unmounting the kernel may take to end the session.
const PATIENCE: Duration = Duration::from_secs(2);

/// Arguments of `flatdisk umount`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Exit status:
  0   unmounted, and every image is closed
  1   wrong usage
  2   unmounted, but not everything written reached its image
  32  not unmounted")]
pub struct UmountArgs {
    /// The mount point.
    #[arg(required = true, value_name = "DIR")]
    mountpoints: Vec<PathBuf>,
    /// Detach the mount now, even if it is in use, and do not wait for its users.
    #[arg(long, short)]
    lazy: bool,
}

/// Arguments of `umount.flatdisk`, as umount(8) calls its helpers.
#[derive(Debug, Parser)]
#[command(
    name = "umount.flatdisk",
    version,
    about = "Unmounts flat files for umount(8)",
    long_about = "umount(8) runs this program for mounts of flatdisk. It flushes all images, unmounts, \
                  and returns when every image is closed; the system call alone waits for neither. As \
                  umount.fuse it is also called for other FUSE mounts, which it leaves to umount(8).",
    after_long_help = "\
Exit status:
  0   unmounted, and every image is closed
  1   wrong usage
  2   unmounted, but not everything written reached its image
  32  not unmounted"
)]
pub struct UmountHelperArgs {
    /// The mount point.
    mountpoint: PathBuf,
    /// Detach the mount now, even if it is in use.
    #[arg(short)]
    lazy: bool,
    /// Ignored: a daemon that does not answer is never waited for.
    #[arg(short)]
    force: bool,
    /// Ignored: there is no mtab.
    #[arg(short)]
    no_mtab: bool,
    /// Ignored: a FUSE mount cannot be made read-only.
    #[arg(short)]
    read_only: bool,
    /// Say more.
    #[arg(short, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Ignored: the type is known.
    #[arg(short, value_name = "TYPE")]
    types: Option<OsString>,
    /// Mount namespace (not supported).
    #[arg(short = 'N', value_name = "NAMESPACE")]
    namespace: Option<OsString>,
}

/// Arguments of `flatdisk sync`.
#[derive(Debug, Args)]
pub struct SyncArgs {
    /// Mount points, or anything in them [default: every mount of this user].
    #[arg(value_name = "DIR")]
    paths: Vec<PathBuf>,
}

/// Arguments of `flatdisk status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Mount points, or anything in them [default: every mount of this user].
    #[arg(value_name = "MOUNTPOINT")]
    paths: Vec<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
}

/// Arguments of `flatdisk open`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  Show an image in a live mount, and take it out again:
    flatdisk open /data/mail.vmdk /mnt/flat
    flatdisk close /mnt/flat/mail.vmdk.img
  The same with other words, and under another name:
    ln -s /data/mail.vmdk /mnt/flat/letters.img
    rm /mnt/flat/letters.img")]
pub struct OpenArgs {
    /// Images to show.
    #[arg(required = true, num_args = 1.., value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// The mount, or anything in it.
    mountpoint: PathBuf,
    #[command(flatten)]
    output: OutputArgs,
}

/// Arguments of `flatdisk close`.
#[derive(Debug, Args)]
pub struct CloseArgs {
    /// Flat files in the root of a mount.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// `flatdisk umount`.
pub fn umount(args: &UmountArgs) -> u8 {
    let statuses = args.mountpoints.iter().map(|dir| umount_one(dir, args.lazy));
    statuses.fold(0, |all, one| all | one)
}

/// `umount.fuse`. umount(8) calls it for any FUSE mount: where root names the mount by its absolute
/// path, it asks statfs(2) for the type, which knows no more than `fuse`. What is not ours goes back to
/// umount(8), which then does the rest by itself.
pub fn umount_any_fuse(args: &UmountHelperArgs) -> u8 {
    let mount = mounts::absolute(&args.mountpoint).and_then(|target| mounts::mounted_at(&target));
    if mount.is_ok_and(|mount| mount.is_some_and(|mount| mount.is_ours())) {
        return umount_helper(args);
    }
    let flags = [
        ("--internal-only", true),
        ("--lazy", args.lazy),
        ("--force", args.force),
        ("--no-mtab", args.no_mtab),
        ("--read-only", args.read_only),
        ("--verbose", args.verbose > 0),
    ];
    let mut umount = Command::new("umount");
    umount.args(flags.iter().filter(|(_, given)| *given).map(|(flag, _)| flag));
    if let Some(namespace) = &args.namespace {
        umount.arg("--namespace").arg(namespace);
    }
    let failed = umount.arg("--").arg(&args.mountpoint).exec();
    complain(Error::io("running umount", &failed));
    SYSTEM_ERROR
}

/// `umount.flatdisk` and `umount.fuse.flatdisk`.
pub fn umount_helper(args: &UmountHelperArgs) -> u8 {
    if args.namespace.is_some() {
        complain("option -N is not supported (use nsenter)");
        return USAGE;
    }
    umount_one(&args.mountpoint, args.lazy)
}

fn umount_one(dir: &Path, lazy: bool) -> u8 {
    match try_umount(dir, lazy) {
        Ok(failures) => {
            let status = if failures.is_empty() { 0 } else { SYSTEM_ERROR };
            failures.iter().for_each(complain);
            status
        }
        Err(e) => {
            complain(e);
            MOUNT_FAILURE
        }
    }
}

/// Unmounts and returns what failed to reach its image.
pub fn try_umount(dir: &Path, lazy: bool) -> Result<Vec<String>> {
    let target = mounts::absolute(dir)?;
    let mount = mounts::mounted_at(&target)?
        .ok_or_else(|| Error::new(ErrorKind::NotFound, "not mounted").in_file(&target))?;
    if !mount.is_ours() {
        let what = format!("a mount of type {}, not of flatdisk", mount.fs_type);
        return Err(Error::invalid(what).in_file(&target).hint("umount(8) unmounts it"));
    }
    let mut daemon = match Connection::to(&mount) {
        Ok(daemon) => daemon,
        Err(e) if e.kind() == ErrorKind::NotFound => {
            // A dead daemon's mount nobody can use any more.
            let dead = mounts::is_dead(&target);
            mounts::unmount(&target, lazy || dead)?;
            if !dead {
                let silent = "its daemon does not listen; not waiting for images to be closed";
                complain(format_args!("{}: {silent}", target.display()));
            }
            return Ok(Vec::new());
        }
        Err(e) => return Err(e),
    };
    let flushed = daemon.ask(&Request::Leave)?;
    mounts::unmount(&target, lazy)?;
    if lazy {
        return Ok(flushed.errors);
    }
    let mut failures = flushed.errors;
    let closed = match wait_for_end(&mut daemon, &mount)? {
        End::Closed(answer) => answer,
        End::MountedElsewhere(place) => {
            complain(format_args!(
                "{}: unmounted here, but still mounted {place}; not waiting for that",
                target.display()
            ));
            return Ok(failures);
        }
    };
    for failure in closed.errors {
        if !failures.contains(&failure) {
            failures.push(failure);
        }
    }
    daemon.end();
    Ok(failures)
}

/// How waiting for a daemon ends.
enum End {
    /// Every image is closed.
    Closed(Answer),
    /// The file system is mounted here, too, which can go on for ever.
    MountedElsewhere(String),
}

/// Waits until the daemon of an unmounted `mount` has closed its images.
fn wait_for_end(daemon: &mut Connection, mount: &MountEntry) -> Result<End> {
    if let Some(answer) = daemon.answer_within(GLANCE)? {
        return Ok(End::Closed(answer));
    }
    if let Some(place) = mounts::elsewhere(&mount.device)? {
        return Ok(End::MountedElsewhere(place));
    }
    // What holds a file system without mounting it where that can be seen (another file system laid
    // over it, a namespace of another user) shows by the session not ending.
    loop {
        match daemon.answer_within(PATIENCE)? {
            Some(answer) => return Ok(End::Closed(answer)),
            None if ending(daemon, mount) => {}
            None => return Ok(End::MountedElsewhere("where it cannot be seen from here".into())),
        }
    }
}

/// Whether a mount's daemon is closing images because the kernel has ended the session, or is gone.
fn ending(daemon: &Connection, mount: &MountEntry) -> bool {
    let Ok(mut second) = Connection::to(mount) else { return true };
    // The device number may belong to another mount already.
    second.process() != daemon.process()
        || second
            .ask(&Request::Status)
            .map_or(true, |answer| answer.status.is_none_or(|status| status.ending))
}

/// The mount that `path` lies in, by the mount table alone.
fn mount_of(path: &Path) -> Result<MountEntry> {
    let absolute = mounts::absolute(path)?;
    let mount = mounts::mount_table()?
        .into_iter()
        .filter(|mount| absolute.starts_with(&mount.target))
        .max_by_key(|mount| mount.target.components().count());
    mount
        .filter(MountEntry::is_ours)
        .ok_or_else(|| Error::invalid("not in a mount of flatdisk").in_file(path))
}

/// The mounts of `paths`, or all that this user may speak to.
fn mounts_of(paths: &[PathBuf]) -> Result<Vec<(MountEntry, Connection)>> {
    if paths.is_empty() {
        let mut found: Vec<(MountEntry, Connection)> = Vec::new();
        for mount in mounts::mount_table()?.into_iter().filter(MountEntry::is_ours) {
            if found.iter().all(|(known, _)| known.device != mount.device)
                && let Ok(connection) = Connection::to(&mount)
            {
                found.push((mount, connection));
            }
        }
        return Ok(found);
    }
    let connect = |path: &PathBuf| {
        let mount = mount_of(path)?;
        let connection = Connection::to(&mount)?;
        Ok((mount, connection))
    };
    paths.iter().map(connect).collect()
}

/// Prints a daemon's complaints and returns the exit status they make.
fn complain_of(answer: &Answer) -> u8 {
    answer.errors.iter().for_each(complain);
    u8::from(!answer.errors.is_empty())
}

/// `flatdisk sync`.
pub fn sync(args: &SyncArgs) -> Result<u8> {
    let mut status = 0;
    for (_, mut daemon) in mounts_of(&args.paths)? {
        status |= complain_of(&daemon.ask(&Request::Sync)?);
    }
    Ok(status)
}

/// `flatdisk status`.
pub fn status(args: &StatusArgs) -> Result<u8> {
    #[derive(Serialize)]
    struct Mounts {
        mounts: Vec<MountStatus>,
        attachments: Vec<AttachmentStatus>,
    }
    let attachments = match args.paths.is_empty() {
        true => attach::attachments()?,
        false => Vec::new(),
    };
    let mut mounts = Vec::new();
    for (_, mut daemon) in mounts_of(&args.paths)? {
        mounts.extend(daemon.ask(&Request::Status)?.status);
    }
    if args.output.json() {
        print_json(&Mounts { mounts, attachments })?;
        return Ok(0);
    }
    for mount in &mounts {
        print_mount(mount)?;
    }
    attachments.iter().try_for_each(attach::print)?;
    if mounts.is_empty() && attachments.is_empty() {
        print_line("nothing is mounted")?;
    }
    Ok(0)
}

fn print_mount(mount: &MountStatus) -> Result<()> {
    let access = if mount.read_only { ", read-only" } else { "" };
    print_line(&format!(
        "{} on {} (process {}{access})",
        mount.source,
        mount.mountpoint.display(),
        mount.pid
    ))?;
    for image in &mount.images {
        let mut state = String::new();
        if image.unflushed && image.throw_away.is_none() {
            state += ", not flushed";
        }
        if let Some(bytes) = image.throw_away {
            state += &format!(", {} to be thrown away", iec(bytes));
        }
        let displaced = image.displaced.iter().map(|how| format!(" ({how})")).collect::<String>();
        print_line(&format!(
            "  {}{displaced}: {} reading, {} writing{state}; \
             tables: {} pages, {} dirty, {} hits, {} misses",
            image.image.display(),
            image.readers,
            image.writers,
            image.table_pages,
            image.dirty_tables,
            image.cache_hits,
            image.cache_misses
        ))?;
        for parent in &image.parents {
            print_line(&format!("    over {}", parent.display()))?;
        }
        if let Some(why) = &image.read_only {
            print_line(&format!("    {why}"))?;
        }
    }
    mount.failures.iter().try_for_each(|failure| print_line(&format!("  failed: {failure}")))
}

/// `flatdisk open`.
pub fn open(args: &OpenArgs) -> Result<u8> {
    let mut daemon = Connection::to(&mount_of(&args.mountpoint)?)?;
    let absolute = |image: &PathBuf| {
        std::path::absolute(image).map_err(|e| Error::io("open", &e).in_file(image))
    };
    let images = args.images.iter().map(absolute).map(|image| Ok(Name(image?)));
    let images = images.collect::<Result<_>>()?;
    let answer = daemon.ask(&Request::Open { images })?;
    if args.output.json() {
        print_json(&serde_json::json!({ "files": answer.names }))?;
    } else {
        answer.names.iter().try_for_each(|name| print_line(&name.display().to_string()))?;
    }
    Ok(complain_of(&answer))
}

/// `flatdisk close`.
pub fn close(args: &CloseArgs) -> Result<u8> {
    let mut status = 0;
    for file in &args.files {
        let mount = mount_of(file)?;
        let absolute = mounts::absolute(file)?;
        let name = absolute.strip_prefix(&mount.target).unwrap_or(&absolute).to_owned();
        let mut daemon = Connection::to(&mount)?;
        status |= complain_of(&daemon.ask(&Request::Close { names: vec![Name(name)] })?);
    }
    Ok(status)
}
