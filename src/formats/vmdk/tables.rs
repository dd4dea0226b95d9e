//! Planned changes of grain tables.

use std::ops::Range;
use std::sync::Arc;

use crate::codec;
use crate::error::{Error, Result};
use crate::formats::plan::Steps;
use crate::storage::Storage;

use super::grains::{GrainTables, Table};
use super::repair::each_twins;

/// New contents of a table.
pub struct NewTable {
    /// Its number.
    pub number: u64,
    /// Byte offsets of its copies in the file, the redundant one first.
    pub places: Vec<u64>,
    /// All of it.
    pub bytes: Vec<u8>,
}

/// Calls `change` for every entry in use, with the number of its grain; the tables in which it gave
/// another value for one. Copies of tables must be equal.
pub fn changed(
    tables: &GrainTables,
    mut change: impl FnMut(u64, u64) -> Option<u32>,
) -> Result<Vec<NewTable>> {
    let mut found = Vec::new();
    let mut bytes = vec![0; tables.table_len() as usize];
    each_twins(tables, tables.rgd.unwrap_or(tables.gd), |number, twins| {
        let Table::At(first) = twins.at[0] else { return Ok(()) };
        codec::read_exact(&*tables.file, first, &mut bytes, "a grain table")?;
        let mut differs = false;
        for (grain, entry) in (number * tables.entries_per_table..).zip(bytes.chunks_exact_mut(4)) {
            let raw = tables.raw(entry, 0);
            if raw == 0 {
                continue;
            }
            if let Some(new) = change(grain, raw) {
                entry.copy_from_slice(&new.to_le_bytes());
                differs = true;
            }
        }
        if differs {
            let second = match twins.at[1] {
                Table::At(at) if at != first => Some(at),
                _ => None,
            };
            let places = second.into_iter().chain([first]).collect();
            found.push(NewTable { number, places, bytes: bytes.clone() });
        }
        Ok(())
    })?;
    Ok(found)
}

/// A table as it is.
pub fn read(tables: &GrainTables, number: u64) -> Result<NewTable> {
    let place = |directory: u64| -> Result<Option<u64>> {
        let mut entry = [0; 4];
        let at = directory + number * 4;
        codec::read_exact(&*tables.file, at, &mut entry, "a grain directory")?;
        Ok(match tables.decode_table(tables.raw(&entry, 0)) {
            Table::At(at) => Some(at),
            Table::Absent | Table::Bad => None,
        })
    };
    let Some(first) = place(tables.gd)? else {
        return Err(Error::corrupt(format!("grain table {number} does not exist")));
    };
    let second = match tables.rgd {
        Some(rgd) => place(rgd)?.filter(|at| *at != first),
        None => None,
    };
    let mut bytes = vec![0; tables.table_len() as usize];
    codec::read_exact(&*tables.file, first, &mut bytes, "a grain table")?;
    Ok(NewTable { number, places: second.into_iter().chain([first]).collect(), bytes })
}

/// Plans the writing of tables, the redundant copies before the others, durably.
pub fn write(file: &Arc<dyn Storage>, new: &[NewTable], what: &str, plan: &mut Steps) {
    let last = |table: &NewTable| table.places.len() - 1;
    for table in new {
        for at in &table.places[..last(table)] {
            plan.write(file, *at, table.bytes.clone(), what);
        }
    }
    for table in new {
        plan.write(file, table.places[last(table)], table.bytes.clone(), what);
    }
    plan.sync(file);
}

/// The value of a grain's entry; 0 where there is no table.
pub fn entry(tables: &GrainTables, grain: u64) -> Result<u64> {
    let (wanted, index) = (grain / tables.entries_per_table, grain % tables.entries_per_table);
    let width = tables.table_len() / tables.entries_per_table;
    let mut directory = [0; 4];
    codec::read_exact(&*tables.file, tables.gd + wanted * 4, &mut directory, "a grain directory")?;
    let Table::At(at) = tables.decode_table(tables.raw(&directory, 0)) else { return Ok(0) };
    let mut bytes = [0; 4];
    codec::read_exact(&*tables.file, at + index * width, &mut bytes, "a grain table")?;
    Ok(tables.raw(&bytes, 0))
}

/// The parts of the file that directories and tables take, the header with them.
pub fn places(tables: &GrainTables) -> Result<Vec<Range<u64>>> {
    let mut places = tables.reserved.clone();
    each_twins(tables, tables.rgd.unwrap_or(tables.gd), |_, twins| {
        for copy in twins.at {
            if let Table::At(at) = copy {
                places.push(at..at + tables.table_len());
            }
        }
        Ok(())
    })?;
    Ok(places)
}
