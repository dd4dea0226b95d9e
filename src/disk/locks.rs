//! Block locks: what keeps a range from being freed, moved or allocated under a reader.
//!
//! The disk is divided into units of at least 1 MiB; each unit belongs to one of a fixed number of
//! stripes. Readers and writers into mapped space hold the stripes of their range shared, across
//! the payload I/O; whoever changes a mapping holds them exclusive. Stripes are taken in ascending
//! order, so two ranges cannot wait for each other.

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use smallvec::SmallVec;

use super::map::DiskRange;

const STRIPES: usize = 64;
const MIN_UNIT: u64 = 1 << 20;

/// The stripes of one disk.
#[derive(Debug)]
pub(super) struct BlockLocks {
    stripes: [RwLock<()>; STRIPES],
    unit: u64,
}

/// Holds a range shared until dropped.
pub(super) type Shared<'a> = SmallVec<[RwLockReadGuard<'a, ()>; 2]>;
/// Holds a range exclusively until dropped.
pub(super) type Exclusive<'a> = SmallVec<[RwLockWriteGuard<'a, ()>; 2]>;

impl BlockLocks {
    /// Locks for a disk that allocates in units of `block_size` bytes.
    pub(super) fn new(block_size: u64) -> Self {
        // A unit is a power of two so that no block of any format straddles two of them needlessly.
        let unit = block_size.clamp(MIN_UNIT, 256 << 20).next_power_of_two();
        Self { stripes: std::array::from_fn(|_| RwLock::new(())), unit }
    }

    /// Which stripes the range needs: `(first, count)` walking upwards, or all of them.
    fn indices(&self, range: &DiskRange) -> SmallVec<[usize; 4]> {
        let first = range.start / self.unit;
        let last = (range.end - 1) / self.unit;
        if last - first >= STRIPES as u64 - 1 {
            return (0..STRIPES).collect();
        }
        let mut indices: SmallVec<[usize; 4]> =
            (first..=last).map(|unit| (unit % STRIPES as u64) as usize).collect();
        indices.sort_unstable();
        indices
    }

    /// Holds a non-empty range shared.
    pub(super) fn shared(&self, range: &DiskRange) -> Shared<'_> {
        self.indices(range).into_iter().map(|i| self.stripes[i].read()).collect()
    }

    /// Holds a non-empty range exclusively, borders rounded out to units.
    pub(super) fn exclusive(&self, range: &DiskRange) -> Exclusive<'_> {
        self.indices(range).into_iter().map(|i| self.stripes[i].write()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_take_each_stripe_once_in_ascending_order() {
        let locks = BlockLocks::new(64 << 10);
        let wrapped = locks.indices(&((62 << 20)..(66 << 20)));
        assert_eq!(wrapped.as_slice(), [0, 1, 62, 63]);
        assert_eq!(locks.indices(&(0..u64::MAX / 2)).len(), STRIPES);
        assert_eq!(locks.indices(&(5..6)).as_slice(), [0]);
    }
}
