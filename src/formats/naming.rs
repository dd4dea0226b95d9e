//! An image under another name in its directory.
//!
//! # Order
//!
//! Each step is durable before the next one begins. At every moment the disk is complete under the old
//! name, the new one, or both: names are added before others go, and a second name of a file (a hard link)
//! costs no space.
//!
//! 1. The image's own other files ([`Naming::parts`](super::Naming)) get their new names beside the old ones.
//! 2. So does the named file; where it is a text that names the others, a new one appears that names them
//!    as they are called now.
//! 3. A file with its own name inside it is made to say the new one, which is the truth under either.
//! 4. Where it is a text, the old one is replaced by the same as the new one, and
//! 5. the old names of the other files go.
//! 6. Whoever asked removes the old name, or gives it to another image.
//!
//! [`Renaming::add`] does the first three and undoes them if one fails, [`Renaming::leave`] the next two.
//! Killed anywhere, all of it can be asked for again: what is done already is found done.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::chain::{Child, children, file_identity, opening};
use super::open::open_alone;
use super::places::directory_of;
use super::{Format, Image, Naming, OpenContext, OpenOptions, Opened, recognise};
use crate::codec;
use crate::disk::sync_file;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::storage::staged::Staged;
use crate::storage::{Access, FileIdentity, Host, Storage};

/// An image that gets another name. Its files stay locked for as long as this lives.
pub(super) struct Renaming<'a> {
    host: &'a Arc<dyn Host>,
    format: &'static dyn Format,
    file: Arc<dyn Storage>,
    ctx: OpenContext,
    /// The locks on the other files.
    _opened: Option<Opened>,
    old: PathBuf,
    new: PathBuf,
    naming: Naming,
    /// Names that were not there before.
    made: Vec<PathBuf>,
}

impl<'a> Renaming<'a> {
    /// From `old` to `new` in the same directory. `access` is how others are kept away; only for writing
    /// can an image be made to call itself something else.
    pub(super) fn new(
        host: &'a Arc<dyn Host>,
        old: &Path,
        new: &Path,
        options: &OpenOptions,
        access: Access,
    ) -> Result<Self> {
        let options = opening(options, access, None);
        let file = host.open(old, access)?;
        let format = recognise(&*file)?;
        let ctx = OpenContext::new(host, &*file, &options);
        let opened = Some(format.open(file.clone(), &ctx).in_file(old)?);
        let mut naming = format.naming(&file, new).in_file(old)?;
        let notes = naming.notes.drain(..);
        let there = notes.filter(|(note, _)| host.open(note, Access::Peek).is_ok());
        naming.parts.extend(there.collect::<Vec<_>>());
        let (old, new) = (old.to_owned(), new.to_owned());
        Ok(Self { host, format, file, ctx, _opened: opened, old, new, naming, made: Vec::new() })
    }

    /// Whether the image has its own name inside, and keeps it.
    pub(super) fn keeps_old_name_inside(&self) -> bool {
        self.naming.inside && !self.file.writable()
    }

    /// Steps 1 to 3. What fails is undone.
    pub(super) fn add(&mut self) -> Result<()> {
        self.try_add().inspect_err(|_| self.undo())
    }

    fn try_add(&mut self) -> Result<()> {
        let dir = directory_of(&self.new);
        for (old, new) in self.naming.parts.clone() {
            self.link(&old, &new)?;
        }
        if self.naming.text.is_none() {
            self.link(&self.old.clone(), &self.new.clone())?;
            self.host.sync_dir(&dir)?;
            return self.call_itself(&self.new);
        }
        self.host.sync_dir(&dir)?;
        self.write_text()
    }

    fn call_itself(&self, name: &Path) -> Result<()> {
        if !self.naming.inside || !self.file.writable() {
            return Ok(());
        }
        self.format.call_itself(self.file.clone(), &self.ctx, name).in_file(&self.old)
    }

    fn link(&mut self, old: &Path, new: &Path) -> Result<()> {
        match self.host.link(old, new) {
            Ok(()) => self.made.push(new.to_owned()),
            Err(e) if e.kind() == ErrorKind::Exists && self.same_file(old, new) => {}
            // What a killed program left of step 5.
            Err(e)
                if e.kind() == ErrorKind::NotFound && self.host.open(new, Access::Peek).is_ok() => {
            }
            Err(e) if e.kind() == ErrorKind::Exists => {
                return Err(
                    Error::new(ErrorKind::Exists, "a file of this name exists").in_file(new)
                );
            }
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// Whether both are names of one file, and not one name in two spellings.
    fn same_file(&self, a: &Path, b: &Path) -> bool {
        let files = [a, b].map(|path| file_identity(self.host, path).ok());
        files[0].is_some() && files[0] == files[1] && [a, b].iter().all(|p| is_listed(self.host, p))
    }

    /// Makes the text that names the others by their new names.
    fn write_text(&mut self) -> Result<()> {
        let Some(text) = self.naming.text.clone() else { return Ok(()) };
        if let Ok(there) = self.host.open(&self.new, Access::Peek) {
            let mut found = vec![0; there.len().unwrap_or(0).min(text.len() as u64 + 1) as usize];
            let read = there.read_at(0, &mut found);
            if read.is_ok() && found == text {
                return Ok(());
            }
            let what = "a file of this name exists";
            return Err(Error::new(ErrorKind::Exists, what).in_file(&self.new));
        }
        let staged = Staged::new(self.host.clone(), &self.new, false)?;
        let file = staged.create(&self.new)?;
        codec::write_all(&*file, 0, &text, "the descriptor")?;
        staged.dress(&self.new, &self.old).map_err(|e| staged.explain(e))?;
        sync_file(&*file)?;
        self.made.push(self.new.clone());
        staged.commit().map(drop)
    }

    /// Takes away what [`Self::add`] has made.
    pub(super) fn undo(&mut self) {
        let _ = self.call_itself(&self.old);
        for path in self.made.drain(..).rev() {
            match self.host.remove(&path) {
                Err(e) if e.kind() != ErrorKind::NotFound => log::warn!("{e}"),
                _ => {}
            }
        }
        let _ = self.host.sync_dir(&directory_of(&self.new));
    }

    /// Steps 4 and 5.
    pub(super) fn leave(&self) -> Result<()> {
        if let Some(text) = &self.naming.text {
            self.host.replace(&self.old, text)?;
        }
        // The old text may have been replaced before, by a program that was killed then.
        let renamed = self.host.open(&self.new, Access::Peek)?;
        let back = self.format.naming(&renamed, &self.old)?;
        for (new, old) in back.parts.into_iter().chain(back.notes) {
            if self.same_file(&old, &new) {
                self.host.remove(&old)?;
            }
        }
        self.host.sync_dir(&directory_of(&self.old))
    }

    /// Does it all at once, without second names: what is one file and has its own name nowhere but inside
    /// itself.
    pub(super) fn move_at_once(&self) -> Result<()> {
        self.host.rename(&self.old, &self.new, false)?;
        self.host.sync_dir(&directory_of(&self.new))?;
        self.call_itself(&self.new)
    }

    /// Undoes [`Self::move_at_once`], as far as it came.
    pub(super) fn move_back(&self) {
        let dir = directory_of(&self.old);
        let renamed = self.host.rename(&self.new, &self.old, false);
        if let Err(e) = renamed.and_then(|()| self.host.sync_dir(&dir)) {
            log::warn!("{e}");
        }
        let _ = self.call_itself(&self.old);
    }

    /// Whether the image is one file.
    pub(super) fn is_one_file(&self) -> bool {
        self.naming.parts.is_empty() && self.naming.text.is_none()
    }

    /// Step 6: the old name goes.
    pub(super) fn remove_old(&self) -> Result<()> {
        self.host.remove(&self.old)?;
        self.host.sync_dir(&directory_of(&self.old))
    }
}

/// Which files hold the disk of the image at `path`; none if it does not open.
pub(super) fn files_of(
    host: &Arc<dyn Host>,
    path: &Path,
    options: &OpenOptions,
) -> BTreeSet<FileIdentity> {
    let Ok(opened) = open_alone(host, path, &opening(options, Access::Peek, None)) else {
        return BTreeSet::new();
    };
    opened.map.files().iter().filter_map(|file| file.identity().ok()).collect()
}

/// Whether the directory of `path` has exactly its name.
pub(super) fn is_listed(host: &Arc<dyn Host>, path: &Path) -> bool {
    let listed = host.list(&directory_of(path)).unwrap_or_default();
    listed.iter().any(|other| other.file_name() == path.file_name())
}

/// Refuses a name that is a symlink, and a file that is none of the host's plain ones.
pub(super) fn refuse_link(path: &Path) -> Result<()> {
    let Ok(meta) = path.symlink_metadata() else { return Ok(()) };
    let what = match () {
        () if meta.is_symlink() => "a symbolic link, not an image",
        () if !meta.is_file() => "not a regular file",
        () => return Ok(()),
    };
    Err(Error::invalid(what).in_file(path).hint("name the image's own file"))
}

/// The images beside `image` that stand on it.
pub(super) fn children_beside(
    host: &Arc<dyn Host>,
    image: &Image,
    options: &OpenOptions,
) -> Result<Vec<Child>> {
    children(host, image, &[directory_of(&image.path)], options)
}

/// The paths of children.
pub(super) fn paths(children: &[Child]) -> Vec<PathBuf> {
    children.iter().map(|child| child.path.clone()).collect()
}

/// The names of files, without their directories, for a message.
pub(super) fn listed(paths: &[PathBuf]) -> String {
    let name = |path: &PathBuf| path.file_name().unwrap_or_default().display().to_string();
    paths.iter().map(name).collect::<Vec<_>>().join(", ")
}
