//! What a file is that is no VHD, VHDX or VMDK, and what opens it.
//!
//! Only the text of an error depends on this: nothing here opens anything. A wrong name, a footer that
//! was never written and a download that was never unpacked are the usual reasons.

use std::ffi::OsString;
use std::path::Path;

use super::Probe;
use super::places::directory_of;
use crate::error::{Error, ErrorKind};
use crate::storage::Storage;
use crate::storage::archive::tar;

const FLAT: &str = "it is flat as it is: `losetup -Pf --show` makes it a device";
const QEMU: &str = "`qemu-img convert` or `qemu-nbd` reads it";
const UNPACK: &str = "unpack it first";
/// Entries of a folder that are searched for a disk.
const MAX_BESIDE: usize = 4096;
const AGAIN: &str = "get the image itself";

/// Bytes that tell what a file is.
struct Signature {
    at: u64,
    bytes: &'static [u8],
    what: &'static str,
    hint: &'static str,
}

const fn signature(
    at: u64,
    bytes: &'static [u8],
    what: &'static str,
    hint: &'static str,
) -> Signature {
    Signature { at, bytes, what, hint }
}

/// What is told by its first bytes, or by others at a fixed place. The first that fits counts: disks that
/// boot from CD and disk alike are the former, and a boot sector of a file system looks like a partition
/// table.
const SIGNATURES: &[Signature] = &[
    signature(0, b"QFI\xfb", "a QCOW2 image", QEMU),
    signature(0, b"QED\0", "a QED image", QEMU),
    signature(64, b"\x7f\x10\xda\xbe", "a VDI image of VirtualBox", QEMU),
    signature(0, b"WithoutFreeSpace", "a Parallels image (HDS)", QEMU),
    signature(0, b"WithouFreSpacExt", "a Parallels image (HDS)", QEMU),
    signature(0, b"Bochs Virtual HD Image", "a Bochs image", QEMU),
    signature(0, b"EVF\x09\x0d\x0a\xff\0", "an EnCase image (E01)", "`ewfmount` opens it"),
    signature(0, b"EVF2\x0d\x0a\x81\0", "an EnCase image (Ex01)", "`ewfmount` opens it"),
    signature(0, b"AFF10\x0d\x0a\0", "an AFF image", "`affuse` opens it"),
    signature(0, b"MSWIM\0\0\0", "a Windows image (WIM)", "`wimlib-imagex mount` opens it"),
    signature(0, b"\x1f\x8b\x08", "compressed by gzip", UNPACK),
    signature(0, b"BZh", "compressed by bzip2", UNPACK),
    signature(0, b"\xfd7zXZ\0", "compressed by xz", UNPACK),
    signature(0, b"\x28\xb5\x2f\xfd", "compressed by zstd", UNPACK),
    signature(0, b"\x04\x22\x4d\x18", "compressed by lz4", UNPACK),
    signature(0, b"PK\x03\x04", "a zip archive", UNPACK),
    signature(0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    signature(0, b"Rar!\x1a\x07", "a rar archive", UNPACK),
    signature(0, b"version https://git-lfs", "a pointer of Git LFS", "`git lfs pull` fetches it"),
    signature(0, b"<!DOCTYPE html", "a web page: a download that went wrong", AGAIN),
    signature(0, b"<!doctype html", "a web page: a download that went wrong", AGAIN),
    signature(0, b"<html", "a web page: a download that went wrong", AGAIN),
    signature(0, b"\xa2\x72\x19\xf6", "VMware's list of changed blocks", "no disk is in it"),
    signature(0x8001, b"CD001", "a CD or DVD image (ISO)", "`mount -o loop` mounts it"),
    signature(0x8001, b"BEA01", "a DVD image (UDF)", "`mount -o loop` mounts it"),
    signature(0, b"LUKS\xba\xbe", "a raw disk with LUKS encryption", FLAT),
    signature(3, b"-FVE-FS-", "a raw disk with BitLocker encryption", FLAT),
    signature(3, b"NTFS    ", "a raw disk with NTFS", FLAT),
    signature(3, b"EXFAT   ", "a raw disk with exFAT", FLAT),
    signature(3, b"ReFS\0", "a raw disk with ReFS", FLAT),
    signature(54, b"FAT1", "a raw disk with FAT", FLAT),
    signature(82, b"FAT32   ", "a raw disk with FAT", FLAT),
    signature(0, b"XFSB", "a raw disk with XFS", FLAT),
    signature(0, b"hsqs", "a raw disk with squashfs", FLAT),
    signature(32, b"NXSB", "a raw disk with APFS", FLAT),
    signature(1080, b"\x53\xef", "a raw disk with ext2, ext3 or ext4", FLAT),
    signature(1024, b"H+\0\x04", "a raw disk with HFS+", FLAT),
    signature(1024, b"\x10\x20\xf5\xf2", "a raw disk with F2FS", FLAT),
    signature(1024, b"\xe2\xe1\xf5\xe0", "a raw disk with EROFS", FLAT),
    signature(0x10040, b"_BHRfS_M", "a raw disk with btrfs", FLAT),
    signature(512, b"LABELONE", "a raw disk of LVM", FLAT),
    signature(4086, b"SWAPSPACE2", "a raw disk with swap space", FLAT),
    signature(512, b"EFI PART", "a raw disk with a GPT partition table", FLAT),
    signature(4096, b"EFI PART", "a raw disk with a GPT partition table (4096-byte sectors)", FLAT),
];

/// Files of other kinds that lie beside disks, by their extension.
const COMPANIONS: &[(&str, &str, &str)] = &[
    ("ovf", "the description of a machine", "its disks lie beside it"),
    ("vmx", "the settings of a machine", "its disks are the .vmdk files that it names"),
    ("vbox", "the settings of a machine", "its disks are the files that it names"),
];

/// The error for a file that no format claims.
pub(super) fn refuse(file: &dyn Storage, probe: &Probe) -> Error {
    let path = file.path();
    let refused = |what: String| Error::new(ErrorKind::NotThisFormat, what).in_file(path);
    if probe.len == 0 {
        return refused("the file is empty".to_owned());
    }
    let Some((what, hint)) = describe(file, probe) else {
        return refused("not a VHD, VHDX or VMDK image".to_owned());
    };
    let raw = what.starts_with("a raw disk") && has_extension(path, &["vhd", "avhd"]);
    let because = if raw { "; a VHD has a footer at its end" } else { "" };
    refused(format!("not a VHD, VHDX or VMDK image but {what}{because}")).hint(hint)
}

/// What the file is, and what to do with it.
fn describe(file: &dyn Storage, probe: &Probe) -> Option<(String, String)> {
    let path = file.path();
    let owned = |(what, hint): (&str, &str)| (what.to_owned(), hint.to_owned());
    // A guest writes what is in a flat extent, so that its name comes first.
    if let Some(descriptor) = descriptor_of(path) {
        let hint = format!(
            "open its descriptor {descriptor}; if that is lost, the file is flat as it is: \
             `losetup -Pf --show` makes it a device"
        );
        return Some(("the data of a flat VMDK".to_owned(), hint));
    }
    let known = SIGNATURES.iter().find(|s| has(file, probe, s.at, s.bytes));
    if let Some(signature) = known {
        return Some(owned((signature.what, signature.hint)));
    }
    if has(file, probe, 257, b"ustar") {
        if has_extension(path, &["ova"]) {
            return Some(match tar::index(file) {
                Ok(_) => owned(("an OVA archive", "its disks are ARCHIVE:DISK; `info` lists them")),
                Err(e) => (format!("a damaged OVA archive: {}", e.what()), AGAIN.to_owned()),
            });
        }
        let ova = first_member(probe).ends_with(b".ovf");
        let what = if ova { "an OVA archive" } else { "a tar archive" };
        let hint =
            if ova { "named .ova, it is read in place" } else { "unpack it first: `tar -xf` does" };
        return Some(owned((what, hint)));
    }
    if probe.len >= 512 && has(file, probe, probe.len - 512, b"koly") {
        return Some(owned((
            "an Apple disk image (DMG)",
            "`qemu-img convert` or `dmg2img` reads it",
        )));
    }
    if is_mbr(&probe.head) {
        return Some(owned(("a raw disk with an MBR partition table", FLAT)));
    }
    if has_extension(path, &["vhds"]) {
        let what = "a VHD Set, whose format is not published".to_owned();
        return Some((what, disk_of_set(path)));
    }
    let companion = COMPANIONS.iter().find(|(extension, ..)| has_extension(path, &[extension]));
    companion.map(|(_, what, hint)| owned((what, hint)))
}

/// Which disk belongs to the VHD Set at `path`: a file `NAME_GUID.avhdx` beside it, if there is only one.
fn disk_of_set(path: &Path) -> String {
    const UNKNOWN: &str = "its disk is the .avhdx beside it";
    let stem = path.file_stem().unwrap_or_default().as_encoded_bytes();
    let Ok(entries) = std::fs::read_dir(directory_of(path)) else { return UNKNOWN.to_owned() };
    let belongs = |name: &OsString| {
        let own = Path::new(name);
        has_extension(own, &["avhdx"]) && name.as_encoded_bytes().starts_with(stem)
    };
    let names = entries.take(MAX_BESIDE).flatten().map(|entry| entry.file_name());
    let names: Vec<_> = names.filter(belongs).take(2).collect();
    match &names[..] {
        [only] => format!("its disk is {}", only.display()),
        _ => UNKNOWN.to_owned(),
    }
}

/// Whether the file has `bytes` at `at`.
fn has(file: &dyn Storage, probe: &Probe, at: u64, bytes: &[u8]) -> bool {
    let Some(end) = at.checked_add(bytes.len() as u64) else { return false };
    if let (Ok(start), Ok(end)) = (usize::try_from(at), usize::try_from(end))
        && let Some(found) = probe.head.get(start..end)
    {
        return found == bytes;
    }
    let mut found = vec![0; bytes.len()];
    end <= probe.len && file.read_at(at, &mut found).is_ok() && found == bytes
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    let own = path.extension().unwrap_or_default();
    extensions.iter().any(|extension| own.eq_ignore_ascii_case(extension))
}

/// The descriptor `x.vmdk` of a flat extent `x-flat.vmdk` or `x-f001.vmdk`, by its name.
fn descriptor_of(path: &Path) -> Option<String> {
    if !has_extension(path, &["vmdk"]) {
        return None;
    }
    let (name, role) = path.file_stem()?.to_str()?.rsplit_once('-')?;
    let number = role.strip_prefix(['f', 'F']).unwrap_or_default();
    let numbered = number.len() >= 3 && number.bytes().all(|b| b.is_ascii_digit());
    (role.eq_ignore_ascii_case("flat") || numbered).then(|| format!("{name}.vmdk"))
}

/// The name of a tar archive's first member.
fn first_member(probe: &Probe) -> &[u8] {
    let name = probe.head.get(..100).unwrap_or_default();
    name.split(|b| *b == 0).next().unwrap_or_default()
}

/// Whether a boot sector has a partition table: a signature, entries that are marked as able to boot or
/// as not, and one that is in use.
fn is_mbr(head: &[u8]) -> bool {
    let (Some(entries), Some([0x55, 0xaa])) = (head.get(446..510), head.get(510..512)) else {
        return false;
    };
    let mut entries = entries.chunks_exact(16);
    entries.clone().all(|entry| entry[0] & 0x7f == 0) && entries.any(|entry| entry[4] != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::recognise;
    use crate::storage::memory::MemoryFile;

    /// The error for a file of this name and length with `bytes` at `at`.
    fn refusal(name: &str, len: u64, at: u64, bytes: &[u8]) -> String {
        let file = MemoryFile::new(name, &[]);
        file.set_len(len).unwrap();
        file.write_at(at, bytes).unwrap();
        match recognise(&*file) {
            Ok(format) => panic!("{name} is taken for {}", format.name()),
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::NotThisFormat);
                e.to_string()
            }
        }
    }

    #[test]
    fn every_signature_is_told() {
        for s in SIGNATURES {
            for extra in [0, 100_000] {
                let told = refusal("x.vhdx", s.at + s.bytes.len() as u64 + extra, s.at, s.bytes);
                let want =
                    format!("x.vhdx: not a VHD, VHDX or VMDK image but {} ({})", s.what, s.hint);
                assert_eq!(told, want);
            }
        }
    }

    #[test]
    fn a_raw_disk_named_vhd_lacks_its_footer() {
        let mut table = [0; 66];
        table[4] = 0x83;
        table[64..].copy_from_slice(&[0x55, 0xaa]);
        let told = refusal("raw.VHD", 1 << 20, 446, &table);
        assert!(told.contains("but a raw disk with an MBR partition table; a VHD has a footer"));
        assert!(told.contains("losetup"), "{told}");
        let told = refusal("raw.vhdx", 1 << 20, 446, &table);
        assert!(told.contains("MBR partition table (it is flat"), "{told}");
        table[0] = 3;
        assert!(refusal("raw.vhd", 1 << 20, 446, &table).ends_with("VMDK image"));
    }

    #[test]
    fn a_lone_flat_extent_is_told_by_its_name() {
        for name in ["vm-flat.vmdk", "vm-f001.vmdk", "vm-FLAT.VMDK"] {
            let told = refusal(name, 4 << 20, 512, b"EFI PART");
            assert!(
                told.contains("the data of a flat VMDK (open its descriptor vm.vmdk"),
                "{told}"
            );
        }
        assert!(!refusal("vm-f01.vmdk", 4 << 20, 0, b"?").contains("descriptor"));
    }

    #[test]
    fn archives_are_told_by_their_first_member_and_companions_by_their_extension() {
        let mut tar = [0; 512];
        tar[257..262].copy_from_slice(b"ustar");
        assert!(refusal("x.vmdk", 10240, 0, &tar).contains("a tar archive"));
        tar[..6].copy_from_slice(b"vm.ovf");
        assert!(refusal("x.vmdk", 10240, 0, &tar).contains("an OVA archive"));
        assert!(refusal("x.vhds", 9, 0, b"?").contains("VHD Set"));
        assert!(refusal("x.vhd", 9000, 9000 - 512, b"koly").contains("DMG"));
    }
}
