//! What is under way, and since when: the watchdog and `status` want to know what does not end.
//!
//! Each thread notes what it is at work on in a place of its own, so that noting takes no lock.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// What work belongs to that is not about one inode.
pub const NO_INODE: u64 = 0;

/// The work of all threads for one tree.
#[derive(Debug)]
pub struct UnderWay {
    id: u64,
    begun: Instant,
    threads: Mutex<Vec<Weak<Thread>>>,
}

/// What a thread is at work on.
#[derive(Debug, Default)]
struct Thread {
    ino: AtomicU64,
    /// Milliseconds after [`UnderWay::begun`], and one; 0 while it does nothing.
    since: AtomicU64,
}

thread_local! {
    /// This thread's place in an [`UnderWay`], and in which.
    static OWN: RefCell<Option<(u64, Arc<Thread>)>> = const { RefCell::new(None) };
}

/// Work under way until this is dropped.
#[derive(Debug)]
pub struct Work(Option<Arc<Thread>>);

impl Default for UnderWay {
    fn default() -> Self {
        static IDS: AtomicU64 = AtomicU64::new(0);
        let id = IDS.fetch_add(1, Ordering::Relaxed);
        Self { id, begun: Instant::now(), threads: Mutex::default() }
    }
}

impl UnderWay {
    /// Notes that this thread begins work on inode `ino`. Inside other work that is noted already.
    pub fn begin(&self, ino: u64) -> Work {
        let own = OWN.with_borrow_mut(|own| match own {
            Some((id, thread)) if *id == self.id => thread.clone(),
            _ => {
                let thread = Arc::new(Thread::default());
                let mut threads = self.threads.lock();
                threads.retain(|thread| thread.strong_count() > 0);
                threads.push(Arc::downgrade(&thread));
                own.insert((self.id, thread)).1.clone()
            }
        });
        if own.since.load(Ordering::Relaxed) != 0 {
            return Work(None);
        }
        own.ino.store(ino, Ordering::Relaxed);
        own.since.store(self.begun.elapsed().as_millis() as u64 + 1, Ordering::Release);
        Work(Some(own))
    }

    /// Inodes on which something has been under way for at least `time`, and for how long.
    pub fn longer_than(&self, time: Duration) -> HashMap<u64, Duration> {
        let mut found = HashMap::new();
        let now = self.begun.elapsed();
        for thread in self.threads.lock().iter().filter_map(Weak::upgrade) {
            let since = thread.since.load(Ordering::Acquire);
            let begun = Duration::from_millis(since.saturating_sub(1));
            let age = now.saturating_sub(begun);
            if since != 0 && age >= time {
                let longest = found.entry(thread.ino.load(Ordering::Relaxed)).or_insert(age);
                *longest = age.max(*longest);
            }
        }
        found
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Some(thread) = &self.0 {
            thread.since.store(0, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_shows_with_its_inode_until_it_ends() {
        let under_way = UnderWay::default();
        let all = || under_way.longer_than(Duration::ZERO).into_keys().collect::<Vec<_>>();
        assert!(all().is_empty());
        let outer = under_way.begin(7);
        let inner = under_way.begin(8);
        assert_eq!(all(), [7]);
        drop(inner);
        assert_eq!(all(), [7]);
        assert_eq!(under_way.longer_than(Duration::from_secs(3600)).len(), 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _work = under_way.begin(9);
                let mut both = all();
                both.sort_unstable();
                assert_eq!(both, [7, 9]);
            });
        });
        drop(outer);
        assert!(all().is_empty());
    }
}
