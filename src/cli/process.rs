//! What the process asks of the system before it does anything.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use signal_hook::consts::SIGXFSZ;

/// Makes a limit cost only the call that runs into it.
pub fn prepare() {
    survive_file_size_limit();
    raise_file_limit();
}

/// What a crate does not expect of a file system ends in an error of the command, not in a report of a bug.
pub fn panics_are_errors() {
    std::panic::set_hook(Box::new(|_| ()));
}

/// A write beyond the limit of file sizes (`ulimit -f`) fails with EFBIG; its signal would end the
/// process. It is caught, not ignored: programs that this one starts would inherit that.
fn survive_file_size_limit() {
    if let Err(e) = signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false))) {
        log::debug!("catching SIGXFSZ: {e}");
    }
}

/// Every image in use takes a few descriptors. The lower of the two limits is there for programs that
/// cannot use many.
fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(e) = raised {
        log::debug!("raising the limit of open files: {e}");
    }
}
