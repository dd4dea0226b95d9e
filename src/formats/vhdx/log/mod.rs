//! The log: what makes a change of several tables happen as a whole or not at all.
//!
//! The log is a ring of 4 KiB sectors. An *entry* holds new contents for a number of 4 KiB pages of
//! the file and carries a sequence number and the log GUID of the header; only entries with that
//! GUID count. Each entry names, as its *tail*, the oldest entry that is still needed. The newest
//! unbroken run of entries that contains its own tail is the *active sequence*: what a file that
//! was not closed has to be brought up to date with.
//!
//! [`entry`] is the form on disk, [`replay`] finds the active sequence, [`ring`] appends.

pub mod entry;
pub mod replay;
pub mod ring;

use std::ops::Range;

/// Where the log lies, and which entries in it count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogPlace {
    /// Byte offset in the file.
    pub offset: u64,
    /// Length in bytes, a multiple of the log's sector.
    pub length: u64,
    /// GUID of the entries that count.
    pub guid: uuid::Uuid,
}

impl LogPlace {
    /// Byte offset in the file of the byte at `at` of the ring, which may be past its end.
    pub fn position(&self, at: u64) -> u64 {
        self.offset + at % self.length
    }

    /// The bytes of the file that the log takes.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.length
    }
}
