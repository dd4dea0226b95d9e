//! What a flush costs, and what happens when the host fails.

use std::path::Path;
use std::sync::Arc;

use super::recorder::{Recorder, RecordingHost};
use super::{MIB, PATH, Vhdx, contents, created, open, spec};
use crate::error::ErrorKind;
use crate::formats::{self, CreateSpec, Image, OpenOptions};
use crate::storage::memory::{MemoryFile, MemoryHost};
use crate::storage::{Access, Host};

fn new_image(spec: &CreateSpec) -> Vec<u8> {
    let memory = MemoryHost::new();
    formats::create(&Vhdx, &*memory, Path::new(PATH), spec).unwrap();
    memory.file(Path::new(PATH)).unwrap().to_vec()
}

fn open_recorded(host: &Arc<RecordingHost>) -> Image {
    let host: Arc<dyn Host> = host.clone();
    formats::open(&host, Path::new(PATH), &OpenOptions::new(Access::Write)).unwrap()
}

#[test]
fn a_flush_costs_two_syncs_with_tables_and_one_without() {
    let bytes = new_image(&CreateSpec { block_size: Some(MIB), ..spec(400 * MIB) });
    let host = RecordingHost::new(&bytes, MemoryHost::new());
    let image = open_recorded(&host);
    let cost = |work: &dyn Fn()| {
        let before = host.file.syncs();
        work();
        host.file.syncs() - before
    };
    let begin = cost(&|| image.disk.write_at(0, &[1]).unwrap());
    assert_eq!(begin, 3);
    assert_eq!(cost(&|| image.disk.flush().unwrap()), 2);
    for i in 1..300 {
        image.disk.write_at(i * MIB, &[1; 512]).unwrap();
        assert_eq!(cost(&|| image.disk.flush().unwrap()), 2, "flush {i}");
    }
    image.disk.write_at(100, &[2; 700]).unwrap();
    assert_eq!(cost(&|| image.disk.flush().unwrap()), 1);
    assert_eq!(cost(&|| image.disk.flush().unwrap()), 0);
}

#[test]
fn identifiers_change_with_the_first_write_and_only_then() {
    let host = created(&spec(4 * MIB));
    let ids = |image: &Image| {
        let text = |name: &str| image.info.details[name].as_str().unwrap().to_owned();
        (text("file_write_guid"), text("data_write_guid"))
    };
    let first = ids(&open(&host));
    open(&host).disk.close().unwrap();
    let image = open(&host);
    assert_eq!(ids(&image), first);
    image.disk.write_at(0, &[1]).unwrap();
    image.disk.close().unwrap();
    let second = ids(&open(&host));
    assert!(second.0 != first.0 && second.1 != first.1);
}

#[test]
fn more_tables_than_one_entry_holds_are_flushed_in_several() {
    // Each page of the BAT covers 512 blocks; a 1 MiB log takes 126 pages at a time.
    let host = created(&CreateSpec { block_size: Some(MIB), ..spec(200 * 512 * MIB) });
    let image = open(&host);
    for page in 0..200 {
        image.disk.write_at(page * 512 * MIB, &[page as u8 + 1; 512]).unwrap();
    }
    image.disk.flush().unwrap();
    drop(image);
    let image = open(&host);
    for page in 0..200 {
        let mut buf = [0; 512];
        image.disk.read_at(page * 512 * MIB, &mut buf).unwrap();
        assert_eq!(buf, [page as u8 + 1; 512]);
    }
}

#[test]
fn the_largest_disk_is_made_opened_and_written_at_once() {
    let started = std::time::Instant::now();
    let spec = CreateSpec { block_size: Some(MIB), ..spec(64 << 40) };
    let host = created(&spec);
    let image = open(&host);
    image.disk.write_at((64 << 40) - 5, &[1; 5]).unwrap();
    image.disk.write_at(32 << 40, &[2; 5]).unwrap();
    image.disk.close().unwrap();
    let image = open(&host);
    let mut buf = [0; 6];
    image.disk.read_at((64 << 40) - 6, &mut buf).unwrap();
    assert_eq!(buf, [0, 1, 1, 1, 1, 1]);
    assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
}

#[test]
fn the_unused_end_is_cut_off_at_close() {
    let host = created(&CreateSpec { block_size: Some(MIB), ..spec(100 * MIB) });
    let image = open(&host);
    image.disk.write_at(50 * MIB, &[1]).unwrap();
    let file = host.open(Path::new(PATH), Access::Read).unwrap();
    assert!(file.len().unwrap() > 5 * MIB);
    image.disk.close().unwrap();
    assert_eq!(file.len().unwrap(), 5 * MIB);
}

/// Runs a workload on a file that fails from the `left`th change on, until something fails.
fn failing(
    bytes: &[u8],
    left: i64,
    errno: i32,
) -> (Arc<RecordingHost>, Vec<u8>, Option<ErrorKind>) {
    let file = Recorder::failing(MemoryFile::new(PATH, bytes), left, errno);
    let host = Arc::new(RecordingHost { file, others: MemoryHost::new() });
    let image = open_recorded(&host);
    let mut flushed = contents(&image.disk);
    let mut model = flushed.clone();
    let run = || -> crate::error::Result<()> {
        for i in 0..12u8 {
            let at = u64::from(i) * 700_000 % (6 * MIB - 9000);
            image.disk.write_at(at, &[i + 1; 9000])?;
            model[at as usize..][..9000].fill(i + 1);
            if i % 3 == 2 {
                image.disk.discard(2 * MIB, MIB)?;
                model[2 << 20..3 << 20].fill(0);
                image.disk.flush()?;
                flushed.clone_from(&model);
            }
        }
        image.disk.close()
    };
    let mut run = run;
    let result = run();
    (host.clone(), flushed, result.err().map(|e| e.kind()))
}

#[test]
fn any_failing_call_is_reported_and_costs_nothing_that_was_flushed() {
    const EIO: i32 = 5;
    let bytes = new_image(&CreateSpec { block_size: Some(MIB), ..spec(6 * MIB) });
    for left in 0.. {
        let (host, flushed, failure) = failing(&bytes, left, EIO);
        if failure.is_none() {
            assert!(left > 30);
            break;
        }
        // What the flush did not cover may be there or not; the rest must be.
        host.file.heal();
        let image = open_recorded(&host);
        let now = contents(&image.disk);
        let same = now.iter().zip(&flushed).filter(|(a, b)| a == b).count();
        assert!(same + 3 * 9000 + (1 << 20) >= now.len(), "failing at {left}");
        image.disk.write_at(0, &[1]).unwrap();
        image.disk.close().unwrap();
    }
}

#[test]
fn a_full_host_is_not_the_end() {
    const ENOSPC: i32 = 28;
    let bytes = new_image(&CreateSpec { block_size: Some(MIB), ..spec(6 * MIB) });
    let mut recovered = 0;
    'next: for left in 0..60 {
        let file = Recorder::failing(MemoryFile::new(PATH, &bytes), left, ENOSPC);
        let host = Arc::new(RecordingHost { file: file.clone(), others: MemoryHost::new() });
        let image = open_recorded(&host);
        let mut model = contents(&image.disk);
        for i in 0..10u8 {
            let at = u64::from(i) * 700_000 % (6 * MIB - 9000);
            let write =
                || image.disk.write_at(at, &[i + 1; 9000]).and_then(|()| image.disk.flush());
            if let Err(e) = write() {
                if e.kind() != ErrorKind::NoSpace {
                    // It was a sync that failed: the disk accepts nothing more.
                    file.heal();
                    assert_eq!(write().unwrap_err().kind(), ErrorKind::Failed);
                    continue 'next;
                }
                file.heal();
                recovered += 1;
                write().unwrap();
            }
            model[at as usize..][..9000].fill(i + 1);
        }
        assert!(contents(&image.disk) == model, "full after {left}");
        drop(image);
        assert!(contents(&open_recorded(&host).disk) == model, "full after {left}");
    }
    assert!(recovered > 20, "{recovered}");
}
