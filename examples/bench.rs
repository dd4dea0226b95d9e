//! Measures flat files beside the host's file and, where it is installed, `qemu-storage-daemon`:
//!
//!     cargo run --release --example bench -- [--size GiB] [--seconds N] [--runs N] [--dir DIR]
//!
//! Needs fio, root (or `fusermount3`), and room for eight times the size. Prints a table of medians as
//! multiples of the host's file, which is 1. Client and daemon share one processor in all cells but
//! the allocating ones: unpinned, small requests measure the scheduler.

use std::error::Error;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use clap::Parser;
use flatdisk::disk::Disk;
use flatdisk::formats::{self, CreateSpec, OpenOptions};
use flatdisk::storage::{Access, file::HostFs};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// What is measured: title, fio's arguments, whether it needs an empty image.
const CELLS: [(&str, &[&str], bool); 7] = [
    ("4 KiB random read, direct", &["--rw=randread", "--bs=4k", "--direct=1"], false),
    ("1 MiB sequential read, direct", &["--rw=read", "--bs=1M", "--direct=1"], false),
    ("4 KiB random write, direct", &["--rw=randwrite", "--bs=4k", "--direct=1"], false),
    ("4 KiB random write, fsync every 32", &["--rw=randwrite", "--bs=4k", "--fsync=32"], false),
    (
        "4 KiB random write, buffered, final fsync",
        &["--rw=randwrite", "--bs=4k", "--io_size=96M", "--end_fsync=1"],
        false,
    ),
    ("1 MiB writes into an empty disk", &["--rw=write", "--bs=1M", "--end_fsync=1"], true),
    (
        "64 KiB random writes into an empty disk",
        &["--rw=randwrite", "--bs=64k", "--io_size=256M", "--end_fsync=1"],
        true,
    ),
];

/// Kinds of image: title, extension, subformat, QEMU's name of the format.
const IMAGES: [(&str, &str, &str, &str); 4] = [
    ("dynamic VHD", "vhd", "dynamic", "vpc"),
    ("dynamic VHDX", "vhdx", "dynamic", "vhdx"),
    ("sparse VMDK", "vmdk", "monolithicSparse", "vmdk"),
    ("flat VMDK", "flat.vmdk", "monolithicFlat", ""),
];

/// Compares flat files with the host's file and with qemu-storage-daemon.
#[derive(Parser)]
struct Arguments {
    /// Size of the disks in GiB.
    #[arg(long, default_value_t = 1)]
    size: u64,
    /// Seconds per cell.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Runs, of which the median counts.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Where the images are made: the file system that counts.
    #[arg(long, default_value = "/var/tmp")]
    dir: PathBuf,
}

#[derive(Clone, Copy, PartialEq)]
enum Server {
    Host,
    Flatdisk,
    Qemu,
}

fn main() -> ExitCode {
    // Mounting, this program runs itself as `flatdisk`.
    if std::env::args().nth(1).is_some_and(|first| ["mount", "umount"].contains(&first.as_str())) {
        return flatdisk::cli::run();
    }
    match compare(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bench: {e}");
            ExitCode::FAILURE
        }
    }
}

fn compare(arguments: &Arguments) -> Result<()> {
    if !runs("fio", "--version") {
        return Err("fio is not installed".into());
    }
    let qemu = runs("qemu-storage-daemon", "--version");
    if !qemu {
        eprintln!("qemu-storage-daemon is not installed: left out");
    }
    let scratch = tempfile::Builder::new().prefix("flatdisk-bench-").tempdir_in(&arguments.dir)?;
    let bench = Bench { dir: scratch.path(), size: arguments.size << 30, arguments };
    bench.make_images()?;
    let mut columns = vec![("host file".to_owned(), Server::Host, IMAGES[0])];
    columns.extend(IMAGES.map(|image| (image.0.to_owned(), Server::Flatdisk, image)));
    if qemu {
        let by_qemu = IMAGES.iter().filter(|image| !image.3.is_empty());
        columns.extend(by_qemu.map(|&image| (format!("QEMU, {}", image.0), Server::Qemu, image)));
    }
    let mut figures = vec![vec![Vec::new(); columns.len()]; CELLS.len()];
    for run in 1..=arguments.runs {
        for (column, (title, server, image)) in columns.iter().enumerate() {
            eprintln!("run {run} of {}: {title}", arguments.runs);
            for (cell, figure) in bench.measure(*server, image)?.into_iter().enumerate() {
                figures[cell][column].push(figure);
            }
        }
    }
    let titles: Vec<_> = columns.iter().map(|(title, ..)| title.as_str()).collect();
    println!("| | {} |\n|---|{}", titles.join(" | "), "---|".repeat(titles.len()));
    for ((title, ..), row) in CELLS.iter().zip(&mut figures) {
        let medians: Vec<f64> = row.iter_mut().map(|figures| median(figures)).collect();
        let host = format!("{:.0} MB/s", medians[0] / 1e6);
        let ratios = medians[1..].iter().map(|figure| format!("{:.2}", figure / medians[0]));
        let cells: Vec<_> = std::iter::once(host).chain(ratios).collect();
        println!("| {title} | {} |", cells.join(" | "));
    }
    Ok(())
}

struct Bench<'a> {
    dir: &'a Path,
    size: u64,
    arguments: &'a Arguments,
}

impl Bench<'_> {
    /// The host's file and the images, all full of the same bytes.
    fn make_images(&self) -> Result<()> {
        eprintln!("making images of {} GiB in {}", self.arguments.size, self.dir.display());
        let mut host = File::create(self.dir.join("disk.raw"))?;
        let disks = IMAGES
            .iter()
            .map(|&(_, extension, subformat, _)| {
                let path = self.dir.join(format!("disk.{extension}"));
                self.create(&path, subformat)?;
                open_for_writing(&path)
            })
            .collect::<Result<Vec<_>>>()?;
        let mut rng = fastrand::Rng::with_seed(1);
        let mut chunk = vec![0; 1 << 20];
        for at in (0..self.size).step_by(chunk.len()) {
            rng.fill(&mut chunk);
            host.write_all(&chunk)?;
            for disk in &disks {
                disk.write_at(at, &chunk)?;
            }
        }
        for disk in &disks {
            disk.close()?;
        }
        host.sync_all()?;
        Ok(())
    }

    fn create(&self, path: &Path, subformat: &str) -> Result<()> {
        let format = formats::by_extension(path).ok_or("no format")?;
        let size = self.size;
        let spec = CreateSpec { subformat: Some(subformat.into()), size, ..Default::default() };
        Ok(formats::create(format, &HostFs, path, &spec)?)
    }

    /// All cells of one column, in bytes per second.
    fn measure(&self, server: Server, image: &(&str, &str, &str, &str)) -> Result<Vec<f64>> {
        let (_, extension, subformat, qemu_format) = *image;
        let name = if server == Server::Host { "raw" } else { extension };
        let full = self.dir.join(format!("disk.{name}"));
        let mut figures = Vec::new();
        let pinned = ["--cpus_allowed=0".to_owned()];
        let served = Served::start(server, &full, qemu_format, self.dir, true)?;
        warm(&full)?;
        for (_, arguments, empty) in CELLS {
            if !empty {
                figures.push(self.fio(&served.flat, arguments, &pinned)?);
            }
        }
        served.stop()?;
        for (_, arguments, empty) in CELLS {
            if !empty {
                continue;
            }
            let fresh = self.dir.join(format!("fresh.{name}"));
            if server == Server::Host {
                File::create(&fresh)?.set_len(self.size)?;
            } else {
                self.create(&fresh, subformat)?;
            }
            let served = Served::start(server, &fresh, qemu_format, self.dir, false)?;
            figures.push(self.fio(&served.flat, arguments, &[])?);
            served.stop()?;
            fs::remove_file(&fresh)?;
            // A flat VMDK has a second file.
            let _ = fs::remove_file(self.dir.join("fresh.flat-flat.vmdk"));
        }
        Ok(figures)
    }

    /// Runs fio and returns its bytes per second.
    fn fio(&self, file: &Path, arguments: &[&str], more: &[String]) -> Result<f64> {
        let timed = !arguments.iter().any(|a| a.starts_with("--end_fsync"));
        let mut fio = Command::new("fio");
        fio.args(["--name=x", "--ioengine=psync", "--output-format=json", "--norandommap"])
            .args(["--allow_file_create=0", "--fallocate=none", "--randrepeat=0"])
            .arg(format!("--filename={}", file.display()))
            .arg(format!("--size={}", self.size))
            .args(arguments)
            .args(more);
        if timed {
            fio.args([format!("--runtime={}", self.arguments.seconds), "--time_based".into()]);
        }
        let output = fio.output()?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(format!("fio on {}: {said}", file.display()).into());
        }
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let job = &report["jobs"][0];
        let speed = |direction: &str| job[direction]["bw_bytes"].as_f64().unwrap_or(0.0);
        Ok(speed("read").max(speed("write")))
    }
}

fn open_for_writing(path: &Path) -> Result<std::sync::Arc<Disk>> {
    Ok(formats::open(&HostFs::shared(), path, &OpenOptions::new(Access::Write))?.disk)
}

/// An image behind its server, or the host's file itself.
struct Served {
    flat: PathBuf,
    daemon: Option<Child>,
    mount_point: Option<PathBuf>,
}

impl Served {
    fn start(server: Server, image: &Path, format: &str, dir: &Path, pin: bool) -> Result<Self> {
        let name = image.file_name().and_then(|name| name.to_str()).ok_or("a strange name")?;
        let mut command = Command::new("taskset");
        command.args(["-c", if pin { "0" } else { "0-1023" }]);
        let at = dir.join("mnt");
        let served = match server {
            Server::Host => Self { flat: image.to_owned(), daemon: None, mount_point: None },
            Server::Flatdisk => {
                fs::create_dir_all(&at)?;
                command.arg(std::env::current_exe()?).args(["mount", "-f"]).arg(image).arg(&at);
                Self {
                    flat: at.join(format!("{name}.img")),
                    daemon: Some(command.spawn()?),
                    mount_point: Some(at),
                }
            }
            Server::Qemu => {
                let flat = dir.join("qemu.img");
                File::create(&flat)?;
                let file = format!(
                    "driver=file,node-name=f,filename={},aio=io_uring,discard=unmap",
                    image.display()
                );
                let disk = format!("driver={format},node-name=d,file=f,discard=unmap");
                let export =
                    format!("type=fuse,id=e,node-name=d,writable=on,mountpoint={}", flat.display());
                command.arg("qemu-storage-daemon");
                command.args(["--blockdev", &file, "--blockdev", &disk, "--export", &export]);
                Self {
                    flat,
                    daemon: Some(command.stderr(Stdio::null()).spawn()?),
                    mount_point: None,
                }
            }
        };
        for _ in 0..500 {
            if fs::metadata(&served.flat).is_ok_and(|meta| meta.len() > 0) {
                return Ok(served);
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        Err(format!("{} did not come up", served.flat.display()).into())
    }

    fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let Some(mut daemon) = self.daemon.take() else { return Ok(()) };
        if let Some(at) = &self.mount_point {
            Command::new(std::env::current_exe()?).arg("umount").arg(at).status()?;
        } else {
            Command::new("kill").arg(daemon.id().to_string()).status()?;
        }
        daemon.wait()?;
        Ok(())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            eprintln!("bench: {e}");
        }
    }
}

/// Brings an image into the host's page cache.
fn warm(image: &Path) -> Result<()> {
    let flat = image.with_file_name("disk.flat-flat.vmdk");
    let payload = if image.ends_with("disk.flat.vmdk") { &flat } else { image };
    let mut file = File::open(payload)?;
    let mut chunk = vec![0; 1 << 20];
    while file.read(&mut chunk)? > 0 {}
    Ok(())
}

fn median(figures: &mut [f64]) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn runs(program: &str, argument: &str) -> bool {
    let mut command = Command::new(program);
    command.arg(argument).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}
