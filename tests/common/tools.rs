//! Programs from outside.

use std::path::Path;
use std::process::{Command, Output};

/// Whether a program answers; says SKIPPED if not.
pub fn have(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        super::skip(format_args!("{program} is not installed"));
    }
    found
}

/// Runs a program that must succeed; what it printed.
pub fn run(command: &mut Command) -> String {
    let output = output(command);
    assert!(output.status.success(), "{command:?} failed: {}", both(&output));
    both(&output)
}

/// Runs a program, whatever comes of it.
pub fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

/// All that a program printed.
pub fn both(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}

/// Unpacks a zstd file.
pub fn unpack(from: &Path, to: &Path) {
    run(Command::new("zstd").args(["-dqf", "--sparse"]).arg(from).arg("-o").arg(to));
}
