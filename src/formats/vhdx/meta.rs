//! What the metadata says beside what the disk is, for looking at and for changing.

use std::sync::Arc;

use uuid::Uuid;

use super::layout::{LOG_SECTOR, PHYSICAL_SECTOR_SIZE, RawItem, VIRTUAL_DISK_ID};
use super::logged::Pages;
use super::metadata::Item;
use super::open::Parts;
use crate::codec::{hex, read_exact};
use crate::disk::map::BlockMap;
use crate::error::{Error, Result};
use crate::formats::OpenContext;
use crate::formats::meta::{Changes, Entry, cannot_be};
use crate::storage::Storage;

const ID: &str = "a UUID";
/// Longest user item that is shown, in bytes.
const SHOWN: u32 = 256;
/// How keys of user items begin; their GUID follows.
const USER: &str = "user.";

/// What the image in `file` says.
pub(super) fn list(file: Arc<dyn Storage>, force: bool) -> Result<Vec<Entry>> {
    let parts = Parts::read(file, force)?;
    let (metadata, header) = (&parts.metadata, parts.headers.header());
    let physical = if metadata.logical_sector == 4096 { "4096" } else { "512, 4096" };
    let mut entries = vec![
        Entry::new("virtual_disk_id", metadata.disk_id.to_string()).settable(ID),
        Entry::new("physical_sector_size", metadata.physical_sector.to_string()).settable(physical),
        Entry::new("logical_sector_size", metadata.logical_sector.to_string()),
        Entry::new("creator", parts.creator.clone()),
        Entry::new("file_write_guid", header.file_write.to_string()),
        Entry::new("data_write_guid", header.data_write.to_string()),
        Entry::new("block_size", metadata.block_size.to_string()),
        Entry::new("virtual_disk_size", metadata.size.to_string()),
    ];
    for item in metadata.items.iter().filter(|item| is_user(item)) {
        let mut value = format!("({} bytes)", item.length);
        if item.length <= SHOWN {
            let mut bytes = vec![0; item.length as usize];
            read_exact(&*parts.file, place(&parts, item), &mut bytes, "a user item")?;
            value = hex(&bytes);
        }
        let can_be = format!("{} bytes in hexadecimal", item.length);
        entries.push(Entry::new(format!("{USER}{}", item.guid), value).settable(can_be));
    }
    Ok(entries)
}

/// Changes the metadata, in one entry of the log.
pub(super) fn set(file: Arc<dyn Storage>, ctx: &OpenContext, changes: &Changes) -> Result<()> {
    let parts = Parts::read(file, false)?;
    if let Some(why) = &parts.read_only {
        return Err(Error::corrupt(format!("not written: {why}")));
    }
    let mut values = changes.values.clone();
    if changes.new_id {
        values.insert(0, ("virtual_disk_id".to_owned(), Uuid::new_v4().to_string()));
    }
    let writes: Vec<(u64, Vec<u8>)> =
        values.iter().map(|(key, value)| put(&parts, key, value)).collect::<Result<_>>()?;
    // A copy that is another disk holds other contents as soon as it is written.
    let own = (!changes.new_id).then(|| parts.headers.header().data_write);
    let blocks = parts.into_blocks(&ctx.budget, own);
    blocks.begin_session()?;
    let mut pages = Pages::new(blocks.file());
    writes.iter().try_for_each(|(at, bytes)| pages.put(*at, bytes))?;
    let images: Vec<_> =
        pages.into_pages().map(|(at, bytes)| (at / LOG_SECTOR, bytes.into())).collect();
    blocks.write_logged(&images)?;
    blocks.close()
}

fn is_user(item: &Item) -> bool {
    item.flags & RawItem::IS_USER != 0
}

/// Where an item is in the file.
fn place(parts: &Parts, item: &Item) -> u64 {
    parts.regions.metadata.offset + u64::from(item.offset)
}

/// Where in the file a key's value is, and its bytes.
fn put(parts: &Parts, key: &str, value: &str) -> Result<(u64, Vec<u8>)> {
    let items = &parts.metadata.items;
    let unknown = || Error::invalid(format!("there is no key `{key}`"));
    let own = |id| items.iter().find(|item| item.guid == id && !is_user(item)).ok_or_else(unknown);
    let key_lower = key.to_ascii_lowercase();
    if key_lower == "virtual_disk_id" {
        let id = Uuid::try_parse(value).map_err(|_| cannot_be(key, value, ID))?;
        return Ok((place(parts, own(VIRTUAL_DISK_ID)?), id.to_bytes_le().to_vec()));
    }
    if key_lower == "physical_sector_size" {
        let size = value.parse().ok().filter(|size| [512, 4096].contains(size));
        let size: Option<u32> = size.filter(|size| *size >= parts.metadata.logical_sector);
        let size =
            size.ok_or_else(|| cannot_be(key, value, "512 or 4096, not below the logical"))?;
        return Ok((place(parts, own(PHYSICAL_SECTOR_SIZE)?), size.to_le_bytes().to_vec()));
    }
    let id = key_lower.strip_prefix(USER).and_then(|id| Uuid::try_parse(id).ok());
    let item = id.and_then(|id| items.iter().find(|item| item.guid == id && is_user(item)));
    let item = item.ok_or_else(unknown)?;
    let digits = value.as_bytes();
    let pairs = digits.chunks(2).map(|pair| {
        let pair =
            std::str::from_utf8(pair).ok().filter(|p| p.bytes().all(|b| b.is_ascii_hexdigit()));
        pair.and_then(|pair| u8::from_str_radix(pair, 16).ok())
    });
    let bytes: Option<Vec<u8>> = pairs.collect();
    let fits = |bytes: &Vec<u8>| digits.len() == 2 * item.length as usize && !bytes.is_empty();
    match bytes.filter(fits) {
        Some(bytes) => Ok((place(parts, item), bytes)),
        None => Err(cannot_be(key, value, &format!("{} bytes in hexadecimal", item.length))),
    }
}
