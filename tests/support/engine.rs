//! Which engine the program under test comes to, and how: by its own choice, because it is told,
//! or because a seccomp filter, as containers have, leaves it no other.

use std::io;

use nix::errno::Errno;

/// What `NSPLICE_TEST_ENGINE` asks for, for every program that is not told its engine by the test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Not set: what the program chooses.
    Any,
    /// `uring` or `epoll`: what it is told.
    Told(&'static str),
    /// `eperm` or `enosys`: what it falls back to when that is the answer to io_uring_setup(2).
    Refused(Errno),
}

impl Wanted {
    pub fn from_env() -> Self {
        match std::env::var("NSPLICE_TEST_ENGINE").as_deref() {
            Err(_) | Ok("") => Self::Any,
            Ok("uring") => Self::Told("uring"),
            Ok("epoll") => Self::Told("epoll"),
            Ok("eperm") => Self::Refused(Errno::EPERM),
            Ok("enosys") => Self::Refused(Errno::ENOSYS),
            Ok(other) => panic!("NSPLICE_TEST_ENGINE={other}: not uring, epoll, eperm or enosys"),
        }
    }

    /// What the program must call its engine in the end; `None`: it may be any.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Self::Any => None,
            Self::Told(name) => Some(name),
            Self::Refused(_) => Some("epoll"),
        }
    }
}

/// The end of the line that says that io_uring is not to be had.
const FALLBACK: &str = "; using epoll\n";

/// What a program has reported apart from that line, which it reports once.
pub fn without_fallback(stderr: &str) -> String {
    let mut lines: Vec<_> = stderr.split_inclusive('\n').collect();
    if let Some(index) = lines.iter().position(|line| line.ends_with(FALLBACK)) {
        lines.remove(index);
    }
    lines.concat()
}

/// Has the kernel answer the system call `number` with `errno` from now on, in this process and
/// all it becomes. For between fork and exec: it allocates nothing.
pub fn answer(number: libc::c_long, errno: Errno) -> io::Result<()> {
    let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let (load, compare) = (libc::BPF_LD | libc::BPF_W, libc::BPF_JMP | libc::BPF_JEQ);
    let mut program = [
        // The number is the first field of `seccomp_data`. Those of io_uring's calls are the same
        // on every architecture.
        step(load | libc::BPF_ABS, 0, 0, 0),
        step(compare | libc::BPF_K, 0, 1, number as u32),
        step(libc::BPF_RET, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        step(libc::BPF_RET, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the kernel copies the program, which lives until the calls return.
    let result = unsafe {
        match libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) {
            0 => libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter),
            failed => failed,
        }
    };
    Errno::result(result).map(drop).map_err(Into::into)
}
