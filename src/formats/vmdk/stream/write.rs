//! Writing stream-optimised extents, to a file or a pipe: nothing that was written is touched again.
//!
//! The layout is that of VMware's own exports, which every reader knows: header without directory,
//! descriptor, grains in ascending order with the grain table of every 32 MiB of the disk behind its
//! grains, directory, footer (the header again, with the directory's place), end of stream. Grains of
//! zeroes and tables without grains are left out; the directory is complete.
//!
//! ESX takes no version but 3. The area of the descriptor has room to spare: VirtualBox adds lines to it.

use std::io::Write;

use libdeflater::{CompressionLvl, Compressor};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use super::super::layout::{
    DEFAULT_GRAIN, DESCRIPTOR_SECTORS, ENTRIES_PER_TABLE, FLAG_COMPRESSED, FLAG_MARKERS,
    FLAG_NEWLINES, GD_AT_END, Header, SECTOR, TABLE_SECTORS,
};
use super::{END_OF_STREAM, FOOTER, GRAIN_DIRECTORY, GrainHead, Marker};
use crate::error::{Error, ErrorKind, Result};

/// Bytes of the disk in a grain.
pub const GRAIN: u64 = DEFAULT_GRAIN * SECTOR;
/// Marker of a grain table.
const GRAIN_TABLE: u32 = 1;
/// Levels of compression that users choose from, as zlib has them.
pub const LEVELS: std::ops::RangeInclusive<u32> = 1..=9;
/// The level that zlib itself takes.
pub const DEFAULT_LEVEL: u32 = 6;

/// Compresses grains. Each thread has its own.
pub struct Packer(Compressor);

impl Packer {
    /// A compressor of one of [`LEVELS`].
    pub fn new(level: u32) -> Self {
        let level = CompressionLvl::new(level as i32).unwrap_or_default();
        Self(Compressor::new(level))
    }

    /// Appends to `out` what stands in the stream for grain `number` with these contents, of which the
    /// last grain of a disk may have fewer than [`GRAIN`] bytes: it is filled up with zeroes, for 7-Zip
    /// reads no other. Returns its length, whole sectors.
    pub fn pack(&mut self, number: u64, grain: &[u8], out: &mut Vec<u8>) -> Result<usize> {
        if grain.len() < GRAIN as usize {
            let mut whole = grain.to_vec();
            whole.resize(GRAIN as usize, 0);
            return self.pack(number, &whole, out);
        }
        let start = out.len();
        let data = start + size_of::<GrainHead>();
        out.resize(data + self.0.zlib_compress_bound(grain.len()), 0);
        let size = self
            .0
            .zlib_compress(grain, &mut out[data..])
            .map_err(|e| Error::new(ErrorKind::Failed, format!("compressing a grain: {e}")))?;
        let head = GrainHead {
            lba: U64::new(number * DEFAULT_GRAIN),
            // A grain has 64 KiB.
            size: U32::new(size as u32),
        };
        out[start..data].copy_from_slice(head.as_bytes());
        let end = (data + size - start).next_multiple_of(SECTOR as usize) + start;
        out.resize(data + size, 0);
        out.resize(end, 0);
        Ok(end - start)
    }
}

/// A stream that is being written.
pub struct StreamWriter<W> {
    out: W,
    header: Header,
    /// Sectors written.
    pos: u64,
    /// Sector of each grain table, 0 for those left out.
    directory: Vec<U32>,
    /// The grain table under way: its number, and the sector of each grain.
    table: Option<(u64, Vec<U32>)>,
}

impl<W: Write> StreamWriter<W> {
    /// Begins the stream of a disk of `capacity` sectors.
    pub fn begin(mut out: W, capacity: u64, descriptor: &str) -> Result<Self> {
        let header = Header {
            version: 3,
            flags: FLAG_NEWLINES | FLAG_COMPRESSED | FLAG_MARKERS,
            capacity,
            grain: DEFAULT_GRAIN,
            descriptor_at: 1,
            descriptor_len: DESCRIPTOR_SECTORS,
            entries_per_table: ENTRIES_PER_TABLE,
            rgd: 0,
            gd: GD_AT_END,
            overhead: DEFAULT_GRAIN,
            unclean: false,
        };
        if descriptor.len() as u64 > DESCRIPTOR_SECTORS * SECTOR {
            return Err(Error::invalid("the descriptor does not fit into the image"));
        }
        let mut head = header.encode().to_vec();
        head.extend_from_slice(descriptor.as_bytes());
        head.resize((header.overhead * SECTOR) as usize, 0);
        write(&mut out, &head)?;
        let tables = capacity.div_ceil(DEFAULT_GRAIN).div_ceil(ENTRIES_PER_TABLE);
        let directory = vec![U32::ZERO; tables as usize];
        Ok(Self { out, pos: header.overhead, header, directory, table: None })
    }

    /// Adds what [`Packer::pack`] made of grain `number`, which is larger than all before.
    pub fn grain(&mut self, number: u64, packed: &[u8]) -> Result<()> {
        let table = number / ENTRIES_PER_TABLE;
        if self.table.as_ref().is_some_and(|(current, _)| *current != table) {
            self.finish_table()?;
        }
        let place = self.place()?;
        let new = || (table, vec![U32::ZERO; ENTRIES_PER_TABLE as usize]);
        let (_, entries) = self.table.get_or_insert_with(new);
        entries[(number % ENTRIES_PER_TABLE) as usize] = place;
        self.append(packed)
    }

    /// Completes the stream; gives back what it went to, not flushed.
    pub fn finish(mut self) -> Result<W> {
        self.finish_table()?;
        let mut directory = self.directory.as_bytes().to_vec();
        directory.resize(directory.len().next_multiple_of(SECTOR as usize), 0);
        self.marker(GRAIN_DIRECTORY, directory.len() as u64 / SECTOR)?;
        let gd = u64::from(self.place()?.get());
        self.append(&directory)?;
        self.marker(FOOTER, 1)?;
        let footer = Header { gd, ..self.header.clone() };
        self.append(&footer.encode())?;
        self.marker(END_OF_STREAM, 0)?;
        Ok(self.out)
    }

    /// Writes the table under way, if there is one.
    fn finish_table(&mut self) -> Result<()> {
        let Some((number, entries)) = self.table.take() else { return Ok(()) };
        self.marker(GRAIN_TABLE, TABLE_SECTORS)?;
        self.directory[number as usize] = self.place()?;
        self.append(entries.as_bytes())
    }

    fn marker(&mut self, kind: u32, sectors: u64) -> Result<()> {
        let head = GrainHead { lba: sectors.into(), size: U32::ZERO };
        let mut sector = [0; SECTOR as usize];
        let marker = Marker { head, kind: kind.into() };
        sector[..size_of::<Marker>()].copy_from_slice(marker.as_bytes());
        self.append(&sector)
    }

    /// The sector that is written next, as tables have it.
    fn place(&self) -> Result<U32> {
        u32::try_from(self.pos).map(U32::new).map_err(|_| {
            let what = "a stream-optimised image reaches no further than 2 TiB of compressed data";
            Error::new(ErrorKind::NoSpace, what)
        })
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.pos += bytes.len() as u64 / SECTOR;
        write(&mut self.out, bytes)
    }
}

fn write(out: &mut impl Write, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes).map_err(|e| Error::io("write", &e))
}
