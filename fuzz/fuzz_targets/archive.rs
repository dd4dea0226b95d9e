//! Tar archives: the input is headers and what lies between them; sums are put right, or nothing behind the
//! first header would be looked at. A description is put into each, and the others stay.
#![no_main]

use std::path::Path;
use std::sync::Arc;

use flatdisk::formats::ova::{self, describe};
use flatdisk::formats::{OpenOptions, recognise};
use flatdisk::storage::archive::Archive;
use flatdisk::storage::memory::{MemoryFile, MemoryHost};
use flatdisk::storage::{Access, Host, Storage};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut bytes = data.to_vec();
    let whole = bytes.len() / 512 * 512;
    let headers = bytes[..whole].chunks_exact_mut(512);
    headers.filter(|block| !matches!(block[0], 0 | b'<' | b'f')).for_each(|block| {
        block[148..156].fill(b' ');
        let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    });
    let path = Path::new("/x.ova");
    let Ok(archive) = Archive::open(MemoryFile::new(path, &bytes)) else { return };
    for member in archive.members() {
        assert!(member.name.is_relative());
        if let Ok(file) = archive.member(&member.name) {
            assert!(member.at + file.len().expect("memory") <= bytes.len() as u64);
            let _ = recognise(&*file);
        }
    }
    let memory = MemoryHost::new();
    memory.insert(MemoryFile::new(path, &bytes));
    let host: Arc<dyn Host> = memory;
    let _ = ova::check(&host, path, &OpenOptions::new(Access::Read), &());
    let text = b"<Envelope></Envelope>\n";
    if describe::describe(&host, path, text, data[0] & 1 == 1, &()).is_ok() {
        assert_eq!(describe::description(&host, path).expect("it was put in"), text);
    }
});
