//! Opening an image: recognise, open, follow parents.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::disk::Disk;
use crate::disk::map::DiskRange;
use crate::disk::tables::CacheBudget;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::storage::{Access, FileIdentity, Host, Storage};

use super::{Identity, ImageInfo, Opened, ParentLink, recognise, references};

/// Longest chain of parents that is followed.
pub const MAX_CHAIN: usize = 256;

/// How to open an image.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// For looking, reading or writing.
    pub access: Access,
    /// Read on where the image contradicts itself or its parent changed. Never writes.
    pub force: bool,
    /// Directories besides the image's own in which parents may lie.
    pub allow_parent: Vec<PathBuf>,
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

/// Opens the image at `path` with all its parents.
pub fn open(host: &Arc<dyn Host>, path: &Path, options: &OpenOptions) -> Result<Image> {
    let file = host.open(path, options.access)?;
    let mut links = vec![Link::open(host, file, path, options)?];
    while let Some(wanted) = &links[links.len() - 1].opened.parent {
        let (parent, doubt) = match find_parent(host, &links, wanted, options) {
            Ok(Found { parent, doubt }) => (Some(parent), doubt),
            Err(e) if options.force && e.kind() == ErrorKind::ParentMissing => (None, Some(e)),
            Err(e) => return Err(e),
        };
        if let Some(doubt) = doubt {
            log::warn!("{doubt}; reading by force");
            let why = format!("opened by force: {}", doubt.what());
            for link in &mut links {
                link.read_only.get_or_insert(why.clone());
            }
        }
        match parent {
            Some(parent) => links.push(parent),
            None => break,
        }
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
        let format = recognise(&*file)?;
        let opened = format.open(file, &OpenContext::new(host, path, options)).in_file(path)?;
        Ok(Self { path: path.to_owned(), file: identity, opened, read_only: None })
    }
}

/// A parent that was found.
struct Found {
    parent: Link,
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
    let access = if options.access == Access::Write { Access::Read } else { options.access };
    let options = OpenOptions { access, next_identity: None, ..options.clone() };
    let mut tried: Vec<PathBuf> = Vec::new();
    let mut denied = None;
    let mut other: Option<Link> = None;
    for (root, name) in parent_places(&child.path, wanted, &options.allow_parent) {
        let path = root.join(&name);
        if tried.contains(&path) {
            continue;
        }
        match host.open_beneath(&root, &name, Access::Peek) {
            // A file of the chain is told by its identity before its lock would say "in use".
            Ok(file) => refuse_cycle(links, &*file, &path)?,
            Err(e) => {
                if e.kind() != ErrorKind::NotFound {
                    denied.get_or_insert(e);
                }
                tried.push(path);
                continue;
            }
        }
        let file = host.open_beneath(&root, &name, access)?;
        let link = Link::open(host, file, &path, &options)?;
        let [below, above] = [&link, child].map(|l| l.opened.map.geometry().logical_sector);
        if below != above {
            let what = format!("the parent has sectors of {below} bytes, the image of {above}");
            return Err(Error::corrupt(what).in_file(&child.path));
        }
        if link.opened.identity.satisfies(&wanted.identity) {
            return Ok(Found { parent: link, doubt: None });
        }
        tried.push(path);
        other.get_or_insert(link);
    }
    if let Some(link) = other {
        let error = Error::new(
            ErrorKind::ParentMismatch,
            format!(
                "the parent {} has {}, but the image was made from {}; tried {}",
                link.path.display(),
                link.opened.identity,
                wanted.identity,
                list(&tried)
            ),
        )
        .in_file(&child.path);
        if !options.force {
            return Err(error.hint("`-o force` reads it all the same"));
        }
        return Ok(Found { parent: link, doubt: Some(error) });
    }
    if let Some(e) = denied {
        return Err(e);
    }
    let outside = outside_places(&child.path, wanted, &options.allow_parent);
    let outside = match outside[..] {
        [] => String::new(),
        _ => format!("; {} lies outside the permitted directories", list(&outside)),
    };
    let what = format!(
        "the parent with {} was not found; tried {}{outside}",
        wanted.identity,
        list(&tried)
    );
    Err(Error::new(ErrorKind::ParentMissing, what)
        .in_file(&child.path)
        .hint("--allow-parent=DIR, or `-o allow_parent=DIR`, adds a directory"))
}

/// Refuses a parent that is already part of the chain.
fn refuse_cycle(links: &[Link], file: &dyn Storage, path: &Path) -> Result<()> {
    let identity = file.identity().map_err(|e| Error::io("stat", &e).in_file(path))?;
    let Some(index) = links.iter().position(|link| link.file == identity) else { return Ok(()) };
    let child = &links[links.len() - 1];
    let what = if index + 1 == links.len() {
        format!("the image names itself as its parent ({})", child.opened.identity)
    } else {
        let (own, ancestor) = (&child.opened.identity, &links[index].opened.identity);
        let name = path.display();
        format!(
            "the image with {own} names {name} with {ancestor} as its parent, which descends from it"
        )
    };
    Err(Error::corrupt(what).in_file(&child.path))
}

fn list(paths: &[PathBuf]) -> String {
    let paths: Vec<_> = paths.iter().map(|p| p.display().to_string()).collect();
    paths.join(", ")
}

/// A directory without symlinks, as far as the host can tell, for comparing by text.
fn resolved(dir: &Path) -> PathBuf {
    std::fs::canonicalize(dir).or_else(|_| std::path::absolute(dir)).unwrap_or(dir.to_owned())
}

/// Where the parent of the image at `child` may be: `(permitted directory, name beneath it)`, best
/// first.
pub(super) fn parent_places(
    child: &Path,
    link: &ParentLink,
    allow_parent: &[PathBuf],
) -> Vec<(PathBuf, PathBuf)> {
    let dir = directory_of(child);
    let mut places = Vec::new();
    for name in &link.candidates {
        if let Ok(relative) = references::beneath(name) {
            places.push((dir.clone(), relative));
        } else if let Some(absolute) = references::climb(&resolved(&dir), name) {
            for root in std::iter::once(&dir).chain(allow_parent) {
                if let Ok(below) = absolute.strip_prefix(resolved(root)) {
                    places.push((root.clone(), below.to_owned()));
                }
            }
        }
    }
    for name in &link.candidates {
        if let Some(last) = references::last_component(name) {
            for root in std::iter::once(&dir).chain(allow_parent) {
                places.push((root.clone(), last.clone()));
            }
        }
    }
    places
}

/// What the image names and nothing permits to open.
fn outside_places(child: &Path, link: &ParentLink, allow_parent: &[PathBuf]) -> Vec<PathBuf> {
    let dir = directory_of(child);
    let roots: Vec<_> = std::iter::once(&dir).chain(allow_parent).map(|d| resolved(d)).collect();
    let named = link.candidates.iter().filter(|name| references::beneath(name).is_err());
    let mut outside: Vec<_> = named
        .filter_map(|name| references::climb(&resolved(&dir), name))
        .filter(|path| !roots.iter().any(|root| path.starts_with(root)))
        .collect();
    outside.dedup();
    outside
}

/// The directory in which a file lies.
pub(super) fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
        _ => PathBuf::from("."),
    }
}
