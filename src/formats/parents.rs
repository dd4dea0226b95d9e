//! Finding a child's parent.
//!
//! A parent is the disk with the id that the child asks for, whatever its file is called. It is looked
//! for in steps, and the first that leads to such a disk decides:
//!
//! 1. where the child says that it is, and by its bare name in every permitted directory ([`places`]);
//! 2. there, under the only name that is equal but for case, or but for composition ([`Folders::similar`](super::folders::Folders::similar));
//! 3. under any name: the only image with the id beside the child, or else in the permitted directories
//!    and the folders beneath them ([`Folders::disks`](super::folders::Folders::disks)).
//!
//! Which of several is meant is never guessed: the error names them. Content ids that a VMDK has before
//! its first write, which all such disks share, tell no disk from another and are not searched for.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::open::{Link, MAX_CHAIN};
use super::places::{self, Place, directory_of, list};
use super::{Identity, OpenOptions, ParentLink};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Access, Host, Storage};

/// A parent that was found.
#[derive(Default)]
pub struct Found {
    /// `None` if it is missing, and going on without it was asked for.
    pub parent: Option<Link>,
    /// Why it should not be trusted, if it is taken by force only.
    pub doubt: Option<Error>,
    /// What is odd about the place where it was.
    pub remark: Option<String>,
}

/// Finds and opens the parent of the last of `links`, looking on where a place holds another disk.
pub fn find_parent(
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
    let access = if options.access == Access::Write { Access::Read } else { options.access };
    let permitted = options.permitted();
    let given = options.parent.as_ref().filter(|_| links.len() == 1);
    let search = Search {
        host,
        links,
        child,
        wanted,
        options: OpenOptions { access, next_identity: None, parent: None, ..options.clone() },
        tried: Vec::new(),
        failed: None,
        other: None,
        several: Vec::new(),
    };
    let places = match given {
        Some(parent) => vec![Place::Given(parent.clone())],
        None => places::of_parent(&child.path, wanted, &permitted),
    };
    search.run(&places, given.is_none().then_some(&permitted[..]))
}

/// A search under way.
struct Search<'a> {
    host: &'a Arc<dyn Host>,
    links: &'a [Link],
    child: &'a Link,
    wanted: &'a ParentLink,
    /// How parents are opened.
    options: OpenOptions,
    /// Where it was looked for.
    tried: Vec<PathBuf>,
    /// Why the first place that did not open did not.
    failed: Option<Error>,
    /// The first other disk that was in one of the places.
    other: Option<Link>,
    /// Files of which each might be it.
    several: Vec<PathBuf>,
}

impl Search<'_> {
    /// Looks in `places`, then for the like of them, then for the id in `permitted` directories; without
    /// any, the places are all there is.
    fn run(mut self, places: &[Place], permitted: Option<&[PathBuf]>) -> Result<Found> {
        for place in places {
            if let Some(link) = self.visit(place, true)? {
                return self.accept(link, None);
            }
        }
        let Some(permitted) = permitted.filter(|_| self.failed.is_none()) else {
            return self.give_up(&[]);
        };
        for place in places {
            let similar = place.similar(&*self.child.host, &self.options.folders);
            if let [only] = &similar[..] {
                if let Some(link) = self.visit(only, false)? {
                    return self.accept(link, None);
                }
            } else {
                self.several.extend(similar.iter().map(Place::path));
            }
        }
        if !self.wanted.identity.anonymous()
            && let Some(place) = self.by_identity(permitted)
            && let Some(link) = self.visit(&place, false)?
        {
            let name = link.path.display();
            let remark = format!("the parent {name} was found by its {}", self.wanted.identity);
            return self.accept(link, Some(remark));
        }
        self.give_up(permitted)
    }

    /// Opens what is at `place`, if that is the parent. A file of the chain may be what the child names,
    /// which is an error, but not what was meant by a name like its.
    fn visit(&mut self, place: &Place, named: bool) -> Result<Option<Link>> {
        let path = place.path();
        if self.tried.contains(&path) {
            return Ok(None);
        }
        self.tried.push(path.clone());
        // What the image names comes from its host.
        let host = match place {
            Place::Given(_) => self.host,
            Place::Beneath(..) => &self.child.host,
        };
        // A file of the chain is told by its identity before its lock would say "in use".
        let peeked = place
            .open(&**host, Access::Peek)
            .and_then(|file| in_chain(self.links, &*file).map_err(|e| e.in_file(&path)));
        if let Ok(Some(index)) = peeked {
            return if named { Err(cycle(self.links, index)) } else { Ok(None) };
        }
        let opened = peeked.and_then(|_| place.open(&**host, self.options.access)).and_then(
            |file| match self.wanted.identity == Identity::RAW {
                true => Link::open_raw(host, file, &path, &self.options),
                false => Link::open(host, file, &path, &self.options),
            },
        );
        match opened {
            Ok(link) if link.opened.identity.satisfies(&self.wanted.identity) => {
                return Ok(Some(link));
            }
            Ok(link) => self.other = self.other.take().or(Some(link)),
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) if e.kind() == ErrorKind::Busy => return Err(e),
            Err(e) => self.failed = self.failed.take().or(Some(e)),
        }
        Ok(None)
    }

    fn accept(&self, link: Link, remark: Option<String>) -> Result<Found> {
        match self.child.misfit(&link) {
            None => Ok(Found { parent: Some(link), doubt: None, remark }),
            Some(what) => self.doubtful(link, what),
        }
    }

    /// Where the only image with the wanted id is: beside the child, else elsewhere.
    fn by_identity(&mut self, permitted: &[PathBuf]) -> Option<Place> {
        let beside = directory_of(&self.child.path);
        let mut found = self.with_identity(&beside, false);
        if found.is_empty() {
            found = permitted.iter().flat_map(|root| self.with_identity(root, true)).collect();
        }
        // Several names of one file are one image.
        let mut files: Vec<(_, Place)> = Vec::new();
        for place in found {
            let file = place.open(&*self.child.host, Access::Peek);
            let Ok(Ok(identity)) = file.map(|file| file.identity()) else { continue };
            let known = files.iter().any(|(other, _)| *other == identity);
            if !known && self.links.iter().all(|link| link.file != identity) {
                files.push((identity, place));
            }
        }
        if files.len() == 1 {
            return files.pop().map(|(_, place)| place);
        }
        self.several.extend(files.iter().map(|(_, place)| place.path()));
        None
    }

    fn with_identity(&self, root: &Path, deep: bool) -> Vec<Place> {
        let folders = &self.options.folders;
        let (wanted, size) = (&self.wanted.identity, self.child.size());
        match folders.disks(&self.child.host, root, deep, wanted, size) {
            Ok(disks) if !disks.incomplete => {
                let found = disks.found.into_iter();
                found.map(|name| Place::Beneath(root.to_owned(), name)).collect()
            }
            Ok(_) => {
                log::warn!("{}: too many files to look for a parent among them", root.display());
                Vec::new()
            }
            Err(_) => Vec::new(),
        }
    }

    /// The error of a search that found nothing, or what `force` takes.
    fn give_up(mut self, permitted: &[PathBuf]) -> Result<Found> {
        let wanted = &self.wanted.identity;
        let tried = list(&self.tried);
        if let Some(link) = self.other.take() {
            let what = format!(
                "the parent {} has {}, but the image was made from {wanted}; tried {tried}",
                link.path.display(),
                link.opened.identity,
            );
            return self.doubtful(link, what);
        }
        if let Some(e) = self.failed {
            let what = format!("the parent with {wanted} does not open: {e}; tried {tried}");
            return Err(Error::new(e.kind(), what).in_file(&self.child.path));
        }
        let mut what = format!("the parent with {wanted} was not found; ");
        what += &match tried.is_empty() {
            true => "the image does not say where it is".to_owned(),
            false => format!("tried {tried}"),
        };
        if !self.several.is_empty() {
            what += &format!("; each of these may be it: {}", list(&self.several));
        }
        let outside = places::outside(&self.child.path, self.wanted, permitted);
        if !outside.is_empty() {
            what += &format!("; {} lies outside the permitted directories", list(&outside));
        }
        let error = Error::new(ErrorKind::ParentMissing, what).in_file(&self.child.path);
        Err(error.hint(self.way_out()))
    }

    /// What the user can do about a parent that is not found.
    fn way_out(&self) -> String {
        let spelling = &self.options.spelling;
        let ways = [(spelling.allow_parent, "adds a directory"), (spelling.parent, "names it")];
        let ways = ways.iter().filter(|(option, _)| !option.is_empty());
        let mut ways: Vec<_> = ways.map(|(option, does)| format!("`{option}` {does}")).collect();
        ways.push("`flatdisk rebase --unsafe IMAGE --parent FILE` makes the image name it".into());
        ways.join(", ")
    }

    /// Takes the wrong parent if `force` says so.
    fn doubtful(&self, parent: Link, what: String) -> Result<Found> {
        let doubt = Error::new(ErrorKind::ParentMismatch, what).in_file(&self.child.path);
        if self.options.force {
            return Ok(Found { parent: Some(parent), doubt: Some(doubt), remark: None });
        }
        let force = self.options.spelling.force;
        if force.is_empty() {
            return Err(doubt);
        }
        Err(doubt.hint(format!("`{force}` reads it all the same")))
    }
}

/// Which of `links` the file is, if it is one of them.
fn in_chain(links: &[Link], file: &dyn Storage) -> Result<Option<usize>> {
    let identity = file.identity().map_err(|e| Error::io("stat", &e))?;
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
