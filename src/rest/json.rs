//! A walk over JSON that is known to be valid, value by value, with numbers and raw parts in the text's own spelling.

use std::borrow::Cow;

/// A place in a JSON text. On a text that is not valid it finds nonsense, and ends.
pub(super) struct Cursor<'j> {
    text: &'j str,
    at: usize,
}

impl<'j> Cursor<'j> {
    pub(super) fn new(text: &'j str) -> Self {
        Self { text, at: 0 }
    }

    /// The first byte of the next value, which tells its type; 0 at the end.
    pub(super) fn peek(&mut self) -> u8 {
        let bytes = self.text.as_bytes();
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = bytes.get(self.at) {
            self.at += 1;
        }
        bytes.get(self.at).copied().unwrap_or(0)
    }

    /// Goes into the object or array that is next.
    pub(super) fn enter(&mut self) {
        self.peek();
        self.at += 1;
    }

    /// Whether another member or element follows; the end of the object or array is passed.
    pub(super) fn more(&mut self) -> bool {
        if self.peek() == b',' {
            self.at += 1;
        }
        match self.peek() {
            0 => false,
            b'}' | b']' => {
                self.at += 1;
                false
            }
            _ => true,
        }
    }

    /// The key of the next member with its quotes; what follows is its value.
    pub(super) fn key(&mut self) -> &'j str {
        let key = self.value();
        if self.peek() == b':' {
            self.at += 1;
        }
        key
    }

    /// The text of the next value.
    pub(super) fn value(&mut self) -> &'j str {
        self.peek();
        let start = self.at;
        let bytes = self.text.as_bytes();
        let mut depth = 0_usize;
        while let Some(byte) = bytes.get(self.at) {
            self.at += 1;
            match byte {
                b'"' => self.string_end(),
                b'{' | b'[' => depth += 1,
                b'}' | b']' => depth = depth.saturating_sub(1),
                _ if depth == 0 => self.word_end(),
                _ => continue,
            }
            if depth == 0 {
                break;
            }
        }
        self.text.get(start..self.at).unwrap_or_default()
    }

    /// Where the next value begins.
    pub(super) fn place(&mut self) -> usize {
        self.peek();
        self.at
    }

    /// The text from a place to here.
    pub(super) fn since(&self, place: usize) -> &'j str {
        self.text.get(place..self.at).unwrap_or_default()
    }

    fn string_end(&mut self) {
        let bytes = self.text.as_bytes();
        while let Some(byte) = bytes.get(self.at) {
            self.at += 1;
            match byte {
                b'"' => return,
                b'\\' => self.at += 1,
                _ => {}
            }
        }
    }

    /// Passes the rest of a number or of `true`, `false`, `null`.
    fn word_end(&mut self) {
        let rest = self.text.as_bytes().get(self.at..).unwrap_or_default();
        let ends = |byte: &u8| matches!(byte, b',' | b'}' | b']' | b':' | b' ' | b'\t' | b'\n' | b'\r');
        self.at += rest.iter().position(ends).unwrap_or(rest.len());
    }
}

/// What a string means, borrowed where it has no escapes; none for another value or for an escape that is no character.
pub(super) fn unquoted(value: &str) -> Option<Cow<'_, str>> {
    let inside = value.strip_prefix('"')?.strip_suffix('"')?;
    if inside.contains('\\') {
        return serde_json::from_str(value).ok().map(Cow::Owned);
    }
    Some(Cow::Borrowed(inside))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn walks_values_in_their_own_spelling() {
        let mut cursor = Cursor::new(r#" {"a" : [1.50 , "x\"]" ,{"b":[]}] , "c":null}"#);
        assert_eq!(cursor.peek(), b'{');
        cursor.enter();
        assert!(cursor.more());
        assert_eq!(cursor.key(), r#""a""#);
        cursor.enter();
        let mut elements = Vec::new();
        while cursor.more() {
            elements.push(cursor.value());
        }
        assert_eq!(elements, ["1.50", r#""x\"]""#, r#"{"b":[]}"#]);
        assert!(cursor.more());
        assert_eq!((cursor.key(), cursor.value()), (r#""c""#, "null"));
        assert!(!cursor.more());
        assert!(!cursor.more());
    }

    proptest! {
        #[test]
        fn ends_on_any_text(text in "[\\[\\]{}\",:\\\\ a1é]{0,40}") {
            let mut cursor = Cursor::new(&text);
            for _ in 0..=text.len() {
                cursor.enter();
                while cursor.more() {
                    let before = cursor.place();
                    cursor.key();
                    cursor.value();
                    prop_assert!(cursor.place() > before);
                }
            }
        }
    }
}
