//! Sector bitmaps: which sectors of a partially present block are in this file. Bit 0 of a byte is
//! the first sector; a set bit means here, a clear one the parent.

use std::ops::Range;

use super::layout::LOG_SECTOR;

/// Bits in a page of a bitmap.
const PAGE_BITS: u64 = LOG_SECTOR * 8;

/// The pages that hold the bits `bits` of the bitmap at byte `bitmap_at` of the file: number of the
/// page in the file, and which of the page's own bits.
pub fn pages(bitmap_at: u64, bits: &Range<u64>) -> impl Iterator<Item = (u64, Range<u64>)> + use<> {
    let bits = bits.clone();
    (bits.start / PAGE_BITS..bits.end.div_ceil(PAGE_BITS)).map(move |page| {
        let first = page * PAGE_BITS;
        let inside = bits.start.max(first) - first..bits.end.min(first + PAGE_BITS) - first;
        (bitmap_at / LOG_SECTOR + page, inside)
    })
}

/// Number in its bitmap of the first bit of a page.
pub fn first_bit(bitmap_at: u64, page: u64) -> u64 {
    (page - bitmap_at / LOG_SECTOR) * PAGE_BITS
}

/// Bits of a page of the file that lie before byte `end` of it.
pub fn bits_before(end: u64, page: u64) -> u64 {
    end.saturating_sub(page * LOG_SECTOR).min(LOG_SECTOR) * 8
}

/// Calls `visit` for every run of equal bits among `bits` of a page, in order.
pub fn runs(page: &[u8], bits: Range<u64>, mut visit: impl FnMut(Range<u64>, bool)) {
    let mut start = bits.start;
    while start < bits.end {
        let set = bit(page, start);
        let end = run_end(page, start..bits.end, set);
        visit(start..end, set);
        start = end;
    }
}

fn bit(page: &[u8], bit: u64) -> bool {
    page[(bit / 8) as usize] >> (bit % 8) & 1 == 1
}

/// Where the run of bits equal to `set` that begins at `bits.start` ends, at most `bits.end`.
fn run_end(page: &[u8], bits: Range<u64>, set: bool) -> u64 {
    let whole = if set { 0xff } else { 0 };
    let mut pos = bits.start;
    while pos < bits.end {
        if pos.is_multiple_of(8) {
            let rest = &page[(pos / 8) as usize..bits.end.div_ceil(8) as usize];
            let same = rest.iter().take_while(|byte| **byte == whole).count() as u64 * 8;
            if same > 0 {
                pos += same;
                continue;
            }
        }
        if bit(page, pos) != set {
            return pos;
        }
        pos += 1;
    }
    bits.end
}

/// Sets or clears `bits` of a page.
pub fn fill(page: &mut [u8], bits: Range<u64>, set: bool) {
    let mut pos = bits.start;
    while pos < bits.end {
        let byte = &mut page[(pos / 8) as usize];
        let end = bits.end.min((pos / 8 + 1) * 8);
        let low = 0xff_u8 << (pos % 8);
        let high = if end.is_multiple_of(8) { 0xff } else { (1 << (end % 8)) - 1 };
        let mask = low & high;
        if set {
            *byte |= mask
        } else {
            *byte &= !mask
        }
        pos = end;
    }
}

/// Whether all of `bits` of a page are set.
pub fn full(page: &[u8], bits: Range<u64>) -> bool {
    bits.is_empty() || bit(page, bits.start) && run_end(page, bits.clone(), true) == bits.end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_numbered_from_the_low_end() {
        let mut page = [0; 4096];
        fill(&mut page, 3..12, true);
        assert_eq!(page[..3], [0xf8, 0x0f, 0]);
        fill(&mut page, 4..5, false);
        assert_eq!(page[..2], [0xe8, 0x0f]);
    }

    #[test]
    fn runs_agree_with_single_bits() {
        fastrand::seed(1);
        let mut page = [0; 4096];
        for _ in 0..200 {
            let start = fastrand::u64(..PAGE_BITS);
            let end = (start + fastrand::u64(1..300)).min(PAGE_BITS);
            let set = fastrand::bool();
            fill(&mut page, start..end, set);
            assert_eq!(full(&page, start..end), set);
        }
        let bits = 5..PAGE_BITS - 3;
        let mut at = bits.start;
        runs(&page, bits.clone(), |run, set| {
            assert_eq!(run.start, at);
            assert!(run.clone().all(|b| bit(&page, b) == set));
            at = run.end;
        });
        assert_eq!(at, bits.end);
    }

    #[test]
    fn pages_split_where_the_file_does() {
        let all: Vec<_> = pages(1 << 20, &(PAGE_BITS - 2..2 * PAGE_BITS + 5)).collect();
        assert_eq!(all, [(256, PAGE_BITS - 2..PAGE_BITS), (257, 0..PAGE_BITS), (258, 0..5)]);
        assert_eq!(first_bit(1 << 20, 257), PAGE_BITS);
    }
}
