//! Stream-optimised VMDK: the input is a list of grains and markers, and says where the directory is
//! to be found, if anywhere.
#![no_main]

use std::io::Write;
use std::path::Path;

use flatdisk::storage::memory::{MemoryFile, MemoryHost};
use flatdisk_fuzz::exercise;
use flate2::{Compression, write::ZlibEncoder};
use libfuzzer_sys::fuzz_target;

const SECTOR: usize = 512;
/// Sectors per grain.
const GRAIN: u64 = 8;
/// Sectors of the disk: two grain tables of 128 entries.
const CAPACITY: u64 = 2 * 128 * GRAIN;
const OVERHEAD: u64 = 4;
const AT_END: u64 = u64::MAX;
/// The longest list of pieces looked at.
const MAX_PIECES: usize = 200;

/// A stream under construction.
#[derive(Default)]
struct Stream {
    bytes: Vec<u8>,
    /// Sector of each grain written last.
    places: Vec<(u64, u32)>,
    directory: Option<u64>,
}

impl Stream {
    fn sector(&self) -> u64 {
        (self.bytes.len() / SECTOR) as u64
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(SECTOR), 0);
    }

    /// A grain of `packed` that claims to be of `claimed` bytes and to belong to sector `lba`.
    fn grain(&mut self, lba: u64, claimed: u32, packed: &[u8]) {
        self.places.push((lba / GRAIN, self.sector() as u32));
        self.bytes.extend(lba.to_le_bytes());
        self.bytes.extend(claimed.to_le_bytes());
        self.bytes.extend(packed);
        self.pad();
    }

    fn marker(&mut self, value: u64, kind: u32) {
        self.bytes.extend(value.to_le_bytes());
        self.bytes.extend([0; 4]);
        self.bytes.extend(kind.to_le_bytes());
        self.pad();
    }

    /// Two grain tables with what was written so far, and the directory that leads to them.
    fn tables(&mut self) {
        let mut entries = [0u32; 256];
        for (grain, sector) in &self.places {
            if let Some(entry) = entries.get_mut(*grain as usize) {
                *entry = *sector;
            }
        }
        let mut directory = Vec::new();
        for table in entries.chunks(128) {
            self.marker(1, 1);
            directory.extend((self.sector() as u32).to_le_bytes());
            self.bytes.extend(table.iter().flat_map(|entry| entry.to_le_bytes()));
        }
        self.marker(1, 2);
        self.directory = Some(self.sector());
        self.bytes.extend(directory);
        self.pad();
    }

    fn footer(&mut self, gd: u64) {
        self.marker(1, 3);
        self.bytes.extend(header(gd));
    }

    /// One piece, made from `input`; what is left of it.
    fn piece<'a>(&mut self, input: &'a [u8]) -> Option<&'a [u8]> {
        let [kind, a, b, c, rest @ ..] = input else { return None };
        let wild = u64::from_le_bytes([*a, *b, 0, *c, 0, *c, 0, *a]);
        let grain = u64::from(*a) * GRAIN;
        let (data, rest) = rest.split_at(rest.len().min(usize::from(*b)));
        match kind % 8 {
            0 | 1 => {
                let mut whole = [*c; (GRAIN as usize) * SECTOR];
                whole[..data.len()].copy_from_slice(data);
                let len = if kind & 8 == 0 { whole.len() } else { usize::from(*c) * 16 };
                let packed = deflated(&whole[..len]);
                self.grain(grain, packed.len() as u32, &packed);
            }
            // Raw bytes in place of compressed ones.
            2 => self.grain(grain, u32::from(*b), data),
            // More than a grain, in a few bytes.
            3 => {
                let packed = deflated(&vec![0; usize::from(*c) << 12]);
                self.grain(grain, packed.len() as u32, &packed);
            }
            4 => self.grain(wild, u32::from_le_bytes([*c, *b, *a, *c]), data),
            5 => self.marker(if kind & 8 == 0 { u64::from(*a) } else { wild }, u32::from(*c)),
            6 => self.tables(),
            _ => {
                self.bytes.extend(data);
                if kind & 8 == 0 {
                    self.pad();
                }
            }
        }
        Some(rest)
    }
}

fn deflated(data: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(data).expect("memory takes all writes");
    encoder.finish().expect("memory takes all writes")
}

fn header(gd: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, b"KDMV");
    put(4, &3u32.to_le_bytes());
    put(8, &0x3_0001u32.to_le_bytes());
    put(12, &CAPACITY.to_le_bytes());
    put(20, &GRAIN.to_le_bytes());
    put(28, &1u64.to_le_bytes());
    put(36, &2u64.to_le_bytes());
    put(44, &128u32.to_le_bytes());
    put(56, &gd.to_le_bytes());
    put(64, &OVERHEAD.to_le_bytes());
    put(73, b"\n \r\n");
    put(77, &1u16.to_le_bytes());
    bytes
}

fuzz_target!(|data: &[u8]| {
    let Some((&first, mut rest)) = data.split_first() else { return };
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=1234abcd\nparentCID=ffffffff\n\
         createType=\"streamOptimized\"\nRDONLY {CAPACITY} SPARSE \"x.vmdk\"\n"
    );
    let mut stream = Stream { bytes: vec![0; SECTOR], ..Stream::default() };
    stream.bytes.extend(text.as_bytes());
    stream.bytes.resize(OVERHEAD as usize * SECTOR, 0);
    for _ in 0..MAX_PIECES {
        let Some(left) = stream.piece(rest) else { break };
        rest = left;
    }
    if first & 1 == 1 {
        stream.tables();
    }
    let directory = stream.directory.unwrap_or(u64::from(first));
    let in_header = match first >> 1 & 3 {
        0 => directory,
        1 => {
            stream.footer(directory);
            AT_END
        }
        2 => {
            stream.footer(directory);
            stream.marker(0, 0);
            AT_END
        }
        // Neither: the grains are to be found one by one.
        _ => AT_END,
    };
    stream.bytes[..SECTOR].copy_from_slice(&header(in_header));
    stream.bytes.truncate(stream.bytes.len() - usize::from(first >> 3));
    let host = MemoryHost::new();
    let path = Path::new("/t/x.vmdk");
    host.insert(MemoryFile::new(path, &stream.bytes));
    exercise(&host, path);
});
