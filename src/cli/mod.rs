//! The command line.
//!
//! The program is called by several names: `flatdisk`, and as the helpers of mount(8) and umount(8)
//! `mount.flatdisk`, `mount.fuse.flatdisk`, `umount.flatdisk`, `umount.fuse.flatdisk` and
//! `umount.fuse`. mount.fuse3 calls it `flatdisk SOURCE MOUNTPOINT -o OPTIONS`, without a command.
//!
//! # Files
//!
//! - `attach`: `attach` and `detach`;
//! - `browse`: `browse`;
//! - `bytes`: `measure`, `compare`, `hash` and `write`, and the bytes that `cat` prints;
//! - `chain`: `map`, `commit` and `rebase`;
//! - `compact`: `compact`;
//! - `convert`: `convert`;
//! - `delta`: `delta` and `apply`;
//! - `files`: `ls`, `cat` and `cp`;
//! - `holders`: who has a file open, for messages that say "in use";
//! - `images`: `create`;
//! - `inspect`: `info` and `check`;
//! - `install`: `install-helpers`;
//! - `layout`: how the blocks of an image lie, and how small its disk may become;
//! - `lifecycle`: `flatten` and `tree`;
//! - `log_sink`: where log lines go;
//! - `meta`: `meta`;
//! - `mount`: `mount`, also as mount(8) and mount.fuse3 call it;
//! - `output`: what commands print;
//! - `overview`: the list of commands in `flatdisk --help`, in groups of what people come for;
//! - `pages`: `completions` and `man`;
//! - `picture`: `map --draw` and `map --svg`;
//! - `process`: what the process asks of the system before it does anything;
//! - `progress`: progress bars, and signals that end long work;
//! - `rename`: `rename` and `delete`;
//! - `running`: commands that talk to running daemons;
//! - `size`: `resize`;
//! - `snapshot`: `snapshot`;
//! - `source`: images as commands are given them;
//! - `spec`: what a new image is to be;
//! - `structures`: `info --structures`;
//! - `trim`: `compact --trim`;
//! - `volumes`: `volumes`;
//! - `work`: what every command that works for long is told about what it prints.

pub mod attach;
pub mod browse;
pub mod bytes;
pub mod chain;
pub mod compact;
pub mod convert;
pub mod delta;
pub mod files;
mod holders;
pub mod images;
pub mod inspect;
pub mod install;
mod layout;
pub mod lifecycle;
pub mod log_sink;
pub mod meta;
pub mod mount;
pub mod output;
mod overview;
pub mod pages;
mod picture;
mod process;
pub mod progress;
pub mod rename;
pub mod running;
pub mod size;
pub mod snapshot;
pub mod source;
pub mod spec;
mod structures;
mod trim;
pub mod volumes;
pub mod work;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::error::Error;

const HELP: &str = "\
Examples:
  Show every image of a folder as a flat file:
    flatdisk mount /srv/images /mnt/flat
  Mount a file system inside one of them:
    losetup --direct-io=on -Pf --show /mnt/flat/server.vhdx.img
    mount /dev/loop0p2 /mnt/server
  Unmount, and wait until every image is closed:
    flatdisk umount /mnt/flat

Exit status:
  0   success
  1   failure, or wrong usage
  mount, umount and check have more; their own pages list them.

Environment:
  FLATDISK_LOG     what is logged: error, warn, info or debug
  NO_COLOR         no colours in help
  XDG_RUNTIME_DIR  where a user's daemons have their sockets

Files:
  /run/flatdisk              sockets through which commands reach the daemons of root
  $XDG_RUNTIME_DIR/flatdisk  the same of a user
  /etc/flatdisk/NAME.conf    settings of the service flatdisk@NAME
  ~/.config/flatdisk/        the same of user services
  /etc/fuse.conf             whether users may let others into their mounts";

/// Mounts VHD, VHDX and VMDK disk images as flat raw files, readable and writable.
///
/// A daemon mounts a directory in which every image appears as a flat raw file, for any program that
/// works with raw disks: losetup, mount, fdisk, dd, qemu-img, file managers. Reading never changes an
/// image. The other commands look at images, make, check and repair them, and merge chains of them.
#[derive(Debug, Parser)]
#[command(name = "flatdisk", version, about, after_long_help = HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show images as flat files in a directory.
    ///
    /// Below MOUNTPOINT every image appears as a flat raw file: server.vhdx as server.vhdx.img. A
    /// directory is mirrored with its folders, and shows only images. One that cannot be opened shows
    /// as a text that says why. Nothing is written to an image before a program writes to its file.
    ///
    /// The command returns when the mount is live, and the daemon goes on in the background.
    Mount(mount::MountArgs),
    /// Unmount, and wait until every image is closed.
    ///
    /// umount(8) does the same where `flatdisk install-helpers` was run; the system call alone does not
    /// wait for the daemon. The mount of a daemon that died is cleared away.
    #[command(alias = "unmount")]
    Umount(running::UmountArgs),
    /// Show more images in the root of a mount.
    Open(running::OpenArgs),
    /// Take images out of the root of a mount.
    Close(running::CloseArgs),
    /// Make everything written to flat files durable.
    Sync(running::SyncArgs),
    /// Show mounts and the images in use.
    Status(running::StatusArgs),
    /// Make an image a loop device, and mount what is on it.
    Attach(attach::AttachArgs),
    /// Undo attach, and wait until the image is closed.
    Detach(attach::DetachArgs),
    /// Show format, sizes, ids and parent of an image.
    Info(inspect::InfoArgs),
    /// Check every table of an image.
    Check(inspect::CheckArgs),
    /// Make a new image, or a child of another one.
    Create(images::CreateArgs),
    /// Make a virtual disk larger or smaller, in place.
    ///
    /// All kinds that can be written: fixed and dynamic ones, split ones, and children that nothing stands
    /// on (not of VMDK). Killed at any moment, the command leaves the old size or the new one. Partition
    /// tables and file systems on the disk stay as they are.
    Resize(size::ResizeArgs),
    /// Give unused space of images back to the host, in place.
    ///
    /// Blocks that read as zeroes are given up, the last blocks move into free places, and the file gets
    /// short. What the guest sees stays, and so do children. Interrupted or killed, the command leaves
    /// a good image, and a second run goes on. Of fixed and flat images zeroes become holes of the
    /// host's file.
    Compact(compact::CompactArgs),
    /// Make any image out of any other: other formats, raw disks, pipes, devices.
    Convert(Box<convert::ConvertArgs>),
    /// Say how large an image of another format would be.
    Measure(bytes::MeasureArgs),
    /// Compare two disks, whatever their formats.
    Compare(bytes::CompareArgs),
    /// Print the digest of a disk.
    Hash(bytes::HashArgs),
    /// Write bytes into a disk.
    Write(bytes::WriteArgs),
    /// List what every part of a disk is, and which image holds it.
    ///
    /// Runs of stored data, of zeroes, and of what no image stores, in the order of the disk. With
    /// --json they are an array with the names of `qemu-img map --output=json` (`offset` and `filename` say
    /// where data lies on the host, and where it goes on elsewhere a new run begins), and `state` and
    /// `image` besides.
    Map(chain::MapArgs),
    /// List the partitions, file systems and other contents of disks.
    ///
    /// Partition tables (GPT from either copy, MBR with logical partitions), and in every partition, or
    /// on a disk without a table, the file system or container with label and UUID.
    Volumes(volumes::VolumesArgs),
    /// List a directory of a file system in an image.
    ///
    /// ext2, ext3, ext4, NTFS and FAT are read without mounting anything, without privileges, and
    /// without changing a byte.
    Ls(files::LsArgs),
    /// Print a file of a file system in an image, or the bytes of a disk or partition.
    Cat(files::CatArgs),
    /// Copy files and directories out of an image.
    Cp(files::CpArgs),
    /// Merge a child into its parent.
    Commit(chain::CommitArgs),
    /// Give a child another parent.
    Rebase(chain::RebaseArgs),
    /// Make a child stand alone.
    ///
    /// What its parents hold is copied into it, and the link goes. The child shows the same all the
    /// time; interrupted or killed, it is still a child, and a second run goes on.
    Flatten(lifecycle::FlattenArgs),
    /// Keep an image as it is, and go on in a child.
    ///
    /// The image gets another name, and a new child of it, which stores what is written from then on,
    /// takes its name. All formats, whatever the size of the disk.
    Snapshot(snapshot::SnapshotArgs),
    /// Show and set what an image says about itself: ids, creator, hardware.
    ///
    /// All that is set at once comes in one step, whatever interrupts it. What the disk holds stays.
    Meta(meta::MetaArgs),
    /// Give an image another name, with all its files.
    Rename(rename::RenameArgs),
    /// Remove an image, with all its files.
    Delete(rename::DeleteArgs),
    /// Show which images of a folder stand on which.
    Tree(lifecycle::TreeArgs),
    /// Write what changed after an ancestor, for backup.
    ///
    /// The delta names both images by their identities, and its parts have checksums. `apply` puts it onto a
    /// copy of the ancestor, which is the image then, so that the next delta fits it.
    Delta(delta::DeltaArgs),
    /// Put what `delta` wrote onto a copy of the ancestor.
    Apply(delta::ApplyArgs),
    /// Mount an image for the desktop, and open its folder.
    Browse(browse::BrowseArgs),
    /// Install the program, its mount helpers, man pages, completions, units and desktop files.
    InstallHelpers(install::InstallArgs),
    /// Print completions for a shell.
    Completions(pages::CompletionsArgs),
    /// Write the man pages into a directory.
    Man(pages::ManArgs),
}

/// Runs the program.
pub fn run() -> ExitCode {
    process::prepare();
    let mut arguments: Vec<OsString> = std::env::args_os().collect();
    let name = arguments.first().map(Path::new).and_then(Path::file_name).unwrap_or_default();
    let status = match name.to_str() {
        Some("mount.flatdisk" | "mount.fuse.flatdisk") => {
            parse(&arguments).map(|args| mount::helper(&args))
        }
        Some("umount.flatdisk" | "umount.fuse.flatdisk") => {
            parse(&arguments).map(|args| running::umount_helper(&args))
        }
        Some("umount.fuse") => parse(&arguments).map(|args| running::umount_any_fuse(&args)),
        _ => {
            if called_by_mount_fuse(&arguments) {
                arguments.insert(1, "mount".into());
            }
            run_cli(&arguments)
        }
    };
    ExitCode::from(status.unwrap_or_else(|status| status))
}

/// Runs `flatdisk` with its arguments.
fn run_cli(arguments: &[OsString]) -> Result<u8, u8> {
    let matches =
        overview::command().try_get_matches_from(arguments).map_err(|e| refuse(&e, arguments))?;
    let cli = Cli::from_arg_matches(&matches).map_err(|e| refuse(&e, arguments))?;
    let json = matches.subcommand().is_some_and(|(_, command)| output::wants_json(command));
    Ok(run_command(&cli.command, json))
}

/// Prints why arguments are wrong, or what they ask for, and returns the exit status.
fn refuse(error: &clap::Error, arguments: &[OsString]) -> u8 {
    let _ = error.print();
    if error.use_stderr() && output::asks_for_json(arguments) {
        let said = error.to_string();
        let said = said.lines().next().unwrap_or_default();
        let what = said.strip_prefix("error: ").unwrap_or(said).to_owned();
        let _ = output::print_json(&output::Failure::from(&Error::invalid(what)));
    }
    if let Some(advice) = advice(error, arguments) {
        eprintln!("\n  tip: {advice}");
    }
    u8::from(error.use_stderr())
}

/// What to type instead, where an image or a folder stands in the place of a command or of a mount point.
fn advice(error: &clap::Error, arguments: &[OsString]) -> Option<&'static str> {
    let first = arguments.get(1)?;
    match error.kind() {
        ErrorKind::InvalidSubcommand if Path::new(first).exists() => Some(
            "`flatdisk mount SOURCE MOUNTPOINT` shows images as flat files, `flatdisk info IMAGE` tells \
             what one is",
        ),
        ErrorKind::MissingRequiredArgument if first == "mount" => Some(
            "the mount point comes last and is an existing directory: mkdir flat; \
                  flatdisk mount server.vhdx flat",
        ),
        _ => None,
    }
}

/// Parses arguments; for wrong ones prints why and returns the exit status 1, which mount(8) wants
/// where other programs use 2.
fn parse<P: Parser>(arguments: &[OsString]) -> Result<P, u8> {
    P::try_parse_from(arguments).map_err(|e| {
        let _ = e.print();
        u8::from(e.use_stderr())
    })
}

/// Whether the arguments are those of mount.fuse3: a source instead of a command, and options.
fn called_by_mount_fuse(arguments: &[OsString]) -> bool {
    let Some(first) = arguments.get(1).map(OsString::as_os_str) else { return false };
    let command = Cli::command();
    let is_command = first.to_str().is_some_and(|first| command.find_subcommand(first).is_some());
    !is_command
        && !first.as_encoded_bytes().starts_with(b"-")
        && (first.as_encoded_bytes().contains(&b'/')
            || arguments.iter().any(|a| a == OsStr::new("-o")))
}

fn run_command(command: &Command, json: bool) -> u8 {
    let done = match command {
        Command::Mount(args) => return mount::mount(args),
        Command::Umount(args) => return running::umount(args),
        Command::Open(args) => running::open(args),
        Command::Close(args) => running::close(args),
        Command::Sync(args) => running::sync(args),
        Command::Status(args) => running::status(args),
        Command::Attach(args) => attach::attach(args),
        Command::Detach(args) => attach::detach(args),
        Command::Info(args) => inspect::info(args),
        Command::Check(args) => inspect::check(args),
        Command::Create(args) => images::create(args),
        Command::Resize(args) => size::resize(args),
        Command::Compact(args) => compact::compact(args),
        Command::Convert(args) => convert::convert(args),
        Command::Measure(args) => bytes::measure(args),
        Command::Compare(args) => return bytes::compare(args),
        Command::Hash(args) => bytes::hash(args),
        Command::Write(args) => bytes::write(args),
        Command::Map(args) => chain::map(args),
        Command::Volumes(args) => volumes::volumes(args),
        Command::Ls(args) => files::ls(args),
        Command::Cat(args) => files::cat(args),
        Command::Cp(args) => files::cp(args),
        Command::Commit(args) => chain::commit(args),
        Command::Rebase(args) => chain::rebase(args),
        Command::Flatten(args) => lifecycle::flatten(args),
        Command::Snapshot(args) => snapshot::snapshot(args),
        Command::Meta(args) => meta::meta(args),
        Command::Rename(args) => rename::rename(args),
        Command::Delete(args) => rename::delete(args),
        Command::Tree(args) => lifecycle::tree(args),
        Command::Delta(args) => delta::delta(args),
        Command::Apply(args) => delta::apply(args),
        Command::Browse(args) => return browse::browse(args),
        Command::InstallHelpers(args) => install::install(args),
        Command::Completions(args) => pages::completions(args),
        Command::Man(args) => pages::man(args),
    };
    done.unwrap_or_else(|e| {
        output::report(&e, json);
        1
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_are_consistent() {
        Cli::command().debug_assert();
        mount::HelperArgs::command().debug_assert();
        running::UmountHelperArgs::command().debug_assert();
    }

    #[test]
    fn mount_fuse_calls_without_a_command() {
        let called = |line: &str| {
            let arguments: Vec<_> = line.split(' ').map(OsString::from).collect();
            called_by_mount_fuse(&arguments)
        };
        assert!(called("flatdisk /srv/images /mnt -o rw,nosuid"));
        assert!(called("flatdisk images /mnt -o rw"));
        assert!(!called("flatdisk mount /srv/images /mnt -o rw"));
        assert!(!called("flatdisk umount /mnt"));
        assert!(!called("flatdisk inof x.vhd"));
        assert!(!called("flatdisk --version"));
        assert!(!called("flatdisk"));
    }

    #[test]
    fn helpers_take_their_arguments_in_any_order() {
        for line in [
            "mount.flatdisk /srv/images /mnt -o rw,nosuid",
            "mount.flatdisk /srv/images /mnt -s -n -v -f -o ro -t fuse.flatdisk -N /x",
            "mount.flatdisk -sfnv -o ro /srv/images /mnt",
            "mount.flatdisk -o ro /srv/images -v /mnt -o noatime",
        ] {
            mount::HelperArgs::try_parse_from(line.split(' ')).expect(line);
        }
        for line in ["umount.flatdisk /mnt", "umount.flatdisk /mnt -flnrv -t fuse.flatdisk"] {
            running::UmountHelperArgs::try_parse_from(line.split(' ')).expect(line);
        }
    }
}
