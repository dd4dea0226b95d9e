//! Converting: every kind of image into every other, streams, children, identities, and what is left when it does
//! not come to an end.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::tools;
use flatdisk::ErrorKind;
use flatdisk::copy::convert::From;
use flatdisk::copy::output::convert_to_pipe;
use flatdisk::copy::{Converted, Opened, Options, Sharing, Source, Target, compare, convert};
use flatdisk::formats::{self, CreateSpec, OpenOptions, Severity};
use flatdisk::progress::Progress;
use flatdisk::storage::file::HostFs;
use flatdisk::storage::{Access, Host};

/// No multiple of any block or grain.
const SIZE: u64 = (3 << 20) + 5 * 512;
/// The same for sectors of 4096 bytes.
const SIZE_4096: u64 = (3 << 20) + 3 * 4096;

/// Format, subformat, logical sector.
type Kind = (&'static str, &'static str, u32);

const KINDS: [Kind; 16] = [
    ("raw", "", 512),
    ("vhd", "dynamic", 512),
    ("vhd", "fixed", 512),
    ("vhdx", "dynamic", 512),
    ("vhdx", "fixed", 512),
    ("vhdx", "dynamic", 4096),
    ("vhdx", "fixed", 4096),
    ("vmdk", "monolithicSparse", 512),
    ("vmdk", "monolithicFlat", 512),
    ("vmdk", "twoGbMaxExtentSparse", 512),
    ("vmdk", "twoGbMaxExtentFlat", 512),
    ("vmdk", "vmfs", 512),
    ("vmdk", "vmfsThin", 512),
    ("vmdk", "vmfsSparse", 512),
    ("vmdk", "vmfsEagerZeroedThick", 512),
    ("vmdk", "streamOptimized", 512),
];

fn spec((_, subformat, sector): Kind, size: u64) -> CreateSpec {
    let subformat = (!subformat.is_empty()).then(|| subformat.to_owned());
    CreateSpec { subformat, size, logical_sector: Some(sector), ..CreateSpec::default() }
}

fn path(dir: &Path, name: &str, kind: Kind) -> PathBuf {
    dir.join(format!("{name}-{}-{}.{}", kind.1, kind.2, kind.0))
}

/// A disk with data, zeroes and holes, some of each smaller than a block and across the borders of
/// blocks, up to its very end.
fn contents(size: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(size);
    let mut bytes = vec![0; size as usize];
    let end = size as usize;
    for (at, len) in [
        (0, 70_000),
        (200_000, 5),
        ((1 << 20) - 3000, 6000),
        (2_000_000, 300_000),
        (2_600_000, 4096),
        (end - 700, 700),
    ] {
        random.fill(&mut bytes[at..at + len]);
    }
    bytes[1_500_000..1_600_000].fill(b'A');
    bytes
}

fn open(path: &Path) -> flatdisk::Result<Opened> {
    let raw = path.extension().is_some_and(|e| e == "raw");
    Opened::open(&HostFs::shared(), path, &OpenOptions::new(Access::Read), raw)
}

fn convert_file(
    from: &Path,
    to: &Path,
    kind: Kind,
    options: &Options<'_>,
) -> flatdisk::Result<Converted> {
    let opened = open(from)?;
    let source = Source::Disk(opened.disk.clone());
    let from = From { source: &source, image: opened.image.as_ref() };
    convert(&HostFs::shared(), &from, to, Target::by_name(kind.0)?, options, &())
}

fn to_kind(from: &Path, to: &Path, kind: Kind) -> flatdisk::Result<Converted> {
    convert_file(from, to, kind, &Options { spec: spec(kind, 0), ..Options::default() })
}

/// The errors that a check finds.
fn errors(path: &Path) -> Vec<String> {
    let report = formats::check(&HostFs::shared(), path, &OpenOptions::new(Access::Read)).unwrap();
    let bad = report.findings.iter().filter(|f| f.severity != Severity::Notice);
    bad.map(|f| f.what.clone()).collect()
}

/// Bytes of the host that an image's files take.
fn stored(path: &Path) -> u64 {
    open(path).unwrap().disk.allocated().unwrap()
}

/// What QEMU calls a format; `None` for what it does not read.
fn qemu_name(kind: Kind) -> Option<&'static str> {
    match kind {
        (_, _, 4096) => None,
        ("vhd", ..) => Some("vpc"),
        (name, ..) => Some(name),
    }
}

/// Three generations, each with a part of the contents, and zeroes over data of its parent.
fn chain(dir: &Path, format: &str, contents: &[u8]) -> PathBuf {
    let host = HostFs::shared();
    let format = formats::by_name(format).unwrap();
    let name = |generation: usize| dir.join(format!("chain{generation}.{}", format.name()));
    let size = contents.len() as u64;
    formats::create(format, &*host, &name(0), &CreateSpec { size, ..CreateSpec::default() })
        .unwrap();
    for generation in 0..3 {
        if generation > 0 {
            let parent = name(generation - 1);
            let parent = formats::open(&host, &parent, &OpenOptions::new(Access::Read)).unwrap();
            let spec = CreateSpec::default();
            formats::create_child(format, &*host, &name(generation), &parent, &spec).unwrap();
        }
        let options = OpenOptions::new(Access::Write);
        let disk = formats::open(&host, &name(generation), &options).unwrap().disk;
        // Wrong in the base, right in the youngest.
        let part = contents.len() / 3 / 512 * 512;
        match generation {
            0 => disk.write_at(0, &vec![0xee; contents.len() - 512]).unwrap(),
            1 => disk.write_at(0, &contents[..2 * part]).unwrap(),
            _ => disk.write_at(part as u64, &contents[part..]).unwrap(),
        }
        disk.close().unwrap();
    }
    name(2)
}

#[test]
fn every_kind_converts_into_every_other() {
    let dir = common::folder();
    let dir = dir.path();
    let qemu = tools::have("qemu-img");
    let mut sources = Vec::new();
    for (size, sector) in [(SIZE, 512), (SIZE_4096, 4096)] {
        let raw = dir.join(format!("contents{sector}.raw"));
        fs::write(&raw, contents(size)).unwrap();
        for kind in KINDS.into_iter().filter(|kind| kind.2 == sector) {
            let source = path(dir, "source", kind);
            to_kind(&raw, &source, kind).unwrap();
            sources.push((source, sector, raw.clone()));
        }
    }
    for format in ["vhd", "vhdx", "vmdk"] {
        let image = chain(dir, format, &contents(SIZE));
        sources.push((image, 512, dir.join("contents512.raw")));
    }
    let pairs: Vec<_> =
        sources.iter().flat_map(|source| KINDS.iter().map(move |kind| (source, *kind))).collect();
    common::in_parallel(&pairs, |((source, sector, raw), kind)| {
        let name = format!("{} to {kind:?}", source.display());
        let target = path(dir, &source.file_name().unwrap().to_string_lossy(), *kind);
        let made = to_kind(source, &target, *kind);
        let raw_source = source.extension().is_some_and(|e| e == "raw");
        if *sector != kind.2 && kind.0 != "raw" && !raw_source {
            assert!(made.is_err(), "{name}");
            return;
        }
        if *sector == 512 && kind.2 == 4096 {
            assert_eq!(made.unwrap_err().kind(), ErrorKind::InvalidInput, "{name}");
            return;
        }
        made.unwrap_or_else(|e| panic!("{name}: {e}"));
        let one = open(raw).unwrap().disk;
        let other = open(&target).unwrap().disk;
        assert_eq!(compare(&one, &other, &()).unwrap(), None, "{name}");
        assert_eq!(one.size(), other.size(), "{name}");
        drop((one, other));
        if kind.0 != "raw" {
            assert_eq!(errors(&target), Vec::<String>::new(), "{name}");
        }
        if let (true, Some(format)) = (qemu, qemu_name(*kind)) {
            let mut compare = Command::new("qemu-img");
            compare.args(["compare", "-f", "raw", "-F", format]).args([raw, &target]);
            tools::run(&mut compare);
        }
        fs::remove_file(&target).unwrap();
    });
    let left = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    let unfinished = left.filter(|name| flatdisk::storage::staged::is_unfinished(name)).count();
    assert_eq!(unfinished, 0);
}

#[test]
fn zeroes_and_holes_take_no_space_in_any_target() {
    let dir = common::folder();
    let dir = dir.path();
    let raw = dir.join("zeroes.raw");
    let mut bytes = vec![0; 40 << 20];
    bytes[5 << 20..][..10_000].fill(7);
    fs::write(&raw, bytes).unwrap();
    for kind in KINDS {
        if kind.1 == "vmfsEagerZeroedThick" {
            continue;
        }
        let target = path(dir, "t", kind);
        to_kind(&raw, &target, kind).unwrap();
        let stored = stored(&target);
        assert!(stored < 3 << 20, "{kind:?}: {stored}");
    }
}

#[test]
fn a_stream_through_a_pipe_is_the_one_in_a_file() {
    let dir = common::folder();
    let raw = dir.path().join("a.raw");
    fs::write(&raw, contents(SIZE)).unwrap();
    for kind in [("vmdk", "streamOptimized", 512), ("vhd", "fixed", 512), ("raw", "", 512)] {
        let opened = open(&raw).unwrap();
        let source = Source::Disk(opened.disk.clone());
        let from = From { source: &source, image: None };
        let options = Options { spec: spec(kind, 0), ..Options::default() };
        let mut out = Vec::new();
        let target = Target::by_name(kind.0).unwrap();
        convert_to_pipe(&from, &mut out, Path::new("a.vmdk"), target, &options, &()).unwrap();
        let piped = path(dir.path(), "piped", kind);
        fs::write(&piped, out).unwrap();
        let disk = open(&piped).unwrap().disk;
        assert_eq!(compare(&opened.disk, &disk, &()).unwrap(), None);
        let read = fs::read(&raw).unwrap();
        let source = Source::Stream {
            from: parking_lot::Mutex::new(Box::new(std::io::Cursor::new(read))),
            size: SIZE,
        };
        let from = From { source: &source, image: None };
        let again = path(dir.path(), "again", kind);
        convert(&HostFs::shared(), &from, &again, target, &options, &()).unwrap();
        let disk = open(&again).unwrap().disk;
        assert_eq!(compare(&opened.disk, &disk, &()).unwrap(), None, "{kind:?}");
    }
}

#[test]
fn a_child_of_a_base_stores_what_differs() {
    let dir = common::folder();
    let dir = dir.path();
    for format in ["vhd", "vhdx", "vmdk"] {
        let kind = (format, "", 512);
        let base = dir.join(format!("base.{format}"));
        let raw = dir.join("base.raw");
        let mut bytes = contents(SIZE);
        fs::write(&raw, &bytes).unwrap();
        to_kind(&raw, &base, kind).unwrap();
        bytes[50_000..60_000].fill(1);
        // Zeroes over data of the base.
        bytes[2_000_000..2_100_000].fill(0);
        let changed = dir.join("changed.raw");
        fs::write(&changed, &bytes).unwrap();
        let child = dir.join(format!("child.{format}"));
        let parent = formats::open(&HostFs::shared(), &base, &OpenOptions::new(Access::Read));
        let parent = parent.unwrap();
        let options = Options { parent: Some(&parent), verify: true, ..Options::default() };
        convert_file(&changed, &child, kind, &options).unwrap();
        let made = open(&child).unwrap();
        assert_eq!(compare(&made.disk, &open(&changed).unwrap().disk, &()).unwrap(), None);
        assert!(made.image.unwrap().parent.is_some());
        assert!(errors(&child).is_empty(), "{format}");
    }
}

#[test]
fn identities_are_new_unless_they_are_to_be_kept() {
    let dir = common::folder();
    let dir = dir.path();
    for kind in [("vhd", "dynamic", 512), ("vhdx", "dynamic", 512), ("vmdk", "", 512)] {
        let raw = dir.join("a.raw");
        fs::write(&raw, contents(SIZE)).unwrap();
        let [a, b, c] = ["a", "b", "c"].map(|name| path(dir, name, kind));
        to_kind(&raw, &a, kind).unwrap();
        to_kind(&a, &b, kind).unwrap();
        let options = Options { spec: spec(kind, 0), keep_id: true, ..Options::default() };
        convert_file(&a, &c, kind, &options).unwrap();
        let [a, b, c] = [a, b, c].map(|path| open(&path).unwrap().image.unwrap());
        assert_ne!(a.identity, b.identity, "{kind:?}");
        assert_ne!(a.info.uuid, b.info.uuid, "{kind:?}");
        assert_eq!(a.identity, c.identity, "{kind:?}");
        assert_eq!(a.info.uuid, c.info.uuid, "{kind:?}");
    }
}

/// Ends the work after a number of bytes.
struct Ending(AtomicU64);

impl Progress for Ending {
    fn advance(&self, bytes: u64) {
        let left = self.0.load(Ordering::Relaxed);
        self.0.store(left.saturating_sub(bytes), Ordering::Relaxed);
    }

    fn cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 0
    }
}

#[test]
fn work_that_is_ended_leaves_what_was_there() {
    let dir = common::folder();
    let dir = dir.path();
    let raw = dir.join("a.raw");
    fs::write(&raw, contents(SIZE)).unwrap();
    let names = || {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    for kind in KINDS.into_iter().filter(|kind| kind.2 == 512) {
        let target = path(dir, "t", kind);
        fs::write(&target, "old").unwrap();
        let before = names();
        for bytes in [1, 300_000, 2_000_000, SIZE - 1] {
            let opened = open(&raw).unwrap();
            let source = Source::Disk(opened.disk);
            let from = From { source: &source, image: None };
            let format = Target::by_name(kind.0).unwrap();
            let options = Options { spec: spec(kind, 0), replace: true, ..Options::default() };
            let ending = Ending(AtomicU64::new(bytes));
            let host = HostFs::shared();
            let ended = convert(&host, &from, &target, format, &options, &ending).unwrap_err();
            assert_eq!(ended.kind(), ErrorKind::Cancelled);
            assert_eq!((fs::read(&target).unwrap(), names()), (b"old".to_vec(), before.clone()));
        }
        // What a killed program leaves goes with the next.
        fs::write(
            dir.join(format!(".flatdisk-part0.{}", target.file_name().unwrap().display())),
            "x",
        )
        .unwrap();
        fs::remove_file(&target).unwrap();
        to_kind(&raw, &target, kind).unwrap();
        let unfinished = |name: &std::ffi::OsString| flatdisk::storage::staged::is_unfinished(name);
        assert!(!names().iter().any(unfinished), "{kind:?}");
    }
}

#[test]
fn what_must_not_be_the_target_is_refused() {
    let dir = common::folder();
    let dir = dir.path();
    let raw = dir.join("a.raw");
    fs::write(&raw, contents(SIZE)).unwrap();
    let flat = ("vmdk", "monolithicFlat", 512);
    let image = dir.join("flat.vmdk");
    to_kind(&raw, &image, flat).unwrap();
    let replace = |kind| Options { spec: spec(kind, 0), replace: true, ..Options::default() };
    for target in ["flat.vmdk", "flat-flat.vmdk"] {
        let kind = ("raw", "", 512);
        let e = convert_file(&image, &dir.join(target), kind, &replace(kind)).unwrap_err();
        assert!(e.to_string().contains("the target is the source"), "{e}");
    }
    // An extent of the target would be one of the source.
    let e = convert_file(&dir.join("flat.vmdk"), &dir.join("flat.VMDK"), flat, &replace(flat));
    assert!(e.unwrap_err().to_string().contains("the target is the source"));
    let e = to_kind(&raw, &image, flat).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Exists);
    let large = CreateSpec { size: 2041 << 30, ..spec(("vhd", "dynamic", 512), 0) };
    let options = Options { spec: large, ..Options::default() };
    let e = convert_file(&raw, &dir.join("l.vhd"), ("vhd", "dynamic", 512), &options).unwrap_err();
    assert!(e.to_string().contains("VHDX"), "{e}");
    assert_eq!(compare(&open(&raw).unwrap().disk, &open(&image).unwrap().disk, &()).unwrap(), None);
}

#[test]
fn what_cannot_be_read_is_zero_and_listed_where_that_is_wanted() {
    let dir = common::folder();
    let dir = dir.path();
    let raw = dir.join("a.raw");
    let bytes: Vec<u8> = (0..1 << 20).map(|at: u32| (at / 512) as u8 | 1).collect();
    fs::write(&raw, &bytes).unwrap();
    let image = dir.join("a.vmdk");
    to_kind(&raw, &image, ("vmdk", "streamOptimized", 512)).unwrap();
    // Damages the compressed data of the third grain.
    let mut stream = fs::read(&image).unwrap();
    let head = (2u64 * 128).to_le_bytes();
    let at = (0..stream.len()).step_by(512).find(|at| {
        *at >= 128 * 512 && stream[*at..].starts_with(&head) && stream[at + 8..at + 12] != [0; 4]
    });
    stream[at.unwrap() + 20] ^= 0xff;
    fs::write(&image, stream).unwrap();
    let kind = ("vhdx", "dynamic", 512);
    let to = dir.join("b.vhdx");
    let e = to_kind(&image, &to, kind).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Corrupt);
    assert!(!to.exists());
    let options = Options { spec: spec(kind, 0), salvage: true, ..Options::default() };
    let made = convert_file(&image, &to, kind, &options).unwrap();
    let lost: Vec<_> = made.lost.iter().map(|lost| (lost.start, lost.end)).collect();
    assert_eq!(lost, [(128 << 10, 192 << 10)]);
    let mut expected = bytes;
    expected[128 << 10..192 << 10].fill(0);
    let mut read = vec![0; expected.len()];
    open(&to).unwrap().disk.read_at(0, &mut read).unwrap();
    assert!(read == expected);
}

#[test]
fn blocks_are_shared_where_the_host_can_and_never_where_it_cannot() {
    let dir = common::folder();
    let raw = dir.path().join("a.raw");
    fs::write(&raw, contents(SIZE)).unwrap();
    let kind = ("vhdx", "dynamic", 512);
    let options = |sharing| Options { spec: spec(kind, 0), sharing, ..Options::default() };
    let always = convert_file(&raw, &dir.path().join("a.vhdx"), kind, &options(Sharing::Always));
    match always {
        Ok(made) => assert!(made.shared > 0),
        Err(e) => assert_eq!(e.kind(), ErrorKind::Unsupported),
    }
    let never = convert_file(&raw, &dir.path().join("b.vhdx"), kind, &options(Sharing::Never));
    assert_eq!(never.unwrap().shared, 0);
}

/// Opens with the host's own trait, so that the import of it is used everywhere.
#[test]
fn a_target_that_another_program_is_making_is_left_to_it() {
    let dir = common::folder();
    let raw = dir.path().join("a.raw");
    fs::write(&raw, contents(SIZE)).unwrap();
    let host: Arc<dyn Host> = HostFs::shared();
    let busy = host.create(&dir.path().join(".flatdisk-part0.a.vhdx")).unwrap();
    let target = dir.path().join("a.vhdx");
    let kind = ("vhdx", "dynamic", 512);
    assert_eq!(to_kind(&raw, &target, kind).unwrap_err().kind(), ErrorKind::Busy);
    drop(busy);
    to_kind(&raw, &target, kind).unwrap();
}
