//! What a conversion makes, beside what others make and read: sizes, lengths, sectors that QEMU does not know; devices as
//! source and target; what killed makers leave.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use live::{Loop, flatdisk, have, names, outcome, scratch, succeed};
use serde_json::Value;

const SIZE: u64 = 20 << 20;

/// A raw disk of [`SIZE`] bytes with two runs of data, each of them no whole block.
fn raw(path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(SIZE).unwrap();
    let mut bytes = vec![0; 700_000];
    fastrand::Rng::with_seed(3).fill(&mut bytes);
    file.write_all_at(&bytes, 1 << 20).unwrap();
    file.write_all_at(&bytes[..100_000], 13 << 20).unwrap();
}

fn refusal(command: &mut Command) -> String {
    let output = outcome(command);
    assert_eq!(output.status.code(), Some(1), "{command:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_device_is_a_source_and_where_it_is_said_a_target() {
    if !live::can_mount() || !have(&["losetup"]) {
        return;
    }
    let dir = scratch();
    let [raw_path, image, behind, small, back] =
        ["a.raw", "a.vhdx", "behind.img", "small.img", "back.vmdk"].map(|n| dir.path().join(n));
    raw(&raw_path);
    succeed(flatdisk().args(["convert", "-q"]).args([&raw_path, &image]));
    // It holds something that must be gone afterwards.
    fs::write(&behind, vec![0x55; SIZE as usize + (1 << 20)]).unwrap();
    File::create(&small).unwrap().set_len(SIZE - 512).unwrap();
    let device = Loop::new(&behind, &[]);
    let other = Loop::new(&small, &[]);

    let said = refusal(flatdisk().arg("convert").args([&image, &device.device]));
    assert!(said.contains("--to-device"), "{said}");
    let to_device = |from: &Path, to: &Path| {
        let mut command = flatdisk();
        command.args(["convert", "-q", "--to-device"]).args([from, to]);
        command
    };
    let said = refusal(&mut to_device(&image, &other.device));
    assert!(said.contains(&SIZE.to_string()), "{said}");
    // Itself, and the file that it shows.
    for source in [&device.device, &behind] {
        let said = refusal(&mut to_device(source, &device.device));
        assert!(said.contains("the target is the source"), "{said}");
    }
    succeed(to_device(&image, &device.device).arg("--verify"));
    let mut start = vec![0; SIZE as usize];
    File::open(&behind).unwrap().read_exact_at(&mut start, 0).unwrap();
    assert!(start == fs::read(&raw_path).unwrap());

    succeed(flatdisk().args(["convert", "-q"]).args([&device.device, &back]));
    succeed(flatdisk().args(["convert", "-q", "--force"]).args([&raw_path, &image]));
    let compared = succeed(flatdisk().args(["compare", "--json"]).args([&device.device, &back]));
    assert!(compared.contains("true"), "{compared}");
}

/// Bytes of the host's, and the file's length.
fn sizes(path: &Path) -> (u64, u64) {
    let meta = fs::metadata(path).unwrap();
    (meta.blocks() * 512, meta.len())
}

#[test]
fn no_target_is_larger_than_that_of_qemu_img() {
    if !have(&["qemu-img"]) {
        return;
    }
    let dir = scratch();
    let raw_path = dir.path().join("a.raw");
    raw(&raw_path);
    for (format, subformat, theirs, options) in [
        ("vhd", "dynamic", "vpc", "subformat=dynamic,force_size=on"),
        ("vhd", "fixed", "vpc", "subformat=fixed,force_size=on"),
        ("vhdx", "dynamic", "vhdx", "subformat=dynamic"),
        ("vhdx", "fixed", "vhdx", "subformat=fixed"),
        ("vmdk", "monolithicSparse", "vmdk", "subformat=monolithicSparse"),
        ("vmdk", "streamOptimized", "vmdk", "subformat=streamOptimized"),
    ] {
        let [ours, other] =
            ["ours", "theirs"].map(|name| dir.path().join(format!("{name}-{subformat}.{format}")));
        succeed(
            flatdisk().args(["convert", "-q", "--subformat", subformat]).args([&raw_path, &ours]),
        );
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-f", "raw", "-O", theirs, "-o", options]);
        succeed(command.args([&raw_path, &other]));
        // Blocks of our VHDs begin such that data lies on the host's blocks: less than one for each, and one
        // for the tables. Without that no block of a VHD could be shared.
        let aligning = if (format, subformat) == ("vhd", "dynamic") { 4096 * 3 } else { 0 };
        // Space for tables is reserved before they are written, a host's block of it may stay empty.
        let reserved = if subformat == "monolithicSparse" { 4096 } else { 0 };
        let (ours, theirs) = (sizes(&ours), sizes(&other));
        // A stream has its length only: what goes to a pipe has no holes.
        let stored = subformat == "streamOptimized" || ours.0 <= theirs.0 + aligning + reserved;
        assert!(stored, "{format} {subformat}: {ours:?}, {theirs:?}");
        assert!(ours.1 <= theirs.1 + aligning, "{format} {subformat}: {ours:?}, {theirs:?}");
    }
}

#[test]
fn others_see_the_size_that_a_vhd_was_made_with() {
    let dir = scratch();
    let image = dir.path().join("a.vhd");
    let (qemu, libvhdi) = (have(&["qemu-img"]), have(&["vhdiinfo"]));
    // Those of no cylinder, at the limits of the geometry, and the largest.
    let sizes =
        [512, SIZE + 5 * 512, 1 << 20, 127 << 30, (127 << 30) + 512, (10 << 30) + 1024, 2040 << 30];
    for size in sizes {
        for subformat in ["dynamic", "fixed"] {
            let mut create = flatdisk();
            create.args(["create", "-q", "--preallocation", "off", "--subformat", subformat]);
            succeed(create.arg(&image).arg(size.to_string()));
            if qemu {
                let mut info = Command::new("qemu-img");
                let text = succeed(info.args(["info", "--output=json", "-f", "vpc"]).arg(&image));
                let info: Value = serde_json::from_str(&text).unwrap();
                assert_eq!(info["virtual-size"], size, "{subformat}");
            }
            if libvhdi {
                let text = succeed(Command::new("vhdiinfo").arg(&image));
                assert!(text.contains(&format!("({size} bytes)")), "{subformat} {size}: {text}");
            }
            fs::remove_file(&image).unwrap();
        }
    }
}

#[test]
fn dissect_reads_sectors_of_4096_bytes_as_we_write_them() {
    let Some(packages) = std::env::var_os("FLATDISK_DISSECT") else {
        live::skip("FLATDISK_DISSECT names no folder");
        return;
    };
    if !have(&["python3"]) {
        return;
    }
    let dir = scratch();
    let raw_path = dir.path().join("a.raw");
    raw(&raw_path);
    let script = "import sys; from dissect.hypervisor.disk.vhdx import VHDX\n\
        d = VHDX(open(sys.argv[1], 'rb')); assert d.sector_size == 4096, d.sector_size\n\
        sys.exit(d.read(d.size) != open(sys.argv[2], 'rb').read())";
    for subformat in ["dynamic", "fixed"] {
        let image = dir.path().join(format!("{subformat}.vhdx"));
        let mut convert = flatdisk();
        convert.args(["convert", "-q", "--sector-size", "4096", "--subformat", subformat]);
        succeed(convert.args([&raw_path, &image]));
        let mut read = Command::new("python3");
        succeed(read.env("PYTHONPATH", &packages).args(["-c", script]).args([&image, &raw_path]));
    }
}

/// Kills a command after up to `most`, as often as `FLATDISK_KILLS` says; `check` looks at what is there.
fn kill(most: Duration, mut command: impl FnMut() -> Command, mut check: impl FnMut()) {
    let rounds: u32 =
        std::env::var("FLATDISK_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(6);
    let mut random = fastrand::Rng::new();
    for round in 0..rounds {
        let mut child = command().stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(most.mul_f64(random.f64()));
        let signal = if round % 2 == 0 { "-KILL" } else { "-INT" };
        let _ = Command::new("kill").args([signal, &child.id().to_string()]).status();
        child.wait().unwrap();
        check();
    }
}

#[test]
fn an_image_is_made_whole_or_not_at_all() {
    let dir = scratch();
    for (name, options, most) in [
        ("a.vmdk", &["--subformat", "monolithicFlat", "--preallocation", "full"][..], 30),
        ("b.vmdk", &["--subformat", "twoGbMaxExtentSparse", "--split-size", "1M"], 30),
        ("c.vhdx", &[], 10),
    ] {
        let path = dir.path().join(name);
        let create = || {
            let mut create = flatdisk();
            create.args(["create", "-q"]).args(options).arg(&path).arg("30M");
            create
        };
        kill(Duration::from_millis(most), create, || {
            if path.exists() {
                succeed(flatdisk().arg("check").arg(&path));
            }
            // Parts that have their names already are the next one's to be told of.
            for name in names(dir.path()).iter().filter(|name| !name.starts_with('.')) {
                fs::remove_file(dir.path().join(name)).unwrap();
            }
        });
        succeed(&mut create());
        let left: Vec<_> =
            names(dir.path()).into_iter().filter(|name| name.starts_with('.')).collect();
        assert!(left.is_empty(), "{left:?}");
        for name in names(dir.path()) {
            fs::remove_file(dir.path().join(name)).unwrap();
        }
    }
}

#[test]
fn a_disk_that_changes_in_place_is_one_or_the_other() {
    let dir = scratch();
    let [raw_path, image, kept] = ["a.raw", "a.vhd", "kept.raw"].map(|n| dir.path().join(n));
    raw(&kept);
    let begin = || fs::copy(&kept, &raw_path).map(drop).unwrap();
    begin();
    for back in [false, true] {
        let convert = || {
            let mut command = flatdisk();
            command.args(["convert", "-q", "--in-place"]);
            let (from, to) = if back { (&image, &raw_path) } else { (&raw_path, &image) };
            command.args([from, to]);
            command
        };
        if back {
            let _ = fs::remove_file(&image);
            succeed(flatdisk().args(["convert", "-q", "--in-place"]).args([&raw_path, &image]));
        }
        kill(Duration::from_millis(8), convert, || {
            let there = if raw_path.exists() { &raw_path } else { &image };
            assert_eq!(names(dir.path()).len(), 2, "{:?}", names(dir.path()));
            succeed(flatdisk().arg("compare").args([there, &kept]));
            // Into the state from which the next one begins.
            fs::remove_file(there).unwrap();
            begin();
            if back {
                succeed(flatdisk().args(["convert", "-q", "--in-place"]).args([&raw_path, &image]));
            }
        });
    }
}
