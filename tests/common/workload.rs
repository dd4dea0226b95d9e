//! Seeded operations on a disk, and what runs them while keeping the [`History`].

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use flatdisk::disk::Disk;
use flatdisk::error::{Error, ErrorKind, Result};
use flatdisk::formats::{self, OpenOptions};
use flatdisk::storage::recording::RecordingHost;
use flatdisk::storage::{Access, Host};
use parking_lot::Mutex;

use super::history::{History, SECTOR};
use super::images::Kind;
use super::pattern;

/// One operation on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Write {
        at: u64,
        len: u64,
    },
    /// A write of nothing but zero bytes.
    Zeroes {
        at: u64,
        len: u64,
    },
    Discard {
        at: u64,
        len: u64,
    },
    Flush,
    /// Closes the disk and opens it again.
    Reopen,
}

/// Writes and discards whole `unit`s at `count` random places of an image and of its model, and closes
/// the image.
pub fn scribble(
    host: &Arc<dyn Host>,
    path: &Path,
    unit: usize,
    model: &mut [u8],
    random: &mut fastrand::Rng,
    count: u32,
) {
    let disk = formats::open(host, path, &OpenOptions::new(Access::Write)).unwrap().disk;
    for _ in 0..count {
        let len = match random.u8(..4) {
            0 => random.usize(1..600),
            1 => 512 * random.usize(1..300),
            _ => random.usize(1..200_000),
        };
        let at = random.usize(..model.len()) / unit * unit;
        let at = if random.bool() { at / 4096 * 4096 } else { at };
        let end = |len: usize| model.len().min((at + len).next_multiple_of(unit));
        if random.u8(..5) == 0 {
            let end = end(20 * len);
            disk.discard(at as u64, (end - at) as u64).unwrap();
            model[at..end].fill(0);
        } else {
            let end = end(len);
            pattern::fill(random.u32(..), at as u64, &mut model[at..end]);
            disk.write_at(at as u64, &model[at..end]).unwrap();
        }
    }
    disk.close().unwrap();
}

/// `count` operations that meet again and again in a few blocks of a disk of `size` bytes.
pub fn script(random: &mut fastrand::Rng, size: u64, block: u64, count: usize) -> Vec<Step> {
    // A disk that is one block has no borders inside that matter.
    let block = if block >= size { size / 8 / SECTOR * SECTOR } else { block };
    let block = block.clamp(SECTOR, size);
    let blocks = size.div_ceil(block);
    let far = (32 << 20) / block;
    let mut hot = vec![0, 1, 2, blocks / 2, blocks - 1, far.saturating_sub(1), far];
    hot.retain(|number| *number < blocks);
    (0..count).map(|_| step(random, size, block, &hot)).collect()
}

/// Writes and discards all over a disk, `stride` bytes apart, in random order, flushed at the end.
pub fn wide_script(random: &mut fastrand::Rng, size: u64, stride: u64) -> Vec<Step> {
    let mut places: Vec<u64> = (0..size / stride).map(|index| index * stride).collect();
    let mut steps = Vec::new();
    for round in 0..2 {
        random.shuffle(&mut places);
        for &at in &places {
            steps.push(match round == 1 && random.u8(..3) == 0 {
                true => Step::Discard { at, len: stride },
                false => Step::Write { at: at + random.u64(..600), len: random.u64(1..1200) },
            });
        }
        steps.push(Step::Flush);
    }
    steps
}

fn step(random: &mut fastrand::Rng, size: u64, block: u64, hot: &[u64]) -> Step {
    let start = hot[random.usize(..hot.len())] * block;
    let inside = |at: u64, len: u64| {
        let at = at.min(size - 1);
        (at, len.min(size - at))
    };
    match random.u8(..100) {
        0..62 => {
            let (at, len) = extent(random, start, block);
            let (at, len) = inside(at, len);
            if random.u8(..20) == 0 { Step::Zeroes { at, len } } else { Step::Write { at, len } }
        }
        62..78 => {
            let (at, len) = match random.u8(..10) {
                0..6 => (start, block),
                6..8 => (start, block * 3),
                _ => extent(random, start, block),
            };
            let (at, len) = inside(at, len);
            Step::Discard { at, len }
        }
        78..96 => Step::Flush,
        _ => Step::Reopen,
    }
}

/// Opens a disk for writing. As for a program that opens a flat file, one that comes out read-only
/// has failed to open.
fn open_writable(kind: &dyn Kind, host: &Arc<dyn Host>) -> Result<Arc<Disk>> {
    let disk = kind.open(host, Access::Write)?;
    match disk.read_only().map(str::to_owned) {
        Some(why) => Err(Error::new(ErrorKind::ReadOnly, why)),
        None => Ok(disk),
    }
}

/// A range that begins in the block at `start` and may cross into the next.
fn extent(random: &mut fastrand::Rng, start: u64, block: u64) -> (u64, u64) {
    let sectors = block / SECTOR;
    let sector = [0, 1, sectors / 2, sectors - 1][random.usize(..4)] + random.u64(..3);
    let at = start + sector.min(sectors - 1) * SECTOR;
    match random.u8(..10) {
        0..5 => (at, SECTOR * random.u64(1..=8)),
        5..8 => (at + random.u64(..SECTOR), random.u64(1..3000)),
        _ if block <= 64 << 10 => (start, block * random.u64(1..=2)),
        _ => (at, SECTOR * random.u64(1..=64)),
    }
}

/// A disk under test on recorded storage.
pub struct Runner<'a> {
    pub kind: &'a dyn Kind,
    /// What the disk is opened from: the recorder, or something that stands before it.
    pub host: Arc<dyn Host>,
    pub recorder: Arc<RecordingHost>,
    pub disk: Arc<Disk>,
    pub history: Mutex<History>,
    stamp: AtomicU32,
}

impl<'a> Runner<'a> {
    /// Opens the image on `host`, whose changes `recorder` sees. Opening must change nothing.
    pub fn open(
        kind: &'a dyn Kind,
        host: Arc<dyn Host>,
        recorder: Arc<RecordingHost>,
        history: History,
    ) -> Result<Self> {
        let before = recorder.position();
        let disk = open_writable(kind, &host)?;
        assert_eq!(recorder.position(), before, "opening changed the image");
        let (history, stamp) = (Mutex::new(history), AtomicU32::new(1));
        Ok(Self { kind, host, recorder, disk, history, stamp })
    }

    /// Makes stamps of this runner unlike those of others on the same disk.
    pub fn stamp_from(&self, first: u32) {
        self.stamp.store(first, Ordering::Relaxed);
    }

    /// Runs one operation and notes it. After an error the range may hold old or new contents.
    pub fn apply(&self, step: &Step) -> Result<()> {
        let begin = self.recorder.position();
        match *step {
            Step::Write { at, len } => {
                let data = pattern::bytes(self.stamp.fetch_add(1, Ordering::Relaxed), at, len);
                self.history.lock().begin_write(begin, at, &data);
                let result = self.disk.write_at(at, &data);
                self.end_write(at, len, result)
            }
            Step::Zeroes { at, len } => {
                self.history.lock().begin_zeroes(begin, at, len);
                let result = self.disk.write_at(at, &vec![0; len as usize]);
                self.end_write(at, len, result)
            }
            Step::Discard { at, len } => {
                self.history.lock().begin_zeroes(begin, at, len);
                let result = self.disk.discard(at, len);
                self.end_write(at, len, result)
            }
            Step::Flush => self.promise(|| self.disk.flush()),
            Step::Reopen => unreachable!("needs exclusive access: run"),
        }
    }

    fn end_write(&self, at: u64, len: u64, result: Result<()>) -> Result<()> {
        self.history.lock().end_write(at, len, result.is_ok());
        result
    }

    /// As [`Self::apply`], for every kind of step.
    pub fn run(&mut self, step: &Step) -> Result<()> {
        if *step != Step::Reopen {
            return self.apply(step);
        }
        self.close()?;
        self.disk = open_writable(self.kind, &self.host)?;
        Ok(())
    }

    /// Closes the disk, which promises as much as a flush.
    pub fn close(&self) -> Result<()> {
        self.promise(|| self.disk.close())
    }

    fn promise(&self, flush: impl FnOnce() -> Result<()>) -> Result<()> {
        let begin = self.history.lock().tick();
        flush()?;
        let end = self.recorder.position();
        self.history.lock().flushed(begin, end);
        Ok(())
    }

    /// Runs `count` operations on each of several threads, each with sectors of its own: every
    /// `threads`-th sector, or block if `by_block`, while another thread flushes. Returns the first
    /// error.
    pub fn run_threads(&self, seed: u64, threads: u64, count: usize, by_block: bool) -> Result<()> {
        let size = self.disk.size();
        let block = self.disk.geometry().block_size.clamp(SECTOR, size);
        let unit = if by_block { block } else { SECTOR };
        let worker = |thread: u64| -> Result<()> {
            let mut random = fastrand::Rng::with_seed(seed ^ (thread << 32));
            for _ in 0..count {
                // Spreads the work over several flushes.
                std::thread::sleep(Duration::from_micros(random.u64(..100)));
                let near = [0, block, block * 2, size / 2][random.usize(..4)];
                let number = near / unit + random.u64(..if by_block { 6 } else { 24 });
                let number = number / threads * threads + thread;
                let start = number * unit;
                if start + unit > size {
                    continue;
                }
                self.apply(&own_step(&mut random, start, unit))?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let worker = &worker;
            let handles: Vec<_> =
                (0..threads).map(|thread| scope.spawn(move || worker(thread))).collect();
            let mut result = Ok(());
            while !handles.iter().all(|handle| handle.is_finished()) {
                result = result.and(self.apply(&Step::Flush));
                std::thread::sleep(Duration::from_micros(20));
            }
            for handle in handles {
                result = result.and(handle.join().expect("a worker panicked"));
            }
            result
        })
    }
}

/// An operation inside one unit that belongs to the calling thread.
fn own_step(random: &mut fastrand::Rng, start: u64, unit: u64) -> Step {
    let skip = random.u64(..unit.min(4096));
    let at = if random.bool() { start } else { start + skip };
    let len = (start + unit - at).min(1 + random.u64(..2048));
    match random.u8(..10) {
        0..7 => Step::Write { at, len },
        7..9 => Step::Discard { at: start, len: unit },
        _ => Step::Zeroes { at, len },
    }
}
