//! FAT12, FAT16 and FAT32, by the crate `fatfs`, which is given a volume that cannot be written.

use std::io::{self, ErrorKind as IoKind, Read};
use std::sync::Arc;

use fatfs::{DateTime, Dir, FsOptions};

use super::throttle::{Budget, METADATA, Throttled};
use super::{Entry, FileKind, FileSystem, MAX_ENTRIES, Sink, names, not_found, shown};
use crate::disk::Disk;
use crate::disk::window::Window;
use crate::error::{Error, Result};

/// What is read at once.
const CHUNK: usize = 1 << 20;

pub(super) struct Volume {
    fs: fatfs::FileSystem<Throttled>,
    budget: Budget,
    warnings: Vec<String>,
}

fn failed(path: &[u8], e: &io::Error) -> Error {
    match e.kind() {
        IoKind::NotFound => not_found(path),
        _ => Error::corrupt(format!("{}: {e}", shown(path))),
    }
}

impl Volume {
    pub fn open(volume: Window<Arc<Disk>>) -> Result<Self> {
        let budget = Budget::default();
        let throttled = Throttled::new(volume, &budget);
        let fs = fatfs::FileSystem::new(throttled, FsOptions::new())
            .map_err(|e| Error::corrupt(format!("the file system is damaged: {e}")))?;
        let mut warnings = Vec::new();
        if fs.read_status_flags().is_ok_and(|flags| flags.dirty()) {
            warnings.push("it was not cleanly unmounted".to_owned());
        }
        Ok(Self { fs, budget, warnings })
    }

    fn directory(&self, path: &[u8]) -> Result<Dir<'_, Throttled>> {
        let root = self.fs.root_dir();
        match joined(path)? {
            path if path.is_empty() => Ok(root),
            name => root.open_dir(&name).map_err(|e| failed(path, &e)),
        }
    }
}

/// A path as the crate wants it.
fn joined(path: &[u8]) -> Result<String> {
    String::from_utf8(names(path).join(&b'/')).map_err(|_| not_found(path))
}

/// Days since 1970, of the Gregorian calendar.
fn days(year: i64, month: i64, day: i64) -> i64 {
    // Years begin in March, so that the day that comes and goes is the last one.
    let year = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    365 * year + year / 4 - year / 100 + year / 400 + day_of_year - 719_468
}

/// Seconds since 1970; FAT knows no time zone, so this is as in UTC.
fn seconds(time: DateTime) -> i64 {
    let (date, time) = (time.date, time.time);
    let days = days(date.year.into(), date.month.into(), date.day.into());
    let (hour, min, sec) = (i64::from(time.hour), i64::from(time.min), i64::from(time.sec));
    days * 86_400 + hour * 3600 + min * 60 + sec
}

impl FileSystem for Volume {
    fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn stat(&mut self, path: &[u8]) -> Result<Entry> {
        self.budget.renew(METADATA);
        let all = names(path);
        let Some((last, parents)) = all.split_last() else {
            let kind = FileKind::Directory;
            return Ok(Entry { name: Vec::new(), kind, size: 0, modified: None, mode: None });
        };
        let entries = self.list(&parents.join(&b'/'))?;
        // Upper and lower case are one.
        let same = |entry: &&Entry| shown(&entry.name).to_lowercase() == shown(last).to_lowercase();
        entries.iter().find(same).cloned().ok_or_else(|| not_found(path))
    }

    fn list(&mut self, path: &[u8]) -> Result<Vec<Entry>> {
        self.budget.renew(METADATA);
        let mut found = Vec::new();
        for entry in self.directory(path)?.iter() {
            let entry = entry.map_err(|e| failed(path, &e))?;
            if found.len() >= MAX_ENTRIES {
                return Err(Error::unsupported("a directory of more than a million names"));
            }
            found.push(Entry {
                name: entry.file_name().into_bytes(),
                kind: if entry.is_dir() { FileKind::Directory } else { FileKind::File },
                size: entry.len(),
                modified: Some(seconds(entry.modified())),
                mode: None,
            });
        }
        Ok(found)
    }

    fn read(&mut self, path: &[u8], _follow: bool, sink: &mut dyn Sink) -> Result<()> {
        let entry = self.stat(path)?;
        if entry.kind != FileKind::File {
            return Err(Error::invalid(format!("{}: this is a directory", shown(path))));
        }
        let mut file =
            self.fs.root_dir().open_file(&joined(path)?).map_err(|e| failed(path, &e))?;
        let mut buf = vec![0; CHUNK.min(entry.size as usize)];
        let mut left = entry.size;
        while left > 0 {
            self.budget.renew(METADATA);
            let step = left.min(CHUNK as u64) as usize;
            let read = file.read(&mut buf[..step]).map_err(|e| failed(path, &e))?;
            if read == 0 {
                let what = format!("{}: its clusters end before its length", shown(path));
                return Err(Error::corrupt(what));
            }
            sink.data(&buf[..read])?;
            left -= read as u64;
        }
        Ok(())
    }

    fn target(&mut self, path: &[u8]) -> Result<Vec<u8>> {
        Err(Error::invalid(format!("{}: FAT has no links", shown(path))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_counted_as_the_calendar_does() {
        assert_eq!(days(1970, 1, 1), 0);
        assert_eq!(days(2000, 2, 29), 11_016);
        assert_eq!(days(2000, 3, 1), 11_017);
        assert_eq!(days(2107, 12, 31), 50_402);
    }
}
