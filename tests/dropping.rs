//! Images whose user forgot to close them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::sync::Arc;

use common::images::{Image, Kind, errors, small};
use common::pattern;
use flatdisk::disk::Disk;
use flatdisk::disk::map::{BlockMap, DiskRange, ExtentList, Geometry, Source, WritePlan};
use flatdisk::error::{Error, ErrorKind, Result};
use flatdisk::formats::{self, OpenOptions};
use flatdisk::storage::faulty::{Call, Fault, Faults, FaultyHost};
use flatdisk::storage::memory::{MemoryFile, MemoryHost};
use flatdisk::storage::recording::RecordingHost;
use flatdisk::storage::{Access, Host, Storage};
use parking_lot::Mutex;

const LEN: u64 = 70_000;

/// A new image of every kind.
fn every_image(test: impl Fn(&Image, &Arc<MemoryHost>)) {
    for image in small() {
        println!("{}", image.name());
        let host = MemoryHost::new();
        image.create(&host).unwrap();
        test(&image, &host);
    }
}

fn open(image: &Image, host: &Arc<dyn Host>, access: Access) -> formats::Image {
    formats::open(host, &image.path(), &OpenOptions::new(access)).unwrap()
}

fn holds(image: &Image, host: &Arc<dyn Host>, stamp: u32) -> bool {
    let mut found = vec![0; LEN as usize];
    open(image, host, Access::Read).disk.read_at(1024, &mut found).unwrap();
    found == pattern::bytes(stamp, 1024, LEN)
}

#[test]
fn what_was_written_is_there_after_the_image_was_dropped() {
    every_image(|kind, created| {
        let recorder = RecordingHost::over(created);
        let host: Arc<dyn Host> = recorder.clone();
        let image = open(kind, &host, Access::Write);
        image.disk.write_at(1024, &pattern::bytes(1, 1024, LEN)).unwrap();
        // Whoever drops it last closes it.
        let disk = image.disk.clone();
        drop(image);
        disk.write_at(1024, &pattern::bytes(2, 1024, LEN)).unwrap();
        drop(disk);
        assert!(holds(kind, &host, 2));
        assert_eq!(errors(&host, &kind.path()).unwrap(), Vec::<String>::new());
        // As a close, it leaves nothing for a later one to do.
        let closed = recorder.position();
        open(kind, &host, Access::Write).close().unwrap();
        assert_eq!(recorder.position(), closed);
    });
}

#[test]
fn an_image_that_was_not_written_is_dropped_without_a_change() {
    every_image(|kind, created| {
        let recorder = RecordingHost::over(created);
        let host: Arc<dyn Host> = recorder.clone();
        drop(open(kind, &host, Access::Write));
        drop(open(kind, &host, Access::Read));
        assert_eq!(recorder.position(), 0);
    });
}

#[test]
fn close_says_what_failed_and_a_drop_after_it_does_nothing_more() {
    every_image(|kind, created| {
        let faults = Arc::new(Faults::default());
        let host: Arc<dyn Host> = FaultyHost::over(created.clone(), &faults);
        let image = open(kind, &host, Access::Write);
        image.disk.write_at(1024, &pattern::bytes(1, 1024, LEN)).unwrap();
        faults.inject(&[Call::Sync], 0, Fault::Errno(5), false);
        let disk = image.disk.clone();
        image.close().expect_err("the sync fails");
        let changes = faults.count(&Call::CHANGES);
        // What the failed flush should have covered is lost: nobody tries again.
        disk.close().expect_err("it failed before");
        disk.write_at(0, &[1]).expect_err("it failed before");
        drop(disk);
        assert_eq!(faults.count(&Call::CHANGES), changes);
    });
}

#[test]
fn closing_twice_is_closing_once_and_ends_writing() {
    every_image(|kind, created| {
        let recorder = RecordingHost::over(created);
        let host: Arc<dyn Host> = recorder.clone();
        let disk = open(kind, &host, Access::Write).disk;
        disk.write_at(1024, &pattern::bytes(1, 1024, LEN)).unwrap();
        disk.close().unwrap();
        let closed = recorder.position();
        disk.close().unwrap();
        assert_eq!(disk.write_at(0, &[1]).unwrap_err().kind(), ErrorKind::Failed);
        assert_eq!(disk.discard(0, 512).unwrap_err().kind(), ErrorKind::Failed);
        disk.flush().unwrap();
        drop(disk);
        assert_eq!(recorder.position(), closed);
        assert!(holds(kind, &host, 1));
    });
}

#[test]
fn a_full_host_with_room_again_takes_what_a_drop_flushes() {
    let kind = Image::new("vhdx", "dynamic", 64 << 20);
    let created = MemoryHost::new();
    kind.create(&created).unwrap();
    let faults = Arc::new(Faults::default());
    let host: Arc<dyn Host> = FaultyHost::over(created, &faults);
    let image = open(&kind, &host, Access::Write);
    image.disk.write_at(1024, &pattern::bytes(1, 1024, LEN)).unwrap();
    faults.inject(&[Call::Write], 0, Fault::Errno(libc::ENOSPC), true);
    assert_eq!(image.disk.close().unwrap_err().kind(), ErrorKind::NoSpace);
    faults.clear();
    drop(image);
    assert!(holds(&kind, &host, 1));
}

/// A plain file, with a note of each flush and close.
struct Noted {
    name: &'static str,
    files: [Arc<dyn Storage>; 1],
    geometry: Geometry,
    notes: Arc<Mutex<Vec<String>>>,
}

impl Noted {
    fn disk(
        name: &'static str,
        below: Option<Arc<Disk>>,
        notes: &Arc<Mutex<Vec<String>>>,
    ) -> Arc<Disk> {
        let geometry = Geometry {
            size: 1 << 20,
            logical_sector: 512,
            physical_sector: 512,
            block_size: 1 << 20,
        };
        let files: [Arc<dyn Storage>; 1] = [MemoryFile::new(name, &[0; 1 << 20])];
        let map = Self { name, files, geometry, notes: notes.clone() };
        Arc::new(Disk::new(Box::new(map), below, None))
    }

    fn note(&self, what: &str) {
        self.notes.lock().push(format!("{} {what}", self.name));
    }
}

impl BlockMap for Noted {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn files(&self) -> &[Arc<dyn Storage>] {
        &self.files
    }

    fn lookup(&self, want: DiskRange, out: &mut ExtentList) -> Result<()> {
        let source = Source::File { file: 0, at: want.start };
        out.push(want.start, want.end - want.start, source);
        Ok(())
    }

    fn prepare_write(&self, _want: DiskRange) -> Result<WritePlan<'_>> {
        Err(Error::invalid("everything is there"))
    }

    fn flush(&self) -> Result<()> {
        self.note("flush");
        Ok(())
    }

    fn close(&self) -> Result<()> {
        self.note("close");
        Ok(())
    }
}

#[test]
fn a_child_is_closed_before_the_parent_it_holds() {
    let notes = Arc::default();
    let parent = Noted::disk("parent", None, &notes);
    let child = Noted::disk("child", Some(parent.clone()), &notes);
    parent.write_at(0, &[1]).unwrap();
    child.write_at(0, &[2]).unwrap();
    drop(parent);
    assert_eq!(*notes.lock(), Vec::<String>::new());
    drop(child);
    assert_eq!(*notes.lock(), ["child flush", "child close", "parent flush", "parent close"]);
}
