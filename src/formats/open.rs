//! Opening an image: recognise, open, follow parents.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::folders::Folders;
use super::parents::{Found, find_parent};
use super::places::{self, directory_of};

use crate::disk::Disk;
use crate::disk::map::DiskRange;
use crate::disk::tables::CacheBudget;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::device::DeviceFile;
use crate::storage::file::HostFs;
use crate::storage::{self, Access, FileIdentity, Host, Storage};

use super::{Identity, ImageInfo, Opened, ParentLink, raw, recognise, vhd};

/// Longest chain of parents that is followed.
pub const MAX_CHAIN: usize = 256;

/// What drivers hint at where `force` would go on; said as the program spells it.
const FORCE_HINT: &str = "`-o force` reads it all the same";

/// How far apart two times of one change may be: images tell seconds, some file systems every other.
const TIME_STEP: Duration = Duration::from_secs(3);

/// How the options are spelled that a hint may name, by the program that opens; empty where it has none.
#[derive(Debug, Clone, Copy, Default)]
pub struct Spelling {
    /// Of [`OpenOptions::allow_parent`], with a value.
    pub allow_parent: &'static str,
    /// Of [`OpenOptions::parent`], with a value.
    pub parent: &'static str,
    /// Of [`OpenOptions::force`].
    pub force: &'static str,
}

/// How to open an image.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// For looking, reading or writing.
    pub access: Access,
    /// Read on where the image contradicts itself or its parent changed. Never writes.
    pub force: bool,
    /// Directories besides the image's own in which parents may lie, and extents that the image names by
    /// a path.
    pub allow_parent: Vec<PathBuf>,
    /// Directories that are shown as a whole: parents may lie in them too.
    pub sources: Vec<PathBuf>,
    /// The image's parent, instead of looking where the image says. It must be the right one all the
    /// same; the parent's own parents are looked for as ever.
    pub parent: Option<PathBuf>,
    /// What children know the image by from its first write on, instead of something new: for changes
    /// that leave the image's contents as they are, or that its child was told about. Parents of the
    /// image are not affected.
    pub next_identity: Option<Identity>,
    /// Memory for tables, shared by all images of a process.
    pub budget: Arc<CacheBudget>,
    /// What is known of folders, shared by all images of a process.
    pub folders: Arc<Folders>,
    /// Block devices that an image may name as its extents. Where there is one, it stands for the device of a raw
    /// device mapping, too.
    pub allow_device: Vec<PathBuf>,
    /// Whether these may be written.
    pub write_devices: bool,
    /// What hints call the options.
    pub spelling: Spelling,
}

impl Default for OpenOptions {
    /// For reading.
    fn default() -> Self {
        Self::new(Access::Read)
    }
}

impl OpenOptions {
    /// Options for opening with `access`, everything else at its default.
    pub fn new(access: Access) -> Self {
        Self {
            access,
            force: false,
            allow_parent: Vec::new(),
            sources: Vec::new(),
            parent: None,
            next_identity: None,
            budget: CacheBudget::new(CacheBudget::DEFAULT),
            folders: Arc::default(),
            allow_device: Vec::new(),
            write_devices: false,
            spelling: Spelling::default(),
        }
    }

    /// Whether the disk can be written; if so, nobody else may open the image.
    #[must_use]
    pub fn write(mut self, write: bool) -> Self {
        self.access = if write { Access::Write } else { Access::Read };
        self
    }

    /// Names the image's parent; see [`Self::parent`](field@Self::parent).
    #[must_use]
    pub fn parent(mut self, path: impl Into<PathBuf>) -> Self {
        self.parent = Some(path.into());
        self
    }

    /// Permits parents in one more directory; see [`Self::allow_parent`](field@Self::allow_parent).
    #[must_use]
    pub fn allow_parent(mut self, dir: impl Into<PathBuf>) -> Self {
        self.allow_parent.push(dir.into());
        self
    }

    /// Opens an image of the host with all its parents.
    ///
    /// # Errors
    ///
    /// The file is not there ([`ErrorKind::NotFound`]), in use ([`ErrorKind::Busy`]), no image
    /// ([`ErrorKind::NotThisFormat`]), damaged beyond reading ([`ErrorKind::Corrupt`]), of a kind that is
    /// not supported, or lacks its parent ([`ErrorKind::ParentMissing`], [`ErrorKind::ParentMismatch`]).
    /// An image that can only be read opens for writing all the same; its first write fails.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<Image> {
        open(&HostFs::shared(), path.as_ref(), self)
    }

    /// Directories besides the image's own in which parents may lie.
    pub(super) fn permitted(&self) -> Vec<PathBuf> {
        [&self.allow_parent[..], &self.sources].concat()
    }

    /// The error with what may be typed about it.
    fn spelled(&self, e: Error) -> Error {
        match self.spelling.force {
            force if e.hinted() == Some(FORCE_HINT) && force != "force" => {
                let hint = (!force.is_empty()).then(|| format!("`{force}` reads it all the same"));
                e.hinting(hint)
            }
            _ => e,
        }
    }
}

/// What a driver needs besides the file itself: where other files come from, and what is allowed.
#[derive(Clone)]
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
    folders: Arc<Folders>,
    allow_parent: Vec<PathBuf>,
    allow_device: Vec<PathBuf>,
    /// See [`OpenOptions::write_devices`].
    pub write_devices: bool,
    spelling: Spelling,
}

impl OpenContext {
    /// A context for the image in `file`. The host is one for what that names.
    pub fn new(host: &Arc<dyn Host>, file: &dyn Storage, options: &OpenOptions) -> Self {
        Self {
            host: storage::named_in(host, file),
            dir: directory_of(file.path()),
            access: options.access,
            force: options.force,
            next_identity: options.next_identity.clone(),
            budget: options.budget.clone(),
            folders: options.folders.clone(),
            allow_parent: options.allow_parent.clone(),
            allow_device: match file.archive() {
                // What lies in an archive names nothing outside.
                Some(_) => Vec::new(),
                None => options.allow_device.clone(),
            },
            write_devices: options.write_devices,
            spelling: options.spelling,
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

    /// The block device that the image may name as an extent called `name`. A `mapping` names none of this
    /// machine's; what the user named stands for it.
    pub fn device(&self, name: &str, mapping: bool) -> Option<&Path> {
        match (mapping, &self.allow_device[..]) {
            (true, [only]) => Some(only),
            (true, _) => None,
            (false, all) => all.iter().map(|device| &**device).find(|d| *d == Path::new(name)),
        }
    }

    /// Opens a block device that is permitted; for writing only where both the image and devices are written. Images of
    /// others reach none: whoever permitted it meant his own.
    pub fn open_device(&self, device: &Path) -> Result<Arc<dyn Storage>> {
        if let Some(uid) = self.host.users().first() {
            let what = format!("the image that names it is user {uid}'s, and devices are root's");
            let hint = "make the image your own, if it is the one that is meant";
            return Err(Error::new(ErrorKind::Denied, what).in_file(device).hint(hint));
        }
        let write = self.write() && self.write_devices;
        Ok(Arc::new(DeviceFile::open(device, write)?))
    }

    /// Opens an extent file that the image names, with the image's own access.
    pub fn open_extent(&self, name: &str) -> Result<Arc<dyn Storage>> {
        let (places, refusal) =
            places::of_extent(&self.dir, name, &self.allow_parent, &self.spelling);
        let opened = places::open_first(&*self.host, &self.folders, &places, name, self.access);
        opened.map_err(|e| match refusal {
            Some(refusal) if e.kind() == ErrorKind::NotFound && places.len() < 2 => refusal,
            _ => e,
        })
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
    /// The image's files as they were opened, the one at [`Self::path`] first.
    pub files: Vec<(PathBuf, FileIdentity)>,
    /// Why the image cannot be written however it is opened, if it cannot.
    pub read_only: Option<String>,
    /// Parts of the disk known to be lost.
    pub damage: Vec<DiskRange>,
    /// How the image names its parent, for a child.
    pub link: Option<ParentLink>,
    /// The parent's image, for a child.
    pub parent: Option<Box<Image>>,
}

impl Image {
    /// The image and its parents, nearest first.
    pub fn chain(&self) -> impl Iterator<Item = &Image> {
        std::iter::successors(Some(self), |image| image.parent.as_deref())
    }

    /// Flushes what was written, marks the image clean, and says whether that worked. Whoever just
    /// drops an image gets the same, but a failure only shows in the log.
    ///
    /// # Errors
    /// What could not be made durable.
    pub fn close(self) -> Result<()> {
        self.disk.close().map_err(|e| e.in_file(&self.path))
    }
}

/// Opens the image at `path` with all its parents.
pub fn open(host: &Arc<dyn Host>, path: &Path, options: &OpenOptions) -> Result<Image> {
    match open_found(host, path, options)? {
        (image, None) => Ok(image),
        (_, Some(e)) => Err(e),
    }
}

/// Opens the image at `path` with those of its parents that are found, and says why the next one is not.
/// What that one holds reads as an error.
pub fn open_found(
    host: &Arc<dyn Host>,
    path: &Path,
    options: &OpenOptions,
) -> Result<(Image, Option<Error>)> {
    open_file(host, host.open(path, options.access)?, path, options)
}

/// The same of the image at `path` in `file`, which was opened as `options` say.
pub(super) fn open_file(
    host: &Arc<dyn Host>,
    file: Arc<dyn Storage>,
    path: &Path,
    options: &OpenOptions,
) -> Result<(Image, Option<Error>)> {
    let mut missing = None;
    let mut links = vec![Link::open(host, file, path, options)?];
    while let Some(wanted) = links[links.len() - 1].opened.parent.clone() {
        let found = match find_parent(host, &links, &wanted, options) {
            Ok(found) => found,
            Err(e) if options.force && e.kind() == ErrorKind::ParentMissing => {
                Found { doubt: Some(e), ..Found::default() }
            }
            Err(e) => {
                missing = Some(e);
                break;
            }
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
        links[child].opened.info.warnings.extend(found.remark);
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
        let mut files = vec![(link.path.clone(), link.file)];
        let opened = link.opened.map.files().iter();
        for file in opened.flat_map(|file| std::iter::once(file).chain(file.parts())) {
            let failed = |e| Error::io("stat", &e).in_file(file.path());
            let identity = file.identity().map_err(failed)?;
            if files.iter().all(|(_, known)| *known != identity) {
                files.push((file.path().to_owned(), identity));
            }
        }
        let disk = Disk::new(link.opened.map, below, read_only.clone().or(not_now));
        image = Some(Box::new(Image {
            disk: Arc::new(disk),
            info: link.opened.info,
            identity: link.opened.identity,
            path: link.path,
            files,
            read_only,
            damage: link.opened.damage,
            link: link.opened.parent,
            parent: image,
        }));
    }
    let image = image.ok_or_else(|| Error::invalid("an empty chain").in_file(path))?;
    Ok((*image, missing))
}

/// Opens the image at `path` without looking for its parents.
pub fn open_alone(host: &Arc<dyn Host>, path: &Path, options: &OpenOptions) -> Result<Opened> {
    let file = vhd::whole(host, host.open(path, options.access)?, options.access)?;
    let context = OpenContext::new(host, &*file, options);
    let archived = archived(&*file);
    match recognise(&*file)?.open(file, &context) {
        Ok(opened) => Ok(Opened { read_only: archived.or(opened.read_only), ..opened }),
        Err(e) => Err(options.spelled(e.in_file(path))),
    }
}

/// Why an image in an archive is not written.
fn archived(file: &dyn Storage) -> Option<String> {
    file.archive().map(|_| "it lies in an archive".to_owned())
}

/// One image of a chain.
pub(super) struct Link {
    pub path: PathBuf,
    /// Where what it names comes from.
    pub host: Arc<dyn Host>,
    pub file: FileIdentity,
    pub opened: Opened,
    /// When its file was last changed, where the host says.
    modified: Option<SystemTime>,
    /// Why it must not be written, beside what the driver says.
    read_only: Option<String>,
}

impl Link {
    pub fn open(
        host: &Arc<dyn Host>,
        file: Arc<dyn Storage>,
        path: &Path,
        options: &OpenOptions,
    ) -> Result<Self> {
        let file = vhd::whole(host, file, options.access)?;
        let identity = file.identity().map_err(|e| Error::io("stat", &e).in_file(path))?;
        let modified = file.modified();
        let format = recognise(&*file)?;
        let read_only = archived(&*file);
        let context = OpenContext::new(host, &*file, options);
        let opened = format.open(file, &context);
        let opened = opened.map_err(|e| options.spelled(e.in_file(path)))?;
        let (path, host) = (path.to_owned(), context.host);
        Ok(Self { path, host, file: identity, opened, modified, read_only })
    }

    /// A parent that is a raw disk, whatever a guest wrote to it.
    pub fn open_raw(
        host: &Arc<dyn Host>,
        file: Arc<dyn Storage>,
        path: &Path,
        options: &OpenOptions,
    ) -> Result<Self> {
        let identity = file.identity().map_err(|e| Error::io("stat", &e).in_file(path))?;
        let modified = file.modified();
        let context = OpenContext::new(host, &*file, options);
        let opened = raw::as_parent(file).map_err(|e| e.in_file(path))?;
        let (path, host) = (path.to_owned(), context.host);
        Ok(Self { path, host, file: identity, opened, modified, read_only: None })
    }

    pub fn size(&self) -> u64 {
        self.opened.map.geometry().size
    }

    /// Why this parent cannot be what the image was made from, whatever its identity.
    pub fn misfit(&self, parent: &Self) -> Option<String> {
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
