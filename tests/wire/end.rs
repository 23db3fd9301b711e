//! One end of a connection, and what it observes.
//!
//! A script calls the operations of both ends one after the other; each notes what a program sees:
//! how many bytes come, where the urgent ones are, how the stream ends, which write fails, and
//! whether it had to wait where nothing was to be waited for. Bytes are of a known pattern, so
//! "1000 bytes" says that they were the right ones.

use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send, setsockopt, sockopt};

use crate::support::calls::{SIOCATMARK, int_ioctl};
use crate::support::streams::Pattern;

/// A wait as long as this is noted, where a script has none of its own. Without anything in between
/// all are far shorter; a delayed or lost packet makes them last 200 ms and more.
pub const STALL: Duration = Duration::from_millis(150);

/// What the note of such a wait says.
pub const STALLED: &str = " (stalled)";

/// What has not happened after this time does not happen.
pub const LIMIT: Duration = Duration::from_secs(2);

/// A sender that gets rid of nothing for this long is blocked.
const BLOCKED: Duration = Duration::from_millis(200);

const BUFFER_BYTES: usize = 256 << 10;

/// An urgent byte that is not part of the stream.
const ASIDE: u8 = b'!';

/// A client's or a server's socket.
pub struct End {
    stream: Option<TcpStream>,
    sends: Pattern,
    expects: Pattern,
    /// Read urgent bytes in their place in the stream.
    inline: bool,
    /// Note when something takes long ...
    hurried: bool,
    /// ... as long as this.
    stall: Duration,
    notes: Vec<String>,
    /// Set when something does not happen: what would come next is not worth waiting for.
    given_up: Arc<AtomicBool>,
}

impl End {
    /// `side`: 0 or 1; each sends what the other expects.
    pub fn new(stream: TcpStream, side: u64, given_up: Arc<AtomicBool>) -> Self {
        stream.set_nodelay(true).unwrap();
        stream.set_nonblocking(true).unwrap();
        setsockopt(&stream, sockopt::OobInline, &true).unwrap();
        let (sends, expects) = (Pattern::new(side, u64::MAX), Pattern::new(1 - side, u64::MAX));
        let (stream, notes) = (Some(stream), Vec::new());
        let (inline, hurried, stall) = (true, true, STALL);
        Self { stream, sends, expects, inline, hurried, stall, notes, given_up }
    }

    /// Has waits noted that are as long as `stall`.
    pub fn with_stall(self, stall: Duration) -> Self {
        Self { stall, ..self }
    }

    /// From here on long waits are part of the script.
    pub fn unhurried(&mut self) {
        self.hurried = false;
    }

    /// How long to wait for what must happen. A row that lets megabytes pile up needs them moved
    /// first, which takes a busy machine seconds.
    fn limit(&self) -> Duration {
        if self.hurried { LIMIT } else { 5 * LIMIT }
    }

    /// Reads urgent bytes out of band, as programs do that do not ask for anything else.
    pub fn take_urgent_out_of_band(&mut self) {
        self.inline = false;
        setsockopt(self.stream(), sockopt::OobInline, &false).unwrap();
    }

    /// What was observed, in order.
    pub fn into_notes(self) -> Vec<String> {
        self.notes
    }

    pub fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    fn stream(&self) -> &TcpStream {
        self.stream.as_ref().expect("a script does not use an end that it has closed")
    }

    pub fn has_given_up(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }

    fn give_up(&mut self, what: &str) {
        self.note(what);
        self.given_up.store(true, Ordering::Relaxed);
    }

    /// Waits for one of `events`; how long that took, or `None` when none came.
    fn wait(&self, events: PollFlags, limit: Duration) -> Option<Duration> {
        let start = Instant::now();
        let mut fds = [PollFd::new(self.stream().as_fd(), events)];
        let ready = poll(&mut fds, PollTimeout::try_from(limit).unwrap()).unwrap();
        (ready > 0).then(|| start.elapsed())
    }

    // Sending.

    /// Sends the next bytes of the stream, waiting for room. Notes a failure.
    pub fn send(&mut self, bytes: u64) {
        self.send_in_pieces(bytes, BUFFER_BYTES);
    }

    /// As [`End::send`], not more than `piece` bytes with one system call.
    pub fn send_in_pieces(&mut self, bytes: u64, piece: usize) {
        self.write(bytes, piece, MsgFlags::empty(), self.limit());
    }

    /// Sends bytes of which the last is urgent.
    pub fn send_urgent(&mut self, bytes: u64) {
        self.write(bytes, BUFFER_BYTES, MsgFlags::MSG_OOB, self.limit());
    }

    /// Sends an urgent byte that the receiver does not read as part of the stream.
    pub fn send_aside(&mut self) {
        if !self.has_given_up() {
            let flags = MsgFlags::MSG_OOB | MsgFlags::MSG_NOSIGNAL;
            send(self.stream().as_raw_fd(), &[ASIDE], flags).unwrap();
        }
    }

    /// Sends up to `bytes`, as many as go; returns how many that were.
    pub fn offer(&mut self, bytes: u64) -> u64 {
        let before = self.sends.at;
        self.write(bytes, BUFFER_BYTES, MsgFlags::empty(), BLOCKED);
        self.sends.at - before
    }

    /// `patience`: for one write. Where it is short, a blocked sender is no failure.
    fn write(&mut self, bytes: u64, piece: usize, flags: MsgFlags, patience: Duration) {
        let goal = self.sends.at + bytes;
        let mut buffer = vec![0; piece.min(bytes as usize)];
        while self.sends.at < goal && !self.has_given_up() {
            let wanted = buffer.len().min((goal - self.sends.at) as usize);
            let n = self.sends.peek(&mut buffer[..wanted]);
            match send(self.stream().as_raw_fd(), &buffer[..n], flags | MsgFlags::MSG_NOSIGNAL) {
                Ok(n) => self.sends.at += n as u64,
                Err(Errno::EAGAIN) => {
                    if self.wait(PollFlags::POLLOUT, patience).is_none() {
                        if patience >= LIMIT {
                            self.give_up("a write is blocked for ever");
                        }
                        return;
                    }
                }
                Err(errno) => return self.note(format!("write: {errno:?}")),
            }
        }
    }

    /// Writes until that fails, as it must soon; notes how.
    pub fn write_until_it_fails(&mut self) {
        let start = Instant::now();
        while !self.has_given_up() {
            let flags = MsgFlags::MSG_NOSIGNAL;
            match send(self.stream().as_raw_fd(), &[0], flags) {
                Err(Errno::EAGAIN) | Ok(_) if start.elapsed() > LIMIT => {
                    self.give_up("no write fails");
                }
                // The answer to what was written takes a moment to come.
                Err(Errno::EAGAIN) | Ok(_) => std::thread::sleep(Duration::from_millis(1)),
                Err(errno) => {
                    return self.note(format!("write: {errno:?}{}", self.stalled(start.elapsed())));
                }
            }
        }
    }

    /// Waits until what lies next to this end, peer or forwarder, has received all that was sent.
    pub fn wait_until_acknowledged(&mut self) {
        let acknowledged = self.eventually(|fd| unsent_bytes(fd) == 0);
        if !acknowledged {
            self.give_up("what was sent is not acknowledged");
        }
    }

    // Receiving.

    /// Reads the next bytes, or to the end if that comes first.
    pub fn read(&mut self, bytes: u64) {
        self.read_in_pieces(bytes, BUFFER_BYTES);
    }

    /// Reads to the end, whatever it is.
    pub fn read_to_end(&mut self) {
        self.read_in_pieces(u64::MAX, BUFFER_BYTES);
    }

    /// As [`End::read`], where the number of bytes is of no interest if it is right.
    pub fn read_message(&mut self, bytes: u64) {
        self.read(bytes);
        self.shorten(bytes);
    }

    /// As [`End::read_to_end`], in the same way.
    pub fn read_all(&mut self, bytes: u64) {
        self.read_to_end();
        self.shorten(bytes);
    }

    fn shorten(&mut self, bytes: u64) {
        if let Some(note) = self.notes.last_mut()
            && let Some(rest) = note.strip_prefix(&count(bytes))
        {
            *note = format!("all bytes{rest}");
        }
    }

    /// Sends so many bytes and the end of the stream, while reading to the end.
    pub fn exchange(&mut self, bytes: u64) {
        let mut sender = Self {
            stream: Some(self.stream().try_clone().unwrap()),
            sends: self.sends.clone(),
            expects: self.expects.clone(),
            notes: Vec::new(),
            given_up: self.given_up.clone(),
            ..*self
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                sender.send(bytes);
                sender.shut();
            });
            self.read_to_end();
        });
        self.sends = sender.sends;
        self.notes.extend(sender.notes);
    }

    /// As [`End::read`], not more than `piece` bytes with one system call.
    pub fn read_in_pieces(&mut self, bytes: u64, piece: usize) {
        if self.has_given_up() {
            return;
        }
        let mut reading = Reading::default();
        let mut buffer = vec![0; piece];
        while reading.bytes < bytes && !reading.has_ended {
            let Some(waited) = self.wait(PollFlags::POLLIN, self.limit()) else {
                reading.event("nothing for 2 s");
                self.given_up.store(true, Ordering::Relaxed);
                break;
            };
            reading.longest_wait = reading.longest_wait.max(waited);
            // Only now: there is a next byte, so whether it is urgent does not change any more.
            let urgent = is_at_mark(self.stream());
            let wanted = if urgent && self.inline { 1 } else { piece };
            let wanted = wanted.min(usize::try_from(bytes - reading.bytes).unwrap_or(wanted));
            if urgent && !self.inline {
                reading.mark();
            }
            match recv(self.stream().as_raw_fd(), &mut buffer[..wanted], MsgFlags::MSG_DONTWAIT) {
                Ok(0) => reading.end("end"),
                Ok(n) => {
                    if self.expects.check(&buffer[..n]).is_err() {
                        // From here on every byte would be a wrong one.
                        return self.give_up("a byte is missing or wrong");
                    }
                    reading.received(n as u64, urgent && self.inline);
                }
                Err(Errno::EAGAIN) => {}
                Err(errno) => reading.end(&format!("{errno:?}")),
            }
        }
        let stalled = self.stalled(reading.longest_wait);
        self.note(format!("{}{stalled}", reading.into_text()));
    }

    /// Takes an urgent byte that was sent aside.
    pub fn read_aside(&mut self) {
        if self.has_given_up() {
            return;
        }
        let Some(waited) = self.wait(PollFlags::POLLPRI, LIMIT) else {
            return self.give_up("no urgent byte comes");
        };
        let mut byte = [0];
        let text = match recv(self.stream().as_raw_fd(), &mut byte, MsgFlags::MSG_OOB) {
            Ok(1) if byte[0] == ASIDE => "urgent byte".to_owned(),
            other => format!("urgent byte: {other:?}, {byte:?}"),
        };
        self.note(format!("{text}{}", self.stalled(waited)));
    }

    /// Waits until so many bytes can be read. Reads none.
    pub fn wait_until_arrived(&mut self, bytes: u64) {
        let arrived = self.eventually(|fd| unread_bytes(fd) >= bytes);
        if !arrived {
            self.give_up("not all bytes arrive");
        }
    }

    /// Waits until the connection has failed, without learning the error.
    pub fn wait_until_failed(&mut self) {
        if self.has_given_up() {
            return;
        }
        // An end of both streams is reported unasked, too, and is no failure.
        let start = Instant::now();
        loop {
            let mut fds = [PollFd::new(self.stream().as_fd(), PollFlags::empty())];
            poll(&mut fds, PollTimeout::from(10u16)).unwrap();
            if fds[0].revents().unwrap().contains(PollFlags::POLLERR) {
                break self.note(format!("fails{}", self.stalled(start.elapsed())));
            }
            if start.elapsed() > LIMIT {
                break self.give_up("does not fail");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    // Ending.

    /// Ends the stream it sends.
    pub fn shut(&mut self) {
        if let Err(error) = self.stream().shutdown(Shutdown::Write) {
            self.note(format!("shutdown: {:?}", error.kind()));
        }
    }

    /// Closes the socket.
    pub fn close(&mut self) {
        self.stream = None;
    }

    /// Closes the socket with a reset.
    pub fn reset(&mut self) {
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        setsockopt(self.stream(), sockopt::Linger, &linger).unwrap();
        self.close();
    }

    fn stalled(&self, waited: Duration) -> &'static str {
        if self.hurried && waited >= self.stall { STALLED } else { "" }
    }

    /// Whether the condition comes true in time.
    fn eventually(&self, condition: impl Fn(&TcpStream) -> bool) -> bool {
        let deadline = Instant::now() + LIMIT;
        while !condition(self.stream()) {
            if self.has_given_up() || Instant::now() > deadline {
                return self.has_given_up();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }
}

/// What comes in one operation, told in a few words.
#[derive(Default)]
struct Reading {
    bytes: u64,
    /// Bytes since the last event.
    plain: u64,
    events: Vec<String>,
    marked_at: Option<u64>,
    has_ended: bool,
    longest_wait: Duration,
}

impl Reading {
    fn received(&mut self, bytes: u64, urgent: bool) {
        self.bytes += bytes;
        if urgent {
            self.event("urgent byte");
        } else {
            self.plain += bytes;
        }
    }

    fn event(&mut self, what: &str) {
        if self.plain > 0 {
            self.events.push(count(std::mem::take(&mut self.plain)));
        }
        self.events.push(what.to_owned());
    }

    /// The urgent byte was here, and was taken out. One mark is met by several looks.
    fn mark(&mut self) {
        if self.marked_at.replace(self.bytes) != Some(self.bytes) {
            self.event("mark");
        }
    }

    fn end(&mut self, how: &str) {
        self.event(how);
        self.has_ended = true;
    }

    fn into_text(mut self) -> String {
        if self.plain > 0 {
            self.events.push(count(self.plain));
        }
        self.events.join(", ")
    }
}

fn count(bytes: u64) -> String {
    if bytes == 1 { "1 byte".to_owned() } else { format!("{bytes} bytes") }
}

/// Lets both ends act at once.
pub fn both(first: impl FnOnce(), second: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let second = scope.spawn(second);
        first();
        second.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

fn is_at_mark(stream: &TcpStream) -> bool {
    ask(stream, SIOCATMARK) != 0
}

/// What SIOCOUTQ tells.
fn unsent_bytes(stream: &TcpStream) -> u64 {
    ask(stream, libc::TIOCOUTQ) as u64
}

/// What SIOCINQ tells.
fn unread_bytes(stream: &TcpStream) -> u64 {
    ask(stream, libc::FIONREAD) as u64
}

fn ask(stream: &TcpStream, request: libc::Ioctl) -> libc::c_int {
    // A socket that was reset has nothing in either queue.
    int_ioctl(stream, request).unwrap_or(0)
}
