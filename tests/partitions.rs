//! Partitions as files of their own (`-o partitions`): what they show, who may write, and what the
//! other files see of it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::FallocateFlags;
use nix::unistd::{Whence, lseek};

use live::{
    Loop, Mount, MountedFs, create, flatdisk, have, names, outcome, scratch, succeed, wait_until,
};

const MIB: u64 = 1 << 20;

/// Where the table of [`TABLE`] puts its partitions, in MiB.
const FIRST: (u64, u64) = (1, 24);
const SECOND: (u64, u64) = (25, 30);

/// Two partitions side by side, and room after them.
const TABLE: &str = "label: gpt\n\
    start=2048, size=49152, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4, name=\"first one\"\n\
    start=51200, size=61440, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4\n";

/// Writes a partition table.
fn partition(disk: &Path, table: &str) {
    let mut sfdisk = Command::new("sfdisk");
    sfdisk.args(["-q", "--no-reread", "--no-tell-kernel"]).arg(disk);
    let mut child = sfdisk.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(table.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}

/// A folder with a partitioned image, mounted with partitions.
struct Setup {
    mount: Mount,
    folder: tempfile::TempDir,
    image: &'static str,
}

impl Setup {
    fn new(image: &'static str, create_options: &[&str], mount_options: &[&str]) -> Option<Self> {
        if !live::can_mount() || !have(&["sfdisk"]) {
            return None;
        }
        let folder = scratch();
        create(&folder.path().join(image), "64M", create_options);
        let options = [&["--partitions"], mount_options].concat();
        let mount = Mount::new(folder.path(), &options);
        partition(&mount.flat(image), TABLE);
        let setup = Self { mount, folder, image };
        wait_until("the partitions show", || setup.part(2).exists());
        Some(setup)
    }

    fn whole(&self) -> PathBuf {
        self.mount.flat(self.image)
    }

    fn part(&self, number: u32) -> PathBuf {
        self.mount.flat(&format!("{}.p{number}", self.image))
    }

    /// Unmounts; the image must be without fault.
    fn end(self) {
        assert!(self.mount.unmount().success());
        succeed(flatdisk().arg("check").arg(self.folder.path().join(self.image)));
    }
}

fn read(path: &Path) -> File {
    File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Opens for writing. Of a file that was closed just now the kernel tells a moment later.
fn write(path: &Path) -> File {
    let mut opened = None;
    wait_until("the file can be opened", || match open_to_write(path) {
        Ok(file) => opened.insert(file).metadata().is_ok(),
        Err(e) => {
            assert_eq!(e.kind(), ErrorKind::ResourceBusy, "{}", path.display());
            false
        }
    });
    opened.unwrap()
}

fn open_to_write(path: &Path) -> std::io::Result<File> {
    File::options().read(true).write(true).open(path)
}

fn busy(path: &Path) -> bool {
    open_to_write(path).is_err_and(|e| e.kind() == ErrorKind::ResourceBusy)
}

fn bytes(file: &File, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, at).unwrap();
    bytes
}

#[test]
fn partitions_show_beside_their_disk() {
    let Some(setup) = Setup::new("disk.vhdx", &[], &[]) else { return };
    let expected = ["disk.vhdx.img", "disk.vhdx.p1.img", "disk.vhdx.p2.img"];
    wait_until("they are listed", || names(setup.mount.path()) == expected);
    let size = |path: PathBuf| fs::metadata(path).unwrap().len();
    assert_eq!((size(setup.part(1)), size(setup.part(2))), (FIRST.1 * MIB, SECOND.1 * MIB));
    assert!(fs::metadata(setup.part(1)).unwrap().blocks() > 0);
    for name in ["disk.vhdx.p3.img", "disk.vhdx.p0.img", "disk.vhdx.p01.img", "disk.vhdx.p1"] {
        assert!(!setup.mount.path().join(name).exists(), "{name}");
    }
    if have(&["getfattr"]) {
        let xattr = |name: &str| {
            let mut getfattr = Command::new("getfattr");
            succeed(
                getfattr.args(["--only-values", "--absolute-names", "-n", name]).arg(setup.part(1)),
            )
        };
        let part: serde_json::Value =
            serde_json::from_str(&xattr("user.flatdisk.partition")).unwrap();
        assert_eq!((&part["number"], &part["name"]), (&1.into(), &"first one".into()));
        assert_eq!((&part["offset"], &part["size"]), (&MIB.into(), &(FIRST.1 * MIB).into()));
        assert_eq!(part["type"], "0fc63daf-8483-4772-8e79-3d69d8477de4");
        assert_eq!(xattr("user.flatdisk.format"), "vhdx");
    }
    // To every command it is a raw disk, and never stands for its image.
    let hash = succeed(flatdisk().arg("hash").arg(setup.part(2)));
    assert!(hash.contains(&live::sha256(&setup.part(2))), "{hash}");
    let error = fs::remove_file(setup.part(1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnlyFilesystem);
    setup.end();
}

#[test]
fn reads_and_writes_stay_inside_the_partition() {
    for (image, options) in
        [("disk.vhd", &[][..]), ("disk.vmdk", &["--subformat", "monolithicFlat"])]
    {
        let Some(setup) = Setup::new(image, options, &[]) else { return };
        let all = vec![0x5a; (64 - 4) << 20];
        write(&setup.whole()).write_all_at(&all, 2 * MIB).unwrap();
        let first = write(&setup.part(1));
        let size = FIRST.1 * MIB;
        // The last bytes, and a try to go on behind them.
        assert_eq!(first.write_at(&[1; 4096], size - 3).unwrap(), 3);
        let behind = first.write_at(&[1], size).unwrap_err();
        assert_eq!(behind.kind(), ErrorKind::StorageFull);
        first.write_all_at(&[2], 0).unwrap();
        assert_eq!(first.read_at(&mut [0; 64], size - 3).unwrap(), 3);
        assert_eq!(first.read_at(&mut [0; 64], size).unwrap(), 0);
        assert_eq!(first.set_len(size + 1).unwrap_err().raw_os_error(), Some(libc::EPERM));
        // Holes beyond the end are cut at it.
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let holes = |at: u64, len: u64| nix::fcntl::fallocate(&first, punch, at as i64, len as i64);
        holes(size - MIB, 16 * MIB).unwrap();
        drop(first);
        let whole = read(&setup.whole());
        let end = (FIRST.0 + FIRST.1) * MIB;
        assert_eq!(bytes(&whole, end - MIB, MIB as usize), vec![0; MIB as usize]);
        assert_eq!(bytes(&whole, end, MIB as usize), vec![0x5a; MIB as usize]);
        assert_eq!(bytes(&whole, FIRST.0 * MIB - 1, 2), [0, 2]);
        assert_eq!(bytes(&read(&setup.part(2)), 0, 2), [0x5a; 2]);
        drop(whole);
        setup.end();
    }
}

#[test]
fn holes_and_data_are_those_of_the_partition() {
    let Some(setup) = Setup::new("disk.vhdx", &["--block-size", "1M"], &[]) else { return };
    let second = write(&setup.part(2));
    second.write_all_at(&[1; 4096], 7 * MIB).unwrap();
    let seek = |file: &File, at: u64, whence| lseek(file, at as i64, whence).map(|at| at as u64);
    let data = seek(&second, 0, Whence::SeekData).unwrap();
    assert!((6 * MIB..=7 * MIB).contains(&data), "{data}");
    let hole = seek(&second, 7 * MIB, Whence::SeekHole).unwrap();
    assert!((7 * MIB + 1..=8 * MIB).contains(&hole), "{hole}");
    assert!(seek(&second, 8 * MIB, Whence::SeekData).is_err());
    assert_eq!(seek(&second, 9 * MIB, Whence::SeekHole), Ok(9 * MIB));
    let first = read(&setup.part(1));
    assert!(seek(&first, 0, Whence::SeekData).is_err(), "its neighbour's data");
    drop((first, second));
    setup.end();
}

#[test]
fn whole_disk_and_partitions_are_not_written_at_the_same_time() {
    let Some(setup) = Setup::new("disk.vhdx", &[], &[]) else { return };
    let whole = write(&setup.whole());
    assert!(busy(&setup.part(1)) && busy(&setup.part(2)));
    let _reader = read(&setup.part(1));
    let again = write(&setup.whole());
    drop((whole, again));
    let first = write(&setup.part(1));
    let second = write(&setup.part(2));
    assert!(busy(&setup.whole()));
    let _whole_reader = read(&setup.whole());
    drop(first);
    assert!(busy(&setup.whole()));
    drop(second);
    drop(write(&setup.whole()));
    drop(_reader);
    drop(_whole_reader);
    setup.end();
}

#[test]
fn partitions_that_overlap_are_not_written_at_the_same_time() {
    let Some(setup) = Setup::new("disk.vhdx", &[], &[]) else { return };
    // Made by hand: sfdisk refuses it.
    let mut sector = [0; 512];
    for (at, first, count) in [(446, 2048u32, 4096u32), (462, 4096, 4096), (478, 8192, 4096)] {
        sector[at + 4] = 0x83;
        sector[at + 8..at + 12].copy_from_slice(&first.to_le_bytes());
        sector[at + 12..at + 16].copy_from_slice(&count.to_le_bytes());
    }
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    let whole = write(&setup.whole());
    whole.write_all_at(&vec![0; 64 << 10], 0).unwrap();
    whole.write_all_at(&vec![0; 64 << 10], 64 * MIB - (64 << 10)).unwrap();
    whole.write_all_at(&sector, 0).unwrap();
    drop(whole);
    wait_until("the new table shows", || setup.part(3).exists());
    let first = write(&setup.part(1));
    assert!(busy(&setup.part(2)));
    let third = write(&setup.part(3));
    // What one writes, the other reads.
    let second = read(&setup.part(2));
    assert_eq!(bytes(&second, 0, 1), [0]);
    first.write_all_at(&[9], MIB).unwrap();
    assert_eq!(bytes(&second, 0, 1), [9]);
    drop((first, second, third));
    setup.end();
}

#[test]
fn what_one_file_writes_the_others_read_at_once() {
    let Some(setup) = Setup::new("disk.vhdx", &[], &[]) else { return };
    let (offset, at) = (FIRST.0 * MIB, 5 * MIB);
    let (whole, part) = (read(&setup.whole()), read(&setup.part(1)));
    let second = read(&setup.part(2));
    assert_eq!((bytes(&whole, offset + at, 1), bytes(&part, at, 1)), (vec![0], vec![0]));
    for round in 1..50u8 {
        let writer = write(&setup.part(1));
        writer.write_all_at(&[round; 8192], at).unwrap();
        assert_eq!(bytes(&whole, offset + at + 4096, 1), [round], "the whole disk is behind");
        drop(writer);
        let writer = write(&setup.whole());
        writer.write_all_at(&[round + 100; 8192], offset + at).unwrap();
        assert_eq!(bytes(&part, at + 4096, 1), [round + 100], "the partition is behind");
        assert_eq!(bytes(&second, 0, 1), [0]);
    }
    // Also what the kernel kept of files that nobody has open.
    drop((whole, part, second));
    for round in 1..10u8 {
        write(&setup.part(1)).write_all_at(&[round; 8192], at).unwrap();
        assert_eq!(bytes(&read(&setup.whole()), offset + at, 1), [round]);
        write(&setup.whole()).write_all_at(&[round + 100; 8192], offset + at).unwrap();
        assert_eq!(bytes(&read(&setup.part(1)), at, 1), [round + 100]);
    }
    setup.end();
}

#[test]
fn readers_of_the_whole_disk_never_read_old_bytes_while_a_partition_is_written() {
    let Some(setup) = Setup::new("disk.vhdx", &[], &[]) else { return };
    let whole = read(&setup.whole());
    let part = write(&setup.part(2));
    let over = AtomicBool::new(false);
    let at = 3 * MIB;
    std::thread::scope(|scope| {
        // Keeps the kernel busy fetching the very page that is written.
        let reader = scope.spawn(|| {
            let mut last = 0;
            while !over.load(Ordering::SeqCst) {
                let now = bytes(&whole, SECOND.0 * MIB + at, 4);
                let now = u32::from_le_bytes(now.try_into().unwrap());
                assert!(now >= last, "{now} after {last}");
                last = now;
            }
        });
        for round in 1..500u32 {
            part.write_all_at(&round.to_le_bytes(), at).unwrap();
            let seen = bytes(&whole, SECOND.0 * MIB + at, 4);
            assert_eq!(seen, round.to_le_bytes());
        }
        over.store(true, Ordering::SeqCst);
        reader.join().unwrap();
    });
    drop((whole, part));
    setup.end();
}

#[test]
fn writers_exclude_each_other_under_load() {
    let Some(setup) = Setup::new("disk.vhdx", &[], &[]) else { return };
    let (wholes, parts) =
        (AtomicBool::new(false), [AtomicBool::new(false), AtomicBool::new(false)]);
    let work = |path: PathBuf, own: &AtomicBool, others: &[&AtomicBool], marker: u8| {
        let mut times = 0;
        while times < 40 {
            match open_to_write(&path) {
                Ok(file) => {
                    own.store(true, Ordering::SeqCst);
                    assert!(others.iter().all(|other| !other.load(Ordering::SeqCst)));
                    file.write_all_at(&[marker; 512], 2 * MIB).unwrap();
                    assert!(others.iter().all(|other| !other.load(Ordering::SeqCst)));
                    own.store(false, Ordering::SeqCst);
                    times += 1;
                }
                Err(e) => {
                    assert_eq!(e.kind(), ErrorKind::ResourceBusy);
                    std::thread::yield_now();
                }
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| work(setup.whole(), &wholes, &[&parts[0], &parts[1]], 1));
        scope.spawn(|| work(setup.part(1), &parts[0], &[&wholes], 2));
        scope.spawn(|| work(setup.part(2), &parts[1], &[&wholes], 3));
    });
    setup.end();
}

#[test]
fn the_table_is_read_again_when_nobody_has_a_partition_open() {
    let Some(setup) = Setup::new("disk.vhdx", &[], &[]) else { return };
    let other = TABLE.replace("size=49152", "size=40960");
    // Held open by somebody who writes the whole disk.
    let whole = write(&setup.whole());
    let part = read(&setup.part(1));
    partition(&setup.whole(), &other);
    std::thread::sleep(std::time::Duration::from_millis(2100));
    assert_eq!(fs::metadata(setup.part(1)).unwrap().len(), FIRST.1 * MIB);
    assert_eq!(part.metadata().unwrap().len(), FIRST.1 * MIB);
    drop(part);
    let size = || read(&setup.part(1)).metadata().unwrap().len();
    wait_until("the new size shows", || size() == 20 * MIB);
    partition(&setup.whole(), "label: dos\n2048,2048\n");
    let listed = ["disk.vhdx.img", "disk.vhdx.p1.img"];
    wait_until("one partition is left", || names(setup.mount.path()) == listed && size() == MIB);
    drop(whole);
    setup.end();
}

#[test]
fn file_systems_live_in_partition_files() {
    if !have(&["mkfs.ext4", "fstrim", "sfdisk"]) {
        return;
    }
    let Some(setup) = Setup::new("disk.vhdx", &["--block-size", "1M"], &[]) else { return };
    let allocated = || fs::metadata(setup.folder.path().join(setup.image)).unwrap().blocks() * 512;
    succeed(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(setup.part(1)));
    succeed(Command::new("mkfs.ext4").args(["-q", "-F", "-E", "nodiscard"]).arg(setup.part(2)));
    for number in [1, 2] {
        let device = Loop::new(&setup.part(number), &[]);
        let mounted = MountedFs::new(&device.device, &[]);
        fs::write(mounted.path().join("file"), vec![number as u8; 12 << 20]).unwrap();
        succeed(Command::new("sync").arg("-f").arg(mounted.path()));
        let before = allocated();
        fs::remove_file(mounted.path().join("file")).unwrap();
        fs::write(mounted.path().join("kept"), [number as u8; 10]).unwrap();
        // Freed is what the journal has let go.
        succeed(Command::new("sync").arg("-f").arg(mounted.path()));
        succeed(Command::new("fstrim").arg(mounted.path()));
        succeed(Command::new("sync").arg("-f").arg(mounted.path()));
        wait_until("the space is given back", || allocated() + (9 << 20) < before);
        mounted.unmount();
    }
    for number in [1, 2] {
        succeed(Command::new("e2fsck").arg("-fn").arg(setup.part(number)));
    }
    // The same file systems are on the whole disk.
    let Setup { mount, folder, image } = setup;
    assert!(mount.unmount().success());
    let root = format!("{}:2/", folder.path().join(image).display());
    let listed = succeed(flatdisk().arg("ls").arg(root));
    assert!(listed.contains("kept"), "{listed}");
}

#[test]
fn fuse2fs_and_ntfs_3g_need_no_offset() {
    if !have(&["mkfs.ext4", "mkfs.ntfs", "fuse2fs", "ntfs-3g"]) {
        return;
    }
    let Some(setup) = Setup::new("disk.vhd", &[], &[]) else { return };
    succeed(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(setup.part(1)));
    succeed(Command::new("mkfs.ntfs").args(["-q", "-f", "-F"]).arg(setup.part(2)));
    for (program, number) in [("fuse2fs", 1), ("ntfs-3g", 2)] {
        let dir = scratch();
        succeed(Command::new(program).arg(setup.part(number)).arg(dir.path()));
        fs::write(dir.path().join("hello"), program).unwrap();
        assert!(busy(&setup.whole()));
        succeed(Command::new("umount").arg(dir.path()));
    }
    for (program, number) in [("fuse2fs", 1), ("ntfs-3g", 2)] {
        let file = format!("{}:{number}/hello", setup.folder.path().join(setup.image).display());
        let mut said = String::new();
        wait_until("the file is in the image", || {
            said =
                String::from_utf8_lossy(&outcome(flatdisk().arg("cat").arg(&file)).stdout).into();
            !said.is_empty()
        });
        assert_eq!(said, program);
    }
    setup.end();
}

#[test]
fn a_partition_file_passes_fsx() {
    if !have(&["fsx"]) {
        return;
    }
    let operations = std::env::var("FLATDISK_FSX_OPS").unwrap_or_else(|_| "3000".to_owned());
    let Some(setup) = Setup::new("disk.vhdx", &["--block-size", "1M"], &[]) else { return };
    let config = setup.folder.path().join("fsx.toml");
    let size = FIRST.1 * MIB;
    fs::write(
        &config,
        format!(
            "flen = {size}\nnosizechecks = true\nblockmode = true\n\
             [opsize]\nalign = 1\nmax = 65536\n\
             [weights]\ntruncate = 0\nposix_fallocate = 0\ninvalidate = 1\nfsync = 0.5\n\
             fdatasync = 0.5\npunch_hole = 3\nmapread = 5\nmapwrite = 5\nread = 10\nwrite = 10\n\
             sendfile = 0\ncopy_file_range = 0\n"
        ),
    )
    .unwrap();
    let mut fsx = Command::new("fsx");
    fsx.args(["-q", "-N", &operations, "-S", "7", "-f"]).arg(&config);
    succeed(fsx.arg("-P").arg(setup.folder.path()).arg(setup.part(1)));
    // Nothing of it reached the neighbour.
    assert!(bytes(&read(&setup.part(2)), 0, (4 * MIB) as usize).iter().all(|byte| *byte == 0));
    setup.end();
}

#[test]
fn whole_files_are_restored_onto_a_partition() {
    let Some(setup) = Setup::new("disk.vhdx", &[], &[]) else { return };
    write(&setup.part(1)).write_all_at(&[7; 1 << 20], 0).unwrap();
    let source = setup.folder.path().join("raw");
    let file = File::create(&source).unwrap();
    file.set_len(FIRST.1 * MIB).unwrap();
    file.write_all_at(&[1; 4096], 512 << 10).unwrap();
    drop(file);
    succeed(Command::new("cp").arg(&source).arg(setup.part(1)));
    assert_eq!(live::sha256(&source), live::sha256(&setup.part(1)));
    setup.end();
}

#[test]
fn large_folders_open_no_image_for_a_listing() {
    if !live::can_mount() || !have(&["sfdisk"]) {
        return;
    }
    let folder = scratch();
    let first = folder.path().join("0000.vhdx");
    create(&first, "64M", &[]);
    let mount = Mount::new(&first, &[]);
    partition(&mount.flat("0000.vhdx"), TABLE);
    assert!(mount.unmount().success());
    for number in 1..300 {
        fs::copy(&first, folder.path().join(format!("{number:04}.vhdx"))).unwrap();
    }
    let mount = Mount::new(folder.path(), &["--partitions"]);
    assert_eq!(names(mount.path()).len(), 300);
    wait_until("a name of a partition is found", || mount.flat("0007.vhdx.p1").exists());
    wait_until("it is listed", || names(mount.path()).len() == 302);
    assert!(mount.unmount().success());
}

#[test]
fn open_shows_the_partitions_of_one_image() {
    if !live::can_mount() || !have(&["sfdisk"]) {
        return;
    }
    let folder = scratch();
    for (image, options) in [("a.vhdx", &[][..]), ("flat.vmdk", &["--subformat", "monolithicFlat"])]
    {
        create(&folder.path().join(image), "64M", options);
    }
    let empty = scratch();
    let mount = Mount::new(empty.path(), &[]);
    let image = folder.path().join("flat.vmdk");
    succeed(flatdisk().arg("open").arg(&image).arg(mount.path()));
    // The kernel may write this one by itself, and has it open while the partitions appear.
    let whole = write(&mount.flat("flat.vmdk"));
    partition(&mount.flat("flat.vmdk"), TABLE);
    let open = |image: &Path| {
        succeed(flatdisk().args(["open", "--partitions"]).arg(image).arg(mount.path()))
    };
    let said = open(&image);
    assert_eq!(said.lines().count(), 3, "{said}");
    let part = read(&mount.flat("flat.vmdk.p2"));
    for round in 1..20u8 {
        whole.write_all_at(&[round], SECOND.0 * MIB).unwrap();
        assert_eq!(bytes(&part, 0, 1), [round]);
    }
    drop((part, whole));
    let part = write(&mount.flat("flat.vmdk.p2"));
    let whole = read(&mount.flat("flat.vmdk"));
    for round in 1..20u8 {
        part.write_all_at(&[round], 0).unwrap();
        assert_eq!(bytes(&whole, SECOND.0 * MIB, 1), [round]);
    }
    drop((part, whole));
    open(&folder.path().join("a.vhdx"));
    let expected = ["a.vhdx.img", "flat.vmdk.img", "flat.vmdk.p1.img", "flat.vmdk.p2.img"];
    assert_eq!(names(mount.path()), expected);
    assert!(mount.unmount().success());
}

#[test]
fn throw_away_layers_have_partitions_of_their_own() {
    if !live::can_mount() || !have(&["sfdisk"]) {
        return;
    }
    let folder = scratch();
    create(&folder.path().join("disk.vhdx"), "64M", &[]);
    let mount = Mount::new(folder.path(), &["--partitions", "--nonpersistent"]);
    partition(&mount.flat("disk.vhdx"), TABLE);
    let part = mount.flat("disk.vhdx.p1");
    wait_until("the partition shows", || part.exists());
    write(&part).write_all_at(&[1; 100], 0).unwrap();
    assert_eq!(bytes(&read(&mount.flat("disk.vhdx")), FIRST.0 * MIB, 100), [1; 100]);
    assert!(mount.unmount().success());
    let volumes =
        succeed(flatdisk().args(["volumes", "--json"]).arg(folder.path().join("disk.vhdx")));
    assert!(volumes.contains("\"table\": null"), "{volumes}");
}

/// The kernel makes a node of 1 KiB of an extended partition, for boot loaders; what is of use are those in it.
#[test]
fn logical_partitions_show_and_the_extended_one_around_them_does_not() {
    let Some(setup) = Setup::new("disk.vhdx", &[], &[]) else { return };
    partition(
        &setup.whole(),
        "label: dos\nstart=2048, size=8192, type=83\nstart=16384, size=81920, type=5\n\
         start=18432, size=16384, type=83\nstart=40960, size=16384, type=83\n",
    );
    let expected = ["disk.vhdx.img", "disk.vhdx.p1.img", "disk.vhdx.p5.img", "disk.vhdx.p6.img"];
    wait_until("the new table shows", || names(setup.mount.path()) == expected);
    wait_until("the old name goes", || !setup.part(2).exists());
    write(&setup.part(6)).write_all_at(&[6; 512], 0).unwrap();
    assert_eq!(bytes(&read(&setup.whole()), 20 * MIB, 512), [6; 512]);
    assert_eq!(fs::metadata(setup.part(5)).unwrap().len(), 8 * MIB);
    setup.end();
}
