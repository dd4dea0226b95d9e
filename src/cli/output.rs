//! What commands print: sizes for people, JSON for programs.

use std::ffi::OsString;
use std::fmt::Display;
use std::io::Write;
use std::path::Path;

use clap::{ArgMatches, Args, ValueEnum};
use parse_size::Config;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::formats;
use crate::names::{acts, printable};

/// How a command prints its result.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct OutputArgs {
    /// Print JSON: stable names, sizes in bytes.
    #[arg(long, short = 'J')]
    json: bool,
    /// The same as --json in qemu-img's spelling.
    #[arg(long, value_name = "FORMAT", default_value = "human", hide_default_value = true)]
    output: OutputFormat,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum OutputFormat {
    #[default]
    Human,
    Json,
}

impl OutputArgs {
    /// Whether to print JSON.
    pub fn json(self) -> bool {
        self.json || self.output == OutputFormat::Json
    }
}

/// Whether the arguments of a command ask for JSON; it may have no such option.
pub fn wants_json(arguments: &ArgMatches) -> bool {
    let flag = matches!(arguments.try_get_one("json"), Ok(Some(true)));
    let format = arguments.try_get_one("output").ok().flatten();
    flag || format == Some(&OutputFormat::Json)
}

/// Whether arguments that may be wrong ask for JSON.
pub fn asks_for_json(arguments: &[OsString]) -> bool {
    let words = arguments.iter().skip(1).take_while(|word| *word != "--");
    let mut words = words.map(|word| word.as_encoded_bytes());
    words.any(|word| {
        let short = word.starts_with(b"-") && !word.starts_with(b"--") && word.contains(&b'J');
        short || word == b"--json" || word == b"--output=json"
    })
}

/// A failure in JSON.
#[derive(Debug, Serialize)]
pub struct Failure {
    kind: &'static str,
    /// As far as it is text.
    file: Option<String>,
    /// In the file.
    offset: Option<u64>,
    what: String,
    hint: Option<String>,
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        Self {
            kind: error.kind().name(),
            file: error.path().map(|path| path.display().to_string()),
            offset: error.offset(),
            what: error.what().to_owned(),
            hint: error.hinted().map(str::to_owned),
        }
    }
}

/// Warns where a file's name says another format than the one that it gets.
pub fn mind_extension(path: &Path, format: &str) {
    let named = formats::by_extension(path).map(|named| named.name());
    if let Some(named) = named.filter(|named| *named != format) {
        let (named, format) = (named.to_uppercase(), format.to_uppercase());
        complain(format_args!(
            "{}: a {format} with the extension of a {named}; programs that go by names will not open it",
            path.display()
        ));
    }
}

/// Tells of a failure: a line to standard error, and for a program that asked for JSON an object to
/// standard output, in place of the result.
pub fn report(error: &Error, json: bool) {
    complain(error);
    if json {
        // Standard output may be what failed.
        let _ = print_json(&Failure::from(error));
    }
}

/// Prints a value as indented JSON.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Error::invalid(format!("cannot be written as JSON: {e}")))?;
    print_json_text(&text)
}

/// Prints JSON and ends the line. JSON itself escapes most characters that act on a terminal.
pub fn print_json_text(text: &str) -> Result<()> {
    let mut plain = String::with_capacity(text.len() + 1);
    for c in text.chars() {
        match c {
            c if acts(c) && c != '\n' => plain += &format!("\\u{:04x}", u32::from(c)),
            c => plain.push(c),
        }
    }
    print_text(&format!("{plain}\n"))
}

/// Prints one line to standard output, of which nothing acts on a terminal.
pub fn print_line(line: &str) -> Result<()> {
    print_text(&format!("{}\n", printable(line)))
}

/// Prints one line to standard error, as [`print_line`] does, with the program's name before it. That
/// nobody can read it is no reason to stop.
pub fn complain(what: impl Display) {
    let _ = writeln!(std::io::stderr(), "flatdisk: {}", printable(what));
}

/// Prints to standard output. A reader that went away ends the program quietly, as it does every
/// filter; `print!` would panic.
pub fn print_text(text: &str) -> Result<()> {
    print_bytes(text.as_bytes())
}

/// [`print_text`] for what need not be text.
pub fn print_bytes(bytes: &[u8]) -> Result<()> {
    match std::io::stdout().write_all(bytes) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => other.map_err(|e| Error::io("writing to standard output", &e)),
    }
}

/// Text that a guest or a user chose, with nothing in it that a terminal obeys.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out
}

/// Parses a size: bytes, or with a suffix K, M, G, T (also KiB, KB …), all powers of 1024.
pub fn parse_size(text: &str) -> std::result::Result<u64, String> {
    Config::new()
        .with_binary()
        .parse_size(text)
        .map_err(|_| format!("`{text}` is not a size such as 512, 64M or 2TiB"))
}

/// A size for people, in powers of 1024: `64 MiB`, `1.5 GiB`.
pub fn iec(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = (bytes.max(1).ilog2() / 10) as usize;
    let scaled = bytes as f64 / (1u64 << (10 * unit)) as f64;
    let digits = if scaled.fract() == 0.0 { 0 } else { 1 };
    format!("{scaled:.digits$} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary_whatever_the_spelling() {
        for (text, bytes) in [
            ("512", 512),
            ("10M", 10 << 20),
            ("10MiB", 10 << 20),
            ("10MB", 10 << 20),
            ("2t", 2 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "-1", "x", "1Q"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn wrong_arguments_may_ask_for_json() {
        let asks = |line: &str| {
            let words: Vec<_> = line.split(' ').map(OsString::from).collect();
            asks_for_json(&words)
        };
        for line in ["flatdisk info --json", "flatdisk x -qJ y", "flatdisk a --output=json b"] {
            assert!(asks(line), "{line}");
        }
        for line in ["flatdisk info x", "flatdisk info -- --json", "--json", "flatdisk --jsonx"] {
            assert!(!asks(line), "{line}");
        }
    }

    #[test]
    fn control_characters_reach_no_terminal() {
        assert_eq!(escaped("a\u{1b}[2J\n\u{9b}é"), "a\\u{1b}[2J\\n\\u{9b}é");
    }

    #[test]
    fn sizes_for_people() {
        assert_eq!(iec(0), "0 B");
        assert_eq!(iec(1536), "1.5 KiB");
        assert_eq!(iec(64 << 40), "64 TiB");
        assert_eq!(iec(u64::MAX), "16 EiB");
    }
}
