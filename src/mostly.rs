//! What a worker's turns are mostly like, told so that it does not change its mind often.

/// Turns of one kind more than of the other before the answer changes. So it does that twice in as
/// many turns at most. A worker that sleeps stays as it was.
const TURNS_TO_CHANGE: u32 = 128;

/// What most turns were like lately.
#[derive(Debug, Default)]
pub struct Mostly {
    is: bool,
    /// Turns that were so more than others, between 0 and [`TURNS_TO_CHANGE`].
    lead: u32,
}

impl Mostly {
    /// Takes note of a turn.
    pub fn note(&mut self, is: bool) {
        self.lead =
            if is { (self.lead + 1).min(TURNS_TO_CHANGE) } else { self.lead.saturating_sub(1) };
        self.is = match self.lead {
            0 => false,
            TURNS_TO_CHANGE => true,
            _ => self.is,
        };
    }

    /// Whether most were so.
    pub fn is(&self) -> bool {
        self.is
    }
}
