//! What was written when, and what a crash may therefore leave.
//!
//! A crash happens at a position of a recording: after so many of its operations. It leaves every
//! sector either as the last flush that was complete there promised it, or as any write begun since
//! left it. What a flush covers is a matter of the order of calls, which positions cannot tell when
//! nothing was recorded between them; so calls have ticks of their own.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use super::pattern;

pub const SECTOR: u64 = 512;

/// Contents of one sector; `None` for zeroes.
pub type Sector = Option<Arc<[u8]>>;

/// Contents of sectors by number.
pub type Sectors = BTreeMap<u64, Sector>;

/// A sector's contents as bytes would have them.
pub fn sector(bytes: &[u8]) -> Sector {
    if *bytes == [0; SECTOR as usize] { None } else { Some(bytes.into()) }
}

/// Tick of something still under way.
const NEVER: u64 = u64::MAX;

#[derive(Debug, Clone)]
struct Value {
    /// Position when the write began.
    begin: usize,
    /// Tick when it returned.
    end: u64,
    contents: Sector,
    /// The write reported success, so nothing older may be left once it was flushed.
    certain: bool,
}

/// The writes and flushes of one disk.
#[derive(Debug, Clone, Default)]
pub struct History {
    initial: Sectors,
    values: BTreeMap<u64, Vec<Value>>,
    /// Every flush that succeeded: the tick when it began, the position when it returned.
    flushes: Vec<(u64, usize)>,
    ticks: u64,
}

impl History {
    /// A disk that begins with the given sectors, zeroes elsewhere.
    pub fn new(initial: BTreeMap<u64, Sector>) -> Self {
        Self { initial, ..Self::default() }
    }

    /// The sectors that are or ever were anything but zeroes.
    pub fn touched(&self) -> BTreeSet<u64> {
        self.initial.keys().chain(self.values.keys()).copied().collect()
    }

    /// A sector as the newest write left it.
    pub fn now(&self, number: u64) -> Sector {
        match self.values.get(&number).and_then(|values| values.last()) {
            Some(value) => value.contents.clone(),
            None => self.initial.get(&number).cloned().flatten(),
        }
    }

    /// Notes that a write of `data` at byte `at` begins; [`Self::end_write`] says how it went.
    pub fn begin_write(&mut self, begin: usize, at: u64, data: &[u8]) {
        let end = at + data.len() as u64;
        for number in at / SECTOR..end.div_ceil(SECTOR) {
            let mut contents = match self.now(number) {
                Some(old) => old.to_vec(),
                None => vec![0; SECTOR as usize],
            };
            let from = at.max(number * SECTOR);
            let to = end.min((number + 1) * SECTOR);
            contents[(from % SECTOR) as usize..][..(to - from) as usize]
                .copy_from_slice(&data[(from - at) as usize..][..(to - from) as usize]);
            let value = Value { begin, end: NEVER, contents: sector(&contents), certain: false };
            self.values.entry(number).or_default().push(value);
        }
    }

    /// As [`Self::begin_write`] for zeroes. Sectors that were always zeroes are left out.
    pub fn begin_zeroes(&mut self, begin: usize, at: u64, len: u64) {
        let range = at / SECTOR..(at + len).div_ceil(SECTOR);
        for number in self.touched().range(range).copied().collect::<Vec<_>>() {
            let from = at.max(number * SECTOR);
            let to = (at + len).min((number + 1) * SECTOR);
            self.begin_write(begin, from, &vec![0; (to - from) as usize]);
        }
    }

    /// The next tick.
    pub fn tick(&mut self) -> u64 {
        self.ticks += 1;
        self.ticks
    }

    /// Ends the newest write of every sector in the range.
    pub fn end_write(&mut self, at: u64, len: u64, success: bool) {
        let end = self.tick();
        for (_, values) in self.values.range_mut(at / SECTOR..(at + len).div_ceil(SECTOR)) {
            if let Some(value) = values.last_mut().filter(|value| value.end == NEVER) {
                value.end = end;
                value.certain = success;
            }
        }
    }

    /// After a failed write: the sector was seen to hold `contents`, so that is what later partial
    /// writes are merged into.
    pub fn observe(&mut self, number: u64, contents: Sector, position: usize) {
        let value = Value { begin: position, end: self.tick(), contents, certain: false };
        self.values.entry(number).or_default().push(value);
    }

    /// After a failed flush: no later one covers what this one should have. Only what is written anew
    /// can be promised again.
    pub fn doubt(&mut self) {
        let flushed = self.flushes.iter().map(|flush| flush.0).max().unwrap_or(0);
        for value in self.values.values_mut().flatten() {
            value.certain &= value.end < flushed;
        }
    }

    /// Notes a flush that succeeded: [`Self::tick`] when it began, position when it returned.
    pub fn flushed(&mut self, begin: u64, end: usize) {
        self.flushes.push((begin, end));
    }

    /// How many flushes were complete at `position`.
    pub fn flushes_before(&self, position: usize) -> usize {
        self.flushes.iter().filter(|flush| flush.1 <= position).count()
    }

    /// What a crash at `position` may leave in each touched sector.
    pub fn legal_at(&self, position: usize) -> Legal {
        self.legal_between(position, position)
    }

    /// As [`Self::legal_at`], but only flushes that were complete at position `kept` promised anything.
    pub fn legal_between(&self, kept: usize, position: usize) -> Legal {
        let covered = self.flushes.iter().filter(|flush| flush.1 <= kept);
        let flushed = covered.map(|flush| flush.0).max();
        let legal = |number| (number, self.legal_values(number, position, flushed));
        Legal(self.touched().into_iter().map(legal).collect())
    }

    fn legal_values(&self, number: u64, position: usize, flushed: Option<u64>) -> Vec<Sector> {
        let values = self.values.get(&number).map(Vec::as_slice).unwrap_or_default();
        // The promise: the newest certain value that the flush covered.
        let promised = values
            .iter()
            .rposition(|value| value.certain && flushed.is_some_and(|begin| value.end < begin));
        let (first, later) = match promised {
            Some(index) => (values[index].contents.clone(), &values[index + 1..]),
            None => (self.initial.get(&number).cloned().flatten(), values),
        };
        let mut legal = vec![first];
        for value in later {
            if value.begin < position && !legal.contains(&value.contents) {
                legal.push(value.contents.clone());
            }
        }
        legal
    }

    /// What sectors of a range may hold after the newest write of them failed: what they held before,
    /// or what was written.
    pub fn candidates(&self, at: u64, len: u64) -> Legal {
        let mut legal = Legal::default();
        for number in at / SECTOR..(at + len).div_ceil(SECTOR) {
            let Some(values) = self.values.get(&number) else { continue };
            let before = match values.len() {
                0 | 1 => self.initial.get(&number).cloned().flatten(),
                count => values[count - 2].contents.clone(),
            };
            legal.0.insert(number, vec![before, self.now(number)]);
        }
        legal
    }

    /// Exactly what the disk must hold now.
    pub fn expected(&self) -> Legal {
        Legal(self.touched().into_iter().map(|number| (number, vec![self.now(number)])).collect())
    }
}

/// For each touched sector what it may hold; all others hold zeroes.
#[derive(Debug, Clone, Default)]
pub struct Legal(pub BTreeMap<u64, Vec<Sector>>);

impl Legal {
    /// What a sector holds, if it may hold these bytes; if not, what they are and what is allowed.
    pub fn check(&self, number: u64, found: &[u8]) -> Result<Sector, String> {
        let zero = [None];
        let allowed = self.0.get(&number).map_or(&zero[..], Vec::as_slice);
        match_one(number, found, allowed)
    }

    /// As [`Self::check`] for touched sectors without gaps from the first one on.
    pub fn check_run(
        &self,
        run: Range<u64>,
        bytes: &[u8],
        found: &mut Vec<(u64, Sector)>,
    ) -> Result<(), String> {
        for ((&number, allowed), bytes) in self.0.range(run).zip(bytes.chunks(SECTOR as usize)) {
            found.push((number, match_one(number, bytes, allowed)?));
        }
        Ok(())
    }

    /// The parts of a range of sectors that were never touched.
    pub fn untouched(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut parts = Vec::new();
        let mut pos = range.start;
        for (&number, _) in self.0.range(range.clone()) {
            if pos < number {
                parts.push(pos..number);
            }
            pos = number + 1;
        }
        if pos < range.end {
            parts.push(pos..range.end);
        }
        parts
    }

    /// The touched sectors as runs of neighbours.
    pub fn runs(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for &number in self.0.keys() {
            match runs.last_mut() {
                Some(run) if run.end == number => run.end += 1,
                _ => runs.push(number..number + 1),
            }
        }
        runs
    }
}

fn match_one(number: u64, found: &[u8], allowed: &[Sector]) -> Result<Sector, String> {
    let matches = |contents: &&Sector| match contents {
        Some(bytes) => bytes[..] == *found,
        None => *found == [0; SECTOR as usize],
    };
    if let Some(contents) = allowed.iter().find(matches) {
        return Ok(contents.clone());
    }
    let expected: Vec<_> = allowed.iter().map(describe).collect();
    Err(format!(
        "sector {number} (disk offset {:#x}) holds: {}\n  expected one of: {}",
        number * SECTOR,
        pattern::describe(found),
        expected.join(" | ")
    ))
}

fn describe(contents: &Sector) -> String {
    match contents {
        Some(bytes) => pattern::describe(bytes),
        None => "zeroes".to_owned(),
    }
}
