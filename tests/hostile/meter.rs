//! What one case costs: bytes that the running thread holds, and a watch over cases that never end.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// The system's allocator, counting what each thread holds.
pub struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
    static PAUSED: Cell<bool> = const { Cell::new(false) };
}

fn count(bytes: isize) {
    // Nothing is counted while a thread ends.
    let _ = PAUSED.try_with(|paused| {
        if !paused.get() {
            let _ = HELD.try_with(|held| {
                held.set(held.get() + bytes);
                let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held.get())));
            });
        }
    });
}

// SAFETY: every call goes to the system's allocator unchanged; counting allocates nothing.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps the contract of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

/// Runs `f` and answers with the most memory that this thread held meanwhile beyond what it held
/// before.
pub fn peak<R>(f: impl FnOnce() -> R) -> (R, usize) {
    let before = HELD.get();
    PEAK.set(before);
    let result = f();
    (result, (PEAK.get() - before) as usize)
}

/// Runs `f`, whose memory is that of the simulated host, without counting it.
pub fn uncounted<R>(f: impl FnOnce() -> R) -> R {
    let paused = PAUSED.replace(true);
    let result = f();
    PAUSED.set(paused);
    result
}

/// What each thread is doing, so that a case that never ends has a name.
#[derive(Default)]
pub struct Watch {
    running: Mutex<Vec<Option<(u64, Instant)>>>,
}

impl Watch {
    /// A place for one thread.
    pub fn join(&self) -> usize {
        let mut running = self.running.lock();
        running.push(None);
        running.len() - 1
    }

    /// Thread `place` begins case `case`, or is done with it.
    pub fn set(&self, place: usize, case: Option<u64>) {
        self.running.lock()[place] = case.map(|case| (case, Instant::now()));
    }

    /// A case that has been running for longer than `limit`.
    pub fn stuck(&self, limit: Duration) -> Option<u64> {
        let running = self.running.lock();
        running.iter().flatten().find(|(_, since)| since.elapsed() > limit).map(|(case, _)| *case)
    }
}
