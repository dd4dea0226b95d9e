//! `map`, `commit` and `rebase`: images that stand on one another.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde_json::json;

use super::lifecycle;
use super::output::{OutputArgs, complain, iec, print_json, print_json_text, print_line};
use super::picture;
use super::source::image_of;
use super::work::WorkArgs;
use crate::disk::layers::{self, Content, Run};
use crate::error::{Error, Result};
use crate::formats::chain::{self, Merging};
use crate::formats::levels::{self, Levels};
use crate::formats::{self, Image, OpenOptions, Spelling};
use crate::names::Name;
use crate::storage::file::HostFs;
use crate::storage::{Access, Host};

/// Where parents may lie.
#[derive(Debug, Clone, Args)]
pub struct ParentArgs {
    /// Directories besides the image's own in which parents may lie.
    #[arg(long, visible_alias = "parent-dir", value_name = "DIR")]
    allow_parent: Vec<PathBuf>,
    /// A block device that a VMDK may name as its data, by the name that stands in it; a raw device mapping of ESX is
    /// on the one that is named. It is only read, unless --rw is given.
    #[arg(long, value_name = "DEVICE")]
    allow_device: Vec<PathBuf>,
    /// Let these devices be written, too. One that is mounted, or a part of another, is refused.
    #[arg(long, requires = "allow_device")]
    rw: bool,
}

impl ParentArgs {
    /// Options for opening an image and its parents.
    pub fn options(&self, access: Access) -> OpenOptions {
        let spelling = Spelling { allow_parent: "--parent-dir DIR", ..Spelling::default() };
        let allow_parent = self.allow_parent.clone();
        let allow_device = self.allow_device.clone();
        let write_devices = self.rw;
        let options = OpenOptions { allow_parent, allow_device, ..OpenOptions::new(access) };
        OpenOptions { write_devices, spelling, ..options }
    }

    /// The same for a mount, as its `-o` takes it.
    pub fn mount_options(&self) -> Vec<OsString> {
        let option = |word: &str, path: &PathBuf| {
            let mut option = OsString::from(word);
            option.push(path);
            option
        };
        let parents = self.allow_parent.iter().map(|dir| option("allow_parent=", dir));
        let devices = self.allow_device.iter().map(|device| option("allow_device=", device));
        parents.chain(devices).chain(self.rw.then(|| "rw_devices".into())).collect()
    }
}

/// Where the parents of one image are.
#[derive(Debug, Clone, Args)]
pub struct ChainArgs {
    /// The image's parent, instead of looking where the image says.
    #[arg(long, value_name = "FILE")]
    parent: Option<PathBuf>,
    #[command(flatten)]
    parents: ParentArgs,
}

impl ChainArgs {
    /// Whether a parent was named.
    pub fn named(&self) -> bool {
        self.parent.is_some()
    }

    /// Options for opening the image and its parents.
    pub fn options(&self, access: Access) -> Result<OpenOptions> {
        let parent = self.parent.as_deref().map(image_of).transpose()?;
        let options = self.parents.options(access);
        let spelling = Spelling { parent: "--parent FILE", ..options.spelling };
        Ok(OpenOptions { parent, spelling, ..options })
    }

    /// The same for a command that has `--force` too.
    pub fn options_or_force(&self, access: Access, force: bool) -> Result<OpenOptions> {
        let options = self.options(access)?;
        let spelling = Spelling { force: "--force", ..options.spelling };
        Ok(OpenOptions { force, spelling, ..options })
    }
}

/// Arguments of `flatdisk map`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  What is stored where:
    flatdisk map server.vhdx
  What a backup must copy after the one of an older generation:
    flatdisk map --since base.vhdx --json child.avhdx
  The disk and its file as a picture:
    flatdisk map --draw server.vhdx
    flatdisk map --svg server.svg server.vhdx

Notes:
  Pictures show the disk in the guest's order above the file in the host's. --svg gives data the colour of
  its place on the disk in both, so that blocks out of order are seen at once.")]
pub struct MapArgs {
    /// The image, or its flat file in a mount.
    image: PathBuf,
    /// Only what changed after this ancestor of the image.
    #[arg(long, value_name = "ANCESTOR")]
    since: Option<PathBuf>,
    /// Draw it on the terminal, a character for so many blocks.
    #[arg(long, conflicts_with_all = ["since", "json", "output", "svg"])]
    draw: bool,
    /// Draw it to this file, which is replaced.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["since", "json", "output"])]
    svg: Option<PathBuf>,
    /// Read on where the image contradicts itself, or its parent is missing or another.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    chain: ChainArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Lists what every part of a disk is, and which image of the chain holds it.
pub fn map(args: &MapArgs) -> Result<u8> {
    let host = HostFs::shared();
    let options = args.chain.options_or_force(Access::Peek, args.force)?;
    let image = formats::open(&host, &image_of(&args.image)?, &options)?;
    if args.draw {
        picture::draw(&image)?;
        return Ok(0);
    }
    if let Some(path) = &args.svg {
        picture::write_svg(&image, path)?;
        return Ok(0);
    }
    let images: Vec<&Image> = image.chain().collect();
    let layers = match &args.since {
        Some(ancestor) => generation(&host, &images, &image_of(ancestor)?)?,
        None => usize::MAX,
    };
    let mut printer = Printer { images, json: args.output.json(), lines: 0 };
    printer.begin()?;
    let mut print = |run: Run| {
        let changed = !matches!(run.content, Content::Unallocated);
        if changed || args.since.is_none() { printer.run(&run) } else { Ok(()) }
    };
    match args.output.json() {
        true => layers::runs_by_place(&image.disk, layers, &mut print)?,
        false => layers::runs(&image.disk, layers, &mut print)?,
    }
    printer.end()?;
    Ok(0)
}

/// Which ancestor of the first of `images` the file `ancestor` is: 1 for the parent.
pub(super) fn generation(
    host: &Arc<dyn Host>,
    images: &[&Image],
    ancestor: &Path,
) -> Result<usize> {
    let wanted = chain::file_identity(host, ancestor)?;
    for (index, image) in images.iter().enumerate().skip(1) {
        if chain::file_identity(host, &image.path)? == wanted {
            return Ok(index);
        }
    }
    let what = format!("{} is not among its ancestors", ancestor.display());
    Err(Error::invalid(what).in_file(&images[0].path).hint("`flatdisk info --chain` lists them"))
}

/// Prints runs one by one; a map may have more of them than memory has room for.
struct Printer<'a> {
    images: Vec<&'a Image>,
    json: bool,
    lines: u64,
}

impl Printer<'_> {
    fn begin(&self) -> Result<()> {
        match self.json {
            true => print_line("["),
            false => {
                print_line(&format!("{:>16} {:>16} {:<12} image", "offset", "length", "state"))
            }
        }
    }

    fn run(&mut self, run: &Run) -> Result<()> {
        let state = match run.content {
            Content::Data => "data",
            Content::Zero => "zero",
            Content::Unallocated => "unallocated",
            Content::Damaged => "damaged",
        };
        let held = !matches!(run.content, Content::Unallocated);
        let image = self.images.get(run.layer).filter(|_| held).map(|image| &image.path);
        self.lines += 1;
        if self.json {
            let mut entry = json!({
                "start": run.start,
                "length": run.len,
                "depth": run.layer,
                "present": held && run.content != Content::Damaged,
                "zero": matches!(run.content, Content::Zero | Content::Unallocated),
                "data": run.content == Content::Data,
                "compressed": run.content == Content::Data && run.place.is_none(),
                "state": state,
                "image": image.map(|path| Name::from(&**path)),
            });
            if let Some(place) = run.place {
                let disk = self.images.get(run.layer).map(|image| &image.disk);
                let file = disk.and_then(|disk| disk.file_path(place.file));
                entry["offset"] = place.at.into();
                entry["filename"] = file.map(|path| path.display().to_string()).into();
            }
            let separator = if self.lines == 1 { "  " } else { ", " };
            return print_json_text(&format!("{separator}{entry}"));
        }
        let image = image.map(|path| path.display().to_string()).unwrap_or_default();
        let line = format!("{:>16} {:>16} {state:<12} {image}", run.start, run.len);
        print_line(line.trim_end())
    }

    fn end(&self) -> Result<()> {
        if self.json { print_line("]") } else { Ok(()) }
    }
}

/// Arguments of `flatdisk commit`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  Keep what was written to a child, in its parent:
    flatdisk commit child.avhdx
  Make one image of a chain of many:
    flatdisk commit --to base.vhdx newest.avhdx
  Take one out of the middle of a chain:
    flatdisk commit --relink middle.avhdx")]
pub struct CommitArgs {
    /// The image to merge into its parent; it is removed.
    child: PathBuf,
    /// Merge everything into this ancestor: the child and all images between them, which are removed.
    #[arg(long, value_name = "ANCESTOR", conflicts_with_all = ["keep", "relink"])]
    to: Option<PathBuf>,
    /// Let the images that stand on the child stand on its parent.
    #[arg(long, conflicts_with_all = ["keep", "force"])]
    relink: bool,
    /// Keep the child: empty, and showing its parent.
    #[arg(long)]
    keep: bool,
    /// Go on although the parent has other children, which then do not match it any more.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    parents: ParentArgs,
    #[command(flatten)]
    work: WorkArgs,
}

/// Merges a child into its parent.
pub fn commit(args: &CommitArgs) -> Result<u8> {
    let options = args.parents.options(Access::Read);
    let how = Merging { over_siblings: args.force, keep: args.keep };
    let child = image_of(&args.child)?;
    let bar = args.work.start("merging")?;
    let host = HostFs::shared();
    let alone = |merged| (merged, vec![child.clone()], Vec::new());
    let several = |done: Levels| (done.merged, done.removed, done.relinked);
    let (merged, removed, relinked) = match &args.to {
        Some(to) => {
            let to = image_of(to)?;
            levels::merge_to(&host, &child, &to, &options, args.force, &bar).map(several)?
        }
        None if args.relink => levels::merge_middle(&host, &child, &options, &bar).map(several)?,
        None => chain::merge(&host, &child, &options, how, &bar).map(alone)?,
    };
    drop(bar);
    for sibling in &merged.siblings {
        let parent = merged.parent.display();
        complain(format_args!("{}: its parent {parent} has changed", sibling.display()));
    }
    for left in &merged.left {
        complain(format_args!("{}: left, it may belong to another disk", left.display()));
    }
    if args.work.json() {
        print_json(&json!({
            "child": Name::from(&*child),
            "parent": Name::from(&*merged.parent),
            "bytes": merged.bytes,
            "invalid_siblings": merged.siblings.into_iter().map(Name).collect::<Vec<_>>(),
            "left": merged.left.into_iter().map(Name).collect::<Vec<_>>(),
            "removed": removed.into_iter().filter(|_| !args.keep).map(Name).collect::<Vec<_>>(),
            "relinked": relinked.into_iter().map(Name).collect::<Vec<_>>(),
        }))?;
    } else if !args.work.quiet() {
        let parent = merged.parent.display();
        let names: Vec<_> = removed.iter().map(|image| image.display().to_string()).collect();
        let names = names.join(", ");
        print_line(&format!("merged {} of {names} into {parent}", iec(merged.bytes)))?;
        for image in &relinked {
            print_line(&format!("{} is a child of {parent} now", image.display()))?;
        }
    }
    Ok(0)
}

/// Arguments of `flatdisk rebase`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  Stand on another image, and still show the same:
    flatdisk rebase child.avhdx --parent other.vhdx
  The parent was moved, and holds what it held before:
    flatdisk rebase --unsafe child.avhdx --parent /new/place/base.vhdx")]
pub struct RebaseArgs {
    /// The image that gets another parent.
    child: PathBuf,
    /// The new parent; `none` does what `flatten` does.
    #[arg(long, value_name = "IMAGE")]
    parent: PathBuf,
    /// Change only the link: right where both parents hold the same, as after a move.
    #[arg(long = "unsafe")]
    link_only: bool,
    #[command(flatten)]
    parents: ParentArgs,
    #[command(flatten)]
    work: WorkArgs,
}

/// Gives a child another parent, or none.
pub fn rebase(args: &RebaseArgs) -> Result<u8> {
    if args.parent.as_os_str() == "none" {
        if args.link_only {
            let what = "without its parent the image would show something else";
            return Err(Error::invalid(what).in_file(&args.child).hint("leave --unsafe away"));
        }
        return lifecycle::flatten(&lifecycle::FlattenArgs {
            child: args.child.clone(),
            chain: ChainArgs { parent: None, parents: args.parents.clone() },
            work: args.work,
        });
    }
    let options = args.parents.options(Access::Write);
    let host = HostFs::shared();
    let only = args.link_only;
    let (child, parent) = (image_of(&args.child)?, image_of(&args.parent)?);
    let bar = args.work.start("copying")?;
    let copied = chain::rebase(&host, &child, &parent, &options, only, &bar)?;
    drop(bar);
    // As every later command opens it that is told of no directory.
    let alone = ParentArgs { allow_parent: Vec::new(), allow_device: Vec::new(), rw: false }
        .options(Access::Peek);
    let refusal = formats::open(&host, &child, &alone).err();
    if let Some(e) = &refusal {
        complain(format_args!("without further options, later commands refuse it: {e}"));
    }
    if args.work.json() {
        let refused = refusal.map(|e| e.to_string());
        print_json(&json!({
            "child": Name::from(&*child),
            "parent": Name::from(&*parent),
            "bytes": copied,
            "refused": refused,
        }))?;
    } else if !args.work.quiet() {
        let (child, parent) = (child.display(), parent.display());
        print_line(&format!("{child} is a child of {parent} now; {} copied", iec(copied)))?;
    }
    Ok(0)
}
