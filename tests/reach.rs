//! What an image may reach: of what it names, its owner's files and those that are open to him, and
//! nothing else, whoever opens it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flatdisk::error::{ErrorKind, Result};
use flatdisk::formats::{self, CreateSpec, OpenOptions};
use flatdisk::storage::file::HostFs;
use flatdisk::storage::{Access, Host};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const ALICE: u32 = 61_001;
const BOB: u32 = 61_002;
/// What alice shows to nobody.
const SECRET: &[u8] = b"for alice's eyes only";

/// A folder of many users.
struct Shared {
    root: TempDir,
}

impl Shared {
    /// `None`, aloud, where this user cannot act for others.
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            common::skip("only root has files of other users");
            return None;
        }
        let shared = Self { root: common::folder() };
        shared.open_to_all("");
        Some(shared)
    }

    fn at(&self, name: &str) -> PathBuf {
        if name.is_empty() { self.root.path().to_owned() } else { self.root.path().join(name) }
    }

    fn open_to_all(&self, name: &str) {
        fs::set_permissions(self.at(name), Permissions::from_mode(0o777)).unwrap();
    }

    /// Gives a file to a user, with a mode.
    fn give(&self, name: &str, user: u32, mode: u32) {
        chown(self.at(name), Some(user), Some(user)).unwrap();
        fs::set_permissions(self.at(name), Permissions::from_mode(mode)).unwrap();
    }

    /// An image with the secret in it, nobody's yet.
    fn disk(&self, name: &str) {
        let spec = CreateSpec {
            subformat: Some(
                if name.ends_with("vmdk") { "monolithicSparse" } else { "dynamic" }.into(),
            ),
            size: 4 * MIB,
            ..CreateSpec::default()
        };
        let path = self.at(name);
        formats::create(formats::by_extension(&path).unwrap(), &HostFs, &path, &spec).unwrap();
        let disk = open(&path, Access::Write).unwrap().disk;
        disk.write_at(0, SECRET).unwrap();
        disk.close().unwrap();
    }

    /// A child of one of the images.
    fn child(&self, name: &str, parent: &str) {
        let parent = open(&self.at(parent), Access::Read).unwrap();
        let (path, spec) = (self.at(name), CreateSpec::default());
        let format = formats::by_extension(&path).unwrap();
        formats::create_child(format, &HostFs, &path, &parent, &spec).unwrap();
    }

    /// A descriptor of a flat extent.
    fn descriptor(&self, name: &str, extent: &str) {
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=ffffffff\n\
             createType=\"custom\"\nRW 2048 FLAT \"{extent}\" 0\n"
        );
        fs::write(self.at(name), text).unwrap();
    }

    /// A raw file with the secret in it.
    fn raw(&self, name: &str) {
        let mut bytes = SECRET.to_vec();
        bytes.resize(MIB as usize, 0);
        fs::write(self.at(name), bytes).unwrap();
    }

    fn contents(&self, name: &str, access: Access) -> Result<Vec<u8>> {
        let image = open(&self.at(name), access)?;
        let mut bytes = vec![0; SECRET.len()];
        image.disk.read_at(0, &mut bytes)?;
        Ok(bytes)
    }

    /// An image that its owner may have all of.
    fn opens(&self, name: &str) {
        for access in [Access::Peek, Access::Read, Access::Write] {
            assert_eq!(self.contents(name, access).unwrap(), SECRET, "{name}, {access:?}");
        }
    }

    /// An image that names what its owner may not have.
    fn refused(&self, name: &str) {
        for access in [Access::Peek, Access::Read, Access::Write] {
            let e = self.contents(name, access).expect_err(name);
            let denied = [ErrorKind::Denied, ErrorKind::ParentMissing];
            assert!(denied.contains(&e.kind()), "{name}, {access:?}: {e}");
        }
    }
}

fn open(path: &Path, access: Access) -> Result<formats::Image> {
    let host: Arc<dyn Host> = HostFs::shared();
    formats::open(&host, path, &OpenOptions::new(access))
}

#[test]
fn an_extent_opens_if_the_descriptors_owner_may_open_it() {
    let Some(shared) = Shared::new() else { return };
    shared.raw("flat");
    shared.descriptor("disk.vmdk", "flat");
    for (owner, mode, others) in [
        (BOB, 0o600, true),
        (ALICE, 0o666, true),
        (ALICE, 0o600, false),
        (ALICE, 0o660, false),
        (0, 0o600, false),
    ] {
        shared.give("flat", owner, mode);
        shared.give("disk.vmdk", BOB, 0o644);
        match others {
            true => shared.opens("disk.vmdk"),
            false => shared.refused("disk.vmdk"),
        }
        // Root's images are root's matter.
        shared.give("disk.vmdk", 0, 0o644);
        shared.opens("disk.vmdk");
    }
    // Reading is one thing, writing another.
    shared.give("flat", ALICE, 0o644);
    shared.give("disk.vmdk", BOB, 0o644);
    assert_eq!(shared.contents("disk.vmdk", Access::Read).unwrap(), SECRET);
    assert!(shared.contents("disk.vmdk", Access::Write).is_err());
}

#[test]
fn what_lies_in_a_private_folder_is_reached_by_its_owner_only() {
    let Some(shared) = Shared::new() else { return };
    fs::create_dir(shared.at("private")).unwrap();
    shared.raw("private/flat");
    shared.give("private/flat", ALICE, 0o666);
    shared.give("private", ALICE, 0o700);
    shared.descriptor("disk.vmdk", "private/flat");
    shared.give("disk.vmdk", BOB, 0o666);
    shared.refused("disk.vmdk");
    shared.give("disk.vmdk", ALICE, 0o600);
    shared.opens("disk.vmdk");
}

#[test]
fn a_parent_opens_if_all_who_name_it_may_open_it() {
    let Some(shared) = Shared::new() else { return };
    for format in ["vhd", "vhdx", "vmdk"] {
        let [base, middle, top] = ["base", "middle", "top"].map(|name| format!("{name}.{format}"));
        shared.disk(&base);
        shared.child(&middle, &base);
        shared.child(&top, &middle);
        shared.give(&base, ALICE, 0o600);
        shared.give(&middle, BOB, 0o644);
        shared.give(&top, BOB, 0o644);
        shared.refused(&middle);
        shared.refused(&top);
        // Also where somebody stands between who may open it.
        shared.give(&middle, ALICE, 0o644);
        shared.opens(&middle);
        shared.refused(&top);
        shared.give(&top, ALICE, 0o644);
        shared.opens(&top);
        shared.give(&base, ALICE, 0o604);
        shared.give(&top, BOB, 0o644);
        shared.opens(&top);
        shared.give(&base, 0, 0o600);
        shared.give(&middle, 0, 0o600);
        shared.give(&top, 0, 0o600);
        shared.opens(&top);
    }
}

#[test]
fn a_permitted_directory_permits_nobody_who_cannot_come_there() {
    let Some(shared) = Shared::new() else { return };
    for dir in ["home", "home/bases", "images"] {
        fs::create_dir(shared.at(dir)).unwrap();
        shared.open_to_all(dir);
    }
    shared.disk("home/bases/base.vhdx");
    shared.child("home/bases/child.vhdx", "home/bases/base.vhdx");
    fs::rename(shared.at("home/bases/child.vhdx"), shared.at("images/child.vhdx")).unwrap();
    shared.give("images/child.vhdx", BOB, 0o600);
    let opened = || {
        let mut options = OpenOptions::new(Access::Read);
        options.allow_parent.push(shared.at("home/bases"));
        formats::open(&HostFs::shared(), &shared.at("images/child.vhdx"), &options).is_ok()
    };
    assert!(opened());
    shared.give("home", ALICE, 0o700);
    assert!(!opened());
    shared.give("images/child.vhdx", ALICE, 0o600);
    assert!(opened());
}
