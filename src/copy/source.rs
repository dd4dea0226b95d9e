//! What is copied from: a disk, or bytes that come in order.

use std::io::Read;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::disk::Disk;
use crate::disk::share::Holder;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::{self, Image, OpenOptions, raw};
use crate::storage::device::{self, DeviceFile};
use crate::storage::runs::merge;
use crate::storage::{Access, Host, Storage};

/// Extensions under which a file that is no image is taken for a raw disk.
const RAW_EXTENSIONS: [&str; 3] = ["img", "raw", "dd"];

/// The contents of a disk, to be copied, compared or hashed.
pub enum Source {
    /// A disk.
    Disk(Arc<Disk>),
    /// A part of a disk, whole sectors: a partition.
    Part(Arc<Disk>, Range<u64>),
    /// Bytes in order, `size` of them as far as they go: what is missing at the end is an error.
    Stream {
        /// Where they come from.
        from: Mutex<Box<dyn Read + Send>>,
        /// How many there are.
        size: u64,
    },
    /// Two disks: chunks of the first, wherever either of them has data.
    Over(Arc<Disk>, Arc<Disk>),
}

impl Source {
    /// The size in bytes, a multiple of a sector.
    pub fn size(&self) -> u64 {
        match self {
            Self::Disk(disk) | Self::Over(disk, _) => disk.size(),
            Self::Part(_, range) => range.end - range.start,
            Self::Stream { size, .. } => *size,
        }
    }

    /// Whether the bytes must be read in order.
    pub(super) fn sequential(&self) -> bool {
        matches!(self, Self::Stream { .. })
    }

    /// How much of the source is looked at in one step.
    pub(super) fn window(&self) -> u64 {
        match self {
            Self::Disk(disk) | Self::Part(disk, _) => disk.longest_lookup(),
            Self::Over(one, other) => one.longest_lookup().min(other.longest_lookup()),
            Self::Stream { .. } => u64::MAX,
        }
    }

    /// Appends to `found` where in `range` there is data, in order and joined. `seen` is what is known of
    /// the host's files.
    pub(super) fn data(
        &self,
        range: Range<u64>,
        seen: &mut Seen,
        found: &mut Vec<Range<u64>>,
    ) -> Result<()> {
        let mut disk_data = |disk: &Disk, found: &mut Vec<Range<u64>>| {
            let inside = range.start.min(disk.size())..range.end.min(disk.size());
            if inside.is_empty() {
                return Ok(());
            }
            disk.holders(inside, &mut |part, holder| match holder {
                Holder::Nothing => Ok(()),
                Holder::Other => {
                    push(found, part);
                    Ok(())
                }
                Holder::File { file, at } => {
                    seen.without_holes(part, &file, at, &mut |part, holder| {
                        if matches!(holder, Holder::File { .. }) {
                            push(found, part);
                        }
                        Ok(())
                    })
                }
            })
        };
        match self {
            Self::Stream { size, .. } => {
                let inside = range.start..range.end.min(*size);
                if !inside.is_empty() {
                    found.push(inside);
                }
                Ok(())
            }
            Self::Disk(disk) => disk_data(disk, found),
            Self::Part(disk, part) => {
                let whole = Self::Disk(disk.clone());
                let mut there = Vec::new();
                whole.data(within(part, &range), seen, &mut there)?;
                there
                    .into_iter()
                    .for_each(|at| push(found, at.start - part.start..at.end - part.start));
                Ok(())
            }
            Self::Over(one, other) => {
                disk_data(one, found)?;
                disk_data(other, found)?;
                merge(found);
                Ok(())
            }
        }
    }

    /// Reads; what lies behind the end is zero.
    pub(super) fn read(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        match self {
            Self::Disk(disk) | Self::Over(disk, _) => {
                let here = disk.size().saturating_sub(at).min(buf.len() as u64);
                let (inside, past) = buf.split_at_mut(here as usize);
                past.fill(0);
                if inside.is_empty() { Ok(()) } else { disk.read_at(at, inside) }
            }
            Self::Part(disk, part) => {
                let here = within(part, &(at..at.saturating_add(buf.len() as u64)));
                let (inside, past) = buf.split_at_mut((here.end - here.start) as usize);
                past.fill(0);
                if inside.is_empty() { Ok(()) } else { disk.read_at(here.start, inside) }
            }
            Self::Stream { from, size } => {
                let here = size.saturating_sub(at).min(buf.len() as u64);
                let (inside, past) = buf.split_at_mut(here as usize);
                past.fill(0);
                from.lock().read_exact(inside).map_err(|e| match e.kind() {
                    std::io::ErrorKind::UnexpectedEof => {
                        let what = format!("the input ended before its {size} bytes were there");
                        Error::invalid(what).at(at)
                    }
                    _ => Error::io("reading the input", &e),
                })
            }
        }
    }

    /// See [`Disk::holders`]; the part behind the end is nothing.
    pub(super) fn holders(
        &self,
        range: Range<u64>,
        found: &mut dyn FnMut(Range<u64>, Holder) -> Result<()>,
    ) -> Result<()> {
        if let Self::Part(disk, part) = self {
            let here = within(part, &range);
            let end = range.start + (here.end - here.start);
            let shift = |at: u64| at - here.start + range.start;
            if !here.is_empty() {
                let whole = Self::Disk(disk.clone());
                whole.holders(here.clone(), &mut |at, holder| {
                    found(shift(at.start)..shift(at.end), holder)
                })?;
            }
            return if end < range.end { found(end..range.end, Holder::Nothing) } else { Ok(()) };
        }
        let Self::Disk(disk) = self else { return found(range, Holder::Other) };
        let inside = range.start.min(disk.size())..range.end.min(disk.size());
        let past = inside.end.max(range.start)..range.end;
        if !inside.is_empty() {
            disk.holders(inside, &mut |part, holder| match holder {
                Holder::File { file, at } => Seen::default().without_holes(part, &file, at, found),
                other => found(part, other),
            })?;
        }
        if past.is_empty() { Ok(()) } else { found(past, Holder::Nothing) }
    }
}

/// Bytes `range` of the part `part` of a disk, as bytes of the disk.
fn within(part: &Range<u64>, range: &Range<u64>) -> Range<u64> {
    let place = |at: u64| part.start.saturating_add(at).min(part.end);
    place(range.start)..place(range.end)
}

/// Appends a range, joined to the last one where it continues it.
fn push(found: &mut Vec<Range<u64>>, range: Range<u64>) {
    match found.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => found.push(range),
    }
}

/// What is known of the holes of the host's files. Asking costs some hosts time for every page up to the
/// next hole, so that nothing is asked twice.
#[derive(Default)]
pub(super) struct Seen(Vec<SeenFile>);

/// Of bytes `from..data.end` of a file only `data` is stored.
struct SeenFile {
    file: Arc<dyn Storage>,
    from: u64,
    data: Range<u64>,
}

impl Seen {
    /// The first data of a file at or after `at`; none where it ends with a hole.
    fn next_data(&mut self, file: &Arc<dyn Storage>, at: u64) -> Result<Range<u64>> {
        let place = self.0.iter().position(|seen| Arc::ptr_eq(&seen.file, file));
        if let Some(seen) = place.map(|place| &self.0[place])
            && (seen.from..seen.data.end).contains(&at)
        {
            return Ok(seen.data.start.max(at)..seen.data.end);
        }
        let data = file
            .next_data(at)
            .map_err(|e| Error::io("looking for data", &e).in_file(file.path()).at(at))?
            .unwrap_or(u64::MAX..u64::MAX);
        let new = SeenFile { file: file.clone(), from: at, data: data.clone() };
        match place {
            Some(place) => self.0[place] = new,
            None => self.0.push(new),
        }
        Ok(data)
    }

    /// Parts a run that lies in a file into what the host stores of it and what it does not.
    fn without_holes(
        &mut self,
        part: Range<u64>,
        file: &Arc<dyn Storage>,
        at: u64,
        found: &mut dyn FnMut(Range<u64>, Holder) -> Result<()>,
    ) -> Result<()> {
        let mut pos = part.start;
        while pos < part.end {
            let here = at + (pos - part.start);
            let data = self.next_data(file, here)?;
            let on_disk = |place: u64| part.end.min(pos.saturating_add(place - here));
            let data = on_disk(data.start)..on_disk(data.end);
            if pos < data.start {
                found(pos..data.start, Holder::Nothing)?;
            }
            if !data.is_empty() {
                let at = at + (data.start - part.start);
                found(data.clone(), Holder::File { file: file.clone(), at })?;
            }
            pos = data.end;
        }
        Ok(())
    }
}

/// A disk that a user named, and the image it is in, if it is in one.
#[derive(Debug)]
pub struct Opened {
    /// The disk.
    pub disk: Arc<Disk>,
    /// The image, with its parents; `None` for a raw disk.
    pub image: Option<Image>,
    /// What is odd, for people.
    pub notes: Vec<String>,
}

impl Opened {
    /// Opens an image, a raw disk or a block device. A file that is no image counts as a raw disk only
    /// if `raw` says so or its extension does (`.img`, `.raw`, `.dd`): of a file that has the name of an
    /// image and is none, nothing is known.
    pub fn open(
        host: &Arc<dyn Host>,
        path: &Path,
        options: &OpenOptions,
        raw: bool,
    ) -> Result<Self> {
        if device::is_device(path) {
            let device = DeviceFile::open(path, options.access == Access::Write)?;
            return Self::raw(Arc::new(device));
        }
        if raw {
            return Self::raw(host.open(path, options.access)?);
        }
        match formats::open(host, path, options) {
            Err(e) if e.kind() == ErrorKind::NotThisFormat => {
                let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
                if RAW_EXTENSIONS.iter().any(|known| known.eq_ignore_ascii_case(extension)) {
                    return Self::raw(host.open(path, options.access)?);
                }
                Err(e.hint("--from raw takes it for a raw disk"))
            }
            other => other.map(|image| Self {
                disk: image.disk.clone(),
                image: Some(image),
                notes: Vec::new(),
            }),
        }
    }

    fn raw(file: Arc<dyn Storage>) -> Result<Self> {
        let len = file.len().unwrap_or(0);
        let disk = Arc::new(raw::open(file)?);
        let padding = disk.size() - len;
        let notes = match padding {
            0 => Vec::new(),
            _ => vec![format!(
                "the raw disk has {len} bytes, no multiple of a sector: {padding} bytes of zeroes follow them"
            )],
        };
        Ok(Self { disk, image: None, notes })
    }
}
