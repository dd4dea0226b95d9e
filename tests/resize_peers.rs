//! Other programs see a disk that got another size as it is: its size, what it holds, its partition table.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
mod live;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::corpus::hex;
use common::{pattern, skip, tools};
use flatdisk::formats::resize::resize;
use flatdisk::formats::{self, CreateSpec, OpenOptions};
use flatdisk::storage::file::HostFs;
use flatdisk::storage::{Access, Host};
use live::{Loop, flatdisk, have, run, succeed};

const SECTOR: u64 = 512;
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Sectors of a disk that hold something, by their offsets.
type Sectors = BTreeMap<u64, Vec<u8>>;

/// Sizes around the borders of an image's tables: every border, a sector and a block more and less.
fn around(borders: &[u64], block: u64) -> Vec<u64> {
    let near = |border: &u64| {
        [*border - block, *border - SECTOR, *border, *border + SECTOR, *border + block]
    };
    borders.iter().flat_map(near).collect()
}

/// A program that reads images: the size of the disk, and sectors of it.
trait Peer {
    fn name(&self) -> &str;
    fn look(&self, image: &Path, offsets: &[u64]) -> (u64, Vec<String>);
}

struct Qemu;

impl Peer for Qemu {
    fn name(&self) -> &str {
        "qemu-img"
    }

    fn look(&self, image: &Path, offsets: &[u64]) -> (u64, Vec<String>) {
        let driver = match image.extension().unwrap().to_str().unwrap() {
            "vhd" => "vpc",
            other => other,
        };
        let told = run("qemu-img", &[&"info", &"--output=json", &"-f", &driver, &image]);
        let told: serde_json::Value = serde_json::from_str(&told).unwrap();
        let sector = |offset: &u64| {
            let read = format!("read -v {offset} {SECTOR}");
            let said = run("qemu-io", &[&"-r", &"-f", &driver, &"-c", &read, &image]);
            // Lines of an address, 16 bytes in hexadecimal, and the same as text.
            let lines = said.lines().filter_map(|line| line.split_once(":  "));
            lines.map(|(_, line)| line[..47].replace(' ', "")).collect::<String>()
        };
        (told["virtual-size"].as_u64().unwrap(), offsets.iter().map(sector).collect())
    }
}

struct Dissect(PathBuf);

impl Peer for Dissect {
    fn name(&self) -> &str {
        "dissect"
    }

    fn look(&self, image: &Path, offsets: &[u64]) -> (u64, Vec<String>) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/chain_peers/look.py");
        let mut python = Command::new("python3");
        python.arg(script).arg(image).args(offsets.iter().map(u64::to_string));
        let said = succeed(python.env("PYTHONPATH", &self.0));
        let mut lines = said.lines();
        let size = lines.next().unwrap().parse().unwrap();
        (size, lines.map(str::to_owned).collect())
    }
}

/// `vhdimount` or `vmdkmount`.
struct Libyal(&'static str);

impl Peer for Libyal {
    fn name(&self) -> &str {
        self.0
    }

    fn look(&self, image: &Path, offsets: &[u64]) -> (u64, Vec<String>) {
        let point = live::scratch();
        run(self.0, &[&image, &point.path()]);
        let looked = (|| {
            let shown = fs::read_dir(point.path())?.next().unwrap()?.path();
            let file = File::open(&shown)?;
            let sector = |offset: &u64| {
                let mut bytes = vec![0; SECTOR as usize];
                file.read_exact_at(&mut bytes, *offset)?;
                Ok(hex(&bytes))
            };
            let sectors: std::io::Result<Vec<String>> = offsets.iter().map(sector).collect();
            Ok::<_, std::io::Error>((fs::metadata(&shown)?.len(), sectors?))
        })();
        run("umount", &[&point.path()]);
        looked.unwrap_or_else(|e| panic!("{}: {}: {e}", self.0, image.display()))
    }
}

/// Resizes an image of 3 MiB to each of the sizes and back, and has every peer look at each.
fn agree(format: &str, block: u64, borders: &[u64], peers: &[Box<dyn Peer>]) {
    let folder = common::folder();
    let path = folder.path().join(format!("disk.{format}"));
    let host: Arc<dyn Host> = HostFs::shared();
    let spec = CreateSpec { size: 3 * MIB, block_size: Some(block), ..CreateSpec::default() };
    formats::create(formats::by_name(format).unwrap(), &*host, &path, &spec).unwrap();
    let options = OpenOptions::new(Access::Write);
    let mut sizes = vec![3 * MIB];
    sizes.extend(around(borders, block));
    sizes.extend([3 * MIB * 1000, 3 * MIB]);
    let mut model = Sectors::new();
    for (number, size) in sizes.into_iter().enumerate() {
        resize(&host, &path, &options, size, false, &()).unwrap();
        model.retain(|offset, _| *offset < size);
        let disk = formats::open(&host, &path, &options).unwrap().disk;
        assert_eq!(disk.size(), size, "{format}");
        // Something at the beginning, in the last sector, and a place that nothing was written to.
        for at in [0, size - SECTOR] {
            let bytes = pattern::bytes(number as u32, at, SECTOR);
            disk.write_at(at, &bytes).unwrap();
            model.insert(at, bytes);
        }
        model.entry(MIB).or_insert_with(|| vec![0; SECTOR as usize]);
        disk.close().unwrap();
        drop(disk);
        let report = formats::check(&host, &path, &options).unwrap();
        assert!(report.findings.is_empty(), "{format}, {size} bytes: {:?}", report.findings);
        let offsets: Vec<u64> = model.keys().copied().collect();
        let expected: Vec<String> = model.values().map(|bytes| hex(bytes)).collect();
        for peer in peers {
            let (seen, sectors) = peer.look(&path, &offsets);
            assert_eq!(seen, size, "{format} in {}", peer.name());
            for ((offset, found), expected) in offsets.iter().zip(sectors).zip(&expected) {
                let name = peer.name();
                assert!(found == *expected, "{format} of {size} bytes in {name}: {offset:#x}");
            }
        }
    }
}

/// The peers that are here.
fn peers(libyal: &'static str) -> Vec<Box<dyn Peer>> {
    let mut peers: Vec<Box<dyn Peer>> = Vec::new();
    if tools::have("qemu-img") && tools::have("qemu-io") {
        peers.push(Box::new(Qemu));
    }
    match std::env::var_os("FLATDISK_DISSECT") {
        Some(folder) if tools::have("python3") => peers.push(Box::new(Dissect(folder.into()))),
        Some(_) => {}
        None => skip("FLATDISK_DISSECT names no folder"),
    }
    if live::can_mount() && tools::have(libyal) {
        peers.push(Box::new(Libyal(libyal)));
    }
    peers
}

#[test]
fn a_vhd_of_another_size_is_the_same_to_other_programs() {
    // A sector of the BAT has 128 entries.
    agree("vhd", 2 * MIB, &[256 * MIB], &peers("vhdimount"));
}

#[test]
fn a_vhdx_of_another_size_is_the_same_to_other_programs() {
    // A chunk of 4096 blocks has a sector bitmap, whose entry stands between theirs; a MiB of the BAT has
    // 131072 entries.
    let full = 131_072 / 4097 * 4096 * MIB + 131_072 % 4097 * MIB;
    agree("vhdx", MIB, &[4 * GIB, full], &peers("vhdimount"));
}

#[test]
fn a_vmdk_of_another_size_is_the_same_to_other_programs() {
    // A grain table has 512 entries, a sector of the directory 128.
    agree("vmdk", 64 * KIB, &[32 * MIB, 4 * GIB], &peers("vmdkmount"));
}

#[test]
fn a_moved_partition_table_of_4096_byte_sectors_is_accepted_by_other_programs() {
    if !live::can_mount() || !have(&["losetup", "sgdisk", "sfdisk", "partx"]) {
        return;
    }
    let folder = common::folder();
    let [raw, path] = ["table.raw", "disk.vhdx"].map(|name| folder.path().join(name));
    File::create(&raw).unwrap().set_len(64 * MIB).unwrap();
    {
        let device = Loop::new(&raw, &["-b", "4096"]);
        run("sgdisk", &[&"-n1:0:+20M", &device.device]);
    }
    live::create(&path, "64M", &["--sector-size", "4096"]);
    tools::run(flatdisk().arg("write").arg(&path).stdin(File::open(&raw).unwrap()));
    let is_good = |size: u64| {
        fs::remove_file(&raw).unwrap();
        succeed(flatdisk().args(["convert", "-q", "-O", "raw"]).args([&path, &raw]));
        assert_eq!(fs::metadata(&raw).unwrap().len(), size);
        let device = Loop::new(&raw, &["-r", "-b", "4096"]);
        let said = run("sgdisk", &[&"-v", &device.device]);
        assert!(said.contains("No problems found"), "{said}");
        let said = run("sfdisk", &[&"--verify", &device.device]);
        assert!(said.contains("No errors detected"), "{said}");
    };
    is_good(64 * MIB);
    succeed(flatdisk().args(["resize", "-q", "--move-gpt"]).arg(&path).arg("200M"));
    is_good(200 * MIB);
    succeed(flatdisk().args(["resize", "-q", "--shrink", "--move-gpt"]).arg(&path).arg("min"));
    // The table of 128 entries takes 4 sectors at the beginning, 5 with the header at the end.
    let first = 6 * 4096_u64;
    let end = size_of_disk(&path);
    assert!(end < 24 * MIB && end > 20 * MIB + first, "{end}");
    is_good(end);
}

fn size_of_disk(path: &Path) -> u64 {
    let options = OpenOptions::new(Access::Read);
    formats::open(&HostFs::shared(), path, &options).unwrap().disk.size()
}
