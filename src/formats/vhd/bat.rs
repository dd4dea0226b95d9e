//! The block allocation table in memory: cached pages of sector numbers.
//!
//! A page is 4 KiB of the table, counted from its beginning, and never holds what follows the table:
//! a block may begin in the same 4 KiB of the file.

use std::ops::Range;
use std::sync::Arc;

use super::layout::UNUSED;
use super::structure::Structure;
use crate::codec;
use crate::disk::tables::{CacheBudget, PageImage, TableCache};
use crate::error::Result;
use crate::storage::Storage;

const PAGE: u64 = 4096;
/// Entries in one page.
const PAGE_ENTRIES: u64 = PAGE / 4;
const WHAT: &str = "the BAT";

/// The table of one image.
#[derive(Debug)]
pub(super) struct Bat {
    file: Arc<dyn Storage>,
    at: u64,
    entries: u64,
    cache: TableCache,
}

impl Bat {
    /// The table that `structure` describes, nothing of it loaded.
    pub(super) fn new(
        file: Arc<dyn Storage>,
        structure: &Structure,
        budget: &Arc<CacheBudget>,
    ) -> Self {
        let cache = TableCache::new(PAGE as usize, budget);
        Self { file, at: structure.table_at, entries: structure.table_entries, cache }
    }

    /// The cache, for snapshots.
    pub(super) fn cache(&self) -> &TableCache {
        &self.cache
    }

    /// The blocks whose entries share a page with the entry of `block`.
    pub(super) fn same_page(block: u64) -> Range<u64> {
        let first = block / PAGE_ENTRIES * PAGE_ENTRIES;
        first..first + PAGE_ENTRIES
    }

    /// Bytes of a page that belong to the table.
    fn page_len(&self, page: u64) -> usize {
        (self.entries * 4 - page * PAGE).min(PAGE) as usize
    }

    fn load(&self, page: u64, buf: &mut [u8]) -> Result<()> {
        let buf = &mut buf[..self.page_len(page)];
        codec::read_exact(&*self.file, self.at + page * PAGE, buf, WHAT)
    }

    /// Runs `read` on the page with the entry of `block`; [`entry`] takes it apart.
    pub(super) fn read<R>(&self, block: u64, read: impl FnOnce(&[u8]) -> R) -> Result<R> {
        let page = block / PAGE_ENTRIES;
        self.cache.read(page, |buf| self.load(page, buf), read)
    }

    /// Runs `change` on the page with the entry of `block`, with [`set_entry`].
    pub(super) fn update(&self, block: u64, change: impl FnOnce(&mut [u8])) -> Result<()> {
        let page = block / PAGE_ENTRIES;
        self.cache.update(page, |buf| self.load(page, buf), change)
    }

    /// Writes pages where they belong.
    pub(super) fn write(&self, images: &[PageImage]) -> Result<()> {
        images.iter().try_for_each(|(page, bytes)| {
            let bytes = &bytes[..self.page_len(*page)];
            codec::write_all(&*self.file, self.at + page * PAGE, bytes, WHAT)
        })
    }
}

/// The entry of a block in its page.
pub(super) fn entry(page: &[u8], block: u64) -> u32 {
    let at = position(block);
    page.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(UNUSED, u32::from_be_bytes)
}

/// Changes the entry of a block in its page.
pub(super) fn set_entry(page: &mut [u8], block: u64, value: u32) {
    let at = position(block);
    page[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn position(block: u64) -> usize {
    (block % PAGE_ENTRIES) as usize * 4
}
