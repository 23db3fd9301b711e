//! How long operations took.

use std::time::Duration;

/// Counts durations with a relative error of at most 1/64.
pub(crate) struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Histogram {
    /// Steps for each power of two.
    const STEPS_LOG2: u32 = 6;

    pub(crate) fn new() -> Self {
        Self { counts: vec![0; 64 << Self::STEPS_LOG2], total: 0 }
    }

    pub(crate) fn add(&mut self, duration: Duration) {
        let ns = (duration.as_nanos() as u64).max(1 << Self::STEPS_LOG2);
        let exponent = ns.ilog2() - Self::STEPS_LOG2;
        let step = (ns >> exponent) - (1 << Self::STEPS_LOG2);
        self.counts[((exponent as usize) << Self::STEPS_LOG2) + step as usize] += 1;
        self.total += 1;
    }

    /// The duration that a share `q` of all does not exceed, in microseconds.
    pub(crate) fn quantile_us(&self, q: f64) -> Option<f64> {
        let rank = (self.total as f64 * q).ceil() as u64;
        let mut seen = 0;
        let bucket = self.counts.iter().position(|count| {
            seen += count;
            seen >= rank && seen > 0
        })?;
        let exponent = bucket >> Self::STEPS_LOG2;
        let step = (bucket & ((1 << Self::STEPS_LOG2) - 1)) + (1 << Self::STEPS_LOG2);
        Some(((step << exponent) as f64) / 1000.0)
    }
}
