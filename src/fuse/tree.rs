//! The mounted tree: names, inode numbers, attributes and handles. Knows nothing of fuser, so all of
//! it is tested without a mount.
//!
//! # Names
//!
//! The root holds what the user named: images, and directories by their name; a single directory
//! is mirrored in the root itself. In a mirrored directory only folders and possible images show, by
//! their names alone, so that listing ten thousand images opens none. In a folder of at most
//! [`EXAMINED`] images each is looked at when the folder is listed, and one that does not open
//! shows as `name.error.txt`; in larger ones that happens when a name is looked up.
//!
//! # Inode numbers
//!
//! A number is computed from the host path and the host's inode, so it is the same in every
//! listing, in every mount, and before the node exists. A replaced image is another node, and
//! programs that have the old one open keep it.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::Metadata;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use parking_lot::{Mutex, RwLock};

use super::facts::{Facts, FactsCache, Opener};
use super::image::{ImageFile, Usage, stale};
use super::source::{Listing, Place, Source, identity, normalise};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::FileIdentity;

/// Inode number of the root.
pub const ROOT: u64 = 1;

/// Largest folder whose images are all looked at when it is listed.
pub const EXAMINED: usize = 256;

/// Directories whose listings are kept at most.
const MAX_LISTINGS: usize = 1024;

/// What stands in for an image that does not open.
const PROBLEM_SUFFIX: &str = ".error.txt";

/// How the tree looks, as the user asked.
#[derive(Debug, Clone)]
pub struct Look {
    /// Nothing can be written.
    pub read_only: bool,
    /// Owner of everything, instead of the host's.
    pub uid: Option<u32>,
    /// Group of everything, instead of the host's.
    pub gid: Option<u32>,
    /// Permission bits that flat files do not get.
    pub fmask: u16,
    /// Permission bits that directories do not get.
    pub dmask: u16,
    /// Appended to an image's name.
    pub suffix: OsString,
    /// Absolute path of the mount point; the tree never looks below it.
    pub mountpoint: PathBuf,
    /// Who runs the daemon: owner of a root that is no directory of the host.
    pub owner: (u32, u32),
    /// The kernel may hold writes back, so holes are not known here.
    pub writeback: bool,
}

/// The kinds of nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A directory.
    Folder,
    /// A flat file, or the text that stands for a broken image.
    File,
    /// A symlink, for the moment that `ln -s` needs it.
    Link,
}

/// What stat(2) shows.
#[derive(Debug, Clone)]
pub struct Attributes {
    /// Inode number.
    pub ino: u64,
    /// What it is.
    pub kind: Kind,
    /// Size in bytes.
    pub size: u64,
    /// Space taken, in units of 512 bytes.
    pub blocks: u64,
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last access.
    pub atime: SystemTime,
    /// Last change of the contents.
    pub mtime: SystemTime,
    /// Last change of anything.
    pub ctime: SystemTime,
}

/// An entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// Inode number.
    pub ino: u64,
    /// What it is.
    pub kind: Kind,
    /// Its name.
    pub name: OsString,
}

/// An open file or directory.
#[derive(Debug)]
pub struct Opened {
    /// Handle for the calls that follow.
    pub handle: u64,
    /// Whether cached pages are still good.
    pub keep_cache: bool,
    /// Whether reading must bypass the kernel's cache.
    pub direct: bool,
}

/// Handles of flat files say only how they are open; the node has everything else.
const READER: u64 = 0;
const WRITER: u64 = 1;
const FIRST_HANDLE: u64 = 2;

#[derive(Debug)]
enum Handle {
    Folder(Arc<[DirEntry]>),
    Text(Arc<[u8]>),
}

#[derive(Debug)]
struct Node {
    ino: u64,
    what: What,
    /// References the kernel holds.
    lookups: AtomicU64,
}

#[derive(Debug)]
enum What {
    Root,
    Folder(Place),
    Image(Box<ImageFile>),
    /// An image that does not open.
    Problem(Place, FileIdentity),
    Link(PathBuf),
}

impl What {
    fn is(&self, found: &Found) -> bool {
        match (self, found) {
            (Self::Folder(a), Found::Folder(b, _)) => a.path() == b.path(),
            (Self::Image(a), Found::Image(b, identity)) => {
                a.identity == *identity && a.place.path() == b.path()
            }
            (Self::Problem(a, seen), Found::Problem(b, identity)) => {
                seen == identity && a.path() == b.path()
            }
            _ => false,
        }
    }
}

/// What a name stands for.
#[derive(Debug)]
enum Found {
    Folder(Place, FileIdentity),
    Image(Place, FileIdentity),
    Problem(Place, FileIdentity),
}

impl Found {
    fn ino(&self) -> u64 {
        let (tag, place, identity) = match self {
            Self::Folder(place, identity) => (0u8, place, identity),
            Self::Image(place, identity) => (1, place, identity),
            Self::Problem(place, identity) => (2, place, identity),
        };
        let mut hasher = DefaultHasher::new();
        (tag, place.path().as_os_str().as_bytes(), identity).hash(&mut hasher);
        // Room for the numbers below, and for signed arithmetic of programs.
        (hasher.finish() >> 1).max(ROOT + 1)
    }
}

/// Something in the root that the user named.
#[derive(Debug, Clone)]
struct Pinned {
    place: Place,
    folder: bool,
}

/// An image that is open, for `status`.
#[derive(Debug)]
pub struct ImageUsage {
    /// The image.
    pub path: PathBuf,
    /// How it is in use.
    pub usage: Usage,
}

/// See the module's documentation.
pub struct Tree {
    look: Look,
    images: FactsCache,
    /// The directory mirrored in the root.
    mirror: Option<Place>,
    pinned: RwLock<BTreeMap<OsString, Pinned>>,
    nodes: RwLock<HashMap<u64, Arc<Node>>>,
    listings: Mutex<HashMap<PathBuf, Arc<Listing>>>,
    handles: Mutex<HashMap<u64, Handle>>,
    next_handle: AtomicU64,
    /// Failed flushes and closes, for the end of the mount.
    failures: Mutex<Vec<String>>,
}

/// Failures kept at most.
const MAX_FAILURES: usize = 64;

impl Tree {
    /// A tree over `sources`, each an image or a directory.
    pub fn new(sources: &[PathBuf], opener: Box<dyn Opener>, look: Look) -> Result<Self> {
        let mut tree = Self {
            look,
            images: FactsCache::new(opener),
            mirror: None,
            pinned: RwLock::default(),
            nodes: RwLock::default(),
            listings: Mutex::default(),
            handles: Mutex::default(),
            next_handle: AtomicU64::new(FIRST_HANDLE),
            failures: Mutex::default(),
        };
        if let [source] = sources
            && source.is_dir()
        {
            let source = Source::open(source)?;
            tree.refuse_own(source.root())?;
            tree.mirror = Some(Place { source, relative: PathBuf::new() });
        } else {
            for source in sources {
                tree.pin_source(source)?;
            }
        }
        let root = Node { ino: ROOT, what: What::Root, lookups: AtomicU64::new(1) };
        tree.nodes.write().insert(ROOT, Arc::new(root));
        Ok(tree)
    }

    /// Refuses a source directory that the mount would cover.
    fn refuse_own(&self, path: &Path) -> Result<()> {
        if path.starts_with(&self.look.mountpoint) {
            return Err(Error::invalid("the mount point would cover this source")
                .in_file(path)
                .hint("mount somewhere else"));
        }
        Ok(())
    }

    fn pin_source(&mut self, source: &Path) -> Result<()> {
        let failed = |e: io::Error| Error::io("open", &e).in_file(source);
        let absolute = std::path::absolute(source).map_err(failed)?;
        let meta = std::fs::metadata(&absolute).map_err(failed)?;
        let real = std::fs::canonicalize(&absolute).map_err(failed)?;
        let name = absolute.file_name().or(real.file_name()).unwrap_or(OsStr::new("root"));
        let (shown, pinned) = if meta.is_dir() {
            let place = Place { source: Source::open(&real)?, relative: PathBuf::new() };
            (name.to_owned(), Pinned { place, folder: true })
        } else {
            (self.shown(name), Pinned { place: place_of(&real)?, folder: false })
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

    /// The directories whose images may be parents of others.
    pub fn source_dirs(&self) -> Vec<PathBuf> {
        let pinned = self.pinned.read();
        let pinned = pinned.values().map(|pinned| &pinned.place);
        pinned.chain(&self.mirror).map(|place| place.source.root().to_owned()).collect()
    }

    /// The name under which an image called `name` shows.
    fn shown(&self, name: &OsStr) -> OsString {
        [name, &self.look.suffix].into_iter().collect()
    }

    fn node(&self, ino: u64) -> Result<Arc<Node>> {
        self.nodes.read().get(&ino).cloned().ok_or_else(stale)
    }

    // Names

    /// The listing of a mirrored directory, read again only if the directory changed.
    fn listing(&self, folder: &Place) -> Result<Arc<Listing>> {
        let path = folder.path();
        let failed = |e: io::Error| Error::io("list", &e).in_file(&path);
        let meta = folder.stat().map_err(failed)?;
        if let Some(listing) = self.listings.lock().get(&path)
            && listing.current(&meta)
        {
            return Ok(listing.clone());
        }
        let listing = Arc::new(folder.list(&self.look.mountpoint).map_err(failed)?);
        let mut listings = self.listings.lock();
        if listings.len() >= MAX_LISTINGS {
            listings.clear();
        }
        listings.insert(path, listing.clone());
        Ok(listing)
    }

    fn find(&self, parent: &Node, name: &OsStr) -> Result<Found> {
        let folder = match &parent.what {
            What::Root => match self.find_pinned(name)? {
                Some(found) => return Ok(found),
                None => self.mirror.as_ref().ok_or_else(not_found)?,
            },
            What::Folder(place) => place,
            _ => return Err(not_a_folder()),
        };
        let listing = self.listing(folder)?;
        if let Some(base) = strip_suffix(name, &self.look.suffix)
            && let Some(entry) = listing.images.get(base)
        {
            let place = folder.elsewhere(entry.relative.clone());
            if self.images.examine(&place).is_ok() {
                return found(place, Found::Image);
            }
        }
        if let Some(base) = strip_suffix(name, PROBLEM_SUFFIX.as_ref())
            && let Some(entry) = listing.images.get(base)
        {
            let place = folder.elsewhere(entry.relative.clone());
            if self.images.examine(&place).is_err() {
                return found(place, Found::Problem);
            }
        }
        if listing.folders.contains_key(name) {
            return found(folder.elsewhere(folder.relative.join(name)), Found::Folder);
        }
        Err(not_found())
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
        if let Some(Pinned { place, folder }) = pinned {
            if folder {
                return found(place, Found::Folder).map(Some);
            }
            if self.images.examine(&place).is_ok() {
                return found(place, Found::Image).map(Some);
            }
        }
        if let Some((_, Pinned { place, folder: false })) = base
            && self.images.examine(&place).is_err()
        {
            return found(place, Found::Problem).map(Some);
        }
        Ok(None)
    }

    /// Looks up `name` in the directory `parent`; the kernel holds one more reference to the node.
    pub fn lookup(&self, parent: u64, name: &OsStr) -> Result<Attributes> {
        let parent = self.node(parent)?;
        let node = self.enter(self.find(&parent, name)?);
        self.attributes_of(&node).inspect_err(|_| self.forget(node.ino, 1))
    }

    /// The node for what was found, made if need be, with one more reference.
    fn enter(&self, found: Found) -> Arc<Node> {
        let mut ino = found.ino();
        let mut nodes = self.nodes.write();
        while let Some(node) = nodes.get(&ino) {
            if node.what.is(&found) {
                node.lookups.fetch_add(1, Ordering::Relaxed);
                return node.clone();
            }
            ino += 1;
        }
        let what = match found {
            Found::Folder(place, _) => What::Folder(place),
            Found::Image(place, identity) => What::Image(Box::new(ImageFile::new(place, identity))),
            Found::Problem(place, identity) => What::Problem(place, identity),
        };
        let node = Arc::new(Node { ino, what, lookups: AtomicU64::new(1) });
        nodes.insert(ino, node.clone());
        node
    }

    /// The kernel dropped `count` references to a node.
    pub fn forget(&self, ino: u64, count: u64) {
        if ino == ROOT {
            return;
        }
        let mut nodes = self.nodes.write();
        let Some(node) = nodes.get(&ino) else { return };
        let left = node.lookups.load(Ordering::Relaxed).saturating_sub(count);
        node.lookups.store(left, Ordering::Relaxed);
        // A release may still be under way; the node goes with the last one.
        if left == 0 && !matches!(&node.what, What::Image(image) if image.in_use()) {
            nodes.remove(&ino);
        }
    }

    // Attributes

    /// What stat(2) shows of a node.
    pub fn attributes(&self, ino: u64) -> Result<Attributes> {
        self.attributes_of(&*self.node(ino)?)
    }

    fn attributes_of(&self, node: &Node) -> Result<Attributes> {
        match &node.what {
            What::Root => match &self.mirror {
                Some(place) => self.folder_attributes(ROOT, place),
                None => Ok(self.plain_attributes(ROOT, Kind::Folder, 0, 0o755 & !self.look.dmask)),
            },
            What::Folder(place) => self.folder_attributes(node.ino, place),
            What::Image(image) => {
                let (facts, meta) = image.look(&self.images)?;
                let mut files: Vec<_> = facts.files[1..]
                    .iter()
                    .filter_map(|path| std::fs::symlink_metadata(path).ok())
                    .collect();
                let mut mode = meta.mode() as u16 & 0o666 & !self.look.fmask;
                if self.may_write(image, &facts).is_err() {
                    mode &= !0o222;
                }
                files.push(meta.clone());
                let mut attributes = self.attributes_from(node.ino, Kind::File, &meta, mode);
                attributes.size = facts.size;
                attributes.blocks = files.iter().map(Metadata::blocks).sum();
                // A descriptor keeps its time while its extents change.
                let changed = files.iter().filter_map(|meta| meta.modified().ok()).max();
                attributes.mtime = changed.unwrap_or(attributes.mtime);
                attributes.ctime = attributes.ctime.max(attributes.mtime);
                Ok(attributes)
            }
            What::Problem(place, _) => {
                let meta = place.stat().map_err(|e| Error::io("stat", &e))?;
                let mode = meta.mode() as u16 & 0o444 & !self.look.fmask;
                let mut attributes = self.attributes_from(node.ino, Kind::File, &meta, mode);
                attributes.size = self.problem_text(place)?.len() as u64;
                attributes.blocks = 0;
                Ok(attributes)
            }
            What::Link(target) => {
                let size = target.as_os_str().len() as u64;
                Ok(self.plain_attributes(node.ino, Kind::Link, size, 0o777))
            }
        }
    }

    fn folder_attributes(&self, ino: u64, place: &Place) -> Result<Attributes> {
        let meta = place.stat().map_err(|e| Error::io("stat", &e).in_file(&place.path()))?;
        // Only the root takes new names.
        let (cleared, set) = if ino == ROOT { (0o022, 0o200) } else { (0o222, 0) };
        let mode = ((meta.mode() as u16 & 0o777 & !cleared) | set) & !self.look.dmask;
        Ok(self.attributes_from(ino, Kind::Folder, &meta, mode))
    }

    fn attributes_from(&self, ino: u64, kind: Kind, meta: &Metadata, mode: u16) -> Attributes {
        let changed = i64::max(meta.ctime(), 0) as u64;
        let changed = std::time::Duration::new(changed, meta.ctime_nsec() as u32);
        Attributes {
            ino,
            kind,
            size: meta.len(),
            blocks: meta.blocks(),
            mode,
            uid: self.look.uid.unwrap_or(meta.uid()),
            gid: self.look.gid.unwrap_or(meta.gid()),
            atime: meta.accessed().unwrap_or(SystemTime::UNIX_EPOCH),
            mtime: meta.modified().unwrap_or(SystemTime::UNIX_EPOCH),
            ctime: SystemTime::UNIX_EPOCH + changed,
        }
    }

    /// Attributes of what the host does not have.
    fn plain_attributes(&self, ino: u64, kind: Kind, size: u64, mode: u16) -> Attributes {
        let now = SystemTime::now();
        let (uid, gid) = self.look.owner;
        Attributes {
            ino,
            kind,
            size,
            blocks: 0,
            mode,
            uid: self.look.uid.unwrap_or(uid),
            gid: self.look.gid.unwrap_or(gid),
            atime: now,
            mtime: now,
            ctime: now,
        }
    }

    /// Checks a change of attributes: the size is fixed, so are owner and mode; times are accepted
    /// and stay the image's.
    pub fn change(
        &self,
        ino: u64,
        size: Option<u64>,
        mode: Option<u32>,
        owner: (Option<u32>, Option<u32>),
    ) -> Result<Attributes> {
        let attributes = self.attributes(ino)?;
        let same = size.is_none_or(|size| size == attributes.size)
            && mode.is_none_or(|mode| mode as u16 & 0o7777 == attributes.mode)
            && owner.0.is_none_or(|uid| uid == attributes.uid)
            && owner.1.is_none_or(|gid| gid == attributes.gid);
        if same { Ok(attributes) } else { Err(not_permitted("attributes are the image's own")) }
    }

    /// The extended attributes of a flat file.
    pub fn xattrs(&self, ino: u64) -> Result<Vec<(&'static str, Vec<u8>)>> {
        let node = self.node(ino)?;
        let What::Image(image) = &node.what else { return Ok(Vec::new()) };
        let (facts, _) = image.look(&self.images)?;
        let info = &facts.info;
        let text = |text: &str| text.as_bytes().to_vec();
        let mut xattrs = vec![
            ("user.flatdisk.format", text(info.format)),
            ("user.flatdisk.subformat", text(&info.subformat)),
            ("user.flatdisk.virtual-size", text(&facts.size.to_string())),
            ("user.flatdisk.sector-size", text(&info.logical_sector_size.to_string())),
            ("user.flatdisk.image", image.place.path().into_os_string().into_vec()),
        ];
        if let Some(parent) = &info.parent {
            xattrs.push(("user.flatdisk.parent", text(parent)));
        }
        if let Some(uuid) = &info.uuid {
            xattrs.push(("user.flatdisk.uuid", text(uuid)));
        }
        if !facts.damage.is_empty() {
            let ranges =
                facts.damage.iter().take(1000).map(|r| format!("{:#x}-{:#x}", r.start, r.end));
            xattrs.push(("user.flatdisk.damage", text(&ranges.collect::<Vec<_>>().join(" "))));
        }
        Ok(xattrs)
    }

    /// A directory of the host on whose file system `ino` lies.
    pub fn host_dir(&self, ino: u64) -> Result<PathBuf> {
        let node = self.node(ino)?;
        let place = match &node.what {
            What::Folder(place) => Some(place.clone()),
            What::Image(image) => Some(image.place.clone()),
            What::Problem(place, _) => Some(place.clone()),
            What::Root | What::Link(_) => self
                .mirror
                .clone()
                .or_else(|| self.pinned.read().values().next().map(|p| p.place.clone())),
        };
        Ok(place.map_or(PathBuf::from("/"), |place| place.source.root().to_owned()))
    }

    // Directories

    /// Opens a directory: its entries as they are now.
    pub fn open_folder(&self, ino: u64) -> Result<u64> {
        let node = self.node(ino)?;
        let mut entries = vec![
            DirEntry { ino, kind: Kind::Folder, name: ".".into() },
            DirEntry { ino: ROOT, kind: Kind::Folder, name: "..".into() },
        ];
        match &node.what {
            What::Root => {
                self.pinned_entries(&mut entries)?;
                if let Some(place) = &self.mirror {
                    self.mirrored_entries(place, &mut entries)?;
                }
            }
            What::Folder(place) => self.mirrored_entries(place, &mut entries)?,
            _ => return Err(not_a_folder()),
        }
        Ok(self.new_handle(Handle::Folder(entries.into())))
    }

    fn pinned_entries(&self, entries: &mut Vec<DirEntry>) -> Result<()> {
        let pinned = self.pinned.read().clone();
        for (shown, Pinned { place, folder }) in pinned {
            let Ok(meta) = place.stat() else { continue };
            let (found, name) = if folder {
                (Found::Folder(place, identity(&meta)), shown)
            } else if self.images.examine(&place).is_ok() {
                (Found::Image(place, identity(&meta)), shown)
            } else {
                let base = strip_suffix(&shown, &self.look.suffix).unwrap_or(&shown);
                let name = [base, PROBLEM_SUFFIX.as_ref()].into_iter().collect();
                (Found::Problem(place, identity(&meta)), name)
            };
            let kind = if folder { Kind::Folder } else { Kind::File };
            entries.push(DirEntry { ino: found.ino(), kind, name });
        }
        Ok(())
    }

    fn mirrored_entries(&self, folder: &Place, entries: &mut Vec<DirEntry>) -> Result<()> {
        let listing = self.listing(folder)?;
        let places = || {
            let images = listing.images.iter();
            images.map(|(name, e)| (name, folder.elsewhere(e.relative.clone()), e.identity))
        };
        // Parts of images that only the image itself names.
        let mut parts = Vec::new();
        if listing.images.len() <= EXAMINED {
            for (_, place, _) in places() {
                if let Ok(facts) = self.images.examine(&place) {
                    parts.extend_from_slice(&facts.files[1..]);
                }
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
                (Found::Image(place, identity), self.shown(name))
            };
            entries.push(DirEntry { ino: found.ino(), kind: Kind::File, name });
        }
        for (name, identity) in &listing.folders {
            let place = folder.elsewhere(folder.relative.join(name));
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

    fn new_handle(&self, handle: Handle) -> u64 {
        let number = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.handles.lock().insert(number, handle);
        number
    }

    /// Ends the use of a directory.
    pub fn release_folder(&self, handle: u64) {
        self.handles.lock().remove(&handle);
    }

    // Files

    /// Opens a flat file. What it holds is never truncated.
    pub fn open(&self, ino: u64, write: bool, truncate: bool) -> Result<Opened> {
        let node = self.node(ino)?;
        match &node.what {
            What::Image(_) if truncate => {
                Err(not_permitted("the size is the virtual disk's; open without truncating"))
            }
            What::Image(image) => {
                let keep_cache =
                    image.open(&self.images, write, |facts| self.permit_write(image, facts))?;
                let handle = if write { WRITER } else { READER };
                Ok(Opened { handle, keep_cache, direct: false })
            }
            What::Problem(place, _) if !write => {
                let text = self.problem_text(place)?.into_bytes();
                let handle = self.new_handle(Handle::Text(text.into()));
                Ok(Opened { handle, keep_cache: false, direct: true })
            }
            What::Problem(..) => Err(Error::new(ErrorKind::ReadOnly, "a message, not an image")),
            _ => Err(Error::invalid("not a file")),
        }
    }

    /// Whether an image can be written as far as is known without looking further.
    fn may_write(&self, image: &ImageFile, facts: &Facts) -> Result<()> {
        let refuse = |why: String| {
            let what = format!("cannot be written: {why}");
            Err(Error::new(ErrorKind::ReadOnly, what).in_file(&image.place.path()))
        };
        if self.look.read_only {
            return refuse("the mount is read-only".into());
        }
        if let Some(reason) = &facts.read_only {
            return refuse(reason.clone());
        }
        match self.images.child_of(image.identity) {
            Some(child) => refuse(format!("{} is made from it", child.display())),
            None => Ok(()),
        }
    }

    /// [`Self::may_write`], after looking at every image that may be a child: those beside the
    /// image and in the directories above it.
    fn permit_write(&self, image: &ImageFile, facts: &Facts) -> Result<()> {
        self.may_write(image, facts)?;
        for folder in image.place.relative.ancestors().skip(1) {
            let folder = image.place.elsewhere(folder.to_owned());
            let Ok(listing) = self.listing(&folder) else { continue };
            for entry in listing.images.values().filter(|e| e.identity != image.identity) {
                let _ = self.images.examine(&folder.elsewhere(entry.relative.clone()));
            }
        }
        self.may_write(image, facts)
    }

    /// Reads into `buf` and returns how much of it the file reached.
    pub fn read(&self, ino: u64, handle: u64, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let node = self.node(ino)?;
        match &node.what {
            What::Image(image) => image.read(&self.images, offset, buf),
            What::Problem(..) => {
                let text = match self.handles.lock().get(&handle) {
                    Some(Handle::Text(text)) => text.clone(),
                    _ => return Err(stale()),
                };
                let rest = text.get(offset as usize..).unwrap_or_default();
                let len = rest.len().min(buf.len());
                buf[..len].copy_from_slice(&rest[..len]);
                Ok(len)
            }
            _ => Err(Error::invalid("not a file")),
        }
    }

    /// Writes as much of `data` as lies inside the disk; no space at its end, as on a block device.
    pub fn write(&self, ino: u64, offset: u64, data: &[u8]) -> Result<usize> {
        self.with_disk(ino, |disk| {
            let room = disk.size().saturating_sub(offset).min(data.len() as u64) as usize;
            if room == 0 && !data.is_empty() {
                return Err(Error::new(ErrorKind::NoSpace, "the end of the disk"));
            }
            disk.write_at(offset, &data[..room]).map(|()| room)
        })
    }

    /// Runs `act` on an image's open disk.
    fn with_disk<R>(&self, ino: u64, act: impl FnOnce(&Disk) -> Result<R>) -> Result<R> {
        match &self.node(ino)?.what {
            What::Image(image) => image.with_disk(&self.images, act),
            _ => Err(Error::invalid("not an image")),
        }
    }

    /// close(2) of a file: whoever wrote learns whether that worked.
    pub fn flush(&self, ino: u64, handle: u64) -> Result<()> {
        if handle == WRITER { self.sync(ino) } else { Ok(()) }
    }

    /// Makes all writes durable.
    pub fn sync(&self, ino: u64) -> Result<()> {
        match &self.node(ino)?.what {
            What::Image(image) => image.flush(),
            _ => Ok(()),
        }
    }

    /// Ends the use of a file.
    pub fn release(&self, ino: u64, handle: u64) -> Result<()> {
        if handle >= FIRST_HANDLE {
            self.handles.lock().remove(&handle);
            return Ok(());
        }
        let node = self.node(ino)?;
        let What::Image(image) = &node.what else { return Ok(()) };
        let released = image.release(&self.images, handle == WRITER);
        if let Err(e) = &released {
            self.note_failure(e);
        }
        if node.lookups.load(Ordering::Relaxed) == 0 {
            self.forget(ino, 0);
        }
        released
    }

    /// fallocate(2): punching holes and zeroing free space, reserving has nothing to do.
    pub fn allocate(&self, ino: u64, offset: u64, len: u64, mode: i32) -> Result<()> {
        let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let what = mode & !libc::FALLOC_FL_KEEP_SIZE;
        self.with_disk(ino, |disk| {
            let end = offset.checked_add(len).ok_or_else(|| Error::invalid("range too large"))?;
            if end > disk.size() && !keep_size {
                return Err(not_permitted("the size is the virtual disk's"));
            }
            let inside = end.min(disk.size()).saturating_sub(offset);
            match what {
                0 if disk.read_only().is_some() => {
                    Err(Error::new(ErrorKind::ReadOnly, "read-only"))
                }
                0 => Ok(()),
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE => {
                    if inside == 0 {
                        Ok(())
                    } else {
                        disk.discard(offset, inside)
                    }
                }
                _ => Err(Error::unsupported("this kind of fallocate")),
            }
        })
    }

    /// lseek(2) to the next data (`SEEK_DATA`) or hole (`SEEK_HOLE`).
    pub fn seek(&self, ino: u64, offset: u64, data: bool) -> Result<Option<u64>> {
        self.with_disk(ino, |disk| {
            if offset >= disk.size() {
                return Ok(None);
            }
            match data {
                // Data the kernel holds back may lie in what is a hole here.
                true if self.look.writeback => Ok(Some(offset)),
                false if self.look.writeback => Ok(Some(disk.size())),
                true => Ok(disk.next_data(offset)?.map(|range| range.start.max(offset))),
                false => disk.next_hole(offset).map(Some),
            }
        })
    }

    /// Target of the symlink that `ln -s` just made.
    pub fn link_target(&self, ino: u64) -> Result<PathBuf> {
        match &self.node(ino)?.what {
            What::Link(target) => Ok(target.clone()),
            _ => Err(Error::invalid("not a symlink")),
        }
    }

    fn problem_text(&self, place: &Place) -> Result<String> {
        let Err(problem) = self.images.examine(place) else { return Err(stale()) };
        let path = place.path();
        Ok(format!(
            "This image cannot be shown as a disk:\n\n    {problem}\n\n\
             `flatdisk check '{path}'` tells more.\n\
             The flat file appears here as soon as the image opens.\n",
            path = path.display()
        ))
    }

    // Opening and closing at run time

    /// Shows the image at `path` in the root as `name`, or under its own name.
    pub fn pin(&self, path: &Path, name: Option<&OsStr>) -> Result<OsString> {
        let absolute = normalise(path).filter(|_| path.is_absolute());
        let absolute = absolute
            .ok_or_else(|| Error::invalid("an absolute path is needed here").in_file(path))?;
        self.refuse_own(&absolute)?;
        let failed = |e: io::Error| Error::io("open", &e).in_file(path);
        let real = std::fs::canonicalize(&absolute).map_err(failed)?;
        self.refuse_own(&real)?;
        let shown = match (name, absolute.file_name()) {
            (Some(name), _) => name.to_owned(),
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
        self.images.examine(&place)?;
        let mut pinned = self.pinned.write();
        if pinned.contains_key(&shown) {
            return Err(exists());
        }
        pinned.insert(shown.clone(), Pinned { place, folder: false });
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

    /// `rm`: takes an image that the user named out of the root. The image itself stays.
    pub fn unpin(&self, parent: u64, name: &OsStr) -> Result<()> {
        let parent = self.node(parent)?;
        let found = self.find(&parent, name)?;
        let read_only =
            || Error::new(ErrorKind::ReadOnly, "only images opened by name can be closed");
        let (ino, place) = match &found {
            Found::Image(place, _) | Found::Problem(place, _) => (found.ino(), place.path()),
            Found::Folder(..) => return Err(read_only()),
        };
        if parent.ino != ROOT {
            return Err(read_only());
        }
        let mut pinned = self.pinned.write();
        let key = pinned.iter().find(|(key, pinned)| {
            pinned.place.path() == place && (*key == name || matches!(found, Found::Problem(..)))
        });
        let key = key.map(|(key, _)| key.clone()).ok_or_else(read_only)?;
        if let Ok(node) = self.node(ino)
            && let What::Image(image) = &node.what
            && image.in_use()
        {
            return Err(Error::new(ErrorKind::Busy, "the file is open").in_file(&place));
        }
        pinned.remove(&key);
        Ok(())
    }

    // The whole tree

    fn opened_images(&self) -> Vec<Arc<Node>> {
        let nodes = self.nodes.read();
        let images = nodes.values().filter(|node| matches!(node.what, What::Image(_)));
        images.cloned().collect()
    }

    /// Flushes every image that was written, and returns what failed.
    pub fn flush_all(&self) -> Vec<Error> {
        let mut errors = Vec::new();
        for node in self.opened_images() {
            if let What::Image(image) = &node.what
                && let Err(e) = image.flush()
            {
                self.note_failure(&e);
                errors.push(e);
            }
        }
        errors
    }

    /// Closes every image; the mount is gone.
    pub fn close_all(&self) {
        for node in self.opened_images() {
            if let What::Image(image) = &node.what
                && let Err(e) = image.shut(&self.images)
            {
                self.note_failure(&e);
            }
        }
    }

    fn note_failure(&self, error: &Error) {
        let text = error.to_string();
        let mut failures = self.failures.lock();
        if !failures.contains(&text) && failures.len() < MAX_FAILURES {
            log::error!("{text}");
            failures.push(text);
        }
    }

    /// What failed to reach its image since the tree was made.
    pub fn failures(&self) -> Vec<String> {
        self.failures.lock().clone()
    }

    /// The images in use.
    pub fn usage(&self) -> Vec<ImageUsage> {
        let nodes = self.opened_images();
        let used = nodes.iter().filter_map(|node| match &node.what {
            What::Image(image) => {
                let usage = image.usage();
                let path = image.place.path();
                (usage.readers + usage.writers > 0).then_some(ImageUsage { path, usage })
            }
            _ => None,
        });
        used.collect()
    }
}

/// The place of a file by its real path.
fn place_of(real: &Path) -> Result<Place> {
    match (real.parent(), real.file_name()) {
        (Some(dir), Some(name)) => Ok(Place { source: Source::open(dir)?, relative: name.into() }),
        _ => Err(Error::invalid("not a file").in_file(real)),
    }
}

fn found(place: Place, make: fn(Place, FileIdentity) -> Found) -> Result<Found> {
    let meta = place.stat().map_err(|e| Error::io("stat", &e).in_file(&place.path()))?;
    Ok(make(place, identity(&meta)))
}

fn strip_suffix<'a>(name: &'a OsStr, suffix: &OsStr) -> Option<&'a OsStr> {
    name.as_bytes().strip_suffix(suffix.as_bytes()).map(OsStr::from_bytes)
}

fn not_found() -> Error {
    Error::new(ErrorKind::NotFound, "no such file or directory")
}

fn not_a_folder() -> Error {
    Error::io("not a directory", &io::Error::from_raw_os_error(libc::ENOTDIR))
}

fn not_permitted(why: &'static str) -> Error {
    Error::io(why, &io::Error::from_raw_os_error(libc::EPERM))
}
