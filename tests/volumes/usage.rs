//! How much of file systems is used, which system is on them, and one partition taken out.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use flatdisk::disk::Disk;
use flatdisk::formats::raw;
use flatdisk::storage::file::HostFs;
use flatdisk::storage::{Access, Host};
use flatdisk::volumes::{os, with_usage};

use super::common::tools::{have, run};
use super::made::sfdisk;

fn open(path: &Path) -> Arc<Disk> {
    Arc::new(raw::open(HostFs.open(path, Access::Read).unwrap()).unwrap())
}

/// The number behind `name` in what a program says.
fn number(told: &str, name: &str) -> u64 {
    let line = told.lines().find(|line| line.contains(name)).unwrap_or_else(|| panic!("{told}"));
    let behind = &line[line.find(name).unwrap() + name.len()..];
    let digits = behind.trim_start_matches(|c: char| !c.is_ascii_digit());
    digits.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}

/// Clusters that are free as fsck.vfat counts: `N files, USED/ALL clusters`.
fn fat_free(path: &Path) -> u64 {
    let told = run(Command::new("fsck.vfat").arg("-n").arg(path));
    let counts = told.split(", ").find_map(|part| part.strip_suffix(" clusters\n")).unwrap();
    let (used, all) = counts.split_once('/').unwrap();
    all.parse::<u64>().unwrap() - used.parse::<u64>().unwrap()
}

#[test]
fn free_space_is_what_other_programs_count() {
    type Told = fn(&Path) -> u64;
    let kinds: [(&str, u64, &[&str], Told); 6] = [
        ("fat12", 4, &["mkfs.vfat", "-F12"], fat_free),
        ("fat16", 32, &["mkfs.vfat", "-F16"], fat_free),
        ("fat32", 64, &["mkfs.vfat", "-F32"], fat_free),
        ("ntfs", 16, &["mkfs.ntfs", "-Fqf"], |path| {
            number(&run(Command::new("ntfsinfo").arg("-m").arg(path)), "Free Clusters:")
        }),
        ("ntfs-large", 600, &["mkfs.ntfs", "-Fqf", "-c", "512"], |path| {
            number(&run(Command::new("ntfsinfo").arg("-m").arg(path)), "Free Clusters:")
        }),
        ("exfat", 16, &["mkfs.exfat"], |path| {
            number(&run(Command::new("dump.exfat").arg(path)), "Free Clusters:")
        }),
    ];
    let dir = super::common::folder();
    for (name, mib, mkfs, count) in kinds {
        if !have(mkfs[0]) || !have("fsck.vfat") || !have("ntfsinfo") || !have("dump.exfat") {
            return;
        }
        let path = dir.path().join(name);
        fs::File::create(&path).unwrap().set_len(mib << 20).unwrap();
        run(Command::new(mkfs[0]).args(&mkfs[1..]).arg(&path));
        let found = with_usage(&open(&path)).unwrap().content.unwrap();
        let clusters = found.free.map(|free| free / found.block_size.unwrap());
        assert_eq!(clusters, Some(count(&path)), "{name}");
        assert!(found.free < found.size, "{name}");
    }
}

#[test]
fn a_partition_is_taken_out_and_the_system_on_it_told() {
    if !have("mkfs.ext4") || !have("debugfs") || !have("sfdisk") {
        return;
    }
    let dir = super::common::folder();
    let path = |name: &str| dir.path().join(name);
    let root = path("root.img");
    fs::File::create(&root).unwrap().set_len(20 << 20).unwrap();
    run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&root));
    fs::write(path("os"), "ID=debian\nVERSION_ID=\"12\"\nPRETTY_NAME=\"Debian 12\"\n").unwrap();
    for command in ["mkdir etc", "mkdir usr", "mkdir usr/lib"] {
        run(Command::new("debugfs").args(["-w", "-R", command]).arg(&root));
    }
    let write = format!("write {} usr/lib/os-release", path("os").display());
    run(Command::new("debugfs").args(["-w", "-R", &write]).arg(&root));
    let link = "symlink etc/os-release ../usr/lib/os-release";
    run(Command::new("debugfs").args(["-w", "-R", link]).arg(&root));
    let disk = path("disk.img");
    fs::File::create(&disk).unwrap().set_len(32 << 20).unwrap();
    sfdisk(&disk, "label: gpt\nstart=2048, size=4096\nstart=8192, size=40960\n");
    let bytes = fs::read(&root).unwrap();
    let to = fs::File::options().write(true).open(&disk).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&to, &bytes, 8192 * 512).unwrap();

    let opened = open(&disk);
    let systems = os::systems(&opened, &with_usage(&opened).unwrap());
    assert_eq!(systems.len(), 1, "{systems:?}");
    assert_eq!((&*systems[0].family, systems[0].partition), ("linux", Some(2)));
    assert_eq!(systems[0].name.as_deref(), Some("Debian 12"));

    let flatdisk = || Command::new(env!("CARGO_BIN_EXE_flatdisk"));
    let image = path("disk.vhdx");
    run(flatdisk().args(["convert", "-q"]).args([&disk, &image]));
    let part = format!("{}:2", image.display());
    let out = path("out.img");
    run(flatdisk().args(["convert", "-q", &part]).arg(&out));
    assert!(fs::read(&out).unwrap() == bytes, "the partition differs");
    let hash = |path: &Path| run(flatdisk().arg("hash").arg(path));
    run(flatdisk().args(["convert", "-q", &part]).arg(path("out.vmdk")));
    assert_eq!(hash(&path("out.vmdk"))[..64], hash(&out)[..64]);
    let told = run(flatdisk().args(["volumes", "--os", "--usage"]).arg(&image));
    assert!(told.contains("system: Debian 12, root on partition 2"), "{told}");
    let refused =
        flatdisk().args(["convert", &part.replace(":2", ":7")]).arg(path("no.img")).output();
    let told = String::from_utf8_lossy(&refused.unwrap().stderr).into_owned();
    assert!(told.contains("no partition 7"), "{told}");
}
