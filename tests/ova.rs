//! Disks in OVA archives: shown, read, checked and converted where they lie; and archives that are made.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flatdisk::formats::{self, OpenOptions, ova};
use flatdisk::storage::archive::{Archive, tar};
use flatdisk::storage::file::HostFs;
use flatdisk::storage::memory::MemoryFile;
use live::{Loop, Mount, MountedFs, flatdisk, have, names, outcome, scratch, sha256, succeed};
use sha2::Digest;

/// A raw disk with something in it.
fn raw(dir: &Path, name: &str, size: u64) -> PathBuf {
    let path = dir.join(name);
    let file = fs::File::create(&path).unwrap();
    file.set_len(size).unwrap();
    file.write_all_at(name.as_bytes(), 4096).unwrap();
    file.write_all_at(name.as_bytes(), size - 512).unwrap();
    path
}

fn convert(from: &Path, to: &Path, options: &[&str]) {
    succeed(flatdisk().args(["convert", "-q"]).args(options).arg(from).arg(to));
}

fn tar(dialect: &str, archive: &Path, dir: &Path, members: &[&str]) {
    let mut tar = Command::new("tar");
    tar.arg(format!("--format={dialect}")).arg("-cf").arg(archive).arg("-C").arg(dir).args(members);
    succeed(&mut tar);
}

/// What a command that fails says.
fn refusal(command: &mut Command) -> String {
    let output = outcome(command);
    assert!(!output.status.success(), "{command:?} works");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// An archive of members with these names and contents.
fn archive(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, contents) in members {
        bytes.extend(tar::encode(name, contents.len() as u64, 0).unwrap());
        bytes.extend(*contents);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}

#[test]
fn two_disks_show_in_place_whatever_program_wrote_the_archive() {
    if !live::can_mount() || !have(&["tar", "mkfs.ext4", "losetup"]) {
        return;
    }
    let dir = scratch();
    let (parts, shown) = (dir.path().join("parts"), dir.path().join("shown"));
    // Longer than a header has room for.
    let below = "below-".repeat(15);
    fs::create_dir_all(parts.join(&below)).unwrap();
    fs::create_dir(&shown).unwrap();
    let first = raw(dir.path(), "first.raw", 16 << 20);
    let second = raw(dir.path(), "second.raw", 8 << 20);
    succeed(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&first));
    convert(&first, &parts.join("first.vmdk"), &["--subformat", "streamOptimized"]);
    let long = format!("{below}/{}.vmdk", "long-".repeat(12));
    convert(&second, &parts.join(&long), &["--subformat", "twoGbMaxExtentSparse"]);
    let part = long.replace(".vmdk", "-s001.vmdk");
    for dialect in ["ustar", "gnu", "pax"] {
        // Extents come before what names them.
        let members = [&*part, "first.vmdk", &*long];
        tar(dialect, &shown.join(format!("{dialect}.ova")), &parts, &members);
    }
    let before: Vec<_> = names(&shown).iter().map(|name| sha256(&shown.join(name))).collect();
    let mount = Mount::new(&shown, &[]);
    assert_eq!(names(mount.path()), ["gnu.ova", "pax.ova", "ustar.ova"]);
    for dialect in ["ustar", "gnu", "pax"] {
        let folder = mount.path().join(format!("{dialect}.ova"));
        assert_eq!(names(&folder), [&*below, "first.vmdk.img"]);
        assert_eq!(names(&folder.join(&below)), [format!("{}.img", &long[below.len() + 1..])]);
        assert_eq!(sha256(&folder.join("first.vmdk.img")), sha256(&first));
        assert_eq!(sha256(&folder.join(format!("{long}.img"))), sha256(&second));
        let write = fs::File::options().write(true).open(folder.join("first.vmdk.img"));
        assert_eq!(write.unwrap_err().raw_os_error(), Some(libc::EROFS));
    }
    let device = Loop::new(&mount.path().join("pax.ova/first.vmdk.img"), &["-r"]);
    let mounted = MountedFs::new(&device.device, &["-o", "ro"]);
    assert!(mounted.path().join("lost+found").is_dir());
    mounted.unmount();
    drop(device);
    assert!(mount.unmount().success());
    let after: Vec<_> = names(&shown).iter().map(|name| sha256(&shown.join(name))).collect();
    assert_eq!(before, after);
}

#[test]
fn an_archive_that_was_made_is_read_by_tar_and_here() {
    if !have(&["tar"]) {
        return;
    }
    let dir = scratch();
    let disk = raw(dir.path(), "disk.raw", 8 << 20);
    let made = dir.path().join("machine.ova");
    convert(&disk, &made, &["--for", "esx", "--verify"]);
    let listed = succeed(Command::new("tar").arg("-tf").arg(&made));
    assert_eq!(listed, "machine.ovf\nmachine.mf\nmachine-disk1.vmdk\n");
    let unpacked = dir.path().join("unpacked");
    fs::create_dir(&unpacked).unwrap();
    succeed(Command::new("tar").arg("-xf").arg(&made).arg("-C").arg(&unpacked));
    let manifest = fs::read_to_string(unpacked.join("machine.mf")).unwrap();
    for name in ["machine.ovf", "machine-disk1.vmdk"] {
        let line = format!("SHA256({name})= {}\n", sha256(&unpacked.join(name)));
        assert!(manifest.contains(&line), "{manifest}");
    }
    let envelope = fs::read_to_string(unpacked.join("machine.ovf")).unwrap();
    let size = fs::metadata(unpacked.join("machine-disk1.vmdk")).unwrap().len();
    assert!(envelope.contains(&format!("ovf:size=\"{size}\"")), "{envelope}");
    assert!(envelope.contains("ovf:capacity=\"8388608\""), "{envelope}");

    let shown = succeed(flatdisk().current_dir(&dir).args(["cat", "machine.ova:machine.ovf"]));
    assert_eq!(shown, envelope);
    succeed(flatdisk().arg("check").arg(&made));
    let hash = succeed(flatdisk().arg("hash").arg(&made));
    assert!(hash.starts_with(&sha256(&disk)), "{hash}");
    let back = dir.path().join("back.raw");
    convert(&made, &back, &[]);
    assert_eq!(sha256(&back), sha256(&disk));
    let again = outcome(flatdisk().args(["convert", "-q", "--for", "esx"]).arg(&disk).arg(&made));
    assert!(!again.status.success(), "an archive that exists was replaced");
    // The archive itself is the source.
    let told =
        refusal(flatdisk().args(["convert", "--force", "--for", "esx"]).args([&made, &made]));
    assert!(told.contains("the target is the source"), "{told}");
    let told = refusal(flatdisk().arg("convert").arg(&disk).arg(dir.path().join("x.ova")));
    assert!(told.contains("--for esx"), "{told}");
}

#[test]
fn disks_of_an_archive_are_named_in_every_command() {
    let dir = scratch();
    let disk = raw(dir.path(), "disk.raw", 4 << 20);
    convert(&disk, &dir.path().join("a.vhdx"), &[]);
    convert(&disk, &dir.path().join("b.vhd"), &[]);
    let read = |name: &str| fs::read(dir.path().join(name)).unwrap();
    let two = dir.path().join("two.ova");
    fs::write(&two, archive(&[("a.vhdx", &read("a.vhdx")), ("odd", &read("b.vhd"))])).unwrap();
    let told = refusal(flatdisk().arg("hash").arg(&two));
    assert!(told.contains("2 disks: a.vhdx, odd") && told.contains("two.ova:a.vhdx"), "{told}");
    for name in ["two.ova:a.vhdx", "two.ova:odd", "two.ova/odd"] {
        let hash = succeed(flatdisk().current_dir(&dir).args(["hash", name]));
        assert!(hash.starts_with(&sha256(&disk)), "{name}: {hash}");
    }
    let info = succeed(flatdisk().args(["info", "--json"]).arg(&two));
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["images"].as_array().unwrap().len(), 2, "{info}");
    let volumes = succeed(flatdisk().args(["volumes", "--json"]).arg(&two));
    assert_eq!(volumes.matches("\"filename\"").count(), 2, "{volumes}");
    let bytes = flatdisk()
        .current_dir(&dir)
        .args(["cat", "--offset", "4096", "--length", "8", "two.ova:odd"])
        .output();
    assert_eq!(bytes.unwrap().stdout, b"disk.raw");
    let before = sha256(&two);
    for command in [
        &["resize", "two.ova/odd", "8M"][..],
        &["compact", "two.ova/odd"],
        &["check", "--repair", "two.ova/odd"],
    ] {
        let told = refusal(flatdisk().current_dir(&dir).args(command));
        assert!(told.contains("only read"), "{command:?}: {told}");
    }
    assert_eq!(sha256(&two), before);
}

#[test]
fn what_is_in_an_archive_names_nothing_outside() {
    let dir = scratch();
    let secret = raw(dir.path(), "secret-flat.vmdk", 1 << 20);
    let descriptor = |name: &str| {
        format!(
            "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 2048 FLAT \"{name}\" 0\n"
        )
    };
    let absolute = descriptor(secret.to_str().unwrap());
    for text in [descriptor("../secret-flat.vmdk"), absolute, descriptor("secret-flat.vmdk")] {
        let path = dir.path().join("x.ova");
        fs::write(&path, archive(&[("d.vmdk", text.as_bytes())])).unwrap();
        for options in [&[][..], &["--allow-parent", dir.path().to_str().unwrap()]] {
            let told = refusal(flatdisk().arg("hash").args(options).arg(path.join("d.vmdk")));
            assert!(told.contains("d.vmdk") || told.contains("secret"), "{told}");
        }
    }
    let inside = [
        ("d.vmdk", descriptor("secret-flat.vmdk").into_bytes()),
        ("secret-flat.vmdk", vec![7; 1 << 20]),
    ];
    let inside: Vec<_> = inside.iter().map(|(name, bytes)| (*name, &bytes[..])).collect();
    fs::write(dir.path().join("x.ova"), archive(&inside)).unwrap();
    let hash = succeed(flatdisk().arg("hash").arg(dir.path().join("x.ova")));
    let wanted = sha2::Sha256::digest(vec![7; 1 << 20]);
    assert!(hash.starts_with(&wanted.iter().map(|b| format!("{b:02x}")).collect::<String>()));
}

#[test]
fn the_manifest_is_held_against_every_file() {
    let dir = scratch();
    let disk = raw(dir.path(), "disk.raw", 1 << 20);
    convert(&disk, &dir.path().join("d.vhd"), &[]);
    let disk = fs::read(dir.path().join("d.vhd")).unwrap();
    let ovf = b"<Envelope/>";
    let hex = |digest: &[u8]| digest.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let lines = |disk: &[u8]| {
        [
            format!("SHA1(d.vhd)= {}\n", hex(&sha1::Sha1::digest(disk))),
            format!("SHA256(d.vhd)= {}\n", hex(&sha2::Sha256::digest(disk))),
            format!("SHA512 (d.vhd) = {}\n", hex(&sha2::Sha512::digest(disk))),
        ]
    };
    let path = dir.path().join("x.ova");
    let check = |members: &[(&str, &[u8])]| {
        fs::write(&path, archive(members)).unwrap();
        let output = outcome(flatdisk().arg("check").arg(&path));
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let mut changed = disk.clone();
    changed[disk.len() / 2] ^= 1;
    for line in lines(&disk) {
        let whole = format!("SHA256(m.ovf)= {}\n{line}", hex(&sha2::Sha256::digest(ovf)));
        let (status, told) = check(&[("m.ovf", ovf), ("m.mf", whole.as_bytes()), ("d.vhd", &disk)]);
        assert_eq!(status, Some(0), "{told}");
        assert!(!told.contains("notice"), "{told}");
        let (status, told) =
            check(&[("m.ovf", ovf), ("m.mf", whole.as_bytes()), ("d.vhd", &changed)]);
        assert_eq!(status, Some(2), "{told}");
        assert!(told.contains("x.ova/d.vhd") && told.contains("by the manifest"), "{told}");
        // At the end, and not of all files.
        let (status, told) = check(&[("d.vhd", &disk), ("m.ovf", ovf), ("m.mf", line.as_bytes())]);
        assert_eq!(status, Some(0), "{told}");
        assert!(told.contains("not the first file") && told.contains("no digest of it"), "{told}");
    }
    let (status, told) = check(&[("m.ovf", ovf), ("d.vhd", &disk)]);
    assert_eq!(status, Some(0), "{told}");
    assert!(told.contains("notice") && told.contains("no manifest"), "{told}");
    let (status, told) =
        check(&[("m.mf", b"SHA256(gone.vhd)= 00\nMD5(d.vhd)= 00\nnonsense\n"), ("d.vhd", &disk)]);
    assert_eq!(status, Some(2), "{told}");
    assert!(told.contains("not in the archive") && told.contains("unknown kind, MD5"), "{told}");
    assert!(told.contains("a line without a digest"), "{told}");
}

#[test]
fn what_cannot_be_read_in_place_says_why() {
    if !live::can_mount() || !have(&["tar", "gzip"]) {
        return;
    }
    let dir = scratch();
    let disk = raw(dir.path(), "disk.raw", 1 << 20);
    let (parts, shown) = (dir.path().join("parts"), dir.path().join("shown"));
    fs::create_dir(&parts).unwrap();
    fs::create_dir(&shown).unwrap();
    convert(&disk, &parts.join("a.vmdk"), &["--subformat", "streamOptimized"]);
    convert(&disk, &parts.join("whole.vhd"), &["--subformat", "fixed"]);
    succeed(Command::new("gzip").arg("-k").arg(parts.join("a.vmdk")));
    fs::rename(parts.join("a.vmdk"), parts.join("c.vmdk.000000000")).unwrap();
    let encrypted = "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\nencryptionKeys = \"vmware:key/list/(pair/(null))\"\nRW 2048 SPARSE \"e-s001.vmdk\"\n";
    fs::write(parts.join("e.vmdk"), encrypted).unwrap();
    let members = ["a.vmdk.gz", "c.vmdk.000000000", "e.vmdk", "whole.vhd"];
    tar("gnu", &shown.join("x.ova"), &parts, &members);
    let sparse = fs::File::create(parts.join("s.vhd")).unwrap();
    sparse.set_len(4 << 20).unwrap();
    let mut tar = Command::new("tar");
    tar.args(["--sparse", "--format=pax", "-cf"]).arg(shown.join("sparse.ova"));
    succeed(tar.arg("-C").arg(&parts).arg("s.vhd"));
    let whole = fs::read(shown.join("x.ova")).unwrap();
    fs::write(shown.join("cut.ova"), &whole[..whole.len() / 2]).unwrap();
    fs::write(shown.join("none.ova"), "no archive").unwrap();
    let mount = Mount::new(&shown, &[]);
    let told = |name: &str| fs::read_to_string(mount.path().join(name)).unwrap();
    assert_eq!(names(mount.path()), ["cut.ova", "none.ova.error.txt", "sparse.ova", "x.ova"]);
    let folder = names(&mount.path().join("x.ova"));
    let texts = ["a.vmdk.gz.error.txt", "c.vmdk.000000000.error.txt", "e.vmdk.error.txt"];
    assert_eq!(folder, [&texts[..], &["whole.vhd.img"]].concat());
    assert!(told("x.ova/a.vmdk.gz.error.txt").contains("gzip"));
    assert!(told("x.ova/c.vmdk.000000000.error.txt").contains("chunks"));
    assert!(told("x.ova/e.vmdk.error.txt").contains("encrypted"));
    assert!(told("sparse.ova/s.vhd.error.txt").contains("sparse"));
    assert!(told("cut.ova/whole.vhd.error.txt").contains("incomplete"));
    assert!(mount.unmount().success());
}

#[test]
fn an_archive_is_opened_and_closed_in_a_live_mount() {
    if !live::can_mount() {
        return;
    }
    let dir = scratch();
    let disk = raw(dir.path(), "disk.raw", 1 << 20);
    let path = dir.path().join("x.ova");
    convert(&disk, &path, &["--for", "esx"]);
    fs::write(dir.path().join("none.ova"), "no archive").unwrap();
    let empty = scratch();
    let mount = Mount::new(empty.path(), &[]);
    let open = |name: &str| {
        let mut open = flatdisk();
        open.arg("open").arg(dir.path().join(name)).arg(mount.path());
        open
    };
    let shown = mount.path().join("x.ova");
    let flat = shown.join("x-disk1.vmdk.img");
    let told = succeed(&mut open("x.ova"));
    assert_eq!(told.trim(), shown.to_str().unwrap());
    assert_eq!(sha256(&flat), sha256(&disk));
    assert!(refusal(&mut open("x.ova")).contains("is there already"));
    let told = refusal(&mut open("none.ova"));
    assert!(told.contains("not an archive"), "{told}");
    let told = refusal(open("x.ova").arg("--nonpersistent"));
    assert!(told.contains("only read") || told.contains("there already"), "{told}");
    let used = fs::File::open(&flat).unwrap();
    assert!(refusal(flatdisk().arg("close").arg(&shown)).contains("is open"));
    drop(used);
    live::wait_until("it is closed", || {
        outcome(flatdisk().arg("close").arg(&shown)).status.success()
    });
    live::wait_until("it is gone", || names(mount.path()).is_empty());
    std::os::unix::fs::symlink(&path, mount.path().join("link")).unwrap();
    live::wait_until("it shows", || mount.path().join("link/x-disk1.vmdk.img").exists());
    fs::remove_dir(mount.path().join("link")).unwrap();
    assert!(path.exists());
    assert!(mount.unmount().success());
}

#[test]
fn a_thousand_archives_are_listed_in_a_second() {
    if !live::can_mount() {
        return;
    }
    let dir = scratch();
    let disk = raw(dir.path(), "disk.raw", 1 << 20);
    convert(&disk, &dir.path().join("d.vhd"), &[]);
    let disk = fs::read(dir.path().join("d.vhd")).unwrap();
    let shown = dir.path().join("shown");
    fs::create_dir(&shown).unwrap();
    let bytes = archive(&[("m.ovf", b"<Envelope/>"), ("d.vhd", &disk), ("e.vhd", &disk)]);
    (0..1000).for_each(|n| fs::write(shown.join(format!("{n:04}.ova")), &bytes).unwrap());
    let mount = Mount::new(&shown, &[]);
    let begun = Instant::now();
    let listed = names(mount.path());
    for name in &listed {
        assert!(fs::metadata(mount.path().join(name)).unwrap().is_dir());
    }
    let took = begun.elapsed();
    assert_eq!(listed.len(), 1000);
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert!(mount.unmount().success());
}

/// Whatever the bytes are, every member lies in the archive, and it takes neither time nor memory.
#[test]
fn damaged_archives_end_soon() {
    let good = archive(&[
        ("m.ovf", b"<Envelope/>"),
        ("m.mf", b"SHA1(d.vhd)= 00\n"),
        ("d.vhd", &[1; 1536]),
    ]);
    let seed = std::env::var("FLATDISK_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
    eprintln!("FLATDISK_SEED={seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let begun = Instant::now();
    let mut opened = 0;
    for _ in 0..20_000 {
        let mut bytes = good.clone();
        for _ in 0..rng.usize(1..4) {
            let header = rng.usize(..4) * 512;
            let (from, len) =
                *rng.choice(&[(0, 100), (124, 12), (156, 1), (257, 8), (345, 155)]).unwrap();
            let at = (header + from + rng.usize(..len)).min(bytes.len() - 1);
            bytes[at] = *rng
                .choice(&[0, 1, b'0', b'7', b'/', b'.', b'x', b'g', b'L', b'S', 0x80, 0xff])
                .unwrap();
        }
        if rng.bool() {
            bytes.truncate(rng.usize(..bytes.len()));
        }
        // Sums are put right, or nothing behind them would be looked at.
        for header in bytes.chunks_exact_mut(512).filter(|block| block[257..262] == *b"ustar") {
            header[148..156].fill(b' ');
            let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        let len = bytes.len() as u64;
        let Ok(found) = Archive::open(MemoryFile::new("/x.ova", &bytes)) else { continue };
        opened += 1;
        for member in found.members().iter() {
            assert!(member.name.components().all(|part| matches!(part, Component::Normal(_))));
            assert!(member.problem.is_some() || member.at + member.size <= len, "{member:?}");
            if let Ok(file) = found.member(&member.name) {
                let _ = formats::recognise(&*file);
            }
        }
    }
    assert!(opened > 1000, "{opened} opened");
    assert!(begun.elapsed() < Duration::from_secs(30));
}

#[test]
fn the_library_reads_a_disk_by_its_path() {
    let dir = scratch();
    let disk = raw(dir.path(), "disk.raw", 1 << 20);
    let made = dir.path().join("m.ova");
    convert(&disk, &made, &["--for", "esx"]);
    let host: Arc<dyn flatdisk::storage::Host> = HostFs::shared();
    let disks = ova::disks(&host, &made).unwrap();
    assert_eq!(disks, [made.join("m-disk1.vmdk")]);
    let image = OpenOptions::default().write(true).open(&disks[0]);
    assert_eq!(image.unwrap_err().kind(), flatdisk::ErrorKind::ReadOnly);
    let image = flatdisk::open(&disks[0]).unwrap();
    let mut bytes = [0; 8];
    image.disk.read_at(4096, &mut bytes).unwrap();
    assert_eq!(&bytes, b"disk.raw");
}
