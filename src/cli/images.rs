//! `create`: making images.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::chain::ParentArgs;
use super::output::{iec, mind_extension, parse_size, print_json, print_line};
use super::source::image_of;
use super::spec::SpecArgs;
use super::work::DoneArgs;
use crate::copy::in_place;
use crate::disk::map::Geometry;
use crate::error::{Error, Result};
use crate::formats::{self, CreateSpec, Format, Image, Preallocation, vmdk, whole};
use crate::names::Name;
use crate::storage::Access;
use crate::storage::file::HostFs;

/// What a child has from its parent.
const CHOSEN_BY_PARENT: [&str; 6] =
    ["sector_size", "physical_sector_size", "adapter", "profile", "preallocation", "hw_version"];
/// Subformats that are allocated as a whole when they are made, unless told otherwise.
const WHOLE: [&str; 4] = ["fixed", "monolithicFlat", "twoGbMaxExtentFlat", "vmfs"];

/// Arguments of `flatdisk create`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  A VHDX that grows as it is filled:
    flatdisk create disk.vhdx 64G
  A VHD for Azure, which wants fixed ones:
    flatdisk create --for azure disk.vhd 30G
  A VMDK of a raw disk, which stays as it is:
    flatdisk create --wrap disk.raw disk.vmdk
  A child that stores only what changes:
    flatdisk create --parent disk.vhdx child.avhdx

Notes:
  Fixed and flat images get all their space on the host when they are made, without writing,
  so that a full host says so at once. With --preallocation off they take space only as they
  are written to, and a full host shows then.")]
pub struct CreateArgs {
    /// The image to make; it must not exist.
    image: PathBuf,
    /// Size of the virtual disk, such as 64G. Suffixes are powers of 1024. May also stand before IMAGE.
    #[arg(value_name = "SIZE", required_unless_present_any = ["parent", "size", "wrap"])]
    size_given: Option<PathBuf>,
    /// The same as SIZE.
    #[arg(long, short, value_parser = parse_size, conflicts_with = "size_given")]
    size: Option<u64>,
    /// Make a child of this image: a disk of the same contents that stores only what changes.
    #[arg(long, value_name = "IMAGE", conflicts_with_all = CHOSEN_BY_PARENT)]
    parent: Option<PathBuf>,
    /// Make a VMDK of this raw disk, which stays as it is: a descriptor that names it. Both lie in one
    /// folder.
    #[arg(long, value_name = "RAW", conflicts_with_all = ["parent", "size", "size_given", "subformat", "profile"])]
    wrap: Option<PathBuf>,
    /// Format: vhd, vhdx or vmdk [default: by the image's extension].
    #[arg(long, short = 'O')]
    format: Option<String>,
    #[command(flatten)]
    spec: SpecArgs,
    #[command(flatten)]
    parents: ParentArgs,
    #[command(flatten)]
    done: DoneArgs,
}

impl CreateArgs {
    /// The image to make and the size that was asked for, whichever of the two was named first.
    fn named(&self) -> Result<(&Path, Option<u64>)> {
        let Some(second) = &self.size_given else { return Ok((&self.image, self.size)) };
        let size = |text: &Path| parse_size(text.to_str().unwrap_or_default());
        match (size(second), size(&self.image)) {
            (Ok(size), _) => Ok((&self.image, Some(size))),
            (Err(_), Ok(size)) => Ok((second, Some(size))),
            (Err(what), Err(_)) => Err(Error::invalid(what).hint("create IMAGE SIZE")),
        }
    }
}

/// Makes a new image.
pub fn create(args: &CreateArgs) -> Result<u8> {
    let (image, size) = args.named()?;
    let mut spec = args.spec.spec(size.unwrap_or(0), Preallocation::Off);
    let format = match (args.spec.apply_profile(args.format.as_deref(), &mut spec)?, &args.format) {
        (Some(format), _) => Some(format),
        (None, Some(name)) => Some(formats::by_name(name)?),
        (None, None) => formats::by_extension(image),
    };
    if let Some(raw) = &args.wrap {
        return wrap(args, image, format, raw, spec);
    }
    if let Some(parent) = &args.parent {
        return create_child(args, image, format, parent, &spec);
    }
    let format = format.ok_or_else(|| {
        Error::invalid("the extension says no format").in_file(image).hint("use --format")
    })?;
    let subformat = spec.subformat.as_deref().or(format.subformats().first().copied());
    let whole = |known: &&str| subformat.is_some_and(|s| s.eq_ignore_ascii_case(known));
    if !args.spec.preallocation_given() && WHOLE.iter().any(whole) {
        // So that a host without room says so now, and not to the guest.
        spec.preallocation = Preallocation::Falloc;
    }
    mind_extension(image, format.name());
    whole::create_whole(format, &HostFs::shared(), image, &spec)?;
    created(args, image, format, subformat.unwrap_or_default(), spec.size, None)
}

/// Makes a descriptor for the raw disk at `raw`.
fn wrap(
    args: &CreateArgs,
    image: &Path,
    format: Option<&'static dyn Format>,
    raw: &Path,
    mut spec: CreateSpec,
) -> Result<u8> {
    let format = format.filter(|format| format.name() == "vmdk").ok_or_else(|| {
        let what = "only a VMDK names a raw disk";
        Error::invalid(what).in_file(image).hint("convert --in-place makes a VHD of one")
    })?;
    let host = HostFs::shared();
    // Held until the end, so that nobody is writing to it.
    let (_raw, size) = in_place::open_raw(&host, raw, false)?;
    if !size.is_multiple_of(Geometry::SECTOR) {
        let what = format!("{size} bytes are no multiple of a sector");
        return Err(Error::invalid(what).in_file(raw));
    }
    spec.size = size;
    vmdk::wrap(&*host, image, raw, &spec)?;
    created(args, image, format, &format!("over {}", raw.display()), size, None)
}

/// Says what was made; `what` is the subformat, or whose child.
fn created(
    args: &CreateArgs,
    image: &Path,
    format: &dyn Format,
    what: &str,
    size: u64,
    parent: Option<&Image>,
) -> Result<u8> {
    if args.done.json() {
        print_json(&json!({
            "filename": Name::from(image),
            "format": format.name(),
            "virtual_size": size,
            "parent": parent.map(|parent| Name::from(&*parent.path)),
        }))?;
    } else if !args.done.quiet() {
        let (image, format) = (image.display(), format.name().to_uppercase());
        print_line(&format!("created {image}: {format} {what}, {}", iec(size)))?;
    }
    Ok(0)
}

/// Makes a child of the image at `parent`, which nobody may be writing to.
fn create_child(
    args: &CreateArgs,
    image: &Path,
    format: Option<&'static dyn Format>,
    parent: &Path,
    spec: &CreateSpec,
) -> Result<u8> {
    let options = args.parents.options(Access::Read);
    let parent = formats::open(&HostFs::shared(), &image_of(parent)?, &options)?;
    let size = parent.disk.size();
    if spec.size != 0 && spec.size != size {
        let what = format!("the parent {} has {size} bytes", parent.path.display());
        return Err(Error::invalid(what).in_file(image).hint("leave the size away"));
    }
    let format = match format {
        Some(format) => format,
        None => formats::by_name(parent.info.format)?,
    };
    if let Some(asked) = &spec.subformat
        && format.name() != "vmdk"
        && !asked.eq_ignore_ascii_case("differencing")
    {
        let what = format!("a child of a {} is differencing", format.name().to_uppercase());
        return Err(Error::invalid(what).in_file(image).hint("leave --subformat away"));
    }
    mind_extension(image, format.name());
    whole::create_whole_child(format, &HostFs::shared(), image, &parent, spec)?;
    let what = format!("child of {}", parent.path.display());
    created(args, image, format, &what, size, Some(&parent))
}
