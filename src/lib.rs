//! `flatdisk`: VHD, VHDX and VMDK disk images as flat, readable and writable disks.
//!
//! # Layers
//!
//! ```text
//! cli        commands, arguments, what is printed
//! fuse       the mounted tree: names, inodes, handles, errno
//! copy       whole disks from any image to any other: one pipeline, its sources and sinks
//! disk       Disk: moves bytes; BlockMap: what a driver answers; table cache, block locks
//! formats    vhd, vhdx, vmdk: BlockMap over tables on disk; open, create, check
//! storage    positioned I/O on host files, or on what tests put in their place
//! ```
//!
//! Calls run down. `disk` never names a format, `formats` know nothing of FUSE or the command line,
//! `storage` knows only the host. `error`, `codec` and `progress` stand beside all of them.
//!
//! # Terms
//!
//! *Image*: the file or files that hold a virtual disk. *Flat file*: the disk as a raw file in the
//! mount. *Block*, *grain*: unit of allocation. *BAT*, *grain table*: where each unit is. *Extent*: a
//! run of the disk in one place; in VMDK also a file holding a run. *Parent*, *child*: a child stores
//! only what differs from its parent.
#![deny(unsafe_code)]

pub mod cli;
pub mod codec;
pub mod copy;
pub mod disk;
pub mod error;
pub mod formats;
pub mod fuse;
pub mod progress;
pub mod storage;

pub use error::{Error, ErrorKind, Result};
