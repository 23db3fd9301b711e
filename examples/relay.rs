//! The baselines of `benches/relay.rs` as a program, for measurements between two namespaces:
//! `cargo run --release --example relay -- --kind epoll-splice -f NETNS -l ADDR -t NETNS -c ADDR`.

use std::process::ExitCode;

#[path = "../benches/relay/contenders.rs"]
mod contenders;

fn main() -> ExitCode {
    contenders::main()
}
