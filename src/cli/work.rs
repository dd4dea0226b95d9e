//! What commands are told about what they print: those that are done at once, and those that work for long.

use clap::Args;

use super::output::OutputArgs;
use super::progress::{Bar, ProgressArgs};
use crate::error::Result;

/// What a command prints when it is done.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct DoneArgs {
    /// Print nothing on success.
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    output: OutputArgs,
}

impl DoneArgs {
    /// Whether to print nothing on success.
    pub fn quiet(self) -> bool {
        self.quiet
    }

    /// Whether to print JSON.
    pub fn json(self) -> bool {
        self.output.json()
    }
}

/// What a command prints while it works, and when it is done.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct WorkArgs {
    #[command(flatten)]
    progress: ProgressArgs,
    #[command(flatten)]
    done: DoneArgs,
}

impl WorkArgs {
    /// Begins work called `what`, which a signal ends: see [`ProgressArgs::start`].
    pub fn start(self, what: &str) -> Result<Bar> {
        self.progress.start(what, self.done.quiet)
    }

    /// Whether to print nothing on success.
    pub fn quiet(self) -> bool {
        self.done.quiet()
    }

    /// Whether to print JSON.
    pub fn json(self) -> bool {
        self.done.json()
    }
}
