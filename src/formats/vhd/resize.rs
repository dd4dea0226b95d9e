//! Another size of the disk, in place.
//!
//! # Order
//!
//! The format has no log: whatever depends on one sector is durable before that sector is written.
//!
//! *Fixed*: only the last sector says what the file is. To grow, the file is extended, and a footer with
//! the old size becomes its last sector; until that is durable the old one counts, which nothing but
//! zeroes follows (see [`footers`](super::footers)). Then everything between the disk and the new
//! footer is zeroed, and then that footer is replaced by one with the new size. To shrink, the footer is
//! replaced by one with the new size; then a second one is written where the disk ends now, and the
//! file cut off behind that.
//!
//! *Dynamic and differencing*: either footer opens the image, so they change one after the other. To
//! grow: the block in which the disk ended gets zeroes behind that; the BAT gets room, and its new
//! entries lead nowhere; the first sector of the dynamic header tells of them; then the footers. Blocks
//! behind the BAT that are in its way are copied to the end, then their entries change, and only then
//! the BAT grows over their places. Where something else is in its way, a copy of the BAT, and of Xen's
//! batmap with it, goes to the end, and the header's sector leads to the old or the new one. To shrink:
//! the footers; then the entries behind the end lead nowhere; then space is given back.
//!
//! A crash leaves the old size or the new one, and at worst space that nothing uses. Asking for the same
//! size again finishes what a crash interrupted.

use std::ops::Range;
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::batmap::Batmap;
use super::footers::Footers;
use super::layout::{
    CREATOR, CREATOR_VERSION, Chs, DynamicHeader, FOOTER, Footer, MAX_SPARSE_SIZE, REACH, SECTOR,
    UNUSED, table_size,
};
use super::sound::{Entries, Sound, move_footer};
use super::structure::{Structure, overlap};
use super::survey::Survey;
use crate::codec;
use crate::error::{Error, Result};
use crate::formats::OpenContext;
use crate::formats::plan::Steps;
use crate::storage::Storage;

/// Data of moved blocks begins at a multiple of this many bytes.
const ALIGNMENT: u64 = 4096;

/// Plans the change of the image in `file` to a disk of `size` bytes.
pub(super) fn resize(
    file: &Arc<dyn Storage>,
    ctx: &OpenContext,
    size: u64,
    plan: &mut Steps,
) -> Result<()> {
    let Sound { footers, sparse } = Sound::read(file, ctx)?;
    let Some((structure, survey)) = sparse else {
        resize_fixed(file, &footers, size, plan);
        return Ok(());
    };
    if size > MAX_SPARSE_SIZE {
        let what = format!("{size} bytes are more than a VHD with a BAT can have");
        return Err(Error::invalid(what).hint("2040 GiB at most"));
    }
    let sparse = Sparse { file, footers: &footers, structure: &structure, survey: &survey };
    if size > structure.size { sparse.grow(size, plan) } else { sparse.shrink(size, plan) }
}

/// The footer of the same image with a disk of `size` bytes. Programs that go by the geometry, or by
/// the original size, are to see the same size as all others.
fn resized(footer: &Footer, size: u64) -> Footer {
    let mut footer = *footer;
    footer.current_size = size.into();
    footer.original_size = size.into();
    footer.set_geometry(Chs::to_store(size));
    if footer.creator_is(b"vpc") || footer.creator_is(b"qemu") {
        // Of these creators' images some programs believe nothing but the geometry.
        footer.creator_application = CREATOR;
        footer.creator_version = CREATOR_VERSION.into();
    }
    footer.seal();
    footer
}

fn resize_fixed(file: &Arc<dyn Storage>, footers: &Footers, size: u64, plan: &mut Steps) {
    let old = footers.footer.size();
    let new = resized(&footers.footer, size).as_bytes().to_vec();
    let mut place = footers.data_end;
    if size > old {
        let end = place.max(size).next_multiple_of(SECTOR);
        if end != place || footers.file_len != end + FOOTER {
            plan.set_len(file, end + FOOTER, "room for the disk and its footer");
            plan.write(file, end, footers.bytes().to_vec(), "the footer, at the new end");
            plan.sync(file);
            place = end;
        }
        plan.punch(file, old..place, "the new part of the disk reads as zeroes");
        plan.sync(file);
    }
    if size != old {
        plan.write(file, place, new.clone(), "the footer, with the new size");
        plan.sync(file);
    }
    if size == old && footers.trailing_garbage > 0 {
        plan.set_len(file, place + FOOTER, "the footer is the last sector");
    }
    // A size that is no multiple of a sector leaves less than one behind the disk.
    if size < place && (size != old || place - size >= SECTOR) {
        let footer = if size == old { footers.bytes().to_vec() } else { new };
        plan.write(file, size, footer, "the footer, behind the disk");
        plan.sync(file);
        plan.set_len(file, size + FOOTER, "nothing uses the end of the file");
    }
}

/// An image with a BAT.
struct Sparse<'a> {
    file: &'a Arc<dyn Storage>,
    footers: &'a Footers,
    structure: &'a Structure,
    survey: &'a Survey,
}

impl Sparse<'_> {
    fn shrink(&self, size: u64, plan: &mut Steps) -> Result<()> {
        let (structure, file) = (self.structure, self.file);
        let blocks = size.div_ceil(structure.block_size);
        let footer = match size == structure.size {
            true => self.footers.footer,
            false => resized(&self.footers.footer, size),
        };
        if size < structure.size {
            put_footers(file, &footer, self.footers.data_end, plan);
        }
        let (kept, gone): (Vec<_>, Vec<_>) =
            self.survey.stored.iter().partition(|(_, block)| u64::from(*block) < blocks);
        if gone.is_empty() && size == structure.size {
            return Ok(());
        }
        let mut entries = Entries::new(file, structure.table_at);
        for (_, block) in &gone {
            entries.set(u64::from(*block), None)?;
        }
        entries.write(plan, "BAT entries behind the end of the disk");
        self.zero_tail(size, self.footers.data_end, plan);
        // What shares no byte with anything that stays.
        let kept = Survey { stored: kept, ..Survey::default() };
        let (_, end) = kept.gaps(structure, u64::MAX);
        for (sector, _) in gone {
            let at = u64::from(sector) * SECTOR;
            if at < end {
                plan.punch(file, at..at + structure.stride(), "a block that was given up");
            }
        }
        trim(file, &footer, end.next_multiple_of(SECTOR), self.footers.data_end, plan);
        Ok(())
    }

    fn grow(&self, size: u64, plan: &mut Steps) -> Result<()> {
        let (structure, file) = (self.structure, self.file);
        let needed = size.div_ceil(structure.block_size);
        let footer = resized(&self.footers.footer, size);
        let (_, end) = self.survey.gaps(structure, u64::MAX);
        let mut room = Room { end: end.next_multiple_of(SECTOR), footer_at: self.footers.data_end };
        room.reach(self, room.end, plan);
        self.clear_entries(needed.min(structure.table_entries), plan)?;
        if self.zero_tail(structure.size, room.footer_at, plan) {
            plan.sync(file);
        }
        let short_map = structure.batmap.as_ref().is_some_and(|batmap| {
            let [_, map] = batmap.ranges();
            (map.end - map.start) * 8 < needed
        });
        if needed > structure.table_entries || short_map {
            let entries = needed.max(structure.table_entries);
            let number = u32::try_from(entries).map_err(|_| Error::invalid("too many blocks"))?;
            let end = structure.table_at + table_size(entries);
            let more = structure.table_at + structure.table_entries * 4..end;
            let header = DynamicHeader { max_table_entries: number.into(), ..structure.header };
            if self.is_blocked(&more) {
                self.move_table(&mut room, entries, header, plan)?;
            } else {
                let left = self.make_way(&mut room, &more, plan)?;
                plan.fill(file, more, 0xff, "new entries of the BAT");
                plan.sync(file);
                self.put_header(header, plan);
                for range in left {
                    plan.punch(file, range, "the rest of a block's old place");
                }
            }
        }
        put_footers(file, &footer, room.footer_at, plan);
        Ok(())
    }

    /// Zeroes what a stored block holds behind the end of a disk of `size` bytes and before the footer at
    /// `footer_at`; whether there is such.
    fn zero_tail(&self, size: u64, footer_at: u64, plan: &mut Steps) -> bool {
        let within = size % self.structure.block_size;
        let block = size / self.structure.block_size;
        let stored = self.survey.stored.iter().find(|(_, b)| u64::from(*b) == block);
        let Some((sector, _)) = stored.filter(|_| within > 0) else { return false };
        let at = u64::from(*sector) * SECTOR;
        let end = (at + self.structure.stride()).min(footer_at);
        let tail = at + self.structure.bitmap_size + within..end;
        let some = !tail.is_empty();
        if some {
            plan.punch(self.file, tail, "the part of a block behind the end of the disk");
        }
        some
    }

    /// Makes the entries between the disk's last block and number `until` lead nowhere.
    fn clear_entries(&self, until: u64, plan: &mut Steps) -> Result<()> {
        const CHUNK: u64 = 64 << 10;
        let mut entries = Entries::new(self.file, self.structure.table_at);
        let mut changed = false;
        let mut bytes = vec![0; CHUNK as usize * 4];
        let mut first = self.structure.blocks;
        while first < until {
            let count = CHUNK.min(until - first);
            let bytes = &mut bytes[..count as usize * 4];
            codec::read_exact(&**self.file, self.structure.table_at + first * 4, bytes, "the BAT")?;
            for (block, entry) in (first..).zip(bytes.chunks_exact(4)) {
                if entry != UNUSED.to_be_bytes() {
                    entries.set(block, None)?;
                    changed = true;
                }
            }
            first += count;
        }
        if changed {
            entries.write(plan, "BAT entries behind the end of the disk");
        }
        Ok(())
    }

    /// Whether anything but blocks lies where the BAT is to grow.
    fn is_blocked(&self, more: &Range<u64>) -> bool {
        let table = self.structure.table_at
            ..self.structure.table_at + table_size(self.structure.table_entries);
        let behind = table.end..more.end;
        self.structure.batmap.is_some()
            || self.structure.reserved.iter().any(|range| {
                // Merged ranges may reach from before the table into what is behind it.
                overlap(range, &behind) && !behind.is_empty()
            })
    }

    /// Moves the blocks in the way of the BAT to the end; the parts of their old places that the BAT
    /// does not take.
    fn make_way(
        &self,
        room: &mut Room,
        more: &Range<u64>,
        plan: &mut Steps,
    ) -> Result<Vec<Range<u64>>> {
        let (structure, stride) = (self.structure, self.structure.stride());
        let mut entries = Entries::new(self.file, structure.table_at);
        let mut moves = Vec::new();
        // Blocks and footer go behind the BAT as it is going to be.
        room.end = room.end.max(more.end);
        for &(sector, block) in &self.survey.stored {
            let at = u64::from(sector) * SECTOR;
            // Entries behind the end of the disk lead nowhere any more.
            if at >= more.end || u64::from(block) >= structure.blocks {
                continue;
            }
            let to = (room.end + structure.bitmap_size).next_multiple_of(ALIGNMENT)
                - structure.bitmap_size;
            room.end = to + stride;
            let sector = u32::try_from(to / SECTOR).ok().filter(|_| to < REACH);
            entries.set(block.into(), Some(sector.ok_or_else(full)?))?;
            moves.push((at, to, block));
        }
        room.reach(self, room.end.next_multiple_of(SECTOR), plan);
        for (at, to, block) in &moves {
            let what = format!("block {block}, out of the way of the BAT");
            plan.copy(self.file, *at..at + stride, *to, what);
        }
        plan.sync(self.file);
        entries.write(plan, "BAT entries of moved blocks");
        let left = moves.iter().map(|(at, ..)| (*at).max(more.end)..at + stride);
        Ok(left.filter(|range| !range.is_empty()).collect())
    }

    /// Puts a longer BAT, and a batmap behind it, at the end of the file.
    fn move_table(
        &self,
        room: &mut Room,
        needed: u64,
        header: DynamicHeader,
        plan: &mut Steps,
    ) -> Result<()> {
        let (structure, file) = (self.structure, self.file);
        let at = room.end.next_multiple_of(ALIGNMENT);
        let entries = at..at + table_size(needed);
        let batmap = match &structure.batmap {
            Some(batmap) => Some(self.moved_batmap(batmap, entries.end, needed)?),
            None => None,
        };
        let map_len = batmap.as_ref().map_or(0, |bytes| bytes.len() as u64);
        room.end = entries.end + map_len;
        room.reach(self, room.end, plan);
        let old = structure.table_at..structure.table_at + structure.table_entries * 4;
        let copied = old.end - old.start;
        plan.copy(file, old.clone(), at, "the BAT, at the end");
        plan.fill(file, at + copied..entries.end, 0xff, "new entries of the BAT");
        if let Some(bytes) = batmap {
            plan.write(file, entries.end, bytes, "the batmap, behind the BAT");
        }
        plan.sync(file);
        self.put_header(DynamicHeader { table_offset: at.into(), ..header }, plan);
        plan.punch(file, old.start..old.start + table_size(structure.table_entries), "the old BAT");
        for range in structure.batmap.iter().flat_map(Batmap::ranges) {
            plan.punch(file, range, "the old batmap");
        }
        Ok(())
    }

    /// Header and map of the batmap for `needed` blocks, together from byte `at` on.
    fn moved_batmap(&self, batmap: &Batmap, at: u64, needed: u64) -> Result<Vec<u8>> {
        let (bits, intact) = batmap.load(&**self.file, self.structure.blocks)?;
        if !intact {
            return Err(batmap.damaged().hint("`flatdisk check --repair` rebuilds it"));
        }
        let mut map = bits.bytes().to_vec();
        map.resize((needed.div_ceil(8).max(map.len() as u64)).next_multiple_of(SECTOR) as usize, 0);
        let header = batmap.moved(at + SECTOR, &map);
        Ok([header.as_bytes(), &map].concat())
    }

    /// Replaces the fields of the dynamic header that say where the BAT is, all in its first sector.
    fn put_header(&self, mut header: DynamicHeader, plan: &mut Steps) {
        header.seal();
        let at = self.footers.footer.data_offset.get();
        let bytes = header.as_bytes()[..SECTOR as usize].to_vec();
        plan.write(self.file, at, bytes, "the dynamic header");
        plan.sync(self.file);
    }
}

/// The end of the file while it is planned.
struct Room {
    /// One past everything in use.
    end: u64,
    /// Where the trailing footer is.
    footer_at: u64,
}

impl Room {
    /// Moves the trailing footer, still the old one, behind byte `end`.
    fn reach(&mut self, sparse: &Sparse<'_>, end: u64, plan: &mut Steps) {
        move_footer(sparse.file, sparse.footers.bytes(), &mut self.footer_at, end, plan);
    }
}

fn full() -> Error {
    Error::invalid("the image is full: a BAT cannot point beyond 2 TiB")
}

/// Replaces both footers, one after the other.
fn put_footers(file: &Arc<dyn Storage>, footer: &Footer, at: u64, plan: &mut Steps) {
    plan.sync(file);
    plan.write(file, 0, footer.as_bytes().to_vec(), "the footer copy, with the new size");
    plan.sync(file);
    plan.write(file, at, footer.as_bytes().to_vec(), "the footer, with the new size");
    plan.sync(file);
}

/// Cuts the file off behind byte `end`, where the footer at `footer_at` goes.
pub(super) fn trim(
    file: &Arc<dyn Storage>,
    footer: &Footer,
    end: u64,
    footer_at: u64,
    plan: &mut Steps,
) {
    if end < footer_at {
        // Both count until the file is cut off: the copy at the beginning is intact.
        plan.sync(file);
        plan.write(file, end, footer.as_bytes().to_vec(), "the footer, behind the last block");
        plan.sync(file);
        plan.set_len(file, end + FOOTER, "nothing uses the end of the file");
    }
}
