//! Taking stock: going through the BAT and marking what it names, which shows what is free, and
//! whether two structures claim the same space.

use super::bat::{Entry, Slot, State};
use super::blocks::Shape;
use super::layout::{MAX_FILE, MIB};
use super::space::Space;
use crate::error::{Error, Result};

/// The space of a file while the BAT is being read.
pub(super) struct Stock<'a> {
    shape: &'a Shape,
    space: Space,
    /// Former places of discarded blocks. Other programs may take such a place back for its block,
    /// so it is kept, but it is no damage if something else lies there.
    anchors: Option<Space>,
    file_len: u64,
}

/// An entry that cannot be right.
#[derive(Debug)]
pub(super) struct Misfit {
    /// In which way.
    pub kind: MisfitKind,
    /// The same for people.
    pub error: Error,
}

/// What can be wrong with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MisfitKind {
    /// It leads where no block can be, or has no valid state: nothing can be read.
    Nowhere,
    /// The file ends before what the block holds of the disk, or in the middle of the bitmap.
    CutShort,
    /// It leads to where an entry before it leads, too.
    Shared,
    /// It counts on a parent that the disk has not. The block is read as a whole one.
    NoParent,
}

impl Misfit {
    fn new(kind: MisfitKind, what: String) -> Self {
        Self { kind, error: Error::corrupt(what) }
    }
}

impl<'a> Stock<'a> {
    /// Stock of a file of `file_len` bytes with everything but blocks marked.
    pub fn new(shape: &'a Shape, file_len: u64) -> Result<Self> {
        if file_len > MAX_FILE {
            return Err(Error::unsupported("the file is too large to be written"));
        }
        let mut space = Space::new(file_len);
        for range in &shape.reserved {
            space.mark(range.clone());
        }
        Ok(Self { shape, space, anchors: None, file_len })
    }

    /// Takes one entry. Of a misfit the space is left out.
    pub fn take(&mut self, slot: Slot, entry: Entry) -> std::result::Result<(), Misfit> {
        let block_size = self.shape.layout.block_size;
        match (slot, entry.state()) {
            (Slot::Unused, _) | (_, State::NotPresent) => Ok(()),
            (Slot::Block(block), State::Invalid) => {
                let what = format!("block {block} has no valid state: {:#x}", entry.0);
                Err(Misfit::new(MisfitKind::Nowhere, what))
            }
            (Slot::Block(block), State::Partial) if !self.shape.has_parent => {
                let what = format!("block {block} is partially present on a disk without parent");
                Err(Misfit::new(MisfitKind::NoParent, what))
            }
            (Slot::Block(block), State::Present | State::Partial) => {
                let needed = self.shape.needed(block);
                self.claim(entry.offset(), block_size, needed, || format!("block {block}"))
            }
            (Slot::Block(_), State::Zero) => Ok(()),
            (Slot::Block(_), State::Undefined | State::Unmapped) => {
                self.anchor(entry.offset(), block_size);
                Ok(())
            }
            (Slot::Bitmap(_), State::Present) if !self.shape.has_parent => {
                self.anchor(entry.offset(), MIB);
                Ok(())
            }
            (Slot::Bitmap(chunk), State::Present | State::Partial) if self.shape.has_parent => {
                let name = || format!("the sector bitmap of chunk {chunk}");
                self.claim(entry.offset(), MIB, MIB, name)
            }
            (Slot::Bitmap(chunk), _) => {
                let what = format!("the sector bitmap of chunk {chunk} has no valid state");
                Err(Misfit::new(MisfitKind::Nowhere, format!("{what}: {:#x}", entry.0)))
            }
        }
    }

    /// Takes `len` bytes at `at`, of which the file must have `needed`.
    fn claim(
        &mut self,
        at: u64,
        len: u64,
        needed: u64,
        name: impl Fn() -> String,
    ) -> std::result::Result<(), Misfit> {
        let misfit =
            |kind, how: &str| Err(Misfit::new(kind, format!("{} at {at:#x} {how}", name())));
        let end = at.checked_add(len).filter(|end| *end <= MAX_FILE);
        let Some(end) = end.filter(|_| at < self.file_len) else {
            return misfit(MisfitKind::Nowhere, "lies past the end of the file");
        };
        if !self.shape.may_hold(at, len, self.file_len) {
            return misfit(MisfitKind::Nowhere, "lies on the header, the log or a region");
        }
        let fresh = self.space.mark(at..end);
        if at + needed > self.file_len {
            return misfit(MisfitKind::CutShort, "is cut short by the end of the file");
        }
        if !fresh {
            return misfit(MisfitKind::Shared, "overlaps another block");
        }
        Ok(())
    }

    fn anchor(&mut self, at: u64, len: u64) {
        let end = at.checked_add(len).filter(|end| *end <= self.file_len.next_multiple_of(MIB));
        if let Some(end) = end.filter(|_| at > 0) {
            let anchors = self.anchors.get_or_insert_with(|| Space::new(self.file_len));
            anchors.mark(at..end);
        }
    }

    /// The space, with everything marked.
    pub fn finish(mut self) -> Space {
        if let Some(anchors) = &self.anchors {
            self.space.merge(anchors);
        }
        self.space
    }
}
