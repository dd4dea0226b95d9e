//! The structures of an image with a BAT, checked against each other and against the file.

use std::ops::Range;

use zerocopy::{FromBytes, IntoBytes};

use super::batmap::Batmap;
use super::bitmaps::is_full;
use super::footers::Footers;
use super::layout::{
    BLOCK_SIZES, DiskType, DynamicHeader, FOOTER, HEADER, HEADER_COOKIE, MAX_SPARSE_SIZE, SECTOR,
    VERSION, bitmap_size, table_size,
};
use super::locators::Locators;
use crate::codec;
use crate::error::{Error, Result};
use crate::storage::Storage;
use crate::storage::runs::merge;

/// Where everything is in an image with a BAT.
#[derive(Debug)]
pub(super) struct Structure {
    /// The dynamic header.
    pub header: DynamicHeader,
    /// Virtual size in bytes.
    pub size: u64,
    /// Bytes of data per block.
    pub block_size: u64,
    /// Bytes of sector bitmap in front of a block's data.
    pub bitmap_size: u64,
    /// Byte offset of the BAT.
    pub table_at: u64,
    /// Entries that the BAT has.
    pub table_entries: u64,
    /// Blocks of the disk that have an entry.
    pub blocks: u64,
    /// Parts of the file that no block may touch, ascending and disjoint.
    pub reserved: Vec<Range<u64>>,
    /// Xen's map of full blocks.
    pub batmap: Option<Batmap>,
    /// Where the parent may be, for a differencing disk.
    pub locators: Locators,
    /// Why the image must not be written, if so.
    pub read_only: Option<String>,
    /// What is odd.
    pub warnings: Vec<String>,
}

impl Structure {
    /// Reads and checks everything but the BAT's entries.
    pub(super) fn read(file: &dyn Storage, footers: &Footers, force: bool) -> Result<Self> {
        let mut read_only = None;
        let mut warnings = Vec::new();
        let size = footers.footer.size();
        if size > MAX_SPARSE_SIZE {
            return Err(Error::corrupt(format!(
                "the size {size} is larger than the 2040 GiB that a BAT can address"
            )));
        }
        let header_at = footers.footer.data_offset.get();
        let header = read_header(file, header_at, footers.file_len, force, &mut read_only)?;
        let block_size = header.block_size.get();
        if !block_size.is_power_of_two() || !BLOCK_SIZES.contains(&block_size) {
            return Err(Error::corrupt(format!("block size {block_size}")).at(header_at + 32));
        }
        let block_size = u64::from(block_size);
        let table_at = header.table_offset.get();
        let table_entries = u64::from(header.max_table_entries.get());
        let table = table_at..table_at.saturating_add(table_entries * 4);
        if table.end > footers.data_end {
            return Err(Error::corrupt(format!(
                "the BAT of {table_entries} entries lies past the end of the file"
            ))
            .at(table_at));
        }
        let header_range = header_at..header_at + HEADER;
        if table_at < FOOTER || overlap(&table, &header_range) {
            let what = "the BAT overlaps the footer copy or the dynamic header";
            return Err(Error::corrupt(what).at(table_at));
        }
        if !table_at.is_multiple_of(SECTOR) {
            let what = format!("the BAT at {table_at:#x} does not begin with a sector");
            warnings.push(what.clone());
            read_only.get_or_insert(what);
        }
        let needed = size.div_ceil(block_size);
        if needed > table_entries {
            let what = format!("the BAT has {table_entries} entries, the disk {needed} blocks");
            warnings.push(what.clone());
            read_only.get_or_insert(what);
        }
        if size == 0 {
            read_only.get_or_insert("the disk has no sectors".to_owned());
        }

        let batmap = Batmap::find(
            file,
            footers,
            table_at + table_size(table_entries),
            needed,
            &mut warnings,
            &mut read_only,
        );
        let locators = Locators::read(file, &header, &mut warnings, &mut read_only);
        let has_parent = header.parent_unique_id != [0; 16] || !locators.is_empty();
        if footers.disk_type == DiskType::Dynamic && has_parent {
            warnings.push("a dynamic disk that names a parent; the parent is ignored".to_owned());
        }

        let mut reserved = vec![0..FOOTER, header_range];
        reserved.push(table_at..table_at + table_size(table_entries));
        reserved.extend(batmap.iter().flat_map(Batmap::ranges));
        // Whoever makes a dynamic disk of a child may leave locators that lead into its blocks.
        if footers.disk_type == DiskType::Differencing {
            reserved.extend(locators.ranges());
        }
        merge(&mut reserved);
        Ok(Self {
            header,
            size,
            block_size,
            bitmap_size: bitmap_size(block_size),
            table_at,
            table_entries,
            blocks: needed.min(table_entries),
            reserved,
            batmap,
            locators,
            read_only,
            warnings,
        })
    }

    /// Bytes of file from one block to the next where they are packed.
    pub(super) fn stride(&self) -> u64 {
        self.bitmap_size + self.block_size
    }

    /// The disk range of a block; the last one ends with the disk.
    pub(super) fn block_range(&self, block: u64) -> Range<u64> {
        let start = block * self.block_size;
        start..(start + self.block_size).min(self.size)
    }

    /// The byte of the file of the first sector of a stored block, at `sector` of the file, that holds
    /// something although its bit in `bitmap` is clear. Programs that honour the bitmap of a dynamic disk
    /// read zeroes there.
    pub(super) fn hidden_data(
        &self,
        file: &dyn Storage,
        sector: u32,
        block: u32,
        bitmap: &[u8],
    ) -> Result<Option<u64>> {
        const CHUNK: u64 = 1 << 20;
        let range = self.block_range(u64::from(block));
        let sectors = (range.end - range.start) / SECTOR;
        if is_full(bitmap, sectors) {
            return Ok(None);
        }
        let is_set = |s: u64| bitmap[(s / 8) as usize] & (0x80 >> (s % 8)) != 0;
        let data_at = u64::from(sector) * SECTOR + self.bitmap_size;
        let mut data = vec![0; CHUNK.min(range.end - range.start) as usize];
        for first in (0..sectors).step_by((CHUNK / SECTOR) as usize) {
            let chunk = first..sectors.min(first + CHUNK / SECTOR);
            if chunk.clone().all(&is_set) {
                continue;
            }
            let data = &mut data[..((chunk.end - chunk.start) * SECTOR) as usize];
            codec::read_exact(file, data_at + first * SECTOR, data, "a block's data")?;
            let mut sectors = data.chunks_exact(SECTOR as usize).zip(chunk);
            let hidden = sectors.find(|(bytes, s)| !is_set(*s) && bytes.iter().any(|b| *b != 0));
            if let Some((_, s)) = hidden {
                return Ok(Some(data_at + s * SECTOR));
            }
        }
        Ok(None)
    }
}

fn read_header(
    file: &dyn Storage,
    at: u64,
    file_len: u64,
    force: bool,
    read_only: &mut Option<String>,
) -> Result<DynamicHeader> {
    let inside = at.checked_add(HEADER).is_some_and(|end| end <= file_len);
    if at < FOOTER || !at.is_multiple_of(SECTOR) || !inside {
        return Err(Error::corrupt(format!("the dynamic header cannot lie at {at:#x}")));
    }
    let bytes: [u8; HEADER as usize] = codec::read_array(file, at, "the dynamic header")?;
    let header = DynamicHeader::read_from_bytes(bytes.as_bytes())
        .map_err(|_| Error::corrupt("the dynamic header").at(at))?;
    if header.cookie != HEADER_COOKIE {
        return Err(Error::corrupt("the dynamic header has no `cxsparse` cookie").at(at));
    }
    if header.header_version != VERSION {
        let version = header.header_version;
        return Err(Error::unsupported(format!("dynamic header version {version:#x}")).at(at));
    }
    if !header.checksum_matches() {
        let what = "the dynamic header's checksum does not match";
        if !force {
            return Err(Error::corrupt(what).at(at).hint("`-o force` reads it all the same"));
        }
        *read_only = Some(format!("opened by force: {what}"));
    }
    Ok(header)
}

/// Whether two ranges share a byte.
pub(super) fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}
