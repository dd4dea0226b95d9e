//! The one loop that moves the contents of a disk: workers that each read, look for zeroes, deflate and
//! write one chunk after the other.
//!
//! A worker takes the next chunk that holds data, under a lock, and does everything that is to be done
//! with it; so reading, deflating and writing overlap as soon as there are two workers, and memory is
//! what the workers hold: one chunk each. A [`Sink`] that must get its chunks in order is served in
//! turns: a worker that is done with preparing waits until all chunks before its own are put.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Condvar, Mutex};

use super::source::{Seen, Source};
use crate::disk::share::{Foreign, Holder};
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;

/// Bytes in a chunk, a multiple of every grain that a sink stores as a whole. It stays in a processor's
/// own cache while it is read, looked at and written.
pub const CHUNK: u64 = 256 << 10;
/// Bytes that a chunk's beginning is a multiple of: a grain of a stream.
const ALIGN: u64 = 64 << 10;
/// Bytes in a chunk where blocks are shared, not read.
const SHARED_CHUNK: u64 = 64 << 20;
/// Most workers, whatever the processors.
const MAX_WORKERS: usize = 16;
/// Smallest part that is given up where an image cannot be read, in bytes.
const LOST: u64 = 512;
/// Most ranges of lost data that are listed one by one.
const MAX_LOST: usize = 100_000;

/// Where the contents of a disk go.
pub trait Sink: Sync {
    /// What one worker needs for preparing: buffers, a compressor.
    type Work: Default + Send;

    /// Whether chunks must be put in ascending order, one at a time.
    fn ordered(&self) -> bool {
        false
    }

    /// Does with a chunk what needs no order.
    fn prepare(&self, at: u64, data: &[u8], work: &mut Self::Work) -> Result<()> {
        let _ = (at, data, work);
        Ok(())
    }

    /// Takes the chunk that begins at byte `at` of the disk.
    fn put(&self, at: u64, data: &[u8], work: &mut Self::Work) -> Result<()>;

    /// Takes note that a range, which is not empty, is zero.
    fn skip(&self, range: Range<u64>) -> Result<()>;

    /// Whether [`Self::share`] may be tried.
    fn shares(&self) -> bool {
        false
    }

    /// Takes `len` bytes at byte `at` of the disk by sharing the host's blocks. `false`, and nothing is
    /// taken, where that cannot be.
    fn share(&self, at: u64, len: u64, from: &Foreign<'_>) -> Result<bool> {
        let _ = (at, len, from);
        Ok(false)
    }
}

/// How to copy.
#[derive(Debug, Clone, Copy, Default)]
pub struct Copying {
    /// Copy zeroes for what cannot be read, and go on.
    pub salvage: bool,
}

/// Brings bytes `range` of `source` to `sink`. Returns the ranges that could not be read, ascending, if
/// `how` allows any.
pub fn run<S: Sink>(
    source: &Source,
    range: Range<u64>,
    sink: &S,
    how: Copying,
    progress: &dyn Progress,
) -> Result<Vec<Range<u64>>> {
    progress.total(range.end - range.start);
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    // While one waits for its turn another one may work.
    let workers = if sink.ordered() { processors + 2 } else { processors.max(2) };
    let work = Shared {
        source,
        sink,
        how,
        progress,
        end: range.end,
        claims: Mutex::new(Claims::from(range.start)),
        turn: Mutex::new(0),
        next_turn: Condvar::new(),
        ended: AtomicBool::new(false),
        lost: Mutex::default(),
        failure: Mutex::new(None),
    };
    std::thread::scope(|scope| {
        for _ in 1..workers.min(MAX_WORKERS) {
            scope.spawn(|| work.worker());
        }
        work.worker();
    });
    if let Some(failure) = work.failure.into_inner() {
        return Err(failure);
    }
    let mut lost = work.lost.into_inner();
    crate::storage::runs::merge(&mut lost);
    Ok(lost)
}

/// A chunk that a worker has taken.
struct Claim {
    number: u64,
    /// Zeroes before the chunk.
    gap: Range<u64>,
    /// The chunk; empty behind the last one.
    data: Range<u64>,
}

/// How far the chunks have been taken.
struct Claims {
    pos: u64,
    number: u64,
    /// Where data lies, from `pos` on and before `looked`.
    ahead: VecDeque<Range<u64>>,
    looked: u64,
    seen: Seen,
}

impl Claims {
    fn from(pos: u64) -> Self {
        Self { pos, number: 0, ahead: VecDeque::new(), looked: pos, seen: Seen::default() }
    }
}

/// What the workers share.
struct Shared<'a, S> {
    source: &'a Source,
    sink: &'a S,
    how: Copying,
    progress: &'a dyn Progress,
    end: u64,
    claims: Mutex<Claims>,
    /// The number of the chunk that may be put next.
    turn: Mutex<u64>,
    next_turn: Condvar,
    /// No more chunks are to be taken.
    ended: AtomicBool,
    lost: Mutex<Vec<Range<u64>>>,
    failure: Mutex<Option<Error>>,
}

impl<S: Sink> Shared<'_, S> {
    fn worker(&self) {
        if let Err(e) = self.work() {
            self.failure.lock().get_or_insert(e);
            self.end();
        }
    }

    fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
        let _turn = self.turn.lock();
        self.next_turn.notify_all();
    }

    fn work(&self) -> Result<()> {
        let mut buf = vec![0; CHUNK as usize];
        let mut work = S::Work::default();
        while !self.ended.load(Ordering::Relaxed) {
            self.progress.go_on()?;
            let Some(claim) = self.claim(&mut buf)? else { break };
            let Claim { number, gap, data } = claim;
            if self.sink.ordered() {
                let buf = &mut buf[..(data.end - data.start) as usize];
                if !self.source.sequential() {
                    self.read(data.start, buf)?;
                }
                self.sink.prepare(data.start, buf, &mut work)?;
                if !self.wait_for(number) {
                    break;
                }
                self.put(gap.clone(), &data, buf, &mut work)?;
                *self.turn.lock() += 1;
                self.next_turn.notify_all();
            } else {
                self.copy(gap.clone(), data.clone(), &mut buf, &mut work)?;
            }
            self.progress.advance(data.end - gap.start);
        }
        Ok(())
    }

    /// Takes the next chunk; a source that comes in order is read here.
    fn claim(&self, buf: &mut [u8]) -> Result<Option<Claim>> {
        let mut claims = self.claims.lock();
        let pos = claims.pos;
        if pos >= self.end {
            return Ok(None);
        }
        let longest = if self.sink.shares() { SHARED_CHUNK } else { CHUNK };
        let data = match self.next_data(&mut claims)? {
            Some(first) => {
                let start = (first / ALIGN * ALIGN).max(pos);
                start..self.end.min((start / longest + 1) * longest)
            }
            None => self.end..self.end,
        };
        claims.pos = data.end;
        let number = claims.number;
        claims.number += 1;
        if self.source.sequential() {
            self.source.read(data.start, &mut buf[..(data.end - data.start) as usize])?;
        }
        Ok(Some(Claim { number, gap: pos..data.start, data }))
    }

    /// Where data begins at or after the place that has been come to. What cannot even be looked up
    /// counts as data if it may be lost: reading it tells.
    fn next_data(&self, claims: &mut Claims) -> Result<Option<u64>> {
        loop {
            while let Some(first) = claims.ahead.front() {
                if first.end > claims.pos {
                    return Ok(Some(first.start.max(claims.pos)));
                }
                claims.ahead.pop_front();
            }
            claims.looked = claims.looked.max(claims.pos);
            if claims.looked >= self.end {
                return Ok(None);
            }
            self.progress.go_on()?;
            let window =
                claims.looked..self.end.min(claims.looked.saturating_add(self.source.window()));
            let mut found = Vec::new();
            match self.source.data(window.clone(), &mut claims.seen, &mut found) {
                Err(e) if self.how.salvage && is_loss(&e) => found = Vec::from([window.clone()]),
                other => other?,
            }
            claims.ahead = found.into();
            claims.looked = window.end;
        }
    }

    fn wait_for(&self, number: u64) -> bool {
        let mut turn = self.turn.lock();
        while *turn != number && !self.ended.load(Ordering::Relaxed) {
            self.next_turn.wait(&mut turn);
        }
        *turn == number && !self.ended.load(Ordering::Relaxed)
    }

    fn put(
        &self,
        gap: Range<u64>,
        data: &Range<u64>,
        buf: &[u8],
        work: &mut S::Work,
    ) -> Result<()> {
        if !gap.is_empty() {
            self.sink.skip(gap)?;
        }
        if buf.is_empty() { Ok(()) } else { self.sink.put(data.start, buf, work) }
    }

    /// Copies a chunk to a sink that takes them in any order.
    fn copy(
        &self,
        gap: Range<u64>,
        data: Range<u64>,
        buf: &mut [u8],
        work: &mut S::Work,
    ) -> Result<()> {
        if self.source.sequential() {
            let buf = &buf[..(data.end - data.start) as usize];
            self.sink.prepare(data.start, buf, work)?;
            return self.put(gap, &data, buf, work);
        }
        if !gap.is_empty() {
            self.sink.skip(gap)?;
        }
        if !self.sink.shares() || data.is_empty() {
            return self.copy_bytes(data, buf, work);
        }
        self.source.holders(data, &mut |part, holder| match holder {
            Holder::Nothing => self.sink.skip(part),
            Holder::Other => self.copy_bytes(part, buf, work),
            Holder::File { file, at } => {
                let from = Foreign::new(&*file, at);
                let shared = self.sink.share(part.start, part.end - part.start, &from)?;
                if shared { Ok(()) } else { self.copy_bytes(part, buf, work) }
            }
        })
    }

    /// Copies a range by reading it.
    fn copy_bytes(&self, range: Range<u64>, buf: &mut [u8], work: &mut S::Work) -> Result<()> {
        let mut pos = range.start;
        while pos < range.end {
            self.progress.go_on()?;
            let part = pos..range.end.min((pos / CHUNK + 1) * CHUNK);
            let buf = &mut buf[..(part.end - part.start) as usize];
            self.read(pos, buf)?;
            self.sink.prepare(pos, buf, work)?;
            self.sink.put(pos, buf, work)?;
            pos = part.end;
        }
        Ok(())
    }

    /// Reads; what cannot be read is zero, if that is allowed.
    fn read(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        match self.source.read(at, buf) {
            Err(e) if self.how.salvage && is_loss(&e) => self.read_around(at, buf),
            other => other,
        }
    }

    /// Reads what can be read of a range in which something cannot: in halves, down to sectors.
    fn read_around(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len() as u64;
        if len <= LOST {
            buf.fill(0);
            let mut lost = self.lost.lock();
            lost.push(at..at + len);
            if lost.len() > MAX_LOST {
                crate::storage::runs::merge(&mut lost);
            }
            if lost.len() > MAX_LOST {
                let what = "more places cannot be read than can be listed";
                return Err(Error::corrupt(what).at(at));
            }
            return Ok(());
        }
        let half = (len / 2).next_multiple_of(LOST) as usize;
        let (first, second) = buf.split_at_mut(half);
        self.read(at, first)?;
        self.read(at + half as u64, second)
    }
}

/// Whether an error says that a part of an image cannot be had, and others may.
fn is_loss(e: &Error) -> bool {
    matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Io | ErrorKind::ParentMissing)
}
