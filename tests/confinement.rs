//! Files that an image names: whatever the name, nothing outside the image's folder is opened.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
#[path = "hostile/links.rs"]
mod links;

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use common::tools;
use flatdisk::error::{ErrorKind, Result};
use flatdisk::formats::folders::Folders;
use flatdisk::formats::{self, CreateSpec, OpenOptions};
use flatdisk::storage::file::HostFs;
use flatdisk::storage::memory::{MemoryFile, MemoryHost};
use flatdisk::storage::{Access, Host, Storage};
use links::{data_write_guid, name_vhdx_parent, seal_vhd};
use tempfile::TempDir;

/// What nobody may read.
const SECRET: &[u8] = b"this is kept outside of the image's folder ";
const MIB: u64 = 1 << 20;
/// An open that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// A folder with images, and beside it one that is none of their business.
struct Place {
    root: TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self { root: tempfile::tempdir().expect("a temporary folder") };
        fs::create_dir_all(place.inside().join("sub")).unwrap();
        fs::create_dir(place.outside()).unwrap();
        let secret = SECRET.repeat(MIB as usize / SECRET.len() + 1);
        fs::write(place.outside().join("secret"), &secret[..MIB as usize]).unwrap();
        for format in ["vhd", "vhdx"] {
            let secret = place.outside().join("secret").with_extension(format);
            save(&parent(format), &secret);
        }
        let text = descriptor(&["RW 2048 FLAT \"secret\" 0"], None);
        fs::write(place.outside().join("secret.vmdk"), text).unwrap();
        for target in ["secret", "secret.vhd", "secret.vhdx", "secret.vmdk"] {
            symlink(place.outside().join(target), place.inside().join(format!("link-{target}")))
                .unwrap();
        }
        symlink(place.outside(), place.inside().join("linked")).unwrap();
        symlink("sub", place.inside().join("near")).unwrap();
        nix::unistd::mkfifo(&place.inside().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        drop(UnixListener::bind(place.inside().join("socket")).unwrap());
        place
    }

    fn inside(&self) -> PathBuf {
        self.root.path().join("inside")
    }

    fn outside(&self) -> PathBuf {
        self.root.path().join("outside")
    }

    /// Every way to lead out, for a target in the other folder.
    fn names(&self, target: &str) -> Vec<String> {
        let outside = self.outside();
        let outside = outside.to_str().unwrap();
        let mut names = vec![
            format!("{outside}/{target}"),
            format!("{outside}//{target}"),
            format!("../outside/{target}"),
            format!(r"..\outside\{target}"),
            format!(r".\..\outside\{target}"),
            format!("sub/../../outside/{target}"),
            format!("linked/{target}"),
            format!(r".\linked\{target}"),
            format!("linked/../outside/{target}"),
            format!("link-{target}"),
            format!("./link-{target}"),
            format!("file://{outside}/{target}"),
            format!("file://localhost{outside}/{target}"),
            format!("{}{outside}/{target}", "/..".repeat(20)),
            format!("{}{outside}/{target}", "../".repeat(20)),
            format!(r"\\?\{outside}/{target}"),
            format!("/proc/self/root{outside}/{target}"),
            format!("/proc/self/cwd/../../../../../..{outside}/{target}"),
            format!("../outside/{target}\0.vmdk"),
        ];
        let fixed = [
            "/dev/zero",
            "/dev/null",
            "/dev/stdin",
            "/dev/fd/0",
            "/proc/self/mem",
            "/proc/self/exe",
            "/proc/self/fd/0",
            "../../../../../../../proc/self/environ",
            "fifo",
            "socket",
            "sub",
            ".",
            "..",
            "/",
            "",
            "near",
            r"\\host\share\x.vhd",
            "//host/share/x",
            r"C:\x.vhd",
            "c:x.vhd",
            "http://127.0.0.1:1/x",
            "nbd://127.0.0.1:1/x",
            "vsan://x/y",
            "json:{}",
            "vvol://x",
            r"\\.\PhysicalDrive0",
            r"\\?\Volume{26a21bda-a627-11d7-9931-806e6f6e6963}\",
            "a\nb",
        ];
        names.extend(fixed.map(str::to_owned));
        names.push("x/".repeat(4000));
        names.push("x".repeat(300));
        names
    }
}

fn spec(size: u64) -> CreateSpec {
    CreateSpec { subformat: Some("dynamic".into()), size, ..CreateSpec::default() }
}

/// An image of a format with something in it.
fn parent(format: &str) -> Arc<MemoryFile> {
    let host = MemoryHost::new();
    let path = PathBuf::from("/disk").with_extension(format);
    formats::create(formats::by_name(format).unwrap(), &*host, &path, &spec(MIB)).unwrap();
    let dynamic: Arc<dyn Host> = host.clone();
    let disk = formats::open(&dynamic, &path, &OpenOptions::new(Access::Write)).unwrap().disk;
    disk.write_at(0, &SECRET.repeat(100)).unwrap();
    disk.close().unwrap();
    host.file(&path).unwrap()
}

fn save(file: &MemoryFile, path: &Path) {
    fs::write(path, file.to_vec()).unwrap();
}

fn descriptor(extents: &[&str], hint: Option<&str>) -> String {
    let parent = hint
        .map_or("ffffffff".to_owned(), |hint| format!("00000001\nparentFileNameHint=\"{hint}\""));
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID={parent}\ncreateType=\"custom\"\n{}\n",
        extents.join("\n")
    )
}

/// A VHD whose parent is `id`, named by a locator of kind `code`, or by the header's own field.
fn vhd_child(id: &[u8; 16], code: Option<[u8; 4]>, name: &str) -> Arc<MemoryFile> {
    let file = parent("vhd");
    let mut bytes = file.to_vec();
    let header = u64::from_be_bytes(bytes[16..24].try_into().unwrap()) as usize;
    bytes[header + 40..header + 56].copy_from_slice(id);
    let footer = bytes.split_off(bytes.len() - 512);
    if let Some(code) = code {
        let data = match &code {
            b"MacX" => format!("file://{name}").into_bytes(),
            _ => flatdisk::codec::to_utf16(name, false),
        };
        let at = bytes.len() as u64;
        let entry = header + 576;
        bytes[entry..entry + 4].copy_from_slice(&code);
        bytes[entry + 4..entry + 8].copy_from_slice(&32768u32.to_be_bytes());
        bytes[entry + 8..entry + 12].copy_from_slice(&(data.len() as u32).to_be_bytes());
        bytes[entry + 16..entry + 24].copy_from_slice(&at.to_be_bytes());
        bytes.extend(&data);
        bytes.resize(at as usize + 32768, 0);
    } else {
        let mut data = flatdisk::codec::to_utf16(name, true);
        data.truncate(512);
        bytes[header + 64..header + 64 + data.len()].copy_from_slice(&data);
    }
    let end = bytes.len() as u64;
    bytes.extend(footer);
    let file = MemoryFile::new("child.vhd", &bytes);
    seal_vhd::<1024>(&*file, header as u64, 36);
    for footer in [0, end] {
        file.write_at(footer + 60, &4u32.to_be_bytes()).unwrap();
        seal_vhd::<512>(&*file, footer, 64);
    }
    file
}

fn vhdx_child(linkage: &str, key: &'static str, name: &str) -> Arc<MemoryFile> {
    let file = parent("vhdx");
    name_vhdx_parent(&*file, &[("parent_linkage", linkage.to_owned()), (key, name.to_owned())]);
    file
}

fn secret_of(place: &Place, format: &str) -> Vec<u8> {
    fs::read(place.outside().join("secret").with_extension(format)).unwrap()
}

/// Images that name every file in every way, in the folder `inside`.
fn images(place: &Place) -> Vec<(PathBuf, String)> {
    let mut images = Vec::new();
    let mut add = |kind: &str, name: &str, bytes: &[u8]| {
        let extension = kind.split(' ').next().unwrap();
        let path = place.inside().join(format!("image-{}.{extension}", images.len()));
        fs::write(&path, bytes).unwrap();
        images.push((path, format!("{kind} `{}`", name.escape_debug())));
    };
    for name in place.names("secret") {
        for line in ["RW 2048 FLAT", "RW 2048 VMFS", "RW 2048 SPARSE", "RDONLY 2048 FLAT"] {
            let offset = if line.contains("SPARSE") { "" } else { " 0" };
            let text = descriptor(&[&format!("{line} \"{name}\"{offset}")], None);
            add(&format!("vmdk {line}"), &name, text.as_bytes());
        }
    }
    for name in place.names("secret.vmdk") {
        fs::write(place.inside().join("own"), vec![0; MIB as usize]).unwrap();
        let text = descriptor(&["RW 2048 FLAT \"own\" 0"], Some(&name));
        add("vmdk parent", &name, text.as_bytes());
    }
    let id: [u8; 16] = secret_of(place, "vhd")[68..84].try_into().unwrap();
    for name in place.names("secret.vhd") {
        for code in [Some(*b"W2ru"), Some(*b"W2ku"), Some(*b"MacX"), None] {
            let kind =
                code.map_or("name".into(), |code| String::from_utf8_lossy(&code).into_owned());
            add(&format!("vhd {kind}"), &name, &vhd_child(&id, code, &name).to_vec());
        }
    }
    let linkage = data_write_guid(&*MemoryFile::new("x", &secret_of(place, "vhdx")));
    for name in place.names("secret.vhdx") {
        for key in ["relative_path", "absolute_win32_path", "volume_path"] {
            let child = vhdx_child(&format!("{{{linkage}}}"), key, &name);
            add(&format!("vhdx {key}"), &name, &child.to_vec());
        }
    }
    images
}

/// Opens an image in a thread of its own; an open that hangs fails the test.
fn open(path: &Path, options: OpenOptions) -> Result<formats::Image> {
    // Folders of hundreds of children without parents are not read anew for each of them.
    static FOLDERS: LazyLock<Arc<Folders>> = LazyLock::new(Arc::default);
    let options = OpenOptions { folders: FOLDERS.clone(), ..options };
    let (sender, receiver) = mpsc::channel();
    let owned = path.to_owned();
    std::thread::spawn(move || {
        let _ = sender.send(formats::open(&HostFs::shared(), &owned, &options));
    });
    receiver.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("{} hangs", path.display()))
}

/// Whether an error is one of those for files that must not or cannot be opened.
fn is_refusal(kind: ErrorKind) -> bool {
    use ErrorKind::{Corrupt, Denied, InvalidInput, NotFound, ParentMissing, Unsupported};
    matches!(kind, Corrupt | Denied | InvalidInput | NotFound | ParentMissing | Unsupported)
}

#[test]
fn no_name_leads_out_of_the_folder() {
    let place = Place::new();
    let images = images(&place);
    let mut wrong = Vec::new();
    for (path, what) in &images {
        for access in [Access::Peek, Access::Read, Access::Write] {
            for force in [false, true] {
                match open(path, OpenOptions { force, ..OpenOptions::new(access) }) {
                    Err(e) if is_refusal(e.kind()) && !e.to_string().contains(char::is_control) => {
                    }
                    Err(e) => wrong.push(format!("{what}: {:?}: {e}", e.kind())),
                    Ok(image) => match leak(&image) {
                        // An image without its parent may be readable by force.
                        None if force => {}
                        leak => wrong.push(format!("{what} opens, leaks {leak:?}")),
                    },
                }
            }
        }
    }
    println!("{} images", images.len());
    assert!(wrong.is_empty(), "{} wrong\n{}", wrong.len(), wrong.join("\n"));
}

/// What an image shows of the other folder.
fn leak(image: &formats::Image) -> Option<String> {
    if image.parent.is_some() {
        return Some("a parent".into());
    }
    let mut bytes = vec![0; image.disk.size().min(4096) as usize];
    image.disk.read_at(0, &mut bytes).ok()?;
    // A child holds the same text by itself; only extents can bring it in otherwise.
    let own = image.info.format != "vmdk";
    (!own && bytes.windows(16).any(|w| w == &SECRET[..16])).then(|| "the secret".into())
}

#[test]
fn errors_say_that_a_name_is_refused() {
    let place = Place::new();
    for (name, kind) in [
        ("../outside/secret", ErrorKind::Denied),
        ("/etc/passwd", ErrorKind::Denied),
        ("socket", ErrorKind::Denied),
        ("sub", ErrorKind::Denied),
        ("link-secret", ErrorKind::Denied),
        ("linked/secret", ErrorKind::Denied),
        ("fifo", ErrorKind::Denied),
        ("http://host/x", ErrorKind::Denied),
        (r"\\host\share\x", ErrorKind::Denied),
    ] {
        let path = place.inside().join("disk.vmdk");
        fs::write(&path, descriptor(&[&format!("RW 2048 FLAT \"{name}\" 0")], None)).unwrap();
        let e = open(&path, OpenOptions::new(Access::Read)).expect_err(name);
        assert_eq!(e.kind(), kind, "{name}: {e}");
    }
}

#[test]
fn an_image_is_neither_its_own_extent_nor_its_own_ancestor() {
    let place = Place::new();
    let path = place.inside().join("disk.vmdk");
    let refused = |what: &str| {
        for access in [Access::Peek, Access::Read, Access::Write] {
            let e = open(&path, OpenOptions::new(access)).expect_err(what);
            assert!(is_refusal(e.kind()) || e.kind() == ErrorKind::Busy, "{what}: {e}");
        }
    };
    fs::write(place.inside().join("x"), vec![0; MIB as usize]).unwrap();
    fs::hard_link(place.inside().join("x"), place.inside().join("y")).unwrap();
    for (what, lines) in [
        ("itself", &["RW 1 FLAT \"disk.vmdk\" 0"][..]),
        ("twice the same", &["RW 8 FLAT \"x\" 0", "RW 8 FLAT \"x\" 0"]),
        ("overlapping parts", &["RW 8 FLAT \"x\" 0", "RW 8 FLAT \"x\" 7"]),
        ("two names of one file", &["RW 8 FLAT \"x\" 0", "RW 8 FLAT \"y\" 0"]),
    ] {
        fs::write(&path, descriptor(lines, None) + &" ".repeat(600)).unwrap();
        refused(what);
    }
    fs::write(&path, descriptor(&["RW 8 FLAT \"x\" 0"], Some("disk.vmdk"))).unwrap();
    refused("its own parent");
    fs::write(place.inside().join("b.vmdk"), descriptor(&["RW 8 FLAT \"x\" 8"], Some("disk.vmdk")))
        .unwrap();
    fs::write(&path, descriptor(&["RW 8 FLAT \"x\" 0"], Some("b.vmdk"))).unwrap();
    refused("its own grandparent");
}

#[test]
fn a_directory_is_permitted_only_by_its_own_name() {
    let place = Place::new();
    let id: [u8; 16] = secret_of(&place, "vhd")[68..84].try_into().unwrap();
    let outside = place.outside();
    let path = place.inside().join("child.vhd");
    let other = place.root.path().join("other");
    fs::create_dir(&other).unwrap();
    symlink(outside.join("secret.vhd"), other.join("secret.vhd")).unwrap();
    let allow = |dir: &Path| OpenOptions {
        allow_parent: vec![dir.to_owned()],
        ..OpenOptions::new(Access::Read)
    };
    for name in [r"..\outside\secret.vhd", outside.join("secret.vhd").to_str().unwrap()] {
        save(&vhd_child(&id, Some(*b"W2ru"), name), &path);
        assert!(open(&path, OpenOptions::new(Access::Read)).is_err(), "{name}");
        assert!(open(&path, allow(&other)).is_err(), "{name} through a symlink");
        assert!(open(&path, allow(&outside)).is_ok(), "{name}");
    }
}

#[test]
fn what_is_named_on_the_command_line_must_be_a_regular_file() {
    let place = Place::new();
    let inside = place.inside();
    for path in [inside.join("fifo"), inside.join("socket"), "/dev/zero".into(), inside] {
        for access in [Access::Peek, Access::Read] {
            assert!(open(&path, OpenOptions::new(access)).is_err(), "{}", path.display());
        }
    }
}

/// Swaps what a name stands for while an image that names it is opened over and over.
fn race(swapped: &str, name: &str) {
    let place = Place::new();
    let inside = place.inside();
    fs::write(inside.join("own"), b"harmless".repeat(MIB as usize / 8)).unwrap();
    fs::create_dir(inside.join("own-folder")).unwrap();
    fs::hard_link(inside.join("own"), inside.join("own-folder/secret")).unwrap();
    let path = inside.join("disk.vmdk");
    fs::write(&path, descriptor(&[&format!("RW 2048 FLAT \"{name}\" 0")], None)).unwrap();
    let stop = AtomicBool::new(false);
    let (mut harmless, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let target = inside.join(swapped);
            while !stop.load(Ordering::Relaxed) {
                for source in ["own", "link-secret", "own-folder", "linked"] {
                    let folder = source == "own-folder" || source == "linked";
                    if folder != name.contains('/') {
                        continue;
                    }
                    let temporary = inside.join("temporary");
                    let moved = if source == "own-folder" {
                        fs::create_dir(&temporary).and_then(|()| {
                            fs::hard_link(inside.join("own"), temporary.join("secret"))
                        })
                    } else if source == "own" {
                        fs::hard_link(inside.join("own"), &temporary)
                    } else {
                        symlink(fs::read_link(inside.join(source)).unwrap(), &temporary)
                    };
                    moved.unwrap();
                    let flags = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
                    if !target.exists() {
                        fs::rename(&temporary, &target).unwrap();
                    } else {
                        let here = nix::fcntl::AT_FDCWD;
                        nix::fcntl::renameat2(here, &temporary, here, &target, flags).unwrap();
                        let gone = fs::remove_file(&temporary);
                        gone.or_else(|_| fs::remove_dir_all(&temporary)).unwrap();
                    }
                }
            }
        });
        for _ in 0..common::number("FLATDISK_RACES", 3000) {
            match formats::open(&HostFs::shared(), &path, &OpenOptions::new(Access::Peek)) {
                Ok(image) => {
                    let mut bytes = [0; 8];
                    image.disk.read_at(0, &mut bytes).unwrap();
                    assert_eq!(bytes, *b"harmless");
                    harmless += 1;
                }
                Err(e) => {
                    assert!(is_refusal(e.kind()), "{e}");
                    refused += 1;
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!("{name}: {harmless} times harmless, {refused} times refused");
}

#[test]
fn a_file_swapped_for_a_symlink_is_never_followed() {
    race("extent", "extent");
}

#[test]
fn a_folder_swapped_for_a_symlink_is_never_followed() {
    race("folder", "folder/secret");
}

/// Opens every image of the folder that the environment names; run by the test below.
#[test]
#[ignore = "the traced half of another test"]
fn opens_the_images_of_a_folder() {
    let Some(folder) = std::env::var_os("FLATDISK_CONFINED") else { return };
    let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    let shared = OpenOptions::new(Access::Peek);
    for path in
        paths.iter().filter(|p| p.file_name().unwrap().to_str().unwrap().starts_with("image-"))
    {
        for access in [Access::Peek, Access::Write] {
            for force in [false, true] {
                let options = OpenOptions { force, access, ..shared.clone() };
                let _ = formats::open(&HostFs::shared(), path, &options);
                let _ = formats::check(&HostFs::shared(), path, &options);
            }
        }
    }
}

#[test]
fn the_kernel_sees_nothing_outside_opened() {
    if !tools::have("strace") {
        return;
    }
    let place = Place::new();
    let images = images(&place);
    let trace = place.root.path().join("trace");
    let output = Command::new("strace")
        .args(["-f", "-y", "-e", "trace=open,openat,openat2,creat,connect", "-o"])
        .arg(&trace)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "opens_the_images_of_a_folder", "--ignored"])
        .env("FLATDISK_CONFINED", place.inside())
        .output()
        .unwrap();
    if !output.status.success() && tools::both(&output).contains("ptrace") {
        return common::skip("processes cannot be traced here");
    }
    assert!(output.status.success(), "{}", tools::both(&output));
    let text = fs::read_to_string(&trace).unwrap();
    let root = place.root.path().to_str().unwrap();
    let inside = place.inside();
    let inside = inside.to_str().unwrap();
    let (mut opened, mut wrong) = (0, Vec::new());
    let first = text.lines().position(|line| line.contains("image-0.")).expect("images are opened");
    for line in text.lines().skip(first) {
        if line.contains("connect(") {
            wrong.push(line);
        }
        let Some((_, result)) = line.rsplit_once(" = ") else { continue };
        let Some((_, file)) = result.split_once('<') else { continue };
        let file = file.rsplit_once('>').map_or(file, |(file, _)| file);
        opened += usize::from(file.starts_with(inside));
        // The C library's allocator asks how freely the kernel gives memory.
        if file == "/proc/sys/vm/overcommit_memory" {
            continue;
        }
        let special = ["/fifo", "/socket"].iter().any(|name| file.ends_with(name));
        let elsewhere = ["/dev", "/proc", root].iter().any(|dir| file.starts_with(dir))
            && !file.starts_with(inside);
        // A FIFO can only be told from a file once it is open.
        if elsewhere || special && !line.contains("O_NONBLOCK") {
            wrong.push(line);
        }
    }
    println!("{opened} files opened for {} images", images.len());
    assert!(opened >= images.len(), "only {opened} files opened");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
