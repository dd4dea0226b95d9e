//! The mounted tree: names, inode numbers, attributes and handles. Knows nothing of fuser, so all of
//! it is tested without a mount.
//!
//! # Names
//!
//! The root holds what the user named: images, and directories by their name; a single directory
//! is mirrored in the root itself. In a mirrored directory only folders and possible images show, by
//! their names alone, so that listing ten thousand images opens none. In a folder of at most
//! [`EXAMINED`] images each is looked at when the folder is listed, and one that does not open
//! shows as `name.error.txt`; in larger ones that happens when a name is looked up. The same holds for the
//! files of partitions, where these are to show.
//!
//! # Inode numbers
//!
//! A number is computed from the host path and the host's inode, so it is the same in every
//! listing, in every mount, and before the node exists. A replaced image is another node, and
//! programs that have the old one open keep it.
//!
//! # Files
//!
//! - `anew`: flat files that a program writes anew;
//! - `attributes`: attributes;
//! - `children`: who was made from an image;
//! - `devices`: images whose host file a loop device uses by itself;
//! - `files`: open files;
//! - `layer`: throw-away layers of single images;
//! - `names`: names;
//! - `partitions`: files of partitions;
//! - `pinned`: what the user named, and whether the host answers for it;
//! - `tests`: tests of the tree without a kernel;
//! - `upkeep`: what is done for all images at once.

mod anew;
mod attributes;
mod children;
mod devices;
mod files;
mod layer;
mod names;
mod partitions;
mod pinned;
#[cfg(test)]
mod tests;
mod upkeep;

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

pub use attributes::{IMAGE, PARTITION};
use nix::sys::statvfs::Statvfs;
use parking_lot::{Mutex, RwLock};

use upkeep::Failures;
pub use upkeep::ImageUsage;

use crate::error::{Error, ErrorKind, Result};
use crate::fuse::facts::{FactsCache, Opener};
use crate::fuse::image::{ImageFile, stale};
use crate::fuse::listing::Listing;
use crate::fuse::parts::{Part, View};
use crate::fuse::source::{Place, Source};
use crate::fuse::under_way::UnderWay;
use crate::storage::FileIdentity;
use anew::Anew;
use children::Searches;
use devices::Given;
use pinned::Pinned;

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
    /// What is written goes to scratch files here and vanishes, and any image can be written so.
    pub nonpersistent: Option<PathBuf>,
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
    /// Every partition shows as a file beside its disk.
    pub partitions: bool,
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

/// How a program opens a file.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wanted {
    /// It will write.
    pub write: bool,
    /// It will read. Who does not write does.
    pub read: bool,
    /// It throws away what the file holds (`O_TRUNC`).
    pub truncate: bool,
}

/// Handles of flat files say how they are open; the node has everything else. Readers share one,
/// writers have a number each.
const READER: u64 = 0;
const WRITER: u64 = 1 << 63;
/// Of a writer: it reads, too.
const READS_TOO: u64 = 1 << 62;
const FIRST_HANDLE: u64 = 1;

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
    /// A partition; the node of its disk stays for as long.
    Part(Arc<Node>, Arc<View>),
    /// An image that does not open.
    Problem(Place, FileIdentity),
    Link(PathBuf),
}

impl Node {
    /// The image behind a flat file, and which part of its disk the file shows.
    fn image(&self) -> Option<(&ImageFile, &View)> {
        match &self.what {
            What::Image(image) => Some((image, &image.views.whole)),
            What::Part(whole, view) => Some((whole.image()?.0, view)),
            _ => None,
        }
    }

    /// Whether it is a disk in the archive at `path` that somebody uses.
    fn in_use_beneath(&self, path: &Path) -> bool {
        let What::Image(image) = &self.what else { return false };
        let own = image.place.path();
        own != path && own.starts_with(path) && image.in_use()
    }

    /// Whether somebody uses it, so that it stays when the kernel has forgotten it.
    fn needed(&self) -> bool {
        match &self.what {
            What::Image(image) => image.needed(),
            What::Part(_, view) => view.users() > 0,
            _ => false,
        }
    }
}

impl What {
    fn is(&self, found: &Found) -> bool {
        match (self, found) {
            (Self::Folder(a), Found::Folder(b, _)) => a.is(b),
            (Self::Image(a), Found::Image(b, identity)) => a.identity == *identity && a.place.is(b),
            (Self::Problem(a, seen), Found::Problem(b, identity)) => seen == identity && a.is(b),
            (Self::Part(whole, view), Found::Part(place, identity, part)) => {
                let image = whole.image().map(|(image, _)| image);
                let same = |image: &ImageFile| image.identity == *identity && image.place.is(place);
                image.is_some_and(same) && view.part.as_ref() == Some(part)
            }
            _ => false,
        }
    }
}

/// What a name stands for.
#[derive(Debug, Clone)]
enum Found {
    Folder(Place, FileIdentity),
    Image(Place, FileIdentity),
    Problem(Place, FileIdentity),
    Part(Place, FileIdentity, Part),
}

impl Found {
    fn ino(&self) -> u64 {
        let (tag, place, identity) = match self {
            Self::Folder(place, identity) => (0u8, place, identity),
            Self::Image(place, identity) => (1, place, identity),
            Self::Problem(place, identity) => (2, place, identity),
            Self::Part(place, identity, _) => (4, place, identity),
        };
        let mut hasher = DefaultHasher::new();
        (tag, place.path().as_os_str().as_bytes(), &place.users, identity).hash(&mut hasher);
        // A partition in another place is another file, of which the kernel keeps other pages.
        if let Self::Part(_, _, part) = self {
            (part.number, part.range()).hash(&mut hasher);
        }
        // Room for the numbers below, and for signed arithmetic of programs.
        (hasher.finish() >> 1).max(ROOT + 1)
    }
}

/// Tells the kernel that its pages of a file are old, and waits for it to drop them or not.
type OldPages = dyn Fn(u64, bool) + Send + Sync;

/// See the module's documentation.
pub struct Tree {
    look: Look,
    images: Arc<FactsCache>,
    /// The directory mirrored in the root.
    mirror: Option<Place>,
    pinned: RwLock<BTreeMap<OsString, Pinned>>,
    nodes: RwLock<HashMap<u64, Arc<Node>>>,
    listings: Mutex<HashMap<PathBuf, Arc<Listing>>>,
    handles: Mutex<HashMap<u64, Handle>>,
    next_handle: AtomicU64,
    anew: Anew,
    /// Images that were given to loop devices.
    given: Mutex<Vec<Given>>,
    old_pages: OnceLock<Box<OldPages>>,
    failures: Arc<Failures>,
    /// Searches for children that are under way.
    searches: Arc<Searches>,
    /// Held by whoever asks the host for its space.
    measuring: Arc<Mutex<()>>,
    /// What the host said last of its space.
    space: Mutex<Option<Statvfs>>,
    /// What is asked of the tree, and of each image, counts as work here.
    pub(super) under_way: Arc<UnderWay>,
}

impl Tree {
    /// A tree over `sources`, each an image or a directory.
    pub fn new(sources: &[PathBuf], opener: Box<dyn Opener>, look: Look) -> Result<Self> {
        let images = Arc::new(FactsCache::new(opener, look.nonpersistent.clone()));
        if look.partitions {
            images.want_partitions();
        }
        let mut tree = Self {
            look,
            images,
            mirror: None,
            pinned: RwLock::default(),
            nodes: RwLock::default(),
            listings: Mutex::default(),
            handles: Mutex::default(),
            next_handle: AtomicU64::new(FIRST_HANDLE),
            anew: Anew::default(),
            given: Mutex::default(),
            old_pages: OnceLock::new(),
            failures: Arc::default(),
            searches: Arc::default(),
            measuring: Arc::default(),
            space: Mutex::default(),
            under_way: Arc::default(),
        };
        if let [source] = sources
            && source.is_dir()
        {
            let source = Source::open(source)?;
            tree.refuse_own(source.root())?;
            tree.mirror = Some(Place::top(source));
        } else {
            for source in sources {
                tree.pin_source(source)?;
            }
        }
        let root = Node { ino: ROOT, what: What::Root, lookups: AtomicU64::new(1) };
        tree.nodes.write().insert(ROOT, Arc::new(root));
        Ok(tree)
    }

    /// Has the kernel told by `tell` when its pages of a file are old. Without being asked to, `tell` must
    /// not wait for the kernel.
    pub fn on_old_pages(&self, tell: impl Fn(u64, bool) + Send + Sync + 'static) {
        // A tree is mounted once.
        let _ = self.old_pages.set(Box::new(tell));
    }

    fn node(&self, ino: u64) -> Result<Arc<Node>> {
        self.nodes.read().get(&ino).cloned().ok_or_else(stale)
    }

    /// Looks up `name` in the directory `parent`; the kernel holds one more reference to the node.
    pub fn lookup(&self, parent: u64, name: &OsStr) -> Result<Attributes> {
        let parent = self.node(parent)?;
        match parent.what {
            What::Root => self.lookup_in_root(&parent, name),
            _ => self.enter_and_describe(self.find(&parent, name)?),
        }
    }

    /// What stat(2) shows of what was found; the kernel holds one more reference to the node.
    fn enter_and_describe(&self, found: Found) -> Result<Attributes> {
        let node = self.enter(found);
        self.attributes_of(&node).inspect_err(|_| self.forget(node.ino, 1))
    }

    /// The node for what was found, made if need be, with one more reference.
    fn enter(&self, found: Found) -> Arc<Node> {
        let whole = match &found {
            Found::Part(place, identity, _) => {
                Some(self.enter(Found::Image(place.clone(), *identity)))
            }
            _ => None,
        };
        let mut nodes = self.nodes.write();
        let (known, ino) = place_in(&nodes, &found);
        if let Some(node) = known {
            node.lookups.fetch_add(1, Ordering::Relaxed);
            drop(nodes);
            // It has a reference of its own to the node of its disk.
            whole.iter().for_each(|whole| self.forget(whole.ino, 1));
            return node;
        }
        let what = match (found, whole) {
            (Found::Folder(place, _), _) => What::Folder(place),
            (Found::Image(place, identity), _) => {
                let image = ImageFile::new(place, identity, ino);
                if self.look.partitions {
                    image.divide();
                }
                What::Image(Box::new(image))
            }
            (Found::Part(.., part), Some(whole)) => What::part(whole, ino, part),
            (Found::Part(place, identity, _), None) | (Found::Problem(place, identity), _) => {
                What::Problem(place, identity)
            }
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
        if left > 0 || node.needed() {
            return;
        }
        let gone = nodes.remove(&ino);
        drop(nodes);
        if let Some(What::Part(whole, view)) = gone.as_ref().map(|node| &node.what) {
            whole.image().into_iter().for_each(|(image, _)| image.views.remove(view));
            self.forget(whole.ino, 1);
        }
    }

    /// The node of what was found, if there is one.
    fn known(&self, found: &Found) -> Option<Arc<Node>> {
        place_in(&self.nodes.read(), found).0
    }

    fn new_handle(&self, handle: Handle) -> u64 {
        let number = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.handles.lock().insert(number, handle);
        number
    }

    fn opened_images(&self) -> Vec<Arc<Node>> {
        let nodes = self.nodes.read();
        let images = nodes.values().filter(|node| matches!(node.what, What::Image(_)));
        images.cloned().collect()
    }
}

/// The node of what was found among `nodes`, or the number for a new one.
fn place_in(nodes: &HashMap<u64, Arc<Node>>, found: &Found) -> (Option<Arc<Node>>, u64) {
    let mut ino = found.ino();
    while let Some(node) = nodes.get(&ino) {
        if node.what.is(found) {
            return (Some(node.clone()), ino);
        }
        ino += 1;
    }
    (None, ino)
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
