//! Open files: reading, writing, and who may.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Handle, Opened, READER, READS_TOO, Tree, WRITER, Wanted, What, not_permitted};
use crate::disk::Disk;
use crate::disk::window::Window;
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::facts::Facts;
use crate::fuse::image::{ImageFile, stale};
use crate::fuse::source::Place;
use crate::storage::Storage;

impl Tree {
    /// Opens a file, to read it as well where it is opened to `write`; see [`Self::open_as`].
    pub fn open(self: &Arc<Self>, ino: u64, write: bool, truncate: bool) -> Result<Opened> {
        self.open_as(ino, Wanted { write, read: true, truncate })
    }

    /// Opens a flat file. It is never truncated, but see [`super::anew`].
    pub fn open_as(self: &Arc<Self>, ino: u64, wanted: Wanted) -> Result<Opened> {
        let node = self.node(ino)?;
        let Wanted { write, read, truncate } = wanted;
        match &node.what {
            What::Image(_) | What::Part(..) if truncate && (!write || self.look.writeback) => {
                Err(not_permitted(
                    "the size is the virtual disk's; open without truncating (conv=notrunc, qemu-img -n)",
                ))
            }
            What::Image(_) | What::Part(..) => {
                let (image, view) = node.image().ok_or_else(stale)?;
                let permit = |facts: &Facts| self.permit_write(&node, image, facts);
                let keep_cache = image.open(&self.images, view, write, permit)?;
                // What the kernel writes by itself it tells nobody.
                let direct = truncate || view.part.is_some() && image.lent();
                if !write {
                    return Ok(Opened { handle: READER, keep_cache, direct });
                }
                let number = self.next_handle.fetch_add(1, Ordering::Relaxed);
                let handle = number | WRITER | if read { READS_TOO } else { 0 };
                if truncate {
                    self.anew.begin(handle);
                }
                Ok(Opened { handle, keep_cache, direct })
            }
            What::Problem(place, _) if !write => {
                let text = self.problem_text(place)?.into_bytes();
                let handle = self.new_handle(Handle::Text(text.into()));
                Ok(Opened { handle, keep_cache: false, direct: true })
            }
            What::Problem(..) => Err(Error::new(ErrorKind::ReadOnly, "a message, not an image")),
            _ => Err(Error::invalid("not a file")),
        }
    }

    /// Whether an image can be written as far as is known without looking further.
    pub(super) fn may_write(&self, image: &ImageFile, facts: &Facts) -> Result<()> {
        let refuse = |why: String| Err(not_written(image, &why));
        if self.look.read_only {
            return refuse("the mount is read-only".into());
        }
        if self.images.scratch(&image.place).is_some() {
            return Ok(());
        }
        if let Some(reason) = &facts.read_only {
            return refuse(reason.clone());
        }
        if image.place.host_read_only() {
            return refuse("the host's file system is read-only".into());
        }
        match self.images.child_of(image.identity, &facts.label) {
            Some(child) => Err(self.made_from_it(image, &child)),
            None => Ok(()),
        }
    }

    /// What forbids writing `image`: another one needs it as it is. Not all who may read the one may know
    /// of the other.
    pub(super) fn made_from_it(&self, image: &ImageFile, child: &Place) -> Error {
        let refused = not_written(image, &format!("{} is made from it", child.path().display()));
        match self.images.readers_know(&image.place, child) {
            true => refused,
            false => refused.withhold(),
        }
    }

    /// The host file of an open image for the kernel to use; see [`ImageFile::lend`].
    pub fn lend(&self, ino: u64, write: bool) -> Option<Arc<dyn Storage>> {
        match &self.node(ino).ok()?.what {
            What::Image(image) => image.lend(write),
            _ => None,
        }
    }

    /// Reads into `buf` and returns how much of it the file reached.
    pub fn read(&self, ino: u64, handle: u64, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let node = self.node(ino)?;
        match &node.what {
            What::Image(_) | What::Part(..) => {
                let (image, view) = node.image().ok_or_else(stale)?;
                image.read(&self.images, view, offset, buf)
            }
            What::Problem(..) => {
                let text = match self.handles.lock().get(&handle) {
                    Some(Handle::Text(text)) => text.clone(),
                    _ => return Err(stale()),
                };
                let rest = text.get(offset as usize..).unwrap_or_default();
                let len = rest.len().min(buf.len());
                buf[..len].copy_from_slice(&rest[..len]);
                Ok(len)
            }
            _ => Err(Error::invalid("not a file")),
        }
    }

    /// Writes as much of `data` as lies inside the disk; no space at its end, as on a block device.
    pub fn write(&self, ino: u64, offset: u64, data: &[u8]) -> Result<usize> {
        self.change_disk(ino, offset, data.len() as u64, |disk| {
            let room = disk.size().saturating_sub(offset).min(data.len() as u64) as usize;
            if room == 0 && !data.is_empty() {
                return Err(Error::new(ErrorKind::NoSpace, "the end of the disk"));
            }
            disk.write_at(offset, &data[..room]).map(|()| room)
        })
    }

    /// Runs `act` on what a flat file shows of its image's open disk.
    pub(super) fn with_disk<R>(
        &self,
        ino: u64,
        act: impl FnOnce(&Window<&Disk>) -> Result<R>,
    ) -> Result<R> {
        let node = self.node(ino)?;
        let (image, view) = node.image().ok_or_else(|| Error::invalid("not an image"))?;
        image.with_view(&self.images, view, act)
    }

    /// [`Self::with_disk`] for what changes `len` bytes at `offset`: other files that show these have the
    /// kernel drop its pages of them, before anybody learns that it is done.
    pub(super) fn change_disk<R>(
        &self,
        ino: u64,
        offset: u64,
        len: u64,
        act: impl FnOnce(&Window<&Disk>) -> Result<R>,
    ) -> Result<R> {
        let node = self.node(ino)?;
        let (image, view) = node.image().ok_or_else(|| Error::invalid("not an image"))?;
        let done = image.with_view(&self.images, view, act);
        let start = view.range(u64::MAX).start.saturating_add(offset);
        // Also where it failed: some of it may be done. No lock is held.
        for old in image.views.outdated(view, &(start..start.saturating_add(len))) {
            self.old_pages.get().into_iter().for_each(|tell| tell(old, true));
        }
        done
    }

    /// close(2) of a file: whoever wrote learns whether that worked.
    pub fn flush(&self, ino: u64, handle: u64) -> Result<()> {
        if handle & WRITER != 0 { self.sync(ino) } else { Ok(()) }
    }

    /// Makes all writes durable.
    pub fn sync(&self, ino: u64) -> Result<()> {
        self.node(ino)?.image().map_or(Ok(()), |(image, _)| image.flush())
    }

    /// Ends the use of a file.
    pub fn release(&self, ino: u64, handle: u64) -> Result<()> {
        let write = handle & WRITER != 0;
        if handle != READER && !write {
            self.handles.lock().remove(&handle);
            return Ok(());
        }
        self.anew.end(handle);
        let node = self.node(ino)?;
        let Some((image, view)) = node.image() else { return Ok(()) };
        let released = image.release(&self.images, view, write);
        if let Err(e) = &released {
            self.failures.note(e);
        }
        let whole = match &node.what {
            What::Part(whole, _) => Some(whole),
            _ => None,
        };
        for node in [&node].into_iter().chain(whole) {
            if node.lookups.load(Ordering::Relaxed) == 0 {
                self.forget(node.ino, 0);
            }
        }
        released
    }

    /// fallocate(2): punching holes and zeroing free space, reserving has nothing to do.
    pub fn allocate(&self, ino: u64, offset: u64, len: u64, mode: i32) -> Result<()> {
        let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let what = mode & !libc::FALLOC_FL_KEEP_SIZE;
        self.change_disk(ino, offset, len, |disk| {
            let end = offset.checked_add(len).ok_or_else(|| Error::invalid("range too large"))?;
            if end > disk.size() && !keep_size {
                return Err(not_permitted("the size is the virtual disk's"));
            }
            let inside = end.min(disk.size()).saturating_sub(offset);
            match what {
                0 if disk.disk().read_only().is_some() => {
                    Err(Error::new(ErrorKind::ReadOnly, "read-only"))
                }
                0 => Ok(()),
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE => {
                    if inside == 0 {
                        Ok(())
                    } else {
                        disk.discard(offset, inside)
                    }
                }
                _ => Err(Error::unsupported("this kind of fallocate")),
            }
        })
    }

    /// lseek(2) to the next data (`SEEK_DATA`) or hole (`SEEK_HOLE`).
    pub fn seek(&self, ino: u64, offset: u64, data: bool) -> Result<Option<u64>> {
        self.with_disk(ino, |disk| {
            if offset >= disk.size() {
                return Ok(None);
            }
            match data {
                // Data the kernel holds back may lie in what is a hole here.
                true if self.look.writeback => Ok(Some(offset)),
                false if self.look.writeback => Ok(Some(disk.size())),
                true => Ok(disk.next_data(offset)?.map(|range| range.start.max(offset))),
                false => disk.next_hole(offset).map(Some),
            }
        })
    }

    /// Target of the symlink that `ln -s` just made.
    pub fn link_target(&self, ino: u64) -> Result<PathBuf> {
        match &self.node(ino)?.what {
            What::Link(target) => Ok(target.clone()),
            _ => Err(Error::invalid("not a symlink")),
        }
    }
}

fn not_written(image: &ImageFile, why: &str) -> Error {
    let what = format!("cannot be written: {why}");
    Error::new(ErrorKind::ReadOnly, what).in_file(&image.place.path())
}
