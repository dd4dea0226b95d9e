//! On-disk layout of hosted sparse extents (`KDMV`): the header, what makes it acceptable, and the
//! formula by which every known writer lays out a new extent.
//!
//! All integers are little-endian, all places and sizes count sectors of 512 bytes.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::codec;
use crate::error::{Error, Result};
use crate::storage::Storage;

/// Bytes per sector, everywhere in this format.
pub const SECTOR: u64 = 512;
/// `KDMV`.
pub const MAGIC: [u8; 4] = *b"KDMV";
/// What some writers put there until a file is complete.
pub const MAGIC_UNFINISHED: [u8; 4] = *b"kdmv";
/// First bytes of an ESX copy-on-write extent.
pub const MAGIC_COWD: [u8; 4] = *b"COWD";
/// First bytes of a space-efficient sparse extent.
pub const MAGIC_SESPARSE: [u8; 8] = [0xbe, 0xba, 0xfe, 0xca, 0, 0, 0, 0];
/// First bytes of an encrypted VMware object.
pub const MAGIC_ENCRYPTED: [u8; 4] = [0x9e, 0xdd, 0x43, 0x89];

/// Grain table entries per table that every known writer uses.
pub const ENTRIES_PER_TABLE: u64 = 512;
/// Grain size in sectors that every known writer uses.
pub const DEFAULT_GRAIN: u64 = 128;
/// Largest grain accepted, in sectors.
pub const MAX_GRAIN: u64 = 65_536;
/// Largest grain directory accepted, in entries.
pub const MAX_TABLES: u64 = 32 << 20;
/// Sectors of the area for the embedded descriptor in a new extent.
pub const DESCRIPTOR_SECTORS: u64 = 20;
/// Byte offset of `uncleanShutdown` in the header.
pub const UNCLEAN_AT: u64 = 72;

/// Bytes 73..77 are valid.
pub const FLAG_NEWLINES: u32 = 1 << 0;
/// A redundant grain directory exists.
pub const FLAG_REDUNDANT: u32 = 1 << 1;
/// Entry value 1 means a grain of zeroes.
pub const FLAG_ZEROED_GRAINS: u32 = 1 << 2;
/// Grains are compressed.
pub const FLAG_COMPRESSED: u32 = 1 << 16;
/// Compressed grains carry their sector, and metadata is preceded by markers.
pub const FLAG_MARKERS: u32 = 1 << 17;
/// Bits that a reader must know.
const FLAGS_INCOMPATIBLE: u32 = 0xfffc_0000;
/// What [`FLAG_NEWLINES`] promises: line feed, blank, carriage return, line feed.
const NEWLINES: [u8; 4] = *b"\n \r\n";
/// `gdOffset` of a stream whose directory is described by a footer.
pub const GD_AT_END: u64 = u64::MAX;

/// The header, byte for byte.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawHeader {
    pub(super) magic_number: [u8; 4],
    pub(super) version: U32,
    pub(super) flags: U32,
    pub(super) capacity: U64,
    pub(super) grain_size: U64,
    pub(super) descriptor_offset: U64,
    pub(super) descriptor_size: U64,
    pub(super) num_gtes_per_gt: U32,
    pub(super) rgd_offset: U64,
    pub(super) gd_offset: U64,
    pub(super) overhead: U64,
    pub(super) unclean_shutdown: u8,
    pub(super) newlines: [u8; 4],
    pub(super) compress_algorithm: U16,
    pub(super) pad: [u8; 433],
}

const _: () = assert!(size_of::<RawHeader>() as u64 == SECTOR);
/// Byte offset of `rgdOffset` in the header.
pub const RGD_AT: u64 = std::mem::offset_of!(RawHeader, rgd_offset) as u64;
/// Byte offset of `gdOffset` in the header.
pub const GD_AT: u64 = std::mem::offset_of!(RawHeader, gd_offset) as u64;
const _: () = assert!(std::mem::offset_of!(RawHeader, unclean_shutdown) as u64 == UNCLEAN_AT);

/// A header whose fields are in range. Whether the places it names hold what they should is for
/// those who go there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 1 to 3.
    pub version: u32,
    /// See the `FLAG_` constants.
    pub flags: u32,
    /// Sectors of the disk that the extent holds; 0 where the file holds only a descriptor.
    pub capacity: u64,
    /// Sectors per grain, a power of two.
    pub grain: u64,
    /// First sector of the embedded descriptor's area, 0 for none.
    pub descriptor_at: u64,
    /// Sectors of that area.
    pub descriptor_len: u64,
    /// Entries per grain table, a power of two.
    pub entries_per_table: u64,
    /// Sector of the redundant grain directory, 0 for none.
    pub rgd: u64,
    /// Sector of the grain directory.
    pub gd: u64,
    /// Sectors before the first grain.
    pub overhead: u64,
    /// The extent was not closed after writing.
    pub unclean: bool,
}

impl Header {
    /// Reads and validates the header at byte `at`.
    pub fn read(file: &dyn Storage, at: u64) -> Result<Self> {
        let bytes: [u8; SECTOR as usize] = codec::read_array(file, at, "the sparse header")?;
        Self::decode(&bytes).map_err(|e| e.at(at).in_file(file.path()))
    }

    /// Decodes a header, refusing whatever cannot be read without guessing.
    pub fn decode(bytes: &[u8; SECTOR as usize]) -> Result<Self> {
        let raw = RawHeader::ref_from_bytes(bytes)
            .map_err(|_| Error::corrupt("the sparse header has the wrong size"))?;
        if raw.magic_number == MAGIC_UNFINISHED {
            return Err(Error::corrupt("the image is unfinished: its writer never completed it"));
        }
        if raw.magic_number != MAGIC {
            return Err(Error::corrupt("the sparse header has no KDMV signature"));
        }
        let (version, flags) = (raw.version.get(), raw.flags.get());
        if !(1..=3).contains(&version) {
            return Err(Error::unsupported(format!("sparse header version {version}")));
        }
        if flags & FLAGS_INCOMPATIBLE != 0 {
            return Err(Error::unsupported(format!("sparse header flags {flags:#x}")));
        }
        let compressed = flags & FLAG_COMPRESSED != 0;
        if flags & FLAG_MARKERS != 0 && !compressed {
            return Err(Error::corrupt("sparse header with markers but without compression"));
        }
        match raw.compress_algorithm.get() {
            0 if compressed => {
                return Err(Error::corrupt("compressed grains without a compression algorithm"));
            }
            0 | 1 => {}
            other => return Err(Error::unsupported(format!("compression algorithm {other}"))),
        }
        let header = Self {
            version,
            flags,
            capacity: raw.capacity.get(),
            grain: raw.grain_size.get(),
            descriptor_at: raw.descriptor_offset.get(),
            descriptor_len: raw.descriptor_size.get(),
            entries_per_table: raw.num_gtes_per_gt.get().into(),
            rgd: raw.rgd_offset.get(),
            gd: raw.gd_offset.get(),
            overhead: raw.overhead.get(),
            unclean: raw.unclean_shutdown != 0,
        };
        header.validate()?;
        if flags & FLAG_NEWLINES != 0 && raw.newlines != NEWLINES {
            return Err(Error::corrupt("the line ends in the sparse header were converted")
                .hint("the file went through a text-mode transfer; copy it again as binary"));
        }
        Ok(header)
    }

    fn validate(&self) -> Result<()> {
        if self.descriptor_at != 0 {
            if self.descriptor_len == 0 {
                return Err(Error::corrupt("the embedded descriptor has no room"));
            }
            if bytes(self.descriptor_at).is_none() || bytes(self.descriptor_len).is_none() {
                return Err(Error::corrupt("the embedded descriptor lies beyond any file"));
            }
        }
        if self.capacity == 0 {
            return match self.descriptor_at {
                0 => Err(Error::corrupt("the sparse extent has no capacity")),
                _ => Ok(()),
            };
        }
        if !self.grain.is_power_of_two() || self.grain > MAX_GRAIN {
            let what = format!("grain size of {} sectors", self.grain);
            return Err(Error::corrupt(what));
        }
        let entries = self.entries_per_table;
        if !entries.is_power_of_two() || !(128..=4096).contains(&entries) {
            return Err(Error::corrupt(format!("grain tables of {entries} entries")));
        }
        if bytes(self.capacity).is_none() || self.tables() > MAX_TABLES {
            return Err(Error::corrupt(format!("capacity of {} sectors", self.capacity)));
        }
        Ok(())
    }

    /// Whether grains are compressed.
    pub fn compressed(&self) -> bool {
        self.flags & FLAG_COMPRESSED != 0
    }

    /// Number of grain tables that the capacity needs.
    pub fn tables(&self) -> u64 {
        self.capacity.div_ceil(self.grain).div_ceil(self.entries_per_table)
    }

    /// Why nothing can be written to the extent although it can be read, if so.
    pub fn read_only(&self) -> Option<String> {
        if self.compressed() {
            let what = "stream-optimised images are never changed in place: `flatdisk convert -O vmdk` \
                        makes one that is, `mount -o nonpersistent` takes writes and forgets them";
            return Some(what.into());
        }
        if self.version == 3 {
            return Some("changed block tracking is on (sparse header version 3)".into());
        }
        if self.grain < 8 {
            return Some(format!("its grains have only {} sectors", self.grain));
        }
        if self.entries_per_table != ENTRIES_PER_TABLE {
            return Some(format!("its grain tables have {} entries", self.entries_per_table));
        }
        None
    }

    /// Replaces those fields of a header's bytes that say how large the extent is and where its tables
    /// are, and the mark of one that was not closed.
    pub fn patch(&self, bytes: &mut [u8; SECTOR as usize]) {
        if let Ok(raw) = RawHeader::mut_from_bytes(bytes) {
            raw.capacity = self.capacity.into();
            raw.rgd_offset = self.rgd.into();
            raw.gd_offset = self.gd.into();
            raw.overhead = self.overhead.into();
            raw.unclean_shutdown = self.unclean.into();
        }
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; SECTOR as usize] {
        let raw = RawHeader {
            magic_number: MAGIC,
            version: self.version.into(),
            flags: self.flags.into(),
            capacity: self.capacity.into(),
            grain_size: self.grain.into(),
            descriptor_offset: self.descriptor_at.into(),
            descriptor_size: self.descriptor_len.into(),
            num_gtes_per_gt: (self.entries_per_table as u32).into(),
            rgd_offset: self.rgd.into(),
            gd_offset: self.gd.into(),
            overhead: self.overhead.into(),
            unclean_shutdown: self.unclean.into(),
            newlines: NEWLINES,
            compress_algorithm: u16::from(self.compressed()).into(),
            pad: [0; 433],
        };
        zerocopy::transmute!(raw)
    }
}

/// Sectors as bytes; `None` if that leaves the range that file offsets have.
pub fn bytes(sectors: u64) -> Option<u64> {
    sectors.checked_mul(SECTOR).filter(|bytes| *bytes <= i64::MAX as u64)
}

/// Where the parts of a new sparse extent lie. The order is the same for every known writer: header,
/// descriptor area, redundant directory and its tables, directory and its tables, grains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewLayout {
    /// Number of grain tables, of each kind.
    pub tables: u64,
    /// Sector of the redundant directory.
    pub rgd: u64,
    /// Sector of the directory.
    pub gd: u64,
    /// Sectors of either directory.
    pub gd_len: u64,
    /// Sector of the first grain.
    pub overhead: u64,
}

/// Sectors of one grain table of a new extent.
pub const TABLE_SECTORS: u64 = ENTRIES_PER_TABLE * 4 / SECTOR;

impl NewLayout {
    /// The layout for `capacity` sectors in grains of `grain`, behind a descriptor area of
    /// `descriptor` sectors.
    pub fn new(capacity: u64, grain: u64, descriptor: u64) -> Self {
        let tables = capacity.div_ceil(grain).div_ceil(ENTRIES_PER_TABLE);
        let gd_len = (tables * 4).div_ceil(SECTOR);
        let rgd = 1 + descriptor;
        let gd = rgd + gd_len + tables * TABLE_SECTORS;
        let end = gd + gd_len + tables * TABLE_SECTORS;
        Self { tables, rgd, gd, gd_len, overhead: end.next_multiple_of(grain) }
    }

    /// The bytes of the directory at sector `gd`, whose tables follow it one after the other.
    pub fn directory(&self, gd: u64) -> Vec<u8> {
        let first = gd + self.gd_len;
        (0..self.tables)
            .flat_map(|t| U32::new((first + t * TABLE_SECTORS) as u32).to_bytes())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn sound() -> Header {
        Header {
            version: 1,
            flags: 3,
            capacity: 20_480,
            grain: 128,
            descriptor_at: 1,
            descriptor_len: 20,
            entries_per_table: 512,
            rgd: 21,
            gd: 26,
            overhead: 128,
            unclean: false,
        }
    }

    #[test]
    fn headers_survive_encoding() {
        let header = Header { unclean: true, ..sound() };
        assert_eq!(Header::decode(&header.encode()).unwrap(), header);
    }

    #[test]
    fn new_extents_have_the_layout_of_every_known_writer() {
        let parts = |mib: u64, descriptor| {
            let l = NewLayout::new(mib * 2048, 128, descriptor);
            (l.tables, l.rgd, l.gd, l.overhead)
        };
        assert_eq!(parts(10, 20), (1, 21, 26, 128));
        assert_eq!(parts(100, 20), (4, 21, 38, 128));
        assert_eq!(parts(5 << 10, 20), (160, 21, 663, 1408));
        assert_eq!(parts(40 << 10, 20), (1280, 21, 5151, 10_368));
        assert_eq!(parts(4064, 0), (127, 1, 510, 1024));
        assert_eq!(parts(2047, 0), (64, 1, 258, 640));
    }

    #[test]
    fn each_bad_field_is_refused_for_its_own_reason() {
        type Change = fn(&mut Header);
        let corrupt: [(&str, Change); 9] = [
            ("descriptor has no room", |h| h.descriptor_len = 0),
            ("descriptor lies beyond", |h| h.descriptor_at = 1 << 60),
            ("has no capacity", |h| (h.capacity, h.descriptor_at) = (0, 0)),
            ("capacity of", |h| h.capacity = 1 << 60),
            ("grain size of 0", |h| h.grain = 0),
            ("grain size of 96", |h| h.grain = 96),
            ("grain size of 131072", |h| h.grain = 131_072),
            ("tables of 506 entries", |h| h.entries_per_table = 506),
            ("markers but without", |h| h.flags = 0x2_0003),
        ];
        for (what, change) in corrupt {
            let mut header = sound();
            change(&mut header);
            let error = Header::decode(&header.encode()).expect_err(what);
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}");
            assert!(error.what().contains(what), "{error}");
        }
        let unsupported: [(&str, Change); 3] = [
            ("version 0", |h| h.version = 0),
            ("version 4", |h| h.version = 4),
            ("flags 0x40003", |h| h.flags = 0x4_0003),
        ];
        for (what, change) in unsupported {
            let mut header = sound();
            change(&mut header);
            let error = Header::decode(&header.encode()).expect_err(what);
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{what}");
            assert!(error.what().contains(what), "{error}");
        }
    }

    #[test]
    fn text_mode_transfer_and_unfinished_files_are_named() {
        let mut bytes = sound().encode();
        bytes[75] = b'\n';
        let error = Header::decode(&bytes).unwrap_err();
        assert!(error.to_string().contains("text-mode"), "{error}");
        let mut bytes = sound().encode();
        bytes[..4].copy_from_slice(b"kdmv");
        let error = Header::decode(&bytes).unwrap_err();
        assert!(error.what().contains("unfinished"), "{error}");
    }

    #[test]
    fn compression_needs_a_known_algorithm() {
        let mut bytes = Header { flags: 0x3_0001, ..sound() }.encode();
        assert!(Header::decode(&bytes).unwrap().compressed());
        bytes[77] = 0;
        assert_eq!(Header::decode(&bytes).unwrap_err().kind(), ErrorKind::Corrupt);
        bytes[77] = 2;
        assert_eq!(Header::decode(&bytes).unwrap_err().kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn unusual_but_readable_headers_are_read_only() {
        assert_eq!(sound().read_only(), None);
        for header in [
            Header { grain: 4, ..sound() },
            Header { entries_per_table: 1024, ..sound() },
            Header { version: 3, ..sound() },
        ] {
            assert!(Header::decode(&header.encode()).unwrap().read_only().is_some());
        }
    }
}
