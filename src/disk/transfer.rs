//! Copying from one disk to another: blocks of the host are shared where it can, everything else is read,
//! looked at for zeroes, and written.
//!
//! What is shared is written as far as the disk that gets it is concerned: it is durable, and a table may
//! lead to it, once that disk was flushed. It is not looked at for zeroes, which take no space there.

use super::layers::{self, Content, Run};
use super::map::DiskRange;
use super::share::{Foreign, Holder};
use super::{Disk, len};
use crate::codec::is_zero;
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;

/// Bytes read and written at a time: they stay in a processor's cache meanwhile, and hold whole grains.
const CHUNK: u64 = 256 << 10;
/// Bytes written between flushes, which keep the changed tables in memory few.
pub(crate) const FLUSH_EVERY: u64 = 1 << 30;
/// Bytes that are written before the host's device is told to begin with them.
pub(crate) const WRITE_BACK: u64 = 32 << 20;

/// Copying from a disk to another, which has all its layers of its own or some below those of the first.
pub(crate) struct Transfer<'a> {
    from: &'a Disk,
    into: &'a Disk,
    progress: &'a dyn Progress,
    buf: Vec<u8>,
    /// The host has refused to share.
    refused: bool,
    /// Bytes since the last flush, and since the device was told to begin.
    unflushed: u64,
    unwritten: u64,
}

impl<'a> Transfer<'a> {
    /// From `from`, past whose end are zeroes, to `into`. `progress` may end it; it is not told what is done.
    pub(crate) fn new(from: &'a Disk, into: &'a Disk, progress: &'a dyn Progress) -> Self {
        let buf = vec![0; CHUNK as usize];
        Self { from, into, progress, buf, refused: false, unflushed: 0, unwritten: 0 }
    }

    /// Copies what a range holds; parts of it that are found to be zeroes go to `zeroes`. Returns the bytes
    /// copied.
    pub(crate) fn copy(
        &mut self,
        range: DiskRange,
        zeroes: &mut dyn FnMut(DiskRange) -> Result<()>,
    ) -> Result<u64> {
        let from = self.from;
        let inside = range.start.min(from.size())..range.end.min(from.size());
        let past = inside.end.max(range.start)..range.end;
        let mut bytes = 0;
        if self.refused {
            bytes += self.copy_bytes(inside, zeroes)?;
        } else if !inside.is_empty() {
            from.holders(inside, &mut |part, holder| {
                match holder {
                    Holder::Nothing => return zeroes(part),
                    Holder::File { file, at } if !self.refused => {
                        let foreign = Foreign::new(&*file, at);
                        if self.share(&part, &foreign)? {
                            bytes += part.end - part.start;
                            return Ok(());
                        }
                    }
                    Holder::File { .. } | Holder::Other => {}
                }
                bytes += self.copy_bytes(part, zeroes)?;
                Ok(())
            })?;
        }
        if !past.is_empty() {
            zeroes(past)?;
        }
        Ok(bytes)
    }

    /// Shares the host's blocks for a range, if that can be.
    fn share(&mut self, range: &DiskRange, from: &Foreign<'_>) -> Result<bool> {
        self.progress.go_on()?;
        let bytes = range.end - range.start;
        match self.into.write_from(range.start, bytes, from) {
            Ok(()) => self.written(bytes).map(|()| true),
            Err(e) if e.kind() == ErrorKind::Unsupported => {
                self.refused = from.refused();
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }

    fn copy_bytes(
        &mut self,
        range: DiskRange,
        zeroes: &mut dyn FnMut(DiskRange) -> Result<()>,
    ) -> Result<u64> {
        let unit = self.into.geometry().block_size.clamp(4096, CHUNK);
        let mut bytes = 0;
        let mut pos = range.start;
        while pos < range.end {
            self.progress.go_on()?;
            let chunk = pos..range.end.min((pos / CHUNK + 1) * CHUNK);
            let mut buf = std::mem::take(&mut self.buf);
            let held = &mut buf[..len(&chunk)];
            self.from.read_at(pos, held)?;
            for (part, zero) in runs(&chunk, unit, held) {
                if zero {
                    zeroes(part)?;
                    continue;
                }
                let data = &held[(part.start - pos) as usize..(part.end - pos) as usize];
                self.into.write_at(part.start, data)?;
                bytes += part.end - part.start;
                self.written(part.end - part.start)?;
            }
            self.buf = buf;
            pos = chunk.end;
        }
        Ok(bytes)
    }

    /// Keeps what waits in memory, of tables and of data, within bounds.
    fn written(&mut self, bytes: u64) -> Result<()> {
        self.unflushed += bytes;
        self.unwritten += bytes;
        if self.unflushed >= FLUSH_EVERY {
            self.into.flush()?;
            (self.unflushed, self.unwritten) = (0, 0);
        } else if self.unwritten >= WRITE_BACK {
            self.into.write_back();
            self.unwritten = 0;
        }
        Ok(())
    }
}

/// The runs of a range, by units at their multiples on the disk, and whether each is all zeroes.
fn runs(range: &DiskRange, unit: u64, bytes: &[u8]) -> Vec<(DiskRange, bool)> {
    let mut runs: Vec<(DiskRange, bool)> = Vec::new();
    let mut pos = range.start;
    while pos < range.end {
        let end = range.end.min((pos / unit + 1) * unit);
        let zero = is_zero(&bytes[(pos - range.start) as usize..(end - range.start) as usize]);
        match runs.last_mut() {
            Some((last, kind)) if *kind == zero => last.end = end,
            _ => runs.push((pos..end, zero)),
        }
        pos = end;
    }
    runs
}

/// Writes to `into` what the first `layers` layers of `top` hold: of each place the newest, zeroes that hide
/// something below included. `progress` gets the bytes of the disk done. Returns the bytes that the layers
/// held.
///
/// # Errors
/// A layer is damaged ([`ErrorKind::Corrupt`]), or those of reading and writing.
pub(crate) fn copy_layers(
    top: &Disk,
    into: &Disk,
    layers: usize,
    progress: &dyn Progress,
) -> Result<u64> {
    let mut transfer = Transfer::new(top, into, progress);
    let mut bytes = 0;
    progress.total(top.size());
    layers::runs(top, layers, |run: Run| {
        progress.go_on()?;
        let end = run.start + run.len;
        match run.content {
            Content::Unallocated => {
                progress.advance(run.len);
                return Ok(());
            }
            Content::Zero => into.discard(run.start, run.len)?,
            Content::Damaged => {
                let what = format!("the image is damaged at disk offset {:#x}", run.start);
                return Err(Error::corrupt(what).hint("flatdisk check lists the damage"));
            }
            Content::Data => {
                let mut pos = run.start;
                while pos < end {
                    let part = pos..end.min((pos / WRITE_BACK + 1) * WRITE_BACK);
                    transfer.copy(part.clone(), &mut |zero| {
                        into.discard(zero.start, zero.end - zero.start)
                    })?;
                    progress.advance(part.end - part.start);
                    pos = part.end;
                }
            }
        }
        if run.content == Content::Zero {
            progress.advance(run.len);
        }
        bytes += run.len;
        Ok(())
    })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::disk::flat;
    use crate::storage::memory::{MemoryFile, MemoryHost};
    use crate::storage::recording::{Change, RecordingHost};
    use crate::storage::{Access, Host};

    const LEN: usize = 3 << 20;

    /// Copies a disk with a hole in it and zeroes at its end. Returns the zeroes told, and the lengths of
    /// what was written.
    fn copied(shares: bool) -> (Vec<DiskRange>, Vec<usize>) {
        let mut bytes = vec![7; LEN];
        bytes[1 << 20..(1 << 20) + (300 << 10)].fill(0);
        bytes[LEN - (64 << 10)..].fill(0);
        let host = MemoryHost::new();
        host.insert(MemoryFile::new("/a", &bytes));
        host.insert(MemoryFile::new("/b", &vec![0; LEN]));
        let recorder = RecordingHost::over(&host);
        if shares {
            recorder.share_blocks();
        }
        let open = |path: &str, access| recorder.open(Path::new(path), access).unwrap();
        let disk = |file| flat::raw(file, 512).unwrap();
        let (from, into) = (disk(open("/a", Access::Read)), disk(open("/b", Access::Write)));
        let mut zeroes: Vec<DiskRange> = Vec::new();
        let range = 0..(LEN + 4096) as u64;
        let copied = Transfer::new(&from, &into, &()).copy(range, &mut |zero| {
            match zeroes.last_mut() {
                Some(last) if last.end == zero.start => last.end = zero.end,
                _ => zeroes.push(zero),
            }
            Ok(())
        });
        into.close().unwrap();
        let recording = recorder.recording();
        let lens = recording.ops().iter().filter_map(|op| match &op.change {
            Change::Write { data, .. } => Some(data.len()),
            _ => None,
        });
        let lens = lens.collect::<Vec<_>>();
        assert_eq!(copied.unwrap(), lens.iter().sum::<usize>() as u64);
        let mut found = vec![1; LEN];
        into.read_at(0, &mut found).unwrap();
        assert!(found == bytes);
        (zeroes, lens)
    }

    #[test]
    fn what_is_shared_is_one_piece_and_what_is_copied_leaves_zeroes_out() {
        let past = LEN as u64..(LEN + 4096) as u64;
        let (zeroes, lens) = copied(true);
        assert_eq!((zeroes, lens), (vec![past.clone()], vec![LEN]));
        let (zeroes, lens) = copied(false);
        // By chunks, the disk being one block.
        assert_eq!(zeroes, [1 << 20..(1 << 20) + CHUNK, past]);
        assert!(lens.iter().all(|len| *len as u64 <= CHUNK), "{lens:?}");
    }
}
