//! How the blocks of an image lie, and how small its disk may become: a part of `info` that reads all tables.

use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use super::compact::{percent, won};
use super::output::iec;
use super::size::{Contents, UNKNOWN};
use crate::error::Result;
use crate::formats::compact::{Compacting, compact};
use crate::formats::{self, OpenOptions};
use crate::storage::{Access, Host};

/// What is known of an image's layout. Field names are stable; sizes are in bytes.
#[derive(Debug, Serialize)]
pub struct Layout {
    /// The smallest size for `resize --shrink --move-gpt`: where partitions, or the file system, end.
    minimum_size: Option<u64>,
    /// Why that is not known.
    minimum_size_unknown: Option<String>,
    #[serde(flatten)]
    blocks: Option<Blocks>,
    /// Why it is not known how the blocks lie.
    blocks_unknown: Option<String>,
}

#[derive(Debug, Serialize)]
struct Blocks {
    /// Blocks that are stored.
    blocks: u64,
    /// Those whose data begins at a multiple of 4 KiB of the file.
    aligned_blocks: u64,
    /// Of a thousand blocks how many do not follow the one before them on the disk.
    fragmentation: u64,
    /// What `compact --quick` would win.
    compact_quick_wins: u64,
}

impl Layout {
    /// Of the image at `path`. What cannot be found out is no error.
    pub fn of(host: &Arc<dyn Host>, path: &Path, options: &OpenOptions) -> Self {
        let minimum = minimum(host, path, options);
        let blocks = Blocks::of(host, path, options);
        Self {
            minimum_size: minimum.as_ref().ok().copied().flatten(),
            minimum_size_unknown: match &minimum {
                Ok(Some(_)) => None,
                Ok(None) => Some(UNKNOWN.to_owned()),
                Err(e) => Some(e.to_string()),
            },
            blocks_unknown: blocks.as_ref().err().map(ToString::to_string),
            blocks: blocks.ok(),
        }
    }

    /// Names and values to be printed.
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        let unknown = |why: &Option<String>| format!("unknown: {}", why.as_deref().unwrap_or(""));
        let minimum = match self.minimum_size {
            Some(size) => format!("{} ({size} bytes)", iec(size)),
            None => unknown(&self.minimum_size_unknown),
        };
        let mut rows = vec![("minimum size", minimum)];
        let Some(blocks) = &self.blocks else {
            rows.push(("layout", unknown(&self.blocks_unknown)));
            return rows;
        };
        let aligned = format!("{} of {}", blocks.aligned_blocks, blocks.blocks);
        rows.push(("fragmentation", percent(blocks.fragmentation)));
        rows.push(("at whole 4 KiB", format!("{aligned} blocks")));
        rows.push(("to be won quickly", iec(blocks.compact_quick_wins)));
        rows
    }
}

impl Blocks {
    fn of(host: &Arc<dyn Host>, path: &Path, options: &OpenOptions) -> Result<Self> {
        let how = Compacting { quick: true, dry_run: true, ..Compacting::default() };
        let would = compact(host, path, options, how, &())?;
        Ok(Self {
            blocks: would.blocks_before,
            aligned_blocks: would.aligned_before,
            fragmentation: would.fragmentation_before,
            compact_quick_wins: won(&would),
        })
    }
}

/// The smallest size that the disk may have, if anything tells.
fn minimum(host: &Arc<dyn Host>, path: &Path, options: &OpenOptions) -> Result<Option<u64>> {
    let options = OpenOptions { access: Access::Peek, ..options.clone() };
    let disk = formats::open(host, path, &options)?.disk;
    Ok(Contents::of(&disk)?.used().map(|used| used.min(disk.size())))
}
