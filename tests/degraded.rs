//! Images that other programs refuse as a whole for the sake of a part: the rest is there, the part
//! that is lost says so and is listed, and nothing is written.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
mod live;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::{corpus, pattern, tools};
use flatdisk::error::ErrorKind;
use flatdisk::formats::{self, CreateSpec, OpenOptions, Report, Scope};
use flatdisk::storage::file::HostFs;
use flatdisk::storage::memory::{MemoryFile, MemoryHost};
use flatdisk::storage::{Access, Host, Storage};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;

fn path(format: &str) -> PathBuf {
    Path::new("/t/disk").with_extension(format)
}

/// A closed image of 8 MiB, all of it written.
fn full(format: &str, subformat: &str, block: Option<u64>) -> Arc<MemoryHost> {
    let host = MemoryHost::new();
    let spec = CreateSpec {
        subformat: Some(subformat.into()),
        size: SIZE,
        block_size: block,
        ..CreateSpec::default()
    };
    formats::create(formats::by_name(format).unwrap(), &*host, &path(format), &spec).unwrap();
    let dynamic: Arc<dyn Host> = host.clone();
    let options = OpenOptions::new(Access::Write);
    let disk = formats::open(&dynamic, &path(format), &options).unwrap().disk;
    disk.write_at(0, &pattern::bytes(1, 0, SIZE)).unwrap();
    disk.close().unwrap();
    host
}

fn checked(host: &Arc<MemoryHost>, format: &str) -> Report {
    let dynamic: Arc<dyn Host> = host.clone();
    formats::check(&dynamic, &path(format), &OpenOptions::new(Access::Read)).unwrap()
}

/// Everything but `lost` reads as it was written, `lost` is an error and listed by a check, and a
/// write is refused without a change.
fn assert_lost(host: &Arc<MemoryHost>, format: &str, lost: &[(u64, u64)]) {
    let bytes = |host: &MemoryHost| host.files().iter().map(|f| f.to_vec()).collect::<Vec<_>>();
    let before = bytes(host);
    let dynamic: Arc<dyn Host> = host.clone();
    let options = OpenOptions::new(Access::Write);
    let image = formats::open(&dynamic, &path(format), &options).unwrap();
    let mut sector = [0; 512];
    for at in (0..SIZE).step_by(512) {
        let read = image.disk.read_at(at, &mut sector);
        if lost.iter().any(|(start, len)| (*start..start + len).contains(&at)) {
            assert_eq!(read.unwrap_err().kind(), ErrorKind::Corrupt, "{format}: {at:#x}");
        } else {
            read.unwrap_or_else(|e| panic!("{format}: {at:#x}: {e}"));
            assert!(sector == pattern::bytes(1, at, 512)[..], "{format}: other bytes at {at:#x}");
        }
    }
    let found: Vec<_> = image.disk.damage().iter().map(|r| (r.start, r.end - r.start)).collect();
    assert_eq!(found, lost, "{format}: found by reading");
    let report = checked(host, format);
    let listed: Vec<_> = report.damage.iter().map(|d| (d.start, d.length)).collect();
    assert_eq!(listed, lost, "{format}: {:?}", report.findings);
    // Other programs go by the copy of a footer.
    let footers_only = report.findings.iter().all(|found| found.what.contains("footer copy"));
    assert!(report.exit_status() == 2 || lost.is_empty(), "{format}");
    assert!(report.exit_status() == 0 || footers_only || !lost.is_empty(), "{format}");
    if !lost.is_empty() {
        assert!(image.disk.write_at(0, &[7; 512]).is_err(), "{format}: written to");
        assert!(bytes(host) == before, "{format}: changed");
    }
}

/// A repair that may give up what is lost makes that zeroes, leaves all else as it is, and the image
/// takes writes again.
fn assert_given_up(host: &Arc<MemoryHost>, format: &str, lost: &[(u64, u64)]) {
    let host: Arc<dyn Host> = host.fork();
    let options = OpenOptions::new(Access::Write);
    let without = formats::repair(&host, &path(format), &options, Scope::All, false).unwrap();
    assert_eq!(without.after.exit_status(), 2, "{format}: {:?}", without.changes);
    let repair = formats::repair(&host, &path(format), &options, Scope::Lossy, false).unwrap();
    assert_eq!(repair.after.exit_status(), 0, "{format}: {:?}", repair.after.findings);
    let disk = formats::open(&host, &path(format), &options).unwrap().disk;
    let mut expected = pattern::bytes(1, 0, SIZE);
    for (start, len) in lost {
        expected[*start as usize..(start + len) as usize].fill(0);
    }
    let mut found = vec![0; SIZE as usize];
    disk.read_at(0, &mut found).unwrap();
    assert!(found == expected, "{format}: other bytes");
    disk.write_at(lost[0].0, &[7; 4096]).unwrap();
    disk.close().unwrap();
}

/// QEMU does not open it, as long as QEMU is as it was.
fn qemu_refuses(host: &MemoryHost, format: &str) {
    if !tools::have("qemu-img") {
        return;
    }
    let dir = common::folder();
    for file in host.files() {
        std::fs::write(dir.path().join(file.path().file_name().unwrap()), file.to_vec()).unwrap();
    }
    let name = if format == "vhd" { "vpc" } else { format };
    let image = dir.path().join(path(format).file_name().unwrap());
    let output = tools::output(Command::new("qemu-img").args(["info", "-f", name]).arg(image));
    assert!(!output.status.success(), "QEMU opens it: {}", tools::both(&output));
}

fn file(host: &MemoryHost, format: &str) -> Arc<MemoryFile> {
    host.file(&path(format)).unwrap()
}

fn bytes4(file: &MemoryFile, at: u64) -> [u8; 4] {
    let mut bytes = [0; 4];
    file.read_at(at, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_truncated_vhdx_loses_the_blocks_behind_its_end() {
    let host = full("vhdx", "dynamic", Some(MIB));
    let vhdx = file(&host, "vhdx");
    // Blocks were allocated in the order of writing, up to the end.
    vhdx.set_len(vhdx.len().unwrap() - 3 * MIB).unwrap();
    assert_lost(&host, "vhdx", &[(5 * MIB, 3 * MIB)]);
    assert_given_up(&host, "vhdx", &[(5 * MIB, 3 * MIB)]);
    qemu_refuses(&host, "vhdx");
}

#[test]
fn a_vhd_whose_head_copy_is_bad_loses_nothing() {
    for at in [0, 40, 64] {
        let host = full("vhd", "dynamic", Some(MIB));
        file(&host, "vhd").write_at(at, &[0x5a]).unwrap();
        assert_lost(&host, "vhd", &[]);
        qemu_refuses(&host, "vhd");
    }
}

#[test]
fn a_vhd_entry_past_the_end_loses_its_block() {
    let host = full("vhd", "dynamic", Some(MIB));
    file(&host, "vhd").write_at(1536 + 4 * 2, &0x00ff_0000u32.to_be_bytes()).unwrap();
    assert_lost(&host, "vhd", &[(2 * MIB, MIB)]);
    assert_given_up(&host, "vhd", &[(2 * MIB, MIB)]);
    qemu_refuses(&host, "vhd");
}

#[test]
fn a_vmdk_entry_past_the_end_loses_its_grain() {
    let host = full("vmdk", "monolithicSparse", None);
    let vmdk = file(&host, "vmdk");
    for field in [48, 56] {
        let directory = u64::from(u32::from_le_bytes(bytes4(&vmdk, field))) * 512;
        let table = u64::from(u32::from_le_bytes(bytes4(&vmdk, directory))) * 512;
        vmdk.write_at(table + 4 * 17, &0x00ff_0000u32.to_le_bytes()).unwrap();
    }
    assert_lost(&host, "vmdk", &[(17 * 65536, 65536)]);
    assert_given_up(&host, "vmdk", &[(17 * 65536, 65536)]);
}

#[test]
fn a_truncated_vmdk_loses_the_grains_behind_its_end() {
    let host = full("vmdk", "monolithicSparse", None);
    let vmdk = file(&host, "vmdk");
    vmdk.set_len(vmdk.len().unwrap() - MIB - 512).unwrap();
    assert_lost(&host, "vmdk", &[(7 * MIB - 512, MIB + 512)]);
    assert_given_up(&host, "vmdk", &[(7 * MIB - 512, MIB + 512)]);
}

#[test]
fn fixed_disks_that_were_cut_off_say_what_they_lost_when_opened() {
    let host = full("vhd", "fixed", None);
    let vhd = file(&host, "vhd");
    let mut footer = [0; 512];
    vhd.read_at(SIZE, &mut footer).unwrap();
    vhd.set_len(6 * MIB).unwrap();
    vhd.write_at(6 * MIB, &footer).unwrap();
    assert_lost(&host, "vhd", &[(6 * MIB, 2 * MIB)]);
    let flat = full("vmdk", "monolithicFlat", None);
    flat.file(Path::new("/t/disk-flat.vmdk")).unwrap().set_len(MIB).unwrap();
    assert_lost(&flat, "vmdk", &[(MIB, 7 * MIB)]);
    for (host, format, lost) in [(host, "vhd", 6 * MIB), (flat, "vmdk", MIB)] {
        let dynamic: Arc<dyn Host> = host;
        let options = OpenOptions::new(Access::Read);
        let image = formats::open(&dynamic, &path(format), &options).unwrap();
        assert!(image.damage.len() == 1 && image.damage[0] == (lost..SIZE));
        assert!(image.read_only.is_some());
    }
}

/// Of what is damaged in the corpus nothing is shown that is not there, and a check says why.
#[test]
fn damaged_foreign_images_show_nothing_that_is_not_there() {
    let Some(folder) = corpus::folder() else { return };
    let host = HostFs::shared();
    for row in corpus::rows(&folder).iter().filter(|row| row.expected != "opens") {
        let unpacked = corpus::unpack(&folder, row);
        let options = OpenOptions::new(Access::Read);
        match formats::open(&host, &unpacked.image, &options) {
            Err(e) => println!("{}: refused: {e}", row.id),
            Ok(image) => {
                let lost: u64 = image.damage.iter().map(|range| range.end - range.start).sum();
                assert!(lost > 0 && image.read_only.is_some(), "{} opens", row.id);
                let first = &image.damage[0];
                let mut sector = [0; 512];
                assert!(image.disk.read_at(first.start, &mut sector).is_err(), "{}", row.id);
                println!("{}: {lost} of {} bytes are lost", row.id, image.disk.size());
            }
        }
        let found = formats::check(&host, &unpacked.image, &options);
        assert!(found.is_err() || found.is_ok_and(|r| r.errors > 0), "{}: no finding", row.id);
    }
}

#[test]
fn what_readers_run_into_is_listed_as_damage_of_the_flat_file() {
    if !live::can_mount() || !live::have(&["getfattr"]) {
        return;
    }
    let host = full("vhd", "dynamic", Some(MIB));
    for block in [2, 3, 6] {
        file(&host, "vhd").write_at(1536 + 4 * block, &0x00ff_0000u32.to_be_bytes()).unwrap();
    }
    let dir = common::folder();
    std::fs::write(dir.path().join("a.vhd"), file(&host, "vhd").to_vec()).unwrap();
    let mount = live::Mount::new(dir.path(), &[]);
    let flat = mount.flat("a.vhd");
    let damage = || {
        let mut command = Command::new("getfattr");
        command.args(["-n", "user.flatdisk.damage", "--only-values", "--absolute-names"]);
        let output = live::outcome(command.arg(&flat));
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    };
    assert_eq!(damage(), None);
    // What is known of contents younger than the host's clock can tell apart is not kept.
    let written = dir.path().join("a.vhd").metadata().unwrap().modified().unwrap();
    live::wait_until("of an age", || written.elapsed().is_ok_and(|age| age.as_millis() > 200));
    let disk = std::fs::File::open(&flat).unwrap();
    let mut block = vec![0; MIB as usize];
    for number in 0..4 {
        let read = disk.read_exact_at(&mut block, number * MIB);
        assert_eq!(read.is_err(), number >= 2, "block {number}: {read:?}");
    }
    let open = damage().unwrap();
    assert_eq!(open, "0x200000-0x400000");
    // It is known when nobody has the file open, until the image changes.
    drop(disk);
    live::wait_until("listed while closed", || damage().as_ref() == Some(&open));
    std::fs::write(dir.path().join("a.vhd"), file(&full("vhd", "dynamic", None), "vhd").to_vec())
        .unwrap();
    live::wait_until("forgotten when the image changed", || damage().is_none());
}
