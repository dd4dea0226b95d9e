//! What lies in the folders where files named by images may be: names, and which disks.
//!
//! A name written on another system may differ from the file's here in case, or in how Unicode composes
//! its letters ([`Folders::similar`]). A disk has an id whatever its name is ([`Folders::disks`]). Both
//! answer with everything that fits: which of several is meant is never guessed here.
//!
//! # Bounds
//!
//! A folder is not read again for ten times as long as reading it took, so that ten thousand images
//! whose parents are missing do not read ten thousand files each. What an image's headers say is kept
//! until the file changes. How many entries, folders and images are looked at is limited; beyond that
//! the answer says that it is not complete. Folders are walked from a permitted one downwards, through
//! no symlink.

use std::collections::{HashMap, VecDeque};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use unicode_normalization::UnicodeNormalization;

use super::{Identity, OpenContext, OpenOptions, Opened, by_extension, recognise};
use crate::error::ErrorKind::{Corrupt, NotThisFormat, Unsupported};
use crate::error::Result;
use crate::storage::remembered::{Remembered, Stamp};
use crate::storage::{Access, Entry, Host, Storage};

/// Entries of one folder that are looked at.
const MAX_ENTRIES: usize = 1 << 16;
/// Folders that are looked at beneath one.
const MAX_FOLDERS: usize = 1024;
/// How deep they lie at most.
const MAX_DEPTH: usize = 16;
/// Images that are looked at beneath one folder.
const MAX_IMAGES: usize = 1 << 14;
/// Folders remembered, of either kind.
const MAX_REMEMBERED: usize = 8;
/// Images remembered.
const MAX_LABELS: usize = 1 << 15;
/// How many times longer than reading it took a folder is taken for unchanged.
const TRUST: u32 = 10;

/// Which disk an image is, and whose child.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label {
    /// What its children know it by.
    pub identity: Identity,
    /// What it must have for a parent, for a child.
    pub parent: Option<Identity>,
    /// Bytes of the disk.
    pub size: u64,
}

impl Label {
    /// The label of an image that was opened.
    pub fn of(opened: Opened) -> Self {
        Self {
            identity: opened.identity,
            parent: opened.parent.map(|link| link.identity),
            size: opened.info.virtual_size,
        }
    }

    /// Whether the child with this label, which has found its parent elsewhere if `settled`, may have been
    /// made from the disk `other`. Content ids that several disks may have count only for a child that
    /// has not: those of disks never written, and of children that nobody wrote to, which have their
    /// parent's.
    pub fn names(&self, other: &Self, settled: bool) -> bool {
        let Some(wanted) = self.parent.as_ref().filter(|wanted| other.identity.satisfies(wanted))
        else {
            return false;
        };
        let cid = matches!(wanted, Identity::VmdkCid(_));
        let shared = wanted.anonymous() || other.parent.as_ref() == Some(wanted);
        !cid || (self.size == other.size && !(shared && settled))
    }

    /// Whether it could be the parent that was made for a child with `wanted` of `size` bytes. A child
    /// of that same parent that nobody wrote to yet has its content id, but is not it.
    fn fits(&self, wanted: &Identity, size: u64) -> bool {
        let child_of_it = self.parent.as_ref().is_some_and(|parent| parent.satisfies(wanted));
        let same_size = !matches!(wanted, Identity::VmdkCid(_)) || self.size == size;
        self.identity.satisfies(wanted) && !child_of_it && same_size
    }
}

/// What a folder holds under names like one.
#[derive(Debug, PartialEq, Eq)]
pub enum Similar {
    /// Nothing.
    None,
    /// One file, by its path beneath the folder.
    One(PathBuf),
    /// Several files, or folders on the way to it.
    Several(Vec<PathBuf>),
}

/// The images beneath a folder that a search found.
#[derive(Debug, Default)]
pub struct Disks {
    /// Their paths beneath it.
    pub found: Vec<PathBuf>,
    /// There are more images than were looked at.
    pub incomplete: bool,
}

/// See the module's documentation. Shared by all images of a process.
#[derive(Debug)]
pub struct Folders {
    names: Mutex<ByFolder<Names>>,
    disks: Mutex<ByFolder<Labels>>,
    labels: Remembered<Option<Label>>,
}

impl Default for Folders {
    fn default() -> Self {
        let labels = Remembered::new(MAX_LABELS);
        Self { names: Mutex::default(), disks: Mutex::default(), labels }
    }
}

/// What was read of folders, by root and folder beneath it, and by who read it.
type ByFolder<T> = HashMap<(PathBuf, PathBuf, Vec<u32>), Arc<Read<T>>>;

/// Something read, and until when it is good.
#[derive(Debug)]
struct Read<T> {
    what: T,
    good_until: Instant,
}

impl<T> Read<T> {
    fn new(read: impl FnOnce() -> Result<T>) -> Result<Arc<Self>> {
        let start = Instant::now();
        let what = read()?;
        let now = Instant::now();
        Ok(Arc::new(Self { what, good_until: now + (now - start) * TRUST }))
    }
}

/// Names in a folder by what they have in common with names like them.
#[derive(Debug)]
struct Names {
    by_key: HashMap<String, Vec<(String, bool)>>,
    incomplete: bool,
}

/// The images beneath a folder.
#[derive(Debug)]
struct Labels {
    images: Vec<(PathBuf, Label)>,
    incomplete: bool,
}

impl Folders {
    /// The files beneath `root` that `name` may stand for where no file has exactly this name: those
    /// that differ in case only, else those that differ in composition only, else in both. The same for
    /// the folders on the way.
    pub fn similar(&self, host: &dyn Host, root: &Path, name: &Path) -> Result<Similar> {
        let parts: Vec<_> = name.components().collect();
        let mut path = PathBuf::new();
        for (index, part) in parts.iter().enumerate() {
            let Component::Normal(part) = part else { return Ok(Similar::None) };
            let Some(part) = part.to_str() else { return Ok(Similar::None) };
            let names = self.names(host, root, &path)?;
            if names.what.incomplete {
                return Ok(Similar::None);
            }
            match &names.what.like(part, index + 1 < parts.len())[..] {
                [] => return Ok(Similar::None),
                [only] => path.push(only),
                several => {
                    several.iter().for_each(|name| host.note(&root.join(&path).join(name)));
                    return Ok(Similar::Several(several.iter().map(|n| path.join(n)).collect()));
                }
            }
        }
        host.note(&root.join(&path));
        Ok(Similar::One(path))
    }

    /// The images beneath `root`, in it alone unless `deep`, that could be the parent with `wanted` of a
    /// child of `size` bytes.
    pub fn disks(
        &self,
        host: &Arc<dyn Host>,
        root: &Path,
        deep: bool,
        wanted: &Identity,
        size: u64,
    ) -> Result<Disks> {
        let way = PathBuf::from(if deep { "deep" } else { "" });
        let key = (root.to_owned(), way, host.users().to_owned());
        let labels = remembered(&self.disks, key, || Ok(self.labels_beneath(host, root, deep)))?;
        let fitting = labels.what.images.iter().filter(|(_, label)| label.fits(wanted, size));
        let found: Vec<_> = fitting.map(|(path, _)| path.clone()).collect();
        found.iter().for_each(|path| host.note(&root.join(path)));
        Ok(Disks { found, incomplete: labels.what.incomplete })
    }

    /// What the headers of the image in `file` say; `None` where they say nothing.
    pub fn label(&self, host: &Arc<dyn Host>, file: Arc<dyn Storage>) -> Option<Label> {
        let told = self.labels.try_get(Stamp::of_file(&*file), || {
            let options = OpenOptions { force: true, ..OpenOptions::new(Access::Peek) };
            let ctx = OpenContext::new(host, &*file, &options);
            match recognise(&*file).and_then(|format| format.label(file, &ctx)) {
                Ok(label) => Ok(Some(label)),
                Err(e) if matches!(e.kind(), Corrupt | NotThisFormat | Unsupported) => Ok(None),
                Err(e) => Err(e),
            }
        });
        told.ok().flatten()
    }

    fn names(&self, host: &dyn Host, root: &Path, dir: &Path) -> Result<Arc<Read<Names>>> {
        let key = (root.to_owned(), dir.to_owned(), host.users().to_owned());
        remembered(&self.names, key, || {
            let entries = host.list_beneath(root, dir, MAX_ENTRIES)?;
            Ok(Names::new(entries))
        })
    }

    fn labels_beneath(&self, host: &Arc<dyn Host>, root: &Path, deep: bool) -> Labels {
        let mut labels = Labels { images: Vec::new(), incomplete: false };
        let mut folders = VecDeque::from([PathBuf::new()]);
        let (mut seen, mut looked) = (1, 0);
        while let Some(folder) = folders.pop_front() {
            // What cannot be listed is not searched.
            let Ok(entries) = host.list_beneath(root, &folder, MAX_ENTRIES) else { continue };
            labels.incomplete |= entries.len() > MAX_ENTRIES;
            for Entry { name, folder: is_folder } in entries {
                let path = folder.join(name);
                let full = if is_folder { seen >= MAX_FOLDERS } else { looked >= MAX_IMAGES };
                if is_folder && deep && !full && path.components().count() < MAX_DEPTH {
                    seen += 1;
                    folders.push_back(path);
                } else if !is_folder && !full && by_extension(&path).is_some() {
                    looked += 1;
                    let file = host.open_beneath(root, &path, Access::Peek);
                    let label = file.ok().and_then(|file| self.label(host, file));
                    labels.images.extend(label.map(|label| (path, label)));
                } else {
                    labels.incomplete |= full && (deep || !is_folder);
                }
            }
        }
        labels
    }
}

/// What is remembered under `key`, or was just read.
fn remembered<T>(
    all: &Mutex<ByFolder<T>>,
    key: (PathBuf, PathBuf, Vec<u32>),
    read: impl FnOnce() -> Result<T>,
) -> Result<Arc<Read<T>>> {
    let now = Instant::now();
    if let Some(known) = all.lock().get(&key).filter(|known| now < known.good_until) {
        return Ok(known.clone());
    }
    let read = Read::new(read)?;
    let mut all = all.lock();
    all.retain(|_, known| now < known.good_until);
    if all.len() >= MAX_REMEMBERED {
        all.clear();
    }
    all.insert(key, read.clone());
    Ok(read)
}

impl Names {
    fn new(entries: Vec<Entry>) -> Self {
        let incomplete = entries.len() > MAX_ENTRIES;
        let mut by_key: HashMap<_, Vec<_>> = HashMap::new();
        for Entry { name, folder } in entries {
            // Names in images are text.
            if let Ok(name) = name.into_string() {
                by_key.entry(key(&name)).or_default().push((name, folder));
            }
        }
        Self { by_key, incomplete }
    }

    /// The names most like `name`, of folders or of files.
    fn like(&self, name: &str, folders: bool) -> Vec<String> {
        let all = self.by_key.get(&key(name)).into_iter().flatten();
        let all: Vec<_> = all.filter(|(_, folder)| *folder == folders).map(|(n, _)| n).collect();
        let steps: [fn(&str) -> String; 4] =
            [str::to_owned, str::to_lowercase, |name| name.nfc().collect(), key];
        let alike = |step: &fn(&str) -> String| {
            let wanted = step(name);
            all.iter().filter(|n| step(n) == wanted).map(|n| (*n).clone()).collect::<Vec<_>>()
        };
        steps.iter().map(alike).find(|names| !names.is_empty()).unwrap_or_default()
    }
}

/// What names have in common that differ in case or composition only.
fn key(name: &str) -> String {
    name.nfd().collect::<String>().to_lowercase().nfd().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn like(names: &[&str], wanted: &str) -> Vec<String> {
        let entry = |name: &&str| match name.strip_suffix('/') {
            Some(folder) => Entry { name: folder.into(), folder: true },
            None => Entry { name: (*name).into(), folder: false },
        };
        Names::new(names.iter().map(entry).collect()).like(wanted, false)
    }

    #[test]
    fn the_nearest_names_count() {
        assert_eq!(like(&["Disk.vmdk", "other"], "disk.VMDK"), ["Disk.vmdk"]);
        assert_eq!(like(&["DISK.vmdk", "Disk.vmdk"], "disk.vmdk"), ["DISK.vmdk", "Disk.vmdk"]);
        assert_eq!(like(&["DISK.vmdk", "Disk.vmdk"], "Disk.vmdk"), ["Disk.vmdk"]);
        assert_eq!(like(&["disk.vmdk/"], "Disk.vmdk"), [""; 0]);
        // e with acute, composed and not, in either case.
        let (composed, apart, capital) = ("caf\u{e9}.vhd", "cafe\u{301}.vhd", "CAFE\u{301}.vhd");
        assert_eq!(like(&[apart], composed), [apart]);
        assert_eq!(like(&[composed], apart), [composed]);
        assert_eq!(like(&[capital, apart], composed), [apart]);
        assert_eq!(like(&[capital], composed), [capital]);
        assert_eq!(like(&["CAFÉ.vhd", apart], composed), ["CAFÉ.vhd"]);
        assert_eq!(like(&["cafe.vhd"], composed), [""; 0]);
    }

    #[test]
    fn letters_that_only_look_alike_differ() {
        // Latin and Cyrillic a; a ligature; full width.
        for other in ["\u{430}.vhd", "\u{ff41}.vhd"] {
            assert_eq!(like(&["a.vhd"], other), [""; 0]);
        }
        assert_eq!(like(&["file.vhd"], "\u{fb01}le.vhd"), [""; 0]);
    }
}
