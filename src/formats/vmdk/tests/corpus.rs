//! Images made by other programs. `FLATDISK_CORPUS` names the folder that holds them.

use std::path::PathBuf;
use std::process::Command;

use sha2::{Digest, Sha256};

use super::*;
use crate::error::ErrorKind;
use crate::storage::file::HostFs;

/// One image of the corpus.
struct Row {
    id: String,
    kind: String,
    file: String,
    expected: String,
    size: u64,
    sha256: String,
}

/// Whether tests must fail, rather than be skipped, when what they need is missing.
pub(super) fn tools_required() -> bool {
    std::env::var_os("FLATDISK_REQUIRE_TOOLS").is_some_and(|v| v == "1")
}

/// The corpus and its VMDK rows; `None` if there is no corpus.
fn rows() -> Option<(PathBuf, Vec<Row>)> {
    let Some(folder) = std::env::var_os("FLATDISK_CORPUS").map(PathBuf::from) else {
        assert!(!tools_required(), "FLATDISK_CORPUS is not set");
        println!("SKIPPED: FLATDISK_CORPUS is not set");
        return None;
    };
    let manifest = std::fs::read_to_string(folder.join("manifest.tsv")).unwrap();
    let rows = manifest.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split('\t').collect();
        let row = Row {
            id: fields[0].to_owned(),
            kind: fields[1].to_owned(),
            file: fields[2].rsplit('/').next().unwrap_or_default().to_owned(),
            expected: fields[3].to_owned(),
            size: fields[4].parse().unwrap_or(0),
            sha256: fields[5].to_owned(),
        };
        row.kind.contains("VMDK").then_some(row)
    });
    let rows = rows.collect();
    Some((folder, rows))
}

/// Unpacks an image with its companions.
fn unpack(folder: &Path, row: &Row) -> (tempfile::TempDir, PathBuf) {
    let target = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(folder.join(&row.id)).unwrap() {
        let packed = entry.unwrap().path();
        let name = packed.file_stem().unwrap();
        let status = Command::new("zstd")
            .args(["-dqf", "--sparse", "-o"])
            .args([&target.path().join(name), &packed])
            .status()
            .unwrap();
        assert!(status.success(), "{}", packed.display());
    }
    let path = target.path().join(&row.file);
    (target, path)
}

fn sha256(disk: &Disk) -> String {
    let mut hash = Sha256::new();
    let mut buf = vec![0; 4 << 20];
    let mut pos = 0;
    while pos < disk.size() {
        let part = &mut buf[..(disk.size() - pos).min(4 << 20) as usize];
        disk.read_at(pos, part).unwrap();
        hash.update(&*part);
        pos += part.len() as u64;
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn open_file(path: &Path, access: Access) -> Result<Image> {
    formats::open(&HostFs::shared(), path, &OpenOptions::new(access))
}

#[test]
fn images_of_other_programs_have_their_contents() {
    let Some((folder, rows)) = rows() else { return };
    for row in rows.iter().filter(|row| row.expected == "opens") {
        let (_keep, path) = unpack(&folder, row);
        let image = open_file(&path, Access::Read).unwrap_or_else(|e| panic!("{}: {e}", row.id));
        assert_eq!(image.disk.size(), row.size, "{}", row.id);
        assert_eq!(sha256(&image.disk), row.sha256, "{}", row.id);
        let report =
            formats::check(&HostFs::shared(), &path, &OpenOptions::new(Access::Read)).unwrap();
        assert_eq!(report.errors, 0, "{}: {:#?}", row.id, report.findings);
    }
}

#[test]
fn damaged_images_are_refused_with_the_reason() {
    let Some((folder, rows)) = rows() else { return };
    for row in rows.iter().filter(|row| row.expected != "opens") {
        let (_keep, path) = unpack(&folder, row);
        let error = open_file(&path, Access::Read).expect_err(&row.id);
        println!("{}: {error}", row.id);
        let missing = row.expected.contains("absent");
        let kinds: &[ErrorKind] = match missing {
            true => &[ErrorKind::NotFound],
            false => &[ErrorKind::Corrupt, ErrorKind::Unsupported],
        };
        assert!(kinds.contains(&error.kind()), "{}: {error}", row.id);
    }
}

#[test]
fn images_of_other_programs_take_writes() {
    let Some((folder, rows)) = rows() else { return };
    let writable = |row: &&Row| {
        let kinds = ["monolithic", "twoGb", "vmfs", "renamed"];
        row.expected == "opens" && kinds.iter().any(|kind| row.kind.contains(kind))
    };
    for row in rows.iter().filter(writable) {
        let (_keep, path) = unpack(&folder, row);
        let image = open_file(&path, Access::Write).unwrap();
        assert_eq!(image.disk.read_only(), None, "{}", row.id);
        let pattern: Vec<u8> = (0..200_000u32).map(|i| (i / 3) as u8).collect();
        let places = [1000, row.size / 3, row.size - 5000];
        let len = |at: u64| pattern.len().min((row.size - at) as usize);
        for at in places.iter().filter(|at| **at < row.size) {
            image.disk.write_at(*at, &pattern[..len(*at)]).unwrap();
        }
        let written = sha256(&image.disk);
        image.disk.close().unwrap();
        drop(image);
        let image = open_file(&path, Access::Read).unwrap();
        assert_eq!(sha256(&image.disk), written, "{}", row.id);
        assert!(!image.info.dirty, "{}", row.id);
        let last = places[2].min(row.size - 1);
        let mut back = vec![0; len(last)];
        image.disk.read_at(last, &mut back).unwrap();
        assert_eq!(back, pattern[..back.len()], "{}", row.id);
    }
}
