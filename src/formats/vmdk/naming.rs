//! Which files are a disk's own, and what they and the descriptor are called when the disk gets another
//! name.
//!
//! A disk's own files have its name but for an ending that says what they are: `disk-flat.vmdk`,
//! `disk-s001.vmdk`, `disk-ctk.vmdk` of `disk.vmdk`, in the same directory. Whatever else a descriptor names
//! may be another's, and keeps its name.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::create::{base_name, file_name};
use super::descriptor::{Descriptor, ExtentAccess};
use super::layout::{FLAG_COMPRESSED, Header};
use super::link::find_descriptor;
use super::relink::rewrite;
use crate::error::Result;
use crate::formats::places::directory_of;
use crate::formats::{Naming, OpenContext, references};
use crate::storage::Storage;

/// Whether `path` has the name that an extent of the disk with the descriptor at `image` gets when it is
/// made: the same but for `-s001`, `-flat` and the like, in the same directory.
pub fn is_part_of(image: &Path, path: &Path) -> bool {
    ending(image, path).is_some_and(|(_, role)| role == Role::Extent)
}

/// What a file is to the disk whose name its own begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Holds a part of it.
    Extent,
    /// Records its changes, and holds nothing of it.
    Record,
    /// Leads to a device.
    DeviceMap,
}

/// Takes the name of a file that belongs to a disk in several files apart: `disk`, `-flat.vmdk` and the role.
pub fn take_apart(name: &OsStr) -> Option<(&[u8], &str, Role)> {
    let name = name.as_bytes();
    let dash = name.iter().rposition(|byte| *byte == b'-')?;
    let (whole, ending) = name.split_at(dash);
    let ending = str::from_utf8(ending).ok()?;
    let (role, extension) = ending[1..].split_once('.')?;
    let numbered = role.strip_prefix(['s', 'f', 'S', 'F']).is_some_and(|number| {
        number.len() >= 3 && number.bytes().all(|byte| byte.is_ascii_digit())
    });
    let one_of = |words: &[&str]| words.iter().any(|word| role.eq_ignore_ascii_case(word));
    let role = match () {
        () if !extension.eq_ignore_ascii_case("vmdk") => return None,
        () if numbered || one_of(&["flat", "delta", "sesparse"]) => Role::Extent,
        () if one_of(&["ctk"]) => Role::Record,
        () if one_of(&["rdm", "rdmp"]) => Role::DeviceMap,
        () => return None,
    };
    Some((whole, ending, role))
}

/// What the name of `path` has behind that of the disk at `image`, and the role that tells, if it is one of
/// the disk's own files.
fn ending(image: &Path, path: &Path) -> Option<(String, Role)> {
    let (whole, ending, role) = take_apart(path.file_name()?)?;
    let (stem, whole) = (image.file_stem()?.to_str()?, str::from_utf8(whole).ok()?);
    let own = role != Role::DeviceMap
        && directory_of(path) == directory_of(image)
        && whole.to_lowercase() == stem.to_lowercase();
    own.then(|| (ending.to_owned(), role))
}

/// Whether `path` is the disk's record of changes.
fn is_note(image: &Path, path: &Path) -> bool {
    ending(image, path).is_some_and(|(_, role)| role == Role::Record)
}

/// What takes part when the disk with the descriptor in `file` gets the name of `new`.
pub fn naming(file: &Arc<dyn Storage>, new: &Path) -> Result<Naming> {
    let found = find_descriptor(file)?.file;
    let embedded = found.at > 0;
    let names = Names::new(file.path(), new, &found.descriptor, embedded)?;
    // What is compressed is written once.
    let inside = embedded && Header::read(&**file, 0)?.flags & FLAG_COMPRESSED == 0;
    let text = if embedded { None } else { Some(names.text(&found.descriptor)?) };
    let (notes, parts) = names.parts.into_iter().partition(|(path, _)| is_note(file.path(), path));
    Ok(Naming { parts, notes, text, inside })
}

/// Makes the disk whose descriptor is embedded in `file` call itself `new`.
pub fn call_itself(file: &Arc<dyn Storage>, ctx: &OpenContext, new: &Path) -> Result<()> {
    rewrite(file, ctx, |descriptor| {
        Names::new(file.path(), new, descriptor, true)?.text(descriptor)
    })
}

/// The files of a disk, and what they are going to be called.
struct Names {
    parts: Vec<(PathBuf, PathBuf)>,
    /// New names in the descriptor: of extents by their index.
    extents: Vec<(usize, String)>,
    /// That of the record of changes.
    record: Option<String>,
}

impl Names {
    fn new(old: &Path, new: &Path, descriptor: &Descriptor, embedded: bool) -> Result<Self> {
        let (own, stem) = (file_name(new)?, base_name(new)?);
        let mut names = Self { parts: Vec::new(), extents: Vec::new(), record: None };
        let mut part = |name: &str| {
            let path = directory_of(old).join(references::beneath(name).ok()?);
            let renamed = format!("{stem}{}", ending(old, &path)?.0);
            let moved = (path, new.with_file_name(&renamed));
            if !names.parts.contains(&moved) {
                names.parts.push(moved);
            }
            Some(renamed)
        };
        for (index, extent) in descriptor.extents.iter().enumerate() {
            if embedded && index == 0 {
                names.extents.push((0, own.clone()));
                continue;
            }
            let written = extent.access == ExtentAccess::ReadWrite;
            if let Some(name) = extent.name.as_deref().filter(|_| written).and_then(&mut part) {
                names.extents.push((index, name));
            }
        }
        names.record = descriptor.get("changeTrackPath").and_then(part);
        Ok(names)
    }

    fn text(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        descriptor.with_names(&self.extents, self.record.as_deref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_files_are_told_from_others_by_name_and_place() {
        let ending = |path: &str| {
            ending(Path::new("/d/disk.vmdk"), Path::new(path)).map(|(ending, _)| ending)
        };
        assert_eq!(ending("/d/disk-flat.vmdk").as_deref(), Some("-flat.vmdk"));
        assert_eq!(ending("/d/DISK-S001.VMDK").as_deref(), Some("-S001.VMDK"));
        assert_eq!(ending("/d/disk-ctk.vmdk").as_deref(), Some("-ctk.vmdk"));
        for other in [
            "/d/disk2-flat.vmdk",
            "/e/disk-flat.vmdk",
            "/d/disk-x.vmdk",
            "/d/disk-s1.vmdk",
            "/d/disk-rdm.vmdk",
        ] {
            assert_eq!(ending(other), None, "{other}");
        }
        assert!(!is_part_of(Path::new("/d/disk.vmdk"), Path::new("/d/disk-ctk.vmdk")));
    }
}
