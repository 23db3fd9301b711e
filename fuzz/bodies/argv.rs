//! Any argv: the arguments are what lies between zero bytes.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use nsplice::cli::{self, Command};
use nsplice::config::{Config, ConnectSide, ListenSide, NetnsSource};
use nsplice::error::{Error, Kind};

pub fn run(data: &[u8]) {
    let typed = data.split(|&byte| byte == 0).map(|arg| OsString::from_vec(arg.to_vec()));
    let argv: Vec<OsString> = std::iter::once("nsplice".into()).chain(typed).collect();
    match cli::parse(argv) {
        Ok(Command::Help) => assert!(cli::help("nsplice").ends_with('\n')),
        Ok(Command::Version) => assert!(cli::version().ends_with('\n')),
        Ok(Command::Run(args)) => match args.into_config() {
            Ok(config) => check(&config),
            Err(error) => refused(&error, Kind::Mix, data),
        },
        Err(error) => refused(&error, Kind::Usage, data),
    }
}

fn refused(error: &Error, kind: Kind, data: &[u8]) {
    let text = error.to_string();
    assert_eq!(error.kind(), kind, "{text}");
    assert!(!text.is_empty());
    // Names and free arguments are repeated as they were typed, as netns_tcp_bridge does.
    let typed_lines = data.iter().filter(|&&byte| byte == b'\n').count();
    let lines = text.matches('\n').count();
    assert!(lines <= typed_lines, "an error of several lines: {text:?}");
}

/// What no configuration may hold, whatever was typed.
fn check(config: &Config) {
    let [forward] = config.forwards.as_slice() else { panic!("{config:?}") };
    let mut descriptors = Vec::from_iter(config.ready_fd);
    let mut netns = Vec::new();
    match &forward.listen {
        ListenSide::Bind { netns: named, .. } => netns.extend(named),
        ListenSide::Listener(fd) | ListenSide::Accepted(fd) => descriptors.push(*fd),
    }
    match &forward.connect {
        ConnectSide::Address { netns: named, .. } => netns.extend(named),
        ConnectSide::Connected(fd) => descriptors.push(*fd),
    }
    for named in netns {
        match named.source {
            NetnsSource::Fd(fd) => descriptors.push(fd),
            NetnsSource::Pid(pid) => assert!(pid > 0),
            NetnsSource::Path(_) => {}
        }
    }
    assert!(descriptors.iter().all(|&fd| fd >= 0), "{config:?}");
    assert!((4096..=1 << 30).contains(&config.pipe_size_bytes), "{config:?}");
    assert!(config.reset_timeout_ms <= 86_400_000, "{config:?}");
    assert!(config.workers.is_none_or(|workers| (1..=1024).contains(&workers)), "{config:?}");
    if let Some(cpus) = &config.cpus {
        let distinct: std::collections::BTreeSet<_> = cpus.iter().collect();
        assert!(!cpus.is_empty() && distinct.len() == cpus.len(), "{config:?}");
        assert!(cpus.iter().all(|&cpu| cpu < 1024), "{config:?}");
    }
}
