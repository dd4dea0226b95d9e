//! The same work on many things, of which any may hang: [`Crew`].
//!
//! A few threads share the work. While nothing gets done, more come to help, so that whatever hangs holds
//! up nothing but itself. Who started the work waits for as long as it likes; what is under way by then
//! goes on without it.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// Threads at the beginning.
const FEW: usize = 4;
/// Threads at most.
const MOST: usize = 512;
/// How long nothing may get done before more threads come.
const STEP: Duration = Duration::from_millis(50);

/// Work on many things.
pub struct Crew<T, R> {
    shared: Arc<Shared<T, R>>,
}

struct Shared<T, R> {
    things: Vec<T>,
    act: Box<dyn Fn(&T) -> R + Send + Sync>,
    state: Mutex<State<R>>,
    changed: Condvar,
}

struct State<R> {
    /// The first thing on which nobody is at work yet.
    next: usize,
    results: Vec<Option<R>>,
    done: usize,
    threads: usize,
    /// Nothing more is begun.
    over: bool,
}

impl<T, R> Crew<T, R>
where
    T: Clone + Send + Sync + 'static,
    R: Send + 'static,
{
    /// Begins to `act` on each of `things`.
    pub fn start(things: Vec<T>, act: impl Fn(&T) -> R + Send + Sync + 'static) -> Self {
        let results = things.iter().map(|_| None).collect();
        let state = State { next: 0, results, done: 0, threads: 0, over: false };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        let crew = Self { shared: Arc::new(Shared { things, act: Box::new(act), state, changed }) };
        crew.help(FEW.min(crew.shared.things.len()));
        crew
    }

    /// Starts up to `count` more threads. If there are none to be had, the work is done here.
    fn help(&self, count: usize) {
        for _ in 0..count {
            let mut state = self.shared.state.lock();
            if state.next >= self.shared.things.len() || state.threads >= MOST {
                return;
            }
            let shared = self.shared.clone();
            let started = thread::Builder::new().name("crew".into()).spawn(move || shared.work());
            match started {
                Ok(_) => state.threads += 1,
                Err(_) if state.threads == 0 => {
                    drop(state);
                    return self.shared.work();
                }
                Err(_) => return,
            }
        }
    }

    /// Waits until all is done, for `patience` at most, and says whether it is.
    pub fn wait(&self, patience: Duration) -> bool {
        let all = self.shared.things.len();
        let begun = Instant::now();
        let mut more = FEW;
        let mut state = self.shared.state.lock();
        while state.done < all && begun.elapsed() < patience {
            let before = state.done;
            let time = STEP.min(patience.saturating_sub(begun.elapsed()));
            let waited = self.shared.changed.wait_for(&mut state, time);
            if waited.timed_out() && state.done == before && state.next < all {
                let next = state.next;
                drop(state);
                self.help(more.min(all - next));
                more *= 2;
                state = self.shared.state.lock();
            }
        }
        state.done == all
    }

    /// What is not done yet.
    pub fn late(&self) -> Vec<T> {
        let state = self.shared.state.lock();
        let all = self.shared.things.iter().zip(&state.results);
        all.filter(|(_, result)| result.is_none()).map(|(thing, _)| thing.clone()).collect()
    }

    /// Begins nothing more, and returns what came of each thing so far.
    pub fn end(self) -> Vec<(T, Option<R>)> {
        let mut state = self.shared.state.lock();
        state.over = true;
        let results = std::mem::take(&mut state.results);
        drop(state);
        self.shared.things.iter().cloned().zip(results).collect()
    }
}

impl<T, R> Shared<T, R> {
    /// What each thread does.
    fn work(&self) {
        loop {
            let mut state = self.state.lock();
            if state.over || state.next >= self.things.len() {
                return;
            }
            let number = state.next;
            state.next += 1;
            drop(state);
            let result = (self.act)(&self.things[number]);
            let mut state = self.state.lock();
            state.done += 1;
            if let Some(place) = state.results.get_mut(number) {
                *place = Some(result);
            }
            self.changed.notify_all();
        }
    }
}

impl<T, R> Drop for Crew<T, R> {
    fn drop(&mut self) {
        self.shared.state.lock().over = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn everything_is_done_and_the_results_keep_their_order() {
        let crew = Crew::start((0..1000).collect(), |n: &u32| n * 2);
        assert!(crew.wait(LONG));
        assert!(crew.late().is_empty());
        let results = crew.end();
        assert!(results.iter().all(|(n, result)| *result == Some(n * 2)));
        assert_eq!(results.len(), 1000);
        assert!(Crew::start(Vec::new(), |_: &u32| ()).wait(Duration::ZERO));
    }

    #[test]
    fn what_hangs_holds_up_nothing_else() {
        let gate = Arc::new((Mutex::new(true), Condvar::new()));
        let held = gate.clone();
        // More hang than there are threads at the beginning, and before all others.
        let crew = Crew::start((0..100).collect(), move |n: &u32| {
            if *n < 50 {
                held.1.wait_while(&mut held.0.lock(), |closed| *closed);
            }
        });
        while crew.late().len() > 50 {
            crew.wait(STEP);
        }
        assert_eq!(crew.late(), (0..50).collect::<Vec<_>>());
        *gate.0.lock() = false;
        gate.1.notify_all();
        assert!(crew.wait(LONG));
    }
}
