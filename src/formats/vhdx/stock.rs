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

    /// Takes one entry. An error says what is wrong with it and leaves out its space.
    pub fn take(&mut self, slot: Slot, entry: Entry) -> Result<()> {
        let block_size = self.shape.layout.block_size;
        match (slot, entry.state()) {
            (Slot::Unused, _) | (_, State::NotPresent) => Ok(()),
            (Slot::Block(block), State::Invalid) => {
                Err(Error::corrupt(format!("block {block} has no valid state: {:#x}", entry.0)))
            }
            (Slot::Block(block), State::Partial) if !self.shape.has_parent => {
                let what = "is partially present on a disk without parent";
                Err(Error::corrupt(format!("block {block} {what}")))
            }
            (Slot::Block(block), State::Present | State::Partial) => {
                self.claim(entry.offset(), block_size, || format!("block {block}"))
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
                self.claim(entry.offset(), MIB, || format!("the sector bitmap of chunk {chunk}"))
            }
            (Slot::Bitmap(chunk), _) => {
                let what = format!("the sector bitmap of chunk {chunk} has no valid state");
                Err(Error::corrupt(format!("{what}: {:#x}", entry.0)))
            }
        }
    }

    fn claim(&mut self, at: u64, len: u64, name: impl Fn() -> String) -> Result<()> {
        let end = at.checked_add(len).filter(|end| *end <= MAX_FILE);
        let Some(end) = end.filter(|_| at < self.file_len) else {
            let what = format!("{} at {at:#x} lies past the end of the file", name());
            return Err(Error::corrupt(what));
        };
        if !self.shape.may_hold(at, len, self.file_len) {
            let what = format!("{} at {at:#x} lies on the header, the log or a region", name());
            return Err(Error::corrupt(what));
        }
        if !self.space.mark(at..end) {
            let what = format!("{} at {at:#x} overlaps another block", name());
            return Err(Error::corrupt(what));
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
