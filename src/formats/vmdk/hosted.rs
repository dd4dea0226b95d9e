//! Opening a hosted sparse extent: where its directories are, and which of them can be used.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::error::{Error, Result};
use crate::storage::Storage;

use super::grains::{Dialect, GrainTables};
use super::layout::{
    self, FLAG_MARKERS, FLAG_REDUNDANT, FLAG_ZEROED_GRAINS, GD_AT_END, Header, SECTOR, UNCLEAN_AT,
};
use super::link::{Asked, OpenedSparse};
use super::map::SparseExtent;
use super::stream::{self, Salvage};

/// Opens the extent whose `KDMV` header is at the start of the file.
pub fn open(asked: &Asked<'_>) -> Result<OpenedSparse> {
    let mut header = Header::read(&**asked.file, 0)?;
    asked.check_capacity(header.capacity)?;
    let file_len = asked.file_len()?;
    let at_end = header.gd == GD_AT_END;
    if at_end && let Some(footer) = stream::find_footer(&**asked.file, file_len, &header)? {
        header = footer;
    }
    let found = directories(&header, file_len);
    let mut problem = found.as_ref().ok().and_then(|d| d.problem.map(str::to_owned));
    let mut salvage = None;
    let mut damage = Vec::new();
    let directories = match found {
        Ok(directories) => directories,
        Err(_) if header.flags & FLAG_MARKERS != 0 => {
            let rest = Salvage::scan(&**asked.file, file_len, &header)?;
            let known = (rest.known * header.grain * SECTOR).min(asked.sectors * SECTOR);
            if known < asked.sectors * SECTOR {
                damage.push(known..asked.sectors * SECTOR);
            }
            problem = Some(format!(
                "the grain directory is lost; {} grains were found by searching",
                rest.grains.len()
            ));
            salvage = Some(rest);
            Directories { primary: 0..0, redundant: None, reserved: Vec::new(), problem: None }
        }
        Err(e) => return Err(e.in_file(asked.file.path())),
    };
    let read_only = header.read_only().or_else(|| problem.clone());
    let reserved_end = directories.reserved.iter().map(|r| r.end).max().unwrap_or(SECTOR);
    let dialect = match header.compressed() {
        true => Dialect::Packed { markers: header.flags & FLAG_MARKERS != 0 },
        false => Dialect::Hosted,
    };
    let tables = GrainTables {
        number: asked.number,
        file_index: asked.file_index,
        file: asked.file.clone(),
        dialect,
        len: asked.sectors * SECTOR,
        grain: header.grain * SECTOR,
        entries_per_table: header.entries_per_table,
        gd: directories.primary.start,
        directory_entries: header.tables(),
        rgd: directories.redundant.map(|r| r.start),
        zeroed_grains: header.flags & FLAG_ZEROED_GRAINS != 0,
        reserved: directories.reserved,
        file_len: Arc::new(AtomicU64::new(file_len)),
        salvage,
    };
    let extent = SparseExtent {
        tables,
        writable: read_only.is_none(),
        unclean: header.unclean,
        unclean_at: UNCLEAN_AT,
        free_sector: None,
        overhead: header.overhead.max(reserved_end.div_ceil(SECTOR)),
        version: header.version,
        flags: header.flags,
        file: asked.file.clone(),
    };
    Ok(OpenedSparse { extent, read_only, problem, damage })
}

/// The directories of an extent, in bytes of its file.
struct Directories {
    primary: Range<u64>,
    redundant: Option<Range<u64>>,
    /// Header, descriptor and directories.
    reserved: Vec<Range<u64>>,
    /// What is wrong with them, though they can be read.
    problem: Option<&'static str>,
}

/// Finds the directories that lie where directories can be.
fn directories(header: &Header, file_len: u64) -> Result<Directories> {
    let len = header.tables() * 4;
    let header_place = 0..SECTOR;
    let mut reserved = vec![header_place];
    if header.descriptor_at != 0 {
        let at = header.descriptor_at * SECTOR;
        reserved.push(at..at.saturating_add(header.descriptor_len * SECTOR));
    }
    let place = |sector: u64| -> Option<Range<u64>> {
        let start = layout::bytes(sector)?;
        let place = start..start.checked_add(len)?;
        let free = reserved.iter().all(|r| r.end <= place.start || place.end <= r.start);
        (place.end <= file_len && free).then_some(place)
    };
    let twice = header.flags & FLAG_REDUNDANT != 0 && header.rgd != 0;
    let redundant = if twice { place(header.rgd) } else { None };
    let (primary, redundant, problem) = match (place(header.gd), redundant) {
        (Some(gd), Some(rgd)) if gd.start < rgd.end && rgd.start < gd.end => {
            (gd, None, Some("the grain directory and its redundant copy overlap"))
        }
        (Some(gd), None) if twice => {
            (gd, None, Some("the redundant grain directory lies outside the file"))
        }
        (Some(gd), rgd) => (gd, rgd, None),
        (None, Some(rgd)) => {
            (rgd, None, Some("the grain directory is lost, its redundant copy is used"))
        }
        (None, None) => {
            let what = "the grain directory lies outside the file or inside its header";
            return Err(Error::corrupt(what).at(header.gd.saturating_mul(SECTOR)));
        }
    };
    reserved.push(primary.clone());
    reserved.extend(redundant.clone());
    Ok(Directories { primary, redundant, reserved, problem })
}
