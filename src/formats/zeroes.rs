//! Looking for zeroes in files of the host. What the host calls a hole is not read.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::plan::Steps;
use crate::codec;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::storage::Storage;

/// Bytes that are read first: most of what holds data shows it at once.
const FIRST: u64 = 4 << 10;
/// Bytes read at once after that. They stay in a processor's own cache.
const CHUNK: u64 = 256 << 10;
/// Bytes of ranges that a thread takes at once.
const SHARE: u64 = 8 << 20;
/// Most threads that look, whatever the processors.
const MAX_THREADS: usize = 8;
/// Runs of zeroes of at least this many bytes become holes.
const HOLE: usize = 64 << 10;
/// Bytes looked at for one step of that.
const LOOK: u64 = 1 << 20;
/// Bytes that become holes before they are made durable.
const BATCH: u64 = 256 << 20;

/// Whether a range of a file reads as zeroes. What the file is too short for counts as zero.
///
/// # Errors
///
/// Those of the host.
pub fn is_zero(file: &dyn Storage, range: Range<u64>) -> Result<bool> {
    Search::new(file)?.is_zero(range)
}

/// Looks at ranges of a file, one after the other.
struct Search<'a> {
    file: &'a dyn Storage,
    len: u64,
    buf: Vec<u8>,
}

impl<'a> Search<'a> {
    fn new(file: &'a dyn Storage) -> Result<Self> {
        let len = file.len().map_err(|e| Error::io("stat", &e).in_file(file.path()))?;
        Ok(Self { file, len, buf: Vec::new() })
    }

    fn is_zero(&mut self, range: Range<u64>) -> Result<bool> {
        let (file, buf) = (self.file, &mut self.buf);
        let failed = |at| move |e| Error::io("reading a block", &e).in_file(file.path()).at(at);
        let (mut at, mut step) = (range.start, FIRST);
        let end = range.end.min(self.len);
        while at < end {
            // The end of the data is not asked for: some hosts look at every page up to it, for every
            // block again.
            let data = file.first_data(at).map_err(failed(at))?;
            let Some(data) = data.filter(|data| *data < end) else { return Ok(true) };
            at = data.max(at);
            let len = step.min(end - at);
            step = CHUNK;
            buf.resize(len as usize, 0);
            file.read_at(at, buf).map_err(failed(at))?;
            if !codec::is_zero(buf) {
                return Ok(false);
            }
            at += len;
        }
        Ok(true)
    }
}

/// Which of `count` ranges, each of about `len` bytes, read as zeroes, ascending. `range` tells them;
/// `None` is one that is not looked at. `progress` gets `len` bytes for each.
///
/// # Errors
///
/// Those of the host and of `range`; where `progress` ends it.
pub(super) fn find(
    file: &dyn Storage,
    count: usize,
    len: u64,
    range: &(dyn Fn(usize) -> Result<Option<Range<u64>>> + Sync),
    progress: &dyn Progress,
) -> Result<Vec<usize>> {
    let share = (SHARE / len.max(1)).max(1) as usize;
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = processors.min(MAX_THREADS).min(count.div_ceil(share)).max(1);
    let next = AtomicUsize::new(0);
    let outcome = Mutex::new(Ok(Vec::new()));
    let look = |found: &mut Vec<usize>| {
        let mut search = Search::new(file)?;
        loop {
            let first = next.fetch_add(share, Ordering::Relaxed);
            for index in first..count.min(first.saturating_add(share)) {
                progress.go_on()?;
                if let Some(range) = range(index)?
                    && search.is_zero(range)?
                {
                    found.push(index);
                }
                progress.advance(len);
            }
            if first >= count {
                return Ok(());
            }
        }
    };
    let work = || {
        let mut found = Vec::new();
        let ended: Result<()> = look(&mut found);
        let mut outcome = outcome.lock();
        match (ended, &mut *outcome) {
            (Ok(()), Ok(all)) => all.append(&mut found),
            (Ok(()), Err(_)) => {}
            (Err(e), _) => {
                // Nobody takes more.
                next.store(count, Ordering::Relaxed);
                *outcome = Err(e);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
    let mut found = outcome.into_inner()?;
    found.sort_unstable();
    Ok(found)
}

/// Makes holes of the zeroes that a range of a file stores; how many bytes. `dry_run`: only counts them.
///
/// # Errors
///
/// Those of the host; where `progress` ends it.
pub(super) fn punch(
    file: &Arc<dyn Storage>,
    range: Range<u64>,
    dry_run: bool,
    progress: &dyn Progress,
) -> Result<u64> {
    let failed = |at| move |e| Error::io("reading", &e).in_file(file.path()).at(at);
    let mut buf = vec![0; LOOK as usize];
    let mut holes = Holes { file, dry_run, ranges: Vec::new(), waiting: 0, bytes: 0 };
    // Asked once for each run: some hosts look at every page of it.
    let mut data = 0..0;
    let mut at = range.start;
    while at < range.end {
        if progress.cancelled() {
            holes.make()?;
            progress.go_on()?;
        }
        if at >= data.end {
            data = file.next_data(at).map_err(failed(at))?.unwrap_or(u64::MAX..u64::MAX);
        }
        if data.start >= range.end {
            break;
        }
        progress.advance(data.start.max(at) - at);
        at = data.start.max(at);
        // Looks begin and end where host blocks do, as far as they can.
        let stop = data.end.min(range.end).min((at / LOOK + 1) * LOOK);
        let buf = &mut buf[..(stop - at) as usize];
        file.read_at(at, buf).map_err(failed(at))?;
        let skip = (HOLE - (at % HOLE as u64) as usize).min(buf.len()) % HOLE;
        for (index, piece) in buf[skip..].chunks_exact(HOLE).enumerate() {
            if codec::is_zero(piece) {
                let from = at + (skip + index * HOLE) as u64;
                holes.add(from..from + HOLE as u64)?;
            }
        }
        progress.advance(stop - at);
        at = stop;
    }
    holes.make()?;
    Ok(holes.bytes)
}

/// Holes that are made together.
struct Holes<'a> {
    file: &'a Arc<dyn Storage>,
    dry_run: bool,
    ranges: Vec<Range<u64>>,
    /// Bytes of those.
    waiting: u64,
    /// Bytes of all.
    bytes: u64,
}

impl Holes<'_> {
    fn add(&mut self, range: Range<u64>) -> Result<()> {
        self.waiting += range.end - range.start;
        self.bytes += range.end - range.start;
        match self.ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.ranges.push(range),
        }
        if self.waiting >= BATCH { self.make() } else { Ok(()) }
    }

    fn make(&mut self) -> Result<()> {
        self.waiting = 0;
        let mut plan = Steps::new();
        for range in self.ranges.drain(..) {
            plan.punch(self.file, range, "zeroes");
        }
        if self.dry_run { Ok(()) } else { plan.carry_out(&()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryFile;

    #[test]
    fn what_a_file_is_too_short_for_counts_as_zero() {
        let mut bytes = [0; 3000];
        let file = MemoryFile::new("/a", &bytes);
        assert!(is_zero(&*file, 0..4096).unwrap());
        assert!(is_zero(&*file, 4096..8192).unwrap());
        bytes[2999] = 1;
        let file = MemoryFile::new("/a", &bytes);
        assert!(!is_zero(&*file, 0..4096).unwrap());
        assert!(is_zero(&*file, 0..2999).unwrap());
    }

    #[test]
    fn every_range_is_looked_at_by_one_of_the_threads() {
        const LEN: u64 = 1 << 20;
        let mut bytes = vec![0; 40 * LEN as usize];
        for block in [0, 7, 8, 9, 30] {
            bytes[(block + 1) * LEN as usize - 1] = 1;
        }
        let file = MemoryFile::new("/a", &bytes);
        let range = |index: usize| {
            let at = index as u64 * LEN;
            Ok((index != 11).then_some(at..at + LEN))
        };
        let found = find(&*file, 40, LEN, &range, &()).unwrap();
        let zero = (0..40).filter(|index| ![0, 7, 8, 9, 11, 30].contains(index));
        assert_eq!(found, zero.collect::<Vec<_>>());
        let broken = |index: usize| match index {
            25 => Err(Error::corrupt("no entry")),
            _ => range(index),
        };
        assert!(find(&*file, 40, LEN, &broken, &()).is_err());
    }
}
