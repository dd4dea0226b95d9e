//! A disk found sound, for changes of its files as a whole.

use std::sync::Arc;

use crate::disk::map::BlockMap;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::{Identity, OpenContext};
use crate::storage::Storage;

use super::link::Link;
use super::{geometry, map};

/// Opens the disk whose descriptor is in `file`, open for writing. Extents that were not closed are, as
/// by every writer; what cannot be written is refused.
pub fn settle(file: &Arc<dyn Storage>, ctx: &OpenContext) -> Result<Link> {
    let link = writable(file, ctx)?;
    if !link.sparse.iter().any(|extent| extent.unclean && extent.writable) {
        return Ok(link);
    }
    let descriptor = &link.descriptor.descriptor;
    let (own, has_parent) = (descriptor.cid(), descriptor.parent_cid()?.is_some());
    // What the disk holds does not change.
    let mut ctx = ctx.clone();
    ctx.next_identity = own.map(Identity::VmdkCid);
    let geometry = geometry(&link);
    let map = map(link, geometry, has_parent, &ctx);
    map.begin_writes()?;
    map.close()?;
    drop(map);
    writable(file, &ctx)
}

fn writable(file: &Arc<dyn Storage>, ctx: &OpenContext) -> Result<Link> {
    let link = Link::open(file.clone(), ctx)?;
    if let Some(problem) = link.problems.first() {
        return Err(Error::corrupt(format!("not changed: {problem}"))
            .hint("`flatdisk check --repair` puts right what can be"));
    }
    match &link.read_only {
        Some(why) => Err(Error::new(ErrorKind::ReadOnly, format!("not changed: {why}"))
            .hint("`flatdisk convert` makes an image that can be")),
        None => Ok(link),
    }
}
