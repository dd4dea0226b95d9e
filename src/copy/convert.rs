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

use std::io::Write;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Sharing;
use super::compare::compare_with;
use super::ova;
use super::pipeline::{self, Copying};
use super::sink::{DeltaSink, DiskSink, PipeSink};
use super::source::Source;
use super::stream::StreamSink;
use crate::disk::Disk;
use crate::disk::share::Holder;
use crate::error::{Error, Result, ResultExt};
use crate::formats::chain::file_identity;
use crate::formats::places::directory_of;
use crate::formats::{
    self, CreateSpec, Format, Identity, Image, OpenOptions, preallocate, raw, vhd, vmdk,
};
use crate::progress::Progress;
use crate::storage::archive::{self, Archive};
use crate::storage::device::DeviceFile;
use crate::storage::staged::Staged;
use crate::storage::{Access, Appender, FileIdentity, Host, SHARED_BLOCK, Storage, file};

/// What is made.
#[derive(Clone, Copy)]
pub enum Target {
    /// A raw disk.
    Raw,
    /// An image of a format.
    Image(&'static dyn Format),
}

impl Target {
    /// The format called `name`, or `raw`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`] for a name that is none, with those that are.
    pub fn by_name(name: &str) -> Result<Self> {
        if name.eq_ignore_ascii_case("raw") {
            return Ok(Self::Raw);
        }
        formats::by_name(name).map(Self::Image).map_err(|_| {
            let known: Vec<_> = formats::FORMATS.iter().map(|f| f.name()).collect();
            Error::invalid(format!("unknown format `{name}`"))
                .hint(format!("{}, raw", known.join(", ")))
        })
    }

    /// What a file name's extension stands for.
    pub fn by_extension(path: &Path) -> Option<Self> {
        let extension = path.extension()?.to_str()?.to_ascii_lowercase();
        match &*extension {
            "img" | "raw" | "dd" => Some(Self::Raw),
            _ => formats::by_extension(path).map(Self::Image),
        }
    }

    /// `raw`, or the format's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Image(format) => format.name(),
        }
    }
}

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

/// The extents of the image at `path` that have the names which its own parts would have, and lie beside
/// it: a disk that the image was only made to name is somebody else's.
fn own_extents(host: &Arc<dyn Host>, path: &Path) -> Vec<PathBuf> {
    let Ok(image) = formats::open(host, path, &OpenOptions::new(Access::Read)) else {
        return Vec::new();
    };
    let stem = path.file_stem().unwrap_or_default().as_bytes();
    let own = |extent: &PathBuf| {
        let name = extent.file_stem().unwrap_or_default().as_bytes();
        let role = name.strip_prefix(stem).and_then(|rest| rest.strip_prefix(b"-"));
        extent.parent() == path.parent()
            && extent.extension() == path.extension()
            && role.is_some_and(|role| match role {
                b"flat" => true,
                [b'f' | b's', number @ ..] => {
                    number.len() >= 3 && number.iter().all(u8::is_ascii_digit)
                }
                _ => false,
            })
    };
    image.info.extents.into_iter().filter(own).collect()
}

/// Removes those parts `old` of the image that was replaced which are no parts of the new one, nor of the
/// source.
fn remove_left(
    host: &Arc<dyn Host>,
    from: &From<'_>,
    old: &[PathBuf],
    new: &[PathBuf],
    path: &Path,
) -> Result<()> {
    let mut kept = source_files(host, from)?;
    kept.extend(new.iter().filter_map(|path| file_identity(host, path).ok()));
    let mut removed = false;
    for part in old {
        if file_identity(host, part).is_ok_and(|file| !kept.contains(&file)) {
            host.remove(part)?;
            removed = true;
        }
    }
    if removed { host.sync_dir(&directory_of(path)) } else { Ok(()) }
}

/// Writes a disk to a pipe: raw, as a fixed VHD, or as a stream-optimised VMDK, which calls itself
/// `path`.
///
/// # Errors
///
/// Those of [`convert`]; [`ErrorKind::InvalidInput`] for a format that cannot be written in one go. The pipe has
/// a part of it then.
pub fn convert_to_pipe(
    from: &From<'_>,
    out: impl Write + Send,
    path: &Path,
    target: Target,
    options: &Options<'_>,
    progress: &dyn Progress,
) -> Result<Converted> {
    let spec = specification(from, target, options)?;
    refuse_level(target, &spec, options)?;
    let subformat = spec.subformat.as_deref().unwrap_or_default();
    let range = 0..from.source.size();
    let how = Copying { salvage: options.salvage };
    let size = spec.size;
    let lost = match target {
        Target::Image(format) if is_stream(format, &spec) => {
            let level = level(options)?;
            let sink = StreamSink::new(vmdk::begin_stream(out, path, &spec)?, level);
            let lost = pipeline::run(from.source, range, &sink, how, progress)?;
            flush(sink.finish()?)?;
            lost
        }
        Target::Image(format)
            if format.name() == "vhd" && subformat.eq_ignore_ascii_case("fixed") =>
        {
            let footer = vhd::fixed_footer(size, &spec)?;
            let sink = PipeSink::new(out);
            let lost = pipeline::run(from.source, range.start..size, &sink, how, progress)?;
            let mut out = sink.into_inner();
            out.write_all(&footer).map_err(|e| Error::io("writing the output", &e))?;
            flush(out)?;
            lost
        }
        Target::Raw => {
            let sink = PipeSink::new(out);
            let lost = pipeline::run(from.source, range.start..size, &sink, how, progress)?;
            flush(sink.into_inner())?;
            lost
        }
        Target::Image(format) => {
            let what = format!("a {} image is not written in order", format.name());
            let hint = "raw, vhd --subformat fixed and vmdk --subformat streamOptimized are";
            return Err(Error::invalid(what).hint(hint));
        }
    };
    Ok(Converted { size, lost, ..Converted::default() })
}

/// Writes a disk over a block device, which is at least as large and in use by nobody.
///
/// # Errors
///
/// Those of [`convert`]; [`ErrorKind::InvalidInput`] for a device that is too small, [`ErrorKind::Busy`] for one
/// in use. After a failure half way the device holds a part.
pub fn convert_to_device(
    from: &From<'_>,
    path: &Path,
    options: &Options<'_>,
    progress: &dyn Progress,
) -> Result<Converted> {
    let spec = specification(from, Target::Raw, options)?;
    refuse_level(Target::Raw, &spec, options)?;
    let device: Arc<dyn Storage> = Arc::new(DeviceFile::open(path, true)?);
    let room = device.len().map_err(|e| Error::io("asking for the size", &e).in_file(path))?;
    if room < spec.size {
        let what = format!("the device has {room} bytes, the disk {}", spec.size);
        return Err(Error::invalid(what).in_file(path));
    }
    let disk = Arc::new(raw::over(device.clone(), spec.size));
    let sink = DiskSink::new(disk.clone(), false, Sharing::Never);
    let how = Copying { salvage: options.salvage };
    let lost = pipeline::run(from.source, 0..spec.size, &sink, how, progress)?;
    disk.flush()?;
    if options.verify {
        verify(from, &disk, how, path, progress)?;
    }
    Ok(Converted { size: spec.size, files: vec![path.to_owned()], lost, shared: 0 })
}

fn flush(mut out: impl Write) -> Result<()> {
    out.flush().map_err(|e| Error::io("writing the output", &e))
}

/// Whether a stream-optimised VMDK is asked for.
fn is_stream(format: &dyn Format, spec: &CreateSpec) -> bool {
    let subformat = spec.subformat.as_deref().unwrap_or_default();
    format.name() == "vmdk" && subformat.eq_ignore_ascii_case("streamOptimized")
}

fn level(options: &Options<'_>) -> Result<u32> {
    let level = options.level.unwrap_or(vmdk::DEFAULT_LEVEL);
    match vmdk::LEVELS.contains(&level) {
        true => Ok(level),
        false => Err(Error::invalid(format!("compression level {level}")).hint("1 to 9")),
    }
}

/// Refuses a level of compression for what is not compressed.
fn refuse_level(target: Target, spec: &CreateSpec, options: &Options<'_>) -> Result<()> {
    let compressed = matches!(target, Target::Image(format) if is_stream(format, spec));
    if compressed || options.level.is_none() {
        return Ok(());
    }
    let what = format!("a {} image is not compressed", target.name());
    Err(Error::invalid(what).hint("-O vmdk --subformat streamOptimized is"))
}

/// What exactly is to be made, after the source; refuses what the guest would not recognise.
fn specification(from: &From<'_>, target: Target, options: &Options<'_>) -> Result<CreateSpec> {
    let mut spec = options.spec.clone();
    let size = from.source.size();
    if spec.size == 0 {
        spec.size = size;
    }
    if spec.size < size {
        let what = format!("the disk has {size} bytes, which {} do not hold", spec.size);
        return Err(Error::invalid(what).hint("flatdisk resize --shrink makes it smaller first"));
    }
    let sector = from.image.map(|image| image.info.logical_sector_size);
    match (target, sector) {
        (Target::Image(format), Some(4096)) if format.name() != "vhdx" => {
            let what = format!(
                "the disk has sectors of 4096 bytes, those of a {} have 512: the guest would not find its partitions",
                format.name().to_uppercase()
            );
            return Err(Error::unsupported(what).hint("-O vhdx or -O raw"));
        }
        (Target::Image(format), Some(sector)) if format.name() == "vhdx" => {
            let wanted = *spec.logical_sector.get_or_insert(sector);
            if wanted != sector {
                let what = format!(
                    "the disk has sectors of {sector} bytes, with {wanted} the guest would not find its partitions"
                );
                return Err(Error::invalid(what).hint("leave --sector-size away"));
            }
        }
        _ => {}
    }
    if options.keep_id {
        let image = from.image.filter(|image| image.info.format == target.name());
        let Some(image) = image else {
            let what = format!("a {} disk cannot have the source's identity", target.name());
            return Err(Error::invalid(what).hint("--keep-id is for two images of one format"));
        };
        spec.uuid.clone_from(&image.info.uuid);
    }
    Ok(spec)
}

/// Refuses a target that is a file of the source.
fn refuse_source(host: &Arc<dyn Host>, from: &From<'_>, path: &Path) -> Result<()> {
    let Ok(target) = file_identity(host, path) else { return Ok(()) };
    let own = source_files(host, from)?;
    if !own.iter().any(|file| file.of_host() == target.of_host()) {
        return Ok(());
    }
    Err(Error::invalid("the target is the source, or a part of it").in_file(path))
}

/// The files that the source's disk is in.
fn source_files(host: &Arc<dyn Host>, from: &From<'_>) -> Result<Vec<FileIdentity>> {
    let mut files = Vec::new();
    for image in from.image.into_iter().flat_map(Image::chain) {
        for path in std::iter::once(&image.path).chain(&image.info.extents) {
            files.push(file_identity(host, path)?);
        }
    }
    if let Source::Disk(disk) = from.source {
        files.extend(disk.flat_file().and_then(|file| file.identity().ok()));
    }
    Ok(files)
}

/// Reads the target back.
fn verify(
    from: &From<'_>,
    made: &Arc<Disk>,
    how: Copying,
    path: &Path,
    progress: &dyn Progress,
) -> Result<()> {
    let Source::Disk(disk) = from.source else {
        return Err(Error::invalid("what came through a pipe cannot be read again to verify it"));
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
