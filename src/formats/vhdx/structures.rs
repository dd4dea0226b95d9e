//! Every structure of a VHDX file, as `info --structures` lists them: file identifier, headers, log
//! entries, region tables, metadata, parent locator and BAT, all as they lie in the file, whether the
//! log says otherwise or not.

use std::collections::BTreeMap;

use uuid::Uuid;
use zerocopy::FromBytes;

use super::bat::{self, BatLayout, ENTRY_BYTES, Slot, State};
use super::layout::{
    BAT_REGION, BLOCK_SIZES, CREATOR_BYTES, FILE_PARAMETERS, FILE_SIGNATURE, HEADER_BYTES,
    HEADER_OFFSETS, LOG_SECTOR, LOGICAL_SECTOR_SIZE, MAX_DISK, MAX_LOG, MAX_TABLE_ENTRIES,
    METADATA_REGION, MIB, PARENT_LOCATOR, PHYSICAL_SECTOR_SIZE, REGION_TABLE_OFFSETS, RawEntry,
    RawFileParameters, RawHeader, RawItem, RawMetadataTable, RawRegion, RawRegionTable,
    TABLE_BYTES, VIRTUAL_DISK_ID, VIRTUAL_DISK_SIZE, sealed,
};
use super::locator::Locator;
use super::log::LogPlace;
use super::log::entry::{self, Update};
use super::metadata::Item;
use super::regions::Region;
use crate::codec::{guid, utf16};
use crate::error::{Error, Result};
use crate::formats::structures::{Listing, Spread, Structure, hex, read, read_vec, text};
use crate::storage::Storage;

/// Places of one log entry that are told.
const PLACES: usize = 16;

/// Lists them.
pub(super) fn list(file: &dyn Storage, list: &mut Listing) -> Result<()> {
    let len = file.len().map_err(|e| Error::io("read", &e).in_file(file.path()))?;
    list.add(identifier(file));
    let headers = [0, 1].map(|slot| header(file, slot, list));
    let current =
        headers.iter().flatten().max_by_key(|(sealed, raw)| (*sealed, raw.sequence.get()));
    let tables = [0, 1].map(|copy| region_table(file, copy, list));
    let regions = tables.iter().flatten().max_by_key(|(sealed, _)| *sealed);
    let place = |id: Uuid| regions.and_then(|(_, all)| all.iter().find(|r| r.guid == id)).cloned();
    let items = match place(METADATA_REGION) {
        Some(region) => metadata(file, &region, list),
        None => BTreeMap::new(),
    };
    if let Some(region) = place(BAT_REGION) {
        list.add(table(file, &region, &items, len));
    }
    if let Some((_, header)) = current {
        log(file, header, len, list);
    }
    Ok(())
}

fn identifier(file: &dyn Storage) -> Structure {
    const NAME: &str = "file type identifier";
    match read::<{ 8 + CREATOR_BYTES }>(file, 0) {
        Ok(bytes) if bytes[..8] == FILE_SIGNATURE => Structure::new(NAME, 0, bytes.len() as u64)
            .field("signature", text(&bytes[..8]))
            .field("creator", utf16(&bytes[8..], false)),
        Ok(bytes) => unsigned(Structure::new(NAME, 0, bytes.len() as u64), &bytes[..8]),
        Err(why) => Structure::absent(NAME, 0, 8 + CREATOR_BYTES as u64, why),
    }
}

/// A structure that begins with something else than its signature: none of its values mean anything.
fn unsigned(structure: Structure, found: &[u8]) -> Structure {
    structure.without_signature().field("signature", hex(found))
}

/// Lists a header; whether its checksum is right, and its values, if it is there.
fn header(file: &dyn Storage, slot: usize, list: &mut Listing) -> Option<(bool, RawHeader)> {
    let (name, at) = (format!("header {}", slot + 1), HEADER_OFFSETS[slot]);
    let bytes = match read::<HEADER_BYTES>(file, at) {
        Ok(bytes) => bytes,
        Err(why) => {
            list.add(Structure::absent(name, at, HEADER_BYTES as u64, why));
            return None;
        }
    };
    let raw = RawHeader::read_from_bytes(&bytes).ok()?;
    let structure = Structure::new(name, at, HEADER_BYTES as u64);
    if raw.signature != RawHeader::SIGNATURE {
        list.add(unsigned(structure, &raw.signature));
        return None;
    }
    let valid = sealed(&bytes);
    list.add(
        structure
            .sealed(valid)
            .field("signature", text(&raw.signature))
            .field("checksum", raw.checksum.get())
            .field("sequence_number", raw.sequence.get())
            .field("file_write_guid", guid(&raw.file_write_guid).to_string())
            .field("data_write_guid", guid(&raw.data_write_guid).to_string())
            .field("log_guid", guid(&raw.log_guid).to_string())
            .field("log_version", raw.log_version.get())
            .field("version", raw.version.get())
            .field("log_length", raw.log_length.get())
            .field("log_offset", raw.log_offset.get()),
    );
    Some((valid, raw))
}

/// Lists a copy of the region table and its entries; whether its checksum is right, and the entries.
fn region_table(
    file: &dyn Storage,
    copy: usize,
    list: &mut Listing,
) -> Option<(bool, Vec<Region>)> {
    let (name, at) = (format!("region table {}", copy + 1), REGION_TABLE_OFFSETS[copy]);
    let bytes = match read_vec(file, at, TABLE_BYTES) {
        Ok(bytes) => bytes,
        Err(why) => {
            list.add(Structure::absent(name, at, TABLE_BYTES as u64, why));
            return None;
        }
    };
    let (raw, rest) = RawRegionTable::read_from_prefix(&bytes).ok()?;
    let structure = Structure::new(&name, at, TABLE_BYTES as u64);
    if raw.signature != RawRegionTable::SIGNATURE {
        list.add(unsigned(structure, &raw.signature));
        return None;
    }
    let valid = sealed(&bytes);
    list.add(
        structure
            .sealed(valid)
            .field("signature", text(&raw.signature))
            .field("checksum", raw.checksum.get())
            .field("entry_count", raw.entries.get()),
    );
    let mut regions = Vec::new();
    let count = raw.entries.get().min(MAX_TABLE_ENTRIES) as usize;
    let size = size_of::<RawRegion>();
    for (index, entry) in rest.chunks_exact(size).take(count).enumerate() {
        let raw = RawRegion::read_from_bytes(entry).ok()?;
        let region = Region {
            guid: guid(&raw.guid),
            offset: raw.offset.get(),
            length: raw.length.get().into(),
            required: raw.required.get() & 1 != 0,
        };
        let what = match region.guid {
            BAT_REGION => "BAT",
            METADATA_REGION => "metadata",
            _ => "unknown",
        };
        let at = at + (size_of::<RawRegionTable>() + index * size) as u64;
        list.add(
            Structure::new(format!("{name} entry {}", index + 1), at, size as u64)
                .field("guid", region.guid.to_string())
                .field("region", what)
                .field("file_offset", region.offset)
                .field("length", region.length)
                .field("required", raw.required.get()),
        );
        regions.push(region);
    }
    Some((valid, regions))
}

/// Lists the metadata table and its items; the bytes of those that the format knows.
fn metadata(file: &dyn Storage, region: &Region, list: &mut Listing) -> BTreeMap<Uuid, Vec<u8>> {
    const NAME: &str = "metadata table";
    let mut known = BTreeMap::new();
    let at = region.offset;
    let bytes = match read_vec(file, at, TABLE_BYTES) {
        Ok(bytes) => bytes,
        Err(why) => {
            list.add(Structure::absent(NAME, at, TABLE_BYTES as u64, why));
            return known;
        }
    };
    let Ok((raw, rest)) = RawMetadataTable::read_from_prefix(&bytes) else { return known };
    let structure = Structure::new(NAME, at, TABLE_BYTES as u64);
    if raw.signature != RawMetadataTable::SIGNATURE {
        list.add(unsigned(structure, &raw.signature));
        return known;
    }
    let signature = text(&raw.signature);
    let count = raw.entries.get();
    list.add(structure.field("signature", signature).field("entry_count", count));
    let count = usize::from(count).min(MAX_TABLE_ENTRIES as usize);
    for entry in rest.chunks_exact(size_of::<RawItem>()).take(count) {
        let Ok(raw) = RawItem::read_from_bytes(entry) else { return known };
        let item = Item {
            guid: guid(&raw.guid),
            offset: raw.offset.get(),
            length: raw.length.get(),
            flags: raw.flags.get(),
        };
        let (structure, value) = metadata_item(file, region, &item);
        list.add(structure);
        if item.flags & RawItem::IS_USER == 0
            && let Some(value) = value
        {
            known.entry(item.guid).or_insert(value);
        }
    }
    known
}

/// A metadata item, and its bytes.
fn metadata_item(file: &dyn Storage, region: &Region, item: &Item) -> (Structure, Option<Vec<u8>>) {
    let at = region.offset.saturating_add(item.offset.into());
    let name = match item.guid {
        PARENT_LOCATOR => "parent locator".to_owned(),
        _ => format!("metadata item {}", item.name()),
    };
    let structure = Structure::new(name, at, item.length.into())
        .field("guid", item.guid.to_string())
        .field("offset", item.offset)
        .field("length", item.length)
        .field("flags", item.flags);
    if u64::from(item.length) > MIB {
        return (structure.problem("no item is that long"), None);
    }
    let value = match read_vec(file, at, item.length as usize) {
        Ok(value) => value,
        Err(why) => return (Structure { found: false, ..structure.problem(why) }, None),
    };
    (with_value(structure, item.guid, &value), Some(value))
}

fn with_value(structure: Structure, id: Uuid, value: &[u8]) -> Structure {
    let number = |bytes: &[u8]| {
        let mut wide = [0; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(wide)
    };
    match (id, value.len()) {
        (FILE_PARAMETERS, 8) => structure
            .field("block_size", number(&value[..4]))
            .field("file_flags", number(&value[4..])),
        (VIRTUAL_DISK_SIZE, 8) | (LOGICAL_SECTOR_SIZE | PHYSICAL_SECTOR_SIZE, 4) => {
            structure.field("value", number(value))
        }
        (VIRTUAL_DISK_ID, 16) => {
            let id = value.first_chunk().map(|id| guid(id).to_string());
            structure.field("value", id)
        }
        (PARENT_LOCATOR, _) => match Locator::decode(value) {
            Ok(Locator(keys)) => keys
                .into_iter()
                .fold(structure, |structure, (key, value)| structure.field(key, value)),
            Err(e) => structure.field("value", hex(value)).problem(e.what()),
        },
        _ => structure.field("value", hex(value)),
    }
}

/// How the BAT is divided, where the metadata says enough.
fn bat_layout(items: &BTreeMap<Uuid, Vec<u8>>) -> Option<BatLayout> {
    let word = |id: Uuid| items.get(&id)?.first_chunk().map(|b| u32::from_le_bytes(*b));
    let size = u64::from_le_bytes(*items.get(&VIRTUAL_DISK_SIZE)?.first_chunk()?);
    let block = u64::from(word(FILE_PARAMETERS)?);
    let sector = word(LOGICAL_SECTOR_SIZE)?;
    let flags = u32::from_le_bytes(*items.get(&FILE_PARAMETERS)?.get(4..)?.first_chunk()?);
    let possible = (1..=MAX_DISK).contains(&size)
        && block.is_power_of_two()
        && BLOCK_SIZES.contains(&block)
        && [512, 4096].contains(&sector);
    let child = flags & RawFileParameters::HAS_PARENT != 0;
    possible.then(|| BatLayout::new(size, block, sector, child))
}

/// Counts of what the BAT says.
fn table(
    file: &dyn Storage,
    region: &Region,
    items: &BTreeMap<Uuid, Vec<u8>>,
    len: u64,
) -> Structure {
    const NAME: &str = "BAT";
    let at = region.offset;
    if at >= len {
        return Structure::absent(NAME, at, region.length, "it lies past the end of the file");
    }
    let known = bat_layout(items);
    // Without metadata all of the region's entries count, as those of blocks.
    let entries = region.length / ENTRY_BYTES;
    let layout = known.unwrap_or(BatLayout {
        block_size: MIB,
        chunk_ratio: u64::MAX - 1,
        blocks: entries,
        chunks: 1,
        entries,
    });
    let mut states: BTreeMap<&str, u64> = BTreeMap::new();
    let (mut places, mut past_end, mut bitmaps, mut stray) = (Spread::default(), 0u64, 0u64, 0u64);
    let scanned = bat::scan(file, region, &layout, |_, slot, entry| {
        let stored = matches!(entry.state(), State::Present | State::Partial);
        if stored {
            places.add(entry.offset());
            past_end += u64::from(entry.offset() >= len);
        }
        match slot {
            Slot::Block(_) => *states.entry(state_name(entry.state())).or_default() += 1,
            Slot::Bitmap(_) => bitmaps += u64::from(stored),
            Slot::Unused => stray += 1,
        }
    });
    let listed: u64 = states.values().sum();
    let mut structure = Structure::new(NAME, at, region.length)
        .field("entries", layout.entries)
        .field("blocks", layout.blocks);
    for (name, count) in states {
        structure = structure.field(name, count);
    }
    structure = structure
        .field("zero_entries_of_blocks", layout.blocks.saturating_sub(listed))
        .field("sector_bitmap_blocks", bitmaps)
        .field("entries_of_nothing", stray)
        .field("lowest_offset", places.lowest())
        .field("highest_offset", places.highest())
        .field("entries_past_the_end", past_end);
    let present = region.entries(len);
    match scanned {
        Err(e) => structure.problem(e.what()),
        Ok(()) if present < layout.entries.min(entries) => {
            structure.problem(format!("the end of the file cuts it off after {present} entries"))
        }
        Ok(()) if known.is_none() => {
            structure.problem("the metadata does not tell its blocks from its bitmaps")
        }
        Ok(()) => structure,
    }
}

fn state_name(state: State) -> &'static str {
    match state {
        State::NotPresent => "not_present_with_offset",
        State::Undefined => "undefined",
        State::Zero => "zero",
        State::Unmapped => "unmapped",
        State::Present => "fully_present",
        State::Partial => "partially_present",
        State::Invalid => "invalid",
    }
}

/// Lists every entry of the log, those of earlier sessions too, in the order in which they lie.
fn log(file: &dyn Storage, header: &RawHeader, len: u64, list: &mut Listing) {
    let (at, length) = (header.log_offset.get(), u64::from(header.log_length.get()));
    let own = guid(&header.log_guid);
    let mut structure = Structure::new("log", at, length).field("dirty", !own.is_nil());
    if length < LOG_SECTOR || length > MAX_LOG.into() || at >= len {
        structure.found = false;
        list.add(structure.problem("it has no valid place"));
        return;
    }
    list.add(structure);
    let mut position = 0;
    while position < length && !list.full() {
        let Ok(sector) = read::<{ size_of::<RawEntry>() }>(file, at + position) else { break };
        let mut next = position + LOG_SECTOR;
        if let Ok(raw) = RawEntry::read_from_bytes(&sector)
            && raw.signature == RawEntry::SIGNATURE
        {
            let place = LogPlace { offset: at, length, guid: guid(&raw.log_guid) };
            let (structure, valid) = log_entry(file, &place, position, &raw, own);
            list.add(structure);
            if valid {
                next = position + u64::from(raw.length.get()).max(LOG_SECTOR);
            }
        }
        position = next;
    }
    list.truncated |= position < length && list.full();
}

/// One entry, and whether it is valid.
fn log_entry(
    file: &dyn Storage,
    place: &LogPlace,
    position: u64,
    raw: &RawEntry,
    own: Uuid,
) -> (Structure, bool) {
    let mut places = Vec::new();
    let decoded = entry::decode(file, place, position, |update| {
        if places.len() < PLACES {
            places.push(match update {
                Update::Sector { at, .. } => serde_json::json!({ "sector": at }),
                Update::Zero { at, len } => serde_json::json!({ "zeroes": at, "length": len }),
            });
        }
    });
    let valid = matches!(decoded, Ok(Some(_)));
    let structure = Structure::new("log entry", place.position(position), raw.length.get().into())
        .sealed(valid)
        .field("signature", text(&raw.signature))
        .field("checksum", raw.checksum.get())
        .field("entry_length", raw.length.get())
        .field("tail", raw.tail.get())
        .field("sequence_number", raw.sequence.get())
        .field("descriptor_count", raw.descriptors.get())
        .field("log_guid", place.guid.to_string())
        .field("flushed_file_offset", raw.flushed_file_offset.get())
        .field("last_file_offset", raw.last_file_offset.get())
        .field("of_this_session", place.guid == own && !own.is_nil())
        .field("first_descriptors", places);
    match decoded {
        Err(e) => (structure.problem(e.what()), valid),
        Ok(_) => (structure, valid),
    }
}
