//! Which footer counts.
//!
//! Every image ends with its footer; one with a BAT also begins with a copy. A fixed disk begins
//! with guest data, which may look like anything, so the trailing footer decides the type and the
//! copy is looked at only where the trailing one is no good.
//!
//! A fixed disk that is being made larger has its footer right behind the disk, and nothing but zeroes
//! behind that, until one at the new end is durable: so such a footer counts, too.

use zerocopy::{FromBytes, IntoBytes};

use super::layout::{
    DiskType, FOOTER, FOOTER_COOKIE, Footer, POISON_COOKIE, SECTOR, SHORT_FOOTER, VERSION,
};
use crate::codec;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::formats::{Identity, end_of_data};
use crate::storage::Storage;

/// How far before the end of the file a footer that lost its place is looked for, in bytes.
const SEARCH: u64 = 64 << 10;

/// The footers of a file.
#[derive(Debug)]
pub(super) struct Footers {
    /// The copy that counts.
    pub footer: Footer,
    /// Its kind of disk.
    pub disk_type: DiskType,
    /// The footer at the end.
    pub trailing: CopyState,
    /// The copy at the beginning; [`CopyState::Absent`] for a fixed disk.
    pub head: CopyState,
    /// Where everything but the trailing footer ends: its offset, or the file's length without one.
    pub data_end: u64,
    /// Length of the file.
    pub file_len: u64,
    /// Bytes behind a footer that should be the last thing in the file.
    pub trailing_garbage: u64,
    /// What had to be overlooked for the image to open at all.
    pub forced: Option<String>,
    /// `footer` differs from what is in the file: the first write puts it there.
    pub renewed: bool,
}

/// What one copy of the footer is worth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum CopyState {
    /// Intact.
    Good,
    /// Intact in the 511-byte form.
    Short,
    /// Intact, but says something else than the copy that counts.
    Differs,
    /// There is one, and this is wrong with it.
    Damaged(String),
    /// Not there.
    Absent,
}

impl CopyState {
    /// One word for `info`.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Short => "511 bytes",
            Self::Differs => "differs",
            Self::Damaged(_) => "damaged",
            Self::Absent => "absent",
        }
    }

    /// Whether the file holds an intact footer here.
    pub(super) fn intact(&self) -> bool {
        matches!(self, Self::Good | Self::Short | Self::Differs)
    }
}

/// 512 bytes of the file taken as a footer.
enum Candidate {
    Valid(Footer),
    Damaged(Footer, Error),
    Poisoned,
    Absent,
}

impl Candidate {
    fn read(bytes: &[u8; FOOTER as usize]) -> Self {
        let Ok(footer) = Footer::read_from_bytes(bytes) else { return Self::Absent };
        if footer.cookie == POISON_COOKIE {
            return Self::Poisoned;
        }
        if footer.cookie != FOOTER_COOKIE {
            return Self::Absent;
        }
        let version = footer.format_version.get();
        if !footer.checksum_matches() {
            Self::Damaged(footer, Error::corrupt("the footer's checksum does not match"))
        } else if version >> 16 != VERSION >> 16 {
            let what = format!("VHD format version {}.{}", version >> 16, version & 0xffff);
            Self::Damaged(footer, Error::unsupported(what))
        } else {
            Self::Valid(footer)
        }
    }

    fn state(&self) -> CopyState {
        match self {
            Self::Valid(_) => CopyState::Good,
            Self::Damaged(_, why) => CopyState::Damaged(why.what().to_owned()),
            Self::Poisoned => CopyState::Damaged("the image is disabled".to_owned()),
            Self::Absent => CopyState::Absent,
        }
    }
}

impl Footers {
    /// Reads both places and chooses. With `force` a footer with a wrong checksum is taken where
    /// there is no better one.
    pub(super) fn find(file: &dyn Storage, force: bool) -> Result<Self> {
        let file_len = file.len().map_err(|e| Error::io("read", &e).in_file(file.path()))?;
        if file_len < FOOTER {
            return Err(Error::new(ErrorKind::NotThisFormat, "too short for a VHD image"));
        }
        let (trailing_at, trailing, short) = read_trailing(file, file_len)?;
        let head = Candidate::read(&codec::read_array(file, 0, "the footer copy")?);
        let (mut trailing_at, mut trailing, mut grown) = (trailing_at, trailing, 0);
        if matches!(trailing, Candidate::Absent)
            && !matches!(&head, Candidate::Valid(copy) if is_sparse(copy))
            && let Some((at, footer)) = footer_before_zeroes(file, file_len)?
        {
            (trailing_at, trailing, grown) = (at, Candidate::Valid(footer), file_len - at - FOOTER);
        }
        let mut trailing_state = if short { CopyState::Short } else { trailing.state() };
        let mut head_state = head.state();
        let mut trailing_garbage = grown;
        let mut forced = None;

        let footer = match (trailing, head) {
            (Candidate::Valid(footer), head) => {
                if let Candidate::Valid(copy) = head
                    && copy != footer
                {
                    head_state = CopyState::Differs;
                }
                footer
            }
            (Candidate::Poisoned, _) => return Err(poisoned().at(trailing_at)),
            (trailing, Candidate::Valid(copy)) if is_sparse(&copy) => {
                trailing_garbage = garbage_behind_footer(file, file_len, &copy)?;
                if let Candidate::Damaged(other, _) = trailing
                    && other.unique_id != copy.unique_id
                {
                    trailing_state = CopyState::Absent;
                }
                copy
            }
            (_, Candidate::Poisoned) => return Err(poisoned().at(0)),
            (Candidate::Damaged(footer, why), _) => overlook(footer, why, force, &mut forced)?,
            (_, Candidate::Damaged(copy, why)) if is_sparse(&copy) => {
                overlook(copy, why.at(0), force, &mut forced)?
            }
            _ => {
                let kind = ErrorKind::NotThisFormat;
                return Err(Error::new(kind, "neither end of the file holds a VHD footer"));
            }
        };
        let Some(disk_type) = footer.disk_type() else {
            let what = format!("disk type {} in the footer", footer.disk_type);
            return Err(Error::unsupported(what).at(trailing_at));
        };
        if disk_type == DiskType::Fixed {
            head_state = CopyState::Absent;
        }
        let at_end = trailing_state.intact() || (forced.is_some() && !is_sparse(&footer));
        Ok(Self {
            footer,
            disk_type,
            data_end: if at_end { trailing_at } else { file_len },
            trailing: trailing_state,
            head: head_state,
            file_len,
            trailing_garbage,
            forced,
            renewed: false,
        })
    }

    /// The same with the unique id that the image gets with its first write, if it gets one.
    pub(super) fn renewed(mut self, next: Option<&Identity>) -> Self {
        if let Some(Identity::VhdUniqueId(id)) = next
            && self.footer.unique_id != *id
        {
            self.footer.unique_id = *id;
            self.footer.seal();
            self.renewed = true;
        }
        self
    }

    /// The bytes that both copies should have.
    pub(super) fn bytes(&self) -> &[u8] {
        self.footer.as_bytes()
    }

    /// What is odd about the footers, for people.
    pub(super) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let footer = &self.footer;
        for (copy, name) in [(&self.trailing, "footer"), (&self.head, "footer copy")] {
            match copy {
                CopyState::Damaged(why) => warnings.push(format!("the {name} is damaged: {why}")),
                CopyState::Differs => {
                    warnings.push("the footer and its copy at the beginning differ".to_owned());
                }
                CopyState::Absent if name == "footer" || is_sparse(footer) => {
                    warnings.push(format!("the {name} is missing"));
                }
                _ => {}
            }
        }
        if self.trailing_garbage > 0 {
            warnings.push(format!("{} bytes of garbage follow the footer", self.trailing_garbage));
        }
        if footer.features.get() & 2 == 0 {
            warnings.push("the footer lacks the feature bit that is always set".to_owned());
        }
        if footer.current_size.get() != footer.size() {
            warnings.push(format!(
                "the size {} is not a multiple of 512; the last {} bytes are not visible",
                footer.current_size,
                footer.current_size.get() - footer.size()
            ));
        }
        match footer.saved_state {
            0 => {}
            1 => warnings.push("the disk belongs to a machine in saved state".to_owned()),
            n => warnings.push(format!("saved state is {n}, neither 0 nor 1")),
        }
        warnings
    }
}

/// The candidate at the end of the file, its offset, and whether it is of the short form.
fn read_trailing(file: &dyn Storage, file_len: u64) -> Result<(u64, Candidate, bool)> {
    let at = file_len - FOOTER;
    let trailing = Candidate::read(&codec::read_array(file, at, "the footer")?);
    if matches!(trailing, Candidate::Absent) && file_len % SECTOR == SHORT_FOOTER {
        let mut bytes = [0; FOOTER as usize];
        let short_at = file_len - SHORT_FOOTER;
        codec::read_exact(file, short_at, &mut bytes[..SHORT_FOOTER as usize], "the footer")?;
        let short = Candidate::read(&bytes);
        if matches!(short, Candidate::Valid(_)) {
            return Ok((short_at, short, true));
        }
    }
    Ok((at, trailing, false))
}

/// The footer of a fixed disk right behind it, where only zeroes follow, and its offset.
fn footer_before_zeroes(file: &dyn Storage, file_len: u64) -> Result<Option<(u64, Footer)>> {
    let Some(at) = end_of_data(file, file_len)?.checked_sub(FOOTER) else { return Ok(None) };
    let bytes = codec::read_array(file, at, "the footer")?;
    Ok(match Candidate::read(&bytes) {
        Candidate::Valid(footer) if !is_sparse(&footer) && footer.size() == at => {
            Some((at, footer))
        }
        _ => None,
    })
}

fn is_sparse(footer: &Footer) -> bool {
    matches!(footer.disk_type(), Some(DiskType::Dynamic | DiskType::Differencing))
}

fn poisoned() -> Error {
    Error::unsupported("the image was disabled on purpose (`v_poison`) by Xen's tools")
        .hint("it is a leftover of an unfinished operation there")
}

fn overlook(
    footer: Footer,
    why: Error,
    force: bool,
    forced: &mut Option<String>,
) -> Result<Footer> {
    if force && why.kind() == ErrorKind::Corrupt {
        *forced = Some(why.what().to_owned());
        return Ok(footer);
    }
    let hint = why.kind() == ErrorKind::Corrupt;
    Err(if hint { why.hint("`-o force` reads it all the same") } else { why })
}

/// Bytes behind the image's own footer, where it lies shortly before the end of the file.
fn garbage_behind_footer(file: &dyn Storage, file_len: u64, copy: &Footer) -> Result<u64> {
    let end = file_len / SECTOR * SECTOR;
    let start = end.saturating_sub(SEARCH).max(FOOTER).min(end);
    let mut tail = vec![0; (end - start) as usize];
    file.read_at(start, &mut tail)
        .map_err(|e| Error::io("read", &e).in_file(file.path()))
        .at(start)?;
    let found = tail.chunks_exact(SECTOR as usize).rposition(|sector| {
        Footer::read_from_bytes(sector).is_ok_and(|f| {
            // One that differs is an old one: it must not come to count again.
            f == *copy
        })
    });
    Ok(found.map_or(0, |index| file_len - start - (index as u64 + 1) * SECTOR))
}
