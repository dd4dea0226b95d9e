//! The same images under our driver and under QEMU.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{MIB, contents, open_file, skip, spec, when_unlocked};
use crate::formats::vhdx::{Vhdx, create_child};
use crate::formats::{self, CreateSpec, Image};
use crate::storage::Access;
use crate::storage::file::HostFs;

fn have(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").output().is_ok();
    if !found {
        skip(&format!("{tool} is not installed"));
    }
    found
}

/// Runs a tool that must succeed.
fn run(tool: &str, args: &[&str]) {
    let done = when_unlocked(|| {
        let output = Command::new(tool).args(args).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        let locked = text.contains("Failed to get");
        assert!(output.status.success() || locked, "{tool} {args:?}: {text}");
        (!locked).then_some(())
    });
    assert_eq!(done, Some(()), "{tool} {args:?}: locked");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn open(path: &Path) -> Image {
    open_file(path, Access::Write)
}

/// Writes a reproducible pattern at odd places, and into `model`.
fn scribble(image: &Image, model: &mut [u8], seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    for _ in 0..40 {
        let start = rng.usize(..model.len());
        let len = rng.usize(1..300_000).min(model.len() - start);
        let data: Vec<u8> = (0..len).map(|_| rng.u8(..)).collect();
        image.disk.write_at(start as u64, &data).unwrap();
        model[start..start + len].copy_from_slice(&data);
        if rng.u8(..5) == 0 {
            let at = rng.usize(..model.len());
            let len = rng.usize(..4 << 20).min(model.len() - at);
            image.disk.discard(at as u64, len as u64).unwrap();
            model[at..at + len].fill(0);
        }
        if rng.u8(..4) == 0 {
            image.disk.flush().unwrap();
        }
    }
}

/// QEMU finds nothing wrong with the image and reads `model` from it.
fn qemu_agrees(path: &Path, model: &[u8]) {
    let raw = path.with_extension("raw");
    std::fs::write(&raw, model).unwrap();
    run("qemu-img", &["check", "-f", "vhdx", text(path)]);
    run("qemu-img", &["compare", "-f", "vhdx", "-F", "raw", text(path), text(&raw)]);
}

#[test]
fn qemu_reads_what_was_written_to_a_new_image() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (i, subformat) in ["dynamic", "fixed"].into_iter().enumerate() {
        for (j, block) in [1, 2, 16].into_iter().enumerate() {
            let path = dir.path().join(format!("{subformat}{block}.vhdx"));
            let spec = CreateSpec {
                subformat: Some(subformat.to_owned()),
                block_size: Some(block * MIB),
                physical_sector: Some(512),
                ..spec(37 * MIB + 512)
            };
            formats::create(&Vhdx, &HostFs, &path, &spec).unwrap();
            let mut model = vec![0; spec.size as usize];
            qemu_agrees(&path, &model);
            let image = open(&path);
            scribble(&image, &mut model, (i * 3 + j) as u64);
            image.disk.close().unwrap();
            drop(image);
            qemu_agrees(&path, &model);
        }
    }
}

#[test]
fn qemu_replays_the_log_of_an_image_that_was_not_closed() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for seed in 0..6 {
        let path: PathBuf = dir.path().join(format!("{seed}.vhdx"));
        let spec = CreateSpec { block_size: Some(MIB), ..spec(64 * MIB) };
        formats::create(&Vhdx, &HostFs, &path, &spec).unwrap();
        let mut model = vec![0; spec.size as usize];
        let image = open(&path);
        scribble(&image, &mut model, seed);
        // Enough entries that the ring has wrapped.
        for i in 0..seed * 60 {
            let at = i * 997 * 512 % spec.size;
            image.disk.write_at(at, &[i as u8; 512]).unwrap();
            model[at as usize..at as usize + 512].fill(i as u8);
            image.disk.discard((i * 7 % 64) * MIB, MIB).unwrap();
            model[((i * 7 % 64) * MIB) as usize..][..MIB as usize].fill(0);
            image.disk.flush().unwrap();
        }
        image.disk.flush().unwrap();
        drop(image);
        run("qemu-img", &["check", "-r", "all", "-f", "vhdx", text(&path)]);
        qemu_agrees(&path, &model);
        assert!(contents(&open(&path).disk) == model);
    }
}

#[test]
fn images_made_by_qemu_are_read_and_written() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for subformat in ["dynamic", "fixed"] {
        for state_zero in ["on", "off"] {
            for block in ["1M", "8M", "64M"] {
                let path = dir.path().join(format!("{subformat}-{state_zero}-{block}.vhdx"));
                let options = format!(
                    "subformat={subformat},block_size={block},block_state_zero={state_zero}"
                );
                run("qemu-img", &["create", "-f", "vhdx", "-o", &options, text(&path), "21M"]);
                let mut model = vec![0; 21 << 20];
                for (value, at, len) in
                    [(17, 1000, 5000), (23, 9 << 20, 100), (99, (21 << 20) - 7, 7)]
                {
                    let write = format!("write -P {value} {at} {len}");
                    run("qemu-io", &["-f", "vhdx", "-c", &write, text(&path)]);
                    model[at..at + len].fill(value);
                }
                let image = open(&path);
                assert!(contents(&image.disk) == model, "{subformat} {state_zero} {block}");
                scribble(&image, &mut model, 7);
                image.disk.close().unwrap();
                drop(image);
                assert!(contents(&open(&path).disk) == model);
                qemu_agrees(&path, &model);
            }
        }
    }
}

/// Mounts an image with libvhdi and returns the disk it shows last: the whole chain.
fn libvhdi_reads(path: &Path) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    run("vhdimount", &[text(path), text(dir.path())]);
    let bytes = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .max()
        .map(|disk| std::fs::read(disk).unwrap());
    run("fusermount", &["-u", text(dir.path())]);
    bytes.unwrap()
}

#[test]
fn libvhdi_reads_discarded_blocks_as_zeroes() {
    if !have("vhdimount") || !Path::new("/dev/fuse").exists() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for sector in [512, 4096] {
        let path = dir.path().join(format!("{sector}.vhdx"));
        let spec =
            CreateSpec { block_size: Some(MIB), logical_sector: Some(sector), ..spec(16 * MIB) };
        formats::create(&Vhdx, &HostFs, &path, &spec).unwrap();
        let mut model = vec![0; 16 << 20];
        let image = open(&path);
        scribble(&image, &mut model, 3);
        image.disk.write_at(5 * MIB, &vec![1; 4 << 20]).unwrap();
        model[5 << 20..9 << 20].fill(1);
        image.disk.discard(6 * MIB, 2 * MIB).unwrap();
        model[6 << 20..8 << 20].fill(0);
        image.disk.close().unwrap();
        drop(image);
        assert!(libvhdi_reads(&path) == model, "{sector}");
    }
}

#[test]
fn libvhdi_reads_children() {
    if !have("vhdimount") || !Path::new("/dev/fuse").exists() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (base, child) = (dir.path().join("base.vhdx"), dir.path().join("child.vhdx"));
    let spec = CreateSpec { block_size: Some(MIB), ..spec(16 * MIB) };
    formats::create(&Vhdx, &HostFs, &base, &spec).unwrap();
    let mut model = vec![0; 16 << 20];
    let image = open(&base);
    scribble(&image, &mut model, 4);
    image.disk.close().unwrap();
    drop(image);
    let parent = open_file(&base, Access::Read);
    create_child(&HostFs, &child, &parent, &CreateSpec::default()).unwrap();
    // No discards: libvhdi takes every block of a child that is not stored for the parent's.
    let image = open(&child);
    let mut rng = fastrand::Rng::with_seed(5);
    for _ in 0..60 {
        let start = rng.usize(..model.len() - 100_000);
        let data: Vec<u8> = (0..rng.usize(1..100_000)).map(|_| rng.u8(..)).collect();
        image.disk.write_at(start as u64, &data).unwrap();
        model[start..start + data.len()].copy_from_slice(&data);
    }
    image.disk.close().unwrap();
    assert!(contents(&image.disk) == model);
    drop((image, parent));
    assert!(libvhdi_reads(&child) == model);
}
