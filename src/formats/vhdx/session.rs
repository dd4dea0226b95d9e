//! A writing session: from the first write to the image being closed.
//!
//! The order of what is written, and why, is in the driver's [documentation](super).

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use uuid::Uuid;

use super::bat;
use super::blocks::Blocks;
use super::headers::HeaderWriter;
use super::layout::{LOG_SECTOR, MIB, REGION_TABLE_OFFSETS, TABLE_BYTES};
use super::log::entry::Page;
use super::log::ring::{FileLengths, Ring};
use super::overlay::ReplayedFile;
use super::regions::read_copy;
use super::space::Space;
use super::stock::Stock;
use super::writes::WriteState;
use crate::codec::write_all;
use crate::disk::sync_file;
use crate::disk::tables::PageImage;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;

/// Length of a log where the file has none.
const NEW_LOG: u64 = MIB;

/// Header, log, and what is between the log and its place in the file.
#[derive(Debug)]
pub(super) struct Session {
    pub headers: HeaderWriter,
    /// The file as its log makes it, if it needs replaying.
    pub replayed: Option<Arc<ReplayedFile>>,
    /// The log, while it is in use.
    pub ring: Option<Ring>,
    /// The log's place was a hole of the host's file, and is to be one again.
    pub sparse_log: bool,
    /// Pages that the log holds durably and that could not be written to their place.
    pub unapplied: Vec<PageImage>,
    /// A flush that failed for good. What it should have made durable is lost, whatever later
    /// flushes achieve, so that they must not succeed.
    pub failure: Option<Error>,
}

impl Blocks {
    /// Follows the file's growth.
    pub(super) fn note_length(&self, state: &WriteState) {
        self.file_len.fetch_max(state.space.file_len(), Ordering::Release);
    }

    /// Prepares the file for being changed: checks that its blocks can be told apart, replays the
    /// log, begins a new one. After lack of space it can be called again.
    pub(super) fn begin_session(&self) -> Result<()> {
        let mut session = self.session.lock();
        let session = &mut *session;
        let file = &self.files[0];
        let mut state = WriteState { space: self.take_stock()?, freed: Vec::new() };

        if let Some(replayed) = &session.replayed {
            session.headers.update(|h| h.file_write = Uuid::new_v4())?;
            replayed.apply()?;
            sync_file(&**file)?;
            replayed.forget();
            session.replayed = None;
        }
        if session.ring.is_none() {
            if session.headers.header().dirty() {
                session.headers.update(|h| h.log = Uuid::nil())?;
            }
            let ring = self.start_log(session, &mut state)?;
            session.ring = Some(ring);
        }
        // A last block that ends with the disk gets the rest of its bytes.
        let needed = state.space.used_end();
        if needed > state.space.file_len() {
            file.set_len(needed)
                .map_err(|e| Error::io("extending the file", &e).in_file(file.path()))?;
            state.space.set_file_len(needed);
        }
        self.note_length(&state);
        self.repair_region_tables()?;
        *self.state.lock() = Some(state);
        Ok(())
    }

    /// Finds all space in use. Fails when two structures claim the same space: whatever were
    /// written then could destroy something else.
    fn take_stock(&self) -> Result<Space> {
        let file = self.file();
        let len =
            file.len().map_err(|e| Error::io("asking for the size", &e).in_file(file.path()))?;
        let mut stock = Stock::new(&self.shape, len)?;
        let mut fault = None;
        bat::scan(file, &self.shape.bat, &self.shape.layout, |index, slot, entry| {
            if let Err(misfit) = stock.take(slot, entry) {
                let e = misfit.error;
                fault.get_or_insert(e.at(self.shape.bat.offset + index * bat::ENTRY_BYTES));
            }
        })?;
        match fault {
            Some(e) => Err(e.in_file(file.path()).hint("flatdisk check lists the damage")),
            None => Ok(stock.finish()),
        }
    }

    /// Begins a new log and names it in the headers, with new identifiers.
    fn start_log(&self, session: &mut Session, state: &mut WriteState) -> Result<Ring> {
        let file = &self.files[0];
        let header = session.headers.header();
        let (mut at, mut length) = (header.log_offset, u64::from(header.log_length));
        if length == 0 {
            (at, length) = (state.space.allocate(&**file, NEW_LOG)?.at, NEW_LOG);
        }
        // No entry is to find the host full: the place of all of them is reserved.
        let reserving =
            |e| Error::io("reserving space for the log", &e).in_file(file.path()).at(at);
        let data = file.next_data(at).map_err(reserving)?;
        session.sparse_log = data.is_none_or(|data| data.start > at || data.end < at + length);
        file.allocate(at, length).map_err(reserving)?;
        let ring = Ring::start(file, at, length, state.lengths())?;
        session.headers.update(|h| {
            h.log = ring.guid();
            h.log_version = 0;
            h.log_offset = at;
            h.log_length = length as u32;
            h.file_write = Uuid::new_v4();
            h.data_write = self.next_data_write.unwrap_or_else(Uuid::new_v4);
        })?;
        Ok(ring)
    }

    /// Rewrites a region table that is not like the one in use, which stays as it is whatever a crash
    /// leaves of the other.
    fn repair_region_tables(&self) -> Result<()> {
        let copies = [read_copy(self.file(), 0)?, read_copy(self.file(), 1)?];
        let (good, bad) = match &copies {
            [Some(good), other] if other.as_ref() != Some(good) => (good, 1),
            [None, Some(good)] => (good, 0),
            _ => return Ok(()),
        };
        let at = REGION_TABLE_OFFSETS[bad];
        write_all(self.file(), at, &good[..TABLE_BYTES], "region table")
    }

    /// Writes pages outside of BAT and sector bitmaps, as one step, durable on return. The session
    /// must have begun, and nothing have been written in it.
    pub(super) fn write_logged(&self, images: &[PageImage]) -> Result<()> {
        let mut session = self.session.lock();
        let lengths = self.state.lock().as_ref().map(WriteState::lengths);
        let (Some(ring), Some(lengths)) = (&mut session.ring, lengths) else {
            return Err(Error::invalid("the log is not in use"));
        };
        if images.len() > ring.max_pages() {
            return Err(Error::invalid("the log is too small for the change"));
        }
        append(ring, images, lengths)?;
        apply(self.file(), images)
    }

    /// Makes payload and tables durable.
    pub(super) fn flush_tables(&self) -> Result<()> {
        let mut session = self.session.lock();
        if let Some(failure) = &session.failure {
            return Err(failure.clone());
        }
        self.flush_session(&mut session).inspect_err(|e| {
            if e.kind() != ErrorKind::NoSpace {
                session.failure = Some(e.clone());
            }
        })
    }

    fn flush_session(&self, session: &mut Session) -> Result<()> {
        let Session { ring: Some(ring), unapplied, .. } = session else { return Ok(()) };
        let file = self.file();
        if !unapplied.is_empty() {
            apply(file, unapplied)?;
            self.cache.retire(unapplied);
            unapplied.clear();
        }

        let (mut images, freed, lengths) = {
            let mut state = self.state.lock();
            let Some(state) = &mut *state else { return Ok(()) };
            // What the file grows by from here on is not covered by the sync below.
            (self.cache.snapshot(), std::mem::take(&mut state.freed), state.lengths())
        };
        // In case one entry cannot hold all: a block that becomes partially present needs its bits
        // and the bitmap's own entry, which is behind the block's in the BAT. So the bitmaps go
        // first, then the BAT from its end.
        let bat = self.shape.bat.range();
        images.sort_by_key(|(page, _)| (bat.contains(&(page * LOG_SECTOR)), Reverse(*page)));

        let mut rest = &images[..];
        let mut result = sync_file(file);
        while result.is_ok() && !rest.is_empty() {
            let (group, later) = rest.split_at(rest.len().min(ring.max_pages()));
            result = append(ring, group, lengths);
            if result.is_err() {
                break;
            }
            rest = later;
            result = apply(file, group);
            match result {
                Ok(()) => self.cache.retire(group),
                Err(_) => *unapplied = group.to_vec(),
            }
            if result.is_ok() && !rest.is_empty() {
                result = sync_file(file);
            }
        }
        if let Err(e) = result {
            self.cache.restore(rest);
            if let Some(state) = &mut *self.state.lock() {
                state.freed.extend(freed);
            }
            return Err(e);
        }
        self.reuse(freed);
        Ok(())
    }

    /// Takes back space that durable tables no longer name, and gives it back to the host, too.
    fn reuse(&self, mut freed: Vec<Range<u64>>) {
        freed.sort_unstable_by_key(|range| range.start);
        freed.dedup_by(|next, last| {
            let continues = last.end == next.start;
            if continues {
                last.end = next.end;
            }
            continues
        });
        for range in &freed {
            if let Err(e) = self.file().punch_hole(range.start, range.end - range.start) {
                log::warn!("{}: giving space back: {e}", self.file().path().display());
            }
        }
        if let Some(state) = &mut *self.state.lock() {
            freed.into_iter().for_each(|range| state.space.release(range));
        }
    }

    /// Brings everything to its place and marks the file as clean.
    pub(super) fn end_session(&self) -> Result<()> {
        let pending = {
            let session = self.session.lock();
            match &session.failure {
                Some(failure) => return Err(failure.clone()),
                None if session.ring.is_none() => return Ok(()),
                None => self.cache.dirty_pages() > 0 || !session.unapplied.is_empty(),
            }
        };
        // As a rule everything was flushed just now.
        if pending {
            self.flush_tables()?;
        }
        let file = self.file();
        sync_file(file)?;
        let mut session = self.session.lock();
        session.headers.update(|h| h.log = Uuid::nil())?;
        session.ring = None;
        let (at, length) =
            (session.headers.header().log_offset, session.headers.header().log_length);
        if std::mem::take(&mut session.sparse_log)
            && let Err(e) = file.punch_hole(at, length.into())
        {
            log::warn!("{}: giving space back: {e}", file.path().display());
        }
        // Only now does no log entry promise a longer file.
        if let Some(state) = self.state.lock().take()
            && state.space.used_end() < state.space.file_len()
            && let Err(e) = file.set_len(state.space.used_end())
        {
            log::warn!("{}: cutting off unused space: {e}", file.path().display());
        }
        Ok(())
    }
}

impl WriteState {
    /// The lengths that a log entry of this moment states.
    fn lengths(&self) -> FileLengths {
        FileLengths { durable: self.space.file_len() / MIB * MIB, needed: self.space.used_end() }
    }
}

fn append(ring: &mut Ring, images: &[PageImage], lengths: FileLengths) -> Result<()> {
    let pages: Vec<_> =
        images.iter().map(|(page, data)| Page { at: page * LOG_SECTOR, data }).collect();
    ring.append(&pages, lengths)
}

fn apply(file: &dyn Storage, images: &[PageImage]) -> Result<()> {
    images
        .iter()
        .try_for_each(|(page, data)| write_all(file, page * LOG_SECTOR, data, "table page"))
}
