//! Fields of a structure that was read from a disk: every access is checked.

/// The bytes of a structure.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bytes<'a>(pub &'a [u8]);

impl<'a> Bytes<'a> {
    /// `len` bytes at `at`.
    pub fn get(self, at: usize, len: usize) -> Option<&'a [u8]> {
        self.0.get(at..at.checked_add(len)?)
    }

    /// An array at `at`.
    pub fn array<const N: usize>(self, at: usize) -> Option<[u8; N]> {
        self.get(at, N)?.try_into().ok()
    }

    /// Whether `magic` stands at `at`.
    pub fn has(self, at: usize, magic: &[u8]) -> bool {
        self.get(at, magic.len()) == Some(magic)
    }

    pub fn u8(self, at: usize) -> Option<u8> {
        self.0.get(at).copied()
    }

    pub fn le16(self, at: usize) -> Option<u16> {
        self.array(at).map(u16::from_le_bytes)
    }

    pub fn le32(self, at: usize) -> Option<u32> {
        self.array(at).map(u32::from_le_bytes)
    }

    pub fn le64(self, at: usize) -> Option<u64> {
        self.array(at).map(u64::from_le_bytes)
    }

    pub fn be16(self, at: usize) -> Option<u16> {
        self.array(at).map(u16::from_be_bytes)
    }

    pub fn be32(self, at: usize) -> Option<u32> {
        self.array(at).map(u32::from_be_bytes)
    }

    pub fn be64(self, at: usize) -> Option<u64> {
        self.array(at).map(u64::from_be_bytes)
    }

    /// Text of at most `len` bytes, to the first NUL, without spaces at its end; `None` if nothing is
    /// left.
    pub fn text(self, at: usize, len: usize) -> Option<String> {
        let bytes = self.get(at, len)?;
        let bytes = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        filled(String::from_utf8_lossy(bytes).trim_end_matches(' ').to_owned())
    }

    /// UTF-16 text of at most `len` bytes, to the first NUL; `None` if there is none.
    pub fn text16(self, at: usize, len: usize) -> Option<String> {
        filled(crate::codec::utf16(self.get(at, len)?, false))
    }

    /// A UUID whose bytes are in the order of its text; `None` for all zeroes.
    pub fn uuid(self, at: usize) -> Option<String> {
        let uuid = uuid::Uuid::from_bytes(self.array(at)?);
        (!uuid.is_nil()).then(|| uuid.to_string())
    }

    /// A GUID in Microsoft's mixed order.
    pub fn guid(self, at: usize) -> Option<uuid::Uuid> {
        self.array(at).map(|bytes| crate::codec::guid(&bytes))
    }
}

fn filled(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}
