//! `compact`: unused space goes back to the host.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde_json::{Value, json};

use super::chain::ParentArgs;
use super::holders::naming_them;
use super::output::{complain, iec, print_json, print_line};
use super::progress::Bar;
use super::source::file_of;
use super::trim;
use super::work::WorkArgs;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::compact::{self, Compacted, Compacting};
use crate::formats::{self, OpenOptions};
use crate::progress::Progress;
use crate::storage::file::HostFs;
use crate::storage::{Access, Host};
use crate::volumes::{self, Content};

/// Arguments of `flatdisk compact`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  Give back what the guest does not use, after fstrim or zeroes in the guest:
    flatdisk compact server.vhdx
  All images of a folder but children; see first what that would win:
    flatdisk compact --dry-run /srv/images
  The guest did not trim; its file systems can be mounted here:
    sudo flatdisk compact --trim server.vhdx
  Give back only what is free already, without reading the blocks:
    flatdisk compact --quick ext4.vhdx

Exit status:
  0   success, also where nothing was won
  1   an image could not be compacted, or wrong usage")]
pub struct CompactArgs {
    /// Images, their flat files in a mount, and folders of images; nobody may have them open. Of a folder children are left out.
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// Give up only what is free already: the blocks are not read.
    #[arg(long)]
    quick: bool,
    /// Lay the blocks in the order of the disk, too.
    #[arg(long)]
    defragment: bool,
    /// Before, trim the file systems of the disk, which are mounted for that: root only, and only for images
    /// whose file systems are trusted.
    #[arg(long, conflicts_with_all = ["quick", "dry_run"])]
    trim: bool,
    /// Show what would be won, and change nothing.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    parents: ParentArgs,
    #[command(flatten)]
    work: WorkArgs,
}

/// What became of the arguments.
#[derive(Default)]
struct Outcome {
    images: Vec<Value>,
    skipped: Vec<Value>,
    failed: bool,
    won: u64,
}

/// Compacts images.
pub fn compact(args: &CompactArgs) -> Result<u8> {
    let host = HostFs::shared();
    let bar = args.work.start("compacting")?;
    let mut outcome = Outcome::default();
    let (images, skipped) = find(&host, args)?;
    for (path, why) in skipped {
        if args.work.json() {
            outcome.skipped.push(json!({ "filename": path, "reason": why }));
        } else {
            complain(format_args!("{}: left out: {why}", path.display()));
        }
    }
    for path in &images {
        match one(&host, path, args, &bar) {
            Ok(done) => {
                let stored = done.allocated.unwrap_or(done.allocated_before - won(&done));
                let free = match args.trim {
                    true => None,
                    false => free_but_stored(&host, path, args, stored),
                };
                outcome.add(path, &done, free, args)?;
            }
            Err(e) if e.kind() == ErrorKind::Cancelled => {
                return Err(e.in_file(path).hint("what was done stays; run it again to go on"));
            }
            Err(e) => {
                outcome.failed = true;
                complain(e);
            }
        }
    }
    drop(bar);
    if args.work.json() {
        print_json(&json!({
            "images": outcome.images,
            "skipped": outcome.skipped,
            "dry_run": args.dry_run,
            "won": outcome.won,
        }))?;
    } else if images.len() > 1 && !args.work.quiet() {
        let would = if args.dry_run { "would be won" } else { "won" };
        print_line(&format!("{} {would} together", iec(outcome.won)))?;
    }
    Ok(u8::from(outcome.failed))
}

fn one(host: &Arc<dyn Host>, path: &Path, args: &CompactArgs, bar: &Bar) -> Result<Compacted> {
    if args.trim {
        for left in trim::trim(path, &args.parents.mount_options())? {
            complain(format_args!("{}: not trimmed: {left}", path.display()));
        }
        let progress: &dyn Progress = bar;
        progress.go_on()?;
    }
    let options = args.parents.options(Access::Write);
    let how = Compacting { quick: args.quick, defragment: args.defragment, dry_run: args.dry_run };
    compact::compact(host, path, &options, how, bar).map_err(naming_them)
}

impl Outcome {
    fn add(
        &mut self,
        path: &Path,
        done: &Compacted,
        free: Option<u64>,
        args: &CompactArgs,
    ) -> Result<()> {
        let won = won(done);
        self.won += won;
        if args.work.json() {
            let mut entry = json!({ "filename": path, "won": won, "free_but_stored": free });
            if let (Value::Object(entry), Ok(Value::Object(more))) =
                (&mut entry, serde_json::to_value(done))
            {
                entry.extend(more);
            }
            self.images.push(entry);
            return Ok(());
        }
        if args.work.quiet() {
            return Ok(());
        }
        print_line(&describe(path, done, won, args))?;
        match free {
            None => Ok(()),
            Some(free) => print_line(&format!(
                "  next: {} are stored that its file systems say are free: fstrim in the guest, or --trim as root, \
                 gives them up",
                iec(free)
            )),
        }
    }
}

/// Bytes of `stored` ones that the file systems of an image say are free, if they are worth a word.
fn free_but_stored(
    host: &Arc<dyn Host>,
    path: &Path,
    args: &CompactArgs,
    stored: u64,
) -> Option<u64> {
    const LEAST: u64 = 16 << 20;
    let image = formats::open(host, path, &args.parents.options(Access::Peek)).ok()?;
    if image.parent.is_some() {
        // What of it lies in which file nobody tells.
        return None;
    }
    let volumes = volumes::volumes(&image.disk).ok()?;
    let trims = |content: &Content| {
        let known = ["ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "ntfs", "vfat", "exfat"];
        content.type_name.is_some_and(|name| known.contains(&name))
    };
    let used = |size: u64, content: Option<&Content>| match content {
        Some(Content { size: Some(size), free: Some(free), .. }) => size.saturating_sub(*free),
        _ => size,
    };
    let parts = volumes.partitions.iter().filter(|part| !part.extended);
    let mut parts: Vec<_> = parts.map(|part| (part.size, part.content.as_ref())).collect();
    if volumes.table.is_none() {
        parts.push((image.disk.size(), volumes.content.as_ref()));
    }
    let used =
        parts.iter().map(|(size, content)| used(*size, *content)).fold(0, u64::saturating_add);
    let free = stored.saturating_sub(used);
    let any = parts.iter().filter_map(|(_, content)| *content).any(trims);
    (any && free >= LEAST.max(stored / 20)).then_some(free)
}

/// Bytes that the host gets back.
pub(super) fn won(done: &Compacted) -> u64 {
    match done.allocated {
        Some(allocated) => done.allocated_before.saturating_sub(allocated),
        // Where nothing was changed the length tells, and what of it would become holes.
        None => match done.length_before - done.length {
            0 => done.zeroes.min(done.allocated_before),
            shorter => shorter.min(done.allocated_before),
        },
    }
}

fn describe(path: &Path, done: &Compacted, won: u64, args: &CompactArgs) -> String {
    let name = path.display();
    let would = if args.dry_run { "would be " } else { "" };
    let (before, after) = (done.length_before, done.length);
    let mut line = match won {
        // The last sectors may go, which is nothing to speak of.
        0 if iec(before) == iec(after) => format!("{name}: {}, nothing {would}won", iec(after)),
        _ if before == after => {
            format!("{name}: {} of {} {would}won", iec(won), iec(done.allocated_before))
        }
        // It was only sparse before, and is short now.
        0 => format!("{name}: {} → {}", iec(before), iec(after)),
        _ => format!("{name}: {} → {}, {} {would}won", iec(before), iec(after), iec(won)),
    };
    if args.defragment {
        let (before, after) = (percent(done.fragmentation_before), percent(done.fragmentation));
        line += &format!("; fragmentation {before} → {after}");
    }
    line
}

/// Thousandths, to be read.
pub(super) fn percent(thousandths: u64) -> String {
    format!("{}.{}%", thousandths / 10, thousandths % 10)
}

/// What is left out of a folder, and why.
type Skipped = Vec<(PathBuf, String)>;

/// The images that the arguments stand for.
fn find(host: &Arc<dyn Host>, args: &CompactArgs) -> Result<(Vec<PathBuf>, Skipped)> {
    let (mut images, mut skipped) = (Vec::new(), Skipped::new());
    for path in &args.images {
        if !path.is_dir() {
            images.push(file_of(path)?);
            continue;
        }
        let peek = args.parents.options(Access::Peek);
        let mut files = host.list(path)?;
        files.sort();
        for file in files.into_iter().filter(|file| !file.is_dir()) {
            match reason(host, &file, &peek) {
                None => images.push(file),
                Some(why) => skipped.push((file, why)),
            }
        }
    }
    Ok((images, skipped))
}

/// Why a file of a folder is left out, if it is.
fn reason(host: &Arc<dyn Host>, path: &Path, peek: &OpenOptions) -> Option<String> {
    match formats::open::open_alone(host, path, peek) {
        Ok(opened) if opened.parent.is_some() => {
            Some("it is a child of another image; name it to compact it".to_owned())
        }
        // What is wrong with an image is for compacting to tell.
        Ok(_) => None,
        Err(e) if e.kind() == ErrorKind::NotThisFormat => Some("it is no image".to_owned()),
        Err(e) if formats::by_extension(path).is_none() => Some(e.what().to_owned()),
        Err(e) => match lone(&e) {
            true => Some(e.what().to_owned()),
            false => None,
        },
    }
}

/// Whether an error says that a file is but an extent of a disk.
fn lone(e: &Error) -> bool {
    e.kind() == ErrorKind::Unsupported && e.what().contains("one extent of a disk")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_won_is_what_the_host_gets_back() {
        let done = Compacted {
            length_before: 100 << 20,
            length: 40 << 20,
            allocated_before: 90 << 20,
            ..Compacted::default()
        };
        assert_eq!(won(&done), 60 << 20);
        assert_eq!(won(&Compacted { allocated: Some(40 << 20), ..done.clone() }), 50 << 20);
        assert_eq!(won(&Compacted { length: 100 << 20, zeroes: 5 << 20, ..done }), 5 << 20);
    }
}
