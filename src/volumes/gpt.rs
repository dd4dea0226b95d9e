//! The GUID partition table, from either of its copies.
//!
//! Crates that read it (gptman, gpt) reserve memory for as many entries as the header claims and give
//! up where the first copy is damaged in a way they do not expect; here the table is bounded, and each
//! copy is judged by itself.
//!
//! ```text
//!   sector 1, and the last one:
//!    0 `EFI PART` | 8 revision | 12 u32 header size | 16 u32 CRC-32 of the header, itself as 0
//!   24 u64 own sector | 32 u64 the other header's | 40, 48 u64 first and last usable sector
//!   56 GUID of the disk | 72 u64 first sector of the entries | 80 u32 entries | 84 u32 bytes of one
//!   88 u32 CRC-32 of all entries
//!   entry: 0 type | 16 GUID | 32 u64 first sector | 40 u64 last sector | 48 u64 attributes | 56 name
//! ```
//!
//! The backup may lie before the disk's end, where the disk was made larger; the first header tells.

use uuid::Uuid;

use super::bytes::Bytes;
use super::{Copy, Partition, types};
use crate::disk::Disk;

/// Entries, bytes of one, and bytes of all that are read.
const MAX_ENTRIES: u64 = 1024;
const MAX_ENTRY: u64 = 4096;
const MAX_ARRAY: u64 = 4 << 20;

/// Bits of an entry's attributes.
const LEGACY_BOOT: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 60;

/// A header that is intact.
#[derive(Debug)]
struct Header {
    other: u64,
    first_usable: u64,
    last_usable: u64,
    uuid: Uuid,
    entries: Vec<u8>,
    entry_size: usize,
}

/// What looking at one copy came to.
enum Look {
    Intact(Box<Header>),
    /// No header, not even a damaged one, as far as can be told.
    Absent(&'static str),
    Damaged(&'static str),
}

impl Look {
    /// What is wrong.
    fn why(&self) -> &'static str {
        match self {
            Self::Intact(_) => "nothing",
            Self::Absent(why) | Self::Damaged(why) => why,
        }
    }
}

/// A table that was found.
#[derive(Debug)]
pub(super) struct Gpt {
    /// Bytes of a sector, as the table counts.
    pub sector: u32,
    /// The disk's GUID.
    pub uuid: Option<String>,
    /// Which copy tells; `None` if neither is intact.
    pub copy: Option<Copy>,
    /// The bytes that partitions may use, as far as that is known.
    pub usable: Option<std::ops::Range<u64>>,
    /// The partitions.
    pub partitions: Vec<Partition>,
    /// What is wrong with it.
    pub warnings: Vec<String>,
}

/// Looks for the table, with the disk's own sector size first.
pub(super) fn find(disk: &Disk) -> Option<Gpt> {
    let own = match disk.geometry().logical_sector {
        4096 => 4096,
        _ => 512,
    };
    let mut damaged = None;
    for sector in [own, 512 + 4096 - own] {
        match find_with(disk, sector) {
            Some(gpt) if gpt.copy.is_some() => return Some(gpt),
            found => damaged = damaged.or(found),
        }
    }
    damaged
}

fn find_with(disk: &Disk, sector: u32) -> Option<Gpt> {
    let last = (disk.size() / u64::from(sector)).checked_sub(1)?;
    let first_copy = look(disk, sector, 1);
    // Where the first header says that the other one is, if that is not the end.
    let (place, backup) = match (&first_copy, look(disk, sector, last)) {
        (Look::Intact(header), Look::Absent(_)) if header.other != last => {
            (header.other, look(disk, sector, header.other))
        }
        (_, found) => (last, found),
    };
    let mut gpt = Gpt {
        sector,
        uuid: None,
        copy: None,
        usable: None,
        partitions: Vec::new(),
        warnings: Vec::new(),
    };
    let header = match (first_copy, backup) {
        (Look::Absent(_), Look::Absent(_)) => return None,
        (Look::Intact(first), backup) => {
            gpt.copy = Some(Copy::Primary);
            gpt.judge_backup(&first, &backup, place == last);
            first
        }
        (found, Look::Intact(backup)) => {
            gpt.copy = Some(Copy::Backup);
            let why = found.why();
            gpt.warnings.push(format!("the first copy of the GPT is damaged: {why}"));
            backup
        }
        (first, second) => {
            gpt.warnings.push(format!(
                "both copies of the GPT are damaged (the first: {}; the second: {})",
                first.why(),
                second.why()
            ));
            return Some(gpt);
        }
    };
    gpt.uuid = Some(header.uuid.to_string());
    let bytes = |first: u64, end: u64| {
        let at = |lba: u64| lba.saturating_mul(sector.into()).min(disk.size());
        at(first)..at(end)
    };
    gpt.usable = Some(bytes(header.first_usable, header.last_usable.saturating_add(1)));
    for (number, entry) in (1..).zip(header.entries.chunks_exact(header.entry_size)) {
        gpt.add(number, Bytes(entry));
    }
    Some(gpt)
}

impl Gpt {
    fn judge_backup(&mut self, first: &Header, backup: &Look, at_end: bool) {
        let text = match backup {
            Look::Intact(backup) if backup.entries != first.entries => {
                "the two copies of the GPT differ; this is the first"
            }
            Look::Intact(_) if !at_end => "the second copy of the GPT is not at the disk's end",
            Look::Intact(_) => return,
            Look::Absent(why) | Look::Damaged(why) => {
                &*format!("the second copy of the GPT is damaged: {why}")
            }
        };
        self.warnings.push(text.to_owned());
    }

    fn add(&mut self, number: u32, entry: Bytes<'_>) {
        let Some(partition) = partition(number, entry, self.sector.into()) else {
            return;
        };
        match partition {
            Ok(partition) => self.partitions.push(partition),
            Err(why) => self.warnings.push(format!("partition {number} {why}")),
        }
    }
}

/// `None` for an unused entry, an error for one that cannot be shown.
fn partition(
    number: u32,
    entry: Bytes<'_>,
    sector: u64,
) -> Option<Result<Partition, &'static str>> {
    let kind = entry.guid(0).filter(|kind| !kind.is_nil())?;
    let (first, last) = (entry.le64(32)?, entry.le64(40)?);
    let attributes = entry.le64(48)?;
    let bytes = || {
        let start = first.checked_mul(sector)?;
        let end = last.checked_add(1)?.checked_mul(sector)?;
        Some((start, end.checked_sub(start).filter(|size| *size > 0)?))
    };
    let Some((start, size)) = bytes() else {
        return Some(Err("begins and ends where nothing can"));
    };
    Some(Ok(Partition {
        number,
        start,
        size,
        type_id: kind.to_string(),
        type_name: types::gpt(kind),
        name: entry.text16(56, 72),
        uuid: entry.guid(16).map(|uuid| uuid.to_string()),
        bootable: attributes & LEGACY_BOOT != 0,
        read_only: attributes & READ_ONLY != 0,
        extended: false,
        content: None,
        warnings: Vec::new(),
    }))
}

/// Looks at the header in sector `lba`.
fn look(disk: &Disk, sector: u32, lba: u64) -> Look {
    let mut bytes = vec![0; sector as usize];
    let at = lba.checked_mul(sector.into());
    if at.is_none_or(|at| disk.read_at(at, &mut bytes).is_err()) {
        return Look::Absent("it cannot be read");
    }
    if !bytes.starts_with(b"EFI PART") {
        return Look::Absent("it is missing");
    }
    match decode(disk, sector, lba, &mut bytes) {
        Ok(header) => Look::Intact(Box::new(header)),
        Err(why) => Look::Damaged(why),
    }
}

fn decode(disk: &Disk, sector: u32, lba: u64, bytes: &mut [u8]) -> Result<Header, &'static str> {
    const SHORT: &str = "its header is too short";
    let size = Bytes(bytes).le32(12).filter(|size| (92..=sector).contains(size)).ok_or(SHORT)?;
    let crc = Bytes(bytes).le32(16).ok_or(SHORT)?;
    let header = bytes.get_mut(..size as usize).ok_or(SHORT)?;
    header[16..20].fill(0);
    if crc32(header) != crc {
        return Err("its checksum is wrong");
    }
    let header = Bytes(header);
    let field = |at| header.le64(at).ok_or(SHORT);
    if field(24)? != lba {
        return Err("it is the header of another place");
    }
    let count = u64::from(header.le32(80).ok_or(SHORT)?);
    let entry_size = u64::from(header.le32(84).ok_or(SHORT)?);
    if count > MAX_ENTRIES
        || !(128..=MAX_ENTRY).contains(&entry_size)
        || !entry_size.is_multiple_of(8)
    {
        return Err("it has more or larger entries than any real one");
    }
    // Bounded by the two limits above.
    let len = count * entry_size;
    if len > MAX_ARRAY {
        return Err("it has more or larger entries than any real one");
    }
    let mut entries = vec![0; len as usize];
    let at = field(72)?.checked_mul(sector.into()).ok_or("its entries lie outside the disk")?;
    disk.read_at(at, &mut entries).map_err(|_| "its entries cannot be read")?;
    if crc32(&entries) != header.le32(88).ok_or(SHORT)? {
        return Err("the checksum of its entries is wrong");
    }
    Ok(Header {
        other: field(32)?,
        first_usable: field(40)?,
        last_usable: field(48)?,
        uuid: header.guid(56).ok_or(SHORT)?,
        entries,
        entry_size: entry_size as usize,
    })
}

/// The CRC-32 of zlib.
pub(super) fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}
