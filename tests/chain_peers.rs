//! Chains between flatdisk and programs that share no code with it, generation by generation: ours
//! read by them, theirs read by us.
//!
//! `FLATDISK_DISSECT` names the folder that dissect.hypervisor (PyPI) is installed in, `FLATDISK_VHD_LIB`
//! the `node_modules` with vhd-lib (npm).

// The helpers here serve tests only.
#![allow(clippy::unwrap_used)]

mod common;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::corpus::{hex, rows, unpack};
use common::images::errors;
use common::workload::scribble;
use common::{corpus, pattern, seed, skip, tools};
use fastrand::Rng;
use flatdisk::copy::delta;
use flatdisk::formats::{self, CreateSpec, OpenOptions, flatten, levels, snapshot};
use flatdisk::storage::file::HostFs;
use flatdisk::storage::{Access, Host};
use sha2::{Digest, Sha256};

const SIZE: usize = 12 << 20;

/// The folder that a variable names; says SKIPPED if it does not.
fn folder(variable: &str) -> Option<PathBuf> {
    let folder = std::env::var_os(variable).map(PathBuf::from);
    if folder.is_none() {
        skip(format_args!("{variable} names no folder"));
    }
    folder
}

fn script(program: &str, name: &str) -> Command {
    let mut command = Command::new(program);
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/chain_peers").join(name));
    command
}

fn vhd_lib(modules: &Path, arguments: &[&dyn AsRef<OsStr>]) {
    let mut command = script("node", "vhd.js");
    command.args(arguments.iter().map(|argument| argument.as_ref())).env("NODE_PATH", modules);
    // It takes parents' paths for paths from its root on.
    tools::run(command.current_dir("/"));
}

fn contents(path: &Path) -> Vec<u8> {
    let options = OpenOptions::new(Access::Read);
    let image = formats::open(&HostFs::shared(), path, &options).unwrap_or_else(|e| panic!("{e}"));
    let mut bytes = vec![0; image.disk.size() as usize];
    image.disk.read_at(0, &mut bytes).unwrap_or_else(|e| panic!("{e}"));
    bytes
}

fn same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let wrong = found.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "{what}: wrong from this byte on");
}

/// A chain of ours, the base first, and what each generation holds.
fn chain(dir: &Path, format: &str, blocks: &[Option<u64>], unit: usize) -> Vec<(PathBuf, Vec<u8>)> {
    let host: Arc<dyn Host> = HostFs::shared();
    let driver = formats::by_name(format).unwrap();
    let mut random = Rng::with_seed(seed());
    let mut model = vec![0; SIZE];
    let mut made: Vec<(PathBuf, Vec<u8>)> = Vec::new();
    for (number, &block_size) in blocks.iter().enumerate() {
        let path = dir.join(format!("{number}.{format}"));
        let spec = CreateSpec { size: SIZE as u64, block_size, ..CreateSpec::default() };
        match made.last() {
            None => formats::create(driver, &*host, &path, &spec).unwrap(),
            Some((parent, _)) => {
                let parent = formats::open(&host, parent, &OpenOptions::new(Access::Read)).unwrap();
                formats::create_child(driver, &*host, &path, &parent, &spec).unwrap();
            }
        }
        scribble(&host, &path, unit, &mut model, &mut random, 12);
        made.push((path, model.clone()));
    }
    made
}

#[test]
fn dissect_reads_our_vhdx_and_vmdk_chains() {
    let Some(python) = folder("FLATDISK_DISSECT") else { return };
    if !tools::have("python3") {
        return;
    }
    const MIB: u64 = 1 << 20;
    // It asks a VHDX parent across the borders of its blocks, and reads a bitmap short that it enters
    // in the middle of a byte; so blocks are alike and writes cover whole bytes.
    for (format, blocks, unit) in
        [("vhdx", [Some(2 * MIB); 4], 4096), ("vmdk", [None, Some(4096), None, Some(MIB)], 1)]
    {
        let dir = common::folder();
        for (path, model) in chain(dir.path(), format, &blocks, unit) {
            let raw = path.with_extension("raw");
            tools::run(script("python3", "read.py").args([&path, &raw]).env("PYTHONPATH", &python));
            same(&std::fs::read(&raw).unwrap(), &model, &path.display().to_string());
        }
    }
}

/// Unmounts when dropped.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn vhdimount_reads_our_vhd_chains() {
    if !tools::have("vhdimount") {
        return;
    }
    if !Path::new("/dev/fuse").exists() {
        return skip("there is no /dev/fuse");
    }
    let dir = common::folder();
    // To libvhdi 20210425 a run of stored sectors ends with a byte of the bitmap.
    let chain = chain(dir.path(), "vhd", &[None; 4], 4096);
    let point = dir.path().join("mnt");
    std::fs::create_dir(&point).unwrap();
    // It returns when the mount is live, and shows every generation, the base first.
    let child = &chain[chain.len() - 1].0;
    tools::run(Command::new("vhdimount").args([child, &point]));
    let _mounted = Mounted(point.clone());
    for (number, (path, model)) in chain.iter().enumerate() {
        let theirs = std::fs::read(point.join(format!("vhdi{}", number + 1))).unwrap();
        same(&theirs, model, &path.display().to_string());
    }
}

#[test]
fn vhd_chains_that_vhd_lib_makes_are_read_and_written() {
    let Some(modules) = folder("FLATDISK_VHD_LIB") else { return };
    if !tools::have("node") {
        return;
    }
    let vhd = |arguments: &[&dyn AsRef<OsStr>]| vhd_lib(&modules, arguments);
    let dir = common::folder();
    let host: Arc<dyn Host> = HostFs::shared();
    let mut random = Rng::with_seed(seed());
    let base = chain(dir.path(), "vhd", &[None], 1).remove(0);
    let (mut parent, mut model) = base;
    for number in 1..=3 {
        let child = dir.path().join(format!("theirs{number}.vhd"));
        let spec = CreateSpec { size: SIZE as u64, ..CreateSpec::default() };
        formats::create(&formats::vhd::Vhd, &*host, &child, &spec).unwrap();
        vhd(&[&"chain", &parent, &child]);
        for _ in 0..3 {
            let sector = random.usize(..SIZE / 512);
            let end = (SIZE / 512).min(sector + random.usize(1..3000));
            let part = &mut model[sector * 512..end * 512];
            pattern::fill(random.u32(..), sector as u64 * 512, part);
            let data = dir.path().join("data");
            std::fs::write(&data, part).unwrap();
            vhd(&[&"write", &child, &sector.to_string(), &data]);
        }
        same(&contents(&child), &model, &child.display().to_string());
        parent = child;
    }
    scribble(&host, &parent, 1, &mut model, &mut random, 12);
    same(&contents(&parent), &model, "their child, written by us");
}

#[test]
fn every_generation_of_the_corpus_chains_reads_as_listed() {
    let Some(corpus) = corpus::folder() else { return };
    let mut read = 0;
    for row in rows(&corpus) {
        if row.expected != "opens" || !row.id.contains("chain") && !row.id.contains("diff") {
            continue;
        }
        let unpacked = unpack(&corpus, &row);
        let hash = Sha256::digest(contents(&unpacked.image));
        assert_eq!(hex(&hash), row.sha256, "{}", row.id);
        read += 1;
    }
    assert!(read >= 7, "{read} generations");
}

/// A chain that is written, frozen, gone back on, flattened and merged by chance.
struct Life {
    host: Arc<dyn Host>,
    dir: tempfile::TempDir,
    format: &'static str,
    /// Writes are of whole units.
    unit: usize,
    /// The base first.
    members: Vec<(PathBuf, Vec<u8>)>,
    /// How many snapshots were taken.
    snapshots: usize,
}

impl Life {
    fn scribble(&mut self, random: &mut Rng) {
        let top = self.members.len() - 1;
        let (path, model) = &mut self.members[top];
        scribble(&self.host, path, self.unit, model, random, 6);
    }

    /// Takes the members out of a range, which are gone or stand beside the chain now.
    fn forget(&mut self, range: std::ops::Range<usize>) {
        for (path, _) in self.members.drain(range) {
            let _ = std::fs::remove_file(path);
        }
    }

    /// One change; what it was.
    fn step(&mut self, number: usize, random: &mut Rng) -> String {
        let options = OpenOptions::new(Access::Read);
        let top = self.members.len() - 1;
        let path = |index: usize| self.members[index].0.clone();
        match number % 6 {
            _ if top == 0 => self.snapshot(random),
            0 => self.snapshot(random),
            1 if top > 1 => {
                let middle = random.usize(1..top);
                levels::merge_middle(&self.host, &path(middle), &options, &()).unwrap();
                self.members[middle - 1].1 = self.members[middle].1.clone();
                self.forget(middle..middle + 1);
                format!("{middle} is out of the middle")
            }
            2 => {
                let name = path(top - 1).file_name().unwrap().to_str().unwrap().to_owned();
                snapshot::revert(&self.host, &path(top), &name, &options).unwrap();
                self.members[top].1 = self.members[top - 1].1.clone();
                format!("back to {name}")
            }
            3 => {
                // The delta onto a copy of the base makes it the top.
                let copies = self.dir.path().join("copies");
                std::fs::create_dir_all(&copies).unwrap();
                let copy = copies.join(path(0).file_name().unwrap());
                std::fs::copy(path(0), &copy).unwrap();
                let image = formats::open(&self.host, &path(top), &options).unwrap();
                let mut bytes = Vec::new();
                delta::make(&image, top, &mut bytes, &()).unwrap();
                let writing = OpenOptions::new(Access::Write);
                let mut bytes = std::io::Cursor::new(bytes);
                delta::apply(&self.host, &mut bytes, &copy, &writing, &()).unwrap();
                same(&contents(&copy), &self.members[top].1, "a delta");
                drop(image);
                // Others stand on what stays.
                let model = self.members[top].1.clone();
                let moved = self.dir.path().join(format!("delta{number}.{}", self.format));
                std::fs::rename(&copy, &moved).unwrap();
                self.forget(0..top + 1);
                self.members.push((moved, model));
                "a delta put onto a copy of the base".to_owned()
            }
            4 => {
                let lone = random.usize(1..=top);
                flatten::flatten(&self.host, &path(lone), &options, &()).unwrap();
                self.forget(0..lone);
                format!("{lone} is flat")
            }
            _ => {
                let into = random.usize(..top);
                levels::merge_to(&self.host, &path(top), &path(into), &options, false, &())
                    .unwrap();
                self.members[into].1 = self.members[top].1.clone();
                self.forget(into + 1..top + 1);
                format!("{top} is merged into {into}")
            }
        }
    }

    fn snapshot(&mut self, random: &mut Rng) -> String {
        self.snapshots += 1;
        let (path, model) = self.members.pop().unwrap();
        let name = format!("s{}", self.snapshots);
        let options = OpenOptions::new(Access::Read);
        let taken = snapshot::take(&self.host, &path, Some(&name), "", &options).unwrap();
        self.members.push((taken.frozen, model.clone()));
        self.members.push((path, model));
        self.scribble(random);
        format!("frozen as {name}")
    }
}

/// Has another program read an image into a raw disk at the path; whether it can read such a one.
type Peer<'a> = Box<dyn Fn(&Path, &Path) -> bool + 'a>;

/// Whether the dynamic headers of a VHD and of those it stands on are where new disks have them. Another
/// parent, or none, moves one; to vhd-lib that is no VHD.
fn headers_in_front(image: &Path) -> bool {
    let options = OpenOptions::new(Access::Read);
    let image = formats::open(&HostFs::shared(), image, &options).unwrap();
    let in_front = |path: &Path| std::fs::read(path).unwrap()[16..24] == 512u64.to_be_bytes();
    image.chain().all(|image| in_front(&image.path))
}

/// The programs that read chains of a format.
fn peers<'a>(
    format: &str,
    python: Option<&'a PathBuf>,
    node: Option<&'a PathBuf>,
) -> Vec<Peer<'a>> {
    let mut peers: Vec<Peer<'a>> = Vec::new();
    if format != "vhd"
        && let Some(python) = python
    {
        peers.push(Box::new(move |image, raw| {
            let mut command = script("python3", "read.py");
            tools::run(command.args([image, raw]).env("PYTHONPATH", python));
            true
        }));
    }
    if format == "vmdk" && tools::have("qemu-img") {
        peers.push(Box::new(|image, raw| {
            let convert = ["convert", "-f", "vmdk", "-O", "raw"];
            tools::run(Command::new("qemu-img").args(convert).args([image, raw]));
            true
        }));
    }
    if format == "vhd"
        && let Some(modules) = node
    {
        peers.push(Box::new(move |image, raw| {
            if !headers_in_front(image) {
                return false;
            }
            let flat = raw.with_extension("flat");
            vhd_lib(modules, &[&"flat", &image, &flat]);
            std::fs::write(raw, contents(&flat)).unwrap();
            true
        }));
    }
    if format == "vhd" && tools::have("vhdimount") && Path::new("/dev/fuse").exists() {
        peers.push(Box::new(|image, raw| {
            let point = raw.with_extension("mnt");
            std::fs::create_dir_all(&point).unwrap();
            tools::run(Command::new("vhdimount").args([image, &point]));
            let _mounted = Mounted(point.clone());
            let last = std::fs::read_dir(&point).unwrap().count();
            std::fs::copy(point.join(format!("vhdi{last}")), raw).unwrap();
            true
        }));
    }
    peers
}

#[test]
fn peers_agree_on_every_generation_after_each_step_of_a_chains_life() {
    const MIB: u64 = 1 << 20;
    let python = folder("FLATDISK_DISSECT").filter(|_| tools::have("python3"));
    let node = folder("FLATDISK_VHD_LIB").filter(|_| tools::have("node"));
    // Blocks are alike and writes cover whole bytes of bitmaps: the programs ask for that.
    for (format, block, unit) in
        [("vhd", Some(2 * MIB), 4096), ("vhdx", Some(2 * MIB), 4096), ("vmdk", None, 1)]
    {
        let peers = peers(format, python.as_ref(), node.as_ref());
        let mut reads = vec![0; peers.len()];
        let mut random = Rng::with_seed(seed());
        let links = random.usize(1..=6);
        let dir = common::folder();
        let members = chain(dir.path(), format, &vec![block; links + 1], unit);
        let (host, snapshots) = (HostFs::shared(), 0);
        let mut life = Life { host, dir, format, unit, members, snapshots };
        for number in 0..12 {
            let what = life.step(number, &mut random);
            let when = format!("{format}, {links} links, step {number}: {what}");
            for (path, model) in &life.members {
                same(&contents(path), model, &when);
                assert_eq!(errors(&life.host, path).unwrap(), [""; 0], "{when}");
                let raw = life.dir.path().join("read.raw");
                for (peer, read) in peers.iter().zip(&mut reads) {
                    if peer(path, &raw) {
                        same(&std::fs::read(&raw).unwrap(), model, &when);
                        *read += 1;
                    }
                }
            }
            life.scribble(&mut random);
        }
        println!("{format}: read by other programs {reads:?} times");
        assert!(!reads.contains(&0));
    }
}
