//! Progress bars, and signals that end long work.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::error::{Error, Result};
use crate::progress::Progress;

/// How often a sign of life changes.
const TICK: Duration = Duration::from_millis(200);

/// Whether a command shows how far it is.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct ProgressArgs {
    /// Show no progress bar; there is none anyway where standard error is no terminal.
    #[arg(long)]
    no_progress: bool,
}

impl ProgressArgs {
    /// A bar for work called `what`; from here on SIGINT, SIGTERM and SIGHUP do not end the program but
    /// the work. A second such signal ends the program at once.
    pub fn start(self, what: &str, quiet: bool) -> Result<Bar> {
        let ended = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            let failed = |e| Error::io("catching signals", &e);
            let again = Arc::clone(&ended);
            signal_hook::flag::register_conditional_default(signal, again).map_err(failed)?;
            signal_hook::flag::register(signal, Arc::clone(&ended)).map_err(failed)?;
        }
        let hidden = quiet || self.no_progress || !std::io::stderr().is_terminal();
        let bar = if hidden { ProgressBar::hidden() } else { ProgressBar::no_length() };
        let template = "{msg} {bar:30} {percent:>3}% {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
        bar.set_style(
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        bar.set_message(what.to_owned());
        Ok(Bar { bar, ended })
    }

    /// A sign of life for work of unknown size called `what`: how long it has taken so far. Signals do as
    /// ever.
    pub fn watch(self, what: &str, quiet: bool) -> Bar {
        let hidden = quiet || self.no_progress || !std::io::stderr().is_terminal();
        let bar = if hidden { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
        bar.set_message(what.to_owned());
        if !hidden {
            bar.enable_steady_tick(TICK);
        }
        let style = ProgressStyle::with_template("{msg} {spinner} {elapsed}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
        Bar { bar, ended: Arc::default() }
    }
}

/// Shows how far work is, and ends it when a signal has come.
#[derive(Debug)]
pub struct Bar {
    bar: ProgressBar,
    ended: Arc<AtomicBool>,
}

impl Progress for Bar {
    fn total(&self, bytes: u64) {
        self.bar.set_length(bytes);
    }

    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn cancelled(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
