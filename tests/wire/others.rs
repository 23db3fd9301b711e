//! Other forwarders, for the table in docs/wire.md only.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::support::{Netns, TempDir, eventually, find_program};

/// A forwarder that may be installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Other {
    Haproxy,
    Socat,
}

/// One that runs. Dropped, it is ended.
pub struct Running {
    pub address: SocketAddr,
    child: Child,
    _directory: TempDir,
}

impl Other {
    pub fn name(self) -> &'static str {
        match self {
            Self::Haproxy => "haproxy",
            Self::Socat => "socat",
        }
    }

    /// What it says of its version, if it is installed.
    pub fn version(self) -> Option<String> {
        let option = if self == Self::Socat { "-V" } else { "-v" };
        let output = Command::new(find_program(self.name())?).arg(option).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let words = text.split_whitespace();
        let is_version = |word: &&str| word.starts_with(|c: char| c.is_ascii_digit());
        words.into_iter().find(is_version).map(str::to_owned)
    }

    /// Starts it, in the namespace of the target.
    pub fn start(self, netns: &Netns, target: SocketAddr) -> Running {
        let ip = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let address = SocketAddr::new(ip, netns.free_port(ip));
        let directory = TempDir::new();
        let mut command = netns.command(find_program(self.name()).expect("it has a version"));
        match self {
            Self::Socat => {
                let listen = format!("TCP-LISTEN:{},reuseaddr,fork,nodelay", address.port());
                // Without an end of its own after one side has ended: 0.5 s by default.
                command.args(["-t", "60", &listen, &format!("TCP:{target},nodelay")])
            }
            Self::Haproxy => {
                let config = directory.path().join("haproxy.cfg");
                std::fs::write(&config, haproxy_config(address, target)).unwrap();
                command.arg("-f").arg(config).arg("-db")
            }
        };
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        let child = command.spawn().unwrap();
        let running = Running { address, child, _directory: directory };
        let listens = || netns.listens(address.port()).then_some(());
        eventually(&format!("{} listens", self.name()), listens);
        running
    }
}

fn haproxy_config(address: SocketAddr, target: SocketAddr) -> String {
    format!(
        "defaults\n mode tcp\n timeout connect 60s\n timeout client 60s\n timeout server 60s\n \
         retries 0\nlisten forward\n bind {address}\n server target {target}\n"
    )
}

impl Drop for Running {
    fn drop(&mut self) {
        // The group is that of the child, which is not reaped yet: its own processes, no others'.
        let _ = killpg(Pid::from_raw(self.child.id() as i32), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}
