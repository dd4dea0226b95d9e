//! Searches the stored data of an image for signatures, on all processors; what nothing is stored for is
//! not read.
//!
//! `cargo run --release --example scan` makes an image of its own in a scratch folder.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use flatdisk::disk::layers::Content;
use flatdisk::formats::{self, CreateSpec};
use flatdisk::storage::file::HostFs;
use flatdisk::{Image, OpenOptions};

const SIGNATURES: [(&str, &[u8]); 3] =
    [("JPEG", b"\xff\xd8\xff"), ("PDF", b"%PDF-"), ("PNG", b"\x89PNG\r\n\x1a\n")];
/// Bytes that one thread reads at a time, and how many of the next ones with them, so that no signature is
/// cut in two.
const PIECE: u64 = 1 << 20;
const OVERLAP: u64 = 7;

fn main() {
    if let Err(e) = demonstrate() {
        eprintln!("scan: {e}");
        std::process::exit(1);
    }
}

/// Hides signatures in a large, nearly empty disk and finds them.
pub fn demonstrate() -> Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("disk.vmdk");
    let spec = CreateSpec { size: 1 << 40, ..CreateSpec::default() };
    formats::create(formats::by_name("vmdk")?, &HostFs, &path, &spec)?;
    let image = OpenOptions::default().write(true).open(&path)?;
    for (index, (_, signature)) in SIGNATURES.iter().enumerate() {
        // Across the border of two pieces, too.
        image.disk.write_at(((index as u64 * 300) << 30) + PIECE - 2, signature)?;
    }
    image.disk.flush()?;
    drop(image);

    let found = scan(&flatdisk::open(&path)?)?;
    for (at, name) in &found {
        println!("{at:#014x} {name}");
    }
    assert_eq!(found.len(), SIGNATURES.len());
    Ok(())
}

/// Where which signatures are, in order.
fn scan(image: &Image) -> flatdisk::Result<Vec<(u64, &'static str)>> {
    let mut pieces = Vec::new();
    image.disk.map(0..image.disk.size(), |run| {
        if run.content == Content::Data {
            let end = run.start + run.len;
            pieces
                .extend((run.start..end).step_by(PIECE as usize).map(|at| at..end.min(at + PIECE)));
        }
        Ok(())
    })?;
    let (next, found) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || -> flatdisk::Result<()> {
        let mut buf = Vec::new();
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            let end = image.disk.size().min(piece.end + OVERLAP);
            buf.resize((end - piece.start) as usize, 0);
            image.disk.read_at(piece.start, &mut buf)?;
            for (name, signature) in SIGNATURES {
                let places = buf.windows(signature.len()).enumerate();
                let hits = places.filter(|(at, bytes)| {
                    *bytes == signature && *at < (piece.end - piece.start) as usize
                });
                let hits = hits.map(|(at, _)| (piece.start + at as u64, name));
                found.lock().unwrap_or_else(|e| e.into_inner()).extend(hits);
            }
        }
        Ok(())
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().unwrap_or(Ok(())))
    })?;
    let mut found = found.into_inner().unwrap_or_else(|e| e.into_inner());
    found.sort_unstable();
    Ok(found)
}
