//! Giving a child another parent, another identity of the same one, or none.

use std::sync::Arc;

use uuid::Uuid;

use super::create::parent_locator;
use super::layout::{
    FILE_PARAMETERS, LOG_SECTOR, PARENT_LOCATOR, RawFileParameters, RawItem, RawMetadataTable,
    TABLE_BYTES,
};
use super::logged::Pages;
use super::metadata::Item;
use super::open::Parts;
use crate::codec::read_array;
use crate::disk::map::BlockMap;
use crate::error::{Error, Result};
use crate::formats::{Identity, NewLink, OpenContext};
use crate::storage::Storage;

/// Points the child in `file` at another parent.
pub(super) fn relink(file: Arc<dyn Storage>, ctx: &OpenContext, link: &NewLink<'_>) -> Result<()> {
    let Identity::VhdxDataWrite(accepted) = link.identity else {
        return Err(Error::invalid("the parent of a VHDX must be a VHDX"));
    };
    let parts = child_parts(file.clone())?;
    let mut locator = parent_locator(file.path(), link.parent, accepted)?;
    if let Some(Ok(old)) = &parts.metadata.locator {
        locator.inherit_places(old);
    }
    let locator = locator.encode()?;
    let region = parts.regions.metadata.clone();
    let items = parts.metadata.items.clone();
    let own = parts.headers.header().data_write;
    let blocks = parts.into_blocks(&ctx.budget, Some(own));
    blocks.begin_session()?;

    // Behind all other items. Overwriting the old locator is safe: the log has all of it.
    let others = items.iter().filter(|item| !is_locator(item));
    let used = others.map(|item| u64::from(item.offset) + u64::from(item.length)).max();
    let offset = used.unwrap_or(0).max(TABLE_BYTES as u64).next_multiple_of(8);
    if offset + locator.len() as u64 > region.length {
        return Err(Error::invalid("the metadata region has no room for the parent's path"));
    }
    let entry = locator_entry(blocks.file(), region.offset)?;
    let mut pages = Pages::new(blocks.file());
    // Both fit 32 bits: they lie inside the region, whose length does.
    let place = [(offset as u32).to_le_bytes(), (locator.len() as u32).to_le_bytes()].concat();
    pages.put(region.offset + entry + 16, &place)?;
    pages.put(region.offset + offset, &locator)?;
    let images: Vec<_> =
        pages.into_pages().map(|(at, bytes)| (at / LOG_SECTOR, bytes.into())).collect();
    blocks.write_logged(&images)?;
    blocks.close()
}

/// Makes the child in `file` a dynamic disk. First no block is partial any more, then no sector bitmap is
/// left, both harmless in a child; then flag and locator go in one entry of the log.
pub(super) fn unlink(file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<()> {
    let parts = child_parts(file.clone())?;
    let own = parts.headers.header().data_write;
    let blocks = parts.into_blocks(&ctx.budget, Some(own));
    blocks.begin_session()?;
    blocks.leave_bitmaps()?;
    blocks.close()?;

    let parts = child_parts(file)?;
    let region = parts.regions.metadata.clone();
    let parameters = parts.metadata.items.iter().find(|item| is(item, FILE_PARAMETERS));
    let parameters = parameters.map(|item| region.offset + u64::from(item.offset));
    let blocks = parts.into_blocks(&ctx.budget, Some(own));
    blocks.begin_session()?;
    let file = blocks.file();
    let mut pages = Pages::new(file);
    if let Some(at) = parameters {
        let flags = u32::from_le_bytes(read_array(file, at + 4, "file parameters")?);
        pages.put(at + 4, &(flags & !RawFileParameters::HAS_PARENT).to_le_bytes())?;
    }
    // The last entry takes the place of the one that goes.
    let size = size_of::<RawItem>() as u64;
    let entry = region.offset + locator_entry(file, region.offset)?;
    let count = u16::from_le_bytes(read_array(file, region.offset + 10, "metadata table")?);
    let last = region.offset + size_of::<RawMetadataTable>() as u64 + (u64::from(count) - 1) * size;
    let moved: [u8; size_of::<RawItem>()] = read_array(file, last, "metadata table")?;
    pages.put(entry, &moved)?;
    pages.put(last, &[0; size_of::<RawItem>()])?;
    pages.put(region.offset + 10, &(count - 1).to_le_bytes())?;
    let images: Vec<_> =
        pages.into_pages().map(|(at, bytes)| (at / LOG_SECTOR, bytes.into())).collect();
    blocks.write_logged(&images)?;
    blocks.close()
}

/// Takes everything out of the child in `file`.
pub(super) fn empty(file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<()> {
    let parts = child_parts(file)?;
    let own = parts.headers.header().data_write;
    let blocks = parts.into_blocks(&ctx.budget, Some(own));
    blocks.begin_session()?;
    blocks.forget()?;
    blocks.flush()?;
    blocks.close()
}

/// The parts of a child that can be written.
fn child_parts(file: Arc<dyn Storage>) -> Result<Parts> {
    let parts = Parts::read(file, false)?;
    if let Some(why) = &parts.read_only {
        return Err(Error::corrupt(format!("not written: {why}")));
    }
    if !parts.metadata.has_parent {
        return Err(Error::invalid("the image is no child: it has no parent"));
    }
    Ok(parts)
}

fn is_locator(item: &Item) -> bool {
    is(item, PARENT_LOCATOR)
}

/// Whether an item is the format's own one called `id`.
fn is(item: &Item, id: Uuid) -> bool {
    item.guid == id && item.flags & RawItem::IS_USER == 0
}

/// Where in the metadata table the locator's entry is, in bytes.
fn locator_entry(file: &dyn Storage, table: u64) -> Result<u64> {
    let count = u16::from_le_bytes(read_array(file, table + 10, "metadata table")?);
    let size = size_of::<RawItem>() as u64;
    for index in 0..u64::from(count) {
        let at = size_of::<RawMetadataTable>() as u64 + index * size;
        let raw: [u8; 28] = read_array(file, table + at, "metadata table")?;
        let (id, rest) = raw.split_at(16);
        let user = u32::from(rest[8]) & RawItem::IS_USER != 0;
        if id == PARENT_LOCATOR.to_bytes_le() && !user {
            return Ok(at);
        }
    }
    Err(Error::corrupt("the disk has a parent, but no parent locator").at(table))
}
