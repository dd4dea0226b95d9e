//! Hives of the Windows registry, as far as it takes to read a value by its name.
//!
//! ```text
//! base block  "regf" | 36 root key's cell (4)
//! cell        at 4096 and its offset: length, negative while it is in use (4) | contents
//! key         "nk" | 2 flags (2) | 20 subkeys (4) | 28 their list (4) | 36 values (4), their list (4) | 72 name (2) | 76 name
//! lists       "lf", "lh", "li", "ri": 2 entries (2) | 4 cells (4), after each of lf and lh a hash (4)
//! value       "vk" | 2 name (2) | 4 bytes (4) | 8 cell, or the bytes if 4 has its highest bit (4) | 12 type (4) | 16 flags (2) | 20 name
//! ```
//!
//! What a hive says is checked; how much of it is looked at is limited ([`MAX_READ`]), so that one that leads in
//! circles comes to an end. Transaction logs beside a hive are not replayed: names and versions hardly change.

use std::collections::HashMap;

use crate::error::Result;

use super::bytes::Bytes;

/// Bytes of cells that are looked at for one key, of which every one costs [`CELL`] more.
const MAX_READ: usize = 16 << 20;
const CELL: usize = 1 << 10;
/// Bytes of a cell that are read: lists are the longest.
const MAX_CELL: usize = 1 << 20;
/// Where cells begin.
const BASE: u64 = 4096;
/// Bytes that are read at once.
const PAGE: u64 = 4096;
/// Pages that are kept.
const MAX_PAGES: usize = 1024;
/// Bytes of a value.
const MAX_VALUE: usize = 4096;
/// Set in a key's or value's flags where its name has a byte a letter.
const KEY_NARROW: u16 = 0x20;
const VALUE_NARROW: u16 = 1;
const INLINE: u32 = 1 << 31;

/// A value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    /// REG_SZ and REG_EXPAND_SZ.
    Text(String),
    /// REG_DWORD.
    Number(u32),
}

/// A hive that is read with a function that fills a buffer from a place on.
pub(super) struct Hive<R> {
    read: R,
    pages: HashMap<u64, Vec<u8>>,
    left: usize,
    /// Nothing is left of it.
    spent: bool,
}

impl<R: FnMut(u64, &mut [u8]) -> Result<()>> Hive<R> {
    /// One that `read` reads.
    pub fn new(read: R) -> Self {
        Self { read, pages: HashMap::new(), left: 0, spent: false }
    }

    /// The values of the key that `path` leads to from the root, by their names; `None` where there is no such key, or the
    /// hive is damaged on the way.
    pub fn values(&mut self, path: &[&str]) -> Option<HashMap<String, Value>> {
        self.left = MAX_READ;
        let base = self.bytes(0, 40)?;
        if !Bytes(&base).has(0, b"regf") {
            return None;
        }
        let mut key = self.cell(Bytes(&base).le32(36)?)?;
        for name in path {
            key = self.subkey(&key, name)?;
        }
        let key = Bytes(&key);
        let count = key.le32(36)?;
        let mut values = HashMap::new();
        if count > 0 {
            let list = self.cell(key.le32(40)?)?;
            for number in 0..count as usize {
                let cell = Bytes(&list).le32(number.checked_mul(4)?)?;
                values.extend(self.cell(cell).and_then(|cell| self.value(&cell)));
                if self.spent {
                    break;
                }
            }
        }
        Some(values)
    }

    fn subkey(&mut self, key: &[u8], name: &str) -> Option<Vec<u8>> {
        if Bytes(key).le32(20)? == 0 {
            return None;
        }
        let mut lists = vec![Bytes(key).le32(28)?];
        while let Some(list) = lists.pop() {
            let list = self.cell(list)?;
            let list = Bytes(&list);
            let step = match list.get(0, 2)? {
                b"lf" | b"lh" => 8,
                b"li" | b"ri" => 4,
                _ => return None,
            };
            for number in 0..usize::from(list.le16(2)?) {
                let cell = list.le32(4 + number * step)?;
                if list.has(0, b"ri") {
                    lists.push(cell);
                    continue;
                }
                // One bad key does not hide the others.
                let Some(key) = self.cell(cell) else {
                    if self.spent {
                        return None;
                    }
                    continue;
                };
                if key_name(&key).is_some_and(|own| own.eq_ignore_ascii_case(name)) {
                    return Some(key);
                }
            }
        }
        None
    }

    fn value(&mut self, cell: &[u8]) -> Option<(String, Value)> {
        let cell = Bytes(cell);
        if !cell.has(0, b"vk") {
            return None;
        }
        let narrow = cell.le16(16)? & VALUE_NARROW != 0;
        let name = text(cell.get(20, usize::from(cell.le16(2)?))?, narrow);
        let size = cell.le32(4)?;
        let len = (size & !INLINE) as usize;
        let data = match size & INLINE != 0 {
            true => cell.get(8, len.min(4))?.to_vec(),
            false if len <= MAX_VALUE => self.cell(cell.le32(8)?)?.get(..len)?.to_vec(),
            false => return None,
        };
        let value = match cell.le32(12)? {
            1 | 2 => Value::Text(crate::codec::utf16(&data, false)),
            4 => Value::Number(Bytes(&data).le32(0)?),
            _ => return None,
        };
        Some((name, value))
    }

    /// The contents of a cell in use.
    fn cell(&mut self, offset: u32) -> Option<Vec<u8>> {
        let at = BASE + u64::from(offset);
        let head = self.bytes(at, 4)?;
        let len = Bytes(&head).le32(0)?.cast_signed();
        let len = len.checked_neg().and_then(|len| usize::try_from(len).ok())?;
        let len = len.checked_sub(4)?.min(MAX_CELL);
        self.spent |= self.left < CELL + len;
        self.left = self.left.checked_sub(CELL + len)?;
        self.bytes(at + 4, len)
    }

    fn bytes(&mut self, at: u64, len: usize) -> Option<Vec<u8>> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let pos = at + bytes.len() as u64;
            let page = self.page(pos / PAGE)?;
            let from = (pos % PAGE) as usize;
            bytes.extend(&page[from..page.len().min(from + len - bytes.len())]);
        }
        Some(bytes)
    }

    fn page(&mut self, number: u64) -> Option<&[u8]> {
        if self.pages.len() >= MAX_PAGES {
            self.pages.clear();
        }
        if !self.pages.contains_key(&number) {
            let mut page = vec![0; PAGE as usize];
            (self.read)(number * PAGE, &mut page).ok()?;
            self.pages.insert(number, page);
        }
        self.pages.get(&number).map(Vec::as_slice)
    }
}

fn key_name(key: &[u8]) -> Option<String> {
    let key = Bytes(key);
    if !key.has(0, b"nk") {
        return None;
    }
    let narrow = key.le16(2)? & KEY_NARROW != 0;
    Some(text(key.get(76, usize::from(key.le16(72)?))?, narrow))
}

/// A name: of Latin-1 letters or of UTF-16 units.
fn text(bytes: &[u8], narrow: bool) -> String {
    match narrow {
        true => bytes.iter().map(|byte| char::from(*byte)).collect(),
        false => crate::codec::utf16(bytes, false),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A hive with one path of keys, and values at its end, as Windows lays it out.
    pub fn made(path: &[&str], values: &[(&str, Value)]) -> Vec<u8> {
        let mut cells = Cells(Vec::new());
        let mut list = Vec::new();
        for (name, value) in values {
            let mut cell = b"vk".to_vec();
            cell.extend((name.len() as u16).to_le_bytes());
            let (size, data, kind) = match value {
                Value::Number(number) => (INLINE | 4, *number, 4u32),
                Value::Text(text) => {
                    let data = crate::codec::to_utf16(&format!("{text}\0"), false);
                    (data.len() as u32, cells.put(&data), 1)
                }
            };
            for number in [size, data, kind, u32::from(VALUE_NARROW)] {
                cell.extend(number.to_le_bytes());
            }
            cell.extend(name.as_bytes());
            list.extend(cells.put(&cell).to_le_bytes());
        }
        let values_at = (values.len() as u32, cells.put(&list));
        let mut below = None;
        let names: Vec<_> = std::iter::once(&"ROOT").chain(path).collect();
        for (depth, name) in names.iter().enumerate().rev() {
            let mut key = vec![0; 76];
            key[..2].copy_from_slice(b"nk");
            key[2] = KEY_NARROW as u8 | if depth == 0 { 0xc } else { 0 };
            let mut put = |at: usize, number: u32| {
                key[at..at + 4].copy_from_slice(&number.to_le_bytes());
            };
            [16, 28, 32, 40, 44, 48].into_iter().for_each(|at| put(at, u32::MAX));
            if let Some(child) = below {
                let list = [&b"lh\x01\0"[..], &u32::to_le_bytes(child), &[0; 4]].concat();
                put(20, 1);
                put(28, cells.put(&list));
            } else {
                put(36, values_at.0);
                put(40, values_at.1);
            }
            put(72, name.len() as u32);
            key.extend(name.as_bytes());
            below = Some(cells.put(&key));
        }
        cells.whole(below.unwrap())
    }

    /// Cells in one bin.
    struct Cells(Vec<u8>);

    impl Cells {
        fn put(&mut self, contents: &[u8]) -> u32 {
            let at = 32 + self.0.len() as u32;
            let len = (contents.len() + 4).next_multiple_of(8);
            self.0.extend((-(len as i32)).to_le_bytes());
            self.0.extend(contents);
            self.0.resize(at as usize - 32 + len, 0);
            at
        }

        fn whole(mut self, root: u32) -> Vec<u8> {
            let used = 32 + self.0.len();
            let size = (used + 8).next_multiple_of(4096);
            self.0.extend(((size - used) as i32).to_le_bytes());
            self.0.resize(size - 32, 0);
            let mut bin = b"hbin\0\0\0\0".to_vec();
            bin.extend((size as u32).to_le_bytes());
            bin.resize(32, 0);
            let mut base = vec![0; 4096];
            base[..4].copy_from_slice(b"regf");
            for (at, number) in
                [(4, 1), (8, 1), (20, 1), (24, 5), (32, 1), (36, root), (40, size as u32), (44, 1)]
            {
                base[at..at + 4].copy_from_slice(&number.to_le_bytes());
            }
            let sum = base[..508].chunks_exact(4);
            let sum = sum.fold(0, |sum, word| sum ^ u32::from_le_bytes(word.try_into().unwrap()));
            base[508..512].copy_from_slice(&sum.to_le_bytes());
            [base, bin, self.0].concat()
        }
    }

    fn values(bytes: &[u8], path: &[&str]) -> Option<HashMap<String, Value>> {
        let mut reads = 0;
        Hive::new(|at, buf: &mut [u8]| {
            reads += 1;
            assert!(reads < 100_000);
            let from = at as usize;
            let part = bytes.get(from..from + buf.len());
            part.map(|part| buf.copy_from_slice(part))
                .ok_or_else(|| crate::error::Error::invalid("the end"))
        })
        .values(path)
    }

    const PATH: [&str; 3] = ["Microsoft", "Windows NT", "CurrentVersion"];

    fn example() -> Vec<u8> {
        let text = Value::Text("Windows Ünïcode".to_owned());
        made(&PATH, &[("ProductName", text), ("UBR", Value::Number(7))])
    }

    #[test]
    fn values_are_found_by_the_names_of_their_keys() {
        let bytes = example();
        let found = values(&bytes, &["MICROSOFT", "windows nt", "CurrentVersion"]).unwrap();
        assert_eq!(found["ProductName"], Value::Text("Windows Ünïcode".to_owned()));
        assert_eq!(found["UBR"], Value::Number(7));
        assert_eq!(values(&bytes, &["Microsoft", "Windows"]), None);
        assert_eq!(values(&bytes[..4096], &PATH), None);
    }

    /// What was made here is one to a program that was not.
    #[test]
    fn hivex_reads_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("hive");
        std::fs::write(&file, example()).unwrap();
        let key = format!("\\{}", PATH.join("\\"));
        let told =
            std::process::Command::new("hivexget").arg(&file).args([&key, "ProductName"]).output();
        let Ok(told) = told else {
            let required = std::env::var_os("FLATDISK_REQUIRE_TOOLS");
            assert!(required.is_none(), "hivexget is missing");
            println!("SKIPPED: hivexget is not installed");
            return;
        };
        assert_eq!(String::from_utf8_lossy(&told.stdout).trim(), "Windows Ünïcode", "{told:?}");
    }

    #[test]
    fn damaged_hives_come_to_an_end() {
        let good = example();
        for at in (0..48).chain(4096..4096 + 700) {
            for value in [0, 1, 0x20, 0x7f, 0x80, 0xff] {
                let mut bytes = good.clone();
                bytes[at] = value;
                let _ = values(&bytes, &PATH);
            }
        }
        // A list of lists that is its own entry.
        let mut cells = Cells(Vec::new());
        let list = cells.put(&[&b"ri\x10\0"[..], &[0; 64]].concat());
        for entry in 0..16 {
            let at = list as usize - 32 + 8 + entry * 4;
            cells.0[at..at + 4].copy_from_slice(&list.to_le_bytes());
        }
        let mut key = vec![0; 80];
        key[..2].copy_from_slice(b"nk");
        key[20] = 1;
        key[28..32].copy_from_slice(&list.to_le_bytes());
        let root = cells.put(&key);
        assert_eq!(values(&cells.whole(root), &PATH), None);
    }
}
