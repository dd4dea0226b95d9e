//! Changes of an image's size and of its layout, and what a crash may leave of them.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flatdisk::formats::compact::{Compacting, compact};
use flatdisk::formats::resize::resize;
use flatdisk::formats::{self, CreateSpec, OpenOptions};
use flatdisk::storage::faulty::{Call, Fault, Faults, FaultyHost};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::recording::RecordingHost;
use flatdisk::storage::{Access, Host};

use super::crash::{contents, each_state};
use super::history::{SECTOR, Sectors};
use super::images::{Image, Kind, errors};
use super::{in_parallel, number, pattern, seed};

const MIB: u64 = 1 << 20;

/// What is done to an image.
#[derive(Debug, Clone, Copy)]
pub enum Work {
    /// The disk gets that size.
    Resize(u64),
    /// Unused space is given back.
    Compact(Compacting),
}

/// A change of an image.
pub struct Case {
    pub image: Image,
    /// A child of it is what changes.
    pub child: bool,
    pub work: Work,
    /// Called on the image with its data, before.
    pub prepare: fn(&Arc<dyn Host>, &Path),
}

impl Case {
    pub fn name(&self) -> String {
        let child = if self.child { "child of " } else { "" };
        let work = match self.work {
            Work::Resize(size) => format!("to {size} bytes"),
            Work::Compact(how) if how.defragment => "compacted in order".to_owned(),
            Work::Compact(_) => "compacted".to_owned(),
        };
        format!("{child}{} {work}", self.image.name())
    }

    pub fn path(&self) -> PathBuf {
        match self.child {
            true => Path::new("/t/child").with_extension(self.image.format),
            false => self.image.path(),
        }
    }

    /// The image with data all over it.
    pub fn made(&self) -> Made<'_> {
        let host = MemoryHost::new();
        self.image.create(&host).unwrap();
        let dynamic: Arc<dyn Host> = host.clone();
        scatter(&dynamic, &self.image.path(), 1);
        if self.child {
            let parent =
                formats::open(&dynamic, &self.image.path(), &OpenOptions::new(Access::Read))
                    .unwrap();
            let format = formats::by_name(self.image.format).unwrap();
            formats::create_child(format, &*host, &self.path(), &parent, &CreateSpec::default())
                .unwrap();
            drop(parent);
            scatter(&dynamic, &self.path(), 100);
        }
        (self.prepare)(&dynamic, &self.path());
        let (size, whole) = read(&dynamic, &self.path()).unwrap();
        Made { case: self, host, size, whole }
    }

    /// Makes the change; whether anything was to be changed.
    pub fn run(&self, host: &Arc<dyn Host>) -> flatdisk::error::Result<bool> {
        let options = OpenOptions::new(Access::Write);
        match self.work {
            Work::Resize(size) => {
                let done = resize(host, &self.path(), &options, size, false, &())?;
                Ok(!done.changes.is_empty())
            }
            Work::Compact(how) => {
                let done = compact(host, &self.path(), &options, how, &())?;
                Ok(done.moved > 0 || done.zeroes > 0 || done.length != done.length_before)
            }
        }
    }

    /// Bytes of the disk afterwards, if it had that many before.
    pub fn size(&self, before: u64) -> u64 {
        match self.work {
            Work::Resize(size) => size,
            Work::Compact(_) => before,
        }
    }
}

/// Writes to places from the beginning to the last sector of a disk, out of order, and gives some up.
pub fn scatter(host: &Arc<dyn Host>, path: &Path, stamp: u32) {
    let disk = formats::open(host, path, &OpenOptions::new(Access::Write)).unwrap().disk;
    let (size, block) = (disk.size(), disk.geometry().block_size.min(2 * MIB));
    let blocks = size.div_ceil(block);
    let places = [blocks - 1, 0, blocks / 2, 1, blocks / 3, blocks * 2 / 3];
    for (index, number) in places.into_iter().enumerate() {
        let end = ((number + 1) * block).min(size);
        for at in [number * block, end - (end - number * block).min(2048)] {
            let data = pattern::bytes(stamp + index as u32, at, 2048.min(size - at));
            disk.write_at(at, &data).unwrap();
        }
    }
    disk.flush().unwrap();
    disk.discard(block, block.min(size - block)).unwrap();
    disk.close().unwrap();
}

/// Size and contents of a disk.
pub fn read(host: &Arc<dyn Host>, path: &Path) -> Result<(u64, Sectors), String> {
    let image = formats::open(host, path, &OpenOptions::new(Access::Read));
    let disk = image.map_err(|e| e.to_string())?.disk;
    Ok((disk.size(), contents(&disk)?))
}

/// An image before a change.
pub struct Made<'a> {
    pub case: &'a Case,
    pub host: Arc<MemoryHost>,
    /// Bytes of the disk.
    pub size: u64,
    /// What it holds.
    pub whole: Sectors,
}

impl Made<'_> {
    /// What the disk must hold of its first `size` bytes.
    pub fn kept(&self, size: u64) -> Sectors {
        self.whole
            .range(..size / SECTOR)
            .map(|(number, sector)| (*number, sector.clone()))
            .collect()
    }

    /// Whether a crash may leave `state`; `done`: the change had returned.
    pub fn judge(&self, state: &Arc<MemoryHost>, done: bool) -> Result<(), String> {
        let host: Arc<dyn Host> = state.fork();
        self.judge_crash(&host, done)?;
        self.case.run(&host).map_err(|e| format!("the second time: {e}"))?;
        self.judge_end(&host).map_err(|e| format!("the second time: {e}"))
    }

    /// As [`Self::judge`]; but of the disk after the second time only what it holds is looked at, save one
    /// in sixteen.
    pub fn judge_lightly(
        &self,
        state: &Arc<MemoryHost>,
        done: bool,
        seed: u64,
    ) -> Result<(), String> {
        if seed.is_multiple_of(16) {
            return self.judge(state, done);
        }
        let host: Arc<dyn Host> = state.fork();
        self.judge_crash(&host, done)?;
        self.case.run(&host).map_err(|e| format!("the second time: {e}"))?;
        self.judge_contents(&host).map_err(|e| format!("the second time: {e}"))
    }

    /// Whether a crash may leave these files.
    fn judge_crash(&self, host: &Arc<dyn Host>, done: bool) -> Result<(), String> {
        let path = self.case.path();
        let (size, found) = read(host, &path).map_err(|e| format!("after the crash: {e}"))?;
        if size != self.case.size(self.size) && (done || size != self.size) {
            return Err(format!("the disk has {size} bytes after the crash"));
        }
        let kept = self.case.size(self.size).min(self.size);
        if found.range(..kept / SECTOR).ne(self.kept(kept).iter()) {
            return Err("data is lost or wrong after the crash".to_owned());
        }
        // Behind the end of a smaller disk there is the old data or nothing.
        let behind = found.range(kept / SECTOR..);
        let wrong = behind.filter(|(number, sector)| self.whole.get(number) != Some(sector));
        if let Some((number, _)) = wrong.into_iter().next() {
            return Err(format!("sector {number} holds what was never there"));
        }
        let mut wrong = errors(host, &path).map_err(|e| e.to_string())?;
        // While a VHD's footers change, they differ.
        wrong.retain(|error| done || !error.contains("footer"));
        match wrong.is_empty() {
            true => Ok(()),
            false => Err(format!("the check finds: {}", wrong.join("; "))),
        }
    }

    /// Whether the disk is as it should be in the end.
    fn judge_contents(&self, host: &Arc<dyn Host>) -> Result<(), String> {
        let (size, found) = read(host, &self.case.path())?;
        if size != self.case.size(self.size) || found != self.kept(size) {
            let first =
                found.iter().zip(self.kept(size)).find(|((a, x), (b, y))| *a != b || *x != y);
            return Err(format!("{size} bytes, {} sectors; {first:?}", found.len()));
        }
        Ok(())
    }

    /// Whether the change is complete.
    pub fn judge_end(&self, host: &Arc<dyn Host>) -> Result<(), String> {
        self.judge_contents(host)?;
        let path = self.case.path();
        let wrong = errors(host, &path).map_err(|e| e.to_string())?;
        if !wrong.is_empty() {
            return Err(format!("the check finds: {}", wrong.join("; ")));
        }
        match self.case.run(host) {
            Ok(false) => Ok(()),
            Ok(true) => Err("the same once more changes something".to_owned()),
            Err(e) => Err(e.to_string()),
        }
    }
}

fn nothing(_: &Arc<dyn Host>, _: &Path) {}

fn case(image: Image, size: u64) -> Case {
    Case { image, child: false, work: Work::Resize(size), prepare: nothing }
}

/// Stores zeroes in whole blocks, between others that hold something.
fn store_zeroes(host: &Arc<dyn Host>, path: &Path) {
    let disk = formats::open(host, path, &OpenOptions::new(Access::Write)).unwrap().disk;
    let (size, block) = (disk.size(), disk.geometry().block_size.min(MIB / 4));
    let block = block.max(disk.geometry().block_size.min(size / 4 / 4096 * 4096));
    let blocks = size.div_ceil(block);
    for number in [blocks / 2, blocks - 2, 2] {
        let at = number * block;
        disk.write_at(at, &pattern::bytes(50, at, 512)).unwrap();
        disk.flush().unwrap();
        disk.write_at(at, &vec![0; block.min(size - at) as usize]).unwrap();
    }
    disk.write_at(block, &pattern::bytes(51, block, 1024)).unwrap();
    disk.close().unwrap();
}

/// The same, on a disk that outgrew the place of its table.
fn outgrow(host: &Arc<dyn Host>, path: &Path) {
    store_zeroes(host, path);
    let size = if path.extension().is_some_and(|e| e == "vhdx") { 200 << 30 } else { 90 * MIB };
    resize(host, path, &OpenOptions::new(Access::Write), size, false, &()).unwrap();
}

/// Images to be compacted, of every kind.
pub fn compacted() -> Vec<Case> {
    let vhd = |size, block| Image::new("vhd", "dynamic", size).block(block);
    let vhdx = |size| Image::new("vhdx", "dynamic", size).block(MIB).sector(512);
    let vmdk = |subformat, size| Image::new("vmdk", subformat, size);
    let case = |image: Image, defragment| {
        let work = Work::Compact(Compacting { defragment, ..Compacting::default() });
        Case { image, child: false, work, prepare: store_zeroes }
    };
    let child = |case| Case { child: true, ..case };
    let outgrown = |case| Case { prepare: outgrow, ..case };
    let mut all = vec![
        case(Image::new("vhd", "fixed", 3 * MIB + 5 * SECTOR), false),
        case(vhd(400 << 10, 4096), false),
        case(vhd(400 << 10, 4096), true),
        case(vhd(3 * MIB, MIB / 2).tweaked("batmap", super::repairs::xen), false),
        child(case(vhd(3 * MIB + 5 * SECTOR, MIB / 2), true)),
        outgrown(case(vhd(3 * MIB + 5 * SECTOR, MIB / 2), true)),
        outgrown(case(vhdx(5 * MIB + 3 * SECTOR), true)),
        case(Image::new("vhdx", "dynamic", 19 * MIB).block(2 * MIB).sector(4096), true),
        case(Image::new("vhdx", "fixed", 4 * MIB).block(MIB).sector(512), false),
        child(case(vhdx(9 * MIB + 3 * SECTOR), true)),
        outgrown(case(vmdk("monolithicSparse", 40 * MIB + 5 * SECTOR), true)),
        child(case(vmdk("monolithicSparse", 40 * MIB + 5 * SECTOR), true)),
        case(vmdk("twoGbMaxExtentSparse", 2047 * MIB + 300 * SECTOR), true),
        case(vmdk("monolithicFlat", MIB + SECTOR), false),
        case(vmdk("vmfsSparse", 2 * MIB + 67 * SECTOR), false),
        case(vmdk("vmfsSparse", 2 * MIB + 67 * SECTOR), true),
    ];
    for defragment in [false, true] {
        all.push(case(vhd(7 * MIB + 5 * SECTOR, MIB / 2), defragment));
        all.push(case(vhdx(9 * MIB + 3 * SECTOR), defragment));
        all.push(case(vmdk("monolithicSparse", 40 * MIB + 5 * SECTOR), defragment));
    }
    picked(all)
}

/// Larger disks, of every kind, and across every border of their tables.
pub fn grown() -> Vec<Case> {
    let vhd = |size, block| Image::new("vhd", "dynamic", size).block(block);
    let vhdx = |size| Image::new("vhdx", "dynamic", size).block(MIB).sector(512);
    let vmdk = |subformat, size| Image::new("vmdk", subformat, size);
    let child = |case| Case { child: true, ..case };
    let all = vec![
        case(Image::new("vhd", "fixed", 3 * MIB + 5 * SECTOR), 5 * MIB),
        case(vhd(3 * MIB + 5 * SECTOR, MIB / 2), 3 * MIB + 6 * SECTOR),
        case(vhd(3 * MIB + 5 * SECTOR, MIB / 2), 64 * MIB),
        case(vhd(3 * MIB + 5 * SECTOR, MIB / 2), 64 * MIB + SECTOR),
        case(vhd(7 * MIB + 5 * SECTOR, 2 * MIB), 200 << 30),
        case(vhd(400 << 10, 4096), 12 * MIB),
        case(vhd(3 * MIB, MIB / 2).tweaked("batmap", super::repairs::xen), 70 * MIB),
        child(case(vhd(3 * MIB + 5 * SECTOR, MIB / 2), 70 * MIB)),
        case(vhdx(5 * MIB + 3 * SECTOR), 5 * MIB + 4 * SECTOR),
        case(vhdx(5 * MIB + 3 * SECTOR), 6 << 30),
        case(vhdx(5 * MIB + 3 * SECTOR), (128 << 30) + SECTOR),
        case(
            Image::new("vhdx", "dynamic", 9 * MIB).block(2 * MIB).sector(4096),
            (256 << 30) + 4096,
        ),
        case(Image::new("vhdx", "fixed", 4 * MIB).block(MIB).sector(512), 6 * MIB + SECTOR),
        child(case(vhdx(5 * MIB + 3 * SECTOR), 70 << 30)),
        case(vmdk("monolithicSparse", 40 * MIB + 5 * SECTOR), 64 * MIB),
        case(vmdk("monolithicSparse", 40 * MIB + 5 * SECTOR), 64 * MIB + SECTOR),
        case(vmdk("monolithicSparse", 40 * MIB + 5 * SECTOR), 9 << 30),
        case(vmdk("twoGbMaxExtentSparse", 2047 * MIB + 300 * SECTOR), 2087 * MIB),
        case(vmdk("twoGbMaxExtentSparse", 2047 * MIB + 300 * SECTOR), 5 << 30),
        case(vmdk("monolithicFlat", MIB + SECTOR), 2 * MIB),
        case(vmdk("twoGbMaxExtentFlat", 2047 * MIB + SECTOR), 5 << 30),
        case(vmdk("vmfs", MIB), 3 * MIB),
        case(vmdk("vmfsSparse", 2 * MIB + 67 * SECTOR), 600 * MIB),
    ];
    picked(all)
}

/// Smaller disks.
pub fn shrunk() -> Vec<Case> {
    let vmdk = |subformat, size| Image::new("vmdk", subformat, size);
    let all = vec![
        case(Image::new("vhd", "fixed", 3 * MIB + 5 * SECTOR), MIB + SECTOR),
        case(Image::new("vhd", "dynamic", 3 * MIB + 5 * SECTOR).block(MIB / 2), MIB + SECTOR),
        case(Image::new("vhd", "dynamic", 7 * MIB).block(2 * MIB), 4 * MIB),
        case(
            Image::new("vhdx", "dynamic", 5 * MIB + 3 * SECTOR).block(MIB).sector(512),
            3 * MIB / 2,
        ),
        case(Image::new("vhdx", "fixed", 4 * MIB).block(MIB).sector(512), 2 * MIB),
        case(vmdk("monolithicSparse", 140 * MIB + 5 * SECTOR), 50 * MIB + SECTOR),
        case(vmdk("twoGbMaxExtentSparse", 2047 * MIB + 300 * SECTOR), 100 * MIB),
        case(vmdk("monolithicFlat", MIB + SECTOR), MIB / 2),
        case(vmdk("twoGbMaxExtentFlat", 2047 * MIB + SECTOR), MIB),
        case(vmdk("vmfsSparse", 5 * MIB + 67 * SECTOR), 2 * MIB + SECTOR),
    ];
    picked(all)
}

fn picked(all: Vec<Case>) -> Vec<Case> {
    let only = std::env::var("FLATDISK_ONLY").unwrap_or_default();
    all.into_iter().filter(|case| case.name().contains(&only)).collect()
}

/// Distinct crash states to look at for each change.
fn budget() -> usize {
    number("FLATDISK_RESIZE_STATES", 100) as usize
}

/// Calls that change something, and all others.
const CALLS: [&[Call]; 2] = [&Call::CHANGES, &[Call::Read, Call::Look, Call::Open]];

/// Fails unless all went well for every case.
pub fn all_of(cases: &[Case], run: impl Fn(&Case) -> Result<usize, String> + Sync) {
    let results = in_parallel(cases, |case| {
        let began = std::time::Instant::now();
        (run(case).map_err(|e| format!("{}: {e}", case.name())), began.elapsed())
    });
    let mut failures = Vec::new();
    for (case, (result, time)) in cases.iter().zip(results) {
        match result {
            Ok(count) => println!("{}: {count}, {:.1} s", case.name(), time.as_secs_f32()),
            Err(e) => failures.push(e),
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

/// Checks what crashes may leave of a change; how many states.
pub fn survives(case: &Case) -> Result<usize, String> {
    let made = case.made();
    let recorder = RecordingHost::over(&made.host);
    let recorded: Arc<dyn Host> = recorder.clone();
    case.run(&recorded).map_err(|e| e.to_string())?;
    let recording = recorder.recording();
    let done = recording.ops().len();
    let mut states = HashSet::new();
    let mut random = fastrand::Rng::with_seed(seed());
    let epoch = |at| usize::from(at == done);
    each_state(&recording, &mut random, budget(), &mut states, epoch, &mut |at, state, _| {
        made.judge(state, at == done)
    })?;
    Ok(states.len())
}

/// Lets calls fail during a change, one each time; how many.
pub fn tells_of_faults(case: &Case) -> Result<usize, String> {
    let made = case.made();
    let run = |fault: Option<(&'static [Call], u64, Fault)>| {
        let faults = Arc::new(Faults::default());
        if let Some((calls, skip, fault)) = fault {
            faults.inject(calls, skip, fault, false);
        }
        let state = made.host.fork();
        let host: Arc<dyn Host> = FaultyHost::over(state.clone(), &faults);
        let result = case.run(&host);
        (state, result, faults)
    };
    let counts = CALLS.map(|calls| run(None).2.count(calls));
    let mut cases = Vec::new();
    for (calls, count) in CALLS.into_iter().zip(counts) {
        cases.extend((0..count).map(|skip| (calls, skip, Fault::Errno(libc::EIO))));
        if calls == Call::CHANGES {
            cases.extend((0..count).map(|skip| (calls, skip, Fault::Half(libc::ENOSPC))));
        }
    }
    fastrand::Rng::with_seed(seed()).shuffle(&mut cases);
    cases.truncate(number("FLATDISK_RESIZE_FAULTS", 60) as usize);
    for fault in &cases {
        let (state, result, faults) = run(Some(*fault));
        let failed = |e: String| format!("{fault:?}: {e}");
        if faults.fired() != 1 {
            return Err(failed(format!("{} calls failed", faults.fired())));
        }
        if let Err(e) = &result
            && e.path().is_none()
        {
            return Err(failed(format!("{e} names no file")));
        }
        made.judge(&state, result.is_ok()).map_err(failed)?;
    }
    Ok(cases.len())
}
