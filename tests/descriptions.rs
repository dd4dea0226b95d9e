//! Another description for an OVA, its disks left where they are: what a crash at any moment leaves, what
//! other programs read of it, and what is refused.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use common::tools::{both, have, output, run};
use common::without::Findings;
use common::{crash, number, seed};
use fastrand::Rng;
use flatdisk::error::ErrorKind;
use flatdisk::formats::ova::{self, describe};
use flatdisk::formats::{self, CreateSpec, OpenOptions};
use flatdisk::storage::archive::{Archive, tar};
use flatdisk::storage::faulty::{Call, Fault, Faults, FaultyHost};
use flatdisk::storage::memory::{MemoryFile, MemoryHost};
use flatdisk::storage::recording::RecordingHost;
use flatdisk::storage::{Access, Host, Storage};
use sha2::Digest;

const PATH: &str = "/t/x.ova";

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An archive of members with these names and contents.
fn archive(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, contents) in members {
        bytes.extend(tar::encode(name, contents.len() as u64, 0).unwrap());
        bytes.extend(*contents);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}

/// A description of `len` bytes.
fn description(word: &str, len: usize) -> Vec<u8> {
    let mut text = format!("<Envelope>{word}").into_bytes();
    text.resize(len - "</Envelope>\n".len(), b'.');
    text.extend(b"</Envelope>\n");
    text
}

fn disk() -> Vec<u8> {
    let host = MemoryHost::new();
    let path = Path::new("/d.vhd");
    let spec = CreateSpec { size: 1 << 20, ..CreateSpec::default() };
    formats::create(formats::by_name("vhd").unwrap(), &*host, path, &spec).unwrap();
    let dynamic: Arc<dyn Host> = host.clone();
    let image = formats::open(&dynamic, path, &OpenOptions::new(Access::Write)).unwrap();
    image.disk.write_at(5000, b"what a guest wrote").unwrap();
    image.disk.close().unwrap();
    let contents = host.file(path).unwrap();
    contents.to_vec()
}

/// What no format claims.
fn noise() -> Vec<u8> {
    let mut bytes = vec![0; 100_000];
    Rng::with_seed(1).fill(&mut bytes);
    bytes
}

/// Hosts in memory open no disks in archives, so that one stands for those that is no image.
fn made(text: &[u8], disk: &[u8]) -> Vec<u8> {
    let manifest = format!(
        "SHA256(m.ovf)= {}\nSHA1(data)= {}\nSHA1 (m.ovf) = {}\n",
        hex(&sha2::Sha256::digest(text)),
        hex(&sha1::Sha1::digest(disk)),
        hex(&sha1::Sha1::digest(text)).to_uppercase()
    );
    archive(&[("m.ovf", text), ("m.mf", manifest.as_bytes()), ("data", disk)])
}

fn host(bytes: &[u8]) -> Arc<MemoryHost> {
    let host = MemoryHost::new();
    host.insert(MemoryFile::new(PATH, bytes));
    host
}

fn check(host: &Arc<dyn Host>) -> Result<formats::Report, String> {
    let options = OpenOptions::new(Access::Read);
    ova::check(host, Path::new(PATH), &options, &()).map_err(|e| e.to_string())
}

fn said(host: &Arc<dyn Host>) -> Vec<u8> {
    describe::description(host, Path::new(PATH)).unwrap()
}

/// The disk is what it was, and the description old or new, with the digests that fit; at the end new.
fn judge(
    state: &Arc<MemoryHost>,
    done: bool,
    texts: &[&[u8]; 2],
    disk: &[u8],
) -> Result<(), String> {
    let state: Arc<dyn Host> = state.fork();
    let path = Path::new(PATH);
    let read = |name: &str| {
        let file = Archive::open(state.open(path, Access::Peek)?)?.member(Path::new(name))?;
        let mut bytes = vec![0; file.len().unwrap() as usize];
        file.read_at(0, &mut bytes).unwrap();
        Ok(bytes)
    };
    let same = |e: flatdisk::Error| e.to_string();
    if read("data").map_err(same)? != disk {
        return Err("the disk is another".to_owned());
    }
    let found = check(&state)?;
    let untouched = found.errors == 0;
    if done && (!untouched || found.leaks > 0) {
        return Err(format!("not clean at the end: {found:?}"));
    }
    let options = OpenOptions::new(Access::Read);
    let repaired = ova::repair(&state, path, &options, false, &()).map_err(same)?;
    if repaired.after.errors > 0 || repaired.after.leaks > 0 || repaired.after.notices > 0 {
        return Err(format!("not repaired: {:?}", repaired.after));
    }
    let now = said(&state);
    if (done || !untouched) && now != texts[1] || !texts.contains(&&*now) {
        return Err(format!("the description: {}", String::from_utf8_lossy(&now)));
    }
    if read("data").map_err(same)? != disk {
        return Err("the disk is another after the repair".to_owned());
    }
    Ok(())
}

#[test]
fn killed_at_any_moment_the_description_is_the_old_or_the_new_one() {
    let budget = number("FLATDISK_CRASH_STATES", 600) as usize;
    let disk = noise();
    let mut random = Rng::with_seed(seed());
    // As long; longer and shorter, in the same blocks; and one that does not fit.
    for (old, new) in [(3000, 3000), (3000, 3070), (3000, 40), (3000, 9000)] {
        let texts = [description("old", old), description("new", new)];
        let memory = host(&made(&texts[0], &disk));
        let recorder = RecordingHost::over(&memory);
        let recorded: Arc<dyn Host> = recorder.clone();
        let done = describe::describe(&recorded, Path::new(PATH), &texts[1], false, &()).unwrap();
        assert_eq!(done.in_place, new < 9000);
        let recording = recorder.recording();
        let end = recording.ops().len();
        let texts = [&*texts[0], &*texts[1]];
        crash::each_state(
            &recording,
            &mut random,
            budget,
            &mut HashSet::new(),
            |at| usize::from(at == end),
            &mut |at, state, _| judge(state, at == end, &texts, &disk),
        )
        .unwrap_or_else(|e| panic!("{old} to {new} bytes: {e}"));
        let mut findings = Findings::default();
        let judge = |state: &Arc<MemoryHost>, done: bool| judge(state, done, &texts, &disk);
        findings.look("describe", &recording, &mut random, &judge);
        for (sync, finding) in findings.0 {
            assert!(finding.is_ok(), "{old} to {new} bytes: no crash shows the lack of {sync}");
        }
        if done.in_place {
            assert_eq!(recorder.now().file(Path::new(PATH)).unwrap().len().unwrap(), {
                memory.file(Path::new(PATH)).unwrap().len().unwrap()
            });
        }
    }
}

/// Whatever call fails, the disk stays, and asking again does it.
#[test]
fn every_call_may_fail() {
    let disk = noise();
    for new in [3000, 9000] {
        let texts = [description("old", 3000), description("new", new)];
        for (fault, nth) in [Fault::Errno(libc::EIO), Fault::Half(libc::ENOSPC)]
            .into_iter()
            .flat_map(|fault| (0..).map(move |nth| (fault, nth)).take(40))
        {
            let memory = host(&made(&texts[0], &disk));
            let faults = Arc::new(Faults::default());
            faults.inject(&Call::CHANGES, nth, fault, false);
            let failing: Arc<dyn Host> = FaultyHost::over(memory.clone(), &faults);
            let done = describe::describe(&failing, Path::new(PATH), &texts[1], false, &());
            if faults.fired() == 0 {
                assert!(done.is_ok() && nth > 5, "{nth}: {done:?}");
                continue;
            }
            judge(&memory, done.is_ok(), &[&texts[0], &texts[1]], &disk)
                .unwrap_or_else(|e| panic!("call {nth} failed: {e}"));
            let host: Arc<dyn Host> = memory;
            describe::describe(&host, Path::new(PATH), &texts[1], false, &()).unwrap();
            assert_eq!(said(&host), texts[1]);
            assert_eq!(check(&host).unwrap().errors, 0);
        }
    }
}

fn flatdisk() -> Command {
    Command::new(env!("CARGO_BIN_EXE_flatdisk"))
}

/// An archive on the host, of files in a folder.
struct Setup {
    dir: tempfile::TempDir,
    ova: PathBuf,
}

impl Setup {
    fn new(members: &[(&str, &[u8])]) -> Self {
        let dir = common::folder();
        let ova = dir.path().join("x.ova");
        fs::write(&ova, archive(members)).unwrap();
        Self { dir, ova }
    }

    fn put(&self, text: &[u8], options: &[&str]) -> (bool, String) {
        let mut meta = flatdisk();
        meta.arg("meta").arg(&self.ova).arg("--ovf=-").args(options);
        let child = meta.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = child.spawn().unwrap();
        child.stdin.take().unwrap().write_all(text).unwrap();
        let output = child.wait_with_output().unwrap();
        (output.status.success(), both(&output))
    }

    fn unpacked(&self) -> PathBuf {
        let to = self.dir.path().join("unpacked");
        let _ = fs::remove_dir_all(&to);
        fs::create_dir(&to).unwrap();
        run(Command::new("tar").arg("-xf").arg(&self.ova).arg("-C").arg(&to));
        to
    }
}

#[test]
fn a_line_of_the_description_is_edited_as_people_do() {
    if !have("tar") {
        return;
    }
    let dir = common::folder();
    let raw = dir.path().join("disk.raw");
    fs::write(&raw, vec![7; 1 << 20]).unwrap();
    let ova = dir.path().join("x.ova");
    run(flatdisk().args(["convert", "-q", "--for", "esx"]).args([&raw, &ova]));
    let before = fs::metadata(&ova).unwrap();
    let old = run(flatdisk().args(["meta", "--ovf"]).arg(&ova));
    assert!(old.contains("vmx-10") && !old.ends_with("  "), "{old}");
    let file = dir.path().join("new.ovf");
    fs::write(&file, old.replace("vmx-10", "vmx-13, the family that is wanted")).unwrap();
    let mut put = flatdisk();
    put.arg("meta").arg(&ova).arg(format!("--ovf={}", file.display()));
    let told = run(&mut put);
    assert!(told.contains("in place"), "{told}");
    let after = fs::metadata(&ova).unwrap();
    assert_eq!((before.ino(), before.len()), (after.ino(), after.len()));
    run(flatdisk().arg("check").arg(&ova));
    let setup = Setup { dir, ova };
    let unpacked = setup.unpacked();
    let text = fs::read(unpacked.join("x.ovf")).unwrap();
    assert!(String::from_utf8_lossy(&text).contains("vmx-13"));
    let manifest = fs::read_to_string(unpacked.join("x.mf")).unwrap();
    assert!(manifest.contains(&hex(&sha2::Sha256::digest(&text))), "{manifest}");
    let hash = run(flatdisk().arg("hash").arg(&setup.ova));
    assert!(hash.starts_with(&hex(&sha2::Sha256::digest(vec![7; 1 << 20]))), "{hash}");
}

#[test]
fn what_does_not_fit_gets_room_and_comes_first() {
    if !have("tar") {
        return;
    }
    let disk = disk();
    let old = description("old", 300);
    let noise = vec![9; 70_001];
    let setup = Setup::new(&[("a/other", &noise), ("m.ovf", &old), ("d.vhd", &disk)]);
    fs::set_permissions(&setup.ova, std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
    let new = description("new", 20_000);
    let (done, told) = setup.put(&new, &[]);
    assert!(done && told.contains("did not fit"), "{told}");
    assert_eq!(fs::metadata(&setup.ova).unwrap().mode() & 0o777, 0o640);
    let listed = run(Command::new("tar").arg("-tf").arg(&setup.ova));
    assert_eq!(listed, "m.ovf\na/other\nd.vhd\n");
    let unpacked = setup.unpacked();
    assert!(fs::read(unpacked.join("m.ovf")).unwrap().starts_with(&new));
    assert!(fs::read(unpacked.join("a/other")).unwrap() == noise);
    assert!(fs::read(unpacked.join("d.vhd")).unwrap() == disk);
    let left: Vec<_> = fs::read_dir(setup.dir.path()).unwrap().collect();
    assert_eq!(left.len(), 2, "{left:?}");
    // The next one has room.
    let (done, told) = setup.put(&description("next", 23_000), &[]);
    assert!(done && told.contains("in place"), "{told}");
    run(flatdisk().arg("check").arg(&setup.ova));
}

/// Names that no header has room for come in records before it.
#[test]
fn records_before_the_header_stay_with_it() {
    if !have("tar") {
        return;
    }
    let dir = common::folder();
    let parts = dir.path().join("parts");
    let long = format!("{}/m.ovf", "long".repeat(30));
    fs::create_dir_all(parts.join(&long).parent().unwrap()).unwrap();
    fs::write(parts.join(&long), description("old", 600)).unwrap();
    let disk = disk();
    fs::write(parts.join("d.vhd"), &disk).unwrap();
    for dialect in ["gnu", "pax"] {
        let ova = dir.path().join("x.ova");
        let mut tar = Command::new("tar");
        tar.arg(format!("--format={dialect}")).arg("-cf").arg(&ova).arg("-C").arg(&parts);
        run(tar.args(["d.vhd", &long]));
        let setup = Setup { dir: common::folder(), ova };
        for (text, how) in [(description("new", 600), "in place"), (description("new", 601), "fit")]
        {
            let (done, told) = setup.put(&text, &[]);
            assert!(done && told.contains(how), "{dialect}: {told}");
            let unpacked = setup.unpacked();
            assert!(fs::read(unpacked.join(&long)).unwrap().starts_with(&text), "{dialect}");
            assert!(fs::read(unpacked.join("d.vhd")).unwrap() == disk, "{dialect}");
        }
    }
}

/// Some programs leave out the empty blocks at the end, and what fills up the last file.
#[test]
fn an_archive_without_its_end_is_as_good() {
    let old = description("old", 300);
    let disk = noise();
    for text in [description("new", 300), description("new", 3000)] {
        let whole = archive(&[("m.ovf", &old), ("data", &disk)]);
        let end = 512 + 512 + 512 + disk.len();
        for len in [end, end + 10, end.next_multiple_of(512), end.next_multiple_of(512) + 512] {
            let memory = host(&whole[..len]);
            let dynamic: Arc<dyn Host> = memory.clone();
            let path = Path::new(PATH);
            describe::describe(&dynamic, path, &text, false, &()).unwrap();
            assert_eq!(said(&dynamic), text);
            assert_eq!(check(&dynamic).unwrap().errors, 0);
            let found = Archive::open(dynamic.open(path, Access::Peek).unwrap()).unwrap();
            let mut bytes = vec![0; disk.len()];
            found.member(Path::new("data")).unwrap().read_at(0, &mut bytes).unwrap();
            assert!(bytes == disk, "{len}");
        }
        // Something of it is lost.
        let dynamic: Arc<dyn Host> = host(&whole[..end - 1]);
        let e = describe::describe(&dynamic, Path::new(PATH), &text, false, &()).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
    }
    // The description itself is the last file.
    for (len, new) in [(812, 300), (812, 400), (1024, 512), (1536, 300)] {
        let dynamic: Arc<dyn Host> = host(&archive(&[("m.ovf", &old)])[..len]);
        let text = description("new", new);
        describe::describe(&dynamic, Path::new(PATH), &text, false, &()).unwrap();
        assert_eq!(said(&dynamic), text, "{len}");
        assert_eq!(check(&dynamic).unwrap().errors, 0);
    }
    // So much of nothing is none of the archive's.
    let mut long = archive(&[("m.ovf", &old)]);
    long.resize(2 << 20, 0);
    let dynamic: Arc<dyn Host> = host(&long);
    let e = describe::describe(&dynamic, Path::new(PATH), &old, false, &()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
}

#[test]
fn what_a_symlink_leads_to_gets_the_description() {
    let setup = Setup::new(&[("m.ovf", &description("old", 300))]);
    let real = setup.dir.path().join("real.ova");
    fs::rename(&setup.ova, &real).unwrap();
    std::os::unix::fs::symlink("real.ova", &setup.ova).unwrap();
    for text in [description("new", 300), description("new", 3000)] {
        let (done, told) = setup.put(&text, &[]);
        assert!(done && setup.ova.is_symlink(), "{told}");
        let now = run(flatdisk().args(["meta", "--ovf"]).arg(&real));
        assert_eq!(now.as_bytes(), text);
    }
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let old = description("old", 300);
    let new = description("new", 300);
    let digest = |name: &str, digest: &str| format!("{name}(m.ovf)= {digest}\n").into_bytes();
    let sha = digest("SHA256", &hex(&sha2::Sha256::digest(&old)));
    let (md5, short) = (digest("MD5", "00"), digest("SHA1", "00"));
    let signed: &[(&str, &[u8])] = &[("m.ovf", &old), ("m.mf", &sha), ("m.cert", b"signature")];
    for (members, text, words) in [
        (signed, &new[..], "signed"),
        (&[("m.ovf", &old), ("m.mf", &md5)], &new, "kind not known"),
        (&[("m.ovf", &old), ("m.mf", &short)], &new, "wrong length"),
        (&[("d.vhd", b"")], &new, "no description"),
        (&[("m.ovf", &old), ("n.ovf", &old)], &new, "more than one"),
        (&[("m.ovf", &old)], b"no description", "no XML"),
        (&[("m.ovf", &old)], b"\xff\xfe<\0E\0", "UTF-8"),
    ] {
        let setup = Setup::new(members);
        let before = fs::read(&setup.ova).unwrap();
        let (done, told) = setup.put(text, &[]);
        assert!(!done && told.contains(words), "{words}: {told}");
        assert!(fs::read(&setup.ova).unwrap() == before, "{words}");
    }
    let setup = Setup::new(&[("m.ovf", &old)]);
    let whole = fs::read(&setup.ova).unwrap();
    fs::write(&setup.ova, [&whole[..], b"more"].concat()).unwrap();
    let (done, told) = setup.put(&new, &[]);
    assert!(!done && told.contains("behind the end"), "{told}");
    let used = Setup::new(&[("m.ovf", &old)]);
    let _held = flatdisk::storage::file::HostFs.open(&used.ova, Access::Read).unwrap();
    let (done, told) = used.put(&new, &[]);
    assert!(!done && told.contains("in use"), "{told}");
}

#[test]
fn a_signature_is_left_out_only_with_consent() {
    let old = description("old", 300);
    let sha = format!("SHA1(m.ovf)= {}\n", hex(&sha1::Sha1::digest(&old)));
    let disk = disk();
    let members: [(&str, &[u8]); 4] =
        [("m.ovf", &old), ("m.mf", sha.as_bytes()), ("m.cert", b"signature"), ("d.vhd", &disk)];
    let setup = Setup::new(&members);
    let text = [&description("new", 300)[..], b"<!-- href=\"gone.vmdk\" -->"].concat();
    let (done, told) = setup.put(&text, &["--force", "--json"]);
    assert!(done && told.contains("gone.vmdk") && told.contains("\"in_place\": false"), "{told}");
    let host: Arc<dyn Host> = flatdisk::storage::file::HostFs::shared();
    let archive = Archive::open(host.open(&setup.ova, Access::Peek).unwrap()).unwrap();
    let names: Vec<_> = archive.members().iter().map(|m| m.name.to_str().unwrap()).collect();
    assert_eq!(names, ["m.ovf", "m.mf", "d.vhd"]);
    let checked = output(flatdisk().arg("check").arg(&setup.ova));
    assert!(checked.status.success(), "{}", both(&checked));
}

#[test]
fn an_interrupted_change_is_told_and_brought_to_its_end() {
    let disk = disk();
    let texts = [description("old", 3000), description("new", 3000)];
    let memory = host(&made(&texts[0], &disk));
    let recorder = RecordingHost::over(&memory);
    let recorded: Arc<dyn Host> = recorder.clone();
    describe::describe(&recorded, Path::new(PATH), &texts[1], false, &()).unwrap();
    let recording = recorder.recording();
    let mut point = flatdisk::storage::crash::CrashPoint::start(&recording);
    // Mark, sync, record, sync.
    while point.at() < 4 && point.advance() {}
    let state = point.state(&[]);
    let setup = Setup::new(&[]);
    fs::write(&setup.ova, state.file(Path::new(PATH)).unwrap().to_vec()).unwrap();
    let checked = output(flatdisk().arg("check").arg(&setup.ova));
    assert_eq!(checked.status.code(), Some(2));
    assert!(both(&checked).contains("was being replaced"), "{}", both(&checked));
    let before = fs::read(&setup.ova).unwrap();
    let dry = output(flatdisk().args(["check", "--repair", "--dry-run"]).arg(&setup.ova));
    assert!(both(&dry).contains("would leave: 0 errors"), "{}", both(&dry));
    assert!(fs::read(&setup.ova).unwrap() == before);
    run(flatdisk().args(["check", "--repair"]).arg(&setup.ova));
    let now = run(flatdisk().args(["meta", "--ovf"]).arg(&setup.ova));
    assert_eq!(now.as_bytes(), texts[1]);
    let archive: Arc<dyn Host> = flatdisk::storage::file::HostFs::shared();
    let e = describe::describe(&archive, &setup.ova, b"", false, &()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidInput);
}
