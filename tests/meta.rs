//! What images say about themselves: shown, set in one step whatever interrupts it, and read by other
//! programs.

// The helpers here serve tests only.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::chains::{bases, contents, make_child, open, scribble};
use common::commands::{self, changes, get, settings};
use common::images::{Image as Base, errors};
use common::{in_parallel, number, seed, tools};
use fastrand::Rng;
use flatdisk::error::ErrorKind;
use flatdisk::formats::OpenOptions;
use flatdisk::formats::meta::{self, Changes};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::{Access, Host};

fn options() -> OpenOptions {
    OpenOptions::new(Access::Write)
}

fn filled(base: &Base) -> (Arc<MemoryHost>, PathBuf, Vec<u8>) {
    let memory = MemoryHost::new();
    let host: Arc<dyn Host> = memory.clone();
    let path = PathBuf::from(format!("/t/disk.{}", base.format));
    base.create_at(&*host, &path).unwrap();
    let mut model = vec![0; open(&host, &path, Access::Read).disk.size() as usize];
    scribble(&host, &path, &mut model, &mut Rng::with_seed(seed()), 6);
    (memory, path, model)
}

#[test]
fn what_is_set_is_there_and_nothing_else_changes() {
    in_parallel(&bases(), |(base, _)| {
        let (memory, path, model) = filled(base);
        let host: Arc<dyn Host> = memory;
        let identity = open(&host, &path, Access::Read).identity;
        for (key, values) in settings(base.format) {
            for value in values {
                let context = format!("{} {:?}: {key}={value}", base.format, base.spec.subformat);
                let before = meta::list(&host, &path, &options()).unwrap();
                meta::set(&host, &path, &changes(&[(key, value)]), &options())
                    .unwrap_or_else(|e| panic!("{context}: {e}"));
                assert_eq!(get(&host, &path, key).as_deref(), Some(*value), "{context}");
                for old in before {
                    let follows = ["geometry", "guid"].iter().any(|part| old.key.contains(part));
                    if old.key != *key && !follows {
                        assert_eq!(
                            get(&host, &path, &old.key),
                            old.value,
                            "{context}: {}",
                            old.key
                        );
                    }
                }
                let image = open(&host, &path, Access::Read);
                assert!(contents(&image) == model, "{context}");
                assert!(*key == "unique_id" || image.identity == identity, "{context}");
                assert_eq!(errors(&host, &path).unwrap(), [""; 0], "{context}");
            }
        }
        // Still a disk that can be written.
        let mut model = model;
        scribble(&host, &path, &mut model, &mut Rng::with_seed(1), 4);
        assert!(contents(&open(&host, &path, Access::Read)) == model);
    });
}

#[test]
fn strange_keys_and_values_are_refused_with_what_can_be() {
    for (base, _) in bases() {
        let (memory, path, _) = filled(&base);
        let before = memory.digest();
        let host: Arc<dyn Host> = memory.clone();
        let refused = |key: &str, value: &str| {
            let e = meta::set(&host, &path, &changes(&[(key, value)]), &options()).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidInput, "{key}={value}: {e}");
            assert!(e.hinted().is_some_and(|hint| !hint.is_empty()), "{key}={value}: {e}");
        };
        for (key, _) in settings(base.format) {
            for value in ["\"", "a\nb", "a value that nothing can be \u{1}"] {
                refused(key, value);
            }
            // One that is right does not come with one that is wrong.
            let (right, values) = settings(base.format)[0];
            let both = changes(&[(right, values[0]), (key, "\"")]);
            meta::set(&host, &path, &both, &options()).unwrap_err();
        }
        for key in [
            "",
            "CID",
            "parentCID",
            "createType",
            "current_size",
            "data_write_guid",
            "ddb",
            "ddb.geometry",
        ] {
            refused(key, "1");
        }
        assert_eq!(memory.digest(), before, "{}", base.format);
    }
}

#[test]
fn a_copy_with_new_ids_is_another_disk() {
    for (base, _) in bases() {
        let (memory, path, model) = filled(&base);
        let host: Arc<dyn Host> = memory;
        let identity = open(&host, &path, Access::Read).identity;
        let child = path.with_file_name("child").with_extension(base.format);
        make_child(&host, &child, &path, None);
        let new = Changes { new_id: true, ..Changes::default() };
        let e = meta::set(&host, &path, &new, &options()).unwrap_err();
        assert!(e.what().contains("child."), "{e}");
        assert!(contents(&open(&host, &child, Access::Read)) == model);
        host.remove(&child).unwrap();
        let uuid = open(&host, &path, Access::Read).info.uuid;
        meta::set(&host, &path, &new, &options()).unwrap_or_else(|e| panic!("{e}"));
        let image = open(&host, &path, Access::Read);
        assert_ne!(image.identity, identity, "{}", base.format);
        assert_ne!(image.info.uuid, uuid, "{}", base.format);
        assert!(contents(&image) == model);
        assert_eq!(errors(&host, &path).unwrap(), [""; 0]);
    }
}

#[test]
fn killed_at_any_moment_all_is_set_or_nothing() {
    let budget = number("FLATDISK_CRASH_STATES", 120) as usize;
    in_parallel(&bases(), |(base, _)| {
        let context = format!("{} {:?}", base.format, base.spec.subformat);
        let command = commands::set_meta(base, &mut Rng::with_seed(seed()));
        let judged = command.crash(budget);
        judged.unwrap_or_else(|e| panic!("{context}: {e}"));
    });
}

fn flatdisk(dir: &Path, arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flatdisk"));
    tools::run(command.current_dir(dir).args(arguments))
}

#[test]
fn other_programs_read_what_was_set() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path();
    let id = "01234567-89ab-4def-8123-456789abcdef";
    let shown = |program: &str, arguments: &[&str]| {
        tools::have(program)
            .then(|| tools::run(Command::new(program).current_dir(dir).args(arguments)))
    };
    for (kind, name) in
        [("monolithicSparse", "a.vmdk"), ("monolithicFlat", "b.vmdk"), ("vmfs", "c.vmdk")]
    {
        flatdisk(dir, &["create", "-q", "--subformat", kind, name, "8M"]);
        flatdisk(dir, &["meta", name, "ddb.adapterType=ide", "ddb.virtualHWVersion=7"]);
        if let Some(text) = shown("qemu-img", &["info", name]) {
            assert!(text.contains("file format: vmdk") && text.contains("8 MiB"), "{text}");
        }
        let cid = flatdisk(dir, &["meta", name, "CID"]);
        flatdisk(dir, &["meta", "--new-id", name]);
        let new = flatdisk(dir, &["meta", name, "CID"]);
        assert_ne!(cid, new);
        if let Some(text) = shown("vmdkinfo", &[name]) {
            let digits = new.split_whitespace().last().unwrap().to_owned();
            assert!(text.to_lowercase().contains(&digits), "{digits}: {text}");
        }
    }
    for kind in ["dynamic", "fixed"] {
        let name = format!("{kind}.vhd");
        flatdisk(dir, &["create", "-q", "--subformat", kind, &name, "8M"]);
        flatdisk(dir, &["meta", &name, &format!("unique_id={id}")]);
        if let Some(text) = shown("vhdiinfo", &[&name]) {
            assert!(text.to_lowercase().contains(id), "{text}");
        }
    }
    flatdisk(dir, &["create", "-q", "x.vhdx", "8M"]);
    flatdisk(dir, &["meta", "x.vhdx", &format!("virtual_disk_id={id}")]);
    let json = flatdisk(dir, &["info", "--json", "x.vhdx"]);
    assert!(json.contains(id), "{json}");
    if let Some(text) = shown("qemu-img", &["info", "x.vhdx"]) {
        assert!(text.contains("file format: vhdx"), "{text}");
    }
}
