//! Disks made by the programs that make disks.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::tools::{have, run};

/// A disk, and how it is made. `make` tells whether its programs were there.
pub struct Made {
    pub name: &'static str,
    pub sector: u32,
    /// Whether nothing is wrong with its table.
    pub sound: bool,
    pub make: fn(&Path) -> bool,
}

const fn made(name: &'static str, make: fn(&Path) -> bool) -> Made {
    Made { name, sector: 512, sound: true, make }
}

pub const MADE: [Made; 31] = [
    made("ext2", |p| mkfs(p, 16, &["mkfs.ext2", "-q", "-L", "two"])),
    made("ext3", |p| mkfs(p, 16, &["mkfs.ext3", "-q", "-L", "three"])),
    made("ext4", |p| mkfs(p, 64, &["mkfs.ext4", "-q", "-L", "a longer label 4"])),
    made("ext4-64bit-4k", |p| mkfs(p, 64, &["mkfs.ext4", "-q", "-b4096", "-O64bit,metadata_csum"])),
    made("xfs", |p| mkfs(p, 320, &["mkfs.xfs", "-q", "-L", "xfslabel"])),
    made("btrfs", |p| mkfs(p, 120, &["mkfs.btrfs", "-q", "-L", "butter"])),
    made("ntfs", |p| mkfs(p, 16, &["mkfs.ntfs", "-Fqf", "-L", "Daten"])),
    made("ntfs-large-clusters", |p| {
        mkfs(p, 64, &["mkfs.ntfs", "-Fqf", "-c", "65536", "-L", "big"])
    }),
    made("fat12", |p| mkfs(p, 4, &["mkfs.vfat", "-F12", "-n", "TWELVE"])),
    made("fat16", |p| mkfs(p, 32, &["mkfs.vfat", "-F16", "-n", "SIXTEEN"])),
    made("fat32", |p| mkfs(p, 64, &["mkfs.vfat", "-F32", "-n", "THIRTYTWO"])),
    made("fat-unnamed", |p| mkfs(p, 32, &["mkfs.vfat"])),
    made("exfat", |p| mkfs(p, 16, &["mkfs.exfat", "-L", "ex"])),
    made("swap", |p| mkfs(p, 8, &["mkswap", "-L", "memory"])),
    made("f2fs", |p| mkfs(p, 64, &["mkfs.f2fs", "-q", "-l", "flash"])),
    made("lvm", lvm),
    made("raid-1.0", |p| raid(p, (16 << 20) - 0x2000)),
    made("raid-1.1", |p| raid(p, 0)),
    made("raid-1.2", |p| raid(p, 4096)),
    made("bitlocker", bitlocker),
    made("luks1", |p| luks(p, "luks1")),
    made("luks2", |p| luks(p, "luks2")),
    made("erofs", |p| packed(p, "mkfs.erofs", |to, from| vec![to, from])),
    made("squashfs", |p| packed(p, "mksquashfs", |to, from| vec![from, to, "-no-progress".into()])),
    made("iso9660", |p| {
        packed(p, "genisoimage", |to, from| {
            ["-quiet", "-V", "DISC LABEL", "-o"]
                .map(str::to_owned)
                .into_iter()
                .chain([to, from])
                .collect()
        })
    }),
    made("mbr", |p| table(p, MBR, &[(1, 32, VFAT), (33, 31, EXT4)])),
    made("logical", |p| table(p, LOGICAL, &[(1, 16, EXT4), (21, 16, NTFS), (41, 8, SWAP)])),
    made("gpt", |p| table(p, GPT, &[(1, 33, VFAT), (34, 50, EXT4)])),
    Made { sector: 4096, ..made("gpt-4096", large_sectors) },
    Made { sound: false, ..made("hybrid", hybrid) },
    made("empty", |p| sized(p, 8)),
];

const VFAT: &[&str] = &["mkfs.vfat", "-n", "EFI"];
const EXT4: &[&str] = &["mkfs.ext4", "-q", "-L", "root"];
const NTFS: &[&str] = &["mkfs.ntfs", "-Fqf", "-L", "data"];
const SWAP: &[&str] = &["mkswap"];
const MBR: &str = "label: dos\nlabel-id: 0x1badcafe\nsize=32M, type=c, bootable, start=1M\ntype=83";
const LOGICAL: &str = "label: dos\nstart=1M, size=16M, type=83\nstart=20M, size=60M, type=f\n\
    start=21M, size=16M, type=7\nstart=41M, size=8M, type=82\n";
const GPT: &str = "label: gpt\nstart=1M, size=33M, type=U, name=\"boot\"\n\
    start=34M, size=50M, type=L, name=\"Würzel\", attrs=\"RequiredPartition\"\n";

fn sized(path: &Path, mib: u64) -> bool {
    File::create(path).unwrap().set_len(mib << 20).unwrap();
    true
}

/// Runs a program on a new file.
fn mkfs(path: &Path, mib: u64, command: &[&str]) -> bool {
    if !have(command[0]) {
        return false;
    }
    sized(path, mib);
    run(Command::new(command[0]).args(&command[1..]).arg(path).stdin(Stdio::null()));
    true
}

fn luks(path: &Path, kind: &str) -> bool {
    if !have("cryptsetup") {
        return false;
    }
    sized(path, 24);
    let key = path.with_extension("key");
    std::fs::write(&key, "secret").unwrap();
    let mut command = Command::new("cryptsetup");
    command.args(["-q", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", "luksFormat", "--type"]);
    command.arg(kind).arg(path).arg(&key);
    run(&mut command);
    if kind == "luks2" {
        run(Command::new("cryptsetup").args(["config", "--label", "vault"]).arg(path));
    }
    true
}

/// Runs a program that packs a folder into a new file.
fn packed(path: &Path, program: &str, arguments: fn(String, String) -> Vec<String>) -> bool {
    if !have(program) {
        return false;
    }
    let from = path.with_extension("d");
    std::fs::create_dir(&from).unwrap();
    std::fs::write(from.join("file"), vec![b'x'; 100_000]).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    run(Command::new(program).args(arguments(text(path), text(&from))));
    true
}

/// A disk of 96 MiB with a table by sfdisk, and file systems at places given in MiB.
fn table(path: &Path, script: &str, parts: &[(u64, u64, &[&str])]) -> bool {
    if !have("sfdisk") || !parts.iter().all(|(_, _, command)| have(command[0])) {
        return false;
    }
    sized(path, 96);
    let parts = parts.iter().map(|(start, size, command)| (*start, *size, *command));
    for (number, (start, size, command)) in parts.enumerate() {
        let part = path.with_extension(format!("part{number}"));
        mkfs(&part, size, command);
        let bytes = std::fs::read(&part).unwrap();
        std::os::unix::fs::FileExt::write_all_at(
            &File::options().write(true).open(path).unwrap(),
            &bytes,
            start << 20,
        )
        .unwrap();
        std::fs::remove_file(&part).unwrap();
    }
    sfdisk(path, script);
    true
}

/// Writes a partition table.
pub fn sfdisk(path: &Path, script: &str) {
    let mut command = Command::new("sfdisk");
    command.args(["-q", "--wipe=never", "--no-reread", "--no-tell-kernel"]).arg(path);
    feed(&mut command, script);
}

/// Runs a program that reads what to do.
fn feed(command: &mut Command, script: &str) {
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), script.as_bytes()).unwrap();
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// sfdisk counts sectors of files as 512 bytes always, fdisk as it is told.
fn large_sectors(path: &Path) -> bool {
    if !have("fdisk") || !table(path, "label: dos\n", &[(21, 50, EXT4)]) {
        return false;
    }
    let mut fdisk = Command::new("fdisk");
    feed(fdisk.args(["-b4096", "-wnever"]).arg(path), "g\nn\n1\n\n+20M\nn\n2\n\n\nw\n");
    true
}

/// A physical volume: its label, and the header with id and size. pvcreate takes devices only.
fn lvm(path: &Path) -> bool {
    sized(path, 16);
    let mut label = [0; 512];
    label[..8].copy_from_slice(b"LABELONE");
    label[8] = 1;
    label[20] = 32;
    label[24..32].copy_from_slice(b"LVM2 001");
    label[32..64].copy_from_slice(b"abcdefghijklmnopqrstuvwxyzABCDEF");
    label[64..72].copy_from_slice(&(16u64 << 20).to_le_bytes());
    let sum = label[20..].iter().fold(0xf597_a6cf_u32, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ (0xedb8_8320 * (sum & 1)))
    });
    label[16..20].copy_from_slice(&sum.to_le_bytes());
    put(path, 512, &label);
    true
}

fn put(path: &Path, at: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, bytes, at).unwrap();
}

/// A member of a RAID with its superblock at a place. mdadm takes devices only.
fn raid(path: &Path, at: u64) -> bool {
    sized(path, 16);
    let mut block = [0; 256];
    block[..8].copy_from_slice(&[0xfc, 0x4e, 0x2b, 0xa9, 1, 0, 0, 0]);
    block[16..32].copy_from_slice(&std::array::from_fn::<u8, 16, _>(|at| at as u8 + 1));
    block[32..41].copy_from_slice(b"host:raid");
    (block[72], block[92]) = (1, 2);
    for (place, number) in [(128, 2048), (136, (16 << 11) - 2048), (144, at / 512)] {
        block[place..place + 8].copy_from_slice(&u64::to_le_bytes(number));
    }
    let words = block.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap()));
    let sum: u64 = words.map(u64::from).sum();
    let sum = (sum & u64::from(u32::MAX)) + (sum >> 32);
    block[216..220].copy_from_slice(&(sum as u32).to_le_bytes());
    put(path, at, &block);
    true
}

/// The boot sector of a volume that Windows has encrypted, and the three blocks that it names.
fn bitlocker(path: &Path) -> bool {
    sized(path, 16);
    let mut sector = [0; 512];
    sector[..11].copy_from_slice(b"\xeb\x58\x90-FVE-FS-");
    sector[11..14].copy_from_slice(&[0, 2, 8]);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    for (number, place) in (1..4u64).zip([176, 184, 192]) {
        sector[place..place + 8].copy_from_slice(&(number << 20).to_le_bytes());
        put(path, number << 20, b"-FVE-FS-\x64\0\x02\0");
    }
    put(path, 0, &sector);
    true
}

fn hybrid(path: &Path) -> bool {
    if !have("sgdisk") || !table(path, GPT, &[(34, 50, EXT4)]) {
        return false;
    }
    run(Command::new("sgdisk").args(["--hybrid", "1"]).arg(path));
    true
}
