//! `volumes`: partition tables, file systems and other contents of disks.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::chain::ParentArgs;
use super::output::{OutputArgs, escaped, iec, print_json, print_line};
use super::source;
use crate::error::Result;
use crate::formats::{self, OpenOptions};
use crate::storage::Access;
use crate::storage::file::HostFs;
use crate::volumes::os::{self, System};
use crate::volumes::{self, Content, Free, Kind, Partition, TableKind, Volumes};

/// Arguments of `flatdisk volumes`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  What is on a disk:
    flatdisk volumes server.vhdx
  Where the second partition begins, for a script:
    flatdisk volumes --json server.vhdx | jq '.images[0].partitions[] | select(.number == 2).start'")]
pub struct VolumesArgs {
    /// The images.
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// Also show how much of each file system is used, as far as it says.
    #[arg(long)]
    usage: bool,
    /// Also tell which systems are installed: what os-release says of a Linux, and the registry of a Windows, on ext,
    /// NTFS or FAT.
    #[arg(long)]
    os: bool,
    /// Read on where the image contradicts itself, or its parent is missing or another.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    parents: ParentArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// One image of the answer.
#[derive(Serialize)]
struct Entry<'a> {
    filename: &'a PathBuf,
    #[serde(flatten)]
    volumes: Volumes,
    /// With `--os`.
    #[serde(skip_serializing_if = "Option::is_none")]
    systems: Option<Vec<System>>,
}

/// Lists what is on disks. One that cannot be opened does not hide the others.
pub fn volumes(args: &VolumesArgs) -> Result<u8> {
    let host = HostFs::shared();
    let options = OpenOptions { force: args.force, ..args.parents.options(Access::Peek) };
    if args.os {
        super::process::panics_are_errors();
    }
    let look = if args.usage { volumes::with_usage } else { volumes::volumes };
    let images = source::images_of(&args.images)?;
    let mut entries = Vec::new();
    let mut status = 0;
    for filename in &images {
        let image = formats::open(&host, filename, &options);
        let looked = image.and_then(|image| {
            let volumes = look(&image.disk)?;
            let systems = args.os.then(|| os::systems(&image.disk, &volumes));
            Ok(Entry { filename, volumes, systems })
        });
        match looked {
            Ok(entry) => entries.push(entry),
            Err(e) => {
                super::output::complain(e.in_file(filename));
                status = 1;
            }
        }
    }
    if args.output.json() {
        print_json(&serde_json::json!({ "images": entries }))?;
        return Ok(status);
    }
    for (i, entry) in entries.iter().enumerate() {
        if i > 0 {
            print_line("")?;
        }
        print_entry(entry, args.usage)?;
    }
    Ok(status)
}

fn print_entry(entry: &Entry<'_>, usage: bool) -> Result<()> {
    let volumes = &entry.volumes;
    let mut title = vec![iec(volumes.size)];
    match &volumes.table {
        None => title.push("no partition table".to_owned()),
        Some(table) => {
            let kind = if table.kind == TableKind::Gpt { "GPT" } else { "MBR" };
            let id = table.uuid.as_ref().map(|id| format!(" {id}")).unwrap_or_default();
            title.push(format!("{kind}{id}"));
        }
    }
    title.push(format!("sectors of {} bytes", volumes.sector_size));
    let name = escaped(&entry.filename.to_string_lossy());
    print_line(&format!("{name}: {}", title.join(", ")))?;
    let mut warnings = volumes.warnings.clone();
    let mut rows = Vec::new();
    if let Some(content) = &volumes.content {
        rows.push((0, row("-", 0, volumes.size, content_words(content, usage))));
        warnings.extend(content.warnings.clone());
    }
    for partition in &volumes.partitions {
        let text = row(&partition.number.to_string(), partition.start, partition.size, {
            partition_words(partition, usage)
        });
        rows.push((partition.start, text));
        let content = partition.content.iter().flat_map(|content| &content.warnings);
        let number = partition.number;
        let told = partition.warnings.iter().chain(content);
        warnings.extend(told.map(|text| format!("partition {number}: {text}")));
    }
    let free = volumes.free.iter();
    rows.extend(
        free.map(|Free { start, size, .. }| (*start, row("", *start, *size, "free".into()))),
    );
    rows.sort_by_key(|(start, _)| *start);
    if !rows.is_empty() {
        print_line(&format!("{:>5} {:>16} {:>10}  content", "", "start", "size"))?;
    }
    rows.iter().try_for_each(|(_, row)| print_line(row))?;
    entry.systems.iter().flatten().try_for_each(|system| print_line(&system_words(system)))?;
    if entry.systems.as_ref().is_some_and(Vec::is_empty) {
        print_line("  system: none found on what can be read here")?;
    }
    warnings.iter().try_for_each(|text| print_line(&format!("  warning: {}", escaped(text))))
}

fn system_words(system: &System) -> String {
    let name = match (&system.name, &*system.family) {
        (Some(name), _) => escaped(name),
        (None, "windows") => "Windows (its registry does not say which)".to_owned(),
        (None, family) => escaped(family),
    };
    let version = system.version.iter().filter(|_| system.family == "windows");
    let version: String = version.map(|version| format!(" ({})", escaped(version))).collect();
    let name = name + &version;
    match system.partition {
        Some(number) => format!("  system: {name}, root on partition {number}"),
        None => format!("  system: {name}"),
    }
}

fn row(number: &str, start: u64, size: u64, words: String) -> String {
    format!("{number:>5} {start:>16} {:>10}  {words}", iec(size)).trim_end().to_owned()
}

/// What is in a partition, and what the table says it is.
fn partition_words(partition: &Partition, usage: bool) -> String {
    let mut words = match &partition.content {
        Some(content) => content_words(content, usage),
        None => String::new(),
    };
    let mut table = vec![partition.type_name.unwrap_or(&partition.type_id).to_owned()];
    table.extend(partition.name.iter().map(|name| format!("`{}`", escaped(name))));
    table.extend(partition.bootable.then(|| "bootable".to_owned()));
    table.extend(partition.read_only.then(|| "read-only".to_owned()));
    if !words.is_empty() {
        words.push_str("  ");
    }
    format!("{words}[{}]", table.join(", "))
}

fn content_words(content: &Content, usage: bool) -> String {
    let mut words = vec![match (content.type_name, content.kind) {
        (Some(name), _) => name.to_owned(),
        (None, Kind::Empty) => "empty".to_owned(),
        (None, _) => format!("unknown: {}", content.head.as_deref().unwrap_or_default()),
    }];
    words.extend(content.label.iter().map(|label| format!("`{}`", escaped(label))));
    words.extend(content.uuid.iter().map(|uuid| escaped(uuid)));
    if usage && let (Some(size), Some(free)) = (content.size, content.free) {
        words.push(format!("{} used, {} free", iec(size - free.min(size)), iec(free)));
    }
    words.join(" ")
}
