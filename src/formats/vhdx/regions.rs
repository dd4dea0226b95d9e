//! The region table: where the BAT and the metadata lie. Two copies, 64 KiB each.

use std::ops::Range;

use uuid::Uuid;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::bat::ENTRY_BYTES;
use super::layout::{
    BAT_REGION, MAX_FILE, MAX_TABLE_ENTRIES, METADATA_REGION, MIB, REGION_TABLE_OFFSETS, RawRegion,
    RawRegionTable, TABLE_BYTES, seal, sealed,
};
use crate::codec::{guid, read_exact};
use crate::error::{Error, Result, ResultExt};
use crate::storage::Storage;

/// One region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// What it is.
    pub guid: Uuid,
    /// Byte offset in the file, a multiple of 1 MiB.
    pub offset: u64,
    /// Bytes, a multiple of 1 MiB, not 0.
    pub length: u64,
    /// Whether it must be known to open the file.
    pub required: bool,
}

impl Region {
    /// The bytes of the file that the region takes.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.length
    }

    /// Entries of a table in the region that a file of `file_len` bytes has.
    pub fn entries(&self, file_len: u64) -> u64 {
        self.length.min(file_len.saturating_sub(self.offset)) / ENTRY_BYTES
    }
}

/// A checked region table.
#[derive(Debug, Clone)]
pub struct Regions {
    /// The block allocation table.
    pub bat: Region,
    /// The metadata.
    pub metadata: Region,
    /// All regions, those two included, in the table's order.
    pub all: Vec<Region>,
    /// Which copy they come from.
    pub copy: usize,
    /// What is odd about the table.
    pub oddities: Vec<String>,
}

/// One copy of the table as it is in the file; `None` if signature, checksum or count are wrong.
pub fn read_copy(file: &dyn Storage, copy: usize) -> Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; TABLE_BYTES];
    read_exact(file, REGION_TABLE_OFFSETS[copy], &mut bytes, "region table")?;
    let valid = RawRegionTable::read_from_prefix(&bytes).is_ok_and(|(raw, _)| {
        raw.signature == RawRegionTable::SIGNATURE && raw.entries.get() <= MAX_TABLE_ENTRIES
    });
    Ok((valid && sealed(&bytes)).then_some(bytes))
}

impl Regions {
    /// Reads the first good copy and checks it against a file of `file_len` bytes.
    pub fn read(file: &dyn Storage, file_len: u64) -> Result<Self> {
        for (copy, at) in REGION_TABLE_OFFSETS.into_iter().enumerate() {
            if let Some(bytes) = read_copy(file, copy)? {
                let mut regions = Self::decode(&bytes, file_len).at(at)?;
                regions.copy = copy;
                return Ok(regions);
            }
        }
        Err(Error::corrupt("both region tables are invalid").at(REGION_TABLE_OFFSETS[0]))
    }

    /// Decodes a table whose checksum is right.
    fn decode(bytes: &[u8], file_len: u64) -> Result<Self> {
        let truncated = || Error::corrupt("the region table is too short");
        let (raw, rest) = RawRegionTable::read_from_prefix(bytes).map_err(|_| truncated())?;
        let mut oddities = Vec::new();
        if raw.reserved.get() != 0 {
            oddities.push("reserved bits of the region table are set".to_owned());
        }
        let mut all: Vec<Region> = Vec::new();
        let count = raw.entries.get().min(MAX_TABLE_ENTRIES) as usize;
        for entry in rest.chunks_exact(size_of::<RawRegion>()).take(count) {
            let raw = RawRegion::read_from_bytes(entry).map_err(|_| truncated())?;
            if raw.required.get() & !1 != 0 {
                oddities.push(format!("reserved bits of region {} are set", guid(&raw.guid)));
            }
            let region = Region {
                guid: guid(&raw.guid),
                offset: raw.offset.get(),
                length: raw.length.get().into(),
                required: raw.required.get() & 1 != 0,
            };
            region.check(file_len)?;
            if let Some(other) = all.iter().find(|r| r.guid == region.guid) {
                return Err(Error::corrupt(format!("region {} is there twice", other.guid)));
            }
            all.push(region);
        }
        let mut by_place: Vec<_> = all.iter().map(|r| (r.range(), r.guid)).collect();
        by_place.sort_unstable_by_key(|(range, _)| range.start);
        if let Some(pair) = by_place.windows(2).find(|p| p[0].0.end > p[1].0.start) {
            let what = format!("regions {} and {} overlap", pair[0].1, pair[1].1);
            return Err(Error::corrupt(what));
        }
        let known = |id| {
            all.iter()
                .find(|r| r.guid == id)
                .cloned()
                .ok_or_else(|| Error::corrupt(format!("region {id} is missing")))
        };
        Ok(Self {
            bat: known(BAT_REGION)?,
            metadata: known(METADATA_REGION)?,
            all,
            copy: 0,
            oddities,
        })
    }
}

impl Region {
    fn check(&self, file_len: u64) -> Result<()> {
        let id = self.guid;
        let known = [BAT_REGION, METADATA_REGION].contains(&id);
        if self.required && !known {
            return Err(Error::unsupported(format!("required region {id} is not known")));
        }
        let aligned = self.offset.is_multiple_of(MIB) && self.length.is_multiple_of(MIB);
        if !aligned || self.offset < MIB || self.length == 0 {
            let what = format!("region {id}: {:#x} bytes at {:#x}", self.length, self.offset);
            return Err(Error::corrupt(format!("{what} is no valid place")));
        }
        // Of the BAT a first part is worth something; whether the metadata is there shows in reading it.
        let end = self.offset.checked_add(self.length);
        if end.is_none_or(|end| end > MAX_FILE) || self.offset >= file_len {
            return Err(Error::corrupt(format!("region {id} lies past the end of the file")));
        }
        Ok(())
    }
}

/// Encodes a table, checksum included.
pub fn encode(regions: &[Region]) -> Vec<u8> {
    let mut raw = RawRegionTable::new_zeroed();
    raw.signature = RawRegionTable::SIGNATURE;
    raw.entries = (regions.len() as u32).into();
    let mut bytes = raw.as_bytes().to_vec();
    for region in regions {
        let raw = RawRegion {
            guid: region.guid.to_bytes_le(),
            offset: region.offset.into(),
            length: (region.length as u32).into(),
            required: u32::from(region.required).into(),
        };
        bytes.extend_from_slice(raw.as_bytes());
    }
    bytes.resize(TABLE_BYTES, 0);
    seal(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::storage::memory::MemoryFile;

    fn region(guid: Uuid, mib: u64, length: u64) -> Region {
        Region { guid, offset: mib << 20, length: length << 20, required: true }
    }

    fn standard() -> Vec<Region> {
        vec![region(BAT_REGION, 3, 1), region(METADATA_REGION, 2, 1)]
    }

    fn read(regions: &[Region]) -> Result<Regions> {
        let file = MemoryFile::new("x", &[]);
        file.set_len(16 << 20).unwrap();
        file.write_at(REGION_TABLE_OFFSETS[1], &encode(regions)).unwrap();
        Regions::read(&*file, 16 << 20)
    }

    #[test]
    fn the_second_copy_serves_when_the_first_is_bad() {
        let regions = read(&standard()).unwrap();
        assert_eq!((regions.copy, regions.all), (1, standard()));
        let e = Regions::read(&*MemoryFile::new("x", &vec![0; 1 << 20]), 1 << 20).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn tables_that_cannot_be_trusted_are_refused() {
        let mut cases = vec![
            (vec![region(BAT_REGION, 3, 1)], ErrorKind::Corrupt),
            (vec![region(METADATA_REGION, 3, 1)], ErrorKind::Corrupt),
        ];
        let mut with = |change: &dyn Fn(&mut Vec<Region>), kind| {
            let mut regions = standard();
            change(&mut regions);
            cases.push((regions, kind));
        };
        with(&|r| r[1].offset = r[0].offset, ErrorKind::Corrupt);
        with(&|r| r[0].offset += 512, ErrorKind::Corrupt);
        with(&|r| r[0].offset = 0, ErrorKind::Corrupt);
        with(&|r| r[0].offset = !0xfffff, ErrorKind::Corrupt);
        with(&|r| r[0].length = 0, ErrorKind::Corrupt);
        with(&|r| r[0].offset = 16 << 20, ErrorKind::Corrupt);
        with(&|r| r.push(r[0].clone()), ErrorKind::Corrupt);
        with(&|r| r.push(region(Uuid::new_v4(), 8, 1)), ErrorKind::Unsupported);
        for (regions, kind) in cases {
            assert_eq!(read(&regions).unwrap_err().kind(), kind, "{regions:?}");
        }
    }

    #[test]
    fn unknown_optional_regions_keep_their_place() {
        let mut regions = standard();
        regions.push(Region { required: false, ..region(Uuid::new_v4(), 8, 2) });
        assert_eq!(read(&regions).unwrap().all.len(), 3);
    }
}
