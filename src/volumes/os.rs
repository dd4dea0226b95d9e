//! Which systems are installed on a disk: [`systems`].
//!
//! A Linux or BSD tells it in `os-release` (os-release(5)) on the volume that is its root, a Windows in the part
//! SOFTWARE of its registry, under `Microsoft\Windows NT\CurrentVersion`. Only file systems count whose files are read here ([`files`]).

use std::collections::HashMap;
use std::sync::Arc;

use serde::Serialize;

use super::hive::{Hive, Value};
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
/// Where a Windows has the hive that says which one it is.
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
    let hive = SOFTWARE.iter().find(|path| files.stat(path).is_ok())?;
    let mut hive = Hive::new(|at, buf: &mut [u8]| files.read_at(hive, at, buf));
    let values = hive.values(&["Microsoft", "Windows NT", "CurrentVersion"]);
    Some(windows(&values.unwrap_or_default()))
}

/// What a Windows says of itself.
fn windows(values: &HashMap<String, Value>) -> System {
    let text = |name: &str| match values.get(name) {
        Some(Value::Text(text)) if !text.is_empty() => Some(text.clone()),
        _ => None,
    };
    let number = |name: &str| match values.get(name) {
        Some(Value::Number(number)) => Some(*number),
        _ => None,
    };
    let build = text("CurrentBuildNumber").or_else(|| text("CurrentBuild"));
    let release = match (number("CurrentMajorVersionNumber"), number("CurrentMinorVersionNumber")) {
        (Some(major), Some(minor)) => Some(format!("{major}.{minor}")),
        // Windows before 10; later ones say 6.3 here for ever.
        _ => text("CurrentVersion"),
    };
    let revision = number("UBR").map(|revision| revision.to_string());
    let parts: Vec<_> = [release, build.clone(), revision].into_iter().flatten().collect();
    // Windows 11 goes on calling itself 10.
    let eleven =
        build.and_then(|build| build.parse().ok()).is_some_and(|build: u32| build >= 22_000);
    let product = text("ProductName").map(|name| match name.strip_prefix("Windows 10") {
        Some(rest) if eleven => format!("Windows 11{rest}"),
        _ => name,
    });
    let name: Vec<_> = [product, text("DisplayVersion")].into_iter().flatten().collect();
    System {
        family: "windows".to_owned(),
        name: (!name.is_empty()).then(|| name.join(" ")),
        id: None,
        version: (!parts.is_empty()).then(|| parts.join(".")),
        partition: None,
    }
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

    #[test]
    fn the_registry_of_a_windows_is_read_where_it_lies() {
        let key = ["Microsoft", "Windows NT", "CurrentVersion"];
        let values = [
            ("ProductName", Value::Text("Windows Server 2022".to_owned())),
            ("CurrentBuild", Value::Text("20348".to_owned())),
        ];
        let hive = crate::volumes::hive::tests::made(&key, &values);
        for (hive, wanted) in
            [(&hive[..], Some("Windows Server 2022")), (b"regf, and no more", None)]
        {
            let mut bytes = std::io::Cursor::new(vec![0; 8 << 20]);
            fatfs::format_volume(&mut bytes, fatfs::FormatVolumeOptions::new()).unwrap();
            let fat = fatfs::FileSystem::new(&mut bytes, fatfs::FsOptions::new()).unwrap();
            let windows = fat.root_dir().create_dir("Windows").unwrap();
            let config = windows.create_dir("System32").unwrap().create_dir("config").unwrap();
            let mut software = config.create_file("SOFTWARE").unwrap();
            std::io::Write::write_all(&mut software, hive).unwrap();
            drop((software, config, windows));
            fat.unmount().unwrap();
            let file = crate::storage::memory::MemoryFile::new("/disk", bytes.get_ref());
            let disk = Arc::new(crate::disk::flat::raw(file, 512).unwrap());
            let found = systems(&disk, &crate::volumes::volumes(&disk).unwrap());
            assert_eq!((found.len(), &*found[0].family), (1, "windows"));
            assert_eq!(found[0].name.as_deref(), wanted);
        }
    }

    #[test]
    fn a_windows_is_called_what_it_is() {
        let told = |values: &[(&str, &str)], numbers: &[(&str, u32)]| {
            let texts = values.iter().map(|(n, v)| ((*n).to_owned(), Value::Text((*v).to_owned())));
            let numbers = numbers.iter().map(|(n, v)| ((*n).to_owned(), Value::Number(*v)));
            let system = windows(&texts.chain(numbers).collect());
            (system.name.unwrap_or_default(), system.version.unwrap_or_default())
        };
        let major =
            [("CurrentMajorVersionNumber", 10), ("CurrentMinorVersionNumber", 0), ("UBR", 3803)];
        let words = |build| {
            [
                ("ProductName", "Windows 10 Pro"),
                ("DisplayVersion", "22H2"),
                ("CurrentVersion", "6.3"),
                ("CurrentBuildNumber", build),
            ]
        };
        let (name, version) = told(&words("19045"), &major);
        assert_eq!((&*name, &*version), ("Windows 10 Pro 22H2", "10.0.19045.3803"));
        assert_eq!(told(&words("22631"), &major).0, "Windows 11 Pro 22H2");
        let seven = [
            ("ProductName", "Windows 7 Ultimate"),
            ("CurrentVersion", "6.1"),
            ("CurrentBuild", "7601"),
        ];
        let (name, version) = told(&seven, &[]);
        assert_eq!((&*name, &*version), ("Windows 7 Ultimate", "6.1.7601"));
        assert_eq!(told(&[], &[]), (String::new(), String::new()));
    }
}
