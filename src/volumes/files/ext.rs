//! ext2, ext3 and ext4.
//!
//! Read here and not by a crate, because ext4-view takes extents that are reserved and not yet written
//! for data, and shows what was deleted there before.
//!
//! ```text
//!   superblock at 1024: 0 inodes | 4 blocks | 20 first block | 24 block size | 40 inodes of a group
//!                       88 inode size | 92, 96, 100 features | 254 size of a group descriptor
//!   group descriptors in the block after it: 8, 40 first block of the inodes
//!   inode: 0 mode | 4, 108 size | 16 time | 32 flags | 40 map of blocks, or extents, or contents
//!   extents: 0 F30A | 2 entries | 6 depth; entries of 12 bytes
//!     leaf:  0 block of the file | 4 length, more than 32768: not written | 6, 8 block
//!     index: 0 block of the file | 4, 8 block of the node
//! ```

use std::sync::Arc;

use super::{Entry, FileKind, FileSystem, MAX_ENTRIES, Sink, not_found, shown};
use crate::disk::Disk;
use crate::disk::window::Window;
use crate::error::{Error, ErrorKind, Result};
use crate::volumes::bytes::Bytes;

const ROOT: u32 = 2;
/// Features that do not keep a reader that does not know them from reading: file types, a journal,
/// extents, 64 bits, multi-mount protection, flexible groups, values of attributes in inodes, checksum
/// seeds, large directories, contents in inodes, encryption and case folding of some directories.
const KNOWN: u32 = 0x2
    | RECOVER
    | 0x40
    | WIDE
    | 0x100
    | 0x200
    | 0x400
    | 0x2000
    | 0x4000
    | 0x8000
    | 0x1_0000
    | 0x2_0000;
const RECOVER: u32 = 0x4;
const WIDE: u32 = 0x80;

/// Flags of inodes.
const ENCRYPTED: u32 = 0x800;
const EXTENTS: u32 = 0x8_0000;
const INLINE: u32 = 0x1000_0000;

/// Symbolic links that are followed for one path.
const MAX_LINKS: usize = 40;
const MAX_TARGET: u64 = 4096;
const MAX_DIRECTORY: u64 = 256 << 20;
/// Runs of blocks of one file, and nodes that lead to them.
const MAX_RUNS: usize = 4 << 20;
const MAX_NODES: usize = 1 << 20;
/// What is read at once.
const CHUNK: u64 = 1 << 20;

/// A volume.
pub(super) struct Ext {
    volume: Window<Arc<Disk>>,
    block: u64,
    blocks: u64,
    inodes: u32,
    inodes_of_group: u32,
    inode_size: u64,
    descriptors: u64,
    descriptor_size: u64,
    warnings: Vec<String>,
}

/// What is known about a file.
#[derive(Debug, Clone)]
struct Inode {
    number: u32,
    mode: u16,
    size: u64,
    modified: i64,
    flags: u32,
    map: [u8; 60],
}

/// Blocks of a file that lie in a row.
#[derive(Debug, Clone, Copy)]
struct Run {
    /// First block in the file.
    first: u64,
    count: u64,
    /// First block on the volume.
    at: u64,
}

fn corrupt(what: &'static str) -> Error {
    Error::corrupt(format!("the file system is damaged: {what}"))
}

impl Ext {
    pub fn open(volume: Window<Arc<Disk>>) -> Result<Self> {
        let mut bytes = [0; 1024];
        volume.read_at(1024, &mut bytes)?;
        Self::decode(volume, Bytes(&bytes)).ok_or_else(|| corrupt("its superblock"))?
    }

    /// `None` for a superblock that makes no sense, an error for one that is not supported.
    fn decode(volume: Window<Arc<Disk>>, bytes: Bytes<'_>) -> Option<Result<Self>> {
        let features = bytes.le32(96)?;
        if features & !KNOWN != 0 {
            let what = format!(
                "the file system has features that are not read here ({:#x})",
                features & !KNOWN
            );
            let hint = "`flatdisk attach --mount` mounts it";
            return Some(Err(Error::unsupported(what).hint(hint)));
        }
        let block = 1024u64 << bytes.le32(24).filter(|shift| *shift <= 6)?;
        let wide = features & WIDE != 0;
        let high = if wide { u64::from(bytes.le32(0x150)?) << 32 } else { 0 };
        let old = bytes.le32(76)? == 0;
        let inode_size = if old { 128 } else { u64::from(bytes.le16(88)?) };
        let inodes_of_group = bytes.le32(40).filter(|count| *count > 0)?;
        let descriptor_size = if wide { u64::from(bytes.le16(254)?) } else { 32 };
        if !(128..=block).contains(&inode_size) || !(32..=1024).contains(&descriptor_size) {
            return None;
        }
        let mut warnings = Vec::new();
        if features & RECOVER != 0 {
            let text = "its journal waits to be replayed: what was written last is not seen";
            warnings.push(text.to_owned());
        }
        let blocks = high | u64::from(bytes.le32(4)?);
        Some(Ok(Self {
            block,
            blocks: blocks.min(volume.size() / block),
            volume,
            inodes: bytes.le32(0)?,
            inodes_of_group,
            inode_size,
            // Behind the superblock, wherever the first block of data is: bigalloc says 0 for that.
            descriptors: (1024 / block + 1) * block,
            descriptor_size,
            warnings,
        }))
    }

    /// Reads a block, which must be one of the file system's.
    fn read_block(&self, number: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.block as usize];
        self.read_blocks(number, 0, &mut bytes)?;
        Ok(bytes)
    }

    fn read_blocks(&self, first: u64, skip: u64, buf: &mut [u8]) -> Result<()> {
        let count = (skip + buf.len() as u64).div_ceil(self.block);
        let inside = first.checked_add(count).is_some_and(|end| end <= self.blocks);
        let at = first.checked_mul(self.block).and_then(|at| at.checked_add(skip));
        match at {
            Some(at) if inside => self.volume.read_at(at, buf),
            _ => Err(corrupt("a block lies outside of it")),
        }
    }

    fn inode(&self, number: u32) -> Result<Inode> {
        if number == 0 || number > self.inodes {
            return Err(corrupt("a name leads to no inode"));
        }
        let (group, index) =
            ((number - 1) / self.inodes_of_group, (number - 1) % self.inodes_of_group);
        let mut descriptor = [0; 64];
        let len = self.descriptor_size.min(64) as usize;
        let at = self.descriptors + u64::from(group) * self.descriptor_size;
        self.volume.read_at(at, &mut descriptor[..len])?;
        let descriptor = Bytes(&descriptor);
        let low = descriptor.le32(8).unwrap_or(0);
        let high = descriptor.le32(40).unwrap_or(0);
        let table = u64::from(high) << 32 | u64::from(low);
        let mut bytes = [0; 128];
        let skip = u64::from(index) * self.inode_size;
        self.read_blocks(table.saturating_add(skip / self.block), skip % self.block, &mut bytes)?;
        Inode::decode(number, Bytes(&bytes)).ok_or_else(|| corrupt("an inode"))
    }

    /// The runs of a file's blocks, in order; what is between them are holes.
    fn runs(&self, inode: &Inode) -> Result<Vec<Run>> {
        let mut walk = Walk { fs: self, runs: Vec::new(), nodes: 0, mapped: 0 };
        if inode.flags & EXTENTS != 0 {
            walk.extents(&inode.map, None)?;
        } else {
            walk.map(inode)?;
        }
        Ok(walk.runs)
    }

    fn read_inode(&self, inode: &Inode, sink: &mut dyn Sink) -> Result<()> {
        if inode.flags & ENCRYPTED != 0 {
            return Err(Error::unsupported("the file is encrypted"));
        }
        if inode.flags & INLINE != 0 {
            let contents = inode.map.get(..inode.size as usize);
            return sink.data(contents.ok_or_else(|| {
                Error::unsupported("the file lies in its attributes, which are not read here")
                    .hint("`flatdisk attach --mount` mounts it")
            })?);
        }
        let mut pos = 0;
        let mut buf = vec![0; CHUNK.min(inode.size.next_multiple_of(self.block)) as usize];
        for run in self.runs(inode)? {
            let start = run.first.saturating_mul(self.block).min(inode.size);
            let end = (run.first + run.count).saturating_mul(self.block).min(inode.size);
            if start > pos {
                sink.hole(start - pos)?;
            }
            pos = start;
            while pos < end {
                let done = pos - start;
                let step = (end - pos).min(buf.len() as u64);
                let buf = &mut buf[..step as usize];
                self.read_blocks(run.at + done / self.block, done % self.block, buf)?;
                sink.data(buf)?;
                pos += step;
            }
        }
        if pos < inode.size { sink.hole(inode.size - pos) } else { Ok(()) }
    }

    /// The contents of something small: a directory or the target of a link.
    fn contents(&self, inode: &Inode, limit: u64) -> Result<Vec<u8>> {
        if inode.size > limit {
            return Err(corrupt("a directory or link is too large"));
        }
        struct Collect(Vec<u8>);
        impl Sink for Collect {
            fn data(&mut self, bytes: &[u8]) -> Result<()> {
                self.0.extend(bytes);
                Ok(())
            }
            fn hole(&mut self, len: u64) -> Result<()> {
                self.0.resize(self.0.len() + len as usize, 0);
                Ok(())
            }
        }
        let mut all = Collect(Vec::new());
        self.read_inode(inode, &mut all)?;
        Ok(all.0)
    }

    /// Calls `found` with every name of a directory, until it says that it has enough.
    fn each_name(&self, inode: &Inode, mut found: impl FnMut(&[u8], u32) -> bool) -> Result<()> {
        if inode.kind() != FileKind::Directory {
            return Err(Error::invalid("not a directory"));
        }
        let bytes = self.contents(inode, MAX_DIRECTORY)?;
        // In an inode the number of the parent comes first.
        let (skip, block) = match inode.flags & INLINE {
            0 => (0, self.block as usize),
            _ => (4, bytes.len().max(1)),
        };
        let blocks = bytes.get(skip..).unwrap_or_default().chunks(block);
        for block in blocks.map(Bytes) {
            let mut at = 0;
            while let (Some(number), Some(len)) = (block.le32(at), block.le16(at + 4)) {
                let name_len = usize::from(block.u8(at + 6).unwrap_or(0));
                let name = block.get(at + 8, name_len).unwrap_or_default();
                if number != 0 && super::is_name(name) && !found(name, number) {
                    return Ok(());
                }
                // Lengths are multiples of 4; the longest of large blocks does not fit.
                match usize::from(len) {
                    0 | 0xffff => break,
                    len if len < 8 => return Err(corrupt("a directory")),
                    len => at += len,
                }
            }
        }
        Ok(())
    }

    fn lookup(&self, directory: &Inode, name: &[u8]) -> Result<Option<Inode>> {
        let mut number = None;
        self.each_name(directory, |found, of| {
            if found == name {
                number = Some(of);
            }
            number.is_none()
        })?;
        number.map(|number| self.inode(number)).transpose()
    }

    /// The inode that a path leads to.
    fn resolve(&self, path: &[u8], follow: bool) -> Result<Inode> {
        let mut stack = vec![self.inode(ROOT)?];
        let mut rest: Vec<Vec<u8>> =
            path.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec).collect();
        let mut links = 0;
        while let Some(name) = rest.pop() {
            let here = stack.last().cloned().ok_or_else(|| not_found(path))?;
            match &name[..] {
                b"" | b"." => continue,
                b".." if stack.len() > 1 => drop(stack.pop()),
                b".." => {}
                name => {
                    let next = self.lookup(&here, name)?.ok_or_else(|| not_found(path))?;
                    let last = rest.iter().all(|name| name.is_empty());
                    if next.kind() != FileKind::Symlink || last && !follow {
                        stack.push(next);
                        continue;
                    }
                    links += 1;
                    if links > MAX_LINKS {
                        let what = format!("{}: too many symbolic links", shown(path));
                        return Err(Error::invalid(what));
                    }
                    let target = self.link_target(&next)?;
                    if target.starts_with(b"/") {
                        stack.truncate(1);
                    }
                    rest.extend(target.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec));
                }
            }
        }
        stack.pop().ok_or_else(|| not_found(path))
    }

    fn link_target(&self, inode: &Inode) -> Result<Vec<u8>> {
        if inode.size < 60 && inode.flags & EXTENTS == 0 {
            return Ok(inode.map[..inode.size as usize].to_vec());
        }
        self.contents(inode, MAX_TARGET)
    }
}

impl Inode {
    fn decode(number: u32, bytes: Bytes<'_>) -> Option<Self> {
        let mode = bytes.le16(0)?;
        // Only files and directories have the upper half.
        let high = match mode & 0xf000 {
            0x8000 | 0x4000 => u64::from(bytes.le32(108)?) << 32,
            _ => 0,
        };
        Some(Self {
            number,
            mode,
            size: high | u64::from(bytes.le32(4)?),
            modified: i64::from(bytes.le32(16)?.cast_signed()),
            flags: bytes.le32(32)?,
            map: bytes.array(40)?,
        })
    }

    fn kind(&self) -> FileKind {
        match self.mode & 0xf000 {
            0x8000 => FileKind::File,
            0x4000 => FileKind::Directory,
            0xa000 => FileKind::Symlink,
            _ => FileKind::Special,
        }
    }

    fn entry(&self, name: &[u8]) -> Entry {
        Entry {
            name: name.to_vec(),
            kind: self.kind(),
            size: self.size,
            modified: Some(self.modified),
            mode: Some(u32::from(self.mode & 0o7777)),
        }
    }
}

/// Collects the runs of one file.
struct Walk<'a> {
    fs: &'a Ext,
    runs: Vec<Run>,
    nodes: usize,
    /// Blocks of all runs.
    mapped: u64,
}

impl Walk<'_> {
    fn node(&mut self) -> Result<()> {
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            return Err(corrupt("the list of a file's blocks has no end"));
        }
        Ok(())
    }

    fn add(&mut self, run: Run) -> Result<()> {
        self.mapped = self.mapped.saturating_add(run.count);
        let end = self.runs.last().map_or(0, |last| last.first + last.count);
        if run.first < end || self.mapped > self.fs.blocks || self.runs.len() >= MAX_RUNS {
            return Err(corrupt("the list of a file's blocks"));
        }
        match self.runs.last_mut() {
            Some(last) if end == run.first && last.at + last.count == run.at => {
                last.count += run.count;
            }
            _ => self.runs.push(run),
        }
        Ok(())
    }

    /// Walks a node of the tree of extents, which must have the depth that its parent says.
    fn extents(&mut self, node: &[u8], depth: Option<u16>) -> Result<()> {
        const TREE: &str = "the tree of a file's extents";
        self.node()?;
        let node = Bytes(node);
        let own = node.le16(6).filter(|own| *own <= 5 && depth.is_none_or(|depth| depth == *own));
        let (Some(0xf30a), Some(count), Some(own)) = (node.le16(0), node.le16(2), own) else {
            return Err(corrupt(TREE));
        };
        for index in 1..=usize::from(count) {
            let entry = node.get(index * 12, 12).map(Bytes).ok_or_else(|| corrupt(TREE))?;
            let field = |at| entry.le16(at).unwrap_or(0);
            let low = |at| u64::from(entry.le32(at).unwrap_or(0));
            if own > 0 {
                let child = u64::from(field(8)) << 32 | low(4);
                let child = self.fs.read_block(child)?;
                self.extents(&child, Some(own - 1))?;
                continue;
            }
            let len = field(4);
            // What is reserved and not written yet reads as zeroes, as a hole does.
            if (1..=0x8000).contains(&len) {
                let at = u64::from(field(6)) << 32 | low(8);
                self.add(Run { first: low(0), count: len.into(), at })?;
            }
        }
        Ok(())
    }

    /// Walks the map of ext2: twelve blocks, then blocks of numbers, of such blocks, and once more.
    fn map(&mut self, inode: &Inode) -> Result<()> {
        let end = inode.size.div_ceil(self.fs.block);
        let numbers = self.fs.block / 4;
        let mut first = 0;
        for index in 0..15 {
            let depth = u32::saturating_sub(index, 11);
            let number = Bytes(&inode.map).le32(index as usize * 4).unwrap_or(0);
            self.indirect(number, depth, first, end)?;
            first += numbers.pow(depth);
        }
        Ok(())
    }

    /// Adds what the block `number` stands for, `depth` levels above the file's blocks.
    fn indirect(&mut self, number: u32, depth: u32, first: u64, end: u64) -> Result<()> {
        if number == 0 || first >= end {
            return Ok(());
        }
        if depth == 0 {
            return self.add(Run { first, count: 1, at: number.into() });
        }
        self.node()?;
        let block = self.fs.read_block(number.into())?;
        let each = (self.fs.block / 4).pow(depth - 1);
        for (index, number) in (0..).zip(block.chunks_exact(4)) {
            let number = Bytes(number).le32(0).unwrap_or(0);
            self.indirect(number, depth - 1, first + index * each, end)?;
        }
        Ok(())
    }
}

impl FileSystem for Ext {
    fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn stat(&mut self, path: &[u8]) -> Result<Entry> {
        let name = super::names(path).last().map(|name| name.to_vec()).unwrap_or_default();
        Ok(self.resolve(path, true)?.entry(&name))
    }

    fn list(&mut self, path: &[u8]) -> Result<Vec<Entry>> {
        let directory = self.resolve(path, true)?;
        let mut names = Vec::new();
        self.each_name(&directory, |name, number| {
            names.push((name.to_vec(), number));
            names.len() <= MAX_ENTRIES
        })?;
        if names.len() > MAX_ENTRIES {
            return Err(Error::unsupported("a directory of more than a million names"));
        }
        let entry = |(name, number): (Vec<u8>, u32)| match self.inode(number) {
            Ok(inode) => inode.entry(&name),
            // One bad inode does not hide the rest.
            Err(_) => Entry { name, kind: FileKind::Special, size: 0, modified: None, mode: None },
        };
        Ok(names.into_iter().map(entry).collect())
    }

    fn read(&mut self, path: &[u8], follow: bool, sink: &mut dyn Sink) -> Result<()> {
        let inode = self.resolve(path, follow)?;
        match inode.kind() {
            FileKind::File => self.read_inode(&inode, sink),
            FileKind::Directory => {
                Err(Error::invalid(format!("{}: this is a directory", shown(path))))
            }
            _ => Err(Error::invalid(format!("{}: not a regular file", shown(path)))),
        }
    }

    fn target(&mut self, path: &[u8]) -> Result<Vec<u8>> {
        let inode = self.resolve(path, false)?;
        match inode.kind() {
            FileKind::Symlink => self.link_target(&inode),
            _ => Err(Error::new(
                ErrorKind::InvalidInput,
                format!("inode {} is no link", inode.number),
            )),
        }
    }
}
