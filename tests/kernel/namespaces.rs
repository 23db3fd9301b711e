//! Namespaces and users.

use std::fs::File;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::unistd::{Gid, Uid, setgid, setuid};

use super::int_ioctl;
use crate::support::{Netns, TempDir, namespaces, skip};

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

/// The number of the namespace a socket is in, as takeover.rs compares it.
fn cookie(socket: &impl AsRawFd) -> u64 {
    let mut cookie = 0_u64;
    let mut length = size_of_val(&cookie) as libc::socklen_t;
    let (fd, name) = (socket.as_raw_fd(), libc::SO_NETNS_COOKIE);
    let value = (&raw mut cookie).cast();
    // SAFETY: the option is eight bytes, for which there is room until the call returns.
    let result = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, name, value, &raw mut length) };
    Errno::result(result).expect("no SO_NETNS_COOKIE: --takeover cannot tell namespaces apart");
    cookie
}

#[test]
fn a_socket_tells_which_namespace_it_is_in() {
    namespaces!(inside, other);
    let bind = || TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = inside.enter(bind);
    assert_eq!(cookie(&socket), cookie(&inside.enter(bind)));
    assert_ne!(cookie(&socket), cookie(&other.enter(bind)), "--takeover accepts any namespace");
}

#[test]
fn a_mount_is_an_event_of_the_mount_table_and_not_of_the_directory() {
    namespaces!(inside);
    let names = TempDir::new();
    let file = names.path().join("name");
    std::fs::write(&file, "").unwrap();
    let mounts = File::open("/proc/self/mountinfo").unwrap();
    let flags = InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC;
    let directory = Inotify::init(flags).unwrap();
    directory.add_watch(names.path(), AddWatchFlags::IN_ALL_EVENTS).unwrap();
    let mount = |netns: &Netns| {
        let [from, to] = [netns.path(), file.clone()].map(|path| {
            std::ffi::CString::new(path.into_os_string().into_encoded_bytes()).unwrap()
        });
        let none = std::ptr::null();
        // SAFETY: the paths live until the call returns, and a bind mount has no data.
        let result =
            unsafe { libc::mount(from.as_ptr(), to.as_ptr(), none, libc::MS_BIND, none.cast()) };
        (Errno::result(result), to)
    };
    let (mounted, path) = mount(&inside);
    if let Err(errno) = mounted {
        skip!("nothing can be mounted: {errno}");
    }
    let mut fds = [PollFd::new(mounts.as_fd(), PollFlags::POLLPRI)];
    let told = poll(&mut fds, PollTimeout::ZERO).unwrap();
    let events = directory.read_events().map_or(0, |events| events.len());
    // SAFETY: the path lives until the call returns.
    unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    assert_eq!(told, 1, "--wait-netns notices a name of ip netns by the clock alone");
    assert_eq!(events, 0, "inotify tells of mounts: the mount table need not be watched");
}
