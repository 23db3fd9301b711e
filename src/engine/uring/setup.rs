//! Setting up a ring, and why that may be refused.

use std::io;

use io_uring::IoUring;
use nix::errno::Errno;
use nix::libc;

use crate::error::{Error, Kind};

/// Requests that can be collected before they must be handed to the kernel.
const SQ_ENTRIES: u32 = 1024;

/// Completions that can wait to be read. Past it the kernel keeps them itself (NODROP).
pub(super) const CQ_ENTRIES: u32 = 8192;

/// A ring for the calling thread.
pub(super) fn build_ring() -> io::Result<IoUring> {
    IoUring::builder()
        // One thread submits and reaps, so the kernel takes no lock for others' sake ...
        .setup_single_issuer()
        // ... and runs its deferred work when the thread asks for it, not by interrupting it.
        .setup_defer_taskrun()
        // It can see in the ring that there is some (`Uring::spin`).
        .setup_taskrun_flag()
        // A failed entry does not hold up those behind it.
        .setup_submit_all()
        .setup_cqsize(CQ_ENTRIES)
        .build(SQ_ENTRIES)
}

/// The sentence for a kernel that refuses to do `what`.
pub(super) fn refused(what: &str, error: &io::Error) -> Error {
    let cause = match errno_of_ref(error) {
        Errno::ENOSYS => "this kernel has no io_uring, or a seccomp filter hides it",
        Errno::EPERM => {
            "sysctl kernel.io_uring_disabled or a seccomp filter forbids it to this process"
        }
        Errno::EINVAL => "this kernel is older than 6.1",
        Errno::ENOMEM => "not enough memory, or RLIMIT_MEMLOCK is too low for so many --workers",
        Errno::EMFILE => "RLIMIT_NOFILE is too low",
        _ => "",
    };
    Error::system(Kind::Kernel, format!("io_uring: cannot {what}"), errno_of_ref(error), cause)
}

pub(super) fn errno_of(error: io::Error) -> Errno {
    errno_of_ref(&error)
}

fn errno_of_ref(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}
