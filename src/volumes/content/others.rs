//! File systems of optical discs, Apple and VMware.

use super::{Content, Kind, Probe};
use crate::volumes::bytes::Bytes;

/// Bytes of a sector of a disc.
const DISC_SECTOR: u64 = 2048;

/// UDF is told by its marks among the volume descriptors, beside those of ISO 9660 or alone.
pub(super) fn udf(probe: &Probe<'_>) -> Option<Content> {
    let mut begun = false;
    for sector in 16..32 {
        let descriptor = probe.read(sector * DISC_SECTOR, 8)?;
        match descriptor.get(1..6)? {
            b"BEA01" => begun = true,
            b"NSR02" | b"NSR03" if begun => {
                return Some(Content::new(Kind::Filesystem, "udf"));
            }
            b"CD001" | b"BOOT2" => {}
            _ => return None,
        }
    }
    None
}

pub(super) fn iso9660(probe: &Probe<'_>) -> Option<Content> {
    let sector = probe.head().get(0x8000, DISC_SECTOR as usize)?;
    let sector = Bytes(sector);
    if !sector.has(0, b"\x01CD001") {
        return None;
    }
    let block_size = u64::from(sector.le16(0x80)?);
    let size = u64::from(sector.le32(0x50)?).checked_mul(block_size)?;
    probe.fits(size).then_some(())?;
    Some(Content {
        label: sector.text(0x28, 32),
        uuid: disc_date(sector, 830).or_else(|| disc_date(sector, 813)),
        size: Some(size),
        block_size: Some(block_size),
        ..Content::new(Kind::Filesystem, "iso9660")
    })
}

/// The time of the last change, which stands for an id.
fn disc_date(sector: Bytes<'_>, at: usize) -> Option<String> {
    let digits = sector.get(at, 16)?;
    let digits = std::str::from_utf8(digits).ok().filter(|text| {
        text.bytes().all(|byte| byte.is_ascii_digit()) && text.bytes().any(|byte| byte != b'0')
    })?;
    let parts = [0..4, 4..6, 6..8, 8..10, 10..12, 12..14, 14..16].map(|range| digits.get(range));
    Some(parts.into_iter().flatten().collect::<Vec<_>>().join("-"))
}

pub(super) fn apfs(probe: &Probe<'_>) -> Option<Content> {
    let head = probe.head();
    if !head.has(32, b"NXSB") {
        return None;
    }
    let block_size = u64::from(head.le32(36)?);
    let size = head.le64(40)?.checked_mul(block_size)?;
    (block_size.is_power_of_two() && probe.fits(size)).then_some(())?;
    Some(Content {
        uuid: head.uuid(72),
        size: Some(size),
        block_size: Some(block_size),
        ..Content::new(Kind::Filesystem, "apfs")
    })
}

/// HFS+ and HFSX, also inside the wrapper that old firmware wants.
pub(super) fn hfs_plus(probe: &Probe<'_>) -> Option<Content> {
    const AT: usize = 1024;
    let head = probe.head();
    let plus = |magic: &[u8]| matches!(magic, b"H+" | b"HX");
    if head.has(AT, b"BD") {
        return plus(head.get(AT + 124, 2)?).then(|| Content::new(Kind::Filesystem, "hfsplus"));
    }
    if !plus(head.get(AT, 2)?) {
        return None;
    }
    let block_size = u64::from(head.be32(AT + 40)?);
    let size = u64::from(head.be32(AT + 44)?).checked_mul(block_size)?;
    (block_size.is_power_of_two() && probe.fits(size)).then_some(())?;
    Some(Content {
        size: Some(size),
        block_size: Some(block_size),
        free: u64::from(head.be32(AT + 48)?).checked_mul(block_size).filter(|free| *free <= size),
        ..Content::new(Kind::Filesystem, "hfsplus")
    })
}

pub(super) fn hfs(probe: &Probe<'_>) -> Option<Content> {
    const AT: usize = 1024;
    let head = probe.head();
    if !head.has(AT, b"BD") {
        return None;
    }
    let block_size = u64::from(head.be32(AT + 20)?);
    let size = u64::from(head.be16(AT + 18)?).checked_mul(block_size)?;
    (block_size > 0 && block_size.is_multiple_of(512) && probe.fits(size)).then_some(())?;
    let label = usize::from(head.u8(AT + 36)?.min(27));
    Some(Content {
        label: head.text(AT + 37, label),
        size: Some(size),
        block_size: Some(block_size),
        ..Content::new(Kind::Filesystem, "hfs")
    })
}

pub(super) fn vmfs(probe: &Probe<'_>) -> Option<Content> {
    let bytes = probe.read(0x20_0000, 512)?;
    let bytes = Bytes(&bytes);
    if !bytes.has(0, &[0x5e, 0xf1, 0xab, 0x2f]) {
        return None;
    }
    Some(Content { label: bytes.text(0x1d, 128), ..Content::new(Kind::Filesystem, "VMFS") })
}

pub(super) fn vmfs_member(probe: &Probe<'_>) -> Option<Content> {
    let bytes = probe.read(0x10_0000, 4)?;
    let magic = Bytes(&bytes).has(0, &[0x0d, 0xd0, 0x01, 0xc0]);
    magic.then(|| Content::new(Kind::Container, "VMFS_volume_member"))
}
