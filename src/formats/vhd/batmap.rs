//! Xen's batmap: one bit per block that says "every bit of this block's bitmap is set".
//!
//! Reading needs it for nothing. What must not happen is that a bit lies: the driver only ever
//! clears bits, of every block whose entry or bitmap it changes, and a clear bit is always true.

use std::ops::Range;

use zerocopy::{FromBytes, IntoBytes};

use super::footers::Footers;
use super::layout::{BATMAP_COOKIE, BatmapHeader, MAX_SPARSE_SIZE, SECTOR, byte_sum};
use crate::codec;
use crate::error::{Error, Result};
use crate::storage::Storage;

/// Creator version from which Xen images surely have a batmap.
const CERTAIN: u32 = 0x0001_0002;
/// Most blocks that a batmap is believed of, for the memory it takes: 2040 GiB in blocks of 64 KiB.
/// Xen's own are of 2 MiB.
const MAX_BLOCKS: u64 = MAX_SPARSE_SIZE >> 16;
/// Batmap version whose checksum adds unsigned bytes.
const UNSIGNED: u32 = 0x0001_0002;

/// Bytes of the map of a disk of `size` bytes that the checksum covers: Xen takes two MiB per bit for
/// granted here.
pub(super) fn summed(size: u64) -> u64 {
    (size >> 24).next_multiple_of(SECTOR).max(SECTOR)
}

/// The checksum of a map as batmaps of `version` have it.
pub(super) fn checksum(version: u32, bytes: &[u8]) -> u32 {
    if version >= UNSIGNED {
        !byte_sum(bytes)
    } else {
        !bytes.iter().fold(0, |sum: u32, byte| sum.wrapping_add(*byte as i8 as u32))
    }
}

/// Where a batmap is, checked against the file.
#[derive(Debug, Clone)]
pub(super) struct Batmap {
    header: BatmapHeader,
    header_at: u64,
    /// Bytes of the map that the checksum covers.
    summed: u64,
}

impl Batmap {
    /// Looks for a batmap in the sector at `header_at`, of an image by Xen's tools with `blocks`
    /// blocks. One that makes no sense is ignored for reading and forbids writing: in a file that
    /// grew it might make sense, and its place be taken.
    pub(super) fn find(
        file: &dyn Storage,
        footers: &Footers,
        header_at: u64,
        blocks: u64,
        warnings: &mut Vec<String>,
        read_only: &mut Option<String>,
    ) -> Option<Self> {
        let footer = &footers.footer;
        let version = footer.creator_version.get();
        if !footer.creator_is(b"tap") || version <= 1 {
            return None;
        }
        let bytes = codec::read_array::<{ SECTOR as usize }>(file, header_at, "the batmap").ok();
        let header = bytes
            .and_then(|bytes| BatmapHeader::read_from_bytes(&bytes).ok())
            .filter(|header| header.cookie == BATMAP_COOKIE);
        let Some(header) = header else {
            if version >= CERTAIN {
                warnings.push("the batmap that Xen's tools expect is missing".to_owned());
            }
            return None;
        };
        let map_at = header.map_offset.get();
        let map_len = u64::from(header.map_sectors.get()) * SECTOR;
        let inside = map_at.checked_add(map_len).is_some_and(|end| end <= footers.data_end);
        let large_enough = blocks <= MAX_BLOCKS && map_len >= blocks.div_ceil(8);
        if !inside || !large_enough || !map_at.is_multiple_of(SECTOR) {
            let what = "the batmap's place or size makes no sense".to_owned();
            warnings.push(what.clone());
            read_only.get_or_insert(what);
            return None;
        }
        let summed = summed(footer.current_size.get()).min(map_len);
        Some(Self { header, header_at, summed })
    }

    /// The parts of the file that it occupies.
    pub(super) fn ranges(&self) -> [Range<u64>; 2] {
        let map_at = self.header.map_offset.get();
        let map_len = u64::from(self.header.map_sectors.get()) * SECTOR;
        [self.header_at..self.header_at + SECTOR, map_at..map_at + map_len]
    }

    /// Reads the bits of `blocks` blocks, with what the checksum covers, and compares the checksum.
    pub(super) fn load(&self, file: &dyn Storage, blocks: u64) -> Result<(Bits, bool)> {
        let len = blocks.div_ceil(8).max(self.summed);
        let mut bytes = vec![0; len as usize];
        codec::read_exact(file, self.header.map_offset.get(), &mut bytes, "the batmap")?;
        let intact = self.checksum(&bytes) == self.header.checksum.get();
        Ok((Bits { bytes, changed: false }, intact))
    }

    fn checksum(&self, bytes: &[u8]) -> u32 {
        checksum(self.header.version.get(), &bytes[..self.summed as usize])
    }

    /// Writes map and header.
    pub(super) fn write(&self, file: &dyn Storage, bytes: &[u8]) -> Result<()> {
        codec::write_all(file, self.header.map_offset.get(), bytes, "the batmap")?;
        let (at, header) = self.header_for(bytes);
        codec::write_all(file, at, header.as_bytes(), "the batmap's header")
    }

    /// The header for a longer map of these bytes, whole sectors, at byte `map_at`.
    pub(super) fn moved(&self, map_at: u64, map: &[u8]) -> BatmapHeader {
        // Behind what the checksum of the shorter one covers there are only zeroes.
        let checksum = self.checksum(map).into();
        let map_sectors = (map.len() as u64 / SECTOR) as u32;
        BatmapHeader {
            map_offset: map_at.into(),
            map_sectors: map_sectors.into(),
            checksum,
            ..self.header
        }
    }

    /// Byte offset of the map.
    pub(super) fn map_at(&self) -> u64 {
        self.header.map_offset.get()
    }

    /// The header that belongs to a map of these bytes, and its offset.
    pub(super) fn header_for(&self, bytes: &[u8]) -> (u64, BatmapHeader) {
        let header = BatmapHeader { checksum: self.checksum(bytes).into(), ..self.header };
        (self.header_at, header)
    }

    /// An error about the header's place.
    pub(super) fn damaged(&self) -> Error {
        Error::corrupt("the batmap's checksum does not match").at(self.header_at)
    }
}

/// The bits of a batmap in memory.
#[derive(Debug, Clone)]
pub(super) struct Bits {
    bytes: Vec<u8>,
    /// Changed since last written.
    pub changed: bool,
}

impl Bits {
    /// Whether the block's bit is set.
    pub(super) fn get(&self, block: u64) -> bool {
        self.bytes[(block / 8) as usize] & (0x80 >> (block % 8)) != 0
    }

    /// Clears the block's bit.
    pub(super) fn clear(&mut self, block: u64) {
        if self.get(block) {
            self.bytes[(block / 8) as usize] &= !(0x80 >> (block % 8));
            self.changed = true;
        }
    }

    /// Sets the block's bit.
    pub(super) fn set(&mut self, block: u64) {
        self.bytes[(block / 8) as usize] |= 0x80 >> (block % 8);
        self.changed = true;
    }

    /// Clears all bits.
    pub(super) fn clear_all(&mut self) {
        self.bytes.fill(0);
        self.changed = true;
    }

    /// The bytes, to be written.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}
