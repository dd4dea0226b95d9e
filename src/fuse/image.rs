//! One flat file: when its image is open, and how.
//!
//! ```text
//!            first open(2)                first open(2) for writing
//!   closed ----------------> read-only ----------------------------> read-write
//!          <----------------           <----------------------------
//!            last close(2)                last close(2) of a writer, readers left
//! ```
//!
//! A writer and a reader exclude each other by the locks on the image's file, so the read-only disk
//! goes before the writable one comes. Reads under way finish first: they hold the disk's lock
//! shared, a change of state takes it alone. An image nobody uses is closed, so that other programs
//! can have it.
//!
//! An image whose name is taken away or given to another file while it is open stays open for those
//! who have it, also for readers when its last writer leaves; an open(2) that comes later finds what
//! the name stands for now.
//!
//! In a `nonpersistent` mount what is written goes to a throw-away layer over the read-only disk. A
//! layer that was written to lasts until the image or the mount is closed, and the image stays open
//! and locked under it: `mkfs` and then `mount` are two opens of one disk.
//!
//! # The kernel's cache
//!
//! The kernel may keep the pages of a flat file from one open(2) to the next only while no other
//! program changes the image. While the image is open here the locks see to that; for the time
//! between, the stamps of all its files (parents included) are compared. Stamps too fresh or too coarse
//! to tell two changes apart are not believed, so the first open(2) after a writing session starts cold,
//! and every one where the host keeps whole seconds. Each file of a partition has pages of its own, so
//! that contents which may have changed unseen have a number, the epoch, and each [`View`] the one of its
//! pages.

use std::fs::Metadata;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use parking_lot::{Mutex, RwLock};

use super::facts::{Facts, FactsCache};
use super::parts::{Part, View, Views, parts_of};
use super::passthrough::{KernelWrites, suits};
use super::source::Place;
use crate::disk::map::DiskRange;
use crate::disk::tables::CacheStats;
use crate::disk::window::Window;
use crate::disk::{Disk, overlay};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::remembered::{BELIEVED, Stamp, identity};
use crate::storage::runs::merge;
use crate::storage::{Access, FileIdentity, Storage, file};

/// A flat file's image. Locks, outermost first: `flushing` or `describing`, `opens`, `current`.
#[derive(Debug)]
pub struct ImageFile {
    /// Where the image is.
    pub place: Place,
    /// Which file it is: a file put in its place later is another image.
    pub identity: FileIdentity,
    /// The files through which it is seen.
    pub views: Views,
    opens: Mutex<Opens>,
    current: RwLock<Option<OpenImage>>,
    /// Files open, or being opened or closed: for those who must not wait for that.
    users: AtomicU32,
    /// What the log said last of [`Self::displaced`], so that it says nothing twice.
    logged: Mutex<Option<Displaced>>,
    /// The host had no room for the last flush.
    full: AtomicBool,
    /// A throw-away layer that was written to waits for the next open.
    kept: AtomicBool,
    /// What readers found damaged, and of which contents.
    damaged: Mutex<Option<(Vec<Stamp>, Vec<DiskRange>)>>,
    /// The last metadata seen, for a file that was deleted while open.
    last: Mutex<Option<Metadata>>,
    /// The partitions, while the image is open, and when they were read. After `current`.
    table: Mutex<Option<(Instant, Arc<[Part]>)>>,
    sharing: Mutex<Sharing>,
    /// Held by whoever flushes it for the daemon. Before `opens`.
    pub flushing: Mutex<()>,
    /// Held by whoever describes it for `status`. Before `opens`.
    pub describing: Mutex<()>,
}

#[derive(Debug)]
struct Opens {
    readers: u32,
    writers: u32,
    /// The files as they were when the image was closed.
    cached: Option<Vec<Stamp>>,
    /// Which contents these are, of those that nobody could tell from each other.
    epoch: u64,
    /// A loop device uses the host's file by itself, and nobody else may open the image.
    given: bool,
}

/// What keeps the kernel and the files of partitions apart.
#[derive(Debug, Default)]
struct Sharing {
    /// Partitions show: the kernel must not begin to use the host's file by itself.
    divided: bool,
    /// It does.
    lent: bool,
}

#[derive(Debug)]
struct OpenImage {
    disk: Arc<Disk>,
    facts: Arc<Facts>,
    writable: bool,
    /// Writes go to a throw-away layer.
    overlaid: bool,
    /// What the kernel writes by itself, where it may.
    kernel_writes: OnceLock<KernelWrites>,
    /// A loop device writes to the host's file by itself.
    device_writes: AtomicBool,
}

impl OpenImage {
    /// Makes what was written durable, by whomever.
    fn flush(&self) -> Result<()> {
        if self.device_writes.load(Ordering::Relaxed) {
            self.disk.changed_from_outside()?;
        }
        let Some(kernel) = self.kernel_writes.get() else { return self.disk.flush() };
        kernel.note(&self.disk)?;
        let cut = kernel.cut(&self.disk);
        self.disk.flush().and(cut)
    }

    /// Flushes and closes.
    fn close(&self) -> Result<()> {
        self.flush().and(self.disk.close())
    }

    /// Whether a throw-away layer was written to: what it holds is nowhere else.
    fn holds_changes(&self) -> bool {
        self.overlaid && self.disk.writing()
    }
}

/// Where a disk lies in one piece in a host file.
#[derive(Debug, Clone)]
pub struct FixedRun {
    /// The file; it has a [`Storage::host_file`].
    pub file: Arc<dyn Storage>,
    /// Byte of the file that is the disk's first.
    pub at: u64,
    /// Bytes of the disk.
    pub len: u64,
    /// Bytes per logical sector.
    pub sector_size: u32,
}

/// What became of the name of an image that is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Displaced {
    /// No file has it.
    Deleted,
    /// Another file has it.
    Replaced,
}

impl std::fmt::Display for Displaced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Deleted => "deleted",
            Self::Replaced => "replaced",
        })
    }
}

/// How an image is in use.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    /// Files open for reading.
    pub readers: u32,
    /// Files open for writing.
    pub writers: u32,
    /// Bytes per logical sector; 0 if the image is not open.
    pub sector_size: u32,
    /// Writes that wait for a flush.
    pub unflushed: bool,
    /// Bytes of a throw-away layer that was written to.
    pub throw_away: Option<u64>,
    /// The table cache.
    pub cache: CacheStats,
    /// Whether its name stands for it no more.
    pub displaced: Option<Displaced>,
}

impl ImageFile {
    /// The flat file `ino` of the image at `place`; not open.
    pub fn new(place: Place, identity: FileIdentity, ino: u64) -> Self {
        Self {
            place,
            identity,
            views: Views::new(ino),
            opens: Mutex::new(Opens {
                readers: 0,
                writers: 0,
                cached: None,
                epoch: 1,
                given: false,
            }),
            current: RwLock::default(),
            users: AtomicU32::new(0),
            logged: Mutex::default(),
            full: AtomicBool::new(false),
            kept: AtomicBool::new(false),
            damaged: Mutex::default(),
            last: Mutex::default(),
            table: Mutex::default(),
            sharing: Mutex::default(),
            flushing: Mutex::default(),
            describing: Mutex::default(),
        }
    }

    /// Takes part in an open(2) of `view` and says whether the kernel's cached pages are still good.
    /// `may_write` has the last word on writing.
    pub fn open(
        &self,
        images: &FactsCache,
        view: &View,
        write: bool,
        may_write: impl FnOnce(&Facts) -> Result<()>,
    ) -> Result<bool> {
        self.users.fetch_add(1, Ordering::Relaxed);
        let opened = self.open_counted(images, view, write, may_write);
        if opened.is_err() {
            self.users.fetch_sub(1, Ordering::Relaxed);
        }
        opened
    }

    fn open_counted(
        &self,
        images: &FactsCache,
        view: &View,
        write: bool,
        may_write: impl FnOnce(&Facts) -> Result<()>,
    ) -> Result<bool> {
        let mut opens = self.opens.lock();
        if self.displaced().is_some() {
            return Err(stale().in_file(&self.place.path()));
        }
        if opens.given {
            let what = "a loop device uses the image's file by itself";
            return Err(Error::new(ErrorKind::Busy, what).in_file(&self.place.path()));
        }
        if write {
            self.views.refuse_other_writers(view).map_err(|e| e.in_file(&self.place.path()))?;
        }
        if let Some(part) = &view.part {
            self.refuse_old_part(images, part)?;
        }
        let (was_open, writable) = match &*self.current.read() {
            Some(open) => (true, open.writable),
            None => (false, false),
        };
        if write && !writable {
            may_write(&*images.examine(&self.place)?)?;
            self.become_writable(images, opens.readers > 0)?;
        } else if !was_open {
            let opened = self.open_disk(images, Access::Read)?;
            *self.current.write() = Some(opened);
        }
        if !was_open {
            let facts = self.current.read().as_ref().map(|open| open.facts.clone());
            let cached = opens.cached.take();
            let same = cached.is_some() && cached == facts.and_then(|facts| facts.contents());
            opens.epoch += u64::from(!same);
        }
        let old = view.old_pages.swap(false, Ordering::Relaxed);
        let keep = view.epoch.swap(opens.epoch, Ordering::Relaxed) == opens.epoch && !old;
        view.enter(write);
        if write {
            opens.writers += 1;
        } else {
            opens.readers += 1;
        }
        Ok(keep)
    }

    /// Refuses to open a partition that the table has no more, or in another place.
    fn refuse_old_part(&self, images: &FactsCache, part: &Part) -> Result<()> {
        match self.parts(images, true)?.contains(part) {
            true => Ok(()),
            false => Err(stale().in_file(&self.place.path())),
        }
    }

    /// The partitions that show: those of the time when the first of their files was opened, while one is,
    /// else those of now, or, without need of `fresh` ones, of a moment ago.
    pub fn parts(&self, images: &FactsCache, fresh: bool) -> Result<Arc<[Part]>> {
        let current = self.current.read();
        let mut table = self.table.lock();
        if let Some((read, parts)) = &*table
            && (self.views.part_in_use() || !fresh && read.elapsed() < BELIEVED)
        {
            return Ok(parts.clone());
        }
        let Some(open) = &*current else {
            drop((table, current));
            return Ok(images.examine(&self.place)?.parts.clone().unwrap_or_default());
        };
        let parts = parts_of(&open.disk);
        *table = Some((Instant::now(), parts.clone()));
        Ok(parts)
    }

    /// Partitions of it show: from here on the kernel does not begin to use the host's file by itself.
    pub fn divide(&self) {
        self.sharing.lock().divided = true;
    }

    /// Whether the kernel uses the host's file by itself.
    pub fn lent(&self) -> bool {
        self.sharing.lock().lent
    }

    /// Whether the kernel may write to the image by itself.
    pub fn lent_for_writing(&self) -> bool {
        let current = self.current.read();
        current.as_ref().is_some_and(|open| open.kernel_writes.get().is_some())
    }

    fn become_writable(&self, images: &FactsCache, readers: bool) -> Result<()> {
        let mut current = self.current.write();
        self.drop_disk(images, &mut current);
        let opened = self.open_disk(images, Access::Write).and_then(|opened| {
            match opened.disk.read_only() {
                None => Ok(opened),
                Some(reason) => {
                    let reason = format!("cannot be written: {reason}");
                    let refused = Error::new(ErrorKind::ReadOnly, reason);
                    self.discard(images, opened);
                    Err(refused.in_file(&self.place.path()))
                }
            }
        });
        match opened {
            Ok(opened) => {
                *current = Some(opened);
                Ok(())
            }
            Err(e) => {
                if readers {
                    self.reopen(images, &mut current);
                }
                Err(e)
            }
        }
    }

    /// Opens the image, provided that it still is the same file.
    fn open_disk(&self, images: &FactsCache, access: Access) -> Result<OpenImage> {
        let path = self.place.path();
        let stat = || self.place.stat().map_err(|e| Error::io("open", &e).in_file(&path));
        let scratch = images.scratch(&self.place).filter(|_| access == Access::Write);
        let access = if scratch.is_some() { Access::Read } else { access };
        let image = images.open(&self.place, access)?;
        let meta = stat()?;
        if identity(&meta) != self.identity {
            return Err(stale().in_file(&path));
        }
        let facts = Arc::new(images.facts_of(&self.place, &image));
        let overlaid = scratch.is_some();
        let disk = match scratch {
            Some(dir) => Arc::new(overlay::nonpersistent(image.disk, file::scratch(&dir)?)),
            None => image.disk,
        };
        images.pin(&self.place, Stamp::of(&meta), facts.clone());
        let writable = overlaid || access == Access::Write;
        let (kernel_writes, device_writes) = (OnceLock::new(), AtomicBool::new(false));
        Ok(OpenImage { disk, facts, writable, overlaid, kernel_writes, device_writes })
    }

    fn discard(&self, images: &FactsCache, opened: OpenImage) {
        images.unpin(&self.place, self.identity);
        let damage = opened.disk.damage();
        if !damage.is_empty() {
            *self.damaged.lock() = opened.facts.contents().map(|stamps| (stamps, damage));
        }
        drop(opened);
    }

    /// Drops a disk that has nothing to flush.
    fn drop_disk(&self, images: &FactsCache, current: &mut Option<OpenImage>) {
        if let Some(opened) = current.take() {
            self.discard(images, opened);
        }
    }

    /// Opens the image again for the readers that are left. If that fails, they get errors until it
    /// succeeds.
    fn reopen(&self, images: &FactsCache, current: &mut Option<OpenImage>) {
        match self.open_disk(images, Access::Read) {
            Ok(opened) => *current = Some(opened),
            Err(e) => log::error!("readers lost the image: {e}"),
        }
    }

    /// Takes part in the release of a file. The error is that of the image's last flush.
    pub fn release(&self, images: &FactsCache, view: &View, write: bool) -> Result<()> {
        let released = self.release_counted(images, view, write);
        self.users.fetch_sub(1, Ordering::Relaxed);
        released
    }

    fn release_counted(&self, images: &FactsCache, view: &View, write: bool) -> Result<()> {
        let mut opens = self.opens.lock();
        view.leave(write);
        if self.views.whole.users() == 0 {
            self.sharing.lock().lent = false;
        }
        let count = if write { &mut opens.writers } else { &mut opens.readers };
        *count = count.saturating_sub(1);
        if opens.writers > 0 || (!write && opens.readers > 0) {
            return Ok(());
        }
        opens.given = false;
        let mut current = self.current.write();
        if current.as_ref().is_some_and(OpenImage::holds_changes) {
            self.kept.store(true, Ordering::Relaxed);
            return Ok(());
        }
        let mut closed = Ok(());
        let written = |open: &OpenImage| open.writable && !open.overlaid;
        // Once closed, a displaced image could not be opened again for the readers that are left.
        let keep = opens.readers > 0 && self.displaced().is_some();
        if keep && let Some(open) = &*current {
            closed = open.flush().map_err(|e| e.in_file(&self.place.path()));
        } else if opens.readers == 0 || current.as_ref().is_some_and(written) {
            closed = self.close_disk(images, &mut current, &mut opens);
        }
        if opens.readers > 0 && current.is_none() {
            self.reopen(images, &mut current);
        }
        closed
    }

    fn close_disk(
        &self,
        images: &FactsCache,
        current: &mut Option<OpenImage>,
        opens: &mut Opens,
    ) -> Result<()> {
        let Some(opened) = current.take() else { return Ok(()) };
        self.kept.store(false, Ordering::Relaxed);
        if !self.views.part_in_use() {
            *self.table.lock() = None;
        }
        let closed = opened.close();
        // What the kernel cached of a throw-away layer is nobody's contents.
        opens.cached = if opened.overlaid { None } else { opened.facts.contents() };
        self.discard(images, opened);
        closed.map_err(|e| e.in_file(&self.place.path()))
    }

    /// What became of the image's name, if that stands for the image no more.
    pub fn displaced(&self) -> Option<Displaced> {
        match self.place.stat() {
            Ok(meta) if identity(&meta) == self.identity => None,
            Ok(_) => Some(Displaced::Replaced),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Some(Displaced::Deleted),
            Err(_) => None,
        }
    }

    /// Logs it, once, when an image in use was deleted or replaced.
    pub fn watch_name(&self) {
        if !self.in_use() {
            return;
        }
        let displaced = self.displaced();
        let known = std::mem::replace(&mut *self.logged.lock(), displaced);
        if let Some(how) = displaced.filter(|_| known != displaced) {
            let path = self.place.path();
            log::warn!("{}: {how} while open; whoever has it open keeps it", path.display());
        }
    }

    /// The throw-away layer of the image, if it was written to.
    pub fn written_layer(&self) -> Option<Arc<Disk>> {
        let current = self.current.read();
        current.as_ref().filter(|open| open.holds_changes()).map(|open| open.disk.clone())
    }

    /// Closes the image whoever uses it.
    pub fn shut(&self, images: &FactsCache) -> Result<()> {
        let mut opens = self.opens.lock();
        let mut current = self.current.write();
        self.close_disk(images, &mut current, &mut opens)
    }

    /// Runs `act` on the open disk.
    pub fn with_disk<R>(
        &self,
        images: &FactsCache,
        act: impl FnOnce(&Disk) -> Result<R>,
    ) -> Result<R> {
        let current = self.current.read();
        if let Some(open) = &*current {
            return act(&open.disk).map_err(|e| e.in_file(&self.place.path()));
        }
        drop(current);
        // The readers' disk was lost between two writers.
        let opens = self.opens.lock();
        let mut current = self.current.write();
        if current.is_none() && opens.readers > 0 {
            *current = Some(self.open_disk(images, Access::Read)?);
        }
        match &*current {
            Some(open) => act(&open.disk),
            None => Err(stale().in_file(&self.place.path())),
        }
    }

    /// Runs `act` on the part of the open disk that `view` shows.
    pub fn with_view<R>(
        &self,
        images: &FactsCache,
        view: &View,
        act: impl FnOnce(&Window<&Disk>) -> Result<R>,
    ) -> Result<R> {
        self.with_disk(images, |disk| act(&disk.slice(view.range(disk.size()))?))
    }

    /// Reads into `buf` and returns how much of it the view reached.
    pub fn read(
        &self,
        images: &FactsCache,
        view: &View,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<usize> {
        view.reading();
        self.with_view(images, view, |part| {
            let len = part.size().saturating_sub(offset).min(buf.len() as u64) as usize;
            if len > 0 {
                part.read_at(offset, &mut buf[..len])?;
            }
            Ok(len)
        })
    }

    /// Flushes if tables wait for it. Payload alone the host writes back in its own time; syncing it
    /// every few seconds would only slow its writer down.
    pub fn flush_tables(&self) -> Result<()> {
        let waiting = match &*self.current.read() {
            Some(open) => {
                // The image's identifiers tell of the kernel's writes as soon as of ours.
                open.kernel_writes.get().map_or(Ok(()), |kernel| kernel.note(&open.disk))?;
                open.writable && open.disk.tables_dirty()
            }
            None => false,
        };
        if waiting { self.flush() } else { Ok(()) }
    }

    /// The host file that the open image is, byte for byte and to the last byte, for the kernel to
    /// use by itself; `write` says whether it will write.
    pub fn lend(&self, write: bool) -> Option<Arc<dyn Storage>> {
        let current = self.current.read();
        let open = current.as_ref()?;
        let file = open.disk.flat_file()?;
        if file.len().ok()? != open.disk.size() || !file.host_file().is_some_and(suits) {
            return None;
        }
        let mut sharing = self.sharing.lock();
        if sharing.divided && !sharing.lent {
            return None;
        }
        sharing.lent = true;
        drop(sharing);
        if write && open.kernel_writes.get().is_none() {
            let _ = open.kernel_writes.set(KernelWrites::watch(file.clone())?);
        }
        Some(file)
    }

    /// Gives the host's file to a loop device, if the whole disk lies in it in one piece for good, and nobody
    /// but the caller has the image open. From here on nobody else can open it, and if the caller has it open
    /// for writing, its identifiers tell already that it is written: what the device does is seen by no one.
    pub fn give(&self) -> Result<Option<FixedRun>> {
        let mut opens = self.opens.lock();
        let current = self.current.read();
        let Some(open) = current.as_ref().filter(|open| !open.overlaid) else { return Ok(None) };
        if opens.readers + opens.writers != 1 {
            return Ok(None);
        }
        let Some((file, at)) = open.disk.fixed_run() else { return Ok(None) };
        if file.host_file().is_none() || open.writable && !file.writable() {
            return Ok(None);
        }
        let sector_size = open.disk.geometry().logical_sector;
        let len = open.disk.size();
        if !(at | len).is_multiple_of(u64::from(sector_size)) {
            return Ok(None);
        }
        if open.writable {
            open.device_writes.store(true, Ordering::Relaxed);
            open.flush().map_err(|e| e.in_file(&self.place.path()))?;
        }
        opens.given = true;
        Ok(Some(FixedRun { file, at, len, sector_size }))
    }

    /// Flushes what was written, if anything was.
    pub fn flush(&self) -> Result<()> {
        match &*self.current.read() {
            Some(open) if open.writable => {
                let flushed = open.flush().map_err(|e| e.in_file(&self.place.path()));
                self.log_lack_of_space(&open.disk, &flushed);
                flushed
            }
            _ => Ok(()),
        }
    }

    /// Logs it, once, when the host is full, and when it is so no more.
    fn log_lack_of_space(&self, disk: &Disk, flushed: &Result<()>) {
        match flushed {
            Err(e) if e.kind() == ErrorKind::NoSpace && disk.needs_flush() => {
                if !self.full.swap(true, Ordering::Relaxed) {
                    log::error!("{e}; tables stay in memory until there is room");
                }
            }
            Err(_) => {}
            Ok(()) => {
                if self.full.swap(false, Ordering::Relaxed) {
                    log::warn!("{}: flushed, there is room again", self.place.path().display());
                }
            }
        }
    }

    /// Whether anybody has the file open, or is opening or closing it. Never waits.
    pub fn in_use(&self) -> bool {
        self.users.load(Ordering::Relaxed) > 0
    }

    /// Whether closing the image would lose anything, or disturb anybody. Never waits.
    pub fn needed(&self) -> bool {
        self.in_use() || self.kept.load(Ordering::Relaxed)
    }

    /// What is known of the image while it is open.
    pub fn known(&self) -> Option<Arc<Facts>> {
        self.current.read().as_ref().map(|open| open.facts.clone())
    }

    /// Parts of the disk known to be lost, ascending: what opening told, and what readers have run into
    /// since the image last changed.
    pub fn damage(&self, facts: &Facts) -> Vec<DiskRange> {
        let mut ranges = facts.damage.clone();
        if let Some(open) = &*self.current.read() {
            ranges.extend(open.disk.damage());
        }
        if let Some((stamps, damage)) = &*self.damaged.lock()
            && facts.contents().as_ref() == Some(stamps)
        {
            ranges.extend(damage.iter().cloned());
        }
        merge(&mut ranges);
        ranges
    }

    /// Who uses the image, and what its cache did.
    pub fn usage(&self) -> Usage {
        let opens = self.opens.lock();
        let current = self.current.read();
        let disk = current.as_ref().map(|open| &open.disk);
        let facts = current.as_ref().map(|open| &open.facts);
        Usage {
            readers: opens.readers,
            writers: opens.writers,
            sector_size: facts.map_or(0, |facts| facts.info.logical_sector_size),
            unflushed: disk.is_some_and(|disk| disk.needs_flush()),
            throw_away: match &*current {
                Some(open) if open.holds_changes() => open.disk.allocated().ok(),
                _ => None,
            },
            cache: disk.map(|disk| disk.cache_stats()).unwrap_or_default(),
            displaced: self.displaced(),
        }
    }

    /// What is known of the image, and its file's metadata.
    pub fn look(&self, images: &FactsCache) -> Result<(Arc<Facts>, Metadata)> {
        let open = self.known();
        let meta = self.place.stat().ok().filter(|meta| identity(meta) == self.identity);
        match (open, meta) {
            (Some(facts), Some(meta)) => {
                *self.last.lock() = Some(meta.clone());
                Ok((facts, meta))
            }
            // Deleted or replaced, but still open: it stays what it was.
            (Some(facts), None) => match &*self.last.lock() {
                Some(meta) => Ok((facts, meta.clone())),
                None => Err(stale()),
            },
            (None, Some(meta)) => {
                let facts = images.examine(&self.place).map_err(|e| {
                    log::warn!("{e}");
                    stale()
                })?;
                *self.last.lock() = Some(meta.clone());
                Ok((facts, meta))
            }
            (None, None) => Err(stale()),
        }
    }
}

/// The name now stands for something else; the kernel looks it up again.
pub fn stale() -> Error {
    Error::io("the image was replaced", &io::Error::from_raw_os_error(libc::ESTALE))
}
