//! The same images under our driver and under QEMU.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use super::{MIB, contents, skip, spec};
use crate::formats::vhdx::Vhdx;
use crate::formats::{self, CreateSpec, Image, OpenOptions};
use crate::storage::file::HostFs;
use crate::storage::{Access, Host};

fn have(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").output().is_ok();
    if !found {
        skip(&format!("{tool} is not installed"));
    }
    found
}

/// Runs a tool that must succeed; returns what it printed.
fn run(tool: &str, args: &[&str]) -> String {
    let output = Command::new(tool).args(args).output().unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{tool} {args:?}: {text}");
    text
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn open(path: &Path) -> Image {
    let host: Arc<dyn Host> = HostFs::shared();
    formats::open(&host, path, &OpenOptions::new(Access::Write)).unwrap()
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
