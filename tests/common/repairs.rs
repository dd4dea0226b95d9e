//! Images with every damage that a repair can undo, and what a crash may leave of repairing them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use flatdisk::disk::Disk;
use flatdisk::formats::{self, CreateSpec, OpenOptions, Report, Scope};
use flatdisk::storage::memory::{MemoryFile, MemoryHost};
use flatdisk::storage::{Access, Host, Storage};

use super::crash::contents;
use super::history::{SECTOR, Sectors, sector};
use super::images::{Image, Kind};
use super::pattern;

const MIB: u64 = 1 << 20;

/// Damages a file; returns where the check must find it, if it says where.
pub type Damage = fn(&MemoryFile) -> Option<u64>;

pub struct Case {
    pub name: &'static str,
    pub image: Image,
    pub damage: Damage,
    pub scope: Scope,
    /// The image is left open by its writer.
    pub open: bool,
    /// The damage takes data away by intent; what is left then is what counts.
    pub loses: bool,
    /// What cannot be read then is given up, and reads as zeroes.
    pub gives_up: bool,
    /// The image is a child of the one that is described.
    pub child: bool,
}

impl Case {
    pub fn name(&self) -> String {
        format!("{}{}: {}", if self.child { "child of " } else { "" }, self.image.name(), self.name)
    }

    pub fn path(&self) -> PathBuf {
        let own = self.image.path();
        if self.child { own.with_file_name("child").with_extension(self.image.format) } else { own }
    }

    pub fn open(&self, host: &Arc<dyn Host>, access: Access) -> flatdisk::Result<Arc<Disk>> {
        Ok(formats::open(host, &self.path(), &OpenOptions::new(access))?.disk)
    }
}

pub fn case(image: &Image, name: &'static str, damage: Damage) -> Case {
    let (image, scope) = (image.clone(), Scope::All);
    let (open, loses, gives_up, child) = (false, false, false, false);
    Case { name, image, damage, scope, open, loses, gives_up, child }
}

/// What is repaired with consent only, and loses nothing here.
fn lossy(image: &Image, name: &'static str, damage: Damage) -> Case {
    Case { scope: Scope::Lossy, ..case(image, name, damage) }
}

/// What is given up with consent.
fn given_up(image: &Image, name: &'static str, damage: Damage) -> Case {
    Case { gives_up: true, ..lossy(image, name, damage) }
}

/// What the disk shows is another part of it.
fn mixed_up(image: &Image, name: &'static str, damage: Damage) -> Case {
    Case { loses: true, ..case(image, name, damage) }
}

pub fn leak(image: &Image, name: &'static str, damage: Damage) -> Case {
    Case { scope: Scope::Leaks, loses: true, ..case(image, name, damage) }
}

fn len(file: &MemoryFile) -> u64 {
    file.len().unwrap()
}

pub fn get(file: &MemoryFile, at: u64, bytes: usize) -> Vec<u8> {
    let mut buf = vec![0; bytes];
    file.read_at(at, &mut buf).unwrap();
    buf
}

pub fn put(file: &MemoryFile, at: u64, data: &[u8]) -> Option<u64> {
    file.write_at(at, data).unwrap();
    Some(at)
}

fn number_at(file: &MemoryFile, at: u64) -> u64 {
    u64::from_le_bytes(get(file, at, 8).try_into().unwrap())
}

/// Byte offset that the 32-bit sector number at `at` stands for.
pub fn place_at(file: &MemoryFile, at: u64) -> u64 {
    u64::from(u32::from_le_bytes(get(file, at, 4).try_into().unwrap())) * 512
}

/// Byte offsets of the grain directory and the redundant one.
pub fn directories(file: &MemoryFile) -> (u64, u64) {
    (number_at(file, 56) * 512, number_at(file, 48) * 512)
}

/// Byte offset of a VHDX file's BAT.
fn vhdx_bat(file: &MemoryFile) -> u64 {
    let bat = [0x66, 0x77, 0xc2, 0x2d];
    let entry = |i: u64| (192 << 10) + 16 + i * 32;
    let index = (0..2).find(|i| get(file, entry(*i), 4) == bat).unwrap();
    number_at(file, entry(index) + 16)
}

/// Undoes what only the log tells any more, which lies at 1 MiB.
fn lose_logged(file: &MemoryFile) -> Option<u64> {
    put(file, vhdx_bat(file), &[0; 4096]).map(|_| MIB)
}

/// Adds the batmap of Xen's tools to a new VHD, which is still without blocks: its header and map
/// behind the BAT, the footer moved behind those. No bit is set, so that nothing in it is wrong.
pub fn xen(host: &Arc<MemoryHost>) {
    let file = host.file(Path::new("/t/disk.vhd")).unwrap();
    let mut footer = get(&file, len(&file) - 512, 512);
    footer[28..36].copy_from_slice(b"tap\0\x00\x01\x00\x03");
    seal(&mut footer, 64);
    let mut header = vec![0; 512];
    header[..8].copy_from_slice(b"tdbatmap");
    header[8..16].copy_from_slice(&2560u64.to_be_bytes());
    header[16..20].copy_from_slice(&1u32.to_be_bytes());
    header[20..24].copy_from_slice(&0x0001_0002u32.to_be_bytes());
    header[24..28].copy_from_slice(&u32::MAX.to_be_bytes());
    put(&file, 0, &footer);
    put(&file, 2048, &header);
    put(&file, 2560, &[0; 512]);
    put(&file, 3584, &footer);
}

/// Makes the checksum of a VHD structure at byte `field` fit.
fn seal(bytes: &mut [u8], field: usize) {
    bytes[field..field + 4].fill(0);
    let sum = !bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    bytes[field..field + 4].copy_from_slice(&sum.to_be_bytes());
}

/// The entry of a VHD's BAT for a block, as a sector.
fn vhd_entry(file: &MemoryFile, block: u64) -> u32 {
    u32::from_be_bytes(get(file, vhd_bat(file) + block * 4, 4).try_into().unwrap())
}

pub fn put_vhd_entry(file: &MemoryFile, block: u64, sector: u32) -> Option<u64> {
    put(file, vhd_bat(file) + block * 4, &sector.to_be_bytes())
}

fn vhd_bat(file: &MemoryFile) -> u64 {
    u64::from_be_bytes(get(file, 512 + 16, 8).try_into().unwrap())
}

/// Sets the fields of both of a VHD's footers that begin at byte `at` of a footer.
fn put_footers(file: &MemoryFile, at: usize, data: &[u8], sealed: bool) {
    let dynamic = get(file, 0, 8) == b"conectix";
    for place in [Some(len(file) - 512), dynamic.then_some(0)].into_iter().flatten() {
        let mut footer = get(file, place, 512);
        footer[at..at + data.len()].copy_from_slice(data);
        if sealed {
            seal(&mut footer, 64);
        }
        put(file, place, &footer);
    }
}

/// Sets the fields of both of a VHDX's headers that begin at byte `at` of a header.
fn put_headers(file: &MemoryFile, at: usize, data: &[u8], sealed: bool) {
    for place in [64 << 10, 128 << 10] {
        let mut header = get(file, place, 4096);
        header[at..at + data.len()].copy_from_slice(data);
        if sealed {
            header[4..8].fill(0);
            let sum = crc32c::crc32c(&header);
            header[4..8].copy_from_slice(&sum.to_le_bytes());
        }
        put(file, place, &header);
    }
}

/// The entry of a VHDX's BAT at an index.
fn vhdx_entry(file: &MemoryFile, index: u64) -> u64 {
    number_at(file, vhdx_bat(file) + index * 8)
}

fn put_vhdx_entry(file: &MemoryFile, index: u64, entry: u64) -> Option<u64> {
    put(file, vhdx_bat(file) + index * 8, &entry.to_le_bytes())
}

/// Sets the first entry of a VMDK's first grain table and of its copy.
pub fn put_grain(file: &MemoryFile, sector: u32) -> Option<u64> {
    let (first, second) = directories(file);
    put(file, place_at(file, second), &sector.to_le_bytes());
    put(file, place_at(file, first), &sector.to_le_bytes())
}

/// The same damage to a child.
fn of_child(case: Case) -> Case {
    Case { child: true, ..case }
}

pub fn cases() -> Vec<Case> {
    let vhd = &Image::new("vhd", "dynamic", 3 * MIB + 512).block(MIB / 2);
    let fixed = &Image::new("vhd", "fixed", 3 * MIB + 512);
    let vhdx = &Image::new("vhdx", "dynamic", 5 * MIB).block(MIB).sector(512);
    let large = &Image::new("vhdx", "dynamic", 9 * MIB).block(2 * MIB).sector(512);
    let vmdk = &Image::new("vmdk", "monolithicSparse", 70 * MIB);
    let cowd = &Image::new("vmdk", "vmfsSparse", 5 * MIB);
    let split = &Image::new("vmdk", "twoGbMaxExtentSparse", 70 * MIB);
    let xen = &Image::new("vhd", "dynamic", 3 * MIB).block(MIB / 2).tweaked("batmap", xen);
    vec![
        case(xen, "the batmap calls a block full that is not", |f| {
            let block = u64::from(u32::from_be_bytes(get(f, 1536, 4).try_into().unwrap())) * 512;
            put(f, block, &[0xfe]);
            put(f, 2560, &[0x80]);
            put(f, 2048 + 24, &(!0x80u32).to_be_bytes()).map(|_| block)
        }),
        case(xen, "the batmap's checksum is wrong", |f| put(f, 2048 + 24, &[0; 4]).map(|_| 2048)),
        case(split, "a grain table of an extent is gone", |f| {
            put(f, place_at(f, directories(f).0), &[0; 512]).map(|_| place_at(f, directories(f).1))
        }),
        case(split, "the grain directory of an extent is damaged", |f| {
            put(f, directories(f).0, &[0xee; 12])
        }),
        case(split, "an extent was not closed", |f| put(f, 72, &[1]).and(None)),
        leak(split, "unused space at the end of an extent", |f| put(f, len(f), &[5; 100_352])),
        case(vmdk, "a crash left a redundant table behind its primary", |f| {
            put(f, 72, &[1]);
            put(f, place_at(f, directories(f).1), &[0; 4])
        }),
        Case {
            open: true,
            ..case(vmdk, "a torn redundant table of an image that is open", |f| {
                put(f, place_at(f, directories(f).1), &[0; 512])
            })
        },
        case(cowd, "the extent was not closed", |f| put(f, 1648, &[1]).and(None)),
        leak(cowd, "unused space at the end", |f| put(f, len(f), &[5; 100_352])),
        of_child(case(vhd, "the footer copy is gone", |f| put(f, 0, &[0; 512]))),
        of_child(case(vhd, "the footer is cut off", |f| {
            f.set_len(len(f) - 512).unwrap();
            Some(len(f))
        })),
        of_child(leak(vhd, "a block that nothing leads to", |f| {
            let bat = u64::from_be_bytes(get(f, 512 + 16, 8).try_into().unwrap());
            put(f, bat, &[0xff; 4]).and(None)
        })),
        of_child(case(vhdx, "the second header is damaged", |f| {
            put(f, (128 << 10) + 512, &[1]).map(|_| 128 << 10)
        })),
        of_child(Case { open: true, ..case(vhdx, "a log is to be replayed", lose_logged) }),
        of_child(leak(vhdx, "a block that nothing leads to", |f| {
            put(f, vhdx_bat(f), &[0; 8]).and(None)
        })),
        of_child(case(vmdk, "a grain table is gone", |f| {
            put(f, place_at(f, directories(f).0), &[0; 512]).map(|_| place_at(f, directories(f).1))
        })),
        of_child(case(vmdk, "the extent was not closed", |f| put(f, 72, &[1]).and(None))),
        case(vhd, "the footer copy is gone", |f| put(f, 0, &[0; 512])),
        case(vhd, "the bitmaps of two blocks deny their data", |f| {
            let entry = |i: u64| u32::from_be_bytes(get(f, 1536 + i * 4, 4).try_into().unwrap());
            let stored: Vec<_> = (0..6).map(entry).filter(|entry| *entry != u32::MAX).collect();
            put(f, u64::from(stored[0]) * 512, &[0; 128]);
            put(f, u64::from(stored[1]) * 512, &[0x55; 128]).and(None)
        }),
        case(vhd, "the footer copy is damaged", |f| put(f, 20, &[1]).map(|_| 0)),
        case(vhd, "the footer is damaged", |f| put(f, len(f) - 400, &[1]).map(|at| at - 112)),
        case(vhd, "the footer is cut off", |f| {
            f.set_len(len(f) - 512).unwrap();
            Some(len(f))
        }),
        case(vhd, "garbage follows the footer", |f| put(f, len(f), &[7; 700])),
        leak(vhd, "a block that nothing leads to", |f| {
            let at = u64::from(u32::from_be_bytes(get(f, 1536, 4).try_into().unwrap())) * 512;
            put(f, 1536, &[0xff; 4]);
            // The gap begins where the BAT ends.
            Some(2048.min(at))
        }),
        leak(vhd, "unused space before the footer", |f| {
            let footer = get(f, len(f) - 512, 512);
            let at = len(f) - 512;
            put(f, at, &[5; 800 << 10]);
            put(f, len(f), &footer);
            // The last block ends a little before the footer, at a multiple of 4 KiB.
            Some(at / 4096 * 4096)
        }),
        case(vhdx, "the first header is damaged", |f| put(f, 64 << 10, &[0; 512])),
        case(vhdx, "the second header is damaged", |f| {
            put(f, (128 << 10) + 512, &[1]).map(|_| 128 << 10)
        }),
        case(vhdx, "the first region table is damaged", |f| put(f, 192 << 10, &[0; 512])),
        case(vhdx, "the second region table is damaged", |f| {
            put(f, (256 << 10) + 40, &[9]).map(|_| 256 << 10)
        }),
        case(large, "the last block is cut short", |f| {
            f.set_len(len(f) - MIB).map(|()| None).unwrap()
        }),
        case(vhdx, "a block that is not stored names a place", |f| {
            put(f, vhdx_bat(f) + 8 * 3, &(77 * MIB).to_le_bytes()).map(|at| at / 4096 * 4096)
        }),
        Case { open: true, ..case(vhdx, "a log is to be replayed", lose_logged) },
        leak(vhdx, "a block that nothing leads to", |f| {
            let at = number_at(f, vhdx_bat(f)) / MIB * MIB;
            put(f, vhdx_bat(f), &[0; 8]);
            Some(at)
        }),
        leak(vhdx, "unused space at the end", |f| put(f, len(f), &[5; 100_000])),
        case(vmdk, "a grain table is gone", |f| {
            put(f, place_at(f, directories(f).0), &[0; 512]).map(|_| place_at(f, directories(f).1))
        }),
        case(vmdk, "a grain table is damaged", |f| {
            put(f, place_at(f, directories(f).0), &[0xff; 512])
        }),
        case(vmdk, "a redundant grain table is damaged", |f| {
            put(f, place_at(f, directories(f).1), &[0xff; 2048])
        }),
        case(vmdk, "a grain directory entry is gone", |f| put(f, directories(f).0, &[0; 4])),
        case(vmdk, "the grain directory is damaged", |f| put(f, directories(f).0, &[0xee; 12])),
        case(vmdk, "the redundant grain directory is damaged", |f| {
            put(f, directories(f).1, &[0xee; 12])
        }),
        case(vmdk, "the header leads to no grain directory", |f| put(f, 56, &[0xdd; 4]).and(None)),
        case(vmdk, "the header leads to no redundant grain directory", |f| {
            put(f, 48, &[0xdd; 4]).and(None)
        }),
        case(vmdk, "the extent was not closed", |f| put(f, 72, &[1]).and(None)),
        leak(vmdk, "a grain that nothing leads to", |f| {
            let (first, second) = (place_at(f, directories(f).0), place_at(f, directories(f).1));
            let at = place_at(f, first);
            put(f, first, &[0; 4]);
            put(f, second, &[0; 4]);
            Some(at)
        }),
        leak(vmdk, "unused space at the end", |f| put(f, len(f), &[5; 100_352])),
        case(cowd, "the header calls used space free", |f| put(f, 28, &[9, 0, 0, 0]).map(|_| 0)),
        case(cowd, "not closed, and used space called free", |f| {
            put(f, 1648, &[1]);
            put(f, 28, &[9, 0, 0, 0]).map(|_| 0)
        }),
        case(vmdk, "no directory, a table that differs from its copy, and no clean end", |f| {
            put(f, 72, &[1]);
            put(f, place_at(f, directories(f).0), &[0; 4]);
            put(f, 56, &[0xdd; 4]).and(None)
        }),
        case(vmdk, "a directory entry, its table and part of another copy are gone", |f| {
            put(f, place_at(f, directories(f).0), &[0; 512]);
            put(f, place_at(f, directories(f).1 + 4), &[0; 512]);
            put(f, directories(f).0, &[0; 4])
        }),
        case(vhdx, "a header, a region table and places of blocks are damaged", |f| {
            put(f, vhdx_bat(f) + 8 * 3, &(77 * MIB).to_le_bytes());
            put(f, 192 << 10, &[0; 512]);
            put(f, (128 << 10) + 512, &[1]).map(|_| 128 << 10)
        }),
        Case {
            open: true,
            ..case(vhdx, "a log is to be replayed, and the first region table is damaged", |f| {
                lose_logged(f);
                put(f, 192 << 10, &[0; 512])
            })
        },
        leak(vhd, "unused space between blocks and before the footer", |f| {
            put(f, 1536, &[0xff; 4]);
            let footer = get(f, len(f) - 512, 512);
            put(f, len(f) - 512, &[5; 800 << 10]);
            put(f, len(f), &footer);
            Some(2048)
        }),
        leak(vmdk, "unused space between grains and at the end", |f| {
            let (first, second) = (place_at(f, directories(f).0), place_at(f, directories(f).1));
            put(f, first, &[0; 4]);
            put(f, second, &[0; 4]);
            put(f, len(f), &[5; 100_352]).and(None)
        }),
        case(vhd, "the geometry is larger than the disk", |f| {
            put_footers(f, 56, &[0xff, 0xff, 16, 63], true);
            Some(len(f) - 512 + 56)
        }),
        case(fixed, "the geometry is larger than the disk", |f| {
            put_footers(f, 56, &[0xff, 0xff, 16, 63], true);
            Some(len(f) - 512 + 56)
        }),
        mixed_up(vhd, "two blocks share their place", |f| {
            put_vhd_entry(f, 2, vhd_entry(f, 0)).and(None)
        }),
        mixed_up(vhd, "blocks begin inside each other", |f| {
            put_vhd_entry(f, 2, vhd_entry(f, 0) + 100);
            put_vhd_entry(f, 4, vhd_entry(f, 0) + 200).and(None)
        }),
        mixed_up(vhd, "two blocks share their place, the last one ends with the disk", |f| {
            put_vhd_entry(f, 2, vhd_entry(f, 0));
            let (last, footer) = (vhd_entry(f, 1), get(f, len(f) - 512, 512));
            put_vhd_entry(f, 6, last);
            put_vhd_entry(f, 1, u32::MAX);
            let end = (u64::from(last) + 2) * 512;
            f.set_len(end).unwrap();
            put(f, end, &footer).and(None)
        }),
        of_child(mixed_up(vhd, "two blocks share their place", |f| {
            put_vhd_entry(f, 2, vhd_entry(f, 0)).and(None)
        })),
        given_up(vhd, "a block leads past the end", |f| put_vhd_entry(f, 2, 0x7fff_ff00)),
        given_up(vhd, "two blocks lead to the footer copy", |f| {
            put_vhd_entry(f, 1, 0);
            put_vhd_entry(f, 0, 0)
        }),
        given_up(vhd, "one block leads past the end, two share their place", |f| {
            put_vhd_entry(f, 2, vhd_entry(f, 1));
            // There the file will have something later.
            put_vhd_entry(f, 0, (len(f) / 512) as u32)
        }),
        lossy(vhd, "the footer lies over the last block", |f| {
            let (footer, at) = (get(f, len(f) - 512, 512), len(f) - 512 - (100 << 10));
            f.set_len(at).unwrap();
            put(f, at, &footer);
            Some(vhd_bat(f) + 4)
        }),
        lossy(vhd, "the checksums of both footers are wrong", |f| {
            put_footers(f, 64, &[1, 2, 3, 4], false);
            None
        }),
        lossy(fixed, "the checksum of the footer is wrong", |f| {
            put_footers(f, 64, &[1, 2, 3, 4], false);
            None
        }),
        lossy(vhd, "the checksum of the header is wrong", |f| put(f, 512 + 36, &[1, 2]).and(None)),
        of_child(lossy(vhd, "the checksum of the header is wrong", |f| {
            put(f, 512 + 36, &[1, 2]).and(None)
        })),
        mixed_up(vhdx, "two blocks share their place", |f| put_vhdx_entry(f, 2, vhdx_entry(f, 0))),
        mixed_up(large, "a block begins inside another", |f| {
            put_vhdx_entry(f, 1, vhdx_entry(f, 0) + MIB)
        }),
        of_child(mixed_up(vhdx, "two blocks share their place", |f| {
            put_vhdx_entry(f, 2, vhdx_entry(f, 0))
        })),
        case(vhdx, "a block counts on a parent although there is none", |f| {
            put_vhdx_entry(f, 1, vhdx_entry(f, 1) | 7)
        }),
        given_up(vhdx, "a block leads past the end", |f| put_vhdx_entry(f, 1, 77 << 40 | 6)),
        given_up(vhdx, "a block lies over the header", |f| put_vhdx_entry(f, 1, 6)),
        given_up(vhdx, "a block has no valid state, two share their place", |f| {
            put_vhdx_entry(f, 2, vhdx_entry(f, 0));
            put_vhdx_entry(f, 1, vhdx_entry(f, 1) & !7 | 4)
        }),
        of_child(given_up(vhdx, "a block leads past the end", |f| {
            put_vhdx_entry(f, 1, 77 << 40 | 6)
        })),
        of_child(given_up(vhdx, "a sector bitmap lies past the end", |f| {
            put_vhdx_entry(f, 4096, 77 << 40 | 6)
        })),
        lossy(vhdx, "the checksums of both headers are wrong", |f| {
            put_headers(f, 4, &[1, 2, 3, 4], false);
            None
        }),
        Case {
            open: true,
            ..lossy(vhdx, "a log is to be replayed, the headers' checksums are wrong", |f| {
                put_headers(f, 4, &[1, 2, 3, 4], false);
                None
            })
        },
        lossy(vhdx, "the log that should be replayed has no entries", |f| {
            put_headers(f, 48, &[7; 16], true);
            Some(MIB)
        }),
        case(large, "the log lies past the end, the last block is cut short", |f| {
            f.set_len(len(f) - MIB).unwrap();
            put_headers(f, 72, &(1u64 << 40).to_le_bytes(), true);
            None
        }),
        case(vhdx, "the log lies past the end", |f| {
            put_headers(f, 72, &(1u64 << 40).to_le_bytes(), true);
            None
        }),
        given_up(vmdk, "a grain leads past the end", |f| put_grain(f, 0x7fff_ff80)),
        of_child(given_up(vmdk, "a grain leads past the end", |f| {
            // There is an entry for zeroes.
            let flags = get(f, 8, 1)[0];
            put(f, 8, &[flags | 4]);
            put_grain(f, 0x7fff_ff80)
        })),
        given_up(vmdk, "a grain lies over the header", |f| put_grain(f, 2)),
        lossy(vmdk, "the last grain is cut short", |f| {
            f.set_len(len(f) - (8 << 10)).map(|()| None).unwrap()
        }),
        given_up(vmdk, "a grain leads past the end, the last one is cut short", |f| {
            let end = len(f);
            f.set_len(end - (8 << 10)).unwrap();
            // There the file will have something later.
            put_grain(f, ((end - 4096) / 512) as u32)
        }),
        given_up(cowd, "a grain leads past the end", |f| {
            put(f, place_at(f, 2048), &0x7fff_ff80u32.to_le_bytes())
        }),
        leak(vhdx, "unused space between blocks and at the end", |f| {
            put(f, vhdx_bat(f), &[0; 8]);
            put(f, len(f), &[5; 100_000])
        }),
    ]
}

/// The file that holds the tables.
pub fn table_file(host: &MemoryHost, case: &Case) -> Arc<MemoryFile> {
    let own = host.file(&case.path()).unwrap();
    let others = || host.files().into_iter().filter(|f| f.path() != case.path());
    if case.child { own } else { others().next().unwrap_or(own) }
}

pub fn write_data(case: &Case, host: &Arc<MemoryHost>) -> Arc<MemoryHost> {
    case.image.create(host).unwrap();
    let dynamic: Arc<dyn Host> = host.clone();
    if case.child {
        let parent = case.image.open(&dynamic, Access::Write).unwrap();
        parent.write_at(MIB / 4, &pattern::bytes(99, MIB / 4, 2 * MIB)).unwrap();
        parent.close().unwrap();
        drop(parent);
        let options = OpenOptions::new(Access::Read);
        let parent = formats::open(&dynamic, &case.image.path(), &options).unwrap();
        let format = formats::by_name(case.image.format).unwrap();
        let CreateSpec { block_size, zeroed_grains, .. } = case.image.spec;
        let spec = CreateSpec { block_size, zeroed_grains, ..CreateSpec::default() };
        formats::create_child(format, &**host, &case.path(), &parent, &spec).unwrap();
    }
    let disk = case.open(&dynamic, Access::Write).unwrap();
    let size = disk.size();
    for (stamp, at) in [0, MIB, 2 * MIB, size - 2048, MIB / 2 + 4096].into_iter().enumerate() {
        // Blocks end in zeroes, so that the last one can be cut short without losing anything.
        disk.write_at(at, &pattern::bytes(stamp as u32 + 1, at, 2048)).unwrap();
    }
    disk.flush().unwrap();
    if case.open {
        return host.fork();
    }
    disk.close().unwrap();
    host.clone()
}

pub fn read(case: &Case, host: &Arc<dyn Host>) -> Result<Sectors, String> {
    let disk = case.open(host, Access::Read).map_err(|e| e.to_string())?;
    contents(&disk)
}

pub fn checked(case: &Case, host: &Arc<dyn Host>) -> Report {
    formats::check(host, &case.path(), &OpenOptions::new(Access::Read)).unwrap()
}

/// Repairs an image, or says how.
pub fn mend(case: &Case, host: &Arc<dyn Host>, dry_run: bool) -> flatdisk::Result<formats::Repair> {
    let options = OpenOptions::new(Access::Write);
    formats::repair(host, &case.path(), &options, case.scope, dry_run)
}

/// A damaged image, and what a crash in the middle of its repair may leave.
pub struct Damaged<'a> {
    case: &'a Case,
    pub host: Arc<MemoryHost>,
    /// Where the check must find the damage.
    pub place: Option<u64>,
    /// What the repaired disk holds.
    pub whole: Sectors,
    /// What can be read of the damaged one, of the sectors that are not zeroes.
    seen: Sectors,
    /// All of it can be.
    readable: bool,
    /// A program can write to it all the same.
    writable: bool,
    /// It says that its writer did not close it.
    unclean: bool,
    file_write: Option<String>,
}

impl Case {
    pub fn damaged(&self) -> Damaged<'_> {
        let host = write_data(self, &MemoryHost::new());
        let dynamic: Arc<dyn Host> = host.clone();
        let mut whole = read(self, &dynamic).unwrap();
        let place = (self.damage)(&table_file(&host, self));
        if self.loses {
            whole = read(self, &dynamic).unwrap();
        }
        if self.gives_up {
            assert!(readable(self, &dynamic, &whole).len() < whole.len(), "{}", self.name());
            whole = left(self, &dynamic);
        }
        let mut damaged = Damaged {
            case: self,
            seen: readable(self, &dynamic, &whole),
            readable: read(self, &dynamic).is_ok_and(|found| found == whole),
            writable: false,
            unclean: is_unclean(self, &dynamic),
            file_write: file_write(self, &dynamic),
            host,
            place,
            whole,
        };
        damaged.writable = damaged.readable && damaged.write(&damaged.host).is_ok();
        damaged
    }
}

impl Damaged<'_> {
    /// Judges what a crash left of a repair, or of one that had returned if it is `done`: no worse than
    /// before, and repaired by the next one.
    pub fn judge(&self, state: &Arc<MemoryHost>, done: bool) -> Result<(), String> {
        let host: Arc<dyn Host> = state.fork();
        let holds = |when: &str| match read(self.case, &host).map_err(|e| format!("{when}: {e}"))? {
            found if found == self.whole => Ok(()),
            _ => Err(format!("{when}: data lost")),
        };
        let now = readable(self.case, &host, &self.whole);
        for (number, before) in &self.seen {
            let right = [Some(before), self.whole.get(number)];
            if !now.contains_key(number) {
                return Err(format!("sector {number} cannot be read any more"));
            }
            if !right.contains(&now.get(number)) {
                return Err(format!("sector {number} holds something else"));
            }
        }
        if self.readable || done {
            holds("after the crash")?;
        }
        let report = checked(self.case, &host);
        if self.unclean && !is_unclean(self.case, &host) && !report.findings.is_empty() {
            return Err(format!("called closed in spite of {:?}", report.findings));
        }
        if done {
            let again = mend(self.case, &host, true).map_err(|e| e.to_string())?;
            if report.exit_status() != 0 || !again.changes.is_empty() {
                return Err(format!("not repaired: {:?}", report.findings));
            }
        }
        if self.file_write.is_some()
            && file_write(self.case, &host) == self.file_write
            && behind_headers(state, self.case) != behind_headers(&self.host, self.case)
        {
            return Err("the file was changed, its FileWriteGuid was not".to_owned());
        }
        if self.writable {
            self.write(state).map_err(|e| format!("writing without a repair: {e}"))?;
        }
        let repair = mend(self.case, &host, false).map_err(|e| format!("a second repair: {e}"))?;
        if repair.after.exit_status() != 0 {
            return Err(format!("a second repair leaves {:?}", repair.after.findings));
        }
        holds("after a second repair")
    }

    /// Writes where nothing is stored yet, and makes sure that nothing else changes.
    fn write(&self, state: &Arc<MemoryHost>) -> Result<(), String> {
        let host: Arc<dyn Host> = state.fork();
        let disk = self.case.open(&host, Access::Write).map_err(|e| e.to_string())?;
        if let Some(why) = disk.read_only() {
            return Err(why.to_owned());
        }
        let mut expected = self.whole.clone();
        for at in [MIB / 4 * 7, MIB / 4 * 11] {
            let data = pattern::bytes(77, at, 1024);
            disk.write_at(at, &data).map_err(|e| e.to_string())?;
            expected.extend((at / SECTOR..).zip(data.chunks(SECTOR as usize).map(sector)));
        }
        disk.close().map_err(|e| e.to_string())?;
        drop(disk);
        match read(self.case, &host)? == expected {
            true => Ok(()),
            false => Err("the disk holds something else then".to_owned()),
        }
    }
}

/// What can be read of the sectors of `whole`.
fn readable(case: &Case, host: &Arc<dyn Host>, whole: &Sectors) -> Sectors {
    let Ok(disk) = case.open(host, Access::Read) else { return Sectors::new() };
    let mut bytes = [0; SECTOR as usize];
    let mut read = |number: &u64| {
        let found = disk.read_at(number * SECTOR, &mut bytes);
        found.is_ok().then(|| (*number, sector(&bytes)))
    };
    whole.keys().filter_map(&mut read).collect()
}

/// What can be read of the disk.
fn left(case: &Case, host: &Arc<dyn Host>) -> Sectors {
    let disk = case.open(host, Access::Read).unwrap();
    let mut left = Sectors::new();
    let mut add = |at: u64, bytes: &[u8]| {
        let sectors = bytes.chunks(SECTOR as usize).map(sector);
        left.extend((at / SECTOR..).zip(sectors).filter(|(_, sector)| sector.is_some()));
    };
    let chunk = 64 << 10;
    for at in (0..disk.size()).step_by(chunk) {
        let mut bytes = vec![0; chunk.min((disk.size() - at) as usize)];
        if disk.read_at(at, &mut bytes).is_ok() {
            add(at, &bytes);
            continue;
        }
        for at in (at..at + bytes.len() as u64).step_by(SECTOR as usize) {
            let bytes = &mut bytes[..SECTOR as usize];
            if disk.read_at(at, bytes).is_ok() {
                add(at, bytes);
            }
        }
    }
    left
}

fn is_unclean(case: &Case, host: &Arc<dyn Host>) -> bool {
    let image = formats::open(host, &case.path(), &OpenOptions::new(Access::Read));
    image.is_ok_and(|image| image.info.dirty)
}

/// What tells other programs that a VHDX file was changed.
fn file_write(case: &Case, host: &Arc<dyn Host>) -> Option<String> {
    let image = formats::open(host, &case.path(), &OpenOptions::new(Access::Read)).ok()?;
    Some(image.info.details.get("file_write_guid")?.as_str()?.to_owned())
}

/// A VHDX file but for its two headers.
fn behind_headers(host: &MemoryHost, case: &Case) -> Vec<u8> {
    host.file(&case.path()).unwrap().to_vec()[192 << 10..].to_vec()
}
