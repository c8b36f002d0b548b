//! Path templates, as `google/api/http.proto` defines them.

use std::fmt;

/// A parsed template such as `/v1/webhooks/{id}:verb`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Template {
    parts: Vec<Part>,
    variables: Vec<Variable>,
    verb: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Literal(String),
    /// `*`: one segment.
    One,
    /// `**`: the rest, also nothing.
    Rest,
}

/// A field that parts of the path fill.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Variable {
    field: String,
    /// The parts it spans.
    first: usize,
    end: usize,
}

/// Why a template is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TemplateError(&'static str);

/// Why a path that fits cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BadEscape;

/// What the variables of a template took from a path: field and value.
pub(super) type Bound<'t> = Vec<(&'t str, String)>;

impl fmt::Display for TemplateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl Template {
    pub(super) fn parse(text: &str) -> Result<Self, TemplateError> {
        let path = text.strip_prefix('/').ok_or(TemplateError("a path starts with /"))?;
        // A verb follows the last segment; a colon inside braces would be part of no valid name.
        let (path, verb) = match path.rsplit_once(':') {
            Some((path, verb)) if !verb.contains(['/', '}']) => (path, Some(verb.to_owned())),
            _ => (path, None),
        };
        let mut template = Self { parts: Vec::new(), variables: Vec::new(), verb };
        let mut rest = path;
        loop {
            rest = template.segment(rest)?;
            match rest.strip_prefix('/') {
                Some(next) => rest = next,
                None if rest.is_empty() => break,
                None => return Err(TemplateError("segments are separated by /")),
            }
        }
        let rests = template.parts.iter().position(|part| *part == Part::Rest);
        if rests.is_some_and(|at| at + 1 != template.parts.len()) {
            return Err(TemplateError("** stands last"));
        }
        for (index, variable) in template.variables.iter().enumerate() {
            if template.variables[..index].iter().any(|earlier| earlier.field == variable.field) {
                return Err(TemplateError("a variable stands twice"));
            }
        }
        Ok(template)
    }

    /// Reads one segment and answers with what follows it.
    fn segment<'a>(&mut self, text: &'a str) -> Result<&'a str, TemplateError> {
        let Some(inside) = text.strip_prefix('{') else {
            let end = text.find('/').unwrap_or(text.len());
            self.parts.push(part(&text[..end])?);
            return Ok(&text[end..]);
        };
        let (inside, rest) = inside.split_once('}').ok_or(TemplateError("a { is not closed"))?;
        let (field, pattern) = inside.split_once('=').unwrap_or((inside, "*"));
        if field.is_empty() || field.split('.').any(str::is_empty) {
            return Err(TemplateError("a variable has a name"));
        }
        let first = self.parts.len();
        for segment in pattern.split('/') {
            self.parts.push(part(segment)?);
        }
        self.variables.push(Variable { field: field.to_owned(), first, end: self.parts.len() });
        Ok(rest)
    }

    /// The fields that the path fills.
    pub(super) fn fields(&self) -> impl Iterator<Item = &str> {
        self.variables.iter().map(|variable| variable.field.as_str())
    }

    /// Whether two templates take exactly the same paths.
    pub(super) fn same_paths(&self, other: &Self) -> bool {
        self.parts == other.parts && self.verb == other.verb
    }

    /// Sorts templates so that the first that fits is the right one: literals before variables, from the left.
    pub(super) fn rank(&self) -> (Vec<u8>, bool) {
        let rank = |part: &Part| match part {
            Part::Literal(_) => 0,
            Part::One => 1,
            Part::Rest => 2,
        };
        (self.parts.iter().map(rank).collect(), self.verb.is_none())
    }

    /// What the variables are in a path of these segments, escapes undone; none when it is not of this template.
    pub(super) fn matches(&self, segments: &[&str]) -> Option<Result<Bound<'_>, BadEscape>> {
        let open_end = self.parts.last() == Some(&Part::Rest);
        let fixed = self.parts.len() - usize::from(open_end);
        if segments.len() < fixed || (!open_end && segments.len() > fixed) {
            return None;
        }
        let Some(verb) = &self.verb else { return self.bind(segments, fixed) };
        let (last, before) = segments.split_last()?;
        let last = last.strip_suffix(verb.as_str())?.strip_suffix(':')?;
        let segments: Vec<&str> = before.iter().copied().chain([last]).collect();
        self.bind(&segments, fixed)
    }

    fn bind(&self, segments: &[&str], fixed: usize) -> Option<Result<Bound<'_>, BadEscape>> {
        let fits = self.parts[..fixed].iter().zip(segments).all(|(part, segment)| match part {
            Part::Literal(literal) if segment.contains('%') => {
                unescape(segment, false).is_ok_and(|segment| segment == *literal)
            }
            Part::Literal(literal) => segment == literal,
            _ => !segment.is_empty(),
        });
        if !fits {
            return None;
        }
        Some(self.variables.iter().map(|variable| bind(variable, segments, self.parts.len())).collect())
    }
}

fn bind<'t>(variable: &'t Variable, segments: &[&str], parts: usize) -> Result<(&'t str, String), BadEscape> {
    // Only a variable that ends with the template can end with `**`, which takes all that is left.
    let end = if variable.end == parts { segments.len() } else { variable.end };
    let taken = segments.get(variable.first..end).unwrap_or_default();
    // In several segments an escaped slash stays one, or it could not be told from a separator.
    let several = variable.end - variable.first > 1 || taken.len() > 1;
    let values: Result<Vec<String>, BadEscape> = taken.iter().map(|segment| unescape(segment, several)).collect();
    Ok((variable.field.as_str(), values?.join("/")))
}

fn part(segment: &str) -> Result<Part, TemplateError> {
    match segment {
        "" => Err(TemplateError("a segment is not empty")),
        "*" => Ok(Part::One),
        "**" => Ok(Part::Rest),
        _ if segment.contains(['*', '{', '}']) => Err(TemplateError("* and braces stand alone")),
        _ => Ok(Part::Literal(segment.to_owned())),
    }
}

/// Undoes `%41`; with `keep_slash`, `%2F` stays as it is. A `+` is a plus in a path.
pub(super) fn unescape(text: &str, keep_slash: bool) -> Result<String, BadEscape> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [byte, tail @ ..] = rest {
        rest = tail;
        if *byte != b'%' {
            bytes.push(*byte);
            continue;
        }
        let digits = tail.get(..2).and_then(|digits| std::str::from_utf8(digits).ok()).ok_or(BadEscape)?;
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(BadEscape);
        }
        let value = u8::from_str_radix(digits, 16).map_err(|_| BadEscape)?;
        match value {
            b'/' if keep_slash => bytes.extend_from_slice(&[b'%', tail[0], tail[1]]),
            _ => bytes.push(value),
        }
        rest = &tail[2..];
    }
    String::from_utf8(bytes).map_err(|_| BadEscape)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments(path: &str) -> Option<Vec<&str>> {
        Some(path.strip_prefix('/')?.split('/').collect())
    }

    fn matched(template: &str, path: &str) -> Option<Vec<(String, String)>> {
        let template = Template::parse(template).unwrap();
        let bound = template.matches(&segments(path)?)?.unwrap();
        Some(bound.into_iter().map(|(field, value)| (field.to_owned(), value)).collect())
    }

    fn one(field: &str, value: &str) -> Option<Vec<(String, String)>> {
        Some(vec![(field.to_owned(), value.to_owned())])
    }

    #[test]
    fn variables_take_segments() {
        assert_eq!(matched("/v1/things/{id}", "/v1/things/a"), one("id", "a"));
        assert_eq!(matched("/v1/{a.b}/x", "/v1/q/x"), one("a.b", "q"));
        assert_eq!(matched("/v1/{name=things/*}", "/v1/things/7"), one("name", "things/7"));
        assert_eq!(matched("/v1/{name=things/*}", "/v1/others/7"), None);
        assert_eq!(matched("/v1/{name=**}", "/v1/a/b/c"), one("name", "a/b/c"));
        assert_eq!(matched("/v1/things/{id}:cancel", "/v1/things/a:cancel"), one("id", "a"));
        assert_eq!(matched("/v1/things/{id}:cancel", "/v1/things/a"), None);
        assert_eq!(matched("/v1/things", "/v1/things"), Some(vec![]));
    }

    #[test]
    fn empty_segments_and_trailing_slashes_do_not_fit() {
        for path in ["/v1/things/", "/v1//things", "/v1/things/a/", "v1/things/a", "/v1/things"] {
            assert_eq!(matched("/v1/things/{id}", path), None, "{path}");
        }
    }

    #[test]
    fn escapes_are_undone() {
        assert_eq!(matched("/v1/{id}", "/v1/a%2Fb+c%20d"), one("id", "a/b+c d"));
        assert_eq!(matched("/v1/{id=**}", "/v1/a%2Fb/c%41"), one("id", "a%2Fb/cA"));
        let template = Template::parse("/v1/{id}").unwrap();
        for path in ["/v1/%zz", "/v1/%", "/v1/%f", "/v1/%ff", "/v1/%+1"] {
            assert_eq!(template.matches(&segments(path).unwrap()), Some(Err(BadEscape)), "{path}");
        }
    }

    #[test]
    fn refuses_what_is_no_template() {
        for text in
            ["v1", "/v1/{id", "/v1/{}", "/v1/{a..b}", "/v1//x", "/v1/**/x", "/{a}/{a}", "/v1/x*", "/v1/{a}b", "/"]
        {
            assert!(Template::parse(text).is_err(), "{text}");
        }
    }
}
