//! The gate for files that an image names: extents and parents.
//!
//! Names in an image come from strangers. A name is taken apart here, never resolved by the host: it
//! must be relative, without `..` unless the caller allows climbing inside permitted directories,
//! and free of anything that means another machine, a device or a protocol. Opening then goes
//! through [`Host::open_beneath`](crate::storage::Host::open_beneath), which follows no symlink and
//! opens regular files only.
//!
//! The other way round, [`rooted`], [`way`] and [`backslashed`] are what names are written with.

use std::path::{Component, Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

/// Longest name accepted, in bytes.
const MAX_NAME: usize = 4096;

/// Turns an extent name written in an image into a path beneath the image's directory.
///
/// Backslashes count as separators. Absolute names, drive letters, UNC names, URLs, `..`, empty
/// names and control characters are refused.
pub fn beneath(name: &str) -> Result<PathBuf> {
    let refuse = |why: &str| {
        Err(Error::new(ErrorKind::Denied, format!("the image names a file `{name}` {why}"))
            .hint("only files beside the image are opened"))
    };
    if name.is_empty() || name.len() > MAX_NAME {
        return refuse("whose length is not allowed");
    }
    if name.chars().any(char::is_control) {
        return refuse("with control characters");
    }
    let unified = name.replace('\\', "/");
    if unified.starts_with('/') {
        return refuse("by an absolute path");
    }
    if unified.contains("://") {
        return refuse("by a URL");
    }
    let first = unified.split('/').next().unwrap_or_default();
    if first.len() == 2 && first.ends_with(':') && first.as_bytes()[0].is_ascii_alphabetic() {
        return refuse("on a drive letter");
    }
    let mut path = PathBuf::new();
    for part in unified.split('/') {
        match part {
            "" | "." => {}
            ".." => return refuse("outside its own directory"),
            part => path.push(part),
        }
    }
    if path.as_os_str().is_empty() { refuse("that is a directory") } else { Ok(path) }
}

/// The last component of a name written in an image, whatever its form: the usual place of a parent
/// that moved together with its child.
pub fn last_component(name: &str) -> Option<PathBuf> {
    let last = name.rsplit(['/', '\\']).find(|part| !part.is_empty())?;
    beneath(last).ok()
}

/// The last component of a path on another machine, or in another folder, under which the file may lie
/// beside the image now. `None` for what never was a path of a file.
pub fn moved(name: &str) -> Option<PathBuf> {
    let path = name.len() <= MAX_NAME && !name.contains("://") && !name.ends_with(['/', '\\']);
    (path && !name.chars().any(char::is_control)).then(|| last_component(name)).flatten()
}

/// Resolves a relative name with `..` against `dir` by text alone, for checking against a list of
/// permitted directories. `None` for forms that are never allowed.
pub fn climb(dir: &Path, name: &str) -> Option<PathBuf> {
    if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
        return None;
    }
    let unified = name.replace('\\', "/");
    if unified.starts_with("//") || unified.contains("://") || unified.contains(':') {
        return None;
    }
    let mut path = dir.to_owned();
    for component in Path::new(&unified).components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::CurDir => {}
            Component::ParentDir => {
                if !path.pop() {
                    return None;
                }
            }
            Component::RootDir => path = PathBuf::from("/"),
            Component::Prefix(_) => return None,
        }
    }
    Some(path)
}

/// A directory without symlinks, as far as the host can tell, for comparing by text.
pub fn resolved(dir: &Path) -> PathBuf {
    std::fs::canonicalize(dir).or_else(|_| std::path::absolute(dir)).unwrap_or(dir.to_owned())
}

/// A file's path from the root on, through no symlink: only so does `..` lead where its text says.
pub fn rooted(file: &Path) -> PathBuf {
    let file = std::path::absolute(file).unwrap_or(file.to_owned());
    match (file.parent(), file.file_name()) {
        (Some(dir), Some(name)) => resolved(dir).join(name),
        _ => file,
    }
}

/// The way from the directory of file `from` to file `to`, both [`rooted`]. It begins with `.` or `..`.
pub fn way(from: &Path, to: &Path) -> PathBuf {
    let dir: Vec<_> = from.parent().into_iter().flat_map(Path::components).collect();
    let common = dir.iter().zip(to.components()).take_while(|(a, b)| **a == *b).count();
    let climb = match dir.len() - common {
        0 => vec![Component::CurDir],
        up => vec![Component::ParentDir; up],
    };
    climb.into_iter().chain(to.components().skip(common)).collect()
}

/// A path as Windows writes it.
pub fn backslashed(path: &Path) -> Result<String> {
    match path.to_str() {
        Some(text) if !text.contains('\\') && !text.chars().any(char::is_control) => {
            Ok(text.replace('/', "\\"))
        }
        _ => Err(Error::invalid(
            "an image cannot name a parent whose path holds a backslash or control character, or is \
             not UTF-8",
        )
        .in_file(path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_lead_from_the_directory_of_one_file_to_another() {
        let way = |from: &str, to: &str| {
            let way = way(Path::new(from), Path::new(to));
            assert_eq!(
                climb(Path::new(from).parent().unwrap(), way.to_str().unwrap()).unwrap(),
                Path::new(to)
            );
            backslashed(&way).unwrap()
        };
        assert_eq!(way("/vm/x", "/vm/base.vhd"), r".\base.vhd");
        assert_eq!(way("/vm/x", "/vm/sub/base.vhd"), r".\sub\base.vhd");
        assert_eq!(way("/vm/a/b/x", "/vm/c/base.vhd"), r"..\..\c\base.vhd");
        assert_eq!(way("/x", "/a/y"), r".\a\y");
        assert_eq!(way("/a/b/x", "/y"), r"..\..\y");
        assert!(backslashed(Path::new(r"a\b")).is_err());
    }

    #[test]
    fn a_name_through_a_symlink_is_written_as_what_it_leads_to() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        std::fs::create_dir_all(real.join("deep/er")).unwrap();
        std::os::unix::fs::symlink("deep/er", real.join("link")).unwrap();
        let child = rooted(&real.join("link/child"));
        assert_eq!(child, real.join("deep/er/child"));
        assert_eq!(way(&child, &rooted(&real.join("base"))), Path::new("../../base"));
    }

    #[test]
    fn plain_names_pass_whatever_their_slashes() {
        assert_eq!(beneath("a-flat.vmdk").unwrap(), Path::new("a-flat.vmdk"));
        assert_eq!(beneath(r".\sub\b.vhd").unwrap(), Path::new("sub/b.vhd"));
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in [
            "",
            ".",
            "/etc/shadow",
            "../x",
            "a/../../x",
            r"..\x",
            r"\\host\share\x",
            "C:\\x",
            "c:/x",
            "nbd://h/x",
            "a\0b",
            "a\nb",
            "vsan://x",
        ] {
            let error = beneath(name).expect_err(name);
            assert_eq!(error.kind(), ErrorKind::Denied, "{name}");
        }
    }

    #[test]
    fn climbing_is_resolved_by_text() {
        let dir = Path::new("/srv/vm/a");
        assert_eq!(climb(dir, r"..\base.vhd").unwrap(), Path::new("/srv/vm/base.vhd"));
        assert_eq!(climb(dir, "/x/y").unwrap(), Path::new("/x/y"));
        assert_eq!(climb(dir, r"\\host\share\x"), None);
        assert_eq!(climb(Path::new("/"), "../x"), None);
    }

    #[test]
    fn only_paths_of_files_may_have_moved() {
        for name in
            ["/Users/u/disk.img", r"D:\VMs\disk.img", r"..\x\disk.img", r"\\host\s\disk.img"]
        {
            assert_eq!(moved(name).unwrap(), Path::new("disk.img"), "{name}");
        }
        for name in
            ["http://host/disk.img", "vsan://x/y", "/x/\n/disk.img", "/x/..", "/x/", "/", ""]
        {
            assert_eq!(moved(name), None, "{name}");
        }
    }

    #[test]
    fn the_last_component_of_any_form() {
        assert_eq!(last_component(r"c:\d\p.vhd").unwrap(), Path::new("p.vhd"));
        assert_eq!(last_component("file:///d/p.vhd").unwrap(), Path::new("p.vhd"));
        assert_eq!(last_component(r"\\?\d:\p\"), Some("p".into()));
        assert_eq!(last_component("/"), None);
    }
}
