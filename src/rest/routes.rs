//! The tables that the annotations become.

use std::sync::Arc;

use http::{Method, Uri};
use prost_reflect::{DescriptorPool, DynamicMessage, ExtensionDescriptor, MessageDescriptor, MethodDescriptor, Value};

use super::{
    tables::{FieldPath, Kind, Message, Shape, Tables},
    template::{Bound, Template},
};

/// Every route, in the order in which they are tried.
pub(super) struct Routes {
    routes: Vec<Arc<Route>>,
}

/// One binding of one method.
pub(super) struct Route {
    pub(super) verb: Method,
    template: Template,
    /// The fields that the variables of the template fill, in their order.
    pub(super) variables: Vec<FieldPath>,
    /// `/package.Service/Method`.
    pub(super) uri: Uri,
    pub(super) tables: Arc<Tables>,
    pub(super) input: usize,
    pub(super) output: usize,
    pub(super) body: BodyRule,
    /// The field of the answer that becomes `data`.
    pub(super) response_body: Option<usize>,
    /// HTTP status of a success.
    pub(super) success: u16,
    pub(super) streaming: bool,
    /// The FieldMask that the keys of a partial body fill.
    pub(super) update_mask: Option<usize>,
}

/// Where the body of a request goes.
pub(super) enum BodyRule {
    /// There is none.
    None,
    /// It is the message.
    Whole,
    /// It is a field of it, a message.
    Field {
        /// The index of the field.
        field: usize,
        /// The index of the field's message.
        message: usize,
    },
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
    /// A field is of a form or has an option that JSON cannot follow.
    #[error("{field}: {fault}")]
    Field {
        /// Full name of the field.
        field: String,
        /// What is wrong.
        fault: String,
    },
}

/// What a request is for.
pub(super) enum Found<'r> {
    /// A method, with what the path says.
    Route(&'r Arc<Route>, Bound<'r>),
    /// Nothing: these methods exist there, in alphabetical order.
    OtherMethods(Vec<&'r str>),
    /// A path whose escapes are broken.
    BadPath,
    /// No such path.
    Unknown,
}

impl Routes {
    pub(super) fn read(descriptor_set: &[u8]) -> Result<Self, StartError> {
        let pool = DescriptorPool::decode(descriptor_set)?;
        let extension = |name| pool.get_extension_by_name(name).ok_or(StartError::Undefined(name));
        let http = extension("google.api.http")?;
        let status = extension("shortkit.rest.v1.http_status")?;
        let methods = pool.services().flat_map(|service| service.methods().collect::<Vec<_>>());
        let methods: Vec<_> = methods.filter(|method| method.options().has_extension(&http)).collect();
        let messages = methods.iter().flat_map(|method| [method.input(), method.output()]);
        let tables = Arc::new(Tables::read(&pool, messages)?);
        let mut routes: Vec<Arc<Route>> = Vec::new();
        for method in methods {
            let fail = |fault: String| StartError::Method { method: method.full_name().to_owned(), fault };
            let success = success(&method, &status).map_err(fail)?;
            let rule = method.options().get_extension(&http).into_owned();
            for rule in rule.as_message().into_iter().flat_map(bindings) {
                let route = Route::read(&method, &rule, success, &tables).map_err(fail)?;
                if let Some(twin) = routes.iter().find(|other| other.clashes(&route)) {
                    return Err(fail(format!("its route is that of {}", twin.uri)));
                }
                routes.push(Arc::new(route));
            }
        }
        routes.sort_by_key(|route| route.template.rank());
        Ok(Self { routes })
    }

    /// The gRPC paths of all calls with this method.
    pub(super) fn calls(&self, verb: &Method) -> impl Iterator<Item = &str> {
        self.routes.iter().filter(move |route| route.verb == *verb).map(|route| route.uri.path())
    }

    /// What a method and a path are for; HEAD counts as GET.
    pub(super) fn find(&self, verb: &Method, path: &str) -> Found<'_> {
        let wanted = if *verb == Method::HEAD { &Method::GET } else { verb };
        // The most literal template decides what the path is, also for other methods than the one asked for.
        let mut others: Vec<&str> = Vec::new();
        let segments: Vec<&str> = path.strip_prefix('/').unwrap_or_default().split('/').collect();
        for route in &self.routes {
            let Some(bound) = route.template.matches(&segments) else { continue };
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

impl Route {
    fn read(
        method: &MethodDescriptor,
        rule: &DynamicMessage,
        success: u16,
        tables: &Arc<Tables>,
    ) -> Result<Self, String> {
        if method.is_client_streaming() {
            return Err("a client stream has no form in REST".to_owned());
        }
        let (verb, path) = pattern(rule)?;
        let template = Template::parse(&path).map_err(|error| format!("{path}: {error}"))?;
        let index = |message: MessageDescriptor| {
            tables.index(message.full_name()).ok_or_else(|| format!("no message {}", message.full_name()))
        };
        let (input, output) = (index(method.input())?, index(method.output())?);
        let variables =
            template.fields().map(|name| variable(tables, input, name).map_err(|why| format!("{path}: {why}")));
        let variables = variables.collect::<Result<Vec<_>, _>>()?;
        let input_table = tables.message(input);
        let body = match text(rule, "body").as_str() {
            "" => BodyRule::None,
            "*" => BodyRule::Whole,
            name => {
                let field = named(input_table, name).ok_or_else(|| format!("body: no field {name}"))?;
                match (&input_table.fields[field].kind, &input_table.fields[field].shape) {
                    (Kind::Message(message), Shape::Single) => BodyRule::Field { field, message: *message },
                    _ => return Err(format!("body: {name} is not a single message")),
                }
            }
        };
        let response_body = match text(rule, "response_body").as_str() {
            "" => None,
            name => {
                let field = named(tables.message(output), name);
                Some(field.ok_or_else(|| format!("response_body: no field {name}"))?)
            }
        };
        let is_mask = |field: &usize| match input_table.fields[*field].kind {
            Kind::Message(message) => tables.message(message).full_name == "google.protobuf.FieldMask",
            _ => false,
        };
        let update_mask = match (&verb, &body) {
            (&Method::PATCH, BodyRule::Field { .. }) => named(input_table, "update_mask").filter(is_mask),
            _ => None,
        };
        let grpc_path = format!("/{}/{}", method.parent_service().full_name(), method.name());
        Ok(Self {
            verb,
            template,
            variables,
            uri: Uri::try_from(grpc_path).map_err(|error| error.to_string())?,
            tables: Arc::clone(tables),
            input,
            output,
            body,
            response_body,
            success,
            streaming: method.is_server_streaming(),
            update_mask,
        })
    }

    /// Whether the path fills a field, by its proto path.
    pub(super) fn binds(&self, name: &str) -> bool {
        self.template.fields().any(|field| field == name)
    }

    /// Whether the request has a field of this proto name.
    pub(super) fn has_field(&self, name: &str) -> bool {
        named(self.tables.message(self.input), name).is_some()
    }

    fn clashes(&self, other: &Self) -> bool {
        self.verb == other.verb && self.template.same_paths(&other.template)
    }
}

/// The field that a variable of a template fills.
fn variable(tables: &Tables, input: usize, name: &str) -> Result<FieldPath, String> {
    let path = tables.path(input, name).filter(|path| tables.proto_name(input, path) == name);
    let path = path.ok_or_else(|| format!("no field {name}"))?;
    match tables.last(input, &path) {
        Some(field) if matches!(field.shape, Shape::Single) && !matches!(field.kind, Kind::Message(_) | Kind::Time) => {
            Ok(path)
        }
        _ => Err(format!("{name} is not a single scalar")),
    }
}

/// The index of the field of this proto name; an annotation knows no other.
fn named(message: &Message, name: &str) -> Option<usize> {
    message.fields.iter().position(|field| field.name == name)
}

fn success(method: &MethodDescriptor, option: &ExtensionDescriptor) -> Result<u16, String> {
    match method.options().get_extension(option).as_i32() {
        Some(0) | None => Ok(200),
        Some(status @ 200..=299) => Ok(u16::try_from(status).unwrap_or(200)),
        Some(other) => Err(format!("http_status {other} is not from 200 to 299")),
    }
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
    let custom = custom.as_ref().and_then(|custom| custom.as_message());
    let custom = custom.filter(|custom| !text(custom, "path").is_empty()).ok_or("the annotation names no path")?;
    let verb = Method::from_bytes(text(custom, "kind").as_bytes()).map_err(|_| "custom.kind is no HTTP method")?;
    Ok((verb, text(custom, "path")))
}

fn text(message: &DynamicMessage, field: &str) -> String {
    message.get_field_by_name(field).and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}
