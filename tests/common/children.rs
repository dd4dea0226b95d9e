//! Images that a driver is not asked to create: children of others, and headers with rare bits. Made
//! by hand from what the driver does create.

use std::path::Path;
use std::sync::Arc;

use flatdisk::disk::Disk;
use flatdisk::error::{Error, ErrorKind, Result};
use flatdisk::formats::{self, OpenOptions};
use flatdisk::storage::memory::MemoryHost;
use flatdisk::storage::{Access, Host, Storage};

use super::images::{Image, Kind, offered};
use super::pattern;

const MIB: u64 = 1 << 20;
/// Stamps of what the parents hold.
const PARENT_STAMP: u32 = 0x0200_0000;

/// A child of an image that holds some data.
struct Child {
    image: Image,
    parent: Image,
    /// Turns the files at the child's path, made as those of `image`, into a child of the parent.
    link: fn(&MemoryHost, &Path, &Path),
}

impl Kind for Child {
    fn name(&self) -> String {
        format!("child of {}: {}", self.parent.name(), self.image.name())
    }

    fn create(&self, host: &Arc<MemoryHost>) -> Result<()> {
        let path = Path::new("/t/base").with_extension(self.parent.format);
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
        self.image.create_at(&**host, &self.image.path())?;
        (self.link)(host, &path, &self.image.path());
        Ok(())
    }

    fn open(&self, host: &Arc<dyn Host>, access: Access) -> Result<Arc<Disk>> {
        self.image.open(host, access)
    }

    fn errors(&self, host: &Arc<dyn Host>) -> Result<Vec<String>> {
        self.image.errors(host)
    }
}

/// Children of every kind that their drivers open; the others are named aloud.
pub fn all() -> Vec<Box<dyn Kind>> {
    let vhd = Image::new("vhd", "dynamic", 3 * MIB + 512).block(MIB / 2);
    let vhdx = Image::new("vhdx", "dynamic", 5 * MIB + 4096).block(MIB).sector(512);
    let vhdx_4k = Image::new("vhdx", "dynamic", 5 * MIB + 4096).block(MIB).sector(4096);
    let sparse = Image::new("vmdk", "monolithicSparse", 5 * MIB + 512);
    let split = Image::new("vmdk", "twoGbMaxExtentSparse", 5 * MIB + 512);
    let cowd = Image::new("vmdk", "vmfsSparse", 5 * MIB + 512);
    let flat = Image::new("vmdk", "monolithicFlat", 5 * MIB + 512);
    let zeroed = sparse.clone();
    let child = |image: &Image, parent: &Image, link| Child {
        image: image.clone(),
        parent: parent.clone(),
        link,
    };
    let children = [
        child(&vhd, &vhd, link_vhd),
        child(&vhdx, &vhdx, link_vhdx),
        child(&vhdx_4k, &vhdx_4k, link_vhdx),
        child(&sparse, &sparse, link_vmdk),
        child(&split, &flat, link_vmdk),
        child(&cowd, &flat, link_vmdk),
        child(&zeroed, &sparse, |host, parent, child| {
            link_vmdk(host, parent, child);
            zeroed_grains_at(host, child);
        }),
    ];
    let mut kinds: Vec<Box<dyn Kind>> = Vec::new();
    for child in children {
        if offered(vec![child.image.clone(), child.parent.clone()]).len() < 2 {
            continue;
        }
        match opens(&child) {
            Err(e) if e.kind() == ErrorKind::Unsupported => {
                println!("SKIPPED: {}: {e}", child.name());
            }
            // Anything else is for the tests to find.
            _ => kinds.push(Box::new(child)),
        }
    }
    kinds
}

fn opens(child: &Child) -> Result<()> {
    let memory = MemoryHost::new();
    child.create(&memory)?;
    let host: Arc<dyn Host> = memory;
    let disk = child.open(&host, Access::Write)?;
    match disk.read_only() {
        Some(reason) => Err(Error::new(ErrorKind::Unsupported, reason.to_owned())),
        None => Ok(()),
    }
}

fn file(host: &MemoryHost, path: &Path) -> Arc<dyn Storage> {
    host.file(path).expect("the driver made the file")
}

fn get<const N: usize>(file: &dyn Storage, at: u64) -> [u8; N] {
    let mut bytes = [0; N];
    file.read_at(at, &mut bytes).expect("inside the file");
    bytes
}

fn put(file: &dyn Storage, at: u64, bytes: &[u8]) {
    file.write_at(at, bytes).expect("memory takes all writes");
}

/// Rewrites the checksum of a VHD structure of `N` bytes whose checksum is at `field`.
pub fn seal_vhd<const N: usize>(file: &dyn Storage, at: u64, field: u64) {
    put(file, at + field, &[0; 4]);
    let sum = get::<N>(file, at).iter().fold(0u32, |sum, byte| sum.wrapping_add((*byte).into()));
    put(file, at + field, &(!sum).to_be_bytes());
}

fn link_vhd(host: &MemoryHost, parent: &Path, child: &Path) {
    let (parent_file, child) = (file(host, parent), file(host, child));
    let header = u64::from_be_bytes(get(&*child, 16));
    put(&*child, header + 40, &get::<16>(&*parent_file, 68));
    let name = parent.file_name().and_then(|name| name.to_str()).expect("a plain name");
    put(&*child, header + 64, &flatdisk::codec::to_utf16(name, true));
    seal_vhd::<1024>(&*child, header, 36);
    let end = child.len().expect("memory has lengths") - 512;
    for footer in [0, end] {
        put(&*child, footer + 60, &4u32.to_be_bytes());
        seal_vhd::<512>(&*child, footer, 64);
    }
}

const FILE_PARAMETERS: [u8; 16] = [
    0x37, 0x67, 0xa1, 0xca, 0x36, 0xfa, 0x43, 0x4d, 0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b,
];
const PARENT_LOCATOR: [u8; 16] = [
    0x2d, 0x5f, 0xd3, 0xa8, 0x0b, 0xb3, 0x4d, 0x45, 0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c,
];
const LOCATOR_TYPE: [u8; 16] = [
    0xb7, 0xef, 0x4a, 0xb0, 0x9e, 0xd1, 0x81, 0x4a, 0xb7, 0x89, 0x25, 0xb8, 0xe9, 0x44, 0x59, 0x13,
];
const METADATA_REGION: [u8; 16] = [
    0x06, 0xa2, 0x7c, 0x8b, 0x90, 0x47, 0x9a, 0x4b, 0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e,
];

/// Byte offset of the metadata region.
fn metadata(file: &dyn Storage) -> u64 {
    let entries = u32::from_le_bytes(get(file, (192 << 10) + 8));
    let mut entries = (0..u64::from(entries)).map(|index| (192 << 10) + 16 + index * 32);
    let entry = entries.find(|at| get::<16>(file, *at) == METADATA_REGION);
    u64::from_le_bytes(get(file, entry.expect("a metadata region") + 16))
}

/// The identity of a VHDX, as its children know it.
pub fn data_write_guid(file: &dyn Storage) -> uuid::Uuid {
    let sequence = |at| u64::from_le_bytes(get(file, at + 8));
    let (first, second) = (64 << 10, 128 << 10);
    let current = if sequence(first) > sequence(second) { first } else { second };
    flatdisk::codec::guid(&get(file, current + 32))
}

fn link_vhdx(host: &MemoryHost, parent: &Path, child: &Path) {
    let linkage = format!("{{{}}}", data_write_guid(&*file(host, parent)));
    let name = parent.file_name().and_then(|name| name.to_str()).expect("a plain name");
    let pairs = [("parent_linkage", linkage), ("relative_path", format!(".\\{name}"))];
    name_vhdx_parent(&*file(host, child), &pairs);
}

/// Turns a VHDX without parent into one whose parent locator holds `pairs`.
pub fn name_vhdx_parent(child: &dyn Storage, pairs: &[(&str, String)]) {
    let table = metadata(child);
    let count = u16::from_le_bytes(get(child, table + 10));
    let entry = |index: u16| table + 32 + u64::from(index) * 32;
    for index in 0..count {
        if get::<16>(child, entry(index)) == FILE_PARAMETERS {
            let item = table + u64::from(u32::from_le_bytes(get(child, entry(index) + 16)));
            let flags = u32::from_le_bytes(get(child, item + 4));
            put(child, item + 4, &(flags | 2).to_le_bytes());
        }
    }
    let utf16 = |text: &str| flatdisk::codec::to_utf16(text, false);
    let mut locator = LOCATOR_TYPE.to_vec();
    locator.extend([0, 0, pairs.len() as u8, 0]);
    let mut strings = Vec::new();
    let strings_at = (locator.len() + pairs.len() * 12) as u32;
    for (key, value) in pairs {
        let (key, value) = (utf16(key), utf16(value));
        let key_at = strings_at + strings.len() as u32;
        let value_at = key_at + key.len() as u32;
        locator.extend(key_at.to_le_bytes());
        locator.extend(value_at.to_le_bytes());
        locator.extend((key.len() as u16).to_le_bytes());
        locator.extend((value.len() as u16).to_le_bytes());
        strings.extend(key);
        strings.extend(value);
    }
    locator.extend(strings);
    let offset = 96 << 10;
    put(child, table + u64::from(offset), &locator);
    let new = entry(count);
    put(child, new, &PARENT_LOCATOR);
    put(child, new + 16, &u32::to_le_bytes(offset));
    put(child, new + 20, &(locator.len() as u32).to_le_bytes());
    put(child, new + 24, &4u32.to_le_bytes());
    put(child, table + 10, &(count + 1).to_le_bytes());
}

/// Where the descriptor of a VMDK is: offset and length in its file.
fn descriptor(file: &dyn Storage) -> (u64, usize) {
    if get::<4>(file, 0) == *b"KDMV" {
        let [at, sectors] = [28, 36].map(|field| u64::from_le_bytes(get(file, field)));
        (at * 512, sectors as usize * 512)
    } else {
        (0, file.len().expect("memory has lengths") as usize)
    }
}

fn descriptor_text(file: &dyn Storage) -> String {
    let (at, len) = descriptor(file);
    let mut bytes = vec![0; len];
    file.read_at(at, &mut bytes).expect("inside the file");
    String::from_utf8(bytes).expect("text").trim_end_matches('\0').to_owned()
}

fn link_vmdk(host: &MemoryHost, parent: &Path, child: &Path) {
    let parent_text = descriptor_text(&*file(host, parent));
    let cid = parent_text.lines().find_map(|line| line.strip_prefix("CID=")).expect("a CID");
    let name = parent.file_name().and_then(|name| name.to_str()).expect("a plain name");
    let file = file(host, child);
    let (at, len) = descriptor(&*file);
    let text = descriptor_text(&*file);
    let linked = text.replace(
        "parentCID=ffffffff\n",
        &format!("parentCID={cid}\nparentFileNameHint=\"{name}\"\n"),
    );
    assert_ne!(text, linked, "the descriptor has a parentCID");
    if at == 0 {
        host.replace(child, linked.as_bytes()).expect("memory takes all writes");
    } else {
        let mut area = linked.into_bytes();
        area.resize(len, 0);
        put(&*file, at, &area);
    }
}

/// Lets grain tables of the test's sparse VMDK say "zeroes".
pub fn allow_zeroed_grains(host: &Arc<MemoryHost>) {
    zeroed_grains_at(host, Path::new("/t/disk.vmdk"));
}

fn zeroed_grains_at(host: &MemoryHost, path: &Path) {
    let file = file(host, path);
    put(&*file, 4, &2u32.to_le_bytes());
    let flags = u32::from_le_bytes(get(&*file, 8));
    put(&*file, 8, &(flags | 4).to_le_bytes());
}
