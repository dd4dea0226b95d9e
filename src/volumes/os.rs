//! Which systems are installed on a disk: [`systems`].
//!
//! A Linux or BSD tells it in `os-release` (os-release(5)) on the volume that is its root. A Windows is told by the
//! part of its registry that says which one it is; the registry itself is not read, so its version stays unknown.
//! Only file systems count whose files are read here ([`files`]).

use std::sync::Arc;

use serde::Serialize;

use super::{Volumes, files};
use crate::disk::Disk;
use crate::disk::window::Window;
use crate::error::{Error, ErrorKind, Result};

/// Bytes of an `os-release` that are read.
const MAX_TEXT: usize = 64 << 10;
/// Volumes that are searched.
const MAX_VOLUMES: usize = 128;

/// Where a Linux has it; the first that is there counts.
const RELEASES: [&[u8]; 2] = [b"etc/os-release", b"usr/lib/os-release"];
/// Where a Windows says which one it is.
const SOFTWARE: [&[u8]; 2] =
    [b"Windows/System32/config/SOFTWARE", b"WINDOWS/system32/config/software"];

/// A system that is installed. Field names are the stable names of the JSON form.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct System {
    /// `linux`, `windows`, or what else `os-release` calls itself.
    pub family: String,
    /// What it is called, for people.
    pub name: Option<String>,
    /// `ID` of `os-release`: `debian`, `fedora`.
    pub id: Option<String>,
    /// Its version.
    pub version: Option<String>,
    /// The number of the partition that is its root; absent on a disk without partitions.
    pub partition: Option<u32>,
}

/// The systems on `disk`, whose volumes are `found`. What cannot be read holds none.
pub fn systems(disk: &Arc<Disk>, found: &Volumes) -> Vec<System> {
    let mut places: Vec<_> = found.partitions.iter().map(|part| Some(part.number)).collect();
    if places.is_empty() {
        places.push(None);
    }
    let system = |number: Option<u32>| {
        let volume = Window::new(disk.clone(), found.place(number).ok()?).ok()?;
        Some(System { partition: number, ..installed(volume)? })
    };
    places.into_iter().take(MAX_VOLUMES).filter_map(system).collect()
}

fn installed(volume: Window<Arc<Disk>>) -> Option<System> {
    let mut files = files::open(volume).ok()?;
    for path in RELEASES {
        let mut text = Text::default();
        match files.read(path, true, &mut text) {
            Err(e) if e.kind() != ErrorKind::OutOfRange => {}
            _ => return Some(released(&String::from_utf8_lossy(&text.0))),
        }
    }
    let windows = SOFTWARE.iter().any(|path| files.stat(path).is_ok());
    windows.then(|| System {
        family: "windows".to_owned(),
        name: None,
        id: None,
        version: None,
        partition: None,
    })
}

/// What an `os-release` says.
fn released(text: &str) -> System {
    let value = |name: &str| {
        let line = text
            .lines()
            .rev()
            .find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='))?;
        let quoted = |quote| line.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote));
        let value = quoted('"').or_else(|| quoted('\'')).unwrap_or(line);
        let mut plain = String::new();
        let mut escaped = false;
        for c in value.chars() {
            escaped = c == '\\' && !escaped;
            if !escaped {
                plain.push(c);
            }
        }
        (!plain.is_empty()).then_some(plain)
    };
    let id = value("ID");
    let family = match id.as_deref() {
        Some(id) if id.contains("bsd") => id.to_owned(),
        _ => "linux".to_owned(),
    };
    System {
        family,
        name: value("PRETTY_NAME").or_else(|| value("NAME")),
        version: value("VERSION_ID"),
        id,
        partition: None,
    }
}

/// The first bytes of a file.
#[derive(Default)]
struct Text(Vec<u8>);

impl Text {
    fn full<T>() -> Result<T> {
        Err(Error::new(ErrorKind::OutOfRange, "more than is read"))
    }
}

impl files::Sink for Text {
    fn data(&mut self, bytes: &[u8]) -> Result<()> {
        let room = MAX_TEXT - self.0.len();
        self.0.extend(&bytes[..room.min(bytes.len())]);
        if bytes.len() > room { Self::full() } else { Ok(()) }
    }

    fn hole(&mut self, _: u64) -> Result<()> {
        Self::full()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn os_release_is_read_as_a_shell_does() {
        let text = "# a comment\nNAME=\"Debian\"\nID=debian\nVERSION_ID='12'\nPRETTY_NAME=\"A \\\"B\\\" \\$C\"\n";
        let found = released(text);
        assert_eq!(found.name.as_deref(), Some("A \"B\" $C"));
        assert_eq!((found.id.as_deref(), found.version.as_deref()), (Some("debian"), Some("12")));
        assert_eq!(found.family, "linux");
        assert_eq!(released("ID=freebsd").family, "freebsd");
        assert_eq!(released("nonsense \u{0}").name, None);
    }
}
