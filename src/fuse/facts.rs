//! What is known of images that are not open: [`Opener`] and [`FactsCache`].
//!
//! Listing and `stat` need an image's size, whether it opens at all, and who its parents are. The
//! cache looks once, with [`Access::Peek`] and so without a lock, and again only when the image's
//! file changed. That an image does *not* open may be over at any time (a parent appears), so a
//! failure is believed for a second only.
//!
//! A disk that another image was made from must not be written. It is known in two ways: as a file, to
//! images that have it open among their parents; and by its id, to images that name the id, whether
//! they find it or not.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::Metadata;
use std::hash::Hash;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::mounts;
use super::parts::{Part, parts_of};
use super::source::Place;
use crate::disk::map::DiskRange;
use crate::error::{Error, Result};
use crate::formats::{self, Id, Identity, Image, ImageInfo, Label, OpenOptions};
use crate::storage::permissions::Permissions;
use crate::storage::reach::{Reach, Root};
use crate::storage::remembered::{BELIEVED, Stamp, identity};
use crate::storage::{Access, FileIdentity, Host};

/// Images remembered at most; beyond that the cache starts again from nothing, but for open ones.
const MAX_KNOWN: usize = 1 << 17;

/// Bytes that what is remembered of images may take, about; beyond that the same happens.
const MAX_BYTES: usize = 32 << 20;

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
    /// Which disk it is, and whose child.
    pub label: Label,
    /// Parts of the disk known to be lost.
    pub damage: Vec<DiskRange>,
    /// Its partitions, where somebody wants to know.
    pub parts: Option<Arc<[Part]>>,
    /// Bytes that it takes of an archive, if it lies in one.
    pub archived: Option<u64>,
    /// The way to all of the files.
    reach: Reach,
    /// What else than the image's first file the disk's bytes come from.
    members: Vec<Member>,
}

/// A file that an image is made of.
#[derive(Debug)]
struct Member {
    path: PathBuf,
    identity: FileIdentity,
    /// It is written when the image is.
    own: bool,
    /// What having it takes, when the image was looked at.
    permissions: Vec<Permissions>,
}

impl Facts {
    /// The facts in an open image, to whose files `reach` is the way.
    pub fn of(image: &Image, reach: Reach) -> Self {
        let ancestors = std::iter::successors(image.parent.as_deref(), |i| i.parent.as_deref());
        let archived = image.files.first().is_some_and(|(_, file)| *file != file.of_host());
        let parents: Vec<_> = ancestors.flat_map(|parent| parent.files.clone()).collect();
        let own = image.files.iter().skip(1).map(|file| (file, true));
        let members = own.chain(parents.iter().map(|file| (file, false)));
        let members = members.map(|((path, identity), own)| {
            let permissions = look(&reach, path, *identity, &image.path);
            // Nobody gets what only somebody unknown may have.
            let permissions = permissions.map_or(vec![Permissions::NONE], |(_, found)| found);
            Member { path: path.clone(), identity: *identity, own, permissions }
        });
        Self {
            size: image.disk.size(),
            read_only: image.read_only.clone(),
            members: members.collect(),
            files: image.files.iter().map(|(path, _)| path.clone()).collect(),
            parents,
            info: image.info.clone(),
            label: Label {
                identity: image.identity.clone(),
                parent: image.link.as_ref().map(|link| link.identity.clone()),
                size: image.disk.size(),
            },
            damage: image.damage.clone(),
            parts: None,
            archived: archived.then(|| image.disk.allocated().unwrap_or_default()),
            reach,
        }
    }

    /// Stamps of all files that the disk's bytes come from; `None` while one is missing or too
    /// freshly changed for its stamp to be telling.
    pub fn contents(&self) -> Option<Vec<Stamp>> {
        let files = self.files.iter().chain(self.parents.iter().map(|(path, _)| path));
        files
            .map(|path| {
                let stamp = Stamp::of(&self.reach.stat(path).ok()?);
                stamp.settled().then_some(stamp)
            })
            .collect()
    }

    /// Metadata of the image's own files but the first.
    pub fn extents(&self) -> impl Iterator<Item = Metadata> {
        self.members.iter().filter(|member| member.own).filter_map(|member| {
            let meta = self.reach.stat(&member.path).ok()?;
            (member.identity == identity(&meta)).then_some(meta)
        })
    }

    /// What is left of the permissions `first` of the image's first file where all of its files must
    /// permit the same: reading, and writing what is its own if it is `written`.
    pub fn permissions(&self, first: Permissions, written: bool) -> Permissions {
        let Some(image) = self.files.first() else { return first };
        self.members.iter().fold(first, |left, member| {
            let now = look(&self.reach, &member.path, member.identity, image);
            let now = now.map(|(_, permissions)| permissions);
            let needed = now.as_ref().unwrap_or(&member.permissions);
            needed.iter().fold(left, |left, needed| {
                let needed = if member.own && written { *needed } else { needed.readable() };
                left.and(&needed)
            })
        })
    }
}

impl Facts {
    /// Bytes of memory that they take, about. Most of an image's descriptor may be in them.
    fn weight(&self) -> usize {
        let paths = self.files.iter().chain(&self.info.extents);
        let paths = paths.chain(self.parents.iter().map(|(path, _)| path));
        let texts = self.info.warnings.iter().map(|text| text.len() + size_of::<String>());
        let paths = paths.map(|path| path.as_os_str().len() + size_of::<PathBuf>() + ALLOCATION);
        let details = self.info.details.iter().map(|(name, value)| name.len() + weight_of(value));
        let damage = self.damage.len() * size_of::<DiskRange>();
        let parts = self.parts.iter().flat_map(|parts| parts.iter()).map(Part::weight);
        let all = paths.chain(texts).chain(details).chain(parts);
        size_of::<Self>() + all.sum::<usize>() + damage
    }
}

/// What an allocation costs besides its contents, about.
const ALLOCATION: usize = 16;

/// What a node of a JSON object takes, with room for some fields, and how many are in one as a rule.
const NODE: usize = 11 * (size_of::<String>() + size_of::<serde_json::Value>()) + ALLOCATION;
const NODE_FIELDS: usize = 8;

/// Bytes of memory that a JSON value takes, about.
fn weight_of(value: &serde_json::Value) -> usize {
    use serde_json::Value;
    let inside = match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
        Value::String(text) => text.len() + ALLOCATION,
        Value::Array(values) => values.iter().map(weight_of).sum(),
        Value::Object(fields) => {
            let texts =
                |(name, value): (&String, &Value)| name.len() + ALLOCATION + weight_of(value);
            fields.len().div_ceil(NODE_FIELDS) * NODE + fields.iter().map(texts).sum::<usize>()
        }
    };
    size_of::<Value>() + inside
}

/// [`Reach::look`] at a file that is still the one it was.
fn look(
    reach: &Reach,
    path: &Path,
    known: FileIdentity,
    beside: &Path,
) -> Option<(Metadata, Vec<Permissions>)> {
    reach.look(path, beside).ok().filter(|(meta, _)| identity(meta) == known.of_host())
}

/// Opens images: the host's, or a test's.
pub trait Opener: Send + Sync + 'static {
    /// Opens the image at `place` with its parents.
    fn open(&self, place: &Place, access: Access) -> Result<Image>;

    /// What the headers of the image at `place` say, whether its parents are there or not.
    fn label(&self, place: &Place) -> Option<Label>;
    /// The way to the files of the image at `place`, as for whoever serves it.
    fn reach(&self, _place: &Place) -> Reach {
        Reach::default()
    }
}

/// Opens the host's images, each only through its own source directory.
#[derive(Debug)]
pub struct HostOpener {
    options: OpenOptions,
    /// Directories outside the image's source that were permitted, opened once.
    roots: Vec<Root>,
    /// An image whose parent the user named, and that parent.
    given: Option<(PathBuf, PathBuf)>,
}

impl HostOpener {
    /// An opener with everything but the access as in `options`. The image `given.0` has the parent
    /// `given.1`, wherever it says that its parent is.
    pub fn new(options: OpenOptions, given: Option<(PathBuf, PathBuf)>) -> Result<Self> {
        let open = |path: &Path| {
            let root = Root::open(path).map_err(|e| Error::io("open", &e).in_file(path))?;
            Ok::<_, Error>(root.gated(mounts::gate()))
        };
        let mut roots = Vec::new();
        if let Some((_, parent)) = &given {
            roots.push(open(parent.parent().unwrap_or(Path::new("/")))?.served());
        }
        for path in &options.sources {
            roots.push(open(path)?.served());
        }
        for path in &options.allow_parent {
            roots.push(open(path)?);
        }
        Ok(Self { options, roots, given })
    }
}

impl Opener for HostOpener {
    fn open(&self, place: &Place, access: Access) -> Result<Image> {
        let path = place.path();
        let given = self.given.iter().find(|(image, _)| *image == path);
        let parent = given.map(|(_, parent)| parent.clone());
        let options = OpenOptions { access, parent, ..self.options.clone() };
        let reach = Arc::new(self.reach(place));
        let host: Arc<dyn Host> = reach.clone();
        formats::open(&host, &path, &options).map_err(|e| match told_to_all(place, &reach) {
            true => e,
            false => e.withhold(),
        })
    }

    fn label(&self, place: &Place) -> Option<Label> {
        let host: Arc<dyn Host> = Arc::new(self.reach(place));
        let file = host.open(&place.path(), Access::Peek).ok()?;
        self.options.folders.label(&host, file)
    }

    fn reach(&self, place: &Place) -> Reach {
        let own = std::iter::once(place.source.directory());
        let roots = own.chain(&self.roots).cloned().collect();
        Reach::new(roots, place.users.clone())
    }
}

/// Whether all who may read the image at `place` may read everything that was opened for it.
fn told_to_all(place: &Place, reach: &Reach) -> bool {
    let Ok(own) = place.permissions() else { return false };
    reach.seen().iter().all(|path| readers_may_have(own, reach, path, &place.path()))
}

/// Whether all who may read a file with the permissions `own`, which is `image`, may read the one at
/// `path`, too.
fn readers_may_have(own: Permissions, reach: &Reach, path: &Path, image: &Path) -> bool {
    let Ok((_, needed)) = reach.look(path, image) else { return false };
    let left = needed.iter().fold(own, |left, needed| left.and(&needed.readable()));
    left.readers() == own.readers()
}

/// See the module's documentation.
pub struct FactsCache {
    opener: Box<dyn Opener>,
    scratch: Option<PathBuf>,
    /// Images that are never written, by path, and where what is written to them goes.
    throw_away: Mutex<HashMap<PathBuf, PathBuf>>,
    known: Mutex<Known>,
    /// Whether anybody wants to know the partitions.
    partitions: AtomicBool,
    /// Images that [`Self::examine_within`] looks at now.
    looks: (Mutex<HashSet<PathBuf>>, Condvar),
}

#[derive(Default)]
struct Known {
    images: HashMap<Key, Entry>,
    /// The images whose chain of parents holds this file.
    children: HashMap<FileIdentity, BTreeSet<Key>>,
    /// The images whose parent has this id.
    named: HashMap<Id, BTreeSet<Key>>,
    /// Bytes that the facts in `images` take, about.
    bytes: usize,
}

/// An image by its path, and by who must be able to open it.
type Key = (PathBuf, Vec<u32>);

fn key(place: &Place) -> Key {
    (place.path(), place.users.clone())
}

struct Entry {
    place: Place,
    stamp: Stamp,
    /// How long the contents looked at may be taken for the present ones while `stamp` is the file's.
    life: Duration,
    looked: Instant,
    /// Open images are not looked at: what is known of them holds while they are.
    pins: u32,
    outcome: Result<Arc<Facts>>,
    /// Which disk it is, as far as the headers of one that does not open say.
    label: Option<Label>,
}

impl Entry {
    fn weight(&self) -> usize {
        size_of::<Self>() + self.outcome.as_ref().map_or(0, |facts| facts.weight())
    }

    fn holds(&self, stamp: &Stamp) -> bool {
        match &self.outcome {
            Ok(_) if self.pins > 0 => self.stamp.identity == stamp.identity,
            Ok(_) => self.looked.elapsed() < self.life && self.stamp == *stamp,
            Err(_) => self.looked.elapsed() < BELIEVED && self.stamp == *stamp,
        }
    }
}

impl Entry {
    /// The files of all its parents.
    fn parents(&self) -> Vec<FileIdentity> {
        let facts = self.outcome.iter();
        facts.flat_map(|facts| &facts.parents).map(|(_, identity)| *identity).collect()
    }

    /// What its parent may be known by.
    fn wanted(&self) -> Vec<Id> {
        let parent = self.label.as_ref().and_then(|label| label.parent.as_ref());
        parent.map(Identity::keys).unwrap_or_default()
    }

    /// Whether it may be a child of the disk with this label in another file, `identity`.
    fn names(&self, identity: FileIdentity, label: &Label) -> bool {
        let found = self.outcome.as_ref().is_ok_and(|facts| !facts.parents.is_empty());
        let own = self.label.as_ref();
        self.stamp.identity != identity && own.is_some_and(|own| own.names(label, found))
    }
}

impl FactsCache {
    /// An empty cache over `opener`. With a directory for `scratch` files, images are never written.
    pub fn new(opener: Box<dyn Opener>, scratch: Option<PathBuf>) -> Self {
        let partitions = AtomicBool::new(false);
        let (throw_away, known) = (Mutex::default(), Mutex::default());
        Self { opener, scratch, throw_away, known, partitions, looks: Default::default() }
    }

    /// From here on partition tables are read, too.
    pub fn want_partitions(&self) {
        self.partitions.store(true, Ordering::Relaxed);
    }

    /// Where what is written to an image goes, if not to the image.
    pub fn scratch(&self, place: &Place) -> Option<PathBuf> {
        let own = || self.throw_away.lock().get(&place.path()).cloned();
        self.scratch.clone().or_else(own)
    }

    /// From here on what is written to an image goes to scratch files in `dir`, or again to the image.
    pub fn throw_away(&self, place: &Place, dir: Option<PathBuf>) {
        let mut throw_away = self.throw_away.lock();
        match dir {
            Some(dir) => throw_away.insert(place.path(), dir),
            None => throw_away.remove(&place.path()),
        };
    }

    /// Opens an image for use.
    pub fn open(&self, place: &Place, access: Access) -> Result<Image> {
        self.opener.open(place, access)
    }

    /// The facts in the open image of `place`.
    pub fn facts_of(&self, place: &Place, image: &Image) -> Facts {
        let wanted = self.partitions.load(Ordering::Relaxed);
        let parts = wanted.then(|| parts_of(&image.disk));
        Facts { parts, ..Facts::of(image, self.opener.reach(place)) }
    }

    /// Whether all who may read the image at `place` may know of the one at `other`.
    pub fn readers_know(&self, place: &Place, other: &Place) -> bool {
        let reach = self.opener.reach(other);
        let own = place.permissions();
        own.is_ok_and(|own| readers_may_have(own, &reach, &other.path(), &place.path()))
    }

    /// The facts of the image at `place`, looking at it if need be.
    pub fn examine(&self, place: &Place) -> Result<Arc<Facts>> {
        let path = place.path();
        let meta = place.stat().map_err(|e| Error::io("open", &e).in_file(&path))?;
        let stamp = Stamp::of(&meta);
        let key = key(place);
        if let Some(entry) = self.known.lock().images.get(&key)
            && entry.holds(&stamp)
            && (entry.pins > 0 || self.tells_enough(&entry.outcome))
        {
            return entry.outcome.clone();
        }
        let life = stamp.life();
        let outcome = self.opener.open(place, Access::Peek);
        let outcome = outcome.map(|image| Arc::new(self.facts_of(place, &image)));
        let label = match &outcome {
            Ok(facts) => Some(facts.label.clone()),
            Err(_) => self.opener.label(place),
        };
        let mut known = self.known.lock();
        // Opened meanwhile: what the open image says counts.
        if let Some(entry) = known.images.get(&key)
            && entry.pins > 0
            && entry.holds(&stamp)
        {
            return entry.outcome.clone();
        }
        let (place, looked) = (place.clone(), Instant::now());
        let pins = 0;
        let entry = Entry { place, stamp, life, looked, pins, outcome: outcome.clone(), label };
        known.insert(key, entry);
        outcome
    }

    /// [`Self::examine`] that gives up where the image does not answer within `patience` to somebody
    /// else who looks at it: so only one such look hangs.
    pub fn examine_within(&self, place: &Place, patience: Duration) -> Option<Result<Arc<Facts>>> {
        let path = place.path();
        let begun = Instant::now();
        {
            let mut looks = self.looks.0.lock();
            while looks.contains(&path) {
                let time = patience.checked_sub(begun.elapsed())?;
                self.looks.1.wait_for(&mut looks, time);
            }
            looks.insert(path.clone());
        }
        let facts = self.examine(place);
        self.looks.0.lock().remove(&path);
        self.looks.1.notify_all();
        Some(facts)
    }

    /// Whether it has the partitions, if these are wanted.
    fn tells_enough(&self, outcome: &Result<Arc<Facts>>) -> bool {
        let lacks = outcome.as_ref().is_ok_and(|facts| facts.parts.is_none());
        !lacks || !self.partitions.load(Ordering::Relaxed)
    }

    /// Whether the image is known not to open; never looks.
    pub fn known_bad(&self, place: &Place) -> bool {
        let bad = |entry: &Entry| entry.outcome.is_err().then_some(entry.stamp);
        let stamp = self.known.lock().images.get(&key(place)).and_then(bad);
        stamp.is_some_and(|stamp| place.stat().is_ok_and(|meta| Stamp::of(&meta) == stamp))
    }

    /// The partitions of an image as far as they are known; never looks.
    pub fn known_parts(&self, place: &Place) -> Option<Arc<[Part]>> {
        let parts =
            |entry: &Entry| Some((entry.stamp, entry.outcome.as_ref().ok()?.parts.clone()?));
        let (stamp, parts) = self.known.lock().images.get(&key(place)).and_then(parts)?;
        place.stat().is_ok_and(|meta| Stamp::of(&meta) == stamp).then_some(parts)
    }

    /// Holds `facts` to be true of the image until [`Self::unpin`].
    pub fn pin(&self, place: &Place, stamp: Stamp, facts: Arc<Facts>) {
        let key = key(place);
        let mut known = self.known.lock();
        // An image that had the name before, and is still open, does not count.
        let same = |entry: &&Entry| entry.stamp.identity == stamp.identity;
        let pins = known.images.get(&key).filter(same).map_or(0, |entry| entry.pins) + 1;
        let (place, looked) = (place.clone(), Instant::now());
        let (label, outcome) = (Some(facts.label.clone()), Ok(facts));
        let entry = Entry { place, stamp, life: Duration::ZERO, looked, pins, outcome, label };
        known.insert(key, entry);
    }

    /// Undoes one [`Self::pin`] of the image that is, or was, the file `identity`.
    pub fn unpin(&self, place: &Place, identity: FileIdentity) {
        if let Some(entry) = self.known.lock().images.get_mut(&key(place))
            && entry.stamp.identity == identity
        {
            entry.pins = entry.pins.saturating_sub(1);
        }
    }

    /// Whether the image at `place` was made from the disk in another file, `identity`, which has this
    /// label. Only children are opened for it, for what they say is not all: other images may lie between.
    pub fn is_child(&self, place: &Place, identity: FileIdentity, label: &Label) -> bool {
        let Some(own) = self.opener.label(place).filter(|own| own.parent.is_some()) else {
            return false;
        };
        let parents = self.examine(place).map(|facts| facts.parents.clone()).unwrap_or_default();
        own.names(label, !parents.is_empty()) || parents.iter().any(|(_, file)| *file == identity)
    }

    /// An image, as far as any was looked at, that was made from the disk in the file `identity`, which
    /// has this label.
    pub fn child_of(&self, identity: FileIdentity, label: &Label) -> Option<Place> {
        let children: Vec<_> = {
            let known = self.known.lock();
            let ids = label.identity.keys();
            let by_file = known.children.get(&identity).into_iter().flatten();
            let by_name = ids.iter().filter_map(|id| known.named.get(id)).flatten();
            let names = |key: &Key| known.images.get(key).is_some_and(|e| e.names(identity, label));
            let by_name = by_name.filter(|key| names(key));
            let entry = |key| known.images.get(key).map(|entry| (entry.place.clone(), entry.stamp));
            by_file.chain(by_name).filter_map(entry).collect()
        };
        for (place, stamp) in children {
            if place.stat().is_ok_and(|meta| Stamp::of(&meta).identity == stamp.identity) {
                return Some(place);
            }
            self.known.lock().remove(&key(&place));
        }
        None
    }
}

impl Known {
    fn insert(&mut self, key: Key, entry: Entry) {
        let weight = entry.weight();
        if self.images.len() >= MAX_KNOWN || self.bytes + weight > MAX_BYTES {
            self.images.retain(|_, entry| entry.pins > 0);
            self.bytes = self.images.values().map(Entry::weight).sum();
            self.children.clear();
            self.named.clear();
            let kept: Vec<_> = self.images.keys().cloned().collect();
            kept.iter().for_each(|key| self.note_parents(key));
        }
        self.remove(&key);
        self.images.insert(key.clone(), entry);
        self.bytes += weight;
        self.note_parents(&key);
    }

    fn note_parents(&mut self, key: &Key) {
        let Some(entry) = self.images.get(key) else { return };
        for identity in entry.parents() {
            self.children.entry(identity).or_default().insert(key.clone());
        }
        for id in entry.wanted() {
            self.named.entry(id).or_default().insert(key.clone());
        }
    }

    fn remove(&mut self, key: &Key) {
        let Some(entry) = self.images.remove(key) else { return };
        self.bytes = self.bytes.saturating_sub(entry.weight());
        for identity in entry.parents() {
            take_out(&mut self.children, &identity, key);
        }
        for id in entry.wanted() {
            take_out(&mut self.named, &id, key);
        }
    }
}

/// Takes an image out of those under `id`.
fn take_out<I: Eq + Hash>(images: &mut HashMap<I, BTreeSet<Key>>, id: &I, key: &Key) {
    if let Some(found) = images.get_mut(id) {
        found.remove(key);
        if found.is_empty() {
            images.remove(id);
        }
    }
}
