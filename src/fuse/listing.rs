//! What a directory shows: [`Listing`].
//!
//! Names decide what is a possible image, a folder and an archive; nothing is opened for it. All other files
//! may be images too, whatever they are called: whether one is, its first and last bytes tell when somebody
//! asks ([`Place::is_image`]), once as long as it does not change. An archive is listed as a directory is.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use nix::dir::Dir;
use nix::fcntl::OFlag;

use super::source::Place;
use crate::error::{Error, Result};
use crate::formats::{self, Probe};
use crate::storage::archive::{self, Archive};
use crate::storage::remembered::{Remembered, Stamp};
use crate::storage::staged::is_unfinished;
use crate::storage::{Access, FileIdentity, Host};

/// Most descriptors of a folder, and bytes of each, that are searched for parts in folders below.
const MAX_DESCRIPTORS: usize = 256;
const MAX_DESCRIPTOR: u64 = 64 << 10;

/// Files of one folder that are looked at because their names say nothing. In larger ones such an image shows
/// when it is asked for by its name.
const MAX_OTHERS: usize = 1 << 16;

/// Whether files are images, whatever they are called.
static IMAGES: LazyLock<Remembered<bool>> = LazyLock::new(|| Remembered::new(1 << 18));

/// The extents that descriptors list.
static EXTENTS: LazyLock<Remembered<Arc<[PathBuf]>>> = LazyLock::new(|| Remembered::new(1 << 12));

impl Place {
    /// What the directory or archive here shows; whatever lies under `skip` (the mount point) does not.
    pub fn list(&self, skip: &Path) -> Result<Listing> {
        let failed = |e: io::Error| Error::io("list", &e).in_file(&self.path());
        let meta = self.stat().map_err(failed)?;
        if meta.is_file() {
            return self.list_archive(&meta);
        }
        self.list_directory(skip).map_err(failed)
    }

    fn list_directory(&self, skip: &Path) -> io::Result<Listing> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NONBLOCK;
        let dir = self.open_at(&self.users, &self.relative, flags)?;
        let stamp = Stamp::of(&self.stat()?);
        let mut dir = Dir::from_fd(dir)?;
        let read = Some((Instant::now(), stamp.life()));
        let mut listing = Listing { stamp, read, ..Listing::default() };
        for entry in dir.iter() {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes()).to_owned();
            if name == "." || name == ".." {
                continue;
            }
            let relative = self.relative.join(&name);
            let inode = FileIdentity { device: stamp.identity.device, inode: entry.ino(), part: 0 };
            self.enter(&mut listing, name, relative, entry.file_type(), inode, skip);
        }
        listing.hide_parts();
        self.hide_parts_of_images_above(&mut listing);
        if listing.others.len() > MAX_OTHERS {
            listing.others.clear();
            listing.incomplete = true;
        }
        Ok(listing)
    }

    /// The archive that is here, or that this is a folder of, and which one.
    pub fn archive(&self) -> Result<(Arc<Archive>, PathBuf)> {
        let mut ways: Vec<_> = archive::parts(&self.relative).collect();
        ways.insert(0, (&self.relative, Path::new("")));
        let reach = self.reach();
        let mut tried = None;
        for (archive, inside) in ways {
            match reach.open(&self.source.root().join(archive), Access::Peek) {
                Ok(file) => return Ok((Archive::open(file)?, inside.to_owned())),
                Err(e) => tried = tried.or(Some(e)),
            }
        }
        Err(tried.unwrap_or_else(|| Error::invalid("no archive").in_file(&self.path())))
    }

    fn list_archive(&self, meta: &Metadata) -> Result<Listing> {
        let stamp = Stamp::of(meta);
        let read = Some((Instant::now(), stamp.life()));
        let mut listing = Listing { stamp, read, ..Listing::default() };
        let (archive, inside) = self.archive()?;
        for entry in archive.list(&inside) {
            let relative = self.relative.join(&entry.name);
            if entry.folder {
                listing.folders.insert(entry.name, stamp.identity);
                continue;
            }
            let image = ImageEntry { relative, identity: stamp.identity, users: Vec::new() };
            if formats::ova::names_disk(Path::new(&entry.name)) {
                listing.images.insert(entry.name, image);
            } else {
                listing.others.insert(entry.name, image);
            }
        }
        listing.hide_parts();
        Ok(listing)
    }

    /// Whether the file here holds an image, by its first and last bytes.
    pub fn is_image(&self) -> bool {
        let Ok(meta) = self.stat() else { return false };
        let stamp = Stamp::of(&meta);
        if !meta.is_file() {
            return false;
        }
        if archive::parts(&self.relative).any(|(archive, _)| archive::has_name(archive)) {
            let file = self.reach().open(&self.path(), Access::Peek);
            return file.and_then(|file| Probe::read(&*file)).is_ok_and(|probe| probe.claimed());
        }
        IMAGES.get(stamp, || self.looks_like_image().unwrap_or(false))
    }

    fn looks_like_image(&self) -> io::Result<bool> {
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let file = File::from(self.open_at(&self.users, &self.relative, flags)?);
        let len = file.metadata()?.len();
        let read = |from: u64, len: usize| {
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, from).map(|()| bytes)
        };
        let head = read(0, len.min(Probe::HEAD) as usize)?;
        let tail = len.min(Probe::TAIL);
        let tail = read(len - tail, tail as usize)?;
        Ok(Probe { head, tail, len }.claimed())
    }

    /// Whether a directory is one of a mount that must not be entered.
    fn barred(&self, relative: &Path) -> bool {
        let opened = self.open_at(&[], relative, OFlag::O_PATH | OFlag::O_DIRECTORY);
        opened.is_err_and(|e| e.raw_os_error() == Some(libc::EXDEV))
    }

    /// Takes out files named like parts of an image that a descriptor in a folder above lists as extents.
    fn hide_parts_of_images_above(&self, listing: &mut Listing) {
        let mut above = self.relative.clone();
        while listing.images.keys().any(|name| whole_of_part(name).is_some()) && above.pop() {
            let extents = self.elsewhere(above.clone()).extents();
            let extents: BTreeSet<_> = extents.iter().map(|extent| above.join(extent)).collect();
            listing.images.retain(|name, image| {
                whole_of_part(name).is_none() || !extents.contains(&image.relative)
            });
        }
    }

    /// The extents that the VMDK descriptors of the directory here list, from here.
    fn extents(&self) -> Vec<PathBuf> {
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK;
        let dir = self.open_at(&self.users, &self.relative, flags | OFlag::O_DIRECTORY);
        let Ok(mut dir) = dir.and_then(|dir| Ok(Dir::from_fd(dir)?)) else { return Vec::new() };
        let names = dir
            .iter()
            .flatten()
            .map(|entry| OsStr::from_bytes(entry.file_name().to_bytes()).to_owned());
        let is_vmdk = |name: &OsString| name.as_bytes().to_ascii_lowercase().ends_with(b".vmdk");
        let read = |place: &Place, meta: &Metadata| {
            let file = self.open_at(&self.users, &place.relative, flags).ok()?;
            let mut text = vec![0; usize::try_from(meta.len().min(MAX_DESCRIPTOR)).ok()?];
            File::from(file).read_exact(&mut text).ok()?;
            Some(formats::vmdk::extent_names(&text).into())
        };
        let mut extents = Vec::new();
        for name in names.filter(is_vmdk).take(MAX_DESCRIPTORS) {
            let place = self.elsewhere(self.relative.join(name));
            let Some(meta) = place.stat().ok().filter(Metadata::is_file) else { continue };
            let found = EXTENTS.get(Stamp::of(&meta), || read(&place, &meta).unwrap_or_default());
            extents.extend(found.iter().cloned());
        }
        extents
    }

    fn enter(
        &self,
        listing: &mut Listing,
        name: OsString,
        relative: PathBuf,
        kind: Option<nix::dir::Type>,
        identity: FileIdentity,
        skip: &Path,
    ) {
        use nix::dir::Type;
        if is_unfinished(&name) {
            return;
        }
        let imagelike = formats::by_extension(Path::new(&name)).is_some();
        let kind = kind.or_else(|| {
            // The file system does not say in the directory itself.
            let place = self.elsewhere(relative.clone());
            let file = place.open_at(&[], &relative, OFlag::O_PATH | OFlag::O_NOFOLLOW).ok()?;
            let kind = File::from(file).metadata().ok()?.file_type();
            match kind {
                kind if kind.is_dir() => Some(Type::Directory),
                kind if kind.is_file() => Some(Type::File),
                kind if kind.is_symlink() => Some(Type::Symlink),
                _ => None,
            }
        });
        match kind {
            Some(Type::Directory)
                if self.source.root().join(&relative) != skip && !self.barred(&relative) =>
            {
                listing.folders.insert(name, identity);
            }
            Some(Type::File) => {
                let entry = ImageEntry { relative, identity, users: Vec::new() };
                if imagelike {
                    listing.images.insert(name, entry);
                } else if archive::has_name(Path::new(&name)) {
                    listing.archives.insert(name, identity);
                } else if listing.others.len() <= MAX_OTHERS {
                    listing.others.insert(name, entry);
                }
            }
            Some(Type::Symlink) if imagelike => {
                if let Some(entry) = self.source.follow(&relative, skip) {
                    listing.images.insert(name, entry);
                }
            }
            _ => {}
        }
    }
}

/// A file that may be an image.
#[derive(Debug, Clone)]
pub struct ImageEntry {
    /// Path from the source's root, symlinks followed.
    pub relative: PathBuf,
    /// Which file it was when the directory was read.
    pub identity: FileIdentity,
    /// See [`Place::users`].
    pub users: Vec<u32>,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Listing {
    stamp: Stamp,
    /// When it was read, and how long it may be believed while the stamp stays the same.
    read: Option<(Instant, Duration)>,
    /// Directories by name.
    pub folders: BTreeMap<OsString, FileIdentity>,
    /// Archives by name.
    pub archives: BTreeMap<OsString, FileIdentity>,
    /// Possible images by name.
    pub images: BTreeMap<OsString, ImageEntry>,
    /// Files whose names say nothing, if they are not too many.
    pub others: BTreeMap<OsString, ImageEntry>,
    /// They are too many.
    pub incomplete: bool,
}

impl Listing {
    /// Whether the directory, whose metadata is now `meta`, still has the entries listed here.
    pub fn current(&self, meta: &Metadata) -> bool {
        let alive = self.read.is_some_and(|(read, life)| read.elapsed() < life);
        alive && self.stamp == Stamp::of(meta)
    }

    /// Takes out the files that are parts of an image beside them.
    fn hide_parts(&mut self) {
        let parts: BTreeSet<_> = self
            .images
            .keys()
            .filter(|name| {
                whole_of_part(name).is_some_and(|whole| self.images.contains_key(&whole))
            })
            .cloned()
            .collect();
        self.images.retain(|name, _| !parts.contains(name));
        let images = &self.images;
        self.others.retain(|name, _| {
            whole_of_split(name)
                .is_none_or(|wholes| !wholes.iter().any(|whole| images.contains_key(whole)))
        });
    }
}

/// The name of the descriptor that a VMDK extent, change-tracking file or raw device map of this
/// name belongs to: `disk.vmdk` for `disk-flat.vmdk`, `disk-s001.vmdk` and their like.
fn whole_of_part(name: &OsStr) -> Option<OsString> {
    let (whole, ending, _) = formats::vmdk::take_apart(name)?;
    let extension = &ending.as_bytes()[ending.len() - ".vmdk".len()..];
    Some(OsString::from_vec([whole, extension].concat()))
}

/// The names that the first part of a VHD may have of which this is a later one: `disk.vhd` for `disk.v01`.
fn whole_of_split(name: &OsStr) -> Option<[OsString; 2]> {
    let bytes = name.as_bytes();
    let (stem, role) = bytes.split_at(bytes.len().checked_sub(".v01".len())?);
    let [b'.', b'v' | b'V', number @ ..] = role else { return None };
    let digits = number.iter().all(u8::is_ascii_digit);
    let whole = |extension: &[u8]| OsString::from_vec([stem, extension].concat());
    digits.then(|| [whole(b".vhd"), whole(b".VHD")])
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::super::source::Source;
    use super::*;

    fn listing(dir: &Path) -> (Vec<String>, Vec<String>) {
        let place = Place::top(Source::open(dir).unwrap());
        let listing = place.list(Path::new("/nowhere")).unwrap();
        let text = |name: &OsString| name.to_str().unwrap().to_owned();
        (listing.folders.keys().map(text).collect(), listing.images.keys().map(text).collect())
    }

    fn touch(dir: &Path, names: &[&str]) {
        names.iter().for_each(|name| fs::write(dir.join(name), "").unwrap());
    }

    #[test]
    fn parts_in_a_folder_below_their_descriptor_do_not_show() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("parts/deep");
        fs::create_dir_all(&below).unwrap();
        touch(&below, &["a-f001.vmdk", "a-f002.vmdk", "b-flat.vmdk", "c.vmdk"]);
        let descriptor = "version=1\nCID=1\nRW 8 FLAT \"deep\\a-f001.vmdk\" 0\nRW 8 FLAT \"deep/a-f002.vmdk\" 0\n";
        fs::write(dir.path().join("parts/disk.vmdk"), descriptor).unwrap();
        let source = Source::open(dir.path()).unwrap();
        let place = Place { source, relative: "parts/deep".into(), users: Vec::new() };
        let shown = place.list(Path::new("/nowhere")).unwrap().images;
        assert!(shown.keys().eq(["b-flat.vmdk", "c.vmdk"]), "{shown:?}");
    }

    #[test]
    fn files_that_are_being_made_do_not_show() {
        let dir = tempfile::tempdir().unwrap();
        touch(dir.path(), &["a.vhd", ".flatdisk-part0.a.vhd", ".flatdisk-part1.b.vmdk"]);
        assert_eq!(listing(dir.path()).1, ["a.vhd"]);
    }

    #[test]
    fn folders_and_images_show_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        touch(dir.path(), &["a.vhd", "B.VHDX", "c.vmdk", "notes.txt", "vhd"]);
        fs::create_dir(dir.path().join("sub")).unwrap();
        let (folders, images) = listing(dir.path());
        assert_eq!(folders, ["sub"]);
        assert_eq!(images, ["B.VHDX", "a.vhd", "c.vmdk"]);
    }

    #[test]
    fn parts_of_an_image_show_only_without_it() {
        let dir = tempfile::tempdir().unwrap();
        touch(
            dir.path(),
            &[
                "x.vmdk",
                "x-flat.vmdk",
                "x-s001.vmdk",
                "x-f002.vmdk",
                "x-s1000.vmdk",
                "x-delta.vmdk",
                "x-sesparse.vmdk",
                "x-ctk.vmdk",
                "x-rdm.vmdk",
                "x-rdmp.vmdk",
                "x-s01.vmdk",
                "lone-flat.vmdk",
                "x-flat.vhd",
            ],
        );
        let (_, images) = listing(dir.path());
        assert_eq!(images, ["lone-flat.vmdk", "x-flat.vhd", "x-s01.vmdk", "x.vmdk"]);
    }

    #[test]
    fn symlinks_show_only_where_they_lead_to_a_file_of_the_source() {
        let outside = tempfile::tempdir().unwrap();
        touch(outside.path(), &["o.vhd"]);
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("sub/deep")).unwrap();
        touch(&root, &["sub/real.vhd"]);
        symlink("sub/real.vhd", root.join("relative.vhd")).unwrap();
        symlink(root.join("sub/real.vhd"), root.join("absolute.vhd")).unwrap();
        symlink("relative.vhd", root.join("twice.vhd")).unwrap();
        symlink(outside.path().join("o.vhd"), root.join("out.vhd")).unwrap();
        symlink("../x/../../etc/passwd", root.join("climb.vhd")).unwrap();
        symlink("loop.vhd", root.join("loop.vhd")).unwrap();
        symlink("sub", root.join("folder.vhd")).unwrap();
        symlink("sub", root.join("folder")).unwrap();
        symlink("folder/real.vhd", root.join("through.vhd")).unwrap();
        let (folders, images) = listing(&root);
        assert_eq!(folders, ["sub"]);
        assert_eq!(images, ["absolute.vhd", "relative.vhd", "twice.vhd"]);
    }

    #[test]
    fn the_mount_point_inside_a_source_does_not_show() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("mnt")).unwrap();
        touch(&root, &["mnt/x.vhd"]);
        symlink("mnt/x.vhd", root.join("back.vhd")).unwrap();
        let place = Place::top(Source::open(&root).unwrap());
        let listing = place.list(&root.join("mnt")).unwrap();
        assert!(listing.folders.is_empty() && listing.images.is_empty(), "{listing:?}");
    }

    #[test]
    fn a_directory_swapped_for_a_symlink_is_not_entered() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        symlink("/etc", root.join("sub")).unwrap();
        let place = Place::top(Source::open(&root).unwrap()).elsewhere("sub".into());
        assert!(place.list(Path::new("/nowhere")).is_err());
        assert!(place.stat().is_err());
    }
}
