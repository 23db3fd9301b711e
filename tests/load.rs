//! What `nsplice-load` tells whoever measures with it.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::Value;

/// A process of the program, which is ended with this value if it has not ended before.
struct Load {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Load {
    fn start(options: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_nsplice-load"))
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { input: child.stdin.take(), output, child }
    }

    fn server() -> (Self, String) {
        let mut server = Self::start(&["server", "--listen", "127.0.0.1:0", "--mode", "rr"]);
        let address = server.line()["listening"].as_str().unwrap().to_owned();
        (server, address)
    }

    /// A client whose measured time has begun.
    fn client(address: &str, seconds: &str) -> Self {
        let options = ["client", "--connect", address, "--work", "rr", "--progress"];
        let times = ["--warmup", "0", "--seconds", seconds];
        let mut client = Self::start(&[&options[..], &times].concat());
        assert_eq!(client.line()["measuring"], true);
        client
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn ask(&mut self) -> Value {
        self.input.as_mut().unwrap().write_all(b"\n").unwrap();
        self.line()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_client_that_is_asked_tells_what_it_has_done_so_far() {
    let (_server, address) = Load::server();
    let mut client = Load::client(&address, "60");
    let first = client.ask();
    assert_eq!(first["so_far"], true, "{first}");
    let operations = |report: &Value| report["operations"].as_u64().unwrap();
    let seconds = |report: &Value| report["seconds"].as_f64().unwrap();
    let mut last = client.ask();
    while operations(&last) == operations(&first) {
        last = client.ask();
    }
    assert!(operations(&last) > operations(&first), "{first} {last}");
    assert!(seconds(&last) > seconds(&first), "{first} {last}");
}

#[test]
fn the_last_report_is_told_from_those_so_far_and_the_client_stays_until_its_input_ends() {
    let (_server, address) = Load::server();
    let mut client = Load::client(&address, "0.1");
    let report = client.line();
    assert!(report["so_far"].is_null(), "{report}");
    assert!(client.child.try_wait().unwrap().is_none());
    drop(client.input.take());
    assert!(client.child.wait().unwrap().success());
}

#[test]
fn a_client_whose_input_has_ended_measures_as_long_as_it_was_told() {
    let (_server, address) = Load::server();
    let mut client = Load::client(&address, "0.1");
    drop(client.input.take());
    let report = client.line();
    assert!(report["seconds"].as_f64().unwrap() >= 0.1, "{report}");
    assert!(client.child.wait().unwrap().success());
}
