//! What the footer says beside what the disk is, for looking at and for changing.

use uuid::Uuid;
use zerocopy::IntoBytes;

use super::footers::{CopyState, Footers};
use super::layout::{DiskType, EPOCH, Footer, SECTOR, time};
use crate::codec;
use crate::disk::sync_file;
use crate::error::{Error, Result};
use crate::formats::meta::{Changes, Entry, cannot_be};
use crate::storage::Storage;

const ID: &str = "a UUID";
const APPLICATION: &str = "1 to 4 letters or digits, such as win, vpc or qem2";
const VERSION: &str = "MAJOR.MINOR";
const HOST: &str = "Wi2k, Mac";
const TIME: &str = "a time from 2000 on, such as 2026-01-31T12:00:00Z";
const STATE: &str = "0, 1";

/// What the footer of the image in `file` says.
pub(super) fn list(file: &dyn Storage, force: bool) -> Result<Vec<Entry>> {
    let footers = Footers::find(file, force)?;
    let footer = &footers.footer;
    let text = |bytes: &[u8]| {
        let text: String = bytes.iter().map(|byte| char::from(*byte)).collect();
        text.trim_end_matches(['\0', ' ']).to_owned()
    };
    let version = footer.creator_version.get();
    let version = format!("{}.{}", version >> 16, version & 0xffff);
    let created = jiff::Timestamp::try_from(time(footer.timestamp.get()));
    let geometry = footer.geometry();
    Ok(vec![
        Entry::new("unique_id", Uuid::from_bytes(footer.unique_id).to_string()).settable(ID),
        Entry::new("creator_application", text(&footer.creator_application)).settable(APPLICATION),
        Entry::new("creator_version", version).settable(VERSION),
        Entry::new("creator_host_os", text(&footer.creator_host_os)).settable(HOST),
        Entry::new("time_stamp", created.map(|t| t.to_string()).unwrap_or_default()).settable(TIME),
        Entry::new("saved_state", footer.saved_state.to_string()).settable(STATE),
        Entry::new("disk_type", footers.disk_type.name()),
        Entry::new("original_size", footer.original_size.get().to_string()),
        Entry::new("current_size", footer.current_size.get().to_string()),
        Entry::new("geometry_size", geometry.size().to_string()),
    ])
}

/// Changes the footer: at the end of the file, which counts, and then the copy.
pub(super) fn set(file: &dyn Storage, changes: &Changes) -> Result<()> {
    let footers = Footers::find(file, false)?;
    let sparse = footers.disk_type != DiskType::Fixed;
    let sound = footers.trailing.intact() && footers.trailing_garbage == 0;
    // A footer across two sectors could be torn, and a fixed disk has no other.
    let whole = sparse || footers.data_end.is_multiple_of(SECTOR);
    if !sound || !whole || (sparse && footers.head != CopyState::Good) {
        let what = "a footer of the image is missing, damaged, or in the wrong place";
        return Err(Error::corrupt(what).hint("`flatdisk check --repair` puts it right"));
    }
    let mut footer = footers.footer;
    if changes.new_id {
        footer.unique_id = *Uuid::new_v4().as_bytes();
    }
    for (key, value) in &changes.values {
        put(&mut footer, key, value)?;
    }
    footer.seal();
    codec::write_all(file, footers.data_end, footer.as_bytes(), "the footer")?;
    sync_file(file)?;
    if sparse {
        codec::write_all(file, 0, footer.as_bytes(), "the footer copy")?;
        sync_file(file)?;
    }
    Ok(())
}

fn put(footer: &mut Footer, key: &str, value: &str) -> Result<()> {
    let refuse = |can_be| cannot_be(key, value, can_be);
    match &*key.to_ascii_lowercase() {
        "unique_id" => {
            let id = Uuid::try_parse(value).ok().filter(|id| !id.is_nil());
            footer.unique_id = *id.ok_or_else(|| refuse(ID))?.as_bytes();
        }
        "creator_application" => {
            let plain = value.bytes().all(|b| b.is_ascii_alphanumeric());
            if value.is_empty() || value.len() > 4 || !plain {
                return Err(refuse(APPLICATION));
            }
            footer.creator_application = padded(value);
        }
        "creator_version" => {
            let parts = value.split_once('.').map(|(a, b)| (a.parse::<u16>(), b.parse::<u16>()));
            let Some((Ok(major), Ok(minor))) = parts else { return Err(refuse(VERSION)) };
            footer.creator_version = (u32::from(major) << 16 | u32::from(minor)).into();
        }
        "creator_host_os" => {
            let known = ["Wi2k", "Mac"].into_iter().find(|known| known.eq_ignore_ascii_case(value));
            footer.creator_host_os = padded(known.ok_or_else(|| refuse(HOST))?);
        }
        "time_stamp" => {
            let given: jiff::Timestamp = value.parse().map_err(|_| refuse(TIME))?;
            let since = given.as_second().checked_sub(EPOCH as i64);
            let seconds = since.and_then(|since| u32::try_from(since).ok());
            footer.timestamp = seconds.ok_or_else(|| refuse(TIME))?.into();
        }
        "saved_state" => {
            let state = value.parse().ok().filter(|state| *state <= 1u8);
            footer.saved_state = state.ok_or_else(|| refuse(STATE))?;
        }
        _ => return Err(Error::invalid(format!("there is no key `{key}`"))),
    }
    Ok(())
}

/// At most four characters as the footer has them, with blanks behind.
fn padded(text: &str) -> [u8; 4] {
    let mut bytes = [b' '; 4];
    bytes.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
    bytes
}
