//! Loop devices, through the kernel's own interface (loop(4)).
//!
//! `LOOP_CONFIGURE` does in one step what losetup(8) once did in five: no moment exists at which the
//! device has the wrong sector size, or is writable when it must not be, and the kernel looks for
//! partitions with all of that in force. The number of the device is known before anything is
//! bound to it, so that it can be recorded first.
#![allow(unsafe_code, reason = "ioctls on loop devices have no safe interface")]

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use zerocopy::FromZeros;

use crate::error::{Error, ErrorKind, Result};

/// Where devices have their nodes.
const DEV: &str = "/dev";

const READ_ONLY: u32 = 1;
const PARTSCAN: u32 = 8;
const DIRECT_IO: u32 = 16;

/// `struct loop_info64` of linux/loop.h.
#[derive(FromZeros)]
#[repr(C)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of linux/loop.h.
#[derive(FromZeros)]
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<Config>() == 304);

nix::ioctl_none_bad!(loop_ctl_get_free, 0x4C82);
nix::ioctl_none_bad!(loop_clr_fd, 0x4C01);
nix::ioctl_none_bad!(reread_partitions, 0x125F);
nix::ioctl_write_ptr_bad!(loop_configure, 0x4C0A, Config);

/// A loop device, bound to a file or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoopDevice {
    number: u32,
}

/// A partition that the kernel knows on a loop device.
#[derive(Debug, Clone)]
pub struct Partition {
    /// Its number in the table.
    pub number: u32,
    /// Its node.
    pub node: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// Device number.
    pub device: u64,
}

/// How a file becomes a device.
#[derive(Debug, Clone, Copy)]
pub struct Binding {
    /// Bytes per logical sector.
    pub sector_size: u32,
    /// Whether the device refuses writes.
    pub read_only: bool,
    /// Byte of the file that is the device's first.
    pub offset: u64,
    /// Bytes of the device; 0 for all that the file has. Behind them the device changes nothing.
    pub size_limit: u64,
}

impl LoopDevice {
    /// A device that nothing is bound to at this moment. Another program may be faster.
    pub fn free() -> Result<Self> {
        let path = Path::new(DEV).join("loop-control");
        let control = File::options().read(true).write(true).open(&path).map_err(|e| {
            let error = Error::io("open", &e).in_file(&path);
            match e.kind() {
                io::ErrorKind::NotFound => error.hint("`modprobe loop` may bring it"),
                _ => error,
            }
        })?;
        // SAFETY: takes no argument; the descriptor is open.
        let number = unsafe { loop_ctl_get_free(control.as_raw_fd()) }
            .map_err(|e| Error::io("finding a free loop device", &e.into()))?;
        let number = u32::try_from(number).map_err(|_| Error::invalid("no loop device"))?;
        Ok(Self { number })
    }

    /// The device with the node `path`, or the one whose partition that is.
    pub fn of_node(path: &Path) -> Option<Self> {
        let name = path.strip_prefix(DEV).ok()?.to_str()?.strip_prefix("loop")?;
        let (number, partition) = name.split_once('p').unwrap_or((name, "0"));
        partition.parse::<u32>().ok()?;
        Some(Self { number: number.parse().ok()? })
    }

    fn name(self) -> String {
        format!("loop{}", self.number)
    }

    /// The device's node.
    pub fn node(self) -> PathBuf {
        Path::new(DEV).join(self.name())
    }

    fn sys(self) -> PathBuf {
        Path::new("/sys/block").join(self.name())
    }

    /// Binds `file` to the device. `Busy` if another file is by now.
    pub fn bind(self, file: &File, binding: Binding) -> Result<()> {
        let node = self.node();
        make_node(&self.sys(), &node)?;
        let failed = |e: Errno| match e {
            Errno::EBUSY => Error::new(ErrorKind::Busy, "in use").in_file(&node),
            e => Error::io("setting up the loop device", &e.into()).in_file(&node),
        };
        let device = File::options()
            .read(true)
            .write(!binding.read_only)
            .open(&node)
            .map_err(|e| Error::io("open", &e).in_file(&node))?;
        let mut config = Config::new_zeroed();
        config.fd = file.as_raw_fd().cast_unsigned();
        config.block_size = binding.sector_size;
        config.info.offset = binding.offset;
        config.info.size_limit = binding.size_limit;
        // Direct: what is read is not kept in memory twice, and what is written reaches the file when the
        // device says so.
        config.info.flags = PARTSCAN | DIRECT_IO | if binding.read_only { READ_ONLY } else { 0 };
        // SAFETY: the structure has the kernel's layout and outlives the call; both files are open.
        unsafe { loop_configure(device.as_raw_fd(), &config) }.map(drop).map_err(failed)
    }

    /// Makes durable what was written to the device.
    pub fn sync(self) -> Result<()> {
        let node = self.node();
        let synced = File::open(&node).and_then(|device| device.sync_all());
        synced.map_err(|e| Error::io("flush", &e).in_file(&node))
    }

    /// The file bound to the device, by the name it has now.
    pub fn backing_file(self) -> Option<PathBuf> {
        let mut name = fs::read(self.sys().join("loop/backing_file")).ok()?;
        name.truncate(name.trim_ascii_end().len());
        Some(OsString::from_vec(name).into())
    }

    /// Unbinds the file as soon as nobody has the device open.
    pub fn clear(self) -> Result<()> {
        let node = self.node();
        let device = File::open(&node).map_err(|e| Error::io("open", &e).in_file(&node))?;
        // SAFETY: takes no argument; the descriptor is open.
        match unsafe { loop_clr_fd(device.as_raw_fd()) } {
            // ENXIO: nothing is bound any more.
            Ok(_) | Err(Errno::ENXIO) => Ok(()),
            Err(e) => Err(Error::io("detaching", &e.into()).in_file(&node)),
        }
    }

    /// Whether a file system, swap space or another block device uses the device or a partition, in
    /// whatever mount namespace.
    pub fn claimed(self) -> bool {
        let exclusive = File::options().read(true).custom_flags(libc::O_EXCL).open(self.node());
        exclusive.is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY))
    }

    /// Device number.
    pub fn device(self) -> Option<u64> {
        device_number(&self.sys())
    }

    /// A name that no other binding of this or another device ever has (Linux 5.15).
    pub fn binding_id(self) -> Option<String> {
        let read = |path: &Path| Some(fs::read_to_string(path).ok()?.trim().to_owned());
        // The sequence starts anew with the machine.
        let boot = read(Path::new("/proc/sys/kernel/random/boot_id"))?;
        Some(format!("{boot}/{}", read(&self.sys().join("diskseq"))?))
    }

    /// Makes the partitions known where the kernel was built without partition tables: partx(8)
    /// reads them and tells it. A disk without a table is left as it is.
    pub fn add_partitions(self) {
        if self.partition_dirs().is_empty() {
            let mut partx = Command::new("partx");
            partx.arg("--add").arg("--").arg(self.node());
            let _ = partx.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
    }

    /// Has the kernel read the partition table again. Partitions in use stay as they are.
    pub fn rescan(self) -> Result<()> {
        let node = self.node();
        self.backing_file().ok_or_else(|| {
            Error::new(ErrorKind::NotFound, "no file is bound to the loop device").in_file(&node)
        })?;
        let device = File::open(&node).map_err(|e| Error::io("open", &e).in_file(&node))?;
        // SAFETY: takes no argument; the descriptor is open. It fails where one partition is in use.
        let read = unsafe { reread_partitions(device.as_raw_fd()) };
        let mut partx = Command::new("partx");
        partx.arg("--update").arg("--").arg(&node).stdin(Stdio::null()).stdout(Stdio::null());
        let updated = partx.stderr(Stdio::null()).status();
        match (read, updated) {
            // partx(8) fails where there is no table any more.
            (Ok(_), _) => Ok(()),
            (_, Ok(status)) if status.success() => Ok(()),
            (Err(e), Ok(_)) => Err(Error::io("reading the partition table", &e.into())
                .in_file(&node)
                .hint("a partition that is in use cannot go or change")),
            (_, Err(e)) => Err(Error::io("running partx", &e).in_file(&node)),
        }
    }

    /// The partitions that the kernel knows, in order.
    pub fn partitions(self) -> Vec<Partition> {
        let mut found: Vec<_> =
            self.partition_dirs().iter().filter_map(|dir| partition(dir)).collect();
        found.sort_by_key(|partition| partition.number);
        found
    }

    fn partition_dirs(self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.sys()).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).filter(|dir| dir.join("partition").exists()).collect()
    }

    /// Nodes of partitions that neither the kernel nor udev made, as in a container whose `/dev` is a
    /// plain directory.
    pub fn missing_nodes(self) -> Vec<PathBuf> {
        let dirs = self.partition_dirs();
        let missing = |dir: &PathBuf| {
            let Partition { node, .. } = partition(dir)?;
            (!is_node(&node, device_number(dir)?)).then_some(node)
        };
        dirs.iter().filter_map(missing).collect()
    }

    /// Makes the missing nodes of partitions.
    pub fn make_nodes(self) -> Result<()> {
        let make = |dir: &PathBuf| {
            partition(dir).map_or(Ok(()), |Partition { node, .. }| make_node(dir, &node))
        };
        self.partition_dirs().iter().try_for_each(make)
    }

    /// Block devices built on this one or its partitions (LVM, encryption, RAID), and swap space.
    pub fn holders(self) -> Vec<String> {
        let names = |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().flatten();
        let dirs = std::iter::once(self.sys()).chain(self.partition_dirs());
        let mut found: Vec<String> = dirs
            .flat_map(|dir| names(dir.join("holders")))
            .map(|holder| format!("{DEV}/{}", holder.file_name().display()))
            .collect();
        let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
        let ours = |node: &&str| Self::of_node(Path::new(node)) == Some(self);
        let swaps = swaps.lines().filter_map(|line| line.split_whitespace().next()).filter(ours);
        found.extend(swaps.map(|node| format!("swap on {node}")));
        found
    }
}

fn partition(dir: &Path) -> Option<Partition> {
    let number = |name: &str| fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
    Some(Partition {
        number: u32::try_from(number("partition")?).ok()?,
        node: Path::new(DEV).join(dir.file_name()?),
        // In units of 512 bytes, whatever the device's sectors are.
        size: number("size")?.checked_mul(512)?,
        device: device_number(dir)?,
    })
}

/// The device number in a directory of sysfs.
fn device_number(dir: &Path) -> Option<u64> {
    let text = fs::read_to_string(dir.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

fn is_node(path: &Path, device: u64) -> bool {
    let meta = fs::symlink_metadata(path);
    meta.is_ok_and(|meta| meta.file_type().is_block_device() && meta.rdev() == device)
}

/// Makes the node of the device described in `dir`, unless it is there.
fn make_node(dir: &Path, node: &Path) -> Result<()> {
    let gone = || Error::new(ErrorKind::NotFound, "no such device").in_file(node);
    let device = device_number(dir).ok_or_else(gone)?;
    if is_node(node, device) {
        return Ok(());
    }
    let failed = |e: io::Error| Error::io("making the device node", &e).in_file(node);
    // Left behind by a device that is gone: partitions get new numbers each time.
    if fs::symlink_metadata(node).is_ok_and(|meta| meta.file_type().is_block_device()) {
        fs::remove_file(node).map_err(failed)?;
    }
    match mknod(node, SFlag::S_IFBLK, Mode::S_IRUSR | Mode::S_IWUSR, device) {
        // The kernel or udev may have made it meanwhile.
        Err(Errno::EEXIST) if is_node(node, device) => Ok(()),
        made => made.map_err(|e| failed(e.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_tell_their_device() {
        let number = |node: &str| LoopDevice::of_node(Path::new(node)).map(|device| device.number);
        assert_eq!(number("/dev/loop0"), Some(0));
        assert_eq!(number("/dev/loop17p3"), Some(17));
        for node in ["/dev/loop", "/dev/loop-control", "/dev/sda", "/dev/loop1p", "loop1", "/x"] {
            assert_eq!(number(node), None, "{node}");
        }
        assert_eq!(LoopDevice { number: 3 }.node(), Path::new("/dev/loop3"));
    }
}
