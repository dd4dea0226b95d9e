//! What is known of images that are not open: [`Opener`] and [`FactsCache`].
//!
//! Listing and `stat` need an image's size, whether it opens at all, and who its parents are. The
//! cache looks once, with [`Access::Peek`] and so without a lock, and again only when the image's
//! file changed. That an image does *not* open may be over at any time (a parent appears), so a
//! failure is believed for a second only.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::source::{self, Place, Stamp, identity};
use crate::disk::map::DiskRange;
use crate::error::{Error, Result};
use crate::formats::{self, Image, ImageInfo, OpenOptions};
use crate::storage::{Access, FileIdentity, Host, Storage};

/// How long a failure to open is believed.
const FAILURE_LIFE: Duration = Duration::from_secs(1);

/// Images remembered at most; beyond that the cache starts again from nothing.
const MAX_KNOWN: usize = 1 << 17;

/// What opening an image tells.
#[derive(Debug)]
pub struct Facts {
    /// Virtual size in bytes.
    pub size: u64,
    /// Why the image cannot be written however it is opened.
    pub read_only: Option<String>,
    /// The image's own files, itself first.
    pub files: Vec<PathBuf>,
    /// All parents' files and which they were, nearest first.
    pub parents: Vec<(PathBuf, FileIdentity)>,
    /// What the image says about itself.
    pub info: ImageInfo,
    /// Parts of the disk known to be lost.
    pub damage: Vec<DiskRange>,
}

impl Facts {
    /// The facts in an open image.
    pub fn of(image: &Image) -> Self {
        let parents = std::iter::successors(image.parent.as_deref(), |i| i.parent.as_deref())
            .flat_map(own_files)
            .filter_map(|path| {
                let identity = identity(&std::fs::symlink_metadata(&path).ok()?);
                Some((path, identity))
            })
            .collect();
        Self {
            size: image.disk.size(),
            read_only: image.read_only.clone(),
            files: own_files(image),
            parents,
            info: image.info.clone(),
            damage: image.damage.clone(),
        }
    }

    /// Stamps of all files that the disk's bytes come from; `None` while one is missing or too
    /// freshly changed for its stamp to be telling.
    pub fn contents(&self) -> Option<Vec<Stamp>> {
        let files = self.files.iter().chain(self.parents.iter().map(|(path, _)| path));
        files
            .map(|path| {
                let stamp = Stamp::of(&std::fs::symlink_metadata(path).ok()?);
                stamp.settled().then_some(stamp)
            })
            .collect()
    }
}

fn own_files(image: &Image) -> Vec<PathBuf> {
    let dir = image.path.parent().unwrap_or(Path::new("/"));
    let extents = image.info.extents.iter().map(|extent| dir.join(extent));
    std::iter::once(image.path.clone()).chain(extents).collect()
}

/// Opens images: the host's, or a test's.
pub trait Opener: Send + Sync + 'static {
    /// Opens the image at `place` with its parents.
    fn open(&self, place: &Place, access: Access) -> Result<Image>;
}

/// Opens the host's images, each only through its own source directory.
#[derive(Debug)]
pub struct HostOpener {
    host: Arc<dyn Host>,
    options: OpenOptions,
    /// An image whose parent the user named, and that parent.
    given: Option<(PathBuf, PathBuf)>,
}

impl HostOpener {
    /// An opener with everything but the access as in `options`. The image `given.0` has the parent
    /// `given.1`, wherever it says that its parent is.
    pub fn new(
        host: Arc<dyn Host>,
        options: OpenOptions,
        given: Option<(PathBuf, PathBuf)>,
    ) -> Self {
        Self { host, options, given }
    }
}

impl Opener for HostOpener {
    fn open(&self, place: &Place, access: Access) -> Result<Image> {
        let path = place.path();
        let given = self.given.iter().find(|(image, _)| *image == path);
        let parent = given.map(|(_, parent)| parent.clone());
        let options = OpenOptions { access, parent, ..self.options.clone() };
        let root = place.source.root().to_owned();
        let host: Arc<dyn Host> = Arc::new(Confined { host: self.host.clone(), root });
        formats::open(&host, &path, &options)
    }
}

/// A host whose files below `root` are opened without following symlinks out of it.
#[derive(Debug)]
struct Confined {
    host: Arc<dyn Host>,
    root: PathBuf,
}

impl Host for Confined {
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        match path.strip_prefix(&self.root) {
            Ok(relative) => self.host.open_beneath(&self.root, relative, access),
            Err(_) => self.host.open(path, access),
        }
    }

    fn open_beneath(&self, root: &Path, name: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        self.host.open_beneath(root, name, access)
    }

    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        self.host.create(path)
    }

    fn replace(&self, path: &Path, contents: &[u8]) -> Result<()> {
        self.host.replace(path, contents)
    }

    fn remove(&self, path: &Path) -> Result<()> {
        self.host.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> Result<()> {
        self.host.sync_dir(dir)
    }

    fn list(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        self.host.list(dir)
    }
}

/// See the module's documentation.
pub struct FactsCache {
    opener: Box<dyn Opener>,
    scratch: Option<PathBuf>,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    by_path: HashMap<PathBuf, Entry>,
    /// Paths of the images whose chain of parents holds this file.
    children: HashMap<FileIdentity, BTreeSet<PathBuf>>,
}

struct Entry {
    stamp: Stamp,
    /// Whether `stamp` tells the contents looked at from all later ones.
    settled: bool,
    looked: Instant,
    /// Open images are not looked at: what is known of them holds while they are.
    pins: u32,
    outcome: Result<Arc<Facts>>,
}

impl Entry {
    fn holds(&self, stamp: &Stamp) -> bool {
        match &self.outcome {
            Ok(_) if self.pins > 0 => self.stamp.identity == stamp.identity,
            Ok(_) => self.settled && self.stamp == *stamp,
            Err(_) => self.looked.elapsed() < FAILURE_LIFE && self.stamp == *stamp,
        }
    }
}

impl FactsCache {
    /// An empty cache over `opener`. With a directory for `scratch` files, images are never written.
    pub fn new(opener: Box<dyn Opener>, scratch: Option<PathBuf>) -> Self {
        Self { opener, scratch, known: Mutex::default() }
    }

    /// Where what is written goes, if not to the images.
    pub fn scratch(&self) -> Option<&Path> {
        self.scratch.as_deref()
    }

    /// Opens an image for use.
    pub fn open(&self, place: &Place, access: Access) -> Result<Image> {
        self.opener.open(place, access)
    }

    /// The facts of the image at `place`, looking at it if need be.
    pub fn examine(&self, place: &Place) -> Result<Arc<Facts>> {
        let path = place.path();
        let meta = place.stat().map_err(|e| Error::io("open", &e).in_file(&path))?;
        let stamp = Stamp::of(&meta);
        if let Some(entry) = self.known.lock().by_path.get(&path)
            && entry.holds(&stamp)
        {
            return entry.outcome.clone();
        }
        let settled = stamp.settled();
        let outcome =
            self.opener.open(place, Access::Peek).map(|image| Arc::new(Facts::of(&image)));
        let mut known = self.known.lock();
        // Opened meanwhile: what the open image says counts.
        if let Some(entry) = known.by_path.get(&path)
            && entry.pins > 0
            && entry.holds(&stamp)
        {
            return entry.outcome.clone();
        }
        known.insert(
            path,
            Entry { stamp, settled, looked: Instant::now(), pins: 0, outcome: outcome.clone() },
        );
        outcome
    }

    /// Whether the image is known not to open; never looks.
    pub fn known_bad(&self, place: &Place) -> bool {
        let bad = |entry: &Entry| entry.outcome.is_err().then_some(entry.stamp);
        let stamp = self.known.lock().by_path.get(&place.path()).and_then(bad);
        stamp.is_some_and(|stamp| place.stat().is_ok_and(|meta| Stamp::of(&meta) == stamp))
    }

    /// Holds `facts` to be true of the image until [`Self::unpin`].
    pub fn pin(&self, place: &Place, stamp: Stamp, facts: Arc<Facts>) {
        let path = place.path();
        let mut known = self.known.lock();
        // An image that had the name before, and is still open, does not count.
        let same = |entry: &&Entry| entry.stamp.identity == stamp.identity;
        let pins = known.by_path.get(&path).filter(same).map_or(0, |entry| entry.pins) + 1;
        known.insert(
            path,
            Entry { stamp, settled: false, looked: Instant::now(), pins, outcome: Ok(facts) },
        );
    }

    /// Undoes one [`Self::pin`] of the image that is, or was, the file `identity`.
    pub fn unpin(&self, place: &Place, identity: FileIdentity) {
        if let Some(entry) = self.known.lock().by_path.get_mut(&place.path())
            && entry.stamp.identity == identity
        {
            entry.pins = entry.pins.saturating_sub(1);
        }
    }

    /// An image, as far as any was looked at, that has the file `identity` among its parents.
    pub fn child_of(&self, identity: FileIdentity) -> Option<PathBuf> {
        let children: Vec<_> = {
            let known = self.known.lock();
            let paths = known.children.get(&identity)?.iter();
            paths.filter_map(|path| Some((path.clone(), known.by_path.get(path)?.stamp))).collect()
        };
        for (path, stamp) in children {
            let meta = std::fs::symlink_metadata(&path);
            if meta.is_ok_and(|meta| source::identity(&meta) == stamp.identity) {
                return Some(path);
            }
            self.known.lock().remove(&path);
        }
        None
    }
}

impl Known {
    fn insert(&mut self, path: PathBuf, entry: Entry) {
        if self.by_path.len() >= MAX_KNOWN {
            self.by_path.retain(|_, entry| entry.pins > 0);
            self.children.clear();
            let kept: Vec<_> = self.by_path.keys().cloned().collect();
            kept.iter().for_each(|path| self.note_parents(path));
        }
        self.remove(&path);
        self.by_path.insert(path.clone(), entry);
        self.note_parents(&path);
    }

    fn note_parents(&mut self, path: &Path) {
        let Some(Entry { outcome: Ok(facts), .. }) = self.by_path.get(path) else { return };
        for (_, identity) in &facts.parents {
            self.children.entry(*identity).or_default().insert(path.to_owned());
        }
    }

    fn remove(&mut self, path: &Path) {
        let Some(Entry { outcome: Ok(facts), .. }) = self.by_path.remove(path) else { return };
        for (_, identity) in &facts.parents {
            if let Some(children) = self.children.get_mut(identity) {
                children.remove(path);
                if children.is_empty() {
                    self.children.remove(identity);
                }
            }
        }
    }
}
