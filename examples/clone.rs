//! Copies a disk into a new image of another format, and says how far it is:
//! `cargo run --example clone -- SOURCE TARGET`. Without arguments it makes a disk of its own and clones
//! that.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use flatdisk::copy::convert::From;
use flatdisk::copy::{Opened, Options, Source, Target, compare, convert};
use flatdisk::formats::{self, CreateSpec, OpenOptions};
use flatdisk::progress::Progress;
use flatdisk::storage::Access;
use flatdisk::storage::file::HostFs;

/// Prints every tenth part that is done.
#[derive(Default)]
struct Tenths {
    total: AtomicU64,
    done: AtomicU64,
}

impl Progress for Tenths {
    fn total(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
    }

    fn advance(&self, bytes: u64) {
        let before = self.done.fetch_add(bytes, Ordering::Relaxed);
        let total = self.total.load(Ordering::Relaxed).max(1);
        let tenths = |done: u64| done * 10 / total;
        if tenths(before) != tenths(before + bytes) {
            println!("{} %", tenths(before + bytes) * 10);
        }
    }
}

fn clone(source: &Path, target: &Path) -> flatdisk::Result<()> {
    let host = HostFs::shared();
    let options = OpenOptions::new(Access::Read);
    let opened = Opened::open(&host, source, &options, false)?;
    let disk = Source::Disk(opened.disk.clone());
    let from = From { source: &disk, image: opened.image.as_ref() };
    let format = Target::by_extension(target).unwrap_or(Target::Raw);
    let made = convert(&host, &from, target, format, &Options::default(), &Tenths::default())?;
    println!("{}: {} bytes", target.display(), made.size);
    let again = Opened::open(&host, target, &options, false)?;
    assert_eq!(compare(&opened.disk, &again.disk, &())?, None);
    Ok(())
}

/// A small disk with something on it.
fn sample(path: &Path) -> flatdisk::Result<()> {
    let host = HostFs::shared();
    let spec = CreateSpec { size: 64 << 20, ..CreateSpec::default() };
    formats::create(formats::by_name("vhdx")?, &*host, path, &spec)?;
    let disk = formats::open(&host, path, &OpenOptions::new(Access::Write))?.disk;
    for at in (0..disk.size()).step_by(5 << 20) {
        disk.write_at(at, b"something")?;
    }
    disk.close()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    if let [source, target] = &arguments[..] {
        return Ok(clone(source, target)?);
    }
    let dir = tempfile::tempdir()?;
    let source = dir.path().join("sample.vhdx");
    sample(&source)?;
    Ok(clone(&source, &dir.path().join("clone.vmdk"))?)
}
