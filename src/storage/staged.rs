//! New files that appear under their names only when all of them are complete: [`Staged`].
//!
//! A file is made beside the place where it is to be, as `.flatdisk-part0.NAME`, `.flatdisk-part1.NAME`
//! and so on, NAME being that of the file which [`Staged::new`] was given, and locked. Drivers go on
//! using the names that the files will have.
//!
//! # Order
//!
//! Whoever made the files has synced them before [`Staged::commit`]. That renames all but the named
//! file, then the named one, which alone makes the others an image, and syncs the directory after each
//! of both.
//!
//! Killed before the first rename, whatever was there under the name is still there; killed between two
//! of them, too, unless parts of the new image have names of parts of the old one. Then the old named
//! file would name new parts, and show a mix of both disks. So it is removed first, durably: killed from
//! then on until the named file is there, nothing is under the name. Of the old image's parts those with
//! names that the new one does not have are left; whoever replaces an image removes them after this.
//!
//! # What is left behind
//!
//! A `Staged` that is dropped removes its files. Those of a program that was killed are removed by the
//! next [`Staged`] for the same name; that nobody holds a lock on them tells that nobody works on them.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::{Access, Host, Storage};
use crate::error::{Error, ErrorKind, Result};

/// How names of unfinished files begin.
const PREFIX: &str = ".flatdisk-part";

/// A host on which new files are made under temporary names. See the module's documentation.
#[derive(Debug)]
pub struct Staged {
    below: Arc<dyn Host>,
    target: PathBuf,
    replace: bool,
    made: Mutex<Vec<Made>>,
    /// How many files were made, those included that are gone again.
    count: AtomicUsize,
}

/// A file made so far.
#[derive(Debug)]
struct Made {
    path: PathBuf,
    temporary: PathBuf,
}

impl Staged {
    /// For an image at `target`, where there may be a file already if `replace` is set. Removes what a
    /// killed program left of an earlier attempt.
    pub fn new(below: Arc<dyn Host>, target: &Path, replace: bool) -> Result<Arc<Self>> {
        let staged = Self {
            below,
            target: target.to_owned(),
            replace,
            made: Mutex::default(),
            count: 0.into(),
        };
        if !replace && staged.below.open(target, Access::Peek).is_ok() {
            return Err(exists(target));
        }
        staged.sweep()?;
        Ok(Arc::new(staged))
    }

    /// Removes unfinished files of the same name that nobody works on.
    fn sweep(&self) -> Result<()> {
        let dir = directory(&self.target);
        for path in self.below.list(dir)?.iter().filter(|path| self.is_part(path)) {
            match self.below.open(path, Access::Write) {
                Ok(_) => self.below.remove(path)?,
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) if e.kind() == ErrorKind::Busy => {
                    let what = "another program is making this file";
                    return Err(Error::new(ErrorKind::Busy, what).in_file(&self.target));
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Whether `path` is the temporary name of a file that belongs to the target.
    fn is_part(&self, path: &Path) -> bool {
        let Some(name) = path.file_name() else { return false };
        let Some(rest) = name.as_bytes().strip_prefix(PREFIX.as_bytes()) else { return false };
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let target = self.target.file_name().unwrap_or_default();
        digits > 0 && rest[digits..].strip_prefix(b".") == Some(target.as_bytes())
    }

    fn temporary(&self, path: &Path) -> Option<PathBuf> {
        self.made
            .lock()
            .iter()
            .find(|made| same(&made.path, path))
            .map(|made| made.temporary.clone())
    }

    /// Where a file is for now.
    fn now(&self, path: &Path) -> PathBuf {
        self.temporary(path).unwrap_or_else(|| path.to_owned())
    }

    /// Names the file in an error as it is going to be called.
    pub fn explain(&self, error: Error) -> Error {
        let made = self.made.lock();
        let known = made.iter().find(|made| error.path() == Some(&made.temporary));
        match known {
            Some(made) => error.renamed(&made.path),
            None => error,
        }
    }

    /// The names that the files made so far are going to have.
    pub fn names(&self) -> Vec<PathBuf> {
        self.made.lock().iter().map(|made| made.path.clone()).collect()
    }

    /// Gives all files their names, durably. They are complete and synced. Returns the names.
    pub fn commit(&self) -> Result<Vec<PathBuf>> {
        let mut made = self.made.lock();
        let dir = directory(&self.target);
        // The named file last.
        made.sort_by_key(|made| same(&made.path, &self.target));
        let is_there = |path: &Path| self.below.open(path, Access::Peek).is_ok();
        let takes_parts =
            made.iter().any(|made| !same(&made.path, &self.target) && is_there(&made.path));
        if self.replace && takes_parts && is_there(&self.target) {
            self.below.remove(&self.target)?;
            self.below.sync_dir(dir)?;
        }
        let mut names = Vec::new();
        while let Some(file) = made.first() {
            if !names.is_empty() && same(&file.path, &self.target) {
                self.below.sync_dir(dir)?;
            }
            self.below.rename(&file.temporary, &file.path, self.replace)?;
            names.push(made.remove(0).path);
        }
        self.below.sync_dir(dir)?;
        Ok(names)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        for made in self.made.get_mut().drain(..) {
            if let Err(e) = self.below.remove(&made.temporary) {
                log::warn!("{e}");
            }
        }
    }
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// Whether two paths that were made from one name the same file.
fn same(a: &Path, b: &Path) -> bool {
    a.file_name() == b.file_name() && directory(a) == directory(b)
}

fn exists(path: &Path) -> Error {
    Error::new(ErrorKind::Exists, "the file exists").in_file(path).hint("--force replaces it")
}

/// Whether a file's name says that it is not finished.
pub fn is_unfinished(name: &std::ffi::OsStr) -> bool {
    name.as_bytes().starts_with(PREFIX.as_bytes())
}

impl Host for Staged {
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        self.below.open(&self.now(path), access)
    }

    fn open_beneath(&self, root: &Path, name: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        let temporary = self.temporary(&root.join(name));
        let name =
            temporary.as_deref().map_or(name, |path| path.strip_prefix(root).unwrap_or(path));
        self.below.open_beneath(root, name, access)
    }

    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        if self.temporary(path).is_some() {
            return Err(exists(path));
        }
        if !self.replace && self.below.open(path, Access::Peek).is_ok() {
            return Err(exists(path));
        }
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let mut name = OsString::from(format!("{PREFIX}{number}."));
        name.push(self.target.file_name().unwrap_or_default());
        let temporary = path.with_file_name(name);
        let file = self.below.create(&temporary)?;
        self.made.lock().push(Made { path: path.to_owned(), temporary });
        Ok(file)
    }

    fn replace(&self, path: &Path, contents: &[u8]) -> Result<()> {
        self.below.replace(&self.now(path), contents)
    }

    fn remove(&self, path: &Path) -> Result<()> {
        let mut made = self.made.lock();
        let Some(index) = made.iter().position(|made| same(&made.path, path)) else {
            return Err(Error::new(ErrorKind::NotFound, "no such new file").in_file(path));
        };
        self.below.remove(&made.remove(index).temporary)
    }

    fn dress(&self, path: &Path, like: &Path) -> Result<()> {
        self.below.dress(&self.now(path), like)
    }

    fn sync_dir(&self, dir: &Path) -> Result<()> {
        self.below.sync_dir(dir)
    }

    fn list(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        self.below.list(dir)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::storage::file::HostFs;

    /// The host, which does only so many more steps that change names.
    #[derive(Debug)]
    struct Dying(AtomicUsize);

    impl Dying {
        fn step(&self) -> Result<()> {
            let left = self.0.load(Ordering::Relaxed);
            let gone = || Error::new(ErrorKind::Io, "no more");
            self.0.store(left.checked_sub(1).ok_or_else(gone)?, Ordering::Relaxed);
            Ok(())
        }
    }

    impl Host for Dying {
        fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn Storage>> {
            HostFs.open(path, access)
        }

        fn open_beneath(&self, root: &Path, name: &Path, how: Access) -> Result<Arc<dyn Storage>> {
            HostFs.open_beneath(root, name, how)
        }

        fn create(&self, path: &Path) -> Result<Arc<dyn Storage>> {
            HostFs.create(path)
        }

        fn replace(&self, path: &Path, contents: &[u8]) -> Result<()> {
            HostFs.replace(path, contents)
        }

        fn remove(&self, path: &Path) -> Result<()> {
            self.step()?;
            HostFs.remove(path)
        }

        fn rename(&self, from: &Path, to: &Path, replace: bool) -> Result<()> {
            self.step()?;
            HostFs.rename(from, to, replace)
        }

        fn sync_dir(&self, dir: &Path) -> Result<()> {
            HostFs.sync_dir(dir)
        }

        fn list(&self, dir: &Path) -> Result<Vec<PathBuf>> {
            HostFs.list(dir)
        }
    }

    /// Replaces `named` and two parts, of which `old` are there, dying after `steps`. Returns whether it
    /// was done, and what the three files are then: old, new, or not there.
    fn replaced(old: &[&str], steps: usize) -> (bool, Vec<Option<u8>>) {
        let dir = tempfile::tempdir().unwrap();
        let names = ["named", "one", "two"];
        old.iter().for_each(|name| fs::write(dir.path().join(name), b"o").unwrap());
        let host = Arc::new(Dying(steps.into()));
        let staged = Staged::new(host, &dir.path().join("named"), true).unwrap();
        for name in names {
            staged.create(&dir.path().join(name)).unwrap().write_at(0, b"n").unwrap();
        }
        let done = staged.commit().is_ok();
        let read = |name| fs::read(dir.path().join(name)).ok().map(|bytes| bytes[0]);
        (done, names.map(read).to_vec())
    }

    #[test]
    fn killed_between_two_renames_no_old_name_stands_for_new_parts() {
        let mut all_done = false;
        for steps in 0..8 {
            let (done, found) = replaced(&["named", "one", "two"], steps);
            let mixed = found[0] == Some(b'o') && found[1..].contains(&Some(b'n'));
            assert!(!mixed, "after {steps} steps: {found:?}");
            let early = found[0] == Some(b'n') && found[1..] != [Some(b'n'); 2];
            assert!(!early, "after {steps} steps: {found:?}");
            assert!(!done || found == [Some(b'n'); 3]);
            all_done |= done;
        }
        assert!(all_done);
    }

    #[test]
    fn what_was_under_the_name_stays_until_the_end_where_no_part_is_replaced() {
        for steps in 0..3 {
            let (done, found) = replaced(&["named"], steps);
            assert!(!done && found[0] == Some(b'o'), "after {steps} steps: {found:?}");
        }
        assert!(replaced(&["named"], 3) == (true, vec![Some(b'n'); 3]));
    }
}
