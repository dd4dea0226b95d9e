//! ext2, ext3 and ext4, by the first superblock or one of its copies.

use super::{Content, Kind, Probe};
use crate::disk::Disk;
use crate::volumes::bytes::Bytes;

/// Where the superblock lies, and how long it is.
const AT: usize = 1024;
const LEN: usize = 1024;

const HAS_JOURNAL: u32 = 4;
const RECOVER: u32 = 4;
const JOURNAL_DEVICE: u32 = 8;
const SIXTY_FOUR_BIT: u32 = 0x80;
/// Features that ext2 has, and ext3 beside them; whatever else there is makes it ext4.
const OLD_INCOMPATIBLE: u32 = 0x2 | 0x10;
const OLD_READ_ONLY: u32 = 0x1 | 0x2 | 0x4;

pub(super) fn ext(probe: &Probe<'_>) -> Option<Content> {
    let block = probe.head().get(AT, LEN)?;
    let super_block = SuperBlock::decode(Bytes(block)).filter(|found| found.group == 0)?;
    probe.fits(super_block.content.size?).then_some(super_block.content)
}

struct SuperBlock {
    content: Content,
    /// The group whose copy this is.
    group: u64,
}

impl SuperBlock {
    fn decode(bytes: Bytes<'_>) -> Option<Self> {
        if bytes.le16(0x38)? != 0xef53 {
            return None;
        }
        let shift = bytes.le32(0x18).filter(|shift| *shift <= 6)?;
        let block_size = 1024u64 << shift;
        let compatible = bytes.le32(0x5c)?;
        let incompatible = bytes.le32(0x60)?;
        let read_only = bytes.le32(0x64)?;
        let wide = incompatible & SIXTY_FOUR_BIT != 0;
        let count = |low: usize, high: usize| {
            let high = if wide { u64::from(bytes.le32(high)?) << 32 } else { 0 };
            Some(high | u64::from(bytes.le32(low)?))
        };
        let size = count(4, 0x150)?.checked_mul(block_size)?;
        let old =
            incompatible & !(OLD_INCOMPATIBLE | RECOVER) == 0 && read_only & !OLD_READ_ONLY == 0;
        let (kind, name) = match (incompatible & JOURNAL_DEVICE != 0, compatible & HAS_JOURNAL != 0)
        {
            (true, _) => (Kind::Container, "jbd"),
            (_, true) if old => (Kind::Filesystem, "ext3"),
            (_, false) if old && incompatible & RECOVER == 0 => (Kind::Filesystem, "ext2"),
            _ => (Kind::Filesystem, "ext4"),
        };
        let mut content = Content::new(kind, name);
        let (major, minor) = (bytes.le32(0x4c)?, bytes.le16(0x3e)?);
        content.version = Some(format!("{major}.{minor}"));
        content.label = bytes.text(0x78, 16);
        content.uuid = bytes.uuid(0x68);
        content.size = Some(size);
        content.block_size = Some(block_size);
        content.free = count(0x0c, 0x158)?.checked_mul(block_size).filter(|free| *free <= size);
        if incompatible & RECOVER != 0 {
            content.warnings.push("its journal waits to be replayed".to_owned());
        }
        Some(Self { content, group: bytes.le16(0x5a)?.into() })
    }
}

/// An ext file system that began at byte 0 of the disk and whose first superblock was written over, as
/// a partition table does; and the place of the copy that tells.
pub(in crate::volumes) fn from_backup(disk: &Disk) -> Option<(Content, u64)> {
    // Groups that have a copy, whatever options the file system was made with; as many blocks as a
    // bitmap of one block has bits make a group.
    for shift in [2, 0, 1] {
        let block_size = 1024u64 << shift;
        let first = u64::from(shift == 0);
        for group in [1, 3, 5, 7] {
            let at = (first + group * 8 * block_size) * block_size;
            let mut bytes = [0; LEN];
            if disk.read_at(at, &mut bytes).is_err() {
                continue;
            }
            let found = SuperBlock::decode(Bytes(&bytes)).filter(|found| {
                let size = found.content.size.unwrap_or(0);
                found.group == group
                    && found.content.block_size == Some(block_size)
                    && size > at
                    && size / 4 <= disk.size()
            });
            if let Some(mut found) = found {
                // Copies are not kept up to date.
                found.content.free = None;
                return Some((found.content, at));
            }
        }
    }
    None
}
