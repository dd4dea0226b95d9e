//! Data that lies in other files of the host: where a disk's own is, and writing what another file has,
//! by sharing its blocks where the host can.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::map::{DiskRange, Source};
use super::{Content, Disk, read_failed, write_failed};
#[cfg(doc)]
use crate::error::ErrorKind;
use crate::error::{Error, Result};
use crate::storage::{SHARED_BLOCK, Storage};

/// Bytes copied at a time where blocks cannot be shared.
const CHUNK: u64 = 256 << 10;

/// What a run of a disk is, its parents included.
#[derive(Debug, Clone)]
pub enum Holder {
    /// Bytes of a file, one after the other from byte `at`.
    File {
        /// The file.
        file: Arc<dyn Storage>,
        /// Byte of the file that is the run's first.
        at: u64,
    },
    /// Zeroes that are stored nowhere.
    Nothing,
    /// Compressed, or damaged: only reading tells.
    Other,
}

impl Disk {
    /// Calls `found` with the runs of a range that lies inside the disk, in order.
    pub fn holders(
        &self,
        range: DiskRange,
        found: &mut dyn FnMut(DiskRange, Holder) -> Result<()>,
    ) -> Result<()> {
        for extent in self.extents(range.clone())?.iter() {
            let (part, skip) = super::overlap(extent, &range);
            match extent.source {
                Source::File { file, at } => {
                    let file = self.map.files()[file].clone();
                    found(part, Holder::File { file, at: at + skip })?;
                }
                Source::Zero => found(part, Holder::Nothing)?,
                Source::Packed { .. } | Source::Bad => found(part, Holder::Other)?,
                Source::Parent => match self.parent() {
                    None => found(part, Holder::Other)?,
                    Some(parent) => {
                        let below = part.start..part.end.min(parent.size()).max(part.start);
                        let past = below.end..part.end;
                        if !below.is_empty() {
                            parent.holders(below, found)?;
                        }
                        if !past.is_empty() {
                            found(past, Holder::Nothing)?;
                        }
                    }
                },
            }
        }
        Ok(())
    }

    /// Writes `len` bytes of another file at `offset`, as [`Self::write_at`] does with bytes, by sharing
    /// the host's blocks. An error of [`ErrorKind::Unsupported`] where the host, or the places of the
    /// bytes in the two files, do not allow that.
    pub fn write_from(&self, offset: u64, len: u64, from: &Foreign<'_>) -> Result<()> {
        self.write(offset, len, Content::From(from))
    }
}

/// Bytes of a file that is no part of the disk they are written to.
#[derive(Debug)]
pub struct Foreign<'a> {
    file: &'a dyn Storage,
    at: u64,
    shared: AtomicU64,
    /// The host has refused once.
    refused: AtomicBool,
}

impl<'a> Foreign<'a> {
    /// The bytes of `file` from byte `at` on.
    pub fn new(file: &'a dyn Storage, at: u64) -> Self {
        Self { file, at, shared: AtomicU64::new(0), refused: AtomicBool::new(false) }
    }

    /// How many bytes were shared so far, not copied.
    pub fn shared(&self) -> u64 {
        self.shared.load(Ordering::Relaxed)
    }

    /// Reads the bytes from the `skip`th on.
    pub(super) fn read(&self, skip: u64, buf: &mut [u8]) -> Result<()> {
        let at = self.at + skip;
        self.file.read_at(at, buf).map_err(|e| read_failed(self.file, at, &e))
    }

    /// Whether the host has refused to share, and will again.
    pub fn refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }

    /// Puts `len` bytes from the `skip`th on at byte `at` of `to`: whole blocks of the host shared,
    /// what is before and behind them copied. Where there are such blocks and they cannot be shared, it
    /// is an error of [`ErrorKind::Unsupported`], and nothing was copied.
    pub(super) fn put(&self, to: &dyn Storage, at: u64, skip: u64, len: u64) -> Result<()> {
        if len < 2 * SHARED_BLOCK {
            // May hold no whole block.
            return self.copy(to, at, skip, len);
        }
        let from_at = self.at + skip;
        let unlike = || {
            let what = "blocks of the host cannot be shared between source and target";
            Error::unsupported(what).in_file(to.path()).at(at)
        };
        if !(at ^ from_at).is_multiple_of(SHARED_BLOCK) {
            return Err(unlike());
        }
        let start = at.next_multiple_of(SHARED_BLOCK);
        let end = (at + len) / SHARED_BLOCK * SHARED_BLOCK;
        let shared = to
            .share_from(start, self.file, from_at + (start - at), end - start)
            .map_err(|e| write_failed(to, start, &e))?;
        if !shared {
            self.refused.store(true, Ordering::Relaxed);
            return Err(unlike());
        }
        self.shared.fetch_add(end - start, Ordering::Relaxed);
        self.copy(to, at, skip, start - at)?;
        self.copy(to, end, skip + (end - at), at + len - end)
    }

    fn copy(&self, to: &dyn Storage, at: u64, skip: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let mut buf = vec![0; len.min(CHUNK) as usize];
        let mut done = 0;
        while done < len {
            let part = (len - done).min(CHUNK);
            let buf = &mut buf[..part as usize];
            self.read(skip + done, buf)?;
            to.write_at(at + done, buf).map_err(|e| write_failed(to, at + done, &e))?;
            done += part;
        }
        Ok(())
    }
}
