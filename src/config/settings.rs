//! Settings by their names: from a flag, the environment or the file, read into their types, with all faults collected.

use std::{
    fmt::Display,
    net::SocketAddr,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use ipnet::IpNet;
use zeroize::Zeroizing;

use super::{DatabaseArgs, DatabaseConfig, Invalid, MasterKeyArgs};
use crate::{
    listen::{Tls, TlsFiles},
    vault::Vault,
    webhook::{Environment, Retention},
};

/// What is finished is kept for at least this long, so that people and programs can look at it …
const MIN_RETENTION: Duration = Duration::from_secs(60 * 60);
/// … and for at most as long as this, which is 100 years, unless it is kept for ever.
const MAX_RETENTION: Duration = Duration::from_secs(100 * 31_557_600);

/// The grace when it is not given: time for what is on the wire to end, and to be written down.
const LONGER_THAN_A_REQUEST: &str = "request-timeout + 5s";
const GRACE_AFTER_REQUESTS: Duration = Duration::from_secs(5);
const MAX_SHUTDOWN_GRACE: Duration = Duration::from_secs(60 * 60);

/// No setting of the backlog is larger than this.
const MAX_BACKLOG: u64 = 1_000_000_000_000;

/// Every setting by its name in flags, in the file and, as `SHORTKIT_…`, in the environment, with its default.
pub(super) const SETTINGS: [(&str, &str); 29] = [
    ("database-url", "sqlite://shortkit.db?mode=rwc"),
    ("log", "info"),
    ("master-key-file", ""),
    ("database-connections", "16"),
    ("listen", "127.0.0.1:8080"),
    ("egress-allow", ""),
    ("egress-ca", ""),
    ("allow-http", "false"),
    ("retry-schedule", "0s,1m,5m,30m,2h,24h"),
    ("event-types", "content.ready,content.errored,export.ready"),
    ("request-timeout", "30s"),
    ("rate-limit", "1000/min"),
    ("environments", "live,test"),
    ("max-in-flight", "32"),
    ("max-webhooks", "1000"),
    ("max-backlog", "10000000"),
    ("max-backlog-per-organization", "1000000"),
    ("retain", "forever"),
    ("retain-payloads", "forever"),
    ("retain-attempts", "forever"),
    ("shutdown-grace", LONGER_THAN_A_REQUEST),
    ("shutdown-delay", "0s"),
    ("reflection", "true"),
    ("health", "true"),
    ("internal-listen", ""),
    ("max-connections", "4096"),
    ("tls-cert", ""),
    ("tls-key", ""),
    ("tls-client-ca", ""),
];

/// Holds the master keys themselves, when no file does. There is no flag for them: every process on a machine can read
/// the flags of every other.
const MASTER_KEY: &str = "SHORTKIT_MASTER_KEY";
/// What to do when there is none.
const MAKE_A_MASTER_KEY: &str = "a master key is needed, which encrypts the signing secrets. Make one and keep it safe:\n    \
     (umask 077; openssl rand -base64 32 > shortkit.master-key)\n  \
     then pass --master-key-file shortkit.master-key, or set SHORTKIT_MASTER_KEY to what it holds";

/// The master keys of a file.
pub fn read_master_keys(path: &Path) -> Result<Vault, String> {
    let text = Zeroizing::new(std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?);
    Vault::parse(&text).map_err(|error| format!("{}: {error}", path.display()))
}

/// Reads settings one after the other and collects what is wrong with them.
pub(super) struct Settings {
    file: toml::Table,
    pub(super) faults: Vec<String>,
}

impl Settings {
    pub(super) fn open(path: Option<&Path>) -> Self {
        let mut settings = Self { file: toml::Table::new(), faults: Vec::new() };
        let Some(path) = path else { return settings };
        let read = std::fs::read_to_string(path).map_err(|error| error.to_string());
        match read.and_then(|text| text.parse::<toml::Table>().map_err(|error| error.to_string())) {
            Ok(file) => settings.file = file,
            Err(error) => settings.faults.push(format!("{}: {}", path.display(), error.trim_end())),
        }
        let unknown = settings.file.keys().filter(|key| SETTINGS.iter().all(|(name, _)| name != key));
        settings.faults.extend(unknown.map(|key| format!("{}: unknown setting `{key}`", path.display())));
        settings
    }

    pub(super) fn database(&mut self, args: DatabaseArgs) -> DatabaseConfig {
        DatabaseConfig {
            database_url: self.read("database-url", args.database_url, database_url),
            log: self.read("log", args.log, |text| {
                let filter = tracing_subscriber::EnvFilter::builder().parse(text);
                filter.map(|_| text.to_owned()).map_err(|error| format!("`{text}`: {error}"))
            }),
        }
    }

    /// The master keys, and the file that they came from. A file wins over the environment's own keys.
    pub(super) fn master_keys(&mut self, args: MasterKeyArgs, needed: bool) -> (Option<Vault>, Option<PathBuf>) {
        let faults = self.faults.len();
        let from_file = self.read("master-key-file", args.master_key_file, |path| match path {
            "" => Ok(None),
            path => read_master_keys(Path::new(path)).map(|vault| Some((vault, PathBuf::from(path)))),
        });
        if let Some((vault, path)) = from_file {
            return (Some(vault), Some(path));
        }
        let given = std::env::var(MASTER_KEY).ok().map(Zeroizing::new).filter(|text| !text.trim().is_empty());
        let parsed = given.map(|text| Vault::parse(&text).map_err(|error| format!("{MASTER_KEY}: {error}")));
        match parsed {
            Some(Ok(vault)) => return (Some(vault), None),
            Some(Err(fault)) => self.faults.push(fault),
            None if needed && self.faults.len() == faults => {
                self.faults.push(format!("master-key-file: {MAKE_A_MASTER_KEY}"));
            }
            None => {}
        }
        (None, None)
    }

    /// The setting as given, else as the file says, else its default; a faulty one is noted and counts as not given.
    pub(super) fn read<T>(
        &mut self,
        name: &'static str,
        given: Option<String>,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> T {
        let text = given.map(Ok).or_else(|| self.file.get(name).map(text));
        let parsed = text.map(|text| text.and_then(|text| parse(&text)));
        if let Some(Err(fault)) = &parsed {
            self.faults.push(format!("{name}: {fault}"));
        }
        let default = || {
            let (_, default) = SETTINGS.iter().find(|(known, _)| *known == name).expect("SETTINGS names it");
            parse(default).expect("a default is valid")
        };
        parsed.and_then(Result::ok).unwrap_or_else(default)
    }

    /// How long shutting down may take; by itself a little longer than a request.
    pub(super) fn shutdown_grace(&mut self, given: Option<String>, request_timeout: Duration) -> Duration {
        self.read("shutdown-grace", given, |text| match text {
            LONGER_THAN_A_REQUEST => Ok(request_timeout + GRACE_AFTER_REQUESTS),
            _ => duration(text, Duration::ZERO, MAX_SHUTDOWN_GRACE),
        })
    }

    pub(super) fn retention(
        &mut self,
        all: Option<String>,
        payloads: Option<String>,
        attempts: Option<String>,
    ) -> Retention {
        let retention = Retention {
            deliveries: self.read("retain", all, keep),
            payloads: self.read("retain-payloads", payloads, keep),
            attempts: self.read("retain-attempts", attempts, keep),
        };
        let parts = [("retain-payloads", retention.payloads), ("retain-attempts", retention.attempts)];
        for (name, part) in parts {
            if let (Some(part), Some(all)) = (part, retention.deliveries)
                && part > all
            {
                let [part, all] = [part, all].map(humantime::format_duration);
                self.faults.push(format!("{name}: {part} is longer than retain, which is {all}"));
            }
        }
        retention
    }

    pub(super) fn tls(&mut self, cert: Option<String>, key: Option<String>, client_ca: Option<String>) -> Option<Tls> {
        let certificate = self.read("tls-cert", cert, file);
        let key = self.read("tls-key", key, file);
        let client_authorities = self.read("tls-client-ca", client_ca, file);
        let loaded = match (certificate, key, client_authorities) {
            (Some(certificate), Some(key), client_authorities) => {
                Tls::load(TlsFiles { certificate, key, client_authorities })
                    .map_err(|error| format!("tls-cert: {error}"))
            }
            (None, None, None) => return None,
            (None, None, Some(_)) => Err("tls-client-ca: needs tls-cert and tls-key".to_owned()),
            _ => Err("tls-cert: the certificate and tls-key go together".to_owned()),
        };
        loaded.map_err(|fault| self.faults.push(fault)).ok()
    }

    pub(super) fn finish<T>(self, config: T) -> Result<T, Invalid> {
        if self.faults.is_empty() { Ok(config) } else { Err(Invalid(self.faults)) }
    }
}

/// A value of the file as it would stand in a flag.
fn text(value: &toml::Value) -> Result<String, String> {
    match value {
        toml::Value::String(text) => Ok(text.clone()),
        toml::Value::Boolean(value) => Ok(value.to_string()),
        toml::Value::Integer(value) => Ok(value.to_string()),
        toml::Value::Array(items) => Ok(items.iter().map(text).collect::<Result<Vec<_>, _>>()?.join(",")),
        _ => Err(format!("must not be a {}", value.type_str())),
    }
}

pub(super) fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "must be an IP address and a port, such as 127.0.0.1:8080".to_owned())
}

pub(super) fn list<T>(text: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(parse).collect()
}

pub(super) fn range(text: &str) -> Result<IpNet, String> {
    let address = || text.parse().ok().map(|address: std::net::IpAddr| IpNet::from(address));
    text.parse().ok().or_else(address).ok_or_else(|| format!("`{text}` is not a range such as 10.1.0.0/16"))
}

#[expect(clippy::unnecessary_wraps, reason = "a setting may be faulty, and this one never is")]
fn file(path: &str) -> Result<Option<PathBuf>, String> {
    Ok(Some(path).filter(|path| !path.is_empty()).map(PathBuf::from))
}

pub(super) fn certificates(path: &str) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| format!("{path}: {error}"))
}

pub(super) fn environment(word: &str) -> Result<Environment, String> {
    Environment::parse(word).ok_or_else(|| format!("`{word}` is not an environment: live or test"))
}

pub(super) fn boolean(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| format!("`{text}` is neither true nor false"))
}

pub(super) fn backlog(text: &str) -> Result<u64, String> {
    count(text, 1..=MAX_BACKLOG)
}

pub(super) fn count<T: FromStr + PartialOrd + Display>(text: &str, of: RangeInclusive<T>) -> Result<T, String> {
    let count = text.parse().ok().filter(|count| of.contains(count));
    count.ok_or_else(|| format!("`{text}` is not a whole number from {} to {}", of.start(), of.end()))
}

pub(super) fn duration(text: &str, min: Duration, max: Duration) -> Result<Duration, String> {
    let parsed = humantime::parse_duration(text).map_err(|error| format!("`{text}`: {error}"))?;
    if (min..=max).contains(&parsed) {
        return Ok(parsed);
    }
    Err(format!("`{text}` is not from {} to {}", humantime::format_duration(min), humantime::format_duration(max)))
}

/// How long something is kept; none for ever.
fn keep(text: &str) -> Result<Option<Duration>, String> {
    match text {
        "forever" => Ok(None),
        _ => match duration(text, MIN_RETENTION, MAX_RETENTION) {
            Ok(keep) => Ok(Some(keep)),
            Err(fault) => Err(format!("{fault}, nor `forever`")),
        },
    }
}

fn database_url(text: &str) -> Result<String, String> {
    let known = ["sqlite:", "postgres:", "postgresql:"].iter().any(|scheme| text.starts_with(scheme));
    if text.starts_with("sqlite:") && (text.contains(":memory:") || text.contains("mode=memory")) {
        return Err("must name a file: a database in memory would lose what was acknowledged".to_owned());
    }
    // Not the text itself: it may hold a password.
    known.then(|| text.to_owned()).ok_or_else(|| "must start with sqlite:// or postgres://".to_owned())
}
