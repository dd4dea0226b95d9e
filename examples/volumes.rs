//! What is on the disks of images: `cargo run --example volumes server.vhdx`.
//!
//! Every partition, or the disk where it has none, is a `Window`; a `Cursor` over one gives it to
//! crates that read file systems by `std::io`.

use std::fmt::Write;
use std::io::Read;
use std::path::Path;
use std::process::ExitCode;

use flatdisk::formats::{self, OpenOptions};
use flatdisk::storage::Access;
use flatdisk::storage::file::HostFs;
use flatdisk::volumes::{Content, volumes};
use flatdisk::{Cursor, Error, Result};

#[allow(dead_code, reason = "a test lists by itself")]
fn main() -> ExitCode {
    for path in std::env::args_os().skip(1) {
        match list(path.as_ref()) {
            Ok(text) => print!("{text}"),
            Err(e) => {
                eprintln!("{e}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

/// One line for every volume of the image at `path`.
pub fn list(path: &Path) -> Result<String> {
    let image = formats::open(&HostFs::shared(), path, &OpenOptions::new(Access::Read))?;
    let found = volumes(&image.disk)?;
    let mut text = String::new();
    if let Some(content) = &found.content {
        let _ = writeln!(text, "disk: 0..{}, {}", found.size, words(content));
    }
    for partition in &found.partitions {
        let (start, end) = (partition.start, partition.start + partition.size);
        let content = partition.content.as_ref().map(words).unwrap_or_default();
        let _ = write!(text, "partition {}: {start}..{end}, {content}", partition.number);
        // Any reader takes a cursor.
        let mut boot = [0; 16];
        let mut cursor = Cursor::new(image.disk.slice(found.place(Some(partition.number))?)?);
        cursor.read_exact(&mut boot).map_err(|e| Error::io("reading", &e))?;
        let _ = writeln!(text, ", begins with {boot:02x?}");
    }
    Ok(text)
}

fn words(content: &Content) -> String {
    let kind = content.type_name.unwrap_or("nothing known");
    match &content.label {
        Some(label) => format!("{kind} `{}`", label.escape_debug()),
        None => kind.to_owned(),
    }
}
