//! Another description for an archive, its disks left where they are.
//!
//! # In place
//!
//! A description that fits into the blocks of the old one takes their place, filled up with blanks, which XML
//! allows at its end. The manifest's digests of it are as long as the old ones. So nothing moves, of all headers
//! one size changes, and the disks can be read at every moment. Behind the archive stands meanwhile, where no
//! program looks, what is to be written:
//!
//! ```text
//! members | two empty blocks or more | mark, a block | record
//! mark    "flatdisk redo 1" | 16 the file's old length | 24 the record's length
//! record  of each place: where (8), bytes (8), the bytes | SHA-256 of them all
//! ```
//!
//! Numbers have 8 bytes, the lowest first. Order:
//!
//! 1. the mark, **sync**;
//! 2. the record, **sync**;
//! 3. description, header and manifest, **sync**;
//! 4. the file gets its old length, **sync**.
//!
//! A crash before 2 is over leaves the archive as it was, and something behind it that [`finish`] takes away; one
//! after that a record, with which it does 3 and 4 again. A check says that it has to be done, and whoever repairs the
//! archive or gives it another description does it first.
//!
//! # Anew
//!
//! Where the description does not fit, the archive is written again under a temporary name, the description first and with
//! room for the next one. All other files keep their order. Blocks of the old archive are shared where the host
//! can, and copied where it cannot.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::{has_extension, manifest};
use crate::codec;
use crate::disk::sync_file;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::plan::Steps;
use crate::progress::Progress;
use crate::storage::archive::tar::{self, BLOCK};
use crate::storage::archive::{Archive, Member};
use crate::storage::staged::Staged;
use crate::storage::{Access, Host, SHARED_BLOCK, Storage};

/// Bytes of a description.
const MAX_TEXT: usize = 4 << 20;
/// Bytes of empty blocks at the end, among which a mark is searched for; more are taken for something else.
const MAX_TAIL: u64 = 1 << 20;
/// How a mark begins.
const MARK: &[u8; 16] = b"flatdisk redo 1\n";
/// Empty blocks before it, without which it would be taken for a header.
const GAP: u64 = 2 * BLOCK;
/// Bytes of the digest at the end of a record.
const DIGEST: usize = 32;
/// Bytes of all that a record can hold: description, manifest, a header.
const MAX_RECORD: u64 = 16 << 20;
/// Bytes that a description which is put in anew leaves free for the next.
const ROOM: u64 = 4096;
/// Bytes that are copied at once.
const STEP: u64 = 1 << 20;

/// What was done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Described {
    /// Nothing but the description and its digests was written.
    pub in_place: bool,
    /// Bytes of the archive that were copied.
    pub copied: u64,
    /// Bytes of the archive that are shared with the old one.
    pub shared: u64,
    /// Files that the description names and that are not in the archive.
    pub missing: Vec<String>,
}

/// Bytes that are to be at a place.
type Change = (u64, Vec<u8>);

/// What lies behind the files of an archive.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Tail {
    /// Empty blocks.
    Clean,
    /// A change was begun and no byte of it written; the file was so long.
    Begun(u64),
    /// All of a change, written or not; the file was so long.
    Ready(u64, Vec<Change>),
    /// Something else.
    Foreign(u64),
}

/// The description in the archive at `path`, without blanks at its end.
///
/// # Errors
///
/// The archive cannot be read, or there is none in it.
pub fn description(host: &Arc<dyn Host>, path: &Path) -> Result<Vec<u8>> {
    let archive = Archive::open(host.open(path, Access::Peek)?)?;
    let member = find(&archive)?;
    let mut text = read(&archive, &member)?;
    text.truncate(text.trim_ascii_end().len());
    text.push(b'\n');
    Ok(text)
}

/// Gives the archive at `path` the description `text`. A signed archive is refused; with `unsign` its signature is left
/// out.
///
/// # Errors
///
/// [`ErrorKind::InvalidInput`] for what is no description and for a signed archive; the archive is in use or damaged.
/// It is as it was then.
pub fn describe(
    host: &Arc<dyn Host>,
    path: &Path,
    text: &[u8],
    unsign: bool,
    progress: &dyn Progress,
) -> Result<Described> {
    let text = plain(text).map_err(|e| e.in_file(path))?;
    let file = host.open(path, Access::Write)?;
    finish(&file)?;
    let archive = Archive::open(file.clone())?;
    let member = find(&archive)?;
    let len = file.len().map_err(|e| Error::io("asking for the size", &e).in_file(path))?;
    if let Some(cut) = archive.members().iter().find(|member| member.at + member.size > len) {
        let what = "the archive ends before this file of it does";
        return Err(Error::corrupt(what).in_file(&path.join(&cut.name)).at(cut.at));
    }
    if let Tail::Foreign(at) = tail(&archive)? {
        let what = "something lies behind the end of the archive, and would be lost";
        return Err(Error::unsupported(what).in_file(path).at(at));
    }
    let signed = archive.members().iter().any(is_signature);
    if signed && !unsign {
        let what = "the archive is signed (.cert), and the signature is one of the old description";
        return Err(Error::invalid(what).in_file(path).hint("--force leaves the signature out"));
    }
    let missing = missing(&archive, &text);
    let alone = member.begins + BLOCK == member.at;
    // With records before its header one of those may tell the size, too.
    let room = if alone { member.ends() - member.at } else { member.size };
    if !signed && text.len() as u64 <= room {
        let text = filled(text, room);
        let mut changes = manifest_changes(&archive, &member, &text)?;
        if room != member.size {
            changes.push((member.at - BLOCK, resized(&archive, &member, room)?.to_vec()));
        }
        changes.push((member.at, text));
        // Where the description is the last file, its block need not be there as a whole.
        write_in_place(&file, len.max(archive.end()), &changes)?;
        return Ok(Described { in_place: true, missing, ..Described::default() });
    }
    let done = write_anew(host, &archive, &member, text, progress)?;
    Ok(Described { missing, ..done })
}

/// Brings a change to its end that was interrupted.
pub(super) fn finish(file: &Arc<dyn Storage>) -> Result<()> {
    finishing(file)?.carry_out(&())
}

/// What is to be done to bring a change to its end that was interrupted.
pub(super) fn finishing(file: &Arc<dyn Storage>) -> Result<Steps> {
    let mut steps = Steps::new();
    match tail(&*Archive::open(file.clone())?)? {
        Tail::Clean | Tail::Foreign(_) => {}
        Tail::Begun(len) => steps.set_len(file, len, "what an interrupted change left"),
        Tail::Ready(len, changes) => put_in(&mut steps, file, len, changes),
    }
    Ok(steps)
}

/// The third and the fourth step.
fn put_in(steps: &mut Steps, file: &Arc<dyn Storage>, len: u64, changes: Vec<Change>) {
    for (at, bytes) in changes {
        steps.write(file, at, bytes, "the description of the machine, or its digest");
    }
    steps.sync(file);
    steps.set_len(file, len, "the record of the change");
}

/// All four steps.
fn write_in_place(file: &Arc<dyn Storage>, len: u64, changes: &[Change]) -> Result<()> {
    let mut record = Vec::new();
    for (at, bytes) in changes {
        record.extend(at.to_le_bytes());
        record.extend((bytes.len() as u64).to_le_bytes());
        record.extend(bytes);
    }
    record.extend(Sha256::digest(&record));
    let mark_at = len.next_multiple_of(BLOCK) + GAP;
    let mut mark = MARK.to_vec();
    mark.extend(len.to_le_bytes());
    mark.extend((record.len() as u64).to_le_bytes());
    mark.resize(BLOCK as usize, 0);
    let recorded = codec::write_all(&**file, mark_at, &mark, "the record of the change")
        .and_then(|()| sync_file(&**file))
        .and_then(|()| codec::write_all(&**file, mark_at + BLOCK, &record, "the record"))
        .and_then(|()| sync_file(&**file));
    if let Err(e) = recorded {
        // Nothing has changed yet; what is left of the record, the next change or a repair takes away.
        let _ = file.set_len(len).and_then(|()| file.sync());
        return Err(e);
    }
    let mut steps = Steps::new();
    put_in(&mut steps, file, len, changes.to_vec());
    steps.carry_out(&())
}

/// Looks at what lies behind the files of an archive.
pub(super) fn tail(archive: &Archive) -> Result<Tail> {
    let file = archive.file();
    let failed = |e: std::io::Error| Error::io("read", &e).in_file(file.path());
    let (from, len) = (archive.end(), file.len().map_err(failed)?);
    // The last file need not be filled up to a whole block.
    let Some(behind) = len.checked_sub(from) else { return Ok(Tail::Clean) };
    let mut bytes = vec![0; behind.min(MAX_TAIL + 2 * GAP) as usize];
    file.read_at(from, &mut bytes).map_err(failed)?;
    let Some(first) = bytes.iter().position(|byte| *byte != 0) else {
        let more = behind > MAX_TAIL;
        return Ok(if more { Tail::Foreign(from + MAX_TAIL) } else { Tail::Clean });
    };
    let at = from + first as u64;
    let mark = &bytes[first..];
    let number = |mark: &[u8], at: usize| {
        mark.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes)
    };
    let (Some(old), Some(size)) = (number(mark, 16), number(mark, 24)) else {
        return Ok(Tail::Foreign(at));
    };
    let place = old.checked_next_multiple_of(BLOCK).and_then(|end| end.checked_add(GAP));
    if !mark.starts_with(MARK) || place != Some(at) || at < from + GAP || size > MAX_RECORD {
        return Ok(Tail::Foreign(at));
    }
    let mut record = vec![0; size as usize];
    let whole = (at + BLOCK).checked_add(size).is_some_and(|end| end <= len);
    if whole {
        file.read_at(at + BLOCK, &mut record).map_err(failed)?;
    }
    let Some((mut rest, digest)) = record.split_last_chunk::<DIGEST>().filter(|_| whole) else {
        return Ok(Tail::Begun(old));
    };
    if Sha256::digest(rest)[..] != digest[..] {
        return Ok(Tail::Begun(old));
    }
    let mut changes = Vec::new();
    while let (Some(at), Some(size)) = (number(rest, 0), number(rest, 8)) {
        let bytes = usize::try_from(size).ok().and_then(|size| rest[16..].get(..size));
        let inside = at.checked_add(size).is_some_and(|end| end <= from);
        let Some(bytes) = bytes.filter(|_| inside) else { return Ok(Tail::Foreign(at)) };
        changes.push((at, bytes.to_vec()));
        rest = &rest[16 + bytes.len()..];
    }
    Ok(Tail::Ready(old, changes))
}

/// Writes the archive again, with `text` as its description and without a signature.
fn write_anew(
    host: &Arc<dyn Host>,
    archive: &Arc<Archive>,
    member: &Member,
    text: Vec<u8>,
    progress: &dyn Progress,
) -> Result<Described> {
    let old = archive.file();
    let path = old.path();
    let len = old.len().map_err(|e| Error::io("asking for the size", &e).in_file(path))?;
    let mut kept: Vec<_> = std::iter::once(0..archive.end().min(len)).collect();
    let signatures = archive.members().iter().filter(|member| is_signature(member));
    for gone in signatures.chain([member]) {
        kept =
            kept.into_iter().flat_map(|range| without(range, gone.begins..gone.ends())).collect();
    }
    let headers = member.at - member.begins;
    // The first file, and where the next ones begin; the largest part of them can be shared.
    let mut room = (text.len() as u64 + ROOM).next_multiple_of(BLOCK);
    let shift = |room: u64| {
        let largest = kept.iter().max_by_key(|range| range.end - range.start)?;
        let before = kept.iter().take_while(|range| range.start < largest.start);
        let before: u64 = before.map(|range| range.end - range.start).sum();
        Some((headers + room + before).wrapping_sub(largest.start))
    };
    while shift(room).is_some_and(|shift| !shift.is_multiple_of(SHARED_BLOCK)) {
        room += BLOCK;
    }
    let text = filled(text, room);
    let changes = manifest_changes(archive, member, &text)?;
    let mut head = vec![0; headers as usize];
    codec::read_exact(&**old, member.begins, &mut head, "a header")?;
    head.truncate(head.len() - BLOCK as usize);
    head.extend(resized(archive, member, room)?);
    head.extend(text);

    let staged = Staged::new(host.clone(), path, true)?;
    let explained = |e: Error| staged.explain(e);
    let new = staged.create(path)?;
    let all: u64 = kept.iter().map(|range| range.end - range.start).sum();
    let len = (head.len() as u64 + all).next_multiple_of(BLOCK) + GAP;
    new.set_len(len).map_err(|e| explained(Error::io("extend", &e).in_file(new.path())))?;
    codec::write_all(&*new, 0, &head, "the description").map_err(explained)?;
    progress.total(all);
    let mut done = Described::default();
    let mut to = head.len() as u64;
    for range in kept {
        let shared = take_over(&*new, to, &**old, range.clone(), progress).map_err(explained)?;
        let len = range.end - range.start;
        done.shared += shared;
        done.copied += len - shared;
        for (at, bytes) in changes.iter().filter(|(at, _)| range.contains(at)) {
            codec::write_all(&*new, to + (at - range.start), bytes, "the manifest")
                .map_err(explained)?;
        }
        to += len;
    }
    let written = Archive::open(new.clone()).map_err(explained)?;
    agree(archive, member, &written)?;
    sync_file(&*new).map_err(explained)?;
    staged.dress(path, path).map_err(explained)?;
    staged.commit()?;
    Ok(done)
}

/// Makes sure that what was written has the same files.
fn agree(old: &Archive, member: &Member, new: &Archive) -> Result<()> {
    let files = |archive: &Archive| {
        let others = archive.members().iter();
        let others = others.filter(|other| other.name != member.name && !is_signature(other));
        others.map(|other| (other.name.clone(), other.size)).collect::<Vec<(PathBuf, u64)>>()
    };
    let first = new.members().first().is_some_and(|first| first.name == member.name);
    if first && files(old) == files(new) {
        return Ok(());
    }
    let what = "the headers of its files do not allow another description";
    Err(Error::unsupported(what).in_file(old.file().path()).hint("unpack it, and pack it again"))
}

/// Puts a range of one file to a place of another, whose length is set; returns how much of it is shared.
fn take_over(
    new: &dyn Storage,
    to: u64,
    old: &dyn Storage,
    range: Range<u64>,
    progress: &dyn Progress,
) -> Result<u64> {
    let copy = |from: Range<u64>| {
        let mut bytes = vec![0; STEP.min(from.end - from.start) as usize];
        for at in from.clone().step_by(STEP as usize) {
            progress.go_on()?;
            let piece = &mut bytes[..STEP.min(from.end - at) as usize];
            codec::read_exact(old, at, piece, "a file of the archive")?;
            if piece.iter().any(|byte| *byte != 0) {
                codec::write_all(new, to + (at - range.start), piece, "a file of the archive")?;
            }
            progress.advance(piece.len() as u64);
        }
        Ok(())
    };
    let inner = range.start.next_multiple_of(SHARED_BLOCK)..range.end / SHARED_BLOCK * SHARED_BLOCK;
    let aligned = to.wrapping_sub(range.start).is_multiple_of(SHARED_BLOCK);
    if aligned && inner.start < inner.end {
        let (at, len) = (to + (inner.start - range.start), inner.end - inner.start);
        let shared = new.share_from(at, old, inner.start, len);
        if shared.map_err(|e| Error::io("sharing blocks", &e).in_file(new.path()).at(at))? {
            progress.advance(len);
            copy(range.start..inner.start)?;
            copy(inner.end..range.end)?;
            return Ok(len);
        }
    }
    copy(range.clone())?;
    Ok(0)
}

/// What is left of a range without another.
fn without(range: Range<u64>, gone: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let before = range.start..range.end.min(gone.start);
    let after = range.start.max(gone.end)..range.end;
    [before, after].into_iter().filter(|range| range.start < range.end)
}

fn is_signature(member: &Member) -> bool {
    has_extension(&member.name, "cert")
}

/// The description's place.
fn find(archive: &Archive) -> Result<Member> {
    let mut found = archive.members().iter().filter(|member| has_extension(&member.name, "ovf"));
    let path = archive.file().path();
    match (found.next(), found.next()) {
        (Some(member), None) => Ok(member.clone()),
        (None, _) => {
            let what = "no description of a machine (.ovf) is in the archive";
            Err(Error::new(ErrorKind::NotFound, what).in_file(path))
        }
        (Some(_), Some(_)) => {
            let what = "more than one description of a machine (.ovf) is in the archive";
            Err(Error::unsupported(what).in_file(path))
        }
    }
}

/// The contents of a small file.
fn read(archive: &Arc<Archive>, member: &Member) -> Result<Vec<u8>> {
    let file = archive.member(&member.name)?;
    if member.size > MAX_TEXT as u64 {
        let what = format!("a text of {} bytes", member.size);
        return Err(Error::unsupported(what).in_file(file.path()));
    }
    let mut text = vec![0; member.size as usize];
    codec::read_exact(&*file, 0, &mut text, "a text")?;
    Ok(text)
}

/// A description without blanks at its end.
fn plain(text: &[u8]) -> Result<Vec<u8>> {
    let text = text.trim_ascii_end();
    if text.contains(&0) {
        let hint = "`iconv -t UTF-8` makes it that";
        return Err(Error::invalid("a description is taken in UTF-8 only").hint(hint));
    }
    let begin = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text).trim_ascii_start();
    let envelope = text.windows(8).any(|word| word == b"Envelope");
    if !begin.starts_with(b"<") || !envelope || text.len() >= MAX_TEXT {
        let what = "the new description is none: no XML with an Envelope, or too long";
        return Err(Error::invalid(what));
    }
    Ok([text, b"\n"].concat())
}

/// A description that fills its place.
fn filled(mut text: Vec<u8>, room: u64) -> Vec<u8> {
    text.resize(room as usize, b' ');
    text
}

/// The member's header with another size.
fn resized(archive: &Archive, member: &Member, size: u64) -> Result<[u8; BLOCK as usize]> {
    let header = codec::read_array(&**archive.file(), member.at - BLOCK, "a header")?;
    Ok(tar::resized(header, size))
}

/// What changes in the manifest when the description is `text`.
fn manifest_changes(archive: &Arc<Archive>, member: &Member, text: &[u8]) -> Result<Vec<Change>> {
    let Some(manifest) = manifest::find(archive) else { return Ok(Vec::new()) };
    let old = read(archive, manifest)?;
    let new = manifest::with_digest(&old, &member.name, text)
        .map_err(|e| e.in_file(&archive.file().path().join(&manifest.name)))?;
    Ok(if new == old { Vec::new() } else { vec![(manifest.at, new)] })
}

/// Files that a description names and that are not in the archive.
fn missing(archive: &Archive, text: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(text);
    let names = text.split("href=").skip(1).filter_map(|rest| {
        let quote = rest.chars().next().filter(|c| matches!(c, '"' | '\''))?;
        rest[1..].split(quote).next()
    });
    let there = |name: &str| {
        let chunks = format!("{name}.000000000");
        let mut members = archive.members().iter();
        members.any(|member| member.name == Path::new(name) || member.name == Path::new(&chunks))
    };
    // Others are escaped, or lie elsewhere.
    let plain = names.filter(|name| !name.contains(['&', '%', ':']));
    plain.filter(|name| !there(name)).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryFile;

    fn archive(parts: &[(&str, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (name, contents) in parts {
            bytes.extend(tar::encode(name, contents.len() as u64, 0).unwrap());
            bytes.extend(*contents);
            bytes.resize(bytes.len().next_multiple_of(BLOCK as usize), 0);
        }
        bytes.resize(bytes.len() + GAP as usize, 0);
        bytes
    }

    fn tail_of(bytes: &[u8]) -> Tail {
        tail(&Archive::open(MemoryFile::new("/x.ova", bytes)).unwrap()).unwrap()
    }

    #[test]
    fn what_is_no_description_is_refused() {
        for text in [&b""[..], b"\0<\0Envelope", b"Envelope", b"<x/>", b" \n"] {
            assert!(plain(text).is_err(), "{text:?}");
        }
        assert_eq!(plain(b"\xef\xbb\xbf <Envelope/> \n\n").unwrap(), b"\xef\xbb\xbf <Envelope/>\n");
    }

    #[test]
    fn whatever_lies_behind_an_archive_is_told_and_bounded() {
        let bytes = archive(&[("x.ovf", b"<Envelope/>")]);
        assert_eq!(tail_of(&bytes), Tail::Clean);
        let len = bytes.len() as u64;
        let mark = |old: u64, size: u64| {
            let mut marked = bytes.clone();
            marked.resize(len.next_multiple_of(BLOCK) as usize + GAP as usize, 0);
            marked.extend(MARK);
            marked.extend(old.to_le_bytes());
            marked.extend(size.to_le_bytes());
            marked.resize(marked.len().next_multiple_of(BLOCK as usize), 0);
            marked
        };
        assert_eq!(tail_of(&mark(len, 100)), Tail::Begun(len));
        let at = len + GAP;
        for (old, size) in [(0, 100), (u64::MAX, 1), (len + BLOCK, 1), (len, u64::MAX)] {
            assert_eq!(tail_of(&mark(old, size)), Tail::Foreign(at), "{old} {size}");
        }
        // A record that is right in itself and leads out of the archive.
        for (to, size) in [(len, 1), (u64::MAX, 1), (0, u64::MAX), (0, 9)] {
            let mut record = Vec::new();
            record.extend(u64::to_le_bytes(to));
            record.extend(u64::to_le_bytes(size));
            record.push(7);
            record.extend(Sha256::digest(&record));
            let bytes = [mark(len, record.len() as u64), record].concat();
            assert_eq!(tail_of(&bytes), Tail::Foreign(to), "{to} {size}");
        }
        let mut other = bytes.clone();
        other.extend(b"what is this");
        assert_eq!(tail_of(&other), Tail::Foreign(len));
    }
}
