//! Mount options: what `-o` takes, in one table.
//!
//! mount(8) hands a helper everything it does not strip itself, so the table also knows what to
//! ignore (fstab's own words) and what to refuse with a reason. Whatever is left is unknown, and an
//! error unless the helper was called with `-s`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use nix::unistd::{Group, User};

use crate::disk::tables::CacheBudget;
use crate::error::{Error, Result};
use crate::storage::device::is_device;

/// Who may use a mount besides the user who made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowed {
    /// Nobody.
    Owner,
    /// Root.
    Root,
    /// Everybody, as far as the permission bits allow.
    Other,
}

/// A mount's options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountOptions {
    /// Nothing is written.
    pub read_only: bool,
    /// What is written goes to scratch files in this directory, and vanishes with the mount.
    pub nonpersistent: Option<PathBuf>,
    /// Who may use the mount; by default everybody when root mounts, else nobody.
    pub allowed: Option<Allowed>,
    /// Whether the kernel was asked to check permissions. It always is by mounts of our own.
    pub default_permissions: bool,
    /// Owner of everything.
    pub uid: Option<u32>,
    /// Group of everything.
    pub gid: Option<u32>,
    /// Permission bits files do not get.
    pub fmask: u16,
    /// Permission bits directories do not get.
    pub dmask: u16,
    /// Threads that serve requests; chosen by the number of processors if `None`.
    pub threads: Option<usize>,
    /// Bytes of memory for tables.
    pub cache: usize,
    /// The kernel collects small writes.
    pub writeback: bool,
    /// The kernel may read flat extents without asking.
    pub passthrough: bool,
    /// Each partition shows as a file beside its disk.
    pub partitions: bool,
    /// Directories in which parents may lie.
    pub allow_parent: Vec<PathBuf>,
    /// Block devices that images may name as extents.
    pub allow_device: Vec<PathBuf>,
    /// These may be written.
    pub rw_devices: bool,
    /// The parent of the one image that is mounted.
    pub parent: Option<PathBuf>,
    /// Read on where an image contradicts itself or its parent changed.
    pub force: bool,
    /// Appended to an image's name.
    pub suffix: OsString,
    /// Source as mount tables show it, instead of the real one.
    pub fsname: Option<String>,
    /// Unmount when the daemon dies.
    pub auto_unmount: bool,
    /// Flags for the kernel, by their names in fstab.
    pub kernel: Vec<String>,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            nonpersistent: None,
            allowed: None,
            default_permissions: false,
            uid: None,
            gid: None,
            fmask: 0,
            dmask: 0,
            threads: None,
            cache: CacheBudget::DEFAULT,
            writeback: false,
            passthrough: true,
            partitions: false,
            allow_parent: Vec::new(),
            allow_device: Vec::new(),
            rw_devices: false,
            parent: None,
            force: false,
            suffix: ".img".into(),
            fsname: None,
            auto_unmount: false,
            kernel: Vec::new(),
        }
    }
}

/// What an option does.
enum Meaning {
    /// A word without value.
    Flag(fn(&mut MountOptions)),
    /// A word with a value.
    Value(fn(&mut MountOptions, &OsStr) -> Result<()>),
    /// A word with a value or without.
    Either(fn(&mut MountOptions, Option<&OsStr>) -> Result<()>),
    /// For the kernel; the words after it cancel it.
    Kernel(&'static [&'static str]),
    /// Somebody else's, or without meaning here.
    Ignored,
    /// Understood, but not to be had.
    Refused(&'static str),
}

use Meaning::{Either, Flag, Ignored, Kernel, Refused, Value};

/// Every known option.
const TABLE: &[(&str, Meaning)] = &[
    ("ro", Flag(|o| o.read_only = true)),
    ("rw", Flag(|o| o.read_only = false)),
    ("allow_other", Flag(|o| o.allowed = Some(Allowed::Other))),
    ("allow_root", Flag(|o| o.allowed = Some(Allowed::Root))),
    ("uid", Value(|o, v| user(v).map(|id| o.uid = Some(id)))),
    ("gid", Value(|o, v| group(v).map(|id| o.gid = Some(id)))),
    ("umask", Value(|o, v| mask(v).map(|m| (o.fmask, o.dmask) = (m, m)))),
    ("fmask", Value(|o, v| mask(v).map(|m| o.fmask = m))),
    ("dmask", Value(|o, v| mask(v).map(|m| o.dmask = m))),
    ("threads", Value(|o, v| threads(v).map(|n| o.threads = Some(n)))),
    ("cache", Value(|o, v| size(v).map(|n| o.cache = n))),
    ("writeback", Flag(|o| o.writeback = true)),
    ("nowriteback", Flag(|o| o.writeback = false)),
    ("passthrough", Flag(|o| o.passthrough = true)),
    ("nopassthrough", Flag(|o| o.passthrough = false)),
    ("allow_parent", Value(|o, v| directory(v).map(|dir| o.allow_parent.push(dir)))),
    ("allow_device", Value(|o, v| device(v).map(|path| o.allow_device.push(path)))),
    ("rw_devices", Flag(|o| o.rw_devices = true)),
    ("force", Flag(|o| o.force = true)),
    ("suffix", Value(|o, v| suffix(v).map(|s| o.suffix = s))),
    ("nonpersistent", Either(|o, v| scratch_dir(v).map(|dir| o.nonpersistent = Some(dir)))),
    ("parent", Value(|o, v| file(v).map(|path| o.parent = Some(path)))),
    ("partitions", Flag(|o| o.partitions = true)),
    // FUSE's own. The subtype is always flatdisk.
    ("default_permissions", Flag(|o| o.default_permissions = true)),
    ("subtype", Ignored),
    ("max_read", Ignored),
    ("fsname", Value(|o, v| text(v).map(|name| o.fsname = Some(name)))),
    ("auto_unmount", Flag(|o| o.auto_unmount = true)),
    ("remount", Refused("a FUSE mount cannot be changed; unmount it and mount it again")),
    ("bind", Refused("this is for mount --bind")),
    // The kernel's.
    ("suid", Kernel(&["nosuid"])),
    ("nosuid", Kernel(&["suid"])),
    ("dev", Kernel(&["nodev"])),
    ("nodev", Kernel(&["dev"])),
    ("exec", Kernel(&["noexec"])),
    ("noexec", Kernel(&["exec"])),
    ("atime", Kernel(&["noatime"])),
    ("noatime", Kernel(&["atime"])),
    ("sync", Kernel(&["async"])),
    ("async", Kernel(&["sync"])),
    ("dirsync", Kernel(&[])),
    // fstab's, mount's and systemd's.
    ("defaults", Ignored),
    ("auto", Ignored),
    ("noauto", Ignored),
    ("nofail", Ignored),
    ("_netdev", Ignored),
    ("user", Ignored),
    ("users", Ignored),
    ("owner", Ignored),
    ("group", Ignored),
    ("nouser", Ignored),
    ("nousers", Ignored),
    ("noowner", Ignored),
    ("nogroup", Ignored),
    ("comment", Ignored),
    ("uhelper", Ignored),
    ("helper", Ignored),
    ("relatime", Ignored),
    ("norelatime", Ignored),
    ("strictatime", Ignored),
    ("nostrictatime", Ignored),
    ("diratime", Ignored),
    ("nodiratime", Ignored),
    ("lazytime", Ignored),
    ("nolazytime", Ignored),
    ("iversion", Ignored),
    ("noiversion", Ignored),
    ("mand", Ignored),
    ("nomand", Ignored),
    // The kernel resolves no symlink here: none shows.
    ("nosymfollow", Ignored),
    ("symfollow", Ignored),
    ("silent", Ignored),
    ("loud", Ignored),
];

/// Whether `-o` takes this word.
pub fn is_known(word: &str) -> bool {
    TABLE.iter().any(|(known, _)| *known == word)
}

impl MountOptions {
    /// Applies a comma-separated list as `-o` takes it. With `sloppy`, unknown words are skipped.
    pub fn apply(&mut self, list: &OsStr, sloppy: bool) -> Result<()> {
        split(list).iter().try_for_each(|word| self.apply_one(word, sloppy))
    }

    /// Sets one option by its word in `-o`.
    pub fn set(&mut self, key: &str, value: Option<&OsStr>) -> Result<()> {
        self.set_known(key, value)?.then_some(()).ok_or_else(|| unknown(key))
    }

    fn apply_one(&mut self, word: &[u8], sloppy: bool) -> Result<()> {
        let (key, value) = match word.iter().position(|b| *b == b'=') {
            Some(at) => (&word[..at], Some(OsStr::from_bytes(&word[at + 1..]))),
            None => (word, None),
        };
        let Ok(key) = std::str::from_utf8(key) else {
            return Err(Error::invalid("a mount option is not text"));
        };
        if key.is_empty() || key.starts_with("x-") || key.starts_with("X-") {
            return Ok(());
        }
        match self.set_known(key, value)? {
            false if sloppy => log::info!("ignoring unknown mount option `{key}`"),
            false => return Err(unknown(key)),
            true => {}
        }
        Ok(())
    }

    /// Sets an option if it is in the table, and says whether it is.
    fn set_known(&mut self, key: &str, value: Option<&OsStr>) -> Result<bool> {
        let Some((_, meaning)) = TABLE.iter().find(|(known, _)| *known == key) else {
            return Ok(false);
        };
        match (meaning, value) {
            (Flag(set), None) => set(self),
            (Value(set), Some(value)) => set(self, value).map_err(|e| wrong(key, &e))?,
            (Either(set), value) => set(self, value).map_err(|e| wrong(key, &e))?,
            (Kernel(opposites), None) => {
                self.kernel.retain(|flag| flag != key && !opposites.contains(&flag.as_str()));
                self.kernel.push(key.to_owned());
            }
            (Ignored, _) => {}
            (Refused(why), _) => {
                return Err(Error::unsupported(format!("mount option `{key}`: {why}")));
            }
            (Value(_), None) => {
                return Err(Error::invalid(format!("mount option `{key}` needs a value")));
            }
            (Flag(_) | Kernel(_), Some(_)) => {
                return Err(Error::invalid(format!("mount option `{key}` takes no value")));
            }
        }
        Ok(true)
    }
}

fn wrong(key: &str, e: &Error) -> Error {
    Error::invalid(format!("mount option `{key}`: {}", e.what()))
}

fn unknown(key: &str) -> Error {
    Error::invalid(format!("unknown mount option `{key}`")).hint("flatdisk mount --help lists them")
}

/// Splits at commas, except in double quotes or after a backslash, both of which go away.
fn split(list: &OsStr) -> Vec<Vec<u8>> {
    let mut words = vec![Vec::new()];
    let (mut quoted, mut escaped) = (false, false);
    for byte in list.as_bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => {
                escaped = true;
                continue;
            }
            b'"' => {
                quoted = !quoted;
                continue;
            }
            b',' if !quoted => {
                words.push(Vec::new());
                continue;
            }
            _ => {}
        }
        if let Some(word) = words.last_mut() {
            word.push(*byte);
        }
    }
    words
}

fn text(value: &OsStr) -> Result<String> {
    value.to_str().map(str::to_owned).ok_or_else(|| Error::invalid("not text"))
}

fn number<T: std::str::FromStr>(value: &OsStr) -> Result<T> {
    let value = text(value)?;
    value.parse().map_err(|_| Error::invalid(format!("`{value}` is not a number in range")))
}

fn user(value: &OsStr) -> Result<u32> {
    let name = text(value)?;
    match name.parse() {
        Ok(id) => Ok(id),
        Err(_) => match User::from_name(&name) {
            Ok(Some(user)) => Ok(user.uid.as_raw()),
            _ => Err(Error::invalid(format!("no user `{name}`"))),
        },
    }
}

fn group(value: &OsStr) -> Result<u32> {
    let name = text(value)?;
    match name.parse() {
        Ok(id) => Ok(id),
        Err(_) => match Group::from_name(&name) {
            Ok(Some(group)) => Ok(group.gid.as_raw()),
            _ => Err(Error::invalid(format!("no group `{name}`"))),
        },
    }
}

fn mask(value: &OsStr) -> Result<u16> {
    let value = text(value)?;
    u16::from_str_radix(&value, 8)
        .ok()
        .filter(|mask| *mask <= 0o777)
        .ok_or_else(|| Error::invalid(format!("`{value}` is not an octal mask such as 022")))
}

fn threads(value: &OsStr) -> Result<usize> {
    match number(value)? {
        count @ 1..=64 => Ok(count),
        count => Err(Error::invalid(format!("{count} is not between 1 and 64"))),
    }
}

fn size(value: &OsStr) -> Result<usize> {
    let value = text(value)?;
    parse_size::Config::new()
        .with_binary()
        .parse_size(&value)
        .ok()
        .and_then(|size| usize::try_from(size).ok())
        .ok_or_else(|| Error::invalid(format!("`{value}` is not a size such as 64M")))
}

/// A file of any kind, by its real path.
fn file(value: &OsStr) -> Result<PathBuf> {
    std::fs::canonicalize(value).map_err(|e| Error::io(value.display().to_string(), &e))
}

fn directory(value: &OsStr) -> Result<PathBuf> {
    let path = file(value)?;
    if path.is_dir() {
        Ok(path)
    } else {
        Err(Error::invalid(format!("`{}` is no directory", value.display())))
    }
}

/// A block device, by the name that images have for it.
fn device(value: &OsStr) -> Result<PathBuf> {
    let path = PathBuf::from(value);
    match path.is_absolute() && is_device(&path) {
        true => Ok(path),
        false => Err(Error::invalid(format!("`{}` is no block device", value.display()))),
    }
}

/// Where throw-away layers go unless the user says: not `/tmp`, which may be in memory.
///
/// # Errors
/// It is no directory.
pub fn scratch_dir(value: Option<&OsStr>) -> Result<PathBuf> {
    let usual = || std::env::var_os("TMPDIR").unwrap_or_else(|| "/var/tmp".into());
    directory(&value.map_or_else(usual, OsStr::to_owned))
}

fn suffix(value: &OsStr) -> Result<OsString> {
    if value.as_bytes().contains(&b'/') {
        return Err(Error::invalid("a suffix is part of a file name"));
    }
    Ok(OsString::from_vec(value.as_bytes().to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn parse(list: &str) -> Result<MountOptions> {
        let mut options = MountOptions::default();
        options.apply(list.as_ref(), false).map(|()| options)
    }

    #[test]
    fn what_mount_and_fstab_pass_is_taken_or_ignored() {
        let lists = [
            "rw,noexec,nosuid,nodev,user",
            "ro,allow_other,nofail,x-gvfs-show",
            "rw,noauto,x-systemd.automount,x-systemd.idle-timeout=60,_netdev",
            "rw,dev,suid,X-mount.mkdir=0755,comment=a b,users,default_permissions,relatime",
            "ro,fsname=/srv/images,subtype=flatdisk,max_read=131072",
            "",
            "defaults,,rw",
        ];
        for list in lists {
            parse(list).unwrap_or_else(|e| panic!("{list}: {e}"));
        }
    }

    #[test]
    fn the_last_word_counts() {
        assert!(parse("ro").unwrap().read_only);
        assert!(!parse("ro,rw").unwrap().read_only);
        assert_eq!(parse("nosuid,nodev,suid").unwrap().kernel, ["nodev", "suid"]);
        assert_eq!(parse("sync,sync,async").unwrap().kernel, ["async"]);
        assert!(!parse("writeback,nowriteback").unwrap().writeback);
    }

    #[test]
    fn values_reach_their_fields() {
        let options = parse(
            "uid=1000,gid=root,umask=022,dmask=077,threads=3,cache=8M,suffix=.raw,nopassthrough,\
             force,allow_root,allow_parent=/usr/../usr",
        )
        .unwrap();
        assert_eq!((options.uid, options.gid), (Some(1000), Some(0)));
        assert_eq!((options.fmask, options.dmask), (0o022, 0o077));
        assert_eq!((options.threads, options.cache), (Some(3), 8 << 20));
        assert_eq!(options.suffix, ".raw");
        assert_eq!(options.allowed, Some(Allowed::Root));
        assert_eq!(options.allow_parent, [PathBuf::from("/usr")]);
        assert!(options.force && !options.passthrough);
    }

    #[test]
    fn commas_in_values_are_escaped_or_quoted() {
        for list in [r"fsname=/a\,b,ro", r#"fsname="/a,b",ro"#] {
            let options = parse(list).unwrap();
            assert_eq!(options.fsname.as_deref(), Some("/a,b"), "{list}");
            assert!(options.read_only);
        }
    }

    #[test]
    fn unknown_words_are_errors_unless_sloppy() {
        let error = parse("rw,nonsense=1").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains("`nonsense`"), "{error}");
        let mut options = MountOptions::default();
        options.apply("nonsense=1,ro".as_ref(), true).unwrap();
        assert!(options.read_only);
    }

    #[test]
    fn refusals_say_why() {
        for (word, why) in
            [("remount", "unmount it and mount it again"), ("bind", "this is for mount --bind")]
        {
            let error = parse(word).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{word}");
            assert!(error.to_string().contains(why), "{error}");
        }
    }

    #[test]
    fn bad_values_name_the_option() {
        for list in [
            "uid=nobody-of-this-name",
            "umask=9",
            "umask=7777",
            "threads=0",
            "threads=many",
            "cache=lots",
            "suffix=a/b",
            "allow_parent=/does/not/exist",
            "ro=1",
            "nosuid=x",
            "uid",
        ] {
            let key = list.split('=').next().unwrap();
            let error = parse(list).expect_err(list).to_string();
            assert!(error.contains(&format!("`{key}`")), "{error}");
        }
    }
}
