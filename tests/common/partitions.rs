//! Partition tables with whatever is wanted in them.

use flatdisk::storage::Storage;

/// An MBR's entry.
pub fn entry(kind: u8, first: u32, count: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[4] = kind;
    bytes[8..12].copy_from_slice(&first.to_le_bytes());
    bytes[12..].copy_from_slice(&count.to_le_bytes());
    bytes
}

/// Writes an MBR, or an EBR, at a sector.
pub fn mbr(file: &dyn Storage, at: u64, entries: &[[u8; 16]]) {
    let mut sector = [0; 512];
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    for (place, entry) in sector[446..510].chunks_exact_mut(16).zip(entries) {
        place.copy_from_slice(entry);
    }
    file.write_at(at * 512, &sector).unwrap();
}

/// The checksum of a GPT.
pub fn crc(bytes: &[u8]) -> [u8; 4] {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum().to_le_bytes()
}

/// A GPT with one entry for every pair of first and last sector, at both ends of the disk.
pub fn gpt(file: &dyn Storage, count: u32, entry_size: u32, parts: &[(u64, u64)]) {
    let last = file.len().unwrap() / 512 - 1;
    let mut entries = vec![0; count as usize * entry_size as usize];
    for (entry, (first, last)) in entries.chunks_exact_mut(entry_size as usize).zip(parts) {
        entry[..16].fill(7);
        entry[16..32].fill(9);
        entry[32..40].copy_from_slice(&first.to_le_bytes());
        entry[40..48].copy_from_slice(&last.to_le_bytes());
    }
    let sectors = entries.len().div_ceil(512) as u64;
    mbr(file, 0, &[entry(0xee, 1, u32::MAX)]);
    for (own, other, array) in [(1, last, 2), (last, 1, last - sectors)] {
        let mut header = [0; 92];
        header[..8].copy_from_slice(b"EFI PART");
        header[8..16].copy_from_slice(&[0, 0, 1, 0, 92, 0, 0, 0]);
        for (at, value) in
            [(24, own), (32, other), (40, 2 + sectors), (48, last - sectors - 1), (72, array)]
        {
            header[at..at + 8].copy_from_slice(&u64::to_le_bytes(value));
        }
        header[56..72].fill(5);
        header[80..84].copy_from_slice(&count.to_le_bytes());
        header[84..88].copy_from_slice(&entry_size.to_le_bytes());
        header[88..92].copy_from_slice(&crc(&entries));
        let sum = crc(&header);
        header[16..20].copy_from_slice(&sum);
        file.write_at(own * 512, &header).unwrap();
        file.write_at(array * 512, &entries).unwrap();
    }
}
