//! Images made by other programs.

use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

use super::{check_file, open_file, skip};
use crate::disk::Disk;
use crate::storage::Access;

struct Row {
    id: String,
    path: String,
    size: u64,
    content: String,
    companions: Vec<String>,
}

/// The rows of the manifest whose id begins with `prefix`.
fn rows(dir: &Path, prefix: &str) -> Vec<Row> {
    let manifest = std::fs::read_to_string(dir.join("manifest.tsv")).unwrap();
    let rows = manifest.lines().map(|line| line.split('\t').collect::<Vec<_>>());
    rows.filter(|row| row[0].starts_with(prefix))
        .map(|row| Row {
            id: row[0].to_owned(),
            path: row[2].to_owned(),
            size: row[4].parse().unwrap(),
            content: row[5].to_owned(),
            companions: match row[10] {
                "-" => Vec::new(),
                names => names.split(", ").map(str::to_owned).collect(),
            },
        })
        .collect()
}

/// Unpacks an image and its companions into `to`.
fn unpack(corpus: &Path, row: &Row, to: &Path) -> PathBuf {
    let image = corpus.join(&row.path);
    let dir = image.parent().unwrap();
    let own = image.file_name().unwrap().to_str().unwrap().to_owned();
    for name in row.companions.iter().chain([&own]) {
        let packed = dir.join(format!("{name}.zst"));
        let status = Command::new("zstd")
            .args(["-q", "-d", "-f", "--sparse"])
            .arg(packed)
            .arg("-o")
            .arg(to.join(name))
            .status()
            .unwrap();
        assert!(status.success());
    }
    to.join(own)
}

fn hex(hash: impl AsRef<[u8]>) -> String {
    hash.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

/// Hash of the whole disk, taking the disk's word for what is not data.
fn hash_disk(disk: &Disk) -> String {
    let mut hash = Sha256::new();
    let zeroes = vec![0; 1 << 20];
    let mut buf = vec![0; 1 << 20];
    let mut pos = 0;
    while pos < disk.size() {
        let data = disk.next_data(pos).unwrap().unwrap_or(disk.size()..disk.size());
        while pos < data.start {
            let part = (data.start - pos).min(zeroes.len() as u64);
            hash.update(&zeroes[..part as usize]);
            pos += part;
        }
        while pos < data.end {
            let part = (data.end - pos).min(buf.len() as u64);
            disk.read_at(pos, &mut buf[..part as usize]).unwrap();
            hash.update(&buf[..part as usize]);
            pos += part;
        }
    }
    hex(hash.finalize())
}

fn hash_file(path: &Path) -> String {
    let mut hash = Sha256::new();
    std::io::copy(&mut std::fs::File::open(path).unwrap(), &mut hash).unwrap();
    hex(hash.finalize())
}

fn check(prefix: &str) {
    let Some(corpus) = std::env::var_os("FLATDISK_CORPUS").map(PathBuf::from) else {
        return skip("FLATDISK_CORPUS is not set");
    };
    let rows = rows(&corpus, prefix);
    assert!(!rows.is_empty());
    for row in rows {
        let dir = tempfile::tempdir().unwrap();
        let path = unpack(&corpus, &row, dir.path());
        let before = hash_file(&path);
        for access in [Access::Peek, Access::Read, Access::Write] {
            let image = open_file(&path, access);
            assert_eq!(image.disk.size(), row.size, "{}", row.id);
            if access == Access::Read {
                assert_eq!(hash_disk(&image.disk), row.content, "{}", row.id);
            }
            image.disk.close().unwrap();
        }
        assert_eq!(hash_file(&path), before, "{} changed by reading", row.id);
    }
}

#[test]
fn disks_made_by_windows_read_right() {
    check("vhdx-dyn");
    check("vhdx-fixed");
}

#[test]
fn dirty_logs_are_replayed_in_memory() {
    check("vhdx-dirty-qemu");
    check("vhdx-ms-dirty");
}

#[test]
fn large_sectors_and_zero_states_read_right() {
    check("vhdx-ms-4k");
    check("vhdx-ms-zero");
}

#[test]
fn every_generation_of_a_chain_reads_right() {
    check("vhdx-ms-chain3");
    check("vhdx-ms-chain4k");
}

#[test]
fn images_of_other_programs_are_written_and_stay_whole() {
    let Some(corpus) = std::env::var_os("FLATDISK_CORPUS").map(PathBuf::from) else {
        return skip("FLATDISK_CORPUS is not set");
    };
    for row in rows(&corpus, "vhdx-").iter().filter(|row| row.size <= 100 << 20) {
        let dir = tempfile::tempdir().unwrap();
        let path = unpack(&corpus, row, dir.path());
        let open = |access| open_file(&path, access);
        let mut model = super::contents(&open(Access::Read).disk);
        let image = open(Access::Write);
        let mut rng = fastrand::Rng::with_seed(9);
        for round in 0..60 {
            let start = rng.usize(..model.len());
            let range = start..(start + rng.usize(1..400_000)).min(model.len());
            if round % 5 == 4 {
                image.disk.discard(start as u64, range.len() as u64).unwrap();
                model[range].fill(0);
            } else {
                let data: Vec<u8> = range.clone().map(|_| rng.u8(..)).collect();
                image.disk.write_at(start as u64, &data).unwrap();
                model[range].copy_from_slice(&data);
            }
            if round % 7 == 6 {
                image.disk.flush().unwrap();
            }
        }
        image.disk.close().unwrap();
        drop(image);
        assert!(super::contents(&open(Access::Read).disk) == model, "{}", row.id);
        let report = check_file(&path);
        assert_eq!(report.errors, 0, "{}: {:?}", row.id, report.findings);
    }
}

#[test]
fn checks_find_no_damage_in_images_of_other_programs() {
    let Some(corpus) = std::env::var_os("FLATDISK_CORPUS").map(PathBuf::from) else {
        return skip("FLATDISK_CORPUS is not set");
    };
    for row in rows(&corpus, "vhdx-") {
        let dir = tempfile::tempdir().unwrap();
        let path = unpack(&corpus, &row, dir.path());
        let report = check_file(&path);
        println!("{}: {:?}", row.id, report.findings);
        assert_eq!(report.errors, 0, "{}: {:?}", row.id, report.findings);
    }
}
