//! What the program says about itself: `--help`, `--version` and the man page.
//!
//! Everything about options comes from the table, everything about exit statuses from
//! [`Kind`]; this module only lays it out.

use std::fmt::Write;

use super::options::{Opt, SECTIONS};
use crate::error::Kind;

const NAME: &str = env!("CARGO_PKG_NAME");
const RELEASE: &str = env!("CARGO_PKG_VERSION");

const SUMMARY: &str = "forward TCP connections from one Linux network namespace to another";
const EXAMPLE: &str = "-f blue -l 0.0.0.0:8080 -t red -c 10.0.0.2:80";
const STATUS_ZERO: &str =
    "ended by SIGINT, SIGTERM or --takeover, or forwarded the only connection";

/// Width of a terminal nobody has resized, in columns.
const WIDTH: usize = 80;
/// Column where the descriptions of options start; the longest option fits before it.
const HELP_COLUMN: usize = 36;

/// The text of `--help`, final newline included. `program` is argv\[0\].
pub fn help(program: &str) -> String {
    let mut text = format!("Usage: {program} [OPTIONS]\n\n{NAME}: {SUMMARY}.\n");
    for section in SECTIONS {
        text += &format!("\n{}:\n", section.title);
        for option in section.options {
            let mut left = invocation(option);
            let default = option.default.map(|text| format!("[default: {text}]"));
            let words = option.help.split(' ').chain(default.as_deref());
            for line in wrap(words, WIDTH - HELP_COLUMN) {
                let _ = writeln!(text, "{left:HELP_COLUMN$}{line}");
                left.clear();
            }
        }
    }
    text += "\nExit status:\n";
    for (status, meaning) in statuses() {
        text += &format!("  {status}  {meaning}\n");
    }
    text += &format!("\nExample:\n  {program} {EXAMPLE}\n");
    text
}

/// The text of `--version`, final newline included.
pub fn version() -> String {
    format!("{NAME} {RELEASE}\n")
}

/// The long names of all options, with their dashes.
pub fn long_options() -> impl Iterator<Item = &'static str> {
    super::options::all().map(|option| option.long)
}

/// `  -l, --listen IP:PORT`
fn invocation(option: &Opt) -> String {
    let short = option.short.map_or("    ".to_owned(), |short| format!("-{short}, "));
    let value = option.value.as_ref().map_or(String::new(), |value| format!(" {}", value.name));
    format!("  {short}{}{value}", option.long)
}

fn statuses() -> impl Iterator<Item = (u8, &'static str)> {
    let failures = Kind::ALL.into_iter().map(|kind| (kind.status(), kind.describe()));
    [(0, STATUS_ZERO)].into_iter().chain(failures)
}

/// Sets words in lines of at most `width` columns, longer words apart.
fn wrap<'a>(words: impl Iterator<Item = &'a str>, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in words {
        match lines.last_mut() {
            Some(line) if line.len() + 1 + word.len() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// The man page, in roff, final newline included.
pub fn man() -> String {
    let mut page = format!(
        ".\\\" Generated from the table of options; see tests/docs.rs.\n\
         .TH {} 1 \"\" \"{NAME} {RELEASE}\"\n\
         .SH NAME\n{NAME} \\- {}\n\
         .SH SYNOPSIS\n.B {NAME}\n[\\fIOPTIONS\\fR]\n\
         .SH DESCRIPTION\n",
        NAME.to_uppercase(),
        roff(SUMMARY),
    );
    for paragraph in DESCRIPTION {
        page += &format!(".PP\n{}\n", roff(paragraph));
    }
    page += ".SH OPTIONS\n";
    for section in SECTIONS {
        page += &format!(".SS {}\n", roff(section.title));
        for option in section.options {
            page += &format!(".TP\n{}\n{}.\n", roff_invocation(option), roff(option.help));
            if let Some(default) = option.default {
                page += &format!("Default: {}.\n", roff(default));
            }
        }
    }
    page += ".SH EXIT STATUS\n";
    for (status, meaning) in statuses() {
        page += &format!(".TP\n.B {status}\n{}\n", roff(meaning));
    }
    page += &format!(".SH EXAMPLE\n.nf\n{NAME} {}\n.fi\n", roff(EXAMPLE));
    page += ".SH SEE ALSO\n.BR ip\\-netns (8),\n.BR network_namespaces (7),\n.BR setns (2)\n";
    page
}

const DESCRIPTION: &[&str] = &[
    "Accepts TCP connections in one network namespace and forwards each to an address reached from \
     another. Without -f, -F, -t or -T it is an ordinary forwarder in the caller's namespace.",
    "The options and modes of netns_tcp_bridge mean here what they mean there.",
    "The value of an option may be given as --option VALUE, --option=VALUE, -o VALUE or -oVALUE. \
     Of an option given more than once the last value counts. Names cannot be abbreviated.",
    "A namespace option belongs to -l or -c; the sockets of -L, -S and -C already have a \
     namespace. -f excludes -F, and -t excludes -T.",
];

/// `\fB-l\fR, \fB--listen\fR \fIIP:PORT\fR`
fn roff_invocation(option: &Opt) -> String {
    let short = option.short.map_or(String::new(), |short| format!("\\fB\\-{short}\\fR, "));
    let value = option
        .value
        .as_ref()
        .map_or(String::new(), |value| format!(" \\fI{}\\fR", roff(value.name)));
    format!("{short}\\fB{}\\fR{value}", roff(option.long))
}

/// Text as roff shows it unchanged: hyphens can be copied, nothing starts a request.
fn roff(text: &str) -> String {
    let escaped = text.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq");
    if escaped.starts_with('.') { format!("\\&{escaped}") } else { escaped }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_fits_a_terminal() {
        for line in help(NAME).lines() {
            assert!(line.is_ascii() && line.len() <= WIDTH, "{line}");
            assert_eq!(line, line.trim_end());
        }
    }

    #[test]
    fn help_shows_spellings_defaults_and_exit_statuses() {
        let help = help("./x/nsplice");
        for part in [
            "Usage: ./x/nsplice [OPTIONS]\n",
            "\n  -l, --listen IP:PORT              Bind",
            "\n      --handoff socket|connections  Pass",
            "[default: socket]",
            "[default: 1M]",
            "\n  0  ended by SIGINT, SIGTERM or --takeover, or forwarded the only connection\n",
            "\n  2  the command line cannot be parsed\n",
            "\n  7  one of the two processes died\n",
        ] {
            assert!(help.contains(part), "{part:?} is not in\n{help}");
        }
    }

    #[test]
    fn the_man_page_shows_spellings_and_escapes_them() {
        let man = man();
        for part in [
            "\n.TP\n\\fB\\-l\\fR, \\fB\\-\\-listen\\fR \\fIIP:PORT\\fR\nBind",
            "\n.TP\n\\fB\\-\\-no\\-pin\\fR\nLet workers run on any CPU. ",
            "\nDefault: the caller\\(aqs.\n",
            "\n.TP\n.B 6\nthe only connection (\\-S or \\-C) failed\n",
        ] {
            assert!(man.contains(part), "{part:?} is not in\n{man}");
        }
    }

    #[test]
    fn words_fill_lines_and_are_never_broken() {
        assert_eq!(wrap(["ab", "cd", "ef"].into_iter(), 5), ["ab cd", "ef"]);
        assert_eq!(wrap(["abc defg", "h"].into_iter(), 5), ["abc defg", "h"]);
    }

    #[test]
    fn the_version_is_a_name_and_a_number() {
        assert!(version().starts_with("nsplice ") && version().ends_with('\n'));
    }
}
