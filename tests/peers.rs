//! Other programs' images through the mount, and our images in other programs.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use live::{Mount, corpus, create, have, run, scratch, sha256, succeed};

/// Rows of the manifest as `(id, path, kind, expected, sha256 of the content)`.
fn manifest(corpus: &Path) -> Vec<[String; 5]> {
    let text = fs::read_to_string(corpus.join("manifest.tsv")).unwrap();
    let mut lines = text.lines();
    let header: Vec<_> = lines.next().unwrap().split('\t').collect();
    let column = |name: &str| header.iter().position(|h| *h == name).unwrap();
    let columns = ["id", "path", "kind", "expected", "sha256_content"].map(column);
    lines
        .map(|line| {
            let fields: Vec<_> = line.split('\t').collect();
            columns.map(|i| fields[i].to_owned())
        })
        .collect()
}

/// Unpacks every file of one case into `folder`.
fn unpack(case: &Path, folder: &Path) {
    for entry in fs::read_dir(case).unwrap() {
        let packed = entry.unwrap().path();
        let name = packed.file_stem().unwrap();
        run("zstd", &[&"-dqf", &packed, &"-o", &folder.join(name)]);
    }
}

fn hashes(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut found: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .map(|p| (p.clone(), sha256(&p)))
        .collect();
    found.sort();
    found
}

/// Reads a flat file the way `sha256sum` does, and compares.
fn has_content(flat: &Path, expected: &str) {
    // Sparse disks of many GiB: holes read as zeroes without asking the daemon for every page.
    assert_eq!(sha256(flat), expected, "{}", flat.display());
}

#[test]
fn real_images_read_as_listed_and_do_not_change() {
    let Some(corpus) = corpus() else { return };
    if !live::can_mount() || !have(&["zstd", "file"]) {
        return;
    }
    let mut read = 0;
    for [id, path, kind, expected, content] in manifest(&corpus) {
        let (case, name) = path.split_once('/').unwrap();
        let folder = scratch();
        unpack(&corpus.join(case), folder.path());
        let before = hashes(folder.path());
        // A folder shows what has an image's extension; anything can be named by itself.
        let image = folder.path().join(name);
        let known = ["vhd", "vhdx", "avhdx", "vmdk"];
        let shown = image.extension().is_some_and(|e| known.iter().any(|k| e == *k));
        if !shown && expected != "opens" {
            let output = live::outcome(live::flatdisk().arg("info").arg(&image));
            let why = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(!output.status.success() && why.contains(name), "{id}: {why}");
            println!("{id}: {why}");
            continue;
        }
        let mount = Mount::new(if shown { folder.path() } else { &image }, &[]);
        let names: Vec<_> =
            fs::read_dir(mount.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        let flat = mount.flat(name);
        let refusal = mount.path().join(format!("{name}.error.txt"));
        if expected == "opens" {
            if refusal.exists() {
                let why = fs::read_to_string(&refusal).unwrap();
                panic!("{id} ({kind}): {why}");
            }
            succeed(Command::new("file").arg(&flat));
            let size = fs::metadata(&flat).unwrap().len();
            // Hashing a sparse 128 GiB disk takes minutes; its content is all zeroes.
            if size > 20 << 30 {
                assert_eq!(zeroes(&flat), size, "{id}");
            } else {
                has_content(&flat, &content);
            }
            read += 1;
        } else if refusal.exists() {
            let why = fs::read_to_string(&refusal).unwrap();
            println!("{id}: {}", why.lines().next().unwrap_or_default());
            assert!(why.contains(name), "{id}: {why}");
        } else {
            panic!("{id} must be refused ({expected}), but shows as {names:?}");
        }
        assert!(mount.unmount().success());
        assert_eq!(hashes(folder.path()), before, "{id}: an image file changed by reading");
    }
    println!("{read} images read as listed");
}

/// How far the file is all holes.
fn zeroes(flat: &Path) -> u64 {
    let file = File::open(flat).unwrap();
    match nix::unistd::lseek64(&file, 0, nix::unistd::Whence::SeekData) {
        Ok(data) => data as u64,
        Err(nix::errno::Errno::ENXIO) => file.metadata().unwrap().len(),
        Err(e) => panic!("{}: {e}", flat.display()),
    }
}

/// Images of every subformat, made by `qemu-img`: name, driver, options, whether QEMU can check it.
const QEMU_IMAGES: [(&str, &str, &str, bool); 16] = [
    ("dynamic.vhd", "vpc", "subformat=dynamic", false),
    ("exact.vhd", "vpc", "subformat=dynamic,force_size=on", false),
    ("fixed.vhd", "vpc", "subformat=fixed,force_size=on", false),
    ("dynamic.vhdx", "vhdx", "subformat=dynamic", true),
    ("fixed.vhdx", "vhdx", "subformat=fixed", true),
    ("small.vhdx", "vhdx", "block_size=1M,log_size=2M", true),
    ("large.vhdx", "vhdx", "block_size=256M", true),
    ("nozero.vhdx", "vhdx", "subformat=fixed,block_state_zero=off", true),
    ("sparse.vmdk", "vmdk", "subformat=monolithicSparse", true),
    ("zeroed.vmdk", "vmdk", "subformat=monolithicSparse,zeroed_grain=on", true),
    ("ide.vmdk", "vmdk", "subformat=monolithicSparse,adapter_type=ide", true),
    ("compat6.vmdk", "vmdk", "subformat=monolithicSparse,compat6=on", true),
    ("buslogic.vmdk", "vmdk", "subformat=monolithicSparse,adapter_type=buslogic", true),
    ("split.vmdk", "vmdk", "subformat=twoGbMaxExtentSparse", true),
    ("flat.vmdk", "vmdk", "subformat=monolithicFlat", false),
    ("splitflat.vmdk", "vmdk", "subformat=twoGbMaxExtentFlat", false),
];

const PATTERNS: [&str; 5] = [
    "write -P 0x11 0 64k",
    "write -P 0x22 2M 3M",
    "write -P 0x33 33554000 4k",
    "write -z 3M 512k",
    "write -P 0x44 62M 2M",
];

#[test]
fn qemu_and_the_flat_files_agree_both_ways() {
    if !live::can_mount() || !have(&["qemu-img", "qemu-io"]) {
        return;
    }
    let folder = scratch();
    for (name, driver, options, checkable) in QEMU_IMAGES {
        let path = folder.path().join(name);
        run("qemu-img", &[&"create", &"-q", &"-f", &driver, &"-o", &options, &path, &"64M"]);
        let mut io = Command::new("qemu-io");
        io.args(["-f", driver]);
        // The last sectors are there in every size that QEMU rounds 64 MiB to; odd offsets are not.
        io.args(
            PATTERNS
                .iter()
                .map(|p| p.replace("33554000", "33554432"))
                .flat_map(|p| ["-c".into(), p]),
        );
        succeed(io.arg(&path));
        let compare = |mount: &Mount| {
            let flat = mount.flat(name);
            run("qemu-img", &[&"compare", &"-U", &"-f", &driver, &"-F", &"raw", &path, &flat]);
        };
        let mount = Mount::new(folder.path(), &["-o", "ro"]);
        compare(&mount);
        assert!(mount.unmount().success());
        // Now we write, and QEMU reads.
        let mount = Mount::new(folder.path(), &[]);
        let flat = File::options().read(true).write(true).open(mount.flat(name)).unwrap();
        let mut random = fastrand::Rng::with_seed(3);
        for _ in 0..60 {
            let mut bytes = vec![0; random.usize(1..300_000)];
            random.fill(&mut bytes);
            flat.write_all_at(&bytes, random.u64(0..(64 << 20) - 300_000)).unwrap();
        }
        flat.sync_all().unwrap();
        drop(flat);
        assert!(mount.unmount().success());
        let mount = Mount::new(folder.path(), &["-o", "ro"]);
        compare(&mount);
        assert!(mount.unmount().success());
        if checkable {
            run("qemu-img", &[&"check", &"-f", &driver, &path]);
        }
        // QEMU itself leaves room unused in a VHDX it makes.
        let check = live::outcome(live::flatdisk().arg("check").arg(&path));
        let said = String::from_utf8_lossy(&check.stdout).into_owned();
        assert!(matches!(check.status.code(), Some(0 | 3)), "{name}: {said}");
        fs::remove_dir_all(folder.path()).unwrap();
        fs::create_dir(folder.path()).unwrap();
    }
}

/// Images of ours: name, size, options, QEMU's driver.
const OUR_IMAGES: [(&str, &[&str], &str); 8] = [
    ("dynamic.vhd", &[], "vpc"),
    ("fixed.vhd", &["--subformat", "fixed"], "vpc"),
    ("dynamic.vhdx", &[], "vhdx"),
    ("fixed.vhdx", &["--subformat", "fixed"], "vhdx"),
    ("sparse.vmdk", &[], "vmdk"),
    ("flat.vmdk", &["--subformat", "monolithicFlat"], "vmdk"),
    ("split.vmdk", &["--subformat", "twoGbMaxExtentSparse"], "vmdk"),
    ("splitflat.vmdk", &["--subformat", "twoGbMaxExtentFlat"], "vmdk"),
];

#[test]
fn images_of_ours_read_the_same_in_qemu_and_libyal() {
    if !live::can_mount() || !have(&["qemu-img", "vhdimount", "vmdkmount"]) {
        return;
    }
    let folder = scratch();
    let raw = folder.path().join("raw");
    for (name, options, driver) in OUR_IMAGES {
        let path = folder.path().join(name);
        create(&path, "50M", options);
        let mount = Mount::new(&path, &[]);
        let flat = File::options().write(true).open(mount.flat(name)).unwrap();
        let content = File::create(&raw).unwrap();
        content.set_len(50 << 20).unwrap();
        let mut random = fastrand::Rng::with_seed(9);
        for _ in 0..40 {
            let mut bytes = vec![0; random.usize(1..400_000)];
            random.fill(&mut bytes);
            let at = random.u64(0..(50 << 20) - 400_000);
            flat.write_all_at(&bytes, at).unwrap();
            content.write_all_at(&bytes, at).unwrap();
        }
        drop(flat);
        assert!(mount.unmount().success());
        run("qemu-img", &[&"compare", &"-f", &driver, &"-F", &"raw", &path, &raw]);
        let tool = match driver {
            // libvmdk does not know monolithicFlat.
            "vmdk" if name == "flat.vmdk" => continue,
            "vmdk" => "vmdkmount",
            _ => "vhdimount",
        };
        let point = scratch();
        run(tool, &[&path, &point.path()]);
        let seen = fs::read_dir(point.path()).unwrap().next().unwrap().unwrap().path();
        let same = sha256(&seen) == sha256(&raw);
        run("umount", &[&point.path()]);
        assert!(same, "{tool} reads {name} differently");
    }
}
