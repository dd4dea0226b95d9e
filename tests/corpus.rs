//! Images made by other programs read as their makers meant them, and reading changes nothing.
//!
//! Hashing a large empty disk takes minutes. Disks above 256 MiB, or `FLATDISK_CORPUS_MIB`, are held
//! against `corpus.tsv` instead, which has for each of them a hash of its non-zero pages, taken when
//! the whole disk's hash was right.

mod common;

use common::corpus::{self, Row};
use common::{in_parallel, number};
use flatdisk::disk::Disk;
use flatdisk::formats::{self, OpenOptions};
use flatdisk::storage::Access;
use flatdisk::storage::file::HostFs;
use sha2::{Digest, Sha256};

const PAGE: u64 = 64 << 10;
/// Disks up to this many MiB are hashed as a whole, unless `FLATDISK_CORPUS_MIB` says otherwise.
const WHOLE_MIB: u64 = 256;

/// Hashes of the non-zero pages of large disks, by row.
fn known(id: &str) -> Option<&'static str> {
    let lines = include_str!("corpus.tsv").lines();
    lines.filter_map(|line| line.split_once('\t')).find(|line| line.0 == id).map(|line| line.1)
}

/// SHA-256 of everything, and of the non-zero pages with their numbers.
fn hash(disk: &Disk, everything: bool) -> Result<(String, String), String> {
    let mut whole = Sha256::new();
    let mut pages = Sha256::new();
    let mut buf = vec![0; PAGE as usize];
    let mut pos = 0;
    while pos < disk.size() {
        if !everything {
            match disk.next_data(pos).map_err(|e| e.to_string())? {
                Some(data) => pos = data.start / PAGE * PAGE,
                None => break,
            }
        }
        let part = (disk.size() - pos).min(PAGE) as usize;
        disk.read_at(pos, &mut buf[..part]).map_err(|e| e.to_string())?;
        if everything {
            whole.update(&buf[..part]);
        }
        if buf[..part].iter().any(|byte| *byte != 0) {
            pages.update((pos / PAGE).to_le_bytes());
            pages.update(&buf[..part]);
        }
        pos += part as u64;
    }
    Ok((corpus::hex(&whole.finalize()), corpus::hex(&pages.finalize())))
}

enum Outcome {
    Right(String),
    Skipped(String),
    Wrong(String),
}

fn check(folder: &std::path::Path, row: &Row) -> Outcome {
    let unpacked = corpus::unpack(folder, row);
    let before = corpus::hashes(unpacked.dir.path());
    let opened = formats::open(&HostFs::shared(), &unpacked.image, &OpenOptions::new(Access::Read));
    let outcome = match (row.expected.as_str(), opened) {
        ("opens", Ok(image)) => contents(row, &image.disk),
        ("opens", Err(e)) => Outcome::Wrong(format!("does not open: {e}")),
        (_, Ok(_)) => Outcome::Wrong(format!("opens, but {}", row.expected)),
        (_, Err(e)) => refusal(row, &e),
    };
    match corpus::hashes(unpacked.dir.path()) == before {
        true => outcome,
        false => Outcome::Wrong("reading changed the files".into()),
    }
}

fn contents(row: &Row, disk: &Disk) -> Outcome {
    if disk.size() != row.virtual_size {
        return Outcome::Wrong(format!(
            "has {} bytes instead of {}",
            disk.size(),
            row.virtual_size
        ));
    }
    let everything = disk.size() >> 20 <= number("FLATDISK_CORPUS_MIB", WHOLE_MIB);
    let (whole, pages) = match hash(disk, everything) {
        Ok(hashes) => hashes,
        Err(e) => return Outcome::Wrong(format!("cannot be read: {e}")),
    };
    if everything && whole != row.sha256 {
        return Outcome::Wrong(format!("hashes to {whole} instead of {}", row.sha256));
    }
    match known(&row.id) {
        None if disk.size() >> 20 <= WHOLE_MIB => Outcome::Right("right".into()),
        Some(known) if known == pages => Outcome::Right("right".into()),
        Some(known) => Outcome::Wrong(format!("non-zero pages hash to {pages}, not {known}")),
        None if everything => Outcome::Right(format!("right; for corpus.tsv: {}\t{pages}", row.id)),
        None => Outcome::Skipped("too large; see FLATDISK_CORPUS_MIB".into()),
    }
}

/// A refusal says which file, and what about it.
fn refusal(row: &Row, error: &flatdisk::Error) -> Outcome {
    let text = error.to_string();
    // "must be refused: extent NAME absent"
    let missing = row.expected.split("extent ").nth(1).and_then(|t| t.strip_suffix(" absent"));
    let names_it = missing.is_none_or(|name| text.contains(name));
    match error.path().is_some() && names_it && !text.contains('\n') {
        true => Outcome::Right(format!("refused: {text}")),
        false => Outcome::Wrong(format!("is refused without saying where: {text}")),
    }
}

#[test]
fn foreign_images_read_as_their_makers_meant() {
    let Some(folder) = corpus::folder() else { return };
    let rows = corpus::rows(&folder);
    assert!(rows.len() >= 60, "the manifest has only {} rows", rows.len());
    let outcomes = in_parallel(&rows, |row| check(&folder, row));
    let (mut right, mut wrong) = (0, Vec::new());
    for (row, outcome) in rows.iter().zip(outcomes) {
        match outcome {
            Outcome::Right(how) => {
                right += 1;
                println!("{}: {how}", row.id);
            }
            Outcome::Skipped(why) => common::skip(format_args!("{}: {why}", row.id)),
            Outcome::Wrong(how) => wrong.push(format!("{} {how}", row.id)),
        }
    }
    println!("{right} of {} rows right", rows.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
