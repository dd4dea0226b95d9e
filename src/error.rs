//! The one error type of the crate.
//!
//! An [`Error`] says what went wrong, in which file, at which place, and prints as one line. Layers
//! that know more add it on the way up: a driver knows the structure and the offset, the opener
//! knows the path. [`ErrorKind`] is what code decides on; the text is for people.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::names::printable;

/// Result of every fallible operation of the crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What sort of failure an [`Error`] is. The front ends here map every kind.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The host failed to read, write, or make something durable.
    Io,
    /// The host file system, or the format's address space, is full.
    NoSpace,
    /// The image contradicts its format.
    Corrupt,
    /// A legal image of a kind that is not supported.
    Unsupported,
    /// The file is not an image of this format at all.
    NotThisFormat,
    /// The caller asked for something impossible.
    InvalidInput,
    /// The range lies outside the disk.
    OutOfRange,
    /// The disk cannot be written.
    ReadOnly,
    /// Another program, or another name in the same mount, holds the image.
    Busy,
    /// A file does not exist.
    NotFound,
    /// A file that must not exist does.
    Exists,
    /// Access rights, or the rules for files named by an image, forbid it.
    Denied,
    /// A parent named by a child cannot be found.
    ParentMissing,
    /// A parent was found but is not the disk the child was made from.
    ParentMismatch,
    /// The caller ended the work before it was done.
    Cancelled,
    /// An earlier failed write or flush of metadata made the image unusable until it is reopened.
    Failed,
}

impl ErrorKind {
    /// Its name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Io => "io",
            Self::NoSpace => "no_space",
            Self::Corrupt => "corrupt",
            Self::Unsupported => "unsupported",
            Self::NotThisFormat => "not_this_format",
            Self::InvalidInput => "invalid_input",
            Self::OutOfRange => "out_of_range",
            Self::ReadOnly => "read_only",
            Self::Busy => "busy",
            Self::NotFound => "not_found",
            Self::Exists => "exists",
            Self::Denied => "denied",
            Self::ParentMissing => "parent_missing",
            Self::ParentMismatch => "parent_mismatch",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }
}

/// A failure, with everything known about where it happened.
#[derive(Debug, Clone)]
pub struct Error {
    kind: ErrorKind,
    what: Cow<'static, str>,
    path: Option<PathBuf>,
    /// Byte offset in the file `path`.
    at: Option<u64>,
    hint: Option<Cow<'static, str>>,
    errno: Option<i32>,
    withheld: bool,
}

impl Error {
    /// A failure of `kind`; `what` names the structure and what is wrong with it, lower case, no
    /// full stop.
    pub fn new(kind: ErrorKind, what: impl Into<Cow<'static, str>>) -> Self {
        let what = what.into();
        Self { kind, what, path: None, at: None, hint: None, errno: None, withheld: false }
    }

    /// The image contradicts its format.
    pub fn corrupt(what: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Corrupt, what)
    }

    /// A legal image, or request, of a kind that is not supported.
    pub fn unsupported(what: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Unsupported, what)
    }

    /// The caller asked for something impossible.
    pub fn invalid(what: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::InvalidInput, what)
    }

    /// A failure of the host, `what` being the operation ("write", "open").
    pub fn io(what: impl Into<Cow<'static, str>>, source: &io::Error) -> Self {
        let kind = match source.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::AlreadyExists => ErrorKind::Exists,
            io::ErrorKind::PermissionDenied => ErrorKind::Denied,
            io::ErrorKind::ReadOnlyFilesystem => ErrorKind::ReadOnly,
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => ErrorKind::NoSpace,
            _ => ErrorKind::Io,
        };
        // "No such file or directory (os error 2)" reads better without the number.
        let text = source.to_string();
        let text = text.split(" (os error").next().unwrap_or(&text).to_lowercase();
        let mut error = Self::new(kind, format!("{}: {text}", what.into()));
        error.errno = source.raw_os_error();
        if error.errno == Some(libc::EMFILE) {
            error = error.hint("`ulimit -n`, or `LimitNOFILE=` of a service, allows more");
        }
        error
    }

    /// Adds the byte offset in the file, unless one is known already.
    #[must_use]
    pub fn at(mut self, offset: u64) -> Self {
        self.at.get_or_insert(offset);
        self
    }

    /// Adds the file, unless one is known already.
    #[must_use]
    pub fn in_file(mut self, path: &Path) -> Self {
        self.path.get_or_insert_with(|| path.to_owned());
        self
    }

    /// Puts another path in the place of the one there is.
    #[must_use]
    pub(crate) fn renamed(mut self, path: &Path) -> Self {
        self.path = Some(path.to_owned());
        self
    }

    /// Adds what the user can do about it, unless a hint is there already.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<Cow<'static, str>>) -> Self {
        self.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// What the user can do about it.
    pub fn hinted(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The same with another hint, or none.
    #[must_use]
    pub fn hinting(mut self, hint: Option<String>) -> Self {
        self.hint = hint.map(Cow::Owned);
        self
    }

    /// Marks the text as not for everybody: it may tell of files that not all may read who may read
    /// [`Self::path`].
    #[must_use]
    pub(crate) fn withhold(mut self) -> Self {
        self.withheld = true;
        self
    }

    /// See [`Self::withhold`].
    pub(crate) fn withheld(&self) -> bool {
        self.withheld
    }

    /// What sort of failure this is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The text without file, offset and hint.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// The file the failure belongs to.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Byte offset of the failure in [`Self::path`].
    pub fn offset(&self) -> Option<u64> {
        self.at
    }

    /// The host's errno, where the host was what failed.
    pub fn errno(&self) -> Option<i32> {
        self.errno
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.path {
            // Names come from users and images: none acts on a terminal or breaks a log's line.
            write!(f, "{}: ", printable(path.display()))?;
        }
        write!(f, "{}", printable(&self.what))?;
        if let Some(at) = self.at {
            write!(f, " at {at:#x}")?;
        }
        if let Some(hint) = &self.hint {
            write!(f, " ({})", printable(hint))?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// Adds context to the error of a `Result` on its way up.
///
/// # Errors
///
/// The same one, with more said about its place.
#[allow(clippy::missing_errors_doc)] // They are the trait's, above.
pub trait ResultExt<T> {
    /// See [`Error::in_file`].
    fn in_file(self, path: &Path) -> Result<T>;
    /// See [`Error::at`].
    fn at(self, offset: u64) -> Result<T>;
}

impl<T> ResultExt<T> for Result<T> {
    fn in_file(self, path: &Path) -> Result<T> {
        self.map_err(|e| e.in_file(path))
    }

    fn at(self, offset: u64) -> Result<T> {
        self.map_err(|e| e.at(offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn displays_file_place_what_and_hint_on_one_line() {
        let e = Error::corrupt("BAT entry 17 lies past the end\n")
            .at(0x600)
            .in_file(Path::new("a\u{1b}.vhd"))
            .hint("run flatdisk check");
        assert_eq!(
            e.to_string(),
            "a\\u{1b}.vhd: BAT entry 17 lies past the end\\n at 0x600 (run flatdisk check)"
        );
    }

    #[test]
    fn io_errors_keep_kind_and_errno() {
        let e = Error::io("write", &io::Error::from_raw_os_error(28));
        assert_eq!((e.kind(), e.errno()), (ErrorKind::NoSpace, Some(28)));
        assert_eq!(e.to_string(), "write: no space left on device");
    }

    #[test]
    fn the_innermost_context_wins() {
        let e = Error::corrupt("x").at(1).at(2).in_file(Path::new("a")).in_file(Path::new("b"));
        assert_eq!((e.offset(), e.path()), (Some(1), Some(Path::new("a"))));
    }
}
