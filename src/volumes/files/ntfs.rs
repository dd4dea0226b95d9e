//! NTFS, by the crate `ntfs` but for directories ([`index`]), and what that one leaves to its callers: what is compressed, encrypted
//! or stored elsewhere is refused rather than read as it lies there, and bytes behind the initialized
//! size of a file are zeroes, whatever their clusters hold.

use std::io::{Read, Seek, SeekFrom};
use std::num::NonZeroU64;
use std::ops::ControlFlow;
use std::sync::Arc;

use ntfs::structured_values::{NtfsFileAttributeFlags, NtfsVolumeFlags};
use ntfs::{Ntfs, NtfsAttribute, NtfsAttributeFlags, NtfsError, NtfsFile, NtfsReadSeek};

use super::ntfs_index::{self as index, Name};
use super::throttle::{Budget, METADATA, Throttled};
use super::{Entry, FileKind, FileSystem, MAX_ENTRIES, Sink, names, not_found, past_end, shown};
use crate::disk::Disk;
use crate::disk::window::Window;
use crate::error::{Error, Result};
use crate::volumes::bytes::Bytes;

/// Files below this number are the file system's own.
const FIRST_FILE: u64 = 16;
const LOG_FILE: u64 = 2;
const UPPER_CASE: u64 = 10;
/// What is read at once.
const CHUNK: u64 = 1 << 20;
/// Longest file with holes.
const MAX_SPARSE: u64 = 16 << 40;
/// Where an attribute's header has the initialized size.
const INITIALIZED: u64 = 0x38;

pub(super) struct Volume {
    ntfs: Ntfs,
    fs: Throttled,
    volume: Window<Arc<Disk>>,
    budget: Budget,
    warnings: Vec<String>,
    /// The capital of every UTF-16 unit.
    upper: Vec<u16>,
    /// The file that a part was read of, by its path and number.
    last: Option<(Vec<u8>, u64)>,
}

/// Reads the table of capitals, which is the file system's own.
fn upper_case(ntfs: &Ntfs, fs: &mut Throttled) -> Result<Vec<u16>> {
    const UNITS: usize = 1 << 16;
    let damaged = || Error::corrupt("the file system is damaged: no table of capitals");
    let file = ntfs.file(fs, UPPER_CASE).map_err(failed)?;
    let item = file.data(fs, "").ok_or_else(damaged)?.map_err(failed)?;
    let attribute = item.to_attribute().map_err(failed)?;
    let mut bytes = vec![0; UNITS * 2];
    if attribute.value_length() != bytes.len() as u64 {
        return Err(damaged());
    }
    fill(&mut attribute.value(fs).map_err(failed)?, fs, &mut bytes)?;
    Ok(bytes.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]])).collect())
}

pub(super) fn failed(e: NtfsError) -> Error {
    Error::corrupt(format!("the file system is damaged: {e}"))
}

impl Volume {
    pub fn open(volume: Window<Arc<Disk>>) -> Result<Self> {
        let budget = Budget::default();
        let mut fs = Throttled::new(volume.clone(), &budget);
        let ntfs = Ntfs::new(&mut fs).map_err(failed)?;
        let upper = upper_case(&ntfs, &mut fs)?;
        let mut warnings = Vec::new();
        let dirty = |flags: NtfsVolumeFlags| flags.contains(NtfsVolumeFlags::IS_DIRTY);
        if ntfs.volume_info(&mut fs).is_ok_and(|info| dirty(info.flags())) {
            warnings.push("it is marked as one to be checked by chkdsk".to_owned());
        }
        if log_waits(&ntfs, &mut fs).unwrap_or(false) {
            let text = "its journal waits to be replayed: what was written last is not seen";
            warnings.push(text.to_owned());
        }
        Ok(Self { ntfs, fs, volume, budget, warnings, upper, last: None })
    }
}

/// Whether the journal's restart page says that the volume was not closed.
fn log_waits(ntfs: &Ntfs, fs: &mut Throttled) -> Option<bool> {
    const CLEAN: u16 = 2;
    const NOBODY: u16 = 0xffff;
    let file = ntfs.file(fs, LOG_FILE).ok()?;
    let item = file.data(fs, "")?.ok()?;
    let mut page = [0; 256];
    item.to_attribute().ok()?.value(fs).ok()?.attach(fs).read_exact(&mut page).ok()?;
    let page = Bytes(&page);
    if !page.has(0, b"RSTR") {
        return Some(false);
    }
    let area = usize::from(page.le16(0x18)?);
    Some(page.le16(area + 0xc)? != NOBODY && page.le16(area + 0xe)? & CLEAN == 0)
}

/// The file that a path leads to.
fn find<'n>(
    ntfs: &'n Ntfs,
    fs: &mut Throttled,
    upper: &[u16],
    path: &[u8],
) -> Result<NtfsFile<'n>> {
    let mut file = ntfs.root_directory(fs).map_err(failed)?;
    for name in names(path) {
        let name = std::str::from_utf8(name).map_err(|_| not_found(path))?;
        if !file.is_directory() {
            return Err(not_found(path));
        }
        let number = child(fs, &file, upper, name)?.ok_or_else(|| not_found(path))?;
        file = ntfs.file(fs, number).map_err(failed)?;
    }
    Ok(file)
}

/// The file with this name in a directory. Upper and lower case are one, unless there are names that differ in
/// nothing else.
fn child(
    fs: &mut Throttled,
    directory: &NtfsFile<'_>,
    upper: &[u16],
    name: &str,
) -> Result<Option<u64>> {
    let wanted: Vec<_> = name.encode_utf16().collect();
    let capital = |unit: &u16| upper.get(usize::from(*unit)).copied();
    let mut found = None;
    index::each(directory, fs, &mut |name| {
        if name.units == wanted {
            found = Some(name.file);
            return ControlFlow::Break(());
        }
        if name.units.iter().map(capital).eq(wanted.iter().map(capital)) {
            found.get_or_insert(name.file);
        }
        ControlFlow::Continue(())
    })?;
    Ok(found)
}

/// Seconds since 1970 of a time since 1601 in units of 100 ns.
fn seconds(time: u64) -> i64 {
    (time / 10_000_000).cast_signed() - 11_644_473_600
}

fn kind(directory: bool, attributes: NtfsFileAttributeFlags) -> FileKind {
    match (attributes.contains(NtfsFileAttributeFlags::REPARSE_POINT), directory) {
        // Links, and files that Windows keeps elsewhere.
        (true, _) => FileKind::Special,
        (_, true) => FileKind::Directory,
        _ => FileKind::File,
    }
}

fn entry(name: &Name) -> Entry {
    let attributes = NtfsFileAttributeFlags::from_bits_truncate(name.attributes);
    Entry {
        name: String::from_utf16_lossy(&name.units).into_bytes(),
        kind: kind(name.directory, attributes),
        size: if name.directory { 0 } else { name.size },
        modified: Some(seconds(name.modified)),
        mode: None,
    }
}

impl FileSystem for Volume {
    fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn stat(&mut self, path: &[u8]) -> Result<Entry> {
        self.budget.renew(METADATA);
        let fs = &mut self.fs;
        let file = find(&self.ntfs, fs, &self.upper, path)?;
        let info = file.info().map_err(failed)?;
        let size = match file.data(fs, "") {
            Some(item) => {
                item.and_then(|item| Ok(item.to_attribute()?.value_length())).map_err(failed)?
            }
            None => 0,
        };
        Ok(Entry {
            name: names(path).last().map(|name| name.to_vec()).unwrap_or_default(),
            kind: kind(file.is_directory(), info.file_attributes()),
            size,
            modified: Some(seconds(info.modification_time().nt_timestamp())),
            mode: None,
        })
    }

    fn list(&mut self, path: &[u8]) -> Result<Vec<Entry>> {
        self.budget.renew(METADATA);
        let fs = &mut self.fs;
        let file = find(&self.ntfs, fs, &self.upper, path)?;
        if !file.is_directory() {
            return Err(Error::invalid(format!("{}: not a directory", shown(path))));
        }
        let mut found = Vec::new();
        let mut many = false;
        index::each(&file, fs, &mut |name| {
            if name.file < FIRST_FILE || name.short {
                return ControlFlow::Continue(());
            }
            many = found.len() >= MAX_ENTRIES;
            found.push(entry(&name));
            if many { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        if many {
            return Err(Error::unsupported("a directory of more than a million names"));
        }
        Ok(found)
    }

    fn read(&mut self, path: &[u8], _follow: bool, sink: &mut dyn Sink) -> Result<()> {
        self.budget.renew(METADATA);
        let file = find(&self.ntfs, &mut self.fs, &self.upper, path)?;
        contents(&file, &mut self.fs, &self.volume, path, |attribute, initialized, fs| {
            let len = attribute.value_length();
            let mut value = attribute.value(fs).map_err(failed)?;
            let mut buf = vec![0; CHUNK.min(initialized) as usize];
            let mut pos = 0;
            while pos < initialized {
                let step = (initialized - pos).min(CHUNK);
                self.budget.renew(METADATA);
                let buf = &mut buf[..step as usize];
                let hole = value.data_position().value().is_none();
                fill(&mut value, fs, buf)?;
                match hole && buf.iter().all(|byte| *byte == 0) {
                    true => sink.hole(step)?,
                    false => sink.data(buf)?,
                }
                pos += step;
            }
            if len > initialized { sink.hole(len - initialized) } else { Ok(()) }
        })
    }

    fn read_at(&mut self, path: &[u8], at: u64, buf: &mut [u8]) -> Result<()> {
        self.budget.renew(METADATA);
        let known = self.last.as_ref().filter(|(known, _)| known == path);
        let file = match known {
            Some((_, number)) => self.ntfs.file(&mut self.fs, *number).map_err(failed)?,
            None => find(&self.ntfs, &mut self.fs, &self.upper, path)?,
        };
        self.last = Some((path.to_vec(), file.file_record_number()));
        let mut done = false;
        contents(&file, &mut self.fs, &self.volume, path, |attribute, initialized, fs| {
            let end = at.checked_add(buf.len() as u64);
            if end.is_none_or(|end| end > attribute.value_length()) {
                return Ok(());
            }
            let stored = initialized.saturating_sub(at).min(buf.len() as u64) as usize;
            let mut value = attribute.value(fs).map_err(failed)?;
            value.seek(fs, SeekFrom::Start(at)).map_err(failed)?;
            fill(&mut value, fs, &mut buf[..stored])?;
            buf[stored..].fill(0);
            done = true;
            Ok(())
        })?;
        if done { Ok(()) } else { Err(past_end(path)) }
    }

    fn target(&mut self, path: &[u8]) -> Result<Vec<u8>> {
        Err(Error::unsupported(format!("{}: links of NTFS are not read here", shown(path))))
    }
}

/// Does `work` with the contents of a file that can be read, and how many bytes of them count as written. A file without
/// any is empty.
fn contents(
    file: &NtfsFile<'_>,
    fs: &mut Throttled,
    volume: &Window<Arc<Disk>>,
    path: &[u8],
    work: impl FnOnce(&NtfsAttribute<'_, '_>, u64, &mut Throttled) -> Result<()>,
) -> Result<()> {
    if file.is_directory() {
        return Err(Error::invalid(format!("{}: this is a directory", shown(path))));
    }
    let refused = |what: &str| {
        Error::unsupported(format!("{}: {what}, which is not read here", shown(path)))
            .hint("`flatdisk attach --mount` mounts it")
    };
    let info = file.info().map_err(failed)?;
    if info.file_attributes().contains(NtfsFileAttributeFlags::REPARSE_POINT) {
        return Err(refused("a link, or a file that Windows keeps elsewhere"));
    }
    let Some(item) = file.data(fs, "") else { return Ok(()) };
    let item = item.map_err(failed)?;
    let attribute = item.to_attribute().map_err(failed)?;
    if attribute.flags().contains(NtfsAttributeFlags::COMPRESSED) {
        return Err(refused("the file is compressed"));
    }
    if attribute.flags().contains(NtfsAttributeFlags::ENCRYPTED) {
        return Err(refused("the file is encrypted"));
    }
    let len = attribute.value_length();
    let initialized = initialized(volume, &attribute)?.unwrap_or(len).min(len);
    let sparse = attribute.flags().contains(NtfsAttributeFlags::SPARSE);
    if initialized > if sparse { MAX_SPARSE } else { volume.size() } {
        return Err(Error::corrupt(format!("{}: larger than its disk", shown(path))));
    }
    work(&attribute, initialized, fs)
}

/// Fills a buffer with the next bytes of a value.
pub(super) fn fill<T: Read + Seek>(
    value: &mut impl NtfsReadSeek,
    fs: &mut T,
    mut buf: &mut [u8],
) -> Result<()> {
    while !buf.is_empty() {
        let read = value.read(fs, buf).map_err(failed)?;
        if read == 0 {
            return Err(Error::corrupt(
                "the file system is damaged: a file ends before its length",
            ));
        }
        buf = &mut buf[read..];
    }
    Ok(())
}

/// The initialized size of a value that is not in its record. The crate knows where its header is.
fn initialized(
    volume: &Window<Arc<Disk>>,
    attribute: &NtfsAttribute<'_, '_>,
) -> Result<Option<u64>> {
    if attribute.is_resident() {
        return Ok(None);
    }
    let Some(header) = attribute.position().value().map(NonZeroU64::get) else { return Ok(None) };
    let at = header.saturating_add(INITIALIZED);
    let mut bytes = [0; 8];
    volume.read_at(at, &mut bytes)?;
    if at % 512 == 504 {
        // The last two bytes of a sector are kept elsewhere; here they are the upper ones of a size.
        bytes[6..].fill(0);
    }
    Ok(Some(u64::from_le_bytes(bytes)))
}
