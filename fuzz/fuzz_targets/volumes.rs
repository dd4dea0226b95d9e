//! Partition tables and signatures: the input is patches to a disk of zeroes, of which the first byte
//! chooses the size. Places are dense where structures lie.
#![no_main]

use flatdisk::disk::flat;
use flatdisk::storage::Storage;
use flatdisk::storage::memory::MemoryFile;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&first, mut rest)) = data.split_first() else { return };
    let file = MemoryFile::new("/disk", &[]);
    let size = (u64::from(first) + 1) << 15;
    file.set_len(size).expect("memory");
    while let [page, fine, len, tail @ ..] = rest {
        let bytes = &tail[..usize::from(*len).min(tail.len())];
        let near = u64::from(page & 0x7f) * 512 + u64::from(*fine) * 2;
        let at = if *page < 0x80 { near } else { size.saturating_sub(near) };
        let _ = file.write_at(at, bytes);
        rest = &tail[bytes.len()..];
    }
    for sector in [512, 4096] {
        let Ok(disk) = flat::raw(file.clone(), sector) else { return };
        if let Ok(found) = flatdisk::volumes::with_usage(&disk) {
            let _ = found.place(None);
        }
    }
});
