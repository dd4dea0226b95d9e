//! Which layer of a chain holds what: the disk as runs of data, zeroes and nothing.
//!
//! Runs are told one after the other, so that a map of a huge disk takes no more memory than the
//! extents of one step.

use super::Disk;
use super::map::{DiskRange, FileIndex, Source};
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
    /// Where the first byte of data is, unless it is compressed.
    pub place: Option<Place>,
}

/// A byte of a layer's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Which of the layer's files; see [`Disk::file_path`].
    pub file: FileIndex,
    /// Byte offset there.
    pub at: u64,
}

impl Run {
    /// Whether data goes on in `next` where it ends here.
    fn goes_on(&self, next: &Self) -> bool {
        match (self.place, next.place) {
            (Some(a), Some(b)) => a.file == b.file && a.at.checked_add(self.len) == Some(b.at),
            (None, None) => true,
            _ => false,
        }
    }
}

/// Calls `found` with every run of `disk` in order, joined where neighbours are alike. Only the first
/// `layers` layers are looked at; what lies below counts as [`Content::Unallocated`] in the last one.
pub fn runs(disk: &Disk, layers: usize, found: impl FnMut(Run) -> Result<()>) -> Result<()> {
    joined_runs(disk, 0..disk.size(), layers, |_, _| true, found)
}

/// As [`runs`], but data that lies in several places of the host makes as many runs.
pub fn runs_by_place(
    disk: &Disk,
    layers: usize,
    found: impl FnMut(Run) -> Result<()>,
) -> Result<()> {
    joined_runs(disk, 0..disk.size(), layers, Run::goes_on, found)
}

impl Disk {
    /// Calls `found` with every run of a range in order, as [`runs_by_place`] does for all of a disk and
    /// its parents.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange), a table that cannot be read, or what
    /// `found` fails with.
    pub fn map(&self, range: DiskRange, found: impl FnMut(Run) -> Result<()>) -> Result<()> {
        let range = self.check_range(range.start, range.end.saturating_sub(range.start))?;
        joined_runs(self, range, usize::MAX, Run::goes_on, found)
    }
}

fn joined_runs(
    disk: &Disk,
    range: DiskRange,
    layers: usize,
    alike: impl Fn(&Run, &Run) -> bool,
    mut found: impl FnMut(Run) -> Result<()>,
) -> Result<()> {
    let mut joined: Option<Run> = None;
    let mut list = Vec::new();
    let mut step = FIRST_STEP;
    let longest = if disk.is_coarse() { MAX_STEP } else { MAX_FINE_STEP };
    let mut pos = range.start;
    while pos < range.end {
        let end = range.end.min(pos.saturating_add(step));
        list.clear();
        layer_runs(disk, 0, layers, pos..end, &mut list)?;
        step = match list.len() {
            MANY.. => (step / 4).max(MIN_STEP),
            n if n < MANY / 8 => (step * 4).min(longest),
            _ => step,
        };
        for run in &list {
            match &mut joined {
                Some(last)
                    if (last.content, last.layer) == (run.content, run.layer)
                        && alike(last, run) =>
                {
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
        let place = match extent.source {
            Source::File { file, at } => Some(Place { file, at: at + (part.start - extent.start) }),
            _ => None,
        };
        let mut push = |content| push(out, part.clone(), content, layer, place);
        match extent.source {
            Source::File { .. } | Source::Packed { .. } => push(Content::Data),
            Source::Bad => push(Content::Damaged),
            Source::Zero if disk.parent().is_some() => push(Content::Zero),
            Source::Zero => push(Content::Unallocated),
            Source::Parent => match disk.parent() {
                _ if layer + 1 >= layers => push(Content::Unallocated),
                Some(parent) => layer_runs(parent, layer + 1, layers, part, out)?,
                None => push(Content::Damaged),
            },
        }
    }
    push(out, past, Content::Unallocated, layer, None);
    Ok(())
}

fn push(
    out: &mut Vec<Run>,
    range: DiskRange,
    content: Content,
    layer: usize,
    place: Option<Place>,
) {
    if !range.is_empty() {
        out.push(Run { start: range.start, len: range.end - range.start, content, layer, place });
    }
}
