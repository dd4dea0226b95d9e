//! Which layer of a chain holds what: the disk as runs of data, zeroes and nothing.
//!
//! Runs are told one after the other, so that a map of a huge disk takes no more memory than the
//! extents of one step.

use super::Disk;
use super::map::{DiskRange, Source};
use crate::error::Result;

/// Bytes of the disk that the first step covers; later ones adapt to how finely the disk is cut.
const FIRST_STEP: u64 = 64 << 20;
const MIN_STEP: u64 = 1 << 20;
/// Longest steps where the disk is divided into blocks only, and where it may be into sectors: some
/// hundred thousand extents fit in a few ten MiB, whatever the image says.
const MAX_STEP: u64 = 16 << 30;
const MAX_FINE_STEP: u64 = 256 << 20;
/// Extents of one step above which the next one is shorter, and below an eighth of which longer.
const MANY: usize = 4096;

/// What a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Stored bytes.
    Data,
    /// A layer over others says that these are zeroes.
    Zero,
    /// No layer holds anything: zeroes.
    Unallocated,
    /// Lost, or in a parent that is missing.
    Damaged,
}

/// A part of the disk in which everything comes from one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First byte on the disk.
    pub start: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// What it is.
    pub content: Content,
    /// The layer that says so: 0 is the disk itself, 1 its parent, and so on.
    pub layer: usize,
}

/// Calls `found` with every run of `disk` in order, joined where neighbours are alike. Only the first
/// `layers` layers are looked at; what lies below counts as [`Content::Unallocated`] in the last one.
pub fn runs(disk: &Disk, layers: usize, mut found: impl FnMut(Run) -> Result<()>) -> Result<()> {
    let mut joined: Option<Run> = None;
    let mut list = Vec::new();
    let mut step = FIRST_STEP;
    let longest = if disk.is_coarse() { MAX_STEP } else { MAX_FINE_STEP };
    let mut pos = 0;
    while pos < disk.size() {
        let end = disk.size().min(pos.saturating_add(step));
        list.clear();
        layer_runs(disk, 0, layers, pos..end, &mut list)?;
        step = match list.len() {
            MANY.. => (step / 4).max(MIN_STEP),
            n if n < MANY / 8 => (step * 4).min(longest),
            _ => step,
        };
        for run in &list {
            match &mut joined {
                Some(last) if (last.content, last.layer) == (run.content, run.layer) => {
                    last.len += run.len;
                }
                _ => joined.replace(*run).map_or(Ok(()), &mut found)?,
            }
        }
        pos = end;
    }
    joined.map_or(Ok(()), found)
}

/// Appends the runs of `range`, seen from layer `layer` on.
fn layer_runs(
    disk: &Disk,
    layer: usize,
    layers: usize,
    range: DiskRange,
    out: &mut Vec<Run>,
) -> Result<()> {
    let inside = range.start.min(disk.size())..range.end.min(disk.size());
    let past = inside.end.max(range.start)..range.end;
    for extent in disk.extents(inside)?.iter() {
        let part = extent.start.max(range.start)..extent.end().min(range.end);
        match extent.source {
            Source::File { .. } | Source::Packed { .. } => push(out, part, Content::Data, layer),
            Source::Bad => push(out, part, Content::Damaged, layer),
            Source::Zero if disk.parent().is_some() => push(out, part, Content::Zero, layer),
            Source::Zero => push(out, part, Content::Unallocated, layer),
            Source::Parent => match disk.parent() {
                _ if layer + 1 >= layers => push(out, part, Content::Unallocated, layer),
                Some(parent) => layer_runs(parent, layer + 1, layers, part, out)?,
                None => push(out, part, Content::Damaged, layer),
            },
        }
    }
    push(out, past, Content::Unallocated, layer);
    Ok(())
}

fn push(out: &mut Vec<Run>, range: DiskRange, content: Content, layer: usize) {
    if !range.is_empty() {
        out.push(Run { start: range.start, len: range.end - range.start, content, layer });
    }
}
