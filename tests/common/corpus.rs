//! Images made by other programs, from the folder that `FLATDISK_CORPUS` names: a folder for each
//! case, files packed with zstd, and `manifest.tsv` with what is expected of each.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::tools;

/// One image of the corpus.
#[derive(Debug, Clone)]
pub struct Row {
    pub id: String,
    /// Path in the corpus, without `.zst`.
    pub path: PathBuf,
    /// `opens`, or why not.
    pub expected: String,
    pub virtual_size: u64,
    /// SHA-256 of the whole disk, lower-case hex.
    pub sha256: String,
}

/// Where the corpus is; says SKIPPED if it is not there.
pub fn folder() -> Option<PathBuf> {
    match std::env::var_os("FLATDISK_CORPUS") {
        Some(folder) => tools::have("zstd").then(|| folder.into()),
        None => {
            super::skip("FLATDISK_CORPUS names no corpus");
            None
        }
    }
}

/// The rows of the manifest.
pub fn rows(folder: &Path) -> Vec<Row> {
    let text = fs::read_to_string(folder.join("manifest.tsv")).expect("the corpus has a manifest");
    let mut lines = text.lines().map(|line| line.split('\t').collect::<Vec<_>>());
    let names = lines.next().expect("the manifest has a header");
    let column = |name| names.iter().position(|n| *n == name).expect("the manifest has the column");
    let columns = ["id", "path", "expected", "virtual_size", "sha256_content"].map(column);
    lines
        .map(|fields| {
            let [id, path, expected, size, sha256] = columns.map(|index| fields[index].to_owned());
            let path = path.into();
            Row { id, path, expected, virtual_size: size.parse().unwrap_or(0), sha256 }
        })
        .collect()
}

/// A case's files, unpacked.
pub struct Unpacked {
    /// Keeps the folder alive.
    pub dir: TempDir,
    /// The image itself.
    pub image: PathBuf,
}

/// Unpacks the folder of a row.
pub fn unpack(folder: &Path, row: &Row) -> Unpacked {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let case = folder.join(row.path.parent().expect("images lie in folders"));
    for entry in fs::read_dir(&case).expect("the case is there") {
        let from = entry.expect("a readable folder").path();
        let name = from.file_name().expect("a file has a name").to_owned();
        match from.extension() {
            Some(extension) if extension == "zst" => {
                tools::unpack(&from, &dir.path().join(name).with_extension(""));
            }
            _ => drop(fs::copy(&from, dir.path().join(name)).expect("a copy")),
        }
    }
    let image = dir.path().join(row.path.file_name().expect("images have names"));
    Unpacked { dir, image }
}

/// SHA-256 of every file in a folder.
pub fn hashes(dir: &Path) -> BTreeMap<PathBuf, String> {
    let files = fs::read_dir(dir).expect("a readable folder");
    files
        .map(|entry| {
            let path = entry.expect("a readable folder").path();
            let mut hasher = Sha256::new();
            let mut file = fs::File::open(&path).expect("a readable file");
            std::io::copy(&mut file, &mut hasher).expect("a readable file");
            (path, hex(&hasher.finalize()))
        })
        .collect()
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
