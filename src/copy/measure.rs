//! How large an image of a disk would be, without making it.

use std::io::Write;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::convert::{From, Options};
use super::output::convert_to_pipe;
use super::pipeline::{self, Copying, Sink};
use super::sink::ZERO_RUN;
use super::source::Source;
use super::target::Target;
use crate::codec::is_zero;
use crate::error::{Error, Result};
use crate::formats::{CreateSpec, Footprint};
use crate::progress::Progress;

/// Most blocks that are counted one by one: a bit each, 16 MiB.
const MAX_BLOCKS: u64 = 128 << 20;

/// What the files of an image take of the host, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Measured {
    /// With the contents of the disk as they are.
    pub required: u64,
    /// Once a guest has written all of the disk.
    pub fully_allocated: u64,
}

/// Measures what `spec` asks for; `from` is the disk that would be in it, `None` for an empty one. Reads
/// what the disk holds, to find zeroes.
///
/// # Errors
///
/// Those of reading the disk; [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) for what the format cannot be.
pub fn measure(
    from: Option<&Source>,
    target: Target,
    spec: &CreateSpec,
    progress: &dyn Progress,
) -> Result<Measured> {
    if spec.size == 0 {
        return Err(Error::invalid("a disk of no size"));
    }
    if let Some(stream) = stream(from, target, spec, progress)? {
        return Ok(stream);
    }
    let footprint = match target {
        Target::Raw => Footprint { empty: 0, unit: ZERO_RUN as u64, stored: ZERO_RUN as u64 },
        Target::Image(format) => format.footprint(spec)?,
    };
    let units = spec.size.div_ceil(footprint.unit);
    if units > MAX_BLOCKS {
        let what = format!("{units} blocks are more than can be counted");
        return Err(Error::unsupported(what).hint("larger blocks"));
    }
    let fully_allocated = footprint.with(units);
    let Some(source) = from else {
        return Ok(Measured { required: footprint.empty, fully_allocated });
    };
    let bits = (0..units.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
    let sink = CountSink { unit: footprint.unit, bits };
    pipeline::run(source, 0..source.size(), &sink, Copying::default(), progress)?;
    Ok(Measured { required: footprint.with(sink.count()), fully_allocated })
}

/// A compressed stream is measured by compressing.
fn stream(
    from: Option<&Source>,
    target: Target,
    spec: &CreateSpec,
    progress: &dyn Progress,
) -> Result<Option<Measured>> {
    let subformat = spec.subformat.as_deref().unwrap_or_default();
    if target.name() != "vmdk" || !subformat.eq_ignore_ascii_case("streamOptimized") {
        return Ok(None);
    }
    let nothing = Source::Stream { from: Mutex::new(Box::new(std::io::empty())), size: 0 };
    let from = From { source: from.unwrap_or(&nothing), image: None };
    let options = Options { spec: spec.clone(), ..Options::default() };
    let mut length = Length(0);
    let name = Path::new("disk.vmdk");
    convert_to_pipe(&from, &mut length, name, target, &options, progress)?;
    let grains = spec.size.div_ceil(crate::formats::vmdk::GRAIN);
    // A grain that does not compress, and its share of the tables.
    let fully_allocated = length.0 + grains * (crate::formats::vmdk::GRAIN + 512);
    Ok(Some(Measured { required: length.0, fully_allocated }))
}

/// Counts bytes.
struct Length(u64);

impl Write for Length {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.0 += data.len() as u64;
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Marks the blocks that would be stored.
struct CountSink {
    unit: u64,
    bits: Vec<AtomicU64>,
}

impl CountSink {
    fn count(&self) -> u64 {
        self.bits.iter().map(|bits| u64::from(bits.load(Ordering::Relaxed).count_ones())).sum()
    }
}

impl Sink for CountSink {
    type Work = ();

    fn put(&self, at: u64, data: &[u8], (): &mut ()) -> Result<()> {
        for (number, unit) in data.chunks(ZERO_RUN).enumerate() {
            if is_zero(unit) {
                continue;
            }
            let start = at + (number * ZERO_RUN) as u64;
            let end = start + unit.len() as u64;
            for block in start / self.unit..end.div_ceil(self.unit) {
                if let Some(bits) = self.bits.get((block / 64) as usize) {
                    bits.fetch_or(1 << (block % 64), Ordering::Relaxed);
                }
            }
        }
        Ok(())
    }

    fn skip(&self, _range: Range<u64>) -> Result<()> {
        Ok(())
    }
}
