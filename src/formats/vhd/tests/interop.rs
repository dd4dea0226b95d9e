//! Images of other programs, and ours in other programs.

use std::path::PathBuf;
use std::process::Command;

use sha2::{Digest, Sha256};

use super::*;
use crate::error::ErrorKind;
use crate::storage::file::HostFs;

/// Whether a test that cannot run for `reason` may be skipped.
fn skip(reason: &str) {
    assert!(std::env::var_os("FLATDISK_REQUIRE_TOOLS").is_none(), "required: {reason}");
    println!("SKIPPED: {reason}");
}

/// Whether a program is installed.
fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        skip(&format!("{program} is not installed"));
    }
    found
}

/// Repeats what fails because a file is in use: a program that another test is just starting holds
/// copies of all open files, locks included, until it runs.
fn when_free<T, E>(
    mut attempt: impl FnMut() -> std::result::Result<T, E>,
    in_use: impl Fn(&E) -> bool,
) -> T
where
    E: std::fmt::Display,
{
    for _ in 0..100 {
        match attempt() {
            Ok(value) => return value,
            Err(e) => assert!(in_use(&e), "{e}"),
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("a file stays in use");
}

/// Runs a program that must succeed, and returns what it printed.
fn run(program: &str, args: &[&str]) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let attempt = || {
        let output = Command::new(program).args(args).output().unwrap();
        let failure = || format!("{program} {args:?}: {}", text(&output.stderr));
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(failure()) }
    };
    when_free(attempt, |e| e.contains("lock"))
}

fn open_file(path: &Path) -> Image {
    let options = OpenOptions::new(Access::Write);
    let attempt = || formats::open(&HostFs::shared(), path, &options);
    when_free(attempt, |e| e.kind() == ErrorKind::Busy)
}

fn check_file(path: &Path) -> Report {
    let options = OpenOptions::new(Access::Read);
    let attempt = || formats::check(&HostFs::shared(), path, &options);
    when_free(attempt, |e| e.kind() == ErrorKind::Busy)
}

fn create_file(path: &Path, subformat: &str, size: u64, block_size: Option<u64>) {
    let spec = CreateSpec {
        subformat: Some(subformat.to_owned()),
        size,
        block_size,
        ..CreateSpec::default()
    };
    formats::create(&Vhd, &HostFs, path, &spec).unwrap();
}

fn sha256(image: &Image) -> String {
    let mut hash = Sha256::new();
    let mut buf = vec![0; 1 << 20];
    let mut pos = 0;
    while pos < image.disk.size() {
        let len = (image.disk.size() - pos).min(buf.len() as u64) as usize;
        image.disk.read_at(pos, &mut buf[..len]).unwrap();
        hash.update(&buf[..len]);
        pos += len as u64;
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Larger disks, which the corpus has only empty, are not hashed but looked through for data.
const LARGEST_HASHED: u64 = 4 << 30;

#[test]
fn images_of_other_programs_read_as_other_programs_read_them() {
    let Some(corpus) = std::env::var_os("FLATDISK_CORPUS").map(PathBuf::from) else {
        return skip("FLATDISK_CORPUS is not set");
    };
    if !has("zstd") {
        return;
    }
    let manifest = std::fs::read_to_string(corpus.join("manifest.tsv")).unwrap();
    let mut seen = 0;
    for row in manifest.lines().skip(1) {
        let columns: Vec<_> = row.split('\t').collect();
        let [id, _, path, expected, size, sha, ..] = columns[..] else { panic!("{row}") };
        if !id.starts_with("vhd-") && !id.starts_with("bad-vhd-") {
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(corpus.join(id)).unwrap() {
            let packed = entry.unwrap().path();
            let target = dir.path().join(packed.file_stem().unwrap());
            run("zstd", &["-q", "-d", packed.to_str().unwrap(), "-o", target.to_str().unwrap()]);
        }
        let path = dir.path().join(Path::new(path).file_name().unwrap());
        seen += 1;
        let options = OpenOptions::new(Access::Read);
        let opened = formats::open(&HostFs::shared(), &path, &options);
        if expected != "opens" {
            let error = opened.expect_err(id);
            println!("{id}: {error}");
            continue;
        }
        let image = opened.unwrap_or_else(|e| panic!("{id}: {e}"));
        assert_eq!(image.disk.size(), size.parse::<u64>().unwrap(), "{id}");
        if image.disk.size() > LARGEST_HASHED {
            assert_eq!(image.disk.next_data(0).unwrap(), None, "{id}");
        } else {
            assert_eq!(sha256(&image), sha, "{id}");
        }
        let report = check_file(&path);
        assert_eq!(report.errors, 0, "{id}: {:?}", report.findings);
    }
    assert!(seen >= 17, "{seen} images in the corpus");
}

/// Writes the same pattern through us and, as raw commands, through qemu-io.
const PATTERN: [(u64, usize, u8); 5] = [
    (0, 4096, 1),
    ((2 << 20) - 512, 1024, 2),
    (5 << 20, 3 << 20, 3),
    ((9 << 20) + 4096, 512, 4),
    ((10 << 20) - 512, 512, 5),
];

fn write_pattern(image: &Image) {
    for (at, len, byte) in PATTERN {
        image.disk.write_at(at, &vec![byte; len]).unwrap();
    }
}

#[test]
fn qemu_reads_what_we_write_with_the_exact_size() {
    if !has("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    let mut expected = vec![0; 10 << 20];
    for (at, len, byte) in PATTERN {
        expected[at as usize..][..len].fill(byte);
    }
    std::fs::write(&raw, &expected).unwrap();
    for (subformat, block_size) in
        [("fixed", None), ("dynamic", None), ("dynamic", Some(512 << 10)), ("dynamic", Some(4096))]
    {
        let path = dir.path().join(format!("{subformat}-{block_size:?}.vhd"));
        create_file(&path, subformat, 10 << 20, block_size);
        let image = open_file(&path);
        write_pattern(&image);
        image.disk.flush().unwrap();
        let killed = dir.path().join("killed.vhd");
        std::fs::copy(&path, &killed).unwrap();
        image.disk.close().unwrap();
        drop(image);
        let path = path.to_str().unwrap();
        for path in [path, killed.to_str().unwrap()] {
            run("qemu-img", &["compare", "-f", "vpc", "-F", "raw", path, raw.to_str().unwrap()]);
        }
        let info = run("qemu-img", &["info", "-f", "vpc", "--output=json", path]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["virtual-size"], 10 << 20, "{path}");
    }
}

#[test]
fn we_read_what_qemu_writes_and_go_on_writing() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (index, options) in
        ["subformat=dynamic", "subformat=dynamic,force_size=on", "subformat=fixed,force_size=on"]
            .into_iter()
            .enumerate()
    {
        let path = dir.path().join(format!("{index}.vhd"));
        let name = path.to_str().unwrap();
        run("qemu-img", &["create", "-q", "-f", "vpc", "-o", options, name, "10M"]);
        for (at, len, byte) in PATTERN {
            run("qemu-io", &["-f", "vpc", "-c", &format!("write -P {byte} {at} {len}"), name]);
        }
        let image = open_file(&path);
        for (at, len, byte) in PATTERN {
            assert_eq!(read(&image, at, len), vec![byte; len], "{options}");
        }
        image.disk.write_at(4 << 20, &[0x77; 5000]).unwrap();
        image.disk.discard(0, 2 << 20).unwrap();
        image.disk.close().unwrap();
        drop(image);
        let report = check_file(&path);
        assert_eq!(report.errors, 0, "{options}: {:?}", report.findings);
        let verify = [
            "read -P 0 0 2096640",
            "read -P 2 2097152 512",
            "read -P 119 4194304 5000",
            "read -P 3 5242880 3145728",
        ];
        for command in verify {
            let out = run("qemu-io", &["-f", "vpc", "-c", command, name]);
            assert!(!out.contains("failed"), "{options}: {command}: {out}");
        }
        // And QEMU goes on in turn.
        run("qemu-io", &["-f", "vpc", "-c", "write -P 9 0 100k", name]);
        let image = open_file(&path);
        assert_eq!(read(&image, 0, 100 << 10), vec![9; 100 << 10], "{options}");
        assert_eq!(read(&image, 4 << 20, 5000), [0x77; 5000], "{options}");
    }
}

/// A mount of vhdimount, which shows each generation of a chain as a file.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new(image: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        run("vhdimount", &[image.to_str().unwrap(), dir.path().to_str().unwrap()]);
        Self(dir)
    }

    fn generation(&self, number: usize) -> Vec<u8> {
        std::fs::read(self.0.path().join(format!("vhdi{number}"))).unwrap()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("fusermount").arg("-u").arg(self.0.path()).status();
    }
}

#[test]
fn libvhdi_reads_what_we_write_chains_included() {
    if !has("vhdimount") || !has("fusermount") {
        return;
    }
    if !Path::new("/dev/fuse").exists() {
        return skip("there is no /dev/fuse");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for (subformat, block_size) in
        [("fixed", None), ("dynamic", None), ("dynamic", Some(512 << 10))]
    {
        let base = path(&format!("{subformat}-{block_size:?}.vhd"));
        create_file(&base, subformat, 10 << 20, block_size);
        let image = open_file(&base);
        write_pattern(&image);
        image.disk.close().unwrap();
        let child = base.with_extension("avhd");
        create_child(&HostFs, &child, &image, block_size).unwrap();
        let expected = read(&image, 0, 10 << 20);
        drop(image);

        let image = open_file(&child);
        image.disk.write_at(1000, &[0x66; 5000]).unwrap();
        image.disk.discard(5 << 20, 1 << 20).unwrap();
        image.disk.write_at(9 << 20, &[0x99; 512]).unwrap();
        image.disk.close().unwrap();
        let expected_of_child = read(&image, 0, 10 << 20);
        drop(image);

        let mounted = Mounted::new(&base);
        assert!(mounted.generation(1) == expected, "{}", base.display());
        drop(mounted);
        let mounted = Mounted::new(&child);
        let (first, second) = (mounted.generation(1), mounted.generation(2));
        assert!([&first, &second].contains(&&expected_of_child), "{}", child.display());
        assert!([&first, &second].contains(&&expected), "{}", child.display());
    }
}
