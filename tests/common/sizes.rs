//! Changes of an image's size and of its layout, and what a crash may leave of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use flatdisk::error::Result;
use flatdisk::formats::resize::{Resized, resize};
use flatdisk::formats::{self, CreateSpec, OpenOptions};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::{Access, Host};

use super::crash::contents;
use super::history::{SECTOR, Sectors};
use super::images::{Image, Kind, errors, offered};
use super::pattern;

const MIB: u64 = 1 << 20;

/// A change of an image.
pub struct Case {
    pub image: Image,
    /// A child of it is what changes.
    pub child: bool,
    /// Size of the disk afterwards.
    pub size: u64,
    /// Called on the image with its data, before.
    pub prepare: fn(&Arc<dyn Host>, &Path),
}

impl Case {
    pub fn name(&self) -> String {
        let child = if self.child { "child of " } else { "" };
        format!("{child}{} to {} bytes", self.image.name(), self.size)
    }

    pub fn path(&self) -> PathBuf {
        match self.child {
            true => Path::new("/t/child").with_extension(self.image.format),
            false => self.image.path(),
        }
    }

    /// The image with data all over it.
    pub fn made(&self) -> Made<'_> {
        let host = MemoryHost::new();
        self.image.create(&host).unwrap();
        let dynamic: Arc<dyn Host> = host.clone();
        scatter(&dynamic, &self.image.path(), 1);
        if self.child {
            let parent =
                formats::open(&dynamic, &self.image.path(), &OpenOptions::new(Access::Read))
                    .unwrap();
            let format = formats::by_name(self.image.format).unwrap();
            formats::create_child(format, &*host, &self.path(), &parent, &CreateSpec::default())
                .unwrap();
            drop(parent);
            scatter(&dynamic, &self.path(), 100);
        }
        (self.prepare)(&dynamic, &self.path());
        let (size, whole) = read(&dynamic, &self.path()).unwrap();
        Made { case: self, host, size, whole }
    }

    /// Makes the change.
    pub fn run(&self, host: &Arc<dyn Host>) -> Result<Resized> {
        resize(host, &self.path(), &OpenOptions::new(Access::Write), self.size, false, &())
    }
}

/// Writes to places from the beginning to the last sector of a disk, out of order, and gives some up.
pub fn scatter(host: &Arc<dyn Host>, path: &Path, stamp: u32) {
    let disk = formats::open(host, path, &OpenOptions::new(Access::Write)).unwrap().disk;
    let (size, block) = (disk.size(), disk.geometry().block_size.min(2 * MIB));
    let blocks = size.div_ceil(block);
    let places = [blocks - 1, 0, blocks / 2, 1, blocks / 3, blocks * 2 / 3];
    for (index, number) in places.into_iter().enumerate() {
        let end = ((number + 1) * block).min(size);
        for at in [number * block, end - (end - number * block).min(2048)] {
            let data = pattern::bytes(stamp + index as u32, at, 2048.min(size - at));
            disk.write_at(at, &data).unwrap();
        }
    }
    disk.flush().unwrap();
    disk.discard(block, block.min(size - block)).unwrap();
    disk.close().unwrap();
}

/// Size and contents of a disk.
pub fn read(host: &Arc<dyn Host>, path: &Path) -> std::result::Result<(u64, Sectors), String> {
    let image = formats::open(host, path, &OpenOptions::new(Access::Read));
    let disk = image.map_err(|e| e.to_string())?.disk;
    Ok((disk.size(), contents(&disk)?))
}

/// An image before a change.
pub struct Made<'a> {
    pub case: &'a Case,
    pub host: Arc<MemoryHost>,
    /// Bytes of the disk.
    pub size: u64,
    /// What it holds.
    pub whole: Sectors,
}

impl Made<'_> {
    /// What the disk must hold of its first `size` bytes.
    pub fn kept(&self, size: u64) -> Sectors {
        self.whole
            .range(..size / SECTOR)
            .map(|(number, sector)| (*number, sector.clone()))
            .collect()
    }

    /// Whether a crash may leave `state`; `done`: the change had returned.
    pub fn judge(&self, state: &Arc<MemoryHost>, done: bool) -> std::result::Result<(), String> {
        let (host, path): (Arc<dyn Host>, _) = (state.fork(), self.case.path());
        let (size, found) = read(&host, &path).map_err(|e| format!("after the crash: {e}"))?;
        if size != self.case.size && (done || size != self.size) {
            return Err(format!("the disk has {size} bytes after the crash"));
        }
        let kept = self.case.size.min(self.size);
        if found.range(..kept / SECTOR).ne(self.kept(kept).iter()) {
            return Err("data is lost or wrong after the crash".to_owned());
        }
        // Behind the end of a smaller disk there is the old data or nothing.
        let behind = found.range(kept / SECTOR..);
        let wrong = behind.filter(|(number, sector)| self.whole.get(number) != Some(sector));
        if let Some((number, _)) = wrong.into_iter().next() {
            return Err(format!("sector {number} holds what was never there"));
        }
        let mut wrong = errors(&host, &path).map_err(|e| e.to_string())?;
        // While a VHD's footers change, they differ.
        wrong.retain(|error| done || !error.contains("footer"));
        if !wrong.is_empty() {
            return Err(format!("the check finds: {}", wrong.join("; ")));
        }
        self.case.run(&host).map_err(|e| format!("the second time: {e}"))?;
        self.judge_end(&host).map_err(|e| format!("the second time: {e}"))
    }

    /// Whether the change is complete.
    pub fn judge_end(&self, host: &Arc<dyn Host>) -> std::result::Result<(), String> {
        let path = self.case.path();
        let (size, found) = read(host, &path)?;
        if size != self.case.size || found != self.kept(size) {
            let first =
                found.iter().zip(self.kept(size)).find(|((a, x), (b, y))| *a != b || *x != y);
            return Err(format!("{size} bytes, {} sectors; {first:?}", found.len()));
        }
        let wrong = errors(host, &path).map_err(|e| e.to_string())?;
        if !wrong.is_empty() {
            return Err(format!("the check finds: {}", wrong.join("; ")));
        }
        let again = self.case.run(host).map_err(|e| e.to_string())?;
        if !again.changes.is_empty() {
            return Err(format!("the same size changes {:?}", again.changes));
        }
        Ok(())
    }
}

fn nothing(_: &Arc<dyn Host>, _: &Path) {}

fn case(image: Image, size: u64) -> Case {
    Case { image, child: false, size, prepare: nothing }
}

/// Larger disks, of every kind, and across every border of their tables.
pub fn grown() -> Vec<Case> {
    let vhd = |size, block| Image::new("vhd", "dynamic", size).block(block);
    let vhdx = |size| Image::new("vhdx", "dynamic", size).block(MIB).sector(512);
    let vmdk = |subformat, size| Image::new("vmdk", subformat, size);
    let child = |case| Case { child: true, ..case };
    let all = vec![
        case(Image::new("vhd", "fixed", 3 * MIB + 5 * SECTOR), 5 * MIB),
        case(vhd(3 * MIB + 5 * SECTOR, MIB / 2), 3 * MIB + 6 * SECTOR),
        case(vhd(3 * MIB + 5 * SECTOR, MIB / 2), 64 * MIB),
        case(vhd(3 * MIB + 5 * SECTOR, MIB / 2), 64 * MIB + SECTOR),
        case(vhd(7 * MIB + 5 * SECTOR, 2 * MIB), 200 << 30),
        case(vhd(400 << 10, 4096), 12 * MIB),
        case(vhd(3 * MIB, MIB / 2).tweaked("batmap", super::repairs::xen), 70 * MIB),
        child(case(vhd(3 * MIB + 5 * SECTOR, MIB / 2), 70 * MIB)),
        case(vhdx(5 * MIB + 3 * SECTOR), 5 * MIB + 4 * SECTOR),
        case(vhdx(5 * MIB + 3 * SECTOR), 6 << 30),
        case(vhdx(5 * MIB + 3 * SECTOR), (128 << 30) + SECTOR),
        case(
            Image::new("vhdx", "dynamic", 9 * MIB).block(2 * MIB).sector(4096),
            (256 << 30) + 4096,
        ),
        case(Image::new("vhdx", "fixed", 4 * MIB).block(MIB).sector(512), 6 * MIB + SECTOR),
        child(case(vhdx(5 * MIB + 3 * SECTOR), 70 << 30)),
        case(vmdk("monolithicSparse", 40 * MIB + 5 * SECTOR), 64 * MIB),
        case(vmdk("monolithicSparse", 40 * MIB + 5 * SECTOR), 64 * MIB + SECTOR),
        case(vmdk("monolithicSparse", 40 * MIB + 5 * SECTOR), 9 << 30),
        case(vmdk("twoGbMaxExtentSparse", 2047 * MIB + 300 * SECTOR), 2087 * MIB),
        case(vmdk("twoGbMaxExtentSparse", 2047 * MIB + 300 * SECTOR), 5 << 30),
        case(vmdk("monolithicFlat", MIB + SECTOR), 2 * MIB),
        case(vmdk("twoGbMaxExtentFlat", 2047 * MIB + SECTOR), 5 << 30),
        case(vmdk("vmfs", MIB), 3 * MIB),
        case(vmdk("vmfsSparse", 2 * MIB + 67 * SECTOR), 600 * MIB),
    ];
    picked(all)
}

/// Smaller disks.
pub fn shrunk() -> Vec<Case> {
    let vmdk = |subformat, size| Image::new("vmdk", subformat, size);
    let all = vec![
        case(Image::new("vhd", "fixed", 3 * MIB + 5 * SECTOR), MIB + SECTOR),
        case(Image::new("vhd", "dynamic", 3 * MIB + 5 * SECTOR).block(MIB / 2), MIB + SECTOR),
        case(Image::new("vhd", "dynamic", 7 * MIB).block(2 * MIB), 4 * MIB),
        case(
            Image::new("vhdx", "dynamic", 5 * MIB + 3 * SECTOR).block(MIB).sector(512),
            3 * MIB / 2,
        ),
        case(Image::new("vhdx", "fixed", 4 * MIB).block(MIB).sector(512), 2 * MIB),
        case(vmdk("monolithicSparse", 140 * MIB + 5 * SECTOR), 50 * MIB + SECTOR),
        case(vmdk("twoGbMaxExtentSparse", 2047 * MIB + 300 * SECTOR), 100 * MIB),
        case(vmdk("monolithicFlat", MIB + SECTOR), MIB / 2),
        case(vmdk("twoGbMaxExtentFlat", 2047 * MIB + SECTOR), MIB),
        case(vmdk("vmfsSparse", 5 * MIB + 67 * SECTOR), 2 * MIB + SECTOR),
    ];
    picked(all)
}

fn picked(all: Vec<Case>) -> Vec<Case> {
    let only = std::env::var("FLATDISK_ONLY").unwrap_or_default();
    all.into_iter()
        .filter(|case| !offered(vec![case.image.clone()]).is_empty())
        .filter(|case| case.name().contains(&only))
        .collect()
}
