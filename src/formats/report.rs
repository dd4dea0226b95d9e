//! What a check finds.

use std::path::PathBuf;

use serde::Serialize;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
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
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// The file, where it is not the image itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Byte offset in that file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// Which structure, and what is wrong with it.
    pub what: String,
}

/// The result of a check. Counts are complete; the list of findings is capped.
#[derive(Debug, Clone, Default, Serialize)]
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
