//! NTFS, by the crate `ntfs`, and what that one leaves to its callers: what is compressed, encrypted
//! or stored elsewhere is refused rather than read as it lies there, and bytes behind the initialized
//! size of a file are zeroes, whatever their clusters hold.

use std::io::{BufReader, Read, Seek};
use std::num::NonZeroU64;
use std::sync::Arc;

use ntfs::indexes::NtfsFileNameIndex;
use ntfs::structured_values::{
    NtfsFileAttributeFlags, NtfsFileName, NtfsFileNamespace, NtfsVolumeFlags,
};
use ntfs::{Ntfs, NtfsAttribute, NtfsAttributeFlags, NtfsError, NtfsFile, NtfsReadSeek, NtfsTime};

use super::throttle::{Budget, METADATA, Throttled};
use super::{Entry, FileKind, FileSystem, MAX_ENTRIES, Sink, names, not_found, shown};
use crate::disk::Disk;
use crate::disk::window::Window;
use crate::error::{Error, Result};
use crate::volumes::bytes::Bytes;

/// Files below this number are the file system's own.
const FIRST_FILE: u64 = 16;
const LOG_FILE: u64 = 2;
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
}

fn failed(e: NtfsError) -> Error {
    match e {
        // The crate takes numbers of parts of a directory for numbers of clusters, which they are only up to
        // the size of such a part, 4 KiB.
        NtfsError::VcnMismatchInIndexAllocation { .. }
        | NtfsError::VcnOutOfBoundsInIndexAllocation { .. } => {
            let what = "a large directory, on a file system with clusters of more than 4 KiB or damaged, \
                        is not read here";
            Error::unsupported(what).hint("`flatdisk attach --mount` mounts it")
        }
        e => Error::corrupt(format!("the file system is damaged: {e}")),
    }
}

impl Volume {
    pub fn open(volume: Window<Arc<Disk>>) -> Result<Self> {
        let budget = Budget::default();
        let mut fs = Throttled::new(volume.clone(), &budget);
        let mut ntfs = Ntfs::new(&mut fs).map_err(failed)?;
        ntfs.read_upcase_table(&mut BufReader::new(&mut fs)).map_err(failed)?;
        let mut warnings = Vec::new();
        let dirty = |flags: NtfsVolumeFlags| flags.contains(NtfsVolumeFlags::IS_DIRTY);
        if ntfs.volume_info(&mut fs).is_ok_and(|info| dirty(info.flags())) {
            warnings.push("it is marked as one to be checked by chkdsk".to_owned());
        }
        if log_waits(&ntfs, &mut fs).unwrap_or(false) {
            let text = "its journal waits to be replayed: what was written last is not seen";
            warnings.push(text.to_owned());
        }
        Ok(Self { ntfs, fs, volume, budget, warnings })
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
fn find<'n>(ntfs: &'n Ntfs, fs: &mut Throttled, path: &[u8]) -> Result<NtfsFile<'n>> {
    let mut file = ntfs.root_directory(fs).map_err(failed)?;
    for name in names(path) {
        let name = std::str::from_utf8(name).map_err(|_| not_found(path))?;
        if !file.is_directory() {
            return Err(not_found(path));
        }
        file = child(ntfs, fs, &file, name)?.ok_or_else(|| not_found(path))?;
    }
    Ok(file)
}

/// A name of a directory. Upper and lower case are one, unless there are names that differ in nothing
/// else.
fn child<'n>(
    ntfs: &'n Ntfs,
    fs: &mut Throttled,
    directory: &NtfsFile<'n>,
    name: &str,
) -> Result<Option<NtfsFile<'n>>> {
    let index = directory.directory_index(fs).map_err(failed)?;
    let mut finder = index.finder();
    let found = match NtfsFileNameIndex::find(&mut finder, ntfs, fs, name) {
        None => return Ok(None),
        Some(entry) => {
            let entry = entry.map_err(failed)?;
            let key = entry.key().transpose().map_err(failed)?;
            let exact = key.is_some_and(|key| key.name() == name);
            (entry.to_file(ntfs, fs).map_err(failed)?, exact)
        }
    };
    if found.1 {
        return Ok(Some(found.0));
    }
    let mut entries = index.entries();
    while let Some(entry) = entries.next(fs) {
        let entry = entry.map_err(failed)?;
        let key = entry.key().transpose().map_err(failed)?;
        if key.is_some_and(|key| key.name() == name) {
            return entry.to_file(ntfs, fs).map(Some).map_err(failed);
        }
    }
    Ok(Some(found.0))
}

fn seconds(time: NtfsTime) -> i64 {
    // From 1601, in units of 100 ns.
    (time.nt_timestamp() / 10_000_000).cast_signed() - 11_644_473_600
}

fn kind(directory: bool, attributes: NtfsFileAttributeFlags) -> FileKind {
    match (attributes.contains(NtfsFileAttributeFlags::REPARSE_POINT), directory) {
        // Links, and files that Windows keeps elsewhere.
        (true, _) => FileKind::Special,
        (_, true) => FileKind::Directory,
        _ => FileKind::File,
    }
}

fn entry(name: &NtfsFileName) -> Entry {
    Entry {
        name: name.name().to_string_lossy().into_bytes(),
        kind: kind(name.is_directory(), name.file_attributes()),
        size: if name.is_directory() { 0 } else { name.data_size() },
        modified: Some(seconds(name.modification_time())),
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
        let file = find(&self.ntfs, fs, path)?;
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
            modified: Some(seconds(info.modification_time())),
            mode: None,
        })
    }

    fn list(&mut self, path: &[u8]) -> Result<Vec<Entry>> {
        self.budget.renew(METADATA);
        let fs = &mut self.fs;
        let file = find(&self.ntfs, fs, path)?;
        if !file.is_directory() {
            return Err(Error::invalid(format!("{}: not a directory", shown(path))));
        }
        let index = file.directory_index(fs).map_err(failed)?;
        let mut entries = index.entries();
        let mut found = Vec::new();
        while let Some(next) = entries.next(fs) {
            let next = next.map_err(failed)?;
            let Some(name) = next.key().transpose().map_err(failed)? else { continue };
            let own = next.file_reference().file_record_number() < FIRST_FILE;
            if own || name.namespace() == NtfsFileNamespace::Dos {
                continue;
            }
            if found.len() >= MAX_ENTRIES {
                return Err(Error::unsupported("a directory of more than a million names"));
            }
            found.push(entry(&name));
        }
        Ok(found)
    }

    fn read(&mut self, path: &[u8], _follow: bool, sink: &mut dyn Sink) -> Result<()> {
        self.budget.renew(METADATA);
        let fs = &mut self.fs;
        let file = find(&self.ntfs, fs, path)?;
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
        let initialized = initialized(&self.volume, &attribute)?.unwrap_or(len).min(len);
        let sparse = attribute.flags().contains(NtfsAttributeFlags::SPARSE);
        if initialized > if sparse { MAX_SPARSE } else { self.volume.size() } {
            return Err(Error::corrupt(format!("{}: larger than its disk", shown(path))));
        }
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
    }

    fn target(&mut self, path: &[u8]) -> Result<Vec<u8>> {
        Err(Error::unsupported(format!("{}: links of NTFS are not read here", shown(path))))
    }
}

/// Fills a buffer with the next bytes of a value.
fn fill<T: Read + Seek>(
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
