//! Random operations against a plain array of bytes.

use std::path::Path;
use std::sync::Arc;

use fastrand::Rng;

use super::{MIB, PATH, contents, created, open, spec};
use crate::formats::{CreateSpec, Image};
use crate::storage::Host;
use crate::storage::memory::MemoryHost;

/// One disk and what it should hold.
struct Model {
    host: Arc<dyn Host>,
    image: Image,
    bytes: Vec<u8>,
}

impl Model {
    fn new(spec: &CreateSpec) -> Self {
        let host = created(spec);
        let image = open(&host);
        let bytes = vec![0; image.disk.size() as usize];
        Self { host, image, bytes }
    }

    fn range(&self, rng: &mut Rng) -> std::ops::Range<usize> {
        let start = rng.usize(..self.bytes.len());
        let longest = match rng.u8(..10) {
            0 => 3 << 20,
            1..4 => 200_000,
            _ => 9000,
        };
        start..(start + rng.usize(1..longest)).min(self.bytes.len())
    }

    fn step(&mut self, rng: &mut Rng) {
        let disk = &self.image.disk;
        let range = self.range(rng);
        let offset = range.start as u64;
        match rng.u8(..100) {
            0..45 => {
                let value = rng.u8(..);
                let data: Vec<u8> = (0..range.len()).map(|i| value.wrapping_add(i as u8)).collect();
                disk.write_at(offset, &data).unwrap();
                self.bytes[range].copy_from_slice(&data);
            }
            45..75 => {
                let mut buf = vec![0xcc; range.len()];
                disk.read_at(offset, &mut buf).unwrap();
                assert!(buf == self.bytes[range.clone()], "read of {range:x?}");
            }
            75..88 => {
                let end = (range.end + rng.usize(..5 << 20)).min(self.bytes.len());
                disk.discard(offset, end as u64 - offset).unwrap();
                self.bytes[range.start..end].fill(0);
            }
            88..95 => disk.flush().unwrap(),
            95..98 => {
                // What was flushed survives a program that just ends.
                disk.flush().unwrap();
                let ended = std::mem::replace(&mut self.image, open(&self.host));
                // Dropped it would be closed, in a file that somebody else has open by now.
                std::mem::forget(ended);
                self.verify();
            }
            _ => {
                disk.write_at(offset, &self.bytes[range]).unwrap();
                disk.close().unwrap();
                self.image = open(&self.host);
                assert!(!self.image.info.dirty);
                self.verify();
            }
        }
    }

    fn verify(&self) {
        assert!(contents(&self.image.disk) == self.bytes);
    }
}

fn file_len(host: &MemoryHost) -> u64 {
    use crate::storage::Storage;
    host.file(Path::new(PATH)).unwrap().len().unwrap()
}

#[test]
fn random_operations_on_every_geometry() {
    for (i, subformat) in ["dynamic", "fixed"].into_iter().enumerate() {
        for (j, sector) in [512, 4096].into_iter().enumerate() {
            for block in [1, 2] {
                let seed = 1000 + (i * 4 + j * 2) as u64 + block;
                println!("seed {seed}: {subformat}, {sector}-byte sectors, {block} MiB blocks");
                let mut rng = Rng::with_seed(seed);
                let mut model = Model::new(&CreateSpec {
                    subformat: Some(subformat.to_owned()),
                    block_size: Some(block * MIB),
                    logical_sector: Some(sector),
                    ..spec(13 * MIB + 7 * 4096)
                });
                for _ in 0..250 {
                    model.step(&mut rng);
                }
                model.image.disk.close().unwrap();
                model.image = open(&model.host);
                model.verify();
            }
        }
    }
}

#[test]
fn threads_on_ranges_of_their_own_do_not_disturb_each_other() {
    for (subformat, sector, block) in
        [("dynamic", 512, 1), ("dynamic", 4096, 2), ("fixed", 512, 2), ("fixed", 4096, 1)]
    {
        threads_agree(&CreateSpec {
            subformat: Some(subformat.to_owned()),
            block_size: Some(block * MIB),
            logical_sector: Some(sector),
            ..spec(32 * MIB)
        });
    }
}

fn threads_agree(spec: &CreateSpec) {
    let host = created(spec);
    let image = open(&host);
    let model: Vec<u8> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|worker| {
                let disk = image.disk.clone();
                scope.spawn(move || {
                    let mut rng = Rng::with_seed(50 + worker);
                    // Borders in the middle of blocks, so that threads share them.
                    let base = worker * (8 * MIB - MIB / 2);
                    let mut bytes = vec![0u8; (8 << 20) - (1 << 19)];
                    for _ in 0..200 {
                        let start = rng.usize(..bytes.len() - 70_000);
                        let len = rng.usize(1..70_000);
                        let at = base + start as u64;
                        let own = &mut bytes[start..start + len];
                        match rng.u8(..10) {
                            0..6 => {
                                own.fill(rng.u8(1..));
                                disk.write_at(at, own).unwrap();
                            }
                            6..8 => {
                                let mut buf = vec![0xcc; len];
                                disk.read_at(at, &mut buf).unwrap();
                                assert!(buf == own);
                            }
                            8 => {
                                own.fill(0);
                                disk.discard(at, len as u64).unwrap();
                            }
                            _ => disk.flush().unwrap(),
                        }
                    }
                    (base, bytes)
                })
            })
            .collect();
        let mut all = vec![0; 32 << 20];
        for worker in workers {
            let (at, bytes) = worker.join().unwrap();
            all[at as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        all
    });
    assert!(contents(&image.disk) == model);
    image.disk.close().unwrap();
    assert!(contents(&open(&host).disk) == model);
}

#[test]
fn discarded_space_is_used_again() {
    let memory = MemoryHost::new();
    crate::formats::create(
        &super::Vhdx,
        &*memory,
        Path::new(PATH),
        &CreateSpec { block_size: Some(MIB), ..spec(64 * MIB) },
    )
    .unwrap();
    let host: Arc<dyn Host> = memory.clone();
    let image = open(&host);
    for round in 1..40u8 {
        let at = u64::from(round) * MIB;
        image.disk.write_at(at, &vec![round; MIB as usize]).unwrap();
        image.disk.flush().unwrap();
        image.disk.discard(at, MIB).unwrap();
        image.disk.flush().unwrap();
    }
    image.disk.write_at(5, &[1]).unwrap();
    image.disk.close().unwrap();
    assert!(file_len(&memory) <= 6 * MIB, "{:#x}", file_len(&memory));
    let image = open(&host);
    let mut expected = vec![0; 64 << 20];
    expected[5] = 1;
    assert!(contents(&image.disk) == expected);
}
