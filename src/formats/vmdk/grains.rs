//! The tables of one sparse extent: a grain directory whose entries lead to grain tables, whose
//! entries lead to grains.
//!
//! Tables are read through the disk's [`TableCaches`] in pages of at most [`PAGE`] bytes of one table,
//! and never looked at as a whole. A page is named by its place in the extent, not in the file, so a
//! hit on a grain table needs no look at the directory. A table that does not exist is a page of
//! zeroes; one that cannot be found is a page of ones, which every dialect reads as damage.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::codec;
use crate::disk::map::{ExtentList, FileIndex, Source};
use crate::disk::tables::{CacheBudget, PageImage, TableCache};
use crate::error::{Error, Result};
use crate::storage::Storage;

use super::layout::SECTOR;
use super::stream::Salvage;

/// Bytes of a page of a directory or table.
pub const PAGE: u64 = 2048;
/// Most entries of a directory that are gone through at once.
const MAX_SEARCHED: u64 = 1 << 20;

/// What a grain table entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grain {
    /// Nothing stored: the parent's data, or zeroes.
    Unallocated,
    /// Zeroes, whatever the parent has.
    Zero,
    /// Stored at this byte of the file.
    At(u64),
    /// No legal value.
    Bad,
}

/// What a directory entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// No table: every grain in it is unallocated.
    Absent,
    /// The table begins at this byte of the file.
    At(u64),
    /// No legal value.
    Bad,
}

/// How entries are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// `KDMV` with plain grains.
    Hosted,
    /// `KDMV` with compressed grains.
    Packed {
        /// Each is preceded by its first sector on the disk.
        markers: bool,
    },
    /// `COWD`.
    Cowd,
    /// seSparse. Entries are indices into regions of the file, here as first byte and end.
    SeSparse {
        /// The region of grain tables.
        tables: [u64; 2],
        /// The region of grains.
        grains: [u64; 2],
    },
}

/// The top half of a seSparse directory entry that leads to a table.
const SE_TABLE: u64 = 0x1000_0000;
/// The top digit of a seSparse table entry: unmapped by the guest, zeroes, stored.
const SE_UNMAPPED: u64 = 1;
const SE_ZERO: u64 = 2;
const SE_STORED: u64 = 3;

impl Dialect {
    /// Bytes of an entry, in directory and tables alike.
    fn entry_len(self) -> u64 {
        match self {
            Self::Hosted | Self::Packed { .. } | Self::Cowd => 4,
            Self::SeSparse { .. } => 8,
        }
    }
}

/// The tables of one sparse extent.
#[derive(Debug)]
pub struct GrainTables {
    /// The extent's number among the sparse extents of its disk; part of its pages' names.
    pub number: usize,
    /// Where the file stands in the disk's list.
    pub file_index: FileIndex,
    /// The file.
    pub file: Arc<dyn Storage>,
    /// How entries are written.
    pub dialect: Dialect,
    /// Bytes of the disk that the extent holds.
    pub len: u64,
    /// Bytes per grain.
    pub grain: u64,
    /// Entries per grain table.
    pub entries_per_table: u64,
    /// Byte offset of the grain directory.
    pub gd: u64,
    /// Entries that the directory has. Tables beyond them are lost.
    pub directory_entries: u64,
    /// Byte offset of the redundant grain directory.
    pub rgd: Option<u64>,
    /// Entry value 1 is declared to mean zeroes. It reads as zeroes in any case.
    pub zeroed_grains: bool,
    /// Places in the file where no grain and no table can be.
    pub reserved: Vec<Range<u64>>,
    /// Bytes of the file, as far as this open knows: it only grows.
    pub file_len: Arc<AtomicU64>,
    /// What was found without tables, where they are lost.
    pub salvage: Option<Salvage>,
}

/// In a directory page's name: it is of the redundant directory.
const REDUNDANT: u64 = 1 << 47;

/// The pages in memory. Directories have a cache of their own, because a table's page is loaded by
/// way of its directory: pages that one load needs must not drive out each other.
#[derive(Debug)]
pub struct TableCaches {
    tables: TableCache,
    directories: TableCache,
}

impl TableCaches {
    /// Empty caches within `budget`.
    pub fn new(budget: &Arc<CacheBudget>) -> Self {
        let cache = || TableCache::new(PAGE as usize, budget);
        Self { tables: cache(), directories: cache() }
    }

    /// The caches of tables and of directories.
    pub fn both(&self) -> [&TableCache; 2] {
        [&self.tables, &self.directories]
    }

    /// Where all pages of a batch go, those of tables and those of directories; `tables_of` knows the
    /// sparse extents by their number.
    pub fn places<'a, 'b>(
        &self,
        pages: &'a [Vec<PageImage>],
        tables_of: impl Fn(usize) -> &'b GrainTables,
    ) -> Result<Vec<PageWrite<'a>>> {
        let [tables, directories] = pages else { return Ok(Vec::new()) };
        let split = |name: u64| ((name >> 48) as usize, name & (REDUNDANT - 1));
        let mut writes = Vec::new();
        for (name, page) in tables {
            let (extent, number) = split(*name);
            let tables = tables_of(extent);
            let (Table::At(at), redundant) = tables.page_places(self, number)? else {
                let what = "a grain table that was changed has no place in the file";
                return Err(Error::corrupt(what).in_file(tables.file.path()));
            };
            let redundant = match redundant {
                Table::At(at) => Some(at),
                _ => None,
            };
            let bytes = &page[..tables.page_len() as usize];
            writes.push(PageWrite { extent, at, redundant, bytes });
        }
        for (name, page) in directories {
            let (extent, number) = split(*name);
            let tables = tables_of(extent);
            let from = number * PAGE;
            let bytes = &page[..(tables.directory_len() - from).min(PAGE) as usize];
            writes.push(PageWrite { extent, at: tables.gd + from, redundant: None, bytes });
        }
        Ok(writes)
    }
}

/// A changed page, and where it goes.
#[derive(Debug)]
pub struct PageWrite<'a> {
    /// The number of its sparse extent.
    pub extent: usize,
    /// Byte of the file.
    pub at: u64,
    /// Byte of the file of its redundant copy, if it has one.
    pub redundant: Option<u64>,
    /// What is written.
    pub bytes: &'a [u8],
}

impl GrainTables {
    /// Number of grain tables that the extent's length needs.
    pub fn tables(&self) -> u64 {
        self.len.div_ceil(self.grain).div_ceil(self.entries_per_table)
    }

    /// Number of grains.
    pub fn grains(&self) -> u64 {
        self.len.div_ceil(self.grain)
    }

    /// Whether writers make all tables when they make the extent.
    pub fn preallocated(&self) -> bool {
        self.dialect == Dialect::Hosted
    }

    /// Bytes of one grain table.
    pub fn table_len(&self) -> u64 {
        self.entries_per_table * self.dialect.entry_len()
    }

    /// Bytes of the directory, as far as the extent's length needs it.
    pub fn directory_len(&self) -> u64 {
        self.tables().min(self.directory_entries) * self.dialect.entry_len()
    }

    /// Bytes of one page of a table.
    pub fn page_len(&self) -> u64 {
        self.table_len().min(PAGE)
    }

    /// Entries of one page of a table.
    pub fn entries_per_page(&self) -> u64 {
        self.page_len() / self.dialect.entry_len()
    }

    fn pages_per_table(&self) -> u64 {
        self.table_len() / self.page_len()
    }

    /// The name of table page `page` in the cache.
    fn key(&self, page: u64) -> u64 {
        (self.number as u64) << 48 | page
    }

    /// The entry number `index` of `bytes`.
    pub fn raw(&self, bytes: &[u8], index: u64) -> u64 {
        let width = self.dialect.entry_len() as usize;
        let at = index as usize * width;
        let mut wide = [0; 8];
        wide[..width].copy_from_slice(&bytes[at..at + width]);
        u64::from_le_bytes(wide)
    }

    /// What the value of a grain table entry says.
    pub fn decode(&self, raw: u64) -> Grain {
        if raw == 0 {
            return Grain::Unallocated;
        }
        let at = match self.dialect {
            Dialect::Hosted | Dialect::Packed { .. } if raw == 1 => return Grain::Zero,
            Dialect::Hosted | Dialect::Packed { .. } | Dialect::Cowd => {
                let at = raw * SECTOR;
                let legal = raw != u64::from(u32::MAX) && !self.is_reserved(at..at + SECTOR);
                if legal { at } else { return Grain::Bad }
            }
            Dialect::SeSparse { grains: [start, end], .. } => match raw >> 60 {
                SE_UNMAPPED | SE_ZERO => return Grain::Zero,
                SE_STORED => {
                    // The low 12 bits of the index stand above its other bits.
                    let index = (raw >> 48 & 0xfff) | (raw & 0xffff_ffff_ffff) << 12;
                    let at = index.checked_mul(self.grain).and_then(|at| at.checked_add(start));
                    match at {
                        Some(at) if at < end => at,
                        _ => return Grain::Bad,
                    }
                }
                _ => return Grain::Bad,
            },
        };
        if at < self.file_len.load(Ordering::Relaxed) { Grain::At(at) } else { Grain::Bad }
    }

    /// What the value of a directory entry says.
    pub fn decode_table(&self, raw: u64) -> Table {
        if raw == 0 {
            return Table::Absent;
        }
        let at = match self.dialect {
            Dialect::Hosted | Dialect::Packed { .. } | Dialect::Cowd => {
                let at = raw.saturating_mul(SECTOR);
                if self.is_reserved(at..at.saturating_add(self.table_len())) {
                    return Table::Bad;
                }
                at
            }
            Dialect::SeSparse { tables: [start, end], .. } => {
                let at = start + (raw & u64::from(u32::MAX)) * self.table_len();
                if raw >> 32 != SE_TABLE || at >= end {
                    return Table::Bad;
                }
                at
            }
        };
        let end = at.saturating_add(self.table_len());
        if end <= self.file_len.load(Ordering::Relaxed) { Table::At(at) } else { Table::Bad }
    }

    /// Whether a place overlaps the header, the descriptor or a directory.
    pub fn is_reserved(&self, place: Range<u64>) -> bool {
        self.reserved.iter().any(|r| r.start < place.end && place.start < r.end)
    }

    /// Reads the entry for table `table` of the directory at byte `gd`.
    fn directory_entry(&self, cache: &TableCaches, gd: u64, table: u64) -> Result<u64> {
        if table >= self.directory_entries {
            return Ok(u64::MAX);
        }
        let per_page = PAGE / self.dialect.entry_len();
        let (page, index) = (table / per_page, table % per_page);
        let copy = if gd == self.gd { 0 } else { REDUNDANT };
        let load = |buf: &mut [u8]| self.load_directory(gd, page, buf);
        cache.directories.read(self.key(copy | page), load, |bytes| self.raw(bytes, index))
    }

    fn load_directory(&self, gd: u64, page: u64, buf: &mut [u8]) -> Result<()> {
        let from = page * PAGE;
        let len = (self.directory_len() - from).min(PAGE) as usize;
        codec::read_exact(&*self.file, gd + from, &mut buf[..len], "the grain directory")
    }

    /// Where the run of tables that do not exist ends at whose beginning `range` (bytes of the extent)
    /// begins, at most at the range's end. Looks at a bounded part of the directories.
    pub fn unallocated_until(&self, cache: &TableCaches, range: Range<u64>) -> Result<u64> {
        if self.salvage.is_some() {
            return Ok(range.start);
        }
        let span = self.entries_per_table * self.grain;
        let first = range.start / span;
        let tables = first..range.end.div_ceil(span).min(self.directory_entries);
        let mut next = tables.end.min(first + MAX_SEARCHED);
        for gd in [Some(self.gd), self.rgd].into_iter().flatten() {
            next = self.next_entry(cache, gd, tables.start..next)?;
        }
        Ok(next.saturating_mul(span).clamp(range.start, range.end))
    }

    /// The first of `tables` for which the directory at byte `gd` has an entry, or their end.
    fn next_entry(&self, cache: &TableCaches, gd: u64, tables: Range<u64>) -> Result<u64> {
        let width = self.dialect.entry_len();
        let per_page = PAGE / width;
        let copy = if gd == self.gd { 0 } else { REDUNDANT };
        let mut table = tables.start;
        while table < tables.end {
            let page = table / per_page;
            let until = tables.end.min((page + 1) * per_page);
            let load = |buf: &mut [u8]| self.load_directory(gd, page, buf);
            let found = cache.directories.read(self.key(copy | page), load, |bytes| {
                (table..until).find(|table| self.raw(bytes, table % per_page) != 0)
            })?;
            if let Some(found) = found {
                return Ok(found);
            }
            table = until;
            // What is written of a directory by and by has entries in memory that the file has not.
            if self.preallocated() && table < tables.end {
                let at = gd + table * width;
                let data = self.file.next_data(at).map_err(|e| {
                    Error::io("looking for tables", &e).in_file(self.file.path()).at(at)
                })?;
                let hole = data.map_or(u64::MAX, |data| data.start.saturating_sub(at) / width);
                table = tables.end.min(table.saturating_add(hole));
            }
        }
        Ok(table)
    }

    /// The bytes of the file that the directory's entry for table `table` takes.
    pub fn directory_place(&self, table: u64) -> Range<u64> {
        let width = self.dialect.entry_len();
        self.gd + table * width..self.gd + (table + 1) * width
    }

    /// Gives table `table`, which has none yet, a place: sector `sector`, where zeroes are.
    pub fn set_table(&self, cache: &TableCaches, table: u64, sector: u64) -> Result<()> {
        let width = self.dialect.entry_len();
        let (page, index) = (table / (PAGE / width), table % (PAGE / width));
        let load = |buf: &mut [u8]| self.load_directory(self.gd, page, buf);
        let at = (index * width) as usize;
        cache.directories.update(self.key(page), load, |bytes| {
            bytes[at..at + width as usize].copy_from_slice(&sector.to_le_bytes()[..width as usize]);
        })
    }

    /// Where grain table `table` is. A primary entry that leads nowhere gives way to the redundant
    /// one.
    pub fn table(&self, cache: &TableCaches, table: u64) -> Result<Table> {
        let primary = self.decode_table(self.directory_entry(cache, self.gd, table)?);
        if let (Table::Absent | Table::Bad, Some(rgd)) = (primary, self.rgd)
            && let twin @ Table::At(_) = self.decode_table(self.directory_entry(cache, rgd, table)?)
        {
            return Ok(twin);
        }
        Ok(primary)
    }

    /// Where the redundant copy of grain table `table` is.
    fn redundant_table(&self, cache: &TableCaches, table: u64) -> Result<Table> {
        match self.rgd {
            None => Ok(Table::Absent),
            Some(rgd) => Ok(self.decode_table(self.directory_entry(cache, rgd, table)?)),
        }
    }

    /// Where page `page` is in the file: in its table, and in that table's redundant copy.
    pub fn page_places(&self, cache: &TableCaches, page: u64) -> Result<(Table, Table)> {
        let redundant = self.redundant_table(cache, page / self.pages_per_table())?;
        Ok((self.page_place(cache, page)?, self.inside(redundant, page)))
    }

    /// Where page `page` is in the file.
    pub fn page_place(&self, cache: &TableCaches, page: u64) -> Result<Table> {
        Ok(self.inside(self.table(cache, page / self.pages_per_table())?, page))
    }

    /// Where page `page` is, given its table.
    fn inside(&self, table: Table, page: u64) -> Table {
        match table {
            Table::At(at) => Table::At(at + page % self.pages_per_table() * PAGE),
            other => other,
        }
    }

    fn load(&self, cache: &TableCaches, page: u64, buf: &mut [u8]) -> Result<()> {
        if let Some(salvage) = &self.salvage {
            let entries = self.entries_per_page();
            salvage.fill(page * entries, &mut buf[..self.page_len() as usize]);
            return Ok(());
        }
        match self.page_place(cache, page)? {
            Table::Absent => Ok(()),
            Table::At(at) => {
                let buf = &mut buf[..self.page_len() as usize];
                codec::read_exact(&*self.file, at, buf, "a grain table")
            }
            Table::Bad => {
                buf.fill(0xff);
                Ok(())
            }
        }
    }

    /// Runs `read` on table page `page`.
    pub fn read_page<R>(
        &self,
        cache: &TableCaches,
        page: u64,
        read: impl FnOnce(Page<'_>) -> R,
    ) -> Result<R> {
        let load = |buf: &mut [u8]| self.load(cache, page, buf);
        cache.tables.read(self.key(page), load, |bytes| read(Page { tables: self, bytes }))
    }

    /// Gives the grains from `first` on, all of one page, the entries `raw`. Either all or none
    /// change.
    pub fn update(
        &self,
        cache: &TableCaches,
        first: u64,
        raw: impl Iterator<Item = u64>,
    ) -> Result<()> {
        let (page, index) = (first / self.entries_per_page(), first % self.entries_per_page());
        let load = |buf: &mut [u8]| self.load(cache, page, buf);
        let width = self.dialect.entry_len() as usize;
        cache.tables.update(self.key(page), load, |bytes| {
            for (entry, raw) in bytes[index as usize * width..].chunks_exact_mut(width).zip(raw) {
                entry.copy_from_slice(&raw.to_le_bytes()[..width]);
            }
        })
    }

    /// Appends where `range` (bytes of the extent, whose first byte is byte `base` of the disk) is.
    /// `below` stands for what is not allocated.
    pub fn lookup(
        &self,
        cache: &TableCaches,
        range: Range<u64>,
        base: u64,
        below: Source,
        out: &mut ExtentList,
    ) -> Result<()> {
        let page_span = self.entries_per_page() * self.grain;
        let table_span = self.entries_per_table * self.grain;
        let mut pos = range.start;
        while pos < range.end {
            if pos.is_multiple_of(table_span) && range.end - pos >= table_span {
                let absent = self.unallocated_until(cache, pos..range.end)?;
                if absent > pos {
                    out.push(base + pos, absent - pos, below);
                    pos = absent;
                    continue;
                }
            }
            let page = pos / page_span;
            let end = range.end.min((page + 1) * page_span);
            self.read_page(cache, page, |view| {
                let mut pos = pos;
                while pos < end {
                    let grain = pos / self.grain;
                    let until = end.min((grain + 1) * self.grain);
                    let skip = pos - grain * self.grain;
                    self.push(view.grain(grain), grain, skip, base + pos, until - pos, below, out);
                    pos = until;
                }
            })?;
            pos = end;
        }
        Ok(())
    }

    /// Appends `len` bytes that begin `skip` bytes into grain number `grain`.
    #[allow(clippy::too_many_arguments, reason = "one extent's worth of coordinates")]
    #[inline]
    fn push(
        &self,
        entry: Grain,
        grain: u64,
        skip: u64,
        start: u64,
        len: u64,
        below: Source,
        out: &mut ExtentList,
    ) {
        match entry {
            Grain::Unallocated => out.push(start, len, below),
            Grain::Zero => out.push(start, len, Source::Zero),
            Grain::Bad => out.push(start, len, Source::Bad),
            Grain::At(_) if matches!(self.dialect, Dialect::Packed { .. }) => {
                let unit = packed_unit(self.number, grain);
                out.push(start, len, Source::Packed { unit, skip: skip as u32 });
            }
            Grain::At(at) => {
                let at = at + skip;
                let stored = self.file_len.load(Ordering::Relaxed).saturating_sub(at).min(len);
                // A sector that the file's end cuts off is lost as a whole.
                let stored = stored / SECTOR * SECTOR;
                if stored > 0 {
                    out.push(start, stored, Source::File { file: self.file_index, at });
                }
                if stored < len {
                    out.push(start + stored, len - stored, Source::Bad);
                }
            }
        }
    }
}

/// The name of a compressed grain for [`Source::Packed`].
pub fn packed_unit(extent: usize, grain: u64) -> u64 {
    (extent as u64) << 48 | grain
}

/// The sparse extent and the grain that [`packed_unit`] named.
pub fn of_packed_unit(unit: u64) -> (usize, u64) {
    ((unit >> 48) as usize, unit & ((1 << 48) - 1))
}

/// One page of a grain table.
pub struct Page<'a> {
    tables: &'a GrainTables,
    bytes: &'a [u8],
}

impl Page<'_> {
    /// What the entry of grain number `grain` of the extent says; the grain lies in this page.
    #[inline]
    pub fn grain(&self, grain: u64) -> Grain {
        let index = grain % self.tables.entries_per_page();
        self.tables.decode(self.tables.raw(self.bytes, index))
    }
}
