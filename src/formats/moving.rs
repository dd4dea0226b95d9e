//! Copying inside a file: moves of blocks and tables.
//!
//! Where the host shares blocks between places of a file and takes back what only the old place has
//! (XFS), nothing is read: the new place gets the old one's blocks. Elsewhere one thread reads ahead
//! while another writes, in order. Holes are not read and become holes, and so do pieces of zeroes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use crate::codec::{self, is_zero};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::storage::{SHARED_BLOCK, Storage};

/// Bytes that are read and written at once.
pub(super) const PIECE: u64 = 1 << 20;
/// Pieces that are read before the first of them is written.
const AHEAD: usize = 3;
/// Bytes from which on a second thread is worth its start.
const WORTH_A_THREAD: u64 = 4 << 20;
/// Bytes that are written before the host's device is told to begin with them.
const WRITE_BACK: u64 = 16 << 20;

/// A copy from one place of a file to another that it does not overlap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Copy<'a> {
    /// What is copied.
    pub from: Range<u64>,
    /// Byte where it goes.
    pub to: u64,
    /// What it is, for messages.
    pub what: &'a str,
}

impl Copy<'_> {
    fn target(&self) -> Range<u64> {
        self.to..self.to + (self.from.end - self.from.start)
    }
}

/// Copies that may be done in any order: none reads what one before it writes.
#[derive(Debug)]
pub(super) struct Copies<'a> {
    copies: Vec<Copy<'a>>,
    /// Where they write: ends, by beginnings.
    targets: BTreeMap<u64, u64>,
}

impl<'a> Copies<'a> {
    /// One.
    pub fn of(copy: Copy<'a>) -> Self {
        let Range { start, end } = copy.target();
        Self { copies: vec![copy], targets: BTreeMap::from([(start, end)]) }
    }

    /// Adds a copy, unless it depends on those before it; whether it was added.
    pub fn add(&mut self, copy: &Copy<'a>) -> bool {
        let target = copy.target();
        if [&copy.from, &target].iter().any(|range| self.writes_to(range)) {
            return false;
        }
        self.targets.insert(target.start, target.end);
        match self.copies.last_mut() {
            Some(last) if last.from.end == copy.from.start && last.target().end == copy.to => {
                last.from.end = copy.from.end;
            }
            _ => self.copies.push(copy.clone()),
        }
        true
    }

    fn writes_to(&self, range: &Range<u64>) -> bool {
        self.targets.range(..range.end).next_back().is_some_and(|(_, end)| *end > range.start)
    }

    /// Does them all in `file`. `progress` gets the bytes.
    pub fn carry_out(self, file: &Arc<dyn Storage>, progress: &dyn Progress) -> Result<()> {
        let mut shares = file.frees_moved_blocks();
        let mut left = Vec::new();
        for copy in self.copies {
            if shares {
                shares = share(file, &copy, &mut left, progress)?;
            } else {
                left.push(copy);
            }
        }
        copy_bytes(&**file, &left, progress)
    }
}

/// Shares the blocks of a copy; what is to be copied all the same is added to `left`. Whether the host
/// can do it.
fn share<'a>(
    file: &Arc<dyn Storage>,
    copy: &Copy<'a>,
    left: &mut Vec<Copy<'a>>,
    progress: &dyn Progress,
) -> Result<bool> {
    let Copy { from, to, what } = copy;
    let start = from.start.next_multiple_of(SHARED_BLOCK);
    let end = from.end / SHARED_BLOCK * SHARED_BLOCK;
    let alike = (from.start ^ to).is_multiple_of(SHARED_BLOCK);
    if !alike || start >= end {
        left.push(copy.clone());
        return Ok(true);
    }
    let at = to + (start - from.start);
    let failed = |e| Error::io(format!("writing {what}"), &e).in_file(file.path()).at(at);
    if !file.share_from(at, &**file, start, end - start).map_err(failed)? {
        left.push(copy.clone());
        return Ok(false);
    }
    progress.advance(end - start);
    for part in [from.start..start, end..from.end] {
        if !part.is_empty() {
            left.push(Copy { to: to + (part.start - from.start), from: part, what });
        }
    }
    Ok(true)
}

/// A part of a copy.
struct Piece<'a> {
    from: Range<u64>,
    to: u64,
    what: &'a str,
}

/// The copies in pieces, in order.
fn pieces<'b, 'a: 'b>(copies: &'b [Copy<'a>]) -> impl Iterator<Item = Piece<'a>> + 'b {
    copies.iter().flat_map(|copy| {
        copy.from.clone().step_by(PIECE as usize).map(|at| Piece {
            from: at..copy.from.end.min(at + PIECE),
            to: copy.to + (at - copy.from.start),
            what: copy.what,
        })
    })
}

/// Reads a piece of the first `len` bytes of the file to `buf`, which becomes empty where it is all zeroes.
fn read(file: &dyn Storage, len: u64, piece: &Piece<'_>, buf: &mut Vec<u8>) -> Result<()> {
    let Piece { from, what, .. } = piece;
    // That is damage. What is written behind the end meanwhile would make a hole of it.
    if from.end > len {
        let e = Error::corrupt(format!("{what} lies past the end of the file"));
        return Err(e.in_file(file.path()).at(from.start));
    }
    let looking =
        |e| Error::io(format!("looking for {what}"), &e).in_file(file.path()).at(from.start);
    let data = file.first_data(from.start).map_err(looking)?;
    if data.is_none_or(|data| data >= from.end) {
        buf.clear();
        return Ok(());
    }
    buf.resize((from.end - from.start) as usize, 0);
    codec::read_exact(file, from.start, buf, what)?;
    if is_zero(buf) {
        buf.clear();
    }
    Ok(())
}

/// Writes what was read of a piece.
fn write(file: &dyn Storage, piece: &Piece<'_>, bytes: &[u8]) -> Result<()> {
    if !bytes.is_empty() {
        return codec::write_all(file, piece.to, bytes, piece.what);
    }
    let failed = |e| Error::io("clearing", &e).in_file(file.path()).at(piece.to);
    file.punch_hole(piece.to, piece.from.end - piece.from.start).map_err(failed)
}

/// Reads and writes.
fn copy_bytes(file: &dyn Storage, copies: &[Copy<'_>], progress: &dyn Progress) -> Result<()> {
    let total: u64 = copies.iter().map(|copy| copy.from.end - copy.from.start).sum();
    let len = file.len().map_err(|e| Error::io("stat", &e).in_file(file.path()))?;
    let mut unsent = 0;
    let mut put = |piece: &Piece<'_>, bytes: &[u8]| {
        write(file, piece, bytes)?;
        let len = piece.from.end - piece.from.start;
        unsent += len;
        if unsent >= WRITE_BACK {
            unsent = 0;
            file.write_back();
        }
        progress.advance(len);
        Ok(())
    };
    if total < WORTH_A_THREAD {
        let mut buf = Vec::new();
        return pieces(copies).try_for_each(|piece| {
            read(file, len, &piece, &mut buf)?;
            put(&piece, &buf)
        });
    }
    std::thread::scope(|scope| {
        let (full, to_write) = sync_channel(AHEAD);
        let (empty, to_fill) = sync_channel(AHEAD + 1);
        scope.spawn(move || read_ahead(file, len, copies, &full, &to_fill));
        for (piece, bytes) in to_write {
            let bytes: Vec<u8> = bytes?;
            put(&piece, &bytes)?;
            // The reader may be done, or have enough.
            let _ = empty.try_send(bytes);
        }
        Ok(())
    })
}

/// Reads pieces until all are read, one cannot be, or nobody takes them any more.
fn read_ahead<'a>(
    file: &dyn Storage,
    len: u64,
    copies: &[Copy<'a>],
    full: &SyncSender<(Piece<'a>, Result<Vec<u8>>)>,
    empty: &Receiver<Vec<u8>>,
) {
    for piece in pieces(copies) {
        let mut buf = empty.try_recv().unwrap_or_default();
        let result = read(file, len, &piece, &mut buf).map(|()| buf);
        let failed = result.is_err();
        if full.send((piece, result)).is_err() || failed {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryFile;

    fn copied(file: &Arc<dyn Storage>, copies: &[(Range<u64>, u64)]) -> usize {
        let mut copies =
            copies.iter().map(|(from, to)| Copy { from: from.clone(), to: *to, what: "a block" });
        let mut group = Copies::of(copies.next().unwrap());
        assert!(copies.all(|copy| group.add(&copy)));
        let count = group.copies.len();
        group.carry_out(file, &()).unwrap();
        count
    }

    #[test]
    fn a_copy_is_exact_and_zeroes_in_it_become_a_hole() {
        let mib = PIECE as usize;
        // Below and above the length that a second thread is used for.
        for len in [2 * mib, 7 * mib] {
            let mut bytes: Vec<u8> = (0..2 * len).map(|at| (at / 700) as u8 | 1).collect();
            bytes[mib..2 * mib].fill(0);
            let file: Arc<dyn Storage> = MemoryFile::new("a", &bytes);
            let end = len as u64;
            assert_eq!(
                copied(&file, &[(100..mib as u64, end), (mib as u64..end, end + PIECE - 100)]),
                1
            );
            let mut found = vec![1; 2 * len];
            file.read_at(0, &mut found).unwrap();
            assert!(found[len..2 * len - 100] == bytes[100..len]);
            assert!(found[..len] == bytes[..len]);
            assert!(found[2 * len - 100..] == bytes[2 * len - 100..]);
        }
    }

    #[test]
    fn what_is_written_by_one_copy_is_read_by_none_of_the_same_group() {
        let copy = |from: Range<u64>, to| Copy { from, to, what: "a block" };
        let mut group = Copies::of(copy(100..200, 1000));
        assert!(!group.add(&copy(1050..1060, 5000)));
        assert!(!group.add(&copy(300..400, 901)));
        assert!(!group.add(&copy(900..1001, 5000)));
        assert!(group.add(&copy(300..400, 900)));
        assert!(group.add(&copy(1100..1200, 800)));
        assert!(!group.add(&copy(899..901, 5000)));
    }

    #[test]
    fn a_piece_that_cannot_be_read_ends_a_copy_however_long_the_file_becomes_meanwhile() {
        // With a second thread, and without.
        for from in [1 << 20..7 << 20, 5 << 20..7 << 20] {
            let file: Arc<dyn Storage> = MemoryFile::new("a", &vec![7; 6 << 20]);
            let group = Copies::of(Copy { from, to: 20 << 20, what: "a block" });
            let e = group.carry_out(&file, &()).unwrap_err();
            assert!(e.to_string().contains("a block lies past the end of the file"), "{e}");
        }
    }
}
