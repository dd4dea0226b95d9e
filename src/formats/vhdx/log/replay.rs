//! Finding the active sequence and turning it into the [`Overlay`] that brings the file up to date.

use super::LogPlace;
use super::entry::{EntryHeader, Update, decode};
use crate::codec::read_exact;
use crate::error::{Error, Result};
use crate::formats::vhdx::layout::{LOG_SECTOR, RawEntry};
use crate::formats::vhdx::overlay::Overlay;
use crate::storage::Storage;

/// Most updates that are kept in memory for one file, some 10 MiB: half a GiB of pages, where logs of
/// 1 MiB are what anybody makes.
const MAX_UPDATES: usize = 1 << 17;
/// Bytes of the log that are looked at together when entries are searched for.
const CHUNK: u64 = 1 << 20;

/// The entries that have to be replayed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// Offset in the ring of each entry, oldest first; never empty.
    pub entries: Vec<u64>,
    /// The newest entry.
    pub newest: EntryHeader,
}

/// A run of entries that follow one another in place and in number.
struct Run {
    entries: Vec<u64>,
    newest: EntryHeader,
    /// Offset in the ring where the run ends.
    head: u64,
}

/// Finds the active sequence; `None` when no entry counts.
pub fn find_active(file: &dyn Storage, log: &LogPlace) -> Result<Option<Sequence>> {
    let mut best: Option<Sequence> = None;
    let mut at = 0;
    loop {
        let Some(start) = find_entry(file, log, at)? else { return Ok(best) };
        at = start;
        let next = match read_run(file, log, at)? {
            None => at + LOG_SECTOR,
            Some(run) => {
                // Every shorter run that ends here has the same newest entry, so when its tail
                // lies outside this run it lies outside those, too: they can be skipped.
                let tail = run.entries.iter().position(|start| *start == run.newest.tail);
                if let Some(tail) = tail
                    && best.as_ref().is_none_or(|b| b.newest.sequence < run.newest.sequence)
                {
                    let entries = run.entries[tail..].to_vec();
                    best = Some(Sequence { entries, newest: run.newest });
                }
                run.head
            }
        };
        // A run that wraps ends at or before where it began.
        if next >= log.length || next <= at {
            return Ok(best);
        }
        at = next;
    }
}

/// The first sector of the ring at or after `from` that begins like an entry. Holes of the host's file are
/// passed over, so that a log costs what is stored of it.
fn find_entry(file: &dyn Storage, log: &LogPlace, from: u64) -> Result<Option<u64>> {
    let mut buf = Vec::new();
    let mut at = from;
    while at < log.length {
        let place = log.position(at);
        let data = file
            .next_data(place)
            .map_err(|e| Error::io("looking for the log", &e).in_file(file.path()).at(place))?;
        let Some(data) = data.filter(|data| data.start < log.range().end) else { return Ok(None) };
        at = (data.start.max(place) - log.offset) / LOG_SECTOR * LOG_SECTOR;
        // Where an entry begins as a rule the first sector tells.
        let len = if buf.is_empty() { LOG_SECTOR } else { CHUNK };
        buf.resize(len.min(log.length - at) as usize, 0);
        read_exact(file, log.position(at), &mut buf, "log")?;
        let found = buf
            .chunks(LOG_SECTOR as usize)
            .position(|sector| sector.starts_with(&RawEntry::SIGNATURE));
        if let Some(index) = found {
            return Ok(Some(at + index as u64 * LOG_SECTOR));
        }
        at += buf.len() as u64;
    }
    Ok(None)
}

/// Reads entries from `start` as long as each continues the one before.
fn read_run(file: &dyn Storage, log: &LogPlace, start: u64) -> Result<Option<Run>> {
    let mut run: Option<Run> = None;
    let mut at = start;
    let mut total = 0;
    while let Some(header) = decode(file, log, at, |_| ())? {
        let follows =
            run.as_ref().is_none_or(|r| r.newest.sequence.checked_add(1) == Some(header.sequence));
        total += header.length;
        if !follows || total > log.length {
            break;
        }
        let head = (at + header.length) % log.length;
        match &mut run {
            Some(run) => {
                run.entries.push(at);
                run.newest = header;
                run.head = head;
            }
            None => run = Some(Run { entries: vec![at], newest: header, head }),
        }
        at = head;
    }
    Ok(run)
}

/// What the sequence does to a file that is `file_len` bytes long.
pub fn overlay(
    file: &dyn Storage,
    log: &LogPlace,
    sequence: &Sequence,
    file_len: u64,
) -> Result<Overlay> {
    let mut overlay = Overlay::new(file_len.max(sequence.newest.last_file_offset));
    for &start in &sequence.entries {
        let mut updates = Vec::new();
        decode(file, log, start, |update| updates.push(update))?;
        for update in updates {
            match update {
                Update::Sector { at, sector } => overlay.put(at, sector),
                Update::Zero { at, len } => overlay.zero(at, len),
            }
        }
        if overlay.parts() > MAX_UPDATES {
            return Err(Error::unsupported("the log holds too many updates").at(log.offset));
        }
    }
    Ok(overlay)
}

#[cfg(test)]
mod tests {
    use super::super::entry::{Page, encode, entry_length};
    use super::*;
    use crate::storage::faulty::{Call, Faults, FaultyHost};
    use crate::storage::memory::{MemoryFile, MemoryHost};
    use crate::storage::{Access, Host};
    use std::path::Path;
    use std::sync::Arc;
    use uuid::Uuid;

    const MIB: u64 = 1 << 20;
    const PAGE: u64 = 2 * MIB;

    fn place() -> LogPlace {
        LogPlace { offset: MIB, length: MIB, guid: Uuid::from_u128(7) }
    }

    fn empty() -> Arc<MemoryFile> {
        let file = MemoryFile::new("x", &[]);
        file.set_len(4 * MIB).unwrap();
        file
    }

    /// Puts an entry of `pages` pages filled with `sequence` into the ring; returns where it ends.
    fn put(file: &MemoryFile, at: u64, sequence: u64, tail: u64, pages: u64) -> u64 {
        let data = vec![sequence as u8; LOG_SECTOR as usize];
        let pages: Vec<_> =
            (0..pages).map(|i| Page { at: PAGE + i * LOG_SECTOR, data: &data }).collect();
        let header = EntryHeader {
            length: 0,
            tail,
            sequence,
            flushed_file_offset: 4 * MIB,
            last_file_offset: 5 * MIB,
        };
        let bytes = encode(place().guid, &header, &pages);
        for (i, sector) in bytes.chunks(LOG_SECTOR as usize).enumerate() {
            file.write_at(place().position(at + i as u64 * LOG_SECTOR), sector).unwrap();
        }
        (at + bytes.len() as u64) % MIB
    }

    fn active(file: &MemoryFile) -> Option<(Vec<u64>, u64)> {
        find_active(file, &place()).unwrap().map(|s| (s.entries, s.newest.sequence))
    }

    #[test]
    fn the_newest_run_from_its_own_tail_is_active() {
        let file = empty();
        assert_eq!(active(&file), None);
        let second = put(&file, 0, 5, 0, 1);
        let third = put(&file, second, 6, 0, 2);
        put(&file, third, 7, second, 1);
        assert_eq!(active(&file), Some((vec![second, third], 7)));
    }

    #[test]
    fn a_gap_in_the_numbers_ends_a_run() {
        let file = empty();
        let second = put(&file, 0, 5, 0, 1);
        put(&file, second, 9, second, 1);
        assert_eq!(active(&file), Some((vec![second], 9)));
        // The one after the gap is of no use when its tail is before the gap.
        put(&file, second, 9, 0, 1);
        assert_eq!(active(&file), Some((vec![0], 5)));
    }

    #[test]
    fn a_sequence_that_wraps_is_found() {
        let file = empty();
        let start = MIB - 2 * LOG_SECTOR;
        let second = put(&file, start, 10, start, 3);
        let third = put(&file, second, 11, start, 1);
        put(&file, third, 12, start, 1);
        // Leftovers in the middle with smaller numbers.
        put(&file, MIB / 2, 3, MIB / 2, 1);
        assert_eq!(active(&file), Some((vec![start, second, third], 12)));
    }

    #[test]
    fn entries_behind_much_that_is_none_are_found() {
        let file = empty();
        let end = put(&file, MIB / 2, 5, MIB / 2, 1);
        file.write_at(MIB + end, &vec![0xee; 100 << 10]).unwrap();
        put(&file, MIB - 2 * LOG_SECTOR, 9, MIB - 2 * LOG_SECTOR, 1);
        assert_eq!(active(&file), Some((vec![MIB - 2 * LOG_SECTOR], 9)));
    }

    #[test]
    fn a_log_that_is_a_hole_is_not_read() {
        let host = MemoryHost::new();
        host.insert(MemoryFile::new("/x", &[]));
        let faults = Arc::new(Faults::default());
        let file = FaultyHost::over(host, &faults).open(Path::new("/x"), Access::Write).unwrap();
        file.set_len(3 << 30).unwrap();
        let place = LogPlace { offset: MIB, length: 1 << 30, guid: Uuid::from_u128(7) };
        assert_eq!(find_active(&*file, &place).unwrap(), None);
        assert!(faults.count(&[Call::Read, Call::Look]) < 10);
    }

    #[test]
    fn a_torn_newest_entry_leaves_the_ones_before_it() {
        let file = empty();
        let second = put(&file, 0, 5, 0, 1);
        let end = put(&file, second, 6, second, 4);
        file.write_at(MIB + end - LOG_SECTOR, &[0; 512]).unwrap();
        assert_eq!(active(&file), Some((vec![0], 5)));
    }

    #[test]
    fn a_ring_full_to_the_last_sector_is_found() {
        let file = empty();
        let mut at = 0;
        for sequence in 1..=128 {
            at = put(&file, at, sequence, 0, 1);
        }
        assert_eq!((at, entry_length(1) * 128), (0, MIB));
        let (entries, newest) = active(&file).unwrap();
        assert_eq!((entries.len(), newest), (128, 128));
    }

    #[test]
    fn later_entries_of_the_sequence_win() {
        let file = empty();
        let second = put(&file, 0, 5, 0, 3);
        put(&file, second, 6, 0, 1);
        let sequence = find_active(&*file, &place()).unwrap().unwrap();
        let overlay = overlay(&*file, &place(), &sequence, 4 * MIB).unwrap();
        assert_eq!(overlay.file_len(), 5 * MIB);
        let mut buf = vec![0; 3 * LOG_SECTOR as usize];
        overlay.read(&*file, PAGE, &mut buf).unwrap();
        assert_eq!([buf[0], buf[4096], buf[8192]], [6, 5, 5]);
    }
}
