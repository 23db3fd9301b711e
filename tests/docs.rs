//! The man page and the README say what the program says.
//!
//! `NSPLICE_BLESS=1 cargo test --test docs` rewrites both from the table of options.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::{env, fs};

use nsplice::cli;

const HELP_START: &str = "<!-- help -->\n";
const HELP_END: &str = "\n<!-- /help -->\n";

#[test]
fn the_man_page_is_the_generated_one() {
    check("docs/nsplice.1", |_| cli::man());
}

#[test]
fn the_usage_block_of_the_readme_is_the_help() {
    let readme = check("README.md", |readme| {
        let (before, rest) = readme.split_once(HELP_START).expect("no <!-- help --> line");
        let (_, after) = rest.split_once(HELP_END).expect("no <!-- /help --> line");
        let help = cli::help("nsplice");
        format!("{before}{HELP_START}```text\n{help}```{HELP_END}{after}")
    });
    assert_mentions_every_option("README.md", &readme);
}

#[test]
fn help_mentions_every_option() {
    assert_mentions_every_option("--help", &cli::help("nsplice"));
}

fn assert_mentions_every_option(name: &str, text: &str) {
    let words: Vec<&str> = text.split(|c: char| !(c.is_alphanumeric() || c == '-')).collect();
    for option in cli::long_options() {
        assert!(words.contains(&option), "{name} does not mention {option}");
    }
}

/// Compares a file with what it should hold, or makes it so when blessing; returns that.
fn check(name: &str, wanted: impl Fn(&str) -> String) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    let found = fs::read_to_string(&path).unwrap_or_default();
    let wanted = wanted(&found);
    if env::var_os("NSPLICE_BLESS").is_some_and(|bless| bless == "1") {
        fs::write(&path, &wanted).unwrap();
    } else if found != wanted {
        panic!("{name} is out of date: NSPLICE_BLESS=1 cargo test --test docs");
    }
    wanted
}
