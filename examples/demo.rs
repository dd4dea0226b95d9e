//! One image of each format, mounted, written through its flat file, unmounted and checked.
//!
//! `cargo run --release --example demo` needs `/dev/fuse`, and `fusermount3` unless run as root. It
//! works in a scratch folder that it removes. Every command it shows is a real `flatdisk` command
//! line; this program runs itself as `flatdisk` when it is given arguments.

use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, ExitCode};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const IMAGES: [(&str, &str); 7] = [
    ("dynamic.vhd", "dynamic"),
    ("fixed.vhd", "fixed"),
    ("dynamic.vhdx", "dynamic"),
    ("fixed.vhdx", "fixed"),
    ("sparse.vmdk", "monolithicSparse"),
    ("flat.vmdk", "monolithicFlat"),
    ("split.vmdk", "twoGbMaxExtentSparse"),
];
const SIZE: u64 = 64 << 20;
/// Where the demonstration writes: the first bytes, across a block border, the last bytes.
const PLACES: [u64; 3] = [0, (2 << 20) - 5000, SIZE - 10_000];

fn main() -> ExitCode {
    if std::env::args_os().len() > 1 {
        return flatdisk::cli::run();
    }
    match demonstrate() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("demo: {e}");
            ExitCode::FAILURE
        }
    }
}

fn demonstrate() -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("flatdisk-demo-").tempdir()?;
    let images = scratch.path().join("images");
    let mount_point = scratch.path().join("flat");
    fs::create_dir(&images)?;
    fs::create_dir(&mount_point)?;

    heading("Make one image of each kind");
    for (name, subformat) in IMAGES {
        let path = images.join(name);
        flatdisk(&["create", "--size", "64M", "--subformat", subformat, text(&path)?])?;
    }

    heading("Mount the folder");
    let mounted = Mounted::new(&images, &mount_point)?;
    list(&mount_point)?;

    heading("Write through the flat files, and read back");
    for (name, _) in IMAGES {
        let flat = OpenOptions::new()
            .read(true)
            .write(true)
            .open(mount_point.join(format!("{name}.img")))?;
        for place in PLACES {
            flat.write_all_at(&pattern(name, place), place)?;
        }
        flat.sync_all()?;
        verify(&flat, name)?;
        println!("{name}.img: {} writes synced and read back", PLACES.len());
    }
    list(&mount_point)?;

    heading("Unmount, check, mount again read-only: everything is there");
    mounted.unmount()?;
    for (name, _) in IMAGES {
        flatdisk(&["check", text(&images.join(name))?])?;
    }
    let mounted = Mounted::new_with(&images, &mount_point, &["-o", "ro"])?;
    for (name, _) in IMAGES {
        verify(&File::open(mount_point.join(format!("{name}.img")))?, name)?;
    }
    println!("all {} images hold what was written", IMAGES.len());
    mounted.unmount()
}

/// A live mount; unmounted when dropped, also when the demonstration fails half way.
struct Mounted<'a> {
    at: Option<&'a Path>,
}

impl<'a> Mounted<'a> {
    fn new(source: &Path, at: &'a Path) -> Result<Self> {
        Self::new_with(source, at, &[])
    }

    fn new_with(source: &Path, at: &'a Path, options: &[&str]) -> Result<Self> {
        let mut arguments = vec!["mount"];
        arguments.extend_from_slice(options);
        arguments.extend_from_slice(&[text(source)?, text(at)?]);
        flatdisk(&arguments)?;
        Ok(Self { at: Some(at) })
    }

    fn unmount(mut self) -> Result<()> {
        match self.at.take() {
            Some(at) => flatdisk(&["umount", text(at)?]),
            None => Ok(()),
        }
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        if let Some(at) = self.at.and_then(|at| text(at).ok()) {
            let _ = flatdisk(&["umount", at]);
        }
    }
}

/// Runs a `flatdisk` command and shows it as a person would type it.
fn flatdisk(arguments: &[&str]) -> Result<()> {
    println!("$ flatdisk {}", arguments.join(" "));
    let status = Command::new("/proc/self/exe").args(arguments).status()?;
    if status.success() { Ok(()) } else { Err(format!("that ended with {status}").into()) }
}

fn list(mount_point: &Path) -> Result<()> {
    println!("$ ls -ls {}", mount_point.display());
    let mut names: Vec<_> = fs::read_dir(mount_point)?
        .map(|entry| entry.map(|e| e.file_name()))
        .collect::<std::io::Result<_>>()?;
    names.sort();
    for name in names {
        let meta = fs::metadata(mount_point.join(&name))?;
        println!("{:>6} KiB of {:>9} bytes  {}", meta.blocks() / 2, meta.len(), name.display());
    }
    Ok(())
}

/// 9000 bytes that depend on the image and the place.
fn pattern(name: &str, place: u64) -> Vec<u8> {
    let seed = name.bytes().fold(place, |hash, byte| hash.wrapping_mul(31) + u64::from(byte));
    (0..9000u64).map(|i| (seed.wrapping_add(i).wrapping_mul(0x9e37_79b9) >> 13) as u8).collect()
}

fn verify(flat: &File, name: &str) -> Result<()> {
    for place in PLACES {
        let mut found = vec![0; 9000];
        flat.read_exact_at(&mut found, place)?;
        if found != pattern(name, place) {
            return Err(format!("{name}: wrong bytes at {place:#x}").into());
        }
    }
    Ok(())
}

fn heading(title: &str) {
    println!("\n== {title}");
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| "the scratch folder's name is not UTF-8".into())
}
