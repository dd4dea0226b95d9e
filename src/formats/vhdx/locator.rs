//! The parent locator: what a child says about its parent, as keys and values.

use std::collections::BTreeMap;

use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

use super::layout::{RawLocator, RawLocatorEntry, VHDX_LOCATOR_TYPE};
use crate::codec::{guid, to_utf16, utf16};
use crate::error::{Error, Result};
use crate::formats::{Identity, ParentLink};

/// Key of the data-write GUID that the parent must have.
pub const PARENT_LINKAGE: &str = "parent_linkage";
/// Key of a second data-write GUID that is accepted, used while a child is merged.
pub const PARENT_LINKAGE2: &str = "parent_linkage2";
/// Key of the parent's path from the child's directory.
pub const RELATIVE_PATH: &str = "relative_path";
/// Key of the parent's path on its Windows machine.
pub const ABSOLUTE_WIN32_PATH: &str = "absolute_win32_path";
/// Key of the parent's path by volume GUID.
pub const VOLUME_PATH: &str = "volume_path";

/// Most entries accepted.
const MAX_ENTRIES: usize = 256;

/// A decoded locator.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Locator(pub BTreeMap<String, String>);

impl Locator {
    /// Decodes the item's bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let short = || Error::corrupt("the parent locator is too short");
        let (raw, rest) = RawLocator::read_from_prefix(bytes).map_err(|_| short())?;
        if guid(&raw.kind) != VHDX_LOCATOR_TYPE {
            let what = format!("the parent locator has the unknown type {}", guid(&raw.kind));
            return Err(Error::unsupported(what));
        }
        let count = usize::from(raw.entries.get());
        if count == 0 || count > MAX_ENTRIES {
            return Err(Error::corrupt(format!("the parent locator has {count} entries")));
        }
        let text = |offset: u32, length: u16| {
            let (start, length) = (offset as usize, usize::from(length));
            let bytes = start.checked_add(length).and_then(|end| bytes.get(start..end));
            match bytes {
                Some(bytes) if start > 0 && length > 0 && length.is_multiple_of(2) => {
                    Ok(utf16(bytes, false))
                }
                _ => Err(Error::corrupt("the parent locator names text outside itself")),
            }
        };
        let mut map = BTreeMap::new();
        for i in 0..count {
            let at = i * size_of::<RawLocatorEntry>();
            let (entry, _) = rest
                .get(at..)
                .and_then(|bytes| RawLocatorEntry::read_from_prefix(bytes).ok())
                .ok_or_else(short)?;
            let key = text(entry.key_offset.get(), entry.key_length.get())?;
            let value = text(entry.value_offset.get(), entry.value_length.get())?;
            if map.insert(key.clone(), value).is_some() {
                return Err(Error::corrupt(format!("the parent locator has `{key}` twice")));
            }
        }
        Ok(Self(map))
    }

    /// Encodes the item's bytes.
    pub fn encode(&self) -> Result<Vec<u8>> {
        self.try_encode().ok_or_else(|| Error::invalid("the parent's path is too long"))
    }

    /// `None` if a key or a value is too long for the format.
    fn try_encode(&self) -> Option<Vec<u8>> {
        let mut entries = Vec::new();
        let mut text = Vec::new();
        let base = size_of::<RawLocator>() + self.0.len() * size_of::<RawLocatorEntry>();
        for (key, value) in &self.0 {
            let (key, value) = (to_utf16(key, false), to_utf16(value, false));
            let key_offset = u32::try_from(base + text.len()).ok()?;
            let raw = RawLocatorEntry {
                key_offset: key_offset.into(),
                value_offset: key_offset.checked_add(key.len() as u32)?.into(),
                key_length: u16::try_from(key.len()).ok()?.into(),
                value_length: u16::try_from(value.len()).ok()?.into(),
            };
            entries.extend_from_slice(raw.as_bytes());
            text.extend(key);
            text.extend(value);
        }
        let raw = RawLocator {
            kind: VHDX_LOCATOR_TYPE.to_bytes_le(),
            reserved: 0.into(),
            entries: u16::try_from(self.0.len()).ok()?.into(),
        };
        Some([raw.as_bytes(), &entries, &text].concat())
    }

    /// Takes over from `old`, the image's locator so far, where on Windows the parent's directory is,
    /// if it is still the same directory. Nobody here knows volumes and drives, so without that the
    /// volume is left out rather than guessed.
    pub fn inherit_places(&mut self, old: &Self) {
        let split = |locator: &Self, key: &str| {
            let path = locator.0.get(key)?;
            let (dir, name) = path.rsplit_once('\\').unwrap_or((".", path));
            Some((dir.to_owned(), name.to_owned()))
        };
        let (Some((was, _)), Some((is, name))) =
            (split(old, RELATIVE_PATH), split(self, RELATIVE_PATH))
        else {
            return;
        };
        if was != is || !old.0.contains_key(VOLUME_PATH) {
            return;
        }
        for key in [ABSOLUTE_WIN32_PATH, VOLUME_PATH] {
            if let Some((dir, _)) = split(old, key) {
                self.0.insert(key.to_owned(), format!("{dir}\\{name}"));
            }
        }
    }

    /// What the parent must be and where it may be.
    pub fn link(&self) -> Result<ParentLink> {
        let mut accepted = Vec::new();
        for key in [PARENT_LINKAGE, PARENT_LINKAGE2] {
            if let Some(text) = self.0.get(key) {
                let id = Uuid::try_parse(text.trim()).map_err(|_| {
                    Error::corrupt(format!("`{key}` of the parent locator is no GUID: `{text}`"))
                })?;
                accepted.push(id);
            }
        }
        if !self.0.contains_key(PARENT_LINKAGE) {
            return Err(Error::corrupt("the parent locator has no `parent_linkage`"));
        }
        let candidates: Vec<_> = [RELATIVE_PATH, ABSOLUTE_WIN32_PATH, VOLUME_PATH]
            .iter()
            .filter_map(|key| self.0.get(*key).cloned())
            .collect();
        if candidates.is_empty() {
            return Err(Error::corrupt("the parent locator has no path"));
        }
        let identity = Identity::VhdxDataWrite(accepted);
        Ok(ParentLink { identity, candidates, modified: None })
    }
}

/// A GUID as locators have it.
pub fn braced(id: Uuid) -> String {
    id.braced().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn sample() -> Locator {
        let pairs = [
            (PARENT_LINKAGE, "{83ed0ec3-24c8-49a6-a959-5e4bf1288bfb}"),
            (RELATIVE_PATH, "..\\sub\\parent.vhdx"),
            (ABSOLUTE_WIN32_PATH, "\\\\?\\d:\\sub\\parent.vhdx"),
        ];
        Locator(pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
    }

    #[test]
    fn locators_survive_encoding() {
        let locator = sample();
        assert_eq!(Locator::decode(&locator.encode().unwrap()).unwrap(), locator);
    }

    #[test]
    fn the_link_takes_guids_in_any_form_and_paths_in_order() {
        let mut locator = sample();
        locator.0.insert(PARENT_LINKAGE2.into(), "83ED0EC3-24C8-49A6-A959-5E4BF1288BFC".into());
        let link = locator.link().unwrap();
        let Identity::VhdxDataWrite(ids) = link.identity else { panic!() };
        assert_eq!(ids.len(), 2);
        assert_eq!(link.candidates, ["..\\sub\\parent.vhdx", "\\\\?\\d:\\sub\\parent.vhdx"]);
    }

    #[test]
    fn a_parent_in_the_same_directory_stays_on_its_volume() {
        let volume = r"\\?\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\sub\";
        let mut old = sample();
        old.0.insert(VOLUME_PATH.into(), format!("{volume}parent.vhdx"));
        let mut new = sample();
        new.0.insert(RELATIVE_PATH.into(), r"..\sub\new.vhdx".into());
        new.0.insert(ABSOLUTE_WIN32_PATH.into(), r"\\?\C:\srv\sub\new.vhdx".into());
        let elsewhere = Locator(
            [(RELATIVE_PATH.to_owned(), r"..\other\new.vhdx".to_owned())].into_iter().collect(),
        );
        new.inherit_places(&old);
        assert_eq!(new.0[VOLUME_PATH], format!("{volume}new.vhdx"));
        assert_eq!(new.0[ABSOLUTE_WIN32_PATH], r"\\?\d:\sub\new.vhdx");
        assert_eq!(new.link().unwrap().candidates.len(), 3);

        let mut moved = elsewhere.clone();
        moved.inherit_places(&old);
        assert_eq!(moved, elsewhere);
    }

    #[test]
    fn locators_that_make_no_sense_are_refused() {
        type Damage<'a> = &'a dyn Fn(&mut Vec<u8>);
        let good = sample().encode().unwrap();
        let cases: [(Damage<'_>, ErrorKind); 6] = [
            (&|b| b[0] ^= 1, ErrorKind::Unsupported),
            (&|b| b[18] = 0, ErrorKind::Corrupt),
            (&|b| b[19] = 2, ErrorKind::Corrupt),
            (&|b| b[28] += 1, ErrorKind::Corrupt),
            (&|b| b[23] = 0xff, ErrorKind::Corrupt),
            (&|b| b.truncate(40), ErrorKind::Corrupt),
        ];
        for (i, (damage, kind)) in cases.iter().enumerate() {
            let mut bytes = good.clone();
            damage(&mut bytes);
            assert_eq!(Locator::decode(&bytes).unwrap_err().kind(), *kind, "case {i}");
        }
        for key in [PARENT_LINKAGE, RELATIVE_PATH] {
            let mut locator = sample();
            locator.0.remove(key);
            locator.0.remove(ABSOLUTE_WIN32_PATH);
            assert_eq!(locator.link().unwrap_err().kind(), ErrorKind::Corrupt, "{key}");
        }
    }
}
