//! What is on a disk: partition tables, and what each volume holds.
//!
//! [`volumes`] looks for a GPT (either copy, counting sectors of 512 or 4096 bytes), then for an MBR
//! with its logical partitions, then takes the disk as one volume. The start of the disk is looked at
//! even where there is a table, for a file system that a stray table was written over.
//!
//! Everything here was written by a guest. Counts and sizes are bounded, offsets are checked, chains
//! end, and one bad entry costs itself: it is listed with a warning, or the warning says why not.
//! Nothing is written. Reading costs a few hundred KiB per volume, whatever the disk's size.
//!
//! # Files
//!
//! - `bytes`: fields of a structure that was read from a disk;
//! - `content`: what a volume holds;
//! - `files`: files of the file systems on a disk, read without a kernel and without privileges;
//! - `gpt`: the GUID partition table, from either of its copies;
//! - `hive`: hives of the Windows registry;
//! - `mbr`: the partition table of the first sector, and the chain of logical partitions;
//! - `os`: which systems are installed on a disk;
//! - `relocate`: moving the second copy of a GPT to the end of a disk that became larger, or is
//!   about to become smaller;
//! - `types`: what partition types are called.

mod bytes;
mod content;
pub mod files;
mod gpt;
mod hive;
mod mbr;
pub mod os;
pub mod relocate;
mod types;

use std::cell::Cell;
use std::cell::LazyCell;
use std::ops::Range;

use serde::Serialize;

pub use content::{Content, Kind};

use crate::disk::Disk;
use crate::disk::window::Window;
use crate::error::{Error, ErrorKind, Result};

/// Shortest gap that is listed.
const MIN_GAP: u64 = 1 << 20;
/// How much of the start of a partitioned disk is searched for what was there before.
const START: u64 = 1 << 20;

/// What is on a disk. Field names are the stable names of the JSON form; sizes and places are in
/// bytes.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Volumes {
    /// Size of the disk.
    pub size: u64,
    /// The disk's logical sector.
    pub sector_size: u32,
    /// The partition table, if there is one.
    pub table: Option<Table>,
    /// What begins at byte 0: of a disk without a table all there is; beside a table the leftover of
    /// a time before it, or what the table was written over.
    pub content: Option<Content>,
    /// The partitions, by number.
    pub partitions: Vec<Partition>,
    /// Gaps between partitions, of at least 1 MiB.
    pub free: Vec<Free>,
    /// What is wrong with the table.
    pub warnings: Vec<String>,
}

/// A partition table.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Table {
    /// Its kind.
    pub kind: TableKind,
    /// The GPT's GUID, or the MBR's signature.
    pub uuid: Option<String>,
    /// Bytes of a sector, as the table counts.
    pub sector_size: u32,
    /// Which copy of a GPT this is; absent where neither is intact, and for an MBR.
    pub copy: Option<Copy>,
    /// Whether an MBR names partitions too, beside the GPT.
    pub hybrid: bool,
}

/// Kinds of partition table.
#[derive(Debug, Clone, std::marker::Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum TableKind {
    /// GUID partition table.
    Gpt,
    /// Master boot record.
    Mbr,
}

/// The copies of a GPT.
#[derive(Debug, Clone, std::marker::Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Copy {
    /// At the disk's start.
    Primary,
    /// At the disk's end.
    Backup,
}

/// A partition.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Partition {
    /// Its number, from 1; logical ones begin with 5.
    pub number: u32,
    /// First byte on the disk.
    pub start: u64,
    /// Length as the table says; it may reach past the disk's end.
    pub size: u64,
    /// The type: a GUID, or an MBR's number (`0x83`).
    #[serde(rename = "type")]
    pub type_id: String,
    /// What the type is called, if that is known.
    pub type_name: Option<&'static str>,
    /// The name in a GPT.
    pub name: Option<String>,
    /// The GUID in a GPT, or the MBR's signature and the number.
    pub uuid: Option<String>,
    /// Whether it is marked as the one to boot from.
    pub bootable: bool,
    /// Whether a GPT marks it as not to be written.
    pub read_only: bool,
    /// Whether it only holds logical partitions.
    pub extended: bool,
    /// What is in it; absent for an extended partition, and where nothing of it is on the disk.
    pub content: Option<Content>,
    /// What is wrong with its entry.
    pub warnings: Vec<String>,
}

impl Partition {
    /// The part of a disk of `disk_size` bytes that the partition is; empty if it begins past the end.
    pub fn range(&self, disk_size: u64) -> Range<u64> {
        let start = self.start.min(disk_size);
        start..self.start.saturating_add(self.size).min(disk_size).max(start)
    }
}

/// A part of the disk that is in no partition.
#[derive(Debug, Clone, std::marker::Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Free {
    /// First byte on the disk.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
}

/// Bytes of bitmaps that are read at most to tell how much of a disk's file systems is free.
const MAX_BITMAPS: u64 = 512 << 20;

/// As [`volumes`], and also what is free of file systems that only their bitmaps tell it of, NTFS and exFAT; of
/// a large one that takes time.
///
/// # Errors
/// Those of [`volumes`].
pub fn with_usage(disk: &Disk) -> Result<Volumes> {
    look(disk, &Cell::new(MAX_BITMAPS))
}

/// Lists what is on `disk`. Damage, of the image or of what the guest wrote, becomes warnings; an
/// error means that not even the first sector could be read.
///
/// # Errors
///
/// Those of reading the disk's first sector.
pub fn volumes(disk: &Disk) -> Result<Volumes> {
    look(disk, &Cell::new(0))
}

fn look(disk: &Disk, budget: &Cell<u64>) -> Result<Volumes> {
    let whole = LazyCell::new(|| {
        content::probe(&content::Probe::new(Window::whole(disk), disk.size(), budget))
    });
    let mut found = find_table(disk, &whole)?;
    if disk.size() == 0 {
        return Ok(found);
    }
    let whole = &*whole;
    match found.table {
        Some(_) => {
            found.look_into_partitions(disk, budget);
            found.look_below_table(disk, budget);
        }
        None if !whole.recognised() => {
            found.content = lost_ext(disk, |_| true).or(Some(whole.clone()));
        }
        None => found.content = Some(whole.clone()),
    }
    Ok(found)
}

/// The partitions of `disk` as [`volumes`] lists them, without a look into any.
///
/// # Errors
/// If not even the first sector could be read.
pub fn partitions(disk: &Disk) -> Result<Vec<Partition>> {
    let uncounted = Cell::new(0);
    let budget = &uncounted;
    let whole = LazyCell::new(|| {
        content::probe(&content::Probe::new(Window::whole(disk), disk.size(), budget))
    });
    find_table(disk, &whole).map(|found| found.partitions)
}

/// The partition table of `disk`, if there is one; `whole` is what begins at byte 0.
fn find_table<F: FnOnce() -> Content>(
    disk: &Disk,
    whole: &LazyCell<Content, F>,
) -> Result<Volumes> {
    let mut found = Volumes {
        size: disk.size(),
        sector_size: disk.geometry().logical_sector,
        table: None,
        content: None,
        partitions: Vec::new(),
        free: Vec::new(),
        warnings: Vec::new(),
    };
    if disk.size() == 0 {
        return Ok(found);
    }
    let mut first = [0; mbr::SECTOR];
    let start = disk.read_at(0, &mut first);
    let mbr = mbr::Mbr::decode(&first);
    if let Some(gpt) = gpt::find(disk) {
        found.take_gpt(gpt, mbr.as_ref());
    } else if let Some(mbr) = mbr.filter(|mbr| is_table(mbr, whole, disk)) {
        found.take_mbr(&mbr, disk);
    } else {
        start?;
    }
    Ok(found)
}

/// Whether a first sector with the mark of an MBR holds a table; boot sectors of file systems, and
/// containers, have the mark too.
fn is_table(mbr: &mbr::Mbr, whole: &Content, disk: &Disk) -> bool {
    let boot_sector = matches!(
        whole.type_name,
        Some("vfat" | "ntfs" | "exfat" | "ReFS" | "BitLocker" | "crypto_LUKS")
    );
    let sector = u64::from(disk.geometry().logical_sector.max(512));
    !boot_sector && mbr.plausible(disk.size() / sector)
}

/// An ext file system over all of the disk that only a copy of its superblock tells of.
/// Copies in places that `counts` denies are taken for remains of a time before.
fn lost_ext(disk: &Disk, counts: impl Fn(u64) -> bool) -> Option<Content> {
    let (mut content, at) = content::ext_from_backup(disk).filter(|(_, at)| counts(*at))?;
    content.warnings.push(format!("its first superblock is lost; the copy at {at:#x} tells of it"));
    Some(content)
}

impl Volumes {
    fn take_gpt(&mut self, gpt: gpt::Gpt, mbr: Option<&mbr::Mbr>) {
        let hybrid = mbr.is_some_and(mbr::Mbr::hybrid);
        self.warnings = gpt.warnings;
        if hybrid {
            self.warnings.push("an MBR names partitions too; these are the GPT's".to_owned());
        } else if !mbr.is_some_and(mbr::Mbr::protective) {
            self.warnings.push("the GPT has no protective MBR".to_owned());
        }
        self.partitions = gpt.partitions;
        self.table = Some(Table {
            kind: TableKind::Gpt,
            uuid: gpt.uuid,
            sector_size: gpt.sector,
            copy: gpt.copy,
            hybrid,
        });
        if let Some(usable) = gpt.usable {
            self.finish_table(usable);
        }
    }

    fn take_mbr(&mut self, mbr: &mbr::Mbr, disk: &Disk) {
        let sector_size = self.sector_size.max(512);
        self.partitions = mbr::partitions(mbr, disk, sector_size, &mut self.warnings);
        if mbr.protective() {
            self.warnings.push("an MBR protects a GPT that is not there".to_owned());
        }
        if self.partitions.iter().any(|partition| partition.type_id == "0x42") {
            self.warnings
                .push("a dynamic disk of Windows: its volumes are not told here".to_owned());
        }
        self.table = Some(Table {
            kind: TableKind::Mbr,
            uuid: (mbr.signature != 0).then(|| format!("{:08x}", mbr.signature)),
            sector_size,
            copy: None,
            hybrid: false,
        });
        self.finish_table(u64::from(sector_size)..self.size);
    }

    /// Adds what follows from the places of the partitions: warnings and gaps.
    fn finish_table(&mut self, usable: Range<u64>) {
        let size = self.size;
        for partition in &mut self.partitions {
            let inside = partition.range(size);
            let lost = partition.size - (inside.end - inside.start);
            if inside.is_empty() {
                partition.warnings.push("it begins past the end of the disk".to_owned());
            } else if lost > 0 {
                partition.warnings.push(format!("its last {lost} bytes are past the disk's end"));
            }
        }
        let mut places: Vec<_> = (0..self.partitions.len())
            .filter(|index| !self.partitions[*index].extended)
            .map(|index| (self.partitions[index].range(size), index))
            .filter(|(range, _)| !range.is_empty())
            .collect();
        places.sort_by_key(|(range, index)| (range.start, *index));
        let mut end = usable.start;
        let mut last = None;
        for (range, index) in places {
            if range.start < end
                && let Some(last) = last
            {
                let text = format!("it overlaps partition {last}");
                self.partitions[index].warnings.push(text);
            }
            self.add_gap(end..range.start);
            if range.end > end {
                end = range.end;
                last = Some(self.partitions[index].number);
            }
        }
        self.add_gap(end..usable.end);
    }

    fn add_gap(&mut self, gap: Range<u64>) {
        let size = gap.end.saturating_sub(gap.start);
        if size >= MIN_GAP
            && self
                .table
                .as_ref()
                .is_some_and(|table| table.kind == TableKind::Mbr || table.copy.is_some())
        {
            self.free.push(Free { start: gap.start, size });
        }
    }

    /// Looks for what began at byte 0 before the table was written.
    fn look_below_table(&mut self, disk: &Disk, budget: &Cell<u64>) {
        let first = self.partitions.iter().map(|p| p.start).filter(|start| *start > 0).min();
        let reach = first.unwrap_or(START).min(START);
        let found = content::probe(&content::Probe::new(Window::whole(disk), reach, budget));
        let in_use = |at: u64| {
            self.partitions.iter().any(|partition| {
                partition.content.as_ref().is_some_and(Content::recognised)
                    && partition.range(disk.size()).contains(&at)
            })
        };
        let found = match found.recognised() {
            true => Some(found),
            false => lost_ext(disk, |at| !in_use(at)),
        };
        if let Some(mut found) = found {
            found.warnings.push("it begins where the disk has a partition table".to_owned());
            self.content = Some(found);
        }
    }

    fn look_into_partitions(&mut self, disk: &Disk, budget: &Cell<u64>) {
        for partition in &mut self.partitions {
            let range = partition.range(disk.size());
            if partition.extended || range.is_empty() {
                continue;
            }
            if let Ok(window) = disk.slice(range) {
                let reach = window.size();
                partition.content =
                    Some(content::probe(&content::Probe::new(window, reach, budget)));
            }
        }
    }

    /// The place of partition `number`, or without a number of the only file system.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] for a number that is none; [`ErrorKind::InvalidInput`] where a number is needed.
    pub fn place(&self, number: Option<u32>) -> Result<Range<u64>> {
        let Some(number) = number else { return self.only_file_system() };
        let found = self.partitions.iter().find(|partition| partition.number == number);
        let range = found.map(|partition| partition.range(self.size));
        range.filter(|range| !range.is_empty()).ok_or_else(|| {
            let what = match self.partitions.is_empty() {
                true => "the disk has no partitions".to_owned(),
                false => format!("no partition {number} (there are {})", self.list()),
            };
            Error::new(ErrorKind::NotFound, what)
        })
    }

    fn only_file_system(&self) -> Result<Range<u64>> {
        if self.partitions.is_empty() {
            return Ok(0..self.size);
        }
        let is_file_system = |content: &Content| content.kind == Kind::Filesystem;
        let mut found = self.partitions.iter().filter(|partition| {
            self.partitions.len() == 1 || partition.content.as_ref().is_some_and(is_file_system)
        });
        match (found.next(), found.next()) {
            (Some(only), None) => Ok(only.range(self.size)),
            _ => Err(Error::invalid(format!("several partitions ({})", self.list()))
                .hint("choose one by its number")),
        }
    }

    /// The partitions in a few words each.
    fn list(&self) -> String {
        let words = |partition: &Partition| {
            let content = partition.content.as_ref();
            let kind = content.and_then(|content| content.type_name).unwrap_or("nothing known");
            format!("{}: {kind}", partition.number)
        };
        self.partitions.iter().map(words).collect::<Vec<_>>().join(", ")
    }
}
