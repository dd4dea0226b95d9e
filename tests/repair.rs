//! Every repairable damage is found, shown, and repaired, whatever interrupts the repair.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use common::images::Image;
use common::repairs::{
    Case, case, cases, checked, directories, get, leak, place_at, put, put_grain, put_vhd_entry,
    read, table_file, write_data,
};
use common::{corpus, in_parallel, number, pattern, repairs, seed, tools};
use flatdisk::formats::{self, OpenOptions, Scope};
use flatdisk::storage::crash::{Choice, CrashPoint};
use flatdisk::storage::file::HostFs;
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::recording::{Change, Op, RecordingHost};
use flatdisk::storage::{Access, Host, Storage};

const MIB: u64 = 1 << 20;

/// The changes are what was recorded, one by one and in this order.
fn assert_recorded(name: &str, changes: &[formats::plan::Change], recorder: &RecordingHost) {
    let recording = recorder.recording();
    let made: Vec<&Op> = recording.ops().iter().filter(|op| op.change_is_seen()).collect();
    let told = || {
        let ops = 0..recording.ops().len();
        ops.map(|index| recording.describe(index)).collect::<Vec<_>>().join("\n")
    };
    let mut made = made.into_iter().peekable();
    for change in changes {
        assert!(made.peek().is_some(), "{name}: {change} was not made\n{}", told());
        let (mut at, end) = (change.offset, change.offset + change.length);
        // What is copied is written in pieces.
        for op in made.by_ref() {
            assert_eq!(recording.path(op.file), change.file, "{name}: {change}");
            let same = match (&op.change, change.action) {
                (Change::SetLen(len), "resize") => *len == at,
                (Change::Punch(range), "punch") => {
                    at <= range.start && range.end <= end.next_multiple_of(512)
                }
                (Change::Write { at: sector, data, .. }, "write") => {
                    let until = sector + data.len() as u64;
                    let begins = *sector == at / 512 * 512;
                    at = until;
                    begins && until <= end.next_multiple_of(512)
                }
                // Zeroes that are copied.
                (Change::Punch(range), "write") => {
                    let begins = range.start == at / 512 * 512;
                    at = range.end;
                    begins && range.end <= end.next_multiple_of(512)
                }
                _ => false,
            };
            assert!(same, "{name}: {change}\n{}", told());
            if change.action != "write" || at >= end {
                break;
            }
        }
    }
    assert!(made.next().is_none(), "{name}: more was changed\n{}", told());
}

trait Seen {
    /// Whether the operation is one that a repair shows.
    fn change_is_seen(&self) -> bool;
}

impl Seen for Op {
    fn change_is_seen(&self) -> bool {
        matches!(self.change, Change::Write { .. } | Change::Punch(_) | Change::SetLen(_))
    }
}

fn mend(case: &Case, host: &Arc<dyn Host>, dry_run: bool) -> formats::Repair {
    repairs::mend(case, host, dry_run).unwrap()
}

fn bytes(host: &MemoryHost) -> Vec<Vec<u8>> {
    host.files().iter().map(|file| file.to_vec()).collect()
}

fn run(case: &Case) {
    let name = case.name();
    let damaged = case.damaged();
    let host = damaged.host.clone();
    let dynamic: Arc<dyn Host> = host.clone();

    let report = checked(case, &dynamic);
    let found = |at: u64| report.findings.iter().any(|f| f.offset == Some(at));
    assert!(!report.findings.is_empty(), "{name}: not found");
    if let Some(at) = damaged.place {
        assert!(found(at), "{name}: not found at {at:#x}: {:#x?}", report.findings);
    }
    let expected = if case.scope == Scope::Leaks { 3 } else { report.exit_status() };
    assert_eq!(report.exit_status(), expected, "{name}: {:#x?}", report.findings);

    let before = bytes(&host);
    if case.scope == Scope::Lossy {
        let options = OpenOptions::new(Access::Write);
        let repair = formats::repair(&dynamic, &case.path(), &options, Scope::All, true).unwrap();
        assert_ne!(repair.after.exit_status(), 0, "{name}: repaired without consent");
    }
    let dry = mend(case, &dynamic, true);
    assert!(!dry.changes.is_empty(), "{name}: nothing planned for {:#x?}", report.findings);
    assert!(bytes(&host) == before, "{name}: a dry run wrote");

    let recorder = RecordingHost::over(&host);
    let recorded: Arc<dyn Host> = recorder.clone();
    let repair = mend(case, &recorded, false);
    let shown =
        |what: &formats::Repair| what.changes.iter().map(|c| format!("\n{c}")).collect::<String>();
    assert_eq!(repair.after.exit_status(), 0, "{name}: {:#x?}{}", repair.after, shown(&repair));
    assert_eq!(repair.changes, dry.changes, "{name}: the dry run showed something else");
    assert_eq!(dry.after.exit_status(), 0, "{name}: {:#x?}", dry.after);
    assert!(read(case, &recorded).unwrap() == damaged.whole, "{name}: data changed");

    assert_recorded(&name, &repair.changes, &recorder);
    let position = recorder.position();
    let again = mend(case, &recorded, false);
    assert!(again.changes.is_empty(), "{name}: again{}", shown(&again));
    assert_eq!(recorder.position(), position, "{name}: a second repair wrote");
    ask_qemu(case, &recorder.now(), &name);

    let recording = recorder.recording();
    let mut random = fastrand::Rng::with_seed(seed());
    let mut point = CrashPoint::start(&recording);
    let mut states = 0;
    loop {
        let mut choices = point.choices(&mut random);
        choices.extend((0..4).map(|_| Choice::Random(random.u64(..))));
        let limit = number("FLATDISK_CRASH_STATES", 12) as usize;
        random.shuffle(&mut choices[2.min(point.pending().len())..]);
        for choice in choices.into_iter().take(limit) {
            let done = point.at() == recording.ops().len();
            if let Err(e) = damaged.judge(&point.state(&point.fates(choice)), done) {
                panic!("{name}: crash after {}, {choice}: {e}{}", point.at(), shown(&repair));
            }
            states += 1;
        }
        if !point.advance() {
            break;
        }
    }
    println!("{name}: {states} crash states{}", shown(&repair));
}

/// QEMU's check agrees, where it has one.
fn ask_qemu(case: &Case, host: &MemoryHost, name: &str) {
    let subformat = case.image.spec.subformat.as_deref();
    let unknown = case.image.format == "vhd" || subformat == Some("vmfsSparse");
    // QEMU has no children of VHDX.
    if unknown || case.child && case.image.format == "vhdx" || !tools::have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let output = qemu_checks(&[], &lay(case, host, dir.path()));
    assert!(output.status.success(), "{name}: QEMU finds {}", tools::both(&output));
}

/// Writes the files of a host into a folder; the image among them.
fn lay(case: &Case, host: &MemoryHost, folder: &Path) -> PathBuf {
    for file in host.files() {
        let to = folder.join(file.path().file_name().unwrap());
        std::fs::write(to, file.to_vec()).unwrap();
    }
    folder.join(case.path().file_name().unwrap())
}

fn qemu_checks(options: &[&str], image: &Path) -> Output {
    let format = image.extension().unwrap();
    let mut check = Command::new("qemu-img");
    tools::output(check.args(["check", "-f"]).arg(format).args(options).arg(image))
}

fn flatdisk_checks(options: &[&str], image: &Path) -> Output {
    let mut flatdisk = Command::new(env!("CARGO_BIN_EXE_flatdisk"));
    tools::output(flatdisk.arg("check").args(options).arg(image))
}

/// Two copies of an image of one file: for QEMU, and for us.
fn copies(image: &Path, folder: &Path) -> (PathBuf, PathBuf) {
    let copy = |name: &str| {
        let copy = folder.join(name).with_extension(image.extension().unwrap());
        std::fs::write(&copy, std::fs::read(image).unwrap()).unwrap();
        copy
    };
    (copy("theirs"), copy("ours"))
}

/// Both repairs of an image left the same disk, and nothing that either of us would repair.
fn assert_same_and_clean(name: &str, theirs: &Path, ours: &Path) {
    for image in [theirs, ours] {
        for output in [qemu_checks(&[], image), flatdisk_checks(&[], image)] {
            assert!(output.status.success(), "{name}: {}", tools::both(&output));
        }
    }
    assert_same(name, theirs, ours);
}

fn assert_same(name: &str, theirs: &Path, ours: &Path) {
    let compared = tools::output(Command::new("qemu-img").arg("compare").args([theirs, ours]));
    assert!(compared.status.success(), "{name}: {}", tools::both(&compared));
}

/// A log is all that QEMU repairs in a VHDX.
#[test]
fn qemu_replays_a_log_to_the_same_disk() {
    if !tools::have("qemu-img") {
        return;
    }
    let dir = common::folder();
    let mut images = Vec::new();
    // A writer of ours that died.
    let replays = |case: &&Case| case.name == "a log is to be replayed" && !case.child;
    for case in cases().iter().filter(replays) {
        images.push(lay(case, &write_data(case, &MemoryHost::new()), dir.path()));
    }
    assert_eq!(images.len(), 1);
    let unpacked: Vec<_> = corpus::folder().map_or_else(Vec::new, |folder| {
        let rows = corpus::rows(&folder);
        let dirty = rows.iter().filter(|row| row.id.contains("dirty"));
        dirty.map(|row| corpus::unpack(&folder, row)).collect()
    });
    images.extend(unpacked.iter().map(|unpacked| unpacked.image.clone()));
    for image in &images {
        let name = image.display().to_string();
        let (theirs, ours) = copies(image, dir.path());
        let said = tools::both(&qemu_checks(&[], &theirs));
        assert!(said.contains("contains a log that needs to be replayed"), "{name}: {said}");
        let output = qemu_checks(&["-r", "all"], &theirs);
        let said = tools::both(&output);
        assert!(output.status.success() && said.contains("1 corruptions"), "{name}: {said}");
        let output = flatdisk_checks(&["--repair=all"], &ours);
        assert!(output.status.success(), "{name}: {}", tools::both(&output));
        assert_same(&name, &theirs, &ours);
        // QEMU leaves space lost.
        let output = flatdisk_checks(&[], &theirs);
        assert!(matches!(output.status.code(), Some(0 | 3)), "{name}: {}", tools::both(&output));
        let output = flatdisk_checks(&["--repair=leaks"], &theirs);
        assert!(output.status.success(), "{name}: {}", tools::both(&output));
        assert_same_and_clean(&name, &theirs, &ours);
    }
}

/// In a VHDX QEMU neither sees nor gives back space that is lost, and a VMDK it does not repair at
/// all.
#[test]
fn space_that_qemu_leaves_lost_is_given_back_and_the_disk_is_the_same() {
    if !tools::have("qemu-img") {
        return;
    }
    let single = |case: &&Case| {
        let subformat = case.image.spec.subformat.as_deref();
        !case.child && matches!(subformat, Some("dynamic" | "monolithicSparse"))
    };
    let leaks: Vec<Case> = cases()
        .into_iter()
        .filter(|case| case.scope == Scope::Leaks && case.image.format != "vhd")
        .collect();
    let mut seen = 0;
    for case in leaks.iter().filter(single) {
        let name = case.name();
        let host = write_data(case, &MemoryHost::new());
        (case.damage)(&table_file(&host, case));
        let dir = common::folder();
        let (theirs, ours) = copies(&lay(case, &host, dir.path()), dir.path());
        let output = qemu_checks(&["-r", "all"], &theirs);
        let (status, expected) = match case.image.format {
            "vhdx" => (0, "No errors were found on the image."),
            _ => (63, "This image format does not support checks"),
        };
        let said = tools::both(&output);
        assert_eq!(output.status.code(), Some(status), "{name}: {said}");
        assert!(said.contains(expected), "{name}: {said}");
        assert_eq!(flatdisk_checks(&[], &theirs).status.code(), Some(3), "{name}");
        let output = flatdisk_checks(&["--repair=all"], &ours);
        assert!(output.status.success(), "{name}: {}", tools::both(&output));
        assert_same(&name, &theirs, &ours);
        // What QEMU left is no obstacle to ours.
        let output = flatdisk_checks(&["--repair=leaks"], &theirs);
        assert!(output.status.success(), "{name}: {}", tools::both(&output));
        assert_same_and_clean(&name, &theirs, &ours);
        seen += 1;
    }
    assert!(seen >= 4, "{seen} cases");
}

/// There the parent's data would take the place of what is lost.
#[test]
fn children_without_an_entry_for_zeroes_give_nothing_up() {
    let vhd = Image::new("vhd", "dynamic", 3 * MIB).block(MIB / 2);
    let mut vmdk = Image::new("vmdk", "monolithicSparse", 70 * MIB);
    vmdk.spec.zeroed_grains = Some(false);
    let damages: [(&Image, repairs::Damage); 2] =
        [(&vhd, |f| put_vhd_entry(f, 0, 0x7fff_ff00)), (&vmdk, |f| put_grain(f, 0x7fff_ff80))];
    for (image, damage) in damages {
        let case = Case { child: true, scope: Scope::Lossy, ..case(image, "", damage) };
        let host = write_data(&case, &MemoryHost::new());
        (case.damage)(&table_file(&host, &case));
        let dynamic: Arc<dyn Host> = host;
        let repair = mend(&case, &dynamic, false);
        assert!(repair.changes.is_empty(), "{}: {:?}", case.name(), repair.changes);
        assert_eq!(repair.after.exit_status(), 2, "{}", case.name());
    }
}

#[test]
fn giving_up_takes_consent() {
    let image = Image::new("vhd", "dynamic", 3 * MIB).block(MIB / 2);
    let case = case(&image, "", |f| put(f, 1536, &[0x7f, 0, 0, 0]));
    let host = write_data(&case, &MemoryHost::new());
    (case.damage)(&table_file(&host, &case));
    let dir = common::folder();
    let image = lay(&case, &host, dir.path());
    let before = std::fs::read(&image).unwrap();
    let status = |options: &[&str]| flatdisk_checks(options, &image).status.code();
    assert_eq!(status(&[]), Some(2));
    assert_eq!(status(&["--accept-loss"]), Some(1), "without --repair");
    assert_eq!(status(&["--repair=leaks", "--accept-loss"]), Some(1));
    assert_eq!(status(&["--repair"]), Some(2));
    let dry = flatdisk_checks(&["--repair", "--accept-loss", "--dry-run"], &image);
    assert!(tools::both(&dry).contains("block 0 is given up"), "{}", tools::both(&dry));
    assert!(std::fs::read(&image).unwrap() == before, "changed without consent");
    assert_eq!(status(&["--repair", "--accept-loss"]), Some(0));
    assert_eq!(status(&[]), Some(0));
}

#[test]
fn every_repairable_damage_is_repaired_whatever_interrupts_it() {
    let cases = cases();
    let outcomes = in_parallel(&cases, |case| {
        let run = || run(case);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_ok()
    });
    let failed: Vec<_> =
        cases.iter().zip(outcomes).filter(|(_, ok)| !ok).map(|(case, _)| case.name).collect();
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
fn repairing_leaks_leaves_damage_alone() {
    let image = Image::new("vhd", "dynamic", 3 * MIB).block(MIB / 2);
    let mut case = leak(&image, "", |f| put(f, 0, &[0; 512]));
    case.loses = false;
    let host = write_data(&case, &MemoryHost::new());
    (case.damage)(&table_file(&host, &case));
    let dynamic: Arc<dyn Host> = host.clone();
    let repair = mend(&case, &dynamic, false);
    assert!(repair.changes.is_empty() && repair.after.errors == 1, "{repair:#?}");
}

/// While the directory is lost readers see the redundant tables. What is damaged behind it must not
/// be what they see afterwards.
#[test]
fn a_lost_directory_comes_back_with_the_tables_in_use() {
    let image = Image::new("vmdk", "monolithicSparse", 70 * MIB);
    let case = case(&image, "", |f| {
        let table = place_at(f, directories(f).0);
        let second = get(f, table + 16 * 4, 4);
        put(f, table, &second);
        put(f, 56, &[0xdd; 4])
    });
    let host = write_data(&case, &MemoryHost::new());
    let dynamic: Arc<dyn Host> = host.clone();
    let before = read(&case, &dynamic).unwrap();
    (case.damage)(&table_file(&host, &case));
    let repair = mend(&case, &dynamic, false);
    assert!(read(&case, &dynamic).unwrap() == before, "a repair changed data");
    assert_eq!(repair.after.exit_status(), 0, "{:?}", repair.after.findings);
}

#[test]
fn a_table_that_lies_over_a_grain_is_not_written() {
    let image = Image::new("vmdk", "monolithicSparse", 70 * MIB);
    let case = case(&image, "", |f| {
        let grain = place_at(f, place_at(f, directories(f).0));
        put(f, directories(f).1 + 4, &((grain / 512) as u32).to_le_bytes())
    });
    let host = write_data(&case, &MemoryHost::new());
    let dynamic: Arc<dyn Host> = host.clone();
    let before = read(&case, &dynamic).unwrap();
    (case.damage)(&table_file(&host, &case));
    mend(&case, &dynamic, false);
    assert!(read(&case, &dynamic).unwrap() == before, "a repair wrote a table over a grain");
}

/// Both copies of a directory entry differ, but the one to be written is what a grain holds.
#[test]
fn a_directory_entry_that_lies_over_a_grain_is_not_written() {
    let image = Image::new("vmdk", "monolithicSparse", 70 * MIB);
    let case = case(&image, "", |f| {
        let (directory, redundant) = directories(f);
        for table in [place_at(f, directory), place_at(f, redundant)] {
            put(f, table + 4, &((directory / 512 - 1) as u32).to_le_bytes());
        }
        put(f, directory + 4, &[0xdd; 4])
    });
    let host = write_data(&case, &MemoryHost::new());
    let dynamic: Arc<dyn Host> = host.clone();
    (case.damage)(&table_file(&host, &case));
    let grain = |host: &Arc<dyn Host>| {
        let mut bytes = vec![0; 64 << 10];
        case.open(host, Access::Read).unwrap().read_at(64 << 10, &mut bytes).unwrap();
        bytes
    };
    let before = grain(&dynamic);
    mend(&case, &dynamic, false);
    assert!(grain(&dynamic) == before, "a repair wrote a directory entry over a grain");
}

#[test]
fn a_grain_that_is_cut_off_keeps_what_is_left() {
    let image = Image::new("vmdk", "monolithicSparse", 70 * MIB);
    let case = case(&image, "", |f| {
        let (directory, redundant) = directories(f);
        let grain = place_at(f, place_at(f, directory) + 8 * 4);
        put(f, place_at(f, redundant) + 8 * 4, &[0; 4]);
        f.set_len(grain + 8192).unwrap();
        None
    });
    let host = write_data(&case, &MemoryHost::new());
    let dynamic: Arc<dyn Host> = host.clone();
    (case.damage)(&table_file(&host, &case));
    let mut before = [0; 2048];
    let at = MIB / 2 + 4096;
    case.open(&dynamic, Access::Read).unwrap().read_at(at, &mut before).unwrap();
    assert!(before[..] == pattern::bytes(5, at, 2048));
    mend(&case, &dynamic, false);
    let mut after = [0; 2048];
    case.open(&dynamic, Access::Read).unwrap().read_at(at, &mut after).unwrap();
    assert!(after == before, "a repair dropped the grain");
}

#[test]
fn a_healthy_foreign_image_needs_no_repair() {
    let Some(folder) = corpus::folder() else { return };
    let rows = corpus::rows(&folder);
    let planned = in_parallel(&rows, |row| {
        if row.expected != "opens" {
            return None;
        }
        let unpacked = corpus::unpack(&folder, row);
        let host = HostFs::shared();
        let repair = |path: &Path| {
            let options = OpenOptions::new(Access::Read);
            formats::repair(&host, path, &options, Scope::All, true)
        };
        match repair(&unpacked.image) {
            Ok(repair) if repair.changes.is_empty() => None,
            // Replaying its log is what such an image needs.
            Ok(repair) if repair.before.findings.iter().any(|f| f.what.contains("not closed")) => {
                None
            }
            Ok(repair) => {
                let changes: String = repair.changes.iter().map(|c| format!("\n  {c}")).collect();
                let findings = repair.before.findings.iter();
                let findings: String = findings.map(|f| format!("\n  {}", f.what)).collect();
                Some((repair.before.exit_status(), format!("{}:{findings}{changes}", row.id)))
            }
            Err(e) => Some((0, format!("{}: {e}", row.id))),
        }
    });
    let planned: Vec<_> = planned.into_iter().flatten().collect();
    for (_, text) in &planned {
        println!("{text}");
    }
    let wrong: Vec<_> = planned.iter().filter(|(status, _)| *status == 0).collect();
    assert!(wrong.is_empty(), "{} healthy images", wrong.len());
}
