//! The end of the listener: no new clients, and the connections that there are end by themselves.

use std::time::{Duration, Instant};

use nix::poll::PollTimeout;

use super::{Outbox, PAUSE_MS, Serving, send};
use crate::config::Handoff;
use crate::error::Result;
use crate::handoff::Message;
use crate::process::{ONE_ORDER, Wake};

/// A listener that is ending.
pub(super) struct Ending<'a> {
    serving: Serving<'a>,
    /// When the order to end came, if it was one.
    ordered: Option<Instant>,
    deadline: Option<Instant>,
}

impl<'a> Ending<'a> {
    /// It was told to end within `time`.
    pub(super) fn ordered(mut serving: Serving<'a>, time: Duration) -> Self {
        // Those who wait at a socket that the connector accepts from are its business.
        let listener = serving.listener.take().filter(|_| serving.handoff == Handoff::Connections);
        listener.into_iter().for_each(|listener| serving.queues.add(listener));
        let now = Instant::now();
        Self { serving, ordered: Some(now), deadline: Some(now + time) }
    }

    /// Another process has taken over: who waits is that one's, and it waits for nothing here.
    pub(super) fn succeeded(mut serving: Serving<'a>) -> Self {
        serving.is_ours = false;
        let ms = serving.config.drain_timeout_ms;
        let deadline = (ms > 0).then(|| Instant::now() + Duration::from_millis(ms.into()));
        Self { serving, ordered: None, deadline }
    }

    /// Ends when the connector does, after the last connection; or before, when the time is over,
    /// by a further signal, or because the connector is gone. The caller has to stop it then.
    pub(super) fn run(mut self) -> Result<u8> {
        let result = self.wait();
        self.cut();
        result
    }

    fn wait(&mut self) -> Result<u8> {
        let serving = &mut self.serving;
        (serving.listener, serving.follower, serving.takeover) = (None, None, None);
        while self.hand_over() {
            if self.is_over(PAUSE_MS.into())? {
                return Ok(0);
            }
        }
        let drain = if self.serving.is_ours { Message::Drain } else { Message::Leave };
        send(self.serving.control, drain, &[])?;
        // Their ends tell the workers that there is no more to take.
        self.serving.outboxes.clear();
        while !self.is_over(PollTimeout::NONE)? {}
        Ok(0)
    }

    /// Resets who still waits, and counts them for the connector to report.
    fn cut(&mut self) {
        let Serving { queues, outboxes, cut, is_ours, .. } = &mut self.serving;
        // Closing the socket they wait at resets them, unless somebody else has it.
        let waiting = if *is_ours { queues.waiting() as u32 } else { 0 };
        let accepted: u32 = outboxes.iter_mut().map(Outbox::reset).sum();
        cut.add(0, waiting + accepted);
    }

    /// Hands over what waits, and closes the sockets it waited at. Returns whether some is left.
    fn hand_over(&mut self) -> bool {
        let are_waiting = self.serving.take_queues();
        self.serving.flush() || are_waiting
    }

    /// Waits until something happens, for `timeout` at most; whether that is the end.
    fn is_over(&self, timeout: PollTimeout) -> Result<bool> {
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Ok(true);
        }
        // Rounded up, so that the time is over then.
        let left =
            left.and_then(|left| PollTimeout::try_from(left + Duration::from_millis(1)).ok());
        let timeout = match left {
            Some(left) if timeout.is_none() => left,
            Some(left) => timeout.min(left),
            None => timeout,
        };
        let is_repetition = || self.ordered.is_some_and(|since| since.elapsed() < ONE_ORDER);
        Ok(match self.serving.wait(false, timeout)? {
            Wake::Own => {
                self.serving.outboxes.iter().for_each(Outbox::hear);
                false
            }
            Wake::Signal => !is_repetition(),
            Wake::Control => !(self.serving.is_told_to_end() && is_repetition()),
        })
    }
}
