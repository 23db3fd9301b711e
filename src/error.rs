//! Every way `nsplice` can fail to start or to finish, with its wording and its exit status.
//!
//! A failure is one sentence that names the option, the object and the likely cause, and one
//! [`Kind`], which decides the exit status. Nothing else in the program chooses a status.

use std::fmt;

use nix::errno::Errno;

/// What went wrong, coarse enough to be an exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Options that cannot be combined.
    Mix = 1,
    /// The command line cannot be parsed.
    Usage = 2,
    /// A network namespace cannot be opened or entered, or is gone (`--netns-gone exit`).
    Netns = 3,
    /// A socket or another file descriptor cannot be made, bound or used.
    Socket = 4,
    /// The kernel refuses something the program needs: io_uring, a process, memory, a CPU.
    Kernel = 5,
    /// The only connection (`-S`, `-C`) failed.
    Connection = 6,
    /// One of the two processes ended without having been asked to.
    Process = 7,
    /// Connections were cut, when `--drain-timeout` was over or by a second signal. Without that
    /// option they are cut by the first, as ordered.
    Cut = 8,
}

impl Kind {
    /// All kinds, in the order of their exit statuses.
    pub const ALL: [Kind; 8] = [
        Kind::Mix,
        Kind::Usage,
        Kind::Netns,
        Kind::Socket,
        Kind::Kernel,
        Kind::Connection,
        Kind::Process,
        Kind::Cut,
    ];

    /// The exit status of a process that ends for this reason.
    pub fn status(self) -> u8 {
        self as u8
    }

    /// The kind with this exit status, if there is one.
    pub fn from_status(status: i32) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| i32::from(kind.status()) == status)
    }

    /// One line for the EXIT STATUS tables of the help and the man page.
    pub fn describe(self) -> &'static str {
        match self {
            Kind::Mix => "options that cannot be combined",
            Kind::Usage => "the command line cannot be parsed",
            Kind::Netns => "a network namespace cannot be opened or entered, or is gone",
            Kind::Socket => "a socket or file descriptor cannot be bound or used",
            Kind::Kernel => "the kernel refuses io_uring, a process, memory or a CPU",
            Kind::Connection => "the only connection (-S or -C) failed",
            Kind::Process => "one of the two processes died",
            Kind::Cut => {
                "with --drain-timeout: connections were cut after it or by a second signal"
            }
        }
    }
}

/// A failure: its [`Kind`] and the sentence a person reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    kind: Kind,
    text: String,
}

/// The program's result type.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A failure of `kind` described by `text`, a sentence without a final newline.
    pub fn new(kind: Kind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into() }
    }

    /// A failure of a system call: `what` failed with `errno`, most likely because of `cause`
    /// (left out when empty).
    pub fn system(kind: Kind, what: impl fmt::Display, errno: Errno, cause: &str) -> Self {
        let separator = if cause.is_empty() { "" } else { "; " };
        Self::new(kind, format!("{what}: {errno:?}: {}{separator}{cause}", errno.desc()))
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_the_documented_numbers() {
        let statuses: Vec<u8> = Kind::ALL.iter().map(|kind| kind.status()).collect();
        assert_eq!(statuses, [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(Kind::from_status(3), Some(Kind::Netns));
        assert_eq!(Kind::from_status(0), None);
    }

    #[test]
    fn a_system_failure_reads_as_one_sentence() {
        let error = Error::system(Kind::Socket, "-l 1.2.3.4:5: cannot bind", Errno::EADDRINUSE, "");
        assert_eq!(
            error.to_string(),
            "-l 1.2.3.4:5: cannot bind: EADDRINUSE: Address already in use"
        );
    }
}
