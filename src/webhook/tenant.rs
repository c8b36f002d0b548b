//! Whose data it is.

use std::sync::Arc;

/// An organisation's name is at most this long; a longer one is refused.
pub const MAX_ORGANIZATION_BYTES: usize = 64;

/// Every row belongs to one organisation and one environment, and nothing crosses either. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Tenant {
    organization: Arc<str>,
    environment: Environment,
}

/// The two worlds of an organisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Environment {
    /// Production.
    Live,
    /// For trying things out.
    Test,
}

impl Tenant {
    /// The tenant of that name, when it is a name: 1 to 64 ASCII letters, digits, `_` and `-`.
    pub fn new(organization: &str, environment: Environment) -> Option<Self> {
        let named = !organization.is_empty()
            && organization.len() <= MAX_ORGANIZATION_BYTES
            && organization.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
        named.then(|| Self { organization: organization.into(), environment })
    }

    /// Name of the organisation.
    pub fn organization(&self) -> &str {
        &self.organization
    }

    /// The name, for whoever keeps it.
    pub fn shared_organization(&self) -> &Arc<str> {
        &self.organization
    }

    /// The environment.
    pub fn environment(&self) -> Environment {
        self.environment
    }
}

impl Environment {
    /// The word for it in keys, configuration and the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Test => "test",
        }
    }

    /// The environment that a word names.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Live, Self::Test].into_iter().find(|environment| environment.as_str() == word)
    }
}
