//! A small pool of threads that spin for a while before they sleep (docs/decisions/0002-spin-pool.md).
//!
//! While calls follow one another within the spin time, handing work over is a few atomic operations and no system call. A thread that loses
//! its core does not count that time as spinning.

use std::cell::UnsafeCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::Duration;

use super::placement::{leave_core, own_core};
use super::wait::SpinTime;

/// How long a thread without work spins before it sleeps.
pub const DEFAULT_SPIN: Duration = Duration::from_micros(200);

/// How long the caller, its own work done, spins for workers that have joined. A task takes a millisecond at most at 256K tokens, so a worker
/// that needs longer has lost its core; asleep, the caller lets it have the one that it runs on itself.
const CALLER_SPIN: Duration = Duration::from_millis(2);

/// Compute threads: the caller of [`SpinPool::run`] and the workers.
pub struct SpinPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    handles: Vec<Thread>,
}

type Body<'a> = dyn Fn(usize) + Sync + 'a;

/// In `state`: an odd-or-even run number above, whether workers may still join below it, and how many have.
const OPEN: u64 = 1 << 31;
const JOINED: u64 = OPEN - 1;
const RUN: u64 = 1 << 32;

struct Shared {
    state: AtomicU64,
    body: UnsafeCell<Option<*const Body<'static>>>,
    asleep: Vec<AtomicBool>,
    /// The core that the caller ran on when it last woke somebody.
    caller_core: AtomicUsize,
    /// The caller sleeps until nobody is in the run.
    caller_asleep: AtomicBool,
    left: (Mutex<()>, Condvar),
    panicked: AtomicBool,
    stop: AtomicBool,
    spin: Duration,
}

// SAFETY: `body` is written only by `run`, which holds the pool exclusively, while the state is closed and no worker has joined;
// it is read only by workers that have joined. The bodies themselves are `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is never used outside the run that wrote it.
unsafe impl Send for Shared {}

impl SpinPool {
    /// A pool of `threads` compute threads, at least one, of which `threads - 1` are started here.
    ///
    /// # Errors
    /// The index of the thread that could not be started, with the reason.
    pub fn start(threads: usize, spin: Duration) -> Result<Self, (usize, io::Error)> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            body: UnsafeCell::new(None),
            asleep: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            caller_core: AtomicUsize::new(0),
            caller_asleep: AtomicBool::new(false),
            left: (Mutex::new(()), Condvar::new()),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            spin,
        });
        let mut pool = Self { shared, workers: Vec::new(), handles: Vec::new() };
        for thread in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let worker = std::thread::Builder::new().name(format!("sluice-cpu-{thread}")).spawn(move || work(&shared, thread));
            let worker = worker.map_err(|error| (thread, error))?;
            pool.handles.push(worker.thread().clone());
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Compute threads, the caller's own included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `body(thread)` on the calling thread (number 0) and on every worker that comes before the caller is done.
    /// Bodies must share the work among those that came: see [`SpinPool::tasks`].
    pub fn run(&mut self, body: &Body<'_>) {
        if self.workers.is_empty() {
            return body(0);
        }
        let run = (self.shared.state.load(Ordering::Relaxed) & !(RUN - 1)).wrapping_add(RUN);
        // SAFETY: the state is closed and nobody has joined, so nobody reads the cell. Only the lifetime is changed: every reader has
        // left before this function returns.
        unsafe { *self.shared.body.get() = Some(std::mem::transmute::<*const Body<'_>, *const Body<'static>>(body)) };
        self.shared.state.store(run | OPEN, Ordering::SeqCst);
        for (asleep, handle) in self.shared.asleep.iter().zip(&self.handles) {
            if asleep.load(Ordering::SeqCst) {
                self.shared.caller_core.store(own_core(), Ordering::SeqCst);
                handle.unpark();
            }
        }
        let mine = catch_unwind(AssertUnwindSafe(|| body(0)));
        self.shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        self.wait_for_workers();
        if let Err(payload) = mine {
            resume_unwind(payload);
        }
        assert!(!self.shared.panicked.swap(false, Ordering::Relaxed), "a compute thread panicked");
    }

    /// Runs `body(thread, task)` once for each task of `0..count`, tasks being taken in ascending order.
    pub fn tasks(&mut self, count: usize, body: impl Fn(usize, usize) + Sync) {
        let next = AtomicUsize::new(0);
        self.run(&|thread| {
            loop {
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task >= count {
                    return;
                }
                body(thread, task);
            }
        });
    }

    fn wait_for_workers(&self) {
        let mut time = SpinTime::begin();
        while self.shared.is_joined() {
            if time.turn(CALLER_SPIN) {
                return self.shared.sleep_until_left();
            }
        }
    }
}

impl Shared {
    fn is_joined(&self) -> bool {
        self.state.load(Ordering::SeqCst) & JOINED != 0
    }

    fn sleep_until_left(&self) {
        let (mutex, left) = &self.left;
        let mut guard = mutex.lock().unwrap_or_else(PoisonError::into_inner);
        // Either the load below sees that the last worker has left, or that worker sees the flag and, once the mutex is free, wakes this thread.
        self.caller_asleep.store(true, Ordering::SeqCst);
        while self.is_joined() {
            guard = left.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.caller_asleep.store(false, Ordering::SeqCst);
    }

    /// A worker leaves the run.
    fn leave(&self) {
        self.state.fetch_sub(1, Ordering::SeqCst);
        if self.caller_asleep.load(Ordering::SeqCst) {
            let (mutex, left) = &self.left;
            let _guard = mutex.lock().unwrap_or_else(PoisonError::into_inner);
            left.notify_one();
        }
    }
}

impl Drop for SpinPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its bodies, so joining cannot fail.
            let _ = worker.join();
        }
    }
}

/// Joins a run that is open and not yet seen.
fn join(shared: &Shared, seen: &mut u64) -> bool {
    let state = shared.state.load(Ordering::Acquire);
    let run = state & !(RUN - 1);
    if state & OPEN == 0 || run == *seen {
        return false;
    }
    if shared.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
        *seen = run;
        return true;
    }
    false
}

fn work(shared: &Shared, thread: usize) {
    let mut seen = 0;
    let mut idle = SpinTime::begin();
    while !shared.stop.load(Ordering::Relaxed) {
        if join(shared, &mut seen) {
            // SAFETY: this thread has joined the run, so the body was written before and outlives the run.
            let body = unsafe { (*shared.body.get()).map(|body| &*body) };
            let body = AssertUnwindSafe(body);
            if catch_unwind(|| body.iter().for_each(|body| body(thread))).is_err() {
                shared.panicked.store(true, Ordering::Relaxed);
            }
            shared.leave();
            idle = SpinTime::begin();
        } else if idle.turn(shared.spin) {
            sleep(shared, thread, seen);
            idle = SpinTime::begin();
        }
    }
}

fn sleep(shared: &Shared, thread: usize, seen: u64) {
    let asleep = &shared.asleep[thread - 1];
    asleep.store(true, Ordering::SeqCst);
    // Either this load sees the new run, or `run` sees the flag and wakes this thread.
    let state = shared.state.load(Ordering::SeqCst);
    let unseen = state & OPEN != 0 && state & !(RUN - 1) != seen;
    if !unseen && !shared.stop.load(Ordering::SeqCst) {
        std::thread::park();
        // The operating system puts a woken thread on the core of the one that wakes it when the others look busy at that moment. There it
        // would take the core from the caller, spin until it sleeps, and be woken the same way at the next run.
        let core = shared.caller_core.load(Ordering::SeqCst);
        if own_core() == core {
            leave_core(core);
        }
    }
    asleep.store(false, Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_is_done_once() {
        for threads in 1..=3 {
            let mut pool = SpinPool::start(threads, DEFAULT_SPIN).expect("threads");
            let done: Vec<AtomicUsize> = (0..100).map(|_| AtomicUsize::new(0)).collect();
            for round in 1..=50 {
                pool.tasks(done.len(), |_, task| {
                    done[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(done.iter().all(|count| count.load(Ordering::Relaxed) == round), "{threads} threads, round {round}");
            }
        }
    }

    /// Waits for `flag` without a core of its own.
    fn wait_for(flag: &AtomicBool) {
        while !flag.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn workers_that_sleep_are_woken() {
        let mut pool = SpinPool::start(2, Duration::ZERO).expect("threads");
        for _ in 0..20 {
            while !pool.shared.asleep[0].load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            let came = AtomicBool::new(false);
            // The caller leaves only once the worker has come.
            pool.run(&|thread| if thread == 0 { wait_for(&came) } else { came.store(true, Ordering::SeqCst) });
        }
    }

    #[test]
    fn a_caller_waits_asleep_for_a_worker_that_has_no_core() {
        let mut pool = SpinPool::start(2, DEFAULT_SPIN).expect("threads");
        let shared = Arc::clone(&pool.shared);
        for _ in 0..3 {
            let (came, left) = (AtomicBool::new(false), AtomicBool::new(false));
            pool.run(&|thread| {
                if thread == 0 {
                    return wait_for(&came);
                }
                came.store(true, Ordering::SeqCst);
                // As if this thread's core were taken until the caller sleeps.
                wait_for(&shared.caller_asleep);
                left.store(true, Ordering::SeqCst);
            });
            assert!(left.load(Ordering::SeqCst), "the caller returned while a worker was in its run");
            assert!(!shared.caller_asleep.load(Ordering::SeqCst));
        }
    }

    #[test]
    fn a_panic_of_a_worker_reaches_the_caller() {
        let mut pool = SpinPool::start(2, DEFAULT_SPIN).expect("threads");
        let came = AtomicBool::new(false);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            pool.run(&|thread| {
                if thread == 0 {
                    return wait_for(&came);
                }
                came.store(true, Ordering::SeqCst);
                panic!("meant to be seen");
            });
        }));
        assert!(outcome.is_err());
        pool.tasks(4, |_, _| {});
    }
}
