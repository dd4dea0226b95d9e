//! `resize`: another size of the virtual disk.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::chain::ParentArgs;
use super::output::{OutputArgs, iec, parse_size, print_json, print_line};
use super::progress::ProgressArgs;
use crate::error::{Error, Result};
use crate::formats::{self, resize};
use crate::storage::Access;
use crate::storage::file::HostFs;

/// Arguments of `flatdisk resize`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  Make a disk larger, by 20 GiB or to 100 GiB:
    flatdisk resize server.vhdx +20G
    flatdisk resize server.vhdx 100G
  See what that would change in the file:
    flatdisk resize --dry-run server.vhdx 100G")]
pub struct ResizeArgs {
    /// The image. Nobody may have it open, and no other image may stand on it.
    image: PathBuf,
    /// The new size, such as 100G; +20G or -20G for so much more or less. Suffixes are powers of 1024.
    #[arg(allow_hyphen_values = true)]
    size: NewSize,
    /// Permit a smaller disk. What lies behind its end is given up.
    #[arg(long)]
    shrink: bool,
    /// Show what would be changed, and change nothing.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    parents: ParentArgs,
    /// Print nothing on success.
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    progress: ProgressArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// A size as it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NewSize {
    Exactly(u64),
    More(u64),
    Less(u64),
}

impl std::str::FromStr for NewSize {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if let Some(more) = text.strip_prefix('+') {
            return parse_size(more).map(Self::More);
        }
        match text.strip_prefix('-') {
            Some(less) => parse_size(less).map(Self::Less),
            None => parse_size(text).map(Self::Exactly),
        }
    }
}

impl NewSize {
    /// The size in bytes of a disk that has `now` bytes.
    fn of(self, now: u64) -> Option<u64> {
        match self {
            Self::Exactly(size) => Some(size),
            Self::More(more) => now.checked_add(more),
            Self::Less(less) => now.checked_sub(less),
        }
    }
}

/// Makes a disk larger or smaller.
pub fn resize(args: &ResizeArgs) -> Result<u8> {
    let host = HostFs::shared();
    let options = args.parents.options(Access::Peek);
    let before = formats::open(&host, &args.image, &options)?.disk.size();
    let invalid = |what: String| Error::invalid(what).in_file(&args.image);
    let size = args
        .size
        .of(before)
        .ok_or_else(|| invalid(format!("a disk of {before} bytes cannot be changed by so much")))?;
    if size < before && !args.shrink {
        let what = format!("{size} bytes are less than the {before} that the disk has");
        return Err(invalid(what).hint("--shrink gives up what lies behind the new end"));
    }
    let bar = args.progress.start("resizing", args.quiet)?;
    let options = args.parents.options(Access::Write);
    let resized = resize::resize(&host, &args.image, &options, size, args.dry_run, &bar)?;
    drop(bar);
    if args.output.json() {
        print_json(&json!({
            "filename": args.image,
            "virtual_size_before": resized.before,
            "virtual_size": resized.after,
            "dry_run": args.dry_run,
            "changes": if args.dry_run { resized.changes } else { Vec::new() },
        }))?;
        return Ok(0);
    }
    if args.dry_run {
        resized.changes.iter().try_for_each(|change| print_line(&change.to_string()))?;
    }
    if !args.quiet {
        let would = if args.dry_run { "would be" } else { "is" };
        let (before, after) = (resized.before, resized.after);
        let line = match before == after {
            true => format!("{}: {} already", args.image.display(), iec(after)),
            false => format!(
                "{}: {would} {} ({after} bytes) now, was {}",
                args.image.display(),
                iec(after),
                iec(before)
            ),
        };
        print_line(&line)?;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_absolute_or_relative() {
        let size = |text: &str| text.parse::<NewSize>().unwrap().of(10 << 30);
        assert_eq!(size("20G"), Some(20 << 30));
        assert_eq!(size("+512"), Some((10 << 30) + 512));
        assert_eq!(size("-1G"), Some(9 << 30));
        assert_eq!(size("-11G"), None);
        assert!("min".parse::<NewSize>().is_err() && "+".parse::<NewSize>().is_err());
    }
}
