//! Where new blocks go: free space inside the file, and its end.
//!
//! From the first write on, the file ends with the trailing footer. Blocks are handed out from holes,
//! else from the space between the last block and the footer; when that is used up, the footer moves
//! further out by a large step, or where the host does not let the file grow so far, by a small one.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::layout::{ALIGNMENT, FOOTER, REACH, SECTOR, footer_place};
use super::structure::Structure;
use super::survey::Survey;
use crate::codec;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;

/// Largest step, in bytes, by which the file grows.
const MAX_STEP: u64 = 64 << 20;

/// Room for one block: sector bitmap, then data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot {
    /// Byte offset of the bitmap.
    pub at: u64,
    /// All of it reads as zeroes.
    pub zeroed: bool,
}

#[derive(Debug, Clone, Copy)]
struct Hole {
    end: u64,
    zeroed: bool,
}

/// Free space of an image that is being written.
#[derive(Debug)]
pub(super) struct Space {
    file: Arc<dyn Storage>,
    footer: [u8; FOOTER as usize],
    bitmap_size: u64,
    stride: u64,
    /// [`ALIGNMENT`], or a sector where gaps would push the last blocks out of reach.
    alignment: u64,
    /// Free parts before `end`, by offset.
    holes: BTreeMap<u64, Hole>,
    /// One past everything in use.
    end: u64,
    /// One past the last structure that is no block: `end` never goes below it.
    structures_end: u64,
    /// Where the trailing footer is; one past the space that can be handed out.
    footer_at: u64,
    /// Everything from here to the footer was gained by extending the file, and never used.
    zeroed_from: u64,
}

impl Space {
    /// The free space of an image whose trailing footer is at `footer_at` if it is intact, and whose
    /// length is `file_len`. Puts the footer at the end of the file if it is not there.
    pub(super) fn new(
        file: Arc<dyn Storage>,
        structure: &Structure,
        survey: &Survey,
        footer: [u8; FOOTER as usize],
        footer_at: Option<u64>,
        file_len: u64,
    ) -> Result<Self> {
        let stride = structure.stride();
        let (gaps, end) = survey.gaps(structure, stride);
        let aligned = (stride + ALIGNMENT).saturating_mul(structure.blocks);
        let alignment = if aligned.saturating_add(end) < REACH { ALIGNMENT } else { SECTOR };
        let holes = gaps.into_iter().map(|gap| (gap.start, Hole { end: gap.end, zeroed: false }));
        let mut space = Self {
            file,
            footer,
            bitmap_size: structure.bitmap_size,
            stride,
            alignment,
            holes: holes.collect(),
            end: end.next_multiple_of(SECTOR),
            structures_end: structure.reserved.iter().map(|range| range.end).max().unwrap_or(0),
            footer_at: footer_at.unwrap_or(file_len),
            zeroed_from: file_len,
        };
        let least = space.footer_at.max(space.end);
        let place = match footer_at == Some(least) {
            true => least.next_multiple_of(SECTOR),
            false => footer_place(least),
        };
        if footer_at != Some(place) || file_len != place + FOOTER {
            space.move_footer(footer_at, place, file_len)?;
        }
        Ok(space)
    }

    /// Where the trailing footer is.
    pub(super) fn footer_at(&self) -> u64 {
        self.footer_at
    }

    /// Takes room for a block.
    pub(super) fn take(&mut self) -> Result<Slot> {
        if let Some(slot) = self.take_hole() {
            return Ok(slot);
        }
        let at = self.aligned(self.end);
        let end = at + self.stride;
        if at >= REACH {
            let what = "the image is full: a BAT cannot point beyond 2 TiB";
            return Err(Error::new(ErrorKind::NoSpace, what));
        }
        if end > self.footer_at {
            let step = self.footer_at.clamp(self.stride, MAX_STEP.max(self.stride));
            let roomy = footer_place(end.max(self.footer_at.saturating_add(step)));
            let (old, file_len) = (Some(self.footer_at), self.footer_at + FOOTER);
            // A file that may not grow so far may still grow as far as needed.
            self.move_footer(old, roomy, file_len)
                .or_else(|_| self.move_footer(old, footer_place(end), file_len))?;
        }
        self.end = end;
        Ok(Slot { at, zeroed: at >= self.zeroed_from })
    }

    fn take_hole(&mut self) -> Option<Slot> {
        let (&start, &hole) = self.holes.first_key_value()?;
        let mut at = self.aligned(start);
        if at + self.stride > hole.end {
            at = start;
        }
        self.holes.remove(&start);
        let rest = at + self.stride;
        if rest + self.stride <= hole.end {
            self.holes.insert(rest, hole);
        }
        Some(Slot { at, zeroed: hole.zeroed })
    }

    /// The first place for a slot at or after `from` whose data is aligned.
    fn aligned(&self, from: u64) -> u64 {
        (from + self.bitmap_size).next_multiple_of(self.alignment) - self.bitmap_size
    }

    /// Gives room for a block back.
    pub(super) fn give_back(&mut self, slot: Slot) {
        self.holes.insert(slot.at, Hole { end: slot.at + self.stride, zeroed: slot.zeroed });
    }

    /// Moves the footer from `old` out to `place`, the file's last sector from now on. The copy at
    /// the beginning is intact, so the image opens whatever a crash leaves of this.
    fn move_footer(&mut self, old: Option<u64>, place: u64, file_len: u64) -> Result<()> {
        let set_len = |len| {
            self.file
                .set_len(len)
                .map_err(|e| Error::io("extending", &e).in_file(self.file.path()).at(place))
        };
        set_len(place + FOOTER)?;
        codec::write_all(&*self.file, place, &self.footer, "the footer").inspect_err(|_| {
            // What stands at the old place is still there.
            let _ = set_len(file_len);
        })?;
        if let Some(old) = old.filter(|old| *old < place)
            && self.file.punch_hole(old, FOOTER.min(place - old)).is_err()
        {
            self.zeroed_from = self.zeroed_from.max(old + FOOTER);
        }
        self.footer_at = place;
        Ok(())
    }

    /// Where the footer belongs when the image is closed: behind everything in use, but not further out
    /// than it is.
    pub(super) fn trim(&mut self) -> u64 {
        while let Some((&start, hole)) = self.holes.last_key_value()
            && hole.end + self.alignment > self.end
            && start >= self.structures_end
        {
            self.end = start;
            self.holes.pop_last();
        }
        footer_place(self.end).min(self.footer_at)
    }
}
