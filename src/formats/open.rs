//! Opening an image: recognise, open, follow parents.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::disk::Disk;
use crate::disk::map::DiskRange;
use crate::disk::tables::CacheBudget;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::storage::{Access, FileIdentity, Host, Storage};

use super::{Identity, ImageInfo, Opened, ParentLink, raw, recognise, references};

/// Longest chain of parents that is followed.
pub const MAX_CHAIN: usize = 256;

/// How far apart two times of one change may be: images tell seconds, some file systems every other.
const TIME_STEP: Duration = Duration::from_secs(3);

/// How to open an image.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// For looking, reading or writing.
    pub access: Access,
    /// Read on where the image contradicts itself or its parent changed. Never writes.
    pub force: bool,
    /// Directories besides the image's own in which parents may lie.
    pub allow_parent: Vec<PathBuf>,
    /// The image's parent, instead of looking where the image says. It must be the right one all the
    /// same; the parent's own parents are looked for as ever.
    pub parent: Option<PathBuf>,
    /// What children know the image by from its first write on, instead of something new: for changes
    /// that leave the image's contents as they are, or that its child was told about. Parents of the
    /// image are not affected.
    pub next_identity: Option<Identity>,
    /// Memory for tables, shared by all images of a process.
    pub budget: Arc<CacheBudget>,
}

impl OpenOptions {
    /// Options for opening with `access`, everything else at its default.
    pub fn new(access: Access) -> Self {
        Self {
            access,
            force: false,
            allow_parent: Vec::new(),
            parent: None,
            next_identity: None,
            budget: CacheBudget::new(CacheBudget::DEFAULT),
        }
    }
}

/// What a driver needs besides the file itself: where other files come from, and what is allowed.
pub struct OpenContext {
    host: Arc<dyn Host>,
    /// Directory of the image.
    dir: PathBuf,
    /// How the image's own files are opened.
    pub access: Access,
    /// See [`OpenOptions::force`].
    pub force: bool,
    /// See [`OpenOptions::next_identity`].
    pub next_identity: Option<Identity>,
    /// Memory for tables.
    pub budget: Arc<CacheBudget>,
}

impl OpenContext {
    /// A context for the image at `path`.
    pub fn new(host: &Arc<dyn Host>, path: &Path, options: &OpenOptions) -> Self {
        Self {
            host: host.clone(),
            dir: directory_of(path),
            access: options.access,
            force: options.force,
            next_identity: options.next_identity.clone(),
            budget: options.budget.clone(),
        }
    }

    /// Whether the image is opened for writing.
    pub fn write(&self) -> bool {
        self.access == Access::Write
    }

    /// The host that files come from.
    pub fn host(&self) -> &Arc<dyn Host> {
        &self.host
    }

    /// Opens an extent file that the image names, with the image's own access.
    pub fn open_extent(&self, name: &str) -> Result<Arc<dyn Storage>> {
        let relative = references::beneath(name)?;
        self.host.open_beneath(&self.dir, &relative, self.access)
    }
}

/// An open image: the disk, and what the image says about itself.
#[derive(Debug)]
pub struct Image {
    /// The disk.
    pub disk: Arc<Disk>,
    /// What `info` shows.
    pub info: ImageInfo,
    /// The image's identity, as its children know it.
    pub identity: Identity,
    /// The image's path.
    pub path: PathBuf,
    /// Why the image cannot be written however it is opened, if it cannot.
    pub read_only: Option<String>,
    /// Parts of the disk known to be lost.
    pub damage: Vec<DiskRange>,
    /// The parent's image, for a child.
    pub parent: Option<Box<Image>>,
}

impl Image {
    /// The image and its parents, nearest first.
    pub fn chain(&self) -> impl Iterator<Item = &Image> {
        std::iter::successors(Some(self), |image| image.parent.as_deref())
    }
}

/// Opens the image at `path` with all its parents.
pub fn open(host: &Arc<dyn Host>, path: &Path, options: &OpenOptions) -> Result<Image> {
    let file = host.open(path, options.access)?;
    let mut links = vec![Link::open(host, file, path, options)?];
    while let Some(wanted) = links[links.len() - 1].opened.parent.clone() {
        let found = match find_parent(host, &links, &wanted, options) {
            Ok(found) => found,
            Err(e) if options.force && e.kind() == ErrorKind::ParentMissing => {
                Found { parent: None, doubt: Some(e) }
            }
            Err(e) => return Err(e),
        };
        if let Some(doubt) = found.doubt {
            log::warn!("{doubt}; reading by force");
            let why = format!("opened by force: {}", doubt.what());
            for link in &mut links {
                link.read_only.get_or_insert(why.clone());
            }
        }
        let Some(parent) = found.parent else { break };
        let child = links.len() - 1;
        links[child].compare(&parent, &wanted);
        links.push(parent);
    }
    // From the last ancestor down; recursion would need a stack as deep as the chain.
    let mut image: Option<Box<Image>> = None;
    for (depth, link) in links.into_iter().enumerate().rev() {
        let not_now = match (depth, options.access) {
            (0, Access::Write) => None,
            (0, _) => Some("the image is open for reading".to_owned()),
            _ => Some("the image is open as a parent".to_owned()),
        };
        let read_only = link.read_only.or(link.opened.read_only);
        let below = image.as_ref().map(|parent| parent.disk.clone());
        let disk = Disk::new(link.opened.map, below, read_only.clone().or(not_now));
        image = Some(Box::new(Image {
            disk: Arc::new(disk),
            info: link.opened.info,
            identity: link.opened.identity,
            path: link.path,
            read_only,
            damage: link.opened.damage,
            parent: image,
        }));
    }
    image.map(|image| *image).ok_or_else(|| Error::invalid("an empty chain").in_file(path))
}

/// Opens the image at `path` without looking for its parents.
pub fn open_alone(host: &Arc<dyn Host>, path: &Path, options: &OpenOptions) -> Result<Opened> {
    let file = host.open(path, options.access)?;
    recognise(&*file)?.open(file, &OpenContext::new(host, path, options)).in_file(path)
}

/// One image of a chain.
struct Link {
    path: PathBuf,
    file: FileIdentity,
    opened: Opened,
    /// When its file was last changed, where the host says.
    modified: Option<SystemTime>,
    /// Why it must not be written, beside what the driver says.
    read_only: Option<String>,
}

impl Link {
    fn open(
        host: &Arc<dyn Host>,
        file: Arc<dyn Storage>,
        path: &Path,
        options: &OpenOptions,
    ) -> Result<Self> {
        let identity = file.identity().map_err(|e| Error::io("stat", &e).in_file(path))?;
        let modified = file.modified();
        let format = recognise(&*file)?;
        let opened = format.open(file, &OpenContext::new(host, path, options)).in_file(path)?;
        Ok(Self { path: path.to_owned(), file: identity, opened, modified, read_only: None })
    }

    /// A parent that is a raw disk, whatever a guest wrote to it.
    fn open_raw(file: Arc<dyn Storage>, path: &Path) -> Result<Self> {
        let identity = file.identity().map_err(|e| Error::io("stat", &e).in_file(path))?;
        let modified = file.modified();
        let opened = raw::as_parent(file).in_file(path)?;
        Ok(Self { path: path.to_owned(), file: identity, opened, modified, read_only: None })
    }

    fn size(&self) -> u64 {
        self.opened.map.geometry().size
    }

    /// Why this parent cannot be what the image was made from, whatever its identity.
    fn misfit(&self, parent: &Self) -> Option<String> {
        let name = parent.path.display();
        let [own, below] = [self, parent].map(|link| link.opened.map.geometry().logical_sector);
        if own != below {
            return Some(format!(
                "the parent {name} has sectors of {below} bytes, the image {own}"
            ));
        }
        let (own, below) = (self.size(), parent.size());
        // Children of the other formats may have been resized.
        let exact = matches!(self.opened.identity, Identity::VmdkCid(_));
        (exact && own != below)
            .then(|| format!("the parent {name} has {below} bytes, the image {own}"))
    }

    /// Notes what is odd about a parent that was accepted.
    fn compare(&mut self, parent: &Self, wanted: &ParentLink) {
        let name = parent.path.display();
        let (own, below) = (self.size(), parent.size());
        if own != below {
            let what = format!("the parent {name} has {below} bytes, the image {own}");
            if own < below && matches!(self.opened.identity, Identity::VhdUniqueId(_)) {
                self.read_only.get_or_insert(what.clone());
            }
            self.opened.info.warnings.push(what);
        }
        let apart = |a: SystemTime, b: SystemTime| {
            a.duration_since(b).or_else(|_| b.duration_since(a)).unwrap_or_default()
        };
        if let (Some(is), Some(was)) = (parent.modified, wanted.modified)
            && apart(is, was) > TIME_STEP
        {
            self.opened.info.warnings.push(format!(
                "the parent {name} was not last changed when the image says: it is a copy, or holds \
                 something else by now"
            ));
        }
    }
}

/// A parent that was found.
struct Found {
    /// `None` if it is missing, and going on without it was asked for.
    parent: Option<Link>,
    /// Why it should not be trusted, if it is taken by force only.
    doubt: Option<Error>,
}

/// Finds and opens the parent of the last of `links`, looking on where a place holds another disk.
fn find_parent(
    host: &Arc<dyn Host>,
    links: &[Link],
    wanted: &ParentLink,
    options: &OpenOptions,
) -> Result<Found> {
    let child = &links[links.len() - 1];
    if links.len() >= MAX_CHAIN {
        let what = format!("more than {MAX_CHAIN} generations of parents");
        return Err(Error::corrupt(what).in_file(&child.path));
    }
    // Unique ids are never inherited, so an image that has this one can only be a copy of a
    // descendant. Other formats' identities are of contents, which parent and child may have alike.
    let same_id = |link: &Link| link.opened.identity == wanted.identity;
    if let (Identity::VhdUniqueId(_), Some(index)) =
        (&wanted.identity, links.iter().position(same_id))
    {
        return Err(cycle(links, index));
    }
    let places = match &options.parent {
        Some(parent) if links.len() == 1 => vec![Place::Given(parent.clone())],
        _ => parent_places(&child.path, wanted, &options.allow_parent),
    };
    let access = if options.access == Access::Write { Access::Read } else { options.access };
    let options = OpenOptions { access, next_identity: None, ..options.clone() };
    let mut tried: Vec<PathBuf> = Vec::new();
    let mut failed = None;
    let mut other: Option<Link> = None;
    for place in places {
        let path = place.path();
        if tried.contains(&path) {
            continue;
        }
        tried.push(path.clone());
        // A file of the chain is told by its identity before its lock would say "in use".
        let peeked = place.open(host, Access::Peek).and_then(|file| in_chain(links, &*file, &path));
        if let Ok(Some(index)) = peeked {
            return Err(cycle(links, index));
        }
        let opened = peeked.and_then(|_| place.open(host, access)).and_then(|file| {
            match wanted.identity == Identity::RAW {
                true => Link::open_raw(file, &path),
                false => Link::open(host, file, &path, &options),
            }
        });
        match opened {
            Ok(link) if link.opened.identity.satisfies(&wanted.identity) => {
                return match child.misfit(&link) {
                    None => Ok(Found { parent: Some(link), doubt: None }),
                    Some(what) => doubtful(child, link, what, options.force),
                };
            }
            Ok(link) => other = other.or(Some(link)),
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) if e.kind() == ErrorKind::Busy => return Err(e),
            Err(e) => failed = failed.or(Some(e)),
        }
    }
    let tried = list(&tried);
    if let Some(link) = other {
        let what = format!(
            "the parent {} has {}, but the image was made from {}; tried {tried}",
            link.path.display(),
            link.opened.identity,
            wanted.identity
        );
        return doubtful(child, link, what, options.force);
    }
    if let Some(e) = failed {
        let what = format!("the parent with {} does not open: {e}; tried {tried}", wanted.identity);
        return Err(Error::new(e.kind(), what).in_file(&child.path));
    }
    let mut what = format!("the parent with {} was not found; ", wanted.identity);
    what += &match tried.is_empty() {
        true => "the image does not say where it is".to_owned(),
        false => format!("tried {tried}"),
    };
    let outside = outside_places(&child.path, wanted, &options.allow_parent);
    if !outside.is_empty() {
        what += &format!("; {} lies outside the permitted directories", list(&outside));
    }
    Err(Error::new(ErrorKind::ParentMissing, what).in_file(&child.path).hint(
        "`--parent-dir DIR` or `-o allow_parent=DIR` adds a directory, `parent=FILE` names it",
    ))
}

/// Takes the wrong parent if `force` says so.
fn doubtful(child: &Link, parent: Link, what: String, force: bool) -> Result<Found> {
    let doubt = Error::new(ErrorKind::ParentMismatch, what).in_file(&child.path);
    if !force {
        return Err(doubt.hint("`-o force` reads it all the same"));
    }
    Ok(Found { parent: Some(parent), doubt: Some(doubt) })
}

/// Which of `links` the file is, if it is one of them.
fn in_chain(links: &[Link], file: &dyn Storage, path: &Path) -> Result<Option<usize>> {
    let identity = file.identity().map_err(|e| Error::io("stat", &e).in_file(path))?;
    Ok(links.iter().position(|link| link.file == identity))
}

/// The last of `links` has number `index` for its parent.
fn cycle(links: &[Link], index: usize) -> Error {
    let child = &links[links.len() - 1];
    let own = &child.opened.identity;
    let what = if index + 1 == links.len() {
        format!("the image names itself as its parent ({own})")
    } else {
        let (name, ancestor) = (links[index].path.display(), &links[index].opened.identity);
        format!(
            "the image with {own} names {name} with {ancestor} as its parent, which descends from it"
        )
    };
    Error::corrupt(what).in_file(&child.path)
}

fn list(paths: &[PathBuf]) -> String {
    let paths: Vec<_> = paths.iter().map(|p| p.display().to_string()).collect();
    paths.join(", ")
}

/// Where a parent may be.
pub(super) enum Place {
    /// A file that the user named.
    Given(PathBuf),
    /// A permitted directory, and a name beneath it that the image has given.
    Beneath(PathBuf, PathBuf),
}

impl Place {
    fn path(&self) -> PathBuf {
        match self {
            Self::Given(path) => path.clone(),
            Self::Beneath(root, name) => root.join(name),
        }
    }

    /// Opens the file there.
    pub fn open(&self, host: &Arc<dyn Host>, access: Access) -> Result<Arc<dyn Storage>> {
        match self {
            Self::Given(path) => host.open(path, access),
            Self::Beneath(root, name) => host.open_beneath(root, name, access),
        }
    }
}

/// Where the parent of the image at `child` may be by what the image says, best first.
pub(super) fn parent_places(
    child: &Path,
    link: &ParentLink,
    allow_parent: &[PathBuf],
) -> Vec<Place> {
    let dir = directory_of(child);
    let mut places = Vec::new();
    for name in &link.candidates {
        if let Ok(relative) = references::beneath(name) {
            places.push(Place::Beneath(dir.clone(), relative));
        } else if let Some(absolute) = references::climb(&references::resolved(&dir), name) {
            for root in std::iter::once(&dir).chain(allow_parent) {
                if let Ok(below) = absolute.strip_prefix(references::resolved(root)) {
                    places.push(Place::Beneath(root.clone(), below.to_owned()));
                }
            }
        }
    }
    for name in &link.candidates {
        if let Some(last) = references::last_component(name) {
            for root in std::iter::once(&dir).chain(allow_parent) {
                places.push(Place::Beneath(root.clone(), last.clone()));
            }
        }
    }
    places
}

/// What the image names and nothing permits to open.
fn outside_places(child: &Path, link: &ParentLink, allow_parent: &[PathBuf]) -> Vec<PathBuf> {
    let dir = directory_of(child);
    let roots: Vec<_> =
        std::iter::once(&dir).chain(allow_parent).map(|d| references::resolved(d)).collect();
    let named = link.candidates.iter().filter(|name| references::beneath(name).is_err());
    let mut outside: Vec<_> = named
        .filter_map(|name| references::climb(&references::resolved(&dir), name))
        .filter(|path| !roots.iter().any(|root| path.starts_with(root)))
        .collect();
    outside.dedup();
    outside
}

/// The directory in which a file lies.
pub fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
        _ => PathBuf::from("."),
    }
}
