//! Namespaces and users.

use std::net::{SocketAddr, TcpListener, TcpStream};

use nix::errno::Errno;
use nix::unistd::{Gid, Uid, setgid, setuid};

use super::int_ioctl;
use crate::support::{Netns, namespaces};

/// Makes the process an ordinary user's, one that has nothing else here. For processes of a test's
/// own.
pub(super) fn become_nobody(id: u32) -> Result<(), Errno> {
    setgid(Gid::from_raw(id))?;
    setuid(Uid::from_raw(id))
}

fn reaches(address: SocketAddr) -> bool {
    TcpStream::connect(address).is_ok()
}

#[test]
fn a_socket_stays_in_the_namespace_it_was_made_in() {
    namespaces!(inside);
    let listener = inside.enter(|| TcpListener::bind("127.0.0.1:0").unwrap());
    let address = listener.local_addr().unwrap();
    let reached = inside.enter(|| reaches(address));
    assert!(reached, "a listener that was handed over no longer listens where it was bound");
    let (accepted, _) = listener.accept().unwrap();
    assert_eq!(accepted.local_addr().unwrap(), address, "an accepted socket is somewhere else");
}

#[test]
fn a_thread_enters_a_namespace_alone_and_those_it_starts_follow() {
    namespaces!(inside);
    let own = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    let before = own();
    let (entered, child) = inside.enter(|| (own(), std::thread::spawn(own).join().unwrap()));
    assert_ne!(entered, before);
    assert_eq!(entered, child, "workers are not in the connect side's namespace");
    assert_eq!(own(), before, "setns is not for one thread; nsplice's processes have one then");
}

#[test]
fn a_namespace_file_tells_its_kind() {
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    namespaces!(inside);
    let kind = |file: &std::fs::File| {
        use std::os::fd::AsRawFd;
        // SAFETY: the request has no argument.
        Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) })
    };
    let open = |path: &str| std::fs::File::open(path).unwrap();
    let netns = std::fs::File::open(Netns::path(&inside)).unwrap();
    assert_eq!(kind(&netns), Ok(libc::CLONE_NEWNET), "no namespace is accepted");
    assert_eq!(kind(&open("/proc/self/ns/uts")), Ok(libc::CLONE_NEWUTS));
    assert_eq!(kind(&open("/dev/null")), Err(Errno::ENOTTY), "-f and -t take any file");
    assert!(int_ioctl(&netns, super::SIOCATMARK).is_err());
}
