//! Walks all tables of a sparse extent: finds damage, and which parts of the file are in use.
//!
//! A check reports what the walk finds. Writing begins with a walk too ([`verify`]): space can only
//! be handed out by somebody who knows what is taken, and tables that contradict themselves must not
//! be built upon. Tables that lie in holes of the host file are not read, so the walk costs what the
//! tables really take: at most 128 MiB of reading for each TiB of stored data, both copies.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::codec;
use crate::disk::map::Contents;
use crate::disk::space::{Limits, MultipleOf, Space};
use crate::error::{Error, Result};
use crate::storage::Storage;

use super::grains::{Grain, GrainTables, Table};
use super::layout::SECTOR;

/// How bad a problem is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Data is lost or would be by writing.
    Damage,
    /// A table and its redundant copy differ, but each could be the newer one: what a crash between
    /// the two leaves.
    Torn,
    /// Odd but harmless.
    Oddity,
}

/// Something a walk found.
#[derive(Debug)]
pub struct Problem {
    /// How bad it is.
    pub kind: Kind,
    /// Byte of the extent file.
    pub at: u64,
    /// Which structure, and what is wrong.
    pub what: String,
}

/// A set of units of the file, as bits. Takes memory for what is in it, not for the file's length: a
/// file that is all hole may be of any length.
#[derive(Debug, Default)]
struct Bits(BTreeMap<u64, u64>);

impl Bits {
    /// Whether it was not there before.
    fn insert(&mut self, unit: u64) -> bool {
        let (word, bit) = (self.0.entry(unit / 64).or_default(), 1 << (unit % 64));
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// The first unit of the set at or after `from`.
    fn next(&self, from: u64) -> Option<u64> {
        let first = self.0.get(&(from / 64)).map(|word| word >> (from % 64) << (from % 64));
        let (index, word) = match first {
            Some(word) if word != 0 => (from / 64, word),
            _ => self.0.range(from / 64 + 1..).next().map(|(index, word)| (*index, *word))?,
        };
        Some(index * 64 + u64::from(word.trailing_zeros()))
    }

    /// The first unit at or after `from` that is not in the set.
    fn next_free(&self, from: u64) -> u64 {
        let mut unit = from;
        loop {
            let word = self.0.get(&(unit / 64)).copied().unwrap_or(0);
            let taken = u64::from((word >> (unit % 64)).trailing_ones());
            unit += taken;
            if taken == 0 || !unit.is_multiple_of(64) {
                return unit;
            }
        }
    }

    fn last(&self) -> Option<u64> {
        let (index, word) = self.0.last_key_value()?;
        Some(index * 64 + u64::from(63 - word.leading_zeros()))
    }
}

/// A set of units of the file, as runs: `start -> end`, neither overlapping nor touching. A run costs
/// the same however long it is.
#[derive(Debug, Default)]
struct Spans(BTreeMap<u64, u64>);

impl Spans {
    /// The run at or before `unit`.
    fn before(&self, unit: u64) -> Option<(u64, u64)> {
        self.0.range(..=unit).next_back().map(|(start, end)| (*start, *end))
    }

    fn contains(&self, unit: u64) -> bool {
        self.before(unit).is_some_and(|(_, end)| unit < end)
    }

    /// Whether nothing of a range was there before.
    fn insert(&mut self, range: Range<u64>) -> bool {
        let mut whole = range.clone();
        let mut new = true;
        while let Some((start, end)) = self.before(whole.end).filter(|(_, end)| *end >= whole.start)
        {
            new &= start >= range.end || end <= range.start;
            whole = whole.start.min(start)..whole.end.max(end);
            self.0.remove(&start);
        }
        self.0.insert(whole.start, whole.end);
        new
    }

    /// The first unit of the set at or after `from`.
    fn next(&self, from: u64) -> Option<u64> {
        match self.contains(from) {
            true => Some(from),
            false => self.0.range(from..).next().map(|(start, _)| *start),
        }
    }

    /// The first unit at or after `from` that is not in the set.
    fn next_free(&self, from: u64) -> u64 {
        self.before(from).map_or(from, |(_, end)| end.max(from))
    }

    fn last(&self) -> Option<u64> {
        self.0.last_key_value().map(|(_, end)| end - 1)
    }
}

/// Units in use. Grains come in any order, so that runs of them would be many where bits are few;
/// sectors are many where runs are few.
#[derive(Debug)]
enum Taken {
    Bits(Bits),
    Spans(Spans),
}

impl Taken {
    /// Whether nothing of a range was there before.
    fn insert(&mut self, range: Range<u64>) -> bool {
        match self {
            Self::Bits(bits) => range.filter(|unit| !bits.insert(*unit)).count() == 0,
            Self::Spans(spans) => range.is_empty() || spans.insert(range),
        }
    }

    fn next(&self, from: u64) -> Option<u64> {
        match self {
            Self::Bits(bits) => bits.next(from),
            Self::Spans(spans) => spans.next(from),
        }
    }

    fn next_free(&self, from: u64) -> u64 {
        match self {
            Self::Bits(bits) => bits.next_free(from),
            Self::Spans(spans) => spans.next_free(from),
        }
    }

    /// Whether any of a range is in the set.
    fn meets(&self, range: &Range<u64>) -> bool {
        self.next(range.start).is_some_and(|unit| unit < range.end)
    }

    fn last(&self) -> Option<u64> {
        match self {
            Self::Bits(bits) => bits.last(),
            Self::Spans(spans) => spans.last(),
        }
    }

    /// The same in units of which each has `factor` of the new ones.
    fn refined(&self, factor: u64) -> Self {
        let mut spans = Spans::default();
        let mut next = self.next(0);
        while let Some(start) = next {
            let end = self.next_free(start);
            spans.insert(start * factor..end * factor);
            next = self.next(end);
        }
        Self::Spans(spans)
    }
}

/// Most runs of sectors that are looked after, some tens of MiB of memory.
const MAX_SPANS: usize = 1 << 20;

/// Which parts of an extent file are in use. Kept in units of a grain as long as all grains are
/// aligned to their size, as all known writers have them, and in sectors otherwise.
#[derive(Debug)]
pub struct Usage {
    /// Sectors per unit.
    unit: u64,
    /// Sectors per grain.
    grain: u64,
    /// Sectors of the file, a partial one counted.
    file: u64,
    grains: Taken,
    metadata: Taken,
    /// Bytes of the file that hold header, descriptor, directories and tables.
    places: Vec<Range<u64>>,
    /// Grains that the tables lead to.
    pub allocated: u64,
}

impl Usage {
    fn new(grain: u64, file: u64) -> Self {
        Self {
            unit: grain,
            grain,
            file,
            grains: Taken::Bits(Bits::default()),
            metadata: Taken::Bits(Bits::default()),
            places: Vec::new(),
            allocated: 0,
        }
    }

    /// The units that a range of bytes touches.
    fn units(&self, place: &Range<u64>) -> Range<u64> {
        let unit = self.unit * SECTOR;
        place.start / unit..place.end.div_ceil(unit)
    }

    fn add_metadata(&mut self, place: Range<u64>) {
        let units = self.units(&place);
        self.metadata.insert(units);
        self.places.push(place);
    }

    /// Goes on in sectors.
    fn refine(&mut self) {
        self.grains = self.grains.refined(self.unit);
        self.metadata = Taken::Spans(Spans::default());
        self.unit = 1;
        for place in std::mem::take(&mut self.places) {
            self.add_metadata(place);
        }
    }

    /// Counts the grain at byte `at` as in use; says what is there already.
    pub fn add_grain(&mut self, at: u64) -> Option<&'static str> {
        if !at.is_multiple_of(self.unit * SECTOR) {
            self.refine();
        }
        let units = self.units(&(at..at + self.grain * SECTOR));
        self.allocated += 1;
        if !self.grains.insert(units.clone()) {
            return Some("another grain");
        }
        self.metadata.meets(&units).then_some("a table or header")
    }

    /// Whether the grains lie too scattered to be looked after in bounded memory.
    fn is_too_much(&self) -> bool {
        matches!(&self.grains, Taken::Spans(spans) if spans.0.len() > MAX_SPANS)
    }

    /// Whether a range of bytes lies inside the file and no grain and no table uses any of it.
    pub fn is_free(&self, place: &Range<u64>) -> bool {
        let grains = self.grains.meets(&self.units(place));
        // Tables are all of one length, so only the last that begins before the end can reach in.
        let before = self.places.partition_point(|other| other.start < place.end);
        let table = self.places[..before].last().is_some_and(|other| other.end > place.start);
        place.end <= self.file * SECTOR && !grains && !table
    }

    /// Where the last header, descriptor, directory or table ends that lies in a range of bytes.
    pub fn metadata_in(&self, place: &Range<u64>) -> Option<u64> {
        let meets = |other: &&Range<u64>| other.start < place.end && place.start < other.end;
        self.places.iter().filter(meets).map(|other| other.end).max()
    }

    /// Whether a grain, or more than one table, uses a part of a table's place.
    pub fn is_contested(&self, place: &Range<u64>) -> bool {
        // All tables are of one length, and none lies over a header or directory.
        let least = place.start.saturating_sub(place.end - place.start);
        let from = self.places.partition_point(|other| other.start < least);
        let until = self.places.partition_point(|other| other.start < place.end);
        let tables = self.places[from..until].iter().filter(|other| other.end > place.start);
        tables.count() > 1 || self.grains.meets(&self.units(place))
    }

    /// Spans of unused sectors at or after sector `from`.
    pub fn unused(&self, from: u64) -> impl Iterator<Item = Range<u64>> {
        let mut unit = from.div_ceil(self.unit);
        let end = self.file.div_ceil(self.unit);
        let sets = [&self.grains, &self.metadata];
        std::iter::from_fn(move || {
            while let Some(set) = sets.iter().find(|set| set.meets(&(unit..unit + 1))) {
                unit = set.next_free(unit);
            }
            let start = unit;
            unit = sets.iter().filter_map(|set| set.next(unit)).fold(end, u64::min);
            (start < end).then(|| start * self.unit..(unit * self.unit).min(self.file))
        })
    }

    /// One past the last sector in use.
    pub fn end(&self) -> u64 {
        let last = |units: &Taken| Some((units.last()? + 1) * self.unit);
        last(&self.grains).max(last(&self.metadata)).unwrap_or(0)
    }

    /// The free space of the file: whole grains that nothing uses, at or after sector `from`.
    fn space(&self, tables: &GrainTables, from: u64) -> Space {
        let limits = Limits {
            end: (MAX_SECTORS - 1) * SECTOR,
            full: "the extent is full: grain tables reach no further than 2 TiB",
            least: SECTOR,
            align: 1,
            floor: 0,
        };
        let next = self.end().max(from).min(MAX_SECTORS).next_multiple_of(self.grain);
        let lens = [self.file * SECTOR; 2];
        let file = tables.file.clone();
        let tail = MultipleOf(SECTOR);
        let mut space = Space::new(file, tail, limits, next * SECTOR, lens, &tables.file_len);
        for run in self.unused(from) {
            let run =
                run.start.next_multiple_of(self.grain)..run.end.min(next) / self.grain * self.grain;
            if run.start < run.end {
                space.release(run.start * SECTOR..run.end * SECTOR, Contents::Stale);
            }
        }
        space
    }
}

/// Extent files stay below this many sectors: a table entry has 32 bits.
const MAX_SECTORS: u64 = 1 << 32;

/// Reads tables, answering from what the host says about holes where it can.
pub struct TableReader<'a> {
    file: &'a dyn Storage,
    /// A part of the file that is known to be a hole.
    hole: Range<u64>,
    /// A part of the file that is known to hold data.
    data: Range<u64>,
}

impl<'a> TableReader<'a> {
    /// A reader of `file`.
    pub fn new(file: &'a dyn Storage) -> Self {
        Self { file, hole: 0..0, data: 0..0 }
    }

    /// Fills `buf` from byte `at`; `false` if that is all hole.
    pub fn read(&mut self, at: u64, buf: &mut [u8]) -> Result<bool> {
        let end = at + buf.len() as u64;
        if !(self.data.start <= at && end <= self.data.end) {
            if !(self.hole.start <= at && end <= self.hole.end) {
                let data = self.file.next_data(at).map_err(|e| {
                    Error::io("looking for tables", &e).in_file(self.file.path()).at(at)
                })?;
                self.data = data.unwrap_or(u64::MAX..u64::MAX);
                self.hole = at..self.data.start;
            }
            if self.hole.start <= at && end <= self.hole.end {
                buf.fill(0);
                return Ok(false);
            }
        }
        codec::read_exact(self.file, at, buf, "a grain table")?;
        Ok(true)
    }
}

/// Walks the extent, calling `found` for every problem.
pub fn walk(tables: &GrainTables, found: &mut dyn FnMut(Problem)) -> Result<Usage> {
    let file_len = tables.file_len.load(Ordering::Relaxed);
    let mut usage = Usage::new(tables.grain / SECTOR, file_len.div_ceil(SECTOR));
    for place in &tables.reserved {
        usage.add_metadata(place.clone());
    }
    let places = find_tables(tables, &mut usage, found)?;
    usage.places.sort_unstable_by_key(|place| place.start);
    let mut primary = vec![0; tables.table_len() as usize];
    let mut redundant = primary.clone();
    let mut primary_reader = TableReader::new(&*tables.file);
    let mut redundant_reader = TableReader::new(&*tables.file);
    for Copies { table, first: at, second } in places {
        let some = primary_reader.read(at, &mut primary)?;
        if let Some(copy) = second {
            let copy_some = redundant_reader.read(copy, &mut redundant)?;
            if (some || copy_some) && primary != redundant {
                found(compare(tables, table, copy, &redundant));
            }
        }
        if some {
            walk_table(tables, table, at, &primary, &mut usage, found);
        }
        if usage.is_too_much() {
            let what =
                "its grains are neither aligned nor in order, and too many to be kept track of";
            return Err(Error::unsupported(what).in_file(tables.file.path()));
        }
    }
    Ok(usage)
}

/// Byte offsets of a table that exists, and of its redundant copy.
struct Copies {
    /// Its number.
    table: u64,
    first: u64,
    second: Option<u64>,
}

/// Reads the directories, and checks that every table has a place of its own. Costs what the
/// directories store: where both are holes of the host file there are no tables.
fn find_tables(
    tables: &GrainTables,
    usage: &mut Usage,
    found: &mut dyn FnMut(Problem),
) -> Result<Vec<Copies>> {
    const CHUNK: u64 = 64 << 10;
    let width = tables.directory_len() / tables.tables().min(tables.directory_entries).max(1);
    let mut copies = Vec::new();
    let mut chunk = [vec![0; CHUNK as usize], vec![0; CHUNK as usize]];
    let mut readers = [TableReader::new(&*tables.file), TableReader::new(&*tables.file)];
    let directories = [Some(tables.gd), tables.rgd];
    let mut missing = Missing::default();
    let mut from = 0;
    while from < tables.directory_len() {
        let len = (tables.directory_len() - from).min(CHUNK);
        let mut some = false;
        for ((buf, reader), directory) in chunk.iter_mut().zip(&mut readers).zip(directories) {
            if let Some(at) = directory {
                some |= reader.read(at + from, &mut buf[..len as usize])?;
            }
        }
        if !some {
            missing.add(tables, from / width..(from + len) / width, found);
            from += len;
            continue;
        }
        for index in 0..len / width {
            let table = from / width + index;
            let mut place = |buf: &[u8], directory: Option<u64>| {
                let at = directory? + from + index * width;
                let raw = tables.raw(buf, index);
                match tables.decode_table(raw) {
                    Table::Absent => None,
                    Table::At(at) => Some(at),
                    Table::Bad => {
                        let what = format!(
                            "directory entry {table} leads to sector {raw:#x}, where no grain table can be"
                        );
                        found(Problem { kind: Kind::Damage, at, what });
                        None
                    }
                }
            };
            let first = place(&chunk[0], directories[0]);
            let second = place(&chunk[1], directories[1]);
            let Some(own) = first.or(second) else {
                missing.add(tables, table..table + 1, found);
                continue;
            };
            let lone = tables.rgd.is_some() && first.is_some() != second.is_some();
            let wrong = match lone {
                true => Some("has only one of its two copies"),
                false if first == second => Some("is its own redundant copy"),
                false => None,
            };
            if let Some(what) = wrong {
                let at = tables.gd + table * width;
                let what = format!("grain table {table} {what}");
                found(Problem { kind: Kind::Damage, at, what });
            }
            let second = second.filter(|second| *second != own);
            copies.push(Copies { table, first: own, second });
        }
        from += len;
    }
    missing.report(tables, found);
    let mut places: Vec<u64> =
        copies.iter().flat_map(|c| [Some(c.first), c.second]).flatten().collect();
    places.sort_unstable();
    for pair in places.windows(2) {
        if pair[1] - pair[0] < tables.table_len() {
            let what = format!("two grain tables overlap at {:#x} and {:#x}", pair[0], pair[1]);
            found(Problem { kind: Kind::Damage, at: pair[1], what });
        }
    }
    for place in places {
        usage.add_metadata(place..place + tables.table_len());
    }
    Ok(copies)
}

/// A run of tables that do not exist although writers make all of them.
#[derive(Default)]
struct Missing(Range<u64>);

impl Missing {
    fn add(&mut self, tables: &GrainTables, run: Range<u64>, found: &mut dyn FnMut(Problem)) {
        if self.0.end != run.start {
            self.report(tables, found);
            self.0.start = run.start;
        }
        self.0.end = run.end;
    }

    fn report(&self, tables: &GrainTables, found: &mut dyn FnMut(Problem)) {
        if self.0.is_empty() || !tables.preallocated() {
            return;
        }
        let at = tables.gd + self.0.start * 4;
        let what = match self.0.end - self.0.start {
            1 => format!("grain table {} does not exist", self.0.start),
            _ => format!("grain tables {} to {} do not exist", self.0.start, self.0.end - 1),
        };
        found(Problem { kind: Kind::Oddity, at, what });
    }
}

/// What it means that the redundant copy at byte `at` of table number `table` differs.
fn compare(tables: &GrainTables, table: u64, at: u64, redundant: &[u8]) -> Problem {
    let legal = |index| tables.decode(tables.raw(redundant, index)) != Grain::Bad;
    let kind = match (0..tables.entries_per_table).all(legal) {
        true => Kind::Torn,
        false => Kind::Damage,
    };
    Problem { kind, at, what: format!("grain table {table} and its redundant copy differ") }
}

fn walk_table(
    tables: &GrainTables,
    table: u64,
    table_at: u64,
    bytes: &[u8],
    usage: &mut Usage,
    found: &mut dyn FnMut(Problem),
) {
    let file_len = tables.file_len.load(Ordering::Relaxed);
    let width = tables.table_len() / tables.entries_per_table;
    for index in 0..tables.entries_per_table {
        let raw = tables.raw(bytes, index);
        if raw == 0 {
            continue;
        }
        let grain = table * tables.entries_per_table + index;
        let mut problem = |kind, what: &str| {
            let what = format!("grain {grain} at sector {raw:#x} {what}");
            found(Problem { kind, at: table_at + index * width, what });
        };
        if grain >= tables.grains() {
            problem(Kind::Oddity, "lies beyond the end of the disk");
        }
        match tables.decode(raw) {
            Grain::Unallocated => {}
            Grain::Zero => {
                if !tables.zeroed_grains {
                    problem(Kind::Oddity, "is marked zeroed in an image that has no such marks");
                }
            }
            Grain::Bad => problem(Kind::Damage, "lies outside the file or inside its tables"),
            Grain::At(at) => {
                if at + tables.grain > file_len {
                    problem(Kind::Damage, "reaches past the end of the file");
                }
                if let Some(other) = usage.add_grain(at) {
                    problem(Kind::Damage, &format!("shares its place with {other}"));
                }
            }
        }
    }
}

/// What [`verify`] found out.
pub struct Verified {
    /// The extent's free space.
    pub space: Space,
    /// Some redundant table differs from its primary as after a crash.
    pub torn: bool,
}

/// Walks an extent that is about to be written. `unclean`: it was not closed after its last
/// writing, so redundant copies may lag behind. `overhead` is the first sector that grains use.
pub fn verify(tables: &GrainTables, unclean: bool, overhead: u64) -> Result<Verified> {
    let mut first: Option<Problem> = None;
    let mut torn = false;
    let usage = walk(tables, &mut |problem| match problem.kind {
        Kind::Oddity => {}
        Kind::Torn if unclean => torn = true,
        Kind::Torn | Kind::Damage => {
            first.get_or_insert(problem);
        }
    })?;
    if let Some(problem) = first {
        return Err(Error::corrupt(format!(
            "not written to, the image is damaged: {}",
            problem.what
        ))
        .at(problem.at)
        .in_file(tables.file.path())
        .hint("flatdisk check lists all damage"));
    }
    Ok(Verified { space: usage.space(tables, overhead), torn })
}

/// Makes every redundant table equal to its primary. The primary is what readers see, and holds all
/// that was ever flushed.
pub fn renew_redundant(tables: &GrainTables) -> Result<()> {
    let mut usage = Usage::new(tables.grain / SECTOR, 0);
    let mut primary = vec![0; tables.table_len() as usize];
    let mut redundant = primary.clone();
    for copies in find_tables(tables, &mut usage, &mut |_| {})? {
        let Copies { first: at, second: Some(copy), .. } = copies else { continue };
        codec::read_exact(&*tables.file, at, &mut primary, "a grain table")?;
        codec::read_exact(&*tables.file, copy, &mut redundant, "a redundant grain table")?;
        if primary != redundant {
            codec::write_all(&*tables.file, copy, &primary, "a redundant grain table")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_any_length_costs_what_is_used_of_it() {
        let file = 1 << 50;
        let mut usage = Usage::new(128, file);
        usage.add_metadata(0..3 * SECTOR);
        assert_eq!(usage.add_grain(128 * SECTOR), None);
        assert_eq!(usage.add_grain(128 * SECTOR), Some("another grain"));
        assert!(usage.unused(0).eq(std::iter::once(256..file)));
        // A grain in no place for grains: from here on sectors count, and cost as little.
        assert_eq!(usage.add_grain((1 << 40) * SECTOR + SECTOR), None);
        // Over the last sector of the header and the first ones of a grain.
        assert!(usage.add_grain(2 * SECTOR).is_some());
        let end = (1 << 40) + 129;
        let unused = [256..(1 << 40) + 1, end..file];
        assert_eq!(usage.unused(130).collect::<Vec<_>>(), unused);
        assert_eq!(usage.end(), end);
        for grain in 0..1000 {
            assert_eq!(usage.add_grain((1 << 30) * SECTOR + grain * 128 * SECTOR), None);
        }
        let Taken::Spans(spans) = &usage.grains else { panic!("not in sectors") };
        assert!(spans.0.len() <= 4, "{spans:?}");
    }

    #[test]
    fn spans_and_bits_hold_the_same() {
        let mut random = fastrand::Rng::with_seed(3);
        for _ in 0..50 {
            let mut sets = [Taken::Bits(Bits::default()), Taken::Spans(Spans::default())];
            let mut model = [false; 600];
            for _ in 0..60 {
                let start = random.u64(0..500);
                let range = start..start + random.u64(0..90);
                let part = &mut model[range.start as usize..range.end as usize];
                let new = part.iter().all(|taken| !taken);
                part.fill(true);
                for set in &mut sets {
                    assert_eq!(set.insert(range.clone()), new);
                    let next = |from: usize, is: bool| {
                        (from..600).find(|unit| model[*unit] == is).map(|unit| unit as u64)
                    };
                    let from = random.usize(0..500);
                    assert_eq!(set.next(from as u64), next(from, true));
                    assert_eq!(Some(set.next_free(from as u64)), next(from, false));
                    let last = model.iter().rposition(|taken| *taken).map(|unit| unit as u64);
                    assert_eq!(set.last(), last);
                }
            }
        }
    }
}
