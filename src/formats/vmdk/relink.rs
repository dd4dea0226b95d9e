//! Giving a child another parent, or none.

use std::ops::Range;
use std::sync::Arc;

use super::area::{Area, Stage};
use super::child::hint;
use super::descriptor::Descriptor;
use super::layout::SECTOR;
use super::link::find_descriptor;
use crate::codec;
use crate::disk::sync_file;
use crate::error::{Error, Result};
use crate::formats::{Identity, NewLink, OpenContext};
use crate::storage::Storage;

/// Points the child in `file` at another parent.
pub fn relink(file: Arc<dyn Storage>, ctx: &OpenContext, link: &NewLink<'_>) -> Result<()> {
    let Identity::VmdkCid(cid) = *link.identity else {
        return Err(Error::invalid("the parent of a VMDK must be a VMDK"));
    };
    let hint = hint(file.path(), link.parent)?;
    rewrite(&file, ctx, |descriptor| child(descriptor)?.with_parent(cid, &hint))
}

/// Takes the parent away from the child in `file`.
pub fn unlink(file: &Arc<dyn Storage>, ctx: &OpenContext) -> Result<()> {
    rewrite(file, ctx, |descriptor| Ok(child(descriptor)?.without_parent()))
}

fn child(descriptor: &Descriptor) -> Result<&Descriptor> {
    match descriptor.parent_cid()? {
        Some(_) => Ok(descriptor),
        None => Err(Error::invalid("the image is no child: it has no parent")),
    }
}

/// Puts another text in the place of a descriptor, in one durable step.
pub fn rewrite(
    file: &Arc<dyn Storage>,
    ctx: &OpenContext,
    change: impl FnOnce(&Descriptor) -> Result<Vec<u8>>,
) -> Result<()> {
    let found = find_descriptor(file)?.file;
    let descriptor = &found.descriptor;
    if let Some(what) = descriptor.broken.first() {
        return Err(Error::corrupt(format!("not written: {what}")));
    }
    if descriptor.ambiguous {
        return Err(Error::corrupt("not written: the descriptor sets a key twice"));
    }
    let text = change(descriptor)?;
    if text == descriptor.text() {
        return Ok(());
    }
    if found.at == 0 {
        return ctx.host().replace(file.path(), &text);
    }
    let area = Area::read(&**file, descriptor.text().len())?;
    let stages = area.change(&text).map_err(|e| e.in_file(file.path()))?;
    stages.into_iter().try_for_each(|stage| take(&**file, stage))
}

/// Takes a stage, durably.
fn take(file: &dyn Storage, stage: Stage) -> Result<()> {
    match stage {
        Stage::Place(text, sectors) => place(file, &text, sectors),
        Stage::LeadTo(sectors) => lead_to(file, sectors),
    }
}

/// Writes `text` at the beginning of `sectors` and zeroes behind it, durably.
fn place(file: &dyn Storage, text: &[u8], sectors: Range<u64>) -> Result<()> {
    let bytes = Stage::padded(text, &sectors);
    codec::write_all(file, sectors.start * SECTOR, &bytes, "the descriptor")?;
    sync_file(file)
}

/// Makes the header lead to a descriptor in `sectors`, durably.
fn lead_to(file: &dyn Storage, sectors: Range<u64>) -> Result<()> {
    let mut header: [u8; SECTOR as usize] = codec::read_array(file, 0, "the sparse header")?;
    Stage::lead(&mut header, &sectors);
    codec::write_all(file, 0, &header, "the sparse header")?;
    sync_file(file)
}
