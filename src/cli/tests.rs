//! The command line from argv to [`Config`], with the original's texts as literals.

#![allow(clippy::unwrap_used)]

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use super::*;

mod properties;

fn read(args: &[&str]) -> Result<Command> {
    parse(["prog"].iter().chain(args).map(OsString::from).collect())
}

fn args(args: &[&str]) -> Args {
    match read(args) {
        Ok(Command::Run(args)) => args,
        other => panic!("{other:?}"),
    }
}

fn config(typed: &[&str]) -> Config {
    args(typed).into_config().unwrap()
}

fn usage_error(args: &[&str]) -> String {
    let error = read(args).unwrap_err();
    assert_eq!(error.kind(), Kind::Usage);
    error.to_string()
}

fn mix_error(typed: &[&str]) -> String {
    let error = args(typed).into_config().unwrap_err();
    assert_eq!(error.kind(), Kind::Mix);
    error.to_string()
}

#[test]
fn options_about_names_of_namespaces_need_one() {
    for typed in ["-l127.0.0.1:1 -c[::1]:2", "-l[::]:1 -F5 -c[::1]:2 -T6", "-L3 -C4"] {
        for (option, text) in [
            ("--wait-netns=1", "--wait-netns waits for what -f or -t names; neither is given"),
            ("--netns-gone=exit", "--netns-gone is about what -f or -t names; neither is given"),
        ] {
            let typed: Vec<_> = typed.split(' ').chain([option]).collect();
            assert_eq!(mix_error(&typed), text, "{typed:?}");
        }
    }
}

#[test]
fn taking_over_goes_with_addresses_only() {
    for typed in ["-L3 -c[::1]:2", "-S3 -c[::1]:2", "-l[::1]:1 -C3"] {
        let typed: Vec<_> = typed.split(' ').chain(["--takeover=x"]).collect();
        assert_eq!(mix_error(&typed), "--takeover goes with -l and -c only", "{typed:?}");
    }
}

#[test]
fn a_process_id_that_comes_back_is_not_trusted() {
    let typed = ["-l[::]:1", "-c[::1]:2", "-fblue", "-tpid:7", "--netns-gone"];
    let with = |word| [&typed[..], &[word]].concat();
    assert_eq!(config(&with("exit")).netns_gone, NetnsGone::Exit);
    assert_eq!(
        mix_error(&with("reopen")),
        "--netns-gone reopen does not go with -t pid:7: the number may come back as that of any \
         other process; give a name or a file"
    );
}

#[test]
fn every_spelling_of_a_value_is_the_same() {
    let wanted = Args { listen: Some("127.0.0.1:80".parse().unwrap()), ..Args::default() };
    for spelling in [
        &["--listen", "127.0.0.1:80"][..],
        &["--listen=127.0.0.1:80"],
        &["-l", "127.0.0.1:80"],
        &["-l127.0.0.1:80"],
        &["-l", "127.0.0.1:80", "--"],
    ] {
        assert_eq!(args(spelling), wanted, "{spelling:?}");
    }
}

#[test]
fn switches_bundle_with_each_other_and_with_one_value() {
    let wanted = Args { verbose: true, connect_fd: Some(7), ..Args::default() };
    for spelling in [&["-vC7"][..], &["-vC", "7"], &["-vvC7"], &["-v", "-C7"]] {
        assert_eq!(args(spelling), wanted, "{spelling:?}");
    }
}

#[test]
fn a_value_is_taken_whatever_it_looks_like() {
    let path = |text: &str| Some(NetnsSource::Path(text.into()));
    for value in ["-l", "--", "-", "--help", "help", "a=b", ""] {
        assert_eq!(args(&["-f", value]).listen_netns_file, path(value));
    }
    assert_eq!(args(&["--listen-netns-file=a=b"]).listen_netns_file, path("a=b"));
    assert_eq!(args(&["--listen-netns-file="]).listen_netns_file, path(""));
    assert_eq!(args(&["-f=a"]).listen_netns_file, path("=a"));
}

#[test]
fn the_last_of_a_repeated_option_wins() {
    assert_eq!(args(&["-L3", "--listen-fd=4", "-L", "5"]).listen_fd, Some(5));
    assert_eq!(args(&["-v", "--verbose"]), Args { verbose: true, ..Args::default() });
}

#[test]
fn the_first_error_in_argv_is_the_one_reported() {
    assert_eq!(usage_error(&["--foo", "-Lx"]), "unrecognized option `--foo`");
    assert_eq!(
        usage_error(&["-Lx", "--foo"]),
        "invalid argument to option `-L`: invalid digit found in string \
         (\"x\" is not a file descriptor number)"
    );
    assert!(usage_error(&["-Lx", "-L3"]).contains("`-L`: invalid digit"));
    assert_eq!(usage_error(&["-h", "x"]), "unexpected free argument `x`");
}

#[test]
fn an_invalid_argument_error_shows_the_value_on_one_line() {
    assert_eq!(
        usage_error(&["--connect=local\nhost:1"]),
        "invalid argument to option `--connect`: invalid socket address syntax \
         (\"local\\nhost:1\" is not a numeric IP:PORT or [IPv6]:PORT)"
    );
    assert_eq!(
        usage_error(&["--handoff", "both"]),
        "invalid argument to option `--handoff`: unknown word \
         (\"both\" is not socket or connections)"
    );
}

#[test]
fn arguments_that_are_not_text_are_refused() {
    let bad = OsString::from_vec(b"/run/\xff".to_vec());
    for before in ["-f", "--connect-netns-file", "-l", "--"] {
        let argv = vec!["prog".into(), before.into(), bad.clone()];
        let error = parse(argv).unwrap_err();
        assert_eq!(error.to_string(), "argument \"/run/\\xFF\" is not valid UTF-8");
        assert_eq!(error.kind(), Kind::Usage);
    }
    assert!(parse(vec![bad]).is_ok(), "the program name may be anything");
    assert!(parse(vec![]).is_ok());
}

#[test]
fn help_and_version_do_not_need_a_good_mix() {
    assert_eq!(read(&["-h"]), Ok(Command::Help));
    assert_eq!(read(&["--connect-fd=3", "--help", "-hh"]), Ok(Command::Help));
    assert_eq!(read(&["-V", "-v"]), Ok(Command::Version));
    assert_eq!(read(&["--version", "-h"]), Ok(Command::Help));
}

#[test]
fn two_addresses_are_enough() {
    assert_eq!(
        config(&["-l", "[::]:80", "-c", "10.0.0.2:0"]),
        Config {
            forwards: vec![Forward {
                listen: ListenSide::Bind { address: "[::]:80".parse().unwrap(), netns: None },
                connect: ConnectSide::Address {
                    address: "10.0.0.2:0".parse().unwrap(),
                    netns: None,
                },
            }],
            wait_netns_ms: 0,
            netns_gone: NetnsGone::Keep,
            takeover: None,
            engine: Engine::Auto,
            handoff: Handoff::Socket,
            transfer: Transfer::Auto,
            workers: None,
            cpus: None,
            pin: true,
            busy_poll_us: 0,
            pipe_size_bytes: 1_048_576,
            reset_timeout_ms: 5000,
            times: Times::default(),
            sockets: SocketOptions::default(),
            backlog: u32::MAX,
            max_connections: None,
            drain_timeout_ms: 0,
            verbose: false,
            ready_fd: None,
            summary: None,
        }
    );
}

#[test]
fn every_option_reaches_the_configuration() {
    let typed = "-l 127.0.0.1:1 -c 127.0.0.1:2 -f blue -t pid:7 --handoff connections \
                 --transfer copy --workers 3 --cpus 2,0-1 --no-pin --pipe-size 64K \
                 --busy-poll 50 --max-connections 100 --backlog 7 --connect-timeout 1 \
                 --idle-timeout 60 --half-close-timeout 2 --reset-timeout 1.5 --drain-timeout 3 \
                 --keepalive 60,10,6 --user-timeout 30 -v --ready-fd 9 --summary json \
                 --engine epoll --wait-netns 2.5 --netns-gone exit --takeover /run/x";
    let netns = |option, source| Some(Netns { option, source });
    assert_eq!(
        config(&typed.split_whitespace().collect::<Vec<_>>()),
        Config {
            forwards: vec![Forward {
                listen: ListenSide::Bind {
                    address: "127.0.0.1:1".parse().unwrap(),
                    netns: netns("-f", NetnsSource::Path("blue".into())),
                },
                connect: ConnectSide::Address {
                    address: "127.0.0.1:2".parse().unwrap(),
                    netns: netns("-t", NetnsSource::Pid(7)),
                },
            }],
            wait_netns_ms: 2500,
            netns_gone: NetnsGone::Exit,
            takeover: Some("/run/x".into()),
            engine: Engine::Epoll,
            handoff: Handoff::Connections,
            transfer: Transfer::Copy,
            workers: Some(3),
            cpus: Some(vec![2, 0, 1]),
            pin: false,
            busy_poll_us: 50,
            pipe_size_bytes: 65_536,
            reset_timeout_ms: 1500,
            times: Times { connect_ms: 1000, idle_ms: 60_000, half_close_ms: 2000 },
            sockets: SocketOptions {
                keepalive: Keepalive::Set { idle_s: 60, interval_s: 10, count: 6 },
                user_timeout_ms: 30_000,
            },
            backlog: 7,
            max_connections: Some(100),
            drain_timeout_ms: 3000,
            verbose: true,
            ready_fd: Some(9),
            summary: Some(SummaryFormat::Json),
        }
    );
}

#[test]
fn each_side_can_be_an_inherited_descriptor() {
    let single = |typed: &[&str]| config(typed).forwards.remove(0);
    let forward = single(&["-L3", "-C4"]);
    assert_eq!(forward.listen, ListenSide::Listener(3));
    assert_eq!(forward.connect, ConnectSide::Connected(4));
    let forward = single(&["-S0", "-c[::1]:1", "-T5"]);
    assert_eq!(forward.listen, ListenSide::Accepted(0));
    let netns = Some(Netns { option: "-T", source: NetnsSource::Fd(5) });
    assert_eq!(
        forward.connect,
        ConnectSide::Address { address: "[::1]:1".parse().unwrap(), netns }
    );
}

#[test]
fn wrong_mixes_are_refused_in_the_order_of_the_original() {
    let (l, c) = ("-l1.2.3.4:5", "-c1.2.3.4:5");
    let listen = "Specify exactly one of -l, -L or -S";
    let connect = "Specify exactly one of -c or -C";
    let netns_with_fd = "Listening-side network namespace is not relevant with -L or -S";
    let connect_netns_with_fd = "Connecting-side network namespace is not relevant with -C";
    for (typed, text) in [
        (&[][..], listen),
        (&["-L3", "-S4", "-C5"], listen),
        (&[l, "-L3", "-f", "x", "-F3"], listen),
        (&[l, "-f", "x", "-F3"], "Cannot specify both -f and -F simultaneously"),
        (&["-L3", "-f", "x", "-F3"], "Cannot specify both -f and -F simultaneously"),
        (&["-L3", "-f", "x"], netns_with_fd),
        (&["-S3", "-F4", c, "-C5"], netns_with_fd),
        (&[l], connect),
        (&[l, c, "-C5", "-t", "x", "-T3"], connect),
        (&[l, "-C5", "-t", "x", "-T3"], "Cannot specify both -t and -T simultaneously"),
        (&[l, "-C5", "-T3"], connect_netns_with_fd),
        (&[l, "-C5", "-t", "x"], connect_netns_with_fd),
    ] {
        assert_eq!(mix_error(typed), text, "{typed:?}");
    }
}

#[test]
fn a_number_no_descriptor_can_have_is_refused_when_its_side_is_looked_at() {
    let too_large = |option: &str| {
        format!(
            "out of range integral type conversion attempted \
             ({option} 2147483648 is not a file descriptor number)"
        )
    };
    let (l, c) = ("-l1.2.3.4:5", "-c1.2.3.4:5");
    assert_eq!(mix_error(&[l, "-L2147483648"]), too_large("-L"));
    assert_eq!(mix_error(&["-S2147483648", "-F2147483648"]), too_large("-S"));
    assert_eq!(mix_error(&["-L3", "-f", "x", "-F2147483648"]), too_large("-F"));
    assert_eq!(mix_error(&[l, c, "-C2147483648"]), too_large("-C"));
    assert_eq!(mix_error(&[l, "-T2147483648"]), "Specify exactly one of -c or -C");
    assert_eq!(mix_error(&[l, "-C3", "-T2147483648"]), too_large("-T"));
    assert_eq!(mix_error(&[l, c, "--ready-fd=2147483648"]), too_large("--ready-fd"));
    assert_eq!(config(&["-L2147483647", c]).forwards[0].listen, ListenSide::Listener(i32::MAX));
}

#[test]
fn the_defaults_shown_are_the_defaults_used() {
    let pair = ["-l1.2.3.4:5", "-c1.2.3.4:5"];
    for option in ["--handoff", "--transfer", "--pipe-size"] {
        let shown = options::by_long(option).unwrap().default.unwrap();
        assert_eq!(config(&[pair[0], pair[1], option, shown]), config(&pair));
    }
}
