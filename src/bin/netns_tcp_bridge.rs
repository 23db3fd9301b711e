//! The `nsplice` command under the name of the tool it replaces.

use std::process::ExitCode;

fn main() -> ExitCode {
    nsplice::main()
}
