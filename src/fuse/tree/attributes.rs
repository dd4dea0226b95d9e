//! Attributes: what stat(2) and getfattr(1) show.

use std::ffi::OsStr;
use std::fs::Metadata;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use nix::sys::statvfs::{Statvfs, statvfs};

use super::{Attributes, Kind, Node, ROOT, Tree, What, not_permitted};
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::crew::Crew;
use crate::fuse::image::stale;
use crate::fuse::source::Place;
use crate::names::printable;
use crate::storage::permissions::Permissions;

/// How long the host may take to say how much space it has.
const ANSWER: Duration = Duration::from_secs(1);

/// What the names of all extended attributes begin with.
const XATTR_PREFIX: &[u8] = b"user.flatdisk.";

/// The attribute that names a file's image.
pub const IMAGE: &str = "user.flatdisk.image";

/// The attribute that tells which partition of the image a file is.
pub const PARTITION: &str = "user.flatdisk.partition";

fn path_of(place: &Place) -> Vec<u8> {
    place.path().into_os_string().into_vec()
}

impl Tree {
    /// What stat(2) shows of a node.
    pub fn attributes(&self, ino: u64) -> Result<Attributes> {
        self.attributes_of(&*self.node(ino)?)
    }

    pub(super) fn attributes_of(&self, node: &Node) -> Result<Attributes> {
        match &node.what {
            What::Root => match &self.mirror {
                Some(place) => self.folder_attributes(ROOT, place),
                None => Ok(self.plain_attributes(ROOT, Kind::Folder, 0, 0o755 & !self.look.dmask)),
            },
            What::Folder(place) => self.folder_attributes(node.ino, place),
            What::Part(whole, view) => {
                let disk = self.attributes_of(whole)?;
                let size = view.part.as_ref().map_or(0, |part| part.size);
                // How much of it is stored is not counted; none would tell tar that it is all zeroes.
                let blocks = disk.blocks.min(size.div_ceil(512)).max(1);
                Ok(Attributes { ino: node.ino, size, blocks, ..disk })
            }
            What::Image(image) => {
                let (facts, meta) = image.look(&self.images)?;
                let mut files: Vec<_> = facts.extents().collect();
                let first = image.place.permissions().ok();
                let first = first.filter(|_| image.displaced().is_none());
                let first = first.unwrap_or(Permissions::of(&meta));
                let written = self.images.scratch(&image.place).is_none();
                let mode = facts.permissions(first, written).mode;
                let mut mode = mode & 0o666 & !self.look.fmask;
                if self.may_write(image, &facts).is_err() {
                    mode &= !0o222;
                }
                files.push(meta.clone());
                let mut attributes = self.attributes_from(node.ino, Kind::File, &meta, mode);
                attributes.size = facts.size;
                let blocks = || files.iter().map(Metadata::blocks).sum();
                attributes.blocks = facts.archived.map_or_else(blocks, |bytes| bytes.div_ceil(512));
                // A descriptor keeps its time while its extents change.
                let changed = files.iter().filter_map(|meta| meta.modified().ok()).max();
                attributes.mtime = changed.unwrap_or(attributes.mtime);
                attributes.ctime = attributes.ctime.max(attributes.mtime);
                Ok(attributes)
            }
            What::Problem(place, _) => {
                let meta = place.stat().map_err(|e| Error::io("stat", &e))?;
                let permissions = place.permissions().map_err(|e| Error::io("stat", &e))?;
                let mode = permissions.readers() & !self.look.fmask;
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
        let mut permissions = place.permissions().map_err(|e| Error::io("stat", &e))?.mode;
        // An archive is searched by whoever may read it.
        if meta.is_file() {
            permissions |= (permissions & 0o444) >> 2;
        }
        let mode = ((permissions & !cleared) | set) & !self.look.dmask;
        Ok(self.attributes_from(ino, Kind::Folder, &meta, mode))
    }

    fn attributes_from(&self, ino: u64, kind: Kind, meta: &Metadata, mode: u16) -> Attributes {
        let changed = i64::max(meta.ctime(), 0) as u64;
        let changed = Duration::new(changed, meta.ctime_nsec() as u32);
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

    /// The extended attributes of a flat file. The text that stands for a broken image only says which.
    pub fn xattrs(&self, ino: u64) -> Result<Vec<(&'static str, Vec<u8>)>> {
        let node = self.node(ino)?;
        let (image, view) = match (&node.what, node.image()) {
            (_, Some(image)) => image,
            (What::Problem(place, _), _) => return Ok(vec![(IMAGE, path_of(place))]),
            _ => return Ok(Vec::new()),
        };
        let (facts, _) = image.look(&self.images)?;
        let info = &facts.info;
        let text = |text: &str| text.as_bytes().to_vec();
        let mut xattrs = vec![
            ("user.flatdisk.format", text(info.format)),
            ("user.flatdisk.subformat", text(&info.subformat)),
            ("user.flatdisk.virtual-size", text(&facts.size.to_string())),
            ("user.flatdisk.sector-size", text(&info.logical_sector_size.to_string())),
            (IMAGE, path_of(&image.place)),
        ];
        if let Some(part) = view.part.as_ref().and_then(|part| serde_json::to_vec(part).ok()) {
            xattrs.push((PARTITION, part));
        }
        if let Some(parent) = &info.parent {
            xattrs.push(("user.flatdisk.parent", text(parent)));
        }
        if let Some(uuid) = &info.uuid {
            xattrs.push(("user.flatdisk.uuid", text(uuid)));
        }
        if let Err(refusal) = self.may_write(image, &facts) {
            let why = match refusal.withheld() {
                true => "cannot be written: another image is made from it",
                false => refusal.what(),
            };
            xattrs.push(("user.flatdisk.readonly", text(why)));
        }
        let damage = image.damage(&facts);
        if !damage.is_empty() {
            let ranges = damage.iter().take(1000).map(|r| format!("{:#x}-{:#x}", r.start, r.end));
            xattrs.push(("user.flatdisk.damage", text(&ranges.collect::<Vec<_>>().join(" "))));
        }
        Ok(xattrs)
    }

    /// The value of one extended attribute.
    pub fn xattr(&self, ino: u64, name: &OsStr) -> Result<Option<Vec<u8>>> {
        // Programs ask for access lists and labels of every file they see.
        if !name.as_bytes().starts_with(XATTR_PREFIX) {
            return Ok(None);
        }
        let mut xattrs = self.xattrs(ino)?.into_iter();
        Ok(xattrs.find(|(known, _)| name == *known).map(|(_, value)| value))
    }

    /// A directory of the host on whose file system `ino` lies.
    fn host_dir(&self, ino: u64) -> Result<PathBuf> {
        let node = self.node(ino)?;
        let place = match &node.what {
            What::Folder(place) => Some(place.clone()),
            What::Image(_) | What::Part(..) => node.image().map(|(image, _)| image.place.clone()),
            What::Problem(place, _) => Some(place.clone()),
            What::Root | What::Link(_) => self
                .mirror
                .clone()
                .or_else(|| self.pinned.read().values().next().map(|p| p.place.clone())),
        };
        Ok(place.map_or(PathBuf::from("/"), |place| place.source.root().to_owned()))
    }

    /// Space and files of the host's file system on which `ino` lies: as it was, where the host does not
    /// say how it is.
    pub fn host_space(&self, ino: u64) -> Result<Statvfs> {
        let (dir, turn) = (self.host_dir(ino)?, self.measuring.clone());
        let crew = Crew::start(vec![dir], move |dir: &PathBuf| {
            let _turn = turn.try_lock_for(ANSWER)?;
            Some(statvfs(dir).map_err(|e| Error::io("statfs", &e.into()).in_file(dir)))
        });
        crew.wait(ANSWER);
        match crew.end().into_iter().find_map(|(_, space)| space.flatten()) {
            Some(space) => space.inspect(|space| *self.space.lock() = Some(*space)),
            None => self
                .space
                .lock()
                .ok_or_else(|| Error::new(ErrorKind::Io, "the host does not answer")),
        }
    }

    pub(super) fn problem_text(&self, place: &Place) -> Result<String> {
        let Err(problem) = self.images.examine(place) else { return Err(stale()) };
        let path = place.path();
        let image = printable(path.display());
        if problem.withheld() {
            return Ok(format!(
                "{image} cannot be shown as a disk:\n\n    a file that it needs cannot be used\n\n\
                 `flatdisk check` of the image tells more to those who may read all of its files.\n\
                 The flat file appears here as soon as the image opens.\n",
            ));
        }
        // Of what is no image at all there is no more to tell.
        let check = match problem.kind() {
            ErrorKind::NotThisFormat => "",
            _ => "`flatdisk check` of this file, or of the image, tells more.\n",
        };
        Ok(format!(
            "{image} cannot be shown as a disk:\n\n    {problem}\n\n{check}\
             The flat file appears here as soon as the image opens.\n",
        ))
    }
}
