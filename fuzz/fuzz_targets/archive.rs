//! Tar archives: the input is headers and what lies between them; sums are put right, or nothing behind the
//! first header would be looked at.
#![no_main]

use flatdisk::formats::recognise;
use flatdisk::storage::Storage;
use flatdisk::storage::archive::Archive;
use flatdisk::storage::memory::MemoryFile;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut bytes = data.to_vec();
    let whole = bytes.len() / 512 * 512;
    bytes[..whole].chunks_exact_mut(512).filter(|block| block[0] != 0).for_each(|block| {
        block[148..156].fill(b' ');
        let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    });
    let Ok(archive) = Archive::open(MemoryFile::new("/x.ova", &bytes)) else { return };
    for member in archive.members().iter() {
        assert!(member.name.is_relative());
        if let Ok(file) = archive.member(&member.name) {
            assert!(member.at + file.len().expect("memory") <= bytes.len() as u64);
            let _ = recognise(&*file);
        }
    }
});
