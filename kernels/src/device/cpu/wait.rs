//! How long a thread has been spinning, time without a core left out.

use std::time::{Duration, Instant};

/// Turns between two looks at the clock: 1 to 4 us of spinning.
const TURNS_A_LOOK: u32 = 64;
/// What one look adds at most. More than this between two looks means that the thread had no core.
const LONGEST_LOOK: Duration = Duration::from_micros(10);

/// Time that a thread has spun.
///
/// By the clock alone, a thread that lost its core for a while would come back believing that it had waited all that time, and would give up
/// although what it waits for may be a microsecond away.
#[derive(Debug)]
pub(super) struct SpinTime {
    spun: Duration,
    looked: Instant,
    turns: u32,
}

impl SpinTime {
    /// Begins now.
    pub(super) fn begin() -> Self {
        Self { spun: Duration::ZERO, looked: Instant::now(), turns: 0 }
    }

    /// One turn of a loop; whether the thread has spun for `limit` by now.
    pub(super) fn turn(&mut self, limit: Duration) -> bool {
        self.turns = self.turns.wrapping_add(1);
        if !self.turns.is_multiple_of(TURNS_A_LOOK) {
            std::hint::spin_loop();
            return false;
        }
        self.look(Instant::now()) >= limit
    }

    fn look(&mut self, now: Instant) -> Duration {
        self.spun += now.duration_since(self.looked).min(LONGEST_LOOK);
        self.looked = now;
        self.spun
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_without_a_core_does_not_count() {
        let mut time = SpinTime::begin();
        let begin = time.looked;
        assert_eq!(time.look(begin + Duration::from_micros(3)), Duration::from_micros(3));
        let lost = begin + Duration::from_millis(50);
        assert_eq!(time.look(lost), Duration::from_micros(13), "50 ms between two looks are one look at most");
        assert_eq!(time.look(lost + Duration::from_micros(4)), Duration::from_micros(17));
    }

    #[test]
    fn spinning_ends_at_its_limit_and_not_before() {
        let limit = Duration::from_micros(200);
        let begin = Instant::now();
        let mut time = SpinTime::begin();
        while !time.turn(limit) {}
        assert!(begin.elapsed() >= limit, "what counts is never more than what has passed");
        assert!(time.spun < limit + LONGEST_LOOK);
    }
}
