use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::thread::sleep;
use std::time::Duration;

use super::*;
use crate::disk::Disk;
use crate::disk::map::{BlockMap, DiskRange, ExtentList, Geometry, Source as Bytes, WritePlan};
use crate::formats::{Identity, Image, ImageInfo, Label, ParentLink};
use crate::storage::memory::MemoryFile;
use crate::storage::remembered::identity;
use crate::storage::{Access, Storage};

/// Size of every disk here.
const SIZE: u64 = 1 << 20;

/// Opens files whose text says what they are: words `bad`, `read-only`, `parent=NAME`,
/// `extent=NAME`, `fails` (to flush), `id=NAME` instead of the file's own, `wants=NAME` for a parent that
/// is not there. Like the host's locks it lets readers or one writer in.
#[derive(Default)]
struct Fake {
    opened: Mutex<Vec<(PathBuf, Access)>>,
    /// Disks in use by path, and by how many readers; `u32::MAX` for a writer.
    users: Mutex<HashMap<PathBuf, u32>>,
    contents: Mutex<HashMap<PathBuf, Arc<MemoryFile>>>,
}

const WRITING: u32 = u32::MAX;

impl Fake {
    fn opens(&self) -> Vec<Access> {
        self.opened.lock().drain(..).map(|(_, access)| access).collect()
    }

    fn used(&self) -> usize {
        self.users.lock().len()
    }
}

struct FakeMap {
    geometry: Geometry,
    files: [Arc<dyn Storage>; 1],
    fails: bool,
    access: Access,
    fake: Arc<Fake>,
    closed: AtomicBool,
}

impl Drop for FakeMap {
    fn drop(&mut self) {
        let mut users = self.fake.users.lock();
        let path = self.files[0].path();
        match users.get_mut(path) {
            _ if self.access == Access::Peek => {}
            Some(count) if *count != WRITING && *count > 1 => *count -= 1,
            _ => drop(users.remove(path)),
        }
    }
}

impl BlockMap for FakeMap {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn files(&self) -> &[Arc<dyn Storage>] {
        &self.files
    }

    fn lookup(&self, want: DiskRange, out: &mut ExtentList) -> Result<()> {
        let source = Bytes::File { file: 0, at: want.start };
        out.push(want.start, want.end - want.start, source);
        Ok(())
    }

    fn prepare_write(&self, _want: DiskRange) -> Result<WritePlan<'_>> {
        unreachable!("everything is mapped")
    }

    fn flush(&self) -> Result<()> {
        assert!(!self.closed.load(Ordering::Relaxed));
        if self.fails { Err(Error::new(ErrorKind::Io, "flush: broken")) } else { Ok(()) }
    }

    fn close(&self) -> Result<()> {
        self.closed.store(true, Ordering::Relaxed);
        Ok(())
    }
}

struct FakeOpener(Arc<Fake>);

/// The unique id called `name`.
fn id(name: &str) -> Identity {
    let mut id = [0; 16];
    id.iter_mut().zip(name.bytes()).for_each(|(id, byte)| *id = byte);
    Identity::VhdUniqueId(id)
}

fn fake_label(path: &Path) -> Option<Label> {
    let text = fs::read_to_string(path).ok()?;
    let value = |key: &str| text.split(' ').find_map(|w| w.strip_prefix(key));
    let name = path.file_name()?.to_str()?;
    let parent = value("parent=").map(|path| path.rsplit('/').next().unwrap_or_default());
    let parent = parent.or(value("wants=")).map(id);
    Some(Label { identity: id(value("id=").unwrap_or(name)), parent, size: SIZE })
}

impl Opener for FakeOpener {
    fn label(&self, place: &Place) -> Option<Label> {
        fake_label(&place.path())
    }

    fn open(&self, place: &Place, access: Access) -> Result<Image> {
        let path = place.path();
        self.0.opened.lock().push((path.clone(), access));
        let text = fs::read_to_string(&path).map_err(|e| Error::io("open", &e))?;
        let has = |word: &str| text.split(' ').any(|w| w == word);
        let value = |key: &str| text.split(' ').find_map(|w| Some(w.strip_prefix(key)?.to_owned()));
        if has("bad") {
            return Err(Error::corrupt("a bad header").in_file(&path));
        }
        if value("wants=").is_some() {
            return Err(Error::new(ErrorKind::ParentMissing, "no parent").in_file(&path));
        }
        let label = fake_label(&path).ok_or_else(not_found)?;
        if access != Access::Peek {
            let mut users = self.0.users.lock();
            let count = users.entry(path.clone()).or_insert(0);
            if *count == WRITING || (access == Access::Write && *count > 0) {
                return Err(Error::new(ErrorKind::Busy, "in use").in_file(&path));
            }
            *count = if access == Access::Write { WRITING } else { *count + 1 };
        }
        let parent = value("parent=").map(|name| {
            let place = place.elsewhere(place.relative.with_file_name(name));
            self.open(&place, access.min_of_parent()).map(Box::new)
        });
        let parent = parent.transpose()?;
        let mut contents = self.0.contents.lock();
        let file = contents
            .entry(path.clone())
            .or_insert_with(|| MemoryFile::new(&path, &vec![0; SIZE as usize]))
            .clone();
        let geometry =
            Geometry { size: SIZE, logical_sector: 512, physical_sector: 512, block_size: SIZE };
        let map = FakeMap {
            geometry,
            files: [file],
            fails: has("fails"),
            access,
            fake: self.0.clone(),
            closed: AtomicBool::new(false),
        };
        let extent = value("extent=").map(|name| path.with_file_name(name));
        let files = std::iter::once(path.clone()).chain(extent);
        let files = files
            .filter_map(|path| {
                let identity = identity(&fs::symlink_metadata(&path).ok()?);
                Some((path, identity))
            })
            .collect();
        let read_only = has("read-only").then(|| "made so".to_owned());
        let now = (access != Access::Write).then(|| "open for reading".to_owned());
        Ok(Image {
            disk: Arc::new(Disk::new(Box::new(map), None, read_only.clone().or(now))),
            info: ImageInfo {
                format: "vhd",
                subformat: "dynamic".into(),
                virtual_size: SIZE,
                logical_sector_size: 512,
                extents: value("extent=").map(PathBuf::from).into_iter().collect(),
                parent: value("parent="),
                ..ImageInfo::default()
            },
            identity: label.identity,
            path,
            files,
            read_only,
            damage: Vec::new(),
            link: label.parent.map(|identity| ParentLink {
                identity,
                candidates: Vec::new(),
                modified: None,
            }),
            parent,
        })
    }
}

trait ParentAccess {
    fn min_of_parent(self) -> Access;
}

impl ParentAccess for Access {
    fn min_of_parent(self) -> Access {
        if self == Access::Peek { Access::Peek } else { Access::Read }
    }
}

/// A folder of fake images with a tree over it.
struct Setup {
    dir: tempfile::TempDir,
    fake: Arc<Fake>,
    tree: Arc<Tree>,
}

fn look() -> Look {
    Look {
        read_only: false,
        nonpersistent: None,
        uid: None,
        gid: None,
        fmask: 0,
        dmask: 0,
        suffix: ".img".into(),
        mountpoint: "/nowhere".into(),
        owner: (0, 0),
        writeback: false,
        partitions: false,
    }
}

fn setup_with(look: Look, images: &[(&str, &str)]) -> Setup {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in images {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    let fake = Arc::new(Fake::default());
    let opener = Box::new(FakeOpener(fake.clone()));
    let tree = Arc::new(Tree::new(&[dir.path().to_owned()], opener, look).unwrap());
    Setup { dir, fake, tree }
}

fn setup(images: &[(&str, &str)]) -> Setup {
    setup_with(look(), images)
}

impl Setup {
    fn names(&self, ino: u64) -> Vec<String> {
        let handle = self.tree.open_folder(ino).unwrap();
        let entries = self.tree.entries(handle).unwrap();
        self.tree.release_folder(handle);
        entries[2..].iter().map(|e| e.name.to_str().unwrap().to_owned()).collect()
    }

    fn find(&self, name: &str) -> Attributes {
        self.tree.lookup(ROOT, OsStr::new(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    fn missing(&self, name: &str) -> bool {
        let error = self.tree.lookup(ROOT, OsStr::new(name)).expect_err(name);
        error.kind() == ErrorKind::NotFound
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

fn kind<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.unwrap_err().kind()
}

fn errno<T: std::fmt::Debug>(result: Result<T>) -> i32 {
    crate::fuse::errno::errno(&result.unwrap_err())
}

#[test]
fn ten_thousand_images_are_listed_without_one_open() {
    let s = setup(&[]);
    for i in 0..10_000 {
        fs::write(s.path(&format!("{i}.vhd")), "").unwrap();
    }
    let names = s.names(ROOT);
    assert_eq!(names.len(), 10_000);
    assert!(names.iter().all(|name| name.ends_with(".vhd.img")));
    assert_eq!(s.fake.opens(), []);
    s.find("77.vhd.img");
    assert_eq!(s.fake.opens(), [Access::Peek]);
}

#[test]
fn a_bad_image_in_a_small_folder_shows_as_a_readable_text() {
    let s = setup(&[("good.vhd", ""), ("bad.vhd", "bad")]);
    assert_eq!(s.names(ROOT), ["bad.vhd.error.txt", "good.vhd.img"]);
    assert!(s.missing("bad.vhd.img"));
    assert!(s.missing("good.vhd.error.txt"));
    let text = s.find("bad.vhd.error.txt");
    let opened = s.tree.open(text.ino, false, false).unwrap();
    let mut buf = vec![0; 4096];
    let len = s.tree.read(text.ino, opened.handle, 0, &mut buf).unwrap();
    assert_eq!(len as u64, text.size);
    let said = std::str::from_utf8(&buf[..len]).unwrap();
    assert!(said.contains("bad.vhd") && said.contains("a bad header"), "{said}");
    assert_eq!(s.tree.read(text.ino, opened.handle, text.size, &mut buf).unwrap(), 0);
    s.tree.release(text.ino, opened.handle).unwrap();
    assert_eq!(kind(s.tree.open(text.ino, true, false)), ErrorKind::ReadOnly);
}

#[test]
fn a_bad_image_in_a_large_folder_is_found_out_by_looking_it_up() {
    let s = setup(&[]);
    for i in 0..=EXAMINED {
        fs::write(s.path(&format!("{i:03}.vhd")), if i == 5 { "bad" } else { "" }).unwrap();
    }
    assert_eq!(s.names(ROOT)[5], "005.vhd.img");
    assert!(s.missing("005.vhd.img"));
    s.find("005.vhd.error.txt");
    assert_eq!(s.names(ROOT)[5], "005.vhd.error.txt");
}

#[test]
fn images_are_looked_at_once_until_they_change() {
    let s = setup(&[("a.vhd", "")]);
    sleep(Duration::from_millis(80));
    for _ in 0..3 {
        s.names(ROOT);
        s.find("a.vhd.img");
    }
    assert_eq!(s.fake.opens(), [Access::Peek]);
    fs::write(s.path("a.vhd"), "read-only").unwrap();
    assert_eq!(s.find("a.vhd.img").mode & 0o222, 0);
}

#[test]
fn numbers_are_the_same_in_listings_lookups_and_other_trees() {
    let s = setup(&[("a.vhd", ""), ("sub/b.vhd", ""), ("bad.vhd", "bad")]);
    let opener = Box::new(FakeOpener(s.fake.clone()));
    let other = Tree::new(&[s.dir.path().to_owned()], opener, look()).unwrap();
    for tree in [&s.tree, &other] {
        let handle = tree.open_folder(ROOT).unwrap();
        for entry in &tree.entries(handle).unwrap()[2..] {
            assert_eq!(s.tree.lookup(ROOT, &entry.name).unwrap().ino, entry.ino);
        }
    }
}

#[test]
fn an_image_is_open_exactly_as_it_is_used() {
    let s = setup(&[("a.vhd", "")]);
    let ino = s.find("a.vhd.img").ino;
    s.fake.opens();
    let reader = s.tree.open(ino, false, false).unwrap().handle;
    assert_eq!(s.fake.opens(), [Access::Read]);
    let writer = s.tree.open(ino, true, false).unwrap().handle;
    assert_eq!(s.fake.opens(), [Access::Write]);
    let second = s.tree.open(ino, true, false).unwrap().handle;
    assert_eq!(s.tree.write(ino, 512, b"x").unwrap(), 1);
    s.tree.release(ino, writer).unwrap();
    assert_eq!(s.fake.opens(), []);
    s.tree.release(ino, second).unwrap();
    assert_eq!(s.fake.opens(), [Access::Read]);
    let mut buf = [0; 2];
    assert_eq!(s.tree.read(ino, reader, 512, &mut buf).unwrap(), 2);
    assert_eq!(&buf, b"x\0");
    assert_eq!(errno(s.tree.write(ino, 0, b"y")), libc::EROFS);
    s.tree.release(ino, reader).unwrap();
    assert_eq!((s.fake.opens(), s.fake.used()), (vec![], 0));
}

#[test]
fn who_cannot_have_it_gets_busy_and_readers_keep_reading() {
    let s = setup(&[("a.vhd", "")]);
    let ino = s.find("a.vhd.img").ino;
    let reader = s.tree.open(ino, false, false).unwrap().handle;
    // Somebody else reads the image, too.
    *s.fake.users.lock().get_mut(&s.path("a.vhd").canonicalize().unwrap()).unwrap() += 1;
    assert_eq!(errno(s.tree.open(ino, true, false)), libc::EBUSY);
    assert_eq!(s.tree.read(ino, reader, 0, &mut [0; 512]).unwrap(), 512);
}

#[test]
fn a_disk_that_readers_lost_comes_back() {
    let s = setup(&[("a.vhd", "")]);
    let ino = s.find("a.vhd.img").ino;
    let path = s.path("a.vhd").canonicalize().unwrap();
    let reader = s.tree.open(ino, false, false).unwrap().handle;
    let writer = s.tree.open(ino, true, false).unwrap().handle;
    // Another writer slips in while the image changes hands.
    fs::write(&path, "bad").unwrap();
    s.tree.release(ino, writer).unwrap();
    assert_eq!(errno(s.tree.read(ino, reader, 0, &mut [0; 512])), libc::EIO);
    fs::write(&path, "").unwrap();
    assert_eq!(s.tree.read(ino, reader, 0, &mut [0; 512]).unwrap(), 512);
}

#[test]
fn a_parent_is_read_only_while_its_child_is_there() {
    let s = setup(&[("base.vhd", ""), ("child.vhd", "parent=base.vhd")]);
    s.names(ROOT);
    let base = s.find("base.vhd.img");
    assert_eq!(base.mode & 0o222, 0);
    assert_eq!(errno(s.tree.open(base.ino, true, false)), libc::EROFS);
    let child = s.find("child.vhd.img");
    assert_ne!(child.mode & 0o200, 0);
    let writer = s.tree.open(child.ino, true, false).unwrap();
    s.tree.release(child.ino, writer.handle).unwrap();
    fs::remove_file(s.path("child.vhd")).unwrap();
    assert!(s.tree.open(base.ino, true, false).is_ok());
}

#[test]
fn children_that_nobody_looked_at_protect_their_parent_too() {
    let s = setup(&[("sub/base.vhd", ""), ("child.vhd", "parent=sub/base.vhd")]);
    for i in 0..=EXAMINED {
        fs::write(s.path(&format!("{i}.vhd")), "").unwrap();
    }
    let sub = s.find("sub").ino;
    let base = s.tree.lookup(sub, OsStr::new("base.vhd.img")).unwrap();
    assert_ne!(base.mode & 0o200, 0);
    let refused = s.tree.open(base.ino, true, false).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ReadOnly);
    assert!(refused.to_string().contains("child.vhd"), "{refused}");
    assert_eq!(s.tree.attributes(base.ino).unwrap().mode & 0o222, 0);
}

#[test]
fn a_disk_is_protected_by_its_id_wherever_the_child_that_names_it_lies() {
    let s = setup(&[
        ("bases/Renamed.vhd", "id=b"),
        ("bases/copy.vhd", "id=b"),
        ("bases/other.vhd", ""),
        ("vms/one/deep/child.vhd", "wants=b"),
    ]);
    let bases = s.find("bases").ino;
    let base = |name: &str| s.tree.lookup(bases, OsStr::new(name)).unwrap();
    for name in ["Renamed.vhd.img", "copy.vhd.img"] {
        let refused = s.tree.open(base(name).ino, true, false).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ReadOnly, "{name}");
        assert!(refused.to_string().contains("deep/child.vhd is made from it"), "{refused}");
        assert_eq!(base(name).mode & 0o222, 0, "{name}");
    }
    assert!(s.tree.open(base("other.vhd.img").ino, true, false).is_ok());
    fs::remove_file(s.path("vms/one/deep/child.vhd")).unwrap();
    assert!(s.tree.open(base("copy.vhd.img").ino, true, false).is_ok());
}

#[test]
fn a_child_in_another_source_protects_its_parent() {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in [("a/x.vhd", ""), ("b/sub/child.vhd", "wants=x.vhd")] {
        fs::create_dir_all(dir.path().join(name).parent().unwrap()).unwrap();
        fs::write(dir.path().join(name), text).unwrap();
    }
    let written = |others: &[&str]| {
        let sources: Vec<_> =
            others.iter().chain(&["a"]).map(|name| dir.path().join(name)).collect();
        let tree = std::sync::Arc::new(tree_of(&sources, look()).unwrap());
        let folder = match sources.len() {
            1 => ROOT,
            _ => tree.lookup(ROOT, OsStr::new("a")).unwrap().ino,
        };
        let image = tree.lookup(folder, OsStr::new("x.vhd.img")).unwrap().ino;
        tree.open(image, true, false).map(drop).map_err(|e| e.kind())
    };
    assert_eq!(written(&[]), Ok(()));
    assert_eq!(written(&["b"]), Err(ErrorKind::ReadOnly));
}

#[test]
fn images_that_cannot_be_written_say_so_in_their_mode_and_at_open() {
    let s = setup(&[("a.vhd", "read-only")]);
    let a = s.find("a.vhd.img");
    assert_eq!(a.mode & 0o222, 0);
    assert_eq!(errno(s.tree.open(a.ino, true, false)), libc::EROFS);
    assert!(s.tree.open(a.ino, false, false).is_ok());
    let s = setup_with(Look { read_only: true, ..look() }, &[("a.vhd", "")]);
    let a = s.find("a.vhd.img");
    assert_eq!(a.mode & 0o222, 0);
    assert_eq!(errno(s.tree.open(a.ino, true, false)), libc::EROFS);
}

#[test]
fn what_a_program_that_writes_anew_skips_is_zero() {
    let s = setup(&[("a.vhd", "")]);
    let a = s.find("a.vhd.img").ino;
    let told = Arc::new(Mutex::new(Vec::new()));
    let tell = told.clone();
    s.tree.on_old_pages(move |ino, _| tell.lock().push(ino));
    let old = s.tree.open(a, true, false).unwrap().handle;
    let write = |handle, offset, data: &[u8]| {
        s.tree.reach(a, handle, offset, data.len() as u64).unwrap();
        s.tree.write(a, offset, data).unwrap();
    };
    let all = || {
        let mut buf = vec![1; SIZE as usize];
        assert_eq!(s.tree.read(a, old, 0, &mut buf).unwrap(), buf.len());
        buf
    };
    let mut want = vec![7; SIZE as usize];
    write(old, 0, &want);

    let opened = s.tree.open(a, true, true).unwrap();
    assert!(opened.direct);
    assert!(all() == want, "nothing is truncated");
    write(opened.handle, 0, b"head");
    want[..4].copy_from_slice(b"head");
    write(opened.handle, 10_000, b"body");
    want[4..10_000].fill(0);
    want[10_000..10_004].copy_from_slice(b"body");
    // What comes out of order is kept, and who did not truncate skips nothing.
    write(opened.handle, 100, b"late");
    want[100..104].copy_from_slice(b"late");
    write(old, 50_000, b"other");
    want[50_000..50_005].copy_from_slice(b"other");
    assert!(all() == want);
    assert_eq!(*told.lock(), [a]);
    assert!(!s.tree.open(a, false, false).unwrap().keep_cache, "the kernel's pages are old");
    // Another size than the disk's it cannot get; its own extends it with zeroes.
    assert!(!s.tree.truncate(a, Some(opened.handle), 20_000).unwrap());
    assert!(all() == want);
    assert!(!s.tree.truncate(a, Some(opened.handle), SIZE).unwrap());
    want[10_004..].fill(0);
    assert!(all() == want);
    s.tree.release(a, opened.handle).unwrap();
    write(old, 0, &vec![9; SIZE as usize]);
    write(opened.handle, 4096, b"closed");
    assert_eq!(all()[..4096], [9; 4096]);
}

#[test]
fn only_who_reads_and_writes_clears_a_file_by_its_size() {
    let s = setup(&[("a.vhd", "")]);
    let a = s.find("a.vhd.img").ino;
    let only = Wanted { write: true, read: false, truncate: false };
    let writer = s.tree.open_as(a, only).unwrap().handle;
    assert!(!s.tree.truncate(a, Some(writer), 0).unwrap());
    assert!(!s.tree.truncate(a, None, 0).unwrap());
    s.tree.write(a, 0, b"old").unwrap();
    let both = s.tree.open(a, true, false).unwrap().handle;
    assert!(s.tree.truncate(a, Some(both), 0).unwrap());
    let start = || {
        let mut buf = [1; 3];
        s.tree.read(a, both, 0, &mut buf).unwrap();
        buf
    };
    assert_eq!(&start(), b"old");
    assert!(!s.tree.truncate(a, Some(both), SIZE).unwrap());
    assert_eq!(start(), [0; 3]);
}

#[test]
fn the_size_cannot_be_changed() {
    let s = setup(&[("a.vhd", "")]);
    let a = s.find("a.vhd.img");
    assert_eq!(a.size, SIZE);
    let change = |size, mode| s.tree.change(a.ino, size, mode, (None, None));
    assert_eq!(errno(s.tree.open(a.ino, false, true)), libc::EPERM);
    assert_eq!(errno(change(Some(0), None)), libc::EPERM);
    assert_eq!(errno(change(None, Some(0o777))), libc::EPERM);
    change(Some(SIZE), None).unwrap();
    change(None, None).unwrap();
    let writer = s.tree.open(a.ino, true, false).unwrap();
    assert_eq!(errno(s.tree.write(a.ino, SIZE, b"x")), libc::ENOSPC);
    assert_eq!(s.tree.write(a.ino, SIZE - 1, b"xy").unwrap(), 1);
    let allocate = |offset, len, mode| s.tree.allocate(a.ino, offset, len, mode);
    allocate(0, SIZE, 0).unwrap();
    assert_eq!(errno(allocate(0, SIZE + 1, 0)), libc::EPERM);
    allocate(SIZE, 4096, libc::FALLOC_FL_KEEP_SIZE).unwrap();
    allocate(SIZE - 1, 4096, libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE).unwrap();
    assert_eq!(errno(allocate(0, SIZE, libc::FALLOC_FL_COLLAPSE_RANGE)), libc::EOPNOTSUPP);
    let mut buf = [1; 8];
    assert_eq!(s.tree.read(a.ino, writer.handle, SIZE - 1, &mut buf).unwrap(), 1);
    assert_eq!(buf[0], 0);
    assert_eq!(s.tree.read(a.ino, writer.handle, SIZE + 9, &mut buf).unwrap(), 0);
    assert_eq!(s.tree.seek(a.ino, SIZE, true).unwrap(), None);
}

#[test]
fn a_failed_flush_reaches_close_and_the_end_of_the_mount() {
    let s = setup(&[("a.vhd", "fails")]);
    let ino = s.find("a.vhd.img").ino;
    let writer = s.tree.open(ino, true, false).unwrap().handle;
    s.tree.flush(ino, writer).unwrap();
    s.tree.write(ino, 0, b"x").unwrap();
    assert_eq!(errno(s.tree.flush(ino, writer)), libc::EIO);
    assert_eq!(errno(s.tree.sync(ino)), libc::EIO);
    assert!(s.tree.release(ino, writer).is_err());
    assert!(s.tree.failures()[0].contains("broken"), "{:?}", s.tree.failures());
    assert_eq!(s.fake.used(), 0);
}

#[test]
fn a_replaced_image_is_another_file_and_the_old_one_stays_open() {
    let s = setup(&[("a.vhd", "")]);
    let old = s.find("a.vhd.img").ino;
    let writer = s.tree.open(old, true, false).unwrap().handle;
    fs::write(s.path("new"), "").unwrap();
    fs::rename(s.path("new"), s.path("a.vhd")).unwrap();
    let new = s.find("a.vhd.img").ino;
    assert_ne!(old, new);
    assert_eq!(s.tree.attributes(old).unwrap().size, SIZE);
    assert_eq!(s.tree.write(old, 0, b"x").unwrap(), 1);
    s.tree.release(old, writer).unwrap();
    assert_eq!(errno(s.tree.attributes(old)), libc::ESTALE);
    assert_eq!(errno(s.tree.open(old, false, false)), libc::ESTALE);
}

#[test]
fn changes_in_the_folder_show() {
    let s = setup(&[("a.vhd", "")]);
    assert_eq!(s.names(ROOT), ["a.vhd.img"]);
    fs::write(s.path("b.vhd"), "").unwrap();
    fs::create_dir(s.path("sub")).unwrap();
    assert_eq!(s.names(ROOT), ["a.vhd.img", "b.vhd.img", "sub"]);
    fs::rename(s.path("a.vhd"), s.path("c.vhd")).unwrap();
    assert!(s.missing("a.vhd.img"));
    s.find("c.vhd.img");
    fs::remove_file(s.path("b.vhd")).unwrap();
    assert_eq!(s.names(ROOT), ["c.vhd.img", "sub"]);
}

#[test]
fn extents_that_only_their_image_names_do_not_show_beside_it() {
    let s = setup(&[("a.vmdk", "extent=data.vmdk"), ("data.vmdk", "bad"), ("b.vmdk", "")]);
    assert_eq!(s.names(ROOT), ["a.vmdk.img", "b.vmdk.img"]);
}

#[test]
fn the_kernels_cache_is_kept_only_while_the_image_is_the_same() {
    let s = setup(&[("base.vhd", ""), ("a.vhd", "parent=base.vhd")]);
    sleep(Duration::from_millis(80));
    let ino = s.find("a.vhd.img").ino;
    let open = |write| s.tree.open(ino, write, false).unwrap();
    let first = open(false);
    assert!(!first.keep_cache);
    // While it is open nobody else can change it.
    let second = open(false);
    assert!(second.keep_cache);
    s.tree.release(ino, first.handle).unwrap();
    s.tree.release(ino, second.handle).unwrap();
    let third = open(false);
    assert!(third.keep_cache);
    s.tree.release(ino, third.handle).unwrap();
    for changed in ["base.vhd", "a.vhd"] {
        let text = fs::read_to_string(s.path(changed)).unwrap();
        fs::write(s.path(changed), text).unwrap();
        let reader = open(false);
        assert!(!reader.keep_cache, "{changed} changed");
        s.tree.release(ino, reader.handle).unwrap();
        sleep(Duration::from_millis(80));
        s.tree.release(ino, open(false).handle).unwrap();
    }
}

#[test]
fn forgotten_nodes_go_away_and_used_ones_stay_until_released() {
    let s = setup(&[("a.vhd", ""), ("sub/b.vhd", "")]);
    let (a, sub) = (s.find("a.vhd.img").ino, s.find("sub").ino);
    s.find("a.vhd.img");
    let reader = s.tree.open(a, false, false).unwrap().handle;
    s.tree.forget(sub, 1);
    assert_eq!(errno(s.tree.attributes(sub)), libc::ESTALE);
    s.tree.forget(a, 2);
    assert_eq!(s.tree.read(a, reader, 0, &mut [0; 512]).unwrap(), 512);
    s.tree.release(a, reader).unwrap();
    assert_eq!(errno(s.tree.attributes(a)), libc::ESTALE);
    assert_eq!(s.tree.nodes.read().len(), 1);
    s.tree.forget(ROOT, 5);
    s.tree.attributes(ROOT).unwrap();
}

#[test]
fn images_open_and_close_by_name_in_the_root() {
    let s = setup(&[("a.vhd", "")]);
    let other = tempfile::tempdir().unwrap();
    for (name, text) in [("o.vhd", ""), ("bad.vhd", "bad")] {
        fs::write(other.path().join(name), text).unwrap();
    }
    let pin = |name: &str, shown| s.tree.pin(&other.path().join(name), shown);
    assert_eq!(pin("o.vhd", None).unwrap(), "o.vhd.img");
    assert_eq!(kind(pin("o.vhd", None)), ErrorKind::Exists);
    assert_eq!(kind(pin("o.vhd", Some(OsStr::new("a.vhd.img")))), ErrorKind::Exists);
    assert_eq!(kind(pin("bad.vhd", None)), ErrorKind::Corrupt);
    assert_eq!(kind(pin("absent.vhd", None)), ErrorKind::NotFound);
    assert_eq!(kind(s.tree.pin(Path::new("o.vhd"), None)), ErrorKind::InvalidInput);
    assert_eq!(kind(s.tree.pin(Path::new("/x/../nowhere/o.vhd"), None)), ErrorKind::InvalidInput);

    let link = s.tree.link(ROOT, OsStr::new("any.img"), &other.path().join("o.vhd")).unwrap();
    assert_eq!(link.kind, Kind::Link);
    assert_eq!(s.tree.link_target(link.ino).unwrap(), other.path().join("o.vhd"));
    let file = s.find("any.img");
    assert_eq!((file.kind, file.size), (Kind::File, SIZE));
    assert_eq!(s.names(ROOT), ["any.img", "o.vhd.img", "a.vhd.img"]);

    let reader = s.tree.open(file.ino, false, false).unwrap().handle;
    assert_eq!(errno(s.tree.unpin(ROOT, OsStr::new("any.img"))), libc::EBUSY);
    s.tree.release(file.ino, reader).unwrap();
    s.tree.unpin(ROOT, OsStr::new("any.img")).unwrap();
    assert!(s.missing("any.img"));
    assert!(other.path().join("o.vhd").exists());
    assert_eq!(errno(s.tree.unpin(ROOT, OsStr::new("a.vhd.img"))), libc::EROFS);
    assert_eq!(errno(s.tree.unpin(ROOT, OsStr::new("absent"))), libc::ENOENT);
    fs::write(other.path().join("o.vhd"), "bad").unwrap();
    assert_eq!(s.names(ROOT), ["o.vhd.error.txt", "a.vhd.img"]);
    s.find("o.vhd.error.txt");
    s.tree.unpin(ROOT, OsStr::new("o.vhd.error.txt")).unwrap();
    assert_eq!(s.names(ROOT), ["a.vhd.img"]);
}

fn tree_of(sources: &[PathBuf], look: Look) -> Result<Tree> {
    Tree::new(sources, Box::new(FakeOpener(Arc::default())), look)
}

#[test]
fn several_sources_show_by_their_names() {
    let s = setup(&[("a.vhd", ""), ("sub/b.vhd", "")]);
    let tree = tree_of(&[s.path("a.vhd"), s.path("sub")], look()).unwrap();
    let entries = tree.entries(tree.open_folder(ROOT).unwrap()).unwrap();
    let names: Vec<_> = entries[2..].iter().map(|e| (e.name.to_str().unwrap(), e.kind)).collect();
    assert_eq!(names, [("a.vhd.img", Kind::File), ("sub", Kind::Folder)]);
    let sub = tree.lookup(ROOT, OsStr::new("sub")).unwrap();
    tree.lookup(sub.ino, OsStr::new("b.vhd.img")).unwrap();
}

#[test]
fn two_sources_of_one_name_are_refused_by_both_their_paths() {
    let s = setup(&[("a.vhd", ""), ("sub/a.vhd", "")]);
    let refused = tree_of(&[s.path("a.vhd"), s.path("sub/a.vhd")], look()).err().unwrap();
    assert_eq!(refused.kind(), ErrorKind::Exists);
    let text = refused.to_string();
    for name in ["a.vhd", "sub/a.vhd"] {
        assert!(text.contains(s.path(name).canonicalize().unwrap().to_str().unwrap()), "{text}");
    }
}

#[test]
fn sources_that_the_mount_would_cover_are_refused() {
    let s = setup(&[("sub/a.vhd", "")]);
    let mountpoint = s.dir.path().canonicalize().unwrap();
    let look = Look { mountpoint, ..look() };
    for source in [s.path(""), s.path("sub"), s.path("sub/a.vhd")] {
        let refused = tree_of(&[source], look.clone()).err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput, "{refused}");
    }
}

#[test]
fn owner_and_masks_are_as_asked() {
    let look = Look { uid: Some(7), gid: Some(8), fmask: 0o026, dmask: 0o077, ..look() };
    let s = setup_with(look, &[("a.vhd", ""), ("sub/b.vhd", "")]);
    fs::set_permissions(s.path("a.vhd"), std::os::unix::fs::PermissionsExt::from_mode(0o4777))
        .unwrap();
    let (a, sub) = (s.find("a.vhd.img"), s.find("sub"));
    assert_eq!((a.mode, a.uid, a.gid), (0o640, 7, 8));
    assert_eq!((sub.mode, sub.uid, sub.gid), (0o500, 7, 8));
}

#[test]
fn extended_attributes_tell_about_the_image() {
    let s = setup(&[("base.vhd", ""), ("a.vhd", "parent=base.vhd")]);
    let xattrs: HashMap<_, _> =
        s.tree.xattrs(s.find("a.vhd.img").ino).unwrap().into_iter().collect();
    let text = |name: &str| String::from_utf8(xattrs[name].clone()).unwrap();
    assert_eq!(text("user.flatdisk.format"), "vhd");
    assert_eq!(text("user.flatdisk.virtual-size"), SIZE.to_string());
    assert_eq!(text("user.flatdisk.parent"), "base.vhd");
    assert!(text("user.flatdisk.image").ends_with("/a.vhd"));
    assert!(!xattrs.contains_key("user.flatdisk.uuid"));
    assert!(!xattrs.contains_key("user.flatdisk.damage"));
    assert!(s.tree.xattrs(ROOT).unwrap().is_empty());
}

#[test]
fn throw_away_writes_last_until_the_image_is_closed() {
    let scratch = tempfile::tempdir().unwrap();
    let look = Look { nonpersistent: Some(scratch.path().to_owned()), ..look() };
    let s = setup_with(look, &[("a.vhd", "read-only")]);
    let a = s.find("a.vhd.img");
    assert_ne!(a.mode & 0o200, 0);
    let open = |write| s.tree.open(a.ino, write, false).unwrap();
    let read = |handle| {
        let mut buf = [0; 4];
        s.tree.read(a.ino, handle, 4096, &mut buf).unwrap();
        buf
    };
    // A layer that nobody wrote to keeps nothing open.
    s.tree.release(a.ino, open(true).handle).unwrap();
    assert!(s.tree.usage().is_empty());

    let (writer, reader) = (open(true).handle, open(false).handle);
    s.tree.write(a.ino, 4096, b"kept").unwrap();
    s.tree.release(a.ino, writer).unwrap();
    s.tree.release(a.ino, reader).unwrap();
    s.tree.forget(a.ino, 1);
    assert_eq!(s.tree.usage()[0].usage.readers, 0);
    assert!(s.tree.usage()[0].usage.throw_away.is_some());

    assert_eq!(s.find("a.vhd.img").ino, a.ino);
    let again = open(false);
    assert_eq!(&read(again.handle), b"kept");
    s.tree.release(a.ino, again.handle).unwrap();
    s.tree.close_all();
    let after = open(false);
    assert!(!after.keep_cache);
    assert_eq!(read(after.handle), [0; 4]);
    assert!(!s.fake.opens().contains(&Access::Write));
}

#[test]
fn why_an_image_cannot_be_written_can_be_read() {
    let s = setup(&[("base.vhd", ""), ("a.vhd", "parent=base.vhd")]);
    let base = s.find("base.vhd.img").ino;
    let why = || s.tree.xattr(base, "user.flatdisk.readonly".as_ref()).unwrap();
    assert_eq!(why(), None);
    assert!(s.tree.open(base, true, false).is_err());
    let why = String::from_utf8(why().unwrap()).unwrap();
    assert!(why.contains("a.vhd is made from it"), "{why}");
    let reader = s.tree.open(base, false, false).unwrap().handle;
    assert_eq!(s.tree.usage()[0].read_only.as_deref(), Some(&*why));
    s.tree.release(base, reader).unwrap();
}

#[test]
fn a_symlinked_image_is_the_image_itself() {
    let s = setup(&[("sub/a.vhd", "")]);
    symlink("sub/a.vhd", s.path("link.vhd")).unwrap();
    let link = s.find("link.vhd.img");
    assert_eq!(link.kind, Kind::File);
    let image = s.tree.xattrs(link.ino).unwrap().remove(4);
    assert_eq!(image.0, "user.flatdisk.image");
    assert!(image.1.ends_with(b"/sub/a.vhd"));
    let meta = fs::metadata(s.path("sub/a.vhd")).unwrap();
    assert_eq!(identity(&meta).inode, std::os::unix::fs::MetadataExt::ino(&meta));
}
