//! Files cut short at every length that matters: what is read is right or an error, a check never calls the
//! image clean while a byte of the disk is lost, and no write and no repair makes the loss look like zeroes
//! but with consent.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::images::Image;
use common::{in_parallel, number, pattern, seed, tools};
use flatdisk::disk::Disk;
use flatdisk::disk::map::Source;
use flatdisk::error::ErrorKind;
use flatdisk::formats::{self, CreateSpec, OpenOptions, Scope};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::{Access, Host, Storage};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;

/// An image, and what it holds.
struct Sample {
    name: &'static str,
    host: Arc<MemoryHost>,
    /// The image.
    path: PathBuf,
    /// The file that is cut: the image's own, or one of its extents.
    cut: PathBuf,
    /// What the disk holds.
    whole: Vec<u8>,
}

fn image(format: &'static str, subformat: &str, size: u64, block: Option<u64>) -> Image {
    let mut image = Image::new(format, subformat, size);
    image.spec.block_size = block;
    image
}

/// A new image with something in its first block, across a border, and in its last sectors.
fn sample(name: &'static str, image: &Image, cut: &str) -> Sample {
    let host = MemoryHost::new();
    let dynamic: Arc<dyn Host> = host.clone();
    image.create_at(&*host, &image.path()).unwrap();
    let disk = formats::open(&dynamic, &image.path(), &OpenOptions::new(Access::Write)).unwrap();
    let whole = fill(&disk.disk, 1);
    Sample { name, host, path: image.path(), cut: Path::new("/t").join(cut), whole }
}

/// Writes to a disk and closes it; what it holds then.
fn fill(disk: &Disk, stamp: u32) -> Vec<u8> {
    let (size, block) = (disk.size(), disk.geometry().block_size.clamp(4096, disk.size() / 3));
    for (at, len) in [(size - 3 * SECTOR, 3 * SECTOR), (block - 700, 1400), (0, 5000)] {
        disk.write_at(at, &pattern::bytes(stamp, at, len)).unwrap();
    }
    let mut whole = vec![0; size as usize];
    disk.read_at(0, &mut whole).unwrap();
    disk.close().unwrap();
    whole
}

/// A child of an image that [`sample`] makes.
fn child(name: &'static str, image: &Image, cut: &str) -> Sample {
    let parent = sample(name, image, "");
    let path = Path::new("/t/child").with_extension(image.format);
    let host: Arc<dyn Host> = parent.host.clone();
    let opened = formats::open(&host, &parent.path, &OpenOptions::new(Access::Read)).unwrap();
    let spec = CreateSpec { block_size: image.spec.block_size, ..CreateSpec::default() };
    let format = formats::by_name(image.format).unwrap();
    format.create_child(&*host, &path, &opened, &spec).unwrap();
    let disk = formats::open(&host, &path, &OpenOptions::new(Access::Write)).unwrap().disk;
    let middle = disk.size() / 2 / SECTOR * SECTOR;
    disk.write_at(middle, &pattern::bytes(7, middle, SECTOR)).unwrap();
    let whole = fill(&disk, 2);
    let cut = Path::new("/t").join(cut);
    Sample { name, host: parent.host, path, cut, whole }
}

fn samples() -> Vec<Sample> {
    let vhd = image("vhd", "dynamic", 400 * KIB + 3 * SECTOR, Some(64 * KIB));
    let vhdx = image("vhdx", "dynamic", 5 * MIB + 512 * KIB, Some(2 * MIB));
    let sparse = image("vmdk", "monolithicSparse", 400 * KIB + 3 * SECTOR, None);
    let split = image("vmdk", "twoGbMaxExtentSparse", 400 * KIB, None);
    let esx = image("vmdk", "vmfsSparse", 200 * KIB, None);
    vec![
        sample("dynamic VHD", &vhd, "disk.vhd"),
        sample("fixed VHD", &image("vhd", "fixed", 100 * KIB, None), "disk.vhd"),
        child("VHD child", &vhd, "child.vhd"),
        sample("dynamic VHDX", &vhdx, "disk.vhdx"),
        sample("fixed VHDX", &image("vhdx", "fixed", 3 * MIB, Some(MIB)), "disk.vhdx"),
        child("VHDX child", &vhdx, "child.vhdx"),
        child("parent of a VHDX child", &vhdx, "disk.vhdx"),
        sample("sparse VMDK", &sparse, "disk.vmdk"),
        child("VMDK child", &sparse, "child.vmdk"),
        sample("split VMDK", &split, "disk-s001.vmdk"),
        sample("flat VMDK", &image("vmdk", "monolithicFlat", 64 * KIB, None), "disk-flat.vmdk"),
        sample("ESX sparse VMDK", &esx, "disk-delta.vmdk"),
        child("ESX delta", &image("vmdk", "vmfs", 200 * KIB, None), "child-delta.vmdk"),
    ]
}

fn file_len(host: &MemoryHost, path: &Path) -> u64 {
    host.file(path).unwrap_or_else(|| panic!("no file {}", path.display())).len().unwrap()
}

impl Sample {
    /// Whether the file that is cut is the image's own or an extent of it, and no parent.
    fn is_own(&self) -> bool {
        !self.name.starts_with("parent")
    }

    /// Lengths at which something ends or begins, one byte more, one less.
    fn borders(&self) -> BTreeSet<u64> {
        let len = file_len(&self.host, &self.cut);
        let mut at: BTreeSet<u64> = [0, len].into();
        let step = if self.path.extension().unwrap() == "vhdx" { 64 * KIB } else { SECTOR };
        at.extend((0..len.min(32 * step)).step_by(step as usize));
        at.extend((0..len).step_by(MIB as usize));
        // The ends of tables that do not fill their place.
        at.extend([3 * MIB + 8, 3 * MIB + 24, 3 * MIB + 32]);
        let host: Arc<dyn Host> = self.host.clone();
        let image = formats::open(&host, &self.path, &OpenOptions::new(Access::Read)).unwrap();
        for disk in image.chain().map(|image| &image.disk) {
            for extent in disk.extents(0..disk.size()).unwrap().iter() {
                if let Source::File { at: place, .. } = extent.source {
                    at.extend([place.saturating_sub(SECTOR), place, place + extent.len]);
                }
            }
        }
        let around = at.into_iter().flat_map(|at| [at.saturating_sub(1), at, at + 1]);
        around.filter(|at| *at < len).collect()
    }

    /// The image with its file cut to `len` bytes.
    fn cut_to(&self, len: u64) -> Arc<MemoryHost> {
        let host = self.host.fork();
        host.file(&self.cut).unwrap().set_len(len).unwrap();
        host
    }
}

/// What became of a disk: the sectors that are lost. `None`: the image does not open.
fn lost(
    sample: &Sample,
    host: &Arc<dyn Host>,
    force: bool,
    about: &str,
) -> Option<Vec<Range<u64>>> {
    let options = OpenOptions { force, ..OpenOptions::new(Access::Read) };
    let disk = match formats::open(host, &sample.path, &options) {
        Ok(image) => image.disk,
        Err(e) => {
            assert_ne!(e.kind(), ErrorKind::Failed, "{about}: {e}");
            return None;
        }
    };
    assert_eq!(disk.size(), sample.whole.len() as u64, "{about}");
    let mut lost: Vec<Range<u64>> = Vec::new();
    read_or_lose(sample, &disk, 0..disk.size(), &mut lost, about);
    Some(lost)
}

/// Reads a range in halves until all is right or a sector is lost.
fn read_or_lose(
    sample: &Sample,
    disk: &Disk,
    range: Range<u64>,
    lost: &mut Vec<Range<u64>>,
    about: &str,
) {
    let mut buf = vec![0xee; (range.end - range.start) as usize];
    if disk.read_at(range.start, &mut buf).is_ok() {
        let expected = &sample.whole[range.start as usize..range.end as usize];
        assert!(buf == expected, "{about}: another value in {range:x?}");
        return;
    }
    if range.end - range.start <= SECTOR {
        match lost.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => lost.push(range),
        }
        return;
    }
    let middle = range.start + (range.end - range.start).div_ceil(2 * SECTOR) * SECTOR;
    read_or_lose(sample, disk, range.start..middle, lost, about);
    read_or_lose(sample, disk, middle..range.end, lost, about);
}

fn run(sample: &Sample, len: u64) {
    let about = &format!("{} cut to {len:#x}", sample.name);
    let host = sample.cut_to(len);
    let dynamic: Arc<dyn Host> = host.clone();
    let state = || host.files().iter().map(|file| file.to_vec()).collect::<Vec<_>>();
    let before = lost(sample, &dynamic, false, about);
    lost(sample, &dynamic, true, &format!("{about}, by force"));
    let harmed = before.as_ref().is_none_or(|lost| !lost.is_empty());
    let options = OpenOptions::new(Access::Write);
    if sample.is_own() {
        match formats::check(&dynamic, &sample.path, &options) {
            Ok(report) => {
                assert!(!harmed || report.exit_status() == 2, "{about}: {report:#?}");
                for range in before.iter().flatten() {
                    let told = report.damage.iter().any(|damage| {
                        damage.start <= range.start && range.end <= damage.start + damage.length
                    });
                    assert!(told, "{about}: {range:x?} is lost, told is {:x?}", report.damage);
                }
            }
            Err(e) => assert!(harmed, "{about}: {e}"),
        }
    }

    // A writer must not make the loss look like zeroes.
    if sample.is_own()
        && let Ok(image) = formats::open(&dynamic, &sample.path, &options)
    {
        let known = state();
        let written = image.disk.write_at(0, &sample.whole[..SECTOR as usize]);
        assert!(!harmed || written.is_err(), "{about}: written to");
        let _ = image.disk.close();
        assert!(written.is_ok() || state() == known, "{about}: refused, yet changed");
    }
    assert_eq!(lost(sample, &dynamic, false, &format!("{about}, written")), before.clone());

    let host = sample.cut_to(len);
    let dynamic: Arc<dyn Host> = host.clone();
    let repaired = formats::repair(&dynamic, &sample.path, &options, Scope::All, false);
    let after = lost(sample, &dynamic, false, &format!("{about}, repaired"));
    if let Some(lost) = &before {
        assert_eq!(after.as_ref(), Some(lost), "{about}, repaired");
    }
    if let Ok(repaired) = repaired {
        let harmed = after.is_none_or(|lost| !lost.is_empty());
        let told = repaired.after.exit_status() == 2;
        assert!(!harmed || !sample.is_own() || told, "{about}, repaired");
    }
}

/// With consent a repair ends with an image that opens and reads, lost parts as zeroes.
fn consent(sample: &Sample, len: u64) {
    let about = &format!("{} cut to {len:#x}, given up", sample.name);
    let host: Arc<dyn Host> = sample.cut_to(len);
    let Some(before) = lost(sample, &host, false, about) else { return };
    let options = OpenOptions::new(Access::Write);
    let repaired = formats::repair(&host, &sample.path, &options, Scope::Lossy, false).unwrap();
    if repaired.after.exit_status() == 2 {
        return;
    }
    let image = formats::open(&host, &sample.path, &options).unwrap();
    let mut now = vec![1; sample.whole.len()];
    image.disk.read_at(0, &mut now).unwrap();
    let mut expected = sample.whole.clone();
    for range in before {
        let range = range.start as usize..range.end as usize;
        // A block is given up as a whole where nothing says what is left of it.
        let given = now[range.clone()].iter().all(|byte| *byte == 0);
        assert!(given, "{about}: {range:x?} is no zeroes");
        expected[range].fill(0);
    }
    let differs = (0..now.len()).filter(|at| now[*at] != expected[*at] && now[*at] != 0).count();
    assert_eq!(differs, 0, "{about}: another value");
    image.disk.write_at(0, &[1]).unwrap();
    image.disk.close().unwrap();
}

#[test]
fn a_file_cut_at_a_border_gives_data_or_errors() {
    for sample in samples() {
        let lengths: Vec<u64> = sample.borders().into_iter().collect();
        in_parallel(&lengths, |len| run(&sample, *len));
    }
}

#[test]
fn a_file_cut_anywhere_gives_data_or_errors() {
    let (count, seed) = (number("FLATDISK_CUTS", 200), seed());
    for (index, sample) in samples().into_iter().enumerate() {
        let mut random = fastrand::Rng::with_seed(seed + index as u64);
        let len = file_len(&sample.host, &sample.cut);
        let lengths: Vec<u64> = (0..count).map(|_| random.u64(0..len)).collect();
        in_parallel(&lengths, |len| run(&sample, *len));
    }
}

#[test]
fn what_is_given_up_with_consent_reads_as_zeroes() {
    for sample in samples().iter().filter(|sample| sample.cut == sample.path) {
        let lengths: Vec<u64> = sample.borders().into_iter().step_by(3).collect();
        in_parallel(&lengths, |len| consent(sample, *len));
    }
}

/// Cuts of the samples called so, and where each is held against another program that writes what it reads of
/// an image into a raw file.
fn beside(known: &[&str], cuts: usize, read: impl Fn(&Path, &Path) + Sync) {
    for sample in samples().iter().filter(|sample| known.contains(&sample.name)) {
        let lengths: Vec<u64> = sample.borders().into_iter().collect();
        let step = lengths.len() / cuts;
        let lengths: Vec<u64> = lengths.iter().rev().step_by(step).copied().collect();
        in_parallel(&lengths, |len| nothing_more_than_here(sample, *len, &read));
    }
}

fn nothing_more_than_here(sample: &Sample, len: u64, read: impl Fn(&Path, &Path)) {
    let about = &format!("{} cut to {len:#x}", sample.name);
    let host = sample.cut_to(len);
    let folder = common::folder();
    let [image, raw] =
        [sample.path.file_name().unwrap(), "raw".as_ref()].map(|n| folder.path().join(n));
    std::fs::write(&image, host.file(&sample.cut).unwrap().to_vec()).unwrap();
    read(&image, &raw);
    // Whoever stops at an error has read what comes before.
    let Ok(theirs) = std::fs::read(&raw) else { return };
    let dynamic: Arc<dyn Host> = host;
    let lost = lost(sample, &dynamic, false, about);
    // What is refused here is lost as a whole.
    for range in lost.unwrap_or_else(|| std::iter::once(0..sample.whole.len() as u64).collect()) {
        let range = range.start as usize..range.end as usize;
        // Some fill up with zeroes.
        let read = theirs.get(range.clone()) == Some(&sample.whole[range.clone()]);
        let blank = sample.whole[range.clone()].iter().all(|byte| *byte == 0);
        assert!(!read || blank, "{about}: another program reads {range:x?}");
    }
}

#[test]
fn nothing_is_lost_here_that_qemu_still_reads() {
    if !tools::have("qemu-img") {
        return;
    }
    beside(&["dynamic VHD", "dynamic VHDX", "fixed VHDX", "sparse VMDK"], 12, |image, raw| {
        let format = match image.extension().unwrap().to_str().unwrap() {
            "vhd" => "vpc",
            other => other,
        };
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", format, "-O", "raw"]).args([image, raw]);
        if !tools::output(&mut convert).status.success() {
            // It makes the file as large as the disk before it reads.
            let _ = std::fs::remove_file(raw);
        }
    });
}

#[test]
fn nothing_is_lost_here_that_dissect_still_reads() {
    let Some(python) = std::env::var_os("FLATDISK_DISSECT") else {
        return common::skip("FLATDISK_DISSECT names no folder");
    };
    if !tools::have("python3") {
        return;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/chain_peers/read.py");
    beside(&["dynamic VHD", "dynamic VHDX", "sparse VMDK"], 6, |image, raw| {
        let mut read = Command::new("python3");
        tools::output(read.arg(&script).args([image, raw]).env("PYTHONPATH", &python));
    });
}

#[test]
fn nothing_is_lost_here_that_libvhdi_still_reads() {
    if !tools::have("vhdimount") {
        return;
    }
    if !Path::new("/dev/fuse").exists() {
        return common::skip("there is no /dev/fuse");
    }
    beside(&["dynamic VHD", "fixed VHD", "dynamic VHDX"], 6, |image, raw| {
        let point = image.with_extension("mnt");
        std::fs::create_dir(&point).unwrap();
        let mut mount = Command::new("vhdimount");
        if !tools::output(mount.args([image, &point])).status.success() {
            return;
        }
        // What cannot be read is left out: the file is as long as what comes before.
        let disk = ["vhdi1", "vhdx1"].map(|name| point.join(name)).into_iter().find(|p| p.exists());
        if let Some(disk) = disk {
            let _ = Command::new("dd")
                .arg("bs=512")
                .arg("status=none")
                .args([format!("if={}", disk.display()), format!("of={}", raw.display())])
                .output();
        }
        tools::run(Command::new("umount").arg(&point));
    });
}
