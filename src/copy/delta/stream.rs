//! The form of a delta: a header, runs, an end record. All numbers are little-endian.
//!
//! Every record ends with a CRC-32C of itself, every run of data has one of its bytes, and the end record
//! one of all records in order. So whatever is cut off, changed, moved or mixed in shows.

use std::io::{self, Read, Write};

use sha2::{Digest, Sha256};
use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::MAX_RUN;
use crate::error::{Error, Result};
use crate::formats::Identity;

/// First bytes of a delta.
pub const MAGIC: [u8; 8] = *b"flatdelt";
/// The version that is written and read.
const VERSION: u32 = 1;
/// Bytes in whose multiples runs begin and end.
const SECTOR: u64 = 512;

const DATA: [u8; 4] = *b"DATA";
const ZERO: [u8; 4] = *b"ZERO";
const END: [u8; 4] = *b"END ";

const VHD: u32 = 1;
const VHDX: u32 = 2;
const VMDK: u32 = 3;

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawIdentity {
    /// [`VHD`], [`VHDX`] or [`VMDK`].
    kind: U32,
    reserved: U32,
    /// VHD: unique id. VHDX: data-write GUID as it lies in headers. VMDK: CID in the first four.
    value: [u8; 16],
}

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    length: U32,
    size_before: U64,
    size_after: U64,
    logical_sector: U32,
    reserved: U32,
    before: RawIdentity,
    after: RawIdentity,
    reserved_2: [u8; 36],
    crc: U32,
}
const _: () = assert!(size_of::<RawHeader>() == 128);

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRun {
    kind: [u8; 4],
    /// Of the data that follows; 0 for zeroes.
    data_crc: U32,
    start: U64,
    length: U64,
    reserved: U32,
    crc: U32,
}
const _: () = assert!(size_of::<RawRun>() == 32);

/// What follows the first 32 bytes of an end record, which have the form of a run's.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEnd {
    data_runs: U64,
    zero_runs: U64,
    data_bytes: U64,
    crc: U32,
    reserved: U32,
}
const _: () = assert!(size_of::<RawEnd>() == 32);

/// What a delta is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the ancestor's disk.
    pub size_before: u64,
    /// Bytes of the image's disk, not less.
    pub size_after: u64,
    /// The guest's logical sector in bytes.
    pub logical_sector: u32,
    /// What the ancestor is known by.
    pub before: Identity,
    /// What the image is known by.
    pub after: Identity,
}

/// How much a delta holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Summary {
    /// Runs of data.
    pub data_runs: u64,
    /// Bytes in them.
    pub data_bytes: u64,
    /// Runs of zeroes.
    pub zero_runs: u64,
    /// Bytes in them.
    pub zero_bytes: u64,
    /// Bytes of the whole delta.
    pub length: u64,
}

/// A part of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First byte.
    pub start: u64,
    /// Bytes, not 0.
    pub len: u64,
    /// All zeroes; otherwise the bytes are there.
    pub zero: bool,
}

/// The CRC of a record whose last four bytes hold it.
fn own_crc(record: &[u8]) -> u32 {
    crc32c::crc32c(record.get(..record.len() - 4).unwrap_or_default())
}

impl RawIdentity {
    fn of(identity: &Identity) -> Result<Self> {
        let mut value = [0; 16];
        let kind = match identity {
            Identity::VhdUniqueId(id) => {
                value = *id;
                VHD
            }
            Identity::VhdxDataWrite(ids) => {
                let [id] = ids[..] else { return Err(Error::invalid("a disk has one identity")) };
                value = id.to_bytes_le();
                VHDX
            }
            Identity::VmdkCid(cid) => {
                value[..4].copy_from_slice(&cid.to_le_bytes());
                VMDK
            }
        };
        Ok(Self { kind: kind.into(), reserved: 0.into(), value })
    }

    fn read(&self) -> Option<Identity> {
        let [a, b, c, d, ..] = self.value;
        match self.kind.get() {
            VHD => Some(Identity::VhdUniqueId(self.value)),
            VHDX => Some(Identity::VhdxDataWrite(vec![Uuid::from_bytes_le(self.value)])),
            VMDK => Some(Identity::VmdkCid(u32::from_le_bytes([a, b, c, d]))),
            _ => None,
        }
    }
}

impl Header {
    fn encode(&self) -> Result<RawHeader> {
        let mut raw = RawHeader {
            magic: MAGIC,
            version: VERSION.into(),
            length: (size_of::<RawHeader>() as u32).into(),
            size_before: self.size_before.into(),
            size_after: self.size_after.into(),
            logical_sector: self.logical_sector.into(),
            before: RawIdentity::of(&self.before)?,
            after: RawIdentity::of(&self.after)?,
            ..RawHeader::new_zeroed()
        };
        raw.crc = own_crc(raw.as_bytes()).into();
        Ok(raw)
    }

    fn decode(raw: &RawHeader) -> Result<Self> {
        if raw.magic != MAGIC {
            let e = Error::new(crate::ErrorKind::NotThisFormat, "this is no delta");
            return Err(e.hint("`flatdisk delta` writes one"));
        }
        if raw.version.get() != VERSION {
            return Err(Error::unsupported(format!("version {} of the delta", raw.version)));
        }
        let identities = raw.before.read().zip(raw.after.read());
        let sizes = raw.size_before.get()..=raw.size_after.get();
        let legal = own_crc(raw.as_bytes()) == raw.crc.get()
            && raw.length.get() as usize == size_of::<RawHeader>()
            && !sizes.is_empty()
            && raw.size_after.get() <= i64::MAX as u64;
        let Some((before, after)) = identities.filter(|_| legal) else {
            return Err(Error::corrupt("the delta's header is damaged").at(0));
        };
        Ok(Self {
            size_before: raw.size_before.get(),
            size_after: raw.size_after.get(),
            logical_sector: raw.logical_sector.get(),
            before,
            after,
        })
    }
}

/// Writes a delta.
pub struct Writer<'a> {
    out: &'a mut dyn Write,
    chain: u32,
    summary: Summary,
    /// A run of zeroes that may go on.
    zeroes: Option<Run>,
}

impl<'a> Writer<'a> {
    /// Begins one.
    pub fn new(out: &'a mut dyn Write, header: &Header) -> Result<Self> {
        let raw = header.encode()?;
        let mut writer =
            Self { out, chain: raw.crc.get(), summary: Summary::default(), zeroes: None };
        writer.put(raw.as_bytes())?;
        Ok(writer)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.summary.length += bytes.len() as u64;
        self.out.write_all(bytes).map_err(|e| Error::io("writing the delta", &e))
    }

    fn record(&mut self, kind: [u8; 4], data_crc: u32, start: u64, length: u64) -> Result<()> {
        let mut raw = RawRun {
            kind,
            data_crc: data_crc.into(),
            start: start.into(),
            length: length.into(),
            ..RawRun::new_zeroed()
        };
        raw.crc = own_crc(raw.as_bytes()).into();
        if kind != END {
            self.chain = crc32c::crc32c_append(self.chain, raw.as_bytes());
        }
        self.put(raw.as_bytes())
    }

    /// Adds bytes at byte `start` of the disk, behind all that was added before, at most [`MAX_RUN`].
    pub fn data(&mut self, start: u64, bytes: &[u8]) -> Result<()> {
        self.end_zeroes()?;
        self.summary.data_runs += 1;
        self.summary.data_bytes += bytes.len() as u64;
        self.record(DATA, crc32c::crc32c(bytes), start, bytes.len() as u64)?;
        self.put(bytes)
    }

    /// Adds zeroes, behind all that was added before. Neighbours become one run.
    pub fn zeroes(&mut self, start: u64, len: u64) -> Result<()> {
        if let Some(run) = &mut self.zeroes
            && run.start + run.len == start
        {
            run.len += len;
            return Ok(());
        }
        self.end_zeroes()?;
        self.zeroes = Some(Run { start, len, zero: true });
        Ok(())
    }

    fn end_zeroes(&mut self) -> Result<()> {
        let Some(run) = self.zeroes.take() else { return Ok(()) };
        self.summary.zero_runs += 1;
        self.summary.zero_bytes += run.len;
        self.record(ZERO, 0, run.start, run.len)
    }

    /// Completes the delta.
    pub fn finish(mut self) -> Result<Summary> {
        self.end_zeroes()?;
        let (chain, zero_bytes) = (self.chain, self.summary.zero_bytes);
        let length = self.summary.length + (size_of::<RawRun>() + size_of::<RawEnd>()) as u64;
        self.record(END, chain, zero_bytes, length)?;
        let mut end = RawEnd {
            data_runs: self.summary.data_runs.into(),
            zero_runs: self.summary.zero_runs.into(),
            data_bytes: self.summary.data_bytes.into(),
            ..RawEnd::new_zeroed()
        };
        end.crc = crc32c::crc32c(&end.as_bytes()[..24]).into();
        self.put(end.as_bytes())?;
        self.out.flush().map_err(|e| Error::io("writing the delta", &e))?;
        Ok(self.summary)
    }
}

/// Reads a delta, and checks all of it on the way.
pub struct Reader<R> {
    input: R,
    header: Header,
    chain: u32,
    digest: Sha256,
    summary: Summary,
    /// One past the last run.
    end: u64,
}

impl<R: Read> Reader<R> {
    /// Reads the header.
    pub fn new(input: R) -> Result<Self> {
        let mut raw = RawHeader::new_zeroed();
        let mut reader = Self {
            input,
            header: Header {
                size_before: 0,
                size_after: 0,
                logical_sector: 0,
                before: Identity::RAW,
                after: Identity::RAW,
            },
            chain: 0,
            digest: Sha256::new(),
            summary: Summary::default(),
            end: 0,
        };
        reader.fill(raw.as_mut_bytes())?;
        reader.header = Header::decode(&raw)?;
        reader.chain = raw.crc.get();
        reader.digest.update(raw.as_bytes());
        Ok(reader)
    }

    fn fill(&mut self, buf: &mut [u8]) -> Result<()> {
        let at = self.summary.length;
        self.input.read_exact(buf).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => Error::corrupt("the delta is cut off").at(at),
            _ => Error::io("reading the delta", &e).at(at),
        })?;
        self.summary.length += buf.len() as u64;
        Ok(())
    }

    /// The next run, with its bytes in `buf` if it has any; `None` behind the last one, when all is right.
    pub fn next(&mut self, buf: &mut Vec<u8>) -> Result<Option<Run>> {
        let at = self.summary.length;
        let damaged = |what: &str| Error::corrupt(format!("the delta is damaged: {what}")).at(at);
        let mut raw = RawRun::new_zeroed();
        self.fill(raw.as_mut_bytes())?;
        if own_crc(raw.as_bytes()) != raw.crc.get() {
            return Err(damaged("the checksum of a record is wrong"));
        }
        if raw.kind == END {
            return self.finish(&raw).map(|()| None);
        }
        self.chain = crc32c::crc32c_append(self.chain, raw.as_bytes());
        let (start, len) = (raw.start.get(), raw.length.get());
        let run = Run { start, len, zero: raw.kind == ZERO };
        let end = start.checked_add(len).filter(|end| *end <= self.header.size_after);
        let aligned = start.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR) && len > 0;
        let (Some(end), true) = (end, aligned && start >= self.end) else {
            return Err(damaged("a run lies where none can lie"));
        };
        self.end = end;
        match raw.kind {
            ZERO => {
                self.summary.zero_runs += 1;
                self.summary.zero_bytes += len;
            }
            DATA if len <= MAX_RUN => {
                self.summary.data_runs += 1;
                self.summary.data_bytes += len;
                buf.resize(len as usize, 0);
                self.fill(buf)?;
                if crc32c::crc32c(buf) != raw.data_crc.get() {
                    return Err(damaged("the checksum of a run is wrong"));
                }
            }
            _ => return Err(damaged("there is a record of an unknown kind")),
        }
        Ok(Some(run))
    }

    /// Checks the end record, of which the first half is read.
    fn finish(&mut self, first: &RawRun) -> Result<()> {
        let damaged = |what: &str| Error::corrupt(format!("the delta is damaged: {what}"));
        let mut end = RawEnd::new_zeroed();
        self.fill(end.as_mut_bytes())?;
        let s = &self.summary;
        let counts = [s.data_runs, s.zero_runs, s.data_bytes, s.zero_bytes, s.length];
        let told = [
            end.data_runs.get(),
            end.zero_runs.get(),
            end.data_bytes.get(),
            first.start.get(),
            first.length.get(),
        ];
        let whole = crc32c::crc32c(&end.as_bytes()[..24]) == end.crc.get()
            && end.reserved.get() == 0
            && first.data_crc.get() == self.chain;
        if !whole || counts != told {
            return Err(damaged("its end does not belong to its beginning"));
        }
        self.digest.update(first.as_bytes());
        self.digest.update(end.as_bytes());
        let behind = self.input.read(&mut [0]).map_err(|e| Error::io("reading the delta", &e))?;
        match behind {
            0 => Ok(()),
            _ => Err(damaged("something follows its end").at(self.summary.length)),
        }
    }

    /// After the last run: how much it was, and sixteen bytes that tell this delta from all others.
    pub fn told(self) -> (Header, Summary, [u8; 16]) {
        let digest = self.digest.finalize();
        let mut id = [0; 16];
        id.copy_from_slice(&digest[..16]);
        (self.header, self.summary, id)
    }
}
