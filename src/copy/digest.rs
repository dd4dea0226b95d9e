//! Digests of the contents of a disk.

use std::io::{self, Write};
use std::sync::Arc;

use sha2::Digest;

use super::pipeline::{self, Copying};
use super::sink::PipeSink;
use super::source::Source;
use crate::codec::hex;
use crate::disk::Disk;
use crate::error::Result;
use crate::progress::Progress;

/// Which digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Algorithm {
    /// SHA-256.
    #[default]
    Sha256,
    /// SHA-1.
    Sha1,
    /// MD5.
    Md5,
    /// BLAKE3, the fastest.
    Blake3,
}

/// The digest, in hexadecimal, of all bytes of the disk, zeroes included.
pub fn digest(disk: &Arc<Disk>, algorithm: Algorithm, progress: &dyn Progress) -> Result<String> {
    let state = match algorithm {
        Algorithm::Sha256 => State::Sha256(Box::default()),
        Algorithm::Sha1 => State::Sha1(Box::default()),
        Algorithm::Md5 => State::Md5(Box::default()),
        Algorithm::Blake3 => State::Blake3(Box::default()),
    };
    let sink = PipeSink::new(state);
    let source = Source::Disk(disk.clone());
    pipeline::run(&source, 0..disk.size(), &sink, Copying::default(), progress)?;
    Ok(sink.into_inner().finish())
}

/// A digest under way.
enum State {
    Sha256(Box<sha2::Sha256>),
    Sha1(Box<sha1::Sha1>),
    Md5(Box<md5::Md5>),
    Blake3(Box<blake3::Hasher>),
}

impl State {
    fn finish(self) -> String {
        match self {
            Self::Sha256(state) => hex(&state.finalize()),
            Self::Sha1(state) => hex(&state.finalize()),
            Self::Md5(state) => hex(&state.finalize()),
            Self::Blake3(state) => hex(state.finalize().as_bytes()),
        }
    }
}

impl Write for State {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self {
            Self::Sha256(state) => state.update(data),
            Self::Sha1(state) => state.update(data),
            Self::Md5(state) => state.update(data),
            Self::Blake3(state) => {
                state.update(data);
            }
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
