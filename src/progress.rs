//! How far long work has come, and whether to go on with it.
//!
//! Work that may take long (copying, merging, moving blocks) is given a [`Progress`] by its caller,
//! tells it what is done, and ends early, leaving everything in order, once it says so. `()` is the
//! one that listens to nothing.

use crate::error::{Error, ErrorKind, Result};

/// Told how far work has come; may end it. Called from any thread.
pub trait Progress: Sync {
    /// The work is `bytes` long as a whole. May be told again when that turns out otherwise.
    fn total(&self, bytes: u64) {
        let _ = bytes;
    }

    /// `bytes` more are done. Parts that cost nothing, such as holes, count too.
    fn advance(&self, bytes: u64) {
        let _ = bytes;
    }

    /// Whether the work is to end as soon as it can.
    fn cancelled(&self) -> bool {
        false
    }
}

impl Progress for () {}

impl dyn Progress + '_ {
    /// Says whether the work may go on.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Cancelled`] once it is to end.
    pub fn go_on(&self) -> Result<()> {
        match self.cancelled() {
            true => Err(Error::new(ErrorKind::Cancelled, "interrupted")),
            false => Ok(()),
        }
    }
}
