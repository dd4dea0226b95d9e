//! What the layers above FUSE cost by themselves, on images in memory: `cargo bench`.
//!
//! - `lookup`: which extents 4 KiB at random, or 1 MiB, lie in, tables cached;
//! - `read`: the same 4 KiB with their bytes;
//! - `chain`: 4 KiB at random of a disk that seven children and their base make up, and of one image that
//!   holds the same;
//! - `allocate`: 64 new blocks of an empty image, without and with the flush that writes their tables
//!   (for VHDX that is the log);
//! - `inflate`: 64 KiB of a streamOptimized VMDK.
#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark of images it made itself")]

use std::hint::black_box;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use flatdisk::disk::Disk;
use flatdisk::formats::{self, CreateSpec, OpenOptions};
use flatdisk::storage::memory::{MemoryFile, MemoryHost};
use flatdisk::storage::{Access, Host};
use flate2::Compression;
use flate2::write::ZlibEncoder;

const SIZE: u64 = 1 << 30;
const GRAIN: u64 = 64 << 10;

/// Images whose blocks are allocated one by one.
const KINDS: [(&str, &str); 3] =
    [("vhd", "dynamic"), ("vhdx", "dynamic"), ("vmdk", "monolithicSparse")];

fn created(format: &str, subformat: &str) -> Arc<MemoryHost> {
    let host = MemoryHost::new();
    let spec = CreateSpec { subformat: Some(subformat.into()), size: SIZE, ..Default::default() };
    formats::create(formats::by_name(format).unwrap(), &*host, &path(format), &spec).unwrap();
    host
}

fn path(format: &str) -> std::path::PathBuf {
    Path::new("/bench").join(format!("disk.{format}"))
}

fn opened(host: &Arc<MemoryHost>, format: &str, access: Access) -> Arc<Disk> {
    let host: Arc<dyn Host> = host.clone();
    formats::open(&host, &path(format), &OpenOptions::new(access)).unwrap().disk
}

/// A disk with every other 64 KiB of its first 128 MiB written, so that tables are no single run.
fn half_full(format: &str, subformat: &str) -> Arc<Disk> {
    let disk = opened(&created(format, subformat), format, Access::Write);
    for at in (0..128 << 20).step_by(2 * GRAIN as usize) {
        disk.write_at(at, &[1; GRAIN as usize]).unwrap();
    }
    disk.flush().unwrap();
    disk
}

fn lookups(c: &mut Criterion) {
    for (format, subformat) in KINDS {
        let disk = half_full(format, subformat);
        let mut rng = fastrand::Rng::with_seed(1);
        let mut place = move |len: u64| rng.u64(..(128 << 20) / len) * len;
        c.benchmark_group("lookup/4 KiB").bench_function(format, |b| {
            b.iter_batched(
                || place(4096),
                |at| black_box(disk.extents(at..at + 4096).unwrap()),
                BatchSize::SmallInput,
            );
        });
        c.benchmark_group("lookup/1 MiB").bench_function(format, |b| {
            b.iter_batched(
                || place(1 << 20),
                |at| black_box(disk.extents(at..at + (1 << 20)).unwrap()),
                BatchSize::SmallInput,
            );
        });
        let mut buf = [0; 4096];
        let mut group = c.benchmark_group("read/4 KiB");
        group.throughput(Throughput::Bytes(4096)).bench_function(format, |b| {
            b.iter_batched(
                || place(4096),
                |at| disk.read_at(at, black_box(&mut buf)).unwrap(),
                BatchSize::SmallInput,
            );
        });
    }
}

/// Bytes of a disk of which every generation has written a part.
const CHAIN_SIZE: u64 = 128 << 20;

/// The top of a chain of eight generations, each of which wrote its own pieces of 64 KiB, and one image
/// with the same contents.
fn chain_and_flat(format: &str, subformat: &str) -> [Arc<Disk>; 2] {
    let driver = formats::by_name(format).unwrap();
    let host = MemoryHost::new();
    let shared: Arc<dyn Host> = host.clone();
    let spec =
        CreateSpec { subformat: Some(subformat.into()), size: CHAIN_SIZE, ..Default::default() };
    let generation = |number: u32| path(format).with_file_name(format!("{number}.{format}"));
    let open =
        |path: &Path, access| formats::open(&shared, path, &OpenOptions::new(access)).unwrap();
    let mut rng = fastrand::Rng::with_seed(3);
    for number in 0..8 {
        if number == 0 {
            formats::create(driver, &*host, &generation(0), &spec).unwrap();
        } else {
            let parent = open(&generation(number - 1), Access::Read);
            let spec = CreateSpec::default();
            formats::create_child(driver, &*host, &generation(number), &parent, &spec).unwrap();
        }
        let disk = open(&generation(number), Access::Write).disk;
        let pieces = CHAIN_SIZE / GRAIN;
        for piece in 0..pieces {
            if number == 0 || rng.u64(..8) == 0 {
                disk.write_at(piece * GRAIN, &[number as u8 + 1; GRAIN as usize]).unwrap();
            }
        }
        disk.close().unwrap();
    }
    let top = open(&generation(7), Access::Read).disk;
    formats::create(driver, &*host, &path(format), &spec).unwrap();
    let flat = open(&path(format), Access::Write).disk;
    let mut buf = vec![0; GRAIN as usize];
    for at in (0..CHAIN_SIZE).step_by(GRAIN as usize) {
        top.read_at(at, &mut buf).unwrap();
        flat.write_at(at, &buf).unwrap();
    }
    flat.close().unwrap();
    drop(flat);
    [top, open(&path(format), Access::Read).disk]
}

fn chains(c: &mut Criterion) {
    for (format, subformat) in KINDS {
        for (disk, name) in chain_and_flat(format, subformat).into_iter().zip(["of 8", "flat"]) {
            let mut rng = fastrand::Rng::with_seed(4);
            let mut buf = [0; 4096];
            c.benchmark_group(format!("chain/{format}")).bench_function(name, |b| {
                b.iter_batched(
                    || rng.u64(..CHAIN_SIZE / 4096) * 4096,
                    |at| disk.read_at(at, black_box(&mut buf)).unwrap(),
                    BatchSize::SmallInput,
                );
            });
        }
    }
}

fn allocations(c: &mut Criterion) {
    for (format, subformat) in KINDS {
        let empty = created(format, subformat);
        for (name, flush) in [("allocate/64 blocks", false), ("allocate/64 blocks, flush", true)] {
            c.benchmark_group(name).bench_function(format, |b| {
                b.iter_batched_ref(
                    || opened(&empty.fork(), format, Access::Write),
                    |disk| {
                        for block in 0..64 {
                            disk.write_at(block * (4 << 20), &[1; 4096]).unwrap();
                        }
                        if flush {
                            disk.flush().unwrap();
                        }
                    },
                    BatchSize::SmallInput,
                );
            });
        }
    }
}

/// A streamOptimized VMDK of one grain table whose 512 grains compress to about a half.
fn stream() -> Arc<MemoryHost> {
    let (grains, table_entries) = (512u64, 512u64);
    let descriptor = format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n\
         createType=\"streamOptimized\"\nRW {} SPARSE \"disk.vmdk\"\n",
        grains * GRAIN / 512
    );
    let header = |directory: u64| {
        let mut h = Vec::new();
        h.extend(b"KDMV");
        h.extend(3u32.to_le_bytes());
        // Valid line ends, compressed grains, markers.
        h.extend(0x3_0001u32.to_le_bytes());
        for field in [grains * GRAIN / 512, GRAIN / 512, 1, 2] {
            h.extend(field.to_le_bytes());
        }
        h.extend((table_entries as u32).to_le_bytes());
        for field in [0, directory, 128] {
            h.extend(field.to_le_bytes());
        }
        h.extend([0, b'\n', b' ', b'\r', b'\n', 1, 0]);
        h.resize(512, 0);
        h
    };
    let mut file = header(u64::MAX);
    file.extend(descriptor.as_bytes());
    file.resize(128 * 512, 0);
    let pad = |file: &mut Vec<u8>| file.resize(file.len().next_multiple_of(512), 0);
    let marker = |file: &mut Vec<u8>, sectors: u64, kind: u32| {
        file.extend(sectors.to_le_bytes());
        file.extend(0u32.to_le_bytes());
        file.extend(kind.to_le_bytes());
        pad(file);
    };
    let mut rng = fastrand::Rng::with_seed(2);
    let mut table = Vec::new();
    for grain in 0..grains {
        table.extend(((file.len() / 512) as u32).to_le_bytes());
        let plain: Vec<u8> = (0..GRAIN).map(|_| rng.u8(..16)).collect();
        let mut packed = ZlibEncoder::new(Vec::new(), Compression::default());
        packed.write_all(&plain).unwrap();
        let packed = packed.finish().unwrap();
        file.extend((grain * GRAIN / 512).to_le_bytes());
        file.extend((packed.len() as u32).to_le_bytes());
        file.extend(packed);
        pad(&mut file);
    }
    marker(&mut file, table_entries * 4 / 512, 1);
    let table_at = (file.len() / 512) as u32;
    file.extend(table);
    marker(&mut file, 1, 2);
    let directory = (file.len() / 512) as u64;
    file.extend(table_at.to_le_bytes());
    pad(&mut file);
    marker(&mut file, 1, 3);
    file.extend(header(directory));
    marker(&mut file, 0, 0);
    let host = MemoryHost::new();
    host.insert(MemoryFile::new(path("vmdk"), &file));
    host
}

fn inflate(c: &mut Criterion) {
    let disk = opened(&stream(), "vmdk", Access::Read);
    let mut buf = vec![0; GRAIN as usize];
    let mut at = 0;
    let mut group = c.benchmark_group("inflate");
    group.throughput(Throughput::Bytes(GRAIN)).bench_function("64 KiB grain", |b| {
        b.iter(|| {
            // One after another, so that no grain is still unpacked from the time before.
            at = (at + GRAIN) % disk.size();
            disk.read_at(at, black_box(&mut buf)).unwrap();
        });
    });
}

criterion_group!(benches, lookups, chains, allocations, inflate);
criterion_main!(benches);
