//! A writing session: from the first write to the image being closed.
//!
//! The order of what is written, and why, is in the driver's [documentation](super).

use std::cmp::Reverse;
use std::ops::Range;

use uuid::Uuid;

use super::bat;
use super::blocks::{Blocks, LogState};
use super::layout::{LOG_SECTOR, MAX_FILE, MIB, REGION_TABLE_OFFSETS, TABLE_BYTES};
use super::log::entry::Page;
use super::log::ring::{FileLengths, Ring};
use super::regions::read_copy;
use super::stock::Stock;
use crate::codec::write_all;
use crate::disk::map::{BlockMap, Contents};
use crate::disk::space::{Limits, MultipleOf, Space, Unit};
use crate::disk::tables::PageImage;
use crate::disk::writer::{Batch, Ends, Tables, Writer};
use crate::disk::{sync_file, sync_file_for};
use crate::error::{Error, Result};
use crate::storage::Storage;

/// Length of a log where the file has none.
const NEW_LOG: u64 = MIB;

impl Blocks {
    /// Prepares the file for being changed: checks that its blocks can be told apart, replays the
    /// log, begins a new one. After lack of space it can be called again.
    pub(super) fn begin_session(&self) -> Result<()> {
        let mut session = self.session.lock();
        let session = &mut *session;
        let file = &self.files[0];
        // One that was begun before the host ran out of space may lie where the file says nothing of it.
        let begun = session.ring.as_ref().map(|_| {
            let header = session.headers.header();
            header.log_offset..header.log_offset + u64::from(header.log_length)
        });
        let mut space = self.take_stock(begun)?;

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
            let ring = self.start_log(session, &mut space)?;
            session.ring = Some(ring);
        }
        // A last block that ends with the disk gets the rest of its bytes.
        space.complete()?;
        self.repair_region_tables()?;
        self.writer.begin(vec![Some(space)]);
        Ok(())
    }

    /// Finds all space in use; that of `log`, too, which may not be the one that the file came with. Fails
    /// when two structures claim the same space: whatever were written then could destroy something else.
    fn take_stock(&self, log: Option<Range<u64>>) -> Result<Space> {
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
            None => {
                let mut used = stock.finish();
                log.into_iter().for_each(|log| _ = used.mark(log));
                let limits = Limits {
                    end: MAX_FILE,
                    full: "the file would become too large",
                    least: MIB,
                    align: 1,
                    floor: 0,
                };
                let (next, lens) = (used.used_end(), [len, len]);
                let tail = MultipleOf(MIB);
                let file = self.files[0].clone();
                let mut space = Space::new(file, tail, limits, next, lens, &self.file_len);
                used.holes().for_each(|hole| space.release(hole, Contents::Stale));
                Ok(space)
            }
        }
    }

    /// Begins a new log and names it in the headers, with new identifiers.
    fn start_log(&self, session: &mut LogState, space: &mut Space) -> Result<Ring> {
        let file = &self.files[0];
        let header = session.headers.header();
        let (mut at, mut length) = (header.log_offset, u64::from(header.log_length));
        if length == 0 {
            (at, length) = (space.take(Unit::new(NEW_LOG, MIB), 1)?.range.start, NEW_LOG);
        }
        // No entry is to find the host full: the place of all of them is reserved.
        let reserving =
            |e| Error::io("reserving space for the log", &e).in_file(file.path()).at(at);
        let data = file.next_data(at).map_err(reserving)?;
        session.sparse_log = data.is_none_or(|data| data.start > at || data.end < at + length);
        file.allocate(at, length).map_err(reserving)?;
        let ring = Ring::start(
            file,
            at,
            length,
            lengths(Ends { file: space.len(), used: space.used_end() }),
        )?;
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
        let ends = self.writer.ends().and_then(|ends| ends.first().copied());
        let (Some(ring), Some(ends)) = (&mut session.ring, ends) else {
            return Err(Error::invalid("the log is not in use"));
        };
        if images.len() > ring.max_pages() {
            return Err(Error::invalid("the log is too small for the change"));
        }
        let images: Vec<_> = images.iter().collect();
        append(ring, &images, lengths(ends))?;
        apply(self.file(), images)
    }

    /// Brings everything to its place and marks the file as clean.
    pub(super) fn end_session(&self) -> Result<()> {
        let pending = {
            let session = self.session.lock();
            if session.ring.is_none() {
                return Ok(());
            }
            self.cache.dirty_pages() > 0 || !session.unapplied.is_empty()
        };
        // As a rule everything was flushed just now.
        if pending {
            self.flush()?;
        }
        let file = self.file();
        sync_file_for(file, "closing")?;
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
        if let Some(ends) = self.writer.ends().and_then(|ends| ends.first().copied())
            && ends.used < ends.file
            && let Err(e) = file.set_len(ends.used)
        {
            log::warn!("{}: cutting off unused space: {e}", file.path().display());
        }
        self.writer.end();
        Ok(())
    }
}

impl Tables for Blocks {
    fn writer(&self) -> &Writer {
        &self.writer
    }

    /// Pages that the log holds and their places do not.
    fn announce(&self, _: &Batch) -> Result<()> {
        let mut session = self.session.lock();
        apply(self.file(), &session.unapplied)?;
        session.unapplied.clear();
        Ok(())
    }

    /// Entries of the log, each synced, and their pages in place.
    fn publish(&self, batch: &Batch) -> Result<()> {
        let mut session = self.session.lock();
        let LogState { ring: Some(ring), unapplied, .. } = &mut *session else {
            return Err(Error::invalid("the log is not in use"));
        };
        // In case one entry cannot hold all: a block that becomes partially present needs its bits
        // and the bitmap's own entry, which is behind the block's in the BAT. So the bitmaps go
        // first, then the BAT from its end.
        let bat = self.shape.bat.range();
        let mut images: Vec<_> = batch.pages.iter().flatten().collect();
        images.sort_by_key(|(page, _)| (bat.contains(&(page * LOG_SECTOR)), Reverse(*page)));
        for (number, group) in images.chunks(ring.max_pages()).enumerate() {
            if number > 0 {
                self.sync("pages in place")?;
            }
            // What the file has grown by since the batch was taken is not durable.
            append(ring, group, lengths(batch.ends[0]))?;
            apply(self.file(), group.iter().copied()).inspect_err(|_| {
                *unapplied = group.iter().copied().cloned().collect();
            })?;
        }
        Ok(())
    }
}

/// The lengths that a log entry states.
fn lengths(ends: Ends) -> FileLengths {
    FileLengths { durable: ends.file / MIB * MIB, needed: ends.used }
}

fn append(ring: &mut Ring, images: &[&PageImage], lengths: FileLengths) -> Result<()> {
    let pages: Vec<_> =
        images.iter().map(|(page, data)| Page { at: page * LOG_SECTOR, data }).collect();
    ring.append(&pages, lengths)
}

fn apply<'a>(file: &dyn Storage, images: impl IntoIterator<Item = &'a PageImage>) -> Result<()> {
    images
        .into_iter()
        .try_for_each(|(page, data)| write_all(file, page * LOG_SECTOR, data, "table page"))
}
