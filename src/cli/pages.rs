//! `completions` and `man`: both made from the definitions of the command line itself.
//!
//! A man page is the command's help in the order that readers of man pages expect. What follows the
//! options in `--help` keeps a simple form, which [`sections`] turns into sections of the page:
//!
//! ```text
//! Heading:
//!   term  what it means, after two spaces or more
//!   a paragraph
//!     a line to be shown as it is, such as a command
//! ```

use std::path::PathBuf;

use clap::{Args, Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Inline, Roff, bold, italic, roman};

use super::output::{print_line, print_text};
use super::{Cli, mount, running};
use crate::error::{Error, Result};
use crate::fuse::options;

/// Arguments of `flatdisk completions`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  For this user's bash:
    flatdisk completions bash > ~/.local/share/bash-completion/completions/flatdisk
  `flatdisk install-helpers` installs those of bash, zsh and fish for everybody.")]
pub struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

/// Arguments of `flatdisk man`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Environment:
  SOURCE_DATE_EPOCH  date of the pages, in seconds since 1970; without it they have none

Examples:
  Read a page:
    flatdisk man /tmp/pages && man -l /tmp/pages/flatdisk-mount.1")]
pub struct ManArgs {
    /// An existing directory for the pages.
    dir: PathBuf,
}

/// `flatdisk completions`.
pub fn completions(args: &CompletionsArgs) -> Result<u8> {
    print_text(&completion(args.shell))?;
    Ok(0)
}

/// The completions for a shell.
pub fn completion(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "flatdisk", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// `flatdisk man`.
pub fn man(args: &ManArgs) -> Result<u8> {
    for (name, page) in pages()? {
        let path = args.dir.join(name);
        std::fs::write(&path, page).map_err(|e| Error::io("write", &e).in_file(&path))?;
        print_line(&path.display().to_string())?;
    }
    Ok(0)
}

/// Every page: its file's name and text.
pub fn pages() -> Result<Vec<(String, Vec<u8>)>> {
    let date = match std::env::var("SOURCE_DATE_EPOCH") {
        Err(_) => String::new(),
        Ok(seconds) => {
            let seconds = seconds.parse().map_err(|_| {
                Error::invalid(format!("SOURCE_DATE_EPOCH: `{seconds}` is not a number of seconds"))
            })?;
            calendar_date(seconds)
        }
    };
    let mut program = Cli::command().disable_help_subcommand(true);
    program.build();
    let mut pages = Vec::new();
    for command in program.get_subcommands().filter(|command| !command.is_hide_set()) {
        let name = format!("flatdisk-{}", command.get_name());
        let mut roff = Roff::default();
        options_of(&mut roff, command);
        let command = command.clone().version(env!("CARGO_PKG_VERSION"));
        let page = Page { name: &name, section: "1", date: &date, command, middle: roff };
        pages.push((format!("{name}.1"), page.render("flatdisk(1)")?));
    }
    let words = program.find_subcommand("mount").map(mount_options).unwrap_or_default();
    let mut roff = Roff::default();
    commands_of(&mut roff, &program);
    let page = Page { name: "flatdisk", section: "1", date: &date, command: program, middle: roff };
    pages.push(("flatdisk.1".into(), page.render("mount.flatdisk(8), fuse(4), losetup(8)")?));
    let helpers = [
        (mount::HelperArgs::command(), words, "flatdisk(1), mount(8), fstab(5)"),
        (running::UmountHelperArgs::command(), Roff::default(), "flatdisk(1), umount(8)"),
    ];
    for (mut command, more, see_also) in helpers {
        command.build();
        let name = command.get_name().to_owned();
        let mut roff = Roff::default();
        options_of(&mut roff, &command);
        roff.extend([more]);
        let page = Page { name: &name, section: "8", date: &date, command, middle: roff };
        pages.push((format!("{name}.8"), page.render(see_also)?));
    }
    // The helpers' other names.
    for (name, page) in [
        ("mount.fuse.flatdisk", "mount.flatdisk"),
        ("umount.fuse.flatdisk", "umount.flatdisk"),
        ("umount.fuse", "umount.flatdisk"),
    ] {
        pages.push((format!("{name}.8"), format!(".so man8/{page}.8\n").into_bytes()));
    }
    Ok(pages)
}

/// A man page in the making.
struct Page<'a> {
    name: &'a str,
    section: &'a str,
    date: &'a str,
    command: Command,
    /// Between the description and the help's own sections.
    middle: Roff,
}

impl Page<'_> {
    fn render(mut self, see_also: &str) -> Result<Vec<u8>> {
        let mut page = Vec::new();
        let mut usage = self.command.render_usage().to_string();
        usage = usage.trim_start_matches("Usage: ").replace(['<', '>'], "");
        let about = self.command.get_about().map(ToString::to_string).unwrap_or_default();
        let mut roff = Roff::default();
        roff.control("SH", ["NAME"]);
        roff.text([roman(format!("{} - {about}", self.name))]);
        roff.control("SH", ["SYNOPSIS"]);
        for form in usage.lines() {
            let (program, arguments) = split_usage(form.trim());
            roff.text([bold(program), italic(arguments)]);
        }
        let more = self.command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
        let man = Man::new(self.command)
            .title(self.name.to_uppercase())
            .section(self.section)
            .date(self.date)
            .source(concat!("flatdisk ", env!("CARGO_PKG_VERSION")))
            .manual("flatdisk manual");
        let written = man
            .render_title(&mut page)
            .and_then(|()| roff.to_writer(&mut page))
            .and_then(|()| man.render_description_section(&mut page))
            .and_then(|()| self.middle.to_writer(&mut page))
            .and_then(|()| sections(&more).to_writer(&mut page));
        written.map_err(|e| Error::io("making a man page", &e))?;
        let mut end = Roff::default();
        end.control("SH", ["SEE ALSO"]);
        end.text([roman(see_also)]);
        end.to_writer(&mut page).map_err(|e| Error::io("making a man page", &e))?;
        Ok(page)
    }
}

/// The words of a usage line before its arguments, and the arguments.
fn split_usage(usage: &str) -> (&str, &str) {
    let arguments = usage.find(|c: char| c == '[' || c.is_ascii_uppercase());
    usage.split_at(arguments.unwrap_or(usage.len()))
}

/// Arguments and options, the ones without a dash first.
fn options_of(roff: &mut Roff, command: &Command) {
    let shown = |arg: &&clap::Arg| !arg.is_hide_set();
    let (positional, options): (Vec<_>, Vec<_>) =
        command.get_arguments().filter(shown).partition(|arg| arg.is_positional());
    if !positional.is_empty() {
        roff.control("SH", ["ARGUMENTS"]);
    }
    positional.into_iter().for_each(|arg| argument(roff, arg));
    if !options.is_empty() {
        roff.control("SH", ["OPTIONS"]);
    }
    options.into_iter().for_each(|arg| argument(roff, arg));
}

fn argument(roff: &mut Roff, arg: &clap::Arg) {
    let mut head: Vec<Inline> = Vec::new();
    head.extend(arg.get_short().map(|short| bold(format!("-{short}"))));
    if arg.get_short().is_some() && arg.get_long().is_some() {
        head.push(roman(", "));
    }
    head.extend(arg.get_long().map(|long| bold(format!("--{long}"))));
    let names = arg.get_value_names().unwrap_or_default();
    let values: Vec<_> = names.iter().map(|name| name.as_str()).collect();
    let taken = arg.get_num_args().unwrap_or_default();
    let value = values.join(" ");
    if arg.is_positional() {
        head.push(italic(value));
        if taken.max_values() > 1 {
            head.push(roman(" ..."));
        }
    } else if taken.min_values() > 0 {
        head.extend([roman(if arg.get_long().is_some() { "=" } else { " " }), italic(value)]);
    } else if taken.takes_values() {
        head.extend([roman("[="), italic(value), roman("]")]);
    }
    roff.control("TP", []);
    roff.text(head);
    let help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
    roff.text([roman(help)]);
    for value in arg.get_possible_values().iter().filter(|value| !value.is_hide_set()) {
        let help = value.get_help().map(|help| format!(": {help}")).unwrap_or_default();
        roff.control("br", []);
        roff.text([bold(value.get_name()), roman(help)]);
    }
}

fn commands_of(roff: &mut Roff, program: &Command) {
    roff.control("SH", ["COMMANDS"]);
    for command in program.get_subcommands().filter(|command| !command.is_hide_set()) {
        roff.control("TP", []);
        roff.text([bold(format!("flatdisk-{}", command.get_name())), roman("(1)")]);
        let about = command.get_about().map(ToString::to_string).unwrap_or_default();
        roff.text([roman(about)]);
    }
}

/// The words that `-o` takes, from the flags of `flatdisk mount` that stand for them.
fn mount_options(mount: &Command) -> Roff {
    let mut roff = Roff::default();
    roff.control("SH", ["MOUNT OPTIONS"]);
    for arg in mount.get_arguments() {
        let Some(word) = arg.get_long().map(|long| long.replace('-', "_")) else { continue };
        if !options::is_known(&word) {
            continue;
        }
        roff.control("TP", []);
        match arg.get_value_names().filter(|_| arg.get_action().takes_values()) {
            Some(names) => {
                let name = names.first().map(|name| name.to_string()).unwrap_or_default();
                roff.text([bold(format!("{word}=")), italic(name)])
            }
            None => roff.text([bold(word)]),
        };
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        roff.text([roman(help)]);
    }
    roff.control("PP", []);
    roff.text([roman(
        "nosuid, nodev, noexec, noatime, sync, dirsync and their opposites go to the kernel. What \
         belongs to fstab, mount and systemd (noauto, nofail, _netdev, user, x-* and their like) is \
         ignored, and so are default_permissions, which is always on, subtype and max_read. remount \
         is refused: unmount first. Any other word is an error, unless -s is given.",
    )]);
    roff
}

/// The sections after the options, from what follows the options in the help.
fn sections(help: &str) -> Roff {
    let mut roff = Roff::default();
    let (mut literal, mut paragraph) = (false, false);
    for line in help.lines() {
        let text = line.trim_start();
        let shown_as_it_is = line.starts_with("    ");
        if literal != shown_as_it_is {
            let switch = if shown_as_it_is { ["RS", "nf"] } else { ["fi", "RE"] };
            switch.into_iter().for_each(|macro_name| _ = roff.control(macro_name, []));
            literal = shown_as_it_is;
        }
        let continued = std::mem::take(&mut paragraph);
        match text.split_once("  ") {
            _ if text.is_empty() => {}
            _ if shown_as_it_is => _ = roff.text([roman(text)]),
            _ if line.len() == text.len() => {
                let heading = text.trim_end_matches(':').to_uppercase();
                roff.control("SH", [heading.as_str()]);
            }
            Some((term, meaning)) => {
                roff.control("TP", []);
                roff.text([bold(term)]);
                roff.text([roman(meaning.trim_start())]);
            }
            None => {
                if !continued {
                    roff.control("PP", []);
                }
                roff.text([roman(text)]);
                paragraph = true;
            }
        }
    }
    if literal {
        roff.control("fi", []);
        roff.control("RE", []);
    }
    roff
}

/// The day (UTC) of a time in seconds since 1970, as `YYYY-MM-DD`.
fn calendar_date(seconds: u64) -> String {
    let leap =
        |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    // Beyond year 9999 nothing has four digits any more.
    let (mut day, mut year) = ((seconds / 86400).min(2_932_896), 1970);
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for days in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < days {
            break;
        }
        day -= days;
        month += 1;
    }
    format!("{year:04}-{month:02}-{:02}", day + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, date) in [
            (0, "1970-01-01"),
            (951_782_399, "2000-02-28"),
            (951_782_400, "2000-02-29"),
            (4_102_444_799, "2099-12-31"),
            (4_107_542_400, "2100-03-01"),
        ] {
            assert_eq!(calendar_date(seconds), date);
        }
    }

    #[test]
    fn help_becomes_sections() {
        let help = "Examples:\n  By hand:\n    mount x\nExit status:\n  0   good\n  .so it is";
        let page = sections(help).render();
        for expected in
            ["SH EXAMPLES", "nf\nmount x\n.fi\n.RE", "SH \"EXIT STATUS\"", "\\fB0\\fR\ngood"]
        {
            assert!(page.contains(expected), "{expected:?} in {page}");
        }
        assert!(!page.contains("\n.so"), "{page}");
    }

    #[test]
    fn usage_is_split_before_its_arguments() {
        assert_eq!(
            split_usage("flatdisk mount [OPTIONS] DIR"),
            ("flatdisk mount ", "[OPTIONS] DIR")
        );
        assert_eq!(split_usage("flatdisk"), ("flatdisk", ""));
    }

    #[test]
    fn every_command_has_a_page() {
        let pages = pages().expect("pages");
        for command in Cli::command().get_subcommands() {
            let name = format!("flatdisk-{}.1", command.get_name());
            assert!(pages.iter().any(|(page, _)| *page == name), "{name}");
        }
    }
}
