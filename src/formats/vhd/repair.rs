//! What can be rebuilt: either footer from the other, the trailing footer's place, a geometry that the
//! disk does not cover, the batmap, the bitmaps of a dynamic disk, blocks that overlap (see
//! [`lost`](super::lost)), and space that nothing uses.
//!
//! Each round of a repair begins with one intact footer at least, and only ever overwrites the other
//! one, so the image opens whatever a crash leaves. Nothing is known twice of the dynamic header and
//! the bitmaps of a differencing disk: they are never touched, but that with consent the checksum of a
//! header or footer that looks right is made to fit, which changes one sector of the file.

use std::sync::Arc;

use zerocopy::IntoBytes;

use super::batmap::Batmap;
use super::bitmaps::is_full;
use super::footers::{CopyState, Footers};
use super::layout::{ALIGNMENT, Chs, DiskType, FOOTER, SECTOR, VERSION, footer_place};
use super::lost::repair_entries;
use super::structure::Structure;
use super::survey::Survey;
use crate::codec;
use crate::error::Result;
use crate::formats::repair::stored;
use crate::formats::{Plan, Severity};
use crate::storage::Storage;

/// Plans the next round.
pub(super) fn repair(file: &Arc<dyn Storage>, plan: &mut Plan) -> Result<()> {
    let footers = Footers::find(&**file, plan.lossy())?;
    if footers.forced.is_some() {
        return seal_footer(file, &footers, plan);
    }
    if footers.disk_type == DiskType::Fixed {
        if plan.all() && footers.trailing_garbage > 0 {
            plan.set_len(file, footers.data_end + FOOTER, "only zeroes follow the footer");
        }
        repair_geometry(file, &footers, plan);
        return Ok(());
    }
    if plan.all() && matches!(footers.trailing, CopyState::Good | CopyState::Short) {
        repair_head(file, &footers, plan);
    }
    let structure = Structure::read(&**file, &footers, plan.lossy())?;
    if !structure.header.checksum_matches() {
        return seal_header(file, &footers, structure, plan);
    }
    if plan.all() && matches!(footers.trailing, CopyState::Damaged(_) | CopyState::Absent) {
        repair_trailing(file, &footers, &structure, plan)?;
    } else if plan.all() && plan.reclaims() && footers.disk_type == DiskType::Dynamic {
        repair_bitmaps(file, &footers, &structure, plan)?;
    }
    if let (true, true, Some(batmap)) = (plan.all(), plan.is_empty(), &structure.batmap) {
        repair_batmap(file, &footers, &structure, batmap, plan)?;
    }
    // Moving the footer takes two good ones.
    let both = footers.trailing == CopyState::Good && footers.head == CopyState::Good;
    if plan.all() && plan.is_empty() && both && structure.read_only.is_none() {
        repair_entries(file, &footers, &structure, plan)?;
        repair_geometry(file, &footers, plan);
    }
    if plan.reclaims() && both {
        reclaim(file, &footers, &structure, plan)?;
    }
    Ok(())
}

fn repair_head(file: &Arc<dyn Storage>, footers: &Footers, plan: &mut Plan) {
    if footers.head != CopyState::Good {
        plan.write(file, 0, footers.bytes().to_vec(), "the footer copy, from the footer");
    }
}

/// Makes the checksum of the footer that counts fit, if what the footer says is possible.
fn seal_footer(file: &Arc<dyn Storage>, footers: &Footers, plan: &mut Plan) -> Result<()> {
    let mut footer = footers.footer;
    footer.seal();
    let possible = footer.format_version.get() == VERSION
        && match footers.disk_type {
            DiskType::Fixed => (SECTOR..=footers.data_end).contains(&footer.current_size.get()),
            _ => is_plausible(file, footers, &Structure::read(&**file, footers, false)?)?,
        };
    if possible {
        let in_place = matches!(footers.trailing, CopyState::Damaged(_));
        let at = if in_place { footers.file_len - FOOTER } else { 0 };
        plan.write(file, at, footer.as_bytes().to_vec(), "the footer's checksum");
    }
    Ok(())
}

/// Makes the checksum of the dynamic header fit, if what the header says is possible.
fn seal_header(
    file: &Arc<dyn Storage>,
    footers: &Footers,
    mut structure: Structure,
    plan: &mut Plan,
) -> Result<()> {
    if plan.is_empty() && is_plausible(file, footers, &structure)? {
        structure.header.seal();
        let at = footers.footer.data_offset.get();
        let bytes = structure.header.as_bytes().to_vec();
        plan.write(file, at, bytes, "the dynamic header's checksum");
    }
    Ok(())
}

/// Whether every block lies where a block of that size can lie.
fn is_plausible(file: &Arc<dyn Storage>, footers: &Footers, structure: &Structure) -> Result<bool> {
    let mut sound = structure.size > 0;
    let survey = Survey::run(&**file, structure, footers.data_end, &mut |problem| {
        sound &= problem.severity != Severity::Error;
    })?;
    Ok(sound
        && survey.complete
        && structure.size.div_ceil(structure.block_size) == structure.blocks)
}

/// Replaces a geometry larger than the disk: programs that go by it read past its end.
fn repair_geometry(file: &Arc<dyn Storage>, footers: &Footers, plan: &mut Plan) {
    let mut footer = footers.footer;
    let wrong = footer.geometry() != Chs::MAX && footer.geometry().size() > footer.size();
    if plan.all() && plan.is_empty() && wrong && footers.trailing == CopyState::Good {
        footer.set_geometry(Chs::to_store(footer.size()));
        footer.seal();
        plan.write(file, footers.data_end, footer.as_bytes().to_vec(), "the footer's geometry");
    }
}

/// Puts the footer back where it belongs. Nobody knows whether it was lost in its place or with the
/// end of the file, so where there is doubt the file only grows.
fn repair_trailing(
    file: &Arc<dyn Storage>,
    footers: &Footers,
    structure: &Structure,
    plan: &mut Plan,
) -> Result<()> {
    let footer = || footers.bytes().to_vec();
    let len = footers.file_len;
    if footers.trailing_garbage > 0 {
        let end = len - footers.trailing_garbage;
        if fits(file, structure, end - FOOTER)? {
            plan.set_len(file, end, "garbage follows the footer");
            return Ok(());
        }
    }
    let last = len - FOOTER;
    let in_place = matches!(footers.trailing, CopyState::Damaged(_)) && last.is_multiple_of(SECTOR);
    let at = match in_place && fits(file, structure, last)? {
        true => last,
        false if fits(file, structure, len)? => footer_place(len),
        // What is missing of a block must not come to be there.
        false => (len / SECTOR * SECTOR).max(structures_end(structure).next_multiple_of(SECTOR)),
    };
    plan.write(file, at, footer(), "the footer, from its copy");
    Ok(())
}

/// One past the last structure that is no block.
fn structures_end(structure: &Structure) -> u64 {
    structure.reserved.iter().map(|range| range.end).max().unwrap_or(0)
}

/// Whether everything that the BAT leads to ends before `data_end`.
fn fits(file: &Arc<dyn Storage>, structure: &Structure, data_end: u64) -> Result<bool> {
    let mut fits = structures_end(structure) <= data_end;
    Survey::run(&**file, structure, data_end, &mut |_| fits = false)?;
    Ok(fits)
}

/// Sets all bits of the bitmaps that deny data. A block of a dynamic disk is stored whole, and read
/// whole here; programs that honour the bitmap read zeroes where a bit is clear. With errors in the BAT
/// nobody knows whether a bitmap is not another block's data.
fn repair_bitmaps(
    file: &Arc<dyn Storage>,
    footers: &Footers,
    structure: &Structure,
    plan: &mut Plan,
) -> Result<()> {
    each_bitmap(file, footers, structure, |sector, block, bitmap| {
        if !plan.is_full() && structure.hidden_data(&**file, sector, block, bitmap)?.is_some() {
            let what = format!("the sector bitmap of block {block}");
            plan.write(file, u64::from(sector) * SECTOR, vec![0xff; bitmap.len()], what);
        }
        Ok(())
    })
}

/// Calls `visit` with the sector, number and bitmap of every stored block of the disk.
fn each_bitmap(
    file: &Arc<dyn Storage>,
    footers: &Footers,
    structure: &Structure,
    mut visit: impl FnMut(u32, u32, &[u8]) -> Result<()>,
) -> Result<()> {
    let survey = Survey::run(&**file, structure, footers.data_end, &mut |_| ())?;
    let mut bitmap = vec![0; structure.bitmap_size as usize];
    let of_disk = |stored: &&(u32, u32)| u64::from(stored.1) < structure.blocks;
    for &(sector, block) in survey.stored.iter().filter(of_disk) {
        let at = u64::from(sector) * SECTOR;
        codec::read_exact(&**file, at, &mut bitmap, "a sector bitmap")?;
        visit(sector, block, &bitmap)?;
    }
    Ok(())
}

/// Makes the batmap say what the bitmaps say, if it claims more or its checksum is wrong.
fn repair_batmap(
    file: &Arc<dyn Storage>,
    footers: &Footers,
    structure: &Structure,
    batmap: &Batmap,
    plan: &mut Plan,
) -> Result<()> {
    let (stored, intact) = batmap.load(&**file, structure.blocks)?;
    let mut right = stored.clone();
    right.clear_all();
    each_bitmap(file, footers, structure, |_, block, bitmap| {
        let range = structure.block_range(u64::from(block));
        if is_full(bitmap, (range.end - range.start) / SECTOR) {
            right.set(u64::from(block));
        }
        Ok(())
    })?;
    let lies = (0..structure.blocks).any(|block| stored.get(block) && !right.get(block));
    if lies || !intact {
        let bytes = right.bytes().to_vec();
        let (header_at, header) = batmap.header_for(&bytes);
        plan.write(file, batmap.map_at(), bytes, "the batmap, from the sector bitmaps");
        plan.write(file, header_at, header.as_bytes().to_vec(), "the batmap's checksum");
    }
    Ok(())
}

/// Gives back the space between blocks, and moves the footer to the last of them.
fn reclaim(
    file: &Arc<dyn Storage>,
    footers: &Footers,
    structure: &Structure,
    plan: &mut Plan,
) -> Result<()> {
    let survey = Survey::run(&**file, structure, footers.data_end, &mut |_| ())?;
    let stride = structure.stride();
    let (gaps, end) = survey.gaps(structure, stride);
    for gap in gaps {
        if stored(&**file, gap.clone())? > 0 {
            plan.punch(file, gap, "nothing uses this space");
        }
    }
    if footers.data_end.saturating_sub(end) >= stride.max(ALIGNMENT) {
        let end = footer_place(end);
        // Both footers count until the file is cut off: the copy at the beginning is intact.
        plan.write(file, end, footers.bytes().to_vec(), "the footer, behind the last block");
        plan.sync(file);
        plan.set_len(file, end + FOOTER, "nothing uses the space behind the last block");
    }
    Ok(())
}
