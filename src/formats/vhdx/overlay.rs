//! A file as it will be once its log is replayed, without writing to it.
//!
//! An [`Overlay`] is the sum of a log's updates; a [`ReplayedFile`] reads through it. Everything
//! above the headers reads a file that was not closed cleanly through one, so tables and payload
//! are right whether or not the file may be written. The first write of a session applies the
//! overlay to the file, after which the file is its own truth.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use parking_lot::RwLock;

use super::layout::LOG_SECTOR;
use super::log::entry::LoggedSector;
use crate::codec::write_all;
use crate::error::{Error, Result};
use crate::storage::{FileIdentity, Storage};

/// New contents of a range of the file.
#[derive(Debug, Clone, Copy)]
enum Content {
    /// 4 KiB, to be found in the log.
    Sector(LoggedSector),
    Zero,
}

/// New contents of parts of a file, and its new length. Holds no sector itself: they are read from
/// the log, which stays as it is until the overlay was applied.
#[derive(Debug)]
pub struct Overlay {
    /// By first byte: one past the last, and what is there. Disjoint, multiples of 4 KiB.
    parts: BTreeMap<u64, (u64, Content)>,
    len: u64,
}

impl Overlay {
    /// An overlay that makes a file `len` bytes long and changes nothing else.
    pub fn new(len: u64) -> Self {
        Self { parts: BTreeMap::new(), len }
    }

    /// Number of changed ranges.
    pub fn parts(&self) -> usize {
        self.parts.len()
    }

    /// Length of the file in bytes.
    pub fn file_len(&self) -> u64 {
        self.len
    }

    /// The 4 KiB at `at` become `sector`.
    pub fn put(&mut self, at: u64, sector: LoggedSector) {
        self.insert(at..at + LOG_SECTOR, Content::Sector(sector));
    }

    /// `len` bytes at `at` become zero.
    pub fn zero(&mut self, at: u64, len: u64) {
        if len > 0 {
            self.insert(at..at + len, Content::Zero);
        }
    }

    fn insert(&mut self, range: Range<u64>, content: Content) {
        // Only a range of zeroes can reach across a border of `range`, and it can be cut anywhere.
        let before = self.parts.range(..range.start).next_back().map(|(&s, &(e, _))| s..e);
        if let Some(before) = before.filter(|b| b.end > range.start) {
            self.parts.insert(before.start, (range.start, Content::Zero));
            if before.end > range.end {
                self.parts.insert(range.end, (before.end, Content::Zero));
            }
        }
        let covered: Vec<u64> = self.parts.range(range.clone()).map(|(&s, _)| s).collect();
        for start in covered {
            if let Some((end, content)) = self.parts.remove(&start)
                && end > range.end
            {
                self.parts.insert(range.end, (end, content));
            }
        }
        self.len = self.len.max(range.end);
        self.parts.insert(range.start, (range.end, content));
    }

    /// Fills `buf` from byte `at` of the replayed file.
    pub fn read(&self, file: &dyn Storage, at: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = at.checked_add(buf.len() as u64).filter(|end| *end <= self.len);
        let Some(end) = end else { return Err(io::ErrorKind::UnexpectedEof.into()) };
        let stored = file.len()?.clamp(at, end);
        let (below, past) = buf.split_at_mut((stored - at) as usize);
        file.read_at(at, below)?;
        past.fill(0);
        let first = self.parts.range(..at).next_back().map_or(at, |(&start, _)| start);
        for (&start, &(stop, content)) in self.parts.range(first..end) {
            let part = start.max(at)..stop.min(end);
            if part.start >= part.end {
                continue;
            }
            let target = &mut buf[(part.start - at) as usize..(part.end - at) as usize];
            match content {
                Content::Zero => target.fill(0),
                Content::Sector(sector) => {
                    let bytes = sector.read(file).map_err(|e| io::Error::other(e.to_string()))?;
                    let skip = (part.start - start) as usize;
                    target.copy_from_slice(&bytes[skip..skip + target.len()]);
                }
            }
        }
        Ok(())
    }

    /// Writes everything to the file itself. Can be repeated after a crash in the middle.
    pub fn apply(&self, file: &dyn Storage) -> Result<()> {
        let failed = |e: io::Error| Error::io("replaying the log", &e).in_file(file.path());
        if file.len().map_err(failed)? < self.len {
            file.set_len(self.len).map_err(failed)?;
        }
        self.each(file, |at, replayed| match replayed {
            Replayed::Zeroes(len) => file.punch_hole(at, len).map_err(failed),
            Replayed::Bytes(bytes) => write_all(file, at, &bytes, "replayed table"),
        })
    }

    /// Calls `see` with the offset and new contents of every changed range.
    fn each(
        &self,
        file: &dyn Storage,
        mut see: impl FnMut(u64, Replayed) -> Result<()>,
    ) -> Result<()> {
        self.parts.iter().try_for_each(|(&start, &(end, content))| match content {
            Content::Zero => see(start, Replayed::Zeroes(end - start)),
            Content::Sector(sector) => see(start, Replayed::Bytes(sector.read(file)?.to_vec())),
        })
    }
}

/// New contents of a range.
#[derive(Debug)]
pub enum Replayed {
    /// These bytes.
    Bytes(Vec<u8>),
    /// This many zeroes.
    Zeroes(u64),
}

/// A file seen through an [`Overlay`] until that is applied.
#[derive(Debug)]
pub struct ReplayedFile {
    file: Arc<dyn Storage>,
    overlay: RwLock<Option<Overlay>>,
}

impl ReplayedFile {
    /// `file` as `overlay` makes it.
    pub fn new(file: Arc<dyn Storage>, overlay: Overlay) -> Arc<Self> {
        Arc::new(Self { file, overlay: RwLock::new(Some(overlay)) })
    }

    /// Writes the overlay to the file. Reads give the same bytes before, while and after.
    pub fn apply(&self) -> Result<()> {
        if let Some(overlay) = &*self.overlay.read() {
            overlay.apply(&*self.file)?;
        }
        Ok(())
    }

    /// Calls `see` with the offset and new contents of every range that the overlay changes.
    pub fn each(&self, see: impl FnMut(u64, Replayed) -> Result<()>) -> Result<()> {
        match &*self.overlay.read() {
            Some(overlay) => overlay.each(&*self.file, see),
            None => Ok(()),
        }
    }

    /// Lets go of an overlay that was applied durably, so that the file can be changed.
    pub fn forget(&self) {
        *self.overlay.write() = None;
    }
}

impl Storage for ReplayedFile {
    fn len(&self) -> io::Result<u64> {
        match &*self.overlay.read() {
            Some(overlay) => Ok(overlay.file_len()),
            None => self.file.len(),
        }
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        match &*self.overlay.read() {
            Some(overlay) => overlay.read(&*self.file, at, buf),
            None => self.file.read_at(at, buf),
        }
    }

    fn write_at(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_at(at, data)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn punch_hole(&self, at: u64, len: u64) -> io::Result<()> {
        self.file.punch_hole(at, len)
    }

    fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        self.file.allocate(at, len)
    }

    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        let own = self.file.next_data(at)?;
        let Some(overlay) = &*self.overlay.read() else { return Ok(own) };
        // Logged sectors are data wherever they fall; zeroes may be taken for data.
        let logged = overlay
            .parts
            .range(at.saturating_sub(LOG_SECTOR - 1)..)
            .find(|(_, (end, content))| matches!(content, Content::Sector(_)) && *end > at)
            .map(|(&start, &(end, _))| start.max(at)..end);
        Ok(match (own, logged) {
            (Some(own), Some(logged)) if logged.start < own.start => Some(logged),
            (None, logged) => logged,
            (own, _) => own,
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn allocated(&self) -> io::Result<u64> {
        self.file.allocated()
    }

    fn path(&self) -> &Path {
        self.file.path()
    }

    fn writable(&self) -> bool {
        self.file.writable()
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        self.file.identity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryFile;

    fn zeroed(overlay: &Overlay, len: usize) -> Vec<u8> {
        let file = MemoryFile::new("x", &vec![1; len]);
        let mut buf = vec![9; len];
        overlay.read(&*file, 0, &mut buf).unwrap();
        buf.chunks(4096).map(|page| page[0]).collect()
    }

    #[test]
    fn zero_ranges_merge_cut_and_cover_one_another() {
        let mut overlay = Overlay::new(8 * 4096);
        overlay.zero(4096, 5 * 4096);
        assert_eq!(zeroed(&overlay, 8 * 4096), [1, 0, 0, 0, 0, 0, 1, 1]);
        overlay.zero(2 * 4096, 4096);
        overlay.zero(0, 2 * 4096);
        overlay.zero(5 * 4096, 2 * 4096);
        assert_eq!(zeroed(&overlay, 8 * 4096), [0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(overlay.file_len(), 8 * 4096);
    }

    #[test]
    fn applying_gives_what_reading_through_gave() {
        let file = MemoryFile::new("x", &vec![1; 3 * 4096]);
        let mut overlay = Overlay::new(6 * 4096);
        overlay.zero(4096, 4096);
        let replayed = ReplayedFile::new(file.clone(), overlay);
        let mut before = vec![0; 6 * 4096];
        replayed.read_at(0, &mut before).unwrap();
        assert_eq!(file.to_vec(), vec![1; 3 * 4096]);
        replayed.apply().unwrap();
        replayed.forget();
        assert_eq!(file.to_vec(), before);
        assert_eq!(replayed.len().unwrap(), 6 * 4096);
    }

    #[test]
    fn a_file_that_its_log_extends_ends_in_zeroes() {
        let file = MemoryFile::new("x", &[7; 1000]);
        let padded = ReplayedFile::new(file, Overlay::new(1 << 20));
        let mut buf = [1; 1024];
        padded.read_at(512, &mut buf).unwrap();
        assert_eq!((buf[487], buf[488], buf[1023]), (7, 0, 0));
        assert!(padded.read_at((1 << 20) - 1, &mut buf).is_err());
    }
}
