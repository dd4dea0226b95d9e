//! The file type identifier and the two headers: which one is current, and how a new one replaces
//! it without a moment in which neither is good.

use std::sync::Arc;

use uuid::Uuid;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::layout::{
    CREATOR_BYTES, FILE_SIGNATURE, HEADER_BYTES, HEADER_OFFSETS, LOG_SECTOR, MAX_LOG, MIB,
    RawHeader, seal, sealed,
};
use crate::codec::{guid, read_array, utf16, write_all};
use crate::disk::sync_file;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;

/// Reads who made the file.
pub fn read_creator(file: &dyn Storage) -> Result<String> {
    let bytes: [u8; 8 + CREATOR_BYTES] = read_array(file, 0, "file type identifier")?;
    if bytes[..8] != FILE_SIGNATURE {
        return Err(Error::new(ErrorKind::NotThisFormat, "not a VHDX file").at(0));
    }
    Ok(utf16(&bytes[8..], false))
}

/// A header's contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// See [`RawHeader::sequence`].
    pub sequence: u64,
    /// See [`RawHeader::file_write_guid`].
    pub file_write: Uuid,
    /// See [`RawHeader::data_write_guid`].
    pub data_write: Uuid,
    /// See [`RawHeader::log_guid`].
    pub log: Uuid,
    /// See [`RawHeader::log_version`].
    pub log_version: u16,
    /// See [`RawHeader::version`].
    pub version: u16,
    /// See [`RawHeader::log_length`].
    pub log_length: u32,
    /// See [`RawHeader::log_offset`].
    pub log_offset: u64,
}

impl Header {
    /// Decodes a header; `None` when signature or checksum are wrong.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        Self::decode_unsealed(bytes).filter(|_| sealed(bytes))
    }

    /// Decodes a header, whatever its checksum.
    fn decode_unsealed(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let raw = RawHeader::read_from_bytes(bytes).ok()?;
        (raw.signature == RawHeader::SIGNATURE).then(|| Self {
            sequence: raw.sequence.get(),
            file_write: guid(&raw.file_write_guid),
            data_write: guid(&raw.data_write_guid),
            log: guid(&raw.log_guid),
            log_version: raw.log_version.get(),
            version: raw.version.get(),
            log_length: raw.log_length.get(),
            log_offset: raw.log_offset.get(),
        })
    }

    /// Encodes the header, checksum included.
    pub fn encode(&self) -> Vec<u8> {
        let mut raw = RawHeader::new_zeroed();
        raw.signature = RawHeader::SIGNATURE;
        raw.sequence = self.sequence.into();
        raw.file_write_guid = self.file_write.to_bytes_le();
        raw.data_write_guid = self.data_write.to_bytes_le();
        raw.log_guid = self.log.to_bytes_le();
        raw.log_version = self.log_version.into();
        raw.version = self.version.into();
        raw.log_length = self.log_length.into();
        raw.log_offset = self.log_offset.into();
        let mut bytes = raw.as_bytes().to_vec();
        seal(&mut bytes);
        bytes
    }

    /// Whether there is a log to replay.
    pub fn dirty(&self) -> bool {
        !self.log.is_nil()
    }

    /// Whether the log lies where a log may lie, in a file of `file_len` bytes.
    pub fn check_log_place(&self, file_len: u64) -> Result<()> {
        let at = self.log_offset;
        let len = u64::from(self.log_length);
        let aligned = at.is_multiple_of(MIB) && len.is_multiple_of(MIB) && at >= MIB;
        if len < LOG_SECTOR || !aligned || at.checked_add(len).is_none_or(|end| end > file_len) {
            let what = format!("the log of {len:#x} bytes at {at:#x} has no valid place");
            return Err(Error::corrupt(what));
        }
        if self.log_length > MAX_LOG {
            return Err(Error::unsupported(format!("a log of {len:#x} bytes is too large")));
        }
        Ok(())
    }
}

/// What the two header slots hold.
#[derive(Debug, Clone)]
pub struct Headers {
    /// Each slot's header, if it is valid.
    pub slots: [Option<Header>; 2],
    /// The slot of the current header.
    pub current: usize,
    /// Two different headers claim to be current.
    pub ambiguous: bool,
}

impl Headers {
    /// Reads both slots and finds the current header.
    pub fn read(file: &dyn Storage) -> Result<Self> {
        let slot = |i: usize| -> Result<Option<Header>> {
            Ok(Header::decode(&read_array(file, HEADER_OFFSETS[i], "header")?))
        };
        let slots = [slot(0)?, slot(1)?];
        let (current, ambiguous) = match &slots {
            [None, None] => {
                return Err(Error::corrupt("both headers are invalid").at(HEADER_OFFSETS[0]));
            }
            [Some(_), None] => (0, false),
            [None, Some(_)] => (1, false),
            [Some(a), Some(b)] if a.sequence == b.sequence => (0, a != b),
            [Some(a), Some(b)] => (usize::from(b.sequence > a.sequence), false),
        };
        Ok(Self { slots, current, ambiguous })
    }

    /// Where both slots have wrong checksums: the later header of those that could be right all the
    /// same.
    pub fn plausible(file: &dyn Storage) -> Result<Option<Self>> {
        let file_len = file.len().map_err(|e| Error::io("asking for the size", &e))?;
        let mut slots = [None, None];
        for (slot, at) in slots.iter_mut().zip(HEADER_OFFSETS) {
            let bytes = read_array(file, at, "header")?;
            if Header::decode(&bytes).is_some() {
                return Ok(None);
            }
            *slot = Header::decode_unsealed(&bytes).filter(|header| {
                let known = header.version == 1 && header.log_version == 0;
                known && header.check_log_place(file_len).is_ok()
            });
        }
        let sequence = |slot: &Option<Header>| slot.as_ref().map(|header| header.sequence);
        let current = usize::from(sequence(&slots[1]) > sequence(&slots[0]));
        Ok(slots[current].is_some().then_some(Self { slots, current, ambiguous: false }))
    }

    /// Headers for reading a file whose own are lost: no log, no identity.
    pub fn unknown() -> Self {
        let header = Header {
            sequence: 0,
            file_write: Uuid::nil(),
            data_write: Uuid::nil(),
            log: Uuid::nil(),
            log_version: 0,
            version: 1,
            log_length: 0,
            log_offset: 0,
        };
        Self { slots: [Some(header), None], current: 0, ambiguous: false }
    }

    /// The current header.
    pub fn header(&self) -> &Header {
        // `read` chose a slot that is valid, and `HeaderWriter` keeps to that.
        match &self.slots[self.current] {
            Some(header) => header,
            None => unreachable!("the current slot is valid"),
        }
    }
}

/// Replaces headers.
#[derive(Debug)]
pub struct HeaderWriter {
    file: Arc<dyn Storage>,
    header: Header,
    current: usize,
}

impl HeaderWriter {
    /// A writer that goes on from `headers`.
    pub fn new(file: &Arc<dyn Storage>, headers: &Headers) -> Self {
        Self { file: file.clone(), header: headers.header().clone(), current: headers.current }
    }

    /// The current header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Makes a changed header current. Both slots get the same contents, one after the other, each
    /// durable before the next begins: at any moment one of them is good.
    pub fn update(&mut self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let mut next = self.header.clone();
        change(&mut next);
        for _ in 0..2 {
            next.sequence = self.header.sequence.checked_add(1).ok_or_else(|| {
                Error::unsupported("the header's sequence number cannot grow any more")
            })?;
            let slot = 1 - self.current;
            write_all(&*self.file, HEADER_OFFSETS[slot], &next.encode(), "header")?;
            sync_file(&*self.file)?;
            self.header = next.clone();
            self.current = slot;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryFile;

    fn header(sequence: u64) -> Header {
        Header {
            sequence,
            file_write: Uuid::new_v4(),
            data_write: Uuid::new_v4(),
            log: Uuid::new_v4(),
            log_version: 0,
            version: 1,
            log_length: 1 << 20,
            log_offset: 1 << 20,
        }
    }

    fn file(first: Option<&Header>, second: Option<&Header>) -> Arc<dyn Storage> {
        let file = MemoryFile::new("x", &[0; 1 << 20]);
        for (header, at) in [first, second].into_iter().zip(HEADER_OFFSETS) {
            if let Some(header) = header {
                file.write_at(at, &header.encode()).unwrap();
            }
        }
        file
    }

    #[test]
    fn headers_survive_encoding() {
        let h = header(77);
        let bytes: [u8; HEADER_BYTES] = h.encode().try_into().unwrap();
        assert_eq!(Header::decode(&bytes), Some(h));
        for at in [0, 4, 16, 4095] {
            let mut bad = bytes;
            bad[at] ^= 1;
            assert_eq!(Header::decode(&bad), None, "byte {at}");
        }
    }

    #[test]
    fn the_larger_sequence_is_current_as_unsigned() {
        let (low, high) = (header(1), header(u64::MAX));
        assert_eq!(Headers::read(&*file(Some(&low), Some(&high))).unwrap().current, 1);
        assert_eq!(Headers::read(&*file(Some(&high), Some(&low))).unwrap().current, 0);
        assert_eq!(Headers::read(&*file(None, Some(&low))).unwrap().current, 1);
        assert_eq!(Headers::read(&*file(Some(&low), None)).unwrap().current, 0);
        let e = Headers::read(&*file(None, None)).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn equal_sequences_are_fine_only_when_all_is_equal() {
        let (a, b) = (header(5), header(5));
        let same = Headers::read(&*file(Some(&a), Some(&a))).unwrap();
        assert_eq!((same.current, same.ambiguous), (0, false));
        assert!(Headers::read(&*file(Some(&a), Some(&b))).unwrap().ambiguous);
    }

    #[test]
    fn an_update_leaves_both_slots_with_the_same_guids() {
        let file = file(Some(&header(8)), Some(&header(9)));
        let mut writer = HeaderWriter::new(&file, &Headers::read(&*file).unwrap());
        let id = Uuid::new_v4();
        writer.update(|h| h.data_write = id).unwrap();
        let after = Headers::read(&*file).unwrap();
        assert_eq!((after.current, after.header().sequence), (1, 11));
        for slot in after.slots {
            assert_eq!(slot.unwrap().data_write, id);
        }
    }

    #[test]
    fn the_sequence_number_never_wraps() {
        let file = file(Some(&header(u64::MAX)), None);
        let mut writer = HeaderWriter::new(&file, &Headers::read(&*file).unwrap());
        assert_eq!(writer.update(|_| ()).unwrap_err().kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn log_places_are_checked() {
        let mut h = header(1);
        assert!(h.check_log_place(2 << 20).is_ok());
        assert!(h.check_log_place((2 << 20) - 1).is_err());
        h.log_offset = !0xfffff;
        assert_eq!(h.check_log_place(u64::MAX).unwrap_err().kind(), ErrorKind::Corrupt);
        h.log_offset = 0;
        assert_eq!(h.check_log_place(2 << 20).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
