//! What `volumes` tells of disks that other programs made, held against what blkid(8) and sfdisk(8)
//! tell; and of disks that were made to mislead it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

#[path = "../examples/volumes.rs"]
mod example;
#[path = "volumes/hostile.rs"]
mod hostile;
#[path = "volumes/made.rs"]
mod made;
#[path = "volumes/usage.rs"]
mod usage;

use std::path::Path;
use std::process::Command;

use common::tools::{have, output, run};
use flatdisk::disk::flat;
use flatdisk::storage::file::HostFs;
use flatdisk::storage::{Access, Host};
use flatdisk::volumes::{Content, Kind, TableKind, Volumes, volumes};
use made::{MADE, Made};
use serde_json::Value;

/// What is in a raw file.
fn look(path: &Path, sector: u32) -> Volumes {
    let file = HostFs.open(path, Access::Peek).unwrap();
    volumes(&flat::raw(file, sector).unwrap()).unwrap()
}

/// What blkid(8) says of a part of a file, by key.
fn blkid(path: &Path, part: Option<(u64, u64)>) -> Vec<(String, String)> {
    let mut command = Command::new("blkid");
    command.args(["-p", "-o", "export"]);
    if let Some((start, size)) = part {
        command.arg("-O").arg(start.to_string()).arg("-S").arg(size.to_string());
    }
    let said = output(command.arg(path));
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let pair = |line: &str| line.split_once('=').map(|(k, v)| (k.to_owned(), v.replace('\\', "")));
    said.lines().filter_map(pair).collect()
}

/// Holds a content against what blkid says of the same place.
fn compare_content(content: Option<&Content>, said: &[(String, String)], what: &str) {
    let value = |key: &str| said.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
    let content = content.unwrap_or_else(|| panic!("{what}: no content"));
    assert_eq!(content.type_name, value("TYPE"), "{what}: {said:?}");
    if content.type_name.is_none() {
        return;
    }
    assert_eq!(content.label.as_deref(), value("LABEL"), "{what}: {said:?}");
    assert_eq!(content.uuid.as_deref(), value("UUID"), "{what}: {said:?}");
    assert_eq!(content.version.as_deref(), value("VERSION"), "{what}: {said:?}");
    let kind = match value("USAGE") {
        Some("filesystem") => Kind::Filesystem,
        Some("raid") => Kind::Container,
        Some("crypto") => Kind::Encrypted,
        _ => Kind::Swap,
    };
    assert_eq!(content.kind, kind, "{what}: {said:?}");
    assert!(content.warnings.is_empty(), "{what}: {:?}", content.warnings);
}

/// Holds a table of 4096-byte sectors against what fdisk says of the same file.
fn compare_large_table(path: &Path, found: &Volumes) {
    let said = run(Command::new("fdisk").args(["-b4096", "-l", "-oStart,Sectors"]).arg(path));
    let rows = said.lines().skip_while(|line| !line.starts_with("Start")).skip(1);
    let numbers = |line: &str| line.split_whitespace().map(|n| n.parse().unwrap()).collect();
    let rows: Vec<Vec<u64>> = rows.map(numbers).collect();
    let found: Vec<_> =
        found.partitions.iter().map(|found| vec![found.start / 4096, found.size / 4096]).collect();
    assert!(found == rows && found.len() == 2, "{found:?}: {said}");
}

/// Holds a table against what sfdisk says of the same file.
fn compare_table(path: &Path, found: &Volumes, what: &str) {
    let said = output(Command::new("sfdisk").arg("--json").arg(path));
    let said: Value = serde_json::from_slice(&said.stdout).unwrap_or(Value::Null);
    let said = &said["partitiontable"];
    let Some(table) = &found.table else {
        // Boot sectors of NTFS count as tables there, without anything in them.
        assert!(said["partitions"].is_null(), "{what}: {said}");
        return;
    };
    let label = if table.kind == TableKind::Gpt { "gpt" } else { "dos" };
    assert_eq!(said["label"], label, "{what}");
    let id = said["id"].as_str().unwrap().trim_start_matches("0x").to_ascii_lowercase();
    assert_eq!(table.uuid.as_deref(), Some(&*id), "{what}");
    let partitions = said["partitions"].as_array().unwrap();
    assert_eq!(found.partitions.len(), partitions.len(), "{what}: {said}");
    for (found, said) in found.partitions.iter().zip(partitions) {
        let bytes = |key: &str| said[key].as_u64().unwrap() * 512;
        assert_eq!((found.start, found.size), (bytes("start"), bytes("size")), "{what}");
        assert!(said["node"].as_str().unwrap().ends_with(&format!("{}", found.number)), "{what}");
        let kind = said["type"].as_str().unwrap().to_ascii_lowercase();
        assert_eq!(found.type_id.trim_start_matches("0x"), kind, "{what}");
        assert_eq!(found.name.as_deref(), said["name"].as_str(), "{what}");
        assert_eq!(found.bootable, said["bootable"].as_bool() == Some(true), "{what}");
    }
}

#[test]
fn blkid_and_sfdisk_tell_the_same_of_disks_of_every_kind() {
    if !have("blkid") || !have("sfdisk") {
        return;
    }
    let dir = common::folder();
    common::in_parallel(&MADE, |made: &Made| {
        let path = dir.path().join(made.name);
        if !(made.make)(&path) {
            return;
        }
        let found = look(&path, made.sector);
        match made.sector {
            512 => compare_table(&path, &found, made.name),
            _ => compare_large_table(&path, &found),
        }
        if found.table.is_none() {
            compare_content(found.content.as_ref(), &blkid(&path, None), made.name);
        }
        for partition in found.partitions.iter().filter(|partition| !partition.extended) {
            let said = blkid(&path, Some((partition.start, partition.size)));
            let what = format!("{}, partition {}", made.name, partition.number);
            compare_content(partition.content.as_ref(), &said, &what);
        }
        assert!(found.warnings.is_empty() == made.sound, "{}: {:?}", made.name, found.warnings);
        std::fs::remove_file(&path).unwrap();
    });
}

#[test]
fn the_command_tells_what_the_library_tells() {
    let dir = common::folder();
    let raw = dir.path().join("raw");
    let image = dir.path().join("disk.vhdx");
    if !(MADE.iter().find(|made| made.name == "gpt").unwrap().make)(&raw) {
        return;
    }
    let flatdisk = || Command::new(env!("CARGO_BIN_EXE_flatdisk"));
    run(flatdisk().args(["create", "--size=96M"]).arg(&image));
    let host = HostFs::shared();
    let options = flatdisk::formats::OpenOptions::new(Access::Write);
    let open = flatdisk::formats::open(&host, &image, &options).unwrap();
    let bytes = std::fs::read(&raw).unwrap();
    for (at, chunk) in (0..).step_by(1 << 20).zip(bytes.chunks(1 << 20)) {
        if chunk.iter().any(|byte| *byte != 0) {
            open.disk.write_at(at, chunk).unwrap();
        }
    }
    open.disk.close().unwrap();
    drop(open);
    let said = run(flatdisk().args(["volumes", "--json"]).arg(&image));
    let mut said: Value = serde_json::from_str(&said).unwrap();
    let said = said["images"][0].as_object_mut().unwrap();
    assert_eq!(said.remove("filename").unwrap(), image.to_str().unwrap());
    let found = serde_json::to_value(look(&raw, 512)).unwrap();
    assert_eq!(Value::Object(said.clone()), found);
    let listed = example::list(&image).unwrap();
    assert!(listed.contains("partition 2: 35651584..88080384, ext4 `root`"), "{listed}");
    let text = run(flatdisk().args(["volumes", "--usage"]).arg(&image));
    for words in ["GPT", "EFI system", "vfat `EFI`", "ext4 `root`", "used", "free"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    // One that fails does not hide the other, and the status tells.
    let both = output(flatdisk().arg("volumes").arg(&raw).arg(&image));
    assert_eq!(both.status.code(), Some(1));
    assert!(common::tools::both(&both).contains("ext4 `root`"));
}
