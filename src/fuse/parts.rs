//! Partitions that show as files of their own, and who writes which part of a disk.
//!
//! A flat file and the files of its partitions are [`View`]s of one open image. Views that overlap are
//! never open for writing at the same time. Readers are free, so a write through one view has the kernel
//! drop the pages that it keeps of the others before the writer gets its answer: a read that comes later
//! finds what was written. Which partitions there are stays fixed while any of their files is open.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

use parking_lot::RwLock;
use serde::Serialize;

use crate::disk::Disk;
use crate::disk::map::DiskRange;
use crate::error::{Error, ErrorKind, Result};
use crate::volumes;

/// A partition that shows as a file. Field names are those of the extended attribute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Part {
    /// Its number in the table.
    pub number: u32,
    /// First byte on the disk.
    pub offset: u64,
    /// Length in bytes, as far as the disk reaches.
    pub size: u64,
    /// The type: a GUID, or an MBR's number.
    #[serde(rename = "type")]
    pub type_id: String,
    /// What the type is called, if that is known.
    pub type_name: Option<&'static str>,
    /// The name in a GPT.
    pub name: Option<String>,
}

impl Part {
    /// The bytes of the disk.
    pub fn range(&self) -> DiskRange {
        self.offset..self.offset + self.size
    }

    /// Bytes of memory that it takes, about.
    pub fn weight(&self) -> usize {
        size_of::<Self>() + self.type_id.len() + self.name.as_ref().map_or(0, String::len)
    }
}

/// The partitions of `disk` that show; none where the table cannot be read.
pub fn parts_of(disk: &Disk) -> Arc<[Part]> {
    let found = volumes::partitions(disk).unwrap_or_else(|e| {
        log::debug!("no partitions: {e}");
        Vec::new()
    });
    let shown = found.into_iter().filter(|partition| !partition.extended).filter_map(|partition| {
        let range = partition.range(disk.size());
        (!range.is_empty()).then(|| Part {
            number: partition.number,
            offset: range.start,
            size: range.end - range.start,
            type_id: partition.type_id,
            type_name: partition.type_name,
            name: partition.name,
        })
    });
    shown.collect()
}

/// The number of the partition, and the rest of the name before it, in `disk.vhd.p1`.
pub fn split_name(name: &[u8]) -> Option<(&[u8], u32)> {
    let digits = name.iter().rev().take_while(|byte| byte.is_ascii_digit()).count();
    let (base, number) = name.split_at(name.len() - digits);
    let base = base.strip_suffix(b".p").filter(|base| !base.is_empty())?;
    // One name for each number.
    let number = std::str::from_utf8(number).ok().filter(|text| !text.starts_with('0'))?;
    Some((base, number.parse().ok()?))
}

/// A file through which a disk, or a part of it, is read and written.
#[derive(Debug)]
pub struct View {
    /// The file's inode number.
    pub ino: u64,
    /// Which partition; the whole disk without one.
    pub part: Option<Part>,
    readers: AtomicU32,
    writers: AtomicU32,
    /// Of which contents the kernel's pages are, where it kept any at the last open(2).
    pub epoch: AtomicU64,
    /// What the kernel keeps of the file is old.
    pub old_pages: AtomicBool,
    /// The kernel may keep pages.
    cached: AtomicBool,
}

impl View {
    /// The file `ino`, of a partition or of the whole disk; nobody has it open.
    pub fn new(ino: u64, part: Option<Part>) -> Self {
        Self {
            ino,
            part,
            readers: AtomicU32::new(0),
            writers: AtomicU32::new(0),
            epoch: AtomicU64::new(0),
            old_pages: AtomicBool::new(false),
            cached: AtomicBool::new(false),
        }
    }

    /// The part of a disk of `size` bytes.
    pub fn range(&self, size: u64) -> DiskRange {
        self.part.as_ref().map_or(0..size, Part::range)
    }

    fn overlaps(&self, range: &DiskRange) -> bool {
        let own = self.range(u64::MAX);
        own.start < range.end && range.start < own.end
    }

    fn count(&self, write: bool) -> &AtomicU32 {
        if write { &self.writers } else { &self.readers }
    }

    /// One more has it open.
    pub fn enter(&self, write: bool) {
        self.count(write).fetch_add(1, Ordering::SeqCst);
    }

    /// One less.
    pub fn leave(&self, write: bool) {
        let less = |count: u32| Some(count.saturating_sub(1));
        let _ = self.count(write).fetch_update(Ordering::SeqCst, Ordering::SeqCst, less);
    }

    /// How many have it open.
    pub fn users(&self) -> u32 {
        self.readers.load(Ordering::SeqCst) + self.writers.load(Ordering::SeqCst)
    }

    /// Comes before every read: from here on the kernel may keep pages.
    pub fn reading(&self) {
        if !self.cached.load(Ordering::Relaxed) {
            self.cached.store(true, Ordering::SeqCst);
        }
        // Either the writer sees the mark, or this read what was written.
        fence(Ordering::SeqCst);
    }

    fn named(&self) -> String {
        match &self.part {
            Some(part) => format!("partition {}", part.number),
            None => "the whole disk".to_owned(),
        }
    }
}

/// All views of an image.
#[derive(Debug)]
pub struct Views {
    /// The whole disk.
    pub whole: View,
    parts: RwLock<Vec<Arc<View>>>,
}

impl Views {
    /// The whole disk's file `ino` alone.
    pub fn new(ino: u64) -> Self {
        Self { whole: View::new(ino, None), parts: RwLock::default() }
    }

    /// Adds a partition's file.
    pub fn add(&self, view: Arc<View>) {
        self.parts.write().push(view);
    }

    /// Forgets a partition's file.
    pub fn remove(&self, view: &Arc<View>) {
        self.parts.write().retain(|known| !Arc::ptr_eq(known, view));
    }

    /// Whether anybody has a partition open.
    pub fn part_in_use(&self) -> bool {
        self.parts.read().iter().any(|view| view.users() > 0)
    }

    /// Refuses to open `view` for writing while somebody writes through a view that overlaps.
    pub fn refuse_other_writers(&self, view: &View) -> Result<()> {
        let range = view.range(u64::MAX);
        let writes = |other: &View| {
            let own = std::ptr::eq(other, view);
            !own && other.writers.load(Ordering::SeqCst) > 0 && other.overlaps(&range)
        };
        let parts = self.parts.read();
        let part = parts.iter().map(|part| &**part).find(|part| writes(part));
        let busy = Some(&self.whole).filter(|whole| writes(whole)).or(part);
        busy.map_or(Ok(()), |busy| {
            let what = format!("{} is open for writing", busy.named());
            Err(Error::new(ErrorKind::Busy, what))
        })
    }

    /// The files but `view` of which the kernel may have kept pages of `range` that were just written
    /// over; they are told once.
    pub fn outdated(&self, view: &View, range: &DiskRange) -> Vec<u64> {
        fence(Ordering::SeqCst);
        let old = |other: &View| {
            !std::ptr::eq(other, view)
                && other.cached.load(Ordering::SeqCst)
                && other.overlaps(range)
                && other.cached.swap(false, Ordering::SeqCst)
        };
        let parts = self.parts.read();
        let all = parts.iter().map(|part| &**part).chain([&self.whole]);
        all.filter(|other| old(other)).map(|other| other.ino).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(number: u32, offset: u64, size: u64) -> Part {
        Part { number, offset, size, type_id: "0x83".into(), type_name: None, name: None }
    }

    #[test]
    fn names_have_one_spelling() {
        assert_eq!(split_name(b"disk.vhd.p1"), Some((&b"disk.vhd"[..], 1)));
        assert_eq!(split_name(b"a.p1.p12"), Some((&b"a.p1"[..], 12)));
        let wrong: [&[u8]; 7] =
            [b"", b".p1", b"disk.p", b"disk.p01", b"disk.p0", b"p1", b"d.p9999999999"];
        for name in wrong {
            assert_eq!(split_name(name), None, "{name:?}");
        }
    }

    #[test]
    fn overlapping_views_exclude_each_other_s_writers() {
        let views = Views::new(1);
        let [a, b, c] = [(2, 0, 10), (3, 10, 10), (4, 5, 10)]
            .map(|(ino, at, size)| Arc::new(View::new(ino, Some(part(ino as u32, at, size)))));
        [&a, &b, &c].iter().for_each(|view| views.add((*view).clone()));
        a.enter(true);
        assert!(views.refuse_other_writers(&a).is_ok());
        assert!(views.refuse_other_writers(&b).is_ok());
        let busy = views.refuse_other_writers(&c).unwrap_err();
        assert_eq!(
            (busy.kind(), busy.what()),
            (ErrorKind::Busy, "partition 2 is open for writing")
        );
        assert!(views.refuse_other_writers(&views.whole).is_err());
        a.leave(true);
        a.enter(false);
        assert!(views.part_in_use());
        views.whole.enter(true);
        assert!(views.refuse_other_writers(&b).is_err());
        views.remove(&a);
        assert!(!views.part_in_use());
    }

    #[test]
    fn a_write_tells_those_that_may_have_old_pages_once() {
        let views = Views::new(1);
        let a = Arc::new(View::new(2, Some(part(1, 0, 10))));
        let b = Arc::new(View::new(3, Some(part(2, 10, 10))));
        views.add(a.clone());
        views.add(b.clone());
        assert!(views.outdated(&a, &(0..5)).is_empty());
        [&views.whole, &*a, &*b].iter().for_each(|view| view.reading());
        assert_eq!(views.outdated(&a, &(0..5)), [1]);
        assert!(views.outdated(&a, &(0..5)).is_empty());
        assert_eq!(views.outdated(&views.whole, &(9..10)), [2]);
        assert_eq!(views.outdated(&views.whole, &(0..30)), [3]);
    }
}
