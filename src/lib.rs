//! `nsplice` forwards TCP connections from one Linux network namespace to another.

#![deny(unsafe_code)]

pub mod cli;
pub mod config;
pub mod connector;
pub mod crew;
pub mod engine;
pub mod error;
pub mod flow;
pub mod handoff;
pub mod inherited;
pub mod limits;
pub mod listener;
pub mod log;
pub mod mostly;
pub mod netns;
pub mod pace;
pub mod pipe;
pub mod process;
pub mod queue;
pub mod socket;
pub mod spread;
pub mod stats;
pub mod sys;
pub mod takeover;
pub mod worker;

use std::env;
use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use cli::Command;
use error::{Error, Kind, Result};

/// Runs the program: argv to exit status.
///
/// A command line that cannot be parsed is reported as `PROGRAM: TEXT`, with PROGRAM as the caller
/// spelled it, anything else as `Error: TEXT`, both on standard error: as in netns_tcp_bridge.
pub fn main() -> ExitCode {
    let argv: Vec<OsString> = env::args_os().collect();
    let program = argv.first().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let outcome = cli::parse(argv).and_then(|command| match command {
        Command::Run(args) => process::run(&args.into_config()?),
        Command::Help => print(&cli::help(&program)),
        Command::Version => print(&cli::version()),
    });
    let error = match outcome {
        Ok(status) => return ExitCode::from(status),
        Err(error) => error,
    };
    let speaker = if error.kind() == Kind::Usage { &program } else { "Error" };
    // Nobody is left to tell when standard error is gone or full; the status still says it.
    log::say_last(format!("{speaker}: {error}"));
    ExitCode::from(error.kind().status())
}

/// Writes `text` to standard output; a reader that has seen enough (`| head`) is no failure.
fn print(text: &str) -> Result<u8> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::new(Kind::Socket, format!("standard output: {error}")))
        }
        _ => Ok(0),
    }
}
