//! The few system calls `nix` lacks or cannot make safe.

#![allow(unsafe_code)]

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollFlags, EpollOp};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::socket::{MsgFlags, recv};
use nix::sys::stat::Mode;
use nix::unistd::{ForkResult, dup2_stderr, dup2_stdin, dup2_stdout, fork as nix_fork};

/// A copy of the inherited descriptor `fd`, closed on exec. EBADF if `fd` is not open.
pub(crate) fn copy_inherited(fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: the borrow ends with this function; if the number is not open, fcntl says so.
    let inherited = unsafe { BorrowedFd::borrow_raw(fd) };
    let copy = fcntl(inherited, FcntlArg::F_DUPFD_CLOEXEC(libc::STDERR_FILENO + 1))?;
    own(copy)
}

/// Closes the inherited descriptor `fd`, which nobody owns. A standard stream is pointed to
/// /dev/null instead, so that its number does not come to mean something else.
pub(crate) fn close_inherited(fd: RawFd) -> Result<(), Errno> {
    if fd > libc::STDERR_FILENO {
        // SAFETY: the number was checked by `copy_inherited`, and nothing in the program owns it.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
        return Ok(());
    }
    let null = nix::fcntl::open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())?;
    match fd {
        libc::STDIN_FILENO => dup2_stdin(null),
        libc::STDOUT_FILENO => dup2_stdout(null),
        _ => dup2_stderr(null),
    }
}

/// Whether the system has run out of something, and may have it again later.
pub(crate) fn is_shortage(errno: Errno) -> bool {
    matches!(errno, Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM)
}

/// Owns a descriptor that a system call has just returned. EBADF if it is negative.
pub(crate) fn own(fd: RawFd) -> Result<OwnedFd, Errno> {
    if fd < 0 {
        return Err(Errno::EBADF);
    }
    // SAFETY: the caller got the number from the kernel in this moment, so it is the only owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes operations on the socket return instead of waiting. Errors as fcntl(2).
pub(crate) fn set_nonblocking(socket: impl AsFd) -> Result<(), Errno> {
    let flags = fcntl(&socket, FcntlArg::F_GETFL)?;
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
    fcntl(&socket, FcntlArg::F_SETFL(flags)).map(drop)
}

/// Lets `queue` connections wait at a socket, as far as net.core.somaxconn allows; nix knows none
/// longer than 4096. Errors as listen(2).
pub(crate) fn listen(socket: impl AsFd, queue: u32) -> Result<(), Errno> {
    let queue = i32::try_from(queue).unwrap_or(i32::MAX);
    // SAFETY: the call takes two numbers.
    Errno::result(unsafe { libc::listen(socket.as_fd().as_raw_fd(), queue) }).map(drop)
}

/// A descriptor that becomes readable when process `pid`, a child, ends. Errors as pidfd_open(2).
pub(crate) fn pidfd_open(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: the call takes two numbers.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    own(fd as RawFd)
}

/// Whether `fd` is a network namespace. Errors as ioctl(2) NS_GET_NSTYPE: ENOTTY for any file
/// that is no namespace.
pub(crate) fn is_netns(fd: impl AsFd) -> Result<bool, Errno> {
    nix::ioctl_none!(ns_get_nstype, 0xb7, 0x3);
    // SAFETY: the request has no argument.
    let kind = unsafe { ns_get_nstype(fd.as_fd().as_raw_fd())? };
    Ok(kind == libc::CLONE_NEWNET)
}

/// Forks. Errors as fork(2); EBUSY when the process already has several threads.
pub(crate) fn fork() -> Result<ForkResult, Errno> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads > 1 {
        return Err(Errno::EBUSY);
    }
    // SAFETY: there is one thread, so the child's copy of the memory is in a consistent state.
    unsafe { nix_fork() }
}

/// Ends a TCP connection with a reset at once, whoever else has the socket open
/// (tests/kernel/endings.rs). ENOTCONN and the like when there is nothing left to reset.
pub(crate) fn reset(socket: impl AsFd) -> Result<(), Errno> {
    let unspecified =
        libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    let length = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: the address lives until the call returns, and its length is its own.
    let result = unsafe { libc::connect(socket.as_fd().as_raw_fd(), &unspecified, length) };
    Errno::result(result).map(drop)
}

/// epoll_ctl(2) by number: what is reported names no more than `data`, from which the number is
/// known. Errors as epoll_ctl(2).
pub(crate) fn epoll_ctl(
    epoll: &Epoll,
    op: EpollOp,
    fd: RawFd,
    events: EpollFlags,
    data: u64,
) -> Result<(), Errno> {
    let mut event = libc::epoll_event { events: events.bits() as u32, u64: data };
    let epoll = epoll.0.as_raw_fd();
    // SAFETY: the event lives until the call returns, and the rest are numbers.
    Errno::result(unsafe { libc::epoll_ctl(epoll, op as i32, fd, &raw mut event) }).map(drop)
}

/// Takes the failure that waits to be told by the socket. Errors as that, or as getsockopt(2).
pub(crate) fn take_error(socket: RawFd) -> Result<(), Errno> {
    let mut error: libc::c_int = 0;
    socket_option(socket, libc::SO_ERROR, &mut error)?;
    if error == 0 { Ok(()) } else { Err(Errno::from_raw(error)) }
}

/// A number that no other network namespace has than the one the socket is in. Errors as
/// getsockopt(2); ENOPROTOOPT before Linux 5.14.
pub(crate) fn netns_cookie(socket: impl AsFd) -> Result<u64, Errno> {
    let mut cookie: u64 = 0;
    socket_option(socket.as_fd().as_raw_fd(), libc::SO_NETNS_COOKIE, &mut cookie)?;
    Ok(cookie)
}

/// Sets an option that is a number. Errors as setsockopt(2).
pub(crate) fn set_option(
    socket: impl AsFd,
    level: i32,
    name: i32,
    value: libc::c_int,
) -> Result<(), Errno> {
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    let (fd, place) = (socket.as_fd().as_raw_fd(), (&raw const value).cast());
    // SAFETY: the value lives until the call returns, and its length is its own.
    Errno::result(unsafe { libc::setsockopt(fd, level, name, place, length) }).map(drop)
}

/// Whether it is a socket for internet addresses.
pub(crate) fn is_inet(socket: impl AsFd) -> bool {
    let mut family: libc::c_int = 0;
    let asked = socket_option(socket.as_fd().as_raw_fd(), libc::SO_DOMAIN, &mut family);
    asked.is_ok() && [libc::AF_INET, libc::AF_INET6].contains(&family)
}

/// Whether it is a socket of TCP itself: not of MPTCP, nor with a protocol on top, such as kernel
/// TLS, which gives a receive one record.
pub(crate) fn is_plain_tcp(socket: RawFd) -> bool {
    let mut protocol: libc::c_int = 0;
    let asked = socket_option(socket, libc::SO_PROTOCOL, &mut protocol);
    asked.is_ok() && protocol == libc::IPPROTO_TCP && !has_upper_protocol(socket)
}

fn has_upper_protocol(socket: RawFd) -> bool {
    let mut name = [0_u8; 16];
    let mut length = size_of_val(&name) as libc::socklen_t;
    let (level, place) = (libc::IPPROTO_TCP, (&raw mut name).cast());
    // SAFETY: there is room for the length given until the call returns.
    let result = unsafe { libc::getsockopt(socket, level, libc::TCP_ULP, place, &raw mut length) };
    // A kernel that does not know the option has none.
    result == 0 && length > 0
}

/// Throws away what waits in the socket's error queue, which makes it look as if it had failed.
/// Whether there was something.
pub(crate) fn empty_error_queue(socket: impl AsFd) -> bool {
    if !is_inet(&socket) {
        // Others have none, and give their bytes instead (tests/kernel/endings.rs).
        return false;
    }
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let mut had_any = false;
    while recv(socket.as_fd().as_raw_fd(), &mut [0], flags).is_ok() {
        had_any = true;
    }
    had_any
}

/// Whether a TCP connection is over, by its state. Errors as getsockopt(2).
pub(crate) fn is_closed(socket: impl AsFd) -> Result<bool, Errno> {
    const TCP_CLOSE: u8 = 7;
    tcp_info(socket).map(|info| info.tcpi_state == TCP_CLOSE)
}

/// How many clients wait at a TCP socket to be accepted. Errors as getsockopt(2); EOPNOTSUPP for
/// sockets of other kinds.
pub(crate) fn waiting_clients(listener: impl AsFd) -> Result<u32, Errno> {
    tcp_info(listener).map(|info| info.tcpi_unacked)
}

fn tcp_info(socket: impl AsFd) -> Result<libc::tcp_info, Errno> {
    // SAFETY: it consists of numbers, for which zeroes are valid.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    let (fd, level) = (socket.as_fd().as_raw_fd(), libc::IPPROTO_TCP);
    let place = (&raw mut info).cast();
    // SAFETY: there is room for the length given until the call returns.
    Errno::result(unsafe { libc::getsockopt(fd, level, libc::TCP_INFO, place, &raw mut length) })?;
    Ok(info)
}

/// Reads a number of this size, at the level SOL_SOCKET.
fn socket_option<T: Into<i128>>(socket: RawFd, name: i32, value: &mut T) -> Result<(), Errno> {
    let mut length = size_of::<T>() as libc::socklen_t;
    let level = libc::SOL_SOCKET;
    // SAFETY: there is room for the length given until the call returns, and any bytes are a
    // number.
    let result =
        unsafe { libc::getsockopt(socket, level, name, (&raw mut *value).cast(), &raw mut length) };
    Errno::result(result).map(drop)
}

/// From `asm-generic/sockios.h`; the crates do not have it.
const SIOCATMARK: libc::Ioctl = 0x8905;

/// Whether the next byte to be received is urgent. Errors as ioctl(2) SIOCATMARK.
pub(crate) fn is_at_mark(socket: impl AsFd) -> Result<bool, Errno> {
    int_ioctl(socket, SIOCATMARK).map(|at| at != 0)
}

/// Bytes sent that the peer has not acknowledged. Errors as ioctl(2) SIOCOUTQ.
pub(crate) fn unsent(socket: impl AsFd) -> Result<u32, Errno> {
    // SIOCOUTQ has the number of TIOCOUTQ.
    int_ioctl(socket, libc::TIOCOUTQ).map(|bytes| bytes.max(0) as u32)
}

/// Bytes that can be received. Errors as ioctl(2) SIOCINQ.
pub(crate) fn unread(socket: impl AsFd) -> Result<u32, Errno> {
    // SIOCINQ has the number of FIONREAD.
    int_ioctl(socket, libc::FIONREAD).map(|bytes| bytes.max(0) as u32)
}

fn int_ioctl(socket: impl AsFd, request: libc::Ioctl) -> Result<i32, Errno> {
    let mut value: libc::c_int = 0;
    // SAFETY: each request that is used here writes one int, to a variable that outlives them.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), request, &raw mut value) };
    Errno::result(result).map(|_| value)
}

/// A page of counters that the two processes share; made before the fork.
///
/// A worker writes its own counter, the listener reads all: no one waits for anyone. The listener
/// may ask to be told of the next change, by another way.
#[derive(Clone, Debug)]
pub struct SharedCounters {
    counters: &'static [AtomicU32],
    asked: &'static [AtomicU32],
}

impl SharedCounters {
    /// `count` counters, all zero. Errors as mmap(2).
    pub fn new(count: usize) -> Result<Self, Errno> {
        let all = 2 * count;
        let bytes = NonZeroUsize::new(all * size_of::<AtomicU32>()).ok_or(Errno::EINVAL)?;
        // SAFETY: a new mapping of zeroes is a valid array of atomics; it is never unmapped, so
        // it outlives everything.
        let page = unsafe {
            let page = mmap_anonymous(
                None,
                bytes,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
            )?;
            std::slice::from_raw_parts(page.as_ptr().cast::<AtomicU32>(), all)
        };
        let (counters, asked) = page.split_at(count);
        Ok(Self { counters, asked })
    }

    /// Adds `count` to counter `index` (wrapping); true if that is to be told.
    pub fn add(&self, index: usize, count: u32) -> bool {
        self.counters[index].fetch_add(count, Ordering::SeqCst);
        // The other side asks first and then reads: one of the two sees the other.
        self.asked[index].load(Ordering::SeqCst) != 0
            && self.asked[index].swap(0, Ordering::SeqCst) != 0
    }

    /// Reads counter `index`.
    pub fn get(&self, index: usize) -> u32 {
        self.counters[index].load(Ordering::SeqCst)
    }

    /// Asks to be told when counter `index` is changed after this.
    pub fn ask(&self, index: usize) {
        self.asked[index].store(1, Ordering::SeqCst);
    }
}

/// Whether the calling thread, when it is woken, may interrupt one that runs: SCHED_OTHER, or else
/// SCHED_BATCH. Errors as sched_setscheduler(2).
pub(crate) fn set_interrupting(interrupts: bool) -> Result<(), Errno> {
    let policy = if interrupts { libc::SCHED_OTHER } else { libc::SCHED_BATCH };
    let priority = libc::sched_param { sched_priority: 0 };
    // SAFETY: the argument lives until the call returns, which only reads it.
    Errno::result(unsafe { libc::sched_setscheduler(0, policy, &raw const priority) }).map(drop)
}
