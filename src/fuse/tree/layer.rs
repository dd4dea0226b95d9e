//! Throw-away layers of single images: `flatdisk open --nonpersistent`, and what becomes of one by
//! `flatdisk close --commit`.
//!
//! What a layer holds is in a file without a name, and gone when the daemon is. So it is kept by way of a
//! child of the image, which has a name only once it is complete and durable.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use super::{Found, ROOT, Tree, What};
use crate::disk::Disk;
use crate::disk::transfer::copy_layers;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::formats::{OpenOptions, snapshot};
use crate::storage::file::HostFs;
use crate::storage::{Access, archive};

impl Tree {
    /// Shows the image at `path` in the root; what is written to it goes to a scratch file in `dir`.
    pub fn pin_throw_away(&self, path: &Path, dir: PathBuf) -> Result<OsString> {
        let real = std::fs::canonicalize(path).map_err(|e| Error::io("open", &e).in_file(path))?;
        let mirrored = self.mirror.iter().any(|mirror| real.starts_with(mirror.path()));
        if mirrored || self.pinned_name(&real).is_some() {
            let what = "the image is shown already, and written through that name";
            return Err(Error::new(ErrorKind::Exists, what)
                .in_file(path)
                .hint("`flatdisk mount --nonpersistent` writes to no image of a mount"));
        }
        if archive::has_name(&real) {
            let what = "the disks of an archive are only read";
            return Err(Error::new(ErrorKind::ReadOnly, what).in_file(path));
        }
        let shown = self.pin(path, None)?;
        if let Some(pinned) = self.pinned.read().get(&shown) {
            self.images.throw_away(&pinned.place, Some(dir));
        }
        Ok(shown)
    }

    /// Makes a child at `path`, of the image that is shown in the root as `name`, that holds what its
    /// throw-away layer holds.
    pub fn keep_layer(&self, name: &OsStr, path: &Path) -> Result<()> {
        let root = self.node(ROOT)?;
        let Found::Image(place, identity) = self.find(&root, name)? else {
            return Err(Error::invalid("not an image"));
        };
        let found = Found::Image(place.clone(), identity);
        let image = place.path();
        let nothing = || {
            let what = "nothing was written to a throw-away layer of it";
            Error::invalid(what).in_file(&image).hint("`flatdisk close` without --commit closes it")
        };
        let node = self.node(found.ino()).map_err(|_| nothing())?;
        let What::Image(file) = &node.what else { return Err(nothing()) };
        if file.in_use() {
            return Err(Error::new(ErrorKind::Busy, "the file is open").in_file(&image));
        }
        let layer = file.written_layer().ok_or_else(nothing)?;
        let options = OpenOptions::new(Access::Write);
        let host = HostFs::shared();
        let fill = |disk: &Disk| copy_layers(&layer, disk, 1, &()).map(drop);
        snapshot::child_holding(&host, path, &image, &options, fill).in_file(path)
    }
}
