//! `flatdisk`: VHD, VHDX and VMDK disk images as flat, readable and writable disks.
//!
//! # Layers
//!
//! ```text
//! cli        commands, arguments, what is printed
//! fuse       the mounted tree: names, inodes, handles, errno
//! volumes    partitions, file systems and other contents of a disk
//! copy       whole disks from any image to any other: one pipeline, its sources and sinks
//! disk       Disk: moves bytes; BlockMap: what a driver answers; table cache, block locks
//! formats    vhd, vhdx, vmdk: BlockMap over tables on disk; open, create, check
//! storage    positioned I/O on host files, or on what tests put in their place
//! ```
//!
//! Calls run down. `disk` never names a format, `formats` and `volumes` know nothing of FUSE or the
//! command line, `storage` knows only the host. `error`, `codec`, `names` and `progress` stand beside
//! all of them.
//!
//! # Use
//!
//! ```
//! # fn main() -> flatdisk::Result<()> {
//! # let dir = std::env::temp_dir().join(format!("flatdisk-doc-{}", std::process::id()));
//! # std::fs::create_dir_all(&dir).expect("a folder");
//! # let path = dir.join("server.vhdx");
//! use flatdisk::formats::{self, CreateSpec};
//! use flatdisk::storage::file::HostFs;
//!
//! let spec = CreateSpec { size: 64 << 20, ..CreateSpec::default() };
//! formats::create(formats::by_name("vhdx")?, &HostFs, &path, &spec)?;
//!
//! let image = flatdisk::OpenOptions::default().write(true).open(&path)?;
//! image.disk.write_at(1 << 20, b"guest data")?;
//! image.disk.flush()?;
//! drop(image);
//!
//! let image = flatdisk::open(&path)?;
//! let mut bytes = [0; 10];
//! image.disk.read_at(1 << 20, &mut bytes)?;
//! assert_eq!(&bytes, b"guest data");
//! # drop(image);
//! # std::fs::remove_dir_all(&dir).expect("remove the folder");
//! # Ok(())
//! # }
//! ```
//!
//! # Terms
//!
//! *Image*: the file or files that hold a virtual disk. *Flat file*: the disk as a raw file in the
//! mount. *Block*, *grain*: unit of allocation. *BAT*, *grain table*: where each unit is. *Extent*: a
//! run of the disk in one place; in VMDK also a file holding a run. *Parent*, *child*: a child stores
//! only what differs from its parent.
#![deny(unsafe_code)]
#![warn(clippy::missing_errors_doc)]

#[doc(hidden)]
pub mod cli;
#[doc(hidden)]
pub mod codec;
pub mod copy;
pub mod disk;
pub mod error;
pub mod formats;
#[doc(hidden)]
pub mod fuse;
#[doc(hidden)]
pub mod names;
pub mod progress;
pub mod storage;
pub mod volumes;

pub use disk::cursor::Cursor;
pub use disk::window::Window;
pub use error::{Error, ErrorKind, Result};
pub use formats::{Image, OpenOptions};

/// Opens the image at `path` for reading, with all its parents.
///
/// # Errors
///
/// Those of [`OpenOptions::open`].
pub fn open(path: impl AsRef<std::path::Path>) -> Result<Image> {
    OpenOptions::default().open(path)
}
