//! Where a disk's data lies: through parents, and at the holes of the host's files.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::map::{self, DiskRange, ExtentList, Source};
use super::{Disk, LOOKUP_STEP, STEP, overlap, sectors_around};
use crate::error::{Error, Result};

/// How much the first step of a search for data covers.
const FIRST_STEP: u64 = 1 << 20;
/// How long one search for data or a hole takes at most, that whoever asks can be interrupted.
const MAX_SEARCH: Duration = Duration::from_secs(2);

/// How much of the data that is found whoever asks wants to know.
#[derive(Clone, Copy)]
enum Ask {
    /// Where it begins, and how far it goes.
    Run,
    /// Where it begins; the range ends where that of the search does.
    Start,
}

impl Disk {
    /// The first run of data at or after `from`: everything outside such runs reads as zeroes.
    /// Looks through parents and at the holes of the host's files. What a long search has not come to is
    /// taken for data.
    ///
    /// # Errors
    ///
    /// Those of reading the image's tables and asking the host for holes.
    pub fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        self.next_data_in(from..self.size())
    }

    /// How much of the disk may be looked up at once without a list of extents that knows no bounds.
    pub(crate) fn longest_lookup(&self) -> u64 {
        if self.is_coarse() { STEP } else { LOOKUP_STEP }
    }

    /// Whether nothing divides the disk more finely than into blocks of 64 KiB.
    pub(super) fn is_coarse(&self) -> bool {
        self.parent.is_none() && self.geometry().block_size >= 64 << 10
    }

    /// The extents of the beginning of a range: at most `reach` bytes, or a long run of which nothing is
    /// stored.
    pub(crate) fn next_extents(&self, range: DiskRange, reach: u64) -> Result<ExtentList> {
        let _held = self.shared(&range);
        let mut list = ExtentList::new();
        let want = sectors_around(&range);
        match self.map.unstored(want.clone())? {
            Some(run) => list.push(run.start, run.len, run.source),
            None => self.map.lookup(want.start..want.end.min(want.start + reach), &mut list)?,
        }
        Ok(list)
    }

    /// [`Self::next_data`] inside a range, which may reach past the disk's end.
    pub(super) fn next_data_in(&self, range: DiskRange) -> Result<Option<Range<u64>>> {
        self.search(range, Instant::now() + MAX_SEARCH, Ask::Run)
    }

    /// Where in a range data begins, as [`Self::next_data`] knows it, without asking how far it goes: some
    /// hosts look at every page of a run.
    ///
    /// # Errors
    ///
    /// Those of [`Self::next_data`].
    pub(crate) fn first_data_in(&self, range: DiskRange) -> Result<Option<u64>> {
        let found = self.search(range, Instant::now() + MAX_SEARCH, Ask::Start)?;
        Ok(found.map(|data| data.start))
    }

    fn search(&self, range: DiskRange, until: Instant, ask: Ask) -> Result<Option<DiskRange>> {
        let end = range.end.min(self.size());
        let mut pos = range.start;
        // Data is near as a rule; a search that does not find it there takes larger and larger steps.
        let mut reach = FIRST_STEP;
        while pos < end {
            let extents = self.next_extents(pos..end, reach)?;
            reach = self.longest_lookup().min(reach * 4);
            let step = pos..end.min(extents.last().map_or(end, map::Extent::end));
            for extent in extents.iter() {
                let (part, skip) = overlap(extent, &step);
                let found = match extent.source {
                    Source::Zero => None,
                    Source::Packed { .. } | Source::Bad => Some(part),
                    Source::File { file, at } => self.file_data(file, at + skip, part, ask)?,
                    Source::Parent => match &self.parent {
                        Some(parent) => parent.search(part, until, ask)?,
                        None => Some(part),
                    },
                };
                if found.is_some() {
                    return Ok(found);
                }
            }
            pos = step.end;
            if pos < end && Instant::now() > until {
                return Ok(Some(pos..end.min(pos + LOOKUP_STEP)));
            }
        }
        Ok(None)
    }

    /// The first data of a mapped part that is not a hole of its host file.
    fn file_data(
        &self,
        file: usize,
        at: u64,
        part: DiskRange,
        ask: Ask,
    ) -> Result<Option<DiskRange>> {
        let file = &self.map.files()[file];
        let data = match ask {
            Ask::Run => file.next_data(at),
            Ask::Start => file.first_data(at).map(|data| data.map(|start| start..u64::MAX)),
        };
        let data =
            data.map_err(|e| Error::io("looking for data", &e).in_file(file.path()).at(at))?;
        let on_disk = |place: u64| part.start.saturating_add(place.saturating_sub(at));
        Ok(data
            .map(|data| on_disk(data.start)..part.end.min(on_disk(data.end)))
            .filter(|data| data.start < data.end))
    }

    /// The first byte at or after `from` that is not stored data; the disk's size if there is none, or if a
    /// long search has found none.
    ///
    /// # Errors
    ///
    /// Those of [`Self::next_data`].
    pub fn next_hole(&self, from: u64) -> Result<u64> {
        self.next_hole_in(from..self.size())
    }

    /// [`Self::next_hole`] inside a range, whose end is the answer if there is none.
    pub(super) fn next_hole_in(&self, range: DiskRange) -> Result<u64> {
        let until = Instant::now() + MAX_SEARCH;
        let mut pos = range.start;
        while pos < range.end && Instant::now() <= until {
            match self.next_data_in(pos..range.end)? {
                Some(data) if data.start <= pos => pos = data.end,
                _ => return Ok(pos),
            }
        }
        Ok(range.end)
    }
}

#[cfg(test)]
mod tests {
    use crate::disk::flat;
    use crate::storage::Storage;
    use crate::storage::memory::MemoryFile;

    #[test]
    fn where_data_begins_is_told_without_its_end() {
        let file = MemoryFile::new("/a", &[]);
        file.set_len(1 << 20).unwrap();
        file.write_at(300 << 10, &[1; 8192]).unwrap();
        let disk = flat::raw(file, 512).unwrap();
        let data = disk.next_data(0).unwrap().unwrap();
        assert_eq!(disk.first_data_in(0..u64::MAX).unwrap(), Some(data.start));
        assert_eq!(disk.first_data_in(data.start + 5..data.end).unwrap(), Some(data.start + 5));
        assert_eq!(disk.first_data_in(0..data.start).unwrap(), None);
        assert_eq!(disk.first_data_in(data.end..u64::MAX).unwrap(), None);
        assert_eq!(disk.first_data_in(u64::MAX - 1..u64::MAX).unwrap(), None);
    }
}
