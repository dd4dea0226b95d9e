//! Moving the second copy of a GPT to the end of a disk that became larger, or is about to become smaller.
//!
//! # Order
//!
//! The second copy, entries and header, at the new end; then the first header, which names it, in one
//! sector; then the size in the protective MBR; then the old copy is zeroed. Each is durable before the
//! next begins, so that one intact copy is there at any moment.

use crate::disk::Disk;
use crate::error::{Error, Result};

use super::gpt::crc32;

const MAGIC: &[u8; 8] = b"EFI PART";
/// Entries that are moved at most, in bytes.
const MAX_ARRAY: u64 = 4 << 20;
/// The largest number that an MBR can tell of sectors.
const MBR_MAX: u64 = u32::MAX as u64;

/// A GPT whose first copy is intact.
#[derive(Debug)]
pub struct Primary {
    /// Bytes of a sector, as the table counts.
    sector: u64,
    /// The header, all of its sector.
    header: Vec<u8>,
    /// All entries.
    entries: Vec<u8>,
}

impl Primary {
    /// The first copy of the disk's GPT, if it is intact. Only that can be moved by.
    ///
    /// # Errors
    ///
    /// Those of reading the disk.
    pub fn read(disk: &Disk) -> Result<Option<Self>> {
        for sector in [512, 4096] {
            if disk.size() < sector * 6 {
                continue;
            }
            let mut header = vec![0; sector as usize];
            disk.read_at(sector, &mut header)?;
            if let Some(primary) = Self::decode(disk, sector, header)? {
                return Ok(Some(primary));
            }
        }
        Ok(None)
    }

    fn decode(disk: &Disk, sector: u64, header: Vec<u8>) -> Result<Option<Self>> {
        let len = le32(&header, 12) as usize;
        if !header.starts_with(MAGIC) || !(92..=header.len()).contains(&len) {
            return Ok(None);
        }
        let mut sealed = header.clone();
        seal(&mut sealed);
        let size = u64::from(le32(&header, 80)) * u64::from(le32(&header, 84));
        let at = le64(&header, 72).checked_mul(sector);
        let inside = at.and_then(|at| at.checked_add(size)).is_some_and(|end| end <= disk.size());
        let entry = le32(&header, 84);
        let bounded = (128..=4096).contains(&entry) && (1..=MAX_ARRAY).contains(&size);
        if sealed != header || le64(&header, 24) != 1 || !inside || !bounded {
            return Ok(None);
        }
        let mut entries = vec![0; size as usize];
        disk.read_at(at.unwrap_or(0), &mut entries)?;
        let intact = crc32(&entries) == le32(&header, 88);
        Ok(intact.then_some(Self { sector, header, entries }))
    }

    /// Bytes that the second copy takes at the end of the disk.
    pub fn copy_len(&self) -> u64 {
        self.array_sectors() * self.sector + self.sector
    }

    fn array_sectors(&self) -> u64 {
        (self.entries.len() as u64).div_ceil(self.sector)
    }

    /// Whether the second copy is at the end of a disk of `size` bytes, as far as the first one says.
    pub fn is_at_end(&self, size: u64) -> bool {
        le64(&self.header, 32) == size / self.sector - 1
    }

    /// Where the last partition ends, in bytes.
    pub fn used_end(&self) -> u64 {
        let entry = le32(&self.header, 84) as usize;
        let used = self.entries.chunks_exact(entry).filter(|entry| entry[..16] != [0; 16]);
        let ends = used.map(|entry| le64(entry, 40).saturating_add(1).saturating_mul(self.sector));
        ends.max().unwrap_or_else(|| le64(&self.header, 40).saturating_mul(self.sector))
    }

    /// Puts the second copy at the end of the first `size` bytes of the disk; durable on return.
    ///
    /// # Errors
    ///
    /// Those of writing to the disk; [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) if partitions lie in the way.
    pub fn move_copy(&self, disk: &Disk, size: u64) -> Result<()> {
        let last = (size / self.sector).saturating_sub(1);
        let array = last.saturating_sub(self.array_sectors());
        if !size.is_multiple_of(self.sector) || self.used_end() > array * self.sector {
            let what = "a partition lies where the second copy of the partition table belongs";
            return Err(Error::invalid(what));
        }
        let old = le64(&self.header, 32);
        let mut primary = self.header.clone();
        primary[32..40].copy_from_slice(&last.to_le_bytes());
        primary[48..56].copy_from_slice(&(array - 1).to_le_bytes());
        seal(&mut primary);
        let mut copy = primary.clone();
        copy[24..32].copy_from_slice(&last.to_le_bytes());
        copy[32..40].copy_from_slice(&1u64.to_le_bytes());
        copy[72..80].copy_from_slice(&array.to_le_bytes());
        seal(&mut copy);
        let mut entries = self.entries.clone();
        entries.resize((self.array_sectors() * self.sector) as usize, 0);
        disk.write_at(array * self.sector, &entries)?;
        disk.write_at(last * self.sector, &copy)?;
        disk.flush()?;
        disk.write_at(self.sector, &primary)?;
        disk.flush()?;
        self.put_protective(disk, last)?;
        let unused = old > last || old < array;
        if old != last && unused && old > 1 {
            self.forget(disk, old)?;
        }
        disk.flush()
    }

    /// Makes the protective MBR, if it is nothing else, cover the disk up to sector `last`.
    fn put_protective(&self, disk: &Disk, last: u64) -> Result<()> {
        let mut mbr = vec![0; self.sector as usize];
        disk.read_at(0, &mut mbr)?;
        let entries = || (446..510).step_by(16);
        let protective = |at: &usize| mbr[*at + 4] == 0xee && le32(&mbr, *at + 8) == 1;
        let lone = entries().filter(|at| mbr[*at + 4] != 0).count() == 1;
        if let (true, Some(at)) =
            (lone && mbr[510..512] == [0x55, 0xaa], entries().find(protective))
        {
            // Larger disks than that are told by the largest number.
            let sectors = last.min(MBR_MAX) as u32;
            mbr[at + 12..at + 16].copy_from_slice(&sectors.to_le_bytes());
            disk.write_at(0, &mbr)?;
            disk.flush()?;
        }
        Ok(())
    }

    /// Zeroes the old second header, if one of the same table is in sector `at`.
    fn forget(&self, disk: &Disk, at: u64) -> Result<()> {
        let Some(at) = at.checked_mul(self.sector) else { return Ok(()) };
        // Where a partition lies, the guest's data does.
        if at.checked_add(self.sector).is_none_or(|end| end > disk.size()) || at < self.used_end() {
            return Ok(());
        }
        let mut found = vec![0; self.sector as usize];
        disk.read_at(at, &mut found)?;
        if found.starts_with(MAGIC) && found[56..72] == self.header[56..72] {
            disk.write_at(at, &vec![0; self.sector as usize])?;
        }
        Ok(())
    }
}

/// Makes the checksum of a header fit. Its length was checked.
fn seal(header: &mut [u8]) {
    let len = (le32(header, 12) as usize).min(header.len());
    header[16..20].fill(0);
    let sum = crc32(&header[..len]);
    header[16..20].copy_from_slice(&sum.to_le_bytes());
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..at + 4).and_then(|field| field.try_into().ok());
    field.map_or(0, u32::from_le_bytes)
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..at + 8).and_then(|field| field.try_into().ok());
    field.map_or(0, u64::from_le_bytes)
}
