//! Reads and edits sectors of an image, without mounting it.
//!
//! `cargo run --release --example sectors` makes an image of its own in a scratch folder.

use std::io::{Read, Seek, SeekFrom, Write};

use flatdisk::formats::{self, CreateSpec};
use flatdisk::storage::file::HostFs;
use flatdisk::{Cursor, OpenOptions};

/// Bytes per sector.
const SECTOR: u64 = 512;

fn main() {
    if let Err(e) = demonstrate() {
        eprintln!("sectors: {e}");
        std::process::exit(1);
    }
}

/// Writes, reads and clears sectors.
pub fn demonstrate() -> Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("disk.vhdx");
    let spec = CreateSpec { size: 64 << 20, ..CreateSpec::default() };
    formats::create(formats::by_name("vhdx")?, &HostFs, &path, &spec)?;

    // At an offset: any range, from any thread.
    let image = OpenOptions::default().write(true).open(&path)?;
    image.disk.write_at(7 * SECTOR, b"sector seven")?;
    image.disk.write_at(9 * SECTOR, &[0xff; SECTOR as usize])?;
    image.disk.write_zeroes(9 * SECTOR, SECTOR / 2)?;

    // Or as a file of std::io.
    let mut cursor = Cursor::over(image.disk.clone());
    cursor.seek(SeekFrom::Start(8 * SECTOR))?;
    cursor.write_all(b"sector eight")?;
    cursor.flush()?;
    drop((cursor, image));

    let image = flatdisk::open(&path)?;
    let mut sectors = vec![0; 3 * SECTOR as usize];
    let mut cursor = Cursor::over(image.disk.clone());
    cursor.seek(SeekFrom::Start(7 * SECTOR))?;
    cursor.read_exact(&mut sectors)?;
    for (number, sector) in (7..).zip(sectors.chunks(SECTOR as usize)) {
        let zeroes = sector.iter().filter(|byte| **byte == 0).count();
        let text = String::from_utf8_lossy(&sector[..12]);
        println!("sector {number}: {text:?}, {zeroes} zero bytes");
    }
    Ok(())
}
