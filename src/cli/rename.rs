//! `rename` and `delete`: images with all their files.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::chain::ParentArgs;
use super::holders::naming_them;
use super::output::{print_json, print_line};
use super::source::image_of;
use super::work::DoneArgs;
use crate::error::Result;
use crate::formats::lifecycle;
use crate::names::Name;
use crate::storage::Access;
use crate::storage::file::HostFs;

/// Arguments of `flatdisk rename`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  A disk in several files, which name one another:
    flatdisk rename disk.vmdk server.vmdk
  A parent, with what stands on it:
    flatdisk rename --children base.vhdx windows-base.vhdx

Notes:
  Nobody may have the image open. Its ids stay, so that other programs know it as before. Only images
  beside it are found to stand on it.")]
pub struct RenameArgs {
    /// The image.
    old: PathBuf,
    /// Its new name, in the same folder.
    new: PathBuf,
    /// Let the images that stand on it name it by the new name.
    #[arg(long)]
    children: bool,
    #[command(flatten)]
    parents: ParentArgs,
    #[command(flatten)]
    done: DoneArgs,
}

/// Gives an image another name.
pub fn rename(args: &RenameArgs) -> Result<u8> {
    let old = image_of(&args.old)?;
    // A bare name can mean nothing but the image's own folder.
    let bare = args.new.components().count() == 1;
    let new = match args.new.file_name() {
        Some(name) if bare => old.with_file_name(name),
        _ => args.new.clone(),
    };
    let host = HostFs::shared();
    let options = args.parents.options(Access::Write);
    let renamed = lifecycle::rename(&host, &old, &new, args.children, &options);
    let children = renamed.map_err(naming_them)?;
    if args.done.json() {
        let children = children.into_iter().map(Name).collect::<Vec<_>>();
        let (old, new) = (Name::from(&*old), Name::from(&*new));
        print_json(&json!({ "old": old, "new": new, "children": children }))?;
    } else if !args.done.quiet() {
        print_line(&format!("{} is called {} now", old.display(), new.display()))?;
        for child in &children {
            print_line(&format!("{} follows", child.display()))?;
        }
    }
    Ok(0)
}

/// Arguments of `flatdisk delete`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  See what belongs to a disk, and remove it:
    flatdisk delete --dry-run disk.vmdk
    flatdisk delete disk.vmdk

Notes:
  Removed are the named file and those that are the disk's own: disk-flat.vmdk, disk-s001.vmdk,
  disk-ctk.vmdk and the like beside disk.vmdk. What the image stands on, and whatever else it names,
  stays.")]
pub struct DeleteArgs {
    /// The image.
    image: PathBuf,
    /// Show what would be removed, and remove nothing.
    #[arg(long)]
    dry_run: bool,
    /// Also if other images stand on it, or if it does not open.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    parents: ParentArgs,
    #[command(flatten)]
    done: DoneArgs,
}

/// Removes an image with all its files.
pub fn delete(args: &DeleteArgs) -> Result<u8> {
    let image: &Path = &args.image;
    let options = args.parents.options(Access::Write);
    let host = HostFs::shared();
    let gone = lifecycle::delete(&host, image, args.force, args.dry_run, &options);
    let gone = gone.map_err(naming_them)?;
    if args.done.json() {
        let files = gone.into_iter().map(Name).collect::<Vec<_>>();
        print_json(&json!({ "files": files, "removed": !args.dry_run }))?;
    } else if args.dry_run || !args.done.quiet() {
        let done = if args.dry_run { "would remove" } else { "removed" };
        gone.iter().try_for_each(|file| print_line(&format!("{done} {}", file.display())))?;
    }
    Ok(0)
}
