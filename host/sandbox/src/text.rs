//! Text from components and images, made fit for a terminal and a log.

/// Whether a character does more than being read: whatever is shown of an image or a component has it escaped, in text
/// and in JSON.
pub(crate) fn is_unsafe(character: char) -> bool {
    match character {
        // What nobody sees, and marks of direction, which make a terminal show another text than the one that is there:
        // `Default_Ignorable_Code_Point` of Unicode.
        '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' => true,
        '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' => true,
        '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fff8}' => true,
        '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}' => true,
        // Notes between the lines, which are shown beside their text or not at all.
        '\u{fff9}'..='\u{fffb}' => true,
        // Some programs end a line there.
        '\u{2028}' | '\u{2029}' => true,
        // Line ends, escapes of terminals (of one byte, and of the upper half), DEL.
        other => other.is_control(),
    }
}

/// `text` cut to `limit` bytes, with control characters (line ends and terminal escapes among them), marks of direction
/// and what nobody sees shown escaped.
pub fn clean(text: &str, limit: usize) -> String {
    let mut clean = String::new();
    for character in text.chars() {
        if clean.len() >= limit {
            clean.push('…');
            break;
        }
        if is_unsafe(character) {
            clean.extend(character.escape_default());
        } else {
            clean.push(character);
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::{clean, is_unsafe};

    #[test]
    fn nothing_reaches_the_terminal_raw() {
        assert_eq!(clean("a\x1b[2Jb\nc\u{202e}d", 100), "a\\u{1b}[2Jb\\nc\\u{202e}d");
        for (first, last) in [
            ('\0', '\u{1f}'),
            ('\u{7f}', '\u{9f}'),
            ('\u{ad}', '\u{ad}'),
            ('\u{61c}', '\u{61c}'),
            ('\u{200b}', '\u{200f}'),
            ('\u{2028}', '\u{202e}'),
            ('\u{2060}', '\u{206f}'),
            ('\u{feff}', '\u{feff}'),
            ('\u{e0000}', '\u{e007f}'),
        ] {
            assert_eq!((first..=last).find(|character| !is_unsafe(*character)), None);
        }
        assert_eq!(" ~\u{a0}ü\u{2010}…漢\u{1f600}".chars().find(|character| is_unsafe(*character)), None);
        assert_eq!(clean(&"x".repeat(50), 10), format!("{}…", "x".repeat(10)));
    }
}
