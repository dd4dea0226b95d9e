//! The VHDX driver: dynamic, fixed and differencing disks, 512 and 4096-byte sectors, up to 64 TiB.
//!
//! | file | owns |
//! |---|---|
//! | `layout` | the structures on disk |
//! | `headers`, `regions`, `metadata`, `locator` | reading and writing each of them |
//! | `log`, `overlay` | the log, and a file as its log makes it |
//! | `bat`, `bitmap` | block allocation table and sector bitmaps |
//! | `open`, `create`, `check`, `repair`, `relink`, `resize`, `compact` | what [`Format`] asks for |
//! | `settled`, `logged` | what a change of the file as a whole begins with, and its way through the log |
//! | `blocks`, `writes`, `session` | the mapping, its changes, and making them durable |
//! | `space`, `stock` | which parts of the file are in use |
//!
//! # The order of writes
//!
//! Every step below is durable (`sync`) before the next one begins, unless it says otherwise. What
//! a crash leaves is said for the moment before the step is durable, any part of it being written.
//!
//! **The first write** of a session (`session`):
//!
//! 1. The BAT is read through. If two structures claim the same space, nothing is ever written.
//! 2. If there is a log to replay: new `FileWriteGuid`, the log's GUID stays; the log's updates in
//!    their places; headers without log GUID. A crash leaves a log that is replayed again.
//! 3. An entry without updates at the start of the log, under a new GUID that no header names. A
//!    crash leaves a clean file.
//! 4. Headers, one after the other, with that GUID, `FileWriteGuid` and `DataWriteGuid` new. A
//!    crash leaves one good header, whose log is empty or not to be replayed.
//! 5. A region table that differs from the one in use, in its place, without sync. A crash leaves
//!    the one in use.
//!
//! **A write** into a block that is not stored goes to space that no table names, a write into a
//! stored block to its place; neither is durable before the next flush. BAT and sector bitmaps
//! change in memory only. Their pages have space of the host by then (`disk::room`), as
//! the log has from the first write on: a full host is told to the writer, never to a flush.
//!
//! **A flush**:
//!
//! 1. Payload, and with it the pages that the flush before put in their places. A crash leaves new
//!    bytes in stored blocks and space that nothing names.
//! 2. A log entry with all changed pages of BAT and sector bitmaps. A crash in it leaves the entry
//!    before as the newest one, and that entry's updates are in their places already.
//! 3. The pages in their places, without sync. A crash replays the entry.
//! 4. Space that was given up can be used again, and is punched out of the host file. Nothing that
//!    a crash could bring back names it.
//!
//! So a flush that changed tables costs two syncs, one that did not costs one. When the pages do
//! not fit into one entry, steps 1 to 3 are repeated, bitmaps first, then the BAT from its end, so
//! that no crash shows a block without the bits that belong to it. If a page cannot be put in its
//! place for lack of space, it stays in memory, and nothing more is logged until it is.
//!
//! **Another parent** ([`relink`]): a session in which one log entry changes the parent locator and its
//! place in the metadata table. `DataWriteGuid` stays, as the disk's contents do.
//!
//! **Closing**: a flush; one more sync, for the pages in their places; headers without log GUID;
//! the unused end of the file is cut off, and the log becomes a hole if it was one before. A crash leaves
//! a log to replay, or a file that is too long.
//!
//! # Further files
//!
//! - `lost`: putting the BAT right;
//! - `meta`: what the metadata says beside what the disk is, for looking at and for changing;
//! - `structures`: every structure of a VHDX file, as `info --structures` lists them;
//! - `tests`: tests of the driver as a whole, through the disk.

mod bat;
mod bitmap;
mod blocks;
mod check;
mod compact;
mod create;
mod headers;
mod layout;
mod locator;
mod log;
mod logged;
mod lost;
mod meta;
mod metadata;
mod open;
mod overlay;
mod regions;
mod relink;
mod repair;
mod resize;
mod session;
mod settled;
mod space;
mod stock;
mod structures;
#[cfg(test)]
mod tests;
mod writes;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::compact::Part;
use super::meta::{Changes, Entry};
use super::plan::Steps;
use super::{
    CreateSpec, Footprint, Format, Image, Listing, Naming, NewLink, OpenContext, Opened, Plan,
    Probe, Report,
};
use crate::error::Result;
use crate::storage::{Host, Storage};

pub use create::create_child;

/// The VHDX format.
pub struct Vhdx;

impl Format for Vhdx {
    fn name(&self) -> &'static str {
        "vhdx"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["vhdx", "avhdx"]
    }

    fn subformats(&self) -> &'static [&'static str] {
        &["dynamic", "fixed"]
    }

    fn probe(&self, probe: &Probe) -> bool {
        probe.head.starts_with(&layout::FILE_SIGNATURE)
    }

    fn open(&self, file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<Opened> {
        open::open(file, ctx)
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
        create::create_child(host, path, parent, spec)
    }

    fn meta(&self, file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<Vec<Entry>> {
        meta::list(file, ctx.force)
    }

    fn set_meta(&self, file: Arc<dyn Storage>, ctx: &OpenContext, changes: &Changes) -> Result<()> {
        meta::set(file, ctx, changes)
    }

    fn naming(&self, file: &Arc<dyn Storage>, new: &Path) -> Result<Naming> {
        // What Hyper-V notes of changes, beside the image.
        let note = |end: &str| {
            let [old, new] = [file.path(), new].map(|path| {
                let mut path = path.as_os_str().to_owned();
                path.push(end);
                PathBuf::from(path)
            });
            (old, new)
        };
        Ok(Naming { notes: [".rct", ".mrt"].map(note).to_vec(), ..Naming::default() })
    }

    fn relink(&self, file: Arc<dyn Storage>, ctx: &OpenContext, link: &NewLink<'_>) -> Result<()> {
        relink::relink(file, ctx, link)
    }

    fn unlink(&self, file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<()> {
        relink::unlink(file, ctx)
    }

    fn empty(&self, file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<()> {
        relink::empty(file, ctx)
    }

    fn resize(
        &self,
        file: Arc<dyn Storage>,
        ctx: &OpenContext,
        size: u64,
        plan: &mut Steps,
    ) -> Result<()> {
        resize::resize(file, ctx, size, plan)
    }

    fn compact(&self, file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<Vec<Part>> {
        compact::parts(file, ctx)
    }

    fn structures(
        &self,
        file: Arc<dyn Storage>,
        _: &OpenContext,
        list: &mut Listing,
    ) -> Result<()> {
        structures::list(&*file, list)
    }

    fn check(&self, file: Arc<dyn Storage>, _: &OpenContext, report: &mut Report) -> Result<()> {
        check::check(file, report)
    }

    fn repair(&self, file: Arc<dyn Storage>, _: &OpenContext, plan: &mut Plan) -> Result<()> {
        repair::repair(&file, plan)
    }
}
