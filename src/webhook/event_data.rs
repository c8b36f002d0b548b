//! The JSON object a publisher hands in, kept byte for byte.

use std::sync::Arc;

use serde_json::value::RawValue;

/// Objects and arrays may be nested this deep; deeper data is refused.
pub const MAX_EVENT_DATA_DEPTH: usize = 64;

/// One valid JSON object in the publisher's own spelling. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventData(Arc<str>);

/// Why text is not event data.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EventDataError {
    /// Nothing was given.
    #[error("data is required")]
    Missing,
    /// It is JSON, but no object.
    #[error("data must be a JSON object")]
    NotAnObject,
    /// It is not JSON.
    #[error("data is not valid JSON at line {line}, column {column}")]
    Invalid {
        /// Line of the fault, from 1.
        line: usize,
        /// Column of the fault, from 1.
        column: usize,
    },
    /// It is nested deeper than [`MAX_EVENT_DATA_DEPTH`].
    #[error("data is nested more than {MAX_EVENT_DATA_DEPTH} levels deep")]
    TooDeep,
}

impl EventData {
    /// The text itself, to be kept without a copy.
    pub fn shared(&self) -> &Arc<str> {
        &self.0
    }

    /// Takes `text` as it is, after a look at its syntax; white space around the object is dropped.
    pub fn parse(text: &str) -> Result<Self, EventDataError> {
        let text = text.trim_matches([' ', '\t', '\r', '\n']);
        match text.as_bytes().first() {
            None => return Err(EventDataError::Missing),
            Some(b'{') => {}
            Some(_) => return Err(EventDataError::NotAnObject),
        }
        // Before serde_json, which would otherwise be the one to run into a million brackets.
        if depth(text) > MAX_EVENT_DATA_DEPTH {
            return Err(EventDataError::TooDeep);
        }
        // RawValue checks the syntax without reading numbers into types that cannot hold them.
        serde_json::from_str::<&RawValue>(text)
            .map_err(|error| EventDataError::Invalid { line: error.line(), column: error.column() })?;
        Ok(Self(text.into()))
    }

    /// What was stored after [`EventData::parse`] accepted it.
    pub(crate) fn trusted(text: String) -> Self {
        Self(text.into())
    }

    /// The JSON text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// How deep brackets nest outside strings.
fn depth(text: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    let (mut in_string, mut escaped) = (false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_every_byte() {
        for text in [
            r#"{"b":1e400,"a":12345678901234567890,"c":45.20,"d":"\u00e4\/","a":2}"#,
            "{ \"spaced\" :\n[ 1 , 2 ] }",
            r#"{"nul":"\u0000","lone":"\ud800"}"#,
        ] {
            assert_eq!(EventData::parse(text).unwrap().as_str(), text);
        }
        assert_eq!(EventData::parse(" {} \n").unwrap().as_str(), "{}");
    }

    #[test]
    fn says_what_is_wrong() {
        assert_eq!(EventData::parse(""), Err(EventDataError::Missing));
        assert_eq!(EventData::parse("[1]"), Err(EventDataError::NotAnObject));
        assert_eq!(EventData::parse("null"), Err(EventDataError::NotAnObject));
        assert_eq!(EventData::parse("{\"a\":}"), Err(EventDataError::Invalid { line: 1, column: 6 }));
        assert!(matches!(EventData::parse("{} {}"), Err(EventDataError::Invalid { .. })));
        assert!(matches!(EventData::parse("{\"a\":01}"), Err(EventDataError::Invalid { .. })));
    }

    #[test]
    fn bounds_the_depth() {
        let nested = |levels: usize| format!("{}1{}", "{\"a\":".repeat(levels), "}".repeat(levels));
        assert!(EventData::parse(&nested(64)).is_ok());
        assert_eq!(EventData::parse(&nested(65)), Err(EventDataError::TooDeep));
        assert_eq!(EventData::parse(&nested(500_000)), Err(EventDataError::TooDeep));
        assert!(EventData::parse(&format!("{{\"a\":\"{}\"}}", "[".repeat(100))).is_ok());
    }
}
