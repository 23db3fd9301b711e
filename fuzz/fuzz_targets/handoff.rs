#![no_main]

#[path = "../bodies/handoff.rs"]
mod handoff;

libfuzzer_sys::fuzz_target!(|data: &[u8]| handoff::run(data));
