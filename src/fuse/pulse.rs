//! Whether all that is begun also ends: what the watchdog wants to know.
//!
//! Work is counted with the period in which it began, and a period follows another only when all that
//! began before that other one has ended. So work that hangs is what keeps periods from passing.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts the work under way.
#[derive(Debug, Default)]
pub struct Pulse {
    period: AtomicUsize,
    /// Work that began in even periods, and in odd ones.
    under_way: [AtomicUsize; 2],
}

/// Work under way until this is dropped.
#[derive(Debug)]
pub struct Work<'a>(&'a AtomicUsize);

impl Pulse {
    /// Counts something that begins now.
    pub fn work(&self) -> Work<'_> {
        let count = &self.under_way[self.period.load(Ordering::Relaxed) % 2];
        count.fetch_add(1, Ordering::Relaxed);
        Work(count)
    }

    /// Begins a new period if nothing is left of the one before this, and says whether it did. For
    /// one thread alone.
    pub fn beat(&self) -> bool {
        let next = self.period.load(Ordering::Relaxed).wrapping_add(1);
        let ended = self.under_way[next % 2].load(Ordering::Relaxed) == 0;
        if ended {
            self.period.store(next, Ordering::Relaxed);
        }
        ended
    }
}

impl Drop for Work<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_does_not_end_stops_the_pulse_and_other_work_does_not() {
        let pulse = Pulse::default();
        let hangs = pulse.work();
        // The period in which it began may end, but none after that.
        assert!(pulse.beat());
        for _ in 0..5 {
            drop(pulse.work());
            assert!(!pulse.beat());
        }
        drop(hangs);
        // Work that ends is no obstacle, even where there is always some.
        let mut last = pulse.work();
        for _ in 0..5 {
            assert!(pulse.beat());
            let next = pulse.work();
            drop(last);
            last = next;
        }
        drop(last);
        assert!(pulse.beat());
    }
}
