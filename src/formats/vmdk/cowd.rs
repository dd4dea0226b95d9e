//! ESX copy-on-write extents (`COWD`): one directory, tables of 4096 entries made on demand, grains
//! of one sector as a rule, and a header field that says where unused space begins.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::codec;
use crate::error::{Error, Result};
use crate::storage::Storage;

use super::grains::{Dialect, GrainTables};
use super::layout::{MAGIC_COWD, MAX_GRAIN, MAX_TABLES, SECTOR};
use super::link::{Asked, OpenedSparse};
use super::map::SparseExtent;

/// Entries per grain table.
pub const ENTRIES_PER_TABLE: u64 = 4096;
/// Sectors of the header; the directory follows it.
const HEADER_SECTORS: u64 = 4;

/// The header, byte for byte.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    pub(super) magic: [u8; 4],
    pub(super) version: U32,
    pub(super) flags: U32,
    pub(super) num_sectors: U32,
    pub(super) grain_size: U32,
    pub(super) gd_offset: U32,
    pub(super) num_gd_entries: U32,
    pub(super) free_sector: U32,
    /// Of a root: cylinders, heads, sectors. Of a child: the parent's name, as a rule empty.
    pub(super) parent_file_name: [u8; 1024],
    pub(super) parent_generation: U32,
    pub(super) generation: U32,
    pub(super) name: [u8; 60],
    pub(super) description: [u8; 512],
    pub(super) saved_generation: U32,
    pub(super) reserved: [u8; 8],
    pub(super) unclean_shutdown: U32,
    pub(super) padding: [u8; 396],
}

const _: () = assert!(size_of::<RawHeader>() as u64 == HEADER_SECTORS * SECTOR);
const FREE_SECTOR_AT: u64 = std::mem::offset_of!(RawHeader, free_sector) as u64;
const UNCLEAN_AT: u64 = std::mem::offset_of!(RawHeader, unclean_shutdown) as u64;
const _: () = assert!(FREE_SECTOR_AT == 28 && UNCLEAN_AT == 1648);

fn tables(capacity: u64, grain: u64) -> u64 {
    capacity.div_ceil(grain * ENTRIES_PER_TABLE)
}

/// Opens the extent whose header is at the start of the file. `declared`: the descriptor says that
/// it is of this kind.
pub fn open(asked: &Asked<'_>, declared: bool) -> Result<OpenedSparse> {
    let file = asked.file;
    let corrupt = |what: String| Error::corrupt(what).in_file(file.path());
    let bytes: [u8; size_of::<RawHeader>()] = codec::read_array(&**file, 0, "the COWD header")?;
    let header: RawHeader = zerocopy::transmute!(bytes);
    if header.magic != MAGIC_COWD {
        return Err(corrupt("the extent has no COWD signature".into()));
    }
    if header.version.get() != 1 {
        let what = format!("COWD header version {}", header.version);
        return Err(Error::unsupported(what).in_file(file.path()));
    }
    let capacity = u64::from(header.num_sectors.get());
    let grain = u64::from(header.grain_size.get());
    asked.check_capacity(capacity)?;
    if !grain.is_power_of_two() || grain > MAX_GRAIN {
        return Err(corrupt(format!("grain size of {grain} sectors")));
    }
    let entries = u64::from(header.num_gd_entries.get());
    if entries != tables(capacity, grain) && !declared {
        let what = "a copy-on-write disk of VMware Workstation 3 or older";
        return Err(Error::unsupported(what).in_file(file.path()));
    }
    let file_len = asked.file_len()?;
    let gd = u64::from(header.gd_offset.get()) * SECTOR;
    let needed = tables(asked.sectors, grain);
    let present = entries.min(needed).min(file_len.saturating_sub(gd) / 4).min(MAX_TABLES);
    if gd < HEADER_SECTORS * SECTOR || present == 0 {
        return Err(corrupt(
            "the grain directory lies outside the file or inside its header".into(),
        )
        .at(gd));
    }
    let problem = (present < needed).then(|| "the grain directory is too short".to_owned());
    let gd_end = (gd + entries.min(MAX_TABLES) * 4).next_multiple_of(SECTOR);
    let tables = GrainTables {
        number: asked.number,
        file_index: asked.file_index,
        file: file.clone(),
        dialect: Dialect::Cowd,
        len: asked.sectors * SECTOR,
        grain: grain * SECTOR,
        entries_per_table: ENTRIES_PER_TABLE,
        gd,
        directory_entries: present,
        rgd: None,
        zeroed_grains: false,
        reserved: std::iter::once(0..gd_end).collect(),
        file_len: Arc::new(AtomicU64::new(file_len)),
        salvage: None,
    };
    let span = grain * SECTOR * ENTRIES_PER_TABLE;
    let lost = present * span..asked.sectors * SECTOR;
    let extent = SparseExtent {
        tables,
        writable: problem.is_none(),
        unclean: header.unclean_shutdown.get() != 0,
        unclean_at: UNCLEAN_AT,
        free_sector: Some(header.free_sector.get().into()),
        overhead: gd_end / SECTOR,
        version: 1,
        flags: header.flags.get(),
        file: file.clone(),
    };
    let damage = std::iter::once(lost).filter(|lost| !lost.is_empty()).collect();
    Ok(OpenedSparse { extent, read_only: problem.clone(), problem, damage })
}

/// Writes where unused space begins. A value that is too large wastes space; one that is too small
/// would let other programs write over grains, so it goes to disk before the tables do.
pub fn write_free_sector(file: &dyn Storage, sector: u64) -> Result<()> {
    let (at, value) = free_sector(sector);
    codec::write_all(file, at, &value, "the COWD header")
}

/// The first sector of the header, which says how large the extent is, of `file` with another capacity
/// in sectors and that many entries in its directory.
pub fn resized_header(
    file: &dyn Storage,
    capacity: u64,
    free_sector: u64,
) -> Result<[u8; SECTOR as usize]> {
    let bytes: [u8; size_of::<RawHeader>()] = codec::read_array(file, 0, "the COWD header")?;
    let mut header: RawHeader = zerocopy::transmute!(bytes);
    let entries = tables(capacity, u64::from(header.grain_size.get()));
    let narrow = |wide: u64| u32::try_from(wide).ok().map(U32::new);
    let fields = (narrow(capacity), narrow(entries), narrow(free_sector));
    let (Some(capacity), Some(entries), Some(free_sector)) = fields else {
        return Err(Error::invalid("a vmfsSparse disk has less than 2 TiB"));
    };
    header.num_sectors = capacity;
    header.num_gd_entries = entries;
    header.free_sector = free_sector;
    let bytes: [u8; size_of::<RawHeader>()] = zerocopy::transmute!(header);
    let mut first = [0; SECTOR as usize];
    first.copy_from_slice(&bytes[..SECTOR as usize]);
    Ok(first)
}

/// Entries that the directory of an extent of `capacity` sectors has.
pub fn directory_entries(capacity: u64, grain: u64) -> u64 {
    tables(capacity, grain)
}

/// Byte offset and bytes of the field that says where unused space begins.
pub fn free_sector(sector: u64) -> (u64, [u8; 4]) {
    (FREE_SECTOR_AT, u32::try_from(sector).unwrap_or(u32::MAX).to_le_bytes())
}

/// Bytes of a new extent of `capacity` sectors, its tables not included.
pub fn new_len(capacity: u64) -> u64 {
    (HEADER_SECTORS + (tables(capacity, 1) * 4).div_ceil(SECTOR)) * SECTOR
}

/// Fills a new extent of `capacity` sectors, durably. That of a disk without parent says cylinders,
/// heads and sectors per track.
pub fn write_new(
    file: &dyn Storage,
    capacity: u64,
    name: &str,
    chs: Option<[u64; 3]>,
) -> Result<()> {
    const GRAIN: u64 = 1;
    let Ok(num_sectors) = u32::try_from(capacity) else {
        return Err(Error::invalid("a vmfsSparse disk has less than 2 TiB"));
    };
    let entries = tables(capacity, GRAIN);
    let free = HEADER_SECTORS + (entries * 4).div_ceil(SECTOR);
    let mut header = RawHeader::new_zeroed();
    header.magic = MAGIC_COWD;
    header.version = 1.into();
    header.flags = 3.into();
    header.num_sectors = num_sectors.into();
    header.grain_size = (GRAIN as u32).into();
    header.gd_offset = (HEADER_SECTORS as u32).into();
    header.num_gd_entries = (entries as u32).into();
    header.free_sector = (free as u32).into();
    for (number, field) in chs.into_iter().flatten().zip(header.parent_file_name.chunks_mut(4)) {
        field.copy_from_slice(U32::new(u32::try_from(number).unwrap_or(u32::MAX)).as_bytes());
    }
    for (to, from) in header.name[..59].iter_mut().zip(name.bytes()) {
        *to = from;
    }
    file.set_len(free * SECTOR).map_err(|e| Error::io("extend", &e).in_file(file.path()))?;
    codec::write_all(file, 0, header.as_bytes(), "the COWD header")?;
    file.sync().map_err(|e| Error::io("flush", &e).in_file(file.path()))
}
