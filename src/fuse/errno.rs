//! What a program sees of an [`Error`]: the one place where an errno is chosen.

use crate::error::{Error, ErrorKind};

/// The errno for `error`. Of the host's own codes only those pass that mean the same to the reader
/// of a flat file; everything else that went wrong below is an I/O error.
pub fn errno(error: &Error) -> i32 {
    let host = |allowed: &[i32]| error.errno().filter(|errno| allowed.contains(errno));
    match error.kind() {
        ErrorKind::Io => host(&[
            libc::ESTALE,
            libc::ENOMEM,
            libc::EMFILE,
            libc::ENFILE,
            libc::ENOTDIR,
            libc::ETIMEDOUT,
        ])
        .unwrap_or(libc::EIO),
        ErrorKind::NoSpace => host(&[libc::EDQUOT, libc::EFBIG]).unwrap_or(libc::ENOSPC),
        ErrorKind::Corrupt
        | ErrorKind::ParentMissing
        | ErrorKind::ParentMismatch
        | ErrorKind::Failed => libc::EIO,
        ErrorKind::Unsupported => libc::EOPNOTSUPP,
        ErrorKind::NotThisFormat => libc::EMEDIUMTYPE,
        ErrorKind::InvalidInput => libc::EINVAL,
        ErrorKind::OutOfRange => libc::EINVAL,
        ErrorKind::ReadOnly => libc::EROFS,
        ErrorKind::Busy => libc::EBUSY,
        ErrorKind::NotFound => libc::ENOENT,
        ErrorKind::Exists => libc::EEXIST,
        ErrorKind::Denied => host(&[libc::EPERM]).unwrap_or(libc::EACCES),
        ErrorKind::Cancelled => libc::EINTR,
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn every_kind_has_its_errno() {
        for (kind, expected) in [
            (ErrorKind::Io, libc::EIO),
            (ErrorKind::NoSpace, libc::ENOSPC),
            (ErrorKind::Corrupt, libc::EIO),
            (ErrorKind::Unsupported, libc::EOPNOTSUPP),
            (ErrorKind::NotThisFormat, libc::EMEDIUMTYPE),
            (ErrorKind::InvalidInput, libc::EINVAL),
            (ErrorKind::OutOfRange, libc::EINVAL),
            (ErrorKind::ReadOnly, libc::EROFS),
            (ErrorKind::Busy, libc::EBUSY),
            (ErrorKind::NotFound, libc::ENOENT),
            (ErrorKind::Exists, libc::EEXIST),
            (ErrorKind::Denied, libc::EACCES),
            (ErrorKind::ParentMissing, libc::EIO),
            (ErrorKind::ParentMismatch, libc::EIO),
            (ErrorKind::Failed, libc::EIO),
            (ErrorKind::Cancelled, libc::EINTR),
        ] {
            assert_eq!(errno(&Error::new(kind, "x")), expected, "{kind:?}");
        }
    }

    #[test]
    fn the_hosts_own_code_passes_only_where_it_means_the_same() {
        let of = |code| errno(&Error::io("x", &io::Error::from_raw_os_error(code)));
        assert_eq!(of(libc::EDQUOT), libc::EDQUOT);
        assert_eq!(of(libc::EFBIG), libc::EFBIG);
        assert_eq!(of(libc::EPERM), libc::EPERM);
        assert_eq!(of(libc::ESTALE), libc::ESTALE);
        assert_eq!(of(libc::EBADF), libc::EIO);
        assert_eq!(of(libc::EINTR), libc::EIO);
    }
}
