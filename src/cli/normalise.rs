//! From any accepted spelling to one: generic code over the table of options.
//!
//! The grammar is netns_tcp_bridge's (that of gumdrop), which scripts written for it rely on and
//! which argh lacks: `--opt VALUE`, `--opt=VALUE`, `-o VALUE`, `-oVALUE`, bundled switches as in
//! `-vlVALUE`, and `--` to end options. A value is taken whatever it looks like. The error texts
//! are the original's too, and so is which one appears: the first in the order of argv, a refused
//! value included.

use std::ffi::OsString;
use std::vec::IntoIter;

use super::options::{Opt, Value, by_long, by_short};
use crate::error::{Error, Kind, Result};

/// An option as it was typed, whatever the spelling.
pub(super) struct Typed {
    pub(super) option: &'static Opt,
    /// Present exactly when the option takes a value.
    pub(super) value: Option<String>,
}

/// Reads an argv, program name included: each option once, with the last of its values.
pub(super) fn normalise(argv: Vec<OsString>) -> Result<Vec<Typed>> {
    let mut parser = Parser { rest: utf8(argv)?.into_iter(), typed: Vec::new() };
    while let Some(arg) = parser.rest.next() {
        if arg == "--" {
            if let Some(free) = parser.rest.next() {
                return Err(unexpected(&free));
            }
        } else if arg.starts_with("--") {
            parser.long(&arg)?;
        } else if let Some(bundle) = arg.strip_prefix('-').filter(|bundle| !bundle.is_empty()) {
            parser.bundle(bundle)?;
        } else {
            return Err(unexpected(&arg));
        }
    }
    Ok(parser.typed)
}

/// The arguments after the program name, all of them text: the original aborts when one is not.
fn utf8(argv: Vec<OsString>) -> Result<Vec<String>> {
    let text = |arg: OsString| {
        arg.into_string().map_err(|arg| usage(format!("argument {arg:?} is not valid UTF-8")))
    };
    argv.into_iter().skip(1).map(text).collect()
}

struct Parser {
    rest: IntoIter<String>,
    typed: Vec<Typed>,
}

impl Parser {
    /// `--opt`, `--opt VALUE` or `--opt=VALUE`.
    fn long(&mut self, arg: &str) -> Result<()> {
        let (name, glued) = match arg.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (arg, None),
        };
        let option = by_long(name).ok_or_else(|| unrecognized(name))?;
        if option.value.is_none() && glued.is_some() {
            return Err(usage(format!("option `{name}` does not accept an argument")));
        }
        self.push(option, name, glued)
    }

    /// `-abc`: switches, up to one that takes a value, which is the rest or the next argument.
    fn bundle(&mut self, bundle: &str) -> Result<()> {
        let mut letters = bundle.chars();
        while let Some(letter) = letters.next() {
            let name = format!("-{letter}");
            let option = by_short(letter).ok_or_else(|| unrecognized(&name))?;
            if option.value.is_none() {
                self.push(option, &name, None)?;
                continue;
            }
            let glued = Some(letters.as_str()).filter(|rest| !rest.is_empty());
            return self.push(option, &name, glued.map(str::to_owned));
        }
        Ok(())
    }

    /// Records an option spelled `name`; a value that is not `glued` to it is the next argument.
    fn push(&mut self, option: &'static Opt, name: &str, glued: Option<String>) -> Result<()> {
        let wanted = option.value.as_ref();
        let value = wanted.map(|wanted| self.value(wanted, name, glued)).transpose()?;
        self.typed.retain(|typed| typed.option.long != option.long);
        self.typed.push(Typed { option, value });
        Ok(())
    }

    fn value(&mut self, wanted: &Value, name: &str, glued: Option<String>) -> Result<String> {
        let value = glued.or_else(|| self.rest.next()).ok_or_else(|| missing(name))?;
        (wanted.check)(&value).map_err(|reason| invalid(name, &value, wanted, &reason))?;
        Ok(value)
    }
}

fn unexpected(free: &str) -> Error {
    usage(format!("unexpected free argument `{free}`"))
}

fn unrecognized(name: &str) -> Error {
    usage(format!("unrecognized option `{name}`"))
}

fn missing(name: &str) -> Error {
    usage(format!("missing argument to option `{name}`"))
}

/// The parenthesis is ours: the original leaves out which value, and what would have been one.
fn invalid(name: &str, value: &str, wanted: &Value, reason: &str) -> Error {
    let form = wanted.form;
    usage(format!("invalid argument to option `{name}`: {reason} ({value:?} is not {form})"))
}

fn usage(text: String) -> Error {
    Error::new(Kind::Usage, text)
}
