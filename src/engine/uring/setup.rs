//! Setting up a ring, and why that may be refused.

use std::{fmt, fs, io};

use io_uring::{IoUring, Probe, opcode};
use nix::errno::Errno;
use nix::libc;

use crate::error::{Error, Kind};

/// Requests that can be collected before they must be handed to the kernel.
pub(super) const SQ_ENTRIES: u32 = 1024;

/// Completions that can wait to be read. Past it the kernel keeps them itself (NODROP).
pub(super) const CQ_ENTRIES: u32 = 8192;

/// All that is ever asked for.
const OPCODES: [u8; 8] = [
    opcode::Accept::CODE,
    opcode::Connect::CODE,
    opcode::Recv::CODE,
    opcode::Send::CODE,
    opcode::PollAdd::CODE,
    opcode::Timeout::CODE,
    opcode::AsyncCancel2::CODE,
    opcode::Close::CODE,
];

/// A ring for the calling thread.
pub(super) fn build_ring(entries: u32) -> io::Result<IoUring> {
    IoUring::builder()
        // One thread submits and reaps, so the kernel takes no lock for others' sake ...
        .setup_single_issuer()
        // ... and runs its deferred work when the thread asks for it, not by interrupting it.
        .setup_defer_taskrun()
        // It can see in the ring that there is some (`Uring::must_enter`).
        .setup_taskrun_flag()
        // A failed entry does not hold up those behind it.
        .setup_submit_all()
        .setup_cqsize(entries * (CQ_ENTRIES / SQ_ENTRIES))
        .build(entries)
}

/// Whether this process may use rings, and whether they can do all that is asked of them. Each of
/// the three system calls is tried: a seccomp filter may forbid any.
///
/// # Errors
/// Why not.
pub fn probe() -> Result<(), Refusal> {
    let ring = build_ring(1).map_err(Refusal::to("set up a ring"))?;
    let mut known = Probe::new();
    ring.submitter().register_probe(&mut known).map_err(Refusal::to("ask what a ring can do"))?;
    if OPCODES.iter().any(|&opcode| !known.is_supported(opcode)) {
        return Err(Refusal { what: "do all that is needed", errno: Errno::EINVAL });
    }
    ring.submit().map(drop).map_err(Refusal::to("use a ring"))
}

/// The kernel does not do something with a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    what: &'static str,
    errno: Errno,
}

impl Refusal {
    /// Makes the refusal to do `what` of a failure.
    pub(super) fn to(what: &'static str) -> impl Fn(io::Error) -> Refusal {
        move |error| Refusal { what, errno: errno_of(error) }
    }

    /// Whether it is for ever: io_uring is not there, or not allowed. Else it is for want of
    /// something, and another time it may not be.
    pub fn is_lasting(&self) -> bool {
        matches!(self.errno, Errno::ENOSYS | Errno::EPERM | Errno::EACCES | Errno::EINVAL)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Error::from(*self).fmt(f)
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Error {
        let Refusal { what, errno } = refusal;
        let cause = cause(errno, &Host::ask());
        Error::system(Kind::Kernel, format!("io_uring: cannot {what}"), errno, &cause)
    }
}

/// What of the host decides whether a process may use io_uring.
struct Host {
    /// The sysctl `kernel.io_uring_disabled`, where there is one.
    disabled: Option<String>,
    /// A seccomp filter is in force.
    is_filtered: bool,
    /// The kernel's.
    release: String,
}

impl Host {
    fn ask() -> Self {
        let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok();
        let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            disabled: disabled.map(|value| value.trim().to_owned()),
            is_filtered: status.lines().any(|line| line == "Seccomp:\t2"),
            release: release.trim().to_owned(),
        }
    }
}

/// The likely cause of the refusal with `errno`.
fn cause(errno: Errno, host: &Host) -> String {
    let Host { disabled, is_filtered, release } = host;
    let disabled = disabled.as_deref().filter(|value| *value != "0");
    match errno {
        Errno::EPERM | Errno::EACCES => match (disabled, is_filtered) {
            (Some(value), false) => format!("sysctl kernel.io_uring_disabled is {value}"),
            (Some(value), true) => {
                format!("sysctl kernel.io_uring_disabled is {value}, and there is a seccomp filter")
            }
            (None, true) => "a seccomp filter forbids it to this process".to_owned(),
            (None, false) => "a security policy forbids it to this process".to_owned(),
        },
        Errno::ENOSYS if *is_filtered => {
            format!("a seccomp filter hides it, or this kernel, {release}, has none")
        }
        Errno::ENOSYS => format!("this kernel, {release}, has none"),
        Errno::EINVAL => format!("this kernel, {release}, is older than 6.1"),
        Errno::ENOMEM => {
            "not enough memory, or RLIMIT_MEMLOCK is too low for so many --workers".to_owned()
        }
        Errno::EMFILE => "RLIMIT_NOFILE is too low".to_owned(),
        _ => String::new(),
    }
}

/// The kernel reports a failure as a negative errno.
pub(super) fn decode_result(result: i32) -> Result<u32, Errno> {
    u32::try_from(result).map_err(|_| Errno::from_raw(-result))
}

pub(super) fn errno_of(error: io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_negative_result_is_an_errno() {
        assert_eq!(decode_result(-22), Err(Errno::EINVAL));
        assert_eq!(decode_result(-104), Err(Errno::ECONNRESET));
        assert_eq!(decode_result(0), Ok(0));
        assert_eq!(decode_result(16384), Ok(16384));
    }

    #[test]
    fn the_cause_is_the_one_the_host_shows() {
        let cause = |errno, disabled: &str, is_filtered| {
            let disabled = (!disabled.is_empty()).then(|| disabled.to_owned());
            cause(errno, &Host { disabled, is_filtered, release: "5.15.0-1".to_owned() })
        };
        for (errno, disabled, is_filtered, wanted) in [
            (Errno::EPERM, "2", false, "sysctl kernel.io_uring_disabled is 2"),
            (
                Errno::EPERM,
                "1",
                true,
                "sysctl kernel.io_uring_disabled is 1, and there is a seccomp filter",
            ),
            (Errno::EPERM, "0", true, "a seccomp filter forbids it to this process"),
            (Errno::EPERM, "", true, "a seccomp filter forbids it to this process"),
            (Errno::EACCES, "0", false, "a security policy forbids it to this process"),
            (Errno::ENOSYS, "", false, "this kernel, 5.15.0-1, has none"),
            (
                Errno::ENOSYS,
                "0",
                true,
                "a seccomp filter hides it, or this kernel, 5.15.0-1, has none",
            ),
            (Errno::EINVAL, "", true, "this kernel, 5.15.0-1, is older than 6.1"),
        ] {
            assert_eq!(cause(errno, disabled, is_filtered), wanted, "{errno:?}");
        }
    }

    #[test]
    fn a_want_of_something_does_not_last() {
        let is_lasting = |errno| Refusal { what: "", errno }.is_lasting();
        for errno in [Errno::ENOSYS, Errno::EPERM, Errno::EACCES, Errno::EINVAL] {
            assert!(is_lasting(errno), "{errno:?}");
        }
        for errno in [Errno::ENOMEM, Errno::EMFILE, Errno::ENFILE, Errno::EAGAIN] {
            assert!(!is_lasting(errno), "{errno:?}");
        }
    }
}
