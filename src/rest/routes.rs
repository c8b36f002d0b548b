//! The tables that the annotations become.

use http::Method;
use prost_reflect::{
    Cardinality, DescriptorPool, DynamicMessage, ExtensionDescriptor, FieldDescriptor, Kind, MessageDescriptor,
    MethodDescriptor, Value,
};

use super::template::{Bound, Template};

/// Every route, in the order in which they are tried.
pub(super) struct Routes {
    routes: Vec<Route>,
}

/// One binding of one method.
pub(super) struct Route {
    pub(super) verb: Method,
    template: Template,
    /// `/package.Service/Method`.
    pub(super) grpc_path: String,
    pub(super) input: MessageDescriptor,
    pub(super) output: MessageDescriptor,
    pub(super) body: BodyRule,
    /// The field of the answer that becomes `data`.
    pub(super) response_body: Option<FieldDescriptor>,
    /// HTTP status of a success.
    pub(super) success: u16,
    pub(super) streaming: bool,
    /// The FieldMask that the keys of a partial body fill.
    pub(super) update_mask: Option<FieldDescriptor>,
    pub(super) rules: Rules,
}

/// Where the body of a request goes.
pub(super) enum BodyRule {
    /// There is none.
    None,
    /// It is the message.
    Whole,
    /// It is a field of it.
    Field(FieldDescriptor),
}

/// The options of `shortkit.rest.v1` on fields.
#[derive(Clone)]
pub(super) struct Rules {
    raw_json: ExtensionDescriptor,
    event_id: ExtensionDescriptor,
    last_event_id: ExtensionDescriptor,
    omit_empty: ExtensionDescriptor,
}

/// Why the annotations cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The descriptors cannot be read.
    #[error("the descriptors cannot be read: {0}")]
    Descriptors(#[from] prost_reflect::DescriptorError),
    /// An option's definition is missing from them.
    #[error("the descriptors do not define {0}")]
    Undefined(&'static str),
    /// A method's annotation is wrong.
    #[error("{method}: {fault}")]
    Method {
        /// Full name of the method.
        method: String,
        /// What is wrong.
        fault: String,
    },
}

/// What a request is for.
pub(super) enum Found<'r> {
    /// A method, with what the path says.
    Route(&'r Route, Bound<'r>),
    /// Nothing: these methods exist there, in alphabetical order.
    OtherMethods(Vec<&'r str>),
    /// A path whose escapes are broken.
    BadPath,
    /// No such path.
    Unknown,
}

impl Rules {
    pub(super) fn is_raw_json(&self, field: &FieldDescriptor) -> bool {
        flag(field, &self.raw_json)
    }

    pub(super) fn omits_empty(&self, field: &FieldDescriptor) -> bool {
        flag(field, &self.omit_empty)
    }

    pub(super) fn event_id(&self, message: &MessageDescriptor) -> Option<FieldDescriptor> {
        message.fields().find(|field| flag(field, &self.event_id))
    }

    pub(super) fn last_event_id(&self, message: &MessageDescriptor) -> Option<FieldDescriptor> {
        message.fields().find(|field| flag(field, &self.last_event_id))
    }
}

impl Routes {
    pub(super) fn read(descriptor_set: &[u8]) -> Result<Self, StartError> {
        let pool = DescriptorPool::decode(descriptor_set)?;
        let extension = |name| pool.get_extension_by_name(name).ok_or(StartError::Undefined(name));
        let http = extension("google.api.http")?;
        let status = extension("shortkit.rest.v1.http_status")?;
        let rules = Rules {
            raw_json: extension("shortkit.rest.v1.raw_json")?,
            event_id: extension("shortkit.rest.v1.event_id")?,
            last_event_id: extension("shortkit.rest.v1.last_event_id")?,
            omit_empty: extension("shortkit.rest.v1.omit_empty")?,
        };
        let mut routes: Vec<Route> = Vec::new();
        for method in pool.services().flat_map(|service| service.methods().collect::<Vec<_>>()) {
            let options = method.options();
            if !options.has_extension(&http) {
                continue;
            }
            let fail = |fault: String| StartError::Method { method: method.full_name().to_owned(), fault };
            let rule = options.get_extension(&http);
            let success = match options.get_extension(&status).as_i32() {
                Some(0) | None => 200,
                Some(status @ 200..=299) => u16::try_from(status).unwrap_or(200),
                Some(other) => return Err(fail(format!("http_status {other} is not from 200 to 299"))),
            };
            for rule in rule.as_message().into_iter().flat_map(bindings) {
                let route = Route::read(&method, &rule, success, &rules).map_err(fail)?;
                if let Some(twin) = routes.iter().find(|other| other.clashes(&route)) {
                    return Err(fail(format!("its route is that of {}", twin.grpc_path)));
                }
                routes.push(route);
            }
        }
        routes.sort_by_key(|route| route.template.rank());
        Ok(Self { routes })
    }

    /// What a method and a path are for; HEAD counts as GET.
    pub(super) fn find(&self, verb: &Method, path: &str) -> Found<'_> {
        let wanted = if *verb == Method::HEAD { &Method::GET } else { verb };
        // The most literal template decides what the path is, also for other methods than the one asked for.
        let mut others: Vec<&str> = Vec::new();
        for route in &self.routes {
            let Some(bound) = route.template.matches(path) else { continue };
            if route.verb == *wanted {
                return bound.map_or(Found::BadPath, |bound| Found::Route(route, bound));
            }
            others.push(route.verb.as_str());
        }
        if others.is_empty() {
            return Found::Unknown;
        }
        if others.contains(&"GET") {
            others.push("HEAD");
        }
        others.push("OPTIONS");
        others.sort_unstable();
        others.dedup();
        Found::OtherMethods(others)
    }
}

impl Routes {
    /// A route of the method, whichever binding it is: they share what an answer needs.
    pub(super) fn by_grpc_path(&self, grpc_path: &str) -> Option<&Route> {
        self.routes.iter().find(|route| route.grpc_path == grpc_path)
    }
}

impl Route {
    fn read(method: &MethodDescriptor, rule: &DynamicMessage, success: u16, rules: &Rules) -> Result<Self, String> {
        if method.is_client_streaming() {
            return Err("a client stream has no form in REST".to_owned());
        }
        let (verb, path) = pattern(rule)?;
        let template = Template::parse(&path).map_err(|error| format!("{path}: {error}"))?;
        let input = method.input();
        for name in template.fields() {
            let field = field(&input, name).ok_or_else(|| format!("{path}: no field {name}"))?;
            if field.is_list() || field.is_map() || field.kind().as_message().is_some() {
                return Err(format!("{path}: {name} is not a single scalar"));
            }
        }
        let named = |key: &str, message: &MessageDescriptor| match text(rule, key).as_str() {
            "" => Ok(None),
            name => message.get_field_by_name(name).map(Some).ok_or_else(|| format!("{key}: no field {name}")),
        };
        let body = match text(rule, "body").as_str() {
            "" => BodyRule::None,
            "*" => BodyRule::Whole,
            _ => named("body", &input)?.map_or(BodyRule::None, BodyRule::Field),
        };
        let mask = |field: &FieldDescriptor| match field.kind() {
            Kind::Message(message) => message.full_name() == "google.protobuf.FieldMask",
            _ => false,
        };
        let update_mask = match (&verb, &body) {
            (&Method::PATCH, BodyRule::Field(_)) => input.get_field_by_name("update_mask").filter(mask),
            _ => None,
        };
        Ok(Self {
            verb,
            template,
            grpc_path: format!("/{}/{}", method.parent_service().full_name(), method.name()),
            output: method.output(),
            response_body: named("response_body", &method.output())?,
            input,
            body,
            success,
            streaming: method.is_server_streaming(),
            update_mask,
            rules: rules.clone(),
        })
    }

    /// Whether the path fills a field, by its proto path.
    pub(super) fn binds(&self, name: &str) -> bool {
        self.template.fields().any(|field| field == name)
    }

    fn clashes(&self, other: &Self) -> bool {
        self.verb == other.verb && self.template.same_paths(&other.template)
    }
}

/// The field that a path of proto names leads to.
pub(super) fn field(message: &MessageDescriptor, path: &str) -> Option<FieldDescriptor> {
    let (first, rest) = path.split_once('.').map_or((path, None), |(first, rest)| (first, Some(rest)));
    let field = message.get_field_by_name(first)?;
    match rest {
        None => Some(field),
        Some(rest) if field.cardinality() != Cardinality::Repeated => self::field(field.kind().as_message()?, rest),
        Some(_) => None,
    }
}

fn flag(field: &FieldDescriptor, extension: &ExtensionDescriptor) -> bool {
    field.options().get_extension(extension).as_bool() == Some(true)
}

/// A rule and its `additional_bindings`, which have none of their own.
fn bindings(rule: &DynamicMessage) -> Vec<DynamicMessage> {
    let mut rules = vec![rule.clone()];
    if let Some(more) = rule.get_field_by_name("additional_bindings") {
        rules.extend(more.as_list().unwrap_or_default().iter().filter_map(Value::as_message).cloned());
    }
    rules
}

fn pattern(rule: &DynamicMessage) -> Result<(Method, String), String> {
    for (key, verb) in [
        ("get", Method::GET),
        ("put", Method::PUT),
        ("post", Method::POST),
        ("delete", Method::DELETE),
        ("patch", Method::PATCH),
    ] {
        let path = text(rule, key);
        if !path.is_empty() {
            return Ok((verb, path));
        }
    }
    let custom = rule.get_field_by_name("custom");
    let custom = custom.as_ref().and_then(|custom| custom.as_message()).ok_or("the annotation names no path")?;
    let verb = Method::from_bytes(text(custom, "kind").as_bytes()).map_err(|_| "custom.kind is no HTTP method")?;
    Ok((verb, text(custom, "path")))
}

fn text(message: &DynamicMessage, field: &str) -> String {
    message.get_field_by_name(field).and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}
