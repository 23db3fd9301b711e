//! System calls with a number in or out, which nix does not have for every number.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

/// From `asm-generic/sockios.h`; the crates do not have it.
pub const SIOCATMARK: libc::Ioctl = 0x8905;

/// What ioctl(2) writes for one of the requests that write an int, such as FIONREAD.
pub fn int_ioctl(fd: &impl AsFd, request: libc::Ioctl) -> nix::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    // SAFETY: each request asked for here writes one int, to a variable that outlives the call.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, &raw mut value) };
    Errno::result(result).map(|_| value)
}

/// setsockopt(2) with an int.
pub fn set_option(
    socket: &impl AsFd,
    level: i32,
    name: i32,
    value: libc::c_int,
) -> nix::Result<()> {
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    let (fd, place) = (socket.as_fd().as_raw_fd(), (&raw const value).cast());
    // SAFETY: the value lives until the call returns, and its length is its own.
    Errno::result(unsafe { libc::setsockopt(fd, level, name, place, length) }).map(drop)
}

/// Segments with data that have arrived; from `linux/tcp.h`, whose later members libc lacks.
pub fn data_segments_in(socket: &impl AsFd) -> u32 {
    const INDEX: usize = 152 / size_of::<u32>();
    let mut info = [0u32; INDEX + 1];
    let mut length = size_of_val(&info) as libc::socklen_t;
    let (fd, place) = (socket.as_fd().as_raw_fd(), info.as_mut_ptr().cast());
    // SAFETY: the kernel writes no more than `length` bytes, which `info` has.
    let result =
        unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, place, &raw mut length) };
    assert_eq!((result, length as usize), (0, size_of_val(&info)));
    info[INDEX]
}
