//! File systems of Windows, and its encryption. All of them begin with a boot sector.

use super::{Content, Kind, Probe, usage};
use crate::volumes::bytes::Bytes;

/// What boot sectors of FAT and NTFS agree on.
struct Boot {
    /// Bytes of a sector.
    sector: u64,
    /// Bytes of a cluster.
    cluster: u64,
}

impl Boot {
    fn decode(head: Bytes<'_>) -> Option<Self> {
        let sector = u64::from(head.le16(11)?);
        let count = match head.u8(13)? {
            // NTFS writes large ones as a negative power of two.
            exponent @ 0xf4.. => 1 << (256 - u64::from(exponent)),
            count => u64::from(count),
        };
        let sensible = sector.is_power_of_two() && (512..=4096).contains(&sector);
        (sensible && count.is_power_of_two()).then(|| Self { sector, cluster: sector * count })
    }
}

pub(super) fn bitlocker(probe: &Probe<'_>) -> Option<Content> {
    let head = probe.head();
    // Vista's jump, which says nothing of metadata, and that of later ones.
    let vista = head.has(0, &[0xeb, 0x52, 0x90]);
    if !vista && !head.has(0, &[0xeb, 0x58, 0x90]) {
        return None;
    }
    let marked = head.has(3, b"-FVE-FS-");
    let metadata = |at: usize| {
        let at = head.le64(at).filter(|at| *at > 0)?;
        probe.read(at, 12).filter(|bytes| bytes.starts_with(b"-FVE-FS-"))
    };
    // On removable disks it looks like FAT, and only the place of its metadata tells.
    let found = match marked {
        true if vista => None,
        true => metadata(176),
        false => Some(head.has(3, b"MSWIN4.1").then(|| metadata(440))??),
    };
    let version = found.and_then(|bytes| Bytes(&bytes).le16(10));
    Some(Content {
        version: version.map(|version| version.to_string()),
        ..Content::new(Kind::Encrypted, "BitLocker")
    })
}

pub(super) fn ntfs(probe: &Probe<'_>) -> Option<Content> {
    let head = probe.head();
    if !head.has(3, b"NTFS    ") {
        return None;
    }
    let boot = Boot::decode(head)?;
    // The last sector holds a copy of the first.
    let size = head.le64(40)?.checked_add(1)?.checked_mul(boot.sector)?;
    probe.fits(size).then_some(())?;
    Some(Content {
        free: usage::ntfs(probe, boot.cluster, size),
        label: ntfs_label(probe, &boot),
        uuid: head.le64(72).map(|serial| format!("{serial:016X}")),
        size: Some(size),
        block_size: Some(boot.cluster),
        ..Content::new(Kind::Filesystem, "ntfs")
    })
}

/// The label is an attribute of record 3 of the master file table.
fn ntfs_label(probe: &Probe<'_>, boot: &Boot) -> Option<String> {
    const VOLUME_NAME: u32 = 0x60;
    const END: u32 = u32::MAX;
    let head = probe.head();
    let record = match head.u8(64)? {
        exponent @ 0x80.. => 1u64.checked_shl(256 - u32::from(exponent))?,
        clusters => u64::from(clusters).checked_mul(boot.cluster)?,
    };
    if !(512..=65536).contains(&record) {
        return None;
    }
    let table = head.le64(48)?.checked_mul(boot.cluster)?;
    let bytes = probe.read(table.checked_add(3 * record)?, record as usize)?;
    let bytes = Bytes(&bytes);
    bytes.has(0, b"FILE").then_some(())?;
    let mut at = usize::from(bytes.le16(20)?);
    loop {
        let (kind, len) = (bytes.le32(at)?, bytes.le32(at.checked_add(4)?)? as usize);
        if kind == END || len < 24 {
            return None;
        }
        if kind == VOLUME_NAME {
            // Small enough to end before the last bytes of a sector, which are stored elsewhere.
            let value = at.checked_add(bytes.le16(at + 20)?.into())?;
            return bytes.text16(value, bytes.le32(at + 16)? as usize);
        }
        at = at.checked_add(len)?;
    }
}

pub(super) fn exfat(probe: &Probe<'_>) -> Option<Content> {
    let head = probe.head();
    if !head.has(3, b"EXFAT   ") {
        return None;
    }
    let sector_shift = u32::from(head.u8(108).filter(|shift| (9..=12).contains(shift))?);
    let cluster_shift = u32::from(head.u8(109).filter(|shift| *shift <= 25)?);
    let cluster = 1u64 << sector_shift << cluster_shift;
    let size = head.le64(72)?.checked_mul(1 << sector_shift)?;
    probe.fits(size).then_some(())?;
    let label = || {
        let heap = u64::from(head.le32(88)?) << sector_shift;
        let root = u64::from(head.le32(96)?.checked_sub(2)?).checked_mul(cluster)?;
        let bytes = probe.read(heap.checked_add(root)?, cluster.min(64 << 10) as usize)?;
        let entry = bytes.chunks_exact(32).take_while(|e| e[0] != 0).find(|e| e[0] == 0x83)?;
        Bytes(entry).text16(2, usize::from(entry[1].min(11)) * 2)
    };
    let serial = head.le32(100)?;
    let (minor, major) = (head.u8(104)?, head.u8(105)?);
    Some(Content {
        version: Some(format!("{major}.{minor}")),
        free: usage::exfat(probe, sector_shift, cluster),
        label: label(),
        uuid: Some(serial_number(serial)),
        size: Some(size),
        block_size: Some(cluster),
        ..Content::new(Kind::Filesystem, "exfat")
    })
}

fn serial_number(serial: u32) -> String {
    format!("{:04X}-{:04X}", serial >> 16, serial & 0xffff)
}

pub(super) fn refs(probe: &Probe<'_>) -> Option<Content> {
    let head = probe.head();
    if !head.has(0, b"\0\0\0ReFS\0") {
        return None;
    }
    let size = head.le64(24)?.checked_mul(head.le32(32)?.into()).filter(|size| *size > 0);
    Some(Content { size, ..Content::new(Kind::Filesystem, "ReFS") })
}

/// FAT12, FAT16 and FAT32, with or without their name in the boot sector: what they are follows from
/// the number of clusters.
pub(super) fn fat(probe: &Probe<'_>) -> Option<Content> {
    let head = probe.head();
    let boot = fat_boot(head)?;
    probe.fits(boot.size).then_some(())?;
    let (version, extended) = match boot.clusters {
        ..4085 => ("FAT12", 36),
        4085..65525 => ("FAT16", 36),
        _ => ("FAT32", 64),
    };
    // After a mark: serial number, label.
    let signed = matches!(head.u8(extended + 2)?, 0x28 | 0x29);
    let serial = signed.then(|| head.le32(extended + 3)).flatten();
    let named = signed.then(|| head.text(extended + 7, 11)).flatten();
    let mut content = Content {
        version: Some(version.to_owned()),
        label: fat_root_label(probe, &boot).or(named.filter(|name| name != "NO NAME")),
        uuid: serial.map(serial_number),
        size: Some(boot.size),
        block_size: Some(boot.cluster),
        ..Content::new(Kind::Filesystem, "vfat")
    };
    content.free = match version {
        "FAT32" => fat32_free(probe, &boot),
        "FAT16" => free_clusters(probe, &boot, 16),
        _ => free_clusters(probe, &boot, 12),
    };
    Some(content)
}

struct FatBoot {
    size: u64,
    sector: u64,
    cluster: u64,
    clusters: u64,
    /// Where the tables, the root directory of FAT12 and FAT16, and the clusters begin.
    tables: u64,
    root: u64,
    data: u64,
    /// The first cluster of the root directory of FAT32.
    root_cluster: Option<u64>,
}

fn fat_boot(head: Bytes<'_>) -> Option<FatBoot> {
    let jump = matches!((head.u8(0)?, head.u8(2)?), (0xeb, 0x90) | (0xe9, _));
    let media = matches!(head.u8(21)?, 0xf0 | 0xf8..);
    let tables = u64::from(head.u8(16)?);
    if !head.has(510, &[0x55, 0xaa]) || !jump || !media || !(1..=2).contains(&tables) {
        return None;
    }
    let Boot { sector, cluster } = Boot::decode(head)?;
    let reserved = u64::from(head.le16(14)?);
    let either = |short: usize, long: usize| match head.le16(short)? {
        0 => head.le32(long).map(u64::from),
        count => Some(u64::from(count)),
    };
    let total = either(19, 32)?;
    let table_sectors = either(22, 36)?;
    let root_entries = u64::from(head.le16(17)?);
    let root = reserved + tables * table_sectors;
    let data = root + (root_entries * 32).div_ceil(sector);
    if reserved == 0 || table_sectors == 0 || data >= total {
        return None;
    }
    Some(FatBoot {
        size: total * sector,
        sector,
        cluster,
        clusters: (total - data) * sector / cluster,
        tables: reserved * sector,
        root: root * sector,
        data: data * sector,
        root_cluster: (root_entries == 0).then(|| head.le32(44).map(u64::from)).flatten(),
    })
}

/// Clusters of the root directory that are searched for the label.
const ROOT_CLUSTERS: usize = 64;

fn fat_root_label(probe: &Probe<'_>, boot: &FatBoot) -> Option<String> {
    let Some(mut cluster) = boot.root_cluster else {
        return fat_label(&probe.read(boot.root, (boot.data - boot.root).min(1 << 20) as usize)?).0;
    };
    for _ in 0..ROOT_CLUSTERS {
        let index = cluster.checked_sub(2).filter(|index| *index < boot.clusters)?;
        let at = boot.data + index * boot.cluster;
        let (label, ended) = fat_label(&probe.read(at, boot.cluster as usize)?);
        if label.is_some() || ended {
            return label;
        }
        let next = probe.read(boot.tables + cluster * 4, 4)?;
        cluster = u64::from(Bytes(&next).le32(0)? & 0x0fff_ffff);
    }
    None
}

/// The label among directory entries, and whether they end here.
fn fat_label(entries: &[u8]) -> (Option<String>, bool) {
    const LABEL: u8 = 0x08;
    const LONG_NAME: u8 = 0x0f;
    const DELETED: u8 = 0xe5;
    for entry in entries.chunks_exact(32) {
        match (entry[0], entry[11] & 0x3f) {
            (0, _) => return (None, true),
            (DELETED, _) | (_, LONG_NAME) => {}
            (_, kind) if kind & LABEL != 0 => return (Bytes(entry).text(0, 11), true),
            _ => {}
        }
    }
    (None, false)
}

/// Bytes of the clusters whose entries in the table of FAT12 or FAT16, of `bits` each, say that they are free.
/// The table has less than 128 KiB.
fn free_clusters(probe: &Probe<'_>, boot: &FatBoot, bits: u64) -> Option<u64> {
    let last = boot.clusters + 2;
    let table = probe.read(boot.tables, (last * bits).div_ceil(8) as usize)?;
    let table = Bytes(&table);
    let entry = |cluster: u64| match bits {
        16 => table.le16((cluster * 2) as usize),
        _ => {
            let at = (cluster * 12 / 8) as usize;
            let both = u16::from(table.u8(at)?) | u16::from(table.u8(at + 1)?) << 8;
            Some(both >> (cluster % 2 * 4) & 0xfff)
        }
    };
    let free = (2..last).filter(|cluster| entry(*cluster) == Some(0)).count() as u64;
    Some(free * boot.cluster)
}

/// What the information sector of FAT32 says to be free.
fn fat32_free(probe: &Probe<'_>, boot: &FatBoot) -> Option<u64> {
    let at = u64::from(probe.head().le16(48)?).checked_mul(boot.sector)?;
    let bytes = probe.read(at, 512)?;
    let bytes = Bytes(&bytes);
    let intact = bytes.has(0, b"RRaA") && bytes.has(484, b"rrAa");
    let free = bytes.le32(488).map(u64::from).filter(|free| intact && *free <= boot.clusters)?;
    Some(free * boot.cluster)
}
