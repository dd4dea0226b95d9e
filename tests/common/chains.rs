//! Images that stand on one another, and what a crash may leave of merging or rebasing one of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use fastrand::Rng;
use flatdisk::disk::layers::{self, Content};
use flatdisk::error::Error;
use flatdisk::formats::chain::{self, Merging};
use flatdisk::formats::{self, CreateSpec, Image, OpenOptions, Scope, flatten};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::recording::RecordingHost;
use flatdisk::storage::{Access, Host, Storage};

use super::images::{Image as Base, errors};
use super::workload;

const MIB: u64 = 1 << 20;

/// What can be done to the last of [`three`].
pub const OPERATIONS: [&str; 6] =
    ["merge", "merge and keep", "merge over siblings", "rebase", "link", "flatten"];
/// Another one, of formats in which a child may be larger than its parent.
pub const MERGE_LARGER: &str = "merge a larger one";

/// Bases whose children can be written, with the block sizes that a child may have.
pub fn bases() -> Vec<(Base, &'static [Option<u64>])> {
    const VHD: &[Option<u64>] = &[None, Some(64 << 10), Some(MIB), Some(2 * MIB)];
    const VHDX: &[Option<u64>] = &[None, Some(MIB), Some(2 * MIB), Some(4 * MIB)];
    const VMDK: &[Option<u64>] = &[None, Some(4096), Some(64 << 10), Some(MIB)];
    let size = 3 * MIB + 5 * 512;
    vec![
        (Base::new("vhd", "dynamic", size).block(MIB / 2), VHD),
        (Base::new("vhd", "fixed", size), VHD),
        (Base::new("vhdx", "dynamic", size).block(MIB).sector(512), VHDX),
        (Base::new("vhdx", "dynamic", 5 * MIB + 4096).block(2 * MIB).sector(4096), VHDX),
        (Base::new("vhdx", "fixed", 4 * MIB).block(MIB).sector(512), VHDX),
        (Base::new("vmdk", "monolithicSparse", size), VMDK),
        (Base::new("vmdk", "monolithicFlat", size), VMDK),
        (Base::new("vmdk", "twoGbMaxExtentSparse", size), VMDK),
        (Base::new("vmdk", "vmfs", size), &[None]),
    ]
}

pub fn open(host: &Arc<dyn Host>, path: &Path, access: Access) -> Image {
    try_open(host, path, access).unwrap_or_else(|e| panic!("{e}"))
}

pub fn try_open(host: &Arc<dyn Host>, path: &Path, access: Access) -> Result<Image, Error> {
    formats::open(host, path, &OpenOptions::new(access))
}

pub fn contents(image: &Image) -> Vec<u8> {
    try_contents(image).unwrap_or_else(|e| panic!("{e}"))
}

pub fn try_contents(image: &Image) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; image.disk.size() as usize];
    image.disk.read_at(0, &mut bytes)?;
    Ok(bytes)
}

/// Makes a child of the image at `parent`.
pub fn make_child(host: &Arc<dyn Host>, path: &Path, parent: &Path, block: Option<u64>) {
    let parent = open(host, parent, Access::Read);
    let spec = CreateSpec { block_size: block, ..CreateSpec::default() };
    let format = formats::by_name(parent.info.format).unwrap();
    formats::create_child(format, &**host, path, &parent, &spec).unwrap_or_else(|e| panic!("{e}"));
}

/// Writes and discards at random places, and closes.
pub fn scribble(host: &Arc<dyn Host>, path: &Path, model: &mut [u8], random: &mut Rng, count: u32) {
    workload::scribble(host, path, 1, model, random, count);
}

/// A chain of three in memory: `/t/base`, `/t/parent`, `/t/child`, with one write in each.
pub fn three(base: &Base) -> (Arc<MemoryHost>, [PathBuf; 3]) {
    let memory = MemoryHost::new();
    let host: Arc<dyn Host> = memory.clone();
    let paths =
        ["base", "parent", "child"].map(|n| PathBuf::from(format!("/t/{n}.{}", base.format)));
    base.create_at(&*host, &paths[0]).unwrap();
    for number in 0..3 {
        if number > 0 {
            make_child(&host, &paths[number], &paths[number - 1], None);
        }
        let image = open(&host, &paths[number], Access::Write);
        image.disk.write_at(number as u64 * 8192, &[number as u8 + 1; 4096]).unwrap();
        image.disk.close().unwrap();
    }
    (memory, paths)
}

/// One of [`OPERATIONS`] on a chain, and what a crash may leave of it.
pub struct ChangeOfChain {
    pub operation: &'static str,
    pub host: Arc<MemoryHost>,
    parent: PathBuf,
    child: PathBuf,
    /// Another child of the parent, which holds the same.
    sibling: PathBuf,
    /// A child of the child, which holds the same.
    grandchild: PathBuf,
    /// Where "rebase" leads.
    other: PathBuf,
    /// What the child holds, and the parent after merging.
    whole: Vec<u8>,
    /// What the parent holds before.
    below: Vec<u8>,
    /// The files that are there in the end.
    left: Vec<PathBuf>,
}

impl ChangeOfChain {
    pub fn new(base: &Base, operation: &'static str, random: &mut Rng) -> Self {
        let (memory, [first, parent, child]) = three(base);
        let host: Arc<dyn Host> = memory.clone();
        let [sibling, grandchild, other] =
            // The last is longer than the path that it takes the place of.
            ["sibling", "grandchild", "a parent with a long name"]
                .map(|name| Path::new("/t").join(name).with_extension(base.format));
        let mut whole = contents(&open(&host, &child, Access::Read));
        scribble(&host, &child, &mut whole, random, 6);
        if operation.contains("larger") {
            let options = OpenOptions::new(Access::Write);
            let size = whole.len() as u64 + 3 * MIB;
            formats::resize::resize(&host, &child, &options, size, false, &()).unwrap();
            whole.resize(size as usize, 0);
            scribble(&host, &child, &mut whole, random, 6);
        }
        make_child(&host, &other, &first, None);
        let below = contents(&open(&host, &parent, Access::Read));
        let (host, left) = (memory, Vec::new());
        let change =
            Self { operation, host, parent, child, sibling, grandchild, other, whole, below, left };
        let dynamic: Arc<dyn Host> = change.host.clone();
        if change.how().over_siblings {
            make_child(&dynamic, &change.sibling, &change.parent, None);
        }
        if change.keeps() {
            make_child(&dynamic, &change.grandchild, &change.child, None);
        }
        change
    }

    fn merges(&self) -> bool {
        self.operation.starts_with("merge")
    }

    /// Whether the child is there in the end.
    fn keeps(&self) -> bool {
        !self.merges() || self.how().keep
    }

    fn how(&self) -> Merging {
        let keep = self.operation.contains("keep");
        Merging { keep, over_siblings: self.operation.contains("siblings") }
    }

    /// Does it while it is recorded.
    pub fn run(&mut self, recorder: &Arc<RecordingHost>) -> Result<(), Error> {
        let host: Arc<dyn Host> = recorder.clone();
        match self.operation {
            "link" => self.rebase(&host, &self.parent, true)?,
            _ => self.again(&host)?,
        }
        self.left = recorder.now().files().iter().map(|file| file.path().to_owned()).collect();
        Ok(())
    }

    fn rebase(&self, host: &Arc<dyn Host>, to: &Path, link_only: bool) -> Result<(), Error> {
        let options = OpenOptions::new(Access::Read);
        chain::rebase(host, &self.child, to, &options, link_only, &()).map(drop)
    }

    /// Merges or rebases.
    fn again(&self, host: &Arc<dyn Host>) -> Result<(), Error> {
        let options = OpenOptions::new(Access::Read);
        if self.operation == "flatten" {
            return flatten::flatten(host, &self.child, &options, &()).map(drop);
        }
        if !self.merges() {
            return self.rebase(host, &self.other, false);
        }
        chain::merge(host, &self.child, &options, self.how(), &()).map(drop)
    }

    /// Judges what a crash left, or what is there later if all was `done`.
    pub fn judge(&self, state: &Arc<MemoryHost>, done: bool) -> Result<(), String> {
        let state: Arc<dyn Host> = state.fork();
        let holds = |path: &Path, model: &[u8]| {
            let found = try_open(&state, path, Access::Read).and_then(|image| try_contents(&image));
            match found.map_err(|e| e.to_string())? == model {
                true => Ok(()),
                false => Err(format!("{} holds something else", path.display())),
            }
        };
        let child = holds(&self.child, &self.whole);
        let intact = child.is_ok();
        if self.merges() {
            // Once the parent holds everything, the child may be stale or gone.
            if let Err(e) = child {
                holds(&self.parent, &self.whole)
                    .map_err(|other| format!("neither child nor parent: {e}; {other}"))?;
            }
        } else {
            child.and_then(|()| holds(&self.parent, &self.below))?;
        }
        if intact && self.keeps() && self.operation != "flatten" {
            holds(&self.grandchild, &self.whole)?;
        }
        if done {
            self.check_done(&state)?;
        }
        let there = state.open(&self.child, Access::Peek).is_ok();
        if self.how().over_siblings && !there {
            let sibling = try_open(&state, &self.sibling, Access::Read);
            if sibling.and_then(|image| try_contents(&image)).is_ok_and(|found| found != self.below)
            {
                return Err("a sibling does not see that its parent changed".to_owned());
            }
        }

        // What was interrupted can be done again.
        let over = try_open(&state, &self.child, Access::Peek).is_ok_and(|i| i.parent.is_none());
        if intact && !(done && self.merges()) && !over {
            self.again(&state).map_err(|e| format!("again: {e}"))?;
            let left = if self.merges() { &self.parent } else { &self.child };
            holds(left, &self.whole)?;
        }
        let left = if self.merges() { &self.parent } else { &self.child };
        if (self.how().over_siblings || self.operation == "flatten") && !done {
            // The two footers of a VHD get the parent's new id one after the other.
            let options = OpenOptions::new(Access::Write);
            formats::repair(&state, left, &options, Scope::All, false)
                .map_err(|e| format!("repair: {e}"))?;
            holds(left, &self.whole)?;
        }
        let errors = errors(&state, left).map_err(|e| e.to_string())?;
        if errors.is_empty() { Ok(()) } else { Err(format!("the check finds {errors:?}")) }
    }

    /// What is promised once all is done.
    fn check_done(&self, state: &Arc<dyn Host>) -> Result<(), String> {
        let files = state.list(Path::new("/t")).map_err(|e| e.to_string())?;
        if let Some(file) = files.iter().find(|file| !self.left.contains(file)) {
            return Err(format!("{} is still there", file.display()));
        }
        if self.merges() {
            let parent = try_open(state, &self.parent, Access::Read);
            let found = parent.and_then(|image| try_contents(&image)).map_err(|e| e.to_string())?;
            if found != self.whole {
                return Err("the parent does not hold everything".to_owned());
            }
        }
        if !self.keeps() {
            return Ok(());
        }
        let child = try_open(state, &self.child, Access::Read).map_err(|e| e.to_string())?;
        if try_contents(&child).map_err(|e| e.to_string())? != self.whole {
            return Err("the child holds something else".to_owned());
        }
        let parent = if self.operation == "rebase" { &self.other } else { &self.parent };
        if self.merges() {
            layers::runs(&child.disk, 1, |run| match run.content {
                Content::Unallocated => Ok(()),
                content => Err(Error::corrupt(format!("the child still has {content:?}"))),
            })
            .map_err(|e| e.to_string())?;
        }
        match child.parent {
            Some(now) if now.path == *parent && self.operation != "flatten" => {}
            None if self.operation == "flatten" => {}
            now => return Err(format!("the child's parent is {:?}", now.map(|now| now.path))),
        }
        Ok(())
    }
}
