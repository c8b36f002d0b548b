//! Where in a body something is.

use std::fmt;

/// A place, as a chain on the stack: its text is made only when there is a fault to report.
#[derive(Clone, Copy)]
pub(super) enum Path<'p> {
    /// The body itself.
    Root,
    /// A member of an object: `retry.max`.
    Member(&'p Path<'p>, &'p str),
    /// An element of an array: `events[1]`.
    Element(&'p Path<'p>, usize),
    /// An entry of a map: `labels[red]`.
    Entry(&'p Path<'p>, &'p str),
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => Ok(()),
            Self::Member(Self::Root, name) => f.write_str(name),
            Self::Member(outer, name) => write!(f, "{outer}.{name}"),
            Self::Element(outer, index) => write!(f, "{outer}[{index}]"),
            Self::Entry(outer, key) => write!(f, "{outer}[{key}]"),
        }
    }
}
