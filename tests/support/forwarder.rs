//! The program under test: how it is started, watched and ended.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;

use super::engine::{Wanted, answer, without_fallback};
use super::{Netns, PATIENCE, Process, eventually};

/// Which forwarder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// The one built here.
    Nsplice,
    /// netns_tcp_bridge, the tool it replaces.
    Reference,
}

impl Program {
    /// Its file; an error says how to get it.
    pub fn path(self) -> Result<PathBuf, String> {
        if self == Self::Nsplice {
            return Ok(env!("CARGO_BIN_EXE_nsplice").into());
        }
        let path = std::env::var_os("NSPLICE_REFERENCE").map_or_else(
            || concat!(env!("CARGO_MANIFEST_DIR"), "/target/reference/bin/netns_tcp_bridge").into(),
            PathBuf::from,
        );
        let hint = "scripts/install-test-peers installs it";
        path.is_file().then_some(()).ok_or_else(|| format!("no {}: {hint}", path.display()))?;
        Ok(path)
    }
}

/// A forwarder to be started: its arguments, what it inherits, where it runs.
pub struct Launch {
    program: Program,
    file: Option<PathBuf>,
    args: Vec<OsString>,
    inherited: Vec<Inherited>,
    home: Option<Netns>,
    from: Option<Netns>,
    uid: Option<u32>,
    /// System calls, and what the kernel answers to them.
    answers: Vec<(libc::c_long, Errno)>,
    /// Its soft and hard limit of descriptors, if it is to have some of its own.
    descriptors: Option<(u64, u64)>,
    /// Its standard error, if it is not to be captured.
    stderr: Option<OwnedFd>,
    listens: Listens,
}

/// A descriptor the program inherits, open in the test process as `fd`, in the program as `number`.
struct Inherited {
    fd: OwnedFd,
    number: RawFd,
}

/// What will accept connections, and so what there is to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listens {
    /// Nothing: the only connection is inherited.
    No,
    /// `-l`.
    At(SocketAddr),
    /// `-L`: clients can connect before the program runs.
    Inherited,
}

impl Launch {
    pub fn new(program: Program) -> Self {
        let (args, inherited, answers) = (Vec::new(), Vec::new(), Vec::new());
        Self {
            program,
            file: None,
            args,
            inherited,
            home: None,
            from: None,
            uid: None,
            answers,
            descriptors: None,
            stderr: None,
            listens: Listens::No,
        }
    }

    pub fn nsplice() -> Self {
        Self::new(Program::Nsplice)
    }

    /// `-l`; port 0 means any free one, also for a program that has no such notion.
    pub fn listen(mut self, address: impl Into<SocketAddr>) -> Self {
        self.listens = Listens::At(address.into());
        self
    }

    /// `-c`.
    pub fn connect(self, address: impl Into<SocketAddr>) -> Self {
        self.option("-c", address.into().to_string())
    }

    /// `-f`: listen in this namespace.
    pub fn listen_netns(mut self, netns: &Netns) -> Self {
        self.from = Some(netns.clone());
        self.option("-f", netns.path())
    }

    /// `-t`: connect from this namespace.
    pub fn connect_netns(self, netns: &Netns) -> Self {
        self.option("-t", netns.path())
    }

    /// `-F`: as [`Launch::listen_netns`], by descriptor.
    pub fn listen_netns_fd(mut self, netns: &Netns) -> Self {
        self.from = Some(netns.clone());
        self.fd("-F", netns)
    }

    /// `-T`: as [`Launch::connect_netns`], by descriptor.
    pub fn connect_netns_fd(self, netns: &Netns) -> Self {
        self.fd("-T", netns)
    }

    /// `-L`: an inherited listening socket.
    pub fn listen_fd(mut self, listener: &impl AsFd) -> Self {
        self.listens = Listens::Inherited;
        self.fd("-L", listener)
    }

    /// An option and its value.
    pub fn option(mut self, option: &str, value: impl AsRef<OsStr>) -> Self {
        self.args.push(option.into());
        self.args.push(value.as_ref().to_owned());
        self
    }

    /// An option without a value.
    pub fn flag(mut self, option: &str) -> Self {
        self.args.push(option.into());
        self
    }

    /// An option whose value is the number of an inherited descriptor, the same there as here.
    pub fn fd(self, option: &str, fd: &impl AsFd) -> Self {
        let fd = fd.as_fd().try_clone_to_owned().unwrap();
        let number = fd.as_raw_fd();
        self.inherit(fd, number).option(option, number.to_string())
    }

    /// Lets the program inherit `fd` under `number`. A chosen number should be well above those
    /// in use here: until the program runs, the test process's own descriptors still count.
    pub fn inherit(mut self, fd: OwnedFd, number: RawFd) -> Self {
        self.inherited.push(Inherited { fd, number });
        self
    }

    /// Runs the program itself in a namespace.
    pub fn inside(mut self, netns: &Netns) -> Self {
        self.home = Some(netns.clone());
        self
    }

    /// Tells the program its engine, whatever `NSPLICE_TEST_ENGINE` says.
    pub fn engine(self, name: &str) -> Self {
        self.option("--engine", name)
    }

    /// A seccomp filter answers the system call `number` with `errno`.
    pub fn answering(mut self, number: libc::c_long, errno: Errno) -> Self {
        self.answers.push((number, errno));
        self
    }

    /// Limits its descriptors, soft and hard, as `prlimit` does.
    pub fn descriptors(self, limit: u64) -> Self {
        self.soft_and_hard_descriptors(limit, limit)
    }

    pub fn soft_and_hard_descriptors(mut self, soft: u64, hard: u64) -> Self {
        self.descriptors = Some((soft, hard));
        self
    }

    /// Gives it a standard error of its own, which is not captured.
    pub fn stderr(mut self, stderr: OwnedFd) -> Self {
        self.stderr = Some(stderr);
        self
    }

    /// Does as `NSPLICE_TEST_ENGINE` says, unless the test itself says what engine there is to be.
    fn want_engine(&mut self) -> Wanted {
        let is_told = self.args.iter().any(|arg| arg == "--engine");
        if is_told || !self.answers.is_empty() || self.program != Program::Nsplice {
            return Wanted::Any;
        }
        let wanted = Wanted::from_env();
        match wanted {
            Wanted::Any => {}
            Wanted::Told(name) => self.args.extend(["--engine".into(), name.into()]),
            Wanted::Refused(errno) => self.answers.push((libc::SYS_io_uring_setup, errno)),
        }
        wanted
    }

    /// Runs the program as another user. `file` is a copy of it that this user may execute.
    pub fn run_as(mut self, uid: u32, file: PathBuf) -> Self {
        self.uid = Some(uid);
        self.file = Some(file);
        self
    }

    /// Starts the program and waits until it accepts connections, if it is to accept any.
    #[track_caller]
    pub fn start(self) -> Forwarder {
        self.begin().ready()
    }

    /// Starts the program, for a test that has something to do before it can be ready.
    pub fn begin(mut self) -> Beginning {
        let mut address = None;
        if let Listens::At(mut wanted) = self.listens {
            if wanted.port() == 0 && self.program == Program::Reference {
                wanted.set_port(self.where_it_listens().free_port(wanted.ip()));
            }
            address = Some(wanted);
            self = self.option("-l", wanted.to_string());
        }
        if self.program == Program::Nsplice {
            self = self.option("--summary", "json");
        }
        let ready = (self.program == Program::Nsplice && self.listens != Listens::No).then(|| {
            let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
            self = std::mem::replace(&mut self, Self::nsplice()).fd("--ready-fd", &write);
            read
        });
        Beginning { forwarder: self.spawn(address), ready, launch: self }
    }

    /// Starts the program and waits until it has ended by itself.
    #[track_caller]
    pub fn run(mut self) -> Exit {
        if let Listens::At(address) = self.listens {
            self = self.option("-l", address.to_string());
        }
        self.spawn(None).finish()
    }

    fn where_it_listens(&self) -> Netns {
        self.from.clone().or_else(|| self.home.clone()).expect("a namespace to listen in is known")
    }

    fn spawn(&mut self, address: Option<SocketAddr>) -> Forwarder {
        let engine = self.want_engine();
        let file = self.file.clone().unwrap_or_else(|| self.program.path().unwrap());
        let mut command = Command::new(file);
        command.args(&self.args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if let Some(stderr) = self.stderr.take() {
            command.stderr(stderr);
        }
        // A group of its own, so that a test can signal it as a terminal would.
        command.process_group(0);
        if let Some(netns) = &self.home {
            netns.apply(&mut command);
        }
        let inherited = std::mem::take(&mut self.inherited);
        let pairs: Vec<_> = inherited.iter().map(|one| (one.fd.as_raw_fd(), one.number)).collect();
        let (uid, descriptors) = (self.uid, self.descriptors);
        let answers = std::mem::take(&mut self.answers);
        // SAFETY: only system calls; nothing is allocated and no lock is taken.
        unsafe {
            command.pre_exec(move || {
                for &(fd, number) in &pairs {
                    inherit(fd, number)?;
                }
                for &(number, errno) in &answers {
                    answer(number, errno)?;
                }
                if let Some((soft, hard)) = descriptors {
                    setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?;
                }
                match uid {
                    Some(uid) => nix::unistd::setuid(uid.into()).map_err(Into::into),
                    None => Ok(()),
                }
            });
        }
        let mut parent = command.spawn().unwrap();
        // From here on only the program has the descriptors: so a test sees them closed.
        drop(command);
        drop(inherited);
        let stdout = Capture::of(parent.stdout.take().unwrap());
        let stderr = match parent.stderr.take() {
            Some(stderr) => Capture::of(stderr),
            None => Capture::of(std::io::empty()),
        };
        let listener =
            Process::of(parent.id() as i32).expect("a child that is not reaped is there");
        let program = self.program;
        Forwarder { program, engine, parent, listener, connector: None, address, stdout, stderr }
    }
}

/// In the forked child: makes `fd` survive the exec as `number`.
fn inherit(fd: RawFd, number: RawFd) -> std::io::Result<()> {
    // SAFETY: fcntl and dup2 touch no memory; both numbers are plain descriptors of the child.
    let result = unsafe {
        if fd == number { libc::fcntl(fd, libc::F_SETFD, 0) } else { libc::dup2(fd, number) }
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// A forwarder that has been started and need not be ready yet.
pub struct Beginning {
    pub forwarder: Forwarder,
    ready: Option<OwnedFd>,
    launch: Launch,
}

impl Beginning {
    /// Waits until it accepts connections, if it is to accept any.
    #[track_caller]
    pub fn ready(self) -> Forwarder {
        let Self { mut forwarder, ready, launch } = self;
        match ready {
            Some(read) => forwarder.wait_ready_fd(read),
            None if launch.program == Program::Reference => {
                if let Some(address) = forwarder.address {
                    let netns = launch.where_it_listens();
                    forwarder.wait_until("it listens", || netns.listens(address.port()));
                }
            }
            None => {}
        }
        forwarder.wait_two_processes(launch.listens != Listens::No);
        forwarder
    }
}

/// A running forwarder. Dropped, it is killed.
pub struct Forwarder {
    program: Program,
    engine: Wanted,
    parent: Child,
    /// The process that was started: the one a user sees.
    pub listener: Process,
    /// Its child, once it has one.
    pub connector: Option<Process>,
    address: Option<SocketAddr>,
    stdout: Capture,
    stderr: Capture,
}

/// How a forwarder ended.
#[derive(Debug)]
pub struct Exit {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Exit {
    /// The exit status; a process killed by a signal has none.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Panics unless the status is 0 and nothing was reported.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert_eq!((self.code(), self.stderr.as_str()), (Some(0), ""), "{self:?}");
    }

    /// The summary nsplice printed.
    #[track_caller]
    pub fn summary(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }
}

impl Forwarder {
    /// Where clients connect to.
    #[track_caller]
    pub fn address(&self) -> SocketAddr {
        self.address.expect("the forwarder listens at a TCP address")
    }

    /// Both processes.
    pub fn processes(&self) -> Vec<Process> {
        std::iter::once(self.listener).chain(self.connector).collect()
    }

    /// The connector, which there is once a listening forwarder has started.
    #[track_caller]
    pub fn connector(&self) -> Process {
        self.connector.expect("the forwarder has a second process")
    }

    /// No io-wq thread was needed for anything: one that was stays for seconds.
    #[track_caller]
    pub fn assert_no_kernel_workers(&self) {
        let names = |process: &Process| process.thread_names();
        let threads: Vec<_> = self.processes().iter().flat_map(names).collect();
        assert!(threads.len() >= 2, "{threads:?}");
        assert!(!threads.iter().any(|name| name.starts_with("iou-wrk")), "{threads:?}");
    }

    /// What it has written to standard error so far, but for what `NSPLICE_TEST_ENGINE` causes.
    pub fn stderr(&self) -> String {
        let text = self.stderr.text();
        if matches!(self.engine, Wanted::Refused(_)) { without_fallback(&text) } else { text }
    }

    /// Asks it to end, waits for that, and checks that nothing is left.
    #[track_caller]
    pub fn stop(self) -> Exit {
        self.listener.signal(Signal::SIGTERM);
        self.finish()
    }

    /// Waits until it has ended, both processes, and returns how.
    #[track_caller]
    pub fn finish(mut self) -> Exit {
        let status = eventually("the forwarder ends", || self.parent.try_wait().unwrap());
        for process in self.processes() {
            eventually("both processes end", || (!process.is_alive()).then_some(()));
        }
        // Also of processes not known here: none holds the other end of the pipes any more.
        eventually("all its processes end", || {
            (self.stdout.is_complete() && self.stderr.is_complete()).then_some(())
        });
        let exit = Exit { status, stdout: self.stdout.text(), stderr: self.stderr() };
        if let Some(name) = self.engine.name()
            && exit.stdout.starts_with('{')
        {
            assert_eq!(exit.summary()["engine"], name, "NSPLICE_TEST_ENGINE has no effect");
        }
        exit
    }

    #[track_caller]
    fn wait_until(&mut self, what: &str, mut condition: impl FnMut() -> bool) {
        eventually(what, || {
            if let Some(status) = self.parent.try_wait().unwrap() {
                panic!("ended with {status} before {what}: {}", self.stderr.text());
            }
            condition().then_some(())
        });
    }

    /// Reads the line that tells the address. One that is no IP address is left to the test.
    #[track_caller]
    fn wait_ready_fd(&mut self, read: OwnedFd) {
        let mut line = Vec::new();
        let deadline = Instant::now() + PATIENCE;
        while line.last() != Some(&b'\n') {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(read.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut fds, PollTimeout::try_from(left).unwrap()).unwrap();
            assert!(ready > 0, "not ready within {PATIENCE:?}; stderr: {}", self.stderr.text());
            let mut buffer = [0; 256];
            let n = nix::unistd::read(&read, &mut buffer).unwrap();
            if n == 0 {
                let status = self.parent.wait().unwrap();
                eventually("its standard error ends", || self.stderr.is_complete().then_some(()));
                let stderr = self.stderr.text();
                panic!("not ready, ended with {status}; ready line {line:?}, stderr: {stderr}");
            }
            line.extend_from_slice(&buffer[..n]);
        }
        let line = String::from_utf8(line).unwrap();
        if let Ok(address) = line.trim_end().parse() {
            self.address = Some(address);
        }
    }

    /// Learns the second process. One that serves an inherited connection may already be done.
    fn wait_two_processes(&mut self, must_exist: bool) {
        let listener = self.listener;
        self.connector = eventually("there is a second process", || {
            let children = listener.children();
            (children.len() == 1 || !must_exist || !listener.is_alive())
                .then(|| children.first().copied())
        });
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        // Only what was started here, by id; an id that has passed to another process is left.
        if let Some(connector) = self.connector {
            connector.signal(Signal::SIGKILL);
        }
        for child in self.listener.children() {
            child.signal(Signal::SIGKILL);
        }
        let _ = self.parent.kill();
        let _ = self.parent.wait();
    }
}

/// The output of a program, read as it comes so that the program never waits for it.
pub struct Capture {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Capture {
    pub fn of(mut pipe: impl Read + Send + 'static) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let sink = bytes.clone();
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = pipe.read(&mut buffer) {
                sink.lock().unwrap().extend_from_slice(&buffer[..n]);
            }
        });
        Self { bytes, reader }
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().unwrap()).into_owned()
    }

    /// Whether the last process that could write has ended.
    pub fn is_complete(&self) -> bool {
        self.reader.is_finished()
    }
}
