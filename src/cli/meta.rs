//! `meta`: what an image says about itself.

use std::io::Read;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::chain::ParentArgs;
use super::holders::naming_them;
use super::output::{OutputArgs, complain, escaped, iec, print_bytes, print_json, print_line};
use super::progress::ProgressArgs;
use super::source::{file_of, image_of};
use crate::error::{Error, Result};
use crate::formats::meta::{self, Changes, Entry};
use crate::formats::ova::describe;
use crate::names::{Name, printable};
use crate::storage::Access;
use crate::storage::file::HostFs;

/// Bytes that are read of a description: more than one may have.
const MAX_TEXT: u64 = 8 << 20;

/// Arguments of `flatdisk meta`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  All that an image says about itself, and what can be set to what:
    flatdisk meta disk.vmdk
  Make a disk one for an IDE controller, with the geometry that goes with it:
    flatdisk meta disk.vmdk ddb.adapterType=ide
  A copy that is to be a disk of its own:
    cp --reflink=auto base.vhdx other.vhdx && flatdisk meta --new-id other.vhdx
  Another description for a machine in an archive, whose disks stay where they are:
    flatdisk meta vendor.ova --ovf | sed s/virtualbox-2.2/vmx-10/ > new.ovf
    flatdisk meta vendor.ova --ovf=new.ovf")]
pub struct MetaArgs {
    /// The image.
    image: PathBuf,
    /// Keys to show, and keys to set to a value.
    #[arg(value_name = "KEY[=VALUE]")]
    keys: Vec<String>,
    /// Give the disk new ids, as a copy needs that is used beside what it was made from. Refused while
    /// images stand on it, which know it by the old ones.
    #[arg(long)]
    new_id: bool,
    /// Show the description (OVF) in an archive; with =FILE put another one in, and its digest into the manifest. One
    /// that does not fit into the place of the old one makes the archive be written again; blocks of the disks are
    /// shared then where the host can. FILE is - for standard input.
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true,
          conflicts_with_all = ["keys", "new_id"])]
    ovf: Option<Option<PathBuf>>,
    /// Give a signed archive another description: its signature is left out.
    #[arg(long, requires = "ovf")]
    force: bool,
    #[command(flatten)]
    progress: ProgressArgs,
    #[command(flatten)]
    parents: ParentArgs,
    /// Print nothing when something was set.
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Shows and sets what an image says about itself.
pub fn meta(args: &MetaArgs) -> Result<u8> {
    match &args.ovf {
        None => of_image(args),
        Some(None) => show_description(args),
        Some(Some(from)) => put_description(args, from),
    }
}

fn show_description(args: &MetaArgs) -> Result<u8> {
    let path = file_of(&args.image)?;
    let text = describe::description(&HostFs::shared(), &path)?;
    match args.output.json() {
        true => {
            let text = String::from_utf8_lossy(&text);
            print_json(&json!({ "filename": Name::from(&*path), "ovf": text }))?;
        }
        false => print_bytes(&text)?,
    }
    Ok(0)
}

fn put_description(args: &MetaArgs, from: &Path) -> Result<u8> {
    let failed = |e: std::io::Error| Error::io("read", &e).in_file(from);
    let mut text = Vec::new();
    match from.as_os_str() == "-" {
        true => std::io::stdin().take(MAX_TEXT).read_to_end(&mut text),
        false => std::fs::File::open(from).map_err(failed)?.take(MAX_TEXT).read_to_end(&mut text),
    }
    .map_err(failed)?;
    let path = file_of(&args.image)?;
    // What a symlink leads to is replaced, not the symlink.
    let path = std::fs::canonicalize(&path).map_err(|e| Error::io("open", &e).in_file(&path))?;
    let bar = args.progress.start("copying", args.quiet)?;
    let done = describe::describe(&HostFs::shared(), &path, &text, args.force, &bar)?;
    drop(bar);
    let name = printable(path.display());
    for file in &done.missing {
        let file = printable(file);
        complain(format_args!("{name}: the description names {file}, which is not in the archive"));
    }
    if args.output.json() {
        print_json(&json!({
            "filename": Name::from(&*path),
            "in_place": done.in_place,
            "copied": done.copied,
            "shared": done.shared,
            "missing": done.missing,
        }))?;
    } else if !args.quiet {
        let how = match (done.in_place, done.shared) {
            (true, _) => "in place".to_owned(),
            (_, 0) => format!("it did not fit, so {} were copied", iec(done.copied)),
            (_, shared) => format!(
                "it did not fit: {} are shared with the old archive, {} were copied",
                iec(shared),
                iec(done.copied)
            ),
        };
        print_line(&format!("{name}: description replaced, {how}"))?;
    }
    Ok(0)
}

fn of_image(args: &MetaArgs) -> Result<u8> {
    let host = HostFs::shared();
    let options = args.parents.options(Access::Write);
    let image = image_of(&args.image)?;
    let set = args.keys.iter().filter_map(|key| key.split_once('='));
    let values: Vec<_> =
        set.map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned())).collect();
    let changes = Changes { values, new_id: args.new_id };
    let changing = changes.new_id || !changes.values.is_empty();
    if changing {
        meta::set(&host, &image, &changes, &options).map_err(naming_them)?;
    }
    let entries = meta::list(&host, &image, &options)?;
    let mut shown: Vec<&Entry> = Vec::new();
    for key in &args.keys {
        let key = key.split('=').next().unwrap_or_default().trim();
        let found = entries.iter().find(|entry| entry.key.eq_ignore_ascii_case(key));
        shown.push(found.ok_or_else(|| {
            let keys: Vec<_> = entries.iter().map(|entry| entry.key.as_str()).collect();
            let what = format!("there is no key `{key}`");
            Error::invalid(what).in_file(&image).hint(keys.join(", "))
        })?);
    }
    if args.keys.is_empty() {
        shown = entries.iter().collect();
    }
    if args.output.json() {
        let entries = shown
            .iter()
            .map(|entry| json!({ "key": entry.key, "value": entry.value, "can_be": entry.can_be }));
        let entries: Vec<_> = entries.collect();
        print_json(&json!({ "filename": Name::from(&*image), "metadata": entries }))?;
        return Ok(0);
    }
    if changing && args.quiet {
        return Ok(0);
    }
    let width = shown.iter().map(|entry| entry.key.len()).max().unwrap_or(0);
    for entry in shown {
        let value = escaped(entry.value.as_deref().unwrap_or("-"));
        let can_be = entry.can_be.iter().filter(|_| args.keys.is_empty());
        let can_be: String = can_be.map(|can_be| format!("  [{can_be}]")).collect();
        print_line(&format!("{:<width$}  {value}{can_be}", entry.key))?;
    }
    Ok(0)
}
