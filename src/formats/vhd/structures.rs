//! Every structure of a VHD file, as `info --structures` lists them: footer, its copy, dynamic header,
//! parent locators, BAT, and the batmap of Xen's tools.

use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::batmap;
use super::layout::{
    BATMAP_COOKIE, BatmapHeader, DiskType, DynamicHeader, FOOTER, FOOTER_COOKIE, Footer, HEADER,
    HEADER_COOKIE, POISON_COOKIE, ParentLocator, SECTOR, SHORT_FOOTER, UNUSED, bitmap_size,
    table_size,
};
use super::locators;
use crate::codec;
use crate::error::{Error, Result};
use crate::formats::end_of_data;
use crate::formats::structures::{
    Listing, Spread, Structure, each_entry, hex, read, read_vec, text,
};
use crate::storage::Storage;

/// How far before its end a file is searched for a footer that lost its place, in bytes.
const SEARCH: u64 = 64 << 10;
/// Most bytes of a batmap that are summed.
const MAX_BATMAP: u64 = 64 << 20;

/// Lists them.
pub(super) fn list(file: &dyn Storage, list: &mut Listing) -> Result<()> {
    let len = file.len().map_err(|e| Error::io("read", &e).in_file(file.path()))?;
    let (copy, head) = footer("footer copy", file, 0, FOOTER);
    let (trailing, end) = trailing(file, len)?;
    let counts = [&end, &head].into_iter().flatten().find(|footer| footer.checksum_matches());
    let Some(footer) = counts.or(end.as_ref()).or(head.as_ref()).copied() else {
        list.add(copy);
        list.add(trailing);
        header(file, FOOTER, len, None, list);
        return Ok(());
    };
    let fixed = footer.disk_type() == Some(DiskType::Fixed);
    if !fixed {
        list.add(copy);
        header(file, footer.data_offset.get(), len, Some(&footer), list);
    }
    list.add(trailing);
    Ok(())
}

/// The footer at the end of the file, or what is nearest to one.
fn trailing(file: &dyn Storage, len: u64) -> Result<(Structure, Option<Footer>)> {
    for size in [FOOTER, SHORT_FOOTER] {
        let Some(at) = len.checked_sub(size) else { continue };
        let (structure, found) = footer("footer", file, at, size);
        if found.is_some() {
            return Ok((structure, found));
        }
    }
    let end = end_of_data(file, len)?.min(len);
    let from = end.saturating_sub(SEARCH);
    let searched = read_vec(file, from, (end - from) as usize).unwrap_or_default();
    let at = searched.windows(FOOTER_COOKIE.len()).rposition(|bytes| bytes == FOOTER_COOKIE);
    if let Some(at) = at.map(|at| from + at as u64)
        && at > 0
        && let (structure, Some(found)) = footer("footer", file, at, FOOTER.min(len - at))
    {
        let structure = structure.problem("it is not the last thing in the file");
        return Ok((structure, Some(found)));
    }
    Ok(footer("footer", file, len.saturating_sub(FOOTER), FOOTER))
}

/// The `size` bytes at `at` as a footer; `None` besides without its cookie.
fn footer(name: &str, file: &dyn Storage, at: u64, size: u64) -> (Structure, Option<Footer>) {
    let mut bytes = [0; FOOTER as usize];
    let read = codec::read_exact(file, at, &mut bytes[..size as usize], "it");
    if let Err(e) = read {
        return (Structure::absent(name, at, size, e.what()), None);
    }
    let mut footer = Footer::new_zeroed();
    footer.as_mut_bytes().copy_from_slice(&bytes);
    let chs = [footer.cylinders.get(), footer.heads.into(), footer.sectors_per_track.into()];
    let structure = Structure::new(name, at, size)
        .sealed(footer.checksum_matches())
        .field("cookie", text(&footer.cookie))
        .field("features", footer.features.get())
        .field("format_version", footer.format_version.get())
        .field("data_offset", footer.data_offset.get())
        .field("timestamp", footer.timestamp.get())
        .field("creator_application", text(&footer.creator_application))
        .field("creator_version", footer.creator_version.get())
        .field("creator_host_os", text(&footer.creator_host_os))
        .field("original_size", footer.original_size.get())
        .field("current_size", footer.current_size.get())
        .field("geometry", chs.to_vec())
        .field("disk_type", footer.disk_type.get())
        .field("checksum", footer.checksum.get())
        .field("unique_id", uuid::Uuid::from_bytes(footer.unique_id).to_string())
        .field("saved_state", footer.saved_state)
        .field("hidden", footer.hidden);
    match footer.cookie {
        FOOTER_COOKIE => (structure, Some(footer)),
        POISON_COOKIE => (structure.problem("the image was disabled by Xen's tools"), None),
        cookie => {
            let absent = Structure { fields: Vec::new(), ..structure }.without_signature();
            let absent = Structure { checksum: Structure::new("", 0, 0).checksum, ..absent };
            (absent.field("cookie", hex(&cookie)), None)
        }
    }
}

/// The dynamic header and all that it leads to.
fn header(file: &dyn Storage, at: u64, len: u64, footer: Option<&Footer>, list: &mut Listing) {
    const NAME: &str = "dynamic header";
    let header = match read::<{ HEADER as usize }>(file, at) {
        Ok(bytes) => bytes,
        Err(why) => {
            list.add(Structure::absent(NAME, at, HEADER, why));
            return;
        }
    };
    let Ok(header) = DynamicHeader::read_from_bytes(&header) else { return };
    if header.cookie != HEADER_COOKIE {
        let absent = Structure::new(NAME, at, HEADER).without_signature();
        list.add(absent.field("cookie", hex(&header.cookie)));
        return;
    }
    let structure = Structure::new(NAME, at, HEADER)
        .sealed(header.checksum_matches())
        .field("cookie", text(&header.cookie))
        .field("data_offset", header.data_offset.get())
        .field("table_offset", header.table_offset.get())
        .field("header_version", header.header_version.get())
        .field("max_table_entries", header.max_table_entries.get())
        .field("block_size", header.block_size.get())
        .field("checksum", header.checksum.get())
        .field("parent_unique_id", uuid::Uuid::from_bytes(header.parent_unique_id).to_string())
        .field("parent_timestamp", header.parent_timestamp.get())
        .field("parent_unicode_name", codec::utf16(&header.parent_unicode_name, true));
    list.add(structure);
    for (index, entry) in header.parent_locators.iter().enumerate() {
        if entry.platform_code != [0; 4] {
            list.add(locator(file, at, index, entry));
        }
    }
    list.add(bat(file, &header, len));
    if footer.is_some_and(|footer| footer.creator_is(b"tap")) {
        list.add(batmap(file, &header, footer));
    }
}

fn locator(file: &dyn Storage, header_at: u64, index: usize, entry: &ParentLocator) -> Structure {
    let at = header_at + (HEADER - 256 - 8 * 24) + index as u64 * 24;
    let data_at = entry.data_offset.get();
    let structure = Structure::new(format!("parent locator {}", index + 1), at, 24)
        .field("platform_code", text(&entry.platform_code))
        .field("data_space", entry.data_space.get())
        .field("data_length", entry.data_length.get())
        .field("data_offset", data_at);
    if entry.data_length.get() > locators::MAX_DATA {
        return structure.problem("no path is that long");
    }
    match read_vec(file, data_at, entry.data_length.get() as usize) {
        Ok(data) => structure.field("text", locators::decode(entry.platform_code, &data)),
        Err(why) => structure.problem(format!("of its data, {why}")),
    }
}

/// Counts of what the BAT says. Blocks that end behind the file are stored in part, or not at all.
fn bat(file: &dyn Storage, header: &DynamicHeader, len: u64) -> Structure {
    let (at, entries) = (header.table_offset.get(), u64::from(header.max_table_entries.get()));
    let block = u64::from(header.block_size.get());
    let block = bitmap_size(block) + block;
    let (mut stored, mut cut) = (Spread::default(), 0u64);
    let counted = each_entry(file, at, entries, |_, bytes: [u8; 4]| {
        let sector = u32::from_be_bytes(bytes);
        if sector != UNUSED {
            stored.add(sector.into());
            cut += u64::from(u64::from(sector) * SECTOR + block > len);
        }
    });
    let length = table_size(entries);
    let present = match counted {
        Ok(0) if entries > 0 => {
            return Structure::absent("BAT", at, length, "it lies past the end of the file");
        }
        Ok(present) => present,
        Err(why) => return Structure::absent("BAT", at, length, why),
    };
    let structure = Structure::new("BAT", at, length)
        .field("entries", entries)
        .field("stored_blocks", stored.count)
        .field("unused", present - stored.count)
        .field("lowest_sector", stored.lowest())
        .field("highest_sector", stored.highest())
        .field("blocks_past_the_end", cut);
    match present < entries {
        true => {
            structure.problem(format!("the end of the file cuts it off after {present} entries"))
        }
        false => structure,
    }
}

fn batmap(file: &dyn Storage, header: &DynamicHeader, footer: Option<&Footer>) -> Structure {
    const NAME: &str = "batmap";
    let table = table_size(header.max_table_entries.get().into());
    let at = header.table_offset.get().saturating_add(table);
    let map = match read::<{ SECTOR as usize }>(file, at) {
        Ok(bytes) => bytes,
        Err(why) => return Structure::absent(NAME, at, SECTOR, why),
    };
    let map = BatmapHeader::read_from_bytes(&map);
    let Some(map) = map.ok().filter(|map| map.cookie == BATMAP_COOKIE) else {
        return Structure::new(NAME, at, SECTOR).without_signature();
    };
    let map_len = u64::from(map.map_sectors.get()) * SECTOR;
    let size = footer.map_or(0, |footer| footer.current_size.get());
    let structure = Structure::new(NAME, at, SECTOR)
        .field("cookie", text(&map.cookie))
        .field("map_offset", map.map_offset.get())
        .field("map_sectors", map.map_sectors.get())
        .field("version", map.version.get())
        .field("checksum", map.checksum.get());
    let summed = batmap::summed(size).min(map_len).min(MAX_BATMAP);
    match read_vec(file, map.map_offset.get(), summed as usize) {
        Ok(bytes) => {
            structure.sealed(batmap::checksum(map.version.get(), &bytes) == map.checksum.get())
        }
        Err(why) => structure.problem(format!("of its map, {why}")),
    }
}
