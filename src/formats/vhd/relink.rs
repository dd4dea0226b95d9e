//! Giving a differencing disk another parent, or none.
//!
//! Header and locators are several sectors, and a torn header would cost the whole image. So new ones
//! are written where nothing is, and one sector, the trailing footer, leads to the old or the new.

use zerocopy::{FromZeros, IntoBytes};

use super::create::ParentNames;
use super::footers::Footers;
use super::layout::{DiskType, FOOTER, HEADER, ParentLocator, SECTOR, footer_place};
use super::structure::Structure;
use super::survey::Survey;
use crate::codec;
use crate::disk::sync_file;
use crate::error::{Error, Result};
use crate::formats::{Identity, NewLink, OpenContext, Severity};
use crate::storage::Storage;

/// Points the child in `file` at another parent, or makes it a dynamic disk, which has none.
pub(super) fn relink(
    file: &dyn Storage,
    ctx: &OpenContext,
    link: Option<&NewLink<'_>>,
) -> Result<()> {
    let footers = Footers::find(file, false)?;
    if footers.disk_type != DiskType::Differencing {
        return Err(Error::invalid("the image is no child: it has no parent"));
    }
    let structure = Structure::read(file, &footers, false)?;
    if let Some(why) = &structure.read_only {
        return Err(Error::corrupt(format!("not written: {why}")));
    }
    let mut header = structure.header;
    let mut footer = footers.footer;
    header.parent_locators = [ParentLocator::new_zeroed(); 8];
    let locators = match link {
        Some(link) => {
            let Identity::VhdUniqueId(parent) = *link.identity else {
                return Err(Error::invalid("the parent of a VHD must be a VHD"));
            };
            let names = ParentNames::new(&**ctx.host(), file.path(), link.parent)?;
            header.parent_unique_id = parent;
            names.put(&mut header);
            names.locators.to_vec()
        }
        None => {
            header.parent_unique_id = [0; 16];
            header.parent_timestamp = 0.into();
            header.parent_unicode_name = [0; 512];
            Vec::new()
        }
    };

    // Behind everything there is, a trailing footer and a last block that is cut short included.
    let mut damage = None;
    let survey = Survey::run(file, &structure, footers.data_end, &mut |problem| {
        if problem.severity == Severity::Error {
            damage.get_or_insert(problem.what);
        }
    })?;
    if let Some(what) = damage {
        return Err(Error::corrupt(format!("not written, the BAT is damaged: {what}"))
            .hint("flatdisk check lists the damage"));
    }
    let (_, used_end) = survey.gaps(&structure, u64::MAX);
    let header_at = footers.file_len.max(used_end).next_multiple_of(SECTOR);
    let end = footer_place(ParentNames::place(&locators, &mut header, header_at + HEADER));
    // Until the new footer is the last sector, the copy at the beginning is what counts.
    codec::write_all(file, 0, footer.as_bytes(), "the footer copy")?;
    sync_file(file)?;
    codec::write_all(file, header_at, header.as_bytes(), "the dynamic header")?;
    for ((_, data), locator) in locators.iter().zip(&header.parent_locators) {
        codec::write_all(file, locator.data_offset.get(), data, "a parent locator")?;
    }
    sync_file(file)?;
    footer.data_offset = header_at.into();
    if link.is_none() {
        footer.disk_type = DiskType::Dynamic.number().into();
    }
    footer.seal();
    codec::write_all(file, end, footer.as_bytes(), "the footer")?;
    sync_file(file)?;
    codec::write_all(file, 0, footer.as_bytes(), "the footer copy")?;
    if footers.trailing.intact() {
        // Nothing there looks like the end of the image any more.
        let old = vec![0; FOOTER.min(header_at - footers.data_end) as usize];
        codec::write_all(file, footers.data_end, &old, "the old footer")?;
    }
    sync_file(file)
}
