//! The manifest: lines `SHA256(name)= hex digits`, DSP0243 section 5.1. Blanks are anywhere, by the program
//! that wrote it. Each file is read once for each kind of digest that a line has for it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use sha1::Sha1;
use sha2::digest::DynDigest;
use sha2::{Sha256, Sha512};

use super::has_extension;
use crate::codec::hex;
use crate::error::{Error, Result};
use crate::formats::{Report, Severity};
use crate::progress::Progress;
use crate::storage::Storage;
use crate::storage::archive::{Archive, Member};

/// Bytes of a manifest that is read.
const MAX_LEN: u64 = 4 << 20;
/// Bytes that are read at once.
const STEP: u64 = 1 << 20;

/// One line.
#[derive(Debug, PartialEq, Eq)]
struct Line<'a> {
    algorithm: String,
    name: &'a str,
    digest: String,
}

fn parse(line: &str) -> Option<Line<'_>> {
    let (algorithm, rest) = line.split_once('(')?;
    let (name, digest) = rest.rsplit_once(')')?;
    let digest = digest.trim().strip_prefix('=')?.trim().to_ascii_lowercase();
    let algorithm = algorithm.trim().to_ascii_uppercase().replace('-', "");
    Some(Line { algorithm, name: name.trim(), digest })
}

fn hasher(algorithm: &str) -> Option<Box<dyn DynDigest>> {
    match algorithm {
        "SHA1" => Some(Box::new(Sha1::default())),
        "SHA256" => Some(Box::new(Sha256::default())),
        "SHA512" => Some(Box::new(Sha512::default())),
        _ => None,
    }
}

/// The manifest of an archive.
pub(super) fn find(archive: &Archive) -> Option<&Member> {
    archive.members().iter().find(|member| has_extension(&member.name, "mf"))
}

/// The manifest `text` with digests of `contents` for the file called `name`, as long as it was.
pub(super) fn with_digest(text: &[u8], name: &Path, contents: &[u8]) -> Result<Vec<u8>> {
    let mut new = Vec::new();
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        let words = std::str::from_utf8(line).ok().filter(|words| !words.trim().is_empty());
        let Some(told) = words.and_then(parse).filter(|told| Path::new(told.name) == name) else {
            new.extend(line);
            continue;
        };
        let Some(mut hasher) = hasher(&told.algorithm) else {
            let what =
                format!("its digest of the description is of a kind not known, {}", told.algorithm);
            return Err(Error::unsupported(what));
        };
        hasher.update(contents);
        let digest = hex(&hasher.finalize());
        let at = line.iter().rposition(|byte| *byte == b'=').map_or(0, |at| at + 1);
        let at = at + line[at..].iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        if told.digest.len() != digest.len() {
            return Err(Error::corrupt("its digest of the description is of a wrong length"));
        }
        new.extend(&line[..at]);
        new.extend(digest.as_bytes());
        new.extend(&line[at + digest.len()..]);
    }
    Ok(new)
}

/// Compares all files of an archive with what its manifest says.
pub(super) fn check(
    archive: &Arc<Archive>,
    report: &mut Report,
    progress: &dyn Progress,
) -> Result<()> {
    let members = archive.members();
    let Some(manifest) = find(archive) else {
        report.add(
            Severity::Notice,
            None,
            "no manifest (.mf) is in it: nothing tells whether it is whole",
        );
        problems(archive, report);
        return Ok(());
    };
    let file = archive.member(&manifest.name)?;
    let path = file.path().to_owned();
    if manifest.size > MAX_LEN {
        let what = format!("a manifest of {} bytes", manifest.size);
        report.add_in(Some(path), Severity::Error, None, what);
        return Ok(());
    }
    let mut text = vec![0; manifest.size as usize];
    file.read_at(0, &mut text).map_err(|e| Error::io("read", &e).in_file(&path))?;
    let text = String::from_utf8_lossy(&text);
    let mut told = HashMap::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let Some(line) = parse(line) else {
            report.add_in(Some(path.clone()), Severity::Error, None, "a line without a digest");
            continue;
        };
        let key = (line.algorithm.clone(), line.name);
        if told.get(&key) != Some(&line.digest) {
            told.insert(key, line.digest);
        }
    }
    let named: std::collections::HashSet<_> =
        told.keys().map(|(_, name)| Path::new(*name)).collect();
    for member in members.iter() {
        let own = has_extension(&member.name, "mf") || has_extension(&member.name, "cert");
        if !own && !named.contains(&*member.name) {
            let file = archive.file().path().join(&member.name);
            report.add_in(Some(file), Severity::Notice, None, "the manifest has no digest of it");
        }
    }
    problems(archive, report);
    let sizes = named.iter().filter_map(|name| members.iter().find(|m| m.name == **name));
    progress.total(sizes.map(|member| member.size).sum());
    let mut told: Vec<_> = told.into_iter().collect();
    told.sort();
    for ((algorithm, name), digest) in told {
        verify(archive, &algorithm, Path::new(name), &digest, report, progress)?;
    }
    Ok(())
}

/// Adds the files that cannot be read in place.
fn problems(archive: &Archive, report: &mut Report) {
    for member in archive.members().iter() {
        if let Some(problem) = member.problem {
            let file = archive.file().path().join(&member.name);
            report.add_in(Some(file), Severity::Error, Some(member.at), problem);
        }
    }
}

fn verify(
    archive: &Arc<Archive>,
    algorithm: &str,
    name: &Path,
    digest: &str,
    report: &mut Report,
    progress: &dyn Progress,
) -> Result<()> {
    let path = archive.file().path().join(name);
    let Some(mut hasher) = hasher(algorithm) else {
        let what = format!("its digest in the manifest is of an unknown kind, {algorithm}");
        report.add_in(Some(path), Severity::Notice, None, what);
        return Ok(());
    };
    let members = archive.members();
    let Some(member) = members.iter().rfind(|member| member.name == name) else {
        let what = "the manifest has a digest of it, but it is not in the archive";
        report.add_in(Some(path), Severity::Error, None, what);
        return Ok(());
    };
    // Said already.
    if member.problem.is_some() {
        return Ok(());
    }
    let file = archive.member(name)?;
    let mut at = 0;
    let mut bytes = vec![0; STEP.min(member.size) as usize];
    while at < member.size {
        progress.go_on()?;
        let part = &mut bytes[..STEP.min(member.size - at) as usize];
        file.read_at(at, part).map_err(|e| Error::io("read", &e).in_file(&path).at(at))?;
        hasher.update(part);
        at += part.len() as u64;
        progress.advance(part.len() as u64);
    }
    let found = hex(&hasher.finalize());
    if found != digest {
        let what = format!(
            "{algorithm} is {found}, by the manifest {digest}: the file was changed or is damaged"
        );
        report.add_in(Some(path), Severity::Error, None, what);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_every_program_are_read() {
        let wanted = |name| Line { algorithm: "SHA256".into(), name, digest: "0aff".into() };
        for line in
            ["SHA256(a b.vmdk)= 0aff", "SHA256 (a b.vmdk) = 0AFF", "sha-256( a b.vmdk )=0aff"]
        {
            assert_eq!(parse(line), Some(wanted("a b.vmdk")), "{line}");
        }
        assert_eq!(parse("SHA256(a(1).vmdk)= 0aff"), Some(wanted("a(1).vmdk")));
        for line in ["", "SHA256", "SHA256(a", "SHA256(a) 0aff", ")("] {
            assert_eq!(parse(line), None, "{line}");
        }
    }

    #[test]
    fn a_digest_changes_in_its_line_alone() {
        let old =
            format!("SHA1(a.ovf)= {}\r\n\nSHA1 (b.vmdk) = {}\n", "AB".repeat(20), "0".repeat(40));
        let new = with_digest(old.as_bytes(), Path::new("a.ovf"), b"abc").unwrap();
        let wanted = old.replace(&"AB".repeat(20), "a9993e364706816aba3e25717850c26c9cd0d89d");
        assert_eq!(String::from_utf8(new).unwrap(), wanted);
        for line in ["SHA1(a.ovf)= 00", "MD5(a.ovf)= 00"] {
            assert!(with_digest(line.as_bytes(), Path::new("a.ovf"), b"abc").is_err(), "{line}");
        }
    }
}
