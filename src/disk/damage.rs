//! What a disk turned out to have lost: ranges that could not be read because the image is damaged.

use parking_lot::Mutex;

use super::map::DiskRange;
use crate::storage::runs::merge;

/// Most ranges remembered.
const MAX: usize = 1000;

/// The ranges found so far.
#[derive(Debug, Default)]
pub(super) struct Found(Mutex<Vec<DiskRange>>);

impl Found {
    /// Adds a range.
    pub fn add(&self, range: DiskRange) {
        let mut ranges = self.0.lock();
        // Readers try again: most of it is known.
        if ranges.iter().any(|known| known.start <= range.start && range.end <= known.end) {
            return;
        }
        ranges.push(range);
        merge(&mut ranges);
        ranges.truncate(MAX);
    }

    /// All ranges, ascending, without overlap.
    pub fn ranges(&self) -> Vec<DiskRange> {
        self.0.lock().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_join_and_are_bounded() {
        let found = Found::default();
        for start in [40, 0, 20, 10, 45] {
            found.add(start..start + 10);
        }
        assert_eq!(found.ranges(), [0..30, 40..55]);
        for n in 0..2000 {
            found.add(100 + n * 2..101 + n * 2);
        }
        assert_eq!(found.ranges().len(), MAX);
    }
}
