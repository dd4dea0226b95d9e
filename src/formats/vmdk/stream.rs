//! Stream-optimised extents: compressed grains in the order of writing, tables among or behind them.
//!
//! They are read, never written in place. Files come in several layouts; what they have in common is
//! a directory, found through the header or through a footer at the end. Where neither leads to one,
//! as in a file that was cut off, the grains are found by following them from the first one on
//! ([`Salvage`]); what lies behind the last one found is lost, and says so.

pub mod write;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use libdeflater::{DecompressionError, Decompressor};
use parking_lot::Mutex;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::codec;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::repair::stored;
use crate::storage::Storage;

use super::grains::{Dialect, Grain, GrainTables, TableCaches};
use super::layout::{self, GD_AT_END, Header, SECTOR};

/// How far from the end a footer is looked for, over sectors of zeroes.
pub(super) const FOOTER_SEARCH: u64 = 1 << 20;
/// Inflated grains kept, in bytes; at least one is.
const INFLATED_BYTES: usize = 4 << 20;
/// Most sectors that a marker may announce to be followed over.
const MAX_SKIPPED: u64 = 64;

/// What precedes a compressed grain.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct GrainHead {
    /// The grain's first sector on the disk.
    pub lba: U64,
    /// Bytes of compressed data that follow.
    pub size: U32,
}

/// What precedes metadata. Read in place of a [`GrainHead`] it has a size of 0.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Marker {
    /// Of a marker: sectors that follow.
    pub head: GrainHead,
    /// Which metadata.
    pub kind: U32,
}

const _: () = assert!(size_of::<GrainHead>() == 12);
const _: () = assert!(size_of::<Marker>() == 16);

/// Bytes before the compressed data of a grain in a stream without markers: its size alone.
const BARE_HEAD: u64 = 4;

const END_OF_STREAM: u32 = 0;
const GRAIN_DIRECTORY: u32 = 2;
const FOOTER: u32 = 3;

impl Marker {
    /// Reads the one at byte `at`.
    pub(super) fn read(file: &dyn Storage, at: u64) -> Result<Self> {
        let bytes: [u8; 16] = codec::read_array(file, at, "a marker")?;
        Ok(zerocopy::transmute!(bytes))
    }
}

/// Finds the footer of a stream, whose fields stand in for those of `header`.
pub fn find_footer(file: &dyn Storage, file_len: u64, header: &Header) -> Result<Option<Header>> {
    let end = file_len / SECTOR * SECTOR;
    let mut tail = vec![0; end.min(FOOTER_SEARCH) as usize];
    let from = end - tail.len() as u64;
    codec::read_exact(file, from, &mut tail, "the end of the file")?;
    let sectors = tail.chunks_exact(SECTOR as usize);
    let Some(last) = sectors.clone().rposition(|s| s.iter().any(|b| *b != 0)) else {
        return Ok(None);
    };
    let footer_at = from + last as u64 * SECTOR;
    if !tail[last * SECTOR as usize..].starts_with(&layout::MAGIC) || footer_at < 2 * SECTOR {
        return Ok(None);
    }
    let marker = Marker::read(file, footer_at - SECTOR)?;
    let footer = Header::read(file, footer_at)?;
    if marker.kind.get() != FOOTER || marker.head.size.get() != 0 || footer.gd == GD_AT_END {
        return Ok(None);
    }
    let same = |h: &Header| (h.capacity, h.grain, h.entries_per_table, h.compressed());
    if same(&footer) != same(header) {
        let what = "header and footer disagree about capacity, grains or tables";
        return Err(Error::corrupt(what).at(footer_at).in_file(file.path()));
    }
    Ok(Some(footer))
}

/// What stands at byte `at` of a stream.
pub(super) enum Piece {
    /// A compressed grain, by its number on the disk.
    Grain { number: u64, at: u64 },
    /// The marker of metadata of a kind.
    Marker { kind: u32, at: u64 },
}

/// Follows a stream with markers from sector `first` on: grains of `grain` sectors, of which the disk
/// has `grains`. Ends where something makes no sense, or when `visit` has seen enough and returns `false`.
pub(super) fn follow(
    file: &dyn Storage,
    file_len: u64,
    (grain, grains): (u64, u64),
    first: u64,
    visit: &mut dyn FnMut(Piece) -> Result<bool>,
) -> Result<()> {
    let mut sector = first.max(1);
    while let Some(at) = layout::bytes(sector).filter(|at| at + SECTOR <= file_len) {
        let marker = Marker::read(file, at)?;
        let (value, size) = (marker.head.lba.get(), u64::from(marker.head.size.get()));
        let (piece, legal, next) = if size > 0 {
            let (number, end) = (value / grain, at + size_of::<GrainHead>() as u64 + size);
            let legal = value.is_multiple_of(grain)
                && number < grains
                && size <= largest(grain * SECTOR)
                && end <= file_len;
            (Piece::Grain { number, at }, legal, end.div_ceil(SECTOR))
        } else {
            let kind = marker.kind.get();
            // Of a grain table, or of something unknown, the length is believed up to a limit.
            let known = matches!(kind, END_OF_STREAM | GRAIN_DIRECTORY | FOOTER);
            let legal = known || value <= MAX_SKIPPED;
            (Piece::Marker { kind, at }, legal, sector.saturating_add(1).saturating_add(value))
        };
        if !legal || !visit(piece)? {
            break;
        }
        sector = next;
    }
    Ok(())
}

/// The grains of a stream without directory.
#[derive(Debug)]
pub struct Salvage {
    /// Number and sector in the file of each grain found, in order.
    pub grains: Vec<(u64, u32)>,
    /// Grains before this one that were not found are zeroes; those from here on are lost.
    pub known: u64,
}

impl Salvage {
    /// Follows the grains from the first one on. A file in which none is found is refused.
    pub fn scan(file: &dyn Storage, file_len: u64, header: &Header) -> Result<Self> {
        let total = header.capacity.div_ceil(header.grain);
        let mut grains: Vec<(u64, u32)> = Vec::new();
        let mut ascending = true;
        let mut complete = false;
        follow(file, file_len, (header.grain, total), header.overhead, &mut |piece| match piece {
            Piece::Grain { number, at } => {
                let Ok(place) = u32::try_from(at / SECTOR) else { return Ok(false) };
                ascending &= grains.last().is_none_or(|(last, _)| *last < number);
                grains.push((number, place));
                Ok(true)
            }
            Piece::Marker { kind, .. } => {
                // All grains come before the directory.
                complete = matches!(kind, END_OF_STREAM | GRAIN_DIRECTORY | FOOTER);
                Ok(!complete)
            }
        })?;
        if grains.is_empty() {
            return Err(Error::corrupt(
                "the file was cut off: neither a grain directory nor any grain is left",
            ));
        }
        let known = match grains.last() {
            _ if complete => total,
            Some((last, _)) if ascending => last + 1,
            _ => 0,
        };
        // Where a grain was written twice the first one counts.
        grains.sort_by_key(|(grain, _)| *grain);
        grains.dedup_by_key(|(grain, _)| *grain);
        Ok(Self { grains, known })
    }

    /// Writes the entries of the grains from `first` on as a grain table has them.
    pub fn fill(&self, first: u64, page: &mut [u8]) {
        let (entries, _) = page.as_chunks_mut::<4>();
        for (entry, grain) in entries.iter_mut().zip(first..) {
            let value = match self.grains.binary_search_by_key(&grain, |(g, _)| *g) {
                Ok(index) => self.grains[index].1,
                Err(_) if grain < self.known => 0,
                Err(_) => u32::MAX,
            };
            *entry = value.to_le_bytes();
        }
    }
}

/// Most bytes that a grain of `grain` bytes takes when it does not compress, with room to spare.
fn largest(grain: u64) -> u64 {
    grain + grain / 8 + 1024
}

/// Reads and inflates grain number `grain`, which begins at byte `at` of the file.
pub fn inflate(tables: &GrainTables, grain: u64, at: u64) -> Result<Arc<[u8]>> {
    let mut data = vec![0; tables.grain as usize];
    inflate_to(tables, grain, at, &mut data)?;
    Ok(data.into())
}

/// [`inflate`] to `out`, which has the length of a grain.
pub fn inflate_to(tables: &GrainTables, grain: u64, at: u64, out: &mut [u8]) -> Result<()> {
    let file = &*tables.file;
    let damaged = |what: String| {
        Error::corrupt(format!("compressed grain {grain}: {what}")).at(at).in_file(file.path())
    };
    let packed = read_packed(tables, grain, at)?;
    let inflated = Decompressor::new().zlib_decompress(&packed, out).map_err(|e| match e {
        DecompressionError::BadData => damaged("the compressed data is bad".to_owned()),
        DecompressionError::InsufficientSpace => {
            damaged(format!("it inflates to more than {} bytes", tables.grain))
        }
    })?;
    let needed = tables.grain.min(tables.len - grain * tables.grain);
    if (inflated as u64) < needed {
        return Err(damaged(format!("it inflates to {inflated} bytes")));
    }
    out[inflated..].fill(0);
    Ok(())
}

/// Reads the compressed bytes of grain number `grain`, which begins at byte `at` of the file.
fn read_packed(tables: &GrainTables, grain: u64, at: u64) -> Result<Vec<u8>> {
    let file = &*tables.file;
    let damaged = |what: String| {
        Error::corrupt(format!("compressed grain {grain}: {what}")).at(at).in_file(file.path())
    };
    let (size, head) = match tables.dialect {
        Dialect::Packed { markers: false } => {
            (codec::read_array(file, at, "a grain").map(u32::from_le_bytes)?, BARE_HEAD)
        }
        _ => {
            let bytes: [u8; size_of::<GrainHead>()] = codec::read_array(file, at, "a grain")?;
            let head: GrainHead = zerocopy::transmute!(bytes);
            if head.lba.get() != grain * (tables.grain / SECTOR) {
                return Err(damaged(format!("it says it belongs to sector {}", head.lba)));
            }
            (head.size.get(), bytes.len() as u64)
        }
    };
    if size == 0 || u64::from(size) > largest(tables.grain) {
        return Err(damaged(format!("{size} bytes are no size of a grain")));
    }
    let mut packed = vec![0; size as usize];
    codec::read_exact(file, at + head, &mut packed, "a compressed grain")?;
    Ok(packed)
}

/// The grains inflated last, for readers that come back in pieces.
#[derive(Default)]
pub struct InflatedGrains {
    recent: Mutex<VecDeque<(u64, Arc<[u8]>)>>,
}

impl InflatedGrains {
    /// The grain that `unit` names, from memory or by `inflate`.
    pub fn get(&self, unit: u64, inflate: impl FnOnce() -> Result<Arc<[u8]>>) -> Result<Arc<[u8]>> {
        let known = |recent: &VecDeque<(u64, Arc<[u8]>)>| {
            recent.iter().find(|(name, _)| *name == unit).map(|(_, data)| data.clone())
        };
        if let Some(data) = known(&self.recent.lock()) {
            return Ok(data);
        }
        let data = inflate()?;
        let mut recent = self.recent.lock();
        if known(&recent).is_none() {
            while recent.iter().map(|(_, d)| d.len()).sum::<usize>() + data.len() > INFLATED_BYTES
                && recent.pop_front().is_some()
            {}
            recent.push_back((unit, data.clone()));
        }
        Ok(data)
    }
}

/// Checks the grains of a stream: inflates every one, calling `found` with the place and the fault of
/// each bad one. Says how many grains there are.
pub fn check_grains(
    tables: &GrainTables,
    cache: &TableCaches,
    found: &mut dyn FnMut(u64, String),
) -> Result<u64> {
    let mut stored = 0;
    for page in 0..tables.grains().div_ceil(tables.entries_per_page()) {
        let first = page * tables.entries_per_page();
        let end = (first + tables.entries_per_page()).min(tables.grains());
        let entries: Vec<(u64, Grain)> = tables.read_page(cache, page, |view| {
            let entry = |grain| (grain, view.grain(grain));
            let stored = |(_, entry): &(u64, Grain)| matches!(entry, Grain::At(_) | Grain::Bad);
            (first..end).map(entry).filter(stored).collect()
        })?;
        for (grain, entry) in entries {
            stored += 1;
            let checked = match entry {
                Grain::At(at) => inflate(tables, grain, at).map(drop),
                _ => Err(Error::corrupt(format!("grain {grain} lies outside the file"))),
            };
            match checked {
                Err(e) if e.kind() == ErrorKind::Corrupt => {
                    found(e.offset().unwrap_or(0), e.what().to_owned());
                }
                other => other?,
            }
        }
    }
    Ok(stored)
}

/// Follows a stream with markers from sector `first` to its end, calling `found` with what lies there
/// and nothing leads to: grains that were stored twice, and bytes behind the end of the stream.
pub fn check_order(
    tables: &GrainTables,
    cache: &TableCaches,
    first: u64,
    found: &mut dyn FnMut(u64, String),
) -> Result<()> {
    let file = &*tables.file;
    let file_len = tables.file_len.load(Ordering::Relaxed);
    let shape = (tables.grain / SECTOR, tables.grains());
    follow(file, file_len, shape, first, &mut |piece| match piece {
        Piece::Grain { number, at } => {
            let page = number / tables.entries_per_page();
            if tables.read_page(cache, page, |view| view.grain(number))? != Grain::At(at) {
                let what = "is stored here, but not looked for here";
                found(at, format!("compressed grain {number} {what}"));
            }
            Ok(true)
        }
        Piece::Marker { kind: END_OF_STREAM, at } => {
            let end = at + SECTOR;
            let stored = stored(file, end..file_len)?;
            if stored > 0 {
                found(end, format!("{stored} bytes lie behind the end of the stream"));
            }
            Ok(false)
        }
        Piece::Marker { .. } => Ok(true),
    })
}
