//! What the daemon of root gives up before it serves anybody: nearly everything.
//!
//! It parses files that strangers made, for programs of strangers. What it keeps:
//!
//! - `CAP_SYS_ADMIN` mounts and unmounts, and registers files that the kernel reads by itself;
//! - `CAP_DAC_READ_SEARCH` reads the images of any user, in folders of any mode;
//! - `CAP_DAC_OVERRIDE` writes them, and so is not kept by a read-only mount;
//! - `CAP_SETUID` and `CAP_SETGID` open what an image names in the name of the image's owner. They are
//!   not in effect but for that moment, and in that thread ([`crate::storage::user`]).
//!
//! A process of its own for the last two would guard nothing: who has `CAP_SYS_ADMIN` can get them by
//! other ways, and what they are for is that strangers' files reach less.
//!
//! Users other than root have nothing to give up. Theirs must also stay able to gain: fusermount3,
//! which is set-user-id root, unmounts for them.
//!
//! Capabilities belong to threads, and a new thread has those of the one that starts it.

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;
use nix::unistd::geteuid;

/// Gives up what serving a mount does not need. Must be called before the first thread is started.
/// Where that fails, serving goes on with more than it needs.
pub fn reduce(read_only: bool) {
    if !geteuid().is_root() {
        return;
    }
    if let Err(e) = keep_only(&needed(read_only)) {
        log::warn!("giving up capabilities: {e}");
    }
    if let Err(e) = prctl::set_no_new_privs() {
        log::warn!("giving up new privileges: {e}");
    }
}

fn needed(read_only: bool) -> CapsHashSet {
    let mut needed =
        CapsHashSet::from([Capability::CAP_SYS_ADMIN, Capability::CAP_DAC_READ_SEARCH]);
    if !read_only {
        needed.insert(Capability::CAP_DAC_OVERRIDE);
    }
    needed
}

fn keep_only(needed: &CapsHashSet) -> Result<(), caps::errors::CapsError> {
    let mut available = needed.clone();
    available.extend([Capability::CAP_SETUID, Capability::CAP_SETGID]);
    // First, as it takes a capability that goes below. A manager of services that took that one
    // away has set the bounds as well.
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for excess in caps::read(None, CapSet::Bounding)?.difference(&available) {
            caps::drop(None, CapSet::Bounding, *excess)?;
        }
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    let held = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = held.intersection(&available).copied().collect();
    caps::set(None, CapSet::Effective, &kept.intersection(needed).copied().collect())?;
    caps::set(None, CapSet::Permitted, &kept)
}
