//! `meta`: what an image says about itself.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::chain::ParentArgs;
use super::holders::naming_them;
use super::output::{OutputArgs, escaped, print_json, print_line};
use super::source::image_of;
use crate::error::{Error, Result};
use crate::formats::meta::{self, Changes, Entry};
use crate::names::Name;
use crate::storage::Access;
use crate::storage::file::HostFs;

/// Arguments of `flatdisk meta`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  All that an image says about itself, and what can be set to what:
    flatdisk meta disk.vmdk
  Make a disk one for an IDE controller, with the geometry that goes with it:
    flatdisk meta disk.vmdk ddb.adapterType=ide
  A copy that is to be a disk of its own:
    cp --reflink=auto base.vhdx other.vhdx && flatdisk meta --new-id other.vhdx")]
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
