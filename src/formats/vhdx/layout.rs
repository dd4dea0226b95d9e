//! The structures of a VHDX file as they lie on disk, and nothing but that. All integers are
//! little-endian; GUIDs are in Microsoft's mixed byte order.
//!
//! ```text
//! 0         file type identifier     never rewritten
//! 64 KiB    header 1                 4 KiB used
//! 128 KiB   header 2                 4 KiB used
//! 192 KiB   region table 1           64 KiB
//! 256 KiB   region table 2           64 KiB
//! 1 MiB..   log, metadata region, BAT region, payload and sector bitmap blocks in any order,
//!           each a multiple of 1 MiB at a multiple of 1 MiB
//! ```

use uuid::{Uuid, uuid};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Alignment of everything behind the header section.
pub const MIB: u64 = 1 << 20;
/// Sector of the log, unit of logging.
pub const LOG_SECTOR: u64 = 4096;

/// Signature at byte 0.
pub const FILE_SIGNATURE: [u8; 8] = *b"vhdxfile";
/// Bytes that the creator's name may take, UTF-16.
pub const CREATOR_BYTES: usize = 512;

/// Byte offsets of the two headers.
pub const HEADER_OFFSETS: [u64; 2] = [64 << 10, 128 << 10];
/// Bytes of a header.
pub const HEADER_BYTES: usize = 4096;
/// Byte offsets of the two region tables.
pub const REGION_TABLE_OFFSETS: [u64; 2] = [192 << 10, 256 << 10];
/// Bytes of a region table, and of the table at the start of the metadata region.
pub const TABLE_BYTES: usize = 64 << 10;
/// Most entries in either table.
pub const MAX_TABLE_ENTRIES: u32 = 2047;
/// The first byte that the log may change.
pub const LOGGABLE_FROM: u64 = REGION_TABLE_OFFSETS[0];

/// Largest virtual disk.
pub const MAX_DISK: u64 = 64 << 40;
/// Bytes of file that are addressed at most: twice the largest disk is room for every table, any
/// fragmentation, and keeps what a hostile image makes us allocate bounded.
pub const MAX_FILE: u64 = 128 << 40;
/// Largest log that is read.
pub const MAX_LOG: u32 = 1 << 30;

/// Smallest and largest payload block.
pub const BLOCK_SIZES: std::ops::RangeInclusive<u64> = MIB..=256 * MIB;

/// A header.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawHeader {
    /// [`RawHeader::SIGNATURE`].
    pub signature: [u8; 4],
    /// CRC-32C of the 4096 bytes with this field zero.
    pub checksum: U32,
    /// Of two valid headers the one with the larger number is current.
    pub sequence: U64,
    /// New with every session that changes the file.
    pub file_write_guid: [u8; 16],
    /// New with every session that changes what a guest can read.
    pub data_write_guid: [u8; 16],
    /// Which log entries count; zero when there is nothing to replay.
    pub log_guid: [u8; 16],
    /// Must be 0 where `log_guid` is not.
    pub log_version: U16,
    /// Must be 1.
    pub version: U16,
    /// Bytes of the log.
    pub log_length: U32,
    /// Byte offset of the log.
    pub log_offset: U64,
    /// Zero.
    pub reserved: [u8; 4016],
}
const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);

impl RawHeader {
    /// First four bytes.
    pub const SIGNATURE: [u8; 4] = *b"head";
}

/// The beginning of a region table; [`RawRegion`]s follow.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawRegionTable {
    /// [`RawRegionTable::SIGNATURE`].
    pub signature: [u8; 4],
    /// CRC-32C of the 64 KiB with this field zero.
    pub checksum: U32,
    /// Number of entries.
    pub entries: U32,
    /// Zero.
    pub reserved: U32,
}
const _: () = assert!(size_of::<RawRegionTable>() == 16);

impl RawRegionTable {
    /// First four bytes.
    pub const SIGNATURE: [u8; 4] = *b"regi";
}

/// One entry of a region table.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawRegion {
    /// What the region is.
    pub guid: [u8; 16],
    /// Byte offset in the file.
    pub offset: U64,
    /// Length in bytes.
    pub length: U32,
    /// Bit 0: who does not know the region must not open the file.
    pub required: U32,
}
const _: () = assert!(size_of::<RawRegion>() == 32);

/// Region of the block allocation table.
pub const BAT_REGION: Uuid = uuid!("2DC27766-F623-4200-9D64-115E9BFD4A08");
/// Region of the metadata table and its items.
pub const METADATA_REGION: Uuid = uuid!("8B7CA206-4790-4B9A-B8FE-575F050F886E");

/// The beginning of the metadata table; [`RawItem`]s follow.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawMetadataTable {
    /// [`RawMetadataTable::SIGNATURE`].
    pub signature: [u8; 8],
    /// Zero.
    pub reserved: U16,
    /// Number of entries.
    pub entries: U16,
    /// Zero.
    pub reserved2: [u8; 20],
}
const _: () = assert!(size_of::<RawMetadataTable>() == 32);

impl RawMetadataTable {
    /// First eight bytes.
    pub const SIGNATURE: [u8; 8] = *b"metadata";
}

/// One entry of the metadata table.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawItem {
    /// What the item is.
    pub guid: [u8; 16],
    /// Byte offset from the region's start, not below 64 KiB; 0 for an empty item.
    pub offset: U32,
    /// Length in bytes.
    pub length: U32,
    /// See the constants.
    pub flags: U32,
    /// Zero.
    pub reserved: U32,
}
const _: () = assert!(size_of::<RawItem>() == 32);

impl RawItem {
    /// The item belongs to the user, not to the format.
    pub const IS_USER: u32 = 1;
    /// The item describes the virtual disk, not the file.
    pub const IS_VIRTUAL_DISK: u32 = 2;
    /// Who does not know the item must not open the file.
    pub const IS_REQUIRED: u32 = 4;
}

/// Item: block size and flags.
pub const FILE_PARAMETERS: Uuid = uuid!("CAA16737-FA36-4D43-B3B6-33F0AA44E76B");
/// Item: size of the virtual disk in bytes.
pub const VIRTUAL_DISK_SIZE: Uuid = uuid!("2FA54224-CD1B-4876-B211-5DBED83BF4B8");
/// Item: the SCSI identity of the virtual disk.
pub const VIRTUAL_DISK_ID: Uuid = uuid!("BECA12AB-B2E6-4523-93EF-C309E000C746");
/// Item: logical sector in bytes.
pub const LOGICAL_SECTOR_SIZE: Uuid = uuid!("8141BF1D-A96F-4709-BA47-F233A8FAAB5F");
/// Item: physical sector in bytes.
pub const PHYSICAL_SECTOR_SIZE: Uuid = uuid!("CDA348C7-445D-4471-9CC9-E9885251C556");
/// Item: where the parent is.
pub const PARENT_LOCATOR: Uuid = uuid!("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C");
/// Item: somebody began to create the file and has not finished.
pub const INCOMPLETE_FILE: Uuid = uuid!("71CC85F0-1B69-4E28-9558-C3BF83AE75D3");
/// Item: cylinders, heads and sectors; means nothing to us.
pub const CHS_PARAMETERS: Uuid = uuid!("DA02D7BC-3D3A-423C-AC88-2A36AB21479B");
/// Item: labels of a persistent memory disk; means nothing to us.
pub const PMEM_LABELS: Uuid = uuid!("10E1AE8A-4B7E-4169-A40F-CD70DE928393");

/// Item [`FILE_PARAMETERS`].
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawFileParameters {
    /// Payload block in bytes.
    pub block_size: U32,
    /// See the constants.
    pub flags: U32,
}
const _: () = assert!(size_of::<RawFileParameters>() == 8);

impl RawFileParameters {
    /// A fixed disk: blocks are never given back.
    pub const LEAVE_BLOCKS_ALLOCATED: u32 = 1;
    /// A differencing disk.
    pub const HAS_PARENT: u32 = 2;
}

/// The beginning of [`PARENT_LOCATOR`]; [`RawLocatorEntry`]s follow.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawLocator {
    /// [`VHDX_LOCATOR_TYPE`].
    pub kind: [u8; 16],
    /// Zero.
    pub reserved: U16,
    /// Number of entries.
    pub entries: U16,
}
const _: () = assert!(size_of::<RawLocator>() == 20);

/// One key and its value, UTF-16 without terminator; offsets count from the item's start.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawLocatorEntry {
    /// Byte offset of the key.
    pub key_offset: U32,
    /// Byte offset of the value.
    pub value_offset: U32,
    /// Bytes of the key.
    pub key_length: U16,
    /// Bytes of the value.
    pub value_length: U16,
}
const _: () = assert!(size_of::<RawLocatorEntry>() == 12);

/// The parent is a VHDX file.
pub const VHDX_LOCATOR_TYPE: Uuid = uuid!("B04AEFB7-D19E-4A81-B789-25B8E9445913");

/// The beginning of a log entry; [`RawDescriptor`]s follow at once, then data sectors.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawEntry {
    /// [`RawEntry::SIGNATURE`].
    pub signature: [u8; 4],
    /// CRC-32C of the whole entry with this field zero.
    pub checksum: U32,
    /// Bytes of the entry, a multiple of [`LOG_SECTOR`].
    pub length: U32,
    /// Byte offset in the log of the oldest entry that is still needed.
    pub tail: U32,
    /// Never 0; an entry continues the one whose number is one less.
    pub sequence: U64,
    /// Number of descriptors.
    pub descriptors: U32,
    /// Zero.
    pub reserved: U32,
    /// The header's log GUID.
    pub log_guid: [u8; 16],
    /// Bytes the file is known to have had durably.
    pub flushed_file_offset: U64,
    /// Bytes the file must have to hold everything.
    pub last_file_offset: U64,
}
const _: () = assert!(size_of::<RawEntry>() == 64);

impl RawEntry {
    /// First four bytes.
    pub const SIGNATURE: [u8; 4] = *b"loge";
}

/// What an entry does to one place of the file.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawDescriptor {
    /// [`RawDescriptor::DATA`] or [`RawDescriptor::ZERO`].
    pub signature: [u8; 4],
    /// Data: the sector's last four bytes. Zero: 0.
    pub trailing: [u8; 4],
    /// Data: the sector's first eight bytes. Zero: the length, a multiple of [`LOG_SECTOR`].
    pub leading: [u8; 8],
    /// Byte offset in the file, a multiple of [`LOG_SECTOR`].
    pub file_offset: U64,
    /// The entry's sequence number.
    pub sequence: U64,
}
const _: () = assert!(size_of::<RawDescriptor>() == 32);

impl RawDescriptor {
    /// Signature: write the next data sector.
    pub const DATA: [u8; 4] = *b"desc";
    /// Signature: write zeroes.
    pub const ZERO: [u8; 4] = *b"zero";
}

/// A logged sector less the twelve bytes that its descriptor holds.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawDataSector {
    /// [`RawDataSector::SIGNATURE`].
    pub signature: [u8; 4],
    /// Upper half of the entry's sequence number.
    pub sequence_high: U32,
    /// Bytes 8 to 4091 of the sector.
    pub middle: [u8; 4084],
    /// Lower half of the entry's sequence number.
    pub sequence_low: U32,
}
const _: () = assert!(size_of::<RawDataSector>() == LOG_SECTOR as usize);

impl RawDataSector {
    /// First four bytes.
    pub const SIGNATURE: [u8; 4] = *b"data";
}

/// CRC-32C of a structure whose own checksum, four bytes at `field`, counts as zero.
pub fn checksum(bytes: &[u8], field: usize) -> u32 {
    let (before, rest) = bytes.split_at(field);
    let crc = crc32c::crc32c_append(crc32c::crc32c(before), &[0; 4]);
    crc32c::crc32c_append(crc, rest.get(4..).unwrap_or_default())
}

/// Byte offset of the checksum in headers, region tables and log entries alike.
pub const CHECKSUM_FIELD: usize = 4;

/// Stores the checksum of a structure that has it at [`CHECKSUM_FIELD`].
pub fn seal(bytes: &mut [u8]) {
    let crc = checksum(bytes, CHECKSUM_FIELD);
    bytes[CHECKSUM_FIELD..CHECKSUM_FIELD + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Whether a structure's stored checksum is right.
pub fn sealed(bytes: &[u8]) -> bool {
    bytes.get(CHECKSUM_FIELD..CHECKSUM_FIELD + 4)
        == Some(&checksum(bytes, CHECKSUM_FIELD).to_le_bytes()[..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_castagnoli_with_its_own_field_as_zero() {
        assert_eq!(checksum(b"123456789", 9), crc32c::crc32c(b"123456789\0\0\0\0"));
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        let mut bytes = vec![7; 64];
        seal(&mut bytes);
        assert!(sealed(&bytes));
        bytes[63] ^= 1;
        assert!(!sealed(&bytes));
    }

    #[test]
    fn guids_have_the_mixed_byte_order() {
        assert_eq!(BAT_REGION.to_bytes_le()[..6], [0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6]);
    }
}
