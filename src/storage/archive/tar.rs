//! The headers of tar archives: ustar, pax, and GNU's long names, POSIX.1-2017 "pax", GNU tar manual "Basic
//! Tar Format".
//!
//! ```text
//! 0 name (100) | 124 size (12) | 148 checksum (8) | 156 type (1) | 257 magic (8) | 345 prefix (155)
//! ```
//!
//! A header takes a block of 512 bytes, what it tells of follows, filled up to whole blocks. [`index`] walks
//! from header to header and reads nothing else, but for the records that give the next member a longer
//! name or size; it goes forward only, and how far is limited ([`MAX_HEADERS`], [`MAX_RECORDS`],
//! [`MAX_NAMES`]).

use super::{Index, Member, Place};
use crate::error::{Error, Result};
use crate::storage::Storage;

/// Bytes of a header, and what everything is a multiple of.
pub const BLOCK: u64 = 512;
/// Headers that are looked at in one archive.
const MAX_HEADERS: usize = 1 << 16;
/// Bytes of one record that names the next member.
const MAX_RECORDS: u64 = 64 << 10;
/// Bytes of all names of an archive.
const MAX_NAMES: usize = 8 << 20;

/// One header.
struct Header {
    name: Vec<u8>,
    size: u64,
    kind: u8,
}

/// What records tell of the next member.
#[derive(Default)]
struct Told {
    name: Option<Vec<u8>>,
    size: Option<u64>,
    sparse: bool,
}

/// Whether a block is the header of a tar archive, by its checksum.
pub fn is_header(block: &[u8]) -> bool {
    let Some(block) = block.get(..BLOCK as usize) else { return false };
    let Some(told) = octal(&block[148..156]) else { return false };
    let others = || block[..148].iter().chain(&block[156..]);
    let blanks = 8 * u64::from(b' ');
    let plain = blanks + others().map(|byte| u64::from(*byte)).sum::<u64>();
    // Some programs added up signed bytes.
    let signed = blanks.cast_signed() + others().map(|b| i64::from(b.cast_signed())).sum::<i64>();
    told == plain || i64::try_from(told) == Ok(signed)
}

/// What is in the archive in `file`, in its order. Directories and links are left out.
///
/// # Errors
/// The archive is damaged ([`crate::ErrorKind::Corrupt`]) or has more members than are looked at.
pub fn index(file: &dyn Storage) -> Result<Index> {
    let failed = |e: std::io::Error| Error::io("read", &e).in_file(file.path());
    let damaged = |at: u64, what: String| Error::corrupt(what).in_file(file.path()).at(at);
    let len = file.len().map_err(failed)?;
    let (mut at, mut names) = (0u64, 0);
    let mut members = Vec::new();
    let mut told = Told::default();
    let mut begins = None;
    for _ in 0..MAX_HEADERS {
        let mut block = [0; BLOCK as usize];
        if at.checked_add(BLOCK).is_none_or(|end| end > len) {
            // Some programs leave the two empty blocks away that end an archive.
            let whole = at >= len;
            return if whole {
                Ok(Index { members, end: at })
            } else {
                Err(damaged(at, "archive: it ends in a header".into()))
            };
        }
        file.read_at(at, &mut block).map_err(failed)?;
        if block.iter().all(|byte| *byte == 0) {
            return Ok(Index { members, end: at });
        }
        let header = decode(&block).map_err(|what| damaged(at, what))?;
        let data = at + BLOCK;
        let size =
            if is_record(header.kind) { header.size } else { told.size.unwrap_or(header.size) };
        let end = data.checked_add(size).and_then(|end| end.checked_next_multiple_of(BLOCK));
        let Some(end) = end else {
            return Err(damaged(at, format!("archive: a member of {size} bytes")));
        };
        if header.kind != b'g' {
            begins.get_or_insert(at);
        }
        match header.kind {
            b'x' | b'L' => {
                if size > MAX_RECORDS || data + size > len {
                    return Err(damaged(at, format!("archive: a name in {size} bytes")));
                }
                let mut text = vec![0; size as usize];
                file.read_at(data, &mut text).map_err(failed)?;
                if header.kind == b'L' {
                    told.name = Some(until_nul(&text).to_vec());
                } else {
                    records(&text, &mut told);
                }
            }
            // The target of a link, and what counts for all members.
            b'K' | b'g' => {}
            kind => {
                let told = std::mem::take(&mut told);
                let begins = begins.take().unwrap_or(at);
                let name = told.name.unwrap_or(header.name);
                names += name.len();
                if names > MAX_NAMES {
                    return Err(damaged(
                        at,
                        "archive: its names do not fit into memory".to_owned(),
                    ));
                }
                let sparse = told.sparse || kind == b'S';
                if matches!(kind, 0 | b'0' | b'7' | b'S') {
                    let problem = if sparse {
                        Some("it was stored as a sparse file; tar without --sparse stores it whole")
                    } else if data + size > len {
                        Some("the archive ends before it does: an incomplete download or copy")
                    } else {
                        None
                    };
                    let place = Place { begins, at: data, size };
                    members.extend(Member::new(&name, place, problem));
                }
            }
        }
        at = end;
    }
    let what = format!("archive: more than {MAX_HEADERS} members");
    Err(Error::unsupported(what).in_file(file.path()).hint("unpack it: `tar -xf` does"))
}

/// Whether a header of this type tells of the next member.
fn is_record(kind: u8) -> bool {
    matches!(kind, b'x' | b'g' | b'L' | b'K')
}

fn decode(block: &[u8; BLOCK as usize]) -> std::result::Result<Header, String> {
    if !is_header(block) {
        return Err("archive: bad checksum of a header".to_owned());
    }
    let size = number(&block[124..136]).ok_or("archive: a member without a size")?;
    let mut name = until_nul(&block[..100]).to_vec();
    let prefix = until_nul(&block[345..500]);
    // GNU's magic ends with a blank, and there other things are in the place of the prefix.
    if block[257..263] == *b"ustar\0" && !prefix.is_empty() {
        name = [prefix, b"/", &name].concat();
    }
    Ok(Header { name, size, kind: block[156] })
}

/// Takes what counts out of the records `LENGTH NAME=VALUE\n` of a pax header.
fn records(mut text: &[u8], told: &mut Told) {
    while let Some(blank) = text.iter().position(|byte| *byte == b' ') {
        let len = std::str::from_utf8(&text[..blank]).ok().and_then(|len| len.parse().ok());
        let Some(record) = len.and_then(|len: usize| text.get(blank + 1..len)) else { return };
        text = &text[blank + 1 + record.len()..];
        let record = record.strip_suffix(b"\n").unwrap_or(record);
        let Some(equals) = record.iter().position(|byte| *byte == b'=') else { continue };
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        match key {
            b"path" => told.name = Some(value.to_vec()),
            b"size" => told.size = std::str::from_utf8(value).ok().and_then(|v| v.parse().ok()),
            b"GNU.sparse.name" => told.name = Some(value.to_vec()),
            _ => told.sparse |= key.starts_with(b"GNU.sparse."),
        }
    }
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// A number in octal digits, among blanks; nothing but blanks is 0.
fn octal(field: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(until_nul(field)).ok()?.trim();
    if text.is_empty() { Some(0) } else { u64::from_str_radix(text, 8).ok() }
}

/// A number in octal digits, or in binary where its first bit is set.
fn number(field: &[u8]) -> Option<u64> {
    match field.split_first()? {
        (0x80, rest) => rest.iter().try_fold(0u64, |value, byte| {
            let high = value.checked_mul(256)?;
            high.checked_add(u64::from(*byte))
        }),
        (first, _) if first & 0x80 != 0 => None,
        _ => octal(field),
    }
    .filter(|value| i64::try_from(*value).is_ok())
}

/// The header of a member called `name` of `size` bytes, changed `modified` seconds after 1970. `None` where
/// the name is too long for it.
pub fn encode(name: &str, size: u64, modified: u64) -> Option<[u8; BLOCK as usize]> {
    let mut block = [0; BLOCK as usize];
    block.get_mut(..100)?.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
    block[100..108].copy_from_slice(b"0000644\0");
    block[108..116].copy_from_slice(b"0000000\0");
    block[116..124].copy_from_slice(b"0000000\0");
    block[136..148].copy_from_slice(digits(modified.min(MAX_DIGITS)).as_bytes());
    block[156] = b'0';
    block[257..265].copy_from_slice(b"ustar\x0000");
    Some(resized(block, size))
}

/// The same header for a member of `size` bytes.
pub fn resized(mut block: [u8; BLOCK as usize], size: u64) -> [u8; BLOCK as usize] {
    if size <= MAX_DIGITS {
        block[124..136].copy_from_slice(digits(size).as_bytes());
    } else {
        block[124..136].fill(0);
        block[124] = 0x80;
        block[128..136].copy_from_slice(&size.to_be_bytes());
    }
    block[148..156].fill(b' ');
    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

/// The largest number that has room in digits.
const MAX_DIGITS: u64 = (1 << 33) - 1;

fn digits(number: u64) -> String {
    format!("{number:011o}\0")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::storage::memory::MemoryFile;

    fn archive(parts: &[&[u8]]) -> Result<Vec<Member>> {
        index(&*MemoryFile::new("/x.ova", &parts.concat())).map(|index| index.members)
    }

    fn sealed(mut block: [u8; 512]) -> [u8; 512] {
        block[148..156].fill(b' ');
        let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }

    fn typed(name: &str, size: u64, kind: u8) -> [u8; 512] {
        let mut block = encode(name, size, 0).unwrap();
        block[156] = kind;
        sealed(block)
    }

    #[test]
    fn what_is_encoded_decodes() {
        for size in [0, 1, 511, (1 << 33) - 1, 1 << 33, 1 << 62] {
            let block = encode("a/disk.vmdk", size, 1).unwrap();
            let header = decode(&block).unwrap();
            assert_eq!(
                (header.name, header.size, header.kind),
                (b"a/disk.vmdk".into(), size, b'0')
            );
        }
        assert!(encode(&"x".repeat(101), 0, 0).is_none());
    }

    #[test]
    fn sizes_that_are_none_are_refused() {
        let mut negative = encode("a", 0, 0).unwrap();
        negative[124..136].fill(0xff);
        let mut huge = encode("a", 0, 0).unwrap();
        huge[124..136].copy_from_slice(b"\x80\0\0\0\x80\0\0\0\0\0\0\0");
        let mut letters = encode("a", 0, 0).unwrap();
        letters[124..136].copy_from_slice(b"what is this");
        for block in [negative, huge, letters] {
            let refused = archive(&[&sealed(block)]).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Corrupt, "{refused}");
        }
        let largest = typed("a.vhd", i64::MAX as u64, b'0');
        assert!(archive(&[&largest]).unwrap()[0].problem.is_some());
    }

    #[test]
    fn a_changed_header_is_told() {
        let mut block = encode("a", 0, 0).unwrap();
        block[0] = b'b';
        assert!(archive(&[&block]).unwrap_err().to_string().contains("checksum"));
    }

    #[test]
    fn names_lead_nowhere_else() {
        for name in ["/etc/passwd", "../x.vhd", "a/../../x.vhd", "", ".", "./"] {
            assert!(archive(&[&encode(name, 0, 0).unwrap()]).unwrap().is_empty(), "{name}");
        }
        let kept = archive(&[&encode("./a//b.vhd", 0, 0).unwrap()]).unwrap();
        assert_eq!(kept[0].name.to_str(), Some("a/b.vhd"));
    }

    #[test]
    fn records_count_for_the_next_member_alone() {
        let mut text = b"20 path=renamed.vhd\n12 size=512\n".to_vec();
        let len = text.len() as u64;
        text.resize(512, 0);
        let members = archive(&[
            &typed("x", len, b'x'),
            &text,
            &encode("short", 0, 0).unwrap(),
            &[1; 512],
            &encode("next.vhd", 0, 0).unwrap(),
        ]);
        let members = members.unwrap();
        let found: Vec<_> =
            members.iter().map(|m| (m.name.to_str().unwrap(), m.size, m.begins)).collect();
        assert_eq!(found, [("renamed.vhd", 512, 0), ("next.vhd", 0, 4 * BLOCK)]);
    }

    #[test]
    fn a_record_without_end_takes_no_memory() {
        let refused = archive(&[&typed("x", 1 << 40, b'L')]).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Corrupt);
        // A record whose length is nonsense tells nothing.
        let mut told = Told::default();
        for text in [&b"0 path=a\n"[..], b"99 path=a\n", b"-1 path=a\n", b"x", b"1 "] {
            records(text, &mut told);
        }
        assert!(told.name.is_none());
    }

    #[test]
    fn members_without_end_are_refused() {
        let many = encode("a.vhd", 0, 0).unwrap().repeat(MAX_HEADERS + 1);
        assert_eq!(archive(&[&many]).unwrap_err().kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn sparse_members_are_named_and_not_shown() {
        let members = archive(&[&typed("a.vhd", 0, b'S')]).unwrap();
        assert!(members[0].problem.unwrap().contains("sparse"));
    }
}
