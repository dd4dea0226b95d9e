//! Changes of size and of layout by chance, of small images: cheap to make, to stop anywhere and to look at.

use std::path::Path;
use std::sync::Arc;

use fastrand::Rng;
use flatdisk::formats::compact::Compacting;
use flatdisk::formats::{self, CreateSpec, OpenOptions};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::{Access, Host};

use super::images::{Image, Kind};
use super::pattern;
use super::sizes::{Case, Made, Work, read};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;
/// What is done to an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    Grow,
    Shrink,
    Compact,
    Defragment,
}

impl What {
    pub const ALL: [Self; 4] = [Self::Grow, Self::Shrink, Self::Compact, Self::Defragment];
}

/// A small image of a format, of any kind that has blocks to move, and now and then one that has none.
fn image(format: &'static str, random: &mut Rng) -> Image {
    let tail = SECTOR * random.u64(..8);
    match (format, random.u8(..12)) {
        ("vhd", 0) => Image::new("vhd", "fixed", 200 * KIB + tail),
        ("vhd", 1) => {
            let image = Image::new("vhd", "dynamic", random.u64(2..12) * 64 * KIB);
            image.block(64 * KIB).tweaked("batmap", super::repairs::xen)
        }
        ("vhd", n) => {
            let block = [4 * KIB, 8 * KIB, 16 * KIB][usize::from(n) % 3];
            Image::new("vhd", "dynamic", random.u64(10..140) * block + tail).block(block)
        }
        ("vhdx", 0) => Image::new("vhdx", "fixed", 3 * MIB).block(MIB).sector(512),
        ("vhdx", 1) => {
            let size = random.u64(3..8) * MIB + tail / 4096 * 4096;
            Image::new("vhdx", "dynamic", size).block(MIB).sector(4096)
        }
        ("vhdx", n) => {
            let block = if n == 2 { 2 * MIB } else { MIB };
            let size = random.u64(3..8) * MIB + tail;
            Image::new("vhdx", "dynamic", size).block(block).sector(512)
        }
        ("vmdk", 0) => Image::new("vmdk", "monolithicFlat", 200 * KIB + tail),
        ("vmdk", 1 | 2) => Image::new("vmdk", "vmfsSparse", random.u64(20..600) * 4 * KIB + tail),
        ("vmdk", 3) => {
            let size = random.u64(3..8) * MIB + tail;
            let mut image = Image::new("vmdk", "twoGbMaxExtentSparse", size).block(4 * KIB);
            image.spec.split_size = Some(2 * MIB);
            image
        }
        (_, n) => {
            let block = [4 * KIB, 8 * KIB, 64 * KIB][usize::from(n) % 3];
            Image::new("vmdk", "monolithicSparse", random.u64(20..900) * block + tail).block(block)
        }
    }
}

fn nothing(_: &Arc<dyn Host>, _: &Path) {}

/// A change of one of the images.
pub fn case(format: &'static str, what: What, random: &mut Rng) -> Case {
    let mut image = image(format, random);
    if format == "vhdx" && what == What::Defragment {
        // Every block that moves is read several times.
        image.spec.size = image.spec.size.min(5 * MIB);
    }
    let (size, sector) = (image.spec.size, u64::from(image.spec.logical_sector.unwrap_or(512)));
    let plain = image.tweak.is_none() && !image.fixed();
    let compacting = |defragment| Compacting { defragment, ..Compacting::default() };
    let (work, child) = match what {
        What::Grow => {
            let more = match random.u8(..8) {
                0 => sector,
                1 if format == "vhdx" && random.bool() => random.u64(100..300) << 30,
                1 => random.u64(50..90) * size,
                _ => random.u64(1..size * 6) / sector * sector + sector,
            };
            (Work::Resize(size + more), plain && format != "vmdk" && random.u8(..4) == 0)
        }
        What::Shrink => {
            let left = random.u64(1..size / sector) * sector;
            (Work::Resize(left), false)
        }
        What::Compact => (Work::Compact(compacting(false)), plain && random.u8(..4) == 0),
        What::Defragment => (Work::Compact(compacting(true)), plain && random.u8(..4) == 0),
    };
    Case { image, child, work, prepare: nothing }
}

/// Writes short and long pieces, zeroes and nothing to blocks in any order.
fn fill(host: &Arc<dyn Host>, path: &Path, stamp: u32, random: &mut Rng) {
    let disk = formats::open(host, path, &OpenOptions::new(Access::Write)).unwrap().disk;
    let (size, block) = (disk.size(), disk.geometry().block_size.clamp(4 * KIB, MIB));
    let blocks = size.div_ceil(block);
    for index in 0..random.u32(4..24) {
        let at = random.u64(..blocks) * block;
        let whole = block.min(size - at);
        let len = whole.min(SECTOR * random.u64(1..9));
        match random.u8(..8) {
            0 => disk.discard(at, whole).unwrap(),
            1 | 2 if block < MIB || index % 4 == 0 => {
                // Stored, and nothing but zeroes.
                disk.write_at(at, &pattern::bytes(stamp, at, SECTOR)).unwrap();
                disk.flush().unwrap();
                disk.write_at(at, &vec![0; whole as usize]).unwrap();
            }
            3 => {
                let at = at + (whole - len);
                disk.write_at(at, &pattern::bytes(stamp + index, at, len)).unwrap();
            }
            _ => disk.write_at(at, &pattern::bytes(stamp + index, at, len)).unwrap(),
        }
        if random.u8(..6) == 0 {
            disk.flush().unwrap();
        }
    }
    disk.close().unwrap();
}

/// The image of a change, with something in it.
pub fn made<'a>(case: &'a Case, random: &mut Rng) -> Made<'a> {
    let memory = MemoryHost::new();
    case.image.create(&memory).unwrap();
    let host: Arc<dyn Host> = memory.clone();
    fill(&host, &case.image.path(), 1, random);
    if case.child {
        let options = OpenOptions::new(Access::Read);
        let parent = formats::open(&host, &case.image.path(), &options).unwrap();
        let format = formats::by_name(case.image.format).unwrap();
        let spec = CreateSpec::default();
        formats::create_child(format, &*host, &case.path(), &parent, &spec).unwrap();
        drop(parent);
        fill(&host, &case.path(), 100, random);
    }
    let (size, whole) = read(&host, &case.path()).unwrap();
    Made { case, host: memory, size, whole }
}
