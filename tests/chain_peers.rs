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
use common::workload::scribble;
use common::{corpus, pattern, seed, skip, tools};
use fastrand::Rng;
use flatdisk::formats::{self, CreateSpec, OpenOptions};
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
