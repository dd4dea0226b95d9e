//! What an image says about itself beside what its disk holds, for looking at and for changing.
//!
//! # Order
//!
//! All changes that are asked for at once come in one durable step of the format's
//! ([`Format::set_meta`](super::Format::set_meta)), or none of them does. VHD: the footer at the end, which
//! counts, and then its copy. VHDX: one entry of the log. VMDK: the descriptor. What the disk holds, and what
//! its children know it by, stays, unless a new identity is what is asked for.

use std::path::Path;
use std::sync::Arc;

use super::chain::opening;
use super::lifecycle::children_of;
use super::naming::{listed, paths};
use super::{OpenContext, OpenOptions, recognise};
use crate::error::{Error, Result, ResultExt};
use crate::storage::{Access, Host};

/// One thing that an image says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Entry {
    /// Its name, in the format's words.
    pub key: String,
    /// What it says; `None` where it says nothing, and could.
    pub value: Option<String>,
    /// What it can be set to; `None` where it cannot.
    pub can_be: Option<String>,
}

impl Entry {
    /// One that says `value`.
    pub(super) fn new(key: impl Into<String>, value: impl Into<String>) -> Self {
        Self { key: key.into(), value: Some(value.into()), can_be: None }
    }

    /// The same where it can be set.
    pub(super) fn settable(self, can_be: impl Into<String>) -> Self {
        Self { can_be: Some(can_be.into()), ..self }
    }
}

/// What is to change.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    /// Keys and their new values.
    pub values: Vec<(String, String)>,
    /// The disk gets new ids: it is a copy, and another disk from now on.
    pub new_id: bool,
}

/// What the image at `path` says about itself.
///
/// # Errors
/// The file cannot be read, or is no image.
pub fn list(host: &Arc<dyn Host>, path: &Path, options: &OpenOptions) -> Result<Vec<Entry>> {
    let file = host.open(path, Access::Peek)?;
    let ctx = OpenContext::new(host, &*file, &opening(options, Access::Peek, None));
    recognise(&*file)?.meta(file, &ctx).in_file(path)
}

/// Changes what the image at `path` says about itself.
///
/// # Errors
/// A key or a value that cannot be, with those that can; the image is in use, or damaged; it is to
/// become another disk, and others stand on it. Nothing has changed then.
pub fn set(
    host: &Arc<dyn Host>,
    path: &Path,
    changes: &Changes,
    options: &OpenOptions,
) -> Result<()> {
    let known = list(host, path, options)?;
    for (key, _) in &changes.values {
        let entry = known.iter().find(|entry| entry.key.eq_ignore_ascii_case(key));
        if entry.is_none_or(|entry| entry.can_be.is_none()) {
            let what = match entry {
                Some(_) => format!("`{key}` follows from the disk, and cannot be set"),
                None => format!("there is no key `{key}`"),
            };
            let keys = known.iter().filter(|entry| entry.can_be.is_some());
            let keys: Vec<_> = keys.map(|entry| entry.key.as_str()).collect();
            return Err(Error::invalid(what).in_file(path).hint(keys.join(", ")));
        }
    }
    let identity = |(key, _): &(String, String)| key.eq_ignore_ascii_case("unique_id");
    if changes.new_id || changes.values.iter().any(identity) {
        let children = children_of(host, path, &opening(options, Access::Peek, None))?;
        if !children.is_empty() {
            let names = listed(&paths(&children));
            let what = format!("images that stand on this one know it by its id: {names}");
            return Err(Error::invalid(what).in_file(path));
        }
    }
    let file = host.open(path, Access::Write)?;
    let ctx = OpenContext::new(host, &*file, &opening(options, Access::Write, None));
    recognise(&*file)?.set_meta(file, &ctx, changes).in_file(path)
}

/// Refuses a value.
pub(super) fn cannot_be(key: &str, value: &str, can_be: &str) -> Error {
    Error::invalid(format!("{key} cannot be `{value}`")).hint(can_be.to_owned())
}
