//! Which files are a disk's own, and what they and the descriptor are called when the disk gets another
//! name.
//!
//! A disk's own files have its name but for an ending that says what they are: `disk-flat.vmdk`,
//! `disk-s001.vmdk`, `disk-ctk.vmdk` of `disk.vmdk`, in the same directory. Whatever else a descriptor names
//! may be another's, and keeps its name.

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
    ending(image, path).is_some_and(|ending| !is_record(&ending))
}

/// What the name of `path` has behind that of the disk at `image`, if it is one of the disk's own files.
fn ending(image: &Path, path: &Path) -> Option<String> {
    let (stem, name) = (image.file_stem()?.to_str()?, path.file_name()?.to_str()?);
    let (whole, role) = path.file_stem()?.to_str()?.rsplit_once('-')?;
    let numbered = role.strip_prefix(['s', 'f', 'S', 'F']).is_some_and(|number| {
        number.len() >= 3 && number.bytes().all(|byte| byte.is_ascii_digit())
    });
    let words = ["flat", "delta", "sesparse", "ctk"];
    let named = words.iter().any(|word| role.eq_ignore_ascii_case(word));
    let vmdk = path.extension().is_some_and(|end| end.eq_ignore_ascii_case("vmdk"));
    let beside = directory_of(path) == directory_of(image);
    let own = beside && vmdk && (numbered || named) && whole.to_lowercase() == stem.to_lowercase();
    own.then(|| name.get(whole.len()..).map(str::to_owned)).flatten()
}

/// Whether a file with this ending records changes, and holds nothing of the disk.
fn is_record(ending: &str) -> bool {
    ending.to_ascii_lowercase().starts_with("-ctk.")
}

/// Whether `path` is the disk's record of changes.
fn is_note(image: &Path, path: &Path) -> bool {
    ending(image, path).is_some_and(|ending| is_record(&ending))
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
            let renamed = format!("{stem}{}", ending(old, &path)?);
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
        let ending = |path: &str| ending(Path::new("/d/disk.vmdk"), Path::new(path));
        assert_eq!(ending("/d/disk-flat.vmdk").as_deref(), Some("-flat.vmdk"));
        assert_eq!(ending("/d/DISK-S001.VMDK").as_deref(), Some("-S001.VMDK"));
        assert_eq!(ending("/d/disk-ctk.vmdk").as_deref(), Some("-ctk.vmdk"));
        for other in
            ["/d/disk2-flat.vmdk", "/e/disk-flat.vmdk", "/d/disk-x.vmdk", "/d/disk-s1.vmdk"]
        {
            assert_eq!(ending(other), None, "{other}");
        }
        assert!(!is_part_of(Path::new("/d/disk.vmdk"), Path::new("/d/disk-ctk.vmdk")));
    }
}
