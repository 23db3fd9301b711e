//! The `nsplice` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    nsplice::main()
}
