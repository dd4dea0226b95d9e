//! What the user named: the images and directories in the root.
//!
//! Each may lie on a file system of its own that stops to answer. The kernel holds the root's entries
//! locked while one of them is looked up, so a lookup there never waits for long: a thread asks the host
//! ([`Pinned::ask`]), and while it waits the name stands for what it stood for last.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::names::strip_suffix;
use super::upkeep::ImageUsage;
use super::{Attributes, Found, Node, PROBLEM_SUFFIX, Tree};
use crate::error::{Error, Result};
use crate::fuse::crew::Crew;
use crate::fuse::facts::{Facts, FactsCache};
use crate::fuse::source::Place;
use crate::storage::FileIdentity;
use crate::storage::remembered::identity;

/// How long the host may take to answer for what the user named.
pub(super) const GLANCE: Duration = Duration::from_secs(1);

/// Something in the root that the user named.
#[derive(Debug, Clone)]
pub(super) struct Pinned {
    /// Where it is.
    pub(super) place: Place,
    /// A directory, or an archive that shows as one.
    pub(super) folder: bool,
    /// The partitions of the image show, too.
    pub(super) partitions: bool,
    questions: Arc<Questions>,
}

/// What the host is asked about one of them: one question at a time, so that no more than one hangs.
#[derive(Debug, Default)]
struct Questions {
    turn: Mutex<()>,
    /// When the question began that has no answer yet.
    since: Mutex<Option<Instant>>,
    /// What each name stood for when it was looked up last.
    last: Mutex<HashMap<OsString, (Found, Attributes)>>,
}

/// What the host says of one of them.
pub(super) struct Answer {
    /// Which file or directory it is now.
    pub(super) identity: Result<FileIdentity>,
    /// What is known of the image.
    pub(super) facts: Option<Result<Arc<Facts>>>,
}

impl Pinned {
    /// `place` as the user named it.
    pub(super) fn new(place: Place, folder: bool) -> Self {
        Self { place, folder, partitions: false, questions: Arc::default() }
    }

    /// What the host says; nothing where another question has had no answer for [`GLANCE`].
    pub(super) fn ask(&self, images: &FactsCache) -> Option<Answer> {
        let _turn = self.questions.turn.try_lock_for(GLANCE)?;
        *self.questions.since.lock() = Some(Instant::now());
        let facts = (!self.folder).then(|| images.examine_within(&self.place, GLANCE));
        let meta = self.place.stat();
        *self.questions.since.lock() = None;
        let failed = |e| Error::io("stat", &e).in_file(&self.place.path());
        let identity = meta.map(|meta| identity(&meta)).map_err(failed);
        match facts {
            None => Some(Answer { identity, facts: None }),
            Some(facts) => Some(Answer { identity, facts: Some(facts?) }),
        }
    }

    /// It for `status`, where the host does not answer.
    pub(super) fn silent(&self) -> ImageUsage {
        let since = *self.questions.since.lock();
        let silent = since.map_or(GLANCE, |since| since.elapsed());
        ImageUsage { path: self.place.path(), silent: Some(silent), ..ImageUsage::default() }
    }
}

impl Tree {
    /// What the user named, with its names, and what the host says of each; `None` where it says nothing.
    pub(super) fn ask_pinned(&self) -> Crew<(OsString, Pinned), Option<Answer>> {
        let pinned = self.pinned.read().clone().into_iter().collect();
        let images = self.images.clone();
        Crew::start(pinned, move |(_, pinned): &(OsString, Pinned)| pinned.ask(&images))
    }

    /// What the user named that `name` in the root stands for, or is made from.
    fn pinned_behind(&self, name: &OsStr) -> Option<Pinned> {
        let all = self.pinned.read();
        let of = |base: &OsStr| all.get(&self.shown(base)).or(all.get(base));
        let problem = || of(strip_suffix(name, PROBLEM_SUFFIX.as_ref())?);
        let part = || of(self.part_name(name)?.0);
        all.get(name).or_else(problem).or_else(part).cloned()
    }

    /// [`Tree::lookup`] in the root, which takes no longer than [`GLANCE`] because of the host.
    pub(super) fn lookup_in_root(&self, root: &Node, name: &OsStr) -> Result<Attributes> {
        let Some(pinned) = self.pinned_behind(name) else {
            return self.enter_and_describe(self.find(root, name)?);
        };
        let (asked, images) = (pinned.clone(), self.images.clone());
        let crew = Crew::start(vec![()], move |()| asked.ask(&images).is_some());
        crew.wait(GLANCE);
        let answered = crew.end().into_iter().any(|((), answered)| answered == Some(true));
        if !answered {
            return self.as_last_seen(&pinned, name);
        }
        pinned.questions.last.lock().remove(name);
        let found = self.find(root, name)?;
        let attributes = self.enter_and_describe(found.clone())?;
        pinned.questions.last.lock().insert(name.to_owned(), (found, attributes.clone()));
        Ok(attributes)
    }

    /// What `name` stood for when the host answered last; the kernel holds one more reference to the node.
    fn as_last_seen(&self, pinned: &Pinned, name: &OsStr) -> Result<Attributes> {
        let last = pinned.questions.last.lock().get(name).cloned();
        let Some((found, attributes)) = last else {
            let what = "no answer from the file system that it lies on";
            let timed_out = io::Error::from_raw_os_error(libc::ETIMEDOUT);
            return Err(Error::io(what, &timed_out).in_file(&pinned.place.path()));
        };
        let node = self.enter(found);
        Ok(Attributes { ino: node.ino, ..attributes })
    }
}
