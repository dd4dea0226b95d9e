//! Tests of the driver as a whole, through the disk.

mod corpus;
mod interop;
mod model;

use std::path::Path;
use std::sync::Arc;

use super::Vhdx;
use crate::disk::Disk;
use crate::error::Result;
use crate::formats::{self, CreateSpec, Image, OpenOptions};
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
