//! Where the files that an image names may be: parents and extents.
//!
//! | named by | a parent is looked for | an extent is looked for |
//! |---|---|---|
//! | a name beneath the image's folder | there; by its last component beside the image and in every permitted directory | there |
//! | any other path | where the path leads, if that lies in a permitted directory; by its last component as above | the same; by its last component beside the image |
//!
//! Nothing but its name tells an extent, so it is not looked for where files of other disks may have
//! that name. For parents the directories that are mounted are permitted too; they are told by their id.
//! In every place a file of exactly the name counts first, else the only one most like it
//! ([`Folders::similar`]).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::folders::{Folders, Similar};
use super::open::Spelling;
use super::{ParentLink, references};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Access, Host, Storage};

/// Where a file may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A file that the user named.
    Given(PathBuf),
    /// A permitted directory, and a name beneath it that the image has given.
    Beneath(PathBuf, PathBuf),
}

impl Place {
    /// The file's path.
    pub fn path(&self) -> PathBuf {
        match self {
            Self::Given(path) => path.clone(),
            Self::Beneath(root, name) => root.join(name),
        }
    }

    /// Opens the file there.
    pub fn open(&self, host: &dyn Host, access: Access) -> Result<Arc<dyn Storage>> {
        match self {
            Self::Given(path) => host.open(path, access),
            Self::Beneath(root, name) => host.open_beneath(root, name, access),
        }
    }

    /// The places of the files most like the one that is not here.
    pub fn similar(&self, host: &dyn Host, folders: &Folders) -> Vec<Self> {
        let Self::Beneath(root, name) = self else { return Vec::new() };
        let beneath = |name| Self::Beneath(root.clone(), name);
        match folders.similar(host, root, name) {
            Ok(Similar::One(name)) => vec![beneath(name)],
            Ok(Similar::Several(names)) => names.into_iter().map(beneath).collect(),
            // What cannot be listed holds nothing like it.
            Ok(Similar::None) | Err(_) => Vec::new(),
        }
    }
}

/// Where the parent of the image at `child` may be by what the image says, best first; `permitted` are
/// directories besides its own.
pub fn of_parent(child: &Path, link: &ParentLink, permitted: &[PathBuf]) -> Vec<Place> {
    let dir = directory_of(child);
    let mut places = Vec::new();
    for name in &link.candidates {
        match references::beneath(name) {
            Ok(relative) => places.push(Place::Beneath(dir.clone(), relative)),
            Err(_) => places.extend(elsewhere(&dir, name, permitted)),
        }
    }
    for name in &link.candidates {
        if let Some(last) = references::last_component(name) {
            let roots = std::iter::once(&dir).chain(permitted);
            places.extend(roots.map(|root| Place::Beneath(root.clone(), last.clone())));
        }
    }
    let mut known = Vec::new();
    places.retain(|place| {
        !known.contains(place) && {
            known.push(place.clone());
            true
        }
    });
    places
}

/// Where a path that is not beneath `dir` leads, as seen from the permitted directories that hold it.
fn elsewhere<'a>(
    dir: &'a Path,
    name: &str,
    permitted: &'a [PathBuf],
) -> impl Iterator<Item = Place> + 'a {
    let absolute = references::climb(&references::resolved(dir), name);
    let roots = std::iter::once(dir).chain(permitted.iter().map(PathBuf::as_path));
    roots.filter_map(move |root| {
        let below = absolute.as_ref()?.strip_prefix(references::resolved(root)).ok()?;
        Some(Place::Beneath(root.to_owned(), below.to_owned()))
    })
}

/// The paths that the image names and nothing permits to open.
pub fn outside(child: &Path, link: &ParentLink, permitted: &[PathBuf]) -> Vec<PathBuf> {
    let dir = references::resolved(&directory_of(child));
    let roots: Vec<_> = permitted.iter().map(|root| references::resolved(root)).collect();
    let named = link.candidates.iter().filter(|name| references::beneath(name).is_err());
    let mut outside: Vec<_> = named
        .filter_map(|name| references::climb(&dir, name))
        .filter(|path| !roots.iter().chain([&dir]).any(|root| path.starts_with(root)))
        .collect();
    outside.dedup();
    outside
}

/// Where the extent `name` of an image in `dir` may be, best first, and what to say if it is not there;
/// `permitted` are directories besides `dir`.
pub fn of_extent(
    dir: &Path,
    name: &str,
    permitted: &[PathBuf],
    spelling: &Spelling,
) -> (Vec<Place>, Option<Error>) {
    let refusal = match references::beneath(name) {
        Ok(relative) => return (vec![Place::Beneath(dir.to_owned(), relative)], None),
        Err(refusal) => refusal,
    };
    let Some(last) = references::moved(name) else { return (Vec::new(), Some(refusal)) };
    let mut hint = format!("a file `{}` beside the image would be taken for it", last.display());
    if references::climb(dir, name).is_some() && !spelling.allow_parent.is_empty() {
        hint += &format!("; `{}` permits another directory", spelling.allow_parent);
    }
    let places = elsewhere(dir, name, permitted);
    let places = places.chain([Place::Beneath(dir.to_owned(), last)]).collect();
    (places, Some(Error::new(refusal.kind(), refusal.what().to_owned()).hint(hint)))
}

/// Opens the first of `places` where an extent called `name` is, or what is most like it.
pub fn open_first(
    host: &dyn Host,
    folders: &Folders,
    places: &[Place],
    name: &str,
    access: Access,
) -> Result<Arc<dyn Storage>> {
    let mut missing = None;
    for place in places {
        match place.open(host, access) {
            Err(e) if e.kind() == ErrorKind::NotFound => missing = missing.or(Some(e)),
            found => return found,
        }
    }
    for place in places {
        match &place.similar(host, folders)[..] {
            [] => {}
            [only] => return only.open(host, access),
            several => {
                let paths: Vec<_> = several.iter().map(Place::path).collect();
                let what = format!(
                    "no file is called `{name}`, but several are like it: {}",
                    list(&paths)
                );
                return Err(Error::new(ErrorKind::NotFound, what).hint("rename the right one"));
            }
        }
    }
    Err(missing.unwrap_or_else(|| Error::new(ErrorKind::NotFound, "no such file")))
}

/// Paths in a sentence; of many the first ones.
pub fn list(paths: &[PathBuf]) -> String {
    const SHOWN: usize = 8;
    let mut shown: Vec<_> = paths.iter().take(SHOWN).map(|p| p.display().to_string()).collect();
    if paths.len() > SHOWN {
        shown.push(format!("and {} more", paths.len() - SHOWN));
    }
    shown.join(", ")
}

/// The directory in which a file lies.
pub fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
        _ => PathBuf::from("."),
    }
}
