//! Archives and partitioned disks that are damaged, and everything that is looked up in them.

use std::path::{Component, Path};
use std::sync::Arc;

use fastrand::Rng;
use flatdisk::disk::flat;
use flatdisk::formats::{self, OpenOptions, ova};
use flatdisk::storage::archive::{Archive, tar};
use flatdisk::storage::memory::{MemoryFile, MemoryHost};
use flatdisk::storage::{Access, Host, Storage};
use flatdisk::volumes;

use crate::common::partitions::{entry, gpt, mbr};

/// Values that mean something somewhere.
const VALUES: [u8; 12] = [0, 1, 2, 0x7f, 0x80, 0xff, b'0', b'7', b'/', b'x', b'g', b'L'];
const BLOCK: usize = tar::BLOCK as usize;

/// An archive, and a mark behind it of a change under way.
pub fn archive() -> Vec<u8> {
    let mut bytes = Vec::new();
    let manifest = format!("SHA256(m.ovf)= {}\nSHA1(d.vhd)= {}\n", "0".repeat(64), "0".repeat(40));
    let long = [b'n'; 200];
    let mut record = tar::encode("././@LongLink", long.len() as u64, 0).unwrap();
    record[156] = b'L';
    let parts: [(&str, &[u8]); 3] =
        [("m.ovf", b"<Envelope/>"), ("m.mf", manifest.as_bytes()), ("d.vhd", &[1; 1536])];
    for (name, contents) in parts {
        bytes.extend(tar::encode(name, contents.len() as u64, 0).unwrap());
        bytes.extend(contents);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    }
    bytes.extend(record);
    bytes.extend(long);
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    bytes.extend(tar::encode("short", 0, 0).unwrap());
    bytes.resize(bytes.len() + 2 * BLOCK, 0);
    let len = bytes.len() as u64;
    bytes.resize(bytes.len() + 2 * BLOCK, 0);
    bytes.extend(b"flatdisk redo 1\n");
    bytes.extend(len.to_le_bytes());
    bytes.extend(100u64.to_le_bytes());
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    bytes
}

/// Damages an archive and does everything with it that only reads, and puts another description in.
pub fn try_archive(good: &[u8], rng: &mut Rng) {
    let mut bytes = good.to_vec();
    for _ in 0..rng.usize(1..5) {
        // Headers, mostly.
        let block = rng.usize(..bytes.len() / BLOCK) * BLOCK;
        let place = *rng.choice(&[0, 100, 124, 135, 148, 156, 257, 345, 16, 24, 31]).unwrap();
        let at = block + if rng.bool() { place } else { rng.usize(..BLOCK) };
        bytes[at] = *rng.choice(&VALUES).unwrap();
    }
    if rng.u8(..4) == 0 {
        bytes.truncate(rng.usize(..bytes.len()));
    }
    // Sums are put right, or nothing behind them would be looked at.
    for header in bytes.chunks_exact_mut(BLOCK).filter(|block| block[257..262] == *b"ustar") {
        header[148..156].fill(b' ');
        let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    let path = Path::new("/x.ova");
    let file = MemoryFile::new(path, &bytes);
    let Ok(found) = Archive::open(file) else { return };
    for member in found.members() {
        assert!(member.name.components().all(|part| matches!(part, Component::Normal(_))));
        let inside =
            member.at.checked_add(member.size).is_some_and(|end| end <= bytes.len() as u64);
        assert!(member.problem.is_some() || inside, "{member:?}");
        if let Ok(file) = found.member(&member.name) {
            let _ = formats::recognise(&*file);
        }
    }
    let memory = MemoryHost::new();
    memory.insert(MemoryFile::new(path, &bytes));
    let host: Arc<dyn Host> = memory;
    let options = OpenOptions::new(Access::Read);
    let _ = ova::check(&host, path, &options, &());
    let _ = ova::repair(&host, path, &options, true, &());
    if ova::describe::describe(&host, path, b"<Envelope></Envelope>", rng.bool(), &()).is_ok() {
        let text = ova::describe::description(&host, path).expect("it was put in");
        assert_eq!(text, b"<Envelope></Envelope>\n");
    }
}

/// A disk with a partition table of every kind at once, and a few signatures, damaged.
pub fn try_disk(rng: &mut Rng) {
    let file = MemoryFile::new("/disk", &[]);
    file.set_len(8 << 20).unwrap();
    let sector = |rng: &mut Rng| rng.u64(..(8 << 20) / 512);
    if rng.bool() {
        let parts: Vec<_> = (0..rng.usize(..8)).map(|_| (sector(rng), sector(rng))).collect();
        gpt(&*file, 128, 128, &parts);
    } else {
        mbr(&*file, 0, &[entry(0x83, 64, 64), entry(0x05, 1024, 8192), entry(0x07, 200, 300)]);
        let mut at = 1024;
        for _ in 0..rng.usize(..6) {
            let next = rng.u32(..9000);
            mbr(&*file, at, &[entry(0x83, rng.u32(..64), rng.u32(..64)), entry(0x05, next, 64)]);
            at = (1024 + u64::from(next)).min(16_000);
        }
    }
    let signatures: [(u64, &[u8]); 5] = [
        (1024 + 0x38, &[0x53, 0xef]),
        (3, b"NTFS    "),
        (0, b"XFSB"),
        (0, b"LUKS\xba\xbe"),
        (4086, b"SWAPSPACE2"),
    ];
    for _ in 0..rng.usize(..6) {
        let (at, bytes) = *rng.choice(&signatures).unwrap();
        file.write_at(sector(rng).min(16_000) * 512 + at, bytes).unwrap();
    }
    for _ in 0..rng.usize(1..40) {
        let near = rng.u64(..34 * 512);
        let chain = 1024 * 512 + rng.u64(..512);
        let at = *rng.choice(&[near, chain, (8 << 20) - 1 - near]).unwrap();
        file.write_at(at, &[*rng.choice(&VALUES).unwrap()]).unwrap();
    }
    for sector in [512, 4096] {
        let disk = flat::raw(file.clone(), sector).unwrap();
        if let Ok(found) = volumes::with_usage(&disk) {
            assert!(found.partitions.len() <= 1024 + 260);
            for part in &found.partitions {
                let end = part.start.checked_add(part.size);
                let place = found.place(Some(part.number));
                assert!(place.is_err() || end.is_some(), "{part:?}");
                if let Ok(place) = place {
                    assert!(place.start <= place.end && place.end <= disk.size(), "{place:?}");
                }
            }
        }
    }
}
