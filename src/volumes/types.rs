//! What partition types are called.

use uuid::{Uuid, uuid};

/// The usual name of an MBR type.
pub(super) fn mbr(kind: u8) -> Option<&'static str> {
    Some(match kind {
        0x01 => "FAT12",
        0x04 | 0x06 | 0x0e => "FAT16",
        0x05 | 0x0f => "extended",
        0x85 => "Linux extended",
        0x07 => "NTFS, exFAT or HPFS",
        0x0b | 0x0c => "FAT32",
        0x11 | 0x14 | 0x16 | 0x17 | 0x1b | 0x1c | 0x1e => "hidden FAT or NTFS",
        0x27 => "Windows recovery",
        0x42 => "Windows dynamic disk",
        0x82 => "Linux swap",
        0x83 => "Linux",
        0x8e => "Linux LVM",
        0xa5 => "FreeBSD",
        0xa6 => "OpenBSD",
        0xa8 => "Apple UFS",
        0xa9 => "NetBSD",
        0xab => "Apple boot",
        0xaf => "Apple HFS",
        0xbe => "Solaris boot",
        0xbf => "Solaris",
        0xda => "not a file system",
        0xde => "Dell utility",
        0xee => "GPT",
        0xef => "EFI system",
        0xfb => "VMware VMFS",
        0xfc => "VMware core dump",
        0xfd => "Linux RAID",
        _ => return None,
    })
}

/// The usual name of a GPT type.
pub(super) fn gpt(kind: Uuid) -> Option<&'static str> {
    const NAMES: [(Uuid, &str); 27] = [
        (uuid!("C12A7328-F81F-11D2-BA4B-00A0C93EC93B"), "EFI system"),
        (uuid!("21686148-6449-6E6F-744E-656564454649"), "BIOS boot"),
        (uuid!("E3C9E316-0B5C-4DB8-817D-F92DF00215AE"), "Microsoft reserved"),
        (uuid!("EBD0A0A2-B9E5-4433-87C0-68B6B72699C7"), "Microsoft basic data"),
        (uuid!("DE94BBA4-06D1-4D40-A16A-BFD50179D6AC"), "Windows recovery"),
        (uuid!("5808C8AA-7E8F-42E0-85D2-E1E90434CFB3"), "Windows dynamic disk metadata"),
        (uuid!("AF9B60A0-1431-4F62-BC68-3311714A69AD"), "Windows dynamic disk data"),
        (uuid!("E75CAF8F-F680-4CEE-AFA3-B001E56EFC2D"), "Windows storage spaces"),
        (uuid!("0FC63DAF-8483-4772-8E79-3D69D8477DE4"), "Linux"),
        (uuid!("4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"), "Linux root (x86-64)"),
        (uuid!("B921B045-1DF0-41C3-AF44-4C6F280D3FAE"), "Linux root (ARM64)"),
        (uuid!("933AC7E1-2EB4-4F13-B844-0E14E2AEF915"), "Linux home"),
        (uuid!("8484680C-9521-48C6-9C11-B0720656F69E"), "Linux usr (x86-64)"),
        (uuid!("0657FD6D-A4AB-43C4-84E5-0933C84B4F4F"), "Linux swap"),
        (uuid!("E6D6D379-F507-44C2-A23C-238F2A3DF928"), "Linux LVM"),
        (uuid!("A19D880F-05FC-4D3B-A006-743F0F84911E"), "Linux RAID"),
        (uuid!("CA7D7CCB-63ED-4C53-861C-1742536059CC"), "LUKS"),
        (uuid!("BC13C2FF-59E6-4262-A352-B275FD6F7172"), "Linux extended boot"),
        (uuid!("48465300-0000-11AA-AA11-00306543ECAC"), "Apple HFS+"),
        (uuid!("7C3457EF-0000-11AA-AA11-00306543ECAC"), "Apple APFS"),
        (uuid!("6A898CC3-1DD2-11B2-99A6-080020736631"), "ZFS or Solaris usr"),
        (uuid!("516E7CB6-6ECF-11D6-8FF8-00022D09712B"), "FreeBSD UFS"),
        (uuid!("516E7CBA-6ECF-11D6-8FF8-00022D09712B"), "FreeBSD ZFS"),
        (uuid!("516E7CB5-6ECF-11D6-8FF8-00022D09712B"), "FreeBSD swap"),
        (uuid!("AA31E02A-400F-11DB-9590-000C2911D1B8"), "VMware VMFS"),
        (uuid!("9D275380-40AD-11DB-BF97-000C2911D1B8"), "VMware core dump"),
        (uuid!("9198EFFC-31C0-11DB-8F78-000C2911D1B8"), "VMware reserved"),
    ];
    NAMES.iter().find(|(uuid, _)| *uuid == kind).map(|(_, name)| *name)
}
