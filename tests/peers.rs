//! Real programs through nsplice: curl and nginx, iperf3, socat, each side in its own namespace.
//!
//! `scripts/install-test-peers` installs them.

#![allow(clippy::unwrap_used)]

mod support;

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use support::forwarder::Capture;
use support::streams::Pattern;
use support::{
    Forwarder, Launch, Netns, PATIENCE, TempDir, eventually, find_program, namespaces, skip,
};

/// The file of a program, or a skipped test.
macro_rules! program {
    ($name:literal) => {
        match find_program($name) {
            Some(file) => file,
            None => skip!("no {} in PATH: scripts/install-test-peers installs it", $name),
        }
    };
}

/// A program that runs beside the forwarder. Dropped, it is ended with its children.
struct Peer {
    child: Child,
    stdout: Capture,
    stderr: Capture,
}

impl Peer {
    fn start(mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.process_group(0);
        let mut child = command.spawn().unwrap();
        let stdout = Capture::of(child.stdout.take().unwrap());
        let stderr = Capture::of(child.stderr.take().unwrap());
        Self { child, stdout, stderr }
    }

    /// Waits until something listens at the port, which must be this program.
    fn listening(mut self, netns: &Netns, port: u16) -> Self {
        eventually("the peer listens", || {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("ended with {status}: {}", self.stderr.text());
            }
            netns.listens(port).then_some(())
        });
        self
    }

    /// Waits for the end of the program.
    fn finish(mut self) -> Output {
        let status = eventually("the peer ends", || self.child.try_wait().unwrap());
        eventually("its output ends", || {
            (self.stdout.is_complete() && self.stderr.is_complete()).then_some(())
        });
        let (stdout, stderr) = (self.stdout.text().into(), self.stderr.text().into());
        Output { status, stdout, stderr }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // While the child is not reaped the id is its own, and that of the group it leads, in
        // which its children are.
        let group = Pid::from_raw(self.child.id() as i32);
        let deadline = Instant::now() + PATIENCE;
        let mut signal = Signal::SIGTERM;
        while matches!(self.child.try_wait(), Ok(None)) {
            let _ = killpg(group, signal);
            std::thread::sleep(Duration::from_millis(5));
            if Instant::now() > deadline {
                signal = Signal::SIGKILL;
            }
        }
    }
}

/// The port of a peer: nothing else is in its namespace.
const TARGET_PORT: u16 = 8080;

fn launch(clients: &Netns, targets: &Netns) -> Launch {
    Launch::nsplice()
        .listen_netns(clients)
        .connect_netns(targets)
        .listen(([127, 0, 0, 1], 0))
        .connect(([127, 0, 0, 1], TARGET_PORT))
}

fn forwarder(clients: &Netns, targets: &Netns) -> Forwarder {
    launch(clients, targets).start()
}

fn run(netns: &Netns, file: &Path, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Output {
    let mut command = netns.command(file);
    command.args(args);
    Peer::start(command).finish()
}

fn assert_success(output: &Output) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{}: {stdout}{stderr}", output.status);
}

/// nginx with one worker, all its files in `directory`.
fn nginx(file: &Path, netns: &Netns, directory: &Path) -> Peer {
    let at = |name: &str| directory.join(name).to_str().unwrap().to_owned();
    let temp: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|name| format!("{name}_temp_path {};\n", at(name)))
        .concat();
    // Workers keep the user who starts the test, who alone is sure to read the files.
    let user = if nix::unistd::geteuid().is_root() { "user root;" } else { "" };
    let config = format!(
        "daemon off; worker_processes 1; {user} pid {}; error_log {};\n\
         events {{}}\n\
         http {{\n{temp}access_log off; sendfile on;\n\
         server {{ listen 127.0.0.1:{TARGET_PORT}; root {}; }} }}\n",
        at("pid"),
        at("error.log"),
        at("www"),
    );
    std::fs::write(at("nginx.conf"), config).unwrap();
    let mut command = netns.command(file);
    command.args(["-e", &at("error.log"), "-p", &at(""), "-c", &at("nginx.conf")]);
    Peer::start(command).listening(netns, TARGET_PORT)
}

#[test]
fn curl_fetches_files_from_nginx() {
    let (curl, nginx_file) = (program!("curl"), program!("nginx"));
    namespaces!(clients, targets);
    let directory = TempDir::new();
    let www = directory.path().join("www");
    std::fs::create_dir(&www).unwrap();
    let sizes = [1, 100, 10_000, 1_000_000, 30_000_000];
    for size in sizes {
        std::fs::write(www.join(size.to_string()), content(size)).unwrap();
    }
    let _nginx = nginx(&nginx_file, &targets, directory.path());
    let forwarder = forwarder(&clients, &targets);
    let url = |name: &str| format!("http://{}/{name}", forwarder.address());

    // One connection for all, kept alive; then one for each, at once.
    for parallel in [None, Some("--parallel")] {
        let got = directory.path().join(parallel.unwrap_or("kept-alive"));
        std::fs::create_dir(&got).unwrap();
        let mut args: Vec<String> = parallel.into_iter().map(str::to_owned).collect();
        args.extend(["--fail", "--silent", "--show-error", "--max-time", "20"].map(str::to_owned));
        for size in sizes {
            let file: PathBuf = got.join(size.to_string());
            args.extend(["-o".into(), file.to_str().unwrap().into(), url(&size.to_string())]);
        }
        assert_success(&run(&clients, &curl, args));
        for size in sizes {
            let bytes = std::fs::read(got.join(size.to_string())).unwrap();
            assert!(bytes == content(size), "{size} bytes, {parallel:?}: {} came", bytes.len());
        }
    }
    let output = run(&clients, &curl, ["--silent", "--max-time", "20", "-I", &url("10000")]);
    assert_success(&output);
    assert!(String::from_utf8_lossy(&output.stdout).contains("Content-Length: 10000"));
    forwarder.stop().assert_clean();
}

fn content(size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    Pattern::new(size as u64, size as u64).peek(&mut bytes);
    bytes
}

/// A test of each kind that iperf3 knows, with 1 and with 8 streams.
macro_rules! iperf3 {
    ($($name:ident: $($arg:literal)*;)+) => {
        $(
            #[test]
            fn $name() {
                let iperf3 = program!("iperf3");
                namespaces!(clients, targets);
                for streams in ["1", "8"] {
                    let args: &[&str] = &["-P", streams $(, $arg)*];
                    measure(&iperf3, &clients, &targets, args);
                }
            }
        )+
    };
}

iperf3! {
    iperf3_sends: ;
    iperf3_receives: "-R";
    iperf3_does_both_at_once: "--bidir";
}

fn measure(iperf3: &Path, clients: &Netns, targets: &Netns, args: &[&str]) {
    let port = TARGET_PORT.to_string();
    let mut server = targets.command(iperf3);
    server.args(["-s", "-1", "-B", "127.0.0.1", "-p", &port]);
    let server = Peer::start(server).listening(targets, TARGET_PORT);
    let launch = launch(clients, targets);
    // It knows by their order which of its connections goes which way, and two workers do not keep
    // the order in which connections came.
    let forwarder = match args.contains(&"--bidir") {
        true => launch.option("--workers", "1").start(),
        false => launch.start(),
    };
    let port = forwarder.address().port().to_string();
    let common = ["-c", "127.0.0.1", "-p", &port, "-t", "1", "-J", "--connect-timeout", "5000"];
    let output = run(clients, iperf3, common.iter().chain(args));
    assert_success(&output);
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut sums = vec!["sum_received"];
    if args.contains(&"--bidir") {
        sums.push("sum_received_bidir_reverse");
    }
    for sum in sums {
        let bytes = result["end"][sum]["bytes"].as_f64().unwrap_or(0.0);
        // Any machine moves more than this in a second; a stalled transfer does not.
        assert!(bytes > 10e6, "{args:?}: {sum} is {bytes} bytes: {}", result["end"]);
    }
    assert_success(&server.finish());
    // iperf3 ends some streams with a reset, which is reported, so the text is not looked at.
    assert_eq!(forwarder.stop().code(), Some(0), "{args:?}");
}

/// The client's standard input ends, and with it one half of the connection; the answer that the
/// server has yet to give still arrives.
#[test]
fn socat_gets_the_answer_to_a_half_closed_question() {
    let socat = program!("socat");
    namespaces!(clients, targets);
    let mut server = targets.command(&socat);
    server.arg(format!("TCP-LISTEN:{TARGET_PORT},bind=127.0.0.1,fork"));
    // Knows the count only when its input has ended.
    server.arg("SYSTEM:wc -c");
    let _server = Peer::start(server).listening(&targets, TARGET_PORT);
    let forwarder = forwarder(&clients, &targets);
    let directory = TempDir::new();
    let question = directory.path().join("question");
    std::fs::write(&question, content(1_234_567)).unwrap();
    let from = format!("OPEN:{},rdonly!!STDOUT", question.display());
    let to = format!("TCP:{}", forwarder.address());
    let output = run(&clients, &socat, ["-t", "20", &from, &to]);
    assert_success(&output);
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "1234567");
    forwarder.stop().assert_clean();
}
