//! Disks become larger and smaller in place: every byte that fits is there, whatever a crash or a fault
//! leaves, and asking again completes what was interrupted.

// The helpers here serve tests only.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::sizes::{Case, Work, all_of, grown, shrunk, survives, tells_of_faults};
use common::tools;
use flatdisk::error::ErrorKind;
use flatdisk::formats::resize::resize;
use flatdisk::formats::{self, CreateSpec, OpenOptions};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::{Access, Host};

fn completes(case: &Case) -> Result<usize, String> {
    let made = case.made();
    let host: Arc<dyn Host> = made.host.clone();
    let before = made.host.digest();
    let options = OpenOptions::new(Access::Write);
    let Work::Resize(size) = case.work else { unreachable!("not among these cases") };
    let dry = resize(&host, &case.path(), &options, size, true, &()).map_err(|e| e.to_string())?;
    if before != made.host.digest() {
        return Err("a dry run changes files".to_owned());
    }
    let done =
        resize(&host, &case.path(), &options, size, false, &()).map_err(|e| e.to_string())?;
    if done.changes.len() != dry.changes.len() || (done.before, done.after) != (made.size, size) {
        return Err(format!("a dry run tells {:?}, done is {:?}", dry.changes, done.changes));
    }
    made.judge_end(&host)?;
    Ok(done.changes.len())
}

#[test]
fn every_kind_of_image_becomes_larger() {
    all_of(&grown(), completes);
}

#[test]
fn every_kind_of_image_becomes_smaller() {
    all_of(&shrunk(), completes);
}

#[test]
fn growing_survives_every_crash() {
    all_of(&grown(), survives);
}

#[test]
fn shrinking_survives_every_crash() {
    all_of(&shrunk(), survives);
}

#[test]
fn every_fault_is_told_and_leaves_a_good_image() {
    let cases: Vec<_> = grown().into_iter().chain(shrunk()).collect();
    all_of(&cases, tells_of_faults);
}

#[test]
fn an_image_that_others_stand_on_keeps_its_size() {
    for format in ["vhd", "vhdx", "vmdk"] {
        let files = MemoryHost::new();
        let host: Arc<dyn Host> = files.clone();
        let path = |name: &str| std::path::PathBuf::from(format!("/t/{name}.{format}"));
        let spec = CreateSpec { size: 8 << 20, ..CreateSpec::default() };
        let driver = formats::by_name(format).unwrap();
        formats::create(driver, &*files, &path("base"), &spec).unwrap();
        let read = OpenOptions::new(Access::Read);
        let base = formats::open(&host, &path("base"), &read).unwrap();
        formats::create_child(driver, &*files, &path("child"), &base, &CreateSpec::default())
            .unwrap();
        drop(base);
        let to = |name: &str, size| resize(&host, &path(name), &read, size, false, &());
        let e = to("base", 9 << 20).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidInput);
        assert!(e.to_string().contains(&format!("child.{format}")), "{e}");
        // The child itself: smaller than its parent never, larger where the format has that.
        assert_eq!(to("child", 7 << 20).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(to("child", 9 << 20).is_ok(), format != "vmdk", "{format}");
        assert_eq!(to("base", 8 << 20).unwrap().changes, [], "{format}");
    }
}

#[test]
fn a_bat_that_outgrows_an_empty_vhd_spares_the_footer() {
    let files = MemoryHost::new();
    let host: Arc<dyn Host> = files.clone();
    let path = std::path::Path::new("/t/x.vhd");
    let spec = CreateSpec { size: 3 << 20, ..CreateSpec::default() };
    formats::create(formats::by_name("vhd").unwrap(), &*files, path, &spec).unwrap();
    let options = OpenOptions::new(Access::Write);
    for size in [1000 << 30, 2040 << 30] {
        resize(&host, path, &options, size, false, &()).unwrap();
        let report = formats::check(&host, path, &options).unwrap();
        assert_eq!(report.findings.len(), 0, "{:?}", report.findings);
    }
}

#[test]
fn a_fixed_vhd_that_began_to_grow_by_a_sector_is_still_one() {
    let files = MemoryHost::new();
    let host: Arc<dyn Host> = files.clone();
    let path = std::path::Path::new("/t/disk");
    let spec =
        CreateSpec { size: 200 << 10, subformat: Some("fixed".into()), ..CreateSpec::default() };
    formats::create(&formats::vhd::Vhd, &*files, path, &spec).unwrap();
    let file = files.file(path).unwrap();
    let len = flatdisk::storage::Storage::len(&*file).unwrap();
    for sectors in 1..10 {
        flatdisk::storage::Storage::set_len(&*file, len + sectors * 512).unwrap();
        let image = formats::open(&host, path, &OpenOptions::new(Access::Read)).unwrap();
        assert_eq!(image.disk.size(), 200 << 10, "{sectors} sectors");
    }
}

/// Runs the program on arguments; what it printed.
fn flatdisk(args: &[&str]) -> std::process::Output {
    tools::output(std::process::Command::new(env!("CARGO_BIN_EXE_flatdisk")).args(args))
}

/// The disk of the image at `path`, as a raw file beside it.
fn as_raw(path: &std::path::Path) -> std::path::PathBuf {
    let host = flatdisk::storage::file::HostFs::shared();
    let disk = formats::open(&host, path, &OpenOptions::new(Access::Read)).unwrap().disk;
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(0, &mut bytes).unwrap();
    let raw = path.with_extension("raw");
    std::fs::write(&raw, bytes).unwrap();
    raw
}

#[test]
fn a_moved_partition_table_is_accepted_by_other_programs() {
    if !tools::have("sgdisk") || !tools::have("sfdisk") {
        return;
    }
    const MIB: u64 = 1 << 20;
    let folder = common::folder();
    for (name, subformat) in
        [("a.vhd", "fixed"), ("b.vhdx", "dynamic"), ("c.vmdk", "monolithicSparse")]
    {
        let path = folder.path().join(name);
        let raw = folder.path().join("table");
        std::fs::write(&raw, vec![0; 64 << 20]).unwrap();
        tools::run(std::process::Command::new("sgdisk").args(["-n1:2048:+20M"]).arg(&raw));
        let host = flatdisk::storage::file::HostFs::shared();
        let format = formats::by_extension(&path).unwrap();
        let spec = CreateSpec {
            size: 64 * MIB,
            subformat: Some(subformat.into()),
            ..CreateSpec::default()
        };
        formats::create(format, &*host, &path, &spec).unwrap();
        let disk = formats::open(&host, &path, &OpenOptions::new(Access::Write)).unwrap().disk;
        disk.write_at(0, &std::fs::read(&raw).unwrap()).unwrap();
        disk.close().unwrap();
        drop(disk);
        let image = path.to_str().unwrap();
        let is_good = |size: u64| {
            let raw = as_raw(&path);
            assert_eq!(std::fs::metadata(&raw).unwrap().len(), size, "{name}");
            let said = tools::run(std::process::Command::new("sgdisk").arg("-v").arg(&raw));
            assert!(said.contains("No problems found"), "{name}: {said}");
            let said = tools::run(std::process::Command::new("sfdisk").arg("--verify").arg(&raw));
            assert!(said.contains("No errors detected"), "{name}: {said}");
        };
        // Without being asked to, the command only says so.
        let said = tools::both(&flatdisk(&["resize", image, "+10M"]));
        assert!(said.contains("not at the end") && said.contains("growpart"), "{name}: {said}");
        let grown = flatdisk(&["resize", "--move-gpt", image, "200M"]);
        assert!(grown.status.success(), "{name}: {}", tools::both(&grown));
        is_good(200 * MIB);
        let refused = flatdisk(&["resize", "--shrink", image, "15M"]);
        assert_eq!(refused.status.code(), Some(1), "{name}: {}", tools::both(&refused));
        let shrunk = flatdisk(&["resize", "--shrink", "--move-gpt", image, "min"]);
        assert!(shrunk.status.success(), "{name}: {}", tools::both(&shrunk));
        // The partition's end, 33 sectors, and whole pages.
        is_good((21 * MIB + 33 * 512).next_multiple_of(4096));
    }
}
