//! What every command that works for long is told about what it prints.

use clap::Args;

use super::output::OutputArgs;
use super::progress::{Bar, ProgressArgs};
use crate::error::Result;

/// What a command prints while it works, and when it is done.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct WorkArgs {
    /// Print nothing on success.
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    progress: ProgressArgs,
    #[command(flatten)]
    output: OutputArgs,
}

impl WorkArgs {
    /// Begins work called `what`, which a signal ends: see [`ProgressArgs::start`].
    pub fn start(self, what: &str) -> Result<Bar> {
        self.progress.start(what, self.quiet)
    }

    /// Whether to print nothing on success.
    pub fn quiet(self) -> bool {
        self.quiet
    }

    /// Whether to print JSON.
    pub fn json(self) -> bool {
        self.output.json()
    }
}
