//! Files out of images without a mount: `ls`, `cat` and `cp`, held against what other programs put
//! there.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use common::tools::{both, have, output, run};
use flatdisk::Window;
use flatdisk::disk::flat;
use flatdisk::formats::{self, CreateSpec, OpenOptions};
use flatdisk::storage::Host;
use flatdisk::storage::file::HostFs;
use flatdisk::storage::memory::MemoryFile;
use flatdisk::volumes::files::{self, FileKind, FileSystem, Sink};

const MIB: u64 = 1 << 20;

fn flatdisk() -> Command {
    Command::new(env!("CARGO_BIN_EXE_flatdisk"))
}

fn sized(path: &Path, mib: u64) {
    File::create(path).unwrap().set_len(mib * MIB).unwrap();
}

/// A fixed VHD with the contents of a raw file, which becomes it.
fn wrap(raw: &Path) -> PathBuf {
    let image = raw.with_extension("vhd");
    let bytes = fs::read(raw).unwrap();
    let format = formats::by_name("vhd").unwrap();
    let subformat = Some("fixed".to_owned());
    let spec = CreateSpec { size: bytes.len() as u64, subformat, ..CreateSpec::default() };
    formats::create(format, &HostFs, &image, &spec).unwrap();
    File::options().write(true).open(&image).unwrap().write_all_at(&bytes, 0).unwrap();
    fs::remove_file(raw).unwrap();
    image
}

fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fastrand::Rng::with_seed(len as u64).fill(&mut bytes);
    bytes
}

/// What `IMAGE[:N]/PATH` is as an argument.
fn inside(image: &Path, rest: &str) -> String {
    format!("{}{rest}", image.to_str().unwrap())
}

/// A tree with what is hard about trees.
fn tree(dir: &Path) {
    fs::create_dir_all(dir.join("usr/lib/deep/er")).unwrap();
    fs::write(dir.join("empty"), "").unwrap();
    fs::write(dir.join("usr/lib/os-release"), "ID=test\n").unwrap();
    fs::write(dir.join("usr/lib/deep/er/file"), noise(70_000)).unwrap();
    // Long enough for more than one level of block numbers, with a hole.
    fs::write(dir.join("large"), noise(3_000_000)).unwrap();
    let sparse = File::create(dir.join("sparse")).unwrap();
    sparse.write_all_at(&noise(5000), 900_000).unwrap();
    sparse.set_len(40 * MIB + 7).unwrap();
    fs::create_dir(dir.join("etc")).unwrap();
    symlink("../usr/lib/os-release", dir.join("etc/os-release")).unwrap();
    symlink("/usr/lib", dir.join("lib")).unwrap();
    symlink("/etc/passwd", dir.join("out")).unwrap();
    symlink("x".repeat(200), dir.join("long link")).unwrap();
    symlink("loop", dir.join("loop")).unwrap();
    fs::write(dir.join("bell\u{7}\n\u{1b}[2J"), "name").unwrap();
    fs::write(dir.join("n".repeat(255)), "long").unwrap();
    fs::create_dir(dir.join("many")).unwrap();
    for number in 0..600 {
        fs::write(dir.join(format!("many/file with a longer name {number}")), format!("{number}"))
            .unwrap();
    }
}

/// What mkfs makes of a folder: the file system by name, and further options.
fn ext(path: &Path, from: &Path, kind: &str, options: &[&str]) {
    sized(path, 32);
    let mut mkfs = Command::new(format!("mkfs.{kind}"));
    run(mkfs.args(["-qFd"]).arg(from).args(options).arg(path).stdin(Stdio::null()));
}

#[test]
fn trees_come_out_of_ext_as_they_went_in() {
    if !have("mkfs.ext4") || !have("diff") {
        return;
    }
    let dir = common::folder();
    let from = dir.path().join("from");
    tree(&from);
    for (kind, options) in [
        ("ext2", &["-b1024"][..]),
        ("ext3", &["-b4096"]),
        ("ext4", &["-b1024", "-O64bit,metadata_csum"]),
        // Its first block of data is block 0, with the superblock in block 1.
        ("ext4", &["-b1024", "-Obigalloc"]),
        ("ext4", &["-b4096", "-O^has_journal,inline_data"]),
    ] {
        let raw = dir.path().join("raw");
        // mke2fs 1.47 itself cuts a file that begins with a hole, where files may lie in inodes.
        let holes = !options.iter().any(|option| option.contains("inline_data"));
        if !holes {
            fs::remove_file(from.join("sparse")).unwrap();
        }
        ext(&raw, &from, kind, options);
        let image = wrap(&raw);
        let to = dir.path().join("to");
        run(flatdisk().args(["cp", "-r", &inside(&image, "/")]).arg(&to));
        let _ = fs::remove_dir(to.join("lost+found"));
        run(Command::new("diff").args(["-r", "--no-dereference"]).arg(&from).arg(&to));
        if holes {
            let sparse = fs::metadata(to.join("sparse")).unwrap();
            assert!(sparse.blocks() * 512 < 2 * MIB, "{kind}: {}", sparse.blocks());
        }
        let cat = output(flatdisk().args(["cat", &inside(&image, "/lib/../../etc/os-release")]));
        assert_eq!(both(&cat), "ID=test\n", "{kind}");
        fs::remove_dir_all(&to).unwrap();
        fs::remove_file(&image).unwrap();
    }
}

#[test]
fn listings_and_mistakes_are_told() {
    if !have("mkfs.ext4") || !have("mkfs.xfs") {
        return;
    }
    let dir = common::folder();
    let from = dir.path().join("from");
    tree(&from);
    let raw = dir.path().join("raw");
    ext(&raw, &from, "ext4", &[]);
    let image = wrap(&raw);
    let ls = |rest: &str| run(flatdisk().args(["ls", &inside(&image, rest)]));
    assert_eq!(ls("/usr"), "lib/\n");
    assert!(ls("").contains("bell\\u{7}\\n\\u{1b}[2J\n"), "{}", ls(""));
    assert!(run(flatdisk().args(["ls", "-l", &inside(&image, "/large")])).contains("3000000"));
    let json = run(flatdisk().args(["ls", "--json", &inside(&image, "/etc")]));
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["entries"][0]["name"], "os-release");
    assert_eq!(json["entries"][0]["kind"], "symlink");
    let told = |arguments: &[&str], words: &str| {
        let output = output(flatdisk().args(arguments).current_dir(dir.path()));
        let said = both(&output);
        assert!(output.status.code() == Some(1) && said.contains(words), "{arguments:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    };
    told(&["cat", &inside(&image, "/absent")], "no such file or directory");
    told(&["cat", &inside(&image, "/usr")], "this is a directory");
    told(&["cat", &inside(&image, "/loop")], "too many symbolic links");
    told(&["cat", &inside(&image, ":2/x")], "the disk has no partitions");
    told(&["cp", &inside(&image, "/usr"), "."], "-r copies it");
    told(&["ls", "absent.vhd/x"], "no such image");
    fs::write(dir.path().join("empty"), "mine").unwrap();
    told(&["cp", &inside(&image, "/empty"), "."], "file exists");
    assert_eq!(fs::read(dir.path().join("empty")).unwrap(), b"mine");
    // What follows the path is the disk, to the byte.
    let bytes = output(flatdisk().args(["cat", &inside(&image, "")])).stdout;
    assert!(bytes[..] == fs::read(&image).unwrap()[..32 << 20]);
    fs::remove_file(&image).unwrap();
    sized(&raw, 320);
    run(Command::new("mkfs.xfs").arg("-q").arg(&raw));
    let image = wrap(&raw);
    told(&["ls", &inside(&image, "/")], "files of xfs are not read here");
    told(&["ls", &inside(&image, "/")], "attach --mount");
}

/// Blocks that are reserved for a file and not written yet hold what was there before; they read as
/// zeroes.
#[test]
fn reserved_blocks_of_ext4_read_as_zeroes() {
    if !have("mkfs.ext4") || !have("debugfs") {
        return;
    }
    let dir = common::folder();
    let raw = dir.path().join("raw");
    fs::write(&raw, vec![0xaa; 16 << 20]).unwrap();
    run(Command::new("mkfs.ext4")
        .args(["-qF", "-b1024", "-Enodiscard"])
        .arg(&raw)
        .stdin(Stdio::null()));
    let written = dir.path().join("written");
    fs::write(&written, noise(2048)).unwrap();
    let debugfs = |command: &str| {
        run(Command::new("debugfs").args(["-w", "-R", command]).arg(&raw));
    };
    debugfs(&format!("write {} file", written.display()));
    debugfs("fallocate file 2 63");
    debugfs("set_inode_field file size 65536");
    let image = wrap(&raw);
    let bytes = output(flatdisk().args(["cat", &inside(&image, "/file")])).stdout;
    assert_eq!(bytes.len(), 65_536);
    assert!(bytes[..2048] == noise(2048) && bytes[2048..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_journal_that_waits_is_told_of() {
    if !have("mkfs.ext4") || !have("debugfs") {
        return;
    }
    let dir = common::folder();
    let raw = dir.path().join("raw");
    sized(&raw, 16);
    run(Command::new("mkfs.ext4").args(["-qF"]).arg(&raw).stdin(Stdio::null()));
    run(Command::new("debugfs").args(["-w", "-R", "feature needs_recovery"]).arg(&raw));
    let listed = output(flatdisk().args(["ls", &inside(&wrap(&raw), "")]));
    assert!(
        listed.status.success() && both(&listed).contains("its journal waits"),
        "{}",
        both(&listed)
    );
}

/// A directory that has a link and a directory of one name, the link leading out: what is in the
/// directory does not go through the link.
#[test]
fn links_lead_nothing_out_of_the_target() {
    if !have("mkfs.ext4") {
        return;
    }
    let dir = common::folder();
    let (from, outside) = (dir.path().join("from"), dir.path().join("outside"));
    fs::create_dir(&outside).unwrap();
    fs::create_dir_all(from.join("evil2")).unwrap();
    fs::write(from.join("evil2/planted"), "x").unwrap();
    symlink(&outside, from.join("evil1")).unwrap();
    let raw = dir.path().join("raw");
    ext(&raw, &from, "ext4", &[]);
    let mut bytes = fs::read(&raw).unwrap();
    let mut renamed = 0;
    for at in 0..bytes.len() - 5 {
        if &bytes[at..at + 5] == b"evil2" {
            bytes[at + 4] = b'1';
            renamed += 1;
        }
    }
    assert!(renamed > 0);
    fs::write(&raw, &bytes).unwrap();
    let image = wrap(&raw);
    let to = dir.path().join("to");
    let copied = output(flatdisk().args(["cp", "-r", &inside(&image, "/")]).arg(&to));
    assert_eq!(copied.status.code(), Some(1), "{}", both(&copied));
    assert!(both(&copied).contains("file exists"), "{}", both(&copied));
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}

#[test]
fn files_come_out_of_ntfs_as_they_went_in() {
    if !have("mkfs.ntfs") || !have("ntfscp") {
        return;
    }
    let dir = common::folder();
    let raw = dir.path().join("raw");
    sized(&raw, 24);
    run(Command::new("mkfs.ntfs").args(["-FqfL", "label"]).arg(&raw));
    for (name, len) in [("small", 100), ("Large file.bin", 3_000_000), ("half", MIB as usize)] {
        let source = dir.path().join(name);
        fs::write(&source, noise(len)).unwrap();
        run(Command::new("ntfscp").arg("-qf").arg(&raw).arg(&source).arg(name));
    }
    // Of `half` only three clusters count as written: allocated size, length, initialized size.
    let mut bytes = fs::read(&raw).unwrap();
    let sizes = MIB.to_le_bytes().repeat(3);
    let at: Vec<_> =
        (0..bytes.len() - 24).step_by(8).filter(|at| bytes[*at..*at + 24] == sizes[..]).collect();
    assert_eq!(at.len(), 1);
    bytes[at[0] + 16..at[0] + 24].copy_from_slice(&12_288u64.to_le_bytes());
    fs::write(&raw, &bytes).unwrap();
    let image = wrap(&raw);
    let listed = run(flatdisk().args(["ls", &inside(&image, "/")]));
    assert_eq!(listed, "Large file.bin\nhalf\nsmall\n");
    let cat = |name: &str| output(flatdisk().args(["cat", &inside(&image, name)])).stdout;
    assert!(cat("/small") == noise(100));
    assert!(cat("/LARGE FILE.BIN") == noise(3_000_000));
    let half = cat("/half");
    assert!(half.len() as u64 == MIB && half[..12_288] == noise(MIB as usize)[..12_288]);
    assert!(half[12_288..].iter().all(|byte| *byte == 0));
    let disk = formats::open(&(HostFs::shared() as Arc<dyn Host>), &image, &OpenOptions::default());
    let mut opened = files::open(Window::whole(disk.unwrap().disk)).unwrap();
    let wanted = [&noise(MIB as usize)[..12_288], &[0; 100_000]].concat();
    for (at, len) in [(0, 5), (12_000, 500), (12_288, 1000), (90_000, 9000), (4095, 2)] {
        let mut part = vec![1; len];
        opened.read_at(b"half", at as u64, &mut part).unwrap();
        assert!(part == wanted[at..at + len], "{at} {len}");
    }
    let e = opened.read_at(b"half", MIB - 1, &mut [0; 2]).unwrap_err();
    assert_eq!(e.kind(), flatdisk::ErrorKind::OutOfRange);
    run(flatdisk().args(["cp", &inside(&image, "/Large file.bin")]).arg(dir.path().join("copy")));
    assert!(fs::read(dir.path().join("copy")).unwrap() == noise(3_000_000));
}

/// Names come and go, so that parts of the index are not in use and hold old ones. Clusters are larger and smaller than
/// such a part.
#[test]
fn large_directories_of_ntfs_are_listed_whatever_the_size_of_clusters() {
    if !have("mkfs.ntfs") || !have("ntfs-3g") || !Path::new("/dev/fuse").exists() {
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        common::skip("mounting by ntfs-3g needs root here");
        return;
    }
    let dir = common::folder();
    for cluster in ["512", "4096", "8192", "65536"] {
        let raw = dir.path().join("raw");
        sized(&raw, 64);
        run(Command::new("mkfs.ntfs").args(["-Fqfc", cluster]).arg(&raw));
        let mounted = dir.path().join("mounted");
        fs::create_dir(&mounted).unwrap();
        run(Command::new("ntfs-3g").arg(&raw).arg(&mounted));
        let name = |number: usize| format!("Ein Name, der länger ist, {number}");
        fs::create_dir(mounted.join("Many")).unwrap();
        let inside = mounted.join("Many");
        for number in 0..1500 {
            fs::write(inside.join(name(number)), number.to_string()).unwrap();
        }
        (300..1200).for_each(|number| fs::remove_file(inside.join(name(number))).unwrap());
        fs::create_dir(inside.join("sub")).unwrap();
        let mut names: Vec<_> = fs::read_dir(&inside)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        run(Command::new("umount").arg(&mounted));
        fs::remove_dir(&mounted).unwrap();

        let disk =
            Arc::new(flat::raw(MemoryFile::new("/d", &fs::read(&raw).unwrap()), 512).unwrap());
        let mut opened = files::open(Window::whole(disk)).unwrap();
        let mut found: Vec<_> = opened
            .list(b"many")
            .unwrap_or_else(|e| panic!("clusters of {cluster}: {e}"))
            .into_iter()
            .map(|entry| String::from_utf8(entry.name).unwrap())
            .collect();
        found.sort();
        assert!(found == names, "clusters of {cluster}: {} names", found.len());
        for number in [0, 299, 1200, 1499] {
            let path = format!("/MANY/{}", name(number).to_uppercase());
            let wanted = number.to_string();
            let mut bytes = vec![0; wanted.len()];
            opened.read_at(path.as_bytes(), 0, &mut bytes).unwrap();
            assert_eq!(bytes, wanted.as_bytes());
        }
        let gone = opened.stat(format!("/Many/{}", name(300)).as_bytes()).unwrap_err();
        assert_eq!(gone.kind(), flatdisk::ErrorKind::NotFound);
    }
}

#[test]
fn files_come_out_of_fat_as_they_went_in() {
    if !have("mkfs.vfat") {
        return;
    }
    let dir = common::folder();
    for kind in ["12", "16", "32"] {
        let raw = dir.path().join("raw");
        sized(&raw, if kind == "12" { 4 } else { 40 });
        run(Command::new("mkfs.vfat").args(["-F", kind]).arg(&raw));
        {
            let file = File::options().read(true).write(true).open(&raw).unwrap();
            let fat = fatfs::FileSystem::new(file, fatfs::FsOptions::new()).unwrap();
            let long = fat.root_dir().create_dir("A directory").unwrap();
            for (name, len) in [("short.txt", 5), ("A long Näme", 1_000_000)] {
                let mut made = long.create_file(name).unwrap();
                std::io::Write::write_all(&mut made, &noise(len)).unwrap();
            }
        }
        let image = wrap(&raw);
        let listed = run(flatdisk().args(["ls", &inside(&image, "/A directory")]));
        assert_eq!(listed, "A long Näme\nshort.txt\n", "FAT{kind}");
        let to = dir.path().join("to");
        run(flatdisk().args(["cp", "-r", &inside(&image, "/a DIRECTORY")]).arg(&to));
        assert!(fs::read(to.join("A long Näme")).unwrap() == noise(1_000_000), "FAT{kind}");
        fs::remove_dir_all(&to).unwrap();
        fs::remove_file(&image).unwrap();
    }
}

/// Counts bytes, and has enough at some time.
struct Enough(u64);

impl Sink for Enough {
    fn data(&mut self, bytes: &[u8]) -> flatdisk::Result<()> {
        self.0 += bytes.len() as u64;
        if self.0 > 64 * MIB { Err(flatdisk::Error::invalid("enough")) } else { Ok(()) }
    }
    fn hole(&mut self, _len: u64) -> flatdisk::Result<()> {
        Ok(())
    }
}

/// Looks at everything, as far as it is not too much.
fn walk(fs: &mut dyn FileSystem, path: &[u8], depth: usize, left: &mut usize) {
    for entry in fs.list(path).unwrap_or_default() {
        if *left == 0 {
            return;
        }
        *left -= 1;
        assert!(!entry.name.contains(&b'/') && entry.name != b"..");
        let path = [path, b"/", &entry.name].concat();
        let _ = fs.stat(&path);
        match entry.kind {
            FileKind::Directory if depth < 3 => walk(fs, &path, depth + 1, left),
            FileKind::Symlink => drop(fs.target(&path)),
            _ => drop(fs.read(&path, false, &mut Enough(0))),
        }
    }
}

#[test]
fn damaged_file_systems_end_in_errors() {
    if !have("mkfs.ext4") || !have("mkfs.ntfs") || !have("mkfs.vfat") {
        return;
    }
    // A crate that gives up in its own way says so on standard error; that is not of interest.
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(std::panic::Location::file).unwrap_or_default();
        if !place.contains("registry") {
            eprintln!("{info}")
        }
    }));
    let dir = common::folder();
    let from = dir.path().join("from");
    fs::create_dir_all(from.join("a/b/c")).unwrap();
    fs::write(from.join("a/file"), noise(50_000)).unwrap();
    symlink("a/file", from.join("link")).unwrap();
    let raw = dir.path().join("raw");
    let mut bases = Vec::new();
    for kind in ["ext4", "ext2"] {
        sized(&raw, 4);
        let mut mkfs = Command::new(format!("mkfs.{kind}"));
        run(mkfs.args(["-qFd"]).arg(&from).arg(&raw).stdin(Stdio::null()));
        bases.push(fs::read(&raw).unwrap());
    }
    sized(&raw, 4);
    run(Command::new("mkfs.ntfs").args(["-Fqf"]).arg(&raw));
    bases.push(fs::read(&raw).unwrap());
    sized(&raw, 4);
    run(Command::new("mkfs.vfat").arg(&raw));
    bases.push(fs::read(&raw).unwrap());
    let mut random = fastrand::Rng::with_seed(common::seed());
    for round in 0..common::number("FLATDISK_FILES_ROUNDS", 60) {
        let mut bytes = bases[round as usize % bases.len()].clone();
        // Where something is: what is zero is mostly not looked at.
        let places: Vec<_> =
            (0..bytes.len()).step_by(4).filter(|at| bytes[*at..*at + 4] != [0; 4]).collect();
        for _ in 0..random.usize(1..40) {
            let at = places[random.usize(..places.len().min(4000))];
            bytes[at + random.usize(..4)] = random.u8(..);
        }
        let disk = Arc::new(flat::raw(MemoryFile::new("/d", &bytes), 512).unwrap());
        if let Ok(mut opened) = files::open(Window::whole(disk)) {
            walk(&mut *opened, b"", 0, &mut 200);
        }
    }
}
