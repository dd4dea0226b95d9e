//! `mount`, also as mount(8) and mount.fuse3 call it.
//!
//! In the background the work is done by a second process of this same program, started with the
//! same arguments and [`DAEMON`] in its environment: forking a process that has threads would be
//! unsafe. Its standard output is a pipe to the first one, which ends when it has read how the mount
//! went: a line `ready`, or an error.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use clap::{Args, Parser};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout, setsid};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::log_sink;
use super::output::{self, Failure, OutputArgs, complain, print_json};
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::daemon::{MountRequest, Prepared, check_host};
use crate::fuse::options::MountOptions;
use crate::names::Name;

/// Exit status for wrong usage, as of mount(8).
pub const USAGE: u8 = 1;
/// Exit status when the mount was undone but data may not have reached an image.
pub const SYSTEM_ERROR: u8 = 2;
/// Exit status when mounting or unmounting failed.
pub const MOUNT_FAILURE: u8 = 32;

/// In the environment of the process that serves a mount in the background.
pub const DAEMON: &str = "FLATDISK_DAEMON";

/// What the serving process writes when the mount is live.
const READY: &str = "ready";

const HELP: &str = "\
Examples:
  Every image of a folder, readable and writable:
    flatdisk mount /srv/images /mnt/flat
  One image, without any danger to it:
    flatdisk mount -o ro server.vhdx ~/flat
  What is written is thrown away:
    flatdisk mount --nonpersistent server.vhdx ~/flat

Exit status:
  0   the mount is live
  1   wrong usage, or an option that is unknown or refused
  2   in the foreground: unmounted, but not everything written reached its image
  32  the mount failed

Notes:
  A mount point need not be empty; what is in it is hidden until the mount ends.

  Users other than root mount through fusermount3, and nobody else can look in
  unless allow_other or allow_root is given and /etc/fuse.conf permits it.";

/// Arguments of `flatdisk mount`.
#[derive(Debug, Args)]
#[command(after_long_help = HELP)]
pub struct MountArgs {
    /// Images, and directories to be mirrored.
    #[arg(required = true, num_args = 1.., value_name = "SOURCE")]
    sources: Vec<PathBuf>,
    /// An existing directory.
    mountpoint: PathBuf,
    /// Stay in the foreground.
    #[arg(short, long)]
    foreground: bool,
    /// Options as in /etc/fstab, separated by commas; every long option below has its word there.
    #[arg(short = 'o', value_name = "OPTIONS", allow_hyphen_values = true)]
    options: Vec<OsString>,
    /// Say more; twice: every request.
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(flatten)]
    words: Words,
    #[command(flatten)]
    output: OutputArgs,
}

/// The options of a mount as flags. Each stands for the word of its name in `-o`.
#[derive(Debug, Default, Args)]
struct Words {
    /// Mount read-only.
    #[arg(long)]
    ro: bool,
    /// Let all users in, as far as permission bits allow [default: for root].
    #[arg(long)]
    allow_other: bool,
    /// Let root in.
    #[arg(long)]
    allow_root: bool,
    /// Owner of everything, number or name [default: the image's].
    #[arg(long, value_name = "USER")]
    uid: Option<OsString>,
    /// Group of everything, number or name [default: the image's].
    #[arg(long, value_name = "GROUP")]
    gid: Option<OsString>,
    /// Permission bits taken from files and directories, octal [default: 000].
    #[arg(long, value_name = "MASK")]
    umask: Option<OsString>,
    /// Permission bits taken from files, octal [default: 000].
    #[arg(long, value_name = "MASK")]
    fmask: Option<OsString>,
    /// Permission bits taken from directories, octal [default: 000].
    #[arg(long, value_name = "MASK")]
    dmask: Option<OsString>,
    /// Threads that read requests at a time, 1 to 64 [default: one per processor, 4 to 16].
    #[arg(long, value_name = "COUNT")]
    threads: Option<OsString>,
    /// Memory for tables of all images together, in bytes or with K, M, G [default: 32M].
    #[arg(long, value_name = "SIZE")]
    cache: Option<OsString>,
    /// Let the kernel collect small writes; errors then show at fsync and close.
    #[arg(long, overrides_with = "nowriteback")]
    writeback: bool,
    /// Write through to the image at once, which is the default.
    #[arg(long)]
    nowriteback: bool,
    /// Never let the kernel read and write flat extents by itself; by default it does where it can.
    #[arg(long)]
    nopassthrough: bool,
    /// Images stay as they are: what is written goes to scratch files in DIR [default: $TMPDIR or
    /// /var/tmp], and vanishes when the mount or the image is closed.
    #[arg(long, value_name = "DIR", num_args = 0..=1, require_equals = true)]
    nonpersistent: Option<Option<OsString>>,
    /// Show each partition, too, as a file beside its disk: disk.vhdx.p1.img beside disk.vhdx.img.
    /// Flat extents then go through the daemon, as with --nopassthrough.
    #[arg(long)]
    partitions: bool,
    /// A directory in which parents of images may lie, besides the images' own and the sources;
    /// may be given more than once.
    #[arg(long, value_name = "DIR")]
    allow_parent: Vec<OsString>,
    /// A block device that a VMDK may name as its data, by the name that stands in it; may be given more than once. It
    /// is only read, unless --rw is given. Images of other users reach none.
    #[arg(long, value_name = "DEVICE")]
    allow_device: Vec<OsString>,
    /// Let these devices be written, too. One that is mounted, or a part of another, is refused.
    #[arg(long, requires = "allow_device")]
    rw: bool,
    /// The parent of the image, where one image is mounted, instead of looking where it says.
    #[arg(long, value_name = "FILE")]
    parent: Option<OsString>,
    /// Read on where an image contradicts itself or its parent changed; such images are read-only.
    #[arg(long)]
    force: bool,
    /// Appended to an image's name [default: .img].
    #[arg(long, value_name = "TEXT")]
    suffix: Option<OsString>,
}

impl Words {
    fn apply(&self, options: &mut MountOptions) -> Result<()> {
        let flags = [
            ("ro", self.ro),
            ("allow_other", self.allow_other),
            ("allow_root", self.allow_root),
            ("writeback", self.writeback),
            ("nowriteback", self.nowriteback),
            ("nopassthrough", self.nopassthrough),
            ("partitions", self.partitions),
            ("rw_devices", self.rw),
            ("force", self.force),
        ];
        for (word, _) in flags.iter().filter(|(_, given)| *given) {
            options.set(word, None)?;
        }
        // umask before the two it stands for.
        let values = [
            ("uid", &self.uid),
            ("gid", &self.gid),
            ("umask", &self.umask),
            ("fmask", &self.fmask),
            ("dmask", &self.dmask),
            ("threads", &self.threads),
            ("cache", &self.cache),
            ("suffix", &self.suffix),
            ("parent", &self.parent),
        ];
        for (word, value) in values {
            if let Some(value) = value {
                options.set(word, Some(value))?;
            }
        }
        if let Some(dir) = &self.nonpersistent {
            options.set("nonpersistent", dir.as_deref())?;
        }
        let mut devices = self.allow_device.iter();
        devices.try_for_each(|device| options.set("allow_device", Some(device)))?;
        self.allow_parent.iter().try_for_each(|dir| options.set("allow_parent", Some(dir)))
    }
}

const HELPER_HELP: &str = "\
Examples:
  By hand:
    mount -t flatdisk /srv/images /mnt/flat -o ro
  In /etc/fstab, a folder of images and a file system inside one of them:
    /srv/images             /mnt/flat  fuse.flatdisk  ro,nofail,x-gvfs-show  0 0
    /mnt/flat/win.vhdx.img  /mnt/c     ntfs3  loop,ro,nofail,x-systemd.requires-mounts-for=/mnt/flat  0 0

Exit status:
  0   the mount is live
  1   wrong usage, or an option that is unknown or refused
  32  the mount failed

Files:
  /etc/fstab      mounts made at boot
  /etc/fuse.conf  whether users may let others into their mounts";

/// Arguments of `mount.flatdisk`, as mount(8) calls its helpers.
#[derive(Debug, Parser)]
#[command(
    name = "mount.flatdisk",
    version,
    about = "Mounts images as flat files for mount(8)",
    long_about = "Shows an image, or every image of a folder, as a flat raw file below a mount point. \
                  mount(8) runs this program for the types flatdisk and fuse.flatdisk, by hand as \
                  well as for lines of /etc/fstab.",
    after_long_help = HELPER_HELP
)]
pub struct HelperArgs {
    /// An image, or a directory to be mirrored.
    source: PathBuf,
    /// An existing directory.
    mountpoint: PathBuf,
    /// Ignore unknown mount options.
    #[arg(short)]
    sloppy: bool,
    /// Do everything but mount.
    #[arg(short)]
    fake: bool,
    /// Ignored: there is no mtab.
    #[arg(short)]
    no_mtab: bool,
    /// Say more.
    #[arg(short, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Mount options.
    #[arg(short, value_name = "OPTIONS", allow_hyphen_values = true)]
    options: Vec<OsString>,
    /// Ignored: the type is known.
    #[arg(short, value_name = "TYPE")]
    types: Option<OsString>,
    /// Mount namespace (not supported).
    #[arg(short = 'N', value_name = "NAMESPACE")]
    namespace: Option<OsString>,
}

/// `flatdisk mount`.
pub fn mount(args: &MountArgs) -> u8 {
    log_sink::start(args.verbose);
    let mut options = MountOptions::default();
    let parsed = args
        .options
        .iter()
        .try_for_each(|list| options.apply(list, false))
        .and_then(|()| args.words.apply(&mut options));
    let json = args.output.json();
    if let Err(e) = parsed {
        return report(&e, USAGE, json);
    }
    let request = MountRequest {
        sources: args.sources.clone(),
        mountpoint: args.mountpoint.clone(),
        options,
    };
    if args.foreground { serve(&request, json) } else { in_background(&request, json) }
}

/// `mount.flatdisk` and `mount.fuse.flatdisk`.
pub fn helper(args: &HelperArgs) -> u8 {
    log_sink::start(args.verbose);
    let mut options = MountOptions::default();
    let mut parsed = args.options.iter().try_for_each(|list| options.apply(list, args.sloppy));
    if args.namespace.is_some() {
        parsed = Err(Error::unsupported("option -N").hint("use nsenter"));
    }
    if let Err(e) = parsed {
        return report(&e, USAGE, false);
    }
    let request = MountRequest {
        sources: vec![args.source.clone()],
        mountpoint: args.mountpoint.clone(),
        options,
    };
    if args.fake {
        return Prepared::new(&request).map_or_else(|e| report(&e, MOUNT_FAILURE, false), |_| 0);
    }
    in_background(&request, false)
}

fn report(error: &Error, status: u8, json: bool) -> u8 {
    output::report(error, json);
    status
}

/// What a live mount is, for programs.
fn print_mounted(request: &MountRequest) -> Result<()> {
    let sources: Vec<_> = request.sources.iter().map(|path| Name::from(&**path)).collect();
    print_json(&json!({ "mountpoint": Name::from(&*request.mountpoint), "sources": sources }))
}

/// Mounts and serves in this process.
fn serve(request: &MountRequest, json: bool) -> u8 {
    let ready = || if json { print_mounted(request) } else { Ok(()) };
    match Prepared::new(request).and_then(|prepared| prepared.serve(ready)) {
        // Each was logged when it happened.
        Ok(failures) if failures.is_empty() => 0,
        Ok(_) => SYSTEM_ERROR,
        Err(e) => report(&e, MOUNT_FAILURE, json),
    }
}

/// A failure of the process in the background, as it tells of it: for people and for programs.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
    text: String,
    failure: serde_json::Value,
}

fn in_background(request: &MountRequest, json: bool) -> u8 {
    if std::env::var_os(DAEMON).is_some() {
        return serve_detached(request);
    }
    if let Err(e) = check_host() {
        return report(&e, MOUNT_FAILURE, json);
    }
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_else(|| "flatdisk".into());
    let failed = |e: std::io::Error| {
        report(&Error::io("starting the background process", &e), SYSTEM_ERROR, json)
    };
    let child = Command::new("/proc/self/exe")
        .arg0(name)
        .args(arguments)
        .env(DAEMON, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(e) => return failed(e),
    };
    let mut said = String::new();
    if let Some(mut pipe) = child.stdout.take()
        && let Err(e) = pipe.read_to_string(&mut said)
    {
        return failed(e);
    }
    match said.trim_end() {
        READY if json => print_mounted(request).map_or_else(|e| report(&e, 1, false), |()| 0),
        READY => 0,
        "" => {
            let how = child.wait().map(|status| status.to_string()).unwrap_or_default();
            let died = format!("the background process ended before the mount was live: {how}");
            report(&Error::new(ErrorKind::Failed, died), MOUNT_FAILURE, json)
        }
        error => {
            match serde_json::from_str::<Told>(error) {
                Ok(told) => {
                    complain(told.text);
                    if json {
                        let _ = print_json(&told.failure);
                    }
                }
                Err(_) => complain(error),
            }
            MOUNT_FAILURE
        }
    }
}

/// The background process: serves, and reports to the process that started it.
fn serve_detached(request: &MountRequest) -> u8 {
    let failed = |e: &Error| {
        let told = Told { text: e.to_string(), failure: json!(Failure::from(e)) };
        let told = serde_json::to_string(&told).unwrap_or(told.text);
        let _ = writeln!(std::io::stdout(), "{told}");
        MOUNT_FAILURE
    };
    let prepared = match Prepared::new(request) {
        Ok(prepared) => prepared,
        Err(e) => return failed(&e),
    };
    match prepared.serve(detach) {
        Ok(failures) if failures.is_empty() => 0,
        Ok(_) => SYSTEM_ERROR,
        Err(e) => failed(&e),
    }
}

/// Says that the mount is live, then lets go of terminal, directory and standard files.
fn detach() -> Result<()> {
    let failed = |what: &'static str| move |e: nix::errno::Errno| Error::io(what, &e.into());
    let io_failed = |what: &'static str| move |e: std::io::Error| Error::io(what, &e);
    setsid().map_err(failed("leaving the terminal"))?;
    std::env::set_current_dir("/").map_err(io_failed("leaving the directory"))?;
    log_sink::detach();
    writeln!(std::io::stdout(), "{READY}").map_err(io_failed("reporting readiness"))?;
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(io_failed("opening /dev/null"))?;
    dup2_stdin(&null).map_err(failed("closing standard input"))?;
    dup2_stderr(&null).map_err(failed("closing standard error"))?;
    // Ends the pipe, and with it the wait of the process at its other end.
    dup2_stdout(&null).map_err(failed("closing standard output"))
}
