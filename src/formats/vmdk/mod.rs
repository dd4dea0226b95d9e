//! The VMDK driver.
//!
//! A VMDK is a descriptor (`descriptor`) and the extents it lists (`link`). An extent is a raw file or
//! a sparse one, and a sparse one comes in several kinds (`hosted`, `stream`, `cowd`, `sesparse`) that
//! have a directory and tables of grains in common (`grains`). `map` answers for the disk they make
//! together, `write` changes it.
//!
//! # The order of writes
//!
//! 1. Before the first change ([`begin_writes`](crate::disk::map::BlockMap::begin_writes)) every
//!    sparse extent is walked (`walk`): damage refuses the write, and the walk leaves what is free
//!    ([`Space`](crate::disk::space)). Then each extent is marked unclean, a file that ends inside a sector gets the rest
//!    of it, and the descriptor gets a new content id; one sync of each file.
//! 2. A new grain lies in space that no durable table leads to: behind the end of the file, which is
//!    extended first, or where a grain was freed by tables that are durable. The disk fills it
//!    completely; only then its entry changes, in memory. Before that the page of the table, and its
//!    redundant copy, get space of the host (`disk::room`), so that 3 finds room.
//! 3. A flush ([`writer`](crate::disk::writer)) takes a snapshot of the changed table pages, syncs the payload, writes the redundant
//!    tables, then the primary ones, and syncs again. What the snapshot freed is free from here on.
//! 4. Closing, with all tables durable, cuts off unused space at the end, clears the unclean marks
//!    and syncs.
//!
//! Another parent ([`relink`]) comes with one step: a descriptor file is replaced, an embedded descriptor
//! is written beside the old one and the header's sector turned to it ([`area`]). So does another size
//! ([`resize`]), before which or behind which the extents get theirs.
//!
//! # What a crash leaves
//!
//! - After 1: an unclean mark and a new content id on an unchanged disk.
//! - After 2: space at the end that nothing uses, or used grains of which nobody knows: leaks. The
//!   next writer's walk finds them free.
//! - Inside 3: sectors of tables old or new, independently in both copies. Either entry is right, for
//!   both lead to durable payload: old space is not reused before 3 is over. Readers see the
//!   primary; the next writer finds the unclean mark and renews the redundant copies from it. In an
//!   image that is marked clean a difference is damage, and refuses the write.
//! - After 3 all that was flushed is there.
//! - Inside 4: a clean image with unused space, or an unclean one without.
//!
//! Freed grains become entry 0 on a disk without parent, which is how the image was made and what all
//! readers take for zeroes; over a parent they become 1 where the image has zeroed grains, and are
//! written with zeroes where it has not.
//!
//! # Further files
//!
//! - `check`: checking;
//! - `child`: children;
//! - `compact`: giving unused grains back;
//! - `create`: creating disks;
//! - `extent_file`: the files of a disk, each wrapped so that the driver knows which ones a flush
//!   must sync, and that extents declared read-only stay as they are;
//! - `in_flight`: grains for which a write is planned and not over;
//! - `layout`: on-disk layout of hosted sparse extents (`KDMV`);
//! - `meta`: what the descriptor says beside what the disk is, for looking at and for changing;
//! - `naming`: which files are a disk's own, and what they and the descriptor are called when the
//!   disk gets another name;
//! - `repair`: what can be rebuilt of sparse extents;
//! - `settled`: a disk found sound, for changes of its files as a whole;
//! - `structures`: every structure of a VMDK's files, as `info --structures` lists them;
//! - `tables`: planned changes of grain tables;
//! - `tests`: tests of the driver as a whole, through `formats::open` and `Disk`.

mod area;
mod check;
mod child;
mod compact;
mod cowd;
mod create;
mod descriptor;
mod extent_file;
mod grains;
mod hosted;
mod in_flight;
mod layout;
mod link;
mod map;
mod meta;
mod naming;
mod relink;
mod repair;
mod resize;
mod sesparse;
mod settled;
mod stream;
mod structures;
mod tables;
mod walk;
mod write;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::compact::Part;
use super::meta::{Changes, Entry};
use super::plan::Steps;
use super::{
    CreateSpec, Footprint, Format, Identity, Image, ImageInfo, Label, Listing, Naming, NewLink,
    OpenContext, Opened, Plan, Probe, Report, references,
};
use crate::disk::map::Geometry;
use crate::error::{Error, Result};
use crate::storage::{Host, Storage};
pub use child::create_child;
pub use create::{begin_stream, wrap};
use descriptor::ExtentAccess;
use grains::TableCaches;
use link::{Link, parent_link};
use map::{Backing, Parts, VmdkMap};
pub use naming::take_apart;
pub use stream::write::{DEFAULT_LEVEL, GRAIN, LEVELS, Packer, StreamWriter};

/// The VMDK format.
pub struct Vmdk;

impl Format for Vmdk {
    fn name(&self) -> &'static str {
        "vmdk"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["vmdk"]
    }

    fn subformats(&self) -> &'static [&'static str] {
        &create::SUBFORMATS
    }

    fn probe(&self, probe: &Probe) -> bool {
        let head = probe.head.as_slice();
        head.starts_with(&layout::MAGIC)
            || head.starts_with(&layout::MAGIC_UNFINISHED)
            || head.starts_with(&layout::MAGIC_COWD)
            || head.starts_with(&layout::MAGIC_ENCRYPTED)
            || head.starts_with(&layout::MAGIC_SESPARSE)
            || descriptor::looks_like(head)
    }

    fn open(&self, file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<Opened> {
        let link = Link::open(file, ctx)?;
        let parent = parent_link(&link.descriptor.descriptor)?;
        let geometry = geometry(&link);
        let info = info(&link, &geometry);
        let identity = Identity::VmdkCid(link.descriptor.descriptor.cid().unwrap_or(0));
        let (read_only, damage) = (link.read_only.clone(), link.damage.clone());
        let map = Box::new(map(link, geometry, parent.is_some(), ctx));
        Ok(Opened { map, info, identity, parent, read_only, damage })
    }

    fn label(&self, file: Arc<dyn Storage>, _: &OpenContext) -> Result<Label> {
        let descriptor = link::find_descriptor(&file)?.file.descriptor;
        let sectors = descriptor.extents.iter().map(|extent| extent.sectors);
        Ok(Label {
            identity: Identity::VmdkCid(descriptor.cid().unwrap_or(0)),
            parent: parent_link(&descriptor)?.map(|link| link.identity),
            size: sectors.fold(0, u64::saturating_add).saturating_mul(layout::SECTOR),
        })
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
        child::create_child(host, path, parent, spec)
    }

    fn own_files(&self, file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<Vec<PathBuf>> {
        let image = file.path().to_owned();
        let link = Link::open(file, ctx)?;
        let written = link.files.iter().filter(|file| !file.protected());
        let files = written.map(|file| file.path().to_owned());
        Ok(files.filter(|path| naming::is_part_of(&image, path)).collect())
    }

    fn naming(&self, file: &Arc<dyn Storage>, new: &Path) -> Result<Naming> {
        naming::naming(file, new)
    }

    fn call_itself(&self, file: Arc<dyn Storage>, ctx: &OpenContext, new: &Path) -> Result<()> {
        naming::call_itself(&file, ctx, new)
    }

    fn meta(&self, file: Arc<dyn Storage>, _: &OpenContext) -> Result<Vec<Entry>> {
        meta::list(&file)
    }

    fn set_meta(&self, file: Arc<dyn Storage>, ctx: &OpenContext, changes: &Changes) -> Result<()> {
        meta::set(&file, ctx, changes)
    }

    fn relink(&self, file: Arc<dyn Storage>, ctx: &OpenContext, link: &NewLink<'_>) -> Result<()> {
        relink::relink(file, ctx, link)
    }

    fn unlink(&self, file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<()> {
        relink::unlink(&file, ctx)
    }

    fn empty(&self, file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<()> {
        let link = Link::open(file, ctx)?;
        if let Some(why) = &link.read_only {
            return Err(Error::corrupt(format!("not written: {why}")));
        }
        if parent_link(&link.descriptor.descriptor)?.is_none() {
            return Err(Error::invalid("the image is no child: it has no parent"));
        }
        let geometry = geometry(&link);
        map(link, geometry, true, ctx).forget()
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
        compact::parts(&file, ctx)
    }

    fn structures(
        &self,
        file: Arc<dyn Storage>,
        ctx: &OpenContext,
        list: &mut Listing,
    ) -> Result<()> {
        structures::list(&file, ctx, list)
    }

    fn check(&self, file: Arc<dyn Storage>, ctx: &OpenContext, report: &mut Report) -> Result<()> {
        check::check(file, ctx, report)
    }

    fn repair(&self, file: Arc<dyn Storage>, ctx: &OpenContext, plan: &mut Plan) -> Result<()> {
        repair::repair(file, ctx, plan)
    }
}

/// Whether a file is one extent of a disk, and no disk by itself.
pub fn is_lone_extent(probe: &Probe) -> bool {
    let head = probe.head.as_slice();
    if head.starts_with(&layout::MAGIC_COWD) || head.starts_with(&layout::MAGIC_SESPARSE) {
        return true;
    }
    let header = head.first_chunk().and_then(|bytes| layout::Header::decode(bytes).ok());
    header.is_some_and(|header| {
        let descriptor = header.descriptor_at.saturating_mul(layout::SECTOR) as usize;
        // An area for a descriptor without one in it is what QEMU gives to split disks.
        header.descriptor_at == 0 || head.get(descriptor) == Some(&0)
    })
}

/// The files that a descriptor lists as extents, from its own folder; none where the text is no descriptor.
pub fn extent_names(text: &[u8]) -> Vec<PathBuf> {
    if !descriptor::looks_like(text) {
        return Vec::new();
    }
    let lines = descriptor::Descriptor::parse(text).map_or(Vec::new(), |d| d.extents);
    let names = lines.into_iter().filter_map(|line| line.name);
    names.filter_map(|name| references::beneath(&name).ok()).collect()
}

/// The mapping of a disk.
fn map(link: Link, geometry: Geometry, has_parent: bool, ctx: &OpenContext) -> VmdkMap {
    VmdkMap::new(Parts {
        slots: link.slots,
        sparse: link.sparse,
        files: link.files,
        descriptor: link.descriptor,
        has_parent,
        geometry,
        next_cid: match ctx.next_identity {
            Some(Identity::VmdkCid(cid)) => Some(cid),
            _ => None,
        },
        cache: TableCaches::new(&ctx.budget),
    })
}

/// The disk's sizes.
fn geometry(link: &Link) -> Geometry {
    let descriptor = &link.descriptor.descriptor;
    let sector = |key| match descriptor.get(key) {
        Some("4096") if link.size.is_multiple_of(4096) => 4096,
        _ => 512,
    };
    let grain = link.sparse.iter().map(|s| s.tables.grain).max();
    let logical_sector = sector("ddb.logicalSectorSize");
    Geometry {
        size: link.size,
        logical_sector,
        physical_sector: sector("ddb.physicalSectorSize").max(logical_sector),
        block_size: grain.unwrap_or(link.size),
    }
}

/// What `info` shows.
fn info(link: &Link, geometry: &Geometry) -> ImageInfo {
    let descriptor = &link.descriptor.descriptor;
    let mut details = Map::new();
    let mut put = |key: &str, value: Value| {
        details.insert(key.to_owned(), value);
    };
    put("create_type", json!(descriptor.create_type()));
    put("cid", json!(descriptor.get("CID")));
    put("parent_cid", json!(descriptor.get("parentCID")));
    put("adapter_type", json!(descriptor.get("ddb.adapterType")));
    put("hw_version", json!(descriptor.get("ddb.virtualHWVersion")));
    let chs = ["cylinders", "heads", "sectors"]
        .map(|part| descriptor.get(&format!("ddb.geometry.{part}")).and_then(|v| v.parse().ok()));
    if let [Some(cylinders), Some(heads), Some(sectors)] = chs {
        let [cylinders, heads, sectors]: [u64; 3] = [cylinders, heads, sectors];
        put("chs", json!({ "cylinders": cylinders, "heads": heads, "sectors": sectors }));
    }
    put("unclean_shutdown", json!(link.sparse.iter().any(|s| s.unclean)));
    let extents: Vec<Value> = link
        .slots
        .iter()
        .zip(&descriptor.extents)
        .map(|(slot, line)| extent_info(link, &slot.backing, line))
        .collect();
    put("extents", Value::Array(extents));
    let ddb: Map<String, Value> = descriptor
        .settings()
        .filter_map(|(key, value)| Some((key.strip_prefix("ddb.")?.to_owned(), json!(value))))
        .collect();
    put("ddb", Value::Object(ddb));

    let own = link.descriptor.file.path();
    let tools = descriptor.get("ddb.toolsVersion");
    ImageInfo {
        format: "vmdk",
        subformat: descriptor.create_type().to_owned(),
        virtual_size: link.size,
        logical_sector_size: geometry.logical_sector,
        physical_sector_size: geometry.physical_sector,
        block_size: (!link.sparse.is_empty()).then_some(geometry.block_size),
        uuid: descriptor
            .get("ddb.uuid")
            .or_else(|| descriptor.get("ddb.uuid.image"))
            .map(str::to_owned),
        creator: match (descriptor.get("ddb.uuid.image"), tools) {
            (Some(_), _) => Some("VirtualBox".to_owned()),
            (None, Some("2147483647")) => Some("QEMU".to_owned()),
            _ => None,
        },
        parent: descriptor.get("parentFileNameHint").map(str::to_owned),
        extents: link.files.iter().map(|f| f.path().to_owned()).filter(|p| p != own).collect(),
        dirty: link.sparse.iter().any(|s| s.unclean),
        details,
        warnings: link.problems.iter().chain(&link.warnings).cloned().collect(),
    }
}

/// One extent as `info` shows it; sizes in bytes.
fn extent_info(link: &Link, backing: &Backing, line: &descriptor::ExtentLine) -> Value {
    let access = match line.access {
        ExtentAccess::ReadWrite => "RW",
        ExtentAccess::ReadOnly => "RDONLY",
        ExtentAccess::None => "NOACCESS",
    };
    let mut value = json!({
        "access": access,
        "type": line.kind.word(),
        "size": line.sectors * layout::SECTOR,
    });
    match backing {
        Backing::Zero | Backing::NoAccess => {}
        Backing::Flat { file, at, .. } => {
            value["file"] = json!(link.files[*file].path());
            value["offset"] = json!(at);
        }
        Backing::Sparse(number) => {
            let sparse = &link.sparse[*number];
            value["file"] = json!(sparse.file.path());
            value["grain_size"] = json!(sparse.tables.grain);
            value["version"] = json!(sparse.version);
            value["flags"] = json!(sparse.flags);
        }
    }
    value
}

#[cfg(test)]
mod tests;
