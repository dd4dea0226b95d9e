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
    /// Memory for tables.
    pub budget: Arc<CacheBudget>,
}

impl OpenContext {
    /// A context for the image at `path`.
    pub fn new(host: &Arc<dyn Host>, path: &Path, options: &OpenOptions) -> Self {
        let dir = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        Self {
            host: host.clone(),
            dir: dir.to_owned(),
            access: options.access,
            force: options.force,
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
    open_link(host, file, path, options, &mut Vec::new())
}

/// Opens the image at `path` without looking for its parents.
pub fn open_alone(host: &Arc<dyn Host>, path: &Path, options: &OpenOptions) -> Result<Opened> {
    let file = host.open(path, options.access)?;
    recognise(&*file)?.open(file, &OpenContext::new(host, path, options)).in_file(path)
}

/// Opens one link of a chain; `children` are the files that led here.
fn open_link(
    host: &Arc<dyn Host>,
    file: Arc<dyn Storage>,
    path: &Path,
    options: &OpenOptions,
    children: &mut Vec<FileIdentity>,
) -> Result<Image> {
    let identity = file.identity().map_err(|e| Error::io("stat", &e).in_file(path))?;
    if children.contains(&identity) {
        return Err(Error::corrupt("the image is its own ancestor").in_file(path));
    }
    if children.len() >= MAX_CHAIN {
        return Err(Error::corrupt("more than 256 generations of parents").in_file(path));
    }
    let format = recognise(&*file)?;
    let ctx = OpenContext::new(host, path, options);
    let opened: Opened = format.open(file, &ctx).in_file(path)?;
    let mut read_only = opened.read_only;
    let parent = match &opened.parent {
        None => None,
        Some(link) => {
            children.push(identity);
            let parent = open_parent(host, &ctx, link, options, children).in_file(path)?;
            if !parent.identity.satisfies(&link.identity) {
                let error = Error::new(
                    ErrorKind::ParentMismatch,
                    format!(
                        "the parent {} has {}, but the image was made from {}",
                        parent.path.display(),
                        parent.identity,
                        link.identity
                    ),
                );
                if !options.force {
                    return Err(error.in_file(path).hint("`-o force` reads it all the same"));
                }
                log::warn!("{error}; reading by force");
                read_only = Some("the parent is not the one the image was made from".to_owned());
            }
            let sector = opened.map.geometry().logical_sector;
            if parent.disk.geometry().logical_sector != sector {
                let what = format!(
                    "the parent has sectors of {} bytes, the image of {sector}",
                    parent.disk.geometry().logical_sector
                );
                return Err(Error::corrupt(what).in_file(path));
            }
            Some(Box::new(parent))
        }
    };
    let parent_disk = parent.as_ref().map(|p| p.disk.clone());
    let not_now = (options.access != Access::Write).then(|| "the image is open for reading".into());
    Ok(Image {
        disk: Arc::new(Disk::new(opened.map, parent_disk, read_only.clone().or(not_now))),
        info: opened.info,
        identity: opened.identity,
        path: path.to_owned(),
        read_only,
        damage: opened.damage,
        parent,
    })
}

/// Finds and opens the parent of a child in `ctx`'s directory.
fn open_parent(
    host: &Arc<dyn Host>,
    ctx: &OpenContext,
    link: &ParentLink,
    options: &OpenOptions,
    children: &mut Vec<FileIdentity>,
) -> Result<Image> {
    let mut parent_options = options.clone();
    if options.access == Access::Write {
        parent_options.access = Access::Read;
    }
    let mut tried = Vec::new();
    let mut denied = None;
    for (root, name) in parent_places(ctx, link, options) {
        let path = root.join(&name);
        if tried.contains(&path) {
            continue;
        }
        match host.open_beneath(&root, &name, parent_options.access) {
            Ok(file) => return open_link(host, file, &path, &parent_options, children),
            Err(e) if e.kind() == ErrorKind::NotFound => tried.push(path),
            Err(e) => {
                denied.get_or_insert(e);
                tried.push(path);
            }
        }
    }
    if let Some(e) = denied {
        return Err(e);
    }
    let tried: Vec<_> = tried.iter().map(|p| p.display().to_string()).collect();
    Err(Error::new(
        ErrorKind::ParentMissing,
        format!("the parent with {} was not found; tried {}", link.identity, tried.join(", ")),
    )
    .hint("`-o allow_parent=DIR` adds a directory"))
}

/// Where a parent may be: `(permitted directory, name beneath it)`, best first.
fn parent_places(
    ctx: &OpenContext,
    link: &ParentLink,
    options: &OpenOptions,
) -> Vec<(PathBuf, PathBuf)> {
    let mut places = Vec::new();
    for name in &link.candidates {
        if let Ok(relative) = references::beneath(name) {
            places.push((ctx.dir.clone(), relative));
        } else if let Some(absolute) = references::climb(&ctx.dir, name) {
            for root in &options.allow_parent {
                if let Ok(below) = absolute.strip_prefix(root) {
                    places.push((root.clone(), below.to_owned()));
                }
            }
        }
    }
    for name in &link.candidates {
        if let Some(last) = references::last_component(name) {
            for root in std::iter::once(&ctx.dir).chain(&options.allow_parent) {
                places.push((root.clone(), last.clone()));
            }
        }
    }
    places
}
