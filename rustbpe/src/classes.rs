//! Which of five classes a character belongs to: all that the split pattern asks about it.
//!
//! The tables are not written down here: they are read, once, from `regex-syntax`, the crate that holds the Unicode
//! tables of Rust's regex engine, so that our classes are `\p{L}`, `\p{N}` and `\s` of that engine (and of tiktoken).

use std::sync::OnceLock;

use regex_syntax::hir::{Class as HirClass, HirKind};

/// What the split pattern distinguishes. `\s` is `Space` or `Newline`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    /// None of the others: punctuation, symbols, control characters, and bytes that are not UTF-8.
    Other,
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
    /// `\s` other than `\r` and `\n`
    Space,
    /// `\r` or `\n`
    Newline,
}

const BLOCK: usize = 256;
const CODEPOINTS: usize = 0x11_0000;

/// A two-stage table: most blocks of 256 code points are equal to another block, and are stored once.
pub struct Classes {
    ascii: [Class; 128],
    block_of: Vec<u16>,
    blocks: Vec<[Class; BLOCK]>,
}

/// The table, built on first use (about a millisecond).
pub fn classes() -> &'static Classes {
    static CLASSES: OnceLock<Classes> = OnceLock::new();
    CLASSES.get_or_init(Classes::build)
}

impl Classes {
    fn build() -> Self {
        let mut flat = vec![Class::Other; CODEPOINTS];
        for (pattern, class) in [(r"\p{L}", Class::Letter), (r"\p{N}", Class::Number), (r"\s", Class::Space)] {
            for (first, last) in ranges(pattern) {
                flat[first as usize..=last as usize].fill(class);
            }
        }
        flat['\r' as usize] = Class::Newline;
        flat['\n' as usize] = Class::Newline;

        let mut blocks: Vec<[Class; BLOCK]> = Vec::new();
        let mut block_of = Vec::with_capacity(CODEPOINTS / BLOCK);
        for block in flat.chunks_exact(BLOCK) {
            let at = blocks.iter().position(|known| known == block).unwrap_or_else(|| {
                blocks.push(block.try_into().expect("chunks_exact gives whole blocks"));
                blocks.len() - 1
            });
            block_of.push(at as u16);
        }
        let ascii = flat[..128].try_into().expect("128 classes");
        Self { ascii, block_of, blocks }
    }

    /// The class of a code point.
    #[inline]
    pub fn of(&self, codepoint: u32) -> Class {
        self.blocks[self.block_of[codepoint as usize / BLOCK] as usize][codepoint as usize % BLOCK]
    }

    /// The class and the width in bytes of the character at `text[at]`; a byte that does not begin a valid UTF-8
    /// sequence is a character of its own, of class `Other`.
    #[inline(always)]
    pub fn at(&self, text: &[u8], at: usize) -> (Class, usize) {
        let byte = text[at];
        if byte < 0x80 {
            (self.ascii[byte as usize], 1)
        } else {
            self.beyond_ascii(&text[at..])
        }
    }

    #[inline]
    fn beyond_ascii(&self, text: &[u8]) -> (Class, usize) {
        let tail = |i: usize| match text.get(i) {
            Some(&byte) if byte & 0xC0 == 0x80 => Some(u32::from(byte & 0x3F)),
            _ => None,
        };
        let lead = u32::from(text[0]);
        let decoded = match lead {
            0xC2..=0xDF => tail(1).map(|a| ((lead & 0x1F) << 6 | a, 2)),
            0xE0..=0xEF => tail(1).zip(tail(2)).map(|(a, b)| ((lead & 0x0F) << 12 | a << 6 | b, 3)),
            0xF0..=0xF4 => {
                tail(1).zip(tail(2)).zip(tail(3)).map(|((a, b), c)| ((lead & 0x07) << 18 | a << 12 | b << 6 | c, 4))
            }
            _ => None,
        };
        match decoded {
            Some((codepoint, 2)) => (self.of(codepoint), 2),
            Some((codepoint, 3)) if codepoint >= 0x800 && !(0xD800..0xE000).contains(&codepoint) => {
                (self.of(codepoint), 3)
            }
            Some((codepoint, 4)) if (0x1_0000..0x11_0000).contains(&codepoint) => (self.of(codepoint), 4),
            _ => (Class::Other, 1), // too long, a surrogate, beyond Unicode, cut off, or no lead byte at all
        }
    }
}

/// The code point ranges of a regex that is a single class.
fn ranges(pattern: &str) -> Vec<(u32, u32)> {
    match regex_syntax::parse(pattern).expect("a valid class").kind() {
        HirKind::Class(HirClass::Unicode(class)) => {
            class.ranges().iter().map(|range| (range.start() as u32, range.end() as u32)).collect()
        }
        other => unreachable!("{pattern} is not a Unicode class: {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_characters() {
        let table = classes();
        let expected = [
            ('a', Class::Letter),
            ('é', Class::Letter),
            ('漢', Class::Letter),
            ('ſ', Class::Letter),
            ('7', Class::Number),
            ('½', Class::Number),
            ('٣', Class::Number),
            (' ', Class::Space),
            ('\u{a0}', Class::Space),
            ('\u{3000}', Class::Space),
            ('\n', Class::Newline),
            ('\r', Class::Newline),
            ('\u{b}', Class::Space),
            ('_', Class::Other),
            ('🙂', Class::Other),
            ('\u{200d}', Class::Other),
        ];
        for (character, class) in expected {
            assert_eq!(table.of(character as u32), class, "{character:?}");
        }
    }

    #[test]
    fn decodes_every_codepoint_as_std_does() {
        let table = classes();
        for character in '\0'..=char::MAX {
            let mut buffer = [0; 4];
            let bytes = character.encode_utf8(&mut buffer).as_bytes();
            assert_eq!(table.at(bytes, 0), (table.of(character as u32), bytes.len()), "{character:?}");
        }
    }

    #[test]
    fn invalid_bytes_stand_alone() {
        // a stray tail, overlong forms, a surrogate, beyond U+10FFFF, sequences that are cut off, impossible bytes
        let invalid: [&[u8]; 11] = [
            b"\x80",
            b"\xC0\xAF",
            b"\xC1\xBF",
            b"\xE0\x80\xAF",
            b"\xED\xA0\x80",
            b"\xF0\x80\x80\xAF",
            b"\xF4\x90\x80\x80",
            b"\xE6\xBC",
            b"\xF0\x9F\x99",
            b"\xC3",
            b"\xFF",
        ];
        for bytes in invalid {
            assert!(std::str::from_utf8(bytes).is_err());
            assert_eq!(classes().at(bytes, 0), (Class::Other, 1), "{bytes:x?}");
        }
    }
}
