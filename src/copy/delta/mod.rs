//! Deltas: what changed on a disk after one of its ancestors, as a stream for backup, and putting that
//! onto a copy of the ancestor elsewhere.
//!
//! [`stream`] is the form of a delta (`docs/delta.md` describes it byte by byte), [`mod@make`] writes one from
//! a chain, [`mod@apply`] puts it onto an image.
//!
//! # What is read
//!
//! Which parts may have changed is known from the tables of the images above the ancestor. Of those parts
//! only, both generations are read and compared in units of [`UNIT`]: what is stored anew but holds what it
//! held is left out, and what became zeroes is told as such.
//!
//! # Further files
//!
//! - `apply`: putting a delta onto a copy of the ancestor that it was made against;
//! - `make`: writing a delta from a chain.

mod apply;
mod make;
mod stream;

pub use apply::{Applied, apply};
pub use make::make;
pub use stream::{Header, Summary};

/// Bytes in whose multiples generations are compared: a run of one unit is less than 1 % longer with its
/// record.
pub const UNIT: u64 = 4096;
/// Most bytes in a run of data, and so the memory that writing and applying take.
pub const MAX_RUN: u64 = 1 << 20;
