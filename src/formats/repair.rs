//! Repairing: a format plans, one place carries out.
//!
//! A driver's [`Format::repair`](super::Format::repair) turns what its check finds into a [`Plan`]: the
//! changes that put right what can be rebuilt from what is left, in the order in which they must
//! happen. A plan is printed or carried out, by the same [code](super::plan) for all formats.
//!
//! # What a plan promises
//!
//! - Carrying it out never touches data that anything leads to, nor what might be such data while
//!   errors are left: space is given back only where the check finds none.
//! - A crash anywhere in it leaves the image no worse than it was, and planning again then plans the
//!   rest. So plans need no log of their own.
//! - Nothing that could be read before reads otherwise afterwards. What could not be read at all is
//!   given up only where [`Scope::Lossy`] consents to that, and then reads as zeroes.
//!
//! Repairs that depend on others come in later rounds: [`repair`] plans and carries out until
//! nothing is left to plan. Files grow in a round of its own, when no table leads past their end any
//! more: what lies there must not come to be part of a disk.

use std::ops::{Deref, DerefMut, Range};
use std::path::Path;
use std::sync::Arc;

use super::plan::{Change, Steps};
use super::{OpenContext, OpenOptions, Report, check_with, recognise};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::draft::Draft;
use crate::storage::{Access, Host, Storage};

/// Bytes that a round copies at most: an image of which more shares its place is nonsense, and would
/// fill the host.
pub const MAX_COPIED: u64 = 16 << 30;
/// Most rounds of one repair.
const MAX_ROUNDS: usize = 1000;
/// Bytes that are looked at together when unused space is searched for contents.
const PAGE: u64 = 4096;

/// What to repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Give unused space back to the host.
    Leaks,
    /// Everything that can be rebuilt without losing data.
    All,
    /// The same; what is left after that and cannot be read is given up, and structures that look
    /// right are taken for right in spite of their checksums.
    Lossy,
}

/// Steps that mend an image. See the module's documentation.
#[derive(Debug)]
pub struct Plan {
    scope: Scope,
    /// A check found no errors.
    sound: bool,
    steps: Steps,
}

impl Plan {
    /// A plan without steps, for an image of which a check gave `report`.
    pub fn new(scope: Scope, report: &Report) -> Self {
        Self { scope, sound: report.errors == 0, steps: Steps::new() }
    }

    /// Whether more than leaks is to be repaired.
    pub fn all(&self) -> bool {
        self.scope != Scope::Leaks
    }

    /// Whether what cannot be read may be given up, and what looks right be taken for right.
    pub fn lossy(&self) -> bool {
        self.scope == Scope::Lossy
    }

    /// Whether unused space may be given back, and bitmaps be written: nothing else is left to be done,
    /// and with errors in an image nobody knows what is unused or whose a place is.
    pub fn reclaims(&self) -> bool {
        self.sound && self.is_empty()
    }

    /// A plan for the same image, to be put together first and appended later.
    pub fn part(&self) -> Self {
        Self { steps: Steps::new(), ..*self }
    }

    /// Appends the steps of another plan.
    pub fn append(&mut self, part: Self) {
        self.steps.append(part.steps);
    }
}

impl Deref for Plan {
    type Target = Steps;

    fn deref(&self) -> &Steps {
        &self.steps
    }
}

impl DerefMut for Plan {
    fn deref_mut(&mut self) -> &mut Steps {
        &mut self.steps
    }
}

/// What a repair did, or would do.
#[derive(Debug)]
pub struct Repair {
    /// What a check found before.
    pub before: Report,
    /// What a check finds now, or would find.
    pub after: Report,
    /// The changes, in order.
    pub changes: Vec<Change>,
}

/// Repairs the image at `path`. A `dry_run` repairs a draft of it, and so tells every change and what
/// a check would find then, while the image is only read.
///
/// # Errors
///
/// [`ErrorKind::Busy`] while somebody has the image open, those of [`check`](super::check), and those of writing.
pub fn repair(
    host: &Arc<dyn Host>,
    path: &Path,
    options: &OpenOptions,
    scope: Scope,
    dry_run: bool,
) -> Result<Repair> {
    let host: &Arc<dyn Host> = &match dry_run {
        true => Draft::over(host)?,
        false => host.clone(),
    };
    let options = &OpenOptions { access: Access::Write, ..options.clone() };
    let file = host.open(path, options.access)?;
    let ctx = OpenContext::new(host, &*file, options);
    let in_file = |e: Error| e.in_file(path);
    let format = recognise(&*file)?;
    let check = || check_with(format, &file, &ctx, host, path, options);
    let before = check()?;
    let mut after = before.clone();
    let mut changes = Vec::new();
    for _ in 0..MAX_ROUNDS {
        let mut plan = Plan::new(scope, &after);
        match format.repair(file.clone(), &ctx, &mut plan) {
            Ok(()) => {}
            // Too damaged to be understood: the check says so, and there is nothing to rebuild from.
            Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => break,
            Err(e) => return Err(in_file(e)),
        }
        let planned = plan.changes();
        // A plan that comes again does not help.
        if planned.is_empty() || changes.ends_with(&planned) {
            break;
        }
        changes.extend(planned);
        plan.carry_out(&()).map_err(in_file)?;
        drop(plan);
        after = check()?;
    }
    Ok(Repair { before, after, changes })
}

/// How many bytes of a range that nothing uses take space for contents, in pages that are not all
/// zeroes. Freed space that was punched takes none, whatever the host's allocation unit.
///
/// # Errors
///
/// Those of the host.
pub fn stored(file: &dyn Storage, range: Range<u64>) -> Result<u64> {
    const CHUNK: u64 = 256 << 10;
    let failed = |at| move |e| Error::io("reading unused space", &e).in_file(file.path()).at(at);
    let end = range.end.min(file.len().map_err(failed(range.start))?);
    let mut buf = vec![0; CHUNK.min(end.saturating_sub(range.start)) as usize];
    let mut stored = 0;
    let mut pos = range.start;
    while pos < end {
        let data = file.next_data(pos).map_err(failed(pos))?;
        let Some(data) = data.filter(|data| data.end > pos) else { break };
        pos = data.start.max(pos);
        let stop = data.end.min(end);
        while pos < stop {
            // Pages are those of the file, not of the range.
            let chunk = pos..stop.min((pos / CHUNK + 1) * CHUNK);
            let buf = &mut buf[..(chunk.end - chunk.start) as usize];
            file.read_at(chunk.start, buf).map_err(failed(chunk.start))?;
            let (first, rest) = buf.split_at(buf.len().min((PAGE - pos % PAGE) as usize));
            stored += std::iter::once(first)
                .chain(rest.chunks(PAGE as usize))
                .filter(|page| page.iter().any(|byte| *byte != 0))
                .map(|page| page.len() as u64)
                .sum::<u64>();
            pos = chunk.end;
        }
    }
    Ok(stored)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryFile;

    #[test]
    fn only_pages_with_contents_count_as_stored() {
        let file = MemoryFile::new("x", &[0; 20 * 4096]);
        assert_eq!(stored(&*file, 0..20 * 4096).unwrap(), 0);
        file.write_at(5000, &[1]).unwrap();
        file.write_at(9 * 4096, &[1; 4097]).unwrap();
        assert_eq!(stored(&*file, 0..20 * 4096).unwrap(), 3 * 4096);
        assert_eq!(stored(&*file, 5000..20 * 4096).unwrap(), 2 * 4096 + 8192 - 5000);
        assert_eq!(stored(&*file, 5001..9 * 4096).unwrap(), 0);
        assert_eq!(stored(&*file, 10 * 4096..u64::MAX).unwrap(), 4096);
    }
}
