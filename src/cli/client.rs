//! The way from the command line to a running server.

use std::path::PathBuf;

use clap::Args;
use tonic::{
    Request, Status,
    metadata::AsciiMetadataValue,
    service::Interceptor,
    service::interceptor::InterceptedService,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use tonic_types::StatusExt;

use super::Error;
use crate::grpc::proto::delivery_service_client::DeliveryServiceClient;

/// Names, to the server, the organisation that a service key acts for.
const ORGANIZATION: &str = "x-shortkit-organization";

/// Where the server is and who asks.
#[derive(Args)]
pub(super) struct ClientArgs {
    /// Where the server is
    #[arg(long, env = "SHORTKIT_SERVER", value_name = "URL", default_value = "http://127.0.0.1:8080")]
    server: String,
    /// The API key, `sk_…` or `svc_…`
    #[arg(long, env = "SHORTKIT_KEY", value_name = "KEY", hide_env_values = true)]
    key: String,
    /// The organization to act for; only with a service key
    #[arg(long, env = "SHORTKIT_ORGANIZATION", value_name = "NAME")]
    organization: Option<String>,
    /// PEM file of the authority that the server is trusted by, instead of the system's
    #[arg(long, env = "SHORTKIT_CA", value_name = "FILE")]
    ca: Option<PathBuf>,
    /// PEM file of a client certificate to show, for a server with --tls-client-ca
    #[arg(long, env = "SHORTKIT_CLIENT_CERT", value_name = "FILE", requires = "client_key")]
    client_cert: Option<PathBuf>,
    /// PEM file of the client certificate's private key
    #[arg(long, env = "SHORTKIT_CLIENT_KEY", value_name = "FILE", requires = "client_cert")]
    client_key: Option<PathBuf>,
}

pub(super) type Client = DeliveryServiceClient<InterceptedService<Channel, Credentials>>;

/// Adds the key to every call.
#[derive(Clone)]
pub(super) struct Credentials {
    authorization: AsciiMetadataValue,
    organization: Option<AsciiMetadataValue>,
}

impl Interceptor for Credentials {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.authorization.clone());
        if let Some(organization) = &self.organization {
            request.metadata_mut().insert(ORGANIZATION, organization.clone());
        }
        Ok(request)
    }
}

impl ClientArgs {
    /// A client that connects with the first call, and again whenever it has to.
    pub(super) fn connect(&self) -> Result<Client, Error> {
        let refuse = |_| Error::Usage(format!("--server {}: not a URL such as http://127.0.0.1:8080", self.server));
        let mut endpoint = Endpoint::from_shared(self.server.clone()).map_err(refuse)?.tcp_nodelay(true);
        if self.server.starts_with("https:") {
            endpoint = endpoint.tls_config(self.tls()?).map_err(refuse)?;
        }
        let value = |name: &str, text: &str| {
            let mut value = AsciiMetadataValue::try_from(text)
                .map_err(|_| Error::Usage(format!("--{name} holds characters that it cannot hold")))?;
            value.set_sensitive(true);
            Ok::<_, Error>(value)
        };
        let credentials = Credentials {
            authorization: value("key", &format!("Bearer {}", self.key))?,
            organization: self.organization.as_deref().map(|name| value("organization", name)).transpose()?,
        };
        Ok(DeliveryServiceClient::with_interceptor(endpoint.connect_lazy(), credentials))
    }

    fn tls(&self) -> Result<ClientTlsConfig, Error> {
        let read =
            |path: &PathBuf| std::fs::read(path).map_err(|error| Error::Usage(format!("{}: {error}", path.display())));
        let trusting = match &self.ca {
            Some(path) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(path)?)),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        Ok(match (&self.client_cert, &self.client_key) {
            (Some(cert), Some(key)) => trusting.identity(Identity::from_pem(read(cert)?, read(key)?)),
            _ => trusting,
        })
    }

    /// What a failed call means for the person at the terminal.
    pub(super) fn explain(&self, status: &Status) -> String {
        match status.code() {
            // What the server itself says comes with details.
            tonic::Code::Unavailable if status.get_error_details().error_info().is_none() => {
                format!("{} does not answer ({}); is the server running there?", self.server, status.message())
            }
            tonic::Code::InvalidArgument if self.organization.is_none() && status.message().contains(ORGANIZATION) => {
                format!("{}; --organization NAME does that", status.message())
            }
            tonic::Code::Unauthenticated => format!("{}; `shortkit-webhooks keys create` makes one", status.message()),
            _ => status.message().to_owned(),
        }
    }
}
