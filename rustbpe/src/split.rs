//! Splitting text into chunks, the units within which pairs are merged: GPT-4's pattern with numbers of one or two
//! digits, written out by hand.
//!
//! The pattern is an alternation, tried in order at each position; every character starts a match of one of its
//! branches, so that the chunks partition the text. A backtracking regex engine spends most of the time of training
//! and of encoding on it; this scanner, which looks at each byte about once, is ten times as fast. That both agree is
//! tested on every code point in every context that the pattern can tell apart.

use crate::classes::{classes, Class, Classes};

/// The pattern that the scanner implements, in the notation of fancy-regex, tiktoken and Oniguruma.
pub const PATTERN: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// Cuts text, which need not be valid UTF-8, into chunks.
#[derive(Clone, Copy)]
pub struct Splitter {
    classes: &'static Classes,
}

impl Default for Splitter {
    fn default() -> Self {
        Self { classes: classes() }
    }
}

impl Splitter {
    /// Call `each(start, end)` for every chunk of `text`, in order.
    #[inline(always)]
    pub fn for_each(self, text: &[u8], mut each: impl FnMut(usize, usize)) {
        let mut start = 0;
        while start < text.len() {
            let end = self.chunk_end(text, start);
            each(start, end);
            start = end;
        }
    }

    /// Where the chunk that begins at `start < text.len()` ends.
    #[inline(always)]
    fn chunk_end(self, text: &[u8], start: usize) -> usize {
        let (class, width) = self.classes.at(text, start);
        let after = start + width;
        match class {
            Class::Letter => return self.run_end(text, after, Class::Letter),
            Class::Number => return self.one(text, after, Class::Number).unwrap_or(after),
            _ => {}
        }
        if text[start] == b'\'' {
            if let Some(end) = contraction_end(text, after) {
                return end;
            }
        }
        if class != Class::Newline {
            // [^\r\n\p{L}\p{N}]?+\p{L}+
            if let Some(end) = self.one(text, after, Class::Letter) {
                return self.run_end(text, end, Class::Letter);
            }
        }
        // ` ?[^\s\p{L}\p{N}]++[\r\n]*`
        if class == Class::Other {
            return self.punctuation_end(text, after);
        }
        if text[start] == b' ' {
            if let Some(end) = self.one(text, after, Class::Other) {
                return self.punctuation_end(text, end);
            }
        }
        self.whitespace_end(text, start)
    }

    /// The end of the character at `at` if it is of this class.
    #[inline(always)]
    fn one(self, text: &[u8], at: usize, class: Class) -> Option<usize> {
        if at == text.len() {
            return None;
        }
        let (found, width) = self.classes.at(text, at);
        (found == class).then_some(at + width)
    }

    /// The end of the run of characters of this class that begins at `at`, which may be empty.
    #[inline(always)]
    fn run_end(self, text: &[u8], mut at: usize, class: Class) -> usize {
        while let Some(end) = self.one(text, at, class) {
            at = end;
        }
        at
    }

    /// The rest of `[^\s\p{L}\p{N}]++[\r\n]*`.
    #[inline(always)]
    fn punctuation_end(self, text: &[u8], at: usize) -> usize {
        let end = self.run_end(text, at, Class::Other);
        self.run_end(text, end, Class::Newline)
    }

    /// `\s*[\r\n]|\s+(?!\S)|\s+` at a whitespace character: up to the last line break of the run; without one, all of
    /// the run at the end of the text, and all but its last character before a word.
    fn whitespace_end(self, text: &[u8], start: usize) -> usize {
        let (mut at, mut last, mut line_end) = (start, start, None);
        while at < text.len() {
            let (class, width) = self.classes.at(text, at);
            match class {
                Class::Space => {}
                Class::Newline => line_end = Some(at + width),
                _ => break,
            }
            last = at;
            at += width;
        }
        match line_end {
            Some(end) => end,
            None if at == text.len() || last == start => at,
            None => last,
        }
    }
}

/// The rest of `'(?i:[sdmt]|ll|ve|re)`. Case folding makes `ſ` (U+017F) an s.
#[inline]
fn contraction_end(text: &[u8], at: usize) -> Option<usize> {
    let lower = |i: usize| text.get(i).map(u8::to_ascii_lowercase);
    match (lower(at)?, lower(at + 1)) {
        (b's' | b'd' | b'm' | b't', _) => Some(at + 1),
        (b'l', Some(b'l')) | (b'v' | b'r', Some(b'e')) | (0xC5, Some(0xBF)) => Some(at + 2),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fancy_regex::Regex;

    fn chunks(text: &str) -> Vec<&str> {
        let mut found = Vec::new();
        Splitter::default().for_each(text.as_bytes(), |start, end| found.push(&text[start..end]));
        found
    }

    fn by_regex<'t>(regex: &Regex, text: &'t str) -> Vec<&'t str> {
        regex.find_iter(text).map(|found| found.expect("no backtracking limit").as_str()).collect()
    }

    #[test]
    fn examples() {
        assert_eq!(chunks("Hello, world's  end"), ["Hello", ",", " world", "'s", " ", " end"]);
        assert_eq!(chunks("12345 x=3"), ["12", "34", "5", " x", "=", "3"]);
        assert_eq!(chunks("a \n \n  b"), ["a", " \n \n", " ", " b"]);
        assert_eq!(chunks("end!\r\n\n  "), ["end", "!\r\n\n", "  "]);
        assert_eq!(chunks("'lL 'Ve 'rE 'tis 'ſx"), ["'lL", " '", "Ve", " '", "rE", " '", "tis", " '", "ſx"]);
        assert_eq!(chunks("it'LL"), ["it", "'LL"]);
        assert_eq!(chunks(""), Vec::<&str>::new());
    }

    #[test]
    fn equals_the_regex_on_every_codepoint_in_every_context() {
        let regex = Regex::new(PATTERN).expect("a valid pattern");
        for character in '\0'..=char::MAX {
            // after and before each class, doubled, after an apostrophe, and alone
            let c = character;
            let text = format!("{c}a{c}{c}b1{c}1 {c} {c}.{c}\n{c}\n{c}{c}'{c}'{c}l\t{c}\u{3000}{c}");
            assert_eq!(chunks(&text), by_regex(&regex, &text), "{character:?}");
        }
    }

    #[test]
    fn equals_the_regex_on_random_strings() {
        let regex = Regex::new(PATTERN).expect("a valid pattern");
        let alphabet: Vec<char> = "aZé漢sdmtlvreSTLſ19½ \t\u{a0}\u{3000}\r\n\n''._-🙂\u{200d}\u{301}".chars().collect();
        let mut state = 1_u64;
        let mut draw = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below as u64) as usize
        };
        for _ in 0..100_000 {
            let length = draw(20);
            let text: String = (0..length).map(|_| alphabet[draw(alphabet.len())]).collect();
            assert_eq!(chunks(&text), by_regex(&regex, &text), "{text:?}");
        }
    }

    #[test]
    fn chunks_partition_any_bytes() {
        let text = b"ab\xFF\xFEcd \x80\n\xE6\xBC\xE6\xBC\xA2 \xF0\x9F";
        let mut at = 0;
        Splitter::default().for_each(text, |start, end| {
            assert!(start == at && end > start);
            at = end;
        });
        assert_eq!(at, text.len());
    }
}
