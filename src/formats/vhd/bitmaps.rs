//! The sector bitmaps of a differencing disk: which sectors of a block are its own.
//!
//! Bit 7 of a bitmap's first byte is the block's first sector. Bitmaps are cached in pages of their
//! own; a page is a whole bitmap, or 4 KiB of a longer one.

use std::ops::Range;
use std::sync::Arc;

use super::layout::SECTOR;
use crate::codec;
use crate::disk::tables::{CacheBudget, PageImage, TableCache};
use crate::error::Result;
use crate::storage::Storage;

const MAX_PAGE: u64 = 4096;
const WHAT: &str = "a sector bitmap";

/// Whether the bits of a block's first `sectors` sectors are all set.
pub(super) fn is_full(bitmap: &[u8], sectors: u64) -> bool {
    let (whole, rest) = bitmap.split_at((sectors / 8) as usize);
    let last = !(0xff >> (sectors % 8)) as u8;
    let rest_full = last == 0 || rest.first().is_some_and(|byte| byte & last == last);
    rest_full && whole.iter().all(|byte| *byte == 0xff)
}

/// The cached bitmaps of one disk.
#[derive(Debug)]
pub(super) struct SectorBitmaps {
    file: Arc<dyn Storage>,
    cache: TableCache,
    /// Bytes per page.
    page_size: u64,
    pages_per_block: u64,
}

impl SectorBitmaps {
    /// A cache of bitmaps of `bitmap_size` bytes.
    pub(super) fn new(file: Arc<dyn Storage>, bitmap_size: u64, budget: &Arc<CacheBudget>) -> Self {
        // A power of two of sectors either way, so pages divide a bitmap evenly.
        let page_size = bitmap_size.min(MAX_PAGE);
        Self {
            file,
            cache: TableCache::new(page_size as usize, budget),
            page_size,
            pages_per_block: bitmap_size / page_size,
        }
    }

    /// The cache, for snapshots.
    pub(super) fn cache(&self) -> &TableCache {
        &self.cache
    }

    /// Bytes of disk that one page covers.
    pub(super) fn page_covers(&self) -> u64 {
        self.page_size * 8 * SECTOR
    }

    fn load(&self, bitmap_at: u64, page: u64, buf: &mut [u8]) -> Result<()> {
        codec::read_exact(&*self.file, bitmap_at + page * self.page_size, buf, WHAT)
    }

    /// Tells runs of the sectors that cover `bytes` of the block, whose bitmap is at `bitmap_at`:
    /// whether they are the block's own, and the bytes of the block they cover.
    pub(super) fn runs(
        &self,
        block: u64,
        bitmap_at: u64,
        bytes: Range<u64>,
        mut run: impl FnMut(bool, Range<u64>),
    ) -> Result<()> {
        let mut pos = bytes.start;
        while pos < bytes.end {
            let page = pos / self.page_covers();
            let start = page * self.page_covers();
            let until = bytes.end.min(start + self.page_covers());
            let load = |buf: &mut [u8]| self.load(bitmap_at, page, buf);
            self.cache.read(block * self.pages_per_block + page, load, |bits| {
                let mut sector = ((pos - start) / SECTOR) as usize;
                let end = ((until - start) / SECTOR) as usize;
                while sector < end {
                    let (own, count) = run_at(bits, sector, end);
                    let from = start + sector as u64 * SECTOR;
                    run(own, from..from + count as u64 * SECTOR);
                    sector += count;
                }
            })?;
            pos = until;
        }
        Ok(())
    }

    /// Sets the bits of the sectors that cover `bytes` of the block, all in one page. Of a `fresh`
    /// block the bitmap in the file is all zeroes and not read, so that this cannot fail.
    pub(super) fn set(
        &self,
        block: u64,
        bitmap_at: u64,
        bytes: Range<u64>,
        fresh: bool,
    ) -> Result<()> {
        let page = bytes.start / self.page_covers();
        let start = page * self.page_covers();
        let load = |buf: &mut [u8]| match fresh {
            true => Ok(()),
            false => self.load(bitmap_at, page, buf),
        };
        self.cache.update(block * self.pages_per_block + page, load, |bits| {
            let sectors = (bytes.start - start) / SECTOR..(bytes.end - start) / SECTOR;
            for sector in sectors.start as usize..sectors.end as usize {
                bits[sector / 8] |= mask(sector);
            }
        })
    }

    /// Writes pages; `bitmap_of` tells where a block's bitmap is.
    pub(super) fn write(
        &self,
        images: &[PageImage],
        bitmap_of: impl Fn(u64) -> Result<u64>,
    ) -> Result<()> {
        images.iter().try_for_each(|(number, bytes)| {
            let at = bitmap_of(number / self.pages_per_block)?;
            let skip = number % self.pages_per_block * self.page_size;
            codec::write_all(&*self.file, at + skip, bytes, WHAT)
        })
    }
}

fn mask(sector: usize) -> u8 {
    0x80 >> (sector % 8)
}

/// The value of the bit at `from`, and how many bits before `end` follow with the same value,
/// itself included.
fn run_at(bits: &[u8], from: usize, end: usize) -> (bool, usize) {
    let value = |sector: usize| bits[sector / 8] & mask(sector) != 0;
    let own = value(from);
    let whole = if own { 0xff } else { 0 };
    let mut sector = from + 1;
    while sector < end {
        if sector.is_multiple_of(8) && end - sector >= 8 && bits[sector / 8] == whole {
            sector += 8;
        } else if value(sector) == own {
            sector += 1;
        } else {
            break;
        }
    }
    (own, sector - from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_count_bits_from_the_most_significant() {
        let bits = [0b1110_0000, 0, 0, 0b0000_0001, 0xff, 0xff, 0b1000_0000, 0];
        assert_eq!(run_at(&bits, 0, 64), (true, 3));
        assert_eq!(run_at(&bits, 1, 64), (true, 2));
        assert_eq!(run_at(&bits, 3, 64), (false, 28));
        assert_eq!(run_at(&bits, 3, 17), (false, 14));
        assert_eq!(run_at(&bits, 31, 64), (true, 18));
        assert_eq!(run_at(&bits, 63, 64), (false, 1));
    }
}
