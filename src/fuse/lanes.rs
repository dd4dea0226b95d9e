//! Threads for requests, so that those that hang hold up no others: [`Lanes`].
//!
//! The threads that read requests from the kernel answer them themselves, which is fastest. The last of
//! them that is free does not: it hands its request to a spare thread, and reads on. Spare threads come
//! when a request finds none waiting: a few at once, more only when for [`STEP`] none took a request up, and
//! that only happens where requests hang. Idle ones go again.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// How long the first request in the queue waits before more spare threads come.
const STEP: Duration = Duration::from_millis(20);
/// How long a spare thread waits for work.
const IDLE: Duration = Duration::from_secs(10);
/// Spare threads at most. More requests than that hang only where all images do.
const MOST: usize = 1024;

/// What a request asks for, with its answer.
type Job = Box<dyn FnOnce() + Send>;

/// Decides where a request is served.
#[derive(Debug)]
pub struct Lanes {
    /// Threads that read requests.
    readers: usize,
    /// Those of them that serve one.
    serving: AtomicUsize,
    spare: Arc<Spare>,
}

/// A reading thread that serves a request, until this is dropped.
#[derive(Debug)]
pub struct Serving<'a>(&'a AtomicUsize);

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

#[derive(Default)]
struct Spare {
    state: Mutex<State>,
    arrived: Condvar,
}

impl std::fmt::Debug for Spare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spare").finish_non_exhaustive()
    }
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    /// Requests taken out of the queue so far.
    taken: u64,
    threads: usize,
    idle: usize,
    /// Whether [`Spare::watch`] runs.
    watched: bool,
}

impl Lanes {
    /// For this many threads that read requests.
    pub fn new(readers: usize) -> Self {
        Self { readers, serving: AtomicUsize::new(0), spare: Arc::default() }
    }

    /// Lets the calling thread serve a request itself, unless it is the last that could read on.
    pub fn serve(&self) -> Option<Serving<'_>> {
        let serving = Serving(&self.serving);
        let others = self.serving.fetch_add(1, Ordering::Acquire);
        (others + 1 < self.readers).then_some(serving)
    }

    /// Gives a request to a spare thread; does it here if there is none to be had.
    pub fn hand_over(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = self.spare.state.lock();
        state.queue.push_back(Box::new(job));
        if state.idle >= state.queue.len() {
            self.spare.arrived.notify_one();
            return;
        }
        if state.threads < self.readers {
            self.spare.add(&mut state);
        }
        if state.threads == 0 {
            let job = state.queue.pop_back();
            drop(state);
            job.into_iter().for_each(|job| job());
            return;
        }
        if !state.watched {
            let spare = self.spare.clone();
            let watch = thread::Builder::new().name("spare-watch".into());
            state.watched = watch.spawn(move || spare.watch()).is_ok();
        }
    }
}

impl Spare {
    /// Starts one more thread, if there is one to be had.
    fn add(self: &Arc<Self>, state: &mut State) {
        let spare = self.clone();
        let started = thread::Builder::new().name("spare".into()).spawn(move || spare.work());
        state.threads += usize::from(started.is_ok());
    }

    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            while let Some(job) = state.queue.pop_front() {
                state.taken += 1;
                drop(state);
                job();
                state = self.state.lock();
            }
            state.idle += 1;
            let waited = self.arrived.wait_for(&mut state, IDLE);
            state.idle -= 1;
            if waited.timed_out() && state.queue.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }

    /// Adds threads for as long as requests wait and none is taken up.
    fn watch(self: &Arc<Self>) {
        let mut before = None;
        loop {
            {
                let mut state = self.state.lock();
                if state.queue.is_empty() {
                    state.watched = false;
                    return;
                }
                if before == Some(state.taken) {
                    for _ in 0..state.queue.len().min(MOST.saturating_sub(state.threads)) {
                        self.add(&mut state);
                    }
                }
                before = Some(state.taken);
            }
            thread::sleep(STEP);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn the_last_reading_thread_stays_free() {
        let lanes = Lanes::new(3);
        let first = lanes.serve();
        let second = lanes.serve();
        assert!(first.is_some() && second.is_some());
        assert!(lanes.serve().is_none());
        drop(first);
        assert!(lanes.serve().is_some());
        assert!(Lanes::new(1).serve().is_none());
    }

    #[test]
    fn requests_that_hang_hold_up_no_others() {
        let lanes = Lanes::new(2);
        let (open, gate) = mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        for _ in 0..100 {
            let gate = gate.clone();
            lanes.hand_over(move || {
                let _ = gate.lock().recv();
            });
        }
        let (done, all) = mpsc::channel();
        for n in 0..10 {
            let done = done.clone();
            lanes.hand_over(move || done.send(n).unwrap());
        }
        let mut found: Vec<i32> = all.iter().take(10).collect();
        found.sort_unstable();
        assert_eq!(found, (0..10).collect::<Vec<_>>());
        drop(open);
    }
}
