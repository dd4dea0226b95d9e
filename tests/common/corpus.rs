//! Images made by other programs, from the folder that `FLATDISK_CORPUS` names: a folder for each
//! case, files packed with zstd, and `manifest.tsv` with what is expected of each.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use flatdisk::disk::Disk;
use flatdisk::error::Result;
use flatdisk::formats::{self, OpenOptions};
use flatdisk::storage::memory::{MemoryFile, MemoryHost};
use flatdisk::storage::{Access, Host, Storage};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::images::Kind;
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
    let dir = super::folder();
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

/// An image of the corpus as a kind of image to write to.
#[derive(Clone)]
struct Foreign {
    name: String,
    path: PathBuf,
    /// The image and all that lies beside it.
    files: Arc<MemoryHost>,
}

impl Kind for Foreign {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn create(&self, host: &Arc<MemoryHost>) -> Result<()> {
        self.files.files().iter().for_each(|file| host.insert(file.fork()));
        Ok(())
    }

    fn open(&self, host: &Arc<dyn Host>, access: Access) -> Result<Arc<Disk>> {
        Ok(formats::open(host, &self.path, &OpenOptions::new(access))?.disk)
    }

    fn errors(&self, host: &Arc<dyn Host>) -> Result<Vec<String>> {
        super::images::errors(host, &self.path)
    }

    fn share(&self) -> usize {
        200
    }
}

/// The images of the corpus that can be written and do not hold too much for the time that a run
/// may take; none, said aloud, without a corpus.
pub fn kinds() -> Vec<Box<dyn Kind>> {
    static KINDS: OnceLock<Vec<Foreign>> = OnceLock::new();
    let kinds = KINDS.get_or_init(|| {
        let Some(folder) = folder() else { return Vec::new() };
        let patient = super::number("FLATDISK_CRASH_STATES", 0) > 1000;
        let limit = if patient { 64 << 20 } else { 3 << 20 };
        let rows: Vec<_> =
            rows(&folder).into_iter().filter(|row| row.expected == "opens").collect();
        let kinds = super::in_parallel(&rows, |row| writable(&folder, row, limit));
        kinds.into_iter().flatten().collect()
    });
    kinds.iter().map(|kind| Box::new(kind.clone()) as Box<dyn Kind>).collect()
}

/// A row's image, if it can be written and stores less than `limit` bytes.
fn writable(folder: &Path, row: &Row, limit: u64) -> Option<Foreign> {
    let unpacked = unpack(folder, row);
    let files = MemoryHost::new();
    for entry in fs::read_dir(unpacked.dir.path()).expect("a readable folder") {
        let path = entry.expect("a readable folder").path();
        files.insert(load(&path));
    }
    let host: Arc<dyn Host> = files.clone();
    let kind = Foreign { name: format!("corpus {}", row.id), path: unpacked.image, files };
    let disk = kind.open(&host, Access::Write).ok()?;
    let stored = super::crash::stored(&disk).ok()?;
    (disk.read_only().is_none() && stored < limit).then_some(kind)
}

/// A host file in memory, its zeroes as holes.
fn load(path: &Path) -> Arc<MemoryFile> {
    let bytes = fs::read(path).expect("a readable file");
    let file = MemoryFile::new(path, &[]);
    file.set_len(bytes.len() as u64).expect("memory takes all lengths");
    for (index, piece) in bytes.chunks(4096).enumerate() {
        if piece.iter().any(|byte| *byte != 0) {
            file.write_at(index as u64 * 4096, piece).expect("memory takes all writes");
        }
    }
    file
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
