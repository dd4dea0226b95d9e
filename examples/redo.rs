//! A redo log: what is written to a disk goes to a child of it, and is merged in the end, or thrown away:
//! `cargo run --example redo`.

use std::path::Path;

use flatdisk::formats::chain::{Merging, merge};
use flatdisk::formats::{self, CreateSpec, snapshot};
use flatdisk::storage::file::HostFs;
use flatdisk::{ErrorKind, OpenOptions};

fn write(path: &Path, text: &[u8]) -> flatdisk::Result<()> {
    let disk = OpenOptions::default().write(true).open(path)?.disk;
    disk.write_at(1 << 20, text)?;
    // Durable, and the image marked clean.
    disk.close()
}

fn read(path: &Path) -> flatdisk::Result<Vec<u8>> {
    let mut text = vec![0; 3];
    flatdisk::open(path)?.disk.read_at(1 << 20, &mut text)?;
    Ok(text)
}

/// Writes to a disk through a redo log that is thrown away, and through one that is merged.
pub fn demonstrate() -> Result<(), Box<dyn std::error::Error>> {
    let host = HostFs::shared();
    let options = OpenOptions::default();
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("disk.vhdx");
    let spec = CreateSpec { size: 64 << 20, ..CreateSpec::default() };
    formats::create(formats::by_name("vhdx")?, &*host, &path, &spec)?;
    write(&path, b"old")?;

    // The disk stays as it is under the name `disk-base.vhdx`; a child of it has its name.
    snapshot::take(&host, &path, Some("base"), "base", &options)?;
    write(&path, b"new")?;
    println!("written: {}", String::from_utf8_lossy(&read(&path)?));
    snapshot::revert(&host, &path, "base", &options)?;
    println!("thrown away: {}", String::from_utf8_lossy(&read(&path)?));
    assert_eq!(read(&path)?, b"old");

    write(&path, b"new")?;
    let merged = merge(&host, &path, &options, Merging::default(), &())?;
    println!("merged: {} bytes", merged.bytes);
    let base = dir.path().join("disk-base.vhdx");
    assert_eq!(read(&base)?, b"new");
    assert!(flatdisk::open(&path).is_err_and(|e| e.kind() == ErrorKind::NotFound));
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    demonstrate()
}
