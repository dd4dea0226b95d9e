//! The `flatdisk` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    flatdisk::cli::run()
}
