//! Another size of the disk, in place.
//!
//! # Order
//!
//! The descriptor says how large the disk is, and changes in one step. No extent may have less than it
//! says, so to grow the extents come first, to shrink the descriptor does.
//!
//! *Flat*: the file is extended, zeroes behind the old end; or cut off. *Split*: the last extent grows up
//! to the size of the others, and new ones are made. *Hosted sparse*: a larger directory and its copy,
//! and the new tables, go behind the present ones; grains in their way are copied to the end, then both
//! copies of their tables change, under the mark of an extent that is not closed. Then the header's one
//! sector says the new size and where the directories are, and takes the mark away. *Copy-on-write*: the
//! directory grows where it is; grains and tables behind it move to the end likewise.
//!
//! A crash leaves the old size or the new one, and at worst space that nothing uses, or a new extent's
//! file that no descriptor names: the same call takes its place.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use crate::codec;
use crate::disk::map::FileIndex;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::plan::Steps;
use crate::formats::{OpenContext, references};
use crate::storage::Storage;

use super::area::{Area, Stage};
use super::cowd;
use super::create::{MAX_EXTENTS, MAX_SECTORS, NewSparse, SPLIT, chs};
use super::descriptor::{ExtentAccess, ExtentLine, ExtentType};
use super::grains::{Dialect, Grain};
use super::layout::{ENTRIES_PER_TABLE, FLAG_ZEROED_GRAINS, Header, SECTOR, TABLE_SECTORS};
use super::link::Link;
use super::map::{Backing, SparseExtent};
use super::settled::settle;
use super::tables;
use super::walk;

/// Plans the change of the disk whose descriptor is in `file` to `size` bytes.
pub fn resize(
    file: Arc<dyn Storage>,
    ctx: &OpenContext,
    size: u64,
    plan: &mut Steps,
) -> Result<()> {
    let link = settle(&file, ctx)?;
    if link.descriptor.descriptor.parent_cid()?.is_some() {
        let what = "a VMDK child has the size of its parent";
        return Err(Error::invalid(what).hint("`flatdisk commit` or `flatdisk convert` it first"));
    }
    let sectors = size / SECTOR;
    if sectors > MAX_SECTORS {
        return Err(Error::invalid(format!("{size} bytes are more than a VMDK can have")));
    }
    if size == link.size {
        return Ok(());
    }
    let change = Change { link: &link, ctx };
    if size > link.size { change.grow(sectors, plan) } else { change.shrink(sectors, plan) }
}

struct Change<'a> {
    link: &'a Link,
    ctx: &'a OpenContext,
}

impl Change<'_> {
    fn lines(&self) -> &[ExtentLine] {
        &self.link.descriptor.descriptor.extents
    }

    fn grow(&self, sectors: u64, plan: &mut Steps) -> Result<()> {
        let lines = self.lines();
        let (Some(last), Some(slot)) = (lines.last(), self.link.slots.last()) else {
            return Err(Error::corrupt("the descriptor names no extents"));
        };
        let more = sectors - self.link.size / SECTOR;
        let largest = self.largest_extent();
        let grown = last.sectors.max((last.sectors + more).min(largest));
        let mut header = None;
        if grown > last.sectors {
            match slot.backing {
                Backing::Flat { file, at, .. } => self.grow_flat(file, at, last, grown, plan)?,
                Backing::Sparse(number) => {
                    let extent = &self.link.sparse[number];
                    header = match extent.tables.dialect {
                        Dialect::Hosted if extent.writable => {
                            let header = Hosted::read(extent)?.grow(grown, plan)?;
                            let own = Arc::ptr_eq(&extent.file, &self.link.descriptor.file);
                            own.then_some(header)
                        }
                        Dialect::Cowd if extent.writable => {
                            grow_cowd(extent, grown, plan)?;
                            None
                        }
                        _ => return Err(cannot_grow(last)),
                    };
                }
                Backing::Zero | Backing::NoAccess => return Err(cannot_grow(last)),
            }
        }
        let mut left = sectors - (self.link.size / SECTOR - last.sectors) - grown;
        let mut new = Vec::new();
        let mut name = last.name.clone().unwrap_or_default();
        while left > 0 {
            let size = left.min(largest);
            name = next_name(&name).ok_or_else(|| cannot_grow(last))?;
            new.push(self.new_extent(last, &name, size, plan)?);
            left -= size;
        }
        if lines.len() + new.len() > MAX_EXTENTS as usize {
            return Err(Error::invalid(format!("more than {MAX_EXTENTS} extents")));
        }
        let mut sizes: Vec<u64> = lines.iter().map(|line| line.sectors).collect();
        if let Some(size) = sizes.last_mut() {
            *size = grown;
        }
        self.put_descriptor(&sizes, &new, header, plan)?;
        Ok(())
    }

    /// Most sectors that an extent of the disk may get.
    fn largest_extent(&self) -> u64 {
        let lines = self.lines();
        let create_type = self.link.descriptor.descriptor.create_type().to_ascii_lowercase();
        let others = lines[..lines.len().saturating_sub(1)].iter().map(|line| line.sectors).max();
        match create_type.contains("gbmaxextent") {
            true => others.unwrap_or(SPLIT),
            false => u64::MAX,
        }
    }

    fn grow_flat(
        &self,
        file: FileIndex,
        at: u64,
        line: &ExtentLine,
        sectors: u64,
        plan: &mut Steps,
    ) -> Result<()> {
        let storage = &self.link.files[file];
        let shared = self.lines().iter().filter(|other| other.name == line.name).count() > 1;
        if shared || storage.protected() {
            return Err(cannot_grow(line));
        }
        let storage: Arc<dyn Storage> = storage.clone();
        let len = length(&*storage)?;
        let end = at + line.sectors * SECTOR;
        if len > end {
            // Whatever lies there never was the disk's.
            plan.punch(&storage, end..len, "the new part of the disk reads as zeroes");
        }
        plan.set_len(&storage, (at + sectors * SECTOR).max(len), "room for the disk");
        plan.sync(&storage);
        Ok(())
    }

    /// Plans a new extent of the same kind as that of `like`; its line.
    fn new_extent(
        &self,
        like: &ExtentLine,
        name: &str,
        sectors: u64,
        plan: &mut Steps,
    ) -> Result<String> {
        let (len, parts) = match like.kind {
            ExtentType::Flat | ExtentType::Vmfs => (sectors * SECTOR, Vec::new()),
            ExtentType::Sparse => {
                let last = self.link.sparse.last();
                let (grain, flags) =
                    last.map_or((0, 0), |extent| (extent.tables.grain, extent.flags));
                let zeroed = flags & FLAG_ZEROED_GRAINS != 0;
                let new = NewSparse::new(sectors, grain / SECTOR, zeroed, None)?;
                (new.len, new.parts.into_iter().map(|(at, bytes, _)| (at, bytes)).collect())
            }
            _ => return Err(cannot_grow(like)),
        };
        let relative = references::beneath(name)?;
        let path = self.directory().join(relative);
        match self.ctx.open_extent(name) {
            // What a crash left of the same change holds nothing else.
            Ok(stray) if is_blank(&*stray, len, &parts)? => {
                plan.remove(self.ctx.host(), path.clone(), "a new extent that was not finished");
            }
            Ok(_) => {
                let what = format!("`{name}` is in the way of a new extent");
                return Err(Error::new(ErrorKind::Exists, what).in_file(&path));
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
        plan.create(self.ctx.host(), path, len, parts, "a new extent");
        let offset = if like.offset.is_some() { " 0" } else { "" };
        Ok(format!("RW {sectors} {} \"{name}\"{offset}", like.kind.word()))
    }

    fn directory(&self) -> PathBuf {
        self.link.descriptor.file.path().parent().map(PathBuf::from).unwrap_or_default()
    }

    fn shrink(&self, sectors: u64, plan: &mut Steps) -> Result<()> {
        let mut left = sectors;
        let mut sizes = Vec::new();
        for line in self.lines() {
            if left == 0 {
                break;
            }
            let size = line.sectors.min(left);
            sizes.push(size);
            left -= size;
        }
        let kept = sizes.len();
        let own = self.link.descriptor.file.path();
        let header = self.put_descriptor(&sizes, &[], None, plan)?;
        let (line, slot) = (&self.lines()[kept - 1], &self.link.slots[kept - 1]);
        let shared = |line: &ExtentLine, others: &[ExtentLine]| {
            others.iter().filter(|other| other.name == line.name).count() > 1
        };
        if sizes[kept - 1] < line.sectors && line.access == ExtentAccess::ReadWrite {
            match slot.backing {
                Backing::Flat { file, at, .. } if !shared(line, self.lines()) => {
                    let storage: Arc<dyn Storage> = self.link.files[file].clone();
                    let len = at + sizes[kept - 1] * SECTOR;
                    plan.set_len(&storage, len, "nothing uses the end of the file");
                }
                Backing::Sparse(number) => {
                    let extent = &self.link.sparse[number];
                    let own = Arc::ptr_eq(&extent.file, &self.link.descriptor.file);
                    let header = header.filter(|_| own);
                    shrink_sparse(extent, sizes[kept - 1], header, plan)?;
                }
                _ => {}
            }
        }
        for (line, slot) in self.lines().iter().zip(&self.link.slots).skip(kept) {
            let file = match slot.backing {
                Backing::Flat { file, .. } => &self.link.files[file],
                Backing::Sparse(number) => &self.link.sparse[number].file,
                _ => continue,
            };
            if !shared(line, self.lines()) && file.path() != own && !file.protected() {
                plan.remove(
                    self.ctx.host(),
                    file.path().to_owned(),
                    "an extent that is not needed",
                );
            }
        }
        Ok(())
    }

    /// Plans the new descriptor: extents of these sizes, and more. `header` is the sparse header as it
    /// is by then, where the descriptor is embedded behind one that changed; that as it is afterwards.
    fn put_descriptor(
        &self,
        sizes: &[u64],
        more: &[String],
        header: Option<[u8; SECTOR as usize]>,
        plan: &mut Steps,
    ) -> Result<Option<[u8; SECTOR as usize]>> {
        let found = &self.link.descriptor;
        let ide = found.descriptor.get("ddb.adapterType") == Some("ide");
        let added = more.iter().filter_map(|line| line.split(' ').nth(1)?.parse::<u64>().ok());
        let total = sizes.iter().sum::<u64>() + added.sum::<u64>();
        let names = ["cylinders", "heads", "sectors"].map(|name| format!("ddb.geometry.{name}"));
        let geometry: Vec<_> = names
            .iter()
            .zip(chs(total, ide))
            .map(|(name, value)| (name.as_str(), value.to_string()))
            .collect();
        let text = found.descriptor.with_extents(sizes, more, &geometry);
        let file: Arc<dyn Storage> = found.file.clone();
        if found.at == 0 {
            let path = file.path().to_owned();
            plan.replace(self.ctx.host(), path, text, "the descriptor");
            return Ok(None);
        }
        let mut header = match header {
            Some(header) => header,
            None => codec::read_array(&*file, 0, "the sparse header")?,
        };
        for stage in Area::read(&*file, found.descriptor.text().len())?.change(&text)? {
            match stage {
                Stage::Place(text, sectors) => {
                    let bytes = Stage::padded(&text, &sectors);
                    plan.write(&file, sectors.start * SECTOR, bytes, "the descriptor");
                }
                Stage::LeadTo(sectors) => {
                    Stage::lead(&mut header, &sectors);
                    plan.write(&file, 0, header.to_vec(), "the descriptor's place");
                }
            }
            plan.sync(&file);
        }
        Ok(Some(header))
    }
}

fn cannot_grow(line: &ExtentLine) -> Error {
    let what = format!("the last extent, of type {}, cannot grow", line.kind.word());
    Error::unsupported(what).hint("`flatdisk convert` makes an image that can")
}

fn length(file: &dyn Storage) -> Result<u64> {
    file.len().map_err(|e| Error::io("stat", &e).in_file(file.path()))
}

/// The name of the extent that follows one by the usual names: its number plus one.
fn next_name(name: &str) -> Option<String> {
    let (stem, extension) = name.rsplit_once('.')?;
    let digits = stem.len() - stem.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    let (stem, number) = stem.split_at(stem.len() - digits);
    let next = number.parse::<u32>().ok()?.checked_add(1)?;
    Some(format!("{stem}{next:0digits$}.{extension}"))
}

/// Whether a file holds nothing but zeroes and some of the sectors that a new extent has.
fn is_blank(file: &dyn Storage, len: u64, parts: &[(u64, Vec<u8>)]) -> Result<bool> {
    const CHUNK: u64 = 64 << 10;
    let end = length(file)?;
    let failed = |e| Error::io("read", &e).in_file(file.path());
    let mut at = 0;
    while at < end {
        let Some(data) = file.next_data(at).map_err(failed)? else { break };
        let chunk = data.start.max(at) / SECTOR * SECTOR..data.end.min(end);
        let chunk = chunk.start..chunk.end.min(chunk.start + CHUNK);
        let mut found = vec![0; (chunk.end - chunk.start) as usize];
        file.read_at(chunk.start, &mut found).map_err(failed)?;
        let mut expected = vec![0; found.len()];
        for (part, bytes) in parts {
            for (pos, byte) in (*part..).zip(bytes).filter(|(pos, _)| chunk.contains(pos)) {
                expected[(pos - chunk.start) as usize] = *byte;
            }
        }
        let size = SECTOR as usize;
        let same = found
            .chunks(size)
            .zip(expected.chunks(size))
            .all(|(found, expected)| found == expected || found.iter().all(|byte| *byte == 0));
        if !same {
            return Ok(false);
        }
        at = chunk.end.max(at + 1);
    }
    Ok(end <= len)
}

/// Grains to be copied: from byte, to byte.
type Moves = Vec<(u64, u64)>;

/// A hosted sparse extent.
struct Hosted<'a> {
    extent: &'a SparseExtent,
    file: Arc<dyn Storage>,
    header: Header,
    usage: walk::Usage,
}

impl<'a> Hosted<'a> {
    fn read(extent: &'a SparseExtent) -> Result<Self> {
        walk::verify(&extent.tables, false, extent.overhead)?;
        let usage = walk::walk(&extent.tables, &mut |_| ())?;
        let header = Header::read(&*extent.file, 0)?;
        Ok(Self { extent, file: extent.file.clone(), header, usage })
    }

    /// Plans the growth to `capacity` sectors; the header's sector as it is then.
    fn grow(&self, capacity: u64, plan: &mut Steps) -> Result<[u8; SECTOR as usize]> {
        let (extent, grain) = (self.extent, self.header.grain);
        let mut header = Header { capacity: capacity.max(self.header.capacity), ..self.header };
        let bytes = codec::read_array(&*self.file, 0, "the sparse header")?;
        let mut area = 0..0;
        if header.tables() > self.header.tables() {
            area = self.area(header.tables());
            header.overhead = area.end;
        }
        let file_len = length(&*self.file)?.div_ceil(SECTOR);
        let mut end = file_len.max(area.end).next_multiple_of(grain);
        let old_grains = extent.tables.grains();
        let mut moves = Moves::new();
        let new = tables::changed(&extent.tables, |number, raw| {
            if number >= old_grains {
                // It means nothing yet.
                return Some(0);
            }
            let Grain::At(at) = extent.tables.decode(raw) else { return None };
            let sector = at / SECTOR;
            if sector + grain <= area.start || area.end <= sector {
                return None;
            }
            moves.push((at, end * SECTOR));
            end += grain;
            u32::try_from(end - grain).ok()
        })?;
        if end >= u64::from(u32::MAX) {
            return Err(Error::invalid("the extent is full: grains end at 2 TiB of its file"));
        }
        if end > file_len && (area.end > file_len || !moves.is_empty()) {
            plan.set_len(&self.file, end * SECTOR, "room behind the last grain");
        }
        self.zero_tail(extent.tables.len, plan);
        if !new.is_empty() {
            self.mark(bytes, plan);
            for (from, to) in &moves {
                let what = "a grain, out of the way of the tables";
                plan.copy(&self.file, *from..from + extent.tables.grain, *to, what);
            }
            plan.sync(&self.file);
            tables::write(&self.file, &new, "a grain table", plan);
        }
        if !area.is_empty() {
            self.put_tables(&mut header, area, plan)?;
        }
        plan.sync(&self.file);
        let mut patched = bytes;
        header.patch(&mut patched);
        if patched != bytes || !new.is_empty() {
            plan.write(&self.file, 0, patched.to_vec(), "the sparse header");
            plan.sync(&self.file);
        }
        Ok(patched)
    }

    /// Where directories for `tables` tables go, and the new tables: behind the present ones, where no
    /// others are.
    fn area(&self, tables: u64) -> Range<u64> {
        let per_directory =
            (tables * 4).div_ceil(SECTOR) + (tables - self.header.tables()) * TABLE_SECTORS;
        let sectors = per_directory * if self.extent.tables.rgd.is_some() { 2 } else { 1 };
        let mut start = self.extent.overhead;
        while let Some(end) = self.usage.metadata_in(&(start * SECTOR..(start + sectors) * SECTOR))
        {
            start = end.div_ceil(SECTOR);
        }
        start..(start + sectors).next_multiple_of(self.header.grain)
    }

    /// Plans the directories and tables in their area, as they lie in new extents.
    fn put_tables(&self, header: &mut Header, area: Range<u64>, plan: &mut Steps) -> Result<()> {
        let tables = &self.extent.tables;
        plan.punch(&self.file, area.start * SECTOR..area.end * SECTOR, "room for grain tables");
        let (old, new) = (self.header.tables(), header.tables());
        let gd_len = (new * 4).div_ceil(SECTOR);
        let mut at = area.start;
        for (gd, field) in [(tables.rgd, &mut header.rgd), (Some(tables.gd), &mut header.gd)] {
            let Some(gd) = gd else { continue };
            let mut directory = vec![0; (old * 4) as usize];
            codec::read_exact(&*self.file, gd, &mut directory, "a grain directory")?;
            for table in 0..new - old {
                let sector = u32::try_from(at + gd_len + table * TABLE_SECTORS)
                    .map_err(|_| Error::invalid("the extent would become too large"))?;
                directory.extend_from_slice(&sector.to_le_bytes());
            }
            plan.write(&self.file, at * SECTOR, directory, "a larger grain directory");
            *field = at;
            at += gd_len + (new - old) * TABLE_SECTORS;
        }
        Ok(())
    }

    /// Marks the extent as not closed, durably.
    fn mark(&self, mut header: [u8; SECTOR as usize], plan: &mut Steps) {
        Header { unclean: true, ..self.header.clone() }.patch(&mut header);
        plan.sync(&self.file);
        plan.write(&self.file, 0, header.to_vec(), "the mark of an extent not closed");
        plan.sync(&self.file);
    }

    /// Zeroes what the last grain holds behind the first `len` bytes of the extent.
    fn zero_tail(&self, len: u64, plan: &mut Steps) {
        zero_tail(self.extent, &self.file, len, plan);
    }
}

/// Zeroes what a stored grain holds behind the first `len` bytes of an extent.
fn zero_tail(extent: &SparseExtent, file: &Arc<dyn Storage>, len: u64, plan: &mut Steps) {
    let tables = &extent.tables;
    let (grain, within) = (len / tables.grain, len % tables.grain);
    if within == 0 {
        return;
    }
    // A table that cannot be read was found by the walk before.
    let found = tables::entry(tables, grain).unwrap_or(0);
    if let Grain::At(at) = tables.decode(found) {
        plan.punch(file, at + within..at + tables.grain, "what lies behind the end of the disk");
        plan.sync(file);
    }
}

/// Plans that an extent has `sectors` sectors only, when the descriptor says so.
/// `header` is its header's sector by then, where that is not the present one.
fn shrink_sparse(
    extent: &SparseExtent,
    sectors: u64,
    header: Option<[u8; SECTOR as usize]>,
    plan: &mut Steps,
) -> Result<()> {
    let (tables, file) = (&extent.tables, extent.file.clone() as Arc<dyn Storage>);
    walk::verify(tables, false, extent.overhead)?;
    let grains = (sectors * SECTOR).div_ceil(tables.grain);
    let kept_tables = grains.div_ceil(tables.entries_per_table);
    let mut freed: Vec<Range<u64>> = Vec::new();
    let mut end = extent.overhead * SECTOR;
    let new = tables::changed(tables, |number, raw| {
        let place = match tables.decode(raw) {
            Grain::At(at) => at..at + tables.grain,
            _ => 0..0,
        };
        if number < grains {
            end = end.max(place.end);
            return None;
        }
        match freed.last_mut() {
            _ if place.is_empty() => {}
            Some(last) if last.end == place.start => last.end = place.end,
            _ => freed.push(place),
        }
        Some(0)
    })?;
    for place in tables::places(tables)? {
        end = end.max(place.end);
    }
    let hosted = tables.dialect == Dialect::Hosted;
    // Whole tables are given up with the directory's entries, where the header says how many.
    let new: Vec<_> =
        new.into_iter().filter(|table| !hosted || table.number < kept_tables).collect();
    if hosted {
        let hosted = Hosted::read(extent)?;
        let mut header = match header {
            Some(header) => header,
            None => codec::read_array(&*file, 0, "the sparse header")?,
        };
        if !new.is_empty() {
            hosted.mark(header, plan);
            tables::write(&file, &new, "a grain table", plan);
        }
        Header { capacity: sectors, ..hosted.header.clone() }.patch(&mut header);
        plan.write(&file, 0, header.to_vec(), "the sparse header");
    } else {
        tables::write(&file, &new, "a grain table", plan);
        let free = extent.free_sector.unwrap_or(0).max(end.div_ceil(SECTOR));
        let header = cowd::resized_header(&*file, sectors, free)?;
        plan.write(&file, 0, header.to_vec(), "the COWD header");
    }
    plan.sync(&file);
    zero_tail(extent, &file, sectors * SECTOR, plan);
    for range in freed.into_iter().filter(|range| range.start < end) {
        plan.punch(&file, range, "grains that were given up");
    }
    if hosted && end < length(&*file)? {
        plan.set_len(&file, end, "nothing uses the end of the file");
    }
    Ok(())
}

/// Plans the growth of a copy-on-write extent to `capacity` sectors.
fn grow_cowd(extent: &SparseExtent, capacity: u64, plan: &mut Steps) -> Result<()> {
    let (tables, file) = (&extent.tables, extent.file.clone() as Arc<dyn Storage>);
    walk::verify(tables, false, extent.overhead)?;
    let grain = tables.grain / SECTOR;
    let (old, new) = (
        cowd::directory_entries(tables.len / SECTOR, grain),
        cowd::directory_entries(capacity, grain),
    );
    let gd_end = |entries: u64| (tables.gd + entries * 4).div_ceil(SECTOR);
    let area = gd_end(old)..gd_end(new);
    let file_len = length(&*file)?.div_ceil(SECTOR);
    let mut end = file_len.max(extent.free_sector.unwrap_or(0)).max(area.end);
    let first_free = end;
    let in_area =
        |place: &Range<u64>| place.start < area.end * SECTOR && area.start * SECTOR < place.end;
    let grains = tables.grains();
    let mut moves = Moves::new();
    let mut edits = tables::changed(tables, |number, raw| {
        if number >= grains {
            return Some(0);
        }
        let Grain::At(at) = tables.decode(raw) else { return None };
        if !in_area(&(at..at + tables.grain)) {
            return None;
        }
        moves.push((at, end * SECTOR));
        end += grain;
        u32::try_from(end - grain).ok()
    })?;
    // Tables in the way move after their entries have changed.
    let mut directory = vec![0; (old * 4) as usize];
    codec::read_exact(&*file, tables.gd, &mut directory, "the grain directory")?;
    let mut moved = Moves::new();
    for entry in directory.chunks_exact_mut(4) {
        let at = tables.raw(entry, 0) * SECTOR;
        if at > 0 && in_area(&(at..at + tables.table_len())) {
            moved.push((at, end * SECTOR));
            let sector = u32::try_from(end).map_err(|_| full())?;
            entry.copy_from_slice(&sector.to_le_bytes());
            end += tables.table_len() / SECTOR;
        }
    }
    if end >= u64::from(u32::MAX) {
        return Err(full());
    }
    zero_tail(extent, &file, tables.len, plan);
    if end > first_free || end > file_len {
        let (at, value) = cowd::free_sector(end);
        plan.set_len(&file, end * SECTOR, "room behind what is in use");
        plan.write(&file, at, value.to_vec(), "where free space begins");
        plan.sync(&file);
    }
    for (from, to) in moves {
        plan.copy(&file, from..from + tables.grain, to, "a grain, out of the directory's way");
    }
    plan.sync(&file);
    edits.retain(|table| !table.places.is_empty());
    tables::write(&file, &edits, "a grain table", plan);
    for (from, to) in &moved {
        let what = "a grain table, out of the directory's way";
        plan.copy(&file, *from..from + tables.table_len(), *to, what);
    }
    plan.sync(&file);
    if !moved.is_empty() {
        plan.write(&file, tables.gd, directory, "the grain directory");
        plan.sync(&file);
    }
    let cleared = tables.gd + old * 4..area.end * SECTOR;
    if !cleared.is_empty() {
        plan.punch(&file, cleared, "room for the directory");
        plan.sync(&file);
    }
    let declared = extent.free_sector.unwrap_or(0);
    let free = if end > first_free { end } else { declared.max(area.end) };
    let header = cowd::resized_header(&*file, capacity, free)?;
    plan.write(&file, 0, header.to_vec(), "the COWD header");
    plan.sync(&file);
    Ok(())
}

fn full() -> Error {
    Error::invalid("the extent is full: it ends at 2 TiB of its file")
}

const _: () = assert!(TABLE_SECTORS * SECTOR == ENTRIES_PER_TABLE * 4);
