//! Space of the host for tables that change in memory.
//!
//! A table may lie in a hole of the host's file: its pages get their space when they are first written,
//! and that is when a flush comes, to which nothing must happen any more that a write could have been
//! told. So whoever changes a page in memory reserves its space first.

use std::collections::HashSet;
use std::ops::Range;

use parking_lot::Mutex;

use super::map::FileIndex;
use crate::error::{Error, Result};
use crate::storage::Storage;

/// Bytes reserved at a time: neighbours change together as a rule.
const CHUNK: u64 = 64 << 10;

/// What was reserved in the files of one disk.
#[derive(Debug, Default)]
pub struct TableRoom(Mutex<HashSet<(FileIndex, u64)>>);

impl TableRoom {
    /// Sees to it that writing to `range` of `file`, the disk's file number `index`, takes no more space
    /// of the host. Never makes the file longer.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`](crate::ErrorKind::NoSpace) where the host has none left.
    pub fn reserve(&self, file: &dyn Storage, index: FileIndex, range: Range<u64>) -> Result<()> {
        for chunk in range.start / CHUNK..range.end.div_ceil(CHUNK) {
            let mut known = self.0.lock();
            if known.contains(&(index, chunk)) {
                continue;
            }
            let at = chunk * CHUNK;
            let failed =
                |e| Error::io("reserving space for a table", &e).in_file(file.path()).at(at);
            let end = file.len().map_err(failed)?.min(at + CHUNK);
            if at < end {
                file.allocate(at, end - at).map_err(failed)?;
            }
            // The end of the file may move on.
            if end == at + CHUNK {
                known.insert((index, chunk));
            }
        }
        Ok(())
    }

    /// Takes note that `range` was made a hole again.
    pub fn forget(&self, index: FileIndex, range: Range<u64>) {
        let mut known = self.0.lock();
        for chunk in range.start / CHUNK..range.end.div_ceil(CHUNK) {
            known.remove(&(index, chunk));
        }
    }
}
