//! A disk, or a part of one, as `std::io` knows files: [`Read`], [`Write`] and [`Seek`], so that other
//! crates read file systems from it and write to it.
//!
//! As on a block device, reading stops at the end, and writing past it is [`io::ErrorKind::StorageFull`].
//! Written bytes are durable after [`Write::flush`], which is [`Disk::flush`]; dropping a cursor
//! flushes nothing.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Deref;

use super::Disk;
use super::window::Window;
use crate::error::{Error, ErrorKind};

/// A position in a [`Window`].
#[derive(Debug, Clone)]
pub struct Cursor<D> {
    window: Window<D>,
    position: u64,
}

impl<D: Deref<Target = Disk>> Cursor<D> {
    /// A cursor at the start of `window`.
    pub fn new(window: Window<D>) -> Self {
        Self { window, position: 0 }
    }

    /// A cursor at the start of `disk`, all of it.
    pub fn over(disk: D) -> Self {
        Self::new(Window::whole(disk))
    }

    /// What the cursor is in.
    pub fn window(&self) -> &Window<D> {
        &self.window
    }

    /// How many of `wanted` bytes lie between the position and the end.
    fn available(&self, wanted: usize) -> usize {
        let left = self.window.size().saturating_sub(self.position);
        usize::try_from(left).map_or(wanted, |left| wanted.min(left))
    }
}

impl<D: Deref<Target = Disk>> Read for Cursor<D> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.available(buf.len());
        if len > 0 {
            self.window.read_at(self.position, &mut buf[..len])?;
            self.position += len as u64;
        }
        Ok(len)
    }
}

impl<D: Deref<Target = Disk>> Write for Cursor<D> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let len = self.available(data.len());
        if len == 0 && !data.is_empty() {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "the disk ends here"));
        }
        self.window.write_at(self.position, &data[..len])?;
        self.position += len as u64;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(self.window.flush()?)
    }
}

impl<D: Deref<Target = Disk>> Seek for Cursor<D> {
    /// A position past the end is allowed; nothing can be read or written there.
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(by) => self.window.size().checked_add_signed(by),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
        };
        self.position = position.ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "seeking before the start of the disk")
        })?;
        Ok(self.position)
    }
}

/// For callers that speak `std::io`: the kind that is nearest; the [`Error`] itself is the inner error.
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match error.kind() {
            ErrorKind::Io | ErrorKind::Failed => io::ErrorKind::Other,
            ErrorKind::NoSpace => io::ErrorKind::StorageFull,
            ErrorKind::Corrupt | ErrorKind::NotThisFormat => io::ErrorKind::InvalidData,
            ErrorKind::Unsupported => io::ErrorKind::Unsupported,
            ErrorKind::InvalidInput | ErrorKind::OutOfRange => io::ErrorKind::InvalidInput,
            ErrorKind::ReadOnly => io::ErrorKind::ReadOnlyFilesystem,
            ErrorKind::Busy => io::ErrorKind::ResourceBusy,
            ErrorKind::NotFound | ErrorKind::ParentMissing => io::ErrorKind::NotFound,
            ErrorKind::ParentMismatch => io::ErrorKind::InvalidData,
            ErrorKind::Exists => io::ErrorKind::AlreadyExists,
            ErrorKind::Denied => io::ErrorKind::PermissionDenied,
            // Not `Interrupted`: callers would try again.
            ErrorKind::Cancelled => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::disk::flat::raw;
    use crate::storage::memory::MemoryFile;

    fn flat(size: usize) -> Disk {
        raw(MemoryFile::new("/d", &vec![0; size]), 512).unwrap()
    }

    #[test]
    fn reads_end_at_the_end_and_writes_there_find_no_room() {
        let disk = Arc::new(flat(4096));
        let mut cursor = Cursor::new(Window::new(disk.clone(), 1024..2048).unwrap());
        cursor.write_all(b"begin").unwrap();
        cursor.seek(SeekFrom::End(-3)).unwrap();
        assert_eq!(cursor.write(b"end, and more").unwrap(), 3);
        assert_eq!(cursor.write(b"x").unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(cursor.write(b"").unwrap(), 0);
        cursor.flush().unwrap();
        cursor.rewind().unwrap();
        let mut all = Vec::new();
        cursor.read_to_end(&mut all).unwrap();
        assert_eq!((all.len(), &all[..5], &all[1021..]), (1024, &b"begin"[..], &b"end"[..]));
        let mut whole = Vec::new();
        Cursor::over(&*disk).read_to_end(&mut whole).unwrap();
        assert_eq!((whole.len(), &whole[1024..1029]), (4096, &b"begin"[..]));
    }

    #[test]
    fn seeking_before_the_start_is_an_error_and_past_the_end_is_none() {
        let disk = flat(4096);
        let mut cursor = Cursor::over(&disk);
        assert!(cursor.seek(SeekFrom::Current(-1)).is_err());
        assert!(cursor.seek(SeekFrom::End(-4097)).is_err());
        assert_eq!(cursor.seek(SeekFrom::Start(u64::MAX)).unwrap(), u64::MAX);
        assert!(cursor.seek(SeekFrom::Current(1)).is_err());
        assert_eq!(cursor.read(&mut [0; 8]).unwrap(), 0);
    }

    #[test]
    fn errors_keep_their_text() {
        let error: io::Error = Error::corrupt("a bad block").into();
        assert_eq!(
            (error.kind(), error.to_string()),
            (io::ErrorKind::InvalidData, "a bad block".into())
        );
    }
}
