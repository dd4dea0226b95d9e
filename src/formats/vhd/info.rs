//! What `info` shows of a VHD image.

use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::footers::Footers;
use super::layout::{Chs, DiskType, EPOCH, Footer, SECTOR};
use super::structure::Structure;
use crate::formats::ImageInfo;

/// Creator codes and the programs that write them.
const CREATORS: [(&[u8], &str); 12] = [
    (b"fldk", "flatdisk"),
    (b"vpc", "Virtual PC"),
    (b"vs", "Virtual Server"),
    (b"win", "Windows"),
    (b"qemu", "QEMU"),
    (b"qem2", "QEMU"),
    (b"d2v", "Disk2vhd"),
    (b"tap", "Xen"),
    (b"CTXS", "XenConvert"),
    (b"wa", "Azure"),
    (b"vbox", "VirtualBox"),
    (b"dutl", "DiscUtils"),
];

/// What a fixed disk says about itself.
pub(super) fn fixed(footers: &Footers) -> ImageInfo {
    let footer = &footers.footer;
    let mut info = ImageInfo {
        format: "vhd",
        subformat: footers.disk_type.name().to_owned(),
        virtual_size: footer.size(),
        logical_sector_size: SECTOR as u32,
        physical_sector_size: SECTOR as u32,
        uuid: Some(Uuid::from_bytes(footer.unique_id).to_string()),
        creator: Some(creator(footer)),
        details: footer_details(footers),
        warnings: footers.warnings(),
        ..ImageInfo::default()
    };
    if footers.disk_type == DiskType::Fixed && footers.data_end > footer.current_size.get() {
        let extra = footers.data_end - footer.current_size.get();
        info.warnings.push(format!("{extra} bytes between the disk's end and the footer"));
    }
    info.warnings.extend(other_sizes(footer));
    info
}

/// Programs that take another size for the disk's.
fn other_sizes(footer: &Footer) -> Vec<String> {
    let mut warnings = Vec::new();
    let (original, geometry) = (footer.original_size.get(), footer.geometry());
    if original != footer.current_size.get() {
        warnings.push(format!("libvhdi shows the original size, {original} bytes"));
    }
    let by_geometry = footer.creator_is(b"vpc") || footer.creator_is(b"qemu");
    if by_geometry && geometry != Chs::MAX && geometry.size() != footer.size() {
        let size = geometry.size();
        warnings.push(format!("Virtual PC and QEMU show the geometry's size, {size} bytes"));
    }
    warnings
}

/// What a disk with a BAT says about itself.
pub(super) fn sparse(footers: &Footers, structure: &Structure) -> ImageInfo {
    let mut info = fixed(footers);
    info.block_size = Some(structure.block_size);
    info.warnings.extend(structure.warnings.iter().cloned());
    let details = &mut info.details;
    details.insert("footer_copy".into(), footers.head.name().into());
    details.insert("table_offset".into(), structure.table_at.into());
    details.insert("table_entries".into(), structure.table_entries.into());
    details.insert("batmap".into(), structure.batmap.is_some().into());
    if footers.disk_type == DiskType::Differencing {
        let header = &structure.header;
        let parent_id = Uuid::from_bytes(header.parent_unique_id).to_string();
        details.insert("parent_uuid".into(), parent_id.into());
        details.insert("parent_modified".into(), date(header.parent_timestamp.get()).into());
        let texts = structure.locators.texts();
        let locators: Map<String, Value> =
            texts.map(|(code, text)| (code, text.to_owned().into())).collect();
        details.insert("parent_locators".into(), locators.into());
        info.parent = structure.locators.candidates().into_iter().next();
    }
    info
}

fn footer_details(footers: &Footers) -> Map<String, Value> {
    let footer = &footers.footer;
    let chs = footer.geometry();
    let mut details = Map::new();
    let mut add = |name: &str, value: Value| details.insert(name.into(), value);
    add("created", date(footer.timestamp.get()).into());
    add("creator_code", text(&footer.creator_application).into());
    add("creator_version", version(footer).into());
    add("creator_host_os", text(&footer.creator_host_os).into());
    add("original_size", footer.original_size.get().into());
    add("current_size", footer.current_size.get().into());
    add(
        "geometry",
        json!({
            "cylinders": chs.cylinders,
            "heads": chs.heads,
            "sectors_per_track": chs.sectors_per_track,
            "size": chs.size(),
        }),
    );
    add("temporary", (footer.features.get() & 1 != 0).into());
    add("saved_state", (footer.saved_state != 0).into());
    add("footer", footers.trailing.name().into());
    details
}

fn creator(footer: &Footer) -> String {
    let known = CREATORS.into_iter().find(|(code, _)| footer.creator_is(code));
    let code = text(&footer.creator_application);
    match known {
        Some((_, name)) => format!("{name} ({code} {})", version(footer)),
        None => format!("{code} {}", version(footer)).trim().to_owned(),
    }
}

fn version(footer: &Footer) -> String {
    let version = footer.creator_version.get();
    format!("{}.{}", version >> 16, version & 0xffff)
}

/// A four-character code without its padding, unprintable characters replaced.
fn text(code: &[u8; 4]) -> String {
    let text: String =
        code.iter().map(|b| if b.is_ascii_graphic() { char::from(*b) } else { ' ' }).collect();
    text.trim().to_owned()
}

/// Seconds since 2000 as a date and time in UTC.
fn date(seconds: u32) -> String {
    let unix = EPOCH + u64::from(seconds);
    let (days, time) = (unix / 86_400, unix % 86_400);
    // Years are counted from March, so that the leap day is the last of a year.
    let from_march = days + 719_468;
    let (era, day_of_era) = (from_march / 146_097, from_march % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (time / 3600, time / 60 % 60, time % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_count_from_the_year_2000() {
        assert_eq!(date(0), "2000-01-01T00:00:00Z");
        assert_eq!(date(60 * 86_400 - 1), "2000-02-29T23:59:59Z");
        assert_eq!(date(0x2695_b89e), "2020-07-06T10:25:34Z");
        assert_eq!(date(u32::MAX), "2136-02-07T06:28:15Z");
    }

    #[test]
    fn creators_are_named() {
        let mut footer = Footer::new(DiskType::Fixed, 512, [0; 16], 0);
        assert_eq!(creator(&footer), "flatdisk (fldk 1.0)");
        footer.creator_application = *b"wa\0\0";
        assert_eq!(creator(&footer), "Azure (wa 1.0)");
        footer.creator_application = *b"\x1bzz ";
        assert_eq!(creator(&footer), "zz 1.0");
    }
}
