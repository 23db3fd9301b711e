//! The bodies of the fuzz targets on their seeds and on some thousand generated inputs, so that a
//! plain test run exercises them too. `scripts/fuzz` looks for more, guided by coverage.

#![allow(clippy::unwrap_used)]

#[path = "../fuzz/bodies/argv.rs"]
mod argv;
#[path = "../fuzz/bodies/flow.rs"]
mod flow;
#[path = "../fuzz/bodies/handoff.rs"]
mod handoff;

use std::panic::{catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Generated inputs per target.
const COUNT: u32 = 5000;
/// Longest input made from nothing.
const LENGTH_MAX: u64 = 300;

/// One at a time: `handoff` takes away the process's descriptors.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

#[test]
fn argv_seeds_and_generated_inputs() {
    exercise("argv", &dictionary("argv.dict"), argv::run);
}

#[test]
fn flow_seeds_and_generated_inputs() {
    exercise("flow", &[], flow::run);
}

#[test]
fn handoff_seeds_and_generated_inputs() {
    exercise("handoff", &[b"RLSAC".to_vec()], handoff::run);
}

fn exercise(target: &str, words: &[Vec<u8>], run: fn(&[u8])) {
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let seeds = seeds(target);
    for seed in &seeds {
        check(target, seed, run);
    }
    let mut random = Random(1);
    for _ in 0..COUNT {
        check(target, &generate(&mut random, &seeds, words), run);
    }
}

fn check(target: &str, input: &[u8], run: fn(&[u8])) {
    if let Err(panic) = catch_unwind(|| run(input)) {
        eprintln!("{target} fails with the input {}", input.escape_ascii());
        resume_unwind(panic);
    }
}

/// Random bytes, or a seed with some changes.
fn generate(random: &mut Random, seeds: &[Vec<u8>], words: &[Vec<u8>]) -> Vec<u8> {
    if random.below(3) == 0 {
        return (0..random.below(LENGTH_MAX)).map(|_| random.next() as u8).collect();
    }
    let mut input = random.one_of(seeds).clone();
    for _ in 0..1 + random.below(8) {
        let at = random.below(input.len() as u64 + 1) as usize;
        match random.below(4) {
            0 if at < input.len() => input[at] = random.next() as u8,
            1 if at < input.len() => drop(input.remove(at)),
            2 => {
                let other = if words.is_empty() { seeds } else { words };
                let word = random.one_of(other).clone();
                input.splice(at..at, word);
            }
            _ => input.insert(at, random.next() as u8),
        }
    }
    input
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

/// In the same order everywhere.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let entries = std::fs::read_dir(directory().join("seeds").join(target)).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// The words of a dictionary of libFuzzer's: `"word"`, with `\xNN` for any byte.
fn dictionary(name: &str) -> Vec<Vec<u8>> {
    let text = std::fs::read_to_string(directory().join(name)).unwrap();
    let quoted = text.lines().filter_map(|line| line.strip_prefix('"')?.strip_suffix('"'));
    quoted
        .map(|word| {
            let mut parts = word.split("\\x");
            let mut bytes = parts.next().unwrap().as_bytes().to_vec();
            for part in parts {
                let (hex, rest) = part.split_at(2);
                bytes.push(u8::from_str_radix(hex, 16).unwrap());
                bytes.extend(rest.as_bytes());
            }
            bytes
        })
        .collect()
}

/// A small deterministic generator (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn one_of<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len() as u64) as usize]
    }
}
