//! A private, throw-away layer over any disk: what is written vanishes with it.
//!
//! The overlay is a [`BlockMap`] like a driver's, with the disk below as parent: units of 64 KiB are
//! copied up when first written and live in one scratch file that has no name, so that the host
//! reclaims it however the process ends. Memory is a few words per run of units; nothing is durable, and
//! nothing below is changed.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use super::Disk;
use super::map::{BlockMap, Contents, DiskRange, ExtentList, Geometry, Piece, Source, WritePlan};
use crate::error::{Error, Result};
use crate::storage::Storage;
use crate::storage::runs::{Held, Runs};

/// Bytes copied up at a time.
const UNIT: u64 = 64 << 10;
/// By how many bytes the scratch file grows; what is not written takes no space.
const STEP: u64 = 64 << 20;

#[derive(Debug)]
struct Overlay {
    geometry: Geometry,
    files: [Arc<dyn Storage>; 1],
    /// By unit; slots of the scratch file hold what was written.
    runs: RwLock<Runs>,
    slots: Mutex<Slots>,
}

#[derive(Debug, Default)]
struct Slots {
    /// Slots ever handed out.
    count: u64,
    /// Slots that the scratch file is long enough for: who zeroes one by a hole does not extend it.
    room: u64,
    free: Vec<Range<u64>>,
}

impl Slots {
    /// Up to `want` slots in a row, at least one, and what they hold.
    fn take(&mut self, want: u64, scratch: &dyn Storage) -> Result<(Range<u64>, Contents)> {
        if let Some(free) = self.free.pop() {
            let taken = free.start..free.end.min(free.start + want);
            if taken.end < free.end {
                self.free.push(taken.end..free.end);
            }
            return Ok((taken, Contents::Stale));
        }
        let taken = self.count..self.count + want;
        if taken.end > self.room {
            let room = taken.end.next_multiple_of(STEP / UNIT);
            scratch
                .set_len(room * UNIT)
                .map_err(|e| Error::io("extending", &e).in_file(scratch.path()))?;
            self.room = room;
        }
        self.count = taken.end;
        Ok((taken, Contents::Zeroes))
    }
}

/// Puts a throw-away layer, kept in `scratch` (an empty file of no further use to anybody), over
/// `below`, which is read and never written.
pub fn nonpersistent(below: Arc<Disk>, scratch: Arc<dyn Storage>) -> Disk {
    let geometry = Geometry { block_size: UNIT, ..*below.geometry() };
    let map =
        Overlay { geometry, files: [scratch], runs: RwLock::default(), slots: Mutex::default() };
    Disk::new(Box::new(map), Some(below), None)
}

/// Slots that are free again when this is dropped.
struct Reserved<'a> {
    slots: &'a Mutex<Slots>,
    range: Range<u64>,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if !self.range.is_empty() {
            self.slots.lock().free.push(self.range.clone());
        }
    }
}

impl BlockMap for Overlay {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn files(&self) -> &[Arc<dyn Storage>] {
        &self.files
    }

    fn lookup(&self, want: DiskRange, out: &mut ExtentList) -> Result<()> {
        let runs = self.runs.read();
        let mut pos = want.start;
        while pos < want.end {
            let (held, run_end) = runs.at(pos / UNIT);
            let end = want.end.min(run_end.saturating_mul(UNIT));
            let source = match held {
                Some(Held::Slots(slot)) => Source::File { file: 0, at: slot * UNIT + pos % UNIT },
                Some(Held::Zeroes) => Source::Zero,
                None => Source::Parent,
            };
            out.push(pos, end - pos, source);
            pos = end;
        }
        Ok(())
    }

    fn prepare_write(&self, want: DiskRange) -> Result<WritePlan<'_>> {
        let first = want.start / UNIT;
        let count = want.end.div_ceil(UNIT) - first;
        let (range, contents) = self.slots.lock().take(count, &*self.files[0])?;
        let units = first..first + (range.end - range.start);
        let piece = Piece {
            start: units.start * UNIT,
            len: (units.end - units.start) * UNIT,
            file: 0,
            at: range.start * UNIT,
            contents,
        };
        let mut reserved = Reserved { slots: &self.slots, range };
        Ok(WritePlan::new([piece].into_iter().collect(), move || {
            let slots = std::mem::take(&mut reserved.range);
            let covered = self.runs.write().put(units, Held::Slots(slots.start));
            self.slots.lock().free.extend(covered);
            Ok(())
        }))
    }

    fn unmap(&self, want: DiskRange, rest: &mut Vec<DiskRange>) -> Result<()> {
        // The disk's last unit may be cut short; nothing lies behind it.
        let end =
            if want.end == self.geometry.size { want.end.div_ceil(UNIT) } else { want.end / UNIT };
        let units = want.start.div_ceil(UNIT)..end;
        if units.is_empty() {
            rest.push(want);
            return Ok(());
        }
        let whole = units.start * UNIT..(units.end * UNIT).min(want.end);
        let covered = self.runs.write().put(units, Held::Zeroes);
        for slots in &covered {
            // Giving space back is a kindness here, not a promise.
            let len = (slots.end - slots.start) * UNIT;
            let _ = self.files[0].punch_hole(slots.start * UNIT, len);
        }
        self.slots.lock().free.extend(covered);
        let borders = [want.start..whole.start, whole.end..want.end];
        rest.extend(borders.into_iter().filter(|r| !r.is_empty()));
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn close(&self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryFile;

    /// 1 MiB of `0x11` under an overlay.
    fn disk() -> (Arc<MemoryFile>, Disk) {
        let below = MemoryFile::new("below", &[0x11; 1 << 20]);
        let disk = crate::disk::flat::raw(below.clone(), 512).unwrap();
        (below, nonpersistent(Arc::new(disk), MemoryFile::new("scratch", &[])))
    }

    #[test]
    fn writes_and_discards_stay_in_the_overlay() {
        let (below, disk) = disk();
        let mut model = vec![0x11; 1 << 20];
        let mut random = fastrand::Rng::with_seed(5);
        for _ in 0..300 {
            let start = random.usize(0..1 << 20);
            let end = random.usize(start..=1 << 20).min(start + 200_000);
            if random.u8(..) < 80 {
                disk.discard(start as u64, (end - start) as u64).unwrap();
                model[start..end].fill(0);
            } else {
                let byte = random.u8(..);
                disk.write_at(start as u64, &vec![byte; end - start]).unwrap();
                model[start..end].fill(byte);
            }
        }
        let mut found = vec![0; 1 << 20];
        disk.read_at(0, &mut found).unwrap();
        assert!(found == model);
        assert!(below.to_vec().iter().all(|b| *b == 0x11));
    }

    #[test]
    fn planned_space_is_there_to_be_read_before_it_is_written() {
        let (_, disk) = disk();
        let plan = disk.map.prepare_write(UNIT - 512..3 * UNIT).unwrap();
        assert_eq!(plan.pieces.len(), 1);
        let piece = plan.pieces[0];
        assert_eq!((piece.start, piece.len, piece.contents), (0, 3 * UNIT, Contents::Zeroes));
        assert!(piece.at + piece.len <= disk.map.files()[0].len().unwrap());
        drop(plan);
        assert_eq!(disk.map.prepare_write(0..UNIT).unwrap().pieces[0].contents, Contents::Stale);
    }

    #[test]
    fn a_freed_slot_shows_nothing_of_its_past() {
        let (_, disk) = disk();
        disk.write_at(0, &[7; UNIT as usize]).unwrap();
        disk.discard(0, UNIT).unwrap();
        disk.write_at(5 * UNIT + 100, &[8; 10]).unwrap();
        let mut unit = vec![0; UNIT as usize];
        disk.read_at(5 * UNIT, &mut unit).unwrap();
        assert_eq!((unit[99], unit[100], unit[109], unit[110]), (0x11, 8, 8, 0x11));
        disk.read_at(0, &mut unit).unwrap();
        assert_eq!(unit, vec![0; UNIT as usize]);
    }
}
