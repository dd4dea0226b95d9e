//! Making a pipe or a block device out of a disk: nothing is renamed there.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use super::Sharing;
#[cfg(doc)]
use super::convert::convert;
use super::convert::{Converted, From, Options, verify};
use super::files::source_files;
use super::pipeline::{self, Copying};
use super::sink::{DiskSink, PipeSink};
use super::stream::StreamSink;
use super::target::{Target, is_stream, level, refuse_level, specification};
#[cfg(doc)]
use crate::error::ErrorKind;
use crate::error::{Error, Result};
use crate::formats::chain::file_identity;
use crate::formats::{raw, vhd, vmdk};
use crate::progress::Progress;
use crate::storage::device::DeviceFile;
use crate::storage::file::HostFs;
use crate::storage::{FileIdentity, Storage};

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

/// Refuses a device in which the source lies: itself, or a loop device over one of the source's files.
fn refuse_device(from: &From<'_>, path: &Path) -> Result<()> {
    let device = DeviceFile::open(path, false)?;
    let host = HostFs::shared();
    let backing = device
        .backing()
        .and_then(|file| file_identity(&host, &file).ok())
        .map(FileIdentity::of_host);
    let source = source_files(&host, from)?;
    if source.iter().any(|file| device.overlaps(*file) || Some(file.of_host()) == backing) {
        return Err(Error::invalid("the target is the source, or a part of it").in_file(path));
    }
    Ok(())
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
    refuse_device(from, path)?;
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
