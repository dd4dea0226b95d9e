//! Making an image, raw file, stream or device out of a disk.
//!
//! # Order
//!
//! 1. The target's files are made under temporary names, and filled.
//! 2. They are closed, which makes everything in them durable; then, if asked for, read back and
//!    compared with the source.
//! 3. They are given their names, that of the image itself last, and the directory is synced.
//!
//! Ended or killed before 3, the target is what it was.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Sharing;
use super::compare::compare_with;
use super::files::{own_extents, refuse_source, remove_left};
use super::ova;
use super::pipeline::{self, Copying};
use super::sink::{DeltaSink, DiskSink};
use super::source::Source;
use super::stream::StreamSink;
use super::target::{Target, is_stream, level, refuse_level, specification};
use crate::disk::Disk;
use crate::disk::share::Holder;
use crate::error::{Error, Result, ResultExt};
use crate::formats::places::directory_of;
use crate::formats::{
    self, CreateSpec, Format, Identity, Image, OpenOptions, preallocate, raw, vmdk,
};
use crate::progress::Progress;
use crate::storage::archive::{self, Archive};
use crate::storage::staged::Staged;
use crate::storage::{Access, Appender, Host, SHARED_BLOCK, Storage, file};

/// How to convert.
#[derive(Default)]
pub struct Options<'a> {
    /// What the target is to be. Of size 0 it gets the source's; 4096-byte sectors are kept.
    pub spec: CreateSpec,
    /// Make a child of this image, which is open for reading, and store only what differs.
    pub parent: Option<&'a Image>,
    /// Level of compression, 1 to 9, where there is any.
    pub level: Option<u32>,
    /// Whether blocks of the host are shared.
    pub sharing: Sharing,
    /// Read the target back and compare it with the source.
    pub verify: bool,
    /// Put zeroes where the source cannot be read, and go on.
    pub salvage: bool,
    /// Replace a target that exists.
    pub replace: bool,
    /// Give the target the source's identity, instead of a new one; both are of one format.
    pub keep_id: bool,
}

/// What was made.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Converted {
    /// Bytes of the virtual disk.
    pub size: u64,
    /// The image's file, and those that belong to it.
    pub files: Vec<PathBuf>,
    /// Bytes that were shared with the source, not copied.
    pub shared: u64,
    /// Ranges of the disk that could not be read, and are zeroes now.
    pub lost: Vec<Range<u64>>,
}

impl Converted {
    /// A disk of `size` bytes in `files`.
    pub(crate) fn of(size: u64, files: Vec<PathBuf>) -> Self {
        Self { size, files, ..Self::default() }
    }
}

/// Where a disk comes from.
pub struct From<'a> {
    /// Its contents.
    pub source: &'a Source,
    /// The image it is in, if it is in one.
    pub image: Option<&'a Image>,
}

/// Makes an image or raw file at `path` out of a disk. Nobody may be writing to the source.
///
/// # Errors
///
/// Those of reading the disk and of creating the target; [`ErrorKind::Exists`] for a target that is there and
/// not to be replaced, [`ErrorKind::NoSpace`] on a full host, [`ErrorKind::Cancelled`] where `progress` ends
/// the work. Nothing is left of the target then.
///
/// [`ErrorKind::Exists`]: crate::ErrorKind::Exists
/// [`ErrorKind::NoSpace`]: crate::ErrorKind::NoSpace
/// [`ErrorKind::Cancelled`]: crate::ErrorKind::Cancelled
pub fn convert(
    host: &Arc<dyn Host>,
    from: &From<'_>,
    path: &Path,
    target: Target,
    options: &Options<'_>,
    progress: &dyn Progress,
) -> Result<Converted> {
    let spec = specification(from, target, options)?;
    refuse_level(target, &spec, options)?;
    let stream = matches!(target, Target::Image(format) if is_stream(format, &spec));
    if archive::has_name(path) && !stream {
        let what = "an OVA is made of a stream-optimised VMDK";
        return Err(Error::invalid(what).in_file(path).hint("--for esx makes one"));
    }
    refuse_source(host, from, path)?;
    let old = if options.replace { own_extents(host, path) } else { Vec::new() };
    let staged = Staged::new(host.clone(), path, options.replace)?;
    let shared_host: Arc<dyn Host> = staged.clone();
    let work = Work { host: &shared_host, from, path, target, spec, options, progress };
    let mut converted = work.run().map_err(|e| staged.explain(e))?;
    progress.go_on()?;
    for new in staged.names() {
        refuse_source(host, from, &new)?;
    }
    converted.files = staged.commit()?;
    remove_left(host, from, &old, &converted.files, path)?;
    Ok(converted)
}

/// Reads the target back.
pub(super) fn verify(
    from: &From<'_>,
    made: &Arc<Disk>,
    how: Copying,
    path: &Path,
    progress: &dyn Progress,
) -> Result<()> {
    let Source::Disk(disk) = from.source else {
        let what = match from.source {
            Source::Part(..) => "a partition that was taken out is not compared",
            _ => "what came through a pipe cannot be read again to verify it",
        };
        return Err(Error::invalid(what));
    };
    match compare_with(disk, made, how, progress)? {
        None => Ok(()),
        Some(found) => {
            let what = format!("verifying: the target differs at disk offset {:#x}", found.at);
            Err(Error::corrupt(what).in_file(path))
        }
    }
}

/// The file that holds the first data of a source, if a file holds it as it is.
fn first_file(source: &Source) -> Result<Option<Arc<dyn Storage>>> {
    let Source::Disk(disk) = source else { return Ok(None) };
    let Some(data) = disk.next_data(0)? else { return Ok(None) };
    let mut first = None;
    source.holders(data, &mut |_, holder| {
        if let Holder::File { file, .. } = holder {
            first.get_or_insert(file);
        }
        Ok(())
    })?;
    Ok(first)
}

/// One conversion to files.
struct Work<'a> {
    host: &'a Arc<dyn Host>,
    from: &'a From<'a>,
    path: &'a Path,
    target: Target,
    spec: CreateSpec,
    options: &'a Options<'a>,
    progress: &'a dyn Progress,
}

impl Work<'_> {
    fn run(&self) -> Result<Converted> {
        let (lost, shared) = match self.target {
            Target::Raw => self.to_raw()?,
            Target::Image(format) if is_stream(format, &self.spec) => self.to_stream()?,
            Target::Image(format) => self.to_image(format)?,
        };
        if self.options.verify {
            self.verify()?;
        }
        Ok(Converted { size: self.spec.size, files: Vec::new(), shared, lost })
    }

    fn how(&self) -> Copying {
        Copying { salvage: self.options.salvage }
    }

    fn range(&self) -> Range<u64> {
        0..self.from.source.size()
    }

    /// Blocks are shared only where everything can be read, and where the host can: that is tried
    /// first, with a file of no name.
    fn sharing(&self) -> Result<Sharing> {
        if self.options.salvage || self.options.sharing == Sharing::Never {
            return Ok(Sharing::Never);
        }
        let first = first_file(self.from.source)?;
        let dir = directory_of(self.path);
        let shares = first.is_some_and(|file| {
            file::scratch(&dir).is_ok_and(|scratch| {
                scratch.share_from(0, &*file, 0, SHARED_BLOCK).is_ok_and(|shared| shared)
            })
        });
        match self.options.sharing {
            sharing if shares => Ok(sharing),
            Sharing::Always => {
                let what = "the host cannot share blocks between source and target";
                Err(Error::unsupported(what).in_file(self.path).hint("--reflink=auto copies them"))
            }
            _ => Ok(Sharing::Never),
        }
    }

    /// Fills a disk that reads as zeroes.
    fn fill(&self, disk: &Arc<Disk>) -> Result<(Vec<Range<u64>>, u64)> {
        let sink = DiskSink::new(disk.clone(), true, self.sharing()?);
        let lost = pipeline::run(self.from.source, self.range(), &sink, self.how(), self.progress)?;
        disk.close()?;
        Ok((lost, sink.shared()))
    }

    fn to_raw(&self) -> Result<(Vec<Range<u64>>, u64)> {
        if self.options.parent.is_some() {
            return Err(Error::invalid("a raw disk has no parent"));
        }
        let file = self.host.create(self.path)?;
        preallocate(&*file, 0..self.spec.size, self.spec.preallocation)?;
        let made = self.fill(&Arc::new(raw::over(file.clone(), self.spec.size)))?;
        // Also where nothing was written.
        crate::disk::sync_file(&*file)?;
        Ok(made)
    }

    fn to_stream(&self) -> Result<(Vec<Range<u64>>, u64)> {
        if self.options.parent.is_some() {
            return Err(Error::invalid("a stream-optimised disk has no parent"));
        }
        let level = level(self.options)?;
        if archive::has_name(self.path) {
            let Self { host, from, path, spec, options, progress, .. } = self;
            return Ok((ova::write(host, from, path, spec, options, level, *progress)?, 0));
        }
        let file = self.host.create(self.path)?;
        let writer = vmdk::begin_stream(Appender::new(&*file), self.path, &self.spec)?;
        let sink = StreamSink::new(writer, level);
        let lost = pipeline::run(self.from.source, self.range(), &sink, self.how(), self.progress)
            .in_file(file.path())?;
        sink.finish().in_file(file.path())?;
        crate::disk::sync_file(&*file)?;
        Ok((lost, 0))
    }

    fn to_image(&self, format: &dyn Format) -> Result<(Vec<Range<u64>>, u64)> {
        let Some(parent) = self.options.parent else {
            formats::create(format, &**self.host, self.path, &self.spec)?;
            return self.fill(&self.open(Access::Write)?.disk);
        };
        if parent.disk.size() != self.spec.size {
            let what =
                format!("the disk has {} bytes, the parent {}", self.spec.size, parent.disk.size());
            return Err(Error::invalid(what).in_file(&parent.path));
        }
        formats::create_child(format, &**self.host, self.path, parent, &self.spec)?;
        let child = self.open(Access::Write)?.disk;
        let Source::Disk(disk) = self.from.source else {
            return Err(Error::invalid(
                "what comes through a pipe cannot be compared with a parent",
            ));
        };
        let sink = DeltaSink::new(child.clone(), parent.disk.clone());
        let both = Source::Over(disk.clone(), parent.disk.clone());
        let lost = pipeline::run(&both, self.range(), &sink, self.how(), self.progress)?;
        child.close()?;
        Ok((lost, 0))
    }

    /// Opens what was made.
    fn open(&self, access: Access) -> Result<Image> {
        let identity = self.from.image.filter(|_| self.options.keep_id).map(|i| &i.identity);
        let mut options = OpenOptions::new(access);
        options.parent = self.options.parent.map(|parent| parent.path.clone());
        // That of a VHD is given to it when it is made.
        options.next_identity =
            identity.filter(|id| !matches!(id, Identity::VhdUniqueId(_))).cloned();
        formats::open(self.host, self.path, &options)
    }

    fn verify(&self) -> Result<()> {
        let disk = match self.target {
            Target::Raw => Arc::new(raw::open(self.host.open(self.path, Access::Read)?)?),
            Target::Image(_) if archive::has_name(self.path) => {
                let made = Archive::open(self.host.open(self.path, Access::Read)?)?;
                formats::ova::open_only(&made, &OpenOptions::new(Access::Read))?.disk
            }
            Target::Image(_) => self.open(Access::Read)?.disk,
        };
        verify(self.from, &disk, self.how(), self.path, self.progress)
    }
}
