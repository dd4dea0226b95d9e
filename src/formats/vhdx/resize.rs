//! Another size of the disk, in place.
//!
//! # Order
//!
//! All by way of the log (see [`logged`](super::logged)); `DataWriteGuid` is new with its first header,
//! for the size is part of what a guest sees. To grow:
//!
//! 1. The entries of the BAT behind those of the disk, which mean nothing yet, are zeroed; of a fixed
//!    disk they get space at the end of the file. A BAT that has no room for all entries is copied to a
//!    region that has.
//! 2. The part of the last block behind the end of the disk is zeroed.
//! 3. One log entry changes the size, and both region tables if the BAT moves.
//! 4. After the end of the log the old place of the BAT is given back.
//!
//! To shrink, one entry changes the size; then entries that mean nothing any more are zeroed, and the
//! rest of a block in which the disk ends now; after the end of the log space is given back.
//!
//! A crash leaves the old size or the new one, and at worst space that nothing uses. Asking for the same
//! size again finishes what a crash interrupted.

use std::ops::Range;
use std::sync::Arc;

use uuid::Uuid;

use super::bat::{self, BatLayout, ENTRY_BYTES, Entry, Slot, State};
use super::layout::{
    LOG_SECTOR, MAX_DISK, MIB, REGION_TABLE_OFFSETS, RawItem, TABLE_BYTES, VIRTUAL_DISK_SIZE,
};
use super::logged::{Logged, Pages};
use super::open::{Parts, next_data_write};
use super::regions::{self, Region};
use super::settled::Settled;
use super::space::Space;
use crate::codec::{read_array, read_exact};
use crate::error::{Error, Result};
use crate::formats::OpenContext;
use crate::formats::plan::Steps;
use crate::storage::Storage;

/// Bytes of new entries in one step of a plan.
const STEP: u64 = 1 << 20;

/// Plans the change of the image in `file` to a disk of `size` bytes.
pub(super) fn resize(
    file: Arc<dyn Storage>,
    ctx: &OpenContext,
    size: u64,
    plan: &mut Steps,
) -> Result<()> {
    let Settled { parts, space } = Settled::read(&file, ctx)?;
    if size > MAX_DISK {
        let what = format!("a VHDX disk of {size} bytes is not possible");
        return Err(Error::invalid(what).hint("64 TiB at most"));
    }
    let metadata = &parts.metadata;
    let new =
        BatLayout::new(size, metadata.block_size, metadata.logical_sector, metadata.has_parent);
    let data_write = next_data_write(ctx).unwrap_or_else(Uuid::new_v4);
    let change = Change { parts: &parts, new, size, data_write };
    if size > metadata.size { change.grow(space, plan) } else { change.shrink(space, plan) }
}

struct Change<'a> {
    parts: &'a Parts,
    /// Division into blocks afterwards.
    new: BatLayout,
    size: u64,
    /// `DataWriteGuid` afterwards.
    data_write: Uuid,
}

impl Change<'_> {
    fn file(&self) -> &Arc<dyn Storage> {
        &self.parts.file
    }

    fn grow(&self, mut space: Space, plan: &mut Steps) -> Result<()> {
        let (parts, file) = (self.parts, self.file());
        let old = &parts.regions.bat;
        let mut log = Logged::begin(parts, self.data_write, space.used_end(), plan)?;
        let mut pages = self.size_pages()?;
        let mut table = old.clone();
        if self.new.entries * ENTRY_BYTES > old.length {
            table.length = self.new.region_length();
            let place = space.reserve(table.length)?;
            table.offset = place.at;
            log.extend(space.used_end(), plan);
            if !place.zeroed || place.at < parts.file_len {
                plan.punch(file, table.range(), "the BAT's new place");
            }
            copy_table(parts, old, &table, plan)?;
            pages.extend(region_pages(parts, &table));
        } else {
            self.clear_entries(plan)?;
        }
        if parts.metadata.fixed && !parts.metadata.has_parent {
            self.add_blocks(&table, &mut space, plan)?;
            log.extend(space.used_end(), plan);
        }
        self.zero_tail(parts.metadata.size, plan)?;
        log.commit(pages, "the size of the disk", plan)?;
        log.end(plan)?;
        if table != *old {
            space.release(old.range());
            self.give_back(std::iter::once(old.range()), &space, plan);
        }
        Ok(())
    }

    fn shrink(&self, mut space: Space, plan: &mut Steps) -> Result<()> {
        let parts = self.parts;
        let smaller = self.size < parts.metadata.size;
        let mut freed = Vec::new();
        let mut forgotten = Vec::new();
        // The numbers of blocks and chunks behind the end of the disk count here, too.
        let all = BatLayout { blocks: u64::MAX >> 20, chunks: u64::MAX >> 20, ..self.new };
        let stale = stale(parts, &self.new, |index, entry| {
            let len = match all.slot(index) {
                Slot::Block(_) if stored(entry) => self.new.block_size,
                Slot::Bitmap(_) if stored(entry) && parts.metadata.has_parent => MIB,
                _ => return,
            };
            let place = entry.offset()..entry.offset().saturating_add(len);
            match parts.layout.slot(index) {
                Slot::Unused => forgotten.push(place),
                _ => freed.push(place),
            }
        })?;
        if stale.is_empty() && !smaller {
            return Ok(());
        }
        let own = parts.headers.header().data_write;
        let identity = if smaller { Uuid::new_v4() } else { own };
        let mut log = Logged::begin(parts, identity, space.used_end(), plan)?;
        if smaller {
            log.commit(self.size_pages()?, "the size of the disk", plan)?;
        }
        for pages in stale.chunks(log.max_pages()) {
            let mut images = Vec::new();
            for at in pages {
                images.push((*at, page_without(parts, *at, &self.new)?));
            }
            log.commit(images, "BAT entries behind the end of the disk", plan)?;
        }
        if smaller {
            // The size is durable when the entries are logged, or else with this.
            plan.sync(self.file());
            self.zero_tail(self.size, plan)?;
        }
        log.end(plan)?;
        for range in &freed {
            space.release(range.clone());
        }
        // What a crash left behind the end of the disk may be in use for something else by now.
        freed.extend(forgotten.into_iter().filter(|range| space.is_free(range)));
        self.give_back(freed.into_iter(), &space, plan);
        Ok(())
    }

    /// The pages with the item that says the disk's size.
    fn size_pages(&self) -> Result<Vec<(u64, Vec<u8>)>> {
        let region = &self.parts.regions.metadata;
        let is_size = |item: &&super::metadata::Item| {
            item.guid == VIRTUAL_DISK_SIZE && item.flags & RawItem::IS_USER == 0
        };
        let Some(item) = self.parts.metadata.items.iter().find(is_size) else {
            return Err(Error::corrupt("the disk's size is not said").at(region.offset));
        };
        let mut pages = Pages::new(&**self.file());
        pages.put(region.offset + u64::from(item.offset), &self.size.to_le_bytes())?;
        Ok(pages.into_pages().collect())
    }

    /// Zeroes the entries of the BAT that mean nothing yet.
    fn clear_entries(&self, plan: &mut Steps) -> Result<()> {
        for at in stale(self.parts, &self.parts.layout, |_, _| ())? {
            let page = page_without(self.parts, at, &self.parts.layout)?;
            plan.write(self.file(), at, page, "BAT entries behind the end of the disk");
        }
        Ok(())
    }

    /// Gives the new blocks of a fixed disk their space and entries. Nobody looks at those before the
    /// size changes.
    fn add_blocks(&self, table: &Region, space: &mut Space, plan: &mut Steps) -> Result<()> {
        let (old, new) = (self.parts.layout.blocks, self.new.blocks);
        if new == old {
            return Ok(());
        }
        // At the end: only there everything is known to be zero.
        let from = space.used_end().max(self.parts.file_len.next_multiple_of(MIB));
        let end =
            (new - old).checked_mul(self.new.block_size).and_then(|len| from.checked_add(len));
        let end = end.filter(|end| *end <= super::layout::MAX_FILE);
        let Some(end) = end else { return Err(Error::invalid("the file would become too large")) };
        space.mark(from..end);
        let mut bytes = Vec::new();
        let mut first = self.new.block_entry(old);
        for block in old..new {
            let index = self.new.block_entry(block);
            // The slot between two chunks stays zero.
            bytes.resize(((index - first) * ENTRY_BYTES) as usize, 0);
            let at = from + (block - old) * self.new.block_size;
            bytes.extend_from_slice(&Entry::present(at).0.to_le_bytes());
            if bytes.len() as u64 >= STEP || block + 1 == new {
                let at = table.offset + first * ENTRY_BYTES;
                plan.write(
                    self.file(),
                    at,
                    std::mem::take(&mut bytes),
                    "BAT entries of new blocks",
                );
                first = index + 1;
            }
        }
        Ok(())
    }

    /// Zeroes what a stored block holds behind the end of a disk of `size` bytes.
    fn zero_tail(&self, size: u64, plan: &mut Steps) -> Result<()> {
        let (block, within) = (size / self.new.block_size, size % self.new.block_size);
        if within == 0 {
            return Ok(());
        }
        let at = self.parts.regions.bat.offset + self.new.block_entry(block) * ENTRY_BYTES;
        let entry = Entry(u64::from_le_bytes(read_array(&**self.file(), at, "BAT")?));
        if stored(entry) {
            let tail = entry.offset() + within..entry.offset() + self.new.block_size;
            plan.punch(self.file(), tail, "the part of a block behind the end of the disk");
        }
        Ok(())
    }

    /// Cuts off the end of the file that is not in use, and punches what of `freed` lies before.
    fn give_back(&self, freed: impl Iterator<Item = Range<u64>>, space: &Space, plan: &mut Steps) {
        let end = space.used_end();
        for range in freed.filter(|range| range.start < end) {
            plan.punch(self.file(), range, "space that nothing uses any more");
        }
        if end < space.file_len() {
            plan.set_len(self.file(), end, "nothing uses the end of the file");
        }
    }
}

fn stored(entry: Entry) -> bool {
    matches!(entry.state(), State::Present | State::Partial)
}

/// Both region tables, with the BAT in another place.
pub(super) fn region_pages(parts: &Parts, table: &Region) -> Vec<(u64, Vec<u8>)> {
    let mut all = parts.regions.all.clone();
    for region in all.iter_mut().filter(|region| **region == parts.regions.bat) {
        *region = table.clone();
    }
    let bytes = regions::encode(&all);
    let page = LOG_SECTOR as usize;
    let places = REGION_TABLE_OFFSETS
        .into_iter()
        .flat_map(|at| (0..TABLE_BYTES / page).map(move |index| (at, index * page)));
    places.map(|(at, skip)| (at + skip as u64, bytes[skip..skip + page].to_vec())).collect()
}

/// Copies what the BAT stores for the disk to its new place, where everything is zero.
pub(super) fn copy_table(
    parts: &Parts,
    old: &Region,
    new: &Region,
    plan: &mut Steps,
) -> Result<()> {
    let file = &parts.file;
    let end = old.offset + parts.layout.entries * ENTRY_BYTES;
    let mut at = old.offset;
    while at < end {
        let data = file
            .next_data(at)
            .map_err(|e| Error::io("looking for the BAT", &e).in_file(file.path()).at(at))?;
        let Some(data) = data.filter(|data| data.start < end) else { break };
        let part = data.start.max(at)..data.end.min(end);
        at = data.end;
        if !part.is_empty() {
            let to = new.offset + (part.start - old.offset);
            plan.copy(file, part, to, "the BAT, in its new place");
        }
    }
    for at in stale(parts, &parts.layout, |_, _| ())?.into_iter().filter(|at| *at < end) {
        let page = page_without(parts, at, &parts.layout)?;
        plan.write(file, new.offset + (at - old.offset), page, "BAT entries that mean nothing");
    }
    Ok(())
}

/// The pages of the BAT with entries that mean nothing in `layout`, by byte offset; `visit` gets those
/// entries.
fn stale(parts: &Parts, layout: &BatLayout, mut visit: impl FnMut(u64, Entry)) -> Result<Vec<u64>> {
    let region = &parts.regions.bat;
    let whole = BatLayout { entries: region.length / ENTRY_BYTES, ..*layout };
    let mut pages: Vec<u64> = Vec::new();
    bat::scan(&*parts.file, region, &whole, |index, slot, entry| {
        if slot != Slot::Unused {
            return;
        }
        visit(index, entry);
        let page = (region.offset + index * ENTRY_BYTES) / LOG_SECTOR * LOG_SECTOR;
        if pages.last() != Some(&page) {
            pages.push(page);
        }
    })?;
    Ok(pages)
}

/// A page of the BAT with zeroes for the entries that mean nothing in `layout`.
fn page_without(parts: &Parts, at: u64, layout: &BatLayout) -> Result<Vec<u8>> {
    let mut page = vec![0; LOG_SECTOR as usize];
    read_exact(&*parts.file, at, &mut page, "BAT")?;
    let first = (at - parts.regions.bat.offset) / ENTRY_BYTES;
    for index in 0..LOG_SECTOR / ENTRY_BYTES {
        if layout.slot(first + index) == Slot::Unused {
            Entry(0).put(&mut page, index);
        }
    }
    Ok(page)
}
