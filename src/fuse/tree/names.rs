//! Names: what a directory holds, and what the user pinned to the root.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::partitions::add_parts;
use super::pinned::{Answer, GLANCE, Pinned};
use super::{
    Attributes, DirEntry, EXAMINED, Found, Handle, Kind, MAX_LISTINGS, Node, PROBLEM_SUFFIX, ROOT,
    Tree, What, not_a_folder, not_found,
};
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::crew::Crew;
use crate::fuse::image::stale;
use crate::fuse::listing::{ImageEntry, Listing};
use crate::fuse::source::{Place, Source, normalise};
use crate::storage::remembered::identity;
use crate::storage::{FileIdentity, archive};

/// How long each of very many files may take to say whether it is an image.
const PER_FILE: Duration = Duration::from_millis(1);

impl Tree {
    /// Refuses a source directory that the mount would cover.
    pub(super) fn refuse_own(&self, path: &Path) -> Result<()> {
        if path.starts_with(&self.look.mountpoint) {
            return Err(Error::invalid("the mount point would cover this source")
                .in_file(path)
                .hint("mount somewhere else"));
        }
        Ok(())
    }

    pub(super) fn pin_source(&mut self, source: &Path) -> Result<()> {
        let failed = |e: io::Error| Error::io("open", &e).in_file(source);
        let absolute = std::path::absolute(source).map_err(failed)?;
        let meta = std::fs::metadata(&absolute).map_err(failed)?;
        let real = std::fs::canonicalize(&absolute).map_err(failed)?;
        let name = absolute.file_name().or(real.file_name()).unwrap_or(OsStr::new("root"));
        let (shown, pinned) = if meta.is_dir() {
            let place = Place::top(Source::open(&real)?);
            (name.to_owned(), Pinned::new(place, true))
        } else if archive::has_name(&real) {
            let place = place_of(&real)?;
            place.archive()?;
            (name.to_owned(), Pinned::new(place, true))
        } else {
            let place = place_of(&real)?;
            // Named by the user, so that it is no image is an error of the whole mount.
            self.images.examine(&place)?;
            (self.shown(name), Pinned::new(place, false))
        };
        self.refuse_own(&real)?;
        if let Some(other) = self.pinned.get_mut().insert(shown.clone(), pinned) {
            let what = format!(
                "{} and {} would both be `{}`",
                other.place.path().display(),
                source.display(),
                shown.display()
            );
            return Err(Error::new(ErrorKind::Exists, what).hint("mount them separately"));
        }
        Ok(())
    }

    /// The name under which an image called `name` shows.
    pub(super) fn shown(&self, name: &OsStr) -> OsString {
        [name, &self.look.suffix].into_iter().collect()
    }

    /// The listing of a mirrored directory, read again only if the directory changed.
    pub(super) fn listing(&self, folder: &Place) -> Result<Arc<Listing>> {
        let path = folder.path();
        let failed = |e: io::Error| Error::io("list", &e).in_file(&path);
        let meta = folder.stat().map_err(failed)?;
        if let Some(listing) = self.listings.lock().get(&path)
            && listing.current(&meta)
        {
            return Ok(listing.clone());
        }
        let listing = Arc::new(folder.list(&self.look.mountpoint)?);
        let mut listings = self.listings.lock();
        if listings.len() >= MAX_LISTINGS {
            listings.clear();
        }
        listings.insert(path, listing.clone());
        Ok(listing)
    }

    pub(super) fn find(&self, parent: &Node, name: &OsStr) -> Result<Found> {
        let folder = match &parent.what {
            What::Root => match self.find_pinned(name)? {
                Some(found) => return Ok(found),
                None => self.mirror.as_ref().ok_or_else(not_found)?,
            },
            What::Folder(place) => place,
            _ => return Err(not_a_folder()),
        };
        let listing = self.listing(folder)?;
        let beneath = |name: &OsStr| folder.elsewhere(folder.relative.join(name));
        if let Some(place) = strip_suffix(name, &self.look.suffix)
            .and_then(|base| image_called(folder, &listing, base))
            && self.images.examine(&place).is_ok()
        {
            return found(place, Found::Image);
        }
        if let Some(base) = strip_suffix(name, PROBLEM_SUFFIX.as_ref()) {
            if let Some(place) = image_called(folder, &listing, base)
                && self.images.examine(&place).is_err()
            {
                return found(place, Found::Problem);
            }
            if listing.archives.contains_key(base) && self.listing(&beneath(base)).is_err() {
                return found(beneath(base), Found::Problem);
            }
        }
        let archive = listing.archives.contains_key(name);
        if listing.folders.contains_key(name) || archive && self.listing(&beneath(name)).is_ok() {
            return found(beneath(name), Found::Folder);
        }
        if self.look.partitions
            && let Some((base, number)) = self.part_name(name)
            && let Some(place) = image_called(folder, &listing, base)
        {
            return self.find_part(place, number);
        }
        Err(not_found())
    }

    /// The files of a listing that are images although their names do not say so. What does not answer now
    /// is none.
    pub(super) fn others(&self, folder: &Place, listing: &Listing) -> Vec<(OsString, ImageEntry)> {
        let things: Vec<_> = listing.others.iter().map(|(n, e)| (n.clone(), e.clone())).collect();
        let place = folder.clone();
        let crew = Crew::start(things, move |(_, entry)| place.image(entry).is_image());
        crew.wait(GLANCE.max(PER_FILE * u32::try_from(listing.others.len()).unwrap_or(u32::MAX)));
        let looked = crew.end().into_iter();
        looked.filter_map(|(other, image)| image.unwrap_or(false).then_some(other)).collect()
    }

    fn find_pinned(&self, name: &OsStr) -> Result<Option<Found>> {
        let (pinned, base) = {
            let all = self.pinned.read();
            let exact = all.get(name).cloned();
            let base = strip_suffix(name, PROBLEM_SUFFIX.as_ref()).and_then(|base| {
                Some((base, all.get(&self.shown(base)).or(all.get(base))?.clone()))
            });
            (exact, base)
        };
        if let Some(Pinned { place, folder, .. }) = pinned {
            if folder {
                return found(place, Found::Folder).map(Some);
            }
            if self.images.examine(&place).is_ok() {
                return found(place, Found::Image).map(Some);
            }
        }
        if let Some((_, Pinned { place, folder: false, .. })) = base
            && self.images.examine(&place).is_err()
        {
            return found(place, Found::Problem).map(Some);
        }
        if let Some((place, number)) = self.pinned_part(name) {
            return self.find_part(place, number).map(Some);
        }
        Ok(None)
    }

    /// Opens a directory: its entries as they are now.
    pub fn open_folder(&self, ino: u64) -> Result<u64> {
        let node = self.node(ino)?;
        let mut entries = vec![
            DirEntry { ino, kind: Kind::Folder, name: ".".into() },
            DirEntry { ino: ROOT, kind: Kind::Folder, name: "..".into() },
        ];
        let mut parts = Vec::new();
        match &node.what {
            What::Root => {
                self.pinned_entries(&mut entries, &mut parts);
                if let Some(place) = &self.mirror {
                    self.mirrored_entries(place, &mut entries, &mut parts)?;
                }
            }
            What::Folder(place) => self.mirrored_entries(place, &mut entries, &mut parts)?,
            _ => return Err(not_a_folder()),
        }
        add_parts(&mut entries, parts);
        Ok(self.new_handle(Handle::Folder(entries.into())))
    }

    fn pinned_entries(&self, entries: &mut Vec<DirEntry>, parts: &mut Vec<DirEntry>) {
        let crew = self.ask_pinned();
        crew.wait(GLANCE);
        for ((shown, pinned), answer) in crew.end() {
            let Pinned { place, folder, partitions, .. } = pinned;
            let kind = if folder { Kind::Folder } else { Kind::File };
            let make = if folder { Found::Folder } else { Found::Image };
            let Some(Answer { identity, facts }) = answer.flatten() else {
                // It does not answer now: only its name is known.
                let found = make(place, FileIdentity { device: 0, inode: 0, part: 0 });
                entries.push(DirEntry { ino: found.ino(), kind, name: shown });
                continue;
            };
            let Ok(identity) = identity else { continue };
            let base = strip_suffix(&shown, &self.look.suffix).unwrap_or(&shown);
            if !folder && facts.is_none_or(|facts| facts.is_err()) {
                let name = [base, PROBLEM_SUFFIX.as_ref()].into_iter().collect();
                let ino = Found::Problem(place, identity).ino();
                entries.push(DirEntry { ino, kind, name });
                continue;
            }
            if !folder && (partitions || self.look.partitions) {
                self.part_entries(&place, identity, base, parts);
            }
            entries.push(DirEntry { ino: make(place, identity).ino(), kind, name: shown });
        }
    }

    fn mirrored_entries(
        &self,
        folder: &Place,
        entries: &mut Vec<DirEntry>,
        part_entries: &mut Vec<DirEntry>,
    ) -> Result<()> {
        let listing = self.listing(folder)?;
        let others = self.others(folder, &listing);
        let places = || {
            let others = others.iter().map(|(name, entry)| (name, entry));
            let images = listing.images.iter().chain(others);
            images.map(|(name, e)| (name, folder.image(e), e.identity))
        };
        // Parts of images that only the image itself names.
        let mut parts = HashSet::new();
        if listing.images.len() + others.len() <= EXAMINED {
            let looked = self.facts_of(places().map(|(_, place, _)| place).collect());
            for facts in looked.into_iter().flatten().flatten() {
                parts.extend(facts.files[1..].iter().cloned());
            }
        }
        for (name, place, identity) in places() {
            if parts.contains(&place.path()) {
                continue;
            }
            let (found, name) = if self.images.known_bad(&place) {
                let name = [name, OsStr::new(PROBLEM_SUFFIX)].into_iter().collect();
                (Found::Problem(place, identity), name)
            } else {
                if self.look.partitions {
                    self.part_entries(&place, identity, name, part_entries);
                }
                (Found::Image(place, identity), self.shown(name))
            };
            entries.push(DirEntry { ino: found.ino(), kind: Kind::File, name });
        }
        let looked_at = listing.archives.len() <= EXAMINED;
        for (name, identity) in listing.folders.iter().chain(&listing.archives) {
            let place = folder.elsewhere(folder.relative.join(name));
            let archive = looked_at && listing.archives.contains_key(name);
            if archive && self.listing(&place).is_err() {
                let ino = Found::Problem(place, *identity).ino();
                let name = [name, OsStr::new(PROBLEM_SUFFIX)].into_iter().collect();
                entries.push(DirEntry { ino, kind: Kind::File, name });
                continue;
            }
            let ino = Found::Folder(place, *identity).ino();
            entries.push(DirEntry { ino, kind: Kind::Folder, name: name.clone() });
        }
        Ok(())
    }

    /// The entries of an open directory.
    pub fn entries(&self, handle: u64) -> Result<Arc<[DirEntry]>> {
        match self.handles.lock().get(&handle) {
            Some(Handle::Folder(entries)) => Ok(entries.clone()),
            _ => Err(stale()),
        }
    }

    /// Ends the use of a directory.
    pub fn release_folder(&self, handle: u64) {
        self.handles.lock().remove(&handle);
    }

    /// Shows the image at `path` in the root as `name`, or under its own name; an archive as a folder of its disks.
    pub fn pin(&self, path: &Path, name: Option<&OsStr>) -> Result<OsString> {
        let absolute = normalise(path).filter(|_| path.is_absolute());
        let absolute = absolute
            .ok_or_else(|| Error::invalid("an absolute path is needed here").in_file(path))?;
        self.refuse_own(&absolute)?;
        let failed = |e: io::Error| Error::io("open", &e).in_file(path);
        let real = std::fs::canonicalize(&absolute).map_err(failed)?;
        self.refuse_own(&real)?;
        let folder = archive::has_name(&real);
        let shown = match (name, absolute.file_name()) {
            (Some(name), _) => name.to_owned(),
            (None, Some(own)) if folder => own.to_owned(),
            (None, Some(own)) => self.shown(own),
            (None, None) => return Err(Error::invalid("not a file").in_file(path)),
        };
        let exists = || {
            let what = format!("`{}` is there already", shown.display());
            Error::new(ErrorKind::Exists, what)
        };
        let root = self.node(ROOT)?;
        if self.find(&root, &shown).is_ok() {
            return Err(exists());
        }
        let place = place_of(&real)?;
        if folder {
            place.archive()?;
        } else {
            self.images.examine(&place)?;
        }
        let mut pinned = self.pinned.write();
        if pinned.contains_key(&shown) {
            return Err(exists());
        }
        pinned.insert(shown.clone(), Pinned::new(place, folder));
        Ok(shown)
    }

    /// `ln -s`: shows the image at `target` as `name`, and answers with the symlink that the kernel
    /// expects; the next lookup finds the flat file.
    pub fn link(&self, parent: u64, name: &OsStr, target: &Path) -> Result<Attributes> {
        if parent != ROOT {
            return Err(Error::new(ErrorKind::ReadOnly, "images open in the root only"));
        }
        let target = if target.is_absolute() {
            target.to_owned()
        } else {
            self.look.mountpoint.join(target)
        };
        self.pin(&target, Some(name))?;
        let mut hasher = DefaultHasher::new();
        (3u8, name, &target, self.next_handle.fetch_add(1, Ordering::Relaxed)).hash(&mut hasher);
        let mut nodes = self.nodes.write();
        let mut ino = (hasher.finish() >> 1).max(ROOT + 1);
        while nodes.contains_key(&ino) {
            ino += 1;
        }
        let node = Node { ino, what: What::Link(target), lookups: AtomicU64::new(1) };
        let attributes = self.attributes_of(&node);
        nodes.insert(ino, Arc::new(node));
        attributes
    }

    /// `rm`, and `rmdir` for an archive: takes what the user named out of the root. The file itself stays.
    pub fn unpin(&self, parent: u64, name: &OsStr) -> Result<()> {
        let parent = self.node(parent)?;
        let found = self.find(&parent, name)?;
        let read_only =
            || Error::new(ErrorKind::ReadOnly, "only images opened by name can be closed");
        let (ino, place) = match &found {
            Found::Image(place, _) | Found::Problem(place, _) => (found.ino(), place.path()),
            Found::Folder(place, _) if place.stat().is_ok_and(|meta| meta.is_file()) => {
                (found.ino(), place.path())
            }
            Found::Folder(..) | Found::Part(..) => return Err(read_only()),
        };
        if parent.ino != ROOT {
            return Err(read_only());
        }
        if self.nodes.read().values().any(|node| node.in_use_beneath(&place)) {
            return Err(Error::new(ErrorKind::Busy, "a disk in it is open").in_file(&place));
        }
        let mut pinned = self.pinned.write();
        let key = pinned.iter().find(|(key, pinned)| {
            pinned.place.path() == place && (*key == name || matches!(found, Found::Problem(..)))
        });
        let key = key.map(|(key, _)| key.clone()).ok_or_else(read_only)?;
        if let Ok(node) = self.node(ino)
            && let What::Image(image) = &node.what
        {
            if image.in_use() {
                return Err(Error::new(ErrorKind::Busy, "the file is open").in_file(&place));
            }
            // Nothing but a throw-away layer is open without users.
            image.shut(&self.images)?;
            self.forget(ino, 0);
        }
        if let Some(pinned) = pinned.remove(&key) {
            self.images.throw_away(&pinned.place, None);
        }
        Ok(())
    }
}

/// The image of a folder that has this name: one that looks like one by its name, or by its contents.
fn image_called(folder: &Place, listing: &Listing, name: &OsStr) -> Option<Place> {
    if let Some(entry) = listing.images.get(name) {
        return Some(folder.image(entry));
    }
    if !listing.others.contains_key(name) && !listing.incomplete {
        return None;
    }
    let place = folder.elsewhere(folder.relative.join(name));
    place.is_image().then_some(place)
}

/// The place of a file by its real path.
fn place_of(real: &Path) -> Result<Place> {
    match (real.parent(), real.file_name()) {
        (Some(dir), Some(name)) => Ok(Place::top(Source::open(dir)?).elsewhere(name.into())),
        _ => Err(Error::invalid("not a file").in_file(real)),
    }
}

pub(super) fn found(place: Place, make: fn(Place, FileIdentity) -> Found) -> Result<Found> {
    let meta = place.stat().map_err(|e| Error::io("stat", &e).in_file(&place.path()))?;
    Ok(make(place, identity(&meta)))
}

pub(super) fn strip_suffix<'a>(name: &'a OsStr, suffix: &OsStr) -> Option<&'a OsStr> {
    name.as_bytes().strip_suffix(suffix.as_bytes()).map(OsStr::from_bytes)
}
