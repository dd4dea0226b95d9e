//! Who has a file open, for messages that say "in use".

use std::fs;
use std::path::Path;

use crate::error::{Error, ErrorKind};

/// The error with who has the file open that it is about, as far as that can be seen.
pub fn naming_them(error: Error) -> Error {
    if error.kind() != ErrorKind::Busy {
        return error;
    }
    match error.path().and_then(holder) {
        Some(who) => error.hinting(Some(format!("{who} has it open"))),
        None => error,
    }
}

/// A process that has the file at `path` open. Names alone are read, which never waits for a file system.
fn holder(path: &Path) -> Option<String> {
    let wanted = fs::canonicalize(path).ok()?;
    let own = std::process::id().to_string();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let number = process.file_name();
        let Some(number) = number.to_str().filter(|n| n.bytes().all(|b| b.is_ascii_digit())) else {
            continue;
        };
        let open = fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
        let mut open = open.filter_map(|file| fs::read_link(file.path()).ok());
        if number != own && open.any(|file| file == wanted) {
            let program = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("process {number} ({})", program.trim()));
        }
    }
    None
}
