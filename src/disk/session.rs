//! The life of a disk that is written.
//!
//! ```text
//!           begin_writes           write, discard
//!   idle ───────────────► begun ─────────────────► dirty ◄───┐
//!    │      │               │                        │       │ writes went on, or lack of space
//!    │      │ failed        │ close          flush   ▼       │
//!    │      │               │                     flushing ──┤
//!    │      ▼               ▼                        │       │ nothing was written meanwhile:
//!    │    failed ◄──────────┼────────────────────────┘       ▼ begun
//!    ▼                      ▼        a sync or a table write failed
//!  closed ◄─────────────────┘
//! ```
//!
//! # Invariants
//!
//! 1. Nothing of the image changes before [`BlockMap::begin_writes`] has succeeded, which is called until
//!    it does.
//! 2. [`BlockMap::flush`] runs once at a time, and only from here. A flush covers everything that was
//!    written before it began; whoever arrives while one is under way shares the next.
//! 3. *Failed* is for good: what should have become durable may be lost, and a second sync that succeeds
//!    would lie about it. Lack of space is no such failure: what could not be written is dirty in memory
//!    still.
//! 4. Changed tables in memory are bounded: whoever needs to change more of them than
//!    [`MAX_DIRTY`](super::tables::MAX_DIRTY) flushes first.
//! 5. [`BlockMap::close`] is called once, with everything flushed, and never on a failed disk.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::map::BlockMap;
use crate::error::{Error, ErrorKind, Result};

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Session {
    /// [`BlockMap::begin_writes`] has succeeded.
    begun: AtomicBool,
    begin: Mutex<()>,
    /// Something was written since the last flush began.
    dirty: AtomicBool,
    /// Number of flushes begun.
    flushes_begun: AtomicU64,
    /// Number, in order of beginning, of the last flush that succeeded. Held by the one that is under way.
    last_flush: Mutex<u64>,
    failure: OnceLock<Error>,
    /// How closing went, once it was tried with everything flushed.
    closed: OnceLock<Result<()>>,
}

impl Session {
    /// Whether writing has begun.
    pub(super) fn begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }

    /// Whether something was written that no flush has covered yet.
    pub(super) fn dirty(&self) -> bool {
        self.dirty.load(Ordering::Acquire)
    }

    /// Something was written.
    pub(super) fn note_write(&self) {
        self.dirty.store(true, Ordering::Release);
    }

    /// Whether closing has been tried.
    pub(super) fn closed(&self) -> bool {
        self.closed.get().is_some()
    }

    /// Whether the disk has failed for good.
    pub(super) fn failed(&self) -> bool {
        self.failure.get().is_some()
    }

    fn refuse_failed(&self) -> Result<()> {
        match self.failure.get() {
            None => Ok(()),
            Some(failure) => {
                let what = format!("refused after an earlier failure: {failure}");
                Err(Error::new(ErrorKind::Failed, what).hint("unmount and mount again"))
            }
        }
    }

    /// Remembers a failure that leaves it unknown what is on stable storage.
    fn latch(&self, failure: &Error) {
        if failure.kind() != ErrorKind::NoSpace && self.failure.set(failure.clone()).is_ok() {
            log::error!("{failure}; no more writes until the image is reopened");
        }
    }

    /// Checks that writing is possible now, and marks the image as being written before the first
    /// change. `read_only` says why the disk cannot be written, if it cannot.
    pub(super) fn begin(&self, map: &dyn BlockMap, read_only: Option<&str>) -> Result<()> {
        self.refuse_failed()?;
        if let Some(reason) = read_only {
            return Err(Error::new(ErrorKind::ReadOnly, reason.to_owned()));
        }
        if self.closed() {
            return Err(Error::new(ErrorKind::Failed, "the disk was closed"));
        }
        if !self.begun() {
            let _held = self.begin.lock();
            if !self.begun() {
                map.begin_writes().inspect_err(|e| self.latch(e))?;
                self.begun.store(true, Ordering::Release);
            }
        }
        Ok(())
    }

    /// Flushes if as many changed tables wait in memory as may.
    pub(super) fn bound_tables(&self, map: &dyn BlockMap) -> Result<()> {
        if !map.tables_full() {
            return Ok(());
        }
        // The write that needs room has not ended, yet may have changed tables.
        self.note_write();
        self.flush(map)
    }

    /// Makes every write that returned before this call durable.
    pub(super) fn flush(&self, map: &dyn BlockMap) -> Result<()> {
        let arrived = self.flushes_begun.load(Ordering::SeqCst);
        let mut last = self.last_flush.lock();
        self.refuse_failed()?;
        if *last > arrived || !self.dirty.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let number = self.flushes_begun.fetch_add(1, Ordering::SeqCst) + 1;
        if let Err(e) = map.flush() {
            self.note_write();
            self.latch(&e);
            return Err(e);
        }
        *last = number;
        Ok(())
    }

    /// Closes the image once everything is flushed. Answers the same from then on.
    pub(super) fn close(&self, map: &dyn BlockMap) -> Result<()> {
        self.closed.get_or_init(|| map.close()).clone()
    }
}
