//! The `flatdisk` command.

fn main() {}
