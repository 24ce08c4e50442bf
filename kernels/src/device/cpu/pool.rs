//! A small pool of threads that spin for a while before they sleep (docs/decisions/0002-spin-pool.md).
//!
//! While calls follow one another within the spin time, handing work over is a few atomic operations and no system call.

use std::cell::UnsafeCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a thread without work spins before it sleeps.
pub const DEFAULT_SPIN: Duration = Duration::from_micros(200);

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
        let mut turns = 0u32;
        while self.shared.state.load(Ordering::Acquire) & JOINED != 0 {
            turns = turns.saturating_add(1);
            if turns < 1 << 16 {
                std::hint::spin_loop();
            } else {
                // Somebody else has the worker's core.
                std::thread::yield_now();
            }
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
    let mut idle_since = Instant::now();
    let mut turns = 0u32;
    while !shared.stop.load(Ordering::Relaxed) {
        if join(shared, &mut seen) {
            // SAFETY: this thread has joined the run, so the body was written before and outlives the run.
            let body = unsafe { (*shared.body.get()).map(|body| &*body) };
            let body = AssertUnwindSafe(body);
            if catch_unwind(|| body.iter().for_each(|body| body(thread))).is_err() {
                shared.panicked.store(true, Ordering::Relaxed);
            }
            shared.state.fetch_sub(1, Ordering::AcqRel);
            idle_since = Instant::now();
            continue;
        }
        turns = turns.wrapping_add(1);
        if !turns.is_multiple_of(64) || idle_since.elapsed() < shared.spin {
            std::hint::spin_loop();
            continue;
        }
        sleep(shared, thread, seen);
        idle_since = Instant::now();
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
    }
    asleep.store(false, Ordering::SeqCst);
}
