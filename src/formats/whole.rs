//! Making images that appear under their names only when they are complete.
//!
//! An image is made under temporary names, durably, and then gets its name: see [`Staged`]. A program that
//! is killed leaves no part of an image under its name; what it leaves under others the next one removes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{CreateSpec, Format, Image, create, create_child};
use crate::error::{ErrorKind, Result};
use crate::storage::Host;
use crate::storage::staged::Staged;

/// [`create`] as one step. Returns the image's files.
///
/// # Errors
///
/// Those of [`create`]; [`ErrorKind::Exists`] for a file that is there, [`ErrorKind::Busy`] where another program
/// is making one. Nothing is left behind then.
pub fn create_whole(
    format: &dyn Format,
    host: &Arc<dyn Host>,
    path: &Path,
    spec: &CreateSpec,
) -> Result<Vec<PathBuf>> {
    as_one(host, path, |staged| create(format, staged, path, spec))
}

/// [`create_child`] as one step. Returns the child's files.
///
/// # Errors
///
/// Those of [`create_child`], and of [`create_whole`].
pub fn create_whole_child(
    format: &dyn Format,
    host: &Arc<dyn Host>,
    path: &Path,
    parent: &Image,
    spec: &CreateSpec,
) -> Result<Vec<PathBuf>> {
    as_one(host, path, |staged| create_child(format, staged, path, parent, spec))
}

fn as_one(
    host: &Arc<dyn Host>,
    path: &Path,
    create: impl FnOnce(&dyn Host) -> Result<()>,
) -> Result<Vec<PathBuf>> {
    let made = Staged::new(host.clone(), path, false).and_then(|staged| {
        create(&*staged).map_err(|e| staged.explain(e))?;
        staged.commit()
    });
    made.map_err(|e| match e.kind() {
        // There is nothing that would replace it.
        ErrorKind::Exists => e.hinting(None),
        _ => e,
    })
}
