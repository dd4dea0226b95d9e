//! Children of other images, and images with bits that creating does not set.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use flatdisk::disk::Disk;
use flatdisk::error::Result;
use flatdisk::formats::{self, OpenOptions};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::{Access, Host, Storage};

use super::images::{Image, Kind, Tweak, errors, identity};
use super::pattern;

const MIB: u64 = 1 << 20;
/// Stamps of what the parents hold.
const PARENT_STAMP: u32 = 0x0200_0000;

/// A child of an image that holds some data.
struct Child {
    parent: Image,
    /// Changed by hand in the child after creation.
    tweak: Option<Tweak>,
}

impl Child {
    fn path(&self) -> PathBuf {
        Path::new("/t/child").with_extension(self.parent.format)
    }
}

impl Kind for Child {
    fn name(&self) -> String {
        let tweak = self.tweak.map_or(String::new(), |(name, _)| format!(", {name}"));
        format!("child of {}{tweak}", self.parent.name())
    }

    fn create(&self, host: &Arc<MemoryHost>) -> Result<()> {
        let path = self.parent.path();
        self.parent.create_at(&**host, &path)?;
        let dynamic: Arc<dyn Host> = host.clone();
        let disk = formats::open(&dynamic, &path, &OpenOptions::new(Access::Write))?.disk;
        let size = disk.size();
        let block = disk.geometry().block_size.min(MIB);
        for (index, at) in [0, block - 1024, block * 2, size / 2, size - 2048].iter().enumerate() {
            let at = at / 512 * 512;
            disk.write_at(at, &pattern::bytes(PARENT_STAMP + index as u32, at, 2048))?;
        }
        disk.close()?;
        drop(disk);
        let parent = formats::open(&dynamic, &path, &OpenOptions::new(Access::Read))?;
        match self.parent.format {
            "vhd" => {
                let block = self.parent.spec.block_size;
                formats::vhd::create_child(&**host, &self.path(), &parent, block)?;
            }
            "vhdx" => {
                formats::vhdx::create_child(&**host, &self.path(), &parent, &self.parent.spec)?;
            }
            _ => formats::vmdk::create_child(
                &**host,
                &self.path(),
                &parent,
                &formats::CreateSpec::default(),
            )?,
        }
        if let Some((_, tweak)) = self.tweak {
            tweak(host);
        }
        Ok(())
    }

    fn open(&self, host: &Arc<dyn Host>, access: Access) -> Result<Arc<Disk>> {
        Ok(formats::open(host, &self.path(), &OpenOptions::new(access))?.disk)
    }

    fn errors(&self, host: &Arc<dyn Host>) -> Result<Vec<String>> {
        errors(host, &self.path())
    }

    fn identity(&self, host: &Arc<dyn Host>) -> Result<Option<String>> {
        identity(host, &self.path())
    }

    fn stride(&self) -> Option<u64> {
        self.parent.stride
    }

    fn share(&self) -> usize {
        self.parent.share
    }
}

/// Children of every kind.
pub fn all() -> Vec<Box<dyn Kind>> {
    let vhd = Image::new("vhd", "dynamic", 3 * MIB + 512).block(MIB / 2);
    let vhdx = Image::new("vhdx", "dynamic", 5 * MIB + 4096).block(MIB);
    let vmdk = |subformat| Image::new("vmdk", subformat, 5 * MIB + 512);
    let parents = vec![
        vhd.clone(),
        vhdx.clone().sector(512),
        vhdx.sector(4096).variant(),
        vmdk("monolithicSparse"),
        vmdk("twoGbMaxExtentSparse").variant(),
        // Its children are of the sparse format of ESX.
        vmdk("vmfs").variant(),
    ];
    // Each state has two images with long tables.
    let mut wide = Image::new("vhdx", "dynamic", 0).block(MIB).sector(512).wide(512 * MIB);
    wide.share *= 4;
    let child = |parent| Child { parent, tweak: None };
    let tweaked = |parent: Image, tweak| Child { parent: parent.variant(), tweak: Some(tweak) };
    let mut children: Vec<_> = parents.into_iter().chain([wide]).map(child).collect();
    children.push(tweaked(vhd, ("stale space", leave_stale_space)));
    children.push(tweaked(
        vmdk("monolithicSparse"),
        ("zeroed grains", |host| zeroed_grains_at(host, Path::new("/t/child.vmdk"))),
    ));
    children.into_iter().map(|child| Box::new(child) as Box<dyn Kind>).collect()
}

fn put(host: &MemoryHost, path: &Path, at: u64, bytes: &[u8]) {
    let file = host.file(path).expect("the driver made the file");
    file.write_at(at, bytes).expect("memory takes all writes");
}

/// Puts unused space that is not zero between a VHD child and its footer.
fn leave_stale_space(host: &Arc<MemoryHost>) {
    let path = Path::new("/t/child.vhd");
    let file = host.file(path).expect("the driver made the file");
    let footer_at = file.len().expect("memory has lengths") - 512;
    let mut footer = [0; 512];
    file.read_at(footer_at, &mut footer).expect("memory takes all reads");
    put(host, path, footer_at, &vec![0xff; 3 * MIB as usize]);
    put(host, path, footer_at + 3 * MIB, &footer);
}

/// Changes some bytes of the test's image, which is one file.
pub fn poke(host: &MemoryHost, at: u64, bytes: &[u8]) {
    let files = host.files();
    let [file] = &files[..] else { panic!("an image of one file") };
    put(host, file.path(), at, bytes);
}

/// Lets grain tables of the test's sparse VMDK say "zeroes".
pub fn allow_zeroed_grains(host: &Arc<MemoryHost>) {
    zeroed_grains_at(host, Path::new("/t/disk.vmdk"));
}

/// Sets version 2 and the flag that goes with it; other flags are those of every new image.
fn zeroed_grains_at(host: &MemoryHost, path: &Path) {
    put(host, path, 4, &2u32.to_le_bytes());
    put(host, path, 8, &7u32.to_le_bytes());
}
