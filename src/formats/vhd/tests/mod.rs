//! Tests of the whole driver: opening and refusing, writing, checking, against a model and against
//! other programs.
//!
//! # Files
//!
//! - `checking`: what a check finds, and where;
//! - `differencing`: children;
//! - `interop`: images of other programs, and ours in other programs;
//! - `model`: random operations against a plain array of bytes;
//! - `opening`: what opens, how, and what is refused;
//! - `writing`: allocation, reopening, unmapping and what is on disk in between.

mod checking;
mod differencing;
mod interop;
mod model;
mod opening;
mod writing;

use std::path::Path;
use std::sync::Arc;

use zerocopy::{FromBytes, IntoBytes};

use super::layout::{DynamicHeader, Footer};
use super::{Vhd, create_child};
use crate::error::{Error, Result};
use crate::formats::{self, CreateSpec, Image, OpenOptions, Report};
use crate::storage::memory::{MemoryFile, MemoryHost};
use crate::storage::{Access, Host, Storage};

pub(super) const PATH: &str = "/images/disk.vhd";

/// A host with one image of ours.
pub(super) fn made(subformat: &str, size: u64, block_size: Option<u64>) -> Arc<MemoryHost> {
    let host = MemoryHost::new();
    let spec = CreateSpec {
        subformat: Some(subformat.to_owned()),
        size,
        block_size,
        ..CreateSpec::default()
    };
    formats::create(&Vhd, &*host, Path::new(PATH), &spec).unwrap();
    host
}

/// A host with a dynamic image of 2 MiB blocks.
pub(super) fn dynamic(size: u64) -> Arc<MemoryHost> {
    made("dynamic", size, None)
}

/// A host with these bytes as its image.
pub(super) fn holding(bytes: &[u8]) -> Arc<MemoryHost> {
    let host = MemoryHost::new();
    host.insert(MemoryFile::new(PATH, bytes));
    host
}

pub(super) const PARENT: &str = "/images/parent.vhd";

/// Makes the image at [`PATH`] the parent of a new child, which takes its place.
pub(super) fn add_child(host: &Arc<MemoryHost>, block_size: Option<u64>) {
    host.insert(MemoryFile::new(PARENT, &bytes(host)));
    host.remove(Path::new(PATH)).unwrap();
    let shared: Arc<dyn Host> = host.clone();
    let options = OpenOptions::new(Access::Read);
    let parent = formats::open(&shared, Path::new(PARENT), &options).unwrap();
    create_child(&**host, Path::new(PATH), &parent, block_size).unwrap();
}

/// The files as they are now, as after the process died.
pub(super) fn copy(host: &Arc<MemoryHost>) -> Arc<MemoryHost> {
    let copy = MemoryHost::new();
    for file in host.files() {
        copy.insert(MemoryFile::new(file.path(), &file.to_vec()));
    }
    copy
}

pub(super) fn file(host: &Arc<MemoryHost>) -> Arc<MemoryFile> {
    host.file(Path::new(PATH)).unwrap()
}

pub(super) fn bytes(host: &Arc<MemoryHost>) -> Vec<u8> {
    file(host).to_vec()
}

pub(super) fn try_open(host: &Arc<MemoryHost>, options: &OpenOptions) -> Result<Image> {
    let host: Arc<dyn Host> = host.clone();
    formats::open(&host, Path::new(PATH), options)
}

pub(super) fn open(host: &Arc<MemoryHost>) -> Image {
    try_open(host, &OpenOptions::new(Access::Write)).unwrap()
}

pub(super) fn forced(host: &Arc<MemoryHost>) -> Image {
    try_open(host, &OpenOptions { force: true, ..OpenOptions::new(Access::Write) }).unwrap()
}

pub(super) fn refusal(host: &Arc<MemoryHost>) -> Error {
    try_open(host, &OpenOptions::new(Access::Read)).map(|_| ()).unwrap_err()
}

pub(super) fn check(host: &Arc<MemoryHost>) -> Report {
    let host: Arc<dyn Host> = host.clone();
    formats::check(&host, Path::new(PATH), &OpenOptions::new(Access::Read)).unwrap()
}

pub(super) fn read(image: &Image, at: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xee; len];
    image.disk.read_at(at, &mut buf).unwrap();
    buf
}

/// Changes the footer at byte `at` of the file and seals it again.
pub(super) fn edit_footer(bytes: &mut [u8], at: usize, change: impl FnOnce(&mut Footer)) {
    let mut footer = Footer::read_from_bytes(&bytes[at..at + 512]).unwrap();
    change(&mut footer);
    footer.seal();
    bytes[at..at + 512].copy_from_slice(footer.as_bytes());
}

/// Changes both copies of the footer.
pub(super) fn edit_footers(bytes: &mut [u8], change: impl Fn(&mut Footer)) {
    let end = bytes.len() - 512;
    edit_footer(bytes, 0, &change);
    edit_footer(bytes, end, &change);
}

/// Changes the dynamic header and seals it again.
pub(super) fn edit_header(bytes: &mut [u8], change: impl FnOnce(&mut DynamicHeader)) {
    let mut header = DynamicHeader::read_from_bytes(&bytes[512..1536]).unwrap();
    change(&mut header);
    header.seal();
    bytes[512..1536].copy_from_slice(header.as_bytes());
}

/// Sets a BAT entry of an image with the BAT at its usual place.
pub(super) fn set_bat(bytes: &mut [u8], block: usize, sector: u32) {
    bytes[1536 + block * 4..][..4].copy_from_slice(&sector.to_be_bytes());
}

pub(super) fn bat(bytes: &[u8], block: usize) -> u32 {
    u32::from_be_bytes(bytes[1536 + block * 4..][..4].try_into().unwrap())
}
