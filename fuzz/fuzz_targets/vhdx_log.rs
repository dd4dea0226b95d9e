//! VHDX logs: the input is the contents of the log, its entries' checksums fit.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use flatdisk::storage::Storage;
use flatdisk_fuzz::{Images, exercise, images, seal_crc};
use libfuzzer_sys::fuzz_target;

static IMAGES: Images = LazyLock::new(|| images("vhdx"));
const SECTOR: usize = 4096;

/// Every 128 bytes of input become the beginning of a sector of the log; an entry's length is what
/// it says, its data sectors have the signature where the first byte asks for that.
fuzz_target!(|data: &[u8]| {
    let Some((host, path)) = IMAGES.first() else { return };
    let host = host.fork();
    let file = host.file(Path::new(path)).expect("the image");
    let mut header = [0; 4096];
    for at in [64 << 10, 128 << 10] {
        file.read_at(at, &mut header).expect("a header");
        if header[48..64] != [0; 16] {
            break;
        }
    }
    let log = u64::from_le_bytes(header[72..80].try_into().expect("eight bytes"));
    for (index, piece) in data.chunks(128).take(255).enumerate() {
        let at = log + (index * SECTOR) as u64;
        let mut sector = vec![0; SECTOR];
        sector[..piece.len()].copy_from_slice(piece);
        match piece[0] % 4 {
            0 | 1 => {
                sector[..4].copy_from_slice(b"loge");
                // The GUID that the header asks for.
                sector[32..48].copy_from_slice(&header[48..64]);
            }
            2 => sector[..4].copy_from_slice(b"data"),
            _ => {}
        }
        file.write_at(at, &sector).expect("memory takes all writes");
    }
    for index in (0..data.len().div_ceil(128).min(255)).rev() {
        let at = log + (index * SECTOR) as u64;
        let mut length = [0; 4];
        file.read_at(at + 8, &mut length).expect("inside the log");
        let length = (u32::from_le_bytes(length) as usize).min(255 * SECTOR);
        seal_crc(&*file, at, length, b"loge");
    }
    exercise(&host, Path::new(path));
});
