//! Files of partitions: `disk.vhd.p1.img` beside `disk.vhd.img`.
//!
//! They show where the mount shows partitions (`-o partitions`), and for images that were opened so.
//! Partitions are known of images that were looked at: listing a small folder looks at all of its images,
//! in a large one the files of an image show when one of them, or the image's own, was looked up. An
//! image whose own name is that of a partition takes it.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use super::names::{found, strip_suffix};
use super::{DirEntry, Found, Kind, Node, Tree, What, not_found};
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::parts::{Part, View, split_name};
use crate::fuse::source::Place;
use crate::storage::FileIdentity;

impl What {
    /// The file `ino` of a partition of the disk `whole`.
    pub(super) fn part(whole: Arc<Node>, ino: u64, part: Part) -> Self {
        let view = Arc::new(View::new(ino, Some(part)));
        if let Some((image, _)) = whole.image() {
            image.divide();
            image.views.whole.reading();
            image.views.add(view.clone());
        }
        Self::Part(whole, view)
    }
}

impl Tree {
    /// The image's name, and the number of its partition, in the name of a partition's file.
    pub(super) fn part_name<'a>(&self, name: &'a OsStr) -> Option<(&'a OsStr, u32)> {
        let (base, number) = split_name(strip_suffix(name, &self.look.suffix)?.as_bytes())?;
        Some((OsStr::from_bytes(base), number))
    }

    fn part_shown(&self, base: &OsStr, part: &Part) -> OsString {
        let number = format!(".p{}", part.number);
        self.shown(&[base, OsStr::new(&number)].into_iter().collect::<OsString>())
    }

    /// The image in the root, and the number of its partition, that a name stands for.
    pub(super) fn pinned_part(&self, name: &OsStr) -> Option<(Place, u32)> {
        let (base, number) = self.part_name(name)?;
        let all = self.pinned.read();
        let pinned = all.get(&self.shown(base)).or(all.get(base))?;
        let shows = !pinned.folder && (pinned.partitions || self.look.partitions);
        shows.then(|| (pinned.place.clone(), number))
    }

    /// Partition `number` of the image at `place`.
    pub(super) fn find_part(&self, place: Place, number: u32) -> Result<Found> {
        let whole = found(place, Found::Image)?;
        let Found::Image(place, identity) = &whole else { return Err(not_found()) };
        let parts = self.parts_of(&whole, place)?;
        let part = parts.iter().find(|part| part.number == number).ok_or_else(not_found)?;
        Ok(Found::Part(place.clone(), *identity, part.clone()))
    }

    /// The partitions of an image, which is looked at if need be.
    fn parts_of(&self, whole: &Found, place: &Place) -> Result<Arc<[Part]>> {
        match self.known(whole).as_deref().and_then(Node::image) {
            Some((image, _)) => image.parts(&self.images, false),
            None => {
                let facts = self.images.examine(place).map_err(|_| not_found())?;
                Ok(facts.parts.clone().unwrap_or_default())
            }
        }
    }

    /// Adds the files of an image's partitions, which are called after `base`, to `entries`, as far as they
    /// are known.
    pub(super) fn part_entries(
        &self,
        place: &Place,
        identity: FileIdentity,
        base: &OsStr,
        entries: &mut Vec<DirEntry>,
    ) {
        let whole = Found::Image(place.clone(), identity);
        let open = self.known(&whole).filter(|node| node.needed());
        let parts = match open.as_deref().and_then(Node::image) {
            Some((image, _)) => image.parts(&self.images, false).ok(),
            None => self.images.known_parts(place),
        };
        for part in parts.iter().flat_map(|parts| parts.iter()) {
            let name = self.part_shown(base, part);
            let ino = Found::Part(place.clone(), identity, part.clone()).ino();
            entries.push(DirEntry { ino, kind: Kind::File, name });
        }
    }

    /// The name in the root of the image at `path`, where the user named it.
    pub fn pinned_name(&self, path: &Path) -> Option<OsString> {
        let real = std::fs::canonicalize(path).ok()?;
        let all = self.pinned.read();
        let named = all.iter().find(|(_, pinned)| !pinned.folder && pinned.place.path() == real);
        named.map(|(name, _)| name.clone())
    }

    /// Shows the partitions of the image that is `shown` in the root, and returns their names.
    pub fn show_partitions(&self, shown: &OsStr) -> Result<Vec<OsString>> {
        self.images.want_partitions();
        let place = {
            let mut pinned = self.pinned.write();
            let pinned = pinned.get_mut(shown).filter(|pinned| !pinned.folder);
            let pinned = pinned.ok_or_else(|| {
                Error::new(ErrorKind::NotFound, "only images opened by name show partitions")
            })?;
            pinned.partitions = true;
            pinned.place.clone()
        };
        let whole = found(place, Found::Image)?;
        let Found::Image(place, _) = &whole else { return Err(not_found()) };
        let base = strip_suffix(shown, &self.look.suffix).unwrap_or(shown);
        let parts = self.parts_of(&whole, place)?;
        Ok(parts.iter().map(|part| self.part_shown(base, part)).collect())
    }
}

/// Adds the files of partitions to the other entries of a directory, but for names that these have.
pub(super) fn add_parts(entries: &mut Vec<DirEntry>, mut parts: Vec<DirEntry>) {
    if !parts.is_empty() {
        let names: HashSet<_> = entries.iter().map(|entry| entry.name.as_os_str()).collect();
        parts.retain(|part| !names.contains(part.name.as_os_str()));
        entries.append(&mut parts);
    }
}
