//! File systems on a loop device: which one to mount, and mounting it as an administrator would, by
//! mount(8) and umount(8). So file systems that are programs (ntfs-3g) work too, and helpers of
//! others are called.

use std::ffi::OsStr;
use std::fmt;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::loop_device::LoopDevice;
use crate::cli::output::iec;
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::mounts::{self, MountEntry};

/// A place for a file system: the whole disk, or a partition.
#[derive(Debug)]
struct Volume {
    /// Its number in the partition table; `None` for the whole disk.
    number: Option<u32>,
    node: PathBuf,
    size: u64,
    probed: Probed,
}

/// What blkid(8) finds on a device.
#[derive(Debug, Default, PartialEq, Eq)]
struct Probed {
    file_system: bool,
    kind: Option<String>,
    label: Option<String>,
}

impl fmt::Display for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.probed.kind.as_deref().unwrap_or("no file system");
        write!(f, "{}: {}, {kind}", self.number.unwrap_or(0), iec(self.size))?;
        self.probed.label.as_ref().map_or(Ok(()), |label| write!(f, " `{label}`"))
    }
}

/// The node of partition `number` of a device, or of its only file system.
pub fn choose(device: LoopDevice, number: Option<u32>) -> Result<PathBuf> {
    let partitions = device.partitions().into_iter().map(|partition| Volume {
        number: Some(partition.number),
        probed: probe(&partition.node),
        node: partition.node,
        size: partition.size,
    });
    pick(partitions.collect(), number).map(|node| node.unwrap_or(device.node()))
}

/// The nodes of the file systems of a device, or of its partitions, and in words what else there is.
pub fn all(device: LoopDevice) -> (Vec<PathBuf>, Vec<String>) {
    let mut nodes: Vec<_> =
        device.partitions().into_iter().map(|p| (Some(p.number), p.node, p.size)).collect();
    if nodes.is_empty() {
        nodes.push((None, device.node(), 0));
    }
    let (mut found, mut others) = (Vec::new(), Vec::new());
    for (number, node, size) in nodes {
        let probed = probe(&node);
        match (probed.file_system, number) {
            (true, _) => found.push(node),
            (false, Some(_)) => others.push(Volume { number, probed, node, size }.to_string()),
            (false, None) => {
                others.push(probed.kind.unwrap_or_else(|| "no file system".to_owned()))
            }
        }
    }
    (found, others)
}

/// `None` is the whole disk.
fn pick(volumes: Vec<Volume>, number: Option<u32>) -> Result<Option<PathBuf>> {
    let list = || volumes.iter().map(Volume::to_string).collect::<Vec<_>>().join("; ");
    if let Some(number) = number {
        let found = volumes.iter().find(|volume| volume.number == Some(number));
        return found.map(|volume| Some(volume.node.clone())).ok_or_else(|| {
            let what = match volumes.is_empty() {
                true => "the disk has no partitions".to_owned(),
                false => format!("no partition {number} (there are {})", list()),
            };
            Error::new(ErrorKind::NotFound, what)
        });
    }
    // Boot loaders' and reserved partitions have none.
    let file_systems: Vec<_> = volumes.iter().filter(|v| v.probed.file_system).collect();
    match (&volumes[..], &file_systems[..]) {
        ([], _) => Ok(None),
        ([only], _) => Ok(Some(only.node.clone())),
        (_, [only]) => Ok(Some(only.node.clone())),
        _ => Err(Error::invalid(format!("several partitions ({})", list()))
            .hint("choose one with --partition")),
    }
}

fn probe(node: &Path) -> Probed {
    let mut command = Command::new("blkid");
    command.args(["-p", "-o", "export"]).arg(node).stdin(Stdio::null()).stderr(Stdio::null());
    // Without blkid the user has to choose.
    command.output().map_or_else(|_| Probed::default(), |said| parse_blkid(&said.stdout))
}

fn parse_blkid(said: &[u8]) -> Probed {
    let said = String::from_utf8_lossy(said);
    let value = |key: &str| {
        let pair = said.lines().filter_map(|line| line.split_once('=')).find(|(k, _)| *k == key)?;
        Some(pair.1.replace('\\', ""))
    };
    Probed {
        file_system: value("USAGE").as_deref() == Some("filesystem"),
        kind: value("TYPE"),
        label: value("LABEL"),
    }
}

/// How a file system is to be mounted.
#[derive(Debug, Clone, Copy)]
pub struct How<'a> {
    /// Whether without writing.
    pub read_only: bool,
    /// Its type, if mount(8) should not find out.
    pub fs_type: Option<&'a OsStr>,
    /// More options.
    pub options: Option<&'a OsStr>,
}

/// Mounts the file system on `node`.
pub fn mount(node: &Path, dir: &Path, how: &How<'_>) -> Result<()> {
    let mut command = Command::new("mount");
    if let Some(fs_type) = how.fs_type {
        command.arg("-t").arg(fs_type);
    }
    let options = [how.read_only.then_some(OsStr::new("ro")), how.options];
    let options: Vec<_> = options.into_iter().flatten().collect();
    if !options.is_empty() {
        command.arg("-o").arg(options.join(OsStr::new(",")));
    }
    run(command.arg("--").arg(node), dir)
}

/// Unmounts the file system at `dir`. `Busy` with its users if it is in use.
pub fn unmount(dir: &Path) -> Result<()> {
    run(Command::new("umount").arg("--"), dir).map_err(|e| match &mounts::users_of(dir)[..] {
        [] => e,
        users => {
            Error::new(ErrorKind::Busy, format!("in use by {}", users.join(", "))).in_file(dir)
        }
    })
}

/// Runs mount(8) or umount(8) on `dir`. The first line they print is the error.
fn run(command: &mut Command, dir: &Path) -> Result<()> {
    let name = command.get_program().display().to_string();
    let failed = |e: std::io::Error| Error::io(format!("running {name}"), &e);
    // A file, because a file system that is a program may keep a pipe open as long as it lives.
    let mut said = tempfile::tempfile().map_err(failed)?;
    let stderr = said.try_clone().map_err(failed)?;
    command.arg(dir).env("LC_ALL", "C");
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).status();
    let status = status.map_err(failed)?;
    if status.success() {
        return Ok(());
    }
    let mut text = String::new();
    let _ = said.rewind().and_then(|()| said.read_to_string(&mut text));
    let line = text.lines().map(str::trim).find(|line| !line.is_empty());
    let line = line.map_or(status.to_string(), |line| {
        // The directory is named anyway.
        let line = line.strip_prefix(&format!("{name}: ")).unwrap_or(line);
        let line = line.strip_prefix(&format!("{}: ", dir.display())).unwrap_or(line);
        line.trim_end_matches('.').to_owned()
    });
    Err(Error::new(ErrorKind::Io, format!("{name}: {line}")).in_file(dir))
}

/// Mounts of what is on a device, wherever they are.
pub fn mounts_of(device: LoopDevice) -> Result<Vec<MountEntry>> {
    let partitions = device.partitions();
    let ours = |entry: &MountEntry| {
        let number = entry.number();
        // Some file systems (btrfs) have numbers of their own; the source is the node then.
        LoopDevice::of_node(Path::new(&entry.source)) == Some(device)
            || (number.is_some() && number == device.device())
            || partitions.iter().any(|partition| number == Some(partition.device))
    };
    Ok(mounts::mount_table()?.into_iter().filter(ours).collect())
}

/// Who uses a device besides the file system at `own`: mounts, swap, other devices.
pub fn other_users(device: LoopDevice, own: Option<&Path>) -> Result<Vec<String>> {
    let foreign = mounts_of(device)?.into_iter().filter(|entry| Some(&*entry.target) != own);
    let mut users: Vec<_> = foreign
        .map(|entry| format!("{} on {}", entry.source.display(), entry.target.display()))
        .collect();
    users.extend(device.holders());
    Ok(users)
}

/// Processes and loop devices that have a device or one of its partitions open.
pub fn openers(device: LoopDevice) -> Vec<String> {
    let partitions = device.partitions().into_iter().map(|partition| partition.node);
    let mut users: Vec<_> = std::iter::once(device.node())
        .chain(partitions)
        .flat_map(|n| mounts::users_of(&n))
        .collect();
    users.sort();
    users.dedup();
    users
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(number: u32, kind: Option<&str>) -> Volume {
        let probed =
            Probed { file_system: kind.is_some(), kind: kind.map(str::to_owned), label: None };
        let node = format!("/dev/loop0p{number}").into();
        Volume { number: Some(number), node, size: 1 << 20, probed }
    }

    #[test]
    fn the_only_file_system_is_found_and_several_are_listed() {
        let node = |picked: Result<Option<PathBuf>>| picked.unwrap();
        assert_eq!(node(pick(vec![], None)), None);
        assert_eq!(node(pick(vec![volume(2, None)], None)), Some("/dev/loop0p2".into()));
        let reserved = || vec![volume(1, None), volume(2, Some("ntfs"))];
        assert_eq!(node(pick(reserved(), None)), Some("/dev/loop0p2".into()));
        assert_eq!(node(pick(reserved(), Some(1))), Some("/dev/loop0p1".into()));
        let two = || vec![volume(1, Some("vfat")), volume(5, Some("ext4"))];
        let error = pick(two(), None).unwrap_err().to_string();
        assert!(error.contains("1: 1 MiB, vfat; 5: 1 MiB, ext4"), "{error}");
        let error = pick(two(), Some(2)).unwrap_err().to_string();
        assert!(error.contains("no partition 2") && error.contains("ext4"), "{error}");
        assert!(pick(vec![], Some(1)).unwrap_err().to_string().contains("no partitions"));
    }

    #[test]
    fn blkid_is_understood() {
        let probed = parse_blkid(b"DEVNAME=/dev/x\nLABEL=my\\ disk\nTYPE=ext4\nUSAGE=filesystem\n");
        let (kind, label) = (Some("ext4".into()), Some("my disk".into()));
        assert_eq!(probed, Probed { file_system: true, kind, label });
        assert_eq!(parse_blkid(b""), Probed::default());
        assert!(!parse_blkid(b"TYPE=crypto_LUKS\nUSAGE=crypto\n").file_system);
    }
}
