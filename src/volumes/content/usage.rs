//! How much of NTFS and exFAT is free: neither says so, but by its bitmap of clusters.

use super::Probe;
use crate::volumes::bytes::Bytes;

/// How many of a volume's clusters its bitmap says to be in use. Bits behind the last cluster count for nothing,
/// and one bitmap is not counted that is longer than what may still be read for all volumes ([`Probe`]).
struct Bitmap {
    clusters: u64,
    seen: u64,
    used: u64,
}

/// Bytes of it that are read at once.
const BITMAP_STEP: u64 = 1 << 20;
/// Pieces of it.
const MAX_PIECES: usize = 4096;

impl Bitmap {
    fn of(probe: &Probe<'_>, clusters: u64) -> Option<Self> {
        let left = probe.budget.get().checked_sub(clusters.div_ceil(8))?;
        probe.budget.set(left);
        Some(Self { clusters, seen: 0, used: 0 })
    }

    /// Whether all of it was counted.
    fn done(&self) -> bool {
        self.seen >= self.clusters
    }

    /// Counts `len` bytes at `at` of the volume, as far as they belong to it.
    fn count(&mut self, probe: &Probe<'_>, at: u64, len: u64) -> Option<()> {
        let mut pos = 0;
        while pos < len && !self.done() {
            let step = BITMAP_STEP.min(len - pos).min((self.clusters - self.seen).div_ceil(8));
            for byte in probe.read(at.checked_add(pos)?, step as usize)? {
                let bits = (self.clusters - self.seen).min(8);
                let counts = if bits == 8 { byte } else { byte & ((1 << bits) - 1) };
                self.used += u64::from(counts.count_ones());
                self.seen += bits;
            }
            pos += step;
        }
        Some(())
    }
}

/// What the bitmap says to be free: the contents of file 6, which has one bit for each cluster.
pub(super) fn ntfs(probe: &Probe<'_>, cluster_size: u64, size: u64) -> Option<u64> {
    const DATA: u32 = 0x80;
    let record = ntfs_record(probe, cluster_size, 6)?;
    let record = Bytes(&record);
    let at = ntfs_attribute(record, DATA)?;
    // Only what is not resident has runs.
    (record.u8(at.checked_add(8)?)? == 1).then_some(())?;
    let mut bitmap = Bitmap::of(probe, size / cluster_size)?;
    let mut run = at.checked_add(record.le16(at + 32)?.into())?;
    let mut cluster = 0i64;
    for _ in 0..MAX_PIECES {
        let sizes = record.u8(run)?;
        if sizes == 0 || bitmap.done() {
            break;
        }
        let (lengths, places) = (usize::from(sizes & 15), usize::from(sizes >> 4));
        let signed = |at: usize, len: usize| {
            let bytes = record.get(at, len).filter(|bytes| (1..=8).contains(&bytes.len()))?;
            let sign = if bytes.last()? & 0x80 != 0 { -1i64 } else { 0 };
            Some(bytes.iter().rev().fold(sign, |value, byte| value << 8 | i64::from(*byte)))
        };
        let clusters = u64::try_from(signed(run + 1, lengths)?).ok()?;
        cluster = cluster.checked_add(signed(run + 1 + lengths, places)?)?;
        let at = u64::try_from(cluster).ok()?.checked_mul(cluster_size)?;
        bitmap.count(probe, at, clusters.checked_mul(cluster_size)?)?;
        run += 1 + lengths + places;
    }
    bitmap.done().then(|| (bitmap.clusters - bitmap.used) * cluster_size)
}

/// Where the first attribute of this type begins in a record of the master file table.
fn ntfs_attribute(record: Bytes<'_>, wanted: u32) -> Option<usize> {
    const END: u32 = u32::MAX;
    let mut at = usize::from(record.le16(20)?);
    loop {
        let (kind, len) = (record.le32(at)?, record.le32(at.checked_add(4)?)? as usize);
        if kind == wanted {
            return Some(at);
        }
        if kind == END || len < 24 {
            return None;
        }
        at = at.checked_add(len)?;
    }
}

/// The record of file `number` in the master file table, each sector's last bytes put back from where they are
/// kept.
fn ntfs_record(probe: &Probe<'_>, cluster_size: u64, number: u64) -> Option<Vec<u8>> {
    const SECTOR: usize = 512;
    let head = probe.head();
    let len = match head.u8(64)? {
        exponent @ 0x80.. => 1u64.checked_shl(256 - u32::from(exponent))?,
        clusters => u64::from(clusters).checked_mul(cluster_size)?,
    };
    (512..=65536).contains(&len).then_some(())?;
    let table = head.le64(48)?.checked_mul(cluster_size)?;
    let mut record = probe.read(table.checked_add(number.checked_mul(len)?)?, len as usize)?;
    let bytes = Bytes(&record);
    bytes.has(0, b"FILE").then_some(())?;
    let kept = usize::from(bytes.le16(4)?);
    let mark: [u8; 2] = bytes.array(kept)?;
    for sector in 0..record.len() / SECTOR {
        let end = sector * SECTOR + SECTOR - 2;
        let bytes = Bytes(&record);
        let whole = bytes.array::<2>(end)? == mark;
        let put: [u8; 2] = bytes.array(kept + 2 + 2 * sector)?;
        whole.then_some(())?;
        record[end..end + 2].copy_from_slice(&put);
    }
    Some(record)
}

/// What the bitmap of exFAT says to be free. The root directory names it; formatting lays it in one piece, and
/// nothing moves it.
pub(super) fn exfat(probe: &Probe<'_>, sector_shift: u32, cluster_size: u64) -> Option<u64> {
    const BITMAP: u8 = 0x81;
    let head = probe.head();
    let heap = u64::from(head.le32(88)?) << sector_shift;
    let place = |number: u32| {
        u64::from(number.checked_sub(2)?).checked_mul(cluster_size)?.checked_add(heap)
    };
    let root = probe.read(place(head.le32(96)?)?, cluster_size.min(64 << 10) as usize)?;
    let mut entries = root.chunks_exact(32).take_while(|entry| entry[0] != 0);
    let entry = Bytes(entries.find(|entry| entry[0] == BITMAP)?);
    let mut bitmap = Bitmap::of(probe, u64::from(head.le32(92)?))?;
    bitmap.count(probe, place(entry.le32(20)?)?, entry.le64(24)?)?;
    bitmap.done().then(|| (bitmap.clusters - bitmap.used) * cluster_size)
}
