//! Every structure of a VMDK's files, as `info --structures` lists them: descriptor, headers, footer,
//! grain directories and tables, markers of compressed streams.
//!
//! Nothing in this format has a checksum of its own; what tells a structure is its signature. The files
//! that extent lines name are listed each with its own structures, and those that cannot be opened as not
//! there.

use std::sync::Arc;

use zerocopy::FromBytes;
use zerocopy::little_endian::U64;

use super::descriptor::{Descriptor, ExtentType, MAX_BYTES};
use super::layout::{
    FLAG_COMPRESSED, FLAG_MARKERS, GD_AT_END, MAGIC, MAGIC_COWD, MAGIC_SESPARSE, MAGIC_UNFINISHED,
    MAX_GRAIN, MAX_TABLES, RawHeader, SECTOR,
};
use super::sesparse::{ConstantHeader, VOLATILE_MAGIC, VolatileHeader};
use super::stream::{FOOTER_SEARCH, Marker, Piece, follow};
use super::{cowd, layout};
use crate::error::{Error, Result};
use crate::formats::OpenContext;
use crate::formats::structures::{
    Listing, Spread, Structure, each_entry, hex, read, read_vec, text,
};
use crate::storage::Storage;

/// Most characters of a descriptor's line that are told.
const MAX_LINE: usize = 1024;

/// Lists them.
pub(super) fn list(file: &Arc<dyn Storage>, ctx: &OpenContext, list: &mut Listing) -> Result<()> {
    let len = file.len().map_err(|e| Error::io("read", &e).in_file(file.path()))?;
    let Some(descriptor) = one_file(&**file, len, list) else { return Ok(()) };
    for line in &descriptor.extents {
        let sparse =
            matches!(line.kind, ExtentType::Sparse | ExtentType::VmfsSparse | ExtentType::SeSparse);
        let Some(name) = line.name.as_deref() else { continue };
        let itself = descriptor.extents.len() == 1 && !is_text(&**file);
        if itself || !(sparse || matches!(line.kind, ExtentType::Flat | ExtentType::Vmfs)) {
            continue;
        }
        if list.full() {
            list.truncated = true;
            break;
        }
        let what = format!("extent {name}");
        match ctx.open_extent(name) {
            Ok(extent) => {
                let len = extent.len().unwrap_or(0);
                list.file = Some(extent.path().to_owned());
                if sparse {
                    one_file(&*extent, len, list);
                } else {
                    let at = line.offset.unwrap_or(0).saturating_mul(SECTOR);
                    let all = line.sectors.saturating_mul(SECTOR);
                    let flat = Structure::new("flat extent", at, all).field("file_length", len);
                    let short = at.saturating_add(all) > len;
                    list.add(if short { flat.problem("the file is shorter") } else { flat });
                }
                list.file = None;
            }
            Err(e) => drop(list.add(Structure::absent(what, 0, 0, e.what()))),
        }
    }
    Ok(())
}

/// Whether a file has no signature of an extent, and so is a descriptor.
fn is_text(file: &dyn Storage) -> bool {
    let magic: [u8; 8] = read(file, 0).unwrap_or_default();
    let known = [MAGIC, MAGIC_UNFINISHED, MAGIC_COWD];
    magic != MAGIC_SESPARSE && !known.iter().any(|known| magic.starts_with(known))
}

/// Lists what is in one file; the descriptor, if there is one.
fn one_file(file: &dyn Storage, len: u64, list: &mut Listing) -> Option<Descriptor> {
    let magic: [u8; 8] = read(file, 0).unwrap_or_default();
    match magic {
        MAGIC_SESPARSE => sesparse(file, list),
        _ if magic.starts_with(&MAGIC_COWD) => cowd(file, len, list),
        _ if is_text(file) => return descriptor(file, 0, len, list),
        _ => return hosted(file, len, list),
    }
    None
}

/// Lists the descriptor in `len` bytes from `at`.
fn descriptor(file: &dyn Storage, at: u64, len: u64, list: &mut Listing) -> Option<Descriptor> {
    const NAME: &str = "descriptor";
    let present = file.len().unwrap_or(0).saturating_sub(at);
    let bytes = match read_vec(file, at, len.min(MAX_BYTES).min(present) as usize) {
        Ok(bytes) => bytes,
        Err(why) => {
            list.add(Structure::absent(NAME, at, len, why));
            return None;
        }
    };
    let structure = Structure::new(NAME, at, len);
    if bytes.first().is_none_or(|byte| *byte == 0) {
        list.add(Structure { found: false, ..structure }.problem("there is no text"));
        return None;
    }
    let parsed = Descriptor::parse(&bytes);
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let lines: Vec<_> = String::from_utf8_lossy(&bytes[..end])
        .lines()
        .filter(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#'))
        .map(|line| line.trim().chars().take(MAX_LINE).collect::<String>())
        .collect();
    let structure = structure.field("text_length", end).field("lines", lines);
    match parsed {
        Ok(parsed) => {
            let broken = parsed.broken.first().cloned();
            list.add(match broken {
                Some(what) => structure.problem(what),
                None => structure,
            });
            Some(parsed)
        }
        Err(e) => {
            list.add(structure.problem(e.what()));
            None
        }
    }
}

/// Lists a sparse header or footer.
fn sparse_header(name: &str, at: u64, raw: &RawHeader) -> Structure {
    Structure::new(name, at, SECTOR)
        .field("magicNumber", text(&raw.magic_number))
        .field("version", raw.version.get())
        .field("flags", raw.flags.get())
        .field("capacity", raw.capacity.get())
        .field("grainSize", raw.grain_size.get())
        .field("descriptorOffset", raw.descriptor_offset.get())
        .field("descriptorSize", raw.descriptor_size.get())
        .field("numGTEsPerGT", raw.num_gtes_per_gt.get())
        .field("rgdOffset", raw.rgd_offset.get())
        .field("gdOffset", raw.gd_offset.get())
        .field("overHead", raw.overhead.get())
        .field("uncleanShutdown", raw.unclean_shutdown)
        .field("newlines", hex(&raw.newlines))
        .field("compressAlgorithm", raw.compress_algorithm.get())
}

fn hosted(file: &dyn Storage, len: u64, list: &mut Listing) -> Option<Descriptor> {
    let bytes = match read::<{ SECTOR as usize }>(file, 0) {
        Ok(bytes) => bytes,
        Err(why) => {
            list.add(Structure::absent("sparse header", 0, SECTOR, why));
            return None;
        }
    };
    let header = RawHeader::read_from_bytes(&bytes).ok()?;
    let structure = sparse_header("sparse header", 0, &header);
    list.add(match layout::Header::decode(&bytes) {
        Ok(_) => structure,
        Err(e) => structure.problem(e.what()),
    });
    let at = header.descriptor_offset.get().saturating_mul(SECTOR);
    let area = header.descriptor_size.get().saturating_mul(SECTOR);
    let found = if at > 0 { descriptor(file, at, area, list) } else { None };
    if header.capacity.get() == 0 {
        return found;
    }
    let packed = header.flags.get() & FLAG_COMPRESSED != 0;
    let end = if packed { footer(file, len, list) } else { None };
    let leading = match &end {
        Some(end) if header.gd_offset.get() == GD_AT_END => end,
        _ => &header,
    };
    let both = [("grain directory", "grain tables", leading.gd_offset.get())];
    let redundant =
        ("redundant grain directory", "redundant grain tables", leading.rgd_offset.get());
    let copies = both.into_iter().chain((redundant.2 != 0).then_some(redundant));
    for (directory, tables, sector) in copies {
        let shape = Shape {
            at: sector.saturating_mul(SECTOR),
            capacity: leading.capacity.get(),
            grain: leading.grain_size.get(),
            entries: leading.num_gtes_per_gt.get().into(),
        };
        let narrow = |bytes: &[u8; 4]| u64::from(u32::from_le_bytes(*bytes));
        tables_of(
            (directory, tables),
            file,
            len,
            &shape,
            narrow,
            |sector| sector.saturating_mul(SECTOR),
            list,
        );
    }
    if packed && header.flags.get() & FLAG_MARKERS != 0 {
        markers(file, len, &header, list);
    }
    found
}

/// Lists the footer of a stream, where there is one.
fn footer(file: &dyn Storage, len: u64, list: &mut Listing) -> Option<RawHeader> {
    let end = len / SECTOR * SECTOR;
    let from = end - end.min(FOOTER_SEARCH);
    let tail = read_vec(file, from, (end - from) as usize).ok()?;
    let sectors = tail.chunks_exact(SECTOR as usize);
    let last = sectors.clone().rposition(|sector| sector.starts_with(&MAGIC));
    let at = last.map(|last| from + last as u64 * SECTOR).filter(|at| *at > 0);
    let Some((at, last)) = at.zip(last) else {
        let place = len.saturating_sub(2 * SECTOR);
        list.add(Structure::absent("footer", place, SECTOR, "there is no signature"));
        return None;
    };
    let raw =
        RawHeader::read_from_bytes(&tail[last * SECTOR as usize..][..SECTOR as usize]).ok()?;
    list.add(sparse_header("footer", at, &raw));
    Some(raw)
}

/// How the tables of an extent are laid out.
struct Shape {
    /// Byte of the directory.
    at: u64,
    /// Sectors of the disk.
    capacity: u64,
    /// Sectors per grain.
    grain: u64,
    /// Entries per table.
    entries: u64,
}

/// Lists a grain directory, whose entries have `N` bytes, and what its tables say together.
fn tables_of<const N: usize>(
    (directory, tables): (&str, &str),
    file: &dyn Storage,
    len: u64,
    shape: &Shape,
    value: impl Fn(&[u8; N]) -> u64,
    place: impl Fn(u64) -> u64,
    list: &mut Listing,
) {
    let width = N as u64;
    let possible = shape.grain.is_power_of_two()
        && shape.grain <= MAX_GRAIN
        && (1..=1 << 16).contains(&shape.entries);
    if !possible {
        list.add(Structure::absent(directory, shape.at, 0, "the header gives it no shape"));
        return;
    }
    let count = shape.capacity.div_ceil(shape.grain).div_ceil(shape.entries);
    let (length, table_len) = (count.saturating_mul(width), shape.entries * width);
    let mut found = Spread::default();
    let mut outside = 0u64;
    let mut grains = GrainCounts::default();
    let counted = each_entry::<N>(file, shape.at, count.min(MAX_TABLES), |_, bytes| {
        let raw = value(&bytes);
        if raw == 0 {
            return;
        }
        let at = place(raw);
        found.add(at);
        match at.checked_add(table_len) {
            Some(end) if end <= len => {
                let counted = each_entry::<N>(file, at, shape.entries, |_, bytes| {
                    grains.add(value(&bytes));
                });
                grains.unreadable += u64::from(counted.is_err());
            }
            _ => outside += 1,
        }
    });
    let present = match counted {
        Ok(0) => {
            let why = "it lies past the end of the file";
            list.add(Structure::absent(directory, shape.at, length, why));
            return;
        }
        Ok(present) => present,
        Err(why) => {
            list.add(Structure::absent(directory, shape.at, length, why));
            return;
        }
    };
    let structure = Structure::new(directory, shape.at, length)
        .field("entries", count)
        .field("tables", found.count)
        .field("tables_past_the_end", outside);
    list.add(match present < count {
        true => {
            structure.problem(format!("the end of the file cuts it off after {present} entries"))
        }
        false => structure,
    });
    if found.count == 0 {
        return;
    }
    let first = found.lowest();
    let at = first.as_u64().unwrap_or(0);
    list.add(
        Structure::new(tables, at, (found.count - outside).saturating_mul(table_len))
            .field("first_table", first)
            .field("last_table", found.highest())
            .field("entries_unused", grains.unused)
            .field("entries_zeroed", grains.zeroed)
            .field("entries_stored", grains.stored.count)
            .field("lowest_entry", grains.stored.lowest())
            .field("highest_entry", grains.stored.highest())
            .field("unreadable_tables", grains.unreadable),
    );
}

/// What the entries of grain tables say.
#[derive(Default)]
struct GrainCounts {
    unused: u64,
    zeroed: u64,
    stored: Spread,
    unreadable: u64,
}

impl GrainCounts {
    fn add(&mut self, raw: u64) {
        match raw {
            0 => self.unused += 1,
            // Of seSparse the top digit says so, and the rest of the entry may be anything.
            1 => self.zeroed += 1,
            _ if matches!(raw >> 60, 1 | 2) => self.zeroed += 1,
            _ => self.stored.add(raw),
        }
    }
}

/// Lists the markers of a stream in the order of the file: those of metadata first, then those of grains.
fn markers(file: &dyn Storage, len: u64, header: &RawHeader, list: &mut Listing) {
    let grain = header.grain_size.get();
    if !grain.is_power_of_two() || grain > MAX_GRAIN {
        return;
    }
    let shape = (grain, header.capacity.get().div_ceil(grain));
    let mut grains: Vec<u64> = Vec::new();
    let mut all = 0u64;
    let room = list.limit - list.structures.len().min(list.limit);
    let walked = follow(file, len, shape, header.overhead.get(), &mut |piece| {
        match piece {
            Piece::Grain { at, .. } => {
                all += 1;
                if grains.len() < room {
                    grains.push(at);
                }
            }
            Piece::Marker { kind, at } => {
                let name = match kind {
                    0 => "end-of-stream marker".to_owned(),
                    1 => "grain table marker".to_owned(),
                    2 => "grain directory marker".to_owned(),
                    3 => "footer marker".to_owned(),
                    other => format!("marker of type {other}"),
                };
                let marker = Marker::read(file, at)?;
                let structure = Structure::new(name, at, SECTOR)
                    .field("val", marker.head.lba.get())
                    .field("size", marker.head.size.get())
                    .field("type", kind)
                    .field("grains_before", all);
                // A zero sector is where the stream ends; what follows is padding.
                return Ok(list.add(structure) && kind != 0);
            }
        }
        Ok(true)
    });
    if let Err(e) = walked {
        let at = e.offset().unwrap_or(0);
        list.add(Structure::absent("marker", at, SECTOR, e.what()));
    }
    for at in grains.iter().copied() {
        let Ok(marker) = Marker::read(file, at) else { continue };
        let structure = Structure::new("grain marker", at, 12 + u64::from(marker.head.size.get()))
            .field("lba", marker.head.lba.get())
            .field("size", marker.head.size.get());
        if !list.add(structure) {
            break;
        }
    }
    list.truncated |= all > grains.len() as u64;
}

fn cowd(file: &dyn Storage, len: u64, list: &mut Listing) {
    const NAME: &str = "COWD header";
    const LEN: u64 = size_of::<cowd::RawHeader>() as u64;
    let bytes = match read::<{ LEN as usize }>(file, 0) {
        Ok(bytes) => bytes,
        Err(why) => {
            list.add(Structure::absent(NAME, 0, LEN, why));
            return;
        }
    };
    let raw: cowd::RawHeader = zerocopy::transmute!(bytes);
    list.add(
        Structure::new(NAME, 0, LEN)
            .field("magic", text(&raw.magic))
            .field("version", raw.version.get())
            .field("flags", raw.flags.get())
            .field("numSectors", raw.num_sectors.get())
            .field("grainSize", raw.grain_size.get())
            .field("gdOffset", raw.gd_offset.get())
            .field("numGDEntries", raw.num_gd_entries.get())
            .field("freeSector", raw.free_sector.get())
            .field("parentGeneration", raw.parent_generation.get())
            .field("generation", raw.generation.get())
            .field("name", text(&raw.name))
            .field("description", text(&raw.description))
            .field("savedGeneration", raw.saved_generation.get())
            .field("uncleanShutdown", raw.unclean_shutdown.get()),
    );
    let shape = Shape {
        at: u64::from(raw.gd_offset.get()) * SECTOR,
        capacity: raw.num_sectors.get().into(),
        grain: raw.grain_size.get().into(),
        entries: cowd::ENTRIES_PER_TABLE,
    };
    let narrow = |bytes: &[u8; 4]| u64::from(u32::from_le_bytes(*bytes));
    let names = ("grain directory", "grain tables");
    tables_of(names, file, len, &shape, narrow, |sector| sector.saturating_mul(SECTOR), list);
}

fn sesparse(file: &dyn Storage, list: &mut Listing) {
    const NAME: &str = "seSparse header";
    let bytes = match read::<{ SECTOR as usize }>(file, 0) {
        Ok(bytes) => bytes,
        Err(why) => {
            list.add(Structure::absent(NAME, 0, SECTOR, why));
            return;
        }
    };
    let raw: ConstantHeader = zerocopy::transmute!(bytes);
    let regions = [
        ("volatileHeader", raw.volatile_header),
        ("journalHeader", raw.journal_header),
        ("journal", raw.journal),
        ("grainDirectory", raw.grain_directory),
        ("grainTables", raw.grain_tables),
        ("freeBitmap", raw.free_bitmap),
        ("backmap", raw.backmap),
        ("grains", raw.grains),
    ];
    let mut structure = Structure::new(NAME, 0, SECTOR)
        .field("magic", raw.magic.get())
        .field("version", raw.version.get())
        .field("capacity", raw.capacity.get())
        .field("grainSize", raw.grain_size.get())
        .field("grainTableSize", raw.grain_table_size.get())
        .field("flags", raw.flags.get());
    for (name, region) in regions {
        structure = structure
            .field(format!("{name}Offset"), region.offset.get())
            .field(format!("{name}Size"), region.size.get());
    }
    list.add(structure);
    list.add(volatile(file, raw.volatile_header.offset.get().saturating_mul(SECTOR)));
    let len = file.len().unwrap_or(0);
    let shape = Shape {
        at: raw.grain_directory.offset.get().saturating_mul(SECTOR),
        capacity: raw.capacity.get(),
        grain: raw.grain_size.get(),
        entries: raw.grain_table_size.get().saturating_mul(SECTOR / 8),
    };
    let first = raw.grain_tables.offset.get().saturating_mul(SECTOR);
    let table = shape.entries.saturating_mul(8);
    let wide = |bytes: &[u8; 8]| u64::from_le_bytes(*bytes);
    let names = ("grain directory", "grain tables");
    let place = |raw: u64| (raw & u64::from(u32::MAX)).saturating_mul(table).saturating_add(first);
    tables_of(names, file, len, &shape, wide, place, list);
}

fn volatile(file: &dyn Storage, at: u64) -> Structure {
    const NAME: &str = "volatile header";
    let bytes = match read::<{ SECTOR as usize }>(file, at) {
        Ok(bytes) => bytes,
        Err(why) => return Structure::absent(NAME, at, SECTOR, why),
    };
    let raw: VolatileHeader = zerocopy::transmute!(bytes);
    let structure = Structure::new(NAME, at, SECTOR);
    if raw.magic != U64::new(VOLATILE_MAGIC) {
        return structure.without_signature().field("magic", raw.magic.get());
    }
    structure
        .field("magic", raw.magic.get())
        .field("freeGTNumber", raw.free_gt_number.get())
        .field("nextTxnSeqNumber", raw.next_txn_seq_number.get())
        .field("replayJournal", raw.replay_journal.get())
}
