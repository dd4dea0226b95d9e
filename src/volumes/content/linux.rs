//! File systems of Linux beside ext.

use super::{Content, Kind, Probe};

/// Whether a block size is one that exists.
fn sensible(block_size: u64) -> bool {
    block_size.is_power_of_two() && (512..=65536).contains(&block_size)
}

pub(super) fn xfs(probe: &Probe<'_>) -> Option<Content> {
    let head = probe.head();
    if !head.has(0, b"XFSB") {
        return None;
    }
    let block_size = u64::from(head.be32(4)?);
    let size = head.be64(8)?.checked_mul(block_size)?;
    if !sensible(block_size) || !probe.fits(size) {
        return None;
    }
    Some(Content {
        label: head.text(108, 12),
        uuid: head.uuid(32),
        size: Some(size),
        block_size: Some(block_size),
        free: head.be64(144)?.checked_mul(block_size).filter(|free| *free <= size),
        ..Content::new(Kind::Filesystem, "xfs")
    })
}

pub(super) fn btrfs(probe: &Probe<'_>) -> Option<Content> {
    const AT: usize = 0x10000;
    let head = probe.head();
    if !head.has(AT + 0x40, b"_BHRfS_M") {
        return None;
    }
    let size = head.le64(AT + 0x70)?;
    let mut content = Content {
        label: head.text(AT + 0x12b, 256),
        uuid: head.uuid(AT + 0x20),
        size: Some(size),
        block_size: Some(head.le32(AT + 0x90)?.into()),
        free: size.checked_sub(head.le64(AT + 0x78)?),
        ..Content::new(Kind::Filesystem, "btrfs")
    };
    let devices = head.le64(AT + 0x88)?;
    if devices > 1 {
        content.warnings.push(format!("one of the {devices} devices of its file system"));
        // Those of all devices.
        (content.size, content.free) = (None, None);
    }
    Some(content)
}

pub(super) fn f2fs(probe: &Probe<'_>) -> Option<Content> {
    const AT: usize = 1024;
    let head = probe.head();
    if head.le32(AT)? != 0xf2f5_2010 {
        return None;
    }
    let block_size = 1u64.checked_shl(head.le32(AT + 16)?).filter(|size| sensible(*size))?;
    let size = head.le64(AT + 36)?.checked_mul(block_size)?;
    probe.fits(size).then_some(())?;
    Some(Content {
        version: Some(format!("{}.{}", head.le16(AT + 4)?, head.le16(AT + 6)?)),
        label: head.text16(AT + 124, 1024),
        uuid: head.uuid(AT + 108),
        size: Some(size),
        block_size: Some(block_size),
        ..Content::new(Kind::Filesystem, "f2fs")
    })
}

pub(super) fn erofs(probe: &Probe<'_>) -> Option<Content> {
    const AT: usize = 1024;
    let head = probe.head();
    if head.le32(AT)? != 0xe0f5_e1e2 {
        return None;
    }
    let block_size = 1u64.checked_shl(head.u8(AT + 12)?.into()).filter(|size| sensible(*size))?;
    let size = u64::from(head.le32(AT + 36)?).checked_mul(block_size)?;
    probe.fits(size).then_some(())?;
    Some(Content {
        label: head.text(AT + 64, 16),
        uuid: head.uuid(AT + 48),
        size: Some(size),
        block_size: Some(block_size),
        ..Content::new(Kind::Filesystem, "erofs")
    })
}

pub(super) fn squashfs(probe: &Probe<'_>) -> Option<Content> {
    let head = probe.head();
    if !head.has(0, b"hsqs") {
        return None;
    }
    let size = head.le64(40)?;
    probe.fits(size).then_some(())?;
    Some(Content {
        version: Some(format!("{}.{}", head.le16(28)?, head.le16(30)?)),
        size: Some(size),
        block_size: Some(head.le32(12)?.into()),
        ..Content::new(Kind::Filesystem, "squashfs")
    })
}
