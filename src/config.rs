//! File, environment and flags become a [`Config`]. The only reader of the environment.

mod settings;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use ipnet::IpNet;

pub use self::settings::read_master_keys;
use self::settings::{Settings, address, backlog, boolean, certificates, count, duration, environment, list, range};
use crate::{
    listen::{Limits, Tls},
    vault::Vault,
    webhook::{Environment, EventTypes, RateLimit, Retention, RetrySchedule},
};

/// A request may take at most this long; a longer setting is refused, since a lease lasts as long.
const MAX_REQUEST_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// And a node that is told to stop goes on for at most this long.
const MAX_SHUTDOWN_DELAY: Duration = Duration::from_secs(10 * 60);

/// With fewer connections to the database, there would be none for tenants beside those of the engine.
const MIN_DATABASE_CONNECTIONS: u32 = 8;

/// Everything that `serve` needs to know, valid.
#[derive(Debug, Clone)]
pub struct Config {
    /// Address to serve on; port 0 picks a free one.
    pub listen: SocketAddr,
    /// `sqlite://…` or `postgres://…`.
    pub database_url: String,
    /// What to log, in the words of `tracing_subscriber`'s `EnvFilter`.
    pub log: String,
    /// What seals signing secrets; none only in development mode, where `serve` makes a key when none is given.
    pub vault: Option<Vault>,
    /// The file that it came from, if it was one.
    pub master_key_file: Option<PathBuf>,
    /// Ranges where requests may go beside public addresses.
    pub egress_allow: Vec<IpNet>,
    /// PEM files of certificate authorities that receivers are trusted by, beside the system's.
    pub egress_ca: Vec<Vec<u8>>,
    /// Whether webhooks may have `http` URLs.
    pub allow_http: bool,
    /// Whether loopback receivers are allowed; only `--dev` says so.
    pub allow_loopback: bool,
    /// When failed attempts are made again.
    pub retry_schedule: RetrySchedule,
    /// The event types that exist.
    pub event_types: EventTypes,
    /// How long one attempt may take, from the look-up of the name to the last byte of the answer.
    pub request_timeout: Duration,
    /// How fast each organisation may call, in each of its environments.
    pub rate_limit: Option<RateLimit>,
    /// The environments whose keys this server accepts.
    pub environments: Vec<Environment>,
    /// Attempts under way to one webhook at a time.
    pub max_in_flight_per_webhook: usize,
    /// Connections to the database.
    pub database_connections: u32,
    /// Webhooks that an organisation may have in each of its environments.
    pub max_webhooks: u64,
    /// Deliveries that may be pending before publishing is refused.
    pub max_backlog: u64,
    /// The same for one organisation.
    pub max_backlog_per_organization: u64,
    /// How long what is finished is kept.
    pub retention: Retention,
    /// How long shutting down may take before what is under way is cut off.
    pub shutdown_grace: Duration,
    /// How long a node that is told to stop goes on, and only says that it is not ready.
    pub shutdown_delay: Duration,
    /// Whether gRPC reflection is served, which needs no key.
    pub reflection: bool,
    /// Whether health is told, which needs no key.
    pub health: bool,
    /// Address for those who run the service: metrics, and reflection and health, which then are nowhere else.
    pub internal_listen: Option<SocketAddr>,
    /// What connections may take; `--max-connections` is one of them.
    pub limits: Limits,
    /// The certificate to serve with; none for cleartext.
    pub tls: Option<Tls>,
}

/// What every command that opens the database has to know.
#[derive(Debug, Clone)]
pub struct DatabaseConfig {
    /// `sqlite://…` or `postgres://…`.
    pub database_url: String,
    /// What to log.
    pub log: String,
}

/// Settings of every command that opens the database, as given.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct DatabaseArgs {
    /// TOML file of settings, whose keys are the names of the flags; flags and environment win over it
    #[arg(long, env = "SHORTKIT_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// `sqlite://FILE?mode=rwc`, or `postgres://USER:PASSWORD@HOST/NAME` for several nodes on one database [default: sqlite://shortkit.db?mode=rwc]
    #[arg(long, env = "SHORTKIT_DATABASE_URL", value_name = "URL", hide_env_values = true)]
    database_url: Option<String>,
    /// What to log: error, warn, info, debug, trace, or a filter such as `info,sqlx=warn` [default: info]
    #[arg(long, env = "SHORTKIT_LOG", value_name = "LEVEL")]
    log: Option<String>,
}

/// The master keys, as given.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct MasterKeyArgs {
    /// File of the master keys that encrypt signing secrets: base64 of 32 random bytes each, one a line, as `openssl rand -base64 32` makes them. The first encrypts, the others still decrypt while one replaces another. SHORTKIT_MASTER_KEY may hold the keys themselves instead [default: none]
    #[arg(long, env = "SHORTKIT_MASTER_KEY_FILE", value_name = "FILE")]
    master_key_file: Option<String>,
}

/// Settings of `serve`, as given.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ServeArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    #[command(flatten)]
    master_key: MasterKeyArgs,
    /// Nothing to prepare: loopback and `http` receivers allowed, keys made once and printed with lines to try
    #[arg(long)]
    dev: bool,
    /// Address to serve on; port 0 picks a free one [default: 127.0.0.1:8080]
    #[arg(long, env = "SHORTKIT_LISTEN", value_name = "ADDRESS")]
    listen: Option<String>,
    /// CIDR ranges, comma-separated, where requests may go beside public addresses [default: none]
    #[arg(long, env = "SHORTKIT_EGRESS_ALLOW", value_name = "RANGES")]
    egress_allow: Option<String>,
    /// PEM files, comma-separated, of authorities that receivers are trusted by beside the system's [default: none]
    #[arg(long, env = "SHORTKIT_EGRESS_CA", value_name = "FILES")]
    egress_ca: Option<String>,
    /// Whether webhooks may have `http` URLs [default: false, with --dev true]
    #[arg(long, env = "SHORTKIT_ALLOW_HTTP", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    allow_http: Option<String>,
    /// Waits before each attempt, the first one's included; at most 50, each at most 24h [default: 0s,1m,5m,30m,2h,24h]
    #[arg(long, env = "SHORTKIT_RETRY_SCHEDULE", value_name = "WAITS")]
    retry_schedule: Option<String>,
    /// The event types that exist, comma-separated [default: content.ready,content.errored,export.ready]
    #[arg(long, env = "SHORTKIT_EVENT_TYPES", value_name = "TYPES")]
    event_types: Option<String>,
    /// How long one attempt may take; 1s to 5m [default: 30s]
    #[arg(long, env = "SHORTKIT_REQUEST_TIMEOUT", value_name = "DURATION")]
    request_timeout: Option<String>,
    /// Calls that each organisation may make, in each environment and on each node, such as 1000/min, 20/s or 5000/h; off for none [default: 1000/min]
    #[arg(long, env = "SHORTKIT_RATE_LIMIT", value_name = "RATE")]
    rate_limit: Option<String>,
    /// The environments whose keys are accepted: live, test or both [default: live,test]
    #[arg(long, env = "SHORTKIT_ENVIRONMENTS", value_name = "NAMES")]
    environments: Option<String>,
    /// Attempts under way to one webhook at a time; 1 to 1024 [default: 32]
    #[arg(long, env = "SHORTKIT_MAX_IN_FLIGHT", value_name = "COUNT")]
    max_in_flight: Option<String>,
    /// Connections to the database; all nodes together need fewer than PostgreSQL's max_connections, less 3. 8 to 1000 [default: 16]
    #[arg(long, env = "SHORTKIT_DATABASE_CONNECTIONS", value_name = "COUNT")]
    database_connections: Option<String>,
    /// Webhooks that each organization may have, in each environment; with as many, another is answered 409. An event for all of them is one commit while nobody else publishes; 1 to 1000000 [default: 1000]
    #[arg(long, env = "SHORTKIT_MAX_WEBHOOKS", value_name = "COUNT")]
    max_webhooks: Option<String>,
    /// Deliveries that may be pending in all; while there are as many, publishing is answered 503 [default: 10000000]
    #[arg(long, env = "SHORTKIT_MAX_BACKLOG", value_name = "COUNT")]
    max_backlog: Option<String>,
    /// Deliveries of one organization that may be pending, fewer when little is free for others; while there are as many, its publishing is answered 429 [default: 1000000]
    #[arg(long, env = "SHORTKIT_MAX_BACKLOG_PER_ORGANIZATION", value_name = "COUNT")]
    max_backlog_per_organization: Option<String>,
    /// How long deliveries are kept after their last attempt began, with everything that belongs to them; at least 1h [default: forever]
    #[arg(long, env = "SHORTKIT_RETAIN", value_name = "DURATION")]
    retain: Option<String>,
    /// How long what was sent is kept after the last attempt of its last delivery began; at least 1h, and no longer than --retain [default: forever]
    #[arg(long, env = "SHORTKIT_RETAIN_PAYLOADS", value_name = "DURATION")]
    retain_payloads: Option<String>,
    /// How long the log of a delivery's attempts, with what was answered, is kept after the last one began; at least 1h, and no longer than --retain [default: forever]
    #[arg(long, env = "SHORTKIT_RETAIN_ATTEMPTS", value_name = "DURATION")]
    retain_attempts: Option<String>,
    /// How long shutting down may take before what is under way is cut off, and may be sent again; at most 1h [default: request-timeout + 5s]
    #[arg(long, env = "SHORTKIT_SHUTDOWN_GRACE", value_name = "DURATION")]
    shutdown_grace: Option<String>,
    /// How long a node that is told to stop serves on and only says that it is not ready, for balancers that go by that; at most 10m [default: 0s]
    #[arg(long, env = "SHORTKIT_SHUTDOWN_DELAY", value_name = "DURATION")]
    shutdown_delay: Option<String>,
    /// Whether gRPC reflection is served, which needs no key [default: true]
    #[arg(long, env = "SHORTKIT_REFLECTION", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    reflection: Option<String>,
    /// Whether health is told, which needs no key: by the gRPC health service, and at /livez and /readyz [default: true]
    #[arg(long, env = "SHORTKIT_HEALTH", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    health: Option<String>,
    /// Address of a port in cleartext for those who run the service: metrics, and health and reflection, which then are not where tenants call; must not be open to others. Port 0 picks a free one, which the second line on standard output says [default: none]
    #[arg(long, env = "SHORTKIT_INTERNAL_LISTEN", value_name = "ADDRESS")]
    internal_listen: Option<String>,
    /// Connections at a time, at most half of them from one address; 1 to 1000000 [default: 4096]
    #[arg(long, env = "SHORTKIT_MAX_CONNECTIONS", value_name = "COUNT")]
    max_connections: Option<String>,
    /// PEM file of the certificate to serve with, followed by those between it and its authority; read again when it changes [default: none]
    #[arg(long, env = "SHORTKIT_TLS_CERT", value_name = "FILE")]
    tls_cert: Option<String>,
    /// PEM file of the certificate's private key [default: none]
    #[arg(long, env = "SHORTKIT_TLS_KEY", value_name = "FILE")]
    tls_key: Option<String>,
    /// PEM file of authorities whose client certificates are taken; service keys then need one [default: none]
    #[arg(long, env = "SHORTKIT_TLS_CLIENT_CA", value_name = "FILE")]
    tls_client_ca: Option<String>,
}

/// Everything that is wrong with the configuration.
#[derive(Debug, thiserror::Error)]
#[error("the configuration is not valid:\n  {}", .0.join("\n  "))]
pub struct Invalid(pub Vec<String>);

/// What `keys rotate-master` has to know.
#[derive(Debug, Clone)]
pub struct MasterKeyConfig {
    /// The database.
    pub database: DatabaseConfig,
    /// What seals signing secrets from now on, and opens those of before.
    pub vault: Vault,
}

impl MasterKeyArgs {
    /// The configuration that these settings, those of the database, the file they name and the defaults make.
    pub fn load(self, database: DatabaseArgs) -> Result<MasterKeyConfig, Invalid> {
        let mut settings = Settings::open(database.config.as_deref());
        let database = settings.database(database);
        let (vault, _) = settings.master_keys(self, true);
        let faults = settings.faults;
        vault.filter(|_| faults.is_empty()).map(|vault| MasterKeyConfig { database, vault }).ok_or(Invalid(faults))
    }
}

impl DatabaseArgs {
    /// The configuration that these settings, the file they name and the defaults make.
    pub fn load(self) -> Result<DatabaseConfig, Invalid> {
        let mut settings = Settings::open(self.config.as_deref());
        let database = settings.database(self);
        settings.finish(database)
    }
}

impl ServeArgs {
    /// Those of `serve --dev`.
    pub fn development() -> Self {
        Self { dev: true, ..Self::default() }
    }

    /// Whether this is for trying things out.
    pub fn dev(&self) -> bool {
        self.dev
    }

    /// The configuration that these settings, the file they name and the defaults make.
    pub fn load(self) -> Result<Config, Invalid> {
        let mut settings = Settings::open(self.database.config.as_deref());
        let DatabaseConfig { database_url, log } = settings.database(self.database);
        let (vault, master_key_file) = settings.master_keys(self.master_key, !self.dev);
        let request_timeout = settings.read("request-timeout", self.request_timeout, |text| {
            duration(text, Duration::from_secs(1), MAX_REQUEST_TIMEOUT)
        });
        let config = Config {
            database_url,
            log,
            vault,
            master_key_file,
            listen: settings.read("listen", self.listen, address),
            egress_allow: settings.read("egress-allow", self.egress_allow, |text| list(text, range)),
            egress_ca: settings.read("egress-ca", self.egress_ca, |text| list(text, certificates)),
            allow_http: settings.read("allow-http", self.allow_http, boolean) || self.dev,
            allow_loopback: self.dev,
            retry_schedule: settings.read("retry-schedule", self.retry_schedule, RetrySchedule::parse),
            event_types: settings.read("event-types", self.event_types, EventTypes::parse),
            request_timeout,
            rate_limit: settings.read("rate-limit", self.rate_limit, |text| match text {
                "off" => Ok(None),
                rate => RateLimit::parse(rate).map(Some),
            }),
            environments: settings.read("environments", self.environments, |text| match list(text, environment)? {
                none if none.is_empty() => Err("must name live, test or both".to_owned()),
                some => Ok(some),
            }),
            max_in_flight_per_webhook: settings.read("max-in-flight", self.max_in_flight, |text| count(text, 1..=1024)),
            database_connections: settings.read("database-connections", self.database_connections, |text| {
                count(text, MIN_DATABASE_CONNECTIONS..=1000)
            }),
            max_webhooks: settings.read("max-webhooks", self.max_webhooks, |text| count(text, 1..=1_000_000)),
            max_backlog: settings.read("max-backlog", self.max_backlog, backlog),
            max_backlog_per_organization: settings.read(
                "max-backlog-per-organization",
                self.max_backlog_per_organization,
                backlog,
            ),
            retention: settings.retention(self.retain, self.retain_payloads, self.retain_attempts),
            shutdown_grace: settings.shutdown_grace(self.shutdown_grace, request_timeout),
            shutdown_delay: settings
                .read("shutdown-delay", self.shutdown_delay, |text| duration(text, Duration::ZERO, MAX_SHUTDOWN_DELAY)),
            reflection: settings.read("reflection", self.reflection, boolean),
            health: settings.read("health", self.health, boolean),
            internal_listen: settings.read("internal-listen", self.internal_listen, |text| match text {
                "" => Ok(None),
                text => address(text).map(Some),
            }),
            limits: Limits {
                connections: settings.read("max-connections", self.max_connections, |text| count(text, 1..=1_000_000)),
                ..Limits::default()
            },
            tls: settings.tls(self.tls_cert, self.tls_key, self.tls_client_ca),
        };
        settings.finish(config)
    }
}

#[cfg(test)]
mod tests {
    use clap::{Args, Command};

    use super::{settings::SETTINGS, *};

    #[test]
    fn help_shows_every_setting_with_its_default() {
        let help = ServeArgs::augment_args(Command::new("serve").term_width(10_000)).render_long_help().to_string();
        for (name, default) in SETTINGS {
            let default = if default.is_empty() { "none" } else { default };
            let (_, section) = help.split_once(&format!("--{name} ")).unwrap_or_else(|| panic!("--{name}"));
            let (_, shown) = section.split_once("[default: ").unwrap();
            assert!(shown.starts_with(default), "{name}: {shown}");
            assert!(section.contains(&format!("[env: SHORTKIT_{}", name.to_uppercase().replace('-', "_"))), "{name}");
        }
    }

    #[test]
    fn what_cannot_work_is_refused() {
        let refused = |args: ServeArgs| args.load().unwrap_err().0.len();
        assert_eq!(refused(ServeArgs { environments: Some(" , ".to_owned()), ..ServeArgs::development() }), 1);
        for url in ["sqlite::memory:", "sqlite://x?mode=memory", "x"] {
            let database = DatabaseArgs { database_url: Some(url.to_owned()), ..DatabaseArgs::default() };
            assert_eq!(refused(ServeArgs { database, ..ServeArgs::development() }), 1, "{url}");
        }
    }

    #[test]
    fn requests_end_within_the_grace() {
        let grace = |request_timeout: Option<&str>, shutdown_grace: Option<&str>| {
            let [request_timeout, shutdown_grace] =
                [request_timeout, shutdown_grace].map(|text| text.map(str::to_owned));
            let args = ServeArgs { request_timeout, shutdown_grace, ..ServeArgs::development() };
            args.load().map(|config| config.shutdown_grace.as_secs()).map_err(|Invalid(faults)| faults.join(""))
        };
        assert_eq!(grace(None, None), Ok(35));
        assert_eq!(grace(Some("2m"), None), Ok(125));
        assert_eq!(grace(Some("2m"), Some("0s")), Ok(0), "whoever would rather have repeats");
        assert!(grace(None, Some("2h")).is_err_and(|fault| fault.starts_with("shutdown-grace: `2h` is not from 0s")));
    }

    #[test]
    fn retention_says_what_is_wrong() {
        let load = |[all, payloads, attempts]: [&str; 3]| {
            let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
            let (retain, retain_payloads, retain_attempts) = (given(all), given(payloads), given(attempts));
            let args = ServeArgs { retain, retain_payloads, retain_attempts, ..ServeArgs::development() };
            args.load().map(|config| config.retention)
        };
        let days = |days: u64| Some(Duration::from_secs(days * 24 * 60 * 60));
        let all = Retention { deliveries: days(30), payloads: days(7), attempts: days(30) };
        assert_eq!(load(["30d", "7d", "30days"]).unwrap(), all);
        assert_eq!(load(["", "forever", ""]).unwrap(), Retention::default());
        assert_eq!(load(["30d", "forever", ""]).unwrap().payloads(), days(30));
        for (given, parts) in [
            (["59m", "", ""], ["retain: `59m`", "1h"]),
            (["", "soon", ""], ["retain-payloads: `soon`", "forever"]),
            (["7d", "30d", ""], ["retain-payloads: 30days", "longer than retain, which is 7days"]),
            (["7d", "", "30d"], ["retain-attempts: 30days", "longer than retain, which is 7days"]),
        ] {
            let Invalid(faults) = load(given).unwrap_err();
            assert!(faults.len() == 1 && parts.iter().all(|part| faults[0].contains(part)), "{faults:?}");
        }
    }

    #[test]
    fn nothing_but_a_master_key_must_be_given() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("master-key");
        let given = || ServeArgs {
            master_key: MasterKeyArgs { master_key_file: Some(file.to_str().unwrap().to_owned()) },
            ..ServeArgs::default()
        };
        for (content, fault) in
            [(None, "No such file"), (Some("#"), "holds no master key"), (Some("secret"), "master key 1")]
        {
            if let Some(content) = content {
                std::fs::write(&file, content).unwrap();
            }
            let Invalid(faults) = given().load().unwrap_err();
            assert!(faults.len() == 1 && faults[0].contains(fault), "{faults:?}");
            assert!(!faults[0].contains("secret"), "{faults:?}");
        }
        std::fs::write(&file, Vault::new_master_key().as_bytes()).unwrap();
        let config = given().load().unwrap();
        assert_eq!(config.master_key_file, Some(file));
        assert!(config.vault.is_some());
        let Invalid(faults) = ServeArgs::default().load().unwrap_err();
        assert!(faults.len() == 1 && faults[0].contains("openssl rand -base64 32"), "{faults:?}");
        assert_eq!(config.retry_schedule, RetrySchedule::default());
        assert_eq!(config.environments, [Environment::Live, Environment::Test]);
        assert!(!config.allow_http && !config.allow_loopback);
    }

    #[test]
    fn every_fault_is_named_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("shortkit.toml");
        std::fs::write(&file, "listen = \"x\"\nhealth = \"maybe\"\nmax-in-flight = 0\nevent-types = [\"a\", \"a\"]\n")
            .unwrap();
        let args = ServeArgs {
            database: DatabaseArgs {
                config: Some(file),
                database_url: Some("mysql://me:pw@h/d".to_owned()),
                log: None,
            },
            retry_schedule: Some("0s,soon".to_owned()),
            egress_allow: Some("10.0.0.0/33".to_owned()),
            environments: Some("live,prod".to_owned()),
            ..ServeArgs::development()
        };
        let Invalid(faults) = args.load().unwrap_err();
        for part in
            ["listen:", "health:", "max-in-flight:", "event-types:", "database-url:", "`soon`", "10.0.0.0/33", "`prod`"]
        {
            assert!(faults.iter().any(|fault| fault.contains(part)), "{part}: {faults:?}");
        }
        assert_eq!(faults.len(), 8, "{faults:?}");
        assert!(!faults.iter().any(|fault| fault.contains("pw")));
    }

    #[test]
    fn what_is_given_wins_over_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("shortkit.toml");
        std::fs::write(&file, "listen = \"127.0.0.1:1\"\nallow-http = true\nmax-in-flight = 7\n").unwrap();
        let args = ServeArgs {
            database: DatabaseArgs { config: Some(file), ..DatabaseArgs::default() },
            listen: Some("127.0.0.1:2".to_owned()),
            dev: true,
            ..ServeArgs::default()
        };
        let config = args.load().unwrap();
        assert_eq!((config.listen.port(), config.max_in_flight_per_webhook), (2, 7));
    }
}
