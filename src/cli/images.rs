//! `create`: making images.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::chain::ParentArgs;
use super::output::{OutputArgs, iec, parse_size, print_json, print_line};
use super::source::image_of;
use crate::error::{Error, Result};
use crate::formats::{self, CreateSpec, Format, Image};
use crate::storage::Access;
use crate::storage::file::HostFs;

/// What a child has from its parent.
const CHOSEN_BY_PARENT: [&str; 4] = ["subformat", "sector_size", "physical_sector_size", "adapter"];

/// Arguments of `flatdisk create`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  A VHDX that grows as it is filled:
    flatdisk create --size 64G disk.vhdx
  A VHD for Azure, which wants fixed ones:
    flatdisk create --size 30G --subformat fixed disk.vhd
  A child that stores only what changes:
    flatdisk create --parent disk.vhdx child.avhdx

Notes:
  Fixed and flat images are made sparse: they take space on the host only as they are
  written to, and a full host shows then.")]
pub struct CreateArgs {
    /// The image to make; it must not exist.
    image: PathBuf,
    /// Size of the virtual disk, such as 64G. Suffixes are powers of 1024.
    #[arg(long, short, value_parser = parse_size, required_unless_present = "parent")]
    size: Option<u64>,
    /// Make a child of this image: a disk of the same contents that stores only what changes.
    #[arg(long, value_name = "IMAGE", conflicts_with_all = CHOSEN_BY_PARENT)]
    parent: Option<PathBuf>,
    /// Format: vhd, vhdx or vmdk [default: by the image's extension].
    #[arg(long, short = 'O')]
    format: Option<String>,
    /// Subformat [default: dynamic for vhd and vhdx, monolithicSparse for vmdk].
    #[arg(long)]
    subformat: Option<String>,
    /// Bytes per block or VMDK grain, a power of two [default: 2M, above 1T of vhdx 32M; 64K for vmdk; a
    /// vhdx child has its parent's].
    ///
    /// From 4K to 256M for vhd, 1M to 256M for vhdx, 4K to 32M for sparse vmdk; fixed vhd and flat vmdk have
    /// none.
    #[arg(long, value_parser = parse_size)]
    block_size: Option<u64>,
    /// Logical sector size in bytes, 512 or 4096 (vhdx) [default: 512].
    #[arg(long, value_name = "BYTES")]
    sector_size: Option<u32>,
    /// Physical sector size in bytes, 512 or 4096 (vhdx) [default: 4096].
    #[arg(long, value_name = "BYTES")]
    physical_sector_size: Option<u32>,
    /// Size of the log (vhdx), a multiple of 1M [default: 1M].
    #[arg(long, value_parser = parse_size)]
    log_size: Option<u64>,
    /// Adapter type (vmdk): ide, buslogic, lsilogic or legacyESX [default: lsilogic].
    #[arg(long)]
    adapter: Option<String>,
    #[command(flatten)]
    parents: ParentArgs,
    /// Print nothing on success.
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Makes a new image.
pub fn create(args: &CreateArgs) -> Result<u8> {
    let format = match &args.format {
        Some(name) => Some(formats::by_name(name)?),
        None => formats::by_extension(&args.image),
    };
    let spec = CreateSpec {
        subformat: args.subformat.clone(),
        size: args.size.unwrap_or(0),
        block_size: args.block_size,
        logical_sector: args.sector_size,
        physical_sector: args.physical_sector_size,
        log_size: args.log_size,
        adapter: args.adapter.clone(),
    };
    if let Some(parent) = &args.parent {
        return create_child(args, format, parent, &spec);
    }
    let format = format.ok_or_else(|| {
        Error::invalid("the extension says no format").in_file(&args.image).hint("use --format")
    })?;
    formats::create(format, &HostFs, &args.image, &spec)?;
    let subformat = spec.subformat.as_deref().or(format.subformats().first().copied());
    created(args, format, subformat.unwrap_or_default(), spec.size, None)
}

/// Says what was made; `what` is the subformat, or whose child.
fn created(
    args: &CreateArgs,
    format: &dyn Format,
    what: &str,
    size: u64,
    parent: Option<&Image>,
) -> Result<u8> {
    if args.output.json() {
        print_json(&json!({
            "filename": args.image,
            "format": format.name(),
            "virtual_size": size,
            "parent": parent.map(|parent| &parent.path),
        }))?;
    } else if !args.quiet {
        let (image, format) = (args.image.display(), format.name().to_uppercase());
        print_line(&format!("created {image}: {format} {what}, {}", iec(size)))?;
    }
    Ok(0)
}

/// Makes a child of the image at `parent`, which nobody may be writing to.
fn create_child(
    args: &CreateArgs,
    format: Option<&'static dyn Format>,
    parent: &Path,
    spec: &CreateSpec,
) -> Result<u8> {
    let options = args.parents.options(Access::Read);
    let parent = formats::open(&HostFs::shared(), &image_of(parent)?, &options)?;
    let size = parent.disk.size();
    if args.size.is_some_and(|wanted| wanted != size) {
        let what = format!("the parent {} has {size} bytes", parent.path.display());
        return Err(Error::invalid(what).in_file(&args.image).hint("leave --size away"));
    }
    let format = match format {
        Some(format) => format,
        None => formats::by_name(parent.info.format)?,
    };
    formats::create_child(format, &HostFs, &args.image, &parent, spec)?;
    let what = format!("child of {}", parent.path.display());
    created(args, format, &what, size, Some(&parent))
}
