//! Damage: fields with telling values, noise, swapped and missing pieces, other lengths; and
//! checksums that fit again in half of the cases, so that what lies behind them is reached.

use std::sync::Arc;

use fastrand::Rng;
use flatdisk::storage::memory::{MemoryFile, MemoryHost};
use flatdisk::storage::{Host, Storage};

use super::bases::{Base, BaseFile, Seal, Sum};

/// Words that a descriptor may hold.
const WORDS: [&str; 44] = [
    "RW",
    "RDONLY",
    "NOACCESS",
    "SPARSE",
    "FLAT",
    "ZERO",
    "VMFS",
    "VMFSSPARSE",
    "VMFSRDM",
    "SESPARSE",
    "CID=",
    "parentCID=",
    "ffffffff",
    "createType=",
    "\"monolithicSparse\"",
    "\"monolithicFlat\"",
    "\"twoGbMaxExtentSparse\"",
    "\"streamOptimized\"",
    "\"vmfsSparse\"",
    "\"fullDevice\"",
    "\"custom\"",
    "parentFileNameHint=",
    "\"disk.vmdk\"",
    "\"base.vmdk\"",
    "\"../x\"",
    "\"/dev/zero\"",
    "\"",
    "\"\"",
    "=",
    "\n",
    "\r\n",
    "\0",
    " ",
    "0",
    "1",
    "-1",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "36028797018963968",
    "99999999999999999999999",
    "version=",
    "encoding=",
];

/// A damaged copy of a base.
pub fn damaged(base: &Base, rng: &mut Rng) -> Arc<MemoryHost> {
    let host = base.host.fork();
    let mutation = Mutation { base, host: &host };
    for _ in 0..1 + rng.u32(..100) / 60 + rng.u32(..100) / 90 * 6 {
        mutation.step(rng);
    }
    if rng.bool() {
        mutation.seal();
    }
    host
}

struct Mutation<'a> {
    base: &'a Base,
    host: &'a MemoryHost,
}

/// A place in a file of the base.
struct Place {
    file: Arc<MemoryFile>,
    at: u64,
}

impl Mutation<'_> {
    fn step(&self, rng: &mut Rng) {
        match rng.u32(..100) {
            0..55 => self.field(rng),
            55..65 => self.noise(rng),
            65..73 => self.copy(rng),
            73..77 => self.fill(rng),
            77..85 => self.resize(rng),
            85..88 => self.swap(rng),
            88..89 => self.lose(rng),
            _ => self.text(rng),
        }
    }

    fn any_file(&self, rng: &mut Rng) -> &BaseFile {
        &self.base.files[if rng.bool() { 0 } else { rng.usize(..self.base.files.len()) }]
    }

    fn open(&self, file: &BaseFile) -> Option<Arc<MemoryFile>> {
        self.host.file(&file.path)
    }

    /// A place in a structure: half of them where something is stored, others nearby.
    fn place(&self, rng: &mut Rng) -> Option<Place> {
        let chosen = self.any_file(rng);
        let file = self.open(chosen)?;
        let len = file.len().unwrap_or(0);
        let at = match rng.choice(&chosen.runs) {
            Some(run) => {
                let hot = run[rng.usize(..run.len())];
                match rng.u32(..10) {
                    0..6 => hot,
                    6..8 => hot + rng.u64(..16),
                    _ => run[0] / 512 * 512 + rng.u64(..512),
                }
            }
            None => rng.u64(..len.max(1)),
        };
        (at < len).then_some(Place { file, at })
    }

    fn field(&self, rng: &mut Rng) {
        let Some(Place { file, at }) = self.place(rng) else { return };
        let width = [1, 2, 4, 4, 8, 8][rng.usize(..6)];
        let at = at / width * width;
        let mut bytes = [0; 8];
        let bytes = &mut bytes[..width as usize];
        if file.read_at(at, bytes).is_err() {
            return;
        }
        let big = (self.base.format == "vhd") != (rng.u32(..12) == 0);
        let old = bytes.iter().enumerate().fold(0u64, |old, (i, byte)| {
            let shift = if big { width as usize - 1 - i } else { i } * 8;
            old | u64::from(*byte) << shift
        });
        let new = self.value(rng, old, width);
        for (i, byte) in bytes.iter_mut().enumerate() {
            let shift = if big { width as usize - 1 - i } else { i } * 8;
            *byte = (new >> shift) as u8;
        }
        file.write_at(at, bytes).expect("memory takes all writes");
    }

    /// What a field of `width` bytes that holds `old` may get.
    fn value(&self, rng: &mut Rng, old: u64, width: u64) -> u64 {
        let max = u64::MAX >> (64 - width * 8);
        let file = self.any_file(rng);
        let structure = match rng.choice(&file.runs) {
            Some(run) => run[0] / 512 * 512,
            None => 0,
        };
        let size = rng.choice([file.len, self.base.disk_size, structure]).expect("three of them");
        let unit = rng.choice([1, 512, 4096, 1 << 20]).expect("four of them");
        match rng.u32(..24) {
            0 => 0,
            1 => 1,
            2 => max,
            3 => max - rng.u64(..600),
            4 => max / 2 + rng.u64(..2),
            5 => old.wrapping_add(1),
            6 => old.wrapping_sub(1),
            7 => old.wrapping_mul(2),
            8 => old / 2,
            9 | 10 => old ^ (1 << rng.u64(..width * 8)),
            11 => size / unit,
            12 => (size / unit).wrapping_sub(1),
            13 => size / unit + 1,
            14 => structure / unit,
            15 => (structure / unit).wrapping_neg(),
            16 => max / unit,
            17 => max / unit + 1,
            18 => 1 << rng.u64(..width * 8),
            19 => (1 << rng.u64(..width * 8)) - 1,
            20 => old.wrapping_add(rng.u64(..64) * unit),
            21 => old.wrapping_sub(rng.u64(..64) * unit),
            22 => rng.u64(..16),
            _ => rng.u64(..),
        }
    }

    fn noise(&self, rng: &mut Rng) {
        for _ in 0..1 + rng.u32(..6) {
            if let Some(Place { file, at }) = self.place(rng) {
                file.write_at(at, &[rng.u8(..)]).expect("memory takes all writes");
            }
        }
    }

    /// A piece of one structure over another one.
    fn copy(&self, rng: &mut Rng) {
        let (Some(from), Some(to)) = (self.place(rng), self.place(rng)) else { return };
        let mut bytes = vec![0; rng.choice([4, 8, 12, 32, 512, 4096]).expect("six of them")];
        if from.file.read_at(from.at, &mut bytes).is_ok() {
            to.file.write_at(to.at, &bytes).expect("memory takes all writes");
        }
    }

    fn fill(&self, rng: &mut Rng) {
        let Some(Place { file, at }) = self.place(rng) else { return };
        let len = 1usize << rng.u32(..14);
        let byte = rng.choice([0, 0, 0xff, 0x55, 1]).expect("five of them");
        file.write_at(at, &vec![byte; len]).expect("memory takes all writes");
    }

    fn resize(&self, rng: &mut Rng) {
        let chosen = self.any_file(rng);
        let Some(file) = self.open(chosen) else { return };
        let len = file.len().unwrap_or(0);
        let border = rng.choice(&chosen.runs).map_or(0, |run| run[0]);
        let len = match rng.u32(..8) {
            0 => 0,
            1 => border,
            2 => border + rng.u64(..1024),
            3 => len.saturating_sub(1 + rng.u64(..1024)),
            4 => len + 1 + rng.u64(..1024),
            5 => len / 512 * 512,
            6 => len + (1 << rng.u32(..44)),
            _ => rng.u64(..len + 1),
        };
        file.set_len(len).expect("memory takes all lengths");
    }

    fn swap(&self, rng: &mut Rng) {
        let (Some(a), Some(b)) = (self.place(rng), self.place(rng)) else { return };
        let (from, to) = (a.at / 512 * 512, b.at / 512 * 512);
        let (mut first, mut second) = ([0; 512], [0; 512]);
        if a.file.read_at(from, &mut first).is_ok() && b.file.read_at(to, &mut second).is_ok() {
            a.file.write_at(from, &second).expect("memory takes all writes");
            b.file.write_at(to, &first).expect("memory takes all writes");
        }
    }

    /// A file is missing, or is a copy of another one.
    fn lose(&self, rng: &mut Rng) {
        let (lost, other) = (self.any_file(rng), self.any_file(rng));
        if rng.bool() && self.base.files.len() > 1 {
            self.host.remove(&lost.path).expect("memory forgets everything");
        } else if let Some(other) = self.open(other) {
            let copy = MemoryFile::new(&lost.path, &[]);
            let len = other.len().unwrap_or(0);
            copy.set_len(len).expect("memory takes all lengths");
            let mut bytes = vec![0; len.min(64 << 10) as usize];
            other.read_at(0, &mut bytes).expect("inside the file");
            copy.write_at(0, &bytes).expect("memory takes all writes");
            self.host.insert(copy);
        }
    }

    /// A word, a number or a line of a descriptor becomes another one.
    fn text(&self, rng: &mut Rng) {
        let texts: Vec<_> = self.base.files.iter().filter(|file| file.text.is_some()).collect();
        let Some(chosen) = rng.choice(texts) else { return self.field(rng) };
        let (Some(file), Some(range)) = (self.open(chosen), chosen.text.clone()) else { return };
        let mut text = vec![0; (range.end - range.start) as usize];
        if file.read_at(range.start, &mut text).is_err() {
            return;
        }
        let text = String::from_utf8_lossy(&text).into_owned();
        let separators = if rng.u32(..3) == 0 { &['\n'][..] } else { &[' ', '\n', '=', '"'] };
        let mut parts: Vec<String> = text.split_inclusive(separators).map(str::to_owned).collect();
        for _ in 0..1 + rng.u32(..2) {
            let at = rng.usize(..parts.len());
            let word = WORDS[rng.usize(..WORDS.len())].to_owned();
            match rng.u32(..8) {
                0 => drop(parts.remove(at)),
                1 => parts.insert(at, parts[rng.usize(..parts.len())].clone()),
                2 => parts.insert(at, word),
                3 => parts[at] = parts[rng.usize(..parts.len())].clone(),
                4 => parts[at] = self.value(rng, 1, 8).to_string() + " ",
                5 => parts.insert(at, "x".repeat(rng.usize(..5000))),
                6 => parts.truncate(at + 1),
                _ => parts[at] = word,
            }
            if parts.is_empty() {
                parts.push(String::new());
            }
        }
        let mut bytes = parts.concat().into_bytes();
        let whole_file = range.start == 0 && range.end == chosen.len;
        if whole_file {
            file.set_len(bytes.len() as u64).expect("memory takes all lengths");
        } else {
            bytes.resize((range.end - range.start + 512) as usize, 0);
        }
        file.write_at(range.start, &bytes).expect("memory takes all writes");
    }

    /// Makes every checksum fit.
    fn seal(&self) {
        for Seal { file, range, field, kind } in &self.base.seals {
            let Some(file) = self.open(&self.base.files[*file]) else { continue };
            let mut bytes = vec![0; (range.end - range.start) as usize];
            if file.read_at(range.start, &mut bytes).is_err() {
                continue;
            }
            let place = *field as usize..*field as usize + 4;
            let old: [u8; 4] = bytes[place.clone()].try_into().expect("four bytes");
            bytes[place].fill(0);
            let new = match kind {
                Sum::Vhd => (!bytes.iter().map(|b| u32::from(*b)).sum::<u32>()).to_be_bytes(),
                Sum::Crc32c => crc32c::crc32c(&bytes).to_le_bytes(),
            };
            if new != old {
                file.write_at(range.start + field, &new).expect("memory takes all writes");
            }
        }
    }
}
