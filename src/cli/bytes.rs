//! `measure`, `compare`, `hash` and `write`, and the bytes that `cat` prints: disks without a mount.

use std::fs::File;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::chain::ParentArgs;
use super::output::{OutputArgs, iec, parse_size, print_json, print_line};
use super::progress::ProgressArgs;
use super::source::image_of;
use super::spec::SpecArgs;
use crate::codec::hex;
use crate::copy::digest::{Algorithm, digest};
use crate::copy::measure::measure as measure_disk;
use crate::copy::pipeline::{self, Copying};
use crate::copy::sink::PipeSink;
use crate::copy::{Opened, Source, Target, compare as compare_disks};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::Preallocation;
use crate::progress::Progress;
use crate::storage::Access;
use crate::storage::file::HostFs;

/// Bytes read or written at a time.
const CHUNK: usize = 1 << 20;
/// Exit statuses of `compare`.
const DIFFERENT: u8 = 1;
const NOT_COMPARED: u8 = 2;

/// How the disk in a file is found.
#[derive(Debug, Clone, Args)]
pub struct DiskArgs {
    /// What the images are, where their contents do not say.
    #[arg(long, value_name = "FORMAT")]
    from: Option<FromFormat>,
    #[command(flatten)]
    parents: ParentArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FromFormat {
    /// The bytes of the disk, and nothing else
    Raw,
}

impl DiskArgs {
    /// Where parents may lie.
    pub fn parents(&self) -> &ParentArgs {
        &self.parents
    }

    /// Opens an image, or a raw disk.
    pub fn open(&self, path: &Path, access: Access) -> Result<Opened> {
        let options = self.parents.options(access);
        Opened::open(&HostFs::shared(), &image_of(path)?, &options, self.from.is_some())
    }
}

/// Arguments of `flatdisk measure`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Everything that the source stores is read, to find zeroes; for a streamOptimized image it is compressed.
With --json the keys are those of `qemu-img measure`.

Examples:
  Whether a VHDX of this disk fits somewhere:
    flatdisk measure -O vhdx server.vmdk
  What a disk can grow to:
    flatdisk measure -O vhd --size 127G")]
pub struct MeasureArgs {
    /// The image whose contents are measured.
    #[arg(required_unless_present = "size")]
    source: Option<PathBuf>,
    /// Size of the disk, if it is another than the source's; without a source, of an empty disk.
    #[arg(long, short, value_parser = parse_size)]
    size: Option<u64>,
    /// Format: vhd, vhdx, vmdk or raw [default: raw].
    #[arg(long, short = 'O')]
    format: Option<String>,
    #[command(flatten)]
    spec: SpecArgs,
    #[command(flatten)]
    disk: DiskArgs,
    #[command(flatten)]
    progress: ProgressArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Says how large an image would be.
pub fn measure(args: &MeasureArgs) -> Result<u8> {
    let opened = match &args.source {
        Some(path) => Some(args.disk.open(path, Access::Read)?),
        None => None,
    };
    let source = opened.as_ref().map(|opened| Source::Disk(opened.disk.clone()));
    let size = source.as_ref().map_or(0, Source::size);
    let mut spec = args.spec.spec(args.size.unwrap_or(size), Preallocation::Off);
    if spec.size < size {
        return Err(Error::invalid(format!("the disk has {size} bytes")));
    }
    let named = args.format.as_deref();
    let target = match args.spec.apply_profile(named, &mut spec)? {
        Some(format) => Target::Image(format),
        None => Target::by_name(named.unwrap_or("raw"))?,
    };
    let bar = args.progress.start("measuring", args.output.json())?;
    let measured = measure_disk(source.as_ref(), target, &spec, &bar)?;
    drop(bar);
    if args.output.json() {
        print_json(&json!({
            "required": measured.required,
            "fully-allocated": measured.fully_allocated,
        }))?;
    } else {
        print_line(&format!("required size: {}", measured.required))?;
        print_line(&format!("fully allocated size: {}", measured.fully_allocated))?;
    }
    Ok(0)
}

/// Arguments of `flatdisk compare`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Disks of two sizes are the same if what the larger one has more is zero; with --strict they are
different, and nothing is read. What neither image stores is not read.

Examples:
  Whether a conversion lost anything:
    flatdisk compare server.vmdk server.vhdx

Exit status:
  0  the same
  1  different
  2  not compared")]
pub struct CompareArgs {
    /// An image, or a raw disk.
    first: PathBuf,
    /// Another one.
    second: PathBuf,
    /// Take disks of two sizes for different, even if only zeroes follow.
    #[arg(long)]
    strict: bool,
    #[command(flatten)]
    disk: DiskArgs,
    /// Print nothing; the exit status says it.
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    progress: ProgressArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Compares two disks.
pub fn compare(args: &CompareArgs) -> u8 {
    compared(args).unwrap_or_else(|e| {
        eprintln!("flatdisk: {e}");
        NOT_COMPARED
    })
}

fn compared(args: &CompareArgs) -> Result<u8> {
    let [one, other] = [&args.first, &args.second].map(|path| args.disk.open(path, Access::Read));
    let (one, other) = (one?.disk, other?.disk);
    let sizes = [one.size(), other.size()];
    if args.strict && sizes[0] != sizes[1] {
        let what = format!("the disks have {} and {} bytes", sizes[0], sizes[1]);
        return answer(args, json!({ "same": false, "sizes": sizes }), &what, DIFFERENT);
    }
    let bar = args.progress.start("comparing", args.quiet)?;
    let found = compare_disks(&one, &other, &bar)?;
    drop(bar);
    let Some(found) = found else {
        return answer(args, json!({ "same": true, "sizes": sizes }), "the disks are the same", 0);
    };
    let (first, second) = (hex(&found.first), hex(&found.second));
    let value = json!({
        "same": false, "sizes": sizes, "offset": found.at, "first": first, "second": second,
    });
    let what = format!("the disks differ at offset {}: {first} and {second}", found.at);
    answer(args, value, &what, DIFFERENT)
}

fn answer(args: &CompareArgs, value: serde_json::Value, what: &str, status: u8) -> Result<u8> {
    if args.output.json() {
        print_json(&value)?;
    } else if !args.quiet {
        print_line(what)?;
    }
    Ok(status)
}

/// Arguments of `flatdisk hash`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
The digest is of the disk as a guest sees it, zeroes included: the same for every image of the same
disk, and that of a raw copy.

Examples:
  For a report:
    flatdisk hash evidence.vmdk")]
pub struct HashArgs {
    /// The images.
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// Which digest.
    #[arg(long, short, value_name = "NAME", default_value = "sha256")]
    algorithm: AlgorithmName,
    #[command(flatten)]
    disk: DiskArgs,
    #[command(flatten)]
    progress: ProgressArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum AlgorithmName {
    Sha256,
    Sha1,
    Md5,
    Blake3,
}

/// Prints the digest of disks.
pub fn hash(args: &HashArgs) -> Result<u8> {
    let (algorithm, name) = match args.algorithm {
        AlgorithmName::Sha256 => (Algorithm::Sha256, "sha256"),
        AlgorithmName::Sha1 => (Algorithm::Sha1, "sha1"),
        AlgorithmName::Md5 => (Algorithm::Md5, "md5"),
        AlgorithmName::Blake3 => (Algorithm::Blake3, "blake3"),
    };
    let bar = args.progress.start("hashing", args.output.json())?;
    let mut answers = Vec::new();
    for path in &args.images {
        let disk = args.disk.open(path, Access::Read)?.disk;
        let digest = digest(&disk, algorithm, &bar)?;
        if !args.output.json() {
            print_line(&format!("{digest}  {}", path.display()))?;
        }
        answers.push(json!({
            "filename": path, "virtual_size": disk.size(), "algorithm": name, "digest": digest,
        }));
    }
    drop(bar);
    if args.output.json() {
        print_json(&answers)?;
    }
    Ok(0)
}

/// Which bytes are printed, and how.
#[derive(Debug, Clone, Args)]
pub struct RangeArgs {
    /// The first byte, of a disk or partition [default: 0].
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    offset: Option<u64>,
    /// How many bytes [default: up to the end].
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    length: Option<u64>,
    /// Print lines of 16 bytes, in hexadecimal and as text; lines like the one before become a *.
    #[arg(long)]
    hex: bool,
}

impl RangeArgs {
    /// Whether anything was said.
    pub fn given(&self) -> bool {
        self.offset.is_some() || self.length.is_some() || self.hex
    }
}

/// Writes bytes of the part `whole` of a disk to standard output.
pub fn print_range(disk: Arc<Disk>, whole: Range<u64>, args: &RangeArgs) -> Result<u8> {
    let size = whole.end - whole.start;
    let offset = args.offset.unwrap_or(0);
    let end = match args.length {
        Some(length) => offset.saturating_add(length),
        None => size.max(offset),
    };
    if end > size {
        let what = format!("the disk ends at {size}, before {end}");
        return Err(Error::new(ErrorKind::OutOfRange, what));
    }
    let range = whole.start + offset..whole.start + end;
    let done = match args.hex {
        true => print_hex(&disk, range, whole.start),
        false => {
            let sink = PipeSink::new(standard_output()?);
            let source = Source::Disk(disk);
            pipeline::run(&source, range, &sink, Copying::default(), &()).map(|_| ())
        }
    };
    match done {
        // Whoever reads has seen enough.
        Err(e) if e.errno() == Some(libc::EPIPE) => Ok(0),
        done => done.map(|()| 0),
    }
}

fn standard_output() -> Result<File> {
    let fd = std::io::stdout().as_fd().try_clone_to_owned();
    fd.map(File::from).map_err(|e| Error::io("opening standard output", &e))
}

/// Prints a range as `hexdump -C` does, counting from byte `base`.
fn print_hex(disk: &Disk, range: Range<u64>, base: u64) -> Result<()> {
    let mut out = std::io::BufWriter::new(standard_output()?);
    let mut buf = vec![0; CHUNK];
    let mut last: Option<Vec<u8>> = None;
    let mut repeated = false;
    let mut print = |line: &str| {
        out.write_all(line.as_bytes()).map_err(|e| Error::io("writing standard output", &e))
    };
    let mut at = range.start;
    while at < range.end {
        let part = (range.end - at).min(CHUNK as u64) as usize;
        disk.read_at(at, &mut buf[..part])?;
        for line in buf[..part].chunks(16) {
            if last.as_deref() == Some(line) && line.len() == 16 {
                if !repeated {
                    print("*\n")?;
                }
                repeated = true;
            } else {
                print(&hex_line(at - base, line))?;
                last = Some(line.to_vec());
                repeated = false;
            }
            at += line.len() as u64;
        }
    }
    print(&format!("{:08x}\n", range.end - base))?;
    out.flush().map_err(|e| Error::io("writing standard output", &e))
}

fn hex_line(at: u64, bytes: &[u8]) -> String {
    let mut line = format!("{at:08x}");
    for index in 0..16 {
        if index % 8 == 0 {
            line.push(' ');
        }
        match bytes.get(index) {
            Some(byte) => line.push_str(&format!(" {byte:02x}")),
            None => line.push_str("   "),
        }
    }
    let text: String = bytes
        .iter()
        .map(|byte| if (0x20..0x7f).contains(byte) { char::from(*byte) } else { '.' })
        .collect();
    line.push_str(&format!("  |{text}|\n"));
    line
}

/// Arguments of `flatdisk write`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
The bytes come from standard input, up to its end or --length, or are --length times the same byte.
They are durable when the command returns.

Examples:
  A boot loader:
    flatdisk write --offset 0 --length 440 disk.vhdx < mbr.bin
  Wipe the beginning of a disk:
    flatdisk write --fill 0 --length 1M disk.vhdx")]
pub struct WriteArgs {
    /// The image; nobody else may have it open.
    image: PathBuf,
    /// The first byte to write.
    #[arg(long, value_name = "BYTES", value_parser = parse_size, default_value = "0")]
    offset: u64,
    /// How many bytes at most.
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    length: Option<u64>,
    /// Write this byte, decimal or 0x and two digits, instead of what comes from standard input.
    #[arg(long, value_name = "BYTE", value_parser = parse_byte, requires = "length")]
    fill: Option<u8>,
    #[command(flatten)]
    disk: DiskArgs,
    /// Print nothing on success.
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    progress: ProgressArgs,
}

fn parse_byte(text: &str) -> std::result::Result<u8, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u8::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("`{text}` is no byte: 0 to 255, or 0x00 to 0xff"))
}

/// Writes bytes into a disk.
pub fn write(args: &WriteArgs) -> Result<u8> {
    let opened = args.disk.open(&args.image, Access::Write)?;
    let disk = &opened.disk;
    if let Some(why) = disk.read_only() {
        return Err(Error::new(ErrorKind::ReadOnly, why.to_owned()).in_file(&args.image));
    }
    let room = disk.size().saturating_sub(args.offset);
    if args.offset > disk.size() || args.length.is_some_and(|length| length > room) {
        let what = format!("the disk ends at {}", disk.size());
        return Err(Error::new(ErrorKind::OutOfRange, what).in_file(&args.image));
    }
    let bar = args.progress.start("writing", args.quiet)?;
    let bytes = match args.fill {
        Some(byte) => fill(disk, args.offset, args.length.unwrap_or(0), byte, &bar),
        None => copy_input(disk, args.offset, args.length.unwrap_or(u64::MAX), &bar),
    };
    // Also what was written before a failure is to be durable.
    let closed = disk.close();
    let bytes = bytes?;
    closed?;
    drop(bar);
    if !args.quiet {
        print_line(&format!("wrote {} to {}", iec(bytes), args.image.display()))?;
    }
    Ok(0)
}

fn fill(
    disk: &Arc<Disk>,
    offset: u64,
    length: u64,
    byte: u8,
    progress: &dyn Progress,
) -> Result<u64> {
    progress.total(length);
    if byte == 0 {
        disk.discard(offset, length)?;
        return Ok(length);
    }
    let data = vec![byte; CHUNK];
    let mut done = 0;
    while done < length {
        progress.go_on()?;
        let part = (length - done).min(CHUNK as u64);
        disk.write_at(offset + done, &data[..part as usize])?;
        progress.advance(part);
        done += part;
    }
    Ok(length)
}

fn copy_input(disk: &Arc<Disk>, offset: u64, length: u64, progress: &dyn Progress) -> Result<u64> {
    let mut input = std::io::stdin().lock().take(length);
    let mut buf = vec![0; CHUNK];
    let mut done = 0;
    loop {
        progress.go_on()?;
        let mut filled = 0;
        while filled < buf.len() {
            match input.read(&mut buf[filled..]) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io("reading standard input", &e)),
            }
        }
        if filled == 0 {
            return Ok(done);
        }
        disk.write_at(offset + done, &buf[..filled])?;
        progress.advance(filled as u64);
        done += filled as u64;
    }
}
