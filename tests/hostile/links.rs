//! Links to parents written by hand: names that no driver would write.

use flatdisk::storage::Storage;

fn get<const N: usize>(file: &dyn Storage, at: u64) -> [u8; N] {
    let mut bytes = [0; N];
    file.read_at(at, &mut bytes).expect("inside the file");
    bytes
}

fn put(file: &dyn Storage, at: u64, bytes: &[u8]) {
    file.write_at(at, bytes).expect("memory takes all writes");
}

/// Rewrites the checksum of a VHD structure of `N` bytes whose checksum is at `field`.
pub fn seal_vhd<const N: usize>(file: &dyn Storage, at: u64, field: u64) {
    put(file, at + field, &[0; 4]);
    let sum = get::<N>(file, at).iter().fold(0u32, |sum, byte| sum.wrapping_add((*byte).into()));
    put(file, at + field, &(!sum).to_be_bytes());
}

const FILE_PARAMETERS: [u8; 16] = [
    0x37, 0x67, 0xa1, 0xca, 0x36, 0xfa, 0x43, 0x4d, 0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b,
];
const PARENT_LOCATOR: [u8; 16] = [
    0x2d, 0x5f, 0xd3, 0xa8, 0x0b, 0xb3, 0x4d, 0x45, 0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c,
];
const LOCATOR_TYPE: [u8; 16] = [
    0xb7, 0xef, 0x4a, 0xb0, 0x9e, 0xd1, 0x81, 0x4a, 0xb7, 0x89, 0x25, 0xb8, 0xe9, 0x44, 0x59, 0x13,
];
const METADATA_REGION: [u8; 16] = [
    0x06, 0xa2, 0x7c, 0x8b, 0x90, 0x47, 0x9a, 0x4b, 0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e,
];

/// Byte offset of the metadata region.
fn metadata(file: &dyn Storage) -> u64 {
    let entries = u32::from_le_bytes(get(file, (192 << 10) + 8));
    let mut entries = (0..u64::from(entries)).map(|index| (192 << 10) + 16 + index * 32);
    let entry = entries.find(|at| get::<16>(file, *at) == METADATA_REGION);
    u64::from_le_bytes(get(file, entry.expect("a metadata region") + 16))
}

/// The identity of a VHDX, as its children know it.
pub fn data_write_guid(file: &dyn Storage) -> uuid::Uuid {
    let sequence = |at| u64::from_le_bytes(get(file, at + 8));
    let (first, second) = (64 << 10, 128 << 10);
    let current = if sequence(first) > sequence(second) { first } else { second };
    flatdisk::codec::guid(&get(file, current + 32))
}

/// Turns a VHDX without parent into one whose parent locator holds `pairs`.
pub fn name_vhdx_parent(child: &dyn Storage, pairs: &[(&str, String)]) {
    let table = metadata(child);
    let count = u16::from_le_bytes(get(child, table + 10));
    let entry = |index: u16| table + 32 + u64::from(index) * 32;
    for index in 0..count {
        if get::<16>(child, entry(index)) == FILE_PARAMETERS {
            let item = table + u64::from(u32::from_le_bytes(get(child, entry(index) + 16)));
            let flags = u32::from_le_bytes(get(child, item + 4));
            put(child, item + 4, &(flags | 2).to_le_bytes());
        }
    }
    let utf16 = |text: &str| flatdisk::codec::to_utf16(text, false);
    let mut locator = LOCATOR_TYPE.to_vec();
    locator.extend([0, 0, pairs.len() as u8, 0]);
    let mut strings = Vec::new();
    let strings_at = (locator.len() + pairs.len() * 12) as u32;
    for (key, value) in pairs {
        let (key, value) = (utf16(key), utf16(value));
        let key_at = strings_at + strings.len() as u32;
        let value_at = key_at + key.len() as u32;
        locator.extend(key_at.to_le_bytes());
        locator.extend(value_at.to_le_bytes());
        locator.extend((key.len() as u16).to_le_bytes());
        locator.extend((value.len() as u16).to_le_bytes());
        strings.extend(key);
        strings.extend(value);
    }
    locator.extend(strings);
    let offset = 96 << 10;
    put(child, table + u64::from(offset), &locator);
    let new = entry(count);
    put(child, new, &PARENT_LOCATOR);
    put(child, new + 16, &u32::to_le_bytes(offset));
    put(child, new + 20, &(locator.len() as u32).to_le_bytes());
    put(child, new + 24, &4u32.to_le_bytes());
    put(child, table + 10, &(count + 1).to_le_bytes());
}
