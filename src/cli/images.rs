//! `create`: making images.

use std::path::PathBuf;

use clap::Args;

use super::output::{iec, parse_size, print_line};
use crate::error::{Error, Result};
use crate::formats::{self, CreateSpec};
use crate::storage::file::HostFs;

/// Arguments of `flatdisk create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// The image to make; it must not exist.
    image: PathBuf,
    /// Size of the virtual disk, such as 64G. Suffixes are powers of 1024.
    #[arg(long, short, value_parser = parse_size)]
    size: u64,
    /// Format: vhd, vhdx or vmdk [default: by the image's extension].
    #[arg(long, short = 'O')]
    format: Option<String>,
    /// Subformat [default: dynamic for vhd and vhdx, monolithicSparse for vmdk].
    #[arg(long)]
    subformat: Option<String>,
    /// Bytes per block [default: 2M for vhd; by size for vhdx; vmdk grains are always 64K].
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
    /// Print nothing on success.
    #[arg(long, short)]
    quiet: bool,
}

/// Makes a new image.
pub fn create(args: &CreateArgs) -> Result<u8> {
    let format = match &args.format {
        Some(name) => formats::by_name(name)?,
        None => formats::by_extension(&args.image).ok_or_else(|| {
            Error::invalid("the extension says no format").in_file(&args.image).hint("use --format")
        })?,
    };
    let spec = CreateSpec {
        subformat: args.subformat.clone(),
        size: args.size,
        block_size: args.block_size,
        logical_sector: args.sector_size,
        physical_sector: args.physical_sector_size,
        log_size: args.log_size,
        adapter: args.adapter.clone(),
    };
    formats::create(format, &HostFs, &args.image, &spec)?;
    if !args.quiet {
        let subformat = spec.subformat.as_deref().or(format.subformats().first().copied());
        print_line(&format!(
            "created {}: {} {}, {}",
            args.image.display(),
            format.name().to_uppercase(),
            subformat.unwrap_or_default(),
            iec(args.size)
        ))?;
    }
    Ok(0)
}
