//! What the descriptor says beside what the disk is, for looking at and for changing.

use std::sync::Arc;

use super::create::{ADAPTERS, chs, new_uuid};
use super::descriptor::Descriptor;
use super::link::find_descriptor;
use super::relink::rewrite;
use crate::error::{Error, Result};
use crate::formats::OpenContext;
use crate::formats::meta::{Changes, Entry, cannot_be};
use crate::storage::Storage;

/// What a value may be.
#[derive(Clone, Copy)]
enum Kind {
    Adapter,
    Number(u64, u64),
    OneOf(&'static [&'static str]),
    /// 16 bytes as VMware writes them.
    VmwareId,
    Uuid,
    Text,
}

/// The keys that can be set.
const KEYS: [(&str, Kind); 13] = [
    ("ddb.adapterType", Kind::Adapter),
    ("ddb.geometry.cylinders", Kind::Number(1, u32::MAX as u64)),
    ("ddb.geometry.heads", Kind::Number(1, 255)),
    ("ddb.geometry.sectors", Kind::Number(1, 63)),
    ("ddb.virtualHWVersion", Kind::Number(1, 99)),
    ("ddb.toolsVersion", Kind::Number(0, i32::MAX as u64)),
    ("ddb.toolsInstallType", Kind::Number(0, 9)),
    ("ddb.uuid", Kind::VmwareId),
    ("ddb.uuid.image", Kind::Uuid),
    ("ddb.uuid.modification", Kind::Uuid),
    ("ddb.deletable", Kind::OneOf(&["true", "false"])),
    ("ddb.thinProvisioned", Kind::OneOf(&["0", "1"])),
    ("ddb.comment", Kind::Text),
];

impl Kind {
    fn of(key: &str) -> Option<(&'static str, Self)> {
        KEYS.into_iter().find(|(known, _)| known.eq_ignore_ascii_case(key))
    }

    /// What the value may be, for people.
    fn can_be(self) -> String {
        match self {
            Self::Adapter => ADAPTERS.join(", "),
            Self::Number(least, most) => format!("a number from {least} to {most}"),
            Self::OneOf(values) => values.join(", "),
            Self::VmwareId => "16 bytes in hexadecimal".to_owned(),
            Self::Uuid => "a UUID".to_owned(),
            Self::Text => "a text without quotes and line ends".to_owned(),
        }
    }

    /// The value as it is written, if it is one.
    fn written(self, value: &str) -> Option<String> {
        match self {
            Self::Adapter => {
                let known = ADAPTERS.into_iter().find(|known| known.eq_ignore_ascii_case(value));
                known.map(str::to_owned)
            }
            Self::Number(least, most) => {
                let plain = value.bytes().all(|b| b.is_ascii_digit());
                let number = value.parse().ok().filter(|_| plain);
                number.filter(|n| (least..=most).contains(n)).map(|n| n.to_string())
            }
            Self::OneOf(values) => values.contains(&value).then(|| value.to_owned()),
            Self::VmwareId => {
                let plain: String = value.chars().filter(|c| !" -:".contains(*c)).collect();
                let hex = plain.len() == 32 && plain.bytes().all(|b| b.is_ascii_hexdigit());
                hex.then(|| vmware_id(&plain.to_ascii_lowercase()))
            }
            Self::Uuid => uuid::Uuid::try_parse(value).ok().map(|id| id.to_string()),
            Self::Text => {
                let plain = !value.contains('"') && !value.chars().any(char::is_control);
                (plain && value.len() <= 1024).then(|| value.to_owned())
            }
        }
    }
}

/// 32 digits with blanks between the bytes, and a dash in the middle.
fn vmware_id(digits: &str) -> String {
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        match index {
            16 => text.push('-'),
            index if index > 0 && index % 2 == 0 => text.push(' '),
            _ => {}
        }
        text.push(digit);
    }
    text
}

/// What the descriptor of the image in `file` says, and what it could.
pub fn list(file: &Arc<dyn Storage>) -> Result<Vec<Entry>> {
    let descriptor = find_descriptor(file)?.file.descriptor;
    let mut entries: Vec<Entry> = Vec::new();
    for (key, value) in descriptor.settings() {
        let kind = Kind::of(key);
        entries.push(Entry {
            key: kind.map_or(key, |(known, _)| known).to_owned(),
            value: Some(value.to_owned()),
            can_be: kind.map(|(_, kind)| kind.can_be()),
        });
    }
    for (key, kind) in KEYS {
        // Ids of VirtualBox are for disks that it has made.
        let foreign = key.starts_with("ddb.uuid.");
        if descriptor.get(key).is_none() && !foreign {
            entries.push(Entry { key: key.to_owned(), value: None, can_be: Some(kind.can_be()) });
        }
    }
    Ok(entries)
}

/// Changes the descriptor of the image in `file`.
pub fn set(file: &Arc<dyn Storage>, ctx: &OpenContext, changes: &Changes) -> Result<()> {
    rewrite(file, ctx, |descriptor| changed(descriptor, changes))
}

fn changed(descriptor: &Descriptor, changes: &Changes) -> Result<Vec<u8>> {
    let mut descriptor = descriptor.clone();
    let mut values: Vec<(&'static str, String)> = Vec::new();
    if changes.new_id {
        if descriptor.cid().is_none() {
            return Err(Error::unsupported("the descriptor has no CID"));
        }
        descriptor.set_content_id(None);
        if descriptor.get("ddb.uuid").is_some() {
            values.push(("ddb.uuid", new_uuid()));
        }
        if descriptor.get("ddb.uuid.image").is_some() {
            values.push(("ddb.uuid.image", uuid::Uuid::new_v4().to_string()));
        }
    }
    let mut asked = Vec::new();
    for (key, value) in &changes.values {
        let unknown = || Error::invalid(format!("there is no key `{key}`"));
        let (known, kind) = Kind::of(key).ok_or_else(unknown)?;
        let written = kind.written(value).ok_or_else(|| cannot_be(key, value, &kind.can_be()))?;
        if matches!(kind, Kind::Adapter) {
            let sizes = descriptor.extents.iter().map(|extent| extent.sectors);
            let sectors = sizes.fold(0, u64::saturating_add);
            let [cylinders, heads, per_track] = chs(sectors, written == "ide");
            put(&mut values, "ddb.geometry.cylinders", cylinders.to_string());
            put(&mut values, "ddb.geometry.heads", heads.to_string());
            put(&mut values, "ddb.geometry.sectors", per_track.to_string());
        }
        asked.push((known, written));
    }
    // What is asked for goes before what follows from something else.
    asked.into_iter().for_each(|(key, value)| put(&mut values, key, value));
    descriptor.with_settings(&values)
}

/// Notes a value in the place of the one that the key had.
fn put(values: &mut Vec<(&'static str, String)>, key: &'static str, value: String) {
    values.retain(|(known, _)| *known != key);
    values.push((key, value));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_taken_as_vmware_writes_them_or_refused() {
        let id = "6000C29abcdef0123456789abcdef012";
        let kept = Kind::VmwareId.written(id).unwrap();
        assert_eq!(kept, "60 00 c2 9a bc de f0 12-34 56 78 9a bc de f0 12");
        assert_eq!(Kind::VmwareId.written(&kept).unwrap(), kept);
        assert_eq!(Kind::VmwareId.written("60"), None);
        assert_eq!(Kind::Adapter.written("IDE").as_deref(), Some("ide"));
        assert_eq!(Kind::Number(1, 63).written("64"), None);
        assert_eq!(Kind::Number(1, 63).written("+6"), None);
        assert_eq!(Kind::Text.written("a\"b"), None);
    }

    #[test]
    fn an_adapter_brings_its_geometry_unless_another_is_asked_for() {
        let text = b"version=1\nCID=1\nparentCID=ffffffff\ncreateType=\"vmfs\"\n\
            RW 20480 VMFS \"a-flat.vmdk\"\nddb.adapterType = \"lsilogic\"\nddb.geometry.heads = \"64\"\n";
        let descriptor = Descriptor::parse(text).unwrap();
        let set = |values: &[(&str, &str)]| {
            let values = values.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            let text = changed(&descriptor, &Changes { values, new_id: false }).unwrap();
            Descriptor::parse(&text).unwrap()
        };
        let ide = set(&[("ddb.adaptertype", "ide")]);
        assert_eq!(ide.get("ddb.adapterType"), Some("ide"));
        assert_eq!(
            (ide.get("ddb.geometry.heads"), ide.get("ddb.geometry.cylinders")),
            (Some("16"), Some("20"))
        );
        assert_eq!(ide.cid(), Some(1));
        let own = set(&[("ddb.geometry.heads", "7"), ("ddb.adapterType", "ide")]);
        assert_eq!(own.get("ddb.geometry.heads"), Some("7"));
        assert_eq!(own.extents, descriptor.extents);
    }
}
