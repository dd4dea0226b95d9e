//! Tests of the driver as a whole, through the disk.
//!
//! # Files
//!
//! - `children`: children;
//! - `corpus`: images made by other programs;
//! - `damage`: images that contradict themselves;
//! - `durability`: what a flush costs, and what opening, the first write and closing change;
//! - `interop`: the same images under our driver and under QEMU;
//! - `model`: random operations against a plain array of bytes.

mod children;
mod corpus;
mod damage;
mod durability;
mod interop;
mod model;

use std::path::Path;
use std::sync::Arc;

use super::Vhdx;
use crate::disk::Disk;
use crate::error::{ErrorKind, Result};
use crate::formats::{self, CreateSpec, Image, OpenOptions, Report};
use crate::storage::file::HostFs;
use crate::storage::memory::MemoryHost;
use crate::storage::{Access, Host};

const MIB: u64 = 1 << 20;
const PATH: &str = "/d/x.vhdx";

fn spec(size: u64) -> CreateSpec {
    CreateSpec { size, ..CreateSpec::default() }
}

/// A memory host with a new image at [`PATH`].
fn created(spec: &CreateSpec) -> Arc<dyn Host> {
    let host = MemoryHost::new();
    formats::create(&Vhdx, &*host, Path::new(PATH), spec).unwrap();
    host
}

fn open_with(host: &Arc<dyn Host>, path: &str, access: Access) -> Result<Image> {
    formats::open(host, Path::new(path), &OpenOptions::new(access))
}

fn open(host: &Arc<dyn Host>) -> Image {
    open_with(host, PATH, Access::Write).unwrap()
}

fn contents(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0xcc; disk.size() as usize];
    disk.read_at(0, &mut bytes).unwrap();
    bytes
}

/// Whether a tool or the corpus may be missing. Prints why a test does nothing.
fn skip(reason: &str) {
    assert_ne!(
        std::env::var("FLATDISK_REQUIRE_TOOLS").as_deref(),
        Ok("1"),
        "needed by FLATDISK_REQUIRE_TOOLS: {reason}"
    );
    println!("SKIPPED: {reason}");
}

/// Repeats what fails because a file is locked. A program that another test is just starting holds
/// this one's files for a moment, and with them their locks.
fn when_unlocked<T>(mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
    let pause = || std::thread::sleep(std::time::Duration::from_millis(50));
    (0..100).find_map(|_| {
        attempt().or_else(|| {
            pause();
            None
        })
    })
}

/// Opens an image of the host's file system.
fn open_file(path: &Path, access: Access) -> Image {
    let host: Arc<dyn Host> = HostFs::shared();
    let image = when_unlocked(|| match formats::open(&host, path, &OpenOptions::new(access)) {
        Err(e) if e.kind() == ErrorKind::Busy => None,
        opened => Some(opened.unwrap()),
    });
    image.unwrap()
}

/// Checks an image of the host's file system.
fn check_file(path: &Path) -> Report {
    let host: Arc<dyn Host> = HostFs::shared();
    let options = OpenOptions::new(Access::Read);
    let report = when_unlocked(|| match formats::check(&host, path, &options) {
        Err(e) if e.kind() == ErrorKind::Busy => None,
        checked => Some(checked.unwrap()),
    });
    report.unwrap()
}
