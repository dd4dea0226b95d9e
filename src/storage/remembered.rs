//! What tells a file's contents from other contents ([`Stamp`]), and what was read of files, kept until they
//! change ([`Remembered`]).

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

use super::{FileIdentity, Storage};

/// File times move in steps of up to ten milliseconds: a change shortly after a stamp was taken may
/// leave the same stamp.
pub const CLOCK_STEP: Duration = Duration::from_millis(50);

/// The steps of file systems that keep whole seconds, or even ones, and a little more.
const COARSE_STEP: Duration = Duration::from_millis(2500);

/// How long anything is believed that may have changed without a sign. The kernel believes names and
/// attributes for as long.
pub const BELIEVED: Duration = Duration::from_secs(1);

/// What tells a file's contents from other contents without reading them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Which file.
    pub identity: FileIdentity,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Default for Stamp {
    fn default() -> Self {
        let identity = FileIdentity { device: 0, inode: 0, part: 0 };
        Self { identity, size: 0, mtime: (0, 0), ctime: (0, 0) }
    }
}

impl Stamp {
    /// The stamp in a file's metadata.
    pub fn of(meta: &Metadata) -> Self {
        Self {
            identity: identity(meta),
            size: meta.size(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            ctime: (meta.ctime(), meta.ctime_nsec()),
        }
    }

    /// The stamp of an open file, where the host tells when it was changed.
    pub fn of_file(file: &dyn Storage) -> Option<Self> {
        let time = |time: Option<SystemTime>| {
            let since = time?.duration_since(UNIX_EPOCH).ok()?;
            Some((i64::try_from(since.as_secs()).ok()?, i64::from(since.subsec_nanos())))
        };
        let identity = file.identity().ok()?;
        let (mtime, ctime) = (time(file.modified())?, time(file.changed())?);
        Some(Self { identity, size: file.len().ok()?, mtime, ctime })
    }

    /// Whether the host keeps whole seconds only, or even ones, as some file systems and network
    /// protocols do: a later change need not show in such a stamp.
    pub fn coarse(&self) -> bool {
        // Programs can set the other time to whole seconds.
        self.ctime.1 == 0
    }

    /// Whether the last change is old enough for every later one to show in the stamp. With coarse times
    /// never: how old a change is, only the clock that told its time knows, and that may be another
    /// machine's.
    pub fn settled(&self) -> bool {
        !self.coarse() && self.older_than(CLOCK_STEP)
    }

    /// How long what was read just now may be believed while the stamp stays this one.
    pub fn life(&self) -> Duration {
        match self.settled() {
            true => Duration::MAX,
            false if self.coarse() && self.older_than(COARSE_STEP) => BELIEVED,
            false => Duration::ZERO,
        }
    }

    fn older_than(&self, step: Duration) -> bool {
        let (seconds, nanos) = self.ctime.max(self.mtime);
        let Ok(seconds) = u64::try_from(seconds) else { return true };
        let changed = UNIX_EPOCH + Duration::new(seconds, nanos as u32);
        SystemTime::now().duration_since(changed).is_ok_and(|age| age > step)
    }
}

/// Device and inode in a file's metadata.
pub fn identity(meta: &Metadata) -> FileIdentity {
    FileIdentity { device: meta.dev(), inode: meta.ino(), part: 0 }
}

/// Something about files, by file.
#[derive(Debug)]
pub struct Remembered<T> {
    known: Mutex<All<T>>,
    most: usize,
    weight: fn(&T) -> usize,
}

#[derive(Debug)]
struct All<T> {
    by_file: HashMap<FileIdentity, Known<T>>,
    weight: usize,
}

#[derive(Debug)]
struct Known<T> {
    stamp: Stamp,
    read: Instant,
    life: Duration,
    what: T,
}

impl<T: Clone> Remembered<T> {
    /// Nothing yet; of `most` files at most.
    pub fn new(most: usize) -> Self {
        Self::weighing(most, |_| 1)
    }

    /// Nothing yet; as much as weighs `most` at most.
    pub fn weighing(most: usize, weight: fn(&T) -> usize) -> Self {
        Self { known: Mutex::new(All { by_file: HashMap::new(), weight: 0 }), most, weight }
    }

    /// What is known of the file that has this stamp now; else what `read` answers.
    pub fn get(&self, stamp: Stamp, read: impl FnOnce() -> T) -> T {
        let Ok(what) = self.try_get(Some(stamp), || Ok::<_, Infallible>(read()));
        what
    }

    /// The same of a file that may have no stamp, and of what may fail, which is not remembered.
    pub fn try_get<E>(
        &self,
        stamp: Option<Stamp>,
        read: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let Some(stamp) = stamp else { return read() };
        if let Some(known) = self.known.lock().by_file.get(&stamp.identity)
            && known.stamp == stamp
            && known.read.elapsed() < known.life
        {
            return Ok(known.what.clone());
        }
        let (life, now) = (stamp.life(), Instant::now());
        let what = read()?;
        if !life.is_zero() {
            let mut all = self.known.lock();
            let weight = (self.weight)(&what);
            if all.weight + weight > self.most {
                *all = All { by_file: HashMap::new(), weight: 0 };
            }
            all.weight += weight;
            let known = Known { stamp, read: now, life, what: what.clone() };
            if let Some(old) = all.by_file.insert(stamp.identity, known) {
                all.weight -= (self.weight)(&old.what);
            }
        }
        Ok(what)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn files_are_read_again_only_when_they_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, "one").unwrap();
        let remembered = Remembered::new(8);
        let reads = std::cell::Cell::new(0);
        let ask = || {
            let stamp = Stamp::of(&fs::metadata(&path).unwrap());
            remembered.get(stamp, || {
                reads.set(reads.get() + 1);
                fs::read_to_string(&path).unwrap()
            })
        };
        assert_eq!(ask(), "one");
        while !Stamp::of(&fs::metadata(&path).unwrap()).settled() {
            std::thread::yield_now();
        }
        ask();
        let settled = reads.get();
        ask();
        assert_eq!(reads.get(), settled);
        fs::write(&path, "two").unwrap();
        let old = SystemTime::UNIX_EPOCH;
        fs::File::options().write(true).open(&path).unwrap().set_modified(old).unwrap();
        assert_eq!(ask(), "two");
    }
}
