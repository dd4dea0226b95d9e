//! What can be rebuilt of sparse extents: whatever is there twice or follows from where every known
//! writer puts it, the unclean mark, and space that nothing uses. With consent grains are given up that
//! lead nowhere, and a last grain that is cut short gets zeroes for the rest.
//!
//! # Order
//!
//! One round each, for what the next one builds on must be durable: the header's places of the
//! directories; directory entries; tables; the mark, when nothing else is wrong; unused space, when
//! a check finds no error at all. A directory entry is written when the table that it leads to is
//! durable. Tables are merged entry by entry, and merging again gives the same, whichever sectors of
//! an interrupted merge arrived. Grains are given up when all that is settled; only then, when no table
//! leads past the end of the file any more, does it grow.
//!
//! What guests see changes only where it was an error, or where a table of an image that was closed
//! properly lacks a grain that its copy has and nothing else uses.

use std::sync::Arc;

use crate::codec;
use crate::error::Result;
use crate::formats::repair::stored;
use crate::formats::{OpenContext, Plan};
use crate::storage::Storage;

use super::cowd;
use super::grains::{Dialect, Grain, GrainTables, Table};
use super::layout::{DESCRIPTOR_SECTORS, FLAG_REDUNDANT, GD_AT, Header, NewLayout, RGD_AT, SECTOR};
use super::link::Link;
use super::map::SparseExtent;
use super::walk::{self, Kind, TableReader, Usage};

/// Plans the next round for the disk whose descriptor is in `file`.
pub fn repair(file: Arc<dyn Storage>, ctx: &OpenContext, plan: &mut Plan) -> Result<()> {
    let link = Link::open(file, ctx)?;
    let reclaims = plan.reclaims();
    let has_parent = link.descriptor.descriptor.parent_cid()?.is_some();
    let extents = || link.sparse.iter().filter(|extent| is_repairable(extent));
    for extent in extents() {
        let storage: Arc<dyn Storage> = extent.file.clone();
        let mut work = plan.part();
        if plan.all() {
            repair_header(extent, &storage, &mut work)?;
        }
        if extent.writable && work.is_empty() {
            repair_tables(extent, &storage, reclaims, &mut work)?;
        }
        if plan.lossy() && extent.writable && work.is_empty() {
            give_up(extent, &storage, has_parent, &mut work)?;
        }
        plan.append(work);
    }
    if reclaims && plan.is_empty() {
        extents().filter(|extent| extent.writable).try_for_each(|extent| reclaim(extent, plan))?;
    }
    Ok(())
}

/// Whether the extent is of a kind that is written in place at all.
fn is_repairable(extent: &SparseExtent) -> bool {
    matches!(extent.tables.dialect, Dialect::Hosted | Dialect::Cowd) && !extent.file.protected()
}

/// Plans the first of the steps that `extent` needs.
fn repair_tables(
    extent: &SparseExtent,
    file: &Arc<dyn Storage>,
    reclaims: bool,
    work: &mut Plan,
) -> Result<()> {
    let tables = &extent.tables;
    let (mut damaged, mut torn) = (false, false);
    let mut usage = walk::walk(tables, &mut |problem| match problem.kind {
        Kind::Damage => damaged = true,
        Kind::Torn => torn = true,
        Kind::Oddity => {}
    })?;
    if work.all() && damaged {
        repair_directories(tables, file, &usage, work)?;
    }
    // Space is given back only when no copy of a table leads to it.
    let merges = work.all() && (damaged || torn) || reclaims && torn && extent.unclean;
    if merges && work.is_empty() {
        merge_tables(extent, file, &mut usage, work)?;
    }
    if !work.all() || damaged || torn || !work.is_empty() {
        return Ok(());
    }
    if let Some(free) = extent.free_sector
        && free < usage.end()
    {
        let (at, value) = cowd::free_sector(usage.end());
        work.write(file, at, value.to_vec(), "where free space begins");
    }
    if extent.unclean {
        work.sync(file);
        let len = if tables.dialect == Dialect::Cowd { 4 } else { 1 };
        work.write(file, extent.unclean_at, vec![0; len], "the mark of an extent not closed");
    }
    Ok(())
}

/// Corrects a header that does not lead to a directory, when one lies where every writer puts it.
fn repair_header(extent: &SparseExtent, file: &Arc<dyn Storage>, work: &mut Plan) -> Result<()> {
    if extent.tables.dialect != Dialect::Hosted {
        return Ok(());
    }
    let header = Header::read(&**file, 0)?;
    if header.read_only().is_some() || header.flags & FLAG_REDUNDANT == 0 || header.rgd == 0 {
        return Ok(());
    }
    let used = extent.tables.gd / SECTOR;
    let lost_rgd = extent.tables.rgd.is_none() && used == header.gd;
    let lost_gd = extent.tables.rgd.is_none() && used == header.rgd && used != header.gd;
    for descriptor in [header.descriptor_len, 0, DESCRIPTOR_SECTORS] {
        let layout = NewLayout::new(header.capacity, header.grain, descriptor);
        let (at, sector, what) = if lost_gd && used == layout.rgd {
            (GD_AT, layout.gd, "the place of the grain directory")
        } else if lost_rgd && used == layout.gd {
            (RGD_AT, layout.rgd, "the place of the redundant grain directory")
        } else {
            continue;
        };
        let expected = layout.directory(sector);
        let mut found = vec![0; expected.len()];
        let there = file.read_at(sector * SECTOR, &mut found).is_ok();
        if there && found == expected {
            if lost_gd {
                // What the tables of the lost directory say is what readers see from then on.
                let Some(tables) = follow_redundant(extent, file, &layout, work.part())? else {
                    break;
                };
                if !tables.is_empty() {
                    work.append(tables);
                    break;
                }
            }
            work.write(file, at, sector.to_le_bytes().to_vec(), what);
            break;
        }
    }
    Ok(())
}

/// Adds to `work` what makes the tables behind a lost directory, in the places that `layout` gives
/// them, say what those of the directory in use say; `None` if something else lies there.
fn follow_redundant(
    extent: &SparseExtent,
    file: &Arc<dyn Storage>,
    layout: &NewLayout,
    mut work: Plan,
) -> Result<Option<Plan>> {
    let tables = &extent.tables;
    let usage = walk::walk(tables, &mut |_| ())?;
    let len = tables.table_len();
    let first = (layout.gd + layout.gd_len) * SECTOR;
    let (mut used, mut lost) = (vec![0; len as usize], vec![0; len as usize]);
    let mut reader = TableReader::new(&*tables.file);
    let mut entries = TableReader::new(&*tables.file);
    let mut entry = [0; 4];
    for index in 0..tables.tables().min(layout.tables) {
        entries.read(tables.gd + index * 4, &mut entry)?;
        match tables.decode_table(u32::from_le_bytes(entry).into()) {
            Table::At(at) => drop(reader.read(at, &mut used)?),
            Table::Absent => used.fill(0),
            // Nothing can be read there now.
            Table::Bad => continue,
        }
        let place = first + index * len..first + (index + 1) * len;
        if !usage.is_free(&place) || file.read_at(place.start, &mut lost).is_err() {
            return Ok(None);
        }
        if used != lost && !work.is_full() {
            let what = format!("grain table {index}, from its copy");
            work.write(file, place.start, used.clone(), what);
        }
    }
    Ok(Some(work))
}

/// The entry for one table in each directory, and what it says.
pub(super) struct Twins {
    raw: [u64; 2],
    pub(super) at: [Table; 2],
}

/// Calls `visit` for every table that one of the two directories has an entry for.
pub(super) fn each_twins(
    tables: &GrainTables,
    rgd: u64,
    mut visit: impl FnMut(u64, &Twins) -> Result<()>,
) -> Result<()> {
    const CHUNK: u64 = 64 << 10;
    let mut chunk = [vec![0; CHUNK as usize], vec![0; CHUNK as usize]];
    let mut readers = [TableReader::new(&*tables.file), TableReader::new(&*tables.file)];
    for from in (0..tables.directory_len()).step_by(CHUNK as usize) {
        let len = (tables.directory_len() - from).min(CHUNK);
        for ((buf, reader), at) in chunk.iter_mut().zip(&mut readers).zip([tables.gd, rgd]) {
            reader.read(at + from, &mut buf[..len as usize])?;
        }
        for index in 0..len / 4 {
            let raw = chunk.each_ref().map(|bytes| tables.raw(bytes, index));
            if raw != [0; 2] {
                let at = raw.map(|raw| tables.decode_table(raw));
                visit(from / 4 + index, &Twins { raw, at })?;
            }
        }
    }
    Ok(())
}

/// Rebuilds directory entries that lead to no table of their own, while the other directory's do.
fn repair_directories(
    tables: &GrainTables,
    file: &Arc<dyn Storage>,
    usage: &Usage,
    work: &mut Plan,
) -> Result<()> {
    let Some(rgd) = tables.rgd else { return Ok(()) };
    let directories = [tables.gd, rgd];
    let names = ["a grain directory entry", "a redundant grain directory entry"];
    let mut entries = work.part();
    each_twins(tables, rgd, |index, twins| {
        if work.is_full() {
            return Ok(());
        }
        // In a new extent the tables follow their directory one after the other.
        let expected = directories.map(|gd| {
            (gd + tables.directory_entries * 4).next_multiple_of(SECTOR)
                + index * tables.table_len()
        });
        let (lost, kept) = match twins.at {
            [Table::At(a), Table::At(b)] if a != b => return Ok(()),
            [Table::At(a), Table::At(_)] if a == expected[0] => (1, a),
            [Table::At(_), Table::At(b)] if b == expected[1] => (0, b),
            [Table::At(a), Table::Absent | Table::Bad] => (1, a),
            [Table::Absent | Table::Bad, Table::At(b)] => (0, b),
            _ => return Ok(()),
        };
        let at = expected[lost];
        let place = at..at + tables.table_len();
        let sector = u32::try_from(at / SECTOR).unwrap_or(u32::MAX);
        let possible = tables.decode_table(u64::from(sector)) == Table::At(at);
        let entry_at = directories[lost] + index * 4;
        // What else claims the entry's place may be right, and would be overwritten.
        let contested = usage.is_contested(&(entry_at..entry_at + 4));
        let done = twins.raw[lost] == u64::from(sector);
        if !possible || done || contested || !usage.is_free(&place) {
            return Ok(());
        }
        let mut table = vec![0; tables.table_len() as usize];
        let mut found = table.clone();
        codec::read_exact(&**file, kept, &mut table, "a grain table")?;
        codec::read_exact(&**file, at, &mut found, "a grain table")?;
        if table != found {
            work.write(file, at, table, format!("grain table {index}, from its copy"));
        }
        entries.write(file, entry_at, sector.to_le_bytes().to_vec(), names[lost]);
        Ok(())
    })?;
    if !entries.is_empty() {
        work.sync(file);
        work.append(entries);
    }
    Ok(())
}

/// Makes every table and its copy equal, taking from each what is right.
fn merge_tables(
    extent: &SparseExtent,
    file: &Arc<dyn Storage>,
    usage: &mut Usage,
    work: &mut Plan,
) -> Result<()> {
    let tables = &extent.tables;
    let Some(rgd) = tables.rgd else { return Ok(()) };
    let len = tables.table_len() as usize;
    each_twins(tables, rgd, |index, twins| {
        let [Table::At(first), Table::At(second)] = twins.at else { return Ok(()) };
        // What else claims a table's place may be right, and would be overwritten.
        let contested = |at| usage.is_contested(&(at..at + len as u64));
        if work.is_full() || contested(first) || contested(second) {
            return Ok(());
        }
        let (mut primary, mut redundant) = (vec![0; len], vec![0; len]);
        codec::read_exact(&**file, first, &mut primary, "a grain table")?;
        codec::read_exact(&**file, second, &mut redundant, "a grain table")?;
        if primary == redundant {
            return Ok(());
        }
        let (old_primary, old_redundant) = (primary.clone(), redundant.clone());
        let entries = primary.chunks_exact_mut(4).zip(redundant.chunks_exact_mut(4));
        for (first, second) in entries {
            let both = [&*first, &*second].map(|entry| tables.raw(entry, 0));
            if let Some(right) = choose(extent, usage, both) {
                let bytes = (right as u32).to_le_bytes();
                first.copy_from_slice(&bytes);
                second.copy_from_slice(&bytes);
            }
        }
        if primary != old_primary {
            work.write(file, first, primary, format!("grain table {index}, from its copy"));
        }
        if redundant != old_redundant {
            let what = format!("the redundant grain table {index}, from its copy");
            work.write(file, second, redundant, what);
        }
        Ok(())
    })
}

/// Which of two entries for a grain is right; `None` if neither can be told to be.
fn choose(extent: &SparseExtent, usage: &mut Usage, [primary, redundant]: [u64; 2]) -> Option<u64> {
    let tables = &extent.tables;
    let place = |raw| match tables.decode(raw) {
        Grain::At(at) => Some(at..at + tables.grain),
        _ => None,
    };
    let file_len = tables.file_len.load(std::sync::atomic::Ordering::Relaxed);
    let legal = |raw| match tables.decode(raw) {
        Grain::Bad => false,
        Grain::At(at) => at + tables.grain <= file_len,
        Grain::Unallocated | Grain::Zero => true,
    };
    if primary == redundant {
        return Some(primary);
    }
    // Writing goes from the copy to the primary, and readers see the primary: after a crash that is
    // the one. Otherwise an entry that is missing was lost.
    if legal(primary) && (primary != 0 || extent.unclean) {
        return Some(primary);
    }
    // Of a grain that is cut off readers see the first part: neither entry says all.
    if place(primary).is_some_and(|place| place.start < file_len) {
        return None;
    }
    let usable = legal(redundant) && place(redundant).is_none_or(|place| usage.is_free(&place));
    if usable {
        if let Some(place) = place(redundant) {
            usage.add_grain(place.start);
        }
        return Some(redundant);
    }
    legal(primary).then_some(primary)
}

/// Gives up grains that lead nowhere, or else completes one that the end of the file cuts short. In a
/// child whose header declares no entry for zeroes they stay: the parent's data is not theirs.
fn give_up(
    extent: &SparseExtent,
    file: &Arc<dyn Storage>,
    has_parent: bool,
    work: &mut Plan,
) -> Result<()> {
    let tables = &extent.tables;
    let zeroes: Option<u32> = match (has_parent, tables.zeroed_grains) {
        (false, _) => Some(0),
        (true, zeroed) => zeroed.then_some(1),
    };
    let usage = walk::walk(tables, &mut |_| ())?;
    let file_len = tables.file_len.load(std::sync::atomic::Ordering::Relaxed);
    let (mut lost, mut needed) = (false, file_len);
    let mut bytes = vec![0; tables.table_len() as usize];
    each_twins(tables, tables.rgd.unwrap_or(tables.gd), |index, twins| {
        let Table::At(first) = twins.at[0] else { return Ok(()) };
        codec::read_exact(&**file, first, &mut bytes, "a grain table")?;
        let mut given_up = 0;
        for entry in bytes.chunks_exact_mut(4) {
            match (tables.decode(tables.raw(entry, 0)), zeroes) {
                (Grain::Bad, Some(zeroes)) => {
                    entry.copy_from_slice(&zeroes.to_le_bytes());
                    given_up += 1;
                }
                (Grain::Bad, None) => lost = true,
                (Grain::At(at), _) => needed = needed.max(at + tables.grain),
                (Grain::Unallocated | Grain::Zero, _) => {}
            }
        }
        let copies = || twins.at.iter().filter_map(|copy| place_of(*copy));
        let contested = copies().any(|at| usage.is_contested(&(at..at + tables.table_len())));
        lost |= given_up > 0;
        if given_up > 0 && !contested && !work.is_full() {
            let what = format!("{given_up} grains of grain table {index} are given up");
            let second = copies().find(|at| *at != first);
            for at in std::iter::once(first).chain(second) {
                work.write(file, at, bytes.clone(), what.as_str());
            }
        }
        Ok(())
    })?;
    if !lost && needed > file_len {
        work.set_len(file, needed, "a grain is cut short");
    }
    Ok(())
}

fn place_of(table: Table) -> Option<u64> {
    match table {
        Table::At(at) => Some(at),
        Table::Absent | Table::Bad => None,
    }
}

/// Gives unused space back: cuts off the end, punches the rest.
fn reclaim(extent: &SparseExtent, plan: &mut Plan) -> Result<()> {
    let file: Arc<dyn Storage> = extent.file.clone();
    let usage = walk::walk(&extent.tables, &mut |_| ())?;
    let len = extent.tables.file_len.load(std::sync::atomic::Ordering::Relaxed);
    for run in usage.unused(extent.overhead) {
        let place = run.start * SECTOR..(run.end * SECTOR).min(len);
        if stored(&*file, place.clone())? == 0 {
            continue;
        }
        // A copy-on-write extent's header says where it ends; nobody needs to be told otherwise.
        if place.end == len && extent.tables.dialect == Dialect::Hosted {
            plan.set_len(&file, place.start, "nothing uses the end of the file");
        } else {
            plan.punch(&file, place, "nothing uses this space");
        }
    }
    Ok(())
}
