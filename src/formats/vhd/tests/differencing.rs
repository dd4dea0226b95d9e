//! Children: what is theirs, what is the parent's, and how the parent is found.

use super::*;
use crate::codec::to_utf16;
use crate::disk::map::Source;
use crate::error::ErrorKind;

const MIB: u64 = 1 << 20;

/// A child of 8 MiB over a dynamic parent that holds 0x11 from 1 MiB to 5 MiB.
fn sample() -> Arc<MemoryHost> {
    let host = dynamic(8 * MIB);
    let image = open(&host);
    image.disk.write_at(MIB, &vec![0x11; 4 << 20]).unwrap();
    image.disk.close().unwrap();
    add_child(&host, None);
    host
}

fn parent_bytes(host: &Arc<MemoryHost>) -> Vec<u8> {
    host.file(Path::new(PARENT)).unwrap().to_vec()
}

/// Replaces the child by an edited one.
fn edited(host: &Arc<MemoryHost>, edit: impl FnOnce(&mut Vec<u8>)) -> Arc<MemoryHost> {
    let mut bytes = bytes(host);
    edit(&mut bytes);
    host.insert(MemoryFile::new(PATH, &bytes));
    host.clone()
}

#[test]
fn a_new_child_shows_its_parent() {
    let host = sample();
    let image = open(&host);
    assert_eq!(image.info.subformat, "differencing");
    assert_eq!(image.info.parent.as_deref(), Some(r".\parent.vhd"));
    assert_eq!(image.info.warnings, [""; 0]);
    assert_eq!(read(&image, MIB - 2, 4), [0, 0, 0x11, 0x11]);
    assert_eq!(read(&image, 5 * MIB - 2, 4), [0x11, 0x11, 0, 0]);
    assert_eq!(check(&host).exit_status(), 0, "{:?}", check(&host).findings);
}

#[test]
fn what_is_written_hides_the_parent_and_nothing_else_does() {
    let host = sample();
    let before = parent_bytes(&host);
    let image = open(&host);
    image.disk.write_at(2 * MIB + 100, &[0x22; 3]).unwrap();
    image.disk.close().unwrap();
    let image = open(&host);
    assert_eq!(read(&image, 2 * MIB + 99, 5), [0x11, 0x22, 0x22, 0x22, 0x11]);
    assert_eq!(read(&image, 2 * MIB + 512, 512), [0x11; 512]);
    let own: Vec<_> = image.disk.extents(0..8 * MIB).unwrap().to_vec();
    let own: Vec<_> = own.iter().filter(|e| e.source != Source::Parent).collect();
    assert_eq!((own.len(), own[0].start, own[0].len), (1, 2 * MIB, 512));
    assert_eq!(parent_bytes(&host), before);
}

#[test]
fn zeroes_and_discards_hide_the_parent() {
    let host = sample();
    let image = open(&host);
    image.disk.write_at(MIB, &[0; 1024]).unwrap();
    image.disk.discard(2 * MIB, 2 * MIB + 700).unwrap();
    image.disk.close().unwrap();
    let image = open(&host);
    assert_eq!(read(&image, MIB, 1025), [vec![0; 1024], vec![0x11]].concat());
    assert_eq!(read(&image, 2 * MIB, 2 << 20), vec![0; 2 << 20]);
    assert_eq!(read(&image, 4 * MIB + 699, 2), [0, 0x11]);
    assert_eq!(check(&host).exit_status(), 0);
}

#[test]
fn a_bitmap_follows_its_data_by_a_flush() {
    let host = sample();
    let image = open(&host);
    image.disk.write_at(0, &[1; 512]).unwrap();
    image.disk.flush().unwrap();
    let at = bat(&bytes(&host), 0) as usize * 512;
    assert_eq!(bytes(&host)[at..at + 2], [0x80, 0]);
    image.disk.write_at(4 * 512, &[2; 1024]).unwrap();
    assert_eq!(bytes(&host)[at..at + 2], [0x80, 0], "not before the data is durable");
    let killed = copy(&host);
    assert_eq!(read(&open(&killed), 4 * 512, 1024), [0; 1024]);
    image.disk.flush().unwrap();
    assert_eq!(bytes(&host)[at..at + 2], [0x8c, 0]);
}

#[test]
fn a_block_made_in_used_space_begins_with_a_clear_bitmap() {
    let host = sample();
    let image = open(&host);
    image.disk.write_at(0, &vec![0x33; 2 << 20]).unwrap();
    image.disk.close().unwrap();
    // A crash has lost the entry; the block's bitmap and data are still there.
    edited(&host, |bytes| set_bat(bytes, 0, u32::MAX));
    let image = open(&host);
    image.disk.write_at(4 * MIB, &[0x44; 512]).unwrap();
    image.disk.close().unwrap();
    let image = open(&host);
    assert_eq!(read(&image, 4 * MIB, 1024), [[0x44; 512], [0x11; 512]].concat());
    assert_eq!(read(&image, MIB - 1, 2), [0, 0x11]);
}

#[test]
fn sectors_past_the_parents_end_are_zeroes() {
    let host = sample();
    edited(&host, |bytes| {
        edit_footers(bytes, |f| f.current_size = (10 * MIB).into());
        edit_header(bytes, |h| h.max_table_entries = 5.into());
    });
    let image = open(&host);
    assert_eq!(read(&image, 8 * MIB - 1, 2 << 20), vec![0; 2 << 20]);
    image.disk.write_at(8 * MIB + 700, b"beyond").unwrap();
    image.disk.close().unwrap();
    assert_eq!(read(&open(&host), 8 * MIB + 699, 8), b"\0beyond\0");
}

#[test]
fn a_chain_of_three_reads_through() {
    let host = sample();
    let image = open(&host);
    image.disk.write_at(3 * MIB, &[0x22; 512]).unwrap();
    image.disk.close().unwrap();
    let middle = "/images/middle.vhd";
    host.insert(MemoryFile::new(middle, &bytes(&host)));
    host.remove(Path::new(PATH)).unwrap();
    let shared: Arc<dyn Host> = host.clone();
    let parent =
        formats::open(&shared, Path::new(middle), &OpenOptions::new(Access::Read)).unwrap();
    create_child(&*host, Path::new(PATH), &parent, Some(512 << 10)).unwrap();
    let image = open(&host);
    image.disk.write_at(3 * MIB + 512, &[0x33; 10]).unwrap();
    image.disk.close().unwrap();
    let image = open(&host);
    assert_eq!(read(&image, 3 * MIB - 1, 1), [0x11]);
    assert_eq!(read(&image, 3 * MIB + 511, 12), [[0x22].as_slice(), &[0x33; 10], &[0x11]].concat());
}

#[test]
fn another_parent_is_refused() {
    let host = sample();
    let mut bytes = parent_bytes(&host);
    edit_footers(&mut bytes, |f| f.unique_id[0] ^= 1);
    host.insert(MemoryFile::new(PARENT, &bytes));
    assert_eq!(refusal(&host).kind(), ErrorKind::ParentMismatch);
    host.remove(Path::new(PARENT)).unwrap();
    let error = refusal(&host);
    assert_eq!(error.kind(), ErrorKind::ParentMissing);
    assert!(error.to_string().contains("/images/parent.vhd"), "{error}");
}

#[test]
fn a_parent_without_an_id_is_a_raw_disk_where_xen_made_the_child_and_damage_elsewhere() {
    let host = sample();
    edited(&host, |bytes| edit_header(bytes, |h| h.parent_unique_id = [0; 16]));
    assert_eq!(refusal(&host).kind(), ErrorKind::Corrupt);
    assert_eq!(check(&host).errors, 1);
    edited(&host, |bytes| edit_footers(bytes, |f| f.creator_application = *b"tap\0"));
    // What a guest writes to a raw disk may look like an image, and stays a raw disk.
    let image = open(&host);
    assert_eq!(read(&image, 0, 4096), parent_bytes(&host)[..4096]);
    host.insert(MemoryFile::new(PARENT, &[0x33; 8 << 20]));
    assert_eq!(read(&open(&host), 8 * MIB - 512, 512), [0x33; 512]);
}

#[test]
fn the_parent_is_found_by_every_kind_of_name() {
    // Overwrites the two locators of a new child, and clears the name in the header.
    let with = |code: [u8; 4], data: &[u8], space: u32, name: &str| {
        let host = sample();
        edited(&host, |bytes| {
            edit_header(bytes, |h| {
                h.parent_locators[0].platform_code = [0; 4];
                h.parent_locators[1].platform_code = code;
                h.parent_locators[1].data_length = (data.len() as u32).into();
                h.parent_locators[1].data_space = space.into();
                h.parent_unicode_name = [0; 512];
                let name = to_utf16(name, true);
                h.parent_unicode_name[..name.len()].copy_from_slice(&name);
            });
            let at = DynamicHeader::read_from_bytes(&bytes[512..1536]).unwrap();
            let at = at.parent_locators[1].data_offset.get() as usize;
            bytes[at..at + 512].fill(0);
            bytes[at..at + data.len()].copy_from_slice(data);
        });
        host
    };
    for host in [
        with(*b"W2ru", &to_utf16(r".\parent.vhd", false), 512, ""),
        with(*b"W2ku", &to_utf16(r"c:\some\where\parent.vhd", false), 1, ""),
        with(*b"MacX", b"file://localhost/elsewhere/parent%2evhd", 512, ""),
        with(*b"MacX", b"file://./parent.vhd\0", 512, "x.vhd"),
        with(*b"Wi2k", b"garbage", 512, "parent.vhd"),
        with(*b"W2ru", &to_utf16("odd length", false)[..7], 3_000_000_000, r"C:\p\parent.vhd"),
    ] {
        let image = open(&host);
        assert_eq!(read(&image, MIB, 2), [0x11; 2], "{:?}", image.info.parent);
        image.disk.write_at(6 * MIB, b"x").unwrap();
        image.disk.close().unwrap();
        assert_eq!(read(&open(&host), 6 * MIB - 1, 2), b"\0x");
    }
}

#[test]
fn locators_that_lead_nowhere_are_skipped() {
    let host = sample();
    edited(&host, |bytes| {
        edit_header(bytes, |h| {
            h.parent_locators[0].data_offset = u64::MAX.into();
            h.parent_locators[1].data_length = u32::MAX.into();
        });
    });
    let image = open(&host);
    assert_eq!(image.info.warnings.len(), 2, "{:?}", image.info.warnings);
    assert_eq!(image.info.parent.as_deref(), Some("parent.vhd"));
}

#[test]
fn a_dynamic_disk_with_a_parents_names_ignores_them() {
    let host = sample();
    edited(&host, |bytes| edit_footers(bytes, |f| f.disk_type = 3.into()));
    let image = open(&host);
    assert_eq!(read(&image, MIB, 2), [0; 2]);
    assert_eq!(image.info.warnings.len(), 1, "{:?}", image.info.warnings);
}

#[test]
fn a_locator_left_in_a_dynamic_disk_may_lead_into_a_block() {
    let host = dynamic(8 * MIB);
    let image = open(&host);
    image.disk.write_at(0, &[0x44; 4096]).unwrap();
    image.disk.close().unwrap();
    edited(&host, |bytes| {
        let block = u64::from(bat(bytes, 0)) * 512;
        edit_header(bytes, |h| {
            h.parent_locators[0].platform_code = *b"W2ku";
            h.parent_locators[0].data_length = 24.into();
            h.parent_locators[0].data_space = 512.into();
            h.parent_locators[0].data_offset = block.into();
        });
    });
    assert_eq!(read(&open(&host), 0, 4096), [0x44; 4096]);
    assert_eq!(check(&host).errors, 0, "{:?}", check(&host).findings);
}

/// A block would take the place that the locator names, and a guest's data name the parent.
#[test]
fn a_locator_that_was_cut_off_forbids_writing() {
    let host = edited(&sample(), |bytes| {
        let mut header = DynamicHeader::read_from_bytes(&bytes[512..1536]).unwrap();
        header.parent_locators[5].platform_code = *b"Wi2r";
        header.parent_locators[5].data_length = 40.into();
        header.parent_locators[5].data_offset = (bytes.len() as u64 + 4096).into();
        header.seal();
        bytes[512..1536].copy_from_slice(header.as_bytes());
    });
    let image = open(&host);
    assert_eq!(read(&image, MIB, 2), [0x11; 2]);
    let refused = image.disk.write_at(0, &[1; 512]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ReadOnly);
    assert_eq!(check(&host).errors, 1);
}
