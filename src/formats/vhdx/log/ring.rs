//! Appending entries to the log.
//!
//! # Why the ring never fills up
//!
//! An entry is appended only after everything that earlier entries hold was written to its place
//! and synced: the sync of the payload, which precedes every entry anyway, covers that too. So
//! every entry is its own tail, and the only sectors of the ring that a crash may need are those of
//! the newest durable entry. The next one goes right behind it; as no entry takes half of the ring,
//! it cannot reach around into it.

use std::sync::Arc;

use uuid::Uuid;

use super::LogPlace;
use super::entry::{EntryHeader, Page, encode, entry_length};
use crate::codec::write_all;
use crate::disk::sync_file;
use crate::error::Result;
use crate::formats::plan::Steps;
use crate::formats::vhdx::layout::LOG_SECTOR;
use crate::storage::Storage;

/// Most pages in one entry, whatever the size of the log.
const MAX_PAGES: u64 = 4096;

/// File lengths that go into an entry, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct FileLengths {
    /// What the file has durably.
    pub durable: u64,
    /// What the file needs to hold everything.
    pub needed: u64,
}

/// The writing end of the log.
#[derive(Debug)]
pub struct Ring {
    file: Arc<dyn Storage>,
    place: LogPlace,
    /// Offset in the ring of the next entry.
    head: u64,
    /// Number of the next entry.
    sequence: u64,
}

impl Ring {
    /// Begins a log with an entry that changes nothing, durable on return. The header must not name
    /// any log then, and name this one's GUID afterwards: so it never names a log without a valid
    /// entry.
    pub fn start(
        file: &Arc<dyn Storage>,
        offset: u64,
        length: u64,
        lengths: FileLengths,
    ) -> Result<Self> {
        let mut ring = Self::new(file, offset, length);
        ring.append(&[], lengths)?;
        Ok(ring)
    }

    /// A log without any entry yet, under a GUID of its own.
    pub fn new(file: &Arc<dyn Storage>, offset: u64, length: u64) -> Self {
        let place = LogPlace { offset, length, guid: Uuid::new_v4() };
        Self { file: file.clone(), place, head: 0, sequence: 1 }
    }

    /// GUID of the log.
    pub fn guid(&self) -> Uuid {
        self.place.guid
    }

    /// Most pages that [`Self::append`] takes.
    pub fn max_pages(&self) -> usize {
        let half = (self.place.length - LOG_SECTOR) / 2;
        let fits = |pages: &u64| entry_length(*pages) <= half;
        let upper = (half / LOG_SECTOR).saturating_sub(1).clamp(1, MAX_PAGES);
        // The descriptors take at most a sector in every 127.
        (upper - upper / 127..=upper).rev().find(fits).unwrap_or(1) as usize
    }

    /// Appends an entry with `pages`, durable on return. Everything appended before must be in its
    /// place durably. After an error the entry may be there or not; the same call may be repeated
    /// unless it was the sync that failed.
    pub fn append(&mut self, pages: &[Page<'_>], lengths: FileLengths) -> Result<()> {
        let bytes = self.encode(pages, lengths);
        for (at, part) in self.places(&bytes) {
            write_all(&*self.file, at, part, "log entry")?;
        }
        sync_file(&*self.file)?;
        self.advance(&bytes);
        Ok(())
    }

    /// Plans what [`Self::append`] does.
    pub fn plan(&mut self, pages: &[Page<'_>], lengths: FileLengths, plan: &mut Steps) {
        let bytes = self.encode(pages, lengths);
        for (at, part) in self.places(&bytes) {
            plan.write(&self.file, at, part.to_vec(), "an entry of the log");
        }
        plan.sync(&self.file);
        self.advance(&bytes);
    }

    fn encode(&self, pages: &[Page<'_>], lengths: FileLengths) -> Vec<u8> {
        let header = EntryHeader {
            length: 0,
            tail: self.head,
            sequence: self.sequence,
            flushed_file_offset: lengths.durable,
            last_file_offset: lengths.needed,
        };
        encode(self.place.guid, &header, pages)
    }

    /// The parts of the next entry, of which the second begins the ring anew, and where they go.
    fn places<'b>(&self, bytes: &'b [u8]) -> impl Iterator<Item = (u64, &'b [u8])> + use<'b> {
        let before_end = ((self.place.length - self.head) as usize).min(bytes.len());
        let (first, wrapped) = bytes.split_at(before_end);
        let parts = [(self.place.position(self.head), first), (self.place.offset, wrapped)];
        parts.into_iter().filter(|(_, part)| !part.is_empty())
    }

    fn advance(&mut self, entry: &[u8]) {
        self.head = (self.head + entry.len() as u64) % self.place.length;
        self.sequence += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::super::replay::find_active;
    use super::*;
    use crate::storage::memory::MemoryFile;

    const MIB: u64 = 1 << 20;
    const LENGTHS: FileLengths = FileLengths { durable: 4 * MIB, needed: 3 * MIB };

    fn ring(length: u64) -> (Arc<dyn Storage>, Ring) {
        let file: Arc<dyn Storage> = MemoryFile::new("x", &[]);
        file.set_len(MIB + length).unwrap();
        let ring = Ring::start(&file, MIB, length, LENGTHS).unwrap();
        (file, ring)
    }

    #[test]
    fn the_newest_entry_is_always_the_active_sequence() {
        let (file, mut ring) = ring(MIB);
        let place = ring.place;
        let data = [5; 4096];
        for i in 0..500u64 {
            let at = ring.head;
            let count = i * 7 % (ring.max_pages() as u64 + 1);
            let pages: Vec<_> =
                (0..count).map(|p| Page { at: 8 * MIB + p * 4096, data: &data }).collect();
            ring.append(&pages, LENGTHS).unwrap();
            let active = find_active(&*file, &place).unwrap().unwrap();
            assert_eq!(active.entries, [at], "entry {i}");
            assert_eq!(active.newest.sequence, i + 2);
            assert_eq!(active.newest.flushed_file_offset, 4 * MIB);
            assert_eq!(active.newest.last_file_offset, 3 * MIB);
        }
    }

    #[test]
    fn a_torn_entry_never_costs_the_one_before() {
        let (file, mut ring) = ring(MIB);
        let place = ring.place;
        let data = [6; 4096];
        let largest: Vec<_> = (0..ring.max_pages() as u64)
            .map(|p| Page { at: 8 * MIB + p * 4096, data: &data })
            .collect();
        for _ in 0..20 {
            ring.append(&largest, LENGTHS).unwrap();
            let (head, durable) = (ring.head, ring.sequence - 1);
            // The next entry's sectors hold anything at all.
            for i in 0..entry_length(largest.len() as u64) / 4096 {
                file.write_at(place.position(head + i * 4096), &[0xee; 4096]).unwrap();
            }
            let active = find_active(&*file, &place).unwrap().unwrap();
            assert_eq!(active.newest.sequence, durable);
        }
    }

    #[test]
    fn two_largest_entries_fit_into_the_ring() {
        for length in [MIB, 2 * MIB, 7 * MIB, 64 * MIB] {
            let (_, ring) = ring(length);
            let pages = ring.max_pages() as u64;
            assert!(2 * entry_length(pages) < length, "{length}");
            assert!(pages == MAX_PAGES || 2 * entry_length(pages + 1) + 4096 > length, "{length}");
        }
    }
}
