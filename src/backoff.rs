//! Growing waits between attempts.

use std::time::Duration;

/// Waits that double from the first to the longest.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    /// The wait after the first failure.
    pub first: Duration,
    /// No wait is longer.
    pub longest: Duration,
}

impl Backoff {
    /// Returns how long to wait after `failures` failures in a row. Up to half of it is random, so that
    /// many clients of one recovering server do not come back at the same moment.
    #[must_use]
    pub fn wait(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        let wait = self.first.saturating_mul(1 << doublings).min(self.longest);
        wait.mul_f64(1.0 - fastrand::f64() / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_with_jitter_below() {
        let backoff = Backoff {
            first: Duration::from_millis(250),
            longest: Duration::from_secs(30),
        };
        for (failures, full) in [
            (1, 250),
            (2, 500),
            (3, 1000),
            (7, 16_000),
            (8, 30_000),
            (9, 30_000),
            (u32::MAX, 30_000),
        ] {
            let waits: Vec<_> = (0..100).map(|_| backoff.wait(failures)).collect();
            let full = Duration::from_millis(full);
            assert!(
                waits.iter().all(|wait| (full / 2..=full).contains(wait)),
                "{failures}"
            );
            assert!(waits.iter().any(|wait| *wait != waits[0]), "no jitter");
        }
    }
}
