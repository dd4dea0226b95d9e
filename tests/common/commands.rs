//! Commands on images and chains: what each begins with, and what a crash may leave of it.

use std::collections::{BTreeSet, HashSet};
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fastrand::Rng;
use flatdisk::copy::delta::{self, Applied};
use flatdisk::error::{Error, ErrorKind};
use flatdisk::formats::meta::{self, Changes};
use flatdisk::formats::{Identity, OpenOptions, Scope, levels, lifecycle, repair, snapshot};
use flatdisk::storage::memory::{MemoryFile, MemoryHost};
use flatdisk::storage::recording::{Recording, RecordingHost};
use flatdisk::storage::{Access, Host, Storage};

use super::chains::{contents, make_child, open, scribble, try_contents, try_open};
use super::images::{Image as Base, errors};
use super::{crash, seed};

/// Does a command on a host.
type Run<'a> = Box<dyn Fn(&Arc<dyn Host>) -> Result<(), Error> + 'a>;
/// Judges what a crash left, or, where the flag says so, what is there in the end.
type Judge<'a> = Box<dyn Fn(&Arc<dyn Host>, bool) -> Result<(), String> + 'a>;

/// A command, and how what a crash leaves of it is judged.
pub struct Command<'a> {
    /// What it begins with.
    pub files: Arc<MemoryHost>,
    run: Run<'a>,
    judge: Judge<'a>,
}

impl Command<'_> {
    /// All that it does, one operation after the other.
    pub fn record(&self) -> Result<Recording, String> {
        self.record_on(&RecordingHost::over(&self.files))
    }

    fn record_on(&self, recorder: &Arc<RecordingHost>) -> Result<Recording, String> {
        let host: Arc<dyn Host> = recorder.clone();
        (self.run)(&host).map_err(|e| e.to_string())?;
        Ok(recorder.recording())
    }

    /// Judges a state.
    pub fn judge(&self, state: &Arc<MemoryHost>, done: bool) -> Result<(), String> {
        let state: Arc<dyn Host> = state.fork();
        (self.judge)(&state, done)
    }

    /// Judges up to `budget` states that a crash may leave; how many there were.
    pub fn crash(&self, budget: usize) -> Result<usize, String> {
        self.crash_of(&self.record()?, budget, &mut Rng::with_seed(seed()))
    }

    /// [`Self::crash`] on a host on which files share blocks.
    pub fn crash_sharing(&self, budget: usize) -> Result<usize, String> {
        let recorder = RecordingHost::over(&self.files);
        recorder.share_blocks();
        self.crash_of(&self.record_on(&recorder)?, budget, &mut Rng::with_seed(seed()))
    }

    /// [`Self::crash`] of a recording that was changed.
    pub fn crash_of(
        &self,
        recording: &Recording,
        budget: usize,
        random: &mut Rng,
    ) -> Result<usize, String> {
        let end = recording.ops().len();
        let (mut known, last) = (HashSet::new(), |at| usize::from(at == end));
        crash::each_state(recording, random, budget, &mut known, last, &mut |at, state, _| {
            self.judge(state, at == end)
        })?;
        Ok(known.len())
    }
}

fn read_only() -> OpenOptions {
    OpenOptions::new(Access::Read)
}

/// The place of an image.
pub fn image(base: &Base, name: &str) -> PathBuf {
    Path::new("/t").join(format!("{name}.{}", base.format))
}

/// Takes a snapshot.
pub fn take(host: &Arc<dyn Host>, path: &Path, name: Option<&str>) -> Result<PathBuf, Error> {
    snapshot::take(host, path, name, "20260102-030405", &read_only()).map(|taken| taken.frozen)
}

/// The names in the folder of [`image`].
pub fn names(host: &Arc<dyn Host>) -> BTreeSet<String> {
    let files = host.list(Path::new("/t")).unwrap();
    files.iter().map(|f| f.file_name().unwrap().to_str().unwrap().to_owned()).collect()
}

/// A base of this kind with some data, in memory, and what it holds.
pub fn filled(base: &Base, name: &str, random: &mut Rng) -> (Arc<MemoryHost>, PathBuf, Vec<u8>) {
    let memory = MemoryHost::new();
    let host: Arc<dyn Host> = memory.clone();
    let path = image(base, name);
    base.create_at(&*host, &path).unwrap();
    let mut model = vec![0; open(&host, &path, Access::Read).disk.size() as usize];
    scribble(&host, &path, &mut model, random, 6);
    (memory, path, model)
}

/// How many files an image of this kind has.
pub fn files(base: &Base) -> usize {
    let memory = MemoryHost::new();
    base.create_at(&*memory, &image(base, "disk")).unwrap();
    memory.files().len()
}

/// Whether the image shows this, whatever a check finds.
pub fn shows(host: &Arc<dyn Host>, path: &Path, model: &[u8]) -> Result<(), String> {
    let image = try_open(host, path, Access::Read).map_err(|e| e.to_string())?;
    match try_contents(&image).map_err(|e| e.to_string())? == model {
        true => Ok(()),
        false => Err(format!("{} holds something else", path.display())),
    }
}

/// Whether the image shows this, and is sound.
pub fn holds(host: &Arc<dyn Host>, path: &Path, model: &[u8]) -> Result<(), String> {
    shows(host, path, model)?;
    match errors(host, path) {
        Ok(errors) if errors.is_empty() => Ok(()),
        other => Err(format!("{}: {other:?}", path.display())),
    }
}

/// What is done to an image, what each name may hold at any moment, and what is there in the end.
struct Life {
    what: &'static str,
    path: PathBuf,
    new: PathBuf,
    child: PathBuf,
    model: Vec<u8>,
    above: Vec<u8>,
    /// The names in the folder when all is done.
    done: BTreeSet<String>,
}

/// Ending of what [`life`] does on a host on which no file has a second name.
const WITHOUT_SECOND_NAMES: &str = " without second names";

/// What [`life`] can do there with an image in one file.
pub const WITH_ONE_NAME: [&str; 2] =
    ["snapshot without second names", "rename without second names"];

/// A host that gives files no second names, as FAT does.
#[derive(Debug)]
pub struct OneName(pub Arc<dyn Host>);

impl Host for OneName {
    fn open(&self, path: &Path, access: Access) -> Result<Arc<dyn Storage>, Error> {
        self.0.open(path, access)
    }

    fn open_beneath(
        &self,
        root: &Path,
        name: &Path,
        access: Access,
    ) -> Result<Arc<dyn Storage>, Error> {
        self.0.open_beneath(root, name, access)
    }

    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>, Error> {
        self.0.create(path)
    }

    fn replace(&self, path: &Path, contents: &[u8]) -> Result<(), Error> {
        self.0.replace(path, contents)
    }

    fn remove(&self, path: &Path) -> Result<(), Error> {
        self.0.remove(path)
    }

    fn rename(&self, from: &Path, to: &Path, replace: bool) -> Result<(), Error> {
        self.0.rename(from, to, replace)
    }

    fn link(&self, from: &Path, _to: &Path) -> Result<(), Error> {
        Err(Error::new(ErrorKind::Unsupported, "no second names").in_file(from))
    }

    fn sync_dir(&self, dir: &Path) -> Result<(), Error> {
        self.0.sync_dir(dir)
    }

    fn list(&self, dir: &Path) -> Result<Vec<PathBuf>, Error> {
        self.0.list(dir)
    }
}

/// What [`life`] can do.
pub const LIFE: [&str; 6] =
    ["snapshot", "second snapshot", "revert", "rename", "rename with children", "delete"];

impl Life {
    fn new(base: &Base, what: &'static str, random: &mut Rng) -> (Arc<MemoryHost>, Self) {
        let (memory, path, model) = filled(base, "disk", random);
        let host: Arc<dyn Host> = memory.clone();
        let (new, child) = (image(base, "disk-new"), image(base, "child"));
        let mut above = model.clone();
        match what {
            "second snapshot" | "revert" => {
                let name = if what == "revert" { "new" } else { "first" };
                take(&host, &path, Some(name)).unwrap();
                scribble(&host, &path, &mut above, random, 4);
            }
            "rename with children" => {
                make_child(&host, &child, &path, None);
                scribble(&host, &child, &mut above, random, 4);
            }
            _ => {}
        }
        let model = if what == "second snapshot" { above.clone() } else { model };
        let mut life = Self { what, path, new, child, model, above, done: BTreeSet::new() };
        let after: Arc<dyn Host> = memory.fork();
        life.run(&after).unwrap_or_else(|e| panic!("{what}: {e}"));
        life.done = names(&after);
        (memory, life)
    }

    fn run(&self, host: &Arc<dyn Host>) -> Result<(), Error> {
        let one_name: Arc<dyn Host> = Arc::new(OneName(host.clone()));
        let host = if self.what == self.kind() { host } else { &one_name };
        match self.kind() {
            "snapshot" => take(host, &self.path, Some("new")).map(drop),
            "second snapshot" => take(host, &self.path, None).map(drop),
            "revert" => snapshot::revert(host, &self.path, "new", &read_only()).map(drop),
            "delete" => lifecycle::delete(host, &self.path, false, false, &read_only()).map(drop),
            with => {
                let follow = with.ends_with("children");
                lifecycle::rename(host, &self.path, &self.new, follow, &read_only()).map(drop)
            }
        }
    }

    /// What it is, whatever the host can do.
    fn kind(&self) -> &'static str {
        self.what.strip_suffix(WITHOUT_SECOND_NAMES).unwrap_or(self.what)
    }

    /// Judges what a crash left, or what is there in the end.
    fn judge(&self, state: &Arc<dyn Host>, done: bool) -> Result<(), String> {
        let under = |path: &Path, model: &[u8]| holds(state, path, model);
        let there = |path: &Path| state.open(path, Access::Peek).is_ok();
        match self.kind() {
            "delete" => {}
            // For a moment it has the new name only.
            "snapshot" if self.what != self.kind() && !done && !there(&self.path) => {
                under(&self.new, &self.model)?;
            }
            "snapshot" | "second snapshot" => under(&self.path, &self.model)?,
            "revert" => {
                under(&self.new, &self.model)?;
                if there(&self.path) {
                    under(&self.path, &self.above).or_else(|_| under(&self.path, &self.model))?;
                }
            }
            _ => {
                under(&self.path, &self.model).or_else(|_| under(&self.new, &self.model))?;
                if there(&self.child) {
                    shows(state, &self.child, &self.above)?;
                }
            }
        }
        // The same request does the rest.
        let over = match self.kind() {
            "delete" => !there(&self.path),
            "revert" => done,
            "snapshot" if !there(&self.path) => false,
            "snapshot" | "second snapshot" => {
                let image = try_open(state, &self.path, Access::Read).map_err(|e| e.to_string())?;
                image.chain().count() > if self.kind() == "snapshot" { 1 } else { 2 }
            }
            _ => !there(&self.path),
        };
        if !over && !done {
            self.run(state).map_err(|e| format!("again: {e}"))?;
        }
        let (found, staged): (BTreeSet<_>, BTreeSet<_>) =
            names(state).into_iter().partition(|name| !name.starts_with(".flatdisk-part"));
        if found != self.done {
            return Err(format!("the folder has {found:?}, and should have {:?}", self.done));
        }
        if done && !staged.is_empty() {
            return Err(format!("{staged:?} are left"));
        }
        match self.kind() {
            "delete" => Ok(()),
            "revert" => under(&self.path, &self.model),
            "snapshot" => {
                under(&self.path, &self.model).and_then(|()| under(&self.new, &self.model))
            }
            "second snapshot" => under(&self.path, &self.model),
            _ => under(&self.new, &self.model),
        }
    }
}

/// A snapshot, another name or the end of an image.
pub fn life(base: &Base, what: &'static str, random: &mut Rng) -> Command<'static> {
    let (files, life) = Life::new(base, what, random);
    let life = Arc::new(life);
    let judged = life.clone();
    Command {
        files,
        run: Box::new(move |host| life.run(host)),
        judge: Box::new(move |state, done| judged.judge(state, done)),
    }
}

/// A chain in memory, the base first, and what each of it holds.
pub struct Chain {
    pub memory: Arc<MemoryHost>,
    pub host: Arc<dyn Host>,
    pub members: Vec<(PathBuf, Vec<u8>)>,
}

impl Chain {
    /// A base with so many links above it.
    pub fn new(base: &Base, blocks: &[Option<u64>], links: usize, random: &mut Rng) -> Self {
        let memory = MemoryHost::new();
        let host: Arc<dyn Host> = memory.clone();
        let path = |number: usize| PathBuf::from(format!("/t/d{number}.{}", base.format));
        base.create_at(&*host, &path(0)).unwrap();
        let mut model = vec![0; open(&host, &path(0), Access::Read).disk.size() as usize];
        let mut members = Vec::new();
        for number in 0..=links {
            if number > 0 {
                let block = blocks[random.usize(..blocks.len())];
                make_child(&host, &path(number), &path(number - 1), block);
            }
            scribble(&host, &path(number), &mut model, random, 6);
            members.push((path(number), model.clone()));
        }
        Self { memory, host, members }
    }

    /// Opens and checks all.
    pub fn verify(&self, when: &str) {
        for (path, model) in &self.members {
            let image = try_open(&self.host, path, Access::Read);
            let image = image.unwrap_or_else(|e| panic!("{when}: {e}"));
            assert!(contents(&image) == *model, "{when}: {} holds something else", path.display());
            assert_eq!(errors(&self.host, path).unwrap(), [""; 0], "{when}");
        }
    }

    /// Merges all from `top` on down to `into`, which come from the list.
    pub fn merge(&mut self, top: usize, into: usize) -> Result<(), Error> {
        let paths = [top, into].map(|index| self.members[index].0.clone());
        levels::merge_to(&self.host, &paths[0], &paths[1], &read_only(), false, &())?;
        self.members[into].1 = self.members[top].1.clone();
        self.members.drain(into + 1..=top);
        Ok(())
    }
}

/// The image, sound again if a crash left the two footers of a VHD differing.
fn mended(host: &Arc<dyn Host>, path: &Path, model: &[u8]) -> Result<(), String> {
    let options = OpenOptions::new(Access::Write);
    repair(host, path, &options, Scope::All, false).map_err(|e| e.to_string())?;
    shows(host, path, model)?;
    let errors = errors(host, path).map_err(|e| e.to_string())?;
    if errors.is_empty() { Ok(()) } else { Err(format!("{}: {errors:?}", path.display())) }
}

/// Merges a chain of four into its first.
pub fn merge_levels(base: &Base, blocks: &[Option<u64>], random: &mut Rng) -> Command<'static> {
    let chain = Chain::new(base, blocks, 3, random);
    let [bottom, second, third, top] = <[_; 4]>::try_from(chain.members).unwrap();
    let paths = (top.0.clone(), bottom.0.clone());
    let merge = move |host: &Arc<dyn Host>| {
        levels::merge_to(host, &paths.0, &paths.1, &read_only(), false, &()).map(drop)
    };
    let run = merge.clone();
    let judge = move |state: &Arc<dyn Host>, done: bool| {
        let intact = shows(state, &top.0, &top.1);
        if let Err(e) = &intact {
            // By then the ancestor has everything.
            shows(state, &bottom.0, &top.1).map_err(|other| format!("{e}; {other}"))?;
        } else if !done {
            merge(state).map_err(|e| format!("again: {e}"))?;
        }
        // What is left of the others says that it is not whole.
        if intact.is_err() {
            for (path, _) in [&second, &third, &top] {
                let found = try_open(state, path, Access::Read);
                if found.and_then(|image| try_contents(&image)).is_ok_and(|held| held != top.1)
                    && state.open(&top.0, Access::Peek).is_err()
                {
                    return Err(format!("{} shows something older", path.display()));
                }
            }
        }
        if done && [&second, &third, &top].iter().any(|(p, _)| state.open(p, Access::Peek).is_ok())
        {
            return Err("an image that was merged is still there".to_owned());
        }
        mended(state, &bottom.0, &top.1)
    };
    Command { files: chain.memory, run: Box::new(run), judge: Box::new(judge) }
}

/// Takes the second of a chain of three out, on which two others stand.
pub fn merge_middle(base: &Base, blocks: &[Option<u64>], random: &mut Rng) -> Command<'static> {
    let chain = Chain::new(base, blocks, 2, random);
    let [bottom, middle, child] = <[_; 3]>::try_from(chain.members).unwrap();
    let second = bottom.0.with_file_name("second").with_extension(base.format);
    make_child(&chain.host, &second, &middle.0, None);
    let mut model = middle.1.clone();
    scribble(&chain.host, &second, &mut model, random, 4);
    let path = middle.0.clone();
    let merge =
        move |host: &Arc<dyn Host>| levels::merge_middle(host, &path, &read_only(), &()).map(drop);
    let run = merge.clone();
    let judge = move |state: &Arc<dyn Host>, done: bool| {
        for (path, model) in [(&child.0, &child.1), (&second, &model)] {
            shows(state, path, model).map_err(|e| format!("at once: {e}"))?;
        }
        if !done && state.open(&middle.0, Access::Peek).is_ok() {
            merge(state).map_err(|e| format!("again: {e}"))?;
        }
        if state.open(&middle.0, Access::Peek).is_ok() {
            return Err("it is still there".to_owned());
        }
        mended(state, &child.0, &child.1)?;
        mended(state, &second, &model)?;
        mended(state, &bottom.0, &middle.1)
    };
    Command { files: chain.memory, run: Box::new(run), judge: Box::new(judge) }
}

/// A chain in memory, and a copy of its first image in another folder.
pub struct Deltas {
    pub host: Arc<MemoryHost>,
    pub paths: Vec<PathBuf>,
    /// What each holds.
    pub models: Vec<Vec<u8>>,
    pub target: PathBuf,
}

impl Deltas {
    /// A base with so many generations above it.
    pub fn new(base: &Base, blocks: &[Option<u64>], generations: usize, random: &mut Rng) -> Self {
        let memory = MemoryHost::new();
        let host: Arc<dyn Host> = memory.clone();
        let path = |number: usize| PathBuf::from(format!("/t/d{number}.{}", base.format));
        base.create_at(&*host, &path(0)).unwrap();
        let mut model = vec![0; base.spec.size as usize];
        scribble(&host, &path(0), &mut model, random, 8);
        let mut models = vec![model.clone()];
        for number in 1..=generations {
            let block = blocks[random.usize(..blocks.len())];
            make_child(&host, &path(number), &path(number - 1), block);
            scribble(&host, &path(number), &mut model, random, 8);
            models.push(model.clone());
        }
        for file in memory.files() {
            let name = file.path().file_name().unwrap().to_str().unwrap().to_owned();
            if name.starts_with("d0") {
                let copy = Path::new("/u").join(name);
                memory.insert(MemoryFile::new(copy, &file.to_vec()));
            }
        }
        let target = Path::new("/u").join(path(0).file_name().unwrap());
        let paths = (0..=generations).map(path).collect();
        Self { host: memory, paths, models, target }
    }

    /// All files.
    pub fn host(&self) -> Arc<dyn Host> {
        self.host.clone()
    }

    /// What a generation is known by.
    pub fn identity(&self, number: usize) -> Identity {
        open(&self.host(), &self.paths[number], Access::Peek).identity
    }

    /// The delta from one generation to a later one.
    pub fn delta(&self, from: usize, to: usize) -> Vec<u8> {
        let image = open(&self.host(), &self.paths[to], Access::Read);
        let mut bytes = Vec::new();
        let summary = delta::make(&image, to - from, &mut bytes, &()).unwrap();
        assert_eq!(summary.length, bytes.len() as u64);
        bytes
    }

    /// Whether an image on `host` is that generation.
    pub fn check(&self, host: &Arc<dyn Host>, path: &Path, number: usize) -> Result<(), String> {
        let image = try_open(host, path, Access::Read).map_err(|e| e.to_string())?;
        if try_contents(&image).map_err(|e| e.to_string())? != self.models[number] {
            return Err(format!("{} does not hold generation {number}", path.display()));
        }
        if image.identity != self.identity(number) {
            return Err(format!("{} is known by {}", path.display(), image.identity));
        }
        let errors = errors(host, path).map_err(|e| e.to_string())?;
        if errors.is_empty() { Ok(()) } else { Err(format!("{errors:?}")) }
    }
}

/// Puts a delta onto an image.
pub fn apply(host: &Arc<dyn Host>, delta: &[u8], path: &Path) -> Result<Applied, Error> {
    delta::apply(host, &mut Cursor::new(delta), path, &OpenOptions::new(Access::Write), &())
}

/// Puts a delta onto a copy of the image that it was made against.
pub fn apply_delta(base: &Base, blocks: &[Option<u64>], random: &mut Rng) -> Command<'static> {
    let chain = Deltas::new(base, blocks, 1, random);
    let delta: Arc<[u8]> = chain.delta(0, 1).into();
    let (files, target, own) = (chain.host.clone(), chain.target.clone(), delta.clone());
    let run = move |host: &Arc<dyn Host>| apply(host, &own, &target).map(drop);
    let (before, after) = (chain.identity(0), chain.identity(1));
    let judge = move |state: &Arc<dyn Host>, done: bool| {
        let image = try_open(state, &chain.target, Access::Read).map_err(|e| e.to_string())?;
        let known_by = image.identity.clone();
        if done && known_by != after {
            return Err(format!("all is done, and it is known by {known_by}"));
        }
        let model = match () {
            () if known_by == after => Some(1),
            () if known_by == before => Some(0),
            () => None,
        };
        if let Some(number) = model
            && try_contents(&image).map_err(|e| e.to_string())? != chain.models[number]
        {
            return Err(format!("it is known as generation {number}, and holds something else"));
        }
        drop(image);
        let again = apply(state, &delta, &chain.target).map_err(|e| format!("again: {e}"))?;
        if again.already != (known_by == after) || again.resumed != model.is_none() {
            return Err(format!("taken for another state: {again:?}"));
        }
        if again.already {
            // One of the two footers may still tell the mark.
            let options = OpenOptions::new(Access::Write);
            repair(state, &chain.target, &options, Scope::All, false)
                .map_err(|e| format!("repair: {e}"))?;
        }
        chain.check(state, &chain.target, 1)
    };
    Command { files, run: Box::new(run), judge: Box::new(judge) }
}

/// These values.
pub fn changes(values: &[(&str, &str)]) -> Changes {
    let values = values.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    Changes { values: values.collect(), new_id: false }
}

/// The value of a key.
pub fn get(host: &Arc<dyn Host>, path: &Path, key: &str) -> Option<String> {
    let entries = meta::list(host, path, &OpenOptions::new(Access::Write)).unwrap();
    entries.into_iter().find(|entry| entry.key == key)?.value
}

/// Keys of each format with two values.
pub fn settings(format: &str) -> &'static [(&'static str, [&'static str; 2])] {
    match format {
        "vhd" => &[
            ("creator_application", ["vpc", "qem2"]),
            ("creator_version", ["5.3", "65535.0"]),
            ("creator_host_os", ["Mac", "Wi2k"]),
            ("time_stamp", ["2026-01-31T12:00:00Z", "2000-01-01T00:00:00Z"]),
            ("saved_state", ["1", "0"]),
            (
                "unique_id",
                ["01234567-89ab-4def-8123-456789abcdef", "11234567-89ab-4def-8123-456789abcdef"],
            ),
        ],
        "vhdx" => &[
            (
                "virtual_disk_id",
                ["01234567-89ab-4def-8123-456789abcdef", "11234567-89ab-4def-8123-456789abcdef"],
            ),
            ("physical_sector_size", ["4096", "4096"]),
        ],
        _ => &[
            ("ddb.adapterType", ["ide", "buslogic"]),
            ("ddb.virtualHWVersion", ["4", "21"]),
            ("ddb.toolsVersion", ["12345", "0"]),
            ("ddb.deletable", ["false", "true"]),
            ("ddb.thinProvisioned", ["1", "0"]),
            ("ddb.comment", ["what it is for", ""]),
            (
                "ddb.uuid",
                [
                    "60 00 c2 9a bc de f0 12-34 56 78 9a bc de f0 12",
                    "60 00 c2 9f bc de f0 12-34 56 78 9a bc de f0 12",
                ],
            ),
        ],
    }
}

/// Sets all that an image can say about itself.
pub fn set_meta(base: &Base, random: &mut Rng) -> Command<'static> {
    let (files, path, model) = filled(base, "disk", random);
    let values: Vec<_> =
        settings(base.format).iter().map(|(key, values)| (*key, values[0])).collect();
    let original: Arc<dyn Host> = files.clone();
    let old: Vec<_> = values.iter().map(|(key, _)| get(&original, &path, key)).collect();
    let new: Vec<_> = values.iter().map(|(_, new)| Some((*new).to_owned())).collect();
    let all = changes(&values);
    let place = path.clone();
    let set = move |host: &Arc<dyn Host>| {
        meta::set(host, &place, &all, &OpenOptions::new(Access::Write)).map(drop)
    };
    let run = set.clone();
    let judge = move |state: &Arc<dyn Host>, done: bool| {
        shows(state, &path, &model)?;
        let now: Vec<_> = values.iter().map(|(key, _)| get(state, &path, key)).collect();
        if now != new && (now != old || done) {
            return Err(format!("a mix: {now:?}"));
        }
        // Asked for again, it comes.
        let options = OpenOptions::new(Access::Write);
        repair(state, &path, &options, Scope::All, false).map_err(|e| e.to_string())?;
        set(state).map_err(|e| e.to_string())?;
        let errors = errors(state, &path).map_err(|e| e.to_string())?;
        if errors.is_empty() { Ok(()) } else { Err(format!("{errors:?}")) }
    };
    Command { files, run: Box::new(run), judge: Box::new(judge) }
}
