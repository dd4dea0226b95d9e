//! Children, and the ESX kinds of extents that chains are made of.

use super::*;
use crate::error::ErrorKind;
use crate::formats::vmdk::create_child;
use crate::formats::{Identity, ParentLink};

const MIB: u64 = 1 << 20;
const GRAIN: usize = 65_536;

/// A parent called `base.vmdk` with a pattern in it, and a child called `child.vmdk`.
fn chain(subformat: &str, size: u64) -> (Arc<MemoryHost>, Vec<u8>) {
    let host = created("base.vmdk", &spec(subformat, size));
    let base = open_rw(&host, "base.vmdk");
    let mut model = vec![0; size as usize];
    let mut rng = fastrand::Rng::with_seed(9);
    rng.fill(&mut model[100_000..500_000]);
    rng.fill(&mut model[size as usize - 3000..]);
    base.disk.write_at(0, &model).unwrap();
    base.disk.close().unwrap();
    let base = open_with(&host, "base.vmdk", Access::Read).unwrap();
    create_child(&*host, &at("child.vmdk"), &base, &formats::CreateSpec::default()).unwrap();
    (host, model)
}

#[test]
fn a_child_shows_its_parent_until_it_is_written() {
    for (subformat, child_type) in [
        ("monolithicSparse", "monolithicSparse"),
        ("monolithicFlat", "monolithicSparse"),
        ("twoGbMaxExtentSparse", "twoGbMaxExtentSparse"),
        ("twoGbMaxExtentFlat", "twoGbMaxExtentSparse"),
        ("vmfs", "vmfsSparse"),
        ("vmfsThin", "vmfsSparse"),
    ] {
        let (host, mut model) = chain(subformat, 3 * MIB + 512);
        let parent_before: Vec<_> = host.files().iter().map(|f| f.to_vec()).take(1).collect();
        assert_clean(&host, "child.vmdk");
        let image = open_rw(&host, "child.vmdk");
        assert_eq!(image.info.subformat, child_type);
        assert_eq!(image.info.parent.as_deref(), Some("base.vmdk"));
        assert!(contents(&image.disk) == model, "{subformat}");
        assert_eq!(sources(&image.disk), [(3 * MIB + 512, Source::Parent)]);
        image.disk.write_at(101_000, &[7; 10]).unwrap();
        image.disk.write_at(model.len() as u64 - 10, &[8; 10]).unwrap();
        model[101_000..101_010].fill(7);
        let end = model.len();
        model[end - 10..].fill(8);
        assert!(contents(&image.disk) == model, "{subformat}");
        image.disk.discard(200_000, 200_000).unwrap();
        model[200_000..400_000].fill(0);
        image.disk.close().unwrap();
        let image = open_with(&host, "child.vmdk", Access::Read).unwrap();
        assert!(contents(&image.disk) == model, "{subformat}");
        assert_clean(&host, "child.vmdk");
        let parent_after: Vec<_> = host.files().iter().map(|f| f.to_vec()).take(1).collect();
        assert!(parent_before == parent_after, "{subformat}");
    }
}

#[test]
fn a_grandchild_shows_both_generations() {
    let (host, mut model) = chain("monolithicSparse", 3 * MIB);
    let child = open_rw(&host, "child.vmdk");
    child.disk.write_at(0, &[1; 1000]).unwrap();
    child.disk.close().unwrap();
    let child = open_with(&host, "child.vmdk", Access::Read).unwrap();
    create_child(&*host, &at("grandchild.vmdk"), &child, &formats::CreateSpec::default()).unwrap();
    let image = open_rw(&host, "grandchild.vmdk");
    image.disk.write_at(500, &[2; 10]).unwrap();
    model[..1000].fill(1);
    model[500..510].fill(2);
    assert!(contents(&image.disk) == model);
}

#[test]
fn a_parent_that_changed_is_refused_unless_forced() {
    let (host, model) = chain("monolithicSparse", 3 * MIB);
    let base = open_rw(&host, "base.vmdk");
    base.disk.write_at(0, &[1]).unwrap();
    base.disk.close().unwrap();
    let error = refused(&host, "child.vmdk");
    assert_eq!(error.kind(), ErrorKind::ParentMismatch);
    let shared: Arc<dyn Host> = host.clone();
    let options = OpenOptions { force: true, ..OpenOptions::new(Access::Write) };
    let image = formats::open(&shared, &at("child.vmdk"), &options).unwrap();
    assert!(image.disk.read_only().is_some());
    assert!(contents(&image.disk)[1..] == model[1..]);
    host.remove(&at("base.vmdk")).unwrap();
    assert_eq!(refused(&host, "child.vmdk").kind(), ErrorKind::ParentMissing);
}

#[test]
fn parents_are_named_by_cid_and_hint() {
    let text = |more: &str| {
        let text = custom("RW 8 FLAT \"a\" 0").replace("parentCID=ffffffff\n", more);
        let host = host(&[("d.vmdk", text.as_bytes()), ("a", &[0; 4096])]);
        let shared: Arc<dyn Host> = host.clone();
        let options = OpenOptions::new(Access::Read);
        let file = shared.open(&at("d.vmdk"), Access::Read).unwrap();
        let ctx = formats::OpenContext::new(&shared, &*file, &options);
        formats::Format::open(&Vmdk, file, &ctx).map(|opened| opened.parent)
    };
    let Some(ParentLink { identity, candidates, .. }) =
        text("parentCID=1a2b\nparentFileNameHint=\"C:\\vm\\base.vmdk\"\n").unwrap()
    else {
        panic!("no parent");
    };
    assert_eq!(
        (identity, candidates),
        (Identity::VmdkCid(0x1a2b), vec![r"C:\vm\base.vmdk".into()])
    );
    assert!(text("parentFileNameHint=\"x\"\nparentCID=FFFFFFFF\n").unwrap().is_none());
    assert!(text("").unwrap().is_none());
    // A parent that is named by nothing must be given.
    assert!(text("parentCID=1\n").unwrap().unwrap().candidates.is_empty());
    assert_eq!(text("parentCID=xyz\n").err().unwrap().kind(), ErrorKind::Corrupt);
}

#[test]
fn freed_grains_hide_the_parent_where_the_image_can_say_so() {
    let (host, mut model) = chain("monolithicSparse", 3 * MIB);
    let file = host.file(&at("child.vmdk")).unwrap();
    // Version 2, flags 7: zeroed grains.
    crate::storage::Storage::write_at(&*file, 4, &[2, 0, 0, 0, 7]).unwrap();
    let image = open_rw(&host, "child.vmdk");
    image.disk.write_at(2 * GRAIN as u64, &[5; GRAIN]).unwrap();
    image.disk.discard(GRAIN as u64 + 512, 4 * GRAIN as u64).unwrap();
    model[GRAIN + 512..5 * GRAIN + 512].fill(0);
    assert!(contents(&image.disk) == model);
    image.disk.close().unwrap();
    let image = open_with(&host, "child.vmdk", Access::Read).unwrap();
    assert!(contents(&image.disk) == model);
    let zero: u64 = sources(&image.disk).iter().filter(|s| s.1 == Source::Zero).map(|s| s.0).sum();
    assert_eq!(zero, 3 * GRAIN as u64);
    let bytes = file.to_vec();
    assert_eq!(bytes[27 * 512 + 8..27 * 512 + 20], [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
}

/// A disk of one COWD extent without parent.
fn cowd_disk(sectors: u64) -> Arc<MemoryHost> {
    created("d.vmdk", &spec("vmfsSparse", sectors * 512))
}

fn field(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

#[test]
fn cowd_tables_are_made_when_they_are_needed() {
    let host = cowd_disk(10_000);
    let image = open_rw(&host, "d.vmdk");
    image.disk.write_at(4097 * 512, &[1; 1024]).unwrap();
    image.disk.flush().unwrap();
    let during = host.file(&at("d-delta.vmdk")).unwrap().to_vec();
    // Header, directory of 3 entries in one sector, table of 32, two grains.
    assert_eq!((field(&during, 24), field(&during, 2048), field(&during, 2052)), (3, 0, 5));
    assert_eq!((field(&during, 5 * 512 + 4), field(&during, 5 * 512 + 8)), (37, 38));
    assert_eq!((field(&during, 28), field(&during, 1648)), (39, 1));
    image.disk.close().unwrap();
    let after = host.file(&at("d-delta.vmdk")).unwrap().to_vec();
    assert_eq!((field(&after, 28), field(&after, 1648), after.len()), (39, 0, 39 * 512));
    assert_clean(&host, "d.vmdk");
    let image = open_rw(&host, "d.vmdk");
    let mut back = [0; 1026];
    image.disk.read_at(4097 * 512 - 1, &mut back).unwrap();
    assert!(back[0] == 0 && back[1..1025] == [1; 1024] && back[1025] == 0);
}

#[test]
fn many_writers_share_one_new_cowd_table() {
    for _ in 0..50 {
        let host = cowd_disk(20_000);
        let image = open_rw(&host, "d.vmdk");
        std::thread::scope(|scope| {
            for number in 0..8_u64 {
                let disk = &image.disk;
                scope.spawn(move || {
                    for round in 0..5 {
                        let at = (number * 2500 + round * 300) * 512;
                        disk.write_at(at, &[number as u8 + 1; 700]).unwrap();
                    }
                });
            }
        });
        image.disk.close().unwrap();
        assert_eq!(check(&host, "d.vmdk").errors, 0);
        let image = open_with(&host, "d.vmdk", Access::Read).unwrap();
        for number in 0..8_u64 {
            let mut back = [0; 700];
            image.disk.read_at((number * 2500 + 1200) * 512, &mut back).unwrap();
            assert_eq!(back, [number as u8 + 1; 700]);
        }
    }
}

#[test]
fn cowd_damage_is_told_apart() {
    let host = cowd_disk(10_000);
    let image = open_rw(&host, "d.vmdk");
    image.disk.write_at(0, &[1; 512]).unwrap();
    image.disk.write_at(5000 * 512, &[1; 512]).unwrap();
    image.disk.close().unwrap();
    let sound = host.file(&at("d-delta.vmdk")).unwrap().to_vec();
    let with = |place: usize, value: u32| {
        let mut bytes = sound.clone();
        bytes[place..place + 4].copy_from_slice(&value.to_le_bytes());
        add(&host, "d-delta.vmdk", &bytes);
        open_with(&host, "d.vmdk", Access::Write)
    };
    // Entries that lead into header or directory, or out of the file: lost, and never written.
    for (place, value, len) in [
        (5 * 512, 1, 512),
        (5 * 512, 4, 512),
        (5 * 512, 100_000, 512),
        (2048, 3, 4096 * 512),
        (2048, 100_000, 4096 * 512),
    ] {
        let image = with(place, value).unwrap();
        assert_eq!(sources(&image.disk)[0], (len, Source::Bad));
        assert_eq!(image.disk.write_at(6000 * 512, &[1]).unwrap_err().kind(), ErrorKind::Corrupt);
        assert!(check(&host, "d.vmdk").errors > 0);
    }
    let image = with(24, 1).unwrap();
    assert!(image.disk.read_only().unwrap().contains("too short"));
    assert_eq!(sources(&image.disk).last(), Some(&((10_000 - 4096) * 512, Source::Bad)));
    // A stale end of used space is found out before it is believed.
    let image = with(28, 6).unwrap();
    assert_eq!(check(&host, "d.vmdk").errors, 1);
    image.disk.write_at(512, &[3; 512]).unwrap();
    image.disk.close().unwrap();
    assert_clean(&host, "d.vmdk");
    for (place, value, kind) in [
        (0, 0, ErrorKind::Corrupt),
        (4, 2, ErrorKind::Unsupported),
        (12, 9999, ErrorKind::Corrupt),
        (16, 3, ErrorKind::Corrupt),
        (20, 0, ErrorKind::Corrupt),
        (24, 0, ErrorKind::Corrupt),
    ] {
        assert_eq!(with(place, value).err().unwrap().kind(), kind, "{place}");
    }
}

#[test]
fn a_cowd_extent_may_be_called_sparse() {
    let host = cowd_disk(10_000);
    add(&host, "d.vmdk", custom("RW 10000 SPARSE \"d-delta.vmdk\"").as_bytes());
    assert_eq!(sources(&open_rw(&host, "d.vmdk").disk), [(10_000 * 512, Source::Zero)]);
    let file = host.file(&at("d-delta.vmdk")).unwrap();
    crate::storage::Storage::write_at(&*file, 24, &[64, 0, 0, 0]).unwrap();
    let error = refused(&host, "d.vmdk");
    assert!(error.what().contains("Workstation 3"), "{error}");
}

/// A seSparse disk of 32 MiB whose fields are those of `change`, with grains of every type.
fn sesparse(change: impl FnOnce(&mut Vec<u64>)) -> Arc<MemoryHost> {
    let mut header = vec![0_u64; 26];
    header[0] = 0xcafe_babe;
    header[1] = 0x2_0000_0001;
    header[2] = 65_536;
    header[3] = 8;
    header[4] = 64;
    for (index, (offset, size)) in [
        (1, 1),
        (2, 2),
        (2048, 2048),
        (4096, 2048),
        (6144, 2048),
        (8192, 2048),
        (10_240, 2048),
        (12_288, 65_536),
    ]
    .into_iter()
    .enumerate()
    {
        header[10 + 2 * index] = offset;
        header[11 + 2 * index] = size;
    }
    change(&mut header);
    let file = MemoryFile::new(at("d-sesparse.vmdk"), &[]);
    let put = |at: u64, value: u64| {
        crate::storage::Storage::write_at(&*file, at, &value.to_le_bytes()).unwrap();
    };
    crate::storage::Storage::set_len(&*file, (12_288 + 65_536) * 512).unwrap();
    for (index, value) in header.iter().enumerate() {
        put(index as u64 * 8, *value);
    }
    put(512, 0xcafe_cafe);
    // The second 16 MiB use table 3.
    put(4096 * 512 + 8, 0x1000_0000_0000_0003);
    let table = 6144 * 512 + 3 * 32_768;
    put(table, 0x3005_0000_0000_0000);
    put(table + 8, 0x3003_0000_0000_0001);
    put(table + 16, 0x1005_0000_0000_0000);
    put(table + 24, 0x2000_0000_0000_0000);
    put(table + 32, 0x4000_0000_0000_0000);
    put(table + 40, 0x0000_0000_0000_0001);
    let host = MemoryHost::new();
    host.insert(file);
    add(&host, "d.vmdk", custom("RW 65536 SESPARSE \"d-sesparse.vmdk\"").as_bytes());
    host
}

#[test]
fn sesparse_entries_of_every_type() {
    let host = sesparse(|_| {});
    let image = open_with(&host, "d.vmdk", Access::Write).unwrap();
    assert!(image.disk.read_only().unwrap().contains("seSparse"));
    let file = |grain: u64| Source::File { file: 0, at: 12_288 * 512 + grain * 4096 };
    let list = sources(&image.disk);
    assert_eq!(
        list[..5],
        [
            (16 * MIB, Source::Zero),
            (4096, file(5)),
            (4096, file(0x1003)),
            (8192, Source::Zero),
            (8192, Source::Bad),
        ]
    );
    assert_eq!(check(&host, "d.vmdk").errors, 2);
}

#[test]
fn sesparse_extents_that_are_not_understood_are_refused() {
    let kind = |change: fn(&mut Vec<u64>)| refused(&sesparse(change), "d.vmdk").kind();
    assert_eq!(kind(|h| h[1] = 0x2_0000_0002), ErrorKind::Unsupported);
    assert_eq!(kind(|h| h[3] = 16), ErrorKind::Unsupported);
    assert_eq!(kind(|h| h[5] = 1), ErrorKind::Unsupported);
    assert_eq!(kind(|h| h[2] = 1), ErrorKind::Corrupt);
    assert_eq!(kind(|h| h[24] = 11_000), ErrorKind::Corrupt);
    assert_eq!(kind(|h| h[16] = 1 << 60), ErrorKind::Corrupt);
    assert_eq!(kind(|h| h[17] = 0), ErrorKind::Corrupt);
    let host = sesparse(|_| {});
    let file = host.file(&at("d-sesparse.vmdk")).unwrap();
    crate::storage::Storage::write_at(&*file, 512 + 24, &[1]).unwrap();
    let error = refused(&host, "d.vmdk");
    assert!(error.what().contains("journal"), "{error}");
}
