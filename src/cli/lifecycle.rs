//! `flatten`: images from their first snapshot to their end.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::chain::ChainArgs;
use super::output::{OutputArgs, iec, print_json, print_line};
use super::progress::ProgressArgs;
use super::source::image_of;
use crate::error::Result;
use crate::formats::flatten as flattening;
use crate::names::Name;
use crate::storage::Access;
use crate::storage::file::HostFs;

/// Arguments of `flatdisk flatten`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  Take the top of a chain elsewhere, without the rest:
    flatdisk flatten child.avhdx

Notes:
  A child needs as much room as its parents hold and it does not. Parents stay as they are.")]
pub struct FlattenArgs {
    /// The image that stands alone afterwards.
    pub child: PathBuf,
    /// Where the parents are.
    #[command(flatten)]
    pub chain: ChainArgs,
    /// Print nothing on success.
    #[arg(long, short)]
    pub quiet: bool,
    /// How far it is.
    #[command(flatten)]
    pub progress: ProgressArgs,
    /// How the result is printed.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Copies what the parents hold into a child, and drops its link.
pub fn flatten(args: &FlattenArgs) -> Result<u8> {
    let options = args.chain.options(Access::Write)?;
    let child = image_of(&args.child)?;
    let bar = args.progress.start("copying", args.quiet)?;
    let copied = flattening::flatten(&HostFs::shared(), &child, &options, &bar)?;
    drop(bar);
    if args.output.json() {
        print_json(&json!({ "filename": Name::from(&*child), "bytes": copied }))?;
    } else if !args.quiet {
        print_line(&format!("{} stands alone now; {} copied", child.display(), iec(copied)))?;
    }
    Ok(0)
}
