//! Split images of Virtual PC: `x.vhd`, `x.v01`, `x.v02` and so on are one file, end to end; the footer ends the
//! last of them. The specification does not tell of them. Nothing here makes one.
//!
//! Parts follow as long as none before them ends with a footer. An image that was cut so that its end is in an
//! earlier part leaves empty parts, which do not count for that reason.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::layout::{FOOTER, FOOTER_COOKIE, SHORT_FOOTER};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::Naming;
use crate::formats::places::directory_of;
use crate::storage::joined::Joined;
use crate::storage::{self, Access, Host, Storage};

/// Parts behind the first one.
const MAX_PARTS: u32 = 64;

/// All of the image whose first part is `file`: itself, if it is whole.
pub fn whole(
    host: &Arc<dyn Host>,
    file: Arc<dyn Storage>,
    access: Access,
) -> Result<Arc<dyn Storage>> {
    let path = file.path().to_owned();
    if !has_extension(&path) || ends_with_footer(&*file)? {
        return Ok(file);
    }
    let host = storage::named_in(host, &*file);
    let open =
        |number: u32| match host.open_beneath(&directory_of(&path), &name(&path, number), access) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            part => part.map(Some),
        };
    let mut parts = vec![file];
    for number in 1..=MAX_PARTS {
        let Some(part) = open(number)? else {
            return match open(number + 1)? {
                Some(next) => Err(missing(&path, number, Some(next.path()))),
                // A VHD with a damaged footer is no split one.
                None if number == 1 => Ok(parts.swap_remove(0)),
                None => Err(missing(&path, number, None)),
            };
        };
        let last = ends_with_footer(&*part)?;
        parts.push(part);
        if last {
            let failed = |e| Error::io("join", &e).in_file(&path);
            return Ok(Joined::new(parts).map_err(failed)?);
        }
    }
    Err(Error::unsupported(format!("more than {MAX_PARTS} parts")).in_file(&path))
}

/// Refuses to rework an image that is in several files.
pub fn refuse(host: &Arc<dyn Host>, file: Arc<dyn Storage>) -> Result<Arc<dyn Storage>> {
    let whole = whole(host, file, Access::Peek)?;
    if whole.parts().is_empty() {
        return Ok(whole);
    }
    let what = "a split image is read and written, but not reworked";
    Err(Error::unsupported(what)
        .in_file(whole.path())
        .hint("`flatdisk convert` makes one file of it"))
}

/// What takes part when the image whose first part is `file` gets the name of `new`.
pub fn naming(file: &dyn Storage, new: &Path) -> Result<Naming> {
    let old = file.path();
    if !has_extension(old) || ends_with_footer(file)? {
        return Ok(Naming::default());
    }
    if !has_extension(new) {
        return Err(Error::invalid("an image in several files has a name that ends with .vhd"));
    }
    let dirs = [old, new].map(directory_of);
    let pair = |number| (dirs[0].join(name(old, number)), dirs[1].join(name(new, number)));
    Ok(Naming { notes: (1..=MAX_PARTS).map(pair).collect(), ..Naming::default() })
}

fn has_extension(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("vhd"))
}

/// The name of part `number` of the image at `path`.
fn name(path: &Path, number: u32) -> PathBuf {
    let mut name = OsString::from(path.file_stem().unwrap_or_default());
    name.push(format!(".v{number:02}"));
    name.into()
}

fn missing(path: &Path, number: u32, next: Option<&Path>) -> Error {
    let name = name(path, number);
    let what = match next {
        Some(next) => {
            let next = next.file_name().unwrap_or_default().display().to_string();
            format!("a split image whose part {} is missing; {next} is there", name.display())
        }
        None => format!(
            "a split image whose last part is missing, or damaged: the one before {} has no footer",
            name.display()
        ),
    };
    Error::new(ErrorKind::NotFound, what).in_file(path).hint("all parts lie in one folder")
}

/// Whether a file ends as a whole image does; a damaged footer counts, too.
fn ends_with_footer(file: &dyn Storage) -> Result<bool> {
    let failed = |e| Error::io("read", &e).in_file(file.path());
    let len = file.len().map_err(failed)?;
    let mut bytes = [0; FOOTER as usize];
    let Some(at) = len.checked_sub(FOOTER) else { return Ok(false) };
    file.read_at(at, &mut bytes).map_err(failed)?;
    let short = bytes[(FOOTER - SHORT_FOOTER) as usize..].starts_with(&FOOTER_COOKIE);
    Ok(short || bytes.starts_with(&FOOTER_COOKIE))
}
