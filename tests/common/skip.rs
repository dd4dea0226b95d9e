//! Tests that cannot run here, said past the test harness, which keeps what passing tests print.

use std::fmt::Display;
use std::io::Write;

/// Says that the test of this thread, or a part of it, cannot run here; fails where that is not allowed
/// (`FLATDISK_REQUIRE_TOOLS=1`).
pub fn skip(reason: impl Display) {
    let required = std::env::var_os("FLATDISK_REQUIRE_TOOLS").is_some_and(|value| value == "1");
    assert!(!required, "cannot run, and FLATDISK_REQUIRE_TOOLS=1 forbids skipping: {reason}");
    let thread = std::thread::current();
    let line = format!("SKIPPED: {}: {reason}\n", thread.name().unwrap_or("a part of a test"));
    // Not by `eprintln!`, which the harness captures.
    let _ = std::io::stderr().write_all(line.as_bytes());
}
