//! Raw disks: the bytes of a file or block device, and nothing else.
//!
//! Nothing in a raw disk says that it is one, so it is not among the [`FORMATS`](super::FORMATS) that
//! contents are recognised as: whoever opens one has been told so.

use std::sync::Arc;

use crate::disk::Disk;
use crate::disk::map::{self, BlockMap, DiskRange, ExtentList, Geometry, Source};
use crate::error::{Error, Result};
use crate::storage::Storage;

use super::{Identity, ImageInfo, Opened};

/// Opens a raw disk. Of a file whose length is no multiple of a sector the last sector is read as
/// filled up with zeroes, and the disk is not written.
pub fn open(file: Arc<dyn Storage>) -> Result<Disk> {
    let failed = |e| Error::io("asking for the size", &e).in_file(file.path());
    let len = file.len().map_err(failed)?;
    if len == 0 {
        return Err(Error::invalid("the file is empty").in_file(file.path()));
    }
    let read_only = match file.writable() {
        false => Some("the image is open for reading".to_owned()),
        true if !len.is_multiple_of(Geometry::SECTOR) => {
            Some("the length is no multiple of a sector".to_owned())
        }
        true => None,
    };
    Ok(Disk::new(Box::new(RawMap::new(file, len)), None, read_only))
}

/// Opens a raw disk as the parent of an image.
pub(super) fn as_parent(file: Arc<dyn Storage>) -> Result<Opened> {
    let len = file.len().map_err(|e| Error::io("asking for the size", &e).in_file(file.path()))?;
    let map = RawMap::new(file, len);
    let info = ImageInfo {
        format: "raw",
        subformat: "raw".to_owned(),
        virtual_size: map.geometry.size,
        logical_sector_size: map.geometry.logical_sector,
        physical_sector_size: map.geometry.physical_sector,
        ..ImageInfo::default()
    };
    Ok(Opened {
        map: Box::new(map),
        info,
        identity: Identity::RAW,
        parent: None,
        read_only: Some("a raw disk is written by whoever made it".to_owned()),
        damage: Vec::new(),
    })
}

/// A raw disk of `size` bytes, a multiple of a sector, in the first bytes of a file or device that is at
/// least as large, open for writing.
pub fn over(file: Arc<dyn Storage>, size: u64) -> Disk {
    Disk::new(Box::new(RawMap::new(file, size)), None, None)
}

/// The mapping of a raw disk.
#[derive(Debug)]
struct RawMap {
    files: [Arc<dyn Storage>; 1],
    len: u64,
    geometry: Geometry,
}

impl RawMap {
    fn new(file: Arc<dyn Storage>, len: u64) -> Self {
        let size = len.next_multiple_of(Geometry::SECTOR);
        let geometry =
            Geometry { size, logical_sector: 512, physical_sector: 512, block_size: size };
        Self { files: [file], len, geometry }
    }

    /// Bytes of the disk in whole sectors.
    fn whole(&self) -> u64 {
        self.len / Geometry::SECTOR * Geometry::SECTOR
    }
}

impl BlockMap for RawMap {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn files(&self) -> &[Arc<dyn Storage>] {
        &self.files
    }

    fn fixed(&self) -> bool {
        true
    }

    fn lookup(&self, want: DiskRange, out: &mut ExtentList) -> Result<()> {
        let end = want.end.min(self.whole());
        if want.start < end {
            out.push(want.start, end - want.start, Source::File { file: 0, at: want.start });
        }
        let rest = want.start.max(self.whole());
        if rest < want.end {
            out.push(rest, want.end - rest, Source::Packed { unit: rest, skip: 0 });
        }
        Ok(())
    }

    fn read_packed(&self, unit: u64, skip: u32, buf: &mut [u8]) -> Result<()> {
        let at = unit + u64::from(skip);
        let here = self.len.saturating_sub(at).min(buf.len() as u64);
        let (stored, past) = buf.split_at_mut(here as usize);
        past.fill(0);
        if stored.is_empty() {
            return Ok(());
        }
        let file = &self.files[0];
        file.read_at(at, stored).map_err(|e| Error::io("read", &e).in_file(file.path()).at(at))
    }

    fn unmap(&self, want: DiskRange, _rest: &mut Vec<DiskRange>) -> Result<()> {
        map::punch(&*self.files[0], want)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::storage::memory::MemoryFile;

    #[test]
    fn an_odd_length_is_filled_up_to_a_sector_and_not_written() {
        let disk = open(MemoryFile::new("/a.img", &[7; 1000])).unwrap();
        assert_eq!(disk.size(), 1024);
        let mut bytes = [1; 1024];
        disk.read_at(0, &mut bytes).unwrap();
        assert_eq!(bytes[..1000], [7; 1000]);
        assert_eq!(bytes[1000..], [0; 24]);
        disk.read_at(1010, &mut bytes[..14]).unwrap();
        assert_eq!(bytes[..14], [0; 14]);
        assert_eq!(disk.write_at(0, &[1]).unwrap_err().kind(), ErrorKind::ReadOnly);
    }

    #[test]
    fn what_is_written_is_where_it_belongs() {
        let file = MemoryFile::new("/a.img", &[7; 2048]);
        let disk = open(file.clone()).unwrap();
        disk.write_at(500, &[1; 24]).unwrap();
        disk.discard(1024, 512).unwrap();
        disk.flush().unwrap();
        let bytes = file.to_vec();
        assert_eq!((bytes[499], &bytes[500..524], bytes[524]), (7, &[1; 24][..], 7));
        assert_eq!((bytes[1023], &bytes[1024..1536], bytes[1536]), (7, &[0; 512][..], 7));
    }
}
