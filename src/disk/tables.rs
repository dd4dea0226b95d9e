//! A bounded cache of table pages: BAT pages, grain tables, sector bitmaps.
//!
//! Pages are named by a number that the driver chooses and have one size per cache. A hit takes one
//! shard's read lock, sets a second-chance bit and does no I/O. Pages changed in memory are *dirty*:
//! they stay until a flush took a snapshot of them ([`TableCache::snapshot`]), wrote it, and said so
//! ([`TableCache::retire`]).
//!
//! # Invariants
//!
//! 1. A page that is dirty, or in flight between snapshot and retire, is never evicted: the file
//!    does not hold its contents yet.
//! 2. No I/O happens while a shard is locked. A page loaded from the file is inserted only if no
//!    page of its shard changed or left since the load began (the shard's `epoch`); otherwise the
//!    load is repeated, so that stale contents never enter.
//! 3. A load never uses the cache it loads for: two pages of one shard that evict each other would
//!    make both loads stale for ever.
//! 4. Memory is bounded by the [`CacheBudget`] shared by all disks of a process, plus one page per
//!    shard, plus dirty pages: of those the disk takes no more than [`MAX_DIRTY`] bytes, and what one step
//!    of a discard adds, before it flushes.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use parking_lot::RwLock;

use crate::error::Result;

/// Bytes of table pages all disks together may keep, shared by their caches.
#[derive(Debug)]
pub struct CacheBudget {
    limit: usize,
    used: AtomicUsize,
}

impl CacheBudget {
    /// Default limit in bytes: the tables of 1 TiB of 64 KiB grains fit twice over.
    pub const DEFAULT: usize = 32 << 20;

    /// A budget of `limit` bytes.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, used: AtomicUsize::new(0) })
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// The limit in bytes.
    pub fn limit(&self) -> usize {
        self.limit
    }
}

/// Bytes of changed table pages of one disk that may wait in memory for a flush, in all its caches.
pub const MAX_DIRTY: usize = 8 << 20;

/// How a [`TableCache`] has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Lookups answered from memory.
    pub hits: u64,
    /// Lookups that read the file.
    pub misses: u64,
    /// Pages in memory.
    pub pages: u64,
    /// Pages that wait for a flush.
    pub dirty: u64,
}

impl std::iter::Sum for CacheStats {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |a, b| Self {
            hits: a.hits + b.hits,
            misses: a.misses + b.misses,
            pages: a.pages + b.pages,
            dirty: a.dirty + b.dirty,
        })
    }
}

#[derive(Debug)]
struct Page {
    data: Box<[u8]>,
    dirty: bool,
    in_flight: bool,
    used: AtomicBool,
}

/// Hashes page numbers by a factor that no image can foresee, far cheaper than the standard hash: a
/// read of a deep chain asks a cache or two per generation.
#[derive(Debug, Clone, Copy)]
struct PageHash {
    factor: u64,
    hash: u64,
}

impl Default for PageHash {
    fn default() -> Self {
        Self { factor: fastrand::u64(..) | 1, hash: 0 }
    }
}

impl BuildHasher for PageHash {
    type Hasher = Self;
    fn build_hasher(&self) -> Self {
        *self
    }
}

impl Hasher for PageHash {
    fn write_u64(&mut self, number: u64) {
        let product = u128::from(self.hash ^ number) * u128::from(self.factor);
        self.hash = (product as u64) ^ (product >> 64) as u64;
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn finish(&self) -> u64 {
        self.hash
    }
}

#[derive(Debug, Default)]
struct Shard {
    pages: HashMap<u64, Page, PageHash>,
    /// Counts changes that make a load begun earlier stale.
    epoch: u64,
}

const SHARDS: usize = 16;

/// See the module's documentation.
#[derive(Debug)]
pub struct TableCache {
    page_size: usize,
    shards: [RwLock<Shard>; SHARDS],
    budget: Arc<CacheBudget>,
    dirty: AtomicUsize,
    hits: AtomicU64,
    misses: AtomicU64,
}

/// A dirty page as [`TableCache::snapshot`] saw it.
pub type PageImage = (u64, Box<[u8]>);

impl TableCache {
    /// An empty cache of pages of `page_size` bytes.
    pub fn new(page_size: usize, budget: &Arc<CacheBudget>) -> Self {
        Self {
            page_size,
            shards: Default::default(),
            budget: budget.clone(),
            dirty: AtomicUsize::new(0),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        }
    }

    /// Bytes per page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    fn shard(&self, page: u64) -> &RwLock<Shard> {
        // Neighbouring pages go to different shards.
        &self.shards[page as usize % SHARDS]
    }

    /// Runs `read` on page `page`, loading it with `load` (which fills a zeroed page) if it is not
    /// in memory. `read` runs under the shard's lock: it copies out and returns.
    pub fn read<R>(
        &self,
        page: u64,
        load: impl FnMut(&mut [u8]) -> Result<()>,
        read: impl FnOnce(&[u8]) -> R,
    ) -> Result<R> {
        {
            let shard = self.shard(page).read();
            if let Some(p) = shard.pages.get(&page) {
                p.used.store(true, Ordering::Relaxed);
                // A figure for people: that two threads may count as one is cheaper than an atomic
                // addition to every lookup.
                let hits = self.hits.load(Ordering::Relaxed);
                self.hits.store(hits + 1, Ordering::Relaxed);
                return Ok(read(&p.data));
            }
        }
        self.load_then(page, load, |p| (read(&p.data), false))
    }

    /// Runs `change` on page `page`, loading it first if needed, and marks the page dirty.
    pub fn update<R>(
        &self,
        page: u64,
        load: impl FnMut(&mut [u8]) -> Result<()>,
        change: impl FnOnce(&mut [u8]) -> R,
    ) -> Result<R> {
        let mut change = Some(change);
        let mut apply = |p: &mut Page| {
            // `load_then` and the hit path below call this at most once between them.
            let change = change.take().expect("applied once");
            (change(&mut p.data), true)
        };
        {
            let mut shard = self.shard(page).write();
            if let Some(p) = shard.pages.get_mut(&page) {
                let (result, _) = apply(p);
                self.mark_dirty(&mut shard, page);
                return Ok(result);
            }
        }
        self.load_then(page, load, apply)
    }

    fn mark_dirty(&self, shard: &mut Shard, page: u64) {
        shard.epoch += 1;
        if let Some(p) = shard.pages.get_mut(&page) {
            p.used.store(true, Ordering::Relaxed);
            if !p.dirty {
                p.dirty = true;
                self.dirty.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// The miss path: loads outside the lock, inserts, runs `use_page`; its flag says "now dirty".
    fn load_then<R>(
        &self,
        page: u64,
        mut load: impl FnMut(&mut [u8]) -> Result<()>,
        use_page: impl FnOnce(&mut Page) -> (R, bool),
    ) -> Result<R> {
        let mut data = vec![0u8; self.page_size].into_boxed_slice();
        loop {
            let epoch = {
                let shard = self.shard(page).read();
                if shard.pages.contains_key(&page) { None } else { Some(shard.epoch) }
            };
            if epoch.is_some() {
                self.misses.fetch_add(1, Ordering::Relaxed);
                data.fill(0);
                load(&mut data)?;
            }
            let mut shard = self.shard(page).write();
            if !shard.pages.contains_key(&page) {
                if epoch != Some(shard.epoch) {
                    continue;
                }
                self.make_room(&mut shard);
                self.budget.used.fetch_add(self.page_size, Ordering::Relaxed);
                let fresh =
                    Page { data, dirty: false, in_flight: false, used: AtomicBool::new(true) };
                shard.pages.insert(page, fresh);
            }
            let Some(p) = shard.pages.get_mut(&page) else { unreachable!("inserted above") };
            let (result, now_dirty) = use_page(p);
            if now_dirty {
                self.mark_dirty(&mut shard, page);
            }
            return Ok(result);
        }
    }

    /// Evicts clean pages of this shard while the budget is exceeded, oldest unused first as far as
    /// the second-chance bits tell.
    fn make_room(&self, shard: &mut Shard) {
        let excess =
            |cache: &Self| cache.budget.used() + cache.page_size > cache.budget.limit.max(1);
        if !excess(self) {
            return;
        }
        // Two rounds: the first takes away second chances, the second finds them gone.
        for _ in 0..2 {
            let mut evicted = 0;
            shard.pages.retain(|_, p| {
                // A burst at a time: a full scan per miss would make misses linear.
                let evictable = !p.dirty && !p.in_flight;
                if evictable && evicted < 64 && !p.used.swap(false, Ordering::Relaxed) {
                    evicted += 1;
                    return false;
                }
                true
            });
            if evicted > 0 {
                shard.epoch += 1;
                self.budget.used.fetch_sub(evicted * self.page_size, Ordering::Relaxed);
                return;
            }
        }
    }

    /// Number of dirty pages.
    pub fn dirty_pages(&self) -> usize {
        self.dirty.load(Ordering::Relaxed)
    }

    /// Bytes of dirty pages.
    pub fn dirty_bytes(&self) -> usize {
        self.dirty_pages() * self.page_size
    }

    /// Copies all dirty pages, in order of their numbers, and counts them as in flight. The caller
    /// writes them and calls [`Self::retire`], or [`Self::restore`] if that failed.
    pub fn snapshot(&self) -> Vec<PageImage> {
        let mut images = Vec::new();
        if self.dirty_pages() == 0 {
            return images;
        }
        for shard in &self.shards {
            let mut shard = shard.write();
            for (&number, page) in &mut shard.pages {
                if page.dirty {
                    page.dirty = false;
                    page.in_flight = true;
                    self.dirty.fetch_sub(1, Ordering::Relaxed);
                    images.push((number, page.data.clone()));
                }
            }
        }
        images.sort_unstable_by_key(|(number, _)| *number);
        images
    }

    /// The pages' contents are where a load finds them: they may be evicted again.
    pub fn retire(&self, images: &[PageImage]) {
        for (number, _) in images {
            if let Some(page) = self.shard(*number).write().pages.get_mut(number) {
                page.in_flight = false;
            }
        }
    }

    /// Writing the pages failed: they are dirty again.
    pub fn restore(&self, images: &[PageImage]) {
        for (number, _) in images {
            let mut shard = self.shard(*number).write();
            if let Some(page) = shard.pages.get_mut(number) {
                page.in_flight = false;
            }
            self.mark_dirty(&mut shard, *number);
        }
    }

    /// The figures so far.
    pub fn stats(&self) -> CacheStats {
        CacheStats {
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            pages: self.shards.iter().map(|s| s.read().pages.len() as u64).sum(),
            dirty: self.dirty_pages() as u64,
        }
    }
}

impl Drop for TableCache {
    fn drop(&mut self) {
        let pages: usize = self.shards.iter_mut().map(|s| s.get_mut().pages.len()).sum();
        self.budget.used.fetch_sub(pages * self.page_size, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    fn numbered(page: u64) -> impl FnMut(&mut [u8]) -> Result<()> {
        move |buf| {
            buf[0] = page as u8;
            Ok(())
        }
    }

    #[test]
    fn clean_pages_leave_when_the_budget_is_spent_and_dirty_ones_stay() {
        let budget = CacheBudget::new(4096 * 8);
        let cache = TableCache::new(4096, &budget);
        cache.update(7, numbered(7), |p| p[1] = 9).unwrap();
        for page in 0..1000 {
            assert_eq!(cache.read(page, numbered(page), |p| p[0]).unwrap(), page as u8);
        }
        assert!(cache.stats().pages <= 8 + SHARDS as u64, "{:?}", cache.stats());
        let value = cache.read(7, |_| Err(Error::corrupt("loaded")), |p| p[1]).unwrap();
        assert_eq!(value, 9);
        drop(cache);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn a_page_changed_while_in_flight_is_dirty_again() {
        let cache = TableCache::new(512, &CacheBudget::new(1 << 20));
        cache.update(1, numbered(1), |p| p[1] = 1).unwrap();
        let images = cache.snapshot();
        assert_eq!((images.len(), images[0].1[1], cache.dirty_pages()), (1, 1, 0));
        cache.update(1, numbered(1), |p| p[1] = 2).unwrap();
        cache.retire(&images);
        assert_eq!((cache.dirty_pages(), cache.snapshot()[0].1[1]), (1, 2));
    }

    #[test]
    fn a_failed_load_leaves_nothing_behind() {
        let cache = TableCache::new(512, &CacheBudget::new(1 << 20));
        assert!(cache.read(1, |_| Err(Error::corrupt("x")), |_| ()).is_err());
        assert_eq!(cache.read(1, numbered(1), |p| p[0]).unwrap(), 1);
    }

    #[test]
    fn a_page_loaded_before_a_change_does_not_hide_it() {
        let cache = TableCache::new(512, &CacheBudget::new(1 << 20));
        let mut first = true;
        let load = |buf: &mut [u8]| {
            if std::mem::take(&mut first) {
                // Meanwhile another thread changes the page.
                cache.update(1, numbered(1), |p| p[1] = 5)?;
            }
            buf[0] = 1;
            Ok(())
        };
        assert_eq!(cache.read(1, load, |p| p[1]).unwrap(), 5);
    }
}
