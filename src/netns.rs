//! Network namespaces: opening them as the user named them, and entering them.
//!
//! The only caller of setns(2).

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open as open_file};
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::{Mode, fstat};

use crate::config::{Netns, NetnsSource};
use crate::error::{Error, Kind, Result};
use crate::inherited::Inherited;

mod watch;

pub use watch::{Follower, wait};

/// Where `ip netns add` keeps its names.
const NAMES: &str = "/run/netns";

/// An open network namespace, and how it was named.
#[derive(Debug)]
pub struct OpenNetns {
    fd: OwnedFd,
    netns: Netns,
}

impl OpenNetns {
    /// Whether both are open on the same namespace.
    fn is_same(&self, other: &OpenNetns) -> bool {
        match (fstat(&self.fd), fstat(&other.fd)) {
            (Ok(a), Ok(b)) => (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino),
            _ => false,
        }
    }
}

/// Opens a namespace, in the mount namespace the program was started in.
pub fn open(netns: &Netns, inherited: &mut Inherited) -> Result<OpenNetns> {
    match netns.source {
        NetnsSource::Fd(fd) => {
            let fd = inherited.take(netns.option, fd)?;
            let fd = only_netns(fd).map_err(|errno| cannot_open(netns, errno))?;
            Ok(OpenNetns { fd, netns: netns.clone() })
        }
        NetnsSource::Path(_) | NetnsSource::Pid(_) => {
            find(netns).map_err(|errno| cannot_open(netns, errno))
        }
    }
}

/// Moves the calling thread, and all it starts later, into the namespace.
pub fn enter(netns: &OpenNetns) -> Result<()> {
    setns(&netns.fd, CloneFlags::CLONE_NEWNET).map_err(|errno| {
        let cause = match errno {
            Errno::EPERM => {
                "it needs CAP_SYS_ADMIN, here and in the user namespace that owns the network \
                 namespace"
            }
            _ => "",
        };
        let what = format!("{}: cannot enter the namespace", netns.netns);
        Error::system(Kind::Netns, what, errno, cause)
    })
}

/// Opens what a name stands for now. ENOTTY: it is a file, but no network namespace.
fn find(netns: &Netns) -> std::result::Result<OpenNetns, Errno> {
    let mut found = Err(Errno::ENOENT);
    for place in places(&netns.source) {
        // O_NONBLOCK: a FIFO given by mistake is refused, not waited for.
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        found = open_file(&place, flags, Mode::empty());
        if !matches!(found, Err(Errno::ENOENT)) {
            break;
        }
    }
    Ok(OpenNetns { fd: only_netns(found?)?, netns: netns.clone() })
}

/// Where a name may be, in this order: a file, or else a name as `ip netns` keeps them.
fn places(source: &NetnsSource) -> Vec<PathBuf> {
    match source {
        NetnsSource::Pid(pid) => vec![format!("/proc/{pid}/ns/net").into()],
        NetnsSource::Path(path) if path.components().count() == 1 => {
            vec![path.clone(), Path::new(NAMES).join(path)]
        }
        NetnsSource::Path(path) => vec![path.clone()],
        NetnsSource::Fd(_) => Vec::new(),
    }
}

fn only_netns(fd: OwnedFd) -> std::result::Result<OwnedFd, Errno> {
    if crate::sys::is_netns(&fd) == Ok(true) { Ok(fd) } else { Err(Errno::ENOTTY) }
}

fn cannot_open(netns: &Netns, errno: Errno) -> Error {
    let cause = match (errno, &netns.source) {
        (Errno::ENOTTY, _) => {
            let what = "not a network namespace; give a file like /proc/PID/ns/net";
            return Error::new(Kind::Netns, format!("{netns}: {what}"));
        }
        (Errno::ENOENT, NetnsSource::Pid(_)) => "there is no such process".to_owned(),
        (Errno::ENOENT, _) => format!("there is no such file, and no such name in {NAMES}"),
        (Errno::EACCES | Errno::EPERM, _) => "opening it needs more privilege".to_owned(),
        _ => String::new(),
    };
    Error::system(Kind::Netns, format!("{netns}: cannot open the namespace"), errno, &cause)
}
