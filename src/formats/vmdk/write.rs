//! The writing half of [`VmdkMap`]: what is reserved, freed and flushed. The order of it all, and what
//! a crash leaves, is told in the [driver's](super) own documentation.

use std::ops::Range;
use std::sync::atomic::Ordering;

use smallvec::{SmallVec, smallvec};

use crate::codec;
use crate::disk::map::{BlockMap, Contents, DiskRange, Piece, WritePlan};
use crate::disk::space::Unit;
use crate::disk::writer::{Batch, Reserved, State, Tables, Writer};
use crate::error::{Error, Result};
use crate::storage::Storage;

use super::cowd;
use super::grains::{Grain, Table};
use super::layout::SECTOR;
use super::map::{SparseExtent, VmdkMap, push_rest};
use super::walk;

/// Most table pages written at once: 1 MiB.
const MAX_JOINED_PAGES: usize = 512;

/// What a plan holds.
enum Planned<'a> {
    /// Another writer gave the grain a place, at this byte, since the caller looked.
    Stored(u64),
    /// Places for grains, and for the table where there was none.
    New { grains: Reserved<'a>, table: Option<Reserved<'a>> },
}

impl VmdkMap {
    /// See [`BlockMap::begin_writes`](crate::disk::map::BlockMap::begin_writes).
    pub(super) fn begin(&self) -> Result<()> {
        let mut spaces = Vec::new();
        let mut torn = Vec::new();
        for sparse in &self.sparse {
            if !sparse.writable {
                spaces.push(None);
                continue;
            }
            let verified = walk::verify(&sparse.tables, sparse.unclean, sparse.overhead)?;
            spaces.push(Some(verified.space));
            if verified.torn {
                torn.push(sparse);
            }
        }
        for sparse in self.sparse.iter().filter(|s| s.writable) {
            self.mark_unclean(sparse, true)?;
            complete_last_sector(sparse)?;
        }
        for sparse in torn {
            log::info!("{}: renewing redundant grain tables", sparse.file.path().display());
            walk::renew_redundant(&sparse.tables)?;
        }
        let mut place = self.files_written.descriptor.lock();
        place.descriptor.set_content_id(self.next_cid);
        codec::write_all(&*place.file, place.at, place.descriptor.text(), "the descriptor")?;
        drop(place);
        self.sync("begin")?;
        self.writer.begin(spaces);
        Ok(())
    }

    /// Makes the table that a plan brought part of the extent, unless another plan was faster. It
    /// holds zeroes, so nothing changes for readers. Whether it is.
    fn adopt_table(&self, extent: usize, grain: u64, place: u64) -> Result<bool> {
        let tables = &self.sparse[extent].tables;
        let table = grain / tables.entries_per_table;
        let absent = tables.table(&self.cache, table)? == Table::Absent;
        if absent {
            tables.set_table(&self.cache, table, place / SECTOR)?;
        }
        Ok(absent)
    }

    /// Plans a write of part `part` of sparse extent `extent`, which begins at byte `base` of the disk.
    pub(super) fn plan(&self, extent: usize, base: u64, part: Range<u64>) -> Result<WritePlan<'_>> {
        let sparse = &self.sparse[extent];
        let tables = &sparse.tables;
        let first = part.start / tables.grain;
        let page = first / tables.entries_per_page();
        let end = part.end.div_ceil(tables.grain).min((page + 1) * tables.entries_per_page());
        let lacks_table = tables.page_place(&self.cache, page)? == Table::Absent;
        if lacks_table && tables.preallocated() {
            let what = "this part of the extent has no grain table, and tables are made only with the extent";
            return Err(Error::unsupported(what).in_file(sparse.file.path()));
        }
        // Brings the page into memory before the state is locked.
        tables.read_page(&self.cache, page, |_| ())?;
        self.reserve_page(extent, page)?;

        let (planned, flight) = self
            .in_flight
            .enter(extent, &(first..end), || self.plan_grains(extent, first..end, lacks_table))?;
        let file = tables.file_index;
        let (grains, table) = match planned {
            Planned::New { grains, table } => (grains, table),
            Planned::Stored(at) => {
                let len = part.end.min((first + 1) * tables.grain) - part.start;
                let (start, at) = (base + part.start, at + (part.start - first * tables.grain));
                let piece = Piece { start, len, file, at, contents: Contents::Stale };
                return Ok(WritePlan::new(smallvec![piece], || Ok(())));
            }
        };
        let mut pieces = SmallVec::new();
        let mut pos = first * tables.grain;
        for run in grains.runs() {
            let (at, contents) = (run.range.start, run.contents);
            let whole = run.range.end - at;
            let len = whole.min(tables.len - pos);
            if len < whole && contents != Contents::Zeroes {
                // What the last grain has beyond the extent's end is no part of the disk.
                sparse
                    .file
                    .punch_hole(at + len, whole - len)
                    .map_err(|e| Error::io("write", &e).in_file(sparse.file.path()).at(at + len))?;
            }
            pieces.push(Piece { start: base + pos, len, file, at, contents });
            pos += whole;
        }
        Ok(WritePlan::new(pieces, move || {
            self.commit(extent, first, grains, table)?;
            drop(flight);
            Ok(())
        }))
    }

    /// Reserves places for as many of `grains`, all of one page, as are not stored, from the first on. The
    /// grains for which it did.
    fn plan_grains(
        &self,
        extent: usize,
        grains: Range<u64>,
        lacks_table: bool,
    ) -> Result<(Planned<'_>, Range<u64>)> {
        let sparse = &self.sparse[extent];
        let (tables, first) = (&sparse.tables, grains.start);
        let page = first / tables.entries_per_page();
        let (unmapped, present) = tables.read_page(&self.cache, page, |view| {
            let mapped = |g: &u64| !matches!(view.grain(*g), Grain::Unallocated | Grain::Zero);
            (grains.clone().find(mapped).unwrap_or(grains.end) - first, view.grain(first))
        })?;
        if let Grain::At(at) = present {
            return Ok((Planned::Stored(at), first..first));
        }
        if unmapped == 0 {
            return Err(Error::corrupt("no legal grain table entry").in_file(sparse.file.path()));
        }
        let mut table = None;
        if lacks_table {
            let unit = Unit::new(tables.table_len(), SECTOR);
            let reserved = self.writer.reserve_blank(extent, unit)?;
            for run in reserved.runs() {
                self.writer.reserve_table(&*sparse.file, extent, run.range.clone())?;
            }
            let entry = tables.directory_place(first / tables.entries_per_table);
            self.writer.reserve_table(&*sparse.file, extent, entry)?;
            table = Some(reserved);
        }
        let unit = Unit::new(tables.grain, tables.grain);
        let new = self.writer.reserve(extent, unit, unmapped)?;
        let count = new.places().count() as u64;
        Ok((Planned::New { grains: new, table }, first..first + count))
    }

    /// Sees to it that a page of a grain table, and its redundant copy, have space of the host, so that it
    /// may be changed. One that is to come with its table gets it there.
    fn reserve_page(&self, extent: usize, page: u64) -> Result<()> {
        let tables = &self.sparse[extent].tables;
        let (primary, redundant) = tables.page_places(&self.cache, page)?;
        for place in [primary, redundant] {
            if let Table::At(at) = place {
                let range = at..at + tables.page_len();
                self.writer.reserve_table(&*tables.file, extent, range)?;
            }
        }
        Ok(())
    }

    /// Unmaps what can be unmapped of part `part` of sparse extent `extent`, which begins at byte
    /// `base` of the disk: it reads as zeroes then, or with `forget` as whatever the parent has.
    pub(super) fn unmap_grains(
        &self,
        extent: usize,
        base: u64,
        part: Range<u64>,
        forget: bool,
        rest: &mut Vec<DiskRange>,
    ) -> Result<()> {
        let tables = &self.sparse[extent].tables;
        let span = tables.entries_per_page() * tables.grain;
        // Without a parent an unallocated grain reads as zeroes in every reader; over a parent only
        // a zeroed grain does, where the extent has such.
        let hide = self.has_parent && !forget;
        let raw = u64::from(hide);
        let can_unmap = !hide || tables.zeroed_grains;
        let has_table =
            |page| -> Result<bool> { Ok(tables.page_place(&self.cache, page)? != Table::Absent) };
        let mut pos = part.start;
        while pos < part.end {
            let page = pos / span;
            let end = part.end.min((page + 1) * span);
            let can_unmap = can_unmap && (!hide || has_table(page)?);
            let mut change: Vec<(u64, Grain)> = Vec::new();
            tables.read_page(&self.cache, page, |view| {
                let mut pos = pos;
                while pos < end {
                    let grain = pos / tables.grain;
                    let place = grain * tables.grain..((grain + 1) * tables.grain).min(tables.len);
                    let until = end.min(place.end);
                    let entry = view.grain(grain);
                    let whole = pos == place.start && until == place.end;
                    match entry {
                        Grain::Zero if !forget => {}
                        Grain::Unallocated if !hide => {}
                        Grain::Unallocated | Grain::Zero | Grain::At(_) if whole && can_unmap => {
                            change.push((grain, entry));
                        }
                        _ => push_rest(rest, base + pos..base + until),
                    }
                    pos = until;
                }
            })?;
            if !change.is_empty() {
                self.reserve_page(extent, page)?;
            }
            self.writer.change(|writing| self.unmap_in_page(writing, extent, &change, raw))?;
            pos = end;
        }
        Ok(())
    }

    /// Gives entries of one page the value `raw`, and what they led to back.
    fn unmap_in_page(
        &self,
        writing: &mut State,
        extent: usize,
        change: &[(u64, Grain)],
        raw: u64,
    ) -> Result<()> {
        let tables = &self.sparse[extent].tables;
        for run in change.chunk_by(|a, b| a.0 + 1 == b.0) {
            tables.update(&self.cache, run[0].0, run.iter().map(|_| raw))?;
            for (_, entry) in run {
                if let Grain::At(at) = *entry {
                    writing.free(extent, at..at + tables.grain);
                }
            }
        }
        Ok(())
    }

    /// Makes the entries from grain `first` on lead to `grains`.
    fn commit(
        &self,
        extent: usize,
        first: u64,
        grains: Reserved<'_>,
        table: Option<Reserved<'_>>,
    ) -> Result<()> {
        let tables = &self.sparse[extent].tables;
        // Brings the page into memory before changes are locked out.
        tables.read_page(&self.cache, first / tables.entries_per_page(), |_| ())?;
        let mut adopted = false;
        let committed = self.writer.change(|_| {
            if let Some((place, _)) = table.as_ref().and_then(|table| table.places().next()) {
                adopted = self.adopt_table(extent, first, place)?;
            }
            let raw = grains.places().map(|(at, _)| at / SECTOR);
            tables.update(&self.cache, first, raw)
        });
        if adopted {
            table.into_iter().for_each(Reserved::keep);
        }
        committed?;
        grains.keep();
        Ok(())
    }

    /// Sets or clears the mark of an extent that is being written.
    fn mark_unclean(&self, sparse: &SparseExtent, unclean: bool) -> Result<()> {
        codec::write_all(&*sparse.file, sparse.unclean_at, &[unclean.into()], "the unclean mark")
    }

    /// See [`BlockMap::close`](crate::disk::map::BlockMap::close).
    pub(super) fn finish(&self) -> Result<()> {
        self.flush()?;
        for (sparse, ends) in self.sparse.iter().zip(self.writer.ends().unwrap_or_default()) {
            if !sparse.writable {
                continue;
            }
            if ends.used < ends.file {
                sparse
                    .file
                    .set_len(ends.used)
                    .map_err(|e| Error::io("trim", &e).in_file(sparse.file.path()).at(ends.used))?;
            }
            if sparse.free_sector.is_some() {
                cowd::write_free_sector(&*sparse.file, ends.used.div_ceil(SECTOR))?;
            }
            self.mark_unclean(sparse, false)?;
        }
        self.sync("closing")
    }
}

impl Tables for VmdkMap {
    fn writer(&self) -> &Writer {
        &self.writer
    }

    fn sync(&self, what: &'static str) -> Result<()> {
        self.files_written.all.iter().try_for_each(|file| file.sync_changes(what))
    }

    /// Where unused space begins, in each extent whose header says so.
    fn announce(&self, batch: &Batch) -> Result<()> {
        for (sparse, ends) in self.sparse.iter().zip(&batch.ends) {
            if sparse.writable && sparse.free_sector.is_some() {
                cowd::write_free_sector(&*sparse.file, ends.used.div_ceil(SECTOR))?;
            }
        }
        Ok(())
    }

    /// Pages go to their places: all redundant copies, then all primaries.
    fn publish(&self, batch: &Batch) -> Result<()> {
        let pages = self.cache.places(&batch.pages, |extent| &self.sparse[extent].tables)?;
        let redundant = pages.iter().filter_map(|p| Some((p.extent, p.redundant?, p.bytes)));
        let primary = pages.iter().map(|p| (p.extent, p.at, p.bytes));
        for mut copies in [redundant.collect::<Vec<_>>(), primary.collect()] {
            copies.sort_unstable_by_key(|(extent, at, _)| (*extent, *at));
            let follows = |a: &(usize, u64, &[u8]), b: &(usize, u64, &[u8])| {
                a.0 == b.0 && a.1 + a.2.len() as u64 == b.1
            };
            for run in copies.chunk_by(follows).flat_map(|run| run.chunks(MAX_JOINED_PAGES)) {
                let joined: Vec<u8> = run.iter().flat_map(|(_, _, b)| *b).copied().collect();
                let (extent, at, _) = run[0];
                codec::write_all(&*self.sparse[extent].file, at, &joined, "a grain table")?;
            }
        }
        self.sync("tables")
    }
}

/// Gives a file that ends inside a sector, as a crash may leave it, the rest of it: free space is
/// counted in sectors, and nothing in use lies there.
fn complete_last_sector(sparse: &SparseExtent) -> Result<()> {
    let len = sparse.tables.file_len.load(Ordering::Acquire);
    let whole = len.next_multiple_of(SECTOR);
    if whole > len {
        sparse
            .file
            .set_len(whole)
            .map_err(|e| Error::io("extend", &e).in_file(sparse.file.path()).at(len))?;
        sparse.tables.file_len.store(whole, Ordering::Release);
    }
    Ok(())
}
