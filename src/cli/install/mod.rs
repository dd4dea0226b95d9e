//! `install-helpers`: puts the program, and what belongs to it, where Linux looks for it.
//!
//! Everything comes out of the running program itself, so that a binary alone can be installed. The
//! helpers of mount(8) and umount(8) are links to the program, and always lie in `/sbin`: mount(8)
//! looks for them nowhere else, whatever the prefix.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::Args;
use clap_complete::Shell;

use super::output::{complain, print_line};
use super::pages;
use crate::error::{Error, ErrorKind, Result};

/// Names by which mount(8) and umount(8) call the program. The last one is called for other FUSE mounts
/// too, which it hands back.
const HELPERS: [&str; 5] = [
    "mount.flatdisk",
    "mount.fuse.flatdisk",
    "umount.flatdisk",
    "umount.fuse.flatdisk",
    "umount.fuse",
];

/// The program as the unit files name it.
const PROGRAM_IN_UNITS: &str = "/usr/bin/flatdisk";

/// Files installed as they are, below the prefix.
const FILES: [(&str, &str); 5] = [
    ("share/applications/flatdisk.desktop", include_str!("desktop/flatdisk.desktop")),
    ("share/mime/packages/flatdisk.xml", include_str!("desktop/flatdisk.xml")),
    (
        "share/metainfo/org.flatdisk.flatdisk.metainfo.xml",
        include_str!("desktop/org.flatdisk.flatdisk.metainfo.xml"),
    ),
    (
        "share/doc/flatdisk/examples/mnt-flat.mount",
        include_str!("../../../systemd/examples/mnt-flat.mount"),
    ),
    (
        "share/doc/flatdisk/examples/mnt-flat.automount",
        include_str!("../../../systemd/examples/mnt-flat.automount"),
    ),
];

/// Unit files, below the prefix, in which the program's path is put right.
const UNITS: [(&str, &str); 2] = [
    ("lib/systemd/system/flatdisk@.service", include_str!("../../../systemd/flatdisk@.service")),
    ("lib/systemd/user/flatdisk@.service", include_str!("../../../systemd/user/flatdisk@.service")),
];

/// Directories that nobody but an installation makes, below the prefix.
const OWN_DIRECTORIES: [&str; 2] = ["share/doc/flatdisk", "share/doc/flatdisk/examples"];

/// Arguments of `flatdisk install-helpers`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  On this machine, below /usr/local, with the mount helpers in /sbin:
    sudo target/release/flatdisk install-helpers
  Into the staging directory of a package:
    flatdisk install-helpers --root debian/flatdisk --prefix /usr
  Remove it all again:
    sudo flatdisk install-helpers --uninstall")]
pub struct InstallArgs {
    /// Directory that stands for `/`, as for a package or a container.
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// Where the program and its files go; only the mount helpers always go to /sbin.
    #[arg(long, value_name = "DIR", default_value = "/usr/local")]
    prefix: PathBuf,
    /// Print what would be installed or removed, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Remove what the same command without this flag installs.
    #[arg(long)]
    uninstall: bool,
    /// Do not print what is laid or taken away.
    #[arg(long, short)]
    quiet: bool,
}

/// What lies at a path.
enum Content {
    /// The running program.
    Program,
    /// A file.
    File(Vec<u8>),
    /// A symlink with this text.
    Link(PathBuf),
}

/// Installs, or removes, the program and all that belongs to it.
pub fn install(args: &InstallArgs) -> Result<u8> {
    if !args.prefix.is_absolute() {
        return Err(Error::invalid("--prefix must be an absolute path").in_file(&args.prefix));
    }
    for (place, content) in files(args)? {
        // Joining an absolute path would lose the root.
        let path = args.root.join(place.strip_prefix("/").unwrap_or(&place));
        if !args.uninstall && is_foreign(&path, &content) {
            complain(format_args!("{}: there is one already; left as it is", path.display()));
            continue;
        }
        let changed = match (args.dry_run, args.uninstall) {
            (true, uninstalling) => !uninstalling || is_ours(&path, &content),
            (false, true) => remove(&path, &content)?,
            (false, false) => lay(&path, &content).map(|()| true)?,
        };
        if changed && (!args.quiet || args.dry_run) {
            print_line(&path.display().to_string())?;
        }
    }
    if args.root == Path::new("/") && !args.dry_run {
        refresh_caches(&args.prefix);
    }
    Ok(0)
}

/// What belongs where; links come after what they lead to.
fn files(args: &InstallArgs) -> Result<Vec<(PathBuf, Content)>> {
    let prefix = &args.prefix;
    let program = prefix.join("bin/flatdisk");
    let mut files = vec![(program.clone(), Content::Program)];
    let mut add = |below: &str, text: &[u8]| {
        files.push((prefix.join(below), Content::File(text.to_vec())));
    };
    for (name, page) in pages::pages()? {
        let section = name.rsplit('.').next().unwrap_or_default();
        add(&format!("share/man/man{section}/{name}"), &page);
    }
    // What a distribution installs, it keeps apart from what an administrator adds.
    let zsh = match prefix == Path::new("/usr") {
        true => "share/zsh/vendor-completions/_flatdisk",
        false => "share/zsh/site-functions/_flatdisk",
    };
    add("share/bash-completion/completions/flatdisk", pages::completion(Shell::Bash).as_bytes());
    add(zsh, pages::completion(Shell::Zsh).as_bytes());
    add("share/fish/vendor_completions.d/flatdisk.fish", pages::completion(Shell::Fish).as_bytes());
    for (below, text) in UNITS {
        let program = program.display().to_string();
        add(below, text.replace(PROGRAM_IN_UNITS, &program).as_bytes());
    }
    for (below, text) in FILES {
        add(below, text.as_bytes());
    }
    let helpers = helper_directory(&args.root);
    let target = relative(&helpers, &program);
    files.extend(HELPERS.map(|name| (helpers.join(name), Content::Link(target.clone()))));
    Ok(files)
}

/// Where mount(8) looks for helpers: `/sbin`, which most distributions keep in `/usr`.
fn helper_directory(root: &Path) -> PathBuf {
    let own = fs::symlink_metadata(root.join("sbin")).is_ok_and(|meta| meta.is_dir());
    if own { "/sbin".into() } else { "/usr/sbin".into() }
}

/// The text of a link in `directory` that leads to `target` below any root; both are absolute.
fn relative(directory: &Path, target: &Path) -> PathBuf {
    let shared = directory.components().zip(target.components()).take_while(|(a, b)| a == b);
    let shared = shared.count();
    let up = directory.components().skip(shared).map(|_| Path::new(".."));
    up.chain(target.components().skip(shared).map(|part| Path::new(part.as_os_str()))).collect()
}

/// Puts one file or link in its place at once: a program that is running is replaced, not changed.
fn lay(path: &Path, content: &Content) -> Result<()> {
    let try_lay = || -> io::Result<()> {
        let directory = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(directory)?;
        let mut new = tempfile::Builder::new();
        new.prefix(".flatdisk-");
        let mode = match content {
            Content::Link(target) => {
                new.make_in(directory, |path| symlink(target, path))?
                    .into_temp_path()
                    .persist(path)?;
                return Ok(());
            }
            Content::Program => 0o755,
            Content::File(_) => 0o644,
        };
        let mut file = new.tempfile_in(directory)?;
        match content {
            Content::Program => {
                let mut own = fs::File::open("/proc/self/exe")?;
                io::copy(&mut own, &mut file)?;
            }
            Content::File(text) => file.write_all(text)?,
            Content::Link(_) => {}
        }
        // Whatever the umask: these files are for everybody.
        file.as_file().set_permissions(fs::Permissions::from_mode(mode))?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    try_lay().map_err(|e| failed("install", &e, path))
}

/// Whether there is something to remove; a link that leads elsewhere is somebody else's.
fn is_ours(path: &Path, content: &Content) -> bool {
    match content {
        Content::Link(target) => fs::read_link(path).is_ok_and(|link| link == *target),
        _ => fs::symlink_metadata(path).is_ok(),
    }
}

/// Whether a helper's name is taken by another program.
fn is_foreign(path: &Path, content: &Content) -> bool {
    let Content::Link(target) = content else { return false };
    let is_program = |path: &Path| path.file_name() == target.file_name();
    match fs::read_link(path) {
        Ok(link) => !is_program(&link),
        Err(_) => fs::symlink_metadata(path).is_ok(),
    }
}

/// Removes a file or link, if it is there, and directories of our own that are empty then.
fn remove(path: &Path, content: &Content) -> Result<bool> {
    if !is_ours(path, content) {
        return Ok(false);
    }
    fs::remove_file(path).map_err(|e| failed("remove", &e, path))?;
    let own = |directory: &&Path| OWN_DIRECTORIES.iter().any(|own| directory.ends_with(own));
    for directory in path.ancestors().skip(1).take_while(own) {
        // It may hold what somebody else put there.
        let _ = fs::remove_dir(directory);
    }
    Ok(true)
}

fn failed(what: &'static str, e: &io::Error, path: &Path) -> Error {
    let error = Error::io(what, e).in_file(path);
    match error.kind() {
        ErrorKind::Denied => error.hint("run it as root, or with --root"),
        _ => error,
    }
}

/// Lets desktops see the new types and the program for them, where these caches are in use.
fn refresh_caches(prefix: &Path) {
    for (program, directory) in
        [("update-mime-database", "share/mime"), ("update-desktop-database", "share/applications")]
    {
        let mut refresh = Command::new(program);
        refresh.arg(prefix.join(directory)).stdin(Stdio::null()).stdout(Stdio::null());
        match refresh.status() {
            Ok(status) if !status.success() => complain(format_args!("{program}: {status}")),
            // A machine without a desktop has no cache either.
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_lead_to_the_program_below_any_root() {
        for (directory, target, link) in [
            ("/usr/sbin", "/usr/bin/flatdisk", "../bin/flatdisk"),
            ("/usr/sbin", "/usr/local/bin/flatdisk", "../local/bin/flatdisk"),
            ("/sbin", "/usr/bin/flatdisk", "../usr/bin/flatdisk"),
            ("/usr/sbin", "/opt/bin/flatdisk", "../../opt/bin/flatdisk"),
        ] {
            assert_eq!(relative(Path::new(directory), Path::new(target)), Path::new(link));
        }
    }

    #[test]
    fn units_name_the_program_that_is_replaced() {
        for (name, text) in UNITS {
            assert!(text.contains(&format!("ExecStart={PROGRAM_IN_UNITS} ")), "{name}");
        }
    }
}
