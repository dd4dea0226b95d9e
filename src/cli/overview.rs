//! The list of commands in `flatdisk --help`, in groups of what people come for.

use std::fmt::Write;

use clap::{Command, CommandFactory};

use super::Cli;

/// The groups in the order of the help, each with its commands. Whatever is in none comes with the last.
const GROUPS: &[(&str, &[&str])] = &[
    (
        "Images as flat files",
        &["mount", "umount", "open", "close", "sync", "status", "attach", "detach"],
    ),
    ("What is in an image", &["info", "check", "map", "volumes", "ls", "cat", "cp", "hash"]),
    ("New images, other formats", &["create", "convert", "measure", "compare", "write"]),
    ("An image as a whole", &["resize", "compact", "meta", "rename", "delete"]),
    (
        "Images that stand on one another",
        &["snapshot", "tree", "commit", "rebase", "flatten", "delta", "apply"],
    ),
    ("The program itself", &[]),
];

/// The command that clap adds, and what it says of it.
const HELP: (&str, &str) = ("help", "Print this message or the help of the given subcommand(s)");

/// The command line, with its commands in groups.
pub(super) fn command() -> Command {
    let command = Cli::command();
    let text = format!(
        "{{before-help}}{{about-with-newline}}\n{{usage-heading}} {{usage}}\n\n{}\
         Options:\n{{options}}{{after-help}}",
        groups(&command)
    );
    command.help_template(text)
}

/// Every group with its commands, a line each.
fn groups(command: &Command) -> String {
    let own = command.get_subcommands().map(Command::get_name);
    // Clap adds it on its own, once the command is built.
    let names: Vec<&str> = own.chain([HELP.0]).collect();
    let width = names.iter().map(|name| name.len()).max().unwrap_or(0);
    let in_none = |name: &&str| !GROUPS.iter().any(|(_, commands)| commands.contains(name));
    let mut text = String::new();
    for (index, (heading, commands)) in GROUPS.iter().enumerate() {
        let rest: Vec<&str> = match index + 1 == GROUPS.len() {
            true => names.iter().copied().filter(in_none).collect(),
            false => Vec::new(),
        };
        let _ = writeln!(text, "{heading}:");
        for name in commands.iter().copied().chain(rest) {
            let about = command.find_subcommand(name).and_then(Command::get_about);
            let about = about.map_or(HELP.1.to_owned(), ToString::to_string);
            let _ = writeln!(text, "  {name:width$}  {about}");
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_is_in_one_group() {
        let mut whole = Cli::command();
        whole.build();
        let help = command().render_long_help().to_string();
        for subcommand in whole.get_subcommands() {
            let name = subcommand.get_name();
            let start = format!("  {name} ");
            let lines = help.lines().filter(|line| line.starts_with(&start)).count();
            assert_eq!(lines, 1, "{name}\n{help}");
            let about = subcommand.get_about().unwrap().to_string();
            assert!(help.contains(&about), "{name}: {about}\n{help}");
        }
        for name in GROUPS.iter().flat_map(|(_, commands)| *commands) {
            assert!(whole.find_subcommand(name).is_some(), "there is no command {name}");
        }
    }
}
