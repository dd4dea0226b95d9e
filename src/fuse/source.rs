//! The host directories behind a mount: confined access, and what they show.
//!
//! A [`Source`] is a directory that the user named. Everything in it is reached from its open
//! descriptor, component by component and through no symlink, so that nothing that changes inside it
//! leads out, nor back into the mount (whose daemon would wait for itself). A symlink that stands
//! for an image is resolved here by text, only to a regular file of the same source, and only if the
//! symlink's owner may read that.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::dir::Dir;
use nix::fcntl::{OFlag, readlinkat};
use nix::sys::statvfs::{FsFlags, fstatvfs};

use super::mounts;
use crate::error::{Error, Result};
use crate::formats;
use crate::storage::permissions::{self, Permissions};
use crate::storage::reach::Root;
use crate::storage::staged::is_unfinished;
use crate::storage::{FileIdentity, user};

/// Longest chain of symlinks from a name to an image.
const MAX_LINKS: usize = 16;
/// Most descriptors of a folder, and bytes of each, that are searched for parts in folders below.
const MAX_DESCRIPTORS: usize = 256;
const MAX_DESCRIPTOR: u64 = 64 << 10;

/// File times move in steps of up to ten milliseconds: a change shortly after a stamp was taken may
/// leave the same stamp.
pub const CLOCK_STEP: Duration = Duration::from_millis(50);

/// The steps of file systems that keep whole seconds, or even ones, and a little more.
const COARSE_STEP: Duration = Duration::from_millis(2500);

/// How long anything is believed that may have changed without a sign. The kernel believes names and
/// attributes for as long.
pub const BELIEVED: Duration = Duration::from_secs(1);

/// What tells a file's contents from other contents without reading them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Which file.
    pub identity: FileIdentity,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Stamp {
    /// The stamp in a file's metadata.
    pub fn of(meta: &Metadata) -> Self {
        Self {
            identity: identity(meta),
            size: meta.size(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            ctime: (meta.ctime(), meta.ctime_nsec()),
        }
    }

    /// Whether the host keeps whole seconds only, or even ones, as some file systems and network
    /// protocols do: a later change need not show in such a stamp.
    pub fn coarse(&self) -> bool {
        // Programs can set the other time to whole seconds.
        self.ctime.1 == 0
    }

    /// Whether the last change is old enough for every later one to show in the stamp. With coarse times
    /// never: how old a change is, only the clock that told its time knows, and that may be another
    /// machine's.
    pub fn settled(&self) -> bool {
        !self.coarse() && self.older_than(CLOCK_STEP)
    }

    /// How long what was read just now may be believed while the stamp stays this one.
    pub fn life(&self) -> Duration {
        match self.settled() {
            true => Duration::MAX,
            false if self.coarse() && self.older_than(COARSE_STEP) => BELIEVED,
            false => Duration::ZERO,
        }
    }

    fn older_than(&self, step: Duration) -> bool {
        let (seconds, nanos) = self.ctime.max(self.mtime);
        let Ok(seconds) = u64::try_from(seconds) else { return true };
        let changed = UNIX_EPOCH + Duration::new(seconds, nanos as u32);
        SystemTime::now().duration_since(changed).is_ok_and(|age| age > step)
    }
}

/// Device and inode in a file's metadata.
pub fn identity(meta: &Metadata) -> FileIdentity {
    FileIdentity { device: meta.dev(), inode: meta.ino() }
}

/// A host directory that the user named.
#[derive(Debug)]
pub struct Source {
    root: Root,
}

/// A file or directory in a source.
#[derive(Debug, Clone)]
pub struct Place {
    /// The source.
    pub source: Arc<Source>,
    /// Path from the source's root; empty for the root itself.
    pub relative: PathBuf,
    /// Who must be able to open it: the owners of symlinks that lead here, where these are not ours.
    pub users: Vec<u32>,
}

impl Source {
    /// Opens the directory `root`.
    pub fn open(root: &Path) -> Result<Arc<Self>> {
        let root = Root::open_real(root).map_err(|e| Error::io("open", &e).in_file(root))?;
        Ok(Arc::new(Self { root: root.served().gated(mounts::gate()) }))
    }

    /// Absolute path of the directory when it was opened.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// The open directory.
    pub fn directory(&self) -> &Root {
        &self.root
    }

    fn open_at(&self, users: &[u32], relative: &Path, flags: OFlag) -> io::Result<OwnedFd> {
        self.root.open_beneath(users, relative, flags)
    }

    /// Where the symlink chain that begins at `relative` ends, if that is a regular file inside the
    /// source and outside `skip`, which the owners of all symlinks may read.
    fn follow(&self, relative: &Path, skip: &Path) -> Option<ImageEntry> {
        let mut path = self.root().join(relative);
        let mut users = Vec::new();
        for _ in 0..MAX_LINKS {
            let inside = path.strip_prefix(self.root()).ok()?.to_owned();
            if path.starts_with(skip) {
                return None;
            }
            let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW;
            let file = File::from(self.open_at(&users, &inside, flags).ok()?);
            let meta = file.metadata().ok()?;
            if meta.is_file() {
                if !users.is_empty() {
                    self.open_at(&users, &inside, OFlag::O_RDONLY | OFlag::O_NONBLOCK).ok()?;
                }
                // The file's own owner is no limit to it.
                users.retain(|user| *user != meta.uid());
                return Some(ImageEntry { relative: inside, identity: identity(&meta), users });
            }
            if !meta.is_symlink() {
                return None;
            }
            if !user::is_own(meta.uid()) && !users.contains(&meta.uid()) {
                users.push(meta.uid());
            }
            let target = readlinkat(file.as_fd(), "").ok()?;
            path.pop();
            path = normalise(&path.join(target))?;
        }
        None
    }
}

/// Takes `.` and `..` out of an absolute path by text.
pub fn normalise(path: &Path) -> Option<PathBuf> {
    let mut plain = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir => {
                plain.pop();
            }
            Component::Normal(part) => plain.push(part),
            Component::Prefix(_) => return None,
        }
    }
    Some(plain)
}

impl Place {
    /// The directory of a source itself.
    pub fn top(source: Arc<Source>) -> Self {
        Self { source, relative: PathBuf::new(), users: Vec::new() }
    }

    /// Absolute path.
    pub fn path(&self) -> PathBuf {
        if self.relative.as_os_str().is_empty() {
            self.source.root().to_owned()
        } else {
            self.source.root().join(&self.relative)
        }
    }

    /// The place called `relative` (from the source's root) in the same source.
    pub fn elsewhere(&self, relative: PathBuf) -> Self {
        Self { source: self.source.clone(), relative, users: Vec::new() }
    }

    /// The place of an image that is listed in the same source.
    pub fn image(&self, entry: &ImageEntry) -> Self {
        Self { users: entry.users.clone(), ..self.elsewhere(entry.relative.clone()) }
    }

    /// Whether both are one file's, and the same must be able to open it.
    pub fn is(&self, other: &Self) -> bool {
        self.path() == other.path() && self.users == other.users
    }

    /// Metadata of the file or directory; symlinks on the way or at the end are an error.
    pub fn stat(&self) -> io::Result<Metadata> {
        File::from(self.source.open_at(&self.users, &self.relative, OFlag::O_PATH)?).metadata()
    }

    /// The permissions of the file or directory.
    pub fn permissions(&self) -> io::Result<Permissions> {
        permissions::of(self.source.open_at(&self.users, &self.relative, OFlag::O_PATH)?.as_fd())
    }

    /// Whether the host lets nobody write here: a file system or mount that is read-only.
    pub fn host_read_only(&self) -> bool {
        let file = self.source.open_at(&self.users, &self.relative, OFlag::O_PATH);
        let host = file.and_then(|file| Ok(fstatvfs(&file)?));
        host.is_ok_and(|host| host.flags().contains(FsFlags::ST_RDONLY))
    }

    /// What the directory here shows; whatever lies under `skip` (the mount point) does not.
    pub fn list(&self, skip: &Path) -> io::Result<Listing> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NONBLOCK;
        let dir = self.source.open_at(&self.users, &self.relative, flags)?;
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
            let inode = FileIdentity { device: stamp.identity.device, inode: entry.ino() };
            self.enter(&mut listing, name, relative, entry.file_type(), inode, skip);
        }
        listing.hide_parts();
        self.hide_parts_of_images_above(&mut listing);
        Ok(listing)
    }

    /// Whether a directory is one of a mount that must not be entered.
    fn barred(&self, relative: &Path) -> bool {
        let opened = self.source.open_at(&[], relative, OFlag::O_PATH | OFlag::O_DIRECTORY);
        opened.is_err_and(|e| e.raw_os_error() == Some(libc::EXDEV))
    }

    /// Takes out files named like parts of an image that a descriptor in a folder above lists as extents.
    fn hide_parts_of_images_above(&self, listing: &mut Listing) {
        let mut above = self.relative.clone();
        while listing.images.keys().any(|name| whole_of_part(name).is_some()) && above.pop() {
            for extent in self.elsewhere(above.clone()).extents() {
                let extent = above.join(extent);
                listing.images.retain(|name, image| {
                    whole_of_part(name).is_none() || image.relative != extent
                });
            }
        }
    }

    /// The extents that the VMDK descriptors of the directory here list, from here.
    fn extents(&self) -> Vec<PathBuf> {
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK;
        let dir = self.source.open_at(&self.users, &self.relative, flags | OFlag::O_DIRECTORY);
        let Ok(mut dir) = dir.and_then(|dir| Ok(Dir::from_fd(dir)?)) else { return Vec::new() };
        let names = dir
            .iter()
            .flatten()
            .map(|entry| OsStr::from_bytes(entry.file_name().to_bytes()).to_owned());
        let is_vmdk = |name: &OsString| name.as_bytes().to_ascii_lowercase().ends_with(b".vmdk");
        let read = |name: OsString| {
            let file = self.source.open_at(&self.users, &self.relative.join(name), flags).ok()?;
            let mut file = File::from(file);
            let meta = file.metadata().ok().filter(Metadata::is_file)?;
            let mut text = vec![0; usize::try_from(meta.len().min(MAX_DESCRIPTOR)).ok()?];
            file.read_exact(&mut text).ok()?;
            Some(formats::vmdk::extent_names(&text))
        };
        names.filter(is_vmdk).take(MAX_DESCRIPTORS).filter_map(read).flatten().collect()
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
            let file =
                place.source.open_at(&[], &relative, OFlag::O_PATH | OFlag::O_NOFOLLOW).ok()?;
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
            Some(Type::File) if imagelike => {
                let entry = ImageEntry { relative, identity, users: Vec::new() };
                listing.images.insert(name, entry);
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

/// What a directory shows. No image was opened for it: names decide.
#[derive(Debug, Default)]
pub struct Listing {
    stamp: Stamp,
    /// When it was read, and how long it may be believed while the stamp stays the same.
    read: Option<(Instant, Duration)>,
    /// Directories by name.
    pub folders: BTreeMap<OsString, FileIdentity>,
    /// Possible images by name.
    pub images: BTreeMap<OsString, ImageEntry>,
}

impl Default for Stamp {
    fn default() -> Self {
        let identity = FileIdentity { device: 0, inode: 0 };
        Self { identity, size: 0, mtime: (0, 0), ctime: (0, 0) }
    }
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
    }
}

/// The name of the descriptor that a VMDK extent, change-tracking file or raw device map of this
/// name belongs to: `disk.vmdk` for `disk-flat.vmdk`, `disk-s001.vmdk` and their like.
fn whole_of_part(name: &OsStr) -> Option<OsString> {
    let bytes = name.as_bytes();
    let stem = &bytes[..bytes.len().checked_sub(".vmdk".len())?];
    let extension = &bytes[stem.len()..];
    if !extension.eq_ignore_ascii_case(b".vmdk") {
        return None;
    }
    let dash = stem.iter().rposition(|b| *b == b'-')?;
    let role = stem[dash + 1..].to_ascii_lowercase();
    let numbered = matches!(&role[..], [b's' | b'f', number @ ..]
        if number.len() >= 3 && number.iter().all(u8::is_ascii_digit));
    let named = [&b"flat"[..], b"delta", b"sesparse", b"ctk", b"rdm", b"rdmp"].contains(&&role[..]);
    (numbered || named).then(|| OsString::from_vec([&stem[..dash], extension].concat()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

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
