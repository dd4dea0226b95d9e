//! File names on their way to people and to programs.
//!
//! A name is bytes: any but NUL and `/`, in no encoding. Names come from strangers, too, in images and
//! in directories that others may write to. On a terminal a control character in one would do
//! something; as text, bytes that are no UTF-8 would be lost; and JSON has only text.

use std::ffi::OsString;
use std::fmt::{self, Display, Write};
use std::ops::Deref;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Whether a terminal would do something else with `c` than show it: control characters, and those
/// that end lines or turn the direction of writing.
pub fn acts(c: char) -> bool {
    let turns = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    c.is_control() || turns || matches!(c, '\u{2028}' | '\u{2029}')
}

/// `text` with the characters that [`acts`] finds escaped: one line, whatever it holds.
pub fn printable(text: impl Display) -> impl Display {
    struct Printable<T>(T);

    struct Escaping<'a, 'b>(&'a mut fmt::Formatter<'b>);

    impl Write for Escaping<'_, '_> {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            let mut rest = text;
            while let Some((at, c)) = rest.char_indices().find(|(_, c)| acts(*c)) {
                self.0.write_str(&rest[..at])?;
                write!(self.0, "{}", c.escape_default())?;
                rest = &rest[at + c.len_utf8()..];
            }
            self.0.write_str(rest)
        }
    }

    impl<T: Display> Display for Printable<T> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(Escaping(f), "{}", self.0)
        }
    }

    Printable(text)
}

/// A path in JSON: a string, or, where it is not UTF-8, an object whose `hex` has its bytes, and whose
/// `text` resembles it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name(pub PathBuf);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    Text(String),
    Bytes {
        #[serde(default)]
        text: String,
        hex: String,
    },
}

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize(&self.0, serializer)
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserialize(deserializer).map(Self)
    }
}

fn bytes_of(hex: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u32>> = hex.chars().map(|c| c.to_digit(16)).collect();
    let pairs = digits?;
    let pairs = pairs.chunks(2).map(|pair| match pair {
        [high, low] => u8::try_from(high * 16 + low).ok(),
        _ => None,
    });
    pairs.collect()
}

/// Reads a path that was written as a [`Name`].
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    match Written::deserialize(deserializer)? {
        Written::Text(text) => Ok(text.into()),
        Written::Bytes { hex, .. } => bytes_of(&hex)
            .map(|bytes| OsString::from_vec(bytes).into())
            .ok_or_else(|| serde::de::Error::custom("not a name in hexadecimal")),
    }
}

/// Writes a path as a [`Name`].
pub fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    let written = match path.to_str() {
        Some(text) => return serializer.serialize_str(text),
        None => Written::Bytes {
            text: path.to_string_lossy().into_owned(),
            hex: path.as_os_str().as_bytes().iter().map(|byte| format!("{byte:02x}")).collect(),
        },
    };
    written.serialize(serializer)
}

/// A path that may be missing, as a [`Name`].
pub mod some {
    use super::*;

    /// Writes the path, or null.
    pub fn serialize<S: Serializer>(
        path: &Option<PathBuf>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        path.clone().map(Name).serialize(serializer)
    }

    /// Reads what [`serialize`] wrote.
    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<PathBuf>, D::Error> {
        Ok(Option::<Name>::deserialize(deserializer)?.map(|name| name.0))
    }
}

impl Deref for Name {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl From<PathBuf> for Name {
    fn from(path: PathBuf) -> Self {
        Self(path)
    }
}

impl From<&Path> for Name {
    fn from(path: &Path) -> Self {
        Self(path.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_acts_on_a_terminal_is_printed() {
        assert_eq!(
            printable("a\nb\u{1b}[2J\u{9b}1m\u{7f}\u{202e}\u{2028}ö").to_string(),
            "a\\nb\\u{1b}[2J\\u{9b}1m\\u{7f}\\u{202e}\\u{2028}ö"
        );
        assert_eq!(printable("").to_string(), "");
        assert_eq!(printable(format_args!("{}-{}", 1, "\r")).to_string(), "1-\\r");
    }

    #[test]
    fn every_name_survives_json() {
        for (bytes, json) in [
            (&b"/a b"[..], r#""/a b""#),
            (b"/new\nline", r#""/new\nline""#),
            ("/Ж".as_bytes(), "\"/Ж\""),
            (b"/\xff\x0a", r#"{"text":"/�\n","hex":"2fff0a"}"#),
        ] {
            let name = Name(OsString::from_vec(bytes.to_vec()).into());
            assert_eq!(serde_json::to_string(&name).unwrap(), json);
            assert_eq!(serde_json::from_str::<Name>(json).unwrap(), name);
        }
        for wrong in ["{}", "1", r#"{"hex":"2"}"#, r#"{"hex":"zz"}"#] {
            assert!(serde_json::from_str::<Name>(wrong).is_err(), "{wrong}");
        }
    }
}
