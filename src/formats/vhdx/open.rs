//! Opening: from the headers to the BAT, reading a fixed amount whatever the size of the disk.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use parking_lot::Mutex;
use serde_json::{Value, json};
use uuid::Uuid;

use super::bat::{self, BatLayout, ENTRY_BYTES, Slot, State};
use super::blocks::{Blocks, LogState, Shape};
use super::headers::{Header, HeaderWriter, Headers, read_creator};
use super::layout::{LOG_SECTOR, MIB};
use super::locator::Locator;
use super::log::LogPlace;
use super::log::replay::{find_active, overlay};
use super::metadata::Metadata;
use super::overlay::{Overlay, ReplayedFile};
use super::regions::Regions;
use crate::disk::map::{DiskRange, Geometry};
use crate::disk::tables::{CacheBudget, TableCache};
use crate::disk::writer::Writer;
use crate::error::{Error, Result};
use crate::formats::{Identity, ImageInfo, OpenContext, Opened, ParentLink};
use crate::storage::{Access, Storage};

/// What can be done where an image cannot be trusted.
const FORCE_HINT: &str = "`-o force` reads it all the same";

/// Everything that opening learns before the first block is asked for.
pub(super) struct Parts {
    pub creator: String,
    pub headers: Headers,
    /// The file as its log makes it; what everything but the headers is read from.
    pub file: Arc<dyn Storage>,
    pub replayed: Option<Arc<ReplayedFile>>,
    /// Length of `file`.
    pub file_len: u64,
    /// Number of log entries to replay.
    pub log_entries: usize,
    pub regions: Regions,
    pub metadata: Metadata,
    pub layout: BatLayout,
    /// What would have kept the file from being opened without force.
    pub faults: Vec<Error>,
    /// What is odd.
    pub warnings: Vec<String>,
    /// Why the file must not be written, if so.
    pub read_only: Option<String>,
    /// What is wrong with the log, if that is all that keeps the file from being written.
    pub bad_log: Option<BadLog>,
    /// The end of the file cuts off entries of the BAT, and but for its log that is all that keeps the
    /// file from being written.
    pub cut_bat: bool,
}

/// What can be wrong with a log, and be put right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BadLog {
    /// It is empty, as it should be, but lies where no log can lie.
    Misplaced,
    /// It should be replayed, but has no valid entry.
    Lost,
}

impl Parts {
    /// Reads and checks everything. With `force` more is tolerated, but then not written.
    pub fn read(raw: Arc<dyn Storage>, force: bool) -> Result<Self> {
        let mut doubts = Doubts { force, ..Doubts::default() };
        let creator = read_creator(&*raw)?;
        let headers = match Headers::read(&*raw) {
            Ok(headers) => headers,
            Err(e) if force => {
                doubts.tolerate(e)?;
                Headers::unknown()
            }
            Err(e) => return Err(e.hint(FORCE_HINT)),
        };
        let header = headers.header().clone();
        if headers.ambiguous {
            doubts.tolerate(Error::corrupt("two different headers claim to be current"))?;
        }
        if header.version != 1 {
            let what = format!("version {} of the format is not known", header.version);
            return Err(Error::unsupported(what));
        }
        let raw_len =
            raw.len().map_err(|e| Error::io("asking for the size", &e).in_file(raw.path()))?;
        let (overlay, log_entries) = match replay(&*raw, raw_len, &header, &mut doubts)? {
            Some((overlay, entries)) => (Some(overlay), entries),
            None => (None, 0),
        };
        let replayed = overlay.map(|overlay| ReplayedFile::new(raw.clone(), overlay));
        let file: Arc<dyn Storage> = match &replayed {
            Some(replayed) => replayed.clone(),
            None => raw,
        };
        let file_len =
            file.len().map_err(|e| Error::io("asking for the size", &e).in_file(file.path()))?;

        let regions = Regions::read(&*file, file_len)?;
        let metadata = Metadata::read(&*file, &regions.metadata, force)?;
        let layout = BatLayout::of(&metadata);
        doubts.warnings.extend(regions.oddities.iter().chain(&metadata.oddities).cloned());
        if let Some(why) = metadata.read_only.as_ref().or(regions.oddities.first()) {
            doubts.must_not_write(why.clone());
        }
        let log = header.log_offset..header.log_offset.saturating_add(header.log_length.into());
        let overlap = regions.all.iter().find(|r| {
            r.range().start < log.end && log.start < r.range().end && header.log_length > 0
        });
        if let Some(region) = overlap {
            let e = Error::corrupt(format!("region {} overlaps the log", region.guid));
            if header.dirty() {
                return Err(e);
            }
            doubts.misplaced_log(e.what().to_owned());
        }
        if header.sequence > u64::MAX - 16 {
            doubts.warn("the header's sequence number cannot grow any more".to_owned());
        }
        let mut cut_bat = false;
        if regions.bat.length / ENTRY_BYTES < layout.entries {
            doubts.warn("the BAT is too small for the disk".to_owned());
        } else if regions.bat.entries(file_len) < layout.entries {
            cut_bat = doubts.read_only.is_none();
            doubts.warn("the file ends in the middle of the BAT".to_owned());
        }
        let Doubts { faults, warnings, read_only, bad_log, .. } = doubts;
        let (bad_log, read_only) = match (bad_log, read_only) {
            (Some((what, why)), None) => (Some(what), Some(why)),
            (_, read_only) => (None, read_only),
        };
        Ok(Self {
            creator,
            headers,
            file,
            replayed,
            file_len,
            log_entries,
            regions,
            metadata,
            layout,
            faults,
            warnings,
            read_only,
            bad_log,
            cut_bat,
        })
    }

    /// What never changes about the file.
    pub fn shape(&self) -> Shape {
        let header = self.headers.header();
        let header_section = 0..MIB;
        let mut reserved = vec![header_section];
        if header.log_length > 0 && self.bad_log != Some(BadLog::Misplaced) {
            let end = header.log_offset.saturating_add(header.log_length.into());
            reserved.push(header.log_offset..end.min(self.file_len));
        }
        reserved.extend(self.regions.all.iter().map(|r| r.range()));
        Shape {
            geometry: Geometry {
                size: self.metadata.size,
                logical_sector: self.metadata.logical_sector,
                physical_sector: self.metadata.physical_sector,
                block_size: self.metadata.block_size,
            },
            layout: self.layout,
            bat: self.regions.bat.clone(),
            bat_entries: self.regions.bat.entries(self.file_len),
            fixed: self.metadata.fixed,
            has_parent: self.metadata.has_parent,
            reserved,
        }
    }

    /// The parent that the disk needs.
    pub fn parent(&self) -> Result<Option<ParentLink>> {
        if !self.metadata.has_parent {
            return Ok(None);
        }
        match &self.metadata.locator {
            Some(Ok(locator)) => locator.link().map(Some),
            Some(Err(e)) => Err(e.clone()),
            None => Err(Error::corrupt("the disk has a parent, but no parent locator")),
        }
    }

    /// The mapping. `next_data_write` is the identity that the file gets with the first write, if it
    /// is not to be a new one.
    pub fn into_blocks(self, budget: &Arc<CacheBudget>, next_data_write: Option<Uuid>) -> Blocks {
        let session = LogState {
            headers: HeaderWriter::new(&self.file, &self.headers),
            replayed: self.replayed.clone(),
            ring: None,
            sparse_log: false,
            unapplied: Vec::new(),
        };
        Blocks {
            shape: self.shape(),
            cache: TableCache::new(LOG_SECTOR as usize, budget),
            file_len: Arc::new(AtomicU64::new(self.file_len)),
            files: [self.file],
            next_data_write,
            writer: Writer::default(),
            session: Mutex::new(session),
        }
    }

    /// The part of the disk whose blocks have no entry.
    fn lost(&self) -> Vec<DiskRange> {
        let entries = self.regions.bat.entries(self.file_len);
        if entries >= self.layout.entries {
            return Vec::new();
        }
        let ratio = self.layout.chunk_ratio;
        let blocks = entries / (ratio + 1) * ratio + (entries % (ratio + 1)).min(ratio);
        let size = self.metadata.size;
        let lost = (blocks * self.layout.block_size).min(size)..size;
        vec![lost]
    }
}

/// Decides what of the oddities met while opening is tolerated.
#[derive(Default)]
struct Doubts {
    force: bool,
    faults: Vec<Error>,
    warnings: Vec<String>,
    /// Why the file must not be written, but for its log.
    read_only: Option<String>,
    /// The same of its log.
    bad_log: Option<(BadLog, String)>,
}

impl Doubts {
    /// An error unless the caller insists; then the file is not written.
    fn tolerate(&mut self, e: Error) -> Result<()> {
        let e = self.insist(e)?;
        self.must_not_write(e.what().to_owned());
        self.faults.push(e);
        Ok(())
    }

    /// The same for a log without entries.
    fn tolerate_lost_log(&mut self, e: Error) -> Result<()> {
        let e = self.insist(e)?;
        self.bad_log = Some((BadLog::Lost, e.what().to_owned()));
        self.faults.push(e);
        Ok(())
    }

    fn insist(&self, e: Error) -> Result<Error> {
        if self.force { Ok(e) } else { Err(e.hint(FORCE_HINT)) }
    }

    fn must_not_write(&mut self, why: String) {
        self.read_only.get_or_insert(why);
    }

    fn warn(&mut self, why: String) {
        self.warnings.push(why.clone());
        self.must_not_write(why);
    }

    fn misplaced_log(&mut self, why: String) {
        self.warnings.push(why.clone());
        self.bad_log = Some((BadLog::Misplaced, why));
    }
}

/// What the log does to the file, and by how many entries; `None` if it is not to be replayed.
fn replay(
    raw: &dyn Storage,
    raw_len: u64,
    header: &Header,
    doubts: &mut Doubts,
) -> Result<Option<(Overlay, usize)>> {
    if !header.dirty() {
        if header.log_length > 0
            && let Err(e) = header.check_log_place(raw_len)
        {
            doubts.misplaced_log(e.what().to_owned());
        }
        return Ok(None);
    }
    let found = || {
        if header.log_version != 0 {
            let what = format!("version {} of the log is not known", header.log_version);
            return Err(Error::unsupported(what));
        }
        header.check_log_place(raw_len)?;
        let place = LogPlace {
            offset: header.log_offset,
            length: header.log_length.into(),
            guid: header.log,
        };
        let Some(sequence) = find_active(raw, &place)? else { return Ok(None) };
        let flushed = sequence.newest.flushed_file_offset;
        if raw_len < flushed {
            return Err(Error::corrupt(format!(
                "the file is truncated: it has {raw_len:#x} bytes, its log knows of {flushed:#x}"
            )));
        }
        let overlay = overlay(raw, &place, &sequence, raw_len)?;
        let stated = sequence.newest.last_file_offset;
        Ok(Some((overlay, sequence.entries.len(), raw_len.max(stated) - raw_len)))
    };
    match found() {
        Ok(Some((overlay, entries, missing))) => {
            if missing > 0 {
                let what = format!("the file is {missing} bytes shorter than its log states");
                doubts.warnings.push(format!("{what}; replaying the log extends it"));
            }
            Ok(Some((overlay, entries)))
        }
        Ok(None) => {
            let e = Error::corrupt("the log should be replayed, but holds no valid entry");
            doubts.tolerate_lost_log(e.at(header.log_offset))?;
            Ok(None)
        }
        Err(e) => {
            doubts.tolerate(e)?;
            Ok(None)
        }
    }
}

/// Opens the file as a disk.
pub(super) fn open(file: Arc<dyn Storage>, ctx: &OpenContext) -> Result<Opened> {
    let mut parts = Parts::read(file, ctx.force)?;
    let parent = match parts.parent() {
        Ok(parent) => parent,
        Err(e) if ctx.force => {
            parts.warnings.push(e.what().to_owned());
            parts.read_only.get_or_insert(e.what().to_owned());
            None
        }
        Err(e) => return Err(e.hint(FORCE_HINT)),
    };
    for extension in ["rct", "mrt"] {
        let mut name = parts.file.path().as_os_str().to_owned();
        name.push(format!(".{extension}"));
        if ctx.host().open(&PathBuf::from(name), Access::Peek).is_ok() {
            let what = "beside the image tracks changes: it is stale once the image is written";
            parts.warnings.push(format!("a file .{extension} {what}"));
        }
    }
    for fault in &parts.faults {
        log::warn!("{}: {fault}; reading by force", parts.file.path().display());
    }
    let info = info(&parts, parent.as_ref());
    let identity = Identity::VhdxDataWrite(vec![parts.headers.header().data_write]);
    let damage = parts.lost();
    let read_only = match &parts.read_only {
        Some(why) => Some(why.clone()),
        None => cut_short(&parts)?,
    };
    let map = parts.into_blocks(&ctx.budget, next_data_write(ctx));
    Ok(Opened { map: Box::new(map), info, identity, parent, read_only, damage })
}

/// The `DataWriteGuid` that the image is to have when its contents change, if that is given.
pub(super) fn next_data_write(ctx: &OpenContext) -> Option<Uuid> {
    match &ctx.next_identity {
        Some(Identity::VhdxDataWrite(ids)) => ids.first().copied(),
        _ => None,
    }
}

/// Which block the end of the file cuts short, if any. Whole files are multiples of 1 MiB long: of them
/// the BAT is not gone through before the first write.
fn cut_short(parts: &Parts) -> Result<Option<String>> {
    if parts.file_len.is_multiple_of(MIB) {
        return Ok(None);
    }
    let shape = parts.shape();
    let mut found = None;
    bat::scan(&*parts.file, &parts.regions.bat, &parts.layout, |_, slot, entry| {
        if let (Slot::Block(block), State::Present | State::Partial) = (slot, entry.state())
            && entry.offset().saturating_add(shape.needed(block)) > parts.file_len
        {
            found.get_or_insert(block);
        }
    })?;
    Ok(found.map(|block| format!("the file ends in the middle of block {block} or before it")))
}

fn info(parts: &Parts, parent: Option<&ParentLink>) -> ImageInfo {
    let (header, metadata) = (parts.headers.header(), &parts.metadata);
    let subformat = match (metadata.has_parent, metadata.fixed) {
        (true, _) => "differencing",
        (false, true) => "fixed",
        (false, false) => "dynamic",
    };
    let mut details = serde_json::Map::new();
    let mut add = |name: &str, value: Value| {
        details.insert(name.to_owned(), value);
    };
    add("header_sequence", json!(header.sequence));
    add("file_write_guid", json!(header.file_write.to_string()));
    add("data_write_guid", json!(header.data_write.to_string()));
    add("log_state", json!(if header.dirty() { "dirty" } else { "clean" }));
    if header.dirty() {
        add("log_guid", json!(header.log.to_string()));
        add("log_entries_to_replay", json!(parts.log_entries));
    }
    add("log_offset", json!(header.log_offset));
    add("log_length", json!(header.log_length));
    add("bat_offset", json!(parts.regions.bat.offset));
    add("bat_length", json!(parts.regions.bat.length));
    add("metadata_offset", json!(parts.regions.metadata.offset));
    let items: Vec<_> = metadata.items.iter().map(|item| item.name()).collect();
    add("metadata_items", json!(items));
    if let Some(Ok(Locator(keys))) = &metadata.locator {
        add("parent_locator", json!(keys));
    }
    let mut warnings: Vec<_> = parts.faults.iter().map(Error::to_string).collect();
    warnings.extend_from_slice(&parts.warnings);
    if parts.headers.slots.iter().any(Option::is_none) {
        warnings.push("one of the two headers is invalid".to_owned());
    }
    if parts.regions.copy != 0 {
        warnings.push("the first region table is invalid".to_owned());
    }
    if metadata.locator.is_some() && !metadata.has_parent {
        warnings.push("there is a parent locator, but the disk has no parent".to_owned());
    }
    ImageInfo {
        format: "vhdx",
        subformat: subformat.to_owned(),
        virtual_size: metadata.size,
        logical_sector_size: metadata.logical_sector,
        physical_sector_size: metadata.physical_sector,
        block_size: Some(metadata.block_size),
        uuid: (metadata.disk_id != Uuid::nil()).then(|| metadata.disk_id.to_string()),
        creator: (!parts.creator.is_empty()).then(|| parts.creator.clone()),
        parent: parent.and_then(|link| link.candidates.first().cloned()),
        extents: Vec::new(),
        dirty: header.dirty(),
        details,
        warnings,
    }
}
