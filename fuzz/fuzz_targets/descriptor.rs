//! VMDK descriptors: the input is the text, beside files that it may name.
#![no_main]

use std::path::Path;

use flatdisk::storage::memory::{MemoryFile, MemoryHost};
use flatdisk_fuzz::exercise;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let host = MemoryHost::new();
    host.insert(MemoryFile::new("/t/x", &[1; 8192]));
    host.insert(MemoryFile::new("/t/a-flat.vmdk", &[2; 8192]));
    for (name, title) in [("/t/a.vmdk", "# Disk DescriptorFile\nversion=1\n"), ("/t/b.vmdk", "")] {
        let mut text = title.as_bytes().to_vec();
        text.extend(data);
        host.insert(MemoryFile::new(name, &text));
        exercise(&host, Path::new(name));
    }
});
