//! Putting the BAT right: blocks that share their place get one each, and with consent blocks whose
//! entries lead nowhere are given up.
//!
//! # Order
//!
//! One round each. Blocks that are given up go first: the file grows only when no entry leads past its
//! end. A block that is copied has the same data in both places until its entry changes, which happens
//! when the copy is durable; what a crash leaves of copies is unused space. The footer goes to the new
//! end before anything overwrites it where it is.
//!
//! A differencing disk has no entry that means zeroes, and one that means nothing stored would show
//! what the parent has instead: its blocks are not given up.

use std::sync::Arc;

use super::footers::Footers;
use super::layout::{ALIGNMENT, DiskType, FOOTER, REACH, SECTOR, UNUSED, footer_place};
use super::structure::Structure;
use super::survey::Survey;
use crate::error::Result;
use crate::formats::Plan;
use crate::formats::repair::MAX_COPIED;
use crate::storage::Storage;

/// Plans the next round for an image whose footers are both good.
pub(super) fn repair_entries(
    file: &Arc<dyn Storage>,
    footers: &Footers,
    structure: &Structure,
    plan: &mut Plan,
) -> Result<()> {
    let survey = Survey::run(&**file, structure, footers.data_end, &mut |_| ())?;
    if !survey.lost.is_empty() {
        if plan.lossy() && footers.disk_type == DiskType::Dynamic {
            give_up(file, structure, &survey, plan);
        }
    } else if let Some(end) = survey.cut_off {
        if plan.lossy() {
            complete(file, footers, end, plan);
        }
    } else if survey.complete {
        separate(file, footers, structure, &survey, plan);
    }
    Ok(())
}

/// Makes blocks that lead nowhere blocks that are not stored.
fn give_up(file: &Arc<dyn Storage>, structure: &Structure, survey: &Survey, plan: &mut Plan) {
    for blocks in &survey.lost {
        let what = match blocks.end - blocks.start {
            1 => format!("block {} is given up", blocks.start),
            _ => format!("blocks {} to {} are given up", blocks.start, blocks.end - 1),
        };
        let len = (blocks.end - blocks.start) * 4;
        if !plan.is_full() {
            plan.write(file, structure.table_at + blocks.start * 4, vec![0xff; len as usize], what);
        }
    }
}

/// Gives the blocks of which the file has a first part zeroes for the rest. The footer lies over one
/// of them. Until it is at the new end its copy opens the image.
fn complete(file: &Arc<dyn Storage>, footers: &Footers, end: u64, plan: &mut Plan) {
    let zeroes = vec![0; FOOTER as usize];
    plan.write(file, footers.data_end, zeroes, "the footer, which lies over a block");
    plan.sync(file);
    let bytes = footers.bytes().to_vec();
    plan.write(file, footer_place(end), bytes, "the footer, behind the last block");
}

/// Gives every block that begins inside another one a place of its own behind all of them.
fn separate(
    file: &Arc<dyn Storage>,
    footers: &Footers,
    structure: &Structure,
    survey: &Survey,
    plan: &mut Plan,
) {
    let stride = structure.stride();
    let moved: Vec<_> = survey.places(stride).filter(|(_, _, inside)| *inside).collect();
    if moved.len() as u64 * stride > MAX_COPIED {
        return;
    }
    let (mut copies, mut entries) = (plan.part(), plan.part());
    // The last block may be cut off behind the end of the disk.
    let mut end = footers.data_end.max(survey.gaps(structure, stride).1);
    for (sector, block, _) in moved {
        let at = u64::from(sector) * SECTOR;
        let entry_at = structure.table_at + u64::from(block) * 4;
        if u64::from(block) >= structure.blocks {
            let what = format!("block {block}, which is past the end of the disk");
            entries.write(file, entry_at, UNUSED.to_be_bytes().to_vec(), what);
            continue;
        }
        let data_at = (end + structure.bitmap_size).next_multiple_of(ALIGNMENT);
        let place = data_at - structure.bitmap_size;
        if place >= REACH {
            break;
        }
        // Of the last block the file has what the disk has.
        let from = at..(at + stride).min(footers.data_end);
        copies.copy(file, from, place, format!("a place of its own for block {block}"));
        // Smaller than `REACH`, which is 2^32 sectors.
        let sector = (place / SECTOR) as u32;
        let what = format!("block {block}, which shared its place");
        entries.write(file, entry_at, sector.to_be_bytes().to_vec(), what);
        end = place + stride;
    }
    if !copies.is_empty() {
        let bytes = footers.bytes().to_vec();
        plan.write(file, footer_place(end), bytes, "the footer, behind the copies");
        plan.sync(file);
        plan.append(copies);
        plan.sync(file);
    }
    plan.append(entries);
}
