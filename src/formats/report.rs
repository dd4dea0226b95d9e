//! What a check finds.

use std::path::PathBuf;

use serde::Serialize;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Severity {
    /// Data may be wrong or lost.
    Error,
    /// Space is wasted, nothing else.
    Leak,
    /// Unusual; other programs may stumble.
    Notice,
}

/// One thing a check found.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// The file, where it is not the image itself.
    #[serde(
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::names::some::serialize"
    )]
    pub file: Option<PathBuf>,
    /// Byte offset in that file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// Which structure, and what is wrong with it.
    pub what: String,
}

/// A part of the disk that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Lost {
    /// First byte on the disk.
    pub start: u64,
    /// Number of bytes.
    pub length: u64,
}

/// The result of a check. Counts are complete; the lists are capped.
#[derive(Debug, Clone, Default, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// `vhd`, `vhdx`, `vmdk`.
    pub format: &'static str,
    /// Number of errors.
    pub errors: u64,
    /// Number of leaks.
    pub leaks: u64,
    /// Number of notices.
    pub notices: u64,
    /// Bytes that no structure uses.
    pub leaked_bytes: u64,
    /// Blocks or grains the disk has.
    pub blocks: u64,
    /// Blocks or grains stored in the image.
    pub allocated_blocks: u64,
    /// The first [`Report::MAX_FINDINGS`] findings.
    pub findings: Vec<Finding>,
    /// The first [`Report::MAX_FINDINGS`] parts of the disk that cannot be read, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub damage: Vec<Lost>,
}

impl Report {
    /// How many findings are kept.
    pub const MAX_FINDINGS: usize = 1000;

    /// An empty report.
    pub fn new(format: &'static str) -> Self {
        Self { format, ..Self::default() }
    }

    /// Adds a finding.
    pub fn add(&mut self, severity: Severity, offset: Option<u64>, what: impl Into<String>) {
        self.add_in(None, severity, offset, what);
    }

    /// Adds a finding in a file other than the image itself.
    pub fn add_in(
        &mut self,
        file: Option<PathBuf>,
        severity: Severity,
        offset: Option<u64>,
        what: impl Into<String>,
    ) {
        match severity {
            Severity::Error => self.errors += 1,
            Severity::Leak => self.leaks += 1,
            Severity::Notice => self.notices += 1,
        }
        if self.findings.len() < Self::MAX_FINDINGS {
            self.findings.push(Finding { severity, file, offset, what: what.into() });
        }
    }

    /// Adds what was found in one of several images, at `path`. What of its disk cannot be read is not told
    /// apart from the others' and left out.
    pub fn include(&mut self, path: &std::path::Path, other: Self) {
        self.errors += other.errors;
        self.leaks += other.leaks;
        self.notices += other.notices;
        self.leaked_bytes += other.leaked_bytes;
        self.blocks += other.blocks;
        self.allocated_blocks += other.allocated_blocks;
        let room = Self::MAX_FINDINGS.saturating_sub(self.findings.len());
        let found = other.findings.into_iter().take(room);
        self.findings.extend(found.map(|finding| Finding {
            file: finding.file.or_else(|| Some(path.to_owned())),
            ..finding
        }));
    }

    /// Adds a part of the disk that cannot be read, behind those added before; says whether there is
    /// room for more.
    pub fn lose(&mut self, start: u64, length: u64) -> bool {
        match self.damage.last_mut() {
            Some(last) if last.start + last.length == start => last.length += length,
            _ => self.damage.push(Lost { start, length }),
        }
        self.damage.len() < Self::MAX_FINDINGS
    }

    /// Shorthand for an error at `offset`.
    pub fn error(&mut self, offset: u64, what: impl Into<String>) {
        self.add(Severity::Error, Some(offset), what);
    }

    /// Shorthand for a notice at `offset`.
    pub fn notice(&mut self, offset: u64, what: impl Into<String>) {
        self.add(Severity::Notice, Some(offset), what);
    }

    /// Adds `bytes` of space that nothing uses, at `offset`.
    pub fn leak(&mut self, offset: u64, bytes: u64, what: impl Into<String>) {
        self.leaked_bytes += bytes;
        self.add(Severity::Leak, Some(offset), what);
    }

    /// Exit status of `flatdisk check`, as `qemu-img check` has it: 0 clean, 2 errors, 3 only leaks.
    pub fn exit_status(&self) -> u8 {
        match (self.errors, self.leaks) {
            (0, 0) => 0,
            (0, _) => 3,
            _ => 2,
        }
    }
}
