//! Images with arbitrary bytes changed, and hosts that fail: nothing may panic, loop or take memory
//! without bound, and what fails must say so.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicI64, Ordering};

use super::*;
use crate::error::ErrorKind;
use crate::formats::vmdk::cowd;
use crate::storage::{FileIdentity, Storage};

/// How often each image is changed; more with `FLATDISK_ROUNDS`.
fn rounds() -> u64 {
    std::env::var("FLATDISK_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(300)
}

/// Small images of every kind, with data in them.
fn images() -> Vec<Arc<MemoryHost>> {
    let mut images = Vec::new();
    for subformat in ["monolithicSparse", "twoGbMaxExtentSparse", "monolithicFlat", "vmfs"] {
        images.push(created("d.vmdk", &spec(subformat, 600_064)));
    }
    let esx = MemoryHost::new();
    let file = esx.create(&at("d-delta.vmdk")).unwrap();
    cowd::write_new(&*file, 1172, "d").unwrap();
    add(&esx, "d.vmdk", custom("RW 1172 VMFSSPARSE \"d-delta.vmdk\"").as_bytes());
    images.push(esx);
    for host in &images {
        let image = open_rw(host, "d.vmdk");
        image.disk.write_at(100_000, &[5; 300_000]).unwrap();
        image.disk.close().unwrap();
    }
    images
}

/// Changes some bytes, mostly where structures are.
fn damage(host: &Arc<MemoryHost>, rng: &mut fastrand::Rng) {
    for _ in 0..rng.u32(1..4) {
        let files = host.files();
        let file = &files[rng.usize(..files.len())];
        let len = file.len().unwrap().max(1);
        let at = match rng.u8(..4) {
            0 => rng.u64(..len),
            1 => rng.u64(..len.min(80)),
            2 => rng.u64(..len.min(4096)),
            _ => rng.u64(..len.min(20_000)) / 4 * 4,
        };
        match rng.u8(..8) {
            0 => file.set_len(rng.u64(..len)).unwrap(),
            1 => file.write_at(at, &[0xff; 4]).unwrap(),
            2 => file.write_at(at, &[0; 4]).unwrap(),
            3 => file.write_at(at, &rng.u64(..).to_le_bytes()).unwrap(),
            4 => file.write_at(at, &rng.u32(..3000).to_le_bytes()).unwrap(),
            _ => file.write_at(at, &[rng.u8(..)]).unwrap(),
        }
    }
}

#[test]
fn damaged_images_never_do_more_than_fail() {
    let mut opened = 0;
    for sound in images() {
        for seed in 0..rounds() {
            let mut rng = fastrand::Rng::with_seed(seed);
            let host = copy(&sound);
            damage(&host, &mut rng);
            let shared: Arc<dyn Host> = host.clone();
            let _ = formats::check(&shared, &at("d.vmdk"), &OpenOptions::new(Access::Read));
            let Ok(image) = open_with(&host, "d.vmdk", Access::Write) else { continue };
            opened += 1;
            let size = image.disk.size();
            let mut buf = vec![0; 70_000.min(size as usize)];
            for _ in 0..10 {
                let _ = image.disk.read_at(rng.u64(..=size - buf.len() as u64), &mut buf);
            }
            let part = 300_000.min(size);
            let _ = image.disk.write_at(rng.u64(..=size - part), &vec![1; part as usize]);
            let _ = image.disk.discard(rng.u64(..=size - part), part);
            let _ = image.disk.flush();
            let _ = image.disk.close();
        }
    }
    assert!(opened > 100, "{opened}");
}

/// Counts down over all calls of a host, which fail from zero on.
#[derive(Debug)]
struct Fuse {
    left: AtomicI64,
    error: io::ErrorKind,
}

impl Fuse {
    fn burn(&self) -> io::Result<()> {
        match self.left.fetch_sub(1, Ordering::SeqCst) {
            0 => Err(self.error.into()),
            _ => Ok(()),
        }
    }
}

#[derive(Debug)]
struct Failing {
    inner: Arc<dyn Storage>,
    fuse: Arc<Fuse>,
}

impl Storage for Failing {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        self.inner.read_at(at, buf)
    }
    fn write_at(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.fuse.burn()?;
        self.inner.write_at(at, data)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.fuse.burn()?;
        self.inner.set_len(len)
    }
    fn punch_hole(&self, at: u64, len: u64) -> io::Result<()> {
        self.fuse.burn()?;
        self.inner.punch_hole(at, len)
    }
    fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        self.inner.allocate(at, len)
    }
    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        self.inner.next_data(at)
    }
    fn sync(&self) -> io::Result<()> {
        self.fuse.burn()?;
        self.inner.sync()
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

/// A host whose changes fail once.
#[derive(Debug)]
struct FailingHost {
    inner: Arc<MemoryHost>,
    fuse: Arc<Fuse>,
}

impl Host for FailingHost {
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        let inner = self.inner.open(path, access)?;
        Ok(Arc::new(Failing { inner, fuse: self.fuse.clone() }))
    }
    fn open_beneath(&self, root: &Path, name: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        self.open(&root.join(name), access)
    }
    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        let inner = self.inner.create(path)?;
        Ok(Arc::new(Failing { inner, fuse: self.fuse.clone() }))
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

/// Writes, frees and flushes; the sectors that a failed call may have left either way are `None`
/// in the model.
fn work(disk: &Disk, model: &mut [Option<u8>]) -> Vec<Error> {
    let mut errors = Vec::new();
    let mut put = |range: Range<usize>, byte: u8, result: Result<()>| match result {
        Ok(()) => model[range].fill(Some(byte)),
        Err(e) => {
            model[range].fill(None);
            errors.push(e);
        }
    };
    let sector = |n: usize| n as u64 * 512;
    for round in 0..4_u8 {
        for (start, len) in [(0, 130), (500, 3), (700, 260), (1171, 1)] {
            let byte = round * 16 + len as u8 % 16;
            let result = disk.write_at(sector(start), &vec![byte; len * 512]);
            put(start..start + len, byte, result);
        }
        put(128..384, 0, disk.discard(sector(128), sector(256)));
        put(0..0, 0, disk.flush());
    }
    errors
}

fn assert_holds(disk: &Disk, model: &[Option<u8>], context: &str) {
    let now = contents(disk);
    for (number, sector) in now.chunks(512).enumerate() {
        if let Some(byte) = model[number] {
            assert!(sector.iter().all(|b| *b == byte), "{context}: sector {number}");
        }
    }
}

#[test]
fn every_failing_call_surfaces_and_leaves_a_sound_image() {
    for (kind, error) in
        [(io::ErrorKind::Other, ErrorKind::Io), (io::ErrorKind::StorageFull, ErrorKind::NoSpace)]
    {
        for sound in images() {
            for failing in 0.. {
                let host = copy(&sound);
                let fuse = Arc::new(Fuse { left: AtomicI64::new(failing), error: kind });
                let shared: Arc<dyn Host> =
                    Arc::new(FailingHost { inner: host.clone(), fuse: fuse.clone() });
                let image = formats::open(&shared, &at("d.vmdk"), &OpenOptions::new(Access::Write))
                    .unwrap();
                let before = contents(&image.disk);
                let mut model: Vec<_> = before
                    .chunks(512)
                    .map(|s| Some(s[0]).filter(|first| s.iter().all(|b| b == first)))
                    .collect();
                let mut errors = work(&image.disk, &mut model);
                let context = format!("{kind:?} at change {failing}");
                assert_holds(&image.disk, &model, &context);
                let flushed = image.disk.close();
                let closed = flushed.is_ok();
                errors.extend(flushed.err());
                drop(image);
                let burnt = fuse.left.load(Ordering::SeqCst) < 0;
                let report = check(&host, "d.vmdk");
                assert_eq!(report.errors, 0, "{context}: {:#?}", report.findings);
                let image = open_rw(&host, "d.vmdk");
                if closed {
                    assert_holds(&image.disk, &model, &context);
                }
                if !burnt {
                    assert!(errors.is_empty() && closed);
                    break;
                }
                // Giving freed space back to the host is the one thing that may fail in silence.
                let allowed = [error, ErrorKind::Io, ErrorKind::Failed];
                assert!(
                    errors.iter().all(|e| allowed.contains(&e.kind())),
                    "{context}: {errors:?}"
                );
            }
        }
    }
}

#[test]
fn a_creation_that_fails_leaves_no_file() {
    for subformat in create::SUBFORMATS {
        for failing in 0.. {
            let fuse =
                Arc::new(Fuse { left: AtomicI64::new(failing), error: io::ErrorKind::Other });
            let host = FailingHost { inner: MemoryHost::new(), fuse };
            let result = formats::create(&Vmdk, &host, &at("d.vmdk"), &spec(subformat, 5 << 30));
            if result.is_ok() {
                break;
            }
            assert!(host.inner.files().is_empty(), "{subformat}, change {failing}");
        }
    }
}
