//! Chains that get shorter: several generations merged at once, and one taken out of the middle.

// The helpers here serve tests only.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::chains::{bases, contents, make_child, open, scribble, try_open};
use common::images::{Image as Base, errors};
use common::{crash, in_parallel, number, seed, tools};
use fastrand::Rng;
use flatdisk::error::{Error, ErrorKind};
use flatdisk::formats::{OpenOptions, Scope, flatten, levels, repair, resize};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::recording::RecordingHost;
use flatdisk::storage::{Access, Host};

const MIB: u64 = 1 << 20;

fn options() -> OpenOptions {
    OpenOptions::new(Access::Read)
}

/// A chain in memory, the base first, and what each of it holds.
struct Chain {
    memory: Arc<MemoryHost>,
    host: Arc<dyn Host>,
    members: Vec<(PathBuf, Vec<u8>)>,
}

impl Chain {
    fn new(base: &Base, blocks: &[Option<u64>], links: usize, random: &mut Rng) -> Self {
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

    fn verify(&self, when: &str) {
        for (path, model) in &self.members {
            let image = try_open(&self.host, path, Access::Read);
            let image = image.unwrap_or_else(|e| panic!("{when}: {e}"));
            assert!(contents(&image) == *model, "{when}: {} holds something else", path.display());
            assert_eq!(errors(&self.host, path).unwrap(), [""; 0], "{when}");
        }
    }

    /// Merges all from `top` on down to `into`, which come from the list.
    fn merge(&mut self, top: usize, into: usize) -> Result<(), Error> {
        let paths = [top, into].map(|index| self.members[index].0.clone());
        levels::merge_to(&self.host, &paths[0], &paths[1], &options(), false, &())?;
        self.members[into].1 = self.members[top].1.clone();
        self.members.drain(into + 1..=top);
        Ok(())
    }
}

#[test]
fn every_generation_equals_its_model_while_the_chain_gets_shorter() {
    in_parallel(&bases(), |(base, blocks)| {
        for round in 0..3 {
            let mut random = Rng::with_seed(seed() + round);
            let links = random.usize(1..=6);
            let mut chain = Chain::new(base, blocks, links, &mut random);
            let context = format!("{} {:?}", base.format, base.spec.subformat);
            while chain.members.len() > 1 {
                let top = chain.members.len() - 1;
                match random.u8(..4) {
                    0 => {
                        let into = random.usize(..top);
                        chain.merge(top, into).unwrap_or_else(|e| panic!("{context}: {e}"));
                        chain.verify(&format!("{context}: merged {top} into {into}"));
                        let last = chain.members.len() - 1;
                        let (path, model) = &mut chain.members[last];
                        scribble(&chain.host, path, model, &mut random, 3);
                    }
                    1 | 2 if top > 1 => {
                        let middle = random.usize(1..top);
                        let path = chain.members[middle].0.clone();
                        let done = levels::merge_middle(&chain.host, &path, &options(), &());
                        let done = done.unwrap_or_else(|e| panic!("{context}: {e}"));
                        assert_eq!(done.relinked, [chain.members[middle + 1].0.clone()]);
                        chain.members[middle - 1].1 = chain.members[middle].1.clone();
                        chain.members.remove(middle);
                        chain.verify(&format!("{context}: {middle} of {top} is out"));
                    }
                    _ => {
                        let lone = random.usize(1..=top);
                        let path = &chain.members[lone].0;
                        flatten::flatten(&chain.host, path, &options(), &()).unwrap();
                        chain.verify(&format!("{context}: {lone} of {top} is flat"));
                        chain.members.drain(..lone);
                    }
                }
            }
        }
    });
}

#[test]
fn what_others_need_is_not_merged() {
    for (base, blocks) in bases() {
        let mut random = Rng::with_seed(seed());
        let mut chain = Chain::new(&base, blocks, 3, &mut random);
        let path = |index: usize| chain.members[index].0.clone();
        let other = PathBuf::from(format!("/t/other.{}", base.format));
        // Somebody stands on one between, on the base, or on the top.
        for on in [1, 2, 3, 0] {
            make_child(&chain.host, &other, &path(on), None);
            let e = levels::merge_to(&chain.host, &path(3), &path(0), &options(), false, &());
            let e = e.expect_err("somebody needs it");
            assert!(e.to_string().contains("other."), "{on}: {e}");
            chain.host.remove(&other).unwrap();
            for part in chain.host.list(Path::new("/t")).unwrap() {
                if part.to_str().unwrap().contains("other-") {
                    chain.host.remove(&part).unwrap();
                }
            }
        }
        make_child(&chain.host, &other, &path(0), None);
        let e = levels::merge_middle(&chain.host, &path(1), &options(), &()).unwrap_err();
        assert!(e.what().contains("its parent has other children: other."), "{e}");
        let e =
            levels::merge_to(&chain.host, &path(1), &path(2), &options(), false, &()).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidInput);
        assert!(e.what().contains("is not among its ancestors"), "{e}");
        chain.verify("after refusals");
        // With force the other one learns that it does not fit any more.
        let (top, into) = (path(3), path(0));
        let done = levels::merge_to(&chain.host, &top, &into, &options(), true, &()).unwrap();
        assert_eq!(done.merged.siblings, std::slice::from_ref(&other));
        assert_eq!(done.removed.len(), 3);
        let e = try_open(&chain.host, &other, Access::Read).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::ParentMismatch, "{e}");
        chain.members[0].1 = chain.members[3].1.clone();
        chain.members.truncate(1);
        chain.verify("after force");
    }
}

#[test]
fn a_top_that_is_larger_makes_its_ancestor_as_large() {
    for (base, blocks) in bases() {
        let growing = base.format != "vmdk" && base.spec.subformat.as_deref() != Some("fixed");
        if !growing {
            continue;
        }
        let mut random = Rng::with_seed(seed());
        let mut chain = Chain::new(&base, blocks, 2, &mut random);
        let (path, model) = &mut chain.members[2];
        let size = model.len() as u64 + 2 * MIB;
        resize::resize(&chain.host, path, &OpenOptions::new(Access::Write), size, false, &())
            .unwrap();
        model.resize(size as usize, 0);
        scribble(&chain.host, path, model, &mut random, 6);
        chain.verify("a larger top");
        chain.merge(2, 0).unwrap_or_else(|e| panic!("{}: {e}", base.format));
        chain.verify("merged");
    }
}

/// Runs `change` on a recorded chain, and judges what crashes leave of it.
fn crashes(
    chain: &Chain,
    change: impl Fn(&Arc<dyn Host>) -> Result<(), Error>,
    mut judge: impl FnMut(&Arc<dyn Host>, bool) -> Result<(), String>,
) -> Result<usize, String> {
    let recorder = RecordingHost::over(&chain.memory);
    let recorded: Arc<dyn Host> = recorder.clone();
    change(&recorded).map_err(|e| e.to_string())?;
    let recording = recorder.recording();
    let end = recording.ops().len();
    let budget = number("FLATDISK_CRASH_STATES", 80) as usize;
    let (mut random, mut known) = (Rng::with_seed(seed()), HashSet::new());
    let last = |at| usize::from(at == end);
    crash::each_state(&recording, &mut random, budget, &mut known, last, &mut |at, state, _| {
        let state: Arc<dyn Host> = state.fork();
        judge(&state, at == end)
    })?;
    Ok(known.len())
}

fn shows(host: &Arc<dyn Host>, path: &Path, model: &[u8]) -> Result<(), String> {
    let image = try_open(host, path, Access::Read).map_err(|e| e.to_string())?;
    match contents(&image) == model {
        true => Ok(()),
        false => Err(format!("{} holds something else", path.display())),
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

#[test]
fn killed_while_levels_are_merged_nothing_is_lost() {
    let failures = in_parallel(&bases(), |(base, blocks)| {
        let chain = Chain::new(base, blocks, 3, &mut Rng::with_seed(seed()));
        let [bottom, _, _, top] = &chain.members[..] else { panic!("four") };
        let merge = |host: &Arc<dyn Host>| {
            levels::merge_to(host, &top.0, &bottom.0, &options(), false, &()).map(drop)
        };
        let judged = crashes(&chain, merge, |state, done| {
            let intact = shows(state, &top.0, &top.1);
            if let Err(e) = &intact {
                // By then the ancestor has everything.
                shows(state, &bottom.0, &top.1).map_err(|other| format!("{e}; {other}"))?;
            } else if !done {
                merge(state).map_err(|e| format!("again: {e}"))?;
            }
            // What is left of the others says that it is not whole.
            if intact.is_err() {
                for (path, _) in &chain.members[1..] {
                    if let Ok(image) = try_open(state, path, Access::Read)
                        && contents(&image) != top.1
                        && state.open(&top.0, Access::Peek).is_err()
                    {
                        return Err(format!("{} shows something older", path.display()));
                    }
                }
            }
            mended(state, &bottom.0, &top.1)
        });
        judged.err().map(|e| format!("{} {:?}: {e}", base.format, base.spec.subformat))
    });
    let failures: Vec<_> = failures.into_iter().flatten().collect();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

#[test]
fn killed_while_one_is_taken_out_of_the_middle_all_children_read_the_same() {
    let failures = in_parallel(&bases(), |(base, blocks)| {
        let mut random = Rng::with_seed(seed());
        let chain = Chain::new(base, blocks, 2, &mut random);
        let [bottom, middle, child] = &chain.members[..] else { panic!("three") };
        let second = bottom.0.with_file_name("second").with_extension(base.format);
        make_child(&chain.host, &second, &middle.0, None);
        let mut model = middle.1.clone();
        scribble(&chain.host, &second, &mut model, &mut random, 4);
        let merge =
            |host: &Arc<dyn Host>| levels::merge_middle(host, &middle.0, &options(), &()).map(drop);
        let judged = crashes(&chain, merge, |state, done| {
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
        });
        judged.err().map(|e| format!("{} {:?}: {e}", base.format, base.spec.subformat))
    });
    let failures: Vec<_> = failures.into_iter().flatten().collect();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

#[test]
fn the_command_line_makes_chains_shorter() {
    for format in ["vhd", "vhdx", "vmdk"] {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path();
        let run = |arguments: &[&str]| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_flatdisk"));
            tools::run(command.current_dir(dir).args(arguments))
        };
        let names = ["0", "1", "2", "3", "4"].map(|name| format!("{name}.{format}"));
        run(&["create", "-q", &names[0], "8M"]);
        for pair in names.windows(2) {
            run(&["create", "-q", "--parent", &pair[0], &pair[1]]);
        }
        let said = run(&["commit", "--relink", &names[2]]);
        assert!(said.contains(&format!("{} is a child of", names[3])), "{said}");
        let said = run(&["commit", "--to", &names[0], &names[4]]);
        assert!(said.contains(&format!("into ./{}", names[0])), "{said}");
        let left: Vec<_> =
            std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, [names[0].as_str()]);
    }
}
