//! An image read through and found sound, for changes of the file as a whole, and the entries of its
//! BAT while such a change is planned.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::footers::{CopyState, Footers};
use super::layout::{DiskType, FOOTER, SECTOR, UNUSED};
use super::structure::Structure;
use super::survey::Survey;
use super::{parent_link, sparse_map};
use crate::codec;
use crate::disk::map::BlockMap;
use crate::error::{Error, Result};
use crate::formats::plan::Steps;
use crate::formats::{OpenContext, Severity};
use crate::storage::Storage;

const REPAIR: &str = "`flatdisk check --repair` puts right what can be";

/// What is known of a sound image.
pub(super) struct Sound {
    pub footers: Footers,
    /// What a fixed disk has not.
    pub sparse: Option<(Structure, Survey)>,
}

impl Sound {
    /// Reads the image in `file`, open for writing. Footers that are not what they should be, as a crash
    /// leaves them, are put right as before any write. Damage is refused.
    pub(super) fn read(file: &Arc<dyn Storage>, ctx: &OpenContext) -> Result<Self> {
        let mut footers = Footers::find(&**file, false)?;
        if footers.footer.saved_state == 1 {
            let what = "the disk belongs to a machine in saved state, which counts on it as it is";
            return Err(Error::unsupported(what).hint("start the machine and shut it down"));
        }
        if footers.disk_type == DiskType::Fixed {
            if footers.data_end < footers.footer.size() {
                return Err(damaged("the file is too short for the disk"));
            }
            return Ok(Self { footers, sparse: None });
        }
        let mut structure = Structure::read(&**file, &footers, false)?;
        if let Some(why) = &structure.read_only {
            return Err(damaged(why));
        }
        if footers.disk_type == DiskType::Differencing {
            parent_link(&footers, &structure)?;
        }
        let good = footers.head == CopyState::Good && footers.trailing == CopyState::Good;
        if !good || !footers.data_end.is_multiple_of(SECTOR) {
            let map = sparse_map(file.clone(), footers, structure, ctx);
            map.begin_writes()?;
            map.close()?;
            footers = Footers::find(&**file, false)?;
            structure = Structure::read(&**file, &footers, false)?;
        }
        let mut damage = None;
        let survey = Survey::run(&**file, &structure, footers.data_end, &mut |problem| {
            if problem.severity == Severity::Error {
                damage.get_or_insert(problem.what);
            }
        })?;
        match damage {
            Some(what) => Err(damaged(&format!("the BAT is damaged: {what}"))),
            None => Ok(Self { footers, sparse: Some((structure, survey)) }),
        }
    }
}

fn damaged(why: &str) -> Error {
    Error::corrupt(format!("not changed: {why}")).hint(REPAIR)
}

/// Plans that the trailing footer of these bytes, at `footer_at`, moves behind byte `end` if it is not
/// there. The copy at the beginning is intact, so the image opens whatever a crash leaves of this.
pub(super) fn move_footer(
    file: &Arc<dyn Storage>,
    footer: &[u8],
    footer_at: &mut u64,
    end: u64,
    plan: &mut Steps,
) {
    if end <= *footer_at {
        return;
    }
    plan.set_len(file, end + FOOTER, "room behind the last block");
    plan.write(file, end, footer.to_vec(), "the footer, at the new end");
    plan.sync(file);
    let old = *footer_at..(*footer_at + FOOTER).min(end);
    plan.punch(file, old, "the footer's old place");
    plan.sync(file);
    *footer_at = end;
}

/// Sectors of the BAT while entries in them change.
pub(super) struct Entries<'a> {
    file: &'a Arc<dyn Storage>,
    table_at: u64,
    sectors: BTreeMap<u64, [u8; SECTOR as usize]>,
}

impl<'a> Entries<'a> {
    /// Entries of the BAT at byte `table_at`, which begins with a sector.
    pub(super) fn new(file: &'a Arc<dyn Storage>, table_at: u64) -> Self {
        Self { file, table_at, sectors: BTreeMap::new() }
    }

    /// Makes a block's entry lead to the file's `sector`, or nowhere.
    pub(super) fn set(&mut self, block: u64, sector: Option<u32>) -> Result<()> {
        let at = self.table_at + block * 4;
        let (place, skip) = (at / SECTOR * SECTOR, (at % SECTOR) as usize);
        let bytes = match self.sectors.entry(place) {
            std::collections::btree_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::btree_map::Entry::Vacant(new) => {
                new.insert(codec::read_array(&**self.file, place, "the BAT")?)
            }
        };
        bytes[skip..skip + 4].copy_from_slice(&sector.unwrap_or(UNUSED).to_be_bytes());
        Ok(())
    }

    /// Adds the changed sectors, runs of them as one write, to `plan`, durably.
    pub(super) fn write(self, plan: &mut Steps, what: &str) {
        let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
        for (at, bytes) in self.sectors {
            match runs.last_mut() {
                Some((start, run)) if *start + run.len() as u64 == at => {
                    run.extend_from_slice(&bytes);
                }
                _ => runs.push((at, bytes.to_vec())),
            }
        }
        for (at, bytes) in runs {
            plan.write(self.file, at, bytes, what);
        }
        plan.sync(self.file);
    }
}
