//! `info --structures`: the raw structures of images, for those who look at damage.

use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::output::{Failure, print_line};
use crate::error::Result;
use crate::formats::OpenOptions;
use crate::formats::structures::{Checksum, Listing, Structure, structures};
use crate::names::Name;
use crate::storage::file::HostFs;

/// `info`'s answer with `--structures`.
#[derive(Serialize)]
pub struct StructuresAnswer {
    /// Those that were opened.
    pub images: Vec<StructuresEntry>,
    /// The others.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<Failure>,
}

/// One image's structures in `info`'s answer.
#[derive(Serialize)]
pub struct StructuresEntry {
    filename: Name,
    #[serde(flatten)]
    listing: Listing,
}

impl StructuresEntry {
    /// Those of the image at `path`.
    pub fn of(path: &Path, options: &OpenOptions, limit: usize) -> Result<Self> {
        let listing = structures(&HostFs::shared(), path, options, limit)?;
        Ok(Self { filename: path.into(), listing })
    }

    /// Prints them for people.
    pub fn print(&self) -> Result<()> {
        print_line(&format!("{} ({})", self.filename.display(), self.listing.format))?;
        let mut file = None;
        for structure in &self.listing.structures {
            if structure.file != file {
                file.clone_from(&structure.file);
                let name = file.as_deref().unwrap_or(&self.filename).display();
                print_line(&format!("{name}"))?;
            }
            print_structure(structure)?;
        }
        match self.listing.truncated {
            true => print_line("… and more: `--limit` shows them"),
            false => Ok(()),
        }
    }
}

fn print_structure(structure: &Structure) -> Result<()> {
    let state = match (structure.found, structure.checksum) {
        (false, _) => ", not there",
        (true, Checksum::Valid) => ", checksum valid",
        (true, Checksum::Wrong) => ", checksum WRONG",
        (true, Checksum::None) => "",
    };
    let Structure { name, offset, length, .. } = structure;
    print_line(&format!("  {offset:#x}: {name}, {length} bytes{state}"))?;
    if let Some(problem) = &structure.problem {
        print_line(&format!("    problem: {problem}"))?;
    }
    structure.fields.iter().try_for_each(|(name, value)| match value {
        Value::Array(items) if items.iter().all(Value::is_string) && !items.is_empty() => {
            print_line(&format!("    {name}"))?;
            items.iter().try_for_each(|item| print_line(&format!("      {}", shown(item))))
        }
        value => print_line(&format!("    {name:<22} {}", shown(value))),
    })
}

/// A value; large numbers also as the hexadecimal that dumps show.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        Value::Number(number) => match number.as_u64() {
            Some(large) if large >= 4096 => format!("{large} ({large:#x})"),
            _ => number.to_string(),
        },
        other => other.to_string(),
    }
}
