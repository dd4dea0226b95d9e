//! Runs of units: [`Runs`], what a private layer holds over something that stays as it is, and plain ranges.

use std::collections::BTreeMap;
use std::ops::Range;

/// What a layer holds for a run of units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// Slots of a scratch file, from this one on; a slot is as large as a unit.
    Slots(u64),
    /// Zeroes, stored nowhere.
    Zeroes,
}

impl Held {
    /// The same run seen from `units` further on.
    fn skip(self, units: u64) -> Self {
        match self {
            Self::Slots(first) => Self::Slots(first + units),
            Self::Zeroes => Self::Zeroes,
        }
    }
}

/// Runs of units by first unit, as `(one past the last unit, contents)`, without overlap. Zeroes over a
/// whole huge disk are one entry.
#[derive(Debug, Default)]
pub struct Runs(BTreeMap<u64, (u64, Held)>);

impl Runs {
    /// What is held at `unit`, and where that run ends; or where the next one begins.
    pub fn at(&self, unit: u64) -> (Option<Held>, u64) {
        if let Some((&first, &(end, held))) = self.0.range(..=unit).next_back()
            && unit < end
        {
            return (Some(held.skip(unit - first)), end);
        }
        let next = self.0.range(unit..).next();
        (None, next.map_or(u64::MAX, |(&first, _)| first))
    }

    /// Puts `held` over `range`; runs of slots that it covered are returned as slot ranges.
    pub fn put(&mut self, range: Range<u64>, held: Held) -> Vec<Range<u64>> {
        let first = self.0.range(..=range.start).next_back().map_or(range.start, |(&k, _)| k);
        let touched: Vec<_> = self.0.range(first..range.end).map(|(&k, &v)| (k, v)).collect();
        let mut covered = Vec::new();
        for (start, (end, old)) in touched {
            if end <= range.start {
                continue;
            }
            self.0.remove(&start);
            if start < range.start {
                self.0.insert(start, (range.start, old));
            }
            if end > range.end {
                self.0.insert(range.end, (end, old.skip(range.end - start)));
            }
            let (from, to) = (start.max(range.start), end.min(range.end));
            if let Held::Slots(slot) = old.skip(from - start) {
                covered.push(slot..slot + (to - from));
            }
        }
        self.0.insert(range.start, (range.end, held));
        covered
    }
}

/// Sorts ranges and joins those that overlap or touch.
pub fn merge(ranges: &mut Vec<Range<u64>>) {
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let joined = next.start <= last.end;
        if joined {
            last.end = last.end.max(next.end);
        }
        joined
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_over_everything_cost_one_entry() {
        let mut runs = Runs::default();
        runs.put(5..7, Held::Slots(0));
        assert_eq!(runs.put(0..1 << 30, Held::Zeroes).first(), Some(&(0..2)));
        assert_eq!(runs.put(100..102, Held::Slots(8)), []);
        assert_eq!(runs.0.len(), 3);
        assert_eq!(runs.at(101), (Some(Held::Slots(9)), 102));
        assert_eq!(runs.put(101..103, Held::Slots(20)).first(), Some(&(9..10)));
        assert_eq!(runs.at(99).0, Some(Held::Zeroes));
        assert_eq!(runs.at(1 << 30), (None, u64::MAX));
    }
}
