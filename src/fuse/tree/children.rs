//! Who was made from an image: the search before it is written.
//!
//! A disk that another image needs as it is must not change. So before an image is opened for writing,
//! every image is looked at that may be its child: all that the mount shows, and those beside it and in the
//! directories above it. Any of them may lie on a file system that does not answer. The search is therefore
//! another thread's; when one look takes longer than [`PATIENCE`], the image is not opened, and whoever did
//! not answer is named. What hangs goes on hanging, [`MOST`] times at most.

use std::collections::{HashSet, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::pinned::Pinned;
use super::{Node, Tree};
use crate::error::{Error, Result};
use crate::formats::Label;
use crate::fuse::crew::Crew;
use crate::fuse::facts::Facts;
use crate::fuse::image::ImageFile;
use crate::fuse::source::Place;
use crate::names::printable;
use crate::storage::FileIdentity;
use crate::storage::remembered::identity;

/// Folders that are searched at most.
const MAX_WALKED: usize = 1 << 14;

/// How long one image or folder may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often to look whether the search goes on.
const STEP: Duration = Duration::from_millis(100);

/// Searches at a time.
const MOST: usize = 32;

/// The searches under way.
#[derive(Debug, Default)]
pub(super) struct Searches {
    count: Mutex<usize>,
    ended: Condvar,
    /// Who did not answer the last time.
    silent: Mutex<Option<PathBuf>>,
}

/// A search under way, until this is dropped.
struct Turn(Arc<Searches>);

impl Drop for Turn {
    fn drop(&mut self) {
        *self.0.count.lock() -= 1;
        self.0.ended.notify_one();
    }
}

impl Searches {
    fn turn(self: &Arc<Self>) -> Result<Turn> {
        let mut count = self.count.lock();
        let full = |count: &mut usize| *count >= MOST;
        if self.ended.wait_while_for(&mut count, full, PATIENCE).timed_out() && *count >= MOST {
            return Err(no_answer(self.silent.lock().as_deref()));
        }
        *count += 1;
        Ok(Turn(self.clone()))
    }
}

/// Whom a search asks, and how many it has asked.
#[derive(Debug, Default)]
struct Asked(Mutex<(u64, PathBuf)>);

impl Asked {
    fn note(&self, path: PathBuf) {
        let mut asked = self.0.lock();
        *asked = (asked.0 + 1, path);
    }
}

fn no_answer(silent: Option<&Path>) -> Error {
    let what = match silent {
        Some(path) => format!("`{}`, which may need it as it is,", printable(path.display())),
        None => "another image, which may need it as it is,".to_owned(),
    };
    let seconds = PATIENCE.as_secs();
    let what = format!("cannot be written: {what} has not answered for {seconds} s");
    Error::io(what, &io::Error::from_raw_os_error(libc::ETIMEDOUT))
        .hint("take it out of the mount, or bring its file system back")
}

impl Tree {
    /// [`Self::may_write`], after looking at every image that may be a child.
    pub(super) fn permit_write(
        self: &Arc<Self>,
        node: &Arc<Node>,
        image: &ImageFile,
        facts: &Facts,
    ) -> Result<()> {
        self.may_write(image, facts)?;
        if self.images.scratch(&image.place).is_some() {
            return Ok(());
        }
        match self.child(node, &facts.label).map_err(|e| e.in_file(&image.place.path()))? {
            Some(child) => Err(self.made_from_it(image, &child)),
            None => self.may_write(image, facts),
        }
    }

    /// An image that was made from that of `node`, which has this label.
    fn child(self: &Arc<Self>, node: &Arc<Node>, label: &Label) -> Result<Option<Place>> {
        let turn = Mutex::new(Some(self.searches.turn()?));
        let asked = Arc::new(Asked::default());
        let (tree, label, note) = (self.clone(), label.clone(), asked.clone());
        let crew = Crew::start(vec![node.clone()], move |node: &Arc<Node>| {
            let _turn = turn.lock().take();
            let (image, _) = node.image()?;
            tree.find_child(image, &label, &note)
        });
        let (mut last, mut since) = (0, Instant::now());
        while !crew.wait(STEP) {
            let (count, path) = asked.0.lock().clone();
            if count != last {
                (last, since) = (count, Instant::now());
            } else if since.elapsed() >= PATIENCE {
                let error = no_answer(Some(&path));
                *self.searches.silent.lock() = Some(path);
                return Err(error);
            }
        }
        Ok(crew.end().into_iter().find_map(|(_, child)| child.flatten()))
    }

    fn find_child(&self, image: &ImageFile, label: &Label, asked: &Asked) -> Option<Place> {
        let above = image.place.relative.ancestors().skip(1);
        let above = above.map(|folder| image.place.elsewhere(folder.to_owned())).collect();
        self.find_image(above, asked, |place, identity| {
            identity != image.identity && self.images.is_child(place, image.identity, label)
        })
    }

    /// The first image that is `wanted`, of those in `folders` and of all that the mount shows.
    fn find_image(
        &self,
        folders: Vec<Place>,
        asked: &Asked,
        wanted: impl Fn(&Place, FileIdentity) -> bool,
    ) -> Option<Place> {
        let wanted = |place: &Place, identity| {
            asked.note(place.path());
            wanted(place, identity)
        };
        let list = |folder: &Place| {
            asked.note(folder.path());
            self.listing(folder).ok()
        };
        let in_folder = |folder: &Place| {
            let listing = list(folder);
            let images = listing.iter().flat_map(|listing| listing.images.values());
            let images = images.map(|entry| (folder.image(entry), entry.identity));
            // Those that do not look like images by their names.
            let others = listing.iter().flat_map(|listing| listing.others.values());
            let others = others.map(|entry| (folder.image(entry), entry.identity));
            let others = others.filter(|(place, _)| {
                asked.note(place.path());
                place.is_image()
            });
            let mut all = images.chain(others);
            let found = all.find(|(place, identity)| wanted(place, *identity));
            (found.map(|(place, _)| place), listing)
        };
        let mut known: HashSet<PathBuf> = folders.iter().map(Place::path).collect();
        let mut shown: VecDeque<Place> = self.mirror.clone().into_iter().collect();
        for Pinned { place, folder, .. } in self.pinned.read().clone().into_values() {
            asked.note(place.path());
            match place.stat() {
                Ok(_) if folder => shown.push_back(place),
                Ok(meta) if wanted(&place, identity(&meta)) => return Some(place),
                _ => {}
            }
        }
        if let Some(found) = folders.iter().find_map(|folder| in_folder(folder).0) {
            return Some(found);
        }
        while let Some(folder) = shown.pop_front() {
            let (found, listing) = match known.insert(folder.path()) {
                true => in_folder(&folder),
                false => (None, list(&folder)),
            };
            if found.is_some() {
                return found;
            }
            if known.len() >= MAX_WALKED {
                log::warn!("too many folders to look for children in all of them");
                return None;
            }
            let inner = listing.iter().flat_map(|listing| listing.folders.keys());
            shown.extend(inner.map(|name| folder.elsewhere(folder.relative.join(name))));
        }
        None
    }
}
