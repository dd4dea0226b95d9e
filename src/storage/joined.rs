//! Several files that are one, end to end: [`Joined`].
//!
//! Each byte is in the file that its place falls in, by the lengths that the files have when they are joined.
//! Growing lengthens the last one, as far as a limit. Cutting shortens the file that holds the new end, syncs
//! it, and then empties those behind it: whoever looks after a crash finds the new end in its place, or the old
//! files.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::RwLock;

use super::{FileIdentity, Namer, Storage};

/// See the module's documentation.
#[derive(Debug)]
pub struct Joined {
    parts: Vec<Arc<dyn Storage>>,
    /// Where each of them begins; fixed, as all but the last keep their length while they are not empty.
    starts: Vec<u64>,
    /// Bytes that the last one may have.
    most: u64,
    /// How many of them are not emptied. Held while the length changes.
    used: RwLock<usize>,
}

impl Joined {
    /// The `parts`, of which there is at least one, in their order; the last one grows up to the length of the
    /// first.
    pub fn new(parts: Vec<Arc<dyn Storage>>) -> io::Result<Arc<Self>> {
        let mut starts = Vec::with_capacity(parts.len());
        let mut end = 0u64;
        for part in &parts {
            starts.push(end);
            end = end.checked_add(part.len()?).ok_or(io::ErrorKind::InvalidData)?;
        }
        let Some(first) = parts.first() else { return Err(io::ErrorKind::InvalidInput.into()) };
        let most = first.len()?;
        Ok(Arc::new(Self { used: RwLock::new(parts.len()), most, starts, parts }))
    }

    /// Calls `act` for each part that holds some of `range`, with the range in it and in the whole.
    fn each(
        &self,
        range: Range<u64>,
        mut act: impl FnMut(&dyn Storage, Range<u64>, Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        let used = *self.used.read();
        for (index, part) in self.parts[..used].iter().enumerate() {
            let start = self.starts[index];
            let end = if index + 1 == used { u64::MAX } else { self.starts[index + 1] };
            let here = range.start.max(start)..range.end.min(end);
            if here.start < here.end {
                let whole = (here.start - range.start) as usize..(here.end - range.start) as usize;
                act(&**part, here.start - start..here.end - start, whole)?;
            }
        }
        Ok(())
    }

    /// Refuses an end that the last part has no room for.
    fn has_room(&self, end: Option<u64>) -> io::Result<()> {
        let last = self.starts[*self.used.read() - 1];
        let most = last.saturating_add(self.most).max(self.len()?);
        match end {
            Some(end) if end <= most => Ok(()),
            _ => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        }
    }
}

impl Storage for Joined {
    fn len(&self) -> io::Result<u64> {
        let last = *self.used.read() - 1;
        Ok(self.starts[last] + self.parts[last].len()?)
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = at.checked_add(buf.len() as u64).ok_or(io::ErrorKind::UnexpectedEof)?;
        self.each(at..end, |part, here, whole| part.read_at(here.start, &mut buf[whole]))
    }

    fn write_at(&self, at: u64, data: &[u8]) -> io::Result<()> {
        let end = at.checked_add(data.len() as u64);
        self.has_room(end)?;
        let end = end.unwrap_or(u64::MAX);
        self.each(at..end, |part, here, whole| part.write_at(here.start, &data[whole]))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.has_room(Some(len))?;
        let mut used = self.used.write();
        let holder = self.starts[..*used].iter().rposition(|start| *start < len).unwrap_or(0);
        self.parts[holder].set_len(len - self.starts[holder])?;
        if holder + 1 < *used {
            self.parts[holder].sync()?;
            for part in &self.parts[holder + 1..*used] {
                part.set_len(0)?;
            }
            *used = holder + 1;
        }
        Ok(())
    }

    fn punch_hole(&self, at: u64, len: u64) -> io::Result<()> {
        let end = at.saturating_add(len).min(self.len()?);
        self.each(at..end, |part, here, _| part.punch_hole(here.start, here.end - here.start))
    }

    fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        let end = at.checked_add(len);
        self.has_room(end)?;
        let end = end.unwrap_or(u64::MAX);
        self.each(at..end, |part, here, _| part.allocate(here.start, here.end - here.start))
    }

    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        let used = *self.used.read();
        for (part, start) in self.parts[..used].iter().zip(&self.starts) {
            let end = start + part.len()?;
            if at < end
                && let Some(found) = part.next_data(at.saturating_sub(*start))?
            {
                return Ok(Some(start + found.start..(start + found.end).min(end)));
            }
        }
        Ok(None)
    }

    fn sync(&self) -> io::Result<()> {
        self.parts.iter().try_for_each(|part| part.sync())
    }

    fn allocated(&self) -> io::Result<u64> {
        self.parts.iter().map(|part| part.allocated()).sum()
    }

    fn path(&self) -> &Path {
        self.parts[0].path()
    }

    fn writable(&self) -> bool {
        self.parts.iter().all(|part| part.writable())
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        self.parts[0].identity()
    }

    fn modified(&self) -> Option<SystemTime> {
        self.parts.iter().filter_map(|part| part.modified()).max()
    }

    fn changed(&self) -> Option<SystemTime> {
        self.parts.iter().filter_map(|part| part.changed()).max()
    }

    fn namer(&self) -> Option<&Namer> {
        self.parts[0].namer()
    }

    fn archive(&self) -> Option<&Arc<super::archive::Archive>> {
        self.parts[0].archive()
    }

    fn parts(&self) -> &[Arc<dyn Storage>] {
        &self.parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryFile;

    fn joined(lens: &[usize]) -> (Vec<Arc<MemoryFile>>, Arc<Joined>) {
        let file = |(index, len): (usize, &usize)| {
            MemoryFile::new(format!("/x.v{index:02}"), &vec![index as u8 + 1; *len])
        };
        let files: Vec<_> = lens.iter().enumerate().map(file).collect();
        let parts = files.iter().map(|file| file.clone() as Arc<dyn Storage>).collect();
        (files, Joined::new(parts).unwrap())
    }

    #[test]
    fn bytes_are_in_the_part_that_their_place_falls_in() {
        let (files, whole) = joined(&[4096, 4096, 1024]);
        assert_eq!(whole.len().unwrap(), 9216);
        let mut bytes = [0; 4100];
        whole.read_at(4094, &mut bytes).unwrap();
        assert_eq!((bytes[1], bytes[2], bytes[4097], bytes[4098]), (1, 2, 2, 3));
        whole.write_at(8190, &[9; 4]).unwrap();
        let mut end = [0; 2];
        files[1].read_at(4094, &mut end).unwrap();
        assert_eq!(end, [9; 2]);
        assert!(whole.read_at(9215, &mut end).is_err());
        assert_eq!(whole.next_data(0).unwrap().unwrap().start, 0);
    }

    #[test]
    fn only_the_last_part_grows_and_no_further_than_the_first() {
        let (files, whole) = joined(&[4096, 4096, 1024]);
        whole.write_at(9216, &[7; 1024]).unwrap();
        assert_eq!(files[2].len().unwrap(), 2048);
        for end in [3 * 4096 + 1, u64::MAX] {
            let full = whole.set_len(end).unwrap_err();
            assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
        }
        assert!(whole.write_at(3 * 4096, &[1]).is_err());
        whole.set_len(3 * 4096).unwrap();
        assert_eq!(files.iter().map(|f| f.len().unwrap()).collect::<Vec<_>>(), [4096; 3]);
    }

    #[test]
    fn cutting_empties_the_parts_behind_the_end() {
        let (files, whole) = joined(&[4096, 4096, 1024]);
        whole.set_len(5000).unwrap();
        assert_eq!(whole.len().unwrap(), 5000);
        assert_eq!(files.iter().map(|f| f.len().unwrap()).collect::<Vec<_>>(), [4096, 904, 0]);
        // It goes on where it was cut.
        whole.write_at(5000, &[5; 100]).unwrap();
        assert_eq!(files[1].len().unwrap(), 1004);
    }
}
