//! `convert`: any image into any other.

use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};
use parking_lot::Mutex;
use serde_json::json;

use super::chain::ParentArgs;
use super::output::{complain, iec, mind_extension, parse_size, print_json, print_line};
use super::source::{image_of, partition_of};
use super::spec::SpecArgs;
use super::work::WorkArgs;
use crate::copy::convert::From;
use crate::copy::in_place;
use crate::copy::output::{convert_to_device, convert_to_pipe};
use crate::copy::{Converted, Opened, Options, Sharing, Source, Target, convert as convert_disk};
use crate::disk::map::Geometry;
use crate::error::{Error, Result, ResultExt};
use crate::formats::{self, Image, Preallocation};
use crate::progress::Progress;
use crate::storage::file::HostFs;
use crate::storage::{Access, Host, archive, device};
use crate::volumes::volumes;

/// Exit status when parts of the source could not be read.
const SALVAGED: u8 = 2;

/// Arguments of `flatdisk convert`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
SOURCE is an image with all its parents, a partition of one (IMAGE:N), a disk in an archive (x.ova:DISK), a raw disk (a file called .img, .raw or .dd, or any file with
--from raw), a block device, or - for standard input with --from raw and --size. TARGET is a file, or -
for standard output: raw, vhd --subformat fixed, or vmdk --subformat streamOptimized.

Holes and runs of zeroes are not stored. Where the host can share blocks between files (XFS, btrfs),
they are shared, not copied. The target appears under its name when it is complete and durable; until
then, and when the work is ended, whatever was there before is still there.

Examples:
  Whatever it is, to VHDX:
    flatdisk convert server.vmdk server.vhdx
  A generation of a chain, flattened, for Azure:
    flatdisk convert --for azure child.avhdx upload.vhd
  The second partition alone:
    flatdisk convert server.vhdx:2 root.img
  A disk out of an archive, and one into another:
    flatdisk convert vendor.ova:disk1.vmdk disk.vhdx
    flatdisk convert --for esx disk.vhdx upload.ova
  Through a pipe to another host:
    flatdisk convert -O vmdk --subformat streamOptimized disk.vhdx - | ssh host 'cat > disk.vmdk'
  A raw disk of any size in a moment:
    flatdisk convert --in-place disk.raw disk.vhd
  Save what can be read of a damaged image:
    flatdisk convert --salvage damaged.vhdx saved.vhdx

Exit status:
  0  done
  1  not done; the target is what it was before
  2  done, but parts of the source could not be read and are zeroes now (--salvage)")]
pub struct ConvertArgs {
    /// The image or disk to convert.
    source: PathBuf,
    /// The image to make.
    target: PathBuf,
    /// Format of the target: vhd, vhdx, vmdk or raw [default: by its extension].
    #[arg(long, short = 'O')]
    format: Option<String>,
    /// What the source is, where its contents do not say.
    #[arg(long, value_name = "FORMAT")]
    from: Option<FromFormat>,
    /// Size of the new disk, if it is to be larger than the source; with - as the source, its size.
    #[arg(long, short, value_parser = parse_size)]
    size: Option<u64>,
    /// Make a child of this image, and store only what differs from it.
    #[arg(long, value_name = "IMAGE")]
    parent: Option<PathBuf>,
    #[command(flatten)]
    spec: SpecArgs,
    /// How much to compress a streamOptimized image, from 1, fast, to 9, small [default: 6].
    #[arg(long, value_name = "LEVEL", value_parser = clap::value_parser!(u32).range(1..=9))]
    compress: Option<u32>,
    /// Whether to share blocks with the source: where the host can, or not at all, or always or fail.
    #[arg(long, value_name = "WHEN", num_args = 0..=1, default_value = "auto", default_missing_value = "always")]
    reflink: Reflink,
    /// Give the target the identity of the source, instead of a new one.
    #[arg(long)]
    keep_id: bool,
    /// Read the target back and compare it with the source.
    #[arg(long)]
    verify: bool,
    /// Put zeroes where the source cannot be read, list these places, and go on.
    #[arg(long)]
    salvage: bool,
    /// Replace a target that exists.
    #[arg(long)]
    force: bool,
    /// Make the source itself the target, without copying: a raw disk a fixed VHD, by adding the
    /// footer, or a fixed VHD a raw disk, by taking it off. The source is gone afterwards.
    #[arg(long, conflicts_with_all = ["size", "parent", "verify", "salvage", "to_device", "keep_id"])]
    in_place: bool,
    /// Let the target be a block device: everything on it is overwritten.
    #[arg(long)]
    to_device: bool,
    #[command(flatten)]
    parents: ParentArgs,
    #[command(flatten)]
    work: WorkArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FromFormat {
    /// The bytes of the disk, and nothing else
    Raw,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Reflink {
    Auto,
    Always,
    Never,
}

/// Converts an image.
pub fn convert(args: &ConvertArgs) -> Result<u8> {
    let host = HostFs::shared();
    if args.in_place {
        return in_place(args, &host);
    }
    let part = partition_of(&args.source);
    let image = part.as_ref().map_or(&args.source, |(image, _)| image);
    let opened = open_source(args, image, &host)?;
    let source = match (&opened, &part) {
        (None, _) => standard_input(args)?,
        (Some(opened), None) => Source::Disk(opened.disk.clone()),
        (Some(opened), Some((_, number))) => partition(args, opened, image, *number)?,
    };
    for note in opened.iter().flat_map(|opened| &opened.notes) {
        complain(format_args!("{}: {note}", args.source.display()));
    }
    let parent = open_parent(args, &host)?;
    let mut options = Options {
        spec: args.spec.spec(args.size.unwrap_or(0), Preallocation::Off),
        parent: parent.as_ref(),
        level: args.compress,
        sharing: match args.reflink {
            Reflink::Auto => Sharing::Auto,
            Reflink::Always => Sharing::Always,
            Reflink::Never => Sharing::Never,
        },
        verify: args.verify,
        salvage: args.salvage,
        replace: args.force,
        keep_id: args.keep_id,
    };
    if options.spec.size == 0 {
        options.spec.size = source.size();
    }
    let target = target(args, &mut options)?;
    let from = From { source: &source, image: opened.as_ref().and_then(|o| o.image.as_ref()) };
    let bar = args.work.start("converting")?;
    let converted = run(args, &host, &from, target, &options, &bar)?;
    drop(bar);
    report(args, target, &converted)
}

/// Makes the source the target.
fn in_place(args: &ConvertArgs, host: &Arc<dyn Host>) -> Result<u8> {
    let named = args.format.as_deref().map(Target::by_name).transpose()?;
    let target = named.or_else(|| Target::by_extension(&args.target));
    let source = image_of(&args.source)?;
    let (target, size) = match target {
        Some(Target::Raw) => {
            (Target::Raw, in_place::unwrap(host, &source, &args.target, args.force)?)
        }
        Some(target) if target.name() == "vhd" => {
            let raw = args.from.is_some();
            let len = source.metadata().map_or(0, |meta| meta.len());
            let size = in_place::wrap(host, &source, &args.target, raw, args.force)?;
            if size > len {
                let (name, zeroes) = (source.display(), size - len);
                complain(format_args!("{name}: {zeroes} bytes of zeroes make it whole sectors"));
            }
            (target, size)
        }
        _ => {
            let what = "only a raw disk and a fixed VHD become each other in place";
            return Err(Error::invalid(what).in_file(&args.target).hint("-O vhd or -O raw"));
        }
    };
    let files = vec![args.target.clone()];
    report(args, target, &Converted::of(size, files))
}

fn run(
    args: &ConvertArgs,
    host: &Arc<dyn Host>,
    from: &From<'_>,
    target: Target,
    options: &Options<'_>,
    progress: &dyn Progress,
) -> Result<Converted> {
    if is_dash(&args.target) {
        if args.verify {
            return Err(Error::invalid("what goes to a pipe cannot be read back to verify it"));
        }
        if std::io::stdout().is_terminal() {
            let what = "a disk is not written to a terminal";
            return Err(Error::invalid(what).hint("send standard output to a file or a program"));
        }
        let out = standard_output()?;
        return convert_to_pipe(from, out, Path::new("disk.vmdk"), target, options, progress);
    }
    if device::is_device(&args.target) {
        let raw = matches!(target, Target::Raw);
        if !args.to_device || !raw {
            let what = "the target is a block device";
            let hint = "with --to-device -O raw everything on it is overwritten";
            return Err(Error::invalid(what).in_file(&args.target).hint(hint));
        }
        return convert_to_device(from, &args.target, options, progress);
    }
    if args.to_device {
        return Err(Error::invalid("the target is no block device").in_file(&args.target));
    }
    if let Target::Image(format) = target {
        mind_extension(&args.target, format.name());
    }
    convert_disk(host, from, &args.target, target, options, progress)
}

fn is_dash(path: &Path) -> bool {
    path.as_os_str() == "-"
}

fn open_source(args: &ConvertArgs, image: &Path, host: &Arc<dyn Host>) -> Result<Option<Opened>> {
    if is_dash(image) {
        return Ok(None);
    }
    let path = image_of(image)?;
    let options = args.parents.options(Access::Read);
    Opened::open(host, &path, &options, args.from.is_some()).map(Some)
}

/// A partition of an open disk, as what is converted.
fn partition(args: &ConvertArgs, opened: &Opened, image: &Path, number: u32) -> Result<Source> {
    let disk = opened.disk.clone();
    if args.keep_id {
        let what = "a partition has not the identity of the disk that it is on";
        return Err(Error::invalid(what).hint("leave --keep-id away"));
    }
    let range = volumes(&disk)?.place(Some(number)).in_file(image)?;
    if !(range.end - range.start).is_multiple_of(Geometry::SECTOR) {
        return Err(Error::unsupported("a partition that ends within a sector").in_file(image));
    }
    Ok(Source::Part(disk, range))
}

/// Standard input as a disk.
fn standard_input(args: &ConvertArgs) -> Result<Source> {
    let (Some(FromFormat::Raw), Some(size)) = (args.from, args.size) else {
        let what = "standard input is a raw disk whose size must be known";
        return Err(Error::invalid(what).hint("--from raw --size N"));
    };
    if size == 0 || !size.is_multiple_of(Geometry::SECTOR) {
        return Err(Error::invalid(format!("size {size} is not a multiple of 512")));
    }
    let from: Box<dyn Read + Send> = Box::new(unbuffered(std::io::stdin().as_fd())?);
    Ok(Source::Stream { from: Mutex::new(from), size })
}

/// Standard output, every write of which is large.
fn standard_output() -> Result<impl Write + Send> {
    unbuffered(std::io::stdout().as_fd())
}

fn unbuffered(fd: std::os::fd::BorrowedFd<'_>) -> Result<File> {
    let fd = fd.try_clone_to_owned().map_err(|e| Error::io("opening", &e))?;
    Ok(File::from(fd))
}

fn open_parent(args: &ConvertArgs, host: &Arc<dyn Host>) -> Result<Option<Image>> {
    let Some(parent) = &args.parent else { return Ok(None) };
    let path = image_of(parent)?;
    formats::open(host, &path, &args.parents.options(Access::Read)).map(Some)
}

/// What is to be made; a profile, or a parent, may decide.
fn target(args: &ConvertArgs, options: &mut Options<'_>) -> Result<Target> {
    let named = args.format.as_deref();
    if let Some(format) = args.spec.apply_profile(named, &mut options.spec)? {
        return Ok(Target::Image(format));
    }
    if let Some(name) = named {
        return Target::by_name(name);
    }
    if let Some(parent) = options.parent {
        return Ok(Target::Image(formats::by_name(parent.info.format)?));
    }
    if device::is_device(&args.target) {
        return Ok(Target::Raw);
    }
    if archive::has_name(&args.target) {
        let what = "an OVA is made of a stream-optimised VMDK";
        return Err(Error::invalid(what).in_file(&args.target).hint("--for esx makes one"));
    }
    Target::by_extension(&args.target).ok_or_else(|| {
        let what = "the extension says no format";
        Error::invalid(what).in_file(&args.target).hint("use --format, or --for")
    })
}

/// Says what was made.
fn report(args: &ConvertArgs, target: Target, converted: &Converted) -> Result<u8> {
    let status = if converted.lost.is_empty() { 0 } else { SALVAGED };
    for lost in &converted.lost {
        let (at, len) = (lost.start, lost.end - lost.start);
        let source = args.source.display();
        complain(format_args!("{source}: {len} bytes at disk offset {at:#x} are lost, zeroes now"));
    }
    if is_dash(&args.target) {
        return Ok(status);
    }
    if args.work.json() {
        let lost: Vec<_> = converted
            .lost
            .iter()
            .map(|lost| json!({ "start": lost.start, "length": lost.end - lost.start }))
            .collect();
        print_json(&json!({
            "source": args.source,
            "filename": args.target,
            "format": target.name(),
            "virtual_size": converted.size,
            "files": converted.files,
            "shared": converted.shared,
            "lost": lost,
        }))?;
    } else if !args.work.quiet() {
        let (source, made) = (args.source.display(), args.target.display());
        let shared = match converted.shared {
            0 => String::new(),
            bytes => format!(", {} shared with the source", iec(bytes)),
        };
        let (format, size) = (target.name().to_uppercase(), iec(converted.size));
        print_line(&format!("converted {source} to {made}: {format}, {size}{shared}"))?;
    }
    Ok(status)
}
