//! Random operations against a plain vector.

use std::sync::Arc;

use super::*;
use crate::storage::Storage;

const KIB: u64 = 1 << 10;

/// Disks of every writable shape, small enough to be read as a whole, with odd borders.
fn shapes() -> Vec<(&'static str, Arc<MemoryHost>)> {
    let mut shapes = Vec::new();
    for subformat in writable_subformats() {
        let spec = spec(subformat, 3 * 1024 * KIB + 512);
        shapes.push((subformat, created("d.vmdk", &spec)));
    }
    let small = CreateSpec { block_size: Some(4096), ..spec("monolithicSparse", 9000 * KIB) };
    shapes.push(("small grains", created("d.vmdk", &small)));

    for (shape, subformat, zeroed) in [
        ("child", "monolithicSparse", false),
        ("child with zeroed grains", "monolithicFlat", true),
        ("vmfsSparse child", "vmfs", false),
    ] {
        let host = created("base.vmdk", &spec(subformat, 3 * 1024 * KIB));
        let base = open_rw(&host, "base.vmdk");
        let mut pattern = vec![0; 1024 * KIB as usize];
        fastrand::Rng::with_seed(1).fill(&mut pattern);
        base.disk.write_at(512 * KIB + 5, &pattern).unwrap();
        base.disk.close().unwrap();
        let base = open_with(&host, "base.vmdk", Access::Read).unwrap();
        formats::vmdk::create_child(&*host, &at("d.vmdk"), &base, &formats::CreateSpec::default())
            .unwrap();
        if zeroed {
            // Version 2, flags 7.
            let file = host.file(&at("d.vmdk")).unwrap();
            Storage::write_at(&*file, 4, &[2, 0, 0, 0, 7]).unwrap();
        }
        shapes.push((shape, host));
    }

    let split = MemoryHost::new();
    let mut lines = String::new();
    for number in 1..=5 {
        let name = format!("d-s{number:03}.vmdk");
        let sectors = if number == 5 { 77 } else { 1024 };
        add_sparse(&split, &name, sectors, 128);
        lines += &format!("RW {sectors} SPARSE \"{name}\"\n");
    }
    add(&split, "d.vmdk", custom(&lines).as_bytes());
    shapes.push(("split", split));

    // Sparse extents that begin and end in the middle of grains, between flat ones.
    let mixed = MemoryHost::new();
    add(&mixed, "flat", &[0; 200 * 512]);
    add_sparse(&mixed, "a", 1111, 128);
    add_sparse(&mixed, "b", 3001, 256);
    let lines = "RW 63 FLAT \"flat\" 100\nRW 1111 SPARSE \"a\"\nRW 33 FLAT \"flat\" 0\n\
                 RW 3001 SPARSE \"b\"";
    add(&mixed, "d.vmdk", custom(lines).as_bytes());
    shapes.push(("mixed", mixed));
    shapes
}

/// An operation on `range`; `model` is what the disk must hold there.
fn operate(rng: &mut fastrand::Rng, disk: &Disk, base: u64, model: &mut [u8]) {
    let size = model.len() as u64;
    let unit = [1, 512, 4096, 65_536][rng.usize(..4)];
    let start = rng.u64(..size) / unit * unit;
    let longest = [size, 300 * KIB, 5000][rng.usize(..3)];
    let len = rng.u64(..=(size - start).min(longest)) / unit * unit;
    let range = start as usize..(start + len) as usize;
    let at = base + start;
    match rng.u8(..10) {
        0..4 => {
            let mut bytes = vec![0xee; len as usize];
            disk.read_at(at, &mut bytes).unwrap();
            assert!(bytes == model[range], "read of {len} bytes at {at:#x}");
        }
        4..7 => {
            let bytes: Vec<u8> = match rng.bool() {
                true => vec![rng.u8(..); len as usize],
                false => (0..len).map(|_| rng.u8(..)).collect(),
            };
            disk.write_at(at, &bytes).unwrap();
            model[range].copy_from_slice(&bytes);
        }
        7..9 => {
            disk.discard(at, len).unwrap();
            model[range].fill(0);
        }
        _ => disk.flush().unwrap(),
    }
}

#[test]
fn random_operations_match_a_vector() {
    for seed in 0..12 {
        for (shape, host) in shapes() {
            println!("{shape}, seed {seed}");
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut host = host;
            let mut image = open_rw(&host, "d.vmdk");
            let mut model = contents(&image.disk);
            for _ in 0..6 {
                for _ in 0..rng.u32(..40) {
                    operate(&mut rng, &image.disk, 0, &mut model);
                }
                if rng.bool() {
                    image.disk.close().unwrap();
                    drop(image);
                    assert_eq!(check(&host, "d.vmdk").errors, 0);
                } else {
                    // As if the process were killed: nothing is closed, nothing more is written.
                    image.disk.flush().unwrap();
                    host = copy(&host);
                    drop(image);
                    assert_eq!(check(&host, "d.vmdk").errors, 0);
                }
                let read_only = open_with(&host, "d.vmdk", Access::Read).unwrap();
                assert!(contents(&read_only.disk) == model, "{shape}, seed {seed}");
                drop(read_only);
                image = match rng.bool() {
                    true => open_rw(&host, "d.vmdk"),
                    false => open_starved(&host, "d.vmdk"),
                };
            }
            image.disk.close().unwrap();
        }
    }
}

#[test]
fn random_operations_from_four_threads_match_a_vector() {
    for seed in 0..6 {
        for (shape, host) in shapes() {
            println!("{shape}, seed {seed}");
            let image = match seed % 2 {
                0 => open_rw(&host, "d.vmdk"),
                _ => open_starved(&host, "d.vmdk"),
            };
            let mut model = contents(&image.disk);
            for round in 0..3 {
                // Borders in the middle of sectors and grains.
                let quarter = model.len() / 4 + 77;
                std::thread::scope(|scope| {
                    let mut base = 0;
                    for (index, part) in model.chunks_mut(quarter).enumerate() {
                        let disk = &image.disk;
                        let mut rng =
                            fastrand::Rng::with_seed(seed * 1000 + round * 10 + index as u64);
                        scope.spawn(move || {
                            for _ in 0..40 {
                                operate(&mut rng, disk, base, part);
                            }
                        });
                        base += quarter as u64;
                    }
                });
                assert!(contents(&image.disk) == model, "{shape}, seed {seed}");
                image.disk.flush().unwrap();
                let crashed = copy(&host);
                let again = open_with(&crashed, "d.vmdk", Access::Read).unwrap();
                assert!(contents(&again.disk) == model, "{shape}, seed {seed}, reopened");
            }
            image.disk.close().unwrap();
            assert_eq!(check(&host, "d.vmdk").errors, 0);
        }
    }
}
