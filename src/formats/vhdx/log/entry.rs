//! Log entries: encoding, and decoding with every check that makes an entry valid.
//!
//! ```text
//! header, 64 bytes
//! descriptors, 32 bytes each, to a 4 KiB border
//! one 4 KiB data sector per data descriptor
//! ```
//!
//! Every sector of an entry is recognisable, and the first one is unlike the others. So two entries
//! whose structure is right never overlap, and scanning a whole log reads each sector about once,
//! whatever is in it.

use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

use super::LogPlace;
use crate::codec::{guid, read_array};
use crate::error::{Error, Result};
use crate::formats::vhdx::layout::{
    LOG_SECTOR, LOGGABLE_FROM, MAX_FILE, RawDataSector, RawDescriptor, RawEntry, seal,
};
use crate::storage::Storage;

const SECTOR: usize = LOG_SECTOR as usize;
/// Most descriptors that are read from one entry: half a GiB of pages.
const MAX_DESCRIPTORS: u32 = 1 << 17;

/// A 4 KiB page of the file and its new contents.
#[derive(Debug, Clone, Copy)]
pub struct Page<'a> {
    /// Byte offset in the file, a multiple of 4 KiB.
    pub at: u64,
    /// 4 KiB.
    pub data: &'a [u8],
}

/// What an entry says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryHeader {
    /// Bytes of the entry.
    pub length: u64,
    /// Offset in the ring of the oldest entry that is still needed.
    pub tail: u64,
    /// Number of the entry.
    pub sequence: u64,
    /// See [`RawEntry::flushed_file_offset`].
    pub flushed_file_offset: u64,
    /// See [`RawEntry::last_file_offset`].
    pub last_file_offset: u64,
}

/// What an entry does to one place of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Update {
    /// The 4 KiB at `at` become a logged sector.
    Sector {
        /// Byte offset in the file.
        at: u64,
        /// The sector's bytes, less those that the descriptor holds.
        sector: LoggedSector,
    },
    /// `len` bytes at `at` become zero.
    Zero {
        /// Byte offset in the file.
        at: u64,
        /// Bytes.
        len: u64,
    },
}

/// A sector in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoggedSector {
    /// Byte offset in the file of the data sector.
    at: u64,
    leading: [u8; 8],
    trailing: [u8; 4],
}

impl LoggedSector {
    /// Reads the sector's contents.
    pub fn read(&self, file: &dyn Storage) -> Result<[u8; SECTOR]> {
        let mut bytes: [u8; SECTOR] = read_array(file, self.at, "log entry")?;
        bytes[..8].copy_from_slice(&self.leading);
        bytes[SECTOR - 4..].copy_from_slice(&self.trailing);
        Ok(bytes)
    }
}

/// Sectors that an entry with `descriptors` descriptors has before its data.
fn descriptor_sectors(descriptors: u64) -> u64 {
    (size_of::<RawEntry>() as u64 + descriptors * size_of::<RawDescriptor>() as u64)
        .div_ceil(LOG_SECTOR)
}

/// Bytes of an entry that holds `pages` pages.
pub fn entry_length(pages: u64) -> u64 {
    (descriptor_sectors(pages) + pages) * LOG_SECTOR
}

/// Encodes an entry that holds `pages`. `header.length` is not looked at.
pub fn encode(log: Uuid, header: &EntryHeader, pages: &[Page<'_>]) -> Vec<u8> {
    let length = entry_length(pages.len() as u64);
    let raw = RawEntry {
        signature: RawEntry::SIGNATURE,
        checksum: 0.into(),
        length: (length as u32).into(),
        tail: (header.tail as u32).into(),
        sequence: header.sequence.into(),
        descriptors: (pages.len() as u32).into(),
        reserved: 0.into(),
        log_guid: log.to_bytes_le(),
        flushed_file_offset: header.flushed_file_offset.into(),
        last_file_offset: header.last_file_offset.into(),
    };
    let mut bytes = Vec::with_capacity(length as usize);
    bytes.extend_from_slice(raw.as_bytes());
    for page in pages {
        let mut raw = RawDescriptor {
            signature: RawDescriptor::DATA,
            trailing: [0; 4],
            leading: [0; 8],
            file_offset: page.at.into(),
            sequence: header.sequence.into(),
        };
        raw.leading.copy_from_slice(&page.data[..8]);
        raw.trailing.copy_from_slice(&page.data[SECTOR - 4..]);
        bytes.extend_from_slice(raw.as_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
    for page in pages {
        bytes.extend_from_slice(&RawDataSector::SIGNATURE);
        bytes.extend_from_slice(&((header.sequence >> 32) as u32).to_le_bytes());
        bytes.extend_from_slice(&page.data[8..SECTOR - 4]);
        bytes.extend_from_slice(&(header.sequence as u32).to_le_bytes());
    }
    seal(&mut bytes);
    bytes
}

/// Decodes the entry at `start` of the ring, handing each update to `update` before it is known
/// whether the entry is valid as a whole. `None`: there is no valid entry.
pub fn decode(
    file: &dyn Storage,
    log: &LogPlace,
    start: u64,
    mut update: impl FnMut(Update),
) -> Result<Option<EntryHeader>> {
    let read = |index: u64| -> Result<[u8; SECTOR]> {
        read_array(file, log.position(start + index * LOG_SECTOR), "log")
    };
    let mut sector = read(0)?;
    let Ok((raw, _)) = RawEntry::read_from_prefix(&sector) else { return Ok(None) };
    let Some(header) = check_header(&raw, log) else { return Ok(None) };
    let descriptors = raw.descriptors.get();
    let sectors = header.length / LOG_SECTOR;
    let before_data = descriptor_sectors(descriptors.into());
    if before_data > sectors {
        return Ok(None);
    }
    if descriptors > MAX_DESCRIPTORS {
        let what = format!("a log entry of {descriptors} descriptors is too large");
        return Err(Error::unsupported(what).at(log.position(start)));
    }

    // The checksum counts its own field as zero.
    sector[4..8].fill(0);
    let mut crc = crc32c::crc32c(&sector);
    sector[..size_of::<RawEntry>()].fill(0);
    let mut data_sectors = 0;
    let mut left = descriptors as usize;
    for index in 0..before_data {
        let skip = if index == 0 { size_of::<RawEntry>() } else { 0 };
        if index > 0 {
            sector = read(index)?;
            crc = crc32c::crc32c_append(crc, &sector);
        }
        let slots = sector[skip..].chunks_exact(size_of::<RawDescriptor>());
        for slot in slots.take(left) {
            let data_at = log.position(start + (before_data + data_sectors) * LOG_SECTOR);
            let Some(change) = check_descriptor(slot, &header, log, data_at) else {
                return Ok(None);
            };
            data_sectors += u64::from(matches!(change, Update::Sector { .. }));
            update(change);
            left -= 1;
        }
    }
    if before_data + data_sectors != sectors {
        return Ok(None);
    }
    for index in before_data..sectors {
        sector = read(index)?;
        let whole = RawDataSector::ref_from_bytes(&sector).is_ok_and(|data| {
            data.signature == RawDataSector::SIGNATURE
                && u64::from(data.sequence_high.get()) == header.sequence >> 32
                && data.sequence_low.get() == header.sequence as u32
        });
        if !whole {
            return Ok(None);
        }
        crc = crc32c::crc32c_append(crc, &sector);
    }
    Ok((crc == raw.checksum.get()).then_some(header))
}

fn check_header(raw: &RawEntry, log: &LogPlace) -> Option<EntryHeader> {
    let header = EntryHeader {
        length: raw.length.get().into(),
        tail: raw.tail.get().into(),
        sequence: raw.sequence.get(),
        flushed_file_offset: raw.flushed_file_offset.get(),
        last_file_offset: raw.last_file_offset.get(),
    };
    let valid = raw.signature == RawEntry::SIGNATURE
        && guid(&raw.log_guid) == log.guid
        && header.length.is_multiple_of(LOG_SECTOR)
        && header.length >= LOG_SECTOR
        && header.length < log.length
        && header.tail.is_multiple_of(LOG_SECTOR)
        && header.tail < log.length
        && header.sequence > 0
        && header.last_file_offset <= MAX_FILE;
    valid.then_some(header)
}

fn check_descriptor(
    slot: &[u8],
    header: &EntryHeader,
    log: &LogPlace,
    data_at: u64,
) -> Option<Update> {
    let raw = RawDescriptor::read_from_bytes(slot).ok()?;
    let at = raw.file_offset.get();
    let (update, len) = match raw.signature {
        RawDescriptor::DATA => {
            let sector = LoggedSector { at: data_at, leading: raw.leading, trailing: raw.trailing };
            (Update::Sector { at, sector }, LOG_SECTOR)
        }
        RawDescriptor::ZERO => {
            let len = u64::from_le_bytes(raw.leading);
            (Update::Zero { at, len }, len)
        }
        _ => return None,
    };
    let end = at.checked_add(len).filter(|end| *end <= MAX_FILE)?;
    let in_log = at < log.range().end && end > log.range().start;
    let valid = raw.sequence.get() == header.sequence
        && at.is_multiple_of(LOG_SECTOR)
        && len.is_multiple_of(LOG_SECTOR)
        && at >= LOGGABLE_FROM
        && !in_log;
    valid.then_some(update)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryFile;
    use std::sync::Arc;

    const MIB: u64 = 1 << 20;

    fn place() -> LogPlace {
        LogPlace { offset: MIB, length: MIB, guid: Uuid::from_u128(7) }
    }

    fn header(sequence: u64) -> EntryHeader {
        EntryHeader {
            length: 0,
            tail: 0,
            sequence,
            flushed_file_offset: 2 * MIB,
            last_file_offset: 3 * MIB,
        }
    }

    /// A file whose ring holds `bytes` at `start`, wrapped around.
    fn with_entry(bytes: &[u8], start: u64) -> Arc<MemoryFile> {
        let file = MemoryFile::new("x", &[]);
        file.set_len(4 * MIB).unwrap();
        for (i, sector) in bytes.chunks(SECTOR).enumerate() {
            file.write_at(place().position(start + i as u64 * LOG_SECTOR), sector).unwrap();
        }
        file
    }

    fn numbered(pages: usize) -> Vec<Vec<u8>> {
        (0..pages).map(|i| (0..SECTOR).map(|b| (b * 3 + i) as u8).collect()).collect()
    }

    fn as_pages(data: &[Vec<u8>]) -> Vec<Page<'_>> {
        let at = |i| 2 * MIB + i as u64 * LOG_SECTOR;
        data.iter().enumerate().map(|(i, data)| Page { at: at(i), data }).collect()
    }

    #[test]
    fn entries_survive_encoding_and_wrapping() {
        for (pages, start) in [(0, 0), (1, 4096), (126, 0), (127, MIB - 8192), (200, MIB - 4096)] {
            let data = numbered(pages);
            let bytes = encode(place().guid, &header((5 << 32) | 9), &as_pages(&data));
            assert_eq!(bytes.len() as u64, entry_length(pages as u64));
            let file = with_entry(&bytes, start);
            let mut updates = Vec::new();
            let decoded = decode(&*file, &place(), start, |u| updates.push(u)).unwrap().unwrap();
            assert_eq!(
                decoded,
                EntryHeader { length: bytes.len() as u64, ..header((5 << 32) | 9) }
            );
            assert_eq!(updates.len(), pages);
            for (i, update) in updates.iter().enumerate() {
                let Update::Sector { at, sector } = update else { panic!() };
                assert_eq!(*at, 2 * MIB + i as u64 * LOG_SECTOR);
                assert_eq!(sector.read(&*file).unwrap()[..], data[i]);
            }
        }
    }

    #[test]
    fn a_torn_sector_anywhere_makes_the_entry_invalid() {
        let data = numbered(130);
        let bytes = encode(place().guid, &header(3), &as_pages(&data));
        for torn in 0..bytes.len() / SECTOR {
            for (from, to) in [(0, SECTOR), (512, 1024), (SECTOR - 512, SECTOR)] {
                let mut bad = bytes.clone();
                let sector = torn * SECTOR;
                bad[sector + from..sector + to].fill(0xee);
                let file = with_entry(&bad, 0);
                assert_eq!(decode(&*file, &place(), 0, |_| ()).unwrap(), None, "sector {torn}");
            }
        }
    }

    #[test]
    fn every_field_is_checked_even_when_the_checksum_is_right() {
        let data = numbered(1);
        let good = encode(place().guid, &header(3), &as_pages(&data));
        // Offsets in the entry; a descriptor begins at 64, the data sector at 4096.
        let cases: [(&str, usize, &[u8]); 17] = [
            ("signature", 0, b"logf"),
            ("length unaligned", 8, &0x2001u32.to_le_bytes()),
            ("length too small", 8, &0u32.to_le_bytes()),
            ("length of the ring", 8, &(MIB as u32).to_le_bytes()),
            ("length is not what the descriptors need", 8, &0x3000u32.to_le_bytes()),
            ("tail unaligned", 12, &100u32.to_le_bytes()),
            ("tail outside", 12, &(MIB as u32).to_le_bytes()),
            ("no sequence number", 16, &0u64.to_le_bytes()),
            ("too many descriptors", 24, &u32::MAX.to_le_bytes()),
            ("foreign GUID", 32, &[1]),
            ("descriptor signature", 64, b"dusc"),
            ("below the tables", 80, &(128u64 << 10).to_le_bytes()),
            ("inside the log", 80, &(MIB + 4096).to_le_bytes()),
            ("unaligned", 80, &(2 * MIB + 512).to_le_bytes()),
            ("end overflows", 80, &(u64::MAX - 4095).to_le_bytes()),
            ("descriptor sequence", 88, &4u64.to_le_bytes()),
            ("data sequence", 4096 + 4092, &4u32.to_le_bytes()),
        ];
        for (what, at, value) in cases {
            let mut bad = good.clone();
            bad[at..at + value.len()].copy_from_slice(value);
            seal(&mut bad);
            let file = with_entry(&bad, 0);
            assert_eq!(decode(&*file, &place(), 0, |_| ()).unwrap(), None, "{what}");
        }
    }

    #[test]
    fn zero_descriptors_name_their_range() {
        let mut bytes = encode(place().guid, &header(3), &[]);
        bytes[24] = 1;
        bytes[64..68].copy_from_slice(b"zero");
        bytes[72..80].copy_from_slice(&8192u64.to_le_bytes());
        bytes[80..88].copy_from_slice(&(2 * MIB).to_le_bytes());
        bytes[88] = 3;
        seal(&mut bytes);
        let mut updates = Vec::new();
        let file = with_entry(&bytes, 0);
        assert!(decode(&*file, &place(), 0, |u| updates.push(u)).unwrap().is_some());
        assert_eq!(updates, [Update::Zero { at: 2 * MIB, len: 8192 }]);
    }
}
