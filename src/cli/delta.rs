//! `delta` and `apply`: incremental backup of chains.

use std::fs::File;
use std::io::{BufWriter, IsTerminal, Seek, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::chain::{ChainArgs, ParentArgs, generation};
use super::output::{OutputArgs, iec, print_json, print_line};
use super::progress::ProgressArgs;
use super::source::image_of;
use super::work::WorkArgs;
use crate::copy::delta::{self, Summary};
use crate::error::{Error, Result, ResultExt};
use crate::formats::places::directory_of;
use crate::formats::{self, Image};
use crate::names::Name;
use crate::progress::Progress;
use crate::storage::file::HostFs;
use crate::storage::staged::Staged;
use crate::storage::{Access, Appender, Host};

/// Arguments of `flatdisk delta`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  What changed since the last backup, into a file:
    flatdisk delta --since base.vhdx child.avhdx -o monday.delta
  The same onto a copy of base.vhdx on another machine:
    flatdisk delta --since base.vhdx child.avhdx | ssh backup flatdisk apply - /srv/copy.vhdx

Notes:
  The images must not be open for writing. Only what is stored above the ancestor is read; what is
  stored again but did not change is left out, and zeroes take no room.")]
pub struct DeltaArgs {
    /// The image, or its flat file in a mount.
    image: PathBuf,
    /// The ancestor of the image that the other side has.
    #[arg(long, value_name = "ANCESTOR")]
    since: PathBuf,
    /// Where the delta goes: a file that does not exist yet, or `-` for standard output.
    #[arg(short = 'o', value_name = "FILE", default_value = "-", hide_default_value = true)]
    file: PathBuf,
    /// Replace the file.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    chain: ChainArgs,
    /// Print nothing on success.
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    progress: ProgressArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Writes what changed after an ancestor.
pub fn delta(args: &DeltaArgs) -> Result<u8> {
    let host = HostFs::shared();
    let to_stdout = args.file.as_os_str() == "-";
    if to_stdout && (args.output.json() || std::io::stdout().is_terminal()) {
        let what = "the delta itself goes to standard output";
        return Err(Error::invalid(what).hint("-o FILE puts it into a file"));
    }
    let path = image_of(&args.image)?;
    let image = formats::open(&host, &path, &args.chain.options(Access::Read)?)?;
    let generation =
        generation(&host, &image.chain().collect::<Vec<_>>(), &image_of(&args.since)?)?;
    let bar = args.progress.start("comparing", args.quiet || to_stdout)?;
    if to_stdout {
        let mut out = BufWriter::with_capacity(1 << 20, std::io::stdout());
        delta::make(&image, generation, &mut out, &bar)?;
        return Ok(0);
    }
    let summary = into_file(args, &image, generation, &bar)?;
    drop(bar);
    let (name, file) = (path.display(), args.file.display());
    if args.output.json() {
        print_json(&json!({
            "image": Name::from(&*path),
            "since": Name::from(&*args.since),
            "filename": Name::from(&*args.file),
            "delta": summary,
        }))?;
    } else if !args.quiet {
        let (data, zeroes) = (iec(summary.data_bytes), iec(summary.zero_bytes));
        print_line(&format!("{name}: {data} of data and {zeroes} of zeroes changed; {file}"))?;
    }
    Ok(0)
}

/// Writes the delta to a file, which is there under its name only when it is complete and durable.
fn into_file(
    args: &DeltaArgs,
    image: &Image,
    generation: usize,
    progress: &dyn Progress,
) -> Result<Summary> {
    let staged = Staged::new(HostFs::shared(), &args.file, args.force)?;
    let make = || {
        let file = staged.create(&args.file)?;
        let mut out = BufWriter::with_capacity(1 << 20, Appender::new(&*file));
        let summary = delta::make(image, generation, &mut out, progress)?;
        out.flush().map_err(|e| Error::io("writing the delta", &e))?;
        drop(out);
        file.sync().map_err(|e| Error::io("flush", &e))?;
        Ok(summary)
    };
    let summary = make().map_err(|e: Error| staged.explain(e)).in_file(&args.file)?;
    staged.commit()?;
    Ok(summary)
}

/// Arguments of `flatdisk apply`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  Bring a copy of the ancestor up to date:
    flatdisk apply monday.delta /srv/copy.vhdx

Notes:
  A delta that is damaged, cut off, or for another disk is refused before anything is written.
  To that end one that comes through a pipe is kept in a file without name beside the target. Killed at any
  moment, the same command again completes it; until then the target is marked as neither the one nor
  the other.")]
pub struct ApplyArgs {
    /// What `delta` wrote; `-` is standard input.
    delta: PathBuf,
    /// A copy of the ancestor, or one that the deltas before this one were put onto.
    target: PathBuf,
    #[command(flatten)]
    parents: ParentArgs,
    #[command(flatten)]
    work: WorkArgs,
}

/// Puts a delta onto an image.
pub fn apply(args: &ApplyArgs) -> Result<u8> {
    let target = image_of(&args.target)?;
    let options = args.parents.options(Access::Write);
    let mut file = delta_file(&args.delta, &target)?;
    let bar = args.work.start("applying")?;
    let applied = delta::apply(&HostFs::shared(), &mut file, &target, &options, &bar)
        .map_err(|e| if e.path().is_none() { e.in_file(&args.delta) } else { e })?;
    drop(bar);
    if args.work.json() {
        print_json(&json!({
            "filename": Name::from(&*target),
            "already": applied.already,
            "resumed": applied.resumed,
            "written": applied.written,
            "identity": applied.header.after.to_string(),
            "delta": applied.summary,
        }))?;
    } else if !args.work.quiet() {
        let name = target.display();
        let done = match (applied.already, applied.resumed) {
            (true, _) => "the delta is on it already".to_owned(),
            (_, true) => format!("completed; {} written", iec(applied.written)),
            _ => format!("{} written", iec(applied.written)),
        };
        print_line(&format!("{name}: {done}"))?;
    }
    Ok(0)
}

/// The delta as a file that can be read twice.
fn delta_file(path: &Path, target: &Path) -> Result<File> {
    let failed = |e: std::io::Error| Error::io("reading the delta", &e).in_file(path);
    let mut pipe: Box<dyn std::io::Read> = if path.as_os_str() == "-" {
        Box::new(std::io::stdin().lock())
    } else {
        let file = File::open(path).map_err(failed)?;
        if file.metadata().map_err(failed)?.is_file() {
            return Ok(file);
        }
        Box::new(file)
    };
    let dir = directory_of(target);
    let spooling = |e: std::io::Error| {
        Error::io("keeping the delta beside the target", &e)
            .in_file(&dir)
            .hint("put it into a file somewhere else, and apply that")
    };
    let mut spool = tempfile::tempfile_in(&dir).map_err(spooling)?;
    std::io::copy(&mut pipe, &mut spool).map_err(spooling)?;
    spool.rewind().map_err(spooling)?;
    Ok(spool)
}
