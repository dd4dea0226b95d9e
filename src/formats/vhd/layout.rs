//! The structures of a VHD file, byte by byte. All numbers are big-endian.
//!
//! Layout only: which copy of a structure counts, and whether its values make sense together, is
//! decided in [`super::footers`] and [`super::structure`].

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes per sector, of the disk and of the file.
pub(super) const SECTOR: u64 = 512;
/// Size of the footer and of its copy.
pub(super) const FOOTER: u64 = 512;
/// Size of the footer that Virtual PC wrote before 2004: the last reserved byte is missing.
pub(super) const SHORT_FOOTER: u64 = 511;
/// Size of the dynamic header.
pub(super) const HEADER: u64 = 1024;

/// First bytes of the footer.
pub(super) const FOOTER_COOKIE: [u8; 8] = *b"conectix";
/// First bytes of a footer that Xen disabled on purpose.
pub(super) const POISON_COOKIE: [u8; 8] = *b"v_poison";
/// First bytes of the dynamic header.
pub(super) const HEADER_COOKIE: [u8; 8] = *b"cxsparse";
/// First bytes of Xen's batmap header.
pub(super) const BATMAP_COOKIE: [u8; 8] = *b"tdbatmap";

/// Version of footer and dynamic header: major in the high half.
pub(super) const VERSION: u32 = 0x0001_0000;
/// `features` of every footer: the reserved bit that is always set.
pub(super) const FEATURES: u32 = 2;
/// `data_offset` where there is no further structure.
pub(super) const NO_OFFSET: u64 = u64::MAX;
/// BAT entry of a block that is not stored.
pub(super) const UNUSED: u32 = u32::MAX;
/// One past the last byte of a file that a BAT entry can point at.
pub(super) const REACH: u64 = UNUSED as u64 * SECTOR;
/// Block data is placed at multiples of this many bytes, so that no write makes the host read.
pub(super) const ALIGNMENT: u64 = 4096;
/// Largest size in bytes of a disk with a BAT: 2040 GiB.
pub(super) const MAX_SPARSE_SIZE: u64 = 2040 << 30;
/// Block sizes in bytes that are read.
pub(super) const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=256 << 20;

/// Where the footer goes that has to lie at or behind byte `end`: the file then ends at a multiple of
/// [`ALIGNMENT`]. Windows puts the next block where the footer was, and so has its data aligned, too.
pub(super) fn footer_place(end: u64) -> u64 {
    (end + FOOTER).next_multiple_of(ALIGNMENT) - FOOTER
}

/// Seconds from the Unix epoch to the format's own, 2000-01-01 00:00:00 UTC.
pub(super) const EPOCH: u64 = 946_684_800;

/// A time as images have it, in seconds.
pub(super) fn since_epoch(time: SystemTime) -> u32 {
    let unix = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    u32::try_from(unix.saturating_sub(EPOCH)).unwrap_or(u32::MAX)
}

/// The time that an image has as `seconds`.
pub(super) fn time(seconds: u32) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(EPOCH + u64::from(seconds))
}

/// Our creator code.
pub(super) const CREATOR: [u8; 4] = *b"fldk";
/// Our creator version.
pub(super) const CREATOR_VERSION: u32 = 0x0001_0000;
/// Creator host OS: the value that other programs expect.
pub(super) const HOST_OS: [u8; 4] = *b"Wi2k";

/// The footer: the last 512 bytes of every image, and the first of one with a BAT.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub(super) struct Footer {
    pub cookie: [u8; 8],
    pub features: U32,
    pub format_version: U32,
    /// Byte offset of the dynamic header.
    pub data_offset: U64,
    /// Creation time, seconds since [`EPOCH`].
    pub timestamp: U32,
    pub creator_application: [u8; 4],
    pub creator_version: U32,
    pub creator_host_os: [u8; 4],
    /// Size of the disk in bytes when it was made.
    pub original_size: U64,
    /// Size of the disk in bytes now.
    pub current_size: U64,
    pub cylinders: U16,
    pub heads: u8,
    pub sectors_per_track: u8,
    pub disk_type: U32,
    pub checksum: U32,
    pub unique_id: [u8; 16],
    pub saved_state: u8,
    /// Xen: the disk is hidden from listings.
    pub hidden: u8,
    pub reserved: [u8; 426],
}

/// The dynamic header: where the BAT is, and the parent of a differencing disk.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub(super) struct DynamicHeader {
    pub cookie: [u8; 8],
    pub data_offset: U64,
    /// Byte offset of the BAT.
    pub table_offset: U64,
    pub header_version: U32,
    /// Entries of the BAT.
    pub max_table_entries: U32,
    /// Bytes of data per block.
    pub block_size: U32,
    pub checksum: U32,
    pub parent_unique_id: [u8; 16],
    /// Modification time of the parent's file, seconds since [`EPOCH`].
    pub parent_timestamp: U32,
    pub reserved: U32,
    /// UTF-16, big-endian.
    pub parent_unicode_name: [u8; 512],
    pub parent_locators: [ParentLocator; 8],
    pub reserved_2: [u8; 256],
}

/// One way to find the parent of a differencing disk.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub(super) struct ParentLocator {
    pub platform_code: [u8; 4],
    /// Room for the data: bytes, or sectors where the value is below 512.
    pub data_space: U32,
    /// Bytes of data.
    pub data_length: U32,
    pub reserved: U32,
    /// Byte offset of the data.
    pub data_offset: U64,
}

/// Xen's batmap header, in the sector behind the BAT.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub(super) struct BatmapHeader {
    pub cookie: [u8; 8],
    /// Byte offset of the map.
    pub map_offset: U64,
    pub map_sectors: U32,
    pub version: U32,
    /// Complement of the sum of the map's bytes.
    pub checksum: U32,
    pub rest: [u8; 484],
}

const _: () = assert!(size_of::<Footer>() == FOOTER as usize);
const _: () = assert!(size_of::<DynamicHeader>() == HEADER as usize);
const _: () = assert!(size_of::<ParentLocator>() == 24);
const _: () = assert!(size_of::<BatmapHeader>() == SECTOR as usize);

/// What `disk_type` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DiskType {
    /// Raw data and a footer.
    Fixed,
    /// Blocks found through a BAT.
    Dynamic,
    /// Like dynamic; what is not stored is the parent's.
    Differencing,
}

impl DiskType {
    /// The number in the footer.
    pub(super) fn number(self) -> u32 {
        match self {
            Self::Fixed => 2,
            Self::Dynamic => 3,
            Self::Differencing => 4,
        }
    }

    /// Subformat name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Fixed => "fixed",
            Self::Dynamic => "dynamic",
            Self::Differencing => "differencing",
        }
    }
}

impl Footer {
    /// A footer for a new disk of `size` bytes, sealed.
    pub(super) fn new(disk_type: DiskType, size: u64, unique_id: [u8; 16], timestamp: u32) -> Self {
        let geometry = Chs::to_store(size);
        let mut footer = Self {
            cookie: FOOTER_COOKIE,
            features: FEATURES.into(),
            format_version: VERSION.into(),
            data_offset: if disk_type == DiskType::Fixed { NO_OFFSET } else { FOOTER }.into(),
            timestamp: timestamp.into(),
            creator_application: CREATOR,
            creator_version: CREATOR_VERSION.into(),
            creator_host_os: HOST_OS,
            original_size: size.into(),
            current_size: size.into(),
            cylinders: geometry.cylinders.into(),
            heads: geometry.heads,
            sectors_per_track: geometry.sectors_per_track,
            disk_type: disk_type.number().into(),
            unique_id,
            ..Self::new_zeroed()
        };
        footer.seal();
        footer
    }

    /// Sets the checksum to what the other fields ask for.
    pub(super) fn seal(&mut self) {
        self.checksum = checksum_without(self.as_bytes(), self.checksum).into();
    }

    /// Whether the checksum matches, allowing for the hidden flag of Xen's first tools, which they
    /// set without it.
    pub(super) fn checksum_matches(&self) -> bool {
        let sum = |footer: &Self| checksum_without(footer.as_bytes(), footer.checksum);
        sum(self) == self.checksum.get()
            || self.creator_is(b"tap")
                && [0x0000_0001, 0x0001_0001].contains(&self.creator_version.get())
                && sum(&Self { hidden: 0, ..*self }) == self.checksum.get()
    }

    /// Which kind of disk this is; `None` for numbers that mean none.
    pub(super) fn disk_type(&self) -> Option<DiskType> {
        [DiskType::Fixed, DiskType::Dynamic, DiskType::Differencing]
            .into_iter()
            .find(|t| t.number() == self.disk_type.get())
    }

    /// Size of the disk in bytes: whole sectors only.
    pub(super) fn size(&self) -> u64 {
        self.current_size.get() / SECTOR * SECTOR
    }

    /// The geometry as stored.
    pub(super) fn geometry(&self) -> Chs {
        Chs {
            cylinders: self.cylinders.get(),
            heads: self.heads,
            sectors_per_track: self.sectors_per_track,
        }
    }

    /// Stores a geometry. The checksum is to be sealed again.
    pub(super) fn set_geometry(&mut self, geometry: Chs) {
        self.cylinders = geometry.cylinders.into();
        self.heads = geometry.heads;
        self.sectors_per_track = geometry.sectors_per_track;
    }

    /// Whether the creator code is `code`, padded with NULs or spaces.
    pub(super) fn creator_is(&self, code: &[u8]) -> bool {
        let (start, padding) = self.creator_application.split_at(code.len());
        start == code && padding.iter().all(|b| matches!(b, 0 | b' '))
    }
}

impl DynamicHeader {
    /// A header for a new image, without parent and not sealed.
    pub(super) fn new(table_offset: u64, max_table_entries: u32, block_size: u32) -> Self {
        Self {
            cookie: HEADER_COOKIE,
            data_offset: NO_OFFSET.into(),
            table_offset: table_offset.into(),
            header_version: VERSION.into(),
            max_table_entries: max_table_entries.into(),
            block_size: block_size.into(),
            ..Self::new_zeroed()
        }
    }

    /// Sets the checksum to what the other fields ask for.
    pub(super) fn seal(&mut self) {
        self.checksum = checksum_without(self.as_bytes(), self.checksum).into();
    }

    /// Whether the checksum matches.
    pub(super) fn checksum_matches(&self) -> bool {
        checksum_without(self.as_bytes(), self.checksum) == self.checksum.get()
    }
}

/// The checksum of a structure: the complement of the sum of all bytes but the checksum's own.
fn checksum_without(bytes: &[u8], stored: U32) -> u32 {
    !byte_sum(bytes).wrapping_sub(byte_sum(stored.as_bytes()))
}

/// Sum of all bytes, wrapping.
pub(super) fn byte_sum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |sum: u32, byte| sum.wrapping_add(u32::from(*byte)))
}

/// Bytes of a block's sector bitmap in the file: a bit per sector, padded to whole sectors.
pub(super) fn bitmap_size(block_size: u64) -> u64 {
    (block_size / SECTOR).div_ceil(8).next_multiple_of(SECTOR)
}

/// Bytes that a BAT takes in the file: four per entry, padded to whole sectors.
pub(super) fn table_size(entries: u64) -> u64 {
    (entries * 4).next_multiple_of(SECTOR)
}

/// Cylinders, heads and sectors: the size that a BIOS of the time sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chs {
    pub cylinders: u16,
    pub heads: u8,
    pub sectors_per_track: u8,
}

impl Chs {
    /// Sectors of the largest geometry.
    const MAX_SECTORS: u64 = 65535 * 16 * 255;
    /// The largest geometry. Every reader that goes by geometry takes it for "see the size".
    pub(super) const MAX: Self = Self { cylinders: 65535, heads: 16, sectors_per_track: 255 };

    /// The geometry for a new image of `size` bytes. QEMU before version 10 cuts the disk off where
    /// the geometry of an image by an unknown creator ends, unless that is the largest one. So the
    /// prescribed geometry is stored only where it covers the disk exactly.
    pub(super) fn to_store(size: u64) -> Self {
        let prescribed = Self::for_size(size);
        if prescribed.size() == size { prescribed } else { Self::MAX }
    }

    /// The geometry that the format prescribes for a disk of `size` bytes.
    pub(super) fn for_size(size: u64) -> Self {
        let sectors = (size / SECTOR).min(Self::MAX_SECTORS);
        let (sectors_per_track, heads) = if sectors >= 65535 * 16 * 63 {
            (255, 16)
        } else {
            let tracks = sectors / 17;
            let heads = tracks.div_ceil(1024).max(4);
            if heads <= 16 && tracks < heads * 1024 {
                (17, heads)
            } else if sectors / 31 < 16 * 1024 {
                (31, 16)
            } else {
                (63, 16)
            }
        };
        Self {
            // At most 65535 by the limit on `sectors`; never more than 16 heads, 255 sectors.
            cylinders: (sectors / sectors_per_track / heads) as u16,
            heads: heads as u8,
            sectors_per_track: sectors_per_track as u8,
        }
    }

    /// Bytes that the geometry covers.
    pub(super) fn size(self) -> u64 {
        u64::from(self.cylinders)
            * u64::from(self.heads)
            * u64::from(self.sectors_per_track)
            * SECTOR
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_survive_a_round_trip() {
        let footer = Footer::new(DiskType::Dynamic, 3 << 20, [7; 16], 99);
        let read = Footer::read_from_bytes(footer.as_bytes()).unwrap();
        assert_eq!(read, footer);
        assert!(read.checksum_matches());
        assert_eq!((read.size(), read.disk_type()), (3 << 20, Some(DiskType::Dynamic)));

        let mut header = DynamicHeader::new(1536, 17, 2 << 20);
        header.seal();
        let read = DynamicHeader::read_from_bytes(header.as_bytes()).unwrap();
        assert!(read.checksum_matches());
        assert_eq!(read, header);
    }

    #[test]
    fn fields_lie_where_the_format_has_them() {
        let footer = Footer::new(DiskType::Fixed, 0x1234_5600, [0xab; 16], 0x0102_0304);
        let bytes = footer.as_bytes();
        assert_eq!(&bytes[..8], b"conectix");
        assert_eq!(bytes[16..24], [0xff; 8]);
        assert_eq!(bytes[24..32], *b"\x01\x02\x03\x04fldk");
        assert_eq!(bytes[48..56], [0, 0, 0, 0, 0x12, 0x34, 0x56, 0]);
        assert_eq!(bytes[60..64], [0, 0, 0, 2]);
        assert_eq!(bytes[68..84], [0xab; 16]);
        let header = DynamicHeader::new(0x600, 5, 0x20_0000);
        let bytes = header.as_bytes();
        assert_eq!(bytes[16..36], *b"\0\0\0\0\0\0\x06\0\0\x01\0\0\0\0\0\x05\0\x20\0\0");
    }

    #[test]
    fn any_changed_byte_breaks_the_checksum() {
        let footer = Footer::new(DiskType::Fixed, 1 << 20, [1; 16], 5);
        for at in 0..512 {
            let mut bytes = footer.as_bytes().to_vec();
            bytes[at] = bytes[at].wrapping_add(1);
            let changed = Footer::read_from_bytes(&bytes).unwrap();
            assert!(!changed.checksum_matches(), "byte {at}");
        }
    }

    #[test]
    fn the_hidden_flag_of_early_xen_does_not_count() {
        let mut footer = Footer::new(DiskType::Dynamic, 1 << 20, [1; 16], 5);
        footer.creator_application = *b"tap\0";
        footer.creator_version = 0x0001_0001.into();
        footer.seal();
        footer.hidden = 1;
        assert!(footer.checksum_matches());
        footer.creator_version = 0x0001_0003.into();
        footer.seal();
        footer.hidden = 0;
        assert!(!footer.checksum_matches());
    }

    #[test]
    fn geometry_follows_the_prescribed_steps() {
        let chs = |size| {
            let c = Chs::for_size(size);
            (c.cylinders, c.heads, c.sectors_per_track)
        };
        assert_eq!(chs(3 << 20), (90, 4, 17));
        assert_eq!(chs(40 << 20), (963, 5, 17));
        assert_eq!(chs(64 << 20), (963, 8, 17));
        assert_eq!(chs(504 << 20), (1024, 16, 63));
        assert_eq!(chs(1 << 30), (2080, 16, 63));
        assert_eq!(chs(2 << 30), (4161, 16, 63));
        assert_eq!(chs(127 << 30), (65278, 16, 255));
        assert_eq!(chs(136_899_993_600), (65535, 16, 255));
        assert_eq!(chs(2040 << 30), (65535, 16, 255));
        assert_eq!(chs(512), (0, 4, 17));
        for size in (0..200 << 30).step_by(777 << 19) {
            assert!(Chs::for_size(size).size() <= size, "{size}");
        }
    }

    #[test]
    fn new_images_have_a_geometry_that_hides_nothing() {
        let stored = |size| Footer::new(DiskType::Fixed, size, [0; 16], 0).geometry();
        assert_eq!(stored(504 << 20), Chs::for_size(504 << 20));
        assert_eq!(stored(64 << 20), Chs::MAX);
    }

    #[test]
    fn bitmaps_are_padded_to_sectors() {
        assert_eq!(bitmap_size(512), 512);
        assert_eq!(bitmap_size(512 << 10), 512);
        assert_eq!(bitmap_size(2 << 20), 512);
        assert_eq!(bitmap_size(4 << 20), 1024);
        assert_eq!(table_size(1), 512);
        assert_eq!(table_size(1_044_480), 4_177_920);
    }
}
