//! What is mostly so, told without changing the answer often.

/// Turns, or whatever is noted, of one kind more than of the other before the answer changes. So it
/// does that twice in as many at most. A worker that sleeps stays as it was.
const TO_CHANGE: u32 = 128;

/// What most turns of a worker were like lately.
#[derive(Debug, Default)]
pub struct Mostly {
    is: bool,
    /// How many more were so than not, between 0 and [`TO_CHANGE`].
    lead: u32,
}

impl Mostly {
    /// Takes note of a turn.
    pub fn note(&mut self, is: bool) {
        let lead = self.lead;
        self.lead = if is { (lead + 1).min(TO_CHANGE) } else { lead.saturating_sub(1) };
        self.is = match self.lead {
            0 => false,
            TO_CHANGE => true,
            _ => self.is,
        };
    }

    /// Whether most were so.
    pub fn is(&self) -> bool {
        self.is
    }
}
