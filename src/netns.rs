//! Network namespaces: opening them as the user named them, and entering them.
//!
//! The only caller of setns(2).

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open as open_file};
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::Mode;

use crate::config::{Netns, NetnsSource};
use crate::error::{Error, Kind, Result};
use crate::inherited::Inherited;

/// Where `ip netns add` keeps its names.
const NAMES: &str = "/run/netns";

/// An open network namespace, and what to call it in messages.
#[derive(Debug)]
pub struct OpenNetns {
    fd: OwnedFd,
    name: String,
}

/// Opens a namespace, in the mount namespace the program was started in.
pub fn open(netns: &Netns, inherited: &mut Inherited) -> Result<OpenNetns> {
    let option = netns.option;
    let (fd, name) = match &netns.source {
        NetnsSource::Fd(fd) => (inherited.take(option, *fd)?, format!("{option} {fd}")),
        NetnsSource::Pid(pid) => {
            let name = format!("{option} pid:{pid}");
            let path = PathBuf::from(format!("/proc/{pid}/ns/net"));
            (open_path(&path).map_err(|errno| cannot_open(&name, errno, "process"))?, name)
        }
        NetnsSource::Path(path) => {
            let name = format!("{option} {}", path.display());
            (open_named(path).map_err(|errno| cannot_open(&name, errno, "file"))?, name)
        }
    };
    match crate::sys::is_netns(&fd) {
        Ok(true) => Ok(OpenNetns { fd, name }),
        _ => Err(Error::new(
            Kind::Netns,
            format!("{name}: not a network namespace; give a file like /proc/PID/ns/net"),
        )),
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
        let what = format!("{}: cannot enter the namespace", netns.name);
        Error::system(Kind::Netns, what, errno, cause)
    })
}

/// A file, or else a name as `ip netns` keeps them.
fn open_named(path: &Path) -> std::result::Result<OwnedFd, Errno> {
    match open_path(path) {
        Err(Errno::ENOENT) if path.components().count() == 1 => {
            open_path(&Path::new(NAMES).join(path))
        }
        result => result,
    }
}

fn open_path(path: &Path) -> std::result::Result<OwnedFd, Errno> {
    // O_NONBLOCK: a FIFO given by mistake is refused, not waited for.
    open_file(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK, Mode::empty())
}

fn cannot_open(name: &str, errno: Errno, what: &str) -> Error {
    let cause = match errno {
        Errno::ENOENT if what == "process" => "there is no such process".to_owned(),
        Errno::ENOENT => format!("there is no such file, and no such name in {NAMES}"),
        Errno::EACCES | Errno::EPERM => "opening it needs more privilege".to_owned(),
        _ => String::new(),
    };
    Error::system(Kind::Netns, format!("{name}: cannot open the namespace"), errno, &cause)
}
