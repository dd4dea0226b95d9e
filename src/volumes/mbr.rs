//! The partition table of the first sector, and the chain of logical partitions.
//!
//! Crates that read it (mbrman) give up all partitions for one bad link of the chain, and their sums
//! overflow; here every link is checked, and one bad entry costs itself.
//!
//! ```text
//!   0 boot code | 440 disk signature | 446 four entries of 16 bytes | 510 55 AA
//!   entry: 0 status (80 active) | 4 type | 8 u32 first sector | 12 u32 sectors
//! ```
//!
//! An extended partition holds a chain of such sectors (EBR) with two entries each: a logical
//! partition, relative to its own EBR, and the next EBR, relative to the extended partition.

use super::bytes::Bytes;
use super::{Partition, types};
use crate::disk::Disk;

/// The size of the table's own sector, whatever the disk's is.
pub(super) const SECTOR: usize = 512;
/// Logical partitions that are followed.
const MAX_LINKS: usize = 256;

/// One of the four entries.
#[derive(Debug, Clone, Copy)]
struct Entry {
    status: u8,
    kind: u8,
    first: u32,
    count: u32,
}

impl Entry {
    fn is_extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }
}

/// What the first sector says.
#[derive(Debug)]
pub(super) struct Mbr {
    entries: [Entry; 4],
    /// The disk's signature.
    pub signature: u32,
}

impl Mbr {
    /// Decodes the first sector; `None` without the mark at its end.
    pub fn decode(sector: &[u8]) -> Option<Self> {
        let bytes = Bytes(sector);
        if !bytes.has(510, &[0x55, 0xaa]) {
            return None;
        }
        Some(Self { entries: entries(bytes)?, signature: bytes.le32(440)? })
    }

    /// Whether this is a table rather than the boot sector of a file system: something is in it, and
    /// every entry makes sense on a disk of `sectors`.
    pub fn plausible(&self, sectors: u64) -> bool {
        let sensible = |entry: &Entry| {
            matches!(entry.status, 0 | 0x80)
                && (entry.kind == 0 || entry.count > 0 && u64::from(entry.first) < sectors)
        };
        self.entries.iter().all(sensible) && self.entries.iter().any(|entry| entry.kind != 0)
    }

    /// Whether an entry says that the disk has a GPT.
    pub fn protective(&self) -> bool {
        self.entries.iter().any(|entry| entry.kind == 0xee)
    }

    /// Whether partitions stand beside such an entry.
    pub fn hybrid(&self) -> bool {
        self.protective() && self.entries.iter().any(|entry| !matches!(entry.kind, 0 | 0xee))
    }
}

fn entries(sector: Bytes<'_>) -> Option<[Entry; 4]> {
    let entry = |at: usize| {
        let (status, kind) = (sector.u8(at)?, sector.u8(at + 4)?);
        Some(Entry { status, kind, first: sector.le32(at + 8)?, count: sector.le32(at + 12)? })
    };
    Some([entry(446)?, entry(462)?, entry(478)?, entry(494)?])
}

/// All partitions of the table, logical ones after the primary ones.
pub(super) fn partitions(
    mbr: &Mbr,
    disk: &Disk,
    sector_size: u32,
    warnings: &mut Vec<String>,
) -> Vec<Partition> {
    let table = Table { disk, sector: u64::from(sector_size), signature: mbr.signature };
    let mut found = Vec::new();
    let mut extended = None;
    for (number, entry) in (1..).zip(&mbr.entries) {
        if entry.kind == 0 {
            continue;
        }
        found.push(table.partition(number, entry, entry.first.into()));
        if !entry.is_extended() {
            continue;
        }
        match extended {
            None => extended = Some(entry),
            Some(_) => warnings.push(format!("partition {number} is another extended partition")),
        }
    }
    if let Some(extended) = extended {
        table.logical(extended, &mut found, warnings);
    }
    found
}

struct Table<'a> {
    disk: &'a Disk,
    /// Bytes of a sector.
    sector: u64,
    signature: u32,
}

impl Table<'_> {
    fn partition(&self, number: u32, entry: &Entry, first: u64) -> Partition {
        Partition {
            number,
            // 2^34 sectors of 4096 bytes at most.
            start: first * self.sector,
            size: u64::from(entry.count) * self.sector,
            type_id: format!("{:#x}", entry.kind),
            type_name: types::mbr(entry.kind),
            name: None,
            uuid: (self.signature != 0).then(|| format!("{:08x}-{number:02x}", self.signature)),
            bootable: entry.status == 0x80,
            read_only: false,
            extended: entry.is_extended(),
            content: None,
            warnings: Vec::new(),
        }
    }

    /// Follows the chain inside `extended`.
    fn logical(&self, extended: &Entry, found: &mut Vec<Partition>, warnings: &mut Vec<String>) {
        let base = u64::from(extended.first);
        let end = base + u64::from(extended.count);
        let mut seen = Vec::new();
        let mut at = base;
        let mut number = 5;
        let bad = loop {
            if seen.contains(&at) {
                break "leads back to itself";
            }
            if seen.len() >= MAX_LINKS {
                break "is longer than any real one";
            }
            seen.push(at);
            let mut sector = [0; SECTOR];
            if self.disk.read_at(at * self.sector, &mut sector).is_err() {
                break "leads to a place that cannot be read";
            }
            let sector = Bytes(&sector);
            if !sector.has(510, &[0x55, 0xaa]) {
                // An extended partition may be empty.
                if at == base && sector.0.iter().all(|byte| *byte == 0) {
                    return;
                }
                break "leads to a sector that is no part of it";
            }
            let Some([first, second, ..]) = entries(sector) else { return };
            // The link comes second as a rule, but not with every program.
            let used = [first, second].into_iter().filter(|e| e.kind != 0 && e.count > 0);
            let (next, logical): (Vec<_>, Vec<_>) = used.partition(Entry::is_extended);
            for logical in logical {
                let mut partition = self.partition(number, &logical, at + u64::from(logical.first));
                if at + u64::from(logical.first) + u64::from(logical.count) > end {
                    let text = "reaches out of the extended partition";
                    partition.warnings.push(text.to_owned());
                }
                found.push(partition);
                number += 1;
            }
            let Some(next) = next.first() else { return };
            at = base + u64::from(next.first);
            if at >= end {
                break "leads out of the extended partition";
            }
        };
        warnings.push(format!("the chain of logical partitions {bad} at {:#x}", at * self.sector));
    }
}
