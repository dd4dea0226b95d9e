//! `ls`, `cat` and `cp`: files out of images, without a mount and without privileges.
//!
//! # Files
//!
//! - `extract`: `cp`.

mod extract;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde_json::json;

use super::bytes::{DiskArgs, RangeArgs, print_range};
use super::chain::ParentArgs;
use super::output::{OutputArgs, escaped, print_bytes, print_json, print_line};
use super::{process, source};
use crate::disk::Disk;
use crate::disk::window::Window;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::formats;
use crate::storage::Access;
use crate::storage::file::HostFs;
use crate::volumes::files::{self, Entry, FileKind, FileSystem, Sink, zeroes};
use crate::volumes::volumes;

pub use extract::{CpArgs, cp};

/// Arguments of `flatdisk ls`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  What is in the root of the only file system of a disk:
    flatdisk ls server.vhdx
  A directory of its third partition, with sizes and times:
    flatdisk ls -l win11.vhdx:3/Users")]
pub struct LsArgs {
    /// The image, with the number of a partition if there are several, and a path.
    #[arg(value_name = "IMAGE[:N][/PATH]")]
    target: OsString,
    /// Also show permissions, sizes and times.
    #[arg(long, short)]
    long: bool,
    #[command(flatten)]
    parents: ParentArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Arguments of `flatdisk cat`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  A file:
    flatdisk cat server.vhdx/etc/fstab
  The boot sector:
    flatdisk cat --length 512 --hex server.vhdx
  The description of the machine in an archive:
    flatdisk cat vendor.ova:vendor.ovf
  The bytes of a partition:
    flatdisk cat server.vhdx:2 | e2image -r - root.e2i")]
pub struct CatArgs {
    /// The image, with the number of a partition if there are several, and the path of a file.
    /// Without a path, the bytes of the partition, or of the disk.
    #[arg(value_name = "IMAGE[:N][/PATH]")]
    target: OsString,
    #[command(flatten)]
    range: RangeArgs,
    #[command(flatten)]
    disk: DiskArgs,
}

/// What `IMAGE[:N][/PATH]` names.
#[derive(Debug, PartialEq, Eq)]
struct Target {
    image: PathBuf,
    partition: Option<u32>,
    /// Empty, or with a slash at its start.
    path: Vec<u8>,
}

impl Target {
    /// The image is the first part of the text that is a file; directories of the host, and of the
    /// image, may have colons and digits in their names.
    fn parse(text: &OsStr) -> Result<Self> {
        let bytes = text.as_bytes();
        let slashes = (1..bytes.len()).filter(|at| bytes[*at] == b'/');
        for end in slashes.chain([bytes.len()]) {
            let (before, path) = bytes.split_at(end);
            let made = |image: &[u8], partition| -> Option<Result<Self>> {
                let image = Path::new(OsStr::from_bytes(image));
                source::exists(image).then(|| {
                    let image = source::image_of(image)?;
                    Ok(Self { image, partition, path: path.to_vec() })
                })
            };
            let numbered = before.iter().rposition(|byte| *byte == b':').and_then(|colon| {
                // `IMAGE:/PATH` is what people type whose disk has no partitions.
                let number = match std::str::from_utf8(&before[colon + 1..]).ok()? {
                    "" => None,
                    number => Some(number.parse().ok()?),
                };
                Some((&before[..colon], number))
            });
            let found = made(before, None)
                .or_else(|| numbered.and_then(|(image, number)| made(image, number)));
            if let Some(found) = found {
                return found;
            }
        }
        let what = "no such image";
        Err(Error::new(ErrorKind::NotFound, what).in_file(Path::new(text)))
    }

    /// Opens the image.
    fn disk(&self, parents: &ParentArgs) -> Result<Arc<Disk>> {
        let options = parents.options(Access::Read);
        Ok(formats::open(&HostFs::shared(), &self.image, &options)?.disk)
    }

    /// Opens the file system, and says what is odd about it.
    fn files(&self, parents: &ParentArgs) -> Result<Box<dyn FileSystem>> {
        process::panics_are_errors();
        let disk = self.disk(parents)?;
        let opened = volumes(&disk)
            .and_then(|volumes| volumes.place(self.partition))
            .and_then(|range| files::open(Window::new(disk, range)?))
            .in_file(&self.image)?;
        for warning in opened.warnings() {
            eprintln!("flatdisk: {}: {warning}", escaped(&self.image.to_string_lossy()));
        }
        Ok(opened)
    }
}

/// Lists a directory, or shows a file.
pub fn ls(args: &LsArgs) -> Result<u8> {
    let target = Target::parse(&args.target)?;
    let mut files = target.files(&args.parents)?;
    let found = files.stat(&target.path).in_file(&target.image)?;
    let mut entries = match found.kind {
        FileKind::Directory => files.list(&target.path).in_file(&target.image)?,
        _ => vec![found],
    };
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    if args.output.json() {
        let entry = |entry: &Entry| {
            json!({
                "name": String::from_utf8_lossy(&entry.name),
                "kind": entry.kind,
                "size": entry.size,
                "modified": entry.modified,
                "mode": entry.mode,
            })
        };
        let entries: Vec<_> = entries.iter().map(entry).collect();
        print_json(&json!({ "entries": entries }))?;
        return Ok(0);
    }
    entries.iter().try_for_each(|entry| print_entry(entry, args.long))?;
    Ok(0)
}

fn print_entry(entry: &Entry, long: bool) -> Result<()> {
    let name = escaped(&String::from_utf8_lossy(&entry.name));
    let mark = if entry.kind == FileKind::Directory { "/" } else { "" };
    if !long {
        return print_line(&format!("{name}{mark}"));
    }
    let kind = match entry.kind {
        FileKind::File => '-',
        FileKind::Directory => 'd',
        FileKind::Symlink => 'l',
        FileKind::Special => '?',
    };
    let mode = entry.mode.map_or_else(|| "-".to_owned(), |mode| format!("{mode:04o}"));
    let time = entry.modified.map_or_else(|| "-".to_owned(), date);
    print_line(&format!("{kind} {mode:>4} {:>14} {time:>16} {name}{mark}", entry.size))
}

/// A time in UTC, to the minute.
fn date(seconds: i64) -> String {
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Counted from the first of March of the year 0, so that leap days end the years.
    let days = days + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = match month {
        10.. => (era * 400 + year_of_era + 1, month - 9),
        _ => (era * 400 + year_of_era, month + 3),
    };
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}", rest / 3600, rest / 60 % 60)
}

/// Prints a file, or the bytes of a disk.
pub fn cat(args: &CatArgs) -> Result<u8> {
    let target = Target::parse(&args.target)?;
    if target.path.is_empty() {
        if let Some(text) = source::text_of(&target.image)? {
            print_bytes(&text)?;
            return Ok(0);
        }
        return cat_bytes(&target, args);
    }
    if args.range.given() {
        let what = "a part of a file, or its bytes in hexadecimal, are not printed";
        return Err(Error::invalid(what).hint("cat it whole, and let tail or xxd do that"));
    }
    struct Print;
    impl Sink for Print {
        fn data(&mut self, bytes: &[u8]) -> Result<()> {
            print_bytes(bytes)
        }
        fn hole(&mut self, len: u64) -> Result<()> {
            zeroes(len, print_bytes)
        }
    }
    target
        .files(args.disk.parents())?
        .read(&target.path, true, &mut Print)
        .in_file(&target.image)?;
    Ok(0)
}

fn cat_bytes(target: &Target, args: &CatArgs) -> Result<u8> {
    let disk = args.disk.open(&target.image, Access::Read)?.disk;
    let range = match target.partition {
        None => 0..disk.size(),
        number => volumes(&disk).and_then(|found| found.place(number)).in_file(&target.image)?,
    };
    print_range(disk, range, &args.range).in_file(&target.image)
}

/// The last name of a path, if it has one.
fn last_name(path: &[u8]) -> Option<OsString> {
    let mut names = path.split(|byte| *byte == b'/').rev();
    let name = names.find(|name| !matches!(*name, b"" | b"."))?;
    (name != b"..").then(|| OsString::from_vec(name.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_is_the_first_part_that_is_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("a:1");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("x.vhd"), "").unwrap();
        std::fs::write(folder.join("y:2"), "").unwrap();
        let parse = |text: &str| {
            let target = Target::parse(folder.join(text).as_os_str()).ok()?;
            let image = target.image.file_name().unwrap().to_str().unwrap().to_owned();
            Some((image, target.partition, String::from_utf8(target.path).unwrap()))
        };
        let some =
            |image: &str, number, path: &str| Some((image.to_owned(), number, path.to_owned()));
        assert_eq!(parse("x.vhd"), some("x.vhd", None, ""));
        assert_eq!(parse("x.vhd/"), some("x.vhd", None, "/"));
        assert_eq!(parse("x.vhd:3/etc/a:4"), some("x.vhd", Some(3), "/etc/a:4"));
        assert_eq!(parse("x.vhd:/etc"), some("x.vhd", None, "/etc"));
        assert_eq!(parse("x.vhd:3"), some("x.vhd", Some(3), ""));
        assert_eq!(parse("y:2/b"), some("y:2", None, "/b"));
        assert_eq!(parse("y:2:5/b"), some("y:2", Some(5), "/b"));
        assert_eq!(parse("x.vhd:x/etc"), None);
        assert_eq!(parse("z/etc"), None);
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(date(0), "1970-01-01 00:00");
        assert_eq!(date(951_782_400 + 86_399), "2000-02-29 23:59");
        assert_eq!(date(-1), "1969-12-31 23:59");
    }

    #[test]
    fn a_path_ends_in_a_name_or_in_none() {
        assert_eq!(last_name(b"/a/b/"), Some("b".into()));
        assert_eq!(last_name(b"/"), None);
        assert_eq!(last_name(b"/a/.."), None);
    }
}
