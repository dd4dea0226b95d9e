//! Grains for which a write is planned and not over.

use std::ops::Range;

use parking_lot::{Condvar, Mutex};

use crate::error::Result;

/// Grains, by extent, for which a plan is under way. Those of an extent that begins in the middle of a block
/// lock's unit can be wanted by two writers that hold different locks.
#[derive(Default)]
pub struct InFlight {
    grains: Mutex<Vec<(usize, Range<u64>)>>,
    /// A plan is over.
    landed: Condvar,
}

impl InFlight {
    /// Waits until no plan for any of `grains` is under way; then `plan` says which ones are, by one that it
    /// makes. They are until what it returns beside is dropped.
    pub fn enter<T>(
        &self,
        extent: usize,
        grains: &Range<u64>,
        plan: impl FnOnce() -> Result<(T, Range<u64>)>,
    ) -> Result<(T, Flight<'_>)> {
        let mut under_way = self.grains.lock();
        let overlaps = |(e, g): &(usize, Range<u64>)| {
            *e == extent && g.start < grains.end && grains.start < g.end
        };
        while under_way.iter().any(overlaps) {
            self.landed.wait(&mut under_way);
        }
        let (planned, grains) = plan()?;
        let flight = Flight { all: self, extent, first: grains.start };
        under_way.push((extent, grains));
        Ok((planned, flight))
    }
}

/// A plan that is under way until this is dropped.
pub struct Flight<'a> {
    all: &'a InFlight,
    extent: usize,
    first: u64,
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        let own = (self.extent, self.first);
        self.all.grains.lock().retain(|(extent, grains)| (*extent, grains.start) != own);
        self.all.landed.notify_all();
    }
}
