//! Giving a child another parent.
//!
//! An embedded descriptor is several sectors, so it is not overwritten. The new one goes to the end of
//! the descriptor's area, and the header, one sector, leads to the old or the new. Then, the same way,
//! it moves to the front, where other programs look.

use std::ops::Range;
use std::sync::Arc;

use super::child::hint;
use super::layout::{FLAG_COMPRESSED, Header, SECTOR};
use super::link::find_descriptor;
use crate::codec;
use crate::disk::sync_file;
use crate::error::{Error, Result};
use crate::formats::{Identity, NewLink, OpenContext};
use crate::storage::Storage;

/// Byte of the sparse header where the descriptor's first sector and number of sectors stand.
const DESCRIPTOR_PLACE: usize = 28;

/// Points the child in `file` at another parent.
pub fn relink(file: Arc<dyn Storage>, ctx: &OpenContext, link: &NewLink<'_>) -> Result<()> {
    let Identity::VmdkCid(cid) = *link.identity else {
        return Err(Error::invalid("the parent of a VMDK must be a VMDK"));
    };
    let found = find_descriptor(&file)?.file;
    let descriptor = &found.descriptor;
    if descriptor.parent_cid()?.is_none() {
        return Err(Error::invalid("the image is no child: it has no parent"));
    }
    if descriptor.ambiguous {
        return Err(Error::corrupt("not written: the descriptor sets a key twice"));
    }
    let text = descriptor.with_parent(cid, &hint(file.path(), link.parent)?)?;
    if found.at == 0 {
        return ctx.host().replace(file.path(), &text);
    }
    let area = Area::read(&*file, descriptor.text().len())?;
    area.change(&*file, &text)
}

/// The part of a sparse file that belongs to its descriptor. All numbers are sectors.
struct Area {
    /// All of it.
    all: Range<u64>,
    /// What the present text takes.
    used: Range<u64>,
}

impl Area {
    fn read(file: &dyn Storage, text: usize) -> Result<Self> {
        let header = Header::read(file, 0)?;
        if header.flags & FLAG_COMPRESSED != 0 {
            return Err(Error::unsupported("a stream-optimised image cannot be changed"));
        }
        let tables = [header.rgd, header.gd, header.overhead].into_iter().filter(|at| *at > 0);
        let end =
            (header.descriptor_at + header.descriptor_len).min(tables.min().unwrap_or(u64::MAX));
        let len = (text as u64).div_ceil(SECTOR);
        Ok(Self { all: 1..end, used: header.descriptor_at..header.descriptor_at + len })
    }

    /// Replaces the present text by `text`.
    fn change(&self, file: &dyn Storage, text: &[u8]) -> Result<()> {
        let len = (text.len() as u64).div_ceil(SECTOR);
        let mut used = self.used.clone();
        if used.start < 1 + len {
            let start = self.all.end.saturating_sub(len);
            if start < used.end.max(1 + len) {
                let what = "the descriptor has no room to be changed without risk";
                return Err(Error::unsupported(what).in_file(file.path()));
            }
            place(file, text, start..self.all.end)?;
            lead_to(file, start..self.all.end)?;
            used = start..self.all.end;
        }
        place(file, text, 1..used.start)?;
        lead_to(file, self.all.clone())?;
        place(file, &[], used)
    }
}

/// Writes `text` at the beginning of `sectors` and zeroes behind it, durably.
fn place(file: &dyn Storage, text: &[u8], sectors: Range<u64>) -> Result<()> {
    let mut bytes = text.to_vec();
    bytes.resize(((sectors.end - sectors.start) * SECTOR) as usize, 0);
    codec::write_all(file, sectors.start * SECTOR, &bytes, "the descriptor")?;
    sync_file(file)
}

/// Makes the header lead to a descriptor in `sectors`, durably.
fn lead_to(file: &dyn Storage, sectors: Range<u64>) -> Result<()> {
    let mut header: [u8; SECTOR as usize] = codec::read_array(file, 0, "the sparse header")?;
    let place = [sectors.start, sectors.end - sectors.start].map(u64::to_le_bytes).concat();
    header[DESCRIPTOR_PLACE..DESCRIPTOR_PLACE + place.len()].copy_from_slice(&place);
    codec::write_all(file, 0, &header, "the sparse header")?;
    sync_file(file)
}
