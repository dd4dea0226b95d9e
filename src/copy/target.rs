//! What a conversion makes, and whether that can be.

use std::path::Path;

use super::convert::{From, Options};
#[cfg(doc)]
use crate::error::ErrorKind;
use crate::error::{Error, Result};
use crate::formats::{self, CreateSpec, Format, vmdk};

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

/// Whether a stream-optimised VMDK is asked for.
pub(super) fn is_stream(format: &dyn Format, spec: &CreateSpec) -> bool {
    let subformat = spec.subformat.as_deref().unwrap_or_default();
    format.name() == "vmdk" && subformat.eq_ignore_ascii_case("streamOptimized")
}

pub(super) fn level(options: &Options<'_>) -> Result<u32> {
    let level = options.level.unwrap_or(vmdk::DEFAULT_LEVEL);
    match vmdk::LEVELS.contains(&level) {
        true => Ok(level),
        false => Err(Error::invalid(format!("compression level {level}")).hint("1 to 9")),
    }
}

/// Refuses a level of compression for what is not compressed.
pub(super) fn refuse_level(target: Target, spec: &CreateSpec, options: &Options<'_>) -> Result<()> {
    let compressed = matches!(target, Target::Image(format) if is_stream(format, spec));
    if compressed || options.level.is_none() {
        return Ok(());
    }
    let what = format!("a {} image is not compressed", target.name());
    Err(Error::invalid(what).hint("-O vmdk --subformat streamOptimized is"))
}

/// What exactly is to be made, after the source; refuses what the guest would not recognise.
pub(super) fn specification(
    from: &From<'_>,
    target: Target,
    options: &Options<'_>,
) -> Result<CreateSpec> {
    specify(from, target, options).map_err(|e| match from.image {
        Some(image) => e.in_file(&image.path),
        None => e,
    })
}

fn specify(from: &From<'_>, target: Target, options: &Options<'_>) -> Result<CreateSpec> {
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
