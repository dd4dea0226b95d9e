//! The writing half of [`VmdkMap`]: what is reserved, freed and flushed. The order of it all, and what
//! a crash leaves, is told in the [driver's](super) own documentation.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::{Condvar, Mutex, MutexGuard};
use smallvec::{SmallVec, smallvec};

use crate::codec;
use crate::disk::map::{DiskRange, Piece, WritePlan};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;

use super::cowd;
use super::extent_file::ExtentFile;
use super::grains::{ChangedPages, Grain, Table};
use super::layout::SECTOR;
use super::map::{DescriptorFile, SparseExtent, VmdkMap};
use super::space::{Run, Space};
use super::walk;

/// Changed table pages that may wait in memory: 8 MiB. Beyond, whoever allocates flushes first.
const MAX_DIRTY_PAGES: usize = 4096;
/// Most table pages written at once: 1 MiB.
const MAX_JOINED_PAGES: usize = 512;

/// What writing needs besides the mapping itself.
pub struct Writer {
    /// Every file that is ever written, each once.
    written: Vec<Arc<ExtentFile>>,
    descriptor: Mutex<DescriptorFile>,
    /// One flush at a time. Taken before `state`.
    flushing: Mutex<()>,
    state: Mutex<WriteState>,
    /// A plan was committed or aborted.
    landed: Condvar,
}

impl Writer {
    /// A writer that has not begun.
    pub fn new(written: Vec<Arc<ExtentFile>>, descriptor: DescriptorFile) -> Self {
        Self {
            written,
            descriptor: Mutex::new(descriptor),
            flushing: Mutex::new(()),
            state: Mutex::default(),
            landed: Condvar::new(),
        }
    }
}

/// What is decided while writing. Held for decisions and for changes of tables in memory. Two kinds of
/// I/O happen under it: a file is made longer, so that nobody takes space that is not there; and a
/// page that was evicted since it was looked at is read again.
#[derive(Default)]
struct WriteState {
    /// The free space of each sparse extent, `None` for those that are not written to. Empty until
    /// [`VmdkMap::begin`].
    spaces: Vec<Option<Space>>,
    /// Sectors freed in memory, whose old use the tables on disk may still show.
    pending: Vec<(usize, Range<u64>)>,
    /// Grains, by extent, for which a plan was made but neither committed nor aborted.
    in_flight: Vec<(usize, Range<u64>)>,
    /// A flush failed for good.
    failure: Option<Error>,
}

/// What a plan must remember: the grains from `first` on get the sectors of `runs`, in order.
struct Token {
    extent: usize,
    first: u64,
    runs: SmallVec<[Run; 2]>,
    /// Sectors, of zeroes, for the grain table where there was none.
    table: Option<Range<u64>>,
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
        let mut place = self.writer.descriptor.lock();
        place.descriptor.set_content_id(self.next_cid);
        codec::write_all(&*place.file, place.at, place.descriptor.text(), "the descriptor")?;
        drop(place);
        self.sync_written()?;
        self.writer.state.lock().spaces = spaces;
        Ok(())
    }

    fn sync_written(&self) -> Result<()> {
        self.writer.written.iter().try_for_each(|file| file.sync_changes())
    }

    /// Waits until no plan for any of `grains` is under way. Grains of an extent that begins in the
    /// middle of a block lock's unit can be wanted by two writers that hold different locks.
    fn wait_for(&self, state: &mut MutexGuard<'_, WriteState>, extent: usize, grains: &Range<u64>) {
        while state
            .in_flight
            .iter()
            .any(|(e, g)| *e == extent && g.start < grains.end && grains.start < g.end)
        {
            self.writer.landed.wait(state);
        }
    }

    /// Takes a plan off the list of those under way.
    fn land(&self, state: &mut WriteState, token: &Token) {
        state.in_flight.retain(|(e, g)| (*e, g.start) != (token.extent, token.first));
        self.writer.landed.notify_all();
    }

    fn give_back(&self, state: &mut WriteState, token: &Token) {
        if let Some(space) = state.spaces.get_mut(token.extent).and_then(Option::as_mut) {
            for run in &token.runs {
                space.release(run.place.clone(), false);
            }
            if let Some(table) = &token.table {
                space.release(table.clone(), true);
            }
        }
    }

    /// Makes the table that a plan brought part of the extent, unless another plan was faster. It
    /// holds zeroes, so nothing changes for readers.
    fn adopt_table(&self, state: &mut WriteState, token: &mut Token) -> Result<()> {
        let Some(place) = token.table.clone() else { return Ok(()) };
        let tables = &self.sparse[token.extent].tables;
        let table = token.first / tables.entries_per_table;
        if tables.table(&self.cache, table)? == Table::Absent {
            tables.set_table(&self.cache, table, place.start)?;
        } else if let Some(space) = state.spaces[token.extent].as_mut() {
            space.release(place, true);
        }
        token.table = None;
        Ok(())
    }

    /// Flushes when too many changed pages wait already.
    pub(super) fn bound_dirty_pages(&self) -> Result<()> {
        if self.cache.dirty_pages() < MAX_DIRTY_PAGES { Ok(()) } else { self.flush_all() }
    }

    /// Plans a write of part `part` of sparse extent `extent`, which begins at byte `base` of the disk.
    pub(super) fn plan(&self, extent: usize, base: u64, part: Range<u64>) -> Result<WritePlan> {
        let sparse = &self.sparse[extent];
        let tables = &sparse.tables;
        let grain_sectors = tables.grain / SECTOR;
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

        let mut state = self.writer.state.lock();
        self.wait_for(&mut state, extent, &(first..end));
        let (unmapped, present) = tables.read_page(&self.cache, page, |view| {
            let mapped = |g: &u64| !matches!(view.grain(*g), Grain::Unallocated | Grain::Zero);
            ((first..end).find(mapped).unwrap_or(end) - first, view.grain(first))
        })?;
        if let Grain::At(at) = present {
            // Another writer gave the grain a place since the caller looked.
            let len = part.end.min((first + 1) * tables.grain) - part.start;
            let at = at + (part.start - first * tables.grain);
            let piece =
                Piece { start: base + part.start, len, file: tables.file_index, at, zeroed: false };
            return Ok(WritePlan { pieces: smallvec![piece], token: Box::new(()) });
        }
        if unmapped == 0 {
            return Err(Error::corrupt("no legal grain table entry").in_file(sparse.file.path()));
        }
        let Some(space) = state.spaces.get_mut(extent).and_then(Option::as_mut) else {
            return Err(Error::new(ErrorKind::ReadOnly, "the extent is not open for writing"));
        };
        let mut token = Token { extent, first, runs: SmallVec::new(), table: None };
        if lacks_table {
            let sectors = tables.table_len() / SECTOR;
            let table = space.take_new(sectors, 1, &*sparse.file, &tables.file_len)?;
            let place = table.start * SECTOR..table.end * SECTOR;
            token.table = Some(table);
            let reserved = self.room.reserve(&*sparse.file, tables.file_index, place);
            let entry = tables.directory_place(first / tables.entries_per_table);
            let reserved =
                reserved.and_then(|()| self.room.reserve(&*sparse.file, tables.file_index, entry));
            if let Err(e) = reserved {
                self.give_back(&mut state, &token);
                return Err(e);
            }
        }
        let mut left = unmapped * grain_sectors;
        while left > 0 {
            match space.take(left, grain_sectors, &*sparse.file, &tables.file_len) {
                Ok(run) => {
                    left -= run.place.end - run.place.start;
                    token.runs.push(run);
                }
                Err(e) if token.runs.is_empty() => {
                    self.give_back(&mut state, &token);
                    return Err(e);
                }
                Err(_) => break,
            }
        }
        state.in_flight.push((extent, first..first + unmapped - left / grain_sectors));
        drop(state);

        let mut pieces = SmallVec::new();
        let mut pos = first * tables.grain;
        for run in &token.runs {
            let at = run.place.start * SECTOR;
            let whole = (run.place.end - run.place.start) * SECTOR;
            let len = whole.min(tables.len - pos);
            if len < whole && !run.zeroed {
                // What the last grain has beyond the extent's end is no part of the disk.
                if let Err(e) = sparse.file.punch_hole(at + len, whole - len) {
                    let mut state = self.writer.state.lock();
                    self.give_back(&mut state, &token);
                    self.land(&mut state, &token);
                    return Err(Error::io("write", &e).in_file(sparse.file.path()).at(at + len));
                }
            }
            let file = tables.file_index;
            pieces.push(Piece { start: base + pos, len, file, at, zeroed: run.zeroed });
            pos += whole;
        }
        Ok(WritePlan { pieces, token: Box::new(token) })
    }

    /// Sees to it that a page of a grain table, and its redundant copy, have space of the host, so that it
    /// may be changed. One that is to come with its table gets it there.
    fn reserve_page(&self, extent: usize, page: u64) -> Result<()> {
        let tables = &self.sparse[extent].tables;
        let (primary, redundant) = tables.page_places(&self.cache, page)?;
        for place in [primary, redundant] {
            if let Table::At(at) = place {
                let range = at..at + tables.page_len();
                self.room.reserve(&*tables.file, tables.file_index, range)?;
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
            let mut state = self.writer.state.lock();
            for run in change.chunk_by(|a, b| a.0 + 1 == b.0) {
                tables.update(&self.cache, run[0].0, run.iter().map(|_| raw))?;
                for (_, entry) in run {
                    if let Grain::At(at) = entry {
                        let place = at / SECTOR..(at + tables.grain) / SECTOR;
                        match state.pending.last_mut() {
                            Some((e, last)) if *e == extent && last.end == place.start => {
                                last.end = place.end;
                            }
                            _ => state.pending.push((extent, place)),
                        }
                    }
                }
            }
            pos = end;
        }
        Ok(())
    }

    /// See [`BlockMap::commit_write`](crate::disk::map::BlockMap::commit_write).
    pub(super) fn commit(&self, plan: WritePlan) -> Result<()> {
        let Ok(mut token) = plan.token.downcast::<Token>() else { return Ok(()) };
        let tables = &self.sparse[token.extent].tables;
        let grain_sectors = tables.grain / SECTOR;
        let runs = token.runs.clone();
        let places = runs.iter().flat_map(|run| run.place.clone().step_by(grain_sectors as usize));
        // Brings the page into memory before the state is locked.
        let loaded = tables.read_page(&self.cache, token.first / tables.entries_per_page(), |_| ());
        let mut state = self.writer.state.lock();
        let result = loaded
            .and_then(|()| self.adopt_table(&mut state, &mut token))
            .and_then(|()| tables.update(&self.cache, token.first, places));
        if result.is_err() {
            self.give_back(&mut state, &token);
        }
        self.land(&mut state, &token);
        result
    }

    /// See [`BlockMap::abort_write`](crate::disk::map::BlockMap::abort_write).
    pub(super) fn abort(&self, plan: WritePlan) {
        let token: Box<dyn Any> = plan.token;
        if let Ok(token) = token.downcast::<Token>() {
            let mut state = self.writer.state.lock();
            self.give_back(&mut state, &token);
            self.land(&mut state, &token);
        }
    }

    /// Writes pages to their places in the files: all redundant copies, then all primaries.
    fn write_tables(&self, pages: &ChangedPages) -> Result<()> {
        let pages = pages.places(&self.cache, |extent| &self.sparse[extent].tables)?;
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
        Ok(())
    }

    /// Gives space back that no durable table leads to any more.
    fn reclaim(&self, freed: Vec<(usize, Range<u64>)>) {
        for (extent, place) in freed {
            let file = &self.sparse[extent].file;
            let punched = file.punch_hole(place.start * SECTOR, (place.end - place.start) * SECTOR);
            if let Err(e) = &punched {
                log::warn!("{}: giving space back: {e}", file.path().display());
            }
            if let Some(space) = self.writer.state.lock().spaces[extent].as_mut() {
                space.release(place, punched.is_ok());
            }
        }
    }

    /// Where unused space begins in each extent whose header says so.
    fn free_sectors(&self, state: &WriteState) -> Vec<(usize, u64)> {
        let spaces = self.sparse.iter().zip(&state.spaces).enumerate();
        spaces
            .filter(|(_, (sparse, _))| sparse.free_sector.is_some())
            .filter_map(|(extent, (_, space))| Some((extent, space.as_ref()?.unused_from())))
            .collect()
    }

    /// Sets or clears the mark of an extent that is being written.
    fn mark_unclean(&self, sparse: &SparseExtent, unclean: bool) -> Result<()> {
        codec::write_all(&*sparse.file, sparse.unclean_at, &[unclean.into()], "the unclean mark")
    }

    /// See [`BlockMap::flush`](crate::disk::map::BlockMap::flush).
    pub(super) fn flush_all(&self) -> Result<()> {
        let _one = self.writer.flushing.lock();
        let (pages, freed, ends) = {
            let mut state = self.writer.state.lock();
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            let pages = self.cache.snapshot();
            let ends = if pages.is_empty() { Vec::new() } else { self.free_sectors(&state) };
            (pages, std::mem::take(&mut state.pending), ends)
        };
        let announced = ends.into_iter().try_for_each(|(extent, sector)| {
            cowd::write_free_sector(&*self.sparse[extent].file, sector)
        });
        let flushed = announced.and_then(|()| self.sync_written()).and_then(|()| {
            if pages.is_empty() {
                return Ok(());
            }
            self.write_tables(&pages)?;
            self.sync_written()
        });
        if let Err(e) = flushed {
            self.cache.restore(&pages);
            let mut state = self.writer.state.lock();
            state.pending.extend(freed);
            if e.kind() != ErrorKind::NoSpace {
                state.failure = Some(e.clone());
            }
            return Err(e);
        }
        self.cache.retire(&pages);
        self.reclaim(freed);
        Ok(())
    }

    /// See [`BlockMap::close`](crate::disk::map::BlockMap::close).
    pub(super) fn finish(&self) -> Result<()> {
        self.flush_all()?;
        let mut state = self.writer.state.lock();
        for (sparse, space) in self.sparse.iter().zip(&mut state.spaces) {
            let Some(space) = space else { continue };
            let needed = space.trimmed();
            if needed < space.len() {
                sparse.file.set_len(needed * SECTOR).map_err(|e| {
                    Error::io("trim", &e).in_file(sparse.file.path()).at(needed * SECTOR)
                })?;
            }
            if sparse.free_sector.is_some() {
                cowd::write_free_sector(&*sparse.file, needed)?;
            }
            self.mark_unclean(sparse, false)?;
        }
        self.sync_written()
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

/// Appends a range, joined to the last one where it continues it.
pub(super) fn push_rest(rest: &mut Vec<DiskRange>, range: DiskRange) {
    match rest.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => rest.push(range),
    }
}
