//! The block allocation table: which entry belongs to which block, and what an entry says.
//!
//! The disk is divided into payload blocks, and those into chunks of as many blocks as one 1 MiB
//! sector bitmap covers. The table has the entries of a chunk's blocks, then the one of the chunk's
//! bitmap, then the next chunk. Disks without a parent have no bitmaps, but the slots between the
//! chunks all the same.

use super::layout::{LOG_SECTOR, MIB};
use super::metadata::Metadata;
use super::regions::Region;
use crate::codec::read_exact;
use crate::error::{Error, Result};
use crate::storage::Storage;

/// Length of a file in bytes.
pub fn file_len(file: &dyn Storage) -> Result<u64> {
    file.len().map_err(|e| Error::io("asking for the size", &e).in_file(file.path()))
}

/// Bytes of an entry.
pub const ENTRY_BYTES: u64 = 8;
/// Entries in a page of the table.
pub const ENTRIES_PER_PAGE: u64 = LOG_SECTOR / ENTRY_BYTES;

/// An entry as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry(pub u64);

/// The state of a payload block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The parent's data; zeroes on a disk without parent.
    NotPresent,
    /// Anything; read as zeroes.
    Undefined,
    /// Zeroes.
    Zero,
    /// Discarded; read as zeroes.
    Unmapped,
    /// The whole block is in this file.
    Present,
    /// The sectors whose bit is set are in this file, the others in the parent.
    Partial,
    /// No state that the format knows.
    Invalid,
}

impl Entry {
    /// The entry of a block at byte `at` of the file, a multiple of 1 MiB, wholly present.
    pub fn present(at: u64) -> Self {
        Self(at | 6)
    }

    /// The entry of a block at byte `at` whose sector bitmap counts.
    pub fn partial(at: u64) -> Self {
        Self(at | 7)
    }

    /// The entry of a block that reads as zeroes.
    pub const ZERO: Self = Self(2);

    /// Whether the state has the number that only the draft 0.95 of the format had for it.
    pub fn is_draft(self) -> bool {
        self.state() == State::Unmapped && self.0 & 7 == 5
    }

    /// The state; reserved bits make it invalid.
    pub fn state(self) -> State {
        if self.0 & 0xf_fff8 != 0 {
            return State::Invalid;
        }
        match self.0 & 7 {
            0 => State::NotPresent,
            1 => State::Undefined,
            2 => State::Zero,
            // 5 is what the draft 0.95 of the format had for it.
            3 | 5 => State::Unmapped,
            6 => State::Present,
            7 => State::Partial,
            _ => State::Invalid,
        }
    }

    /// Byte offset in the file.
    pub fn offset(self) -> u64 {
        self.0 & !0xf_ffff
    }

    /// The `index`th entry of a page of the table.
    pub fn get(page: &[u8], index: u64) -> Self {
        let at = (index * ENTRY_BYTES) as usize;
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&page[at..at + 8]);
        Self(u64::from_le_bytes(bytes))
    }

    /// Stores the entry as the `index`th of a page of the table.
    pub fn put(self, page: &mut [u8], index: u64) {
        let at = (index * ENTRY_BYTES) as usize;
        page[at..at + 8].copy_from_slice(&self.0.to_le_bytes());
    }
}

/// What a slot of the table is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    /// Payload block number.
    Block(u64),
    /// Sector bitmap of chunk number.
    Bitmap(u64),
    /// Behind the last.
    Unused,
}

/// The numbers that divide a disk into blocks and chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatLayout {
    /// Payload block in bytes.
    pub block_size: u64,
    /// Blocks in a chunk, a power of two.
    pub chunk_ratio: u64,
    /// Payload blocks on the disk.
    pub blocks: u64,
    /// Chunks on the disk.
    pub chunks: u64,
    /// Entries that the table must have.
    pub entries: u64,
}

impl BatLayout {
    /// The layout of a disk of `size` bytes; all numbers were checked when the metadata was read.
    pub fn new(size: u64, block_size: u64, logical_sector: u32, has_parent: bool) -> Self {
        let chunk_ratio = (u64::from(logical_sector) << 23) / block_size;
        let blocks = size.div_ceil(block_size);
        let chunks = blocks.div_ceil(chunk_ratio);
        let entries = if has_parent {
            chunks * (chunk_ratio + 1)
        } else {
            blocks + (blocks - 1) / chunk_ratio
        };
        Self { block_size, chunk_ratio, blocks, chunks, entries }
    }

    /// The layout that metadata asks for.
    pub fn of(metadata: &Metadata) -> Self {
        let Metadata { size, block_size, logical_sector, has_parent, .. } = *metadata;
        Self::new(size, block_size, logical_sector, has_parent)
    }

    /// Index of a payload block's entry.
    pub fn block_entry(&self, block: u64) -> u64 {
        block + block / self.chunk_ratio
    }

    /// Index of the entry of the sector bitmap that covers a payload block.
    pub fn bitmap_entry(&self, block: u64) -> u64 {
        let chunk = block / self.chunk_ratio;
        chunk * (self.chunk_ratio + 1) + self.chunk_ratio
    }

    /// What the entry at `index` is for.
    pub fn slot(&self, index: u64) -> Slot {
        let (chunk, place) = (index / (self.chunk_ratio + 1), index % (self.chunk_ratio + 1));
        let block = chunk * self.chunk_ratio + place;
        if place == self.chunk_ratio && chunk < self.chunks {
            Slot::Bitmap(chunk)
        } else if place < self.chunk_ratio && block < self.blocks {
            Slot::Block(block)
        } else {
            Slot::Unused
        }
    }

    /// Bytes of the region that holds the table.
    pub fn region_length(&self) -> u64 {
        (self.entries * ENTRY_BYTES).next_multiple_of(MIB)
    }
}

/// Calls `visit` for every entry that is not zero, in order, reading the table in large pieces and
/// skipping the holes of the host file. Linear in what is stored of the table. Entries that the end of
/// the file cuts off are unknown, and not visited.
pub fn scan(
    file: &dyn Storage,
    region: &Region,
    layout: &BatLayout,
    mut visit: impl FnMut(u64, Slot, Entry),
) -> Result<()> {
    let end = region.offset + region.entries(file_len(file)?).min(layout.entries) * ENTRY_BYTES;
    let mut buf = vec![0; MIB as usize];
    let mut at = region.offset;
    while at < end {
        let data = file
            .next_data(at)
            .map_err(|e| Error::io("looking for data", &e).in_file(file.path()).at(at))?;
        let Some(data) = data.filter(|data| data.start < end) else { break };
        at = data.start.max(at) / ENTRY_BYTES * ENTRY_BYTES;
        let stop = data.end.clamp(at + 1, end).next_multiple_of(ENTRY_BYTES).min(end);
        while at < stop {
            let buf = &mut buf[..(stop - at).min(MIB) as usize];
            read_exact(file, at, buf, "BAT")?;
            let first = (at - region.offset) / ENTRY_BYTES;
            for i in 0..buf.len() as u64 / ENTRY_BYTES {
                let entry = Entry::get(buf, i);
                if entry != Entry(0) {
                    visit(first + i, layout.slot(first + i), entry);
                }
            }
            at += buf.len() as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::layout::BAT_REGION;
    use super::*;
    use crate::storage::memory::MemoryFile;

    #[test]
    fn entries_are_where_the_format_puts_them() {
        let layout = BatLayout::new(10 << 30, MIB, 512, false);
        assert_eq!((layout.chunk_ratio, layout.blocks, layout.chunks), (4096, 10240, 3));
        assert_eq!(layout.entries, 10242);
        assert_eq!(layout.block_entry(5000), 5001);
        assert_eq!(layout.slot(4096), Slot::Bitmap(0));
        assert_eq!(layout.slot(4097), Slot::Block(4096));
        assert_eq!(layout.slot(10242), Slot::Unused);
        assert_eq!(layout.bitmap_entry(4096), 2 * 4096 + 1);
        for block in [0, 4095, 4096, 10239] {
            assert_eq!(layout.slot(layout.block_entry(block)), Slot::Block(block));
        }
    }

    #[test]
    fn the_largest_table_has_the_size_the_format_gives() {
        let layout = BatLayout::new(64 << 40, MIB, 512, true);
        assert_eq!(layout.region_length(), 513 * MIB);
        assert_eq!(BatLayout::new(64 << 40, 256 * MIB, 4096, false).region_length(), 3 * MIB);
    }

    #[test]
    fn entries_decode() {
        let entry = Entry(0x80_0006);
        assert_eq!((entry.state(), entry.offset()), (State::Present, 8 * MIB));
        assert_eq!(Entry::present(8 * MIB), entry);
        assert_eq!(Entry::partial(8 * MIB).state(), State::Partial);
        assert_eq!(Entry::ZERO.state(), State::Zero);
        assert_eq!(Entry(5).state(), State::Unmapped);
        for bad in [4, 6 | 1 << 3, 6 | 1 << 19] {
            assert_eq!(Entry(bad).state(), State::Invalid);
        }
    }

    #[test]
    fn a_scan_sees_every_entry_and_skips_holes() {
        let layout = BatLayout::new(64 << 40, MIB, 512, false);
        let region = Region {
            guid: BAT_REGION,
            offset: MIB,
            length: layout.region_length(),
            required: true,
        };
        let file = MemoryFile::new("x", &[]);
        file.set_len(MIB + region.length).unwrap();
        let indices = [0, 1, 511, 512, 8192, 1 << 20, layout.entries - 1];
        for index in indices {
            file.write_at(MIB + index * 8, &Entry::present(MIB * 99).0.to_le_bytes()).unwrap();
        }
        file.write_at(MIB + layout.entries * 8, &[6]).unwrap();
        let mut seen = Vec::new();
        scan(&*file, &region, &layout, |index, slot, entry| {
            assert_eq!(slot, layout.slot(index));
            assert_eq!(entry.offset(), 99 * MIB);
            seen.push(index);
        })
        .unwrap();
        assert_eq!(seen, indices);
    }
}
