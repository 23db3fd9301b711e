//! A ring as nsplice sets it up, with single steps.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Instant;

use io_uring::types::{BufRingEntry, Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::support::PATIENCE;

pub const GETEVENTS: u32 = 1 << 0;
pub const EXT_ARG: u32 = 1 << 3;

pub struct Ring {
    // Dropped in this order: the ring before the buffers it receives into.
    ring: IoUring,
    buffers: Option<Buffers>,
    inbox: VecDeque<Done>,
}

/// A completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    pub token: u64,
    pub result: Result<u32, Errno>,
    pub flags: u32,
}

impl Done {
    /// Whether the request goes on.
    pub fn is_armed(&self) -> bool {
        cqueue::more(self.flags)
    }

    pub fn buffer(&self) -> Option<u16> {
        cqueue::buffer_select(self.flags)
    }
}

impl Ring {
    pub fn new() -> Self {
        Self::with_entries(64, 256)
    }

    pub fn with_entries(submissions: u32, completions: u32) -> Self {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_submit_all()
            .setup_cqsize(completions)
            .build(submissions)
            .expect("nsplice cannot set up its rings here, so it cannot run");
        Self { ring, buffers: None, inbox: VecDeque::new() }
    }

    /// With `count` buffers for [`Ring::recv`].
    pub fn with_buffers(count: u16) -> Self {
        let mut ring = Self::new();
        let buffers = Buffers::new();
        // SAFETY: the entries have the given number, and are unmapped after the ring is gone.
        let registered = unsafe {
            let address = buffers.entries.as_ptr() as u64;
            ring.ring.submitter().register_buf_ring_with_flags(address, ENTRIES, 0, 0)
        };
        registered.expect("nsplice cannot register its buffers here, so it cannot run");
        ring.buffers = Some(buffers);
        (0..count).for_each(|id| ring.provide(id));
        ring
    }

    /// Gives a buffer to the kernel.
    pub fn provide(&mut self, id: u16) {
        self.buffers.as_mut().unwrap().provide(id);
    }

    pub fn io_uring(&mut self) -> &mut IoUring {
        &mut self.ring
    }

    /// Hands a request to the kernel, which begins it.
    #[track_caller]
    pub fn start(&mut self, token: u64, entry: squeue::Entry) {
        self.push(token, entry);
        self.ring.submit().unwrap();
    }

    /// Puts a request into the queue only.
    pub fn push(&mut self, token: u64, entry: squeue::Entry) {
        // SAFETY: the tests keep what their requests point to until those have completed.
        unsafe { self.ring.submission().push(&entry.user_data(token)).unwrap() };
    }

    /// The completions that there are, without waiting.
    pub fn done(&mut self) -> Vec<Done> {
        self.enter(0, None).unwrap();
        self.inbox.drain(..).collect()
    }

    /// The next completion.
    #[track_caller]
    pub fn next(&mut self) -> Done {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(done) = self.inbox.pop_front() {
                return done;
            }
            assert!(Instant::now() < deadline, "nothing completes within {PATIENCE:?}");
            let _ = self.enter(1, Some(Timespec::from(PATIENCE)));
        }
    }

    /// The next completion must be that of `token`.
    #[track_caller]
    pub fn next_of(&mut self, token: u64) -> Done {
        let done = self.next();
        assert_eq!(done.token, token, "another request completes: {done:?}");
        done
    }

    /// Submits, waits for `count` completions, at most for `time`, and collects.
    pub fn enter(&mut self, count: u32, time: Option<Timespec>) -> Result<(), Errno> {
        let to_submit = self.ring.submission().len() as u32;
        let submitter = self.ring.submitter();
        // SAFETY: the argument, where there is one, lives until the call returns.
        let result = unsafe {
            match time {
                None => submitter.enter::<libc::sigset_t>(to_submit, count, GETEVENTS, None),
                Some(time) => {
                    let args = SubmitArgs::new().timespec(&time);
                    submitter.enter(to_submit, count, GETEVENTS | EXT_ARG, Some(&args))
                }
            }
        };
        self.inbox.extend(self.ring.completion().map(|entry| Done {
            token: entry.user_data(),
            result: u32::try_from(entry.result()).map_err(|_| Errno::from_raw(-entry.result())),
            flags: entry.flags(),
        }));
        result.map(drop).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap()))
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring keeps it open as long as it lives.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

pub fn fd(fd: &impl AsFd) -> Fd {
    Fd(fd.as_fd().as_raw_fd())
}

pub fn poll_once(socket: &impl AsFd, events: i16) -> squeue::Entry {
    opcode::PollAdd::new(fd(socket), events as u32).build()
}

pub fn poll_on(socket: &impl AsFd, events: i16) -> squeue::Entry {
    opcode::PollAdd::new(fd(socket), events as u32).multi(true).build()
}

pub fn accept(listener: &impl AsFd) -> squeue::Entry {
    opcode::Accept::new(fd(listener), std::ptr::null_mut(), std::ptr::null_mut())
        .flags(libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC)
        .build()
}

/// A receive into a buffer of the kernel's choice.
pub fn recv(socket: &impl AsFd, flags: i32) -> squeue::Entry {
    opcode::Recv::new(fd(socket), std::ptr::null_mut(), BUFFER_BYTES)
        .buf_group(0)
        .flags(flags)
        .build()
        .flags(squeue::Flags::BUFFER_SELECT)
}

pub const BUFFER_BYTES: u32 = 16;
const ENTRIES: u16 = 8;

/// Buffers, and the ring of entries that gives them to the kernel.
struct Buffers {
    entries: NonNull<libc::c_void>,
    memory: Box<[u8]>,
    tail: u16,
}

impl Buffers {
    const BYTES: NonZeroUsize =
        NonZeroUsize::new(ENTRIES as usize * size_of::<BufRingEntry>()).unwrap();

    fn new() -> Self {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let entries =
            unsafe { mmap_anonymous(None, Self::BYTES, protection, MapFlags::MAP_PRIVATE) };
        let memory = vec![0; BUFFER_BYTES as usize * usize::from(ENTRIES)].into();
        Self { entries: entries.unwrap(), memory, tail: 0 }
    }

    fn provide(&mut self, id: u16) {
        let first = self.entries.as_ptr().cast::<BufRingEntry>();
        let address = &raw const self.memory[usize::from(id) * BUFFER_BYTES as usize];
        // SAFETY: the index is inside the mapping; the kernel reads an entry after the tail has
        // passed it, and this thread alone writes entries and the tail.
        unsafe {
            let entry = &mut *first.add(usize::from(self.tail % ENTRIES));
            entry.set_addr(address as u64);
            entry.set_len(BUFFER_BYTES);
            entry.set_bid(id);
            self.tail = self.tail.wrapping_add(1);
            let tail = BufRingEntry::tail(first).cast::<AtomicU16>();
            (*tail).store(self.tail, Ordering::Release);
        }
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and the ring that used it is gone.
        let _ = unsafe { munmap(self.entries, Self::BYTES.get()) };
    }
}
