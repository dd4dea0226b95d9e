//! What differs for a differencing disk: the sector bitmap decides for each sector whether it is
//! the disk's own or the parent's.
//!
//! A plan covers sectors of one block and one page of its bitmap. Only sectors that are written
//! are stored, so nothing is copied up and the rest of a new block may hold anything: its bits are
//! clear. There is no way to say "zeroes here" but to store them, so nothing is ever unmapped.

use super::bat::{Bat, entry};
use super::bitmaps::SectorBitmaps;
use super::blocks::{Place, SparseMap, push_stored};
use crate::codec;
use crate::disk::map::{BlockMap, Contents, DiskRange, ExtentList, Piece, Source, WritePlan};
use crate::disk::writer::Reserved;
use crate::error::{Error, Result};

impl SparseMap {
    fn place_of(&self, block: u64) -> Result<Place> {
        Ok(self.place(self.bat.read(block, |entries| entry(entries, block))?))
    }

    /// Where the bitmap of a stored block is.
    pub(super) fn bitmap_of(&self, block: u64) -> Result<u64> {
        match self.place_of(block)? {
            Place::Stored { data, .. } => Ok(data - self.structure.bitmap_size),
            _ => Err(Error::corrupt(format!("block {block} has no sector bitmap"))),
        }
    }

    /// `lookup` of blocks that the BAT has entries for.
    pub(super) fn lookup_sectors(
        &self,
        bitmaps: &SectorBitmaps,
        want: DiskRange,
        out: &mut ExtentList,
    ) -> Result<()> {
        let size = self.structure.block_size;
        let mut pos = want.start;
        while pos < want.end {
            let block = pos / size;
            let start = block * size;
            let end = want.end.min(start + size);
            match self.place_of(block)? {
                Place::Unused => out.push(pos, end - pos, Source::Parent),
                Place::Bad => out.push(pos, end - pos, Source::Bad),
                Place::Stored { data, available } => {
                    let bitmap_at = data - self.structure.bitmap_size;
                    bitmaps.runs(block, bitmap_at, pos - start..end - start, |own, bytes| {
                        let len = bytes.end - bytes.start;
                        if own {
                            let at = start + bytes.start;
                            push_stored(out, at, len, data, bytes.start, available);
                        } else {
                            out.push(start + bytes.start, len, Source::Parent);
                        }
                    })?;
                }
            }
            pos = end;
        }
        Ok(())
    }

    /// Plans sectors of the first block of `want`, none of which is the disk's own yet.
    pub(super) fn plan_sectors<'a>(
        &'a self,
        bitmaps: &'a SectorBitmaps,
        want: &DiskRange,
    ) -> Result<WritePlan<'a>> {
        let block = want.start / self.structure.block_size;
        let start = block * self.structure.block_size;
        let skip = want.start - start;
        let page_end = (skip / bitmaps.page_covers() + 1) * bitmaps.page_covers();
        let bytes = skip..(want.end - start).min(page_end).min(self.structure.block_size);
        let (new, bitmap_at, contents) = match self.place_of(block)? {
            Place::Stored { data, .. } => {
                (None, data - self.structure.bitmap_size, Contents::Stale)
            }
            Place::Unused => {
                let (reserved, at, contents) = self.new_block()?;
                (Some(reserved), at, contents)
            }
            Place::Bad => {
                return Err(Error::corrupt(format!("the BAT entry of block {block} is damaged")));
            }
        };
        let bitmap = bitmap_at..bitmap_at + self.structure.bitmap_size;
        self.writer.reserve_table(self.file(), 0, bitmap)?;
        let piece = Piece {
            start: want.start,
            len: bytes.end - bytes.start,
            file: 0,
            at: bitmap_at + self.structure.bitmap_size + bytes.start,
            contents,
        };
        Ok(WritePlan::new([piece].into_iter().collect(), move || {
            let place = new.as_ref().map(|_| bitmap_at);
            // A new block's bits need no reading, so that once its entry is set nothing can fail.
            self.point_at(block, place.as_slice(), || {
                bitmaps.set(block, bitmap_at, bytes, place.is_some())
            })?;
            new.into_iter().for_each(Reserved::keep);
            Ok(())
        }))
    }

    /// Room for a block, its bitmap all zeroes in the file; where it is, and what is behind the bitmap.
    fn new_block(&self) -> Result<(Reserved<'_>, u64, Contents)> {
        let reserved = self.reserve(1)?;
        let Some((at, contents)) = reserved.places().next() else {
            return Err(Error::corrupt("room for no block"));
        };
        if contents != Contents::Zeroes {
            let clear = vec![0; self.structure.bitmap_size as usize];
            codec::write_all(self.file(), at, &clear, "a sector bitmap")?;
        }
        Ok((reserved, at, contents))
    }

    /// Makes every block the parent's again, durably. For a disk just opened: what memory holds of
    /// bitmaps would outlive their blocks.
    pub(super) fn forget(&self) -> Result<()> {
        if self.bitmaps.is_none() {
            return Err(Error::invalid("the image is no child: it has no parent"));
        }
        self.begin_writes()?;
        let mut block = 0;
        while block < self.structure.blocks {
            if self.tables_full() {
                self.flush()?;
            }
            let until = self.structure.blocks.min(Bat::same_page(block).end);
            self.unmap_in_page(block..until)?;
            block = until;
        }
        self.flush()?;
        self.close()
    }
}
