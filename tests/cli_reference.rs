//! Bad command lines, against netns_tcp_bridge 0.1.1.
//!
//! Every row holds the reference's line as a literal, so it bites without the reference. Where
//! that is installed, under the name in `NSPLICE_REFERENCE` or at
//! `target/reference/bin/netns_tcp_bridge`, the row itself is checked against it too.
//!
//! A row must end before anything is forwarded: the reference is run as it is.

#![allow(clippy::unwrap_used)]

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::{env, fs, io};

const NSPLICE: &str = env!("CARGO_BIN_EXE_nsplice");
/// argv[0] of both programs: what a caller chose, not where the binary is.
const PROGRAM: &str = "./some bridge";

/// Arguments that cannot be parsed (status 2), and the text after `PROGRAM: `.
const USAGE: &[(&[&str], &str)] = &[
    (&["x"], "unexpected free argument `x`"),
    (&[""], "unexpected free argument ``"),
    (&["-"], "unexpected free argument `-`"),
    (&["--", "x"], "unexpected free argument `x`"),
    (&["--", "-l"], "unexpected free argument `-l`"),
    (&["--", "--"], "unexpected free argument `--`"),
    (&["-h", "x"], "unexpected free argument `x`"),
    (&["-L", "3", "4"], "unexpected free argument `4`"),
    (&["--foo"], "unrecognized option `--foo`"),
    (&["--foo=bar"], "unrecognized option `--foo`"),
    (&["--="], "unrecognized option `--`"),
    (&["--=x"], "unrecognized option `--`"),
    (&["---"], "unrecognized option `---`"),
    (&["--liste", "127.0.0.1:1"], "unrecognized option `--liste`"),
    (&["--listen-netns"], "unrecognized option `--listen-netns`"),
    (&["--Listen"], "unrecognized option `--Listen`"),
    (&["--l"], "unrecognized option `--l`"),
    (&["-x"], "unrecognized option `-x`"),
    (&["-hx"], "unrecognized option `-x`"),
    (&["-h=x"], "unrecognized option `-=`"),
    (&["-hé"], "unrecognized option `-é`"),
    (&["-listen", "127.0.0.1:1"], "invalid argument to option `-l`: invalid socket address syntax"),
    (&["-l"], "missing argument to option `-l`"),
    (&["-hl"], "missing argument to option `-l`"),
    (&["--listen"], "missing argument to option `--listen`"),
    (&["-L", "3", "-f"], "missing argument to option `-f`"),
    (&["--help=x"], "option `--help` does not accept an argument"),
    (&["--help="], "option `--help` does not accept an argument"),
    (&["-l", "x"], "invalid argument to option `-l`: invalid socket address syntax"),
    (&["-lx"], "invalid argument to option `-l`: invalid socket address syntax"),
    (&["-hlx"], "invalid argument to option `-l`: invalid socket address syntax"),
    (&["-l=127.0.0.1:1"], "invalid argument to option `-l`: invalid socket address syntax"),
    (&["-l", ""], "invalid argument to option `-l`: invalid socket address syntax"),
    (&["--listen="], "invalid argument to option `--listen`: invalid socket address syntax"),
    (&["--listen", "--"], "invalid argument to option `--listen`: invalid socket address syntax"),
    (&["-c", "-l"], "invalid argument to option `-c`: invalid socket address syntax"),
    (&["-c", "localhost:80"], "invalid argument to option `-c`: invalid socket address syntax"),
    (&["-c", "1.2.3.4"], "invalid argument to option `-c`: invalid socket address syntax"),
    (&["-c", "1.2.3.4:65536"], "invalid argument to option `-c`: invalid socket address syntax"),
    (&["-c", "::1:80"], "invalid argument to option `-c`: invalid socket address syntax"),
    (&["-c", "[fe80::1%lo]:80"], "invalid argument to option `-c`: invalid socket address syntax"),
    (&["-l", "a\nb"], "invalid argument to option `-l`: invalid socket address syntax"),
    (&["-L", "x"], "invalid argument to option `-L`: invalid digit found in string"),
    (&["-L=3"], "invalid argument to option `-L`: invalid digit found in string"),
    (&["-S", "-1"], "invalid argument to option `-S`: invalid digit found in string"),
    (&["-C", " 3"], "invalid argument to option `-C`: invalid digit found in string"),
    (&["-F", "0x3"], "invalid argument to option `-F`: invalid digit found in string"),
    (&["-T", ""], "invalid argument to option `-T`: cannot parse integer from empty string"),
    (
        &["--connect-netns-fd="],
        "invalid argument to option `--connect-netns-fd`: cannot parse integer from empty string",
    ),
    (
        &["--preaccepted-fd", "18446744073709551616"],
        "invalid argument to option `--preaccepted-fd`: number too large to fit in target type",
    ),
    // The first error wins, whatever its sort, and a later value does not mend it.
    (&["-L", "x", "--foo"], "invalid argument to option `-L`: invalid digit found in string"),
    (&["--foo", "-L", "x"], "unrecognized option `--foo`"),
    (&["-L", "x", "-L", "3"], "invalid argument to option `-L`: invalid digit found in string"),
    (&["-h", "-l"], "missing argument to option `-l`"),
];

/// Options that do not go together (status 1), and the text after `Error: `.
const MIXES: &[(&[&str], &str)] = &[
    (&[], "Specify exactly one of -l, -L or -S"),
    (&["--"], "Specify exactly one of -l, -L or -S"),
    (&["-c", "127.0.0.1:1"], "Specify exactly one of -l, -L or -S"),
    (&["-l", "127.0.0.1:1", "-L", "3"], "Specify exactly one of -l, -L or -S"),
    (&["-L3", "-S3", "-C3"], "Specify exactly one of -l, -L or -S"),
    (&["-f", ""], "Specify exactly one of -l, -L or -S"),
    (&["-l", "127.0.0.1:1"], "Specify exactly one of -c or -C"),
    (&["-l", "[fe80::1%1]:1"], "Specify exactly one of -c or -C"),
    (&["-L", "+3"], "Specify exactly one of -c or -C"),
    (&["-S3", "-c127.0.0.1:1", "-C3"], "Specify exactly one of -c or -C"),
    (&["-L3", "-t", "/dev/null", "-T3"], "Specify exactly one of -c or -C"),
    (&["-l127.0.0.1:1", "-f", "/dev/null", "-F3"], "Cannot specify both -f and -F simultaneously"),
    (&["-L3", "-F3", "-f/dev/null"], "Cannot specify both -f and -F simultaneously"),
    (
        &["-L3", "--listen-netns-file=/dev/null", "-C3", "-c127.0.0.1:1"],
        "Listening-side network namespace is not relevant with -L or -S",
    ),
    (&["-S3", "-F3"], "Listening-side network namespace is not relevant with -L or -S"),
    (&["-L3", "-C3", "-t/dev/null", "-T3"], "Cannot specify both -t and -T simultaneously"),
    (&["-L3", "-C3", "-T3"], "Connecting-side network namespace is not relevant with -C"),
    (&["-L3", "-C3", "-t/dev/null"], "Connecting-side network namespace is not relevant with -C"),
    // Numbers that are numbers, but no descriptor's.
    (&["-L", "2147483648"], "out of range integral type conversion attempted"),
    (&["-S18446744073709551615"], "out of range integral type conversion attempted"),
    (&["-F2147483648"], "Specify exactly one of -l, -L or -S"),
    (
        &["-L3", "-f", "/dev/null", "-F2147483648"],
        "out of range integral type conversion attempted",
    ),
    (&["-L3", "-c127.0.0.1:1", "-C4294967296"], "out of range integral type conversion attempted"),
    (&["-L3", "-T2147483648"], "Specify exactly one of -c or -C"),
    (&["-L3", "-C3", "-T2147483648"], "out of range integral type conversion attempted"),
];

#[test]
fn bad_command_lines_end_as_in_the_reference() {
    let reference = reference();
    if reference.is_none() {
        eprintln!("no reference binary (NSPLICE_REFERENCE): compared with the literals only");
    }
    let usage = USAGE.iter().map(|(args, text)| (*args, format!("{PROGRAM}: {text}"), 2));
    let mixes = MIXES.iter().map(|(args, text)| (*args, format!("Error: {text}"), 1));
    for (args, line, status) in usage.chain(mixes) {
        let output = run(Path::new(NSPLICE), args);
        let found = first_line(&output.stderr);
        let suffix = found.strip_prefix(&line);
        assert!(suffix.is_some_and(is_cause), "{args:?}: {found:?} instead of {line:?}");
        assert_eq!(output.status.code(), Some(status), "{args:?}");
        assert!(output.stdout.is_empty(), "{args:?}");
        if let Some(reference) = &reference {
            let output = run(reference, args);
            assert_eq!(first_line(&output.stderr), line, "reference, {args:?}");
            assert_eq!(output.status.code(), Some(status), "reference, {args:?}");
        }
    }
}

#[test]
fn help_wins_over_a_wrong_mix_and_goes_to_standard_output() {
    for args in [&["-h"][..], &["--help"], &["-hh"], &["-L3", "-S3", "--help"], &["-hL3"]] {
        let output = run(Path::new(NSPLICE), args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert_eq!(first_line(&output.stdout), format!("Usage: {PROGRAM} [OPTIONS]"));
        assert!(output.stderr.is_empty(), "{args:?}");
        if let Some(reference) = reference() {
            let output = run(&reference, args);
            assert_eq!(first_line(&output.stderr), format!("Usage: {PROGRAM} [OPTIONS]"));
            assert_eq!(output.status.code(), Some(0), "{args:?}");
        }
    }
}

#[test]
fn version_goes_to_standard_output() {
    let output = run(Path::new(NSPLICE), &["--version"]);
    assert_eq!(output.stdout, concat!("nsplice ", env!("CARGO_PKG_VERSION"), "\n").as_bytes());
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn help_that_nobody_reads_to_the_end_is_no_failure_but_help_that_is_lost_is() {
    let status_with = |stdout: Stdio| {
        let mut help = Command::new(NSPLICE);
        help.arg("--help").stdout(stdout).stderr(Stdio::null()).status().unwrap().code()
    };
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    assert_eq!(status_with(writer.into()), Some(0));
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    assert_eq!(status_with(full.into()), Some(4));
}

/// What we may add to the reference's line: a parenthesis.
fn is_cause(suffix: &str) -> bool {
    suffix.is_empty() || (suffix.starts_with(" (") && suffix.ends_with(')'))
}

fn run(program: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.arg0(PROGRAM).args(args).stdin(Stdio::null());
    command.output().unwrap_or_else(|error| panic!("{}: {error}", program.display()))
}

fn first_line(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).lines().next().unwrap_or_default().to_owned()
}

fn reference() -> Option<PathBuf> {
    let named = env::var_os("NSPLICE_REFERENCE").map(PathBuf::from);
    let usual = concat!(env!("CARGO_MANIFEST_DIR"), "/target/reference/bin/netns_tcp_bridge");
    named.or_else(|| Some(PathBuf::from(usual)).filter(|path| path.exists()))
}
