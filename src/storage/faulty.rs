//! Storage that fails on demand: a [`FaultyHost`] puts [`Faults`] before every call to another host.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use super::{Access, Entry, FileIdentity, Host, Storage};
use crate::error::{Error, Result};

/// Bytes of a page of the host.
const PAGE: u64 = 4096;

/// The calls that can fail, of files and of hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// [`Storage::read_at`].
    Read,
    /// [`Storage::write_at`].
    Write,
    /// [`Storage::set_len`].
    SetLen,
    /// [`Storage::punch_hole`].
    Punch,
    /// [`Storage::allocate`].
    Allocate,
    /// [`Storage::len`], [`Storage::allocated`], [`Storage::next_data`], [`Storage::identity`].
    Look,
    /// [`Storage::sync`].
    Sync,
    /// [`Host::open`] and [`Host::open_beneath`].
    Open,
    /// [`Host::create`].
    Create,
    /// [`Host::replace`] and [`Host::rename`].
    Replace,
    /// [`Host::remove`].
    Remove,
    /// [`Host::sync_dir`].
    SyncDir,
}

impl Call {
    /// Every call that changes something or makes it durable.
    pub const CHANGES: [Self; 9] = [
        Self::Write,
        Self::SetLen,
        Self::Punch,
        Self::Allocate,
        Self::Sync,
        Self::Create,
        Self::Replace,
        Self::Remove,
        Self::SyncDir,
    ];
    const COUNT: usize = Self::SyncDir as usize + 1;
}

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It does nothing and fails with this errno.
    Errno(i32),
    /// A write puts its first half, in whole sectors, and fails; other calls do nothing.
    Half(i32),
    /// It waits until [`Faults::release`], and works.
    Hold,
}

#[derive(Debug)]
struct Rule {
    calls: Vec<Call>,
    /// Calls that still pass before the fault.
    skip: u64,
    fault: Fault,
    lasting: bool,
}

#[derive(Debug, Default)]
struct State {
    counts: [u64; Call::COUNT],
    rules: Vec<Rule>,
    fired: [u64; Call::COUNT],
    /// Bytes that files may still grow by.
    room: Option<u64>,
    /// Bytes that a file may have.
    limit: Option<u64>,
    /// Bytes that holes of files may still take when they are filled.
    space: Option<u64>,
    /// Pages of holes that were filled or reserved.
    filled: BTreeMap<PathBuf, BTreeSet<u64>>,
    /// Calls that wait.
    held: usize,
    /// How often held calls were released.
    releases: u64,
}

/// Which calls fail. Shared by a host and all its files.
#[derive(Debug, Default)]
pub struct Faults {
    state: Mutex<State>,
    changed: Condvar,
}

impl Faults {
    /// Lets `skip` more of these calls pass, then one has `fault`, or all from there on if `lasting`.
    pub fn inject(&self, calls: &[Call], skip: u64, fault: Fault, lasting: bool) {
        self.state.lock().rules.push(Rule { calls: calls.to_vec(), skip, fault, lasting });
    }

    /// Takes all faults back and makes room.
    pub fn clear(&self) {
        let mut state = self.state.lock();
        state.rules.clear();
        (state.room, state.limit, state.space) = (None, None, None);
    }

    /// Waits until a call is held.
    pub fn wait_until_held(&self) {
        self.changed.wait_while(&mut self.state.lock(), |state| state.held == 0);
    }

    /// Lets the calls go on that are held.
    pub fn release(&self) {
        self.state.lock().releases += 1;
        self.changed.notify_all();
    }

    /// Limits by how many bytes files may grow; then `ENOSPC`, after what still fits was written.
    pub fn set_room(&self, bytes: u64) {
        self.state.lock().room = Some(bytes);
    }

    /// Limits how many bytes of holes may be filled or reserved, in pages, as on a host whose files are
    /// sparse: then `ENOSPC`, with nothing written. Holes that are punched make room again.
    pub fn set_space(&self, bytes: u64) {
        self.state.lock().space = Some(bytes);
    }

    /// Takes space for what is a hole in a range of `file`; whether there was enough.
    fn fill(&self, file: &dyn Storage, range: Range<u64>) -> io::Result<bool> {
        let mut state = self.state.lock();
        let Some(space) = state.space else { return Ok(true) };
        let pages = range.start / PAGE..range.end.div_ceil(PAGE);
        let filled = state.filled.entry(file.path().to_owned()).or_default();
        let mut holes: BTreeSet<u64> =
            pages.clone().filter(|page| !filled.contains(page)).collect();
        let mut at = pages.start * PAGE;
        while let Some(data) = file.next_data(at)?.filter(|data| data.start < pages.end * PAGE) {
            let stored = data.start / PAGE..data.end.div_ceil(PAGE);
            holes.retain(|page| !stored.contains(page));
            at = data.end;
        }
        let needed = holes.len() as u64 * PAGE;
        if needed > space {
            return Ok(false);
        }
        filled.extend(holes);
        state.space = Some(space - needed);
        Ok(true)
    }

    /// Gives back what a range of `file` takes, as far as it is whole pages.
    fn empty(&self, file: &dyn Storage, range: Range<u64>) -> io::Result<()> {
        let mut state = self.state.lock();
        let Some(space) = state.space else { return Ok(()) };
        let pages = range.start.div_ceil(PAGE)..range.end.min(file.len()?) / PAGE;
        let filled = state.filled.entry(file.path().to_owned()).or_default();
        let mut taken: BTreeSet<u64> = BTreeSet::new();
        let mut at = pages.start * PAGE;
        while let Some(data) = file.next_data(at)?.filter(|data| data.start < pages.end * PAGE) {
            taken.extend((data.start / PAGE..data.end / PAGE).filter(|page| pages.contains(page)));
            at = data.end;
        }
        taken.extend(filled.iter().filter(|page| pages.contains(page)));
        filled.retain(|page| !pages.contains(page));
        state.space = Some(space + taken.len() as u64 * PAGE);
        Ok(())
    }

    /// Limits how long a file may become, as a limit of the process does: `ENOSPC`, after what still fits
    /// was written.
    pub fn set_limit(&self, bytes: u64) {
        self.state.lock().limit = Some(bytes);
    }

    /// How many of these calls there were.
    pub fn count(&self, calls: &[Call]) -> u64 {
        let state = self.state.lock();
        calls.iter().map(|&call| state.counts[call as usize]).sum()
    }

    /// How many calls have failed.
    pub fn fired(&self) -> u64 {
        self.state.lock().fired.iter().sum()
    }

    /// How many of these calls have failed.
    pub fn fired_in(&self, call: Call) -> u64 {
        self.state.lock().fired[call as usize]
    }

    /// Takes note that a call failed.
    fn note(&self, call: Call) {
        self.state.lock().fired[call as usize] += 1;
    }

    /// Counts a call and tells its fault. Calls are held here.
    fn next(&self, call: Call) -> Option<Fault> {
        let mut state = self.state.lock();
        state.counts[call as usize] += 1;
        let rule = state.rules.iter_mut().position(|rule| {
            let meant = rule.calls.contains(&call);
            let due = meant && rule.skip == 0;
            if meant && !due {
                rule.skip -= 1;
            }
            due
        })?;
        let fault = state.rules[rule].fault;
        if !state.rules[rule].lasting {
            state.rules.remove(rule);
        }
        if fault == Fault::Hold {
            let releases = state.releases;
            state.held += 1;
            self.changed.notify_all();
            self.changed.wait_while(&mut state, |state| state.releases == releases);
            state.held -= 1;
            return None;
        }
        state.fired[call as usize] += 1;
        Some(fault)
    }

    fn pass(&self, call: Call) -> io::Result<()> {
        match self.next(call) {
            Some(Fault::Errno(errno) | Fault::Half(errno)) => {
                Err(io::Error::from_raw_os_error(errno))
            }
            _ => Ok(()),
        }
    }

    fn pass_host(&self, call: Call, path: &Path) -> Result<()> {
        let what = format!("{call:?}").to_lowercase();
        self.pass(call).map_err(|e| Error::io(what, &e).in_file(path))
    }

    /// Takes room for growth from `len` to `end`; how far the file may grow. Who does not grow at all
    /// without all of it takes none then.
    fn grow(&self, call: Call, len: u64, end: u64) -> u64 {
        let mut state = self.state.lock();
        let wanted = end.saturating_sub(len);
        let left = state.limit.map_or(u64::MAX, |limit| limit.saturating_sub(len));
        let granted = wanted.min(left).min(state.room.unwrap_or(u64::MAX));
        if let Some(room) = state.room.as_mut()
            && (call == Call::Write || granted == wanted)
        {
            *room -= granted;
        }
        if granted < wanted {
            state.fired[call as usize] += 1;
        }
        end - (wanted - granted)
    }
}

/// A host whose calls can be made to fail.
#[derive(Debug)]
pub struct FaultyHost {
    inner: Arc<dyn Host>,
    faults: Arc<Faults>,
}

impl FaultyHost {
    /// Puts `faults` before `inner`.
    pub fn over(inner: Arc<dyn Host>, faults: &Arc<Faults>) -> Arc<Self> {
        Arc::new(Self { inner, faults: faults.clone() })
    }

    fn wrap(&self, inner: Arc<dyn Storage>) -> Arc<dyn Storage> {
        Arc::new(FaultyFile { inner, faults: self.faults.clone() })
    }
}

impl Host for FaultyHost {
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        self.faults.pass_host(Call::Open, path)?;
        Ok(self.wrap(self.inner.open(path, access)?))
    }

    fn open_beneath(&self, root: &Path, name: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        self.faults.pass_host(Call::Open, name)?;
        Ok(self.wrap(self.inner.open_beneath(root, name, access)?))
    }

    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        self.faults.pass_host(Call::Create, path)?;
        Ok(self.wrap(self.inner.create(path)?))
    }

    fn replace(&self, path: &Path, contents: &[u8]) -> Result<()> {
        self.faults.pass_host(Call::Replace, path)?;
        self.inner.replace(path, contents)
    }

    fn rename(&self, from: &Path, to: &Path, replace: bool) -> Result<()> {
        self.faults.pass_host(Call::Replace, to)?;
        self.inner.rename(from, to, replace)
    }

    fn remove(&self, path: &Path) -> Result<()> {
        self.faults.pass_host(Call::Remove, path)?;
        self.inner.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> Result<()> {
        self.faults.pass_host(Call::SyncDir, dir)?;
        self.inner.sync_dir(dir)
    }

    fn list(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        self.inner.list(dir)
    }

    fn list_beneath(&self, root: &Path, dir: &Path, limit: usize) -> Result<Vec<Entry>> {
        self.inner.list_beneath(root, dir, limit)
    }
}

/// A file whose calls can be made to fail.
#[derive(Debug)]
struct FaultyFile {
    inner: Arc<dyn Storage>,
    faults: Arc<Faults>,
}

fn no_space() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOSPC)
}

/// The largest part of `len` bytes from `at` that ends with a sector.
fn whole_sectors(at: u64, len: usize) -> usize {
    ((at + len as u64) / 512 * 512).saturating_sub(at) as usize
}

impl Storage for FaultyFile {
    fn len(&self) -> io::Result<u64> {
        self.faults.pass(Call::Look)?;
        self.inner.len()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        self.faults.pass(Call::Read)?;
        self.inner.read_at(at, buf)
    }

    fn write_at(&self, at: u64, data: &[u8]) -> io::Result<()> {
        match self.faults.next(Call::Write) {
            Some(Fault::Half(errno)) => {
                let half = whole_sectors(at, data.len() / 2);
                self.inner.write_at(at, &data[..half])?;
                return Err(io::Error::from_raw_os_error(errno));
            }
            Some(Fault::Errno(errno)) => return Err(io::Error::from_raw_os_error(errno)),
            _ => {}
        }
        let end = at + data.len() as u64;
        let granted = self.faults.grow(Call::Write, self.inner.len()?, end);
        let fits = granted.saturating_sub(at) as usize;
        if fits < data.len() {
            self.inner.write_at(at, &data[..whole_sectors(at, fits)])?;
            return Err(no_space());
        }
        if !self.faults.fill(&*self.inner, at..end)? {
            self.faults.note(Call::Write);
            return Err(no_space());
        }
        self.inner.write_at(at, data)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.faults.pass(Call::SetLen)?;
        if self.faults.grow(Call::SetLen, self.inner.len()?, len) < len {
            return Err(no_space());
        }
        self.inner.set_len(len)
    }

    fn punch_hole(&self, at: u64, len: u64) -> io::Result<()> {
        self.faults.pass(Call::Punch)?;
        self.faults.empty(&*self.inner, at..at + len)?;
        self.inner.punch_hole(at, len)
    }

    fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        self.faults.pass(Call::Allocate)?;
        if self.faults.grow(Call::Allocate, self.inner.len()?, at + len) < at + len {
            return Err(no_space());
        }
        if !self.faults.fill(&*self.inner, at..at + len)? {
            self.faults.note(Call::Allocate);
            return Err(no_space());
        }
        self.inner.allocate(at, len)
    }

    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        self.faults.pass(Call::Look)?;
        self.inner.next_data(at)
    }

    fn sync(&self) -> io::Result<()> {
        self.faults.pass(Call::Sync)?;
        self.inner.sync()
    }

    fn allocated(&self) -> io::Result<u64> {
        self.faults.pass(Call::Look)?;
        self.inner.allocated()
    }

    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn writable(&self) -> bool {
        self.inner.writable()
    }

    fn identity(&self) -> io::Result<FileIdentity> {
        self.faults.pass(Call::Look)?;
        self.inner.identity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::{MemoryFile, MemoryHost};

    fn faulty() -> (Arc<Faults>, Arc<dyn Storage>, Arc<MemoryFile>) {
        let host = MemoryHost::new();
        host.insert(MemoryFile::new("/a", &[0; 1024]));
        let faults = Arc::new(Faults::default());
        let file = FaultyHost::over(host.clone(), &faults).open(Path::new("/a"), Access::Write);
        (faults, file.unwrap(), host.file(Path::new("/a")).unwrap())
    }

    #[test]
    fn the_chosen_call_of_the_chosen_kind_fails_once() {
        let (faults, file, _) = faulty();
        faults.inject(&[Call::Write, Call::Sync], 2, Fault::Errno(libc::EIO), false);
        file.write_at(0, &[1]).unwrap();
        file.read_at(0, &mut [0]).unwrap();
        file.sync().unwrap();
        assert_eq!(file.write_at(0, &[2]).unwrap_err().raw_os_error(), Some(libc::EIO));
        file.write_at(0, &[3]).unwrap();
        assert_eq!((faults.count(&[Call::Write]), faults.fired()), (3, 1));
    }

    #[test]
    fn a_lasting_fault_stays_until_cleared() {
        let (faults, file, _) = faulty();
        faults.inject(&[Call::Sync], 0, Fault::Errno(libc::EIO), true);
        assert!(file.sync().is_err() && file.sync().is_err());
        faults.clear();
        file.sync().unwrap();
    }

    #[test]
    fn half_a_write_leaves_its_first_sectors() {
        let (faults, file, memory) = faulty();
        faults.inject(&[Call::Write], 0, Fault::Half(libc::ENOSPC), false);
        assert!(file.write_at(0, &[7; 1024]).is_err());
        assert_eq!(memory.to_vec()[511..513], [7, 0]);
    }

    #[test]
    fn growth_stops_where_the_room_ends() {
        let (faults, file, memory) = faulty();
        faults.set_room(512);
        file.write_at(0, &[1; 1024]).unwrap();
        let error = file.write_at(1000, &[2; 1000]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!((memory.to_vec().len(), memory.to_vec()[1535]), (1536, 2));
        assert!(file.set_len(1537).is_err());
        faults.clear();
        file.set_len(4096).unwrap();
    }
}
