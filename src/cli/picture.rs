//! `map --draw` and `map --svg`: an image as a picture.

use std::fmt::Write;
use std::path::Path;

use super::output::{iec, print_line};
use crate::codec;
use crate::disk::picture::{Cell, FileCell, Picture};
use crate::disk::sync_file;
use crate::error::Result;
use crate::formats::Image;
use crate::names::printable;
use crate::storage::Host;
use crate::storage::file::HostFs;
use crate::storage::staged::Staged;

/// Cells in a line on the terminal, and lines.
const WIDTH: usize = 64;
const LINES: u64 = 16;
/// Cells in a row of the picture, and rows.
const COLUMNS: usize = 128;
const ROWS: u64 = 32;
/// Points from one cell of the picture to the next.
const STEP: usize = 7;

/// Draws an image on the terminal.
pub fn draw(image: &Image) -> Result<()> {
    let picture = Picture::of(&image.disk, WIDTH as u64 * LINES)?;
    let disk: Vec<char> = picture.disk.iter().map(symbol).collect();
    print_line(&format!("disk: {}, {} a cell", iec(image.disk.size()), iec(picture.cell)))?;
    lines(&disk, picture.cell)?;
    print_line("  █ stored  ▒ partly  p in a parent  0 zero  · absent  ! damaged")?;
    let files: Vec<char> =
        picture.files.iter().map(|cell| file_symbol(cell, picture.file_cell)).collect();
    print_line(&format!("file: {}, {} a cell", iec(picture.file_len), iec(picture.file_cell)))?;
    lines(&files, picture.file_cell)?;
    print_line("  █ data  ▒ partly  t tables, compressed, or free  · hole")
}

fn lines(cells: &[char], cell: u64) -> Result<()> {
    for (line, cells) in cells.chunks(WIDTH).enumerate() {
        let at = (line * WIDTH) as u64 * cell;
        print_line(&format!("{:>10} {}", iec(at), cells.iter().collect::<String>()))?;
    }
    Ok(())
}

fn symbol(cell: &Cell) -> char {
    let rest = cell.parent + cell.zero + cell.absent;
    match cell {
        Cell { damaged: 1.., .. } => '!',
        Cell { data: 1.., .. } if rest == 0 => '█',
        Cell { data: 1.., .. } => '▒',
        Cell { parent: 1.., .. } => 'p',
        Cell { zero: 1.., .. } => '0',
        _ => '·',
    }
}

fn file_symbol(cell: &FileCell, len: u64) -> char {
    match cell {
        FileCell { data, .. } if *data >= len => '█',
        FileCell { data: 1.., .. } => '▒',
        FileCell { stored: 1.., .. } => 't',
        _ => '·',
    }
}

/// Draws an image to the file at `path`, in the place of one that is there.
pub fn write_svg(image: &Image, path: &Path) -> Result<()> {
    let picture = Picture::of(&image.disk, COLUMNS as u64 * ROWS)?;
    let staged = Staged::new(HostFs::shared(), path, true)?;
    let file = staged.create(path)?;
    codec::write_all(&*file, 0, svg(image, &picture).as_bytes(), "the picture")
        .and_then(|()| sync_file(&*file))
        .map_err(|e| staged.explain(e))?;
    staged.commit().map(drop)
}

/// The picture: the disk above the files. Data has the colour of its place on the disk, in both.
fn svg(image: &Image, picture: &Picture) -> String {
    let rows = |cells: usize| cells.div_ceil(COLUMNS);
    let below = 60 + rows(picture.disk.len()) * STEP;
    let (width, height) = (COLUMNS * STEP + 40, below + 80 + rows(picture.files.len()) * STEP);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let name = escaped(&image.path.display().to_string());
    text(&mut out, 30, &format!("{name}: the disk, {} a cell", iec(picture.cell)));
    let size = image.disk.size();
    let colours: Vec<String> = (0_u64..)
        .zip(&picture.disk)
        .map(|(index, cell)| colour(cell, index.saturating_mul(picture.cell), size))
        .collect();
    grid(&mut out, 40, picture.cell, &colours);
    let what = format!("its file, {} a cell, as it lies there", iec(picture.file_cell));
    text(&mut out, below, &what);
    let colours: Vec<String> = picture.files.iter().map(|cell| file_colour(cell, size)).collect();
    grid(&mut out, below + 10, picture.file_cell, &colours);
    text(
        &mut out,
        height - 34,
        "coloured: data, by its place on the disk; blue-grey: in a parent; white: nothing;",
    );
    text(
        &mut out,
        height - 16,
        "grey: zeroes, or in the file tables, compressed data, free space; black: damaged",
    );
    out.push_str("</svg>\n");
    out
}

fn text(out: &mut String, y: usize, what: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(out, "<text x=\"20\" y=\"{y}\">{what}</text>");
}

/// Draws runs of cells of one colour as one bar.
fn grid(out: &mut String, top: usize, cell: u64, colours: &[String]) {
    for (row, colours) in colours.chunks(COLUMNS).enumerate() {
        let mut column = 0;
        for run in colours.chunk_by(|a, b| a == b) {
            let (x, y) = (20 + column * STEP, top + row * STEP);
            let at = (row * COLUMNS + column) as u64 * cell;
            let _ = writeln!(
                out,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{}\" fill=\"{}\" stroke=\"#ddd\" stroke-width=\".3\"><title>{}</title></rect>",
                run.len() * STEP,
                STEP - 1,
                run[0],
                iec(at),
            );
            column += run.len();
        }
    }
}

/// The colour of a place on a disk of `size` bytes.
fn hue(at: u64, size: u64, light: u64) -> String {
    let hue = (u128::from(at) * 300 / u128::from(size.max(1))).min(300);
    format!("hsl({hue},75%,{light}%)")
}

fn colour(cell: &Cell, at: u64, size: u64) -> String {
    match cell {
        Cell { damaged: 1.., .. } => "black".to_owned(),
        Cell { data: 1.., absent, zero, parent, .. } => {
            hue(at, size, if absent + zero + parent == 0 { 48 } else { 68 })
        }
        Cell { parent: 1.., .. } => "#b8c4d6".to_owned(),
        Cell { zero: 1.., .. } => "#bbb".to_owned(),
        _ => "white".to_owned(),
    }
}

fn file_colour(cell: &FileCell, size: u64) -> String {
    match cell {
        FileCell { data: 1.., from, .. } => hue(*from, size, 48),
        FileCell { stored: 1.., .. } => "#bbb".to_owned(),
        _ => "white".to_owned(),
    }
}

fn escaped(text: &str) -> String {
    let text = printable(text).to_string();
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_their_element() {
        assert_eq!(escaped("a<b>&\n"), "a&lt;b&gt;&amp;\\n");
    }

    #[test]
    fn a_cell_shows_the_worst_and_then_the_most_certain_of_it() {
        let cell = Cell { data: 1, absent: 1, ..Cell::default() };
        assert_eq!(symbol(&cell), '▒');
        assert_eq!(symbol(&Cell { damaged: 1, ..cell }), '!');
        assert_eq!(symbol(&Cell { absent: 0, ..cell }), '█');
        assert_eq!(symbol(&Cell { data: 0, zero: 1, ..cell }), '0');
        assert_eq!(symbol(&Cell { data: 0, ..cell }), '·');
    }
}
