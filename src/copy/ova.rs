//! Making an OVA: an archive with a description, a manifest and one stream-optimised disk.
//!
//! ```text
//! description  16 KiB, filled up with blanks | manifest | disk, as long as it gets | two empty blocks
//! ```
//!
//! VMware's tools want the description first, which tells the disk's length, and the manifest its digest: so
//! the room of both is left free, the disk is written in one go behind it, and they are filled in last. Blanks
//! behind the envelope leave room to edit it in place.
//!
//! The archive is made under a temporary name, synced, and gets its own name when it is complete.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::convert::{From, Options};
use super::pipeline::{self, Copying};
use super::stream::StreamSink;
use crate::codec::hex;
use crate::error::{Error, Result, ResultExt};
use crate::formats::ova::descriptor::{Machine, envelope};
use crate::formats::{CreateSpec, vmdk};
use crate::progress::Progress;
use crate::storage::archive::tar::{self, BLOCK};
use crate::storage::{Host, Storage};

/// Bytes of the description, blanks included.
const DESCRIPTION: u64 = 16 << 10;

/// Names of the members are the archive's, and no longer than headers have room for.
const MAX_STEM: usize = 80;

/// What is written to a file from one place on, and its digest.
struct Hashed<'a> {
    file: &'a dyn Storage,
    at: u64,
    len: u64,
    digest: Sha256,
}

impl Write for Hashed<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.file.write_at(self.at + self.len, data)?;
        self.digest.update(data);
        self.len += data.len() as u64;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Names of the members of an archive that is called `path`.
fn stem_of(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let plain = |c: char| c.is_alphanumeric() || "-_.".contains(c);
    let stem: String = stem.chars().map(|c| if plain(c) { c } else { '_' }).collect();
    let end = (0..=MAX_STEM.min(stem.len())).rev().find(|end| stem.is_char_boundary(*end));
    match stem[..end.unwrap_or(0)].trim_start_matches('.') {
        "" => "disk".to_owned(),
        stem => stem.to_owned(),
    }
}

/// Writes the archive that is to be called `path` with the disk `from`, and says what could not be read.
pub(super) fn write(
    host: &Arc<dyn Host>,
    from: &From<'_>,
    path: &Path,
    spec: &CreateSpec,
    options: &Options<'_>,
    level: u32,
    progress: &dyn Progress,
) -> Result<Vec<std::ops::Range<u64>>> {
    let file = host.create(path)?;
    let failed = |e: io::Error| Error::io("write", &e).in_file(path);
    let stem = stem_of(path);
    let [ovf, mf] = ["ovf", "mf"].map(|ext| format!("{stem}.{ext}"));
    let disk = format!("{stem}-disk1.vmdk");
    // The manifest takes one block: two lines with digests of 64 digits and names of at most 85 bytes.
    let manifest_at = BLOCK + DESCRIPTION;
    let disk_at = manifest_at + 2 * BLOCK;
    let out = Hashed { file: &*file, at: disk_at + BLOCK, len: 0, digest: Sha256::new() };
    let writer = vmdk::begin_stream(out, Path::new(&disk), spec)?;
    let sink = StreamSink::new(writer, level);
    let how = Copying { salvage: options.salvage };
    let lost = pipeline::run(from.source, 0..from.source.size(), &sink, how, progress);
    let lost = lost.in_file(path)?;
    let written = sink.finish().in_file(path)?;
    let (len, digest) = (written.len, written.digest);
    let end = (disk_at + BLOCK + len).next_multiple_of(BLOCK) + 2 * BLOCK;
    file.set_len(end).map_err(failed)?;

    let machine = Machine { name: &stem, file: &disk, file_size: len, capacity: spec.size };
    let mut description = envelope(&machine).into_bytes();
    let room = DESCRIPTION as usize;
    if description.len() > room {
        return Err(Error::invalid("the name is too long").in_file(path));
    }
    description.resize(room, b' ');
    let manifest = format!(
        "SHA256({ovf})= {}\nSHA256({disk})= {}\n",
        hex(&Sha256::digest(&description)),
        hex(&digest.finalize())
    );
    let parts = [
        (0, ovf, DESCRIPTION, &description[..]),
        (manifest_at, mf, manifest.len() as u64, manifest.as_bytes()),
        (disk_at, disk, len, &[]),
    ];
    for (at, name, size, contents) in parts {
        let header = tar::encode(&name, size, 0);
        let header = header.ok_or_else(|| Error::invalid("the name is too long").in_file(path))?;
        file.write_at(at, &header).map_err(failed)?;
        file.write_at(at + BLOCK, contents).map_err(failed)?;
    }
    crate::disk::sync_file(&*file)?;
    Ok(lost)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_have_names_that_every_program_takes() {
        for (path, stem) in [
            ("/a/server.ova", "server"),
            ("Ünïcode (1).ova", "Ünïcode__1_"),
            ("../.hidden.ova", "hidden"),
            (".ova", "ova"),
            ("a\nb.ova", "a_b"),
        ] {
            assert_eq!(stem_of(Path::new(path)), stem, "{path}");
        }
        let long = format!("{}.ova", "ü".repeat(200));
        assert!(stem_of(Path::new(&long)).len() <= MAX_STEM);
    }
}
