//! The metadata region: a table of items, and the items that say what the virtual disk is.

use std::ops::Range;

use uuid::Uuid;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::layout::{
    BLOCK_SIZES, CHS_PARAMETERS, FILE_PARAMETERS, INCOMPLETE_FILE, LOGICAL_SECTOR_SIZE, MAX_DISK,
    MAX_TABLE_ENTRIES, MIB, PARENT_LOCATOR, PHYSICAL_SECTOR_SIZE, PMEM_LABELS, RawFileParameters,
    RawItem, RawMetadataTable, TABLE_BYTES, VIRTUAL_DISK_ID, VIRTUAL_DISK_SIZE,
};
use super::locator::Locator;
use super::regions::Region;
use crate::codec::{guid, read_array, read_exact};
use crate::error::{Error, Result};
use crate::storage::Storage;

/// Items that the format itself defines, with the length each must have.
const STANDARD: [(Uuid, Option<u32>, &str); 6] = [
    (FILE_PARAMETERS, Some(8), "file parameters"),
    (VIRTUAL_DISK_SIZE, Some(8), "virtual disk size"),
    (VIRTUAL_DISK_ID, Some(16), "virtual disk id"),
    (LOGICAL_SECTOR_SIZE, Some(4), "logical sector size"),
    (PHYSICAL_SECTOR_SIZE, Some(4), "physical sector size"),
    (PARENT_LOCATOR, None, "parent locator"),
];

/// One item of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// What it is.
    pub guid: Uuid,
    /// Byte offset in the region.
    pub offset: u32,
    /// Length in bytes.
    pub length: u32,
    /// See [`RawItem`].
    pub flags: u32,
}

impl Item {
    fn user(&self) -> bool {
        self.flags & RawItem::IS_USER != 0
    }

    fn range(&self) -> Range<u64> {
        u64::from(self.offset)..u64::from(self.offset) + u64::from(self.length)
    }

    /// The item's name, or its GUID.
    pub fn name(&self) -> String {
        let standard = STANDARD.iter().find(|s| s.0 == self.guid && !self.user());
        standard.map_or_else(|| self.guid.to_string(), |s| s.2.to_owned())
    }
}

/// What the metadata says, checked.
#[derive(Debug, Clone)]
pub struct Metadata {
    /// Payload block in bytes, a power of two from 1 to 256 MiB.
    pub block_size: u64,
    /// Blocks are never given back.
    pub fixed: bool,
    /// The disk is a child.
    pub has_parent: bool,
    /// Virtual size in bytes, a multiple of the logical sector.
    pub size: u64,
    /// SCSI identity.
    pub disk_id: Uuid,
    /// 512 or 4096.
    pub logical_sector: u32,
    /// 512 or 4096.
    pub physical_sector: u32,
    /// Where the parent is; an error that opening a child must report.
    pub locator: Option<Result<Locator>>,
    /// All items, in the table's order.
    pub items: Vec<Item>,
    /// What is odd but harmless.
    pub oddities: Vec<String>,
    /// Why the file must not be written, if so.
    pub read_only: Option<String>,
}

impl Metadata {
    /// Reads the region. With `force` a size that no disk can have is rounded instead of refused.
    pub fn read(file: &dyn Storage, region: &Region, force: bool) -> Result<Self> {
        let mut table = vec![0; TABLE_BYTES];
        read_exact(file, region.offset, &mut table, "metadata table")?;
        let mut found = Items::decode(&table, region).map_err(|e| e.at(region.offset))?;

        let at = |item: &Item| region.offset + u64::from(item.offset);
        let item = found.require(FILE_PARAMETERS)?;
        let raw: [u8; 8] = read_array(file, at(&item), "file parameters")?;
        let (block_size, flags) = decode_parameters(&raw);
        if !block_size.is_power_of_two() || !BLOCK_SIZES.contains(&block_size) {
            let what = format!("block size {block_size} is not a power of two from 1 to 256 MiB");
            return Err(Error::corrupt(what).at(at(&item)));
        }
        let known = RawFileParameters::LEAVE_BLOCKS_ALLOCATED | RawFileParameters::HAS_PARENT;
        if flags & !known != 0 {
            found.distrust(format!("unknown file parameter flags {flags:#x}"));
        }
        let has_parent = flags & RawFileParameters::HAS_PARENT != 0;
        let fixed = flags & RawFileParameters::LEAVE_BLOCKS_ALLOCATED != 0 && !has_parent;

        let mut sector =
            |id, name: &str| -> Result<u32> {
                let item = found.require(id)?;
                let size = u32::from_le_bytes(read_array(file, at(&item), name)?);
                match size {
                    512 | 4096 => Ok(size),
                    _ => Err(Error::corrupt(format!("{name} {size} is neither 512 nor 4096"))
                        .at(at(&item))),
                }
            };
        let logical_sector = sector(LOGICAL_SECTOR_SIZE, "logical sector size")?;
        let physical_sector = sector(PHYSICAL_SECTOR_SIZE, "physical sector size")?;

        let item = found.require(VIRTUAL_DISK_SIZE)?;
        let mut size = u64::from_le_bytes(read_array(file, at(&item), "virtual disk size")?);
        let multiple = size.is_multiple_of(logical_sector.into());
        if size == 0 || size > MAX_DISK || !multiple {
            let what = format!("virtual disk size {size} is not possible");
            if !force || size > MAX_DISK || size < logical_sector.into() {
                return Err(Error::corrupt(what).at(at(&item)));
            }
            found.distrust(what);
            size -= size % u64::from(logical_sector);
        }

        let item = found.require(VIRTUAL_DISK_ID)?;
        let disk_id = guid(&read_array(file, at(&item), "virtual disk id")?);

        let locator = match found.get(PARENT_LOCATOR) {
            Some(item) => {
                let mut bytes = vec![0; item.length as usize];
                read_exact(file, at(&item), &mut bytes, "parent locator")?;
                Some(Locator::decode(&bytes).map_err(|e| e.at(at(&item))))
            }
            None => None,
        };
        Ok(Self {
            block_size,
            fixed,
            has_parent,
            size,
            disk_id,
            logical_sector,
            physical_sector,
            locator,
            items: found.items,
            oddities: found.oddities,
            read_only: found.read_only,
        })
    }
}

fn decode_parameters(bytes: &[u8; 8]) -> (u64, u32) {
    match RawFileParameters::read_from_bytes(bytes) {
        Ok(raw) => (raw.block_size.get().into(), raw.flags.get()),
        Err(_) => (0, 0),
    }
}

/// The table while it is being judged.
struct Items {
    items: Vec<Item>,
    oddities: Vec<String>,
    read_only: Option<String>,
}

impl Items {
    fn decode(table: &[u8], region: &Region) -> Result<Self> {
        let short = || Error::corrupt("the metadata table is too short");
        let (raw, rest) = RawMetadataTable::read_from_prefix(table).map_err(|_| short())?;
        if raw.signature != RawMetadataTable::SIGNATURE {
            return Err(Error::corrupt("the metadata table has no signature"));
        }
        let count = u32::from(raw.entries.get());
        if count > MAX_TABLE_ENTRIES {
            return Err(Error::corrupt(format!("the metadata table has {count} entries")));
        }
        let mut found = Self { items: Vec::new(), oddities: Vec::new(), read_only: None };
        if raw.reserved.get() != 0 || raw.reserved2 != [0; 20] {
            found.distrust("reserved bits of the metadata table are set".to_owned());
        }
        for entry in rest.chunks_exact(size_of::<RawItem>()).take(count as usize) {
            let raw = RawItem::read_from_bytes(entry).map_err(|_| short())?;
            let item = Item {
                guid: guid(&raw.guid),
                offset: raw.offset.get(),
                length: raw.length.get(),
                flags: raw.flags.get(),
            };
            found.take(item, raw.reserved.get(), region)?;
        }
        found.check_overlap()?;
        Ok(found)
    }

    /// Judges one item and keeps it, unless it is of no use and nobody needs it.
    fn take(&mut self, item: Item, reserved: u32, region: &Region) -> Result<()> {
        let name = item.name();
        let standard = STANDARD.iter().find(|s| s.0 == item.guid && !item.user());
        if item.guid == INCOMPLETE_FILE {
            return Err(Error::corrupt("the creation of the file was never finished"));
        }
        let harmless = [CHS_PARAMETERS, PMEM_LABELS].contains(&item.guid);
        let required = item.flags & RawItem::IS_REQUIRED != 0;
        if required && !item.user() && standard.is_none() && !harmless {
            return Err(Error::unsupported(format!("required metadata item {name} is not known")));
        }
        if reserved != 0 || item.flags & !7 != 0 {
            self.distrust(format!("reserved bits of metadata item {name} are set"));
        }
        let inside = if item.length == 0 {
            item.offset == 0
        } else {
            u64::from(item.length) <= MIB
                && item.offset as usize >= TABLE_BYTES
                && item.range().end <= region.length
        };
        let length = standard.and_then(|s| s.1).is_none_or(|length| length == item.length);
        let twice = self.items.iter().any(|i| i.guid == item.guid && i.user() == item.user());
        let fault = match () {
            () if twice => format!("metadata item {name} is there twice"),
            () if !inside => format!("metadata item {name} lies outside its region"),
            () if !length => {
                format!("metadata item {name} has {} bytes", item.length)
            }
            () => {
                if standard.is_some() && !required {
                    self.oddities.push(format!("metadata item {name} is not marked as required"));
                }
                self.items.push(item);
                return Ok(());
            }
        };
        if standard.is_some() {
            return Err(Error::corrupt(fault));
        }
        self.distrust(fault);
        Ok(())
    }

    fn check_overlap(&mut self) -> Result<()> {
        let mut by_place: Vec<&Item> = self.items.iter().filter(|i| i.length > 0).collect();
        by_place.sort_unstable_by_key(|i| i.offset);
        let overlap = by_place.windows(2).find(|p| p[0].range().end > p[1].range().start);
        let Some(pair) = overlap else { return Ok(()) };
        let what = format!("metadata items {} and {} overlap", pair[0].name(), pair[1].name());
        let standard = |item: &Item| STANDARD.iter().any(|s| s.0 == item.guid && !item.user());
        if standard(pair[0]) || standard(pair[1]) {
            return Err(Error::corrupt(what));
        }
        self.distrust(what);
        Ok(())
    }

    fn get(&self, id: Uuid) -> Option<Item> {
        self.items.iter().find(|i| i.guid == id && !i.user() && i.length > 0).cloned()
    }

    fn require(&mut self, id: Uuid) -> Result<Item> {
        let name = STANDARD.iter().find(|s| s.0 == id).map_or("", |s| s.2);
        self.get(id).ok_or_else(|| Error::corrupt(format!("metadata item {name} is missing")))
    }

    /// Notes an oddity that leaves the contents readable, but not safely writable.
    fn distrust(&mut self, why: String) {
        self.oddities.push(why.clone());
        self.read_only.get_or_insert(why);
    }
}

/// What goes into a new metadata region.
#[derive(Debug, Clone)]
pub struct NewMetadata {
    /// Payload block in bytes.
    pub block_size: u32,
    /// See [`RawFileParameters`].
    pub flags: u32,
    /// Virtual size in bytes.
    pub size: u64,
    /// SCSI identity.
    pub disk_id: Uuid,
    /// 512 or 4096.
    pub logical_sector: u32,
    /// 512 or 4096.
    pub physical_sector: u32,
    /// An encoded [`Locator`].
    pub locator: Option<Vec<u8>>,
}

impl NewMetadata {
    /// The used part of the region: table and items.
    pub fn encode(&self) -> Vec<u8> {
        let parameters =
            RawFileParameters { block_size: self.block_size.into(), flags: self.flags.into() };
        let file = RawItem::IS_REQUIRED;
        let disk = RawItem::IS_REQUIRED | RawItem::IS_VIRTUAL_DISK;
        let mut items: Vec<(Uuid, u32, Vec<u8>)> = vec![
            (FILE_PARAMETERS, file, parameters.as_bytes().to_vec()),
            (VIRTUAL_DISK_SIZE, disk, self.size.to_le_bytes().to_vec()),
            (VIRTUAL_DISK_ID, disk, self.disk_id.to_bytes_le().to_vec()),
            (LOGICAL_SECTOR_SIZE, disk, self.logical_sector.to_le_bytes().to_vec()),
            (PHYSICAL_SECTOR_SIZE, disk, self.physical_sector.to_le_bytes().to_vec()),
        ];
        if let Some(locator) = &self.locator {
            items.push((PARENT_LOCATOR, file, locator.clone()));
        }
        let mut table = RawMetadataTable::new_zeroed();
        table.signature = RawMetadataTable::SIGNATURE;
        table.entries = (items.len() as u16).into();
        let mut bytes = table.as_bytes().to_vec();
        let mut data = Vec::new();
        for (id, flags, value) in items {
            let raw = RawItem {
                guid: id.to_bytes_le(),
                offset: ((TABLE_BYTES + data.len()) as u32).into(),
                length: (value.len() as u32).into(),
                flags: flags.into(),
                reserved: 0.into(),
            };
            bytes.extend_from_slice(raw.as_bytes());
            data.extend_from_slice(&value);
        }
        bytes.resize(TABLE_BYTES, 0);
        bytes.extend_from_slice(&data);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout::METADATA_REGION;
    use super::*;
    use crate::error::ErrorKind;
    use crate::storage::memory::MemoryFile;

    fn sample() -> NewMetadata {
        NewMetadata {
            block_size: 2 << 20,
            flags: 0,
            size: 10 << 20,
            disk_id: Uuid::new_v4(),
            logical_sector: 512,
            physical_sector: 4096,
            locator: None,
        }
    }

    fn region() -> Region {
        Region { guid: METADATA_REGION, offset: 1 << 20, length: 1 << 20, required: true }
    }

    /// Reads an encoded region after `damage` was done to it.
    fn read(new: &NewMetadata, damage: &dyn Fn(&mut Vec<u8>)) -> Result<Metadata> {
        let mut bytes = new.encode();
        bytes.resize(1 << 20, 0);
        damage(&mut bytes);
        let file = MemoryFile::new("x", &[]);
        file.write_at(1 << 20, &bytes).unwrap();
        Metadata::read(&*file, &region(), false)
    }

    /// Byte offset of field `field` of table entry `index`.
    fn entry(index: usize, field: usize) -> usize {
        32 + 32 * index + field
    }

    #[test]
    fn metadata_survives_encoding() {
        let new = sample();
        let read = read(&new, &|_| ()).unwrap();
        assert_eq!(
            (read.block_size, read.size, read.disk_id, read.logical_sector, read.physical_sector),
            (2 << 20, 10 << 20, new.disk_id, 512, 4096)
        );
        assert!(!read.fixed && !read.has_parent && read.locator.is_none());
        assert!(read.oddities.is_empty() && read.read_only.is_none());
    }

    #[test]
    fn values_that_no_disk_has_are_refused() {
        let cases: [&dyn Fn(&mut NewMetadata); 8] = [
            &|m| m.block_size = 3 << 20,
            &|m| m.block_size = 1 << 19,
            &|m| m.block_size = 512 << 20,
            &|m| m.size = 0,
            &|m| m.size = (64 << 40) + 512,
            &|m| m.size = 513,
            &|m| m.logical_sector = 1024,
            &|m| m.physical_sector = 0,
        ];
        for (i, change) in cases.iter().enumerate() {
            let mut new = sample();
            change(&mut new);
            assert_eq!(read(&new, &|_| ()).unwrap_err().kind(), ErrorKind::Corrupt, "case {i}");
        }
    }

    #[test]
    fn damage_to_a_needed_item_is_refused() {
        type Damage<'a> = &'a dyn Fn(&mut Vec<u8>);
        let cases: [(Damage<'_>, ErrorKind); 8] = [
            (&|b| b[0] ^= 1, ErrorKind::Corrupt),
            (&|b| b[11] = 0xff, ErrorKind::Corrupt),
            (&|b| b[10] = 4, ErrorKind::Corrupt),
            (&|b| b[entry(1, 20)] = 7, ErrorKind::Corrupt),
            (&|b| b[entry(1, 16)] = 1, ErrorKind::Corrupt),
            (&|b| b[entry(1, 19)] = 0x10, ErrorKind::Corrupt),
            (&|b| b.copy_within(entry(1, 0)..entry(1, 16), entry(2, 0)), ErrorKind::Corrupt),
            (&|b| b[entry(1, 0)] ^= 1, ErrorKind::Unsupported),
        ];
        for (i, (damage, kind)) in cases.iter().enumerate() {
            assert_eq!(read(&sample(), damage).unwrap_err().kind(), *kind, "case {i}");
        }
    }

    #[test]
    fn an_unfinished_creation_is_refused() {
        let e = read(&sample(), &|b| {
            b[10] = 6;
            b[entry(5, 0)..entry(5, 16)].copy_from_slice(&INCOMPLETE_FILE.to_bytes_le());
        })
        .unwrap_err();
        assert!(e.what().contains("never finished"), "{e}");
    }

    #[test]
    fn reserved_bits_make_the_disk_read_only() {
        let m = read(&sample(), &|b| b[12] = 1).unwrap();
        assert!(m.read_only.is_some());
        let m = read(&sample(), &|b| b[entry(1, 24)] |= 0x80).unwrap();
        assert!(m.read_only.is_some());
    }

    #[test]
    fn an_unknown_optional_item_is_kept() {
        let m = read(&sample(), &|b| {
            b[10] = 6;
            b[entry(5, 0)] = 9;
        })
        .unwrap();
        assert_eq!((m.items.len(), m.read_only), (6, None));
    }
}
