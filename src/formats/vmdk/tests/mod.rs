//! Tests of the driver as a whole, through `formats::open` and [`Disk`].
//!
//! # Files
//!
//! - `broken`: disks of which something is gone;
//! - `chains`: children, and the ESX kinds of extents that chains are made of;
//! - `corpus`: images made by other programs;
//! - `crash`: power cuts, on disks that the crash tests of all formats do not have;
//! - `hostile`: images with arbitrary bytes changed, and hosts that fail;
//! - `model`: random operations against a plain vector;
//! - `opening`: which images open, and why the others do not;
//! - `qemu`: the same disks through QEMU's tools, in both directions;
//! - `streaming`: stream-optimised images, in every layout that writers use;
//! - `writing`: what writing leaves in the files.

mod broken;
mod chains;
mod corpus;
mod crash;
mod hostile;
mod model;
mod opening;
mod qemu;
mod streaming;
mod writing;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Vmdk, create};
use crate::disk::Disk;
use crate::disk::map::Source;
use crate::disk::tables::CacheBudget;
use crate::error::{Error, Result};
use crate::formats::{self, CreateSpec, Image, OpenOptions, Report};
use crate::storage::memory::{MemoryFile, MemoryHost};
use crate::storage::{Access, Host};

/// What can be created and then written.
fn writable_subformats() -> impl Iterator<Item = &'static str> {
    create::SUBFORMATS.into_iter().filter(|subformat| *subformat != "streamOptimized")
}

/// Where a file of a test is.
fn at(name: &str) -> PathBuf {
    Path::new("/d").join(name)
}

/// A host in memory holding `files`.
fn host(files: &[(&str, &[u8])]) -> Arc<MemoryHost> {
    let host = MemoryHost::new();
    for (name, bytes) in files {
        host.insert(MemoryFile::new(at(name), bytes));
    }
    host
}

fn open_with(host: &Arc<MemoryHost>, name: &str, access: Access) -> Result<Image> {
    let host: Arc<dyn Host> = host.clone();
    formats::open(&host, &at(name), &OpenOptions::new(access))
}

fn open_rw(host: &Arc<MemoryHost>, name: &str) -> Image {
    let image = open_with(host, name, Access::Write).unwrap();
    assert_eq!(image.disk.read_only(), None);
    image
}

/// As [`open_rw`], with room for hardly any table in memory.
fn open_starved(host: &Arc<MemoryHost>, name: &str) -> Image {
    let host: Arc<dyn Host> = host.clone();
    let budget = CacheBudget::new(1);
    let options = OpenOptions { budget, ..OpenOptions::new(Access::Write) };
    formats::open(&host, &at(name), &options).unwrap()
}

fn refused(host: &Arc<MemoryHost>, name: &str) -> Error {
    open_with(host, name, Access::Read).expect_err(name)
}

fn check(host: &Arc<MemoryHost>, name: &str) -> Report {
    let host: Arc<dyn Host> = host.clone();
    formats::check(&host, &at(name), &OpenOptions::new(Access::Read)).unwrap()
}

#[track_caller]
fn assert_clean(host: &Arc<MemoryHost>, name: &str) {
    let report = check(host, name);
    assert_eq!((report.errors, report.leaks), (0, 0), "{:#?}", report.findings);
}

fn spec(subformat: &str, size: u64) -> CreateSpec {
    CreateSpec { subformat: Some(subformat.to_owned()), size, ..Default::default() }
}

/// A new disk called `name`, in memory.
fn created(name: &str, spec: &CreateSpec) -> Arc<MemoryHost> {
    let host = MemoryHost::new();
    formats::create(&Vmdk, &*host, &at(name), spec).unwrap();
    host
}

/// A descriptor of type `custom` with the given extent lines.
fn custom(lines: &str) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n\
         createType=\"custom\"\n{lines}\n#DDB\nddb.adapterType = \"ide\"\n"
    )
}

/// Adds a new sparse extent without descriptor.
fn add_sparse(host: &Arc<MemoryHost>, name: &str, sectors: u64, grain: u64) {
    let file = host.create(&at(name)).unwrap();
    create::write_sparse(&*file, sectors, grain, false, None).unwrap();
}

fn add(host: &Arc<MemoryHost>, name: &str, bytes: &[u8]) {
    host.insert(MemoryFile::new(at(name), bytes));
}

fn contents(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(0, &mut bytes).unwrap();
    bytes
}

fn sources(disk: &Disk) -> Vec<(u64, Source)> {
    disk.extents(0..disk.size()).unwrap().iter().map(|e| (e.len, e.source)).collect()
}

/// Copies all files of a host, as a crash would leave them if nothing were lost.
fn copy(from: &Arc<MemoryHost>) -> Arc<MemoryHost> {
    let host = MemoryHost::new();
    for file in from.files() {
        host.insert(MemoryFile::new(crate::storage::Storage::path(&*file), &file.to_vec()));
    }
    host
}
