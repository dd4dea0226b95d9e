//! `attach` and `detach`: an image as a loop device, in one step.
//!
//! ```text
//! attachment   the steps, and undoing them
//! slot         what is recorded of an attached image, and what has become of it
//! loop_device  the kernel's loop devices
//! file_system  mounting what is on the device
//! programs     mounting without a device, by file systems that are programs
//! ```
//!
//! # Files
//!
//! - `attachment`: attaching and detaching one image, step by step;
//! - `file_system`: file systems on a loop device;
//! - `loop_device`: loop devices, through the kernel's own interface (loop(4));
//! - `programs`: file systems that are programs;
//! - `slot`: what is known of an attached image while no process of `attach` runs.

mod attachment;
pub(super) mod file_system;
mod loop_device;
mod programs;
mod slot;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Args;
use nix::unistd::geteuid;
use serde::Serialize;

use super::mount::SYSTEM_ERROR;
use super::output::{OutputArgs, complain, iec, print_json, print_line};
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::mounts;
use crate::fuse::options::MountOptions;
use attachment::{Attachment, Wanted, directory};
use file_system::How;
use loop_device::LoopDevice;
use slot::{Record, Slot, State, slots_dir};

/// Arguments of `flatdisk attach`.
#[derive(Debug, Args)]
pub struct AttachArgs {
    /// The image.
    #[arg(required_unless_present_any = ["list", "rescan"])]
    image: Option<PathBuf>,
    /// Let nothing be written, and open the image read-only.
    #[arg(long, short)]
    read_only: bool,
    /// What is written vanishes with the device; the image stays as it is.
    #[arg(long)]
    nonpersistent: bool,
    /// Mount the disk's file system here, by mount(8).
    #[arg(long, value_name = "DIR")]
    mount: Option<PathBuf>,
    /// Which partition to mount [default: the only one with a file system].
    #[arg(long, value_name = "NUMBER", requires = "mount")]
    partition: Option<u32>,
    /// Mount by a program (fuse2fs, ntfs-3g, squashfuse and the like), without a loop device: for users
    /// who are not root, and for kernels without the driver.
    #[arg(long, requires = "mount")]
    fuse: bool,
    /// Let the device go through the flat file, even where the disk lies in one piece in the image's file (fixed
    /// and flat images), which the device could use by itself.
    #[arg(long)]
    no_direct: bool,
    /// Type of the file system to mount [default: mount(8) finds out].
    #[arg(long, short = 't', value_name = "TYPE", requires = "mount")]
    fs_type: Option<OsString>,
    /// Options for the file system to mount.
    #[arg(long, value_name = "OPTIONS", requires = "mount", allow_hyphen_values = true)]
    mount_options: Option<OsString>,
    /// Options of `flatdisk mount`, such as cache=64M or force.
    #[arg(short = 'o', value_name = "OPTIONS", allow_hyphen_values = true)]
    options: Vec<OsString>,
    /// List the attached images.
    #[arg(long, short, conflicts_with = "image")]
    list: bool,
    /// Read the partition table of a loop device again, and make its partitions' nodes where nobody else
    /// does.
    #[arg(long, value_name = "DEVICE", conflicts_with_all = ["image", "list"])]
    rescan: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
}

/// Arguments of `flatdisk detach`.
#[derive(Debug, Args)]
pub struct DetachArgs {
    /// The loop device, the image, or the directory that attach mounted on.
    #[arg(required_unless_present = "all", value_name = "DEVICE|IMAGE|DIR")]
    targets: Vec<PathBuf>,
    /// Everything that this user attached.
    #[arg(long, conflicts_with = "targets")]
    all: bool,
}

/// An attached image, as `attach --list --json` and `status --json` show it.
#[derive(Debug, Serialize)]
pub struct AttachmentStatus {
    /// Node of the loop device; null if there is none.
    device: Option<PathBuf>,
    /// The image.
    #[serde(serialize_with = "crate::names::serialize")]
    image: PathBuf,
    /// What has become of it.
    state: State,
    /// Whether the device refuses writes.
    read_only: bool,
    /// Whether what is written vanishes.
    nonpersistent: bool,
    /// Whether the device is bound to the image's own file.
    direct: bool,
    /// The program that mounted it, where no loop device is in use.
    program: Option<String>,
    /// Where attach mounted a file system of the disk.
    #[serde(serialize_with = "crate::names::some::serialize")]
    mountpoint: Option<PathBuf>,
    /// The partitions that the kernel knows.
    partitions: Vec<PartitionStatus>,
}

#[derive(Debug, Serialize)]
struct PartitionStatus {
    number: u32,
    device: PathBuf,
    /// In bytes.
    size: u64,
}

/// `flatdisk attach`.
pub fn attach(args: &AttachArgs) -> Result<u8> {
    if let Some(device) = &args.rescan {
        return rescan(device, args.output);
    }
    let Some(image) = &args.image else { return list(args.output) };
    let mut options = MountOptions::default();
    args.options.iter().try_for_each(|list| options.apply(list, false))?;
    let how = How {
        read_only: args.read_only,
        fs_type: args.fs_type.as_deref(),
        options: args.mount_options.as_deref(),
    };
    let file_system = args.mount.as_deref().map(directory).transpose()?;
    let wanted = Wanted {
        options: &args.options,
        suffix: options.suffix,
        by_program: args.fuse,
        direct: !args.no_direct,
        file_system: file_system.map(|dir| (dir, args.partition, how)),
    };
    let read_only = args.read_only || options.read_only;
    let nonpersistent = args.nonpersistent || options.nonpersistent.is_some();
    let attached = build(image, &wanted, read_only, nonpersistent)?;
    if args.output.json() {
        print_json(&status_of(attached))?;
        return Ok(0);
    }
    let (_, record) = attached;
    let place = record.device.or(record.mountpoint).unwrap_or_default();
    print_line(&place.display().to_string())?;
    Ok(0)
}

/// Attaches an image.
fn build(
    image: &Path,
    wanted: &Wanted<'_>,
    read_only: bool,
    nonpersistent: bool,
) -> Result<(Slot, Record)> {
    if !wanted.by_program {
        require_root(image)?;
    }
    let failed = |e: std::io::Error| Error::io("open", &e).in_file(image);
    let image = std::fs::canonicalize(image).map_err(failed)?;
    let record = Record {
        image: image.clone(),
        device: None,
        binding_id: None,
        direct: None,
        nodes: Vec::new(),
        mountpoint: None,
        program: None,
        program_mount: None,
        read_only,
        nonpersistent,
        complete: false,
    };
    let slot = Slot::of_image(&image)?.lock().map_err(|e| e.in_file(&image))?;
    // A record alone, of before the machine was started, is no obstacle.
    let device = slot.record().and_then(|old| slot.device(&old));
    if device.is_some() || slot.mounted()?.is_some() {
        return Err(taken(&image, device));
    }
    Attachment::new(slot, record).build(wanted)
}

/// `attach --rescan`.
fn rescan(target: &Path, output: OutputArgs) -> Result<u8> {
    require_root(target)?;
    let path = mounts::absolute(target)?;
    let slot = find(&path).ok().map(|slot| slot.lock().map_err(|e| e.in_file(target)));
    let slot = slot.transpose()?;
    let recorded = slot.as_ref().and_then(|slot| Some((slot, slot.record()?)));
    let device = recorded.as_ref().and_then(|(slot, record)| slot.device(record));
    let device = device.or(LoopDevice::of_node(&path)).ok_or_else(|| not_attached(target))?;
    device.rescan()?;
    if let Some((slot, mut record)) = recorded {
        let known: Vec<_> =
            device.partitions().into_iter().map(|partition| partition.node).collect();
        let (kept, gone) = record.nodes.into_iter().partition(|node| known.contains(node));
        record.nodes = kept;
        record.nodes.extend(device.missing_nodes());
        attachment::remove_nodes(&gone);
        slot.save(&record)?;
    }
    device.make_nodes()?;
    let partitions = partitions_of(device);
    if output.json() {
        print_json(&serde_json::json!({ "device": device.node(), "partitions": partitions }))?;
        return Ok(0);
    }
    print_line(&device.node().display().to_string())?;
    partitions.iter().try_for_each(print_partition)?;
    Ok(0)
}

/// Attaches an image, for writing, as long as `work` goes on with its device.
pub(super) fn while_attached<T>(
    image: &Path,
    options: &[OsString],
    work: impl FnOnce(LoopDevice) -> Result<T>,
) -> Result<T> {
    let suffix = MountOptions::default().suffix;
    let wanted = Wanted { options, suffix, by_program: false, direct: true, file_system: None };
    let (_, record) = build(image, &wanted, false, false)?;
    let node = record.device.unwrap_or_default();
    let done = LoopDevice::of_node(&node)
        .ok_or_else(|| Error::new(ErrorKind::Failed, "the device went away").in_file(&node))
        .and_then(work);
    let detached = detach_one(&node);
    let done = done?;
    match detached? {
        0 => Ok(done),
        _ => Err(Error::new(ErrorKind::Failed, "not everything was written").in_file(image)),
    }
}

/// Says who can do what only root can, and how.
fn require_root(image: &Path) -> Result<()> {
    if geteuid().is_root() {
        return Ok(());
    }
    let hint = "other users: `flatdisk attach --fuse --mount DIR IMAGE` mounts without a device; or \
                `flatdisk mount -o allow_other IMAGE DIR`, then `udisksctl loop-setup -f DIR/IMAGE.img` \
                (allow_other needs `user_allow_other` in /etc/fuse.conf)";
    Err(Error::new(ErrorKind::Denied, "only root can attach loop devices")
        .in_file(image)
        .hint(hint))
}

fn taken(image: &Path, device: Option<LoopDevice>) -> Error {
    let device = device.map(|device| format!(" as {}", device.node().display()));
    let what = format!("attached already{}", device.unwrap_or_default());
    let hint = format!("`flatdisk detach {}` first", image.display());
    Error::new(ErrorKind::Busy, what).in_file(image).hint(hint)
}

/// `flatdisk detach`.
pub fn detach(args: &DetachArgs) -> Result<u8> {
    let mut status = 0;
    let targets = match args.all {
        true => Slot::all()?.into_iter().map(|(_, record)| record.image).collect(),
        false => args.targets.clone(),
    };
    for target in &targets {
        status |= detach_one(target).unwrap_or_else(|e| {
            complain(e);
            1
        });
    }
    Ok(status)
}

fn detach_one(target: &Path) -> Result<u8> {
    let slot = find(target)?.lock().map_err(|e| e.in_file(target))?;
    // As it is now that nobody else changes it.
    let Some(record) = slot.record() else {
        slot.remove()?;
        return Err(not_attached(target));
    };
    // A device on the host's own file has nothing to lose with the daemon.
    let safe = record.read_only || record.nonpersistent || record.direct.is_some();
    let died = mounts::is_dead(&slot.mount_dir()) && !safe;
    let image = record.image.clone();
    let failures = Attachment::new(slot, record).detach()?;
    failures.iter().for_each(complain);
    if died {
        let lost = "detached, but its daemon had died: what was not flushed by then is lost";
        complain(format_args!(
            "{}: {lost} (`flatdisk check` shows the image's state)",
            image.display()
        ));
    }
    Ok(if died || !failures.is_empty() { SYSTEM_ERROR } else { 0 })
}

fn not_attached(target: &Path) -> Error {
    Error::new(ErrorKind::NotFound, "not attached by flatdisk")
        .in_file(target)
        .hint("`flatdisk attach --list` shows what is")
}

/// The slot of a loop device, partition, image or mount point.
fn find(target: &Path) -> Result<Slot> {
    let path = mounts::absolute(target)?;
    if let Ok(slot) = Slot::of_image(&path)
        && slot.exists()
    {
        return Ok(slot);
    }
    let device = LoopDevice::of_node(&path).map(LoopDevice::node);
    let matches = |(slot, record): &(Slot, Record)| match &device {
        Some(_) => record.device == device,
        None => [Some(&record.image), record.mountpoint.as_ref(), Some(&slot.mount_dir())]
            .contains(&Some(&path)),
    };
    let mut found: Vec<_> = Slot::all()?.into_iter().filter(matches).collect();
    // Of a device that somebody else detached there may be a record yet, when another image has it.
    let bound = found.iter().position(|(slot, record)| slot.device(record).is_some());
    let first = if found.is_empty() { None } else { Some(found.swap_remove(bound.unwrap_or(0))) };
    first.map(|(slot, _)| slot).ok_or_else(|| not_attached(target))
}

/// Where the mounts are that attach makes for itself.
pub fn private_dir() -> Result<PathBuf> {
    slots_dir()
}

/// The images that this user attached.
pub fn attachments() -> Result<Vec<AttachmentStatus>> {
    Ok(Slot::all()?.into_iter().map(status_of).collect())
}

fn status_of((slot, record): (Slot, Record)) -> AttachmentStatus {
    let device = slot.device(&record);
    AttachmentStatus {
        state: slot.state(&record),
        device: device.map(LoopDevice::node),
        image: record.image,
        read_only: record.read_only,
        nonpersistent: record.nonpersistent,
        direct: record.direct.is_some(),
        program: record.program,
        mountpoint: record.mountpoint,
        partitions: device.map(partitions_of).unwrap_or_default(),
    }
}

fn partitions_of(device: LoopDevice) -> Vec<PartitionStatus> {
    let partitions = device.partitions().into_iter().map(|partition| PartitionStatus {
        number: partition.number,
        device: partition.node,
        size: partition.size,
    });
    partitions.collect()
}

fn list(output: OutputArgs) -> Result<u8> {
    #[derive(Serialize)]
    struct Attachments {
        attachments: Vec<AttachmentStatus>,
    }
    let attachments = attachments()?;
    if output.json() {
        print_json(&Attachments { attachments })?;
        return Ok(0);
    }
    if attachments.is_empty() {
        print_line("nothing is attached")?;
    }
    attachments.iter().try_for_each(print)?;
    Ok(0)
}

/// Prints an attached image for people.
pub fn print(attachment: &AttachmentStatus) -> Result<()> {
    let device = match (&attachment.device, &attachment.program) {
        (Some(device), _) => device.display().to_string(),
        (None, Some(program)) => program.clone(),
        (None, None) => "no device".to_owned(),
    };
    let mut line = format!("{device}: {}", attachment.image.display());
    if let Some(dir) = &attachment.mountpoint {
        line += &format!(", mounted on {}", dir.display());
    }
    let notes = [
        (attachment.read_only, "read-only"),
        (attachment.nonpersistent, "nonpersistent"),
        (attachment.direct, "direct"),
        (attachment.state == State::Changing, "being attached or detached"),
        (attachment.state == State::Incomplete, "incomplete: `flatdisk detach` cleans up"),
        (attachment.state == State::DaemonDied, "daemon died: `flatdisk detach` cleans up"),
        (attachment.state == State::DeviceGone, "device gone: `flatdisk detach` cleans up"),
        (attachment.state == State::MountGone, "unmounted: `flatdisk detach` cleans up"),
    ];
    for (_, note) in notes.iter().filter(|(true_here, _)| *true_here) {
        line += &format!(", {note}");
    }
    print_line(&line)?;
    attachment.partitions.iter().try_for_each(print_partition)
}

fn print_partition(partition: &PartitionStatus) -> Result<()> {
    print_line(&format!("  {}: {}", partition.device.display(), iec(partition.size)))
}
