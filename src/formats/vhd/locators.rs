//! Where a differencing disk says its parent is: up to eight locators, and a name in the header.

use std::ops::Range;

use super::layout::{DynamicHeader, ParentLocator, REACH, SECTOR};
use crate::codec;
use crate::storage::Storage;

/// Longest locator data that is read, in bytes.
pub(super) const MAX_DATA: u32 = 64 << 10;

/// Relative Windows path, UTF-16 little-endian.
pub(super) const W2RU: [u8; 4] = *b"W2ru";
/// Absolute Windows path, UTF-16 little-endian.
pub(super) const W2KU: [u8; 4] = *b"W2ku";
/// `file://` URL, UTF-8.
pub(super) const MACX: [u8; 4] = *b"MacX";

/// The names of the parent that an image holds.
#[derive(Debug, Default)]
pub(super) struct Locators {
    found: Vec<(ParentLocator, String)>,
    /// The name in the dynamic header.
    pub name: String,
}

impl Locators {
    /// Reads every usable locator; others are skipped with a warning. One whose data was cut off
    /// forbids writing: in a file that grew, a guest's data would take its place and name a parent.
    pub(super) fn read(
        file: &dyn Storage,
        header: &DynamicHeader,
        warnings: &mut Vec<String>,
        read_only: &mut Option<String>,
    ) -> Self {
        let mut found = Vec::new();
        // Not every writer fills the entries from the first, so an unused one ends nothing.
        let used =
            header.parent_locators.iter().enumerate().filter(|l| l.1.platform_code != [0; 4]);
        for (index, locator) in used {
            let what = format!("parent locator {index} cannot be read");
            if locator.data_length.get() > MAX_DATA || locator.data_offset.get() >= REACH {
                warnings.push(what);
                continue;
            }
            let mut data = vec![0; locator.data_length.get() as usize];
            match file.read_at(locator.data_offset.get(), &mut data) {
                Ok(()) => found.push((*locator, decode(locator.platform_code, &data))),
                Err(_) => {
                    warnings.push(what.clone());
                    read_only.get_or_insert(what);
                }
            }
        }
        Self { found, name: codec::utf16(&header.parent_unicode_name, true) }
    }

    /// Whether no locator was usable.
    pub(super) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// The parts of the file that locator data occupies.
    pub(super) fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        self.found.iter().map(|(locator, _)| {
            let start = locator.data_offset.get();
            start..start.saturating_add(space(locator))
        })
    }

    /// The texts by platform code, for `info`.
    pub(super) fn texts(&self) -> impl Iterator<Item = (String, &str)> {
        self.found.iter().map(|(locator, text)| {
            (String::from_utf8_lossy(&locator.platform_code).into_owned(), text.as_str())
        })
    }

    /// Names of the parent, the one that travels best first.
    pub(super) fn candidates(&self) -> Vec<String> {
        let of = |code: [u8; 4]| {
            self.found.iter().filter(move |(l, _)| l.platform_code == code).map(|(_, text)| text)
        };
        let mut names: Vec<String> = Vec::new();
        for name in of(W2RU).chain(of(MACX)).chain(of(W2KU)).chain([&self.name]) {
            if !name.is_empty() && !names.contains(name) {
                names.push(name.clone());
            }
        }
        names
    }
}

/// Bytes reserved for a locator's data. The format says sectors, most writers say bytes; a value that
/// is neither, or larger than any path needs, must not declare blocks behind it damaged.
fn space(locator: &ParentLocator) -> u64 {
    let space = u64::from(locator.data_space.get());
    let used = u64::from(locator.data_length.get()).next_multiple_of(SECTOR);
    match space {
        0..SECTOR => (space * SECTOR).max(used),
        _ if space.is_multiple_of(SECTOR) && space <= u64::from(MAX_DATA) => space.max(used),
        _ => used,
    }
}

/// The path that a locator's data holds.
pub(super) fn decode(code: [u8; 4], data: &[u8]) -> String {
    match code {
        W2RU | W2KU => codec::utf16(data, false),
        MACX => {
            let text = String::from_utf8_lossy(data);
            let text = text.trim_end_matches('\0');
            let path = text.strip_prefix("file://").unwrap_or(text);
            percent_decoded(path.strip_prefix("localhost").unwrap_or(path))
        }
        _ => String::from_utf8_lossy(data).trim_end_matches('\0').to_owned(),
    }
}

/// Decodes `%20` and the like; what is no valid escape stays.
fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let digit = |at: usize| tail.get(at).and_then(|b| char::from(*b).to_digit(16));
        match (*first, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => {
                bytes.push((high * 16 + low) as u8);
                rest = &tail[2..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
