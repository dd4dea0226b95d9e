//! Children: reading through to the parent, sector bitmaps, links.

use std::path::Path;
use std::sync::Arc;

use fastrand::Rng;

use super::{MIB, PATH, Vhdx, contents, open_with, spec};
use crate::disk::map::Source;
use crate::error::ErrorKind;
use crate::formats::{self, CreateSpec, Image, OpenOptions, vhdx};
use crate::storage::memory::MemoryHost;
use crate::storage::{Access, Host, Storage};

const BASE: &str = "/d/base.vhdx";

/// A host with a parent that holds `bytes` from the start of its disk, and a child at [`PATH`].
fn family(spec: &CreateSpec, bytes: &[u8]) -> (Arc<MemoryHost>, Arc<dyn Host>) {
    let memory = MemoryHost::new();
    let host: Arc<dyn Host> = memory.clone();
    formats::create(&Vhdx, &*host, Path::new(BASE), spec).unwrap();
    let base = open_with(&host, BASE, Access::Write).unwrap();
    base.disk.write_at(0, bytes).unwrap();
    base.disk.close().unwrap();
    child(&host, PATH, BASE, spec.block_size);
    (memory, host)
}

fn child(host: &Arc<dyn Host>, path: &str, parent: &str, block_size: Option<u64>) {
    let parent = open_with(host, parent, Access::Read).unwrap();
    let spec = CreateSpec { block_size, ..CreateSpec::default() };
    vhdx::create_child(&**host, Path::new(path), &parent, &spec).unwrap();
}

fn open(host: &Arc<dyn Host>, path: &str) -> Image {
    open_with(host, path, Access::Write).unwrap()
}

fn no_errors(host: &Arc<dyn Host>, path: &str) {
    let options = OpenOptions::new(Access::Read);
    let report = formats::check(host, Path::new(path), &options).unwrap();
    assert_eq!((report.errors, report.notices), (0, 0), "{:?}", report.findings);
}

#[test]
fn random_operations_on_three_generations() {
    for (seed, sector, blocks) in [(1, 512, [2, 1, 1]), (2, 4096, [1, 1, 2]), (3, 512, [1, 4, 1])] {
        println!("seed {seed}");
        let mut rng = Rng::with_seed(seed);
        let size = 9 * MIB + 8192;
        let spec = CreateSpec {
            block_size: Some(blocks[0] * MIB),
            logical_sector: Some(sector),
            ..spec(size)
        };
        let start: Vec<u8> = (0..5 << 20).map(|i| (i / 512) as u8 | 1).collect();
        let (_, host) = family(&spec, &start);
        let mut model = start;
        model.resize(size as usize, 0);
        for (path, parent, block) in
            [(PATH, BASE, blocks[1]), ("/d/grandchild.vhdx", PATH, blocks[2])]
        {
            if path != PATH {
                child(&host, path, parent, Some(block * MIB));
            }
            let mut image = open(&host, path);
            assert!(contents(&image.disk) == model);
            for _ in 0..150 {
                let start = rng.usize(..model.len());
                let longest = if rng.u8(..5) == 0 { 2 << 20 } else { 20_000 };
                let range = start..(start + rng.usize(1..longest)).min(model.len());
                let at = start as u64;
                match rng.u8(..20) {
                    0..10 => {
                        let data: Vec<u8> = range.clone().map(|_| rng.u8(..)).collect();
                        image.disk.write_at(at, &data).unwrap();
                        model[range].copy_from_slice(&data);
                    }
                    10..14 => {
                        let mut buf = vec![0xcc; range.len()];
                        image.disk.read_at(at, &mut buf).unwrap();
                        assert!(buf == model[range]);
                    }
                    14..17 => {
                        image.disk.discard(at, range.len() as u64).unwrap();
                        model[range].fill(0);
                    }
                    17 => image.disk.flush().unwrap(),
                    18 => {
                        image.disk.flush().unwrap();
                        // A program that just ends closes nothing.
                        std::mem::forget(std::mem::replace(&mut image, open(&host, path)));
                        assert!(contents(&image.disk) == model);
                    }
                    _ => {
                        image.disk.close().unwrap();
                        image = open(&host, path);
                        assert!(contents(&image.disk) == model);
                    }
                }
            }
            image.disk.write_at(0, &model[..1]).unwrap();
            image.disk.close().unwrap();
            assert!(contents(&open(&host, path).disk) == model);
            no_errors(&host, path);
        }
    }
}

#[test]
fn only_written_sectors_are_stored() {
    let (_, host) = family(&CreateSpec { block_size: Some(MIB), ..spec(4 * MIB) }, &[7; 4 << 20]);
    let image = open(&host, PATH);
    image.disk.write_at(1000, &[1]).unwrap();
    image.disk.write_at(5000, &[2; 700]).unwrap();
    let list = image.disk.extents(0..MIB).unwrap();
    let stored: Vec<_> = list
        .iter()
        .filter(|e| matches!(e.source, Source::File { .. }))
        .map(|e| e.start..e.end())
        .collect();
    assert_eq!(stored, [512..1024, 4608..6144]);
    image.disk.close().unwrap();
    let image = open(&host, PATH);
    assert_eq!(image.disk.extents(0..MIB).unwrap(), list);
}

#[test]
fn a_block_whose_sectors_all_came_to_be_written_is_wholly_present() {
    let (_, host) = family(&CreateSpec { block_size: Some(MIB), ..spec(4 * MIB) }, &[7; 4 << 20]);
    let image = open(&host, PATH);
    for part in (0..16).rev() {
        image.disk.write_at(part * 65536, &[part as u8; 65536]).unwrap();
    }
    image.disk.close().unwrap();
    let file = host.open(Path::new(PATH), Access::Read).unwrap();
    let mut entry = [0; 8];
    file.read_at(3 * MIB, &mut entry).unwrap();
    assert_eq!(u64::from_le_bytes(entry) & 7, 6);
}

#[test]
fn stale_bits_do_not_show_when_a_block_becomes_partial() {
    let (memory, host) =
        family(&CreateSpec { block_size: Some(MIB), ..spec(4 * MIB) }, &[7; 4 << 20]);
    let image = open(&host, PATH);
    image.disk.write_at(0, &[1; 512]).unwrap();
    image.disk.close().unwrap();
    // All bits of the chunk's first four blocks but those of the first are set by somebody.
    let file = memory.file(Path::new(PATH)).unwrap();
    let entry_at = 3 * MIB + 4096 * 8;
    let mut entry = [0; 8];
    file.read_at(entry_at, &mut entry).unwrap();
    let bitmap_at = u64::from_le_bytes(entry) & !0xf_ffff;
    file.write_at(bitmap_at + 256, &[0xff; 768]).unwrap();
    let image = open(&host, PATH);
    image.disk.write_at(2 * MIB + 512, &[2; 512]).unwrap();
    image.disk.close().unwrap();
    let mut model = vec![7; 4 << 20];
    model[..512].fill(1);
    model[(2 << 20) + 512..(2 << 20) + 1024].fill(2);
    assert!(contents(&open(&host, PATH).disk) == model);
}

#[test]
fn discarding_never_shows_the_parent_again() {
    let (_, host) = family(&CreateSpec { block_size: Some(MIB), ..spec(4 * MIB) }, &[7; 4 << 20]);
    let image = open(&host, PATH);
    image.disk.write_at(MIB + 512, &[1; 512]).unwrap();
    image.disk.discard(0, 4 * MIB).unwrap();
    image.disk.write_at(2 * MIB, &[2]).unwrap();
    image.disk.close().unwrap();
    let mut model = vec![0; 4 << 20];
    model[2 << 20] = 2;
    assert!(contents(&open(&host, PATH).disk) == model);
}

#[test]
fn bitmaps_of_later_chunks_are_their_own() {
    let spec = CreateSpec { block_size: Some(64 * MIB), ..spec(13 << 30) };
    let (_, host) = family(&spec, &[7; 4096]);
    let image = open(&host, PATH);
    let places = [0, 4 << 30, (4 << 30) - 512, (8 << 30) + 512, (13 << 30) - 512];
    for (i, at) in places.into_iter().enumerate() {
        image.disk.write_at(at, &[i as u8 + 1; 512]).unwrap();
    }
    image.disk.close().unwrap();
    let image = open(&host, PATH);
    for (i, at) in places.into_iter().enumerate() {
        let mut buf = [0; 512];
        image.disk.read_at(at, &mut buf).unwrap();
        assert_eq!(buf, [i as u8 + 1; 512]);
    }
    let mut buf = [0; 512];
    image.disk.read_at(512, &mut buf).unwrap();
    assert_eq!(buf, [7; 512]);
    no_errors(&host, PATH);
}

#[test]
fn a_partial_block_without_its_bitmap_is_lost_and_reported() {
    let (memory, host) =
        family(&CreateSpec { block_size: Some(MIB), ..spec(4 * MIB) }, &[7; 4 << 20]);
    let image = open(&host, PATH);
    image.disk.write_at(MIB, &[1; 512]).unwrap();
    image.disk.close().unwrap();
    let file = memory.file(Path::new(PATH)).unwrap();
    file.write_at(3 * MIB + 4096 * 8, &[0; 8]).unwrap();
    let image = open(&host, PATH);
    let mut buf = [0; 512];
    assert_eq!(image.disk.read_at(MIB, &mut buf).unwrap_err().kind(), ErrorKind::Corrupt);
    image.disk.read_at(0, &mut buf).unwrap();
    assert_eq!(buf, [7; 512]);
    assert_eq!(image.disk.write_at(MIB, &buf).unwrap_err().kind(), ErrorKind::Corrupt);
    image.disk.close().unwrap();
    let options = OpenOptions::new(Access::Read);
    let report = formats::check(&host, Path::new(PATH), &options).unwrap();
    assert_eq!((report.errors, report.findings[0].offset), (1, Some(3 * MIB + 8)));
}

#[test]
fn a_parent_that_was_written_is_no_longer_the_parent() {
    let (_, host) = family(&CreateSpec { block_size: Some(MIB), ..spec(4 * MIB) }, &[7; 512]);
    let base = open_with(&host, BASE, Access::Write).unwrap();
    base.disk.write_at(0, &[8]).unwrap();
    base.disk.close().unwrap();
    let e = open_with(&host, PATH, Access::Write).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::ParentMismatch);
    let forced = OpenOptions { force: true, ..OpenOptions::new(Access::Write) };
    let image = formats::open(&host, Path::new(PATH), &forced).unwrap();
    assert!(image.disk.read_only().is_some());
    let options = OpenOptions::new(Access::Read);
    assert_eq!(formats::check(&host, Path::new(PATH), &options).unwrap().errors, 1);
}

#[test]
fn a_child_is_not_made_of_a_disk_that_may_change() {
    let (_, host) = family(&CreateSpec { block_size: Some(MIB), ..spec(4 * MIB) }, &[7; 512]);
    let base = open_with(&host, BASE, Access::Write).unwrap();
    let e = vhdx::create_child(&*host, Path::new("/d/y.vhdx"), &base, &CreateSpec::default());
    assert_eq!(e.unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
fn children_elsewhere_name_their_parent_from_where_they_are() {
    for (child_at, name) in [
        ("/d/x.vhdx", ".\\base.vhdx"),
        ("/e/f/x.vhdx", "..\\..\\d\\base.vhdx"),
        ("/x.vhdx", ".\\d\\base.vhdx"),
    ] {
        let host: Arc<dyn Host> = MemoryHost::new();
        formats::create(&Vhdx, &*host, Path::new(BASE), &spec(4 * MIB)).unwrap();
        child(&host, child_at, BASE, None);
        let options =
            OpenOptions { allow_parent: vec!["/d".into()], ..OpenOptions::new(Access::Read) };
        let image = formats::open(&host, Path::new(child_at), &options).unwrap();
        assert_eq!(image.info.parent.as_deref(), Some(name));
        assert_eq!(image.info.uuid, image.parent.unwrap().info.uuid);
    }
}

#[test]
fn a_check_tells_of_partial_blocks_that_hide_all_of_the_parent() {
    let spec = CreateSpec { block_size: Some(MIB), ..spec(4 * MIB) };
    let (memory, host) = family(&spec, &[1; 4096]);
    let image = open(&host, PATH);
    // The last sectors are missing, one in each block; then the tables say that they are there.
    for block in 0..2 {
        image.disk.write_at(block * MIB, &[2; (1 << 20) - 512]).unwrap();
    }
    image.disk.close().unwrap();
    drop(image);
    no_errors(&host, PATH);
    let file = memory.file(Path::new(PATH)).unwrap();
    let bytes = file.to_vec();
    let bitmap = (0..bytes.len()).step_by(1 << 20).find(|at| {
        let page = &bytes[*at..at + 512];
        page[..255] == [0xff; 255] && page[255] == 0x7f && page[256..511] == [0xff; 255]
    });
    file.write_at(bitmap.unwrap() as u64 + 255, &[0xff]).unwrap();
    let options = OpenOptions::new(Access::Read);
    let report = formats::check(&host, Path::new(PATH), &options).unwrap();
    assert_eq!((report.errors, report.notices), (0, 1), "{:?}", report.findings);
    assert!(report.findings[0].what.starts_with("1 blocks hide all"), "{:?}", report.findings);
}
