//! A format so simple that only the harness can be wrong: header, table, blocks of 4 KiB.
//!
//! ```text
//! 0     "TOY1", u64 size
//! 512   u32 per block: 0, or where the block is, in units of 4 KiB
//! ...   blocks
//! ```
//!
//! Written in the safe order: payload, sync, table, sync, reuse of what was freed. A [`Flaw`] breaks
//! one rule; the suites must notice each.

use std::path::Path;
use std::sync::Arc;

use flatdisk::disk::map::{
    BlockMap, Contents, DiskRange, ExtentList, Geometry, Piece, Source, WritePlan,
};
use flatdisk::disk::tables::{CacheBudget, TableCache};
use flatdisk::disk::{Disk, sync_file};
use flatdisk::error::{Error, Result};
use flatdisk::storage::memory::{MemoryFile, MemoryHost};
use flatdisk::storage::{Access, Host, Storage};
use parking_lot::Mutex;
use smallvec::SmallVec;

use super::images::Kind;

/// What a toy driver does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    None,
    /// Tables follow the payload without a sync between.
    NoPayloadSync,
    /// Flush returns before the tables are durable.
    NoTableSync,
    /// Tables go before the payload; both are synced afterwards.
    TablesFirst,
    /// Space is reused while the durable table still points at it.
    EarlyReuse,
    /// Recycled space is said to hold zeroes.
    StaleCalledZero,
    /// A flush without changed tables does nothing.
    PayloadFlushSkipped,
    /// What is written to the tables is chosen after the payload was synced.
    LateSnapshot,
    /// A failed sync counts as done.
    SyncErrorIgnored,
    /// Table pages whose write failed are forgotten.
    PagesForgotten,
}

const UNIT: u64 = 4096;
const TABLE: u64 = 512;
const PAGE: u64 = 512;
const PATH: &str = "/t/disk.toy";

/// The toy as a kind of image.
#[derive(Debug, Clone, Copy)]
pub struct Toy {
    pub flaw: Flaw,
}

/// An odd size, so that the table ends inside a sector and the last block past the disk.
const SIZE: u64 = 601 * UNIT + 512;
const BLOCKS: u64 = SIZE.div_ceil(UNIT);
const FIRST: u64 = (TABLE + BLOCKS * 4).div_ceil(UNIT);

impl Kind for Toy {
    fn name(&self) -> String {
        format!("toy with flaw {:?}", self.flaw)
    }

    fn create(&self, host: &Arc<MemoryHost>) -> Result<()> {
        let mut bytes = vec![0; (FIRST * UNIT) as usize];
        bytes[..4].copy_from_slice(b"TOY1");
        bytes[4..12].copy_from_slice(&SIZE.to_le_bytes());
        host.insert(MemoryFile::new(PATH, &bytes));
        Ok(())
    }

    fn open(&self, host: &Arc<dyn Host>, access: Access) -> Result<Arc<Disk>> {
        let file = host.open(Path::new(PATH), access)?;
        let read_only = (access != Access::Write).then(|| "opened to read".to_owned());
        let map = ToyMap::open(file, self.flaw)?;
        Ok(Arc::new(Disk::new(Box::new(map), None, read_only)))
    }

    fn errors(&self, host: &Arc<dyn Host>) -> Result<Vec<String>> {
        let file = host.open(Path::new(PATH), Access::Read)?;
        let mut used = entries(&*file)?;
        used.retain(|unit| *unit != 0);
        used.sort_unstable();
        let mut errors = Vec::new();
        for pair in used.windows(2).filter(|pair| pair[0] == pair[1]) {
            errors.push(format!("two blocks at unit {}", pair[0]));
        }
        let end = file.len().map_err(|e| Error::io("stat", &e))? / UNIT;
        for unit in used.iter().filter(|unit| u64::from(**unit) >= end) {
            errors.push(format!("a block at unit {unit} past the end"));
        }
        Ok(errors)
    }
}

fn entries(file: &dyn Storage) -> Result<Vec<u32>> {
    let mut table = vec![0; (BLOCKS * 4) as usize];
    file.read_at(TABLE, &mut table).map_err(|e| Error::io("read", &e))?;
    Ok(table.chunks(4).map(|entry| u32::from_le_bytes(entry.try_into().unwrap())).collect())
}

#[derive(Debug, Default)]
struct Space {
    free: Vec<u32>,
    /// Free once the table that says so is durable.
    freed: Vec<u32>,
    /// First unit past the file's end.
    end: u32,
    /// Units from here to `end` are unused and hold zeroes.
    fresh: u32,
}

struct ToyMap {
    geometry: Geometry,
    files: [Arc<dyn Storage>; 1],
    cache: TableCache,
    space: Mutex<Space>,
    flaw: Flaw,
}

impl ToyMap {
    fn open(file: Arc<dyn Storage>, flaw: Flaw) -> Result<Self> {
        let used = entries(&*file)?;
        let len = file.len().map_err(|e| Error::io("stat", &e))?;
        let end = len.div_ceil(UNIT) as u32;
        // A unit that a crash left half in the file is neither whole nor known to be zeroes.
        let whole = (len / UNIT) as u32;
        let free = (FIRST as u32..whole).filter(|unit| !used.contains(unit)).collect();
        let geometry =
            Geometry { size: SIZE, logical_sector: 512, physical_sector: 512, block_size: UNIT };
        Ok(Self {
            geometry,
            files: [file],
            cache: TableCache::new(PAGE as usize, &CacheBudget::new(1 << 20)),
            space: Mutex::new(Space { free, freed: Vec::new(), end, fresh: end }),
            flaw,
        })
    }

    fn file(&self) -> &dyn Storage {
        &*self.files[0]
    }

    fn load(&self, page: u64) -> impl FnMut(&mut [u8]) -> Result<()> + '_ {
        move |buf| {
            let at = TABLE + page * PAGE;
            self.file().read_at(at, buf).map_err(|e| Error::io("read", &e).at(at))
        }
    }

    fn entry(&self, block: u64) -> Result<u32> {
        let (page, at) = (block * 4 / PAGE, (block * 4 % PAGE) as usize);
        let read = |p: &[u8]| u32::from_le_bytes(p[at..at + 4].try_into().unwrap());
        self.cache.read(page, self.load(page), read)
    }

    fn set_entry(&self, block: u64, unit: u32) -> Result<()> {
        let (page, at) = (block * 4 / PAGE, (block * 4 % PAGE) as usize);
        let write = |p: &mut [u8]| p[at..at + 4].copy_from_slice(&unit.to_le_bytes());
        self.cache.update(page, self.load(page), write)
    }

    fn allocate(&self) -> Result<(u32, Contents)> {
        let mut space = self.space.lock();
        if let Some(unit) = space.free.pop() {
            let wrong = self.flaw == Flaw::StaleCalledZero;
            return Ok((unit, if wrong { Contents::Zeroes } else { Contents::Stale }));
        }
        if space.fresh == space.end {
            let end = space.end + 8;
            let len = u64::from(end) * UNIT;
            self.file().set_len(len).map_err(|e| Error::io("extend", &e))?;
            space.end = end;
        }
        space.fresh += 1;
        Ok((space.fresh - 1, Contents::Zeroes))
    }

    fn sync(&self) -> Result<()> {
        match sync_file(self.file()) {
            Err(_) if self.flaw == Flaw::SyncErrorIgnored => Ok(()),
            result => result,
        }
    }

    fn write_pages(&self, pages: &[(u64, Box<[u8]>)]) -> Result<()> {
        for (page, bytes) in pages {
            let at = TABLE + page * PAGE;
            self.file().write_at(at, bytes).map_err(|e| Error::io("write", &e).at(at))?;
        }
        Ok(())
    }
}

/// Units that are free again when this is dropped, by block.
struct Reserved<'a> {
    space: &'a Mutex<Space>,
    units: Vec<(u64, u32)>,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.space.lock().free.extend(self.units.drain(..).map(|(_, unit)| unit));
    }
}

impl BlockMap for ToyMap {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn files(&self) -> &[Arc<dyn Storage>] {
        &self.files
    }

    fn lookup(&self, want: DiskRange, out: &mut ExtentList) -> Result<()> {
        let mut pos = want.start;
        while pos < want.end {
            let end = want.end.min((pos / UNIT + 1) * UNIT);
            let source = match self.entry(pos / UNIT)? {
                0 => Source::Zero,
                unit => Source::File { file: 0, at: u64::from(unit) * UNIT + pos % UNIT },
            };
            out.push(pos, end - pos, source);
            pos = end;
        }
        Ok(())
    }

    fn prepare_write(&self, want: DiskRange) -> Result<WritePlan<'_>> {
        let mut pieces: SmallVec<[Piece; 4]> = SmallVec::new();
        let mut reserved = Reserved { space: &self.space, units: Vec::new() };
        for block in (want.start / UNIT..want.end.div_ceil(UNIT)).take(16) {
            let (unit, contents) = match self.allocate() {
                Ok(found) => found,
                Err(_) if !reserved.units.is_empty() => break,
                Err(e) => return Err(e),
            };
            reserved.units.push((block, unit));
            let at = u64::from(unit) * UNIT;
            pieces.push(Piece { start: block * UNIT, len: UNIT, file: 0, at, contents });
        }
        Ok(WritePlan::new(pieces, move || {
            let units = std::mem::take(&mut reserved.units);
            let _space = self.space.lock();
            units.into_iter().try_for_each(|(block, unit)| self.set_entry(block, unit))
        }))
    }

    fn unmap(&self, want: DiskRange, rest: &mut Vec<DiskRange>) -> Result<()> {
        let whole = want.start.div_ceil(UNIT)..want.end / UNIT;
        if whole.start >= whole.end {
            rest.push(want);
            return Ok(());
        }
        for part in [want.start..whole.start * UNIT, whole.end * UNIT..want.end] {
            if part.start < part.end {
                rest.push(part);
            }
        }
        let mut space = self.space.lock();
        for block in whole {
            let unit = self.entry(block)?;
            if unit != 0 {
                self.set_entry(block, 0)?;
                match self.flaw {
                    Flaw::EarlyReuse => space.free.push(unit),
                    _ => space.freed.push(unit),
                }
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        if self.flaw == Flaw::LateSnapshot {
            self.sync()?;
        }
        let (pages, freed) = {
            let mut space = self.space.lock();
            (self.cache.snapshot(), std::mem::take(&mut space.freed))
        };
        if pages.is_empty() {
            return match self.flaw {
                Flaw::PayloadFlushSkipped => Ok(()),
                _ => self.sync(),
            };
        }
        let written = match self.flaw {
            Flaw::NoPayloadSync | Flaw::LateSnapshot => {
                self.write_pages(&pages).and_then(|()| self.sync())
            }
            Flaw::NoTableSync => self.sync().and_then(|()| self.write_pages(&pages)),
            Flaw::TablesFirst => {
                self.write_pages(&pages).and_then(|()| self.sync()).and_then(|()| self.sync())
            }
            _ => self.sync().and_then(|()| self.write_pages(&pages)).and_then(|()| self.sync()),
        };
        if written.is_err() {
            if self.flaw != Flaw::PagesForgotten {
                self.cache.restore(&pages);
            }
            self.space.lock().freed.extend(freed);
            return written;
        }
        self.cache.retire(&pages);
        self.space.lock().free.extend(freed);
        Ok(())
    }

    fn close(&self) -> Result<()> {
        Ok(())
    }
}
