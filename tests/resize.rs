//! Disks become larger and smaller in place: every byte that fits is there, whatever a crash or a fault
//! leaves, and asking again completes what was interrupted.

// The helpers here serve tests only.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::sizes::{Case, Work, all_of, grown, shrunk, survives, tells_of_faults};
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
