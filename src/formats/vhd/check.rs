//! Checking an image without changing it.

use super::batmap::Bits;
use super::bitmaps::is_full;
use super::footers::{CopyState, Footers};
use super::layout::{Chs, DiskType, FOOTER, SECTOR};
use super::parent_link;
use super::structure::Structure;
use super::survey::Survey;
use crate::codec;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::{Report, Severity, repair};
use crate::storage::Storage;

/// What it means that one of the two footers is lost.
const REFUSED: &str = "other programs may refuse the image";

/// Adds everything that is wrong with the image to `report`.
pub(super) fn check(file: &dyn Storage, force: bool, report: &mut Report) -> Result<()> {
    // What cannot be made sense of is a finding, what the host failed at is an error.
    let found = |e: Error, report: &mut Report| match e.kind() {
        ErrorKind::Corrupt => {
            report.add(Severity::Error, e.offset(), e.what().to_owned());
            Ok(())
        }
        _ => Err(e),
    };
    let footers = match Footers::find(file, force) {
        Ok(footers) => footers,
        Err(e) => return found(e, report),
    };
    check_footers(&footers, report);
    if footers.disk_type == DiskType::Fixed {
        check_fixed(&footers, report);
        return Ok(());
    }
    match Structure::read(file, &footers, force) {
        Ok(structure) => check_blocks(file, &footers, &structure, report),
        Err(e) => found(e, report),
    }
}

/// Whichever of the two footers is intact says all there is to say, so the loss of the other one is
/// no loss of data, but other programs look at that one only and refuse the image. Two that contradict
/// each other are worse: nobody knows whose disk is right.
fn check_footers(footers: &Footers, report: &mut Report) {
    let footer = &footers.footer;
    let end = footers.data_end;
    match &footers.trailing {
        CopyState::Good | CopyState::Differs => {}
        CopyState::Short => {
            report.notice(end, "the footer is of the 511-byte form that few programs know");
        }
        CopyState::Damaged(why) => {
            let what = format!("the footer is damaged: {why}; {REFUSED}");
            report.error(footers.file_len - FOOTER, what);
        }
        CopyState::Absent if footers.trailing_garbage > 0 => {}
        CopyState::Absent => report.error(end, format!("the footer is missing; {REFUSED}")),
    }
    match &footers.head {
        CopyState::Differs => report.error(0, "the footer copy differs from the footer"),
        CopyState::Damaged(why) => {
            report.error(0, format!("the footer copy is damaged: {why}; {REFUSED}"));
        }
        CopyState::Absent if footers.disk_type != DiskType::Fixed => {
            report.error(0, format!("the footer copy is missing; {REFUSED}"));
        }
        _ => {}
    }
    if footers.trailing_garbage > 0 {
        let garbage = footers.trailing_garbage;
        let what = format!("{garbage} bytes of garbage follow the footer; {REFUSED}");
        report.error(footers.file_len - garbage, what);
    }
    if let Some(why) = &footers.forced {
        report.error(end, why.clone());
    }
    if footer.features.get() & 2 == 0 {
        report.notice(end + 8, "the feature bit that is always set is not");
    }
    if footer.current_size.get() != footer.size() {
        report.notice(end + 48, "the size is not a multiple of 512");
    }
    if footer.original_size != footer.current_size {
        report.notice(end + 40, "programs that go by the original size show another one");
    }
    if footer.geometry() != Chs::MAX && footer.geometry().size() > footer.size() {
        report.notice(end + 56, "the geometry is larger than the disk");
    }
    if footer.saved_state != 0 {
        report.notice(end + 84, "the disk belongs to a machine in saved state");
    }
}

fn check_fixed(footers: &Footers, report: &mut Report) {
    let (size, present) = (footers.footer.current_size.get(), footers.data_end);
    if present < size {
        report.error(
            present,
            format!("the file ends {} bytes before the end of the disk", size - present),
        );
    } else if present > size {
        report.notice(size, format!("{} bytes between the disk and the footer", present - size));
    }
}

fn check_blocks(
    file: &dyn Storage,
    footers: &Footers,
    structure: &Structure,
    report: &mut Report,
) -> Result<()> {
    report.blocks = structure.size.div_ceil(structure.block_size);
    for what in &structure.warnings {
        let severity = if structure.read_only.as_ref() == Some(what) {
            Severity::Error
        } else {
            Severity::Notice
        };
        report.add(severity, None, what.clone());
    }
    if footers.disk_type == DiskType::Differencing {
        check_parent(footers, structure, report);
    }
    let survey = Survey::run(file, structure, footers.data_end, &mut |problem| {
        report.add(problem.severity, Some(problem.at), problem.what);
    })?;
    let stride = structure.stride();
    let of_disk = |(_, block, _): &(u32, u32, bool)| u64::from(*block) < structure.blocks;
    report.allocated_blocks = survey.places(stride).filter(of_disk).count() as u64;
    let batmap = load_batmap(file, structure, report)?;
    let bitmaps = BitmapCheck { file, footers, structure, batmap };
    // Of blocks that share their place one is looked at, or a small file would be read for ever.
    for (sector, block, _) in survey.places(stride).filter(of_disk).filter(|place| !place.2) {
        bitmaps.run(sector, block, report)?;
    }

    let (gaps, end) = survey.gaps(structure, stride);
    for gap in gaps {
        let stored = repair::stored(file, gap.clone())?;
        if stored > 0 {
            let what = format!("{stored} bytes between blocks belong to nothing");
            report.leak(gap.start, stored, what);
        }
    }
    let tail = footers.data_end.saturating_sub(end);
    if tail >= stride {
        report.leak(end, tail, format!("{tail} bytes before the footer belong to nothing"));
    }
    Ok(())
}

/// Whether the image names its parent. Whether that is there is for opening the chain to find out.
fn check_parent(footers: &Footers, structure: &Structure, report: &mut Report) {
    let at = footers.footer.data_offset.get();
    match parent_link(footers, structure) {
        Ok(link) if link.candidates.is_empty() => {
            report.error(at, "no name of the parent is usable");
        }
        Ok(_) => {}
        Err(e) if e.kind() == ErrorKind::Corrupt => report.error(at, e.what().to_owned()),
        Err(e) => report.notice(at, e.what().to_owned()),
    }
}

/// What the sector bitmaps are compared with.
struct BitmapCheck<'a> {
    file: &'a dyn Storage,
    footers: &'a Footers,
    structure: &'a Structure,
    batmap: Option<Bits>,
}

impl BitmapCheck<'_> {
    /// Looks at one stored block.
    fn run(&self, sector: u32, block: u32, report: &mut Report) -> Result<()> {
        let at = u64::from(sector) * SECTOR;
        let mut bitmap = vec![0; self.structure.bitmap_size as usize];
        codec::read_exact(self.file, at, &mut bitmap, "a sector bitmap")?;
        let range = self.structure.block_range(u64::from(block));
        let sectors = (range.end - range.start) / SECTOR;
        if is_full(&bitmap, sectors) {
            return Ok(());
        }
        if self.batmap.as_ref().is_some_and(|bits| bits.get(u64::from(block))) {
            report.error(at, format!("the batmap calls block {block} full, its bitmap does not"));
        }
        if self.footers.disk_type == DiskType::Dynamic
            && let Some(hidden) = self.structure.hidden_data(self.file, sector, block, &bitmap)?
        {
            let what = format!("block {block} holds data that its bitmap says is not there");
            report.notice(hidden, what);
        }
        Ok(())
    }
}

fn load_batmap(
    file: &dyn Storage,
    structure: &Structure,
    report: &mut Report,
) -> Result<Option<Bits>> {
    let Some(batmap) = &structure.batmap else { return Ok(None) };
    let (bits, intact) = batmap.load(file, structure.blocks)?;
    if !intact {
        let e = batmap.damaged();
        report.add(Severity::Error, e.offset(), e.what().to_owned());
    }
    Ok(Some(bits))
}
