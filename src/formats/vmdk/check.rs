//! Checking: everything a walk of the tables finds, and what opening found odd. Writes nothing.

use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{ErrorKind, Result};
use crate::formats::{OpenContext, Report, Severity, repair};
use crate::storage::Storage;

use super::grains::{Dialect, TableCaches};
use super::layout::{Header, SECTOR};
use super::link::Link;
use super::map::SparseExtent;
use super::stream;
use super::walk::{self, Kind};

/// Checks the disk whose descriptor is in `file`.
pub fn check(file: Arc<dyn Storage>, ctx: &OpenContext, report: &mut Report) -> Result<()> {
    let link = match Link::open_with(file, ctx, true) {
        Ok(link) => link,
        Err(e) if e.kind() == ErrorKind::Corrupt => {
            report.add_in(e.path().map(PathBuf::from), Severity::Error, e.offset(), e.what());
            return Ok(());
        }
        Err(e) => return Err(e),
    };
    for problem in &link.problems {
        report.add(Severity::Error, None, problem.as_str());
    }
    // An image that opens is looked through for what is damaged.
    if link.lost && !ctx.force {
        link.damage.iter().all(|range| report.lose(range.start, range.end - range.start));
    }
    for warning in &link.warnings {
        report.add(Severity::Notice, None, warning.as_str());
    }
    for extent in &link.sparse {
        let own = extent.file.path() == link.descriptor.file.path();
        let name = (!own).then(|| extent.file.path().to_owned());
        match extent.tables.dialect {
            Dialect::Packed { markers } => check_stream(extent, markers, name, ctx, report)?,
            _ => check_extent(extent, name, report)?,
        }
    }
    Ok(())
}

/// Checks one extent of compressed grains, called `name` where it is not the image itself.
fn check_stream(
    extent: &SparseExtent,
    markers: bool,
    name: Option<PathBuf>,
    ctx: &OpenContext,
    report: &mut Report,
) -> Result<()> {
    let tables = &extent.tables;
    let cache = TableCaches::new(&ctx.budget);
    report.blocks += tables.grains();
    report.allocated_blocks += stream::check_grains(tables, &cache, &mut |at, what| {
        report.add_in(name.clone(), Severity::Error, Some(at), what);
    })?;
    if !markers || tables.salvage.is_some() {
        return Ok(());
    }
    // Where tables lie is told by the last header; where the stream begins, by the first.
    let first = Header::read(&*extent.file, 0)?.overhead;
    stream::check_order(tables, &cache, first, &mut |at, what| {
        report.add_in(name.clone(), Severity::Notice, Some(at), what);
    })
}

/// Checks one sparse extent, called `name` where it is not the image itself.
fn check_extent(extent: &SparseExtent, name: Option<PathBuf>, report: &mut Report) -> Result<()> {
    let usage = walk::walk(&extent.tables, &mut |problem| {
        let severity = match problem.kind {
            // What a crash leaves costs nothing: the next writer renews the redundant copy.
            Kind::Torn if extent.unclean => Severity::Notice,
            Kind::Damage | Kind::Torn => Severity::Error,
            Kind::Oddity => Severity::Notice,
        };
        report.add_in(name.clone(), severity, Some(problem.at), problem.what);
    })?;
    report.blocks += extent.tables.grains();
    report.allocated_blocks += usage.allocated;
    if let Some(free) = extent.free_sector.filter(|free| *free < usage.end()) {
        let what = format!(
            "free space begins at sector {free} for the header, but in use is up to sector {}",
            usage.end()
        );
        report.add_in(name.clone(), Severity::Error, Some(0), what);
    }
    for run in usage.unused(extent.overhead) {
        let stored = repair::stored(&*extent.file, run.start * SECTOR..run.end * SECTOR)?;
        if stored > 0 {
            report.leaked_bytes += stored;
            let what = format!("{stored} bytes that no grain table leads to");
            report.add_in(name.clone(), Severity::Leak, Some(run.start * SECTOR), what);
        }
    }
    Ok(())
}
