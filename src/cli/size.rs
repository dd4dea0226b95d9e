//! `resize`: another size of the virtual disk.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde_json::json;

use super::chain::ParentArgs;
use super::holders::naming_them;
use super::output::{iec, parse_size, print_json, print_line};
use super::source::image_of;
use super::work::WorkArgs;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::formats;
use crate::formats::resize::{self, Resized};
use crate::storage::file::HostFs;
use crate::storage::{Access, Host};
use crate::volumes::relocate::Primary;
use crate::volumes::{self, Volumes};

/// Arguments of `flatdisk resize`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  Make a disk larger, by 20 GiB or to 100 GiB:
    flatdisk resize server.vhdx +20G
    flatdisk resize server.vhdx 100G
  As small as its partitions allow, with the second partition table at the new end:
    flatdisk resize --shrink --move-gpt server.vhdx min
  See what that would change in the file:
    flatdisk resize --dry-run server.vhdx 100G")]
pub struct ResizeArgs {
    /// The image, or its flat file in a mount. Nobody may have it open, and no other image may stand on it.
    image: PathBuf,
    /// The new size, such as 100G; +20G or -20G for so much more or less; `min` for the end of what the
    /// partition table or the file system claims. Suffixes are powers of 1024.
    #[arg(allow_hyphen_values = true)]
    size: NewSize,
    /// Permit a smaller disk. What lies behind its end is given up; where a partition or a file system
    /// reaches there, the command refuses.
    #[arg(long)]
    shrink: bool,
    /// With --shrink: cut off partitions and file systems, too.
    #[arg(long, requires = "shrink")]
    force: bool,
    /// Move the second copy of a GPT to the end of the disk, where programs look for it.
    #[arg(long)]
    move_gpt: bool,
    /// Show what would be changed, and change nothing.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    parents: ParentArgs,
    #[command(flatten)]
    work: WorkArgs,
}

/// A size as it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NewSize {
    Exactly(u64),
    More(u64),
    Less(u64),
    Minimum,
}

impl std::str::FromStr for NewSize {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if text == "min" {
            return Ok(Self::Minimum);
        }
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
    /// The size in bytes of a disk that has `now` bytes, of which `used` are in use as far as that is known.
    fn of(self, now: u64, used: Option<u64>) -> Option<u64> {
        match self {
            Self::Minimum => used,
            Self::Exactly(size) => Some(size),
            Self::More(more) => now.checked_add(more),
            Self::Less(less) => now.checked_sub(less),
        }
    }
}

/// Why nobody knows how small a disk may become.
pub(super) const UNKNOWN: &str =
    "neither a partition table nor a file system tells how much is in use";

/// What a disk holds that its size matters to.
pub(super) struct Contents {
    volumes: Volumes,
    primary: Option<Primary>,
}

impl Contents {
    pub(super) fn of(disk: &Disk) -> Result<Self> {
        Ok(Self { volumes: volumes::volumes(disk)?, primary: Primary::read(disk)? })
    }

    /// How many bytes from the beginning the partitions, or else the file system, claim; `None` if nothing
    /// tells.
    pub(super) fn used(&self) -> Option<u64> {
        let table = self.volumes.table.as_ref();
        let used = match table {
            Some(table) => {
                let ends = self.volumes.partitions.iter().map(|p| p.start.saturating_add(p.size));
                let copy = self.primary.as_ref().map_or(0, Primary::copy_len);
                let least = u64::from(table.sector_size);
                ends.max().unwrap_or(0).checked_add(copy)?.max(copy + least)
            }
            None => self.volumes.content.as_ref().filter(|c| c.recognised())?.size?,
        };
        used.checked_next_multiple_of(4096)
    }

    /// What is to be done now, in the guest or on a device made of the image.
    fn next_steps(&self, size: u64, grown: bool) -> Vec<String> {
        let mut steps = Vec::new();
        if self.primary.as_ref().is_some_and(|primary| !primary.is_at_end(size)) {
            let what = "the second copy of the partition table is not at the end of the disk";
            steps.push(format!(
                "{what}: --move-gpt moves it, or sgdisk --move-second-header DEVICE"
            ));
        }
        if !grown {
            return steps;
        }
        let last = self.volumes.partitions.iter().filter(|p| !p.extended).max_by_key(|p| p.start);
        let (content, device) = match last {
            Some(last) => {
                steps.push(format!(
                    "growpart DEVICE {} makes the last partition larger",
                    last.number
                ));
                (last.content.as_ref(), format!("partition {}", last.number))
            }
            None => (self.volumes.content.as_ref(), "DEVICE".to_owned()),
        };
        let grow = match content.and_then(|content| content.type_name) {
            Some(name @ ("ext2" | "ext3" | "ext4")) => {
                format!("{name} on {device}: e2fsck -f, then resize2fs")
            }
            Some("xfs") => format!("xfs on {device}: mount it, then xfs_growfs"),
            Some("btrfs") => {
                format!("btrfs on {device}: mount it, then btrfs filesystem resize max")
            }
            Some("ntfs") => format!("ntfs on {device}: ntfsresize, or Windows' disk management"),
            Some("LVM2_member") => {
                format!("LVM on {device}: pvresize, then lvresize --resizefs")
            }
            Some("crypto_LUKS") => format!("LUKS on {device}: open it, then cryptsetup resize"),
            _ => return steps,
        };
        steps.push(grow);
        steps
    }
}

/// Makes a disk larger or smaller.
pub fn resize(args: &ResizeArgs) -> Result<u8> {
    let host = HostFs::shared();
    let path = &image_of(&args.image)?;
    let peek = args.parents.options(Access::Peek);
    let image = formats::open(&host, path, &peek)?;
    let before = image.disk.size();
    let contents = Contents::of(&image.disk)?;
    drop(image);
    let size = wanted(args, path, before, &contents)?;
    let bar = args.work.start("resizing")?;
    let options = args.parents.options(Access::Write);
    let moves = args.move_gpt && !args.dry_run;
    if moves && size < before {
        // Refused here is refused before anything is written.
        resize::resize(&host, path, &options, size, true, &()).map_err(naming_them)?;
        move_gpt(&host, args, path, size)?;
    }
    let resized = resize::resize(&host, path, &options, size, args.dry_run, &bar);
    let resized = resized.map_err(naming_them)?;
    if moves && size >= before {
        move_gpt(&host, args, path, size)?;
    }
    drop(bar);
    let steps = match args.dry_run {
        true => contents.next_steps(size, size > before),
        false => {
            let image = formats::open(&host, path, &peek)?;
            Contents::of(&image.disk)?.next_steps(size, size > before)
        }
    };
    print(args, path, &resized, &steps)?;
    Ok(0)
}

/// The size that is asked for, if it is one that may be.
fn wanted(args: &ResizeArgs, image: &Path, before: u64, contents: &Contents) -> Result<u64> {
    let invalid = |what: String| Error::invalid(what).in_file(image);
    let used = contents.used();
    let size = args.size.of(before, used).ok_or_else(|| match args.size {
        NewSize::Minimum => {
            invalid(UNKNOWN.to_owned()).hint("`flatdisk volumes` shows what is known; name a size")
        }
        _ => invalid(format!("a disk of {before} bytes cannot be changed by so much")),
    })?;
    if args.size == NewSize::Minimum && size >= before {
        return Ok(before);
    }
    if size < before && !args.shrink {
        let what = format!("{size} bytes are less than the {before} that the disk has");
        return Err(invalid(what).hint("--shrink gives up what lies behind the new end"));
    }
    // Without its second copy a GPT's partitions may reach to the end.
    let copy = contents.primary.as_ref().filter(|_| !args.move_gpt).map_or(0, Primary::copy_len);
    let least = used.unwrap_or(0).saturating_sub(copy);
    if size < before && size < least && !args.force {
        let what =
            format!("partitions or file systems reach up to byte {least}, behind the new end");
        let hint = "make them smaller first; `flatdisk volumes` shows them; --force cuts them off";
        return Err(invalid(what).hint(hint));
    }
    Ok(size)
}

/// Moves the second copy of the image's GPT, if it has one, to the end of its first `size` bytes.
fn move_gpt(host: &Arc<dyn Host>, args: &ResizeArgs, path: &Path, size: u64) -> Result<()> {
    let image = formats::open(host, path, &args.parents.options(Access::Write))?;
    if let Some(why) = &image.read_only {
        return Err(Error::new(ErrorKind::ReadOnly, why.clone()).in_file(path));
    }
    let Some(primary) = Primary::read(&image.disk)? else {
        let what = "the disk has no GPT whose first copy is intact";
        return Err(Error::invalid(what).in_file(path));
    };
    if !primary.is_at_end(size) {
        let moved = primary.move_copy(&image.disk, size);
        moved.and_then(|()| image.disk.close()).map_err(|e| e.in_file(path))?;
    }
    Ok(())
}

fn print(args: &ResizeArgs, image: &Path, resized: &Resized, steps: &[String]) -> Result<()> {
    if args.work.json() {
        return print_json(&json!({
            "filename": image,
            "virtual_size_before": resized.before,
            "virtual_size": resized.after,
            "dry_run": args.dry_run,
            "changes": if args.dry_run { &resized.changes[..] } else { &[] },
            "next_steps": steps,
        }));
    }
    if args.dry_run {
        resized.changes.iter().try_for_each(|change| print_line(&change.to_string()))?;
    }
    if args.work.quiet() {
        return Ok(());
    }
    let would = if args.dry_run { "would be" } else { "is" };
    let (before, after) = (resized.before, resized.after);
    print_line(&match before == after {
        true => format!("{}: {} already", image.display(), iec(after)),
        false => format!(
            "{}: {would} {} ({after} bytes) now, was {}",
            image.display(),
            iec(after),
            iec(before)
        ),
    })?;
    steps.iter().try_for_each(|step| print_line(&format!("  next: {step}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_absolute_or_relative() {
        let size = |text: &str| text.parse::<NewSize>().unwrap().of(10 << 30, Some(5 << 30));
        assert_eq!(size("20G"), Some(20 << 30));
        assert_eq!(size("+512"), Some((10 << 30) + 512));
        assert_eq!(size("-1G"), Some(9 << 30));
        assert_eq!(size("-11G"), None);
        assert_eq!(size("min"), Some(5 << 30));
        assert!("most".parse::<NewSize>().is_err() && "+".parse::<NewSize>().is_err());
    }
}
