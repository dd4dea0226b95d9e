//! Comparing two disks.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use super::pipeline::{self, Copying, Sink};
use super::source::Source;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;

/// Most bytes of a difference that are shown.
const SHOWN: usize = 16;

/// The first place where two disks differ.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Difference {
    /// Byte of the disk.
    pub at: u64,
    /// What the first disk has there, up to 16 bytes.
    pub first: Vec<u8>,
    /// What the second disk has there; none behind its end.
    pub second: Vec<u8>,
}

/// Compares two disks of which the shorter one counts as followed by zeroes. Where neither holds
/// anything nothing is read.
///
/// # Errors
///
/// Those of reading either disk, and [`ErrorKind::Cancelled`] where `progress` ends the work.
pub fn compare(
    one: &Arc<Disk>,
    other: &Arc<Disk>,
    progress: &dyn Progress,
) -> Result<Option<Difference>> {
    compare_with(one, other, Copying::default(), progress)
}

/// [`compare`]; what `how` allows not to be readable of the first disk counts as zero.
pub(super) fn compare_with(
    one: &Arc<Disk>,
    other: &Arc<Disk>,
    how: Copying,
    progress: &dyn Progress,
) -> Result<Option<Difference>> {
    let sink = CompareSink { other: Source::Disk(other.clone()), found: Mutex::new(None) };
    let size = one.size().max(other.size());
    let both = Source::Over(one.clone(), other.clone());
    let done = pipeline::run(&both, 0..size, &sink, how, progress);
    match (sink.found.into_inner(), done) {
        (Some(found), _) => Ok(Some(found)),
        (None, done) => done.map(|_| None),
    }
}

struct CompareSink {
    other: Source,
    found: Mutex<Option<Difference>>,
}

impl Sink for CompareSink {
    type Work = Vec<u8>;

    fn put(&self, at: u64, data: &[u8], other: &mut Vec<u8>) -> Result<()> {
        other.resize(data.len(), 0);
        self.other.read(at, other)?;
        if data == other {
            return Ok(());
        }
        let place = data.iter().zip(other.iter()).position(|(a, b)| a != b).unwrap_or(0);
        let shown = |bytes: &[u8]| bytes[place..bytes.len().min(place + SHOWN)].to_vec();
        let here = Difference { at: at + place as u64, first: shown(data), second: shown(other) };
        let mut found = self.found.lock();
        if found.as_ref().is_none_or(|known| here.at < known.at) {
            *found = Some(here);
        }
        // Chunks are taken in order, so that those before this one are under way and will be finished.
        Err(Error::new(ErrorKind::Cancelled, "a difference was found"))
    }

    fn skip(&self, _range: Range<u64>) -> Result<()> {
        Ok(())
    }
}
