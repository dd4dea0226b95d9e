//! Every structure of an image as it lies in its files: what `info --structures` lists.
//!
//! Nothing here judges. A structure is listed with its place, its raw values and the state of its
//! checksum, and what cannot be read is listed as not there, with the reason: the rest follows all the
//! same. So a damaged image that does not open can still be looked at. Drivers read each place anew,
//! through none of what opening believes; a log that is to be replayed is listed, not applied.
//!
//! Memory is bounded by [`Listing::limit`], and reading is linear in the tables and headers of the files.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::Value;

use super::{Format, OpenContext, OpenOptions, by_extension, recognise};
use crate::codec;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Access, Host, Storage};

/// What the checksum of a structure says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Checksum {
    /// It is that of the bytes.
    Valid,
    /// It is another.
    Wrong,
    /// The structure has none.
    None,
}

/// One structure of a file.
#[derive(Debug, Clone, Serialize)]
pub struct Structure {
    /// What it is, in the words of its format's specification.
    pub name: String,
    /// The file, where it is not the image itself.
    #[serde(
        skip_serializing_if = "Option::is_none",
        serialize_with = "crate::names::some::serialize"
    )]
    pub file: Option<PathBuf>,
    /// Byte offset in the file: where it is, or where it should be.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Whether it is there: readable, and with its signature if it should have one.
    pub found: bool,
    /// What its checksum says.
    pub checksum: Checksum,
    /// Raw values in the order of the structure; of tables, counts.
    #[serde(serialize_with = "as_map")]
    pub fields: Vec<(String, Value)>,
    /// What is wrong with it, as far as reading it tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

fn as_map<S: Serializer>(
    fields: &[(String, Value)],
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(fields.len()))?;
    for (name, value) in fields {
        map.serialize_entry(name, value)?;
    }
    map.end()
}

impl Structure {
    /// One that is there.
    pub fn new(name: impl Into<String>, offset: u64, length: u64) -> Self {
        Self {
            name: name.into(),
            file: None,
            offset,
            length,
            found: true,
            checksum: Checksum::None,
            fields: Vec::new(),
            problem: None,
        }
    }

    /// One that is not there.
    pub fn absent(
        name: impl Into<String>,
        offset: u64,
        length: u64,
        why: impl Into<String>,
    ) -> Self {
        Self { found: false, ..Self::new(name, offset, length) }.problem(why)
    }

    /// Tells whether its checksum is right.
    #[must_use]
    pub fn sealed(mut self, valid: bool) -> Self {
        self.checksum = if valid { Checksum::Valid } else { Checksum::Wrong };
        self
    }

    /// Adds a raw value.
    #[must_use]
    pub fn field(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.fields.push((name.into(), value.into()));
        self
    }

    /// Adds what is wrong with it; the first thing counts.
    #[must_use]
    pub fn problem(mut self, what: impl Into<String>) -> Self {
        self.problem.get_or_insert_with(|| what.into());
        self
    }

    /// Says that what should hold its signature holds something else.
    #[must_use]
    pub fn without_signature(mut self) -> Self {
        self.found = false;
        self.problem("there is no signature")
    }
}

/// Structures in the order in which readers come to them.
#[derive(Debug, Serialize)]
pub struct Listing {
    /// `vhd`, `vhdx`, `vmdk`.
    pub format: &'static str,
    /// The structures.
    pub structures: Vec<Structure>,
    /// There are more than [`Self::limit`].
    pub truncated: bool,
    /// Most structures that are kept.
    #[serde(skip)]
    pub limit: usize,
    /// The file that structures lie in, where it is not the image itself.
    #[serde(skip)]
    pub(super) file: Option<PathBuf>,
}

impl Listing {
    /// Adds a structure; says whether there is room for more.
    pub fn add(&mut self, mut structure: Structure) -> bool {
        if self.full() {
            self.truncated = true;
            return false;
        }
        structure.file.clone_from(&self.file);
        self.structures.push(structure);
        true
    }

    /// Whether there is no room left.
    pub fn full(&self) -> bool {
        self.structures.len() >= self.limit
    }
}

/// Lists at most `limit` structures of the image at `path`. A file that no format claims is taken for
/// what its extension says.
///
/// # Errors
///
/// The file cannot be opened, or is no image by content or by name.
pub fn structures(
    host: &Arc<dyn Host>,
    path: &Path,
    options: &OpenOptions,
    limit: usize,
) -> Result<Listing> {
    let file = host.open(path, Access::Peek)?;
    let format: &dyn Format = match (recognise(&*file), by_extension(path)) {
        (Ok(format), _) => format,
        (Err(e), Some(format)) if e.kind() == ErrorKind::NotThisFormat => format,
        (Err(e), _) => return Err(e),
    };
    let options = OpenOptions { access: Access::Peek, ..options.clone() };
    let ctx = OpenContext::new(host, &*file, &options);
    let mut list = Listing {
        format: format.name(),
        structures: Vec::new(),
        truncated: false,
        limit,
        file: None,
    };
    format.structures(file, &ctx, &mut list).map_err(|e: Error| e.in_file(path))?;
    Ok(list)
}

/// Reads `N` bytes, or says why not.
pub(super) fn read<const N: usize>(
    file: &dyn Storage,
    at: u64,
) -> std::result::Result<[u8; N], String> {
    codec::read_array(file, at, "it").map_err(|e| e.what().to_owned())
}

/// Reads `len` bytes, which the caller has bounded, or says why not.
pub(super) fn read_vec(
    file: &dyn Storage,
    at: u64,
    len: usize,
) -> std::result::Result<Vec<u8>, String> {
    let mut bytes = vec![0; len];
    codec::read_exact(file, at, &mut bytes, "it").map_err(|e| e.what().to_owned())?;
    Ok(bytes)
}

/// Calls `entry` with each table entry of `N` bytes in `count` of them from byte `at` on, as far as the
/// file goes; how many that were.
pub(super) fn each_entry<const N: usize>(
    file: &dyn Storage,
    at: u64,
    count: u64,
    mut entry: impl FnMut(u64, [u8; N]),
) -> std::result::Result<u64, String> {
    const CHUNK: u64 = 1 << 16;
    let len = file.len().map_err(|e| e.to_string())?;
    let present = count.min(len.saturating_sub(at) / N as u64);
    let mut bytes = vec![0; (CHUNK.min(present) as usize) * N];
    for first in (0..present).step_by(CHUNK as usize) {
        let part = &mut bytes[..(CHUNK.min(present - first) as usize) * N];
        codec::read_exact(file, at + first * N as u64, part, "the table")
            .map_err(|e| e.what().to_owned())?;
        for (index, bytes) in part.as_chunks::<N>().0.iter().enumerate() {
            entry(first + index as u64, *bytes);
        }
    }
    Ok(present)
}

/// Bytes as hexadecimal digits, at most 64 of them.
pub(super) fn hex(bytes: &[u8]) -> String {
    const MOST: usize = 64;
    match bytes.get(..MOST) {
        Some(first) if bytes.len() > MOST => codec::hex(first) + "…",
        _ => codec::hex(bytes),
    }
}

/// Bytes as text, up to the first NUL.
pub(super) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// The lowest and highest of values, and how many there were.
#[derive(Debug, Default)]
pub(super) struct Spread {
    pub count: u64,
    range: Option<(u64, u64)>,
}

impl Spread {
    pub fn add(&mut self, value: u64) {
        self.count += 1;
        let (low, high) = self.range.unwrap_or((value, value));
        self.range = Some((low.min(value), high.max(value)));
    }

    /// The lowest value, null without one.
    pub fn lowest(&self) -> Value {
        self.range.map(|range| range.0).into()
    }

    /// The highest value, null without one.
    pub fn highest(&self) -> Value {
        self.range.map(|range| range.1).into()
    }
}
