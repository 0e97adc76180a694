//! JSON that a terminal can be shown: text of images and components in it is escaped where it would not only be read.
//!
//! It is the same JSON to every program: `\u009b` and the character mean the same. What is escaped is what `text.rs`
//! escapes for people.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter, Serializer};

use super::text::is_unsafe;

/// Writes a value on one line, without its end.
///
/// # Errors
/// If the value cannot be JSON, or not be written.
pub fn write(to: impl Write, value: &impl Serialize) -> serde_json::Result<()> {
    value.serialize(&mut Serializer::with_formatter(to, Escaping(CompactFormatter)))
}

/// A value on one line, without its end.
///
/// # Errors
/// If the value cannot be JSON.
pub fn line(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut json = Vec::new();
    write(&mut json, value)?;
    Ok(json)
}

/// A value on as many lines as make it easy to read, without the end of the last one.
///
/// # Errors
/// If the value cannot be JSON.
pub fn pretty(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut json = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut json, Escaping(PrettyFormatter::new())))?;
    Ok(json)
}

/// Another formatter, with the content of strings escaped.
struct Escaping<F>(F);

/// Where a formatter puts spaces and line ends.
macro_rules! as_within {
    ($($name:ident($($first:ident)?)),+ $(,)?) => {
        $(fn $name<W: ?Sized + Write>(&mut self, writer: &mut W $(, $first: bool)?) -> io::Result<()> {
            self.0.$name(writer $(, $first)?)
        })+
    };
}

impl<F: Formatter> Formatter for Escaping<F> {
    /// A part of a string in which nothing has to be escaped for the sake of JSON.
    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        let mut rest = fragment;
        while let Some((at, character)) = rest.char_indices().find(|(_, character)| is_unsafe(*character)) {
            let (before, after) = rest.split_at(at);
            writer.write_all(before.as_bytes())?;
            // Above U+FFFF these are two, as JSON has it.
            for unit in character.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
            rest = after.get(character.len_utf8()..).unwrap_or_default();
        }
        writer.write_all(rest.as_bytes())
    }

    as_within!(
        begin_array(),
        end_array(),
        begin_array_value(first),
        end_array_value(),
        begin_object(),
        end_object(),
        begin_object_key(first),
        end_object_key(),
        begin_object_value(),
        end_object_value(),
    );
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::{Value, json};

    use super::*;

    /// Every character there is, in a name and in a value.
    #[test]
    fn nothing_is_raw_and_all_of_it_is_the_same() {
        let all: String = (0..=0x10_ffff).filter_map(char::from_u32).collect();
        let value = json!({ "plain": ["text", 1, null, true, {}], &all: { "value": [&all, []] } });
        for (json, usual) in [
            (line(&value).unwrap(), serde_json::to_string(&value).unwrap()),
            (pretty(&value).unwrap(), serde_json::to_string_pretty(&value).unwrap()),
        ] {
            let json = String::from_utf8(json).unwrap();
            assert!(serde_json::from_str::<Value>(&json).unwrap() == value, "it is another value");
            let raw = json.chars().find(|character| *character != '\n' && is_unsafe(*character));
            assert_eq!(raw, None);
            // Line ends and spaces are where they were.
            let shape =
                |json: &str| json.chars().filter(|character| " \n[]{}:,".contains(*character)).collect::<String>();
            assert!(shape(&json) == shape(&usual), "it looks otherwise");
        }
    }

    #[test]
    fn what_is_plain_stays_and_the_rest_is_escaped_by_its_units() {
        let value = json!(["grün", "a\u{9b}31m\u{202e}\u{7f}\u{2028}\u{e0041}b", "\u{1b}\n\"\\"]);
        let expected = "[\"grün\",\"a\\u009b31m\\u202e\\u007f\\u2028\\udb40\\udc41b\",\"\\u001b\\n\\\"\\\\\"]";
        assert_eq!(String::from_utf8(line(&value).unwrap()).unwrap(), expected);
        let mut written = Vec::new();
        write(&mut written, &value).unwrap();
        assert_eq!(written, expected.as_bytes());
    }
}
