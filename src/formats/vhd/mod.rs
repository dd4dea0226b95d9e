//! The VHD driver: fixed, dynamic and differencing disks.
//!
//! ```text
//! fixed         data ......................................................... footer
//! dynamic       footer copy, header, BAT, [bitmap, data], [bitmap, data], ... footer
//! differencing  as dynamic, with the parent's names behind the BAT as a rule
//! ```
//!
//! `layout` has the structures; `footers`, `structure`, `locators` and `batmap` read and judge them.
//! `fixed` and `blocks` are the mappings, `differencing` is what a child adds to the latter; `bat`
//! and `bitmaps` are the cached tables and `space` hands out room in the file. `survey` walks the
//! whole BAT, before the first write and for a check. `repair` rebuilds what is there twice or follows
//! from the rest, `resize` changes the disk's size, `compact` gives unused blocks back; `sound` is what such a change of the file begins with.
//!
//! # The order of writes
//!
//! The format has no log and no dirty flag. Sectors are written whole or not at all; between two
//! syncs anything may or may not arrive.
//!
//! *Fixed*: payload in place, synced by a flush. A footer of the 511-byte form gets its last byte
//! before the first write, by extending the file.
//!
//! *Dynamic and differencing*, before the first write: the BAT is checked as a whole and writing
//! refused if it is damaged. Then the copy of the footer is repaired if it is not what it should be,
//! and synced. From there on an image opens whatever happens to the trailing footer, so moving that
//! needs no order of its own: the file is extended, the new footer written, the old one zeroed.
//!
//! Allocating writes a block's bitmap and data where nothing points: all bits set on a dynamic disk,
//! none on a differencing one, where payload also goes to sectors of stored blocks whose bits are
//! clear. A flush then
//!
//! 1. writes the batmap if there is one that changed (it only loses bits, which is always true);
//! 2. syncs: payload, bitmaps of new blocks, footer, length;
//! 3. writes the changed sector bitmaps of a differencing disk, and the changed pages of the BAT;
//! 4. syncs;
//! 5. punches the blocks that the BAT pointed at before and makes them reusable.
//!
//! A crash before 4 has ended leaves for every sector of the tables the old or the new contents.
//! New BAT entries lead to complete blocks, or on a differencing disk to blocks whose bitmap is old
//! (the parent's data shows) or new (the data is there). Old entries lead to blocks that nobody has
//! touched since. At worst space is lost, which the survey before a later first write finds again.
//!
//! Closing writes the footer behind the last block, syncs, and cuts the file off there. A crash in
//! between leaves two footers, of which the last one counts, and unused space before it.
//!
//! *Another parent* (`relink`): a new dynamic header and new locators go behind the trailing footer,
//! and are synced; then a footer behind them that leads to the new header, synced; then the copy. The
//! last footer counts, so the link changes with that one sector.
//!
//! # Further files
//!
//! - `check`: checking an image without changing it;
//! - `create`: making new images;
//! - `info`: what `info` shows of a VHD image;
//! - `lost`: putting the BAT right;
//! - `meta`: what the footer says beside what the disk is, for looking at and for changing;
//! - `split`: split images of Virtual PC;
//! - `structures`: every structure of a VHD file, as `info --structures` lists them;
//! - `tests`: tests of the whole driver.

mod bat;
mod batmap;
mod bitmaps;
mod blocks;
mod check;
mod compact;
mod create;
mod differencing;
mod fixed;
mod footers;
mod info;
mod layout;
mod locators;
mod lost;
mod meta;
mod relink;
mod repair;
mod resize;
mod sound;
mod space;
mod split;
mod structure;
mod structures;
mod survey;
#[cfg(test)]
mod tests;

pub use create::{create_child, fixed_footer};
pub use split::whole;

use std::path::Path;
use std::sync::Arc;

use super::compact::Part;
use super::meta::{Changes, Entry};
use super::plan::Steps;
use super::{
    CreateSpec, Footprint, Format, Identity, Image, Listing, Naming, NewLink, OpenContext, Opened,
    ParentLink, Plan, Probe, Report,
};
use crate::error::{Error, Result};
use crate::storage::{Host, Storage};
use blocks::SparseMap;
use fixed::FixedMap;
use footers::Footers;
use layout::{DiskType, FOOTER, FOOTER_COOKIE, POISON_COOKIE, SHORT_FOOTER};
use structure::Structure;

/// The VHD format.
pub struct Vhd;

impl Format for Vhd {
    fn name(&self) -> &'static str {
        "vhd"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["vhd", "avhd", "vud"]
    }

    fn subformats(&self) -> &'static [&'static str] {
        &["dynamic", "fixed"]
    }

    fn probe(&self, probe: &Probe) -> bool {
        let from_end = |len: u64| {
            let at = probe.tail.len().checked_sub(len as usize)?;
            probe.tail.get(at..)
        };
        [Some(&probe.head[..]), from_end(FOOTER), from_end(SHORT_FOOTER)]
            .into_iter()
            .flatten()
            .any(|bytes| bytes.starts_with(&FOOTER_COOKIE) || bytes.starts_with(&POISON_COOKIE))
    }

    fn open(&self, file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<Opened> {
        let file = whole(ctx.host(), file, ctx.access)?;
        let footers = Footers::find(&*file, ctx.force)?;
        let forced = footers.forced.as_ref().map(|what| format!("opened by force: {what}"));
        let opened = match footers.disk_type {
            DiskType::Fixed => open_fixed(file, footers, ctx)?,
            DiskType::Dynamic | DiskType::Differencing => open_sparse(file, footers, ctx)?,
        };
        Ok(Opened { read_only: forced.or(opened.read_only), ..opened })
    }

    fn create(&self, host: &dyn Host, path: &Path, spec: &CreateSpec) -> Result<()> {
        create::create(host, path, spec)
    }

    fn footprint(&self, spec: &CreateSpec) -> Result<Footprint> {
        create::footprint(spec)
    }

    fn create_child(
        &self,
        host: &dyn Host,
        path: &Path,
        parent: &Image,
        spec: &CreateSpec,
    ) -> Result<()> {
        create::create_child(host, path, parent, spec.block_size.or(parent.info.block_size))
    }

    fn meta(&self, file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<Vec<Entry>> {
        meta::list(&*whole(ctx.host(), file, ctx.access)?, ctx.force)
    }

    fn set_meta(&self, file: Arc<dyn Storage>, ctx: &OpenContext, changes: &Changes) -> Result<()> {
        meta::set(&*split::refuse(ctx.host(), file)?, changes)
    }

    fn naming(&self, file: &Arc<dyn Storage>, new: &Path) -> Result<Naming> {
        split::naming(&**file, new)
    }

    fn relink(&self, file: Arc<dyn Storage>, ctx: &OpenContext, link: &NewLink<'_>) -> Result<()> {
        relink::relink(&*split::refuse(ctx.host(), file)?, ctx, Some(link))
    }

    fn unlink(&self, file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<()> {
        relink::relink(&*split::refuse(ctx.host(), file)?, ctx, None)
    }

    fn empty(&self, file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<()> {
        let file = split::refuse(ctx.host(), file)?;
        let footers = Footers::find(&*file, false)?;
        let structure = Structure::read(&*file, &footers, false)?;
        sparse_map(file, footers, structure, ctx).forget()
    }

    fn resize(
        &self,
        file: Arc<dyn Storage>,
        ctx: &OpenContext,
        size: u64,
        plan: &mut Steps,
    ) -> Result<()> {
        resize::resize(&split::refuse(ctx.host(), file)?, ctx, size, plan)
    }

    fn compact(&self, file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<Vec<Part>> {
        compact::parts(split::refuse(ctx.host(), file)?, ctx)
    }

    fn structures(
        &self,
        file: Arc<dyn Storage>,
        ctx: &OpenContext,
        list: &mut Listing,
    ) -> Result<()> {
        structures::list(&*whole(ctx.host(), file, ctx.access)?, list)
    }

    fn check(&self, file: Arc<dyn Storage>, ctx: &OpenContext, report: &mut Report) -> Result<()> {
        check::check(&*whole(ctx.host(), file, ctx.access)?, ctx.force, report)
    }

    fn repair(&self, file: Arc<dyn Storage>, ctx: &OpenContext, plan: &mut Plan) -> Result<()> {
        repair::repair(&split::refuse(ctx.host(), file)?, plan)
    }
}

fn open_fixed(file: Arc<dyn Storage>, footers: Footers, ctx: &OpenContext) -> Result<Opened> {
    let info = info::fixed(&footers);
    let identity = Identity::VhdUniqueId(footers.footer.unique_id);
    let map = FixedMap::new(file, footers.renewed(ctx.next_identity.as_ref()))?;
    let missing = map.missing();
    let read_only = match &missing {
        Some(range) => Some(format!(
            "the file is too short: the last {} bytes of the disk are missing",
            range.end - range.start
        )),
        None if info.virtual_size == 0 => Some("the disk has no sectors".to_owned()),
        None => None,
    };
    Ok(Opened {
        map: Box::new(map),
        info,
        identity,
        parent: None,
        read_only,
        damage: missing.into_iter().collect(),
    })
}

fn open_sparse(file: Arc<dyn Storage>, footers: Footers, ctx: &OpenContext) -> Result<Opened> {
    let structure = Structure::read(&*file, &footers, ctx.force)?;
    let parent = match footers.disk_type {
        DiskType::Differencing => Some(parent_link(&footers, &structure)?),
        _ => None,
    };
    let covered = structure.blocks * structure.block_size;
    let damage = (covered < structure.size).then_some(covered..structure.size);
    Ok(Opened {
        info: info::sparse(&footers, &structure),
        identity: Identity::VhdUniqueId(footers.footer.unique_id),
        parent,
        read_only: structure.read_only.clone(),
        damage: damage.into_iter().collect(),
        map: Box::new(sparse_map(file, footers, structure, ctx)),
    })
}

fn sparse_map(
    file: Arc<dyn Storage>,
    footers: Footers,
    structure: Structure,
    ctx: &OpenContext,
) -> SparseMap {
    SparseMap::new(file, footers.renewed(ctx.next_identity.as_ref()), structure, &ctx.budget)
}

fn parent_link(footers: &Footers, structure: &Structure) -> Result<ParentLink> {
    let id = structure.header.parent_unique_id;
    let candidates = structure.locators.candidates();
    // What Xen writes over a raw disk, which has no id.
    if id == [0; 16] && !footers.footer.creator_is(b"tap") {
        return Err(Error::corrupt("a differencing disk that names no parent"));
    }
    let modified = structure.header.parent_timestamp.get();
    let modified = (modified != 0).then(|| layout::time(modified));
    Ok(ParentLink { identity: Identity::VhdUniqueId(id), candidates, modified })
}
