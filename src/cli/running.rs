//! Commands that talk to running daemons: `umount`, `sync`, `status`, `open`, `close`.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Component, Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use clap::{Args, Parser};
use nix::unistd::geteuid;
use serde::Serialize;

use super::attach::{self, AttachmentStatus};
use super::mount::{MOUNT_FAILURE, SYSTEM_ERROR, USAGE};
use super::output::{Failure, OutputArgs, complain, iec, print_json, print_line, report};
use super::source::image_of;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::chain::{self, Merging};
use crate::formats::{OpenOptions, snapshot};
use crate::fuse::control::{Answer, Connection, MountStatus, Request};
use crate::fuse::crew::Crew;
use crate::fuse::mounts::{self, MountEntry};
use crate::fuse::options::scratch_dir;
use crate::names::Name;
use crate::storage::Access;
use crate::storage::file::HostFs;

/// How long after unmounting to wait before looking whether the file system is mounted elsewhere.
const GLANCE: Duration = Duration::from_millis(20);
/// How long after unmounting the kernel may take to end the session.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a lazy unmount waits for images to be flushed before it goes on without them.
const LAZY: Duration = Duration::from_secs(5);
/// How long a daemon may take to be found and asked, besides the time that its answer may take.
const CALL: Duration = Duration::from_secs(5);

/// Seconds that images may take to be flushed, and then to be closed.
const TIMEOUT: u64 = 60;

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
    #[arg(required_unless_present = "all", value_name = "DIR")]
    mountpoints: Vec<PathBuf>,
    /// Every mount of this user, but those that `attach` made.
    #[arg(long, conflicts_with = "mountpoints")]
    all: bool,
    /// Detach the mount now, even if it is in use, and do not wait for its users.
    #[arg(long, short)]
    lazy: bool,
    /// How long images may take to be flushed, and then to be closed; those that take longer are named.
    #[arg(long, value_name = "SECONDS", default_value_t = TIMEOUT)]
    timeout: u64,
    #[command(flatten)]
    output: OutputArgs,
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
    /// How long images may take to be flushed; those that take longer are named.
    #[arg(long, value_name = "SECONDS", default_value_t = TIMEOUT)]
    timeout: u64,
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
    /// Show their partitions as files, too; also of an image that is there already.
    #[arg(long)]
    partitions: bool,
    /// Do not print the flat files' names.
    #[arg(long, short)]
    quiet: bool,
    /// Leave the images as they are: what is written goes to scratch files in DIR [default: $TMPDIR or
    /// /var/tmp], and vanishes when they are closed, unless `close --commit` keeps it.
    #[arg(long, value_name = "DIR", num_args = 0..=1, require_equals = true)]
    nonpersistent: Option<Option<OsString>>,
    #[command(flatten)]
    output: OutputArgs,
}

/// Arguments of `flatdisk close`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  Try something on a disk, and keep it, or not:
    flatdisk open --nonpersistent server.vhdx /mnt/flat
    flatdisk close --commit /mnt/flat/server.vhdx.img
    flatdisk close /mnt/flat/server.vhdx.img
  Keep it in a child:
    flatdisk close --commit --child tried.vhdx /mnt/flat/server.vhdx.img")]
pub struct CloseArgs {
    /// Flat files in the root of a mount.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Write what was written to a nonpersistent file into its image. It goes into a child first, which is
    /// then merged: killed between, `flatdisk commit CHILD` does the rest.
    #[arg(long)]
    commit: bool,
    /// Leave it in a child of this name, and the image as it is.
    #[arg(long, value_name = "CHILD", requires = "commit")]
    child: Option<PathBuf>,
}

/// `flatdisk umount`.
pub fn umount(args: &UmountArgs) -> u8 {
    let mountpoints = match args.all {
        true => own_mounts(),
        false => Ok(args.mountpoints.clone()),
    };
    let mountpoints = match mountpoints {
        Ok(mountpoints) => mountpoints,
        Err(e) => {
            report(&e, args.output.json());
            return MOUNT_FAILURE;
        }
    };
    let patience = Duration::from_secs(args.timeout);
    let outcomes = mountpoints.iter().map(|dir| (dir, try_umount(dir, args.lazy, patience)));
    let outcomes: Vec<_> = outcomes.inspect(|(_, outcome)| complain_of_umount(outcome)).collect();
    if args.output.json()
        && let Err(e) = print_umounts(&outcomes)
    {
        complain(e);
    }
    outcomes.iter().fold(0, |all, (_, outcome)| all | umount_status(outcome))
}

/// For programs: the failure, where one mount was named and it failed, or what came of each.
fn print_umounts(outcomes: &[(&PathBuf, Result<Vec<String>>)]) -> Result<()> {
    if let [(_, Err(e))] = outcomes {
        return print_json(&Failure::from(e));
    }
    let answers = outcomes.iter().map(|(dir, outcome)| {
        serde_json::json!({
            "mountpoint": Name::from(&***dir),
            "unmounted": outcome.is_ok(),
            "failures": outcome.as_ref().ok(),
            "error": outcome.as_ref().err().map(Failure::from),
        })
    });
    print_json(&serde_json::json!({ "mounts": answers.collect::<Vec<_>>() }))
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
    umount_one(&args.mountpoint, args.lazy, TIMEOUT)
}

/// Where this user has mounted something, uppermost first; detach takes away what attach made.
fn own_mounts() -> Result<Vec<PathBuf>> {
    let private = attach::private_dir()?;
    let own = |mount: &MountEntry| {
        let user = mount.user.unwrap_or(0) == geteuid().as_raw();
        mount.is_ours() && user && !mount.target.starts_with(&private)
    };
    let mounts = mounts::mount_table()?.into_iter().rev().filter(own);
    Ok(mounts.map(|mount| mount.target).collect())
}

fn umount_one(dir: &Path, lazy: bool, timeout: u64) -> u8 {
    let outcome = try_umount(dir, lazy, Duration::from_secs(timeout));
    complain_of_umount(&outcome);
    umount_status(&outcome)
}

fn complain_of_umount(outcome: &Result<Vec<String>>) {
    match outcome {
        Ok(failures) => failures.iter().for_each(complain),
        Err(e) => complain(e),
    }
}

fn umount_status(outcome: &Result<Vec<String>>) -> u8 {
    match outcome {
        Ok(failures) if failures.is_empty() => 0,
        Ok(_) => SYSTEM_ERROR,
        Err(_) => MOUNT_FAILURE,
    }
}

/// Unmounts and returns what failed to reach its image. Images may take `patience` to be flushed, and
/// as long to be closed.
pub fn try_umount(dir: &Path, lazy: bool, patience: Duration) -> Result<Vec<String>> {
    let target = place_of(dir)?;
    let mount = mounts::mounted_at(&target)?
        .ok_or_else(|| Error::new(ErrorKind::NotFound, "not mounted").in_file(&target))?;
    if !mount.is_ours() {
        let what = format!("a mount of type {}, not of flatdisk", mount.fs_type);
        return Err(Error::invalid(what).in_file(&target).hint("umount(8) unmounts it"));
    }
    let patience = if lazy { patience.min(LAZY) } else { patience };
    let asked = Connection::to(&mount).and_then(|mut daemon| {
        let flushed = daemon.ask(&Request::Leave { patience })?;
        Ok((daemon, flushed))
    });
    let (mut daemon, flushed) = match asked {
        Ok(asked) => asked,
        Err(e) if e.kind() == ErrorKind::NotFound => return unmount_without_daemon(&mount, lazy),
        // Whatever is the matter with the daemon, the mount can be taken away.
        Err(e) if lazy && e.kind() != ErrorKind::Denied => {
            mounts::unmount(&target, true)?;
            return Ok(vec![e.to_string()]);
        }
        Err(e) => return Err(e),
    };
    mounts::unmount(&target, lazy).map_err(|e| match flushed.errors.first() {
        // What hangs is what keeps the mount in use.
        Some(error) => e.hint(format!("{error}; --lazy unmounts all the same")),
        None => e,
    })?;
    if lazy {
        return Ok(flushed.errors);
    }
    let mut failures = flushed.errors;
    match wait_for_end(&mut daemon, &mount, patience)? {
        End::Closed(answer) => {
            let new = answer.errors.into_iter().filter(|failure| !failures.contains(failure));
            let new: Vec<_> = new.collect();
            failures.extend(new);
            daemon.end();
        }
        End::MountedElsewhere(place) => {
            let waits = "not waiting for that";
            let target = target.display();
            complain(format_args!("{target}: unmounted here, but still mounted {place}; {waits}"));
        }
        End::Late(images) => {
            let seconds = patience.as_secs();
            let late = images.iter().map(|image| {
                let image = image.display();
                format!("{image}: unmounted, but not closed within {seconds} s; its daemon goes on")
            });
            failures.extend(late);
        }
    }
    Ok(failures)
}

/// Unmounts what no daemon serves, or one that cannot be asked.
fn unmount_without_daemon(mount: &MountEntry, lazy: bool) -> Result<Vec<String>> {
    let target = &mount.target;
    // A dead daemon's mount nobody can use any more. Another user's could make the look into it hang.
    let own = mount.user.is_none_or(|user| user == geteuid().as_raw());
    let dead = own && mounts::is_dead(target);
    mounts::unmount(target, lazy || dead)?;
    if !dead {
        let silent = "its daemon does not listen; not waiting for images to be closed";
        complain(format_args!("{}: {silent}", target.display()));
    }
    Ok(Vec::new())
}

/// How waiting for a daemon ends.
enum End {
    /// Every image is closed.
    Closed(Answer),
    /// The file system is mounted here, too, which can go on for ever.
    MountedElsewhere(String),
    /// These images were not closed in time.
    Late(Vec<PathBuf>),
}

/// Waits until the daemon of an unmounted `mount` has closed its images, for `patience` at most.
fn wait_for_end(daemon: &mut Connection, mount: &MountEntry, patience: Duration) -> Result<End> {
    if let Some(answer) = daemon.answer_within(GLANCE)? {
        return Ok(End::Closed(answer));
    }
    // When the mount is gone everywhere, a new one may have its device number.
    if let Some(place) = mounts::elsewhere(&mount.device)?
        && ending(daemon, mount).is_none()
    {
        return Ok(End::MountedElsewhere(place));
    }
    // What holds a file system without mounting it where that can be seen (another file system laid
    // over it, a namespace of another user) shows by the session not ending.
    let begun = Instant::now();
    loop {
        if let Some(answer) = daemon.answer_within(PATIENCE)? {
            return Ok(End::Closed(answer));
        }
        match ending(daemon, mount) {
            None => {
                let place = "where it cannot be seen from here".to_owned();
                return Ok(End::MountedElsewhere(place));
            }
            Some(images) if begun.elapsed() >= patience => return Ok(End::Late(images)),
            Some(_) => {}
        }
    }
}

/// Which images a mount's daemon is still closing because the kernel has ended the session, if it has;
/// none if the daemon is gone.
fn ending(daemon: &Connection, mount: &MountEntry) -> Option<Vec<PathBuf>> {
    let Ok(mut second) = Connection::to(mount) else { return Some(Vec::new()) };
    // The device number may belong to another mount already.
    if second.process() != daemon.process() {
        return Some(Vec::new());
    }
    match second.ask(&Request::Status).ok().and_then(|answer| answer.status) {
        Some(status) => {
            status.ending.then(|| status.images.into_iter().map(|image| image.image).collect())
        }
        None => Some(Vec::new()),
    }
}

/// Where `path` is, without a look into a mount of ours, which may not answer.
fn place_of(path: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(path).map_err(|e| Error::io("find", &e).in_file(path))?;
    // After a symlink `..` would lead elsewhere than its text says.
    let climbs = absolute.components().any(|part| part == Component::ParentDir);
    let table = mounts::mount_table()?;
    let covers = |mount: &MountEntry| mount.is_ours() && absolute.starts_with(&mount.target);
    if !climbs && table.iter().any(covers) { Ok(absolute) } else { mounts::absolute(path) }
}

/// The mount that `path` lies in, by the mount table alone.
fn mount_of(path: &Path) -> Result<MountEntry> {
    let absolute = place_of(path)?;
    let mount = mounts::mount_table()?
        .into_iter()
        .filter(|mount| absolute.starts_with(&mount.target))
        .max_by_key(|mount| mount.target.components().count());
    mount
        .filter(MountEntry::is_ours)
        .ok_or_else(|| Error::invalid("not in a mount of flatdisk").in_file(path))
}

/// The mounts of `paths`, or all, each once.
fn mounts_of(paths: &[PathBuf]) -> Result<Vec<MountEntry>> {
    let mounts: Vec<_> = match paths {
        [] => mounts::mount_table()?.into_iter().filter(MountEntry::is_ours).collect(),
        paths => paths.iter().map(|path| mount_of(path)).collect::<Result<_>>()?,
    };
    let mut found: Vec<MountEntry> = Vec::new();
    for mount in mounts {
        if found.iter().all(|known| known.device != mount.device) {
            found.push(mount);
        }
    }
    Ok(found)
}

/// Asks the daemons of the mounts of `paths`, or of all that this user may speak to, all at once: one
/// that does not answer keeps nobody waiting for longer than `patience` and the time to call it.
fn ask_all(
    paths: &[PathBuf],
    patience: Duration,
    request: fn(Duration) -> Request,
) -> Result<Vec<(MountEntry, Result<Answer>)>> {
    let crew = Crew::start(mounts_of(paths)?, move |mount: &MountEntry| {
        Connection::to(mount)?.ask(&request(patience))
    });
    crew.wait(patience + CALL);
    let answers = crew.end().into_iter().map(|(mount, answer)| {
        let silent = || Err(Error::new(ErrorKind::Io, "does not answer").in_file(&mount.target));
        let answer = answer.unwrap_or_else(silent);
        (mount, answer)
    });
    let mut answers: Vec<_> = answers.collect();
    if paths.is_empty() && answers.iter().any(|(_, answer)| answer.is_err()) {
        // Of those that nobody named, the dead, other users', and such as are gone by now do not count.
        let now = mounts::mount_table()?;
        let counts = |mount: &MountEntry, e: &Error| {
            let missing = matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Denied);
            !missing && now.contains(mount)
        };
        answers.retain(|(mount, answer)| answer.as_ref().err().is_none_or(|e| counts(mount, e)));
    }
    Ok(answers)
}

/// Prints a daemon's complaints and returns the exit status they make.
fn complain_of(answer: &Answer) -> u8 {
    answer.errors.iter().for_each(complain);
    u8::from(!answer.errors.is_empty())
}

/// `flatdisk sync`.
pub fn sync(args: &SyncArgs) -> Result<u8> {
    let mut status = 0;
    let patience = Duration::from_secs(args.timeout);
    for (_, answer) in ask_all(&args.paths, patience, |patience| Request::Sync { patience })? {
        match answer {
            Ok(answer) => status |= complain_of(&answer),
            Err(e) => {
                complain(e);
                status = 1;
            }
        }
    }
    Ok(status)
}

/// `flatdisk status`.
pub fn status(args: &StatusArgs) -> Result<u8> {
    #[derive(Serialize)]
    struct Silent {
        #[serde(serialize_with = "crate::names::serialize")]
        mountpoint: PathBuf,
        error: String,
    }
    #[derive(Serialize)]
    struct Mounts {
        mounts: Vec<MountStatus>,
        /// Mounts whose daemon does not answer.
        not_answering: Vec<Silent>,
        attachments: Vec<AttachmentStatus>,
    }
    let attachments = match args.paths.is_empty() {
        true => attach::attachments()?,
        false => Vec::new(),
    };
    let (mut mounts, mut not_answering) = (Vec::new(), Vec::new());
    for (mount, answer) in ask_all(&args.paths, Duration::ZERO, |_| Request::Status)? {
        match answer {
            Ok(answer) => mounts.extend(answer.status),
            Err(e) => {
                complain(&e);
                not_answering.push(Silent { mountpoint: mount.target, error: e.to_string() });
            }
        }
    }
    let status = u8::from(!not_answering.is_empty());
    if args.output.json() {
        print_json(&Mounts { mounts, not_answering, attachments })?;
        return Ok(status);
    }
    for mount in &mounts {
        print_mount(mount)?;
    }
    attachments.iter().try_for_each(attach::print)?;
    if mounts.is_empty() && attachments.is_empty() && not_answering.is_empty() {
        print_line("nothing is mounted")?;
    }
    Ok(status)
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
        if let Some(seconds) = image.silent_seconds {
            state += &format!(", has not answered for {seconds} s");
        }
        if image.readers + image.writers == 0 && image.throw_away.is_none() {
            let state = state.trim_start_matches(", ");
            print_line(&format!("  {}: {state}", image.image.display()))?;
            continue;
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
    let throw_away = match &args.nonpersistent {
        Some(dir) => {
            let dir = scratch_dir(dir.as_deref())?;
            let absolute = std::path::absolute(&dir);
            Some(Name(absolute.map_err(|e| Error::io("open", &e).in_file(&dir))?))
        }
        None => None,
    };
    let request = Request::Open { images, partitions: args.partitions, throw_away };
    let answer = daemon.ask(&request)?;
    if args.output.json() {
        print_json(&serde_json::json!({ "files": answer.names }))?;
    } else if !args.quiet {
        answer.names.iter().try_for_each(|name| print_line(&name.display().to_string()))?;
    }
    Ok(complain_of(&answer))
}

/// `flatdisk close`.
pub fn close(args: &CloseArgs) -> Result<u8> {
    let mut status = 0;
    if args.commit && args.files.len() > 1 && args.child.is_some() {
        return Err(Error::invalid("one child can hold what was written to one file only"));
    }
    for file in &args.files {
        if args.commit {
            status |= commit(file, args.child.as_deref())?;
            continue;
        }
        let mount = mount_of(file)?;
        let absolute = place_of(file)?;
        let name = absolute.strip_prefix(&mount.target).unwrap_or(&absolute).to_owned();
        let mut daemon = Connection::to(&mount)?;
        let request = Request::Close { names: vec![Name(name)], keep: None };
        status |= complain_of(&daemon.ask(&request)?);
    }
    Ok(status)
}

/// Closes a flat file, and keeps what was written to its throw-away layer: in `child`, or in its image.
fn commit(file: &Path, child: Option<&Path>) -> Result<u8> {
    let image = image_of(file)?;
    let mount = mount_of(file)?;
    let absolute = place_of(file)?;
    let name = absolute.strip_prefix(&mount.target).unwrap_or(&absolute).to_owned();
    let kept = match child {
        Some(child) => {
            std::path::absolute(child).map_err(|e| Error::io("open", &e).in_file(child))?
        }
        // Always the same name, so that what a killed program left of it goes with the next attempt.
        None => snapshot::frozen_name(&image, "written")?,
    };
    if child.is_none() && kept.symlink_metadata().is_ok() {
        let what = "what was written to a throw-away layer before is still there";
        let hint = format!("`flatdisk commit {}` merges it, or --child keeps this", kept.display());
        return Err(Error::new(ErrorKind::Exists, what).in_file(&kept).hint(hint));
    }
    let request = Request::Close { names: vec![Name(name)], keep: Some(Name(kept.clone())) };
    let status = complain_of(&Connection::to(&mount)?.ask(&request)?);
    if status != 0 || child.is_some() {
        return Ok(status);
    }
    let options = OpenOptions::new(Access::Read);
    let hint = || format!("`flatdisk commit {}` does it later", kept.display());
    chain::merge(&HostFs::shared(), &kept, &options, Merging::default(), &())
        .map_err(|e| e.hint(hint()))?;
    Ok(0)
}
