//! What was read of files, kept until they change: [`Remembered`].

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::source::Stamp;
use crate::storage::FileIdentity;

/// Something about files, by file.
#[derive(Debug)]
pub struct Remembered<T> {
    known: Mutex<HashMap<FileIdentity, Known<T>>>,
    most: usize,
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
        Self { known: Mutex::default(), most }
    }

    /// What is known of the file that has this stamp now; else what `read` answers.
    pub fn get(&self, stamp: Stamp, read: impl FnOnce() -> T) -> T {
        if let Some(known) = self.known.lock().get(&stamp.identity)
            && known.stamp == stamp
            && known.read.elapsed() < known.life
        {
            return known.what.clone();
        }
        let (life, now) = (stamp.life(), Instant::now());
        let what = read();
        if !life.is_zero() {
            let mut known = self.known.lock();
            if known.len() >= self.most {
                known.clear();
            }
            known.insert(stamp.identity, Known { stamp, read: now, life, what: what.clone() });
        }
        what
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::SystemTime;

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
