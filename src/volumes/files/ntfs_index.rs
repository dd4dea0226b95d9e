//! Directories of NTFS: the index `$I30` of names.
//!
//! ```text
//! $INDEX_ROOT        8 bytes of a part (4) | 16 node
//! $INDEX_ALLOCATION  parts: "INDX" | 4 where the update sequence is (2), its length (2) | 24 node
//! $BITMAP            which parts are in use, a bit each
//! node               0 where entries begin (4), 4 where they end (4), both from the node's start
//! entry              0 file (6), sequence (2) | 8 its bytes (2) | 12 flags (4) | 16 name, if it is not the last
//! name               0 parent | 24 changed (8) | 48 size (8) | 56 attributes (4) | 64 units (1), kind (1), UTF-16
//! ```
//!
//! All entries are looked at, part by part. Where an entry leads to in the tree is not asked: that counts in clusters,
//! or in sectors where a cluster is larger than a part, and would only tell the order.

use std::ops::ControlFlow;

use ntfs::structured_values::NtfsFileNamespace;
use ntfs::{NtfsAttribute, NtfsAttributeType, NtfsFile, NtfsReadSeek};

use super::ntfs::{failed, fill};
use super::throttle::Throttled;
use crate::error::{Error, Result};
use crate::volumes::bytes::Bytes;

/// What the index of names is called.
const NAME: &str = "$I30";
/// Bytes of a part.
const SIZES: std::ops::RangeInclusive<usize> = 512..=64 << 10;
/// Bytes of the bitmap.
const MAX_BITMAP: u64 = 8 << 20;
/// What the update sequence protects, in bytes: of each the last two are kept in it.
const SECTOR: usize = 512;

const LAST: u32 = 2;
const DIRECTORY: u32 = 0x1000_0000;

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Name {
    /// The number of the file.
    pub file: u64,
    /// The name itself.
    pub units: Vec<u16>,
    /// It is a short one, made for another.
    pub short: bool,
    /// It is a directory's.
    pub directory: bool,
    /// The file's attributes, as in its record.
    pub attributes: u32,
    /// Bytes of the file.
    pub size: u64,
    /// When it was changed, in units of 100 ns since 1601.
    pub modified: u64,
}

/// Calls `look` for every name in a directory until that has enough.
pub(super) fn each(
    directory: &NtfsFile<'_>,
    fs: &mut Throttled,
    look: &mut dyn FnMut(Name) -> ControlFlow<()>,
) -> Result<()> {
    let root = with(directory, fs, NtfsAttributeType::IndexRoot, |root, fs| {
        let mut bytes = vec![0; root.value_length().min(*SIZES.end() as u64) as usize];
        fill(&mut root.value(fs).map_err(failed)?, fs, &mut bytes)?;
        Ok(bytes)
    })?;
    let root = root.ok_or_else(|| damaged("a directory without an index"))?;
    let size = Bytes(&root).le32(8).unwrap_or(0) as usize;
    if node(root.get(16..).unwrap_or_default(), look)?.is_break() {
        return Ok(());
    }
    let used = with(directory, fs, NtfsAttributeType::Bitmap, |bitmap, fs| {
        if bitmap.value_length() > MAX_BITMAP {
            return Err(Error::unsupported("a directory that is too large to be read here"));
        }
        let mut bits = vec![0; bitmap.value_length() as usize];
        fill(&mut bitmap.value(fs).map_err(failed)?, fs, &mut bits)?;
        Ok(bits)
    })?;
    let Some(used) = used else { return Ok(()) };
    with(directory, fs, NtfsAttributeType::IndexAllocation, |parts, fs| {
        if !size.is_power_of_two() || !SIZES.contains(&size) {
            return Err(damaged("an index in parts of a wrong size"));
        }
        let count = parts.value_length() / size as u64;
        let mut value = parts.value(fs).map_err(failed)?;
        let mut part = vec![0; size];
        for number in 0..count.min(used.len() as u64 * 8) {
            if used[(number / 8) as usize] & 1 << (number % 8) == 0 {
                continue;
            }
            value.seek(fs, std::io::SeekFrom::Start(number * size as u64)).map_err(failed)?;
            fill(&mut value, fs, &mut part)?;
            put_right(&mut part).ok_or_else(|| damaged("a part of an index"))?;
            if node(&part[24..], look)?.is_break() {
                break;
            }
        }
        Ok(())
    })?;
    Ok(())
}

fn damaged(what: &str) -> Error {
    Error::corrupt(format!("the file system is damaged: {what}"))
}

/// What `read` makes of an attribute of the index, if there is one.
fn with<T>(
    directory: &NtfsFile<'_>,
    fs: &mut Throttled,
    kind: NtfsAttributeType,
    read: impl FnOnce(&NtfsAttribute<'_, '_>, &mut Throttled) -> Result<T>,
) -> Result<Option<T>> {
    let mut attributes = directory.attributes();
    while let Some(item) = attributes.next(fs) {
        let item = item.map_err(failed)?;
        let attribute = item.to_attribute().map_err(failed)?;
        if attribute.ty().is_ok_and(|ty| ty == kind)
            && attribute.name().is_ok_and(|name| name == NAME)
        {
            return read(&attribute, fs).map(Some);
        }
    }
    Ok(None)
}

/// Puts the ends of sectors back to their places; `None` if they do not belong to this writing of the part.
fn put_right(part: &mut [u8]) -> Option<()> {
    let bytes = Bytes(part);
    let (at, count) = (usize::from(bytes.le16(4)?), usize::from(bytes.le16(6)?));
    if !bytes.has(0, b"INDX") || count != part.len() / SECTOR + 1 {
        return None;
    }
    let sequence = bytes.get(at, count * 2)?.to_vec();
    let (mark, ends) = sequence.split_at(2);
    for (sector, end) in part.chunks_exact_mut(SECTOR).zip(ends.chunks_exact(2)) {
        let last = &mut sector[SECTOR - 2..];
        if last != mark {
            return None;
        }
        last.copy_from_slice(end);
    }
    Some(())
}

/// Looks at all entries of a node.
fn node(bytes: &[u8], look: &mut dyn FnMut(Name) -> ControlFlow<()>) -> Result<ControlFlow<()>> {
    let mut entries = || {
        let from = Bytes(bytes).le32(0)? as usize;
        let end = Bytes(bytes).le32(4)? as usize;
        let mut rest = bytes.get(from..end)?;
        loop {
            let entry = Bytes(rest);
            let (len, flags) = (usize::from(entry.le16(8)?), entry.le32(12)?);
            if flags & LAST != 0 {
                return Some(ControlFlow::Continue(()));
            }
            let name = name(entry.get(0, len)?)?;
            if look(name).is_break() {
                return Some(ControlFlow::Break(()));
            }
            rest = &rest[len.max(16)..];
        }
    };
    entries().ok_or_else(|| damaged("an index"))
}

fn name(entry: &[u8]) -> Option<Name> {
    let key = Bytes(entry.get(16..)?);
    let units = key.get(66, usize::from(key.u8(64)?) * 2)?;
    let attributes = key.le32(56)?;
    Some(Name {
        file: Bytes(entry).le64(0)? & ((1 << 48) - 1),
        units: units.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]])).collect(),
        short: key.u8(65)? == NtfsFileNamespace::Dos as u8,
        directory: attributes & DIRECTORY != 0,
        attributes,
        size: key.le64(48)?,
        modified: key.le64(24)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A node with entries of these names.
    fn made(names: &[&str]) -> Vec<u8> {
        let mut bytes = vec![0; 16];
        for (number, name) in names.iter().enumerate() {
            let units: Vec<_> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
            let len = (16 + 66 + units.len()).next_multiple_of(8);
            let mut entry = vec![0; len];
            entry[0] = number as u8 + 20;
            entry[6] = 1;
            entry[8] = len as u8;
            entry[16 + 48] = 7;
            entry[16 + 59] = 0x10;
            entry[16 + 64] = (units.len() / 2) as u8;
            entry[16 + 66..16 + 66 + units.len()].copy_from_slice(&units);
            bytes.extend(entry);
        }
        let mut last = [0; 16];
        (last[8], last[12]) = (16, 2);
        bytes.extend(last);
        let end = bytes.len() as u32;
        bytes[0] = 16;
        bytes[4..8].copy_from_slice(&end.to_le_bytes());
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Vec<Name>> {
        let mut names = Vec::new();
        let _ = node(bytes, &mut |name| {
            names.push(name);
            ControlFlow::Continue(())
        })?;
        Ok(names)
    }

    #[test]
    fn names_are_read_up_to_the_last_entry() {
        let names = read(&made(&["a", "Ünïcode"])).unwrap();
        assert_eq!((names[0].file, names[1].file, names.len()), (20, 21, 2));
        assert_eq!(String::from_utf16(&names[1].units).unwrap(), "Ünïcode");
        assert!(names[0].directory && names[0].size == 7);
        assert!(read(&made(&[])).unwrap().is_empty());
    }

    #[test]
    fn entries_that_lead_nowhere_end_in_an_error() {
        let good = made(&["first", "second"]);
        for at in 0..good.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bytes = good.clone();
                bytes[at] = value;
                if let Ok(names) = read(&bytes) {
                    assert!(names.len() <= 8, "{at} {value}");
                }
            }
            assert!(read(&good[..at]).is_err(), "{at}");
        }
    }

    #[test]
    fn ends_of_sectors_are_put_back() {
        let mut part = vec![0; 1024];
        part[..8].copy_from_slice(b"INDX\x28\0\x03\0");
        part[0x28..0x2e].copy_from_slice(&[7, 8, 1, 2, 3, 4]);
        for end in [510, 1022] {
            part[end..end + 2].copy_from_slice(&[7, 8]);
        }
        let mut torn = part.clone();
        torn[1022] = 0;
        assert!(put_right(&mut torn).is_none());
        put_right(&mut part).unwrap();
        assert_eq!((&part[510..512], &part[1022..]), (&[1, 2][..], &[3, 4][..]));
        for (at, value) in [(0, b'X'), (4, 0xff), (5, 0xff), (6, 9), (6, 0)] {
            let mut bad = part.clone();
            bad[at] = value;
            assert!(put_right(&mut bad).is_none(), "{at}");
        }
    }
}
