//! An image read through and found sound, for changes of the file as a whole.

use std::sync::Arc;

use super::bat;
use super::open::Parts;
use super::regions::read_copy;
use super::space::Space;
use super::stock::Stock;
use crate::disk::map::BlockMap;
use crate::error::{Error, Result};
use crate::formats::OpenContext;
use crate::storage::Storage;

/// A sound image with a clean log, and what of its file is in use.
pub(super) struct Settled {
    pub parts: Parts,
    pub space: Space,
}

impl Settled {
    /// Reads the image in `file`, open for writing. What a writing session puts right by beginning and
    /// ending is put right by one: a log to replay, headers and region tables that differ, a last block
    /// that is cut short. Damage is refused.
    pub(super) fn read(file: &Arc<dyn Storage>, ctx: &OpenContext) -> Result<Self> {
        let first = Self::look(file)?;
        if first.is_clean()? {
            return Ok(first);
        }
        let own = first.parts.headers.header().data_write;
        let blocks = first.parts.into_blocks(&ctx.budget, Some(own));
        blocks.begin_session()?;
        blocks.close()?;
        drop(blocks);
        Self::look(file)
    }

    fn look(file: &Arc<dyn Storage>) -> Result<Self> {
        const REPAIR: &str = "`flatdisk check --repair` puts right what can be";
        let parts = Parts::read(file.clone(), false)?;
        if let Some(why) = &parts.read_only {
            return Err(Error::corrupt(format!("not changed: {why}")).hint(REPAIR));
        }
        let shape = parts.shape();
        let mut stock = Stock::new(&shape, parts.file_len)?;
        let mut fault = None;
        bat::scan(&*parts.file, &parts.regions.bat, &parts.layout, |index, slot, entry| {
            if let Err(misfit) = stock.take(slot, entry) {
                let at = parts.regions.bat.offset + index * bat::ENTRY_BYTES;
                fault.get_or_insert(misfit.error.at(at));
            }
        })?;
        match fault {
            Some(e) => Err(e.hint(REPAIR)),
            None => {
                let space = stock.finish();
                Ok(Self { parts, space })
            }
        }
    }

    fn is_clean(&self) -> Result<bool> {
        let headers = &self.parts.headers;
        let header = headers.header();
        let tables = [read_copy(&*self.parts.file, 0)?, read_copy(&*self.parts.file, 1)?];
        Ok(self.parts.replayed.is_none()
            && !header.dirty()
            && header.log_length > 0
            && headers.slots.iter().all(Option::is_some)
            && tables[0] == tables[1]
            && self.space.used_end() <= self.parts.file_len)
    }
}
