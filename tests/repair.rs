//! Every repairable damage is found, shown, and repaired, whatever interrupts the repair.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use common::crash::contents;
use common::history::Sectors;
use common::images::{Image, Kind, offered};
use common::{corpus, in_parallel, number, pattern, seed, tools};
use flatdisk::formats::{self, OpenOptions, Report, Scope};
use flatdisk::storage::crash::{Choice, CrashPoint};
use flatdisk::storage::file::HostFs;
use flatdisk::storage::memory::{MemoryFile, MemoryHost};
use flatdisk::storage::recording::RecordingHost;
use flatdisk::storage::{Access, Host, Storage};

const MIB: u64 = 1 << 20;

/// Damages a file; returns where the check must find it, if it says where.
type Damage = fn(&MemoryFile) -> Option<u64>;

struct Case {
    name: &'static str,
    image: Image,
    damage: Damage,
    scope: Scope,
    /// The image is left open by its writer.
    open: bool,
    /// The damage takes data away by intent; what is left then is what counts.
    loses: bool,
}

fn case(image: &Image, name: &'static str, damage: Damage) -> Case {
    Case { name, image: image.clone(), damage, scope: Scope::All, open: false, loses: false }
}

fn leak(image: &Image, name: &'static str, damage: Damage) -> Case {
    Case { scope: Scope::Leaks, loses: true, ..case(image, name, damage) }
}

fn len(file: &MemoryFile) -> u64 {
    file.len().unwrap()
}

fn get(file: &MemoryFile, at: u64, bytes: usize) -> Vec<u8> {
    let mut buf = vec![0; bytes];
    file.read_at(at, &mut buf).unwrap();
    buf
}

fn put(file: &MemoryFile, at: u64, data: &[u8]) -> Option<u64> {
    file.write_at(at, data).unwrap();
    Some(at)
}

fn number_at(file: &MemoryFile, at: u64) -> u64 {
    u64::from_le_bytes(get(file, at, 8).try_into().unwrap())
}

/// Byte offset that the 32-bit sector number at `at` stands for.
fn place_at(file: &MemoryFile, at: u64) -> u64 {
    u64::from(u32::from_le_bytes(get(file, at, 4).try_into().unwrap())) * 512
}

/// Byte offsets of the grain directory and the redundant one.
fn directories(file: &MemoryFile) -> (u64, u64) {
    (number_at(file, 56) * 512, number_at(file, 48) * 512)
}

/// Byte offset of a VHDX file's BAT.
fn vhdx_bat(file: &MemoryFile) -> u64 {
    let bat = [0x66, 0x77, 0xc2, 0x2d];
    let entry = |i: u64| (192 << 10) + 16 + i * 32;
    let index = (0..2).find(|i| get(file, entry(*i), 4) == bat).unwrap();
    number_at(file, entry(index) + 16)
}

fn cases() -> Vec<Case> {
    let vhd = &Image::new("vhd", "dynamic", 3 * MIB + 512).block(MIB / 2);
    let vhdx = &Image::new("vhdx", "dynamic", 5 * MIB).block(MIB).sector(512);
    let large = &Image::new("vhdx", "dynamic", 9 * MIB).block(2 * MIB).sector(512);
    let vmdk = &Image::new("vmdk", "monolithicSparse", 70 * MIB);
    let cowd = &Image::new("vmdk", "vmfsSparse", 5 * MIB);
    vec![
        case(vhd, "the footer copy is gone", |f| put(f, 0, &[0; 512])),
        case(vhd, "the footer copy is damaged", |f| put(f, 20, &[1]).map(|_| 0)),
        case(vhd, "the footer is damaged", |f| put(f, len(f) - 400, &[1]).map(|at| at - 112)),
        case(vhd, "the footer is cut off", |f| {
            f.set_len(len(f) - 512).unwrap();
            Some(len(f))
        }),
        case(vhd, "garbage follows the footer", |f| put(f, len(f), &[7; 700])),
        leak(vhd, "a block that nothing leads to", |f| {
            let at = u64::from(u32::from_be_bytes(get(f, 1536, 4).try_into().unwrap())) * 512;
            put(f, 1536, &[0xff; 4]);
            // The gap begins where the BAT ends.
            Some(2048.min(at))
        }),
        leak(vhd, "unused space before the footer", |f| {
            let footer = get(f, len(f) - 512, 512);
            let at = len(f) - 512;
            put(f, at, &[5; 800 << 10]);
            put(f, len(f), &footer);
            Some(at)
        }),
        case(vhdx, "the first header is damaged", |f| put(f, 64 << 10, &[0; 512])),
        case(vhdx, "the second header is damaged", |f| {
            put(f, (128 << 10) + 512, &[1]).map(|_| 128 << 10)
        }),
        case(vhdx, "the first region table is damaged", |f| put(f, 192 << 10, &[0; 512])),
        case(vhdx, "the second region table is damaged", |f| {
            put(f, (256 << 10) + 40, &[9]).map(|_| 256 << 10)
        }),
        case(large, "the last block is cut short", |f| {
            f.set_len(len(f) - MIB).map(|()| None).unwrap()
        }),
        case(vhdx, "a block that is not stored names a place", |f| {
            put(f, vhdx_bat(f) + 8 * 3, &(77 * MIB).to_le_bytes()).map(|at| at / 4096 * 4096)
        }),
        Case { open: true, ..case(vhdx, "a log is to be replayed", |_| Some(MIB)) },
        leak(vhdx, "a block that nothing leads to", |f| {
            let at = number_at(f, vhdx_bat(f)) / MIB * MIB;
            put(f, vhdx_bat(f), &[0; 8]);
            Some(at)
        }),
        leak(vhdx, "unused space at the end", |f| put(f, len(f), &[5; 100_000])),
        case(vmdk, "a grain table is gone", |f| {
            put(f, place_at(f, directories(f).0), &[0; 512]).map(|_| place_at(f, directories(f).1))
        }),
        case(vmdk, "a grain table is damaged", |f| {
            put(f, place_at(f, directories(f).0), &[0xff; 512])
        }),
        case(vmdk, "a redundant grain table is damaged", |f| {
            put(f, place_at(f, directories(f).1), &[0xff; 2048])
        }),
        case(vmdk, "a grain directory entry is gone", |f| put(f, directories(f).0, &[0; 4])),
        case(vmdk, "the grain directory is damaged", |f| put(f, directories(f).0, &[0xee; 12])),
        case(vmdk, "the redundant grain directory is damaged", |f| {
            put(f, directories(f).1, &[0xee; 12])
        }),
        case(vmdk, "the header leads to no grain directory", |f| put(f, 56, &[0xdd; 4]).and(None)),
        case(vmdk, "the header leads to no redundant grain directory", |f| {
            put(f, 48, &[0xdd; 4]).and(None)
        }),
        case(vmdk, "the extent was not closed", |f| put(f, 72, &[1]).and(None)),
        leak(vmdk, "a grain that nothing leads to", |f| {
            let (first, second) = (place_at(f, directories(f).0), place_at(f, directories(f).1));
            let at = place_at(f, first);
            put(f, first, &[0; 4]);
            put(f, second, &[0; 4]);
            Some(at)
        }),
        leak(vmdk, "unused space at the end", |f| put(f, len(f), &[5; 100_352])),
        case(cowd, "the header calls used space free", |f| put(f, 28, &[9, 0, 0, 0]).map(|_| 0)),
    ]
    .into_iter()
    .filter(|case| !offered(vec![case.image.clone()]).is_empty())
    .collect()
}

/// The file that holds the tables.
fn table_file(host: &MemoryHost, image: &Image) -> Arc<MemoryFile> {
    let path = image.path();
    let own = host.file(&path).unwrap();
    let delta = host.files().into_iter().find(|f| f.path() != path);
    delta.unwrap_or(own)
}

fn write_data(case: &Case, host: &Arc<MemoryHost>) -> Arc<MemoryHost> {
    case.image.create(host).unwrap();
    let dynamic: Arc<dyn Host> = host.clone();
    let disk = case.image.open(&dynamic, Access::Write).unwrap();
    let size = disk.size();
    for (stamp, at) in [0, MIB, 2 * MIB, size - 2048, MIB / 2 + 4096].into_iter().enumerate() {
        // Blocks end in zeroes, so that the last one can be cut short without losing anything.
        disk.write_at(at, &pattern::bytes(stamp as u32 + 1, at, 2048)).unwrap();
    }
    disk.flush().unwrap();
    if case.open {
        return host.fork();
    }
    disk.close().unwrap();
    host.clone()
}

fn read(image: &Image, host: &Arc<dyn Host>) -> Result<Sectors, String> {
    let disk = image.open(host, Access::Read).map_err(|e| e.to_string())?;
    contents(&disk)
}

fn checked(image: &Image, host: &Arc<dyn Host>) -> Report {
    formats::check(host, &image.path(), &OpenOptions::new(Access::Read)).unwrap()
}

fn mend(case: &Case, host: &Arc<dyn Host>, dry_run: bool) -> formats::Repair {
    let access = if dry_run { Access::Read } else { Access::Write };
    let options = OpenOptions::new(access);
    formats::repair(host, &case.image.path(), &options, case.scope, dry_run).unwrap()
}

fn bytes(host: &MemoryHost) -> Vec<Vec<u8>> {
    host.files().iter().map(|file| file.to_vec()).collect()
}

fn run(case: &Case) {
    let name = format!("{}: {}", case.image.name(), case.name);
    let host = write_data(case, &MemoryHost::new());
    let dynamic: Arc<dyn Host> = host.clone();
    let mut whole = read(&case.image, &dynamic).unwrap();
    let place = (case.damage)(&table_file(&host, &case.image));
    if case.loses {
        whole = read(&case.image, &dynamic).unwrap();
    }
    let readable = read(&case.image, &dynamic).is_ok_and(|found| found == whole);

    let report = checked(&case.image, &dynamic);
    let found = |at: u64| report.findings.iter().any(|f| f.offset == Some(at));
    assert!(!report.findings.is_empty(), "{name}: not found");
    if let Some(at) = place {
        assert!(found(at), "{name}: not found at {at:#x}: {:#x?}", report.findings);
    }
    let expected = if case.scope == Scope::Leaks { 3 } else { report.exit_status() };
    assert_eq!(report.exit_status(), expected, "{name}: {:#x?}", report.findings);

    let before = bytes(&host);
    let dry = mend(case, &dynamic, true);
    assert!(!dry.changes.is_empty(), "{name}: nothing planned for {:#x?}", report.findings);
    assert!(bytes(&host) == before, "{name}: a dry run wrote");

    let recorder = RecordingHost::over(&host);
    let recorded: Arc<dyn Host> = recorder.clone();
    let repair = mend(case, &recorded, false);
    let shown =
        |what: &formats::Repair| what.changes.iter().map(|c| format!("\n{c}")).collect::<String>();
    assert_eq!(repair.after.exit_status(), 0, "{name}: {:#x?}{}", repair.after, shown(&repair));
    assert!(repair.changes.starts_with(&dry.changes), "{name}: the dry run showed something else");
    assert!(read(&case.image, &recorded).unwrap() == whole, "{name}: data changed");

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
            let state: Arc<dyn Host> = point.state(&point.fates(choice));
            let told = || format!("{name}: crash after {}, {choice}{}", point.at(), shown(&repair));
            if readable {
                let found = read(&case.image, &state).unwrap_or_else(|e| panic!("{}: {e}", told()));
                assert!(found == whole, "{}: data lost", told());
            }
            let repair = mend(case, &state, false);
            assert_eq!(repair.after.exit_status(), 0, "{}: {:#x?}", told(), repair.after);
            let found = read(&case.image, &state).unwrap_or_else(|e| panic!("{}: {e}", told()));
            assert!(found == whole, "{}: data lost by the second repair", told());
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
    if case.image.format == "vhd" || subformat == Some("vmfsSparse") || !tools::have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for file in host.files() {
        let to = dir.path().join(file.path().file_name().unwrap());
        std::fs::write(to, file.to_vec()).unwrap();
    }
    let image = dir.path().join(case.image.path().file_name().unwrap());
    let mut check = Command::new("qemu-img");
    let output = tools::output(check.args(["check", "-f", case.image.format]).arg(image));
    assert!(output.status.success(), "{name}: QEMU finds {}", tools::both(&output));
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
    (case.damage)(&table_file(&host, &image));
    let dynamic: Arc<dyn Host> = host.clone();
    let repair = mend(&case, &dynamic, false);
    assert!(repair.changes.is_empty() && repair.after.exit_status() == 2, "{repair:#?}");
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
