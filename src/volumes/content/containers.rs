//! What holds volumes, or memory, rather than files: encryption, volume groups, RAID, pools, swap.

use super::{Content, Kind, Probe};
use crate::volumes::bytes::Bytes;

pub(super) fn luks(probe: &Probe<'_>) -> Option<Content> {
    let head = probe.head();
    if !head.has(0, b"LUKS\xba\xbe") {
        return None;
    }
    let version = head.be16(6).filter(|version| (1..=2).contains(version))?;
    Some(Content {
        version: Some(version.to_string()),
        label: if version == 2 { head.text(24, 48) } else { None },
        uuid: head.text(168, 40),
        ..Content::new(Kind::Encrypted, "crypto_LUKS")
    })
}

/// A physical volume of LVM. The checksum's polynomial is that of CRC-32, its start is LVM's own.
pub(super) fn lvm(probe: &Probe<'_>) -> Option<Content> {
    for sector in 0..4u64 {
        let label = Bytes(probe.head().get(sector as usize * 512, 512)?);
        if !label.has(0, b"LABELONE") || !label.has(24, b"LVM2 001") {
            continue;
        }
        if label.le64(8)? != sector || label.le32(16)? != lvm_crc(label.get(20, 492)?) {
            continue;
        }
        // The physical volume's header: its id, then the size of the device.
        let header = usize::try_from(label.le32(20)?).ok()?;
        let id = label.text(header, 32).filter(|id| id.len() == 32 && id.is_ascii())?;
        let mut uuid = String::new();
        for (at, c) in id.chars().enumerate() {
            if matches!(at, 6 | 10 | 14 | 18 | 22 | 26) {
                uuid.push('-');
            }
            uuid.push(c);
        }
        return Some(Content {
            version: Some("LVM2 001".to_owned()),
            uuid: Some(uuid),
            size: label.le64(header.checked_add(32)?),
            ..Content::new(Kind::Container, "LVM2_member")
        });
    }
    None
}

fn lvm_crc(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0xf597_a6cf, |crc: u32, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 }
        })
    })
}

/// A member of a Linux RAID: the superblock of version 0.90 or 1.0 is near the end, of 1.1 at the
/// start, of 1.2 at 4 KiB.
pub(super) fn md(probe: &Probe<'_>) -> Option<Content> {
    const MAGIC: u32 = 0xa92b_4efc;
    let size = probe.size();
    let near_end = (size & !0xfff).checked_sub(0x2000);
    for (at, version) in [(near_end, "1.0"), (Some(0), "1.1"), (Some(4096), "1.2")] {
        let Some(at) = at else { continue };
        let Some(bytes) = probe.read(at, 256) else { continue };
        let bytes = Bytes(&bytes);
        if bytes.le32(0)? != MAGIC || bytes.le32(4)? != 1 || bytes.le64(144)? != at / 512 {
            continue;
        }
        return Some(Content {
            version: Some(version.to_owned()),
            label: bytes.text(32, 32),
            uuid: bytes.uuid(16),
            size: bytes.le64(136)?.checked_mul(512),
            ..Content::new(Kind::Container, "linux_raid_member")
        });
    }
    let old = (size & !0xffff).checked_sub(0x10000)?;
    let bytes = probe.read(old, 64)?;
    let bytes = Bytes(&bytes);
    if bytes.le32(0)? != MAGIC || bytes.le32(4)? != 0 {
        return None;
    }
    let mut id = [0; 16];
    for (word, at) in id.chunks_exact_mut(4).zip([20, 52, 56, 60]) {
        word.copy_from_slice(&bytes.le32(at)?.to_be_bytes());
    }
    Some(Content {
        version: Some(format!("{}.{}.{}", bytes.le32(4)?, bytes.le32(8)?, bytes.le32(12)?)),
        uuid: Some(uuid::Uuid::from_bytes(id).to_string()),
        size: u64::from(bytes.le32(32)?).checked_mul(1024),
        ..Content::new(Kind::Container, "linux_raid_member")
    })
}

/// A device of a ZFS pool: several of the uberblocks of one of its four labels are there.
pub(super) fn zfs(probe: &Probe<'_>) -> Option<Content> {
    const LABEL: u64 = 256 << 10;
    const MAGIC: u64 = 0x00ba_b10c;
    let end = probe.size() & !(LABEL - 1);
    let labels = [Some(0), Some(LABEL), end.checked_sub(2 * LABEL), end.checked_sub(LABEL)];
    for at in labels.into_iter().flatten() {
        let Some(ring) = probe.read(at + LABEL / 2, LABEL as usize / 2) else { continue };
        let is_one = |slot: &&[u8]| {
            let slot = Bytes(slot);
            slot.le64(0) == Some(MAGIC) || slot.be64(0) == Some(MAGIC)
        };
        if ring.chunks_exact(1024).filter(is_one).count() >= 4 {
            return Some(Content::new(Kind::Container, "zfs_member"));
        }
    }
    None
}

pub(super) fn swap(probe: &Probe<'_>) -> Option<Content> {
    let head = probe.head();
    for page in [4096u64, 8192, 16384, 32768, 65536] {
        let mark = Bytes(head.get(page as usize - 10, 10).unwrap_or_default());
        if mark.has(0, b"SWAPSPACE2") || mark.has(0, b"S1SUSPEND\0") {
            // Of a hibernated system the header tells as much.
            let hibernated = mark.has(0, b"S1");
            let size = u64::from(head.le32(1028)?).checked_add(1)?.checked_mul(page)?;
            let mut content = Content {
                version: Some(head.le32(1024)?.to_string()),
                label: head.text(1052, 16),
                uuid: head.uuid(1036),
                size: Some(size),
                block_size: Some(page),
                ..Content::new(Kind::Swap, if hibernated { "swsuspend" } else { "swap" })
            };
            if hibernated {
                content.warnings.push("it holds the memory of a hibernated system".to_owned());
            }
            return Some(content);
        }
        if mark.has(0, b"SWAP-SPACE") {
            return Some(Content {
                version: Some("0".to_owned()),
                ..Content::new(Kind::Swap, "swap")
            });
        }
    }
    None
}
