//! QEMU reads what this library writes, and this library what QEMU writes.

// The helpers here serve tests only.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::buffer::{Buffer, PAGE};
use common::images::{Image, Kind, small};
use common::workload::{Step, script};
use common::{in_parallel, number, pattern, seed, tools};
use flatdisk::disk::Disk;
use flatdisk::error::ErrorKind;
use flatdisk::formats::{self, OpenOptions};
use flatdisk::storage::Access;
use flatdisk::storage::file::HostFs;

const MIB: u64 = 1 << 20;

/// One way of making an image with `qemu-img create`.
struct Made {
    format: &'static str,
    options: String,
    size: u64,
}

impl Made {
    fn name(&self) -> String {
        format!("{} -o {}", self.format, self.options)
    }
}

/// Every subformat and option of QEMU's that shows in the file.
fn made_by_qemu() -> Vec<Made> {
    let mut all = Vec::new();
    let mut add = |format, options: &str, size| {
        all.push(Made { format, options: options.to_owned(), size });
    };
    for subformat in ["dynamic", "fixed"] {
        for force in ["on", "off"] {
            let size = 37 * MIB + 512;
            add("vpc", &format!("subformat={subformat},force_size={force}"), size);
        }
        for zero in ["on", "off"] {
            add("vhdx", &format!("subformat={subformat},block_state_zero={zero}"), 48 * MIB);
        }
        add("vhdx", &format!("subformat={subformat},block_size=1M,log_size=2M"), 10 * MIB + 512);
    }
    for block in [1, 2, 4, 8, 16, 32, 64, 128, 256] {
        add("vhdx", &format!("block_size={block}M"), 300 * MIB + 512);
    }
    add("vhdx", "log_size=16M,block_size=1M", 40 * MIB);
    for subformat in
        ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"]
    {
        add("vmdk", &format!("subformat={subformat}"), 70 * MIB + 512);
        add("vmdk", &format!("subformat={subformat},compat6=on"), 5 * MIB);
        if subformat.ends_with("Sparse") {
            add("vmdk", &format!("subformat={subformat},zeroed_grain=on"), 70 * MIB + 512);
        }
        if subformat.starts_with("two") {
            add("vmdk", &format!("subformat={subformat}"), 2048 * MIB + 70 * MIB);
        }
    }
    for adapter in ["ide", "buslogic", "lsilogic", "legacyESX"] {
        add("vmdk", &format!("adapter_type={adapter}"), 5 * MIB);
    }
    all
}

fn tools_are_there() -> bool {
    ["qemu-img", "qemu-io"].iter().all(|tool| tools::have(tool))
}

/// The name that QEMU has for one of our formats.
fn qemu_name(format: &str) -> &str {
    if format == "vhd" { "vpc" } else { format }
}

fn open(path: &Path, access: Access) -> Result<Arc<Disk>, String> {
    // A process that another thread is just starting holds a copy of every open file for a moment,
    // its locks included.
    for _ in 0..100 {
        match formats::open(&HostFs::shared(), path, &OpenOptions::new(access)) {
            Ok(image) => return Ok(image.disk),
            Err(e) if e.kind() == ErrorKind::Busy => {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            Err(e) => return Err(format!("open: {e}")),
        }
    }
    Err(format!("{} stays locked", path.display()))
}

fn qemu_img(arguments: &[&str], files: &[&Path]) -> Result<String, String> {
    let mut command = Command::new("qemu-img");
    let output = tools::output(command.args(arguments).args(files));
    match output.status.success() {
        true => Ok(tools::both(&output)),
        false => Err(format!("{command:?}: {}", tools::both(&output))),
    }
}

/// Runs a script with qemu-io, one byte value for each write, and notes it in the buffer.
fn write_with_qemu(
    format: &str,
    path: &Path,
    steps: &[Step],
    buffer: &mut Buffer,
) -> Result<(), String> {
    let mut command = Command::new("qemu-io");
    command.args(["-f", format]);
    for (index, step) in steps.iter().enumerate() {
        let line = match *step {
            Step::Write { at, len } => {
                let value = (index % 251 + 1) as u8;
                buffer.write(at, &vec![value; len as usize]);
                format!("write -P {value} {at} {len}")
            }
            // QEMU may ignore a discard, but does as told with zeroes.
            Step::Zeroes { at, len } | Step::Discard { at, len } => {
                buffer.zero(at, len);
                format!("write -z {at} {len}")
            }
            Step::Flush => "flush".to_owned(),
            Step::Reopen => continue,
        };
        command.args(["-c", &line]);
    }
    let output = tools::output(command.arg(path));
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("qemu-io: {}", tools::both(&output))),
    }
}

/// Runs a script with the library and notes it in the buffer.
fn write_with_us(path: &Path, steps: &[Step], buffer: &mut Buffer) -> Result<(), String> {
    let mut disk = open(path, Access::Write)?;
    for (index, step) in steps.iter().enumerate() {
        let done = match *step {
            Step::Write { at, len } => {
                let data = pattern::bytes(index as u32 + 1, at, len);
                buffer.write(at, &data);
                disk.write_at(at, &data)
            }
            Step::Zeroes { at, len } => {
                buffer.zero(at, len);
                disk.write_at(at, &vec![0; len as usize])
            }
            Step::Discard { at, len } => {
                buffer.zero(at, len);
                disk.discard(at, len)
            }
            Step::Flush => disk.flush(),
            Step::Reopen => {
                disk.close().map_err(|e| format!("close: {e}"))?;
                drop(disk);
                disk = open(path, Access::Write)?;
                Ok(())
            }
        };
        done.map_err(|e| format!("{step:?}: {e}"))?;
    }
    disk.close().map_err(|e| format!("close: {e}"))
}

/// Compares the whole disk, as the library reads it, with the buffer.
fn same(path: &Path, buffer: &Buffer) -> Result<(), String> {
    let disk = open(path, Access::Read)?;
    let mut found = vec![0; PAGE as usize];
    for at in (0..disk.size()).step_by(PAGE as usize) {
        let len = PAGE.min(disk.size() - at);
        // Far from anything written, holes need no reading.
        if !buffer.pages().contains_key(&(at / PAGE))
            && disk.next_data(at).map_err(|e| e.to_string())?.is_none_or(|d| d.start >= at + len)
        {
            continue;
        }
        let found = &mut found[..len as usize];
        disk.read_at(at, found).map_err(|e| format!("read: {e}"))?;
        let expected = buffer.read(at, len);
        if let Some(wrong) = (0..len as usize).find(|&i| found[i] != expected[i]) {
            let (place, found, expected) = (at + wrong as u64, found[wrong], expected[wrong]);
            return Err(format!("byte {place:#x} reads {found:#x} instead of {expected:#x}"));
        }
    }
    Ok(())
}

/// Lets QEMU check the image and compare it with the buffer.
fn qemu_agrees(format: &str, path: &Path, size: u64, buffer: &Buffer) -> Result<(), String> {
    let raw = path.with_extension("raw");
    let file = File::create(&raw).map_err(|e| e.to_string())?;
    file.set_len(size).map_err(|e| e.to_string())?;
    for (page, bytes) in buffer.pages() {
        let at = page * PAGE;
        let len = PAGE.min(size - at) as usize;
        file.write_all_at(&bytes[..len], at).map_err(|e| e.to_string())?;
    }
    // VHD has no check in QEMU.
    if format != "vpc" {
        qemu_img(&["check", "-f", format], &[path])?;
    }
    qemu_img(&["compare", "-f", format, "-F", "raw"], &[path, &raw])?;
    std::fs::remove_file(raw).map_err(|e| e.to_string())
}

fn steps(seed: u64, size: u64, block: u64) -> Vec<Step> {
    let count = number("FLATDISK_MODEL_OPS", 40) as usize;
    let mut random = fastrand::Rng::with_seed(seed);
    let block = block.min(4 * MIB);
    script(&mut random, size, block, count)
}

/// Runs a test for every item and gathers the failures.
fn each<T: Sync>(
    items: &[T],
    name: impl Fn(&T) -> String + Sync,
    test: impl Fn(&T, &Path) -> Result<(), String> + Sync,
) {
    let results = in_parallel(items, |item| {
        let dir = common::folder();
        test(item, dir.path()).map_err(|e| format!("{}, seed {}: {e}", name(item), seed()))
    });
    let failures: Vec<_> = results.into_iter().filter_map(Result::err).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn images_that_qemu_made_are_read_then_written_and_qemu_reads_them_back() {
    if !tools_are_there() {
        return;
    }
    each(&made_by_qemu(), Made::name, |made, dir| {
        let extension = if made.format == "vpc" { "vhd" } else { made.format };
        let path = dir.join("disk").with_extension(extension);
        let size = made.size.to_string();
        let create = ["create", "-q", "-f", made.format, "-o", &made.options];
        let arguments = create.into_iter().map(Path::new).chain([&*path, Path::new(&size)]);
        qemu_img(&[], &arguments.collect::<Vec<_>>())?;
        let disk = open(&path, Access::Read)?;
        let (size, block) = (disk.size(), disk.geometry().block_size);
        let rounded = made.format == "vpc" && !made.options.contains("force_size=on");
        if size < made.size || !rounded && size != made.size {
            return Err(format!("{size} bytes instead of {}", made.size));
        }
        drop(disk);
        let mut buffer = Buffer::default();
        write_with_qemu(made.format, &path, &steps(seed(), size, block), &mut buffer)?;
        same(&path, &buffer).map_err(|e| format!("written by QEMU: {e}"))?;
        write_with_us(&path, &steps(seed() + 1, size, block), &mut buffer)?;
        same(&path, &buffer).map_err(|e| format!("written by QEMU and us: {e}"))?;
        qemu_agrees(made.format, &path, size, &buffer)?;
        write_with_qemu(made.format, &path, &steps(seed() + 2, size, block), &mut buffer)?;
        same(&path, &buffer).map_err(|e| format!("written by QEMU, us, and QEMU: {e}"))
    });
}

#[test]
fn images_that_the_library_made_are_what_qemu_takes_them_for() {
    if !tools_are_there() {
        return;
    }
    let ours: Vec<Image> = small()
        .into_iter()
        // QEMU does not know large sectors.
        .filter(|image| image.spec.logical_sector != Some(4096) && image.tweak.is_none())
        .collect();
    each(&ours, Image::name, |image, dir| {
        let path = dir.join("disk").with_extension(image.format);
        image.create_at(&HostFs, &path).map_err(|e| format!("create: {e}"))?;
        let format = qemu_name(image.format);
        let (size, mut buffer) = (image.spec.size, Buffer::default());
        qemu_agrees(format, &path, size, &buffer).map_err(|e| format!("empty: {e}"))?;
        let block = open(&path, Access::Read)?.geometry().block_size;
        write_with_us(&path, &steps(seed(), size, block), &mut buffer)?;
        same(&path, &buffer)?;
        qemu_agrees(format, &path, size, &buffer)?;
        if image.spec.subformat.as_deref().is_some_and(|name| name.starts_with("vmfs")) {
            return Ok(());
        }
        write_with_qemu(format, &path, &steps(seed() + 1, size, block), &mut buffer)?;
        same(&path, &buffer).map_err(|e| format!("after QEMU wrote: {e}"))?;
        write_with_us(&path, &steps(seed() + 2, size, block), &mut buffer)?;
        qemu_agrees(format, &path, size, &buffer).map_err(|e| format!("in the end: {e}"))
    });
}

#[test]
fn children_that_qemu_made_are_read_and_written() {
    if !tools_are_there() {
        return;
    }
    let subformats = ["monolithicSparse", "twoGbMaxExtentSparse"];
    each(
        &subformats,
        |subformat| (*subformat).to_owned(),
        |subformat, dir| {
            let (base, child): (PathBuf, PathBuf) = (dir.join("base.vmdk"), dir.join("child.vmdk"));
            let size = 9 * MIB + 512;
            qemu_img(&["create", "-q", "-f", "vmdk"], &[&base, Path::new(&size.to_string())])?;
            let mut buffer = Buffer::default();
            write_with_qemu("vmdk", &base, &steps(seed(), size, 64 << 10), &mut buffer)?;
            let options = format!("subformat={subformat}");
            let create = ["create", "-q", "-f", "vmdk", "-o", &options, "-F", "vmdk", "-b"];
            qemu_img(&create, &[Path::new("base.vmdk"), &child])?;
            write_with_qemu("vmdk", &child, &steps(seed() + 1, size, 64 << 10), &mut buffer)?;
            same(&child, &buffer)?;
            write_with_us(&child, &steps(seed() + 2, size, 64 << 10), &mut buffer)?;
            same(&child, &buffer)?;
            qemu_agrees("vmdk", &child, size, &buffer)
        },
    );
}

#[test]
fn what_qemu_converts_is_read() {
    if !tools_are_there() {
        return;
    }
    let targets = [
        ("vpc", "subformat=dynamic,force_size=on"),
        ("vpc", "subformat=fixed,force_size=on"),
        ("vhdx", "subformat=dynamic"),
        ("vhdx", "subformat=fixed"),
        ("vmdk", "subformat=monolithicSparse"),
        ("vmdk", "subformat=twoGbMaxExtentSparse"),
        ("vmdk", "subformat=streamOptimized"),
    ];
    each(
        &targets,
        |(format, options)| format!("{format} {options}"),
        |(format, options), dir| {
            let raw = dir.join("disk.raw");
            let file = File::create(&raw).map_err(|e| e.to_string())?;
            let size = 70 * MIB + 512;
            file.set_len(size).map_err(|e| e.to_string())?;
            let mut buffer = Buffer::default();
            for step in steps(seed(), size, MIB) {
                if let Step::Write { at, len } = step {
                    let data = pattern::bytes(1, at, len);
                    file.write_all_at(&data, at).map_err(|e| e.to_string())?;
                    buffer.write(at, &data);
                }
            }
            let path =
                dir.join("disk").with_extension(if *format == "vpc" { "vhd" } else { format });
            let convert = ["convert", "-f", "raw", "-O", format, "-o", options];
            qemu_img(&convert, &[&raw, &path])?;
            same(&path, &buffer)
        },
    );
}
