//! What is done for all images at once: flushing, closing, describing them.
//!
//! Any image may lie on a file system that does not answer, for ever perhaps. So each is done by a
//! [`Crew`], and for each kind of work there is one thread per image at most that can hang in it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::pinned::GLANCE;
use super::{Node, Tree, What};
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::crew::Crew;
use crate::fuse::facts::Facts;
use crate::fuse::image::{ImageFile, Usage};
use crate::fuse::source::Place;

/// How long images may take to be closed before the log says which are not.
const CLOSING: Duration = Duration::from_secs(10);

/// Failures kept at most.
const MAX_FAILURES: usize = 64;

/// An image that is open, for `status`.
#[derive(Debug, Default)]
pub struct ImageUsage {
    /// The image.
    pub path: PathBuf,
    /// How it is in use.
    pub usage: Usage,
    /// Why it cannot be written through the mount, if it cannot.
    pub read_only: Option<String>,
    /// The files of its parents, nearest first.
    pub parents: Vec<PathBuf>,
    /// How long something that was asked of it has not been answered, if that is long.
    pub silent: Option<Duration>,
}

impl Tree {
    fn images_in_use(&self) -> Vec<Arc<Node>> {
        let needed = |node: &Arc<Node>| image_of(node).is_some_and(ImageFile::needed);
        self.opened_images().into_iter().filter(needed).collect()
    }

    /// Flushes every image that was written, and returns what failed, and which did not answer within
    /// `patience`.
    pub fn flush_all(&self, patience: Duration) -> Vec<Error> {
        let under_way = self.under_way.clone();
        let crew = Crew::start(self.images_in_use(), move |node| {
            let image = image_of(node)?;
            let _turn = image.flushing.try_lock_for(patience)?;
            let _work = under_way.begin(node.ino);
            Some(image.flush())
        });
        crew.wait(patience);
        let failed = |(node, flushed): (Arc<Node>, Option<Option<Result<()>>>)| {
            let Some(flushed) = flushed.flatten() else {
                return silent(image_of(&node)?, patience);
            };
            let e = flushed.err()?;
            // Without room nothing is lost before the image is closed.
            if e.kind() != ErrorKind::NoSpace {
                self.failures.note(&e);
            }
            Some(e)
        };
        crew.end().into_iter().filter_map(failed).collect()
    }

    /// Flushes every image whose tables wait for it, and looks whether its name still stands for it.
    /// Returns when that is done, or after `patience`; what takes longer goes on.
    pub fn look_after_images(&self, patience: Duration) {
        self.take_back();
        let (under_way, failures) = (self.under_way.clone(), self.failures.clone());
        let crew = Crew::start(self.images_in_use(), move |node| {
            let Some(image) = image_of(node) else { return };
            // What has been going on since the last time is enough.
            let Some(_turn) = image.flushing.try_lock() else { return };
            let _work = under_way.begin(node.ino);
            if let Err(e) = image.flush_tables()
                && e.kind() != ErrorKind::NoSpace
            {
                failures.note(&e);
            }
            image.watch_name();
        });
        crew.wait(patience);
    }

    /// Closes every image; the mount is gone. Those that do not answer are waited for when all others
    /// are closed.
    pub fn close_all(&self) {
        let (images, failures) = (self.images.clone(), self.failures.clone());
        let under_way = self.under_way.clone();
        let crew = Crew::start(self.opened_images(), move |node| {
            let Some(image) = image_of(node) else { return };
            let _work = under_way.begin(node.ino);
            if let Err(e) = image.shut(&images) {
                failures.note(&e);
            }
        });
        if crew.wait(CLOSING) {
            return;
        }
        let late = crew.late();
        late.iter().filter_map(|node| silent(image_of(node)?, CLOSING)).for_each(|e| {
            log::error!("{e}; waiting for it to be closed");
        });
        while !crew.wait(CLOSING) {}
    }

    /// The images in use, and what else does not answer. Says of those that do not no more than that. A
    /// `status` takes little longer than [`GLANCE`].
    pub fn usage(self: &Arc<Self>) -> Vec<ImageUsage> {
        let asked = self.ask_pinned();
        let nodes = self.images_in_use();
        let tree = self.clone();
        let crew = Crew::start(nodes, move |node| {
            let image = image_of(node)?;
            let _turn = image.describing.try_lock_for(GLANCE)?;
            Some(tree.usage_of(image))
        });
        let begun = Instant::now();
        crew.wait(GLANCE);
        let answers = crew.end();
        asked.wait(GLANCE.saturating_sub(begun.elapsed()));
        let waiting = self.under_way.longer_than(GLANCE);
        let used = answers.into_iter().filter_map(|(node, answer)| {
            let silent = waiting.get(&node.ino).copied();
            match answer.flatten() {
                Some(usage) => {
                    let own = &usage.usage;
                    let used = own.readers + own.writers > 0 || own.throw_away.is_some();
                    used.then_some(ImageUsage { silent, ..usage })
                }
                None => Some(ImageUsage {
                    path: image_of(&node)?.place.path(),
                    silent: silent.or(Some(GLANCE)),
                    ..ImageUsage::default()
                }),
            }
        });
        let mut used: Vec<_> = used.collect();
        let mut add = |other: ImageUsage| {
            if used.iter().all(|known| known.path != other.path) {
                used.push(other);
            }
        };
        for (node, time) in
            waiting.iter().filter_map(|(ino, time)| Some((self.node(*ino).ok()?, time)))
        {
            let place = match &node.what {
                What::Root => self.mirror.as_ref(),
                What::Folder(place) | What::Problem(place, _) => Some(place),
                _ => node.image().map(|(image, _)| &image.place),
            };
            if let Some(path) = place.map(Place::path) {
                add(ImageUsage { path, silent: Some(*time), ..ImageUsage::default() });
            }
        }
        let pinned = asked.end().into_iter();
        let silent = pinned.filter(|(_, answer)| answer.as_ref().is_none_or(Option::is_none));
        silent.for_each(|((_, pinned), _)| add(pinned.silent()));
        used
    }

    fn usage_of(&self, image: &ImageFile) -> ImageUsage {
        let usage = image.usage();
        let used = usage.readers + usage.writers > 0 || usage.throw_away.is_some();
        // Readers may have lost the image, and then nothing is known.
        let facts = image.known().filter(|_| used);
        let refusal = facts.as_ref().and_then(|facts| self.may_write(image, facts).err());
        let parents = facts.iter().flat_map(|facts| &facts.parents);
        ImageUsage {
            path: image.place.path(),
            usage,
            read_only: refusal.map(|e| e.what().to_owned()),
            parents: parents.map(|(path, _)| path.clone()).collect(),
            silent: None,
        }
    }

    /// What is known of images, looking at them if need be; `None` of those that do not answer now.
    pub(super) fn facts_of(&self, places: Vec<Place>) -> Vec<Option<Result<Arc<Facts>>>> {
        let images = self.images.clone();
        let crew = Crew::start(places, move |place| images.examine_within(place, GLANCE));
        crew.wait(GLANCE);
        crew.end().into_iter().map(|(_, facts)| facts.flatten()).collect()
    }

    /// What failed to reach its image since the tree was made.
    pub fn failures(&self) -> Vec<String> {
        self.failures.texts.lock().clone()
    }
}

fn image_of(node: &Arc<Node>) -> Option<&ImageFile> {
    match &node.what {
        What::Image(image) => Some(image),
        _ => None,
    }
}

fn silent(image: &ImageFile, patience: Duration) -> Option<Error> {
    let what = format!(
        "no answer within {} s from the file system that it lies on",
        patience.as_secs().max(1)
    );
    Some(Error::new(ErrorKind::Io, what).in_file(&image.place.path()))
}

/// Failed flushes and closes, for the end of the mount.
#[derive(Debug, Default)]
pub(super) struct Failures {
    texts: parking_lot::Mutex<Vec<String>>,
}

impl Failures {
    /// Keeps and logs a failure, once.
    pub(super) fn note(&self, error: &Error) {
        let text = error.to_string();
        let mut texts = self.texts.lock();
        if !texts.contains(&text) && texts.len() < MAX_FAILURES {
            log::error!("{text}");
            texts.push(text);
        }
    }
}
