//! `info` and `check`: looking at images. Nothing is changed unless `check` is told to repair.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::Value;

use super::chain::ChainArgs;
use super::layout::Layout;
use super::output::{Failure, OutputArgs, iec, print_json, print_line, report};
use super::progress::ProgressArgs;
use super::source::{file_of, images_of};
use super::structures::{StructuresAnswer, StructuresEntry};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::ova;
use crate::formats::plan::Change;
use crate::formats::profile::azure_objections;
use crate::formats::{self, Finding, ImageInfo, Repair, Report, Scope, Severity, open};
use crate::names::printable;
use crate::storage::Access;
use crate::storage::file::HostFs;

/// Arguments of `flatdisk info`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  The virtual size in bytes, for a script:
    flatdisk info --json server.vhdx | jq .images[0].virtual_size
  A snapshot and all that it stands on:
    flatdisk info --chain server_1A2B.avhdx
  Whether `compact` or `resize` would be worth while:
    flatdisk info --layout server.vhdx
  Every header, table and log entry of an image that does not open:
    flatdisk info --structures broken.vhdx
  All images of a folder; what is none is told, and the exit status is 1:
    flatdisk info /srv/images/*")]
pub struct InfoArgs {
    /// Images, or their flat files in a mount.
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// Also show the image's parents, nearest first; implied by --parent.
    #[arg(long)]
    chain: bool,
    #[command(flatten)]
    parents: ChainArgs,
    /// Also how the blocks lie and how small the disk may become: this reads all tables.
    #[arg(long)]
    layout: bool,
    /// Instead, every header, footer, table, log entry, metadata item and marker with its offset, raw
    /// values and the state of its checksum. Works on damaged images too.
    #[arg(long, conflicts_with_all = ["chain", "layout", "parent"])]
    structures: bool,
    /// With `--structures`: the most structures that are listed of an image.
    #[arg(long, value_name = "N", requires = "structures", default_value_t = 1000)]
    limit: usize,
    /// Read on where the image contradicts itself, or its parent is missing or another.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// One image of `info`'s answer.
#[derive(Serialize)]
struct ImageEntry {
    #[serde(serialize_with = "crate::names::serialize")]
    filename: PathBuf,
    #[serde(flatten)]
    info: ImageInfo,
    /// Host space of all the image's files.
    allocated: u64,
    /// Why it cannot be written, if it cannot.
    read_only: Option<String>,
    /// With `--layout`.
    #[serde(skip_serializing_if = "Option::is_none")]
    layout: Option<Layout>,
}

/// Shows what images say about themselves. Of several, one that does not open keeps none of the others
/// from being shown.
pub fn info(args: &InfoArgs) -> Result<u8> {
    if args.structures {
        return structures(args);
    }
    let mut entries = Vec::new();
    let mut failures = Vec::new();
    let mut missing = Vec::new();
    let mut images = Vec::new();
    for image in &args.images {
        match images_of(std::slice::from_ref(image)) {
            Ok(found) => images.extend(found),
            Err(e) if args.images.len() == 1 => return Err(e),
            Err(e) => failures.push(e),
        }
    }
    for image in &images {
        match entries_of(args, image) {
            Ok((found, lacks)) => {
                entries.extend(found);
                missing.extend(lacks);
            }
            Err(e) if images.len() == 1 && args.images.len() == 1 => return Err(e),
            Err(e) => failures.push(e),
        }
    }
    failures.iter().for_each(|e| report(e, false));
    if args.output.json() {
        let mut answer = serde_json::json!({ "images": entries });
        if !failures.is_empty() {
            let failures: Vec<_> = failures.iter().map(Failure::from).collect();
            answer["failures"] = serde_json::json!(failures);
        }
        if let Some(e) = missing.first() {
            answer["missing"] = e.to_string().into();
        }
        print_json(&answer)?;
    } else {
        for (i, entry) in entries.iter().enumerate() {
            if i > 0 {
                print_line("")?;
            }
            print_entry(entry)?;
        }
    }
    missing.iter().for_each(|e| report(e, false));
    Ok(u8::from(!failures.is_empty() || !missing.is_empty()))
}

/// Lists the structures of images, and goes on past those that cannot be opened.
fn structures(args: &InfoArgs) -> Result<u8> {
    let options = args.parents.options(Access::Peek)?;
    let mut entries = Vec::new();
    let mut failures = Vec::new();
    let images = images_of(&args.images)?;
    for path in &images {
        match StructuresEntry::of(path, &options, args.limit) {
            Ok(entry) => entries.push(entry),
            Err(e) if images.len() == 1 => return Err(e),
            Err(e) => failures.push(e),
        }
    }
    failures.iter().for_each(|e| report(e, false));
    if args.output.json() {
        let failures = failures.iter().map(Failure::from).collect();
        print_json(&StructuresAnswer { images: entries, failures })?;
    } else {
        entries.iter().try_for_each(StructuresEntry::print)?;
    }
    Ok(u8::from(!failures.is_empty()))
}

/// What there is to say about one of the images, and its parents if those are wanted; and which of them
/// is missing.
fn entries_of(args: &InfoArgs, path: &Path) -> Result<(Vec<ImageEntry>, Option<Error>)> {
    let host = HostFs::shared();
    let options = args.parents.options_or_force(Access::Peek, args.force)?;
    let mut entries = Vec::new();
    let mut missing = None;
    if args.chain || args.parents.named() {
        let (image, lacks) = open::open_found(&host, path, &options)?;
        missing = lacks;
        for image in image.chain() {
            entries.push(ImageEntry {
                filename: image.path.clone(),
                info: image.info.clone(),
                allocated: image.disk.allocated()?,
                read_only: image.read_only.clone(),
                layout: None,
            });
        }
    } else {
        // A child is described even when its parent is not to be found.
        let opened = open::open_alone(&host, path, &options)?;
        let mut allocated = 0;
        for file in opened.map.files() {
            allocated += file
                .allocated()
                .map_err(|e| Error::io("asking for the size", &e).in_file(file.path()))?;
        }
        entries.push(ImageEntry {
            filename: path.to_owned(),
            info: opened.info,
            allocated,
            read_only: opened.read_only,
            layout: None,
        });
    }
    if args.layout {
        for entry in &mut entries {
            entry.layout = Some(Layout::of(&host, &entry.filename, &options));
        }
    }
    Ok((entries, missing))
}

fn print_entry(entry: &ImageEntry) -> Result<()> {
    let info = &entry.info;
    print_line(&entry.filename.display().to_string())?;
    let mut rows = vec![
        ("format", format!("{} {}", info.format.to_uppercase(), info.subformat)),
        ("virtual size", format!("{} ({} bytes)", iec(info.virtual_size), info.virtual_size)),
        ("on the host", iec(entry.allocated)),
        (
            "sectors",
            format!(
                "{} bytes logical, {} physical",
                info.logical_sector_size, info.physical_sector_size
            ),
        ),
    ];
    rows.extend(info.block_size.map(|size| ("block size", iec(size))));
    rows.extend(info.uuid.clone().map(|id| ("id", id)));
    rows.extend(info.creator.clone().map(|creator| ("creator", creator)));
    rows.extend(info.parent.clone().map(|parent| ("parent", parent)));
    if !info.extents.is_empty() {
        let names: Vec<_> = info.extents.iter().map(|p| p.display().to_string()).collect();
        rows.push(("extents", names.join(", ")));
    }
    if info.dirty {
        rows.push(("state", "not closed cleanly".to_owned()));
    }
    rows.extend(entry.read_only.clone().map(|why| ("read-only", why)));
    rows.extend(entry.layout.iter().flat_map(Layout::rows));
    for (name, value) in rows {
        print_line(&format!("  {name:<19} {value}"))?;
    }
    for (name, value) in &info.details {
        print_detail(&name.replace('_', " "), value, 2)?;
    }
    for warning in &info.warnings {
        print_line(&format!("  warning: {warning}"))?;
    }
    Ok(())
}

/// Prints one field of the format's own, nested ones below it.
fn print_detail(name: &str, value: &Value, indent: usize) -> Result<()> {
    let pad = " ".repeat(indent);
    match value {
        Value::Null => Ok(()),
        Value::String(text) => print_line(&format!("{pad}{name:<19} {text}")),
        Value::Object(fields) => {
            print_line(&format!("{pad}{name}"))?;
            fields.iter().try_for_each(|(name, value)| {
                print_detail(&name.replace('_', " "), value, indent + 2)
            })
        }
        Value::Array(items) if items.iter().any(Value::is_object) => items
            .iter()
            .enumerate()
            .try_for_each(|(i, item)| print_detail(&format!("{name} {}", i + 1), item, indent)),
        other => print_line(&format!("{pad}{name:<19} {other}")),
    }
}

/// Arguments of `flatdisk check`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  What a repair would change:
    flatdisk check --repair --dry-run server.vhdx
  Give back the space that nothing uses, and touch nothing else:
    flatdisk check --repair=leaks server.vhdx
  What is lost if blocks that cannot be read are given up, so that the image can be written again:
    flatdisk check --repair --accept-loss --dry-run server.vhdx

Exit status:
  0   no errors
  1   the check could not be completed
  2   there are errors
  3   there are no errors, but space that nothing uses
  After a repair it tells how the image is then, of a dry run how the image is now.
  Of several images it tells the worst: 1, 2, 3, 0, in this order.")]
pub struct CheckArgs {
    /// Images, or their flat files in a mount.
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// Put right what can be rebuilt without losing data: `leaks` only gives unused space back.
    #[arg(
        long,
        value_name = "WHAT",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "all"
    )]
    repair: Option<RepairScope>,
    /// With `--repair`: also give up what cannot be read, which then reads as zeroes, and take
    /// structures that look right for right in spite of their checksums.
    #[arg(long, requires = "repair")]
    accept_loss: bool,
    /// Show what a repair would change, and change nothing.
    #[arg(long, requires = "repair")]
    dry_run: bool,
    /// Also whether this cloud takes the image as it is; if not, it counts as an error.
    #[arg(long = "for", value_name = "USE", conflicts_with = "repair")]
    taker: Option<Taker>,
    #[command(flatten)]
    parents: ChainArgs,
    /// Print nothing about images without errors and leaks.
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    progress: ProgressArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Taker {
    /// Fixed VHDs of whole MiB
    Azure,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum RepairScope {
    /// Unused space.
    Leaks,
    /// Everything that can be rebuilt.
    All,
}

/// What `check` prints as JSON.
#[derive(Serialize)]
struct CheckAnswer<'a> {
    #[serde(flatten)]
    report: &'a Report,
    /// With `--repair`: what was changed, or would be.
    #[serde(skip_serializing_if = "Option::is_none")]
    repair: Option<RepairAnswer<'a>>,
}

#[derive(Serialize)]
struct RepairAnswer<'a> {
    dry_run: bool,
    /// What the check found before.
    errors_before: u64,
    leaks_before: u64,
    /// What it finds after the changes, or would find.
    errors_after: u64,
    leaks_after: u64,
    changes: &'a [Change],
}

/// Exit status of a check that could not be completed, as in qemu-img.
const NOT_COMPLETED: u8 = 1;

/// Checks every table of images, and repairs them if asked to. Exit status, of the image as it is
/// afterwards, and of several the worst: 0 clean, 1 not completed, 2 errors, 3 only leaks.
pub fn check(args: &CheckArgs) -> Result<u8> {
    if let [image] = &args.images[..] {
        let path = file_of(image)?;
        let checked = check_one(args, &path)?;
        if args.output.json() {
            print_json(&checked.answer(args))?;
        } else if !checked.silent(args) {
            checked.print(args, &path)?;
        }
        return Ok(checked.report.exit_status());
    }
    let mut answers = Vec::new();
    let mut worst = 0;
    for image in &args.images {
        let checked = file_of(image).and_then(|path| Ok((check_one(args, &path)?, path)));
        let status = checked.as_ref().map_or(NOT_COMPLETED, |(c, _)| c.report.exit_status());
        worst =
            [NOT_COMPLETED, 2, 3].into_iter().find(|s| [worst, status].contains(s)).unwrap_or(0);
        match checked {
            Ok((checked, path)) if args.output.json() => {
                let mut answer = serde_json::json!(checked.answer(args));
                answer["filename"] = path.display().to_string().into();
                answers.push(answer);
            }
            Ok((checked, _)) if checked.silent(args) => {}
            Ok((checked, path)) => {
                print_line(&format!("{}:", path.display()))?;
                checked.print(args, &path)?;
            }
            Err(e) => {
                report(&e, false);
                let mut answer = serde_json::json!(Failure::from(&e));
                answer["filename"] = image.display().to_string().into();
                answers.push(answer);
            }
        }
    }
    if args.output.json() {
        print_json(&serde_json::json!({ "images": answers }))?;
    }
    Ok(worst)
}

/// The outcome of a check, and of a repair if one was wanted.
struct Checked {
    /// How the image is now.
    report: Report,
    repair: Option<Repair>,
}

impl Checked {
    fn answer(&self, args: &CheckArgs) -> CheckAnswer<'_> {
        let repair = self.repair.as_ref().map(|repair| RepairAnswer {
            dry_run: args.dry_run,
            errors_before: repair.before.errors,
            leaks_before: repair.before.leaks,
            errors_after: repair.after.errors,
            leaks_after: repair.after.leaks,
            changes: &repair.changes,
        });
        CheckAnswer { report: &self.report, repair }
    }

    /// Whether nothing is to be said of it.
    fn silent(&self, args: &CheckArgs) -> bool {
        args.quiet && self.repair.is_none() && self.report.exit_status() == 0
    }

    fn print(&self, args: &CheckArgs, path: &Path) -> Result<()> {
        if let Some(repair) = &self.repair {
            print_repair(args, repair)?;
        }
        print_report(path, &self.report)
    }
}

fn check_one(args: &CheckArgs, path: &Path) -> Result<Checked> {
    let done = match args.repair {
        None => checked(args, path).map(|report| Checked { report, repair: None }),
        Some(scope) => repaired(args, path, scope).map(|repair| {
            let now = if args.dry_run { &repair.before } else { &repair.after };
            Checked { report: now.clone(), repair: Some(repair) }
        }),
    };
    match done {
        // An image too damaged to open was checked; anything else kept the check from happening.
        Err(e) if e.kind() == ErrorKind::Corrupt => {
            let mut report = Report::new("unknown");
            report.add(Severity::Error, e.offset(), e.what());
            Ok(Checked { report, repair: None })
        }
        done => done,
    }
}

fn checked(args: &CheckArgs, path: &Path) -> Result<Report> {
    let host = HostFs::shared();
    if ova::is_ova(&*host, path) {
        let bar = args.progress.start("checking", args.quiet || args.output.json())?;
        return ova::check(&host, path, &args.parents.options(Access::Read)?, &bar);
    }
    let options = args.parents.options(Access::Read)?;
    let bar = args.progress.watch(&format!("checking {}", printable(path.display())), args.quiet);
    let mut report = formats::check(&host, path, &options)?;
    drop(bar);
    if let Some(Taker::Azure) = args.taker {
        let file = host.open(path, Access::Peek)?;
        let len = file.len().map_err(|e| Error::io("asking for the size", &e).in_file(path))?;
        let info = formats::open(&host, path, &args.parents.options(Access::Peek)?)?.info;
        for what in azure_objections(info.format, &info.subformat, info.virtual_size, len) {
            report.add(Severity::Error, None, what);
        }
    }
    Ok(report)
}

fn repaired(args: &CheckArgs, path: &Path, scope: RepairScope) -> Result<Repair> {
    let scope = match (scope, args.accept_loss) {
        (RepairScope::Leaks, false) => Scope::Leaks,
        (RepairScope::All, false) => Scope::All,
        (RepairScope::All, true) => Scope::Lossy,
        (RepairScope::Leaks, true) => {
            let what = "giving unused space back loses nothing";
            return Err(
                Error::unsupported(what).hint("leave out either `leaks` or `--accept-loss`")
            );
        }
    };
    let options = args.parents.options(Access::Write)?;
    if ova::is_ova(&HostFs, path) {
        let bar = args.progress.start("checking", args.quiet || args.output.json())?;
        let options = args.parents.options(Access::Read)?;
        return ova::repair(&HostFs::shared(), path, &options, args.dry_run, &bar);
    }
    let _bar = args.progress.watch(&format!("repairing {}", printable(path.display())), args.quiet);
    formats::repair(&HostFs::shared(), path, &options, scope, args.dry_run)
}

/// Prints what a repair changed, or would change.
fn print_repair(args: &CheckArgs, repair: &Repair) -> Result<()> {
    let done = if args.dry_run { "would repair" } else { "repaired" };
    if repair.changes.is_empty() {
        return print_line("nothing to repair");
    }
    repair.changes.iter().try_for_each(|change| print_line(&format!("{done}: {change}")))?;
    if !args.dry_run {
        return Ok(());
    }
    let left = &repair.after;
    print_line(&format!("would leave: {} errors, {} leaks; as it is now:", left.errors, left.leaks))
}

fn print_report(image: &Path, report: &Report) -> Result<()> {
    for finding in &report.findings {
        print_line(&describe(image, finding))?;
    }
    let shown = report.findings.len() as u64;
    let all = report.errors + report.leaks + report.notices;
    if shown < all {
        print_line(&format!("… and {} more", all - shown))?;
    }
    for lost in &report.damage {
        let (start, end) = (lost.start, lost.start + lost.length);
        print_line(&format!("unreadable: bytes {start:#x} to {end:#x} of the disk"))?;
    }
    let found = match (report.errors, report.leaks) {
        (0, 0) => "No errors found.".to_owned(),
        (0, _) => format!("No errors found, {} leaked.", iec(report.leaked_bytes)),
        (1, _) => "1 error found.".to_owned(),
        (n, _) => format!("{n} errors found."),
    };
    // Flat images have no blocks to count.
    let Some(percent) = (report.allocated_blocks * 100).checked_div(report.blocks) else {
        return print_line(&found);
    };
    let (allocated, blocks) = (report.allocated_blocks, report.blocks);
    print_line(&format!("{found} {allocated} of {blocks} blocks allocated ({percent}%)"))
}

fn describe(image: &Path, finding: &Finding) -> String {
    let severity = match finding.severity {
        Severity::Error => "error",
        Severity::Leak => "leak",
        Severity::Notice => "notice",
    };
    let file = finding.file.as_deref().unwrap_or(image).display();
    match finding.offset {
        Some(at) => format!("{severity}: {file}: {} at {at:#x}", finding.what),
        None => format!("{severity}: {file}: {}", finding.what),
    }
}
