//! What a volume holds: file systems and containers by their signatures.
//!
//! Containers are looked for before file systems: a member of a RAID or a volume group may show the
//! old magic of a file system. Everything derived from a structure is held against the volume's size,
//! so that a few stray bytes do not make a file system.
//!
//! # Files
//!
//! - `containers`: what holds volumes, or memory, rather than files;
//! - `ext`: ext2, ext3 and ext4, by the first superblock or one of its copies;
//! - `linux`: file systems of Linux beside ext;
//! - `others`: file systems of optical discs, Apple and VMware;
//! - `usage`: how much of NTFS and exFAT is free;
//! - `windows`: file systems of Windows, and its encryption.

mod containers;
mod ext;
mod linux;
mod others;
mod usage;
mod windows;

use std::cell::{Cell, RefCell};

use serde::Serialize;

use super::bytes::Bytes;
use crate::codec::hex;
use crate::disk::Disk;
use crate::disk::window::Window;
use crate::error::Error;

pub(super) use ext::from_backup as ext_from_backup;

/// How much of the start most signatures lie in: that of btrfs reaches furthest.
const HEAD: u64 = 68 << 10;
/// How much of a volume must be zeroes for it to count as empty.
const EMPTY: u64 = 1 << 20;

/// What sort of thing a volume holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Kind {
    /// A file system.
    Filesystem,
    /// Swap space.
    Swap,
    /// A part of a volume group, a RAID or a pool.
    Container,
    /// Encrypted.
    Encrypted,
    /// Nothing known.
    Unknown,
    /// Zeroes, as far as it was looked at (1 MiB).
    Empty,
}

/// What a volume holds. Field names are the stable names of the JSON form; sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Content {
    /// What sort of thing it is.
    pub kind: Kind,
    /// Its type, by the name that blkid(8) and mount(8) have for it.
    #[serde(rename = "type")]
    pub type_name: Option<&'static str>,
    /// The type's variant, as blkid(8) tells it.
    pub version: Option<String>,
    /// The label given to it.
    pub label: Option<String>,
    /// Its UUID or serial number, in the type's usual form.
    pub uuid: Option<String>,
    /// The size that it says it has.
    pub size: Option<u64>,
    /// Its unit of allocation.
    pub block_size: Option<u64>,
    /// How much of [`Self::size`] is free, as it says.
    pub free: Option<u64>,
    /// The first bytes of what is not known, in hexadecimal.
    pub head: Option<String>,
    /// What is odd about it.
    pub warnings: Vec<String>,
}

impl Content {
    fn new(kind: Kind, type_name: &'static str) -> Self {
        Self { type_name: Some(type_name), ..Self::untyped(kind) }
    }

    fn untyped(kind: Kind) -> Self {
        Self {
            kind,
            type_name: None,
            version: None,
            label: None,
            uuid: None,
            size: None,
            block_size: None,
            free: None,
            head: None,
            warnings: Vec::new(),
        }
    }

    /// Whether anything is known about the content.
    pub fn recognised(&self) -> bool {
        self.type_name.is_some()
    }
}

/// A volume that is looked at. Only its first `reach` bytes are read, and its end only where that is
/// all of it.
pub(super) struct Probe<'a> {
    window: Window<&'a Disk>,
    reach: u64,
    head: Vec<u8>,
    /// Why something could not be read.
    failed: RefCell<Option<Error>>,
    /// Bytes that may still be read only to count what is free; of all volumes of a disk.
    budget: &'a Cell<u64>,
}

impl<'a> Probe<'a> {
    pub fn new(window: Window<&'a Disk>, reach: u64, budget: &'a Cell<u64>) -> Self {
        let reach = reach.min(window.size());
        let failed = RefCell::new(None);
        let mut probe = Self { window, reach, head: Vec::new(), failed, budget };
        probe.head = probe.read_around_damage(reach.min(HEAD));
        probe
    }

    /// The first `len` bytes; pages that cannot be read are zeroes.
    fn read_around_damage(&self, len: u64) -> Vec<u8> {
        const PAGE: usize = 4096;
        let mut bytes = vec![0; len as usize];
        if self.window.read_at(0, &mut bytes).is_err() {
            for (at, page) in (0..).step_by(PAGE).zip(bytes.chunks_mut(PAGE)) {
                if let Err(e) = self.window.read_at(at, page) {
                    page.fill(0);
                    self.failed.borrow_mut().get_or_insert(e);
                }
            }
        }
        bytes
    }

    /// The volume's size.
    fn size(&self) -> u64 {
        self.window.size()
    }

    /// The first [`HEAD`] bytes.
    fn head(&self) -> Bytes<'_> {
        Bytes(&self.head)
    }

    /// `len` bytes at `at`, if they may be looked at and can be read.
    fn read(&self, at: u64, len: usize) -> Option<Vec<u8>> {
        if at.checked_add(len as u64)? > self.reach {
            return None;
        }
        let mut bytes = vec![0; len];
        match self.window.read_at(at, &mut bytes) {
            Ok(()) => Some(bytes),
            Err(e) => {
                self.failed.borrow_mut().get_or_insert(e);
                None
            }
        }
    }

    /// Whether something of `size` bytes may be here: it fits, or the volume lost its end.
    fn fits(&self, size: u64) -> bool {
        size > 0 && size / 4 <= self.size()
    }
}

/// Every signature, in the order of preference.
const SIGNATURES: [fn(&Probe<'_>) -> Option<Content>; 23] = [
    containers::luks,
    windows::bitlocker,
    containers::lvm,
    containers::md,
    containers::zfs,
    containers::swap,
    ext::ext,
    linux::xfs,
    linux::btrfs,
    linux::f2fs,
    linux::erofs,
    linux::squashfs,
    windows::ntfs,
    windows::exfat,
    windows::refs,
    windows::fat,
    others::udf,
    others::iso9660,
    others::apfs,
    others::hfs_plus,
    others::hfs,
    others::vmfs,
    others::vmfs_member,
];

/// Looks at a volume.
pub(super) fn probe(probe: &Probe<'_>) -> Content {
    let mut content = SIGNATURES
        .iter()
        .find_map(|signature| signature(probe))
        .unwrap_or_else(|| nothing_known(probe));
    if let Some(size) = content.size
        && size > probe.size()
    {
        content.warnings.push("its end is cut off".to_owned());
    }
    if let Some(failure) = probe.failed.take() {
        content.warnings.push(failure.to_string());
    }
    content
}

fn nothing_known(probe: &Probe<'_>) -> Content {
    let zeroes = probe.head.iter().all(|byte| *byte == 0)
        && probe
            .read(0, probe.reach.min(EMPTY) as usize)
            .is_some_and(|b| b.iter().all(|b| *b == 0));
    if zeroes {
        return Content::untyped(Kind::Empty);
    }
    let head = hex(&probe.head[..probe.head.len().min(16)]);
    Content { head: Some(head), ..Content::untyped(Kind::Unknown) }
}
