//! Stream-optimised images, in every layout that writers use.

use std::io::Write;

use flate2::Compression;
use flate2::write::ZlibEncoder;

use super::*;
use crate::error::ErrorKind;
use crate::formats::vmdk::layout::{GD_AT_END, Header, SECTOR};

const GRAIN: usize = 65_536;

/// Where a writer puts its tables.
#[derive(Clone, Copy, PartialEq)]
enum Layout {
    /// Among and behind the grains, the directory named by a footer.
    Footer,
    /// As before, and the directory named by the header too.
    FooterAndHeader,
    /// Before the grains, no markers.
    Front,
}

fn deflated(data: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(512), 0);
}

fn marker(bytes: &mut Vec<u8>, sectors: u64, kind: u32) {
    bytes.extend(sectors.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(kind.to_le_bytes());
    pad(bytes);
}

fn table_bytes(entries: &[u32]) -> Vec<u8> {
    let mut bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_le_bytes()).collect();
    pad(&mut bytes);
    bytes
}

/// A stream of `data`, whose grains of zeroes are left out.
fn stream(data: &[u8], layout: Layout) -> Vec<u8> {
    let capacity = (data.len() / 512) as u64;
    let tables = data.len().div_ceil(GRAIN * 512);
    let mut header = Header {
        version: 3,
        flags: 0x3_0001,
        capacity,
        grain: 128,
        descriptor_at: 1,
        descriptor_len: 2,
        entries_per_table: 512,
        rgd: 0,
        gd: GD_AT_END,
        overhead: 128,
        unclean: false,
    };
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=1234abcd\nparentCID=ffffffff\n\
         createType=\"streamOptimized\"\nRDONLY {capacity} SPARSE \"call-me.vmdk\"\n"
    );
    let mut bytes = vec![0; 512];
    bytes.extend(text.as_bytes());
    bytes.resize(128 * 512, 0);
    let mut directory = vec![0; tables];
    for (number, block) in data.chunks(GRAIN * 512).enumerate() {
        let mut table = vec![0; 512];
        for (index, grain) in block.chunks(GRAIN).enumerate() {
            if grain.iter().all(|b| *b == 0) {
                continue;
            }
            table[index] = (bytes.len() / 512) as u32;
            let packed = deflated(grain);
            bytes.extend((((number * 512 + index) * 128) as u64).to_le_bytes());
            bytes.extend((packed.len() as u32).to_le_bytes());
            bytes.extend(packed);
            pad(&mut bytes);
        }
        if layout == Layout::Front {
            // Room for the tables of up to 60 MiB lies between descriptor and grains.
            directory[number] = 10 + number as u32 * 4;
            let at = directory[number] as usize * 512;
            bytes[at..at + 2048].copy_from_slice(&table_bytes(&table));
        } else if table.iter().any(|entry| *entry != 0) {
            marker(&mut bytes, 4, 1);
            directory[number] = (bytes.len() / 512) as u32;
            bytes.extend(table_bytes(&table));
        }
    }
    if layout == Layout::Front {
        header.gd = 8;
        let directory = table_bytes(&directory);
        bytes[8 * 512..][..directory.len()].copy_from_slice(&directory);
        bytes.extend([0; 512]);
    } else {
        marker(&mut bytes, 1, 2);
        let gd = (bytes.len() / 512) as u64;
        bytes.extend(table_bytes(&directory));
        marker(&mut bytes, 1, 3);
        bytes.extend(Header { gd, ..header.clone() }.encode());
        bytes.extend([0; 512]);
        if layout == Layout::FooterAndHeader {
            header.gd = gd;
        }
    }
    bytes[..512].copy_from_slice(&header.encode());
    bytes
}

/// 40 MiB and a bit: compressible, random and empty grains, the last one not whole.
fn sample() -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(5);
    let mut data = vec![0; (40 << 20) + 1536];
    for grain in [0, 1, 5, 511, 512, 513, 640] {
        let end = data.len().min((grain + 1) * GRAIN);
        let part = &mut data[grain * GRAIN..end];
        match grain % 3 {
            0 => part.fill(grain as u8),
            1 => rng.fill(part),
            _ => part[77..99].fill(1),
        }
    }
    data
}

fn opened(bytes: &[u8]) -> Result<Image> {
    open_with(&host(&[("d.vmdk", bytes)]), "d.vmdk", Access::Read)
}

fn errors(bytes: &[u8]) -> u64 {
    check(&host(&[("d.vmdk", bytes)]), "d.vmdk").errors
}

/// Byte offset of the head of the grain that begins at byte `disk` of the disk.
fn grain_at(bytes: &[u8], disk: usize) -> usize {
    let lba = (disk as u64 / SECTOR).to_le_bytes();
    let is_grain = |at: &usize| bytes[*at..].starts_with(&lba) && bytes[at + 8..at + 12] != [0; 4];
    (128 * 512..bytes.len()).step_by(512).find(is_grain).unwrap()
}

#[test]
fn every_layout_reads_the_same() {
    let data = sample();
    for layout in [Layout::Footer, Layout::FooterAndHeader, Layout::Front] {
        let mut bytes = stream(&data, layout);
        for trailing in [0, 512, 10_000] {
            bytes.resize(bytes.len() + trailing, 0);
            let image = opened(&bytes).unwrap();
            assert!(contents(&image.disk) == data);
            assert_eq!(image.info.warnings, [""; 0]);
            assert_eq!(errors(&bytes), 0);
        }
    }
}

#[test]
fn reads_in_pieces_and_from_threads_agree() {
    let data = sample();
    let image = opened(&stream(&data, Layout::Footer)).unwrap();
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (disk, data) = (&image.disk, &data);
            scope.spawn(move || {
                let mut rng = fastrand::Rng::with_seed(seed);
                for _ in 0..300 {
                    let at = rng.usize(..data.len());
                    let mut buf = vec![1; rng.usize(..=(data.len() - at).min(200_000))];
                    disk.read_at(at as u64, &mut buf).unwrap();
                    assert!(buf == data[at..at + buf.len()]);
                }
            });
        }
    });
}

#[test]
fn streams_are_never_written() {
    let bytes = stream(&sample(), Layout::Front);
    let host = host(&[("d.vmdk", &bytes)]);
    let image = open_with(&host, "d.vmdk", Access::Write).unwrap();
    assert!(image.disk.read_only().unwrap().contains("stream-optimised"));
    assert_eq!(image.disk.write_at(0, &[1]).unwrap_err().kind(), ErrorKind::ReadOnly);
    image.disk.close().unwrap();
    assert!(host.file(&at("d.vmdk")).unwrap().to_vec() == bytes);
}

#[test]
fn a_stream_that_was_cut_off_shows_what_is_left_and_denies_the_rest() {
    let data = sample();
    let whole = stream(&data, Layout::Footer);
    let cut = &whole[..grain_at(&whole, 513 * GRAIN)];
    let image = opened(cut).unwrap();
    let lost = 513 * GRAIN as u64..data.len() as u64;
    assert_eq!(image.damage, std::slice::from_ref(&lost));
    assert!(image.info.warnings[0].contains("4 grains"), "{:?}", image.info.warnings);
    let mut left = vec![1; lost.start as usize];
    image.disk.read_at(0, &mut left).unwrap();
    assert!(left == data[..left.len()]);
    assert_eq!(image.disk.read_at(lost.start, &mut [0]).unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(errors(cut) > 0);
}

#[test]
fn a_lost_footer_costs_nothing_but_a_search() {
    let data = sample();
    let mut bytes = stream(&data, Layout::Footer);
    let footer = bytes.len() - 1024;
    bytes[footer..footer + 4].fill(b'x');
    let image = opened(&bytes).unwrap();
    assert!(contents(&image.disk) == data && image.damage.is_empty());
    assert!(image.info.warnings[0].contains("found by searching"), "{:?}", image.info.warnings);
}

#[test]
fn a_stream_without_any_grain_left_is_refused() {
    let whole = stream(&sample(), Layout::Footer);
    for len in [2049, 128 * 512, 128 * 512 + 700] {
        let error = opened(&whole[..len]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.what().contains("cut off"), "{error}");
    }
}

#[test]
fn a_footer_that_contradicts_its_header_is_refused() {
    let mut bytes = stream(&sample(), Layout::Footer);
    let capacity = bytes.len() - 1024 + 12;
    bytes[capacity] ^= 1;
    let error = opened(&bytes).unwrap_err();
    assert!(error.what().contains("disagree"), "{error}");
}

#[test]
fn a_bad_grain_is_an_error_and_its_neighbours_are_not() {
    let data = sample();
    let sound = stream(&data, Layout::Front);
    let head = grain_at(&sound, GRAIN);
    let size = u32::from_le_bytes(sound[head + 8..head + 12].try_into().unwrap());
    let refill = |packed: &[u8]| {
        let mut bytes = sound.clone();
        assert!(packed.len() <= size as usize);
        bytes[head + 8..head + 12].copy_from_slice(&(packed.len() as u32).to_le_bytes());
        bytes[head + 12..][..packed.len()].copy_from_slice(packed);
        bytes
    };
    let patched = |at: usize, value: &[u8]| {
        let mut bytes = sound.clone();
        bytes[head + at..][..value.len()].copy_from_slice(value);
        bytes
    };
    let adler = 12 + size as usize - 1;
    let cases = [
        ("LBA", patched(0, &[0; 8])),
        ("size 0", patched(8, &[0; 4])),
        ("huge size", patched(8, &[0xff; 4])),
        ("zlib header", patched(12, &[0, 0])),
        ("preset dictionary", patched(12, &[0x78, 0xbb])),
        ("checksum", patched(adler, &[sound[head + adler] ^ 1])),
        ("too much", refill(&deflated(&vec![0; GRAIN + 1]))),
        ("bomb", refill(&deflated(&vec![0; 50 << 20]))),
        ("too little", refill(&deflated(&vec![3; GRAIN - 1]))),
    ];
    for (what, bytes) in cases {
        let image = opened(&bytes).unwrap();
        let mut byte = [0];
        let error = image.disk.read_at(GRAIN as u64, &mut byte).expect_err(what);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}");
        let mut whole = vec![0; GRAIN];
        image.disk.read_at(5 * GRAIN as u64, &mut whole).unwrap();
        assert!(whole == data[5 * GRAIN..6 * GRAIN], "{what}");
        assert_eq!(errors(&bytes), 1, "{what}");
    }
}

#[test]
fn grains_without_markers_have_their_size_alone_before_them() {
    let data = vec![7; GRAIN];
    let mut bytes = stream(&data, Layout::Front);
    let header = Header::decode(bytes[..512].try_into().unwrap()).unwrap();
    bytes[..512].copy_from_slice(&Header { flags: 0x1_0001, ..header }.encode());
    let head = grain_at(&bytes, 0);
    bytes.copy_within(head + 8.., head);
    assert!(contents(&opened(&bytes).unwrap().disk) == data);
}

#[test]
fn a_check_tells_of_grains_stored_twice_and_of_bytes_behind_the_end() {
    let notices = |bytes: &[u8]| {
        let report = check(&host(&[("d.vmdk", bytes)]), "d.vmdk");
        assert_eq!((report.errors, report.leaks), (0, 0), "{:?}", report.findings);
        report.findings
    };
    let data = sample();
    for layout in [Layout::Footer, Layout::FooterAndHeader, Layout::Front] {
        let sound = stream(&data, layout);
        assert_eq!(notices(&sound).len(), 0);
        // The search for a footer is over where something else lies behind it.
        if layout != Layout::Footer {
            let mut longer = sound.clone();
            longer.extend([0; 700]);
            longer.extend([9; 300]);
            let found = notices(&longer);
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].offset, Some(sound.len() as u64));
            assert!(found[0].what.contains("behind the end"), "{found:?}");
        }
    }
    // The second grain again, behind the last one; where it was, the table says.
    let mut twice = stream(&data, Layout::Front);
    let head = grain_at(&twice, GRAIN);
    let len = u32::from_le_bytes(twice[head + 8..head + 12].try_into().unwrap()) as usize + 12;
    let again = twice.len() - 512;
    twice.extend_from_within(head..head + len);
    pad(&mut twice);
    let end = [0; 512];
    twice.copy_within(again + 512.., again);
    let last = twice.len() - 512;
    twice[last..].copy_from_slice(&end);
    let found = notices(&twice);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].offset, Some(again as u64));
    assert!(found[0].what.contains("grain 1 is stored here"), "{found:?}");
    assert!(contents(&opened(&twice).unwrap().disk) == data);
}
