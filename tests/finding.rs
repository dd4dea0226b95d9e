//! Parents and extents that are not where the image says, or are called otherwise.

// The helpers here serve tests only.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::tools;
use flatdisk::error::{Error, ErrorKind, Result};
use flatdisk::formats::{self, CreateSpec, Image, OpenOptions, Spelling};
use flatdisk::storage::file::HostFs;
use flatdisk::storage::{Access, Entry, Host, Storage};
use tempfile::TempDir;

const FORMATS: [&str; 3] = ["vhd", "vhdx", "vmdk"];
const MIB: u64 = 1 << 20;

/// A folder with `vm/Disk.FORMAT`, written once, and its child `vm/child.FORMAT`.
struct Family {
    dir: TempDir,
    format: &'static str,
}

impl Family {
    fn new(format: &'static str) -> Self {
        let family = Self { dir: tempfile::tempdir().unwrap(), format };
        fs::create_dir(family.dir.path().join("vm")).unwrap();
        let base = family.path("Disk");
        create(&base, 7);
        let parent = open(&base, &OpenOptions::new(Access::Read)).unwrap();
        let format = formats::by_name(format).unwrap();
        let spec = CreateSpec::default();
        formats::create_child(format, &HostFs, &family.path("child"), &parent, &spec).unwrap();
        family
    }

    /// The image called `name`, in the folder `vm`, or where the name leads from there.
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("vm").join(format!("{name}.{}", self.format))
    }

    fn rename(&self, from: &str, to: &str) {
        let to = self.path(to);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::rename(self.path(from), to).unwrap();
    }

    fn open(&self, options: &OpenOptions) -> Result<Image> {
        open(&self.path("child"), options)
    }

    /// The parent that the child finds, which shows what the base holds.
    fn parent(&self, options: &OpenOptions) -> String {
        let image = self.open(options).unwrap_or_else(|e| panic!("{e}"));
        let mut sector = [0; 512];
        image.disk.read_at(4096, &mut sector).unwrap();
        assert_eq!(sector, [7; 512]);
        image.parent.unwrap().path.file_stem().unwrap().to_str().unwrap().to_owned()
    }

    fn missing(&self, options: &OpenOptions) -> Error {
        let e = self.open(options).expect_err("the parent is not found");
        assert_eq!(e.kind(), ErrorKind::ParentMissing, "{e}");
        e
    }
}

fn open(path: &Path, options: &OpenOptions) -> Result<Image> {
    formats::open(&HostFs::shared(), path, options)
}

/// An image of 2 MiB with one sector of `byte`.
fn create(path: &Path, byte: u8) {
    let format = formats::by_extension(path).unwrap();
    let spec = CreateSpec { size: 2 * MIB, ..CreateSpec::default() };
    formats::create(format, &HostFs, path, &spec).unwrap();
    let image = open(path, &OpenOptions::new(Access::Write)).unwrap();
    image.disk.write_at(4096, &[byte; 512]).unwrap();
    image.disk.close().unwrap();
}

fn plain() -> OpenOptions {
    OpenOptions::new(Access::Read)
}

#[test]
fn a_parent_is_found_by_the_only_name_most_like_its_own() {
    for format in FORMATS {
        let family = Family::new(format);
        family.rename("Disk", "DISK");
        assert_eq!(family.parent(&plain()), "DISK");
        // Another disk under another spelling is no parent, and which spelling is meant no guess.
        create(&family.path("disk"), 1);
        assert_eq!(family.parent(&plain()), "DISK", "found by its id");
        fs::copy(family.path("DISK"), family.path("dISK")).unwrap();
        let e = family.missing(&plain());
        for name in ["DISK", "dISK", "each of these may be it", "rebase --unsafe"] {
            assert!(e.to_string().contains(name), "{e}");
        }
        family.rename("dISK", "Disk");
        assert_eq!(family.parent(&plain()), "Disk");
    }
}

#[test]
fn a_parent_is_found_however_its_letters_are_composed() {
    for format in FORMATS {
        let family = Family::new(format);
        let (composed, apart) = ("Gr\u{f6}\u{df}e", "Gro\u{308}\u{df}e");
        family.rename("Disk", composed);
        let base = open(&family.path(composed), &plain()).unwrap();
        let child = family.path("child");
        fs::remove_file(&child).unwrap();
        let driver = formats::by_name(format).unwrap();
        formats::create_child(driver, &HostFs, &child, &base, &CreateSpec::default()).unwrap();
        drop(base);
        family.rename(composed, apart);
        assert_eq!(family.parent(&plain()), apart);
    }
}

#[test]
fn a_parent_of_any_name_is_found_by_its_id_where_that_is_permitted() {
    for format in FORMATS {
        let family = Family::new(format);
        family.rename("Disk", "renamed");
        assert_eq!(family.parent(&plain()), "renamed");
        let image = family.open(&plain()).unwrap();
        assert!(image.info.warnings.iter().any(|w| w.contains("was found by its")), "{format}");
        // Elsewhere only in a folder that is permitted, or mounted, and in those beneath it.
        family.rename("renamed", "../other/deep/er/moved");
        family.missing(&plain());
        let outside = family.dir.path().join("other");
        symlink(&outside, family.dir.path().join("vm/linked")).unwrap();
        symlink(family.path("../other/deep/er/moved"), family.path("link")).unwrap();
        family.missing(&OpenOptions { sources: vec![family.dir.path().join("vm")], ..plain() });
        let permitted = OpenOptions { allow_parent: vec![outside.clone()], ..plain() };
        assert_eq!(family.parent(&permitted), "moved");
        let mounted = OpenOptions { sources: vec![family.dir.path().to_owned()], ..plain() };
        assert_eq!(family.parent(&mounted), "moved");
        // A hard link is no second image, a copy is.
        fs::hard_link(
            family.path("../other/deep/er/moved"),
            outside.join("same").with_extension(format),
        )
        .unwrap();
        family.parent(&OpenOptions { folders: Arc::default(), ..permitted.clone() });
        fs::copy(
            family.path("../other/deep/er/moved"),
            outside.join("copy").with_extension(format),
        )
        .unwrap();
        let e = family.missing(&OpenOptions { folders: Arc::default(), ..permitted });
        assert!(e.what().contains("copy") && e.what().contains("may be it"), "{e}");
    }
}

#[test]
fn an_id_that_disks_share_before_they_are_written_is_not_searched_for() {
    let family = Family::new("vmdk");
    let (base, child) = (family.path("Disk"), family.path("child"));
    for path in [&base, &child] {
        fs::remove_file(path).unwrap();
    }
    let format = formats::by_name("vmdk").unwrap();
    let spec = CreateSpec { size: 2 * MIB, ..CreateSpec::default() };
    formats::create(format, &HostFs, &base, &spec).unwrap();
    let parent = open(&base, &plain()).unwrap();
    formats::create_child(format, &HostFs, &child, &parent, &spec).unwrap();
    drop(parent);
    open(&child, &plain()).unwrap();
    family.rename("Disk", "unlike");
    family.missing(&plain());
    family.rename("unlike", "disk");
    open(&child, &plain()).unwrap();
}

/// Counts what is opened.
#[derive(Debug, Default)]
struct Counting(AtomicUsize);

impl Host for Counting {
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        HostFs.open(path, access)
    }

    fn open_beneath(&self, root: &Path, name: &Path, access: Access) -> Result<Arc<dyn Storage>> {
        self.0.fetch_add(1, Ordering::Relaxed);
        HostFs.open_beneath(root, name, access)
    }

    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        HostFs.create(path)
    }

    fn replace(&self, path: &Path, contents: &[u8]) -> Result<()> {
        HostFs.replace(path, contents)
    }

    fn remove(&self, path: &Path) -> Result<()> {
        HostFs.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> Result<()> {
        HostFs.sync_dir(dir)
    }

    fn list(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        HostFs.list(dir)
    }

    fn list_beneath(&self, root: &Path, dir: &Path, limit: usize) -> Result<Vec<Entry>> {
        HostFs.list_beneath(root, dir, limit)
    }
}

#[test]
fn ten_thousand_files_are_not_read_anew_for_every_child_without_a_parent() {
    const FILES: usize = 10_000;
    const CHILDREN: usize = 100;
    let family = Family::new("vhdx");
    fs::remove_file(family.path("Disk")).unwrap();
    for number in 0..FILES {
        fs::write(family.path(&format!("{number}")), "").unwrap();
    }
    let counting = Arc::new(Counting::default());
    let host: Arc<dyn Host> = counting.clone();
    let options = OpenOptions::new(Access::Peek);
    for _ in 0..CHILDREN {
        let e = formats::open(&host, &family.path("child"), &options).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::ParentMissing, "{e}");
    }
    let opened = counting.0.load(Ordering::Relaxed);
    assert!(opened >= FILES, "only {opened} files looked at");
    assert!(opened < FILES * CHILDREN / 4, "{opened} files opened");
}

/// A descriptor of flat extents of 1 MiB.
fn descriptor(extents: &[&str]) -> String {
    let lines: Vec<_> = extents.iter().map(|name| format!("RW 2048 FLAT \"{name}\" 0")).collect();
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=1234abcd\nparentCID=ffffffff\n\
         createType=\"twoGbMaxExtentFlat\"\n{}\n",
        lines.join("\n")
    )
}

fn first_byte(path: &Path, options: &OpenOptions) -> Result<u8> {
    let image = open(path, options)?;
    let mut sector = [0; 512];
    image.disk.read_at(0, &mut sector)?;
    Ok(sector[0])
}

#[test]
fn an_extent_is_found_by_the_only_name_most_like_its_own() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path();
    let path = dir.join("Win.vmdk");
    let extent = |name: &str, byte| fs::write(dir.join(name), vec![byte; MIB as usize]).unwrap();
    fs::write(&path, descriptor(&["Parts\\Win-f001.vmdk", "Win-f002.vmdk"])).unwrap();
    fs::create_dir(dir.join("PARTS")).unwrap();
    extent("PARTS/WIN-F001.VMDK", 1);
    extent("win-f002.vmdk", 2);
    let image = open(&path, &OpenOptions::new(Access::Write)).unwrap();
    let mut sector = [0; 512];
    image.disk.read_at(MIB, &mut sector).unwrap();
    assert_eq!(sector, [2; 512]);
    drop(image);
    assert_eq!(first_byte(&path, &plain()).unwrap(), 1);

    // Two may be meant, until one has the very name.
    extent("WIN-f002.vmdk", 3);
    let e = first_byte(&path, &OpenOptions { folders: Arc::default(), ..plain() }).unwrap_err();
    assert!(e.what().contains("WIN-f002.vmdk") && e.what().contains("win-f002.vmdk"), "{e}");
    extent("Win-f002.vmdk", 4);
    assert_eq!(first_byte(&path, &plain()).unwrap(), 1);
    for name in ["Win-f002.vmdk", "WIN-f002.vmdk", "win-f002.vmdk"] {
        fs::remove_file(dir.join(name)).unwrap();
    }
    // What only leads to a file is none.
    extent("elsewhere", 5);
    symlink("elsewhere", dir.join("win-F002.vmdk")).unwrap();
    let e = first_byte(&path, &plain()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::NotFound, "{e}");
}

#[test]
fn an_extent_named_by_a_path_is_taken_where_permitted_and_else_from_beside() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path().canonicalize().unwrap();
    let (vm, other) = (dir.join("vm"), dir.join("other"));
    for folder in [&vm, &other] {
        fs::create_dir(folder).unwrap();
    }
    fs::write(other.join("far.img"), vec![9; MIB as usize]).unwrap();
    let spelling = Spelling { allow_parent: "--way-in DIR", ..Spelling::default() };
    let permitted = OpenOptions { allow_parent: vec![other.clone()], spelling, ..plain() };
    let mounted = OpenOptions { sources: vec![dir.clone()], spelling, ..plain() };
    let far = other.join("far.img");
    for name in [far.to_str().unwrap(), "../other/far.img", r"..\other\far.img"] {
        let path = vm.join("disk.vmdk");
        fs::write(&path, descriptor(&[name])).unwrap();
        assert_eq!(first_byte(&path, &permitted).unwrap(), 9, "{name}");
        // Nothing but its name tells an extent: that its folder is mounted permits nothing.
        let e = first_byte(&path, &mounted).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Denied, "{name}: {e}");
        assert!(e.to_string().contains("--way-in DIR"), "{name}: {e}");
        assert!(e.to_string().contains("`far.img` beside the image"), "{name}: {e}");
    }
    fs::write(vm.join("Far.img"), vec![8; MIB as usize]).unwrap();
    for name in [far.to_str().unwrap(), "../other/far.img", r"E:\vms\far.img", "/Users/u/far.img"] {
        let path = vm.join("disk.vmdk");
        fs::write(&path, descriptor(&[name])).unwrap();
        assert_eq!(first_byte(&path, &plain()).unwrap(), 8, "{name}");
    }
    for name in ["http://host/far.img", "/x/far.img/", "/x/.."] {
        let path = vm.join("disk.vmdk");
        fs::write(&path, descriptor(&[name])).unwrap();
        let e = first_byte(&path, &permitted).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Denied, "{name}: {e}");
    }
}

fn flatdisk(dir: &Path, arguments: &[&str]) -> Output {
    tools::output(Command::new(env!("CARGO_BIN_EXE_flatdisk")).current_dir(dir).args(arguments))
}

fn succeed(dir: &Path, arguments: &[&str]) -> Output {
    let output = flatdisk(dir, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", tools::both(&output));
    output
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn a_chain_shows_as_far_as_it_is_there() {
    for format in FORMATS {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path();
        let [a, b, c] = ["a", "b", "c"].map(|name| format!("{name}.{format}"));
        succeed(dir, &["create", "-q", "--size", "3M", &a]);
        succeed(dir, &["create", "-q", "--parent", &a, &b]);
        succeed(dir, &["create", "-q", "--parent", &b, &c]);
        fs::remove_file(dir.join(&a)).unwrap();
        let shown = flatdisk(dir, &["info", "--chain", &c]);
        let (out, error) = (text(&shown.stdout), text(&shown.stderr));
        assert_eq!(shown.status.code(), Some(1), "{error}");
        assert!(out.starts_with(&c) && out.contains(&format!("\n./{b}\n")), "{out}");
        assert!(error.lines().count() == 1 && error.contains("was not found"), "{error}");
        assert!(error.contains("--parent-dir DIR") && !error.contains("-o "), "{error}");
        let shown = flatdisk(dir, &["info", "--chain", "--json", &c]);
        let json: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
        assert_eq!(json["images"].as_array().unwrap().len(), 2);
        assert!(json["missing"].as_str().unwrap().contains("was not found"), "{json}");
    }
}

#[test]
fn a_link_that_later_commands_refuse_is_said_to_be_one() {
    for format in FORMATS {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path();
        let [base, child] = ["base", "child"].map(|name| format!("{name}.{format}"));
        succeed(dir, &["create", "-q", "--size", "3M", &base]);
        fs::create_dir(dir.join("far")).unwrap();
        succeed(dir, &["create", "-q", "--parent", &base, &child]);
        let moved = format!("far/{base}");
        let near = succeed(dir, &["rebase", "--unsafe", &child, "--parent", &base]);
        assert_eq!(text(&near.stderr), "");
        fs::rename(dir.join(&base), dir.join(&moved)).unwrap();
        fs::create_dir(dir.join("vm")).unwrap();
        fs::rename(dir.join(&child), dir.join("vm").join(&child)).unwrap();
        let child = format!("vm/{child}");
        let far = succeed(dir, &["rebase", "--unsafe", &child, "--parent", &moved]);
        assert!(text(&far.stderr).contains("later commands refuse it"), "{far:?}");
        assert!(text(&far.stderr).contains("--parent-dir"), "{far:?}");
        succeed(dir, &["info", "--chain", "--parent-dir", "far", &child]);
    }
}

#[test]
fn merging_removes_no_file_that_the_child_merely_names() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path();
    succeed(dir, &["create", "-q", "--size", "2M", "base.vmdk"]);
    succeed(dir, &["create", "-q", "--parent", "base.vmdk", "child.vmdk"]);
    let base = open(&dir.join("base.vmdk"), &plain()).unwrap().identity.to_string();
    let cid = base.rsplit(' ').next().unwrap();
    for name in
        ["notes.vmdk", "base-flat.vmdk", "child-s001.vmdk", "child-s002.vmdk", "sub-s003.vmdk"]
    {
        fs::write(dir.join(name), vec![6; 512 << 10]).unwrap();
    }
    let text_of_child = format!(
        "# Disk DescriptorFile\nversion=1\nCID=0badcafe\nparentCID={cid}\ncreateType=\"custom\"\n\
         parentFileNameHint=\"base.vmdk\"\nRW 1024 FLAT \"notes.vmdk\" 0\n\
         RW 1024 FLAT \"base-flat.vmdk\" 0\nRW 1024 FLAT \"child-s001.vmdk\" 0\n\
         RDONLY 1024 FLAT \"child-s002.vmdk\" 0\n"
    );
    fs::write(dir.join("child.vmdk"), text_of_child).unwrap();
    let merged = succeed(dir, &["commit", "child.vmdk"]);
    let mut left: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    left.sort();
    let kept = ["base-flat.vmdk", "base.vmdk", "child-s002.vmdk", "notes.vmdk", "sub-s003.vmdk"];
    assert_eq!(left, kept);
    let said = text(&merged.stderr);
    assert!(said.contains("notes.vmdk: left") && said.contains("child-s002.vmdk: left"), "{said}");
    assert_eq!(first_byte(&dir.join("base.vmdk"), &plain()).unwrap(), 6);
}
