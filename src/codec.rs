//! Small decoders that byte-order integers do not cover: GUIDs, text, table reads.

use std::io;

use uuid::Uuid;

use crate::error::{Error, Result};
use crate::storage::Storage;

/// Reads a GUID stored in Microsoft's mixed byte order.
pub fn guid(bytes: &[u8; 16]) -> Uuid {
    Uuid::from_bytes_le(*bytes)
}

/// Decodes UTF-16 bytes, unpaired surrogates as replacement characters; stops at the first NUL.
pub fn utf16(bytes: &[u8], big_endian: bool) -> String {
    let units = bytes.chunks_exact(2).map(|pair| {
        let pair = [pair[0], pair[1]];
        if big_endian { u16::from_be_bytes(pair) } else { u16::from_le_bytes(pair) }
    });
    char::decode_utf16(units.take_while(|unit| *unit != 0))
        .map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect()
}

/// Encodes text as UTF-16 bytes without terminator.
pub fn to_utf16(text: &str, big_endian: bool) -> Vec<u8> {
    text.encode_utf16()
        .flat_map(|unit| if big_endian { unit.to_be_bytes() } else { unit.to_le_bytes() })
        .collect()
}

/// Bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads `N` bytes of a structure called `what`; a file that ends before is reported as damage.
pub fn read_array<const N: usize>(file: &dyn Storage, at: u64, what: &str) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    read_exact(file, at, &mut bytes, what)?;
    Ok(bytes)
}

/// Fills `buf` with a structure called `what`; a file that ends before is reported as damage.
pub fn read_exact(file: &dyn Storage, at: u64, buf: &mut [u8], what: &str) -> Result<()> {
    file.read_at(at, buf).map_err(|e| {
        let error = match e.kind() {
            io::ErrorKind::UnexpectedEof => {
                Error::corrupt(format!("{what} lies past the end of the file"))
            }
            _ => Error::io(format!("reading {what}"), &e),
        };
        error.in_file(file.path()).at(at)
    })
}

/// Writes a structure called `what`.
pub fn write_all(file: &dyn Storage, at: u64, data: &[u8], what: &str) -> Result<()> {
    file.write_at(at, data)
        .map_err(|e| Error::io(format!("writing {what}"), &e).in_file(file.path()).at(at))
}

/// Whether all bytes are zero. Compares pages, for which processors have wide instructions.
pub fn is_zero(bytes: &[u8]) -> bool {
    static ZEROES: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROES.len()).all(|page| page == &ZEROES[..page.len()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_that_is_not_zero_is_found_wherever_it_is() {
        for len in [0, 1, 511, 4096, 4097, 3 * 4096 + 5] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in 0..len {
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "{at} of {len}");
                bytes[at] = 0;
            }
        }
    }

    #[test]
    fn utf16_both_ways_and_with_lone_surrogates() {
        assert_eq!(utf16(&to_utf16("påth", true), true), "påth");
        assert_eq!(utf16(&[0x41, 0, 0x00, 0xd8, 0x42, 0, 0, 0, 0x43, 0], false), "A\u{fffd}B");
    }
}
