//! Where new blocks go: gaps between what is in use, and the end of the file, which is the trailing footer
//! from the first write on.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::layout::{ALIGNMENT, FOOTER, REACH, SECTOR, footer_place};
use super::structure::Structure;
use super::survey::Survey;
use crate::codec;
use crate::disk::map::Contents;
use crate::disk::space::{Limits, Space, Tail, Unit};
use crate::error::{Error, Result};
use crate::storage::Storage;

/// Room for one block: sector bitmap, then data, which is aligned unless the gaps would push the last
/// blocks out of reach. `end` is where everything in use ends.
pub(super) fn unit(structure: &Structure, end: u64) -> Unit {
    let (len, lead) = (structure.stride(), structure.bitmap_size);
    let aligned = (len + ALIGNMENT).saturating_mul(structure.blocks);
    let align = if aligned.saturating_add(end) < REACH { ALIGNMENT } else { SECTOR };
    Unit { len, align, lead }
}

/// The free space of an image whose trailing footer is at `footer_at` if it is intact, and whose length is
/// `file_len`. Puts the footer at the end of the file if it is not there.
pub(super) fn space(
    file: &Arc<dyn Storage>,
    structure: &Structure,
    survey: &Survey,
    footer: [u8; FOOTER as usize],
    footer_at: Option<u64>,
    file_len: u64,
    data_end: &Arc<AtomicU64>,
) -> Result<(Space, Unit)> {
    let stride = structure.stride();
    let (gaps, end) = survey.gaps(structure, stride);
    let unit = unit(structure, end);
    let next = end.next_multiple_of(SECTOR);
    let least = footer_at.unwrap_or(file_len).max(next);
    let place = match footer_at == Some(least) {
        true => least.next_multiple_of(SECTOR),
        false => footer_place(least),
    };
    let mut zero_from = file_len;
    if footer_at != Some(place) || file_len != place + FOOTER {
        zero_from = zero_from.max(move_footer(&**file, &footer, footer_at, place, file_len)?);
    }
    let limits = Limits {
        // The last entry leads to the last sector within reach.
        end: REACH - SECTOR + stride,
        full: "the image is full: a BAT cannot point beyond 2 TiB",
        least: stride,
        align: unit.align,
        floor: structure.reserved.iter().map(|range| range.end).max().unwrap_or(0),
    };
    let lens = [place, zero_from];
    let mut space = Space::new(file.clone(), TrailingFooter(footer), limits, next, lens, data_end);
    gaps.into_iter().for_each(|gap| space.release(gap, Contents::Stale));
    Ok((space, unit))
}

/// The footer behind the space of the file.
#[derive(Debug)]
struct TrailingFooter([u8; FOOTER as usize]);

impl Tail for TrailingFooter {
    fn round(&self, end: u64) -> u64 {
        footer_place(end)
    }

    fn extend(&mut self, file: &dyn Storage, from: u64, to: u64) -> Result<u64> {
        move_footer(file, &self.0, Some(from), to, from + FOOTER)
    }
}

/// Moves the footer from `old` out to `place`, the file's last sector from now on. The copy at the
/// beginning is intact, so the image opens whatever a crash leaves of this. Returns from where on zeroes
/// were gained, if not all is.
fn move_footer(
    file: &dyn Storage,
    footer: &[u8],
    old: Option<u64>,
    place: u64,
    file_len: u64,
) -> Result<u64> {
    let set_len = |len| {
        file.set_len(len).map_err(|e| Error::io("extending", &e).in_file(file.path()).at(place))
    };
    set_len(place + FOOTER)?;
    codec::write_all(file, place, footer, "the footer").inspect_err(|_| {
        // What stands at the old place is still there.
        let _ = set_len(file_len);
    })?;
    match old.filter(|old| *old < place) {
        Some(old) if file.punch_hole(old, FOOTER.min(place - old)).is_err() => Ok(old + FOOTER),
        _ => Ok(0),
    }
}
