//! What a flush costs, and what opening, the first write and closing change.

use std::path::Path;
use std::sync::Arc;

use super::{MIB, PATH, Vhdx, created, open, spec};
use crate::formats::{self, CreateSpec, Image};
use crate::storage::memory::MemoryHost;
use crate::storage::recording::{Change, RecordingHost};
use crate::storage::{Access, Host};

#[test]
fn a_flush_costs_two_syncs_with_tables_and_one_without() {
    let memory = MemoryHost::new();
    let spec = CreateSpec { block_size: Some(MIB), ..spec(400 * MIB) };
    formats::create(&Vhdx, &*memory, Path::new(PATH), &spec).unwrap();
    let recorder = RecordingHost::over(&memory);
    let host: Arc<dyn Host> = recorder.clone();
    let image = open(&host);
    let cost = |work: &dyn Fn()| {
        let before = recorder.position();
        work();
        let recording = recorder.recording();
        recording.ops()[before..].iter().filter(|op| matches!(op.change, Change::Sync)).count()
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

#[test]
fn a_fixed_disk_is_one_run_of_its_file_only_with_its_blocks_in_order() {
    let fixed =
        CreateSpec { subformat: Some("fixed".to_owned()), block_size: Some(MIB), ..spec(4 * MIB) };
    let host = created(&fixed);
    let image = open(&host);
    let (_, at) = image.disk.fixed_run().unwrap();
    assert_eq!(image.info.subformat, "fixed");
    image.disk.close().unwrap();
    drop(image);

    // The first two blocks change places: states and offsets of their entries in the BAT.
    let file = host.open(Path::new(PATH), Access::Write).unwrap();
    let mut tables = vec![0; at as usize];
    file.read_at(0, &mut tables).unwrap();
    let entry = |block: u64| (at + block * MIB) | 6;
    let both: Vec<u8> = [entry(0), entry(1)].iter().flat_map(|e| e.to_le_bytes()).collect();
    let bat = tables.windows(16).position(|bytes| bytes == both).unwrap() as u64;
    for (slot, block) in [(0, 1), (1, 0)] {
        file.write_at(bat + slot * 8, &entry(block).to_le_bytes()).unwrap();
    }
    drop(file);
    assert!(open(&host).disk.fixed_run().is_none());

    // A dynamic disk is none, even all of it written in order: its blocks can be given back.
    let host = created(&CreateSpec { block_size: Some(MIB), ..spec(4 * MIB) });
    let image = open(&host);
    image.disk.write_at(0, &vec![1; 4 << 20]).unwrap();
    assert!(image.disk.fixed_run().is_none());
}
