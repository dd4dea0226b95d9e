//! Copying whole disks: from any image, raw file, device or pipe to any other.
//!
//! One loop moves the contents ([`pipeline`]): workers read a chunk, look for zeroes, deflate and write
//! it, each on its own. Where it goes is a [`sink`]: the disk of a new image, the differences to a base,
//! a pipe, a compressed stream, a digest, a comparison. Around that [`convert()`] makes the target's
//! files under temporary names ([`crate::storage::staged`]) and gives them their names when everything
//! is durable.
//!
//! # Sharing blocks
//!
//! Where source and target lie on one file system that can (XFS, btrfs), runs of stored data are not
//! read at all: the target's blocks become the source's ([`crate::storage::Storage::share_from`]), which
//! takes neither time nor space. Both places must agree in their offset within 4096 bytes, which they do
//! in raw files, fixed VHDs, VHDX, flat and sparse VMDK, and in VHDs made here. The ends of a run that
//! are no whole block are copied. What is shared is not looked at for zeroes: that would read all of it,
//! which takes the time that sharing saves, and shared zeroes take no space either, since they are the
//! source's. `--reflink never`, or `compact` afterwards, finds them.
//!
//! # Memory
//!
//! Every worker holds one chunk (256 KiB), for a compressed stream another one, and there are at most 16;
//! tables wait in memory up to the limits of the target's driver.
//!
//! # Further files
//!
//! - `compare`: comparing two disks;
//! - `convert`: making an image, raw file, stream or device out of a disk;
//! - `delta`: what changed after an ancestor, as a stream;
//! - `digest`: digests of the contents of a disk;
//! - `files`: the files that a conversion must leave alone, and those that it removes;
//! - `in_place`: a raw disk becomes a fixed VHD, and back, without copying;
//! - `measure`: how large an image of a disk would be, without making it;
//! - `output`: making a pipe or a block device out of a disk;
//! - `ova`: making an OVA;
//! - `source`: what is copied from;
//! - `stream`: the sink that writes a stream-optimised VMDK;
//! - `target`: what a conversion makes, and whether that can be.

pub mod compare;
pub mod convert;
pub mod delta;
#[doc(hidden)]
pub mod digest;
mod files;
pub mod in_place;
pub mod measure;
pub mod output;
mod ova;
#[doc(hidden)]
pub mod pipeline;
#[doc(hidden)]
pub mod sink;
#[doc(hidden)]
pub mod source;
mod stream;
pub mod target;

pub use compare::{Difference, compare};
pub use convert::{Converted, Options, convert};
pub use measure::{Measured, measure};
pub use source::{Opened, Source};
pub use target::Target;

/// Whether blocks of the host are shared between source and target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sharing {
    /// Where the host can.
    #[default]
    Auto,
    /// Everywhere; failing where the host cannot.
    Always,
    /// Nowhere: everything is read, looked at for zeroes, and written.
    Never,
}
