//! How the values of options are written.
//!
//! Addresses and numbers use the standard library's syntax and error texts: they are the ones
//! netns_tcp_bridge has. A refusal here is a reason alone; the normaliser adds which option, the
//! value and the form wanted.

use std::num::ParseIntError;
use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::config::{Engine, Handoff, Keepalive, NetnsGone, NetnsSource, SummaryFormat, Transfer};

/// More threads than CPUs only cost; more CPUs than this no `cpu_set_t` can name.
const WORKERS: RangeInclusive<usize> = 1..=1024;
/// `CPU_SETSIZE` of sched_setaffinity(2): the affinity calls know no CPU from this one on.
const CPU_LIMIT: usize = 1024;
/// From one page, the least a pipe holds, to 1 GiB, far above any `fs.pipe-max-size`.
const PIPE_SIZE_BYTES: RangeInclusive<u64> = 4096..=1 << 30;

/// More than any machine holds: two descriptors and some kilobytes of kernel memory each.
const CONNECTIONS: RangeInclusive<u32> = 1..=10_000_000;
/// listen(2) takes an `int`.
const BACKLOG: RangeInclusive<u32> = 1..=i32::MAX as u32;
/// tcp(7), MAX_TCP_KEEPIDLE and MAX_TCP_KEEPINTVL.
const KEEPALIVE_S: RangeInclusive<u32> = 1..=32_767;
/// MAX_TCP_KEEPCNT.
const KEEPALIVE_COUNT: RangeInclusive<u32> = 1..=127;

/// A worker that does not sleep for a second when nothing happens would not ever.
const MAX_MICROSECONDS: u32 = 1_000_000;

/// A day: longer times are mistakes.
const MAX_SECONDS: f64 = 86_400.0;

/// Number of worker threads, 1 to 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workers(pub usize);

/// CPU numbers, each once, in the order typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuList(pub Vec<usize>);

/// A time, typed in seconds with or without a fraction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seconds {
    /// In milliseconds.
    pub ms: u32,
}

/// Number of connections, 1 to 10,000,000.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connections(pub u32);

/// Length of a queue, 1 to what listen(2) can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backlog(pub u32);

/// A time in microseconds, up to a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Microseconds(pub u32);

/// Size of a pipe in bytes, 4096 to 1 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PipeSize(pub u32);

impl FromStr for Workers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let workers = number(text)?;
        if WORKERS.contains(&workers) { Ok(Self(workers)) } else { Err("out of range".into()) }
    }
}

impl FromStr for CpuList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut cpus = Vec::new();
        for item in text.split(',') {
            let (first, last) = item.split_once('-').unwrap_or((item, item));
            let range = cpu(first)?..=cpu(last)?;
            if range.is_empty() {
                return Err(format!("the range {item} ends before it starts"));
            }
            for cpu in range {
                if !cpus.contains(&cpu) {
                    cpus.push(cpu);
                }
            }
        }
        Ok(Self(cpus))
    }
}

fn cpu(text: &str) -> Result<usize, String> {
    let cpu = number(text)?;
    if cpu < CPU_LIMIT { Ok(cpu) } else { Err(format!("no CPU has the number {cpu}")) }
}

impl FromStr for PipeSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (digits, unit_bytes) = if let Some(digits) = text.strip_suffix('K') {
            (digits, 1 << 10)
        } else if let Some(digits) = text.strip_suffix('M') {
            (digits, 1 << 20)
        } else {
            (text, 1)
        };
        number::<u64>(digits)?
            .checked_mul(unit_bytes)
            .filter(|bytes| PIPE_SIZE_BYTES.contains(bytes))
            .and_then(|bytes| u32::try_from(bytes).ok())
            .map(Self)
            .ok_or_else(|| "out of range".into())
    }
}

impl FromStr for Seconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // Rust's floats have more spellings than a time has: "inf", "1e3", "+1".
        if text.chars().any(|char| !char.is_ascii_digit() && char != '.') {
            return Err("invalid digit found in string".into());
        }
        let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
        if seconds > MAX_SECONDS {
            return Err("out of range".into());
        }
        Ok(Self { ms: (seconds * 1000.0).round() as u32 })
    }
}

impl FromStr for Connections {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        ranged(text, CONNECTIONS).map(Self)
    }
}

impl FromStr for Backlog {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        ranged(text, BACKLOG).map(Self)
    }
}

impl FromStr for Keepalive {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self::Off);
        }
        let numbers: Vec<_> = text.split(',').collect();
        let [idle, interval, count] = numbers[..] else {
            return Err("not three numbers".into());
        };
        Ok(Self::Set {
            idle_s: ranged(idle, KEEPALIVE_S)?,
            interval_s: ranged(interval, KEEPALIVE_S)?,
            count: ranged(count, KEEPALIVE_COUNT)?,
        })
    }
}

fn ranged(text: &str, range: RangeInclusive<u32>) -> Result<u32, String> {
    let value = number(text)?;
    if range.contains(&value) { Ok(value) } else { Err("out of range".into()) }
}

impl FromStr for Microseconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let us = number(text)?;
        if us <= MAX_MICROSECONDS { Ok(Self(us)) } else { Err("out of range".into()) }
    }
}

impl FromStr for NetnsSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("pid:").map(number) {
            None => Ok(Self::Path(text.into())),
            Some(Ok(0)) => Err("process ids start at 1".into()),
            Some(pid) => pid.map(Self::Pid),
        }
    }
}

impl FromStr for NetnsGone {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "keep" => Ok(Self::Keep),
            "exit" => Ok(Self::Exit),
            "reopen" => Ok(Self::Reopen),
            _ => Err(UNKNOWN_WORD.into()),
        }
    }
}

impl FromStr for Handoff {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "socket" => Ok(Self::Socket),
            "connections" => Ok(Self::Connections),
            _ => Err(UNKNOWN_WORD.into()),
        }
    }
}

impl FromStr for Engine {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "uring" => Ok(Self::Uring),
            "epoll" => Ok(Self::Epoll),
            _ => Err(UNKNOWN_WORD.into()),
        }
    }
}

impl FromStr for Transfer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "copy" => Ok(Self::Copy),
            "splice" => Ok(Self::Splice),
            _ => Err(UNKNOWN_WORD.into()),
        }
    }
}

impl FromStr for SummaryFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "json" { Ok(Self::Json) } else { Err(UNKNOWN_WORD.into()) }
    }
}

const UNKNOWN_WORD: &str = "unknown word";

fn number<T: FromStr<Err = ParseIntError>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|error: ParseIntError| error.to_string())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_cpu_list_keeps_its_order_and_drops_duplicates() {
        let cpus = |text: &str| text.parse().map(|CpuList(cpus)| cpus);
        assert_eq!(cpus("0-2,5"), Ok(vec![0, 1, 2, 5]));
        assert_eq!(cpus("7,3-4,4,7,0"), Ok(vec![7, 3, 4, 0]));
        assert_eq!(cpus("1023"), Ok(vec![1023]));
        assert_eq!(cpus("3-3"), Ok(vec![3]));
    }

    #[test]
    fn a_bad_cpu_list_says_why() {
        let reason = |text: &str| text.parse::<CpuList>().unwrap_err();
        assert_eq!(reason("1024"), "no CPU has the number 1024");
        assert_eq!(reason("0-4294967295"), "no CPU has the number 4294967295");
        assert_eq!(reason("0,5-2"), "the range 5-2 ends before it starts");
        for empty in ["", ",", "0,", "1-", "-1"] {
            assert_eq!(reason(empty), "cannot parse integer from empty string", "{empty:?}");
        }
        for bad in ["0-1-2", "x", " 1", "1;2"] {
            assert_eq!(reason(bad), "invalid digit found in string", "{bad:?}");
        }
    }

    #[test]
    fn a_pipe_size_is_in_bytes_kib_or_mib() {
        let bytes = |text: &str| text.parse().map(|PipeSize(bytes)| bytes).ok();
        assert_eq!(bytes("4096"), Some(4096));
        assert_eq!(bytes("4K"), Some(4096));
        assert_eq!(bytes("65537"), Some(65537));
        assert_eq!(bytes("1M"), Some(1_048_576));
        assert_eq!(bytes("1024M"), Some(1_073_741_824));
        let bad =
            ["4095", "3K", "1025M", "1073741825", "18446744073709551615M", "", "K", "1G", "1k"];
        for text in bad {
            assert_eq!(bytes(text), None, "{text:?}");
        }
    }

    #[test]
    fn seconds_may_have_a_fraction() {
        let ms = |text: &str| text.parse().map(|Seconds { ms }| ms).ok();
        assert_eq!(ms("5"), Some(5000));
        assert_eq!(ms("0.25"), Some(250));
        assert_eq!(ms("0"), Some(0));
        assert_eq!(ms("86400"), Some(86_400_000));
        for text in ["", ".", "-1", "+1", "1e3", "inf", "NaN", "86400.1", "1s", "1.2.3"] {
            assert_eq!(ms(text), None, "{text:?}");
        }
    }

    #[test]
    fn keepalive_is_three_numbers_or_off() {
        let keepalive = |text: &str| text.parse::<Keepalive>().ok();
        assert_eq!(keepalive("off"), Some(Keepalive::Off));
        let set = Keepalive::Set { idle_s: 60, interval_s: 10, count: 6 };
        assert_eq!(keepalive("60,10,6"), Some(set));
        for text in ["", "on", "60", "60,10", "60,10,6,1", "0,1,1", "1,1,128", "32768,1,1", "a,b,c"]
        {
            assert_eq!(keepalive(text), None, "{text:?}");
        }
    }

    #[test]
    fn connections_and_backlog_have_limits() {
        assert_eq!("1".parse().map(|Connections(count)| count), Ok(1));
        assert_eq!("10000000".parse().map(|Connections(count)| count), Ok(10_000_000));
        for text in ["0", "-1", "", "10000001"] {
            assert!(text.parse::<Connections>().is_err(), "{text:?}");
        }
        assert_eq!("2147483647".parse().map(|Backlog(count)| count), Ok(2_147_483_647));
        assert!("0".parse::<Backlog>().is_err() && "2147483648".parse::<Backlog>().is_err());
    }

    #[test]
    fn microseconds_are_whole_and_at_most_a_second() {
        let us = |text: &str| text.parse().map(|Microseconds(us)| us).ok();
        assert_eq!(us("0"), Some(0));
        assert_eq!(us("1000000"), Some(1_000_000));
        for text in ["1000001", "-1", "", "0.5", "50us"] {
            assert_eq!(us(text), None, "{text:?}");
        }
    }

    #[test]
    fn workers_are_limited() {
        let workers = |text: &str| text.parse().map(|Workers(workers)| workers).ok();
        assert_eq!(workers("1"), Some(1));
        assert_eq!(workers("1024"), Some(1024));
        for text in ["0", "1025", "-1", "", "two"] {
            assert_eq!(workers(text), None, "{text:?}");
        }
    }

    #[test]
    fn only_a_pid_prefix_makes_a_process_of_a_namespace() {
        let netns = |text: &str| text.parse::<NetnsSource>();
        assert_eq!(netns("pid:1234"), Ok(NetnsSource::Pid(1234)));
        for path in ["/proc/1/ns/net", "blue", "./pid:1", "PID:1", "pid", ""] {
            assert_eq!(netns(path), Ok(NetnsSource::Path(path.into())));
        }
        for bad in ["pid:", "pid:0", "pid:-1", "pid:x", "pid:1 ", "pid:4294967296"] {
            assert!(netns(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn words_are_taken_whole() {
        assert_eq!("connections".parse(), Ok(Handoff::Connections));
        assert_eq!("splice".parse(), Ok(Transfer::Splice));
        assert_eq!("epoll".parse(), Ok(Engine::Epoll));
        assert_eq!("json".parse(), Ok(SummaryFormat::Json));
        assert!("sock".parse::<Handoff>().is_err());
        assert!("Auto".parse::<Transfer>().is_err());
        assert!("".parse::<SummaryFormat>().is_err());
    }
}
