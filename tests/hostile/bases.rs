//! Intact images to be damaged, and where their structures are.
//!
//! What a base knows about itself is found out by reading it: everything that is not zero and that
//! no extent of the disk maps is structure. Only where checksums are is known by format.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flatdisk::disk::map::Source;
use flatdisk::error::Result;
use flatdisk::formats::{self, CreateSpec, FORMATS, OpenOptions};
use flatdisk::storage::memory::{MemoryFile, MemoryHost};
use flatdisk::storage::{Access, Host, Storage};

use crate::common::images::{Image, Kind, all_small};
use crate::common::{corpus, pattern};

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;
/// Larger files of the corpus are left out, in bytes.
const MAX_FILE: u64 = 40 * MIB;
/// Longest run of structures in which every sector is a target.
const RUN_SECTORS: u64 = 64;

/// A checksum over part of a file.
#[derive(Debug, Clone)]
pub struct Seal {
    pub file: usize,
    /// What is summed up, with the sum itself as zeroes.
    pub range: Range<u64>,
    /// Where the sum is, from the range's start.
    pub field: u64,
    pub kind: Sum,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sum {
    /// Complement of the sum of bytes, big-endian.
    Vhd,
    /// CRC-32C, little-endian.
    Crc32c,
}

/// One file of a base.
#[derive(Debug)]
pub struct BaseFile {
    pub path: PathBuf,
    pub len: u64,
    /// Runs of structures: for each the places in it that hold something.
    pub runs: Vec<Vec<u64>>,
    /// The part that is text.
    pub text: Option<Range<u64>>,
}

/// An intact image.
#[derive(Debug)]
pub struct Base {
    pub name: String,
    pub format: &'static str,
    pub host: Arc<MemoryHost>,
    pub image: PathBuf,
    pub disk_size: u64,
    pub files: Vec<BaseFile>,
    pub seals: Vec<Seal>,
}

impl Base {
    /// Looks through an image that opens.
    fn survey(name: String, host: Arc<MemoryHost>, image: PathBuf) -> Result<Self> {
        let dynamic: Arc<dyn Host> = host.clone();
        let opened = formats::open(&dynamic, &image, &OpenOptions::new(Access::Read))?;
        let disk = &opened.disk;
        // The payload of the disk itself; a parent is another image and all structure here.
        let mut payload: Vec<(PathBuf, Range<u64>)> = Vec::new();
        let mut pos = 0;
        while pos < disk.size() {
            let end = disk.size().min(pos + (64 << 20));
            for extent in disk.extents(pos..end)?.iter() {
                if let Source::File { file, at } = extent.source
                    && let Some(path) = payload_path(&host, &opened, file)
                {
                    payload.push((path, at..at + extent.len));
                }
            }
            pos = end;
        }
        let mut files = Vec::new();
        for file in host.files() {
            let own: Vec<_> =
                payload.iter().filter(|p| p.0 == file.path()).map(|p| p.1.clone()).collect();
            files.push(survey_file(&file, &own));
        }
        files.sort_by_key(|file| file.path != image);
        let seals = files.iter().enumerate().flat_map(|(i, f)| seals(&host, i, &f.path)).collect();
        let disk_size = disk.size();
        Ok(Self { name, format: opened.info.format, host, image, disk_size, files, seals })
    }
}

/// The path of one of the files that extents refer to. A driver lists the image itself, or the
/// extents in the order of its information.
fn payload_path(host: &MemoryHost, opened: &formats::Image, file: usize) -> Option<PathBuf> {
    if opened.info.extents.is_empty() {
        return Some(opened.path.clone());
    }
    let name = opened.info.extents.get(file)?;
    let path = opened.path.parent()?.join(name);
    host.file(&path).map(|file| file.path().to_owned())
}

fn survey_file(file: &MemoryFile, payload: &[Range<u64>]) -> BaseFile {
    let len = file.len().unwrap();
    let mut covered: Vec<_> = payload.to_vec();
    covered.sort_unstable_by_key(|range| range.start);
    let is_payload = |at: u64| {
        let index = covered.partition_point(|range| range.start <= at);
        index > 0 && covered[..index].iter().rev().take(64).any(|range| range.contains(&at))
    };
    let mut runs: Vec<(u64, Vec<u64>)> = Vec::new();
    let mut at = 0;
    while let Some(data) = file.next_data(at).unwrap() {
        let mut pos = data.start / SECTOR * SECTOR;
        while pos < data.end {
            let mut sector = vec![0; SECTOR.min(len - pos) as usize];
            file.read_at(pos, &mut sector).unwrap();
            if sector.iter().any(|byte| *byte != 0) && !is_payload(pos) {
                let hot = sector.chunks(4).enumerate();
                let hot = hot.filter(|(_, word)| word.iter().any(|byte| *byte != 0));
                let hot = hot.map(|(index, _)| pos + index as u64 * 4);
                match runs.last_mut() {
                    Some((end, places)) if *end == pos => {
                        *end = pos + SECTOR;
                        if places.len() as u64 / 128 < RUN_SECTORS {
                            places.extend(hot);
                        }
                    }
                    _ => runs.push((pos + SECTOR, hot.collect())),
                }
            }
            pos += SECTOR;
        }
        at = data.end;
    }
    let text = text_of(file, len);
    BaseFile {
        path: file.path().to_owned(),
        len,
        runs: runs.into_iter().map(|r| r.1).collect(),
        text,
    }
}

/// Where a VMDK descriptor is, if there is one.
fn text_of(file: &MemoryFile, len: u64) -> Option<Range<u64>> {
    const TITLE: &[u8] = b"# Disk DescriptorFile";
    let mut head = vec![0; len.min(64 << 10) as usize];
    file.read_at(0, &mut head).unwrap();
    let start = head.windows(TITLE.len()).position(|w| w.eq_ignore_ascii_case(TITLE))?;
    let end = head[start..].iter().position(|byte| *byte == 0).map_or(head.len(), |n| start + n);
    Some(start as u64..end as u64)
}

fn number<const N: usize>(file: &MemoryFile, at: u64) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    file.read_at(at, &mut bytes).ok().map(|()| bytes)
}

/// Where the checksums of a file are.
fn seals(host: &MemoryHost, index: usize, path: &Path) -> Vec<Seal> {
    let file = host.file(path).unwrap();
    let len = file.len().unwrap();
    let mut seals = Vec::new();
    let mut add = |at: u64, len: u64, field: u64, kind: Sum| {
        seals.push(Seal { file: index, range: at..at + len, field, kind });
    };
    if number(&file, 0) == Some(*b"vhdxfile") {
        for header in [64 << 10, 128 << 10] {
            add(header, 4096, 4, Sum::Crc32c);
        }
        for table in [192 << 10, 256 << 10] {
            add(table, 64 << 10, 4, Sum::Crc32c);
        }
        for at in (MIB..(2 * MIB).min(len)).step_by(4096) {
            if number(&file, at) == Some(*b"loge") {
                let entry = u32::from_le_bytes(number(&file, at + 8).unwrap()).into();
                if at + entry <= len {
                    add(at, entry, 4, Sum::Crc32c);
                }
            }
        }
        return seals;
    }
    let Some(last) = len.checked_sub(SECTOR) else { return seals };
    for footer in BTreeSet::from([0, last]) {
        if number(&file, footer) == Some(*b"conectix") {
            add(footer, SECTOR, 64, Sum::Vhd);
            let header = u64::from_be_bytes(number(&file, footer + 16).unwrap());
            if number(&file, header) == Some(*b"cxsparse") {
                add(header, 1024, 36, Sum::Vhd);
            }
        }
    }
    seals
}

/// Images of every kind that drivers make, some of them not closed, and those of the corpus.
pub fn all() -> Vec<Base> {
    let mut bases = Vec::new();
    let mut kinds = all_small();
    for format in FORMATS {
        for subformat in format.subformats() {
            kinds.push(Box::new(Image::new(format.name(), subformat, 5 * MIB)));
        }
    }
    for kind in &kinds {
        for closed in [true, false] {
            match made(&**kind, closed) {
                Ok(base) => bases.push(base),
                Err(e) => println!("SKIPPED: {}: {e}", kind.name()),
            }
        }
    }
    bases.extend(foreign());
    bases
}

fn made(kind: &dyn Kind, closed: bool) -> Result<Base> {
    let host = MemoryHost::new();
    kind.create(&host)?;
    let dynamic: Arc<dyn Host> = host.clone();
    if let Ok(disk) = kind.open(&dynamic, Access::Write)
        && disk.read_only().is_none()
    {
        let places = [(0, 4096), (MIB - 1024, 2048), (disk.size() / 2, 1024), (disk.size(), 512)];
        for (stamp, (at, len)) in places.into_iter().enumerate() {
            let at = at.min(disk.size() - len) / SECTOR * SECTOR;
            disk.write_at(at, &pattern::bytes(stamp as u32, at, len))?;
        }
        disk.flush()?;
        disk.discard(disk.size() / 2, 512)?;
        disk.write_at(disk.size() / 4 * 3 / SECTOR * SECTOR, &[7; 512])?;
        disk.flush()?;
        if closed {
            disk.close()?;
        }
    }
    let images = host.files().into_iter().map(|file| file.path().to_owned());
    let image = images.filter(|path| path.file_stem().is_some_and(|stem| stem == "disk")).min();
    let state = if closed { "" } else { ", not closed" };
    Base::survey(kind.name() + state, host.fork(), image.expect("the image of the test"))
}

/// The small ones of the corpus.
fn foreign() -> Vec<Base> {
    let Some(folder) = corpus::folder() else { return Vec::new() };
    let rows = corpus::rows(&folder);
    let bases = crate::common::in_parallel(&rows, |row| {
        let unpacked = corpus::unpack(&folder, row);
        let host = MemoryHost::new();
        for entry in std::fs::read_dir(unpacked.dir.path()).unwrap() {
            let path = entry.unwrap().path();
            if path.metadata().unwrap().len() > MAX_FILE {
                return None;
            }
            let inside = Path::new("/t").join(path.file_name().unwrap());
            host.insert(in_memory(&inside, &std::fs::read(&path).unwrap()));
        }
        let image = Path::new("/t").join(unpacked.image.file_name().unwrap());
        Base::survey(row.id.clone(), host, image).ok()
    });
    bases.into_iter().flatten().collect()
}

/// A file in memory in which zeroes take no room.
fn in_memory(path: &Path, bytes: &[u8]) -> Arc<MemoryFile> {
    let file = MemoryFile::new(path, &[]);
    file.set_len(bytes.len() as u64).unwrap();
    for (index, chunk) in bytes.chunks(16 << 10).enumerate() {
        if chunk.iter().any(|byte| *byte != 0) {
            file.write_at(index as u64 * (16 << 10), chunk).unwrap();
        }
    }
    file
}

/// The specification that makes a small image of a subformat.
pub fn spec(subformat: &str, size: u64) -> CreateSpec {
    CreateSpec { subformat: Some(subformat.into()), size, ..CreateSpec::default() }
}
