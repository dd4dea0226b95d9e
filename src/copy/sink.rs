//! Where contents go: an image or raw file, the differences to a base, a pipe.

use std::io::Write;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::Sharing;
use super::pipeline::{CHUNK, Sink};
use crate::codec::is_zero;
use crate::disk::Disk;
use crate::disk::share::Foreign;
use crate::disk::transfer::WRITE_BACK;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::SHARED_BLOCK;

/// Bytes of zeroes, at a multiple of them on the disk, that are worth not storing.
pub const ZERO_RUN: usize = 4096;

/// Calls `found` with every run of units of [`ZERO_RUN`] bytes of `data` that `stored` wants, as a range
/// in `data`.
fn runs(
    data: &[u8],
    stored: impl Fn(usize, &[u8]) -> bool,
    mut found: impl FnMut(Range<usize>) -> Result<()>,
) -> Result<()> {
    let mut open: Option<usize> = None;
    for (number, unit) in data.chunks(ZERO_RUN).enumerate() {
        let at = number * ZERO_RUN;
        match (stored(at, unit), open) {
            (true, None) => open = Some(at),
            (false, Some(start)) => {
                open = None;
                found(start..at)?;
            }
            _ => {}
        }
    }
    open.map_or(Ok(()), |start| found(start..data.len()))
}

/// A disk: a new image or raw file, which reads as zeroes, or something that holds other data.
pub struct DiskSink {
    disk: Arc<Disk>,
    /// The disk reads as zeroes where nothing is written.
    blank: bool,
    sharing: Sharing,
    /// The host has refused to share.
    refused: AtomicBool,
    shared: AtomicU64,
    written: AtomicU64,
}

impl DiskSink {
    /// Everything goes to `disk`; `blank` says that it reads as zeroes now.
    pub fn new(disk: Arc<Disk>, blank: bool, sharing: Sharing) -> Self {
        Self {
            disk,
            blank,
            sharing,
            refused: AtomicBool::new(false),
            shared: AtomicU64::new(0),
            written: AtomicU64::new(0),
        }
    }

    /// Writes, and lets the host's device begin in time, that it is not idle until everything is there.
    fn write(&self, at: u64, data: &[u8]) -> Result<()> {
        self.disk.write_at(at, data)?;
        let before = self.written.fetch_add(data.len() as u64, Ordering::Relaxed);
        if (before + data.len() as u64) / WRITE_BACK > before / WRITE_BACK {
            self.disk.write_back();
        }
        Ok(())
    }

    /// Bytes that were shared, not copied.
    pub fn shared(&self) -> u64 {
        self.shared.load(Ordering::Relaxed)
    }
}

impl Sink for DiskSink {
    type Work = ();

    fn put(&self, at: u64, data: &[u8], (): &mut ()) -> Result<()> {
        let mut done = 0;
        runs(
            data,
            |_, unit| !is_zero(unit),
            |run| {
                let zeroes = at + done as u64..at + run.start as u64;
                done = run.end;
                if !zeroes.is_empty() {
                    self.skip(zeroes)?;
                }
                self.write(at + run.start as u64, &data[run])
            },
        )?;
        let rest = at + done as u64..at + data.len() as u64;
        if rest.is_empty() { Ok(()) } else { self.skip(rest) }
    }

    fn skip(&self, range: Range<u64>) -> Result<()> {
        if self.blank { Ok(()) } else { self.disk.discard(range.start, range.end - range.start) }
    }

    fn shares(&self) -> bool {
        self.sharing != Sharing::Never && !self.refused.load(Ordering::Relaxed)
    }

    fn share(&self, at: u64, len: u64, from: &Foreign<'_>) -> Result<bool> {
        if !self.shares() || len < SHARED_BLOCK {
            return Ok(false);
        }
        match self.disk.write_from(at, len, from) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::Unsupported => {
                if self.sharing == Sharing::Always {
                    return Err(e.hint("--reflink=auto copies what cannot be shared"));
                }
                if from.refused() {
                    self.refused.store(true, Ordering::Relaxed);
                }
                return Ok(false);
            }
            Err(e) => return Err(e),
        }
        self.shared.fetch_add(from.shared(), Ordering::Relaxed);
        Ok(true)
    }
}

/// A child: only what differs from its parent is written to it.
pub struct DeltaSink {
    child: Arc<Disk>,
    base: Arc<Disk>,
}

impl DeltaSink {
    /// What differs from `base` goes to `child`, which shows it.
    pub fn new(child: Arc<Disk>, base: Arc<Disk>) -> Self {
        Self { child, base }
    }
}

impl Sink for DeltaSink {
    type Work = Vec<u8>;

    fn prepare(&self, at: u64, data: &[u8], base: &mut Vec<u8>) -> Result<()> {
        base.clear();
        base.resize(data.len(), 0);
        let here = self.base.size().saturating_sub(at).min(data.len() as u64);
        if here > 0 { self.base.read_at(at, &mut base[..here as usize]) } else { Ok(()) }
    }

    fn put(&self, at: u64, data: &[u8], base: &mut Vec<u8>) -> Result<()> {
        let differs = |place: usize, unit: &[u8]| base[place..place + unit.len()] != *unit;
        runs(data, differs, |run| {
            let place = at + run.start as u64;
            if is_zero(&data[run.clone()]) {
                // The parent's data must not come back, so this stores zeroes where it has to.
                return self.child.discard(place, run.len() as u64);
            }
            self.child.write_at(place, &data[run])
        })
    }

    fn skip(&self, _range: Range<u64>) -> Result<()> {
        // Neither the source nor the parent has anything here.
        Ok(())
    }
}

/// Bytes in order, zeroes included.
pub struct PipeSink<W>(Mutex<W>);

impl<W: Write + Send> PipeSink<W> {
    /// Everything goes to `out`.
    pub fn new(out: W) -> Self {
        Self(Mutex::new(out))
    }

    /// What everything has gone to.
    pub fn into_inner(self) -> W {
        self.0.into_inner()
    }
}

impl<W: Write + Send> Sink for PipeSink<W> {
    type Work = ();

    fn ordered(&self) -> bool {
        true
    }

    fn put(&self, _at: u64, data: &[u8], (): &mut ()) -> Result<()> {
        self.0.lock().write_all(data).map_err(|e| Error::io("writing the output", &e))
    }

    fn skip(&self, range: Range<u64>) -> Result<()> {
        let zeroes = vec![0; CHUNK.min(range.end - range.start) as usize];
        let mut left = range.end - range.start;
        while left > 0 {
            let part = left.min(CHUNK);
            self.put(0, &zeroes[..part as usize], &mut ())?;
            left -= part;
        }
        Ok(())
    }
}
