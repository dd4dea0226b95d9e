//! `map --draw` and `map --svg`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod live;

use std::fs;
use std::process::Stdio;

use flatdisk::disk::picture::{Cell, Picture};
use flatdisk::formats::{self, CreateSpec, OpenOptions};
use flatdisk::storage::Access;
use flatdisk::storage::file::HostFs;
use live::{flatdisk, outcome, scratch, succeed};

const MIB: u64 = 1 << 20;

#[test]
fn cells_tell_what_is_where_and_where_it_came_from() {
    let dir = scratch();
    let path = dir.path().join("a.vhdx");
    let format = formats::by_name("vhdx").unwrap();
    let spec = CreateSpec { size: 64 * MIB, block_size: Some(MIB), ..CreateSpec::default() };
    let host = HostFs::shared();
    formats::create(format, &*host, &path, &spec).unwrap();
    let disk = formats::open(&host, &path, &OpenOptions::new(Access::Write)).unwrap().disk;
    // In the file the second one comes first.
    disk.write_at(40 * MIB, &[1; MIB as usize]).unwrap();
    disk.write_at(8 * MIB, &[1; MIB as usize]).unwrap();
    disk.flush().unwrap();
    let picture = Picture::of(&disk, 16).unwrap();
    assert_eq!((picture.cell, picture.disk.len()), (4 * MIB, 16));
    assert_eq!(picture.disk[0], Cell { absent: 4 * MIB, ..Cell::default() });
    for cell in [2, 10] {
        assert_eq!(picture.disk[cell], Cell { data: MIB, absent: 3 * MIB, ..Cell::default() });
    }
    assert_eq!(picture.files.iter().map(|cell| cell.data).sum::<u64>(), 2 * MIB);
    let held: Vec<_> = picture.files.iter().filter(|cell| cell.data > 0).collect();
    assert!(held[0].from > held[held.len() - 1].from, "{held:?}");
}

#[test]
fn an_image_is_drawn_on_the_terminal_and_to_a_file() {
    let dir = scratch();
    let [base, child, svg] = ["a<&.vhdx", "b.vhdx", "a.svg"].map(|name| dir.path().join(name));
    succeed(flatdisk().args(["create", "-q"]).arg(&base).arg("64M"));
    succeed(
        flatdisk().args(["write", "--fill", "1", "--length", "4M"]).arg(&base).stdin(Stdio::null()),
    );
    succeed(flatdisk().args(["create", "-q", "--parent"]).args([&base, &child]));
    succeed(
        flatdisk()
            .args(["write", "--fill", "1", "--offset", "60M", "--length", "4M"])
            .arg(&child)
            .stdin(Stdio::null()),
    );
    let drawn = succeed(flatdisk().args(["map", "--draw"]).arg(&child));
    let lines: Vec<_> = drawn.lines().collect();
    assert!(lines[0].contains("64 MiB") && lines[0].contains("2 MiB a cell"), "{drawn}");
    let cells = lines[1].trim().rsplit(' ').next().unwrap();
    assert_eq!(cells, format!("pp{}██", "·".repeat(28)), "{drawn}");
    // A file that is there is replaced; names cannot break out of the text.
    fs::write(&svg, "old").unwrap();
    succeed(flatdisk().args(["map", "--svg"]).args([&svg, &base]));
    let picture = fs::read_to_string(&svg).unwrap();
    assert!(picture.starts_with("<svg") && picture.ends_with("</svg>\n"), "{picture}");
    assert!(picture.contains("a&lt;&amp;.vhdx") && picture.contains("hsl(0,"), "{picture}");
    // Which is not what a program reads.
    let refused = outcome(flatdisk().args(["map", "--draw", "--json"]).arg(&base));
    assert!(!refused.status.success());
}
