//! What the fuzz targets share: images in memory, and everything that is done to one.
//!
//! An input is a list of patches to an intact image that the crate itself makes, so that the fuzzer
//! begins behind the signatures; checksums are made to fit afterwards.

use std::path::Path;
use std::sync::{Arc, LazyLock};

use flatdisk::formats::{self, CreateSpec, OpenOptions, Scope};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::{Access, Host, Storage};

const MIB: u64 = 1 << 20;

/// A host with an image of every subformat of a format, each with some data, and not closed.
pub fn images(format: &str) -> Vec<(Arc<MemoryHost>, String)> {
    let format = formats::by_name(format).expect("a known format");
    let mut images = Vec::new();
    for subformat in format.subformats() {
        let host = MemoryHost::new();
        let path = format!("/t/disk.{}", format.name());
        let subformat = Some((*subformat).to_owned());
        let spec = CreateSpec { subformat, size: 3 * MIB, ..CreateSpec::default() };
        if formats::create(format, &*host, Path::new(&path), &spec).is_err() {
            continue;
        }
        let dynamic: Arc<dyn Host> = host.clone();
        if let Ok(image) = formats::open(&dynamic, Path::new(&path), &options(Access::Write)) {
            for at in [0, MIB, 2 * MIB + 512] {
                let _ = image.disk.write_at(at, &[7; 1024]);
            }
            let _ = image.disk.flush();
        }
        images.push((host.fork(), path));
    }
    images
}

fn options(access: Access) -> OpenOptions {
    OpenOptions::new(access)
}

/// Opens, reads, checks, repairs (a copy), writes and closes what is at `path`.
pub fn exercise(host: &Arc<MemoryHost>, path: &Path) {
    for force in [false, true] {
        let dynamic: Arc<dyn Host> = host.clone();
        let options = OpenOptions { force, ..options(Access::Read) };
        if let Ok(image) = formats::open(&dynamic, path, &options) {
            let disk = image.disk;
            let mut bytes = [0; 5000];
            for at in [0, disk.size() / 2, disk.size().saturating_sub(5000)] {
                let len = disk.size().min(5000) as usize;
                let _ = disk.read_at(at.min(disk.size() - len as u64), &mut bytes[..len]);
            }
            let _ = disk.extents(0..disk.size().min(16 * MIB));
        }
    }
    let dynamic: Arc<dyn Host> = host.clone();
    let _ = formats::check(&dynamic, path, &options(Access::Read));
    let copy: Arc<dyn Host> = host.fork();
    let _ = formats::repair(&copy, path, &options(Access::Write), Scope::All, false);
    let Ok(image) = formats::open(&dynamic, path, &options(Access::Write)) else { return };
    let disk = image.disk;
    for at in [0, disk.size() / 2] {
        let _ = disk.write_at(at, &[9; 512][..disk.size().min(512) as usize]);
    }
    let _ = disk.flush();
    let _ = disk.discard(0, disk.size().min(MIB));
    let _ = disk.close();
}

/// Damages an intact image as `data` says, and exercises it.
///
/// The first byte chooses the image and whether checksums are made to fit; every patch is a place
/// (a chunk number of two bytes and a place in it of one), a length of one byte, and its bytes.
pub fn patched(images: &[(Arc<MemoryHost>, String)], data: &[u8]) {
    let Some((&first, mut rest)) = data.split_first() else { return };
    if images.is_empty() {
        return;
    }
    let (host, path) = &images[usize::from(first >> 1) % images.len()];
    let host = host.fork();
    let files = host.files();
    while let [which, high, low, fine, len, tail @ ..] = rest {
        let file = &files[usize::from(*which) % files.len()];
        let bytes = &tail[..usize::from(*len).min(tail.len())];
        let page = u64::from(u16::from_be_bytes([*high, *low]));
        let at = page * 128 + u64::from(*fine % 128);
        // Growing happens to the byte, so that most patches stay inside.
        let end = file.len().unwrap_or(0) + 1;
        let _ = file.write_at(at % end, bytes);
        rest = &tail[bytes.len()..];
    }
    if first & 1 == 1 {
        files.iter().for_each(|file| seal(&**file));
    }
    exercise(&host, Path::new(path));
}

/// Makes the checksums of a VHD or VHDX fit.
pub fn seal(file: &dyn Storage) {
    for at in [64 << 10, 128 << 10] {
        seal_crc(file, at, 4096, b"head");
    }
    for at in [192 << 10, 256 << 10] {
        seal_crc(file, at, 64 << 10, b"regi");
    }
    let end = file.len().unwrap_or(0).saturating_sub(512);
    for at in [0, end] {
        seal_sum(file, at, 512, 64, b"conectix");
    }
    seal_sum(file, 512, 1024, 36, b"cxsparse");
}

/// Makes a CRC-32C at byte 4 of a structure fit, if the structure is there.
pub fn seal_crc(file: &dyn Storage, at: u64, len: usize, signature: &[u8; 4]) {
    let mut bytes = vec![0; len];
    if len >= 8 && file.read_at(at, &mut bytes).is_ok() && bytes.starts_with(signature) {
        bytes[4..8].fill(0);
        let _ = file.write_at(at + 4, &crc32c::crc32c(&bytes).to_le_bytes());
    }
}

fn seal_sum(file: &dyn Storage, at: u64, len: usize, field: usize, cookie: &[u8; 8]) {
    let mut bytes = vec![0; len];
    if file.read_at(at, &mut bytes).is_ok() && bytes.starts_with(cookie) {
        bytes[field..field + 4].fill(0);
        let sum = !bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
        let _ = file.write_at(at + field as u64, &sum.to_be_bytes());
    }
}

/// The images of a format, made once.
pub type Images = LazyLock<Vec<(Arc<MemoryHost>, String)>>;
