//! Disks made to mislead: what is told of them, and that it takes no time or memory to find out.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use flatdisk::disk::{Disk, flat};
use flatdisk::storage::Storage;
use flatdisk::storage::memory::MemoryFile;
use flatdisk::volumes::{Copy, Kind, TableKind, Volumes, volumes, with_usage};

use crate::common::partitions::{entry, gpt, mbr};
use crate::common::{self, tools::have};
use crate::made::sfdisk;

const MIB: u64 = 1 << 20;

fn disk(mib: u64) -> (Arc<MemoryFile>, Disk) {
    let file = MemoryFile::new("/disk", &[]);
    file.set_len(mib * MIB).unwrap();
    let disk = flat::raw(file.clone(), 512).unwrap();
    (file, disk)
}

fn told(found: &Volumes, words: &str) {
    let of_parts = found.partitions.iter().flat_map(|partition| &partition.warnings);
    let content = found.content.iter().flat_map(|content| &content.warnings);
    let all: Vec<_> = found.warnings.iter().chain(of_parts).chain(content).collect();
    assert!(all.iter().any(|text| text.contains(words)), "{words}: {all:?}");
}

#[test]
fn chains_of_logical_partitions_end() {
    // Itself, a longer loop, outside, nothing, and one that never ends.
    for (links, words) in [
        (&[(0, 0)][..], "leads back to itself"),
        (&[(0, 100), (100, 200), (200, 100)], "leads back to itself"),
        (&[(0, 70_000)], "leads out"),
        (&[(0, 50)], "no part of it"),
    ] {
        let (file, disk) = disk(64);
        mbr(&*file, 0, &[entry(0x83, 1, 100), entry(0x05, 2048, 65_536), entry(0x83, 200, 50)]);
        for (at, next) in links {
            mbr(&*file, 2048 + at, &[entry(0x83, 8, 16), entry(0x05, *next, 40)]);
        }
        let found = volumes(&disk).unwrap();
        told(&found, words);
        // What was found before the bad link, and the primary ones, are there.
        assert_eq!(found.partitions.len(), 3 + links.len(), "{words}");
    }
    let (file, disk) = disk(64);
    mbr(&*file, 0, &[entry(0x0f, 2048, 65_536)]);
    for link in 0..1000 {
        mbr(&*file, 2048 + link * 4, &[entry(0x83, 1, 2), entry(0x05, link as u32 * 4 + 4, 4)]);
    }
    let found = volumes(&disk).unwrap();
    told(&found, "longer than any real one");
    assert_eq!(found.partitions.len(), 257);
}

#[test]
fn the_link_to_the_next_logical_partition_may_come_first() {
    let (file, disk) = disk(64);
    mbr(&*file, 0, &[entry(0x05, 2048, 65_536)]);
    mbr(&*file, 2048, &[entry(0x05, 100, 40), entry(0x83, 8, 16)]);
    mbr(&*file, 2148, &[entry(0, 0, 0), entry(0x83, 8, 24)]);
    let found = volumes(&disk).unwrap();
    let places: Vec<_> =
        found.partitions.iter().map(|p| (p.number, p.start / 512, p.size / 512)).collect();
    assert_eq!(places, [(1, 2048, 65_536), (5, 2056, 16), (6, 2156, 24)]);
    assert_eq!(found.warnings, Vec::<String>::new());
}

#[test]
fn entries_that_overlap_or_leave_the_disk_are_listed_and_said() {
    let (file, disk) = disk(64);
    mbr(&*file, 0, &[entry(0x83, 2048, 4096), entry(0x07, 4096, u32::MAX), entry(0x0c, 2048, 1)]);
    let found = volumes(&disk).unwrap();
    assert_eq!(found.partitions.iter().map(|p| p.number).collect::<Vec<_>>(), [1, 2, 3]);
    told(&found, "overlaps partition 1");
    told(&found, "past the disk's end");
    assert_eq!(found.partitions[1].size, u64::from(u32::MAX) * 512);
    let place = found.place(Some(2)).unwrap();
    assert_eq!(place, 2 * MIB..64 * MIB);
    assert!(found.place(Some(4)).unwrap_err().to_string().contains("no partition 4"));
    assert!(found.place(None).is_err());
}

#[test]
fn a_gpt_may_say_whatever_it_likes() {
    // 128 entries of 4 KiB, numbers up to 2^64, the end before the start.
    let (file, disk) = disk(64);
    gpt(
        &*file,
        128,
        4096,
        &[
            (2048, 4095),
            (u64::MAX, u64::MAX),
            (10, 5),
            (1 << 50, 1 << 52),
            (5000, u64::MAX - 1),
            (6000, 1 << 40),
        ],
    );
    let found = volumes(&disk).unwrap();
    assert_eq!(found.table.as_ref().unwrap().copy, Some(Copy::Primary));
    let numbers: Vec<_> = found.partitions.iter().map(|partition| partition.number).collect();
    assert_eq!(numbers, [1, 4, 6]);
    for words in ["partition 2 begins", "partition 3 begins", "partition 5 begins"] {
        told(&found, words);
    }
    told(&found, "begins past the end of the disk");
    // More than any real one, with sums that are right.
    for (count, size) in [(2000, 128), (8, 8192), (1024, 4104)] {
        let (file, disk) = self::disk(64);
        gpt(&*file, count, size, &[(20_480, 30_000)]);
        let found = volumes(&disk).unwrap();
        assert_eq!((found.partitions.len(), found.table.as_ref().unwrap().copy), (0, None));
        told(&found, "more or larger entries");
    }
}

#[test]
fn a_damaged_gpt_is_read_from_the_copy_that_is_left() {
    let part = [(2048, 65_535)];
    let (file, disk) = disk(64);
    gpt(&*file, 128, 128, &part);
    assert!(volumes(&disk).unwrap().warnings.is_empty());
    file.write_at(512 + 60, &[1]).unwrap();
    let found = volumes(&disk).unwrap();
    assert_eq!(
        (found.table.as_ref().unwrap().copy, found.partitions.len()),
        (Some(Copy::Backup), 1)
    );
    told(&found, "first copy of the GPT is damaged: its checksum is wrong");
    file.write_at(64 * MIB - 512 + 60, &[1]).unwrap();
    let found = volumes(&disk).unwrap();
    assert_eq!((found.table.as_ref().unwrap().kind, found.partitions.len()), (TableKind::Gpt, 0));
    told(&found, "both copies");

    let (file, disk) = self::disk(64);
    gpt(&*file, 128, 128, &part);
    file.write_at(1024 + 40, &[1]).unwrap();
    told(&volumes(&disk).unwrap(), "the checksum of its entries is wrong");
    let (file, disk) = self::disk(64);
    gpt(&*file, 128, 128, &part);
    file.write_at(64 * MIB - 512, &[0; 512]).unwrap();
    told(&volumes(&disk).unwrap(), "second copy of the GPT is damaged: it is missing");
    // A disk that was made larger.
    let (file, _) = self::disk(64);
    gpt(&*file, 128, 128, &part);
    file.set_len(65 * MIB).unwrap();
    let found = volumes(&flat::raw(file, 512).unwrap()).unwrap();
    told(&found, "not at the disk's end");
    assert_eq!(found.partitions.len(), 1);
}

#[test]
fn a_bare_ext4_under_a_stray_gpt_is_found() {
    if !have("mkfs.ext4") || !have("sfdisk") {
        return;
    }
    let dir = common::folder();
    let path = dir.path().join("wsl");
    // The table takes the place of the first superblock; the copy of group 1 is at 128 MiB.
    for (block, at) in [("4096", "0x8000000"), ("1024", "0x800400")] {
        std::fs::File::create(&path).unwrap().set_len(200 << 20).unwrap();
        let mut mkfs = Command::new("mkfs.ext4");
        mkfs.args(["-qFL", "wsl", "-b", block]).arg(&path).stdin(Stdio::null());
        common::tools::run(&mut mkfs);
        let script = "label: gpt\nfirst-lba: 34\nstart=34, size=32734, type=E3C9E316-0B5C-4DB8-817D-F92DF00215AE\n";
        sfdisk(&path, script);
        let found = crate::look(&path, 512);
        assert_eq!(found.partitions.len(), 1);
        let content = found.content.as_ref().unwrap();
        assert_eq!((content.type_name, content.label.as_deref()), (Some("ext4"), Some("wsl")));
        told(&found, &format!("the copy at {at} tells of it"));
        told(&found, "where the disk has a partition table");
    }
}

#[test]
fn the_remains_of_an_old_ext4_inside_a_partition_are_no_file_system() {
    if !have("mkfs.ext4") || !have("sfdisk") {
        return;
    }
    let dir = common::folder();
    let (path, part) = (dir.path().join("disk"), dir.path().join("part"));
    let mkfs = |path: &Path, mib: u64, program: &str, args: &[&str]| {
        std::fs::File::create(path).unwrap().set_len(mib << 20).unwrap();
        common::tools::run(Command::new(program).args(args).arg(path).stdin(Stdio::null()));
    };
    mkfs(&path, 200, "mkfs.ext4", &["-qF"]);
    sfdisk(&path, "label: gpt\nstart=2048\n");
    mkfs(&part, 190, "mkfs.ext4", &["-qF", "-Enodiscard", "-L", "new"]);
    // Only what the new file system wrote lies over the old one.
    let new = std::fs::read(&part).unwrap();
    let disk = std::fs::File::options().write(true).open(&path).unwrap();
    for (at, block) in (0..).step_by(4096).zip(new.chunks(4096)) {
        if block.iter().any(|byte| *byte != 0) {
            std::os::unix::fs::FileExt::write_all_at(&disk, block, MIB + at).unwrap();
        }
    }
    let found = crate::look(&path, 512);
    assert_eq!(found.content, None);
    assert_eq!(found.partitions[0].content.as_ref().unwrap().label.as_deref(), Some("new"));
}

#[test]
fn nothing_readable_at_the_start_costs_nothing_but_itself() {
    let (_, disk) = disk(1);
    let found = volumes(&disk).unwrap();
    assert_eq!((found.content.unwrap().kind, found.table.is_none()), (Kind::Empty, true));
    let tiny = flat::raw(MemoryFile::new("/tiny", &[0xff; 512]), 512).unwrap();
    let content = volumes(&tiny).unwrap().content.unwrap();
    assert_eq!((content.kind, content.head.as_deref()), (Kind::Unknown, Some(&*"ff".repeat(16))));
    let none = flat::raw(MemoryFile::new("/none", &[]), 512).unwrap();
    assert!(volumes(&none).unwrap().content.is_none());
}

/// Structures at their places with random fields: whatever they say, looking ends, and does not panic.
#[test]
fn random_structures_are_looked_at_in_bounded_time() {
    let mut random = fastrand::Rng::with_seed(common::seed());
    let magics: [(u64, &[u8]); 18] = [
        (510, &[0x55, 0xaa]),
        (0, &[0xeb, 0x58, 0x90]),
        (3, b"NTFS    "),
        (3, b"EXFAT   "),
        (1024 + 0x38, &[0x53, 0xef]),
        (0, b"XFSB"),
        (0x10040, b"_BHRfS_M"),
        (512, b"LABELONE"),
        (0, b"LUKS\xba\xbe"),
        (4096, &[0xfc, 0x4e, 0x2b, 0xa9, 1, 0, 0, 0]),
        (4086, b"SWAPSPACE2"),
        (0x8000, b"\x01CD001"),
        (1024, b"H+"),
        (1024, b"BD"),
        (32, b"NXSB"),
        (1024, &[0x10, 0x20, 0xf5, 0xf2]),
        (0, b"hsqs"),
        (1024, &[0xe2, 0xe1, 0xf5, 0xe0]),
    ];
    for _ in 0..2000 {
        let (file, disk) = disk(1 + random.u64(..3));
        let mut noise = vec![0; 8192];
        // Small numbers make sense more often.
        noise
            .iter_mut()
            .for_each(|byte| *byte = if random.bool() { random.u8(..) } else { random.u8(..3) });
        file.write_at(0, &noise).unwrap();
        for (at, magic) in magics {
            if random.u8(..4) == 0 {
                file.write_at(at, magic).unwrap();
            }
        }
        if random.bool() {
            let parts: Vec<_> = (0..8).map(|_| (random.u64(..8192), random.u64(..8192))).collect();
            gpt(&*file, 128, 128, &parts);
        }
        let found = with_usage(&disk).unwrap();
        assert!(found.partitions.len() <= 1024 + 260);
    }
}
