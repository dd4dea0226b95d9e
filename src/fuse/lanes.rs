//! Threads for requests, so that those that hang hold up no others: [`Lanes`].
//!
//! The threads that read requests from the kernel answer them themselves, which is fastest. There are
//! [`RESERVE`] more of them than the kernel's queue needs; who finds enough others reading when its
//! request is done rests, and is called when the last one that reads takes a request. So those that hang
//! are replaced, and requests of others take as long as ever. When none is left to be called, the last one
//! hands its request to a spare thread, and reads on. Spare threads come when a request finds none
//! waiting: a few at once, more only when for [`STEP`] none took a request up, and that only happens where
//! requests hang. Idle ones go again.

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
/// Reading threads that replace others which hang.
pub const RESERVE: usize = 12;
/// Spare threads at most. More requests than that hang only where all images do.
const MOST: usize = 1024;

/// What a request asks for, with its answer.
type Job = Box<dyn FnOnce() + Send>;

/// Decides where a request is served.
#[derive(Debug)]
pub struct Lanes {
    /// Threads that shall read at a time.
    readers: usize,
    /// Those that do, and those that are called to.
    reading: AtomicUsize,
    rest: Mutex<Rest>,
    needed: Condvar,
    spare: Arc<Spare>,
}

/// Reading threads that are not needed at the moment.
#[derive(Debug, Default)]
struct Rest {
    resting: usize,
    /// How many of them are to read on.
    called: usize,
    /// Threads that will say when the session ends.
    witnesses: usize,
    /// The session ends.
    over: bool,
}

/// A reading thread that serves a request, until this is dropped: then it reads on, perhaps after a rest.
#[derive(Debug)]
pub struct Serving<'a>(&'a Lanes);

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.0.done();
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
    /// For `all` threads, of which `readers` read at a time.
    pub fn new(readers: usize, all: usize) -> Self {
        Self {
            readers,
            reading: AtomicUsize::new(all),
            rest: Mutex::default(),
            needed: Condvar::new(),
            spare: Arc::default(),
        }
    }

    /// Lets the calling thread, which read a request, serve it itself, unless nobody else would read on.
    pub fn serve(&self) -> Option<Serving<'_>> {
        let before = self.reading.fetch_sub(1, Ordering::AcqRel);
        if before > 1 || self.call() {
            return Some(Serving(self));
        }
        self.reading.fetch_add(1, Ordering::AcqRel);
        None
    }

    /// Has a resting thread read on, if there is one.
    fn call(&self) -> bool {
        let mut rest = self.rest.lock();
        let found = rest.resting > rest.called;
        if found {
            rest.called += 1;
            self.reading.fetch_add(1, Ordering::AcqRel);
            self.needed.notify_one();
        }
        found
    }

    /// Takes note that the calling thread will call [`Self::end`] when the session ends. Of those one at
    /// least never rests: only a thread that reads hears of the end.
    pub fn witness(&self) {
        self.rest.lock().witnesses += 1;
    }

    fn done(&self) {
        if self.reading.load(Ordering::Acquire) < self.readers || !self.rested() {
            self.reading.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Rests until called. `false` for a thread that is not to rest, or not any more.
    fn rested(&self) -> bool {
        let mut rest = self.rest.lock();
        if rest.resting + 1 >= rest.witnesses {
            return false;
        }
        rest.resting += 1;
        self.needed.wait_while(&mut rest, |rest| rest.called == 0 && !rest.over);
        rest.resting -= 1;
        // Who calls counts it as reading.
        let called = rest.called > 0;
        rest.called -= usize::from(called);
        called
    }

    /// Lets those that rest read on: they hear of the end of the session that way.
    pub fn end(&self) {
        self.rest.lock().over = true;
        self.needed.notify_all();
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
        let lanes = Lanes::new(3, 3);
        let first = lanes.serve();
        let second = lanes.serve();
        assert!(first.is_some() && second.is_some());
        assert!(lanes.serve().is_none());
        drop(first);
        assert!(lanes.serve().is_some());
        assert!(Lanes::new(1, 1).serve().is_none());
    }

    #[test]
    fn who_rests_replaces_those_that_hang_until_the_session_ends() {
        let lanes = Lanes::new(2, 4);
        (0..3).for_each(|_| lanes.witness());
        let resting = |count: usize| {
            while lanes.rest.lock().resting != count {
                thread::yield_now();
            }
        };
        thread::scope(|scope| {
            let served = lanes.serve();
            scope.spawn(|| drop(served));
            resting(1);
            let served = lanes.serve();
            scope.spawn(|| drop(served));
            resting(2);
            // Both that still read hang, and who replaces them.
            let hung: Vec<_> = (0..3).map(|_| lanes.serve()).collect();
            assert!(hung.iter().all(Option::is_some));
            resting(0);
            assert!(lanes.serve().is_none());
            assert_eq!(lanes.reading.load(Ordering::Relaxed), 1);
            lanes.end();
            drop(hung);
            assert_eq!(lanes.reading.load(Ordering::Relaxed), 4);
        });
    }

    #[test]
    fn nobody_rests_when_the_session_ends() {
        let lanes = Lanes::new(1, 3);
        // The only one that would hear of the end does not rest.
        lanes.witness();
        drop(lanes.serve());
        lanes.witness();
        thread::scope(|scope| {
            let served = lanes.serve();
            scope.spawn(|| drop(served));
            while lanes.rest.lock().resting == 0 {
                thread::yield_now();
            }
            lanes.end();
        });
        drop(lanes.serve());
        assert_eq!(lanes.reading.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn requests_that_hang_hold_up_no_others() {
        let lanes = Lanes::new(2, 2);
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
