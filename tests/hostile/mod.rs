//! Input from strangers: images damaged on purpose, and the means to see what comes of them.
//!
//! - [`bases`]: intact images, with a map of where their structures are;
//! - [`mutate`]: damage that knows those structures, checksums included;
//! - [`guard`]: a host that notices what a driver must not do;
//! - [`meter`]: memory and time of one case.

#![allow(dead_code)]

pub mod bases;
pub mod disks;
pub mod guard;
pub mod meter;
pub mod mutate;
