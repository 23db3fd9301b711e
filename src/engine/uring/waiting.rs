//! How the engine waits: in the ring, or, when sockets of the set are waited for, with the set; and
//! what it does at once, without either.

#![allow(unsafe_code)]

use std::os::fd::OwnedFd;
use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

use io_uring::cqueue;
use io_uring::types::SubmitArgs;
use nix::errno::Errno;
use nix::libc;

use super::setup::{decode_result, errno_of};
use super::{Uring, timespec};
use crate::engine::{Buffer, Completion, Engine, Outcome, Sleep, Token};
use crate::flow::Op;

/// From the kernel's `io_uring.h`; the crate keeps them to itself.
const ENTER_GETEVENTS: u32 = 1 << 0;
const ENTER_EXT_ARG: u32 = 1 << 3;
const ENTER_NO_IOWAIT: u32 = 1 << 7;

/// Entries that surely run all tasks of a few waits: one runs twenty, a wait is two, and what they
/// bring ends the need for more.
const SETTLING_ENTRIES: usize = 4;

/// Of an entry that takes what has completed. `no_iowait`: the kernel can wait without telling that
/// the CPU waits for a disk.
pub(super) fn enter_flags(no_iowait: bool) -> u32 {
    ENTER_GETEVENTS | if no_iowait { ENTER_NO_IOWAIT } else { 0 }
}

impl Uring {
    /// Takes what has completed. A receive is noted now: the set is read later.
    pub(super) fn take(&mut self) {
        for entry in self.ring.completion() {
            if let token @ Token::Flow { op: Op::Recv(_), .. } = Token::decode(entry.user_data()) {
                let more = cqueue::sock_nonempty(entry.flags());
                self.readiness.received(token, decode_result(entry.result()), Some(more));
            }
            self.inbox.push_back(entry);
        }
    }

    /// One io_uring_enter(2): hands over what is collected, and takes what has completed.
    pub(super) fn enter(&mut self, sleep: Sleep) -> Result<(), Errno> {
        let to_submit = self.ring.submission().len() as u32;
        let submitter = self.ring.submitter();
        let flags = self.enter_flags;
        // SAFETY: the queue holds `to_submit` entries (see `push`), and the argument, where there
        // is one, lives until the call returns.
        let result = unsafe {
            match sleep {
                Sleep::No => submitter.enter::<libc::sigset_t>(to_submit, 0, flags, None),
                Sleep::Forever => submitter.enter::<libc::sigset_t>(to_submit, 1, flags, None),
                Sleep::ForMs(ms) => {
                    let time = timespec(ms);
                    let args = SubmitArgs::new().timespec(&time);
                    submitter.enter(to_submit, 1, flags | ENTER_EXT_ARG, Some(&args))
                }
            }
        };
        if self.ring.completion().overflow() > 0 {
            // The kernel had no memory to keep what there was no room for: a flow would wait for
            // ever for what is lost.
            return Err(Errno::EOVERFLOW);
        }
        self.take();
        match result.map_err(errno_of) {
            // EAGAIN and EBUSY: not all was submitted; what was not is still in the queue.
            Ok(_) | Err(Errno::EINTR | Errno::ETIME | Errno::EAGAIN | Errno::EBUSY) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// How much there is to hand on.
    pub(super) fn told(&self) -> usize {
        self.inbox.len() + self.readiness.news() + self.done.len()
    }

    /// `sleep`, unless there is something to hand on.
    pub(super) fn sleep_unless_told(&self, sleep: Sleep) -> Sleep {
        if self.told() > 0 { Sleep::No } else { sleep }
    }

    /// Whether there is something to hand to the kernel, or to take from it.
    pub(super) fn must_enter(&mut self) -> bool {
        let queue = self.ring.submission();
        !queue.is_empty() || queue.taskrun() || queue.cq_overflow()
    }

    /// Enters the kernel while there is need and nothing to hand on.
    fn settle(&mut self) -> Result<(), Errno> {
        for _ in 0..SETTLING_ENTRIES {
            if !self.must_enter() {
                return Ok(());
            }
            self.enter(Sleep::No)?;
            if self.told() > 0 {
                return Ok(());
            }
        }
        if self.ring.submission().taskrun() {
            // The kernel lowers the flag only when it begins with tasks, and may run one that was
            // added since: then the flag stays raised until there is another. So there is one.
            self.pause(Token::Ignored, 0);
        }
        Ok(())
    }

    /// A disabled bell costs a completion nothing. Only where storing to memory that the kernel
    /// reads, and loading what it has stored, are kept in order on its side, too, is it sure to
    /// be seen that it is enabled again.
    pub(super) fn disable_bell(&mut self) {
        if cfg!(target_arch = "x86_64") {
            self.ring.completion().disable_eventfd();
        }
    }

    pub(super) fn wait_for_ring(&mut self, sleep: Sleep) -> Result<(), Errno> {
        let sleep = self.sleep_unless_told(sleep);
        if sleep != Sleep::No && !self.busy_poll.is_zero() {
            self.enter(Sleep::No)?;
            let until = Instant::now() + self.busy_poll;
            // It calls nothing: the kernel raises a flag in the ring when it has work for the
            // thread to do.
            while self.inbox.is_empty() && !self.must_enter() && Instant::now() < until {
                std::hint::spin_loop();
            }
        }
        self.enter(self.sleep_unless_told(sleep))
    }

    pub(super) fn wait_for_set(&mut self, sleep: Sleep) -> Result<(), Errno> {
        self.settle()?;
        let sleep = self.sleep_unless_told(sleep);
        if sleep == Sleep::No {
            return self.readiness.read(sleep);
        }
        if !self.busy_poll.is_zero() {
            let until = Instant::now() + self.busy_poll;
            while self.told() == 0 && !self.must_enter() && Instant::now() < until {
                self.readiness.read(Sleep::No)?;
            }
        }
        // From now on the bell rings: what has come before is seen by looking.
        self.ring.completion().enable_eventfd();
        fence(Ordering::SeqCst);
        let is_due = self.told() > 0 || self.must_enter();
        let result = self.readiness.read(if is_due { Sleep::No } else { sleep });
        self.disable_bell();
        result?;
        if self.told() == 0 { self.settle() } else { Ok(()) }
    }

    /// Receives now: a call for one of some messages costs less than a request and its share of an
    /// entry. False if that is to be done by a request.
    pub(super) fn receive_at_once(&mut self, token: Token, socket: &OwnedFd) -> bool {
        let Some((result, more)) = self.buffers.receive(socket) else { return false };
        let length = match &result {
            Ok(buffer) => Ok(buffer.as_ref().map_or(0, Buffer::len)),
            Err(errno) => Err(*errno),
        };
        // What a short receive has left was not asked, and a full one says enough.
        self.readiness.received(token, length, None);
        self.done.push_back(Completion { token, outcome: Outcome::Received { result, more } });
        true
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::sync::atomic::AtomicU32;

    use super::*;
    use crate::config::SocketOptions;
    use crate::engine::{Setup, Start};

    /// From the kernel's `io_uring.h`.
    const SQ_TASKRUN: u32 = 1 << 2;
    /// Where `io_uring_params` has the place of the flags in what a ring shares with its program.
    const FLAGS_PLACE: usize = 56;

    /// The flags of a ring, as the kernel writes them.
    fn flags(engine: &Uring) -> &'static AtomicU32 {
        let mut params = [0_u32; 30];
        // SAFETY: this is as large as io_uring_params; the ring that is made to ask where the flags
        // are is closed at the end of the test; the mapping has them and stays for ever.
        unsafe {
            let fd = libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr());
            assert!(fd >= 0);
            libc::close(fd as i32);
            let place = params[FLAGS_PLACE / 4] as usize;
            let (access, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
            let fd = engine.ring.as_raw_fd();
            let start = libc::mmap(std::ptr::null_mut(), 4096, access, shared, fd, 0);
            assert_ne!(start, libc::MAP_FAILED);
            &*start.cast::<u8>().add(place).cast()
        }
    }

    #[test]
    fn a_flag_that_stays_raised_is_lowered() {
        let mut engine = Uring::start(&Setup {
            target: None,
            sockets: SocketOptions::default(),
            pipe_size_bytes: 1 << 20,
            pipes: 1,
            busy_poll_us: 0,
        })
        .expect("a ring");
        flags(&engine).fetch_or(SQ_TASKRUN, Ordering::SeqCst);
        assert!(engine.must_enter());
        for _ in 0..3 {
            engine.wait_for_set(Sleep::ForMs(5)).expect("a wait");
            while engine.completion().is_some() {}
        }
        assert!(!engine.must_enter(), "the worker spins");
    }
}
