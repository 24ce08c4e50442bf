//! On which core a thread runs.

use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// The core that the calling thread runs on; by the time it is read it may be another.
pub(super) fn own_core() -> usize {
    sched_getcpu()
}

/// Takes the calling thread off `core` if it may run elsewhere. The set of cores that it may run on stays as it is.
pub(super) fn leave_core(core: usize) {
    let Ok(allowed) = sched_getaffinity(None) else { return };
    let mut others = allowed;
    if core >= CpuSet::MAX_CPU {
        return;
    }
    others.unset(core);
    // To be forbidden a core moves a thread off it at once. Where that fails the thread stays, which costs time only.
    if others.count() > 0 && sched_setaffinity(None, &others).is_ok() {
        let _ = sched_setaffinity(None, &allowed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_leaves_its_core_runs_on_another_and_may_return() {
        let moved = std::thread::spawn(|| {
            let allowed = sched_getaffinity(None).expect("cores of this thread");
            let left = (0..100).any(|_| {
                let core = own_core();
                leave_core(core);
                own_core() != core
            });
            assert_eq!(sched_getaffinity(None).expect("cores of this thread"), allowed, "the cores that the thread may run on");
            left == (allowed.count() > 1)
        });
        assert!(moved.join().expect("no panic"));
    }

    #[test]
    fn a_thread_with_one_core_stays_on_it() {
        let stayed = std::thread::spawn(|| {
            let mut one = CpuSet::new();
            one.set(own_core());
            sched_setaffinity(None, &one).expect("a core that this thread ran on");
            leave_core(own_core());
            sched_getaffinity(None).expect("cores of this thread") == one
        });
        assert!(stayed.join().expect("no panic"));
    }
}
