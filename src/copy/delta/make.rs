//! Writing a delta from a chain.

use std::io::Write;

use super::stream::{Header, Summary, Writer};
use super::{MAX_RUN, UNIT};
use crate::disk::Disk;
use crate::disk::layers::{self, Content, Run};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::formats::Image;
use crate::formats::chain::read;
use crate::progress::Progress;

/// Writes to `out` what changed on the disk of `image` after its ancestor number `generation` (1 is its
/// parent). The images are open for reading, so that nobody changes them meanwhile. `progress` gets the
/// bytes of the disk done. Memory: two runs of data.
///
/// # Errors
/// There is no such ancestor, a disk between the two is smaller than the ancestor's, an image is damaged
/// where it may have changed, or reading or writing fails. What was written until then is no delta: it
/// lacks its end.
pub fn make(
    image: &Image,
    generation: usize,
    out: &mut dyn Write,
    progress: &dyn Progress,
) -> Result<Summary> {
    let ancestor = image.chain().nth(generation).filter(|_| generation > 0);
    let Some(ancestor) = ancestor else {
        return Err(Error::invalid("a delta needs an ancestor of the image").in_file(&image.path));
    };
    let below = ancestor.disk.size();
    for between in image.chain().take(generation) {
        if between.disk.size() < below {
            let what = format!(
                "the disk has {} bytes, less than the {below} of the ancestor {}",
                between.disk.size(),
                ancestor.path.display()
            );
            return Err(Error::unsupported(what).in_file(&between.path));
        }
    }
    let header = Header {
        size_before: below,
        size_after: image.disk.size(),
        logical_sector: image.disk.geometry().logical_sector,
        before: ancestor.identity.clone(),
        after: image.identity.clone(),
    };
    let mut maker = Maker {
        now: &image.disk,
        before: &ancestor.disk,
        writer: Writer::new(out, &header)?,
        buffers: [Vec::new(), Vec::new()],
    };
    progress.total(header.size_after);
    layers::runs(&image.disk, generation, |run| {
        progress.go_on()?;
        maker.run(&run, progress)
    })
    .in_file(&image.path)?;
    maker.writer.finish()
}

struct Maker<'a> {
    now: &'a Disk,
    before: &'a Disk,
    writer: Writer<'a>,
    /// Bytes of both generations.
    buffers: [Vec<u8>; 2],
}

impl Maker<'_> {
    /// Adds what changed in a run that comes from one image.
    fn run(&mut self, run: &Run, progress: &dyn Progress) -> Result<()> {
        let end = run.start + run.len;
        match run.content {
            Content::Unallocated => progress.advance(run.len),
            Content::Zero => {
                self.emptied(run.start, end)?;
                progress.advance(run.len);
            }
            Content::Data => {
                let mut pos = run.start;
                while pos < end {
                    progress.go_on()?;
                    let next = end.min((pos / MAX_RUN + 1) * MAX_RUN);
                    self.compare(pos, next)?;
                    progress.advance(next - pos);
                    pos = next;
                }
            }
            Content::Damaged => {
                let what = format!("the image is damaged at disk offset {:#x}", run.start);
                let e = Error::new(ErrorKind::Corrupt, what);
                return Err(e.hint("`flatdisk check` lists the damage"));
            }
        }
        Ok(())
    }

    /// Adds zeroes where the ancestor stores anything.
    fn emptied(&mut self, start: u64, end: u64) -> Result<()> {
        let mut pos = start;
        while pos < end.min(self.before.size()) {
            let Some(data) = self.before.next_data(pos)? else { break };
            let (from, to) = (data.start.max(pos), data.end.min(end));
            if from >= to {
                break;
            }
            self.writer.zeroes(from, to - from)?;
            pos = to;
        }
        Ok(())
    }

    /// Adds those units of a range in which the generations differ.
    fn compare(&mut self, start: u64, end: u64) -> Result<()> {
        let [now, before] = &mut self.buffers;
        now.resize((end - start) as usize, 0);
        before.resize((end - start) as usize, 0);
        self.now.read_at(start, now)?;
        read(self.before, start, before)?;
        // Bytes of the buffers that are data to be told.
        let mut data = 0..0;
        let mut at = 0;
        while at < now.len() {
            let pos = start + at as u64;
            let unit = at..now.len().min(((pos / UNIT + 1) * UNIT - start) as usize);
            at = unit.end;
            if now[unit.clone()] == before[unit.clone()] {
                continue;
            }
            let zero = now[unit.clone()].iter().all(|byte| *byte == 0);
            if !zero && data.end == unit.start && !data.is_empty() {
                data.end = unit.end;
                continue;
            }
            if !data.is_empty() {
                self.writer.data(start + data.start as u64, &now[data.clone()])?;
                data = 0..0;
            }
            if zero {
                self.writer.zeroes(pos, unit.len() as u64)?;
            } else {
                data = unit;
            }
        }
        if data.is_empty() {
            return Ok(());
        }
        self.writer.data(start + data.start as u64, &now[data])
    }
}
