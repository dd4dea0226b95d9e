//! `snapshot`: an image is kept as it is, and goes on in a child.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use clap::Args;
use jiff::{Timestamp, ZonedDateTime};
use serde_json::json;

use super::chain::ParentArgs;
use super::holders::naming_them;
use super::lifecycle::print_branch;
use super::output::{complain, iec, print_json, print_line};
use super::source::image_of;
use super::work::DoneArgs;
use crate::error::{Error, Result};
use crate::formats::snapshot;
use crate::formats::tree::{self, Member, Stand};
use crate::names::Name;
use crate::storage::Access;
use crate::storage::file::HostFs;

/// Arguments of `flatdisk snapshot`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  Keep a disk as it is before an upgrade of the guest, which is shut down:
    flatdisk snapshot server.vhdx before-upgrade
  See what there is, and go back:
    flatdisk snapshot server.vhdx --list
    flatdisk snapshot server.vhdx --revert before-upgrade
  Keep what was done, and have one image again:
    flatdisk commit server.vhdx && flatdisk rename server-before-upgrade.vhdx server.vhdx

Notes:
  server.vhdx becomes server-NAME.vhdx, and a new child of it is server.vhdx, with the same owner and
  mode. Nobody may have the image open for writing; who reads it goes on. Killed at any moment, the
  command leaves a disk under the name, and can be given again.")]
pub struct SnapshotArgs {
    /// The image.
    image: PathBuf,
    /// What the image as it is now is called: IMAGE-NAME [default: date and time].
    #[arg(conflicts_with_all = ["list", "revert"])]
    name: Option<String>,
    /// Show the images that stand on one another, with times and sizes; the image itself is marked.
    #[arg(long, conflicts_with = "revert")]
    list: bool,
    /// Go back to a snapshot: what was written since is gone. Others that it stands on stay.
    #[arg(long, value_name = "NAME")]
    revert: Option<String>,
    #[command(flatten)]
    parents: ParentArgs,
    #[command(flatten)]
    done: DoneArgs,
}

/// Freezes an image, shows what it stands on, or goes back.
pub fn snapshot(args: &SnapshotArgs) -> Result<u8> {
    let image = image_of(&args.image)?;
    if args.list {
        return list(args, &image);
    }
    let host = HostFs::shared();
    let options = args.parents.options(Access::Read);
    if let Some(name) = &args.revert {
        let frozen = snapshot::revert(&host, &image, name, &options).map_err(naming_them)?;
        if args.done.json() {
            print_json(&json!({ "image": Name::from(&*image), "frozen": Name::from(&*frozen) }))?;
        } else if !args.done.quiet() {
            print_line(&format!("{} is as {} again", image.display(), frozen.display()))?;
        }
        return Ok(0);
    }
    let now = ZonedDateTime::now().strftime("%Y%m%d-%H%M%S").to_string();
    let taken = snapshot::take(&host, &image, args.name.as_deref(), &now, &options);
    let taken = taken.map_err(naming_them)?;
    if let Some(remark) = &taken.remark {
        complain(format_args!("{}: {remark}", taken.frozen.display()));
    }
    if args.done.json() {
        print_json(&json!({
            "image": Name::from(&*image),
            "frozen": Name::from(&*taken.frozen),
            "remark": taken.remark,
        }))?;
    } else if !args.done.quiet() {
        let (image, frozen) = (image.display(), taken.frozen.display());
        print_line(&format!("{image} is kept as {frozen}, and goes on in a child of it"))?;
    }
    Ok(0)
}

/// Shows the images that stand on one another, the one at `image` among them.
fn list(args: &SnapshotArgs, image: &Path) -> Result<u8> {
    let dir = image.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let options = args.parents.options(Access::Peek);
    let members = tree::members(&HostFs::shared(), dir, &options)?;
    let current = members.iter().position(|member| member.path.file_name() == image.file_name());
    let current =
        current.ok_or_else(|| Error::invalid("no image is to be found").in_file(image))?;
    let below = |index: usize| match members[index].stand {
        Stand::On(parent) => Some(parent),
        _ => None,
    };
    // Damaged images may stand on themselves.
    let mut seen = HashSet::new();
    let down = std::iter::successors(Some(current), |index| below(*index));
    let head = down.take_while(|index| seen.insert(*index)).last().unwrap_or(current);
    if args.done.json() {
        let related = |index: &usize| {
            let mut seen = HashSet::new();
            let mut down = std::iter::successors(Some(*index), |index| below(*index));
            down.any(|at| at == head || !seen.insert(at))
        };
        let all = (0..members.len()).filter(related);
        let all = all.map(|index| entry(&members, index, index == current));
        return print_json(&json!({ "images": all.collect::<Vec<_>>() })).map(|()| 0);
    }
    let mut shown = vec![false; members.len()];
    print_branch(&members, head, &mut shown, &|member| {
        let is_current = member.path == members[current].path;
        described(member, is_current)
    })?;
    Ok(0)
}

fn modified(member: &Member) -> Option<SystemTime> {
    std::fs::metadata(&member.path).and_then(|meta| meta.modified()).ok()
}

fn described(member: &Member, current: bool) -> String {
    let name = member.path.file_name().unwrap_or_default().display();
    let time = modified(member).and_then(|time| ZonedDateTime::try_from(time).ok());
    let time = time.map(|t| t.strftime("%Y-%m-%d %H:%M:%S").to_string()).unwrap_or_default();
    let missing = match &member.stand {
        Stand::Missing(why) => format!("; PARENT NOT FOUND: {why}"),
        Stand::Outside(parent) => format!("; stands on {}", parent.display()),
        _ => String::new(),
    };
    let mark = if current { "  <- current" } else { "" };
    format!("{name}  {time}  {}{missing}{mark}", iec(member.disk_size))
}

fn entry(members: &[Member], index: usize, current: bool) -> serde_json::Value {
    let member = &members[index];
    let parent = match &member.stand {
        Stand::On(parent) => Some(Name::from(&*members[*parent].path)),
        Stand::Outside(parent) => Some(Name::from(&**parent)),
        _ => None,
    };
    let time = modified(member).and_then(|time| Timestamp::try_from(time).ok());
    json!({
        "filename": Name::from(&*member.path),
        "parent": parent,
        "modified": time.map(|time| time.to_string()),
        "virtual_size": member.info.virtual_size,
        "actual_size": member.disk_size,
        "current": current,
    })
}
