//! SIGKILL of commands that change images and chains: what is there is the old or the new, and the same
//! command does the rest and leaves nothing lying about.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use live::{Mount, can_mount, flatdisk, mounting, names, outcome, scratch, succeed, wait_until};

const MIB: usize = 1 << 20;
const FORMATS: [&str; 3] = ["vhd", "vhdx", "vmdk"];

/// How often each command is killed, per format.
fn kills() -> u64 {
    std::env::var("FLATDISK_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(3)
}

fn random() -> fastrand::Rng {
    let seed = std::env::var("FLATDISK_SEED").ok().and_then(|n| n.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
    eprintln!("FLATDISK_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

/// A folder of images, the program that changes them, and what they hold.
struct Folder {
    dir: PathBuf,
    format: &'static str,
}

impl Folder {
    fn path(&self, name: &str) -> PathBuf {
        let path = self.dir.join(name);
        if name.contains('.') { path } else { path.with_extension(self.format) }
    }

    /// `flatdisk` with these arguments, `NAME.*` standing for the image of that name.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = flatdisk();
        command.current_dir(&self.dir).stdin(Stdio::null());
        for argument in arguments {
            command.arg(argument.replace(".*", &format!(".{}", self.format)));
        }
        command
    }

    fn run(&self, arguments: &[&str]) {
        succeed(&mut self.command(arguments));
    }

    fn write(&self, name: &str, at: &str, bytes: &[u8]) {
        let mut command = self.command(&["write", "--offset", at]);
        let command = command.arg(self.path(name)).stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(bytes).unwrap();
        assert!(child.wait().unwrap().success());
    }

    /// What an image holds, if it can be read.
    fn contents(&self, name: &str) -> Option<Vec<u8>> {
        let output = outcome(flatdisk().arg("cat").arg(self.path(name)));
        output.status.success().then_some(output.stdout)
    }

    /// A copy of all of it.
    fn copy(&self, to: &Path) -> Self {
        let _ = fs::remove_dir_all(to);
        fs::create_dir(to).unwrap();
        for name in names(&self.dir) {
            fs::copy(self.dir.join(&name), to.join(&name)).unwrap();
        }
        Self { dir: to.to_owned(), format: self.format }
    }

    /// Kills a command after a part of the time that it takes.
    fn kill(&self, arguments: &[&str], after: Duration) {
        let mut command = self.command(arguments);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(after);
        let _ = child.kill();
        child.wait().unwrap();
    }

    fn outcome(&self, arguments: &[&str]) -> Output {
        outcome(&mut self.command(arguments))
    }
}

/// A chain of three, `a`, `b` and `c`; a copy of `a`, whose name keeps it from being taken for one of them;
/// and `delta`, which makes it what `c` is.
fn chain(dir: &Path, format: &'static str, random: &mut fastrand::Rng) -> Folder {
    fs::create_dir(dir).unwrap();
    let folder = Folder { dir: dir.to_owned(), format };
    folder.run(&["create", "-q", "a.*", "16M"]);
    for (name, parent, at, len) in
        [("a", None, "0", 6), ("b", Some("a.*"), "4M", 4), ("c", Some("b.*"), "7M", 5)]
    {
        if let Some(parent) = parent {
            folder.run(&["create", "-q", "--parent", parent, &format!("{name}.*")]);
        }
        let mut bytes = vec![0; len * MIB];
        random.fill(&mut bytes);
        folder.write(name, at, &bytes);
        if name == "a" {
            fs::copy(folder.path("a"), folder.path("a.copy")).unwrap();
        }
    }
    let delta = fs::File::create(folder.dir.join("delta")).unwrap();
    let made = folder.command(&["delta", "-q", "--since", "a.*", "c.*"]).stdout(delta).status();
    assert!(made.unwrap().success());
    folder
}

/// A command, and what must be so after it was killed.
struct Case {
    arguments: &'static [&'static str],
    /// Judges what is there, `whole` being what `c` held; whether the command has something to do still.
    judge: fn(&Folder, whole: &[u8]) -> bool,
    /// The image that holds `whole` in the end.
    result: &'static str,
}

const CASES: [Case; 5] = [
    Case {
        arguments: &["flatten", "-q", "c.*"],
        judge: |folder, whole| {
            assert!(folder.contents("c").as_deref() == Some(whole), "c changed");
            folder.outcome(&["info", "--chain", "c.*"]).stdout.windows(2).any(|w| w == b"a.")
        },
        result: "c",
    },
    Case {
        arguments: &["commit", "-q", "--to", "a.*", "c.*"],
        judge: |folder, whole| match folder.contents("c") {
            Some(found) => {
                assert!(found == whole, "c changed");
                true
            }
            None => {
                assert!(folder.contents("a").as_deref() == Some(whole), "neither holds all");
                // What is left does not open without its parent.
                for name in ["c", "b"] {
                    if folder.path(name).exists() {
                        folder.run(&["delete", "-q", "--force", &format!("{name}.*")]);
                    }
                }
                false
            }
        },
        result: "a",
    },
    Case {
        arguments: &["snapshot", "c.*", "one"],
        judge: |folder, whole| {
            assert!(folder.contents("c").as_deref() == Some(whole), "c changed");
            let chain = folder.outcome(&["info", "--chain", "c.*"]).stdout;
            !String::from_utf8_lossy(&chain).contains("c-one.")
        },
        result: "c",
    },
    Case {
        arguments: &["rename", "-q", "--children", "a.*", "x.*"],
        judge: |folder, whole| {
            assert!(folder.contents("c").as_deref() == Some(whole), "c changed");
            assert!(folder.contents("x").or_else(|| folder.contents("a")).is_some());
            folder.path("a").exists()
        },
        result: "c",
    },
    Case {
        arguments: &["apply", "-q", "delta", "a.copy"],
        judge: |folder, whole| {
            assert!(folder.contents("c").as_deref() == Some(whole), "c changed");
            true
        },
        result: "a.copy",
    },
];

#[test]
fn killed_at_random_the_old_or_the_new_is_there_and_the_same_command_does_the_rest() {
    let temporary = scratch();
    let mut random = random();
    for format in FORMATS {
        let made = chain(&temporary.path().join(format), format, &mut random);
        let whole = made.contents("c").unwrap();
        for case in &CASES {
            let what = format!("{format} {}", case.arguments[0]);
            let undisturbed = made.copy(&temporary.path().join("work"));
            let begun = Instant::now();
            undisturbed.run(case.arguments);
            let time = begun.elapsed();
            let expected = names(&undisturbed.dir);
            let mut midway = 0;
            for _ in 0..kills() {
                let folder = made.copy(&temporary.path().join("work"));
                folder.kill(case.arguments, time.mul_f64(random.f64() * 1.1));
                midway += u64::from(names(&folder.dir) != names(&made.dir));
                if (case.judge)(&folder, &whole) {
                    let again = folder.outcome(case.arguments);
                    assert!(again.status.success(), "{what}: {again:?}");
                }
                assert!(folder.contents(case.result).as_deref() == Some(&whole[..]), "{what}");
                assert_eq!(names(&folder.dir), expected, "{what}");
                if format == "vhd" {
                    // Its two footers are written one after the other.
                    let mut repair = flatdisk();
                    outcome(repair.args(["check", "-q", "--repair"]).arg(folder.path(case.result)));
                }
                succeed(flatdisk().args(["check", "-q"]).arg(folder.path(case.result)));
            }
            println!("{what}: {} kills, {midway} with other names, {time:?}", kills());
        }
    }
}

#[test]
fn killed_while_a_throw_away_layer_is_kept_the_image_is_the_old_or_the_new() {
    if !can_mount() {
        return;
    }
    let _turn = mounting();
    let temporary = scratch();
    let other = temporary.path().join("other");
    fs::create_dir(&other).unwrap();
    let mut random = random();
    for format in FORMATS {
        let folder = Folder { dir: temporary.path().join(format), format };
        fs::create_dir(&folder.dir).unwrap();
        folder.run(&["create", "-q", "a.*", "16M"]);
        let mut old = vec![0; 16 * MIB];
        for round in 0..kills() {
            let mut mount = Mount::new(&other, &[]);
            let flat = mount.flat(&format!("a.{format}"));
            let target = mount.path().to_str().unwrap().to_owned();
            let open = ["open", "--nonpersistent=/tmp", "a.*", &target];
            folder.run(&open);
            let mut new = vec![0; 16 * MIB];
            random.fill(&mut new[2 * MIB..10 * MIB]);
            fs::File::options().write(true).open(&flat).unwrap().write_all(&new).unwrap();
            let flat = flat.to_str().unwrap().to_owned();
            let mut close = folder.command(&["close", "--commit", &flat]);
            let mut client = close.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(random.u64(..400)));
            if round % 2 == 0 {
                mount.kill_daemon();
            } else {
                let _ = client.kill();
            }
            client.wait().unwrap();
            if round % 2 == 0 {
                mount.kill();
            } else {
                assert!(mount.unmount().success());
            }
            let now = folder.contents("a").unwrap();
            assert!(now == old || now == new, "{format}: a mix");
            if folder.path("a-written").exists() {
                assert!(folder.contents("a-written").is_none_or(|held| held == new), "{format}");
                folder.run(&["commit", "-q", "a-written.*"]);
                assert!(folder.contents("a").unwrap() == new, "{format}");
            }
            // Undisturbed, it takes away what was left.
            let mount = Mount::new(&other, &[]);
            let target = mount.path().to_str().unwrap().to_owned();
            folder.run(&["open", "--nonpersistent=/tmp", "a.*", &target]);
            let flat = mount.flat(&format!("a.{format}"));
            let file = fs::File::options().write(true).open(&flat).unwrap();
            { &file }.write_all(&new).unwrap();
            drop(file);
            wait_until("it is kept", || {
                let flat = flat.to_str().unwrap();
                folder.outcome(&["close", "--commit", flat]).status.success()
            });
            assert!(mount.unmount().success());
            assert!(folder.contents("a").unwrap() == new, "{format}");
            assert_eq!(names(&folder.dir), [format!("a.{format}")]);
            folder.run(&["check", "-q", "a.*"]);
            old = new;
        }
    }
}
