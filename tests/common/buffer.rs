//! A plain buffer to hold disks against.

use std::collections::BTreeMap;

/// What the disk should hold: a flat buffer, of which only pages that were written take memory.
#[derive(Debug, Default)]
pub struct Buffer(BTreeMap<u64, Vec<u8>>);

/// Bytes per page.
pub const PAGE: u64 = 64 << 10;

impl Buffer {
    pub fn write(&mut self, at: u64, data: &[u8]) {
        for (index, byte) in (at..).zip(data) {
            let page = self.0.entry(index / PAGE).or_insert_with(|| vec![0; PAGE as usize]);
            page[(index % PAGE) as usize] = *byte;
        }
    }

    pub fn zero(&mut self, at: u64, len: u64) {
        for (page, bytes) in self.0.range_mut(at / PAGE..(at + len).div_ceil(PAGE)) {
            let from = at.saturating_sub(page * PAGE) as usize;
            let to = (at + len - page * PAGE).min(PAGE) as usize;
            bytes[from..to].fill(0);
        }
    }

    pub fn read(&self, at: u64, len: u64) -> Vec<u8> {
        let mut buf = vec![0; len as usize];
        for (page, bytes) in self.0.range(at / PAGE..(at + len).div_ceil(PAGE)) {
            let from = (page * PAGE).max(at);
            let to = ((page + 1) * PAGE).min(at + len);
            buf[(from - at) as usize..(to - at) as usize].copy_from_slice(
                &bytes[(from - page * PAGE) as usize..(to - page * PAGE) as usize],
            );
        }
        buf
    }

    /// The pages that were written, by number.
    pub fn pages(&self) -> &BTreeMap<u64, Vec<u8>> {
        &self.0
    }
}
