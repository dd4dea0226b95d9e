//! `convert`, `create`, `compare`, `measure`, `hash`, `cat` and `write` as commands; streams in the eyes of others;
//! what a killed conversion leaves.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use live::{flatdisk, have, names, outcome, scratch, succeed};
use serde_json::Value;

const SIZE: u64 = (40 << 20) + 3 * 512;

/// A raw disk with data that compresses, data that does not, holes, and a last grain that is not whole.
fn raw(path: &Path) {
    let mut random = fastrand::Rng::with_seed(7);
    let file = File::create(path).unwrap();
    file.set_len(SIZE).unwrap();
    for (at, len) in [(0, 300_000), (5 << 20, 100_000), (34 << 20, 70_000), (SIZE - 512, 512)] {
        let mut bytes = vec![0; len];
        random.fill(&mut bytes);
        file.write_all_at(&bytes, at).unwrap();
    }
    file.write_all_at(&b"text ".repeat(100_000), 10 << 20).unwrap();
}

fn json(command: &mut Command) -> Value {
    serde_json::from_str(&succeed(command.arg("--json"))).unwrap()
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// Reads a stream as strictly as the strictest importer: every byte is where and what it must be. Returns
/// the bytes of the disk that are stored.
fn read_strictly(stream: &[u8]) -> Vec<u8> {
    let field = |at: usize, len: usize| number(&stream[at..at + len]);
    assert_eq!((&stream[..4], field(4, 4), field(8, 4)), (&b"KDMV"[..], 3, 0x3_0001));
    let capacity = field(12, 8);
    assert_eq!([field(20, 8), field(28, 8), field(44, 4)], [128, 1, 512]);
    let descriptor = &stream[512..512 + 512 * field(36, 8) as usize];
    let text = descriptor.iter().position(|byte| *byte == 0).unwrap();
    // Room for ten sectors of further lines.
    assert!(descriptor.len() - text >= 10 * 512);
    assert_eq!([field(48, 8), field(56, 8), field(64, 8)], [0, u64::MAX, 128]);
    assert_eq!((field(72, 1), &stream[73..77], field(77, 2)), (0, &b"\n \r\n"[..], 1));

    let mut disk = vec![0; (capacity * 512) as usize];
    let tables = capacity.div_ceil(128 * 512) as usize;
    let mut directory = vec![0; tables];
    let mut table: Vec<(u64, u64)> = Vec::new();
    let mut last = None;
    let mut at = 128 * 512;
    let footer = loop {
        let (value, size, kind) = (field(at, 8), field(at + 8, 4) as usize, field(at + 12, 4));
        if size > 0 {
            assert!(last.is_none_or(|last| last < value) && value % 128 == 0);
            last = Some(value);
            table.push((value / 128, at as u64 / 512));
            let place = value as usize * 512;
            let end = disk.len().min(place + (64 << 10));
            let mut inflater = flate2::Decompress::new(true);
            let packed = &stream[at + 12..at + 12 + size];
            let finish = flate2::FlushDecompress::Finish;
            let mut grain = vec![0; 64 << 10];
            let status = inflater.decompress(packed, &mut grain, finish).unwrap();
            assert_eq!(status, flate2::Status::StreamEnd);
            assert_eq!(inflater.total_out(), 64 << 10);
            assert!(grain.iter().any(|byte| *byte != 0), "a grain of zeroes");
            disk[place..end].copy_from_slice(&grain[..end - place]);
            assert!(grain[end - place..].iter().all(|byte| *byte == 0));
            let next = (at + 12 + size).next_multiple_of(512);
            assert!(stream[at + 12 + size..next].iter().all(|byte| *byte == 0));
            at = next;
            continue;
        }
        assert!(stream[at + 16..at + 512].iter().all(|byte| *byte == 0));
        at += 512;
        match kind {
            1 => {
                assert_eq!(value, 4);
                let number = table[0].0 / 512;
                for entry in 0..512 {
                    let grain = number * 512 + entry;
                    let known = table.iter().find(|(known, _)| *known == grain);
                    let known = known.map_or(0, |(_, place)| *place);
                    assert_eq!(field(at + entry as usize * 4, 4), known);
                }
                table.clear();
                directory[number as usize] = at as u64 / 512;
            }
            2 => {
                assert!(table.is_empty(), "grains without a table");
                assert_eq!(value, (tables as u64 * 4).div_ceil(512));
                for (number, place) in directory.iter().enumerate() {
                    assert_eq!(field(at + number * 4, 4), *place);
                }
                assert_eq!(field(at + value as usize * 512 + 12, 4), 3);
                assert_eq!(field(at + value as usize * 512, 8), 1);
                break (at as u64 / 512, at + value as usize * 512 + 512);
            }
            _ => panic!("marker {kind}"),
        }
        at += value as usize * 512;
    };
    let (directory_at, at) = footer;
    let mut expected = stream[..512].to_vec();
    expected[56..64].copy_from_slice(&directory_at.to_le_bytes());
    assert_eq!(stream[at..at + 512], expected);
    assert_eq!(stream[at + 512..], [0; 512]);
    disk
}

#[test]
fn streams_are_what_strict_readers_want_and_what_others_read() {
    let dir = scratch();
    let [raw_path, stream, piped] = ["a.raw", "a.vmdk", "p.vmdk"].map(|n| dir.path().join(n));
    raw(&raw_path);
    let bytes = fs::read(&raw_path).unwrap();
    let options = ["-O", "vmdk", "--subformat", "streamOptimized"];
    for level in ["1", "6", "9"] {
        let _ = fs::remove_file(&stream);
        succeed(
            flatdisk()
                .arg("convert")
                .args(options)
                .args(["--compress", level])
                .args([&raw_path, &stream]),
        );
        assert!(read_strictly(&fs::read(&stream).unwrap()) == bytes, "level {level}");
    }
    // Through a pipe, from a pipe.
    let mut child = flatdisk()
        .arg("convert")
        .args(options)
        .args(["--from", "raw", "--size", &SIZE.to_string(), "-", "-"])
        .stdin(File::open(&raw_path).unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    std::io::copy(&mut out, &mut File::create(&piped).unwrap()).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(read_strictly(&fs::read(&piped).unwrap()) == bytes);
    // An empty one, and a write to a stream.
    let empty = dir.path().join("e.vmdk");
    succeed(flatdisk().args(["create", "--for", "esx"]).arg(&empty).arg("100M"));
    assert!(read_strictly(&fs::read(&empty).unwrap()).iter().all(|byte| *byte == 0));
    let refused = outcome(flatdisk().args(["write", "--fill", "1", "--length", "1"]).arg(&stream));
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(why.contains("convert") && why.contains("nonpersistent"), "{why}");
    if have(&["qemu-img"]) {
        let compare = ["compare", "-f", "raw", "-F", "vmdk"];
        succeed(Command::new("qemu-img").args(compare).args([&raw_path, &stream]));
        let theirs = dir.path().join("q.vmdk");
        let convert = ["convert", "-O", "vmdk", "-o", "subformat=streamOptimized"];
        succeed(Command::new("qemu-img").args(convert).args([&raw_path, &theirs]));
        succeed(
            flatdisk().arg("convert").args(options).args(["--force"]).args([&raw_path, &stream]),
        );
        let [ours, theirs] = [&stream, &theirs].map(|path| fs::metadata(path).unwrap().len());
        assert!(ours <= theirs, "{ours} bytes, qemu-img {theirs}");
    }
    if have(&["7z"]) {
        let output = outcome(Command::new("7z").args(["e", "-so", "-tvmdk"]).arg(&stream));
        assert!(output.status.success() && output.stdout == bytes);
    }
    if let Some(packages) = std::env::var_os("FLATDISK_DISSECT") {
        // Its `read` looks behind the end of a disk that is no multiple of 8 KiB.
        let script = "import sys; from dissect.hypervisor.disk.vmdk import VMDK\n\
                      s = VMDK(open(sys.argv[1], 'rb')); d = s.read_sectors(0, s.size // 512)\n\
                      sys.exit(d != open(sys.argv[2], 'rb').read())";
        let mut python = Command::new("python3");
        succeed(python.env("PYTHONPATH", packages).args(["-c", script]).args([&stream, &raw_path]));
    }
    if have(&["vmdkmount"]) && live::can_mount() {
        let at = dir.path().join("m");
        fs::create_dir(&at).unwrap();
        succeed(Command::new("vmdkmount").args([&stream, &at]));
        let read = fs::read(at.join("vmdk1"));
        succeed(Command::new("umount").arg(&at));
        assert!(read.unwrap() == bytes);
    }
}

#[test]
fn azure_gets_what_it_takes_and_readers_see_the_size_asked_for() {
    let dir = scratch();
    let [raw_path, image, dynamic] = ["a.raw", "a.vhd", "d.vhd"].map(|n| dir.path().join(n));
    raw(&raw_path);
    succeed(flatdisk().args(["convert", "--for", "azure"]).args([&raw_path, &image]));
    let size = SIZE.next_multiple_of(1 << 20);
    assert_eq!(fs::metadata(&image).unwrap().len(), size + 512);
    succeed(flatdisk().args(["check", "--for", "azure"]).arg(&image));
    succeed(flatdisk().args(["compare"]).args([&raw_path, &image]));
    // Of any other size the check says which one is good.
    succeed(flatdisk().arg("convert").args([&raw_path, &dynamic]));
    let refused = outcome(flatdisk().args(["check", "--for", "azure"]).arg(&dynamic));
    let said = String::from_utf8_lossy(&refused.stdout).into_owned();
    assert_eq!(refused.status.code(), Some(2));
    assert!(said.contains(&size.to_string()) && said.contains("fixed"), "{said}");
    for (image, size) in [(&image, size), (&dynamic, SIZE)] {
        if have(&["qemu-img"]) {
            let mut info = Command::new("qemu-img");
            let text = succeed(info.args(["info", "--output=json", "-f", "vpc"]).arg(image));
            let info: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(info["virtual-size"], size);
        }
        if have(&["vhdiinfo"]) {
            let text = succeed(Command::new("vhdiinfo").arg(image));
            assert!(text.contains(&format!("({size} bytes)")), "{text}");
        }
    }
}

#[test]
fn a_raw_disk_becomes_a_fixed_vhd_and_back_in_place() {
    let dir = scratch();
    let [raw_path, image, again] = ["a.raw", "a.vhd", "b.raw"].map(|n| dir.path().join(n));
    // A hole of 1 TiB: nothing of it is read or written.
    let file = File::create(&raw_path).unwrap();
    file.set_len(1 << 40).unwrap();
    file.write_all_at(b"begin", 0).unwrap();
    drop(file);
    let inode = fs::metadata(&raw_path).unwrap().ino();
    succeed(flatdisk().args(["convert", "--in-place"]).args([&raw_path, &image]));
    let meta = fs::metadata(&image).unwrap();
    assert_eq!((meta.len(), meta.ino()), ((1 << 40) + 512, inode));
    let info = json(flatdisk().arg("info").arg(&image));
    assert_eq!(info["images"][0]["subformat"], "fixed");
    // An image is no raw disk, and a file that is open elsewhere stays as it is.
    for (from, to) in [(&image, "x.vhd"), (&image, "a.vhd")] {
        let refused =
            outcome(flatdisk().args(["convert", "--in-place"]).arg(from).arg(dir.path().join(to)));
        assert_eq!(refused.status.code(), Some(1));
    }
    succeed(flatdisk().args(["convert", "--in-place"]).args([&image, &again]));
    assert_eq!(fs::metadata(&again).unwrap().len(), 1 << 40);
    assert_eq!(names(dir.path()), ["b.raw"]);

    let vmdk = dir.path().join("w.vmdk");
    succeed(flatdisk().args(["create", "--wrap"]).args([&again, &vmdk]));
    let start = succeed(flatdisk().args(["cat", "--length", "5"]).arg(&vmdk));
    assert_eq!(start, "begin");
}

#[test]
fn bytes_of_a_disk_are_read_written_compared_and_hashed_without_a_mount() {
    let dir = scratch();
    let [raw_path, image] = ["a.raw", "a.vhdx"].map(|n| dir.path().join(n));
    raw(&raw_path);
    succeed(flatdisk().arg("convert").args([&raw_path, &image]));
    for (algorithm, program) in [("sha256", "sha256sum"), ("sha1", "sha1sum"), ("md5", "md5sum")] {
        let ours = succeed(flatdisk().args(["hash", "-a", algorithm]).arg(&image));
        let theirs = succeed(Command::new(program).arg(&raw_path));
        assert_eq!(ours.split(' ').next(), theirs.split(' ').next());
    }
    let blake3 = succeed(flatdisk().args(["hash", "-a", "blake3"]).args([&image, &raw_path]));
    let digests: Vec<_> = blake3.lines().map(|line| line.split(' ').next()).collect();
    assert!(digests.len() == 2 && digests[0] == digests[1]);

    assert_eq!(
        outcome(flatdisk().args(["compare", "-q"]).args([&raw_path, &image])).status.code(),
        Some(0)
    );
    let mut write = flatdisk();
    write.args(["write", "-q", "--offset", "12345678"]).arg(&image).stdin(Stdio::piped());
    let mut writing = write.spawn().unwrap();
    writing.stdin.take().unwrap().write_all(b"0123456789").unwrap();
    assert!(writing.wait().unwrap().success());
    let read =
        succeed(flatdisk().args(["cat", "--offset", "12345678", "--length", "10"]).arg(&image));
    assert_eq!(read, "0123456789");
    let found = outcome(flatdisk().args(["compare", "--json"]).args([&raw_path, &image]));
    assert_eq!(found.status.code(), Some(1));
    let found: Value = serde_json::from_slice(&found.stdout).unwrap();
    assert_eq!((&found["same"], &found["offset"]), (&Value::from(false), &Value::from(12_345_678)));
    let missing = outcome(flatdisk().arg("compare").args([&raw_path, &dir.path().join("no.vhd")]));
    assert_eq!(missing.status.code(), Some(2));
    let past = outcome(flatdisk().args(["cat", "--offset", "1T"]).arg(&image));
    assert_eq!(past.status.code(), Some(1));
    succeed(flatdisk().args(["write", "--fill", "0x41", "--length", "16"]).arg(&image));
    succeed(
        flatdisk().args(["write", "--fill", "0", "--offset", "16", "--length", "48"]).arg(&image),
    );
    let hex = succeed(flatdisk().args(["cat", "--hex", "--length", "64"]).arg(&image));
    let lines: Vec<_> = hex.lines().collect();
    assert_eq!(lines[0], format!("00000000 {0} {0}  |{1}|", " 41".repeat(8), "A".repeat(16)));
    assert_eq!(lines[2..], ["*", "00000040"]);
}

#[test]
fn what_is_measured_is_what_a_conversion_takes() {
    let dir = scratch();
    let raw_path = dir.path().join("a.raw");
    raw(&raw_path);
    for (format, subformat, unit) in [
        ("vhd", "dynamic", 2 << 20),
        ("vhd", "fixed", 4096),
        ("vhdx", "dynamic", 2 << 20),
        ("vmdk", "monolithicSparse", 64 << 10),
        ("vmdk", "twoGbMaxExtentFlat", 4096),
        ("vmdk", "streamOptimized", 512),
    ] {
        let kind = ["-O", format, "--subformat", subformat];
        let measured = json(flatdisk().arg("measure").args(kind).arg(&raw_path));
        let image = dir.path().join(format!("{subformat}.{format}"));
        let made = json(flatdisk().arg("convert").args(kind).args([&raw_path, &image]));
        let files = made["files"].as_array().unwrap();
        let meta = files.iter().map(|file| fs::metadata(file.as_str().unwrap()).unwrap());
        let taken: u64 = match unit {
            4096 => meta.map(|meta| meta.blocks() * 512).sum(),
            _ => meta.map(|meta| meta.len()).sum(),
        };
        let required = measured["required"].as_u64().unwrap();
        assert!(required.abs_diff(taken) <= unit + 16_384, "{kind:?}: {required}, {taken}");
        assert!(measured["fully-allocated"].as_u64().unwrap() >= SIZE, "{kind:?}");
    }
}

/// How often a conversion is killed.
fn kills() -> u64 {
    std::env::var("FLATDISK_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(4)
}

#[test]
fn a_conversion_that_is_killed_or_interrupted_leaves_what_was_there() {
    let dir = scratch();
    let [raw_path, target] = ["a.raw", "t.vmdk"].map(|n| dir.path().join(n));
    raw(&raw_path);
    let mut random = fastrand::Rng::new();
    for round in 0..kills() {
        let kind =
            ["twoGbMaxExtentSparse", "streamOptimized", "monolithicSparse"][round as usize % 3];
        for name in names(dir.path()).iter().filter(|name| name.contains("-s001")) {
            fs::remove_file(dir.path().join(name)).unwrap();
        }
        fs::write(&target, "old").unwrap();
        let level = ["--compress", "9"];
        let level = if kind == "streamOptimized" { &level[..] } else { &[] };
        let mut child = flatdisk()
            .args(["convert", "-q", "--force", "--subformat", kind])
            .args(level)
            .args([&raw_path, &target])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(random.u64(..60_000)));
        let signal = if round % 2 == 0 { "-KILL" } else { "-INT" };
        let _ = Command::new("kill").args([signal, &child.id().to_string()]).status();
        let status = child.wait().unwrap();
        if status.success() {
            succeed(flatdisk().arg("compare").args([&raw_path, &target]));
        } else if fs::read(&target).unwrap() != b"old" {
            // Killed after the last rename.
            succeed(flatdisk().arg("compare").args([&raw_path, &target]));
        }
        let unfinished = |name: &String| name.starts_with(".flatdisk-part");
        if signal == "-INT" {
            assert!(!names(dir.path()).iter().any(unfinished), "{:?}", names(dir.path()));
        }
        succeed(flatdisk().args(["convert", "-q", "--force"]).args([&raw_path, &target]));
        assert!(!names(dir.path()).iter().any(unfinished), "{:?}", names(dir.path()));
        succeed(flatdisk().arg("compare").args([&raw_path, &target]));
    }
}

#[test]
fn a_full_host_leaves_no_file_behind() {
    if !live::can_mount() {
        return;
    }
    let dir = scratch();
    let raw_path = dir.path().join("a.raw");
    let file = File::create(&raw_path).unwrap();
    let mut random = fastrand::Rng::with_seed(1);
    let mut bytes = vec![0; 8 << 20];
    random.fill(&mut bytes);
    file.write_all_at(&bytes, 0).unwrap();
    let script = "set -e; mount -t tmpfs -o size=6M none \"$DIR\"\n\
                  for kind in raw,img vhd,vhd vhdx,vhdx vmdk,vmdk; do\n\
                    if \"$FLATDISK\" convert -q -O ${kind%,*} \"$RAW\" \"$DIR/t.${kind#*,}\" 2> \"$DIR/../err\"; then exit 3; fi\n\
                    grep -q 'no space left' \"$DIR/../err\"; grep -q t.${kind#*,} \"$DIR/../err\"\n\
                    test -z \"$(ls -A \"$DIR\")\"\n\
                  done";
    let full = dir.path().join("full");
    fs::create_dir(&full).unwrap();
    let program = env!("CARGO_BIN_EXE_flatdisk");
    live::succeed_in_namespace(
        script,
        &[("DIR", &full), ("RAW", &raw_path), ("FLATDISK", &program)],
    );
}

#[test]
fn what_is_replaced_leaves_none_of_its_parts_and_what_it_named_stays() {
    let dir = scratch();
    let [raw_path, image, flat] = ["a.raw", "a.vmdk", "a-flat.vmdk"].map(|n| dir.path().join(n));
    raw(&raw_path);
    let split = ["--subformat", "twoGbMaxExtentFlat", "--split-size", "16M"];
    succeed(flatdisk().arg("create").arg(&image).arg("40M").args(split));
    assert_eq!(names(dir.path()).len(), 2 + 3);
    let convert = || {
        let mut command = flatdisk();
        command.args(["convert", "--force"]).args([&raw_path, &image]);
        command
    };
    succeed(convert().args(["--subformat", "monolithicFlat"]));
    let mut left = names(dir.path());
    left.sort();
    assert_eq!(left, ["a-flat.vmdk", "a.raw", "a.vmdk"]);
    succeed(flatdisk().arg("compare").args([&raw_path, &image]));
    succeed(&mut convert());
    assert!(!flat.exists());
    // A disk that the image only named.
    fs::remove_file(&image).unwrap();
    let named = dir.path().join("b.img");
    File::create(&named).unwrap().set_len(1 << 20).unwrap();
    succeed(flatdisk().args(["create", "--wrap"]).args([&named, &image]));
    succeed(&mut convert());
    assert!(named.exists());
    succeed(flatdisk().arg("compare").args([&raw_path, &image]));
}

#[test]
fn create_takes_the_size_and_allocates_as_it_is_told() {
    let dir = scratch();
    let make = |name: &str, options: &[&str]| {
        let path = dir.path().join(name);
        succeed(flatdisk().arg("create").arg(&path).arg("4M").args(options));
        path
    };
    let stored = |path: &Path| fs::metadata(path).unwrap().blocks() * 512;
    let fixed = ["--subformat", "fixed"];
    for (name, how, whole) in [
        ("a.vhd", None, true),
        ("b.vhd", Some("off"), false),
        ("c.vhd", Some("falloc"), true),
        ("d.vhd", Some("full"), true),
        ("a.vhdx", None, true),
        ("b.vhdx", Some("off"), false),
    ] {
        let how: Vec<_> = how.iter().flat_map(|how| ["--preallocation", how]).collect();
        let path = make(name, &[&fixed[..], &how].concat());
        assert_eq!(stored(&path) >= 4 << 20, whole, "{name}: {} bytes", stored(&path));
        let info = json(flatdisk().arg("info").arg(&path));
        assert_eq!(info["images"][0]["virtual_size"], 4 << 20);
    }
    let twice = outcome(
        flatdisk().args(["create", "--size", "4M"]).arg(dir.path().join("x.vhd")).arg("4M"),
    );
    assert!(!twice.status.success());
    // Zeroes that are marked: a byte of the header says the version that has them.
    for (name, zeroed, version) in [("y.vmdk", "yes", 2), ("n.vmdk", "no", 1)] {
        let path = make(name, &["--zeroed-grain", zeroed]);
        assert_eq!(fs::read(&path).unwrap()[4], version, "{name}");
    }
    // A child of another subformat than its parent.
    let (parent, child) = (dir.path().join("n.vmdk"), dir.path().join("child.vmdk"));
    let options = ["--subformat", "twoGbMaxExtentSparse", "--parent"];
    succeed(flatdisk().arg("create").args(options).args([&parent, &child]));
    succeed(flatdisk().args(["write", "--fill", "7", "--length", "512"]).arg(&child));
    assert_eq!(outcome(flatdisk().arg("compare").args([&parent, &child])).status.code(), Some(1));
    assert!(fs::read_to_string(&child).unwrap().contains("twoGbMaxExtentSparse"));
}

#[test]
fn a_host_without_room_for_a_fixed_disk_says_so_when_it_is_made() {
    if !live::can_mount() {
        return;
    }
    let dir = scratch();
    let full = dir.path().join("full");
    fs::create_dir(&full).unwrap();
    let script = "set -e; mount -t tmpfs -o size=6M none \"$DIR\"; cd \"$DIR\"\n\
                  for kind in vhd,fixed vhdx,fixed vmdk,monolithicFlat; do\n\
                    if \"$FLATDISK\" create -q --subformat ${kind#*,} a.${kind%,*} 16M 2> ../err; then exit 3; fi\n\
                    grep -q 'no space left' ../err; test -z \"$(ls -A)\"\n\
                  done\n\
                  \"$FLATDISK\" create -q --subformat fixed --preallocation off a.vhd 16M";
    let program = env!("CARGO_BIN_EXE_flatdisk");
    live::succeed_in_namespace(script, &[("DIR", &full), ("FLATDISK", &program)]);
}

#[test]
fn a_level_of_compression_is_refused_for_what_is_not_compressed() {
    let dir = scratch();
    let raw_path = dir.path().join("a.raw");
    raw(&raw_path);
    for target in ["b.raw", "b.vhd", "b.vhdx", "b.vmdk"] {
        let target = dir.path().join(target);
        let refused =
            outcome(flatdisk().args(["convert", "--compress", "9"]).args([&raw_path, &target]));
        let why = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && why.contains("streamOptimized"), "{why}");
        assert!(!target.exists());
    }
}

#[test]
fn disks_of_two_sizes_differ_only_where_that_is_strict() {
    let dir = scratch();
    let [small, large] = ["s.raw", "l.raw"].map(|name| dir.path().join(name));
    File::create(&small).unwrap().set_len(1 << 20).unwrap();
    File::create(&large).unwrap().set_len(2 << 20).unwrap();
    succeed(flatdisk().arg("compare").args([&small, &large]));
    let strict = outcome(flatdisk().args(["compare", "--strict"]).args([&small, &large]));
    assert_eq!(strict.status.code(), Some(1));
}

#[test]
fn blocks_are_shared_on_xfs_and_btrfs_and_take_no_new_space() {
    // VHD between VHDX and raw: the bitmaps in front of its blocks must not move the data off the host's blocks.
    let script = "dd if=/dev/urandom of=a.raw bs=1M count=48 status=none; truncate -s 64M a.raw; sync -f .\n\
        used() { sync -f .; df --output=used -k . | tail -1; }\n\
        before=$(used)\n\
        last=a.raw\n\
        for kind in vhdx,dynamic vmdk,monolithicSparse vhd,fixed vhdx,fixed vmdk,monolithicFlat raw,; do\n\
          to=${kind%,*}-${kind#*,}.${kind%,*}; sub=${kind#*,}\n\
          \"$FLATDISK\" convert -q --reflink=always -O ${kind%,*} ${sub:+--subformat $sub} $last $to\n\
          \"$FLATDISK\" compare -q a.raw $to; last=$to\n\
        done\n\
        test $(($(used) - before)) -lt 16384";
    for make in ["xfs", "btrfs"] {
        if have(&[&format!("mkfs.{make}")]) && live::can_mount() {
            live::on_file_system(make, script);
        }
    }
}
