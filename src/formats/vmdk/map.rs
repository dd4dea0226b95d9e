//! The disk as its extents make it up: [`VmdkMap`].
//!
//! Extents follow each other on the disk; each is found by its place, and answers for itself. What
//! is shared by them is the table cache and, in [`write`](super::write), what writing needs.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use smallvec::SmallVec;

use crate::disk::map::{
    BlockMap, DiskRange, Extent, ExtentList, FileIndex, Geometry, Source, WritePlan,
};
use crate::disk::tables::TableCache;
use crate::disk::writer::{self, Writer};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;

use super::descriptor::Descriptor;
use super::extent_file::ExtentFile;
use super::grains::{self, Grain, GrainTables, TableCaches};
use super::in_flight::InFlight;
use super::stream::{self, InflatedGrains};

/// Bytes of the disk gone through between looks at how much waits in memory.
const STEP: usize = 1 << 30;

/// What holds the bytes of an extent.
#[derive(Debug)]
pub enum Backing {
    /// Nothing: zeroes that cannot be written.
    Zero,
    /// Nothing that a guest may see.
    NoAccess,
    /// Raw bytes from byte `at` of a file, as far as the file reaches: `present` bytes.
    Flat {
        /// Which file.
        file: FileIndex,
        /// Byte of the file where the extent begins.
        at: u64,
        /// How many of the extent's bytes the file has.
        present: u64,
    },
    /// A sparse file, by its number among them.
    Sparse(usize),
}

/// A run of the disk, as an extent line says.
#[derive(Debug)]
pub struct Slot {
    /// First byte on the disk.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// What holds it.
    pub backing: Backing,
}

/// One sparse extent.
#[derive(Debug)]
pub struct SparseExtent {
    /// Where its grains are.
    pub tables: GrainTables,
    /// Its file, for everything but payload.
    pub file: Arc<ExtentFile>,
    /// Whether a guest may write to it.
    pub writable: bool,
    /// It was not closed after its last writing.
    pub unclean: bool,
    /// Byte of the file that says so.
    pub unclean_at: u64,
    /// Where unused space begins, as the header says it, for extents that say so.
    pub free_sector: Option<u64>,
    /// First sector that grains use.
    pub overhead: u64,
    /// The header's version.
    pub version: u32,
    /// The header's flags.
    pub flags: u32,
}

/// The descriptor and where it lies.
#[derive(Debug)]
pub struct DescriptorFile {
    /// The file.
    pub file: Arc<ExtentFile>,
    /// Byte of the file where the text begins.
    pub at: u64,
    /// The text.
    pub descriptor: Descriptor,
}

/// The files of a disk that are ever written, each once.
pub struct WrittenFiles {
    /// All of them.
    pub all: Vec<Arc<ExtentFile>>,
    /// The one with the descriptor.
    pub descriptor: Mutex<DescriptorFile>,
}

impl WrittenFiles {
    /// These files, and the descriptor's.
    pub fn new(all: Vec<Arc<ExtentFile>>, descriptor: DescriptorFile) -> Self {
        Self { all, descriptor: Mutex::new(descriptor) }
    }
}

/// See the module's documentation.
pub struct VmdkMap {
    geometry: Geometry,
    slots: Vec<Slot>,
    pub(super) sparse: Vec<SparseExtent>,
    files: Vec<Arc<dyn Storage>>,
    pub(super) next_cid: Option<u32>,
    /// Whether unallocated grains show a parent.
    pub(super) has_parent: bool,
    pub(super) cache: TableCaches,
    inflated: InflatedGrains,
    pub(super) writer: Writer,
    pub(super) files_written: WrittenFiles,
    pub(super) in_flight: InFlight,
}

/// The parts that [`VmdkMap::new`] puts together.
pub struct Parts {
    /// The extents in disk order, without gaps.
    pub slots: Vec<Slot>,
    /// The sparse ones.
    pub sparse: Vec<SparseExtent>,
    /// The files that slots refer to.
    pub files: Vec<Arc<ExtentFile>>,
    /// The descriptor.
    pub descriptor: DescriptorFile,
    /// Whether unallocated grains show a parent.
    pub has_parent: bool,
    /// The disk's sizes.
    pub geometry: Geometry,
    /// The content id from the first write on, if it is not to be a new one.
    pub next_cid: Option<u32>,
    /// The tables' memory.
    pub cache: TableCaches,
}

impl VmdkMap {
    /// The disk made of `parts`.
    pub fn new(parts: Parts) -> Self {
        let mut written = parts.files.clone();
        if !written.iter().any(|file| Arc::ptr_eq(file, &parts.descriptor.file)) {
            written.push(parts.descriptor.file.clone());
        }
        Self {
            geometry: parts.geometry,
            slots: parts.slots,
            sparse: parts.sparse,
            files: parts.files.into_iter().map(|file| file as Arc<dyn Storage>).collect(),
            has_parent: parts.has_parent,
            next_cid: parts.next_cid,
            cache: parts.cache,
            inflated: InflatedGrains::default(),
            writer: Writer::default(),
            files_written: WrittenFiles::new(written, parts.descriptor),
            in_flight: InFlight::default(),
        }
    }

    /// What a grain shows that is not allocated.
    fn below(&self) -> Source {
        if self.has_parent { Source::Parent } else { Source::Zero }
    }

    /// Makes every grain the parent's again, durably.
    pub fn forget(&self) -> Result<()> {
        self.begin()?;
        for step in (0..self.geometry.size).step_by(STEP) {
            if self.tables_full() {
                self.flush()?;
            }
            let step = step..self.geometry.size.min(step + STEP as u64);
            for (slot, part) in self.parts(step) {
                if let Backing::Sparse(extent) = slot.backing {
                    // What cannot be forgotten reads the same all the same.
                    self.unmap_grains(extent, slot.start, part, true, &mut Vec::new())?;
                }
            }
        }
        self.finish()
    }

    /// The extents that `want` touches, each with the touched part in bytes of the extent.
    fn parts(&self, want: DiskRange) -> impl Iterator<Item = (&Slot, Range<u64>)> {
        let first = self.slots.partition_point(|slot| slot.end <= want.start);
        self.slots[first..].iter().take_while(move |slot| slot.start < want.end).map(move |slot| {
            let part = want.start.max(slot.start)..want.end.min(slot.end);
            (slot, part.start - slot.start..part.end - slot.start)
        })
    }
}

impl BlockMap for VmdkMap {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn files(&self) -> &[Arc<dyn Storage>] {
        &self.files
    }

    fn lookup(&self, want: DiskRange, out: &mut ExtentList) -> Result<()> {
        for (slot, part) in self.parts(want) {
            let (start, len) = (slot.start + part.start, part.end - part.start);
            match slot.backing {
                Backing::Zero => out.push(start, len, Source::Zero),
                Backing::NoAccess => out.push(start, len, Source::Bad),
                Backing::Flat { file, at, present } => {
                    let stored = present.saturating_sub(part.start).min(len);
                    if stored > 0 {
                        out.push(start, stored, Source::File { file, at: at + part.start });
                    }
                    if stored < len {
                        out.push(start + stored, len - stored, Source::Bad);
                    }
                }
                Backing::Sparse(extent) => {
                    let tables = &self.sparse[extent].tables;
                    tables.lookup(&self.cache, part, slot.start, self.below(), out)?;
                }
            }
        }
        Ok(())
    }

    fn fixed(&self) -> bool {
        self.slots.iter().all(|slot| matches!(slot.backing, Backing::Flat { .. }))
    }

    fn unstored(&self, want: DiskRange) -> Result<Option<Extent>> {
        let Some((slot, part)) = self.parts(want).next() else { return Ok(None) };
        let (end, source) = match slot.backing {
            Backing::Zero => (part.end, Source::Zero),
            Backing::Sparse(extent) => {
                let tables = &self.sparse[extent].tables;
                (tables.unallocated_until(&self.cache, part.clone())?, self.below())
            }
            _ => return Ok(None),
        };
        let run = Extent { start: slot.start + part.start, len: end - part.start, source };
        Ok((run.len > 0).then_some(run))
    }

    fn begin_writes(&self) -> Result<()> {
        self.begin()
    }

    fn prepare_write(&self, want: DiskRange) -> Result<WritePlan<'_>> {
        let Some((slot, part)) = self.parts(want).next() else {
            return Err(Error::invalid("a write of nothing"));
        };
        match slot.backing {
            Backing::Sparse(extent) if self.sparse[extent].writable => {
                self.plan(extent, slot.start, part)
            }
            Backing::Zero => {
                let what = "this part of the disk is a ZERO extent, which has no room for data";
                Err(Error::new(ErrorKind::ReadOnly, what))
            }
            _ => Err(Error::new(ErrorKind::ReadOnly, "this part of the disk is read-only")),
        }
    }

    fn unmap(&self, want: DiskRange, rest: &mut Vec<DiskRange>) -> Result<()> {
        for (slot, part) in self.parts(want) {
            match slot.backing {
                Backing::Zero => {}
                Backing::Sparse(extent) if self.sparse[extent].writable => {
                    self.unmap_grains(extent, slot.start, part, false, rest)?;
                }
                _ => push_rest(rest, slot.start + part.start..slot.start + part.end),
            }
        }
        Ok(())
    }

    fn read_packed(&self, unit: u64, skip: u32, buf: &mut [u8]) -> Result<()> {
        let (extent, grain) = grains::of_packed_unit(unit);
        let Some(sparse) = self.sparse.get(extent) else {
            return Err(Error::invalid("no such compressed grain"));
        };
        let tables = &sparse.tables;
        let place = || {
            let page = grain / tables.entries_per_page();
            match tables.read_page(&self.cache, page, |view| view.grain(grain))? {
                Grain::At(at) => Ok(at),
                _ => Err(Error::corrupt(format!("grain {grain} is not stored"))),
            }
        };
        if skip == 0 && buf.len() as u64 == tables.grain {
            // Who takes all of it does not come back for the rest.
            return stream::inflate_to(tables, grain, place()?, buf);
        }
        let data = self.inflated.get(unit, || stream::inflate(tables, grain, place()?))?;
        let skip = skip as usize;
        let Some(data) = data.get(skip..skip + buf.len()) else {
            return Err(Error::invalid("no such part of a compressed grain"));
        };
        buf.copy_from_slice(data);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        writer::flush(self)
    }

    fn caches(&self) -> SmallVec<[&TableCache; 2]> {
        self.cache.both().into_iter().collect()
    }

    fn close(&self) -> Result<()> {
        self.finish()
    }
}

/// Appends a range, joined to the last one where it continues it.
pub(super) fn push_rest(rest: &mut Vec<DiskRange>, range: DiskRange) {
    match rest.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => rest.push(range),
    }
}
