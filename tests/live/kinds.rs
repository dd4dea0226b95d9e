//! One image of every kind that is written in its own way.

use std::path::{Path, PathBuf};

use flatdisk::formats::{self, OpenOptions};
use flatdisk::storage::{Access, file::HostFs};

use super::{create, flatdisk, succeed};

/// A kind of image that can be written.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// Name of the image.
    pub image: &'static str,
    /// Name of the parent, if it is a child.
    pub parent: Option<&'static str>,
    options: &'static [&'static str],
    /// What QEMU calls the format, where it reads the kind.
    pub qemu: Option<&'static str>,
}

/// All kinds.
pub const KINDS: [Kind; 8] = [
    Kind {
        image: "dynamic.vhd",
        parent: None,
        options: &["--block-size", "512K"],
        qemu: Some("vpc"),
    },
    Kind {
        image: "fixed.vhd",
        parent: None,
        // Sparse, so that a host can fill up under it.
        options: &["--subformat", "fixed", "--preallocation", "off"],
        qemu: Some("vpc"),
    },
    Kind { image: "child.vhd", parent: Some("base.vhd"), options: &[], qemu: None },
    Kind {
        image: "dynamic.vhdx",
        parent: None,
        options: &["--block-size", "1M"],
        qemu: Some("vhdx"),
    },
    Kind { image: "child.vhdx", parent: Some("base.vhdx"), options: &[], qemu: None },
    Kind { image: "sparse.vmdk", parent: None, options: &[], qemu: Some("vmdk") },
    Kind { image: "delta.vmdk", parent: Some("base.vmdk"), options: &[], qemu: Some("vmdk") },
    Kind {
        image: "flat.vmdk",
        parent: None,
        options: &["--subformat", "monolithicFlat", "--preallocation", "off"],
        qemu: Some("vmdk"),
    },
];

impl Kind {
    /// Makes the image in `folder`. A parent holds `contents`, which is also what the child reads;
    /// without one all is zero.
    pub fn make(&self, folder: &Path, size: &str, contents: &[u8]) -> PathBuf {
        let path = folder.join(self.image);
        let Some(parent) = self.parent else {
            create(&path, size, self.options);
            return path;
        };
        let parent = folder.join(parent);
        let options: &[&str] =
            if self.image.ends_with("vmdk") { &[] } else { &["--block-size", "1M"] };
        create(&parent, size, options);
        let disk = formats::open(&HostFs::shared(), &parent, &OpenOptions::new(Access::Write))
            .expect("open the parent")
            .disk;
        disk.write_at(0, contents).expect("write the parent");
        disk.close().expect("close the parent");
        drop(disk);
        succeed(flatdisk().args(["create", "-q", "--parent"]).arg(parent).arg(&path));
        path
    }

    /// The file that holds most of the image's data.
    pub fn data_file(&self, folder: &Path) -> PathBuf {
        let name = if self.image == "flat.vmdk" { "flat-flat.vmdk" } else { self.image };
        folder.join(name)
    }
}
