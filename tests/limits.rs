//! What looking at the largest images costs: memory that does not grow with them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "hostile/meter.rs"]
#[allow(dead_code)]
mod meter;

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use flatdisk::error::{Error, ErrorKind, Result};
use flatdisk::formats::{self, CreateSpec, OpenOptions, Report, Scope};
use flatdisk::storage::memory::{MemoryFile, MemoryHost};
use flatdisk::storage::{Access, FileIdentity, Host, Storage};

#[global_allocator]
static MEMORY: meter::Counting = meter::Counting;

/// Most memory that anything may hold, in bytes.
const MAX_MEMORY: usize = 64 << 20;
const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;
/// A step that takes longer hangs, in seconds.
const PATIENCE: u64 = 120;

/// Runs `f`, which must hold little memory and end.
fn measured<R>(name: &str, f: impl FnOnce() -> R) -> R {
    let start = Instant::now();
    let (result, peak) = meter::peak(f);
    println!("{name}: {:?}, {} KiB", start.elapsed(), peak >> 10);
    assert!(peak < MAX_MEMORY, "{name} holds {} MiB", peak >> 20);
    assert!(start.elapsed().as_secs() < PATIENCE, "{name} takes {:?}", start.elapsed());
    result
}

fn made(format: &str, subformat: &str, size: u64, block: Option<u64>) -> Arc<MemoryHost> {
    let host = MemoryHost::new();
    let spec = CreateSpec {
        subformat: Some(subformat.into()),
        size,
        block_size: block,
        logical_sector: (format == "vhdx").then_some(512),
        ..CreateSpec::default()
    };
    formats::create(formats::by_name(format).unwrap(), &*host, &path(format), &spec).unwrap();
    host
}

fn path(format: &str) -> PathBuf {
    Path::new("/t/disk").with_extension(format)
}

/// The value of the table entry at a byte of the file, if there is one; or what else is there.
type Filling = Box<dyn Fn(u64, &mut [u8]) + Send + Sync>;

/// A file whose tables are worked out when they are read.
struct Computed {
    base: Arc<MemoryFile>,
    len: u64,
    fill: Filling,
}

impl std::fmt::Debug for Computed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Computed").field("len", &self.len).finish_non_exhaustive()
    }
}

impl Storage for Computed {
    fn len(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        if at + buf.len() as u64 > self.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buf.fill(0);
        let there = self.base.len()?.saturating_sub(at).min(buf.len() as u64);
        if there > 0 {
            self.base.read_at(at, &mut buf[..there as usize])?;
        }
        (self.fill)(at, buf);
        Ok(())
    }

    fn write_at(&self, _at: u64, _data: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn punch_hole(&self, _at: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn allocate(&self, _at: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        Ok((at < self.len).then_some(at..self.len))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn path(&self) -> &Path {
        self.base.path()
    }

    fn writable(&self) -> bool {
        false
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        self.base.identity()
    }
}

/// A host with one file.
#[derive(Debug)]
struct One(Arc<Computed>);

impl Host for One {
    fn open(&self, path: &Path, _access: Access) -> Result<Arc<dyn Storage>> {
        match path == self.0.path() {
            true => Ok(self.0.clone()),
            false => Err(Error::new(ErrorKind::NotFound, "no such file").in_file(path)),
        }
    }

    fn open_beneath(&self, root: &Path, name: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        self.open(&root.join(name), access)
    }

    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        Err(Error::new(ErrorKind::Denied, "read only").in_file(path))
    }

    fn replace(&self, path: &Path, _contents: &[u8]) -> Result<()> {
        Err(Error::new(ErrorKind::Denied, "read only").in_file(path))
    }

    fn remove(&self, path: &Path) -> Result<()> {
        Err(Error::new(ErrorKind::Denied, "read only").in_file(path))
    }

    fn sync_dir(&self, _dir: &Path) -> Result<()> {
        Ok(())
    }

    fn list(&self, _dir: &Path) -> Result<Vec<PathBuf>> {
        Ok(Vec::new())
    }
}

/// Puts the entries of a table into what was read of it: `entry` gives entry number `n` of `width`
/// bytes, the table lies at `table` of the file.
fn put_entries(
    at: u64,
    buf: &mut [u8],
    table: &Range<u64>,
    width: u64,
    entry: impl Fn(u64) -> Option<u64>,
    big: bool,
) {
    let from = at.max(table.start).next_multiple_of(width);
    let until = (at + buf.len() as u64).min(table.end);
    for place in (from..until).step_by(width as usize) {
        let Some(value) = entry((place - table.start) / width) else { continue };
        let bytes = if big { value.to_be_bytes() } else { value.to_le_bytes() };
        let bytes = if big { &bytes[8 - width as usize..] } else { &bytes[..width as usize] };
        let to = (place - at) as usize;
        let room = (buf.len() - to).min(width as usize);
        buf[to..to + room].copy_from_slice(&bytes[..room]);
    }
}

fn number(file: &MemoryFile, at: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_at(at, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

/// Checks an image of which nothing is repaired, and plans that if it is `planned`.
fn check(name: &str, file: Computed, planned: bool) -> Report {
    let image = file.base.path().to_owned();
    let host: Arc<dyn Host> = Arc::new(One(Arc::new(file)));
    let options = OpenOptions::new(Access::Read);
    let report = measured(name, || formats::check(&host, &image, &options).unwrap());
    if planned {
        let plan = || formats::repair(&host, &image, &options, Scope::All, true).unwrap();
        let repair = measured(&format!("{name}, planning a repair"), plan);
        assert!(repair.changes.is_empty(), "{name}: {:?}", repair.changes);
    }
    report
}

#[test]
fn full_vhd_of_2040_gib() {
    let size = 2040u64 << 30;
    let base = made("vhd", "dynamic", size, None).file(&path("vhd")).unwrap();
    let blocks = size / (2 * MIB);
    let table = 1536..1536 + blocks * 4;
    let first = table.end.next_multiple_of(512);
    let stride = 2 * MIB + 512;
    let len = first + blocks * stride + 512;
    let mut footer = [0; 512];
    base.read_at(0, &mut footer).unwrap();
    let head_len = 1536;
    let fill = move |at: u64, buf: &mut [u8]| {
        put_entries(at, buf, &table, 4, |n| Some((first + n * stride) / 512), true);
        if at == len - 512 {
            buf.copy_from_slice(&footer);
        } else if at >= first && (at - first).is_multiple_of(stride) && buf.len() == 512 {
            buf.fill(0xff);
        }
    };
    let head = MemoryFile::new(base.path(), &base.to_vec()[..head_len]);
    let report = check("VHD", Computed { base: head, len, fill: Box::new(fill) }, true);
    assert_eq!((report.errors, report.leaks), (0, 0), "{:?}", report.findings);
    assert_eq!(report.allocated_blocks, blocks);
}

#[test]
fn full_vhdx_of_64_tib() {
    let size = 64 * TIB - 4096 * MIB;
    let base = made("vhdx", "dynamic", size, Some(MIB)).file(&path("vhdx")).unwrap();
    let (blocks, ratio) = (size / MIB, 4096);
    let at = 3 * MIB;
    let entries = blocks + blocks.div_ceil(ratio) - 1;
    let table = at..at + entries * 8;
    let first = table.end.next_multiple_of(MIB);
    let len = first + blocks * MIB;
    let fill = move |at: u64, buf: &mut [u8]| {
        let entry = |n: u64| {
            let (chunk, place) = (n / (ratio + 1), n % (ratio + 1));
            (place < ratio).then(|| (first + (chunk * ratio + place) * MIB) | 6)
        };
        put_entries(at, buf, &table, 8, entry, false);
    };
    let report = check("VHDX", Computed { base, len, fill: Box::new(fill) }, true);
    assert_eq!((report.errors, report.leaks), (0, 0), "{:?}", report.findings);
    assert_eq!(report.allocated_blocks, blocks);
}

#[test]
fn full_vmdk_of_nearly_2_tib() {
    let grains = 32u64 * (1 << 20) - 8192 * 8;
    let size = grains * 65536;
    let base = made("vmdk", "monolithicSparse", size, None).file(&path("vmdk")).unwrap();
    let tables = grains / 512;
    let gd_len = (tables * 4).next_multiple_of(512);
    let places = [56, 48].map(|field| {
        let first = number(&base, field) * 512 + gd_len;
        first..first + grains * 4
    });
    let overhead = number(&base, 64);
    let len = (overhead + grains * 128) * 512;
    let fill = move |at: u64, buf: &mut [u8]| {
        for table in &places {
            put_entries(at, buf, table, 4, |n| Some(overhead + n * 128), false);
        }
    };
    let report = check("VMDK", Computed { base, len, fill: Box::new(fill) }, false);
    assert_eq!((report.errors, report.leaks), (0, 0), "{:?}", report.findings);
    assert_eq!(report.allocated_blocks, grains);
}

/// As many blocks in one place would be as many copies of it.
#[test]
fn disks_of_which_all_blocks_share_one_place_are_not_copied() {
    let size = 2040u64 << 30;
    let vhd = made("vhd", "dynamic", size, None).file(&path("vhd")).unwrap();
    let table = 1536..1536 + size / (2 * MIB) * 4;
    let (first, len) = (table.end.next_multiple_of(512), 2 * TIB - 1024);
    let mut footer = [0; 512];
    vhd.read_at(0, &mut footer).unwrap();
    let head = MemoryFile::new(vhd.path(), &vhd.to_vec()[..1536]);
    let fill = move |at: u64, buf: &mut [u8]| {
        put_entries(at, buf, &table, 4, |_| Some(first / 512), true);
        if at == len - 512 {
            buf.copy_from_slice(&footer);
        }
    };
    let report = check("VHD", Computed { base: head, len, fill: Box::new(fill) }, true);
    assert!(report.errors > 0);
    let vhdx = made("vhdx", "dynamic", TIB, Some(MIB)).file(&path("vhdx")).unwrap();
    let entries = TIB / MIB + TIB / MIB / 4096 - 1;
    let table = 3 * MIB..3 * MIB + entries * 8;
    let place = table.end.next_multiple_of(MIB);
    let fill = move |at: u64, buf: &mut [u8]| {
        put_entries(at, buf, &table, 8, |n| (n % 4097 < 4096).then_some(place | 6), false);
    };
    let len = place + MIB;
    let report = check("VHDX", Computed { base: vhdx, len, fill: Box::new(fill) }, true);
    assert!(report.errors > 0);
}

/// Gives a sparse VMDK grains of `grain` sectors, and so more capacity, in header and descriptor.
fn stretch(file: &MemoryFile, grain: u64) {
    let capacity = number(file, 12);
    let stretched = capacity / 128 * grain;
    file.write_at(12, &stretched.to_le_bytes()).unwrap();
    file.write_at(20, &grain.to_le_bytes()).unwrap();
    let mut text = [0; 10240];
    file.read_at(512, &mut text).unwrap();
    let text = String::from_utf8_lossy(&text);
    let text = text.replace(&format!("RW {capacity} "), &format!("RW {stretched} "));
    file.write_at(512, &text.as_bytes()[..10240]).unwrap();
}

#[test]
fn large_grains_that_are_not_aligned_take_little_time_and_memory() {
    const GRAIN: u64 = 4096;
    let grains = 512 * 1954;
    let base = made("vmdk", "monolithicSparse", grains * 65536, None).file(&path("vmdk")).unwrap();
    stretch(&base, GRAIN);
    let gd_len = (grains / 512 * 4u64).next_multiple_of(512);
    let places = [56, 48].map(|field| {
        let first = number(&base, field) * 512 + gd_len;
        first..first + grains * 4
    });
    let first = number(&base, 64) + 1;
    for (distance, errors) in [(GRAIN, 0), (GRAIN + 1, 0), (GRAIN - 1, grains - 1)] {
        let places = places.clone();
        let fill = move |at: u64, buf: &mut [u8]| {
            for table in &places {
                put_entries(at, buf, table, 4, |n| Some(first + n * distance), false);
            }
        };
        let base = base.clone();
        let len = (first + (grains - 1) * distance + GRAIN) * 512;
        let name = format!("VMDK, a grain each {distance} sectors");
        let report = check(&name, Computed { base, len, fill: Box::new(fill) }, false);
        assert_eq!((report.errors, report.leaks), (errors, 0), "{:?}", report.findings);
        assert_eq!(report.allocated_blocks, grains);
    }
}

#[test]
fn a_grain_directory_that_is_a_huge_hole_takes_no_memory() {
    let file = made("vmdk", "monolithicSparse", 40 * MIB, None).file(&path("vmdk")).unwrap();
    let capacity = (32u64 << 20) * 512 * 128;
    file.write_at(12, &capacity.to_le_bytes()).unwrap();
    file.write_at(48, &(1u64 << 20).to_le_bytes()).unwrap();
    file.write_at(56, &(2u64 << 20).to_le_bytes()).unwrap();
    file.set_len(4 << 30).unwrap();
    let mut text = [0; 10240];
    file.read_at(512, &mut text).unwrap();
    let text = String::from_utf8_lossy(&text).replace("RW 81920 ", &format!("RW {capacity} "));
    file.write_at(512, &text.as_bytes()[..10240]).unwrap();
    let host = MemoryHost::new();
    host.insert(file);
    let host: Arc<dyn Host> = host;
    let image = path("vmdk");
    let options = OpenOptions::new(Access::Write);
    let report = measured("hole", || formats::check(&host, &image, &options).unwrap());
    assert_eq!((report.blocks, report.allocated_blocks), (capacity / 128, 0));
    let plan = || formats::repair(&host, &image, &options, Scope::All, true);
    measured("hole, planning a repair", plan).unwrap();
    let disk = formats::open(&host, &image, &options).unwrap().disk;
    let _ = measured("hole, first write", || disk.write_at(0, &[1; 512]));
}

#[test]
fn a_child_that_owns_every_other_sector_is_searched_in_little_memory() {
    const BLOCK: u64 = 256 * MIB;
    let host = made("vhd", "dynamic", 8 * BLOCK, Some(BLOCK));
    let dynamic: Arc<dyn Host> = host.clone();
    let parent = formats::open(&dynamic, &path("vhd"), &OpenOptions::new(Access::Read)).unwrap();
    let child = Path::new("/t/child.vhd");
    formats::vhd::create_child(&*host, child, &parent, Some(BLOCK)).unwrap();
    drop(parent);
    let image = formats::open(&dynamic, child, &OpenOptions::new(Access::Write)).unwrap();
    for block in 0..8 {
        image.disk.write_at(block * BLOCK, &[1; 512]).unwrap();
    }
    image.disk.close().unwrap();
    drop(image);
    let file = host.file(child).unwrap();
    let at = number(&file, 512 + 16).swap_bytes();
    for block in 0..8 {
        let mut entry = [0; 4];
        file.read_at(at + block * 4, &mut entry).unwrap();
        let bitmap = u64::from(u32::from_be_bytes(entry)) * 512;
        file.punch_hole(bitmap, BLOCK / 4096 + BLOCK).unwrap();
        file.write_at(bitmap, &vec![0xaa; (BLOCK / 4096) as usize]).unwrap();
    }
    let open = || formats::open(&dynamic, child, &OpenOptions::new(Access::Write)).unwrap().disk;
    let disk = open();
    let found = measured("search", || disk.next_data(0).unwrap());
    // Bitmaps and data share the pages that the host calls data.
    assert!(found.is_none_or(|data| data.start < 8 * BLOCK), "no end");
    let mut pos = BLOCK / 2;
    measured("search from the middle of blocks", || {
        while pos < 8 * BLOCK {
            let data = disk.next_data(pos).unwrap();
            pos = data.map_or(u64::MAX, |data| (data.start / BLOCK + 1) * BLOCK + BLOCK / 2);
        }
    });
    let mut bytes = [9; 1024];
    disk.read_at(BLOCK + 512 * 7, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 1024]);
}
