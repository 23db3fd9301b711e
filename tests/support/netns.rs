//! Network namespaces of a test, made without the `ip` command.
//!
//! A namespace lives as long as a descriptor of it is open. A fresh one has nothing but a loopback
//! interface, so any port is free in it and nothing joins two of them but what a test puts there.
//! Without root the test process becomes root of its own user namespace before `main`: later it
//! has several threads, and then the kernel does not allow it.

use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::thread::JoinHandle;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::Backlog;

/// A network namespace with its loopback interface up.
#[derive(Clone, Debug)]
pub struct Netns(Arc<File>);

impl Netns {
    pub fn new() -> io::Result<Self> {
        // The thread that leaves the caller's namespace ends here; the open file remains.
        std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            bring_loopback_up()?;
            // The default of some machines (BBR) paces loopback. Reno is always allowed.
            let _ = std::fs::write("/proc/sys/net/ipv4/tcp_congestion_control", "reno");
            Ok(Self(Arc::new(File::open("/proc/thread-self/ns/net")?)))
        })
        .join()
        .expect("the thread that makes a namespace does not panic")
    }

    /// A path that another process can open while this value lives.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }

    /// Runs `inside` in the namespace, on a thread of its own. The sockets it makes stay in the
    /// namespace wherever they are used later.
    pub fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> T {
        let result = std::thread::scope(|scope| scope.spawn(|| self.run(inside)).join());
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// As [`Netns::enter`], without waiting for the end.
    pub fn spawn<T: Send + 'static>(
        &self,
        inside: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let netns = self.clone();
        std::thread::spawn(move || netns.run(inside))
    }

    fn run<T>(&self, inside: impl FnOnce() -> T) -> T {
        setns(&self.0, CloneFlags::CLONE_NEWNET).expect("a namespace made here can be entered");
        inside()
    }

    /// Makes `command` run in the namespace.
    pub fn apply(&self, command: &mut Command) {
        let file = self.0.clone();
        // SAFETY: setns is one system call; it allocates nothing and takes no lock.
        unsafe {
            command.pre_exec(move || Ok(setns(&*file, CloneFlags::CLONE_NEWNET)?));
        }
    }

    /// A command that runs in the namespace.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        self.apply(&mut command);
        command
    }

    /// A listening socket in the namespace. Its backlog, longer than std's, takes hundreds of
    /// clients at once, which would otherwise try again only after a second.
    pub fn listen(&self, address: impl ToSocketAddrs + Send) -> TcpListener {
        let listener = self.enter(|| TcpListener::bind(address)).unwrap();
        nix::sys::socket::listen(&listener, Backlog::new(4096).unwrap()).unwrap();
        listener
    }

    /// A port that is free in the namespace, for programs that cannot tell which they got.
    pub fn free_port(&self, ip: IpAddr) -> u16 {
        self.enter(|| TcpListener::bind(SocketAddr::new(ip, 0))?.local_addr()).unwrap().port()
    }

    /// Whether anything listens at the TCP port, without connecting to it.
    pub fn listens(&self, port: u16) -> bool {
        let tables = self.enter(|| {
            ["tcp", "tcp6"].map(|name| {
                std::fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default()
            })
        });
        let wanted = format!(":{port:04X}");
        tables.iter().flat_map(|table| table.lines().skip(1)).any(|line| {
            let mut fields = line.split_whitespace().skip(1);
            let (local, state) = (fields.next().unwrap(), fields.nth(1).unwrap());
            local.ends_with(&wanted) && state == "0A"
        })
    }

    /// Makes connecting to `host` fail with EHOSTUNREACH.
    pub fn reject(&self, host: std::net::Ipv4Addr) {
        self.enter(|| add_reject_route(host)).unwrap();
    }

    /// Sets a sysctl of the namespace, such as `net/ipv4/ip_local_port_range`.
    pub fn sysctl(&self, name: &str, value: &str) {
        self.enter(|| std::fs::write(format!("/proc/sys/{name}"), value)).unwrap();
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn bring_loopback_up() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: ifreq is plain data; all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which `request` is, and keeps no pointer to it.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) };
    nix::errno::Errno::result(result)?;
    Ok(())
}

fn add_reject_route(host: std::net::Ipv4Addr) -> io::Result<()> {
    // SAFETY: rtentry is plain data; all zeroes is a valid value.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_flags = libc::RTF_UP | libc::RTF_HOST | libc::RTF_REJECT;
    for (field, ip) in [(&mut route.rt_dst, host), (&mut route.rt_genmask, [255; 4].into())] {
        field.sa_family = libc::AF_INET as libc::sa_family_t;
        // As sockaddr_in: two bytes of port, then the address.
        field.sa_data[2..6].copy_from_slice(&ip.octets().map(|byte| byte as libc::c_char));
    }
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: SIOCADDRT reads an rtentry, which `route` is, and keeps no pointer to it.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &route) };
    nix::errno::Errno::result(result)?;
    Ok(())
}

/// Runs before `main`, when the process has one thread.
#[used]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = prepare_process;

/// Without root: root in a new user namespace, if this system allows that; if not, the first
/// [`Netns::new`] says so. And room for the sockets of parallel tests.
extern "C" fn prepare_process() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};

    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard.min(65536), hard);
    }
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    if !uid.is_root() && unshare(CloneFlags::CLONE_NEWUSER).is_ok() {
        let _ = std::fs::write("/proc/self/setgroups", "deny");
        let _ = std::fs::write("/proc/self/uid_map", format!("0 {uid} 1"));
        let _ = std::fs::write("/proc/self/gid_map", format!("0 {gid} 1"));
    }
}
