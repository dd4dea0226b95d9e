//! Space-efficient sparse extents of ESXi: read only. Writing would need a journal whose form is not
//! known; for the same reason an extent with a journal to replay is refused.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::codec;
use crate::error::{Error, Result};
use crate::storage::Storage;

use super::grains::{Dialect, GrainTables};
use super::layout::{self, SECTOR};
use super::link::{Asked, OpenedSparse};
use super::map::SparseExtent;

const MAGIC: u64 = 0xcafe_babe;
pub(super) const VOLATILE_MAGIC: u64 = 0xcafe_cafe;
/// 2.1.
const VERSION: u64 = 0x2_0000_0001;
const GRAIN_SECTORS: u64 = 8;
const TABLE_SECTORS: u64 = 64;
/// Entries of one grain table.
const ENTRIES_PER_TABLE: u64 = TABLE_SECTORS * SECTOR / 8;

/// A part of the file, in sectors.
#[derive(Debug, Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Region {
    pub(super) offset: U64,
    pub(super) size: U64,
}

impl Region {
    /// The region in bytes, if it is one.
    pub(super) fn bytes(self) -> Option<Range<u64>> {
        let start = layout::bytes(self.offset.get())?;
        let end = start.checked_add(layout::bytes(self.size.get())?)?;
        (start < end && end <= i64::MAX as u64).then_some(start..end)
    }
}

/// The header that never changes, byte for byte.
#[derive(Debug, Clone, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct ConstantHeader {
    pub(super) magic: U64,
    pub(super) version: U64,
    pub(super) capacity: U64,
    pub(super) grain_size: U64,
    pub(super) grain_table_size: U64,
    pub(super) flags: U64,
    pub(super) reserved: [U64; 4],
    pub(super) volatile_header: Region,
    pub(super) journal_header: Region,
    pub(super) journal: Region,
    pub(super) grain_directory: Region,
    pub(super) grain_tables: Region,
    pub(super) free_bitmap: Region,
    pub(super) backmap: Region,
    pub(super) grains: Region,
    pub(super) pad: [u8; 304],
}

/// The header that changes, byte for byte.
#[derive(Debug, Clone, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct VolatileHeader {
    pub(super) magic: U64,
    pub(super) free_gt_number: U64,
    pub(super) next_txn_seq_number: U64,
    pub(super) replay_journal: U64,
    pub(super) pad: [u8; 480],
}

const _: () = assert!(size_of::<ConstantHeader>() as u64 == SECTOR);
const _: () = assert!(size_of::<VolatileHeader>() as u64 == SECTOR);

/// Opens the extent whose header is at the start of the file.
pub fn open(asked: &Asked<'_>) -> Result<OpenedSparse> {
    let file = asked.file;
    let corrupt = |what: &str| Error::corrupt(what.to_owned()).in_file(file.path());
    let unsupported = |what: String| Error::unsupported(what).in_file(file.path());
    let bytes: [u8; SECTOR as usize] = codec::read_array(&**file, 0, "the seSparse header")?;
    let header: ConstantHeader = zerocopy::transmute!(bytes);
    if header.magic.get() != MAGIC {
        return Err(corrupt("the extent has no seSparse signature"));
    }
    if header.version.get() != VERSION {
        return Err(unsupported(format!("seSparse version {:#x}", header.version)));
    }
    let fixed = [header.grain_size, header.grain_table_size, header.flags];
    if fixed != [GRAIN_SECTORS, TABLE_SECTORS, 0].map(U64::new)
        || header.reserved.iter().any(|r| r.get() != 0)
        || header.pad.iter().any(|b| *b != 0)
    {
        return Err(unsupported(format!(
            "seSparse grains of {} sectors, tables of {}, flags {:#x}",
            header.grain_size, header.grain_table_size, header.flags
        )));
    }
    asked.check_capacity(header.capacity.get())?;
    let regions = [
        header.volatile_header,
        header.journal_header,
        header.journal,
        header.grain_directory,
        header.grain_tables,
        header.free_bitmap,
        header.backmap,
        header.grains,
    ];
    let mut places: Vec<Range<u64>> = regions
        .into_iter()
        .map(|region| region.bytes().filter(|place| place.start >= SECTOR))
        .collect::<Option<_>>()
        .ok_or_else(|| corrupt("a seSparse region lies beyond any file"))?;
    let [volatile, directory, tables, grains] = [0, 3, 4, 7].map(|i| places[i].clone());
    places.sort_by_key(|place| place.start);
    if places.windows(2).any(|pair| pair[1].start < pair[0].end) {
        return Err(corrupt("seSparse regions overlap"));
    }
    let bytes: [u8; SECTOR as usize] =
        codec::read_array(&**file, volatile.start, "the volatile seSparse header")?;
    let state: VolatileHeader = zerocopy::transmute!(bytes);
    if state.magic.get() != VOLATILE_MAGIC {
        return Err(corrupt("the volatile seSparse header has no signature").at(volatile.start));
    }
    if state.replay_journal.get() != 0 {
        return Err(unsupported("the seSparse journal must be replayed first".to_owned())
            .hint("ESXi does that when it opens the disk"));
    }
    let file_len = asked.file_len()?;
    let len = asked.sectors * SECTOR;
    let needed = len.div_ceil(GRAIN_SECTORS * SECTOR).div_ceil(ENTRIES_PER_TABLE);
    if needed * 8 > directory.end - directory.start || directory.start + needed * 8 > file_len {
        return Err(corrupt("the grain directory is too short").at(directory.start));
    }
    let tables = GrainTables {
        number: asked.number,
        file_index: asked.file_index,
        file: file.clone(),
        dialect: Dialect::SeSparse {
            tables: [tables.start, tables.end],
            grains: [grains.start, grains.end],
        },
        len,
        grain: GRAIN_SECTORS * SECTOR,
        entries_per_table: ENTRIES_PER_TABLE,
        gd: directory.start,
        directory_entries: needed,
        rgd: None,
        zeroed_grains: true,
        reserved: Vec::new(),
        file_len: Arc::new(AtomicU64::new(file_len)),
        salvage: None,
    };
    let extent = SparseExtent {
        tables,
        writable: false,
        unclean: false,
        unclean_at: 0,
        free_sector: None,
        overhead: file_len.div_ceil(SECTOR),
        version: 2,
        flags: 0,
        file: file.clone(),
    };
    let read_only = Some("seSparse extents cannot be written".to_owned());
    Ok(OpenedSparse { extent, read_only, problem: None, damage: Vec::new() })
}
