#![no_main]

#[path = "../bodies/flow.rs"]
mod flow;

libfuzzer_sys::fuzz_target!(|data: &[u8]| flow::run(data));
