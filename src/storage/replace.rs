//! Replacing a small file in one step, so that it stays what it was in everything but its contents: owner,
//! group, mode, and extended attributes, access lists and security labels among them.
//!
//! The new contents are written beside the old ones, and take their name once they are durable. A file that
//! cannot be kept that way is not replaced. What a symlink leads to is replaced, not the symlink.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use xattr::FileExt;

use crate::error::{Error, Result};

/// Gives the file at `path` new contents. Durable on return but for the directory, which is returned.
pub fn replace(path: &Path, contents: &[u8]) -> Result<PathBuf> {
    let failed = |e: io::Error| Error::io("replace", &e).in_file(path);
    let real = fs::canonicalize(path).map_err(failed)?;
    let dir = real.parent().unwrap_or(Path::new("/")).to_owned();
    let old = File::open(&real).map_err(failed)?;
    let new = tempfile::Builder::new().prefix(".flatdisk-").suffix(".tmp").tempfile_in(&dir);
    let mut new = new.map_err(failed)?;
    new.write_all(contents).map_err(failed)?;
    keep(&old, new.as_file()).map_err(|e| {
        Error::io("not replaced: the file's owner, mode and attributes cannot be kept", &e)
            .in_file(path)
            .hint("do it as the file's owner, or as root")
    })?;
    new.as_file().sync_all().map_err(failed)?;
    new.persist(&real).map_err(|e| failed(e.error))?;
    Ok(dir)
}

/// Makes the file at `path` like the one at `like` in everything but its contents.
pub fn dress(path: &Path, like: &Path) -> Result<()> {
    let open = |path: &Path| File::open(path).map_err(|e| Error::io("open", &e).in_file(path));
    keep(&open(like)?, &open(path)?).map_err(|e| {
        Error::io("the file's owner, mode and attributes cannot be kept", &e)
            .in_file(like)
            .hint("do it as the file's owner, or as root")
    })
}

/// Makes `new` like `old`. The mode comes after the owner, whose change takes bits of it away.
fn keep(old: &File, new: &File) -> io::Result<()> {
    let (was, is) = (old.metadata()?, new.metadata()?);
    let change = |was: u32, is: u32| (was != is).then_some(was);
    fchown(new.as_fd(), change(was.uid(), is.uid()), change(was.gid(), is.gid()))?;
    new.set_permissions(Permissions::from_mode(was.mode() & 0o7777))?;
    let names = match old.list_xattr() {
        Ok(names) => names,
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(()),
        Err(e) => return Err(e),
    };
    for name in names {
        // Signatures are of the old contents.
        if name == "security.ima" || name == "security.evm" {
            continue;
        }
        let Some(value) = old.get_xattr(&name)? else { continue };
        if new.get_xattr(&name)?.as_ref() != Some(&value) {
            new.set_xattr(&name, &value)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_file_keeps_owner_mode_and_attributes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.vmdk");
        fs::write(&path, "old").unwrap();
        let file = File::open(&path).unwrap();
        if nix::unistd::geteuid().is_root() {
            fchown(&file, Some(4711), Some(4712)).unwrap();
        }
        file.set_permissions(Permissions::from_mode(0o2640)).unwrap();
        let attributes = file.set_xattr("user.origin", b"kept").is_ok();
        let before = file.metadata().unwrap();

        assert_eq!(replace(&path, b"new").unwrap(), dir.path().canonicalize().unwrap());
        let after = File::open(&path).unwrap();
        let meta = after.metadata().unwrap();
        assert_ne!(meta.ino(), before.ino());
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(
            (meta.uid(), meta.gid(), meta.mode()),
            (before.uid(), before.gid(), before.mode())
        );
        if attributes {
            assert_eq!(after.get_xattr("user.origin").unwrap().as_deref(), Some(&b"kept"[..]));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_symlink_leads_to_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("a"), dir.path().join("b"));
        fs::write(&path, "old").unwrap();
        std::os::unix::fs::symlink("a", &link).unwrap();
        replace(&link, b"new").unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }
}
