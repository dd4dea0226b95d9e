//! Power cuts: every state that the files can be in at any moment, as [`Storage`] allows them, opens
//! again, holds what was flushed, and can be written on.

use std::io;
use std::ops::Range;

use parking_lot::Mutex;

use super::*;
use crate::disk::map::Geometry;
use crate::formats::vmdk::{cowd, create_child};
use crate::storage::{FileIdentity, Storage};

const SECTOR: usize = Geometry::SECTOR as usize;

/// A change of a file.
#[derive(Debug, Clone)]
enum Change {
    Write(u64, Vec<u8>),
    SetLen(u64),
    Punch(u64, u64),
    Sync,
}

/// What happened to all files of a host, in order.
type Log = Arc<Mutex<Vec<(PathBuf, Change)>>>;

/// A file that records its changes.
#[derive(Debug)]
struct Recorded {
    inner: Arc<dyn Storage>,
    log: Log,
}

impl Recorded {
    fn record(&self, change: Change) {
        self.log.lock().push((self.inner.path().to_owned(), change));
    }
}

impl Storage for Recorded {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        self.inner.read_at(at, buf)
    }
    fn write_at(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.record(Change::Write(at, data.to_vec()));
        self.inner.write_at(at, data)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.record(Change::SetLen(len));
        self.inner.set_len(len)
    }
    fn punch_hole(&self, at: u64, len: u64) -> io::Result<()> {
        self.record(Change::Punch(at, len));
        self.inner.punch_hole(at, len)
    }
    fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        self.inner.allocate(at, len)
    }
    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        self.inner.next_data(at)
    }
    fn sync(&self) -> io::Result<()> {
        self.inner.sync()?;
        self.record(Change::Sync);
        Ok(())
    }
    fn allocated(&self) -> io::Result<u64> {
        self.inner.allocated()
    }
    fn path(&self) -> &Path {
        self.inner.path()
    }
    fn writable(&self) -> bool {
        true
    }
    fn identity(&self) -> io::Result<FileIdentity> {
        self.inner.identity()
    }
}

/// A host whose files record their changes.
#[derive(Debug)]
struct Recorder {
    inner: Arc<MemoryHost>,
    log: Log,
}

impl Host for Recorder {
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        let inner = self.inner.open(path, access)?;
        Ok(Arc::new(Recorded { inner, log: self.log.clone() }))
    }
    fn open_beneath(&self, root: &Path, name: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        self.open(&root.join(name), access)
    }
    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        self.inner.create(path)
    }
    fn replace(&self, path: &Path, contents: &[u8]) -> Result<()> {
        self.inner.replace(path, contents)
    }
    fn remove(&self, path: &Path) -> Result<()> {
        self.inner.remove(path)
    }
    fn sync_dir(&self, dir: &Path) -> Result<()> {
        self.inner.sync_dir(dir)
    }
    fn list(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        self.inner.list(dir)
    }
}

/// How much of what was not synced survives a crash.
#[derive(Debug, Clone, Copy)]
enum Survival {
    Nothing,
    Everything,
    AllButOne,
    Random,
}

/// Applies a change, a write by sectors as far as `keep` says.
fn apply(file: &MemoryFile, change: &Change, mut keep: impl FnMut() -> bool) {
    match change {
        Change::Write(at, data) => {
            let mut done = 0;
            while done < data.len() {
                let at = at + done as u64;
                let part = (data.len() - done).min(SECTOR - at as usize % SECTOR);
                if keep() {
                    file.write_at(at, &data[done..done + part]).unwrap();
                }
                done += part;
            }
        }
        Change::SetLen(len) if keep() => file.set_len(*len).unwrap(),
        Change::Punch(at, len) if keep() => file.punch_hole(*at, *len).unwrap(),
        _ => {}
    }
}

/// The files as a crash after the first `count` changes leaves them.
fn crashed(
    start: &Arc<MemoryHost>,
    log: &[(PathBuf, Change)],
    survival: Survival,
    rng: &mut fastrand::Rng,
) -> Arc<MemoryHost> {
    let host = copy(start);
    let lost = rng.usize(..log.len().max(1));
    for file in host.files() {
        let own = |(path, _): &&(PathBuf, Change)| path == file.path();
        let synced = log
            .iter()
            .rposition(|(path, change)| path == file.path() && matches!(change, Change::Sync))
            .map_or(0, |last| last + 1);
        for (_, change) in log[..synced].iter().filter(own) {
            apply(&file, change, || true);
        }
        for (index, (path, change)) in log.iter().enumerate().skip(synced) {
            if path == file.path() {
                apply(&file, change, || match survival {
                    Survival::Nothing => false,
                    Survival::Everything => true,
                    Survival::AllButOne => index != lost,
                    Survival::Random => rng.bool(),
                });
            }
        }
    }
    host
}

/// Small disks of every kind that has tables.
fn shapes() -> Vec<(&'static str, Arc<MemoryHost>)> {
    let small = CreateSpec { block_size: Some(4096), ..spec("monolithicSparse", 300 << 10) };
    let sparse = created("d.vmdk", &small);
    let split = MemoryHost::new();
    add_sparse(&split, "a", 301, 8);
    add_sparse(&split, "b", 299, 16);
    add(&split, "d.vmdk", custom("RW 301 SPARSE \"a\"\nRW 299 SPARSE \"b\"").as_bytes());
    let esx = MemoryHost::new();
    let file = esx.create(&at("d-delta.vmdk")).unwrap();
    cowd::write_new(&*file, 600, "d").unwrap();
    add(&esx, "d.vmdk", custom("RW 600 VMFSSPARSE \"d-delta.vmdk\"").as_bytes());
    let child = created("base.vmdk", &spec("monolithicFlat", 300 << 10));
    let base = open_rw(&child, "base.vmdk");
    base.disk.write_at(5000, &[0xba; 200_000]).unwrap();
    base.disk.close().unwrap();
    let base = open_with(&child, "base.vmdk", Access::Read).unwrap();
    create_child(&*child, &at("d.vmdk"), &base, &crate::formats::CreateSpec::default()).unwrap();
    vec![("sparse", sparse), ("split", split), ("vmfsSparse", esx), ("child", child)]
}

/// Checks that every sector of `disk` is as it was at one of the moments in `history`, the first of
/// which was flushed.
fn assert_possible(disk: &Disk, history: &[Vec<u8>], context: &str) {
    let now = contents(disk);
    for (number, sector) in now.chunks(SECTOR).enumerate() {
        let place = number * SECTOR..number * SECTOR + sector.len();
        let possible = history.iter().any(|then| &then[place.clone()] == sector);
        assert!(possible, "{context}: sector {number} holds what nobody wrote");
    }
}

#[test]
fn every_crash_leaves_what_was_flushed() {
    for seed in 0..4 {
        for (shape, start) in shapes() {
            let mut rng = fastrand::Rng::with_seed(seed);
            let log = Log::default();
            let files = copy(&start);
            let recorder: Arc<dyn Host> =
                Arc::new(Recorder { inner: files.clone(), log: log.clone() });
            let image =
                formats::open(&recorder, &at("d.vmdk"), &OpenOptions::new(Access::Write)).unwrap();
            // At each moment, as a length of the log: what the disk may hold since the last flush.
            let mut model = contents(&image.disk);
            let mut history = vec![model.clone()];
            let mut moments: Vec<(usize, Vec<Vec<u8>>)> = Vec::new();
            for step in 0..50 {
                let before = log.lock().len();
                let flush = rng.u8(..5) == 0;
                if flush {
                    image.disk.flush().unwrap();
                } else {
                    let start = rng.usize(..model.len()) / SECTOR * SECTOR;
                    let len = (rng.usize(1..30) * SECTOR).min(model.len() - start);
                    if rng.u8(..3) == 0 {
                        image.disk.discard(start as u64, len as u64).unwrap();
                        model[start..start + len].fill(0);
                    } else {
                        let bytes = vec![step as u8 + 1; len];
                        image.disk.write_at(start as u64, &bytes).unwrap();
                        model[start..start + len].copy_from_slice(&bytes);
                    }
                    history.push(model.clone());
                }
                // While an operation is under way its result may be there already.
                for moment in before..log.lock().len() {
                    moments.push((moment, history.clone()));
                }
                if flush {
                    history = vec![model.clone()];
                }
            }
            let before = log.lock().len();
            image.disk.close().unwrap();
            let log = log.lock().clone();
            moments.extend((before..=log.len()).map(|moment| (moment, history.clone())));
            for (moment, history) in &moments {
                for survival in
                    [Survival::Nothing, Survival::Everything, Survival::AllButOne, Survival::Random]
                {
                    let context = format!("{shape}, seed {seed}, {survival:?} after {moment}");
                    let host = crashed(&start, &log[..*moment], survival, &mut rng);
                    let image = open_with(&host, "d.vmdk", Access::Read).unwrap();
                    assert_possible(&image.disk, history, &context);
                    drop(image);
                    let image = open_with(&host, "d.vmdk", Access::Write).unwrap();
                    let then = contents(&image.disk);
                    image
                        .disk
                        .write_at(700, &[0xff; 9000])
                        .unwrap_or_else(|e| panic!("{context}: {e}"));
                    image.disk.close().unwrap();
                    drop(image);
                    let report = check(&host, "d.vmdk");
                    assert_eq!(report.errors, 0, "{context}: {:#?}", report.findings);
                    let image = open_with(&host, "d.vmdk", Access::Read).unwrap();
                    let mut expected = then;
                    expected[700..9700].fill(0xff);
                    assert!(contents(&image.disk) == expected, "{context}");
                }
            }
            println!("{shape}, seed {seed}: {} moments", moments.len());
        }
    }
}

#[test]
fn a_flush_costs_at_most_two_syncs_of_each_file() {
    for (shape, files) in shapes() {
        let log = Log::default();
        let recorder: Arc<dyn Host> = Arc::new(Recorder { inner: files, log: log.clone() });
        let image =
            formats::open(&recorder, &at("d.vmdk"), &OpenOptions::new(Access::Write)).unwrap();
        image.disk.write_at(0, &[1; 512]).unwrap();
        image.disk.flush().unwrap();
        let syncs_of = |change: &dyn Fn()| {
            log.lock().clear();
            change();
            image.disk.flush().unwrap();
            let log = log.lock();
            let most = log.iter().map(|(path, _)| {
                log.iter().filter(|(p, c)| p == path && matches!(c, Change::Sync)).count()
            });
            most.max().unwrap_or(0)
        };
        let size = image.disk.size();
        assert_eq!(
            syncs_of(&|| image.disk.write_at(0, &vec![2; size as usize]).unwrap()),
            2,
            "{shape}"
        );
        assert_eq!(syncs_of(&|| image.disk.write_at(3, &[3; 9]).unwrap()), 1, "{shape}");
        assert_eq!(syncs_of(&|| ()), 0, "{shape}");
    }
}
