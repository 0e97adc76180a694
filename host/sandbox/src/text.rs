//! Text from components and images, made fit for a terminal and a log.

/// `text` cut to `limit` bytes, with control characters (line ends and terminal escapes among them)
/// shown escaped.
pub fn clean(text: &str, limit: usize) -> String {
    let mut clean = String::new();
    for character in text.chars() {
        if clean.len() >= limit {
            clean.push('…');
            break;
        }
        // Bidirectional overrides can make a terminal show another text than the one that is there.
        let reorders = matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if character.is_control() || reorders {
            clean.extend(character.escape_default());
        } else {
            clean.push(character);
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::clean;

    #[test]
    fn nothing_reaches_the_terminal_raw() {
        assert_eq!(clean("a\x1b[2Jb\nc\u{202e}d", 100), "a\\u{1b}[2Jb\\nc\\u{202e}d");
        assert_eq!(clean(&"x".repeat(50), 10), format!("{}…", "x".repeat(10)));
    }
}
