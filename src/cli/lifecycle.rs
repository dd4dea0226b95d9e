//! `flatten` and `tree`: what images stand on.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::chain::{ChainArgs, ParentArgs};
use super::output::{OutputArgs, iec, print_json, print_line};
use super::source::image_of;
use super::work::WorkArgs;
use crate::error::Result;
use crate::formats::flatten as flattening;
use crate::formats::tree::{self as trees, Member, Stand};
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
    /// What it says.
    #[command(flatten)]
    pub work: WorkArgs,
}

/// Copies what the parents hold into a child, and drops its link.
pub fn flatten(args: &FlattenArgs) -> Result<u8> {
    let options = args.chain.options(Access::Write)?;
    let child = image_of(&args.child)?;
    let bar = args.work.start("copying")?;
    let copied = flattening::flatten(&HostFs::shared(), &child, &options, &bar)?;
    drop(bar);
    if args.work.json() {
        print_json(&json!({ "filename": Name::from(&*child), "bytes": copied }))?;
    } else if !args.work.quiet() {
        print_line(&format!("{} stands alone now; {} copied", child.display(), iec(copied)))?;
    }
    Ok(0)
}

/// Arguments of `flatdisk tree`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  What stands on what in a folder:
    flatdisk tree /srv/images

Notes:
  Behind every name: format, kind, size of the disk, and the space that the files take on the host.
  Images whose parent is not found come last.")]
pub struct TreeArgs {
    /// A folder, or an image whose folder is meant.
    #[arg(default_value = ".")]
    place: PathBuf,
    #[command(flatten)]
    parents: ParentArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Shows which images of a folder stand on which.
pub fn tree(args: &TreeArgs) -> Result<u8> {
    let dir = match args.place.is_dir() {
        true => args.place.clone(),
        false => {
            let image = image_of(&args.place)?;
            image.parent().map(Path::to_owned).unwrap_or_default()
        }
    };
    let dir = if dir.as_os_str().is_empty() { PathBuf::from(".") } else { dir };
    let members = trees::members(&HostFs::shared(), &dir, &args.parents.options(Access::Peek))?;
    if args.output.json() {
        let entries: Vec<_> = members.iter().map(|member| entry(member, &members)).collect();
        print_json(&json!({ "images": entries }))?;
        return Ok(0);
    }
    let mut shown = vec![false; members.len()];
    let heads = |orphans: bool| {
        let members = members.iter().enumerate();
        let heads = members.filter(move |(_, m)| match m.stand {
            Stand::On(_) => false,
            Stand::Missing(_) => orphans,
            _ => !orphans,
        });
        heads.map(|(index, _)| index).collect::<Vec<_>>()
    };
    for index in heads(false).into_iter().chain(heads(true)) {
        print_branch(&members, index, &mut shown, &described)?;
    }
    // Whatever is left stands on itself.
    for index in 0..members.len() {
        if !shown[index] {
            print_branch(&members, index, &mut shown, &described)?;
        }
    }
    Ok(0)
}

/// Prints an image and all that stands on it, each as `describe` says.
pub(super) fn print_branch(
    members: &[Member],
    head: usize,
    shown: &mut [bool],
    describe: &dyn Fn(&Member) -> String,
) -> Result<()> {
    // Image, what the line begins with, and what lines of its children do.
    let mut open = vec![(head, String::new(), String::new())];
    while let Some((index, first, rest)) = open.pop() {
        if std::mem::replace(&mut shown[index], true) {
            continue;
        }
        print_line(&format!("{first}{}", describe(&members[index])))?;
        let children = members.iter().enumerate().filter(|(_, m)| m.stand == Stand::On(index));
        let children: Vec<usize> = children.map(|(child, _)| child).collect();
        for (place, child) in children.iter().enumerate().rev() {
            let last = place + 1 == children.len();
            let (branch, trunk) = if last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
            open.push((*child, format!("{rest}{branch}"), format!("{rest}{trunk}")));
        }
    }
    Ok(())
}

fn described(member: &Member) -> String {
    let name = member.path.file_name().unwrap_or_default().display();
    let info = &member.info;
    let stand = match &member.stand {
        Stand::Outside(parent) => format!("; stands on {}", parent.display()),
        Stand::Missing(why) => format!("; PARENT NOT FOUND: {why}"),
        _ => String::new(),
    };
    let (size, stored) = (iec(info.virtual_size), iec(member.disk_size));
    let format = info.format.to_uppercase();
    format!("{name}  {format} {}, {size}, {stored} on the host{stand}", info.subformat)
}

fn entry(member: &Member, members: &[Member]) -> serde_json::Value {
    let (state, parent, why) = match &member.stand {
        Stand::On(index) => ("child", members.get(*index).map(|m| Name::from(&*m.path)), None),
        Stand::Outside(path) => ("outside", Some(Name::from(&**path)), None),
        Stand::Missing(why) => ("orphan", None, Some(why)),
        Stand::Alone => ("alone", None, None),
    };
    json!({
        "filename": Name::from(&*member.path),
        "format": member.info.format,
        "subformat": member.info.subformat,
        "virtual_size": member.info.virtual_size,
        "actual_size": member.disk_size,
        "state": state,
        "parent": parent,
        "parent_as_written": member.info.parent,
        "missing": why,
    })
}
