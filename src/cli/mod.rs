//! The command line.

pub mod images;
pub mod inspect;
pub mod output;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "flatdisk", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show format, sizes, ids and parent of an image.
    Info(inspect::InfoArgs),
    /// Check every table of an image.
    Check(inspect::CheckArgs),
    /// Make a new image.
    Create(images::CreateArgs),
}

/// Runs the program.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    let done = match &cli.command {
        Command::Info(args) => inspect::info(args),
        Command::Check(args) => inspect::check(args),
        Command::Create(args) => images::create(args),
    };
    match done {
        Ok(status) => ExitCode::from(status),
        Err(e) => {
            eprintln!("flatdisk: {e}");
            ExitCode::from(1)
        }
    }
}
